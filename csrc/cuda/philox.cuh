// Counter-based random numbers on a GPU; kernels/blip3o_kernels/philox.py says what they are.
//
// Every operation is one that the compiler may not fuse with another: an element's noise has the same bits in every kernel, and those
// of noise that was drawn and stored.
#pragma once

#include "sinusoids.cuh"

namespace blip3o {

// On (0, 1). The word's upper 23 bits make a number in [1, 2); what is taken off it leaves an odd multiple of 2^-24, exactly.
__device__ inline float uniform(uint32_t word) {
  return __fadd_rn(__uint_as_float(word >> 9 | 0x3f800000u), -0x1.fffffep-1f);
}

// -2 log v of a normal number in (0, 1), to about one unit in the last place: vector.h's logarithm, all its numbers times -2.
__device__ inline float twice_logarithm(float v) {
  const int from = static_cast<int>(__float_as_uint(v) - 0x3f3504f3u);  // from sqrt(1/2)
  const float n = static_cast<float>(from >> 23);
  const float f = __fadd_rn(__uint_as_float((static_cast<uint32_t>(from) & 0x007fffffu) + 0x3f3504f3u), -1.0f);  // v = 2^n (1 + f)
  const float square = __fmul_rn(f, f);
  float p = fmaf(-2 * 7.0376836292e-2f, f, 2 * 1.1514610310e-1f);
  p = fmaf(p, f, -2 * 1.1676998740e-1f);
  p = fmaf(p, f, 2 * 1.2420140846e-1f);
  p = fmaf(p, f, -2 * 1.4249322787e-1f);
  p = fmaf(p, f, 2 * 1.6668057665e-1f);
  p = fmaf(p, f, -2 * 2.0000714765e-1f);
  p = fmaf(p, f, 2 * 2.4999993993e-1f);
  p = fmaf(p, f, -2 * 3.3333331174e-1f);
  p = fmaf(__fmul_rn(p, f), square, __fmul_rn(n, 2 * 2.12194440e-4f));  // log 2 in two parts
  return fmaf(n, -2 * 0.693359375f, fmaf(f, -2.0f, __fadd_rn(square, p)));
}

// A pair of standard normals.
__device__ inline void normals(uint32_t word0, uint32_t word1, float& normal0, float& normal1) {
  const float radius = quick_root(twice_logarithm(uniform(word0)));
  const float u = uniform(word1), shifted = fmaf(u, 4.0f, 0x1.8p23f);  // the sum's last bits are the nearest quarter
  const float rest = fmaf(__fadd_rn(shifted, -0x1.8p23f), -0.25f, u);  // exact
  sinusoids(__fmul_rn(rest, 6.28318531f), __float_as_uint(shifted), normal0, normal1);
  normal0 = __fmul_rn(radius, normal0), normal1 = __fmul_rn(radius, normal1);
}

// The part of key and counter that one call of an op has in common, made where it is launched: a key of each round is an operand
// of the instruction that takes it.
struct Philox {
  uint32_t low[10], high[10], last;

  Philox(int64_t seed, int stream, int draw) : last(static_cast<uint32_t>(stream) << 24 | static_cast<uint32_t>(draw)) {
    for (uint32_t round = 0; round < 10; ++round) {
      low[round] = static_cast<uint32_t>(seed) + round * 0x9E3779B9u;
      high[round] = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32) + round * 0xBB67AE85u;
    }
  }

  // The words of elements 4 group .. 4 group + 3 of the sample at `position`.
  __device__ void words(uint32_t group, int64_t position, uint32_t (&w)[4]) const {
    uint32_t c0 = group, c1 = static_cast<uint32_t>(position), c3 = last;
    uint32_t c2 = static_cast<uint32_t>(static_cast<uint64_t>(position) >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint64_t product0 = wide_product(c0, 0xD2511F53u), product1 = wide_product(c2, 0xCD9E8D57u);
      c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ low[round];
      c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ high[round];
      c1 = static_cast<uint32_t>(product1), c3 = static_cast<uint32_t>(product0);
    }
    w[0] = c0, w[1] = c1, w[2] = c2, w[3] = c3;
  }

  // The noise of elements first .. first + N - 1; first and N are divisible by 4, or N is 1.
  template <int N>
  __device__ Floats<N> noise(int64_t first, int64_t position) const {
    Floats<N> z;
    uint32_t w[4];
    if constexpr (N == 1) {
      words(static_cast<uint32_t>(first / 4), position, w);
      float even, odd;
      normals(first & 2 ? w[2] : w[0], first & 2 ? w[3] : w[1], even, odd);
      z.v[0] = first & 1 ? odd : even;
    } else {
#pragma unroll
      for (int k = 0; k < N; k += 4) {
        words(static_cast<uint32_t>((first + k) / 4), position, w);
        normals(w[0], w[1], z.v[k], z.v[k + 1]);
        normals(w[2], w[3], z.v[k + 2], z.v[k + 3]);
      }
    }
    return z;
  }
};

// The arguments of an op that draws.
template <class Arguments, int STREAM>
struct Drawing : Arguments {
  Philox philox;
  explicit Drawing(const Arguments& a) : Arguments(a), philox(a.seed, STREAM, a.draw) {}
};

}  // namespace blip3o
