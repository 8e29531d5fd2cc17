// Guidance and one step of the ODE solver on a GPU; the contract is kernels/blip3o_kernels/ops/flow_step.py.
//
// One pass each way. The gradients of the three velocities are multiples of dy; the velocities themselves are read again only
// where the steps' own gradient is wanted. What is missing is null, the same for all threads: a branch costs nothing beside the loads.
#include "samples.cuh"

namespace {

using namespace blip3o;

// What the velocity is made of, as it is stored; of what is missing the velocity again, which costs less than a branch.
template <class T, int N>
struct Velocity {
  Stored<T, N> velocity, unconditional, previous;

  template <class Arguments>
  __device__ Velocity(const Arguments& a, int64_t at, Width<N> n)
      : velocity(fetch<T>(a.velocity, at, n)),
        unconditional(fetch<T>(a.unconditional ? a.unconditional : a.velocity, at, n)),
        previous(fetch<T>(a.previous ? a.previous : a.velocity, at, n)) {}

  template <class Arguments>
  __device__ Floats<N> of(const Arguments& a) const {
    Floats<N> v = widened(velocity);
    const Floats<N> base = widened(unconditional), before = widened(previous);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (a.unconditional) v.v[k] = base.v[k] + a.guidance * (v.v[k] - base.v[k]);
      if (a.previous) v.v[k] = (v.v[k] + before.v[k]) * 0.5f;
    }
    return v;
  }
};

template <class T>
__global__ void __launch_bounds__(SAMPLE_THREADS) step_kernel(blip3o_flow_step_arguments a, Cut cut) {
  for_groups<16 / sizeof(T)>(cut, a.elements, [&](int64_t sample, int64_t first, auto n) {
    constexpr int N = decltype(n)::N;
    const int64_t at = sample * a.elements + first;
    const Stored<T, N> x = fetch<T>(a.x, at, n);
    const Velocity<T, N> velocity(a, at, n);
    const float step = a.steps ? a.steps[sample] : a.step;
    Floats<N> y = widened(x);
    const Floats<N> v = velocity.of(a);
#pragma unroll
    for (int k = 0; k < N; ++k) y.v[k] += step * v.v[k];
    store<N>(static_cast<T*>(a.y) + at, y);
  });
}

template <class T>
__global__ void __launch_bounds__(SAMPLE_THREADS) step_backward_kernel(blip3o_flow_step_backward_arguments a, Cut cut) {
  __shared__ float scratch[32];
  float sum = 0;
  for_groups<16 / sizeof(T)>(cut, a.elements, [&](int64_t sample, int64_t first, auto n) {
    constexpr int N = decltype(n)::N;
    const int64_t at = sample * a.elements + first;
    const Stored<T, N> stored = fetch<T>(a.dy, at, n);
    if (a.dsteps) {
      const Velocity<T, N> velocity(a, at, n);
      const Floats<N> dy = widened(stored), v = velocity.of(a);
#pragma unroll
      for (int k = 0; k < N; ++k) sum += dy.v[k] * v.v[k];
    }
    const float step = (a.steps ? a.steps[sample] : a.step) * (a.previous ? 0.5f : 1.0f);
    const auto give = [&](void* to, float factor) {
      if (!to) return;
      Floats<N> d = widened(stored);
#pragma unroll
      for (int k = 0; k < N; ++k) d.v[k] *= factor;
      store<N>(static_cast<T*>(to) + at, d);
    };
    give(a.dvelocity, a.unconditional ? step * a.guidance : step);
    give(a.dunconditional, step * (1.0f - a.guidance));
    give(a.dprevious, step);
  });
  if (!a.dsteps) return;
  sum = block_sum<SAMPLE_THREADS>(sum, scratch);
  if (threadIdx.x == 0) reinterpret_cast<float*>(a.sums)[blockIdx.x] = sum;
}

template <class T>
int run(const blip3o_flow_step_arguments& a) {
  if (!a.elements) return BLIP3O_OK;
  return launch_samples<T>(step_kernel<T>, a, steps_of<T>(a.elements), a.y, a.x, a.velocity, a.unconditional, a.previous);
}

template <class T>
int run(const blip3o_flow_step_backward_arguments& a) {
  const int64_t blocks = blocks_of<T>(a.elements, a.dsteps ? MOST_BLOCKS : INT64_MAX);
  if (a.elements) {
    const int status = launch_samples<T>(step_backward_kernel<T>, a, blocks, a.dvelocity, a.dunconditional, a.dprevious, a.dy,
                                         a.velocity, a.unconditional, a.previous);
    if (status) return status;
  }
  if (!a.dsteps) return BLIP3O_OK;
  return sum_samples(a.dsteps, reinterpret_cast<const float*>(a.sums), a.samples, blocks, a.stream);
}

template <class Arguments>
int run_dtypes(const Arguments& a) {
  if (a.samples < 0 || a.elements < 0) return BLIP3O_BAD_ARGUMENT;
  if (!a.samples) return BLIP3O_OK;
  return by_dtype(a.dtype, [&](auto t) { return run<decltype(t)>(a); });
}

}  // namespace

extern "C" int blip3o_cuda_flow_step(const blip3o_flow_step_arguments* a) { return run_dtypes(*a); }
extern "C" int blip3o_cuda_flow_step_backward(const blip3o_flow_step_backward_arguments* a) { return run_dtypes(*a); }
