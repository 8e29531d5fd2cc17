"""diffusers' attention processors: projections, norms of queries and keys, rotation, attention, projection.

Each takes the arguments of the class it stands in for, by the same names: diffusers looks them up.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.attention import attention
from ..ops.layer_norm import layer_norm
from ..ops.qk_norm_rope import qk_norm_rope
from ..ops.rms_norm import rms_norm
from ..ops.rope import rope
from .swap import fusible, qualified

Rotation = tuple[Tensor, Tensor]


class RmsNorm(nn.Module):
    """Rounds before the weight, and gives the weight's dtype."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if weight is None or weight.dtype is x.dtype:
            y = rms_norm(x, weight, self.eps)
        elif weight.dtype is torch.float32:  # then nothing is rounded before the weight
            y = rms_norm(x.float(), weight, self.eps)
        else:
            y = rms_norm(x, None, self.eps).to(weight.dtype) * weight
        return y if self.bias is None else y + self.bias


_RMS = (nn.RMSNorm, RmsNorm)  # that qk_norm_rope does the work of


def heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, T, H K] as [B, H, T, K], without a copy."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """[B, T, H, K] of query [B, H, T, K], key and value [B, G, S, K] of one dtype."""
    dtype = value.dtype
    grouped = query.shape[1] != key.shape[1]
    return attention(query.to(dtype), key.to(dtype), value, mask, scale=scale, enable_gqa=grouped).transpose(1, 2)


def project(attn: Any, y: Tensor) -> Tensor:
    """The last linear layer, then dropout."""
    return attn.to_out[1](attn.to_out[0](y))


class Flux:
    """FluxAttnProcessor: words and image in one sequence, each with norms of its own."""

    ops = "qk_norm_rope, attention"

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotation | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        tables = None if image_rotary_emb is None else tuple(x[:, ::2].float().contiguous() for x in image_rotary_emb)
        words = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        qkv = attn.to_qkv(hidden_states).chunk(3, -1) if attn.fused_projections else None
        query, key, value = qkv or (attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states))
        query, key, value = (heads(x, attn.head_dim) for x in (query, key, value))
        query, key = self.turn(query, key, attn.norm_q, attn.norm_k, tables, words)
        if encoder_hidden_states is not None:
            x = encoder_hidden_states
            qkv = attn.to_added_qkv(x).chunk(3, -1) if attn.fused_projections else None
            more = qkv or (attn.add_q_proj(x), attn.add_k_proj(x), attn.add_v_proj(x))
            first_query, first_key, first_value = (heads(x, attn.head_dim) for x in more)
            norms = attn.norm_added_q, attn.norm_added_k
            first_query, first_key = self.turn(first_query, first_key, *norms, tables, 0)
            query, key = joined(first_query, query), joined(first_key, key)
            value = joined(first_value, value)
        y = attend(query, key, value, attention_mask).flatten(2)
        if encoder_hidden_states is None:
            return y
        return project(attn, y[:, words:].contiguous()), attn.to_add_out(y[:, :words].contiguous())

    @staticmethod
    def turn(query: Tensor, key: Tensor, norm_q: Any, norm_k: Any, tables: Any, start: int) -> tuple[Tensor, Tensor]:
        """Normalised, and rotated by the tables' rows from `start` on."""
        if tables is None:
            return norm_q(query), norm_k(key)
        cos, sin = (x[start : start + query.shape[2]] for x in tables)
        if not fusible(_RMS, norm_q, norm_k):
            query, key = norm_q(query), norm_k(key)
            return rope(query, cos, sin, interleaved=True), rope(key, cos, sin, interleaved=True)
        return qk_norm_rope(query, key, norm_q.weight, norm_k.weight, cos, sin, eps=norm_q.eps, interleaved=True)


def joined(x: Tensor, y: Tensor) -> Tensor:
    """Two sequences [B, H, T, K] one after the other; in memory as [B, T, H, K]."""
    return torch.cat([x.transpose(1, 2), y.transpose(1, 2)], 1).transpose(1, 2)


class Joint:
    """JointAttnProcessor2_0, SD3's: image and words in one sequence."""

    ops = "attention"

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        own = self.normed(attn, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k, hidden_states)
        if encoder_hidden_states is not None:
            layers = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
            more = self.normed(attn, *layers, attn.norm_added_q, attn.norm_added_k, encoder_hidden_states)
            own = [torch.cat([x, y], 1) for x, y in zip(own, more, strict=True)]
        query, key, value = (x.transpose(1, 2) for x in own)
        y = attend(query, key, value).flatten(2)
        if encoder_hidden_states is None:
            return project(attn, y)
        y, words = y.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], 1)
        return project(attn, y), words if attn.context_pre_only else attn.to_add_out(words)

    @staticmethod
    def normed(attn: Any, to_q: Any, to_k: Any, to_v: Any, norm_q: Any, norm_k: Any, x: Tensor) -> list[Tensor]:
        """Query, key and value [B, T, H, K]."""
        query, key, value = (layer(x).unflatten(-1, (attn.heads, -1)) for layer in (to_q, to_k, to_v))
        return [query if norm_q is None else norm_q(query), key if norm_k is None else norm_k(key), value]


class Cross:
    """AttnProcessor2_0 and SanaAttnProcessor2_0: PixArt's attentions, Sana's attention to the prompt."""

    ops = "attention"
    whole = False  # whether norms are over all heads, before these are told apart

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        head_dim = key.shape[-1] // attn.heads
        if self.whole:
            query, key = self.norm(attn, query, key)
        query, key, value = (x.unflatten(-1, (-1, head_dim)) for x in (query, key, value))
        if not self.whole:
            query, key = self.norm(attn, query, key)
        mask = None if attention_mask is None else for_all_heads(attention_mask, query.shape[0])
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        y = attend(query, key, value, mask).flatten(2)
        return project(attn, y) / attn.rescale_output_factor

    @staticmethod
    def norm(attn: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        query = query if attn.norm_q is None else attn.norm_q(query)
        return query, key if attn.norm_k is None else attn.norm_k(key)


def for_all_heads(mask: Tensor, batch: int) -> Tensor:
    """[B, 1, 1 or T, S] of a bias [B, 1 or T, S] or [B, S]."""
    mask = mask.unsqueeze(1) if mask.dim() == 2 else mask
    if mask.dim() != 3 or mask.shape[0] != batch:
        raise ValueError(f"attention_mask: expected shape [{batch}, T, S] or [{batch}, S], got {list(mask.shape)}")
    return mask.unsqueeze(1)


class CrossWhole(Cross):
    """SanaAttnProcessor2_0's order."""

    whole = True


def key_mask(mask: Tensor | None) -> Tensor | None:
    """[B, 1, 1, S] of a mask [B, S], True or 1 where a key is seen."""
    return None if mask is None else mask.bool()[:, None, None]


def complex_tables(turns: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of Lumina's complex table [B, T, K / 2]: float32, [T, K / 2] if B is 1."""
    turns = turns[0] if turns.shape[0] == 1 else turns
    return turns.real.float().contiguous(), turns.imag.float().contiguous()


def proportional(attn: Any, tokens: int, base: int | None) -> float:
    """Lumina's scale: larger for more tokens than the model was trained with, if it is told how many those were."""
    return attn.scale if base is None else attn.scale * math.sqrt(math.log(tokens, base))


class LuminaNext:
    """LuminaAttnProcessor2_0: layer norms over all heads; the result is [B, T, H, K]."""

    ops = "qk_norm_rope, attention"

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        query_rotary_emb: Tensor | None = None,
        key_rotary_emb: Tensor | None = None,
        base_sequence_length: int | None = None,
    ) -> Tensor:
        query, key, value = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        head_dim = query.shape[-1] // attn.heads
        norm_q, norm_k, both = attn.norm_q, attn.norm_k, key_rotary_emb is query_rotary_emb
        if norm_q is not None and (query_rotary_emb is None or not fusible(nn.LayerNorm, norm_q, norm_k)):
            query, key = norm_q(query), norm_k(key)
            norm_q = norm_k = None
        elif norm_k is not None and not both:
            key = layer_norm(key, norm_k.weight, norm_k.bias, norm_k.eps)
        query, key, value = (heads(x, head_dim) for x in (query, key, value))
        if norm_q is None or query_rotary_emb is None:
            query = turned(query, query_rotary_emb)
            key = turned(key, key_rotary_emb)
        else:
            # Keys of other tokens than the queries' are not rotated: then they were normalised above.
            turning = key if both else key[:, :0, :1].expand(-1, -1, query.shape[2], -1)
            weight, bias = (norm_k.weight, norm_k.bias) if both else (norm_k.weight[:0], norm_k.bias[:0])
            query, turning = qk_norm_rope(
                query, turning, norm_q.weight, weight, *complex_tables(query_rotary_emb), query_bias=norm_q.bias,
                key_bias=bias, eps=norm_q.eps, norm="layer", across="width", interleaved=True,
            )  # fmt: skip
            key = turning if both else turned(key, key_rotary_emb)
        scale = None if key_rotary_emb is None else proportional(attn, hidden_states.shape[1], base_sequence_length)
        return attend(query, key, value, key_mask(attention_mask), scale)


def turned(x: Tensor, turns: Tensor | None) -> Tensor:
    return x if turns is None else rope(x, *complex_tables(turns), interleaved=True)


class Lumina2:
    """Lumina2AttnProcessor2_0: RMS norms of each head."""

    ops = "qk_norm_rope, attention"

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
        base_sequence_length: int | None = None,
    ) -> Tensor:
        query, key, value = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        query, key, value = (heads(x, query.shape[-1] // attn.heads) for x in (query, key, value))
        norm_q, norm_k = attn.norm_q, attn.norm_k
        if image_rotary_emb is None or not fusible(_RMS, norm_q, norm_k):
            query, key = (turned(norm(x), image_rotary_emb) for norm, x in ((norm_q, query), (norm_k, key)))
        else:
            tables = complex_tables(image_rotary_emb)
            query, key = qk_norm_rope(
                query, key, norm_q.weight, norm_k.weight, *tables, eps=norm_q.eps, interleaved=True
            )
        scale = proportional(attn, hidden_states.shape[1], base_sequence_length)
        return project(attn, attend(query, key, value, key_mask(attention_mask), scale).flatten(2))


_OLD = "diffusers.models.attention_processor."
_NEW = "diffusers.models.transformers."
PROCESSORS: dict[str, type] = {
    f"{_NEW}transformer_flux.FluxAttnProcessor": Flux,
    f"{_OLD}JointAttnProcessor2_0": Joint,
    f"{_OLD}AttnProcessor2_0": Cross,
    f"{_NEW}sana_transformer.SanaAttnProcessor2_0": CrossWhole,
    f"{_OLD}LuminaAttnProcessor2_0": LuminaNext,
    f"{_NEW}transformer_lumina2.Lumina2AttnProcessor2_0": Lumina2,
}
LINEAR = f"{_OLD}SanaLinearAttnProcessor2_0"
# What each of these norms its queries and keys with: torch's or diffusers' class, by name; None: no norm.
_NORMS: dict[type, tuple[str | None, ...]] = {
    Flux: ("RMSNorm",),
    LuminaNext: ("LayerNorm", None),
    Lumina2: ("RMSNorm",),
}


def processor(attn: Any) -> Any:
    return PROCESSORS[qualified(type(attn.processor))]()


def why_kept(attn: Any) -> str:
    """Why an attention keeps its processor; "" if it does not."""
    is_linear = qualified(type(attn.processor)) == LINEAR
    return "SanaLinearAttnProcessor2_0 is linear attention: no op for it" if is_linear else ""


def unfit(attn: Any) -> str:
    """What a processor of ours expects of its attention, and what there is instead; "" if all is well."""
    name = qualified(type(attn.processor))
    if name not in PROCESSORS:
        known = ", ".join(known.rpartition(".")[2] for known in PROCESSORS)
        return f"expected a processor of {known}, got {name.rpartition('.')[2]}"
    ours = PROCESSORS[name]
    norms = vars(attn)["_modules"].get("norm_q"), vars(attn)["_modules"].get("norm_k")
    if ours in _NORMS:
        kinds = tuple(None if norm is None else type(norm).__name__ for norm in norms)
        if kinds[0] != kinds[1] or kinds[0] not in _NORMS[ours]:
            return f"expected norms of {' or '.join(map(str, _NORMS[ours]))} in norm_q and norm_k, got {kinds}"
        for norm in norms:
            if norm is not None and (norm.weight is None or (kinds[0] == "LayerNorm" and norm.bias is None)):
                return "expected norms with a weight (layer norms: and a bias) in norm_q and norm_k"
        for words in (("norm_q", "norm_k"), ("norm_added_q", "norm_added_k")):
            pair = [vars(attn)["_modules"].get(word) for word in words]
            eps = [None if norm is None else vars(norm).get("eps") for norm in pair]
            if eps[0] != eps[1]:
                return f"expected one eps in {words[0]} and {words[1]}, got {eps[0]} and {eps[1]}"
    if issubclass(ours, Cross):
        for word in ("spatial_norm", "group_norm", "norm_cross"):
            if vars(attn)["_modules"].get(word) is not None:
                return f"expected no {word}"
        if attn.residual_connection or attn.fused_projections:
            return "expected neither residual_connection nor fused_projections"
    return ""
