"""The straight path of flow matching, and its velocity.

    x_sigma  = round((1 - sigma) * x + sigma * noise)      [B, ...]      sigma = 0 is data, sigma = 1 is noise
    velocity = round(noise - x)                            [B, ...]      d x_sigma / d sigma

x [B, ...] float; sigma [B] float. Both results have the shape and dtype of x. Computed in float32 (float64 for float64
x), each rounded once. The native and Triton bodies cannot be differentiated twice.

noise is given, [B, ...] with the dtype of x, or None: then it is drawn, standard normal, from seed (0 <= seed < 2^64),
positions [B] int64 (each sample's place in the whole run) and draw (0 <= draw < 2^24), as philox.py defines it for its
stream "noise". It is float32 (float64 for float64 x), made where it is used, in the backward pass once more, and never
stored or rounded to the dtype of x.

Errors: TypeError for a dtype, ValueError for a shape, device or range, for seed or positions missing without noise, and
for seed, positions or draw beside noise.
Source: Lipman et al. 2022, arXiv:2210.02747; Liu et al. 2022, arXiv:2209.03003.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import checks, dispatch, philox
from ..bodies import NATIVE_CPU, NATIVE_CUDA, TRITON, body
from ..dispatch import Op, choose, direct, plain, transformed
from ..registered import differentiable
from ..samples import Draw, Sample


def reference(
    x: Tensor,
    noise: Tensor | None,
    sigma: Tensor,
    *,
    seed: int | None = None,
    positions: Tensor | None = None,
    draw: int = 0,
) -> tuple[Tensor, Tensor]:
    dtype = checks.wide(x.dtype)
    if noise is None:
        assert seed is not None and positions is not None
        noise = philox.noise(positions, x.shape[1:], seed, draw, dtype)
    data, drawn = x.to(dtype), noise.to(dtype)
    time = sigma.to(dtype).view(-1, *[1] * (x.dim() - 1))
    return ((1 - time) * data + time * drawn).to(x.dtype), (drawn - data).to(x.dtype)


def flow_interpolate(
    x: Tensor,
    noise: Tensor | None,
    sigma: Tensor,
    *,
    seed: int | None = None,
    positions: Tensor | None = None,
    draw: int = 0,
) -> tuple[Tensor, Tensor]:
    """(1 - sigma) x + sigma noise, and noise - x, of noise given or drawn; see the module's docstring."""
    checks.floating("x", x)
    if x.dim() == 0:
        checks.fail("x", "shape [B, ...]", list(x.shape))
    checks.floating("sigma", sigma)
    checks.shape("sigma", sigma, x.shape[:1])
    checks.same_device("sigma", sigma, "x", x)
    philox.check_draw(draw)
    key = 0
    if noise is not None:
        checks.like("noise", noise, "x", x)
        for name, value in (("seed", seed), ("positions", positions), ("draw", draw or None)):
            if value is not None:
                checks.fail(name, "none beside noise, which is given", value if name != "positions" else "a tensor")
    else:
        key = _check_drawing(x, seed, positions)
    compiling = torch.compiler.is_compiling()
    # Compiled, the formula is left for Inductor to fuse with its neighbours; but Philox in 64-bit integers is not.
    formula = noise is not None if compiling else transformed()
    backend = "reference" if dispatch.forced is None and formula else choose(OP, x)
    if backend == "reference":
        return reference(x, noise, sigma, seed=seed, positions=positions, draw=draw)
    sigma = sigma.to(torch.float32)
    pair: tuple[Tensor, Tensor]
    if compiling or not (direct(x, noise) and plain(sigma, positions)):
        pair = _forward_op(x, noise, sigma, positions, key, draw, backend)
        return pair
    differentiated = x.requires_grad or sigma.requires_grad or (noise is not None and noise.requires_grad)
    if differentiated and torch.is_grad_enabled():
        pair = _apply(x, noise, sigma, positions, key, draw, backend)
        return pair
    pair = body("flow_interpolate", backend).forward(x, noise, sigma, positions, key, draw)
    return pair


def _check_drawing(x: Tensor, seed: int | None, positions: Tensor | None) -> int:
    """Checks what noise is drawn from; returns the seed as a signed integer."""
    if seed is None:
        checks.fail("seed", "an int, because noise is None", None)
    if positions is None:
        checks.fail("positions", "an int64 tensor [B], because noise is None", None)
    philox.check_positions(positions)
    checks.shape("positions", positions, x.shape[:1])
    checks.same_device("positions", positions, "x", x)
    if x.shape[1:].numel() > philox.MAX_ELEMENTS:
        checks.fail("x", "at most 2^34 elements per sample", x.shape[1:].numel())
    return philox.check_seed(seed)


# As torch knows it: torch.ops.blip3o.flow_interpolate. Its backward op gives dx, and dnoise and dsigma if they are
# wanted (otherwise empty tensors).
def _setup(context: Any, inputs: tuple[Any, ...], results: tuple[Tensor, Tensor]) -> None:
    context.save_for_backward(*inputs[:4])
    context.options = inputs[4:]


def _gradients(context: Any, backward: Any, dx_sigma: Tensor, dvelocity: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients that autograd asks for, one for each argument of the op."""
    wanted = context.needs_input_grad[:3]
    *options, backend = context.options
    found = backward(dx_sigma, dvelocity, *context.saved_tensors, *options, *wanted[1:], backend)
    gradients = (gradient if asked else None for gradient, asked in zip(found, wanted, strict=True))
    return *gradients, None, None, None, None


def _fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _fake_backward(
    dx_sigma: Tensor, dvelocity: Tensor, x: Tensor, noise: Tensor | None, sigma: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    noise_wanted, sigma_wanted = options[3:5]
    dnoise = x.new_empty(x.shape if noise_wanted else (0,))
    return x.new_empty(x.shape), dnoise, sigma.new_empty(sigma.shape if sigma_wanted else (0,))


_arguments = "Tensor x, Tensor? noise, Tensor sigma, Tensor? positions, SymInt seed, SymInt draw"
_forward_op, _apply = differentiable(
    f"flow_interpolate({_arguments}, str backend) -> (Tensor, Tensor)",
    f"flow_interpolate_backward(Tensor dx_sigma, Tensor dvelocity, {_arguments}, bool noise_wanted, bool sigma_wanted,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    fake_backward=_fake_backward,
    flops=lambda x, *_, **__: 4 * torch.Size(x).numel(),
    backward_flops=lambda dx_sigma, *_, **__: 7 * torch.Size(dx_sigma).numel(),
    setup=_setup,
    gradients=_gradients,
)


def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    draw = Draw(dtype, device)
    for shape in ((1, 1), (3, 7), (2, 5, 64), (3, 3, 9, 11), (3, 2, 41, 43), (70,)):
        yield Sample(f"{shape}", (draw(*shape), draw(*shape), draw.uniform(shape[0])))
    ends = torch.tensor([0.0, 1.0], device=device)
    yield Sample("ends", (draw(2, 33), draw(2, 33), ends))
    yield Sample("transposed", (draw(8, 3, 5).transpose(0, 1), draw(3, 5, 8).transpose(1, 2), draw.uniform(3)))
    yield Sample("no samples", (draw(0, 33), draw(0, 33), draw.uniform(0)))
    yield Sample("no elements", (draw(2, 0), draw(2, 0), draw.uniform(2)))

    def drawn(*shape: int) -> Sample:
        places = torch.arange(shape[0], device=device) * (2**33 + 2**31 + 7) + 5
        options = {"seed": 2**63 + 2**33 + shape[-1], "positions": places, "draw": shape[0]}
        return Sample(f"drawn {shape}", (draw(*shape), None, draw.uniform(shape[0])), options)

    for shape in ((1, 1), (3, 7), (2, 2, 1152), (1, 1792), (0, 33), (2, 0), (2,)):
        yield drawn(*shape)
    transposed = drawn(2, 5, 8)
    yield Sample("drawn, transposed", (draw(8, 2, 5).movedim(0, 2), *transposed.args[1:]), transposed.kwargs)


OP = Op(
    "flow_interpolate",
    flow_interpolate,
    reference,
    samples,
    differentiable=("x", "noise", "sigma"),
    bodies=(NATIVE_CPU, NATIVE_CUDA, *TRITON),
)
