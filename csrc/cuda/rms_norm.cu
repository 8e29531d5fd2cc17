// RMS normalisation on a GPU; the contract is kernels/blip3o_kernels/ops/rms_norm.py.
//
// One block walks one row at a time and reads it twice; the second read comes from L1, where even 16384 bfloat16 fit. The
// backward pass recomputes 1/rms for the same reason as on a CPU: it reads x anyway. No atomics: a block owns a run of rows
// and sums their dweight in registers, a second kernel adds the runs up in order.
#include "device.cuh"

namespace {

using namespace blip3o;

// Kernels. Whether there is a weight, and what is rounded when, is the same for all threads: a branch costs nothing beside the
// loads, and a kernel per case would multiply the time to compile.

// offset + weight, or 1 without a weight.
template <int N, class W>
__device__ inline Floats<N> load_gain(const W* weight, int64_t i, float offset) {
  Floats<N> gain;
  if (weight) gain = load<N>(weight + i);
#pragma unroll
  for (int k = 0; k < N; ++k) gain.v[k] = weight ? offset + gain.v[k] : 1.0f;
  return gain;
}

template <int THREADS, int N, class T, class W>
__global__ void __launch_bounds__(THREADS) forward_kernel(blip3o_rms_norm_arguments a) {
  __shared__ float scratch[32];
  const T* x = static_cast<const T*>(a.x) + blockIdx.x * a.stride;
  T* y = static_cast<T*>(a.y) + blockIdx.x * a.width;
  const W* weight = static_cast<const W*>(a.weight);
  const bool round_before_weight = weight && a.round_before_weight;
  float square = 0;
#pragma unroll 2
  for (int64_t i = threadIdx.x * N; i < a.width; i += THREADS * N) {
    const Floats<N> v = load<N>(x + i);
#pragma unroll
    for (int k = 0; k < N; ++k) square += v.v[k] * v.v[k];
  }
  const float rstd = __frsqrt_rn(block_sum<THREADS>(square, scratch) / static_cast<float>(a.width) + a.eps);
#pragma unroll 2
  for (int64_t i = threadIdx.x * N; i < a.width; i += THREADS * N) {
    Floats<N> v = load<N>(x + i);
    const Floats<N> gain = load_gain<N>(weight, i, a.offset);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      v.v[k] *= rstd;
      if (round_before_weight) v.v[k] = to_float(from_float<T>(v.v[k]));
      v.v[k] *= gain.v[k];
    }
    store<N>(y + i, v);
  }
}

// With u = dy * gain and c = rstd^3 / width * sum(u * x):   dx = u * rstd - x * c,   dweight = sum over rows of dy * x * rstd.
// CHUNKS: how many times N columns a thread may own, so that their sums stay in registers; 0: any number, they live in `partial`.
template <int THREADS, int N, int CHUNKS, class T, class W>
__global__ void __launch_bounds__(THREADS, 512 / THREADS) backward_kernel(blip3o_rms_norm_backward_arguments a) {
  __shared__ float scratch[2][32];
  const W* weight = static_cast<const W*>(a.weight);
  float* partial = a.dweight ? a.partial + blockIdx.x * a.width : nullptr;
  Floats<N> sums[CHUNKS ? CHUNKS : 1] = {};
  if (partial && !CHUNKS)
    for (int64_t i = threadIdx.x * N; i < a.width; i += THREADS * N) store<N>(partial + i, sums[0]);

  const int64_t last = a.rows * (blockIdx.x + 1) / a.blocks;
  for (int64_t row = a.rows * blockIdx.x / a.blocks; row < last; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.stride;
    const T* dy = static_cast<const T*>(a.dy) + row * a.width;
    T* dx = static_cast<T*>(a.dx) + row * a.width;
    float square = 0, dot = 0;
#pragma unroll 1
    for (int64_t i = threadIdx.x * N; i < a.width; i += THREADS * N) {
      const Floats<N> v = load<N>(x + i), g = load<N>(dy + i), gain = load_gain<N>(weight, i, a.offset);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        square += v.v[k] * v.v[k];
        dot += g.v[k] * gain.v[k] * v.v[k];
      }
    }
    square = block_sum<THREADS>(square, scratch[0]);
    dot = block_sum<THREADS>(dot, scratch[1]);
    const float rstd = __frsqrt_rn(square / static_cast<float>(a.width) + a.eps);
    const float c = dot * rstd * rstd * rstd / static_cast<float>(a.width);
    auto finish = [&](int64_t i, Floats<N>& sum) {
      const Floats<N> v = load<N>(x + i), g = load<N>(dy + i), gain = load_gain<N>(weight, i, a.offset);
      Floats<N> d;
#pragma unroll
      for (int k = 0; k < N; ++k) {
        d.v[k] = g.v[k] * gain.v[k] * rstd - v.v[k] * c;
        sum.v[k] += g.v[k] * (v.v[k] * rstd);
      }
      store<N>(dx + i, d);
    };
    if (CHUNKS) {
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        const int64_t i = (static_cast<int64_t>(chunk) * THREADS + threadIdx.x) * N;
        if (i < a.width) finish(i, sums[chunk]);
      }
    } else {
#pragma unroll 1
      for (int64_t i = threadIdx.x * N; i < a.width; i += THREADS * N) {
        if (partial) sums[0] = load<N>(partial + i);
        finish(i, sums[0]);
        if (partial) store<N>(partial + i, sums[0]);
      }
    }
  }
  if (partial && CHUNKS) {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      const int64_t i = (static_cast<int64_t>(chunk) * THREADS + threadIdx.x) * N;
      if (i < a.width) store<N>(partial + i, sums[chunk]);
    }
  }
}

// dweight[i] = sum over blocks of partial[block, i]: 32 columns by 8 groups of blocks, groups added in order.
template <class W>
__global__ void __launch_bounds__(256) sum_kernel(W* dweight, const float* partial, int64_t blocks, int64_t width) {
  __shared__ float group[8][32];
  const int64_t column = blockIdx.x * 32 + threadIdx.x;
  float sum = 0;
  if (column < width)
    for (int64_t block = threadIdx.y; block < blocks; block += 8) sum += partial[block * width + column];
  group[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y || column >= width) return;
#pragma unroll
  for (int y = 1; y < 8; ++y) sum += group[y][threadIdx.x];
  dweight[column] = from_float<W>(sum);
}

// Launchers

// N elements of 16 bytes where every address allows it, else one at a time.
template <class T>
bool wide_loads(int64_t width, int64_t stride) {
  constexpr int64_t n = 16 / sizeof(T);
  return width % n == 0 && stride % n == 0;
}

template <int THREADS, int N, class T, class W>
int launch_rows(const blip3o_rms_norm_arguments& a) {
  return launch(forward_kernel<THREADS, N, T, W>, static_cast<unsigned>(a.rows), THREADS, 0, a.stream, a);
}

template <int THREADS, int N, class T, class W>
int launch_rows(const blip3o_rms_norm_backward_arguments& a) {
  const auto kernel = a.width <= 4 * THREADS * N ? backward_kernel<THREADS, N, 4, T, W> : backward_kernel<THREADS, N, 0, T, W>;
  const int status = launch(kernel, static_cast<unsigned>(a.blocks), THREADS, 0, a.stream, a);
  if (status || !a.dweight) return status;
  const dim3 columns(static_cast<unsigned>((a.width + 31) / 32));
  return launch(sum_kernel<W>, columns, dim3(32, 8), 0, a.stream, static_cast<W*>(a.dweight), a.partial, a.blocks, a.width);
}

template <class T, class W, class Arguments>
int launch_threads(const Arguments& a, bool wide) {
  constexpr int N = 16 / sizeof(T);
  if (!wide) return launch_rows<256, 1, T, W>(a);
  if (a.width <= 64 * N) return launch_rows<32, N, T, W>(a);
  if (a.width <= 512 * N) return launch_rows<128, N, T, W>(a);
  return launch_rows<512, N, T, W>(a);
}

template <class T, class W>
int run(const blip3o_rms_norm_arguments& a) {
  const bool wide = wide_loads<T>(a.width, a.stride) && aligned(a.x) && aligned(a.y) && aligned(a.weight);
  return launch_threads<T, W>(a, wide);
}

template <class T, class W>
int run(const blip3o_rms_norm_backward_arguments& a) {
  const bool wide = wide_loads<T>(a.width, a.stride) && aligned(a.x) && aligned(a.dy) && aligned(a.dx) &&
                    aligned(a.weight) && aligned(a.partial);
  return launch_threads<T, W>(a, wide);
}

template <class Arguments>
int run_dtypes(const Arguments& a) {
  switch (a.dtype * 4 + a.weight_dtype) {
    case BLIP3O_FLOAT32 * 4 + BLIP3O_FLOAT32: return run<float, float>(a);
    case BLIP3O_BFLOAT16 * 4 + BLIP3O_BFLOAT16: return run<bfloat16, bfloat16>(a);
    case BLIP3O_BFLOAT16 * 4 + BLIP3O_FLOAT32: return run<bfloat16, float>(a);
    case BLIP3O_FLOAT16 * 4 + BLIP3O_FLOAT16: return run<float16, float16>(a);
    case BLIP3O_FLOAT16 * 4 + BLIP3O_FLOAT32: return run<float16, float>(a);
    default: return BLIP3O_BAD_DTYPE;
  }
}

}  // namespace

extern "C" int blip3o_cuda_rms_norm(const blip3o_rms_norm_arguments* a) {
  if (a->rows < 0 || a->rows > 0x7fffffff || a->width < 1) return BLIP3O_BAD_ARGUMENT;
  return a->rows ? run_dtypes(*a) : BLIP3O_OK;
}

extern "C" int blip3o_cuda_rms_norm_backward(const blip3o_rms_norm_backward_arguments* a) {
  if (a->rows < 0 || a->width < 1 || a->blocks < 1 || (a->dweight && !(a->partial && a->weight))) return BLIP3O_BAD_ARGUMENT;
  return run_dtypes(*a);
}
