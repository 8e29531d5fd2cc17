"""add_rms_norm and qk_norm_rope, the ops with two results, as torch sees them: threads, absent gradients, layout,
registration, compilation, transforms, and the networks' own way to the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from blip3o_kernels import add_rms_norm, layer_norm, qk_norm_rope, rms_norm, rope, rope_table, rope_table_2d, use


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def calls(batch: int, tokens: int) -> dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], tuple[Tensor, ...]]]:
    """Each op: the function of its differentiable inputs, and those."""
    x, residual = draw(batch, tokens, 40), draw(batch, tokens, 40, seed=1)
    query, key, _ = draw(batch, tokens, 8, 12).transpose(1, 2).split([4, 2, 2], dim=1)
    table = rope_table(torch.arange(tokens), 12, 100.0)

    def layer(q: Tensor, k: Tensor, qw: Tensor, kw: Tensor, qb: Tensor, kb: Tensor) -> tuple[Tensor, Tensor]:
        biases = {"query_bias": qb, "key_bias": kb}
        return qk_norm_rope(q, k, qw, kw, *table, **biases, norm="layer", across="width", interleaved=True)

    return {
        "add_rms_norm": (add_rms_norm, (x, residual, draw(40))),
        "qk_norm_rope head": (lambda *given: qk_norm_rope(*given, *table), (query, key, draw(12), draw(12, seed=1))),
        "qk_norm_rope width": (layer, (query, key, draw(48), draw(24), draw(48, seed=1), draw(24, seed=1))),
    }


NAMES = list(calls(1, 1))


def leaves(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().requires_grad_() for tensor in tensors)


@pytest.mark.parametrize("name", NAMES)
def test_threads_do_not_change_a_bit(name: str) -> None:
    function, inputs = calls(20, 37)[name]
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            given = leaves(inputs)
            with use("native"):
                outputs = function(*given)
            upstream = [draw(*y.shape, seed=2) for y in outputs]
            results.append((*(y.detach() for y in outputs), *torch.autograd.grad(outputs, given, upstream)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(first, second) for first, second in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("used", [0, 1])
def test_a_result_that_nobody_uses(name: str, used: int) -> None:
    function, inputs = calls(2, 3)[name]
    gradients = []
    for backend in ("native", "reference"):
        given = leaves(inputs)
        with use(backend):
            y = function(*given)[used]
        gradients.append(torch.autograd.grad(y, given, draw(*y.shape), allow_unused=True))
    for mine, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if expected is None else expected)


def test_add_rms_norm_is_the_sum_and_the_norm() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, residual, weight = (draw(3, 5, 48, seed=seed).to(dtype) for seed in range(3))
        y, added = add_rms_norm(x, residual, weight[0, 0])
        assert torch.equal(added, residual + x)
        torch.testing.assert_close(y, rms_norm(residual + x, weight[0, 0]))


def test_layouts_make_the_next_view_free() -> None:
    """Parts of one fused projection go in; both results and both gradients are dense as [B, T, H, K]."""
    for name in NAMES[1:]:
        function, inputs = calls(2, 7)[name]
        given = leaves(inputs)
        with use("native"):
            outputs = function(*given)
        gradients = torch.autograd.grad([y.sum() for y in outputs], given[:2])
        assert all(t.transpose(1, 2).is_contiguous() for t in (*outputs, *gradients))


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


def test_opcheck() -> None:
    """Schema, fake implementation and autograd registration, as torch itself tests them."""
    known = torch.ops.blip3o
    x, residual, weight = leaves((draw(3, 5, 24), draw(3, 5, 24, seed=1), draw(24)))
    options = (1e-6, 0.5, True, "native")
    torch.library.opcheck(known.add_rms_norm.default, (x, residual, weight, *options))
    torch.library.opcheck(known.add_rms_norm.default, (x, residual, None, *options))
    x, weight = x.detach(), weight.detach()
    torch.library.opcheck(known.add_rms_norm_backward.default, (x, None, x, weight, True, *options))
    inputs = calls(2, 3)["qk_norm_rope width"][1]
    table = rope_table(torch.arange(3), 8, 100.0)
    for wide in (False, True):
        given = inputs if wide else (*inputs[:2], *(t[:12] for t in inputs[2:4]), None, None)
        torch.library.opcheck(
            known.qk_norm_rope.default, (*leaves(given[:4]), *given[4:], *table, 1e-5, True, wide, False, "native")
        )
        torch.library.opcheck(
            known.qk_norm_rope_backward.default,
            (*inputs[:2], *given, *table, True, 1e-5, True, wide, False, "native"),
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("forced", [True, False])
def test_compile(name: str, forced: bool) -> None:
    """No graph break, forward and backward, in a changing shape."""
    torch._dynamo.reset()
    function = calls(2, 3)[name][0]

    def total(x: Tensor, *rest: Tensor) -> Tensor:
        first, second = function(x * 2, *rest)
        return first.sin().sum() + second.cos().sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    for batch in (2, 1):
        given = leaves(tuple(t[:batch] if t.dim() > 1 else t for t in calls(2, 3)[name][1]))
        expected = total(*given)
        if forced:
            with use("native"):
                got = compiled(*given)
        else:
            got = compiled(*given)
        torch.testing.assert_close(got, expected)
        for mine, eager in zip(torch.autograd.grad(got, given), torch.autograd.grad(expected, given), strict=True):
            torch.testing.assert_close(mine, eager)


@pytest.mark.parametrize("name", NAMES)
def test_transforms_and_modes(name: str) -> None:
    function, inputs = calls(2, 3)[name]
    expected = function(*inputs)
    repeated = tuple(torch.stack((tensor, 2 * tensor)) for tensor in inputs)
    doubled = function(*(2 * tensor for tensor in inputs))
    for got, first, second in zip(torch.vmap(function)(*repeated), expected, doubled, strict=True):
        torch.testing.assert_close(got, torch.stack((first, second)))
    for i, tensor in enumerate(inputs):  # values behind a lazy negation
        negated = (*inputs[:i], torch._neg_view(-tensor), *inputs[i + 1 :])
        torch.testing.assert_close(function(*negated), expected)


def test_vmap_of_add_rms_norm() -> None:
    x, residual, weight = draw(2, 3, 8), draw(3, 8), draw(2, 8)
    with use("native"):
        for dims, w in (((0, None, None), weight[0]), ((0, None, 0), weight)):
            y, added = torch.vmap(add_rms_norm, in_dims=dims)(x, residual, w)
            for i in range(2):
                one = add_rms_norm(x[i], residual, weight[i] if dims[2] == 0 else w)
                torch.testing.assert_close((y[i], added[i]), one)


@pytest.mark.parametrize("name", NAMES)
def test_double_differentiation_raises(name: str) -> None:
    function, inputs = calls(2, 3)[name]
    for loss in (torch.sum, lambda y: y.sin().sum()):
        given = leaves(inputs)
        with use("native"):
            y = function(*given)[0]
        (gradient,) = torch.autograd.grad(loss(y), given[0], create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate"):
            gradient.sum().backward()


def test_errors_name_the_argument() -> None:
    x = draw(2, 3, 8)
    with pytest.raises(ValueError, match=r"residual: expected the shape of x, \[2, 3, 8\], got \[3, 8\]"):
        add_rms_norm(x, x[0])
    with pytest.raises(ValueError, match=r"weight: expected shape \[8\], got \[7\]"):
        add_rms_norm(x, x, draw(7))
    query, key = draw(2, 4, 3, 8), draw(2, 2, 3, 8)
    table = rope_table(torch.arange(3), 8, 100.0)
    with pytest.raises(ValueError, match=r"key: expected shape \[2, G, 3, 8\], got \[2, 2, 2, 8\]"):
        qk_norm_rope(query, key[:, :, :2], draw(8), draw(8), *table)
    with pytest.raises(ValueError, match=r"key_weight: expected shape \[16\], got \[8\]"):
        qk_norm_rope(query, key, draw(32), draw(8), *table, across="width")
    with pytest.raises(ValueError, match="norm: expected 'rms' or 'layer', got 'group'"):
        qk_norm_rope(query, key, draw(8), draw(8), *table, norm="group")
    with pytest.raises(ValueError, match=r"cos: expected shape \[3, R/2\] or \[2, 3, R/2\]"):
        qk_norm_rope(query, key, draw(8), draw(8), table[0][:2], table[1][:2])
