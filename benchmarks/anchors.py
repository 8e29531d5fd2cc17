"""The sizes at which others publish what a data-centre GPU reaches: `ops.py --shapes anchor`, on CUDA alone.

attention     16,384 tokens in sequences of 2k to 16k, 2048 dims in heads of 64 or 128, with and without a causal mask,
              as in the FlashAttention papers; decoding from caches that are larger than any L2
norms         16,384 rows of 4096; a DiT's width 1152, which is no power of two; the gates and scales of 64 samples
flow          67 million elements
the rest      a layer of 8b and larger: swiglu, rope, qk_norm_rope; cross entropy over 131,072 words
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from rows import Arguments, Case
from torch import Tensor

from blip3o_kernels import rope_table
from blip3o_kernels.samples import Draw

TOKENS, HIDDEN = 16384, 2048  # of attention
LENGTHS, HEAD_DIMS = (2048, 4096, 8192, 16384), (128, 64)
ROWS, WIDTH = 16384, 4096
SAMPLES = 64  # that share a condition each: 256 rows
FEATURES = (128, 256, 2048)
DECODE = (64, 28, 4, 128, 8192)  # batch, heads, key-value heads, head_dim, keys
WORDS, VOCABULARY = 8192, 131072


def _heads(draw: Draw, batch: int, tokens: int, heads: int, head_dim: int) -> Tensor:
    """[B, H, T, K] as a linear layer leaves it: in memory [B, T, H, K]."""
    return draw(batch, tokens, heads, head_dim).transpose(1, 2)


def _case(op: str, what: str, make: Callable[[Draw], Arguments], **more: object) -> Case:
    return Case(op, f"anchor {what}", make, **{"trained": True, **more})  # type: ignore[arg-type]


def attention() -> Iterator[Case]:
    for head_dim in HEAD_DIMS:
        for tokens in LENGTHS:
            batch, heads = TOKENS // tokens, HIDDEN // head_dim
            for causal in (False, True):

                def make(
                    draw: Draw, sizes: tuple[int, ...] = (batch, tokens, heads, head_dim), causal: bool = causal
                ) -> Arguments:
                    return tuple(_heads(draw, *sizes) for _ in range(3)), {"is_causal": causal}

                pairs = batch * heads * tokens**2 / (2 if causal else 1)
                yield _case(
                    "attention", attention_name(batch, heads, tokens, head_dim, causal), make,
                    flops=4 * pairs * head_dim, exponentials=pairs, memory_bound=False,
                )  # fmt: skip
    batch, heads, groups, head_dim, keys = DECODE

    def decode(draw: Draw) -> Arguments:
        cache = (draw(batch, groups, keys, head_dim) for _ in range(2))
        return (_heads(draw, batch, 1, heads, head_dim), *cache), {"enable_gqa": True}

    name = f"decode {batch}x{heads}x1x{head_dim} of {groups}x{keys}"
    yield _case("attention", name, decode, trained=False, flops=4.0 * batch * heads * keys * head_dim)


def attention_name(batch: int, heads: int, tokens: int, head_dim: int, causal: bool) -> str:
    return f"{batch}x{heads}x{tokens}x{head_dim}{' causal' * causal}"


def rms_norm() -> Iterator[Case]:
    for rows, width in ((ROWS, WIDTH), (8192, 8192), (65536, 1152)):

        def make(draw: Draw, rows: int = rows, width: int = width) -> Arguments:
            return (draw(rows, width), draw(width), 1e-6), {}

        yield _case("rms_norm", f"{rows}x{width}", make)


def add_rms_norm() -> Iterator[Case]:
    def make(draw: Draw) -> Arguments:
        return (draw(ROWS, WIDTH), draw(ROWS, WIDTH), draw(WIDTH), 1e-6), {}

    yield _case("add_rms_norm", f"{ROWS}x{WIDTH}", make, unread=("x",), free=("x",))


def layer_norm() -> Iterator[Case]:
    for rows, width in ((ROWS, WIDTH), (65536, 1152)):

        def make(draw: Draw, rows: int = rows, width: int = width) -> Arguments:
            return (draw(rows, width), draw(width), draw(width), 1e-5), {}

        yield _case("layer_norm", f"{rows}x{width}", make)


def modulate() -> Iterator[Case]:
    for tokens, width in ((ROWS // SAMPLES, WIDTH), (1024, 1152)):

        def make(draw: Draw, tokens: int = tokens, width: int = width) -> Arguments:
            scale = draw(SAMPLES, 4 * width).chunk(4, dim=-1)[0]
            return (draw(SAMPLES, tokens, width), scale), {"weight": draw(width), "eps": 1e-6}

        yield _case("modulate", f"{SAMPLES}x{tokens}x{width}", make)


def gated_residual() -> Iterator[Case]:
    shape = (SAMPLES, ROWS // SAMPLES, WIDTH)

    def make(draw: Draw) -> Arguments:
        gate = draw(SAMPLES, 4 * WIDTH).chunk(4, dim=-1)[1]
        return (draw(*shape), draw(*shape), gate), {"weight": draw(WIDTH), "eps": 1e-6}

    name = "x".join(map(str, shape))
    yield _case("gated_residual", name, make, unread=("residual",), free=("residual",))


def swiglu() -> Iterator[Case]:
    yield _case("swiglu", "8192x28672", lambda draw: ((draw(8192, 2 * 14336),), {}))


def _table(draw: Draw, tokens: int) -> tuple[Tensor, Tensor]:
    return rope_table(torch.arange(tokens, device=draw.device), 128, 1e6)


def rope() -> Iterator[Case]:
    def make(draw: Draw) -> Arguments:
        return (_heads(draw, 2, 8192, 32, 128), *_table(draw, 8192)), {}

    yield _case("rope", "2x32x8192x128", make, unread=("x",))


def flow_interpolate() -> Iterator[Case]:
    samples = FEATURES[0]
    name = "x".join(map(str, FEATURES))

    def drawn(draw: Draw) -> Arguments:
        options = {"seed": 7, "positions": torch.arange(samples, device=draw.device)}
        return (draw(*FEATURES), None, draw.uniform(samples, dtype=torch.float32)), options

    def given(draw: Draw) -> Arguments:
        return (draw(*FEATURES), draw(*FEATURES), draw.uniform(samples, dtype=torch.float32)), {}

    yield _case("flow_interpolate", f"{name} drawn", drawn, trained=False)
    yield _case("flow_interpolate", f"{name} given", given, trained=False)


def flow_loss() -> Iterator[Case]:
    name = "x".join(map(str, FEATURES))
    yield _case("flow_loss", name, lambda draw: ((draw(*FEATURES), draw(*FEATURES)), {}))


def flow_step() -> Iterator[Case]:
    def make(draw: Draw) -> Arguments:
        guided = {"unconditional": draw(*FEATURES), "guidance": 3.0}
        return (draw(*FEATURES), draw(*FEATURES), -0.03), guided

    yield _case("flow_step", "x".join(map(str, FEATURES)), make, trained=False)


def linear_cross_entropy() -> Iterator[Case]:
    def make(draw: Draw) -> Arguments:
        weight = draw(VOCABULARY, WIDTH, scale=WIDTH**-0.5)
        return (draw(WORDS, WIDTH), weight, draw.integers(VOCABULARY, WORDS)), {}

    name, flops = f"{WORDS}x{WIDTH} to {VOCABULARY}", 2.0 * WORDS * VOCABULARY * WIDTH
    yield _case("linear_cross_entropy", name, make, flops=flops, memory_bound=False)


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    each.__name__: each
    for each in (
        attention, linear_cross_entropy, rms_norm, add_rms_norm, layer_norm, modulate, gated_residual, swiglu, rope,
        flow_interpolate, flow_loss, flow_step,
    )
}  # fmt: skip


def cases(ops: list[str]) -> Iterator[Case]:
    for op in ops:
        if op in CASES:
            yield from CASES[op]()
