"""Recipes: everything about a training run that is a choice. One TOML file is one run: see `recipe_files.py`."""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from blip3o.config import ImageTarget, Objective

# What may change when a run goes on: how a batch is read and cut into parts, and how its gradient is computed, changes
# neither its samples nor, but for rounding, the gradient.
CHANGEABLE = (
    "accumulate",
    "parallel",
    "frozen",
    "checkpointing",
    "compile",
    "max_bad_batches",
    "sample_every",
    "prompts",
    "threads",
    "cache",
    "max_faults",
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one stage is trained: what every stage has.

    steps, batch_size     optimiser steps, and samples in each (pictures; for generation, drawings)
    accumulate            micro-batches of a step, one after the other: less memory, the same gradient
    learning_rate         peak; linear warm-up over `warmup_steps`, then a cosine down to `final_learning_rate`
    weight_decay          on the matrices of products; gains, biases, embeddings and queries are not decayed
    decay_embeddings      embeddings and queries are, as any matrix is: so nano's numbers were found
    betas                 AdamW's
    clip_norm             largest gradient norm
    ema                   decay of the moving average of the weights, which is what the stage leaves behind; 0: none
    dtype                 of products: "float32", "bfloat16", or "auto": bfloat16 where the chip multiplies it in tiles.
                          What trains, its moments and its average are float32 all the same
    checkpointing         what is computed again in the backward pass, for less memory: "none", or the "blocks" that
                          train
    compile               the blocks that train go through torch.compile
    parallel, frozen      how several processes share the work, and what they hold of that which does not train: see
                          `Devices.wrap`
    max_bad_batches       steps that may be left out because a number in them is infinite or NaN; one more is an error
    sample_every          steps between pictures drawn from `prompts`, for the eye; 0: none
    seed                  every sample, noise and initial weight of the stage is a function of it and the step
    """

    steps: int
    batch_size: int
    accumulate: int = 1
    learning_rate: float
    final_learning_rate: float
    warmup_steps: int
    weight_decay: float
    decay_embeddings: bool = False
    betas: tuple[float, float]
    clip_norm: float
    ema: float = 0.0
    dtype: Literal["auto", "float32", "bfloat16"]
    checkpointing: Literal["none", "blocks"] = "none"
    compile: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    frozen: Literal["replicated", "sharded"] = "replicated"
    max_bad_batches: int = 0
    sample_every: int = 0
    prompts: tuple[str, ...] = ()
    seed: int

    def __post_init__(self) -> None:
        self._at_least_one("steps", "batch_size", "accumulate")
        if not (self.learning_rate > 0 and self.clip_norm > 0):  # so that NaN is refused too
            raise ValueError(
                f"learning_rate and clip_norm must be positive, got {self.learning_rate} and {self.clip_norm}"
            )
        self._shares("ema")
        if self.sample_every and not self.prompts:
            raise ValueError(f"prompts must hold at least one, as sample_every is {self.sample_every}; got none")
        for name in ("final_learning_rate", "warmup_steps", "weight_decay", "max_bad_batches", "sample_every"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {list(self.betas)}")

    def plain(self) -> dict[str, Any]:
        """The recipe as JSON holds it."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found

    def fixed(self) -> dict[str, Any]:
        """Of `plain`, what makes another run if it changes."""
        return {name: value for name, value in self.plain().items() if name not in CHANGEABLE}

    def _at_least_one(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def _shares(self, *names: str) -> None:
        for name in names:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")

    def check_without_noise(self, stage: str) -> None:
        """ValueError for what the objective "mse" has no use for, which stages that draw nothing do not have."""


def refuse_noise(stage: str, draws_per_prompt: int, condition_drop: float) -> None:
    """ValueError for noises to draw or a guidance to learn for, which the objective "mse" does not know."""
    if draws_per_prompt != 1:
        raise ValueError(
            f"{stage}.draws_per_prompt must be 1 with objective 'mse', which draws no noise; got {draws_per_prompt}"
        )
    if condition_drop:
        raise ValueError(
            f"{stage}.condition_drop must be 0 with objective 'mse', which is not guided; got {condition_drop}"
        )


@dataclass(frozen=True, kw_only=True)
class ClipRecipe(Recipe):
    """Contrastive image-text learning on nano's world: no choices of its own."""


@dataclass(frozen=True, kw_only=True)
class UnderstandingRecipe(Recipe):
    """Understanding on nano's world.

    pictures              size of the feature bank that batches are drawn from: frozen features, computed once
    turns                 questions about each picture
    """

    pictures: int
    turns: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_one("pictures", "turns")


@dataclass(frozen=True, kw_only=True)
class GenerationRecipe(Recipe):
    """Generation on nano's world.

    pictures              size of the feature bank that batches are drawn from: frozen features, computed once
    draws_per_prompt      noises drawn for each prompt, which share one pass of the language model
    condition_drop        share of prompts whose condition is zeroed, for guidance
    pooled_drop           share of prompts whose pooled condition is zeroed while its tokens stay: through the pooled
                          one the network would rather learn pairs of colour and shape by heart
    unnamed               share of the batch that shows objects in colours without a name, so that colour and shape come
                          in all combinations; such a picture is its own prompt
    """

    pictures: int
    draws_per_prompt: int
    condition_drop: float
    pooled_drop: float
    unnamed: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_one("pictures", "draws_per_prompt")
        if self.batch_size % self.draws_per_prompt:
            raise ValueError(
                f"batch_size must be a multiple of draws_per_prompt ({self.draws_per_prompt}), got {self.batch_size}"
            )
        self._shares("condition_drop", "pooled_drop", "unnamed")

    def unnamed_of(self, count: int) -> int:
        """How many of `count` pictures show colours without a name; never all of them."""
        return min(round(self.unnamed * count), count - 1)

    def check_without_noise(self, stage: str) -> None:
        refuse_noise(stage, self.draws_per_prompt, self.condition_drop)


@dataclass(frozen=True, kw_only=True)
class DecoderRecipe(Recipe):
    """The visual decoder on nano's world.

    pictures              size of the feature bank that batches are drawn from: frozen features, computed once
    unnamed               share of the batch that shows objects in colours without a name
    feature_noise         deviation of the noise added to features, which makes it forgive a generator's errors
    """

    pictures: int
    unnamed: float
    feature_noise: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_one("pictures")
        self._shares("unnamed")
        if not self.feature_noise >= 0:
            raise ValueError(f"feature_noise must not be negative, got {self.feature_noise}")

    def unnamed_of(self, count: int) -> int:
        """How many of `count` pictures show colours without a name; never all of them."""
        return min(round(self.unnamed * count), count - 1)


@dataclass(frozen=True, kw_only=True)
class AutoencoderRecipe(Recipe):
    """The autoencoder of the image target "vae", on nano's world.

    unnamed               share of the batch that shows objects in colours without a name
    kl_weight             of the latents' divergence from a standard normal distribution
    """

    unnamed: float
    kl_weight: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self._shares("unnamed")
        if not self.kl_weight >= 0:
            raise ValueError(f"kl_weight must not be negative, got {self.kl_weight}")

    def unnamed_of(self, count: int) -> int:
        """How many of `count` pictures show colours without a name; never all of them."""
        return min(round(self.unnamed * count), count - 1)


@dataclass(frozen=True, kw_only=True)
class JointRecipe(GenerationRecipe):
    """Understanding and generation together, on nano's world: generation's keys, and

    turns                 questions about each picture; there is a conversation for every prompt
    ratio                 weight of understanding's loss beside generation's
    """

    turns: int
    ratio: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_one("turns")
        if not self.ratio > 0:
            raise ValueError(f"ratio must be positive, got {self.ratio}; without understanding use stage generation")

    def understanding(self) -> UnderstandingRecipe:
        """How the conversations are drawn: one for each prompt, about other pictures than the prompts'."""
        same = {field.name: getattr(self, field.name) for field in fields(UnderstandingRecipe)}
        return UnderstandingRecipe(
            **{**same, "batch_size": self.batch_size // self.draws_per_prompt, "seed": self.seed + 1}
        )


# What a stage's table may hold.
KINDS: dict[str, type[Recipe]] = {
    "clip": ClipRecipe,
    "understanding": UnderstandingRecipe,
    "generation": GenerationRecipe,
    "decoder": DecoderRecipe,
    "autoencoder": AutoencoderRecipe,
    "joint": JointRecipe,
}
STAGES = ("clip", "understanding", "generation", "decoder")  # nano's, in the paper's order
Schedule = Literal["sequential", "joint"]


@dataclass(frozen=True, kw_only=True)
class RunRecipe:
    """One run: a preset's name, the paper's choices, and how each of its stages is trained, in their order.

    weights                   what it begins with: a model folder in our layout or the released one, Qwen2.5-VL's own,
                              or a hub id, which is taken for trained: no stage must come first; "": new weights
    clip_weights              a safetensors file of the CLIP tower alone, in the place of a released checkpoint's own;
                              Qwen2.5-VL has none
    image_target, objective   see `config.Blip3oConfig`
    schedule                  "sequential": understanding, then generation with the language model frozen; "joint": both
                              in one stage of that name, in which the language model learns from both

    ValueError for stages that these choices have no use for.
    """

    model: str
    image_target: ImageTarget = "clip"
    objective: Objective = "flow"
    schedule: Schedule = "sequential"
    weights: str = ""
    clip_weights: str = ""
    stages: dict[str, Recipe]

    def __post_init__(self) -> None:
        if self.clip_weights and not self.weights:
            raise ValueError(f"clip_weights needs weights to be named too, got {self.clip_weights!r} alone")
        self._check_schedule()
        for stage, target in (("decoder", "clip"), ("autoencoder", "vae")):
            if stage in self.stages and self.image_target != target:
                raise ValueError(f"stage {stage} serves image_target {target!r} alone, got {self.image_target!r}")
        for stage, recipe in self.stages.items():
            if self.objective == "mse":
                recipe.check_without_noise(stage)

    def _check_schedule(self) -> None:
        apart = [stage for stage in ("understanding", "generation") if stage in self.stages]
        if self.schedule == "joint" and apart:
            raise ValueError(f"schedule 'joint' trains both at once, in stage joint: there must be no stage {apart[0]}")
        if (self.schedule == "joint") != ("joint" in self.stages):
            raise ValueError(
                f"schedule must be 'joint' where there is a stage joint, and nowhere else, got {self.schedule!r}"
            )
