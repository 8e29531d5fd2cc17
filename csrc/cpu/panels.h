// Large matrix products of bfloat16 with sums in float32, in the tile registers of AMX.
// Included for AVX-512 alone, after tiles.h: no include guard, no includes.
//
// Both factors are laid out block by block as panels of 32 lines, which are rows of the left factor and columns of the right
// one: for every 32 terms two tiles, side by side. A block of the right factor stays in the second cache.

static constexpr int64_t PANEL = 32, DEPTH = 512, LEFT_LINES = 128, RIGHT_LINES = 1024;
static constexpr int64_t LARGE = 1 << 24;  // elements of a result that nobody finds in a cache

// bfloat16 [lines, terms], rows `step` apart; if turned [terms, lines].
struct Matrix {
  const bfloat16* at;
  int64_t step;
  bool turned;

  Matrix from(int64_t line, int64_t term) const {
    if (!at) return *this;
    return {at + (turned ? term * step + line : line * step + term), step, turned};
  }
};

static inline int64_t panel_floats(int64_t depth) { return padded(depth, TERMS) / TERMS * 2 * TILE; }

// Panels of `lines` lines of x. Lines of a left factor are rows of a tile, those of a right one columns.
template <bool LEFT>
static void lay_panels(float* to, Matrix x, int64_t lines, int64_t depth) {
  const auto pair = [&](int64_t line, int64_t term) {
    const bfloat16* from = x.from(line, term).at;
    const int64_t height = smaller(PANEL, lines - line), terms = smaller(TERMS, depth - term);
    float* tiles = to + line / PANEL * panel_floats(depth) + term / TERMS * 2 * TILE;
    if (x.turned) {
      lay_tiles<true, LEFT>(tiles, from, x.step, terms, height);
    } else {
      lay_tiles<false, !LEFT>(tiles, from, x.step, height, terms);
    }
  };
  if (x.turned) {  // in the order of memory
    for (int64_t term = 0; term < depth; term += TERMS)
      for (int64_t line = 0; line < lines; line += PANEL) pair(line, term);
  } else {
    for (int64_t line = 0; line < lines; line += PANEL)
      for (int64_t term = 0; term < depth; term += TERMS) pair(line, term);
  }
}

// Up to 32 x 32 of a product: tiles of a, then of rest, if there is any. What would pass the end of c, or is to pass the caches
// by, goes by way of a block of its own.
template <bool ADD>
static void panel_product(float* c, int64_t step, const float* a, const float* rest, const float* b, int64_t rows,
                          int64_t columns, int64_t depth, bool past_caches) {
  const int64_t terms = padded(depth, TERMS) / TERMS;
  const auto both = [&](Sums to) {
    const Factor left{a, TILE, 2 * TILE}, other{rest, TILE, 2 * TILE}, right{b, TILE, 2 * TILE};
    const int64_t high = padded(rows, SIDE) / SIDE, wide = padded(columns, SIDE) / SIDE;
    multiply_tiles<ADD, false>(to, left, right, high, wide, terms);
    if (rest) multiply_tiles<true, false>(to, other, right, high, wide, terms);
  };
  const bool whole = rows == PANEL && columns == PANEL;
  if (whole && !past_caches) return both(Sums::matrix(c, step));
  alignas(64) float block[PANEL * PANEL];
  const size_t bytes = sizeof(float) * static_cast<size_t>(columns);
  for (int64_t row = 0; ADD && row < rows; ++row) std::memcpy(block + row * PANEL, c + row * step, bytes);
  both(Sums::matrix(block, PANEL));
  for (int64_t row = 0; row < rows; ++row) {
    if (!whole || !past_caches) {
      std::memcpy(c + row * step, block + row * PANEL, bytes);
      continue;
    }
    _mm512_stream_ps(c + row * step, (__m512)load(block + row * PANEL));
    _mm512_stream_ps(c + row * step + SIDE, (__m512)load(block + row * PANEL + SIDE));
  }
}

static inline int64_t left_floats(int64_t rows, int64_t depth) {  // of one of its two
  return padded(smaller(rows, LEFT_LINES), PANEL) / PANEL * panel_floats(smaller(depth, DEPTH));
}
static inline int64_t right_floats(int64_t columns, int64_t depth) {
  return padded(smaller(columns, RIGHT_LINES), PANEL) / PANEL * panel_floats(smaller(depth, DEPTH));
}

// c [rows, columns], rows `step` apart, = (a + rest) b, or c += that; rest may be null. space: 2 left_floats + right_floats.
static void multiply_matrices(float* c, int64_t step, Matrix a, Matrix rest, Matrix b, int64_t rows, int64_t columns, int64_t depth,
                              bool add, float* space) {
  const TileRegisters registers;
  const int64_t floats = left_floats(rows, depth);
  float *left = space, *beside = rest.at ? space + floats : nullptr, *right = space + 2 * floats;
  const bool aligned = reinterpret_cast<uintptr_t>(c) % 64 == 0 && step % SIDE == 0;
  const bool past_caches = !add && depth <= DEPTH && aligned && rows * columns >= LARGE;
  for (int64_t j = 0; j < columns; j += RIGHT_LINES)
    for (int64_t k = 0; k < depth; k += DEPTH) {
      const int64_t wide = smaller(RIGHT_LINES, columns - j), deep = smaller(DEPTH, depth - k), panel = panel_floats(deep);
      lay_panels<false>(right, b.from(j, k), wide, deep);
      for (int64_t i = 0; i < rows; i += LEFT_LINES) {
        const int64_t tall = smaller(LEFT_LINES, rows - i);
        lay_panels<true>(left, a.from(i, k), tall, deep);
        if (beside) lay_panels<true>(beside, rest.from(i, k), tall, deep);
        for (int64_t column = 0; column < wide; column += PANEL)
          for (int64_t row = 0; row < tall; row += PANEL) {
            const auto product = add || k > 0 ? panel_product<true> : panel_product<false>;
            product(c + (i + row) * step + j + column, step, left + row / PANEL * panel,
                    beside ? beside + row / PANEL * panel : nullptr, right + column / PANEL * panel,
                    smaller(PANEL, tall - row), smaller(PANEL, wide - column), deep, past_caches);
          }
      }
    }
  if (past_caches) _mm_sfence();
}
