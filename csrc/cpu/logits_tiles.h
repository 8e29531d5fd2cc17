// What logits.h declares, of bfloat16 in tiles (tiles.h): dlogits is rounded to bfloat16. What that takes from the gradient of a
// row's target, by far the largest number of a row in most, would cost dx and dweight as much as their own rounding does, so
// it is added to them in float32, `rest` times one row of the weight or of x. No include guard, no includes.

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
  const bfloat16* x = static_cast<const bfloat16*>(a.x) + row * a.x_stride;
  for (int64_t i = STEP; i < 2 * STEP; ++i)
    for (int64_t k = 0; k < a.width; k += TERMS) ahead(x + i * a.x_stride + k);
  lay_tiles<false, true>(to + (row - top) * padded(a.width, TERMS) / 2, x, a.x_stride, smaller(STEP, end - row), a.width);
}

template <>
void lay_terms<bfloat16>(float* to, const Arguments& a, const Sizes& s, int64_t top, int64_t end) {
  const bfloat16* x = static_cast<const bfloat16*>(a.x);
#pragma omp for schedule(static) nowait
  for (int64_t row = top; row < end; row += TERMS)
    for (int64_t c = 0; c < a.width; c += STEP) {
      const int64_t some = smaller(STEP, a.width - c), tiles = padded(some, SIDE) / SIDE;
      for (int64_t i = row + TERMS; i < row + 2 * TERMS; ++i) ahead(x + i * a.x_stride + c);
      lay_tiles<true, false>(to + c * s.round / 2 + (row - top) / TERMS * tiles * TILE, x + row * a.x_stride + c, a.x_stride,
                             smaller(TERMS, end - row), some);
    }
}

template <>
struct Logits<bfloat16> {
  const TileRegisters registers;
  const float* right;
  const int64_t height, columns, width;
  float* own;

  Logits(const Arguments& a, const float* laid, int64_t high, float* space, int64_t wide)
      : registers(a.instruction_set), right(laid), height(high), columns(wide), width(a.width), own(space) {}

  void operator()(float* to, const bfloat16* weight, int64_t step, int64_t words) const {
    const int64_t terms = padded(width, TERMS) / TERMS;
    const Factor b{right, terms * TILE, TILE};
    const bool aligned = registers.amx || (reinterpret_cast<uintptr_t>(weight) % 4 == 0 && step % 2 == 0);
    if (width % TERMS == 0 && words == STEP && aligned) {
      for (int64_t c = 0; c < columns; c += STEP) in_place(to + c, weight, step, b.from(c / SIDE), c, terms);
      return;
    }
    lay_tiles<false, false>(own, weight, step, words, width);
    multiply_tiles<false, false>(registers, Sums::matrix(to, height), rows_factor(own, width), b, 2, columns / SIDE, terms);
  }

  // Tiles of the weight where it lies; meanwhile asks for a share of the next words.
  void in_place(float* to, const bfloat16* weight, int64_t step, Factor b, int64_t column, int64_t terms) const {
    const bfloat16* below = weight + SIDE * step;
    const int64_t from = STEP * column / columns, end = STEP * (column + STEP) / columns;
    if (!registers.amx) {
      const Factor a{reinterpret_cast<const float*>(weight), SIDE * step / 2, SIDE, 2 * step};
      dot_block<2, 2, false>(Sums::matrix(to, height), a, b, terms);
      for (int64_t i = from; i < end; ++i)
        for (int64_t k = 0; k < terms; ++k) ahead(weight + (STEP + i) * step + k * TERMS);
      return;
    }
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
  const Slopes& slopes;
  float* dlogits;  // tiles: for dweight [words, rows], then for dx [words / PART][rows, PART]
  const float* terms;
  float* sums;  // tiles [rows, columns]
  float* total;  // of dweight, over rounds of rows
  float* own;
  const int64_t start, words, top, end;

  float* place(int64_t, int64_t, float* logits) const { return logits; }
  float* of_words(int64_t word, int64_t row) const {
    return dlogits + (word / SIDE * (s.round / TERMS) + (row - top) / TERMS) * TILE;
  }
  float* of_rows(int64_t row, int64_t word) const {
    const int64_t group = word / PART, across = smaller(PART, s.words - group * PART) / TERMS;
    return dlogits + (s.words + group * PART) * s.round / 2 + ((row - top) / SIDE * across + word % PART / TERMS) * TILE;
  }

  void lay(float* from, int64_t row, int64_t word, int64_t some, int64_t columns) const {
    const int64_t height = s.height(row / BLOCK * BLOCK);
    for (int64_t i = some; i < STEP; ++i) std::memset(from + i * height, 0, sizeof(float) * static_cast<size_t>(columns));
    for (int64_t c = 0; c < columns; c += STEP) {
      Floats halves[2][SIDE];  // the first and the second of each four rows
      for (int64_t i = 0; i < STEP; i += 2) {
        Floats pair[2];
        for (int64_t j = 0; j < 2; ++j) {
          const float* at = from + (i + j) * height + c;
          pair[j] = packed(load(at), load(at + SIDE));
          store(of_words(word + i + j, row + c) + i % SIDE * SIDE + j * SIDE, pair[j]);
        }
        halves[0][i / 2] = (Floats)_mm512_unpacklo_epi16((__m512i)pair[0], (__m512i)pair[1]);
        halves[1][i / 2] = (Floats)_mm512_unpackhi_epi16((__m512i)pair[0], (__m512i)pair[1]);
      }
      for (int64_t half = 0; half < 2; ++half) {
        transpose(halves[half]);
        for (int64_t i = 0; i < SIDE; ++i) {
          const int64_t at = i / 4 * 8 + half * 4 + i % 4;  // where unpacking took it from
          store(of_rows(row + c + at, word) + at % SIDE * SIDE, halves[half][i]);
        }
      }
    }
  }

  void of_weight(int64_t word, int64_t column) const {
    const TileRegisters registers(a.instruction_set);
    const bool past_caches = passes_caches<bfloat16>(a);
    const int64_t last = smaller(a.width, column + PART), all_terms = padded(end - top, TERMS) / TERMS;
    bfloat16* to = static_cast<bfloat16*>(a.dweight) + (start + word) * a.width;
    for (int64_t k = 0; k < all_terms; k += SIDE) {  // so many tiles of terms stay in the caches
      const int64_t depth = smaller(SIDE, all_terms - k);
      for (int64_t c = column; c < last; c += STEP) {
        float* block = s.round < s.rows ? total + word * s.width + c * STEP : own + (c - column) * STEP;
        const int64_t wide = last - c > SIDE ? 2 : 1;
        const Factor left{of_words(word, top + k * TERMS), s.round / TERMS * TILE, TILE};
        const Factor right{terms + c * s.round / 2 + k * wide * TILE, TILE, wide * TILE};
        const auto multiply = top + k ? multiply_tiles<true, false> : multiply_tiles<false, false>;
        multiply(registers, Sums::matrix(block, STEP), left, right, 2, wide, depth);
        if (k + depth < all_terms) continue;
        add_rest(block, word, c, smaller(STEP, last - c));
        if (end == a.rows)
          put_block(to + c, a.width, block, STEP, smaller(STEP, words - word), smaller(STEP, last - c), past_caches);
      }
    }
  }

  // What rounding took from the gradients of targets among STEP words: `columns` of their rows of dweight.
  void add_rest(float* block, int64_t word, int64_t column, int64_t columns) const {
    const bfloat16* x = static_cast<const bfloat16*>(a.x) + column;
    for (int64_t first = top; first < end; first += LANES) {
      Integers target;
      std::memcpy(&target, slopes.target + first, sizeof target);
      target -= static_cast<int32_t>(start + word);
      for (unsigned found = _mm512_cmplt_epu32_mask((__m512i)target, _mm512_set1_epi32(STEP)); found; found &= found - 1) {
        const int64_t row = first + __builtin_ctz(found);
        float* to = block + target[row - first] * STEP;
        for (int64_t c = 0; c < columns; c += LANES)
          store(to + c, load(to + c) + slopes.rest[row] * load_some(x + row * a.x_stride + c, columns - c));
      }
    }
  }

  void of_x(int64_t row, int64_t column) const {
    const TileRegisters registers(a.instruction_set);
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
          const int64_t across = smaller(PART, s.words - w) / TERMS * TILE;
          const Sums to{sums + ((r - top) * s.width / SIDE + c) * SIDE, SIDE * s.width, TILE, 64};
          const Factor left{of_rows(r, w), across, TILE}, right{own + (c - column) * PART / 2, TILE, 2 * TILE};
          const auto multiply = start + w ? multiply_tiles<true, false> : multiply_tiles<false, false>;
          multiply(registers, to, left, right, 2, 2, depth);
        }
    }
    if (start + words == a.vocab) put_sums(row, column, smaller(end, bottom), last);
  }

  void put_sums(int64_t row, int64_t column, int64_t bottom, int64_t last) const {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_or_si512(first, _mm512_set1_epi32(8));
    for (int64_t r = row; r < bottom; ++r) {
      const bfloat16* own_word = static_cast<const bfloat16*>(a.weight) + larger(slopes.target[r], 0) * a.weight_stride;
      const float rest = slopes.rest[r];  // what rounding took from the gradient of the row's target; 0 without one
      for (int64_t c = column; c < last; c += STEP) {
        const float* from = sums + ((r - top) / SIDE * s.width + c) * SIDE + r % SIDE * SIDE;
        const __m512 four = (__m512)load(from), others = (__m512)load(from + TILE);
        alignas(64) float v[STEP];
        store(v, (Floats)_mm512_permutex2var_ps(four, first, others) + rest * load_some(own_word + c, last - c));
        store(v + SIDE, (Floats)_mm512_permutex2var_ps(four, second, others) +
                            (last - c > SIDE ? rest * load_some(own_word + c + SIDE, last - c - SIDE) : Floats{}));
        put_block(static_cast<bfloat16*>(a.dx) + r * a.width + c, a.width, v, STEP, 1, smaller(STEP, last - c), false);
      }
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
