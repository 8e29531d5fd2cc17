"""How every Triton kernel loads, rounds and multiplies: in float32, on a GPU and in Triton's interpreter alike.

Triton's interpreter keeps bfloat16 as bit patterns: it multiplies them as such in `tl.dot`, and cuts float32 off to
make them. So kernels do no arithmetic on bfloat16; they load and round with the functions of this file, which have a
branch for the interpreter.
"""

import triton
import triton.language as tl

from . import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def wide(pointer, mask):
    """What `pointer` points to, in float32; 0 outside the mask."""
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def rounded(x, pointer):
    """float32 x in the pointer's dtype, to nearest even."""
    if _INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)  # NaN stays NaN
    return x.to(pointer.dtype.element_ty)


@triton.jit
def product(a, b, sums):
    """sums + a b in float32, of a and b in the dtype they are stored in; float32 is not cut to TF32."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")
