"""The last linear layer and the cross entropy of its logits, which are never whole in memory.

    logits[n, v] = x[n] . weight[v]                                                      [N, V]   float32, not rounded
    logits       = softcap * tanh(logits / softcap)                                      with a softcap: Gemma
    log_sum[n]   = logsumexp(logits[n])                                                  [N]
    nll[n]       = log_sum[n] - (1 - s) logits[n, target[n]] - s mean_v logits[n, v]     s = label_smoothing
    loss         = mean over the kept n of nll[n] + z_loss * log_sum[n]^2                scalar float32

x [..., D] and weight [V, D] float, one dtype; target [...] int64 or int32; a row is kept unless its target is
ignore_index. With no kept row the loss and its gradients are 0. The result is float32 (float64 for float64 x).

Gradients come in one of two ways. Where the native library has the products itself (`late`), the backward pass
computes them, from logits that were kept if they are few, otherwise from logits computed again. Elsewhere they are
computed together with the loss and kept in float32, and the backward pass multiplies them by what comes from above.
Either way they are rounded once. logits.py has the size of a chunk and the products' dtypes: without autocast they are
exact to float32. With autocast on when the op is called, its products, those of the gradients included, are rounded to
autocast's dtype, as the reference's are. Not differentiable twice.

Errors: TypeError for a dtype, ValueError for a shape, a device or an option out of range: label_smoothing in [0, 1),
z_loss >= 0, softcap > 0. A target outside [0, V) other than ignore_index raises IndexError on a CPU.
Sources: label smoothing Szegedy et al. 2016, arXiv:1512.00567, as torch's cross_entropy has it; z-loss Chowdhery et al.
2022, arXiv:2204.02311; softcap Gemma 2, arXiv:2408.00118.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks, dispatch
from ..bodies import NATIVE_CPU, NATIVE_CUDA, TRITON, body
from ..dispatch import Op, choose, direct, plain, transformed
from ..logits import check_target
from ..memory import empty
from ..native_ops import linear_cross_entropy as native
from ..registered import differentiable
from ..samples import Draw, Sample


def reference(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    dtype = checks.wide(x.dtype)
    logits = (x.flatten(0, -2).to(dtype) @ weight.to(dtype).t()).to(dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    rows = target.flatten().to(torch.int64)
    kept = rows != ignore_index
    total = F.cross_entropy(logits, rows, ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing)
    if z_loss:
        total = total + z_loss * logits.logsumexp(-1).square().masked_fill(~kept, 0.0).sum()
    return total / kept.sum().clamp(min=1).to(dtype)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Mean cross entropy of x @ weight.T against target over the kept rows; see the module's docstring."""
    checks.floating("x", x)
    if x.dim() < 2 or not x.shape[-1]:
        checks.fail("x", "shape [..., D] with D > 0", list(x.shape))
    checks.same_dtype("weight", weight, "x", x)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or not weight.shape[0]:
        checks.fail("weight", f"shape [V, {x.shape[-1]}] with V > 0", list(weight.shape))
    checks.integer("target", target)
    checks.shape("target", target, x.shape[:-1])
    checks.same_device("weight", weight, "x", x)
    checks.same_device("target", target, "x", x)
    checks.whole("ignore_index", ignore_index)
    label_smoothing = checks.number("label_smoothing", label_smoothing, 0.0, "a number in [0, 1)")
    if label_smoothing >= 1.0:
        checks.fail("label_smoothing", "a number in [0, 1)", label_smoothing)
    z_loss = checks.number("z_loss", z_loss, 0.0, "a finite number >= 0")
    if softcap is not None:
        softcap = checks.number("softcap", softcap, checks.TINY, "a finite number > 0, or None")
    compiling = torch.compiler.is_compiling()
    # Compiled, it stays one op: the formula would hold all logits.
    backend = "reference" if dispatch.forced is None and not compiling and transformed() else choose(OP, x)
    immediate = not compiling and direct(x, weight) and plain(target)
    if backend == "reference":
        if immediate and x.is_cpu:
            check_target(target, weight.shape[0], ignore_index)
        return reference(
            x, weight, target, ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap
        )
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    wanted = torch.is_grad_enabled() and x.requires_grad, torch.is_grad_enabled() and weight.requires_grad
    elements = target.numel() * weight.shape[0]
    late = backend == "native" and x.is_cpu and native.late(x.dtype, elements, any(wanted), autocast)
    options: tuple[Any, ...] = (ignore_index, label_smoothing, z_loss, softcap or 0.0, autocast, late, backend)
    if not immediate:
        loss: Tensor = _forward_op(x, weight, target, *wanted, *options)[0]
        return loss
    if any(wanted):
        loss = _apply(x, weight, target, *wanted, *options)
        return loss
    return _forward(x, weight, target, *wanted, *options)[0]


# As torch knows it: torch.ops.blip3o.linear_cross_entropy.
def _setup(context: Any, inputs: tuple[Any, ...], results: tuple[Tensor, Tensor, Tensor]) -> None:
    context.save_for_backward(*inputs[:3], *results[1:])
    context.options = inputs[5:9], *inputs[10:]


def _gradients(context: Any, backward: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, target, *kept = context.saved_tensors
    (want_x, want_weight), (options, late, backend) = context.needs_input_grad[:2], context.options
    if not late and ((want_x and kept[0].shape != x.shape) or (want_weight and kept[1].shape != weight.shape)):
        raise RuntimeError("linear_cross_entropy: a gradient is asked for that the forward pass was told not to keep")
    # Times 1, as most losses are, it is the kept gradients, at most rounded; an op must not return its inputs.
    if late or backward is not _backward or not x.is_cpu or dloss.item() != 1.0:
        dx, dweight = backward(dloss, x, weight, target, *kept, want_x, want_weight, *options, late, backend)
    elif x.dtype is not torch.float32:
        dx, dweight = (empty(gradient.shape, x.dtype).copy_(gradient) for gradient in kept)
    else:
        dx, dweight = kept
    return (dx if want_x else None, dweight if want_weight else None, *[None] * 10)


def _forward(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    want_x: bool,
    want_weight: bool,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    autocast: torch.dtype | None,
    late: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and what the backward pass wants: the gradients of x and weight, float32, empty where they are not
    wanted; or if `late` what native_ops keeps. softcap 0: none."""
    flat, rows, options = x.flatten(0, -2), _rows(target), (ignore_index, label_smoothing, z_loss, softcap)
    if late:
        return native.fused(flat, weight, rows, *options, want_x or want_weight)
    forward = body("linear_cross_entropy", backend).forward
    loss, dx, dweight = forward(flat, weight, rows, *options, autocast, want_x, want_weight)
    return loss, dx.view(x.shape) if want_x else dx, dweight


def _backward(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    dx: Tensor,
    dweight: Tensor,
    want_x: bool,
    want_weight: bool,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    late: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The gradients in the dtype of x, empty where they are not wanted: the kept ones times dloss, or if `late` from
    what is kept instead of them."""
    if not late:
        return (dx * dloss).to(x.dtype), (dweight * dloss).to(x.dtype)
    options = ignore_index, label_smoothing, z_loss, softcap
    sums, logits = dx, dweight
    dx, dweight = native.fused_gradients(
        dloss.item(), x.flatten(0, -2), weight, _rows(target), sums, logits, want_x, want_weight, *options
    )
    return dx.view(x.shape) if want_x else dx, dweight


def _rows(target: Tensor) -> Tensor:
    return target.reshape(-1).to(torch.int64).contiguous()


def _fake(
    x: Tensor, weight: Tensor, target: Tensor, want_x: bool, want_weight: bool, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    loss = x.new_empty((), dtype=torch.float32)
    if options[-2]:
        rows = target.numel()
        logits = x.new_empty(native.logits_kept(x, rows, weight.shape[0], want_x or want_weight), dtype=torch.float32)
        return loss, x.new_empty(3, native.sums_kept(rows), dtype=torch.float32), logits
    shapes = (x.shape if want_x else (0,), weight.shape if want_weight else (0,))
    dx, dweight = (x.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return loss, dx, dweight


def _fake_backward(
    dloss: Tensor, x: Tensor, weight: Tensor, target: Tensor, dx: Tensor, dweight: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    if not options[-2]:
        return x.new_empty(dx.shape), x.new_empty(dweight.shape)
    return x.new_empty(x.shape if options[0] else (0,)), x.new_empty(weight.shape if options[1] else (0,))


def _flops(x: Any, weight: Any, target: Any, want_x: bool, want_weight: bool, *options: Any, **__: Any) -> int:
    return 2 * torch.Size(x).numel() * int(weight[0]) * (1 if options[-2] else 1 + want_x + want_weight)


def _backward_flops(
    dloss: Any, x: Any, weight: Any, target: Any, dx: Any, dweight: Any, *options: Any, **__: Any
) -> int:
    if options[-2]:
        return 2 * torch.Size(x).numel() * int(weight[0]) * (options[0] + options[1])
    return torch.Size(dx).numel() + torch.Size(dweight).numel()


_options = "int ignore_index, float label_smoothing, float z_loss, float softcap"
_forward_op, _apply = differentiable(
    f"linear_cross_entropy(Tensor x, Tensor weight, Tensor target, bool want_x, bool want_weight, {_options},"
    " ScalarType? autocast, bool late, str backend) -> (Tensor, Tensor, Tensor)",
    "linear_cross_entropy_backward(Tensor dloss, Tensor x, Tensor weight, Tensor target, Tensor dx, Tensor dweight,"
    f" bool want_x, bool want_weight, {_options}, bool late, str backend) -> (Tensor, Tensor)",
    fake=_fake,
    fake_backward=_fake_backward,
    flops=_flops,
    backward_flops=_backward_flops,
    setup=_setup,
    gradients=_gradients,
    forward=_forward,
    backward=_backward,
    hidden=True,
)


def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    draw = Draw(dtype, device)

    def some(rows: int, width: int, vocab: int, ignored: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        target = draw.integers(vocab, rows)
        if ignored:
            target = target.masked_fill(draw.uniform(rows, dtype=torch.float32) < ignored, -100)
        return draw(rows, width), draw(vocab, width, scale=0.3), target

    for rows, width, vocab in ((1, 8, 5), (7, 24, 33), (40, 64, 301)):
        yield Sample(f"N{rows} D{width} V{vocab}", some(rows, width, vocab))
        yield Sample(f"N{rows} some ignored", some(rows, width, vocab, 0.5))
    smoothing, z_loss, softcap = {"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"softcap": 3.0}
    for name, option in (("smoothing", smoothing), ("z-loss", z_loss), ("softcap", softcap)):
        yield Sample(name, some(5, 12, 9), {**option})
        yield Sample(f"{name}, V1000", some(6, 48, 1000, 0.3), {**option})
    yield Sample("all options", some(5, 12, 9, 0.3), {**smoothing, **z_loss, **softcap})
    yield Sample("softcap 30", some(9, 40, 77), {"softcap": 30.0})
    x, weight, target = some(3, 1152, 301)
    yield Sample("D1152", (x, weight * 0.2, target.to(torch.int32)))
    yield Sample("V4097", some(2, 16, 4097))
    yield Sample("one entry", some(3, 8, 1))
    x, weight, target = some(6, 20, 30)
    yield Sample("strided", (x[:, ::2], weight.t()[:10].t(), target))
    nothing = torch.full((2, 3), 9, device=device)
    yield Sample("all ignored", (draw(2, 3, 16), draw(10, 16), nothing), {"ignore_index": 9, **z_loss})
    yield Sample("no rows", some(0, 8, 11))


OP = Op(
    "linear_cross_entropy",
    linear_cross_entropy,
    reference,
    samples,
    differentiable=("x", "weight"),
    bodies=(NATIVE_CPU, NATIVE_CUDA, *TRITON),
)
