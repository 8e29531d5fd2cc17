"""Released checkpoints: read, written and converted bit for bit; whatever does not fit is named."""

import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip3o import cli, weights
from blip3o.model import Blip3o
from blip3o.pipeline import Pipeline
from blip3o.presets import preset
from blip3o.weights import CONFIG, MANIFEST, CorruptModel, convert, local_folder
from blip3o.weights_files import INDEX, SkippedTensors, TensorFiles, WrongTensors, grouped
from blip3o.weights_names import released_parts

pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers")
from released_checkpoint import CLIP_WIDTH, Checkpoint, write_shards

FIRST = "model-00001-of-00003.safetensors"


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint()


@pytest.fixture
def folder(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    return checkpoint.write(tmp_path / "released")


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def edit_config(folder: Path, **changes: object) -> None:
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in {**values, **changes}.items() if v is not None}))


# what is read


@pytest.mark.parametrize(("naming", "shards"), [("4.51", 1), ("4.51", 3), ("5", 3)])
def test_both_namings_one_file_or_shards(checkpoint: Checkpoint, tmp_path: Path, naming: str, shards: int) -> None:
    """A name on the way to the folder says nothing: sizes are the tensors' and config.json's."""
    model = Blip3o.from_pretrained(checkpoint.write(tmp_path / "BLIP3o-8B-7B", naming=naming, shards=shards))
    assert not model.training and all(not tensor.is_meta for tensor in model.state_dict().values())
    config = model.config
    assert (config.num_queries, config.feature_grid, config.llm.width, config.dit.mlp_width) == (5, 2, 64, 128)
    assert (config.clip.image_size, config.clip.width, config.clip.depth) == (112, CLIP_WIDTH, 2)
    assert (config.query_start_token, config.image_token, config.end_token, config.pad_token) == (264, 262, 258, 256)
    source, state = checkpoint.tensors(), model.state_dict()
    assert torch.equal(state["queries"], source["model.latent_queries"][0])
    qkv = torch.cat([source[f"model.layers.1.self_attn.{part}_proj.bias"] for part in "qkv"])
    assert torch.equal(state["llm.blocks.1.attention.qkv.bias"], qkv)
    assert not model.feature_mean.any() and bool((model.feature_std == 1).all())


def test_the_released_shapes_are_those_of_the_presets() -> None:
    for name, width, count in (("4b", 2048, 36), ("8b", 3584, 28)):
        parts = {part.name: part.shape for some in released_parts(preset(name), True).values() for part in some}
        assert parts["model.embed_tokens.weight"] == (151668, width) and ("lm_head.weight" in parts) == (name == "8b")
        assert parts["model.dit.model.layers.23.feed_forward.linear_1.weight"] == (4864, 1792)
        assert parts["model.dit.model.layers.0.norm1.linear.weight"] == (7168, 1024)
        assert parts["model.gen_vision_tower.vision_tower.model.pos_embed"] == (1, 1025, 1792)
        assert f"model.layers.{count - 1}.self_attn.q_proj.bias" in parts
        with torch.device("meta"):
            sizes = {n: t.numel() for n, t in Blip3o(preset(name)).state_dict().items() if "feature" not in n}
        made = released_parts(preset(name), True).items()
        assert sizes == {n: sum(torch.Size(part.shape).numel() for part in some) for n, some in made}


def test_a_published_configuration_is_its_preset(tmp_path: Path) -> None:
    """Of the released sizes, without any weights: config.json and the tensors' shapes say it all."""
    from blip3o.weights_config import read_config, write_config

    for name in ("4b", "8b"):
        shapes = {part.name: part.shape for some in released_parts(preset(name), True).values() for part in some}
        values = write_config(preset(name), torch.bfloat16, True)
        assert read_config(values, shapes, tmp_path) == preset(name)
        towerless = {n: shape for n, shape in shapes.items() if "gen_vision_tower" not in n}
        assert read_config(values, towerless, tmp_path) == preset(name)


def test_tied_embeddings(tmp_path: Path) -> None:
    tied = Checkpoint(tie=True)
    model = Blip3o.from_pretrained(tied.write(tmp_path / "tied"))
    assert model.llm.out is None and model.llm.output_weight is model.llm.embedding.weight
    embedding = "model.embed_tokens.weight"
    stored_twice = tied.write(tmp_path / "twice", change=lambda t: t.update({"lm_head.weight": t[embedding]}))
    with pytest.warns(SkippedTensors, match=r"skipped lm_head\.weight"):
        assert Blip3o.from_pretrained(stored_twice).llm.out is None
    other = tied.write(tmp_path / "other", change=lambda t: t.update({"lm_head.weight": t[embedding] + 1}))
    with pytest.raises(CorruptModel, match=r"lm_head\.weight is not model\.embed_tokens\.weight, but config\.json has"):
        Blip3o.from_pretrained(other)
    wide = tied.write(tmp_path / "wide", change=lambda t: t.update({"lm_head.weight": t[embedding].double()}))
    with pytest.warns(SkippedTensors, match=r"skipped lm_head\.weight"):
        assert Blip3o.from_pretrained(wide).llm.out is None
    whole = tied.write(tmp_path / "whole", change=lambda t: t.update({"lm_head.weight": t[embedding].long()}))
    with pytest.raises(CorruptModel, match=r"dtypes must be in .*, got lm_head\.weight \(I64\)"):
        Blip3o.from_pretrained(whole)
    alone = tied.write(tmp_path / "alone", change=lambda t: t.update({"lm_head.weight": t.pop(embedding)}))
    with pytest.raises(WrongTensors, match=r"missing model\.embed_tokens\.weight"):
        Blip3o.from_pretrained(alone)


def test_leftovers_are_skipped_and_named(tmp_path: Path) -> None:
    folder = Checkpoint(vae=True).write(tmp_path / "vae")
    names = r"skipped model\.vae\.decoder\.conv_in\.weight, model\.vae\.encoder\.conv_in\.bias"
    with pytest.warns(SkippedTensors, match=names):
        Blip3o.from_pretrained(folder)
    with pytest.raises(
        WrongTensors, match=r"unexpected model\.vae\.decoder\.conv_in\.weight, model\.vae\.enc"
    ) as caught:
        Blip3o.from_pretrained(folder, skip=())
    assert len(caught.value.unexpected) == 2 and not caught.value.missing


def test_the_tower_is_used_or_left_out(checkpoint: Checkpoint, folder: Path, tmp_path: Path) -> None:
    pictures = torch.rand(1, 3, 112, 112)
    with_tower = Blip3o.from_pretrained(folder)
    assert with_tower.has_clip and with_tower.features(pictures).shape == (1, 4, CLIP_WIDTH)
    with pytest.warns(SkippedTensors, match=r"skipped model\.gen_vision_tower\..*blocks\.\{0-1\}\.mlp"):
        left_out = Blip3o.from_pretrained(folder, tower=False)
    towerless = Checkpoint(tower=False).write(tmp_path / "towerless")
    edit_config(towerless, gen_pooling="early_pool2d_16")  # of the published tower's 32 patches
    for model in (left_out, Blip3o.from_pretrained(towerless)):
        assert not model.has_clip and not [name for name in model.state_dict() if name.startswith("clip.")]
        with pytest.raises(ValueError, match=r"cannot look at pictures through CLIP: .*tower was not loaded"):
            model.features(pictures)
        for layout in ("blip3o", "released"):
            model.save_pretrained(tmp_path / f"as_{layout}", layout=layout, files=[folder / "tokenizer.json"])
            again = Blip3o.from_pretrained(tmp_path / f"as_{layout}")
            assert not again.has_clip and same(again.state_dict(), model.state_dict())


# round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_there_and_back_bit_for_bit(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    def cast(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    monkeypatch.setattr(weights, "SHARD", 500_000)
    first = checkpoint.write(tmp_path / "first", change=cast)
    model = Blip3o.from_pretrained(first)
    model.save_pretrained(tmp_path / "ours", files=[first / "tokenizer.json"])
    assert (tmp_path / "ours" / INDEX).exists() and not (tmp_path / "ours" / "model.safetensors").exists()
    ours = Blip3o.from_pretrained(tmp_path / "ours")
    assert ours.config == model.config and same(ours.state_dict(), model.state_dict())
    ours.save_pretrained(tmp_path / "last", layout="released", files=[first / "tokenizer.json"])
    assert same(stored(tmp_path / "last"), stored(first))
    last = Blip3o.from_pretrained(tmp_path / "last")
    assert last.config == model.config and same(last.state_dict(), model.state_dict())
    wide = Blip3o.from_pretrained(first, dtype=torch.float32)
    assert all(torch.equal(t, model.state_dict()[name].float()) for name, t in wide.state_dict().items())


def test_a_shard_that_was_exchanged_is_found(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of either layout, as written here: the manifest has the sums of all shards."""
    monkeypatch.setattr(weights, "SHARD", 500_000)
    model = Blip3o.from_pretrained(folder)
    for layout in ("blip3o", "released"):
        place = tmp_path / f"as_{layout}"
        model.save_pretrained(place, layout=layout, files=[folder / "tokenizer.json"])
        shard = min(place.glob("model-*"))
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
        with pytest.raises(CorruptModel, match=rf"{shard.name} is corrupt: its SHA-256 sum"):
            Blip3o.from_pretrained(place)
        sums = json.loads((place / MANIFEST).read_text())
        (place / MANIFEST).write_text(json.dumps({name: value for name, value in sums.items() if name != shard.name}))
        with pytest.raises(CorruptModel, match=rf"{shard.name} has no sum in manifest\.json"):
            Blip3o.from_pretrained(place)


def test_what_the_released_layout_cannot_hold(lively: Blip3o, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model 'tiny' has no vision tower: the released layout cannot hold it"):
        weights.save_model(lively, tmp_path / "out", layout="released")
    model, files = Blip3o.from_pretrained(folder), [folder / "tokenizer.json"]
    with pytest.raises(ValueError, match=r"with these files beside it: .*query_start_token must lie in 0\.\.266"):
        model.save_pretrained(tmp_path / "out", layout="released")
    config = model.config
    model.config = replace(config, dit=replace(config.dit, rope_theta=2.0))
    with pytest.raises(ValueError, match=r"dit\.rope_theta is 2\.0, and would be read as 10000\.0"):
        model.save_pretrained(tmp_path / "out", layout="released", files=files)
    model.config = replace(config, objective="mse")
    with pytest.raises(ValueError, match="objective is mse, and would be read as flow"):
        model.save_pretrained(tmp_path / "out", layout="released", files=files)
    model.config = config
    model.feature_mean[0] = 1
    with pytest.raises(ValueError, match="feature_mean must be 0"):
        model.save_pretrained(tmp_path / "out", layout="released", files=files)
    with pytest.raises(ValueError, match="layout must be one of"):
        model.save_pretrained(tmp_path / "out", layout="gguf")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_tower_of_its_own_file(checkpoint: Checkpoint, folder: Path, tmp_path: Path) -> None:
    """Under the names that a file of the tower alone has."""
    towerless = Checkpoint(tower=False).write(tmp_path / "towerless")
    tower = tmp_path / "tower.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in checkpoint.eva.state_dict().items()}, tower)
    model = Blip3o.from_pretrained(towerless, tower=tower)
    assert same(model.state_dict(), Blip3o.from_pretrained(folder).state_dict())
    twice = Blip3o.from_pretrained(folder, tower=str(tower))  # instead of the checkpoint's
    assert same(twice.state_dict(), model.state_dict())
    torch.save(checkpoint.eva.state_dict(), tmp_path / "tower.bin")
    with pytest.raises(CorruptModel, match=r"tower\.bin: a pickle"):
        Blip3o.from_pretrained(towerless, tower=tmp_path / "tower.bin")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors does not exist"):
        Blip3o.from_pretrained(towerless, tower=tmp_path / "nowhere.safetensors")
    with pytest.raises(CorruptModel, match=r"missing model\.gen_vision_tower\..*cls_token"):
        short = {name: t.contiguous() for name, t in checkpoint.eva.state_dict().items() if name != "cls_token"}
        save_file(short, tower)
        Blip3o.from_pretrained(towerless, tower=tower)
    model.save_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / "model.safetensors").write_bytes(b"")  # which is not looked at before
    with pytest.raises(ValueError, match="tower must be True or False for a folder of our layout"):
        Blip3o.from_pretrained(tmp_path / "ours", tower=tower)


@pytest.mark.parametrize("layout", ["blip3o", "released"])
def test_a_folder_left_between_two_renames(folder: Path, tmp_path: Path, layout: Any) -> None:
    """Its writer was killed: all there is lies at NAME.old, and is read from there as NAME, by whatever reads it."""
    model = Blip3o.from_pretrained(folder)
    place = tmp_path / "x"
    model.save_pretrained(place, layout=layout, files=[folder / "tokenizer.json"])
    place.rename(tmp_path / "x.old")
    assert not place.exists() and weights.uses_pipeline(place)
    assert same(Blip3o.from_pretrained(place).state_dict(), model.state_dict())
    assert same(Pipeline.from_pretrained(str(place)).model.state_dict(), model.state_dict())
    assert weights.convert(place, tmp_path / "y", layout="released") == []
    assert same(stored(tmp_path / "y"), stored(folder)) and (tmp_path / "y" / "tokenizer.json").exists()


def test_a_writer_that_ends_while_the_old_folder_is_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, old = tmp_path / "x", tmp_path / "x.old"
    Blip3o.from_pretrained(folder).save_pretrained(place)
    place.rename(old)
    sum_of = weights.sha256

    def ending(path: Path) -> str:
        if old.exists():
            old.rename(place)
        return sum_of(path)

    monkeypatch.setattr(weights, "sha256", ending)
    assert weights.check_folder(local_folder(place)) == place


def test_convert(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command: there, back, cast, and without the tower; what is not copied is told."""
    (folder / "diffusion-decoder").mkdir()
    (folder / "notes.md").write_text("")
    ours, back, half = (str(tmp_path / name) for name in ("ours", "back", "half"))
    assert cli.main(["convert", str(folder), ours]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{ours}: {folder} in the layout blip3o\nnot copied: diffusion-decoder, notes.md\n"
    assert printed.err == ""
    assert cli.main(["convert", ours, back, "--layout", "released"]) == 0
    assert same(stored(tmp_path / "back"), stored(folder))
    tokenizer = (folder / "tokenizer.json").read_bytes()
    assert (tmp_path / "ours" / "tokenizer.json").read_bytes() == (tmp_path / "back" / "tokenizer.json").read_bytes()
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == tokenizer
    capsys.readouterr()
    assert cli.main(["convert", back, half, "--dtype", "bfloat16", "--without-tower"]) == 0
    told = capsys.readouterr().err
    assert told.startswith(f"blip3o: {back}: skipped model.gen_vision_tower.") and "blocks.{0-1}.attn.qkv.bias" in told
    model = Blip3o.from_pretrained(half)
    assert not model.has_clip and model.llm.output_weight.dtype == torch.bfloat16
    assert cli.main(["convert", str(tmp_path / "nothing"), half]) == 2
    assert capsys.readouterr().err == f"blip3o: model folder {tmp_path / 'nothing'} does not exist\n"


# what is refused


def test_every_missing_and_unexpected_name(checkpoint: Checkpoint, tmp_path: Path) -> None:
    lost = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)] + ["model.latent_queries"]

    def change(tensors: dict[str, Tensor]) -> None:
        for name in lost:
            del tensors[name]
        tensors.update({"model.mm_projector.weight": torch.zeros(2), "visual.merger.mlp.4.bias": torch.zeros(2)})

    with pytest.raises(WrongTensors) as caught:
        Blip3o.from_pretrained(checkpoint.write(tmp_path / "x", change=change))
    assert caught.value.missing == sorted(lost)
    assert caught.value.unexpected == ["model.mm_projector.weight", "visual.merger.mlp.4.bias"]
    assert "missing model.latent_queries, model.layers.{0-1}.mlp.up_proj.weight; unexpected" in str(caught.value)


def drop(*names: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: [tensors.pop(name) for name in names]


def put(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: make(tensors[name])})


NORM, POSITIONS = "model.norm.weight", "model.gen_vision_tower.vision_tower.model.pos_embed"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(NORM, lambda t: t[:-1]), r"model\.norm\.weight has shape \[63\], expected \[64\]"),
        (put("visual.blocks.1.attn.proj.weight", lambda t: t[:, :3]), r"proj\.weight has shape \[32, 3\], expected"),
        (drop("model.dit.model.layers.0.gate"), r"missing model\.dit\.model\.layers\.0\.gate"),
        (put(NORM, lambda t: t.double()), r"model\.norm\.weight has dtype torch\.float64, expected torch\.float32"),
        (put(NORM, lambda t: t.bfloat16()), r"norm\.weight has dtype torch\.bfloat16, .*or a dtype to be given"),
        (put(NORM, lambda t: t.long()), r"dtypes must be in .*, got model\.norm\.weight \(I64\)"),
        (lambda t: t.update({"model.language_model.norm.weight": t[NORM]}), "one tensor under two names, model.norm"),
        (put("model.dit.model.layers.0.gate", lambda t: t[0]), r"layers\.0\.gate must have 1 dimensions, .*, got \[\]"),
        (put(POSITIONS, lambda t: t[0, 0]), r"pos_embed must have 3 dimensions, none of them 0, got \[224\]"),
        (put("model.latent_queries", lambda t: t[0]), r"latent_queries has shape \[5, 64\], expected \[1, 5, 64\]"),
        (lambda t: t.update({"model.dit.model.layers.99999999.gate": t[NORM]}), r"unexpected .*layers\.99999999\.gate"),
        (lambda t: t.update({"model.dit.model.layers.x.gate": t[NORM]}), r"unexpected .*layers\.x\.gate"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(
    checkpoint: Checkpoint, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    folder = checkpoint.write(tmp_path / "x", change=change)
    with pytest.raises(CorruptModel, match=message) as caught:
        Blip3o.from_pretrained(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_mixed_checkpoint_is_read_with_a_dtype(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoint.write(tmp_path / "x", change=put(NORM, lambda t: t.double()))
    model = Blip3o.from_pretrained(folder, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}


def test_a_tied_output_layer_of_whole_numbers(tmp_path: Path) -> None:
    """Its dtype is named before it is compared with the embedding."""
    folder = Checkpoint(tie=True).write(
        tmp_path / "x", change=lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].to(torch.int8)})
    )
    with pytest.raises(CorruptModel, match=r"dtypes must be in .*, got lm_head\.weight \(I8\)"):
        Blip3o.from_pretrained(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, r"dtype must be one of torch\.float32, .*, got 'bfloat16'"),
        ({"dtype": torch.int8}, r"dtype must be one of .*, got torch\.int8"),
        ({"skip": "model.vae."}, r"skip must be a list of prefixes, got 'model\.vae\.'"),
        ({"skip": ("model.norm",)}, r"missing model\.norm\.weight"),
    ],
)
def test_wrong_arguments_are_named(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Blip3o.from_pretrained(folder, **options)


def test_nothing_is_left_of_a_failed_write(folder: Path, tmp_path: Path) -> None:
    """Nor is a folder converted into itself, which would lose what is not copied."""
    model = Blip3o.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        model.save_pretrained(tmp_path / "new", files=[folder / "tokenizer.json", tmp_path / "nowhere"])
    model.save_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / "diffusion-decoder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"folder must be another than .*ours, which is read"):
        convert(tmp_path / "ours", tmp_path / "released" / ".." / "ours", layout="blip3o")
    assert sorted(tmp_path.rglob("*")) == before
    assert not list(tmp_path.glob("*.new"))


def truncate(folder: Path) -> None:
    (folder / FIRST).write_bytes((folder / FIRST).read_bytes()[:-1000])


def garbage(folder: Path) -> None:
    (folder / FIRST).write_bytes(b"\xff" * 4000)


def pickles(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    torch.save({"model.norm.weight": torch.zeros(3)}, folder / "pytorch_model.bin")


def pickle_in_the_index(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {NORM: "pytorch_model-00001.bin"}}))


def outside(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {NORM: "../model.safetensors"}}))


def exchange(folder: Path) -> None:
    tensors = load_file(folder / FIRST)
    name = min(tensors)
    tensors["another"] = tensors.pop(name)
    save_file(tensors, folder / FIRST)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, rf"{FIRST} is not a readable safetensors file: .*has \d+ bytes, its header says \d+\)"),
        (garbage, rf"{FIRST} is not a readable safetensors file"),
        (lambda folder: (folder / FIRST).unlink(), rf"{FIRST} is missing: {INDEX} names it for \d+ tensors, as "),
        (exchange, rf"{FIRST} is not what .*{INDEX} says: it lacks \S+ and also holds another"),
        (lambda folder: (folder / INDEX).write_text("{"), f"{INDEX} must be JSON with a table weight_map"),
        (outside, r"must name files of its own folder, got '\.\./model\.safetensors' for model\.norm\.weight"),
        (lambda folder: (folder / INDEX).unlink(), r"model\.safetensors is missing, and so is"),
        (pickles, r"pytorch_model\.bin: a pickle, .* not read\. .*convert it: python -c .*weights_only=True"),
        (pickle_in_the_index, r"pytorch_model-00001\.bin: a pickle"),
        (lambda folder: edit_config(folder, model_type="llama"), "model_type must be .* got 'llama': an unknown arch"),
        (lambda folder: edit_config(folder, gen_vision_tower="siglip"), "gen_vision_tower must be 'eva-clip"),
        (lambda folder: edit_config(folder, gen_pooling="max"), "gen_pooling must be early_pool2d_ and a number, got"),
        (lambda folder: edit_config(folder, gen_pooling="early_pool2d_3"), "must divide the CLIP tower's 8 patches"),
        (lambda folder: edit_config(folder, rope_scaling=None), "must hold mrope_section"),
        (lambda folder: edit_config(folder, hidden_size="64"), r"hidden_size must be a whole number, .*, got '64'"),
        (lambda folder: edit_config(folder, num_attention_heads=0), "num_attention_heads must be a whole .* got 0"),
        (lambda folder: edit_config(folder, num_hidden_layers=10**8), "depth must be at most 4096, got 10{8}"),
        (lambda folder: edit_config(folder, rms_norm_eps=math.nan), "rms_norm_eps must be a finite number .* got nan"),
        (lambda folder: edit_config(folder, rope_theta=math.inf), "rope_theta must be a finite number .* got inf"),
        (lambda folder: edit_config(folder, rope_scaling=["x"]), r"rope_scaling must be a table, got \['x'\]"),
        (lambda folder: edit_config(folder, rope_scaling={"mrope_section": [-2, 5, 5]}), "three numbers, none below 0"),
        (lambda folder: edit_config(folder, vision_config=[]), r"vision_config must be a table, got \[\]"),
        (lambda folder: edit_config(folder, text_config=3), "text_config must be a table, got 3"),
        (lambda folder: edit_config(folder, tie_word_embeddings="false"), "tie_word_embeddings must be true or false"),
        (lambda folder: edit_config(folder, n_query=math.inf), "n_query must be a whole number, .* got inf"),
        (lambda folder: edit_config(folder, gen_pooling="early_pool2d_0"), "'early_pool2d_0' must divide the CLIP"),
        (lambda folder: edit_config(folder, model_type=["x"]), r"model_type must be .* got \['x'\]: an unknown arch"),
        (lambda folder: edit_config(folder, hidden_size=128, num_attention_heads=8), "condition_width must equal llm"),
        (lambda folder: edit_config(folder, gen_hidden_size=336), "dit.in_channels must equal clip.width"),
        (lambda folder: edit_config(folder, n_query=6), r"latent_queries has shape \[1, 5, 64\], expected \[1, 6"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json is not a tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"added_tokens": []}'), r"lacks the special .*\[IMG\]"),
        (lambda folder: (folder / CONFIG).write_text("[" * 100_000), "config.json is not readable JSON"),
        (lambda folder: (folder / INDEX).write_text("[" * 100_000), f"{INDEX} must be JSON with a table weight_map"),
        (lambda folder: (folder / CONFIG).write_text("{"), "config.json is not readable JSON: Expecting"),
        (lambda folder: (folder / CONFIG).unlink(), r"is no model folder: it has neither config\.json nor manifest"),
    ],
)  # fmt: skip
def test_damage_is_named(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(CorruptModel, match=message) as caught:
        Blip3o.from_pretrained(folder)
    assert "\n" not in str(caught.value) and "released" in str(caught.value)


def test_names_are_grouped_by_layer() -> None:
    assert grouped(["a.0.b", "a.2.b", "a.1.b", "a.7.b", "c.d", "e.3.f.4.g"]) == ["a.{0-2,7}.b", "c.d", "e.3.f.4.g"]


# the hub


def test_nothing_is_downloaded_unless_a_hub_id_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked: list[tuple[str, Any]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    for place in (folder, str(folder), "released", "released/nothing", Path("owner/name"), "a/b/c", "nothing"):
        local_folder(place)
    assert not asked
    assert Blip3o.from_pretrained("owner/name").config.llm.width == 64
    assert [name for name, _ in asked] == ["owner/name"]
    assert not [pattern for pattern in asked[0][1] if re.search("bin|pt|pkl|py|\\*$", pattern)]


# memory

MEASURED = """
import sys
from pathlib import Path
from blip3o.model import Blip3o

def used(word):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(word))

def measure(place):
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = used("VmRSS")
    model = Blip3o.from_pretrained(place)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    print(size, (used("VmHWM") - before) / size)
    return model

small, large, ours = sys.argv[1:]
Blip3o.from_pretrained(small)  # what is loaded late is loaded now
model = measure(large)
model.save_pretrained(ours)
del model
measure(ours)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_loading_needs_little_more_than_the_weights(folder: Path, tmp_path: Path) -> None:
    """In either layout; our largest tensor is a third of the whole."""
    config = Blip3o.from_pretrained(folder).config
    config = replace(config, llm=replace(config.llm, mlp_width=3 << 17))  # 2 layers of 3 x 48 MiB in bfloat16
    shapes = {part.name: part.shape for some in released_parts(config, True).values() for part in some}
    large = tmp_path / "large"
    large.mkdir()
    for name in ("tokenizer.json", CONFIG):
        (large / name).write_bytes((folder / name).read_bytes())
    edit_config(large, intermediate_size=3 << 17)
    write_shards({name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, large, 2)
    command = [sys.executable, "-W", "ignore", "-c", MEASURED, folder, large, tmp_path / "ours"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = [line.split() for line in done.stdout.splitlines()]
    assert len(measured) == 2 and all(int(size) > 300e6 and float(ratio) <= 1.1 for size, ratio in measured), measured


def test_what_converts_a_pickle_is_a_command_that_works(tmp_path: Path) -> None:
    """Also for a file whose name a shell would take for more than a name."""
    folder = tmp_path / "it's $(false) here"
    folder.mkdir()
    tensors = {"a": torch.randn(2, 3)}
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(CorruptModel) as refusal, TensorFiles(folder):
        pass
    command = str(refusal.value).partition("convert it: ")[2].replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], tensors["a"])
