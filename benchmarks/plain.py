"""The same networks in plain torch, as a good Hugging Face or diffusers author writes them: the peers end to end.

Parameters have our names, so `load` takes our model's own tensors. What is planned around a network is `plans.py`'s
business. F.rms_norm is used throughout: at these sizes it is as fast as transformers' formula or faster.

Shapes: B batch, T tokens, D width, H heads, G key-value heads, K head_dim, Q queries, F features, N DiT tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip3o.config import Blip3oConfig, ClipConfig, DecoderConfig, DitConfig, LlmConfig
from blip3o_kernels import rope_table_2d

SINUSOIDS = 256


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, T, H K] -> [B, H, T, K]."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


# The language model.


class CatCache:
    """Keys and values joined to those before, as transformers' DynamicCache does."""

    def __init__(self) -> None:
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        return self.pairs[0][0].shape[2] if self.pairs else 0

    def append(self, block: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if block in self.pairs:
            old_key, old_value = self.pairs[block]
            key, value = torch.cat((old_key, key), dim=2), torch.cat((old_value, value), dim=2)
        self.pairs[block] = key, value
        return key, value


class RoomyCache:
    """Keys and values written into room that is there."""

    def __init__(self, config: LlmConfig, batch: int, capacity: int, like: Tensor) -> None:
        shape = (config.depth, batch, config.num_kv_heads, capacity, config.head_dim)
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        self.length = 0

    def append(self, block: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + key.shape[2]
        self.keys[block, :, :, self.length : end] = key
        self.values[block, :, :, self.length : end] = value
        return self.keys[block, :, :, :end], self.values[block, :, :, :end]


Cache = CatCache | RoomyCache


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class LlmAttention(nn.Module):
    def __init__(self, config: LlmConfig) -> None:
        super().__init__()
        self.config = config
        width, inner = config.width, config.num_heads * config.head_dim
        self.qkv = nn.Linear(width, inner + 2 * config.num_kv_heads * config.head_dim, bias=config.qkv_bias)
        self.out = nn.Linear(inner, width, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor | None, cache: Cache | None, block: int
    ) -> Tensor:
        config = self.config
        parts = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        query, key, value = heads(self.qkv(x), config.head_dim).split(parts, dim=1)
        query, key = rotate_halves(query, cos, sin), rotate_halves(key, cos, sin)
        if cache is not None:
            key, value = cache.append(block, key, value)
        causal = visible is None and x.shape[1] > 1
        mixed = F.scaled_dot_product_attention(
            query, key, value.to(query.dtype), attn_mask=visible, is_causal=causal, enable_gqa=True
        )
        return self.out(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * mlp_width, bias=False)
        self.down = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class LlmBlock(nn.Module):
    def __init__(self, config: LlmConfig) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(config.width, config.eps), LlmAttention(config)
        self.mlp_norm, self.mlp = RMSNorm(config.width, config.eps), Mlp(config.width, config.mlp_width)

    def forward(self, x: Tensor, *others: object) -> Tensor:
        x = x + self.attention(self.attention_norm(x), *others)
        return x + self.mlp(self.mlp_norm(x))


class Llm(nn.Module):
    def __init__(self, config: LlmConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(LlmBlock(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width, config.eps)
        self.out = None if config.tie_embeddings else nn.Linear(config.width, config.vocab_size, bias=False)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embedding.weight if self.out is None else self.out.weight)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """x [B, T, D]; mask [B, T] bool, False at padding, for a pass without a cache -> hidden states [B, T, D]."""
        config, tokens, dtype = self.config, x.shape[1], x.dtype
        before = cache.length if cache is not None else 0
        if mask is None:
            positions, visible = torch.arange(before, before + tokens, device=x.device)[None], None
        else:
            positions = (mask.long().cumsum(1) - 1).clamp_min(0)
            below = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()
            alone = torch.eye(tokens, dtype=torch.bool, device=x.device)  # padding sees itself: no empty softmax
            visible = mask[:, None, None] & below | alone
        exponents = torch.arange(0, config.head_dim, 2, device=x.device).float() / config.head_dim
        angles = positions[..., None].float() * config.rope_theta**-exponents
        angles = torch.cat((angles, angles), dim=-1)[:, None]  # [B, 1, T, K]
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        for index, block in enumerate(self.blocks):
            x = block(x, cos, sin, visible, cache, index)
        if isinstance(cache, RoomyCache):
            cache.length += tokens
        return self.norm(x)


# The diffusion transformer.


def rotate_pairs(x: Tensor, turns: Tensor) -> Tensor:
    """x [B, H, N, K], turns complex [N, K/2]: as diffusers does."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).type_as(x)


def turns(side: int, head_dim: int, theta: float) -> Tensor:
    return torch.complex(*rope_table_2d(side, side, head_dim, theta, "cpu"))


def timestep_embedding(timestep: Tensor) -> Tensor:
    half = SINUSOIDS // 2
    frequencies = torch.exp(-9.210340371976184 * torch.arange(half, dtype=torch.float32, device=timestep.device) / half)
    angles = timestep[:, None].float() * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


Pair = tuple[Tensor, Tensor]


class DitAttention(nn.Module):
    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        width, self.head_dim = config.width, config.width // config.num_heads
        kv_width = config.num_kv_heads * self.head_dim
        self.parts = [width, width, kv_width, kv_width]
        self.qqkv = nn.Linear(width, sum(self.parts), bias=False)
        self.query_norm, self.key_norm = nn.LayerNorm(width), nn.LayerNorm(kv_width)
        self.cross_query_norm, self.cross_key_norm = nn.LayerNorm(width), nn.LayerNorm(kv_width)
        self.condition_norm = RMSNorm(width, config.eps)
        self.cross_kv = nn.Linear(width, 2 * kv_width, bias=False)
        self.cross_gate = nn.Parameter(torch.empty(config.num_heads))
        self.out = nn.Linear(width, width, bias=False)

    def cross_keys_values(self, condition: Tensor) -> Pair:
        key, value = self.cross_kv(self.condition_norm(condition)).chunk(2, dim=-1)
        return heads(self.cross_key_norm(key), self.head_dim), heads(value, self.head_dim)

    def forward(self, x: Tensor, turns: Tensor, condition: Pair) -> Tensor:
        query, cross_query, key, value = self.qqkv(x).split(self.parts, dim=-1)
        query = rotate_pairs(heads(self.query_norm(query), self.head_dim), turns)
        key = rotate_pairs(heads(self.key_norm(key), self.head_dim), turns)
        cross_query = rotate_pairs(heads(self.cross_query_norm(cross_query), self.head_dim), turns)
        dtype, (cross_key, cross_value) = query.dtype, condition
        repeats = len(x) // len(cross_key)
        if repeats > 1:  # rows that share a condition as one long row of queries
            cross_query = cross_query.unflatten(0, (-1, repeats)).transpose(1, 2).flatten(2, 3)
        mixed = F.scaled_dot_product_attention(query, key, heads(value, self.head_dim).to(dtype), enable_gqa=True)
        cross = F.scaled_dot_product_attention(cross_query, cross_key.to(dtype), cross_value.to(dtype), enable_gqa=True)
        if repeats > 1:
            cross = cross.unflatten(2, (repeats, -1)).transpose(1, 2).flatten(0, 1)
        mixed = mixed + cross * self.cross_gate.tanh()[:, None, None]
        return self.out(mixed.transpose(1, 2).flatten(2))


class DitBlock(nn.Module):
    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.modulation = nn.Linear(config.time_width, 4 * config.width)
        self.attention = DitAttention(config)
        self.attention_norm, self.attention_out_norm = (RMSNorm(config.width, config.eps) for _ in range(2))
        self.mlp_norm, self.mlp_out_norm = (RMSNorm(config.width, config.eps) for _ in range(2))
        self.mlp = Mlp(config.width, config.mlp_width)

    def forward(self, x: Tensor, time: Tensor, turns: Tensor, condition: Tensor | Pair) -> Tensor:
        if isinstance(condition, Tensor):
            condition = self.attention.cross_keys_values(condition)
        scale, gate, mlp_scale, mlp_gate = self.modulation(time).unsqueeze(1).chunk(4, dim=-1)
        h = self.attention(self.attention_norm(x) * (1 + scale), turns, condition)
        x = x + gate.tanh() * self.attention_out_norm(h)
        h = self.mlp(self.mlp_norm(x) * (1 + mlp_scale))
        return x + mlp_gate.tanh() * self.mlp_out_norm(h)


class Dit(nn.Module):
    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.config = config
        width, time_width = config.width, config.time_width
        self.condition_in, self.condition_out = nn.Linear(config.condition_width, width), nn.Linear(width, width)
        self.patch_in, self.patch_out = nn.Linear(config.in_channels, width), nn.Linear(width, config.in_channels)
        self.time_in, self.time_out = nn.Linear(SINUSOIDS, time_width), nn.Linear(time_width, time_width)
        self.pooled_norm, self.pooled_out = nn.LayerNorm(width), nn.Linear(width, time_width)
        self.blocks = nn.ModuleList(DitBlock(config) for _ in range(config.depth))
        self.modulation = nn.Linear(time_width, width)
        self.turns: Tensor | None = None

    def project(self, hidden: Tensor) -> Tensor:
        return self.condition_out(F.gelu(self.condition_in(hidden), approximate="tanh"))

    def pool(self, condition: Tensor) -> Tensor:
        return self.pooled_out(self.pooled_norm(condition.mean(1)))

    def keys_values(self, condition: Tensor) -> list[Pair]:
        return [block.attention.cross_keys_values(condition) for block in self.blocks]

    def forward(
        self, x: Tensor, timestep: Tensor, condition: Tensor | list[Pair], pooled: Tensor | None = None
    ) -> Tensor:
        """condition: what `project` gives, or the `keys_values` of it; pooled goes with them."""
        if pooled is None:
            pooled = self.pool(condition)
        time = self.time_out(F.silu(self.time_in(timestep_embedding(timestep).to(x.dtype))))
        time = F.silu(time + pooled.repeat_interleave(len(x) // len(pooled), 0))
        h = self.patch_in(x)
        for index, block in enumerate(self.blocks):
            h = block(h, time, self.turns, condition if isinstance(condition, Tensor) else condition[index])
        h = F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + self.modulation(time)[:, None])
        return self.patch_out(h)


# The towers beside them: CLIP's vision tower, nano's decoder.


class ClipBlock(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        width, self.head_dim = config.width, config.width // config.num_heads
        self.attention, self.mlp = nn.Module(), nn.Module()
        self.attention.qkv, self.attention.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp.up, self.mlp.down = nn.Linear(width, config.mlp_width), nn.Linear(config.mlp_width, width)
        self.attention_norm, self.mlp_norm = (nn.LayerNorm(width, config.eps) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (heads(part, self.head_dim) for part in self.attention.qkv(x).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + self.attention_norm(self.attention.out(mixed))
        return x + self.mlp_norm(self.mlp.down(F.gelu(self.mlp.up(x))))


class ClipVision(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_in = nn.Linear(3 * config.patch_size**2, config.width)
        self.class_token = nn.Parameter(torch.empty(config.width))
        self.positions = nn.Parameter(torch.empty(1 + config.grid**2, config.width))
        self.blocks = nn.ModuleList(ClipBlock(config) for _ in range(config.depth))

    def forward(self, images: Tensor) -> Tensor:
        size = self.config.patch_size
        patches = F.unfold(images, size, stride=size).transpose(1, 2)
        x = torch.cat((self.class_token.expand(len(images), 1, -1), self.patch_in(patches)), dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return x[:, 1:]


class DecoderBlock(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, self.eps, self.head_dim = config.width, config.eps, config.width // config.num_heads
        self.modulation = nn.Linear(config.time_width, 6 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, width, bias=False)

    def forward(self, x: Tensor, time: Tensor, turns: Tensor) -> Tensor:
        scale, shift, gate, mlp_scale, mlp_shift, mlp_gate = self.modulation(time).unsqueeze(1).chunk(6, dim=-1)
        h = F.rms_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale) + shift
        query, key, value = (heads(part, self.head_dim) for part in self.qkv(h).chunk(3, dim=-1))
        query, key = rotate_pairs(query, turns), rotate_pairs(key, turns)
        mixed = F.scaled_dot_product_attention(query, key, value)
        x = x + gate.tanh() * self.out(mixed.transpose(1, 2).flatten(2))
        h = F.rms_norm(x, x.shape[-1:], eps=self.eps) * (1 + mlp_scale) + mlp_shift
        first, up = self.gate_up(h).chunk(2, dim=-1)
        return x + mlp_gate.tanh() * self.down(F.silu(first) * up)


class Decoder(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.patches = config.image_size // config.patch_size
        self.block = self.patches // config.feature_grid
        values, width, time_width = 3 * config.patch_size**2, config.width, config.time_width
        self.patch_in, self.patch_out = nn.Linear(values, width), nn.Linear(width, values)
        self.feature_in = nn.Linear(config.feature_width, width * self.block**2)
        self.time_in = nn.Sequential(nn.Linear(SINUSOIDS, time_width), nn.SiLU(), nn.Linear(time_width, time_width))
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.depth))
        self.modulation = nn.Linear(time_width, 2 * width)
        self.turns: Tensor | None = None

    def forward(self, x: Tensor, timestep: Tensor, features: Tensor) -> Tensor:
        config, count, size, block = self.config, self.patches, self.config.patch_size, self.block
        time = F.silu(self.time_in(timestep_embedding(timestep).to(x.dtype)))
        patches = x.unflatten(2, (count, size)).unflatten(4, (count, size))  # [B, 3, h, p, w, q]
        h = self.patch_in(patches.permute(0, 2, 4, 3, 5, 1).reshape(len(x), count**2, -1))
        shares = self.feature_in(features).view(len(x), config.feature_grid, config.feature_grid, block, block, -1)
        h = h + shares.permute(0, 1, 3, 2, 4, 5).reshape(h.shape)
        for network in self.blocks:
            h = network(h, time, self.turns)
        scale, shift = self.modulation(time).unsqueeze(1).chunk(2, dim=-1)
        h = self.patch_out(F.rms_norm(h, h.shape[-1:], eps=config.eps) * (1 + scale) + shift)
        return h.view(len(x), count, count, size, size, 3).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


class Plain(nn.Module):
    """All of them, without CLIP's text tower, which no stage measured here uses."""

    def __init__(self, config: Blip3oConfig) -> None:
        super().__init__()
        self.config = config
        self.clip = nn.Module()
        self.clip.vision = ClipVision(config.clip)
        self.llm, self.dit = Llm(config.llm), Dit(config.dit)
        self.queries = nn.Parameter(torch.empty(config.num_queries, config.llm.width))
        self.image_projector = nn.Module()
        self.image_projector.linear = nn.Linear(config.clip.width, config.llm.width)
        self.image_projector.places = nn.Parameter(torch.empty(config.feature_grid**2, config.llm.width))
        self.decoder = Decoder(config.decoder) if config.decoder else None
        self.register_buffer("feature_mean", torch.empty(config.clip.width))
        self.register_buffer("feature_std", torch.empty(config.clip.width))

    def features(self, pictures: Tensor) -> Tensor:
        """Normalised pictures -> standardised features [B, F, C]."""
        tokens, grid = self.clip.vision(pictures), self.config.clip.grid
        x = F.adaptive_avg_pool2d(tokens.transpose(1, 2).unflatten(2, (grid, grid)), self.config.feature_grid)
        return (x.flatten(2).transpose(1, 2) - self.feature_mean) / self.feature_std

    def embed(self, ids: Tensor, features: Tensor | None = None) -> Tensor:
        x = self.llm.embedding(ids)
        if features is None:
            return x
        shown = self.image_projector.linear(features) + self.image_projector.places
        return x.masked_scatter((ids == self.config.image_token)[..., None], shown.to(x.dtype))


def load(model: nn.Module, config: Blip3oConfig) -> Plain:
    """The plain networks on the very tensors of our model: every name must be there, none may be left."""
    with torch.device("meta"):
        plain = Plain(config)
    trained = {name: x.requires_grad for name, x in model.named_parameters()}
    state = {
        name: x for name, x in model.state_dict(keep_vars=True).items()
        if not name.startswith("clip.") or name.startswith("clip.vision.")
    }  # fmt: skip
    plain.load_state_dict(state, strict=True, assign=True)
    for name, x in model.named_parameters():
        x.requires_grad_(trained[name])
    dit, decoder = config.dit, config.decoder
    device = plain.queries.device
    plain.dit.turns = turns(dit.grid, dit.width // dit.num_heads, dit.rope_theta).to(device)
    if plain.decoder is not None and decoder is not None:
        side = decoder.image_size // decoder.patch_size
        plain.decoder.turns = turns(side, decoder.width // decoder.num_heads, decoder.rope_theta).to(device)
    return plain
