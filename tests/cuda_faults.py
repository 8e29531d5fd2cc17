"""Faults for tests/cuda_on_host.py: the CUDA sources made wrong, one place at a time.

What is replaced by what, as regular expressions over the sources. BEYOND and SHORT stand for `+ 1` and `- 1` if the
fault is on, and NUMBER for its number, which `host::fault()` gives if it is.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from rebuilt import ROOT

from blip3o_kernels import native

Patterns = tuple[tuple[str, str], ...]
FAULTS: dict[str, Patterns] = {
    "memory": (
        # Loops over elements, and threads that have none, one step too far.
        (r"; (\w+) < ([^;]+); (?=\1 \+= (?:\w*THREADS|WARP|KEYS|lanes)|\+\+\1\) group)", r"; \1 < \2 BEYOND; "),
        (
            r"(?<=[ (])(i|row|token|column|lane|block) < ((?:a\.)?(?:last|width|items|blocks))(?=[;,)])",
            r"\1 < \2 BEYOND",
        ),
        # (A block of attention whose rows begin where they end computes nothing: that it leaves at once is for speed.)
        (r"(?<![\w.])((?!at\.first)[\w.]+) >= ([\w.]+)\) (return|spread\.items = 0);", r"\1 >= \2 BEYOND) \3;"),
        (r"(?<=\()(\w+) (<|>=) vocab(?=\))", r"\1 \2 vocab BEYOND"),
        (r"(?<=&& )left >= N(?=\))", "left BEYOND >= N"),
        (r"(?<=[ (])row < (rows) && ", r"row < \1 BEYOND && "),
        # Elements that nobody reads or writes.
        (r"step < steps;", "step < steps SHORT;"),
        (r"row >= count \|\| ", "row >= count SHORT || "),
        (r"(?<=column) < (a\.value_dim)\) ", r" < \1 SHORT) "),
        (r"(?<=\+ its) < (at\.rows)\)", r" < \1 SHORT)"),
    ),
    "races": (
        (r"(?<=\s)(__sync(?:threads|warp)\(\);)", r"if (host::fault() != NUMBER) \1"),
        (r"(?<=\s)(cp_async_(?:commit|wait)(?:<\d>)?\(\);)", r"if (host::fault() != NUMBER) \1"),
    ),
}


def with_faults(folder: Path, faults: Patterns, files: str) -> tuple[Path, list[str]]:
    """A copy of csrc whose faults can be switched on, in files of such names, and where each of them is; 0: none."""
    source, places = folder / "csrc", [""]
    shutil.copytree(ROOT / "csrc", source)
    for file in sorted(file for file in source.glob("cuda/*.cu*") if re.search(files, file.name)):
        text = file.read_text()
        for pattern, replacement in faults:
            for match in reversed(list(re.finditer(pattern, text))):
                fault = match.expand(replacement).replace("BEYOND", "+ (host::fault() == NUMBER)")
                fault = fault.replace("SHORT", "- (host::fault() == NUMBER)").replace("NUMBER", str(len(places)))
                line = text.count("\n", 0, match.start()) + 1
                places.append(f"{file.name}:{line}: {text.splitlines()[line - 1].strip()}")
                text = text[: match.start()] + fault + text[match.end() :]
        file.write_text(text)
    return source, places


def some(numbers: list[int], count: int) -> list[int]:
    """So many of them, evenly spread; of a negative count, all."""
    if count < 0 or count >= len(numbers):
        return numbers
    return [numbers[i * len(numbers) // count] for i in range(count)]


def inclusions(file: Path) -> set[str]:
    """The names of a source of csrc/cuda and of the files there that it includes, and those, ..."""
    found = {file.name}
    for name in re.findall(r'^#include "(\w+\.cuh)"', file.read_text(), re.MULTILINE):
        found |= inclusions(file.parent / name)
    return found


def ops_at(place: str) -> list[str]:
    """The ops whose code holds that place, those that its line names first: a fault is mostly noticed there."""
    sources = [file for file in (ROOT / "csrc/cuda").glob("*.cu") if file.stem in native.ON_CUDA]
    found = [file.stem for file in sources if place.partition(":")[0] in inclusions(file)]
    return sorted(found, key=lambda op: (op not in place, op))
