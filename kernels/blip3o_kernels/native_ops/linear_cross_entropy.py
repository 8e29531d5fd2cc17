"""Calls csrc/cpu/linear_cross_entropy.cpp and csrc/cuda/linear_cross_entropy.cu between the products of logits.py, or
fused_cross_entropy.h, which has them too; the contract is ops/linear_cross_entropy.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import logits, native
from ..dispatch import INSTRUCTION_SETS, instruction_set
from ..memory import empty
from ..native import DTYPES

_PACK, _CPU = native.packer("linear_cross_entropy"), native.function("cpu", "linear_cross_entropy")
_CUDA = native.cuda_call("linear_cross_entropy")
_PACK_FUSED = native.packer("linear_cross_entropy_fused")
_CPU_FUSED = native.function("cpu", "linear_cross_entropy_fused")
_BEST = INSTRUCTION_SETS[native.instruction_set()]
SPLIT = {"cuda"}  # where dlogits of bfloat16 operands are the sum of two bfloat16 numbers
# Logits from which on gradients gain by a dweight that is written once; torch would convert bfloat16 for its products.
# Of fewer the products of MKL are faster on Intel's chips. On an EPYC with AVX-512 they take 1.6 to 2 times as long as
# ours, on one without (Zen 3) 0.85 to 1 times in float32, 1 to 2.4 times in bfloat16.
MANY = {torch.float32: 2**22, torch.bfloat16: 2**20}
if not native.intel():
    MANY = {torch.float32: 0 if _BEST >= INSTRUCTION_SETS["avx512"] else 2**22, torch.bfloat16: 0}
KEPT = 2**25  # logits that are kept for the backward pass at most: 128 MiB
LEAST_WIDTH, LEAST_WIDTH_AMX = 64, 1024  # from which on to compute logits again takes more time than memory


def _multiplies(dtype: torch.dtype, name: str = "avx512_bf16") -> bool:
    """Whether the chip multiplies bfloat16 by that instruction set or a better one."""
    return dtype is torch.bfloat16 and (instruction_set() or _BEST) >= INSTRUCTION_SETS[name]


def late(dtype: torch.dtype, elements: int, wanted: bool, autocast: torch.dtype | None) -> bool:
    """Whether `fused` and `fused_gradients` are to run, for so many logits: of bfloat16 wherever the chip multiplies
    it, of both dtypes with AVX2, but for gradients only of many logits that can be kept. Of few, torch's products
    may be faster; of more, computing them again is 4 products for 3."""
    if autocast is not None or dtype not in (torch.float32, torch.bfloat16):
        return False
    if wanted and not _multiplies(dtype) and not MANY[dtype] <= elements <= KEPT:
        return False
    return (instruction_set() or _BEST) >= INSTRUCTION_SETS["avx2"]


def logits_kept(x: Tensor, rows: int, vocab: int, wanted: bool) -> int:
    """How many floats of logits `fused` keeps, if gradients are wanted; 0 where there are too many, or where to compute
    them again takes less time than memory."""
    least = LEAST_WIDTH_AMX if _multiplies(x.dtype, "amx") else LEAST_WIDTH
    kept = wanted and rows * vocab <= KEPT and x.shape[-1] >= least
    return -(-rows // 32) * 32 * vocab if kept else 0


def sums_kept(rows: int) -> int:
    """How wide the three rows of sums are that `fused` keeps."""
    return -(-rows // 32) * 32


def _workspace(rows: int, width: int, vocab: int) -> Tensor:
    """What csrc/cpu/fused_cross_entropy.h wants to work in (Sizes::floats)."""
    rows, width = -(-rows // 32) * 32, -(-width // 64) * 64
    words = min(-(-max(1024, 2**19 // rows) // 256) * 256, -(-vocab // 32) * 32)
    forward, backward = 3 * -(-vocab // 512) * rows, words * rows + 8 * rows + 2**17
    threads = torch.get_num_threads() * max(2**15, 32 * width)
    return empty((3 * rows * width + max(forward, backward) + threads,), torch.float32)


def _rows_of(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def fused(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and for the gradients, if they are wanted, three sums of each row and maybe the logits, for
    `fused_gradients`."""
    rows, vocab = x.shape[0], weight.shape[0]
    loss, sums = torch.empty((), dtype=torch.float32), torch.zeros((3, sums_kept(rows)), dtype=torch.float32)
    kept = empty((logits_kept(x, rows, vocab, wanted),), torch.float32)
    if rows == 0:
        return loss.zero_(), sums, kept
    options = label_smoothing, z_loss, softcap, 1.0
    status = _fused(x, weight, target, None, None, kept, sums, loss, ignore_index, options)
    if status:
        logits.check_target(target, vocab, ignore_index)  # the most likely reason
        raise native.failed("linear_cross_entropy", status)
    return loss, sums, kept


def fused_gradients(
    dloss: float,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    sums: Tensor,
    kept: Tensor,
    want_x: bool,
    want_weight: bool,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight times dloss, empty where they are not wanted."""
    dx, dweight = empty(x.shape if want_x else (0,), x.dtype), empty(weight.shape if want_weight else (0,), x.dtype)
    if not x.shape[0]:
        return dx, dweight.zero_()
    options = label_smoothing, z_loss, softcap, dloss
    status = _fused(
        x,
        weight,
        target,
        dx if want_x else None,
        dweight if want_weight else None,
        kept,
        sums,
        None,
        ignore_index,
        options,
    )
    if status:
        raise native.failed("linear_cross_entropy", status)
    return dx, dweight


def _fused(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    dx: Tensor | None,
    dweight: Tensor | None,
    kept: Tensor,
    sums: Tensor,
    loss: Tensor | None,
    ignore_index: int,
    options: tuple[float, float, float, float],
) -> int:
    """Calls the library; without `loss` for the gradients."""
    x, weight = _rows_of(x), _rows_of(weight)
    (rows, width), vocab = x.shape, weight.shape[0]
    workspace = _workspace(rows, width, vocab)
    return _CPU_FUSED(
        _PACK_FUSED(
            0 if dx is None else dx.data_ptr(),
            0 if dweight is None else dweight.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            target.data_ptr(),
            kept.data_ptr() if kept.numel() else 0,
            sums.data_ptr(),
            0 if loss is None else loss.data_ptr(),
            workspace.data_ptr(),
            rows,
            width,
            vocab,
            x.stride(0),
            weight.stride(0),
            ignore_index,
            workspace.numel(),
            *options,
            DTYPES[x.dtype],
            loss is None,
            instruction_set(),
            torch.get_num_threads(),
            0,
        )
    )


def forward(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    autocast: torch.dtype | None,
    want_x: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of x [N, D] and the gradients that are wanted, all float32; target [N] int64."""
    rows, device = x.shape[0], x.device
    loss = torch.empty((), dtype=torch.float32, device=device)
    losses = torch.empty(rows, dtype=torch.float64, device=device)
    if rows == 0:
        loss.zero_()

    def kernel(chunk: Tensor, dlogits: Tensor | None, start: int) -> None:
        gradient = chunk if dlogits is None else dlogits
        arguments = (
            chunk.data_ptr(),
            0 if dlogits is None else dlogits.data_ptr(),
            losses.data_ptr(),
            loss.data_ptr(),
            target.data_ptr(),
            rows,
            start,
            *chunk.shape,
            gradient.stride(0),
            ignore_index,
            label_smoothing,
            z_loss,
            softcap,
            DTYPES[chunk.dtype],
            DTYPES[gradient.dtype],
            gradient.shape[0] // chunk.shape[0],
        )
        if not chunk.is_cpu:
            _CUDA(chunk, *arguments)
            return
        status = _CPU(_PACK(*arguments, instruction_set(), torch.get_num_threads(), 0))
        if status:
            logits.check_target(target, chunk.shape[1], ignore_index)  # the most likely reason
            raise native.failed("linear_cross_entropy", status)

    return loss, *logits.gradients(kernel, x, weight, autocast, want_x, want_weight, split=device.type in SPLIT)
