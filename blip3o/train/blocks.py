"""Activation checkpointing and torch.compile, block by block."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from blip3o.train.batch import Stage
from blip3o.train.recipe import Recipe


def training_blocks(stage: Stage) -> list[nn.Module]:
    """The blocks of the networks that train. Frozen ones run without a graph of their own, or with a cache of keys that
    a second pass would fill again."""
    learning = set(stage.trainable().values())
    lists = [module for module in stage.model.modules() if isinstance(module, nn.ModuleList)]
    return [block for blocks in lists for block in blocks if not learning.isdisjoint(block.parameters())]


@contextmanager
def prepared_blocks(blocks: Sequence[nn.Module], recipe: Recipe) -> Iterator[None]:
    """Until its end, the blocks are compiled and checkpointed as the recipe says. FSDP comes after, around them."""
    if recipe.compile:
        for block in blocks:
            block.forward = torch.compile(block.forward)
    if recipe.checkpointing == "blocks":
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)  # the class's own again
