"""The inputs that tests and benchmarks use: deterministic, the same values in every dtype up to rounding."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One call of an op: `function(*args, **kwargs)`."""

    name: str
    args: tuple[object, ...]
    kwargs: dict[str, object] = field(default_factory=dict)


class Draw:
    """Draws standard normals from one seeded stream and rounds them to a dtype: `Draw(dtype, device)(2, 3)`."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float32) * scale
        return drawn.to(device=self.device, dtype=self.dtype if dtype is None else dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator).to(self.device)

    def uniform(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.rand(shape, generator=self.generator, dtype=torch.float32)
        return drawn.to(device=self.device, dtype=self.dtype if dtype is None else dtype)
