// Attention of few queries: a head's scores are rows here, [queries, keys], of which no lane is wasted where vectors of queries
// (scores.h) would be mostly empty. Products, scores, and the backward pass for few keys.
// Included by attention.cpp once per instruction set, after scores.h: no include guard, no includes.

static constexpr int64_t FEW = 16;     // queries
static constexpr int64_t LITTLE = 64;  // keys up to which the backward pass comes here

// The sums over the lanes of each vector, in order.
static inline Floats sums_of(Floats (&v)[LANES]) {
  for (int64_t half = LANES / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) {
      Floats low, high;
      interleaved(v[i], v[i + half], low, high);
      v[i] = low + high;
    }
  return v[0];
}

static inline float largest_lane(Floats v) {
#if BLIP3O_LANES == 16
  return _mm512_reduce_max_ps((__m512)v);
#else
  float lanes[LANES];
  store(lanes, v);
  for (int64_t half = LANES / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] = lanes[i + half] > lanes[i] ? lanes[i + half] : lanes[i];
  return lanes[0];
#endif
}

// Q queries by all keys: as many sums at once as a vector has lanes.
template <int Q>
static inline void dots_of(float* products, int64_t step, const float* queries, int64_t rows, const float* keys,
                           int64_t key_step, int64_t count, int64_t wide) {
  constexpr int64_t AT_ONCE = LANES / Q;
  const float *query[Q], *key[AT_ONCE];
  for (int64_t q = 0; q < Q; ++q) query[q] = queries + smaller(q, rows - 1) * wide;
  for (int64_t s = 0; s < count; s += AT_ONCE) {
    if (s + AT_ONCE <= count)
      for (int64_t i = 0; i < AT_ONCE; ++i) key[i] = keys + (s + i) * key_step;
    else
      for (int64_t i = 0; i < AT_ONCE; ++i) key[i] = keys + smaller(s + i, count - 1) * key_step;
    Floats sums[LANES];
    for (int64_t i = 0; i < LANES; ++i) sums[i] = Floats{};  // `= {}` would be a loop over memory
    for (int64_t k = 0; k < wide; k += LANES) {
      Floats right[AT_ONCE];
      for (int64_t i = 0; i < AT_ONCE; ++i) right[i] = load(key[i] + k);
      for (int64_t q = 0; q < Q; ++q) {
        const Floats left = load(query[q] + k);
        for (int64_t i = 0; i < AT_ONCE; ++i) sums[q * AT_ONCE + i] += left * right[i];
      }
    }
    float found[LANES];
    store(found, sums_of(sums));
    const int64_t known = smaller(AT_ONCE, count - s);
    for (int64_t q = 0; q < smaller(Q, rows); ++q)
      if (known == AT_ONCE)
        std::memcpy(products + q * step + s, found + q * AT_ONCE, 4 * AT_ONCE);
      else
        for (int64_t i = 0; i < known; ++i) products[q * step + s + i] = found[q * AT_ONCE + i];
  }
}

// products [rows, count] = queries keys^T, rows of whole vectors; zeros follow to a multiple of LANES keys.
static void dots(float* products, int64_t step, const float* queries, int64_t rows, const float* keys, int64_t key_step,
                 int64_t count, int64_t wide) {
  constexpr int64_t MOST = LANES == 16 ? 4 : 2;
  if (count % LANES)
    for (int64_t q = 0; q < rows; ++q) store(products + q * step + count / LANES * LANES, Floats{});
  for (int64_t q = 0; q < rows; q += MOST) {
    float* to = products + q * step;
    const float* from = queries + q * wide;
    if (rows - q > 2) {
      dots_of<MOST>(to, step, from, rows - q, keys, key_step, count, wide);
    } else if (rows - q == 2) {
      dots_of<2>(to, step, from, 2, keys, key_step, count, wide);
    } else {
      dots_of<1>(to, step, from, 1, keys, key_step, count, wide);
    }
  }
}

// The keys that query t sees.
struct Seen {
  int64_t behind, ahead, keys;

  template <class Arguments>
  explicit Seen(const Arguments& a) : keys(a.keys) {
    behind = a.keys - a.tokens - (a.left < 0 ? a.keys : smaller(a.left, a.keys));
    ahead = a.keys - a.tokens + (a.right < 0 ? a.tokens : smaller(a.right, a.tokens)) + 1;
  }
  int64_t first(int64_t t) const { return smaller(larger(t + behind, 0), keys); }
  int64_t limit(int64_t t) const { return smaller(larger(t + ahead, 0), keys); }
};

// What the mask adds to a vector of keys, `count` of which there are; at: in elements.
template <class Arguments>
static inline Floats mask_of(const Arguments& a, int64_t at, int64_t count) {
  if (a.mask_kind == 0 || count <= 0) return Floats{};
  if (a.mask_kind == 2) return load_some(static_cast<const float*>(a.mask) + at, count);
  typedef uint8_t Bytes __attribute__((vector_size(LANES)));
  Bytes bytes{};
  std::memcpy(&bytes, static_cast<const uint8_t*>(a.mask) + at, static_cast<size_t>(smaller(count, LANES)));
  return __builtin_convertvector(bytes, Integers) != 0 ? Floats{} : all(-__builtin_inff());
}

// One query: products of keys -> scores, where PLAIN before the scale; -infinity where it sees none, and up to `end`. Returns the
// largest. derivatives: those of the softcap; null: not wanted.
template <Kind KIND, class Arguments>
static inline float row_scores(const Arguments& a, float* products, float* derivatives, int64_t mask, int64_t first,
                               int64_t limit, int64_t keys, int64_t end) {
  static const int32_t NUMBERS[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Integers numbers;
  std::memcpy(&numbers, NUMBERS, sizeof numbers);
  Floats most = all(-__builtin_inff());
  for (int64_t s = 0; s < end; s += LANES) {
    Floats v = load(products + s);
    if (KIND != PLAIN) {
      const Floats add = mask_of(a, mask + s, keys - s);
      if (KIND == CAPPED) {
        const Floats u = hyperbolic_tangent(v * (all(a.scale) / a.softcap));
        if (derivatives) store(derivatives + s, add == -__builtin_inff() ? Floats{} : 1.0f - u * u);
        v = masked(u * a.softcap, add);
      } else {
        v = masked(v * a.scale, add);
      }
    }
    if (s < first || s + LANES > limit) {
      const Integers key = numbers + static_cast<int32_t>(s);
      v = (key < static_cast<int32_t>(limit)) & (key >= static_cast<int32_t>(first)) ? v : all(-__builtin_inff());
    }
    if (KIND != PLAIN || s < first || s + LANES > limit) store(products + s, v);
    most = at_least(v, most);
  }
  return largest_lane(most);
}

template <class T, Kind KIND>
static void rows_backward(const blip3o_attention_backward_arguments& a, int64_t b, int64_t g, Space space) {
  const int64_t key_wide = padded(a.head_dim, LANES), value_wide = padded(a.value_dim, LANES), sharing = a.heads / a.groups;
  const int64_t step = padded(a.keys, LANES);
  const Seen seen(a);
  if (space.upcoming) space.upcoming->plan(a.tokens * sharing);
  float* scores = space.take(a.tokens * step);
  float* dscores = space.take(a.tokens * step);
  float* derivatives = space.take(step);
  float* query_space = space.take(a.tokens * key_wide);
  float* dy_space = space.take(a.tokens * value_wide);
  float* dquery = space.take(a.tokens * key_wide);
  float* dkey = space.take(a.keys * key_wide);
  float* dvalue = space.take(a.keys * value_wide);
  int64_t key_step = a.key_token, value_step = a.value_token;
  const float* keys = rows_of<true>(at<T>(a.key, b, a.key_batch, g, a.key_head), key_step, a.keys, a.head_dim,
                                    space.take(a.keys * key_wide), false);
  const float* values = rows_of<true>(at<T>(a.value, b, a.value_batch, g, a.value_head), value_step, a.keys,
                                      a.value_dim, space.take(a.keys * value_wide), false);
  for (int64_t h = g * sharing; h < (g + 1) * sharing; ++h) {
    int64_t query_step = key_wide, dy_step = value_wide;
    const auto rows = [&](const void* x, int64_t batch, int64_t head, int64_t token, int64_t width, float* to) {
      const T* from = at<T>(x, b, batch, h, head);
      for (int64_t t = 0; t < a.tokens; ++t)
        for (int64_t k = 0; k < width; k += LANES)
          store(to + t * padded(width, LANES) + k, load_some(from + t * token + k, width - k));
    };
    rows(a.query, a.query_batch, a.query_head, a.query_token, a.head_dim, query_space);
    rows(a.dy, a.dy_batch, a.dy_head, a.dy_token, a.value_dim, dy_space);
    dots(scores, step, query_space, a.tokens, keys, key_step, a.keys, key_wide);
    dots(dscores, step, dy_space, a.tokens, values, value_step, a.keys, value_wide);
    for (int64_t t = 0; t < a.tokens; ++t, space.ask()) {
      float *row = scores + t * step, *drow = dscores + t * step;
      const int64_t mask = b * a.mask_batch + h * a.mask_head + t * a.mask_token;
      const float most = row_scores<KIND>(a, row, derivatives, mask, seen.first(t), seen.limit(t), a.keys, step);
      const Floats shift = shift_of(all(most));
      Floats sums{}, dots{};
      for (int64_t s = 0; s < step; s += LANES) {
        const Floats e = weight<KIND>(load(row + s), shift, all(a.scale));
        sums += e;
        dots += e * load(drow + s);
        store(row + s, e);
      }
      const Floats total = all(sum(sums)), factor = reciprocal(total), dot = divided(all(sum(dots)), total, factor);
      for (int64_t s = 0; s < step; s += LANES) {
        const Floats p = divided(load(row + s), total, factor), gradient = p * (load(drow + s) - dot);
        store(row + s, p);
        store(drow + s, KIND == CAPPED ? gradient * load(derivatives + s) : gradient);
      }
    }
    product<true>(dquery, key_wide, dscores, step, keys, key_step, a.tokens, key_wide, a.keys);
    T* dx = static_cast<T*>(a.dquery) + b * a.dquery_batch + h * a.dquery_head;
    for (int64_t t = 0; t < a.tokens; ++t)
      store_row(dx + t * a.dquery_token, dquery + t * key_wide, a.head_dim, all(a.scale));
    const auto key_product = h > g * sharing ? product<false, true> : product<false, false>;
    key_product(dkey, key_wide, dscores, step, query_space, query_step, a.keys, key_wide, a.tokens);
    key_product(dvalue, value_wide, scores, step, dy_space, dy_step, a.keys, value_wide, a.tokens);
  }
  T* dk = static_cast<T*>(a.dkey) + b * a.dkey_batch + g * a.dkey_head;
  T* dv = static_cast<T*>(a.dvalue) + b * a.dvalue_batch + g * a.dvalue_head;
  for (int64_t s = 0; s < a.keys; ++s) {
    store_row(dk + s * a.dkey_token, dkey + s * key_wide, a.head_dim, all(a.scale));
    store_row(dv + s * a.dvalue_token, dvalue + s * value_wide, a.value_dim, all(1.0f));
  }
}
