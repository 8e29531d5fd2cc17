"""Scaled dot-product attention in the layout and with the argument names of torch's `scaled_dot_product_attention`,
then those of flash-attn.

    scores[b, h, t, s] = cap(scale * query[b, h, t] . key[b, g(h), s]) + mask     [B, H, T, S]  float32
    y = round(softmax(scores) @ value)                                            [B, H, T, V]

query [B, H, T, K], key [B, G, S, K], value [B, G, S, V], one float dtype, H and K above 0; g(h) = h // (H / G), and
G != H needs enable_gqa=True. scale defaults to 1/sqrt(K). What a query sees:

    attn_mask     broadcasts to [B, H, T, S]: boolean (True takes part) or additive float; it carries no gradient
    is_causal     s <= t + S - T: aligned bottom-right, as flash-attn does and torch does not
    window_size   (left, right): t + S - T - left <= s <= t + S - T + right; -1 is no limit, is_causal makes right 0
    cu_seqlens_q, cu_seqlens_k   packed sequences: B is 1; sequence i has the queries cu_seqlens_q[i] to [i + 1] and
                  sees the keys cu_seqlens_k[i] to [i + 1] (by default the same), with T and S of its own above. int32
                  [N + 1], ascending from 0 to T and to S, which is checked on a CPU only. No attn_mask then.

softcap c: cap(x) = c tanh(x / c) (Gemma 2); None or 0: cap(x) = x. A query that sees nothing gives 0, gradient 0 and
log-sum-exp -inf. Scores and probabilities are float32 (float64 for float64), y is rounded once. For T * S >= LONG and
without a softcap the reference calls torch's fused kernel, which computes the same and rounds the probabilities of
half-precision inputs. y lies in memory as [B, T, H, V]. Keys and values are read where they lie, such as a part of a
preallocated cache, if elements of the last dimension are adjacent.
The native and Triton bodies cannot be differentiated twice; their sums are added in an order fixed by shape.
Errors: TypeError for a dtype, ValueError for a shape, device or value and for dropout_p != 0.
Source: Vaswani et al. 2017, arXiv:1706.03762; Dao 2023, arXiv:2307.08691, whose window and packing these are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from .. import checks, dispatch, masks, strides
from ..attention_samples import samples
from ..bodies import NATIVE_CPU, NATIVE_CUDA, TRITON, body
from ..checks import FLOATING, STRIDED
from ..dispatch import Op, choose, direct, plain, refusal, transformed
from ..registered import LIBRARY, differentiable
from ..shortcut import shortcut

# T * S from which torch's fused kernel wins over matmul and softmax, forward and backward: measured on one core of a
# Xeon with AVX-512 at B = 256, H = 6, K = 32. Below, the two differ by less than 20 % either way.
LONG = 32 * 32
WIDEST = 256  # dims that the CUDA kernels have


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window_size: tuple[int, int] | None = None,
    softcap: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    batch, heads, tokens, head_dim = query.shape
    groups, keys = key.shape[1:3]
    scale = head_dim**-0.5 if scale is None else scale
    shared = True if groups != heads else False  # a branch, so that torch.compile has a bool and no symbol
    left, right = window_size or (-1, -1)
    window = (left, 0 if is_causal else right)
    empty = attn_mask is not None or cu_seqlens_q is not None or tokens > keys  # whether a query may see nothing
    if tokens * keys >= LONG and not softcap:
        if is_causal and tokens == keys and left < 0 and attn_mask is None and cu_seqlens_q is None:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=shared)
        blocked = masks.hidden(tokens, keys, window, cu_seqlens_q, cu_seqlens_k, query.device)
        additive, dead = masks.additive(attn_mask, blocked, query.dtype, empty)
        y = F.scaled_dot_product_attention(query, key, value, additive, scale=scale, enable_gqa=shared)
        return y if dead is None else y.masked_fill(dead, 0)
    dtype = checks.wide(query.dtype)
    wide_query, wide_key, wide_value = query.to(dtype) * scale, key.to(dtype), value.to(dtype)
    blocked = masks.hidden(tokens, keys, window, cu_seqlens_q, cu_seqlens_k, query.device)
    additive, dead = masks.additive(attn_mask, blocked, dtype, empty)
    # Fold the query heads that share a key into the rows, so that keys and values are not repeated.
    folded = wide_query if groups == heads else wide_query.reshape(batch, groups, heads // groups * tokens, head_dim)
    scores = folded @ wide_key.transpose(-1, -2)
    if softcap:
        scores = (scores / softcap).tanh() * softcap
    if additive is not None:
        each = scores.view(batch, heads, tokens, keys)
        scores = torch.where(additive > masks.lowest(dtype), each + additive, additive).view_as(scores)
    y = (scores.softmax(-1) @ wide_value).view(batch, heads, tokens, value.shape[-1])
    return (y if dead is None else y.masked_fill(dead, 0)).to(query.dtype)


_shortcut = shortcut("attention")
_saving_shortcut = _shortcut  # asked for the log-sum-exp, too: below torch's dispatcher


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window_size: tuple[int, int] | None = None,
    softcap: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """softmax(scale * query @ key^T + mask) @ value, causal aligned bottom-right; see the module's docstring."""
    y: Tensor
    compiling = is_compiling()
    plainest = attn_mask is window_size is softcap is cu_seqlens_q is cu_seqlens_k is None
    if plainest and dispatch.shortcut >= 0 and not compiling:
        y = _shortcut(dispatch.shortcut, query, key, value, dropout_p, is_causal, scale, enable_gqa)
        if y is not None:
            return y
    # Written out rather than through checks.py where it is cheap to: at decode shapes the call is the cost.
    if not isinstance(query, Tensor) or query.dtype not in FLOATING or query.layout is not STRIDED:
        checks.floating("query", query)
    dtype, shape = query.dtype, query.shape
    if not isinstance(key, Tensor) or key.dtype is not dtype or key.layout is not STRIDED:
        checks.same_dtype("key", key, "query", query)
    if not isinstance(value, Tensor) or value.dtype is not dtype or value.layout is not STRIDED:
        checks.same_dtype("value", value, "query", query)
    if len(shape) != 4 or not shape[1] or not shape[3]:
        checks.fail("query", "shape [B, H, T, K] with H > 0 and K > 0", list(shape))
    batch, heads, tokens, head_dim = shape
    if enable_gqa is not True and enable_gqa is not False:
        checks.flag("enable_gqa", enable_gqa)
    shape = key.shape
    if len(shape) != 4 or shape[0] != batch or shape[3] != head_dim:
        checks.fail("key", f"shape [{batch}, G, S, {head_dim}]", list(shape))
    _, groups, keys, _ = shape
    shape = value.shape
    if len(shape) != 4 or shape[0] != batch or shape[1] != groups or shape[2] != keys:
        checks.fail("value", f"shape [{batch}, {groups}, {keys}, V]", list(shape))
    if groups != heads and (not enable_gqa or groups == 0 or heads % groups):
        checks.fail("key", f"{'a divisor of' if enable_gqa else 'enable_gqa=True, or'} {heads} heads", groups)
    on_cpu = query.is_cpu
    if not (on_cpu and key.is_cpu and value.is_cpu):
        checks.same_device("key", key, "query", query)
        checks.same_device("value", value, "query", query)
    if type(dropout_p) not in (float, int) or dropout_p:
        checks.fail("dropout_p", "0.0, there is no dropout", dropout_p)
    if attn_mask is not None:
        masks.check_mask(attn_mask, query, (batch, heads, tokens, keys))
    if window_size is not None:
        masks.check_window(window_size)
    if is_causal is not True and is_causal is not False:
        checks.flag("is_causal", is_causal)
    if scale is not None:
        scale = checks.number("scale", scale)
    if softcap is not None:
        softcap = checks.number("softcap", softcap, 0.0, "a finite number that is not negative, or None")
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    if packed:
        if attn_mask is not None:
            checks.fail("attn_mask", "None, as cu_seqlens_q says what a query sees", list(attn_mask.shape))
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        masks.check_packed(cu_seqlens_q, cu_seqlens_k, query, key)
    # Compiled on a CPU it is one op: torch's own takes up to six times as long there (docs/decisions.md).
    formula = not on_cpu if compiling else transformed()
    backend = "reference" if dispatch.forced is None and formula else choose(OP, query)
    if not on_cpu and backend == "native" and dispatch.forced is None and max(head_dim, shape[3]) > WIDEST:
        backend = "reference" if refusal(OP, "triton", query.device.type, dtype) else "triton"
    if backend == "reference":
        ends: dict[str, Any] = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
        options: tuple[Any, ...] = (attn_mask, dropout_p, is_causal, scale, enable_gqa)
        return reference(query, key, value, *options, window_size=window_size, softcap=softcap, **ends)
    scale = head_dim**-0.5 if scale is None else scale
    left, right = window_size or (-1, -1)
    inputs = (query, key, value, attn_mask, cu_seqlens_q, cu_seqlens_k)
    options = (is_causal, left, right, softcap or 0.0, scale)
    extras = packed or attn_mask is not None
    if compiling or not direct(query, key, value) or (extras and not plain(attn_mask, cu_seqlens_q, cu_seqlens_k)):
        y = _forward_op(*inputs, *options, backend)[0]
        return y
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        y = _apply(*inputs, *options, backend)
        return y
    y, _ = body("attention", backend).forward(*inputs, *options, False)
    return y


# As torch knows it: torch.ops.blip3o.attention, which returns the scores' log-sum-exp too, float32 [B, H, T]; that
# carries no gradient. Its backward op gives dquery, dkey and dvalue, each a filled
# torch.empty_like(strides.last_adjacent(x)) of its x.
def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, tokens = query.shape[:3]
    return strides.tokens_first(query, value.shape[3]), query.new_empty(batch, heads, tokens, dtype=torch.float32)


def _fake_backward(dy: Tensor, y: Tensor, log_sum: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(strides.last_adjacent(x)) for x in inputs[:3])


def _forward(*inputs: Any) -> Any:
    """By the shortcut where it can be: for one token the call is the cost in a compiled graph as well."""
    query, key, value, mask, cu_seqlens_q, cu_seqlens_k, causal, left, right, softcap, scale, backend = inputs
    plainest = mask is cu_seqlens_q is cu_seqlens_k is None and left == right == -1 and not softcap
    if plainest and dispatch.shortcut >= 0 and backend == "native":
        results = _saving_shortcut(dispatch.shortcut, query, key, value, 0.0, causal, scale, True, True)
        if results is not None:
            return results
    return body("attention", backend).forward(*inputs[:-1])


def _setup(context: Any, inputs: tuple[Any, ...], results: tuple[Tensor, Tensor]) -> None:
    context.save_for_backward(*results, *inputs[:6])
    context.options = inputs[6:]


def _gradients(context: Any, backward: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *backward(dy, *context.saved_tensors, *context.options), *[None] * 9


def _batched(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> Any:
    """vmap: the batch is more samples, of packed sequences more heads."""
    count, mask, packed = info.batch_size, inputs[3], inputs[4] is not None
    if dims[4] is not None or dims[5] is not None:
        raise NotImplementedError("attention: vmap over cu_seqlens_q or cu_seqlens_k")
    query, key, value = (
        x.expand(count, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(inputs[:3], dims[:3], strict=True)
    )
    batch = query.shape[1]
    if packed:  # B is 1
        outputs = _forward_op(*(x.transpose(0, 1).flatten(1, 2) for x in (query, key, value)), *inputs[3:])
        return tuple(x.unflatten(1, (count, -1)).transpose(0, 1) for x in outputs), (0, 0)
    if mask is not None:
        mask = mask.unsqueeze(0) if dims[3] is None else mask.movedim(dims[3], 0)
        mask = mask.view(len(mask), *[1] * (5 - mask.dim()), *mask.shape[1:])
        mask = mask.expand(count, batch, *mask.shape[2:]).flatten(0, 1)
    outputs = _forward_op(*(x.flatten(0, 1) for x in (query, key, value)), mask, *inputs[4:])
    return tuple(x.unflatten(0, (count, batch)) for x in outputs), (0, 0)


def _flops(query: Any, key: Any, value: Any) -> int:
    """As if every query saw every key."""
    batch, heads, tokens, head_dim = torch.Size(query)
    return 2 * batch * heads * tokens * torch.Size(key)[2] * (head_dim + torch.Size(value)[3])


_arguments = (
    "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k,"
    " bool causal, int left, int right, float softcap, float scale, str backend"
)
_forward_op, _apply = differentiable(
    f"attention({_arguments}) -> (Tensor, Tensor)",
    f"attention_backward(Tensor dy, Tensor y, Tensor log_sum, {_arguments}) -> (Tensor, Tensor, Tensor)",
    fake=_fake_forward,
    fake_backward=_fake_backward,
    flops=lambda query, key, value, *_, **__: _flops(query, key, value),
    backward_flops=lambda dy, y, log_sum, query, key, value, *_, **__: _flops(query, key, value) * 5 // 2,
    setup=_setup,
    gradients=_gradients,
    forward=_forward,
    hidden=True,
)
torch.library.register_vmap("blip3o::attention", _batched, lib=LIBRARY)


OP = Op(
    "attention",
    attention,
    reference,
    samples,
    differentiable=("query", "key", "value"),
    bodies=(NATIVE_CPU, NATIVE_CUDA, *TRITON),
)
