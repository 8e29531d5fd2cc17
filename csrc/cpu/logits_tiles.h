// What logits.h declares, of bfloat16 in the tiles of AMX (tiles.h): dlogits is the sum of two bfloat16 numbers, because one
// alone would cost a gradient as much as its own rounding does. No include guard, no includes.

template <bool ADD>
static inline void split_product(Sums c, Factor a, int64_t rest, Factor b, bool tall, bool broad, int64_t depth) {
  if (tall && broad) return tile_block<2, 2, ADD, true>(c, a, b, depth, rest);
  if (tall) return tile_block<2, 1, ADD, true>(c, a, b, depth, rest);
  if (broad) return tile_block<1, 2, ADD, true>(c, a, b, depth, rest);
  tile_block<1, 1, ADD, true>(c, a, b, depth, rest);
}

static inline void put_block(bfloat16* to, int64_t step, const float* from, int64_t from_step, int64_t words, int64_t columns,
                             bool past_caches) {
  for (int64_t i = 0; i < words; ++i, to += step, from += from_step) {
    const Floats low = load(from), high = load(from + SIDE);
    if (columns == 2 * SIDE && Rounder::fits(low) && Rounder::fits(high)) {
      const Floats both = packed(low, high);
      float* whole = reinterpret_cast<float*>(to);
      past_caches ? streamed(whole, both) : store(whole, both);
      continue;
    }
    for (int64_t c = 0; c < columns; c += SIDE) {
      const bool whole = c + SIDE <= columns;
      whole ? store(to + c, load(from + c)) : store(to + c, load(from + c), columns - c);
    }
  }
}

template <>
void lay_right<bfloat16>(float* to, const Arguments& a, const Sizes&, int64_t row, int64_t top, int64_t end) {
  lay_tiles<false, true>(to + (row - top) * padded(a.width, TERMS) / 2, static_cast<const bfloat16*>(a.x) + row * a.x_stride,
                         a.x_stride, smaller(STEP, end - row), a.width);
}

template <>
void lay_terms<bfloat16>(float* to, const Arguments& a, const Sizes& s, int64_t top, int64_t end) {
  const bfloat16* x = static_cast<const bfloat16*>(a.x);
#pragma omp for schedule(static)
  for (int64_t c = 0; c < a.width; c += STEP)
    lay_tiles<true, false>(to + c * s.round / 2, x + top * a.x_stride + c, a.x_stride, end - top, smaller(STEP, a.width - c));
}

template <>
struct Logits<bfloat16> {
  const TileRegisters registers;
  const float* right;
  const int64_t height, columns, width;
  float* own;

  Logits(const float* laid, int64_t high, float* space, int64_t wide, int64_t deep)
      : right(laid), height(high), columns(wide), width(deep), own(space) {}

  void operator()(float* to, const bfloat16* weight, int64_t step, int64_t words) const {
    const int64_t terms = padded(width, TERMS) / TERMS;
    const Factor b{right, terms * TILE, TILE};
    if (width % TERMS == 0 && words == STEP) {
      for (int64_t c = 0; c < columns; c += STEP) in_place(to + c, weight, step, b.from(c / SIDE), c, terms);
      return;
    }
    lay_tiles<false, false>(own, weight, step, words, width);
    multiply_tiles<false, false>(Sums::matrix(to, height), rows_factor(own, width), b, 2, columns / SIDE, terms);
  }

  // Tiles of the weight where it lies; meanwhile asks for a share of the next words.
  void in_place(float* to, const bfloat16* weight, int64_t step, Factor b, int64_t column, int64_t terms) const {
    const bfloat16* below = weight + SIDE * step;
    const int64_t from = STEP * column / columns, end = STEP * (column + STEP) / columns;
    zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
    for (int64_t k = 0; k < terms; ++k) {
      load_tile<4>(reinterpret_cast<const float*>(weight + k * TERMS), 2 * step);
      load_tile<6>(b.at + k * TILE, 64);
      multiply_tile<0, 4, 6>();
      load_tile<7>(b.at + b.step + k * TILE, 64);
      multiply_tile<1, 4, 7>();
      load_tile<5>(reinterpret_cast<const float*>(below + k * TERMS), 2 * step);
      multiply_tile<2, 5, 6>();
      multiply_tile<3, 5, 7>();
      for (int64_t i = from; i < end; ++i) ahead(weight + (STEP + i) * step + k * TERMS);
    }
    store_tile<0>(to, 4 * height), store_tile<1>(to + SIDE, 4 * height);
    store_tile<2>(to + SIDE * height, 4 * height), store_tile<3>(to + SIDE * height + SIDE, 4 * height);
  }
};

template <>
struct Gradients<bfloat16> {
  const Arguments& a;
  const Sizes& s;
  // Tiles, each with its second part behind it: for dweight [words, rows], then for dx [words / PART][rows, PART].
  float* dlogits;
  const float* terms;
  float* sums;  // tiles [rows, columns]
  float* total;  // of dweight, over rounds of rows
  float* own;
  const int64_t start, words, top, end;

  float* place(int64_t, int64_t, float* logits) const { return logits; }
  float* of_words(int64_t word, int64_t row) const {
    return dlogits + (word / SIDE * (s.round / TERMS) + (row - top) / TERMS) * 2 * TILE;
  }
  float* of_rows(int64_t row, int64_t word) const {
    const int64_t group = word / PART, across = smaller(PART, s.words - group * PART) / TERMS;
    return dlogits + s.words * s.round + group * PART * s.round + ((row - top) / SIDE * across + word % PART / TERMS) * 2 * TILE;
  }

  void lay(float* from, int64_t row, int64_t word, int64_t some, int64_t columns) const {
    const int64_t height = s.height(row / BLOCK * BLOCK);
    for (int64_t i = some; i < STEP; ++i) std::memset(from + i * height, 0, sizeof(float) * static_cast<size_t>(columns));
    for (int64_t c = 0; c < columns; c += STEP) {
      Floats parts[2][2][SIDE];  // of which, of the first or the second of each four rows
      for (int64_t i = 0; i < STEP; i += 2) {
        Floats pair[2][2];
        for (int64_t j = 0; j < 2; ++j) {
          Floats high[2], low[2];
          for (int64_t k = 0; k < 2; ++k) {
            const Floats v = load(from + (i + j) * height + c + k * SIDE);
            high[k] = bits_of<Floats>((bits_of<Words>(v) + 0x8000u) & 0xffff0000u);
            low[k] = v - high[k];
          }
          pair[0][j] = packed(high[0], high[1]), pair[1][j] = packed(low[0], low[1]);
          float* to = of_words(word + i + j, row + c) + i % SIDE * SIDE + j * SIDE;
          store(to, pair[0][j]);
          store(to + TILE, pair[1][j]);
        }
        for (int64_t part = 0; part < 2; ++part) {
          parts[part][0][i / 2] = (Floats)_mm512_unpacklo_epi16((__m512i)pair[part][0], (__m512i)pair[part][1]);
          parts[part][1][i / 2] = (Floats)_mm512_unpackhi_epi16((__m512i)pair[part][0], (__m512i)pair[part][1]);
        }
      }
      for (int64_t part = 0; part < 2; ++part)
        for (int64_t half = 0; half < 2; ++half) {
          transpose(parts[part][half]);
          for (int64_t i = 0; i < SIDE; ++i) {
            const int64_t at = i / 4 * 8 + half * 4 + i % 4;  // where unpacking took it from
            store(of_rows(row + c + at, word) + part * TILE + at % SIDE * SIDE, parts[part][half][i]);
          }
        }
    }
  }

  void of_weight(int64_t word, int64_t column) const {
    const TileRegisters registers;
    const bool past_caches = passes_caches<bfloat16>(a);
    const int64_t last = smaller(a.width, column + PART), all_terms = padded(end - top, TERMS) / TERMS;
    bfloat16* to = static_cast<bfloat16*>(a.dweight) + (start + word) * a.width;
    for (int64_t k = 0; k < all_terms; k += SIDE) {  // so many tiles of terms stay in the caches
      const int64_t depth = smaller(SIDE, all_terms - k);
      for (int64_t c = column; c < last; c += STEP) {
        float* block = s.round < s.rows ? total + word * s.width + c * STEP : own + (c - column) * STEP;
        const int64_t wide = last - c > SIDE ? 2 : 1;
        const Factor left{of_words(word, top + k * TERMS), s.round / TERMS * 2 * TILE, 2 * TILE};
        const Factor right{terms + c * s.round / 2 + k * wide * TILE, TILE, wide * TILE};
        const auto multiply = top + k ? split_product<true> : split_product<false>;
        multiply(Sums::matrix(block, STEP), left, TILE, right, true, wide == 2, depth);
        if (k + depth == all_terms && end == a.rows)
          put_block(to + c, a.width, block, STEP, smaller(STEP, words - word), smaller(STEP, last - c), past_caches);
      }
    }
  }

  void of_x(int64_t row, int64_t column) const {
    const TileRegisters registers;
    const bfloat16* weight = static_cast<const bfloat16*>(a.weight) + start * a.weight_stride;
    const int64_t bottom = smaller(padded(end, STEP), row + PART), last = smaller(a.width, column + PART);
    for (int64_t w = 0; w < words; w += PART) {
      const int64_t some = smaller(PART, words - w), depth = padded(some, TERMS) / TERMS;
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t c = column; c < last; c += STEP)
          lay_pairs(own + (c - column) * PART / 2 + k * 2 * TILE, weight + (w + k * TERMS) * a.weight_stride + c,
                    smaller(TERMS, some - k * TERMS), smaller(STEP, last - c));
      for (int64_t c = column; c < last; c += STEP)
        for (int64_t r = row; r < bottom; r += STEP) {
          const bfloat16* next = weight + (w + PART) * a.weight_stride + c;
          const int64_t share = PART * STEP / (bottom - row);
          for (int64_t i = (r - row) / STEP * share; i < (r - row) / STEP * share + share; ++i) ahead(next + i * a.weight_stride);
          const int64_t across = smaller(PART, s.words - w) / TERMS * 2 * TILE;
          const Sums to{sums + ((r - top) * s.width / SIDE + c) * SIDE, SIDE * s.width, TILE, 64};
          const Factor left{of_rows(r, w), across, 2 * TILE}, right{own + (c - column) * PART / 2, TILE, 2 * TILE};
          const auto multiply = start + w ? split_product<true> : split_product<false>;
          multiply(to, left, TILE, right, true, true, depth);
        }
    }
    if (start + words == a.vocab) put_sums(row, column, smaller(end, bottom), last);
  }

  void put_sums(int64_t row, int64_t column, int64_t bottom, int64_t last) const {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_or_si512(first, _mm512_set1_epi32(8));
    for (int64_t r = row; r < bottom; ++r)
      for (int64_t c = column; c < last; c += STEP) {
        const float* from = sums + ((r - top) / SIDE * s.width + c) * SIDE + r % SIDE * SIDE;
        const __m512 four = (__m512)load(from), others = (__m512)load(from + TILE);
        alignas(64) float v[STEP];
        store(v, (Floats)_mm512_permutex2var_ps(four, first, others));
        store(v + SIDE, (Floats)_mm512_permutex2var_ps(four, second, others));
        put_block(static_cast<bfloat16*>(a.dx) + r * a.width + c, a.width, v, STEP, 1, smaller(STEP, last - c), false);
      }
  }

  // Up to 32 rows of the weight as two tiles of pairs, in the order that unpacking gives: the first has the first four columns
  // of each eight. put_sums puts them back.
  void lay_pairs(float* to, const bfloat16* weight, int64_t rows, int64_t columns) const {
    for (int64_t i = 0; i < TERMS; i += 2, to += SIDE) {
      const auto row = [&](int64_t r) { return r < rows ? some<TERMS>(weight + r * a.weight_stride, columns) : _mm512_setzero_si512(); };
      const __m512i first = row(i), second = row(i + 1);
      store(to, (Floats)_mm512_unpacklo_epi16(first, second));
      store(to + TILE, (Floats)_mm512_unpackhi_epi16(first, second));
    }
  }
};
