"""How weights move: AdamW's groups, the learning rate of a step, and a step that bad numbers cannot take."""

import math

import torch
from torch import nn

from blip3o.train.devices import clip
from blip3o.train.recipe import Recipe


def optimizer_for(parameters: dict[str, nn.Parameter], recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; matrices decay, gains and biases do not. `fused` is one C++ loop over all parameters."""
    matrices = [parameter for parameter in parameters.values() if parameter.dim() >= 2]
    vectors = [parameter for parameter in parameters.values() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)
    for parameter in parameters.values():  # now, so that a checkpoint has them also of what no step has used yet
        moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    return optimizer


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine from `learning_rate` to `final_learning_rate` at the last step."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return recipe.final_learning_rate + (recipe.learning_rate - recipe.final_learning_rate) * cosine


def descend(optimizer: torch.optim.Optimizer, loss: float, clip_norm: float) -> float:
    """One step down the gradients at hand, clipped; returns their norm before that, and forgets them.

    No weight changes, on any process, if the loss or the norm is infinite or NaN.
    """
    norm = clip([parameter for group in optimizer.param_groups for parameter in group["params"]], clip_norm)
    if math.isfinite(loss + norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
