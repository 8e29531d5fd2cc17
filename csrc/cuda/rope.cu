// Rotary position embedding on a GPU; the contract is kernels/blip3o_kernels/ops/rope.py. The backward pass is the rotation by the
// negative angle. A block takes the heads of one token, which share its angles; a thread N pairs of one head.
#include "device.cuh"

namespace {

using namespace blip3o;

constexpr int THREADS = 128;

// x[i] and x[i + half], or x[2 i] and x[2 i + 1] if INTERLEAVED, of N angles.
template <int N, bool INTERLEAVED, class T>
__device__ inline void load_pairs(const T* x, int64_t i, int64_t half, Floats<N>& first, Floats<N>& second) {
  if constexpr (!INTERLEAVED) {
    first = load<N>(x + i);
    second = load<N>(x + i + half);
  } else if constexpr (N == 1) {  // which need not be aligned to a pair
    first.v[0] = to_float(x[2 * i]), second.v[0] = to_float(x[2 * i + 1]);
  } else {
    const Floats<2 * N> both = load<2 * N>(x + 2 * i);
#pragma unroll
    for (int k = 0; k < N; ++k) first.v[k] = both.v[2 * k], second.v[k] = both.v[2 * k + 1];
  }
}

template <int N, bool INTERLEAVED, class T>
__device__ inline void store_pairs(T* y, int64_t i, int64_t half, const Floats<N>& first, const Floats<N>& second) {
  if constexpr (!INTERLEAVED) {
    store<N>(y + i, first);
    store<N>(y + i + half, second);
  } else if constexpr (N == 1) {
    y[2 * i] = from_float<T>(first.v[0]), y[2 * i + 1] = from_float<T>(second.v[0]);
  } else {
    Floats<2 * N> both;
#pragma unroll
    for (int k = 0; k < N; ++k) both.v[2 * k] = first.v[k], both.v[2 * k + 1] = second.v[k];
    store<2 * N>(y + 2 * i, both);
  }
}

template <int N, bool INTERLEAVED, class T>
__global__ void __launch_bounds__(THREADS) rotate_kernel(blip3o_rope_arguments a) {
  const unsigned tokens = static_cast<unsigned>(a.tokens);
  const int64_t batch = blockIdx.x / tokens, token = blockIdx.x % tokens;
  const int64_t angles = batch * a.table_stride + token * a.half;
  const float sign = a.inverse ? -1.0f : 1.0f;
  const T* x = static_cast<const T*>(a.x) + batch * a.x_batch + token * a.x_token;
  T* y = static_cast<T*>(a.y) + batch * a.y_batch + token * a.y_token;
  // 32 bits, as the launcher made sure: a division of 64 is a call.
  const unsigned parts = static_cast<unsigned>(a.half / N), rest = static_cast<unsigned>(a.head_dim - 2 * a.half);
  for (unsigned item = threadIdx.x; item < a.heads * parts; item += THREADS) {
    const int64_t head = item / parts, i = item % parts * N;
    const Floats<N> cos = load<N>(a.cos + angles + i), sin = load<N>(a.sin + angles + i);
    Floats<N> first, second;
    load_pairs<N, INTERLEAVED>(x + head * a.x_head, i, a.half, first, second);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float u = first.v[k], v = second.v[k], s = sin.v[k] * sign;
      first.v[k] = u * cos.v[k] - v * s;
      second.v[k] = v * cos.v[k] + u * s;
    }
    store_pairs<N, INTERLEAVED>(y + head * a.y_head, i, a.half, first, second);
  }
  for (unsigned item = threadIdx.x; item < a.heads * rest; item += THREADS) {  // dims that do not turn
    const int64_t head = item / rest, i = 2 * a.half + item % rest;
    y[head * a.y_head + i] = x[head * a.x_head + i];
  }
}

template <class T>
int run(const blip3o_rope_arguments& a) {
  constexpr int N = 16 / sizeof(T);
  const unsigned blocks = static_cast<unsigned>(a.batch * a.tokens);
  const bool wide = divisible<N>(a.half, a.table_stride, a.x_batch, a.x_head, a.x_token, a.y_batch, a.y_head, a.y_token) &&
                    aligned(a.x, a.y, a.cos, a.sin);
  const auto kernel = a.interleaved ? (wide ? rotate_kernel<N / 2, true, T> : rotate_kernel<1, true, T>)
                                    : (wide ? rotate_kernel<N, false, T> : rotate_kernel<1, false, T>);
  return launch(kernel, blocks, THREADS, 0, a.stream, a);
}

}  // namespace

extern "C" int blip3o_cuda_rope(const blip3o_rope_arguments* a) {
  if (a->half < 0 || 2 * a->half > a->head_dim || a->batch < 0 || a->heads < 0 || a->tokens < 0) return BLIP3O_BAD_ARGUMENT;
  if (a->tokens && a->batch > 0x7fffffff / a->tokens) return BLIP3O_BAD_ARGUMENT;
  if (a->head_dim && a->heads > 0x7fffffff / a->head_dim) return BLIP3O_BAD_ARGUMENT;
  if (!a->batch || !a->heads || !a->tokens || !a->head_dim) return BLIP3O_OK;
  return by_dtype(a->dtype, [&](auto t) { return run<decltype(t)>(*a); });
}
