"""How far a patched model may be from the stock one: both are held against the stock model in float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def close(y: Tensor, expected: Tensor) -> None:
    """float32 results of two orders of summation."""
    torch.testing.assert_close(y, expected, atol=2e-5 * float(expected.detach().abs().max()), rtol=0)


def bound(y: Tensor, stock: Tensor, truth: Tensor, name: str = "", factor: float = 2.0) -> None:
    """As far from float64 as the stock model, `factor` times at most, and two units in the last place."""
    last_place = float(truth.detach().abs().max()) * torch.finfo(stock.dtype).eps
    error, stocks = ((x.double() - truth).abs().max().item() for x in (y, stock))
    assert error <= factor * stocks + 2 * last_place, f"{name}: {error:.3g}, stock {stocks:.3g}"


def bound_gradients(found: Mapping[str, Tensor], stock: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> None:
    """All together their root mean square error is at most twice the stock model's, each measured by its largest value.

    Of one parameter alone, of few numbers, both errors are a matter of luck, so that bound is wide.
    """
    assert found.keys() == stock.keys() == truth.keys() and found
    ours = stocks = 0.0
    for name, exact in truth.items():
        bound(found[name], stock[name], exact, name, 8.0)
        largest = exact.abs().max()
        if largest:
            ours += float(((found[name].double() - exact) / largest).square().mean())
            stocks += float(((stock[name].double() - exact) / largest).square().mean())
    assert ours <= 4 * stocks, f"gradients: {ours**0.5:.3g}, stock {stocks**0.5:.3g}"
