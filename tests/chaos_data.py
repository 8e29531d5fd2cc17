"""Shards in which every twentieth sample is corrupt, in every way there is, read as training reads them."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from chaos_process import Say, in_child
from chaos_run import status_mb
from chaos_table import Line
from PIL import Image
from test_shards import KINDS, Sick, overwrite

from blip3o.data.loading import Loader
from blip3o.data.scene_shards import scene_samples
from blip3o.data.shard_files import write_shards
from blip3o.data.shard_index import make_index
from blip3o.data.shards import Sample, Shards
from blip3o.data.tar import Fault

PER_SHARD = 200
EVERY = 20  # one sample in so many is corrupt: 5 %
EPOCHS = 2
BATCH = 32
CACHE = "indices"  # folder within the shards'
RAN = "ran"  # a folder that the pickles among the shards would make, were they read
PICKLE = b"cos\nmkdir\n(S'%s'\ntR."
MOST = 64.0  # MB that reading may add: above what is decoded ahead, far below what the shards' lies ask for
# What a process does that runs code, or that writes: names of audit events.
RUNS = (
    "exec", "import", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "ctypes.dlopen",
    "pickle.find_class",
)  # fmt: skip
WRITES = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.symlink", "os.link", "os.chmod", "os.truncate")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def sicken(folder: Path, count: int, seed: int) -> dict[int, str]:
    """Make one sample in EVERY of a folder's shards ill, each illness in turn: their numbers and the faults' kinds."""
    choices = random.Random(seed)
    kinds = list(KINDS.items())
    choices.shuffle(kinds)
    ill: dict[int, str] = {}
    for number, start in enumerate(range(0, count - EVERY + 1, EVERY)):
        # The first of a shard gives others their names; next to the last of one a cut would reach into its end.
        i = start + choices.randrange(1, EVERY - 1)
        make_ill, kind = kinds[number % len(kinds)]
        sick = Sick(folder / f"{i // PER_SHARD:05}.tar", i % PER_SHARD)
        make_ill(sick)
        if make_ill is Sick.pickle:
            overwrite(sick.shard, sick.json, PICKLE % os.fsencode(folder / RAN))
        ill[i] = kind
    return ill


def watch(allowed: Path, act: Callable[[str], None]) -> None:
    """From now on until the process ends, tell what it runs, and what it writes outside `allowed`."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in RUNS:
            act(f"{event} {arguments[:2]!r}")
        writes = event in WRITES or (event == "open" and arguments[2] & WRITING)
        if writes and allowed not in Path(str(arguments[0])).parents and Path(str(arguments[0])) != allowed:
            act(f"{event} {arguments[0]!r}")

    sys.addaudithook(hook)


def read_all(folder: Path, seed: int, epochs: int, say: Say) -> None:
    """Read some epochs as training does; says keys, faults, memory, and what was run or written."""
    Image.init()  # loads plugins, which would be seen as code that is run
    told: list[str] = []
    before = status_mb("VmRSS")
    watch(folder / CACHE, told.append)

    def report(fault: Fault) -> None:
        say(f"fault\t{fault.kind}\t{fault.shard.name}\t{fault.offset}\t{fault.name}")

    def key_of(sample: Sample) -> str:
        return sample.key

    with Shards(folder, cache=folder / CACHE) as source:
        with Loader([source], seed=seed, threads=2, prepare=key_of, max_faults=0.2, report=report) as loader:
            for start in range(0, epochs * len(source), BATCH):
                for key in loader.samples(range(start, min(start + BATCH, epochs * len(source)))):
                    say(f"key\t{key}")
    say(f"memory\t{status_mb('VmHWM') - before}")
    for line in dict.fromkeys(told):
        say(f"told\t{line}")


def sample_at(folder: Path, shard: str, offset: int) -> int:
    """Which sample of the good shards lies at an offset of the shard of that name."""
    index = make_index(folder / shard)
    return int(shard[:5]) * PER_SHARD + int((index.rows["header"] <= offset).sum()) - 1


def measure(times: int, seed: int, folder: Path) -> list[Line]:
    """times: samples, one in EVERY of them corrupt."""
    named = Line("a corrupt sample is named, with its shard, and nothing else is")
    order = Line("every other position holds what it held")
    replaced = Line("in a corrupt one's place stands a good sample")
    outside = Line("nothing is written outside the cache")
    code = Line("no code is run")
    memory = Line(f"memory stays within {MOST:.0f} MB")
    for name in ("good", "ill"):
        write_shards(folder / name, scene_samples(seed, times), PER_SHARD)
    ill = sicken(folder / "ill", times, seed)
    said = {}
    for name in ("good", "ill"):
        work = partial(read_all, folder / name, seed, EPOCHS)
        said[name] = [line.split("\t") for line in in_child(work, folder / "read.err")]
    keys = {name: [words[1] for words in said[name] if words[0] == "key"] for name in said}
    told = [words[1:] for words in said["ill"] if words[0] == "fault"]
    blamed = {sample_at(folder / "good", shard, int(offset)) for _, shard, offset, _ in told}
    for i in ill:
        named.hold(i in blamed, f"sample {i}, {ill[i]}, is not named")
    named.hold(blamed <= set(ill), f"samples {sorted(blamed - set(ill))} are named")
    sick = {f"{i:08}" for i in ill}
    for before, now in zip(keys["good"], keys["ill"], strict=True):
        if before in sick:
            replaced.hold(now not in sick, f"{now} in the place of {before}")
        else:
            order.hold(now == before, f"{now} in the place of {before}")
    acts = [words[1] for words in said["ill"] if words[0] == "told"]
    strange = {path.name for path in (folder / "ill").iterdir()} - {path.name for path in (folder / "good").iterdir()}
    outside.hold(not strange, f"{sorted(strange)} is new")
    outside.hold(not [line for line in acts if line.split(" ")[0] not in RUNS], "; ".join(acts))
    code.hold(not [line for line in acts if line.split(" ")[0] in RUNS], "; ".join(acts))
    growth = float(next(words[1] for words in said["ill"] if words[0] == "memory"))
    memory.hold(growth < MOST, f"{growth:.1f} MB")
    memory.note = f"{growth:.1f} MB"
    named.note = f"{len(told)} faults told for {len(ill)} corrupt samples of {times:,}, {len(KINDS)} ways"
    return [named, order, replaced, outside, code, memory]
