"""Small random models of every architecture, for the table and the tests: `build(name)`. Gates are not left at 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_TEXT: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_WINDOW = 8


def llama(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_TEXT | options))


def mistral(**options: Any) -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**_TEXT | {"sliding_window": _WINDOW} | options))


def qwen2(**options: Any) -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    window = {"use_sliding_window": True, "sliding_window": _WINDOW, "max_window_layers": 1}
    return Qwen2ForCausalLM(Qwen2Config(**_TEXT | window | options))


def qwen3(**options: Any) -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_TEXT | {"head_dim": 16} | options))


def qwen2_5_vl(**options: Any) -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = _TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}}
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 48, "patch_size": 4,
        "window_size": 16, "fullatt_block_indexes": [1], "hidden_act": "silu",
    }  # fmt: skip
    tokens = {"image_token_id": 150, "video_token_id": 151, "vision_start_token_id": 152, "vision_end_token_id": 153}
    config = Qwen2_5_VLConfig(text_config=text | options, vision_config=vision, **tokens)
    return Qwen2_5_VLForConditionalGeneration(config)


def gemma(**options: Any) -> nn.Module:
    from transformers import GemmaConfig, GemmaForCausalLM

    return GemmaForCausalLM(GemmaConfig(**_TEXT | {"head_dim": 16} | options))


def gemma2(**options: Any) -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    own = {"head_dim": 16, "sliding_window": _WINDOW, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}
    return Gemma2ForCausalLM(Gemma2Config(**_TEXT | own | {"query_pre_attn_scalar": 16} | options))


def gemma3(**options: Any) -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    layers = ["sliding_attention", "full_attention"]
    own = {"head_dim": 16, "sliding_window": _WINDOW, "layer_types": layers, "query_pre_attn_scalar": 16}
    return Gemma3ForCausalLM(Gemma3TextConfig(**_TEXT | own | options))


def flux(**options: Any) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    sizes = {
        "patch_size": 1, "in_channels": 8, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 20, "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    return FluxTransformer2DModel(**sizes | options)


def sd3(**options: Any) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    sizes = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 3, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 24, "caption_projection_dim": 32, "pooled_projection_dim": 20,
        "out_channels": 4, "pos_embed_max_size": 8, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
    }  # fmt: skip
    return SD3Transformer2DModel(**sizes | options)


def lumina(**options: Any) -> nn.Module:
    from diffusers import LuminaNextDiT2DModel

    sizes = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "num_layers": 2,
        "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 8, "cross_attention_dim": 24,
    }  # fmt: skip
    return LuminaNextDiT2DModel(**sizes | options)


def lumina2(**options: Any) -> nn.Module:
    from diffusers import Lumina2Transformer2DModel

    sizes = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 48, "num_layers": 2,
        "num_refiner_layers": 1, "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 8,
        "axes_dim_rope": (4, 4, 4), "axes_lens": (32, 16, 16), "cap_feat_dim": 24,
    }  # fmt: skip
    return Lumina2Transformer2DModel(**sizes | options)


def sana(**options: Any) -> nn.Module:
    from diffusers import SanaTransformer2DModel

    sizes = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2,
        "num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32,
        "caption_channels": 24, "sample_size": 8,
    }  # fmt: skip
    return SanaTransformer2DModel(**sizes | options)


def pixart(**options: Any) -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    sizes = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2,
        "cross_attention_dim": 32, "sample_size": 8, "patch_size": 2, "caption_channels": 24,
    }  # fmt: skip
    return PixArtTransformer2DModel(**sizes | options)


LANGUAGE: dict[str, Callable[..., nn.Module]] = {
    "Llama": llama, "Qwen2": qwen2, "Qwen3": qwen3, "Qwen2.5-VL": qwen2_5_vl, "Gemma": gemma, "Gemma 2": gemma2,
    "Gemma 3": gemma3, "Mistral": mistral,
}  # fmt: skip
DIFFUSION: dict[str, Callable[..., nn.Module]] = {
    "Flux": flux, "SD3": sd3, "Lumina-Next": lumina, "Lumina 2": lumina2, "Sana": sana, "PixArt": pixart,
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """A small model of the architecture `name`, a key of LANGUAGE or DIFFUSION, with random numbers everywhere."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = (LANGUAGE | DIFFUSION)[name](**options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    torch.random.set_rng_state(state)
    return model.to(dtype).eval()
