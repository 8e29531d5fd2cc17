"""The native bodies of attention: tensors laid out for the C struct of csrc/blip3o.h, without a copy where possible."""

from __future__ import annotations

import torch
from torch import Tensor, empty_like, get_num_threads

from .. import memory, native
from ..dispatch import instruction_set
from ..memory import LARGE, scratch
from ..native import DTYPES
from ..strides import address, contiguous, last_adjacent, tokens_first

FEW, PART, PARTS = 16, 256, 32  # of csrc/blip3o.h

# Of a GPU: rows (of one token the heads of a group) whose keys are cut, blocks that fill it, keys of a part at least.
FEW_CUDA, BLOCKS, PART_CUDA, PARTS_CUDA = 32, 256, 128, 64

_PACK, _PACK_BACKWARD = native.packer("attention"), native.packer("attention_backward")
_CPU_FORWARD, _CPU_BACKWARD = native.function("cpu", "attention"), native.function("cpu", "attention_backward")
_CUDA_FORWARD, _CUDA_BACKWARD = native.cuda_call("attention"), native.cuda_call("attention_backward")


def _masked(mask: Tensor | None, full: torch.Size) -> tuple[Tensor | None, int, Tensor | None]:
    """The mask as the library reads it (to be kept alive), its kind, and a view of the full shape for its strides."""
    if mask is None:
        return None, 0, None
    if mask.dtype is not torch.bool:
        mask = mask.detach().to(torch.float32)
    if not mask.dim() or mask.shape[-1] != full[-1]:
        mask = mask.expand(*mask.shape[:-1], full[-1])
    if mask.stride(-1) != 1:
        mask = mask.contiguous()
    return mask, 1 if mask.dtype is torch.bool else 2, mask.expand(full)


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [address(x) for x in tensors]


def _strides(*tensors: Tensor | None) -> list[int]:
    """Of batch, head and token."""
    return [stride for x in tensors for stride in ((0, 0, 0) if x is None else x.stride()[:3])]


def _padded(n: int, to: int) -> int:
    return (n + to - 1) // to * to


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    scale: float,
    saving: bool = True,
) -> tuple[Tensor, Tensor]:
    """y, dense as [B, T, H, V], and the scores' log-sum-exp, which is y again unless it is wanted."""
    if native.on_gpu(query):
        limits = (causal, left, right)
        return forward_cuda(query, key, value, mask, cu_seqlens_q, cu_seqlens_k, *limits, softcap, scale, saving)
    # Written out, each number by its name: for one token calls and tuples are the cost.
    query_batch, query_head, query_token, adjacent = query.stride()
    key_batch, key_head, key_token, key_adjacent = key.stride()
    value_batch, value_head, value_token, value_adjacent = value.stride()
    if not adjacent == key_adjacent == value_adjacent == 1:
        query, key, value = last_adjacent(query), last_adjacent(key), last_adjacent(value)
        query_batch, query_head, query_token, _ = query.stride()
        key_batch, key_head, key_token, _ = key.stride()
        value_batch, value_head, value_token, _ = value.stride()
    batch, heads, tokens, head_dim = query.shape
    _, groups, keys, value_dim = value.shape
    y_token = heads * value_dim
    y_batch = tokens * y_token
    if (
        query_head == head_dim == value_dim
        and query_token == y_token
        and query.nbytes < LARGE
        and query_batch == y_batch
    ):
        y = empty_like(query)
    else:
        y = memory.tokens_first(query, value_dim)
    log_sum, sums = y, 0
    if saving:
        log_sum = query.new_empty(batch, heads, tokens, dtype=torch.float32)
        sums = log_sum.data_ptr()
    masked = mask_kind = mask_batch = mask_head = mask_token = 0
    if mask is not None:
        mask, mask_kind, full_mask = _masked(mask, torch.Size((batch, heads, tokens, keys)))
        masked = address(mask)
        mask_batch, mask_head, mask_token = _strides(full_mask)
    ends_q, ends_k, sequences = 0, 0, 1
    if cu_seqlens_q is not None:
        sequences = len(cu_seqlens_q) - 1
        cu_seqlens_q, cu_seqlens_k = contiguous(cu_seqlens_q), contiguous(cu_seqlens_k)
        ends_q, ends_k = address(cu_seqlens_q), address(cu_seqlens_k)
    threads, widths = get_num_threads(), (head_dim + 31 & -32) + (value_dim + 31 & -32)  # what csrc/blip3o.h asks for
    if (heads // groups if tokens == 1 else tokens) <= FEW and cu_seqlens_q is None:
        floats = 192 * widths + 4096
        workspace = scratch(threads * floats + (0 if keys <= PART else PARTS * FEW * (value_dim + 33)))
    else:
        padded, tasks = keys + 31 & -32, batch * sequences * groups
        if threads > tasks:
            threads = tasks or 1
        floats = padded * widths + 64 * (3 * (padded if padded < 128 else 128) + widths)
        workspace = scratch(threads * floats)
    # fmt: off
    status = _CPU_FORWARD(
        _PACK(
            y.data_ptr(), sums, query.data_ptr(), key.data_ptr(), value.data_ptr(), masked, ends_q, ends_k,
            workspace.data_ptr(), batch, heads, groups, tokens, keys, head_dim, value_dim, sequences, floats,
            y_batch, value_dim, y_token, query_batch, query_head, query_token, key_batch, key_head, key_token,
            value_batch, value_head, value_token, mask_batch, mask_head, mask_token, tokens, 1,  # log_sum's strides
            left, 0 if causal else right, softcap, scale, DTYPES[query.dtype], mask_kind, instruction_set(), threads, 0,
        )
    )
    # fmt: on
    if status:
        raise native.failed("attention", status)
    return y, log_sum


def backward(
    dy: Tensor,
    y: Tensor,
    log_sum: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if native.on_gpu(query):
        inputs = (query, key, value, mask, cu_seqlens_q, cu_seqlens_k)
        return backward_cuda(dy, y, log_sum, *inputs, causal, left, right, softcap, scale)
    query, key, value, dy, y = (last_adjacent(x) for x in (query, key, value, dy, y))
    log_sum = log_sum.contiguous()
    batch, heads, tokens, head_dim = query.shape
    _, groups, keys, value_dim = value.shape
    mask, mask_kind, full_mask = _masked(mask, torch.Size((batch, heads, tokens, keys)))
    gradients = memory.empty_like(query), memory.empty_like(key), memory.empty_like(value)
    cu_seqlens_q, cu_seqlens_k = contiguous(cu_seqlens_q), contiguous(cu_seqlens_k)
    sequences = 1 if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    threads = max(1, min(torch.get_num_threads(), batch * sequences * groups))
    padded, widths = _padded(keys, 32), _padded(head_dim, 32) + _padded(value_dim, 32)
    floats = padded * 2 * widths + 192 * (padded + min(padded, 128) + widths)
    workspace = memory.empty((threads * floats,), torch.float32)
    sizes = (batch, heads, groups, tokens, keys, head_dim, value_dim, sequences, floats)
    limits = (left, 0 if causal else right)
    options = (softcap, scale, DTYPES[query.dtype], mask_kind, instruction_set(), threads, 0)
    status = _CPU_BACKWARD(
        _PACK_BACKWARD(
            *_addresses(*gradients, dy, y, log_sum, query, key, value, mask, cu_seqlens_q, cu_seqlens_k, workspace),
            *sizes,
            *_strides(*gradients, dy, y, query, key, value, full_mask),
            tokens,  # log_sum's
            *limits,
            *options,
        )
    )
    if status:
        raise native.failed("attention", status)
    return gradients


def _parts(batch: int, heads: int, groups: int, tokens: int, keys: int) -> int:
    """Into how many parts a GPU cuts the keys of few queries; by shape alone, so results depend on nothing else."""
    rows, of = (heads // groups, groups) if tokens == 1 else (tokens, heads)
    blocks = batch * of * ((rows + 15) // 16)
    if rows > FEW_CUDA or not blocks:
        return 1
    return max(1, min((BLOCKS + blocks - 1) // blocks, keys // PART_CUDA, PARTS_CUDA))


def _packing(cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> tuple[Tensor | None, Tensor | None, int]:
    if cu_seqlens_q is None:
        return None, None, 1
    return cu_seqlens_q.contiguous(), contiguous(cu_seqlens_k), cu_seqlens_q.shape[0] - 1


def forward_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    scale: float,
    saving: bool = True,
) -> tuple[Tensor, Tensor]:
    query, key, value = last_adjacent(query), last_adjacent(key), last_adjacent(value)
    batch, heads, tokens, head_dim = query.shape
    _, groups, keys, value_dim = value.shape
    mask, mask_kind, full_mask = _masked(mask, torch.Size((batch, heads, tokens, keys)))
    cu_seqlens_q, cu_seqlens_k, sequences = _packing(cu_seqlens_q, cu_seqlens_k)
    y = tokens_first(query, value_dim)
    log_sum = query.new_empty(batch, heads, tokens, dtype=torch.float32) if saving else None
    parts = 1 if cu_seqlens_q is not None else _parts(batch, heads, groups, tokens, keys)
    floats = parts * batch * heads * tokens * (value_dim + 1) if parts > 1 else 0
    workspace = query.new_empty(floats, dtype=torch.float32)
    _CUDA_FORWARD(
        query,
        *_addresses(y, log_sum, query, key, value, mask, cu_seqlens_q, cu_seqlens_k, workspace),
        *(batch, heads, groups, tokens, keys, head_dim, value_dim, sequences, floats),
        *_strides(y, query, key, value, full_mask),
        *(tokens, 1, left, 0 if causal else right),  # log_sum's strides first
        *(softcap, scale, DTYPES[query.dtype], mask_kind),
    )
    return y, y if log_sum is None else log_sum


def backward_cuda(
    dy: Tensor,
    y: Tensor,
    log_sum: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, dy, y = (last_adjacent(x) for x in (query, key, value, dy, y))
    batch, heads, tokens, head_dim = query.shape
    _, groups, keys, value_dim = value.shape
    mask, mask_kind, full_mask = _masked(mask, torch.Size((batch, heads, tokens, keys)))
    cu_seqlens_q, cu_seqlens_k, sequences = _packing(cu_seqlens_q, cu_seqlens_k)
    gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    log_sum = log_sum.contiguous()
    floats = 2 * batch * heads * _padded(tokens, 128)
    workspace = query.new_empty(floats, dtype=torch.float32)
    _CUDA_BACKWARD(
        query,
        *_addresses(*gradients, dy, y, log_sum, query, key, value, mask, cu_seqlens_q, cu_seqlens_k, workspace),
        *(batch, heads, groups, tokens, keys, head_dim, value_dim, sequences, floats),
        *_strides(*gradients, dy, y, query, key, value, full_mask),
        *(tokens, left, 0 if causal else right),  # log_sum's stride first
        *(softcap, scale, DTYPES[query.dtype], mask_kind),
    )
    return gradients
