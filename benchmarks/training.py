"""One step of the optimiser in each stage, beside the same networks in plain torch: time, peak memory, MFU.

    python benchmarks/training.py [--presets nano 4b] [--dtype float32 ...] [--stages understanding ...]
                                  [--peers NAME ...] [--no-compile] [--device cuda] [--json F] [--markdown F]
                                  [--compare OLD]

A step is loss, gradients, clipping, AdamW. Batches are ready beforehand, for all alike. nano has its recipe's batches;
4b, cut to two blocks a network, what a CPU steps through in seconds, and on a GPU what fills it. "bfloat16" is autocast
over float32 weights. Loss and every gradient are checked against plain torch in eager mode, then the contestants take
turns on one set of weights and moments. Memory is counted at torch's allocator: weights, moments and features at hand,
and the most that a step adds to them. MFU: the products that the cheaper plan cannot do without, at the measured rate
of the machine's.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace

import end_to_end
import limits
import measure
import torch
from end_to_end import DTYPES
from measure import Row, Work, progress
from plans import IGNORE, Batch, Generation, Trainer, Understanding, cached_loss, native_loss, official_loss, size
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from blip3o.flow import draw_sigma
from blip3o.layers import keep_casts
from blip3o.train.recipe_files import load_recipe

STAGES = ("understanding", "generation")
# Of a gradient whose every number is a sum of many products; plain torch's two plans differ from each other as much.
TOLERANCES = {"float32": 2e-3, "bfloat16": 1e-1}
MIB = 2**20


@dataclass(frozen=True)
class Sizes:
    """rows, tokens: of the language model. asked: tokens of a row whose loss is taken. pictures: rows of generation's
    prompts; draws: noises for each. caption: tokens of a prompt."""

    rows: int
    tokens: int
    asked: int
    pictures: int
    draws: int
    caption: int


SIZES = {
    ("cpu", "nano"): Sizes(32, 64, 12, 64, 4, 16),
    ("cpu", "4b"): Sizes(1, 80, 10, 1, 1, 32),
    ("cuda", "nano"): Sizes(32, 64, 12, 64, 4, 16),
    ("cuda", "4b"): Sizes(8, 1024, 256, 16, 4, 64),
}


class Contest:
    def __init__(self, preset: str, stage: str, dtype: str, device: str = "cpu") -> None:
        self.preset, self.stage, self.dtype, self.device = preset, stage, dtype, device
        self.sizes = SIZES[device, preset]
        self.recipe = replace(
            load_recipe("nano").stages[stage], learning_rate=1e-6
        )  # the weights stay what was checked
        self.model, self.network = end_to_end.build(preset, torch.float32, device)
        trained = ("llm.", "image_projector.") if stage == "understanding" else ("dit.", "queries")
        self.model.requires_grad_(False)
        self.parameters = {name: x for name, x in self.model.named_parameters() if name.startswith(trained)}
        for x in self.parameters.values():
            x.requires_grad_()
        batch = self._batch()
        self.batch = type(batch)(*(x.to(device) for x in vars(batch).values()))

    def _batch(self) -> Batch:
        """Drawn on the CPU, so that it is the same on every device; the features are where the network is."""
        config, sizes, draw = self.model.config, self.sizes, torch.Generator().manual_seed(1)
        count, side = config.feature_grid**2, config.clip.image_size
        rows = sizes.rows if self.stage == "understanding" else sizes.pictures
        pictures = torch.randn(rows, 3, side, side, generator=draw)
        with torch.no_grad():
            features = self.network.features(pictures.to(self.device)).cpu()
        if self.stage == "understanding":
            ids = torch.randint(8, 100, (rows, sizes.tokens), generator=draw)
            ids[:, 1 : 1 + count] = config.image_token
            targets = torch.full_like(ids, IGNORE)
            targets[:, -sizes.asked :] = torch.randint(8, 100, (rows, sizes.asked), generator=draw)
            return Understanding(ids, targets, pictures, features)
        ids = torch.randint(8, 100, (rows, sizes.caption), generator=draw)
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[1::2, : sizes.caption // 4] = False  # padding comes first
        kept, pooled = (torch.rand(rows, generator=draw) >= share for share in (0.1, 0.5))
        features = features.repeat_interleave(sizes.draws, 0)
        noise = torch.randn(features.shape, generator=draw)
        sigma = draw_sigma(config.flow, len(features), draw)
        return Generation(ids, mask, kept, pooled, pictures, features, noise, sigma)

    @property
    def shape(self) -> str:
        sizes = self.sizes
        if self.stage == "understanding":
            return f"{self.preset} {sizes.rows} x {sizes.tokens} tokens, {sizes.rows * sizes.asked} asked"
        return f"{self.preset} {sizes.pictures} prompts x {sizes.draws}"

    def trainer(self, provider: str) -> Trainer:
        bfloat16 = self.dtype == "bfloat16"
        if provider == "native":
            return Trainer(
                lambda: native_loss(self.model, self.batch), self.parameters, self.recipe, bfloat16, True, True
            )
        loss = cached_loss if "cached" in provider else official_loss
        if "compile" in provider:
            loss = torch.compile(loss)
        fused = "cached" in provider
        return Trainer(lambda: loss(self.network, self.batch), self.parameters, self.recipe, bfloat16, False, fused)

    def at_hand(self, provider: str, optimizer: torch.optim.Optimizer, casts: Mapping[Tensor, Tensor]) -> int:
        """Bytes before and after every step: the weights this plan needs, the moments, what the batch holds; and the
        casts that ours keeps."""
        moments = (x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor))
        held = [x for x in vars(self.batch).values() if x is not self.batch.pictures or "official" in provider]
        needed: tuple[str, ...] = (
            ("llm.", "image_projector.") if self.stage == "understanding" else ("llm.", "dit.", "queries")
        )
        if "official" in provider:
            needed += ("clip.",)  # a tower that is not run need not be there
        weights = [x for name, x in self.network.named_parameters() if name.startswith(needed)]
        kept = casts.values() if provider == "native" else ()
        return size(weights) + size(moments) + size(held) + size(kept)


def measure_stage(contest: Contest, options: argparse.Namespace, casts: Mapping[Tensor, Tensor]) -> list[Row]:
    head = Row(contest.stage, "", contest.device, contest.dtype, contest.shape, "training")
    dtype = DTYPES[contest.dtype]
    operations = end_to_end.reading(contest.model, contest.batch.ids.numel())
    if reason := limits.too_slow(operations, contest.device, dtype):
        return [replace(head, provider="native", reason=reason)]
    expected = contest.trainer("plain official").gradients()
    optimizers = {fused: contest.trainer("plain cached" if fused else "plain official").optimizer() for fused in (0, 1)}
    optimizers[0].state = optimizers[1].state  # one set of moments for all: two would not fit beside 4b
    with FlopCounterMode(display=False) as counter:
        contest.trainer("plain cached").gradients()
    work = Work(flops=counter.get_total_flops())
    found: dict[str, Row] = {}
    calls: dict[str, measure.Call] = {}
    for provider in end_to_end.wanted(options):
        trainer = contest.trainer(provider)
        tolerance = TOLERANCES[contest.dtype]
        results = trainer.gradients if provider != "plain official" else lambda: expected
        row = end_to_end.checked(replace(head, provider=provider), results, expected, tolerance)
        found[provider] = row
        if row.checked:
            optimizer = optimizers[trainer.fused]
            calls[provider] = lambda _, trainer=trainer, optimizer=optimizer: trainer.step(optimizer)  # type: ignore[misc]
    expected.clear()
    calls["native"](0)  # which makes the moments
    for provider, call in calls.items():
        added = end_to_end.peak(lambda call=call: call(0), contest.device)  # type: ignore[misc]
        optimizer = optimizers["plain official" not in provider]
        found[provider] = replace(found[provider], peak_mib=(contest.at_hand(provider, optimizer, casts) + added) / MIB)
    yardsticks = limits.contestants(work, contest.device, dtype)
    del yardsticks[limits.COPY]
    times = measure.take_turns(
        {**calls, **yardsticks}, contest.device, options.seconds, least=3, clock=end_to_end.CLOCKS[options.clock]
    )
    rate = limits.product_flops(contest.device, dtype) / measure.interval(times[limits.PRODUCT])[0]
    for name in calls:
        found[name] = measure.measured(found[name], times[name], work, work.flops / rate)
    return measure.compared(found.values())


def main() -> None:
    parser = end_to_end.parser("One training step, beside plain torch.", seconds=1.0)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: list[Row] = []
    for preset in options.presets:
        for dtype in options.dtype:
            for stage in options.stages:
                torch._dynamo.reset()
                with keep_casts() as casts:
                    found += measure_stage(Contest(preset, stage, dtype, options.device), options, casts)
                progress(measure.line([row for row in found if row.key == found[-1].key]))
                if options.json:
                    measure.write(options.json, found)
    end_to_end.report("training.py", found, options, "MFU", memory=True)


if __name__ == "__main__":
    main()
