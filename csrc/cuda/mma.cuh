// The primitives of matrix kernels, from sm_80 on: asynchronous copies into shared memory, ldmatrix, mma, and the approximate
// functions of the special function unit. On the host they are csrc/host/warp.cpp.
#pragma once

#include <cmath>
#include <type_traits>

#include "device.cuh"
#ifndef __CUDACC__
#include "../host/warp.h"
#endif

namespace blip3o {

// Copies SIZE (4 or 16) bytes to shared memory, both addresses multiples of SIZE; without `valid` it writes zeros and reads nothing.
// They are there after a wait by this thread, and for other threads after a barrier as well.
template <int SIZE>
__device__ inline void cp_async(void* to, const void* from, bool valid) {
  static_assert(SIZE == 4 || SIZE == 16, "");
#ifdef __CUDACC__
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const int bytes = valid ? SIZE : 0;
  if constexpr (SIZE == 16)  // past the first cache: what a block copies, it reads once
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
#else
  host::cp_async(to, from, SIZE, valid);
#endif
}

// Ends a group: the copies of this thread since the last one.
__device__ inline void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  host::cp_async_commit();
#endif
}

// Waits for all groups of this thread but the last GROUPS.
template <int GROUPS>
__device__ inline void cp_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
#else
  host::cp_async_wait(GROUPS);
#endif
}

// Four 8 x 8 matrices of 16-bit elements: lane 8 m + r gives the address of row r of matrix m, 16 bytes. Of matrix m, lane l gets the
// elements 2 (l % 4) and the next of row l / 4 in to[m]; TRANSPOSED, of column l / 4.
template <bool TRANSPOSED = false>
__device__ inline void ldmatrix(uint32_t (&to)[4], const void* row) {
#ifdef __CUDACC__
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
#else
  host::ldmatrix(to, row, TRANSPOSED);
#endif
}

// c [16, 8] += a [16, 16] b [16, 8] of a warp, a and b of type T, two elements a word, c in float32. With g = lane / 4 and q = lane % 4,
// a lane has a: rows g, g + 8, g, g + 8 at columns 2 q, 2 q, 2 q + 8, 2 q + 8 and the next; b: column g at rows 2 q, 2 q + 8 and the
// next; c: row g at columns 2 q and the next, then row g + 8.
template <class T>
__device__ inline void mma(float& c0, float& c1, float& c2, float& c3, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  constexpr bool BFLOAT16 = std::is_same<T, bfloat16>::value;
#ifdef __CUDACC__
  if constexpr (BFLOAT16)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  host::mma(&c0, &c1, &c2, &c3, a, b0, b1, BFLOAT16);
#endif
}

// Two floats rounded to T in one word, `low` in its lower half.
template <class T>
__device__ inline uint32_t pack(float low, float high) {
#ifdef __CUDACC__
  uint32_t word;
  if constexpr (std::is_same<T, bfloat16>::value)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return static_cast<uint32_t>(from_float<T>(high).bits) << 16 | from_float<T>(low).bits;
#endif
}

// 2^x to 2 units in the last place, in one instruction; below 2^-126 it is 0.
__device__ inline float fast_exp2(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
#endif
}

// 1 / x to 1 unit in the last place.
__device__ inline float fast_reciprocal(float x) {
#ifdef __CUDACC__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

}  // namespace blip3o
