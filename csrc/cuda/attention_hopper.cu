// The forward pass of attention on sm_90a; the contract is kernels/blip3o_kernels/ops/attention.py.
//
// A block is a producer and two or three warpgroups of consumers, each of which owns 64 queries. The producer has TMA bring the
// queries' tile and a ring of tiles of keys and of values, from the last keys a query sees to the first. A consumer computes the
// scores of the next keys while the tensor cores multiply the last weights with their values, and takes its exponentials while they
// do so for the other consumers: the turns are passed on through named barriers. Weights stay in registers. After Shah et al. 2024,
// arXiv:2407.08608. Blocks stay and take tile after tile; a new tile's queries and keys come while the last result is being stored.
#include "attention_hopper.cuh"

namespace {

using namespace blip3o;
using namespace blip3o::hopper;

struct Forward {
  void* y;
  float* log_sum;
  int64_t y_batch, y_head, y_token, log_sum_head, log_sum_token;
  int sharing, tokens;
  float factor, cap;  // of what is an exponent of 2; 0, or what bound() takes
  Sight sight;
  Tiles tiles;
};

// DIM dims, tiles of KEYS keys, CONSUMERS times 64 queries.
template <class T_, int DIM_, int KEYS_, int CONSUMERS_, int STAGES_>
struct Shape {
  using T = T_;
  static constexpr int DIM = DIM_, KEYS = KEYS_, CONSUMERS = CONSUMERS_, STAGES = STAGES_;
  static constexpr int QUERIES = 64 * CONSUMERS, THREADS = 128 * (CONSUMERS + 1);
  static constexpr int QUERY_PANEL = QUERIES * PANEL * 2, KEY_PANEL = KEYS * PANEL * 2;
  static constexpr int QUERY_BYTES = QUERY_PANEL * (DIM / PANEL), KEY_BYTES = KEY_PANEL * (DIM / PANEL);

  struct Barriers {
    uint64_t queries_full, queries_empty, keys_full[STAGES], keys_empty[STAGES], values_full[STAGES], values_empty[STAGES];
  };
  static constexpr int BYTES = QUERY_BYTES + 2 * STAGES * KEY_BYTES + static_cast<int>(sizeof(Barriers));
};

#ifdef BLIP3O_HOPPER

// The block's shared memory.
template <class S>
struct Memory {
  char* start = dynamic_shared();
  __device__ char* queries() const { return start; }
  __device__ char* keys(int stage) const { return start + S::QUERY_BYTES + stage * S::KEY_BYTES; }
  __device__ char* values(int stage) const { return keys(S::STAGES + stage); }
  __device__ typename S::Barriers& barriers() const {
    return *reinterpret_cast<typename S::Barriers*>(start + S::QUERY_BYTES + 2 * S::STAGES * S::KEY_BYTES);
  }
};

// The tiles of keys that the queries of a tile see: from `first` to before `limit`.
struct Run {
  int first, limit;
};
template <class S>
__device__ inline Run keys_of(const Forward& a, int query) {
  const int last = query + S::QUERIES < a.tokens ? query + S::QUERIES : a.tokens;
  const int first = a.sight.first(query), limit = a.sight.limit(last - 1);
  return {first / S::KEYS, first < limit ? (limit + S::KEYS - 1) / S::KEYS : first / S::KEYS};
}

template <class S>
__device__ inline void copy_tile(char* to, const TensorMap* map, Barrier* full, Barrier* empty, unsigned parity, int bytes, int panel,
                                 int token, int head, int batch) {
  wait(empty, parity ^ 1);
  expect(full, bytes);
#pragma unroll
  for (int i = 0; i < S::DIM / PANEL; ++i) copy_panel(to + i * panel, map, full, i * PANEL, token, head, batch);
}

// By one thread.
template <class S>
__device__ inline void produce(const Forward& a, const Memory<S>& memory, const TensorMap* query, const TensorMap* key,
                               const TensorMap* value) {
  auto& b = memory.barriers();
  Ring<S::STAGES> keys, values;
  Ring<1> queries;
  for (int turn = 0, n; (n = a.tiles.number(turn)) < a.tiles.count; ++turn) {
    const auto tile = a.tiles.tile(n);
    const int group = tile.head / a.sharing, first_query = tile.row * S::QUERIES;
    const Run run = keys_of<S>(a, first_query);
    const auto copy_keys = [&](int i) {
      copy_tile<S>(memory.keys(keys.stage), key, b.keys_full + keys.stage, b.keys_empty + keys.stage, keys.parity, S::KEY_BYTES,
                   S::KEY_PANEL, i * S::KEYS, group, tile.batch);
      keys.next();
    };
    const auto copy_values = [&](int i) {
      copy_tile<S>(memory.values(values.stage), value, b.values_full + values.stage, b.values_empty + values.stage, values.parity,
                   S::KEY_BYTES, S::KEY_PANEL, i * S::KEYS, group, tile.batch);
      values.next();
    };
    if (run.first == run.limit) continue;
    copy_keys(run.limit - 1);  // whose place is free before the queries' is
    copy_tile<S>(memory.queries(), query, &b.queries_full, &b.queries_empty, queries.parity, S::QUERY_BYTES, S::QUERY_PANEL, first_query,
                 tile.head, tile.batch);
    queries.next();
    for (int i = run.limit - 2; i >= run.first; --i) {
      copy_keys(i);
      copy_values(i + 1);
    }
    copy_values(run.first);
  }
}

// Of a thread's two rows: the largest score so far, and the thread's part of the sum of 2^(factor (score - largest)).
struct Running {
  float most[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
};

// scores -> 2^(factor (score - largest so far)); kept: by what is to be multiplied what came of the earlier ones.
template <int N>
__device__ inline void exponentials(float (&scores)[N / 2], Running& running, float (&kept)[2], float factor) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float most[2] = {scores[2 * row], scores[2 * row + 1]};  // two chains
#pragma unroll
    for (int i = 4; i < N / 2; i += 4) {
      most[0] = fmaxf(most[0], scores[i + 2 * row]);
      most[1] = fmaxf(most[1], scores[i + 2 * row + 1]);
    }
    float largest = fmaxf(running.most[row], fmaxf(most[0], most[1]));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
    // Rounded once for the whole row: what it is off by cancels when the row is divided by its sum.
    const float shift = largest == -INFINITY ? 0.0f : __fmul_rn(largest, factor);
    kept[row] = power_of_two(__fmul_rn(running.most[row], factor) - shift);
    running.most[row] = largest;
    float sum[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < N / 2; i += 4) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        float& score = scores[i + 2 * row + k];
        score = power_of_two(fmaf(score, factor, -shift));
        sum[k] += score;
      }
    }
    running.sum[row] = fmaf(running.sum[row], kept[row], sum[0] + sum[1]);
  }
}

template <class S>
__device__ inline void store_result(const Forward& a, float (&mixed)[S::DIM / 2], const Running& running, int batch, int head, int query) {
  using T = typename S::T;
  const bool there[2] = {query < a.tokens, query + 8 < a.tokens};
  T* y = static_cast<T*>(a.y) + batch * a.y_batch + head * a.y_head + query * a.y_token;
  float factor[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float sum = running.sum[row];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    const bool nothing = a.sight.first(query + 8 * row) >= a.sight.limit(query + 8 * row);
    factor[row] = nothing ? 0.0f : 1.0f / sum;  // seen, but all -inf: 0 / 0
    if (a.log_sum && there[row] && threadIdx.x % 4 == 0) {
      const int64_t place = (static_cast<int64_t>(batch) * a.tiles.heads + head) * a.log_sum_head + (query + 8 * row) * a.log_sum_token;
      a.log_sum[place] = nothing ? -INFINITY : running.most[row] * a.factor * LN_2 + logf(sum);
    }
  }
  store_quad<T, S::DIM, 0>(y, mixed, factor[0], there[0]);
  store_quad<T, S::DIM, 2>(y + 8 * a.y_token, mixed, factor[1], there[1]);
}

// By a warpgroup, the consumer of that number.
template <class S>
__device__ inline void consume(const Forward& a, const Memory<S>& memory, int consumer) {
  using T = typename S::T;
  constexpr bool TURNS = S::DIM <= 128;  // of 256 dims the products take so long that exponentials hide anyway
  auto& b = memory.barriers();
  const int lane = threadIdx.x % 32, next = consumer + 1 < S::CONSUMERS ? consumer + 1 : 0;
  const int row = 64 * consumer + threadIdx.x % 128 / 32 * 16 + lane / 4;
  const uint32_t queries = shared_address(memory.queries()) + consumer * 64 * PANEL * 2;
  const auto release = [&](Barrier* empty) {
    if (lane == 0) arrive(empty);
  };
  if (TURNS && consumer == 0) arrive_named(1, 256);  // the first turn is its own
  Ring<S::STAGES> keys, values;
  unsigned parity = 0;  // of the queries' barrier
  for (int turn = 0, n; (n = a.tiles.number(turn)) < a.tiles.count; ++turn) {
    const auto tile = a.tiles.tile(n);
    const int query = tile.row * S::QUERIES + row;
    const Run run = keys_of<S>(a, tile.row * S::QUERIES);
    float mixed[S::DIM / 2], scores[S::KEYS / 2], kept[2];
    uint32_t weights[S::KEYS / 16][4];
    Running running;
#pragma unroll
    for (int i = 0; i < S::DIM / 2; ++i) mixed[i] = 0;

    const auto multiply_scores = [&] {
      multiply_tiles<T, S::KEYS, S::DIM>(scores, queries, S::QUERY_PANEL, shared_address(memory.keys(keys.stage)), S::KEY_PANEL);
      commit_products();
    };
    const auto add_values = [&] {
#pragma unroll
      for (int k = 0; k < S::DIM / 2; ++k) mixed[k] *= kept[k / 2 % 2];
      wait(b.values_full + values.stage, values.parity);
      fence_products();
      add_products<T, S::KEYS, S::DIM>(mixed, weights, shared_address(memory.values(values.stage)));
      commit_products();
    };
    const auto weigh = [&](int i) {
      const int column = i * S::KEYS + 2 * (lane % 4);  // the thread's first
      if (a.cap != 0.0f) bound(scores, a.cap);
      if (!a.sight.all(tile.row * S::QUERIES + 64 * consumer, 64, i * S::KEYS, S::KEYS))
        hide<S::KEYS>(scores, a.sight.sees(query) - column, a.sight.sees(query + 8) - column);
      exponentials<S::KEYS>(scores, running, kept, a.factor);
    };

    if (run.first < run.limit) {
      wait(&b.queries_full, parity);
      parity ^= 1;
      wait(b.keys_full + keys.stage, keys.parity);
      fence_products();
      multiply_scores();
      wait_products<0>();
      settle(scores);
      release(b.keys_empty + keys.stage);
      keys.next();
      if (run.limit - run.first == 1) release(&b.queries_empty);
      weigh(run.limit - 1);
      pack<T, S::KEYS>(weights, scores);
#pragma unroll 1
      for (int i = run.limit - 2; i >= run.first; --i) {
        wait(b.keys_full + keys.stage, keys.parity);
        if (TURNS) sync_named(1 + consumer, 256);
        fence_products();
        multiply_scores();
        add_values();
        if (TURNS) arrive_named(1 + next, 256);
        wait_products<1>();
        settle(scores);
        release(b.keys_empty + keys.stage);
        keys.next();
        if (i == run.first) release(&b.queries_empty);
        weigh(i);
        settle(scores);
        hold(running.sum[0] + running.sum[1]);  // the wait is for what the exponentials hide behind
        wait_products<0>();
        settle(mixed);
        release(b.values_empty + values.stage);
        values.next();
        pack<T, S::KEYS>(weights, scores);
      }
      add_values();
      wait_products<0>();
      settle(mixed);
      release(b.values_empty + values.stage);
      values.next();
    }
    store_result<S>(a, mixed, running, tile.batch, tile.head, query);
  }
}

#endif

template <class S>
__global__ void __launch_bounds__(S::THREADS, 1)
    forward_kernel(const __grid_constant__ TensorMap query, const __grid_constant__ TensorMap key, const __grid_constant__ TensorMap value,
                   const __grid_constant__ Forward a) {
#ifdef BLIP3O_HOPPER
  const Memory<S> memory;
  auto& b = memory.barriers();
  if (threadIdx.x == 0) {
    init(&b.queries_full, 1);
    init(&b.queries_empty, 4 * S::CONSUMERS);  // a warp arrives by its first thread
    for (int i = 0; i < S::STAGES; ++i) {
      init(b.keys_full + i, 1), init(b.values_full + i, 1);
      init(b.keys_empty + i, 4 * S::CONSUMERS), init(b.values_empty + i, 4 * S::CONSUMERS);
    }
    fence_barriers();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);  // of which the compiler sees that it is one
  if (warpgroup == 0) {  // 65536 registers in all, of which a producer needs few
    give_registers<S::CONSUMERS == 3 ? 32 : 24>();
    if (threadIdx.x == 0) produce<S>(a, memory, &query, &key, &value);
  } else {
    take_registers<S::CONSUMERS == 3 ? 160 : 240>();
    consume<S>(a, memory, warpgroup - 1);
  }
#endif
}

// Launchers

template <class S>
int run(const blip3o_attention_arguments& a) {
  const int64_t sharing = a.heads / a.groups, rows = (a.tokens + S::QUERIES - 1) / S::QUERIES, all_heads = a.batch * a.heads;
  if (rows * all_heads > 1 << 30) return BLIP3O_BAD_ARGUMENT;
  TensorMap query, key, value;
  if (!describe(&query, a.dtype, a.query, {a.batch, a.heads, a.tokens, S::DIM}, {a.query_batch, a.query_head, a.query_token}, S::QUERIES) ||
      !describe(&key, a.dtype, a.key, {a.batch, a.groups, a.keys, S::DIM}, {a.key_batch, a.key_head, a.key_token}, S::KEYS) ||
      !describe(&value, a.dtype, a.value, {a.batch, a.groups, a.keys, S::DIM}, {a.value_batch, a.value_head, a.value_token}, S::KEYS))
    return BLIP3O_BAD_ARGUMENT;
  Forward f = {a.y, a.log_sum, a.y_batch, a.y_head, a.y_token, a.log_sum_head, a.log_sum_token};
  f.sharing = static_cast<int>(sharing), f.tokens = static_cast<int>(a.tokens);
  f.factor = (a.softcap != 0.0f ? a.softcap : a.scale) * LOG2_E;
  f.cap = a.softcap != 0.0f ? a.scale / a.softcap * 2 * LOG2_E : 0.0f;
  f.sight = sight_of(a);
  f.tiles = tiles_of(a.heads, all_heads, rows, a.keys * S::DIM * 4, sharing);
  return launch(forward_kernel<S>, std::min(f.tiles.count, multiprocessors()), S::THREADS, S::BYTES, a.stream, query, key, value, f);
}

template <class T>
int by_shape(const blip3o_attention_arguments& a) {
  if (a.head_dim == 64) return run<Shape<T, 64, 128, 3, 4>>(a);
  if (a.head_dim == 256) return run<Shape<T, 256, 80, 2, 2>>(a);
  // Larger tiles of keys, and less is recomputed; at the edges of what is seen more of a tile is for nothing.
  const bool edges = a.left >= 0 || a.right >= 0 || a.keys <= 128;
  return edges ? run<Shape<T, 128, 128, 2, 2>>(a) : run<Shape<T, 128, 176, 2, 2>>(a);
}

}  // namespace

bool blip3o::fits_hopper(const blip3o_attention_arguments& a) {
  // Without a softcap the largest product is the largest score only if the scale is positive.
  const bool scale = a.softcap != 0.0f || (a.scale > 0.0f && a.scale < 1e30f);
  return (a.head_dim == 64 || a.head_dim == 128 || a.head_dim == 256) && scale && divisible<8>(a.y_batch, a.y_head, a.y_token) &&
         aligned(a.y) && suits(a);
}

int blip3o::attention_hopper(const blip3o_attention_arguments& a) {
  if (a.dtype == BLIP3O_FLOAT16) return by_shape<float16>(a);
  return a.dtype == BLIP3O_BFLOAT16 ? by_shape<bfloat16>(a) : BLIP3O_BAD_DTYPE;
}
