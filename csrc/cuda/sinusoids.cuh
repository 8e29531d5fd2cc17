// Sine and cosine from what is left of an angle after whole quarters of a turn, with the polynomials of csrc/cpu/vector.h.
// Every operation is one that the compiler may not fuse with another: the same bits in every kernel.
#pragma once

#include "device.cuh"

namespace blip3o {

// Of rest + quarter pi / 2, |rest| <= pi / 4, to about one unit in the last place.
__device__ inline void sinusoids(float rest, uint32_t quarter, float& cosine, float& sine) {
  const float square = __fmul_rn(rest, rest);
  float c = fmaf(2.443315711809948e-5f, square, -1.388731625493765e-3f);
  c = fmaf(c, square, 4.166664568298827e-2f);
  c = fmaf(c, __fmul_rn(square, square), fmaf(square, -0.5f, 1.0f));
  float s = fmaf(-1.9515295891e-4f, square, 8.3321608736e-3f);
  s = fmaf(s, square, -1.6666654611e-1f);
  s = fmaf(s, __fmul_rn(square, rest), rest);
  const bool odd = quarter & 1u;
  cosine = __uint_as_float(__float_as_uint(odd ? s : c) ^ (((quarter + 1u) << 30) & 0x80000000u));
  sine = __uint_as_float(__float_as_uint(odd ? c : s) ^ ((quarter << 30) & 0x80000000u));
}

}  // namespace blip3o
