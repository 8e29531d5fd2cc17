"""Scaled dot-product attention in the layout and with the argument names of torch's `scaled_dot_product_attention`,
then those of flash-attn.

    scores[b, h, t, s] = cap(scale * query[b, h, t] . key[b, g(h), s]) + mask     [B, H, T, S]  float32
    y = round(softmax(scores) @ value)                                            [B, H, T, V]

query [B, H, T, K], key [B, G, S, K], value [B, G, S, V], one float dtype, H and K above 0; g(h) = h // (H / G), and
G != H needs enable_gqa=True. scale defaults to 1/sqrt(K). What a query sees:

    attn_mask     broadcasts to [B, H, T, S]: boolean (True takes part) or additive float; it carries no gradient
    is_causal     s <= t + S - T: aligned bottom-right, as flash-attn does and torch does not
    window_size   (left, right): t + S - T - left <= s <= t + S - T + right; -1 is no limit, is_causal makes right 0
    cu_seqlens_q, cu_seqlens_k   packed sequences: B is 1; sequence i has the queries cu_seqlens_q[i] to [i + 1] and
                  sees the keys cu_seqlens_k[i] to [i + 1] (by default the same), with T and S of its own above. int32
                  [N + 1], ascending from 0 to T and to S, which is checked on a CPU only. No attn_mask then.

softcap c: cap(x) = c tanh(x / c) (Gemma 2); None or 0: cap(x) = x. A query that sees nothing gives 0, gradient 0 and
log-sum-exp -inf. Scores and probabilities are float32 (float64 for float64), y is rounded once. For T * S >= LONG and
without a softcap the reference calls torch's fused kernel, which computes the same and rounds the probabilities of
half-precision inputs. y lies in memory as [B, T, H, V]. Keys and values are read where they lie, such as a part of a
preallocated cache, if elements of the last dimension are adjacent.
The native and Triton bodies cannot be differentiated twice; their sums are added in an order fixed by shape.
Errors: TypeError for a dtype, ValueError for a shape, device or value and for dropout_p != 0.
Source: Vaswani et al. 2017, arXiv:1706.03762; Dao 2023, arXiv:2307.08691, whose window and packing these are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from .. import checks, dispatch, masks, strides
from ..bodies import NATIVE_CPU, NATIVE_CUDA, TRITON, body
from ..checks import FLOATING, STRIDED
from ..dispatch import Op, choose, direct, plain, refusal, transformed
from ..native_ops.attention import at_once
from ..registered import LIBRARY, differentiable
from ..samples import Draw, Sample

# T * S from which torch's fused kernel wins over matmul and softmax, forward and backward: measured on one core of a
# Xeon with AVX-512 at B = 256, H = 6, K = 32. Below, the two differ by less than 20 % either way.
LONG = 32 * 32
WIDEST = 256  # dims that the CUDA kernels have


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window_size: tuple[int, int] | None = None,
    softcap: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    batch, heads, tokens, head_dim = query.shape
    groups, keys = key.shape[1:3]
    scale = head_dim**-0.5 if scale is None else scale
    shared = True if groups != heads else False  # a branch, so that torch.compile has a bool and no symbol
    left, right = window_size or (-1, -1)
    window = (left, 0 if is_causal else right)
    empty = attn_mask is not None or cu_seqlens_q is not None or tokens > keys  # whether a query may see nothing
    if tokens * keys >= LONG and not softcap:
        if is_causal and tokens == keys and left < 0 and attn_mask is None and cu_seqlens_q is None:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=shared)
        blocked = masks.hidden(tokens, keys, window, cu_seqlens_q, cu_seqlens_k, query.device)
        additive, dead = masks.additive(attn_mask, blocked, query.dtype, empty)
        y = F.scaled_dot_product_attention(query, key, value, additive, scale=scale, enable_gqa=shared)
        return y if dead is None else y.masked_fill(dead, 0)
    dtype = checks.wide(query.dtype)
    wide_query, wide_key, wide_value = query.to(dtype) * scale, key.to(dtype), value.to(dtype)
    blocked = masks.hidden(tokens, keys, window, cu_seqlens_q, cu_seqlens_k, query.device)
    additive, dead = masks.additive(attn_mask, blocked, dtype, empty)
    # Fold the query heads that share a key into the rows, so that keys and values are not repeated.
    folded = wide_query if groups == heads else wide_query.reshape(batch, groups, heads // groups * tokens, head_dim)
    scores = folded @ wide_key.transpose(-1, -2)
    if softcap:
        scores = (scores / softcap).tanh() * softcap
    if additive is not None:
        each = scores.view(batch, heads, tokens, keys)
        scores = torch.where(additive > masks.lowest(dtype), each + additive, additive).view_as(scores)
    y = (scores.softmax(-1) @ wide_value).view(batch, heads, tokens, value.shape[-1])
    return (y if dead is None else y.masked_fill(dead, 0)).to(query.dtype)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window_size: tuple[int, int] | None = None,
    softcap: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """softmax(scale * query @ key^T + mask) @ value, causal aligned bottom-right; see the module's docstring."""
    if attn_mask is window_size is softcap is cu_seqlens_q is cu_seqlens_k is None and not is_compiling():
        found = at_once(query, key, value, dropout_p, is_causal, scale, enable_gqa)
        if found is not None:
            return found
    # Written out rather than through checks.py where it is cheap to: at decode shapes the call is the cost.
    if not isinstance(query, Tensor) or query.dtype not in FLOATING or query.layout is not STRIDED:
        checks.floating("query", query)
    dtype, shape = query.dtype, query.shape
    if not isinstance(key, Tensor) or key.dtype is not dtype or key.layout is not STRIDED:
        checks.same_dtype("key", key, "query", query)
    if not isinstance(value, Tensor) or value.dtype is not dtype or value.layout is not STRIDED:
        checks.same_dtype("value", value, "query", query)
    if len(shape) != 4 or not shape[1] or not shape[3]:
        checks.fail("query", "shape [B, H, T, K] with H > 0 and K > 0", list(shape))
    batch, heads, tokens, head_dim = shape
    if enable_gqa is not True and enable_gqa is not False:
        checks.flag("enable_gqa", enable_gqa)
    shape = key.shape
    if len(shape) != 4 or shape[0] != batch or shape[3] != head_dim:
        checks.fail("key", f"shape [{batch}, G, S, {head_dim}]", list(shape))
    _, groups, keys, _ = shape
    shape = value.shape
    if len(shape) != 4 or shape[0] != batch or shape[1] != groups or shape[2] != keys:
        checks.fail("value", f"shape [{batch}, {groups}, {keys}, V]", list(shape))
    if groups != heads and (not enable_gqa or groups == 0 or heads % groups):
        checks.fail("key", f"{'a divisor of' if enable_gqa else 'enable_gqa=True, or'} {heads} heads", groups)
    on_cpu = query.is_cpu
    if not (on_cpu and key.is_cpu and value.is_cpu):
        checks.same_device("key", key, "query", query)
        checks.same_device("value", value, "query", query)
    if type(dropout_p) not in (float, int) or dropout_p:
        checks.fail("dropout_p", "0.0, there is no dropout", dropout_p)
    if attn_mask is not None:
        masks.check_mask(attn_mask, query, (batch, heads, tokens, keys))
    if window_size is not None:
        masks.check_window(window_size)
    if is_causal is not True and is_causal is not False:
        checks.flag("is_causal", is_causal)
    if scale is not None:
        scale = checks.number("scale", scale)
    if softcap is not None:
        softcap = checks.number("softcap", softcap, 0.0, "a finite number that is not negative, or None")
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    if packed:
        if attn_mask is not None:
            checks.fail("attn_mask", "None, as cu_seqlens_q says what a query sees", list(attn_mask.shape))
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        masks.check_packed(cu_seqlens_q, cu_seqlens_k, query, key)
    compiling = is_compiling()
    # Compiled on a CPU it is one op: torch's own takes up to six times as long there (docs/decisions.md).
    formula = not on_cpu if compiling else transformed()
    backend = "reference" if dispatch.forced is None and formula else choose(OP, query)
    if not on_cpu and backend == "native" and dispatch.forced is None and max(head_dim, shape[3]) > WIDEST:
        backend = "reference" if refusal(OP, "triton", query.device.type, dtype) else "triton"
    if backend == "reference":
        ends: dict[str, Any] = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
        options: tuple[Any, ...] = (attn_mask, dropout_p, is_causal, scale, enable_gqa)
        return reference(query, key, value, *options, window_size=window_size, softcap=softcap, **ends)
    scale = head_dim**-0.5 if scale is None else scale
    left, right = window_size or (-1, -1)
    inputs = (query, key, value, attn_mask, cu_seqlens_q, cu_seqlens_k)
    options = (is_causal, left, right, softcap or 0.0, scale)
    extras = packed or attn_mask is not None
    y: Tensor
    if compiling or not direct(query, key, value) or (extras and not plain(attn_mask, cu_seqlens_q, cu_seqlens_k)):
        y = _forward_op(*inputs, *options, backend)[0]
        return y
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        y = _apply(*inputs, *options, backend)
        return y
    y, _ = body("attention", backend).forward(*inputs, *options, False)
    return y


# As torch knows it: torch.ops.blip3o.attention, which returns the scores' log-sum-exp too, float32 [B, H, T]; that
# carries no gradient. Its backward op gives dquery, dkey and dvalue, each a filled
# torch.empty_like(strides.last_adjacent(x)) of its x.
def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, tokens = query.shape[:3]
    return strides.tokens_first(query, value.shape[3]), query.new_empty(batch, heads, tokens, dtype=torch.float32)


def _fake_backward(dy: Tensor, y: Tensor, log_sum: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(strides.last_adjacent(x)) for x in inputs[:3])


def _setup(context: Any, inputs: tuple[Any, ...], results: tuple[Tensor, Tensor]) -> None:
    context.save_for_backward(*results, *inputs[:6])
    context.options = inputs[6:]


def _gradients(context: Any, backward: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *backward(dy, *context.saved_tensors, *context.options), *[None] * 9


def _batched(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> Any:
    """vmap: the batch is more samples, of packed sequences more heads."""
    count, mask, packed = info.batch_size, inputs[3], inputs[4] is not None
    if dims[4] is not None or dims[5] is not None:
        raise NotImplementedError("attention: vmap over cu_seqlens_q or cu_seqlens_k")
    query, key, value = (
        x.expand(count, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(inputs[:3], dims[:3], strict=True)
    )
    batch = query.shape[1]
    if packed:  # B is 1
        outputs = _forward_op(*(x.transpose(0, 1).flatten(1, 2) for x in (query, key, value)), *inputs[3:])
        return tuple(x.unflatten(1, (count, -1)).transpose(0, 1) for x in outputs), (0, 0)
    if mask is not None:
        mask = mask.unsqueeze(0) if dims[3] is None else mask.movedim(dims[3], 0)
        mask = mask.view(len(mask), *[1] * (5 - mask.dim()), *mask.shape[1:])
        mask = mask.expand(count, batch, *mask.shape[2:]).flatten(0, 1)
    outputs = _forward_op(*(x.flatten(0, 1) for x in (query, key, value)), mask, *inputs[4:])
    return tuple(x.unflatten(0, (count, batch)) for x in outputs), (0, 0)


def _flops(query: Any, key: Any, value: Any) -> int:
    """As if every query saw every key."""
    batch, heads, tokens, head_dim = torch.Size(query)
    return 2 * batch * heads * tokens * torch.Size(key)[2] * (head_dim + torch.Size(value)[3])


_arguments = (
    "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k,"
    " bool causal, int left, int right, float softcap, float scale, str backend"
)
_forward_op, _apply = differentiable(
    f"attention({_arguments}) -> (Tensor, Tensor)",
    f"attention_backward(Tensor dy, Tensor y, Tensor log_sum, {_arguments}) -> (Tensor, Tensor, Tensor)",
    fake=_fake_forward,
    fake_backward=_fake_backward,
    flops=lambda query, key, value, *_, **__: _flops(query, key, value),
    backward_flops=lambda dy, y, log_sum, query, key, value, *_, **__: _flops(query, key, value) * 5 // 2,
    setup=_setup,
    gradients=_gradients,
    hidden=True,
)
torch.library.register_vmap("blip3o::attention", _batched, lib=LIBRARY)


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
    longer = ((1, 70, 75, 128, 72, -1), (1, 150, 170, 24, 24, 99), (1, 40, 70, 136, 200, -1), (8, 1, 70, 104, 128, -1))
    for batch, tokens, keys, head_dim, value_dim, left in longer:
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


OP = Op(
    "attention",
    attention,
    reference,
    samples,
    differentiable=("query", "key", "value"),
    bodies=(NATIVE_CPU, NATIVE_CUDA, *TRITON),
)
