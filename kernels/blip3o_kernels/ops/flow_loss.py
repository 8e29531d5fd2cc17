"""The weighted mean squared error of flow matching.

    loss = mean over all elements of weight[b] * (prediction - target)^2      scalar float32

prediction and target [B, ...] float, same dtype; weight [B] float or None (1). The result is float32 (float64 for
float64 inputs): nothing is rounded to the inputs' dtype. Errors: TypeError for a dtype, ValueError for a shape,
device or an empty input.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..dispatch import Op, choose
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
    choose(OP, prediction)
    return reference(prediction, target, weight)


def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    draw = Draw(dtype, device)
    for shape in ((1, 1), (3, 7), (2, 5, 64), (3, 3, 9, 11)):
        yield Sample(f"{shape}", (draw(*shape), draw(*shape)))
        yield Sample(f"{shape} weight", (draw(*shape), draw(*shape), draw.uniform(shape[0])))


OP = Op("flow_loss", flow_loss, reference, samples, differentiable=("prediction", "target", "weight"))
