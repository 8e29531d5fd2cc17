"""Pictures of fixed prompts while a model learns to draw, always from the same noise: RUN/samples/step-000500.png."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from blip3o.generate import generate
from blip3o.model import Blip3o
from blip3o.processor import Processor, to_pil

EACH = 4  # drawings of a prompt, side by side
GAP = 2  # white pixels between drawings


def draw_prompts(model: Blip3o, processor: Processor, prompts: Sequence[str]) -> Tensor:
    """EACH drawings of each prompt, a row each: [3, H, W] in 0..1."""
    pictures = generate(model, processor, list(prompts), n=EACH)
    side = pictures.shape[-1] + GAP
    sheet = pictures.new_ones(3, len(prompts) * side - GAP, EACH * side - GAP)
    for i, picture in enumerate(pictures):
        top, left = i // EACH * side, i % EACH * side
        sheet[:, top : top + side - GAP, left : left + side - GAP] = picture
    return sheet


def save_picture(sheet: Tensor, path: Path) -> None:
    """Write a picture [3, H, W], whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image, beside = to_pil(sheet), path.with_name(path.name + ".new")
    image.save(beside, format="PNG")
    beside.replace(path)
