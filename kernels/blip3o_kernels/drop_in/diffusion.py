"""diffusers' transformers: which block, norm and feed-forward gets which forward, which attention which processor.

A gate is a factor of what a branch adds. Lumina's is a hyperbolic tangent, which `gated_residual` computes with the
sandwich norm; for the others one torch.addcmul adds and multiplies at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.gated_residual import gated_residual
from ..ops.modulate import modulate
from ..ops.swiglu import swiglu
from .processors import RmsNorm, processor, unfit, why_kept
from .swap import Part, fusible


def layer_modulate(norm: nn.Module, x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """norm(x) * (1 + scale) + shift, where norm is a layer norm; scale and shift [B, D]."""
    if fusible(nn.LayerNorm, norm) and scale.dtype is x.dtype:
        return modulate(x, scale, shift, weight=norm.weight, bias=norm.bias, eps=norm.eps, norm="layer")
    y = norm(x) * (1 + scale.unsqueeze(1))
    return y if shift is None else y + shift.unsqueeze(1)


def rms_modulate(norm: nn.Module, x: Tensor, scale: Tensor) -> Tensor:
    """norm(x) * (1 + scale), where norm is an RMS norm without a bias."""
    if fusible(RmsNorm, norm) and scale.dtype is x.dtype and norm.bias is None:
        return modulate(x, scale, weight=norm.weight, eps=norm.eps)
    return norm(x) * (1 + scale.unsqueeze(1))


def add_gated(residual: Tensor, gate: Tensor, x: Tensor) -> Tensor:
    """residual + gate * x, the gate [B, D]."""
    if residual.dtype is gate.dtype is x.dtype:
        return torch.addcmul(residual, gate.unsqueeze(1), x)
    return residual + gate.unsqueeze(1) * x


def add_tanh_gated(residual: Tensor, gate: Tensor, norm: nn.Module, x: Tensor) -> Tensor:
    """residual + tanh(gate) * norm(x), the gate [B, D]."""
    if fusible(RmsNorm, norm) and norm.weight is not None and norm.bias is None and residual.dtype is x.dtype:
        return gated_residual(residual, x, gate, weight=norm.weight, eps=norm.eps)
    return residual + gate.unsqueeze(1).tanh() * norm(x)


class AdaLayerNormZero(nn.Module):
    """x [B, T, D] and emb [B, D], or timestep and class_labels [B] -> [B, T, D], and four modulations [B, D]: the gate,
    and those of the MLP (shift, scale, gate)."""

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, *others = self.linear(self.silu(emb)).chunk(6, dim=1)
        return layer_modulate(self.norm, x, scale, shift), *others


class AdaLayerNormZeroSingle(nn.Module):
    """x [B, T, D] and emb [B, D] -> [B, T, D], and the gate [B, D]."""

    def forward(self, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
        return layer_modulate(self.norm, x, scale, shift), gate


class AdaLayerNormZeroTwice(nn.Module):
    """SD 3.5's: one norm, modulated for each of two attentions. hidden_states [B, T, D] and emb [B, D] -> two
    [B, T, D], in the first and the sixth place, and five modulations [B, D]."""

    def forward(self, hidden_states: Tensor, emb: Tensor | None = None) -> tuple[Tensor, ...]:
        chunks = self.linear(self.silu(emb)).chunk(9, dim=1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, shift_2, scale_2, gate_2 = chunks
        first = layer_modulate(self.norm, hidden_states, scale, shift)
        second = layer_modulate(self.norm, hidden_states, scale_2, shift_2)
        return first, gate, shift_mlp, scale_mlp, gate_mlp, second, gate_2


class AdaLayerNormContinuous(nn.Module):
    """x [B, T, D] and conditioning_embedding [B, E] -> [B, T, D]."""

    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
        return layer_modulate(self.norm, x, scale, shift)


class LuminaNormContinuous(nn.Module):
    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        scale = self.linear_1(self.silu(conditioning_embedding).to(x.dtype))
        x = layer_modulate(self.norm, x, scale, None)
        return x if self.linear_2 is None else self.linear_2(x)


class LuminaNormZero(nn.Module):
    def forward(self, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, ...]:
        scale, *others = self.linear(self.silu(emb)).chunk(4, dim=1)
        return rms_modulate(self.norm, x, scale), *others


class SanaModulatedNorm(nn.Module):
    """hidden_states [B, T, D], temb [B, D], scale_shift_table [2, D] -> [B, T, D]."""

    def forward(self, hidden_states: Tensor, temb: Tensor, scale_shift_table: Tensor) -> Tensor:
        shift, scale = (scale_shift_table[None] + temb[:, None].to(scale_shift_table.device)).unbind(1)
        return layer_modulate(self.norm, hidden_states, scale, shift)


class LuminaFeedForward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(swiglu(self.linear_1(x), self.linear_3(x)))


class FluxBlock(nn.Module):
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        x, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1(hidden_states, emb=temb)
        words, *of_words = self.norm1_context(encoder_hidden_states, emb=temb)
        y, words, *adapters = self.attn(
            hidden_states=x,
            encoder_hidden_states=words,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        hidden_states = add_gated(hidden_states, gate, y)
        y = self.ff(layer_modulate(self.norm2, hidden_states, scale_mlp, shift_mlp))
        hidden_states = add_gated(hidden_states, gate_mlp, y)
        for adapter in adapters:
            hidden_states = hidden_states + adapter
        gate, shift_mlp, scale_mlp, gate_mlp = of_words
        encoder_hidden_states = add_gated(encoder_hidden_states, gate, words)
        y = self.ff_context(layer_modulate(self.norm2_context, encoder_hidden_states, scale_mlp, shift_mlp))
        return finite(add_gated(encoder_hidden_states, gate_mlp, y)), hidden_states


class FluxSingleBlock(nn.Module):
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        words = encoder_hidden_states.shape[1]
        hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        x, gate = self.norm(hidden_states, emb=temb)
        mlp = self.act_mlp(self.proj_mlp(x))
        y = self.attn(hidden_states=x, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        hidden_states = finite(add_gated(hidden_states, gate, self.proj_out(torch.cat([y, mlp], dim=2))))
        return hidden_states[:, :words], hidden_states[:, words:]


def finite(x: Tensor) -> Tensor:
    """As diffusers does it: float16 is kept from overflowing."""
    return x.clip(-65504, 65504) if x.dtype is torch.float16 else x


class JointBlock(nn.Module):
    """SD3's."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        named = joint_attention_kwargs or {}
        x, gate, shift_mlp, scale_mlp, gate_mlp, *second = self.norm1(hidden_states, emb=temb)
        if self.context_pre_only:
            words = self.norm1_context(encoder_hidden_states, temb)
        else:
            words, *of_words = self.norm1_context(encoder_hidden_states, emb=temb)
        y, words = self.attn(hidden_states=x, encoder_hidden_states=words, **named)
        hidden_states = add_gated(hidden_states, gate, y)
        if self.use_dual_attention:
            x, gate = second
            hidden_states = add_gated(hidden_states, gate, self.attn2(hidden_states=x, **named))
        y = layer_modulate(self.norm2, hidden_states, scale_mlp, shift_mlp)
        hidden_states = add_gated(hidden_states, gate_mlp, in_chunks(self, self.ff, y))
        if self.context_pre_only:
            return None, hidden_states
        gate, shift_mlp, scale_mlp, gate_mlp = of_words
        encoder_hidden_states = add_gated(encoder_hidden_states, gate, words)
        y = layer_modulate(self.norm2_context, encoder_hidden_states, scale_mlp, shift_mlp)
        return add_gated(encoder_hidden_states, gate_mlp, in_chunks(self, self.ff_context, y)), hidden_states


def in_chunks(block: nn.Module, network: nn.Module, x: Tensor) -> Tensor:
    """The feed-forward network, in the chunks that `set_chunk_feed_forward` has set."""
    if block._chunk_size is None:
        return network(x)
    return torch.cat([network(part) for part in x.split(block._chunk_size, block._chunk_dim)], block._chunk_dim)


class PixArtBlock(nn.Module):
    """BasicTransformerBlock with norm_type="ada_norm_single"."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        named = cross_attention_kwargs or {}
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = of_table(self.scale_shift_table, timestep)
        x = layer_modulate(self.norm1, hidden_states, scale, shift)
        context = encoder_hidden_states if self.only_cross_attention else None
        y = self.attn1(x, encoder_hidden_states=context, attention_mask=attention_mask, **named)
        hidden_states = add_gated(hidden_states, gate, y)
        if self.attn2 is not None:
            words = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
            hidden_states = self.attn2(hidden_states, **words, **named) + hidden_states
        x = layer_modulate(self.norm2, hidden_states, scale_mlp, shift_mlp)
        return add_gated(hidden_states, gate_mlp, in_chunks(self, self.ff, x))


def of_table(table: Tensor, timestep: Tensor | None) -> tuple[Tensor, ...]:
    """Six modulations [B, D] of a block: its table [6, D] and what all blocks share, [B, 6 D]."""
    assert timestep is not None
    return (table[None] + timestep.reshape(timestep.shape[0], 6, -1)).unbind(1)


class SanaBlock(nn.Module):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Tensor:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = of_table(self.scale_shift_table, timestep)
        x = layer_modulate(self.norm1, hidden_states, scale, shift).to(hidden_states.dtype)
        hidden_states = add_gated(hidden_states, gate, self.attn1(x))
        if self.attn2 is not None:
            words = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
            hidden_states = self.attn2(hidden_states, **words) + hidden_states
        x = layer_modulate(self.norm2, hidden_states, scale_mlp, shift_mlp)
        y = self.ff(x.unflatten(1, (height, width)).permute(0, 3, 1, 2))
        return add_gated(hidden_states, gate_mlp, y.flatten(2, 3).permute(0, 2, 1))


class LuminaNextBlock(nn.Module):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: Tensor,
        encoder_hidden_states: Tensor,
        encoder_mask: Tensor,
        temb: Tensor,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        named = {"query_rotary_emb": image_rotary_emb, **(cross_attention_kwargs or {})}
        x, gate, scale_mlp, gate_mlp = self.norm1(hidden_states, temb)
        y = self.attn1(x, x, attention_mask=attention_mask, key_rotary_emb=image_rotary_emb, **named)
        words = self.norm1_context(encoder_hidden_states)
        words = self.attn2(x, words, attention_mask=encoder_mask, key_rotary_emb=None, **named)
        y = torch.addcmul(y, self.gate.tanh().to(y.dtype).view(1, 1, -1, 1), words)
        y = self.attn2.to_out[0](y.flatten(-2))
        hidden_states = add_tanh_gated(hidden_states, gate, self.norm2, y)
        y = self.feed_forward(rms_modulate(self.ffn_norm1, hidden_states, scale_mlp))
        return add_tanh_gated(hidden_states, gate_mlp, self.ffn_norm2, y)


class Lumina2Block(nn.Module):
    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor, image_rotary_emb: Tensor, temb: Tensor | None = None
    ) -> Tensor:
        if not self.modulation:  # norms alone, which are patched themselves
            return super().forward(hidden_states, attention_mask, image_rotary_emb, temb)
        x, gate, scale_mlp, gate_mlp = self.norm1(hidden_states, temb)
        y = self.attn(x, x, attention_mask=attention_mask, image_rotary_emb=image_rotary_emb)
        hidden_states = add_tanh_gated(hidden_states, gate, self.norm2, y)
        y = self.feed_forward(rms_modulate(self.ffn_norm1, hidden_states, scale_mlp))
        return add_tanh_gated(hidden_states, gate_mlp, self.ffn_norm2, y)


def _rms(module: nn.Module) -> str:
    if not isinstance(module.eps, float) or len(module.dim) != 1:
        return f"expected a number in eps and one dimension in dim, got {module.eps!r} and {list(module.dim)}"
    return ""


def _normed(module: nn.Module) -> str:
    """A norm inside an AdaLN module, whatever of layer norm or RMS norm it is asked to be."""
    kind = type(module.norm).__name__
    return "" if isinstance(module.norm, nn.LayerNorm) or kind == "RMSNorm" else f"expected a LayerNorm, got {kind}"


def _single(module: nn.Module) -> str:
    if module.norm_type != "ada_norm_single":
        return f"norm_type is {module.norm_type!r}, not 'ada_norm_single'"
    return "it has a pos_embed, or GLIGEN's fuser" if module.pos_embed is not None or hasattr(module, "fuser") else ""


_MODELS = "diffusers.models."
_ATTENTION = Part(processor, "attention", unfit, why_kept)
PARTS: dict[str, Part] = {
    f"{_MODELS}attention_processor.Attention": _ATTENTION,
    f"{_MODELS}transformers.transformer_flux.FluxAttention": _ATTENTION,
    f"{_MODELS}normalization.RMSNorm": Part(RmsNorm, "rms_norm", _rms),
    f"{_MODELS}normalization.AdaLayerNormZero": Part(AdaLayerNormZero, "modulate", _normed),
    f"{_MODELS}normalization.AdaLayerNormZeroSingle": Part(AdaLayerNormZeroSingle, "modulate", _normed),
    f"{_MODELS}normalization.SD35AdaLayerNormZeroX": Part(AdaLayerNormZeroTwice, "modulate", _normed),
    f"{_MODELS}normalization.AdaLayerNormContinuous": Part(AdaLayerNormContinuous, "modulate", _normed),
    f"{_MODELS}normalization.LuminaLayerNormContinuous": Part(LuminaNormContinuous, "modulate", _normed),
    f"{_MODELS}normalization.LuminaRMSNormZero": Part(LuminaNormZero, "modulate", _normed),
    f"{_MODELS}attention.LuminaFeedForward": Part(LuminaFeedForward, "swiglu"),
    f"{_MODELS}attention.JointTransformerBlock": Part(JointBlock, "modulate, torch.addcmul"),
    f"{_MODELS}attention.BasicTransformerBlock": Part(PixArtBlock, "modulate, torch.addcmul", keep=_single),
    f"{_MODELS}transformers.transformer_flux.FluxTransformerBlock": Part(FluxBlock, "modulate, torch.addcmul"),
    f"{_MODELS}transformers.transformer_flux.FluxSingleTransformerBlock": Part(FluxSingleBlock, "torch.addcmul"),
    f"{_MODELS}transformers.sana_transformer.SanaTransformerBlock": Part(SanaBlock, "modulate, torch.addcmul"),
    f"{_MODELS}transformers.sana_transformer.SanaModulatedNorm": Part(SanaModulatedNorm, "modulate"),
    f"{_MODELS}transformers.lumina_nextdit2d.LuminaNextDiTBlock": Part(LuminaNextBlock, "modulate, gated_residual"),
    f"{_MODELS}transformers.transformer_lumina2.Lumina2TransformerBlock": Part(
        Lumina2Block, "modulate, gated_residual"
    ),
}
