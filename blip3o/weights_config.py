"""config.json of the official class, to a configuration and back.

No size is taken from a path or a name of the folder: the language model's and the vision tower's are in config.json,
the diffusion transformer's, which config.json lacks, and the CLIP tower's are read off the tensors' shapes.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from blip3o.config import Blip3oConfig, ClipConfig, DitConfig, LlmConfig, VisionConfig
from blip3o.presets import EVA_CLIP, PRESETS, RELEASED_FLOW
from blip3o.weights_files import CorruptModel, WrongTensors
from blip3o.weights_names import DIT, EVA, QUERIES

ARCHITECTURES = {"blip3o_qwen": "blip3oQwenForCausalLM", "blip3o_qwen_inference": "blip3oQwenForInferenceLM"}
QWEN = "qwen2_5_vl"  # model_type of Qwen2.5-VL itself
TOWER_NAME, HEAD_WIDTH = "eva-clip-E-14-plus", 112  # the one tower that is known, and the width of its heads
# What the official tokenizer says where the folder has none; words that the checkpoint's own tokenizer may number anew.
WORDS = {
    "pad_token": ("<|endoftext|>", 151643),
    "end_token": ("<|im_end|>", 151645),
    "image_token": ("<|image_pad|>", 151655),
    "query_start_token": ("[IMG]", 151665),
}
# What transformers leaves out of a config.json where it is the class's own: its values.
TEXT: dict[str, Any] = {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 29568,
    "rms_norm_eps": 1e-5,
    "vocab_size": 152064,
}
VISION: dict[str, Any] = {
    "hidden_size": 3584,
    "depth": 32,
    "num_heads": 16,
    "intermediate_size": 3420,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "out_hidden_size": 3584,
}


def is_released(values: Any) -> bool:
    """Whether the content of a config.json is the official class's, or another's of transformers."""
    return isinstance(values, Mapping) and "model_type" in values


def is_qwen(values: Any) -> bool:
    """Whether the content of a config.json is Qwen2.5-VL's own: a language model and a vision tower, no more."""
    return is_released(values) and bool(values["model_type"] == QWEN)


def read_qwen(values: Mapping[str, Any], place: Path) -> tuple[LlmConfig, VisionConfig]:
    """The language model and the vision tower of Qwen2.5-VL's config.json.

    Raises CorruptModel, naming `place`, for a value that is not known.
    """
    try:
        return _llm({**values, **_table(values, "text_config")}), _vision(_table(values, "vision_config"))
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptModel(f"{place / 'config.json'}: {error}") from None


def read_config(values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], place: Path) -> Blip3oConfig:
    """The configuration that an official config.json and the tensors' shapes, by their 4.51 names, stand for.

    Raises CorruptModel, naming `place`, for an architecture or a value that is not known, or a shape that does not fit.
    """
    where = place / "config.json"
    if values.get("model_type") not in list(ARCHITECTURES):  # which may be anything, a list too
        raise CorruptModel(
            f"{where}: model_type must be one of {sorted(ARCHITECTURES)}, got {values.get('model_type')!r}: "
            f"an unknown architecture"
        )
    try:
        text = {**values, **_table(values, "text_config")}
        llm, vision = _llm(text), _vision(_table(values, "vision_config"))
        clip = _clip(values, shapes)
        read = {"n_query": _shape(shapes, QUERIES, 3)[1]} if QUERIES in shapes and "n_query" not in values else {}
        queries = _whole({"n_query": 64, **read, **values}, "n_query")
        pooled = re.fullmatch(r"early_pool2d_(\d+)", str(values.get("gen_pooling", "early_pool2d_4")))
        if pooled is None:
            raise ValueError(f"gen_pooling must be early_pool2d_ and a number, got {values['gen_pooling']!r}")
        side = int(pooled[1])
        grid, rest = divmod(clip.grid, side) if side else (0, 1)
        if rest:
            raise ValueError(f"gen_pooling {pooled[0]!r} must divide the CLIP tower's {clip.grid} patches a side")
        config = Blip3oConfig(
            name="released",
            image_target="clip",
            objective="flow",
            clip=clip,
            vision=vision,
            llm=llm,
            dit=_dit(shapes, grid, place),
            decoder=None,
            autoencoder=None,
            num_queries=queries,
            feature_grid=grid,
            flow=RELEASED_FLOW,
            **_tokens(place, text),
        )
    except CorruptModel:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptModel(f"{where}: {error}") from None
    names = [name for name, preset in PRESETS.items() if replace(config, name=name) == preset]
    return replace(config, name=names[0]) if names else config


def _whole(values: Mapping[str, Any], name: str, least: int = 1) -> int:
    value = values[name]
    if type(value) is not int or not least <= value < 1 << 31:
        raise ValueError(f"{name} must be a whole number, at least {least} and below 2^31, got {value!r}")
    return value


def _real(values: Mapping[str, Any], name: str) -> float:
    value = values[name]
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
    return float(value)


def _list(values: Mapping[str, Any], name: str) -> tuple[int, ...]:
    value = values.get(name)
    if not isinstance(value, list) or any(type(item) is not int for item in value):
        raise ValueError(f"{name} must be a list of whole numbers, got {value!r}")
    return tuple(value)


def _table(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = values.get(name, {})
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a table, got {value!r}")
    return value


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str, dims: int) -> tuple[int, ...]:
    """Of a tensor that sizes are read off."""
    shape = shapes[name]
    if len(shape) != dims or not all(shape):
        raise ValueError(f"{name} must have {dims} dimensions, none of them 0, got {list(shape)}")
    return shape


def _llm(values: Mapping[str, Any]) -> LlmConfig:
    name = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
    rope = _table({name: values.get(name) or {}}, name)
    v = TEXT | {"rope_theta": 1e6, "tie_word_embeddings": False}
    v |= {key: value for key, value in values.items() if value is not None}
    if "mrope_section" not in rope:
        raise ValueError("rope_scaling (or rope_parameters) must hold mrope_section")
    if type(v["tie_word_embeddings"]) is not bool:
        raise ValueError(f"tie_word_embeddings must be true or false, got {v['tie_word_embeddings']!r}")
    width, heads = _whole(v, "hidden_size"), _whole(v, "num_attention_heads")
    return LlmConfig(
        vocab_size=_whole(v, "vocab_size"),
        width=width,
        depth=_whole(v, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_whole(v, "num_key_value_heads"),
        head_dim=_whole({"head_dim": width // heads, **v}, "head_dim"),
        mlp_width=_whole(v, "intermediate_size"),
        rope_theta=_real({**v, **rope}, "rope_theta"),
        mrope_section=_list(rope, "mrope_section"),  # type: ignore[arg-type]  # LlmConfig counts them
        eps=_real(v, "rms_norm_eps"),
        tie_embeddings=v["tie_word_embeddings"],
        qkv_bias=True,
    )


def _vision(values: Mapping[str, Any]) -> VisionConfig:
    v = VISION | dict(values)
    return VisionConfig(
        width=_whole(v, "hidden_size"),
        depth=_whole(v, "depth"),
        num_heads=_whole(v, "num_heads"),
        mlp_width=_whole(v, "intermediate_size"),
        patch_size=_whole(v, "patch_size"),
        temporal_patch_size=_whole(v, "temporal_patch_size"),
        merge_size=_whole(v, "spatial_merge_size"),
        window_size=_whole(v, "window_size"),
        full_attention_blocks=_list(v, "fullatt_block_indexes"),
        out_width=_whole(v, "out_hidden_size"),
        eps=1e-6,
        rope_theta=1e4,
    )


def _clip(values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ClipConfig:
    """From the tower's shapes; a checkpoint without the tower has the published one's, in the width of config.json."""
    name = values.get("gen_vision_tower", TOWER_NAME)
    if name != TOWER_NAME:
        raise ValueError(f"gen_vision_tower must be {TOWER_NAME!r}, got {name!r}: an unknown architecture")
    width = _whole({"gen_hidden_size": EVA_CLIP.width, **values}, "gen_hidden_size")
    clip = replace(EVA_CLIP, width=width, num_heads=max(1, width // HEAD_WIDTH))
    names = {f"{EVA}patch_embed.proj.weight": 4, f"{EVA}pos_embed": 3, f"{EVA}blocks.0.mlp.fc1.weight": 2}
    if not names.keys() <= shapes.keys():
        return clip
    kernel, positions, up = (_shape(shapes, name, dims) for name, dims in names.items())
    patch, grid = kernel[-1], math.isqrt(positions[1] - 1)
    return replace(
        clip, patch_size=patch, image_size=patch * grid, mlp_width=up[0], depth=_depth(shapes, f"{EVA}blocks.")
    )


def _dit(shapes: Mapping[str, tuple[int, ...]], grid: int, place: Path) -> DitConfig:
    names = {
        "patch": f"{DIT}patch_embedder.proj.weight",
        "gate": f"{DIT}layers.0.gate",
        "key": f"{DIT}layers.0.attn1.to_k.weight",
        "up": f"{DIT}layers.0.feed_forward.linear_1.weight",
        "condition": f"{DIT}caption_projection.linear_1.weight",
        "time": f"{DIT}time_caption_embed.timestep_embedder.linear_1.weight",
    }
    missing = [name for name in names.values() if name not in shapes]
    if missing:
        raise WrongTensors(place, missing, [], ["(the diffusion transformer's sizes are read off these)"])
    found = {word: _shape(shapes, name, 1 if word == "gate" else 2) for word, name in names.items()}
    width, heads = found["patch"][0], found["gate"][0]
    return DitConfig(
        in_channels=found["patch"][1],
        grid=grid,
        width=width,
        depth=_depth(shapes, f"{DIT}layers."),
        num_heads=heads,
        num_kv_heads=found["key"][0] * heads // width,
        mlp_width=found["up"][0],
        condition_width=found["condition"][1],
        time_width=found["time"][0],
        eps=1e-5,
        rope_theta=1e4,
    )


def _depth(shapes: Mapping[str, Any], prefix: str) -> int:
    numbers = [name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)]
    # Others, and more blocks than there are tensors, are no blocks: their names are unexpected.
    return 1 + max((int(n) for n in numbers if re.fullmatch(r"[0-9]{1,9}", n) and int(n) < len(shapes)), default=0)


def _tokens(place: Path, values: Mapping[str, Any]) -> dict[str, int]:
    """Ids of the special tokens: the folder's tokenizer's, else config.json's, else the official ones."""
    known: dict[str, int] = {}
    path = place / "tokenizer.json"
    if path.exists():
        try:
            added = json.loads(path.read_text(encoding="utf-8"))["added_tokens"]
            known = {entry["content"]: _whole(entry, "id", 0) for entry in added}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CorruptModel(f"{path} is not a tokenizer.json: {error}") from None
        lacking = [word for word, _ in WORDS.values() if word not in known]
        if lacking:
            raise CorruptModel(f"{path} lacks the special tokens {lacking}")
    words = {"pad_token": "pad_token_id", "end_token": "eos_token_id", "image_token": "image_token_id"}
    chosen: dict[str, int] = {}
    for field, (word, official) in WORDS.items():
        if word in known:
            chosen[field] = known[word]
        else:
            said = values.get(words.get(field, ""))
            chosen[field] = official if said is None else _whole(values, words[field], 0)
    return chosen


def write_config(config: Blip3oConfig, dtype: torch.dtype, tower: bool) -> dict[str, Any]:
    """An official config.json's content; without the CLIP tower, features are taken for the published one's."""
    llm, vision = config.llm, config.vision
    if vision is None:
        raise ValueError(f"model {config.name!r} has no vision tower: the released layout cannot hold it")
    return {
        "architectures": [ARCHITECTURES["blip3o_qwen"]],
        "model_type": "blip3o_qwen",
        "hidden_act": "silu",
        "hidden_size": llm.width,
        "num_hidden_layers": llm.depth,
        "num_attention_heads": llm.num_heads,
        "num_key_value_heads": llm.num_kv_heads,
        "intermediate_size": llm.mlp_width,
        "vocab_size": llm.vocab_size,
        "rms_norm_eps": llm.eps,
        "rope_theta": llm.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(llm.mrope_section)},
        "tie_word_embeddings": llm.tie_embeddings,
        "pad_token_id": config.pad_token,
        "eos_token_id": config.end_token,
        "image_token_id": config.image_token,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "hidden_act": "silu",
            "hidden_size": vision.width,
            "depth": vision.depth,
            "num_heads": vision.num_heads,
            "intermediate_size": vision.mlp_width,
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "spatial_merge_size": vision.merge_size,
            "window_size": vision.window_size,
            "fullatt_block_indexes": list(vision.full_attention_blocks),
            "out_hidden_size": vision.out_width,
        },
        "gen_vision_tower": TOWER_NAME,
        "gen_hidden_size": config.clip.width,
        "gen_pooling": f"early_pool2d_{(config.clip if tower else EVA_CLIP).grid // config.feature_grid}",
        "n_query": config.num_queries,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "square",
    }
