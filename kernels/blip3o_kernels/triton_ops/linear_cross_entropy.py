"""Cross entropy of a chunk of logits in Triton, between the products of logits.py; the contract is
ops/linear_cross_entropy.py.

One program reads its row twice, a block of the vocabulary at a time: for the sum of exponentials, which every lane
keeps for itself until the end, and for the gradient. A target outside the vocabulary makes the loss NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import logits
from .numbers import rounded, wide

LOWEST = tl.constexpr(-3.0e38)  # below every logit; less it, even -infinity has an exponential, 0


@triton.jit
def _tanh(v):
    """To about two units in the last place: a polynomial where 1 - 2 / (e^2v + 1) would cancel."""
    square = v * v
    p = square * -5.70498872745e-3 + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(v)) + 1.0)
    return tl.where(square < 0.390625, p * square * v + v, tl.where(v < 0.0, -large, large))


@triton.jit
def _kernel(
    losses_ptr,
    dlogits_ptr,
    logits_ptr,
    target_ptr,
    kept_ptr,
    vocab,
    stride,
    ignore_index,
    smoothing,
    z_loss,
    softcap,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    WANTED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * vocab
    low_ptr = dlogits_ptr + (tl.num_programs(0) + row) * stride
    dlogits_ptr += row * stride
    columns = tl.arange(0, BLOCK)
    target = tl.load(target_ptr + row)
    if target == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        if WANTED:
            zeros = tl.zeros([BLOCK], dtype=tl.float32).to(dlogits_ptr.dtype.element_ty)
            for start in range(0, vocab, BLOCK):
                inside = start + columns < vocab
                tl.store(dlogits_ptr + start + columns, zeros, mask=inside)
                if SPLIT:
                    tl.store(low_ptr + start + columns, zeros, mask=inside)
    else:
        chosen = wide(logits_ptr + target, (target >= 0) & (target < vocab))
        if CAPPED:
            chosen = softcap * _tanh(chosen / softcap)
        highest = tl.zeros([BLOCK], dtype=tl.float32) + LOWEST
        sums = tl.zeros([BLOCK], dtype=tl.float32)
        plain_sums = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, vocab, BLOCK):
            inside = start + columns < vocab
            v = wide(logits_ptr + start + columns, inside)
            if CAPPED:
                v = softcap * _tanh(v / softcap)
            if SMOOTHED:
                plain_sums += v
            v = tl.where(inside, v, float("-inf"))
            higher = tl.maximum(highest, v)
            sums = sums * tl.exp(highest - higher) + tl.exp(v - higher)
            highest = higher
        maximum = tl.max(highest, axis=0)
        total = tl.sum(sums * tl.exp(highest - maximum), axis=0)
        log_sum = maximum + tl.log(total)
        loss = log_sum - (1.0 - smoothing) * chosen + z_loss * log_sum * log_sum
        if SMOOTHED:
            loss -= smoothing * (tl.sum(plain_sums, axis=0) / vocab)
        tl.store(losses_ptr + row, tl.where((target >= 0) & (target < vocab), loss, float("nan")))
        if WANTED:
            # d loss / d logit[v] = probability[v] (1 + 2 z_loss log_sum) - smoothing / vocab - (1 - smoothing) [target]
            share = 1.0 / tl.load(kept_ptr).to(tl.float32)
            slope = share * (1.0 + 2.0 * z_loss * log_sum) / total
            spread = share * smoothing / vocab
            for start in range(0, vocab, BLOCK):
                inside = start + columns < vocab
                v = wide(logits_ptr + start + columns, inside)
                if CAPPED:
                    tanh = _tanh(v / softcap)
                    v = softcap * tanh
                gradient = tl.exp(v - maximum) * slope - spread
                gradient -= tl.where(start + columns == target, share * (1.0 - smoothing), 0.0)
                if CAPPED:
                    gradient *= 1.0 - tanh * tanh
                high = rounded(gradient, dlogits_ptr)
                tl.store(dlogits_ptr + start + columns, high, mask=inside)
                if SPLIT:
                    tl.store(low_ptr + start + columns, rounded(gradient - high.to(tl.float32), low_ptr), mask=inside)


def tile(vocab: int) -> tuple[int, int]:
    """BLOCK and the number of warps: 8 logits a thread."""
    block = min(triton.next_power_of_2(vocab), 2048)
    return block, max(block // 256, 1)


def forward(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    autocast: torch.dtype | None,
    want_x: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of x [N, D] and the gradients that are wanted, all float32; target [N] int64."""
    if x.is_cpu:
        logits.check_target(target, weight.shape[0], ignore_index)
    kept = (target != ignore_index).sum().clamp(min=1)
    losses = x.new_empty(x.shape[0], dtype=torch.float32)
    block, warps = tile(weight.shape[0])

    def kernel(chunk: Tensor, dlogits: Tensor | None, start: int) -> None:
        gradient = chunk if dlogits is None else dlogits
        _kernel[(chunk.shape[0],)](
            losses[start:],
            gradient,
            chunk,
            target[start:],
            kept,
            chunk.shape[1],
            gradient.stride(0),
            ignore_index,
            label_smoothing,
            z_loss,
            softcap,
            CAPPED=softcap > 0.0,
            SMOOTHED=label_smoothing > 0.0,
            WANTED=dlogits is not None,
            SPLIT=dlogits is not None and dlogits.shape[0] > chunk.shape[0],
            BLOCK=block,
            num_warps=warps,
        )

    with torch.cuda.device_of(x):
        gradients = logits.gradients(kernel, x, weight, autocast, want_x, want_weight, split=logits.WIDE_RESULTS)
    return (losses.sum(dtype=torch.float64) / kept).to(torch.float32), *gradients
