// RMS normalisation on a CPU; the contract is kernels/blip3o_kernels/ops/rms_norm.py.
//
// Both directions are bound by memory once the rows leave the cache, so the backward pass recomputes 1/rms from x, which it
// reads anyway, instead of having the forward pass store it.
#ifndef BLIP3O_LANES
#define BLIP3O_BODY "rms_norm.cpp"
#include "instruction_sets.h"

extern "C" int blip3o_cpu_rms_norm(void* y, const void* x, const void* weight, int64_t rows, int64_t width,
                                   int64_t stride, float eps, float offset, int mode, int threads) {
  BLIP3O_RUN(mode >> 4 & 3, rms_norm(y, x, weight, rows, width, stride, eps, offset, mode, threads))
}

extern "C" int blip3o_cpu_rms_norm_backward(void* dx, void* dweight, float* partial, const void* dy, const void* x,
                                            const void* weight, int64_t rows, int64_t width, int64_t stride,
                                            int64_t blocks, float eps, float offset, int mode, int threads) {
  BLIP3O_RUN(mode >> 4 & 3, rms_norm_backward(dx, dweight, partial, dy, x, weight, rows, width, stride, blocks, eps,
                                              offset, mode, threads))
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
static int forward(T* y, const T* x, const W* weight, int64_t rows, int64_t width, int64_t stride, float eps,
                   float offset_, int threads) {
  const Floats offset = all(offset_);
  threads = blip3o_threads(threads, rows * width);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = x + row * stride;
    T* to = y + row * width;
    const Floats rstd = all(reciprocal_rms(from, width, eps));
    int64_t i = 0;
    for (; i + BLIP3O_LANES <= width; i += BLIP3O_LANES) {
      const Floats w = GAIN == NO_WEIGHT ? Floats{} : load(weight + i);
      store(to + i, scaled<T, W, GAIN>(load(from + i), rstd, w, offset));
    }
    if (const int64_t n = width - i) {
      const Floats w = GAIN == NO_WEIGHT ? Floats{} : load(weight + i, n);
      store(to + i, scaled<T, W, GAIN>(load(from + i, n), rstd, w, offset), n);
    }
  }
  return BLIP3O_OK;
}

template <class T, class W>
static int forward_gain(T* y, const T* x, const W* weight, int64_t rows, int64_t width, int64_t stride, float eps,
                        float offset, int mode, int threads) {
  if (!weight) return forward<T, W, NO_WEIGHT>(y, x, weight, rows, width, stride, eps, offset, threads);
  if (mode & 64) return forward<T, W, ROUND_BEFORE_WEIGHT>(y, x, weight, rows, width, stride, eps, offset, threads);
  return forward<T, W, ROUND_ONCE>(y, x, weight, rows, width, stride, eps, offset, threads);
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
static int backward(T* dx, W* dweight, float* partial, const T* dy, const T* x, const W* weight, int64_t rows,
                    int64_t width, int64_t stride, int64_t blocks, float eps, float offset, int threads) {
  threads = blip3o_threads(threads, rows * width);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t block = 0; block < blocks; ++block) {
    float* sums = WANTED ? partial + block * width : nullptr;
    if (WANTED) std::memset(sums, 0, sizeof(float) * static_cast<size_t>(width));
    for (int64_t row = rows * block / blocks; row < rows * (block + 1) / blocks; ++row)
      backward_row<T, W, WEIGHTED, WANTED>(dx + row * width, sums, dy + row * width, x + row * stride, weight, width,
                                           eps, all(offset));
  }
  if (WANTED) {
    for (int64_t i = 0; i < width; i += BLIP3O_LANES) {
      const int64_t n = width - i < BLIP3O_LANES ? width - i : BLIP3O_LANES;
      Floats total{};
      for (int64_t block = 0; block < blocks; ++block) total += load(partial + block * width + i, n);
      store(dweight + i, total, n);
    }
  }
  return BLIP3O_OK;
}

template <class T, class W>
static int backward_gain(T* dx, W* dweight, float* partial, const T* dy, const T* x, const W* weight, int64_t rows,
                         int64_t width, int64_t stride, int64_t blocks, float eps, float offset, int threads) {
  if (!weight)
    return backward<T, W, false, false>(dx, dweight, partial, dy, x, weight, rows, width, stride, blocks, eps, offset,
                                        threads);
  if (!dweight)
    return backward<T, W, true, false>(dx, dweight, partial, dy, x, weight, rows, width, stride, blocks, eps, offset,
                                       threads);
  return backward<T, W, true, true>(dx, dweight, partial, dy, x, weight, rows, width, stride, blocks, eps, offset,
                                    threads);
}

#define BLIP3O_DTYPES(CALL)                                                                       \
  switch (mode & 15) {                                                                            \
    case BLIP3O_FLOAT32 + 4 * BLIP3O_FLOAT32: return CALL(float, float);                          \
    case BLIP3O_BFLOAT16 + 4 * BLIP3O_BFLOAT16: return CALL(bfloat16, bfloat16);                  \
    case BLIP3O_BFLOAT16 + 4 * BLIP3O_FLOAT32: return CALL(bfloat16, float);                      \
    case BLIP3O_FLOAT16 + 4 * BLIP3O_FLOAT16: return CALL(float16, float16);                      \
    case BLIP3O_FLOAT16 + 4 * BLIP3O_FLOAT32: return CALL(float16, float);                        \
    default: return BLIP3O_BAD_DTYPE;                                                             \
  }

static int rms_norm(void* y, const void* x, const void* weight, int64_t rows, int64_t width, int64_t stride, float eps,
                    float offset, int mode, int threads) {
  if (rows < 0 || width < 1) return BLIP3O_BAD_ARGUMENT;
#define CALL(T, W)                                                                                                \
  forward_gain(static_cast<T*>(y), static_cast<const T*>(x), static_cast<const W*>(weight), rows, width, stride, \
               eps, offset, mode, threads)
  BLIP3O_DTYPES(CALL)
#undef CALL
}

static int rms_norm_backward(void* dx, void* dweight, float* partial, const void* dy, const void* x,
                             const void* weight, int64_t rows, int64_t width, int64_t stride, int64_t blocks, float eps,
                             float offset, int mode, int threads) {
  if (rows < 0 || width < 1 || blocks < 1 || (dweight && !partial)) return BLIP3O_BAD_ARGUMENT;
#define CALL(T, W)                                                                                                  \
  backward_gain(static_cast<T*>(dx), static_cast<W*>(dweight), partial, static_cast<const T*>(dy),                 \
                static_cast<const T*>(x), static_cast<const W*>(weight), rows, width, stride, blocks, eps, offset, \
                threads)
  BLIP3O_DTYPES(CALL)
#undef CALL
}
#undef BLIP3O_DTYPES

#endif
