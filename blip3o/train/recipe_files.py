"""Recipes as TOML: one file is one run. `model` names the preset, the paper's choices may follow,
and each stage has a table, in their order.

    model = "nano"
    clip_norm = 1.0          # a key above the tables is every stage's that knows it, unless its table says otherwise
    [generation]
    steps = 5000

Overrides are written key=value: `generation.steps=100` for one stage, `steps=100` for every one that knows the key.
"""

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from blip3o.train.recipe import KINDS, Recipe, RunRecipe
from blip3o.train.recipe_shards import ON_SHARDS

TOP = [field.name for field in fields(RunRecipe) if field.name != "stages"]  # keys of the run, not of its stages

FOLDER = Path(__file__).parents[1] / "recipes"  # the packaged ones


def packaged() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_recipe(place: str | Path, overrides: Sequence[str] = ()) -> RunRecipe:
    """The recipe of a packaged name or a TOML file, with overrides `key=value` on top.

    ValueError names what is unknown, missing, of the wrong type or out of range, and what was expected;
    FileNotFoundError a file that is not there.
    """
    path = _path(place)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also of bytes that are no UTF-8
        raise ValueError(f"{path} is no TOML: {error}") from None
    for item in overrides:
        key, separator, value = item.partition("=")
        if not separator:
            raise ValueError(f"overrides are written key=value, got {item!r}")
        _override(table, key.strip(), value.strip())
    return _run_recipe(table)


def _path(place: str | Path) -> Path:
    path = Path(place)
    if path.suffix == ".toml" or path.name != str(place):
        return path
    if path.name not in packaged():
        raise ValueError(f"recipe must be a TOML file or one of {', '.join(packaged())}, got {str(place)!r}")
    return FOLDER / f"{place}.toml"


def _override(table: dict[str, Any], key: str, text: str) -> None:
    """Set one key in a recipe's table: `stage.key` there, `key` in each stage that knows it."""
    stage, dot, name = key.partition(".")
    if dot:
        if not isinstance(table.get(stage), dict):
            raise ValueError(f"unknown stage {stage!r} in {key!r}{_nearest(stage, _stages(table))}")
        table[stage][name] = _parsed(_known(table, stage), name, text)
    elif key in TOP:
        table[key] = text
    else:
        knowing = [stage for stage in _stages(table) if key in _known(table, stage)]
        if not knowing:
            raise ValueError(f"unknown key {key!r}{_nearest(key, [*_shared(table), *TOP])}")
        for stage in knowing:
            table[stage][key] = _parsed(_known(table, stage), key, text)


def _parsed(hints: Mapping[str, Any], name: str, text: str) -> Any:
    """The value that `text` stands for: TOML, or a text without its quotation marks."""
    if hints.get(name) is str:
        return text
    try:
        found = tomllib.loads(f"value = {text}")
    except ValueError:
        return text
    return found["value"] if found.keys() == {"value"} else text


def _run_recipe(table: Mapping[str, Any]) -> RunRecipe:
    stages = _stages(table)
    shared = {key: value for key, value in table.items() if key not in stages and key not in TOP}
    for key, value in shared.items():
        if isinstance(value, dict):
            raise ValueError(f"unknown stage {key!r}{_nearest(key, KINDS)}")
        if key not in _shared(table):
            raise ValueError(f"unknown key {key!r}{_nearest(key, [*_shared(table), *TOP])}")
    if not isinstance(table.get("model"), str):
        raise ValueError(f"model must be the name of a preset, got {table.get('model')!r}")
    if not stages:
        raise ValueError(f"a recipe must have a table of at least one stage: {', '.join(KINDS)}")
    recipes = {}
    for stage in stages:
        own = {key: value for key, value in shared.items() if key in _known(table, stage)}
        try:
            recipes[stage] = _recipe(_kind(table, stage), {**own, **table[stage]})
        except ValueError as error:
            raise ValueError(f"stage {stage}: {error}") from None
    hints = get_type_hints(RunRecipe)
    chosen = {key: _value(hints[key], table[key], key) for key in TOP if key in table}
    return RunRecipe(**chosen, stages=recipes)


def _stages(table: Mapping[str, Any]) -> list[str]:
    return [key for key, value in table.items() if key in KINDS and isinstance(value, dict)]


def _kind(table: Mapping[str, Any], stage: str) -> type[Recipe]:
    """A stage whose table names `data` reads shards."""
    return (ON_SHARDS if "data" in table[stage] and stage in ON_SHARDS else KINDS)[stage]


def _known(table: Mapping[str, Any], stage: str) -> dict[str, Any]:
    return get_type_hints(_kind(table, stage))


def _shared(table: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(key for stage in _stages(table) for key in _known(table, stage)))


def _nearest(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(known), n=1)
    return f": did you mean {found[0]!r}?" if found else f": expected one of {', '.join(known)}"


def _recipe(kind: type, table: Mapping[str, Any]) -> Any:
    """A dataclass from a table. ValueError names what is unknown, missing or of the wrong type."""
    hints = get_type_hints(kind)
    for key in table:
        if key not in hints:
            raise ValueError(f"unknown key {key!r}{_nearest(key, hints)}")
    missing = [
        field.name
        for field in fields(kind)
        if field.name not in table and field.default is MISSING and field.default_factory is MISSING
    ]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}")
    return kind(**{key: _value(hints[key], value, key) for key, value in table.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint` of the key `where`."""
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{where} must be one of {', '.join(map(str, get_args(hint)))}, got {value!r}")
        return value
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        if not isinstance(value, list) or (kinds[-1] is not Ellipsis and len(value) != len(kinds)):
            size = "" if kinds[-1] is Ellipsis else f" {len(kinds)}"
            raise ValueError(f"{where} must be a list of{size} values, got {value!r}")
        each = [kinds[0]] * len(value) if kinds[-1] is Ellipsis else kinds
        return tuple(_value(one, item, f"{where}[{i}]") for i, (one, item) in enumerate(zip(each, value, strict=True)))
    if is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be a table, got {value!r}")
        try:
            return _recipe(hint, value)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{where} must be of type {hint.__name__}, got {value!r}")
    return value


def to_toml(top: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]]) -> str:
    """A recipe in full, from its keys above the stages and the `plain` form of each stage's, as TOML that `load_recipe`
    reads back to the same."""
    lines = [f"{key} = {_written(value)}" for key, value in top.items()]
    for stage, table in stages.items():
        lines += ["", f"[{stage}]", *(f"{key} = {_written(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _written(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_written(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, str):  # JSON's texts are TOML's, but for this one character
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)
