// Small matrix products in float32, for matrices that fit the caches, and laying tensors out for them.
// Included once per instruction set by an op's body: no include guard, no includes.
//
//   product         c = a b or c += a b; a tile of c stays in registers
//   lay_columns     a matrix transposed, a vector of its rows at a time
//   rows_of         a matrix as float32 rows, in place where it is that already
//   store_row       the way back

static constexpr int64_t LANES = BLIP3O_LANES;
static constexpr int64_t ROWS = LANES == 16 ? 8 : 4;   // of a narrow tile, which is 2 vectors wide
static constexpr int WIDE = LANES == 16 ? 4 : 2;       // vectors across a wide tile
static constexpr int WIDE_ROWS = LANES == 16 ? 4 : 6;  // of a wide tile: as many sums as there are registers for

static inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <int M, int N, bool ROWS_APART, bool ADD>
static inline void tile(float* c, int64_t c_step, const float* a, int64_t a_step, const float* b, int64_t b_step,
                        int64_t depth) {
  Floats sums[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) sums[m][n] = Floats{};
  const int64_t row_step = ROWS_APART ? a_step : 1, k_step = ROWS_APART ? 1 : a_step;
  for (int64_t k = 0; k < depth; ++k, b += b_step) {
    Floats right[N];
    for (int n = 0; n < N; ++n) right[n] = load(b + n * LANES);
    for (int m = 0; m < M; ++m) {
      const Floats left = all(a[m * row_step + k * k_step]);
      for (int n = 0; n < N; ++n) sums[m][n] += left * right[n];
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {  // added at the end: a long sum in parts loses fewer digits
      float* at = c + m * c_step + n * LANES;
      store(at, ADD ? load(at) + sums[m][n] : sums[m][n]);
    }
}

// All rows of N vectors of columns.
template <int M, int N, bool ROWS_APART, bool ADD>
static inline void tiles(float* c, int64_t c_step, const float* a, int64_t a_step, const float* b, int64_t b_step,
                         int64_t rows, int64_t depth) {
  const int64_t row_step = ROWS_APART ? a_step : 1;
  const auto advance = [&](int64_t n) { c += n * c_step, a += n * row_step, rows -= n; };
  for (; rows >= M; advance(M)) tile<M, N, ROWS_APART, ADD>(c, c_step, a, a_step, b, b_step, depth);
  if (M > 4 && rows >= 4) tile<4, N, ROWS_APART, ADD>(c, c_step, a, a_step, b, b_step, depth), advance(4);
  if (rows >= 2) tile<2, N, ROWS_APART, ADD>(c, c_step, a, a_step, b, b_step, depth), advance(2);
  if (rows >= 1) tile<1, N, ROWS_APART, ADD>(c, c_step, a, a_step, b, b_step, depth);
}

// c [rows, columns] = a b, or c += a b if ADD; b has rows b_step apart, columns is a multiple of LANES. Element (row, k) of
// a is at a[row * a_step + k] if ROWS_APART, at a[row + k * a_step] if not.
template <bool ROWS_APART, bool ADD = false>
static void product(float* c, int64_t c_step, const float* a, int64_t a_step, const float* b, int64_t b_step,
                    int64_t rows, int64_t columns, int64_t depth) {
  const auto advance = [&](int64_t n) { c += n * LANES, b += n * LANES, columns -= n * LANES; };
  for (; columns >= WIDE * LANES; advance(WIDE))
    tiles<WIDE_ROWS, WIDE, ROWS_APART, ADD>(c, c_step, a, a_step, b, b_step, rows, depth);
  if (columns >= 2 * LANES) tiles<ROWS, 2, ROWS_APART, ADD>(c, c_step, a, a_step, b, b_step, rows, depth), advance(2);
  if (columns) tiles<ROWS, 1, ROWS_APART, ADD>(c, c_step, a, a_step, b, b_step, rows, depth);
}

static inline void transpose(Floats (&v)[LANES]) {
  for (int64_t round = 1; round < LANES; round *= 2) {
    Floats next[LANES];
    for (int64_t i = 0; i < LANES / 2; ++i) interleaved(v[i], v[i + LANES / 2], next[2 * i], next[2 * i + 1]);
    for (int64_t i = 0; i < LANES; ++i) v[i] = next[i];
  }
}

// to[k * to_step + row] = the matrix [n, width] at (row, k), zeros to the end of the last vector of rows.
// part(row, k, count) gives `count` elements of a row from k on.
template <class Part>
static inline void lay_columns(float* to, int64_t to_step, int64_t n, int64_t width, Part part) {
  for (int64_t row = 0; row < n; row += LANES)
    for (int64_t k = 0; k < width; k += LANES) {
      const int64_t count = smaller(LANES, width - k);
      Floats v[LANES];
      for (int64_t i = 0; i < LANES; ++i) v[i] = row + i < n ? part(row + i, k, count) : Floats{};
      transpose(v);
      if (count == LANES)
        for (int64_t i = 0; i < LANES; ++i) store(to + (k + i) * to_step + row, v[i]);
      else
        for (int64_t i = 0; i < count; ++i) store(to + (k + i) * to_step + row, v[i]);
    }
}

template <class T>
static inline Floats load_some(const T* p, int64_t n) {
  return n >= LANES ? load(p) : load(p, n);
}

template <class T>
static void lay_columns(float* to, int64_t to_step, const T* x, int64_t step, int64_t n, int64_t width) {
  lay_columns(to, to_step, n, width,
              [=](int64_t row, int64_t k, int64_t count) { return load_some(x + row * step + k, count); });
}

// x [n, width] as float32 rows, of whole vectors if WHOLE: in place if it is that already, otherwise copied to `space`. What
// is read `often` is copied too where its rows lie apart: many of them would share a set of the cache.
template <bool WHOLE, class T>
static const float* rows_of(const T* x, int64_t& step, int64_t n, int64_t width, float* space, bool often) {
  const int64_t wide = padded(width, LANES);
  if (std::is_same<T, float>::value && !(WHOLE && width % LANES) && (step == width || !often))
    return reinterpret_cast<const float*>(x);
  const int64_t whole = width / LANES * LANES;
  if (step == wide && width == wide) {  // without gaps: one row
    for (int64_t i = 0; i < n * wide; i += LANES) store(space + i, load(x + i));
    return space;
  }
  for (int64_t row = 0; row < n; ++row) {
    const T* from = x + row * step;
    float* to = space + row * wide;
    for (int64_t i = 0; i < whole; i += LANES) store(to + i, load(from + i));
    if (whole < width) store(to + whole, load(from + whole, width - whole));
  }
  step = wide;
  return space;
}

template <class T>
static inline void store_row(T* y, const float* x, int64_t width, Floats factor) {
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) store(y + i, load(x + i) * factor);
  if (i < width) store(y + i, load(x + i) * factor, width - i);
}
