"""Questions about facts: which ones have exactly one answer, which one to ask, in which words, and what is the answer.

A question has a form (of FORMS). Objects are only ever named so that exactly one fits; the wrong sides of yes-or-no
questions are near misses (colour and shape are there, but not on one object; the opposite relation), balanced so that
who does not look guesses.

Shape legend: N pictures, M = N * turns questions, O = 3 object slots, F forms, K queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blip3o.data.captions import NEAR_IDS, TO_IDS
from blip3o.data.facts import Facts
from blip3o.data.scenes import COLORS, MAX_OBJECTS, PAIR_HELD_OUT, SHAPES, choose
from blip3o.data.words import (
    COLOR_IDS,
    COLUMN_IDS,
    NUMBER_IDS,
    PLURAL_IDS,
    ROW_IDS,
    SHAPE_IDS,
    SIZE_IDS,
    TOKEN,
    compile_templates,
    fill,
    literal,
    pick,
)

QUESTION_TYPES = ("color", "shape", "count", "existence", "relation", "position", "size", "describe")
# type, weight, phrasings
FORMS = (
    ("color", 0.05, "what colour is {a} | what is the colour of {a}"),
    ("shape", 0.05, "what shape is {a} | what is the shape of {a}"),
    ("count", 0.04, "how many objects are there | how many objects are {in}"),
    ("count", 0.13, "how many {qs} are there | how many {qs} are {in}"),
    ("existence", 0.19, "is there a {q} | is there a {q} {in}"),
    ("relation", 0.12, "is {a} {near} {b} | is {a} {to} {b}"),
    ("relation", 0.03, "what is {near} {b} | what is {to} {b}"),
    ("relation", 0.24, "where is {a} relative to {b}"),
    ("position", 0.08, "where is {a}"),
    ("position", 0.005, "is {a} at the {p}"),
    ("position", 0.04, "what is at the {p}"),
    ("size", 0.04, "what size is {a} | how large is {a}"),
    ("size", 0.01, "is {a} {size}"),
)
COLOR, SHAPE, COUNT_ALL, COUNT, EXIST, REL_IS, REL_WHAT, REL_WHERE, POS_WHERE, POS_IS, POS_WHAT = range(11)
SIZE, SIZE_IS = 11, 12
FORM_TYPE = torch.tensor([QUESTION_TYPES.index(form[0]) for form in FORMS])
FORM_WEIGHT = torch.tensor([form[1] for form in FORMS])
_EXPAND = {
    "{a}": "the {a_color} {a_noun}",
    "{b}": "the {b_color} {b_noun}",
    "{q}": "{q_color} {q_noun}",
    "{qs}": "{q_color} {q_nouns}",
    "{near}": "{near0} {near1}",
    "{to}": "{to0} {to1} {to2} {to3}",
    "{p}": "{p_row} {p_column}",
    "{in}": "in the picture",
}
_SLOTS = (
    "a_color", "a_noun", "b_color", "b_noun", "q_color", "q_noun", "q_nouns", "near0", "near1",
    "to0", "to1", "to2", "to3", "p_row", "p_column", "size", "mark",
)  # fmt: skip


def _expand(template: str) -> str:
    for short, long in _EXPAND.items():
        template = template.replace(short, long)
    return template + " {mark}"


_PHRASINGS = [form[2].split(" | ") for form in FORMS]
_QUESTION = compile_templates(
    [_expand(text) for form in _PHRASINGS for text in form], {s: i for i, s in enumerate(_SLOTS)}
)
_QUESTION_COUNT = torch.tensor([len(form) for form in _PHRASINGS])
_QUESTION_START = _QUESTION_COUNT.cumsum(0) - _QUESTION_COUNT
_BY_PAIR, _BY_SHAPE, _BY_COLOR = range(3)  # how an object is named
_NAMING = torch.full((len(FORMS),), _BY_PAIR)
_NAMING[COLOR], _NAMING[SHAPE] = _BY_SHAPE, _BY_COLOR
DRAWS = 65  # random numbers per question

# what may be counted or be there: a shape, a colour, or a pair (colour * 4 + shape)
_PAIRS = torch.arange(len(COLORS) * len(SHAPES))
_NONE = torch.tensor([-1])
_QUERY_SHAPE = torch.cat([torch.arange(len(SHAPES)), _NONE.repeat(len(COLORS)), _PAIRS % len(SHAPES)])
_QUERY_COLOR = torch.cat([_NONE.repeat(len(SHAPES)), torch.arange(len(COLORS)), _PAIRS // len(SHAPES)])
_QUERY_CLASS = (_QUERY_COLOR >= 0).long() + ((_QUERY_COLOR >= 0) & (_QUERY_SHAPE >= 0)).long()
QUERY_HELD_OUT = torch.cat([torch.zeros(len(SHAPES) + len(COLORS), dtype=torch.bool), PAIR_HELD_OUT.flatten()])
_OPPOSITE = torch.tensor([1, 0, 3, 2])
_POSITION_ROW = torch.tensor([0, 0, 1, 1, 0, 1, -1, -1])
_POSITION_COLUMN = torch.tensor([0, 1, 0, 1, -1, -1, 0, 1])
_IS_CELL = torch.arange(8) < 4
# balance: how often to count everything in pictures of 1, 2, 3 objects, and to count something where the largest number
# to be had is 1, 2, 3; and which answer (zero to three) to prefer
_COUNT_ALL_BALANCE = torch.tensor([1.0, 1.85, 0.68, 1.0])
_COUNT_BALANCE = torch.tensor([0.3, 0.3, 1.3, 3.0])
_WANTED = torch.tensor([1.0, 1.0, 3.0, 4.0])
_HARD = 0.8  # share of absent queries that are near misses


@dataclass(frozen=True)
class Answerable:
    """Which questions the facts answer, without ambiguity."""

    weight: Tensor  # [N, F] how fit each form is, 0: not at all
    pair: Tensor  # [N, F, O * O] bool: about objects (i, j); j = i where a form names one object or none
    relation: Tensor  # [N, 4, O, O] bool: i is known to be (relation) j, and to be the only one
    counts: Tensor  # [N, K] how many objects fit a query, -1: unknown or not to be named
    numbers: Tensor  # [N, 3, 4] bool: some query of a class (shape, colour, pair) has the answer 0..3
    near: Tensor  # [N, K] how much of an absent query is there: 0, 1 or 2 (colour and shape, but apart)
    truths: Tensor  # [N, O, 8] truth of positions
    alone: Tensor  # [N, O, 8] bool: known to be at a position, where no other object is


def _unlike(x: Tensor) -> Tensor:
    """Known to differ: x [N, O] -> bool [N, O, O]."""
    return (x[:, :, None] != x[:, None]) & (x[:, :, None] >= 0) & (x[:, None] >= 0)


def _agree(known: Tensor, wanted: Tensor) -> Tensor:
    """Truth of known [N, O] (-1: unknown) being wanted [P] (-1: anything) -> [N, O, P]."""
    truth = torch.where(known[..., None] >= 0, (known[..., None] == wanted).long(), -1)
    return torch.where(wanted >= 0, truth, 1)


def answerable(facts: Facts, hidden: Tensor) -> Answerable:
    """hidden: bool [K], queries that are never named unless they are there."""
    present, color, shape, row, column = facts.present, facts.color, facts.shape, facts.row, facts.column
    absent = ~present
    itself = torch.eye(MAX_OBJECTS, dtype=torch.bool)

    # names
    by_shape, by_color = _unlike(shape), _unlike(color)
    ignored = itself | absent[:, None]
    paired, placed = (color >= 0) & (shape >= 0), (row >= 0) & (column >= 0)
    only_pair = paired & (by_shape | by_color | ignored).all(2)
    only_shape, only_color = (shape >= 0) & (by_shape | ignored).all(2), (color >= 0) & (by_color | ignored).all(2)
    refer = torch.stack([only_pair, only_shape, only_color], dim=2)[..., _NAMING]  # [N, O, F]: its name fits it alone

    # positions: false as soon as one axis is, true when both are
    vertical, horizontal = _agree(row, _POSITION_ROW), _agree(column, _POSITION_COLUMN)
    truths = torch.where((vertical == 0) | (horizontal == 0), 0, torch.minimum(vertical, horizontal))
    halves = truths[..., 4:]
    placeable = placed | ((halves == 1).any(2) & (halves == 0).any(2))
    elsewhere = (truths == 0) | absent[..., None]  # [N, O, 8]
    alone = (truths == 1) & (elsewhere[:, None] | itself[..., None]).all(2)

    # counts
    fits = ((shape[:, :, None] == _QUERY_SHAPE) | (_QUERY_SHAPE < 0)) & present[..., None]
    counts = (fits & ((color[:, :, None] == _QUERY_COLOR) | (_QUERY_COLOR < 0))).sum(1)
    shapes, colors = counts[:, : len(SHAPES)], counts[:, len(SHAPES) : len(SHAPES) + len(COLORS)]
    near = ((colors[:, :, None] > 0).long() + (shapes[:, None] > 0).long()).flatten(1)
    near = torch.cat([near.new_zeros(len(near), len(SHAPES) + len(COLORS)), near], dim=1) * (counts == 0)
    shapes_known, colors_known = ((shape >= 0) | absent).all(1), ((color >= 0) | absent).all(1)
    known = shapes_known[:, None] & (colors_known[:, None] | (_QUERY_CLASS == 0))
    counts = torch.where(known & ~(hidden & (counts == 0)), counts, -1)
    number = counts[..., None] == torch.arange(4)
    numbers = torch.stack([(number & _QUERY_CLASS.eq(k)[:, None]).any(1) for k in range(3)], dim=1)

    # relations
    true, both = facts.related == 1, present[:, :, None] & present[:, None] & ~itself
    unknown = ((facts.related < 0) & both[:, None]).any(2, keepdim=True)
    only = true & (true.sum(2, keepdim=True) == 1) & ~unknown & both[:, None]
    one_axis = (true[:, 0] | true[:, 1]) ^ (true[:, 2] | true[:, 3])

    def refer_to_both(form: int) -> Tensor:
        return both & refer[:, :, None, form] & refer[:, None, :, form]

    def one(mask: Tensor) -> Tensor:
        return mask[:, :, None] & itself

    pair = torch.stack(
        [
            one(refer[..., COLOR] & (color >= 0)), one(refer[..., SHAPE] & (shape >= 0)),
            one(present), one(present), one(present),
            refer_to_both(REL_IS) & true.any(1),
            both & paired[:, :, None] & only.any(1) & refer[:, None, :, REL_WHAT],
            refer_to_both(REL_WHERE) & one_axis,
            one(refer[..., POS_WHERE] & ((row >= 0) | (column >= 0))), one(refer[..., POS_IS] & placeable),
            one(alone.any(2) & paired), one(refer[..., SIZE] & (facts.size >= 0)),
            one(refer[..., SIZE_IS] & (facts.size >= 0)),
        ],
        dim=1,
    ).flatten(2)  # fmt: skip
    weight = pair.any(2).float()
    weight[:, COUNT_ALL] *= _COUNT_ALL_BALANCE[facts.count]
    weight[:, COUNT] *= _COUNT_BALANCE[counts.amax(1)]
    return Answerable(weight, pair, only, counts, numbers, near, truths, alone)


@dataclass(frozen=True)
class Asked:
    """Questions and answers, with holes."""

    form: Tensor  # [M] of FORMS
    question: Tensor  # [M, T]
    answer: Tensor  # [M, 2]


def _any_of(mask: Tensor, u: Tensor) -> Tensor:
    """A random true column of each row: mask bool [M, K], u [M, K] -> [M] (0 when there is none)."""
    return ((u + 1e-6) * mask).argmax(1)


def ask(facts: Facts, weight: Tensor, hidden: Tensor, u: Tensor, turns: int) -> Asked:
    """`turns` questions about each of N pictures.

    weight: float [F], relative frequencies of the forms; hidden: see `answerable`; u: float [N * turns, DRAWS], the
    random numbers of each question.
    """
    able = answerable(facts, hidden)
    picture = torch.arange(len(facts.count)).repeat_interleave(turns)
    rows = torch.arange(len(picture))
    form = choose((able.weight * weight)[picture], u[:, 0])
    objects = _any_of(able.pair[picture, form], u[:, 1:10])
    a, b = objects // MAX_OBJECTS, objects % MAX_OBJECTS
    coin = u[:, 10] < 0.5  # the truth of a yes-or-no question
    color_a, shape_a, size_a = facts.color[picture, a], facts.shape[picture, a], facts.size[picture, a]

    # what is counted or looked for
    looking = form == EXIST
    counts = able.counts[picture]
    kind = torch.where(u[:, 11] < torch.where(looking, 0.7, 0.4), 2, (u[:, 12] < 0.5).long())
    kind = torch.where((counts[:, len(SHAPES)] >= 0), kind, 0)  # colours are not known
    wanted = choose(able.numbers[picture, kind] * _WANTED, u[:, 13])
    fits = torch.where(looking[:, None], (counts > 0) == coin[:, None], counts == wanted[:, None])
    fits &= _QUERY_CLASS.eq(kind[:, None]) & (counts >= 0)
    hard = able.near[picture] * (u[:, 14:15] < _HARD)
    query = ((u[:, 15:49] + 1e-6 + hard) * fits).argmax(1)
    query_color, query_shape = _QUERY_COLOR[query], _QUERY_SHAPE[query]

    # relation
    truth = facts.related[picture, :, a, b]  # [M, 4]
    true = truth == 1
    false = torch.where(u[:, 49:50] < 0.75, true[:, _OPPOSITE], truth == 0)
    fits = torch.where((form == REL_WHAT)[:, None], able.relation[picture, :, a, b], true)
    fits = torch.where(((form == REL_IS) & ~coin)[:, None], false, fits)
    relation = _any_of(fits, u[:, 50:54])

    # position
    truths = able.truths[picture, a]
    as_cell = ((truths == 1) & _IS_CELL).any(1)  # both truth values can be had; so can they for halves
    by_cell = as_cell & (u[:, 54] < 0.5)
    fits = (truths == coin[:, None].long()) & _IS_CELL.eq(by_cell[:, None])
    fits = torch.where((form == POS_WHAT)[:, None], able.alone[picture, a], fits)
    place = _any_of(fits, u[:, 55:63])
    row, column = facts.row[picture, a], facts.column[picture, a]
    home = torch.where(row < 0, 6 + column, torch.where(column < 0, 4 + row, 2 * row + column))
    size = torch.where(coin | (size_a < 0), size_a, 1 - size_a)

    # words
    how = _NAMING[form]

    def name(color: Tensor, shape: Tensor) -> tuple[Tensor, Tensor]:
        noun = torch.where(how == _BY_COLOR, TOKEN["object"], pick(SHAPE_IDS, shape))
        return pick(COLOR_IDS, color, how != _BY_SHAPE), noun

    values = torch.stack(
        [
            *name(color_a, shape_a), *name(facts.color[picture, b], facts.shape[picture, b]),
            pick(COLOR_IDS, query_color), torch.where(query_shape >= 0, pick(SHAPE_IDS, query_shape), TOKEN["object"]),
            torch.where(query_shape >= 0, pick(PLURAL_IDS, query_shape), TOKEN["objects"]),
            *NEAR_IDS[relation].unbind(1), *TO_IDS[relation].unbind(1), pick(ROW_IDS, place), pick(COLUMN_IDS, place),
            pick(SIZE_IDS, size), literal("?", u[:, 63] < 0.85),
        ],
        dim=1,
    )  # fmt: skip
    phrasing = _QUESTION_START[form] + (u[:, 64] * _QUESTION_COUNT[form]).long()
    yes = torch.where(coin, TOKEN["yes"], TOKEN["no"])
    total, number = NUMBER_IDS[facts.count[picture]], NUMBER_IDS[counts[rows, query].clamp(min=0)]
    color, shape, near = pick(COLOR_IDS, color_a), pick(SHAPE_IDS, shape_a), NEAR_IDS[relation]
    place_row, place_column, none = pick(ROW_IDS, home), pick(COLUMN_IDS, home), torch.zeros_like(color)
    size = pick(SIZE_IDS, size_a)
    first = (color, shape, total, number, yes, yes, color, near[:, 0], place_row, yes, color, size, yes)
    second = (none, none, none, none, none, none, shape, near[:, 1], place_column, none, shape, none, none)
    answer = torch.stack([torch.stack(first, 1)[rows, form], torch.stack(second, 1)[rows, form]], dim=1)
    return Asked(form, fill(_QUESTION[phrasing], values), answer)
