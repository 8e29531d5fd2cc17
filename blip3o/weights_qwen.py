"""Qwen2.5-VL's own folder, which the released models began with: its embedding is made into theirs.

Qwen2.5-VL's embedding has a row for each word of its tokenizer, and more that belong to no word. The released models'
has rows for the same words, then for [IMG], [/IMG] and <image>, and ends there. So has the output, where it is not the
embedding itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip3o.config import Blip3oConfig
from blip3o.model import Blip3o
from blip3o.qwen_processor import TOKENIZER, complete_tokenizer
from blip3o.weights_config import read_qwen
from blip3o.weights_files import TensorFiles, put_tensor
from blip3o.weights_names import EMBEDDING, OUTPUT

BY_WORD = {"llm.embedding.weight": EMBEDDING, "llm.out.weight": OUTPUT}  # tensors with a row for each word
PIECE = 4096  # rows that are summed in float64 at once


@dataclass(frozen=True)
class Words:
    """Rows of Qwen2.5-VL's embedding: `rows` in its files, of which the first `held` are of words of ours."""

    rows: int
    held: int

    @classmethod
    def of(cls, place: Path, values: Mapping[str, Any], config: Blip3oConfig) -> "Words":
        """For a model of `config`, from a folder whose config.json holds `values`.

        Raises what `read_qwen` and `complete_tokenizer` do, ValueError for a tokenizer with more words than rows.
        """
        rows = read_qwen(values, place)[0].vocab_size
        _, held = complete_tokenizer(place, config)
        if rows < held:
            raise ValueError(f"{place}: vocab_size must be at least the {held} words of {TOKENIZER}, got {rows}")
        return cls(rows, held)

    def shapes(self, config: Blip3oConfig) -> dict[str, tuple[int, ...]]:
        """Of the tensors with a row for each word, in Qwen2.5-VL's files."""
        own = [theirs for theirs in BY_WORD.values() if theirs != OUTPUT or not config.llm.tie_embeddings]
        return dict.fromkeys(own, (self.rows, config.llm.width))

    def fill(self, model: Blip3o, files: TensorFiles, names: Mapping[str, str]) -> list[str]:
        """Give the model its tensors with a row for each word, in float32; `names`: see `old_names`.

        Rows of words that Qwen2.5-VL has are copied. Each new one is their mean, as in the released models, where it
        stays so: they are frozen. It is summed in float64. Returns names for the new rows, none if there are none.
        """
        state, new = model.state_dict(), []
        for name in [name for name in BY_WORD if name in state]:
            tensor = torch.empty_like(state[name], dtype=torch.float32)
            files.copy(names[BY_WORD[name]], tensor[: self.held], first=self.held)
            if self.held < len(tensor):
                tensor[self.held :] = _mean(tensor[: self.held])
                new.append(f"{name}[{self.held}:{len(tensor)}]")
            put_tensor(model, name, tensor)
        return new


def _mean(rows: Tensor) -> Tensor:
    """Piece by piece: all rows in float64 would need twice the memory of the weights themselves."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for piece in rows.split(PIECE):
        total += piece.sum(0, dtype=torch.float64)
    return total / len(rows)
