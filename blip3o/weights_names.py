"""The released checkpoint's names: for each tensor of ours, those of the checkpoint that make it up.

The names are those of transformers 4.51, which the checkpoints were written with; `old_name` turns today's into them.

Shapes: V vocabulary, W width of the language model, D of the network at hand.
"""

from collections.abc import Iterator
from typing import NamedTuple

from blip3o.config import Blip3oConfig, ClipConfig, DitConfig, LlmConfig, VisionConfig
from blip3o.dit import SINUSOIDS

DIT, TOWER, VAE, QUERIES = "model.dit.model.", "model.gen_vision_tower.", "model.vae.", "model.latent_queries"
EVA = f"{TOWER}vision_tower.model."
OUTPUT, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
KINDS = ("weight", "bias")


class Part(NamedTuple):
    name: str
    shape: tuple[int, ...]


Parts = Iterator[tuple[str, list[Part]]]  # a name of ours, and what lies in it, row below row


def old_name(name: str) -> str:
    """A tensor's name as transformers 4.51 would write it."""
    for new, old in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


def released_parts(config: Blip3oConfig, tower: bool) -> dict[str, list[Part]]:
    """For each tensor of a model the released ones it is made of; with or without the CLIP tower.

    The released models have no feature statistics: they are 0 and 1.
    """
    if config.vision is None:
        raise ValueError(f"model {config.name!r} has no vision tower: the released layout cannot hold it")
    queries = (config.num_queries, config.llm.width)
    parts = {"queries": [Part(QUERIES, (1, *queries))]}
    parts.update(_llm(config.llm))
    parts.update(_vision(config.vision))
    parts.update(_dit(config.dit))
    if tower:
        parts.update(_clip(config.clip))
    return parts


def _llm(config: LlmConfig) -> Parts:
    width, query, value = config.width, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield "llm.embedding.weight", [Part(EMBEDDING, (config.vocab_size, width))]
    yield "llm.norm.weight", [Part("model.norm.weight", (width,))]
    if not config.tie_embeddings:
        yield "llm.out.weight", [Part(OUTPUT, (config.vocab_size, width))]
    for i in range(config.depth):
        ours, theirs = f"llm.blocks.{i}.", f"model.layers.{i}."
        rows = {"q": query, "k": value, "v": value}
        for kind, inner in (("weight", (width,)), ("bias", ())):
            if kind == "weight" or config.qkv_bias:
                parts = [Part(f"{theirs}self_attn.{part}_proj.{kind}", (size, *inner)) for part, size in rows.items()]
                yield f"{ours}attention.qkv.{kind}", parts
        yield f"{ours}attention.out.weight", [Part(f"{theirs}self_attn.o_proj.weight", (width, query))]
        up = (config.mlp_width, width)
        yield f"{ours}mlp.gate_up.weight", [Part(f"{theirs}mlp.{part}_proj.weight", up) for part in ("gate", "up")]
        yield f"{ours}mlp.down.weight", [Part(f"{theirs}mlp.down_proj.weight", up[::-1])]
        yield f"{ours}attention_norm.weight", [Part(f"{theirs}input_layernorm.weight", (width,))]
        yield f"{ours}mlp_norm.weight", [Part(f"{theirs}post_attention_layernorm.weight", (width,))]


def _linear(ours: str, theirs: str, rows: int, columns: int) -> Parts:
    yield f"{ours}.weight", [Part(f"{theirs}.weight", (rows, columns))]
    yield f"{ours}.bias", [Part(f"{theirs}.bias", (rows,))]


def _norm(ours: str, theirs: str, width: int) -> Parts:
    for kind in KINDS:
        yield f"{ours}.{kind}", [Part(f"{theirs}.{kind}", (width,))]


def _vision(config: VisionConfig) -> Parts:
    width, mlp, patch = config.width, config.mlp_width, config.patch_size
    kernel = (width, 3, config.temporal_patch_size, patch, patch)
    yield "vision.patch_in.weight", [Part("visual.patch_embed.proj.weight", kernel)]
    for i in range(config.depth):
        ours, theirs = f"vision.blocks.{i}.", f"visual.blocks.{i}."
        yield f"{ours}attention_norm.weight", [Part(f"{theirs}norm1.weight", (width,))]
        yield f"{ours}mlp_norm.weight", [Part(f"{theirs}norm2.weight", (width,))]
        yield from _linear(f"{ours}attention.qkv", f"{theirs}attn.qkv", 3 * width, width)
        yield from _linear(f"{ours}attention.out", f"{theirs}attn.proj", width, width)
        for kind, inner in (("weight", (width,)), ("bias", ())):
            parts = [Part(f"{theirs}mlp.{part}_proj.{kind}", (mlp, *inner)) for part in ("gate", "up")]
            yield f"{ours}mlp.gate_up.{kind}", parts
        yield from _linear(f"{ours}mlp.down", f"{theirs}mlp.down_proj", width, mlp)
    merged = config.merge_size**2 * width
    yield "vision.merger.norm.weight", [Part("visual.merger.ln_q.weight", (width,))]
    yield from _linear("vision.merger.up", "visual.merger.mlp.0", merged, merged)
    yield from _linear("vision.merger.down", "visual.merger.mlp.2", config.out_width, merged)


def _dit(config: DitConfig) -> Parts:
    width, time = config.width, config.time_width
    value = config.num_kv_heads * width // config.num_heads
    embed = f"{DIT}time_caption_embed."
    yield from _linear("dit.condition_in", f"{DIT}caption_projection.linear_1", width, config.condition_width)
    yield from _linear("dit.condition_out", f"{DIT}caption_projection.linear_2", width, width)
    yield from _linear("dit.patch_in", f"{DIT}patch_embedder.proj", width, config.in_channels)
    yield from _linear("dit.time_in", f"{embed}timestep_embedder.linear_1", time, SINUSOIDS)
    yield from _linear("dit.time_out", f"{embed}timestep_embedder.linear_2", time, time)
    yield from _norm("dit.pooled_norm", f"{embed}caption_embedder.0", width)
    yield from _linear("dit.pooled_out", f"{embed}caption_embedder.1", time, width)
    yield from _linear("dit.modulation", f"{DIT}norm_out.linear_1", width, time)
    yield from _linear("dit.patch_out", f"{DIT}norm_out.linear_2", config.in_channels, width)
    for i in range(config.depth):
        ours, theirs = f"dit.blocks.{i}.", f"{DIT}layers.{i}."
        attention = f"{ours}attention."
        query, keys, up = (width, width), (value, width), (config.mlp_width, width)
        rows = {"attn1.to_q": query, "attn2.to_q": query, "attn1.to_k": keys, "attn1.to_v": keys}
        yield f"{attention}qqkv.weight", [Part(f"{theirs}{part}.weight", shape) for part, shape in rows.items()]
        yield f"{attention}cross_kv.weight", [Part(f"{theirs}attn2.to_{part}.weight", keys) for part in "kv"]
        yield f"{attention}cross_gate", [Part(f"{theirs}gate", (config.num_heads,))]
        yield f"{attention}out.weight", [Part(f"{theirs}attn2.to_out.0.weight", query)]
        yield f"{ours}mlp.gate_up.weight", [Part(f"{theirs}feed_forward.linear_{part}.weight", up) for part in (1, 3)]
        yield f"{ours}mlp.down.weight", [Part(f"{theirs}feed_forward.linear_2.weight", up[::-1])]
        for mine, other in {
            "attention.condition_norm": "norm1_context",
            "attention_norm": "norm1.norm",
            "attention_out_norm": "norm2",
            "mlp_norm": "ffn_norm1",
            "mlp_out_norm": "ffn_norm2",
        }.items():
            yield f"{ours}{mine}.weight", [Part(f"{theirs}{other}.weight", (width,))]
        yield from _linear(f"{ours}modulation", f"{theirs}norm1.linear", 4 * width, time)
        for mine, other, size in (
            ("query_norm", "attn1.norm_q", width),
            ("key_norm", "attn1.norm_k", value),
            ("cross_query_norm", "attn2.norm_q", width),
            ("cross_key_norm", "attn2.norm_k", value),
        ):
            yield from _norm(f"{attention}{mine}", f"{theirs}{other}", size)


def _clip(config: ClipConfig) -> Parts:
    width, mlp, patch = config.width, config.mlp_width, config.patch_size
    yield "clip.vision.class_token", [Part(f"{EVA}cls_token", (1, 1, width))]
    yield "clip.vision.positions", [Part(f"{EVA}pos_embed", (1, 1 + config.grid**2, width))]
    yield "clip.vision.patch_in.weight", [Part(f"{EVA}patch_embed.proj.weight", (width, 3, patch, patch))]
    yield "clip.vision.patch_in.bias", [Part(f"{EVA}patch_embed.proj.bias", (width,))]
    for i in range(config.depth):
        ours, theirs = f"clip.vision.blocks.{i}.", f"{EVA}blocks.{i}."
        yield from _linear(f"{ours}attention.qkv", f"{theirs}attn.qkv", 3 * width, width)
        yield from _linear(f"{ours}attention.out", f"{theirs}attn.proj", width, width)
        yield from _norm(f"{ours}attention_norm", f"{theirs}norm1", width)
        yield from _linear(f"{ours}mlp.up", f"{theirs}mlp.fc1", mlp, width)
        yield from _linear(f"{ours}mlp.down", f"{theirs}mlp.fc2", width, mlp)
        yield from _norm(f"{ours}mlp_norm", f"{theirs}norm2", width)
