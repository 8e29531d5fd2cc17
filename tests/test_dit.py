"""The diffusion transformer against diffusers' Lumina-Next: same weights, every gate open, float32, 1e-5."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from blip3o import layers
from blip3o.config import DitConfig
from blip3o.dit import Dit
from blip3o.presets import preset
from blip3o_kernels import use

LIMIT = 1e-5
TINY = DitConfig(
    in_channels=16,
    grid=4,
    width=48,
    depth=2,
    num_heads=4,
    num_kv_heads=4,
    mlp_width=128,
    condition_width=24,
    time_width=48,
    eps=1e-5,
    rope_theta=1e4,
)


def randomise(network: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        middle = 1.0 if "norm" in name and name.endswith("weight") and parameter.dim() == 1 else 0.0
        std = 0.5 if name.endswith("gate") else 0.15
        parameter.data = middle + std * torch.randn(parameter.shape, generator=generator)


class Lumina(torch.nn.Module):
    """diffusers' transformer with the projection of the condition that the released models put before it."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        pytest.importorskip("diffusers", reason="diffusers is not installed")
        from diffusers import LuminaNextDiT2DModel
        from diffusers.models.embeddings import PixArtAlphaTextProjection, get_2d_rotary_pos_embed_lumina

        self.config = config
        self.projection = PixArtAlphaTextProjection(config.condition_width, config.width)
        self.transformer = LuminaNextDiT2DModel(
            sample_size=config.grid,
            patch_size=1,
            in_channels=config.in_channels,
            hidden_size=config.width,
            num_layers=config.depth,
            num_attention_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            multiple_of=config.mlp_width,
            norm_eps=config.eps,
            learn_sigma=False,
            qk_norm=True,
            cross_attention_dim=config.width,
        )
        self.rotary = get_2d_rotary_pos_embed_lumina(config.width // config.num_heads, 384, 384)

    def forward(self, x: Tensor, timestep: Tensor, hidden: Tensor) -> Tensor:
        grid = self.config.grid
        picture = x.transpose(1, 2).unflatten(2, (grid, grid))
        y = self.transformer(
            picture,
            timestep,
            self.projection(hidden),
            torch.ones(hidden.shape[:2]),
            image_rotary_emb=self.rotary[:grid, :grid],
            cross_attention_kwargs={},
            return_dict=False,
        )[0]
        return y.flatten(2).transpose(1, 2)


def copy_to_ours(theirs: Lumina, ours: Dit) -> None:
    source = theirs.state_dict()
    state = {}
    for kind in ("weight", "bias"):
        for here, there in {
            "condition_in": "projection.linear_1",
            "condition_out": "projection.linear_2",
            "patch_in": "transformer.patch_embedder.proj",
            "time_in": "transformer.time_caption_embed.timestep_embedder.linear_1",
            "time_out": "transformer.time_caption_embed.timestep_embedder.linear_2",
            "pooled_norm": "transformer.time_caption_embed.caption_embedder.0",
            "pooled_out": "transformer.time_caption_embed.caption_embedder.1",
            "modulation": "transformer.norm_out.linear_1",
            "patch_out": "transformer.norm_out.linear_2",
        }.items():
            state[f"{here}.{kind}"] = source[f"{there}.{kind}"]
    for i in range(ours.config.depth):
        here, there = f"blocks.{i}.", f"transformer.layers.{i}."
        queries = ["attn1.to_q", "attn2.to_q", "attn1.to_k", "attn1.to_v"]
        state[f"{here}attention.qqkv.weight"] = torch.cat([source[f"{there}{part}.weight"] for part in queries])
        keys = ["attn2.to_k", "attn2.to_v"]
        state[f"{here}attention.cross_kv.weight"] = torch.cat([source[f"{there}{part}.weight"] for part in keys])
        gate_up = ["feed_forward.linear_1", "feed_forward.linear_3"]
        state[f"{here}mlp.gate_up.weight"] = torch.cat([source[f"{there}{part}.weight"] for part in gate_up])
        state[f"{here}attention.cross_gate"] = source[f"{there}gate"]
        for mine, other in {
            "attention.out": "attn2.to_out.0",
            "attention.condition_norm": "norm1_context",
            "mlp.down": "feed_forward.linear_2",
            "attention_norm": "norm1.norm",
            "attention_out_norm": "norm2",
            "mlp_norm": "ffn_norm1",
            "mlp_out_norm": "ffn_norm2",
        }.items():
            state[f"{here}{mine}.weight"] = source[f"{there}{other}.weight"]
        for kind in ("weight", "bias"):
            state[f"{here}modulation.{kind}"] = source[f"{there}norm1.linear.{kind}"]
            state[f"{here}attention.query_norm.{kind}"] = source[f"{there}attn1.norm_q.{kind}"]
            state[f"{here}attention.key_norm.{kind}"] = source[f"{there}attn1.norm_k.{kind}"]
            state[f"{here}attention.cross_query_norm.{kind}"] = source[f"{there}attn2.norm_q.{kind}"]
            state[f"{here}attention.cross_key_norm.{kind}"] = source[f"{there}attn2.norm_k.{kind}"]
    ours.load_state_dict(state)


@pytest.fixture(scope="module", params=[4, 2], ids=["heads4", "gqa"])
def pair(request):
    config = replace(TINY, num_kv_heads=request.param)
    theirs = Lumina(config).eval()
    randomise(theirs)
    ours = Dit(config).eval()
    copy_to_ours(theirs, ours)
    return ours, theirs


def inputs(batch: int = 3, queries: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 16, 16, generator=generator)
    hidden = torch.randn(batch, queries, 24, generator=generator)
    # Small: at 1000 diffusers' angles, in float32, are wrong by 6e-5, ours are not.
    return x, torch.tensor([10.0, 0.333, 5.12])[:batch], hidden


def close(ours: Tensor, theirs: Tensor) -> None:
    difference = (ours - theirs).abs().max().item()
    assert difference <= LIMIT, f"max difference {difference:.2e} over {LIMIT:.0e}"


def test_equals_diffusers(pair) -> None:
    ours, theirs = pair
    x, timestep, hidden = inputs()
    expected = theirs(x, timestep, hidden)
    assert expected.abs().max() > 0.1
    close(ours(x, timestep, ours.project(hidden)), expected)


def test_equals_diffusers_at_large_times(pair) -> None:
    """With the reference, whose angles are in float32 too."""
    ours, theirs = pair
    x, _, hidden = inputs()
    timestep = torch.tensor([1000.0, 33.3, 512.0])
    with use("reference"):
        close(ours(x, timestep, ours.project(hidden)), theirs(x, timestep, hidden))


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
    assert (ours(moved, timestep, ours.project(hidden)) - y)[:, 12].abs().max() > 1e-4  # tokens see each other


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
    target = torch.randn(3, 16, 16)
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
    with pytest.raises(ValueError, match=r"x must be \[B, 16, 16\], got \[3, 15, 16\]"):
        dit(x[:, :15], timestep, dit.project(hidden))
    with pytest.raises(ValueError, match=r"timestep must be \[3\]"):
        dit(x, timestep[:2], dit.project(hidden))
    with pytest.raises(ValueError, match=r"hidden must be \[B, Q, 24\], got \[3, 5, 23\]"):
        dit.project(hidden[..., :23])


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
