// The kernels of rms_norm and add_rms_norm, which differ by the sum before the norm and the gradient added after it.
//
// A row is read once and stays in registers while its sum of squares is found: CHUNKS times N columns a thread. Longer rows
// (CHUNKS 0) are read twice, the second time from a cache. Short rows take a warp each, several in a block. The backward pass
// recomputes 1/rms for the same reason as on a CPU: it reads x anyway. No atomics: a block owns a run of rows and sums their
// dweight in registers, sum_blocks adds the runs up in order.
#pragma once

#include "rows.cuh"

namespace blip3o {

template <class Arguments>
constexpr bool ADDS = std::is_same<Arguments, blip3o_add_rms_norm_arguments>::value ||
                      std::is_same<Arguments, blip3o_add_rms_norm_backward_arguments>::value;

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
  const float rstd = __frsqrt_rn(block_sum<THREADS>(square, scratch) / static_cast<float>(a.width) + a.eps);
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

// With u = dy * gain and c = rstd^3 / width * sum(u * x):   dx = u * rstd - x * c,   dweight = sum over rows of dy * x * rstd.
// CHUNKS: how many times N columns a thread may own, so that their sums stay in registers; 0: any number, they live in `partial`.
template <int THREADS, int N, int CHUNKS, class T, class W, class Arguments>
__global__ void __launch_bounds__(THREADS, 512 / THREADS) rms_backward(Arguments a) {
  __shared__ float scratch[2][32];
  const W* weight = static_cast<const W*>(a.weight);
  float* partial = a.dweight ? a.partial + blockIdx.x * a.width : nullptr;
  Held<N, CHUNKS> sums = {};
  if (partial && !CHUNKS)
    for_columns<THREADS, N, 0>(a.width, [&](int64_t i, int) { store<N>(partial + i, Floats<N>{}); });

  const int64_t last = a.rows * (blockIdx.x + 1) / a.blocks;
  for (int64_t row = a.rows * blockIdx.x / a.blocks; row < last; ++row) {
    const T *x, *dadded = nullptr;
    if constexpr (ADDS<Arguments>) {
      x = static_cast<const T*>(a.added) + row * a.width;
      if (a.dadded) dadded = static_cast<const T*>(a.dadded) + row * a.width;
    } else {
      x = static_cast<const T*>(a.x) + row * a.stride;
    }
    const T* dy = static_cast<const T*>(a.dy) + row * a.width;
    T* dx = static_cast<T*>(a.dx) + row * a.width;
    float square = 0, dot = 0;
    for_columns<THREADS, N, 0>(a.width, [&](int64_t i, int) {
      const Floats<N> v = load<N>(x + i), g = load<N>(dy + i), gain = load_gain<N>(weight, i, a.offset);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        square += v.v[k] * v.v[k];
        dot += g.v[k] * gain.v[k] * v.v[k];
      }
    });
    square = block_sum<THREADS>(square, scratch[0]);
    dot = block_sum<THREADS>(dot, scratch[1]);  // the barrier inside lets the next row write scratch[0] again
    const float rstd = __frsqrt_rn(square / static_cast<float>(a.width) + a.eps);
    const float c = dot * rstd * rstd * rstd / static_cast<float>(a.width);
    for_columns<THREADS, N, CHUNKS>(a.width, [&](int64_t i, int chunk) {
      const Floats<N> v = load<N>(x + i), g = load<N>(dy + i), gain = load_gain<N>(weight, i, a.offset);
      const Floats<N> more = ADDS<Arguments> && dadded ? load<N>(dadded + i) : Floats<N>{};
      Floats<N>& sum = sums.chunk[CHUNKS ? chunk : 0];
      if (!CHUNKS && partial) sum = load<N>(partial + i);
      Floats<N> d;
#pragma unroll
      for (int k = 0; k < N; ++k) {
        d.v[k] = g.v[k] * gain.v[k] * rstd - v.v[k] * c + more.v[k];
        sum.v[k] += g.v[k] * (v.v[k] * rstd);
      }
      store<N>(dx + i, d);
      if (!CHUNKS && partial) store<N>(partial + i, sum);
    });
  }
  if (partial && CHUNKS)
    for_columns<THREADS, N, CHUNKS>(a.width, [&](int64_t i, int chunk) { store<N>(partial + i, sums.chunk[chunk]); });
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

template <class T, class W, class Arguments>
int run_backward(const Arguments& a, bool wide) {
  if (a.blocks > 0x7fffffff) return BLIP3O_BAD_ARGUMENT;
  const int status = by_width<T>(a.width, wide, [&](auto shape) {
    using Shape = decltype(shape);
    return launch(rms_backward<Shape::THREADS, Shape::N, Shape::CHUNKS, T, W, Arguments>, static_cast<unsigned>(a.blocks),
                  Shape::THREADS, 0, a.stream, a);
  });
  if (status || !a.dweight) return status;
  return sum_blocks(static_cast<W*>(a.dweight), a.partial, a.blocks, a.width, a.width, a.stream);
}

}  // namespace blip3o
