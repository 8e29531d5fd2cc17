"""The diffusion transformer: Lumina-Next, with cross-attention to what the language model's queries have read.

A block normalises by RMS before AND after each part (a sandwich), scales by the embedding of time and pooled condition
(AdaLN without shifts) and adds through tanh gates that start at zero. Self- and cross-attention start from the same
tokens and are added, the cross part through one more gate a head, before one shared output layer.

It never mentions noise: what it is given and what its prediction means is `flow.py`'s business.

Shapes: B batch, N = grid^2 tokens, Q queries, D width, H heads, G key-value heads, K head_dim, M time_width.
"""

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blip3o.config import DitConfig
from blip3o.layers import (
    LayerNorm,
    RMSNorm,
    attention,
    gated_residual,
    grid_rope_table,
    linear_after,
    modulate,
    qk_norm_rope,
    swiglu,
    timestep_embedding,
)

SINUSOIDS = 256  # of the time's embedding
QK_EPS = 1e-5  # of the norms of queries, keys and pooled condition, as released
OUT_EPS = 1e-6  # of the last norm, as released


class Modulation(NamedTuple):
    """What time and condition say to a block; each [B, D]."""

    attention_scale: Tensor
    attention_gate: Tensor
    mlp_scale: Tensor
    mlp_gate: Tensor


@dataclass(frozen=True)
class Context:
    """A condition ready for use at every step of a sampler: computed once by `Dit.context`."""

    pooled: Tensor  # [B, M]
    keys: tuple[Tensor, ...]  # per block [B, G, Q, K]
    values: tuple[Tensor, ...]


@dataclass(frozen=True)
class Moment:
    """A time ready for use under one condition: what `Dit.moments` computes for all steps of a sampler at once."""

    blocks: tuple[Tensor, ...]  # per block [B, 4D]
    out: Tensor  # [B, D]


class DitAttention(nn.Module):
    """Self-attention with 2-D rotary positions, plus gated cross-attention to the condition."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.width // config.num_heads
        width, kv_width = config.width, config.num_kv_heads * self.head_dim
        self.parts = [width, width, kv_width, kv_width]
        self.qqkv = nn.Linear(width, sum(self.parts), bias=False)  # query, cross-query, key, value
        self.query_norm = LayerNorm(width, QK_EPS)  # over all heads together
        self.key_norm = LayerNorm(kv_width, QK_EPS)
        self.cross_query_norm = LayerNorm(width, QK_EPS)
        self.condition_norm = RMSNorm(width, config.eps)
        self.cross_kv = nn.Linear(width, 2 * kv_width, bias=False)  # of the condition: key, value
        self.cross_key_norm = LayerNorm(kv_width, QK_EPS)
        self.cross_gate = nn.Parameter(torch.ones(config.num_heads))
        self.out = nn.Linear(width, width, bias=False)

    def cross_keys_values(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """condition [B, Q, D] -> key, value [B, G, Q, K]; neither has positions."""
        key, value = self.cross_kv(self.condition_norm(condition)).chunk(2, dim=-1)
        return self._heads(self.cross_key_norm(key)), self._heads(value)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], -1, self.head_dim).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        norm: RMSNorm,
        scale: Tensor,
        cos: Tensor,
        sin: Tensor,
        cross_key: Tensor,
        cross_value: Tensor,
    ) -> Tensor:
        batch, tokens, width = x.shape
        gqa = self.num_heads != self.num_kv_heads
        query, cross_query, key, value = _modulated(self.qqkv, norm, x, scale).split_with_sizes(self.parts, dim=-1)
        # Rows of the batch that share a condition line up as one long row of queries: no copy of keys and values.
        cross_query = self._heads(cross_query.view(cross_key.shape[0], -1, width))  # [B', H, B/B' N, K]
        tables = cos[:tokens], sin[:tokens]
        query, key = _turned(self._heads(query), self.query_norm, self._heads(key), self.key_norm, *tables)
        cross_query, _ = _turned(cross_query, self.cross_query_norm, None, None, cos, sin)

        mixed = attention(query, key, self._heads(value), enable_gqa=gqa).transpose(1, 2)  # [B, N, H, K]
        cross = attention(cross_query, cross_key, cross_value, enable_gqa=gqa).transpose(1, 2).reshape(mixed.shape)
        mixed = torch.addcmul(mixed, cross, self.cross_gate.tanh().unsqueeze(-1))
        return self.out(mixed.reshape(batch, tokens, width))


def _turned(
    query: Tensor, query_norm: LayerNorm, key: Tensor | None, key_norm: LayerNorm | None, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """query and key [B, H, T, K], normalised over all heads together and rotated; there may be no key."""
    if key is None or key_norm is None:
        key, key_weight, key_bias = query[:, :0], query_norm.weight[:0], query_norm.bias[:0]
    else:
        key_weight, key_bias = key_norm.weight, key_norm.bias
    return qk_norm_rope(
        query, key, query_norm.weight, key_weight, cos, sin, query_bias=query_norm.bias, key_bias=key_bias,
        eps=QK_EPS, norm="layer", across="width", interleaved=True,
    )  # fmt: skip


def _modulated(linear: nn.Linear, norm: RMSNorm, x: Tensor, scale: Tensor) -> Tensor:
    """linear(norm(x) * (1 + scale)): x [B, N, D], scale [B, D]."""

    def function(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        return modulate(x, scale, weight=weight, eps=norm.eps)

    return linear_after(linear, function, x, scale, norm.weight)


class DitMlp(nn.Module):
    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.mlp_width, bias=False)  # gate, then up
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor, norm: RMSNorm, scale: Tensor) -> Tensor:
        return linear_after(self.down, swiglu, _modulated(self.gate_up, norm, x, scale))


class DitBlock(nn.Module):
    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.modulation = nn.Linear(config.time_width, 4 * config.width)
        self.attention_norm = RMSNorm(config.width, config.eps)
        self.attention = DitAttention(config)
        self.attention_out_norm = RMSNorm(config.width, config.eps)
        self.mlp_norm = RMSNorm(config.width, config.eps)
        self.mlp = DitMlp(config)
        self.mlp_out_norm = RMSNorm(config.width, config.eps)

    def forward(
        self, x: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor, condition: Tensor | tuple[Tensor, Tensor]
    ) -> Tensor:
        """x [B, N, D], modulation [B, 4D] of the time, condition [B', Q, D] or its key and value from a `Context`."""
        if isinstance(condition, Tensor):
            condition = self.attention.cross_keys_values(condition)
        m = Modulation(*modulation.chunk(4, dim=-1))
        h = self.attention(x, self.attention_norm, m.attention_scale, cos, sin, *condition)
        norm = self.attention_out_norm
        x = gated_residual(x, h, m.attention_gate, weight=norm.weight, eps=norm.eps)

        h = self.mlp(x, self.mlp_norm, m.mlp_scale)
        return gated_residual(x, h, m.mlp_gate, weight=self.mlp_out_norm.weight, eps=self.mlp_out_norm.eps)


class Dit(nn.Module):
    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.config = config
        width, time_width = config.width, config.time_width
        self.condition_in = nn.Linear(config.condition_width, width)
        self.condition_out = nn.Linear(width, width)
        self.patch_in = nn.Linear(config.in_channels, width)
        self.time_in = nn.Linear(SINUSOIDS, time_width)
        self.time_out = nn.Linear(time_width, time_width)
        self.pooled_norm = LayerNorm(width, QK_EPS)
        self.pooled_out = nn.Linear(width, time_width)
        self.blocks = nn.ModuleList(DitBlock(config) for _ in range(config.depth))
        self.modulation = nn.Linear(time_width, width)
        self.patch_out = nn.Linear(width, config.in_channels)
        self.init_weights()

    def init_weights(self) -> None:
        """weight                          distribution
        every nn.Linear                   N(0, 1 / fan_in), bias 0
        time_in, time_out                 N(0, 0.02^2), bias 0
        modulation (the blocks', last)    0: each block starts as the identity
        patch_out                         0: the first prediction is 0
        cross_gate                        1: behind a second gate at 0 the condition would hardly come in at first
        norms                             weight 1, bias 0
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm | LayerNorm):
                nn.init.ones_(module.weight)
            if isinstance(module, LayerNorm):
                nn.init.zeros_(module.bias)
        for linear in (self.time_in, self.time_out):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.patch_out.weight)
        for module in self.modules():
            if isinstance(module, DitBlock):
                nn.init.zeros_(module.modulation.weight)
                nn.init.ones_(module.attention.cross_gate)

    def project(self, hidden: Tensor) -> Tensor:
        """The language model's hidden states at the queries [B, Q, condition_width] -> the condition [B, Q, D]."""
        if hidden.dim() != 3 or hidden.shape[-1] != self.config.condition_width:
            raise ValueError(f"hidden must be [B, Q, {self.config.condition_width}], got {list(hidden.shape)}")
        return self.condition_out(F.gelu(self.condition_in(hidden), approximate="tanh"))

    def context(self, condition: Tensor) -> Context:
        """All that the network ever needs of a condition [B, Q, D]. Use it where one condition serves many steps."""
        pairs = [cast(DitBlock, block).attention.cross_keys_values(condition) for block in self.blocks]
        return Context(self._pool(condition), tuple(key for key, _ in pairs), tuple(value for _, value in pairs))

    def _pool(self, condition: Tensor) -> Tensor:
        return self.pooled_out(self.pooled_norm(condition.mean(1)))

    def moments(self, timesteps: Tensor, pooled: Tensor) -> list[Moment]:
        """timesteps [S] in 0..1000, pooled [B, M] of a `Context` -> S moments for B rows each."""
        batch = len(pooled)
        whole = self._moment(timesteps.repeat_interleave(batch), pooled.repeat(len(timesteps), 1))
        blocks = [block.split(batch) for block in whole.blocks]
        return [Moment(tuple(parts), out) for *parts, out in zip(*blocks, whole.out.split(batch), strict=True)]

    def _moment(self, timestep: Tensor, pooled: Tensor) -> Moment:
        time = self.time_out(
            F.silu(self.time_in(timestep_embedding(timestep, SINUSOIDS).to(self.patch_in.weight.dtype)))
        )
        time = F.silu(time + pooled)  # [B, M]
        return Moment(tuple(cast(DitBlock, block).modulation(time) for block in self.blocks), self.modulation(time))

    def forward(self, x: Tensor, timestep: Tensor | Moment, condition: Tensor | Context) -> Tensor:
        """x [B, N, in_channels], timestep [B] in 0..1000 (1000: x is all noise) -> the prediction [B, N, in_channels].

        timestep    or a `Moment` of it, for B rows.
        condition   [B', Q, D] from `project`, or a `Context` of it. B must be a multiple of B': then B / B' rows of x
                    that follow each other share a row of the condition, whose keys and values are computed once.
        """
        config = self.config
        batch = len(x)
        if x.shape[1:] != (config.grid**2, config.in_channels):
            raise ValueError(f"x must be [B, {config.grid**2}, {config.in_channels}], got {list(x.shape)}")
        rows = timestep.shape if isinstance(timestep, Tensor) else timestep.out.shape[:1]
        if rows != (batch,):
            raise ValueError(f"timestep must be [{batch}], one for each row of x, got {list(rows)}")
        pooled = condition.pooled if isinstance(condition, Context) else self._pool(condition)
        if batch % len(pooled):
            raise ValueError(f"x must have a multiple of the condition's {len(pooled)} rows, got {batch}")
        repeats = batch // len(pooled)
        head_dim = config.width // config.num_heads
        cos, sin = grid_rope_table(config.grid, head_dim, config.rope_theta, x.device, repeats)  # [B/B' N, K/2]
        if isinstance(timestep, Tensor):
            timestep = self._moment(timestep, pooled.repeat_interleave(repeats, 0) if repeats > 1 else pooled)

        h = self.patch_in(x)
        for index, block in enumerate(self.blocks):
            shared = (condition.keys[index], condition.values[index]) if isinstance(condition, Context) else condition
            h = block(h, timestep.blocks[index], cos, sin, shared)
        return self.patch_out(modulate(h, timestep.out, eps=OUT_EPS, norm="layer"))
