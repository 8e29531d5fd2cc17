"""Rounding to the dtype of a pointer, to nearest even."""

import triton
import triton.language as tl

from . import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def rounded(x, pointer):
    """float32 x in the pointer's dtype. Triton's interpreter cuts bfloat16 off, so there the bits are rounded first."""
    if _INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(pointer.dtype.element_ty)
