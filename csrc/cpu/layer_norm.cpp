// Layer normalisation on a CPU; the contract is kernels/blip3o_kernels/ops/layer_norm.py. One pass each way, as in modulate.cpp.
#ifndef BLIP3O_LANES
#define BLIP3O_BODY "layer_norm.cpp"
#include "instruction_sets.h"

extern "C" int blip3o_cpu_layer_norm(const blip3o_layer_norm_arguments* a) { BLIP3O_RUN(a->instruction_set, layer_norm(*a)) }

extern "C" int blip3o_cpu_layer_norm_backward(const blip3o_layer_norm_backward_arguments* a) {
  BLIP3O_RUN(a->instruction_set, layer_norm_backward(*a))
}

#else  // once per instruction set

#include "normalise.h"

template <class T, class W>
static int run(const blip3o_layer_norm_arguments& a) {
  const int64_t width = a.width, stride = a.stride, rows = a.rows, runs = (rows + GROUP - 1) / GROUP;
  const W* weight = static_cast<const W*>(a.weight);
  const W* bias = static_cast<const W*>(a.bias);
  const bool past = past_caches(static_cast<T*>(a.y), rows * width, width);
  const int threads = blip3o_threads(a.threads, rows * width);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t start = run * GROUP;
    groups(rows - start < GROUP ? rows - start : GROUP, [&](int64_t offset_row, auto number) {
      constexpr int R = decltype(number)::value;
      const int64_t row = start + offset_row;
      const T* x = static_cast<const T*>(a.x) + row * stride;
      T* y = static_cast<T*>(a.y) + row * width;
      float rstds[R], means[R];
      moments<R, true>(rstds, means, x, stride, width, a.eps);
      Floats rstd[R], mean[R];
      for (int r = 0; r < R; ++r) {
        rstd[r] = all(rstds[r]);
        mean[r] = all(means[r]);
        if (a.saved) {
          a.saved[row + r] = rstds[r];
          a.saved[rows + row + r] = means[r];
        }
      }
      columns(width, [&](int64_t i, auto n) {
        const Floats gain = weight ? load(weight + i, n) : all(1.0f);
        const Floats offset = bias ? load(bias + i, n) : Floats{};
        for (int r = 0; r < R; ++r) {
          ahead(x + (R + r) * stride + i);
          const Floats v = load(x + r * stride + i, n);
          store(y + r * width + i, (v - mean[r]) * rstd[r] * gain + offset, n, past);
        }
      });
      if (past) fence();
    });
  }
  return BLIP3O_OK;
}

template <class T, class W>
static int run(const blip3o_layer_norm_backward_arguments& a) {
  const int64_t width = a.width, stride = a.stride, rows = a.rows;
  const W* weight = static_cast<const W*>(a.weight);
  const int threads = blip3o_threads(a.threads, rows * width);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t block = 0; block < a.blocks; ++block) {
    float* gain = a.workspace + block * 3 * width;
    float* scaled = gain + width;
    float* plain = scaled + width;
    columns(width, [&](int64_t i, auto n) {
      store(gain + i, weight ? load(weight + i, n) : all(1.0f), n);
      store(scaled + i, Floats{}, n);
      store(plain + i, Floats{}, n);
    });
    const int64_t start = rows * block / a.blocks;
    groups(rows * (block + 1) / a.blocks - start, [&](int64_t offset_row, auto number) {
      const int64_t row = start + offset_row;
      backward_rows<decltype(number)::value, true>(
          static_cast<T*>(a.dx) + row * width, scaled, plain, false, static_cast<const T*>(a.dy) + row * width,
          static_cast<const T*>(a.x) + row * stride, stride, gain, a.saved + row, a.saved + rows + row, width);
    });
  }
  if (a.dweight) add_up(static_cast<W*>(a.dweight), a.workspace + width, a.blocks, 3 * width, width);
  if (a.dbias) add_up(static_cast<W*>(a.dbias), a.workspace + 2 * width, a.blocks, 3 * width, width);
  return BLIP3O_OK;
}

template <class Arguments>
static int run_dtypes(const Arguments& a) {
  return by_dtypes(a.dtype, a.weight_dtype, [&](auto t, auto w) { return run<decltype(t), decltype(w)>(a); });
}

static int layer_norm(const blip3o_layer_norm_arguments& a) {
  return a.rows < 0 || a.width < 1 ? BLIP3O_BAD_ARGUMENT : run_dtypes(a);
}

static int layer_norm_backward(const blip3o_layer_norm_backward_arguments& a) {
  return a.rows < 0 || a.width < 1 || a.blocks < 1 ? BLIP3O_BAD_ARGUMENT : run_dtypes(a);
}

#endif
