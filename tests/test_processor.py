"""What people type and save: words in, ids out; files in, tensors out; errors that name what is wrong."""

import json
import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from blip3o import processor as processor_module
from blip3o.data import text
from blip3o.data.scenes import render, sample
from blip3o.processor import Processor, to_pil


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor()


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("a red circle left of a blue square", "a red circle left of a blue square"),
        ("Draw two small green crosses!", "draw two small green crosses"),
        ("What color is the circle?", "what colour is the circle ?"),
        ("What  COLOUR\tis the circle ?", "what colour is the circle ?"),
        ("A big circle on the left side of a little square.", "a large circle to the left of a small square"),
        ("please draw 3 dots", "please draw three circles"),
        ("a circle in the top-left corner", "a circle in the top left"),
        ("A red circle, a blue square and a green triangle", "a red circle , a blue square and a green triangle"),
        ("Can you draw a tiny violet ball under the square?", "please draw a small purple circle below the square ?"),
        ("how many things are in the image?", "how many objects are in the image ?"),
        ("a square on top of a circle & a cross", "a square above a circle and a cross"),
        ("are there no circles?", "are there zero circles ?"),
        ("the upper-right corner", "the top right"),
        ("a circle in the bottom half", "a circle in the bottom"),
        ("Which shape is the red thing?", "what shape is the red object ?"),
        ("Tell me the color of the square.", "what is the colour of the square"),
        ("Where is the red dot compared to the cross?", "where is the red circle relative to the cross ?"),
        ("Where is the red dot in relation to the cross?", "where is the red circle relative to the cross ?"),
        ("Does the picture contain a red circle?", "is there a red circle ?"),
        ("Does this image show a blue thing?", "is there a blue object ?"),
        ("Do you see a big cross?", "is there a large cross ?"),
        ("What do you see?", "what do you see ?"),
        ("Count the crosses", "how many crosses"),
        ("count all the red things", "how many red objects"),
        ("Draw a \u201ccircle\u201d \u2013 please", "draw a circle please"),
    ],
)  # fmt: skip
def test_free_text_is_understood(processor: Processor, typed: str, read: str):
    assert processor.decode(processor.encode(typed)) == read


def test_a_cell_is_one_token(processor: Processor):
    for cell in ("top left", "top right", "bottom left", "bottom right"):
        [token] = processor.encode(cell)
        assert processor.encode(cell.upper().replace(" ", "-")) == [token] and processor.decode([token]) == cell
    assert len(processor.encode("top")) == len(processor.encode("left")) == 1


def test_the_text_of_the_world_comes_back_unchanged(processor: Processor):
    index = torch.arange(400)
    scenes = sample(0, index)
    said = text.captions(scenes, 0, index)
    for ids, length, words in zip(said.ids.tolist(), said.length.tolist(), said.text(), strict=True):
        assert processor.encode(words) == ids[:length]
        assert processor.decode(ids) == words
    for kind in text.QUESTION_TYPES:
        asked = text.questions(kind, 50, 0)
        for row, words in zip(asked.question.tolist(), asked.question_text(), strict=True):
            assert processor.encode(words) == [i for i in row if i != text.PAD]


def test_decoding_ends_at_the_first_end(processor: Processor):
    ids = [text.USER, *processor.encode("top left"), text.EOS, *processor.encode("red"), text.PAD]
    assert processor.decode(ids) == processor.decode(torch.tensor(ids)) == "top left"
    with pytest.raises(ValueError, match="ids must be below"):
        processor.decode([127])
    with pytest.raises(ValueError, match="ids must be below"):
        processor.decode([-1])


def test_unknown_words_are_named(processor: Processor):
    with pytest.raises(ValueError, match="unknown: 'dodecahedron', 'Zebra' in"):
        processor.encode("a red dodecahedron left of a Zebra and a dodecahedron")
    for typed in ("", "   ", "\n\t", "!", "?", " , ?"):
        with pytest.raises(ValueError, match="at least one word"):
            processor.encode(typed)
    for typed in (None, 3, b"a circle", ["a", "circle"]):
        with pytest.raises(TypeError, match="text must be a string"):
            processor.encode(typed)


@pytest.mark.parametrize("special", text.SPECIAL)
def test_special_tokens_cannot_be_typed(processor: Processor, special: str):
    with pytest.raises(ValueError, match="unknown"):
        processor.encode(f"a red circle {special}")


def test_a_saved_tokenizer_is_read_back(processor: Processor, tmp_path: Path):
    file = tmp_path / "tokenizer.json"
    processor.save(file)
    again = Processor.load(file)
    typed = "Draw a big red circle, please"
    assert again.encode(typed) == processor.encode(typed)
    assert Tokenizer.from_file(str(file)).encode(typed).ids == processor.encode(typed)  # anyone can read it
    assert again.tokenizer.get_vocab_size() == len(text.WORDS)


def test_a_bad_tokenizer_file_is_named(tmp_path: Path):
    file = tmp_path / "tokenizer.json"
    with pytest.raises(FileNotFoundError):
        Processor.load(file)
    for content in (
        "",
        "{",
        "[]",
        "{}",
        '{"model": 3}',
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "unk_token": "a"}}',
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match="tokenizer"):
            Processor.load(file)
    Processor().save(file)
    content = json.loads(file.read_text())
    content["model"]["vocab"]["red"] = 500
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="tokenizer"):
        Processor.load(file)


def test_pictures_survive_files_and_enlargement(processor: Processor, tmp_path: Path):
    for k, picture in enumerate(render(sample(0, torch.arange(6)))):
        for scale in (1, 8):
            file = tmp_path / f"{k}_{scale}.png"
            to_pil(picture).resize((32 * scale, 32 * scale), Image.Resampling.NEAREST).save(file)
            loaded = processor.load_image(file)
            assert loaded.shape == (3, 32, 32) and loaded.dtype == torch.float32 and loaded.is_contiguous()
            assert (loaded - picture).abs().max() <= 0.51 / 255


def test_images_of_all_modes_are_read(processor: Processor, tmp_path: Path):
    for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"):
        file = tmp_path / f"{mode.replace(';', '')}.{'tiff' if mode == 'CMYK' else 'png'}"
        Image.new("RGB", (50, 40), "red").convert("L" if mode == "I;16" else mode).convert(mode).save(file)
        loaded = processor.load_image(str(file))
        assert loaded.shape == (3, 32, 32) and loaded.min() >= 0 and loaded.max() <= 1, mode
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert processor.load_image(tmp_path / "clear.png").min() == 1.0  # what is transparent is white
    assert Processor(image_size=48).load_image(tmp_path / "clear.png").shape == (3, 48, 48)


def test_resizing_averages(processor: Processor, tmp_path: Path):
    stripes = torch.zeros(3, 64, 64)
    stripes[:, :, ::2] = 1.0
    to_pil(stripes).save(tmp_path / "stripes.png")
    assert (processor.load_image(tmp_path / "stripes.png") - 0.5).abs().max() < 0.01


def test_exif_rotation_is_applied(processor: Processor, tmp_path: Path):
    image = Image.new("RGB", (32, 32), "white")
    image.paste("black", (0, 0, 32, 8))  # on top
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "rotated.png", exif=exif)
    loaded = processor.load_image(tmp_path / "rotated.png")
    assert loaded[:, :8].mean() == 1 and loaded[:, -8:].mean() == 0


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_bad_files_are_named(processor: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    good = tmp_path / "good.png"
    to_pil(render(sample(0, torch.arange(1)))[0]).resize((256, 256)).save(good)
    content = good.read_bytes()
    header = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    bad = {
        "empty.png": b"",
        "text.png": b"not an image",
        "short.png": content[: len(content) // 2],
        "header.png": content[:20],
        "bomb.png": header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""),
        "noise.png": content[:60] + bytes(200) + content[260:],
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name):
            processor.load_image(tmp_path / name)
    with pytest.raises(ValueError, match="missing"):
        processor.load_image(tmp_path / "missing.png")
    with pytest.raises(ValueError, match="cannot read the image"):
        processor.load_image(tmp_path)
    monkeypatch.setattr(processor_module, "MAX_PIXELS", 256 * 256 - 1)
    with pytest.raises(ValueError, match=r"good.png.*256 x 256 pixels, at most 65535"):
        processor.load_image(good)


def test_to_pil():
    picture = torch.zeros(3, 2, 4)
    picture[0], picture[1, 0, 0], picture[2, 1, 3] = 0.5, 2.0, -1.0
    image = to_pil(picture)
    assert image.size == (4, 2) and image.getpixel((0, 0)) == (128, 255, 0) and image.getpixel((3, 1)) == (128, 0, 0)
    with pytest.raises(ValueError, match="picture must have shape"):
        to_pil(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="image_size must be at least 1"):
        Processor(image_size=0)
