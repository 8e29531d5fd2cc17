"""From what people type and save to what the model reads, and back: words <-> ids, image files <-> tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from blip3o.data.shards import MAX_PIXELS, on_white
from blip3o.data.words import EOS, SPECIAL, TOKEN, spaced

Crop = Literal["squash", "center"]
WIDEST = 4  # sides; of a longer picture the ends are left out before it is resized, or one row would fill the memory
# What people write -> what the world says. Whole words, applied in this order after lower-casing.
ALIASES: Mapping[str, str] = {
    "colou?rs?": "colour",
    "(big|huge|giant|bigger)": "large",
    "(little|tiny|smaller)": "small",
    "(violet|magenta)": "purple",
    "(turquoise|aqua)": "cyan",
    "(disc|disk|dot|ball)": "circle",
    "(discs|disks|dots|balls)": "circles",
    "plus": "cross",
    "(beneath|under|underneath)": "below",
    "(over|on top of)": "above",
    "(pictures|pic)": "picture",
    "images": "image",
    "(photos|photograph)": "photo",
    "(things|items|shapes)": "objects",
    "(thing|item)": "object",
    "upper": "top",
    "lower": "bottom",
    "top left": "topleft",
    "top right": "topright",
    "bottom left": "bottomleft",
    "bottom right": "bottomright",
    "(on|at|in) the left (hand )?side of": "to the left of",
    "(on|at|in) the right (hand )?side of": "to the right of",
    "(on|at|in) the left of": "to the left of",
    "(on|at|in) the right of": "to the right of",
    "(corner|side|half|part)": "",
    "(can|could|would|will) you": "please",
    "(containing|that contains|that has)": "with",
    "(none|no)(?= (circle|square|triangle|crosse|object)s)": "zero",
    "which": "what",
    "tell me": "what is",
    "(compared|in relation)": "relative",
    "do(es)? (the|this) (picture|image|photo|drawing) (contain|have|show)": "is there",
    "(?<!what )do you see": "is there",
    "(count|number of)( all)?( the)?": "how many",
    "0": "zero",
    "1": "one",
    "2": "two",
    "3": "three",
    "on": "at",
}


def build_tokenizer() -> Tokenizer:
    """The word-level tokenizer of the world: lower-cases, rewrites ALIASES, splits at blanks and punctuation."""
    tokenizer = Tokenizer(models.WordLevel(dict(TOKEN), unk_token="<unk>"))
    rewrite = [normalizers.Replace(Regex(rf"\b(?:{pattern})\b"), word) for pattern, word in ALIASES.items()]
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace("&", " and "),
            normalizers.Replace(Regex(r"[.!;:\"'`()\-_\x{2010}-\x{201F}]+"), " "),
            normalizers.Replace(Regex(r"\s+"), " "),
            *rewrite,
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    return tokenizer


class Processor:
    """A tokenizer and a picture size.

    image_size: side of the square pictures that the model reads.
    """

    def __init__(self, tokenizer: Tokenizer | None = None, image_size: int = 32) -> None:
        if image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {image_size}")
        self.tokenizer = build_tokenizer() if tokenizer is None else tokenizer
        self.image_size = image_size

    def save(self, path: str | Path) -> None:
        """Write the tokenizer to the file `path` (tokenizer.json, the format of the `tokenizers` library)."""
        Path(path).write_text(self.tokenizer.to_str(pretty=True), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, image_size: int = 32) -> Processor:
        """Read what `save` wrote. Raises FileNotFoundError; ValueError for a file that is no word-level tokenizer."""
        content = Path(path).read_text(encoding="utf-8")
        try:
            model = json.loads(content)["model"]
            kind, ids, unknown = model["type"], model["vocab"], model["unk_token"]
            usable = kind == "WordLevel" and sorted(ids.values()) == list(range(len(ids)))
            usable = usable and unknown == "<unk>" and all(ids.get(word) == TOKEN[word] for word in SPECIAL)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
        if not usable:
            raise ValueError(f"{path} must hold a WordLevel vocabulary that begins with {SPECIAL}, got {kind!r}")
        return cls(Tokenizer.from_str(content), image_size)

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Raises TypeError when it is no string, ValueError when it is empty or holds unknown words."""
        check_text(text)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        if not encoding.ids or not any(character.isalnum() for character in text):
            raise ValueError(f"text must hold at least one word, got {text!r}")
        unknown = self.tokenizer.token_to_id("<unk>")
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        words = list(dict.fromkeys(text[start:end].strip() for i, (start, end) in spans if i == unknown))
        if words:
            raise ValueError(
                f"text must use the words of this world; unknown: {', '.join(repr(word) for word in words)} in {text!r}"
            )
        return list(encoding.ids)

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """Words of ids [L] up to the first <eos>, special tokens left out. Raises ValueError for an id of no word."""
        words = []
        for i in ids.tolist() if isinstance(ids, Tensor) else ids:
            if i == EOS:
                break
            word = self.tokenizer.id_to_token(i) if i >= 0 else None
            if word is None:
                raise ValueError(f"ids must be below {self.tokenizer.get_vocab_size()}, got {i}")
            if word not in SPECIAL:
                words.append(word)
        return spaced(" ".join(words))

    def load_image(self, path: str | Path) -> Tensor:
        """An image file as float32 [3, S, S] in 0..1: upright, RGB, transparency on white, resized with antialiasing.

        Raises ValueError, which names the path, for a file that is missing, no image, damaged or above MAX_PIXELS.
        """
        picture = open_image(path)
        side = self.image_size
        smaller = min(picture.size) >= side
        return to_tensor(picture.resize((side, side), Image.Resampling.BOX if smaller else Image.Resampling.BICUBIC))


def check_text(text: str) -> None:
    """Raise TypeError for what is no string, ValueError for one that is no text, as of bytes that are not UTF-8."""
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text must be Unicode: {error}") from None


def open_image(source: str | Path | Image.Image | Tensor) -> Image.Image:
    """An image file, an image, or a tensor [3, H, W] in 0..1 as an RGB image: upright, transparency on white.

    Raises ValueError, which names the path, for a file that is missing, no image, damaged or above MAX_PIXELS; and for
    a tensor of another shape or with other values.
    """
    if isinstance(source, Tensor):
        if not source.is_floating_point() or not source.numel() or not bool(((source >= 0) & (source <= 1)).all()):
            raise ValueError(f"a picture's tensor must have values in 0..1, got {list(source.shape)} of {source.dtype}")
        return to_pil(source)
    if isinstance(source, Image.Image):
        if not all(source.size):
            raise ValueError(f"a picture must have pixels, got one of size {source.size}")
        return on_white(source)
    if not isinstance(source, str | Path) and not hasattr(source, "read"):
        raise TypeError(f"a picture must be a path, a PIL image or a tensor [3, H, W], got {type(source).__name__}")
    try:
        with Image.open(source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, at most {MAX_PIXELS} are read")
            return on_white(image)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the image {str(source)!r}: {error}") from error


def to_tensor(picture: Image.Image) -> Tensor:
    """An 8-bit RGB image as float32 [3, H, W] in 0..1."""
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(picture.height, picture.width, 3).permute(2, 0, 1).float().div(255).contiguous()


def to_pil(picture: Tensor) -> Image.Image:
    """A picture [3, H, W] in 0..1 as an 8-bit RGB image. Raises ValueError for another shape."""
    if picture.ndim != 3 or picture.shape[0] != 3:
        raise ValueError(f"picture must have shape [3, H, W], got {list(picture.shape)}")
    pixels = picture.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.frombytes("RGB", (picture.shape[2], picture.shape[1]), pixels.contiguous().numpy(force=True).tobytes())


def square(image: Image.Image, side: int, crop: Crop) -> Tensor:
    """An RGB image as float32 [3, S, S] in 0..1, resized bicubically: all of it ("squash") or its middle ("center")."""
    if crop == "center":
        short = min(image.size)
        if max(image.size) > WIDEST * short:
            image = _middle(image, *(min(length, WIDEST * short) for length in image.size))
        scale = side / short
        width, height = (max(side, round(length * scale)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        image = _middle(image, side, side)
    else:
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    return to_tensor(image)


def _middle(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
