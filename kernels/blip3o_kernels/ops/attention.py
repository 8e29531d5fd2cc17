"""Scaled dot-product attention in the layout and with the argument names of torch's `scaled_dot_product_attention`.

    scores[b, h, t, s] = scale * query[b, h, t] . key[b, g(h), s] + mask      [B, H, T, S]  float32
    y = round(softmax(scores) @ value)                                        [B, H, T, V]

query [B, H, T, K], key [B, G, S, K], value [B, G, S, V], one float dtype; g(h) = h // (H / G), and G != H needs
enable_gqa=True. scale defaults to 1/sqrt(K). attn_mask broadcasts to [B, H, T, S]: boolean (True takes part) or
additive float; it carries no gradient. is_causal is aligned bottom-right, s <= t + S - T, as flash-attn does and
torch does not, and may be combined with a mask. A fully masked row gives 0, and gradient 0. Scores and probabilities
are float32 (float64 for float64), y is rounded once. For T * S >= LONG the reference calls torch's fused kernel,
which computes the same and rounds the probabilities of half-precision inputs.
Errors: TypeError for a dtype, ValueError for a shape or device and for dropout_p != 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..dispatch import Op, choose
from ..samples import Draw, Sample

# T * S from which torch's fused kernel wins over matmul and softmax, forward and backward: measured on one core of a
# Xeon with AVX-512 at B = 256, H = 6, K = 32. Below, the two differ by less than 20 % either way.
LONG = 32 * 32


def _additive(mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """One finite additive mask for both kinds, and the rows [.., T, 1] that nothing may attend to."""
    tokens, keys, dtype = query.shape[-2], key.shape[-2], query.dtype
    # Low enough to give probability 0, high enough that a score added to it stays finite in every dtype.
    lowest = torch.finfo(dtype).min / 4
    blocked = None
    if mask is not None:
        blocked = ~mask if mask.dtype is torch.bool else mask == -torch.inf
    if is_causal:
        ahead = torch.ones(tokens, keys, dtype=torch.bool, device=query.device).triu(keys - tokens + 1)
        blocked = ahead if blocked is None else blocked | ahead
    if blocked is None:
        return None, None
    if mask is None or mask.dtype is torch.bool:
        additive = torch.zeros(blocked.shape, dtype=dtype, device=query.device)
    else:
        additive = mask.detach().to(dtype)
    # Without a mask only causal attention over fewer keys than queries leaves a row empty.
    dead = blocked.all(-1, keepdim=True) if mask is not None or tokens > keys else None
    return additive.masked_fill(blocked, lowest), dead


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    batch, heads, tokens, head_dim = query.shape
    groups, keys = key.shape[1:3]
    scale = head_dim**-0.5 if scale is None else scale
    if tokens == 1:
        is_causal = False  # the last query sees every key
    if tokens * keys >= LONG:
        if attn_mask is None and (not is_causal or tokens == keys):
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=is_causal, scale=scale, enable_gqa=groups != heads
            )
        additive, dead = _additive(attn_mask, is_causal, query, key)
        y = F.scaled_dot_product_attention(query, key, value, additive, scale=scale, enable_gqa=groups != heads)
        return y if dead is None else y.masked_fill(dead, 0)
    dtype = checks.wide(query.dtype)
    wide_query, wide_key, wide_value = query.to(dtype) * scale, key.to(dtype), value.to(dtype)
    additive, dead = _additive(attn_mask, is_causal, wide_query, wide_key)
    if groups == heads:
        scores = wide_query @ wide_key.transpose(-1, -2)
        probabilities = (scores if additive is None else scores + additive).softmax(-1)
        y = probabilities @ wide_value
    else:  # fold the query heads that share a key into the rows, so that keys and values are not repeated
        folded = wide_query.reshape(batch, groups, heads // groups * tokens, head_dim)
        scores = folded @ wide_key.transpose(-1, -2)
        if additive is not None:
            scores = (scores.view(batch, heads, tokens, keys) + additive).view_as(scores)
        y = (scores.softmax(-1) @ wide_value).view(batch, heads, tokens, value.shape[-1])
    if dead is not None:
        y = y.masked_fill(dead, 0)
    return y.to(query.dtype)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale * query @ key^T + mask) @ value, causal aligned bottom-right; see the module's docstring."""
    checks.floating("query", query)
    if query.dim() != 4:
        checks.fail("query", "shape [B, H, T, K]", list(query.shape))
    batch, heads, tokens, head_dim = query.shape
    if key.dim() != 4 or key.shape[0] != batch or key.shape[3] != head_dim:
        checks.fail("key", f"shape [{batch}, G, S, {head_dim}]", list(key.shape))
    groups, keys = key.shape[1:3]
    if value.dim() != 4 or value.shape[:3] != (batch, groups, keys):
        checks.fail("value", f"shape [{batch}, {groups}, {keys}, V]", list(value.shape))
    if groups != heads and (not enable_gqa or groups == 0 or heads % groups):
        divisors = "a divisor of" if enable_gqa else "enable_gqa=True, or"
        checks.fail("key", f"{divisors} {heads} heads", groups)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype is not query.dtype:
            raise TypeError(f"{name}: expected the dtype of query, {query.dtype}, got {tensor.dtype}")
        checks.same_device(name, tensor, "query", query)
    if dropout_p != 0.0:
        checks.fail("dropout_p", "0.0, there is no dropout", dropout_p)
    if attn_mask is not None:
        _check_mask(attn_mask, query, (batch, heads, tokens, keys))
    choose(OP, query)
    return reference(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _check_mask(mask: Tensor, query: Tensor, full: tuple[int, ...]) -> None:
    if mask.dtype is not torch.bool:
        checks.floating("attn_mask", mask)
    if mask.dim() > 4 or any(
        size not in (1, expected) for size, expected in zip(reversed(mask.shape), reversed(full), strict=False)
    ):
        checks.fail("attn_mask", f"a shape that broadcasts to {list(full)}", list(mask.shape))
    checks.same_device("attn_mask", mask, "query", query)


def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    draw = Draw(dtype, device)
    for batch, heads, groups, tokens, keys, head_dim in (
        (1, 1, 1, 1, 1, 8),
        (2, 3, 3, 5, 7, 16),
        (2, 4, 2, 7, 7, 24),
        (1, 4, 1, 1, 33, 32),
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
    dead = torch.zeros(2, 1, 1, 4, dtype=torch.bool, device=device)
    yield Sample("all masked", (draw(2, 2, 3, 8), draw(2, 2, 4, 8), draw(2, 2, 4, 8), dead))
    query, key, value = (draw(2, 5, 3, 16).transpose(1, 2) for _ in range(3))
    yield Sample("transposed", (query, key, value), {"scale": 0.3})
    yield Sample("value width", (draw(1, 2, 3, 16), draw(1, 2, 5, 16), draw(1, 2, 5, 8)))


OP = Op("attention", attention, reference, samples, differentiable=("query", "key", "value"))
