"""Drawing from prompts and answering questions with a trained model."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from blip3o import flow, regression
from blip3o.data import text
from blip3o.flow import TIMESTEPS
from blip3o.llm import needed
from blip3o.model import Blip3o
from blip3o.processor import Processor

GUIDANCE = 3.0  # of nano's sampler
STEPS = 40
DECODER_STEPS = 4
LONGEST_ANSWER = 40  # tokens
Predictions = Callable[[Tensor, float], tuple[Tensor, Tensor | None]]


def noise_for(model: Blip3o, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Starting noise of drawings, one per seed: of the target [B, N, V] and of the visual decoder's pixels
    [B, 3, S, S], S being 0 where the target has its own way back to a picture.

    A drawing's noise depends on its own seed alone, so it looks the same alone and in any batch. ValueError for a model
    that cannot draw pictures by itself, for no seeds, or for a seed outside 0..2^63 - 1.
    """
    config, weight = model.config, model.llm.output_weight
    if config.image_target == "clip" and config.decoder is None:
        raise ValueError(f"model {config.name!r} has no visual decoder of its own")
    if config.image_target == "vae":
        model.require_autoencoder()
    if not seeds or not all(0 <= seed < 2**63 for seed in seeds):
        raise ValueError(f"seeds must be at least one number, each in 0..2^63 - 1, got {list(seeds)}")
    side = config.decoder.image_size if config.decoder else 0
    targets, pixels = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        targets.append(torch.randn(config.dit.grid**2, config.dit.in_channels, generator=generator))
        pixels.append(torch.randn(3, side, side, generator=generator))
    return torch.stack(targets).to(weight), torch.stack(pixels).to(weight)


@torch.inference_mode()
def draw(
    model: Blip3o,
    ids: Tensor,
    mask: Tensor,
    seeds: Sequence[int],
    *,
    guidance: float | None = None,
    steps: int | None = None,
    decoder_steps: int | None = None,
) -> Tensor:
    """Pictures [S, 3, H, W] in 0..1 for prompts `ids`, `mask` [B, T] (padded on the left), one for each of S `seeds`.

    S is a multiple of B: then S / B seeds that follow each other belong to one prompt, which is read once.
    guidance, steps   of the sampler; None: GUIDANCE and STEPS. An "mse" model has no sampler, and refuses both
    decoder_steps     of the visual decoder's; None: DECODER_STEPS. Targets with their own way back refuse it
    """
    if not seeds or len(seeds) % len(ids):
        raise ValueError(f"seeds must be a multiple of the {len(ids)} prompts, got {len(seeds)}")
    noise, pixel_noise = noise_for(model, seeds)
    targets = draw_targets(model, ids, mask, noise, guidance=guidance, steps=steps)
    return decode(model, targets, pixel_noise, steps=decoder_steps)


@torch.inference_mode()
def draw_targets(
    model: Blip3o, ids: Tensor, mask: Tensor, noise: Tensor, *, guidance: float | None = None, steps: int | None = None
) -> Tensor:
    """Standardised targets [S, N, V] for prompts `ids`, `mask` [B, T], from noise like them; S / B rows a prompt.

    guidance, steps   see `draw`
    """
    regressed = model.config.objective == "mse"
    if regressed and not (guidance is None and steps is None):
        raise ValueError("guidance and steps are a sampler's, and a model of objective 'mse' has none")
    condition = model.condition(ids, mask)
    if regressed:
        return regress_targets(model, condition).repeat_interleave(len(noise) // len(condition), 0)
    guidance, steps = GUIDANCE if guidance is None else guidance, STEPS if steps is None else steps
    return sample_targets(model, condition, noise, guidance=guidance, steps=steps)


def regress_targets(model: Blip3o, condition: Tensor) -> Tensor:
    """Objective "mse": targets [B, N, V] under what the queries have read, `condition` [B, Q, W]."""
    dit = model.dit
    context = dit.context(dit.project(condition))
    like = condition.new_empty(len(condition), dit.config.grid**2, dit.config.in_channels)
    return regression.regress(lambda x, sigma: dit(x, sigma * TIMESTEPS, context), like)


def sample_targets(
    model: Blip3o,
    condition: Tensor,
    noise: Tensor,
    *,
    guidance: float,
    steps: int,
    whole_times: bool = False,
    after: Callable[[int, float, Tensor], object] | None = None,
) -> Tensor:
    """Objective "flow": targets [S, N, V] from noise [S, N, V] under what the queries have read, `condition` [B, Q, W].

    whole_times   see `predictor`
    after         called after every step with its number, its noise level, and the targets so far
    """
    predictions = predictor(model, condition, len(noise), guidance, flow.sigmas(steps)[:-1], whole_times)
    return flow.integrate(model.config.flow, predictions, noise, steps=steps, guidance=guidance, after=after)


def predictor(
    model: Blip3o, condition: Tensor, count: int, guidance: float, levels: Sequence[float], whole_times: bool = False
) -> Predictions:
    """Predicts `count` drawings under `condition` [B, Q, W] at the noise `levels`, with and without it in one batch.

    whole_times   the network is told the times cut to whole numbers, as the released inference code does
    All that does not depend on the drawings is computed here, once: what the network needs of the condition, and what
    it needs of each level.
    """
    dit, guided, repeats = model.dit, guidance != 1.0, count // len(condition)
    if guided:
        condition = torch.cat([condition, torch.zeros_like(condition)])
    context = dit.context(dit.project(condition))
    rows = context.pooled.repeat_interleave(repeats, 0)
    times = condition.new_tensor(levels, dtype=torch.float32) * TIMESTEPS
    moments = dict(zip(levels, dit.moments(times.trunc() if whole_times else times, rows), strict=True))

    def predictions(x: Tensor, level: float) -> tuple[Tensor, Tensor | None]:
        if not guided:
            return dit(x, moments[level], context), None
        conditional, unconditional = dit(torch.cat([x, x]), moments[level], context).chunk(2)
        return conditional, unconditional

    return predictions


@torch.inference_mode()
def decode(model: Blip3o, targets: Tensor, noise: Tensor, *, steps: int | None = None) -> Tensor:
    """Standardised targets [B, N, V] -> pictures [B, 3, S, S] in 0..1; CLIP features from pixel noise [B, 3, S, S]."""
    if model.config.image_target != "clip":
        if steps is not None:
            raise ValueError(f"steps are the visual decoder's; {model.config.image_target} have no need of one")
        return model.pictures(targets)
    decoder = model.decoder
    if decoder is None:
        raise ValueError(f"model {model.config.name!r} has no visual decoder of its own")
    pixels = flow.sample(
        decoder.config.flow,
        lambda x, sigma: decoder(x, sigma * TIMESTEPS, targets),
        noise,
        steps=DECODER_STEPS if steps is None else steps,
    )
    return ((pixels + 1) / 2).clamp(0, 1)


@torch.inference_mode()
def answer_ids(
    model: Blip3o,
    ids: Tensor,
    mask: Tensor,
    features: Tensor | None,
    *,
    limit: int = LONGEST_ANSWER,
    words: int = len(text.WORDS),
) -> Tensor:
    """Greedy answers [B, <= limit] to conversations `ids`, `mask` [B, T] (padded on the left) that end in a question.

    An answer ends in the end token; padding follows. `words` is the size of the vocabulary: rows of the output layer
    beyond it are spare or stand for nonce words of the training's texts, and are never said.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1 token, got {limit}")
    pad, end = model.config.pad_token, model.config.end_token
    embeddings = model.embed(ids, features)
    cache = model.cache(len(ids), ids.shape[1] + limit)
    last = torch.arange(1, len(ids) + 1, device=ids.device) * ids.shape[1] - 1
    hidden = model.llm(embeddings, None, needed(mask), cache, asked=last)[:, None]
    answers: list[Tensor] = []
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for _ in range(limit):
        token = model.llm.logits(hidden)[:, -1, :words].argmax(-1)
        token = torch.where(done, pad, token)
        answers.append(token)
        done |= token == end
        if done.all():
            break
        hidden = model.llm(model.llm.embed(token[:, None]), None, None, cache)
    return torch.stack(answers, dim=1)


def generate(
    model: Blip3o,
    processor: Processor,
    prompts: Sequence[str],
    *,
    n: int = 1,
    seed: int = 0,
    guidance: float | None = None,
    steps: int | None = None,
) -> Tensor:
    """Draw each prompt `n` times: pictures [len(prompts) * n, 3, S, S] in 0..1, the drawings of a prompt side by side.

    Drawing k of a prompt starts from noise `seed + k`. guidance, steps: see `draw`.
    Raises ValueError for an empty prompt or unknown words.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    device = model.llm.output_weight.device
    ids, mask = text.left_pad([text.drawing_prompt(processor.encode(prompt)) for prompt in prompts])
    seeds = [seed + k for _ in prompts for k in range(n)]
    return draw(model, ids.to(device), mask.to(device), seeds, guidance=guidance, steps=steps)


@torch.inference_mode()
def ask(model: Blip3o, processor: Processor, picture: Tensor, question: str) -> str:
    """Answer a question about a picture [3, S, S] in 0..1. Raises ValueError for an empty question or unknown words."""
    weight = model.llm.output_weight
    ids, mask = text.left_pad([text.question_prompt(processor.encode(question), model.config.feature_grid**2)])
    features = model.features(picture[None].to(weight))
    words = processor.tokenizer.get_vocab_size()
    answers = answer_ids(model, ids.to(weight.device), mask.to(weight.device), features, words=words)
    return processor.decode(answers[0])
