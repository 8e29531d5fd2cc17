// Scaled dot-product attention on a CPU; the contract is kernels/blip3o_kernels/ops/attention.py.
//
// One task is one key-value head of one sample, with all the query heads that share it. The keys are transposed into panels
// once a task; after that everything is one small matrix product, `product`, whose tile of C stays in registers. A few rows
// at a time, a whole row of scores is in the cache, so that softmax needs no second look. Everything is computed in float32:
// other dtypes, and widths that are no multiple of a vector, are converted and padded when they are laid out.
//
// The backward pass computes scores and probabilities again from the log-sum-exp. With P the probabilities and dP = dy V^T:
//     dV = P^T dy,   dS = P (dP - rowsum(P dP)) scale,   dQ = dS K,   dK = dS^T Q.
// A task sums dK and dV over its rows in order, so the number of threads does not change a bit.
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

static constexpr int64_t BLOCK = 32;  // rows between two additions to dK and dV

// What is between a product and a score.
enum Kind { PLAIN, GENERAL };  // PLAIN: no mask and a positive scale, which keeps the order of the scores

struct Mask {
  const uint8_t* allowed;
  const float* added;

  Mask row(int64_t steps) const { return {allowed ? allowed + steps : nullptr, added ? added + steps : nullptr}; }
};

static const int32_t NUMBERS[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

static inline Floats only_first(Floats v, int64_t n, Floats rest) {
  Integers lane;
  std::memcpy(&lane, NUMBERS, sizeof lane);
  return lane < Integers{} + static_cast<int32_t>(n) ? v : rest;
}

// The products i.. of a row with `limit` keys as scores: scaled and masked, -inf from the limit on.
template <Kind KIND>
__attribute__((always_inline)) static inline Floats score(const float* products, int64_t i, int64_t limit, Floats scale, const Mask& mask) {
  const Floats least = all(-__builtin_inff());
  Floats s = load(products + i) * scale;
  const int64_t n = limit - i;
  if (KIND == GENERAL && mask.allowed) {
    typedef uint8_t Bytes __attribute__((vector_size(LANES)));
    Bytes bytes{};
    if (n >= LANES)
      std::memcpy(&bytes, mask.allowed + i, LANES);
    else
      std::memcpy(&bytes, mask.allowed + i, static_cast<size_t>(n));
    s = __builtin_convertvector(bytes, Integers) != 0 ? s : least;
  }
  if (KIND == GENERAL && mask.added) s += n >= LANES ? load(mask.added + i) : load(mask.added + i, n);
  return n >= LANES ? s : only_first(s, n, least);
}

// R rows of products, `length` apart, -> e^(s - max), zeros up to `width`; with the sums of these, and the largest scores.
template <Kind KIND, int R>
static inline void exponentials(float* products, int64_t length, const int64_t* limits, int64_t width, Floats scale,
                                const Mask* masks, float* totals, float* most) {
  int64_t shared = KIND == PLAIN ? limits[0] : 0;  // whole vectors that no row treats specially
  for (int r = 1; r < R; ++r) shared = smaller(shared, limits[r]);
  shared -= shared % LANES;
  Floats highest[R], sums[R], shift[R];
  for (int r = 0; r < R; ++r) highest[r] = all(-__builtin_inff()), sums[r] = Floats{};
  for (int64_t i = 0; i < shared; i += LANES)
    for (int r = 0; r < R; ++r) highest[r] = at_least(load(products + r * length + i), highest[r]);
  for (int r = 0; r < R; ++r) {
    if (KIND == PLAIN) highest[r] *= scale;
    for (int64_t i = shared; i < limits[r]; i += LANES) {
      const Floats s = score<KIND>(products + r * length, i, limits[r], scale, masks[r]);
      highest[r] = at_least(s, highest[r]);
      store(products + r * length + i, s);
    }
  }
  for (int r = 0; r < R; ++r) most[r] = maximum(highest[r]);
  for (int r = 0; r < R; ++r) shift[r] = all(most[r] == -__builtin_inff() ? 0.0f : most[r]);
  for (int64_t i = 0; i < shared; i += LANES)
    for (int r = 0; r < R; ++r) {
      const Floats e = exponential(load(products + r * length + i) * scale - shift[r]);
      sums[r] += e;
      store(products + r * length + i, e);
    }
  for (int r = 0; r < R; ++r) {
    int64_t i = shared;
    for (; i < limits[r]; i += LANES) {
      const Floats e = exponential(load(products + r * length + i) - shift[r]);
      sums[r] += e;
      store(products + r * length + i, e);
    }
    for (; i < width; i += LANES) store(products + r * length + i, Floats{});
  }
  for (int r = 0; r < R; ++r) totals[r] = sum(sums[r]);
}

static inline Mask mask_of(const void* mask, int kind) {
  return {kind == 1 ? static_cast<const uint8_t*>(mask) : nullptr, kind == 2 ? static_cast<const float*>(mask) : nullptr};
}

static inline int64_t limit_of(int causal, int64_t token, int64_t tokens, int64_t keys) {
  const int64_t seen = causal ? token + keys - tokens + 1 : keys;
  return seen < 0 ? 0 : smaller(seen, keys);
}

template <class T, Kind KIND>
static void forward(const blip3o_attention_arguments& a, int64_t b, int64_t g, float* space) {
  const int64_t wide = padded(a.value_dim, LANES), length = padded(a.keys, PANEL), sharing = a.heads / a.groups;
  float* panels = space;
  float* scores = panels + length * a.head_dim;
  float* out = scores + ROWS * length;
  float* query_space = out + ROWS * wide;
  float* value_space = query_space + ROWS * padded(a.head_dim, LANES);
  lay_panels(panels, static_cast<const T*>(a.key) + b * a.key_batch + g * a.key_head, a.key_token, a.keys, a.head_dim);
  int64_t value_step = a.value_token;
  const float* values = rows_of(static_cast<const T*>(a.value) + b * a.value_batch + g * a.value_head, value_step, a.keys,
                                a.value_dim, value_space);
  for (int64_t h = g * sharing; h < (g + 1) * sharing; ++h) {
    const Mask head_mask = mask_of(a.mask, a.mask_kind).row(b * a.mask_batch + h * a.mask_head);
    for (int64_t t = 0; t < a.tokens; t += ROWS) {
      const int64_t rows = smaller(ROWS, a.tokens - t), seen = limit_of(a.causal, t + rows - 1, a.tokens, a.keys);
      int64_t query_step = a.query_token;
      const float* query = rows_of(static_cast<const T*>(a.query) + b * a.query_batch + h * a.query_head + t * query_step,
                                   query_step, rows, a.head_dim, query_space);
      product<true>(scores, length, {query, query_step, 1}, {panels, PANEL, PANEL * a.head_dim}, rows, padded(seen, LANES),
                    a.head_dim);
      int64_t limits[ROWS];
      Mask masks[ROWS];
      float sums[ROWS], most[ROWS];
      for (int64_t r = 0; r < rows; ++r) {
        limits[r] = limit_of(a.causal, t + r, a.tokens, a.keys);
        masks[r] = head_mask.row((t + r) * a.mask_token);
      }
      int64_t r = 0;
      for (; r + 4 <= rows; r += 4)
        exponentials<KIND, 4>(scores + r * length, length, limits + r, seen, all(a.scale), masks + r, sums + r, most + r);
      for (; r < rows; ++r)
        exponentials<KIND, 1>(scores + r * length, length, limits + r, seen, all(a.scale), masks + r, sums + r, most + r);
      for (r = 0; a.log_sum && r < rows; ++r)
        a.log_sum[(b * a.heads + h) * a.tokens + t + r] = most[r] + std::log(sums[r]);
      product<true>(out, wide, {scores, length, 1}, {values, value_step, PANEL}, rows, wide, seen);
      T* y = static_cast<T*>(a.y) + b * a.y_batch + h * a.y_head + t * a.y_token;
      for (r = 0; r < rows; ++r)
        store_row(y + r * a.y_token, out + r * wide, a.value_dim, all(sums[r] == 0.0f ? 0.0f : 1.0f / sums[r]));
    }
  }
}

// R rows: products -> probabilities, dprobabilities -> dscores, in place; zeros up to `width`. The rounding of the log-sum-exp
// is common to a row, so the probabilities are made to sum to 1 again.
template <Kind KIND, int R>
static inline void score_gradients(float* products, float* gradients, int64_t length, const int64_t* limits, int64_t width,
                                   Floats scale, const Mask* masks, const float* log_sum) {
  int64_t shared = KIND == PLAIN ? limits[0] : 0;
  for (int r = 1; r < R; ++r) shared = smaller(shared, limits[r]);
  shared -= shared % LANES;
  Floats shift[R], sums[R], dots[R];
  for (int r = 0; r < R; ++r) {
    shift[r] = all(log_sum[r] == -__builtin_inff() ? __builtin_inff() : log_sum[r]);
    sums[r] = dots[r] = Floats{};
  }
  const auto probability = [&](int r, int64_t i, Floats s) {
    const Floats p = exponential(s - shift[r]);
    sums[r] += p;
    dots[r] += p * load(gradients + r * length + i);
    store(products + r * length + i, p);
  };
  for (int64_t i = 0; i < shared; i += LANES)
    for (int r = 0; r < R; ++r) probability(r, i, load(products + r * length + i) * scale);
  for (int r = 0; r < R; ++r)
    for (int64_t i = shared; i < limits[r]; i += LANES)
      probability(r, i, score<KIND>(products + r * length, i, limits[r], scale, masks[r]));
  for (int r = 0; r < R; ++r) {
    const float found = sum(sums[r]), factor = found == 0.0f ? 0.0f : 1.0f / found;
    sums[r] = all(factor), dots[r] = all(sum(dots[r]) * factor);
  }
  for (int r = 0; r < R; ++r) {
    float* to = products + r * length;
    float* dto = gradients + r * length;
    int64_t i = 0;
    for (; i < limits[r]; i += LANES) {
      const Floats p = load(to + i) * sums[r];
      store(to + i, p);
      store(dto + i, p * (load(dto + i) - dots[r]) * scale);
    }
    for (; i < width; i += LANES) store(to + i, Floats{}), store(dto + i, Floats{});
  }
}

template <class T, Kind KIND>
static void backward(const blip3o_attention_backward_arguments& a, int64_t b, int64_t g, float* space) {
  const int64_t key_wide = padded(a.head_dim, LANES), value_wide = padded(a.value_dim, LANES);
  const int64_t length = padded(a.keys, PANEL), sharing = a.heads / a.groups;
  float* key_panels = space;
  float* value_panels = key_panels + length * a.head_dim;
  float* scores = value_panels + length * a.value_dim;
  float* dscores = scores + BLOCK * length;
  float* dkey = dscores + BLOCK * length;
  float* dvalue = dkey + length * key_wide;
  float* dquery = dvalue + length * value_wide;
  float* query_space = dquery + ROWS * key_wide;
  float* dy_space = query_space + BLOCK * key_wide;
  float* key_space = dy_space + BLOCK * value_wide;
  const T* key = static_cast<const T*>(a.key) + b * a.key_batch + g * a.key_head;
  lay_panels(key_panels, key, a.key_token, a.keys, a.head_dim);
  lay_panels(value_panels, static_cast<const T*>(a.value) + b * a.value_batch + g * a.value_head, a.value_token, a.keys,
             a.value_dim);
  int64_t key_step = a.key_token;
  const float* keys = rows_of(key, key_step, a.keys, a.head_dim, key_space);
  std::memset(dkey, 0, sizeof(float) * static_cast<size_t>(length * (key_wide + value_wide)));
  for (int64_t h = g * sharing; h < (g + 1) * sharing; ++h) {
    const Mask head_mask = mask_of(a.mask, a.mask_kind).row(b * a.mask_batch + h * a.mask_head);
    for (int64_t start = 0; start < a.tokens; start += BLOCK) {
      const int64_t count = smaller(BLOCK, a.tokens - start);
      const int64_t all_seen = limit_of(a.causal, start + count - 1, a.tokens, a.keys);
      int64_t query_step = a.query_token, dy_step = a.dy_token;
      const float* query = rows_of(static_cast<const T*>(a.query) + b * a.query_batch + h * a.query_head + start * query_step,
                                   query_step, count, a.head_dim, query_space);
      const float* dy = rows_of(static_cast<const T*>(a.dy) + b * a.dy_batch + h * a.dy_head + start * dy_step, dy_step,
                                count, a.value_dim, dy_space);
      for (int64_t r = 0; r < count; r += ROWS) {
        const int64_t rows = smaller(ROWS, count - r), t = start + r;
        const int64_t seen = limit_of(a.causal, t + rows - 1, a.tokens, a.keys);
        float* s = scores + r * length;
        float* ds = dscores + r * length;
        product<true>(s, length, {query + r * query_step, query_step, 1}, {key_panels, PANEL, PANEL * a.head_dim}, rows,
                      padded(seen, LANES), a.head_dim);
        product<true>(ds, length, {dy + r * dy_step, dy_step, 1}, {value_panels, PANEL, PANEL * a.value_dim}, rows,
                      padded(seen, LANES), a.value_dim);
        int64_t limits[ROWS];
        Mask masks[ROWS];
        for (int64_t i = 0; i < rows; ++i) {
          limits[i] = limit_of(a.causal, t + i, a.tokens, a.keys);
          masks[i] = head_mask.row((t + i) * a.mask_token);
        }
        const float* log_sum = a.log_sum + (b * a.heads + h) * a.tokens + t;
        int64_t i = 0;
        for (; i + 4 <= rows; i += 4)
          score_gradients<KIND, 4>(s + i * length, ds + i * length, length, limits + i, all_seen, all(a.scale), masks + i,
                                   log_sum + i);
        for (; i < rows; ++i)
          score_gradients<KIND, 1>(s + i * length, ds + i * length, length, limits + i, all_seen, all(a.scale), masks + i,
                                   log_sum + i);
        product<true>(dquery, key_wide, {ds, length, 1}, {keys, key_step, PANEL}, rows, key_wide, seen);
        T* dx = static_cast<T*>(a.dquery) + b * a.dquery_batch + h * a.dquery_head + t * a.dquery_token;
        for (i = 0; i < rows; ++i) store_row(dx + i * a.dquery_token, dquery + i * key_wide, a.head_dim, all(1.0f));
      }
      product<false, true>(dkey, key_wide, {dscores, 1, length}, {query, query_step, PANEL}, all_seen, key_wide, count);
      product<false, true>(dvalue, value_wide, {scores, 1, length}, {dy, dy_step, PANEL}, all_seen, value_wide, count);
    }
  }
  T* dk = static_cast<T*>(a.dkey) + b * a.dkey_batch + g * a.dkey_head;
  T* dv = static_cast<T*>(a.dvalue) + b * a.dvalue_batch + g * a.dvalue_head;
  for (int64_t s = 0; s < a.keys; ++s) {
    store_row(dk + s * a.dkey_token, dkey + s * key_wide, a.head_dim, all(1.0f));
    store_row(dv + s * a.dvalue_token, dvalue + s * value_wide, a.value_dim, all(1.0f));
  }
}

template <class T>
static void task(const blip3o_attention_arguments& a, int64_t b, int64_t g, float* space) {
  a.mask_kind || !(a.scale > 0) ? forward<T, GENERAL>(a, b, g, space) : forward<T, PLAIN>(a, b, g, space);
}

template <class T>
static void task(const blip3o_attention_backward_arguments& a, int64_t b, int64_t g, float* space) {
  a.mask_kind || !(a.scale > 0) ? backward<T, GENERAL>(a, b, g, space) : backward<T, PLAIN>(a, b, g, space);
}

template <class T, class Arguments>
static int run(const Arguments& a, int64_t space) {
  const int64_t tasks = a.batch * a.groups;
  const int wanted = blip3o_threads(a.threads, a.heads * a.batch * a.tokens * a.keys);
  const int parts = static_cast<int>(smaller(wanted, tasks));
#pragma omp parallel for num_threads(parts) schedule(static) if (parts > 1)
  for (int part = 0; part < parts; ++part)
    for (int64_t i = tasks * part / parts; i < tasks * (part + 1) / parts; ++i)
      task<T>(a, i / a.groups, i % a.groups, a.workspace + part * space);
  return BLIP3O_OK;
}

template <class Arguments>
static int run_dtypes(const Arguments& a, int64_t space) {
  if (a.groups < 1 || a.heads % a.groups || a.head_dim < 0 || a.workspace_floats < space) return BLIP3O_BAD_ARGUMENT;
  switch (a.dtype) {
    case BLIP3O_FLOAT32: return run<float>(a, a.workspace_floats);
    case BLIP3O_BFLOAT16: return run<bfloat16>(a, a.workspace_floats);
    case BLIP3O_FLOAT16: return run<float16>(a, a.workspace_floats);
    default: return BLIP3O_BAD_DTYPE;
  }
}

static int attention(const blip3o_attention_arguments& a) {
  const int64_t key_wide = padded(a.head_dim, LANES), value_wide = padded(a.value_dim, LANES);
  const int64_t length = padded(a.keys, PANEL);
  const int64_t space = length * (key_wide + value_wide + ROWS) + ROWS * (key_wide + value_wide);
  if (a.tokens != 1) return run_dtypes(a, space);
  blip3o_attention_arguments folded = a;  // one token: its heads are the rows
  folded.tokens = a.heads / (a.groups < 1 ? 1 : a.groups);
  folded.heads = a.groups;
  folded.causal = 0;
  folded.y_token = a.y_head, folded.y_head *= folded.tokens;
  folded.query_token = a.query_head, folded.query_head *= folded.tokens;
  folded.mask_token = a.mask_head, folded.mask_head *= folded.tokens;
  return run_dtypes(folded, space);
}

static int attention_backward(const blip3o_attention_backward_arguments& a) {
  const int64_t key_wide = padded(a.head_dim, LANES), value_wide = padded(a.value_dim, LANES);
  const int64_t length = padded(a.keys, PANEL);
  return run_dtypes(a, length * (3 * key_wide + 2 * value_wide + 2 * BLOCK) +
                           (BLOCK + ROWS) * key_wide + BLOCK * value_wide);
}

#endif
