"""Packed sequences: none sees another, so the sum of the losses and its gradients are those of the rows one by one."""

import pytest
import torch
from torch import Tensor

from blip3o.data import text
from blip3o.data.packing import TokenRow, pack
from blip3o.layers import linear_cross_entropy
from blip3o.model import Blip3o

LENGTHS = (5, 31, 1, 12, 40)


def rows() -> list[TokenRow]:
    draw = torch.Generator().manual_seed(5)
    found = []
    for length in LENGTHS:
        ids = torch.randint(8, 60, (length,), generator=draw)
        taught = torch.rand(length, generator=draw) < 0.5
        found.append(TokenRow(ids, torch.where(taught, ids.roll(-1), text.IGNORE), torch.arange(length).expand(3, -1)))
    return found


def gradients(model: Blip3o, loss: Tensor) -> list[Tensor]:
    parameters = list(model.llm.parameters())
    return list(torch.autograd.grad(loss, parameters))


def test_packing_is_the_same_loss(lively: Blip3o) -> None:
    """Of the rows one by one, by the model's plain way to read; the padding at the end asks for nothing."""
    alone = torch.zeros(())
    for row in rows():
        asked = row.targets != text.IGNORE
        if asked.any():
            hidden = lively.read(row.ids[None], asked=asked[None])
            targets = row.targets[asked]
            alone = alone + linear_cross_entropy(hidden, lively.llm.output_weight, targets) * len(targets)
    packed = pack(rows(), 32, text.PAD)
    asked = packed.targets != text.IGNORE
    hidden = lively.llm(
        lively.embed(packed.ids), packed.positions, asked=asked.flatten().nonzero().squeeze(1),
        sequences=packed.cu_seqlens,
    )  # fmt: skip
    targets = packed.targets[asked]
    together = linear_cross_entropy(hidden, lively.llm.output_weight, targets) * len(targets)
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-5)
    for found, expected in zip(gradients(lively, together), gradients(lively, alone), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_a_packed_row_has_a_multiple_of_a_length() -> None:
    packed = pack(rows(), 32, text.PAD)
    assert packed.ids.shape == packed.targets.shape == (1, 96) and packed.positions.shape == (3, 1, 96)
    assert packed.cu_seqlens.dtype is torch.int32
    assert packed.cu_seqlens.tolist() == [0, 5, 36, 37, 49, 89, 96]
    assert bool((packed.ids[0, 89:] == text.PAD).all()) and bool((packed.targets[0, 89:] == text.IGNORE).all())
    assert [int(packed.positions[0, 0, start]) for start in (0, 5, 36, 37, 49)] == [0] * 5
    full = pack(rows(), 1, text.PAD)
    assert full.ids.shape == (1, 89) and full.cu_seqlens.tolist() == [0, 5, 36, 37, 49, 89]
    with pytest.raises(ValueError, match="at least one"):
        pack([], 32, text.PAD)


def test_sequences_need_positions_of_their_own(lively: Blip3o) -> None:
    packed = pack(rows(), 1, text.PAD)
    for positions, mask in ((None, None), (packed.positions, torch.ones(1, 89, dtype=torch.bool))):
        with pytest.raises(ValueError, match="sequences must come"):
            lively.llm(lively.embed(packed.ids), positions, mask, sequences=packed.cu_seqlens)
