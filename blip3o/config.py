"""Configurations: complete where they are written, checked when they are built.

Every field is required, so a configuration can be read without looking anything up. The presets are in `presets.py`.

Words: width is the size of a token, depth the number of blocks, head_dim the size of a head, mlp_width the size inside
the feed-forward part, grid the tokens along one side of a square, eps the term that keeps a normalisation finite.
"""

import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from blip3o.flow import FlowConfig

Config = TypeVar("Config")
# The choices that the paper compares: what the diffusion transformer makes, and by which loss it learns to.
ImageTarget = Literal["clip", "vae", "pixels"]
Objective = Literal["flow", "mse"]

MOST_BLOCKS = 4096  # more is damage, and would fill the memory before it is found out by the weights


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not 0 < value < math.inf:
            kind = "finite" if value == math.inf else "positive"
            raise ValueError(f"{type(config).__name__}.{name} must be {kind}, got {value}")
        if name == "depth" and value > MOST_BLOCKS:
            raise ValueError(f"{type(config).__name__}.depth must be at most {MOST_BLOCKS}, got {value}")


def _require_multiple(config: object, name: str, value: int, of: int, of_name: str) -> None:
    if value % of:
        raise ValueError(f"{type(config).__name__}.{name} must be a multiple of {of_name} = {of}, got {value}")


def _require_one_of(config: object, name: str, options: Any) -> None:
    value = getattr(config, name)
    if value not in get_args(options):
        raise ValueError(f"{type(config).__name__}.{name} must be one of {get_args(options)}, got {value!r}")


def _require_equal(config: object, name: str, value: object, expected: object, expected_name: str) -> None:
    if value != expected:
        raise ValueError(
            f"{type(config).__name__}.{name} must equal {expected_name}, got {name} = {value} and "
            f"{expected_name} = {expected}"
        )


@dataclass(frozen=True)
class ClipTextConfig:
    """The text tower of a CLIP trained from scratch."""

    vocab_size: int
    context: int  # longest text, in tokens
    width: int
    depth: int
    num_heads: int
    mlp_width: int
    eps: float

    def __post_init__(self) -> None:
        _require_positive(self, *(field.name for field in fields(self)))
        _require_multiple(self, "width", self.width, self.num_heads, "num_heads")


@dataclass(frozen=True)
class ClipConfig:
    """The CLIP whose patch features the diffusion transformer draws. `text` is None for a vision tower alone."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_width: int
    eps: float
    embed_dim: int  # the space that images and texts share
    text: ClipTextConfig | None

    def __post_init__(self) -> None:
        _require_positive(self, *(field.name for field in fields(self) if field.name != "text"))
        _require_multiple(self, "width", self.width, self.num_heads, "num_heads")
        _require_multiple(self, "image_size", self.image_size, self.patch_size, "patch_size")

    @property
    def grid(self) -> int:
        """Patches along one side of the picture."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower of Qwen2.5-VL: windowed attention but for a few blocks, 2 x 2 patches merged into one token."""

    width: int
    depth: int
    num_heads: int
    mlp_width: int
    patch_size: int
    temporal_patch_size: int  # frames in a patch; a still picture is repeated
    merge_size: int  # patches along one side of a merged token
    window_size: int  # pixels along one side of an attention window
    full_attention_blocks: tuple[int, ...]  # the blocks that see the whole picture
    out_width: int  # the language model's width
    eps: float
    rope_theta: float

    def __post_init__(self) -> None:
        _require_positive(self, *(field.name for field in fields(self) if field.name != "full_attention_blocks"))
        _require_multiple(self, "width", self.width, 4 * self.num_heads, "4 num_heads")
        _require_multiple(
            self, "window_size", self.window_size, self.patch_size * self.merge_size, "patch_size x merge_size"
        )
        outside = [block for block in self.full_attention_blocks if not 0 <= block < self.depth]
        if outside:
            raise ValueError(
                f"VisionConfig.full_attention_blocks must lie in 0..{self.depth - 1} (depth {self.depth}), "
                f"got {outside}"
            )

    @property
    def patch_values(self) -> int:
        """Numbers in a flattened patch: channels x frames x height x width."""
        return 3 * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class LlmConfig:
    """The language model: Qwen2.5-VL's decoder."""

    vocab_size: int
    width: int
    depth: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    rope_theta: float
    mrope_section: tuple[int, int, int]  # frequencies for time, height, width
    eps: float
    tie_embeddings: bool  # the output layer is the embedding
    qkv_bias: bool

    def __post_init__(self) -> None:
        _require_positive(
            self, *(f.name for f in fields(self) if f.name not in ("mrope_section", "tie_embeddings", "qkv_bias"))
        )
        _require_multiple(self, "num_heads", self.num_heads, self.num_kv_heads, "num_kv_heads")
        _require_multiple(self, "head_dim", self.head_dim, 2, "2")
        section = self.mrope_section
        if len(section) != 3 or min(section) < 0 or sum(section) != self.head_dim // 2:
            raise ValueError(
                f"LlmConfig.mrope_section must be three numbers, none below 0, that sum to head_dim / 2 = "
                f"{self.head_dim // 2}, got {section}"
            )


@dataclass(frozen=True)
class DitConfig:
    """The diffusion transformer: Lumina-Next with cross-attention to the language model's condition."""

    in_channels: int  # width of the features it draws
    grid: int  # features along one side
    width: int
    depth: int
    num_heads: int
    num_kv_heads: int
    mlp_width: int
    condition_width: int  # width of the language model's hidden states
    time_width: int  # width of the embedding of time and pooled condition
    eps: float
    rope_theta: float

    def __post_init__(self) -> None:
        _require_positive(self, *(field.name for field in fields(self)))
        _require_multiple(self, "width", self.width, 4 * self.num_heads, "4 num_heads")
        _require_multiple(self, "num_heads", self.num_heads, self.num_kv_heads, "num_kv_heads")


@dataclass(frozen=True)
class DecoderConfig:
    """The visual decoder that `nano` trains: features to pixels by flow matching."""

    feature_width: int
    feature_grid: int
    image_size: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_width: int
    time_width: int
    eps: float
    rope_theta: float
    flow: FlowConfig  # how its pixels are noised, and what it predicts

    def __post_init__(self) -> None:
        _require_positive(self, *(field.name for field in fields(self) if field.name != "flow"))
        _require_multiple(self, "width", self.width, 4 * self.num_heads, "4 num_heads")
        _require_multiple(
            self, "image_size", self.image_size, self.patch_size * self.feature_grid, "patch_size x feature_grid"
        )


@dataclass(frozen=True)
class AutoencoderConfig:
    """The autoencoder that `nano` trains for the image target `vae`: pictures to latents and back."""

    image_size: int
    channels: int  # of a latent
    halvings: int  # of a picture's side
    width: int

    def __post_init__(self) -> None:
        _require_positive(self, *(field.name for field in fields(self)))
        _require_multiple(self, "image_size", self.image_size, self.factor, "2^halvings")

    @property
    def factor(self) -> int:
        """Pixels along a side for each latent."""
        return int(2**self.halvings)


TOKENS = ("pad_token", "end_token", "image_token", "query_start_token")


@dataclass(frozen=True)
class Blip3oConfig:
    """The whole system. The large models take decoder and autoencoder from diffusers (None here).

    image_target   what the diffusion transformer makes. "clip": CLIP features, which the visual decoder draws; "vae":
                   an autoencoder's latents; "pixels": the picture. These two in square patches, dit.grid along a side
    objective      "flow": flow matching; "mse": the target itself, by mean squared error
    """

    name: str
    image_target: ImageTarget
    objective: Objective
    clip: ClipConfig
    vision: VisionConfig | None  # None: the language model reads CLIP's tokens
    llm: LlmConfig
    dit: DitConfig
    decoder: DecoderConfig | None
    autoencoder: AutoencoderConfig | None
    num_queries: int
    feature_grid: int  # CLIP's patch tokens are pooled to feature_grid x feature_grid features
    flow: FlowConfig  # objective "flow": how what the diffusion transformer makes is noised, and what it predicts
    pad_token: int
    end_token: int  # ends a turn
    image_token: int  # stands for one token of a picture that is shown
    query_start_token: int  # asks for a picture; the queries follow

    def __post_init__(self) -> None:
        _require_positive(self, "num_queries", "feature_grid")
        _require_multiple(self, "clip.image_size / clip.patch_size", self.clip.grid, self.feature_grid, "feature_grid")
        _require_one_of(self, "image_target", ImageTarget)
        _require_one_of(self, "objective", Objective)
        self._check_target()
        _require_equal(self, "dit.condition_width", self.dit.condition_width, self.llm.width, "llm.width")
        if self.vision is not None:
            _require_equal(self, "vision.out_width", self.vision.out_width, self.llm.width, "llm.width")
        if self.decoder is not None:
            _require_equal(self, "decoder.feature_width", self.decoder.feature_width, self.clip.width, "clip.width")
            _require_equal(self, "decoder.feature_grid", self.decoder.feature_grid, self.feature_grid, "feature_grid")
        ids = {name: getattr(self, name) for name in TOKENS}
        for name, token in ids.items():
            if not 0 <= token < self.llm.vocab_size:
                raise ValueError(f"Blip3oConfig.{name} must lie in 0..{self.llm.vocab_size - 1}, got {token}")
        if len(set(ids.values())) != len(ids):
            raise ValueError(f"Blip3oConfig's special tokens must differ from each other, got {ids}")

    def _check_target(self) -> None:
        """The diffusion transformer's sizes are those of what it makes; nothing is there that would not be used."""
        target, dit, side = self.image_target, self.dit, self.clip.image_size
        if target != "clip" and self.decoder is not None:
            raise ValueError(f"Blip3oConfig.decoder must be None: it draws CLIP features, image_target is {target!r}")
        if target != "vae" and self.autoencoder is not None:
            raise ValueError(f"Blip3oConfig.autoencoder must be None: image_target is {target!r}, not 'vae'")
        if target == "clip":
            _require_equal(self, "dit.in_channels", dit.in_channels, self.clip.width, "clip.width")
            _require_equal(self, "dit.grid", dit.grid, self.feature_grid, "feature_grid")
        elif target == "pixels":
            self._check_patches("clip.image_size", 3, side)
        elif self.autoencoder is not None:  # a foreign one is checked when it is given
            own = self.autoencoder
            _require_equal(self, "autoencoder.image_size", own.image_size, side, "clip.image_size")
            self._check_patches("autoencoder.image_size / 2^halvings", own.channels, side // own.factor)

    def _check_patches(self, name: str, channels: int, side: int) -> None:
        """dit.grid x dit.grid patches must make up [channels, side, side]; `name` is the side's."""
        _require_multiple(self, name, side, self.dit.grid, "dit.grid")
        values = channels * (side // self.dit.grid) ** 2
        _require_equal(self, "dit.in_channels", self.dit.in_channels, values, "the values of a patch")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested dictionaries of numbers, strings, booleans, lists and None: what JSON can hold."""
    return {field.name: _to_plain(getattr(config, field.name)) for field in fields(config)}


def _to_plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_dict(value)
    return list(value) if isinstance(value, tuple) else value


def from_dict(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """The inverse of `to_dict`. ValueError names a field that is unknown, missing, or of the wrong type."""
    return cast(Config, _from_plain(kind, values, kind.__name__))


def _from_plain(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint` of the field called `where`."""
    if get_origin(hint) in (Union, types.UnionType):  # X | None is the only union here
        if value is None:
            return None
        (hint,) = (option for option in get_args(hint) if option is not types.NoneType)
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be a table of fields, got {value!r}")
        hints = get_type_hints(hint)
        unknown, missing = sorted(set(value) - set(hints)), [name for name in hints if name not in value]
        if unknown or missing:
            raise ValueError(f"{where}: unknown fields {unknown}, missing fields {missing}; it has {list(hints)}")
        return cast(type, hint)(**{name: _from_plain(hints[name], value[name], f"{where}.{name}") for name in hints})
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{where} must be one of {get_args(hint)}, got {value!r}")
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple) or any(type(item) is not int for item in value):
            raise ValueError(f"{where} must be a list of integers, got {value!r}")
        return tuple(value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{where} must be of type {hint.__name__}, got {value!r}")
    return value
