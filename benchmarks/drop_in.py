"""A stock transformers or diffusers model before and after `patch`: training, speed, memory, and that it is the same.

    python benchmarks/drop_in.py [--model Llama] [--hidden 512 --layers 4 --vocabulary 32000] [--rows 4 --tokens 256]
                                 [--dtype float32] [--device cuda] [--steps 20] [--seconds 5]

The script is also the example of how to train a patched model: look at `train`. It makes a language model with random
weights, trains it and a copy of it, which is patched, on the same sequences, and prints both losses. Then a step of the
optimiser, reading a prompt, and 16 new tokens are timed in turns, stock and patched, and the memory that each adds is
counted. The sequences: each word follows from the last by one rule, which a few steps are enough to learn.

--model PixArt and its like: a pass of the denoiser and a step of its training; 256 patches, a prompt of 64 tokens.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from typing import Any

import measure
import torch
import torch.nn.functional as F
from end_to_end import CLOCKS, DTYPES, peak
from torch import Tensor, nn

from blip3o_kernels import patch
from blip3o_kernels.drop_in.architectures import DIFFUSION, LANGUAGE, build
from blip3o_kernels.drop_in.small import small_inputs

Tasks = dict[str, Callable[[int], object]]
MIB = 2**20
HEAD = 64  # dims of an attention head
_DIFFUSERS = {"attention_head_dim": HEAD, "num_attention_heads": 8, "num_layers": 4}
_LUMINA = {"hidden_size": 512, "num_attention_heads": 8, "num_kv_heads": 4, "num_layers": 4, "multiple_of": 64}
SIZES: dict[str, dict[str, Any]] = {
    "Flux": {**_DIFFUSERS, "num_layers": 2, "num_single_layers": 4, "axes_dims_rope": (16, 24, 24)},
    "SD3": {**_DIFFUSERS, "caption_projection_dim": 512, "sample_size": 32, "pos_embed_max_size": 32},
    "Lumina-Next": {**_LUMINA, "cross_attention_dim": 512},
    "Lumina 2": {**_LUMINA, "axes_dim_rope": (16, 24, 24), "axes_lens": (128, 32, 32)},
    "Sana": {
        "num_attention_heads": 16, "attention_head_dim": 32, "num_cross_attention_heads": 8,
        "cross_attention_head_dim": HEAD, "cross_attention_dim": 512, "num_layers": 4, "sample_size": 32,
    },
    "PixArt": {**_DIFFUSERS, "cross_attention_dim": 512, "sample_size": 32},
}  # fmt: skip


def batches(rows: int, tokens: int, vocabulary: int, device: str) -> Iterator[Tensor]:
    """Sequences in which a word w is followed by 5 w + 7, within the first 97 words."""
    draw = torch.Generator().manual_seed(0)
    words = min(97, vocabulary)
    while True:
        sequence = [torch.randint(words, (rows,), generator=draw)]
        while len(sequence) < tokens:
            sequence.append((5 * sequence[-1] + 7) % words)
        yield torch.stack(sequence, 1).to(device)


def train(model: nn.Module, data: Iterator[Tensor], steps: int) -> list[float]:
    """What anybody's training looks like; a patched model has no logits in its output, as the loss needs none."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    losses = []
    for _ in range(steps):
        ids = next(data)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def build_pair(options: argparse.Namespace) -> dict[str, nn.Module]:
    """The stock model, and a copy that is patched."""
    heads = options.hidden // HEAD
    sizes = {
        "hidden_size": options.hidden, "intermediate_size": 8 * options.hidden // 3 // 64 * 64,
        "num_hidden_layers": options.layers, "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 2),
        "vocab_size": options.vocabulary, "max_position_embeddings": 4096,
    }  # fmt: skip
    sizes = sizes if options.model in LANGUAGE else SIZES[options.model]
    stock = build(options.model, DTYPES[options.dtype], **sizes).to(options.device)
    patched = copy.deepcopy(stock)
    print(patch(patched), flush=True)
    return {"stock": stock, "patched": patched}


def step_of(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[int], None]:
    """A step of the optimiser that leaves the weights as they are: the learning rate is 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def step(_: int) -> None:
        model.train()
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def language_tasks(model: nn.Module, ids: Tensor) -> Tasks:
    def read(_: int) -> None:
        model.eval()
        with torch.no_grad():
            model(input_ids=ids, logits_to_keep=1)

    def write(_: int) -> None:
        model.eval()
        options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
        model.generate(ids[:, :32], attention_mask=torch.ones_like(ids[:, :32]), **options)  # type: ignore[operator]

    step = step_of(model, lambda: model(input_ids=ids, labels=ids).loss)
    return {"a step of training": step, "reading a prompt": read, "16 new tokens": write}


def diffusion_tasks(model: nn.Module) -> Tasks:
    inputs = small_inputs(model, side=16, words=64)[1]

    def denoise(_: int) -> None:
        model.eval()
        with torch.no_grad():
            model(**inputs)

    def loss() -> Tensor:
        y = model(**inputs).sample
        return F.mse_loss(y, torch.ones_like(y))

    return {"a step of training": step_of(model, loss), "a pass of the denoiser": denoise}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = [name for name in (*LANGUAGE, *DIFFUSION) if name != "Qwen2.5-VL"]
    parser.add_argument("--model", choices=models, default="Llama")
    for name, size in (("hidden", 512), ("layers", 4), ("vocabulary", 32000), ("rows", 4), ("tokens", 256)):
        parser.add_argument(f"--{name}", type=measure.positive(int), default=size, help="of a language model")
    parser.add_argument("--steps", type=measure.positive(int), default=20, help="of training with printed losses")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=measure.positive(float), default=5.0, help="for each task and model")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="process: with one thread, if others work"
    )
    options = parser.parse_args()
    if options.hidden % HEAD:
        parser.error(f"--hidden: expected a multiple of {HEAD}, got {options.hidden}")
    pair = build_pair(options)
    shape = options.rows, options.tokens, options.vocabulary, options.device
    if options.model in LANGUAGE:
        for name, model in pair.items():
            losses = train(copy.deepcopy(model), batches(*shape), options.steps)
            print(f"loss of {name}: {' '.join(f'{loss:.4f}' for loss in losses[:: max(1, options.steps // 5)])}")
        ids = next(batches(*shape))
        calls = {name: language_tasks(model, ids) for name, model in pair.items()}
    else:
        calls = {name: diffusion_tasks(model) for name, model in pair.items()}
    print(f"\n| {options.model}, {options.dtype} | stock, ms | patched, ms | times as fast | memory a call adds |")
    print("|---|---|---|---|---|")
    for task in calls["stock"]:
        contestants = {name: calls[name][task] for name in pair}
        for call in contestants.values():
            call(0)
        times = measure.take_turns(contestants, options.device, options.seconds, clock=CLOCKS[options.clock])
        stock, patched = (1e3 * measure.interval(times[name])[0] for name in ("stock", "patched"))
        added = {name: memory(call, options.device) for name, call in contestants.items()}
        speed = f"{stock:.1f} | {patched:.1f} | {stock / patched:.2f}"
        print(f"| {task} | {speed} | {added['patched']:.0f} of {added['stock']:.0f} MiB |", flush=True)


def memory(call: Callable[[int], object], device: str) -> float:
    return peak(lambda: call(0), device) / MIB


if __name__ == "__main__":
    main()
