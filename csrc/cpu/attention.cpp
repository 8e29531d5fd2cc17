// Scaled dot-product attention on a CPU; the contract is kernels/blip3o_kernels/ops/attention.py.
//
// One task is one key-value head of one sample, with all the query heads that share it. It takes a block of queries at a
// time and holds their scores transposed, [keys, queries], so that softmax works on a vector of queries: its maxima and
// sums need no look across lanes, and short rows of keys waste nothing. All else are small matrix products (product.h) in
// float32; other dtypes are converted when they are laid out. A block has every score of its queries, so one softmax is
// enough.
//
// The backward pass computes the scores again. With P the probabilities and dP = V dy^T, both [keys, queries]:
//     dV = P dy,   dS = P (dP - sum over keys of P dP),   dQ = dS^T K scale,   dK = dS Q scale.
// A task sums dK and dV over its queries in order, so the number of threads does not change a bit.
#ifndef BLIP3O_LANES
#define BLIP3O_BODY "attention.cpp"
#include "instruction_sets.h"

extern "C" int blip3o_cpu_attention(const blip3o_attention_arguments* a) {
  BLIP3O_RUN(a->instruction_set, attention(*a))
}

extern "C" int blip3o_cpu_attention_backward(const blip3o_attention_backward_arguments* a) {
  BLIP3O_RUN(a->instruction_set, attention_backward(*a))
}

#else  // once per instruction set

#include "product.h"

static constexpr int64_t QUERIES = WIDE * LANES;  // of a block
static constexpr int64_t LONG = 1024;              // keys from which it is half of that: scores shall stay in the cache

// What is between a product and a score.
enum Kind { PLAIN, MASKED };  // PLAIN: no mask and a positive scale, which keeps the order of the scores

// A block of queries of one sample, and the keys they see. A vector of them sees the first `limits`; from `shared` on, only
// some lanes do.
struct Block {
  int64_t start, count, vectors;
  int64_t step;  // from key to key in the scores
  int64_t limits[WIDE], shared[WIDE];
  int64_t ahead;  // query t sees the keys s <= t + ahead

  template <class Arguments>
  Block(const Arguments& a, int64_t from) : start(from) {
    step = a.keys < LONG ? QUERIES : QUERIES / 2;
    count = smaller(step, a.tokens - start);
    vectors = padded(count, LANES) / LANES;
    ahead = a.causal ? a.keys - a.tokens : a.keys;
    for (int64_t v = 0; v < vectors; ++v) {
      limits[v] = limit(v * LANES + LANES - 1, a.keys);
      shared[v] = limit(v * LANES, a.keys);
    }
  }
  int64_t limit(int64_t query, int64_t keys) const {
    const int64_t seen = start + smaller(query, count - 1) + ahead + 1;
    return seen < 0 ? 0 : smaller(seen, keys);
  }
  // Lane by lane, the first key that a vector of queries does not see.
  Integers lane_limits(int64_t vector) const {
    static const int32_t NUMBERS[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    Integers lanes;
    std::memcpy(&lanes, NUMBERS, sizeof lanes);
    return lanes + static_cast<int32_t>(start + vector * LANES + ahead + 1);
  }
  // f(first vector, first key, one past the last key) for each run of keys that is seen from a vector on; causal blocks
  // are staircases.
  template <class F>
  void stairs(F f) const {
    for (int64_t v = 0, from = 0; v < vectors; from = limits[v++])
      if (limits[v] > from) f(v, from, limits[v]);
  }
};

// products [keys, queries] = left [keys, depth] right [depth, queries], where keys are seen.
static void multiply(const Block& block, float* products, const float* left, int64_t left_step, const float* right,
                     int64_t depth) {
  block.stairs([&](int64_t v, int64_t from, int64_t to) {
    product<true>(products + from * block.step + v * LANES, block.step, left + from * left_step, left_step,
                  right + v * LANES, block.step, to - from, (block.vectors - v) * LANES, depth);
  });
}

// y [queries, width] = weights^T [queries, keys] x [keys, width], each few queries over the keys they see.
static void mix(const Block& block, float* y, int64_t width, const float* weights, const float* x, int64_t x_step,
                int64_t keys) {
  for (int64_t t = 0; t < block.count; t += ROWS) {
    const int64_t rows = smaller(ROWS, block.count - t);
    const int64_t seen = block.limit(t + rows - 1, keys);
    product<false>(y + t * width, width, weights + t, block.step, x, x_step, rows, width, seen);
  }
}

// y [keys, width] += weights [keys, queries] x [queries, width].
static void gather(const Block& block, float* y, int64_t width, const float* weights, const float* x, int64_t x_step) {
  block.stairs([&](int64_t v, int64_t from, int64_t to) {
    const int64_t first = v * LANES;
    product<true, true>(y + from * width, width, weights + from * block.step + first, block.step, x + first * x_step,
                        x_step, to - from, width, block.count - first);
  });
}

// The mask of one head as numbers to add, [keys, queries]; head_mask: where it starts, in elements.
template <class Arguments>
static void lay_mask(const Block& block, float* to, const Arguments& a, int64_t head_mask) {
  const int64_t keys = a.keys, step = a.mask_token, first = head_mask + block.start * step;
  if (a.mask_kind == 0)
    return static_cast<void>(std::memset(to, 0, sizeof(float) * static_cast<size_t>(block.step * keys)));
  if (a.mask_kind == 2)
    return lay_columns(to, block.step, static_cast<const float*>(a.mask) + first, step, block.count, keys);
  const uint8_t* allowed = static_cast<const uint8_t*>(a.mask) + first;
  lay_columns(to, block.step, block.count, keys, [=](int64_t row, int64_t k, int64_t count) {
    typedef uint8_t Bytes __attribute__((vector_size(LANES)));
    Bytes bytes{};
    std::memcpy(&bytes, allowed + row * step + k, static_cast<size_t>(count));
    return __builtin_convertvector(bytes, Integers) != 0 ? Floats{} : all(-__builtin_inff());
  });
}

static inline Floats only_seen(Floats scores, int64_t key, Integers limits) {
  return Integers{} + static_cast<int32_t>(key) < limits ? scores : all(-__builtin_inff());
}

// A product of queries and a key, ready for the scale; a MASKED one has it and the mask already.
template <Kind KIND>
static inline Floats score(const float* products, const float* added, int64_t at, Floats scale) {
  return KIND == PLAIN ? load(products + at) : load(products + at) * scale + load(added + at);
}
template <Kind KIND>
static inline Floats scaled(Floats score, Floats scale) {
  return KIND == PLAIN ? score * scale : score;
}

// f(key, i) for all keys; i counts 0 1 2 3 0 1 2 3 ..., for sums in four parts: shorter chains and smaller errors.
template <class F>
__attribute__((always_inline)) static inline void by_fours(int64_t keys, F f) {
  int64_t s = 0;
  for (; s + 4 <= keys; s += 4) f(s, 0), f(s + 1, 1), f(s + 2, 2), f(s + 3, 3);
  if (s < keys) f(s, 0);
  if (s + 1 < keys) f(s + 1, 1);
  if (s + 2 < keys) f(s + 2, 2);
}

// One vector of queries: their largest scores. Products that are masked or not seen by all lanes become scores.
template <Kind KIND>
static inline Floats largest(const Block& block, int64_t vector, float* products, const float* added, Floats scale) {
  const int64_t step = block.step, shared = block.shared[vector], limit = block.limits[vector];
  const Integers limits = block.lane_limits(vector);
  const Floats least = all(-__builtin_inff());
  Floats found[4] = {least, least, least, least};
  if (KIND == PLAIN)
    by_fours(shared, [&](int64_t s, int i) { found[i] = at_least(load(products + s * step), found[i]); });
  for (int64_t s = KIND == PLAIN ? shared : 0; s < limit; ++s) {
    Floats v = score<KIND>(products, added, s * step, scale);
    if (s >= shared) v = only_seen(v, s, limits);
    found[0] = at_least(v, found[0]);
    store(products + s * step, v);
  }
  return scaled<KIND>(at_least(at_least(found[0], found[1]), at_least(found[2], found[3])), scale);
}

// What the scores are shifted by: the largest, or where all is masked 0, so that every exponential is 0.
static inline Floats shift_of(Floats most) { return most == -__builtin_inff() ? Floats{} : most; }

static inline Floats reciprocal(Floats sum) { return sum == 0.0f ? Floats{} : 1.0f / sum; }

// x / sum, rounded as a division would be (nearly always), in three multiplications.
static inline Floats divided(Floats x, Floats sum, Floats reciprocal) {
  const Floats quotient = x * reciprocal;
  return quotient + (x - quotient * sum) * reciprocal;
}

// One vector of queries: products -> e^(score - largest score); returns the sums of these, and the largest.
template <Kind KIND>
static inline Floats exponentials(const Block& block, int64_t vector, float* products, const float* added, Floats scale,
                                  Floats& most) {
  most = largest<KIND>(block, vector, products, added, scale);
  const Floats shift = shift_of(most);
  Floats sums[4] = {};
  by_fours(block.limits[vector], [&](int64_t s, int i) {
    const Floats e = exponential(scaled<KIND>(load(products + s * block.step), scale) - shift);
    sums[i] += e;
    store(products + s * block.step, e);
  });
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// One vector of queries: products -> probabilities, dprobabilities -> dscores, to be scaled. Shifting by the log-sum-exp
// would spare the look for the largest score, and lose two bits: the scores that count are near the largest.
template <Kind KIND>
static inline void score_gradients(const Block& block, int64_t vector, float* products, float* gradients,
                                   const float* added, Floats scale) {
  const int64_t step = block.step, limit = block.limits[vector];
  const Floats shift = shift_of(largest<KIND>(block, vector, products, added, scale));
  Floats sums[4] = {}, dots[4] = {};
  by_fours(limit, [&](int64_t s, int i) {
    const Floats e = exponential(scaled<KIND>(load(products + s * step), scale) - shift);
    sums[i] += e;
    dots[i] += e * load(gradients + s * step);
    store(products + s * step, e);
  });
  const Floats sum = (sums[0] + sums[1]) + (sums[2] + sums[3]), factor = reciprocal(sum);
  const Floats dot = divided((dots[0] + dots[1]) + (dots[2] + dots[3]), sum, factor);
  for (int64_t s = 0; s < limit; ++s) {
    const Floats p = divided(load(products + s * step), sum, factor);
    store(products + s * step, p);
    store(gradients + s * step, p * (load(gradients + s * step) - dot));
  }
}

// Where a task keeps what it lays out, one after the other.
struct Space {
  float* next;

  float* take(int64_t floats) {
    float* taken = next;
    next += padded(floats, 16);
    return taken;
  }
};

template <class T>
static inline const T* at(const void* data, int64_t b, int64_t batch, int64_t h, int64_t head) {
  return static_cast<const T*>(data) + b * batch + h * head;
}

template <class T, Kind KIND>
static void forward(const blip3o_attention_arguments& a, int64_t b, int64_t g, Space space) {
  const int64_t wide = padded(a.value_dim, LANES), sharing = a.heads / a.groups;
  float* query_columns = space.take(QUERIES * a.head_dim);
  float* scores = space.take(QUERIES * a.keys);
  float* added = space.take(QUERIES * a.keys);
  float* mixed = space.take(QUERIES * wide);
  int64_t key_step = a.key_token, value_step = a.value_token;
  const float* keys = rows_of<false>(at<T>(a.key, b, a.key_batch, g, a.key_head), key_step, a.keys, a.head_dim,
                                     space.take(a.keys * padded(a.head_dim, LANES)));
  const float* values = rows_of<true>(at<T>(a.value, b, a.value_batch, g, a.value_head), value_step, a.keys,
                                      a.value_dim, space.take(a.keys * wide));
  for (int64_t start = 0, step; start < a.tokens; start += step) {
    const Block block(a, start);
    step = block.step;
    for (int64_t h = g * sharing; h < (g + 1) * sharing; ++h) {
      if (KIND == MASKED && (h == g * sharing || a.mask_head))
        lay_mask(block, added, a, b * a.mask_batch + h * a.mask_head);
      lay_columns(query_columns, block.step, at<T>(a.query, b, a.query_batch, h, a.query_head) + start * a.query_token,
                  a.query_token, block.count, a.head_dim);
      multiply(block, scores, keys, key_step, query_columns, a.head_dim);
      float factors[QUERIES];
      float* log_sum = a.log_sum ? a.log_sum + (b * a.heads + h) * a.tokens + start : nullptr;
      for (int64_t v = 0; v < block.vectors; ++v) {
        Floats most;
        const Floats sums =
            exponentials<KIND>(block, v, scores + v * LANES, added + v * LANES, all(a.scale), most);
        store(factors + v * LANES, reciprocal(sums));
        if (log_sum) store(log_sum + v * LANES, most + logarithm(sums), smaller(LANES, block.count - v * LANES));
      }
      mix(block, mixed, wide, scores, values, value_step, a.keys);
      T* y = static_cast<T*>(a.y) + b * a.y_batch + h * a.y_head + start * a.y_token;
      for (int64_t t = 0; t < block.count; ++t)
        store_row(y + t * a.y_token, mixed + t * wide, a.value_dim, all(factors[t]));
    }
  }
}

template <class T, Kind KIND>
static void backward(const blip3o_attention_backward_arguments& a, int64_t b, int64_t g, Space space) {
  const int64_t key_wide = padded(a.head_dim, LANES), value_wide = padded(a.value_dim, LANES);
  const int64_t sharing = a.heads / a.groups;
  float* query_columns = space.take(QUERIES * a.head_dim);
  float* dy_columns = space.take(QUERIES * a.value_dim);
  float* scores = space.take(QUERIES * a.keys);
  float* dscores = space.take(QUERIES * a.keys);
  float* added = space.take(QUERIES * a.keys);
  float* query_space = space.take(QUERIES * key_wide);
  float* dy_space = space.take(QUERIES * value_wide);
  float* dquery = space.take(QUERIES * key_wide);
  float* dkey = space.take(a.keys * key_wide);
  float* dvalue = space.take(a.keys * value_wide);
  int64_t key_step = a.key_token, value_step = a.value_token;
  const float* keys = rows_of<true>(at<T>(a.key, b, a.key_batch, g, a.key_head), key_step, a.keys, a.head_dim,
                                    space.take(a.keys * key_wide));
  const float* values = rows_of<false>(at<T>(a.value, b, a.value_batch, g, a.value_head), value_step, a.keys,
                                       a.value_dim, space.take(a.keys * value_wide));
  std::memset(dkey, 0, sizeof(float) * static_cast<size_t>(a.keys * key_wide));
  std::memset(dvalue, 0, sizeof(float) * static_cast<size_t>(a.keys * value_wide));
  for (int64_t start = 0, step; start < a.tokens; start += step) {
    const Block block(a, start);
    step = block.step;
    for (int64_t h = g * sharing; h < (g + 1) * sharing; ++h) {
      if (KIND == MASKED && (h == g * sharing || a.mask_head))
        lay_mask(block, added, a, b * a.mask_batch + h * a.mask_head);
      int64_t query_step = a.query_token, dy_step = a.dy_token;
      const T* query_rows = at<T>(a.query, b, a.query_batch, h, a.query_head) + start * a.query_token;
      const T* dy_rows = at<T>(a.dy, b, a.dy_batch, h, a.dy_head) + start * a.dy_token;
      lay_columns(query_columns, block.step, query_rows, query_step, block.count, a.head_dim);
      lay_columns(dy_columns, block.step, dy_rows, dy_step, block.count, a.value_dim);
      const float* query = rows_of<true>(query_rows, query_step, block.count, a.head_dim, query_space);
      const float* dy = rows_of<true>(dy_rows, dy_step, block.count, a.value_dim, dy_space);
      multiply(block, scores, keys, key_step, query_columns, a.head_dim);
      multiply(block, dscores, values, value_step, dy_columns, a.value_dim);
      for (int64_t v = 0; v < block.vectors; ++v)
        score_gradients<KIND>(block, v, scores + v * LANES, dscores + v * LANES, added + v * LANES, all(a.scale));
      mix(block, dquery, key_wide, dscores, keys, key_step, a.keys);
      T* dx = static_cast<T*>(a.dquery) + b * a.dquery_batch + h * a.dquery_head + start * a.dquery_token;
      for (int64_t t = 0; t < block.count; ++t)
        store_row(dx + t * a.dquery_token, dquery + t * key_wide, a.head_dim, all(a.scale));
      gather(block, dkey, key_wide, dscores, query, query_step);
      gather(block, dvalue, value_wide, scores, dy, dy_step);
    }
  }
  T* dk = static_cast<T*>(a.dkey) + b * a.dkey_batch + g * a.dkey_head;
  T* dv = static_cast<T*>(a.dvalue) + b * a.dvalue_batch + g * a.dvalue_head;
  for (int64_t s = 0; s < a.keys; ++s) {
    store_row(dk + s * a.dkey_token, dkey + s * key_wide, a.head_dim, all(a.scale));
    store_row(dv + s * a.dvalue_token, dvalue + s * value_wide, a.value_dim, all(1.0f));
  }
}

template <class T, Kind KIND>
static void task(const blip3o_attention_arguments& a, int64_t b, int64_t g, Space space) {
  forward<T, KIND>(a, b, g, space);
}

template <class T, Kind KIND>
static void task(const blip3o_attention_backward_arguments& a, int64_t b, int64_t g, Space space) {
  backward<T, KIND>(a, b, g, space);
}

template <class T, class Arguments>
static int run(const Arguments& a) {
  const int64_t tasks = a.batch * a.groups;
  const int parts = static_cast<int>(smaller(blip3o_threads(a.threads, a.heads * a.batch * a.tokens * a.keys), tasks));
  const bool masked = a.mask_kind || !(a.scale > 0);
#pragma omp parallel for num_threads(parts) schedule(static) if (parts > 1)
  for (int part = 0; part < parts; ++part)
    for (int64_t i = tasks * part / parts; i < tasks * (part + 1) / parts; ++i)
      masked ? task<T, MASKED>(a, i / a.groups, i % a.groups, {a.workspace + part * a.workspace_floats})
             : task<T, PLAIN>(a, i / a.groups, i % a.groups, {a.workspace + part * a.workspace_floats});
  return BLIP3O_OK;
}

// space: what a task takes for each key, and for each query of a block.
template <class Arguments>
static int run_dtypes(const Arguments& a, int64_t keys, int64_t queries) {
  const int64_t wide = padded(a.head_dim, 16) + padded(a.value_dim, 16);
  if (a.groups < 1 || a.heads % a.groups || a.head_dim < 0 || a.value_dim < 0) return BLIP3O_BAD_ARGUMENT;
  const int64_t needed = padded(a.keys, 16) * (keys * wide + queries * 64) + 64 * queries * wide;
  if (a.workspace_floats % 16 || a.workspace_floats < needed) return BLIP3O_BAD_ARGUMENT;
  switch (a.dtype) {
    case BLIP3O_FLOAT32: return run<float>(a);
    case BLIP3O_BFLOAT16: return run<bfloat16>(a);
    case BLIP3O_FLOAT16: return run<float16>(a);
    default: return BLIP3O_BAD_DTYPE;
  }
}

static int attention(const blip3o_attention_arguments& a) {
  if (a.tokens != 1 || a.groups < 1) return run_dtypes(a, 1, 2);
  blip3o_attention_arguments folded = a;  // one token: the heads that share a key are a block
  folded.tokens = a.heads / a.groups;
  folded.heads = a.groups;
  folded.causal = 0;
  folded.y_token = a.y_head, folded.y_head *= folded.tokens;
  folded.query_token = a.query_head, folded.query_head *= folded.tokens;
  folded.mask_token = a.mask_head, folded.mask_head *= folded.tokens;
  return run_dtypes(folded, 1, 2);
}

static int attention_backward(const blip3o_attention_backward_arguments& a) { return run_dtypes(a, 2, 3); }

#endif
