"""Samples of shards as the model reads them: captions as prompts to draw, conversations with their answers to learn.

Nano's world has a frame of its own; the released models have Qwen2.5-VL's template. What cannot be framed is a fault.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from blip3o.config import Blip3oConfig
from blip3o.data import text
from blip3o.data.llava import Turn
from blip3o.data.packing import TokenRow
from blip3o.data.shards import Wrong
from blip3o.llm import multimodal_positions
from blip3o.processor import Processor, square
from blip3o.qwen_processor import PAD, PICTURE, SYSTEM, QwenProcessor

Grid = tuple[int, int, int]  # frames, rows, columns of a picture in patches


@dataclass(frozen=True)
class Dialogue:
    """A conversation as a row of tokens. seen: what its picture becomes for the tower that reads it, in patches of
    `grid` or, where features are read, as the square [3, S, S] that the CLIP tower sees; None without a picture."""

    row: TokenRow
    seen: Tensor | None
    grid: Grid | None


class Framing(Protocol):
    """max_tokens: of a prompt with its queries, and of a conversation."""

    max_tokens: int

    def prompt(self, caption: str) -> tuple[list[int], bool]:
        """Ids of a caption to be drawn, up to where the queries follow; whether it was cut. Raises Wrong."""

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Prompts as a batch: ids int64 [P, T], mask bool [P, T], True for text."""

    def dialogue(self, turns: Sequence[Turn], picture: Image.Image | None, features: bool) -> Dialogue:
        """A conversation; features: what its picture shows is stored, and it need not be looked at. Raises Wrong."""


def framing(processor: Processor | QwenProcessor, config: Blip3oConfig, max_tokens: int) -> Framing:
    """The frame of a model's texts. Raises ValueError for too few tokens."""
    if isinstance(processor, QwenProcessor):
        return QwenFraming(processor, config, max_tokens)
    return WorldFraming(processor, config, max_tokens)


class WorldFraming:
    """Nano's frame: <bos> words <image_start>; <bos> <image>... (<user> words <assistant> words <eos>)..."""

    def __init__(self, processor: Processor, config: Blip3oConfig, max_tokens: int) -> None:
        self.processor, self.max_tokens = processor, max_tokens
        self.side, self.image_tokens = config.clip.image_size, config.feature_grid**2
        self.room = _room(config, max_tokens, 2)

    def prompt(self, caption: str) -> tuple[list[int], bool]:
        ids = self._encode(caption)
        return text.drawing_prompt(ids[: self.room]), len(ids) > self.room

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        return text.left_pad(rows)

    def dialogue(self, turns: Sequence[Turn], picture: Image.Image | None, features: bool) -> Dialogue:
        pictured = any(turn.pictured for turn in turns)
        if turns[0].role == "system" or (pictured and not turns[0].pictured):
            raise Wrong("conversation", "this model's frame has no system turn, and a picture in the first turn only")
        ids = [text.BOS] + [text.IMAGE] * self.image_tokens * pictured
        taught = [False] * len(ids)
        for turn in turns:
            asked = turn.role == "user"
            words = self._encode(turn.text)
            ids += [text.USER, *words] if asked else [text.ASSISTANT, *words, text.EOS]
            taught += [False] + [not asked] * (len(words) + (not asked))
        row = _token_row(ids, taught, self.max_tokens, torch.arange(len(ids)).expand(3, -1))
        return Dialogue(row, None if picture is None or features else square(picture, self.side, "center"), None)

    def _encode(self, words: str) -> list[int]:
        try:
            return self.processor.encode(words)
        except ValueError as error:
            raise Wrong("text", str(error)) from error


class QwenFraming:
    """Qwen2.5-VL's template, prompts as in the released training: the assistant's empty turn is closed before [IMG]."""

    def __init__(self, processor: QwenProcessor, config: Blip3oConfig, max_tokens: int) -> None:
        self.processor, self.config, self.max_tokens = processor, config, max_tokens
        self.special = tuple(processor.tokenizer.get_added_vocab())
        self.room = _room(config, max_tokens, 1)

    def prompt(self, caption: str) -> tuple[list[int], bool]:
        self._check(caption)
        *ids, start = self.processor.drawing_prompt(caption, "training")
        return [*ids[: self.room], start], len(ids) > self.room

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        return self.processor.pad(rows)

    def dialogue(self, turns: Sequence[Turn], picture: Image.Image | None, features: bool) -> Dialogue:
        """Each answer is encoded by itself, as it is said: what comes before it ends in a line of its own."""
        patches, grid, shown = None, None, ""
        if picture is not None:
            found = self.processor.images(images=[picture], return_tensors="pt")
            patches, grid = found["pixel_values"], tuple(found["image_grid_thw"][0].tolist())
            shown = PICTURE.replace(PAD, PAD * (grid[0] * grid[1] * grid[2] // self.processor.images.merge_size**2))
        opening = [] if turns[0].role == "system" else [Turn("system", SYSTEM)]
        ids: list[int] = []
        taught: list[bool] = []
        before = ""
        for turn in [*opening, *turns]:
            self._check(turn.text)
            before += f"<|im_start|>{turn.role}\n"
            if turn.role != "assistant":
                before += f"{shown * turn.pictured}{turn.text}<|im_end|>\n"
                continue
            for words, learnt in ((before, False), (f"{turn.text}<|im_end|>", True)):
                more = self.processor.encode(words)
                ids += more
                taught += [learnt] * len(more)
            before = "\n"
        positions = torch.arange(len(ids)).expand(3, -1)
        if grid is not None:
            merge = self.processor.images.merge_size
            sizes = torch.tensor([[grid[1] // merge, grid[2] // merge]])
            positions = multimodal_positions(torch.tensor([ids]), None, self.config.image_token, sizes)[:, 0]
        return Dialogue(_token_row(ids, taught, self.max_tokens, positions), patches, grid)

    def _check(self, words: str) -> None:
        """Data must not speak as the template does."""
        found = [word for word in self.special if word in words]
        if found:
            raise Wrong("text", f"it holds words of the template: {', '.join(found)}")


def _room(config: Blip3oConfig, max_tokens: int, frame: int) -> int:
    """Tokens left for a prompt's text beside its queries and `frame` tokens of its frame."""
    room = max_tokens - config.num_queries - frame
    if room < 1:
        raise ValueError(
            f"max_tokens must be above {config.num_queries + frame}, of queries and frame, got {max_tokens}"
        )
    return room


def _token_row(ids: list[int], taught: list[bool], max_tokens: int, positions: Tensor) -> TokenRow:
    if len(ids) > max_tokens:
        raise Wrong("tokens", f"a conversation of {len(ids)} tokens, at most {max_tokens} are read")
    following = [token if learnt else text.IGNORE for token, learnt in zip(ids[1:], taught[1:], strict=True)]
    return TokenRow(torch.tensor(ids), torch.tensor([*following, text.IGNORE]), positions)
