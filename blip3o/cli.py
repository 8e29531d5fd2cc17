"""The command line: blip3o demo | train | plan | generate | ask | evaluate | convert | shards | bench | doctor.

What a user can get wrong ends in one line on standard error and exit status 2; a stop by Ctrl-C ends in status 130.
Anything else is a mistake of this program and keeps its traceback. torch is imported by the commands that need it.
"""

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from blip3o.commands import Parser, given
from blip3o.commands_shards import add_shards
from blip3o.commands_train import add_train

DEMO = Path("runs/demo")
NANO_SCALE = 8  # of pictures of 32 pixels
BENCHES = ("ops", "model", "training")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def demo(arguments: argparse.Namespace) -> None:
    from blip3o.demo import demo

    metrics = demo(arguments.out, arguments.recipe)
    print(scores_table(metrics))
    print(f"open {arguments.out / 'report.html'}; pictures in {arguments.out / 'samples.png'}")


def generate(arguments: argparse.Namespace) -> None:
    from PIL import Image

    from blip3o.processor import to_pil

    if arguments.scale is not None and arguments.scale < 1:
        raise ValueError(f"scale must be at least 1, got {arguments.scale}")
    if arguments.out.suffix.lower() not in Image.registered_extensions():  # before what takes long
        raise ValueError(f"out must end as a picture does, such as in .png, got {arguments.out}")
    pictures, scale = draw(arguments)
    gap = 2  # white pixels between pictures, before they are enlarged
    row = pictures.new_ones(3, pictures.shape[2], (pictures.shape[3] + gap) * len(pictures) - gap)
    for i, picture in enumerate(pictures):
        start = i * (pictures.shape[3] + gap)
        row[:, :, start : start + pictures.shape[3]] = picture
    image = to_pil(row)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * scale, image.height * scale), 0).save(arguments.out)
    seeds = " ".join(str(arguments.seed + k) for k in range(arguments.n))
    print(f"{arguments.out}: drawings of {arguments.prompt!r} from seeds {seeds}")


def draw(arguments: argparse.Namespace) -> tuple[Any, int]:
    """The pictures [n, 3, H, W] of the model that is asked, nano's kind or a released one, and their enlargement."""
    from blip3o.generate import generate
    from blip3o.weights import from_pretrained, uses_pipeline

    if not uses_pipeline(arguments.model):
        if arguments.decoder is not None:
            raise ValueError(f"decoder is for released models; {arguments.model} has its own or is none")
        options = given(guidance=arguments.guidance, steps=arguments.steps)
        model, processor = from_pretrained(arguments.model)
        drawn = generate(model, processor, [arguments.prompt], n=arguments.n, seed=arguments.seed, **options)
        return drawn, arguments.scale or NANO_SCALE
    from blip3o.pipeline import Pipeline

    options = given(guidance_scale=arguments.guidance, num_inference_steps=arguments.steps)
    pipeline = Pipeline.from_pretrained(arguments.model, tower=False, decoder=arguments.decoder)
    drawn = pipeline.generate_image(
        arguments.prompt, num_images_per_prompt=arguments.n, seeds=arguments.seed, output_type="pt", **options
    )
    return drawn, arguments.scale or 1


def ask(arguments: argparse.Namespace) -> None:
    from blip3o.generate import ask
    from blip3o.weights import from_pretrained, uses_pipeline

    if not uses_pipeline(arguments.model):
        model, processor = from_pretrained(arguments.model)
        print(ask(model, processor, processor.load_image(arguments.picture), arguments.question))
        return
    from blip3o.pipeline import Pipeline

    parts = [{"type": "image", "image": arguments.picture}, {"type": "text", "text": arguments.question}]
    pipeline = Pipeline.from_pretrained(arguments.model, tower=False)
    for piece in pipeline.stream([{"role": "user", "content": parts}]):
        print(piece, end="", flush=True)
    print()


def convert(arguments: argparse.Namespace) -> None:
    import torch

    from blip3o.weights import convert

    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    tower = arguments.tower if arguments.tower is not None else not arguments.without_tower
    left = convert(
        arguments.model, arguments.out, layout=arguments.layout, tower=tower, skip=arguments.skip, dtype=dtype
    )
    print(f"{arguments.out}: {arguments.model} in the layout {arguments.layout}")
    if left:
        print(f"not copied: {', '.join(left)}")


def evaluate(arguments: argparse.Namespace) -> None:
    from blip3o.evaluate import exam, scores
    from blip3o.weights import from_pretrained, uses_pipeline

    if uses_pipeline(arguments.model):
        raise ValueError(f"model must know nano's world, which the exam is about; {arguments.model} is a released one")
    model, _ = from_pretrained(arguments.model)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
    drawn = exam.draw_prompts(model, arguments.part, arguments.prompts)
    _, verdicts = exam.answer_questions(model, arguments.part, arguments.questions)
    metrics = scores.evaluation(
        scores.generation_scores({category: result.verdicts for category, result in drawn.items()}),
        scores.understanding_scores(verdicts),
    )
    print(scores_table(metrics))
    if arguments.json:
        scores.write_metrics(arguments.json, metrics)


def bench(arguments: argparse.Namespace) -> None:
    named = arguments.options[:1] if arguments.options[:1] and arguments.options[0] in BENCHES else []
    script = BENCHMARKS / f"{named[0] if named else BENCHES[0]}.py"
    if not script.exists():
        raise ValueError(
            f"the benchmarks are files of the repository, expected at {script}; install from a clone of it"
        )
    status = subprocess.call([sys.executable, str(script), *arguments.options[len(named) :]])
    if status:
        raise SystemExit(status)


def doctor(arguments: argparse.Namespace) -> None:
    from blip3o.doctor import check, examine

    found = examine()
    lines = (f"{key:24} {value}" for key, value in found.items())
    print(json.dumps(found, indent=2) if arguments.json else "\n".join(lines))
    check(found)


def scores_table(metrics: dict[str, object]) -> str:
    """Scores with their intervals as aligned lines."""
    lines = []
    for group in ("generation", "understanding"):
        for name, value in metrics[group].items():  # type: ignore[attr-defined]
            low, high = metrics["intervals"][f"{group}.{name}"]  # type: ignore[index]
            lines.append(f"{group + '.' + name:32} {value:.3f}   95 % interval {low:.3f} to {high:.3f}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="blip3o", description="Train, draw with and ask a BLIP3-o model.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("demo", help="train nano from scratch, examine it, write a report")
    command.add_argument("recipe", nargs="?", default="nano", help="as of `train` (default: %(default)s)")
    command.add_argument("--out", type=Path, default=DEMO, help="folder of the run (default: %(default)s)")
    command.set_defaults(run=demo)

    add_train(commands)

    model = Parser(add_help=False)
    model.add_argument("--model", type=Path, default=DEMO / "model", help="model folder (default: %(default)s)")

    command = commands.add_parser("generate", help="draw a prompt", parents=[model])
    command.add_argument("prompt")
    command.add_argument("-n", type=int, default=1, help="drawings (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of the first drawing (default: %(default)s)")
    command.add_argument("--guidance", type=float, default=None)
    command.add_argument("--steps", type=int, default=None, help="of the sampler")
    command.add_argument(
        "--scale", type=int, help=f"enlargement of the picture (default: {NANO_SCALE} for nano, else 1)"
    )
    command.add_argument(
        "--decoder", type=Path, help="visual decoder's folder (default: the model's diffusion-decoder/)"
    )
    command.add_argument("--out", type=Path, default=Path("drawing.png"))
    command.set_defaults(run=generate)

    command = commands.add_parser("ask", help="ask a question about a picture", parents=[model])
    command.add_argument("picture", type=Path)
    command.add_argument("question")
    command.set_defaults(run=ask)

    command = commands.add_parser("evaluate", help="draw and answer the exam", parents=[model])
    command.add_argument("--part", choices=("tune", "report"), default="report", help="which set of unseen prompts")
    command.add_argument("--prompts", type=int, default=100, help="of each category (default: %(default)s)")
    command.add_argument("--questions", type=int, default=400, help="of each type (default: %(default)s)")
    command.add_argument("--json", type=Path, help="also write the scores here")
    command.set_defaults(run=evaluate)

    command = commands.add_parser("convert", help="write a checkpoint in our layout or the released one")
    command.add_argument("model", metavar="IN", help="folder, or a hub id, which is downloaded")
    command.add_argument("out", metavar="OUT", type=Path)
    command.add_argument("--layout", choices=("blip3o", "released"), default="blip3o", help="default: %(default)s")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    towers = command.add_mutually_exclusive_group()
    towers.add_argument("--tower", type=Path, help="safetensors file of the CLIP tower, where IN has none")
    towers.add_argument("--without-tower", action="store_true", help="leave the CLIP tower out")
    command.add_argument("--skip", action="append", metavar="PREFIX", help="tensors to leave out (default: model.vae.)")
    command.set_defaults(run=convert)

    command = commands.add_parser("shards", help="write, verify or summarise tar shards of samples")
    add_shards(command.add_subparsers(dest="action", required=True, metavar="ACTION"))

    # No option starts with a NUL: all of them are for the program that is called.
    command = commands.add_parser(
        "bench",
        help="time the ops (or: bench model, bench training) beside their peers",
        add_help=False,
        prefix_chars="\0",
    )
    command.add_argument("options", nargs=argparse.REMAINDER)
    command.set_defaults(run=bench)

    command = commands.add_parser("doctor", help="what this machine has, and which backend each op will use")
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=doctor)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    top = parser()
    arguments, rest = top.parse_known_args(argv)
    if rest and (arguments.command not in ("train", "plan") or any(item.startswith("-") for item in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # overrides behind an option, which argparse does not take for the same list
        arguments.overrides += rest
    with warnings.catch_warnings():
        warnings.showwarning = tell
        try:
            return run_command(arguments)
        except KeyboardInterrupt:
            return complain("stopped", 130)
        except (ValueError, OSError) as error:
            return complain(error, 2)


def tell(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """This project's warnings as one line each; other libraries' as they are."""
    if category.__module__.startswith("blip3o."):
        complain(message, 0)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def run_command(arguments: argparse.Namespace) -> int:
    """Run one command; the errors of this project that are neither ValueError nor OSError end here."""
    from blip3o.doctor import UnsoundMachine
    from blip3o.train.loop import Interrupted, NonFiniteLoss
    from blip3o_kernels import BackendError

    try:
        arguments.run(arguments)
    except Interrupted as stop:
        return complain(f"{stop}; the same command goes on from here", 128 + stop.signal)
    except (BackendError, NonFiniteLoss, UnsoundMachine) as error:
        return complain(error, 2)
    return 0


def complain(what: object, status: int) -> int:
    print("blip3o: " + " ".join(str(what).split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
