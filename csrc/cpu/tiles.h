// Matrix products of bfloat16 with sums in float32, in the tile registers of AMX or, where the chip has none, in vectors.
// Included by an op's body for AVX-512 alone, after product.h: no include guard, no includes.
//
//   TileRegisters     which of the two it is; holds the registers configured while it lives
//   lay_tiles         lays a matrix out for them, with zeros where it ends
//   multiply_tiles    c = a b or c += a b
//   packed, paired    two vectors rounded to bfloat16, one behind the other or in pairs
//
// A tile has 16 rows of 64 bytes. Of the left factor it is [16 rows, 32 terms], of the right one [16 pairs of terms, 16
// columns, 2], of the product [16, 16] floats. Matrices laid out are tiles one after the other: a row of 16 at a power of 2
// would share one set of the cache. The instructions are in assembly, so that no compiler's flags matter.

static constexpr int64_t SIDE = 16, TERMS = 32, TILE = SIDE * SIDE;  // of a tile: rows, terms, floats it takes

class TileRegisters {
 public:
  const bool amx;

  explicit TileRegisters(int instruction_set) : amx(blip3o_instruction_set(instruction_set) == BLIP3O_AMX) {
    if (!amx) return;
    alignas(64) uint8_t shapes[64] = {1};  // the only palette there is; then columns in bytes, 16 bit each, and rows
    for (int i = 0; i < 8; ++i) shapes[16 + 2 * i] = 64, shapes[48 + i] = SIDE;
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  ~TileRegisters() {
    if (amx) asm volatile("tilerelease");
  }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

template <int REGISTER>
static inline void load_tile(const float* p, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(row_bytes), "i"(REGISTER) : "memory");
}
template <int REGISTER>
static inline void store_tile(float* p, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(row_bytes), "i"(REGISTER) : "memory");
}
template <int REGISTER>
static inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(REGISTER));
}
template <int C, int A, int B>
static inline void multiply_tile() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// Where the tiles of a factor are, in floats: `step` from row (or column) to row of tiles, `term_step` along the terms. The
// rows of a tile are `row_bytes` apart.
struct Factor {
  const float* at;
  int64_t step, term_step, row_bytes = 64;

  Factor from(int64_t tiles) const { return {at + tiles * step, step, term_step, row_bytes}; }
  Factor along(int64_t tiles) const { return {at + tiles * term_step, step, term_step, row_bytes}; }
};

// Where the tiles of a product are: as rows of a matrix, or one after the other.
struct Sums {
  float* at;
  int64_t step, column_step, row_bytes;

  static Sums matrix(float* at, int64_t width) { return {at, SIDE * width, SIDE, 4 * width}; }
  static Sums tiles(float* at, int64_t width) { return {at, SIDE * width, TILE, 64}; }
};

// M x N tiles of a product, the terms of `depth` tiles. Registers: 0 to 3 the product, 4 and 5 left, 6 and 7 right.
template <int M, int N, bool ADD>
static inline void amx_block(Sums c, Factor a, Factor b, int64_t depth) {
  const int64_t bytes = c.row_bytes;
  float *beside = c.at + c.column_step, *below = c.at + c.step, *across = below + c.column_step;
  if (ADD) {
    load_tile<0>(c.at, bytes);
    if (N > 1) load_tile<1>(beside, bytes);
    if (M > 1) load_tile<2>(below, bytes);
    if (M > 1 && N > 1) load_tile<3>(across, bytes);
  } else {
    zero_tile<0>();
    if (N > 1) zero_tile<1>();
    if (M > 1) zero_tile<2>();
    if (M > 1 && N > 1) zero_tile<3>();
  }
  for (; depth > 0; --depth, a.at += a.term_step, b.at += b.term_step) {
    load_tile<6>(b.at, b.row_bytes);
    if (N > 1) load_tile<7>(b.at + b.step, b.row_bytes);
    load_tile<4>(a.at, a.row_bytes);
    multiply_tile<0, 4, 6>();
    if (N > 1) multiply_tile<1, 4, 7>();
    if (M > 1) {
      load_tile<5>(a.at + a.step, a.row_bytes);
      multiply_tile<2, 5, 6>();
      if (N > 1) multiply_tile<3, 5, 7>();
    }
  }
  store_tile<0>(c.at, bytes);
  if (N > 1) store_tile<1>(beside, bytes);
  if (M > 1) store_tile<2>(below, bytes);
  if (M > 1 && N > 1) store_tile<3>(across, bytes);
}

// sums + a pair of bfloat16 times a pair, lane by lane; what is subnormal counts as 0, as in AMX.
static inline Floats dot(Floats sums, Floats left, Floats right) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(left), "v"(right));
  return sums;
}

// The same in vectors. So many rows at once keep the sums of N tiles in registers, and enough of them in flight.
template <int M, int N, bool ADD>
static inline void dot_block(Sums c, Factor a, Factor b, int64_t depth) {
  constexpr int64_t TOGETHER = 8;
  const int64_t a_row = a.row_bytes / 4, b_row = b.row_bytes / 4, c_row = c.row_bytes / 4;
  for (int64_t i = 0; i < M * SIDE; i += TOGETHER) {
    const float *left = a.at + i / SIDE * a.step + i % SIDE * a_row, *right = b.at;
    float* to = c.at + i / SIDE * c.step + i % SIDE * c_row;
    Floats sums[TOGETHER][N];
    for (int64_t r = 0; r < TOGETHER; ++r)
      for (int64_t n = 0; n < N; ++n) sums[r][n] = ADD ? load(to + r * c_row + n * c.column_step) : Floats{};
    for (int64_t k = 0; k < depth; ++k, left += a.term_step, right += b.term_step)
      for (int64_t pair = 0; pair < SIDE; ++pair) {
        Floats factors[N];
        for (int64_t n = 0; n < N; ++n) factors[n] = load(right + n * b.step + pair * b_row);
        for (int64_t r = 0; r < TOGETHER; ++r) {
          const Floats own = all(left[r * a_row + pair]);
          for (int64_t n = 0; n < N; ++n) sums[r][n] = dot(sums[r][n], own, factors[n]);
        }
      }
    for (int64_t r = 0; r < TOGETHER; ++r)
      for (int64_t n = 0; n < N; ++n) store(to + r * c_row + n * c.column_step, sums[r][n]);
  }
}

template <int M, int N, bool ADD>
static inline void tile_block(const TileRegisters& registers, Sums c, Factor a, Factor b, int64_t depth) {
  registers.amx ? amx_block<M, N, ADD>(c, a, b, depth) : dot_block<M, N, ADD>(c, a, b, depth);
}

// c [rows, columns] = a b, or c += a b if ADD; all counts are of tiles. Rows are the inner loop if ROWS_INSIDE: the larger
// matrix is to be gone through once.
template <bool ADD, bool ROWS_INSIDE>
static void multiply_tiles(const TileRegisters& registers, Sums c, Factor a, Factor b, int64_t rows, int64_t columns,
                           int64_t depth) {
  const auto block = [&](int64_t i, int64_t j) {
    const Sums to{c.at + i * c.step + j * c.column_step, c.step, c.column_step, c.row_bytes};
    const Factor left = a.from(i), right = b.from(j);
    const bool tall = i + 1 < rows, broad = j + 1 < columns;
    if (tall && broad) return tile_block<2, 2, ADD>(registers, to, left, right, depth);
    if (tall) return tile_block<2, 1, ADD>(registers, to, left, right, depth);
    if (broad) return tile_block<1, 2, ADD>(registers, to, left, right, depth);
    tile_block<1, 1, ADD>(registers, to, left, right, depth);
  };
  if (ROWS_INSIDE) {
    for (int64_t j = 0; j < columns; j += 2)
      for (int64_t i = 0; i < rows; i += 2) block(i, j);
  } else {
    for (int64_t i = 0; i < rows; i += 2)
      for (int64_t j = 0; j < columns; j += 2) block(i, j);
  }
}

// (low, high) as 32 bfloat16.
static inline Floats packed(Floats low, Floats high) {
  Floats both;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(both) : "v"(low), "v"(high));
  return both;
}
// Of 32 bfloat16, each of the first 16 beside its own of the second 16.
static inline Floats side_by_side(__m512i halves) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                         20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (Floats)_mm512_permutexvar_epi16(order, halves);
}
static inline Floats paired(Floats first, Floats second) { return side_by_side((__m512i)packed(first, second)); }

// n elements, at most COUNT, then zeros.
template <int COUNT>
static inline __m512i some(const bfloat16* p, int64_t n) {
  const auto half = [](const bfloat16* from) {
    return _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  };
  if (n >= COUNT) return COUNT == 16 ? half(p) : _mm512_loadu_si512(p);
  if (n == 16) return half(p);
  bfloat16 elements[32] = {};
  for (int64_t i = 0; i < n; ++i) elements[i] = p[i];
  return _mm512_loadu_si512(elements);
}

// x [rows, width] as tiles of [16, 32], those of a row one after the other; or as tiles of [32, 16] if PAIRS, where two rows
// of x are one row of pairs. Zeros follow to a multiple of 32 rows. If TURNED, rows and columns of the tile (of pairs) change places. What these are for:
//                           PAIRS = false                           PAIRS = true
//     TURNED = false        x as left factor                        x as right factor
//     TURNED = true         its transpose as right factor           its transpose as left factor
template <bool PAIRS, bool TURNED>
static void lay_tiles(float* to, const bfloat16* x, int64_t step, int64_t rows, int64_t width) {
  const int64_t tall = PAIRS ? TERMS : SIDE, broad = PAIRS ? SIDE : TERMS;
  for (int64_t row = 0; row < padded(rows, TERMS); row += tall)
    for (int64_t k = 0; k < width; k += broad, to += TILE) {
      Floats v[LANES];
      for (int64_t i = 0; i < SIDE; ++i) {
        const int64_t first = row + (PAIRS ? 2 * i : i);
        __m512i words = first < rows ? some<PAIRS ? SIDE : TERMS>(x + first * step + k, width - k) : _mm512_setzero_si512();
        if (PAIRS) {
          if (first + 1 < rows) {
            const __m512i next = some<SIDE>(x + (first + 1) * step + k, width - k);
            words = _mm512_inserti64x4(words, _mm512_castsi512_si256(next), 1);
          }
          v[i] = side_by_side(words);
        } else {
          v[i] = (Floats)words;
        }
      }
      if (TURNED) transpose(v);
      for (int64_t i = 0; i < SIDE; ++i) store(to + i * SIDE, v[i]);
    }
}

// The factors that lay_tiles makes: `width` elements wide.
static inline Factor rows_factor(const float* at, int64_t width) { return {at, padded(width, TERMS) / TERMS * TILE, TILE}; }
static inline Factor pairs_factor(const float* at, int64_t width) { return {at, TILE, padded(width, SIDE) / SIDE * TILE}; }
