// What the kernels of attention share: tiles in shared memory, which rows a block has and what these see, and what makes a score of
// a product.
#pragma once

#include "mma.cuh"

namespace blip3o {

constexpr float LOG2E = 1.44269504088896340736f, LN2 = 0.69314718055994530942f, NOTHING = -INFINITY;
constexpr int FAR = 1 << 29;  // a limit that no pair reaches: tokens and keys are below half of it
constexpr int WARP = 32;

// A tile is rows of D elements in pieces of 16 bytes; piece c of row r lies at the place c ^ (r % 8), so that eight pieces of one
// column, as ldmatrix takes them, lie in different banks.
template <int D, class T>
__device__ inline T* piece(T* tile, int row, int column) {
  constexpr int N = 16 / sizeof(T);
  static_assert(D / N >= 8, "");
  return tile + row * D + (column ^ (row & 7)) * N;
}

// Rows of `width` elements, `stride` apart. wide: whether pieces of 16 bytes from their starts are aligned and whole.
template <class T>
struct Rows {
  T* start;
  int64_t stride;
  int width;
  bool wide;
};

// The rows from `first` on, which end before `end`, to a tile of ROWS rows; what is beyond becomes 0.
template <int ROWS, int D, int THREADS, class T>
__device__ inline void load_tile(T* tile, const Rows<const T>& matrix, int first, int end) {
  constexpr int N = 16 / sizeof(T), PIECES = D / N;
  const T* from = matrix.start + first * matrix.stride;
  const int rows = end - first;
  static_assert(ROWS * PIECES % THREADS == 0 && THREADS % PIECES == 0, "");
  if (matrix.wide) {
    const int above = threadIdx.x / PIECES, column = threadIdx.x % PIECES;
    const bool inside = column * N < matrix.width;
#pragma unroll
    for (int i = 0; i < ROWS * PIECES / THREADS; ++i) {
      const int row = above + i * (THREADS / PIECES);
      cp_async<16>(piece<D>(tile, row, column), from + row * matrix.stride + column * N, row < rows && inside);
    }
    return;
  }
#pragma unroll 1
  for (int item = threadIdx.x; item < ROWS * PIECES; item += THREADS) {
    const int row = item / PIECES, column = item % PIECES;
    Stored<T, N> stored;
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const int x = column * N + e;
      stored.v[e] = row < rows && x < matrix.width ? from[row * matrix.stride + x] : from_float<T>(0.0f);
    }
    *reinterpret_cast<Stored<T, N>*>(piece<D>(tile, row, column)) = stored;
  }
}

// A warp stores ROWS rows of a tile from the row `tile_row` on, of which `count` exist, and of those WIDTH columns from `first` on.
template <int ROWS, int D, int WIDTH, class T>
__device__ inline void store_rows(const Rows<T>& to, T* tile, int tile_row, int count, int first) {
  constexpr int N = 16 / sizeof(T), PIECES = WIDTH / N;
#pragma unroll 1
  for (int item = threadIdx.x % WARP; item < ROWS * PIECES; item += WARP) {
    const int row = item / PIECES, column = first + item % PIECES * N;
    if (row >= count || column >= to.width) continue;
    const Stored<T, N> stored = *reinterpret_cast<const Stored<T, N>*>(piece<D>(tile, tile_row + row, column / N));
    if (to.wide) {
      put(to.start + row * to.stride + column, stored);
    } else {
#pragma unroll
      for (int e = 0; e < N; ++e)
        if (column + e < to.width) to.start[row * to.stride + column + e] = stored.v[e];
    }
  }
}

// The place of a row of [batch, heads, tokens] by its number; with 32 bits, as a division of 64 is a call.
struct Row {
  int64_t batch, head, token;

  template <class Arguments>
  __device__ Row(const Arguments& a, unsigned number) {
    const unsigned tokens = static_cast<unsigned>(a.tokens), heads = static_cast<unsigned>(a.heads);
    token = number % tokens, head = number / tokens % heads, batch = number / tokens / heads;
  }
};

// Where a tile of rows lies: the rows of its sequence start at `row`, the columns that these may see at `column`; `first` is the
// tile's first row, counted in the sequence. Rows are queries and columns keys, or the other way round.
struct Place {
  int row, rows, column, columns, first;
};

// Of packed sequences, tiles of sequence i start at row_ends[i] / BLOCK + i: that is enough of them for each whatever the lengths
// are, so the grid of rows / BLOCK + sequences + 1 tiles is known without them. Rows after the last sequence see no columns.
template <int BLOCK>
__device__ inline Place place_of(int tile, const int32_t* row_ends, const int32_t* column_ends, int sequences, int rows,
                                 int columns) {
  if (!row_ends) return {0, rows, 0, columns, tile * BLOCK};
  int low = 0, high = sequences;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (row_ends[middle] / BLOCK + middle <= tile)
      low = middle;
    else
      high = middle - 1;
  }
  const int row = row_ends[low], column = column_ends[low];
  const int row_end = low < sequences ? row_ends[low + 1] : rows, column_end = low < sequences ? column_ends[low + 1] : column;
  return {row, row_end - row, column, column_end - column, (tile - row / BLOCK - low) * BLOCK};
}
inline int64_t tiles_of(int64_t rows, int block, bool packed, int64_t sequences) {
  return packed ? rows / block + sequences + 1 : (rows + block - 1) / block;
}

// Row r sees the columns r + low to r + high. Of `count` rows from `first` on, some see [start, stop), all see [all_start, all_stop).
struct Span {
  int low, high, start, stop, all_start, all_stop;

  __device__ Span(const Place& at, int first, int count, int before, int after)
      : low(at.columns - at.rows - before), high(at.columns - at.rows + after) {
    const int last = min(first + count, at.rows) - 1;
    start = max(first + low, 0);
    stop = min(last + high + 1, at.columns);
    all_start = max(last + low, 0);
    all_stop = min(first + high + 1, at.columns);
  }
  // Whether a row sees the columns [from, to) in part.
  __device__ bool cuts(int from, int to) const { return from < all_start || to > all_stop; }
  __device__ bool meets(int from, int to) const { return from < stop && to > start; }
  __device__ bool sees(int row, int column, int columns) const {
    return column >= row + low && column <= row + high && column < columns;
  }
};

// f(x, i, j) for what a thread has of a product.
template <class Product, int C, class F>
__device__ inline void each(float (&s)[Product::ROWS][C], F f) {
#pragma unroll
  for (int i = 0; i < Product::ROWS; ++i)
#pragma unroll
    for (int j = 0; j < C; ++j) f(s[i][j], i, j);
}

__device__ inline float hyperbolic_tangent(float x) {  // near 0, where the quotient cancels, a series
  const float z = x * x;
  const float series = (((-0.00589395f * z + 0.02079462f) * z - 0.05378329f) * z + 0.13331915f) * z - 0.33333298f;
  return z < 0.36f ? x + x * z * series : 1.0f - 2.0f * fast_reciprocal(1.0f + fast_exp2(x * (2.0f * LOG2E)));
}

// Bent scores are in units of log 2, so that a probability is one exp2; of float32 in natural ones, which the largest round less.
template <class T>
constexpr float UNIT = sizeof(T) == 4 ? 1.0f : LOG2E;

// A product times `factor` is a score, unless it is `bent`: by a cap, a mask, or a scale that is not positive and would turn largest
// into least. An additive mask as low as the lowest numbers leaves no room for a log-sum-exp: it masks, as -infinity does.
struct Bend {
  float factor, inner, outer, unit;
  bool bent;
  int mask_kind;
  const void* mask;
  int64_t mask_token;

  template <class Arguments>
  __device__ Bend(const Arguments& a, int64_t batch, int64_t head, float unit)
      : factor(a.scale * unit), unit(unit), mask_kind(a.mask_kind), mask(a.mask), mask_token(a.mask_token) {
    bent = a.mask_kind || a.softcap > 0.0f || !(a.scale > 0.0f);
    inner = a.softcap > 0.0f ? a.scale / a.softcap : 0.0f;
    outer = a.softcap > 0.0f ? a.softcap * unit : 0.0f;
    const int64_t from = batch * a.mask_batch + head * a.mask_head;
    if (mask_kind == 1) mask = static_cast<const uint8_t*>(mask) + from;
    if (mask_kind == 2) mask = static_cast<const float*>(mask) + from;
  }
  // Products -> scores, of the rows from `row` on, of which `rows` exist, and the columns from `column` on. Rows are queries, or
  // with OF_KEYS keys. slope(i, j, x): by what the cap bends a score.
  template <class Product, bool OF_KEYS, int C, class Slope>
  __device__ void apply(float (&s)[Product::ROWS][C], int row, int rows, int column, int columns, Slope slope) const {
    const bool capped = outer > 0.0f;
    if (capped) {
      each<Product>(s, [&](float& x, int i, int j) {
        const float bend = hyperbolic_tangent(x * inner);
        slope(i, j, 1.0f - bend * bend);
        x = bend * outer;
      });
    } else {
      each<Product>(s, [&](float& x, int, int) { x *= factor; });
    }
    const auto exists = [&](int i, int j) { return row + Product::row(i) < rows && column + Product::column(j) < columns; };
    const auto at = [&](int i, int j) {
      const int its = row + Product::row(i), other = column + Product::column(j);
      return OF_KEYS ? other * mask_token + its : its * mask_token + other;
    };
    if (mask_kind == 1) {
      const uint8_t* allowed = static_cast<const uint8_t*>(mask);
      each<Product>(s, [&](float& x, int i, int j) { x = exists(i, j) && allowed[at(i, j)] ? x : NOTHING; });
    } else if (mask_kind == 2) {
      const float* added = static_cast<const float*>(mask);
      each<Product>(s, [&](float& x, int i, int j) {
        const float more = exists(i, j) ? added[at(i, j)] : NOTHING;
        x = more <= -1e30f ? NOTHING : x + more * unit;
      });
    }
  }
};

}  // namespace blip3o
