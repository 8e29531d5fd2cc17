"""What a recipe will need: memory of each GPU and time, from the model's own figures.

The networks of a stage are run on torch's fake tensors, which have shapes and no memory, for one micro-batch: torch's
counter gives the FLOPs, and what autograd keeps for the backward pass gives the memory of activations (a little too
much: a norm before a linear layer is computed again in truth, and kept here). Weights, gradients, moments and averages
are counted parameter by parameter. What remains unknown is how much of its peak a GPU reaches: `mfu`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from blip3o.flow import TIMESTEPS
from blip3o.model import Blip3o
from blip3o.presets import preset
from blip3o.train.blocks import prepared_blocks
from blip3o.train.recipe import RunRecipe
from blip3o.train.recipe_shards import ShardGenerationRecipe

GIB = 2**30


@dataclass(frozen=True)
class Pass:
    """What one pass over a micro-batch costs: FLOPs, and bytes that autograd keeps for the backward pass."""

    flops: float
    kept: float


@dataclass(frozen=True)
class Plan:
    """Of one stage on `devices` GPUs, each with micro-batches of `rows` rows.

    trained, frozen     weights that train, and that are read only
    states              bytes of weights, gradients, moments, averages and casts: see `states`
    activations         bytes at the worst moment of a backward pass
    flops               of one sample
    """

    devices: int
    rows: int
    trained: int
    frozen: int
    states: float
    activations: float
    flops: float

    def samples_per_second(self, peak: float, mfu: float) -> float:
        return self.devices * peak * mfu / self.flops


def plan(recipe: RunRecipe, devices: int) -> Plan:
    """The plan of a recipe's generation stage on `devices` GPUs. ValueError if it has none, or does not divide."""
    stage = recipe.stages.get("generation")
    if not isinstance(stage, ShardGenerationRecipe):
        raise ValueError(f"a plan is of a stage generation on shards; the recipe has {', '.join(recipe.stages)}")
    parts = devices * stage.accumulate
    if devices < 1 or stage.batch_size % parts:
        raise ValueError(
            f"batch_size must be a multiple of devices x accumulate {stage.accumulate}, got {stage.batch_size} and "
            f"{devices} devices"
        )
    rows = stage.batch_size // parts
    with FakeTensorMode(allow_non_fake_inputs=True):  # tables of positions may be kept from a model that has run
        return _plan(recipe, stage, devices, rows)


def _plan(recipe: RunRecipe, stage: ShardGenerationRecipe, devices: int, rows: int) -> Plan:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if stage.dtype == "bfloat16" else default)
    try:
        config = preset(recipe.model, image_target=recipe.image_target, objective=recipe.objective)
        model = Blip3o(config)  # as autocast would have its products
    finally:
        torch.set_default_dtype(default)
    trained = [x for name, x in model.named_parameters() if name == "queries" or name.startswith("dit.")]
    model.requires_grad_(False)
    for x in trained:
        x.requires_grad_()
    learning = sum(x.numel() for x in trained)
    frozen = sum(x.numel() for x in model.parameters()) - learning
    whole = measured(lambda: drawing_pass(model, rows, stage))
    kept = whole.kept
    if stage.checkpointing == "blocks":
        blocks = list(model.dit.blocks)
        with prepared_blocks(blocks, stage):
            between = measured(lambda: drawing_pass(model, rows, stage), count=False).kept
        kept = between + (whole.kept - between) / len(blocks)  # one block at a time is computed again
    return Plan(devices, rows, learning, frozen, states(model, stage, devices), kept, whole.flops / rows)


def states(model: Blip3o, stage: ShardGenerationRecipe, devices: int) -> float:
    """Bytes on each of `devices` GPUs of all weights, of gradients, two moments and an average of those that train, all
    of them float32, and of `casts`. What is frozen is shared out in the language model alone."""
    learning = sum(x.numel() for x in model.parameters() if x.requires_grad)
    llm = sum(x.numel() for x in model.llm.parameters())
    others = sum(x.numel() for x in model.parameters()) - learning - llm
    learned = learning * (4 + 4 + 8 + (4 if stage.ema else 0)) / (devices if stage.parallel == "fsdp" else 1)
    return learned + 4 * (others + llm / (devices if _shares_frozen(stage) else 1)) + casts(model, stage)


def _shares_frozen(stage: ShardGenerationRecipe) -> bool:
    return stage.parallel == "fsdp" and stage.frozen == "sharded"


def casts(model: Blip3o, stage: ShardGenerationRecipe) -> int:
    """Bytes of the casts to bfloat16 that stay beside float32 weights: `layers.keep_casts` keeps the language model's,
    autocast for a step those of what trains. FSDP casts what it gathers, block by block; CLIP's go with each product.
    """
    if stage.dtype != "bfloat16":
        return 0
    networks: list[nn.Module] = [] if _shares_frozen(stage) else [model.llm.blocks]
    if stage.parallel != "fsdp":
        networks.append(model.dit)
    linears = [module for network in networks for module in network.modules() if isinstance(module, nn.Linear)]
    return 2 * sum(linear.weight.numel() for linear in linears)


def drawing_pass(model: Blip3o, rows: int, recipe: ShardGenerationRecipe) -> Tensor:
    """What generation does with a micro-batch of `rows` drawings; a scalar to go back from. Latents are free."""
    config, dtype = model.config, model.queries.dtype
    prompts, words = rows // recipe.draws_per_prompt, recipe.max_tokens - config.num_queries
    with torch.no_grad():
        if recipe.features == "none" and config.image_target == "clip":
            side = config.clip.image_size
            model.clip.vision(torch.empty(prompts, 3, side, side, dtype=dtype))
        cache = model.cache(prompts, words + config.num_queries)
        text = torch.empty(prompts, words, config.llm.width, dtype=dtype)
        model.llm(text, None, None, cache, asked=torch.empty(0, dtype=torch.int64))
    condition = model.llm(model.queries.expand(prompts, -1, -1), None, None, cache)
    context = model.dit.context(model.dit.project(condition))
    x = torch.empty(rows, config.dit.grid**2, config.dit.in_channels, dtype=dtype)
    sigma = torch.empty(rows)
    return model.dit(x, sigma * TIMESTEPS, context).float().square().mean()


def measured(run: Callable[[], Tensor], count: bool = True) -> Pass:
    """What `run` keeps for its backward pass, weights aside, and the FLOPs of both, if they are to be counted."""
    flops = 0
    if count:
        with FlopCounterMode(display=False) as counter:
            run().backward()
        flops = counter.get_total_flops()
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter) and not isinstance(x._base, nn.Parameter):
            storage = x.untyped_storage()
            storages[storage._cdata] = storage  # held, so that no other takes its number
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        run()
    return Pass(float(flops), float(sum(storage.nbytes() for storage in storages.values())))


def table(recipe: RunRecipe, devices: list[int], peak: float, mfu: float) -> str:
    """A line for each number of devices: memory of each, samples a second, and days for all steps."""
    stage = recipe.stages["generation"]
    lines = [
        f"{recipe.model}: batch {stage.batch_size}, {stage.steps} steps, {stage.parallel}, accumulate "
        f"{stage.accumulate}, checkpointing {stage.checkpointing}; {1e-12 * peak:.0f} TFLOP/s x MFU {mfu}",
        "",
        "| devices | rows at a time | weights and states GiB | activations GiB | sum | TFLOP a sample "
        "| samples/s | s a step | days |",
        "|" + "---|" * 9,
    ]
    for count in devices:
        found = plan(recipe, count)
        rate = found.samples_per_second(peak, mfu)
        lines.append(
            f"| {count} | {found.rows} | {found.states / GIB:.1f} | {found.activations / GIB:.1f} "
            f"| {(found.states + found.activations) / GIB:.1f} | {1e-12 * found.flops:.2f} | {rate:.0f} "
            f"| {stage.batch_size / rate:.2f} | {stage.steps * stage.batch_size / rate / 86400:.1f} |"
        )
    lines += ["", f"{found.trained / 1e6:.0f} million weights train, {found.frozen / 1e9:.2f} billion are frozen"]
    return "\n".join(lines)
