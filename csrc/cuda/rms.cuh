// The kernels of rms_norm and add_rms_norm, which differ by the sum before the norm and the gradient added after it.
//
// A row is read once and stays in registers while its sum of squares is found: CHUNKS times N columns a thread. Longer rows
// (CHUNKS 0) are read twice, the second time from a cache. Short rows take a warp each, several in a block. The backward pass is
// that of all norms; it recomputes 1/rms for the same reason as on a CPU: it reads x anyway.
#pragma once

#include "norm.cuh"

namespace blip3o {

template <class Arguments>
constexpr bool ADDS = std::is_same<Arguments, blip3o_add_rms_norm_arguments>::value;

// Whether there is a weight, and what is rounded when, is the same for all threads: a branch costs nothing beside the loads, and a
// kernel per case would multiply the time to compile.

// offset + weight, or 1 without a weight.
template <int N, class W>
__device__ inline Floats<N> load_gain(const W* weight, int64_t i, float offset) {
  Floats<N> gain;
  if (weight) gain = load<N>(weight + i);
#pragma unroll
  for (int k = 0; k < N; ++k) gain.v[k] = weight ? offset + gain.v[k] : 1.0f;
  return gain;
}

template <int THREADS, int ROWS, int N, int CHUNKS, class T, class W, class Arguments>
__global__ void __launch_bounds__(THREADS* ROWS) rms_forward(Arguments a) {
  __shared__ float scratch[32];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * ROWS + threadIdx.y;
  if (ROWS > 1 && row >= a.rows) return;  // only where a row is a warp, and no barrier follows
  const T* x = static_cast<const T*>(a.x) + row * a.stride;
  T* y = static_cast<T*>(a.y) + row * a.width;
  const W* weight = static_cast<const W*>(a.weight);
  const bool round_before_weight = weight && a.round_before_weight;

  const auto input = [&](int64_t i) {
    Floats<N> v = load<N>(x + i);
    if constexpr (ADDS<Arguments>) {
      const Floats<N> r = load<N>(static_cast<const T*>(a.residual) + row * a.residual_stride + i);
#pragma unroll
      for (int k = 0; k < N; ++k) v.v[k] = to_float(from_float<T>(v.v[k] + r.v[k]));
      store<N>(static_cast<T*>(a.added) + row * a.width + i, v);
    }
    return v;
  };
  const auto again = [&](int64_t i) {
    if constexpr (ADDS<Arguments>) return load<N>(static_cast<const T*>(a.added) + row * a.width + i);
    return load<N>(x + i);
  };

  Held<N, CHUNKS> held;
  float square = 0;
  for_columns<THREADS, N, CHUNKS>(a.width, [&](int64_t i, int chunk) {
    const Floats<N> v = input(i);
#pragma unroll
    for (int k = 0; k < N; ++k) square += v.v[k] * v.v[k];
    if (CHUNKS) held.chunk[chunk] = v;
  });
  const float rstd = reciprocal_root(block_sum<THREADS>(square, scratch), static_cast<float>(a.width), a.eps);
  for_columns<THREADS, N, CHUNKS>(a.width, [&](int64_t i, int chunk) {
    Floats<N> v = CHUNKS ? held.chunk[chunk] : again(i);
    const Floats<N> gain = load_gain<N>(weight, i, a.offset);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      v.v[k] *= rstd;
      if (round_before_weight) v.v[k] = to_float(from_float<T>(v.v[k]));
      v.v[k] *= gain.v[k];
    }
    store<N>(y + i, v);
  });
}

// Launchers

template <class T, class W, class Arguments>
int run_forward(const Arguments& a, bool wide) {
  return by_width<T>(a.width, wide, [&](auto shape) {
    using Shape = decltype(shape);
    const int64_t blocks = (a.rows + Shape::ROWS - 1) / Shape::ROWS;
    if (blocks > 0x7fffffff) return static_cast<int>(BLIP3O_BAD_ARGUMENT);
    return launch(rms_forward<Shape::THREADS, Shape::ROWS, Shape::N, Shape::CHUNKS, T, W, Arguments>,
                  static_cast<unsigned>(blocks), dim3(Shape::THREADS, Shape::ROWS), 0, a.stream, a);
  });
}

// The backward pass for x, whose rows are `stride` apart. more: what is added to its gradient, or null.
template <class Arguments>
int run_backward(const Arguments& a, const void* x, int64_t stride, const void* more) {
  if (a.rows < 0 || a.width < 1 || a.blocks < 1 || (a.dweight && !(a.partial && a.weight))) return BLIP3O_BAD_ARGUMENT;
  NormBackward b = {};
  b.dx = a.dx, b.dy = a.dy, b.x = x, b.more = more, b.weight = a.weight;
  b.partial = a.dweight ? a.partial : nullptr;
  b.batch = 1, b.tokens = a.rows, b.width = a.width, b.stride = stride, b.runs = a.blocks;
  b.eps = a.eps, b.weight_offset = a.offset;
  b.dtype = b.condition_dtype = a.dtype, b.weight_dtype = a.weight_dtype;
  b.stream = a.stream;
  const int status = rms_backward(b);
  if (status || !a.dweight) return status;
  return by_dtype(a.weight_dtype, [&](auto w) {
    return sum_blocks(static_cast<decltype(w)*>(a.dweight), a.partial, a.blocks, a.width, a.width, a.stream);
  });
}

}  // namespace blip3o
