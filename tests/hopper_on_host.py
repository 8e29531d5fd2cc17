"""The attention kernels for sm_90a on the host, as tests/cuda_on_host.py has the others, but called directly: at sizes
from one query on, with results in memory that holds NaN.

    python tests/hopper_on_host.py memory|races [--faults] [--seed N]

The faults here are those that asynchronous code invites: a wait, a fence or a barrier left out, the wrong phase, a
stage not given back, an index one too far, an element not written.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cuda_faults import Patterns, some, with_faults
from cuda_on_host import ROOT, SANITIZERS, build, environment_of, located

SOURCES = ("attention_hopper*.cu", "hopper.cu", "library.cu")
OFF = "if (host::fault() != NUMBER) "
ONE = "(host::fault() == NUMBER)"
FAULTS: dict[str, Patterns] = {
    "memory": (
        (r"\b(column (?:<|>=) \w+\[which\])", rf"\1 + {ONE}"),
        (r"(key >= query \+ queries - 1 \+ behind)", rf"\1 - {ONE}"),
        (r"(key \+ count <= limit\(query\))", rf"\1 + {ONE}"),
        (r"\b((?:query|row)(?: \+ 8)? < (?:a\.tokens|count))(?=[,}])", rf"\1 + {ONE}"),
        (r"if \(there\)", "if (there && (host::fault() != NUMBER || threadIdx.x % 128 != 5))"),
        (r"step < steps;", rf"step < steps - {ONE};"),
        (r"(?<=\s)(\w+\[k\] \*= kept\[[^;]+;)", rf"{OFF}\1"),
    ),
    "races": (
        (r"(?<=\s)(wait\([^;]+, )([^;,]+)\);", rf"\1(\2) ^ {ONE});"),
        (r"(?<=\s)((?:wait|release|expect)\([^;]+\);)", rf"{OFF}\1"),
        (r"(?<=\s)((?:wait_products<\d>|fence_products|fence_barriers|__sync(?:threads|warp))\(\);)", rf"{OFF}\1"),
        (r"(?<=\s)(\w+\.next\(\);)", rf"{OFF}\1"),
    ),
}
ENTRY = """#include "{source}/cuda/attention_hopper.cuh"
#define FUNCTION extern "C" __attribute__((visibility("default"))) int
FUNCTION forward(const blip3o_attention_arguments* a) {{ return blip3o::attention_hopper(*a); }}
FUNCTION fits(const blip3o_attention_arguments* a) {{ return blip3o::fits_hopper(*a); }}
FUNCTION backward(const blip3o_attention_backward_arguments* a) {{ return blip3o::attention_hopper(*a); }}
FUNCTION fits_backward(const blip3o_attention_backward_arguments* a) {{ return blip3o::fits_hopper(*a); }}
"""
# Batch, heads, groups, queries, keys, options.
CASES = [
    (1, 1, 1, 1, 1, {}),
    (1, 2, 1, 3, 5, {"is_causal": True}),
    (1, 2, 2, 70, 255, {}),
    (2, 4, 2, 65, 130, {"is_causal": True}),
    (1, 2, 1, 300, 300, {"is_causal": True}),
    (2, 2, 1, 257, 401, {"scale": 0.3}),
    (1, 2, 2, 200, 77, {"is_causal": True}),
    (1, 2, 1, 260, 270, {"window_size": (72, -1)}),
    (1, 1, 1, 190, 170, {"window_size": (33, 50)}),
    (1, 1, 1, 200, 190, {"window_size": (16, -1), "is_causal": True}),
    (1, 2, 1, 100, 150, {"softcap": 5.0, "scale": -0.2}),
    (1, 1, 1, 130, 140, {"softcap": 20.0, "is_causal": True, "window_size": (100, 0)}),
]


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and arguments of attention."""
    import torch

    from blip3o_kernels.samples import Draw

    for dtype, head_dim, chosen in (
        *((torch.bfloat16, k, CASES) for k in (64, 128, 256)),
        *((torch.float16, k, CASES[3:5]) for k in (64, 128, 256)),
    ):
        draw = Draw(dtype, "cpu")
        for batch, heads, groups, tokens, keys, options in chosen:
            query = draw(batch, tokens, heads, head_dim, scale=4.0 if "window_size" in options else 1.0).transpose(1, 2)
            key, value = draw(2, batch, groups, keys + 3, head_dim)[:, :, :, :keys]  # as in a cache with room
            name = f"{dtype} K{head_dim} B{batch} H{heads}/{groups} T{tokens} S{keys} {options}"
            tensors = {"query": query, "key": key, "value": value}
            yield name, {**tensors, "enable_gqa": heads != groups, **options}


def computed(library: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """What the kernels make of it: the result, the scores' log-sum-exp, and gradients where a body has them."""
    import torch
    from conformance import upstreams

    from blip3o_kernels import native

    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    batch, heads, tokens, head_dim = query.shape
    groups, keys = key.shape[1:3]

    def unwritten(x: torch.Tensor) -> torch.Tensor:  # dense as [B, T, H, D]
        return torch.full_like(x.transpose(1, 2), torch.nan, memory_format=torch.contiguous_format).transpose(1, 2)

    def strides(*tensors: torch.Tensor) -> list[int]:
        return [stride for x in tensors for stride in x.stride()[:3]]

    def addresses(*tensors: torch.Tensor) -> list[int]:
        return [x.data_ptr() for x in tensors]

    y, log_sum = unwritten(query), torch.full((batch, heads, tokens), torch.nan)
    left, right = arguments.get("window_size") or (-1, -1)
    softcap, scale = arguments.get("softcap") or 0.0, arguments.get("scale") or head_dim**-0.5
    floats = 2 * batch * heads * ((tokens + 127) // 128 * 128)
    sizes = (batch, heads, groups, tokens, keys, head_dim, head_dim, 1, floats)
    ends = (left, 0 if arguments.get("is_causal") else right, softcap, scale, native.DTYPES[query.dtype], 0, 0, 0, 0)
    inputs = (query, key, value)
    packed = native.packer("attention")(
        *addresses(y, log_sum, *inputs), 0, 0, 0, 0, *sizes, *strides(y, *inputs), 0, 0, 0, tokens, 1, *ends
    )
    assert library.fits(packed) == (tokens >= 64 and (scale > 0 or softcap > 0))
    status = library.forward(packed)
    assert status == 0, f"status {status}"
    found = {"output 0": y, "log_sum": log_sum}
    if head_dim == 256 or softcap:
        return found
    dy = next(upstreams(found)).to(y).transpose(1, 2).contiguous().transpose(1, 2)
    gradients = [unwritten(x) for x in inputs]
    workspace = torch.full((floats,), torch.nan)
    packed = native.packer("attention_backward")(
        *addresses(*gradients, dy, y, log_sum, *inputs), 0, 0, 0, *addresses(workspace), *sizes,
        *strides(*gradients, dy, y, *inputs), 0, 0, 0, tokens, *ends,
    )  # fmt: skip
    assert library.fits_backward(packed) == (tokens >= 64)
    status = library.backward(packed)
    assert status == 0, f"status {status}"
    names = ("gradient of query", "gradient of key", "gradient of value")
    return {**found, **dict(zip(names, gradients, strict=True))}


def exact_log_sum(arguments: dict[str, Any]) -> Any:
    import torch

    from blip3o_kernels import masks

    query, key = arguments["query"].double(), arguments["key"].double()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scale, cap = arguments.get("scale") or query.shape[3] ** -0.5, arguments.get("softcap")
    scores = query @ key.mT * scale
    scores = (scores / cap).tanh() * cap if cap else scores
    left, right = arguments.get("window_size") or (-1, -1)
    window = (left, 0 if arguments.get("is_causal") else right)
    hidden = masks.hidden(query.shape[2], key.shape[2], window, None, None, query.device)
    return (scores if hidden is None else scores.masked_fill(hidden, -torch.inf)).logsumexp(-1)


def conform(library: Any, first: bool = False) -> list[str]:
    """What is wrong, or the first of it."""
    import torch
    from conformance import expectation, violations

    from blip3o_kernels import OPS

    torch.set_num_threads(1)
    (op,) = (op for op in OPS if op.name == "attention")
    broken, count = [], 0
    for name, arguments in cases():
        got = computed(library, arguments)
        log_sum = got.pop("log_sum")
        exact = exact_log_sum(arguments)
        found = []
        if not torch.allclose(log_sum.double(), exact, rtol=1e-6, atol=2e-6):
            found.append("log_sum is wrong")
        expected = expectation(op, "triton", arguments)  # the same algorithm: it rounds as this does
        found += violations(got, expected, any_size=arguments["query"].numel() < 4096)
        broken += [f"{name}: {found}"] if found else []
        if first and broken:
            return broken
        count += 1
    print(f"{count} samples", flush=True)
    return broken


def missed(library: ctypes.CDLL, places: list[str], numbers: list[int], check: Callable[..., list[str]]) -> list[str]:
    """The faults that nothing notices, each tried in a process of its own."""
    fault, found = ctypes.c_int.in_dll(library, "blip3o_host_fault"), []
    for number in numbers:
        child = os.fork()
        if child == 0:
            fault.value = number
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1), os.dup2(silent, 2)
            os._exit(bool(check(library, first=True)))
        if os.waitpid(child, 0)[1] == 0:
            found.append(places[number])
    return found


def inside(path: Path, places: list[str], count: int) -> int:
    library, start = ctypes.CDLL(str(path)), time.monotonic()
    for function in (library.fits, library.forward, library.fits_backward, library.backward):
        function.argtypes = [ctypes.c_char_p]
    wrong = conform(library)
    numbers = some(list(range(1, len(places))), count)
    wrong += [f"MISSED {place}" for place in missed(library, places, numbers, conform)]
    print(*wrong, sep="\n", end="\n" if wrong else "")
    print(f"{len(numbers)} faults, {len(wrong)} wrong or missed, in {time.monotonic() - start:.0f} s")
    return int(bool(wrong))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=list(SANITIZERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--faults", type=int, nargs="?", const=-1, default=0, metavar="N", help="all, or so many of them"
    )
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        return inside(options.inside, json.loads(options.inside.with_suffix(".json").read_text()), options.faults)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, places = ROOT / "csrc", [""]
        if options.faults:
            source, places = with_faults(folder, FAULTS[options.kind], "attention_hopper")
        entry = folder / "entry.cu"
        entry.write_text(ENTRY.format(source=source))
        library = build(folder, options.kind, [*(f for s in SOURCES for f in source.glob(f"cuda/{s}")), entry], source)
        library.with_suffix(".json").write_text(json.dumps(places))
        command = [sys.executable, __file__, options.kind, "--faults", str(options.faults), "--inside", str(library)]
        environment = environment_of(options.kind, options.seed)
        run = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
        sys.stderr.write(located(run.stderr, library))
        return run.returncode


if __name__ == "__main__":
    sys.exit(main())
