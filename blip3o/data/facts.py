"""What is known of a picture: everything, if one sees it; what is stated and what follows from it, if one reads of it.

Shape legend: N pictures, O = 3 object slots.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from blip3o.data.captions import Captions
from blip3o.data.scenes import Scenes


@dataclass(frozen=True)
class Facts:
    """What is known. Unknown: -1. Truth values are 1 (true), 0 (false), -1 (unknown)."""

    count: Tensor  # [N]
    present: Tensor  # [N, O] bool
    color: Tensor  # [N, O]
    shape: Tensor  # [N, O]
    size: Tensor  # [N, O]
    row: Tensor  # [N, O] 0 top, 1 bottom
    column: Tensor  # [N, O] 0 left, 1 right
    related: Tensor  # [N, 4, O, O] truth of "i is (relation) j"

    def __getitem__(self, index: Tensor | slice) -> Facts:
        return Facts(*(getattr(self, field.name)[index] for field in fields(self)))


def _related(low: Tensor) -> tuple[Tensor, Tensor]:
    """Truth of "i before j" and "i after j" along an axis with places low [N, O] (-1 unknown)."""
    known = (low[:, :, None] >= 0) & (low[:, None] >= 0)
    before = torch.where(known, (low[:, :, None] < low[:, None]).long(), -1)
    return before, before.transpose(1, 2)


def picture_facts(scenes: Scenes) -> Facts:
    """All there is to know of a picture."""
    present = scenes.cell >= 0
    row, column = torch.where(present, scenes.cell // 2, -1), torch.where(present, scenes.cell % 2, -1)
    related = torch.stack([*_related(column), *_related(row)], dim=1)
    return Facts(scenes.count, present, scenes.color, scenes.shape, scenes.size, row, column, related)


def caption_facts(said: Captions) -> Facts:
    """What a caption states, and what follows from it."""
    place = said.position
    cell, upright, sideways = (place >= 0) & (place < 4), (place == 4) | (place == 5), place >= 6
    row = torch.where(cell, place // 2, torch.where(upright, place - 4, -1))
    column = torch.where(cell, place % 2, torch.where(sideways, place - 6, -1))
    # two columns, two rows: what is left of something is in the left one
    # [how object 0 lies to object 1: before, behind, unsaid; object]
    pair = torch.tensor([[0, 1, -1], [1, 0, -1], [-1, -1, -1]])
    stated = said.relation
    column = torch.maximum(column, pair[torch.where((stated == 0) | (stated == 1), stated, 2)])
    row = torch.maximum(row, pair[torch.where(stated >= 2, stated - 2, 2)])
    related = torch.stack([*_related(column), *_related(row)], dim=1)
    return Facts(said.count, said.shape >= 0, said.color, said.shape, said.size, row, column, related)
