// What both directions of qk_norm_rope have in common: what a kernel is told, pairs of dims, and how rows are spread over threads.
//
// A row is what a norm runs over: one head, or all heads of a token. A thread takes N pairs of a row's dims at a time, and so both
// numbers that a rotation mixes. Heads take a few lanes of a warp each (THREADS 0), longer rows a block. Queries and keys are one
// launch: the first blocks do the queries.
#pragma once

#include "norm.cuh"

namespace blip3o {

struct Side {  // queries, or keys
  void* y;     // backwards dx; dense as [batch, tokens, heads, head_dim]
  const void *x, *dy, *weight, *bias;
  int64_t heads, x_batch, x_head, x_token, dy_batch, dy_head, dy_token;
  unsigned rows, blocks, each, left;  // backwards a block has `each` rows, and the first `left` one more
};

struct Job {
  Side query, key;
  const float *cos, *sin;
  float* workspace;  // backwards [blocks, 2, span]; null: no sums wanted
  int64_t tokens, head_dim, half, table_stride, span;
  float eps;
  int dtype, parameter_dtype, centred, across_width, interleaved;
  unsigned parts, lanes;  // of a head: N pairs each; of a row, if THREADS is 0
  void* stream;
};

template <int N>
struct Pairs {
  Floats<N> first, second;
};

// Where N pairs lie in a head: N dims from `first` on and N from `second` on.
struct Place {
  int64_t pair, first, second;
  bool turns, mixed, whole;  // whether they turn; whether a pair's dims are adjacent; whether there is a second one
};

template <int N>
__device__ inline Place place(const Job& a, unsigned part) {
  const int64_t pair = static_cast<int64_t>(part) * N, still = pair - a.half, rest = (a.head_dim - 2 * a.half + 1) / 2;
  const int64_t first = 2 * a.half + still, second = first + rest;  // of those that do not turn
  if (pair >= a.half) return {pair, first, second, false, false, second < a.head_dim};
  if (a.interleaved) return {pair, 2 * pair, 2 * pair + N, true, true, true};
  return {pair, pair, pair + a.half, true, false, true};
}

// What was loaded from `first` and `second` as pairs; and back.
template <int N>
__device__ inline Pairs<N> paired(const Floats<N>& a, const Floats<N>& b, bool mixed) {
  Pairs<N> pairs = {a, b};
  if (N > 1 && mixed) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      pairs.first.v[k] = 2 * k < N ? a.v[2 * k % N] : b.v[2 * k % N];
      pairs.second.v[k] = 2 * k < N ? a.v[(2 * k + 1) % N] : b.v[(2 * k + 1) % N];
    }
  }
  return pairs;
}

template <int N, class T>
__device__ inline Pairs<N> load_pairs(const T* x, const Place& at) {
  return paired(load<N>(x + at.first), at.whole ? load<N>(x + at.second) : Floats<N>{}, at.mixed);
}

template <int N, class T>
__device__ inline Pairs<N> load_parameters(const void* p, bool is_float, int64_t i, const Place& at) {
  if (is_float) return load_pairs<N>(static_cast<const float*>(p) + i, at);
  return load_pairs<N>(static_cast<const T*>(p) + i, at);
}

template <int N, class T>
__device__ inline void store_pairs(T* y, const Place& at, const Pairs<N>& pairs) {
  Floats<N> a = pairs.first, b = pairs.second;
  if (N > 1 && at.mixed) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const int other = k / 2 + N / 2;
      a.v[k] = k % 2 ? pairs.second.v[k / 2] : pairs.first.v[k / 2];
      b.v[k] = k % 2 ? pairs.second.v[other % N] : pairs.first.v[other % N];
    }
  }
  store<N>(y + at.first, a);
  if (at.whole) store<N>(y + at.second, b);
}

// cos and sin of the pairs, or what changes nothing.
template <int N>
__device__ inline Pairs<N> load_angles(const Job& a, int64_t angles, const Place& at) {
  Pairs<N> found = {};
  if (at.turns) found = {load<N>(a.cos + angles + at.pair), load<N>(a.sin + angles + at.pair)};
  return found;
}

template <int N>
__device__ inline Pairs<N> turned(const Pairs<N>& v, const Pairs<N>& angles, float sign, bool turns) {
  Pairs<N> y = v;
  if (turns) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float c = angles.first.v[k], s = angles.second.v[k] * sign;
      y.first.v[k] = v.first.v[k] * c - v.second.v[k] * s;
      y.second.v[k] = v.second.v[k] * c + v.first.v[k] * s;
    }
  }
  return y;
}

template <int THREADS>
constexpr int BLOCK = THREADS ? THREADS : 256;

// How the rows of a side are spread over a block: over all of it, or over `lanes` lanes each. HELD: an item, N pairs, a thread;
// otherwise any number.
template <int THREADS, int N, bool HELD>
struct Spread {
  const Job& a;
  unsigned heads, items, group, groups, lane;  // heads and items of a row; of the block's `groups` rows this thread is in `group`

  __device__ Spread(const Job& job, const Side& side) : a(job) {
    heads = job.across_width ? static_cast<unsigned>(side.heads) : 1;
    items = heads * job.parts;
    groups = THREADS ? 1 : BLOCK<THREADS> / job.lanes;
    group = THREADS ? 0 : threadIdx.x / job.lanes;
    lane = THREADS ? threadIdx.x : threadIdx.x % job.lanes;
  }

  // f(head, place) for each of this thread's items
  template <class F>
  __device__ void each(F f) const {
    if constexpr (HELD) {
      if (lane < items) f(head_of(lane), place<N>(a, THREADS ? lane % a.parts : lane));
    } else {
#pragma unroll 1
      for (unsigned item = threadIdx.x; item < items; item += THREADS) f(head_of(item), place<N>(a, item % a.parts));
    }
  }
  __device__ int64_t head_of(unsigned item) const { return THREADS ? item / a.parts : 0; }

  template <int COUNT>
  __device__ void sum(float (&x)[COUNT], float* scratch) const {
    if constexpr (THREADS == 0) {
      for (unsigned apart = a.lanes / 2; apart > 0; apart /= 2)
#pragma unroll
        for (int i = 0; i < COUNT; ++i) x[i] += __shfl_xor_sync(0xffffffffu, x[i], static_cast<int>(apart));
    } else {
      row_sums<THREADS>(x, scratch);
    }
  }
};

// Where a row begins in x, dy and y, and its angles.
struct Start {
  int64_t x, dy, y, angles;
};

__device__ inline Start start_of(const Job& a, const Side& side, unsigned row) {
  // 32 bits, as the launcher made sure: a division of 64 is a call.
  const unsigned heads = a.across_width ? 1 : static_cast<unsigned>(side.heads), tokens = static_cast<unsigned>(a.tokens);
  const unsigned position = row / heads;
  const int64_t head = row % heads, sample = position / tokens, token = position % tokens;
  return {sample * side.x_batch + token * side.x_token + head * side.x_head,
          sample * side.dy_batch + token * side.dy_token + head * side.dy_head,
          (static_cast<int64_t>(position) * side.heads + head) * a.head_dim, sample * a.table_stride + token * a.half};
}

// Launchers

// Whether every access may be one of 16 bytes.
template <int N>
bool is_wide(const Side& s) {
  return !s.rows || (divisible<N>(s.x_batch, s.x_head, s.x_token, s.dy_batch, s.dy_head, s.dy_token) &&
                     aligned(s.y, s.x, s.dy, s.weight, s.bias));
}
template <int N>
bool is_wide(const Job& a) {
  return divisible<N>(a.half, a.table_stride) && divisible<2 * N>(a.head_dim - 2 * a.half) && is_wide<N>(a.query) &&
         is_wide<N>(a.key) && aligned(a.cos, a.sin, a.workspace);
}

template <int THREADS_, int N_, bool HELD_>
struct SpreadShape {
  static constexpr int THREADS = THREADS_, N = N_;
  static constexpr bool HELD = HELD_;
};

// run(shape) with the shape for a job: rows of more than 384 items go pair by pair, as those do that are not aligned.
template <class T, class Run>
int by_shape(Job& a, Run run) {
  constexpr int N = 16 / sizeof(T);
  const int64_t rest = (a.head_dim - 2 * a.half + 1) / 2;
  const int64_t heads = a.across_width ? (a.query.heads > a.key.heads ? a.query.heads : a.key.heads) : 1;
  if (is_wide<N>(a)) {
    const int64_t parts = (a.half + rest) / N, items = heads * parts;
    a.parts = static_cast<unsigned>(parts);
    for (a.lanes = 1; a.lanes < parts && a.lanes < 32;) a.lanes *= 2;
    if (!a.across_width && parts <= 32) return run(SpreadShape<0, N, true>());
    if (items <= 128) return run(SpreadShape<128, N, true>());
    if (items <= 256) return run(SpreadShape<256, N, true>());
    if (items <= 384) return run(SpreadShape<384, N, true>());  // 512 threads would have too few registers
  }
  if (heads > 0x7fffffff / (a.half + rest)) return BLIP3O_BAD_ARGUMENT;
  a.parts = static_cast<unsigned>(a.half + rest);
  a.lanes = 1;
  return run(SpreadShape<128, 1, false>());
}

// The job of those arguments, but for what only one direction has.
template <class Arguments>
int prepare(const Arguments& a, Job& job) {
  if (a.head_dim < 1 || a.half < 0 || 2 * a.half > a.head_dim || a.batch < 0 || a.tokens < 0 || a.heads < 0 || a.groups < 0)
    return BLIP3O_BAD_ARGUMENT;
  const int64_t positions = a.tokens && a.batch > 0x7fffffff / a.tokens ? -1 : a.batch * a.tokens;
  if (positions < 0 || a.heads > 0x3fffffff || a.groups > 0x3fffffff) return BLIP3O_BAD_ARGUMENT;
  const auto rows = [&](int64_t heads) { return heads ? positions * (a.across_width ? 1 : heads) : 0; };
  if (rows(a.heads) + rows(a.groups) > 0x3fffffff) return BLIP3O_BAD_ARGUMENT;
  job.query.x = a.query, job.query.weight = a.query_weight, job.query.heads = a.heads;
  job.query.x_batch = a.query_batch, job.query.x_head = a.query_head, job.query.x_token = a.query_token;
  job.key.x = a.key, job.key.weight = a.key_weight, job.key.heads = a.groups;
  job.key.x_batch = a.key_batch, job.key.x_head = a.key_head, job.key.x_token = a.key_token;
  job.query.rows = static_cast<unsigned>(rows(a.heads)), job.key.rows = static_cast<unsigned>(rows(a.groups));
  job.cos = a.cos, job.sin = a.sin;
  job.tokens = a.tokens, job.head_dim = a.head_dim, job.half = a.half, job.table_stride = a.table_stride;
  job.span = a.head_dim * (a.across_width ? (a.heads > a.groups ? a.heads : a.groups) : 1);
  job.eps = a.eps, job.dtype = a.dtype, job.parameter_dtype = a.parameter_dtype;
  job.centred = a.centred, job.across_width = a.across_width, job.interleaved = a.interleaved;
  job.stream = a.stream;
  return is_parameter(a.parameter_dtype, a.dtype) ? BLIP3O_OK : BLIP3O_BAD_DTYPE;
}

}  // namespace blip3o
