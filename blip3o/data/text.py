"""All text of the world under one name: words, captions, prompts, questions; and the frames a model reads them in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from blip3o.data.captions import CAPTION_KINDS, CATEGORIES, SPLITS, Captions, captions, prompts
from blip3o.data.conversations import Conversations, Questions, conversations, questions
from blip3o.data.questions import FORMS, QUESTION_TYPES
from blip3o.data.words import (
    ASSISTANT,
    BOS,
    EOS,
    IGNORE,
    IMAGE,
    IMAGE_START,
    PAD,
    SPECIAL,
    UNK,
    USER,
    VOCAB_SIZE,
    WORDS,
    decode,
    split,
)

__all__ = [
    "ASSISTANT", "BOS", "CAPTION_KINDS", "CATEGORIES", "EOS", "FORMS", "IGNORE", "IMAGE", "IMAGE_START", "PAD",
    "QUESTION_TYPES", "SPECIAL", "SPLITS", "UNK", "USER", "VOCAB_SIZE", "WORDS", "Captions", "Conversations",
    "Questions", "captions", "conversations", "decode", "drawing_prompt", "drawing_prompts", "join", "left_pad",
    "picture_prompt", "prompts", "question_prompt", "question_prompts", "questions", "split",
]  # fmt: skip


def drawing_prompt(ids: Sequence[int]) -> list[int]:
    """<bos> words <image_start>, to which the model appends its queries. Text to be asked about begins the same way."""
    return [BOS, *ids, IMAGE_START]


def question_prompt(ids: Sequence[int], image_tokens: int = 4) -> list[int]:
    """<bos> <image> x image_tokens <user> words <assistant>: the answer follows."""
    return [BOS, *[IMAGE] * image_tokens, USER, *ids, ASSISTANT]


def picture_prompt(image_tokens: int = 4) -> list[int]:
    """<bos> <image> x image_tokens <image_start>: the picture itself as the prompt, to be drawn once more."""
    return [BOS, *[IMAGE] * image_tokens, IMAGE_START]


def left_pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of ids of any lengths as one batch, padded at the front: ids int64 [N, L], mask bool [N, L] (False: pad)."""
    if not rows:
        raise ValueError("rows must hold at least one row of ids, got none")
    width = max(len(row) for row in rows)
    ids = torch.tensor([[PAD] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return ids, mask


def join(*batches: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Batches of ids [N, L] and mask [N, L] padded at the front, one below the other, padded to the longest."""
    width = max(ids.shape[1] for ids, _ in batches)
    wide = [[pad(rows, (width - rows.shape[1], 0)) for rows in batch] for batch in batches]
    return torch.cat([ids for ids, _ in wide]), torch.cat([mask for _, mask in wide])


def _framed(front: Sequence[int], ids: Tensor, back: Sequence[int]) -> tuple[Tensor, Tensor]:
    """front + ids without their padding + back, padded at the front."""
    n, width = ids.shape
    length = (ids != PAD).sum(1)
    shift = width - length
    moved = ids.gather(1, (torch.arange(width) - shift[:, None]).clamp(min=0))
    whole = torch.cat([ids.new_zeros(n, len(front)), moved, torch.tensor(back).expand(n, -1)], dim=1)
    start = torch.arange(len(front)) + shift[:, None]
    whole = whole.scatter(1, start, torch.tensor(front).expand(n, -1))
    mask = torch.arange(whole.shape[1]) >= shift[:, None]
    return whole * mask, mask


def drawing_prompts(said: Captions) -> tuple[Tensor, Tensor]:
    """`drawing_prompt` of a batch of captions: ids int64 [N, L], mask bool [N, L], padded at the front."""
    return _framed((BOS,), said.ids, (IMAGE_START,))


def question_prompts(asked: Questions, image_tokens: int = 4) -> tuple[Tensor, Tensor]:
    """`question_prompt` of a batch of questions: ids int64 [N, L], mask bool [N, L], padded at the front."""
    return _framed((BOS, *[IMAGE] * image_tokens, USER), asked.question, (ASSISTANT,))
