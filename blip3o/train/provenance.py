"""Where a run comes from: RUN/recipe.toml, its recipe in full, and RUN/run.json, the code and machine of its starts."""

import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import blip3o
from blip3o.train.recipe_files import to_toml

RECIPE, RUN = "recipe.toml", "run.json"


def revision() -> str | None:
    """The git revision of this code, with "+changes" behind it if files differ; None outside a clone."""
    here = Path(blip3o.__file__).parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != here.resolve():
            return None  # an installed package inside someone's repository
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def write_provenance(
    folder: Path, top: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]], **more: object
) -> None:
    """Write both files. A start is added to run.json's list; top, stages: see `to_toml`."""
    (folder / RECIPE).write_text(to_toml(top, stages), encoding="utf-8")
    path = folder / RUN
    starts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "revision": revision(),
        "versions": {"blip3o": blip3o.__version__, "python": platform.python_version(), "torch": torch.__version__},
        "machine": platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **more,
    }
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps([*starts, start], indent=2) + "\n", encoding="utf-8")
    beside.replace(path)
