"""``samples.png``: prompts and what was drawn for them, with the judge's verdicts, in one labelled picture.

Shapes: S drawings of a prompt, H x W pixels; pictures are float [.., 3, H, W] with values in [0, 1] (clamped to it).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

NAMES = {
    "overall": "Overall",
    "single_object": "Single object",
    "two_object": "Two objects",
    "counting": "Counting",
    "colors": "Colours",
    "position": "Position",
    "color_attribution": "Attribute binding",
    "held_out": "Held-out pairs",
}
INK, SOFT, PAPER, LINE, RIGHT, WRONG = "#1b1b1a", "#74726c", "#ffffff", "#d9d7d1", "#2a7f4f", "#b4402f"


@dataclass(frozen=True)
class Drawings:
    """One prompt and what was drawn for it: ``pictures`` float [S, 3, H, W], the judge's verdict on each."""

    category: str
    prompt: str
    pictures: Tensor
    verdicts: tuple[bool, ...]

    def __post_init__(self) -> None:
        check_pictures("pictures", self.pictures, 4)
        if len(self.verdicts) != self.pictures.shape[0]:
            raise ValueError(f"verdicts: expected {self.pictures.shape[0]}, one per picture, got {len(self.verdicts)}")


def samples_png(path: str | Path, rows: Sequence[Drawings], *, columns: int = 2, scale: int = 4) -> None:
    """Writes a labelled grid: every prompt's category, text and drawings, each drawing with the judge's tick or cross.

    Pictures are enlarged ``scale`` times without smoothing. Rows fill the first column, then the next. ValueError
    without rows, or where rows differ in their number of drawings or picture size.
    """
    if not rows:
        raise ValueError("rows: expected at least one, got none")
    shapes = {tuple(row.pictures.shape) for row in rows}
    if len(shapes) != 1:
        raise ValueError(f"rows: expected pictures of one shape [S, 3, H, W], got {sorted(shapes)}")
    seeds, _, height, width = next(iter(shapes))
    label, gap, margin, tile_w, tile_h = 190, 12, 28, width * scale, height * scale
    small, normal = ImageFont.load_default(13), ImageFont.load_default(17)
    columns = min(columns, len(rows))
    per_column = math.ceil(len(rows) / columns)
    texts = [_wrap(row.prompt, normal, label) for row in rows]
    band_w, band_h = label + gap + seeds * (tile_w + gap), max(tile_h, 22 + 22 * max(map(len, texts))) + gap + 4
    sheet = Image.new(
        "RGB", (margin * (columns + 1) + columns * band_w - gap, 2 * margin + per_column * band_h - gap), PAPER
    )
    pen = ImageDraw.Draw(sheet)
    for index, row in enumerate(rows):
        x = margin + index // per_column * (band_w + margin)
        y = margin + index % per_column * band_h
        pen.text((x, y), NAMES.get(row.category, row.category), fill=SOFT, font=small)
        for line, text in enumerate(texts[index]):
            pen.text((x, y + 22 + 22 * line), text, fill=INK, font=normal)
        for seed, right in enumerate(row.verdicts):
            left = x + label + gap + seed * (tile_w + gap)
            picture = to_image(row.pictures[seed]).resize((tile_w, tile_h), Image.Resampling.NEAREST)
            sheet.paste(picture, (left, y))
            pen.rectangle((left - 1, y - 1, left + tile_w, y + tile_h), outline=LINE)
            sheet.paste(badge := _badge(right), (left + tile_w - 13, y - 7), badge)
    sheet.save(path, format="PNG", optimize=True)


def _badge(right: bool, size: int = 20, finer: int = 8) -> Image.Image:
    """A small disc with a tick or a cross, drawn ``finer`` times too large and reduced."""
    big = size * finer
    mark = Image.new("RGBA", (big, big), (255, 255, 255, 0))
    pen = ImageDraw.Draw(mark)
    pen.ellipse((0, 0, big - 1, big - 1), fill=PAPER)
    pen.ellipse((finer, finer, big - 1 - finer, big - 1 - finer), fill=RIGHT if right else WRONG)
    strokes = [[(6, 10.5), (9, 13.5), (14.5, 7)]] if right else [[(7, 7), (13, 13)], [(13, 7), (7, 13)]]
    for stroke in strokes:
        pen.line([(px * finer, py * finer) for px, py in stroke], fill=PAPER, width=2 * finer, joint="curve")
    return mark.resize((size, size), Image.Resampling.LANCZOS)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def to_image(picture: Tensor) -> Image.Image:
    values = picture.detach().to("cpu", torch.float32).clamp(0.0, 1.0).mul(255.0).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).contiguous().numpy(), mode="RGB")


def check_pictures(name: str, value: Tensor, dims: int) -> None:
    shape = "[S, 3, H, W]" if dims == 4 else "[3, H, W]"
    if value.dim() != dims or value.shape[-3] != 3 or value.numel() == 0 or not value.is_floating_point():
        raise ValueError(f"{name}: expected a float tensor {shape}, got {value.dtype} {list(value.shape)}")
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name}: expected finite values in [0, 1], got NaN or infinity")
