"""transformers' language models: which module gets which forward.

A module is recognised by its exact class, never by its looks. What a forward computes is what the class computes, but
for rounding: an op rounds once where the class rounds after each step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.add_rms_norm import add_rms_norm
from ..ops.attention import attention
from ..ops.qk_norm_rope import qk_norm_rope
from ..ops.rms_norm import rms_norm
from ..ops.rope import rope
from ..ops.swiglu import swiglu
from .heads import CappedCausalLm, CausalLm, Gemma3WithPictures, headed
from .interface import NAME, attend, register_attention
from .swap import Part, Record, fusible, hooked


class RmsNorm(nn.Module):
    """Llama's and Qwen's: rounds before the weight."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype is not x.dtype:  # the result has the wider of both dtypes
            return self.weight * rms_norm(x, None, self.variance_epsilon)
        return rms_norm(x, self.weight, self.variance_epsilon)

    def after(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of residual + x, and the sum."""
        if not residual.dtype is x.dtype is self.weight.dtype or hooked(self):
            residual = residual + x
            return self(residual), residual
        return add_rms_norm(x, residual, self.weight, self.variance_epsilon)


class OffsetRmsNorm(nn.Module):
    """Gemma's: its weight counts from 1, and it rounds once."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, weight_offset=1.0, round_before_weight=False)

    def after(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        if residual.dtype is not x.dtype or hooked(self):
            residual = residual + x
            return self(residual), residual
        return add_rms_norm(x, residual, self.weight, self.eps, weight_offset=1.0, round_before_weight=False)


def add_norm(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of residual + x, and the sum; in one step unless PEFT has put another module in the norm's place."""
    if isinstance(norm, (RmsNorm, OffsetRmsNorm)):
        return norm.after(x, residual)
    residual = residual + x
    return norm(residual), residual


class GatedMlp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Rotary(nn.Module):
    """The tables as the op wants them, once for all layers: float32 [B, T, K / 2], or [T, K / 2] if B is 1."""

    def forward(self, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        return tables(*super().forward(*arguments, **named))


def tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Half of transformers' tables [B, T, K], whose halves are equal; their values, rounded as they are, stay."""
    half = cos.shape[-1] // 2
    dtype = torch.promote_types(cos.dtype, torch.float32)
    cos, sin = (x[..., :half].to(dtype).contiguous() for x in (cos, sin))
    return (cos[0], sin[0]) if cos.dim() == 3 and cos.shape[0] == 1 else (cos, sin)


class TextAttention(nn.Module):
    """Projections, rotation (after a norm where the class has one), cache, attention, projection."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **named: Any,
    ) -> tuple[Tensor, None]:
        if self.config._attn_implementation != NAME:
            raise RuntimeError(
                f"attn_implementation: expected {NAME!r} as long as the model is patched,"
                f" got {self.config._attn_implementation!r}; unpatch it first"
            )
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        cos, sin = position_embeddings
        if cos.shape[-1] == self.head_dim:  # from elsewhere than the model's own, patched module
            cos, sin = tables(cos, sin)
        query, key = self.rotate(query, key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        dropout = self.attention_dropout if self.training else 0.0
        options = {"scaling": self.scaling, "dropout": dropout, **self.limits(), **named}
        y, _ = attend(self, query, key, value, attention_mask, **options)
        return self.o_proj(y.flatten(2)), None

    def rotate(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rope(query, cos, sin), rope(key, cos, sin)

    def limits(self) -> dict[str, Any]:
        return {}


class WindowAttention(TextAttention):
    def limits(self) -> dict[str, Any]:
        return {"sliding_window": self.sliding_window}


class MistralAttention(TextAttention):
    def limits(self) -> dict[str, Any]:
        return {"sliding_window": self.config.sliding_window}


class CappedAttention(TextAttention):
    def limits(self) -> dict[str, Any]:
        return {"sliding_window": self.sliding_window, "softcap": self.attn_logit_softcapping}


class NormedAttention(WindowAttention):
    """Qwen3's: each head's query and key are normalised before they are rotated."""

    def rotate(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if not fusible(RmsNorm, self.q_norm, self.k_norm):
            return super().rotate(self.q_norm(query), self.k_norm(key), cos, sin)
        eps = self.q_norm.variance_epsilon
        return qk_norm_rope(query, key, self.q_norm.weight, self.k_norm.weight, cos, sin, eps=eps)


class OffsetNormedAttention(WindowAttention):
    """Gemma 3's; its class has a softcap that it does not use."""

    def rotate(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if not fusible(OffsetRmsNorm, self.q_norm, self.k_norm):
            return super().rotate(self.q_norm(query), self.k_norm(key), cos, sin)
        weights = (1.0 + norm.weight.float() for norm in (self.q_norm, self.k_norm))
        return qk_norm_rope(query, key, *weights, cos, sin, eps=self.q_norm.eps)


class VisionAttention(nn.Module):
    """Qwen2.5-VL's tower: windows are packed sequences, all in one call."""

    def forward(self, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: Any, **named: Any) -> Tensor:
        patches = hidden_states.shape[0]
        qkv = self.qkv(hidden_states).view(1, patches, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [1, H, N, K]
        cos, sin = tables(*position_embeddings)
        ends = cu_seqlens.to(torch.int32)
        query, key = rope(query, cos, sin), rope(key, cos, sin)
        y = attention(query, key, value, scale=self.scaling, cu_seqlens_q=ends)
        return self.proj(y.transpose(1, 2).reshape(patches, -1))


class VisionBlock(nn.Module):
    def forward(self, hidden_states: Tensor, **named: Any) -> Tensor:
        y, residual = add_norm(self.norm2, self.attn(self.norm1(hidden_states), **named), hidden_states)
        return residual + self.mlp(y)


class Layer(nn.Module):
    def forward(self, hidden_states: Tensor, **named: Any) -> Tensor:
        y, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **named)
        y, residual = add_norm(self.post_attention_layernorm, y, hidden_states)
        return residual + self.mlp(y)


class SandwichLayer(nn.Module):
    """Gemma 2 and 3: what a branch adds is normalised too."""

    def forward(self, hidden_states: Tensor, **named: Any) -> Tensor:
        y, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **named)
        y, residual = add_norm(self.pre_feedforward_layernorm, self.post_attention_layernorm(y), hidden_states)
        return residual + self.post_feedforward_layernorm(self.mlp(y))


def _norm(eps: str) -> Callable[[nn.Module], str]:
    def verify(module: nn.Module) -> str:
        if not isinstance(vars(module).get(eps), float):
            return f"expected a number in {eps}, got {vars(module).get(eps)!r}"
        weight = module.weight
        if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or not weight.is_floating_point():
            return f"expected a floating-point parameter of one dimension in weight, got {_of(weight)}"
        return ""

    return verify


def _of(x: object) -> str:
    return f"{list(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else repr(x)


def _mlp(module: nn.Module) -> str:
    """swiglu is silu(gate) * up."""
    kind = type(module.act_fn).__name__
    return "" if kind in ("SiLU", "SiLUActivation") else f"act_fn is {kind}, not silu: no op for it"


def _attention(module: nn.Module) -> str:
    if module.attention_dropout:
        return f"expected attention_dropout 0, got {module.attention_dropout}: there is no dropout"
    if module.head_dim % 2:
        return f"expected an even head_dim, got {module.head_dim}"
    norms = [vars(module)["_modules"].get(name) for name in ("q_norm", "k_norm")]
    if norms != [None, None] and (type(norms[0]) is not type(norms[1]) or norms[0].weight.shape != (module.head_dim,)):
        return f"expected norms over {module.head_dim} dims in q_norm and k_norm"
    eps = [None if norm is None else vars(norm).get("variance_epsilon", vars(norm).get("eps")) for norm in norms]
    if eps[0] != eps[1]:
        return f"expected one eps in q_norm and k_norm, got {eps[0]} and {eps[1]}"
    return ""


_RMS = Part(RmsNorm, "rms_norm", _norm("variance_epsilon"))
_OFFSET_RMS = Part(OffsetRmsNorm, "rms_norm", _norm("eps"))
_MLP = Part(GatedMlp, "swiglu", keep=_mlp)
_ROTARY = Part(Rotary, "tables of rope")
_LAYER = Part(Layer, "add_rms_norm")
_SANDWICH = Part(SandwichLayer, "add_rms_norm")
_LOSS = Part(CausalLm, "linear_cross_entropy", headed)
_CAPPED_LOSS = Part(CappedCausalLm, "linear_cross_entropy", headed)


def _rotated(mixin: type) -> Part:
    ops = "qk_norm_rope, attention" if mixin in (NormedAttention, OffsetNormedAttention) else "rope, attention"
    return Part(mixin, ops, _attention)


def _family(folder: str, **parts: Part) -> dict[str, Part]:
    prefix = f"transformers.models.{folder}.modeling_{folder}."
    return {prefix + name: part for name, part in parts.items()}


PARTS: dict[str, Part] = {
    **_family(
        "llama", LlamaRMSNorm=_RMS, LlamaMLP=_MLP, LlamaRotaryEmbedding=_ROTARY,
        LlamaAttention=_rotated(TextAttention), LlamaDecoderLayer=_LAYER, LlamaForCausalLM=_LOSS,
    ),
    **_family(
        "mistral", MistralRMSNorm=_RMS, MistralMLP=_MLP, MistralRotaryEmbedding=_ROTARY,
        MistralAttention=_rotated(MistralAttention), MistralDecoderLayer=_LAYER, MistralForCausalLM=_LOSS,
    ),
    **_family(
        "qwen2", Qwen2RMSNorm=_RMS, Qwen2MLP=_MLP, Qwen2RotaryEmbedding=_ROTARY,
        Qwen2Attention=_rotated(WindowAttention), Qwen2DecoderLayer=_LAYER, Qwen2ForCausalLM=_LOSS,
    ),
    **_family(
        "qwen3", Qwen3RMSNorm=_RMS, Qwen3MLP=_MLP, Qwen3RotaryEmbedding=_ROTARY,
        Qwen3Attention=_rotated(NormedAttention), Qwen3DecoderLayer=_LAYER, Qwen3ForCausalLM=_LOSS,
    ),
    **_family(
        "qwen2_5_vl", Qwen2_5_VLRMSNorm=_RMS, Qwen2_5_VLMLP=_MLP, Qwen2MLP=_MLP, Qwen2_5_VLRotaryEmbedding=_ROTARY,
        Qwen2_5_VLAttention=_rotated(WindowAttention), Qwen2_5_VLDecoderLayer=_LAYER,
        Qwen2_5_VLVisionAttention=_rotated(VisionAttention), Qwen2_5_VLVisionBlock=Part(VisionBlock, "add_rms_norm"),
        Qwen2_5_VLForConditionalGeneration=_LOSS,
    ),
    **_family(
        "gemma", GemmaRMSNorm=_OFFSET_RMS, GemmaMLP=_MLP, GemmaRotaryEmbedding=_ROTARY,
        GemmaAttention=_rotated(TextAttention), GemmaDecoderLayer=_LAYER, GemmaForCausalLM=_LOSS,
    ),
    **_family(
        "gemma2", Gemma2RMSNorm=_OFFSET_RMS, Gemma2MLP=_MLP, Gemma2RotaryEmbedding=_ROTARY,
        Gemma2Attention=_rotated(CappedAttention), Gemma2DecoderLayer=_SANDWICH, Gemma2ForCausalLM=_CAPPED_LOSS,
    ),
    **_family(
        "gemma3", Gemma3RMSNorm=_OFFSET_RMS, Gemma3MLP=_MLP, Gemma3RotaryEmbedding=_ROTARY,
        Gemma3Attention=_rotated(OffsetNormedAttention), Gemma3DecoderLayer=_SANDWICH,
        Gemma3ForCausalLM=_CAPPED_LOSS,
        Gemma3ForConditionalGeneration=Part(Gemma3WithPictures, "linear_cross_entropy", headed),
    ),
}  # fmt: skip


def choose_attention(model: nn.Module, record: Record) -> None:
    """`attn_implementation="blip3o"` for all of transformers' models in `model`, and in `record` what each had."""
    from transformers import PreTrainedConfig, PreTrainedModel

    register_attention()
    found: dict[int, PreTrainedConfig] = {}

    def add(config: PreTrainedConfig) -> None:
        found[id(config)] = config
        for name in config.sub_configs:
            part = vars(config).get(name)
            if part is not None:
                add(part)

    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for module in models:
        add(module.config)
    alone = [module.config for module in model.modules() if isinstance(module, (TextAttention, VisionAttention))]
    alone = [config for config in alone if id(config) not in found]  # of layers outside of any of these models
    for config in alone:
        add(config)
    record.configs = [(config, config._attn_implementation) for config in found.values()]
    for module in models:
        module.set_attn_implementation(NAME)
    for config in alone:
        config._attn_implementation_internal = NAME
