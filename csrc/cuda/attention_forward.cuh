// The forward kernels of attention. A block has a tile of queries and goes through the keys they see, tile by tile, under a running
// softmax: y = sum of 2^(score - largest) value / sum of 2^(score - largest). Values are on their way while scores are computed, and
// the next keys while values are weighted. Source: Dao 2023, arXiv:2307.08691; the split of the keys: Dao et al. 2023, Flash-Decoding.
//
// Of few queries, KEY_WARPS warps share the keys of a tile, each with a softmax of its own, and `parts` blocks share all keys; what
// they find is added up in order, so results depend on the shape alone.
#pragma once

#include "attention_products.cuh"

namespace blip3o {

struct ForwardCall {
  blip3o_attention_arguments a;
  int tiles, parts, left, right;
  bool wide, wide_y;
};

template <class Product_, int ROW_WARPS_, int KEY_WARPS_, int KEYS_>
struct ForwardShape {
  using Product = Product_;
  using T = typename Product::T;
  static constexpr int ROW_WARPS = ROW_WARPS_, KEY_WARPS = KEY_WARPS_, KEYS = KEYS_, D = Product::D;
  static constexpr int THREADS = WARP * ROW_WARPS * KEY_WARPS, ROWS = ROW_WARPS * Product::WARP_ROWS;
  static constexpr int BLOCKS = KEY_WARPS > 1 && D <= 128 ? 3 : 1;  // at once; without a number registers are spilled for more of them
  static constexpr int SCRATCH = Product::SCRATCH * KEYS / KEY_WARPS;  // floats, of a warp
  static constexpr int SHARED = (ROWS + 2 * KEYS) * D * static_cast<int>(sizeof(T)) + SCRATCH * THREADS / WARP * 4;
  static_assert(SHARED <= 99 << 10, "");
  // Where key warps add up what they found: in the place of the tiles.
  static_assert(KEY_WARPS == 1 || KEY_WARPS * ROWS * 4 <= 2 * KEYS * static_cast<int>(sizeof(T)), "");
};

// Of a row of scores, as the threads of a warp hold it.
template <int ROWS>
struct Softmax {
  float top[ROWS], total[ROWS];  // the largest so far in all threads of the row, and each thread's own part of the sum
  float factor, natural;         // a score times these is in units of log 2, and in natural ones
};

// The natural logarithm of a row's sum of exponentials.
template <int ROWS>
__device__ inline float log_sum_exp(const Softmax<ROWS>& softmax, float top, float total) {
  return total == 0.0f ? NOTHING : fmaf(top, softmax.natural, logf(total));
}

// Scores -> 2^(score - largest so far); o and the sums, which are of earlier columns, are made to fit.
template <class Product, int C, int W>
__device__ inline void exponentials(Softmax<Product::ROWS>& softmax, float (&s)[Product::ROWS][C], float (&o)[Product::ROWS][W]) {
  constexpr bool FLOAT32 = sizeof(typename Product::T) == 4;  // differences first: there the rounding of products counts
  const float factor = softmax.factor;
#pragma unroll
  for (int i = 0; i < Product::ROWS; ++i) {
    float largest = s[i][0];
#pragma unroll
    for (int j = 1; j < C; ++j) largest = fmaxf(largest, s[i][j]);
    const float top = fmaxf(softmax.top[i], row_largest<Product>(largest));
    const float shift = top == NOTHING ? 0.0f : top;  // nothing seen so far: all exponentials are 0
    const float kept = fast_exp2((softmax.top[i] - shift) * factor);
    float sum = 0;
#pragma unroll
    for (int j = 0; j < C; ++j) {
      s[i][j] = fast_exp2(FLOAT32 ? (s[i][j] - shift) * factor : fmaf(s[i][j], factor, -shift * factor));
      sum += s[i][j];
    }
    softmax.top[i] = top;
    softmax.total[i] = softmax.total[i] * kept + sum;
#pragma unroll
    for (int j = 0; j < W; ++j) o[i][j] *= kept;
  }
}

// What KEY_WARPS warps found of the same rows, added up: to y, or as one part of several to the workspace.
template <class Shape, int W>
__device__ inline void add_up(const ForwardCall& call, const Place& at, const Softmax<Shape::Product::ROWS>& softmax,
                              const float (&o)[Shape::Product::ROWS][W], typename Shape::T* y, float* log_sum, int64_t part_row) {
  using Product = typename Shape::Product;
  using T = typename Shape::T;
  constexpr int ROWS = Shape::ROWS, KEY_WARPS = Shape::KEY_WARPS, D = Shape::D, THREADS = Shape::THREADS;
  const blip3o_attention_arguments& a = call.a;
  const int warp = threadIdx.x / WARP, key_warp = warp % KEY_WARPS, first = warp / KEY_WARPS * Product::WARP_ROWS;
  float* tops = reinterpret_cast<float*>(dynamic_shared());           // [KEY_WARPS, ROWS], in the place of the queries
  float* totals = tops + KEY_WARPS * ROWS;                            // [KEY_WARPS, ROWS]
  float* sums = tops + ROWS * D * static_cast<int>(sizeof(T)) / 4;    // [KEY_WARPS, ROWS, D], in that of keys and values
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Product::ROWS; ++i) {
    const int place = key_warp * ROWS + first + Product::row(i);
    const float total = row_sum<Product>(softmax.total[i]);
    if (threadIdx.x % Product::LANES == 0) tops[place] = softmax.top[i], totals[place] = total;
#pragma unroll
    for (int j = 0; j < W; ++j) sums[place * D + Product::wide_column(j)] = o[i][j];
  }
  __syncthreads();
#pragma unroll 1
  for (int item = threadIdx.x; item < ROWS * D; item += THREADS) {
    const int row = item / D, column = item % D;
    if (at.first + row >= at.rows) break;
    float top = tops[row], total = 0, sum = 0;
#pragma unroll
    for (int i = 1; i < KEY_WARPS; ++i) top = fmaxf(top, tops[i * ROWS + row]);
    const float shift = top == NOTHING ? 0.0f : top;
#pragma unroll
    for (int i = 0; i < KEY_WARPS; ++i) {
      const float weight = fast_exp2((tops[i * ROWS + row] - shift) * softmax.factor);
      total += weight * totals[i * ROWS + row];
      sum += weight * sums[(i * ROWS + row) * D + column];
    }
    sum = total == 0.0f ? 0.0f : sum / total;
    const float log = log_sum_exp(softmax, top, total);
    if (call.parts > 1) {
      if (column < a.value_dim) a.workspace[(part_row + row) * a.value_dim + column] = sum;
      if (column == 0) a.workspace[call.parts * a.batch * a.heads * a.tokens * a.value_dim + part_row + row] = log;
    } else {
      if (column < a.value_dim) y[row * a.y_token + column] = from_float<T>(sum);
      if (column == 0 && log_sum) log_sum[row * a.log_sum_token] = log;
    }
  }
}

template <class Shape>
__global__ void __launch_bounds__(Shape::THREADS, Shape::BLOCKS) attention_forward(ForwardCall call) {
  using Product = typename Shape::Product;
  using T = typename Shape::T;
  constexpr int ROWS = Shape::ROWS, KEYS = Shape::KEYS, D = Shape::D, THREADS = Shape::THREADS;
  constexpr int OWN_KEYS = KEYS / Shape::KEY_WARPS;  // of a warp
  const blip3o_attention_arguments& a = call.a;
  T *query_tile = reinterpret_cast<T*>(dynamic_shared()), *key_tile = query_tile + ROWS * D, *value_tile = key_tile + KEYS * D;
  const int warp = threadIdx.x / WARP, first_row = warp / Shape::KEY_WARPS * Product::WARP_ROWS;
  const int first_key = warp % Shape::KEY_WARPS * OWN_KEYS;
  float* scratch = reinterpret_cast<float*>(value_tile + KEYS * D) + warp * Shape::SCRATCH;

  // 32 bits, as the launcher made sure: a division of 64 is a call.
  const unsigned heads = static_cast<unsigned>(a.heads), tiles = static_cast<unsigned>(call.tiles);
  const unsigned parts = static_cast<unsigned>(call.parts), part = blockIdx.x % parts, number = blockIdx.x / parts;
  const unsigned tile = call.right < FAR ? tiles - 1 - number % tiles : number % tiles;  // what sees most comes first
  const int64_t head = number / tiles % heads, batch = number / tiles / heads;
  const int64_t group = static_cast<unsigned>(head) / (heads / static_cast<unsigned>(a.groups));
  const Place at = place_of<ROWS>(tile, a.cu_seqlens_q, a.cu_seqlens_k, a.sequences, a.tokens, a.keys);
  if (at.first >= at.rows) return;
  const int64_t row = at.row + at.first;
  const Rows<const T> query{static_cast<const T*>(a.query) + batch * a.query_batch + head * a.query_head + row * a.query_token,
                            a.query_token, static_cast<int>(a.head_dim), call.wide};
  const Rows<const T> key{static_cast<const T*>(a.key) + batch * a.key_batch + group * a.key_head + at.column * a.key_token,
                          a.key_token, static_cast<int>(a.head_dim), call.wide};
  const Rows<const T> value{static_cast<const T*>(a.value) + batch * a.value_batch + group * a.value_head + at.column * a.value_token,
                            a.value_token, static_cast<int>(a.value_dim), call.wide};
  const Bend bend(a, batch, head, UNIT<T>);

  const Span span(at, at.first, ROWS, call.left, call.right);
  const Span own(at, at.first + first_row, Product::WARP_ROWS, call.left, call.right);
  const bool idle = at.first + first_row >= at.rows;  // no row of this warp exists
  const int start = span.start / KEYS * KEYS, steps = (max(span.stop - start, 0) + KEYS - 1) / KEYS;
  const int from = start + steps * part / parts * KEYS, to = start + steps * (part + 1) / parts * KEYS;

  Softmax<Product::ROWS> softmax;
  softmax.factor = bend.bent ? LOG2E / UNIT<T> : a.scale * LOG2E;
  softmax.natural = !bend.bent ? a.scale : UNIT<T> == 1.0f ? 1.0f : LN2;
  float o[Product::ROWS][D / Product::LANES] = {};
#pragma unroll
  for (int i = 0; i < Product::ROWS; ++i) softmax.top[i] = NOTHING, softmax.total[i] = 0.0f;

  if (from < to) {
    load_tile<ROWS, D, THREADS>(query_tile, query, 0, at.rows - at.first);
    load_tile<KEYS, D, THREADS>(key_tile, key, from, at.columns);
    cp_async_commit();
  }
#pragma unroll 1
  for (int s = from; s < to; s += KEYS) {
    cp_async_wait<0>();
    __syncthreads();  // keys are there; all have done with the values
    load_tile<KEYS, D, THREADS>(value_tile, value, s, at.columns);
    cp_async_commit();
    const int first = s + first_key;
    const bool active = !idle && own.meets(first, first + OWN_KEYS);
    float scores[Product::ROWS][OWN_KEYS / Product::LANES] = {};
    if (active) {
      Product::outer(scores, query_tile, first_row, key_tile, first_key, query.width);
      const int own_row = at.first + first_row;
      if (bend.bent) bend.template apply<Product, false>(scores, own_row, at.rows, first, at.columns, [](int, int, float) {});
      if (own.cuts(first, first + OWN_KEYS))
        each<Product>(scores, [&](float& x, int i, int j) {
          if (!own.sees(own_row + Product::row(i), first + Product::column(j), at.columns)) x = NOTHING;
        });
      exponentials<Product>(softmax, scores, o);
    }
    cp_async_wait<0>();
    __syncthreads();  // values are there; all have done with the keys
    if (s + KEYS < to) {
      load_tile<KEYS, D, THREADS>(key_tile, key, s + KEYS, at.columns);
      cp_async_commit();
    }
    if (active) Product::mix(o, scores, value_tile, first_key, 0, value.width, scratch);
  }

  T* y = static_cast<T*>(a.y) + batch * a.y_batch + head * a.y_head + row * a.y_token;
  float* log_sum = a.log_sum ? a.log_sum + (batch * a.heads + head) * a.log_sum_head + row * a.log_sum_token : nullptr;
  if constexpr (Shape::KEY_WARPS > 1) {
    add_up<Shape>(call, at, softmax, o, y, log_sum, ((part * a.batch + batch) * a.heads + head) * a.tokens + row);
  } else {
    if (idle) return;
    float scale[Product::ROWS];
#pragma unroll
    for (int i = 0; i < Product::ROWS; ++i) {
      const float total = row_sum<Product>(softmax.total[i]);
      const int its = first_row + Product::row(i);
      scale[i] = total == 0.0f ? 0.0f : 1.0f / total;
      if (log_sum && threadIdx.x % Product::LANES == 0 && at.first + its < at.rows)
        log_sum[its * a.log_sum_token] = log_sum_exp(softmax, softmax.top[i], total);
    }
    to_tile<Product>(query_tile, first_row, o, scale, 0);
    const Rows<T> to{y + first_row * a.y_token, a.y_token, static_cast<int>(a.value_dim), call.wide_y};
    store_rows<Product::WARP_ROWS, D, D>(to, query_tile, first_row, at.rows - at.first - first_row, 0);
  }
}

constexpr int COMBINED = 16;  // rows of a block

// What the parts of the keys gave of a row, weighted by their share of its exponentials, in order. A warp a row.
template <class T>
__global__ void __launch_bounds__(COMBINED* WARP) attention_combine(ForwardCall call) {
  const blip3o_attention_arguments& a = call.a;
  const unsigned number = blockIdx.x * COMBINED + threadIdx.x / WARP;
  const int64_t rows = a.batch * a.heads * a.tokens;
  if (number >= rows) return;
  const Row at(a, number);
  const float* sums = a.workspace + call.parts * rows * a.value_dim + number;
  float top = NOTHING, total = 0;
#pragma unroll 1
  for (int part = 0; part < call.parts; ++part) top = fmaxf(top, sums[part * rows]);
  const float shift = top == NOTHING ? 0.0f : top;
#pragma unroll 1
  for (int part = 0; part < call.parts; ++part) total += fast_exp2((sums[part * rows] - shift) * LOG2E);
  T* y = static_cast<T*>(a.y) + at.batch * a.y_batch + at.head * a.y_head + at.token * a.y_token;
#pragma unroll 1
  for (int column = threadIdx.x % WARP; column < a.value_dim; column += WARP) {
    float sum = 0;
#pragma unroll 1
    for (int part = 0; part < call.parts; ++part)
      sum += fast_exp2((sums[part * rows] - shift) * LOG2E) * a.workspace[(part * rows + number) * a.value_dim + column];
    y[column] = from_float<T>(total == 0.0f ? 0.0f : sum / total);
  }
  if (a.log_sum && threadIdx.x % WARP == 0)
    a.log_sum[(at.batch * a.heads + at.head) * a.log_sum_head + at.token * a.log_sum_token] = total == 0.0f ? NOTHING : top + logf(total);
}

// Launchers

template <class Shape>
int run_forward(ForwardCall call) {
  blip3o_attention_arguments& a = call.a;
  const int64_t tiles = tiles_of(a.tokens, Shape::ROWS, a.cu_seqlens_q, a.sequences);
  const int64_t heads = a.batch * a.heads;
  if (tiles > 0x7fffffff / heads / call.parts) return BLIP3O_BAD_ARGUMENT;
  call.tiles = static_cast<int>(tiles);
  const unsigned blocks = static_cast<unsigned>(tiles * heads * call.parts), rows = static_cast<unsigned>(heads * a.tokens);
  const int status = launch(attention_forward<Shape>, blocks, Shape::THREADS, Shape::SHARED, a.stream, call);
  if (status || call.parts == 1) return status;
  return launch(attention_combine<typename Shape::T>, (rows + COMBINED - 1) / COMBINED, COMBINED * WARP, 0, a.stream, call);
}

}  // namespace blip3o
