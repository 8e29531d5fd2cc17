"""modulate, gated_residual and layer_norm as torch sees them: threads, views, registration, compilation, transforms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from blip3o_kernels import gated_residual, layer_norm, modulate, strides, use


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def calls(batch: int, tokens: int, width: int) -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Each op with everything it takes: the function of its differentiable inputs, and those."""
    x, residual = draw(batch, tokens, width), draw(batch, tokens, width, seed=1)
    scale, shift, gate = draw(batch, 3 * width).chunk(3, dim=-1)
    weight, bias = draw(width), draw(width, seed=1)
    return {
        "modulate rms": (lambda x, s, h, w: modulate(x, s, h, weight=w), (x, scale, shift, weight)),
        "modulate layer": (
            lambda x, s, h, w, b: modulate(x, s, h, weight=w, bias=b, norm="layer"),
            (x, scale, shift, weight, bias),
        ),
        "gated_residual": (lambda r, x, g, w: gated_residual(r, x, g, weight=w), (residual, x, gate, weight)),
        "layer_norm": (layer_norm, (x, weight, bias)),
    }


NAMES = list(calls(1, 1, 1))


def leaves(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().requires_grad_() for tensor in tensors)


@pytest.mark.parametrize("name", NAMES)
def test_threads_do_not_change_a_bit(name: str) -> None:
    function, inputs = calls(70, 9, 130)[name]
    dy = draw(70, 9, 130, seed=2)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            given = leaves(inputs)
            with use("native"):
                y = function(*given)
            results.append((y.detach(), *torch.autograd.grad(y, given, dy)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(first, second) for first, second in zip(results[0], other, strict=True))


def test_opcheck() -> None:
    """Schema, fake implementation and autograd registration, as torch itself tests them."""
    x, scale, shift, weight, bias, residual = leaves(
        (draw(3, 5, 24), draw(3, 24), draw(3, 24), draw(24), draw(24), draw(3, 5, 24))
    )
    ops = torch.ops.blip3o
    for centred in (False, True):
        given = (bias,) if centred else (None,)
        torch.library.opcheck(ops.modulate.default, (x, scale, shift, weight, *given, 1e-6, centred, "native"))
        torch.library.opcheck(ops.modulate.default, (x, scale, None, None, None, 1e-6, centred, "native"))
    torch.library.opcheck(ops.gated_residual.default, (residual, x, scale, weight, 1e-5, "native"))
    torch.library.opcheck(ops.gated_residual.default, (residual, x, scale, None, 1e-5, "native"))
    torch.library.opcheck(ops.layer_norm.default, (x, weight, bias, 1e-5, "native"))
    torch.library.opcheck(ops.layer_norm.default, (x, None, None, 1e-5, "native"))
    x, scale, weight, bias = (tensor.detach() for tensor in (x, scale, weight, bias))
    saved = ops.modulate(x, scale, None, weight, bias, 1e-6, True, "native")[1]
    torch.library.opcheck(ops.modulate_backward.default, (x, x, scale, weight, bias, saved, False, True, "native"))
    saved = ops.gated_residual(x, x, scale, weight, 1e-5, "native")[1]
    torch.library.opcheck(ops.gated_residual_backward.default, (x, x, scale, weight, saved, "native"))
    saved = ops.layer_norm(x, weight, bias, 1e-5, "native")[1]
    torch.library.opcheck(ops.layer_norm_backward.default, (x, x, weight, bias, saved, "native"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("forced", [True, False])
def test_compile(name: str, forced: bool) -> None:
    """No graph break, forward and backward, in a changing shape."""
    torch._dynamo.reset()
    function = calls(2, 3, 16)[name][0]
    compiled = torch.compile(lambda x, *rest: function(x * 2, *rest).sin(), fullgraph=True, backend="aot_eager")
    for batch in (2, 4, 5):
        given = leaves(calls(batch, 3, 16)[name][1])
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
    function, inputs = calls(2, 3, 16)[name]
    expected = function(*inputs)
    repeated = tuple(torch.stack((tensor, tensor)) for tensor in inputs)
    torch.testing.assert_close(torch.vmap(function)(*repeated), torch.stack((expected, expected)))
    with torch._subclasses.FakeTensorMode() as mode:
        fake = function(*(mode.from_tensor(tensor) for tensor in inputs))
    assert isinstance(fake, torch._subclasses.FakeTensor) and fake.shape == expected.shape
    for i, tensor in enumerate(inputs):  # values behind a lazy negation
        negated = (*inputs[:i], torch._neg_view(-tensor), *inputs[i + 1 :])
        torch.testing.assert_close(function(*negated), expected)


@pytest.mark.parametrize("name", NAMES)
def test_double_differentiation_raises(name: str) -> None:
    function, inputs = calls(2, 3, 16)[name]
    for loss in (torch.sum, lambda y: y.sin().sum()):  # what comes in from above: a constant, a function of the inputs
        given = leaves(inputs)
        with use("native"):
            y = function(*given)
        (gradient,) = torch.autograd.grad(loss(y), given[1], create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate"):
            gradient.sum().backward()


def test_only_the_gradients_asked_for() -> None:
    for function, inputs in calls(2, 3, 16).values():
        every = leaves(inputs)
        gradients = torch.autograd.grad(function(*every).sum(), every)
        for i, gradient in enumerate(gradients):
            alone = [tensor.detach() for tensor in inputs]
            alone[i].requires_grad_()
            (got,) = torch.autograd.grad(function(*alone).sum(), alone[i])
            assert torch.equal(got, gradient)


def test_the_residual_gets_the_gradient_itself() -> None:
    residual, x, gate = leaves((draw(2, 3, 8), draw(2, 3, 8), draw(2, 8)))
    dy = draw(2, 3, 8, seed=3)
    (gradient,) = torch.autograd.grad(gated_residual(residual, x, gate), residual, dy)
    assert gradient.data_ptr() == dy.data_ptr()


def test_views_are_not_copied() -> None:
    fused = draw(2, 3, 40)
    for part in (fused, *fused.split([8, 24, 8], dim=-1), fused[:, :, 3:9], fused[0], fused[:1, 1:]):
        same, stride = strides.rows(part)
        assert same is part
        assert stride == 40
    for part in (fused.transpose(0, 1), fused[:, :2], fused[..., ::2], fused[:, :, :1].expand(2, 3, 4)):
        copied, stride = strides.rows(part)
        assert copied.is_contiguous() and torch.equal(copied, part) and stride == part.shape[-1]
    condition = draw(3, 40).chunk(4, dim=-1)[2]
    assert strides.conditions(condition) == (condition, 40)


def test_special_values() -> None:
    """NaN and infinity in a gate: tanh knows its limits, and one sample does not touch another."""
    gate = torch.tensor([[0.0, -0.0, 1e-30, 0.6, -0.6, 9.0, -50.0, float("inf"), -float("inf"), float("nan")]])
    x = torch.ones(1, 2, 10)
    for name in ("portable", "avx2", "avx512"):
        with use(f"native:{name}"):
            y = gated_residual(torch.zeros_like(x), x, gate)
        torch.testing.assert_close(y, gate.tanh().expand(2, 10).unsqueeze(0), equal_nan=True, rtol=3e-7, atol=0)
    x = draw(3, 4, 24)
    broken = x.clone()
    broken[1, 2, 5] = float("nan")
    scale = draw(3, 24)
    for norm in ("rms", "layer"):
        good, bad = modulate(x, scale, norm=norm), modulate(broken, scale, norm=norm)
        assert bad[1, 2].isnan().all()
        bad[1, 2] = good[1, 2]
        assert torch.equal(bad, good)
