// The hardware primitives that the kernels use: 16-byte loads, conversions, sums over a warp and over a block.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "../host/device.h"
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../blip3o.h"

namespace blip3o {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(float16 x) { return __half2float(x); }

template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) { return x; }
template <>
__device__ inline bfloat16 from_float<bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ inline float16 from_float<float16>(float x) { return __float2half_rn(x); }

// The square root of a normal number to about one unit in the last place, in one instruction.
__device__ inline float quick_root(float x) {
#ifdef __CUDACC__
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
#else
  return std::sqrt(x);
#endif
}

// All 64 bits of a product, in one instruction: of 64-bit factors whose upper halves are 0, nvcc adds those zeros.
__device__ inline uint64_t wide_product(uint32_t a, uint32_t b) {
#ifdef __CUDACC__
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

// N consecutive elements as floats. With N > 1 the address is a multiple of min(16, N * sizeof(T)) bytes.
template <int N>
struct Floats {
  static constexpr int size = N;
  float v[N];
};

template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Stored {
  T v[N];
};

template <int N, class T>
__device__ inline Floats<N> load(const T* p) {
  const Stored<T, N> stored = *reinterpret_cast<const Stored<T, N>*>(p);
  Floats<N> floats;
#pragma unroll
  for (int i = 0; i < N; ++i) floats.v[i] = to_float(stored.v[i]);
  return floats;
}

// In accesses of 16 bytes or of 8: nvcc takes the store of a struct apart word by word, but not that of an integer.
template <class T, int N>
__device__ inline void put(T* p, const Stored<T, N>& stored) {
  constexpr int BYTES = sizeof(stored);
  using Whole = std::conditional_t<BYTES == 8, uint64_t, unsigned __int128>;
  constexpr int WORDS = sizeof(Whole) / 4;
  if constexpr (BYTES % sizeof(Whole) == 0) {
    uint32_t words[BYTES / 4];
    memcpy(words, &stored, BYTES);
#pragma unroll
    for (int i = 0; i < BYTES / 4; i += WORDS) {
      Whole whole = 0;
#pragma unroll
      for (int j = WORDS; j-- > 0;) whole = whole << 32 | words[i + j];
      reinterpret_cast<Whole*>(p)[i / WORDS] = whole;
    }
  } else {
    *reinterpret_cast<Stored<T, N>*>(p) = stored;
  }
}

template <int N, class T>
__device__ inline void store(T* p, const Floats<N>& floats) {
  Stored<T, N> stored;
#pragma unroll
  for (int i = 0; i < N; ++i) stored.v[i] = from_float<T>(floats.v[i]);
  put(p, stored);
}

// The sum over all threads of the block, in every thread, in an order that the block's size alone decides. `scratch` holds 32
// floats of shared memory and may be used again after the next __syncthreads().
template <int THREADS>
__device__ inline float block_sum(float x, float* scratch) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
  if (THREADS == 32) return x;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0;
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; ++warp) total += scratch[warp];
  return total;
}

// Whether all addresses are multiples of 16 bytes, and all sizes and strides multiples of N.
template <class... Pointers>
bool aligned(const Pointers*... p) {
  return ((reinterpret_cast<uintptr_t>(p) % 16 == 0) && ...);
}
template <int N, class... Sizes>
bool divisible(Sizes... sizes) {
  return ((sizes % N == 0) && ...);
}

// run(T()) with the type of that code.
template <class Run>
int by_dtype(int dtype, Run run) {
  switch (dtype) {
    case BLIP3O_FLOAT32: return run(float());
    case BLIP3O_BFLOAT16: return run(bfloat16());
    case BLIP3O_FLOAT16: return run(float16());
    default: return BLIP3O_BAD_DTYPE;
  }
}

// The launch's dynamic shared memory, at a multiple of 1024 bytes, as TMA's swizzle wants it.
__device__ inline char* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ __align__(1024) char memory[];
  return memory;
#else
  return host::dynamic_shared();
#endif
}

// Remembers a launch's error for blip3o_cuda_error and turns it into a status.
int launched();

// kernel<<<blocks, threads, shared, stream>>>(arguments...), which is no C++. `shared`: bytes of dynamic shared memory; above 48 KiB
// a kernel has to be told once.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared, void* stream, Arguments... arguments) {
  if (shared > 48 << 10) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
#ifdef __CUDACC__
  kernel<<<blocks, threads, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
#else
  (void)stream;
  host::run(reinterpret_cast<const void*>(kernel), blocks, threads, shared, [&] { kernel(arguments...); });
#endif
  return launched();
}

}  // namespace blip3o
