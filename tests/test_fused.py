"""rope, swiglu and attention as torch sees them: threads, memory layout, registration, compilation, transforms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from blip3o_kernels import BackendError, attention, native, ops, rope, rope_table, swiglu, use


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def calls(batch: int, tokens: int) -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Each op: the function of its differentiable inputs, and those."""
    heads, groups, head_dim = 4, 2, 24
    query, key, value = draw(batch, tokens, 8, head_dim).transpose(1, 2).split([heads, groups, groups], dim=1)
    table = rope_table(torch.arange(tokens), head_dim, 100.0)
    padding = torch.arange(tokens) < 1 + torch.arange(batch).view(-1, 1, 1, 1) % tokens
    bias = draw(1, heads, tokens, tokens)
    ends = torch.tensor([0, tokens // 3, tokens], dtype=torch.int32)
    return {
        "swiglu": (swiglu, (draw(batch, tokens, 18), draw(batch, tokens, 18, seed=1))),
        "swiglu packed": (swiglu, (draw(batch, tokens, 36),)),
        "rope halves": (lambda x: rope(x, *table), (query,)),
        "rope pairs": (lambda x: rope(x, *table, interleaved=True), (query,)),
        "attention causal": (lambda *x: attention(*x, is_causal=True, enable_gqa=True), (query, key, value)),
        "attention padding": (lambda *x: attention(*x, padding[: len(x[0])], enable_gqa=True), (query, key, value)),
        "attention bias": (lambda *x: attention(*x, bias, enable_gqa=True), (query, key, value)),
        "attention window": (
            lambda *x: attention(*x, enable_gqa=True, window_size=(2, 1), softcap=3.0),
            (query, key, value),
        ),
        "attention packed": (
            lambda *x: attention(*x, is_causal=True, enable_gqa=True, cu_seqlens_q=ends),
            (query[:1], key[:1], value[:1]),
        ),
    }


NAMES = list(calls(1, 1))


def leaves(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().requires_grad_() for tensor in tensors)


@pytest.mark.parametrize("name", NAMES)
def test_threads_do_not_change_a_bit(name: str) -> None:
    function, inputs = calls(40, 37)[name]
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            given = leaves(inputs)
            with use("native"):
                y = function(*given)
            results.append((y.detach(), *torch.autograd.grad(y, given, draw(*y.shape, seed=2))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(first, second) for first, second in zip(results[0], other, strict=True))


def test_layouts_make_the_next_view_free() -> None:
    """rope keeps the order of memory, attention writes [B, T, H, V], and the gradients lie as the inputs do."""
    x = draw(2, 7, 6, 16).transpose(1, 2)  # [B, H, T, K]
    table = rope_table(torch.arange(7), 16, 100.0)
    for part in (x, x[:, :4], x.contiguous()):
        assert rope(part, *table).stride() == torch.empty_like(part).stride()
    query, key, value = leaves(tuple(x.split([2, 2, 2], dim=1)))
    y = attention(query, key, value)
    assert y.transpose(1, 2).is_contiguous()
    for gradient in torch.autograd.grad(y.sum(), (query, key, value)):
        assert gradient.transpose(1, 2).is_contiguous()
    packed = draw(3, 5, 32).requires_grad_()
    (gradient,) = torch.autograd.grad(swiglu(packed).sum(), packed)
    gate, up = leaves(tuple(packed.chunk(2, dim=-1)))
    assert torch.equal(gradient, torch.cat(torch.autograd.grad(swiglu(gate, up).sum(), (gate, up)), dim=-1))


def test_not_a_number_is_not_lost() -> None:
    """A masked row gives 0; a row of NaN scores gives NaN, masked keys beside it or not, and only that row."""
    query, key, value = draw(1, 1, 5, 16), draw(1, 1, 20, 16), draw(1, 1, 20, 16)
    query[0, 0, 2] = torch.nan
    mask = torch.ones(5, 20, dtype=torch.bool)
    mask[:, 18:] = False
    mask[4] = False
    for name in ("portable", "avx2", "avx512"):
        for given in (None, mask, torch.zeros(5, 20).masked_fill(~mask, -torch.inf)):
            with use(f"native:{name}"):
                y = attention(query, key, value, given)
            assert y[0, 0, 2].isnan().all() and y[0, 0, [0, 1, 3]].isfinite().all()
            assert given is None or not y[0, 0, 4].any()
        extreme = torch.tensor([[-torch.inf, -1e30, -100.0, 0.0, 100.0, 1e30, torch.nan]])
        with use(f"native:{name}"):
            y = swiglu(extreme, torch.ones(1, 7))
        torch.testing.assert_close(y, ops.swiglu.reference(extreme, torch.ones(1, 7)), equal_nan=True)


def test_log_sum_exp() -> None:
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


def test_opcheck() -> None:
    """Schema, fake implementation and autograd registration, as torch itself tests them."""
    known = torch.ops.blip3o
    gate, up, packed = leaves((draw(3, 5, 24), draw(3, 5, 24), draw(3, 5, 24)))
    torch.library.opcheck(known.swiglu.default, (gate, up, "native"))
    torch.library.opcheck(known.swiglu.default, (packed, None, "native"))
    torch.library.opcheck(known.swiglu_backward.default, (draw(3, 5, 12), packed.detach(), None, "native"))
    x = draw(2, 5, 3, 16).transpose(1, 2)
    table = rope_table(torch.arange(5), 16, 100.0)
    torch.library.opcheck(known.rope.default, (x.detach().requires_grad_(), *table, True, "native"))
    torch.library.opcheck(known.rope_backward.default, (x, *table, False, "native"))
    query, key, value = leaves((draw(2, 4, 5, 8), draw(2, 2, 7, 8), draw(2, 2, 7, 8)))
    options = (True, 3, -1, 2.0, 0.3, "native")
    for mask in (None, torch.ones(2, 1, 1, 7, dtype=torch.bool), draw(5, 7)):
        torch.library.opcheck(known.attention.default, (query, key, value, mask, None, None, *options))
    plain = tuple(tensor.detach() for tensor in (query, key, value))
    y, log_sum = known.attention(*plain, None, None, None, *options)
    torch.library.opcheck(known.attention_backward.default, (y, y, log_sum, *plain, None, None, None, *options))
    packed = leaves(tuple(tensor[:1] for tensor in (query, key, value)))
    ends = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 4, 7], dtype=torch.int32)
    torch.library.opcheck(known.attention.default, (*packed, None, *ends, *options))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("forced", [True, False])
def test_compile(name: str, forced: bool) -> None:
    """No graph break, forward and backward, in a changing shape."""
    torch._dynamo.reset()
    function = calls(2, 3)[name][0]
    compiled = torch.compile(lambda x, *rest: function(x * 2, *rest).sin(), fullgraph=True, backend="aot_eager")
    for batch in (2, 1):
        given = leaves(calls(2, 3)[name][1])
        given = leaves(tuple(tensor[:batch] for tensor in given))
        expected = function(given[0] * 2, *given[1:]).sin()
        if forced:
            with use("native"):
                got = compiled(*given)
        else:
            got = compiled(*given)
        torch.testing.assert_close(got, expected)
        for mine, eager in zip(
            torch.autograd.grad(got.sum(), given), torch.autograd.grad(expected.sum(), given), strict=True
        ):
            torch.testing.assert_close(mine, eager)


@pytest.mark.parametrize("name", NAMES)
def test_transforms_and_modes(name: str) -> None:
    function, inputs = calls(2, 3)[name]
    expected = function(*inputs)
    repeated = tuple(torch.stack((tensor, 2 * tensor)) for tensor in inputs)
    each = torch.stack((expected, function(*(2 * tensor for tensor in inputs))))
    torch.testing.assert_close(torch.vmap(function)(*repeated), each)
    with use("native"):
        torch.testing.assert_close(torch.vmap(function)(*repeated), each)
    first_only = (0, *[None] * (len(inputs) - 1))
    with use("native"):
        got = torch.vmap(function, in_dims=first_only)(repeated[0], *inputs[1:])
    torch.testing.assert_close(got, torch.stack((expected, function(2 * inputs[0], *inputs[1:]))))
    with torch._subclasses.FakeTensorMode() as mode, use("native"):
        fake = torch.ops.blip3o.swiglu(mode.from_tensor(draw(2, 8)), None, "native")
    assert isinstance(fake, torch._subclasses.FakeTensor) and fake.shape == (2, 4)
    for i, tensor in enumerate(inputs):  # values behind a lazy negation
        negated = (*inputs[:i], torch._neg_view(-tensor), *inputs[i + 1 :])
        torch.testing.assert_close(function(*negated), expected)


def test_vmap_over_the_tables() -> None:
    x = draw(2, 3, 5, 8)
    cos, sin = rope_table(torch.stack((torch.arange(5), torch.arange(5) + 7)), 8, 100.0)  # [2, 5, 4]
    expected = torch.stack([rope(x, cos[i], sin[i]) for i in range(2)])
    with use("native"):
        torch.testing.assert_close(torch.vmap(rope, in_dims=(None, 0, 0))(x, cos, sin), expected)
        each = torch.vmap(rope, in_dims=(0, None, None))(x.unsqueeze(1), cos[:1], sin[:1])
    torch.testing.assert_close(each.squeeze(1), expected[0])


@pytest.mark.parametrize("name", NAMES)
def test_double_differentiation_raises(name: str) -> None:
    function, inputs = calls(2, 3)[name]
    given = leaves(inputs)
    with use("native"):
        y = function(*given)
    (gradient,) = torch.autograd.grad(y.sin().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate"):
        gradient.sum().backward()


def test_workspaces_are_checked() -> None:
    pack, call = native.packer("attention"), native.function("cpu", "attention")
    arguments = [0] * 9 + [1, 1, 1, 4, 64, 32, 32, 1, 100] + [0] * 15 + [4, 1, -1, -1, 0.0, 1.0, 0, 0, 0, 1, 0]
    assert call(pack(*arguments)) == 1
    ends = torch.tensor([0, 5, 4], dtype=torch.int32)  # what no CPU check has seen: the library looks again
    x = draw(1, 1, 4, 8)
    with pytest.raises(BackendError, match=r"attention: .*out of range"):
        torch.ops.blip3o.attention(x, x, x, None, ends, ends, False, -1, -1, 0.0, 1.0, "native")
    with use("native"), pytest.raises(BackendError, match=r"attention: .*does not take torch.float64"):
        attention(*(draw(1, 1, 2, 4).double() for _ in range(3)))
