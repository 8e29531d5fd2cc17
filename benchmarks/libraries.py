"""Peers that are packages of their own, called with the arguments of our ops; peers.py lists them, there or not.

Liger Kernel's and flash-attn's functions run on CUDA only. What overwrites its inputs is told not to, or has no call
here: all contestants share their inputs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from torch import Tensor

Function = Callable[..., object]


def _liger(name: str) -> Function:
    """One of liger_kernel's functions; ImportError if its version has none of that name."""
    module = importlib.import_module("liger_kernel.transformers.functional")
    if name not in vars(module):
        raise ImportError(f"this version of liger_kernel has no {name}")
    function: Function = vars(module)[name]
    return function


def liger_rms_norm() -> Function:
    run = _liger("liger_rms_norm")
    return lambda x, weight, eps: run(x, weight, eps, in_place=False)


def liger_add_rms_norm() -> Function:
    run = _liger("liger_fused_add_rms_norm")
    return lambda x, residual, weight, eps: run(x, residual, weight, eps, in_place=False)


def liger_layer_norm() -> Function:
    run = _liger("liger_layer_norm")
    return lambda x, weight, bias, eps: run(x, weight, bias, eps)


def liger_swiglu() -> Function:
    """Halves of one tensor, of which it takes copies: it writes gradients over its inputs."""
    run = _liger("liger_swiglu")
    return lambda gate: run(*gate.chunk(2, dim=-1))


def liger_linear_cross_entropy() -> Function:
    run = _liger("liger_fused_linear_cross_entropy")
    return lambda x, weight, target: run(x, weight, target)


LIGER: dict[str, Callable[[], Function] | str] = {
    "rms_norm": liger_rms_norm,
    "add_rms_norm": liger_add_rms_norm,
    "layer_norm": liger_layer_norm,
    "swiglu": liger_swiglu,
    "linear_cross_entropy": liger_linear_cross_entropy,
    "rope": "turns queries and keys together, in place of its inputs",
}


def flash_attention(module: str) -> Function:
    """flash-attn 2 (module flash_attn) or 3 (flash_attn_interface), whose layout is [B, T, H, K]."""
    run = importlib.import_module(module).flash_attn_func

    def attend(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, enable_gqa: bool = False) -> Tensor:
        y = run(*(x.transpose(1, 2) for x in (query, key, value)), causal=is_causal)
        return (y[0] if isinstance(y, tuple) else y).transpose(1, 2)

    return attend
