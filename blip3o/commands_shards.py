"""The command `shards`: write, verify and summarise tar shards of samples."""

import argparse
import json
from pathlib import Path
from typing import Any

from blip3o.commands import Parser, given


def write_shards(arguments: argparse.Namespace) -> None:
    from blip3o.data.scene_shards import scene_samples
    from blip3o.data.shard_files import write_shards

    options = given(turns=arguments.turns, side=arguments.side)
    samples = scene_samples(arguments.seed, arguments.samples, arguments.picture, **options)
    paths = write_shards(arguments.out, samples, arguments.per_shard)
    print(f"{arguments.out}: {arguments.samples} samples in {len(paths)} shards")


def verify_shards(arguments: argparse.Namespace) -> None:
    from blip3o.data.shard_files import verify
    from blip3o.data.shards import Shards

    needs = arguments.needs or (["json"] if arguments.conversations else None)
    options = given(needs=needs, captions=arguments.captions, max_pixels=arguments.max_pixels)
    faults = 0
    with Shards(*arguments.places, cache=arguments.cache, **options) as shards:
        for fault in verify(shards, arguments.conversations):
            faults += 1
            print(fault)
        print(f"{len(shards)} samples in {len(shards.indices)} shards, {faults} faults")
    if faults:
        raise SystemExit(1)


def summarise_shards(arguments: argparse.Namespace) -> None:
    from blip3o.data.shard_files import summarise
    from blip3o.data.shards import Shards

    with Shards(*arguments.places, cache=arguments.cache) as shards:
        found = summarise(shards)
    lines = (f"{key:24} {value}" for key, value in found.items())
    print(json.dumps(found, indent=2) if arguments.json else "\n".join(lines))


def add_shards(actions: Any) -> None:
    command = actions.add_parser("write", help="shards of nano's world")
    command.add_argument("out", metavar="OUT", type=Path, help="folder")
    command.add_argument("--samples", type=int, default=1000, help="default: %(default)s")
    command.add_argument("--per-shard", type=int, default=500, help="samples of a shard (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--picture", choices=("png", "jpg", "webp"), default="png", help="default: %(default)s")
    command.add_argument("--side", type=int, help="of the pictures in pixels (default: as the world draws them, 32)")
    command.add_argument("--turns", type=int, help="questions about each picture, in JSON (default: 3)")
    command.set_defaults(run=write_shards)

    places = Parser(add_help=False)
    places.add_argument("places", nargs="+", metavar="PLACE", type=Path, help="tar files, or folders of *.tar")
    places.add_argument("--cache", type=Path, help="folder for the indices (default: beside the shards)")

    command = actions.add_parser("verify", help="name every fault; status 1 if there is one", parents=[places])
    command.add_argument("--needs", nargs="+", choices=("picture", "text", "json"), help="default: picture text")
    command.add_argument("--captions", metavar="NAME", help="this caption in JSON is the text (default: the .txt)")
    command.add_argument("--conversations", action="store_true", help="JSON must hold one, as LLaVA writes them")
    command.add_argument("--max-pixels", type=int, help="of a picture (default: 64 million)")
    command.set_defaults(run=verify_shards)

    command = actions.add_parser("summarise", help="samples, bytes, picture sizes, caption lengths", parents=[places])
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=summarise_shards)
