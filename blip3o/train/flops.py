"""MFU: the products that training needs, over those that the device could do in the same time.

    MFU = FLOPs of a step's forward and backward pass / (seconds of the step x peak FLOP/s)

FLOPs are counted once, on the run's first batch, by torch's counter; what checkpointing computes again is not counted.
Where batches differ in length, this is right on average only as far as the first one is like the others.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

# Dense FLOP/s of bfloat16 products, and of float32 ones (as TF32 where the chip has it), by the makers' data sheets.
GPUS = {
    "B200": (2250e12, 1100e12),
    "H200": (989e12, 494e12),
    "H100 PCIe": (756e12, 378e12),
    "H100": (989e12, 494e12),
    "A100": (312e12, 156e12),
    "L40S": (362e12, 183e12),
    "RTX 4090": (165e12, 82.6e12),
}
SIDE = 1024  # of the square matrices whose product is timed on a CPU
TIMES = 5


def step_flops(step: Callable[[], object]) -> int:
    """FLOPs of what `step` does; of compiled blocks, what they are compiled from."""
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Products a second: a GPU's by its name, a CPU's by the fastest of a few of 1024 x 1024 matrices.

    0, as for "not known", for a GPU that is not in the table.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known: Any = next((rates for part, rates in GPUS.items() if part in name), (0.0, 0.0))
        return float(known[0 if dtype == torch.bfloat16 else 1])
    a, b = (torch.ones(SIDE, SIDE, dtype=dtype) for _ in range(2))
    fastest = float("inf")
    for _ in range(TIMES):
        began = time.perf_counter()
        torch.mm(a, b)
        fastest = min(fastest, time.perf_counter() - began)
    return 2.0 * SIDE**3 / fastest
