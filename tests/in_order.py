"""Matrix products whose terms are summed one after another, as the registers of a kernel sum them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class InOrder(TorchDispatchMode):
    """Inside it torch's products of float32 matrices are such. How a machine's library sums, and so how exact its
    products are, differs from chip to chip; this does not."""

    def __torch_dispatch__(
        self, function: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default) and args[0].dtype is torch.float32:
            return _product(*args)
        return function(*args, **kwargs or {})


def _product(a: Tensor, b: Tensor) -> Tensor:
    total = torch.zeros(*a.shape[:-1], b.shape[-1], device=a.device)
    for i in range(a.shape[-1]):
        total.addcmul_(a[..., i : i + 1], b[..., i : i + 1, :])
    return total
