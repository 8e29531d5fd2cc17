"""Token rows of any lengths one behind the other in a single row, in which none sees another.

Attention keeps them apart by `cu_seqlens`, and each has positions of its own, so the result is that of the rows one by
one, to the rounding of floats, without padding between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from blip3o.data.words import IGNORE


@dataclass(frozen=True)
class TokenRow:
    """ids [L] int64; targets [L] int64: the next token where it is to be learnt, else IGNORE; positions [3, L]."""

    ids: Tensor
    targets: Tensor
    positions: Tensor


@dataclass(frozen=True)
class PackedRow:
    """ids, targets [1, T] int64, positions [3, 1, T] int64, cu_seqlens [N + 1] int32: where each sequence begins; T."""

    ids: Tensor
    targets: Tensor
    positions: Tensor
    cu_seqlens: Tensor


def pack(rows: Sequence[TokenRow], multiple: int, pad_token: int) -> PackedRow:
    """Rows in a single one, whose length T is the least multiple of `multiple` that holds them.

    What is left at the end is padding, a sequence of its own that asks for nothing. Raises ValueError for no rows.
    """
    if not rows:
        raise ValueError("rows must be at least one, got none")
    lengths = [len(row.ids) for row in rows]
    rest = -sum(lengths) % multiple
    ends = torch.tensor([0, *lengths] + [rest] * bool(rest), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return PackedRow(
        pad(torch.cat([row.ids for row in rows]), (0, rest), value=pad_token)[None],
        pad(torch.cat([row.targets for row in rows]), (0, rest), value=IGNORE)[None],
        pad(torch.cat([row.positions for row in rows], dim=1), (0, rest))[:, None],
        ends,
    )
