"""Conversations about pictures and captions to train on, and single questions to evaluate with.

Shape legend: N pictures, Q turns, L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from blip3o.data.captions import captions
from blip3o.data.facts import Facts, caption_facts, picture_facts
from blip3o.data.questions import (
    COUNT,
    COUNT_ALL,
    DRAWS,
    EXIST,
    FORM_TYPE,
    FORM_WEIGHT,
    FORMS,
    POS_WHAT,
    QUERY_HELD_OUT,
    QUESTION_TYPES,
    REL_IS,
    REL_WHERE,
    answerable,
    ask,
)
from blip3o.data.scenes import Scenes, sample, uniform
from blip3o.data.words import (
    ASSISTANT,
    BOS,
    COLOR_IDS,
    COLUMN_IDS,
    EOS,
    HOLE,
    IGNORE,
    IMAGE,
    RENAME_DRAWS,
    ROW_IDS,
    SHAPE_IDS,
    SIZE_IDS,
    USER,
    compile_templates,
    decode,
    literal,
    pick,
    rename,
    squeeze,
)

_DESCRIBE = ("describe the picture", "what is in the picture ?", "what do you see ?", "describe what you see")
_DESCRIBE_IDS = compile_templates(_DESCRIBE, {})
_TYPE_WEIGHT = torch.zeros(len(QUESTION_TYPES)).index_add(0, FORM_TYPE, FORM_WEIGHT)
# most captions settle little but what there is: without this, half of the questions about captions would ask for that
_TEXT_BALANCE = torch.ones(len(FORMS))
_TEXT_BALANCE[[COUNT_ALL, COUNT, EXIST]] = 0.4
_TEXT_BALANCE[REL_IS : REL_WHERE + 1] = 4.0
_TEXT_BALANCE[POS_WHAT] = 4.0
_FRESH = 104_729  # added to the seed: evaluation pictures are not those of a training run with the same seed
_STREAM = 128  # streams 128.. of the hash: about pictures, about captions, for evaluation, nonce words


def description(facts: Facts, order: Tensor) -> Tensor:
    """All that is known of each object, with holes: int64 [N, 21].

    order [N, O] ranks the objects, the smallest first. In training it is random: what follows "a small red" must then
    be looked up in the picture, while in a fixed order the place in the sentence would tell.
    """
    order = order.masked_fill(~facts.present, torch.inf).argsort(1)
    size, color, shape, row, column, present = (
        x.gather(1, order) for x in (facts.size, facts.color, facts.shape, facts.row, facts.column, facts.present)
    )
    comma = literal(",", present)
    comma[:, 0] = HOLE
    half = torch.where(row >= 0, 4 + row, torch.where(column >= 0, 6 + column, -1))
    place = torch.where((row >= 0) & (column >= 0), 2 * row + column, half)
    words = [
        comma, literal("a", present), pick(SIZE_IDS, size), pick(COLOR_IDS, color), pick(SHAPE_IDS, shape),
        pick(ROW_IDS, place), pick(COLUMN_IDS, place),
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
    nonce: float = 0.0,
    weights: Tensor | None = None,
) -> Conversations:
    """`turns` questions about each picture, row i a pure function of (scene, seed, index[i]).

    image=True: <bos> <image> x image_tokens (<user> question <assistant> answer <eos>) x turns; image=False: a training
    caption in place of the picture, and only questions it determines. With probability `describe` the last turn asks
    for a description instead: all that is known of each object, the objects in any order. With probability `nonce` a
    conversation about a caption calls some colours and shapes by nonce words (`words.rename`). weights: float [8],
    relative frequencies of QUESTION_TYPES (describe's is ignored).

    Raises ValueError for a wrong index shape or turns < 1.
    """
    n = len(scenes)
    if index.shape != (n,):
        raise ValueError(f"index must have shape [{n}], one per scene, got {list(index.shape)}")
    if turns < 1:
        raise ValueError(f"turns must be at least 1, got {turns}")
    weight = FORM_WEIGHT if weights is None else (FORM_WEIGHT / _TYPE_WEIGHT[FORM_TYPE]) * weights[FORM_TYPE]
    u = uniform(seed, _STREAM if image else _STREAM + 1, index, 5 + turns * DRAWS)
    described = u[:, 0] < describe
    if image:
        facts = picture_facts(scenes)
        start = torch.full((n, 1 + image_tokens), IMAGE)
    else:
        said = captions(scenes, seed, index)
        facts, weight = caption_facts(said), weight * _TEXT_BALANCE
        start = pad(said.ids, (1, 0))
    start[:, 0] = BOS

    asked = ask(facts, weight, QUERY_HELD_OUT, u[:, 5:].reshape(n * turns, DRAWS), turns)
    shown = torch.ones(n, turns, dtype=torch.bool)
    shown[:, -1] = ~described
    body, taught = _frame(asked.question.view(n, turns, -1), asked.answer.view(n, turns, -1), shown)
    types = FORM_TYPE[asked.form].view(n, turns)
    pieces, answers = [start, body.flatten(1)], [torch.zeros(start.shape[1], dtype=torch.bool), taught.repeat(turns)]
    segments = [torch.arange(turns + 1).repeat_interleave(torch.tensor([start.shape[1], *[len(taught)] * turns]))]
    request = _DESCRIBE_IDS[(u[:, 1] * len(_DESCRIBE)).long()]
    final, taught = _frame(request, description(facts, u[:, 2:5]), described)
    pieces.append(final)
    answers.append(taught)
    segments.append(torch.full((len(taught),), turns))
    types[:, -1] = torch.where(described, QUESTION_TYPES.index("describe"), types[:, -1])

    whole = torch.cat(pieces, dim=1)
    ids, answer, segment, _ = squeeze(
        whole, torch.cat(answers).expand_as(whole), torch.cat(segments).expand_as(whole), fills=(0, -1)
    )
    if nonce and not image:
        u = uniform(seed, _STREAM + 3, index, 1 + RENAME_DRAWS)
        ids = torch.where(u[:, :1] < nonce, rename(ids, u[:, 1:]), ids)
    targets = torch.where(answer, ids, IGNORE)
    targets = torch.cat([targets[:, 1:], targets.new_full((n, 1), IGNORE)], dim=1)
    return Conversations(ids, targets, segment, types)


def _frame(question: Tensor, answer: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
    """<user> question <assistant> answer <eos>, or holes only where not shown: [..., T]; bool [T], what is taught."""

    def mark(token: int) -> Tensor:
        return (shown * token)[..., None]

    kept = shown[..., None]
    turn = torch.cat([mark(USER), question * kept, mark(ASSISTANT), answer * kept, mark(EOS)], dim=-1)
    return turn, torch.arange(turn.shape[-1]) >= turn.shape[-1] - answer.shape[-1] - 1


@dataclass(frozen=True)
class Questions:
    """Evaluation questions about fresh pictures."""

    scenes: Scenes
    form: Tensor  # [n] int64, of FORMS; -1 for descriptions
    question: Tensor  # [n, Lq] int64, words only, padded with PAD at the end
    answer: Tensor  # [n, La] int64, words only, padded with PAD at the end

    def __len__(self) -> int:
        return self.question.shape[0]

    def question_text(self) -> list[str]:
        return [decode(row) for row in self.question]

    def answer_text(self) -> list[str]:
        return [decode(row) for row in self.answer]


def questions(kind: str, n: int, seed: int, *, held_out: bool = False) -> Questions:
    """`n` questions of one of QUESTION_TYPES, each about a fresh picture.

    held_out=True: every object of every picture is a held-out (colour, shape) pair, and what is not there may be any
    pair; otherwise no held-out pair occurs. Answers of "count" are as even as the pictures allow. Raises ValueError for
    an unknown kind or n < 1.
    """
    if kind not in QUESTION_TYPES:
        raise ValueError(f"kind must be one of {QUESTION_TYPES}, got {kind!r}")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    index = torch.arange(4 * n + 64)
    scenes = sample(seed + _FRESH, index, held_out="only" if held_out else "exclude")
    if kind == "describe":
        scenes, request = scenes[:n], _DESCRIBE_IDS[index[:n] % len(_DESCRIBE)]
        answer = description(picture_facts(scenes), scenes.cell.float())
        return Questions(scenes, torch.full((n,), -1), squeeze(request)[0], squeeze(answer)[0])
    weight = FORM_WEIGHT * FORM_TYPE.eq(QUESTION_TYPES.index(kind))
    hidden = QUERY_HELD_OUT if not held_out else torch.zeros_like(QUERY_HELD_OUT)
    facts = picture_facts(scenes)
    usable = ((answerable(facts, hidden).weight * weight).sum(1) > 0).nonzero()[:, 0]
    asked = ask(facts[usable], weight, hidden, uniform(seed + _FRESH, _STREAM + 2, usable, DRAWS), 1)
    if kind == "count":  # the k-th question of each answer comes before the k + 1-th of any
        same = asked.answer[:, :1] == asked.answer[:, 0]
        turn = (same & torch.ones_like(same).tril(-1)).sum(1)
        chosen = turn.argsort(stable=True)[:n].sort().values
    else:
        chosen = torch.arange(min(n, len(usable)))
    if len(chosen) < n:
        raise ValueError(f"n must be at most {len(chosen)} for {kind!r} questions of seed {seed}, got {n}")
    question, answer = squeeze(asked.question[chosen])[0], squeeze(asked.answer[chosen])[0]
    return Questions(scenes[usable[chosen]], asked.form[chosen], question, answer)
