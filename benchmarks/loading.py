"""How fast samples come from shards, and how long a training step waits for them.

    python benchmarks/loading.py [--threads 0 1 2] [--seconds 3] [--sides 32 384 512 1024] [--batch 16]

Pictures are JPEG of quality 90 with about the detail of photographs; what is prepared of each is what generation needs:
decoded, its middle square as the CLIP tower sees it (32 pixels for pictures of 32, else 448), its caption. Files are in
memory. "alone": samples a second without a consumer. "waits": the share of its time that a consumer waits whose step on
a batch takes as long as one thread needs for it (asleep), with the next batch made ahead as in training. "stored": the
same samples with the released models' features from a file instead of pictures. Processor time is of all threads.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from blip3o.data.features import FeatureKey, Features, features_path, write_features
from blip3o.data.loading import Loader
from blip3o.data.shard_files import write_shards
from blip3o.data.shards import Sample, Shards
from blip3o.processor import square
from blip3o.train.batch import ahead

COUNT = 64  # pictures of each size; they come again
CAPTION = "a photograph of a small house by a lake, with two boats in front of it and mountains behind " * 4


def photographs(side: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    draw = np.random.default_rng(side)
    for i in range(COUNT):
        coarse = Image.fromarray(draw.integers(0, 256, (max(2, side // 32), max(2, side // 32), 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.int16)
        grain = draw.normal(0, 6, (side, side, 1)).astype(np.int16)
        file = io.BytesIO()
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        yield f"{i:04}", {"jpg": file.getvalue(), "txt": CAPTION.encode()}


class Prepare:
    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, sample: Sample) -> torch.Tensor:
        if sample.features is not None:
            return sample.features
        assert sample.picture is not None
        return square(sample.picture, self.side, "center")


def rate(source: Shards, side: int, threads: int, seconds: float, batch: int) -> tuple[float, float]:
    """Samples a second, and seconds of processor time for each."""
    with Loader([source], prepare=Prepare(side), seed=0, threads=threads) as loader:
        loader.samples(range(batch))
        began, used, step = time.perf_counter(), time.process_time(), 1
        while time.perf_counter() - began < seconds:
            loader.samples(range(step * batch, (step + 1) * batch))
            step += 1
        done = (step - 1) * batch
        return done / (time.perf_counter() - began), (time.process_time() - used) / done


def waiting(source: Shards, side: int, threads: int, seconds: float, batch: int, pause: float) -> float:
    """Share of its time that a consumer waits whose step takes `pause` seconds."""
    steps = max(4, int(seconds / pause))
    with Loader([source], prepare=Prepare(side), seed=0, threads=threads) as loader:
        with ahead(lambda step: loader.samples(range(step * batch, (step + 1) * batch)), range(steps)) as batches:
            began = time.perf_counter()
            for step, _ in batches:
                if not step:  # the first one has nothing to overlap with
                    began, batches.waiting = time.perf_counter(), 0.0
                time.sleep(pause)
            return batches.waiting / (time.perf_counter() - began)


def with_features(folder: Path) -> Shards:
    source = Shards(folder)
    key = FeatureKey("benchmark", "benchmark", (64, 1792), "bfloat16")
    features = []
    for index in source.indices:
        path = features_path(folder, index, key)
        write_features(path, index, key, ((torch.randn(64, 1792), 0) for _ in range(len(index))))
        features.append(Features(path, index, key))
    source.features = features
    return source


def measure(sides: Sequence[int], threads: Sequence[int], seconds: float, batch: int) -> Iterator[str]:
    yield "| pictures | bytes each | threads | alone, samples/s | processor ms each | step of a batch ms | waits |"
    yield "|---|---|---|---|---|---|---|"
    with tempfile.TemporaryDirectory() as name:
        for side in sides:
            folder = Path(name) / str(side)
            write_shards(folder, photographs(side), COUNT)
            size = sum(path.stat().st_size for path in folder.glob("*.tar")) // COUNT
            target = 32 if side <= 32 else 448
            source = Shards(folder)
            alone, _ = rate(source, target, 0, seconds, batch)
            for count in threads:
                found, used = rate(source, target, count, seconds, batch)
                share = waiting(source, target, count, seconds, batch, batch / alone)
                step = 1e3 * batch / alone
                columns = (
                    f"{side} x {side}",
                    size,
                    count,
                    f"{found:.0f}",
                    f"{1e3 * used:.2f}",
                    f"{step:.0f}",
                    f"{share:.1%}",
                )
                yield "| " + " | ".join(map(str, columns)) + " |"
        stored = with_features(Path(name) / str(sides[-1]))
        for count in threads:
            found, used = rate(stored, 448, count, seconds, batch)
            yield f"| stored 64 x 1792 bfloat16 | {64 * 1792 * 2} | {count} | {found:.0f} | {1e3 * used:.2f} | | |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sides", nargs="+", type=int, default=[32, 384, 512, 1024])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    for line in measure(options.sides, options.threads, options.seconds, options.batch):
        print(line, flush=True)


if __name__ == "__main__":
    main()
