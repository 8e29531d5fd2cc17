"""The language model beside transformers', with the same weights; `parity.py` has the plain cases."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from blip3o.config import LlmConfig
from blip3o.llm import KvCache, Llm, multimodal_positions, scatter_features
from blip3o.presets import preset

LIMIT = 1e-5
IMAGE = 262
TINY = LlmConfig(
    vocab_size=267,
    width=64,
    depth=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    mlp_width=128,
    rope_theta=1e6,
    mrope_section=(2, 3, 3),
    eps=1e-6,
    tie_embeddings=False,
    qkv_bias=True,
)


def close(ours: Tensor, theirs: Tensor) -> None:
    difference = (ours - theirs).abs().max().item()
    assert difference <= LIMIT, f"max difference {difference:.2e} over {LIMIT:.0e}"


@pytest.fixture(scope="module")
def pair(world):
    assert world.ours.llm.config == TINY
    return world.ours.llm, world.theirs.qwen.model.language_model


@pytest.fixture(scope="module")
def rope_index(world):
    """transformers' get_rope_index."""

    def positions(ids: Tensor, mask: Tensor | None, grids: list[tuple[int, int]]) -> Tensor:
        thw = torch.tensor([(1, height * 2, width * 2) for height, width in grids])
        return world.theirs.qwen.model.get_rope_index(ids, (ids == IMAGE).int(), thw, attention_mask=mask)[0]

    return positions


def texts(batch: int = 3, tokens: int = 11, seed: int = 1) -> Tensor:
    return torch.randint(0, 256, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def test_padding_is_finite(pair) -> None:
    ours, _ = pair
    mask = torch.arange(11) >= 11 - torch.tensor([11, 7, 1])[:, None]
    assert ours(ours.embed(texts()), mask=mask).isfinite().all()


def picture_batch() -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Two texts with a 2 x 3 and a 3 x 2 picture, and one with both; padded on the left."""
    rows = [
        [5, 6, *[IMAGE] * 6, 7],
        [8, *[IMAGE] * 6, 9, 10, 11],
        [*[IMAGE] * 6, 12, 13, *[IMAGE] * 6, 14],
    ]
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[1] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in rows])
    return ids, mask, [(2, 3), (3, 2), (2, 3), (3, 2)]


def test_positions_of_pictures(rope_index) -> None:
    ids, mask, grids = picture_batch()
    ours = multimodal_positions(ids, mask, IMAGE, torch.tensor(grids))
    assert torch.equal(ours, rope_index(ids, mask, grids))
    flipped = ids.flip(1), mask.flip(1), grids[::-1][2:] + grids[::-1][:2]
    with pytest.raises(ValueError, match="whole pictures"):
        multimodal_positions(ids, mask, IMAGE, torch.tensor(grids[:3]))
    ours = multimodal_positions(flipped[0], flipped[1], IMAGE, (2, 3))
    assert torch.equal(ours, rope_index(flipped[0], flipped[1], [(2, 3)] * 4))


def test_positions_without_mask_and_without_pictures(rope_index) -> None:
    ids = torch.tensor([[5, IMAGE, IMAGE, IMAGE, IMAGE, 6, 7], [IMAGE, IMAGE, IMAGE, IMAGE, 8, 9, 4]])
    assert torch.equal(multimodal_positions(ids, None, IMAGE, (2, 2)), rope_index(ids, None, [(2, 2), (2, 2)]))
    plain = multimodal_positions(texts(), None, IMAGE, (2, 2))
    assert torch.equal(plain, torch.arange(11).expand(3, 3, 11))
    with pytest.raises(ValueError, match="whole pictures"):
        multimodal_positions(ids, None, IMAGE, (1, 3))
    with pytest.raises(ValueError, match="whole pictures"):  # 8 tokens in all, but no row has whole pictures
        multimodal_positions(torch.tensor([[IMAGE] * 3, [IMAGE] * 3, [IMAGE] * 2 + [1]]), None, IMAGE, (2, 2))


def test_features_take_the_place_of_image_tokens(pair) -> None:
    ours, _ = pair
    ids, _, _ = picture_batch()
    features = torch.randn(24, 64, generator=torch.Generator().manual_seed(3))
    embeddings = scatter_features(ours.embed(ids), ids, IMAGE, features)
    assert torch.equal(embeddings[ids == IMAGE], features)
    assert torch.equal(embeddings[ids != IMAGE], ours.embed(ids)[ids != IMAGE])
    with pytest.raises(ValueError, match="24 image tokens in ids, got 23"):
        scatter_features(embeddings, ids, IMAGE, features[:23])


@pytest.mark.parametrize("steps", [[11], [4, 7]])
def test_cache_equals_one_pass(pair, steps: list[int]) -> None:
    ours, theirs = pair
    ids = texts()
    cache = KvCache(TINY, 3, 11, device="cpu", dtype=torch.float32)
    parts = [ours(ours.embed(part), cache=cache) for part in ids.split(steps, dim=1)]
    close(torch.cat(parts, dim=1), theirs(input_ids=ids, use_cache=False).last_hidden_state)
    with pytest.raises(ValueError, match="room for 0 more"):
        ours(ours.embed(ids[:, :1]), cache=cache)


def test_a_block_s_cache_has_memory_of_its_own() -> None:
    """Where blocks share a tensor, a compiled graph copies all of it to write a token's keys into one."""
    cache = KvCache(TINY, 1, 4, device="cpu", dtype=torch.float32)
    assert len({x.untyped_storage().data_ptr() for x in cache.keys + cache.values}) == 2 * TINY.depth


@pytest.mark.parametrize("asked", [[], [10], [3, 14, 31, 32]])
def test_tokens_that_are_not_asked_for_cost_less_and_change_nothing(pair, asked: list[int]) -> None:
    """Their keys and values are stored all the same; and the gradient is what it was."""
    ours, _ = pair
    embeddings, rows = ours.embed(texts()).detach().requires_grad_(), torch.tensor(asked, dtype=torch.int64)
    with FlopCounterMode(display=False) as full:
        expected = ours(embeddings).flatten(0, 1)[rows]
    with FlopCounterMode(display=False) as counter:
        hidden = ours(embeddings, asked=rows)
    torch.testing.assert_close(hidden, expected, atol=LIMIT, rtol=0)
    assert counter.get_total_flops() < 0.8 * full.get_total_flops()
    if asked:
        both = [torch.autograd.grad(x.square().sum(), embeddings)[0] for x in (hidden, expected)]
        torch.testing.assert_close(*both, atol=1e-4, rtol=1e-4)

    caches = [KvCache(TINY, 3, 12, device="cpu", dtype=torch.float32) for _ in range(2)]
    with torch.no_grad():
        ours(embeddings, cache=caches[0])
        ours(embeddings, cache=caches[1], asked=rows)
        nexts = [ours(embeddings[:, :1], cache=cache) for cache in caches]
    close(*nexts)


def test_cached_decoding_of_a_padded_batch_with_pictures(pair) -> None:
    """Prefill with left padding and pictures, then a token at a time: as each row alone, without padding or cache."""
    ours, theirs = pair
    ids, mask, grids = picture_batch()
    positions = multimodal_positions(ids, mask, IMAGE, torch.tensor(grids))
    start, more = ours.embed(ids), texts(3, 4, seed=5)
    cache = KvCache(TINY, 3, ids.shape[1] + 4, device="cpu", dtype=torch.float32)
    parts = [ours(start, positions, mask, cache)]
    parts += [ours(ours.embed(token), cache=cache) for token in more.split([1, 1, 2], dim=1)]
    hidden = torch.cat(parts, dim=1)

    grid_of_row = [grids[0:1], grids[1:2], grids[2:4]]
    for row in range(3):
        whole = torch.cat([ids[row][mask[row]], more[row]])[None]
        places = multimodal_positions(whole, None, IMAGE, torch.tensor(grid_of_row[row]))
        alone = theirs(input_ids=whole, position_ids=places, use_cache=False).last_hidden_state
        close(hidden[row : row + 1, -whole.shape[1] :], alone)


def test_cached_decoding_after_right_padding(pair) -> None:
    """Padding between a short prompt and its continuation is neither seen nor counted."""
    ours, theirs = pair
    ids, more = texts(), texts(3, 2, seed=6)
    lengths = [11, 7, 1]
    mask = torch.arange(11) < torch.tensor(lengths)[:, None]
    cache = KvCache(TINY, 3, 13, device="cpu", dtype=torch.float32)
    ours(ours.embed(ids), mask=mask, cache=cache)
    hidden = torch.cat([ours(ours.embed(token), cache=cache) for token in more.split(1, dim=1)], dim=1)
    for row, length in enumerate(lengths):
        whole = torch.cat([ids[row, :length], more[row]])[None]
        close(hidden[row], theirs(input_ids=whole, use_cache=False).last_hidden_state[0, -2:])


def test_rewind_continues_one_prompt_twice(pair) -> None:
    ours, _ = pair
    ids, ends = texts(), [texts(3, 2, seed=7), texts(3, 2, seed=8)]
    cache = KvCache(TINY, 3, 13, device="cpu", dtype=torch.float32)
    ours(ours.embed(ids), cache=cache)
    length, following = cache.length, cache.next_position
    for end in ends:
        cache.rewind(length, following)
        close(
            ours(ours.embed(end), cache=cache),
            ours(ours.embed(torch.cat([ids, end], dim=1)))[:, -2:],
        )


def test_gradients_match(pair) -> None:
    ours, theirs = pair
    ids = texts()
    weight = torch.randn(3, 11, 64, generator=torch.Generator().manual_seed(9))
    embeddings = theirs.embed_tokens.weight[ids]
    mine, other = embeddings.clone().requires_grad_(), embeddings.clone().requires_grad_()
    (ours(mine) * weight).sum().backward()
    (theirs(inputs_embeds=other, use_cache=False).last_hidden_state * weight).sum().backward()
    scale = other.grad.abs().max()
    close(mine.grad / scale, other.grad / scale)


def test_tied_output_layer() -> None:
    llm = Llm(replace(TINY, tie_embeddings=True, qkv_bias=False))
    assert llm.output_weight is llm.embedding.weight
    assert not [name for name, _ in llm.named_parameters() if name.startswith("out") or "bias" in name]
    hidden = torch.randn(2, 64)
    torch.testing.assert_close(llm.logits(hidden), hidden @ llm.embedding.weight.T)


def test_wrong_arguments_are_named() -> None:
    llm, x = Llm(TINY), torch.zeros(2, 5, 64)
    with pytest.raises(ValueError, match=r"mask must be bool \[2, 5\], got torch.float32"):
        llm(x, mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"positions must be \[3, 2, 5\], got \[2, 5\]"):
        llm(x, positions=torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"asked must be int64 \[N\], got torch.bool \[2, 5\]"):
        llm(x, asked=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="features must have width 64"):
        scatter_features(x, torch.zeros(2, 5).long(), 0, torch.zeros(10, 32))


@pytest.mark.parametrize("name", ["4b", "8b"])
def test_released_sizes(name: str) -> None:
    """As many parameters as transformers' model of the same shape has."""
    module = pytest.importorskip(
        "transformers.models.qwen2_5_vl", reason="needs transformers: pip install transformers"
    )
    config = preset(name).llm
    text = module.Qwen2_5_VLTextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
    )
    with torch.device("meta"):
        theirs = sum(p.numel() for p in module.Qwen2_5_VLTextModel(text).parameters())
        ours = sum(p.numel() for p in Llm(config).parameters())
    output = 0 if config.tie_embeddings else config.vocab_size * config.width
    assert ours == theirs + output
