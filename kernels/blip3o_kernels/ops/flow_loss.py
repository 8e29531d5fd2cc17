"""The weighted mean squared error of flow matching.

    loss = mean over all elements of weight[b] * (prediction - target)^2      scalar float32

prediction and target [B, ...] float, same dtype; weight [B] float or None (1). The result is float32 (float64 for
float64 inputs): nothing is rounded to the inputs' dtype. The native and Triton bodies cannot be differentiated twice.
Errors: TypeError for a dtype, ValueError for a shape, device or an empty input.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks, dispatch
from ..bodies import NATIVE_CPU, TRITON, body
from ..dispatch import Op, choose, direct, plain, transformed
from ..registered import differentiable_once, register, register_gradient
from ..samples import Draw, Sample


def reference(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    dtype = checks.wide(prediction.dtype)
    if weight is None:
        return F.mse_loss(prediction.to(dtype), target.to(dtype))
    error = (prediction.to(dtype) - target.to(dtype)).square().flatten(1)
    return (error.mean(1) * weight.to(dtype)).mean()


def flow_loss(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean of weight[b] * (prediction - target)^2 over all elements; see the module's docstring."""
    checks.floating("prediction", prediction)
    checks.like("target", target, "prediction", prediction)
    if prediction.dim() < 2 or prediction.numel() == 0:
        checks.fail("prediction", "shape [B, ...] with at least one element", list(prediction.shape))
    if weight is not None:
        checks.floating("weight", weight)
        checks.shape("weight", weight, prediction.shape[:1])
        checks.same_device("weight", weight, "prediction", prediction)
    compiling = torch.compiler.is_compiling()
    # Compiled, the formula is left for Inductor to fuse with its neighbours.
    backend = "reference" if dispatch.forced is None and (compiling or transformed()) else choose(OP, prediction)
    if backend == "reference":
        return reference(prediction, target, weight)
    weight = None if weight is None else weight.to(torch.float32)
    if compiling or not (direct(prediction, target) and plain(weight)):
        loss: Tensor = _forward_op(prediction, target, weight, backend)[0]
        return loss
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (prediction, target, weight)):
        loss = _FlowLoss.apply(prediction, target, weight, backend)
        return loss
    return _forward(prediction, target, weight, backend)[0]


class _FlowLoss(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, prediction: Tensor, target: Tensor, weight: Tensor | None, backend: str) -> Tensor:
        loss, means = _forward(prediction, target, weight, backend)
        context.save_for_backward(prediction, target, weight, means)
        context.backend = backend
        return loss

    @staticmethod
    @differentiable_once
    def backward(context: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(context, dloss, _backward if direct(dloss) else _backward_op)


def _gradients(context: Any, dloss: Tensor, backward: Any) -> tuple[Tensor | None, ...]:
    """The gradients of prediction, target and weight that autograd asks for."""
    prediction, target, weight, means = context.saved_tensors
    to_prediction, to_target, to_weight = context.needs_input_grad[:3]
    both: Tensor | None = None
    if to_prediction or to_target:
        both = backward(dloss, prediction, target, weight, context.backend)
    return (
        both if to_prediction else None,
        -both if to_target and both is not None else None,
        means * (dloss / len(means)) if to_weight else None,
        None,
    )


def _forward(prediction: Tensor, target: Tensor, weight: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    """The loss, and each sample's mean squared error [B] without its weight."""
    pair: tuple[Tensor, Tensor] = body("flow_loss", backend).forward(prediction, target, weight)
    return pair


def _backward(dloss: Tensor, prediction: Tensor, target: Tensor, weight: Tensor | None, backend: str) -> Tensor:
    """The gradient of the prediction; the target's is its negative."""
    dprediction: Tensor = body("flow_loss", backend).backward(dloss, prediction, target, weight)
    return dprediction


# As torch knows it: torch.ops.blip3o.flow_loss.
def _fake(prediction: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return (
        prediction.new_empty((), dtype=torch.float32),
        prediction.new_empty(prediction.shape[:1], dtype=torch.float32),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradient(context: Any, dloss: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return _gradients(context, dloss, _backward_op)


_forward_op = register(
    "flow_loss(Tensor prediction, Tensor target, Tensor? weight, str backend) -> (Tensor, Tensor)",
    _forward,
    _fake,
    lambda prediction, *_, **__: 3 * torch.Size(prediction).numel(),
)
_backward_op = register(
    "flow_loss_backward(Tensor dloss, Tensor prediction, Tensor target, Tensor? weight, str backend) -> Tensor",
    _backward,
    lambda dloss, prediction, *_: prediction.new_empty(prediction.shape),
    lambda dloss, prediction, *_, **__: 2 * torch.Size(prediction).numel(),
)
register_gradient("flow_loss", _gradient, _setup)


def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    draw = Draw(dtype, device)
    for shape in ((1, 1), (3, 7), (2, 5, 64), (3, 3, 9, 11), (3, 2, 41, 43)):
        yield Sample(f"{shape}", (draw(*shape), draw(*shape)))
        yield Sample(f"{shape} weight", (draw(*shape), draw(*shape), draw.uniform(shape[0])))
    yield Sample("chunks", (draw(2, 3, 1792), draw(2, 3, 1792), draw.uniform(2)))
    yield Sample("many samples", (draw(70, 3), draw(70, 3), draw.uniform(70)))
    yield Sample("transposed", (draw(8, 3, 5).transpose(0, 1), draw(3, 5, 8).transpose(1, 2)))


OP = Op(
    "flow_loss",
    flow_loss,
    reference,
    samples,
    differentiable=("prediction", "target", "weight"),
    bodies=(NATIVE_CPU, *TRITON),
)
