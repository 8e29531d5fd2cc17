// Rotary position embedding on a CPU; the contract is kernels/blip3o_kernels/ops/rope.py. The backward pass is the rotation
// by the negative angle.
//
// Halves use the tables as they are. For pairs a position's angles, which serve all heads, are laid out once as the factors
// of each dim:   y[i] = x[i] * same[i] + x[i ^ 1] * other[i]
#ifndef BLIP3O_LANES
#define BLIP3O_BODY "rope.cpp"
#include "instruction_sets.h"

extern "C" int blip3o_cpu_rope(const blip3o_rope_arguments* a) { BLIP3O_RUN(a->instruction_set, rope(*a)) }

#else  // once per instruction set

static constexpr int64_t ANGLES = 128;  // laid out at a time

template <class T>
static inline void rotate_halves(T* y, const T* x, const T* next, const float* cos, const float* sin, Floats sign,
                                 int64_t half) {
  int64_t i = 0;
  for (; i + BLIP3O_LANES <= half; i += BLIP3O_LANES) {
    ahead(next + i), ahead(next + half + i);
    const Floats first = load(x + i), second = load(x + half + i), c = load(cos + i), s = load(sin + i) * sign;
    store(y + i, first * c - second * s);
    store(y + half + i, second * c + first * s);
  }
  if (const int64_t n = half - i) {
    const Floats first = load(x + i, n), second = load(x + half + i, n);
    const Floats c = load(cos + i, n), s = load(sin + i, n) * sign;
    store(y + i, first * c - second * s, n);
    store(y + half + i, second * c + first * s, n);
  }
}

template <class T>
static inline void rotate_pairs(T* y, const T* x, const T* next, const float* same, const float* other, int64_t rotated) {
  int64_t i = 0;
  for (; i + BLIP3O_LANES <= rotated; i += BLIP3O_LANES) {
    ahead(next + i);
    const Floats v = load(x + i);
    store(y + i, v * load(same + i) + swapped_pairs(v) * load(other + i));
  }
  if (const int64_t n = rotated - i) {
    const Floats v = load(x + i, n);
    store(y + i, v * load(same + i, n) + swapped_pairs(v) * load(other + i, n), n);
  }
}

// All heads of one token.
template <class T>
static void rotate(T* y, const T* x, const float* cos, const float* sin, const blip3o_rope_arguments& a) {
  const float sign = a.inverse ? -1.0f : 1.0f;
  if (!a.interleaved)
    for (int64_t h = 0; h < a.heads; ++h)
      rotate_halves(y + h * a.y_head, x + h * a.x_head, x + h * a.x_head + a.x_token, cos, sin, all(sign), a.half);
  for (int64_t start = 0; a.interleaved && start < a.half; start += ANGLES) {
    const int64_t angles = a.half - start < ANGLES ? a.half - start : ANGLES;
    float same[2 * ANGLES], other[2 * ANGLES];
    for (int64_t i = 0; i < angles; ++i) {
      same[2 * i] = same[2 * i + 1] = cos[start + i];
      other[2 * i] = -sign * sin[start + i];
      other[2 * i + 1] = sign * sin[start + i];
    }
    for (int64_t h = 0; h < a.heads; ++h)
      rotate_pairs(y + h * a.y_head + 2 * start, x + h * a.x_head + 2 * start, x + h * a.x_head + 2 * start + a.x_token, same,
                   other, 2 * angles);
  }
  const int64_t rotated = 2 * a.half;
  for (int64_t h = 0; rotated < a.head_dim && h < a.heads; ++h)
    std::memcpy(y + h * a.y_head + rotated, x + h * a.x_head + rotated,
                sizeof(T) * static_cast<size_t>(a.head_dim - rotated));
}

template <class T>
static int run(const blip3o_rope_arguments& a) {
  const int threads = blip3o_threads(a.threads, a.batch * a.heads * a.tokens * a.head_dim);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t position = 0; position < a.batch * a.tokens; ++position) {
    const int64_t b = position / a.tokens, t = position % a.tokens, angles = b * a.table_stride + t * a.half;
    rotate(static_cast<T*>(a.y) + b * a.y_batch + t * a.y_token,
           static_cast<const T*>(a.x) + b * a.x_batch + t * a.x_token, a.cos + angles, a.sin + angles, a);
  }
  return BLIP3O_OK;
}

static int rope(const blip3o_rope_arguments& a) {
  if (a.half < 0 || 2 * a.half > a.head_dim) return BLIP3O_BAD_ARGUMENT;
  return by_dtype(a.dtype, [&](auto t) { return run<decltype(t)>(a); });
}

#endif
