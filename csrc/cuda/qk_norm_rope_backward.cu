// The backward pass of qk_norm_rope on a GPU. 1/std and mean are found again from x, which is read anyway. A block owns a run of
// rows and leaves its sums for the parameters' gradients in the workspace, sum_blocks adds the runs up in order: no atomics.
#include "qk_norm_rope.cuh"

namespace {

using namespace blip3o;

// With n = (x - mean) * rstd, d = dy turned back and u = d * weight:
//   dx = rstd * (u - mean(u) - n * mean(u * n))       mean(u) only if centred
//   the weight's gradient is the sum of d * n over all rows, the bias's that of d.
template <int THREADS, int N, bool HELD, class T>
__global__ void __launch_bounds__(BLOCK<THREADS>, 512 / BLOCK<THREADS>) backward_kernel(Job a) {
  __shared__ float scratch[3][2 * (BLOCK<THREADS> / 32)];
  const bool is_key = blockIdx.x >= a.query.blocks, is_float = a.parameter_dtype == BLIP3O_FLOAT32;
  const Side side = is_key ? a.key : a.query;
  const unsigned block = is_key ? blockIdx.x - a.query.blocks : blockIdx.x;
  Spread<THREADS, N, HELD> spread(a, side);
  constexpr unsigned ALL_THREADS = BLOCK<THREADS>;
  const unsigned items = spread.items, first = block * side.each + (block < side.left ? block : side.left);
  const unsigned last = first + side.each + (block < side.left);
  const float count = static_cast<float>(spread.heads * a.head_dim);
  float* partial = a.workspace ? a.workspace + static_cast<int64_t>(blockIdx.x) * 2 * a.span : nullptr;

  Pairs<N> scaled = {}, plain = {};
  const auto keep = [&](int64_t head, const Place& at) {
    store_pairs<N>(partial + head * a.head_dim, at, scaled);
    store_pairs<N>(partial + a.span + head * a.head_dim, at, plain);
  };
  if (!HELD && partial) spread.each(keep);

  // All lanes of a warp go on as long as one has a row: they take part in its sums.
  for (unsigned rows = first; rows < last; rows += spread.groups) {
    const unsigned row = rows + spread.group;
    if (row >= last) spread.items = 0;
    const Start start = start_of(a, side, row);
    const T *x = static_cast<const T*>(side.x) + start.x, *dy = static_cast<const T*>(side.dy) + start.dy;
    T* dx = static_cast<T*>(side.y) + start.y;
    Pairs<N> held_x, held_d;
    const auto load_d = [&](int64_t head, const Place& at) {
      const Pairs<N> d = load_pairs<N>(dy + head * side.dy_head, at);
      return turned(d, load_angles<N>(a, start.angles, at), -1.0f, at.turns);
    };
    if constexpr (HELD)
      spread.each([&](int64_t head, const Place& at) {
        held_x = load_pairs<N>(x + head * side.x_head, at);
        held_d = load_d(head, at);
      });
    const auto value = [&](int64_t head, const Place& at) {
      if constexpr (HELD) return held_x;
      else return load_pairs<N>(x + head * side.x_head, at);
    };
    const auto gradient = [&](int64_t head, const Place& at) {
      if constexpr (HELD) return held_d;
      else return load_d(head, at);
    };
    const auto each = [&](auto f) {
      spread.each([&](int64_t head, const Place& at) {
        const Pairs<N> v = value(head, at);
        f(v.first);
        if (at.whole) f(v.second);
      });
    };
    const auto sum = [&](auto& sums, int place) { spread.sum(sums, scratch[place]); };
    const Moments of = moments(spread.heads * a.head_dim, a.eps, a.centred, each, sum);

    float sums[2] = {};  // of u * n and of u
    spread.each([&](int64_t head, const Place& at) {
      const Pairs<N> v = value(head, at), d = gradient(head, at);
      const Pairs<N> weight = load_parameters<N, T>(side.weight, is_float, head * a.head_dim, at);
#pragma unroll
      for (int k = 0; k < N; ++k) {  // without a second dim d is 0
        const float left = d.first.v[k] * weight.first.v[k], right = d.second.v[k] * weight.second.v[k];
        sums[0] += left * ((v.first.v[k] - of.mean) * of.rstd) + right * ((v.second.v[k] - of.mean) * of.rstd);
        sums[1] += left + right;
      }
    });
    spread.sum(sums, scratch[2]);
    const float dot = sums[0] / count, shared = a.centred ? sums[1] / count : 0.0f;
    spread.each([&](int64_t head, const Place& at) {
      const Pairs<N> v = value(head, at), d = gradient(head, at);
      const Pairs<N> weight = load_parameters<N, T>(side.weight, is_float, head * a.head_dim, at);
      if (!HELD && partial) {
        scaled = load_pairs<N>(partial + head * a.head_dim, at);
        plain = load_pairs<N>(partial + a.span + head * a.head_dim, at);
      }
      Pairs<N> result;
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const float n = (v.first.v[k] - of.mean) * of.rstd, m = (v.second.v[k] - of.mean) * of.rstd;
        result.first.v[k] = of.rstd * (d.first.v[k] * weight.first.v[k] - shared - n * dot);
        result.second.v[k] = of.rstd * (d.second.v[k] * weight.second.v[k] - shared - m * dot);
        scaled.first.v[k] += d.first.v[k] * n, scaled.second.v[k] += d.second.v[k] * m;
        plain.first.v[k] += d.first.v[k], plain.second.v[k] += d.second.v[k];
      }
      store_pairs<N>(dx + head * a.head_dim, at, result);
      if (!HELD && partial) keep(head, at);
    });
  }

  if (!HELD || !partial) return;
  spread.items = items;
  if constexpr (THREADS > 0) {
    spread.each(keep);
  } else {  // the groups' sums, in order
    struct alignas(16) Sums {
      float v[BLOCK<THREADS> * 2 * N];
    };
    __shared__ Sums of[2];
    const unsigned dims = static_cast<unsigned>(a.head_dim);
    spread.each([&](int64_t, const Place& at) {
      store_pairs<N>(of[0].v + spread.group * dims, at, scaled);
      store_pairs<N>(of[1].v + spread.group * dims, at, plain);
    });
    __syncthreads();
    for (unsigned i = threadIdx.x; i < dims; i += ALL_THREADS) {
      float sums[2] = {};
      for (unsigned group = 0; group < spread.groups; ++group)
        for (int which = 0; which < 2; ++which) sums[which] += of[which].v[group * dims + i];
      partial[i] = sums[0];
      partial[a.span + i] = sums[1];
    }
  }
}

}  // namespace

extern "C" int blip3o_cuda_qk_norm_rope_backward(const blip3o_qk_norm_rope_backward_arguments* a) {
  Job job = {};
  int status = prepare(*a, job);
  if (status) return status;
  Side &query = job.query, &key = job.key;
  query.y = a->dquery, query.dy = a->query_dy;
  query.dy_batch = a->query_dy_batch, query.dy_head = a->query_dy_head, query.dy_token = a->query_dy_token;
  key.y = a->dkey, key.dy = a->key_dy;
  key.dy_batch = a->key_dy_batch, key.dy_head = a->key_dy_head, key.dy_token = a->key_dy_token;
  if (a->dquery_weight || a->dkey_weight || a->dquery_bias || a->dkey_bias) job.workspace = a->workspace;
  // Blocks in proportion to the work; every side that has any gets one.
  if (a->blocks < 2 || a->blocks > 0xffff) return BLIP3O_BAD_ARGUMENT;
  int64_t share = a->heads + a->groups ? a->blocks * a->heads / (a->heads + a->groups) : 0;
  if (query.rows && key.rows) share = share < 1 ? 1 : share < a->blocks ? share : a->blocks - 1;
  query.blocks = query.rows ? static_cast<unsigned>(share) : 0;
  key.blocks = key.rows ? static_cast<unsigned>(a->blocks - share) : 0;
  for (Side* side : {&query, &key})
    if (side->blocks) side->each = side->rows / side->blocks, side->left = side->rows % side->blocks;
  if (query.blocks + key.blocks)
    status = by_dtype(a->dtype, [&](auto t) {
      using T = decltype(t);
      return by_shape<T>(job, [&](auto shape) {
        using Shape = decltype(shape);
        return launch(backward_kernel<Shape::THREADS, Shape::N, Shape::HELD, T>, query.blocks + key.blocks,
                      BLOCK<Shape::THREADS>, 0, job.stream, job);
      });
    });
  const auto add_up = [&](void* to, const Side& side, const float* partial) {
    const int64_t width = a->head_dim * (a->across_width ? side.heads : 1);
    if (to && !status)
      status = by_dtype(a->parameter_dtype, [&](auto w) {
        return sum_blocks(static_cast<decltype(w)*>(to), partial, side.blocks, width, 2 * job.span, job.stream);
      });
  };
  const float* of_keys = a->workspace + query.blocks * 2 * job.span;
  add_up(a->dquery_weight, query, a->workspace);
  add_up(a->dquery_bias, query, a->workspace + job.span);
  add_up(a->dkey_weight, key, of_keys);
  add_up(a->dkey_bias, key, of_keys + job.span);
  return status;
}
