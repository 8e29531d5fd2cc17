// The straight path and its velocity on a GPU; the contract is kernels/blip3o_kernels/ops/flow_interpolate.py.
//
// One pass each way. Noise that is drawn lives in a thread's registers: it has kernels of its own, as it takes more of them. The sums
// are spelled out with fmaf, so that noise drawn and noise given come to the same bits.
#include "philox.cuh"
#include "samples.cuh"

namespace {

using namespace blip3o;

typedef Drawing<blip3o_flow_interpolate_arguments, BLIP3O_NOISE> Forward;
typedef Drawing<blip3o_flow_interpolate_backward_arguments, BLIP3O_NOISE> Backward;

template <bool DRAWN, class T, int N, class Arguments>
__device__ inline Floats<N> noise_of(const Arguments& a, int64_t sample, int64_t first, Width<N> n) {
  if constexpr (DRAWN)
    return a.philox.template noise<N>(first, a.positions[sample]);
  else
    return widened(fetch<T>(a.noise, sample * a.elements + first, n));
}

template <class T, bool DRAWN>
__global__ void __launch_bounds__(SAMPLE_THREADS) interpolate_kernel(Forward a, Cut cut) {
  for_groups<16 / sizeof(T)>(cut, a.elements, [&](int64_t sample, int64_t first, auto n) {
    constexpr int N = decltype(n)::N;
    const int64_t at = sample * a.elements + first;
    const Stored<T, N> stored = fetch<T>(a.x, at, n);
    const float sigma = a.sigma[sample], rest = 1.0f - sigma;
    const Floats<N> z = noise_of<DRAWN, T>(a, sample, first, n), x = widened(stored);
    Floats<N> x_sigma, velocity;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      x_sigma.v[k] = fmaf(sigma, z.v[k], rest * x.v[k]);
      velocity.v[k] = z.v[k] - x.v[k];
    }
    store<N>(static_cast<T*>(a.x_sigma) + at, x_sigma);
    store<N>(static_cast<T*>(a.velocity) + at, velocity);
  });
}

template <class T, bool DRAWN>
__global__ void __launch_bounds__(SAMPLE_THREADS) interpolate_backward_kernel(Backward a, Cut cut) {
  __shared__ float scratch[32];
  float sum = 0;
  for_groups<16 / sizeof(T)>(cut, a.elements, [&](int64_t sample, int64_t first, auto n) {
    constexpr int N = decltype(n)::N;
    const int64_t at = sample * a.elements + first;
    const Stored<T, N> stored = fetch<T>(a.dx_sigma, at, n), more = fetch<T>(a.dvelocity, at, n);
    if (a.dsigma) {
      const Stored<T, N> data = fetch<T>(a.x, at, n);
      const Floats<N> z = noise_of<DRAWN, T>(a, sample, first, n), x = widened(data), d = widened(stored);
#pragma unroll
      for (int k = 0; k < N; ++k) sum = fmaf(d.v[k], z.v[k] - x.v[k], sum);
    }
    const float sigma = a.sigma[sample], rest = 1.0f - sigma;
    const Floats<N> d = widened(stored), dv = widened(more);
    Floats<N> dx, dnoise;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      dx.v[k] = fmaf(rest, d.v[k], -dv.v[k]);
      dnoise.v[k] = fmaf(sigma, d.v[k], dv.v[k]);
    }
    store<N>(static_cast<T*>(a.dx) + at, dx);
    if (a.dnoise) store<N>(static_cast<T*>(a.dnoise) + at, dnoise);
  });
  if (!a.dsigma) return;
  sum = block_sum<SAMPLE_THREADS>(sum, scratch);
  if (threadIdx.x == 0) reinterpret_cast<float*>(a.sums)[blockIdx.x] = sum;
}

template <class T>
int run(const Forward& a) {
  if (!a.elements) return BLIP3O_OK;
  const auto kernel = a.noise ? interpolate_kernel<T, false> : interpolate_kernel<T, true>;
  return launch_samples<T>(kernel, a, steps_of<T>(a.elements), a.x_sigma, a.velocity, a.x, a.noise);
}

template <class T>
int run(const Backward& a) {
  const int64_t blocks = blocks_of<T>(a.elements, a.dsigma ? MOST_BLOCKS : INT64_MAX);
  if (a.elements) {
    const auto kernel = a.noise || !a.dsigma ? interpolate_backward_kernel<T, false> : interpolate_backward_kernel<T, true>;
    const int status = launch_samples<T>(kernel, a, blocks, a.dx, a.dnoise, a.dx_sigma, a.dvelocity, a.x, a.noise);
    if (status) return status;
  }
  if (!a.dsigma) return BLIP3O_OK;
  return sum_samples(a.dsigma, reinterpret_cast<const float*>(a.sums), a.samples, blocks, a.stream);
}

template <class Drawn>
int run_dtypes(const Drawn& a) {
  if (a.samples < 0 || a.elements < 0) return BLIP3O_BAD_ARGUMENT;
  if (!a.samples) return BLIP3O_OK;
  return by_dtype(a.dtype, [&](auto t) { return run<decltype(t)>(a); });
}

}  // namespace

extern "C" int blip3o_cuda_flow_interpolate(const blip3o_flow_interpolate_arguments* a) { return run_dtypes(Forward(*a)); }
extern "C" int blip3o_cuda_flow_interpolate_backward(const blip3o_flow_interpolate_backward_arguments* a) {
  return run_dtypes(Backward(*a));
}
