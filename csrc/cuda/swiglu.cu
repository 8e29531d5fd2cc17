// silu(gate) * up on a GPU; the contract is kernels/blip3o_kernels/ops/swiglu.py. A thread takes N elements, a block a part of one
// row, so that only a block divides.
#include "device.cuh"

namespace {

using namespace blip3o;

constexpr int THREADS = 256;

// silu(v) = v / e and sigmoid(v) = 1 / e, each rounded once after e.
__device__ inline float one_plus_exponential(float v) { return 1.0f + expf(-v); }

struct Part {
  int64_t row, column;
};

template <int N>
__device__ inline Part part_of_row(int64_t width) {
  const unsigned parts = static_cast<unsigned>((width + THREADS * N - 1) / (THREADS * N));
  return {blockIdx.x / parts, (static_cast<int64_t>(blockIdx.x % parts) * THREADS + threadIdx.x) * N};
}

template <int N, class T>
__global__ void __launch_bounds__(THREADS) forward_kernel(blip3o_swiglu_arguments a) {
  const Part at = part_of_row<N>(a.width);
  if (at.column >= a.width) return;
  const Floats<N> gate = load<N>(static_cast<const T*>(a.gate) + at.row * a.gate_stride + at.column);
  Floats<N> y = load<N>(static_cast<const T*>(a.up) + at.row * a.up_stride + at.column);
#pragma unroll
  for (int k = 0; k < N; ++k) y.v[k] *= gate.v[k] / one_plus_exponential(gate.v[k]);
  store<N>(static_cast<T*>(a.y) + at.row * a.width + at.column, y);
}

// With s = sigmoid(gate):   dup = dy * gate * s,   dgate = dy * up * s * (1 + gate * (1 - s)).
template <int N, class T>
__global__ void __launch_bounds__(THREADS) backward_kernel(blip3o_swiglu_backward_arguments a) {
  const Part at = part_of_row<N>(a.width);
  if (at.column >= a.width) return;
  const Floats<N> gate = load<N>(static_cast<const T*>(a.gate) + at.row * a.gate_stride + at.column);
  const Floats<N> up = load<N>(static_cast<const T*>(a.up) + at.row * a.up_stride + at.column);
  Floats<N> dgate = load<N>(static_cast<const T*>(a.dy) + at.row * a.width + at.column), dup = dgate;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const float e = one_plus_exponential(gate.v[k]), s = 1.0f / e;
    dup.v[k] *= gate.v[k] / e;
    dgate.v[k] *= up.v[k] * (s * (1.0f + gate.v[k] * (1.0f - s)));
  }
  store<N>(static_cast<T*>(a.dgate) + at.row * a.gradient_stride + at.column, dgate);
  store<N>(static_cast<T*>(a.dup) + at.row * a.gradient_stride + at.column, dup);
}

template <int N, class Arguments>
int launch_parts(void (*kernel)(Arguments), const Arguments& a) {
  const int64_t blocks = a.rows * ((a.width + THREADS * N - 1) / (THREADS * N));
  if (blocks > 0x7fffffff) return BLIP3O_BAD_ARGUMENT;
  return launch(kernel, static_cast<unsigned>(blocks), THREADS, 0, a.stream, a);
}

template <class T>
int run(const blip3o_swiglu_arguments& a) {
  constexpr int N = 16 / sizeof(T);
  const bool wide = divisible<N>(a.width, a.gate_stride, a.up_stride) && aligned(a.y, a.gate, a.up);
  return wide ? launch_parts<N>(forward_kernel<N, T>, a) : launch_parts<1>(forward_kernel<1, T>, a);
}

template <class T>
int run(const blip3o_swiglu_backward_arguments& a) {
  constexpr int N = 16 / sizeof(T);
  const bool wide = divisible<N>(a.width, a.gate_stride, a.up_stride, a.gradient_stride) &&
                    aligned(a.dgate, a.dup, a.dy, a.gate, a.up);
  return wide ? launch_parts<N>(backward_kernel<N, T>, a) : launch_parts<1>(backward_kernel<1, T>, a);
}

template <class Arguments>
int run_dtypes(const Arguments& a) {
  if (a.rows < 0 || a.width < 0) return BLIP3O_BAD_ARGUMENT;
  if (!a.rows || !a.width) return BLIP3O_OK;
  return by_dtype(a.dtype, [&](auto t) { return run<decltype(t)>(a); });
}

}  // namespace

extern "C" int blip3o_cuda_swiglu(const blip3o_swiglu_arguments* a) { return run_dtypes(*a); }
extern "C" int blip3o_cuda_swiglu_backward(const blip3o_swiglu_backward_arguments* a) { return run_dtypes(*a); }
