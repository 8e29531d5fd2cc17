"""Recipes: what the packaged ones say, and that every mistake in a file or an override is named."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from blip3o.train.recipe import KINDS, ClipRecipe, Recipe, RunRecipe
from blip3o.train.recipe_files import TOP, load_recipe, packaged, to_toml

CLIP = """
model = "nano"
[clip]
steps = 3
batch_size = 8
learning_rate = 1
final_learning_rate = 0.0
warmup_steps = 0
weight_decay = 0.0
betas = [0.9, 0.98]
clip_norm = 1.0
dtype = "float32"
seed = 1
"""


@dataclass(frozen=True, kw_only=True)
class Source:
    path: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Sourced(ClipRecipe):
    data: tuple[Source, ...]


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def in_full(recipe: RunRecipe) -> str:
    top = {key: getattr(recipe, key) for key in TOP}
    return to_toml(top, {name: stage.plain() for name, stage in recipe.stages.items()})


@pytest.mark.parametrize("name", packaged())
def test_packaged_recipes_are_read_and_written_in_full(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert load_recipe(written(tmp_path, in_full(recipe))) == recipe


def test_a_file(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, CLIP))
    assert recipe.model == "nano" and list(recipe.stages) == ["clip"]
    assert recipe.stages["clip"] == ClipRecipe(
        steps=3, batch_size=8, learning_rate=1.0, final_learning_rate=0.0, warmup_steps=0, weight_decay=0.0,
        betas=(0.9, 0.98), clip_norm=1.0, dtype="float32", seed=1,
    )  # fmt: skip
    assert type(recipe.stages["clip"].learning_rate) is float


def test_stages_keep_the_order_of_the_file_and_share_what_is_above() -> None:
    nano = load_recipe("nano").stages
    assert list(nano) == ["clip", "understanding", "generation", "decoder"]
    assert {stage.clip_norm for stage in nano.values()} == {1.0} and len({stage.seed for stage in nano.values()}) == 4


def test_overrides() -> None:
    nano = load_recipe("nano")
    changed = load_recipe("nano", ["steps=7", "generation.steps=100", "clip.learning_rate=1e-4", "turns=2", "model=4b"])
    assert changed.model == "4b"
    for name, stage in changed.stages.items():
        assert stage.steps == (100 if name == "generation" else 7)
    assert changed.stages["clip"] == replace(nano.stages["clip"], steps=7, learning_rate=1e-4)
    assert changed.stages["understanding"] == replace(nano.stages["understanding"], steps=7, turns=2)
    assert load_recipe("nano", ["betas=[0.8, 0.9]", "dtype=bfloat16"]).stages["clip"].betas == (0.8, 0.9)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "overrides are written key=value, got 'steps'"),
        ("step=3", "unknown key 'step': did you mean 'steps'?"),
        ("colour=3", "unknown key 'colour': expected one of steps, batch_size"),
        ("generaton.steps=3", "unknown stage 'generaton' in 'generaton.steps': did you mean 'generation'?"),
        ("generation.turn=3", "stage generation: unknown key 'turn'"),
        ("generation.pooled_dorp=0.1", "stage generation: unknown key 'pooled_dorp': did you mean 'pooled_drop'?"),
        ("clip.steps=1.5", "stage clip: steps must be of type int, got 1.5"),
        ("steps=true", "stage clip: steps must be of type int, got True"),
        ("learning_rate=fast", "stage clip: learning_rate must be of type float, got 'fast'"),
        ("learning_rate=nan", "stage clip: learning_rate and clip_norm must be positive, got nan"),
        ("steps=0", "stage clip: steps must be at least 1, got 0"),
        ("dtype=float16", "stage clip: dtype must be one of auto, float32, bfloat16, got 'float16'"),
        ("betas=0.9", "stage clip: betas must be a list of 2 values, got 0.9"),
        ("betas=[0.9]", "stage clip: betas must be a list of 2 values, got [0.9]"),
        ("betas=[0.9, 'x']", "stage clip: betas[1] must be of type float, got 'x'"),
        ("steps=1\nbatch_size=2", "stage clip: steps must be of type int, got '1\\nbatch_size=2'"),
    ],
)
def test_mistakes_in_overrides(override: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        load_recipe("nano", [override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('model = "nano"', "", "model must be the name of a preset, got None"),
        ('model = "nano"', "modell = 3", "unknown key 'modell': did you mean 'model'?"),
        ("[clip]", "[clipp]", "unknown stage 'clipp': did you mean 'clip'?"),
        (CLIP, 'model = "nano"', "a recipe must have a table of at least one stage: clip, understanding"),
        ("steps = 3\n", "", "stage clip: missing steps"),
        ("steps = 3", "steps = ", "is no TOML: Invalid value"),
        ("batch_size = 8", 'batch_size = "8"', "stage clip: batch_size must be of type int, got '8'"),
    ],
)
def test_mistakes_in_files(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in CLIP
    with pytest.raises(ValueError) as error:
        load_recipe(written(tmp_path, CLIP.replace(old, new, 1)))
    assert message in str(error.value)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"recipe must be a TOML file or one of .*nano.*, got 'nan0'"):
        load_recipe("nan0")
    with pytest.raises(FileNotFoundError):
        load_recipe(tmp_path / "none.toml")


def test_lists_of_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "clip", Sourced)
    path = written(tmp_path, CLIP + 'data = [{ path = "a \\"b\\"", weight = 2 }, { path = "c" }]\n')
    recipe = load_recipe(path)
    assert recipe.stages["clip"].data == (Source(path='a "b"', weight=2.0), Source(path="c"))
    assert load_recipe(written(tmp_path, in_full(recipe))) == recipe
    for override, message in (
        ("data=[3]", r"data\[0\] must be a table, got 3"),
        ("data=[{path = 3}]", r"data\[0\]: path must be of type str, got 3"),
        ("data=[{pfad = 'x'}]", r"data\[0\]: unknown key 'pfad'"),
        ("data=[{weight = 1}]", r"data\[0\]: missing path"),
    ):
        with pytest.raises(ValueError, match=message):
            load_recipe(path, [override])


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("clip", {"steps": 0}, "steps must be at least 1, got 0"),
        ("clip", {"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ("generation", {"batch_size": 7}, r"batch_size must be a multiple of draws_per_prompt \(2\), got 7"),
        ("generation", {"condition_drop": 1.0}, r"condition_drop must be in \[0, 1\), got 1.0"),
        ("generation", {"pooled_drop": -0.1}, r"pooled_drop must be in \[0, 1\), got -0.1"),
        ("decoder", {"unnamed": float("nan")}, r"unnamed must be in \[0, 1\), got nan"),
        ("decoder", {"feature_noise": -1.0}, "feature_noise must not be negative, got -1.0"),
        ("understanding", {"turns": 0}, "turns must be at least 1, got 0"),
        ("clip", {"learning_rate": 0.0}, "learning_rate and clip_norm must be positive, got 0.0"),
        ("clip", {"learning_rate": float("nan")}, "learning_rate and clip_norm must be positive, got nan"),
        ("clip", {"warmup_steps": -1}, "warmup_steps must not be negative, got -1"),
        ("clip", {"final_learning_rate": -1e-3}, "final_learning_rate must not be negative, got -0.001"),
        ("clip", {"weight_decay": float("nan")}, "weight_decay must not be negative, got nan"),
        ("clip", {"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\), got \[0.9, 1.0\]"),
    ],
)
def test_wrong_numbers_are_named(tiny: dict[str, Recipe], stage: str, change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(tiny[stage], **change)  # type: ignore[arg-type]
