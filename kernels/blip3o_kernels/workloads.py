"""What the released models ask of every op: the inputs that benchmarks time and that GPU code is compiled for.

`WORKLOADS[name](draw)` yields calls of an op at the sizes of 4b and 8b, the largest first. `draw` makes the tensors: a
`Draw` with values to compute on, an `Untouched` with memory that nobody writes, for those who only look at shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .samples import Draw, Sample

# Language models of 4b and 8b: width, query heads, key-value heads, width of the feed-forward network.
LLMS = {"4b": (2048, 16, 2, 11008), "8b": (3584, 28, 4, 18944)}
HEAD_DIM = 128
VOCABULARIES = (151_936, 151_668)  # Qwen's, and the released model's after its words were added: not a multiple of 16
# The diffusion transformer, the same in both: samples, 8 x 8 tokens, heads of 64, width, feed-forward network.
BATCH, TOKENS, HEADS, DIT_HEAD_DIM, WIDTH, MLP_WIDTH = 32, 64, 28, 64, 1792, 4864
CONTEXT = 4096  # tokens of a training sequence


@dataclass(frozen=True)
class Workload(Sample):
    """One call of an op at a size that matters. trained: whether a backward pass follows it."""

    trained: bool = True


class Untouched(Draw):
    """Draws tensors that are allocated and never written, so that their size costs nothing; integers are 0."""

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=self.dtype if dtype is None else dtype, device=self.device)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self.device)

    def uniform(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self(*shape, dtype=dtype)


def rms_norm(draw: Draw) -> Iterator[Workload]:
    for model, (width, *_) in LLMS.items():
        yield Workload(f"{model} {CONTEXT} tokens", (draw(CONTEXT, width), draw(width)))
        yield Workload(f"{model} one token", (draw(1, width), draw(width)), trained=False)
        queries = draw(1, CONTEXT, width // HEAD_DIM, HEAD_DIM)
        yield Workload(f"{model} queries of Qwen3", (queries, draw(HEAD_DIM)))
    yield Workload("dit", (draw(BATCH, TOKENS, WIDTH), draw(WIDTH), 1e-5))
    yield Workload("vision", (draw(CONTEXT, 1280), draw(1280)))


def add_rms_norm(draw: Draw) -> Iterator[Workload]:
    for model, (width, *_) in LLMS.items():
        for tokens in (CONTEXT, 1):
            tensors = (draw(tokens, width), draw(tokens, width), draw(width))
            yield Workload(f"{model} {tokens} tokens", tensors, trained=tokens > 1)


def layer_norm(draw: Draw) -> Iterator[Workload]:
    yield Workload("clip", (draw(8, 1025, WIDTH), draw(WIDTH), draw(WIDTH)))
    queries = draw(BATCH, TOKENS, 4 * WIDTH).split(WIDTH, dim=-1)[1]
    yield Workload("dit, queries of one product", (queries, draw(WIDTH), draw(WIDTH)))
    yield Workload("dit, last layer", (draw(BATCH, TOKENS, WIDTH),))


def modulate(draw: Draw) -> Iterator[Workload]:
    scale = draw(BATCH, 4 * WIDTH).chunk(4, dim=-1)[0]
    yield Workload("dit", (draw(BATCH, TOKENS, WIDTH), scale), {"weight": draw(WIDTH), "eps": 1e-5})
    yield Workload("dit, last layer", (draw(BATCH, TOKENS, WIDTH), draw(BATCH, WIDTH)), {"norm": "layer"})
    shifted = (draw(8, 256, 1152), draw(8, 1152), draw(8, 1152))
    yield Workload("a DiT with shifts", shifted, {"norm": "layer"})


def gated_residual(draw: Draw) -> Iterator[Workload]:
    x = (draw(BATCH, TOKENS, WIDTH), draw(BATCH, TOKENS, WIDTH))
    gate = draw(BATCH, 4 * WIDTH).chunk(4, dim=-1)[1]
    yield Workload("dit", (*x, gate), {"weight": draw(WIDTH)})
    yield Workload("without a norm", (*x, gate))


def swiglu(draw: Draw) -> Iterator[Workload]:
    for model, (_, _, _, width) in LLMS.items():
        yield Workload(f"{model} {CONTEXT} tokens", (draw(CONTEXT, 2 * width),))
        yield Workload(f"{model} one token", (draw(1, 2 * width),), trained=False)
    yield Workload("two tensors", (draw(CONTEXT, LLMS["4b"][3]), draw(CONTEXT, LLMS["4b"][3])))
    yield Workload("dit", (draw(BATCH, TOKENS, 2 * MLP_WIDTH),))


def _table(draw: Draw, tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    return tuple(draw(tokens, head_dim // 2, dtype=torch.float32) for _ in range(2))  # type: ignore[return-value]


def _heads(draw: Draw, batch: int, tokens: int, heads: int, head_dim: int) -> Tensor:
    """[B, H, T, K] as a linear layer leaves it: in memory [B, T, H, K]."""
    return draw(batch, tokens, heads, head_dim).transpose(1, 2)


def rope(draw: Draw) -> Iterator[Workload]:
    for model, (_, heads, _, _) in LLMS.items():
        for tokens in (CONTEXT, 1):
            x, table = _heads(draw, 1, tokens, heads, HEAD_DIM), _table(draw, tokens, HEAD_DIM)
            yield Workload(f"{model} {tokens} tokens", (x, *table), trained=tokens > 1)
    x, table = _heads(draw, BATCH, TOKENS, HEADS, DIT_HEAD_DIM), _table(draw, TOKENS, DIT_HEAD_DIM)
    yield Workload("dit", (x, *table), {"interleaved": True})
    yield Workload("vision", (_heads(draw, 1, CONTEXT, 16, 80), *_table(draw, CONTEXT, 80)))


def qk_norm_rope(draw: Draw) -> Iterator[Workload]:
    for model, (_, heads, groups, _) in LLMS.items():
        for tokens in (CONTEXT, 1):
            pair = (_heads(draw, 1, tokens, number, HEAD_DIM) for number in (heads, groups))
            rest = (draw(HEAD_DIM), draw(HEAD_DIM), *_table(draw, tokens, HEAD_DIM))
            yield Workload(f"{model} {tokens} tokens", (*pair, *rest), trained=tokens > 1)


def attention(draw: Draw) -> Iterator[Workload]:
    def heads(batch: int, tokens: int, number: int, head_dim: int = HEAD_DIM) -> Tensor:
        return _heads(draw, batch, tokens, number, head_dim)

    gqa: dict[str, object] = {"enable_gqa": True}
    causal: dict[str, object] = {**gqa, "is_causal": True}
    for model, (_, number, groups, _) in LLMS.items():
        whole = (heads(1, CONTEXT, number), *(heads(1, CONTEXT, groups) for _ in range(2)))
        yield Workload(f"{model} {CONTEXT} tokens", whole, causal)
        for batch in (8, 1):
            cache = (draw(batch, groups, CONTEXT, HEAD_DIM)[:, :, :2048] for _ in range(2))
            yield Workload(f"{model} decode, batch {batch}", (heads(batch, 1, number), *cache), gqa, trained=False)
        if model == "4b":
            ends = torch.arange(0, CONTEXT + 1, 512, dtype=torch.int32, device=draw.device)
            yield Workload(f"{model} packed", whole, {**causal, "cu_seqlens_q": ends})
            padding = torch.ones(8, 1, 1, 512, dtype=torch.bool, device=draw.device)
            padded = (heads(8, 512, number), *(heads(8, 512, groups) for _ in range(2)), padding)
            yield Workload(f"{model} padded", padded, causal)
    yield Workload("dit, self and cross", tuple(heads(BATCH, TOKENS, HEADS, DIT_HEAD_DIM) for _ in range(3)))
    yield Workload("clip", tuple(heads(8, 1025, 16, 112) for _ in range(3)))
    vision = tuple(heads(1, CONTEXT, 16, 80) for _ in range(3))
    yield Workload("vision, all patches", vision)
    windows = torch.arange(0, CONTEXT + 1, 64, dtype=torch.int32, device=draw.device)
    yield Workload("vision, windows", vision, {"cu_seqlens_q": windows})


def timestep_embedding(draw: Draw) -> Iterator[Workload]:
    yield Workload("dit", (draw.uniform(BATCH), 256))


def _features(draw: Draw) -> Tensor:
    return draw(BATCH, TOKENS, WIDTH)


def flow_interpolate(draw: Draw) -> Iterator[Workload]:
    sigma = draw.uniform(BATCH, dtype=torch.float32)
    drawn: dict[str, object] = {"seed": 0, "positions": torch.arange(BATCH, device=draw.device)}
    yield Workload("noise drawn", (_features(draw), None, sigma), drawn)
    yield Workload("noise given", (_features(draw), _features(draw), sigma))


def flow_loss(draw: Draw) -> Iterator[Workload]:
    yield Workload("dit", (_features(draw), _features(draw)))
    yield Workload("weighted", (_features(draw), _features(draw), draw.uniform(BATCH, dtype=torch.float32)))


def flow_step(draw: Draw) -> Iterator[Workload]:
    x, velocity, unconditional, previous = (_features(draw) for _ in range(4))
    guided: dict[str, object] = {"unconditional": unconditional, "guidance": 3.0}
    yield Workload("guided", (x, velocity, -0.03), guided, trained=False)
    yield Workload("guided, Heun", (x, velocity, -0.03), {**guided, "previous": previous}, trained=False)
    yield Workload("plain", (x, velocity, -0.03))


def flow_timesteps(draw: Draw) -> Iterator[Workload]:
    positions = torch.arange(BATCH, device=draw.device)
    yield Workload("uniform", (positions, 0), trained=False)
    yield Workload("logit-normal", (positions, 0), {"distribution": "logit_normal"}, trained=False)


def linear_cross_entropy(draw: Draw) -> Iterator[Workload]:
    width = LLMS["4b"][0]
    for vocabulary in VOCABULARIES:
        tensors = (draw(CONTEXT, width), draw(vocabulary, width, scale=width**-0.5))
        yield Workload(f"4b, {vocabulary} words", (*tensors, draw.integers(vocabulary, CONTEXT)))


WORKLOADS: dict[str, Callable[[Draw], Iterator[Workload]]] = {
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
    "flow_interpolate": flow_interpolate,
    "flow_loss": flow_loss,
    "flow_step": flow_step,
    "flow_timesteps": flow_timesteps,
    "linear_cross_entropy": linear_cross_entropy,
}
