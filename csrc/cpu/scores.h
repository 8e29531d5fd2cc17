// Between the two products of attention: which keys a block of queries sees, and their scores, held as [keys, queries].
// Included by attention.cpp once per instruction set, after product.h: no include guard, no includes.

static constexpr int64_t QUERIES = WIDE * LANES;  // of a block, and from key to key in its scores
static constexpr int64_t KEYS = 128;              // of a part of it: the scores of a part stay in the first cache

// What is between a product and a score: nothing but a positive scale, which keeps the order of the scores; a mask, or any
// scale; a softcap, then perhaps a mask.
enum Kind { PLAIN, MASKED, CAPPED };

// A block of queries of one sample, and the keys they see, of all or of a part that starts at the key `from`; keys are
// counted from there. Those that any of a vector of queries sees start at `firsts` and end before `limits`, those that all
// of it see lie from `inner` to before `outer`.
struct Block {
  int64_t start, from, keys, count, vectors;
  int64_t firsts[WIDE], inner[WIDE], outer[WIDE], limits[WIDE];
  int64_t behind, ahead;  // query t sees the keys t + behind to before t + ahead

  template <class Arguments>
  Block(const Arguments& a, int64_t query, int64_t key, int64_t most) : start(query), from(key) {
    keys = smaller(most, a.keys - from);
    count = smaller(QUERIES, a.tokens - start);
    vectors = padded(count, LANES) / LANES;
    behind = a.keys - a.tokens - (a.left < 0 ? a.keys : smaller(a.left, a.keys)) - from;
    ahead = a.keys - a.tokens + (a.right < 0 ? a.tokens : smaller(a.right, a.tokens)) + 1 - from;
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t one = v * LANES, last = smaller(one + LANES, count) - 1;
      firsts[v] = first(one);
      limits[v] = limit(last);
      inner[v] = smaller(first(last), limits[v]);
      outer[v] = larger(limit(one), inner[v]);
    }
  }
  int64_t end() const { return limits[vectors - 1]; }
  bool whole() const { return first(count - 1) == 0 && limit(0) == keys; }  // every query sees every key
  // The keys that a query of the block sees.
  int64_t first(int64_t query) const { return clamped(start + query + behind); }
  int64_t limit(int64_t query) const { return clamped(start + query + ahead); }
  int64_t clamped(int64_t key) const { return key < 0 ? 0 : smaller(key, keys); }

  // Lane by lane, the first key that a vector of queries sees; it sees ahead - behind of them.
  Integers lane_firsts(int64_t vector) const {
    static const int32_t NUMBERS[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    Integers lanes;
    std::memcpy(&lanes, NUMBERS, sizeof lanes);
    return lanes + static_cast<int32_t>(start + vector * LANES + behind);
  }
  // f(first vector, one past the last, first key, one past the last) for each run of keys that the same vectors see; the
  // blocks of causal and windowed attention are staircases.
  template <class F>
  void stairs(F f) const {
    int64_t v = 0, end = 0;
    for (int64_t key = firsts[0], next; key < this->end(); key = next) {
      while (limits[v] <= key) ++v;
      while (end < vectors && firsts[end] <= key) ++end;
      next = end < vectors ? smaller(firsts[end], limits[v]) : limits[v];
      f(v, end, key, next);
    }
  }
};

// products [keys, queries] = left [keys, depth] right [depth, queries], where keys are seen.
static void multiply(const Block& block, float* products, const float* left, int64_t left_step, const float* right,
                     int64_t depth, const Space& space) {
  block.stairs([&](int64_t v, int64_t end, int64_t from, int64_t to) {
    for (int64_t s = from, next; s < to; s = next, space.ask()) {
      next = space.upcoming ? smaller(to, s + 4) : to;
      product<true>(products + s * QUERIES + v * LANES, QUERIES, left + s * left_step, left_step,
                    right + v * LANES, QUERIES, next - s, (end - v) * LANES, depth);
    }
  });
}

// y [queries, width] += weights^T [queries, keys] x [keys, width], each few queries over the keys they see.
static void mix(const Block& block, float* y, int64_t width, const float* weights, const float* x, int64_t x_step,
                const Space& space) {
  if (block.whole() && !space.upcoming)
    return product<false, true>(y, width, weights, QUERIES, x, x_step, block.count, width, block.keys);
  for (int64_t t = 0; t < block.count; t += ROWS, space.ask()) {
    const int64_t rows = smaller(ROWS, block.count - t), from = block.first(t);
    product<false, true>(y + t * width, width, weights + from * QUERIES + t, QUERIES, x + from * x_step, x_step, rows,
                   width, block.limit(t + rows - 1) - from);
  }
}

// y [keys, width] += weights [keys, queries] x [queries, width].
static void gather(const Block& block, float* y, int64_t width, const float* weights, const float* x, int64_t x_step) {
  block.stairs([&](int64_t v, int64_t end, int64_t from, int64_t to) {
    const int64_t first = v * LANES;
    product<true, true>(y + from * width, width, weights + from * QUERIES + first, QUERIES, x + first * x_step,
                        x_step, to - from, width, smaller(block.count, end * LANES) - first);
  });
}

// The mask of one head as numbers to add, [keys, queries], where any query sees a key; head_mask: where it starts, in
// elements.
template <class Arguments>
static void lay_mask(const Block& block, float* added, const Arguments& a, int64_t head_mask) {
  const int64_t from = block.firsts[0], keys = block.end() - from, step = a.mask_token;
  const int64_t first = head_mask + block.start * step + block.from + from;
  float* to = added + from * QUERIES;
  if (keys <= 0) return;
  if (a.mask_kind == 0)
    return static_cast<void>(std::memset(to, 0, sizeof(float) * static_cast<size_t>(QUERIES * keys)));
  if (a.mask_kind == 2)
    return lay_columns(to, QUERIES, static_cast<const float*>(a.mask) + first, step, block.count, keys);
  const uint8_t* allowed = static_cast<const uint8_t*>(a.mask) + first;
  if (!step) {  // the same keys for every query
    for (int64_t s = 0; s < keys; ++s)
      for (int64_t v = 0; v < WIDE; ++v) store(to + s * QUERIES + v * LANES, all(allowed[s] ? 0.0f : -__builtin_inff()));
    return;
  }
  lay_columns(to, QUERIES, block.count, keys, [=](int64_t row, int64_t k, int64_t count) {
    typedef uint8_t Bytes __attribute__((vector_size(LANES)));
    Bytes bytes{};
    std::memcpy(&bytes, allowed + row * step + k, static_cast<size_t>(count));
    return __builtin_convertvector(bytes, Integers) != 0 ? Floats{} : all(-__builtin_inff());
  });
}

// A masked key takes no part, whatever its score is: NaN too.
static inline Floats masked(Floats score, Floats added) {
  return added == -__builtin_inff() ? added : score + added;
}

// A product of queries and a key, ready for the scale; a MASKED one has it and the mask already, as has a CAPPED one.
template <Kind KIND>
static inline Floats score(const float* products, const float* added, int64_t at, Floats scale) {
  return KIND == MASKED ? masked(load(products + at) * scale, load(added + at)) : load(products + at);
}
template <Kind KIND>
static inline Floats scaled(Floats score, Floats scale) {
  return KIND == PLAIN ? score * scale : score;
}

// f(key, i) for keys in order; i counts 0 1 2 3 0 1 2 3 ..., for sums in four parts: shorter chains and smaller errors.
template <class F>
__attribute__((always_inline)) static inline void by_fours(int64_t s, int64_t to, F f) {
  for (; s + 4 <= to; s += 4) f(s, 0), f(s + 1, 1), f(s + 2, 2), f(s + 3, 3);
  if (s < to) f(s, 0);
  if (s + 1 < to) f(s + 1, 1);
  if (s + 2 < to) f(s + 2, 2);
}

// One vector of queries: their largest scores, where PLAIN before the scale, as they are held. Products that are masked or
// not seen by all lanes become scores.
template <Kind KIND>
static inline Floats largest(const Block& block, int64_t vector, float* products, const float* added, Floats scale) {
  const int64_t step = QUERIES, inner = block.inner[vector], outer = block.outer[vector];
  const Integers firsts = block.lane_firsts(vector), limits = firsts + static_cast<int32_t>(block.ahead - block.behind);
  const Floats least = all(-__builtin_inff());
  Floats found[4] = {least, least, least, least};
  const auto look = [&](int64_t from, int64_t to, bool edge) {
    for (int64_t s = from; s < to; ++s) {
      const Integers key = Integers{} + static_cast<int32_t>(s);
      Floats v = score<KIND>(products, added, s * step, scale);
      if (edge) v = (key < limits) & (key >= firsts) ? v : least;
      found[0] = at_least(v, found[0]);
      store(products + s * step, v);
    }
  };
  look(block.firsts[vector], inner, true);
  if (KIND == MASKED)
    look(inner, outer, false);
  else
    by_fours(inner, outer, [&](int64_t s, int i) { found[i] = at_least(load(products + s * step), found[i]); });
  look(outer, block.limits[vector], true);
  return at_least(at_least(found[0], found[1]), at_least(found[2], found[3]));
}

// One vector of queries: products -> scores under a softcap, and the mask -> their derivatives by the scaled products.
static inline void cap(const Block& block, int64_t vector, float* products, float* added, Floats scale, Floats softcap) {
  const Floats factor = scale / softcap;
  const int64_t step = QUERIES, limit = block.limits[vector];
  for (int64_t s = block.firsts[vector]; s < limit; ++s) {
    const int64_t at = s * step;
    const Floats u = hyperbolic_tangent(load(products + at) * factor);
    const Floats add = load(added + at);
    store(products + at, masked(u * softcap, add));
    store(added + at, add == -__builtin_inff() ? Floats{} : 1.0f - u * u);
  }
}

// What the scores are shifted by: the largest, or where all is masked 0, so that every exponential is 0.
static inline Floats shift_of(Floats most) { return most == -__builtin_inff() ? Floats{} : most; }

// e^(score - shift). The difference comes before the scale: a fused product of a huge one would be off by more than e can take.
template <Kind KIND>
static inline Floats weight(Floats score, Floats shift, Floats scale) {
  return exponential(scaled<KIND>(score - shift, scale));
}

static inline Floats reciprocal(Floats sum) { return sum == 0.0f ? Floats{} : 1.0f / sum; }

// x / sum, rounded as a division would be (nearly always), in three multiplications.
static inline Floats divided(Floats x, Floats sum, Floats reciprocal) {
  const Floats quotient = x * reciprocal;
  return quotient + (x - quotient * sum) * reciprocal;
}

// A vector of queries on its way through the parts of the keys: the largest score so far and the sum of e^(score - largest).
struct Running {
  Floats most = all(-__builtin_inff()), sum{};
};

// One vector of queries: products -> e^(score - largest score so far). Returns by what is to be multiplied what earlier parts
// gave; all lanes are 1 if that is nothing.
template <Kind KIND>
static inline Floats exponentials(const Block& block, int64_t vector, float* products, float* added, Floats scale,
                                  Floats softcap, Running& running) {
  if (KIND == CAPPED) cap(block, vector, products, added, scale, softcap);
  const Floats most = at_least(running.most, largest<KIND>(block, vector, products, added, scale));
  const Floats shift = shift_of(most);
  const Floats kept = most > running.most ? weight<KIND>(running.most, shift, scale) : all(1.0f);
  Floats sums[4] = {};
  by_fours(block.firsts[vector], block.limits[vector], [&](int64_t s, int i) {
    const Floats e = weight<KIND>(load(products + s * QUERIES), shift, scale);
    sums[i] += e;
    store(products + s * QUERIES, e);
  });
  running.most = most;
  running.sum = running.sum * kept + ((sums[0] + sums[1]) + (sums[2] + sums[3]));
  return kept;
}

// One vector of queries: products -> probabilities, dprobabilities -> dscores, to be scaled. Shifting by the log-sum-exp
// would spare the look for the largest score, and lose two bits: the scores that count are near the largest.
template <Kind KIND>
static inline void score_gradients(const Block& block, int64_t vector, float* products, float* gradients,
                                   float* added, Floats scale, Floats softcap) {
  if (KIND == CAPPED) cap(block, vector, products, added, scale, softcap);
  const int64_t first = block.firsts[vector], limit = block.limits[vector];
  const Floats shift = shift_of(largest<KIND>(block, vector, products, added, scale));
  Floats sums[4] = {}, dots[4] = {};
  by_fours(first, limit, [&](int64_t s, int i) {
    const Floats e = weight<KIND>(load(products + s * QUERIES), shift, scale);
    sums[i] += e;
    dots[i] += e * load(gradients + s * QUERIES);
    store(products + s * QUERIES, e);
  });
  const Floats sum = (sums[0] + sums[1]) + (sums[2] + sums[3]), factor = reciprocal(sum);
  const Floats dot = divided((dots[0] + dots[1]) + (dots[2] + dots[3]), sum, factor);
  for (int64_t s = first; s < limit; ++s) {
    const Floats p = divided(load(products + s * QUERIES), sum, factor);
    store(products + s * QUERIES, p);
    const Floats gradient = p * (load(gradients + s * QUERIES) - dot);
    store(gradients + s * QUERIES, KIND == CAPPED ? gradient * load(added + s * QUERIES) : gradient);
  }
}
