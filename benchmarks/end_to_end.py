"""What model.py and training.py share: the models they build, the contestants, their options and their table."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import measure
import torch
from measure import Row
from plain import Plain, load
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from blip3o.config import Blip3oConfig
from blip3o.model import Blip3o
from blip3o.presets import PRESETS
from blip3o_kernels import memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PLANS = ("official", "cached")
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
DEPTH = 2  # to which 4b is cut


def providers(compiled: bool) -> list[str]:
    """Ours, and each plan in eager mode and compiled."""
    plain = [f"plain {plan}" for plan in PLANS]
    return ["native", *plain, *([f"{name} compile" for name in plain] if compiled else [])]


def config_of(preset: str) -> Blip3oConfig:
    """nano as it is; 4b with DEPTH blocks in each network. No answer ends before its time: the end token is the last
    word, which is not among those that are said.

    4b reads pictures as nano does, as CLIP features by a projector: one frozen tower is enough to compare plans.
    """
    config = PRESETS[preset]
    config = replace(config, end_token=config.llm.vocab_size - 1)
    if preset == "nano":
        return config
    return replace(
        config, vision=None, llm=replace(config.llm, depth=DEPTH), dit=replace(config.dit, depth=DEPTH),
        clip=replace(config.clip, depth=DEPTH),
    )  # fmt: skip


def build(preset: str, dtype: torch.dtype, device: str) -> tuple[Blip3o, Plain]:
    """Our model with weights drawn at random, none of them 0, and the plain networks on the same tensors."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Blip3o(config_of(preset))
    model.to_empty(device=device).to(dtype)
    for name, x in model.named_parameters():
        if x.dim() >= 2:
            deviation = 1.0 if "embedding" in name or "queries" in name or "places" in name else x.shape[-1] ** -0.5
            if "embedding" in name and model.config.llm.tie_embeddings:
                deviation = x.shape[-1] ** -0.5
            nn.init.normal_(x, std=deviation)
        else:
            nn.init.normal_(x, mean=1.0 if name.endswith("weight") else 0.0, std=0.1)
    model.feature_mean.zero_()
    model.feature_std.fill_(1.0)
    return model, load(model, model.config)


def reading(model: Blip3o, tokens: int) -> float:
    """Operations that the language model needs to read so many tokens, at least: those of its products."""
    return 2.0 * tokens * sum(x.numel() for x in model.llm.blocks.parameters())


def distance(x: Tensor, y: Tensor, least: float = 0.0) -> float:
    """The norm of the difference, relative to y's own or to `least`, if that is larger."""
    off = (x.float() - y.float()).norm().item()
    return off / max(y.float().norm().item(), least, 1e-30)


def checked(row: Row, results: Callable[[], Sequence[Tensor]], expected: Sequence[Tensor], tolerance: float) -> Row:
    """The row, with what is wrong with a contestant's results as its reason. Ours may not be wrong."""
    try:
        found = results()
        # A gradient that is 0 but for rounding, as that of a bias before a softmax, is held against the others.
        least = 1e-3 * max(y.float().norm().item() for y in expected)
        off = max(distance(x, y, least) for x, y in zip(found, expected, strict=True))
        reason = "" if off <= tolerance else f"off by {off:.1g} of the result, allowed is {tolerance:g}"
    except measure.FAILURES as error:
        if row.provider in measure.OURS:
            raise
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
    if reason and row.provider in measure.OURS:
        raise AssertionError(f"{row.op} {row.shape} {row.dtype}: {row.provider} {reason}")
    return replace(row, reason=reason, checked=not reason)


def peak(call: Callable[[], object], device: str) -> int:
    """Bytes that `call` adds to the tensors alive at the worst moment, counted at torch's allocator, which our large
    results use meanwhile: what they come from otherwise (blip3o_kernels/memory.py) torch does not count."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with (
        mock.patch.object(memory, "LARGE", 2**62),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record,
    ):
        call()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def parser(description: str, seconds: float) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--presets", nargs="+", choices=["nano", "4b"], default=["nano", "4b"])
    found.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    found.add_argument(
        "--peers", nargs="+", default=[], choices=providers(True)[1:], metavar="NAME", help="all if not given"
    )
    found.add_argument("--no-compile", action="store_true", help="leave the compiled peers out")
    found.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--threads", type=measure.positive(int), default=torch.get_num_threads())
    found.add_argument("--seconds", type=measure.positive(float), default=seconds, help="for each contestant of a row")
    found.add_argument("--clock", choices=list(CLOCKS), default="wall", help="process: with one thread, if others work")
    found.add_argument("--json", type=Path)
    found.add_argument("--markdown", type=Path)
    found.add_argument("--compare", type=Path, metavar="OLD", help="a JSON file of an earlier run")
    return found


def wanted(options: argparse.Namespace) -> list[str]:
    names = providers(not options.no_compile)
    return [name for name in names if name in measure.OURS or not options.peers or name in options.peers]


def fastest(rows: Iterable[Row]) -> Row | None:
    return min((row for row in rows if row.median_us and row.checked), key=lambda row: row.median_us or 0, default=None)


def ratios(rows: Sequence[Row], plan: str) -> tuple[float | None, float | None]:
    """How many times as fast ours is as the faster of a plan's eager and compiled versions; our share of its memory."""
    ours = fastest(row for row in rows if row.provider in measure.OURS)
    best = fastest(row for row in rows if row.provider.startswith(f"plain {plan}"))
    if ours is None or best is None:
        return None, None
    memory = ours.peak_mib / best.peak_mib if ours.peak_mib and best.peak_mib else None
    return (best.median_us or 0) / (ours.median_us or 1), memory


def milliseconds(row: Row) -> str:
    return f"{row.provider.removeprefix('plain ')} {(row.median_us or 0) / 1000:,.3g}"


HEAD = "| task | dtype | sizes | ours, ms | x official | x cached | {share} |{memory} others, ms |\n" + "|---" * 7 + "|"


def table(rows: Iterable[Row], share: str, memory: bool) -> str:
    """One line for each task; bold where a plan of plain torch is faster than ours."""
    extra = " MiB | of official's | of cached's |" if memory else ""
    lines = [HEAD.format(share=share, memory=extra) + "---|" * (4 if memory else 1)]
    reasons = set()
    for group in measure.groups(rows).values():
        first = fastest(row for row in group if row.provider in measure.OURS) or group[0]
        found = [ratios(group, plan) for plan in PLANS]
        cells = [first.op, first.dtype, first.shape]
        cells += [milliseconds(first).removeprefix("native ") if first.median_us else "-"]
        cells += [f"{speed:.2f}" if speed else "-" for speed, _ in found]
        cells += [f"{100 * first.limit_share:.0f} %" if first.limit_share else "-"]
        if memory:
            cells += [f"{first.peak_mib:,.0f}" if first.peak_mib else "-"]
            cells += [f"{part:.2f}" if part else "-" for _, part in found]
        cells += [", ".join(milliseconds(row) for row in group if row is not first and row.median_us)]
        if any(speed is not None and speed < 1 for speed, _ in found):
            cells = [f"**{cell}**" if cell else "" for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
        reasons |= {(row.provider, row.op, row.reason) for row in group if row.reason}
    return "\n".join([*lines, "", *(f"- {provider}, {op}: {reason}" for provider, op, reason in sorted(reasons))])


def report(script: str, found: list[Row], options: argparse.Namespace, share: str, memory: bool) -> None:
    head = f"`python benchmarks/{script}`, {measure.machine(options.device)}, {options.clock} clock"
    text = f"{head}\n\n{table(found, share, memory)}"
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n")
    if options.json:
        measure.write(options.json, found)
    if options.compare:
        worse = measure.slower(measure.read(options.compare), found)
        print("\n".join(["", f"{len(worse)} rows slower than in {options.compare}:", *worse]))
