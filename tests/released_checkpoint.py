"""Small checkpoints in the released layout, from other people's networks: transformers' Qwen2.5-VL, diffusers' Lumina.

EVA-CLIP's tower is written out here, from its formula, under the official names. Nothing of blip3o is imported: what
these networks compute is what blip3o must compute from the files.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "[IMG]", "[/IMG]", "<image>",
)  # fmt: skip
ID = {word: 256 + i for i, word in enumerate(SPECIAL)}
IDS = {"bos_token_id": 256, "pad_token_id": 256, "eos_token_id": ID["<|im_end|>"]}
VOCABULARY = 256 + len(SPECIAL)
CLIP_WIDTH, CLIP_MLP, CLIP_DEPTH, PATCH, CLIP_GRID = 224, 96, 2, 14, 8  # heads of 112, as the released tower's
GRID, QUERIES, WIDTH = 2, 5, 64
VISION = {
    "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "patch_size": 14, "temporal_patch_size": 2,
    "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [1], "out_hidden_size": WIDTH,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
}  # fmt: skip


def randomise(network: nn.Module, seed: int = 0) -> None:
    """Small random values everywhere, so that no bias, norm or gate hides behind its initial value."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        vector = parameter.dim() == 1 and name.endswith("weight")
        columns = parameter[0].numel() if parameter.dim() > 1 else 64
        std = 0.5 if name.endswith("gate") else 0.8 * columns**-0.5
        parameter.data = float(vector) + std * torch.randn(parameter.shape, generator=generator)
    network.requires_grad_(False).eval()


def tokenizer(special: Sequence[str] = SPECIAL) -> Tokenizer:
    """Bytes, and the special words of the official one in its order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(list(special))
    return built


def qwen(tie: bool = False, rows: int = VOCABULARY) -> nn.Module:
    """transformers' Qwen2.5-VL, of a few thousand weights; `rows` of its embedding."""
    from transformers.models import qwen2_5_vl

    config = qwen2_5_vl.Qwen2_5_VLConfig(
        text_config={**TEXT, **IDS, "vocab_size": rows, "rope_parameters": dict(ROPE), "tie_word_embeddings": tie},
        vision_config=dict(VISION),
        tie_word_embeddings=tie,
        image_token_id=ID["<|image_pad|>"],
        video_token_id=ID["<|video_pad|>"],
        vision_start_token_id=ID["<|vision_start|>"],
        vision_end_token_id=ID["<|vision_end|>"],
    )
    config._attn_implementation = "eager"
    model = qwen2_5_vl.Qwen2_5_VLForConditionalGeneration(config)
    randomise(model)
    if tie:
        model.lm_head.weight = model.model.language_model.embed_tokens.weight
    return model


class Lumina(nn.Module):
    """diffusers' transformer with the projection of the condition that the released models put before it.

    features [B, N, C], timestep [B], hidden [B, Q, W] -> [B, N, C].
    """

    def __init__(
        self, *, channels: int, grid: int, width: int, depth: int, heads: int, kv_heads: int, multiple_of: int,
        condition: int,
    ) -> None:  # fmt: skip
        super().__init__()
        from diffusers import LuminaNextDiT2DModel
        from diffusers.models.embeddings import PixArtAlphaTextProjection, get_2d_rotary_pos_embed_lumina

        self.grid = grid
        self.caption_projection = PixArtAlphaTextProjection(condition, width)
        self.transformer = LuminaNextDiT2DModel(
            sample_size=grid,
            patch_size=1,
            in_channels=channels,
            hidden_size=width,
            num_layers=depth,
            num_attention_heads=heads,
            num_kv_heads=kv_heads,
            multiple_of=multiple_of,
            norm_eps=1e-5,
            learn_sigma=False,
            qk_norm=True,
            cross_attention_dim=width,
        )
        self.rotary = get_2d_rotary_pos_embed_lumina(width // heads, 384, 384)

    def forward(self, features: Tensor, timestep: Tensor, hidden: Tensor) -> Tensor:
        picture = features.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        y = self.transformer(
            picture,
            timestep,
            self.caption_projection(hidden),
            torch.ones(hidden.shape[:2]),
            image_rotary_emb=self.rotary[: self.grid, : self.grid],
            cross_attention_kwargs={},
            return_dict=False,
        )[0]
        return y.flatten(2).transpose(1, 2)

    def released(self) -> dict[str, Tensor]:
        """The tensors under the official names; the official class has no padding token."""
        names = {name.removeprefix("transformer."): tensor for name, tensor in self.state_dict().items()}
        return {f"model.dit.model.{name}": tensor for name, tensor in names.items() if name != "pad_token"}


class EvaBlock(nn.Module):
    """x += norm1(attention(x)); x += norm2(mlp(x))."""

    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, mlp), "fc2": nn.Linear(mlp, width)})

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in self.attn["qkv"](x).chunk(3, dim=-1))
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(2)
        x = x + self.norm1(self.attn["proj"](mixed))
        hidden = self.mlp["fc1"](x)
        hidden = 0.5 * hidden * (1 + torch.erf(hidden * 2**-0.5))
        return x + self.norm2(self.mlp["fc2"](hidden))


class Eva(nn.Module):
    """EVA-CLIP's vision tower: no norm before the blocks, none after, the class token dropped; 4 x 4 pooling."""

    def __init__(self, width: int, heads: int, mlp: int, depth: int, patch: int, grid: int) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, kernel_size=patch, stride=patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid**2, width))
        self.blocks = nn.ModuleList(EvaBlock(width, heads, mlp) for _ in range(depth))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x[:, 1:]

    def pooled(self, images: Tensor) -> Tensor:
        """The features [B, (grid / 4)^2, C] that the diffusion transformer draws."""
        tokens = self(images)
        side = round(tokens.shape[1] ** 0.5)
        picture = tokens.transpose(1, 2).unflatten(2, (side, side))
        return nn.functional.avg_pool2d(picture, 4).flatten(2).transpose(1, 2)


@dataclass
class Checkpoint:
    """The networks whose weights a checkpoint holds."""

    tie: bool = False
    tower: bool = True
    vae: bool = False
    kv_heads: int = 4  # of the diffusion transformer
    qwen: Any = field(init=False)
    lumina: Lumina = field(init=False)
    eva: Eva = field(init=False)
    queries: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.qwen = qwen(self.tie)
        self.lumina = Lumina(
            channels=CLIP_WIDTH,
            grid=GRID,
            width=48,
            depth=2,
            heads=4,
            kv_heads=self.kv_heads,
            multiple_of=16,
            condition=WIDTH,
        )
        self.eva = Eva(CLIP_WIDTH, CLIP_WIDTH // 112, CLIP_MLP, CLIP_DEPTH, PATCH, CLIP_GRID)
        randomise(self.lumina, 1)
        randomise(self.eva, 2)
        self.queries = torch.randn(1, QUERIES, WIDTH, generator=torch.Generator().manual_seed(3))

    def tensors(self, naming: str = "4.51") -> dict[str, Tensor]:
        """All tensors by their names: those of transformers 4.51, as released, or today's."""
        found = qwen_tensors(self.qwen, self.tie, naming)
        found["model.latent_queries"] = self.queries
        found.update(self.lumina.released())
        if self.tower:
            prefix = "model.gen_vision_tower.vision_tower.model."
            found.update({f"{prefix}{name}": tensor for name, tensor in self.eva.state_dict().items()})
        if self.vae:
            found["model.vae.decoder.conv_in.weight"] = torch.zeros(4, 16, 3, 3)
            found["model.vae.encoder.conv_in.bias"] = torch.zeros(4)
        return found

    def config(self, naming: str = "4.51") -> dict[str, Any]:
        """config.json of the official class."""
        return {
            **qwen_config(self.tie, naming),
            "architectures": ["blip3oQwenForCausalLM"],
            "model_type": "blip3o_qwen",
            "gen_vision_tower": "eva-clip-E-14-plus",
            "gen_hidden_size": CLIP_WIDTH,
            "gen_pooling": "early_pool2d_4",
            "n_query": QUERIES,
            "mm_projector_type": "mlp2x_gelu",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "image_aspect_ratio": "square",
            "tokenizer_model_max_length": 512,
        }

    def write(
        self, folder: Path, *, naming: str = "4.51", shards: int = 3, change: Callable[[dict], object] | None = None
    ) -> Path:
        """A folder as the official trainer leaves it; `change` edits the table of tensors before it is written."""
        folder.mkdir(parents=True)
        tensors = self.tensors(naming)
        if change is not None:
            change(tensors)
        (folder / "config.json").write_text(json.dumps(self.config(naming)))
        write_tokenizer(folder)
        write_shards(tensors, folder, shards)
        return folder


def qwen_tensors(network: nn.Module, tie: bool, naming: str) -> dict[str, Tensor]:
    """Of `qwen`, by the names of transformers 4.51 or today's."""
    found = {}
    for name, tensor in network.state_dict().items():
        if naming == "4.51":
            name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        found[name] = tensor
    if tie:
        del found["lm_head.weight"]
    return found


def qwen_config(tie: bool, naming: str, rows: int = VOCABULARY) -> dict[str, Any]:
    """config.json of Qwen2.5-VL itself."""
    text = {**TEXT, **IDS, "vocab_size": rows, "tie_word_embeddings": tie}
    if naming == "4.51":
        section = {"type": "mrope", "mrope_section": ROPE["mrope_section"]}
        text.update(rope_theta=1e6, rope_scaling=section)
    else:
        text = {"text_config": {**text, "rope_parameters": ROPE}, "tie_word_embeddings": tie}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **text,
        "image_token_id": ID["<|image_pad|>"],
        "vision_config": VISION,
        "torch_dtype": "float32",
    }


def write_tokenizer(folder: Path, special: Sequence[str] = SPECIAL) -> None:
    tokenizer(special).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "Qwen2TokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_shards(tensors: dict[str, Tensor], folder: Path, shards: int) -> None:
    names, places = list(tensors), {}
    for number, some in enumerate(split(names, shards), 1):
        file = "model.safetensors" if shards == 1 else f"model-{number:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name].contiguous().clone() for name in some}, folder / file, {"format": "pt"})
        places.update(dict.fromkeys(some, file))
    if shards > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def split(names: list[str], count: int) -> Iterator[list[str]]:
    for number in range(count):
        yield names[number * len(names) // count : (number + 1) * len(names) // count]


def visual_decoder() -> tuple[Any, Any, Any]:
    """diffusers' U-Net and VAE of SDXL's type, small, and Euler's scheduler with SDXL's settings."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=CLIP_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=CLIP_WIDTH + 6 * 8,
        norm_num_groups=8,
        attention_head_dim=8,
        use_linear_projection=True,
    )
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(16, 32), latent_channels=4, norm_num_groups=8, sample_size=16, **blocks)
    for seed, network in enumerate((unet, vae), 4):
        randomise(network, seed)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    return unet, vae, scheduler
