"""The last linear layer and the cross entropy of its logits.

    logits[n, v] = x[n] . weight[v]                                                      [N, V]   float32, not rounded
    loss = mean over the kept n of logsumexp(logits[n]) - logits[n, target[n]]           scalar float32

x [..., D] and weight [V, D] float, one dtype; target [...] int64 or int32; a row is kept unless its target is
ignore_index. With no kept row the loss and its gradients are 0. The result is float32 (float64 for float64 x).
Errors: TypeError for a dtype, ValueError for a shape or device; a target outside [0, V) other than ignore_index
raises IndexError on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..dispatch import Op, choose
from ..samples import Draw, Sample


def reference(x: Tensor, weight: Tensor, target: Tensor, ignore_index: int = -100) -> Tensor:
    dtype = checks.wide(x.dtype)
    logits = x.flatten(0, -2).to(dtype) @ weight.to(dtype).t()
    rows = target.flatten().to(torch.int64)
    kept = (rows != ignore_index).sum().clamp(min=1)
    return F.cross_entropy(logits, rows, ignore_index=ignore_index, reduction="sum") / kept


def linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor, ignore_index: int = -100) -> Tensor:
    """Mean cross entropy of x @ weight.T against target over the kept rows; see the module's docstring."""
    checks.floating("x", x)
    if x.dim() < 2:
        checks.fail("x", "shape [..., D]", list(x.shape))
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        checks.fail("weight", f"shape [V, {x.shape[-1]}]", list(weight.shape))
    if weight.dtype is not x.dtype:
        raise TypeError(f"weight: expected the dtype of x, {x.dtype}, got {weight.dtype}")
    checks.integer("target", target)
    checks.shape("target", target, x.shape[:-1])
    checks.same_device("weight", weight, "x", x)
    checks.same_device("target", target, "x", x)
    choose(OP, x)
    return reference(x, weight, target, ignore_index)


def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    draw = Draw(dtype, device)
    for rows, width, vocab in ((1, 8, 5), (7, 24, 33), (40, 64, 301)):
        target = draw.integers(vocab, rows)
        yield Sample(f"N{rows} D{width} V{vocab}", (draw(rows, width), draw(vocab, width, scale=0.3), target))
        target = target.masked_fill(draw.integers(2, rows) == 0, -100)
        yield Sample(f"N{rows} some ignored", (draw(rows, width), draw(vocab, width, scale=0.3), target))
    nothing = torch.full((2, 3), 9, device=device)
    yield Sample("all ignored", (draw(2, 3, 16), draw(10, 16), nothing), {"ignore_index": 9})


OP = Op("linear_cross_entropy", linear_cross_entropy, reference, samples, differentiable=("x", "weight"))
