"""Flow matching against closed forms: for Gaussian data the velocity and the whole path are known exactly.

With x ~ N(mu, s^2) and noise ~ N(0, 1), x_sigma ~ N(m, v) with m = (1 - sigma) mu and v = (1 - sigma)^2 s^2 + sigma^2,

    E[x | x_sigma]            = mu + (1 - sigma) s^2 / v (x_sigma - m)
    E[noise - x | x_sigma]    = -mu + (sigma - (1 - sigma) s^2) / v (x_sigma - m)

and the path that starts at x_1 = noise ends at x_0 = mu + s noise.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from blip3o.flow import SMALLEST_SIGMA, FlowConfig, as_velocity, draw_sigma, sample, training_loss

VELOCITY = FlowConfig(prediction="velocity", sigma="uniform", sigma_mean=0.0, sigma_std=1.0)
SAMPLE = replace(VELOCITY, prediction="sample")
MU, S = 0.7, 0.4
BOTH = pytest.mark.parametrize("flow", [VELOCITY, SAMPLE], ids=["velocity", "sample"])


def gaussian(flow: FlowConfig, mu: float = MU, s: float = S) -> Callable[[Tensor, Tensor], Tensor]:
    """The best possible prediction for data N(mu, s^2)."""

    def predict(x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
        m, v = (1 - level) * mu, (1 - level) ** 2 * s**2 + level**2
        if flow.prediction == "sample":
            return mu + (1 - level) * s**2 / v * (x - m)
        return -mu + (level - (1 - level) * s**2) / v * (x - m)

    return predict


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@BOTH
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_solvers_converge_to_the_exact_path(flow: FlowConfig, solver: Any, order: int) -> None:
    start = noise(64, 3)
    exact = MU + S * start
    errors = [
        (sample(flow, gaussian(flow), start, steps=steps, solver=solver) - exact).abs().max().item()
        for steps in (32, 64, 128)
    ]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15), errors
    assert errors[-1] < (2e-2 if order == 1 else 5e-4)


def test_a_single_point_is_reached_in_one_step() -> None:
    """All data at mu: paths are straight, and one Euler step of any size is exact."""
    for flow in (VELOCITY, SAMPLE):
        drawn = sample(flow, gaussian(flow, s=0.0), noise(5, 2, 3), steps=1)
        torch.testing.assert_close(drawn, torch.full_like(drawn, MU), atol=1e-12, rtol=0)


def test_both_predictions_stand_for_one_velocity() -> None:
    x, sigma = noise(100, 4), torch.linspace(0.01, 1, 100)
    from_sample = as_velocity(SAMPLE, gaussian(SAMPLE)(x, sigma), x, sigma)
    from_velocity = as_velocity(VELOCITY, gaussian(VELOCITY)(x, sigma), x, sigma)
    torch.testing.assert_close(from_sample, from_velocity, atol=1e-6, rtol=1e-6)
    for solver in ("euler", "heun"):
        drawn = [sample(flow, gaussian(flow), x, steps=7, solver=solver) for flow in (SAMPLE, VELOCITY)]  # type: ignore[arg-type]
        torch.testing.assert_close(*drawn, atol=1e-5, rtol=1e-5)


def test_the_velocity_of_a_sample_stays_finite_and_keeps_its_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.ones(2, 3, dtype=dtype)
        velocity = as_velocity(SAMPLE, torch.zeros_like(x), x, torch.tensor([0.0, 0.5]))
        expected = torch.tensor([1 / SMALLEST_SIGMA, 2.0]).to(dtype)
        assert velocity.dtype == dtype
        torch.testing.assert_close(velocity, expected[:, None].expand(2, 3))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_keeps_the_dtype_of_the_noise(flow: FlowConfig, dtype: torch.dtype) -> None:
    start = noise(4, 3).to(dtype)
    for solver in ("euler", "heun"):
        drawn = sample(
            flow, gaussian(flow), start, steps=8, solver=solver, guidance=2.0,
            predict_unconditional=gaussian(flow, mu=0.0),
        )  # type: ignore[arg-type]  # fmt: skip
        assert drawn.dtype == dtype and bool(drawn.isfinite().all())


@BOTH
def test_guidance_one_is_no_guidance(flow: FlowConfig) -> None:
    start = noise(8, 3)

    def never(x: Tensor, sigma: Tensor) -> Tensor:
        raise AssertionError("guidance 1 must not evaluate the unconditional prediction")

    for solver in ("euler", "heun"):
        plain = sample(flow, gaussian(flow), start, steps=5, solver=solver)  # type: ignore[arg-type]
        guided = sample(
            flow, gaussian(flow), start, steps=5, solver=solver, guidance=1.0, predict_unconditional=never
        )  # type: ignore[arg-type]  # fmt: skip
        assert torch.equal(plain, guided)


@BOTH
@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("guidance", [0.0, 0.5, 3.0, -1.0])
def test_guidance_follows_its_formula(flow: FlowConfig, solver: Any, guidance: float) -> None:
    """v = v_u + g (v_c - v_u): the same as sampling once with that combination, in either parametrisation."""
    conditional, unconditional = gaussian(flow), gaussian(flow, mu=-0.3, s=1.1)

    def combined(x: Tensor, sigma: Tensor) -> Tensor:
        base = unconditional(x, sigma)
        return base + guidance * (conditional(x, sigma) - base)

    start = noise(8, 3)
    drawn = sample(
        flow, conditional, start, steps=6, solver=solver, guidance=guidance, predict_unconditional=unconditional
    )
    torch.testing.assert_close(drawn, sample(flow, combined, start, steps=6, solver=solver), atol=1e-6, rtol=1e-6)


def test_evaluations_and_levels_of_each_solver() -> None:
    for solver, expected in (("euler", [1.0, 0.75, 0.5, 0.25]), ("heun", [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25])):
        seen: list[float] = []

        def predict(x: Tensor, sigma: Tensor, seen: list[float] = seen) -> Tensor:
            assert sigma.shape == (2,) and sigma.dtype == torch.float32
            seen.append(sigma[0].item())
            return x

        sample(VELOCITY, predict, torch.zeros(2, 3), steps=4, solver=solver)  # type: ignore[arg-type]
        assert seen == expected


def test_uniform_noise_levels() -> None:
    drawn = draw_sigma(VELOCITY, 20_000, torch.Generator().manual_seed(1))
    assert drawn.dtype == torch.float32 and drawn.min() >= SMALLEST_SIGMA and drawn.max() <= 1
    ranks = torch.arange(1, 20_001) / 20_000
    assert (drawn.sort().values - ranks).abs().max() < 1.63 * 20_000**-0.5  # Kolmogorov-Smirnov at 1 %


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.8, 1.0), (-1.0, 0.3)])
def test_logit_normal_noise_levels(mean: float, std: float) -> None:
    flow = replace(VELOCITY, sigma="logit_normal", sigma_mean=mean, sigma_std=std)
    drawn = draw_sigma(flow, 20_000, torch.Generator().manual_seed(1))
    normal = torch.special.ndtr((torch.logit(drawn.double()) - mean) / std).sort().values
    assert (normal - torch.arange(1, 20_001) / 20_000).abs().max() < 1.63 * 20_000**-0.5
    assert drawn.min() >= SMALLEST_SIGMA and drawn.max() <= 1


def test_noise_levels_stay_in_range_where_the_sigmoid_saturates() -> None:
    for mean, level in ((-50.0, SMALLEST_SIGMA), (50.0, 1.0)):
        flow = replace(VELOCITY, sigma="logit_normal", sigma_mean=mean)
        assert torch.equal(draw_sigma(flow, 9, torch.Generator().manual_seed(0)), torch.full((9,), level))


def test_noise_levels_are_the_generators() -> None:
    for flow in (VELOCITY, replace(VELOCITY, sigma="logit_normal")):
        first, again = (draw_sigma(flow, 5, torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(first, again)


@BOTH
def test_the_loss_is_least_at_the_closed_form(flow: FlowConfig) -> None:
    """At the best prediction the loss is what is unknowable; a shift by d adds d^2, up to the sampling error."""
    count = 200_000
    x, drawn = MU + S * noise(count, 1, seed=1), noise(count, 1, seed=2)
    sigma = torch.rand(count, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    best = gaussian(flow)
    loss = training_loss(flow, best, x, drawn, sigma).item()
    v = (1 - sigma) ** 2 * S**2 + sigma**2
    unknowable = (sigma**2 * S**2 / v) if flow.prediction == "sample" else S**2 / v  # Var[x | ..], Var[noise - x | ..]
    assert loss == pytest.approx(unknowable.mean().item(), rel=0.02)
    for shift in (-0.5, 0.5):
        shifted = training_loss(flow, lambda x, s, d=shift: best(x, s) + d, x, drawn, sigma).item()  # type: ignore[misc]
        assert shifted - loss == pytest.approx(shift**2, abs=0.01)


def test_the_loss_is_a_float32_scalar_with_a_gradient() -> None:
    weight = torch.ones(3, requires_grad=True)
    x, drawn, sigma = torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([0.25, 1.0])
    loss = training_loss(VELOCITY, lambda noisy, level: noisy * weight, x, drawn, sigma)
    loss.backward()
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx((0.75**2 + 0) / 2)
    assert weight.grad is not None and weight.grad.tolist() == pytest.approx([2 * (0.25 - 1) * 0.25 / 6] * 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": "noise"}, "prediction must be 'velocity' or 'sample', got 'noise'"),
        ({"sigma": "beta"}, "sigma must be 'uniform' or 'logit_normal', got 'beta'"),
        ({"sigma_std": 0.0}, "sigma_std must be positive and sigma_mean finite, got 0.0"),
        ({"sigma_std": math.nan}, "sigma_std must be positive and sigma_mean finite, got nan"),
        ({"sigma_mean": math.inf}, "sigma_mean finite, got 1.0 and inf"),
    ],
)
def test_a_wrong_configuration_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(VELOCITY, **change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 2, "solver": "rk4"}, "solver must be 'euler' or 'heun', got 'rk4'"),
        ({"steps": 2, "guidance": 2.0}, "guidance 2.0 needs predict_unconditional"),
        ({"steps": 2, "guidance": math.nan}, "guidance must be finite, got nan"),
        ({"steps": 2, "guidance": math.inf}, "guidance must be finite, got inf"),
    ],
)
def test_wrong_sampling_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(VELOCITY, gaussian(VELOCITY), noise(2, 3), **options)


def test_tensors_that_do_not_fit_are_refused() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="sigma"):
        training_loss(VELOCITY, lambda x, s: x, x, x, torch.zeros(3))
    with pytest.raises((ValueError, TypeError), match="noise"):
        training_loss(VELOCITY, lambda x, s: x, x, torch.zeros(2, 4), torch.zeros(2))
    with pytest.raises((ValueError, TypeError), match="velocity"):
        sample(VELOCITY, lambda x, s: x[:, :2], x, steps=1)
