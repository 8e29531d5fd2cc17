"""The inputs on which attention is tested: its contract is ops/attention.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .samples import Draw, Sample


def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    draw = Draw(dtype, device)
    for batch, heads, groups, tokens, keys, head_dim in (
        (1, 1, 1, 1, 1, 8),
        (2, 3, 3, 5, 7, 16),
        (2, 4, 2, 7, 7, 24),
        (9, 4, 1, 1, 33, 32),  # of one sample alone, the errors of a few weights would decide
        (2, 2, 1, 40, 33, 64),
        (1, 2, 2, 65, 65, 40),
    ):
        shape = f"B{batch} H{heads}/{groups} T{tokens} S{keys} K{head_dim}"
        gqa: dict[str, object] = {"enable_gqa": groups != heads}
        query = draw(batch, heads, tokens, head_dim)
        key, value = draw(batch, groups, keys, head_dim), draw(batch, groups, keys, head_dim)
        yield Sample(shape, (query, key, value), gqa)
        yield Sample(f"{shape} causal", (query, key, value), {**gqa, "is_causal": True})
        padding = torch.arange(keys, device=device) < draw.integers(keys + 1, batch, 1, 1, 1)
        yield Sample(f"{shape} padding", (query, key, value, padding), gqa)
        yield Sample(f"{shape} padding causal", (query, key, value, padding), {**gqa, "is_causal": True})
        bias = draw(1, heads, tokens, keys).masked_fill(draw.integers(3, tokens, keys) == 0, -torch.inf)
        yield Sample(f"{shape} additive", (query, key, value, bias), gqa)
    yield Sample("B3 H5/5 T6 S9 K16", (draw(3, 5, 6, 16), draw(3, 5, 9, 16), draw(3, 5, 9, 16)), {"enable_gqa": False})
    dead = torch.zeros(2, 1, 1, 4, dtype=torch.bool, device=device)
    yield Sample("all masked", (draw(2, 2, 3, 8), draw(2, 2, 4, 8), draw(2, 2, 4, 8), dead))
    query, key, value = (draw(2, 5, 3, 16).transpose(1, 2) for _ in range(3))
    yield Sample("transposed", (query, key, value), {"scale": 0.3})
    yield Sample("value width", (draw(1, 2, 3, 16), draw(1, 2, 5, 16), draw(1, 2, 5, 8)))
    packed = draw(2, 37, 8, 32).transpose(1, 2)
    yield Sample("packed projection", packed.split([4, 2, 2], dim=1), {"enable_gqa": True, "is_causal": True})
    yield Sample("packed, one token", (packed[:, :4, :1], *packed[:, 4:].chunk(2, 1)), {"enable_gqa": True})
    yield Sample("strided last", tuple(draw(1, 2, 5, 32)[..., ::2] for _ in range(3)))
    everyone = torch.ones(2, 1, 1, 1, dtype=torch.bool, device=device)
    yield Sample("one mask for all keys", (*(draw(2, 4, 19, 16) for _ in range(3)), everyone))
    yield Sample("large scores", (draw(8, 2, 20, 32, scale=8.0), draw(8, 2, 20, 32, scale=8.0), draw(8, 2, 20, 32)))
    yield Sample("no samples", (draw(0, 2, 3, 16), draw(0, 2, 5, 16), draw(0, 2, 5, 16)))
    yield Sample("no queries", (draw(1, 2, 0, 16), draw(1, 2, 5, 16), draw(1, 2, 5, 16)))
    yield Sample("no keys", (draw(1, 2, 3, 16), draw(1, 2, 0, 16), draw(1, 2, 0, 16)))
    for head_dim, value_dim in ((56, 56), (72, 72), (80, 96), (112, 80), (256, 256)):
        inputs = (draw(1, 2, 19, head_dim), draw(1, 1, 21, head_dim), draw(1, 1, 21, value_dim))
        yield Sample(f"K{head_dim} V{value_dim}", inputs, {"enable_gqa": True, "is_causal": True})
    yield from _windows_and_caps(draw)
    yield from _packed(draw)
    for tokens in (1, 3):  # against keys that are cut into parts
        inputs = (draw(2, 4, tokens, 16), draw(2, 2, 600, 16), draw(2, 2, 600, 16))
        yield Sample(f"long cache T{tokens}", (*inputs, draw.integers(4, 2, 1, 1, 600) > 0), {"enable_gqa": True})
    query, key = draw(32, 2, 7, 32, scale=6.0), draw(32, 2, 9, 32, scale=6.0)
    yield Sample("large scores, few queries", (query, key, draw(32, 2, 9, 32)))
    # Longer than the tiles that GPUs take at once, of each width.
    options: dict[str, object] = {"enable_gqa": True, "is_causal": True}
    for batch, tokens, keys, head_dim, value_dim, left in (
        (1, 70, 75, 128, 72, -1),
        (1, 70, 90, 64, 64, -1),  # which Hopper has a body for
        (1, 150, 170, 24, 24, 99),
        (1, 40, 70, 136, 200, -1),
        (8, 3, 70, 104, 128, -1),
    ):
        inputs = (draw(batch, 2, tokens, head_dim), draw(batch, 1, keys, head_dim), draw(batch, 1, keys, value_dim))
        yield Sample(f"T{tokens} S{keys} K{head_dim} V{value_dim}", inputs, {**options, "window_size": (left, -1)})


def _windows_and_caps(draw: Draw) -> Iterator[Sample]:
    small = (draw(1, 2, 4, 4), draw(1, 1, 6, 4), draw(1, 1, 6, 4))  # small enough for finite differences
    for window in ((1, -1), (-1, 2), (2, 0), (0, 0), (3, 1)):
        options: dict[str, object] = {"enable_gqa": True, "window_size": window}
        yield Sample(f"window {window}", small, options)
        yield Sample(f"window {window} causal softcap", small, {**options, "is_causal": True, "softcap": 2.0})
    yield Sample("softcap", small, {"enable_gqa": True, "softcap": 0.5})
    wider = (draw(2, 4, 70, 16), draw(2, 2, 85, 16), draw(2, 2, 85, 24))
    kept = draw.integers(4, 2, 1, 1, 85) > 0
    bias = draw(4, 70, 85).masked_fill(draw.integers(3, 70, 85) == 0, -torch.inf)
    options = {"enable_gqa": True, "softcap": 20.0, "window_size": (9, 5)}
    yield Sample("window softcap padding", (*wider, kept), options)
    yield Sample("window causal additive", (*wider, bias), {**options, "softcap": None, "is_causal": True})
    yield Sample("softcap additive", (*wider, bias), {**options, "window_size": None})
    tall = (draw(1, 2, 37, 16), draw(1, 2, 5, 16), draw(1, 2, 5, 16))
    yield Sample("window, fewer keys than queries", tall, {"window_size": (2, 3)})
    yield Sample("negative scale", tall, {"window_size": (3, -1), "softcap": 1.0, "scale": -0.2})
    yield Sample(
        "large scores softcap",
        (draw(1, 2, 9, 32, scale=8.0), draw(1, 2, 9, 32, scale=8.0), draw(1, 2, 9, 32)),
        {"softcap": 30.0},
    )
    # Decoding: one query of each sample against its part of a cache; of few samples luck would decide the errors.
    cache = draw(8, 3, 2, 50, 32)
    key, value = cache[:, :, 0, :41], cache[:, :, 1, :41]
    lengths = torch.arange(41, device=draw.device) < torch.tensor(
        [41, 7, 1, 40, 32, 16, 17, 3], device=draw.device
    ).view(8, 1, 1, 1)
    query = draw(8, 6, 1, 32)
    yield Sample("cache", (query, key, value, lengths), {"enable_gqa": True})
    yield Sample(
        "cache causal window", (query, key, value), {"enable_gqa": True, "is_causal": True, "window_size": (8, 0)}
    )


def _packed(draw: Draw) -> Iterator[Sample]:
    def ends(*lengths: int) -> Tensor:
        return torch.tensor((0, *lengths), device=draw.device).cumsum(0).to(torch.int32)

    small = (draw(1, 2, 6, 4), draw(1, 1, 6, 4), draw(1, 1, 6, 4))
    options: dict[str, object] = {"enable_gqa": True, "cu_seqlens_q": ends(2, 1, 3)}
    yield Sample("packed", small, options)
    yield Sample("packed causal", small, {**options, "is_causal": True})
    yield Sample("packed window softcap", small, {**options, "window_size": (1, 0), "softcap": 3.0})
    # Sequences without keys, without queries, with fewer keys than queries, and longer than a block.
    long = tuple(x.transpose(1, 2) for x in (draw(1, 91, 4, 24), draw(1, 103, 2, 24), draw(1, 103, 2, 16)))
    options = {"enable_gqa": True, "cu_seqlens_q": ends(3, 0, 70, 12, 6), "cu_seqlens_k": ends(0, 5, 80, 7, 11)}
    yield Sample("packed, two lengths", long, options)
    yield Sample("packed, two lengths, causal", long, {**options, "is_causal": True, "softcap": 5.0})
    yield Sample("packed, two lengths, window", long, {**options, "window_size": (6, 4)})
    yield Sample(
        "packed decoding",
        (draw(1, 4, 3, 16), *draw(2, 1, 2, 30, 16).unbind(0)),
        {"enable_gqa": True, "is_causal": True, "cu_seqlens_q": ends(1, 1, 1), "cu_seqlens_k": ends(17, 1, 12)},
    )
