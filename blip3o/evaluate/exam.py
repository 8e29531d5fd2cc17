"""The exam: unseen prompts to draw and questions on unseen pictures, the same for every model, nothing selected.

Shapes: P prompts, S = 4 seeds, N questions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from blip3o import generate
from blip3o.data import scenes, text
from blip3o.evaluate.judge import judge
from blip3o.evaluate.scores import HELD_OUT
from blip3o.model import Blip3o

SEEDS = (0, 1, 2, 3)  # of the four drawings of each prompt
PARTS = {"tune": 1, "report": 2}  # recipes are chosen on one set of prompts and reported on the other
PICTURE_SEEDS = {"tune": 10_001, "report": 20_002}  # of the questions' pictures; no stage trains on these seeds
ASKED = tuple(kind for kind in text.QUESTION_TYPES if kind != "describe")
CHUNK = 400  # drawings or questions at a time


@dataclass(frozen=True)
class Drawn:
    """A category's prompts and what was drawn: pictures float [P, S, 3, 32, 32], verdicts bool [P, S]."""

    prompts: text.Captions
    pictures: Tensor
    verdicts: Tensor


@dataclass(frozen=True)
class Answered:
    """Questions of one type, the answers given (ids [N, L], padded), and which are right, bool [N]."""

    questions: text.Questions
    answers: Tensor
    correct: Tensor


def draw_prompts(model: Blip3o, part: str, count: int) -> dict[str, Drawn]:
    """`count` prompts of every category, each drawn with the four seeds and judged."""
    if count < 1:
        raise ValueError(f"count must be at least 1 prompt of each category, got {count}")
    drawn = {}
    for category in text.CATEGORIES:
        prompts = text.prompts(category, PARTS[part], count)
        ids, mask = (rows.repeat_interleave(len(SEEDS), 0) for rows in text.drawing_prompts(prompts))
        seeds = list(SEEDS) * count
        pictures = torch.cat(
            [
                generate.draw(model, ids[at : at + CHUNK], mask[at : at + CHUNK], seeds[at : at + CHUNK])
                for at in range(0, len(ids), CHUNK)
            ]
        )
        verdicts = judge(pictures, prompts[torch.arange(count).repeat_interleave(len(SEEDS))])
        shape = (count, len(SEEDS))
        drawn[category] = Drawn(prompts, pictures.view(*shape, *pictures.shape[1:]), verdicts.view(shape))
    return drawn


def answer_questions(model: Blip3o, part: str, count: int) -> tuple[dict[str, Answered], dict[str, Tensor]]:
    """`count` questions of every type on fresh pictures; returns them by type, and the verdicts bool [N] by type.

    The verdicts have one more key, `held_out`: as many questions, over all types, on pictures of held-out pairs alone.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1 question of each type, got {count}")
    answered = {kind: _answer(model, text.questions(kind, count, PICTURE_SEEDS[part])) for kind in ASKED}
    few = -(-count // len(ASKED))
    held_out = [_answer(model, text.questions(kind, few, PICTURE_SEEDS[part], held_out=True)) for kind in ASKED]
    verdicts = {kind: result.correct for kind, result in answered.items()}
    verdicts[HELD_OUT] = torch.cat([result.correct for result in held_out])
    return answered, verdicts


def _answer(model: Blip3o, asked: text.Questions) -> Answered:
    ids, mask = text.question_prompts(asked, model.config.feature_grid**2)
    with torch.inference_mode():
        features = model.features(scenes.render(asked.scenes))
    answers = torch.cat(
        [
            _widen(generate.answer_ids(model, ids[at : at + CHUNK], mask[at : at + CHUNK], features[at : at + CHUNK]))
            for at in range(0, len(ids), CHUNK)
        ]
    )
    return Answered(asked, answers, (answers == _widen(asked.answer)).all(1))


def _widen(ids: Tensor) -> Tensor:
    """Answers without their end token, padded on the right to the width of the longest answer there may be."""
    ids = ids.masked_fill(ids == text.EOS, text.PAD)
    return torch.nn.functional.pad(ids, (0, generate.LONGEST_ANSWER - ids.shape[1]), value=text.PAD)
