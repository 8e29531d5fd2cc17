// The backward pass of attention on sm_90a; the contract is kernels/blip3o_kernels/ops/attention.py. With P the probabilities,
// dP = dy V^T and delta the sums over dims of dy y:
//     dS = P (dP - delta),   dV = P^T dy,   dK = scale dS^T Q,   dQ = scale dS K.
//
// One kernel owns keys and holds scores as [keys, queries], one owns queries and holds them as [queries, keys], so that every sum stays
// in the registers of one thread, weights go from one product to the next in registers, and nothing is added up through memory: P is
// computed twice, and the order of sums is fixed. A block is a producer and two consumers of 64 rows each, as in attention_hopper.cu.
// While a consumer's last weights are multiplied, its next scores are.
#include "attention_hopper.cuh"

namespace {

using namespace blip3o;
using namespace blip3o::hopper;

struct Backward {
  void* results[2];  // of keys: dkey, dvalue; of queries: dquery
  int64_t batch[2], head[2], token[2];
  const float* stats;  // [heads of all samples, 2, padded]: log2(e) log_sum and delta; of what is no query inf and 0
  int heads, sharing, tokens, padded;
  float factor, scale;
  Sight sight;
  Tiles tiles;
};

// OF_KEYS: the rows are keys, and OTHERS queries come at a time; otherwise the other way round.
template <class T_, int DIM_, bool OF_KEYS_>
struct Shape {
  using T = T_;
  static constexpr int DIM = DIM_, ROWS = 128, OTHERS = OF_KEYS_ ? 64 : 128, STAGES = OF_KEYS_ ? 3 : 2, THREADS = 384;
  static constexpr bool OF_KEYS = OF_KEYS_;
  static constexpr int ROW_PANEL = ROWS * PANEL * 2, OTHER_PANEL = OTHERS * PANEL * 2;
  static constexpr int ROW_BYTES = ROW_PANEL * (DIM / PANEL), OTHER_BYTES = OTHER_PANEL * (DIM / PANEL);
  static constexpr int STAT_BYTES = OF_KEYS ? OTHERS * 4 : 0;

  struct Barriers {
    uint64_t rows_full, rows_empty, full[STAGES], empty[STAGES];
  };
  static constexpr int BYTES = 2 * ROW_BYTES + 2 * STAGES * (OTHER_BYTES + STAT_BYTES) + static_cast<int>(sizeof(Barriers));
};

struct Maps {
  TensorMap rows[2], others[2];  // of keys: key, value and query, dy; of queries the other way round
};

#ifdef BLIP3O_HOPPER

// The block's shared memory; `which` is 0 or 1, as in Maps.
template <class S>
struct Memory {
  char* start = dynamic_shared();
  __device__ char* rows(int which) const { return start + which * S::ROW_BYTES; }
  __device__ char* others(int stage, int which) const { return start + 2 * S::ROW_BYTES + (2 * stage + which) * S::OTHER_BYTES; }
  __device__ char* stats(int stage, int which) const { return others(S::STAGES, 0) + (2 * stage + which) * S::STAT_BYTES; }
  __device__ typename S::Barriers& barriers() const { return *reinterpret_cast<typename S::Barriers*>(stats(S::STAGES, 0)); }
};

// The tiles of the others that a tile of rows meets: from `first` to before `limit`, for each of `heads` heads from `head` on.
struct Run {
  int first, limit, head, heads;
};
template <class S>
__device__ inline Run others_of(const Backward& a, int row, int head) {
  int first, limit, last;
  if (S::OF_KEYS) {
    last = row + S::ROWS < a.sight.keys ? row + S::ROWS : a.sight.keys;
    first = row - a.sight.ahead + 1 < 0 ? 0 : row - a.sight.ahead + 1;
    limit = last - a.sight.behind < a.tokens ? last - a.sight.behind : a.tokens;
  } else {
    last = row + S::ROWS < a.tokens ? row + S::ROWS : a.tokens;
    first = a.sight.first(row);
    limit = a.sight.limit(last - 1);
  }
  const int tiles = first < limit ? (limit + S::OTHERS - 1) / S::OTHERS : first / S::OTHERS;
  return {first / S::OTHERS, tiles, S::OF_KEYS ? head * a.sharing : head / a.sharing, S::OF_KEYS ? a.sharing : 1};
}

// The first keys are seen by the most queries, the last queries see the most keys: those come first.
template <class S>
__device__ inline int first_row(const Backward& a, const Tiles::Tile& tile) {
  return (S::OF_KEYS ? a.tiles.rows - 1 - tile.row : tile.row) * S::ROWS;
}

template <class S>
__device__ inline void copy_tiles(char* first, char* second, int panel, const TensorMap* maps, Barrier* full, int token, int head, int batch) {
#pragma unroll
  for (int i = 0; i < S::DIM / PANEL; ++i) {
    copy_panel(first + i * panel, maps, full, i * PANEL, token, head, batch);
    copy_panel(second + i * panel, maps + 1, full, i * PANEL, token, head, batch);
  }
}

// By one thread.
template <class S>
__device__ inline void produce(const Backward& a, const Memory<S>& memory, const Maps& maps) {
  auto& b = memory.barriers();
  Ring<S::STAGES> ring;
  Ring<1> rows;
  for (int turn = 0, n; (n = a.tiles.number(turn)) < a.tiles.count; ++turn) {
    const auto tile = a.tiles.tile(n);
    const int row = first_row<S>(a, tile);
    const Run run = others_of<S>(a, row, tile.head);
    if (run.first == run.limit) continue;
    wait(&b.rows_empty, rows.parity ^ 1);
    expect(&b.rows_full, 2 * S::ROW_BYTES);
    copy_tiles<S>(memory.rows(0), memory.rows(1), S::ROW_PANEL, maps.rows, &b.rows_full, row, tile.head, tile.batch);
    rows.next();
    for (int head = run.head; head < run.head + run.heads; ++head)
      for (int i = run.first; i < run.limit; ++i) {
        Barrier* full = b.full + ring.stage;
        wait(b.empty + ring.stage, ring.parity ^ 1);
        expect(full, 2 * (S::OTHER_BYTES + S::STAT_BYTES));
        copy_tiles<S>(memory.others(ring.stage, 0), memory.others(ring.stage, 1), S::OTHER_PANEL, maps.others, full, i * S::OTHERS, head,
                      tile.batch);
        if constexpr (S::OF_KEYS) {
          const float* stats = a.stats + (static_cast<int64_t>(tile.batch) * a.heads + head) * 2 * a.padded + i * S::OTHERS;
          copy_bytes(memory.stats(ring.stage, 0), stats, S::STAT_BYTES, full);
          copy_bytes(memory.stats(ring.stage, 1), stats + a.padded, S::STAT_BYTES, full);
        }
        ring.next();
      }
  }
}

// f(i, log_sum, delta) for the i-th of a thread's scores and what belongs to its query.
template <class S, class F>
__device__ inline void by_query(const Memory<S>& memory, int stage, const float (&stats)[2][2], F f) {
#pragma unroll
  for (int i = 0; i < S::OTHERS / 2; i += 4) {
    Floats<2> log_sum, delta;  // of queries that are columns
    if constexpr (S::OF_KEYS) {
      const int column = 2 * i + threadIdx.x % 4 * 2;
      log_sum = load<2>(reinterpret_cast<const float*>(memory.stats(stage, 0)) + column);
      delta = load<2>(reinterpret_cast<const float*>(memory.stats(stage, 1)) + column);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) f(i + k, S::OF_KEYS ? log_sum.v[k % 2] : stats[0][k / 2], S::OF_KEYS ? delta.v[k % 2] : stats[1][k / 2]);
  }
}

// By a warpgroup, the consumer of that number.
template <class S>
__device__ inline void consume(const Backward& a, const Memory<S>& memory, int consumer) {
  using T = typename S::T;
  auto& b = memory.barriers();
  const int lane = threadIdx.x % 32, row_of_tile = 64 * consumer + threadIdx.x % 128 / 32 * 16 + lane / 4;
  const uint32_t rows[2] = {shared_address(memory.rows(0)) + consumer * 64 * PANEL * 2,
                            shared_address(memory.rows(1)) + consumer * 64 * PANEL * 2};
  const auto release = [&](Barrier* empty) {
    __syncwarp();  // the whole warp has read
    if (lane == 0) arrive(empty);
  };
  Ring<S::STAGES> ring;
  unsigned parity = 0;  // of the rows' barrier
  for (int turn = 0, n; (n = a.tiles.number(turn)) < a.tiles.count; ++turn) {
    const auto tile = a.tiles.tile(n);
    const int start = first_row<S>(a, tile), row = start + row_of_tile;
    const Run run = others_of<S>(a, start, tile.head);
    float first_sums[S::DIM / 2], second_sums[S::OF_KEYS ? S::DIM / 2 : 2];
    float scores[S::OTHERS / 2], gradients[S::OTHERS / 2], stats[2][2] = {};
    uint32_t weights[S::OTHERS / 16][4], dweights[S::OTHERS / 16][4];
#pragma unroll
    for (int i = 0; i < S::DIM / 2; ++i) {
      first_sums[i] = 0;
      if constexpr (S::OF_KEYS) second_sums[i] = 0;
    }
    if (!S::OF_KEYS) {
      const float* its = a.stats + (static_cast<int64_t>(tile.batch) * a.heads + tile.head) * 2 * a.padded + row;
      stats[0][0] = its[0], stats[0][1] = its[8], stats[1][0] = its[a.padded], stats[1][1] = its[a.padded + 8];
    }
    const auto multiply_rows = [&](float (&sums)[S::OTHERS / 2], int which) {
      multiply_tiles<T, S::OTHERS, S::DIM>(sums, rows[which], S::ROW_PANEL, shared_address(memory.others(ring.stage, which)),
                                           S::OTHER_PANEL);
      commit_products();
    };
    const int steps = (run.limit - run.first) * run.heads;
    if (steps) {
      wait(&b.rows_full, parity);
      parity ^= 1;
    }
    int other = run.first;  // the tile
    Barrier* last = nullptr;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      wait(b.full + ring.stage, ring.parity);
      fence_products();
      multiply_rows(scores, 0);
      wait_products<1>();  // for the last step's sums
      if (step) release(last);
      fence_products();
      multiply_rows(gradients, 1);
      wait_products<1>();
      settle(scores);
      const int column = other * S::OTHERS + 2 * (lane % 4);  // the thread's first
      const int query = S::OF_KEYS ? other * S::OTHERS : start + 64 * consumer, key = S::OF_KEYS ? start + 64 * consumer : other * S::OTHERS;
      if (!a.sight.all(query, S::OF_KEYS ? S::OTHERS : 64, key, S::OF_KEYS ? 64 : S::OTHERS)) {
        if (S::OF_KEYS)
          hide<S::OTHERS>(scores, a.sight.seen_from(row) - column, a.sight.seen_from(row + 8) - column);
        else
          hide<S::OTHERS>(scores, a.sight.sees(row) - column, a.sight.sees(row + 8) - column);
      }
      by_query(memory, ring.stage, stats,
               [&](int i, float log_sum, float) { scores[i] = power_of_two(fmaf(scores[i], a.factor, -log_sum)); });
      if constexpr (S::OF_KEYS) pack<T, S::OTHERS>(weights, scores);
      settle(scores);
      hold(scores[0]);  // the wait is for what the exponentials hide behind
      wait_products<0>();
      settle(gradients);
      if (step == steps - 1) release(&b.rows_empty);
      by_query(memory, ring.stage, stats, [&](int i, float, float delta) { gradients[i] = scores[i] * (gradients[i] - delta); });
      pack<T, S::OTHERS>(dweights, gradients);
      fence_products();
      add_products<T, S::OTHERS, S::DIM>(first_sums, dweights, shared_address(memory.others(ring.stage, 0)));
      if constexpr (S::OF_KEYS) add_products<T, S::OTHERS, S::DIM>(second_sums, weights, shared_address(memory.others(ring.stage, 1)));
      commit_products();
      last = b.empty + ring.stage;
      ring.next();
      if (++other == run.limit) other = run.first;
    }
    wait_products<0>();
    if (steps) release(last);
    settle(first_sums);
    if constexpr (S::OF_KEYS) settle(second_sums);
    const int count = S::OF_KEYS ? a.sight.keys : a.tokens;
    const bool there[2] = {row < count, row + 8 < count};
#pragma unroll
    for (int which = 0; which < (S::OF_KEYS ? 2 : 1); ++which) {
      T* to = static_cast<T*>(a.results[which]) + tile.batch * a.batch[which] + tile.head * a.head[which] + row * a.token[which];
      const float factor = which ? 1.0f : a.scale;
      if (which == 0) {
        store_quad<T, S::DIM, 0>(to, first_sums, factor, there[0]);
        store_quad<T, S::DIM, 2>(to + 8 * a.token[which], first_sums, factor, there[1]);
      } else if constexpr (S::OF_KEYS) {
        store_quad<T, S::DIM, 0>(to, second_sums, factor, there[0]);
        store_quad<T, S::DIM, 2>(to + 8 * a.token[which], second_sums, factor, there[1]);
      }
    }
  }
}

#endif

template <class S>
__global__ void __launch_bounds__(S::THREADS, 1) gradients_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Backward a) {
#ifdef BLIP3O_HOPPER
  const Memory<S> memory;
  auto& b = memory.barriers();
  if (threadIdx.x == 0) {
    init(&b.rows_full, 1), init(&b.rows_empty, 8);  // a warp arrives by its first thread
    for (int i = 0; i < S::STAGES; ++i) init(b.full + i, 1), init(b.empty + i, 8);
    fence_barriers();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);  // of which the compiler sees that it is one
  if (warpgroup == 0) {
    give_registers<24>();
    if (threadIdx.x == 0) produce<S>(a, memory, maps);
  } else {
    take_registers<240>();
    consume<S>(a, memory, warpgroup - 1);
  }
#endif
}

// stats of DIM / 8 threads for each query, up to `padded` for each head.
template <class T, int DIM>
__global__ void __launch_bounds__(128) stats_kernel(blip3o_attention_backward_arguments a, unsigned padded) {
  constexpr unsigned THREADS = DIM / 8, ROWS = 128 / THREADS;
  const unsigned parts = padded / ROWS, token = blockIdx.x % parts * ROWS + threadIdx.x / THREADS, all_head = blockIdx.x / parts;
  const unsigned heads = static_cast<unsigned>(a.heads), batch = all_head / heads, head = all_head % heads, column = threadIdx.x % THREADS * 8;
  float delta = 0;
  if (token < a.tokens) {
    const Floats<8> dy = load<8>(static_cast<const T*>(a.dy) + batch * a.dy_batch + head * a.dy_head + token * a.dy_token + column);
    const Floats<8> y = load<8>(static_cast<const T*>(a.y) + batch * a.y_batch + head * a.y_head + token * a.y_token + column);
#pragma unroll
    for (int i = 0; i < 8; ++i) delta += dy.v[i] * y.v[i];
  }
#pragma unroll
  for (int lanes = THREADS / 2; lanes > 0; lanes /= 2) delta += __shfl_xor_sync(0xffffffffu, delta, lanes);
  if (column) return;
  float log_sum = INFINITY;  // every weight is 0
  if (token < a.tokens) log_sum = a.log_sum[all_head * a.log_sum_head + token] * LOG2_E;
  float* stats = a.workspace + static_cast<int64_t>(all_head) * 2 * padded + token;
  stats[0] = log_sum == -INFINITY ? INFINITY : log_sum;
  stats[padded] = delta;
}


template <class S>
int run(const blip3o_attention_backward_arguments& a, const Backward& f, const Maps& maps) {
  return launch(gradients_kernel<S>, std::min(f.tiles.count, multiprocessors()), S::THREADS, S::BYTES, a.stream, maps, f);
}

template <class T, int DIM>
int run(const blip3o_attention_backward_arguments& a) {
  using Keys = Shape<T, DIM, true>;
  using Queries = Shape<T, DIM, false>;
  const int64_t padded = (a.tokens + 127) / 128 * 128, key_rows = (a.keys + 127) / 128, query_rows = padded / 128;
  if (a.batch * a.heads * std::max({padded, key_rows, query_rows}) > 1 << 30) return BLIP3O_BAD_ARGUMENT;
  const auto describe_all = [&](Maps& maps, const int (&rows)[2], bool of_keys) {
    TensorMap *keys = of_keys ? maps.rows : maps.others, *queries = of_keys ? maps.others : maps.rows;
    return describe(keys, a.dtype, a.key, {a.batch, a.groups, a.keys, DIM}, {a.key_batch, a.key_head, a.key_token}, rows[0]) &&
           describe(keys + 1, a.dtype, a.value, {a.batch, a.groups, a.keys, DIM}, {a.value_batch, a.value_head, a.value_token}, rows[0]) &&
           describe(queries, a.dtype, a.query, {a.batch, a.heads, a.tokens, DIM}, {a.query_batch, a.query_head, a.query_token}, rows[1]) &&
           describe(queries + 1, a.dtype, a.dy, {a.batch, a.heads, a.tokens, DIM}, {a.dy_batch, a.dy_head, a.dy_token}, rows[1]);
  };
  Maps of_keys, of_queries;
  if (!describe_all(of_keys, {Keys::ROWS, Keys::OTHERS}, true) || !describe_all(of_queries, {Queries::OTHERS, Queries::ROWS}, false))
    return BLIP3O_BAD_ARGUMENT;

  const unsigned blocks = static_cast<unsigned>(a.batch * a.heads * padded * DIM / 1024);
  int status = launch(stats_kernel<T, DIM>, blocks, 128, 0, a.stream, a, static_cast<unsigned>(padded));
  if (status) return status;
  Backward f = {{a.dkey, a.dvalue}, {a.dkey_batch, a.dvalue_batch}, {a.dkey_head, a.dvalue_head}, {a.dkey_token, a.dvalue_token}};
  f.stats = a.workspace;
  f.heads = static_cast<int>(a.heads), f.sharing = static_cast<int>(a.heads / a.groups), f.tokens = static_cast<int>(a.tokens);
  f.padded = static_cast<int>(padded), f.factor = a.scale * LOG2_E, f.scale = a.scale;
  f.sight = sight_of(a);
  f.tiles = tiles_of(a.groups, a.batch * a.groups, key_rows, f.sharing * a.tokens * DIM * 4, 1);
  if ((status = run<Keys>(a, f, of_keys))) return status;
  f.results[0] = a.dquery, f.batch[0] = a.dquery_batch, f.head[0] = a.dquery_head, f.token[0] = a.dquery_token;
  f.tiles = tiles_of(a.heads, a.batch * a.heads, query_rows, a.keys * DIM * 4, f.sharing);
  return run<Queries>(a, f, of_queries);
}

template <class T>
int by_dim(const blip3o_attention_backward_arguments& a) {
  return a.head_dim == 64 ? run<T, 64>(a) : run<T, 128>(a);
}

int64_t workspace_floats(const blip3o_attention_backward_arguments& a) { return 2 * a.batch * a.heads * ((a.tokens + 127) / 128 * 128); }

}  // namespace

bool blip3o::fits_hopper(const blip3o_attention_backward_arguments& a) {
  const bool strides = divisible<8>(a.dquery_batch, a.dquery_head, a.dquery_token, a.dkey_batch, a.dkey_head, a.dkey_token, a.dvalue_batch,
                                    a.dvalue_head, a.dvalue_token, a.y_batch, a.y_head, a.y_token);
  return (a.head_dim == 64 || a.head_dim == 128) && a.softcap == 0.0f && strides && a.workspace_floats >= workspace_floats(a) && aligned(a.y) &&
         aligned(a.dquery, a.dkey, a.dvalue, a.workspace) && suits(a) &&
         walks(a.batch, a.heads, a.tokens, a.dy, a.dy_batch, a.dy_head, a.dy_token);
}

int blip3o::attention_hopper(const blip3o_attention_backward_arguments& a) {
  if (a.dtype == BLIP3O_FLOAT16) return by_dim<float16>(a);
  return a.dtype == BLIP3O_BFLOAT16 ? by_dim<bfloat16>(a) : BLIP3O_BAD_DTYPE;
}
