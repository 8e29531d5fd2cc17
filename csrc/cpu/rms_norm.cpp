// RMS normalisation on a CPU; the contract is kernels/blip3o_kernels/ops/rms_norm.py.
//
// Both directions are bound by memory once the rows leave the cache, so the backward pass recomputes 1/rms from x, which it
// reads anyway, instead of having the forward pass store it.
#ifndef BLIP3O_LANES
#define BLIP3O_BODY "rms_norm.cpp"
#include "instruction_sets.h"

extern "C" int blip3o_cpu_rms_norm(const blip3o_rms_norm_arguments* a) {
  BLIP3O_RUN(a->instruction_set, rms_norm(*a))
}

extern "C" int blip3o_cpu_rms_norm_backward(const blip3o_rms_norm_backward_arguments* a) {
  BLIP3O_RUN(a->instruction_set, rms_norm_backward(*a))
}

#else  // once per instruction set

enum Gain { NO_WEIGHT, ROUND_BEFORE_WEIGHT, ROUND_ONCE };

#include "normalise.h"

template <class T, class W, int GAIN>
static int forward(const blip3o_rms_norm_arguments& a) {
  const int64_t width = a.width, stride = a.stride, runs = (a.rows + GROUP - 1) / GROUP;
  const W* weight = static_cast<const W*>(a.weight);
  const Floats offset = all(a.offset);
  const int threads = blip3o_threads(a.threads, a.rows * width);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t start = run * GROUP;
    groups(a.rows - start < GROUP ? a.rows - start : GROUP, [&](int64_t offset_row, auto number) {
      constexpr int R = decltype(number)::value;
      const T* x = static_cast<const T*>(a.x) + (start + offset_row) * stride;
      T* y = static_cast<T*>(a.y) + (start + offset_row) * width;
      float rstds[R];
      moments<R, false>(rstds, static_cast<float*>(nullptr), x, stride, width, a.eps);
      Floats rstd[R];
      for (int r = 0; r < R; ++r) rstd[r] = all(rstds[r]);
      columns(width, [&](int64_t i, auto n) {
        const Floats gain = GAIN == NO_WEIGHT ? Floats{} : offset + load(weight + i, n);
        for (int r = 0; r < R; ++r) {
          ahead(x + (R + r) * stride + i);
          Floats v = load(x + r * stride + i, n) * rstd[r];
          if (GAIN == ROUND_BEFORE_WEIGHT) v = rounded<T>(v);
          store(y + r * width + i, GAIN == NO_WEIGHT ? v : v * gain, n);
        }
      });
    });
  }
  return BLIP3O_OK;
}

template <class T, class W>
static int run(const blip3o_rms_norm_arguments& a) {
  if (!a.weight) return forward<T, W, NO_WEIGHT>(a);
  return a.round_before_weight ? forward<T, W, ROUND_BEFORE_WEIGHT>(a) : forward<T, W, ROUND_ONCE>(a);
}

template <class T, class W>
static int run(const blip3o_rms_norm_backward_arguments& a) {
  const int64_t width = a.width;
  const int threads = blip3o_threads(a.threads, a.rows * width);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t block = 0; block < a.blocks; ++block) {
    float* sums = a.dweight ? a.partial + block * width : nullptr;
    if (sums) std::memset(sums, 0, sizeof(float) * static_cast<size_t>(width));
    const int64_t start = a.rows * block / a.blocks;
    groups(a.rows * (block + 1) / a.blocks - start, [&](int64_t offset_row, auto number) {
      const int64_t row = start + offset_row;
      rms_backward_rows<decltype(number)::value, T, W>(
          static_cast<T*>(a.dx) + row * width, sums, static_cast<const T*>(a.dy) + row * width, nullptr,
          static_cast<const T*>(a.x) + row * a.stride, a.stride, static_cast<const W*>(a.weight), a.offset, a.eps, width);
    });
  }
  if (a.dweight) add_up(static_cast<W*>(a.dweight), a.partial, a.blocks, width, width);
  return BLIP3O_OK;
}

template <class Arguments>
static int run_dtypes(const Arguments& a) {
  return by_dtypes(a.dtype, a.weight_dtype, [&](auto t, auto w) { return run<decltype(t), decltype(w)>(a); });
}

static int rms_norm(const blip3o_rms_norm_arguments& a) {
  return a.rows < 0 || a.width < 1 ? BLIP3O_BAD_ARGUMENT : run_dtypes(a);
}

static int rms_norm_backward(const blip3o_rms_norm_backward_arguments& a) {
  if (a.rows < 0 || a.width < 1 || a.blocks < 1 || (a.dweight && !(a.partial && a.weight))) return BLIP3O_BAD_ARGUMENT;
  return run_dtypes(a);
}

#endif
