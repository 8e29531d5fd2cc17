"""Operators of BLIP3-o with one meaning and several bodies: plain PyTorch, C++ for CPUs, CUDA and Triton for GPUs.

    from blip3o_kernels import rms_norm, use, explain

Each op is one word: `ops/<op>.py` is its contract, `OPS` the table of all of them.
"""

from .dispatch import BackendError, Op, explain, use
from .drop_in import PatchError, patch, register_attention, unpatch
from .memory import keep_freed_memory, keep_results, kept_results, release_results
from .ops import add_rms_norm as _add_rms_norm
from .ops import attention as _attention
from .ops import flow_interpolate as _flow_interpolate
from .ops import flow_loss as _flow_loss
from .ops import flow_step as _flow_step
from .ops import flow_timesteps as _flow_timesteps
from .ops import gated_residual as _gated_residual
from .ops import layer_norm as _layer_norm
from .ops import linear_cross_entropy as _linear_cross_entropy
from .ops import modulate as _modulate
from .ops import qk_norm_rope as _qk_norm_rope
from .ops import rms_norm as _rms_norm
from .ops import rope as _rope
from .ops import swiglu as _swiglu
from .ops import timestep_embedding as _timestep_embedding
from .ops.add_rms_norm import add_rms_norm
from .ops.attention import attention
from .ops.flow_interpolate import flow_interpolate
from .ops.flow_loss import flow_loss
from .ops.flow_step import flow_step
from .ops.flow_timesteps import flow_timesteps
from .ops.gated_residual import gated_residual
from .ops.layer_norm import layer_norm
from .ops.linear_cross_entropy import linear_cross_entropy
from .ops.modulate import modulate
from .ops.qk_norm_rope import qk_norm_rope
from .ops.rms_norm import rms_norm
from .ops.rope import rope, rope_table, rope_table_2d, rope_table_multimodal
from .ops.swiglu import swiglu
from .ops.timestep_embedding import timestep_embedding

OPS: tuple[Op, ...] = (
    _rms_norm.OP,
    _add_rms_norm.OP,
    _layer_norm.OP,
    _modulate.OP,
    _gated_residual.OP,
    _rope.OP,
    _qk_norm_rope.OP,
    _attention.OP,
    _swiglu.OP,
    _timestep_embedding.OP,
    _flow_timesteps.OP,
    _flow_interpolate.OP,
    _flow_loss.OP,
    _flow_step.OP,
    _linear_cross_entropy.OP,
)

__all__ = [
    "OPS",
    "BackendError",
    "Op",
    "PatchError",
    "add_rms_norm",
    "attention",
    "explain",
    "flow_interpolate",
    "flow_loss",
    "flow_step",
    "flow_timesteps",
    "gated_residual",
    "keep_freed_memory",
    "keep_results",
    "kept_results",
    "layer_norm",
    "linear_cross_entropy",
    "modulate",
    "patch",
    "qk_norm_rope",
    "register_attention",
    "release_results",
    "rms_norm",
    "rope",
    "rope_table",
    "rope_table_2d",
    "rope_table_multimodal",
    "swiglu",
    "timestep_embedding",
    "unpatch",
    "use",
]
