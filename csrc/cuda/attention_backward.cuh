// The backward kernels of attention. With p = 2^(score - log-sum) and delta = dy . y of each query:
//     ds = p (dy value^T - delta),   dvalue = p^T dy,   dkey = scale ds^T query,   dquery = scale ds key
// One kernel makes dkey and dvalue of a tile of keys from the queries that see them, head by head of their group, another dquery of a
// tile of queries. Scores are computed in both: that costs two of seven products and saves atomics, whose order changes from run to
// run. Both go the same way: a block has rows of two matrices, `mine`, and goes through those of two others, `theirs`, with
//     p from mine[0] theirs[0]^T,   ds from p and mine[1] theirs[1]^T,   sums[0] += ds theirs[0]   (and of keys sums[1] += p theirs[1])
// p and ds, [mine, theirs], stay in registers. Source: Dao 2023, arXiv:2307.08691.
#pragma once

#include "attention_products.cuh"

namespace blip3o {

struct BackwardCall {
  blip3o_attention_backward_arguments a;
  int tiles, left, right;
  bool wide, wide_results;
};

// WIDTH: columns of the sums that one block makes, of D; the rest is for other blocks. OTHERS: rows of theirs at a time. STAGES: with
// two of their tiles, one is computed with while the next is on its way.
template <class Product_, bool OF_KEYS_, int WARPS, int OTHERS_, int STAGES_, int WIDTH_>
struct BackwardShape {
  using Product = Product_;
  using T = typename Product::T;
  static constexpr bool OF_KEYS = OF_KEYS_;
  static constexpr int D = Product::D, OTHERS = OTHERS_, STAGES = STAGES_, WIDTH = WIDTH_, PARTS = D / WIDTH;
  static constexpr int THREADS = WARP * WARPS;
  static constexpr int ROWS = WARPS * Product::WARP_ROWS, SCRATCH = Product::SCRATCH * OTHERS;
  static constexpr int LOGS = OF_KEYS ? STAGES * 2 * OTHERS : 0;  // floats: of their queries the log-sum and delta
  static constexpr int SHARED = (2 * ROWS + STAGES * 2 * OTHERS) * D * static_cast<int>(sizeof(T)) + (SCRATCH * WARPS + LOGS) * 4;
  static_assert(SHARED <= 99 << 10, "");
  static_assert(OTHERS <= THREADS, "");
};

// Of each query: delta, and the log-sum, infinite where it sees nothing, so that each p is 0. A warp a row.
template <int N, class T>
__global__ void __launch_bounds__(4 * WARP) attention_delta(BackwardCall call) {
  const blip3o_attention_backward_arguments& a = call.a;
  const unsigned number = blockIdx.x * 4 + threadIdx.x / WARP;
  const int64_t rows = a.batch * a.heads * a.tokens;
  if (number >= rows) return;
  const Row at(a, number);
  const T* dy = static_cast<const T*>(a.dy) + at.batch * a.dy_batch + at.head * a.dy_head + at.token * a.dy_token;
  const T* y = static_cast<const T*>(a.y) + at.batch * a.y_batch + at.head * a.y_head + at.token * a.y_token;
  float delta = 0;
  for (int column = threadIdx.x % WARP * N; column < a.value_dim; column += WARP * N) {
    const Floats<N> u = load<N>(dy + column), v = load<N>(y + column);
#pragma unroll
    for (int k = 0; k < N; ++k) delta += u.v[k] * v.v[k];
  }
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) delta += __shfl_xor_sync(0xffffffffu, delta, lane);
  if (threadIdx.x % WARP) return;
  const float log_sum = a.log_sum[(at.batch * a.heads + at.head) * a.log_sum_head + at.token];
  a.workspace[number] = log_sum == NOTHING ? -NOTHING : log_sum * UNIT<T>;
  a.workspace[rows + number] = delta;
}

template <class Shape>
__global__ void __launch_bounds__(Shape::THREADS, 1) attention_backward(BackwardCall call) {
  using Product = typename Shape::Product;
  using T = typename Shape::T;
  constexpr bool OF_KEYS = Shape::OF_KEYS;
  constexpr int D = Shape::D, ROWS = Shape::ROWS, OTHERS = Shape::OTHERS, STAGES = Shape::STAGES, THREADS = Shape::THREADS;
  constexpr int C = OTHERS / Product::LANES, W = Shape::WIDTH / Product::LANES;
  const blip3o_attention_backward_arguments& a = call.a;
  T *mine[2] = {reinterpret_cast<T*>(dynamic_shared()), reinterpret_cast<T*>(dynamic_shared()) + ROWS * D};
  T* theirs = mine[1] + ROWS * D;                                              // [STAGES, 2, OTHERS, D]
  float* logs = reinterpret_cast<float*>(theirs + STAGES * 2 * OTHERS * D);    // [STAGES, 2, OTHERS]
  const int warp = threadIdx.x / WARP, first_row = warp * Product::WARP_ROWS;
  float* scratch = logs + Shape::LOGS + warp * Shape::SCRATCH;

  const unsigned tiles = static_cast<unsigned>(call.tiles), heads = static_cast<unsigned>(a.heads);
  const unsigned groups = static_cast<unsigned>(a.groups);
  const unsigned number = blockIdx.x / Shape::PARTS, own_heads = OF_KEYS ? groups : heads, share = heads / groups;
  const int first_column = blockIdx.x % Shape::PARTS * Shape::WIDTH;
  const unsigned own_head = number / tiles % own_heads, batch = number / tiles / own_heads;
  const unsigned group = OF_KEYS ? own_head : own_head / share;
  const int before = OF_KEYS ? call.right : call.left, after = OF_KEYS ? call.left : call.right;
  const unsigned tile = after < FAR ? tiles - 1 - number % tiles : number % tiles;  // what sees most comes first
  const int32_t *row_ends = OF_KEYS ? a.cu_seqlens_k : a.cu_seqlens_q, *column_ends = OF_KEYS ? a.cu_seqlens_q : a.cu_seqlens_k;
  const int all_own = OF_KEYS ? a.keys : a.tokens, all_theirs = OF_KEYS ? a.tokens : a.keys;
  const Place at = place_of<ROWS>(tile, row_ends, column_ends, a.sequences, all_own, all_theirs);
  if (at.first >= at.rows) return;
  const int row = at.row + at.first, token = OF_KEYS ? at.column : row, place = OF_KEYS ? row : at.column;  // place: of keys
  const int head_dim = static_cast<int>(a.head_dim), value_dim = static_cast<int>(a.value_dim);
  const Rows<const T> key{static_cast<const T*>(a.key) + batch * a.key_batch + group * a.key_head + place * a.key_token,
                          a.key_token, head_dim, call.wide};
  const Rows<const T> value{static_cast<const T*>(a.value) + batch * a.value_batch + group * a.value_head + place * a.value_token,
                            a.value_token, value_dim, call.wide};
  const auto query_of = [&](unsigned head) -> Rows<const T> {
    return {static_cast<const T*>(a.query) + batch * a.query_batch + head * a.query_head + token * a.query_token, a.query_token,
            head_dim, call.wide};
  };
  const auto dy_of = [&](unsigned head) -> Rows<const T> {
    return {static_cast<const T*>(a.dy) + batch * a.dy_batch + head * a.dy_head + token * a.dy_token, a.dy_token, value_dim,
            call.wide};
  };
  const int64_t all_rows = a.batch * a.heads * a.tokens;

  const Span span(at, at.first, ROWS, before, after), own(at, at.first + first_row, Product::WARP_ROWS, before, after);
  const bool idle = at.first + first_row >= at.rows;
  const int start = span.start / OTHERS * OTHERS, steps = (max(span.stop - start, 0) + OTHERS - 1) / OTHERS;

  // Their rows from `from` on, of the query head `head`.
  const auto load_theirs = [&](int stage, unsigned head, int from) {
    T *first = theirs + stage * 2 * OTHERS * D, *second = first + OTHERS * D;
    if constexpr (OF_KEYS) {
      load_tile<OTHERS, D, THREADS>(first, query_of(head), from, at.columns);
      load_tile<OTHERS, D, THREADS>(second, dy_of(head), from, at.columns);
      if (threadIdx.x < OTHERS) {
        const float* its = a.workspace + (batch * a.heads + head) * a.tokens + token + from + threadIdx.x;
        const bool exists = from + static_cast<int>(threadIdx.x) < at.columns;
        cp_async<4>(logs + stage * 2 * OTHERS + threadIdx.x, its, exists);
        cp_async<4>(logs + (stage * 2 + 1) * OTHERS + threadIdx.x, its + all_rows, exists);
      }
    } else {
      load_tile<OTHERS, D, THREADS>(first, key, from, at.columns);
      load_tile<OTHERS, D, THREADS>(second, value, from, at.columns);
    }
    cp_async_commit();
  };

  float sums[1 + OF_KEYS][Product::ROWS][W] = {}, own_log[Product::ROWS] = {}, own_delta[Product::ROWS] = {};
  unsigned head = OF_KEYS ? group * share : own_head;
  const unsigned last_head = OF_KEYS ? head + share : head + 1;
  if constexpr (!OF_KEYS) {
#pragma unroll
    for (int i = 0; i < Product::ROWS; ++i) {
      const int its = first_row + Product::row(i);
      const float* log = a.workspace + (batch * a.heads + head) * a.tokens + row + its;
      const bool exists = at.first + its < at.rows;
      own_log[i] = exists ? log[0] : -NOTHING, own_delta[i] = exists ? log[all_rows] : 0.0f;
    }
  }
  if (steps) {
    load_tile<ROWS, D, THREADS>(mine[0], OF_KEYS ? key : query_of(head), 0, at.rows - at.first);
    load_tile<ROWS, D, THREADS>(mine[1], OF_KEYS ? value : dy_of(head), 0, at.rows - at.first);
    load_theirs(0, head, start);
  }
  int stage = 0;
  for (; steps && head < last_head; ++head) {
    const Bend bend(a, batch, head, UNIT<T>);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int from = start + step * OTHERS;
      const bool same = step + 1 < steps;
      const bool more = same || head + 1 < last_head;
      cp_async_wait<0>();
      __syncthreads();  // their rows are there; all have done with those before
      if (STAGES == 2 && more) load_theirs(1 - stage, same ? head : head + 1, same ? from + OTHERS : start);
      if (!idle && own.meets(from, from + OTHERS)) {
        T *first = theirs + stage * 2 * OTHERS * D, *second = first + OTHERS * D;
        float p[Product::ROWS][C] = {}, ds[Product::ROWS][C] = {};
        Product::outer(p, mine[0], first_row, first, 0, head_dim);
        Product::outer(ds, mine[1], first_row, second, 0, value_dim);
        const auto their = [&](int what, int j) { return logs[(stage * 2 + what) * OTHERS + Product::column(j)]; };
        const int own_row = at.first + first_row;
        each<Product>(ds, [&](float& x, int i, int j) { x -= OF_KEYS ? their(1, j) : own_delta[i]; });
        if (bend.bent)
          bend.template apply<Product, OF_KEYS>(p, own_row, at.rows, from, at.columns,
                                             [&](int i, int j, float x) { ds[i][j] *= x; });
        if (own.cuts(from, from + OTHERS))
          each<Product>(p, [&](float& x, int i, int j) {
            if (!own.sees(own_row + Product::row(i), from + Product::column(j), at.columns)) x = NOTHING;
          });
        const float factor = bend.bent ? 1.0f : bend.factor;
        each<Product>(p, [&](float& x, int i, int j) {
          x = fast_exp2(fmaf(x, factor, OF_KEYS ? -their(0, j) : -own_log[i]) * (LOG2E / UNIT<T>));
          ds[i][j] *= x;
        });
        if constexpr (OF_KEYS) Product::mix(sums[1], p, second, 0, first_column, value_dim, scratch);
        Product::mix(sums[0], ds, first, 0, first_column, head_dim, scratch);
      }
      if (STAGES == 2) {
        stage = 1 - stage;
      } else if (more) {
        __syncthreads();  // all have done with their rows
        load_theirs(0, same ? head : head + 1, same ? from + OTHERS : start);
      }
    }
  }

  if (idle) return;
  float scale[Product::ROWS], one[Product::ROWS];
#pragma unroll
  for (int i = 0; i < Product::ROWS; ++i) scale[i] = a.scale, one[i] = 1.0f;
  const int count = at.rows - at.first - first_row;
  const int64_t where = row + first_row;
  if constexpr (OF_KEYS) {
    const Rows<T> dkey{static_cast<T*>(a.dkey) + batch * a.dkey_batch + group * a.dkey_head + where * a.dkey_token,
                       a.dkey_token, head_dim, call.wide_results};
    const Rows<T> dvalue{static_cast<T*>(a.dvalue) + batch * a.dvalue_batch + group * a.dvalue_head + where * a.dvalue_token,
                         a.dvalue_token, value_dim, call.wide_results};
    to_tile<Product>(mine[0], first_row, sums[0], scale, first_column);
    store_rows<Product::WARP_ROWS, D, Shape::WIDTH>(dkey, mine[0], first_row, count, first_column);
    to_tile<Product>(mine[1], first_row, sums[1], one, first_column);
    store_rows<Product::WARP_ROWS, D, Shape::WIDTH>(dvalue, mine[1], first_row, count, first_column);
  } else {
    const Rows<T> dquery{static_cast<T*>(a.dquery) + batch * a.dquery_batch + own_head * a.dquery_head + where * a.dquery_token,
                         a.dquery_token, head_dim, call.wide_results};
    to_tile<Product>(mine[0], first_row, sums[0], scale, first_column);
    store_rows<Product::WARP_ROWS, D, Shape::WIDTH>(dquery, mine[0], first_row, count, first_column);
  }
}

// Launchers

template <class Shape>
int run_backward(BackwardCall call) {
  blip3o_attention_backward_arguments& a = call.a;
  const int64_t rows = Shape::OF_KEYS ? a.keys : a.tokens, heads = a.batch * (Shape::OF_KEYS ? a.groups : a.heads);
  const int64_t tiles = tiles_of(rows, Shape::ROWS, a.cu_seqlens_q, a.sequences);
  if (!rows || !heads) return BLIP3O_OK;
  if (tiles > 0x7fffffff / heads / Shape::PARTS) return BLIP3O_BAD_ARGUMENT;
  call.tiles = static_cast<int>(tiles);
  const unsigned blocks = static_cast<unsigned>(tiles * heads * Shape::PARTS);
  return launch(attention_backward<Shape>, blocks, Shape::THREADS, Shape::SHARED, a.stream, call);
}

template <class T>
int run_delta(const BackwardCall& call) {
  const blip3o_attention_backward_arguments& a = call.a;
  constexpr int N = 16 / sizeof(T);
  const int64_t rows = a.batch * a.heads * a.tokens;
  if (!rows) return BLIP3O_OK;
  const unsigned blocks = static_cast<unsigned>((rows + 3) / 4);
  return launch(call.wide ? attention_delta<N, T> : attention_delta<1, T>, blocks, 4 * WARP, 0, a.stream, call);
}

}  // namespace blip3o
