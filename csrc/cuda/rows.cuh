// What the norms share: how a row is spread over threads, and sums over rows without atomics.
#pragma once

#include "device.cuh"

namespace blip3o {

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

// out[i] = sum over blocks of partial[block, i], rows of partial `stride` apart: 32 columns by 8 groups of blocks, in order.
template <class W>
__global__ void __launch_bounds__(256) sum_kernel(W* out, const float* partial, int64_t blocks, int64_t width, int64_t stride) {
  __shared__ float group[8][32];
  const int64_t column = blockIdx.x * 32 + threadIdx.x;
  float sum = 0;
  if (column < width)
    for (int64_t block = threadIdx.y; block < blocks; block += 8) sum += partial[block * stride + column];
  group[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y || column >= width) return;
#pragma unroll
  for (int y = 1; y < 8; ++y) sum += group[y][threadIdx.x];
  out[column] = from_float<W>(sum);
}

template <class W>
int sum_blocks(W* out, const float* partial, int64_t blocks, int64_t width, int64_t stride, void* stream) {
  const int64_t parts = (width + 31) / 32;
  if (parts > 0x7fffffff) return BLIP3O_BAD_ARGUMENT;
  return launch(sum_kernel<W>, static_cast<unsigned>(parts), dim3(32, 8), 0, stream, out, partial, blocks, width, stride);
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
