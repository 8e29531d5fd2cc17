"""Blip3o: a language model that reads text and pictures, and learnable queries through which it tells a diffusion
transformer what to draw.

    understand   picture -> CLIP features -> language model -> answer
    generate     prompt -> language model -> hidden states at the queries -> diffusion transformer -> target
                 -> picture

The target is `image_target`: CLIP features, which the visual decoder draws; an autoencoder's latents; or the picture.

Shapes: B batch, T tokens, W language-model width, Q queries, F features of a picture, C their width, S picture side,
N = dit.grid^2 tokens of a target, V their width (of CLIP features N = F, V = C).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from blip3o.autoencoder import Autoencoder, Latents
from blip3o.clip import Clip, pool_features
from blip3o.config import Blip3oConfig
from blip3o.decoder import Decoder
from blip3o.dit import Dit
from blip3o.layers import patchify, unpatchify
from blip3o.llm import KvCache, Llm, needed, scatter_features
from blip3o.vision import QwenVision

if TYPE_CHECKING:
    from blip3o.weights import Layout

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's own training pictures, RGB in 0..1
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ImageProjector(nn.Module):
    """CLIP features as tokens of the language model: a linear map plus a learned embedding of each feature's place.

    The places are needed because rotary positions turn queries and keys only: a token that holds no place itself can
    be found by its place, but cannot tell it.
    """

    def __init__(self, config: Blip3oConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.clip.width, config.llm.width)
        self.places = nn.Parameter(torch.empty(config.feature_grid**2, config.llm.width))
        self.init_weights()

    def init_weights(self) -> None:
        """weight       distribution
        linear         N(0, 1 / fan_in), bias 0
        places         N(0, 1)
        """
        nn.init.normal_(self.linear.weight, std=self.linear.in_features**-0.5)
        nn.init.zeros_(self.linear.bias)
        nn.init.normal_(self.places)

    def forward(self, features: Tensor) -> Tensor:
        """features [B, F, C] -> [B, F, W]."""
        return self.linear(features) + self.places


class Absent(nn.Module):
    """In the place of a network that was not loaded: it has no weights, and calling it is an error."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason

    def forward(self, *_: object) -> Tensor:
        raise ValueError(self.reason)


def _set_statistics(mean: Tensor, std: Tensor, tokens: Tensor) -> None:
    """Of tokens [B, N, V], per channel, into mean and std [V]."""
    flat = tokens.flatten(0, 1)
    mean.copy_(flat.mean(0))
    std.copy_(flat.std(0).clamp_min(1e-4))


class Blip3o(nn.Module):
    feature_mean: Tensor
    feature_std: Tensor
    target_mean: Tensor  # these two where the target is no CLIP features
    target_std: Tensor
    autoencoder: Latents | None

    def __init__(self, config: Blip3oConfig) -> None:
        super().__init__()
        self.config = config
        self.clip = Clip(config.clip)
        self.vision = QwenVision(config.vision) if config.vision else None
        self.llm = Llm(config.llm)
        self.queries = nn.Parameter(torch.empty(config.num_queries, config.llm.width))
        self.dit = Dit(config.dit)
        # The tower of the released models ends in the language model's width; a model without one reads CLIP features.
        self.image_projector = None if config.vision else ImageProjector(config)
        self.decoder = Decoder(config.decoder) if config.decoder else None
        self.autoencoder = Autoencoder(config.autoencoder) if config.autoencoder else None
        # What the diffusion transformer sees has mean 0 and variance 1 per channel; 0 and 1 leave features as they are.
        self.register_buffer("feature_mean", torch.zeros(config.clip.width))
        self.register_buffer("feature_std", torch.ones(config.clip.width))
        if config.image_target != "clip":
            self.register_buffer("target_mean", torch.zeros(config.dit.in_channels))
            self.register_buffer("target_std", torch.ones(config.dit.in_channels))
        self.init_weights()

    def init_weights(self) -> None:
        """weight             distribution
        queries              N(0, 1), as released
        each network         its own init_weights
        """
        nn.init.normal_(self.queries)

    # files

    @classmethod
    def from_pretrained(
        cls,
        place: str | Path,
        *,
        tower: bool | str | Path = True,
        skip: Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> Blip3o:
        """The model of a folder in our layout or the released one, or of a hub id, in eval mode.

        tower   load the CLIP tower, if there is one; drawing needs none. Of a released checkpoint: or from this
                safetensors file, which holds the tower alone
        skip    prefixes of tensors that are no part of the model; None: the released checkpoints' leftovers
        dtype   of the weights; None: as they are stored
        See `weights.load_model` for what is raised.
        """
        from blip3o import weights  # the one import against the arrows: files know the model, not the other way round

        return weights.load_model(place, tower=tower, skip=skip, dtype=dtype, device=device)

    def save_pretrained(self, folder: str | Path, *, layout: Layout = "blip3o", files: Sequence[Path] = ()) -> None:
        """Write the model to `folder`, whole or not at all, with copies of `files`, as a tokenizer's, beside it."""
        from blip3o import weights

        weights.save_model(self, folder, layout=layout, files=files)

    @property
    def has_clip(self) -> bool:
        return not isinstance(self.clip.vision, Absent)

    def drop_clip(self, reason: str) -> None:
        """Forget the CLIP tower, which drawing does not need. Looking through it is an error from now on."""
        self.clip.register_module("vision", Absent(f"the model cannot look at pictures through CLIP: {reason}"))

    # pictures to features

    def set_feature_statistics(self, features: Tensor) -> None:
        """Standardise by these raw features' [N, F, C] mean and deviation per channel, from now on."""
        _set_statistics(self.feature_mean, self.feature_std, features)

    def pool(self, tokens: Tensor) -> Tensor:
        """The CLIP tower's tokens [B, N, C], averaged over square blocks: [B, F, C]."""
        return pool_features(tokens, self.config.feature_grid)

    @staticmethod
    def normalize(pictures: Tensor) -> Tensor:
        """Pictures [B, 3, S, S] in 0..1 as the CLIP tower wants them: by CLIP's own mean and deviation."""
        mean, std = (pictures.new_tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        return (pictures - mean) / std

    def features(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, S, S] in 0..1 -> standardised pooled CLIP features [B, F, C]: what is generated and read."""
        pooled = self.pool(self.clip.vision(self.normalize(pictures)))
        return (pooled - self.feature_mean) / self.feature_std

    # pictures to targets, and back

    def targets(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, S, S] in 0..1 -> standardised [B, N, V]: what the diffusion transformer learns to make."""
        if self.config.image_target == "clip":
            return self.features(pictures)
        image = self.require_autoencoder().encode(pictures) if self.config.image_target == "vae" else 2 * pictures - 1
        patches = patchify(image, image.shape[-1] // self.config.dit.grid)
        return (patches - self.target_mean) / self.target_std

    def pictures(self, targets: Tensor) -> Tensor:
        """The inverse of `targets`: [B, N, V] -> pictures [B, 3, S, S] in 0..1. ValueError for CLIP features."""
        if self.config.image_target == "clip":
            raise ValueError("CLIP features have no inverse: the visual decoder draws them, see generate.decode")
        patches = targets * self.target_std + self.target_mean
        side = self.config.clip.image_size // self.config.dit.grid
        if self.config.image_target == "vae":
            autoencoder = self.require_autoencoder()
            return autoencoder.decode(unpatchify(patches, side // autoencoder.factor))
        image = unpatchify(patches, side)
        return ((image + 1) / 2).clamp(0, 1)

    def set_target_statistics(self, targets: Tensor) -> None:
        """Standardise by these raw targets' [B, N, V] mean and deviation per channel, from now on; not for CLIP's."""
        _set_statistics(self.target_mean, self.target_std, targets)

    def use_autoencoder(self, autoencoder: Latents) -> None:
        """Take latents from a foreign autoencoder, which is no part of the model's weights and files.

        ValueError for a model that has its own or makes no latents, and where patches of its latents do not fit.
        """
        config = self.config
        if config.image_target != "vae" or config.autoencoder is not None:
            own = "has its own autoencoder" if config.autoencoder else f"makes {config.image_target}"
            raise ValueError(f"model {config.name!r} takes no foreign autoencoder: it {own}")
        side, grid = config.clip.image_size // autoencoder.factor, config.dit.grid
        values = autoencoder.channels * (side // grid) ** 2
        if config.clip.image_size % (autoencoder.factor * grid) or values != config.dit.in_channels:
            raise ValueError(
                f"autoencoder's latents, {autoencoder.channels} x {side} x {side}, must be {grid} x {grid} patches of "
                f"{config.dit.in_channels} values (dit.grid, dit.in_channels)"
            )
        self.autoencoder = autoencoder

    def require_autoencoder(self) -> Latents:
        """Its own, or the one it was given. ValueError where it was given none."""
        if self.autoencoder is None:
            raise ValueError(f"model {self.config.name!r} needs an autoencoder: give one to use_autoencoder")
        return self.autoencoder

    # reading

    def embed(self, ids: Tensor, features: Tensor | None = None) -> Tensor:
        """Embeddings [B, T, W] of `ids` [B, T], with features [B, F, C] in the place of each row's F image tokens."""
        embeddings = self.llm.embed(ids)
        if features is None:
            return embeddings
        if self.image_projector is None:
            raise ValueError(f"model {self.config.name!r} reads pictures by its vision tower, not as CLIP features")
        return scatter_features(embeddings, ids, self.config.image_token, self.image_projector(features).flatten(0, 1))

    def read(self, ids: Tensor, features: Tensor | None = None, asked: Tensor | None = None) -> Tensor:
        """The language model's hidden states [B, T, W] over `ids` [B, T], padded, if at all, on the right; with `asked`
        bool [B, T] those of the N tokens asked for, [N, W].

        Padding after the tokens needs no mask: causal attention never looks at it.
        """
        rows = None if asked is None else asked.flatten().nonzero().squeeze(1)
        return self.llm(self.embed(ids, features), asked=rows)

    def condition(self, ids: Tensor, mask: Tensor, features: Tensor | None = None) -> Tensor:
        """What the queries read off prompts: `ids`, `mask` [B, T], padded on either side -> hidden states [B, Q, W].

        A prompt may hold a picture: `features` [P, F, C] of the P pictures, in reading order, take the place of the
        image tokens.

        The prompt cannot see the queries, so where nothing that reads it learns, autograd keeps nothing of its pass.
        Otherwise there is a single pass over both, through which the gradient flows.
        """
        prompts, queries = self.embed(ids, features), self.queries.expand(len(ids), -1, -1)
        learning = prompts.requires_grad or any(parameter.requires_grad for parameter in self.llm.parameters())
        if torch.is_grad_enabled() and learning:
            mask = nn.functional.pad(mask, (0, self.config.num_queries), value=True)
            rows = torch.arange(mask.numel(), device=mask.device).view(mask.shape)[:, ids.shape[1] :].flatten()
            return self.llm(torch.cat([prompts, queries], dim=1), None, mask, asked=rows).view(queries.shape)
        cache = self.cache(len(ids), ids.shape[1] + self.config.num_queries)
        self.llm(prompts, None, needed(mask), cache, asked=ids.new_empty(0))
        return self.llm(queries, None, None, cache)

    def cache(self, batch: int, capacity: int) -> KvCache:
        """An empty cache for `batch` conversations of at most `capacity` tokens, on the weights' device.

        Its dtype is the weights' own, or autocast's where that is on.
        """
        weight = self.llm.output_weight
        kind, dtype = weight.device.type, weight.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        return KvCache(self.config.llm, batch, capacity, device=weight.device, dtype=dtype)
