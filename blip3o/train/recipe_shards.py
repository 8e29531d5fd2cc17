"""Recipes of the stages that read shards: a stage's table with the key `data` is one of these."""

from dataclasses import dataclass
from typing import Literal

from blip3o.data.shards import MAX_PIXELS, TEXT_FILE
from blip3o.train.recipe import Recipe, refuse_noise


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of a mixture: `path`, a tar file or a folder of them, comes in proportion to `weight`."""

    path: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight must be positive, got {self.weight}")


@dataclass(frozen=True, kw_only=True)
class CaptionSource(Source):
    """captions: where they are: "text", in the .txt; any other word, under it in the table "captions" of the .json.
    The same path may come twice, with long captions and with short ones."""

    captions: str = TEXT_FILE


@dataclass(frozen=True, kw_only=True)
class ShardsRecipe(Recipe):
    """What the stages that read shards share. seed also orders the samples.

    max_tokens            of a prompt with its queries, the rest is cut off; of a conversation, longer ones are faulty
    max_faults            largest share of faulty samples among the last 10,000: above it training stops
    max_pixels            of a picture; larger ones are faulty and not decoded
    threads               that read and decode the next batch
    cache                 folder for indices and features; "": indices beside the shards, and no features are stored
    features              what the frozen CLIP tower sees in each picture: computed whenever it is needed ("none"), or
                          once, and stored in `cache` in this dtype
    """

    max_tokens: int
    max_faults: float = 0.001
    max_pixels: int = MAX_PIXELS
    threads: int = 4
    cache: str = ""
    features: Literal["none", "float32", "bfloat16"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_one("max_tokens", "max_pixels", "threads")
        self._shares("max_faults")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in 0..2^63 - 1, got {self.seed}")
        if self.features != "none" and not self.cache:
            raise ValueError(f"cache must be a folder to store features in, as features is {self.features!r}; got ''")


@dataclass(frozen=True, kw_only=True)
class ShardUnderstandingRecipe(ShardsRecipe):
    """Understanding on conversations in JSON, with a picture or without.

    data                  the mixture of sources
    pack                  conversations of a batch are packed into one row of tokens, whose length is a multiple of this
    """

    data: tuple[Source, ...]
    pack: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_one("pack")
        if not self.data:
            raise ValueError("data must name at least one source")


@dataclass(frozen=True, kw_only=True)
class ShardGenerationRecipe(ShardsRecipe):
    """Generation on pictures with captions.

    data                  the mixture of sources
    draws_per_prompt      noises drawn for each prompt, which share one pass of the language model
    condition_drop        share of prompts whose condition is zeroed, for guidance
    pooled_drop           share of prompts whose pooled condition is zeroed while its tokens stay
    autoencoder           folder of diffusers' AutoencoderKL, for image_target "vae" of a model without one of its own
    """

    data: tuple[CaptionSource, ...]
    draws_per_prompt: int = 1
    condition_drop: float
    pooled_drop: float = 0.0
    autoencoder: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_one("draws_per_prompt")
        self._shares("condition_drop", "pooled_drop")
        if self.batch_size % self.draws_per_prompt:
            raise ValueError(
                f"batch_size must be a multiple of draws_per_prompt ({self.draws_per_prompt}), got {self.batch_size}"
            )
        if not self.data:
            raise ValueError("data must name at least one source")

    def check_without_noise(self, stage: str) -> None:
        refuse_noise(stage, self.draws_per_prompt, self.condition_drop)


# The kinds of a stage whose table has the key `data`.
ON_SHARDS: dict[str, type[Recipe]] = {
    "understanding": ShardUnderstandingRecipe,
    "generation": ShardGenerationRecipe,
}
