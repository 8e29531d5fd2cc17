"""The vocabulary, the templates over it, and the split of sentences."""

import pytest
import torch

from blip3o.data import text
from blip3o.data.scenes import CELLS, sample
from blip3o.data.words import SPECIAL, TOKEN, VOCAB_SIZE, WORDS, compile_templates, fill, squeeze


def test_vocabulary():
    assert WORDS[:8] == SPECIAL and WORDS[0] == "<pad>" and (text.IMAGE, text.IMAGE_START) == (6, 7)
    assert len(set(WORDS)) == len(WORDS) <= VOCAB_SIZE == 128


def test_a_cell_is_one_token_and_two_words():
    for cell in CELLS:
        token = TOKEN[cell.replace(" ", "")]
        assert text.decode(torch.tensor([TOKEN["the"], token, TOKEN["object"]])) == f"the {cell} object"
    assert text.decode(torch.tensor([TOKEN["top"], text.PAD])) == "top"


def test_templates_fill_and_squeeze():
    templates = compile_templates(["draw {x} circle", "a {x} {y}"], {"x": 0, "y": 1})
    filled = fill(templates, torch.tensor([[TOKEN["red"], 0], [0, TOKEN["square"]]]))
    ids, kept, length = squeeze(filled, torch.arange(3).expand(2, 3), fills=(-1,))
    assert [text.decode(row) for row in ids] == ["draw red circle", "a square"]
    assert length.tolist() == [3, 2] and kept.tolist() == [[0, 1, 2], [0, 2, -1]]
    with pytest.raises(KeyError):
        compile_templates(["a dodecahedron"], {})


def test_split_has_the_right_shares_and_ignores_padding():
    ids = torch.stack(torch.meshgrid(*[torch.arange(8, 40)] * 3, indexing="ij"), dim=-1).reshape(-1, 3)
    part = text.split(ids)
    shares = part.bincount(minlength=3) / len(part)
    assert (shares - torch.tensor([0.7, 0.15, 0.15])).abs().max() < 0.01
    assert torch.equal(part, text.split(torch.nn.functional.pad(ids, (0, 5))))
    assert not torch.equal(part, text.split(ids.flip(1)))


def test_every_word_is_taught():
    index = torch.arange(3_000)
    scenes, seen = sample(0, index), torch.zeros(VOCAB_SIZE, dtype=torch.bool)
    for ids in (
        text.captions(scenes, 0, index).ids,
        text.conversations(scenes, 0, index).ids,
        text.conversations(scenes, 0, index, image=False).ids,
        text.drawing_prompts(text.captions(scenes, 0, index))[0],
    ):
        seen[ids.unique()] = True
    assert [word for word, there in zip(WORDS, seen, strict=False) if not there] == ["<unk>"]
