// The weighted mean squared error on a GPU; the contract is kernels/blip3o_kernels/ops/flow_loss.py.
//
// Forward a sum of each block, and one block that adds those up; backward one pass more, as on a CPU. Blocks enough to fill a GPU, few
// enough for one of them to add up what they leave.
#include "samples.cuh"

namespace {

using namespace blip3o;

constexpr int MOST_SUMS = 4096;
constexpr int TOTAL_THREADS = 1024;

template <class T>
__global__ void __launch_bounds__(SAMPLE_THREADS) squares_kernel(blip3o_flow_loss_arguments a, Cut cut) {
  __shared__ float scratch[32];
  float sum = 0;
  for_groups<16 / sizeof(T)>(cut, a.elements, [&](int64_t sample, int64_t first, auto n) {
    constexpr int N = decltype(n)::N;
    const int64_t at = sample * a.elements + first;
    const Stored<T, N> prediction = fetch<T>(a.prediction, at, n), target = fetch<T>(a.target, at, n);
    const Floats<N> p = widened(prediction), t = widened(target);
#pragma unroll
    for (int k = 0; k < N; ++k) sum += (p.v[k] - t.v[k]) * (p.v[k] - t.v[k]);
  });
  sum = block_sum<SAMPLE_THREADS>(sum, scratch);
  if (threadIdx.x == 0) reinterpret_cast<float*>(a.sums)[blockIdx.x] = sum;
}

// The sums of each `lanes` threads, a power of two, in the first of them.
__device__ inline float lanes_sum(float x, unsigned lanes, float* scratch) {
  for (unsigned apart = lanes / 2; apart > 0; apart /= 2) {
    scratch[threadIdx.x] = x;
    __syncthreads();
    if (threadIdx.x % lanes < apart) x += scratch[threadIdx.x + apart];
    __syncthreads();
  }
  return x;
}

// Each sample has `blocks` sums, and `lanes` threads to add them up.
__global__ void __launch_bounds__(TOTAL_THREADS) total_kernel(blip3o_flow_loss_arguments a, unsigned blocks, unsigned lanes) {
  __shared__ float scratch[TOTAL_THREADS];
  const float* sums = reinterpret_cast<const float*>(a.sums);
  const unsigned together = TOTAL_THREADS / lanes;
  float total = 0;
  for (int64_t start = 0; start < a.samples; start += together) {
    const int64_t sample = start + threadIdx.x / lanes;
    float sum = 0;
    if (sample < a.samples)
      for (unsigned i = threadIdx.x % lanes; i < blocks; i += lanes) sum += sums[sample * blocks + i];
    sum = lanes_sum(sum, lanes, scratch);
    if (threadIdx.x % lanes == 0 && sample < a.samples) {
      const float mean = sum / static_cast<float>(a.elements);
      a.means[sample] = mean;
      total += a.weight ? mean * a.weight[sample] : mean;
    }
  }
  total = lanes_sum(total, TOTAL_THREADS, scratch);
  if (threadIdx.x == 0) *a.loss = total / static_cast<float>(a.samples);
}

template <class T>
__global__ void __launch_bounds__(SAMPLE_THREADS) squares_backward_kernel(blip3o_flow_loss_backward_arguments a, Cut cut) {
  for_groups<16 / sizeof(T)>(cut, a.elements, [&](int64_t sample, int64_t first, auto n) {
    constexpr int N = decltype(n)::N;
    const int64_t at = sample * a.elements + first;
    const Stored<T, N> prediction = fetch<T>(a.prediction, at, n), target = fetch<T>(a.target, at, n);
    const float share = 2.0f * *a.dloss / static_cast<float>(a.samples) / static_cast<float>(a.elements);
    const float slope = a.weight ? share * a.weight[sample] : share;
    const Floats<N> p = widened(prediction), t = widened(target);
    Floats<N> d, opposite;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      d.v[k] = slope * (p.v[k] - t.v[k]);
      opposite.v[k] = -d.v[k];
    }
    store<N>(static_cast<T*>(a.dprediction) + at, d);
    if (a.dtarget) store<N>(static_cast<T*>(a.dtarget) + at, opposite);
  });
}

template <class T>
int run(const blip3o_flow_loss_arguments& a) {
  const int64_t most = MOST_SUMS / a.samples, blocks = blocks_of<T>(a.elements, most < 1 ? 1 : most);
  const int status = launch_samples<T>(squares_kernel<T>, a, blocks, a.prediction, a.target);
  if (status) return status;
  unsigned lanes = 1;
  while (lanes < TOTAL_THREADS && 2 * lanes * a.samples <= TOTAL_THREADS) lanes *= 2;
  return launch(total_kernel, 1, TOTAL_THREADS, 0, a.stream, a, static_cast<unsigned>(blocks), lanes);
}

template <class T>
int run(const blip3o_flow_loss_backward_arguments& a) {
  return launch_samples<T>(squares_backward_kernel<T>, a, steps_of<T>(a.elements), a.dprediction, a.dtarget, a.prediction, a.target);
}

template <class Arguments>
int run_dtypes(const Arguments& a) {
  if (a.samples < 1 || a.elements < 1) return BLIP3O_BAD_ARGUMENT;
  return by_dtype(a.dtype, [&](auto t) { return run<decltype(t)>(a); });
}

}  // namespace

extern "C" int blip3o_cuda_flow_loss(const blip3o_flow_loss_arguments* a) { return run_dtypes(*a); }
extern "C" int blip3o_cuda_flow_loss_backward(const blip3o_flow_loss_backward_arguments* a) { return run_dtypes(*a); }
