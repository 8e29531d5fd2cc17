"""Three ways to run the same networks: ours, plain torch as the official code plans it, plain torch with our plan.

                           official                              cached (our plan)
    condition's projection at every step                         once per prompt
    its keys and values    at every step                         once per prompt
    guidance               both branches in one batch            both branches in one batch
    keys and values        joined by torch.cat                   written into room that is there
    logits                 of every token, widened to float32    of the tokens whose loss or successor is asked for
    frozen CLIP tower      run at every training step            run once, before the training
    prompts of a batch     read once for each row                read once for the rows that share one
    text loss of stage 2   computed and dropped                  not computed
    frozen prompts         their pass is kept for gradients      read without gradients; only the queries' is kept
    AdamW                  torch's default, as HF's Trainer      fused

Ours alone: of tokens that nothing is asked of, the last block computes keys and values only.

The official code also recomputes the language model's activations (gradient checkpointing). That trades time for
memory and is left out: a user of these sizes would not turn it on. All plans train float32 weights, autocast where
products are bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from plain import CatCache, Plain, RoomyCache
from torch import Tensor, nn

from blip3o import flow, generate
from blip3o.flow import TIMESTEPS
from blip3o.model import Blip3o
from blip3o.train.optimizer import descend, optimizer_for
from blip3o.train.recipe import Recipe
from blip3o.train.stages import generation_loss, understanding_loss

GUIDANCE = generate.GUIDANCE
IGNORE = -100
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Picture:
    """Starting noise of one drawing, and the steps from it."""

    features: Tensor  # [1, F, C]
    pixels: Tensor | None  # [1, 3, S, S], where there is a decoder
    steps: int


class Native:
    """What this project's users call."""

    def __init__(self, model: Blip3o) -> None:
        self.model = model

    def prefill(self, ids: Tensor) -> Tensor:
        """The logits after a prompt [1, T], by which its first answer is chosen: [1, vocabulary]."""
        model = self.model
        last, cache = torch.tensor([ids.shape[1] - 1], device=ids.device), model.cache(1, ids.shape[1] + 1)
        return model.llm.logits(model.llm(model.embed(ids), None, None, cache, asked=last))

    def decode(self, ids: Tensor, token: Tensor) -> Step:
        """A function that gives the logits after `token` [1, 1], over and over, behind a prompt already read."""
        model, cache = self.model, self.model.cache(1, ids.shape[1] + 1)
        model.llm(model.embed(ids), None, None, cache)
        length = cache.length

        def step() -> Tensor:
            cache.length = length  # all that the peers' caches forget, too
            return model.llm.logits(model.llm(model.llm.embed(token), None, None, cache)[:, -1])

        return step

    def denoise(self, hidden: Tensor, noise: Tensor) -> Step:
        """A function that takes one step of the sampler under a condition already at hand: [1, F, C]."""
        predictions = generate.predictor(self.model, hidden, len(noise), GUIDANCE, [1.0])
        return lambda: flow.integrate(self.model.config.flow, predictions, noise, steps=1, guidance=GUIDANCE)

    def answer(self, ids: Tensor, mask: Tensor, limit: int) -> Tensor:
        return generate.answer_ids(self.model, ids, mask, None, limit=limit, words=self.model.config.end_token)

    def draw(self, ids: Tensor, mask: Tensor, picture: Picture) -> Tensor:
        features = generate.draw_targets(
            self.model, ids, mask, picture.features, guidance=GUIDANCE, steps=picture.steps
        )
        return features if picture.pixels is None else generate.decode(self.model, features, picture.pixels)


class Official:
    """Plain torch, planned as the official code does it."""

    cached = False

    def __init__(self, network: Plain, compiled: bool = False) -> None:
        self.network = network
        wrap = torch.compile if compiled else lambda function: function
        self.llm, self.dit = wrap(network.llm.forward), wrap(network.dit.forward)
        self.decoder = wrap(network.decoder.forward) if network.decoder is not None else None

    def _cache(self, capacity: int) -> CatCache | RoomyCache:
        llm = self.network.llm
        return RoomyCache(llm.config, 1, capacity, llm.embedding.weight) if self.cached else CatCache()

    def _last(self, hidden: Tensor) -> Tensor:
        """The last token's logits, float32 as transformers' generate makes them."""
        llm = self.network.llm
        return (llm.logits(hidden[:, -1]) if self.cached else llm.logits(hidden)[:, -1]).float()

    def prefill(self, ids: Tensor) -> Tensor:
        return self._last(self.llm(self.network.embed(ids), None, self._cache(ids.shape[1] + 1)))

    def decode(self, ids: Tensor, token: Tensor) -> Step:
        full = self._cache(ids.shape[1] + 1)
        self.network.llm(self.network.embed(ids), None, full)
        length = full.length

        def step() -> Tensor:
            cache: CatCache | RoomyCache = full
            if isinstance(full, RoomyCache):
                full.length = length
            else:
                cache = CatCache()
                cache.pairs = dict(full.pairs)
            return self._last(self.llm(self.network.embed(token), None, cache))

        return step

    def answer(self, ids: Tensor, mask: Tensor, limit: int) -> Tensor:
        with torch.inference_mode():
            config, cache, tokens = self.network.config, self._cache(ids.shape[1] + limit), []
            x = self.network.embed(ids)
            for _ in range(limit):
                token = self._last(self.llm(x, None, cache))[:, : config.end_token].argmax(-1)
                tokens.append(token)
                if bool((token == config.end_token).all()):
                    break
                x = self.network.embed(token[:, None])
            return torch.stack(tokens, dim=1)

    def _guided(self, hidden: Tensor) -> Callable[[Tensor, float], Tensor]:
        """The guided velocity, both branches in one batch, of x [1, F, C] at a noise level."""
        network, flow_config = self.network, self.network.config.flow
        both = torch.cat((torch.zeros_like(hidden), hidden))
        if self.cached:
            condition = network.dit.project(both)
            pairs, pooled = network.dit.keys_values(condition), network.dit.pool(condition)

        def velocity(x: Tensor, sigma: float) -> Tensor:
            x = torch.cat((x, x))
            time = torch.full((2,), sigma * TIMESTEPS, device=x.device)
            known = (pairs, pooled) if self.cached else (network.dit.project(both),)
            v = self.dit(x, time, *known)
            if flow_config.prediction == "sample":
                v = (x - v) / sigma
            without, with_condition = v.chunk(2)
            return without + GUIDANCE * (with_condition - without)

        return velocity

    def denoise(self, hidden: Tensor, noise: Tensor) -> Step:
        velocity = self._guided(hidden)
        return lambda: (noise.float() - velocity(noise, 1.0).float()).to(noise.dtype)

    def draw(self, ids: Tensor, mask: Tensor, picture: Picture) -> Tensor:
        with torch.inference_mode():
            network = self.network
            hidden = self.llm(torch.cat((network.embed(ids), network.queries[None]), dim=1))
            if not self.cached:
                network.llm.logits(hidden).float()
            velocity, x = self._guided(hidden[:, -len(network.queries) :]), picture.features
            levels = flow.sigmas(picture.steps)
            for here, there in pairwise(levels):
                x = (x.float() + (there - here) * velocity(x, here).float()).to(x.dtype)
            if self.decoder is None or picture.pixels is None:
                return x
            features, x = x, picture.pixels
            levels = flow.sigmas(generate.DECODER_STEPS)
            for here, there in pairwise(levels):
                v = (x - self.decoder(x, torch.full((1,), here * TIMESTEPS, device=x.device), features)) / here
                x = (x.float() + (there - here) * v.float()).to(x.dtype)
            return ((x + 1) / 2).clamp(0, 1)


class Cached(Official):
    """Plain torch with our plan."""

    cached = True


# Training.


@dataclass(frozen=True)
class Understanding:
    """ids, targets [B, T]; the pictures of the rows, normalised, and their features, once computed."""

    ids: Tensor
    targets: Tensor
    pictures: Tensor
    features: Tensor


@dataclass(frozen=True)
class Generation:
    """ids, mask [P, T] of P prompts; kept, pooled bool [P]; B = P x draws rows of features, noise, sigma, and the P
    pictures of which the features come."""

    ids: Tensor
    mask: Tensor
    kept: Tensor
    pooled: Tensor
    pictures: Tensor
    features: Tensor
    noise: Tensor
    sigma: Tensor


Batch = Understanding | Generation


def native_loss(model: Blip3o, batch: Batch) -> Tensor:
    if isinstance(batch, Understanding):
        return understanding_loss(model, batch.ids, batch.targets, batch.features)
    return generation_loss(
        model, batch.ids, batch.mask, None, batch.kept, batch.pooled, batch.features, batch.noise, batch.sigma
    )


def official_loss(network: Plain, batch: Batch) -> tuple[Tensor, ...]:
    """The loss, and what lives as long as it does."""
    draws = 1 if isinstance(batch, Understanding) else len(batch.features) // len(batch.pictures)
    with torch.no_grad():
        features = network.features(batch.pictures.repeat_interleave(draws, 0))
    if isinstance(batch, Understanding):
        hidden = network.llm(network.embed(batch.ids, features.to(batch.features.dtype)))
        logits = network.llm.logits(hidden).float()
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE), logits
    ids, mask, kept, pooled = (x.repeat_interleave(draws, 0) for x in (batch.ids, batch.mask, batch.kept, batch.pooled))
    count = len(network.queries)
    x = torch.cat((network.embed(ids), network.queries.expand(len(ids), -1, -1)), dim=1)
    hidden = network.llm(x, F.pad(mask, (0, count), value=True))
    logits = network.llm.logits(hidden).float()  # whose cross entropy the official code drops
    dropped = F.cross_entropy(logits[:, : ids.shape[1] - 1].flatten(0, 1), ids[:, 1:].flatten())
    condition = network.dit.project(hidden[:, -count:] * kept[:, None, None])
    loss = _flow_loss(network, batch, features.to(batch.features.dtype), condition, pooled)
    return loss, logits, dropped


def cached_loss(network: Plain, batch: Batch) -> tuple[Tensor, ...]:
    if isinstance(batch, Understanding):
        asked = batch.targets != IGNORE
        hidden = network.llm(network.embed(batch.ids, batch.features))[asked]
        return (F.cross_entropy(network.llm.logits(hidden).float(), batch.targets[asked]),)
    count = len(network.queries)
    x = torch.cat((network.embed(batch.ids), network.queries.expand(len(batch.ids), -1, -1)), dim=1)
    hidden = network.llm(x, F.pad(batch.mask, (0, count), value=True))[:, -count:]
    condition = network.dit.project(hidden * batch.kept[:, None, None])
    return (_flow_loss(network, batch, batch.features, condition, batch.pooled),)


def _flow_loss(network: Plain, batch: Generation, x: Tensor, condition: Tensor, pooled: Tensor) -> Tensor:
    level = batch.sigma[:, None, None]
    noisy = (1 - level) * x + level * batch.noise
    target = x if network.config.flow.prediction == "sample" else batch.noise - x
    summary = network.dit.pool(condition) * pooled[:, None]
    prediction = network.dit(noisy, batch.sigma * TIMESTEPS, network.dit.keys_values(condition), summary)
    return F.mse_loss(prediction.float(), target.float())


@dataclass
class Trainer:
    """One plan of one stage. loss: of the batch. fused: whose AdamW; the weights are everyone's."""

    loss: Callable[[], Tensor | tuple[Tensor, ...]]
    parameters: dict[str, nn.Parameter]
    recipe: Recipe
    bfloat16: bool
    native: bool
    fused: bool

    def optimizer(self) -> torch.optim.AdamW:
        if self.fused:
            return optimizer_for(self.parameters, self.recipe)
        matrices = [x for x in self.parameters.values() if x.dim() >= 2]
        vectors = [x for x in self.parameters.values() if x.dim() < 2]
        groups = [{"params": matrices, "weight_decay": self.recipe.weight_decay}]
        groups.append({"params": vectors, "weight_decay": 0.0})
        return torch.optim.AdamW(groups, lr=self.recipe.learning_rate, betas=self.recipe.betas)

    def forward(self) -> tuple[Tensor, ...]:
        device = next(iter(self.parameters.values())).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.bfloat16):
            loss = self.loss()
        return loss if isinstance(loss, tuple) else (loss,)

    def step(self, optimizer: torch.optim.AdamW) -> None:
        loss = self.forward()
        if self.native:
            loss[0].backward()
            descend(optimizer, loss[0].item(), self.recipe.clip_norm)
            return
        loss[0].backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), self.recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def gradients(self) -> list[Tensor]:
        """The loss and every gradient: what a plan is checked by."""
        loss = self.forward()[0]
        return [loss.detach(), *torch.autograd.grad(loss, list(self.parameters.values()))]


def size(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
