"""Scenes of nano's world as samples of shards: picture, caption, and in JSON captions, conversations and facts."""

import io
import json
from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor

from blip3o.data import scenes
from blip3o.data.captions import captions
from blip3o.data.conversations import conversations, description
from blip3o.data.facts import picture_facts
from blip3o.data.llava import IMAGE
from blip3o.data.words import ASSISTANT, EOS, USER, decode, squeeze

PICTURE_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
BATCH = 256  # scenes drawn at a time


def scene_samples(
    seed: int, count: int, picture: str = "png", turns: int = 3, side: int | None = None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Scenes 0..count-1 of a seed as samples: picture, text and JSON.

    picture: "png" (exact), "jpg" or "webp", `side` pixels wide, by default as the world draws it. text: a training
    caption. JSON: that caption as the short one and all that can be told as the long one; `turns` questions about the
    picture and their answers, as LLaVA writes conversations; and what is in the picture.
    Raises ValueError for another picture format, turns or side below 1.
    """
    if picture not in PICTURE_FORMATS:
        raise ValueError(f"picture must be of {', '.join(PICTURE_FORMATS)}, got {picture!r}")
    if turns < 1 or (side is not None and side < 1):
        raise ValueError(f"turns and side must be at least 1, got {turns} and {side}")
    for start in range(0, count, BATCH):
        index = torch.arange(start, min(start + BATCH, count))
        batch = scenes.sample(seed, index)
        said = captions(batch, seed, index)
        told = squeeze(description(picture_facts(batch), batch.cell.float()))[0]
        asked = conversations(batch, seed, index, turns)
        pixels = scenes.render(batch).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        for row, i in enumerate(index.tolist()):
            image = Image.fromarray(pixels[row].numpy())
            if side is not None:
                image = image.resize((side, side), Image.Resampling.NEAREST)
            file = io.BytesIO()
            image.save(file, PICTURE_FORMATS[picture])
            objects = [
                {
                    "size": scenes.SIZES[batch.size[row, o]],
                    "color": scenes.COLORS[batch.color[row, o]],
                    "shape": scenes.SHAPES[batch.shape[row, o]],
                    "cell": scenes.CELLS[batch.cell[row, o]],
                }
                for o in range(int(batch.count[row]))
            ]
            caption = decode(said.ids[row])
            table = {
                "captions": {"short": caption, "long": decode(told[row])},
                "conversations": turns_of(asked.ids[row]),
                "seed": seed,
                "index": i,
                "objects": objects,
            }
            yield f"{i:08}", {picture: file.getvalue(), "txt": caption.encode(), "json": json.dumps(table).encode()}


def turns_of(ids: Tensor) -> list[dict[str, str]]:
    """A conversation about a picture, ids [L] as `conversations` frames them, as LLaVA's turns."""
    turns: list[dict[str, str]] = []
    words = ids.tolist()
    at = [place for place, word in enumerate(words) if word in (USER, ASSISTANT, EOS)]
    for user, assistant, end in zip(at[::3], at[1::3], at[2::3], strict=True):
        question = decode(ids[user + 1 : assistant])
        turns.append({"from": "human", "value": question if turns else f"{IMAGE}\n{question}"})
        turns.append({"from": "gpt", "value": decode(ids[assistant + 1 : end])})
    return turns
