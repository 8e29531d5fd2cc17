"""The commands `train` and `plan`: what a recipe does, and what it will need."""

import argparse
from pathlib import Path
from typing import Any


def train(arguments: argparse.Namespace) -> None:
    from blip3o.train.devices import start
    from blip3o.train.recipe_files import load_recipe
    from blip3o.train.run import Run
    from blip3o.train.trackers import trackers_of

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.stage not in (None, *recipe.stages):
        raise ValueError(f"stage must be one of {', '.join(recipe.stages)}, got {arguments.stage!r}")
    folder = arguments.out or Path("runs") / Path(arguments.recipe).stem
    with start(arguments.device) as devices:
        report = print if devices.rank == 0 else lambda _: None
        settings = {name: stage.plain() for name, stage in recipe.stages.items()}
        with trackers_of(arguments.track if devices.rank == 0 else (), folder, settings) as trackers:
            run = Run(
                folder, recipe.model, devices, trackers, image_target=recipe.image_target, objective=recipe.objective,
                weights=recipe.weights, clip_weights=recipe.clip_weights,
            )  # fmt: skip
            for stage in [arguments.stage] if arguments.stage else recipe.stages:
                run.run_stage(stage, recipe.stages[stage], report)
        report(f"model in {folder / 'model'}")


def plan(arguments: argparse.Namespace) -> None:
    from blip3o.train.plan import table
    from blip3o.train.recipe_files import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    print(table(recipe, arguments.devices or [8, 32], 1e12 * arguments.peak, arguments.mfu))


def add_train(commands: Any) -> None:
    command = commands.add_parser("train", help="train one stage of a recipe, or all of them in order")
    command.add_argument("recipe", metavar="RECIPE", help="a TOML file, or the name of a recipe that comes along: nano")
    command.add_argument("--stage", help="one of the recipe's (default: all)")
    command.add_argument("--out", type=Path, help="folder of the run (default: runs/NAME)")
    command.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: %(default)s")
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="changes to the recipe: generation.steps=100, or seed=3 for all",
    )
    command.add_argument(
        "--track", action="append", default=[], metavar="TRACKER", help="tell tensorboard, wandb or trackio too"
    )
    command.set_defaults(run=train)

    command = commands.add_parser("plan", help="memory of each GPU, and time, of a recipe's generation stage")
    command.add_argument("recipe", metavar="RECIPE")
    command.add_argument("overrides", nargs="*", metavar="key=value")
    command.add_argument("--devices", type=int, action="append", help="GPUs, once or more (default: 8 and 32)")
    command.add_argument("--peak", type=float, default=989.0, help="TFLOP/s of one (default: %(default)s, an H100's)")
    command.add_argument("--mfu", type=float, default=0.4, help="share of the peak that is reached (default: 0.4)")
    command.set_defaults(run=plan)
