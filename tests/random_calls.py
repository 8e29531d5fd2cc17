"""Random calls of every op: any shapes, strides, offsets and options that its contract allows.

`CALLS[op.name](draw)` gives the positional and the keyword arguments. Hypothesis (tests/test_memory.py) and the
sanitizer run (tests/fuzz.py) supply the choices: `draw.integer(low, high)`, both ends included.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Call = tuple[tuple[object, ...], dict[str, object]]


class Draw:
    """Tensors in any layout of memory, by choices of `integer`; floating ones are of `dtype` or float32."""

    def __init__(self, integer: Callable[[int, int], int], dtype: torch.dtype) -> None:
        self.integer, self.dtype = integer, dtype
        self.generator = torch.Generator().manual_seed(integer(0, 2**20))

    def flag(self) -> bool:
        return bool(self.integer(0, 1))

    def pick(self, *choices: object) -> object:
        return choices[self.integer(0, len(choices) - 1)]

    def size(self, high: int) -> int:
        """1 to high; one time in eight 0."""
        return self.integer(1, high) if self.integer(0, 7) else 0

    def placed(self, values: Tensor) -> Tensor:
        """The same values in another place: behind an offset, with gaps, transposed, with a step, as they are."""
        layout = self.integer(0, 4)
        if layout == 1:
            offset = self.integer(1, 5)
            room = values.new_empty(values.numel() + offset)
            return room[offset:].view(values.shape).copy_(values)
        if layout == 2 and values.dim() > 1:
            i, j = self.integer(0, values.dim() - 1), self.integer(0, values.dim() - 1)
            return values.transpose(i, j).contiguous().transpose(i, j)
        if layout in (3, 4) and values.dim():
            step = 1 if layout == 3 else 2
            room = values.new_empty(*values.shape[:-1], step * values.shape[-1] + self.integer(0, 3))
            return room[..., : step * values.shape[-1] : step].copy_(values)
        return values

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape, generator=self.generator) * scale
        return self.placed(values.to(self.dtype if dtype is None else dtype))

    def parameter(self, *shape: int) -> Tensor:
        return self(*shape, scale=0.5, dtype=torch.float32 if self.flag() else None)

    def maybe(self, *shape: int) -> Tensor | None:
        return self.parameter(*shape) if self.flag() else None

    def uniform(self, *shape: int) -> Tensor:
        return self.placed(torch.rand(shape, generator=self.generator))

    def integers(self, high: int, *shape: int, low: int = 0) -> Tensor:
        return self.placed(torch.randint(low, high, shape, generator=self.generator))

    def rows(self) -> list[int]:
        """Leading dimensions, none to three."""
        return [self.size(9) for _ in range(self.integer(0, 3))]

    def width(self) -> int:
        return self.integer(1, 300) if self.flag() else self.integer(1, 40)


def rms_norm(draw: Draw) -> Call:
    width = draw.width()
    options = {"weight_offset": draw.pick(0.0, 1.0), "round_before_weight": draw.flag()}
    return (draw(*draw.rows(), width), draw.maybe(width), draw.pick(1e-6, 0.1)), options


def add_rms_norm(draw: Draw) -> Call:
    shape = (*draw.rows(), draw.width())
    options = {"weight_offset": draw.pick(0.0, 1.0), "round_before_weight": draw.flag()}
    return (draw(*shape), draw(*shape), draw.maybe(shape[-1]), draw.pick(1e-6, 0.1)), options


def layer_norm(draw: Draw) -> Call:
    width = draw.width()
    return (draw(*draw.rows(), width), draw.maybe(width), draw.maybe(width), draw.pick(1e-5, 0.1)), {}


def modulate(draw: Draw) -> Call:
    batch, tokens, width = draw.size(5), draw.size(9), draw.width()
    norm = draw.pick("rms", "layer")
    options = {"norm": norm, "weight": draw.maybe(width), "bias": draw.maybe(width) if norm == "layer" else None}
    shift = draw.maybe(batch, width)
    return (draw(batch, tokens, width), draw.parameter(batch, width), shift), {**options, "eps": 1e-2}


def gated_residual(draw: Draw) -> Call:
    shape = (draw.size(5), draw.size(9), draw.width())
    inputs = (draw(*shape), draw(*shape), draw.parameter(shape[0], shape[2]))
    return inputs, {"weight": draw.maybe(shape[2]), "eps": 1e-2}


def swiglu(draw: Draw) -> Call:
    rows, width = draw.rows(), draw.width()
    if draw.flag():
        return (draw(*rows, 2 * width),), {}
    return (draw(*rows, width), draw(*rows, width)), {}


def table(draw: Draw, batch: int, tokens: int, half: int) -> tuple[Tensor, Tensor]:
    angles = torch.rand(*([batch] if draw.flag() else []), tokens, half, generator=draw.generator) * 6
    return draw.placed(angles.cos()), draw.placed(angles.sin())


def rope(draw: Draw) -> Call:
    batch, heads, tokens, half = draw.size(3), draw.size(4), draw.size(9), draw.integer(1, 40)
    x = draw(batch, heads, tokens, 2 * half + draw.integer(0, 1) * draw.integer(0, 9))
    return (x, *table(draw, batch, tokens, half)), {"interleaved": draw.flag()}


def qk_norm_rope(draw: Draw) -> Call:
    batch, groups, tokens, half = draw.size(3), draw.integer(1, 3), draw.size(9), draw.integer(1, 40)
    heads, head_dim = groups * draw.integer(1, 3), 2 * half + draw.integer(0, 1) * draw.integer(0, 9)
    across, norm = draw.pick("head", "width"), draw.pick("rms", "layer")
    widths = [head_dim if across == "head" else count * head_dim for count in (heads, groups)]
    weights = [draw.parameter(width) for width in widths]
    biases = [draw.parameter(width) if norm == "layer" and draw.flag() else None for width in widths]
    options = {"query_bias": biases[0], "key_bias": biases[1], "norm": norm, "across": across}
    inputs = (draw(batch, heads, tokens, head_dim), draw(batch, groups, tokens, head_dim))
    return (*inputs, *weights, *table(draw, batch, tokens, half)), {**options, "interleaved": draw.flag(), "eps": 1e-2}


def pieces(draw: Draw, total: int, count: int) -> Tensor:
    """Cumulative lengths of `count` sequences, some of them empty."""
    cuts = sorted(draw.integer(0, total) for _ in range(count - 1))
    return torch.tensor([0, *cuts, total], dtype=torch.int32)


def attention(draw: Draw) -> Call:
    groups, tokens, keys = draw.integer(1, 3), draw.size(40), draw.integer(1, 40)
    heads, batch = groups * draw.integer(1, 3), draw.size(3)
    head_dim, value_dim = draw.integer(1, 80), draw.integer(1, 80)
    options: dict[str, object] = {"enable_gqa": heads != groups, "is_causal": draw.flag()}
    if draw.flag():
        options["window_size"] = (draw.integer(-1, 20), draw.integer(-1, 20))
    if draw.flag():
        options["softcap"] = draw.pick(1.0, 5.0)
    kind = draw.integer(0, 3)
    if kind == 1:
        mask = draw.integers(3, draw.pick(1, batch), 1, draw.pick(1, tokens), keys) > 0  # type: ignore[call-overload]
        options["attn_mask"] = draw.placed(mask)
    elif kind == 2:
        bias = draw(draw.pick(1, heads), tokens, keys)  # type: ignore[arg-type]
        options["attn_mask"] = draw.placed(bias.masked_fill(draw.integers(4, tokens, keys) == 0, -torch.inf))
    elif kind == 3:
        batch, count = 1, draw.integer(1, 4)
        options["cu_seqlens_q"], options["cu_seqlens_k"] = pieces(draw, tokens, count), pieces(draw, keys, count)
    query = draw(batch, heads, tokens, head_dim)
    return (query, draw(batch, groups, keys, head_dim), draw(batch, groups, keys, value_dim)), options


def timestep_embedding(draw: Draw) -> Call:
    steps = draw.uniform(draw.size(40)) * draw.pick(1.0, 1000.0)  # type: ignore[operator]
    return (steps.to(draw.dtype), 2 * draw.integer(1, 70)), {"max_period": draw.pick(100.0, 10000.0)}


def flow_shape(draw: Draw) -> list[int]:
    return [draw.size(5), *draw.rows(), draw.width()]


def flow_interpolate(draw: Draw) -> Call:
    shape = flow_shape(draw)
    x, sigma = draw(*shape), draw.uniform(shape[0])
    if draw.flag():
        return (x, draw(*shape), sigma), {}
    positions = draw.integers(2**40, shape[0])
    return (x, None, sigma), {"seed": draw.integer(0, 2**63 - 1), "positions": positions, "draw": draw.integer(0, 9)}


def flow_timesteps(draw: Draw) -> Call:
    options = {"distribution": draw.pick("uniform", "logit_normal"), "shift": draw.pick(1.0, 3.0)}
    return (draw.integers(2**40, draw.size(70)), draw.integer(0, 2**63 - 1)), {**options, "draw": draw.integer(0, 9)}


def flow_loss(draw: Draw) -> Call:
    shape = [max(size, 1) for size in flow_shape(draw)]
    return (draw(*shape), draw(*shape), draw.uniform(shape[0]) if draw.flag() else None), {}


def flow_step(draw: Draw) -> Call:
    shape = flow_shape(draw)
    options: dict[str, object] = {}
    if draw.flag():
        options.update(unconditional=draw(*shape), guidance=draw.pick(1.0, 3.0))
    if draw.flag():
        options["previous"] = draw(*shape)
    return (draw(*shape), draw(*shape), draw.uniform(shape[0]) if draw.flag() else -0.05), options


def linear_cross_entropy(draw: Draw) -> Call:
    rows, width, vocabulary = draw.rows() or [3], draw.integer(1, 70), draw.integer(1, 90)
    target = draw.integers(vocabulary, *rows)
    target = draw.placed(target.masked_fill(draw.integers(4, *rows) == 0, -100))
    options = {"label_smoothing": draw.pick(0.0, 0.1), "z_loss": draw.pick(0.0, 0.01), "softcap": draw.pick(None, 3.0)}
    return (draw(*rows, width), draw(vocabulary, width, scale=0.3), target), options


CALLS: dict[str, Callable[[Draw], Call]] = {
    call.__name__: call
    for call in (
        rms_norm,
        add_rms_norm,
        layer_norm,
        modulate,
        gated_residual,
        rope,
        qk_norm_rope,
        attention,
        swiglu,
        timestep_embedding,
        flow_interpolate,
        flow_timesteps,
        flow_loss,
        flow_step,
        linear_cross_entropy,
    )
}
