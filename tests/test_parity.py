"""Every line of the parity table holds, and a line that does not is told, with exit status 1."""

from collections.abc import Callable, Iterator

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers")
import parity
from parity import PARTS, Row, World, row


@pytest.mark.parametrize("part", PARTS, ids=[part.__name__ for part in PARTS])
def test_the_difference_is_within_its_bound(world: World, part: Callable[[World], Iterator[Row]]) -> None:
    rows = list(part(world))
    assert rows and all(found.bound <= parity.BOUND for found in rows)
    assert not [found for found in rows if not found.holds]


def disturbed(world: World) -> Iterator[Row]:
    """One weight of a block's second norm, a thousandth too large."""
    weight = world.ours.llm.blocks[1].mlp_norm.weight
    before = weight.clone()
    weight[3] *= 1.001
    try:
        yield from parity.language_model(world)
    finally:
        weight.copy_(before)


def test_a_difference_is_told(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parity, "quiet", lambda: None)
    monkeypatch.setattr(parity, "PARTS", (disturbed, parity.clip))
    assert parity.main(world) == 1
    printed = capsys.readouterr().out
    assert "OVER" in printed and "9 comparisons, 7 over their bound" in printed
    monkeypatch.setattr(parity, "PARTS", (parity.clip,))
    assert parity.main(world) == 0 and "2 comparisons, all within bounds" in capsys.readouterr().out


def test_nothing_equals_nothing() -> None:
    """A reference of zeros, or a result that is no number, is no parity."""
    assert not row("", "", "", torch.zeros(2), torch.zeros(2)).holds
    assert not row("", "", "", torch.tensor([float("nan"), 1.0]), torch.ones(2)).holds
    with pytest.raises(ValueError, match=r"part, inputs: ours is \[2\], theirs \[3\]"):
        row("part", "reference", "inputs", torch.ones(2), torch.ones(3))
