"""The networks at work, beside the same networks in plain torch: prefill, decode, a step of the diffusion transformer,
an answer in text, a picture from a prompt.

    python benchmarks/model.py [--presets nano 4b] [--dtype float32 ...] [--tasks prefill ...] [--peers NAME ...]
                               [--no-compile] [--device cuda] [--json F] [--markdown F] [--compare OLD]

nano as it is; 4b with two blocks in each network and its whole vocabulary, on a GPU with longer texts. `plans.py` says
what the plans are. Every result is checked against plain torch in eager mode before anything is timed, and the
contestants take turns. The limit is the time in which the machine can do the products, or read the weights, that the
cheaper plan cannot do without.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

import end_to_end
import limits
import measure
import torch
from end_to_end import DTYPES
from measure import Row, Work, progress
from plain import Plain
from plans import Cached, Native, Official, Picture, size
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from blip3o.model import Blip3o

TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 8e-2}
WINDOW = 20e-3  # seconds of one call after the other: a token finds in the caches what the last one left there
TASKS = ("prefill", "decode", "dit step", "text", "picture")


@dataclass(frozen=True)
class Sizes:
    """prompt: tokens that are read. answer: tokens that are said. caption: tokens of what is to be drawn. steps: of the
    sampler; 4b takes 8 of the released 30, to keep the run short. That favours our plan: what is done once is more of
    the whole."""

    prompt: int
    answer: int
    caption: int
    steps: int


SIZES = {
    ("cpu", "nano"): Sizes(prompt=24, answer=16, caption=16, steps=40),
    ("cpu", "4b"): Sizes(96, 8, 32, 8),
    ("cuda", "nano"): Sizes(24, 16, 16, 40),
    ("cuda", "4b"): Sizes(2048, 16, 64, 30),
}


class Contest:
    """One model and all that is done with it."""

    def __init__(self, preset: str, dtype: torch.dtype, device: str = "cpu") -> None:
        self.preset, self.dtype, self.device, self.sizes = preset, dtype, device, SIZES[device, preset]
        model, network = end_to_end.build(preset, dtype, device)
        self.model: Blip3o = model.requires_grad_(False)
        self.network: Plain = network.requires_grad_(False)
        self.compiled = self._compiled()
        config, draw = self.model.config, torch.Generator().manual_seed(1)
        self.ids = torch.randint(8, 100, (1, self.sizes.prompt), generator=draw).to(device)
        self.caption = torch.randint(8, 100, (1, self.sizes.caption), generator=draw).to(device)
        self.token = torch.randint(8, 100, (1, 1), generator=draw).to(device)
        self.hidden = torch.randn(1, config.num_queries, config.llm.width, generator=draw).to(device, dtype)
        noise = torch.randn(1, config.feature_grid**2, config.clip.width, generator=draw).to(device, dtype)
        side = config.decoder.image_size if config.decoder else 0
        pixels = torch.randn(1, 3, side, side, generator=draw).to(device, dtype) if side else None
        self.picture = Picture(noise, pixels, self.sizes.steps)

    def _compiled(self) -> Blip3o:
        """Our model on the same weights under torch.compile, the language model as Pipeline.compile does it."""
        with torch.device("meta"):
            model = Blip3o(self.model.config)
        model.load_state_dict(self.model.state_dict(), assign=True)
        model.requires_grad_(False)
        for network in (model.llm, model.dit, model.decoder):
            if network is not None:
                network.compile(dynamic=True if network is model.llm else None)  # a text grows, a picture does not
        return model

    def contestant(self, provider: str) -> Native | Official:
        if provider in measure.OURS:
            return Native(self.compiled if "compile" in provider else self.model)
        plan = Cached if "cached" in provider else Official
        return plan(self.network, compiled="compile" in provider)

    def call(self, task: str, who: Native | Official) -> Callable[[], Tensor]:
        if task == "prefill":
            return lambda: who.prefill(self.ids)
        if task == "decode":
            return who.decode(self.ids, self.token)
        if task == "dit step":
            return who.denoise(self.hidden, self.picture.features)
        if task == "text":
            mask = torch.ones_like(self.ids, dtype=torch.bool)
            return lambda: who.answer(self.ids, mask, self.sizes.answer)
        mask = torch.ones_like(self.caption, dtype=torch.bool)
        return lambda: who.draw(self.caption, mask, self.picture)

    def shape(self, task: str) -> str:
        sizes, grid = self.sizes, self.model.config.feature_grid
        return (
            f"{self.preset} "
            + {
                "prefill": f"{sizes.prompt} tokens",
                "decode": f"1 token after {sizes.prompt}",
                "dit step": f"{grid * grid} features, guided",
                "text": f"{sizes.answer} tokens after {sizes.prompt}",
                "picture": f"{sizes.steps} steps after {sizes.caption} tokens",
            }[task]
        )

    def head(self, task: str) -> Row:
        return Row(task, "", self.device, str(self.dtype).removeprefix("torch."), self.shape(task), "forward")

    def work(self, task: str) -> Work:
        """What the cheaper plan cannot do without: its products, and each weight read once for each pass."""
        call = self.call(task, self.contestant("plain cached"))
        with FlopCounterMode(display=False) as counter:
            call()
        flops, model = counter.get_total_flops(), self.model
        reading = size(model.llm.blocks.parameters()) + model.llm.output_weight.nbytes
        drawing, decoding = size(model.dit.parameters()), size(model.decoder.parameters()) if model.decoder else 0
        passes = {"prefill": (1, 0, 0), "decode": (1, 0, 0), "dit step": (0, 1, 0), "text": (self.sizes.answer, 0, 0)}
        llm, dit, decoder = passes.get(task, (1, self.sizes.steps, 4))
        return Work(bytes=llm * reading + dit * drawing + decoder * decoding, flops=flops)


def measure_task(contest: Contest, task: str, options: argparse.Namespace) -> list[Row]:
    dtype, device, head = contest.dtype, contest.device, contest.head(task)
    official = contest.contestant("plain official")
    # In bfloat16 two equal words may swap places, and then the answers part: what chooses the first word is compared.
    by_logits = task == "text" and dtype != torch.float32
    expected = [official.prefill(contest.ids) if by_logits else contest.call(task, official)()]
    found: dict[str, Row] = {}
    calls: dict[str, Callable[[int], object]] = {}
    for provider in [*end_to_end.wanted(options), *([] if options.no_compile else ["native compile"])]:
        who = contest.contestant(provider)
        call = contest.call(task, who)

        def results(who: Native | Official = who, call: Callable[[], Tensor] = call) -> list[Tensor]:
            return [who.prefill(contest.ids) if by_logits else call()]

        row = end_to_end.checked(replace(head, provider=provider), results, expected, TOLERANCES[dtype])
        found[provider] = row
        if row.checked:
            calls[provider] = lambda _, call=call: call()  # type: ignore[misc]
    work = contest.work(task)
    yardsticks = limits.contestants(work, device, dtype)
    times = measure.take_turns(
        {**calls, **yardsticks}, device, options.seconds, least=3, clock=end_to_end.CLOCKS[options.clock], window=WINDOW
    )
    limit = limits.seconds(work, {name: times[name] for name in yardsticks}, device, dtype)
    for name in calls:
        found[name] = measure.measured(found[name], times[name], work, limit)
    return measure.compared(found.values())


def main() -> None:
    parser = end_to_end.parser("The networks at work, beside plain torch.", seconds=0.5)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch._dynamo.config.recompile_limit = 64  # as in Pipeline.compile, both, for all contestants
    torch._dynamo.config.specialize_float = True
    found: list[Row] = []
    with torch.inference_mode():
        for preset in options.presets:
            for dtype in options.dtype:
                contest = Contest(preset, DTYPES[dtype], options.device)
                operations = end_to_end.reading(contest.model, contest.sizes.prompt)
                if reason := limits.too_slow(operations, options.device, contest.dtype):
                    found += [replace(contest.head(task), provider="native", reason=reason) for task in options.tasks]
                    continue
                for task in options.tasks:
                    torch._dynamo.reset()
                    found += measure_task(contest, task, options)
                    progress(measure.line([row for row in found if row.key == found[-1].key]))
                    if options.json:
                        measure.write(options.json, found)
    end_to_end.report("model.py", found, options, "of the limit", memory=False)


if __name__ == "__main__":
    main()
