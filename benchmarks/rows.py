"""What is measured: every op at the sizes that the presets give it, decoding and training.

"decode" is what stands between a user and an answer: one token of the language model, one step of one picture (two
rows, with guidance and without). "train" is one training step of one process. On a CPU sequences and batches are those
that it trains in a sensible time; 8b's are large enough to leave every cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from measure import Work
from torch import Tensor

from blip3o.config import Blip3oConfig
from blip3o.presets import PRESETS
from blip3o_kernels import rope_table, rope_table_2d
from blip3o_kernels.samples import Draw

PHASES = ("decode", "train")
Arguments = tuple[tuple[object, ...], dict[str, object]]


@dataclass(frozen=True)
class Sizes:
    """Of one preset and phase. batch, tokens: of the language model. keys: those that a decoded token sees. pictures:
    rows of the diffusion transformer. words: rows whose loss is taken."""

    batch: int
    tokens: int
    keys: int
    pictures: int
    words: int


SIZES = {
    "cpu": {
        ("nano", "decode"): Sizes(1, 1, 64, 2, 0),
        ("nano", "train"): Sizes(32, 64, 64, 256, 2048),
        ("4b", "decode"): Sizes(1, 1, 2048, 2, 0),
        ("4b", "train"): Sizes(1, 1024, 1024, 16, 128),
        ("8b", "decode"): Sizes(1, 1, 2048, 2, 0),
        ("8b", "train"): Sizes(1, 4096, 2048, 64, 128),
    },
    "cuda": {
        ("nano", "decode"): Sizes(1, 1, 64, 2, 0),
        ("nano", "train"): Sizes(32, 64, 64, 256, 2048),
        ("4b", "decode"): Sizes(8, 1, 4096, 2, 0),
        ("4b", "train"): Sizes(1, 4096, 4096, 32, 4096),
        ("8b", "decode"): Sizes(8, 1, 4096, 2, 0),
        ("8b", "train"): Sizes(4, 4096, 4096, 128, 4096),
    },
}


@dataclass(frozen=True)
class Case:
    """One call to be measured: `make(draw)` gives its arguments.

    trained: whether the backward pass is measured too.  unread: arguments that a backward pass need not read.  free:
    those whose gradient is another tensor's.  flops, exponentials: of the forward pass.  memory_bound: what the op is
    by nature, whatever the size.
    """

    op: str
    shape: str
    make: Callable[[Draw], Arguments]
    trained: bool
    unread: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    flops: float = 0.0
    exponentials: float = 0.0
    memory_bound: bool = True


def cases(ops: list[str], presets: list[str], phases: list[str], device: str) -> Iterator[Case]:
    for op in ops:
        for preset in presets:
            for phase in phases:
                sizes = SIZES["cpu" if device == "cpu" else "cuda"][preset, phase]
                yield from CASES[op](Builder(op, PRESETS[preset], phase, sizes))


class Builder:
    """Names cases, and makes the tensors that several ops share."""

    def __init__(self, op: str, config: Blip3oConfig, phase: str, sizes: Sizes) -> None:
        self.op, self.config, self.phase, self.sizes = op, config, phase, sizes
        self.training = phase == "train"
        self.llm, self.dit = config.llm, config.dit
        self.tokens = (sizes.batch, sizes.tokens, self.llm.width)
        self.features = (sizes.pictures, self.dit.grid**2, self.dit.width)

    def case(self, what: str, make: Callable[[Draw], Arguments], trained: bool | None = None, **more: object) -> Case:
        name = f"{self.config.name} {self.phase} {what}"
        return Case(self.op, name, make, self.training if trained is None else trained, **more)  # type: ignore[arg-type]


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _heads(draw: Draw, batch: int, tokens: int, heads: int, head_dim: int) -> Tensor:
    """[B, H, T, K] as a linear layer leaves it: in memory [B, T, H, K]."""
    return draw(batch, tokens, heads, head_dim).transpose(1, 2)


def rms_norm(b: Builder) -> Iterator[Case]:
    width = b.llm.width
    yield b.case(_text(b.tokens), lambda draw: ((draw(*b.tokens), draw(width), b.llm.eps), {}))


def add_rms_norm(b: Builder) -> Iterator[Case]:
    width = b.llm.width

    def make(draw: Draw) -> Arguments:
        return (draw(*b.tokens), draw(*b.tokens), draw(width), b.llm.eps), {}

    yield b.case(_text(b.tokens), make, unread=("x",), free=("x",))  # one sum, one gradient for both


def layer_norm(b: Builder) -> Iterator[Case]:
    width = b.dit.width

    def make(draw: Draw) -> Arguments:
        return (draw(*b.features), draw(width), draw(width), 1e-5), {}

    yield b.case(_text(b.features), make)


def modulate(b: Builder) -> Iterator[Case]:
    rows, _, width = b.features

    def make(draw: Draw) -> Arguments:
        scale = draw(rows, 4 * width).chunk(4, dim=-1)[0]
        return (draw(*b.features), scale), {"weight": draw(width), "eps": b.dit.eps}

    yield b.case(_text(b.features), make)


def gated_residual(b: Builder) -> Iterator[Case]:
    rows, _, width = b.features

    def make(draw: Draw) -> Arguments:
        gate = draw(rows, 4 * width).chunk(4, dim=-1)[1]
        return (draw(*b.features), draw(*b.features), gate), {"weight": draw(width), "eps": b.dit.eps}

    yield b.case(_text(b.features), make, unread=("residual",), free=("residual",))


def rope(b: Builder) -> Iterator[Case]:
    batch, tokens, heads, head_dim = b.sizes.batch, b.sizes.tokens, b.llm.num_heads, b.llm.head_dim

    def make(draw: Draw) -> Arguments:
        table = rope_table(torch.arange(tokens, device=draw.device), head_dim, b.llm.rope_theta)
        return (_heads(draw, batch, tokens, heads, head_dim), *table), {}

    yield b.case(_text((batch, heads, tokens, head_dim)), make, unread=("x",))


def qk_norm_rope(b: Builder) -> Iterator[Case]:
    rows, places, width = b.features
    heads, head_dim = b.dit.num_heads, width // b.dit.num_heads

    def make(draw: Draw) -> Arguments:
        fused = draw(rows, places, 2 * width).view(rows, places, 2 * heads, head_dim).transpose(1, 2)
        table = rope_table_2d(b.dit.grid, b.dit.grid, head_dim, b.dit.rope_theta, draw.device)
        options = {"query_bias": draw(width), "key_bias": draw(width), "eps": 1e-5}
        return (*fused.chunk(2, dim=1), draw(width), draw(width), *table), {
            **options, "norm": "layer", "across": "width", "interleaved": True,
        }  # fmt: skip

    yield b.case(f"2 of {_text((rows, heads, places, head_dim))}", make)


def attention(b: Builder) -> Iterator[Case]:
    batch, heads, groups, head_dim = b.sizes.batch, b.llm.num_heads, b.llm.num_kv_heads, b.llm.head_dim
    tokens = min(b.sizes.tokens, b.sizes.keys)
    options: dict[str, object] = {"enable_gqa": True, "is_causal": b.training}

    def language(draw: Draw) -> Arguments:
        query = _heads(draw, batch, tokens, heads, head_dim)
        if b.training:
            key, value = (_heads(draw, batch, tokens, groups, head_dim) for _ in range(2))
        else:  # a cache with room for more
            key, value = (draw(batch, groups, 2 * b.sizes.keys, head_dim)[:, :, : b.sizes.keys] for _ in range(2))
        return (query, key, value), options

    pairs = batch * heads * tokens * b.sizes.keys / (2 if b.training else 1)
    name = f"{_text((batch, heads, tokens, head_dim))} of {groups}x{b.sizes.keys}" + " causal" * b.training
    yield b.case(name, language, flops=4 * pairs * head_dim, exponentials=pairs, memory_bound=not b.training)
    rows, places, width = b.features
    heads = b.dit.num_heads

    def picture(draw: Draw) -> Arguments:
        return tuple(_heads(draw, rows, places, heads, width // heads) for _ in range(3)), {}

    pairs = rows * heads * places**2
    shape = _text((rows, heads, places, width // heads))
    flops = 4 * pairs * (width // heads)
    yield b.case(shape, picture, flops=flops, exponentials=pairs, memory_bound=False)


def swiglu(b: Builder) -> Iterator[Case]:
    tokens = min(b.sizes.tokens, 1024)
    shape = (b.sizes.batch, tokens, 2 * b.llm.mlp_width)
    yield b.case(_text(shape), lambda draw: ((draw(*shape),), {}), exponentials=math.prod(shape) / 2)


def timestep_embedding(b: Builder) -> Iterator[Case]:
    rows = b.sizes.pictures
    yield b.case(f"{rows} of 256", lambda draw: ((1000 * draw.uniform(rows), 256), {}), trained=False)


def flow_timesteps(b: Builder) -> Iterator[Case]:
    if b.training:
        rows = b.sizes.pictures
        options: dict[str, object] = {"distribution": b.config.flow.sigma}

        def make(draw: Draw) -> Arguments:
            return (torch.arange(rows, device=draw.device), 7), options

        yield b.case(f"{rows} {b.config.flow.sigma}", make, trained=False)


def flow_interpolate(b: Builder) -> Iterator[Case]:
    if b.training:
        rows, places, _ = b.features
        shape = (rows, places, b.dit.in_channels)

        def drawn(draw: Draw) -> Arguments:
            positions = torch.arange(rows, device=draw.device)
            return (draw(*shape), None, draw.uniform(rows, dtype=torch.float32)), {"seed": 7, "positions": positions}

        def given(draw: Draw) -> Arguments:
            return (draw(*shape), draw(*shape), draw.uniform(rows, dtype=torch.float32)), {}

        # A pair of normals takes a logarithm, a root, a sine and a cosine.
        waves = 2 * math.prod(shape)
        yield b.case(f"{_text(shape)} drawn", drawn, trained=False, exponentials=waves, memory_bound=False)
        yield b.case(f"{_text(shape)} given", given, trained=False)


def flow_loss(b: Builder) -> Iterator[Case]:
    if b.training:
        shape = (b.sizes.pictures, b.dit.grid**2, b.dit.in_channels)
        yield b.case(_text(shape), lambda draw: ((draw(*shape), draw(*shape)), {}))


def flow_step(b: Builder) -> Iterator[Case]:
    if not b.training:
        shape = (1, b.dit.grid**2, b.dit.in_channels)

        def make(draw: Draw) -> Arguments:
            return (draw(*shape), draw(*shape), -0.03), {"unconditional": draw(*shape), "guidance": 3.0}

        yield b.case(_text(shape), make)


def linear_cross_entropy(b: Builder) -> Iterator[Case]:
    if b.training:
        rows, width, vocabulary = b.sizes.words, b.llm.width, b.llm.vocab_size

        def make(draw: Draw) -> Arguments:
            weight = draw(vocabulary, width, scale=width**-0.5)
            return (draw(rows, width), weight, draw.integers(vocabulary, rows)), {}

        logits = rows * vocabulary
        shape = f"{rows}x{width} to {vocabulary}"
        yield b.case(shape, make, flops=2 * logits * width, exponentials=logits, memory_bound=False)


CASES: dict[str, Callable[[Builder], Iterator[Case]]] = {
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "layer_norm": layer_norm,
    "modulate": modulate,
    "gated_residual": gated_residual,
    "rope": rope,
    "qk_norm_rope": qk_norm_rope,
    "attention": attention,
    "swiglu": swiglu,
    "timestep_embedding": timestep_embedding,
    "flow_timesteps": flow_timesteps,
    "flow_interpolate": flow_interpolate,
    "flow_loss": flow_loss,
    "flow_step": flow_step,
    "linear_cross_entropy": linear_cross_entropy,
}


def size(x: Tensor) -> int:
    return x.numel() * x.element_size()


def work(
    case: Case, arguments: dict[str, object], outputs: list[Tensor], differentiable: tuple[str, ...]
) -> dict[str, Work]:
    """Of the forward pass, and of forward and backward together. Each tensor is read or written once a pass; a backward
    pass of matrix products is twice the forward one, of attention, which has no scores to start from, two and a half
    times."""
    tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
    into, out = sum(size(x) for x in tensors.values()), sum(size(y) for y in outputs)
    forward = Work(into + out, case.flops, case.exponentials)
    again = sum(size(x) for name, x in tensors.items() if name not in case.unread)
    gradients = sum(size(x) for name, x in tensors.items() if name in differentiable and name not in case.free)
    factor = 3.5 if case.op == "attention" else 3.0
    both = Work(into + 2 * out + again + gradients, factor * case.flops, 2 * case.exponentials)
    return {"forward": forward, "training": both}
