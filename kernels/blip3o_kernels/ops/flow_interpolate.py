"""The straight path of flow matching, and its velocity.

    x_sigma  = round((1 - sigma) * x + sigma * noise)      [B, ...]      sigma = 0 is data, sigma = 1 is noise
    velocity = round(noise - x)                            [B, ...]      d x_sigma / d sigma

x and noise [B, ...] float, same dtype; sigma [B] float. Both results have the shape and dtype of x. Computed in
float32 (float64 for float64 x), each rounded once. The native body cannot be differentiated twice.
Errors: TypeError for a dtype, ValueError for a shape or device.
Source: Lipman et al. 2022, arXiv:2210.02747; Liu et al. 2022, arXiv:2209.03003.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import checks, dispatch, native
from ..dispatch import Body, Op, choose, direct, instruction_set, plain, transformed
from ..native import CHUNK, DTYPES
from ..registered import differentiable_once, register, register_gradient
from ..samples import Draw, Sample


def reference(x: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    dtype = checks.wide(x.dtype)
    data, drawn = x.to(dtype), noise.to(dtype)
    time = sigma.to(dtype).view(-1, *[1] * (x.dim() - 1))
    return ((1 - time) * data + time * drawn).to(x.dtype), (drawn - data).to(x.dtype)


def flow_interpolate(x: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(1 - sigma) x + sigma noise, and noise - x; see the module's docstring."""
    checks.floating("x", x)
    if x.dim() == 0:
        checks.fail("x", "shape [B, ...]", list(x.shape))
    checks.like("noise", noise, "x", x)
    checks.floating("sigma", sigma)
    checks.shape("sigma", sigma, x.shape[:1])
    checks.same_device("sigma", sigma, "x", x)
    compiling = torch.compiler.is_compiling()
    # Compiled, the formula is left for Inductor to fuse with its neighbours.
    backend = "reference" if dispatch.forced is None and (compiling or transformed()) else choose(OP, x)
    if backend == "reference":
        return reference(x, noise, sigma)
    sigma = sigma.to(torch.float32)
    if compiling or not (direct(x, noise) and plain(sigma)):
        pair: tuple[Tensor, Tensor] = _forward_op(x, noise, sigma)
        return pair
    if torch.is_grad_enabled() and (x.requires_grad or noise.requires_grad or sigma.requires_grad):
        pair = _FlowInterpolate.apply(x, noise, sigma)
        return pair
    return _forward(x, noise, sigma)


class _FlowInterpolate(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        context.save_for_backward(x, noise, sigma)
        return _forward(x, noise, sigma)

    @staticmethod
    @differentiable_once
    def backward(context: Any, dx_sigma: Tensor, dvelocity: Tensor) -> tuple[Tensor | None, ...]:
        backward = _backward if direct(dx_sigma, dvelocity) else _backward_op
        return _wanted(context, backward(dx_sigma, dvelocity, *context.saved_tensors))


def _wanted(context: Any, gradients: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """The gradients of x, noise and sigma that autograd asks for."""
    return tuple(gradient if context.needs_input_grad[i] else None for i, gradient in enumerate(gradients))


def _forward(x: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    x, noise, sigma = x.contiguous(), noise.contiguous(), sigma.contiguous()
    x_sigma, velocity = _fake(x, noise, sigma)
    status = _CPU_FORWARD(
        _PACK(
            x_sigma.data_ptr(),
            velocity.data_ptr(),
            x.data_ptr(),
            noise.data_ptr(),
            sigma.data_ptr(),
            x.shape[0],
            x.shape[1:].numel(),
            DTYPES[x.dtype],
            instruction_set(),
            torch.get_num_threads(),
            0,
        )
    )
    if status:
        raise native.failed("flow_interpolate", status)
    return x_sigma, velocity


def _backward(
    dx_sigma: Tensor, dvelocity: Tensor, x: Tensor, noise: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx_sigma, dvelocity = dx_sigma.contiguous(), dvelocity.contiguous()
    x, noise, sigma = x.contiguous(), noise.contiguous(), sigma.contiguous()
    dx, dnoise, dsigma = _fake_backward(dx_sigma, dvelocity, x, noise, sigma)
    samples, elements = x.shape[0], x.shape[1:].numel()
    sums = torch.empty(samples * -(-elements // CHUNK), dtype=torch.float64)
    status = _CPU_BACKWARD(
        _PACK_BACKWARD(
            dx.data_ptr(),
            dnoise.data_ptr(),
            dsigma.data_ptr(),
            sums.data_ptr(),
            dx_sigma.data_ptr(),
            dvelocity.data_ptr(),
            x.data_ptr(),
            noise.data_ptr(),
            sigma.data_ptr(),
            samples,
            elements,
            DTYPES[x.dtype],
            instruction_set(),
            torch.get_num_threads(),
            0,
        )
    )
    if status:
        raise native.failed("flow_interpolate", status)
    return dx, dnoise, dsigma


_PACK, _PACK_BACKWARD = native.packer("flow_interpolate"), native.packer("flow_interpolate_backward")
_CPU_FORWARD = native.function("cpu", "flow_interpolate")
_CPU_BACKWARD = native.function("cpu", "flow_interpolate_backward")


# As torch knows it: torch.ops.blip3o.flow_interpolate.
def _fake(x: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _fake_backward(
    dx_sigma: Tensor, dvelocity: Tensor, x: Tensor, noise: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), sigma.new_empty(sigma.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(context: Any, dx_sigma: Tensor | None, dvelocity: Tensor | None) -> tuple[Tensor | None, ...]:
    x, noise, sigma = context.saved_tensors
    dx_sigma = torch.zeros_like(x) if dx_sigma is None else dx_sigma
    dvelocity = torch.zeros_like(x) if dvelocity is None else dvelocity
    return _wanted(context, _backward_op(dx_sigma, dvelocity, x, noise, sigma))


_forward_op = register(
    "flow_interpolate(Tensor x, Tensor noise, Tensor sigma) -> (Tensor, Tensor)",
    _forward,
    _fake,
    lambda x, *_, **__: 4 * torch.Size(x).numel(),
)
_backward_op = register(
    "flow_interpolate_backward(Tensor dx_sigma, Tensor dvelocity, Tensor x, Tensor noise, Tensor sigma)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    lambda dx_sigma, *_, **__: 7 * torch.Size(dx_sigma).numel(),
)
register_gradient("flow_interpolate", _gradient, _setup)


def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    draw = Draw(dtype, device)
    for shape in ((1, 1), (3, 7), (2, 5, 64), (3, 3, 9, 11), (3, 2, 41, 43), (70,)):
        yield Sample(f"{shape}", (draw(*shape), draw(*shape), draw.uniform(shape[0])))
    ends = torch.tensor([0.0, 1.0], device=device)
    yield Sample("ends", (draw(2, 33), draw(2, 33), ends))
    yield Sample("transposed", (draw(8, 3, 5).transpose(0, 1), draw(3, 5, 8).transpose(1, 2), draw.uniform(3)))
    yield Sample("no samples", (draw(0, 33), draw(0, 33), draw.uniform(0)))
    yield Sample("no elements", (draw(2, 0), draw(2, 0), draw.uniform(2)))


OP = Op(
    "flow_interpolate",
    flow_interpolate,
    reference,
    samples,
    differentiable=("x", "noise", "sigma"),
    bodies=(Body("native", "cpu", (torch.float32, torch.bfloat16, torch.float16), True, native.CPU_MISSING),),
)
