"""The peers of each op: what a user would otherwise call, with the same arguments and results.

`PEERS[op]` are plain functions. Every op also has its reference in eager mode ("reference"), and compiled ("compile",
"compile max-autotune"). `ABSENT` says what a peer needs that is not there: a peer that cannot run is listed with the
reason, not left out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import libraries
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from blip3o_kernels import OPS

Function = Callable[..., object]


@dataclass(frozen=True)
class Peer:
    """name: as in the table.  function: takes the op's arguments; None if it cannot run, and `reason` says why.
    forward_only: it has no backward pass here.  random: its result is drawn and cannot be compared."""

    name: str
    function: Function | None
    reason: str = ""
    forward_only: bool = False
    random: bool = False


# The formulas as Hugging Face writes them, in eager mode.


def hf_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """transformers' Qwen2RMSNorm."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def hf_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = residual + x
    return hf_rms_norm(total, weight, eps), total


def hf_modulate(x: Tensor, scale: Tensor, *, weight: Tensor, eps: float) -> Tensor:
    """diffusers' LuminaRMSNormZero."""
    return hf_rms_norm(x, weight, eps) * (1 + scale[:, None])


def hf_gated_residual(residual: Tensor, x: Tensor, gate: Tensor, *, weight: Tensor, eps: float) -> Tensor:
    """diffusers' LuminaNextDiTBlock."""
    return residual + gate.unsqueeze(1).tanh() * hf_rms_norm(x, weight, eps)


def hf_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """transformers' apply_rotary_pos_emb, which wants the tables twice as wide and in the dtype of x."""
    cos, sin = (torch.cat((table, table), dim=-1).to(x.dtype) for table in (cos, sin))
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def hf_qk_norm_rope(
    query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor, cos: Tensor, sin: Tensor, *,
    query_bias: Tensor, key_bias: Tensor, eps: float, norm: str, across: str, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """diffusers' Lumina attention: a layer norm over all heads, then complex numbers."""
    assert (norm, across, interleaved) == ("layer", "width", True)
    turns = torch.complex(cos, sin)
    found = []
    for x, weight, bias in ((query, query_weight, query_bias), (key, key_weight, key_bias)):
        batch, heads, tokens, head_dim = x.shape
        whole = x.transpose(1, 2).reshape(batch, tokens, -1)
        normed = F.layer_norm(whole, whole.shape[-1:], weight, bias, eps).view(batch, tokens, heads, head_dim)
        pairs = torch.view_as_complex(normed.float().reshape(*normed.shape[:-1], -1, 2))
        rotated = torch.view_as_real(pairs * turns[:, None]).flatten(3).type_as(x)
        found.append(rotated.transpose(1, 2))
    return found[0], found[1]


def hf_swiglu(gate: Tensor) -> Tensor:
    """transformers' feed-forward network behind one product."""
    gate, up = gate.chunk(2, dim=-1)
    return F.silu(gate) * up


def hf_attention(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, enable_gqa: bool = False
) -> Tensor:
    """transformers' eager_attention_forward."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
    weights = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    if is_causal:
        hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).triu(1)
        weights = weights.masked_fill(hidden, torch.finfo(weights.dtype).min)
    return F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype) @ value


def hf_timestep_embedding(timestep: Tensor, dim: int) -> Tensor:
    """diffusers' get_timestep_embedding, cosines first."""
    exponent = -9.210340371976184 * torch.arange(dim // 2, dtype=torch.float32, device=timestep.device) / (dim // 2)
    angles = timestep[:, None].float() * torch.exp(exponent)[None]
    return torch.cat((torch.cos(angles), torch.sin(angles)), dim=-1)


def torch_flow_timesteps(positions: Tensor, seed: int, *, distribution: str) -> Tensor:
    drawn = torch.rand if distribution == "uniform" else torch.randn
    x = drawn(positions.shape, device=positions.device)
    return x if distribution == "uniform" else torch.sigmoid(x)


def torch_flow_interpolate(
    x: Tensor, noise: Tensor | None, sigma: Tensor, *, seed: int = 0, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    noise = torch.randn_like(x) if noise is None else noise
    sigma = sigma.view(-1, *[1] * (x.dim() - 1)).to(x.dtype)
    return (1.0 - sigma) * x + sigma * noise, noise - x


def torch_flow_loss(prediction: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(prediction.float(), target.float())


def torch_flow_step(x: Tensor, velocity: Tensor, step: float, *, unconditional: Tensor, guidance: float) -> Tensor:
    """diffusers' pipelines: guidance, then the scheduler's step in float32."""
    guided = unconditional + guidance * (velocity - unconditional)
    return (x.float() + step * guided).to(x.dtype)


def hf_linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """transformers' ForCausalLMLoss, which widens the logits."""
    return F.cross_entropy((x @ weight.T).float(), target)


def functional_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def functional_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def functional_linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), target).float()


def functional_attention(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, enable_gqa: bool = False
) -> Tensor:
    """SDPA as it is called; to pick a backend costs tens of microseconds a call, which small shapes feel."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=enable_gqa)


def sdpa(backend: SDPBackend) -> Function:
    def attend(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, enable_gqa: bool = False) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=enable_gqa)

    return attend


def flex_attention() -> Function:
    """torch's FlexAttention, compiled as its documentation asks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled, masks = torch.compile(flex_attention, dynamic=False), {}

    def attend(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, enable_gqa: bool = False) -> object:
        size = (query.shape[2], key.shape[2])
        if is_causal and size not in masks:
            masks[size] = create_block_mask(lambda b, h, q, k: q >= k, None, None, *size, device=query.device.type)
        return compiled(query, key, value, block_mask=masks[size] if is_causal else None, enable_gqa=enable_gqa)

    return attend


PEERS: dict[str, dict[str, Function]] = {
    "rms_norm": {"transformers": hf_rms_norm, "functional": functional_rms_norm},
    "add_rms_norm": {"transformers": hf_add_rms_norm},
    "layer_norm": {"functional": functional_layer_norm},
    "modulate": {"diffusers": hf_modulate},
    "gated_residual": {"diffusers": hf_gated_residual},
    "rope": {"transformers": hf_rope},
    "qk_norm_rope": {"diffusers": hf_qk_norm_rope},
    "attention": {"transformers": hf_attention, "functional": functional_attention},
    "swiglu": {"transformers": hf_swiglu},
    "timestep_embedding": {"diffusers": hf_timestep_embedding},
    "flow_timesteps": {"torch": torch_flow_timesteps},
    "flow_interpolate": {"torch": torch_flow_interpolate},
    "flow_loss": {"torch": torch_flow_loss},
    "flow_step": {"diffusers": torch_flow_step},
    "linear_cross_entropy": {"transformers": hf_linear_cross_entropy, "functional": functional_linear_cross_entropy},
}
SDPA = {
    "sdpa math": SDPBackend.MATH,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
}
PRODUCTS = {"attention", "linear_cross_entropy"}  # what max-autotune can choose kernels for


def peers(op: str, device: str, drawn: bool) -> Iterator[Peer]:
    """All peers of an op. drawn: whether the call draws random numbers, which each peer draws its own way."""
    reference = next(known.reference for known in OPS if known.name == op)
    yield Peer("reference", reference)
    for name, function in PEERS[op].items():
        yield Peer(name, function, random=drawn)
    yield Peer("compile", torch.compile(reference, dynamic=False))
    if op in PRODUCTS:
        # Without CUDA graphs: one is made of a whole network, around one op it would time the copies of its inputs.
        mode = "max-autotune-no-cudagraphs"
        yield Peer("compile max-autotune", torch.compile(reference, dynamic=False, mode=mode))
    elif device == "cpu":
        reason = "on a CPU it changes matrix products alone; for the other ops it is the same code as compile"
        yield Peer("compile max-autotune", None, reason)
    if op == "attention":
        for name, backend in SDPA.items():
            elsewhere = backend in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION) and device == "cpu"
            yield Peer(name, None if elsewhere else sdpa(backend), "runs on CUDA only" if elsewhere else "")
        yield Peer("flex", flex_attention(), forward_only=device == "cpu")
        for name, module in (("flash-attn", "flash_attn"), ("flash-attn 3", "flash_attn_interface")):
            yield _library(name, module, device, partial(libraries.flash_attention, module))
    if op in libraries.LIGER:
        yield _library("liger", "liger_kernel", device, libraries.LIGER[op])
    if op == "linear_cross_entropy":
        yield Peer(
            "torchao", None, "has quantised linear layers, no kernel for any of these ops in float32 or bfloat16"
        )


def _library(name: str, module: str, device: str, call: Callable[[], Function] | str) -> Peer:
    """call: makes the function, or says why there is none."""
    if importlib.util.find_spec(module) is None:
        return Peer(name, None, "not installed" if device != "cpu" else "not installed; runs on CUDA only")
    if device == "cpu":
        return Peer(name, None, "runs on CUDA only")
    if isinstance(call, str):
        return Peer(name, None, call)
    try:
        return Peer(name, call())
    except ImportError as error:
        return Peer(name, None, str(error))
