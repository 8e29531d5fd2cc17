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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import checks, dispatch, native
from ..dispatch import Body, Op, choose, direct, instruction_set, plain, transformed
from ..native import DTYPES
from ..registered import LIBRARY, register, register_gradient
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
    if query.dtype not in checks.FLOATING:
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
    compiling = torch.compiler.is_compiling()
    backend = "reference" if dispatch.forced is None and (compiling or transformed()) else choose(OP, query)
    if backend == "reference":
        return reference(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    scale = head_dim**-0.5 if scale is None else float(scale)
    if compiling or not (direct(query, key) and plain(value, attn_mask)):
        y: Tensor = _forward_op(query, key, value, attn_mask, is_causal, scale, backend)[0]
        return y
    if (query.requires_grad or key.requires_grad or value.requires_grad) and torch.is_grad_enabled():
        y = _Attention.apply(query, key, value, attn_mask, is_causal, scale, backend)
        return y
    return _forward(query, key, value, attn_mask, is_causal, scale, backend)[0]


def _check_mask(mask: Tensor, query: Tensor, full: tuple[int, ...]) -> None:
    if mask.dtype is not torch.bool:
        checks.floating("attn_mask", mask)
    if mask.dim() > 4 or any(
        size not in (1, expected) for size, expected in zip(reversed(mask.shape), reversed(full), strict=False)
    ):
        checks.fail("attn_mask", f"a shape that broadcasts to {list(full)}", list(mask.shape))
    checks.same_device("attn_mask", mask, "query", query)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *options: Any) -> Tensor:
        y, log_sum = _forward(query, key, value, mask, *options)
        context.save_for_backward(log_sum, query, key, value, mask)
        context.options = options
        return y

    @staticmethod
    @once_differentiable
    def backward(context: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        run = _backward if direct(dy) else _backward_op
        return *run(dy, *context.saved_tensors, *context.options), None, None, None, None


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _masked(mask: Tensor | None, full: torch.Size) -> tuple[Tensor | None, int, Tensor | None]:
    """The mask as the library reads it (to be kept alive), its kind, and a view of the full shape for its strides."""
    if mask is None:
        return None, 0, None
    if mask.dtype is not torch.bool:
        mask = mask.detach().to(torch.float32)
    if not mask.dim() or mask.shape[-1] != full[-1]:
        mask = mask.expand(*mask.shape[:-1], full[-1])
    if mask.stride(-1) != 1:
        mask = mask.contiguous()
    return mask, 1 if mask.dtype is torch.bool else 2, mask.expand(full)


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in tensors]


def _strides(*tensors: Tensor | None) -> list[int]:
    """Of batch, head and token."""
    return [stride for x in tensors for stride in ((0, 0, 0) if x is None else x.stride()[:3])]


def _padded(n: int, to: int) -> int:
    return (n + to - 1) // to * to


def _forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """The output, [B, T, H, V] in memory, and the log-sum-exp [B, H, T]."""
    query, key, value = _last_contiguous(query), _last_contiguous(key), _last_contiguous(value)
    batch, heads, tokens, head_dim = query.shape
    _, groups, keys, value_dim = value.shape
    mask, mask_kind, full_mask = _masked(mask, torch.Size((batch, heads, tokens, keys)))
    y = query.new_empty(batch, tokens, heads, value_dim).transpose(1, 2)
    log_sum = query.new_empty(batch, heads, tokens, dtype=torch.float32)
    threads = max(1, min(torch.get_num_threads(), batch * groups))
    widths = _padded(head_dim, 16) + _padded(value_dim, 16)
    floats = _padded(keys, 16) * (widths + 128) + 128 * widths
    workspace = query.new_empty(threads * floats, dtype=torch.float32)
    sizes = (batch, heads, groups, tokens, keys, head_dim, value_dim, floats)
    options = (scale, DTYPES[query.dtype], mask_kind, causal, instruction_set(), threads, 0)
    status = _CPU_FORWARD(
        _PACK(
            *_addresses(y, log_sum, query, key, value, mask, workspace),
            *sizes,
            *_strides(y, query, key, value, full_mask),
            *options,
        )
    )
    if status:
        raise native.failed("attention", status)
    return y, log_sum


def _backward(
    dy: Tensor,
    log_sum: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, dy = (_last_contiguous(x) for x in (query, key, value, dy))
    batch, heads, tokens, head_dim = query.shape
    _, groups, keys, value_dim = value.shape
    mask, mask_kind, full_mask = _masked(mask, torch.Size((batch, heads, tokens, keys)))
    gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    threads = max(1, min(torch.get_num_threads(), batch * groups))
    widths = _padded(head_dim, 16) + _padded(value_dim, 16)
    floats = _padded(keys, 16) * (2 * widths + 192) + 192 * widths
    workspace = query.new_empty(threads * floats, dtype=torch.float32)
    sizes = (batch, heads, groups, tokens, keys, head_dim, value_dim, floats)
    options = (scale, DTYPES[query.dtype], mask_kind, causal, instruction_set(), threads, 0)
    status = _CPU_BACKWARD(
        _PACK_BACKWARD(
            *_addresses(*gradients, dy, log_sum, query, key, value, mask, workspace),
            *sizes,
            *_strides(*gradients, dy, query, key, value, full_mask),
            *options,
        )
    )
    if status:
        raise native.failed("attention", status)
    return gradients


_PACK, _PACK_BACKWARD = native.packer("attention"), native.packer("attention_backward")
_CPU_FORWARD, _CPU_BACKWARD = native.function("cpu", "attention"), native.function("cpu", "attention_backward")


# As torch knows it: torch.ops.blip3o.attention, which returns the log-sum-exp too; that carries no gradient.
def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, tokens = query.shape[:3]
    y = query.new_empty(batch, tokens, heads, value.shape[3]).transpose(1, 2)
    return y, query.new_empty(batch, heads, tokens, dtype=torch.float32)


def _fake_backward(dy: Tensor, log_sum: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(_last_contiguous(x)) for x in inputs[:3])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, *ctx.options = inputs
    ctx.save_for_backward(output[1], query, key, value, mask)
    ctx.mark_non_differentiable(output[1])


def _gradient(context: Any, dy: Tensor, dlog_sum: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_backward_op(dy, *context.saved_tensors, *context.options), None, None, None, None


def _batched(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> Any:
    """vmap: the batch is more samples."""
    count, mask = info.batch_size, inputs[3]
    query, key, value = (
        (x.expand(count, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
        for x, dim in zip(inputs[:3], dims[:3], strict=True)
    )
    batch = len(query) // count
    if mask is not None:
        mask = mask.unsqueeze(0) if dims[3] is None else mask.movedim(dims[3], 0)
        mask = mask.view(len(mask), *[1] * (5 - mask.dim()), *mask.shape[1:])
        mask = mask.expand(count, batch, *mask.shape[2:]).flatten(0, 1)
    outputs = _forward_op(query, key, value, mask, *inputs[4:])
    return tuple(x.unflatten(0, (count, batch)) for x in outputs), (0, 0)


def _flops(query: Any, key: Any, value: Any) -> int:
    batch, heads, tokens, head_dim = torch.Size(query)
    return 2 * batch * heads * tokens * torch.Size(key)[2] * (head_dim + torch.Size(value)[3])


_forward_op = register(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, float scale, str backend)"
    " -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    lambda query, key, value, *_, **__: _flops(query, key, value),
)
_backward_op = register(
    "attention_backward(Tensor dy, Tensor log_sum, Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal,"
    " float scale, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    lambda dy, log_sum, query, key, value, *_, **__: _flops(query, key, value) * 5 // 2,
)
register_gradient("attention", _gradient, _setup)
torch.library.register_vmap("blip3o::attention", _batched, lib=LIBRARY)


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
    packed = draw(2, 37, 8, 32).transpose(1, 2)
    yield Sample("packed projection", packed.split([4, 2, 2], dim=1), {"enable_gqa": True, "is_causal": True})
    yield Sample("packed, one token", (packed[:, :4, :1], *packed[:, 4:].chunk(2, 1)), {"enable_gqa": True})
    yield Sample("strided last", tuple(draw(1, 2, 5, 32)[..., ::2] for _ in range(3)))
    everyone = torch.ones(2, 1, 1, 1, dtype=torch.bool, device=device)
    yield Sample("one mask for all keys", (*(draw(2, 4, 19, 16) for _ in range(3)), everyone))
    yield Sample("large scores", (draw(1, 2, 20, 32, scale=8.0), draw(1, 2, 20, 32, scale=8.0), draw(1, 2, 20, 32)))
    yield Sample("no samples", (draw(0, 2, 3, 16), draw(0, 2, 5, 16), draw(0, 2, 5, 16)))


OP = Op(
    "attention",
    attention,
    reference,
    samples,
    differentiable=("query", "key", "value"),
    bodies=(Body("native", "cpu", (torch.float32, torch.bfloat16, torch.float16), True, native.CPU_MISSING),),
)
