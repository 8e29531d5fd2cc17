// What the norms share: how a row is spread over threads, and sums over rows without atomics.
#pragma once

#include <cstring>
#include <type_traits>

#include "device.cuh"

namespace blip3o {

// 16 bytes as they lie in memory: held that way, elements of 16 bits take half the registers of their floats.
struct alignas(16) Packed {
  uint32_t word[4];
};

template <class T>
__device__ inline Packed load_packed(const T* p) {
  return *reinterpret_cast<const Packed*>(p);
}

template <class T>
__device__ inline Floats<16 / sizeof(T)> unpacked(const Packed& packed) {
  Floats<16 / sizeof(T)> floats;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = packed.word[i];
    if constexpr (sizeof(T) == 4) {
      floats.v[i] = __uint_as_float(word);
    } else if constexpr (std::is_same<T, bfloat16>::value) {
      floats.v[2 * i] = __uint_as_float(word << 16);
      floats.v[2 * i + 1] = __uint_as_float(word & 0xffff0000u);
    } else {
      T pair[2];
      memcpy(pair, &word, sizeof(word));
      floats.v[2 * i] = to_float(pair[0]);
      floats.v[2 * i + 1] = to_float(pair[1]);
    }
  }
  return floats;
}

template <class T>
__device__ inline void store_packed(T* p, const Packed& packed) {
  *reinterpret_cast<Packed*>(p) = packed;
}

template <class T>
__device__ inline Packed packed(const Floats<16 / sizeof(T)>& floats) {
  T values[16 / sizeof(T)];
#pragma unroll
  for (int i = 0; i < static_cast<int>(16 / sizeof(T)); ++i) values[i] = from_float<T>(floats.v[i]);
  Packed packed;
  memcpy(&packed, values, sizeof(packed));
  return packed;
}

// Columns that a thread keeps in registers.
template <int N, int CHUNKS>
struct Held {
  Floats<N> chunk[CHUNKS ? CHUNKS : 1];
};

// column(i, chunk) for each N columns from i that this thread owns: every THREADS * N columns a chunk, CHUNKS at most, or any
// number if CHUNKS is 0, and then `chunk` means nothing.
template <int THREADS, int N, int CHUNKS, class Column>
__device__ inline void for_columns(int64_t width, Column column) {
  if (CHUNKS) {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      const int64_t i = (static_cast<int64_t>(chunk) * THREADS + threadIdx.x) * N;
      if (i < width) column(i, chunk);
    }
  } else {
#pragma unroll 1
    for (int64_t i = threadIdx.x * N; i < width; i += THREADS * N) column(i, 0);
  }
}

// How a row is spread: THREADS for each of ROWS rows of a block, with N columns at a time.
template <int THREADS_, int ROWS_, int N_, int CHUNKS_>
struct RowShape {
  static constexpr int THREADS = THREADS_, ROWS = ROWS_, N = N_, CHUNKS = CHUNKS_;
};

// run(shape) with the shape for rows of that width; wide: whether every access may be one of 16 bytes.
template <class T, class Run>
int by_width(int64_t width, bool wide, Run run) {
  constexpr int N = 16 / sizeof(T);
  if (!wide) return run(RowShape<256, 1, 1, 0>());
  if (width <= 4 * 32 * N) return run(RowShape<32, 8, N, 4>());
  if (width <= 4 * 128 * N) return run(RowShape<128, 1, N, 4>());
  if (width <= 4 * 512 * N) return run(RowShape<512, 1, N, 4>());
  return run(RowShape<512, 1, N, 0>());
}

// The same for a pass that adds rows up: half the chunks, as the sums and the next row take registers too.
template <class T, class Run>
int by_width_adding(int64_t width, bool wide, Run run) {
  constexpr int N = 16 / sizeof(T);
  if (!wide) return run(RowShape<256, 1, 1, 0>());
  if (width <= 2 * 32 * N) return run(RowShape<32, 8, N, 2>());
  if (width <= 2 * 128 * N) return run(RowShape<128, 1, N, 2>());
  if (width <= 2 * 256 * N) return run(RowShape<256, 1, N, 2>());
  if (width <= 2 * 512 * N) return run(RowShape<512, 1, N, 2>());
  return run(RowShape<512, 1, N, 0>());
}

// Each of COUNT sums over the THREADS of a row, in every one of them, in an order that THREADS alone decides. `scratch` holds
// COUNT floats for each warp, and may be used again after the next __syncthreads().
template <int THREADS, int COUNT>
__device__ inline void row_sums(float (&x)[COUNT], float* scratch) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i)
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) x[i] += __shfl_xor_sync(0xffffffffu, x[i], lane);
  if constexpr (THREADS > 32) {
    if (threadIdx.x % 32 == 0)
#pragma unroll
      for (int i = 0; i < COUNT; ++i) scratch[threadIdx.x / 32 * COUNT + i] = x[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) x[i] = 0;
#pragma unroll
    for (int warp = 0; warp < THREADS / 32; ++warp)
#pragma unroll
      for (int i = 0; i < COUNT; ++i) x[i] += scratch[warp * COUNT + i];
  }
}

// 1 / sqrt(squares / count + eps), rounded once: a whole row shares the error of this one number.
__device__ inline float reciprocal_root(float squares, float count, float eps) {
  const float mean = squares / count, sum = mean + eps, added = sum - mean;
  // What rounding left in the quotient and in the sum.
  const float left = fmaf(-mean, count, squares) / count + ((mean - (sum - added)) + (eps - added));
  const float root = __frsqrt_rn(sum), product = sum * root;
  const float off = fmaf(-product, root, 1.0f) - (fmaf(sum, root, -product) + left * root) * root;  // 1 - (sum + left) * root^2
  const float better = fmaf(0.5f * off, root, root);
  return better == better ? better : root;  // which is infinite or 0, as the sum is 0 or infinite
}

constexpr int COLUMN_THREADS = 1024;  // at most

// Threads for column_sum: x columns, y for each. Few blocks take few threads, and more columns make up for it.
inline dim3 column_threads(int64_t blocks) {
  const unsigned y = static_cast<unsigned>(blocks < 1 ? 1 : blocks < 32 ? blocks : 32);
  return dim3(y > 8 ? 32 : 128, y);
}

// The sum over blocks of partial[block * stride], by the threads of one x: those of y take every blockDim.y-th block, then the one
// of y = 0, which alone has the result, adds them up. `group` is shared memory for COLUMN_THREADS floats.
__device__ inline float column_sum(const float* partial, bool exists, int64_t blocks, int64_t stride, float* group) {
  float sum = 0;
  if (exists) {
#pragma unroll 4
    for (int64_t block = threadIdx.y; block < blocks; block += blockDim.y) sum += partial[block * stride];
  }
  group[threadIdx.y * blockDim.x + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0)
    for (unsigned y = 1; y < blockDim.y; ++y) sum += group[y * blockDim.x + threadIdx.x];
  return sum;
}

// out[i] = sum over blocks of partial[block, i], rows of partial `stride` apart.
template <class W>
__global__ void __launch_bounds__(COLUMN_THREADS)
    sum_kernel(W* out, const float* partial, int64_t blocks, int64_t width, int64_t stride) {
  __shared__ float group[COLUMN_THREADS];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const float sum = column_sum(partial + column, column < width, blocks, stride, group);
  if (threadIdx.y == 0 && column < width) out[column] = from_float<W>(sum);
}

template <class W>
int sum_blocks(W* out, const float* partial, int64_t blocks, int64_t width, int64_t stride, void* stream) {
  const dim3 threads = column_threads(blocks);
  const int64_t parts = (width + threads.x - 1) / threads.x;
  if (parts > 0x7fffffff) return BLIP3O_BAD_ARGUMENT;
  return launch(sum_kernel<W>, static_cast<unsigned>(parts), threads, 0, stream, out, partial, blocks, width, stride);
}

// run(T(), W()) with the types of those codes; W is T or float.
template <class Run>
int by_dtypes(int dtype, int weight_dtype, Run run) {
  return by_dtype(dtype, [&](auto t) -> int {
    if (weight_dtype == dtype) return run(t, t);
    return weight_dtype == BLIP3O_FLOAT32 ? run(t, float()) : static_cast<int>(BLIP3O_BAD_DTYPE);
  });
}

}  // namespace blip3o
