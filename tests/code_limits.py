"""What GPU machine code needs and holds, and its limits: gpu_code.py holds Triton's to them, cuda_code.py CUDA's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

INSTRUCTIONS = {
    "cuda": {
        "load16": r"\bLDG\.\S*(?:128|256)",
        "store16": r"\bSTG\.\S*(?:128|256)",
        "matrix": r"\b(?:[HIQDO]MMA|[HIQ]GMMA|UTC\w*MMA)\b",
        "copy": r"\b(?:LDGSTS|UBLKCP|UTMALDG)\b",
    },
    "hip": {
        "load16": r"\b(?:global|buffer|flat)_load_(?:dwordx4|b128)",
        "store16": r"\b(?:global|buffer|flat)_store_(?:dwordx4|b128)",
        "matrix": r"\bv_(?:mfma|smfmac|wmma|swmmac)_",
        "copy": r"\b(?:buffer_load_\w+ .* lds$|global_load_lds_)",
    },
}
HOLDS = tuple(INSTRUCTIONS["cuda"])


@dataclass(frozen=True)
class Code:
    """What one piece of machine code needs and holds. failure: why there is none; everything else is then 0.

    registers: of a thread.  shared, stack: bytes.  spills: on NVIDIA the instructions that store or load a spilled
    register (nvcc reports their bytes), on AMD the spilled vector registers (scalar ones go into lanes of those, not to
    memory).  The others count instructions: loads and stores of 16 bytes, matrix products, copies from global to shared
    memory that pass no register.
    """

    registers: int = 0
    shared: int = 0
    stack: int = 0
    spills: int = 0
    threads: int = 0
    load16: int = 0
    store16: int = 0
    matrix: int = 0
    copy: int = 0
    failure: str = ""

    @property
    def holds(self) -> list[str]:
        """The instructions it has at least one of."""
        return [name for name in HOLDS if asdict(self)[name]]


def counted(backend: str, text: str) -> dict[str, Any]:
    """How often each of INSTRUCTIONS stands in disassembled code."""
    return {name: len(re.findall(what, text, re.MULTILINE)) for name, what in INSTRUCTIONS[backend].items()}


def worst(one: Code, other: Code) -> Code:
    """The most that either needs, and the fewest instructions of a kind that either holds."""
    first, second = asdict(one), asdict(other)
    return Code(**{name: (min if name in HOLDS else max)(first[name], second[name]) for name in first})


def in_eights(registers: int) -> int:
    """As GPUs hand registers out, and as limits are written."""
    return -(-registers // 8) * 8


def objections(key: str, code: Code, limit: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    """Where the code needs more than its limit, of `names`, or lost an instruction that it had; a line each."""
    wrong = [
        f"{key}: {name} {asdict(code)[name]}, limit {limit[name]}" for name in names if asdict(code)[name] > limit[name]
    ]
    lost = [name for name in limit["holds"] if name not in code.holds]
    return wrong + ([f"{key}: holds no {', '.join(lost)} any more"] if lost else [])


def written(compiler: str, version: str, lines: Mapping[str, object]) -> str:
    """A file of limits, made with that version of a compiler: JSON with a line for each piece of code, so that
    differences read well."""
    text = ",\n".join(f"  {json.dumps(key)}: {json.dumps(line)}" for key, line in lines.items())
    return f'{{\n "{compiler}": {json.dumps(version)},\n "code": {{\n{text}\n }}\n}}\n'
