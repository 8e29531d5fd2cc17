"""The products of linear_cross_entropy, chunk by chunk, around the kernel of a body: logits are never whole in memory.

For every chunk of rows

    logits    = x weight^T
    dlogits   by the body's kernel, together with the rows' losses
    dx        = dlogits weight                    float32
    dweight  += dlogits^T x                       float32

The products are torch's. Without autocast they are exact to float32: of float32 operands or, with `split`, of bfloat16
operands into float32, where dlogits is the sum of two bfloat16 numbers, because one alone would cost a gradient as much
as its own rounding does. (float16 has no room for dlogits, so its operands become float32.) Under autocast x, weight,
dlogits and, on a CPU, the products' results are rounded to autocast's dtype, as those of a linear layer are.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .memory import empty

# Logits in a chunk: on a CPU 16 MiB of float32, on a GPU 512 MiB. But never fewer than MIN_ROWS rows: the products
# would take as long as reading the weight does.
LOGITS = {"cpu": 2**22, "cuda": 2**27}
MIN_ROWS = 256
SLICE = 2**14  # rows of dweight that a half-precision product holds beside dweight itself

WIDE_RESULTS = torch.version.hip is None  # whether a GPU's half-precision products may have float32 results

# kernel(logits, dlogits, start) writes the losses of rows start, start + 1, ... and, if it is not None, dlogits: it is
# logits itself, or [n, V], or [2 n, V] with the upper parts before the lower ones; its rows are a stride apart.
Kernel = Callable[[Tensor, Tensor | None, int], None]


def chunk_rows(rows: int, vocab: int, device: str) -> int:
    """Rows in a chunk, a multiple of 16: as few chunks as LOGITS and MIN_ROWS allow, all of about one size."""
    chunks = -(-rows // max(MIN_ROWS, LOGITS[device] // vocab))
    return max(16, -(-rows // (16 * max(chunks, 1))) * 16)


def check_target(target: Tensor, vocab: int, ignore_index: int) -> None:
    """IndexError for a target that is neither in [0, vocab) nor ignore_index."""
    outside = ((target < 0) | (target >= vocab)) & (target != ignore_index)
    if outside.any():
        wrong = target[outside][0].item()
        raise IndexError(f"target: expected values in [0, {vocab}) or ignore_index, {ignore_index}, got {wrong}")


def gradients(
    kernel: Kernel,
    x: Tensor,
    weight: Tensor,
    autocast: torch.dtype | None,
    want_x: bool,
    want_weight: bool,
    *,
    split: bool,
) -> tuple[Tensor, Tensor]:
    """dx [N, D] and dweight [V, D] in float32 for x [N, D] and weight [V, D]; empty where not wanted."""
    rows, vocab = x.shape[0], weight.shape[0]
    operand = autocast or (torch.bfloat16 if split and x.dtype is torch.bfloat16 else torch.float32)
    parts = 2 if autocast is None and operand is torch.bfloat16 else 1
    weight = weight.to(operand)
    dx = empty((rows, x.shape[1]) if want_x else (0,), torch.float32, x.device)
    dweight = empty(weight.shape if want_weight else (0,), torch.float32, x.device)
    if rows == 0:
        dweight.zero_()
    step = chunk_rows(rows, vocab, x.device.type)
    with _without_autocast(x.device.type, autocast):
        for start in range(0, rows, step):
            part = x[start : start + step].to(operand)
            logits = _product(part, weight.t(), autocast)
            if not want_x and not want_weight:
                kernel(logits, None, start)
                continue
            dlogits = logits
            if logits.dtype is not operand:  # its rows lie a multiple of 128 bytes apart, as a GPU's products like it
                dlogits = x.new_empty(parts * part.shape[0], -(-vocab // 64) * 64, dtype=operand)[:, :vocab]
            kernel(logits, dlogits, start)
            del logits
            if want_x:
                result = dx[start : start + step]
                if operand is torch.float32:
                    torch.mm(dlogits, weight, out=result)
                elif parts == 1:
                    result.copy_(_product(dlogits, weight, autocast))
                else:
                    torch.add(*_product(dlogits, weight, autocast).split(part.shape[0]), out=result)
            if want_weight and operand is torch.float32:
                dweight.addmm_(dlogits.t(), part, beta=0 if start == 0 else 1)
            elif want_weight:
                part = torch.cat([part] * parts) if parts > 1 else part
                for sums, columns in zip(dweight.split(SLICE), dlogits.split(SLICE, 1), strict=True):
                    product = _product(columns.t(), part, autocast)
                    sums.copy_(product) if start == 0 else sums.add_(product)
    return dx, dweight


def _without_autocast(device: str, autocast: torch.dtype | None) -> AbstractContextManager[object]:
    """The operands have their dtypes: an autocast that would change them, as around a compiled graph, is turned off."""
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is not autocast:
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _product(a: Tensor, b: Tensor, autocast: torch.dtype | None) -> Tensor:
    """a b: in float32, but in the operands' dtype under autocast where torch has no other."""
    if a.dtype is not torch.float32 and a.is_cuda and WIDE_RESULTS:
        return torch.mm(a, b, out_dtype=torch.float32)
    if autocast is None:
        a, b = a.to(torch.float32), b.to(torch.float32)
    return torch.mm(a, b)
