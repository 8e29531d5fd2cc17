"""The whole model: how its parts are joined, what each gradient reaches, and how large the presets are."""

import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import CodeType

import pytest
import torch
from torch import Tensor, nn

from blip3o import config as config_module
from blip3o import generate
from blip3o.config import (
    Blip3oConfig,
    ClipConfig,
    ClipTextConfig,
    DecoderConfig,
    DitConfig,
    LlmConfig,
    VisionConfig,
)
from blip3o.data import scenes, text
from blip3o.flow import FlowConfig
from blip3o.llm import multimodal_positions
from blip3o.model import Blip3o
from blip3o.presets import PRESETS, preset
from blip3o.processor import Processor
from blip3o.train.recipe import STAGES, Recipe
from blip3o.train.run import Run
from blip3o.vision import QwenVision
from blip3o.weights import from_pretrained

CLOSE = {"atol": 1e-4, "rtol": 1e-4}  # two orders of summing in float32


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def pictures(n: int, seed: int = 4) -> Tensor:
    return scenes.render(scenes.sample(seed, torch.arange(n)))


def prompts() -> tuple[Tensor, Tensor]:
    """Three prompts of different lengths, padded on the left."""
    processor = Processor()
    said = ("a red circle", "draw a large green square above a small cyan cross", "two purple squares")
    return text.left_pad([text.drawing_prompt(processor.encode(words)) for words in said])


# sizes


@pytest.mark.parametrize(
    ("name", "llm", "vision", "dit", "queries"),
    [
        ("4b", 3_085_389_824, 668_684_288, 1_362_257_824, 131_072),
        ("8b", 7_612_777_984, 676_550_144, 1_365_010_336, 229_376),
    ],
)
def test_released_presets_have_the_released_sizes(name: str, llm: int, vision: int, dit: int, queries: int) -> None:
    """Diffusion transformer as published; EVA-CLIP by hand; the language models by `test_transformers_sizes`."""
    with torch.device("meta"):
        model = Blip3o(preset(name))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert (count(model.dit), model.queries.numel()) == (dit, queries)
    assert count(model.clip) == 4_350_208_256
    assert model.vision is not None and (count(model.llm), count(model.vision)) == (llm, vision)
    assert model.decoder is None and model.image_projector is None
    assert count(model) == llm + vision + dit + queries + 4_350_208_256


@pytest.mark.parametrize("name", ["4b", "8b"])
def test_transformers_sizes(name: str) -> None:
    """transformers' own Qwen2.5-VL of the same shape, cut to 2 blocks, has as many parameters as ours."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = preset(name)
    llm, vision = replace(config.llm, depth=2), config.vision
    assert vision is not None
    theirs_config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": llm.vocab_size, "hidden_size": llm.width, "num_hidden_layers": llm.depth,
            "num_attention_heads": llm.num_heads, "num_key_value_heads": llm.num_kv_heads,
            "intermediate_size": llm.mlp_width, "tie_word_embeddings": llm.tie_embeddings,
        },
        vision_config={
            "depth": 2, "hidden_size": vision.width, "num_heads": vision.num_heads, "in_channels": 3,
            "intermediate_size": vision.mlp_width, "out_hidden_size": vision.out_width, "patch_size": vision.patch_size,
            "fullatt_block_indexes": [0], "hidden_act": "silu",
        },
        tie_word_embeddings=llm.tie_embeddings,
    )  # fmt: skip
    with torch.device("meta"):
        theirs = Qwen2_5_VLForConditionalGeneration(theirs_config)
        ours = Blip3o(replace(config, llm=llm, vision=replace(vision, depth=2, full_attention_blocks=(0,))))
    assert ours.vision is not None
    assert count(ours.llm) + count(ours.vision) == count(theirs)


def test_nano_is_small_and_built_in_no_time() -> None:
    Blip3o(preset("nano"))
    began = time.process_time()
    model = Blip3o(preset("nano"))
    assert time.process_time() - began < 2.0
    assert count(model) < 12_000_000
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_the_same_seed_builds_the_same_model() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(Blip3o(preset("nano")).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


# pictures


def test_features_are_standardised(lively: Blip3o) -> None:
    model = Blip3o(lively.config).eval()
    with torch.no_grad():
        raw = model.features(pictures(64))
        model.set_feature_statistics(raw)
        features = model.features(pictures(64))
    assert features.shape == (64, model.config.feature_grid**2, model.config.clip.width)
    flat = features.flatten(0, 1)
    torch.testing.assert_close(flat.mean(0), torch.zeros(flat.shape[1]), atol=1e-4, rtol=0)
    torch.testing.assert_close(flat.std(0), torch.ones(flat.shape[1]), atol=1e-3, rtol=0)
    torch.testing.assert_close(features * model.feature_std + model.feature_mean, raw, atol=1e-5, rtol=1e-4)


def test_normalize_uses_clips_own_statistics() -> None:
    white = Blip3o.normalize(torch.ones(1, 3, 2, 2))[0, :, 0, 0]
    torch.testing.assert_close(white, torch.tensor([1.9303, 2.0749, 2.1459]), atol=1e-4, rtol=0)


def test_image_features_take_the_place_of_image_tokens(lively: Blip3o) -> None:
    model, tokens = lively, lively.config.feature_grid**2
    ids = torch.tensor([text.question_prompt([20, 21, 22], tokens), text.question_prompt([23, 24, 25], tokens)])
    features = torch.randn(2, tokens, model.config.clip.width, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        embeddings = model.embed(ids, features)
        assert model.image_projector is not None
        image = ids == model.config.image_token
        assert image.sum(1).tolist() == [tokens, tokens]
        torch.testing.assert_close(embeddings[image], model.image_projector(features).flatten(0, 1))
        torch.testing.assert_close(embeddings[~image], model.llm.embed(ids)[~image])
        assert torch.equal(model.embed(ids), model.llm.embed(ids))
    with pytest.raises(ValueError, match=rf"each of the {2 * tokens} image tokens in ids, got {tokens}"):
        model.embed(ids, features[:1])


def test_a_model_with_a_vision_tower_takes_no_clip_features(lively: Blip3o) -> None:
    vision = VisionConfig(
        width=32, depth=2, num_heads=2, mlp_width=64, patch_size=14, temporal_patch_size=2, merge_size=2,
        window_size=56, full_attention_blocks=(1,), out_width=lively.config.llm.width, eps=1e-6, rope_theta=1e4,
    )  # fmt: skip
    model = Blip3o(replace(lively.config, vision=vision))
    with pytest.raises(ValueError, match="'tiny' reads pictures by its vision tower"):
        model.embed(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, 32))


def test_what_is_read_depends_on_the_picture(lively: Blip3o) -> None:
    ids = torch.tensor([text.question_prompt([20, 21], lively.config.feature_grid**2)] * 2)
    with torch.no_grad():
        hidden = lively.read(ids, lively.features(pictures(2)))
    assert (hidden[0, -1] - hidden[1, -1]).abs().max() > 1e-3


def test_padding_on_the_right_is_never_seen(lively: Blip3o) -> None:
    ids = torch.tensor([[1, 30, 31, 32]])
    padded = torch.nn.functional.pad(ids, (0, 5))
    with torch.no_grad():
        torch.testing.assert_close(lively.read(padded)[:, :4], lively.read(ids), atol=1e-5, rtol=1e-5)


# the condition


def whole_pass(model: Blip3o, ids: Tensor) -> Tensor:
    """Prompt and queries in one causal pass, without cache, mask or padding."""
    embeddings = torch.cat([model.llm.embed(ids), model.queries.expand(len(ids), -1, -1)], dim=1)
    return model.llm(embeddings)[:, -model.config.num_queries :]


def test_condition_is_one_causal_pass_over_prompt_and_queries(lively: Blip3o) -> None:
    ids, mask = prompts()
    with torch.no_grad():
        together = lively.condition(ids, mask)
        assert together.shape == (3, lively.config.num_queries, lively.config.llm.width)
        for row in range(3):
            alone = ids[row, mask[row]][None]
            expected = whole_pass(lively, alone)
            torch.testing.assert_close(lively.condition(alone, torch.ones_like(alone).bool()), expected, **CLOSE)
            torch.testing.assert_close(together[row : row + 1], expected, **CLOSE)


def test_condition_ignores_what_stands_at_padding(lively: Blip3o) -> None:
    ids, mask = prompts()
    other = torch.where(mask, ids, 40)
    with torch.no_grad():
        assert torch.equal(lively.condition(ids, mask), lively.condition(other, mask))


def test_condition_of_a_model_that_learns_still_sees_its_prompt(lively: Blip3o) -> None:
    """With gradients in the language model nothing may be lost to the cache: same values, gradients at the prompt."""
    ids, mask = prompts()
    lively.requires_grad_(True)
    with torch.no_grad():
        expected = lively.condition(ids, mask)
    hidden = lively.condition(ids, mask)
    torch.testing.assert_close(hidden, expected, **CLOSE)
    (gradient,) = torch.autograd.grad(hidden.square().sum(), [lively.llm.embedding.weight])
    assert gradient[ids[mask].unique()].any(1).all()


def test_gradients_reach_the_queries_and_never_the_frozen_language_model(lively: Blip3o) -> None:
    ids, mask = prompts()
    lively.llm.requires_grad_(False)
    try:
        hidden = lively.condition(ids, mask)
        hidden.square().sum().backward()
        gradient = lively.queries.grad
        assert gradient is not None and bool(gradient.any(1).all())
        assert not [name for name, p in lively.llm.named_parameters() if p.grad is not None]
        lively.queries.grad = None
        lively.llm.requires_grad_(True)
        (expected,) = torch.autograd.grad(lively.condition(ids, mask).square().sum(), [lively.queries])
        torch.testing.assert_close(gradient, expected, atol=1e-3, rtol=1e-3)
    finally:
        lively.requires_grad_(True).zero_grad(set_to_none=True)


def test_later_queries_see_earlier_ones_only(lively: Blip3o) -> None:
    ids, mask = prompts()
    with torch.no_grad():
        before = lively.condition(ids, mask)
        saved = lively.queries[2].clone()
        lively.queries[2] += 1
        after = lively.condition(ids, mask)
        lively.queries[2] = saved
    assert torch.equal(before[:, :2], after[:, :2]) and (before[:, 2:] != after[:, 2:]).any(-1).all()


def test_a_cache_that_stored_nothing_cannot_go_on(lively: Blip3o) -> None:
    cache = lively.cache(1, 8)
    embeddings = torch.zeros(1, 2, lively.config.llm.width, requires_grad=True)
    lively.llm(embeddings, None, None, cache)
    with pytest.raises(ValueError, match="cache must be rewound: its last tokens needed a gradient"):
        lively.llm(embeddings, None, None, cache)
    cache.rewind(0, torch.zeros(1, dtype=torch.int64))
    lively.llm(embeddings, None, None, cache)


def test_a_context_stands_for_the_projected_condition(lively: Blip3o) -> None:
    ids, mask = prompts()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, lively.config.feature_grid**2, lively.config.clip.width, generator=generator)
    moment = torch.rand(6, generator=generator) * 1000
    with torch.no_grad():
        condition = lively.dit.project(lively.condition(ids, mask))
        context = lively.dit.context(condition)
        torch.testing.assert_close(lively.dit(x, moment, context), lively.dit(x, moment, condition), **CLOSE)
        spread = lively.dit(x, moment, condition.repeat_interleave(2, 0))
        torch.testing.assert_close(lively.dit(x, moment, context), spread, **CLOSE)
        assert (spread[0] - lively.dit(x, moment, condition.flip(0).repeat_interleave(2, 0))[0]).abs().max() > 1e-3


# every number of a configuration is used


CHECKS = ("__post_init__", "_require_positive", "to_dict")


class Reads:
    """Notes which fields of which configuration classes are read, and by which of the package's own functions.

    What merely checks or copies a configuration (CHECKS, the dataclasses' own methods) is no use.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kinds: tuple[type, ...]) -> None:
        self.found: set[tuple[str, str]] = set()
        package = str(Path(config_module.__file__).parent)
        for kind in kinds:
            names = {field.name for field in fields(kind)}
            monkeypatch.setattr(kind, "__getattribute__", self._noting(kind, names, package))

    def _noting(self, kind: type, names: set[str], package: str) -> Callable[[object, str], object]:
        def read(instance: object, name: str) -> object:
            if name in names:
                code: CodeType = sys._getframe(1).f_code
                checking = any(check in code.co_qualname for check in CHECKS)
                if code.co_filename.startswith(package) and not checking:
                    self.found.add((kind.__name__, name))
            return object.__getattribute__(instance, name)

        return read


def test_every_field_of_every_configuration_is_read(
    tiny: dict[str, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train all stages, save, load, draw and answer; build and run the parts that `nano` has not."""
    kinds = (
        Blip3oConfig, ClipConfig, ClipTextConfig, VisionConfig, LlmConfig, DitConfig, DecoderConfig, FlowConfig, Recipe,
    )  # fmt: skip
    reads = Reads(monkeypatch, kinds)
    run = Run(tmp_path, "tiny")
    for stage in STAGES:
        run.run_stage(stage, replace(tiny[stage], steps=3), lambda _: None)
    model, processor = from_pretrained(tmp_path / "model")
    generate.generate(model, processor, ["a red circle"], steps=2)
    generate.ask(model, processor, pictures(1)[0], "how many circles ?")
    released = PRESETS["4b"].vision
    assert released is not None
    vision = replace(
        released, depth=1, width=32, num_heads=2, mlp_width=32, out_width=32, full_attention_blocks=(0,)
    )  # fmt: skip
    QwenVision(vision)(torch.zeros(16, vision.patch_values), [(1, 4, 4)])
    ids = torch.tensor([text.question_prompt([20])])
    positions = multimodal_positions(ids, None, model.config.image_token, (2, 2))
    model.llm(model.llm.embed(ids), positions)
    # Read where a number is bad and where pictures are drawn while training: test_train_options.py.
    elsewhere = {("Recipe", "max_bad_batches"), ("Recipe", "prompts")}
    missing = {(kind.__name__, field.name) for kind in kinds for field in fields(kind)} - reads.found - elsewhere
    assert not missing


def test_the_reading_test_would_see_an_unread_field(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = Reads(monkeypatch, (FlowConfig,))
    flow = PRESETS["nano"].flow
    assert config_module.from_dict(FlowConfig, config_module.to_dict(flow)) == flow
    replace(flow, sigma_std=2.0)
    assert not reads.found
