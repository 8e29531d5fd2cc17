"""Configurations: presets are consistent, mistakes are named, and what is written down comes back."""

import ast
import json
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
import torch

from blip3o import config as config_module
from blip3o.clip import Clip
from blip3o.config import Blip3oConfig, ClipConfig, DitConfig, LlmConfig, from_dict, to_dict
from blip3o.dit import Dit
from blip3o.llm import Llm
from blip3o.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_presets_come_back_from_json(name: str) -> None:
    config = preset(name)
    assert config.name == name
    assert from_dict(Blip3oConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"\['4b', '8b', 'nano'\], got '7b'"):
        preset("7b")


def test_configurations_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        preset("nano").num_queries = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depht": 3}, r"Blip3oConfig\.llm: unknown fields \['depht'\]"),
        ({"depth": None}, r"Blip3oConfig\.llm\.depth must be of type int, got None"),
        ({"depth": "4"}, r"Blip3oConfig\.llm\.depth must be of type int, got '4'"),
        ({"depth": True}, r"Blip3oConfig\.llm\.depth must be of type int, got True"),
        ({"qkv_bias": 1}, r"Blip3oConfig\.llm\.qkv_bias must be of type bool, got 1"),
        ({"mrope_section": [4, "6", 6]}, r"Blip3oConfig\.llm\.mrope_section must be a list of integers"),
    ],
)
def test_mistakes_in_a_dictionary_are_named(change: dict[str, object], message: str) -> None:
    values = to_dict(preset("nano"))
    values["llm"].update(change)
    with pytest.raises(ValueError, match=message):
        from_dict(Blip3oConfig, values)


def test_a_missing_field_is_named() -> None:
    values = to_dict(preset("nano"))
    del values["dit"]["grid"]
    with pytest.raises(ValueError, match=r"Blip3oConfig\.dit: unknown fields \[\], missing fields \['grid'\]"):
        from_dict(Blip3oConfig, values)
    with pytest.raises(ValueError, match=r"Blip3oConfig\.dit must be a table of fields, got 3"):
        from_dict(Blip3oConfig, {**values, "dit": 3})


def test_an_integer_serves_as_a_float() -> None:
    values = to_dict(preset("nano"))
    values["llm"]["rope_theta"] = 10000
    theta = from_dict(Blip3oConfig, values).llm.rope_theta
    assert theta == 1e4 and isinstance(theta, float)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("clip", {"num_heads": 5}, r"ClipConfig\.width must be a multiple of num_heads = 5, got 128"),
        ("clip", {"patch_size": 7}, r"ClipConfig\.image_size must be a multiple of patch_size = 7, got 32"),
        ("clip", {"depth": 0}, r"ClipConfig\.depth must be positive, got 0"),
        ("llm", {"mrope_section": (4, 6, 7)}, r"sum to head_dim / 2 = 16, got \(4, 6, 7\)"),
        ("llm", {"num_kv_heads": 3}, r"LlmConfig\.num_heads must be a multiple of num_kv_heads = 3, got 4"),
        ("llm", {"head_dim": 31}, r"LlmConfig\.head_dim must be a multiple of 2 = 2, got 31"),
        ("dit", {"num_heads": 7}, r"DitConfig\.width must be a multiple of 4 num_heads = 28, got 192"),
        ("decoder", {"patch_size": 32}, r"DecoderConfig\.image_size must be a multiple of patch_size x feature_grid"),
        ("vision", {"window_size": 100}, r"VisionConfig\.window_size must be a multiple of patch_size x merge_size"),
        ("vision", {"depth": 20}, r"must lie in 0\.\.19 \(depth 20\), got \[23, 31\]"),
    ],
)
def test_inconsistent_parts_are_refused(part: str, change: dict[str, int], message: str) -> None:
    config = preset("8b" if part == "vision" else "nano")
    with pytest.raises(ValueError, match=message):
        replace(getattr(config, part), **change)


def test_parts_that_do_not_fit_each_other_are_refused() -> None:
    nano, big = preset("nano"), preset("8b")
    with pytest.raises(ValueError, match=r"dit\.condition_width = 3584 and llm\.width = 128"):
        replace(nano, dit=replace(nano.dit, condition_width=3584))
    with pytest.raises(ValueError, match=r"dit\.in_channels = 64 and clip\.width = 128"):
        replace(nano, dit=replace(nano.dit, in_channels=64))
    with pytest.raises(ValueError, match=r"vision\.out_width = 2048 and llm\.width = 3584"):
        replace(big, vision=preset("4b").vision)
    with pytest.raises(ValueError, match="must be a multiple of feature_grid = 3, got 2"):
        replace(nano, feature_grid=3)
    with pytest.raises(ValueError, match=r"image_token must lie in 0\.\.127, got 128"):
        replace(nano, image_token=128)
    with pytest.raises(ValueError, match="must differ"):
        replace(nano, image_token=nano.query_start_token)


def test_released_shapes() -> None:
    """The facts a released checkpoint needs, written a second time."""
    for name, width, depth, heads, groups, mlp, tied in (
        ("4b", 2048, 36, 16, 2, 11008, True),
        ("8b", 3584, 28, 28, 4, 18944, False),
    ):
        config = preset(name)
        llm, dit = config.llm, config.dit
        assert (llm.width, llm.depth, llm.num_heads, llm.num_kv_heads, llm.mlp_width) == (
            width,
            depth,
            heads,
            groups,
            mlp,
        )
        assert (llm.vocab_size, llm.head_dim, llm.mrope_section, llm.tie_embeddings) == (
            151668,
            128,
            (16, 24, 24),
            tied,
        )
        assert (dit.width, dit.depth, dit.num_heads, dit.num_kv_heads, dit.mlp_width) == (1792, 24, 28, 28, 4864)
        assert (config.num_queries, config.feature_grid, config.clip.grid) == (64, 8, 32)
        assert (config.image_token, config.query_start_token) == (151655, 151665)


NETWORKS = {"clip": Clip, "llm": Llm, "dit": Dit}


@pytest.mark.parametrize("part", NETWORKS)
def test_networks_are_built_and_initialised_without_memory(part: str) -> None:
    """On the meta device, as a checkpoint's loader does; then filled and initialised for real."""
    network_config = getattr(preset("nano"), part)
    with torch.device("meta"):
        network = NETWORKS[part](network_config)
    assert all(parameter.is_meta for parameter in network.parameters())
    assert not list(network.buffers())
    network.to_empty(device="cpu")
    for parameter in network.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    network.init_weights()
    wrong = [name for name, parameter in network.named_parameters() if not parameter.isfinite().all()]
    assert not wrong, f"init_weights leaves {wrong} untouched"


def test_every_field_is_read() -> None:
    """A field that nothing reads is a dead option. Special tokens and cross-cutting fields are read by the model."""
    package = Path(config_module.__file__).parent
    read = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    for kind in (ClipConfig, LlmConfig, DitConfig):
        assert not {field.name for field in fields(kind)} - read, kind.__name__
