"""Flow matching: the straight path between data and noise, its loss, and the sampler that walks it back.

    x_sigma  = (1 - sigma) x + sigma noise          sigma in [0, 1]; 0 is data, 1 is pure noise
    velocity = d x_sigma / d sigma = noise - x

This is the paper's path, X_t = t X_1 + (1 - t) X_0 with t = 1 - sigma, and the velocity has the opposite sign.
A network may predict the velocity itself (the released models) or the sample x. The two carry the same
information, since velocity = (x_sigma - x) / sigma, but weight the noise levels differently: an error in x counts
1 / sigma^2 times as an error in velocity. This file knows no network: a prediction comes in as a tensor or a function.

Sources: Lipman et al. 2023 (arXiv 2210.02747), Liu et al. 2023 (arXiv 2209.03003); logit-normal noise levels from
Esser et al. 2024 (arXiv 2403.03206); guidance from Ho and Salimans 2022 (arXiv 2207.12598).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from blip3o_kernels import flow_interpolate, flow_loss, flow_step, flow_timesteps

TIMESTEPS = 1000.0  # networks read sigma as a time in 0..1000, 1000 being pure noise
SMALLEST_SIGMA = 1e-3  # the released schedule's last noise level; keeps the division by sigma finite


@dataclass(frozen=True)
class FlowConfig:
    """How noise levels are drawn and what the network predicts.

    `sigma` is "uniform" on (0, 1) or "logit_normal": sigmoid(mean + std n), n ~ N(0, 1).
    `prediction` is "velocity" or "sample".
    """

    prediction: Literal["velocity", "sample"]
    sigma: Literal["uniform", "logit_normal"]
    sigma_mean: float
    sigma_std: float

    def __post_init__(self) -> None:
        if self.prediction not in ("velocity", "sample"):
            raise ValueError(f"prediction must be 'velocity' or 'sample', got {self.prediction!r}")
        if self.sigma not in ("uniform", "logit_normal"):
            raise ValueError(f"sigma must be 'uniform' or 'logit_normal', got {self.sigma!r}")
        if not (0 < self.sigma_std < math.inf and math.isfinite(self.sigma_mean)):
            raise ValueError(
                f"sigma_std must be positive and sigma_mean finite, got {self.sigma_std} and {self.sigma_mean}"
            )


def draw_sigma(flow: FlowConfig, count: int, generator: torch.Generator) -> Tensor:
    """Noise levels [count], float32, in [SMALLEST_SIGMA, 1], from `generator` (a CPU generator)."""
    if flow.sigma == "uniform":
        sigma = torch.rand(count, generator=generator)
    else:
        sigma = torch.sigmoid(flow.sigma_mean + flow.sigma_std * torch.randn(count, generator=generator))
    return sigma.clamp(SMALLEST_SIGMA, 1.0)


def as_velocity(flow: FlowConfig, prediction: Tensor, x_sigma: Tensor, sigma: Tensor) -> Tensor:
    """The velocity that a prediction stands for. `sigma` [B] belongs to the rows of `x_sigma` [B, ...]."""
    if flow.prediction == "velocity":
        return prediction
    level = sigma.clamp_min(SMALLEST_SIGMA).view(-1, *[1] * (x_sigma.dim() - 1))
    return ((x_sigma - prediction) / level).to(x_sigma.dtype)


def training_loss(
    flow: FlowConfig, predict: Callable[[Tensor, Tensor], Tensor], x: Tensor, noise: Tensor, sigma: Tensor
) -> Tensor:
    """Mean squared error of `predict(x_sigma, sigma)` in the units the network predicts; a float32 scalar.

    x, noise [B, ...]; sigma [B].
    """
    return _error(flow, predict, x, *flow_interpolate(x, noise, sigma), sigma)


def positioned_loss(
    flow: FlowConfig, predict: Callable[[Tensor, Tensor], Tensor], x: Tensor, positions: Tensor, seed: int
) -> Tensor:
    """`training_loss` of x [B, ...] with noise and noise levels that each row draws by its position in the run, int64
    [B]: they are the same however a batch is taken apart, and never stored."""
    sigma = flow_timesteps(positions, seed, distribution=flow.sigma, mean=flow.sigma_mean, std=flow.sigma_std).clamp(
        SMALLEST_SIGMA, 1.0
    )
    return _error(flow, predict, x, *flow_interpolate(x, None, sigma, seed=seed, positions=positions), sigma)


def _error(
    flow: FlowConfig,
    predict: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    x_sigma: Tensor,
    velocity: Tensor,
    sigma: Tensor,
) -> Tensor:
    prediction = predict(x_sigma, sigma).to(x.dtype)  # autocast leaves it in bfloat16
    return flow_loss(prediction, velocity if flow.prediction == "velocity" else x)


def sigmas(steps: int) -> list[float]:
    """The sampler's noise levels: `steps` values evenly from 1 to 1 / steps, then 0 (the released schedule)."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return [1.0 - i / steps for i in range(steps)] + [0.0]


def sample(
    flow: FlowConfig,
    predict: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    *,
    steps: int,
    predict_unconditional: Callable[[Tensor, Tensor], Tensor] | None = None,
    guidance: float = 1.0,
    solver: Literal["euler", "heun"] = "euler",
) -> Tensor:
    """Integrate d x / d sigma = velocity from sigma = 1 (`noise`) to sigma = 0; returns a tensor like `noise`.

    predict                 (x_sigma [B, ...], sigma [B]) -> prediction [B, ...]
    predict_unconditional   the same without the condition; needed when guidance != 1:
                            v = v_u + guidance (v_c - v_u)
    solver                  "euler": one evaluation a step. "heun": two, second order; the last step, which ends at
                            sigma = 0 where the sample parametrisation has no velocity, is an Euler step.
    """
    if guidance != 1.0 and predict_unconditional is None and math.isfinite(guidance):
        raise ValueError(f"guidance {guidance} needs predict_unconditional; only guidance 1 goes without it")

    def predictions(x: Tensor, level: float) -> tuple[Tensor, Tensor | None]:
        sigma = torch.full((len(x),), level, device=x.device)
        if predict_unconditional is None or guidance == 1.0:
            return predict(x, sigma), None
        return predict(x, sigma), predict_unconditional(x, sigma)

    return integrate(flow, predictions, noise, steps=steps, guidance=guidance, solver=solver)


def integrate(
    flow: FlowConfig,
    predictions: Callable[[Tensor, float], tuple[Tensor, Tensor | None]],
    noise: Tensor,
    *,
    steps: int,
    guidance: float = 1.0,
    solver: Literal["euler", "heun"] = "euler",
    after: Callable[[int, float, Tensor], object] | None = None,
) -> Tensor:
    """`sample` for a network that predicts with and without the condition at once.

    predictions   (x_sigma [B, ...], one noise level) -> predictions [B, ...] with the condition, and without it; None
                  in its place goes without guidance. The levels are those of `sigmas(steps)`, but for the last.
    after         called after every step with its number, the level it started from, and x
    """
    if solver not in ("euler", "heun"):
        raise ValueError(f"solver must be 'euler' or 'heun', got {solver!r}")
    if not math.isfinite(guidance):
        raise ValueError(f"guidance must be finite, got {guidance}")

    def velocities(x: Tensor, level: float) -> tuple[Tensor, Tensor | None]:
        conditional, unconditional = predictions(x, level)
        if flow.prediction == "velocity":
            return conditional, unconditional
        sigma = torch.full((len(x),), level, device=x.device)
        velocity = as_velocity(flow, conditional, x, sigma)
        return velocity, None if unconditional is None else as_velocity(flow, unconditional, x, sigma)

    x = noise
    levels = sigmas(steps)
    for step, (here, there) in enumerate(pairwise(levels)):
        velocity, unconditional = velocities(x, here)
        ahead = flow_step(x, velocity, there - here, unconditional=unconditional, guidance=guidance)
        if solver == "heun" and there > 0:
            first = velocity if unconditional is None else torch.lerp(unconditional, velocity, guidance)
            velocity, unconditional = velocities(ahead, there)
            ahead = flow_step(x, velocity, there - here, unconditional=unconditional, guidance=guidance, previous=first)
        x = ahead
        if after is not None:
            after(step, here, x)
    return x
