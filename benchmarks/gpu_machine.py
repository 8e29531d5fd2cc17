"""What this machine's GPU is, how it is set, and what it reaches: a copy, and matrix products of each dtype.

python benchmarks/gpu_machine.py --json F
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import limits
import torch

FIELDS = (
    "name", "driver_version", "compute_cap", "memory.total", "power.limit", "clocks.max.sm", "clocks.max.memory",
    "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "ecc.mode.current", "mig.mode.current",
)  # fmt: skip
PACKAGES = ("torch", "triton", "numpy", "liger_kernel", "flash_attn", "transformers", "diffusers")


def reading() -> dict[str, str]:
    """What nvidia-smi says of the first GPU; without that program nothing."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    command = [program, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader", "--id=0"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    values = [value.strip() for value in run.stdout.strip().split(",")]
    return dict(zip(FIELDS, values, strict=True)) if len(values) == len(FIELDS) else {"nvidia-smi": run.stdout.strip()}


def packages() -> dict[str, str]:
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each limit")
    options = parser.parse_args()
    found: dict[str, object] = {"versions": packages(), "idle": reading()}
    if options.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": properties.name, "capability": list(torch.cuda.get_device_capability(0)),
            "multiprocessors": properties.multi_processor_count, "memory": properties.total_memory,
            "l2": properties.L2_cache_size, "cudnn": torch.backends.cudnn.version(),
        }  # fmt: skip
    rows = limits.rows(options.device, [torch.bfloat16, torch.float16, torch.float32], options.seconds)
    found |= {"limits": [asdict(row) for row in rows], "busy": reading()}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    print(limits.sentence(rows))


if __name__ == "__main__":
    main()
