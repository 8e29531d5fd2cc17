"""`attn_implementation="blip3o"`: the op `attention` as transformers calls it, and the masks it wants.

transformers hands every attention layer's query, key and value to a function found by name, and asks a mask function of
the same name for the mask. Without the second it passes no mask at all, and padding is attended to in silence: both
are registered together here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.attention import attention

NAME = "blip3o"
# What other implementations take and this one has no meaning for: refused if it is given.
_REFUSED = ("position_bias", "cache", "s_aux", "block_table")


def register_attention() -> None:
    """Make `attn_implementation="blip3o"` known to transformers, attention and masks alike. Needs transformers >= 5."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)


def mask(**named: Any) -> Tensor | None:
    """transformers' boolean mask [B, 1, T, S], or None where causality and the window say everything.

    That of its own SDPA, except that a sliding window alone needs no mask: `attend` gets window_size instead.
    """
    from transformers.masking_utils import sdpa_mask

    window = named.get("local_size") is not None and named.get("allow_is_causal_skip", True)
    if window and not hasattr(named.get("config"), "attention_chunk_size"):
        first, tokens = named.get("q_offset", 0), named.get("q_length")
        if isinstance(first, int) and tokens and first + tokens == named.get("kv_offset", 0) + named["kv_length"]:
            named["local_size"] = None  # the last query stands at the last key, as the op takes it to
    return sdpa_mask(**named)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [B, H, T, K], key and value [B, G, S, K] of a layer; the result is [B, T, H, K], and no weights.

    attention_mask: as `mask` gives it, or additive; it says all, causality and window included. Without one, causality
    is `is_causal`, or else the module's. cu_seq_lens_q, cu_seq_lens_k: packed sequences, in place of a mask.
    Raises ValueError for dropout and for what has no meaning here (a position bias, sinks, a paged cache).
    """
    for name in _REFUSED:
        if others.get(name) is not None:
            raise ValueError(f"{name}: expected None, attn_implementation={NAME!r} has no such thing")
    grouped = key.shape[1] != query.shape[1]
    causal = bool(module.is_causal) if is_causal is None and hasattr(module, "is_causal") else is_causal is not False
    tokens = query.shape[2]
    options: dict[str, Any] = {"scale": scaling, "enable_gqa": grouped, "softcap": softcap or None}
    window = None if sliding_window is None else (sliding_window - 1, -1 if causal else sliding_window - 1)
    if cu_seq_lens_q is not None:
        ends = cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
        options |= {"cu_seqlens_q": cu_seq_lens_q.to(torch.int32), "cu_seqlens_k": ends.to(torch.int32)}
        attention_mask = None
    elif attention_mask is None:
        causal = tokens > 1 and causal
        if causal and key.shape[2] > tokens:
            # No mask and more keys than queries: the first tokens in an empty cache of fixed length.
            key, value = key[:, :, :tokens], value[:, :, :tokens]
    if attention_mask is None:
        options |= {"is_causal": causal, "window_size": window}
    y = attention(query, key, value, attention_mask, dropout, **options)
    return y.transpose(1, 2), None
