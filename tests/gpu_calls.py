"""Calls every op that has CUDA kernels, forward and backward, on its small samples: what compute-sanitizer looks at.

    python tests/gpu_calls.py [--device cuda] [--op rope ...] [--most 65536]
    python tests/gpu_calls.py --sanitize racecheck --json F

With --sanitize the calls run in a process of their own under that tool, what it reports of our kernels is counted, and
the status says whether there is any. Every tensor is then an allocation of its own, so that nothing lies behind its
last element. initcheck looks at torch's kernels too, since it has to see them write what ours read.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from conformance import bound, evaluate, tensors_of

from blip3o_kernels import OPS, native, use

DTYPES = (torch.bfloat16, torch.float32)
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
OURS = "blip3o"  # stands in the mangled name of each of our kernels: in its namespace, or its arguments' type
SHOWN, LINES = 5, 4  # reports that are kept, and of each


def known() -> list[str]:
    return [op.name for op in OPS if op.name in native.ON_CUDA]


def calls(ops: list[str], device: str, most: int) -> int:
    """Makes the calls on samples whose tensors have at most so many elements, prints each op, returns how many."""
    total = 0
    for op in OPS:
        count = 0
        for dtype in DTYPES if op.name in ops else ():
            for sample in op.samples(dtype, device):
                arguments = bound(op, sample)
                if max((x.numel() for x in tensors_of(arguments).values()), default=0) > most:
                    continue
                with use("native"):
                    found = evaluate(op, op.function, arguments)
                for name, x in found.items():
                    assert x.device.type == device, f"{op.name} {sample.name}: {name} is on {x.device}"
                if device == "cuda":
                    torch.cuda.synchronize()
                count += 1
        if op.name in ops:
            print(f"{op.name}: {count} calls", flush=True)
        total += count
    return total


def sanitizer() -> str | None:
    """compute-sanitizer, which comes with nvcc."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    beside = str(Path(nvcc).resolve().parent)
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=beside)


def reports(tool: str, text: str) -> list[str]:
    """What the tool said of our kernels: one or more lines each, without the bars in front of them."""
    found: list[list[str]] = []
    for line in text.splitlines():
        if not line.startswith("========="):
            continue
        line = line.removeprefix("=========")
        if re.match(r" (?! )(?!COMPUTE-SANITIZER|.*SUMMARY|No attachable|Target|Host)", line) and line.strip():
            found.append([line.strip()])
        elif found and line.startswith("     ") and len(found[-1]) < LINES and "Host Frame" not in line:
            found[-1].append(line.strip())
    blocks = ["\n".join(block) for block in found]
    return [block for block in blocks if OURS in block or tool != "initcheck"]


def sanitize(tool: str, options: argparse.Namespace) -> dict[str, object]:
    """Runs this file under the tool; what came of it. RuntimeError if they did not end well and nothing says why."""
    program = sanitizer()
    if program is None:
        raise RuntimeError("compute-sanitizer: expected it beside nvcc, found none")
    command = [program, "--tool", tool, "--target-processes", "all", "--print-limit", "1000"]
    command += [] if tool == "initcheck" else ["--kernel-name", f"kns={OURS}"]
    command += ["--report-api-errors", "no"] if tool == "memcheck" else []
    command += [sys.executable, __file__, "--most", str(options.most), "--op", *options.op]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True)
    assert run.stdout is not None
    lines = []
    for line in run.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    status, text = run.wait(), "".join(lines)
    found, made = reports(tool, text), sum(map(int, re.findall(r"^\w+: (\d+) calls$", text, re.MULTILINE)))
    if not found and (status or " calls in all" not in text or "SUMMARY: " not in text):
        raise RuntimeError(f"{tool} ended with status {status}: {text.strip().splitlines()[-1] if lines else 'silent'}")
    return {"tool": tool, "calls": made, "reports": len(found), "first": found[:SHOWN], "status": status}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--op", nargs="*", choices=known(), default=known(), metavar="OP")
    parser.add_argument("--most", type=int, default=65536, help="elements of a sample's largest tensor")
    parser.add_argument("--sanitize", choices=TOOLS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.sanitize is None:
        print(f"{calls(options.op, options.device, options.most)} calls in all")
        return
    try:
        found = sanitize(options.sanitize, options)
    except RuntimeError as error:
        sys.exit(str(error))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{found['reports']} reports by {options.sanitize}")
    sys.exit(bool(found["reports"]))


if __name__ == "__main__":
    main()
