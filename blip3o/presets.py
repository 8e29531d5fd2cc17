"""The presets: `nano`, small enough to train on two CPU cores; `4b` and `8b`, shapes of the released checkpoints."""

from dataclasses import replace

from blip3o.config import (
    AutoencoderConfig,
    Blip3oConfig,
    ClipConfig,
    ClipTextConfig,
    DecoderConfig,
    DitConfig,
    ImageTarget,
    LlmConfig,
    Objective,
    VisionConfig,
)
from blip3o.flow import FlowConfig


def _qwen_vision(out_width: int) -> VisionConfig:
    """Qwen2.5-VL's tower, the same in 4b and 8b but for the width it hands over."""
    return VisionConfig(
        width=1280,
        depth=32,
        num_heads=16,
        mlp_width=3420,
        patch_size=14,
        temporal_patch_size=2,
        merge_size=2,
        window_size=112,
        full_attention_blocks=(7, 15, 23, 31),
        out_width=out_width,
        eps=1e-6,
        rope_theta=1e4,
    )


RELEASED_FLOW = FlowConfig(prediction="velocity", sigma="uniform", sigma_mean=0.0, sigma_std=1.0)

EVA_CLIP = ClipConfig(  # EVA02-CLIP-E/14+, the vision tower alone
    image_size=448,
    patch_size=14,
    width=1792,
    depth=64,
    num_heads=16,
    mlp_width=15360,
    eps=1e-6,
    embed_dim=1024,
    text=None,
)


def _released_dit(condition_width: int) -> DitConfig:
    """The released diffusion transformer, the same in 4b and 8b but for the condition it reads."""
    return DitConfig(
        in_channels=1792,
        grid=8,
        width=1792,
        depth=24,
        num_heads=28,
        num_kv_heads=28,
        mlp_width=4864,
        condition_width=condition_width,
        time_width=1024,
        eps=1e-5,
        rope_theta=1e4,
    )


PRESETS: dict[str, Blip3oConfig] = {
    "nano": Blip3oConfig(
        name="nano",
        image_target="clip",
        objective="flow",
        clip=ClipConfig(
            image_size=32,
            patch_size=16,
            width=128,
            depth=3,
            num_heads=4,
            mlp_width=512,
            eps=1e-6,
            embed_dim=128,
            text=ClipTextConfig(vocab_size=128, context=64, width=128, depth=2, num_heads=4, mlp_width=512, eps=1e-6),
        ),
        vision=None,
        llm=LlmConfig(
            vocab_size=128,
            width=128,
            depth=4,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            mlp_width=384,
            rope_theta=1e4,
            mrope_section=(4, 6, 6),
            eps=1e-6,
            tie_embeddings=False,
            qkv_bias=True,
        ),
        dit=DitConfig(
            in_channels=128,
            grid=2,
            width=192,
            depth=4,
            num_heads=6,
            num_kv_heads=6,
            mlp_width=192,
            condition_width=128,
            time_width=192,
            eps=1e-5,
            rope_theta=0.02,  # below 1 the frequencies are above it: on two places a side, the slow ones say nothing
        ),
        decoder=DecoderConfig(
            feature_width=128,
            feature_grid=2,
            image_size=32,
            patch_size=8,
            width=192,
            depth=3,
            num_heads=6,
            mlp_width=512,
            time_width=128,
            eps=1e-6,
            rope_theta=1e4,
            flow=FlowConfig(prediction="sample", sigma="logit_normal", sigma_mean=0.8, sigma_std=1.0),
        ),
        autoencoder=None,
        num_queries=16,
        feature_grid=2,
        flow=FlowConfig(prediction="sample", sigma="logit_normal", sigma_mean=0.8, sigma_std=1.0),
        pad_token=0,
        end_token=2,
        image_token=6,
        query_start_token=7,
    ),
    "4b": Blip3oConfig(
        name="4b",
        image_target="clip",
        objective="flow",
        clip=EVA_CLIP,
        vision=_qwen_vision(out_width=2048),
        llm=LlmConfig(  # Qwen2.5-VL-3B
            vocab_size=151668,
            width=2048,
            depth=36,
            num_heads=16,
            num_kv_heads=2,
            head_dim=128,
            mlp_width=11008,
            rope_theta=1e6,
            mrope_section=(16, 24, 24),
            eps=1e-6,
            tie_embeddings=True,
            qkv_bias=True,
        ),
        dit=_released_dit(condition_width=2048),
        decoder=None,
        autoencoder=None,
        num_queries=64,
        feature_grid=8,
        flow=RELEASED_FLOW,
        pad_token=151643,  # <|endoftext|>
        end_token=151645,  # <|im_end|>
        image_token=151655,  # <|image_pad|>
        query_start_token=151665,  # [IMG]
    ),
    "8b": Blip3oConfig(
        name="8b",
        image_target="clip",
        objective="flow",
        clip=EVA_CLIP,
        vision=_qwen_vision(out_width=3584),
        llm=LlmConfig(  # Qwen2.5-VL-7B
            vocab_size=151668,
            width=3584,
            depth=28,
            num_heads=28,
            num_kv_heads=4,
            head_dim=128,
            mlp_width=18944,
            rope_theta=1e6,
            mrope_section=(16, 24, 24),
            eps=1e-6,
            tie_embeddings=False,
            qkv_bias=True,
        ),
        dit=_released_dit(condition_width=3584),
        decoder=None,
        autoencoder=None,
        num_queries=64,
        feature_grid=8,
        flow=RELEASED_FLOW,
        pad_token=151643,  # <|endoftext|>
        end_token=151645,  # <|im_end|>
        image_token=151655,  # <|image_pad|>
        query_start_token=151665,  # [IMG]
    ),
}


NANO_AUTOENCODER = AutoencoderConfig(image_size=32, channels=8, halvings=2, width=32)
SDXL_LATENTS = (4, 8)  # channels, and pixels along a side for each: of the foreign autoencoder that 4b and 8b expect
GRIDS = {"nano": 4, "4b": 28, "8b": 28}  # patches along a side of a picture or its latents


def preset(name: str, *, image_target: ImageTarget = "clip", objective: Objective = "flow") -> Blip3oConfig:
    """The preset of that name, with another of the paper's choices if asked. ValueError lists the names."""
    if name not in PRESETS:
        raise ValueError(f"name must be one of {sorted(PRESETS)}, got {name!r}")
    config = replace(PRESETS[name], objective=objective)
    if image_target == "clip":
        return config
    autoencoder = NANO_AUTOENCODER if image_target == "vae" and config.vision is None else None
    if image_target == "pixels":
        channels, factor = 3, 1
    else:
        channels, factor = (autoencoder.channels, autoencoder.factor) if autoencoder else SDXL_LATENTS
    patch = config.clip.image_size // factor // GRIDS[name]
    dit = replace(config.dit, grid=GRIDS[name], in_channels=channels * patch**2)
    return replace(config, image_target=image_target, dit=dit, decoder=None, autoencoder=autoencoder)
