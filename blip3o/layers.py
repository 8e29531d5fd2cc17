"""What the networks share: the kernels' functions under one roof, and two modules that hold a norm's weights.

The networks import their operations from here and from nowhere else, so this file is the whole seam between model and
kernels. Functions are shared, blocks are not: CLIP, the language model and the diffusion transformer look alike and
stay separate.

Shapes: D the width of a token; [..., D] any leading dimensions.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F

from blip3o_kernels import (
    attention,
    gated_residual,
    layer_norm,
    linear_cross_entropy,
    modulate,
    qk_norm_rope,
    rms_norm,
    rope,
    rope_table,
    rope_table_2d,
    rope_table_multimodal,
    swiglu,
    timestep_embedding,
)
from blip3o_kernels.dispatch import transformed

__all__ = [
    "LayerNorm",
    "RMSNorm",
    "attention",
    "gated_residual",
    "grid_rope_table",
    "keep_casts",
    "layer_norm",
    "linear_after",
    "linear_cross_entropy",
    "modulate",
    "patchify",
    "project",
    "qk_norm_rope",
    "rms_norm",
    "rope",
    "rope_table",
    "rope_table_multimodal",
    "swiglu",
    "text_rope_table",
    "timestep_embedding",
    "unpatchify",
]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; x [..., D] -> [..., D]."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def before(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """linear(norm(x)); see `linear_after`."""
        return linear_after(linear, self._normalise, x, self.weight)

    def _normalise(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean(x)) / std(x) * weight + bias over the last dimension; x [..., D] -> [..., D]."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


_AMX = torch.cpu._is_amx_tile_supported()
_BFLOAT16_DOTS = torch.cpu._is_avx512_bf16_supported() and not _AMX


_onednn = RLock()


def _without_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear by torch's own code: oneDNN's switch is the process's, so one thread at a time.

    What other threads multiply meanwhile goes without it, too. Who else turns the switch meanwhile may find it turned
    back.
    """
    with _onednn:
        enabled = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        try:
            return F.linear(x, weight, bias)
        finally:
            torch._C._set_mkldnn_enabled(enabled)


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear; a single row without gradients in the way that the chip's memory is read fastest.

    On a Xeon with AMX as the product of a matrix and a vector: half the time of a product of matrices, in bfloat16 a
    quarter where the weights are in the cache. On an EPYC with instructions for bfloat16 products, but no AMX, in
    bfloat16 by torch's own code, which reads at the rate of the memory; oneDNN's takes 1.1 to 2.5 times as long. In
    float32 both ways take the same time there.
    """
    if torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled("cpu" if weight.is_cpu else weight.device.type):
        return F.linear(x, weight if weight.requires_grad or _casts.get() is None else _cast(weight), bias)
    chosen = _AMX or (_BFLOAT16_DOTS and x.dtype is torch.bfloat16)
    row = chosen and x.numel() == x.shape[-1] and x.is_cpu and weight.dtype is x.dtype
    if not row or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    if not _AMX:
        return _without_onednn(x, weight, bias)
    vector = x.view(-1)
    y = torch.mv(weight, vector) if bias is None else torch.addmv(bias, weight, vector)
    return y.view(*x.shape[:-1], -1)


# Of frozen weights, while `keep_casts` is on; each thread its own, as one may end while another trains.
_casts: ContextVar[dict[Tensor, Tensor] | None] = ContextVar("casts", default=None)


@contextmanager
def keep_casts() -> Iterator[dict[Tensor, Tensor]]:
    """Until its end, a frozen weight is cast to autocast's dtype once; none may change meanwhile. For a training loop.
    Yields the casts, by weight.

    Autocast itself keeps the casts of weights that learn, for a step, but writes a frozen one anew at every use: the
    frozen language model's twice at every step of the generation stage.
    """
    casts: dict[Tensor, Tensor] = {}
    token = _casts.set(casts)
    try:
        yield casts
    finally:
        _casts.reset(token)


def _cast(weight: Tensor) -> Tensor:
    """The weight in autocast's dtype."""
    dtype, casts = torch.get_autocast_dtype(weight.device.type), _casts.get()
    if casts is None or weight.requires_grad or weight.dtype is dtype or transformed():
        return weight.to(dtype)
    if weight not in casts:
        with torch.inference_mode(False):  # so that training may save it
            casts[weight] = weight.detach().to(dtype)
    return casts[weight]


def linear_after(linear: nn.Linear, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """linear(function(*inputs)), keeping the inputs for the backward pass and not what the function makes of them.

    For a norm or an activation: computing it once more costs little beside the product, and its result is as large as
    the product's other operands. The function must have no product of its own.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed():
        return project(function(*inputs), linear.weight, linear.bias)
    result: Tensor = _LinearAfter.apply(function, linear.weight, linear.bias, *inputs)
    return result


class _LinearAfter(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, function: Callable[..., Tensor], weight: Tensor, bias: Tensor | None, *inputs: Tensor
    ) -> Tensor:
        x, kind = function(*inputs), weight.device.type
        if torch.is_autocast_enabled(kind):
            weight = _cast(weight)
            x, bias = x.to(weight.dtype), None if bias is None else bias.to(weight.dtype)
        context.save_for_backward(weight, *inputs)
        context.function = function
        with torch.autocast(kind, enabled=False):
            return F.linear(x, weight, bias)

    @staticmethod
    def backward(context: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph; under a sum torch's once_differentiable would not notice
            raise RuntimeError("linear_after: its gradient cannot be differentiated")
        weight, *inputs = context.saved_tensors
        _, weight_wanted, bias_wanted, *wanted = context.needs_input_grad
        leaves = [x.detach().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
        learning = [x for x in leaves if x.requires_grad]
        with torch.enable_grad():
            x = context.function(*leaves)
        dy = dy.flatten(0, -2)
        dweight = dy.t() @ x.detach().flatten(0, -2).to(dy.dtype) if weight_wanted else None
        dbias = dy.sum(0) if bias_wanted else None
        found: list[Tensor | None] = [None] * len(leaves)
        if learning:
            shape, dtype, edge = x.shape, x.dtype, get_gradient_edge(x)
            del x  # before its gradient is made
            given = iter(torch.autograd.grad((edge,), learning, ((dy @ weight).view(shape).to(dtype),)))
            found = [next(given) if leaf.requires_grad else None for leaf in leaves]
        return None, dweight, dbias, *found


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """images [B, C, S, S] -> [B, N, C P^2]: square patches, row by row, each as (channel, row, column).

    A linear layer on these is a convolution whose kernel equals its stride.
    """
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    patches = images.view(batch, channels, rows, patch_size, columns, patch_size).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, rows * columns, channels * patch_size**2)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """The inverse of `patchify`: patches [B, N, C P^2] of a square -> images [B, C, S, S], S = P sqrt(N)."""
    batch, count, values = patches.shape
    grid, channels = math.isqrt(count), values // patch_size**2
    images = patches.view(batch, grid, grid, channels, patch_size, patch_size).permute(0, 3, 1, 4, 2, 5)
    return images.reshape(batch, channels, grid * patch_size, grid * patch_size)


TABLES = 64  # that are kept, the newest: batches may be of any size
_tables: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}


def _kept(key: tuple[object, ...], make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """What `make` gives, made once for each key: a table costs as much as several ops at decode shapes."""
    if torch.compiler.is_compiling():
        return make()
    if key not in _tables:
        with torch.inference_mode(False):  # so that training may save it
            table = make()
        if type(table[0]) is not Tensor:  # a fake one stands for nothing later
            return table
        if len(_tables) == TABLES:
            del _tables[next(iter(_tables))]
        _tables[key] = table
        return table
    return _tables[key]


def grid_rope_table(
    side: int, head_dim: int, theta: float, device: torch.device, repeats: int = 1
) -> tuple[Tensor, Tensor]:
    """`rope_table_2d` of a square, `repeats` times one below the other: cos, sin [repeats side^2, K/2]."""

    def make() -> tuple[Tensor, Tensor]:
        cos, sin = rope_table_2d(side, side, head_dim, theta, device)
        return cos.repeat(repeats, 1), sin.repeat(repeats, 1)

    return _kept((side, head_dim, theta, device, repeats), make)


def text_rope_table(count: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """`rope_table` of the positions 0, 1, ... up to `count` at least: cos, sin [>= count, K/2]."""
    room = count if torch.compiler.is_compiling() else max(64, 1 << (count - 1).bit_length())
    return _kept(
        (room, head_dim, theta, device), lambda: rope_table(torch.arange(room, device=device), head_dim, theta)
    )
