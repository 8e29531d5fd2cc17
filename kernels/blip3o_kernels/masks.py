"""What a query of `attention` sees: the arguments that say so checked, and as one mask for the reference.

Query t of a sequence of T queries and S keys stands at key t + S - T (bottom-right). With a window (left, right) it
sees the keys at a distance of -left to right from there; -1 is no limit. Causal is a right limit of 0.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from . import checks
from .dispatch import direct, plain, transformed

_MASKS = checks.FLOATING | {torch.bool}


def check_mask(mask: Tensor, query: Tensor, full: tuple[int, ...]) -> None:
    if not isinstance(mask, Tensor) or mask.dtype not in _MASKS or mask.layout is not torch.strided:
        checks.mistyped("attn_mask", "a boolean or floating-point tensor", mask)
    if mask.dim() > 4 or any(
        size not in (1, expected) for size, expected in zip(reversed(mask.shape), reversed(full), strict=False)
    ):
        checks.fail("attn_mask", f"a shape that broadcasts to {list(full)}", list(mask.shape))
    checks.same_device("attn_mask", mask, "query", query)


def check_window(window: tuple[int, int]) -> None:
    if not isinstance(window, (tuple, list)):
        checks.mistyped("window_size", "(left, right)", window)
    if len(window) != 2 or any(type(size) is not int or not -1 <= size < 2**31 for size in window):
        checks.fail("window_size", "(left, right), integers in [-1, 2^31)", window)


def check_packed(cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, query: Tensor, key: Tensor) -> None:
    """Sequences that follow each other in one sample. Their lengths are looked at on a CPU only."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        checks.fail("cu_seqlens_q", "a tensor, as cu_seqlens_k is one", None)
    checks.of(torch.int32, "cu_seqlens_q", cu_seqlens_q)
    checks.of(torch.int32, "cu_seqlens_k", cu_seqlens_k)
    if query.shape[0] != 1:
        checks.fail("query", "a batch of 1, as cu_seqlens_q packs the sequences", list(query.shape))
    for name, ends, total in (
        ("cu_seqlens_q", cu_seqlens_q, query.shape[2]),
        ("cu_seqlens_k", cu_seqlens_k, key.shape[2]),
    ):
        if ends.dim() != 1 or ends.shape[0] < 2 or ends.shape != cu_seqlens_q.shape:
            same = "" if name == "cu_seqlens_q" else f", that of cu_seqlens_q, {list(cu_seqlens_q.shape)}"
            checks.fail(name, f"shape [N + 1] of N > 0 sequences{same}", list(ends.shape))
        checks.same_device(name, ends, "query", query)
        if not torch.compiler.is_compiling() and ends.is_cpu and plain(ends) and not transformed():
            with nullcontext() if direct(ends) else _disable_current_modes():  # no mode needs to see this
                values = ends.tolist()
            if values[0] != 0 or values[-1] != total or values != sorted(values):
                checks.fail(name, f"ascending from 0 to {total}", values)


def hidden(
    tokens: int,
    keys: int,
    window: tuple[int, int],
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """bool [T, S]: the keys that a query does not see for the window or the sequences; None if it sees all."""
    left, right = window
    if cu_seqlens_q is None and not 0 <= left < keys - 1 and not 0 <= right < tokens - 1:
        return None
    query = torch.arange(tokens, device=device, dtype=torch.int32)
    key = torch.arange(keys, device=device, dtype=torch.int32)
    if cu_seqlens_q is None:
        distance, blocked = key - (query + (keys - tokens)).unsqueeze(1), None
    else:
        ends_q, ends_k = cu_seqlens_q[1:], (cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k)[1:]
        of_query = torch.searchsorted(ends_q, query, right=True)
        of_key = torch.searchsorted(ends_k, key, right=True)
        distance = key - (query + (ends_k - ends_q)[of_query]).unsqueeze(1)
        blocked = of_query.unsqueeze(1) != of_key
    if left >= 0:
        blocked = distance < -left if blocked is None else blocked | (distance < -left)
    if right >= 0:
        blocked = distance > right if blocked is None else blocked | (distance > right)
    return blocked


def lowest(dtype: torch.dtype) -> float:
    """Low enough to give probability 0, high enough that a score added to it stays finite in every dtype."""
    return torch.finfo(dtype).min / 4


def additive(
    mask: Tensor | None, blocked: Tensor | None, dtype: torch.dtype, empty: bool
) -> tuple[Tensor | None, Tensor | None]:
    """attn_mask and what is hidden as one finite mask to add, and the rows [.., T, 1] that see nothing.

    empty: whether there may be such rows.
    """
    if mask is not None:
        masked = ~mask if mask.dtype is torch.bool else mask == -torch.inf
        blocked = masked if blocked is None else blocked | masked
    if blocked is None:
        return None, None
    if mask is None or mask.dtype is torch.bool:
        added = torch.zeros(blocked.shape, dtype=dtype, device=blocked.device)
    else:
        added = mask.detach().to(dtype)
    return added.masked_fill(blocked, lowest(dtype)), blocked.all(-1, keepdim=True) if empty else None
