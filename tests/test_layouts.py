"""Where results lie in memory: what makes the next view free, and what is not copied."""

from __future__ import annotations

import torch
from torch import Tensor

from blip3o_kernels import attention, gated_residual, qk_norm_rope, rope, rope_table, strides, use


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().requires_grad_() for tensor in tensors)


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


def test_the_residual_gets_the_gradient_itself() -> None:
    residual, x, gate = leaves(draw(2, 3, 8), draw(2, 3, 8), draw(2, 8))
    dy = draw(2, 3, 8, seed=3)
    (gradient,) = torch.autograd.grad(gated_residual(residual, x, gate), residual, dy)
    assert gradient.data_ptr() == dy.data_ptr()


def test_rope_keeps_the_order_of_memory() -> None:
    x = draw(2, 7, 6, 16).transpose(1, 2)  # [B, H, T, K]
    table = rope_table(torch.arange(7), 16, 100.0)
    for part in (x, x[:, :4], x.contiguous()):
        assert rope(part, *table).stride() == torch.empty_like(part).stride()


def test_heads_are_dense_behind_tokens() -> None:
    """Parts of one fused projection go in; results and gradients of attention and qk_norm_rope lie as [B, T, H, K]."""
    query, key, value = leaves(*draw(2, 7, 6, 16).transpose(1, 2).split([2, 2, 2], dim=1))
    table = rope_table(torch.arange(7), 16, 100.0)
    with use("native"):
        y = attention(query, key, value)
        gradients = torch.autograd.grad(y.sum(), (query, key, value))
        assert all(t.transpose(1, 2).is_contiguous() for t in (y, *gradients))
        for across, width in (("head", 16), ("width", 32)):
            outputs = qk_norm_rope(query, key, draw(width), draw(width), *table, across=across)
            gradients = torch.autograd.grad([y.sum() for y in outputs], (query, key))
            assert all(t.transpose(1, 2).is_contiguous() for t in (*outputs, *gradients))
