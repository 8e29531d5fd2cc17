// How the kernels of the flow ops cut contiguous samples, and how they sum over one.
//
// A thread takes N elements at a time, 16 bytes; a block THREADS times as many, a step. A kernel that sums gives a sample at most so many
// blocks, each of which takes every so many-th step and leaves one sum; a second kernel adds those up in their order. Which thread
// adds what depends on shapes alone: neither on alignment nor on the GPU.
#pragma once

#include "device.cuh"

namespace blip3o {

constexpr int SAMPLE_THREADS = 256;
constexpr int MOST_BLOCKS = 256;  // of a sample that is summed over, by its own length alone: the rest of the batch changes no bit

struct Cut {
  unsigned blocks, steps;  // of each sample
  bool wide;               // whether N elements may be one access
};

template <int N_>
struct Width {  // of one access
  static constexpr int N = N_;
};

// Elements from `at` on as they are stored, so that several loads are under way before the first is converted.
template <class T, int N>
__device__ inline Stored<T, N> fetch(const void* p, int64_t at, Width<N>) {
  return *reinterpret_cast<const Stored<T, N>*>(static_cast<const T*>(p) + at);
}

template <class T, int N>
__device__ inline Floats<N> widened(const Stored<T, N>& stored) {
  Floats<N> floats;
#pragma unroll
  for (int k = 0; k < N; ++k) floats.v[k] = to_float(stored.v[k]);
  return floats;
}

// group(sample, first, Width<N>()) for N elements of the block's sample that are this thread's, from `first` on, counted within the sample;
// where they are fewer, or not aligned, with Width<1> for one after the other.
template <int N, class Group>
__device__ inline void for_groups(const Cut& cut, int64_t elements, Group group) {
  const int64_t sample = blockIdx.x / cut.blocks;
#pragma unroll 1
  for (unsigned step = blockIdx.x % cut.blocks; step < cut.steps; step += cut.blocks) {
    const int64_t first = (static_cast<int64_t>(step) * SAMPLE_THREADS + threadIdx.x) * N, left = elements - first;
    if (cut.wide && left >= N) {
      group(sample, first, Width<N>());
    } else {
      const int count = static_cast<int>(left < N ? left : N);
#pragma unroll 1
      for (int k = 0; k < count; ++k) group(sample, first + k, Width<1>());
    }
  }
}

// y[sample] = the sum of that sample's `blocks` sums.
template <int SUM_THREADS>
__global__ void __launch_bounds__(SUM_THREADS) sum_samples_kernel(float* y, const float* sums, int blocks) {
  __shared__ float scratch[32];
  const float* own = sums + static_cast<int64_t>(blockIdx.x) * blocks;
  float sum = 0;
  for (int i = threadIdx.x; i < blocks; i += SUM_THREADS) sum += own[i];
  sum = block_sum<SUM_THREADS>(sum, scratch);
  if (threadIdx.x == 0) y[blockIdx.x] = sum;
}

// Launchers

template <class T>
int64_t steps_of(int64_t elements) {
  const int64_t step = SAMPLE_THREADS * 16 / static_cast<int64_t>(sizeof(T));
  return elements / step + (elements % step != 0);
}

// Of a sample with at least one element.
template <class T>
int64_t blocks_of(int64_t elements, int64_t most) {
  const int64_t steps = steps_of<T>(elements);
  return steps < most ? steps : most;
}

// Runs kernel(a, cut), `blocks` for each sample; p: what it accesses N elements at a time.
template <class T, class Arguments, class... Pointers>
int launch_samples(void (*kernel)(Arguments, Cut), const Arguments& a, int64_t blocks, const Pointers*... p) {
  const int64_t steps = steps_of<T>(a.elements);
  if (steps > 0x7fffffff || blocks > 0x7fffffff / a.samples) return BLIP3O_BAD_ARGUMENT;
  const bool wide = (a.samples == 1 || divisible<16 / sizeof(T)>(a.elements)) && aligned(p...);
  const Cut cut{static_cast<unsigned>(blocks), static_cast<unsigned>(steps), wide};
  return launch(kernel, static_cast<unsigned>(a.samples * blocks), SAMPLE_THREADS, 0, a.stream, a, cut);
}

inline int sum_samples(float* y, const float* sums, int64_t samples, int64_t blocks, void* stream) {
  if (samples > 0x7fffffff) return BLIP3O_BAD_ARGUMENT;
  return launch(sum_samples_kernel<128>, static_cast<unsigned>(samples), 128, 0, stream, y, sums, static_cast<int>(blocks));
}

}  // namespace blip3o
