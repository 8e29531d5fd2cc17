"""A small input for every model that is known: some tokens, one row padded; a small latent and a short prompt.

Drawn on the CPU from a fixed seed, then brought to the model's device and dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .swap import PatchError, qualified

Inputs = dict[str, Any]
ROWS, TOKENS, PADDED = 2, 24, 5  # the second row is padded on the left


class Draw:
    """Random numbers for `model`, the same for each model of its sizes.

    side: patches on a side of the latent.  words: tokens of the prompt; the second is 3 tokens shorter.
    """

    def __init__(self, model: nn.Module, side: int = 4, words: int = 7) -> None:
        place = next(model.parameters())
        if place.is_meta:
            raise PatchError(f"model ({type(model).__name__}): expected weights to check with, got the device meta")
        self.config: Any = model.config
        self.device = place.device
        self.dtype = torch.float32 if place.dtype.itemsize < 2 else place.dtype  # float8 is only stored
        self.generator = torch.Generator().manual_seed(0)
        self.side, self.words = side, words

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def latent(self) -> Tensor:
        size = self.side * self.config.patch_size
        return self.normal(ROWS, self.config.in_channels, size, size)

    def below(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator).to(self.device)

    def times(self, scale: float = 1.0) -> Tensor:
        return (torch.rand(ROWS, generator=self.generator) * scale).to(self.device)

    def prompt(self, width: int) -> Tensor:
        return self.normal(ROWS, self.words, width)

    def mask(self) -> Tensor:
        """Of the prompt."""
        mask = torch.ones(ROWS, self.words, dtype=torch.int64)
        mask[1, -3:] = 0
        return mask.to(self.device)


def tokens(draw: Draw, vocabulary: int) -> Inputs:
    mask = torch.ones(ROWS, TOKENS, dtype=torch.int64)
    mask[1, :PADDED] = 0
    ids = draw.below(vocabulary, ROWS, TOKENS)
    return {"input_ids": ids, "attention_mask": mask.to(draw.device), "use_cache": False}


def text(draw: Draw) -> Inputs:
    return tokens(draw, draw.config.get_text_config().vocab_size)


def labelled(draw: Draw) -> Inputs:
    return with_labels(text(draw))


def with_labels(inputs: Inputs) -> Inputs:
    """Labels for the tokens that a token predicts: the first after padding is none."""
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[1, PADDED] = -100
    return {**inputs, "labels": labels}


def with_picture(draw: Draw) -> Inputs:
    """A picture of 4 x 4 merged patches' places in the first row."""
    config, vision = draw.config, draw.config.vision_config
    inputs, side = text(draw), 2
    ids, kinds = inputs["input_ids"], torch.zeros_like(inputs["input_ids"])
    for name in ("image_token_id", "video_token_id", "vision_start_token_id"):
        token = vars(config)[name]
        ids[ids == token] = 0 if token else 1
    ids[0, 3 : 3 + side * side], kinds[0, 3 : 3 + side * side] = config.image_token_id, 1
    patches = (side * vision.spatial_merge_size) ** 2
    features = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    grid = torch.tensor([[1, side * vision.spatial_merge_size, side * vision.spatial_merge_size]], device=draw.device)
    pixels = draw.normal(patches, features)
    return {**inputs, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds}


def with_picture_labelled(draw: Draw) -> Inputs:
    return with_labels(with_picture(draw))


def flux(draw: Draw) -> Inputs:
    config = draw.config
    side = torch.arange(draw.side)
    places = torch.zeros(draw.side, draw.side, 3)
    places[..., 1], places[..., 2] = side[:, None], side
    return {
        "hidden_states": draw.normal(ROWS, draw.side**2, config.in_channels),
        "encoder_hidden_states": draw.prompt(config.joint_attention_dim),
        "pooled_projections": draw.normal(ROWS, config.pooled_projection_dim),
        "timestep": draw.times(),
        "img_ids": places.view(-1, 3).to(draw.device),
        "txt_ids": torch.zeros(draw.words, 3, device=draw.device),
        "guidance": draw.times(4.0) if config.guidance_embeds else None,
    }


def sd3(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.latent(),
        "encoder_hidden_states": draw.prompt(draw.config.joint_attention_dim),
        "pooled_projections": draw.normal(ROWS, draw.config.pooled_projection_dim),
        "timestep": draw.times(1000.0),
    }


def lumina(draw: Draw) -> Inputs:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    head_dim = draw.config.hidden_size // draw.config.num_attention_heads
    return {
        "hidden_states": draw.latent(),
        "timestep": draw.times(),
        "encoder_hidden_states": draw.prompt(draw.config.cross_attention_dim),
        "encoder_mask": draw.mask(),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(head_dim, draw.side, draw.side),
        "cross_attention_kwargs": {},
    }


def lumina2(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.latent(),
        "timestep": draw.times(),
        "encoder_hidden_states": draw.prompt(draw.config.cap_feat_dim),
        "encoder_attention_mask": draw.mask().bool(),
    }


def sana(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.latent(),
        "encoder_hidden_states": draw.prompt(draw.config.caption_channels),
        "timestep": draw.times(1000.0),
        "encoder_attention_mask": draw.mask(),
        "guidance": draw.times(4.0) if draw.config.guidance_embeds else None,
    }


def pixart(draw: Draw) -> Inputs:
    caption = draw.config.caption_channels or draw.config.cross_attention_dim
    sizes = {"resolution": draw.normal(ROWS, 2), "aspect_ratio": draw.normal(ROWS, 1)}
    use = draw.config.use_additional_conditions
    use = draw.config.sample_size == 128 if use is None else use
    return {
        "hidden_states": draw.latent(),
        "encoder_hidden_states": draw.prompt(caption),
        "timestep": draw.times(1000.0),
        "added_cond_kwargs": sizes if use else dict.fromkeys(sizes),
        "encoder_attention_mask": draw.mask(),
    }


def _models(folder: str, name: str, *more: str) -> dict[str, Callable[[Draw], Inputs]]:
    prefix = f"transformers.models.{folder}.modeling_{folder}.{name}"
    return {f"{prefix}ForCausalLM": labelled, f"{prefix}Model": text, **{prefix + word: text for word in more}}


_VL = "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VL"
_TRANSFORMERS = "diffusers.models.transformers."
INPUTS: dict[str, Callable[[Draw], Inputs]] = {
    **_models("llama", "Llama"),
    **_models("mistral", "Mistral"),
    **_models("qwen2", "Qwen2"),
    **_models("qwen3", "Qwen3"),
    **_models("gemma", "Gemma"),
    **_models("gemma2", "Gemma2"),
    **_models("gemma3", "Gemma3", "TextModel"),
    "transformers.models.gemma3.modeling_gemma3.Gemma3ForConditionalGeneration": labelled,
    f"{_VL}ForConditionalGeneration": with_picture_labelled,
    f"{_VL}Model": with_picture,
    f"{_VL}TextModel": text,
    f"{_TRANSFORMERS}transformer_flux.FluxTransformer2DModel": flux,
    f"{_TRANSFORMERS}transformer_sd3.SD3Transformer2DModel": sd3,
    f"{_TRANSFORMERS}lumina_nextdit2d.LuminaNextDiT2DModel": lumina,
    f"{_TRANSFORMERS}transformer_lumina2.Lumina2Transformer2DModel": lumina2,
    f"{_TRANSFORMERS}sana_transformer.SanaTransformer2DModel": sana,
    f"{_TRANSFORMERS}pixart_transformer_2d.PixArtTransformer2DModel": pixart,
}


def small_inputs(model: nn.Module, **sizes: int) -> tuple[nn.Module, Inputs]:
    """The outermost model inside `model` that is known, and an input for it, of Draw's `sizes`.

    Raises PatchError if none is known.
    """
    for module in model.modules():
        make = INPUTS.get(qualified(type(module)))
        if make is not None:
            return module, make(Draw(module, **sizes))
    known = ", ".join(sorted(name.rpartition(".")[2] for name in INPUTS))
    raise PatchError(
        f"model ({type(model).__name__}): expected one of {known}, or inputs= to check another with, or check=False"
    )
