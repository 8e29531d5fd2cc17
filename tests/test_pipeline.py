"""The released system in use, on a small checkpoint: conversations, pictures of prompts, pictures again."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import blip3o
from blip3o import chat, cli, generate
from blip3o.model import Blip3o
from blip3o.pipeline import DECODER, Pipeline
from blip3o.qwen_processor import QwenProcessor, default_template
from blip3o.unet_decoder import UnetDecoder

pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers")
from released_checkpoint import CLIP_WIDTH, ID, QUERIES, WIDTH, Checkpoint, visual_decoder

PROMPTS = ("a cat", "a very long story of two dogs and a small red house", "x")
FAST: dict[str, Any] = {"num_inference_steps": 3, "decoder_steps": 2}
CLOSE = {"atol": 1e-4, "rtol": 0.0}  # sums in another order, carried along by two samplers
ASK = "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = Checkpoint().write(tmp_path_factory.mktemp("pipeline") / "released")
    UnetDecoder(*visual_decoder()).save_pretrained(made / DECODER)
    return made


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(folder)


def picture(width: int = 90, height: int = 60, seed: int = 0) -> Image.Image:
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((width, height))


def question(text: str, *pictures: Any) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": each} for each in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def test_the_package_offers_both() -> None:
    assert blip3o.Blip3o is Blip3o and blip3o.Pipeline is Pipeline
    with pytest.raises(AttributeError, match="has no attribute 'Pipelines'"):
        blip3o.Pipelines  # noqa: B018


# conversations


def test_the_template(pipeline: Pipeline) -> None:
    ids, patches, grids = pipeline.processor.conversation(question("what is it?", picture(), picture(60, 120)))
    text = pipeline.processor.tokenizer.decode(ids)
    counts = [rows * columns // 4 for _, rows, columns in grids]
    shown = "".join("<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>" for count in counts)
    assert text == (
        f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{shown}what is it?<|im_end|>\n{ASK}"
    )
    assert grids == [(1, 4, 6), (1, 8, 4)] and patches is not None and patches.shape == (24 + 32, 1176)
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    expected = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    assert default_template([*turns]) == expected + ASK


def test_the_checkpoints_own_template_and_pictures_come_first(folder: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    template = "{% for m in messages %}[{{ m['role'] }}]{% for p in m['content'] %}{{ p['text'] or '<|image_pad|>' }}"
    (tmp_path / "chat_template.jinja").write_text(template + "{% endfor %}{% endfor %}")
    limits = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 60 * 60}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(limits))
    processor = QwenProcessor.from_pretrained(tmp_path, pipeline.model.config)
    ids, _, grids = processor.conversation(question("hi", picture(300, 300)))
    assert grids == [(1, 4, 4)]  # 56 x 56: at most 60 x 60, in blocks of 28
    assert processor.tokenizer.decode(ids) == "[user]" + "<|image_pad|>" * 4 + "hi"
    assert {path.name for path in processor.files} == {path.name for path in tmp_path.iterdir()}


def test_an_answer_is_what_transformers_says(pipeline: Pipeline) -> None:
    """The same checkpoint in transformers, with the ids and patches of the processor."""
    theirs = Checkpoint().qwen
    messages = question("what?", picture(), picture(60, 120, seed=1))
    ids, patches, grids = pipeline.processor.conversation(messages)
    given = torch.tensor([ids])
    said = theirs.generate(
        input_ids=given, pixel_values=patches, image_grid_thw=torch.tensor(grids),
        mm_token_type_ids=(given == ID["<|image_pad|>"]).int(), max_new_tokens=8, do_sample=False,
        eos_token_id=[ID["<|im_end|>"], ID["<|endoftext|>"]], pad_token_id=ID["<|endoftext|>"],
    )[0, len(ids) :]  # fmt: skip
    expected = pipeline.processor.decode(said.tolist())
    assert pipeline.chat(messages, max_new_tokens=8) == expected
    assert "".join(pipeline.stream(messages, max_new_tokens=8)) == expected


def test_a_picture_may_be_a_file_an_image_or_a_tensor(pipeline: Pipeline, tmp_path: Path) -> None:
    image = picture()
    image.save(tmp_path / "x.png")
    tensor = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(60, 90, 3).permute(2, 0, 1) / 255
    found = [pipeline.processor.conversation(question("?", x))[1] for x in (image, tmp_path / "x.png", tensor)]
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_a_stream_does_not_cut_letters(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [*pipeline.processor.encode("aé你b"), ID["<|im_end|>"]]
    assert len(tokens) == 8

    def say(*_: object, **__: object) -> Iterator[Tensor]:
        yield from (torch.tensor([token]) for token in tokens)

    monkeypatch.setattr(chat, "answer_tokens", say)
    assert list(pipeline.stream(question("?"))) == ["a", "é", "你", "b"]
    tokens[4:] = []  # in the middle of a letter
    assert list(pipeline.stream(question("?"))) == ["a", "é", "\ufffd"]


def test_a_temperature_draws(pipeline: Pipeline) -> None:
    def said(seed: int, temperature: float) -> str:
        generator = torch.Generator().manual_seed(seed)
        return pipeline.chat(question("?"), max_new_tokens=6, temperature=temperature, generator=generator)

    assert said(0, 1.0) == said(0, 1.0) != said(1, 1.0)
    assert said(0, 1e-6) == said(1, 1e-6) == pipeline.chat(question("?"), max_new_tokens=6)


# drawing


def test_the_templates(pipeline: Pipeline) -> None:
    decode = pipeline.processor.tokenizer.decode
    user = "<|im_start|>user\nPlease generate image based on the following caption: a cat<|im_end|>\n"
    opening = f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{user}{ASK}"
    assert decode(pipeline.processor.drawing_prompt("a cat")) == opening + "[IMG]"
    assert decode(pipeline.processor.drawing_prompt("a cat", "training")) == opening + "<|im_end|>\n[IMG]"
    assert decode(pipeline.processor.drawing_prompt(" ", "raw")) == " [IMG]"
    found = [pipeline.encode_prompt("a cat", template=template) for template in ("released", "training", "raw")]
    assert all(hidden.shape == (1, QUERIES, WIDTH) for hidden in found)
    assert all((found[i] - found[j]).abs().max() > 1e-3 for i in range(3) for j in range(i))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_picture_is_the_same_alone_and_in_a_batch(pipeline: Pipeline, side: Any) -> None:
    seeds = [5, 6, 7, 8, 9, 10]
    options = {"num_images_per_prompt": 2, "output_type": "pt", "padding_side": side, **FAST}
    together = pipeline.generate_image(PROMPTS, seeds=seeds, **options)
    assert together.shape == (6, 3, 16, 16) and together.dtype == torch.float32
    assert 0 <= together.min() and together.max() <= 1
    for i, prompt in enumerate(PROMPTS):
        for k in range(2):
            alone = pipeline.generate_image(prompt, seeds=[seeds[2 * i + k]], output_type="pt", **FAST)
            torch.testing.assert_close(together[2 * i + k], alone[0], **CLOSE)
    flat = together.flatten(1)
    assert all((flat[i] - flat[j]).abs().max() > 0.01 for i in range(6) for j in range(i))
    assert torch.equal(together, pipeline.generate_image(PROMPTS, seeds=5, **options))  # 5, 6, 7, ...


def test_a_condition_is_kept_and_used_again(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = pipeline.generate_image(PROMPTS[:2], seeds=3, output_type="pt", **FAST)
    condition = pipeline.encode_prompt(PROMPTS[:2])
    monkeypatch.setattr(Blip3o, "condition", None)  # not called again, and the negative is kept too
    assert torch.equal(pipeline.generate_image(condition=condition, seeds=3, output_type="pt", **FAST), expected)
    one = pipeline.generate_image(condition=condition[1:], seeds=4, output_type="pt", **FAST)
    torch.testing.assert_close(one, expected[1:], **CLOSE)


def test_generators(pipeline: Pipeline) -> None:
    def draw(**options: Any) -> Tensor:
        return pipeline.generate_image(PROMPTS[0], num_images_per_prompt=2, output_type="pt", **FAST, **options)

    seeded = draw(seeds=[3, 4])
    assert torch.equal(seeded, draw(generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)]))
    one = draw(generator=torch.Generator().manual_seed(3))
    assert torch.equal(one, draw(generator=torch.Generator().manual_seed(3)))
    torch.testing.assert_close(one[0], seeded[0], **CLOSE)
    assert not torch.equal(one[1], seeded[1])
    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert torch.equal(draw(), first) and not torch.equal(first, second)


def test_outputs_and_callback(pipeline: Pipeline) -> None:
    told: list[tuple[str, int, float, tuple[int, ...]]] = []

    def callback(stage: str, step: int, time: float, tensor: Tensor) -> None:
        told.append((stage, step, time, tuple(tensor.shape)))

    options = {"seeds": 1, **FAST}
    pixels = pipeline.generate_image(PROMPTS[:2], output_type="pt", callback=callback, **options)
    assert [entry[:2] for entry in told] == [*(("features", i) for i in range(3)), *(("pixels", i) for i in range(2))]
    assert [entry[2] for entry in told[:3]] == pytest.approx([1000, 2000 / 3, 1000 / 3])
    assert told[0][3] == (2, 4, CLIP_WIDTH) and told[4][3] == (2, 4, 8, 8)
    images = pipeline.generate_image(PROMPTS[:2], **options)
    assert [image.size for image in images] == [(16, 16)] * 2 and images[0].mode == "RGB"
    assert torch.equal(torch.tensor(images[1].getpixel((3, 5))), (pixels[1, :, 5, 3] * 255).round())
    array = pipeline.generate_image(PROMPTS[:2], output_type="np", **options)
    assert torch.equal(torch.from_numpy(array).permute(0, 3, 1, 2), pixels)


def test_features_need_no_decoder(pipeline: Pipeline) -> None:
    without = Pipeline(pipeline.model, pipeline.processor)
    found = without.generate_image(PROMPTS[:2], seeds=1, num_inference_steps=3, output_type="features")
    again = pipeline.generate_image(PROMPTS[:2], seeds=1, num_inference_steps=3, output_type="features")
    assert found.shape == (2, 4, CLIP_WIDTH) and torch.equal(found, again)
    with pytest.raises(ValueError, match=r"this checkpoint has no visual decoder \(diffusion-decoder/\): give"):
        without.generate_image(PROMPTS[0])


def test_the_negative_is_drawn_once_from_its_own_seed(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = Pipeline(pipeline.model, pipeline.processor, pipeline.decoder)
    drawn: list[int] = []
    sample = generate.sample_targets

    def counting(model: Blip3o, condition: Tensor, noise: Tensor, **options: Any) -> Tensor:
        drawn.append(len(noise))
        return sample(model, condition, noise, **options)

    monkeypatch.setattr(generate, "sample_targets", counting)
    first = [fresh.generate_image(PROMPTS[0], seeds=1, output_type="pt", **FAST) for _ in range(2)]
    assert drawn == [1, 1, 1] and torch.equal(*first)
    other = fresh.generate_image(PROMPTS[0], seeds=1, negative_seed=9, output_type="pt", **FAST)
    assert drawn == [1] * 5 and (other - first[0]).abs().max() > 1e-3


# pictures again


def test_reconstruction(pipeline: Pipeline) -> None:
    images = [picture(), picture(50, 200, seed=1)]
    features = pipeline.reconstruct(images, output_type="features")
    model = pipeline.model
    squashed = torch.stack([generate_tensor(image.resize((112, 112), Image.Resampling.BICUBIC)) for image in images])
    torch.testing.assert_close(features, model.features(squashed).detach())
    options = {"seeds": [3, 4], "num_inference_steps": 2, "output_type": "pt"}
    together = pipeline.reconstruct(images, **options)
    alone = pipeline.reconstruct(images[1:], **{**options, "seeds": [4]})
    assert together.shape == (2, 3, 16, 16) and (together[0] - together[1]).abs().max() > 1e-3
    torch.testing.assert_close(together[1], alone[0], **CLOSE)
    decoder = pipeline.decoder
    assert decoder is not None
    blank = model.pool(model.clip.vision(torch.zeros(1, 3, 112, 112))).detach()  # CLIP's mean colour
    noise = torch.stack([pipeline._noise([torch.Generator().manual_seed(seed)], decoder)[1][0] for seed in (3, 4)])
    expected = decoder.decode(features, blank, noise, num_inference_steps=2)
    torch.testing.assert_close(together, expected, **CLOSE)
    tall = picture(50, 200, seed=1).resize((112, 448), Image.Resampling.BICUBIC).crop((0, 168, 112, 280))
    center = pipeline.image_features([images[1]], crop="center")
    torch.testing.assert_close(center, model.features(generate_tensor(tall)[None]).detach())


def generate_tensor(image: Image.Image) -> Tensor:
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1) / 255


# dtypes, compilation, files


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(folder: Path, pipeline: Pipeline, dtype: torch.dtype) -> None:
    half = Pipeline.from_pretrained(folder, dtype=dtype)
    assert half.decoder is not None and half.decoder.unet.dtype == dtype
    assert half.decoder.vae.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    expected = pipeline.generate_image(PROMPTS[:2], seeds=1, output_type="features", num_inference_steps=3)
    features = half.generate_image(PROMPTS[:2], seeds=1, output_type="features", num_inference_steps=3)
    assert features.dtype == dtype
    assert (features.float() - expected).norm() < 0.05 * expected.norm()
    drawn = half.generate_image(PROMPTS[:2], seeds=1, output_type="pt", **FAST)
    assert drawn.dtype == torch.float32 and bool(drawn.isfinite().all())
    assert isinstance(half.chat(question("?", picture()), max_new_tokens=3), str)
    assert bool(half.reconstruct([picture()], seeds=1, num_inference_steps=2, output_type="pt").isfinite().all())


@torch._dynamo.config.patch(recompile_limit=8)  # which compile raises, and which is restored
def test_compiled_without_graph_breaks(folder: Path, pipeline: Pipeline) -> None:
    """fullgraph: a break is an error. Every call of the language model and the DiT goes through their graphs."""
    compiled = Pipeline.from_pretrained(folder)
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    compiled.compile(backend=backend, fullgraph=True)
    options = {"seeds": 1, "output_type": "features", "num_inference_steps": 2}
    expected = pipeline.generate_image(PROMPTS[:2], **options)
    torch.testing.assert_close(compiled.generate_image(PROMPTS[:2], **options), expected, **CLOSE)
    assert len(graphs) == 3  # prompts, queries, diffusion transformer
    messages = question("what?", picture())
    assert compiled.chat(messages, max_new_tokens=6) == pipeline.chat(messages, max_new_tokens=6)
    assert len(graphs) == 5  # a conversation with a picture, and all its further tokens
    torch._dynamo.reset()


@pytest.mark.parametrize("layout", ["blip3o", "released"])
def test_a_pipeline_comes_back(folder: Path, pipeline: Pipeline, tmp_path: Path, layout: Any) -> None:
    pipeline.save_pretrained(tmp_path / "x", layout=layout)
    again = Pipeline.from_pretrained(tmp_path / "x")
    options = {"seeds": 1, "output_type": "pt", **FAST}
    assert torch.equal(again.generate_image(PROMPTS, **options), pipeline.generate_image(PROMPTS, **options))
    elsewhere = Pipeline.from_pretrained(tmp_path / "x", decoder=folder / DECODER)
    assert torch.equal(elsewhere.generate_image(PROMPTS, **options), pipeline.generate_image(PROMPTS, **options))


def test_the_commands(
    folder: Path,
    pipeline: Pipeline,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(Pipeline.stream.__kwdefaults__, "max_new_tokens", 5)
    out, shown = tmp_path / "out.png", tmp_path / "shown.png"
    command = ["generate", "a cat", "--model", str(folder), "-n", "2", "--seed", "3", "--steps", "2", "--out", str(out)]
    assert cli.main(command) == 0
    assert capsys.readouterr().out == f"{out}: drawings of 'a cat' from seeds 3 4\n"
    drawn = pipeline.generate_image("a cat", num_images_per_prompt=2, seeds=3, num_inference_steps=2)
    with Image.open(out) as image:
        assert image.size == (2 * 16 + 2, 16)
        found = generate_tensor(image.crop((18, 0, 34, 16)))
    torch.testing.assert_close(found, generate_tensor(drawn[1]), atol=2 / 255, rtol=0)
    pipeline.model.save_pretrained(tmp_path / "ours", files=pipeline.processor.files)
    command[3] = str(tmp_path / "ours")
    assert cli.main([*command[:-1], "out.xyz"]) == 2 and "out must end as a picture does" in capsys.readouterr().err
    assert cli.main(command) == 2 and "has no visual decoder (diffusion-decoder/)" in capsys.readouterr().err
    out.unlink()
    assert cli.main([*command, "--decoder", str(folder / DECODER)]) == 0 and out.exists()
    capsys.readouterr()
    picture().save(shown)
    assert cli.main(["ask", str(shown), "what?", "--model", str(folder)]) == 0
    assert capsys.readouterr().out == pipeline.chat(question("what?", shown)) + "\n"
    assert cli.main(["evaluate", "--model", str(folder)]) == 2
    assert "model must know nano's world" in capsys.readouterr().err


# what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "prompts must be at least one"),
        ({"prompts": [3]}, "prompts must be strings, got int"),
        ({}, "either prompts or condition must be given"),
        ({"prompts": "x", "condition": torch.zeros(1, 5, 64)}, "either prompts or condition must be given"),
        ({"condition": torch.zeros(1, 5, 63)}, r"condition must be \[B, 5, 64\], got \[1, 5, 63\]"),
        ({"prompts": 3}, "prompts must be strings, got int"),
        ({"condition": torch.zeros(0, 5, 64)}, r"condition must be \[B, 5, 64\], got \[0, 5, 64\]"),
        ({"condition": [1]}, "condition must be a tensor, got list"),
        (
            {"prompts": "x", "num_images_per_prompt": 0},
            "num_images_per_prompt must be a whole number, at least 1, got 0",
        ),
        ({"prompts": "x", "num_images_per_prompt": 1.5}, r"num_images_per_prompt must be a whole number, .*, got 1\.5"),
        ({"prompts": "x", "num_inference_steps": 0}, "num_inference_steps must be a whole number, at least 1, got 0"),
        ({"prompts": "x", "decoder_steps": 0}, "decoder_steps must be a whole number, at least 1, got 0"),
        ({"prompts": "x", "guidance_scale": math.nan}, "guidance_scale must be a finite number, got nan"),
        (
            {"prompts": "x", "decoder_guidance_scale": math.inf},
            "decoder_guidance_scale must be a finite number, got inf",
        ),
        ({"prompts": "x", "seeds": 1.5}, r"seeds must be a whole number or a list of them, got 1\.5"),
        ({"prompts": "x", "seeds": "a"}, "seeds must be a whole number or a list of them, got 'a'"),
        ({"prompts": "x", "generator": 3}, "generator must be a torch.Generator, or a list of them, got 3"),
        ({"prompts": "x", "negative_seed": -1}, r"negative_seed must lie in 0\.\.2\^63 - 1, got \[-1\]"),
        ({"prompts": "x", "negative_seed": [1, 2]}, "negative_seed must be one for each of 1 pictures, got 2"),
        ({"prompts": "x", "seeds": [1, 2]}, "seeds must be one for each of 1 pictures, got 2"),
        ({"prompts": "x", "seeds": -1}, r"seeds must lie in 0\.\.2\^63 - 1, got \[-1\]"),
        ({"prompts": "x", "seeds": 1, "generator": torch.Generator()}, "seeds and generator must not both be given"),
        ({"prompts": "x", "generator": []}, "generator must be one for each of 1 pictures, got 0"),
        ({"prompts": "x", "output_type": "jpeg"}, "output_type must be one of .*, got 'jpeg'"),
        ({"prompts": "x", "template": "chat"}, "template must be one of .*, got 'chat'"),
        ({"prompts": "x", "padding_side": "top"}, "padding_side must be one of .*, got 'top'"),
    ],
)
def test_wrong_drawings_are_named(pipeline: Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        pipeline.generate_image(**{"num_inference_steps": 2, "decoder_steps": 1, "seeds": None, **options})


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ([], {}, "messages must be a list of turns, at least one"),
        ("hello", {}, "messages must be a list of turns"),
        ({"role": "user", "content": "x"}, {}, "messages must be a list of turns"),
        (None, {}, "messages must be a list of turns"),
        (["hello"], {}, "a message must be a table with a role and a content, got 'hello'"),
        ([{"role": "user", "content": ["hello"]}], {}, "a part of a message must be .*, got 'hello'"),
        (question("?", Image.new("RGB", (0, 0))), {}, r"a picture must have pixels, got one of size \(0, 0\)"),
        (
            question("?", torch.full((3, 9, 9), 200.0)),
            {},
            r"tensor must have values in 0\.\.1, got \[3, 9, 9\] of torch\.f",
        ),
        (question("?", torch.full((3, 9, 9), math.nan)), {}, r"a picture's tensor must have values in 0\.\.1"),
        (question("?", torch.ones(3, 9, 9, dtype=torch.uint8)), {}, r"in 0\.\.1, got \[3, 9, 9\] of torch\.uint8"),
        ([{"role": "robot", "content": "x"}], {}, r"a message must have a role \(system, user, assistant\)"),
        ([{"role": "user"}], {}, "a message must have a role .* and a content"),
        (
            [{"role": "user", "content": [{"type": "video"}]}],
            {},
            "a part of a message must be .*, got {'type': 'video'}",
        ),
        (question("?", "nowhere.png"), {}, r"cannot read the image 'nowhere\.png'"),
        (question("<|image_pad|>", picture()), {}, r"as many pictures as <\|image_pad\|>, got 1 for 2"),
        (question("\ud800"), {}, r"text must be Unicode: .*surrogates not allowed"),
        (question("?"), {"max_new_tokens": 0}, "max_new_tokens must be a whole number, at least 1, got 0"),
        (question("?"), {"max_new_tokens": 1.5}, r"max_new_tokens must be a whole number, at least 1, got 1\.5"),
        (question("?"), {"temperature": -1.0}, r"temperature must be 0 or above, got -1\.0"),
    ],
)
def test_wrong_conversations_are_named(
    pipeline: Pipeline, messages: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline.chat(messages, **options)


def test_other_choices_are_refused(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.model, "config", replace(pipeline.model.config, objective="mse"))
    with pytest.raises(ValueError, match=r"image_target 'clip' with objective 'mse' is drawn by"):
        pipeline.generate_image("a cat")


def test_empty_prompts_are_counted(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match=r"prompts must not be empty, got 3 .*: 1, 2$"):
        pipeline.processor.pad([[1], [], []])


def test_wrong_pictures_are_named(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match=r"images must be a list of pictures, at least one, got 'x\.png'"):
        pipeline.reconstruct("x.png")
    with pytest.raises(ValueError, match=r"images must be a list of pictures, at least one, got <PIL"):
        pipeline.image_features(picture())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"images must be a list of pictures, .*, got a tensor \[3, 8, 8\]"):
        pipeline.image_features(torch.zeros(3, 8, 8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"crop must be one of .*, got 'fit'"):
        pipeline.image_features([picture()], crop="fit")  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="images must be a list of pictures, at least one, got <PIL"):
        pipeline.reconstruct(picture())  # type: ignore[arg-type]


def test_a_picture_of_another_kind(pipeline: Pipeline) -> None:
    with pytest.raises(TypeError, match=r"a picture must be a path, a PIL image or a tensor \[3, H, W\], got ndarray"):
        pipeline.chat(question("?", np.zeros((9, 9, 3))))


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_decoder_with_weights_that_are_none(folder: Path, tmp_path: Path, part: str) -> None:
    """diffusers draws what is missing at random, and makes fractions of whole numbers."""
    place = shutil.copytree(folder / DECODER, tmp_path / "decoder") / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(place)
    lost = max(tensors)
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, place)
    with pytest.raises(ValueError, match=f"{part} lacks {re.escape(lost)}"):
        UnetDecoder.from_pretrained(tmp_path / "decoder")
    save_file({**tensors, lost: tensors[lost].to(torch.int8)}, place)
    with pytest.raises(ValueError, match=rf"{place.name}: dtypes must be in .*, got {re.escape(lost)} \(I8\)"):
        UnetDecoder.from_pretrained(tmp_path / "decoder")


def test_a_decoder_without_a_size() -> None:
    unet, vae, scheduler = visual_decoder()
    unet.register_to_config(sample_size=None)
    with pytest.raises(ValueError, match=r"unet\.config\.sample_size must be a number above 0, got None"):
        UnetDecoder(unet, vae, scheduler)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(("text", "message"), [("{", "is not readable JSON"), ("[]", "must be a table")])
def test_a_file_that_transformers_cannot_read(
    folder: Path, pipeline: Pipeline, tmp_path: Path, name: str, text: str, message: str
) -> None:
    shutil.copy(folder / "tokenizer.json", tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} {message}"):
        QwenProcessor.from_pretrained(tmp_path, pipeline.model.config)


def test_weights_that_are_not_finite_are_told(folder: Path) -> None:
    broken = Pipeline.from_pretrained(folder)
    broken.model.llm.norm.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="the features drawn are not finite: the weights are not"):
        broken.generate_image("x", **FAST)
    with pytest.raises(ValueError, match="the logits are not finite"):
        broken.chat(question("?"))
    broken = Pipeline.from_pretrained(folder)
    broken._decoder().unet.conv_in.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="the pictures drawn are not finite"):
        broken.generate_image("x", **FAST)


def test_the_smallest_temperature_is_the_likeliest_word(pipeline: Pipeline) -> None:
    said = [pipeline.chat(question("?"), max_new_tokens=4, temperature=temperature) for temperature in (0.0, 1e-300)]
    assert said[0] == said[1]


def test_a_chat_template_that_fails(folder: Path, pipeline: Pipeline) -> None:
    processor = QwenProcessor.from_pretrained(folder, pipeline.model.config)
    processor.tokenizer.chat_template = "{{ raise_exception('no pictures') }}"
    with pytest.raises(ValueError, match="the checkpoint's chat_template cannot write these messages: no pictures"):
        processor.conversation(question("?"))


def test_patches_of_another_size(folder: Path, pipeline: Pipeline) -> None:
    known = QwenProcessor.from_pretrained(folder, pipeline.model.config)
    known.images.merge_size = 1
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: merge_size must be the model's, 2, got 1"):
        QwenProcessor(known.tokenizer, known.images, pipeline.model.config)


def test_a_tokenizer_that_does_not_fit(folder: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        QwenProcessor.from_pretrained(tmp_path, pipeline.model.config)
    text = (folder / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace("[IMG]", "[DRAW]"))
    with pytest.raises(ValueError, match=r"special tokens must be .*'\[IMG\]': 264.*, got .*'\[IMG\]': None"):
        QwenProcessor.from_pretrained(tmp_path, pipeline.model.config)


def test_a_decoder_that_does_not_fit(folder: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"unet is missing: a visual decoder has unet, vae, scheduler"):
        Pipeline.from_pretrained(folder, decoder=tmp_path)
    for part in ("unet", "vae", "scheduler"):
        (tmp_path / part).mkdir()
    torch.save({"x": torch.zeros(1)}, tmp_path / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin: a pickle, .* convert it"):
        UnetDecoder.from_pretrained(tmp_path)
    unet, vae, scheduler = visual_decoder()
    decoder = UnetDecoder(unet, vae, scheduler)
    for name, value in (("shift_factor", 0.5), ("latents_mean", [0.0] * 4), ("latents_std", [1.0] * 4)):
        other = visual_decoder()[1]
        other.register_to_config(**{name: value})
        with pytest.raises(ValueError, match=rf"vae\.config\.{name} must be None, as SDXL's, got"):
            UnetDecoder(unet, other, scheduler)
    features, noise = torch.zeros(2, 4, CLIP_WIDTH), torch.zeros(2, 4, 8, 8)
    for wrong, message in (
        ((features[..., 1:], features, noise), r"features must be \[B, F, 224\], got \[2, 4, 223\]"),
        ((features, features[:, 1:], noise), r"negative must be \[1 or 2, 4, 224\], got \[2, 3, 224\]"),
        ((features, features, noise[:1]), r"noise must be \[2, 4, 8, 8\], got \[1, 4, 8, 8\]"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.decode(*wrong, num_inference_steps=1)
