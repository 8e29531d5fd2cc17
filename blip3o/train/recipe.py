"""Recipes: everything about a training stage that is a number. One complete literal per preset and stage."""

import dataclasses
from dataclasses import dataclass

STAGES = ("clip", "understanding", "generation", "decoder")  # the paper's order; the decoder needs the CLIP tower only


@dataclass(frozen=True)
class Recipe:
    """How one stage is trained.

    steps, batch_size     optimiser steps, and samples in each (pictures; for generation, drawings)
    learning_rate         peak; linear warm-up over `warmup_steps`, then a cosine down to `final_learning_rate`
    weight_decay          on matrices only; gains, biases and embeddings-like vectors are not decayed
    clip_norm             largest gradient norm
    pictures              size of each feature bank that stages after CLIP draw from: frozen features, computed once
    draws_per_prompt      generation: noises drawn for each prompt, which share one pass of the language model
    condition_drop        generation: share of prompts whose condition is zeroed, for guidance
    pooled_drop           generation: share of prompts whose pooled condition is zeroed while its tokens stay: through
                          the pooled one the network would rather learn pairs of colour and shape by heart
    unnamed               generation, decoder: share of the batch that shows objects in colours without a name, so that
                          colour and shape come in all combinations; such a picture is its own prompt
    feature_noise         decoder: deviation of the noise added to features, which makes it forgive a generator's errors
    turns                 understanding: questions about each picture
    seed                  every sample, noise and initial weight of the stage is a function of it and the step
    """

    steps: int
    batch_size: int
    learning_rate: float
    final_learning_rate: float
    warmup_steps: int
    weight_decay: float
    clip_norm: float
    pictures: int
    draws_per_prompt: int
    condition_drop: float
    pooled_drop: float
    unnamed: float
    feature_noise: float
    turns: int
    seed: int

    def unnamed_of(self, count: int) -> int:
        """How many of `count` pictures show colours without a name; never all of them."""
        return min(round(self.unnamed * count), count - 1)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "pictures", "draws_per_prompt", "turns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size % self.draws_per_prompt:
            raise ValueError(
                f"batch_size must be a multiple of draws_per_prompt ({self.draws_per_prompt}), got {self.batch_size}"
            )
        for name in ("condition_drop", "pooled_drop", "unnamed"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not (self.learning_rate > 0 and self.clip_norm > 0):  # so that NaN is refused too
            raise ValueError(
                f"learning_rate and clip_norm must be positive, got {self.learning_rate} and {self.clip_norm}"
            )
        for name in ("final_learning_rate", "warmup_steps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


RECIPES: dict[str, dict[str, Recipe]] = {
    "nano": {
        "clip": Recipe(
            steps=800, batch_size=128, learning_rate=2e-3, final_learning_rate=2e-5, warmup_steps=50,
            weight_decay=0.05, clip_norm=1.0, pictures=1, draws_per_prompt=1, condition_drop=0.0, pooled_drop=0.0,
            unnamed=0.0, feature_noise=0.0, turns=1, seed=1,
        ),
        "understanding": Recipe(
            steps=5000, batch_size=32, learning_rate=2e-3, final_learning_rate=2e-5, warmup_steps=100,
            weight_decay=0.05, clip_norm=1.0, pictures=32768, draws_per_prompt=1, condition_drop=0.0, pooled_drop=0.0,
            unnamed=0.0, feature_noise=0.0, turns=3, seed=2,
        ),
        "generation": Recipe(
            steps=5000, batch_size=256, learning_rate=2e-3, final_learning_rate=2e-5, warmup_steps=100,
            weight_decay=0.01, clip_norm=1.0, pictures=32768, draws_per_prompt=4, condition_drop=0.1, pooled_drop=0.5,
            unnamed=0.25, feature_noise=0.0, turns=1, seed=3,
        ),
        "decoder": Recipe(
            steps=1500, batch_size=64, learning_rate=2e-3, final_learning_rate=2e-5, warmup_steps=50,
            weight_decay=0.01, clip_norm=1.0, pictures=32768, draws_per_prompt=1, condition_drop=0.0, pooled_drop=0.0,
            unnamed=0.5, feature_noise=0.1, turns=1, seed=4,
        ),
    },
}  # fmt: skip


def recipe(preset: str, stage: str, overrides: dict[str, str] | None = None) -> Recipe:
    """The recipe of a preset's stage, with `field=value` overrides parsed to the field's type."""
    if preset not in RECIPES:
        raise ValueError(f"preset must be one that has recipes ({', '.join(RECIPES)}), got {preset!r}")
    if stage not in RECIPES[preset]:
        raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {stage!r}")
    chosen = RECIPES[preset][stage]
    types = {field.name: type(getattr(chosen, field.name)) for field in dataclasses.fields(chosen)}
    changes = {}
    for name, text in (overrides or {}).items():
        if name not in types or types[name] not in (int, float):
            known = ", ".join(field for field, kind in types.items() if kind in (int, float))
            raise ValueError(f"field must be one of {known}; got {name!r}")
        try:
            changes[name] = types[name](text)
        except ValueError:
            raise ValueError(f"{name} must be of type {types[name].__name__}, got {text!r}") from None
    return dataclasses.replace(chosen, **changes)
