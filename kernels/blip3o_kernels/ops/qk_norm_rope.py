"""Normalises queries and keys, and rotates them by their positions.

    n = x * rstd                  rstd = 1 / sqrt(mean(x^2) + eps)               norm="rms"
    n = (x - mean(x)) * rstd      rstd = 1 / sqrt(mean((x - mean(x))^2) + eps)   norm="layer"
    y = round(rope(n * weight + bias, cos, sin))

query [B, H, T, K] and key [B, G, T, K] float, of one dtype (SDPA's layout; G need not divide H, and may be 0: no key).
across="head": the means are over the K dims of each head, weight and bias are [K]         (Qwen3, Lumina 2)
across="width": over all heads of a token, weight and bias are [H K] or [G K], head by head  (BLIP3-o's DiT)
cos and sin float32 [T, R/2] or [B, T, R/2], R <= K, and interleaved, as in ops/rope.py. The biases may be None.
Returns query and key in their dtype; in memory both are dense as [B, T, H, K], as attention likes them. Computed in
float32 (float64 for float64 queries), rounded once. The tables carry no gradient.
The native and Triton bodies take any strides without a copy as long as the last is 1 and, across="width" on a CPU,
heads are adjacent: parts of one fused projection are read as they lie. They cannot be differentiated twice.
Errors: TypeError for a dtype, ValueError for a shape, word or device. Sources: Dehghani et al. 2023, arXiv:2302.05442;
Su et al. 2021, arXiv:2104.09864.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import checks, dispatch
from ..bodies import NATIVE_CPU, NATIVE_CUDA, TRITON, body
from ..checks import LARGEST, STRIDED
from ..dispatch import Op, choose, direct, plain, transformed, wanted
from ..registered import differentiable
from ..samples import Draw, Sample
from ..shortcut import shortcut
from ..strides import tokens_first
from . import rope


def reference(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "rms",
    across: str = "head",
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    dtype = checks.wide(query.dtype)

    def one(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wide = x.to(dtype).transpose(1, 2)  # [B, T, H, K]
        wide = wide.flatten(-2) if across == "width" else wide
        if norm == "layer":
            wide = wide - wide.mean(-1, keepdim=True)
        y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(dtype)
        if bias is not None:
            y = y + bias.to(dtype)
        y = y.view(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)
        return rope.reference(y, cos, sin, interleaved=interleaved).to(x.dtype)

    return one(query, query_weight, query_bias), one(key, key_weight, key_bias)


_shortcut = shortcut("qk_norm_rope")


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "rms",
    across: str = "head",
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """rope(norm(query)) and rope(norm(key)); see the module's docstring."""
    result: tuple[Tensor, Tensor]
    compiling = is_compiling()
    if dispatch.shortcut >= 0 and not compiling:
        tensors = (query, key, query_weight, key_weight, query_bias, key_bias)
        result = _shortcut(dispatch.shortcut, *tensors, cos, sin, eps, norm, across, interleaved)
        if result is not None:
            return result
    checks.floating("query", query)
    dtype, shape = query.dtype, query.shape
    if len(shape) != 4 or not shape[3]:
        checks.fail("query", "shape [B, H, T, K] with K > 0", list(shape))
    batch, heads, tokens, head_dim = shape
    if not isinstance(key, Tensor) or key.dtype is not dtype or key.layout is not STRIDED:
        checks.same_dtype("key", key, "query", query)
    shape = key.shape
    if len(shape) != 4 or shape[0] != batch or shape[2] != tokens or shape[3] != head_dim:
        checks.fail("key", f"shape [{batch}, G, {tokens}, {head_dim}]", list(shape))
    if not (query.is_cpu and key.is_cpu):
        checks.same_device("key", key, "query", query)
    if norm not in ("rms", "layer"):
        checks.fail("norm", "'rms' or 'layer'", repr(norm))
    if across not in ("head", "width"):
        checks.fail("across", "'head' or 'width'", repr(across))
    if across == "head":
        query_width = key_width = (head_dim,)
    else:
        query_width, key_width = (heads * head_dim,), (shape[1] * head_dim,)
    checks.parameter("query_weight", query_weight, query_width, "query", query)
    checks.parameter("key_weight", key_weight, key_width, "query", query)
    if query_bias is not None:
        checks.parameter("query_bias", query_bias, query_width, "query", query)
    if key_bias is not None:
        checks.parameter("key_bias", key_bias, key_width, "query", query)
    rope.check_tables(cos, sin, query)
    if type(eps) is not float or not 0.0 <= eps <= LARGEST:
        eps = checks.eps(eps)
    checks.flag("interleaved", interleaved)
    # Compiled, the formula is left for Inductor to fuse with its neighbours.
    backend = "reference" if dispatch.forced is None and (compiling or transformed()) else choose(OP, query)
    if backend == "reference":
        return reference(
            query,
            key,
            query_weight,
            key_weight,
            cos,
            sin,
            query_bias=query_bias,
            key_bias=key_bias,
            eps=eps,
            norm=norm,
            across=across,
            interleaved=interleaved,
        )
    # One dtype for all four.
    if (
        query_weight.dtype is not dtype
        or key_weight.dtype is not dtype
        or (query_bias is not None and query_bias.dtype is not dtype)
        or (key_bias is not None and key_bias.dtype is not dtype)
    ):
        query_weight, key_weight = query_weight.to(torch.float32), key_weight.to(torch.float32)
        query_bias, key_bias = (None if p is None else p.to(torch.float32) for p in (query_bias, key_bias))
    tensors = (query, key, query_weight, key_weight, query_bias, key_bias)
    options = (cos, sin, eps, norm == "layer", across == "width", interleaved)
    if compiling or not (direct(query, key, cos) and plain(sin, query_weight, key_weight, query_bias, key_bias)):
        result = _forward_op(*tensors, *options, backend)
        return result
    if torch.is_grad_enabled() and wanted(*tensors):
        result = _apply(*tensors, *options, backend)
        return result
    result = body("qk_norm_rope", backend).forward(*tensors, *options)
    return result


# As torch knows it: torch.ops.blip3o.qk_norm_rope. Its backward op gives the gradients of query, key, their weights and
# their biases; empty tensors for parameters not given or not wanted.
def _setup(context: Any, inputs: tuple[Any, ...], results: tuple[Tensor, Tensor]) -> None:
    context.save_for_backward(*inputs[:8])
    context.options = inputs[8:]


def _gradients(context: Any, backward: Any, query_dy: Tensor, key_dy: Tensor) -> tuple[Tensor | None, ...]:
    needs = context.needs_input_grad
    gradients = backward(query_dy, key_dy, *context.saved_tensors, any(needs[2:6]), *context.options)
    return *(gradient if needs[i] else None for i, gradient in enumerate(gradients)), *[None] * 7


def readable(x: Tensor, heads_adjacent: bool = False) -> Tensor:
    """x [B, H, T, K] with adjacent dims and, if asked for, adjacent heads; a copy only where they are not."""
    adjacent = x.stride(3) == 1 and (not heads_adjacent or x.shape[1] < 2 or x.stride(1) == x.shape[3])
    return x if adjacent else tokens_first(x).copy_(x)


def gradients_like(
    query: Tensor,
    key: Tensor,
    parameters: tuple[Tensor | None, ...],
    wanted: bool,
    like: Callable[[Tensor], Tensor] = tokens_first,
) -> list[Tensor]:
    """Where the gradients of query, key and their parameters go."""
    given = (query.new_empty(0) if p is None or not wanted else p.new_empty(p.shape) for p in parameters)
    return [like(query), like(key), *given]


def _fake_backward(query_dy: Tensor, key_dy: Tensor, query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(gradients_like(query, key, rest[:4], rest[6]))


_tensors = "Tensor query, Tensor key, Tensor query_weight, Tensor key_weight, Tensor? query_bias, Tensor? key_bias"
_options = "float eps, bool centred, bool across_width, bool interleaved, str backend"
_forward_op, _apply = differentiable(
    f"qk_norm_rope({_tensors}, Tensor cos, Tensor sin, {_options}) -> (Tensor, Tensor)",
    f"qk_norm_rope_backward(Tensor query_dy, Tensor key_dy, {_tensors}, Tensor cos, Tensor sin, bool wanted,"
    f" {_options}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=lambda query, key, *_: (tokens_first(query), tokens_first(key)),
    fake_backward=_fake_backward,
    flops=lambda query, key, *_, **__: 8 * (torch.Size(query).numel() + torch.Size(key).numel()),
    backward_flops=lambda query, key, *_, **__: 17 * (torch.Size(query).numel() + torch.Size(key).numel()),
    setup=_setup,
    gradients=_gradients,
)


def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    draw = Draw(dtype, device)

    def sample(name: str, shape: tuple[int, int, int, int, int], rotated: int, bias: bool, **options: object) -> Sample:
        batch, heads, groups, tokens, head_dim = shape
        fused = draw(batch, tokens, heads + 2 * groups, head_dim).transpose(1, 2)
        query, key, _ = fused.split([heads, groups, groups], dim=1)
        counts = (heads, groups) if options.get("across") == "width" else (1, 1)
        weights = [draw(count * head_dim) for count in counts]
        biases = [draw(count * head_dim) for count in counts] if bias else [None, None]
        table = rope.rope_table(torch.arange(tokens, device=device), rotated, 10000.0)
        options.update(query_bias=biases[0], key_bias=biases[1])
        return Sample(f"{name} {shape} {options}"[:60], (query, key, *weights, *table), options)

    for across in ("head", "width"):
        for norm in ("rms", "layer"):
            for interleaved in (False, True):
                options = {"norm": norm, "across": across, "interleaved": interleaved}
                yield sample(f"{across} {norm} {interleaved}", (1, 3, 1, 17, 16), 16, norm == "layer", **options)
                yield sample(f"{across} {norm} {interleaved} part", (1, 2, 1, 3, 7), 4, norm == "rms", **options)
        yield sample(f"{across} 1152", (1, 18, 18, 7, 64), 64, True, norm="layer", across=across, interleaved=True)
        yield sample(f"{across} 1792", (1, 28, 4, 5, 64), 64, False, across=across)
        yield sample(f"{across} no key", (1, 3, 0, 2, 8), 8, False, across=across)
        yield sample(f"{across} no tokens", (2, 3, 1, 0, 8), 8, True, across=across)
        yield sample(f"{across} tiny", (1, 1, 1, 1, 6), 6, True, across=across, eps=0.5)
    yield sample("head rms False", (1, 4, 1, 19, 16), 16, False, norm="rms", across="head", interleaved=False)
    yield sample("wide", (1, 72, 0, 5, 128), 128, True, norm="layer", across="width")
    yield sample("many tokens", (2, 2, 1, 30, 8), 8, True, norm="layer")
    table = rope.rope_table(draw.integers(50, 2, 5), 16, 10000.0)
    heads_first = (draw(2, 3, 5, 32)[..., :16], draw(2, 2, 5, 16))
    weights = [draw(n, dtype=torch.promote_types(dtype, torch.float32)) for n in (16, 16, 48, 32)]
    yield Sample("heads first, per sample, float32 weights", (*heads_first, *weights[:2], *table))
    yield Sample("heads first across width", (*heads_first, *weights[2:], *table), {"across": "width"})
    yield Sample("strided last", (draw(2, 3, 5, 32)[..., ::2], draw(2, 2, 5, 16), *weights[:2], *table))
    for heads in (24, 32, 48):  # for each number of threads that a GPU spreads a row over
        yield sample("wide", (1, heads, 0, 5, 128), 128, True, norm="layer", across="width")


OP = Op(
    "qk_norm_rope",
    qk_norm_rope,
    reference,
    samples,
    differentiable=("query", "key", "query_weight", "key_weight", "query_bias", "key_bias"),
    bodies=(NATIVE_CPU, NATIVE_CUDA, *TRITON),
)
