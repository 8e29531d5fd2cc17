// Scaled dot-product attention on a CPU; the contract is kernels/blip3o_kernels/ops/attention.py.
//
// One task is one key-value head of one sample, with all the query heads that share it. It takes a block of queries at a
// time and holds their scores transposed, [keys, queries], so that softmax works on a vector of queries: its maxima and
// sums need no look across lanes, and short rows of keys waste nothing (scores.h). All else are small matrix products
// (product.h) in float32; other dtypes are converted when they are laid out. Keys are taken in parts whose scores stay in the
// first cache, under a running softmax. A packed sequence is a sample of its own, and so is its task.
//
// The backward pass computes the scores again, of all keys at once. With P the probabilities and dP = V dy^T, both [keys, queries]:
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

template <class T>
static inline const T* at(const void* data, int64_t b, int64_t batch, int64_t h, int64_t head) {
  return static_cast<const T*>(data) + b * batch + h * head;
}

#include "upcoming.h"
#include "scores.h"

template <class T>
static bool tiled(int instruction_set) {
  return LANES == 16 && std::is_same<T, bfloat16>::value && blip3o_instruction_set(instruction_set) >= BLIP3O_AVX512_BF16;
}

template <Kind KIND>
static void lay_log_sums(float* to, int64_t step, const Block& block, const Running* running, float scale) {
  for (int64_t v = 0; v < block.vectors; ++v) {
    float logs[LANES];
    store(logs, scaled<KIND>(running[v].most, all(scale)) + logarithm(running[v].sum));
    for (int64_t t = v * LANES; t < smaller(block.count, (v + 1) * LANES); ++t) to[t * step] = logs[t - v * LANES];
  }
}

#if BLIP3O_LANES == 16
#include "tiles.h"

#include "attention_tiles.h"
#endif
#include "rows.h"

#include "attention_rows.h"

template <class T, Kind KIND>
static void forward(const blip3o_attention_arguments& a, int64_t b, int64_t g, Space space) {
  const int64_t wide = padded(a.value_dim, LANES), sharing = a.heads / a.groups;
  if (space.upcoming) space.upcoming->plan(sharing * (padded(a.tokens, QUERIES) / QUERIES * a.keys + a.tokens) / 4);
  float* query_columns = space.take(QUERIES * a.head_dim);
  float* scores = space.take(QUERIES * smaller(KEYS, a.keys));
  float* added = space.take(QUERIES * smaller(KEYS, a.keys));
  float* mixed = space.take(QUERIES * wide);
  int64_t key_step = a.key_token, value_step = a.value_token;
  const float* keys = rows_of<false>(at<T>(a.key, b, a.key_batch, g, a.key_head), key_step, a.keys, a.head_dim,
                                     space.take(a.keys * padded(a.head_dim, LANES)), true);
  const float* values = rows_of<true>(at<T>(a.value, b, a.value_batch, g, a.value_head), value_step, a.keys,
                                      a.value_dim, space.take(a.keys * wide), true);
  for (int64_t start = 0; start < a.tokens; start += QUERIES) {
    const Block all_keys(a, start, 0, a.keys);
    for (int64_t h = g * sharing; h < (g + 1) * sharing; ++h) {
      lay_columns(query_columns, QUERIES, at<T>(a.query, b, a.query_batch, h, a.query_head) + start * a.query_token,
                  a.query_token, all_keys.count, a.head_dim);
      std::memset(mixed, 0, sizeof(float) * static_cast<size_t>(all_keys.count * wide));
      Running running[WIDE];
      for (int64_t from = all_keys.firsts[0]; from < all_keys.end(); from += KEYS) {
        const Block block(a, start, from, KEYS);
        if (KIND != PLAIN) lay_mask(block, added, a, b * a.mask_batch + h * a.mask_head);
        multiply(block, scores, keys + from * key_step, key_step, query_columns, a.head_dim, space);
        float kept[QUERIES];
        for (int64_t v = 0; v < block.vectors; ++v, space.ask())
          store(kept + v * LANES, exponentials<KIND>(block, v, scores + v * LANES, added + v * LANES, all(a.scale),
                                                     all(a.softcap), running[v]));
        if (from > all_keys.firsts[0])
          for (int64_t t = 0; t < block.count; ++t)
            if (kept[t] != 1.0f) store_row(mixed + t * wide, mixed + t * wide, wide, all(kept[t]));
        mix(block, mixed, wide, scores, values + from * value_step, value_step, space);
      }
      T* y = static_cast<T*>(a.y) + b * a.y_batch + h * a.y_head + start * a.y_token;
      float* log_sum = a.log_sum ? a.log_sum + (b * a.heads + h) * a.log_sum_head + start * a.log_sum_token : nullptr;
      for (int64_t t = 0; t < all_keys.count; ++t) {
        const Running& its = running[t / LANES];
        const float sum = its.sum[t % LANES];
        // A sum of 0: all is masked, and the result is 0, whatever the values are. Or all scores are -infinity: 0 / 0.
        const bool nothing = sum == 0.0f && (KIND != PLAIN || all_keys.first(t) >= all_keys.limit(t));
        if (nothing) std::memset(mixed + t * wide, 0, sizeof(float) * static_cast<size_t>(wide));
        store_row(y + t * a.y_token, mixed + t * wide, a.value_dim, all(nothing ? 0.0f : 1.0f / sum));
      }
      if (log_sum) lay_log_sums<KIND>(log_sum, a.log_sum_token, all_keys, running, a.scale);
    }
  }
}

template <class T, Kind KIND>
static void backward(const blip3o_attention_backward_arguments& a, int64_t b, int64_t g, Space space) {
  const int64_t key_wide = padded(a.head_dim, LANES), value_wide = padded(a.value_dim, LANES);
  const int64_t sharing = a.heads / a.groups;
  if (space.upcoming) space.upcoming->plan(sharing * (padded(a.tokens, QUERIES) / QUERIES * a.keys * 2 + a.tokens) / 4);
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
                                    space.take(a.keys * key_wide), true);
  const float* values = rows_of<false>(at<T>(a.value, b, a.value_batch, g, a.value_head), value_step, a.keys,
                                       a.value_dim, space.take(a.keys * value_wide), true);
  std::memset(dkey, 0, sizeof(float) * static_cast<size_t>(a.keys * key_wide));
  std::memset(dvalue, 0, sizeof(float) * static_cast<size_t>(a.keys * value_wide));
  for (int64_t start = 0; start < a.tokens; start += QUERIES) {
    const Block block(a, start, 0, a.keys);
    for (int64_t h = g * sharing; h < (g + 1) * sharing; ++h) {
      if (KIND == CAPPED || (KIND == MASKED && (h == g * sharing || a.mask_head)))
        lay_mask(block, added, a, b * a.mask_batch + h * a.mask_head);
      int64_t query_step = a.query_token, dy_step = a.dy_token;
      const T* query_rows = at<T>(a.query, b, a.query_batch, h, a.query_head) + start * a.query_token;
      const T* dy_rows = at<T>(a.dy, b, a.dy_batch, h, a.dy_head) + start * a.dy_token;
      lay_columns(query_columns, QUERIES, query_rows, query_step, block.count, a.head_dim);
      lay_columns(dy_columns, QUERIES, dy_rows, dy_step, block.count, a.value_dim);
      const float* query = rows_of<true>(query_rows, query_step, block.count, a.head_dim, query_space, true);
      const float* dy = rows_of<true>(dy_rows, dy_step, block.count, a.value_dim, dy_space, true);
      multiply(block, scores, keys, key_step, query_columns, a.head_dim, space);
      multiply(block, dscores, values, value_step, dy_columns, a.value_dim, space);
      for (int64_t v = 0; v < block.vectors; ++v, space.ask())
        score_gradients<KIND>(block, v, scores + v * LANES, dscores + v * LANES, added + v * LANES, all(a.scale),
                              all(a.softcap));
      std::memset(dquery, 0, sizeof(float) * static_cast<size_t>(block.count * key_wide));
      for (int64_t from = block.firsts[0]; from < block.end(); from += KEYS)
        mix(Block(a, start, from, KEYS), dquery, key_wide, dscores + from * QUERIES, keys + from * key_step, key_step,
            space);
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

template <class T>
static void skip(void*& x, int64_t elements) { x = static_cast<T*>(x) + elements; }
template <class T>
static void skip(const void*& x, int64_t elements) { x = static_cast<const T*>(x) + elements; }

// Tensors from a query and a key on.
template <class T>
static void start_at(blip3o_attention_arguments& a, int64_t query, int64_t key) {
  skip<T>(a.y, query * a.y_token);
  skip<T>(a.query, query * a.query_token);
  skip<T>(a.key, key * a.key_token);
  skip<T>(a.value, key * a.value_token);
  if (a.log_sum) a.log_sum += query;
}
template <class T>
static void start_at(blip3o_attention_backward_arguments& a, int64_t query, int64_t key) {
  skip<T>(a.dquery, query * a.dquery_token);
  skip<T>(a.dkey, key * a.dkey_token);
  skip<T>(a.dvalue, key * a.dvalue_token);
  skip<T>(a.dy, query * a.dy_token);
  skip<T>(a.y, query * a.y_token);
  a.log_sum += query;
  skip<T>(a.query, query * a.query_token);
  skip<T>(a.key, key * a.key_token);
  skip<T>(a.value, key * a.value_token);
}

// One token stands at the last key; the heads that share a key become its block of tokens.
template <class T>
static void fold(blip3o_attention_arguments& a) {
  if (a.tokens != 1) return;
  if (a.left >= 0 && a.left < a.keys) {  // from the window's first key on
    const int64_t from = a.keys - 1 - a.left;
    start_at<T>(a, 0, from);
    if (a.mask_kind) a.mask_kind == 1 ? skip<uint8_t>(a.mask, from) : skip<float>(a.mask, from);
    a.keys -= from;
  }
  a.left = a.right = -1;
  a.tokens = a.heads / a.groups;
  a.heads = a.groups;
  a.log_sum_token = a.log_sum_head, a.log_sum_head *= a.tokens;
  a.y_token = a.y_head, a.y_head *= a.tokens;
  a.query_token = a.query_head, a.query_head *= a.tokens;
  a.mask_token = a.mask_head, a.mask_head *= a.tokens;
}

template <class T, Kind KIND>
static void task(const blip3o_attention_arguments& a, int64_t b, int64_t g, Space space) {
  if (a.tokens <= FEW) {
    float* found = space.take(Found::floats(padded(a.value_dim, LANES)));
    for (int64_t h = g * (a.heads / a.groups); h < (g + 1) * (a.heads / a.groups) && a.tokens; ++h) {
      look<T, KIND>(a, b, h, 0, 1, found, space);
      conclude<T, KIND>(a, b, h, found, 1);
    }
    return;
  }
#if BLIP3O_LANES == 16
  if (tiled<T>(a.instruction_set)) return tiled_forward<KIND>(a, b, g, space);
#endif
  forward<T, KIND>(a, b, g, space);
}

template <class T, Kind KIND>
static void task(const blip3o_attention_backward_arguments& a, int64_t b, int64_t g, Space space) {
  if (a.tokens <= FEW && a.keys <= LITTLE) return rows_backward<T, KIND>(a, b, g, space);
#if BLIP3O_LANES == 16
  if (tiled<T>(a.instruction_set)) return tiled_backward<KIND>(a, b, g, space);
#endif
  backward<T, KIND>(a, b, g, space);
}

// There is no such pass.
static int64_t key_parts(const blip3o_attention_backward_arguments&) { return 1; }
template <class T, Kind KIND>
static int run_parts(const blip3o_attention_backward_arguments&, int64_t, int) { return BLIP3O_OK; }
template <class T>
static void fold(blip3o_attention_backward_arguments&) {}

// Tokens and keys up to which a task waits for memory longer than for its products.
static constexpr int64_t SHORT = 256;

template <class T>
static void expect_results(Upcoming& next, const blip3o_attention_arguments& a, int64_t b, int64_t, int64_t h) {
  next.add(at<T>(a.y, b, a.y_batch, h, a.y_head), a.y_token, a.tokens, a.value_dim);
}
template <class T>
static void expect_results(Upcoming& next, const blip3o_attention_backward_arguments& a, int64_t b, int64_t g, int64_t h) {
  next.add(at<T>(a.dy, b, a.dy_batch, h, a.dy_head), a.dy_token, a.tokens, a.value_dim);
  if (tiled<T>(a.instruction_set)) next.add(at<T>(a.y, b, a.y_batch, h, a.y_head), a.y_token, a.tokens, a.value_dim);
  next.add(at<T>(a.dquery, b, a.dquery_batch, h, a.dquery_head), a.dquery_token, a.tokens, a.head_dim);
  next.add(at<T>(a.dkey, b, a.dkey_batch, g, a.dkey_head), a.dkey_token, a.keys, a.head_dim);
  next.add(at<T>(a.dvalue, b, a.dvalue_batch, g, a.dvalue_head), a.dvalue_token, a.keys, a.value_dim);
}
template <class T, class Arguments>
static void expect(Upcoming& next, const Arguments& a, int64_t b, int64_t g) {
  const int64_t h = g * (a.heads / a.groups);
  next.add(at<T>(a.key, b, a.key_batch, g, a.key_head), a.key_token, a.keys, a.head_dim);
  next.add(at<T>(a.value, b, a.value_batch, g, a.value_head), a.value_token, a.keys, a.value_dim);
  next.add(at<T>(a.query, b, a.query_batch, h, a.query_head), a.query_token, a.tokens, a.head_dim);
  expect_results<T>(next, a, b, g, h);
}

template <class T, Kind KIND, class Arguments>
static int run(const Arguments& arguments) {
  Arguments a = arguments;
  const int threads = blip3o_threads(a.threads, a.heads * a.batch * a.tokens * a.keys);
  if (!a.cu_seqlens_q) {
    fold<T>(a);
    const int64_t parts = key_parts(a);
    if (parts > 1) return run_parts<T, KIND>(a, parts, threads);
  }
  const bool asking = larger(a.tokens, a.keys) <= SHORT && a.batch * a.groups > 16;
  share(a.batch * a.sequences * a.groups, threads, [&](int thread, int64_t from, int64_t to) {
    Space space{a.workspace + thread * a.workspace_floats, nullptr};
    for (int64_t i = from; i < to; ++i) {
      const int64_t n = i / a.groups, g = i % a.groups;  // n: a sample, or a sequence of the only one
      if (!a.cu_seqlens_q) {
        Upcoming next;
        if (asking && i + 1 < to) {
          expect<T>(next, a, (i + 1) / a.groups, (i + 1) % a.groups);
          space.upcoming = &next;
        }
        task<T, KIND>(a, n, g, space);
        space.upcoming = nullptr;
        continue;
      }
      Arguments sequence = a;
      sequence.tokens = a.cu_seqlens_q[n + 1] - a.cu_seqlens_q[n];
      sequence.keys = a.cu_seqlens_k[n + 1] - a.cu_seqlens_k[n];
      start_at<T>(sequence, a.cu_seqlens_q[n], a.cu_seqlens_k[n]);
      fold<T>(sequence);
      task<T, KIND>(sequence, 0, g, space);
    }
  });
  return BLIP3O_OK;
}

template <class T, class Arguments>
static int run_kinds(const Arguments& a) {
  if (a.softcap > 0) return run<T, CAPPED>(a);
  return a.mask_kind || !(a.scale > 0) ? run<T, MASKED>(a) : run<T, PLAIN>(a);
}

static bool ascending(const int32_t* ends, int64_t sequences, int64_t last) {
  for (int64_t i = 0; i < sequences; ++i)
    if (ends[i] > ends[i + 1]) return false;
  return ends[0] == 0 && ends[sequences] == last;
}

// needed: the floats that a task takes.
template <class Arguments>
static int run_dtypes(const Arguments& a, int64_t needed) {
  if (a.groups < 1 || a.heads % a.groups || a.head_dim < 0 || a.value_dim < 0) return BLIP3O_BAD_ARGUMENT;
  if (a.workspace_floats % 16 || a.workspace_floats < needed) return BLIP3O_BAD_ARGUMENT;
  if (!a.cu_seqlens_q ? a.sequences != 1
                      : a.batch != 1 || a.mask_kind || a.sequences < 1 ||
                            !ascending(a.cu_seqlens_q, a.sequences, a.tokens) ||
                            !ascending(a.cu_seqlens_k, a.sequences, a.keys))
    return BLIP3O_BAD_ARGUMENT;
  return by_dtype(a.dtype, [&](auto t) { return run_kinds<decltype(t)>(a); });
}

// As csrc/blip3o.h states it.
static int attention(const blip3o_attention_arguments& a) {
  const int64_t keys = padded(a.keys, 32), part = smaller(keys, 128);
  const int64_t wide = padded(a.head_dim, 32) + padded(a.value_dim, 32);
  const int64_t rows = a.tokens == 1 && a.groups > 0 ? a.heads / a.groups : a.tokens;
  if (rows <= FEW && !a.cu_seqlens_q) return run_dtypes(a, (part + 64) * wide + 32 * part);
  return run_dtypes(a, keys * wide + 64 * (3 * part + wide));
}
static int attention_backward(const blip3o_attention_backward_arguments& a) {
  const int64_t keys = padded(a.keys, 32), wide = padded(a.head_dim, 32) + padded(a.value_dim, 32);
  return run_dtypes(a, keys * 2 * wide + 192 * (keys + smaller(keys, 128) + wide));
}

#endif
