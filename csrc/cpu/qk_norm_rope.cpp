// Normalised and rotated queries and keys on a CPU; the contract is kernels/blip3o_kernels/ops/qk_norm_rope.py.
//
// Rows are what a norm runs over: the heads of one token, or all heads of the tokens. A group of rows is in the first cache when
// it is normalised and turned. Backwards, the gradients are turned back into a workspace, which then goes through the norm; 1/std
// and mean are found again from x, which is read anyway.
#ifndef BLIP3O_LANES
#define BLIP3O_BODY "qk_norm_rope.cpp"
#include "instruction_sets.h"

extern "C" int blip3o_cpu_qk_norm_rope(const blip3o_qk_norm_rope_arguments* a) {
  BLIP3O_RUN(a->instruction_set, qk_norm_rope(*a))
}

extern "C" int blip3o_cpu_qk_norm_rope_backward(const blip3o_qk_norm_rope_backward_arguments* a) {
  BLIP3O_RUN(a->instruction_set, qk_norm_rope_backward(*a))
}

#else  // once per instruction set

#include "normalise.h"
#include "rotate.h"

struct Strides {
  int64_t batch, head, token;
};

// f(sample, token, count) for the parts of a run of tokens that lie in one sample.
template <class F>
static inline void stretches(int64_t first, int64_t last, int64_t tokens, F f) {
  while (first < last) {
    const int64_t token = first % tokens, left = tokens - token, count = last - first < left ? last - first : left;
    f(first / tokens, token, count);
    first += count;
  }
}

// f(token, head, rows, number) for every group of rows among `count` tokens: heads of a token, or whole tokens, whose head is 0.
template <class F>
static inline void rows_of(int64_t count, int64_t heads, bool across_width, F f) {
  if (across_width) return groups(count, [&](int64_t token, auto number) { f(token, int64_t{0}, number); });
  for (int64_t token = 0; token < count; ++token)
    groups(heads, [&](int64_t head, auto number) { f(token, head, number); });
}

// Queries, or keys.
template <class T, class W, bool CENTRED>
static void forward(void* y_, const void* x_, const void* weight_, const void* bias_, int64_t heads, Strides strides,
                    const blip3o_qk_norm_rope_arguments& a) {
  const int64_t dims = a.head_dim, wide = heads * dims, positions = a.batch * a.tokens;
  const int64_t runs = heads ? (positions + GROUP - 1) / GROUP : 0;
  const int64_t span = a.across_width ? wide : dims, step = a.across_width ? strides.token : strides.head;
  const W* weight = static_cast<const W*>(weight_);
  const W* bias = static_cast<const W*>(bias_);
  const int threads = blip3o_threads(a.threads, positions * wide);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t end = (run + 1) * GROUP < positions ? (run + 1) * GROUP : positions;
    stretches(run * GROUP, end, a.tokens, [&](int64_t sample, int64_t start, int64_t count) {
      rows_of(count, heads, a.across_width, [&](int64_t offset, int64_t head, auto number) {
        constexpr int R = decltype(number)::value;
        const int64_t token = start + offset;
        const T* x = static_cast<const T*>(x_) + sample * strides.batch + token * strides.token + head * strides.head;
        T* y = static_cast<T*>(y_) + (sample * a.tokens + token) * wide + head * dims;
        float rstds[R], means[R] = {};
        moments<R, CENTRED>(rstds, means, x, step, span, a.eps);
        for (int r = 0; r < R; ++r) {
          const Floats rstd = all(rstds[r]), mean = all(means[r]);
          const int64_t angles = sample * a.table_stride + (a.across_width ? token + r : token) * a.half;
          for (int64_t from = 0; from < span; from += dims) {  // every head of the row
            const T* source = x + r * step + from;
            T* to = y + r * span + from;
            rotate(
                a.cos + angles, a.sin + angles, 1.0f, a.half, dims, a.interleaved,
                [&](int64_t i, auto n) {
                  const Floats v = load(source + i, n);
                  const Floats normed = (CENTRED ? v - mean : v) * rstd * load(weight + from + i, n);
                  return bias ? normed + load(bias + from + i, n) : normed;
                },
                [&](int64_t i, Floats v, auto n) { store(to + i, v, n); });
          }
        }
      });
    });
  }
}

template <class T, class W, bool CENTRED>
static void backward(void* dx_, void* dweight, void* dbias, const void* dy_, const void* x_, const void* weight_,
                     int64_t heads, Strides strides, Strides dy_strides, const blip3o_qk_norm_rope_backward_arguments& a) {
  const int64_t dims = a.head_dim, wide = heads * dims, positions = a.batch * a.tokens;
  const int64_t span = a.across_width ? wide : dims, step = a.across_width ? strides.token : strides.head;
  const W* weight = static_cast<const W*>(weight_);
  const int threads = blip3o_threads(a.threads, positions * wide);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t block = 0; block < a.blocks; ++block) {
    float* gain = a.workspace + block * (3 + GROUP) * span;
    float* scaled = gain + span;
    float* plain = scaled + span;
    float* turned = plain + span;
    columns(span, [&](int64_t i, auto n) {
      store(gain + i, load(weight + i, n), n);
      store(scaled + i, Floats{}, n);
      store(plain + i, Floats{}, n);
    });
    const int64_t first = positions * block / a.blocks, end = positions * (block + 1) / a.blocks;
    stretches(first, heads ? end : first, a.tokens, [&](int64_t sample, int64_t start, int64_t count) {
      rows_of(count, heads, a.across_width, [&](int64_t offset, int64_t head, auto number) {
        constexpr int R = decltype(number)::value;
        const int64_t token = start + offset;
        const T* x = static_cast<const T*>(x_) + sample * strides.batch + token * strides.token + head * strides.head;
        T* dx = static_cast<T*>(dx_) + (sample * a.tokens + token) * wide + head * dims;
        for (int r = 0; r < R; ++r) {
          const int64_t t = a.across_width ? token + r : token, h = a.across_width ? 0 : head + r;
          const int64_t angles = sample * a.table_stride + t * a.half;
          for (int64_t i = 0; i < span / dims; ++i) {
            const T* dy = static_cast<const T*>(dy_) + sample * dy_strides.batch + t * dy_strides.token +
                          (h + i) * dy_strides.head;
            float* to = turned + r * span + i * dims;
            rotate(
                a.cos + angles, a.sin + angles, -1.0f, a.half, dims, a.interleaved,
                [&](int64_t j, auto n) { return load(dy + j, n); },
                [&](int64_t j, Floats v, auto n) { store(to + j, v, n); });
          }
        }
        float rstds[R], means[R] = {};
        moments<R, CENTRED>(rstds, means, x, step, span, a.eps);
        backward_rows<R, CENTRED>(dx, scaled, plain, false, turned, x, step, gain, rstds, means, span);
      });
    });
  }
  const int64_t apart = (3 + GROUP) * span;
  if (dweight) add_up(static_cast<W*>(dweight), a.workspace + span, a.blocks, apart, span);
  if (dbias) add_up(static_cast<W*>(dbias), a.workspace + 2 * span, a.blocks, apart, span);
}

template <class T, class W, bool CENTRED>
static int run(const blip3o_qk_norm_rope_arguments& a) {
  forward<T, W, CENTRED>(a.query_y, a.query, a.query_weight, a.query_bias, a.heads,
                         {a.query_batch, a.query_head, a.query_token}, a);
  forward<T, W, CENTRED>(a.key_y, a.key, a.key_weight, a.key_bias, a.groups, {a.key_batch, a.key_head, a.key_token}, a);
  return BLIP3O_OK;
}

template <class T, class W, bool CENTRED>
static int run(const blip3o_qk_norm_rope_backward_arguments& a) {
  backward<T, W, CENTRED>(a.dquery, a.dquery_weight, a.dquery_bias, a.query_dy, a.query, a.query_weight, a.heads,
                          {a.query_batch, a.query_head, a.query_token},
                          {a.query_dy_batch, a.query_dy_head, a.query_dy_token}, a);
  backward<T, W, CENTRED>(a.dkey, a.dkey_weight, a.dkey_bias, a.key_dy, a.key, a.key_weight, a.groups,
                          {a.key_batch, a.key_head, a.key_token}, {a.key_dy_batch, a.key_dy_head, a.key_dy_token}, a);
  return BLIP3O_OK;
}

template <class T, class W, class Arguments>
static int run_norm(const Arguments& a) {
  return a.centred ? run<T, W, true>(a) : run<T, W, false>(a);
}

template <class Arguments>
static int run_dtypes(const Arguments& a) {
  if (a.head_dim < 1 || a.half < 0 || 2 * a.half > a.head_dim) return BLIP3O_BAD_ARGUMENT;
  if (a.across_width && ((a.heads > 1 && a.query_head != a.head_dim) || (a.groups > 1 && a.key_head != a.head_dim)))
    return BLIP3O_BAD_ARGUMENT;
  return by_dtypes(a.dtype, a.parameter_dtype, [&](auto t, auto w) { return run_norm<decltype(t), decltype(w)>(a); });
}

static int qk_norm_rope(const blip3o_qk_norm_rope_arguments& a) { return run_dtypes(a); }

static int qk_norm_rope_backward(const blip3o_qk_norm_rope_backward_arguments& a) {
  return a.blocks < 1 ? BLIP3O_BAD_ARGUMENT : run_dtypes(a);
}

#endif
