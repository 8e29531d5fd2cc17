"""The flow ops as torch sees them: registration, threads, which gradients, double differentiation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blip3o_kernels import flow_interpolate, flow_loss, flow_step, timestep_embedding, use
from blip3o_kernels.ops.timestep_embedding import reference


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def test_threads_do_not_change_a_bit() -> None:
    x, noise, sigma = draw(30, 3001), draw(30, 3001, seed=1), draw(30).sigmoid()
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            given = tuple(tensor.clone().requires_grad_() for tensor in (x, noise, sigma))
            with use("native"):
                x_sigma, velocity = flow_interpolate(*given)
                x_sigma = flow_step(x_sigma, velocity, given[2], unconditional=given[1], guidance=2.0)
                loss = flow_loss(x_sigma, velocity, given[2])
            results.append((loss.detach(), *torch.autograd.grad(loss, given)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(first, second) for first, second in zip(results[0], other, strict=True))


def test_sinusoids_are_exact_up_to_rounding() -> None:
    """At integer timesteps too, and where angles in float32 would be wrong by far more."""
    steps = torch.tensor([0, 1, 2, 3, 500, 999, 1000, 77777, -100000])
    truth = reference(steps.double(), 70)
    for name in ("native:portable", "native:avx2", "native"):
        for dtype in (torch.int64, torch.int32, torch.float32):
            with use(name):
                got = timestep_embedding(steps.to(dtype), 70)
            assert got.dtype == torch.float32 and (got - truth).abs().max() < 1.01 * 2**-25


def test_only_the_gradients_asked_for() -> None:
    inputs = draw(3, 7), draw(3, 7, seed=1), draw(3).sigmoid()
    for function in (
        lambda *a: flow_interpolate(*a)[0].sum(),
        lambda *a: flow_interpolate(*a)[1].sum(),
        flow_loss,
        lambda *a: flow_step(*a).square().sum(),
        lambda x, base, step: flow_step(base, x, step, unconditional=x, previous=base).square().sum(),
    ):
        every = tuple(tensor.clone().requires_grad_() for tensor in inputs)
        gradients = torch.autograd.grad(function(*every), every)
        for i, gradient in enumerate(gradients):
            alone = list(inputs)
            alone[i] = inputs[i].clone().requires_grad_()
            assert torch.equal(torch.autograd.grad(function(*alone), alone[i])[0], gradient)


def test_double_differentiation_raises() -> None:
    x, target = draw(3, 7).requires_grad_(), draw(3, 7, seed=1)
    (gradient,) = torch.autograd.grad(flow_loss(x, target), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate"):
        gradient.sum().backward()
    sigma = draw(3).sigmoid().requires_grad_()
    (gradient,) = torch.autograd.grad(flow_step(target, target, sigma, previous=x).sum(), sigma, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate"):
        gradient.sum().backward()
    sigma = sigma.detach()
    (gradient,) = torch.autograd.grad(flow_interpolate(x, target, sigma)[0].sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate"):
        gradient.sum().backward()
