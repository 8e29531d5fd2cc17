"""The language model: Qwen2.5-VL's decoder.

RMSNorm before each part, grouped-query attention with biases on query, key and value, rotary positions on three axes
(time, height, width; equal for text), SwiGLU. It knows no pictures: features of a picture take the place of the
embeddings of its tokens (`scatter_features`), and `multimodal_positions` says where those tokens are.

Padding. Attention is causal, so padding at the END needs no mask: no real token sees it, and what is computed there is
for the caller to ignore. Padding at the START (decoding a batch) needs the mask.

Shapes: B batch, T tokens of this call, S tokens so far (the cache's included), D width, H heads, G key-value heads,
K head_dim.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blip3o.config import LlmConfig
from blip3o.layers import (
    RMSNorm,
    attention,
    linear_after,
    project,
    rope,
    rope_table,
    rope_table_multimodal,
    swiglu,
    text_rope_table,
)


class KvCache:
    """Keys and values of the tokens so far, for decoding a batch. Create one per batch; `Llm.forward` fills it.

    `length` tokens are stored, padding included. `rewind` forgets the last ones, so that one prompt can be continued
    many times. Tokens that need a gradient are not stored: nothing but a `rewind` can follow them.
    """

    def __init__(
        self, config: LlmConfig, batch: int, capacity: int, *, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        if batch < 1 or capacity < 1:
            raise ValueError(f"batch and capacity must be positive, got {batch} and {capacity}")
        # Of each block [B, G, capacity, K]. In memory of their own: of one tensor for all, a compiled graph writes each
        # block's part by copying the whole.
        shape = (batch, config.num_kv_heads, capacity, config.head_dim)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.depth)]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.depth)]
        self.cos, self.sin = text_rope_table(capacity, config.head_dim, config.rope_theta, self.keys[0].device)
        self.kept = torch.ones(batch, capacity, device=device, dtype=torch.bool)  # False at padding
        # How far each row's next text position is from `length`, [B]: padding and pictures put them apart. None: 0.
        self.offset: Tensor | None = None
        self.length = 0
        self.padded = False
        self.pictured = False  # positions were given, of which `length` is no bound
        self.ended = False  # by tokens that were not stored

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    @property
    def next_position(self) -> Tensor:
        """Of each row's next text token, int64 [B]."""
        if self.offset is None:
            return torch.full((len(self.kept),), self.length, device=self.kept.device)
        return self.offset + self.length

    def append(self, block: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store key, value [B, G, T, K] of this call behind the `length` tokens; returns all, [B, G, S, K].

        What needs a gradient is joined, not stored: autograd keeps the earlier blocks' keys, so none may be written to.
        """
        keys, values, length, tokens = self.keys[block], self.values[block], self.length, key.shape[2]
        if key.requires_grad:
            return torch.cat([keys[:, :, :length], key], dim=2), torch.cat([values[:, :, :length], value], dim=2)
        keys.narrow(2, length, tokens).copy_(key)
        values.narrow(2, length, tokens).copy_(value)
        return keys.narrow(2, 0, length + tokens), values.narrow(2, 0, length + tokens)

    def rewind(self, length: int, next_position: Tensor) -> None:
        """Forget all but the first `length` tokens. `next_position` [B] is what the attribute of that name was then."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length must lie in 0..{self.length}, the tokens stored, got {length}")
        self.kept[:, length:] = True
        self.length = length
        self.ended = False
        offset = next_position - length
        self.offset = offset if bool(offset.any()) else None


class LlmAttention(nn.Module):
    def __init__(self, config: LlmConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv = nn.Linear(config.width, heads * config.head_dim, bias=config.qkv_bias)  # query, key, value
        self.out = nn.Linear(config.num_heads * config.head_dim, config.width, bias=False)

    def forward(
        self,
        x: Tensor,
        norm: RMSNorm,
        batch: int,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cache: KvCache | None,
        block: int,
        asked: Tensor | None,
        sequences: Tensor | None,
    ) -> Tensor:
        heads = (
            norm.before(self.qkv, x).view(batch, x.shape[0] // batch, -1, self.head_dim).transpose(1, 2)
        )  # [B, H + 2G, T, K]
        turning, value = heads.split_with_sizes([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1)
        query, key = rope(turning, cos, sin).split_with_sizes([self.num_heads, self.num_kv_heads], dim=1)
        if cache is not None:
            key, value = cache.append(block, key, value)
        elif value.requires_grad:
            value = value.clone()  # which is small; kept as a view it would keep the whole projection
        mixed = attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=self.num_heads != self.num_kv_heads,
            cu_seqlens_q=sequences,
        )  # fmt: skip
        return project(_rows(mixed.transpose(1, 2).reshape(x.shape[0], -1), asked), self.out.weight)


def _rows(x: Tensor, asked: Tensor | None) -> Tensor:
    return x if asked is None else x.index_select(0, asked)


class LlmMlp(nn.Module):
    def __init__(self, config: LlmConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.mlp_width, bias=False)  # gate, then up
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        return linear_after(self.down, swiglu, norm.before(self.gate_up, x))


class LlmBlock(nn.Module):
    def __init__(self, config: LlmConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.eps)
        self.attention = LlmAttention(config)
        self.mlp_norm = RMSNorm(config.width, config.eps)
        self.mlp = LlmMlp(config)

    def forward(
        self,
        x: Tensor,
        batch: int,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cache: KvCache | None,
        block: int,
        asked: Tensor | None,
        sequences: Tensor | None,
    ) -> Tensor:
        """x [B T, D], the tokens of `batch` rows one below the other: a linear layer's call is cheaper on a matrix.

        asked   rows of x, all if None; of the others only key and value are computed, and [asked, D] is returned.
        """
        mixed = self.attention(x, self.attention_norm, batch, cos, sin, mask, cache, block, asked, sequences)
        x = _rows(x, asked) + mixed
        return x + self.mlp(x, self.mlp_norm)


class Llm(nn.Module):
    def __init__(self, config: LlmConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(LlmBlock(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width, config.eps)
        self.out = None if config.tie_embeddings else nn.Linear(config.width, config.vocab_size, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """weight                          distribution
        every nn.Linear                   N(0, 1 / width), bias 0: 0.02 at width 2048, and no dead start at width 128
        embedding                         N(0, 1), or what the blocks add would drown it; N(0, 1 / width) if tied
        attention.out, mlp.down           N(0, 0.02^2 / (2 depth)): a block starts near the identity
        norms                             1
        """
        std = self.config.width**-0.5
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Embedding) and not self.config.tie_embeddings:
                nn.init.normal_(module.weight)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        for module in self.modules():
            if isinstance(module, LlmAttention | LlmMlp):
                added = module.out if isinstance(module, LlmAttention) else module.down
                nn.init.normal_(added.weight, std=0.02 * (2 * self.config.depth) ** -0.5)

    def embed(self, ids: Tensor) -> Tensor:
        """ids [B, T] int64 -> [B, T, D]."""
        return self.embedding(ids)

    @property
    def output_weight(self) -> Tensor:
        """The output layer's matrix [vocab_size, D]; the embedding's where the two are tied."""
        return self.embedding.weight if self.out is None else self.out.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> [..., vocab_size]."""
        return project(hidden, self.output_weight)

    def forward(
        self,
        embeddings: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KvCache | None = None,
        asked: Tensor | None = None,
        sequences: Tensor | None = None,
    ) -> Tensor:
        """embeddings [B, T, D] -> hidden states after the last norm [B, T, D], or [N, D] of the N tokens asked for.

        positions   [3, B, T] int64 from `multimodal_positions`; None: each row counts its real tokens, going on from
                    the cache.
        mask        [B, T] bool, False at padding; None: none of these tokens is padding, or it all comes last and no
                    cache will carry it on. The hidden states at padding mean nothing.
        cache       keys and values of the tokens before these; these are added to it.
        asked       int64 [N], tokens counted through the batch (row * T + token): the last block computes no more of
                    the others than their keys and values.
        sequences   int32 [N + 1], where each of N sequences that are packed into the one row begins, and T: attention
                    keeps them apart. They need positions of their own, and neither mask nor cache.
        """
        batch, tokens, width = embeddings.shape
        if mask is not None and (mask.shape != (batch, tokens) or mask.dtype != torch.bool):
            raise ValueError(f"mask must be bool [{batch}, {tokens}], got {mask.dtype} {list(mask.shape)}")
        if positions is not None and positions.shape != (3, batch, tokens):
            raise ValueError(f"positions must be [3, {batch}, {tokens}], got {list(positions.shape)}")
        if asked is not None and (asked.dim() != 1 or asked.dtype != torch.int64):
            raise ValueError(f"asked must be int64 [N], got {asked.dtype} {list(asked.shape)}")
        if cache is not None and cache.length + tokens > cache.capacity:
            room = cache.capacity - cache.length
            raise ValueError(f"cache has room for {room} more tokens (capacity {cache.capacity}), got {tokens}")
        if cache is not None and cache.ended:
            raise ValueError("cache must be rewound: its last tokens needed a gradient and were not stored")
        if sequences is not None and (batch != 1 or positions is None or mask is not None or cache is not None):
            raise ValueError("sequences must come in a batch of 1, with positions, without mask and cache")
        cos, sin = self._rope_tables(embeddings, positions, mask, cache)
        visible = _visible(mask, cache, tokens)
        x = embeddings.reshape(batch * tokens, width)
        for index, block in enumerate(self.blocks):
            last = index == len(self.blocks) - 1
            x = block(x, batch, cos, sin, visible, cache, index, asked if last else None, sequences)
        if cache is not None:
            cache.ended = x.requires_grad
            cache.length += 0 if cache.ended else tokens
        return self.norm(x).view(batch, tokens, width) if asked is None else self.norm(x)

    def _rope_tables(
        self, embeddings: Tensor, positions: Tensor | None, mask: Tensor | None, cache: KvCache | None
    ) -> tuple[Tensor, Tensor]:
        """cos, sin [T, K/2] or [B, T, K/2]; moves the cache's next positions on."""
        config, tokens, device = self.config, embeddings.shape[1], embeddings.device
        start = 0 if cache is None else cache.length
        end = start + tokens
        if positions is not None:
            if cache is not None:
                last = positions.amax(0)
                last = last.amax(1) if mask is None else last.masked_fill(~mask, -1).amax(1)
                cache.offset = torch.maximum(cache.next_position, last + 1) - end
                cache.pictured = True
            return rope_table_multimodal(positions, config.head_dim, config.rope_theta, config.mrope_section)
        if mask is None and (cache is None or cache.offset is None):
            cos, sin = self._text_table(end, cache, device)
            return cos[start:end], sin[start:end]
        text = torch.arange(tokens, device=device) if mask is None else mask.long().cumsum(1) - 1
        if cache is not None:
            before = cache.next_position
            text = text + before[:, None]
            if mask is not None:
                cache.offset = before + mask.sum(1) - end
        text = text.clamp_min(0)  # [B, T]
        if cache is not None and cache.pictured:
            return rope_table(text, config.head_dim, config.rope_theta)
        cos, sin = self._text_table(end, cache, device)
        return cos[text], sin[text]

    def _text_table(self, count: int, cache: KvCache | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos, sin of the positions 0, 1, ... up to `count` at least; a cache has those of its capacity."""
        if cache is not None:
            return cache.cos, cache.sin
        return text_rope_table(count, self.config.head_dim, self.config.rope_theta, device)


def _visible(mask: Tensor | None, cache: KvCache | None, tokens: int) -> Tensor | None:
    """What each token sees, bool [B, 1, T, S]; None where plain causal attention says it all."""
    if cache is None:
        if mask is None:
            return None
        return mask[:, None, None] & torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril()
    end = cache.length + tokens
    if mask is not None:
        cache.kept[:, cache.length : end] = mask
        cache.padded = True
    if not cache.padded:
        return None
    kept = cache.kept[:, None, None, :end]
    if tokens == 1:
        return kept
    return kept & torch.ones(tokens, end, dtype=torch.bool, device=kept.device).tril(cache.length)


def needed(mask: Tensor) -> Tensor | None:
    """The mask [B, T], or None if nothing is padding: plain causal attention reads no mask, now and in later steps."""
    return None if bool(mask.all()) else mask


def multimodal_positions(ids: Tensor, mask: Tensor | None, image_token: int, grid: tuple[int, int] | Tensor) -> Tensor:
    """Qwen2.5-VL's positions [3, B, T] (time, height, width) for texts with pictures.

        a text token      (p, p, p), and p moves on by 1
        a picture         (p, p + row, p + column) at each of its height x width tokens, then p moves on by
                          max(height, width)
        padding           (0, 0, 0)

    ids   [B, T] int64; each run of `image_token` is one or more whole pictures
    mask  [B, T] bool, False at padding; None: no padding
    grid  (height, width) of every picture in tokens, or an int64 tensor [pictures, 2] in reading order
    ValueError if the image tokens are not whole pictures.
    """
    batch, tokens = ids.shape
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    image = (ids == image_token) & kept
    counts = image.sum(1)  # [B]
    if isinstance(grid, tuple):
        pictures = -(-int(counts.sum()) // (grid[0] * grid[1]))
        grid = torch.tensor(grid, device=ids.device).expand(pictures, 2)
    sizes, steps = grid.prod(1), grid.amax(1)
    ends = sizes.cumsum(0)  # image tokens up to and with each picture, over the whole batch
    row_ends = counts.cumsum(0)
    whole = torch.isin(row_ends, F.pad(ends, (1, 0)))
    if not bool(whole.all()) or int(row_ends[-1]) != int(sizes.sum()):
        raise ValueError(
            f"ids must hold whole pictures: the rows have {counts.tolist()} image tokens, "
            f"the pictures of grid have {sizes.tolist()}"
        )
    before = (image.flatten().cumsum(0) - image.flatten().long()).view(batch, tokens)  # image tokens before each
    finished = torch.searchsorted(ends, before, right=True)  # pictures before each token
    moved = F.pad(steps.cumsum(0), (1, 0))  # [pictures + 1]
    earlier_rows = torch.searchsorted(ends, row_ends - counts, right=True)
    text = (kept & ~image).long()
    base = text.cumsum(1) - text + moved[finished] - moved[earlier_rows][:, None]  # [B, T]
    if len(sizes) == 0:
        return (base * kept).expand(3, batch, tokens)
    current = finished.clamp_max(len(sizes) - 1)
    inside = before - (ends - sizes)[current]
    width = grid[:, 1][current]
    row = torch.where(image, inside // width, 0)
    column = torch.where(image, inside % width, 0)
    return torch.stack([base, base + row, base + column]) * kept


def scatter_features(embeddings: Tensor, ids: Tensor, image_token: int, features: Tensor) -> Tensor:
    """Put features [..., D], in reading order, where `ids` [B, T] is `image_token`; returns a new [B, T, D].

    ValueError if there are not exactly as many features as image tokens.
    """
    width = embeddings.shape[-1]
    if features.shape[-1] != width:
        raise ValueError(f"features must have width {width}, as the embeddings, got {features.shape[-1]}")
    image = ids == image_token
    count, given = int(image.sum()), features.numel() // width
    if count != given:
        raise ValueError(f"features must be one for each of the {count} image tokens in ids, got {given}")
    return embeddings.masked_scatter(image.unsqueeze(-1), features.to(embeddings.dtype))
