"""Runs that begin with Qwen2.5-VL's own folder: its words and weights, the released models' words behind them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import Tensor

from blip3o import cli, weights_files
from blip3o.data.shard_files import write_shards as write_samples
from blip3o.model import Blip3o
from blip3o.pipeline import Pipeline
from blip3o.presets import PRESETS, preset
from blip3o.qwen_processor import ADDED, QwenProcessor, complete_tokenizer
from blip3o.train.run import Run
from blip3o.weights import CorruptModel, from_pretrained
from blip3o.weights_files import SkippedTensors, WrongTensors

pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers")
from released_checkpoint import (
    ID,
    SPECIAL,
    VOCABULARY,
    Checkpoint,
    qwen,
    qwen_config,
    qwen_tensors,
    write_shards,
    write_tokenizer,
)

ROWS = 280  # of Qwen2.5-VL's embedding, some of them of no word
HELD = VOCABULARY - len(ADDED)
EMBEDDING, OUTPUT = "llm.embedding.weight", "llm.out.weight"
FRESH = [f"{EMBEDDING}[{HELD}:{VOCABULARY}]", f"{OUTPUT}[{HELD}:{VOCABULARY}]"]
NORM, WORDS = "model.norm.weight", "model.embed_tokens.weight"  # in Qwen2.5-VL's files
RECIPE = """
model = "{model}"
weights = "{weights}"
clip_weights = "{tower}"
[generation]
steps = 2
batch_size = 2
learning_rate = 1e-3
final_learning_rate = 0.0
warmup_steps = 0
weight_decay = 0.0
betas = [0.9, 0.999]
clip_norm = 1.0
dtype = "float32"
seed = 5
max_tokens = 128
condition_drop = 0.1
data = [{{ path = "{data}" }}]
"""


def same(tensors: dict[str, Tensor]) -> None:
    """Leave them as they are."""


@dataclass
class Source:
    """Qwen2.5-VL, a CLIP tower's file, and a released checkpoint that holds both as a run should begin with them."""

    tie: bool
    network: Any
    tower: str
    released: Path

    def write(
        self,
        folder: Path,
        *,
        naming: str = "4.51",
        special: tuple[str, ...] = SPECIAL[: -len(ADDED)],
        change: Callable[[dict[str, Tensor]], object] = same,
        **config: object,
    ) -> str:
        """Qwen2.5-VL's folder; `change` edits the table of tensors, `config` config.json."""
        folder.mkdir(parents=True)
        tensors = qwen_tensors(self.network, self.tie, naming)
        change(tensors)
        (folder / "config.json").write_text(json.dumps({**qwen_config(self.tie, naming, ROWS), **config}))
        write_tokenizer(folder, special)
        write_shards(tensors, folder, 3)
        return str(folder)

    def begin(self, run: Path, weights: str | Path, model: str = "small", tower: str | None = None) -> Run:
        return Run(run, model, weights=str(weights), clip_weights=self.tower if tower is None else tower)


def source(folder: Path, tie: bool) -> Source:
    checkpoint = Checkpoint(tie)
    checkpoint.qwen = qwen(tie, ROWS)
    save_file(checkpoint.eva.state_dict(), folder / "tower.safetensors")

    def cut(tensors: dict[str, Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in tensors:
                words = tensors[name][:HELD]
                mean = words.double().mean(0).float()
                tensors[name] = torch.cat([words, mean.expand(len(ADDED), -1)])

    released = checkpoint.write(folder / "released", change=cut)
    return Source(tie, checkpoint.qwen, str(folder / "tower.safetensors"), released)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Source]:
    return {tie: source(tmp_path_factory.mktemp("qwen"), tie) for tie in (False, True)}


@pytest.fixture
def untied(sources: dict[bool, Source], monkeypatch: pytest.MonkeyPatch) -> Source:
    """The source whose sizes are those of the preset "small"; "tied" is the other's."""
    for name, tie in (("small", False), ("tied", True)):
        config = Blip3o.from_pretrained(sources[tie].released).config
        monkeypatch.setitem(PRESETS, name, replace(config, name=name))
    return sources[False]


@pytest.mark.parametrize("naming", ["4.51", "5", "as transformers saves it"])
@pytest.mark.parametrize("tie", [False, True])
def test_a_run_begins_as_with_a_released_base(
    sources: dict[bool, Source], untied: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tie: bool, naming: str
) -> None:
    """Bit for bit, in pieces too: the words' rows are Qwen2.5-VL's, new ones their mean, those of no word gone."""
    monkeypatch.setattr(weights_files, "MAPPED", 5000)
    own, name = sources[tie], "tied" if tie else "small"
    folder = own.write(tmp_path / "Qwen2.5-VL", naming=naming)
    if naming == "as transformers saves it":
        shutil.rmtree(folder)
        own.network.save_pretrained(folder)
        write_tokenizer(Path(folder), SPECIAL[: -len(ADDED)])
    run = own.begin(tmp_path / "run", folder, name)
    found, expected = run.model.state_dict(), Blip3o.from_pretrained(own.released).state_dict()
    frozen = [key for key in expected if not key.startswith(("queries", "dit."))]
    assert {key.split(".")[0] for key in frozen} == {"clip", "vision", "llm", "feature_mean", "feature_std"}
    assert all(torch.equal(found[key], expected[key]) for key in frozen) and found.keys() == expected.keys()
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert len(found[EMBEDDING]) == VOCABULARY and found[EMBEDDING][HELD].any()
    assert (OUTPUT in found) == (not tie)
    learned = [key for key in found if key.startswith(("queries", "dit."))]
    new = Run(tmp_path / "new", name).model.state_dict()
    assert run.fresh == learned + FRESH[: 1 if tie else 2]
    assert all(torch.equal(found[key], new[key]) for key in learned)


def test_the_language_model_says_what_transformers_says(untied: Source, tmp_path: Path) -> None:
    run = untied.begin(tmp_path / "run", untied.write(tmp_path / "qwen"))
    ids = torch.tensor([run.processor.encode("a cat<|im_end|>")])
    expected = untied.network(ids).logits[..., :HELD]
    model = run.model
    with torch.no_grad():
        hidden = model.llm(model.llm.embedding(ids), None, None)
        found = hidden @ model.llm.output_weight.T
    torch.testing.assert_close(found[..., :HELD], expected, atol=1e-5, rtol=1e-5)


def test_training_from_it_leaves_a_model_of_the_released_kind(
    untied: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command; its model folder has the words, in the tokenizer and in the embedding, and is drawn with."""
    folder = untied.write(tmp_path / "qwen")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    picture = (tmp_path / "red.png").read_bytes()
    write_samples(tmp_path / "shards", [(f"{i}", {"png": picture, "txt": b"red"}) for i in range(2)], 2)
    table = {"model": "small", "weights": folder, "tower": untied.tower, "data": tmp_path / "shards"}
    (tmp_path / "recipe.toml").write_text(RECIPE.format(**table))
    command = ["train", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run")]
    assert cli.main(command) == 0
    told = capsys.readouterr().out
    assert f"begun with {folder}, which lacks dit." in told and ", ".join([*FRESH, "queries: these are new"]) in told
    assert set(FRESH) < set(json.loads((tmp_path / "run" / "run.json").read_text())[0]["fresh"])

    left = Pipeline.from_pretrained(tmp_path / "run" / "model")
    begun, found = untied.begin(tmp_path / "begun", folder), left.model.state_dict()
    changed = {name for name, tensor in begun.model.state_dict().items() if not torch.equal(found[name], tensor)}
    assert "dit.patch_out.weight" in changed and all(name.startswith(("queries", "dit.")) for name in changed)
    for processor in (begun.processor, left.processor):
        assert isinstance(processor, QwenProcessor)
        ids = processor.drawing_prompt("a cat", "training")
        assert ids == left.processor.drawing_prompt("a cat", "training") and ids[-1] == ID["[IMG]"]
        assert processor.encode("".join(ADDED)) == [ID[word] for word in ADDED]
        assert processor.decode([ID[word] for word in ADDED]) == ""
    drawn = left.generate_image("a cat", num_inference_steps=2, output_type="features", seeds=0)
    assert drawn.shape == (1, 4, left.model.config.clip.width) and bool(drawn.isfinite().all())
    assert cli.main(["ask", str(tmp_path / "red.png"), "what?", "--model", str(tmp_path / "run" / "model")]) == 0

    capsys.readouterr()
    assert cli.main(command) == 0 and "stage generation is finished" in capsys.readouterr().out
    other = untied.write(tmp_path / "other", change=lambda t: t.update({NORM: t[NORM] + 1}))
    assert cli.main([*command, f"weights={other}"]) == 2
    assert "was begun with other weights" in capsys.readouterr().err
    again = untied.begin(tmp_path / "again", tmp_path / "run" / "model", tower="")
    assert not again.fresh and again.processor.encode("[IMG]") == [ID["[IMG]"]]


def test_words_that_the_processor_was_given_are_saved(untied: Source, tmp_path: Path) -> None:
    """By a pipeline too, in either layout; the files that transformers wrote beside tokenizer.json do not undo it."""
    from transformers import AutoTokenizer

    folder = untied.write(tmp_path / "qwen")
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)  # with all special words in tokenizer_config.json
    run = untied.begin(tmp_path / "run", folder)
    assert isinstance(run.processor, QwenProcessor)
    for layout in ("blip3o", "released"):
        place = tmp_path / layout
        Pipeline(run.model.eval(), run.processor).save_pretrained(place, layout=layout)
        left = Pipeline.from_pretrained(place)
        text = "a <image>cat[IMG] <|im_start|>é你[/IMG]"
        assert left.processor.encode(text) == run.processor.encode(text)
        assert AutoTokenizer.from_pretrained(place)(text).input_ids == run.processor.encode(text)
        assert all(torch.equal(x, left.model.state_dict()[name]) for name, x in run.model.state_dict().items())


def test_words_that_are_there_keep_their_rows(untied: Source, tmp_path: Path) -> None:
    run = untied.begin(tmp_path / "run", untied.write(tmp_path / "qwen", special=SPECIAL))
    rows = untied.network.state_dict()["model.language_model.embed_tokens.weight"]
    assert torch.equal(run.model.llm.embedding.weight, rows[:VOCABULARY]) and not set(FRESH) & set(run.fresh)
    run = untied.begin(tmp_path / "run", untied.write(tmp_path / "one", special=SPECIAL[:-2]))
    assert torch.equal(run.model.llm.embedding.weight[: HELD + 1], rows[: HELD + 1])
    assert run.fresh[-2:] == [f"{name}[{HELD + 1}:{VOCABULARY}]" for name in (EMBEDDING, OUTPUT)]


@pytest.mark.parametrize("name", ["4b", "8b"])
def test_the_ids_of_the_released_models(tmp_path: Path, name: str) -> None:
    """Of a tokenizer as large as Qwen2.5-VL's, whose special words are its last 22."""
    tokenizer = Tokenizer(models.BPE({f"word{i}": i for i in range(151643)}, []))
    special = {151643: "<|endoftext|>", 151645: "<|im_end|>", 151655: "<|image_pad|>"}
    tokenizer.add_special_tokens([special.get(i, f"<|{i}|>") for i in range(151643, 151665)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    content, held = complete_tokenizer(tmp_path, preset(name))
    ids = {entry["content"]: (entry["id"], entry["special"]) for entry in json.loads(content)["added_tokens"][-3:]}
    assert ids == {"[IMG]": (151665, True), "[/IMG]": (151666, True), "<image>": (151667, True)} and held == 151665


# what is refused


def test_a_tower_must_be_named(untied: Source, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"clip_weights must name the CLIP tower's safetensors file: .* Qwen2\.5-VL"):
        untied.begin(tmp_path / "run", untied.write(tmp_path / "qwen"), tower="")
    assert not (tmp_path / "run").exists()
    with pytest.raises(CorruptModel, match=r"model_type must be one of .*, got 'qwen2_5_vl'"):
        Blip3o.from_pretrained(tmp_path / "qwen")  # which is no BLIP3-o model
    with pytest.raises(CorruptModel):
        from_pretrained(tmp_path / "qwen")


@pytest.mark.parametrize(
    ("special", "message"),
    [
        ((*SPECIAL[:-3], "<|more|>"), r"there must be 267 of them, .* got 268 and .*'\[IMG\]': 265"),
        (SPECIAL[1:-3], r"ids .*'<\|endoftext\|>': 256, .* got 266 and .*'<\|endoftext\|>': None"),
        ((*SPECIAL[:-3], *SPECIAL[:-4:-1]), r"'\[IMG\]': 264, .*got 267 and .*'\[IMG\]': 266, .*'<image>': 264"),
        ((*SPECIAL, "<|more|>"), "there must be 267 of them, .* got 268"),
    ],
)
def test_a_tokenizer_with_other_ids(untied: Source, tmp_path: Path, special: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        untied.begin(tmp_path / "run", untied.write(tmp_path / "qwen", special=special))
    assert not (tmp_path / "run").exists()


def test_what_is_no_tokenizer(untied: Source, tmp_path: Path) -> None:
    folder = untied.write(tmp_path / "qwen")
    path = Path(folder) / "tokenizer.json"
    for content in ("{", "[]", '{"model": {}}'):
        path.write_text(content)
        with pytest.raises(CorruptModel, match=r"tokenizer\.json (is not|must be)"):
            untied.begin(tmp_path / "run", folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        untied.begin(tmp_path / "run", folder)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda t: t.pop(NORM), {}, r"missing model\.norm\.weight"),
        (lambda t: t.pop("lm_head.weight"), {}, r"missing lm_head\.weight"),
        (lambda t: t.update({NORM: t[NORM][1:]}), {}, r"model\.norm\.weight has shape \[63\], expected \[64\]"),
        (lambda t: t.update({WORDS: t[WORDS][:-1]}), {}, r"has shape \[279, 64\], expected \[280, 64\]"),
        (lambda t: t.update({"model.latent_queries": torch.zeros(1, 5, 64)}), {}, r"unexpected model\.latent_queries"),
        (same, {"vocab_size": 263}, r"vocab_size must be at least the 264 words of tokenizer\.json, got 263"),
        (same, {"vocab_size": "many"}, r"config\.json: vocab_size must be a whole number"),
        (same, {"vision_config": []}, r"config\.json: vision_config must be a table"),
        (same, {"num_attention_heads": 2, "head_dim": 16}, "recipe's model 'small', .* llm: .*'num_heads': 2"),
        (same, {"rms_norm_eps": 1e-5}, "weights must be of the recipe's model 'small', .* llm: .*'eps': 1e-05"),
        (same, {"tie_word_embeddings": True}, "recipe's model 'small', .* llm: .*'tie_embeddings': True"),
    ],
)
def test_other_tensors_and_sizes(
    untied: Source, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], config: dict[str, Any], message: str
) -> None:
    folder = untied.write(tmp_path / "qwen", change=change, **config)
    with pytest.raises(ValueError, match=message) as error:
        untied.begin(tmp_path / "run", folder)
    assert not (tmp_path / "run").exists()
    assert "missing" not in message or isinstance(error.value, WrongTensors)


def test_a_tied_output_that_is_stored(sources: dict[bool, Source], untied: Source, tmp_path: Path) -> None:
    own = sources[True]
    twice = own.write(tmp_path / "twice", change=lambda t: t.update({"lm_head.weight": t[WORDS]}))
    with pytest.warns(SkippedTensors, match=r"skipped lm_head\.weight"):
        assert own.begin(tmp_path / "run", twice, "tied").fresh[-1] == FRESH[0]
    other = own.write(tmp_path / "other", change=lambda t: t.update({"lm_head.weight": t[WORDS] + 1}))
    with pytest.raises(CorruptModel, match=r"lm_head\.weight is not model\.embed_tokens\.weight"):
        own.begin(tmp_path / "run", other, "tied")
