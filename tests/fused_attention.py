"""Attention as the fastest algorithm has to round it: the Triton bodies are measured by it, not by the reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from blip3o_kernels import masks

LOG2E = math.log2(math.e)


class _FusedAttention(torch.autograd.Function):
    """What a kernel that never holds a row of probabilities rounds: y and log_sum, which its backward pass starts
    from, and probabilities and dscores to the dtype of the inputs, before they are multiplied. In float32."""

    @staticmethod
    def forward(context, query, key, value, bias, scale, softcap, dtype):  # type: ignore[no-untyped-def]
        scores = (_capped(query @ key.mT * scale, softcap) + bias) * LOG2E
        top = scores.amax(-1, keepdim=True)
        weights = (scores - top).exp2()
        total = weights.sum(-1, keepdim=True)
        y = (weights.to(dtype).to(value.dtype) @ value / total).to(dtype).to(value.dtype)
        log_sum = (top + total.log2()) * math.log(2)
        log_sum = log_sum.nextafter(2 * log_sum)  # it may be off by its last bit: not by luck only in some rows
        context.save_for_backward(query, key, value, bias, y, log_sum)
        context.options = scale, softcap, dtype
        return y

    @staticmethod
    def backward(context, dy):  # type: ignore[no-untyped-def]
        query, key, value, bias, y, log_sum = context.saved_tensors
        scale, softcap, dtype = context.options
        scores = _capped(query @ key.mT * scale, softcap)
        weights = ((scores + bias) * LOG2E - log_sum * LOG2E).exp2()
        dscores = weights * (dy @ value.mT - (dy * y).sum(-1, keepdim=True))
        if softcap:
            dscores = dscores * (1 - (scores / softcap).square())
        weights, dscores = (x.to(dtype).to(dy.dtype) for x in (weights, dscores))
        return dscores @ key * scale, dscores.mT @ query * scale, weights.mT @ dy, None, None, None, None


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return (scores / softcap).tanh() * softcap if softcap else scores


def fused_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: object):  # type: ignore[no-untyped-def]
    if not key.shape[2]:
        return query.new_zeros(*query.shape[:3], value.shape[3]) + 0 * (query.sum() + key.sum() + value.sum())
    tokens, keys, share = query.shape[2], key.shape[2], query.shape[1] // max(key.shape[1], 1)
    causal, (left, right) = options.get("is_causal"), options.get("window_size") or (-1, -1)  # type: ignore[misc]
    packed = options.get("cu_seqlens_q"), options.get("cu_seqlens_k")
    blocked = masks.hidden(tokens, keys, (left, 0 if causal else right), *packed, query.device)  # type: ignore[arg-type]
    bias, dead = masks.additive(attn_mask, blocked, torch.float32, empty=True)
    bias = torch.zeros(1, device=query.device) if bias is None else bias
    wide = query.float(), *(x.float().repeat_interleave(share, 1) for x in (key, value))
    scale = query.shape[3] ** -0.5 if options.get("scale") is None else options["scale"]
    y = _FusedAttention.apply(*wide, bias, scale, options.get("softcap"), query.dtype)
    return (y if dead is None else y.masked_fill(dead, 0)).to(query.dtype)
