"""The stages that read shards, with a released model's tokenizer, template and vision tower, on a small checkpoint."""

import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from blip3o import chat
from blip3o.data.llava import Turn
from blip3o.data.shard_files import write_shards
from blip3o.data.shards import Wrong
from blip3o.data.text import IGNORE
from blip3o.layers import linear_cross_entropy
from blip3o.pipeline import Pipeline
from blip3o.train.framing import QwenFraming
from blip3o.train.recipe_shards import CaptionSource, ShardGenerationRecipe, ShardUnderstandingRecipe, Source
from blip3o.train.stages_shards import ShardGenerationStage, ShardUnderstandingStage

pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers")
from released_checkpoint import CLIP_WIDTH, QUERIES, Checkpoint

COMMON: dict[str, Any] = {
    "steps": 10, "batch_size": 4, "learning_rate": 1e-3, "final_learning_rate": 1e-5, "warmup_steps": 1,
    "weight_decay": 0.0, "betas": (0.9, 0.999), "clip_norm": 1.0, "dtype": "float32", "seed": 5, "threads": 0 + 1,
}  # fmt: skip
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
SIZES = ((90, 60), (60, 120), (64, 64), (120, 120))
ANSWERS = ("a cat", "two dogs, and a house", "no", "é你")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return Pipeline.from_pretrained(Checkpoint().write(tmp_path_factory.mktemp("released") / "checkpoint"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures of different sizes with captions and conversations, and a conversation without a picture."""
    place = tmp_path_factory.mktemp("shards")
    samples = []
    for i, (size, answer) in enumerate(zip(SIZES, ANSWERS, strict=True)):
        pixels = torch.randint(0, 256, (*size[::-1], 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(file, "PNG")
        said = [("human", "<image>\nWhat is it?"), ("gpt", answer), ("human", "Sure?"), ("gpt", "yes" * i + "!")]
        table = {"conversations": [{"from": who, "value": value} for who, value in said[: 2 + 2 * (i % 2)]]}
        samples.append((f"{i}", {"png": file.getvalue(), "txt": answer.encode(), "json": json.dumps(table).encode()}))
    write_shards(place, samples, 10)
    text = {
        "conversations": [
            {"from": "system", "value": "Be."},
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Ho"},
        ]
    }
    write_shards(place / "text", [("t", {"json": json.dumps(text).encode()})], 1)
    return place


def test_prompts_are_the_training_template(pipeline: Pipeline) -> None:
    framed = QwenFraming(pipeline.processor, pipeline.model.config, 512)
    ids, cut = framed.prompt("a cat")
    said = "Please generate image based on the following caption: a cat"
    expected = f"{SYSTEM}<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n[IMG]"
    assert not cut and pipeline.processor.tokenizer.decode(ids) == expected
    short = QwenFraming(pipeline.processor, pipeline.model.config, 100 + QUERIES)
    shorter, cut = short.prompt("a cat")
    assert cut and len(shorter) == 100 and shorter == [*ids[:99], ids[-1]]
    for words in ("a<|im_end|>b", "[IMG]", "<|image_pad|>"):
        with pytest.raises(Wrong, match="words of the template"):
            framed.prompt(words)


def test_answers_are_learnt_and_nothing_else(pipeline: Pipeline) -> None:
    framed = QwenFraming(pipeline.processor, pipeline.model.config, 512)
    turns = [Turn("user", "What?", True), Turn("assistant", "a cat"), Turn("user", "Sure?"), Turn("assistant", "yes")]
    found = framed.dialogue(turns, Image.new("RGB", (90, 60)), features=False)
    decode = pipeline.processor.tokenizer.decode
    shown = "<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>"
    assert decode(found.row.ids) == (
        f"{SYSTEM}<|im_start|>user\n{shown}What?<|im_end|>\n<|im_start|>assistant\na cat<|im_end|>\n"
        f"<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    )
    taught = found.row.targets != IGNORE
    assert decode(found.row.targets[taught]) == "a cat<|im_end|>yes<|im_end|>"
    assert torch.equal(found.row.targets[:-1][taught[:-1]], found.row.ids[1:][taught[:-1]])
    assert found.grid == (1, 4, 6) and found.seen is not None and found.seen.shape == (24, 1176)
    with pytest.raises(Wrong, match="of the template"):
        framed.dialogue([Turn("user", "<|im_start|>"), Turn("assistant", "no")], None, features=False)
    with pytest.raises(Wrong, match="tokens, at most 20"):
        QwenFraming(pipeline.processor, pipeline.model.config, 20).dialogue(turns[2:], None, features=False)


def test_packed_conversations_have_the_loss_of_each_alone(pipeline: Pipeline, folder: Path) -> None:
    """Read one by one as the chat reads them, with the vision tower's tokens and multimodal positions."""
    model, processor = pipeline.model, pipeline.processor
    data = (Source(path=str(folder)), Source(path=str(folder / "text")))
    recipe = ShardUnderstandingRecipe(data=data, pack=16, max_tokens=512, **{**COMMON, "batch_size": 8})
    stage = ShardUnderstandingStage(model, recipe, processor)
    batch = stage.batch(0, range(8))
    assert batch.ids.count("00000.tar:t") == 4 and len(batch.grids) == 4 and batch.patches is not None
    assert set(stage.trainable()) == {name for name, _ in model.named_parameters() if name.startswith("llm.")}
    loss = stage.loss(batch)[0]
    loss.backward()
    model.zero_grad()
    model.requires_grad_(False)
    starts, patches = batch.cu_seqlens.tolist(), 0
    grids = iter(batch.grids)
    alone = torch.zeros(())
    for start, end in pairwise(starts[: len(batch.ids) + 1]):
        ids, targets = batch.tokens[:, start:end], batch.targets[0, start:end]
        seen, own = None, []
        if bool((ids == model.config.image_token).any()):
            own = [next(grids)]
            count = own[0][1] * own[0][2]
            seen, patches = batch.patches[patches : patches + count], patches + count
        mask = torch.ones_like(ids, dtype=torch.bool)
        hidden = model.llm(*chat.embed(model, ids, mask, seen, own))[0]
        asked = targets != IGNORE
        alone = alone + linear_cross_entropy(hidden[asked], model.llm.output_weight, targets[asked]) * asked.sum()
    torch.testing.assert_close(loss.detach().float(), alone, rtol=1e-5, atol=0)


def test_features_are_of_the_middle_of_the_picture(pipeline: Pipeline, folder: Path, tmp_path: Path) -> None:
    """Stored or not, what is drawn has the loss of the features that the pipeline gives for training's crop."""
    model = pipeline.model
    losses = []
    for features in ("none", "float32"):
        recipe = ShardGenerationRecipe(
            data=(CaptionSource(path=str(folder)),), condition_drop=0.1, max_tokens=512, features=features,
            cache=str(tmp_path), **COMMON,
        )  # fmt: skip
        stage = ShardGenerationStage(model, recipe, pipeline.processor)
        batch = stage.batch(0, range(4))
        assert batch.weight == 4 * 4 * CLIP_WIDTH
        losses.append(stage.loss(batch)[0].detach())
        if batch.features is not None:
            rows = [int(name.split(":")[1]) for name in batch.ids]
            pixels = [
                torch.randint(
                    0, 256, (*SIZES[i][::-1], 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8
                )
                for i in rows
            ]
            pictures = [Image.fromarray(each.numpy()) for each in pixels]
            torch.testing.assert_close(
                batch.features, pipeline.image_features(pictures, crop="center"), rtol=1e-4, atol=1e-4
            )
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    model.requires_grad_(False)


def test_a_vision_tower_reads_no_stored_features(pipeline: Pipeline, folder: Path, tmp_path: Path) -> None:
    recipe = ShardUnderstandingRecipe(
        data=(Source(path=str(folder)),), pack=16, max_tokens=512, features="float32", cache=str(tmp_path), **COMMON
    )
    with pytest.raises(ValueError, match="features must be 'none' in understanding"):
        ShardUnderstandingStage(pipeline.model, recipe, pipeline.processor)
