"""Values of single ops that the conformance bound does not look at: limits, other ways to the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from blip3o_kernels import (
    add_rms_norm,
    attention,
    gated_residual,
    layer_norm,
    native,
    ops,
    qk_norm_rope,
    rms_norm,
    rope,
    rope_table,
    rope_table_2d,
    swiglu,
    timestep_embedding,
    use,
)
from blip3o_kernels.dispatch import INSTRUCTION_SETS

SETS_HERE = [name for name, code in INSTRUCTION_SETS.items() if 0 < code <= INSTRUCTION_SETS[native.instruction_set()]]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def test_limits_of_gates() -> None:
    """tanh and silu of what is tiny, large, infinite or not a number."""
    gate = torch.tensor([[0.0, -0.0, 1e-30, 0.6, -0.6, 9.0, -50.0, torch.inf, -torch.inf, torch.nan]])
    x = torch.ones(1, 2, 10)
    extreme = torch.tensor([[-torch.inf, -1e30, -100.0, 0.0, 100.0, 1e30, torch.nan]])
    for name in SETS_HERE:
        with use(f"native:{name}"):
            y = gated_residual(torch.zeros_like(x), x, gate)
            silu = swiglu(extreme, torch.ones(1, 7))
        torch.testing.assert_close(y, gate.tanh().expand(2, 10).unsqueeze(0), equal_nan=True, rtol=3e-7, atol=0)
        torch.testing.assert_close(silu, ops.swiglu.reference(extreme, torch.ones(1, 7)), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_loses_no_nan(dtype: torch.dtype) -> None:
    """A masked row gives 0; a row of NaN scores gives NaN, masked keys beside it or not, and only that row."""
    query, key, value = draw(1, 1, 5, 16), draw(1, 1, 20, 16), draw(1, 1, 20, 16)
    query[0, 0, 2] = torch.nan
    mask = torch.ones(5, 20, dtype=torch.bool)
    mask[:, 18:] = False
    mask[4] = False
    for name in SETS_HERE:
        for given in (None, mask, torch.zeros(5, 20).masked_fill(~mask, -torch.inf)):
            with use(f"native:{name}"):
                y = attention(query.to(dtype), key.to(dtype), value.to(dtype), given)
            assert y[0, 0, 2].isnan().all() and y[0, 0, [0, 1, 3]].isfinite().all()
            assert given is None or not y[0, 0, 4].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_huge_scales(dtype: torch.dtype) -> None:
    """All weight is on the largest score, however large it is."""
    query, key, value = (draw(1, 2, 300, 32, seed=seed).to(dtype).requires_grad_() for seed in range(3))
    most = (query.double() @ key.double().mT).argmax(-1)
    expected = value.gather(2, most.unsqueeze(-1).expand(1, 2, 300, 32))
    for name in SETS_HERE:
        for scale in (1e9, 1e30):
            with use(f"native:{name}"):
                y = attention(query, key, value, scale=scale)
                gradients = torch.autograd.grad(y.sum(), (query, key, value))
            torch.testing.assert_close(y, expected)
            assert all(gradient.isfinite().all() for gradient in gradients)


def test_attention_log_sum_exp() -> None:
    query, key, value = draw(2, 2, 3, 8), draw(2, 2, 9, 8), draw(2, 2, 9, 8)
    mask = torch.arange(9) < torch.tensor([5, 0]).view(2, 1, 1, 1)
    log_sum = torch.ops.blip3o.attention(query, key, value, mask, None, None, False, -1, -1, 0.0, 0.5, "native")[1]
    expected = (query @ key.mT * 0.5).masked_fill(~mask, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(log_sum, expected)
    ends = torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([0, 9, 9], dtype=torch.int32)
    packed = query[:1], key[:1], value[:1], None, *ends
    log_sum = torch.ops.blip3o.attention(*packed, False, 2, 1, 3.0, 0.5, "native")[1]
    scores = torch.tanh(query[:1] @ key[:1].mT * 0.5 / 3.0) * 3.0
    seen = torch.zeros(3, 9, dtype=torch.bool)
    seen[0, 5:9] = seen[1, 6:9] = True
    torch.testing.assert_close(log_sum, scores.masked_fill(~seen, -torch.inf).logsumexp(-1))


def test_attention_both_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short and long sequences take two paths through the reference: both mean the same; causal is bottom-right."""
    generator = torch.Generator().manual_seed(0)
    for tokens, keys, causal, masked, window in (
        (6, 6, True, False, (-1, -1)),
        (3, 7, True, False, (-1, -1)),
        (7, 3, True, True, (-1, -1)),
        (5, 6, False, True, (-1, -1)),
        (5, 9, False, False, (2, 1)),
        (9, 5, False, True, (1, -1)),
        (6, 6, True, False, (2, 3)),
    ):
        query = torch.randn(2, 4, tokens, 8, generator=generator, dtype=torch.float64)
        key, value = torch.randn(2, 2, 2, keys, 8, generator=generator, dtype=torch.float64).unbind(0)
        mask = torch.rand(2, 1, tokens, keys, generator=generator) < 0.4 if masked else None
        arguments = (query, key, value, mask, 0.0, causal, None, True)
        short = ops.attention.reference(*arguments, window_size=window)
        with monkeypatch.context() as patched:
            patched.setattr(ops.attention, "LONG", 0)
            long = ops.attention.reference(*arguments, window_size=window)
        torch.testing.assert_close(short, long)
        allowed = torch.ones(tokens, keys, dtype=torch.bool)
        for t in range(tokens):
            for s in range(keys):
                distance = s - (t + keys - tokens)
                right = 0 if causal else window[1]
                allowed[t, s] = not (0 <= right < distance or (window[0] >= 0 and distance < -window[0]))
        allowed = (allowed & (mask if mask is not None else True)).expand(2, 4, tokens, keys)
        scores = torch.einsum("bhtk,bhsk->bhts", query, key.repeat_interleave(2, 1)) / 8**0.5
        weights = scores.exp() * allowed
        plain = weights @ value.repeat_interleave(2, 1) / weights.sum(-1, keepdim=True).clamp(min=1e-300)
        torch.testing.assert_close(short, plain)


def test_attention_packed_is_each_sequence_alone() -> None:
    lengths = (3, 5), (0, 2), (6, 1), (4, 4)
    query = torch.randn(1, 4, sum(q for q, _ in lengths), 8)
    key, value = torch.randn(2, 1, 2, sum(k for _, k in lengths), 8).unbind(0)
    ends_q, ends_k = (torch.tensor([0, *x]).cumsum(0).to(torch.int32) for x in zip(*lengths, strict=True))
    for options in ({}, {"is_causal": True}, {"window_size": (2, 1), "softcap": 1.0}):
        for backend in ("reference", "native"):
            with use(backend):
                packed = attention(
                    query, key, value, enable_gqa=True, cu_seqlens_q=ends_q, cu_seqlens_k=ends_k, **options
                )
                alone = [
                    attention(q, k, v, enable_gqa=True, **options)
                    for q, k, v in zip(
                        query.split([q for q, _ in lengths], 2),
                        key.split([k for _, k in lengths], 2),
                        value.split([k for _, k in lengths], 2),
                        strict=True,
                    )
                ]
            torch.testing.assert_close(packed, torch.cat(alone, 2))


def test_sinusoids_are_exact_up_to_rounding() -> None:
    """At integer timesteps too, and where angles in float32 would be wrong by far more."""
    steps = torch.tensor([0, 1, 2, 3, 500, 999, 1000, 77777, -100000])
    truth = ops.timestep_embedding.reference(steps.double(), 70)
    for name in ("native:portable", "native:avx2", "native"):
        for dtype in (torch.int64, torch.int32, torch.float32):
            with use(name):
                got = timestep_embedding(steps.to(dtype), 70)
            assert got.dtype == torch.float32 and (got - truth).abs().max() < 1.01 * 2**-25


def test_rope_tables() -> None:
    """Rotation keeps lengths, and a product of two rotated vectors depends on the distance alone."""
    cos, sin = rope_table_2d(3, 5, 8, 100.0)
    assert cos.shape == (15, 4)
    torch.testing.assert_close(cos.square() + sin.square(), torch.ones(15, 4))
    vectors = torch.randn(2, 1, 1, 8, generator=torch.Generator().manual_seed(0)).expand(2, 1, 15, 8)
    turned = ops.rope.reference(vectors, cos, sin, interleaved=True)
    torch.testing.assert_close(turned.norm(dim=-1), vectors.norm(dim=-1))
    products = (turned[0, 0] @ turned[1, 0].t()).view(3, 5, 3, 5)
    torch.testing.assert_close(products[0, 1, 2, 2], products[0, 3, 2, 4])
    # angles h0, w0, h1, w1: position (1, 0) turns the even angles alone
    assert (sin[5] != 0).tolist() == [True, False, True, False]


def test_a_rope_table_is_one_op_of_a_compiled_graph() -> None:
    """Not a formula, which Inductor would put into every use of the table."""
    called: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    def table(start: int) -> tuple[Tensor, Tensor]:
        return rope_table(torch.arange(start, start + 5), 8, 100.0)

    def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
        return rope_table(positions, 8, 100.0)

    compiled = torch.compile(table, backend=backend, fullgraph=True, dynamic=True)
    for start in (3, 40):
        for found, expected in zip(compiled(start), table(start), strict=True):
            assert torch.equal(found, expected)
    assert sum("rope_table" in name for name in called) == 1 and not any("sin" in name for name in called)
    positions = torch.arange(10).view(2, 5)
    for given in (positions, positions.t(), positions[:1].expand(3, 5)):
        torch.library.opcheck(torch.ops.blip3o.rope_table.default, (given, 8, 100.0))
    learned = torch.arange(3.0, requires_grad=True)
    gradients = [
        torch.autograd.grad(f(learned)[0].sum(), learned)[0] for f in (angles, torch.compile(angles, backend="eager"))
    ]
    assert torch.equal(*gradients) and gradients[0].any()


def test_add_rms_norm_is_the_sum_and_the_norm() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, residual, weight = (draw(3, 5, 48, seed=seed).to(dtype) for seed in range(3))
        y, added = add_rms_norm(x, residual, weight[0, 0])
        assert torch.equal(added, residual + x)
        torch.testing.assert_close(y, rms_norm(residual + x, weight[0, 0]))


def test_qk_norm_rope_serves_the_networks() -> None:
    """As the diffusion transformer does it, with 2-D positions; queries alone, without keys, too."""
    fused = draw(2, 12, 3 * 48)
    query, key, _ = fused.split(48, dim=-1)
    weight, bias = draw(48), draw(48, seed=1)
    table = rope_table_2d(3, 4, 16, 100.0)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (3, 16)).transpose(1, 2)

    options = {"eps": 1e-5, "norm": "layer", "across": "width", "interleaved": True}
    got = qk_norm_rope(heads(query), heads(key), weight, weight, *table, query_bias=bias, key_bias=bias, **options)
    expected = [rope(heads(layer_norm(x, weight, bias, 1e-5)), *table, interleaved=True) for x in (query, key)]
    torch.testing.assert_close(list(got), expected)
    alone, none = qk_norm_rope(heads(query), heads(key)[:, :0], weight, weight[:0], *table, query_bias=bias, **options)
    assert torch.equal(alone, got[0]) and none.shape == (2, 0, 12, 16)
