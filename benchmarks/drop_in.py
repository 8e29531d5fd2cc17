"""A stock transformers model in training and in use, before and after `patch`: speed, memory, and that it is the same.

    python benchmarks/drop_in.py [--model Llama] [--hidden 512 --layers 4 --vocabulary 32000] [--rows 4 --tokens 256]
                                 [--dtype float32] [--device cuda] [--steps 20] [--seconds 5]

The script is also the example of how to train a patched model: look at `train`. It makes a model with random weights,
trains it and a copy of it, which is patched, on the same sequences, and prints both losses. Then a step of the
optimiser, reading a prompt, and 16 new tokens are timed in turns, stock and patched, and the memory that a step adds is
counted. The sequences: each word follows from the last by one rule, which a few steps are enough to learn.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator

import measure
import torch
from end_to_end import DTYPES, peak
from torch import Tensor, nn

from blip3o_kernels import patch
from blip3o_kernels.drop_in.architectures import LANGUAGE, build

MIB = 2**20
HEAD = 64  # dims of an attention head


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
    stock = build(options.model, DTYPES[options.dtype], **sizes).to(options.device)
    patched = copy.deepcopy(stock)
    print(patch(patched), flush=True)
    return {"stock": stock, "patched": patched}


def tasks(model: nn.Module, ids: Tensor) -> dict[str, Callable[[int], object]]:
    """What is timed. The weights stay as they are: the learning rate is 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def step(_: int) -> None:
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def read(_: int) -> None:
        model.eval()
        with torch.no_grad():
            model(input_ids=ids, logits_to_keep=1)

    def write(_: int) -> None:
        model.eval()
        options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
        model.generate(ids[:, :32], attention_mask=torch.ones_like(ids[:, :32]), **options)  # type: ignore[operator]

    return {"a step of training": step, "reading a prompt": read, "16 new tokens": write}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[name for name in LANGUAGE if name != "Qwen2.5-VL"], default="Llama")
    for name, size in (("hidden", 512), ("layers", 4), ("vocabulary", 32000), ("rows", 4), ("tokens", 256)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--steps", type=int, default=20, help="of the training whose losses are printed")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each task and model")
    options = parser.parse_args()
    if options.hidden % HEAD:
        parser.error(f"--hidden: expected a multiple of {HEAD}, got {options.hidden}")
    models = build_pair(options)
    shape = options.rows, options.tokens, options.vocabulary, options.device
    losses = {name: train(copy.deepcopy(model), batches(*shape), options.steps) for name, model in models.items()}
    for name, values in losses.items():
        print(f"loss of {name}: {' '.join(f'{value:.4f}' for value in values[:: max(1, options.steps // 5)])}")
    ids = next(batches(*shape))
    calls = {name: tasks(model, ids) for name, model in models.items()}
    print(f"\n| {options.model}, {options.dtype} | stock, ms | patched, ms | times as fast | memory a call adds |")
    print("|---|---|---|---|---|")
    for task in calls["stock"]:
        contestants = {name: calls[name][task] for name in models}
        times = measure.take_turns(contestants, options.device, options.seconds)
        added = {name: peak(lambda call=call: call(0), options.device) / MIB for name, call in contestants.items()}  # type: ignore[misc]
        stock, patched = (measure.interval(times[name])[0] for name in ("stock", "patched"))
        print(
            f"| {task} | {1e3 * stock:.1f} | {1e3 * patched:.1f} | {stock / patched:.2f}"
            f" | {added['patched']:.0f} of {added['stock']:.0f} MiB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
