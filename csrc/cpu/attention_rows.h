// The forward pass of few queries, such as decoding (rows.h). Keys and values are read where they lie, and asked for ahead of
// time, since memory is the limit. Softmax takes KEYS keys at a time, and the keys of a long cache are cut into parts.
// Included by attention.cpp once per instruction set, after rows.h: no include guard, no includes.

static constexpr int64_t STRETCH = 32;            // keys that are converted at once, in the first cache
static constexpr int64_t TILED_KEYS = 128;        // from which AMX pays
static constexpr int64_t PART = 256, PARTS = 32;  // the keys of one task at least, and key parts of all samples at most

// What a task has found of the keys it was given: of each query the largest score, the sum of e^(score - largest), and below it
// [FEW, wide] the sum of values so weighted.
struct Found {
  float most[FEW], sum[FEW];
  float* mixed() { return reinterpret_cast<float*>(this + 1); }
  static int64_t floats(int64_t wide) { return 2 * FEW + FEW * wide; }
};

// The two products in vectors: scores of a run of keys, and their values weighted.
template <class T>
class InVectors {
 public:
  static constexpr int64_t UNIT = LANES;  // keys are padded to a multiple of it

  InVectors(const blip3o_attention_arguments& arguments, const T* query, Space& space) : a(arguments) {
    const int64_t wide = padded(a.head_dim, LANES), value_wide = padded(a.value_dim, LANES);
    int64_t step = a.query_token;
    queries = space.take(a.tokens * wide);
    converted = space.take(STRETCH * larger(wide, value_wide));
    for (int64_t t = 0; t < a.tokens; ++t)
      for (int64_t k = 0; k < a.head_dim; k += LANES)
        store(queries + t * wide + k, load_some(query + t * step + k, a.head_dim - k));
  }
  void scores(float* products, const T* key, int64_t count) {
    for (int64_t s = 0; s < count; s += STRETCH) {
      int64_t step = a.key_token;
      const int64_t run = smaller(STRETCH, count - s);
      const float* keys = rows_of<true>(key + s * step, step, run, a.head_dim, converted, false);
      dots(products + s, KEYS, queries, a.tokens, keys, step, run, padded(a.head_dim, LANES));
    }
  }
  // Scores of one query -> weights; returns the sums of its lanes.
  template <Kind KIND>
  Floats weigh(int64_t, float* scores, int64_t end, Floats shift) {
    Floats sums{};
    for (int64_t s = 0; s < end; s += LANES) {
      const Floats e = weight<KIND>(load(scores + s), shift, all(a.scale));
      store(scores + s, e);
      sums += e;
    }
    return sums;
  }
  void mix(float* mixed, const float* weights, const T* value, int64_t count) {
    const int64_t wide = padded(a.value_dim, LANES);
    for (int64_t s = 0; s < count; s += STRETCH) {
      int64_t step = a.value_token;
      const int64_t run = smaller(STRETCH, count - s);
      const float* values = rows_of<true>(value + s * step, step, run, a.value_dim, converted, false);
      product<true, true>(mixed, wide, weights + s, KEYS, values, step, a.tokens, wide, run);
    }
  }

 private:
  const blip3o_attention_arguments& a;
  float *queries, *converted;
};

#if BLIP3O_LANES == 16
// The same in tiles; the weights are rounded to bfloat16.
class InTiles {
 public:
  static constexpr int64_t UNIT = TERMS;

  InTiles(const blip3o_attention_arguments& arguments, const bfloat16* query, Space& space)
      : registers(arguments.instruction_set), a(arguments) {
    const int64_t key_floats = padded(a.head_dim, TERMS) / 2, part = padded(smaller(KEYS, a.keys), TERMS);
    queries = space.take(TERMS * key_floats);
    laid = space.take(TERMS * key_floats);
    weights = space.take(FEW * part / 2);
    pairs = space.take(part * padded(a.value_dim, SIDE) / 2);
    lay_tiles<false, true>(queries, query, a.query_token, a.tokens, a.head_dim);
    std::memset(weights, 0, sizeof(float) * static_cast<size_t>(FEW * part / 2));
  }
  void scores(float* products, const bfloat16* key, int64_t count) {
    const Factor right = rows_factor(queries, a.head_dim);
    for (int64_t s = 0; s < count; s += TERMS, key += TERMS * a.key_token) {
      Factor left{reinterpret_cast<const float*>(key), SIDE / 2 * a.key_token, SIDE, 2 * a.key_token};  // where it lies
      if (a.head_dim % TERMS || count - s < TERMS || a.key_token % 2) {
        lay_tiles<false, false>(laid, key, a.key_token, smaller(TERMS, count - s), a.head_dim);
        left = rows_factor(laid, a.head_dim);
      }
      alignas(64) float block[2 * TILE];
      multiply_tiles<false, false>(registers, Sums::tiles(block, SIDE), left, right, 2, 1, right.step / TILE);
      for (int64_t half = 0; half < 2; ++half) {
        Floats v[LANES];
        for (int64_t i = 0; i < LANES; ++i) v[i] = load(block + half * TILE + i * SIDE);
        transpose(v);
        for (int64_t t = 0; t < FEW; ++t)
          if (t < a.tokens) store(products + t * KEYS + s + half * SIDE, v[t]);
      }
    }
  }
  template <Kind KIND>
  Floats weigh(int64_t t, const float* scores, int64_t end, Floats shift) {
    const Floats factor = exponent_factor<KIND>(a.scale);
    Floats sums{};
    for (int64_t s = 0; s < end; s += TERMS) {
      const Floats low = power_of_two(load(scores + s) - shift, factor, Floats{});
      const Floats high = power_of_two(load(scores + s + SIDE) - shift, factor, Floats{});
      sums += low + high;
      store(weights + s / TERMS * TILE + t * SIDE, packed(low, high));
    }
    return sums;
  }
  void mix(float* mixed, const float*, const bfloat16* value, int64_t count) {
    lay_tiles<true, false>(pairs, value, a.value_token, count, a.value_dim);
    const int64_t wide = padded(a.value_dim, SIDE);
    multiply_tiles<true, false>(registers, Sums::matrix(mixed, wide), Factor{weights, 0, TILE}, pairs_factor(pairs, a.value_dim), 1,
                                wide / SIDE, padded(count, TERMS) / TERMS);
  }

 private:
  const TileRegisters registers;
  const blip3o_attention_arguments& a;
  float *queries, *laid, *weights, *pairs;
};
#endif

template <class T>
static inline void ask_ahead(const T* rows, int64_t step, int64_t count, int64_t width) {
  constexpr int64_t LINE = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t row = 0; row < count; ++row)
    for (int64_t k = 0; k < width; k += LINE) ahead(rows + row * step + k);
}

// One head, the keys `from` to before `to`.
template <class T, Kind KIND, class Products>
static void look(const blip3o_attention_arguments& a, int64_t b, int64_t g, int64_t h, int64_t from, int64_t to,
                 Found& found, Space space) {
  const T* query = at<T>(a.query, b, a.query_batch, h, a.query_head);
  const T* key = at<T>(a.key, b, a.key_batch, g, a.key_head);
  const T* value = at<T>(a.value, b, a.value_batch, g, a.value_head);
  const int64_t wide = padded(a.value_dim, LANES), mask = b * a.mask_batch + h * a.mask_head;
  const Seen seen(a);
  float *mixed = found.mixed(), *scores = space.take(a.tokens * KEYS);
  Products products(a, query, space);
  if (space.upcoming) space.upcoming->plan(a.tokens * a.heads / a.groups);
  std::memset(mixed, 0, sizeof(float) * static_cast<size_t>((Products::UNIT == LANES ? a.tokens : FEW) * wide));
  for (int64_t t = 0; t < a.tokens; ++t) found.most[t] = -__builtin_inff(), found.sum[t] = 0.0f;
  const int64_t last = smaller(to, seen.limit(a.tokens - 1)), start = larger(from, seen.first(0));
  const bool far = a.keys > PART;
  for (int64_t s = start; s < last; s += KEYS) {
    const int64_t count = smaller(KEYS, last - s), end = padded(count, Products::UNIT);
    for (int64_t run = 0; run < count; run += STRETCH) {
      const int64_t from_run = s + run, next = from_run + KEYS, keys = smaller(STRETCH, count - run);
      if (far) ask_ahead(value + from_run * a.value_token, a.value_token, keys, a.value_dim);
      if (far && next < last) ask_ahead(key + next * a.key_token, a.key_token, smaller(STRETCH, last - next), a.head_dim);
      products.scores(scores + run, key + from_run * a.key_token, keys);
    }
    for (int64_t t = 0; t < a.tokens; ++t, space.ask()) {
      const int64_t first = larger(seen.first(t) - s, 0), limit = smaller(seen.limit(t) - s, count);
      const float largest = row_scores<KIND>(a, scores + t * KEYS, nullptr, mask + t * a.mask_token + s, first, limit,
                                             count, end);
      const float old = found.most[t], most = largest > old ? largest : old;
      const Floats shift = shift_of(all(most));
      const float sum_of = sum(products.template weigh<KIND>(t, scores + t * KEYS, end, shift));
      found.most[t] = most;
      if (s == start) {
        found.sum[t] = sum_of;
        continue;
      }
      const Floats kept = most > old ? weight<KIND>(all(old), shift, all(a.scale)) : all(1.0f);
      found.sum[t] = found.sum[t] * kept[0] + sum_of;
      if (most > old) store_row(mixed + t * wide, mixed + t * wide, wide, kept);
    }
    products.mix(mixed, scores, value + s * a.value_token, count);
  }
}

// What the parts of the keys gave, in order -> y and the log-sum-exp.
template <class T, Kind KIND>
static void conclude(const blip3o_attention_arguments& a, int64_t b, int64_t h, float* parts, int64_t count) {
  const int64_t wide = padded(a.value_dim, LANES), floats = Found::floats(wide);
  const auto part = [&](int64_t i) -> Found& { return *reinterpret_cast<Found*>(parts + i * floats); };
  const Seen seen(a);
  Found& found = part(0);
  for (int64_t t = 0; t < a.tokens; ++t) {
    float* mixed = found.mixed() + t * wide;
    if (count > 1) {
      float most = found.most[t];
      for (int64_t i = 1; i < count; ++i) most = part(i).most[t] > most ? part(i).most[t] : most;
      const Floats shift = shift_of(all(most));
      float sum = 0.0f;
      for (int64_t i = 0; i < count; ++i) {
        const Floats kept = weight<KIND>(all(part(i).most[t]), shift, all(a.scale));
        const float* more = part(i).mixed() + t * wide;
        sum += part(i).sum[t] * kept[0];
        for (int64_t k = 0; k < wide; k += LANES)
          store(mixed + k, i ? load(mixed + k) + load(more + k) * kept : load(more + k) * kept);
      }
      found.most[t] = most, found.sum[t] = sum;
    }
    const float sum = found.sum[t];
    const bool nothing = sum == 0.0f && (KIND != PLAIN || seen.first(t) >= seen.limit(t));  // as in attention.cpp
    T* y = static_cast<T*>(a.y) + b * a.y_batch + h * a.y_head + t * a.y_token;
    if (nothing) std::memset(mixed, 0, sizeof(float) * static_cast<size_t>(wide));
    store_row(y, mixed, a.value_dim, all(nothing ? 0.0f : 1.0f / sum));
  }
  if (!a.log_sum) return;
  float* log_sum = a.log_sum + (b * a.heads + h) * a.log_sum_head;
  for (int64_t from = 0; from < a.tokens; from += LANES) {
    float logs[LANES];
    store(logs, scaled<KIND>(load(found.most + from), all(a.scale)) + logarithm(load(found.sum + from)));
    for (int64_t t = from; t < smaller(a.tokens, from + LANES); ++t) log_sum[t * a.log_sum_token] = logs[t - from];
  }
}

// Few queries, of which keys are cut into `parts`: what one found.
template <class T, Kind KIND>
static void look(const blip3o_attention_arguments& a, int64_t b, int64_t h, int64_t part, int64_t parts, float* found,
                 Space space) {
  const int64_t blocks = (a.keys + KEYS - 1) / KEYS, from = blocks * part / parts * KEYS;
  const int64_t to = smaller(a.keys, blocks * (part + 1) / parts * KEYS), g = h / (a.heads / a.groups);
  Found& to_find = *reinterpret_cast<Found*>(found);
#if BLIP3O_LANES == 16
  if constexpr (std::is_same<T, bfloat16>::value)
    if (blip3o_instruction_set(a.instruction_set) == BLIP3O_AMX && a.keys >= TILED_KEYS)
      return look<T, KIND, InTiles>(a, b, g, h, from, to, to_find, space);
#endif
  look<T, KIND, InVectors<T>>(a, b, g, h, from, to, to_find, space);
}

// Into how many parts the keys of few queries are cut, by shape alone.
static int64_t key_parts(const blip3o_attention_arguments& a) {
  if (a.tokens > FEW || !a.tokens || a.keys <= PART) return 1;
  return smaller(a.keys / PART, larger(1, PARTS / larger(1, a.batch * a.heads)));
}

template <class T, Kind KIND>
static int run_parts(const blip3o_attention_arguments& a, int64_t parts, int threads) {
  const int64_t floats = Found::floats(padded(a.value_dim, LANES));
  float* found = a.workspace + larger(1, a.threads) * a.workspace_floats;
  share(a.batch * a.heads * parts, threads, [&](int thread, int64_t from, int64_t to) {
    const Space space{a.workspace + thread * a.workspace_floats, nullptr};
    for (int64_t i = from; i < to; ++i) {
      const int64_t head = i / parts;
      look<T, KIND>(a, head / a.heads, head % a.heads, i % parts, parts, found + i * floats, space);
    }
  });
  for (int64_t i = 0; i < a.batch * a.heads; ++i)
    conclude<T, KIND>(a, i / a.heads, i % a.heads, found + i * parts * floats, parts);
  return BLIP3O_OK;
}
