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

template <class T>
static inline float reciprocal_rms(const T* x, int64_t width, float eps) {
  Floats s0{}, s1{}, s2{}, s3{};  // four chains: one addition takes four cycles
  int64_t i = 0;
  for (; i + 4 * BLIP3O_LANES <= width; i += 4 * BLIP3O_LANES) {
    const Floats a = load(x + i), b = load(x + i + BLIP3O_LANES);
    const Floats c = load(x + i + 2 * BLIP3O_LANES), d = load(x + i + 3 * BLIP3O_LANES);
    s0 += a * a, s1 += b * b, s2 += c * c, s3 += d * d;
  }
  for (; i + BLIP3O_LANES <= width; i += BLIP3O_LANES) {
    const Floats a = load(x + i);
    s0 += a * a;
  }
  if (i < width) {
    const Floats a = load(x + i, width - i);
    s1 += a * a;
  }
  return 1.0f / std::sqrt(sum((s0 + s1) + (s2 + s3)) / static_cast<float>(width) + eps);
}

template <class T, class W, int GAIN>
static inline Floats scaled(Floats x, Floats rstd, Floats weight, Floats offset) {
  const Floats normed = x * rstd;
  if (GAIN == NO_WEIGHT) return normed;
  return (GAIN == ROUND_BEFORE_WEIGHT ? rounded<T>(normed) : normed) * (offset + weight);
}

template <class T, class W, int GAIN>
static int forward(const blip3o_rms_norm_arguments& a) {
  const W* weight = static_cast<const W*>(a.weight);
  const Floats offset = all(a.offset);
  const int threads = blip3o_threads(a.threads, a.rows * a.width);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.stride;
    T* y = static_cast<T*>(a.y) + row * a.width;
    const Floats rstd = all(reciprocal_rms(x, a.width, a.eps));
    int64_t i = 0;
    for (; i + BLIP3O_LANES <= a.width; i += BLIP3O_LANES) {
      const Floats w = GAIN == NO_WEIGHT ? Floats{} : load(weight + i);
      store(y + i, scaled<T, W, GAIN>(load(x + i), rstd, w, offset));
    }
    if (const int64_t n = a.width - i) {
      const Floats w = GAIN == NO_WEIGHT ? Floats{} : load(weight + i, n);
      store(y + i, scaled<T, W, GAIN>(load(x + i, n), rstd, w, offset), n);
    }
  }
  return BLIP3O_OK;
}

template <class T, class W>
static int run(const blip3o_rms_norm_arguments& a) {
  if (!a.weight) return forward<T, W, NO_WEIGHT>(a);
  return a.round_before_weight ? forward<T, W, ROUND_BEFORE_WEIGHT>(a) : forward<T, W, ROUND_ONCE>(a);
}

// With u = dy * gain and c = rstd^3 / width * sum(u * x):   dx = u * rstd - x * c,   dweight = sum over rows of dy * x * rstd.
template <class T, class W, bool WEIGHTED, bool WANTED>
static void backward_row(T* dx, float* dweight, const T* dy, const T* x, const W* weight, int64_t width, float eps,
                         Floats offset) {
  const float rstd_ = reciprocal_rms(x, width, eps);
  const int64_t whole = width / BLIP3O_LANES * BLIP3O_LANES, n = width - whole;
  Floats dots[2] = {};
  for (int64_t i = 0; i < whole; i += BLIP3O_LANES) {
    const Floats u = WEIGHTED ? load(dy + i) * (offset + load(weight + i)) : load(dy + i);
    dots[i / BLIP3O_LANES & 1] += u * load(x + i);
  }
  if (n) {
    const Floats u = WEIGHTED ? load(dy + whole, n) * (offset + load(weight + whole, n)) : load(dy + whole, n);
    dots[0] += u * load(x + whole, n);
  }
  const Floats rstd = all(rstd_);
  const Floats c = all(sum(dots[0] + dots[1]) * rstd_ * rstd_ * rstd_ / static_cast<float>(width));
  for (int64_t i = 0; i < whole; i += BLIP3O_LANES) {
    const Floats g = load(dy + i), v = load(x + i);
    const Floats u = WEIGHTED ? g * (offset + load(weight + i)) : g;
    store(dx + i, u * rstd - v * c);
    if (WANTED) store(dweight + i, load(dweight + i) + g * (v * rstd));
  }
  if (n) {
    const Floats g = load(dy + whole, n), v = load(x + whole, n);
    const Floats u = WEIGHTED ? g * (offset + load(weight + whole, n)) : g;
    store(dx + whole, u * rstd - v * c, n);
    if (WANTED) store(dweight + whole, load(dweight + whole, n) + g * (v * rstd), n);
  }
}

template <class T, class W, bool WEIGHTED, bool WANTED>
static int backward(const blip3o_rms_norm_backward_arguments& a) {
  const W* weight = static_cast<const W*>(a.weight);
  const int threads = blip3o_threads(a.threads, a.rows * a.width);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t block = 0; block < a.blocks; ++block) {
    float* sums = WANTED ? a.partial + block * a.width : nullptr;
    if (WANTED) std::memset(sums, 0, sizeof(float) * static_cast<size_t>(a.width));
    for (int64_t row = a.rows * block / a.blocks; row < a.rows * (block + 1) / a.blocks; ++row)
      backward_row<T, W, WEIGHTED, WANTED>(
          static_cast<T*>(a.dx) + row * a.width, sums, static_cast<const T*>(a.dy) + row * a.width,
          static_cast<const T*>(a.x) + row * a.stride, weight, a.width, a.eps, all(a.offset));
  }
  for (int64_t i = 0; WANTED && i < a.width; i += BLIP3O_LANES) {
    const int64_t n = a.width - i < BLIP3O_LANES ? a.width - i : BLIP3O_LANES;
    Floats total{};
    for (int64_t block = 0; block < a.blocks; ++block) total += load(a.partial + block * a.width + i, n);
    store(static_cast<W*>(a.dweight) + i, total, n);
  }
  return BLIP3O_OK;
}

template <class T, class W>
static int run(const blip3o_rms_norm_backward_arguments& a) {
  if (!a.weight) return backward<T, W, false, false>(a);
  return a.dweight ? backward<T, W, true, true>(a) : backward<T, W, true, false>(a);
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
