"""The noise level of each sample of a run, for flow matching.

    s     = u                            distribution "uniform": u uniform on (0, 1)
    s     = sigmoid(mean + std * n)      distribution "logit_normal": n standard normal
    sigma = shift * s / (1 + (shift - 1) * s)

positions [B] int64 (each sample's place in the whole run); sigma [B] float32 in [0, 1]: 0 is data, 1 is noise. u and n
are those of element 0 of the samples in philox.py's stream "timesteps", from seed (0 <= seed < 2^64) and draw
(0 <= draw < 2^24); "uniform" does not use mean and std. shift > 1 moves levels towards noise: for pictures with m times
as many pixels, shift = sqrt(m) leaves as much of them visible. Computed in float32 and without a gradient; dtype is for
the reference alone, whose float64 is the same formula of the same bits.
Errors: TypeError for a dtype, ValueError for a shape, a word or a range.
Source: Esser et al. 2024, arXiv:2403.03206, logit-normal levels in section 3.1, the shift by resolution in 5.3.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import checks, dispatch, native, philox, triton_ops
from ..bodies import body
from ..checks import TINY
from ..dispatch import Body, Op, choose, direct, transformed
from ..registered import register
from ..samples import Sample
from ..shortcut import shortcut

DISTRIBUTIONS = ("uniform", "logit_normal")


def reference(
    positions: Tensor,
    seed: int,
    *,
    distribution: str = "uniform",
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
    draw: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    words = philox.bits(positions, 2, seed, philox.STREAMS["timesteps"], draw)
    if distribution == "uniform":
        sigma = philox.uniform(words[:, 0], dtype)
    else:
        sigma = torch.sigmoid(mean + std * philox.normal(words, dtype)[:, 0])
    return shift * sigma / (1 + (shift - 1) * sigma)


_shortcut = shortcut("flow_timesteps")


def flow_timesteps(
    positions: Tensor,
    seed: int,
    *,
    distribution: str = "uniform",
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
    draw: int = 0,
) -> Tensor:
    """sigma [B] of the samples at `positions`; see the module's docstring."""
    sigma: Tensor
    compiling = is_compiling()
    if dispatch.shortcut >= 0 and not compiling:
        sigma = _shortcut(dispatch.shortcut, positions, seed, distribution, mean, std, shift, draw)
        if sigma is not None:
            return sigma
    philox.check_positions(positions)
    if positions.dim() != 1:
        checks.fail("positions", "shape [B]", list(positions.shape))
    key = philox.check_seed(seed)
    philox.check_draw(draw)
    if distribution not in DISTRIBUTIONS:
        checks.fail("distribution", "'uniform' or 'logit_normal'", repr(distribution))
    mean = checks.number("mean", mean)
    std = checks.number("std", std, TINY, "a positive, finite number")
    shift = checks.number("shift", shift, TINY, "a positive, finite number")
    backend = "reference" if dispatch.forced is None and not compiling and transformed() else choose(OP, positions)
    if backend == "reference":
        return reference(positions, seed, distribution=distribution, mean=mean, std=std, shift=shift, draw=draw)
    options = (key, distribution == "logit_normal", mean, std, shift, draw)
    if compiling or not direct(positions):
        sigma = _forward_op(positions, *options, backend)
        return sigma
    sigma = body("flow_timesteps", backend).forward(positions, *options)
    return sigma


# As torch knows it: torch.ops.blip3o.flow_timesteps.
def _fake(positions: Tensor, *_: Any) -> Tensor:
    return positions.new_empty(positions.shape, dtype=torch.float32)


_forward_op = register(
    "flow_timesteps(Tensor positions, SymInt seed, bool logit_normal, float mean, float std, float shift, SymInt draw,"
    " str backend) -> Tensor",
    lambda *inputs: body("flow_timesteps", inputs[-1]).forward(*inputs[:-1]),
    _fake,
    lambda positions, *_, **__: 8 * torch.Size(positions).numel(),
)


def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    """`dtype` changes nothing: positions are int64, and sigma is float32."""
    places = torch.arange(300, device=device)
    several: tuple[dict[str, object], ...] = (
        {},
        {"shift": 3.0},
        {"distribution": "logit_normal"},
        {"distribution": "logit_normal", "mean": -0.6, "std": 1.3, "shift": 1.7, "draw": 2**24 - 1},
    )
    for options in several:
        name = str(options) if options else "uniform"
        yield Sample(name, (places, 1), options)
        yield Sample(f"{name}, far", (places[:70] * (2**40 + 2**31 + 1), 2**64 - 5), options)
    yield Sample("strided", (places[5:50:3], 0))
    yield Sample("forty", (places[:40], 1))
    yield Sample("three", (places[7:10] + 2**33, 3))
    yield Sample("no samples", (places[:0], 0))


_POSITIONS = (torch.int64,)
OP = Op(
    "flow_timesteps",
    flow_timesteps,
    reference,
    samples,
    differentiable=(),
    bodies=(
        Body("native", "cpu", _POSITIONS, False, native.CPU_MISSING),
        Body("native", "cuda", _POSITIONS, False, native.CUDA_MISSING),
        Body("triton", "cuda", _POSITIONS, False, triton_ops.GPU_MISSING),
        Body("triton", "cpu", _POSITIONS, False, triton_ops.CPU_MISSING),
    ),
)
