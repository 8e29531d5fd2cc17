"""Attention in Triton: which kernels run, in which tiles; the contract is ops/attention.py, the kernels are in
attention_forward.py, attention_keys.py and attention_queries.py.

Probabilities are rounded to the dtype of the values before they are multiplied, as torch's fused kernels do. Of an
additive mask, what is below -1e30, such as the lowest float32, masks as -inf does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
from torch import Tensor

from ..strides import last_adjacent, tokens_first
from . import INTERPRETED
from .attention_forward import combine_kernel, forward_kernel
from .attention_keys import key_value_kernel
from .attention_queries import delta_kernel, query_kernel

LOG2E = math.log2(math.e)
DECODE = 64  # rows, queries times the heads that share a key, up to which they are folded and the keys may be split
PROGRAMS = 256  # about what fills a GPU: keys are split among programs up to this number
PART = 256  # the fewest keys a split is worth


@dataclass(frozen=True)
class Tile:
    """Queries and keys of one step, warps of a program, and steps whose loads are under way together."""

    queries: int
    keys: int
    warps: int
    stages: int


# By architecture and the width of a row in bytes (BLOCK_K or BLOCK_V times the size of an element): forward, dkey and
# dvalue, dquery. The largest found that compile without spills and fit the shared memory: 99 KiB on sm_120,
# 64 KiB of LDS. "hip" is fitted to CDNA. RDNA has half its registers, so the backward pass spills there.
# float32 has no tensor cores to feed.
TILES = {
    "": {
        128: (Tile(128, 64, 4, 3), Tile(32, 64, 4, 2), Tile(128, 64, 8, 2)),
        256: (Tile(128, 64, 8, 2), Tile(32, 64, 8, 2), Tile(64, 64, 8, 2)),
        512: (Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 2)),
    },
    "sm90": {
        128: (Tile(128, 64, 4, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2)),
        256: (Tile(128, 128, 8, 2), Tile(32, 64, 8, 2), Tile(64, 64, 8, 2)),
    },
    "sm100": {
        128: (Tile(128, 64, 4, 3), Tile(32, 128, 8, 2), Tile(128, 64, 8, 2)),
        256: (Tile(128, 128, 8, 2), Tile(32, 64, 8, 1), Tile(64, 64, 8, 2)),
    },
    "hip": {
        128: (Tile(64, 32, 4, 1), Tile(32, 64, 4, 1), Tile(64, 32, 8, 1)),
        256: (Tile(64, 32, 8, 1), Tile(16, 64, 4, 1), Tile(64, 32, 4, 1)),
        512: (Tile(32, 16, 8, 1), Tile(16, 32, 8, 1), Tile(32, 16, 8, 1)),
    },
}
FLOAT32 = {
    256: (Tile(32, 32, 4, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    512: (Tile(32, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 16, 8, 2)),
    1024: (Tile(16, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}


@cache
def architecture(device: torch.device) -> str:
    """The table of tiles for a device: "hip", "sm90", ..., "" without a GPU."""
    if device.type != "cuda":
        return ""
    return "hip" if torch.version.hip else f"sm{torch.cuda.get_device_capability(device)[0]}0"


def _tiles(query: Tensor, value: Tensor, direction: int, plain: bool, packed: bool = False) -> Tile:
    """plain: without a mask or a cap, which need registers for themselves, as packed sequences and widths that are not
    a power of two do to a lesser degree.
    """
    if INTERPRETED:  # small, so that small samples take every path
        return Tile(64, 64, 4, 1)
    widths = query.shape[-1], value.shape[-1]
    width = max(_block(each) for each in widths) * query.element_size()
    if query.dtype is torch.float32:
        return FLOAT32[min(max(width, 256), 1024)][direction]
    width = min(max(width, 128), 512)
    tile = TILES.get(architecture(query.device), {}).get(width, TILES[""][width])[direction]
    if plain:
        if direction != 0 or not (packed or any(each != _block(each) for each in widths)):
            return tile
        if tile.keys > 64:
            return replace(tile, keys=64)
        return replace(tile, queries=64, keys=32, warps=4) if tile.queries > 64 else tile
    if direction == 0:
        return replace(tile, queries=64, keys=max(16, min(tile.keys, 64) // 2), warps=8)
    if direction == 1:
        return replace(tile, queries=min(tile.queries, 32), keys=max(16, tile.keys // 2))
    return replace(tile, keys=max(16, tile.keys // 2))


def _block(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _strides(*tensors: Tensor | None, aligned: int = 1) -> list[int]:
    """Of batch, head and token, in units of `aligned` elements."""
    return [stride // aligned for x in tensors for stride in ((0, 0, 0) if x is None else x.stride()[:3])]


def _aligned(*tensors: Tensor) -> int:
    """The power of two, up to 16, that divides all strides and widths: with it loads of 16 bytes are possible."""
    bits = 16
    for x in tensors:
        for number in (*x.stride()[:3], x.shape[3]):
            bits |= number
    return bits & -bits


def _masked(mask: Tensor | None, query: Tensor, keys: int) -> tuple[Tensor, int, tuple[int, ...]]:
    """The mask as the kernels read it, its kind, and its strides over [B, H, T, S], 0 where it is broadcast."""
    if mask is None:
        return query, 0, (0, 0, 0, 0)
    mask = mask.detach()
    kind = 1 if mask.dtype is torch.bool else 2
    mask = mask.view(torch.uint8) if kind == 1 else mask.float() if mask.dtype is torch.float64 else mask
    return mask, kind, mask.expand(*query.shape[:3], keys).stride()


def _limits(causal: bool, left: int, right: int, tokens: int, keys: int) -> dict[str, int | bool]:
    """The window; a side without a limit is one that no pair can reach."""
    right = 0 if causal else right
    far = tokens + keys
    limited = {"LEFT": 0 <= left < far, "RIGHT": 0 <= right < far}
    return {"left": left if limited["LEFT"] else 0, "right": right if limited["RIGHT"] else 0, **limited}


def _packed(query: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> tuple[Tensor, Tensor, int]:
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return query, query, 0
    return cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), cu_seqlens_q.shape[0] - 1


def _steps(length: int, step: int, sequences: int) -> int:
    """Tiles along a side; of packed sequences as many as there can be, as their lengths stay on the device."""
    return length // step + sequences + 1 if sequences else triton.cdiv(length, step)


def _scales(softcap: float, scale: float) -> dict[str, float | bool]:
    """What the products are multiplied with, and the cap, both in units of log 2; see `scored`."""
    if softcap:
        return {"scale": scale / softcap, "cap": softcap * LOG2E, "CAPPED": True}
    return {"scale": scale * LOG2E, "cap": 0.0, "CAPPED": False}


def _positive(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same with a positive scale: the largest product is the largest score, and a masked one, -inf, stays it."""
    return (-query, -scale) if scale < 0 else (query, scale or 1e-30)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    scale: float,
    saving: bool = True,  # the log-sum-exp costs too little to have kernels without
) -> tuple[Tensor, Tensor]:
    query, key, value = last_adjacent(query), last_adjacent(key), last_adjacent(value)
    query, scale = _positive(query, scale)
    batch, heads, tokens, head_dim = query.shape
    _, groups, keys, value_dim = value.shape
    y = tokens_first(query, value_dim)
    log_sum = query.new_empty(batch, heads, tokens, dtype=torch.float32)
    if not log_sum.numel():
        return y, log_sum
    starts_q, starts_k, sequences = _packed(query, cu_seqlens_q, cu_seqlens_k)
    mask, mask_kind, mask_strides = _masked(mask, query, keys)
    share = heads // groups
    tile = _tiles(query, value, 0, mask_kind == 0 and not softcap, sequences > 0)
    block, fold, splits = tile.queries, 1, 1
    average, average_keys = triton.cdiv(tokens, max(sequences, 1)), keys // max(sequences, 1)
    if average * share <= DECODE:
        block, fold = max(16, triton.next_power_of_2(average * share)), share
    elif average <= DECODE:
        block = max(16, triton.next_power_of_2(average))
    steps = _steps(tokens, block // fold, sequences)
    programs = batch * (heads // fold) * steps
    if average <= DECODE:
        splits = max(1, min(triton.cdiv(PROGRAMS, programs), average_keys // PART))
    partial, partial_sum = y, log_sum
    if splits > 1:
        partial = query.new_empty(batch, tokens, heads, splits * value_dim, dtype=torch.float32).transpose(1, 2)
        partial_sum = query.new_empty(batch, tokens, heads, splits, dtype=torch.float32)
    aligned = _aligned(partial, query, key, value)
    with torch.cuda.device_of(query):
        forward_kernel[(programs * splits,)](
            partial,
            partial_sum,
            query,
            key,
            value,
            mask,
            starts_q,
            starts_k,
            sequences,
            tokens,
            keys,
            heads,
            share,
            steps,
            splits,
            *_strides(partial, query, key, value, aligned=aligned),
            *mask_strides,
            **_scales(softcap, scale),
            **_limits(causal, left, right, tokens, keys),
            HEAD_DIM=head_dim,
            VALUE_DIM=value_dim,
            MASK=mask_kind,
            PACKED=sequences > 0,
            FOLD=fold,
            SPLIT=splits > 1,
            ALIGNED=aligned,
            BLOCK_T=block,
            BLOCK_S=tile.keys,
            BLOCK_K=_block(head_dim),
            BLOCK_V=_block(value_dim),
            num_warps=tile.warps if block == tile.queries else 4,
            num_stages=tile.stages,
        )
        if splits > 1:
            combine_kernel[(batch * tokens * heads,)](
                y,
                log_sum,
                partial,
                partial_sum,
                tokens,
                heads,
                splits,
                VALUE_DIM=value_dim,
                BLOCK_V=_block(value_dim),
                BLOCK_SPLITS=triton.next_power_of_2(splits),
                num_warps=1,
            )
    return y, log_sum


def backward(
    dy: Tensor,
    y: Tensor,
    log_sum: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, dy, y = (last_adjacent(x) for x in (query, key, value, dy, y))
    batch, heads, tokens, head_dim = query.shape
    _, groups, keys, value_dim = value.shape
    dquery, dkey, dvalue = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    if not log_sum.numel() or not keys:
        return dquery.zero_(), dkey.zero_(), dvalue.zero_()
    starts_q, starts_k, sequences = _packed(query, cu_seqlens_q, cu_seqlens_k)
    mask, mask_kind, mask_strides = _masked(mask, query, keys)
    aligned = _aligned(dquery, dkey, dvalue, dy, y, query, key, value)
    slope, (query, scale) = scale, _positive(query, scale)
    log_sum, delta = log_sum.contiguous(), log_sum.new_empty(log_sum.shape)
    inputs = (dy, log_sum, delta, query, key, value, mask, starts_q, starts_k, sequences, tokens, keys)
    strides = (*_strides(dy, query, key, value, aligned=aligned), *mask_strides)
    options = {
        **_scales(softcap, scale),
        **_limits(causal, left, right, tokens, keys),
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "MASK": mask_kind,
        "PACKED": sequences > 0,
        "ALIGNED": aligned,
        "BLOCK_K": _block(head_dim),
        "BLOCK_V": _block(value_dim),
    }
    with torch.cuda.device_of(query):
        steps = triton.cdiv(tokens, 32)
        delta_kernel[(batch * heads * steps,)](
            delta,
            dy,
            y,
            tokens,
            heads,
            steps,
            *_strides(dy, y, aligned=aligned),
            VALUE_DIM=value_dim,
            ALIGNED=aligned,
            BLOCK_T=32,
            BLOCK_V=_block(value_dim),
            num_warps=8 if query.dtype is torch.float32 else 4,
        )
        tile = _tiles(query, value, 1, mask_kind == 0 and not softcap)
        steps = _steps(keys, tile.keys, sequences)
        key_value_kernel[(batch * groups * steps,)](
            dkey,
            dvalue,
            *inputs,
            heads,
            heads // groups,
            steps,
            *_strides(dkey, dvalue, aligned=aligned),
            *strides,
            slope=scale,
            **options,
            BLOCK_T=tile.queries,
            BLOCK_S=tile.keys,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        tile = _tiles(query, value, 2, mask_kind == 0 and not softcap)
        steps = _steps(tokens, tile.queries, sequences)
        query_kernel[(batch * heads * steps,)](
            dquery,
            *inputs,
            heads,
            heads // groups,
            steps,
            *_strides(dquery, aligned=aligned),
            *strides,
            slope=slope,
            **options,
            BLOCK_T=tile.queries,
            BLOCK_S=tile.keys,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return dquery, dkey, dvalue
