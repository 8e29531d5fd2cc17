"""The diffusion transformer beside diffusers' Lumina-Next, with the same weights; `parity.py` has its predictions."""

import copy
from threading import Thread

import pytest
import torch
from torch import Tensor

from blip3o import layers
from blip3o.config import DitConfig
from blip3o.dit import Dit
from blip3o.presets import preset

LIMIT = 1e-5
TINY = DitConfig(
    in_channels=224,
    grid=2,
    width=48,
    depth=2,
    num_heads=4,
    num_kv_heads=4,
    mlp_width=128,
    condition_width=64,
    time_width=48,
    eps=1e-5,
    rope_theta=1e4,
)


@pytest.fixture(scope="module", params=["heads4", "gqa"])
def pair(request, world):
    """Ours and diffusers', which may learn."""
    theirs, ours = world.grouped if request.param == "gqa" else (world.theirs, world.ours)
    return copy.deepcopy(ours.dit).requires_grad_(), copy.deepcopy(theirs.lumina).requires_grad_()


def inputs(batch: int = 3, queries: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, 224, generator=generator)
    hidden = torch.randn(batch, queries, 64, generator=generator)
    # Small: at 1000 diffusers' angles, in float32, are wrong by 6e-5, ours are not.
    return x, torch.tensor([10.0, 0.333, 5.12])[:batch], hidden


def close(ours: Tensor, theirs: Tensor) -> None:
    difference = (ours - theirs).abs().max().item()
    assert difference <= LIMIT, f"max difference {difference:.2e} over {LIMIT:.0e}"


def test_time_and_condition_matter(pair) -> None:
    """The parity above would hold for a network that ignored its inputs if theirs did: it does not."""
    ours, _ = pair
    x, timestep, hidden = inputs()
    y = ours(x, timestep, ours.project(hidden))
    assert (ours(x, timestep.flip(0), ours.project(hidden)) - y)[0].abs().max() > 1e-2
    permuted = hidden.flip(2)
    assert (ours(x, timestep, ours.project(permuted)) - y).abs().max() > 1e-2
    moved = x.clone()
    moved[:, 3] += 1
    assert (ours(moved, timestep, ours.project(hidden)) - y)[:, 2].abs().max() > 1e-4  # tokens see each other


def test_context_computed_once_changes_nothing(pair) -> None:
    ours, _ = pair
    x, timestep, hidden = inputs()
    condition = ours.project(hidden)
    close(ours(x, timestep, ours.context(condition)), ours(x, timestep, condition))


def test_rows_may_share_a_condition(pair) -> None:
    ours, _ = pair
    x, _, hidden = inputs(batch=1)
    x = torch.cat([x, -x, x + 1, x * 2])
    timestep, hidden = torch.tensor([10.0, 300.0, 700.0, 999.0]), torch.cat([hidden, hidden + 1])
    condition = ours.project(hidden)
    expected = ours(x, timestep, condition.repeat_interleave(2, 0))
    close(ours(x, timestep, condition), expected)
    close(ours(x, timestep, ours.context(condition)), expected)
    with pytest.raises(ValueError, match="multiple of the condition's 2 rows, got 3"):
        ours(x[:3], timestep[:3], condition)


def test_gradients_match(pair) -> None:
    ours, theirs = pair
    x, timestep, hidden = inputs()
    grads = []
    for network in (ours, theirs):
        network.zero_grad()
        x_in, hidden_in = x.clone().requires_grad_(), hidden.clone().requires_grad_()
        condition = ours.project(hidden_in) if network is ours else hidden_in
        network(x_in, timestep, condition).square().sum().backward()
        grads.append((x_in.grad, hidden_in.grad))
    gate = ours.blocks[0].attention.cross_gate.grad
    their_gate = theirs.transformer.layers[0].gate.grad
    for mine, other in [*zip(*grads, strict=True), (gate, their_gate)]:
        assert (mine - other).abs().max() <= LIMIT * other.abs().max()


def test_starts_as_the_zero_function() -> None:
    dit = Dit(TINY)
    x, timestep, hidden = inputs()
    assert dit(x, timestep, dit.project(hidden)).abs().max() == 0
    target = torch.randn(3, 4, 224)
    optimiser = torch.optim.AdamW(dit.parameters(), lr=1e-2)
    before = {name: value.clone() for name, value in dit.named_parameters()}
    for _ in range(3):  # the zeros open one after the other: output, modulation, what its gates let through
        optimiser.zero_grad()
        (dit(x, timestep, dit.project(hidden)) - target).square().mean().backward()
        optimiser.step()
    still = [name for name, value in dit.named_parameters() if value.grad is None or value.grad.abs().max() == 0]
    assert not still and all(not torch.equal(before[name], value) for name, value in dit.named_parameters())


def test_wrong_arguments_are_named() -> None:
    dit, (x, timestep, hidden) = Dit(TINY), inputs()
    with pytest.raises(ValueError, match=r"x must be \[B, 4, 224\], got \[3, 3, 224\]"):
        dit(x[:, :3], timestep, dit.project(hidden))
    with pytest.raises(ValueError, match=r"timestep must be \[3\]"):
        dit(x, timestep[:2], dit.project(hidden))
    with pytest.raises(ValueError, match=r"hidden must be \[B, Q, 64\], got \[3, 5, 63\]"):
        dit.project(hidden[..., :63])


@pytest.mark.parametrize(
    ("name", "expected", "queries"), [("4b", 1_362_257_824, 131_072), ("8b", 1_365_010_336, 229_376)]
)
def test_released_sizes(name: str, expected: int, queries: int) -> None:
    config = preset(name)
    with torch.device("meta"):
        dit = Dit(config.dit)
    assert sum(parameter.numel() for parameter in dit.parameters()) == expected
    assert config.num_queries * config.llm.width == queries  # trained with it, counted beside it


def test_a_product_that_recomputes_its_input_is_differentiated_once() -> None:
    """Under a plain sum too, where the second derivative by way of the saved inputs would silently be missing."""
    norm, linear, x = layers.RMSNorm(8, 1e-6), torch.nn.Linear(8, 4), torch.randn(3, 8, requires_grad=True)
    total = norm.before(linear, x).sum()
    torch.autograd.grad(total, x, retain_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        torch.autograd.grad(total, x, create_graph=True)


def test_rotary_tables_are_kept_but_not_without_bound() -> None:
    tables = [layers.grid_rope_table(2, 8, 1e4, torch.device("cpu"), n) for n in range(1, layers.TABLES + 10)]
    assert len(layers._tables) <= layers.TABLES
    assert layers.grid_rope_table(2, 8, 1e4, torch.device("cpu"), layers.TABLES + 9)[0] is tables[-1][0]


def test_casts_of_frozen_weights_are_made_once_and_change_nothing() -> None:
    norm, frozen, learning = layers.RMSNorm(8, 1e-6), torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    frozen.requires_grad_(False)
    x = torch.randn(3, 8, requires_grad=True)

    def gradient() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = layers.project(norm.before(frozen, x), frozen.weight)  # the same weight, by both ways to it
            return torch.autograd.grad(norm.before(learning, y.float()).float().sum(), x)[0]

    before = gradient()
    with layers.keep_casts() as casts:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            layers.project(torch.randn(3, 8), frozen.weight)  # must not leave what autograd cannot save
        first = gradient()
        kept = casts[frozen.weight]
        assert torch.equal(gradient(), first) and casts == {frozen.weight: kept}
    assert torch.equal(first, before) and kept.dtype == torch.bfloat16
    assert layers._casts.get() is None


@pytest.mark.parametrize("enabled", [True, False])
def test_a_row_goes_without_onednn(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of bfloat16, on any thread; the setting is as it was afterwards, after an error too."""
    draw = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(96, 64, generator=draw).bfloat16(), torch.randn(96, generator=draw).bfloat16()
    x = torch.randn(1, 1, 64, generator=draw).bfloat16()
    exact = (x.double() @ weight.double().t() + bias.double()).bfloat16()
    wrong: list[object] = []
    switch: set[bool] = set()
    linear = torch.nn.functional.linear

    def seen(*inputs: Tensor) -> Tensor:
        switch.add(torch._C._get_mkldnn_enabled())
        return linear(*inputs)

    monkeypatch.setattr(layers.F, "linear", seen)
    monkeypatch.setattr(layers, "_AMX", False)  # as on a chip with bfloat16 products and without AMX
    monkeypatch.setattr(layers, "_BFLOAT16_DOTS", True)

    def often() -> None:
        with torch.no_grad():
            for _ in range(200):
                y = layers.project(x, weight, bias)
                if y.shape != (1, 1, 96) or not torch.allclose(y, exact, atol=2**-6, rtol=2**-7):
                    wrong.append(y)

    with torch.backends.mkldnn.flags(enabled=enabled):
        threads = [Thread(target=often) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with torch.no_grad(), pytest.raises(RuntimeError):
            layers.project(x, weight[:, :63], bias)
        assert torch._C._get_mkldnn_enabled() is enabled
    assert not wrong and switch == {False}
