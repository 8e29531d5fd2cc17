"""Rotary position embedding, and the tables for one axis, for the language model's three axes and for a 2-D grid.

    halves       (y[i], y[i + R/2])   = (x[i] cos[i] - x[i + R/2] sin[i],   x[i + R/2] cos[i] + x[i] sin[i])
    interleaved  (y[2i], y[2i + 1])   = (x[2i] cos[i] - x[2i + 1] sin[i],   x[2i + 1] cos[i] + x[2i] sin[i])
for i < R/2.

x [B, H, T, K] float (SDPA's layout); cos and sin float32 [T, R/2] or [B, T, R/2] with R <= K: the first R dims are
rotated, the rest pass through. y has the shape and dtype of x. Computed in float32 (float64 for float64 x), rounded
once. The tables carry no gradient.
The native and Triton bodies take any strides without a copy as long as the last is 1, and y lies in memory in x's
order. They cannot be differentiated twice.
Errors: TypeError for a dtype, ValueError for a shape or device. Source: Su et al. 2021, arXiv:2104.09864.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import checks, dispatch
from ..bodies import NATIVE_CPU, NATIVE_CUDA, TRITON, body
from ..checks import FLOATING, STRIDED
from ..dispatch import Op, choose, direct, transformed
from ..registered import LIBRARY, differentiable, register
from ..samples import Draw, Sample
from ..shortcut import shortcut


def reference(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    dtype = checks.wide(x.dtype)
    half = cos.shape[-1]
    cos, sin = cos.to(dtype), sin.to(dtype)
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    wide = x.to(dtype)
    if interleaved:
        first, second = wide[..., : 2 * half].unflatten(-1, (half, 2)).unbind(-1)
        rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
        parts = [rotated]
    else:
        first, second = wide[..., :half], wide[..., half : 2 * half]
        parts = [first * cos - second * sin, second * cos + first * sin]
    if 2 * half < x.shape[-1]:
        parts.append(wide[..., 2 * half :])
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)).to(x.dtype)


_shortcut = shortcut("rope")


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate the first R dims of x [B, H, T, K] by the angles of the tables; see the module's docstring."""
    y: Tensor
    compiling = is_compiling()
    if dispatch.shortcut >= 0 and not compiling:
        y = _shortcut(dispatch.shortcut, x, cos, sin, interleaved)
        if y is not None:
            return y
    # Written out rather than through checks.py where it is cheap to: at decode shapes the call is the cost.
    if not isinstance(x, Tensor) or x.dtype not in FLOATING or x.layout is not STRIDED:
        checks.floating("x", x)
    if x.dim() != 4:
        checks.fail("x", "shape [B, H, T, K]", list(x.shape))
    check_tables(cos, sin, x)
    if interleaved is not True and interleaved is not False:
        checks.flag("interleaved", interleaved)
    backend = "reference" if dispatch.forced is None and (compiling or transformed()) else choose(OP, x)
    if backend == "reference":
        return reference(x, cos, sin, interleaved=interleaved)
    if compiling or not (direct(x, cos, sin)):
        y = _forward_op(x, cos, sin, interleaved, backend)
        return y
    if x.requires_grad and torch.is_grad_enabled():
        y = _apply(x, cos, sin, interleaved, backend)
        return y
    y = body("rope", backend).forward(x, cos, sin, interleaved)
    return y


_TABLES = (torch.float32, torch.float64)


def check_tables(cos: Tensor, sin: Tensor, x: Tensor) -> None:
    """Raises unless cos and sin fit x [B, H, T, K]."""
    batch, _, tokens, head_dim = x.shape
    if not isinstance(cos, Tensor) or cos.dtype not in _TABLES or cos.layout is not STRIDED:
        checks.mistyped("cos", "a float32 tensor", cos)
    shape = cos.shape
    half = shape[-1] if shape else 0
    if shape != (tokens, half) and shape != (batch, tokens, half):
        checks.fail("cos", f"shape [{tokens}, R/2] or [{batch}, {tokens}, R/2]", list(shape))
    if 2 * half > head_dim:
        checks.fail("cos", f"at most {head_dim // 2} angles for head_dim {head_dim}", half)
    if not (cos.is_cpu and x.is_cpu):
        checks.same_device("cos", cos, "x", x)
    if (
        not isinstance(sin, Tensor)
        or sin.dtype is not cos.dtype
        or sin.layout is not STRIDED
        or sin.shape != shape
        or not (sin.is_cpu and cos.is_cpu)
    ):
        checks.like("sin", sin, "cos", cos)


# As torch knows it: torch.ops.blip3o.rope.
def _setup(context: Any, inputs: tuple[Any, ...], y: Tensor) -> None:
    _, cos, sin, *context.options = inputs
    context.save_for_backward(cos, sin)


def _gradients(context: Any, backward: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return backward(dy, *context.saved_tensors, *context.options), None, None, None, None


def _fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x) if x.stride(3) == 1 else x.new_empty(x.shape)


def _flops(x: Any, *_: Any, **__: Any) -> int:
    return 3 * torch.Size(x).numel()


def _batched(info: Any, dims: tuple[int | None, ...], x: Tensor, cos: Tensor, sin: Tensor, *options: Any) -> Any:
    """vmap: over x alone the batch is more heads; over the tables it is more samples."""
    count = info.batch_size
    x = x.expand(count, *x.shape) if dims[0] is None else x.movedim(dims[0], 0)
    if dims[1] is None and dims[2] is None:
        heads = x.shape[2]
        y = _forward_op(x.transpose(0, 1).flatten(1, 2), cos, sin, *options)
        return y.unflatten(1, (count, heads)), 1
    batch = x.shape[1]
    tables = []
    for table, dim in zip((cos, sin), dims[1:3], strict=True):
        table = table.expand(count, *table.shape) if dim is None else table.movedim(dim, 0)
        table = table.unsqueeze(1).expand(count, batch, *table.shape[1:]) if table.dim() == 3 else table
        tables.append(table.flatten(0, 1))
    return _forward_op(x.flatten(0, 1), *tables, *options).unflatten(0, (count, batch)), 0


_forward_op, _apply = differentiable(
    "rope(Tensor x, Tensor cos, Tensor sin, bool interleaved, str backend) -> Tensor",
    "rope_backward(Tensor x, Tensor cos, Tensor sin, bool interleaved, str backend) -> Tensor",
    fake=_fake,
    fake_backward=_fake,
    flops=_flops,
    backward_flops=_flops,
    setup=_setup,
    gradients=_gradients,
)
torch.library.register_vmap("blip3o::rope", _batched, lib=LIBRARY)


def rope_table(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [..., dim/2], of positions[...] * theta^(-2i/dim). Angles are computed in float64."""
    if dim % 2:
        checks.fail("dim", "an even number", dim)
    whole = is_compiling() and not positions.requires_grad
    return _table_op(positions, dim, theta) if whole else _table(positions, dim, theta)


def _table(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim)
    angles = positions.contiguous().to(torch.float64).unsqueeze(-1) * frequencies
    return angles.cos().to(torch.float32), angles.sin().to(torch.float32)


def _fake_table(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    shape = (*positions.shape, dim // 2)
    return positions.new_empty(shape, dtype=torch.float32), positions.new_empty(shape, dtype=torch.float32)


# For compiled graphs: a formula's powers, sines and cosines Inductor puts into each use of the table, again for every
# head of every block.
_table_op = register(
    "rope_table(Tensor positions, int dim, float theta) -> (Tensor, Tensor)", _table, _fake_table, lambda *_, **__: 0
)


def rope_table_multimodal(positions: Tensor, dim: int, theta: float, sections: Sequence[int]) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [B, T, dim/2], for positions [3, B, T] (time, height, width).

    The dim/2 frequencies are those of `rope_table`, cut into consecutive sections; section i uses axis i mod 3.
    """
    if positions.dim() != 3 or positions.shape[0] != 3:
        checks.fail("positions", "shape [3, B, T]", list(positions.shape))
    if sum(sections) != dim // 2:
        checks.fail("sections", f"a sum of dim/2 = {dim // 2}", list(sections))
    cos, sin = rope_table(positions, dim, theta)  # [3, B, T, dim/2]
    pick = [part[i % 3] for i, part in enumerate(cos.split(list(sections), dim=-1))]
    pick_sin = [part[i % 3] for i, part in enumerate(sin.split(list(sections), dim=-1))]
    return torch.cat(pick, dim=-1), torch.cat(pick_sin, dim=-1)


def rope_table_2d(
    height: int, width: int, dim: int, theta: float, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [height * width, dim/2], row-major: angles h0, w0, h1, w1, ..., dim/4 frequencies an axis.

    Frequency i of an axis is theta^(-2i/(dim/2)). This is Lumina's table; use it with interleaved=True.
    """
    if dim % 4:
        checks.fail("dim", "a multiple of 4", dim)
    index = torch.arange(height * width, device=device)
    cos, sin = rope_table(torch.stack([index // width, index % width]), dim // 2, theta)  # [2, height width, dim/4]
    return torch.stack(cos.unbind(), dim=-1).flatten(-2), torch.stack(sin.unbind(), dim=-1).flatten(-2)


def samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    draw = Draw(dtype, device)
    for interleaved in (False, True):
        style: dict[str, object] = {"interleaved": interleaved}
        for shape, rotated in (
            ((1, 1, 1, 2), 2),
            ((2, 3, 5, 16), 16),
            ((1, 2, 7, 24), 12),
            ((1, 2, 3, 9), 6),
            ((2, 2, 33, 64), 64),
        ):
            table = rope_table(torch.arange(shape[2], device=device), rotated, 10000.0)
            yield Sample(f"{shape} rotates {rotated} interleaved={interleaved}", (draw(*shape), *table), style)
        table = rope_table(draw.integers(50, 2, 5), 16, 10000.0)
        yield Sample(f"per sample interleaved={interleaved}", (draw(2, 5, 3, 16).transpose(1, 2), *table), style)
    for interleaved in (False, True):  # widths that are not a power of two, some dims that are not rotated
        for head_dim, rotated in ((36, 36), (9, 4), (18, 6)):
            table = rope_table(torch.arange(3, device=device), rotated, 10000.0)
            name = f"head_dim {head_dim} rotates {rotated} interleaved={interleaved}"
            yield Sample(name, (draw(2, 3, 3, head_dim), *table), {"interleaved": interleaved})
    positions = draw.integers(9, 3, 2, 4)
    table = rope_table_multimodal(positions, 16, 1e6, (2, 3, 3))
    yield Sample("three axes", (draw(2, 4, 5, 16)[:, :, :3].transpose(1, 2), *table))
    yield Sample("grid", (draw(2, 2, 12, 16), *rope_table_2d(3, 4, 16, 10000.0, device)), {"interleaved": True})
    table = rope_table(torch.arange(6, device=device), 32, 10000.0)
    yield Sample("first heads of a packed projection", (draw(2, 6, 5, 32)[:, :, :3].transpose(1, 2), *table))
    yield Sample("strided last", (draw(2, 2, 6, 64)[..., ::2], *table))
    table = rope_table(torch.arange(2, device=device), 64, 10000.0)
    for heads in (18, 28):  # 1152 and 1792 wide
        fused = draw(1, 2, 2 * heads, 64).transpose(1, 2)
        yield Sample(f"{heads} of {2 * heads} heads", (fused[:, heads:], *table))
    table = rope_table(torch.arange(6, device=device), 32, 10000.0)
    yield Sample("no tokens", (draw(2, 2, 0, 32), *(t[:0] for t in table)))
    yield Sample("no samples", (draw(0, 2, 6, 32), *table))


OP = Op("rope", rope, reference, samples, differentiable=("x",), bodies=(NATIVE_CPU, NATIVE_CUDA, *TRITON))
