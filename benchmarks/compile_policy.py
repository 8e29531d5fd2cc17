"""Shall Inductor see an op as its formula, which it can fuse with its neighbours, or as one opaque op?

    python benchmarks/compile_policy.py [op ...]

Each op stands between an elementwise neighbour on each side, `sin(op(1.01 * x, ...))`, and is timed compiled as the
formula, compiled as the opaque op, and in eager mode on its native body: forward and backward, one thread, the three in
turn, medians. docs/decisions.md keeps the result; `ops/<op>.py` follows it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from blip3o_kernels import OPS, rope_table, use
from blip3o_kernels.samples import Draw

Arguments = tuple[tuple[object, ...], dict[str, object]]


def inputs(name: str, draw: Draw, batch: int, tokens: int, width: int) -> Arguments:
    """What a network of that width asks of the op, for `batch` samples of `tokens` tokens."""
    x = draw(batch, tokens, width)
    heads = width // 32
    query, key, value = (draw(batch, tokens, heads, 32).transpose(1, 2) for _ in range(3))
    table = rope_table(torch.arange(tokens), 32, 10000.0)
    cases: dict[str, Arguments] = {
        "rms_norm": ((x, draw(width)), {}),
        "add_rms_norm": ((x, draw(batch, tokens, width), draw(width)), {}),
        "layer_norm": ((x, draw(width), draw(width)), {}),
        "modulate": ((x, draw(batch, width), draw(batch, width)), {"weight": draw(width)}),
        "gated_residual": ((x, draw(batch, tokens, width), draw(batch, width)), {"weight": draw(width)}),
        "rope": ((query, *table), {}),
        "qk_norm_rope": ((query, key, draw(32), draw(32), *table), {}),
        "attention": ((query, key, value), {"is_causal": True}),
        "swiglu": ((draw(batch, tokens, 2 * width),), {}),
        "timestep_embedding": ((draw.uniform(batch) * 1000, width), {}),
        "flow_interpolate": ((x, draw(batch, tokens, width), draw.uniform(batch)), {}),
        "flow_loss": ((x, draw(batch, tokens, width)), {}),
        "flow_step": ((x, draw(batch, tokens, width), 0.02), {"unconditional": draw(batch, tokens, width)}),
    }
    return cases[name]


def ways(name: str, arguments: Arguments) -> dict[str, Callable[[], None]]:
    """The op between its neighbours, forward and backward, three ways."""
    op = next(op for op in OPS if op.name == name)
    (x, *rest), options = arguments
    assert isinstance(x, Tensor)
    leaf = x.detach().clone().requires_grad_(x.is_floating_point())

    def between(x: Tensor, *rest: object) -> Tensor:
        y = op.function(1.01 * x, *rest, **options)
        assert isinstance(y, Tensor | tuple)
        return (y if isinstance(y, Tensor) else y[0]).sin()

    def step(function: Callable[..., Tensor], backend: str) -> None:
        leaf.grad = None
        if backend:
            with use(backend):
                function(leaf, *rest).sum().backward()
        else:
            function(leaf, *rest).sum().backward()

    formula, opaque = torch.compile(between, fullgraph=True), torch.compile(between, fullgraph=True)
    return {
        "formula": lambda: step(formula, ""),
        "opaque": lambda: step(opaque, "native"),
        "eager": lambda: step(between, "native"),
    }


def medians(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Microseconds of each, all run in turn so that a busy machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 3):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_ >= 3:
                times[name].append(1e6 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    opaque_anyway = {"linear_cross_entropy", "flow_timesteps"}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("ops", nargs="*", default=[op.name for op in OPS if op.name not in opaque_anyway])
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| op | dtype | B x T x D | formula, us | opaque, us | eager, us | opaque : formula |")
    print("|---|---|---|---|---|---|---|")
    for name in options.ops:
        for dtype in (torch.float32, torch.bfloat16):
            for sizes in ((4, 17, 192), (64, 64, 384)):
                torch._dynamo.reset()
                found = medians(ways(name, inputs(name, Draw(dtype, "cpu"), *sizes)), options.rounds)
                row = [name, str(dtype).removeprefix("torch."), " x ".join(map(str, sizes))]
                row += [f"{found[way]:.0f}" for way in ("formula", "opaque", "eager")]
                print("|", " | ".join([*row, f"{found['opaque'] / found['formula']:.2f}"]), "|", flush=True)


if __name__ == "__main__":
    main()
