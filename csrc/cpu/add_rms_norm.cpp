// Residual addition and RMS normalisation on a CPU; the contract is kernels/blip3o_kernels/ops/add_rms_norm.py.
//
// A group of rows stays in the first cache between the sum and the norm. As in rms_norm.cpp the backward pass recomputes
// 1/rms, here from the sum, which it reads anyway.
#ifndef BLIP3O_LANES
#define BLIP3O_BODY "add_rms_norm.cpp"
#include "instruction_sets.h"

extern "C" int blip3o_cpu_add_rms_norm(const blip3o_add_rms_norm_arguments* a) {
  BLIP3O_RUN(a->instruction_set, add_rms_norm(*a))
}

extern "C" int blip3o_cpu_add_rms_norm_backward(const blip3o_add_rms_norm_backward_arguments* a) {
  BLIP3O_RUN(a->instruction_set, add_rms_norm_backward(*a))
}

#else  // once per instruction set

#include "normalise.h"

template <class T, class W>
static int run(const blip3o_add_rms_norm_arguments& a) {
  const int64_t width = a.width, stride = a.stride, residual_stride = a.residual_stride;
  const int64_t runs = (a.rows + GROUP - 1) / GROUP;
  const W* weight = static_cast<const W*>(a.weight);
  const bool round_before_weight = a.round_before_weight && weight;
  const Floats offset = all(a.offset);
  const int threads = blip3o_threads(a.threads, a.rows * width);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t start = run * GROUP;
    groups(a.rows - start < GROUP ? a.rows - start : GROUP, [&](int64_t offset_row, auto number) {
      constexpr int R = decltype(number)::value;
      const int64_t row = start + offset_row;
      const T* x = static_cast<const T*>(a.x) + row * stride;
      const T* residual = static_cast<const T*>(a.residual) + row * residual_stride;
      T* added = static_cast<T*>(a.added) + row * width;
      T* y = static_cast<T*>(a.y) + row * width;
      RowSums<R> squares;
      Floats rstd[R];
      columns(width, [&](int64_t i, auto n) {
        for (int r = 0; r < R; ++r) {
          const Floats v = rounded<T>(load(residual + r * residual_stride + i, n) + load(x + r * stride + i, n));
          store(added + r * width + i, v, n);
          squares.add(r, i, v * v);
        }
      });
      for (int r = 0; r < R; ++r) rstd[r] = all(reciprocal_rms(squares.value(r), width, a.eps));
      columns(width, [&](int64_t i, auto n) {
        const Floats gain = weight ? offset + load(weight + i, n) : all(1.0f);
        for (int r = 0; r < R; ++r) {
          ahead(x + (R + r) * stride + i), ahead(residual + (R + r) * residual_stride + i);
          const Floats normed = load(added + r * width + i, n) * rstd[r];
          store(y + r * width + i, (round_before_weight ? rounded<T>(normed) : normed) * gain, n);
        }
      });
    });
  }
  return BLIP3O_OK;
}

template <class T, class W>
static int run(const blip3o_add_rms_norm_backward_arguments& a) {
  const int64_t width = a.width;
  const int threads = blip3o_threads(a.threads, a.rows * width);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t block = 0; block < a.blocks; ++block) {
    float* sums = a.dweight ? a.partial + block * width : nullptr;
    if (sums) std::memset(sums, 0, sizeof(float) * static_cast<size_t>(width));
    const int64_t start = a.rows * block / a.blocks;
    groups(a.rows * (block + 1) / a.blocks - start, [&](int64_t offset_row, auto number) {
      const int64_t from = (start + offset_row) * width;
      rms_backward_rows<decltype(number)::value>(
          static_cast<T*>(a.dx) + from, sums, static_cast<const T*>(a.dy) + from,
          a.dadded ? static_cast<const T*>(a.dadded) + from : nullptr, static_cast<const T*>(a.added) + from, width,
          static_cast<const W*>(a.weight), a.offset, a.eps, width);
    });
  }
  if (a.dweight) add_up(static_cast<W*>(a.dweight), a.partial, a.blocks, width, width);
  return BLIP3O_OK;
}

template <class Arguments>
static int run_dtypes(const Arguments& a) {
  return by_dtypes(a.dtype, a.weight_dtype, [&](auto t, auto w) { return run<decltype(t), decltype(w)>(a); });
}

static int add_rms_norm(const blip3o_add_rms_norm_arguments& a) {
  return a.rows < 0 || a.width < 1 ? BLIP3O_BAD_ARGUMENT : run_dtypes(a);
}

static int add_rms_norm_backward(const blip3o_add_rms_norm_backward_arguments& a) {
  if (a.rows < 0 || a.width < 1 || a.blocks < 1 || (a.dweight && !(a.partial && a.weight))) return BLIP3O_BAD_ARGUMENT;
  return run_dtypes(a);
}

#endif
