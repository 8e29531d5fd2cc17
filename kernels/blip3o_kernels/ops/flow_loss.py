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
from ..bodies import NATIVE_CPU, NATIVE_CUDA, TRITON, body
from ..dispatch import Op, choose, direct, plain, transformed
from ..registered import differentiable
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
    loss: Tensor
    if compiling or not (direct(prediction, target) and plain(weight)):
        loss = _forward_op(prediction, target, weight, backend)[0]
        return loss
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (prediction, target, weight)):
        loss = _apply(prediction, target, weight, backend)
        return loss
    loss, _ = body("flow_loss", backend).forward(prediction, target, weight)
    return loss


# As torch knows it: torch.ops.blip3o.flow_loss, which returns each sample's mean squared error [B] without its weight
# too. Its backward op gives the gradients of the prediction and, if it is wanted, of the target.
def _setup(context: Any, inputs: tuple[Any, ...], results: tuple[Tensor, Tensor]) -> None:
    *tensors, context.backend = inputs
    context.save_for_backward(*tensors, results[1])


def _gradients(context: Any, backward: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of prediction, target and weight that autograd asks for."""
    prediction, target, weight, means = context.saved_tensors
    to_prediction, to_target, to_weight = context.needs_input_grad[:3]
    dprediction = dtarget = None
    if to_prediction or to_target:
        dprediction, dtarget = backward(dloss, prediction, target, weight, to_target, context.backend)
    return (
        dprediction if to_prediction else None,
        dtarget if to_target else None,
        means * (dloss / len(means)) if to_weight else None,
        None,
    )


def _fake(prediction: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return (
        prediction.new_empty((), dtype=torch.float32),
        prediction.new_empty(prediction.shape[:1], dtype=torch.float32),
    )


def _fake_backward(
    dloss: Tensor, prediction: Tensor, target: Tensor, weight: Tensor | None, to_target: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return prediction.new_empty(prediction.shape), prediction.new_empty(prediction.shape if to_target else (0,))


_forward_op, _apply = differentiable(
    "flow_loss(Tensor prediction, Tensor target, Tensor? weight, str backend) -> (Tensor, Tensor)",
    "flow_loss_backward(Tensor dloss, Tensor prediction, Tensor target, Tensor? weight, bool to_target, str backend)"
    " -> (Tensor, Tensor)",
    fake=_fake,
    fake_backward=_fake_backward,
    flops=lambda prediction, *_, **__: 3 * torch.Size(prediction).numel(),
    backward_flops=lambda dloss, prediction, *_, **__: 2 * torch.Size(prediction).numel(),
    setup=_setup,
    gradients=_gradients,
    hidden=True,
)


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
    bodies=(NATIVE_CPU, NATIVE_CUDA, *TRITON),
)
