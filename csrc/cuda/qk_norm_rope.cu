// Normalised and rotated queries and keys on a GPU; the contract is kernels/blip3o_kernels/ops/qk_norm_rope.py. The backward pass
// is in qk_norm_rope_backward.cu.
#include "qk_norm_rope.cuh"

namespace {

using namespace blip3o;

template <int THREADS, int N, bool HELD, class T>
__global__ void __launch_bounds__(BLOCK<THREADS>) forward_kernel(Job a) {
  __shared__ float scratch[2][2 * (BLOCK<THREADS> / 32)];
  const bool is_key = blockIdx.x >= a.query.blocks;
  const Side side = is_key ? a.key : a.query;
  Spread<THREADS, N, HELD> spread(a, side);
  const unsigned row = (is_key ? blockIdx.x - a.query.blocks : blockIdx.x) * spread.groups + spread.group;
  if (row >= side.rows) spread.items = 0;  // its lanes still take part in the sums of others
  const Start start = start_of(a, side, row);
  const T* x = static_cast<const T*>(side.x) + start.x;
  T* y = static_cast<T*>(side.y) + start.y;

  Pairs<N> held;
  if constexpr (HELD) spread.each([&](int64_t head, const Place& at) { held = load_pairs<N>(x + head * side.x_head, at); });
  const auto value = [&](int64_t head, const Place& at) {
    if constexpr (HELD) return held;
    else return load_pairs<N>(x + head * side.x_head, at);
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

  const bool is_float = a.parameter_dtype == BLIP3O_FLOAT32;
  spread.each([&](int64_t head, const Place& at) {
    Pairs<N> v = value(head, at), bias = {};
    const Pairs<N> weight = load_parameters<N, T>(side.weight, is_float, head * a.head_dim, at);
    if (side.bias) bias = load_parameters<N, T>(side.bias, is_float, head * a.head_dim, at);
    const Pairs<N> angles = load_angles<N>(a, start.angles, at);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      v.first.v[k] = (v.first.v[k] - of.mean) * of.rstd * weight.first.v[k] + bias.first.v[k];
      v.second.v[k] = (v.second.v[k] - of.mean) * of.rstd * weight.second.v[k] + bias.second.v[k];
    }
    store_pairs<N>(y + head * a.head_dim, at, turned(v, angles, 1.0f, at.turns));
  });
}

}  // namespace

extern "C" int blip3o_cuda_qk_norm_rope(const blip3o_qk_norm_rope_arguments* a) {
  Job job = {};
  const int status = prepare(*a, job);
  if (status) return status;
  job.query.y = a->query_y, job.query.bias = a->query_bias;
  job.key.y = a->key_y, job.key.bias = a->key_bias;
  if (!job.query.rows && !job.key.rows) return BLIP3O_OK;
  return by_dtype(a->dtype, [&](auto t) {
    using T = decltype(t);
    return by_shape<T>(job, [&](auto shape) {
      using Shape = decltype(shape);
      const unsigned rows = Shape::THREADS ? 1 : BLOCK<0> / job.lanes;  // of a block
      for (Side* side : {&job.query, &job.key}) side->blocks = (side->rows + rows - 1) / rows;
      return launch(forward_kernel<Shape::THREADS, Shape::N, Shape::HELD, T>, job.query.blocks + job.key.blocks,
                    BLOCK<Shape::THREADS>, 0, job.stream, job);
    });
  });
}
