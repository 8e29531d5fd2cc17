"""The vocabulary of the world, sentence templates over it, and the split of sentences into train, tune and report.

Sentences are rows of token ids built by tensor code: a template is a row of literal words and slots, a slot is filled
from a table of field values, and empty slots (HOLE) are squeezed out. A string only ever is the decoding of ids.

Shape legend: N sentences, T template length, F fields, L sentence length.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from blip3o.data.scenes import COLORS, GOLDEN, SHAPES, SIZES, mix64, signed

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>", "<image>", "<image_start>")
PLURALS = tuple(shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES)
NUMBERS = ("zero", "one", "two", "three")
_COMMON = """
top bottom left right topleft topright bottomleft bottomright
above below of to the its it in at a an and with , ? is are there here this these
picture image drawing photo scene draw paint show make create generate render please me i want see you do
what where how many colour shape size object objects yes no relative
describe exactly
"""
WORDS = (*SPECIAL, *COLORS, *SHAPES, *PLURALS, *SIZES, *NUMBERS, *_COMMON.split())
VOCAB_SIZE = 128  # of which len(WORDS) are in use, and some spare ones as nonce words
TOKEN = {word: number for number, word in enumerate(WORDS)}
# Ids that stand for colours and shapes which nobody has seen, in texts alone (see `rename`); no tokenizer knows them.
NONCE_COLORS = torch.arange(len(WORDS), len(WORDS) + len(COLORS))
NONCE_SHAPES = torch.arange(len(WORDS) + len(COLORS), len(WORDS) + len(COLORS) + len(SHAPES))
PAD, BOS, EOS, UNK, USER, ASSISTANT, IMAGE, IMAGE_START = range(8)
HOLE = PAD
IGNORE = -100  # a target that is not trained on
assert len(TOKEN) == len(WORDS) and int(NONCE_SHAPES[-1]) < VOCAB_SIZE


def ids_of(words: Sequence[str]) -> Tensor:
    """Token ids of words; "" is a HOLE. -> int64 [len(words)]."""
    return torch.tensor([TOKEN[word] if word else HOLE for word in words])


COLOR_IDS, SHAPE_IDS, PLURAL_IDS = ids_of(COLORS), ids_of(SHAPES), ids_of(PLURALS)
SIZE_IDS, NUMBER_IDS = ids_of(SIZES), ids_of(NUMBERS)
# One token for a cell: a model that says where something is must know row and column at once, not one after the other.
# Positions 0..3 are cells (2 * row + column), 4..7 the halves top, bottom, left, right
ROW_IDS = ids_of(("topleft", "topright", "bottomleft", "bottomright", "top", "bottom", "", ""))
COLUMN_IDS = ids_of(("", "", "", "", "", "", "left", "right"))


def pick(table: Tensor, number: Tensor, shown: Tensor | bool = True) -> Tensor:
    """table[number], and HOLE where number is negative or nothing is to be shown."""
    return torch.where((number >= 0) & shown, table[number.clamp(min=0)], HOLE)


def literal(word: str, shown: Tensor) -> Tensor:
    """The token of a word where `shown`, else HOLE."""
    return shown * TOKEN[word]


def compile_templates(templates: Sequence[str], slots: Mapping[str, int], width: int | None = None) -> Tensor:
    """Templates such as "draw {size0} {shape0}" as rows: a token id, VOCAB_SIZE + field number, or HOLE. -> [n, T]."""
    rows = [
        [VOCAB_SIZE + slots[word[1:-1]] if word.startswith("{") else TOKEN[word] for word in template.split()]
        for template in templates
    ]
    width = width or max(len(row) for row in rows)
    return torch.tensor([row + [HOLE] * (width - len(row)) for row in rows])


def fill(templates: Tensor, values: Tensor) -> Tensor:
    """Put field values [N, F] (token ids or HOLE) into the slots of templates [N, T] -> [N, T]."""
    slot = templates - VOCAB_SIZE
    return torch.where(slot >= 0, values.gather(1, slot.clamp(min=0)), templates)


def squeeze(ids: Tensor, *others: Tensor, fills: Sequence[int] = ()) -> tuple[Tensor, ...]:
    """Move the holes of every row to its end, order kept, and cut the width to the longest row.

    ids int64 [N, T]; others: tensors [N, T] moved alike, their tails filled with `fills`
    -> (ids [N, L], *others [N, L], length [N]).
    """
    keep = ids != HOLE
    length = keep.sum(1)
    width = int(length.max()) if len(length) else 0
    target = torch.where(keep, keep.cumsum(1) - 1, width)
    moved = []
    for tensor, value in zip((ids, *others), (HOLE, *fills), strict=True):
        out = tensor.new_full((tensor.shape[0], width + 1), value)
        moved.append(out.scatter_(1, target, tensor)[:, :width])
    return *moved, length


_RENAME_KEYS = [len(COLORS), len(COLORS), len(SHAPES), len(SHAPES)]
RENAME_DRAWS = sum(_RENAME_KEYS)  # random numbers per text


def rename(ids: Tensor, u: Tensor) -> Tensor:
    """Call some colours and shapes of each text by nonce words, each by one of its own, wherever it is named.

    What a text says and what its questions ask stays true. Who reads it cannot know which colours go with which shapes
    and has to read which do. ids int64 [N, L]; u float [N, RENAME_DRAWS] in [0, 1) -> int64 [N, L]. A colour or shape
    is renamed half of the time; the plural of a nonce shape is the same word.
    """
    words = torch.arange(VOCAB_SIZE).repeat(len(ids), 1)
    keys = u.split(_RENAME_KEYS, dim=1)
    for renamed, order, nonce, known in (
        (keys[0], keys[1], NONCE_COLORS, (COLOR_IDS,)),
        (keys[2], keys[3], NONCE_SHAPES, (SHAPE_IDS, PLURAL_IDS)),
    ):
        new = nonce[order.argsort(1)]
        for table in known:
            words[:, table] = torch.where(renamed < 0.5, new, table)
    return words.gather(1, ids)


def split(ids: Tensor) -> Tensor:
    """Which part a sentence belongs to, by a hash of its tokens: 0 train (70 %), 1 tune (15 %), 2 report (15 %).

    ids int64 [N, L], padded with PAD at the end by any amount -> int64 [N].
    """
    place = torch.arange(1, ids.shape[1] + 1) * signed(GOLDEN)
    hashed = mix64((mix64(ids + place) * (ids != PAD)).sum(1))
    percent = (hashed & ((1 << 62) - 1)) % 100
    return (percent >= 70).long() + (percent >= 85).long()


def decode(ids: Tensor) -> str:
    """The words of one row of ids [L], without special tokens."""
    return spaced(" ".join(WORDS[i] for i in ids.tolist() if i >= len(SPECIAL)))


def spaced(text: str) -> str:
    """A text as people write it: the four cells are one token each, but two words."""
    return re.sub(r"\b(top|bottom)(left|right)\b", r"\1 \2", text)
