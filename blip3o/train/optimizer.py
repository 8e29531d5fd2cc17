"""How weights move: AdamW's groups, a step's learning rate, a step that bad numbers cannot take, and the average."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blip3o.train.devices import clip
from blip3o.train.recipe import Recipe


def optimizer_for(parameters: dict[str, nn.Parameter], recipe: Recipe) -> torch.optim.AdamW:
    """AdamW in two groups: what decays, and what does not. `fused` is one C++ loop over all parameters."""
    decaying = [x for name, x in parameters.items() if decays(name, x, recipe)]
    others = [x for name, x in parameters.items() if not decays(name, x, recipe)]
    groups = [{"params": decaying, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)
    for parameter in parameters.values():  # now, so that a checkpoint has them also of what no step has used yet
        moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    return optimizer


def decays(name: str, parameter: Tensor, recipe: Recipe) -> bool:
    """Whether a parameter is drawn to zero: a matrix that is multiplied by is; what is looked up (embeddings, queries,
    places) only if the recipe says so; gains and biases never."""
    if parameter.dim() < 2:
        return False
    return recipe.decay_embeddings or (name.endswith(".weight") and not name.endswith("embedding.weight"))


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine from `learning_rate` to `final_learning_rate` at the last step."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return recipe.final_learning_rate + (recipe.learning_rate - recipe.final_learning_rate) * cosine


def descend(optimizer: torch.optim.Optimizer, loss: float, clip_norm: float) -> float:
    """One step down the gradients at hand, clipped; returns their norm before that.

    If the loss or the norm is infinite or NaN, no weight changes on any process, and the gradients stay as they are.
    """
    norm = clip([parameter for group in optimizer.param_groups for parameter in group["params"]], clip_norm)
    if math.isfinite(loss + norm):
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm


class Ema:
    """The moving average of what trains, in float32: average = decay average + (1 - decay) weight, after every step."""

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.averages = {name: x.detach().float().clone() for name, x in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(
            list(self.averages.values()), [x.detach().float() for x in self.parameters.values()], 1 - self.decay
        )

    @torch.no_grad()
    def replace_weights(self) -> dict[str, Tensor]:
        """The average takes the weights' place; returns what these were."""
        before = {name: x.detach().clone() for name, x in self.parameters.items()}
        for name, x in self.parameters.items():
            x.copy_(self.averages[name])
        return before

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the model has the average for its weights."""
        before = self.replace_weights()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, x in self.parameters.items():
                    x.copy_(before[name])


@dataclass
class Training:
    """What a stage in training is besides its weights, and a checkpoint holds.

    bad_batches   steps left out so far, for a number that was infinite or NaN
    """

    optimizer: torch.optim.AdamW
    ema: Ema | None
    bad_batches: int = 0
