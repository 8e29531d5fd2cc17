"""What the tests of the ops share: running an op with its gradients, and the bound that a body must keep.

Truth is the reference in float64. With err(y) = |y - truth|, a body passes if max err(body) <= 2 max err(eager) + 2
ulp(max |truth|) and rms err(body) <= 1.5 rms err(eager), where eager is the reference in the same dtype on the same
inputs; of float32 products the worse of two, one with torch's sums and one with sums in order.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from fused_attention import fused_attention
from in_order import InOrder
from torch import Tensor

from blip3o_kernels import native
from blip3o_kernels.dispatch import Op
from blip3o_kernels.samples import Sample


def bound(op: Op, sample: Sample) -> dict[str, object]:
    """The sample's arguments by name."""
    return dict(inspect.signature(op.reference).bind(*sample.args, **sample.kwargs).arguments)


def tensors_of(arguments: dict[str, object]) -> dict[str, Tensor]:
    return {name: x for name, x in arguments.items() if isinstance(x, Tensor)}


def floating(arguments: dict[str, object]) -> dict[str, Tensor]:
    return {name: x for name, x in tensors_of(arguments).items() if x.is_floating_point()}


def evaluate(
    op: Op,
    function: Callable[..., object],
    arguments: dict[str, object],
    dtype: torch.dtype | None = None,
    backward: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> dict[str, Tensor]:
    """Outputs and gradients by name.

    dtype: what floating tensors are converted to, None leaves them. backward: what the backward pass runs in.
    """
    leaves: dict[str, Tensor] = {}
    converted = dict(arguments)
    if dtype is not None and "dtype" in inspect.signature(function).parameters:  # an op without floating inputs
        converted["dtype"] = dtype
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            if dtype is not None and value.is_floating_point():
                value = value.to(dtype)
            value = value.detach()
            if name in op.differentiable and value.is_floating_point():
                leaves[name] = value.requires_grad_()
            converted[name] = value
    found = outputs_of(function(**converted))
    if leaves:
        total = torch.zeros((), dtype=torch.float64, device=next(iter(found.values())).device)
        for y, upstream in zip(found.values(), upstreams(found), strict=True):
            total = total + (y * upstream.to(y)).sum(dtype=torch.float64)
        with backward():
            total.backward()
    found = {name: y.detach() for name, y in found.items()}
    for name, leaf in leaves.items():
        assert leaf.grad is not None, f"{name} has no gradient"
        assert leaf.grad.dtype == leaf.dtype and leaf.grad.shape == leaf.shape
        found[f"gradient of {name}"] = leaf.grad
    return found


def outputs_of(result: object) -> dict[str, Tensor]:
    results = result if isinstance(result, tuple) else (result,)
    return {f"output {i}": y for i, y in enumerate(results)}


def upstreams(outputs: dict[str, Tensor]) -> Iterator[Tensor]:
    """The gradients that come in, exact in every dtype but float16."""
    generator = torch.Generator().manual_seed(1)
    for y in outputs.values():
        yield torch.randn(y.shape, generator=generator).to(torch.bfloat16).to(y.device)


def ulp(value: float, dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(max(value, info.tiny)))


# What a body is measured by in place of its reference: one that rounds where the fastest algorithm has to, as torch's
# fused kernels do. Of the native ones those on a GPU do so, and those that multiply bfloat16 as such.
# "native:cuda" are the CUDA kernels wherever they run.
FUSED: dict[str, Callable[..., object]] = {"attention": fused_attention}
PRODUCTS = ("attention", "linear_cross_entropy")  # whose references have matrix products


def rounds_as_fused(backend: str, arguments: dict[str, object]) -> bool:
    chosen = native.instruction_set() if backend == "native" else backend.removeprefix("native:")
    tiled = chosen in ("avx512_bf16", "amx")
    first = next(iter(tensors_of(arguments).values()))
    on_gpu = backend == "native:cuda" or (backend == "native" and first.is_cuda)
    return backend == "triton" or on_gpu or (tiled and first.dtype is torch.bfloat16)


@dataclass(frozen=True)
class Expectation:
    """Outputs and gradients by name: in float64, in the inputs' dtype, and how large the float64 ones are."""

    truth: dict[str, Tensor]
    eager: list[dict[str, Tensor]]
    largest: dict[str, float]


def expectation(op: Op, backend: str, arguments: dict[str, object]) -> Expectation:
    fused = FUSED.get(op.name) if rounds_as_fused(backend, arguments) else None
    truth = evaluate(op, op.reference, arguments, torch.float64)
    largest = {name: y.abs().max().item() if y.numel() else 0.0 for name, y in truth.items()}
    if fused:  # its gradients cancel to 0 where a query sees one key: their error is relative to the largest of all
        largest = dict.fromkeys(largest, max(largest.values()))
    eager = [evaluate(op, fused or op.reference, arguments)]
    if op.name in PRODUCTS and all(x.dtype is torch.float32 for x in floating(arguments).values()):
        with InOrder():
            eager.append(evaluate(op, fused or op.reference, arguments))
    return Expectation(truth, eager, largest)


def violations(got: dict[str, Tensor], expected: Expectation, any_size: bool = False) -> Iterator[str]:
    """What is wrong with `got`, one line for each output or gradient that breaks the bound.

    any_size: for random shapes of normal values. Of few elements, or of one row, eager's error may be small by luck,
    and the truth may be a small difference of terms of size 1: then 8 ulp of 1 are allowed, and the mean is not looked
    at.
    """
    for name, y in got.items():
        truth, largest = expected.truth[name], expected.largest[name]
        eager = [each[name] for each in expected.eager]
        if y.shape != truth.shape or y.dtype != eager[0].dtype:
            yield f"{name}: {y.dtype} {list(y.shape)} for {eager[0].dtype} {list(truth.shape)}"
            continue
        if not y.numel():
            continue
        # Gradients may be nothing but what float32 sums of the largest values round: then eager is better by luck.
        float32 = 0.0 if y.dtype is torch.float32 else ulp(largest, torch.float32)
        error, *allowed = ((value.double() - truth).abs() for value in (y, *eager))
        slack = 8 * ulp(max(largest, 1.0), y.dtype) if any_size else 2 * ulp(largest, y.dtype)
        eager_error = max(each.max() for each in allowed)
        if not error.max() <= 2 * eager_error + slack:
            yield f"{name}: off by {error.max()}, eager by {eager_error}"
        elif y.numel() >= 64 and not any_size:  # of fewer, eager's may be small by luck
            rms, *others = (each.square().mean().sqrt() for each in (error, *allowed))
            eager_rms = max(others)
            if not rms <= 1.5 * eager_rms + float32:
                yield f"{name}: off by {rms} in the mean square, eager by {eager_rms}"


def variants(op: Op, dtype: torch.dtype = torch.float32) -> list[Sample]:
    """One small sample of `op` for each set of arguments, and each of their numbers of dimensions, that it has."""
    found: dict[object, Sample] = {}
    for sample in op.samples(dtype):
        arguments = bound(op, sample)
        tensors = list(tensors_of(arguments).values())
        if all(x.numel() for x in tensors) and max(x.numel() for x in tensors) > 8:
            given = tuple((name, x.dim() if isinstance(x, Tensor) else None) for name, x in arguments.items())
            found.setdefault(given, sample)
    return list(found.values())
