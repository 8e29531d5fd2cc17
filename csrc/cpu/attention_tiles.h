// Attention of bfloat16 inputs in the tiles of AMX (tiles.h), as attention.cpp does it in vectors: scores are [keys, queries],
// and so are probabilities, but rounded to bfloat16 before they are multiplied, as the chip wants them and as torch's fused
// kernels do. What is added to the rows of queries stays transposed too, y^T and dquery^T, so that a factor for each query is
// a vector. The backward pass starts from the output and the log-sum-exp: with them it needs no row of scores as a whole.
// Included by attention.cpp for AVX-512 alone: no include guard, no includes.

// 2^(x factor - less), within 3e-6 of it, for exponents up to 127; below -150 it is 0. NaN stays NaN.
__attribute__((always_inline)) static inline Floats power_of_two(Floats x, Floats factor, Floats less) {
  const Floats shift = all(0x1.8p23f), t = x * factor - less, shifted = t + shift, n = shifted - shift, f = t - n;
  Floats p = all(9.5828380e-3f);
  p = p * f + 5.5906430e-2f;
  p = p * f + 2.4024099e-1f;
  p = p * f + 6.9312418e-1f;
  p = p * f + 1.0f;
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)t, (__m512)all(-150.0f), _CMP_NLT_UQ);
  return (Floats)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
}

static constexpr float LOG2E = 1.44269504f;
// Powers of 2 by which a score may pass what its row is shifted by before that follows: bfloat16 has room, and what was summed
// before need not be multiplied at every step.
static constexpr float MARGIN = 8.0f;

// By what a score is multiplied to be a power of 2.
template <Kind KIND>
static inline Floats exponent_factor(float scale) {
  return all(KIND == PLAIN ? scale * LOG2E : LOG2E);
}

static inline void fill(float* to, int64_t from, int64_t limit, Floats value) {
  for (int64_t s = from; s < limit; ++s) store(to + s * QUERIES, value);
}

// One vector of queries, products of the keys `from` to before `to`: where it does not see them all, they become -infinity.
// Returns the largest score.
template <Kind KIND>
static inline Floats hide(const Block& block, int64_t v, int64_t from, int64_t to, float* products, float* added,
                          Floats scale, Floats softcap) {
  if (KIND == CAPPED) cap(block, v, products, added, scale, softcap);
  const Floats most = largest<KIND>(block, v, products, added, scale);
  const int64_t first = smaller(block.firsts[v], to), limit = larger(smaller(block.limits[v], to), first);
  fill(products, from, first, all(-__builtin_inff()));
  fill(products, limit, to, all(-__builtin_inff()));
  if (KIND == CAPPED) fill(added, from, first, Floats{}), fill(added, limit, to, Floats{});
  return most;
}

// One vector of queries: products -> 2^(score - shift) in pairs of keys, as tiles of a right factor; QUERIES / SIDE such tiles
// lie beside each other. Returns by what is to be multiplied what earlier parts gave.
template <Kind KIND>
static inline Floats lay_weights(const Block& block, int64_t v, int64_t from, int64_t to, float* weights, float* products,
                                 float* added, Floats scale, Floats softcap, Running& running) {
  const Floats found = hide<KIND>(block, v, from, to, products, added, scale, softcap);
  const Floats factor = exponent_factor<KIND>(scale[0]), old = running.most;
  running.most = (found - old) * factor > MARGIN ? found : old;
  const Floats shift = shift_of(running.most);
  const Floats kept = running.most > old ? power_of_two(old - shift, factor, Floats{}) : all(1.0f);
  Floats sums[4] = {};
  weights += from / TERMS * (WIDE * TILE);
  for (int64_t s = from; s < to; s += TERMS, weights += WIDE * TILE) {
    const float* row = products + s * QUERIES;
    for (int64_t i = 0; i < SIDE; i += 2, row += 4 * QUERIES) {
      Floats e[4];
      for (int64_t j = 0; j < 4; ++j) {
        e[j] = power_of_two(load(row + j * QUERIES) - shift, factor, Floats{});
        sums[j] += e[j];
      }
      store(weights + i * SIDE, paired(e[0], e[1]));
      store(weights + (i + 1) * SIDE, paired(e[2], e[3]));
    }
  }
  running.sum = running.sum * kept + ((sums[0] + sums[1]) + (sums[2] + sums[3]));
  return kept;
}

// y [queries, width] = columns^T times a factor for each query; 0 for the lanes that are `empty`.
static void store_columns(bfloat16* y, int64_t step, const float* columns, int64_t count, int64_t width, Floats factors,
                          Integers empty) {
  for (int64_t k = 0; k < width; k += LANES) {
    Floats v[LANES];
    for (int64_t i = 0; i < LANES; ++i) v[i] = select(empty, Floats{}, load(columns + (k + i) * QUERIES) * factors);
    transpose(v);
    const int64_t wide = smaller(LANES, width - k);
    for (int64_t t = 0; t < count; ++t) wide == LANES ? store(y + t * step + k, v[t]) : store(y + t * step + k, v[t], wide);
  }
}

// The keys of a part that two vectors of queries see, in whole tiles of pairs.
struct Pair {
  int64_t columns, from, to;
  Pair(const Block& block, int64_t v) : columns(smaller(2, block.vectors - v)) {
    from = block.firsts[v] / TERMS * TERMS;
    to = padded(block.limits[v + columns - 1], TERMS);
  }
};

template <Kind KIND>
static void tiled_forward(const blip3o_attention_arguments& a, int64_t b, int64_t g, Space space) {
  const TileRegisters registers(a.instruction_set);
  const int64_t sharing = a.heads / a.groups, part = padded(smaller(KEYS, a.keys), TERMS);
  const int64_t key_floats = padded(a.head_dim, TERMS) / 2, value_rows = padded(a.value_dim, SIDE);
  if (space.upcoming) space.upcoming->plan(sharing * padded(a.tokens, QUERIES) / SIDE * 4);
  const bool often = a.tokens * sharing > QUERIES;  // otherwise keys are laid out when they are needed, for once
  float* query_tiles = space.take(QUERIES * key_floats);
  float* products = space.take(QUERIES * part);
  float* added = space.take(QUERIES * part);
  float* weights = space.take(QUERIES * part / 2);
  float* mixed = space.take(QUERIES * value_rows);
  const int64_t laid = often ? padded(a.keys, TERMS) : part;
  float* key_tiles = space.take(laid * key_floats);
  float* value_tiles = space.take(laid * value_rows / 2);
  const bfloat16* key = at<bfloat16>(a.key, b, a.key_batch, g, a.key_head);
  const bfloat16* value = at<bfloat16>(a.value, b, a.value_batch, g, a.value_head);
  const auto lay = [&](int64_t from, int64_t count) {
    lay_tiles<false, false>(key_tiles, key + from * a.key_token, a.key_token, count, a.head_dim);
    lay_tiles<true, true>(value_tiles, value + from * a.value_token, a.value_token, count, a.value_dim);
  };
  if (often) lay(0, a.keys);
  for (int64_t start = 0; start < a.tokens; start += QUERIES) {
    const Block all_keys(a, start, 0, a.keys);
    const int64_t first_part = all_keys.firsts[0] / TERMS * TERMS;
    for (int64_t h = g * sharing; h < (g + 1) * sharing; ++h) {
      lay_tiles<false, true>(query_tiles, at<bfloat16>(a.query, b, a.query_batch, h, a.query_head) + start * a.query_token,
                             a.query_token, all_keys.count, a.head_dim);
      std::memset(mixed, 0, sizeof(float) * static_cast<size_t>(QUERIES * value_rows));
      Running running[WIDE];
      for (int64_t from = first_part; from < all_keys.end(); from += KEYS) {
        const Block block(a, start, from, KEYS);
        if (!often) lay(from, block.keys);
        if (KIND != PLAIN) lay_mask(block, added, a, b * a.mask_batch + h * a.mask_head);
        const Factor right = rows_factor(query_tiles, a.head_dim);
        Factor keys = rows_factor(key_tiles, a.head_dim), values = pairs_factor(value_tiles, a.value_dim);
        if (often) keys.at += from / SIDE * keys.step, values.at += from / TERMS * values.term_step;
        for (int64_t v = 0; v < block.vectors; v += 2) {
          const Pair pair(block, v);
          if (pair.from >= pair.to) continue;
          float* columns = products + v * SIDE;
          multiply_tiles<false, true>(registers, Sums::matrix(columns + pair.from * QUERIES, QUERIES), keys.from(pair.from / SIDE), right.from(v),
                                padded(smaller(pair.to, block.keys) - pair.from, SIDE) / SIDE, pair.columns,
                                right.step / TILE);
          for (int64_t i = 0; i < pair.columns; ++i, space.ask()) {
            space.ask();
            const Floats kept = lay_weights<KIND>(block, v + i, pair.from, pair.to, weights + (v + i) * TILE,
                                                  columns + i * SIDE, added + (v + i) * SIDE, all(a.scale),
                                                  all(a.softcap), running[v + i]);
            float* sums = mixed + (v + i) * SIDE;
            if (from > first_part && _mm512_cmp_ps_mask((__m512)kept, (__m512)all(1.0f), _CMP_NEQ_UQ))
              for (int64_t k = 0; k < value_rows; ++k) store(sums + k * QUERIES, load(sums + k * QUERIES) * kept);
          }
          const Factor weighing = Factor{weights, TILE, WIDE * TILE};
          multiply_tiles<true, true>(registers, Sums::matrix(mixed + v * SIDE, QUERIES), values.along(pair.from / TERMS),
                               weighing.from(v).along(pair.from / TERMS), value_rows / SIDE, pair.columns,
                               (pair.to - pair.from) / TERMS);
          space.ask();
        }
      }
      bfloat16* y = static_cast<bfloat16*>(a.y) + b * a.y_batch + h * a.y_head + start * a.y_token;
      for (int64_t v = 0; v < all_keys.vectors; ++v) {
        Integers empty{};  // as in attention.cpp
        for (int64_t i = 0, t = v * LANES; i < LANES && t < all_keys.count; ++i, ++t)
          if (running[v].sum[i] == 0.0f && (KIND != PLAIN || all_keys.first(t) >= all_keys.limit(t))) empty[i] = -1;
        store_columns(y + v * LANES * a.y_token, a.y_token, mixed + v * SIDE, smaller(LANES, all_keys.count - v * LANES),
                      a.value_dim, 1.0f / running[v].sum, empty);
        space.ask();
      }
      if (a.log_sum)
        lay_log_sums<KIND>(a.log_sum + (b * a.heads + h) * a.log_sum_head + start * a.log_sum_token, a.log_sum_token,
                           all_keys, running, a.scale);
    }
  }
}

// y [rows, width] = what Sums::tiles lie at `tiles`, times a factor.
static void store_tiles(bfloat16* y, int64_t step, const float* tiles, int64_t rows, int64_t width, Floats factor) {
  const int64_t wide = padded(width, SIDE);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t k = 0; k < width; k += SIDE) {
      const Floats v = load(tiles + row / SIDE * SIDE * wide + k * SIDE + row % SIDE * SIDE) * factor;
      width - k >= SIDE ? store(y + row * step + k, v) : store(y + row * step + k, v, width - k);
    }
}

// What the backward pass knows of a block's queries: their log-sum-exp in powers of 2, and the sums of dy y.
struct Known {
  float log_sum[QUERIES], dot[QUERIES];

  Known(const blip3o_attention_backward_arguments& a, const bfloat16* dy, const bfloat16* y, const float* log_sums,
        int64_t count) {
    for (int64_t t = 0; t < QUERIES; ++t) {
      log_sum[t] = __builtin_inff(), dot[t] = 0.0f;  // of no query, or one that sees nothing: its probabilities are 0
      if (t >= count || log_sums[t] == -__builtin_inff()) continue;
      Floats total{};
      for (int64_t k = 0; k < a.value_dim; k += LANES)
        total += load_some(dy + t * a.dy_token + k, a.value_dim - k) * load_some(y + t * a.y_token + k, a.value_dim - k);
      log_sum[t] = log_sums[t] * LOG2E, dot[t] = sum(total);
    }
  }
};

// Two vectors of queries: products and dprobabilities of keys -> probabilities and dscores in bfloat16, both as tiles of left
// factors [keys, queries], dscores also as tiles of right ones in pairs of keys, QUERIES / SIDE beside each other.
template <Kind KIND>
static void lay_gradients(int64_t v, int64_t from, int64_t to, const float* products, const float* dweights,
                          const float* added, const Known& known, Floats factor, float* left, float* dleft, float* dright) {
  products += v * SIDE, dweights += v * SIDE, added += v * SIDE;  // what follows is of these two
  left += v / 2 * TILE, dleft += v / 2 * TILE, dright += v * TILE;
  Floats log_sum[2], dot[2];
  for (int64_t i = 0; i < 2; ++i)
    log_sum[i] = load(known.log_sum + (v + i) * SIDE), dot[i] = load(known.dot + (v + i) * SIDE);
  for (int64_t s = from; s < to; s += 2) {
    const uint64_t key = static_cast<uint64_t>(s), row = key / SIDE * (WIDE / 2) * TILE + key % SIDE * SIDE;
    const float *scores = products + s * QUERIES, *gradients = dweights + s * QUERIES, *derivatives = added + s * QUERIES;
    Floats p[2][2], d[2][2];
    for (int64_t j = 0; j < 2; ++j)
      for (int64_t i = 0; i < 2; ++i) {
        const int64_t at = j * QUERIES + i * SIDE;
        // About 1 at most, also where a score is so large that its rounded log-sum-exp is far from it.
        p[j][i] = at_most(all(2.0f), power_of_two(load(scores + at), factor, log_sum[i]));
        d[j][i] = p[j][i] * (load(gradients + at) - dot[i]);
        if (KIND == CAPPED) d[j][i] = d[j][i] * load(derivatives + at);
      }
    for (uint64_t j = 0; j < 2; ++j) {
      store(left + row + j * SIDE, packed(p[j][0], p[j][1]));
      store(dleft + row + j * SIDE, packed(d[j][0], d[j][1]));
    }
    float* pairs = dright + key / TERMS * WIDE * TILE + key % TERMS / 2 * SIDE;
    for (int64_t i = 0; i < 2; ++i) store(pairs + i * TILE, paired(d[0][i], d[1][i]));
  }
}

template <Kind KIND>
static void tiled_backward(const blip3o_attention_backward_arguments& a, int64_t b, int64_t g, Space space) {
  const TileRegisters registers(a.instruction_set);
  const int64_t sharing = a.heads / a.groups, keys = padded(a.keys, TERMS), part = smaller(KEYS, keys);
  const int64_t key_floats = padded(a.head_dim, TERMS) / 2, key_wide = padded(a.head_dim, SIDE);
  if (space.upcoming) space.upcoming->plan(sharing * padded(a.tokens, QUERIES) / QUERIES * 24);
  const int64_t value_floats = padded(a.value_dim, TERMS) / 2, value_wide = padded(a.value_dim, SIDE);
  float* query_columns = space.take(QUERIES * key_floats);
  float* query_pairs = space.take(QUERIES * key_wide / 2);
  float* dy_columns = space.take(QUERIES * value_floats);
  float* dy_pairs = space.take(QUERIES * value_wide / 2);
  float* products = space.take(QUERIES * part);
  float* dweights = space.take(QUERIES * part);
  float* added = space.take(QUERIES * part);
  float* left = space.take(QUERIES * part / 2);
  float* dleft = space.take(QUERIES * part / 2);
  float* dright = space.take(QUERIES * part / 2);
  float* dquery = space.take(QUERIES * key_wide);
  float* key_rows = space.take(keys * key_floats);
  float* key_pairs = space.take(keys * key_wide / 2);
  float* value_rows = space.take(keys * value_floats);
  float* dkey = space.take(keys * key_wide);
  float* dvalue = space.take(keys * value_wide);
  const bfloat16* key = at<bfloat16>(a.key, b, a.key_batch, g, a.key_head);
  const bfloat16* value = at<bfloat16>(a.value, b, a.value_batch, g, a.value_head);
  lay_tiles<false, false>(key_rows, key, a.key_token, a.keys, a.head_dim);
  lay_tiles<true, true>(key_pairs, key, a.key_token, a.keys, a.head_dim);
  lay_tiles<false, false>(value_rows, value, a.value_token, a.keys, a.value_dim);
  std::memset(dkey, 0, sizeof(float) * static_cast<size_t>(keys * key_wide));
  std::memset(dvalue, 0, sizeof(float) * static_cast<size_t>(keys * value_wide));
  for (int64_t start = 0; start < a.tokens; start += QUERIES) {
    const Block all_keys(a, start, 0, a.keys);
    const int64_t pairs = (all_keys.vectors + 1) / 2;  // of vectors of queries
    for (int64_t h = g * sharing; h < (g + 1) * sharing; ++h) {
      const bfloat16* query = at<bfloat16>(a.query, b, a.query_batch, h, a.query_head) + start * a.query_token;
      const bfloat16* dy = at<bfloat16>(a.dy, b, a.dy_batch, h, a.dy_head) + start * a.dy_token;
      const bfloat16* y = at<bfloat16>(a.y, b, a.y_batch, h, a.y_head) + start * a.y_token;
      const Known known(a, dy, y, a.log_sum + (b * a.heads + h) * a.log_sum_head + start, all_keys.count);
      lay_tiles<false, true>(query_columns, query, a.query_token, all_keys.count, a.head_dim);
      space.ask();
      lay_tiles<true, false>(query_pairs, query, a.query_token, all_keys.count, a.head_dim);
      space.ask();
      lay_tiles<false, true>(dy_columns, dy, a.dy_token, all_keys.count, a.value_dim);
      space.ask();
      lay_tiles<true, false>(dy_pairs, dy, a.dy_token, all_keys.count, a.value_dim);
      space.ask();
      std::memset(dquery, 0, sizeof(float) * static_cast<size_t>(QUERIES * key_wide));
      for (int64_t from = all_keys.firsts[0] / TERMS * TERMS; from < all_keys.end(); from += KEYS) {
        const Block block(a, start, from, KEYS);
        const int64_t to = padded(block.end(), TERMS), rows = to / SIDE;
        if (KIND != PLAIN) lay_mask(block, added, a, b * a.mask_batch + h * a.mask_head);
        const Factor scoring = rows_factor(key_rows, a.head_dim).from(from / SIDE);
        const Factor valuing = rows_factor(value_rows, a.value_dim).from(from / SIDE);
        multiply_tiles<false, false>(registers, Sums::matrix(products, QUERIES), scoring, rows_factor(query_columns, a.head_dim), rows, 2 * pairs,
                              scoring.step / TILE);
        space.ask(), space.ask();
        multiply_tiles<false, false>(registers, Sums::matrix(dweights, QUERIES), valuing, rows_factor(dy_columns, a.value_dim), rows, 2 * pairs,
                              valuing.step / TILE);
        space.ask(), space.ask();
        for (int64_t v = 0; v < block.vectors; ++v)
          hide<KIND>(block, v, 0, to, products + v * SIDE, added + v * SIDE, all(a.scale), all(a.softcap));
        if (KIND == CAPPED && block.vectors % 2) fill(added + block.vectors * SIDE, 0, to, Floats{});
        for (int64_t v = 0; v < 2 * pairs; v += 2)
          lay_gradients<KIND>(v, 0, to, products, dweights, added, known, exponent_factor<KIND>(a.scale), left, dleft,
                              dright),
              space.ask(), space.ask();
        const Factor weights{left, WIDE / 2 * TILE, TILE}, dscores{dleft, WIDE / 2 * TILE, TILE};
        multiply_tiles<true, false>(registers, Sums::tiles(dvalue + from * value_wide, value_wide), weights, pairs_factor(dy_pairs, a.value_dim), rows,
                             value_wide / SIDE, pairs);
        space.ask(), space.ask();
        multiply_tiles<true, false>(registers, Sums::tiles(dkey + from * key_wide, key_wide), dscores, pairs_factor(query_pairs, a.head_dim), rows,
                             key_wide / SIDE, pairs);
        space.ask(), space.ask();
        multiply_tiles<true, true>(registers, Sums::matrix(dquery, QUERIES), pairs_factor(key_pairs, a.head_dim).along(from / TERMS),
                             Factor{dright, TILE, WIDE * TILE}, key_wide / SIDE, block.vectors, to / TERMS);
        space.ask(), space.ask();
      }
      bfloat16* dx = static_cast<bfloat16*>(a.dquery) + b * a.dquery_batch + h * a.dquery_head + start * a.dquery_token;
      for (int64_t v = 0; v < all_keys.vectors; ++v)
        store_columns(dx + v * LANES * a.dquery_token, a.dquery_token, dquery + v * SIDE,
                      smaller(LANES, all_keys.count - v * LANES), a.head_dim, all(a.scale), Integers{});
    }
  }
  bfloat16* dk = static_cast<bfloat16*>(a.dkey) + b * a.dkey_batch + g * a.dkey_head;
  bfloat16* dv = static_cast<bfloat16*>(a.dvalue) + b * a.dvalue_batch + g * a.dvalue_head;
  store_tiles(dk, a.dkey_token, dkey, a.keys, a.head_dim, all(a.scale));
  store_tiles(dv, a.dvalue_token, dvalue, a.keys, a.value_dim, all(1.0f));
}
