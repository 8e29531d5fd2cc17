"""Questions and answers about a picture or a caption, as conversations to train on and as single questions to evaluate.

One engine serves both: it asks only what the facts determine. The facts of a picture are complete; those of a caption
hold what it states and what follows from that.

Shape legend: N pictures, Q turns, M = N * Q rows, O = 3 object slots, L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from blip3o.data.captions import (
    NEAR_IDS,
    TO_IDS,
    Captions,
    captions,
    choose,
)
from blip3o.data.scenes import COLORS, MAX_OBJECTS, PAIR_HELD_OUT, SHAPES, Scenes, sample, uniform
from blip3o.data.words import (
    ASSISTANT,
    BOS,
    COLOR_IDS,
    COLUMN_IDS,
    EOS,
    HOLE,
    IGNORE,
    IMAGE,
    NUMBER_IDS,
    PLURAL_IDS,
    ROW_IDS,
    SHAPE_IDS,
    SIZE_IDS,
    TOKEN,
    USER,
    compile_templates,
    decode,
    fill,
    literal,
    pick,
    squeeze,
)

QUESTION_TYPES = ("color", "shape", "count", "existence", "relation", "position", "size", "describe")
# form -> (type, weight, phrasings)
_FORMS = (
    ("color", 0.12, ("what colour is {a}", "which colour is {a}", "what is the colour of {a}", "tell me the colour of {a}")),
    ("shape", 0.12, ("what shape is {a}", "which shape is {a}", "what is the shape of {a}", "tell me the shape of {a}")),
    ("count", 0.04, ("how many objects are there", "how many objects are in the picture", "how many objects do you see", "count the objects")),
    ("count", 0.12, ("how many {qs} are there", "how many {qs} are in the picture", "how many {qs} do you see", "count the {qs}")),
    ("existence", 0.18, ("is there a {q}", "is there a {q} in the picture", "do you see a {q}", "does the picture contain a {q}")),
    ("relation", 0.16, ("is {a} {near} {b}", "is {a} {to} {b}", "is {a} {near} {b}")),
    ("relation", 0.10, ("what is {near} {b}", "what is {to} {b}", "which object is {near} {b}")),
    ("relation", 0.06, ("where is {a} relative to {b}", "where is {a} compared to {b}")),
    ("position", 0.06, ("where is {a}", "what is the position of {a}")),
    ("position", 0.05, ("is {a} at the {p}", "is {a} in the {p}")),
    ("position", 0.04, ("what is at the {p}", "what is in the {p}", "which object is at the {p}")),
    ("size", 0.03, ("what size is {a}", "which size is {a}", "what is the size of {a}")),
    ("size", 0.02, ("is {a} {size}",)),
)  # fmt: skip
COLOR, SHAPE, COUNT_ALL, COUNT, EXIST, REL_IS, REL_WHAT, REL_WHERE, POS_WHERE, POS_IS, POS_WHAT, SIZE, SIZE_IS = range(13)
_DESCRIBE = ("describe the picture", "what is in the picture", "what do you see", "describe what you see")
_FORM_TYPE = torch.tensor([QUESTION_TYPES.index(form[0]) for form in _FORMS])
_FORM_WEIGHT = torch.tensor([form[1] for form in _FORMS])
_EXPAND = {
    "{a}": "the {a_row} {a_column} {a_color} {a_noun}",
    "{b}": "the {b_row} {b_column} {b_color} {b_noun}",
    "{q}": "{q_color} {q_noun}",
    "{qs}": "{q_color} {q_nouns}",
    "{near}": "{near0} {near1}",
    "{to}": "{to0} {to1} {to2} {to3}",
    "{p}": "{p_row} {p_column}",
}
_SLOTS = (
    "a_row", "a_column", "a_color", "a_noun", "b_row", "b_column", "b_color", "b_noun", "q_color", "q_noun", "q_nouns",
    "near0", "near1", "to0", "to1", "to2", "to3", "p_row", "p_column", "size", "mark",
)  # fmt: skip


def _expand(template: str) -> str:
    for short, long in _EXPAND.items():
        template = template.replace(short, long)
    return template + ("" if template.startswith(("tell", "count", "describe")) else " {mark}")


_QUESTION = compile_templates([_expand(text) for form in _FORMS for text in form[2]], {s: i for i, s in enumerate(_SLOTS)})
_QUESTION_COUNT = torch.tensor([len(form[2]) for form in _FORMS])
_QUESTION_START = _QUESTION_COUNT.cumsum(0) - _QUESTION_COUNT
_DESCRIBE_IDS = compile_templates([_expand(t).replace(" {mark}", " ?") for t in _DESCRIBE], {})
# how an object may be named, per form: by (colour, shape), by shape, by colour, by cell
_NAMING = torch.tensor(
    [
        [0, 2, 0, 1], [0, 0, 2, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [4, 1, 1, 0], [4, 1, 1, 0], [4, 1, 1, 0],
        [3, 1, 1, 0], [3, 1, 1, 0], [1, 0, 0, 0], [2, 1, 1, 1], [2, 1, 1, 1],
    ],
    dtype=torch.float32,
)  # fmt: skip
_DRAWS = 96
_STREAM = 128
_OPPOSITE = torch.tensor([1, 0, 3, 2])
_NUM_QUERIES = len(SHAPES) + len(COLORS) + len(SHAPES) * len(COLORS)  # a shape, a colour, or a pair colour * 4 + shape
_QUERY_CLASS = torch.tensor([0] * 4 + [1] * 6 + [2] * 24)
_QUERY_HELD_OUT = torch.cat([torch.zeros(10, dtype=torch.bool), PAIR_HELD_OUT.flatten()])
_QUERY_COLOR = torch.tensor([-1] * 4 + list(range(6)) + [p // 4 for p in range(24)])
_QUERY_SHAPE = torch.tensor([*range(4)] + [-1] * 6 + [p % 4 for p in range(24)])


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
    related = torch.stack([*_related(column), *_related(row)], dim=1)
    stated = said.relation
    axis = (torch.arange(4) // 2) == (stated // 2)[:, None]  # [N, 4]
    forward = torch.where(axis & (stated >= 0)[:, None], (torch.arange(4) == stated[:, None]).long(), -1)
    backward = torch.where(forward >= 0, 1 - forward, -1)
    related[:, :, 0, 1] = torch.maximum(related[:, :, 0, 1], forward)
    related[:, :, 1, 0] = torch.maximum(related[:, :, 1, 0], backward)
    return Facts(said.count, said.shape >= 0, said.color, said.shape, said.size, row, column, related)


@dataclass(frozen=True)
class _Applicable:
    """Which questions the facts answer without ambiguity."""

    form: Tensor  # [N, F] bool
    pair: Tensor  # [N, F, O * O] bool: object i (and j; j = i for forms about one object)
    named: Tensor  # [N, O, 4] bool: unique by (colour, shape), shape, colour, cell
    relation: Tensor  # [N, 4, O, O] bool: i is the only object that is (relation) j, and is known to be
    counts: Tensor  # [N, queries], -1 unknown
    truths: Tensor  # [N, O, 8] of positions


def _analyse(facts: Facts, hidden: Tensor) -> _Applicable:
    """hidden: bool [queries], queries that are never named in a negative."""
    n, o = facts.shape.shape
    absent = ~facts.present
    color, shape, row, column = facts.color, facts.shape, facts.row, facts.column
    eye = torch.eye(o, dtype=torch.bool)

    def unlike(x: Tensor) -> Tensor:
        return (x[:, :, None] != x[:, None]) & (x[:, :, None] >= 0) & (x[:, None] >= 0)

    def unique(differ: Tensor) -> Tensor:
        return (differ | eye | absent[:, None]).all(2)

    by_shape, by_color = unlike(shape), unlike(color)
    placed = (row >= 0) & (column >= 0)
    paired = (color >= 0) & (shape >= 0)
    named = torch.stack(
        [
            paired & unique(by_shape | by_color), (shape >= 0) & unique(by_shape),
            (color >= 0) & unique(by_color), placed & ((placed | absent).all(1, keepdim=True)),
        ],
        dim=2,
    )  # fmt: skip

    want_row = torch.tensor([0, 0, 1, 1, 0, 1, -1, -1])
    want_column = torch.tensor([0, 1, 0, 1, -1, -1, 0, 1])

    def agree(known: Tensor, want: Tensor) -> Tensor:  # 1, 0 or -1 per (object, position)
        truth = torch.where(known[..., None] >= 0, (known[..., None] == want).long(), -1)
        return torch.where(want >= 0, truth, 1)

    vertical, horizontal = agree(row, want_row), agree(column, want_column)
    truths = torch.where((vertical == 0) | (horizontal == 0), 0, torch.minimum(vertical, horizontal))
    truths = torch.where(facts.present[..., None], truths, -1)

    shape_known, color_known = ((shape >= 0) | absent).all(1), ((color >= 0) | absent).all(1)
    by_query_shape = (shape[:, :, None] == _QUERY_SHAPE) | (_QUERY_SHAPE < 0)
    by_query_color = (color[:, :, None] == _QUERY_COLOR) | (_QUERY_COLOR < 0)
    counts = (by_query_shape & by_query_color & facts.present[..., None]).sum(1)
    known = torch.where(_QUERY_CLASS == 0, shape_known[:, None], (shape_known & color_known)[:, None])
    counts = torch.where(known & ~(hidden & (counts == 0)), counts, -1)

    # relations between i and j, both named without ambiguity
    true, unknown = facts.related == 1, facts.related < 0
    both = facts.present[:, :, None] & facts.present[:, None] & ~eye
    alone = true.sum(2, keepdim=True) == 1  # one i for this (relation, j)
    sure = ~(unknown & both[:, None]).any(2, keepdim=True)
    only = true & alone & sure & both[:, None]
    sideways = true[:, 0] | true[:, 1]
    upright = true[:, 2] | true[:, 3]

    naming = _NAMING > 0
    refer = (named[:, :, None] & naming).any(3)  # [N, O, F]
    known_pair = both & paired[:, :, None]

    def one(mask: Tensor) -> Tensor:
        return mask[:, :, None] & eye

    yes_no = both & (true.any(1)) & refer[:, :, None, REL_IS] & refer[:, None, :, REL_IS]
    where = both & (sideways ^ upright) & refer[:, :, None, REL_WHERE] & refer[:, None, :, REL_WHERE]
    what = known_pair & only.any(1) & refer[:, None, :, REL_WHAT]
    half = ((truths[..., 4:] == 1).any(2) & (truths[..., 4:] == 0).any(2)) | placed
    everything = facts.present
    pair = torch.stack(
        [
            one(refer[..., COLOR] & (color >= 0)), one(refer[..., SHAPE] & (shape >= 0)),
            one(everything), one(everything), one(everything), yes_no, what, where,
            one(refer[..., POS_WHERE] & ((row >= 0) | (column >= 0))), one(refer[..., POS_IS] & half),
            one(named[..., 3] & paired), one(refer[..., SIZE] & (facts.size >= 0)),
            one(refer[..., SIZE_IS] & (facts.size >= 0)),
        ],
        dim=1,
    )  # fmt: skip
    pair = pair.flatten(2)
    return _Applicable(pair.any(2), pair, named, only, counts, truths)


@dataclass(frozen=True)
class _Asked:
    form: Tensor  # [M]
    question: Tensor  # [M, T] with holes
    answer: Tensor  # [M, 2] with holes


def _pick_true(mask: Tensor, u: Tensor) -> Tensor:
    """A random true column of each row: mask bool [M, K], u [M, K] -> [M] (0 when there is none)."""
    return (u * mask).argmax(1)


def _ask(facts: Facts, weight: Tensor, hidden: Tensor, u: Tensor, turns: int) -> _Asked:
    """`turns` questions per picture. weight [N, F] of the forms; u [N * turns, _DRAWS]."""
    able = _analyse(facts, hidden)
    n, m = len(facts.count), u.shape[0]
    picture = torch.arange(n).repeat_interleave(turns)
    rows = torch.arange(m)
    form = choose((weight * able.form)[picture], u[:, 0])
    pair = _pick_true(able.pair[picture, form], u[:, 1:10])
    a, b = pair // MAX_OBJECTS, pair % MAX_OBJECTS
    coin = u[:, 10] < 0.5

    # what a and b are called
    def name(obj: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        how = choose(able.named[picture, obj] * _NAMING[form] + 1e-9, noise)
        color, shape = facts.color[picture, obj], facts.shape[picture, obj]
        place = (facts.row[picture, obj] * 2 + facts.column[picture, obj]).clamp(min=0)
        by_cell = how == 3
        noun = torch.where(how <= 1, pick(SHAPE_IDS, shape), TOKEN["object"])
        return (
            pick(ROW_IDS, place, by_cell), pick(COLUMN_IDS, place, by_cell),
            pick(COLOR_IDS, color, (how == 0) | (how == 2)), noun,
        )  # fmt: skip

    # count and existence: what is asked for
    counts = able.counts[picture]
    exist = form == EXIST
    klass = torch.where(u[:, 11] < torch.where(exist, 0.7, 0.5), 2, torch.where(u[:, 12] < 0.5, 0, 1))
    klass = torch.where((counts[:, 4:] >= 0).any(1), klass, 0)
    in_class = (_QUERY_CLASS == klass[:, None]) & (counts >= 0)
    has = torch.stack([(in_class & (counts == k)).any(1) for k in range(4)], dim=1)
    wanted = choose(has * torch.tensor([1.0, 1.0, 3.0, 4.0]), u[:, 13])
    wanted_query = in_class & (counts == wanted[:, None])
    wanted_yes = in_class & torch.where(coin[:, None], counts > 0, counts == 0)
    of_class = torch.where(exist[:, None], wanted_yes, wanted_query)
    noise = u[:, 14:48]
    # hard negatives: colour and shape are in the picture, but not on one object
    shapes, colors = counts[:, :4], counts[:, 4:10]
    near = (colors[:, :, None] > 0).long() + (shapes[:, None] > 0).long()
    near = torch.cat([near.new_zeros(m, 10), near.flatten(1)], dim=1)
    bonus = torch.where(((counts == 0) & (u[:, 48:49] < 0.8)), near.float(), 0.0)
    query = ((noise + bonus + 1e-6) * of_class).argmax(1)
    q_color, q_shape = _QUERY_COLOR[query], _QUERY_SHAPE[query]

    # relation
    truth = facts.related[picture, :, a, b]  # [M, 4]
    opposite = truth[:, _OPPOSITE] == 1
    false = torch.where((u[:, 49] < 0.75)[:, None], opposite, truth == 0)
    is_relation = torch.where(coin[:, None], truth == 1, false)
    possible = torch.where((form == REL_WHAT)[:, None], able.relation[picture, :, a, b], truth == 1)
    possible = torch.where((form == REL_IS)[:, None], is_relation, possible)
    relation = _pick_true(possible, u[:, 50:54] + 1e-6)

    # position
    truths = able.truths[picture, a]
    cells = torch.arange(8) < 4
    usable = torch.stack([((truths == v) & c).any(1) for c in (cells, ~cells) for v in (0, 1)], 1)
    by_cell = (usable[:, 0] & usable[:, 1]) & ((u[:, 54] < 0.5) | ~(usable[:, 2] & usable[:, 3]))
    asked_class = cells == by_cell[:, None]
    place = _pick_true((truths == coin[:, None].long()) & asked_class, u[:, 55:63] + 1e-6)
    row, column = facts.row[picture, a], facts.column[picture, a]
    home = torch.where(row < 0, 6 + column, torch.where(column < 0, 4 + row, 2 * row + column))
    place = torch.where(form == POS_IS, place, home)

    # size
    size = facts.size[picture, a]
    size_said = torch.where(coin | (size < 0), size, 1 - size)

    values = torch.stack(
        [
            *name(a, u[:, 63]), *name(b, u[:, 64]),
            pick(COLOR_IDS, q_color), torch.where(q_shape >= 0, pick(SHAPE_IDS, q_shape), TOKEN["object"]),
            torch.where(q_shape >= 0, pick(PLURAL_IDS, q_shape), TOKEN["objects"]),
            *NEAR_IDS[relation].unbind(1), *TO_IDS[relation].unbind(1),
            pick(ROW_IDS, place), pick(COLUMN_IDS, place), pick(SIZE_IDS, size_said),
            literal("?", u[:, 65] < 0.85),
        ],
        dim=1,
    )  # fmt: skip
    phrasing = _QUESTION_START[form] + (u[:, 66] * _QUESTION_COUNT[form]).long()
    question = fill(_QUESTION[phrasing], values)

    yes = torch.where(coin, TOKEN["yes"], TOKEN["no"])
    color, shape = pick(COLOR_IDS, facts.color[picture, a]), pick(SHAPE_IDS, facts.shape[picture, a])
    number = torch.where(form == COUNT_ALL, facts.count[picture], counts[rows, query].clamp(min=0))
    near_ids = NEAR_IDS[relation]
    zero = torch.zeros_like(color)
    first = torch.stack(
        [
            color, shape, NUMBER_IDS[number], NUMBER_IDS[number], yes, yes, color, near_ids[:, 0], pick(ROW_IDS, home),
            yes, color, pick(SIZE_IDS, size), yes,
        ],
        dim=1,
    )[rows, form]  # fmt: skip
    second = torch.stack(
        [zero, zero, zero, zero, zero, zero, shape, near_ids[:, 1], pick(COLUMN_IDS, home), zero, shape, zero, zero], dim=1
    )[rows, form]
    return _Asked(form, question, torch.stack([first, second], dim=1))


def description(scenes: Scenes) -> Tensor:
    """The full caption of each picture, in reading order, with holes: int64 [N, 20]."""
    order = scenes.cell.float().masked_fill(scenes.cell < 0, 9.0).argsort(1)
    color, shape, size, cell = (x.gather(1, order) for x in (scenes.color, scenes.shape, scenes.size, scenes.cell))
    present = shape >= 0
    comma = literal(",", present)
    comma[:, 0] = HOLE
    words = [
        comma, literal("a", present), pick(SIZE_IDS, size), pick(COLOR_IDS, color), pick(SHAPE_IDS, shape),
        pick(ROW_IDS, cell), pick(COLUMN_IDS, cell),
    ]  # fmt: skip
    return torch.stack(words, dim=2).flatten(1)


@dataclass(frozen=True)
class Conversations:
    """Token rows ready for a language model."""

    ids: Tensor  # [N, L] int64, padded with PAD at the end
    targets: Tensor  # [N, L] int64: the token after each place where it belongs to an answer, else -100
    segment: Tensor  # [N, L] int64: 0 picture or caption, 1.. the turn, -1 padding
    types: Tensor  # [N, Q] int64, of QUESTION_TYPES

    def __len__(self) -> int:
        return self.ids.shape[0]


def conversations(
    scenes: Scenes,
    seed: int,
    index: Tensor,
    turns: int = 8,
    *,
    image: bool = True,
    image_tokens: int = 4,
    describe: float = 0.5,
    weights: Tensor | None = None,
) -> Conversations:
    """`turns` questions about each picture, row i a pure function of (scene, seed, index[i]).

    image=True: <bos> <image> x image_tokens (<user> question <assistant> answer <eos>) x turns; image=False: a training
    caption in place of the picture, and only questions it determines. With probability `describe` the last turn asks
    for a full description (pictures only). weights: float [8], relative frequencies of QUESTION_TYPES (describe's is
    ignored). Raises ValueError for a wrong index shape or turns < 1.
    """
    n = len(scenes)
    if index.shape != (n,):
        raise ValueError(f"index must have shape [{n}], one per scene, got {list(index.shape)}")
    if turns < 1:
        raise ValueError(f"turns must be at least 1, got {turns}")
    stream = _STREAM + (0 if image else 1)
    if image:
        facts = picture_facts(scenes)
        start = torch.full((n, 1 + image_tokens), IMAGE)
    else:
        said = captions(scenes, seed, index)
        facts = caption_facts(said)
        start = torch.nn.functional.pad(said.ids, (1, 0))
    start[:, 0] = BOS
    weight = _FORM_WEIGHT if weights is None else _FORM_WEIGHT / _TYPE_TOTAL[_FORM_TYPE] * weights[_FORM_TYPE]
    u = uniform(seed, stream, index, turns * _DRAWS + 2)
    asked = _ask(facts, weight.expand(n, -1), _QUERY_HELD_OUT, u[:, 2:].reshape(n * turns, _DRAWS), turns)

    def frame(question: Tensor, answer: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
        """<user> question <assistant> answer <eos>, and which of it is answer."""
        def mark(token: int) -> Tensor:
            return (shown * token)[..., None]

        turn = torch.cat([mark(USER), question * shown[..., None], mark(ASSISTANT), answer * shown[..., None], mark(EOS)], dim=-1)
        taught = torch.zeros(turn.shape[-1], dtype=torch.bool)
        taught[-1 - answer.shape[-1] :] = True
        return turn, taught

    last = (u[:, 0] < describe) & image
    shown = torch.ones(n, turns, dtype=torch.bool)
    shown[:, -1] = ~last
    body, taught = frame(asked.question.view(n, turns, -1), asked.answer.view(n, turns, -1), shown)
    width = body.shape[2]
    pieces = [start, body.flatten(1)]
    taughts = [torch.zeros(start.shape[1], dtype=torch.bool), taught.repeat(turns)]
    segments = [torch.zeros(start.shape[1], dtype=torch.int64), torch.arange(1, turns + 1).repeat_interleave(width)]
    types = _FORM_TYPE[asked.form].view(n, turns)
    if image:
        request = _DESCRIBE_IDS[(u[:, 1] * len(_DESCRIBE)).long()]
        final, taught = frame(request, description(scenes), last)
        pieces.append(final)
        taughts.append(taught)
        segments.append(torch.full((final.shape[1],), turns))
        types[:, -1] = torch.where(last, QUESTION_TYPES.index("describe"), types[:, -1])
    everything = torch.cat(pieces, dim=1)
    answer = torch.cat(taughts).expand_as(everything)
    ids, is_answer, segment, _ = squeeze(everything, answer, torch.cat(segments).expand_as(everything), fills=(0, -1))
    targets = torch.where(is_answer, ids, IGNORE)
    targets = torch.cat([targets[:, 1:], targets.new_full((n, 1), IGNORE)], dim=1)
    return Conversations(ids, targets, segment, types)


_TYPE_TOTAL = torch.zeros(len(QUESTION_TYPES)).index_add(0, _FORM_TYPE, _FORM_WEIGHT)


@dataclass(frozen=True)
class Questions:
    """Evaluation questions about fresh pictures."""

    scenes: Scenes
    question: Tensor  # [n, Lq] int64, words only, padded with PAD at the end
    answer: Tensor  # [n, La] int64, words only, padded with PAD at the end

    def __len__(self) -> int:
        return self.question.shape[0]

    def question_text(self) -> list[str]:
        return [decode(row) for row in self.question]

    def answer_text(self) -> list[str]:
        return [decode(row) for row in self.answer]


def questions(kind: str, n: int, seed: int, *, held_out: bool = False) -> Questions:
    """`n` questions of one of QUESTION_TYPES about fresh pictures.

    held_out=True: every object of every picture is a held-out (colour, shape) pair, and negatives may name any pair;
    otherwise no held-out pair occurs. Raises ValueError for an unknown type.
    """
    if kind not in QUESTION_TYPES:
        raise ValueError(f"kind must be one of {QUESTION_TYPES}, got {kind!r}")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    index = torch.arange(4 * n + 16)
    scenes = sample(seed + 104_729, index, held_out="only" if held_out else "exclude")
    number = QUESTION_TYPES.index(kind)
    if kind == "describe":
        scenes = scenes[:n]
        request = _DESCRIBE_IDS[index[:n] % len(_DESCRIBE)]
        return Questions(scenes, squeeze(request)[0], squeeze(description(scenes))[0])
    weight = torch.where(_FORM_TYPE == number, _FORM_WEIGHT, 0.0)
    facts = picture_facts(scenes)
    hidden = torch.zeros_like(_QUERY_HELD_OUT) if held_out else _QUERY_HELD_OUT
    able = _analyse(facts, hidden).form & (weight > 0)
    fit = able.any(1).nonzero()[:n, 0]
    if len(fit) < n:
        raise ValueError(f"only {len(fit)} of {len(index)} pictures allow a {kind!r} question, {n} were asked for")
    facts = Facts(*(getattr(facts, field.name)[fit] for field in fields(Facts)))
    u = uniform(seed + 104_729, _STREAM + 2, index[fit], _DRAWS)
    asked = _ask(facts, weight.expand(n, -1), hidden, u, 1)
    return Questions(scenes[fit], squeeze(asked.question)[0], squeeze(asked.answer)[0])
