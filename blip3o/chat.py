"""Conversations with the released models: pictures are read by Qwen's vision tower, answers come token by token.

Shapes: B conversations, T tokens, P patches of all pictures.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from blip3o.llm import multimodal_positions, needed, scatter_features
from blip3o.model import Blip3o
from blip3o.qwen_processor import QwenProcessor

LONGEST_ANSWER = 512  # tokens
Grids = Sequence[tuple[int, int, int]]


def embed(
    model: Blip3o, ids: Tensor, mask: Tensor, patches: Tensor | None, grids: Grids
) -> tuple[Tensor, Tensor | None]:
    """Embeddings [B, T, W] of texts with pictures, and their positions [3, B, T]; None where there are no pictures.

    patches, grids   of all pictures in reading order, as `QwenVision` takes them
    """
    embeddings = model.llm.embed(ids)
    if patches is None:
        return embeddings, None
    if model.vision is None:
        raise ValueError(f"model {model.config.name!r} has no vision tower: it reads pictures as CLIP features")
    token, merge = model.config.image_token, model.vision.config.merge_size
    tokens = model.vision(patches.to(embeddings), grids)
    sizes = torch.tensor([(rows // merge, columns // merge) for _, rows, columns in grids], device=ids.device)
    return scatter_features(embeddings, ids, token, tokens), multimodal_positions(ids, mask, token, sizes)


@torch.inference_mode()
def answer_tokens(
    model: Blip3o,
    ids: Tensor,
    mask: Tensor,
    patches: Tensor | None = None,
    grids: Grids = (),
    *,
    max_new_tokens: int = LONGEST_ANSWER,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """The tokens [B] that go on with conversations `ids`, `mask` [B, T], padded on either side, one step after another.

    The likeliest; with a temperature above 0, drawn by `generator` (of a CPU). Ends when every row has said the end
    token or the padding token, or after `max_new_tokens` steps; rows that have ended go on with padding.
    """
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be a whole number, at least 1, got {max_new_tokens!r}")
    if not temperature >= 0:
        raise ValueError(f"temperature must be 0 or above, got {temperature}")
    config, (batch, tokens) = model.config, ids.shape
    embeddings, positions = embed(model, ids, mask, patches, grids)
    cache = model.cache(batch, tokens + max_new_tokens)
    last = tokens - 1 - mask.flip(1).long().argmax(1)  # of each row's text
    rows = torch.arange(batch, device=ids.device) * tokens + last
    hidden = model.llm(embeddings, positions, needed(mask), cache, asked=rows)
    done = torch.zeros(batch, dtype=torch.bool, device=ids.device)
    for step in range(1, max_new_tokens + 1):
        logits = model.llm.logits(hidden)
        most = logits.amax(-1, keepdim=True)
        if not bool(most.isfinite().all()):
            raise ValueError(f"the logits are not finite: the weights are not, or are too large for {logits.dtype}")
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            # From 0 down and not by less than float32 holds, so that no temperature makes infinities of both signs.
            chances = ((logits - most).float() / max(temperature, 1e-30)).softmax(-1).cpu()
            token = torch.multinomial(chances, 1, generator=generator)[:, 0].to(ids.device)
        token = torch.where(done, config.pad_token, token)
        yield token
        done |= (token == config.end_token) | (token == config.pad_token)
        if step == max_new_tokens or bool(done.all()):
            return
        hidden = model.llm(model.llm.embed(token[:, None]), None, None, cache)[:, 0]


def stream(
    model: Blip3o, processor: QwenProcessor, messages: Sequence[Mapping[str, Any]], **options: Any
) -> Iterator[str]:
    """Pieces of the answer to a conversation, as they are said; see `QwenProcessor.conversation`, `answer_tokens`.

    A piece ends where a letter ends: bytes of an unfinished one wait for the next.
    """
    row, patches, grids = processor.conversation(messages)
    device = model.llm.output_weight.device
    ids, mask = (tensor.to(device) for tensor in processor.pad([row]))
    said: list[int] = []
    shown = ""
    for token in answer_tokens(model, ids, mask, patches, grids, **options):
        said.append(int(token))
        text = processor.decode(said)
        if not text.endswith("\ufffd") and text != shown:
            yield text[len(shown) :]
            shown = text
    rest = processor.decode(said)[len(shown) :]
    if rest:
        yield rest
