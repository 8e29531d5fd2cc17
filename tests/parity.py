"""blip3o beside independent implementations, part by part: `python tests/parity.py` prints the largest differences.

Small random weights, written in the released layout by other people's networks and read by blip3o, float32 on the CPU.
Exit status 1 if a difference is over its bound.
"""

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from released_checkpoint import CLIP_WIDTH, GRID, ID, QUERIES, WIDTH, Checkpoint, Eva, visual_decoder
from torch import Tensor

from blip3o import flow, generate
from blip3o.chat import answer_tokens, embed
from blip3o.llm import KvCache, multimodal_positions
from blip3o.model import Blip3o
from blip3o.unet_decoder import UnetDecoder
from blip3o_kernels import use

BOUND = 1e-5
IMAGE = ID["<|image_pad|>"]
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Row:
    """One comparison. `size` is the reference's largest value: of a reference that is 0, parity would mean nothing."""

    part: str
    reference: str
    inputs: str
    difference: float
    bound: float
    size: float

    @property
    def holds(self) -> bool:
        return self.difference <= self.bound and self.size > 0


def row(part: str, reference: str, inputs: str, ours: Tensor, theirs: Tensor, bound: float = BOUND) -> Row:
    if ours.shape != theirs.shape:
        raise ValueError(f"{part}, {inputs}: ours is {list(ours.shape)}, theirs {list(theirs.shape)}")
    difference = (ours.double() - theirs.double()).abs().max().item()
    return Row(part, reference, inputs, difference if difference == difference else np.inf, bound,
               theirs.double().abs().max().item())  # fmt: skip


class World:
    """Their networks, and blip3o's model with the same weights."""

    def __init__(self) -> None:
        self.theirs = Checkpoint()
        self.ours = self.read(self.theirs)

    @staticmethod
    def read(checkpoint: Checkpoint) -> Blip3o:
        with tempfile.TemporaryDirectory() as folder:
            return Blip3o.from_pretrained(checkpoint.write(Path(folder) / "released")).requires_grad_(False)

    @cached_property
    def grouped(self) -> tuple[Checkpoint, Blip3o]:
        """With fewer heads for keys and values in the diffusion transformer."""
        theirs = Checkpoint(kv_heads=2)
        return theirs, self.read(theirs)


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def texts(batch: int = 3, tokens: int = 11, seed: int = 1) -> Tensor:
    return torch.randint(0, 256, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def pad(rows: Sequence[Sequence[int]], side: str) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), ID["<|endoftext|>"]), torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, tokens in enumerate(rows):
        place = slice(longest - len(tokens), longest) if side == "left" else slice(0, len(tokens))
        ids[i, place], mask[i, place] = torch.tensor(tokens), True
    return ids, mask


# the language model


def language_model(world: World) -> Iterator[Row]:
    ours, theirs = world.ours.llm, world.theirs.qwen.model.language_model
    names = ("language model", "transformers Qwen2.5-VL")
    ids = texts()
    whole = theirs(input_ids=ids, use_cache=False).last_hidden_state
    yield row(*names, "text", ours(ours.embed(ids)), whole)
    logits = world.theirs.qwen(input_ids=ids, use_cache=False).logits
    yield row(*names, "text, logits", ours.logits(ours(ours.embed(ids))), logits)
    mask = torch.arange(11) < torch.tensor([11, 7, 3])[:, None]
    expected = theirs(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
    yield row(*names, "right padding", ours(ours.embed(ids), mask=mask)[mask], expected[mask])
    yield row(*names, "right padding, no mask", ours(ours.embed(ids))[mask], expected[mask])
    mask = torch.arange(11) >= 11 - torch.tensor([11, 7, 1])[:, None]
    alone = [theirs(input_ids=ids[i][mask[i]][None], use_cache=False).last_hidden_state[0] for i in range(3)]
    yield row(*names, "left padding, against each row alone", ours(ours.embed(ids), mask=mask)[mask], torch.cat(alone))
    for steps in ([1] * 11, [5, 1, 1, 4]):
        cache = KvCache(ours.config, 3, 11, device="cpu", dtype=torch.float32)
        parts = [ours(ours.embed(part), cache=cache) for part in ids.split(steps, dim=1)]
        yield row(*names, f"cached, {len(steps)} calls", torch.cat(parts, dim=1), whole)


# the vision tower, and both together

GRIDS: tuple[list[Grid], ...] = (
    [(1, 8, 8)],  # one window
    [(1, 16, 16), (1, 16, 16)],  # whole windows
    [(1, 4, 6)],  # smaller than a window
    [(1, 20, 10)],  # windows cut off at both edges
    [(1, 18, 12), (2, 8, 10), (1, 2, 2)],  # pictures of different sizes, one of two frames
)


def vision_tower(world: World) -> Iterator[Row]:
    ours, theirs = world.ours.vision, world.theirs.qwen.model.visual
    assert ours is not None
    for grids in GRIDS:
        patches = random(sum(f * r * c for f, r, c in grids), ours.config.patch_values)
        expected = theirs(patches, torch.tensor(grids)).pooler_output
        yield row("vision tower", "transformers Qwen2.5-VL", str(grids)[1:-1], ours(patches, grids), expected)


def conversations() -> dict[str, tuple[list[list[int]], list[Grid]]]:
    """Texts, with a run of image tokens for each picture, and the pictures' grids in patches."""
    small, wide, tall = [IMAGE] * 4, [IMAGE] * 6, [IMAGE] * 6
    return {
        "a picture": ([[5, 6, *wide, 7]], [(1, 4, 6)]),
        "text and picture": ([[5, 6, *small, 7], [8, 9, 10]], [(1, 4, 4)]),
        "several pictures": (
            [[5, *wide, 7, 8], [*tall, 9, 10, *small, 11], [12], [13, *small, 14, 15, *wide, 16]],
            [(1, 4, 6), (1, 6, 4), (1, 4, 4), (1, 4, 4), (1, 4, 6)],
        ),
    }


def pictures(world: World) -> Iterator[Row]:
    """Texts with pictures through both networks, at positions on three axes."""
    ours, theirs = world.ours, world.theirs.qwen
    names = ("both, mixed inputs", "transformers Qwen2.5-VL")
    for title, (rows, grids) in conversations().items():
        patches = random(sum(r * c for _, r, c in grids), 1176)
        for side in ("left", "right"):
            ids, mask = pad(rows, side)
            given = {
                "input_ids": ids, "attention_mask": mask.long(), "pixel_values": patches,
                "image_grid_thw": torch.tensor(grids), "mm_token_type_ids": (ids == IMAGE).int(),
            }  # fmt: skip
            embeddings, positions = embed(ours, ids, mask, patches, grids)
            index = theirs.model.get_rope_index(
                ids, (ids == IMAGE).int(), torch.tensor(grids), attention_mask=mask.long()
            )[0]
            assert positions is not None
            exact = (positions[:, mask], index[:, mask])
            yield row("multimodal positions", "transformers get_rope_index", f"{title}, {side} padding", *exact, 0)
            logits = ours.llm.logits(ours.llm(embeddings, positions, mask))
            yield row(*names, f"{title}, {side} padding", logits[mask], theirs(**given).logits[mask])
        ids, mask = pad(rows, "left")
        given.update(input_ids=ids, attention_mask=mask.long(), mm_token_type_ids=(ids == IMAGE).int())
        said = theirs.generate(
            **given,
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=[ID["<|im_end|>"], ID["<|endoftext|>"]],
            pad_token_id=ID["<|endoftext|>"],
        )[:, ids.shape[1] :]
        for side in ("left", "right"):
            padded = pad(rows, side)
            tokens = torch.stack(list(answer_tokens(ours, *padded, patches, grids, max_new_tokens=6)), dim=1)
            yield row("cached decoding", "transformers generate", f"{title}, {side} padding", tokens, said, 0)
    plain = multimodal_positions(texts(), None, IMAGE, (2, 2))
    yield row("multimodal positions", "counting", "text", plain, torch.arange(11).expand(3, 3, 11), 0)


def condition(world: World) -> Iterator[Row]:
    """The queries' last hidden states; theirs from each prompt alone."""
    ours, theirs = world.ours, world.theirs.qwen.model.language_model
    rows = [[1, 2, 3, ID["[IMG]"]], [4, ID["[IMG]"]], [*range(20), ID["[IMG]"]]]
    expected = []
    for tokens in rows:
        given = torch.cat([theirs.embed_tokens(torch.tensor([tokens])), world.theirs.queries], dim=1)
        expected.append(theirs(inputs_embeds=given, use_cache=False).last_hidden_state[:, -QUERIES:])
    for side in ("left", "right"):
        with torch.inference_mode():
            hidden = ours.condition(*pad(rows, side))
        yield row("condition", "transformers Qwen2.5-VL", f"three prompts, {side} padding", hidden, torch.cat(expected))


# the diffusion transformer


def diffusion_transformer(world: World) -> Iterator[Row]:
    features, hidden = random(3, GRID**2, CLIP_WIDTH), random(3, QUERIES, WIDTH, seed=2)
    names = ("diffusion transformer", "diffusers Lumina-Next")
    for title, (theirs, ours) in (("", (world.theirs, world.ours)), (", grouped keys", world.grouped)):
        # Beyond small times diffusers' angles, in float32, are off by up to 6e-5; so are the reference op's, alike.
        for times, backend in (([10.0, 0.333, 5.12], None), ([1000.0, 33.3, 512.0], "reference")):
            expected = theirs.lumina(features, torch.tensor(times), hidden)
            if backend is None:
                found = ours.dit(features, torch.tensor(times), ours.dit.project(hidden))
            else:
                with use(backend):
                    found = ours.dit(features, torch.tensor(times), ours.dit.project(hidden))
            place = f"times {', '.join(map(str, times))}{title}{', reference ops' if backend else ''}"
            yield row(*names, place, found, expected)


# CLIP


def clip(world: World) -> Iterator[Row]:
    images = random(2, 3, 112, 112)
    theirs: Eva = world.theirs.eva
    tokens = world.ours.clip.vision(images)
    yield row("CLIP tower", "EVA-CLIP by hand", "two pictures, all tokens", tokens, theirs(images))
    yield row(
        "CLIP features",
        "EVA-CLIP by hand",
        "two pictures, pooled 4 x 4",
        world.ours.pool(tokens),
        theirs.pooled(images),
    )


# flow matching


def sampler(world: World) -> Iterator[Row]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    names = ("sampler", "diffusers FlowMatchEuler")
    for steps in (1, 7, 30, 50):
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
        levels = flow.sigmas(steps)
        yield row(*names, f"noise levels, {steps} steps", torch.tensor(levels), scheduler.sigmas, 1e-7)
        times = torch.tensor(levels[:-1], dtype=torch.float32) * flow.TIMESTEPS
        yield row(*names, f"whole times, {steps} steps", times.trunc(), scheduler.timesteps.long().float(), 0)

    noise, hidden = random(2, GRID**2, CLIP_WIDTH), random(2, QUERIES, WIDTH, seed=2)
    for steps, guidance in ((30, 3.0), (7, 1.0)):
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
        x, both = noise, torch.cat([torch.zeros_like(hidden), hidden])
        for timestep in scheduler.timesteps:
            unconditional, conditional = world.theirs.lumina(torch.cat([x, x]), timestep.long().expand(4), both).chunk(
                2
            )
            velocity = unconditional + guidance * (conditional - unconditional)
            x = scheduler.step(velocity, timestep, x).prev_sample
        with torch.inference_mode(), use("reference"):
            found = generate.sample_targets(world.ours, hidden, noise, guidance=guidance, steps=steps, whole_times=True)
        yield row(*names, f"{steps} steps, guidance {guidance}, whole times, reference ops", found, x)


# the visual decoder


def decoder(world: World) -> Iterator[Row]:
    """A batch of ours; theirs is SDXL's own pipeline, one picture after the other."""
    from diffusers import StableDiffusionXLPipeline

    unet, vae, scheduler = visual_decoder()
    features, negative, noise = (random(3, 4, CLIP_WIDTH), random(1, 4, CLIP_WIDTH, seed=2), random(3, 4, 8, 8, seed=3))
    found = UnetDecoder(unet, vae, scheduler).decode(features, negative, noise, num_inference_steps=5)
    theirs = StableDiffusionXLPipeline(vae, None, None, None, None, unet, scheduler, add_watermarker=False)
    theirs.set_progress_bar_config(disable=True)
    expected = [
        theirs(
            prompt_embeds=one[None], pooled_prompt_embeds=one[None].mean(1), negative_prompt_embeds=negative,
            negative_pooled_prompt_embeds=negative.mean(1), latents=start[None], guidance_scale=3.0,
            num_inference_steps=5, output_type="pt",
        ).images
        for one, start in zip(features, noise, strict=True)
    ]  # fmt: skip
    yield row(
        "visual decoder", "diffusers SDXL pipeline", "three at once, 5 steps, guidance 3", found, torch.cat(expected)
    )


PARTS: tuple[Callable[[World], Iterator[Row]], ...] = (
    language_model, vision_tower, pictures, condition, diffusion_transformer, clip, sampler, decoder,
)  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    cells = [("part", "reference", "inputs", "difference", "bound", "verdict")]
    cells += [
        (r.part, r.reference, r.inputs, f"{r.difference:.1e}", f"{r.bound:.0e}", "equal" if r.holds else "OVER")
        for r in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def quiet() -> None:
    """Of what transformers and diffusers say about missing torchvision and unknown configurations."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.disable(logging.WARNING)


def main(world: Any = None) -> int:
    quiet()
    world = World() if world is None else world
    rows = [found for part in PARTS for found in part(world)]
    print(table(rows))
    over = sum(not found.holds for found in rows)
    print(
        f"{len(rows)} comparisons, {over} over their bound" if over else f"{len(rows)} comparisons, all within bounds"
    )
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
