// A tanh-gated residual branch on a GPU; the contract is kernels/blip3o_kernels/ops/gated_residual.py.
//
// A block takes a few tokens of one sample, whose gate it opens once: a hyperbolic tangent for every element would cost more than
// the memory. Backwards as in modulate.cu; the gradient of the residual is dy itself.
#include "norm.cuh"

namespace {

using namespace blip3o;

// From how many rows on a GPU has enough blocks though each takes several tokens. On the host: so few that the tests see both.
#ifdef __CUDACC__
constexpr int64_t MANY_ROWS = 8192;
#else
constexpr int64_t MANY_ROWS = 2;
#endif

// Near 0: x + x^3 q(x^2), as in csrc/cpu/vector.h, for 1 - 2 / (e^2|x| + 1) would cancel there. tanhf may be off by two units. The fast
// quotient is off by two of a number below a half; the exact one is a call, around which registers are spilled.
__device__ inline float hyperbolic_tangent(float x) {
  const float square = x * x, size = fabsf(x);
  float q = -6.044799e-3f * square + 2.096098e-2f;
  q = q * square - 5.384315e-2f;
  q = q * square + 1.3332717e-1f;
  q = q * square - 3.3333328e-1f;
  return size < 0.6f ? x * square * q + x : copysignf(1.0f - __fdividef(2.0f, expf(2.0f * size) + 1.0f), x);
}

// `runs` blocks for each sample, of `each` tokens for every row of the block.
template <int THREADS, int ROWS, int N, int CHUNKS, class T>
__global__ void __launch_bounds__(THREADS* ROWS)
    forward_kernel(blip3o_gated_residual_arguments a, unsigned runs, unsigned each) {
  __shared__ float scratch[2][2 * (THREADS / 32)];
  const int64_t sample = blockIdx.x / runs, run = blockIdx.x % runs, count = each * ROWS;
  const int64_t last = (run + 1) * count < a.tokens ? (run + 1) * count : a.tokens;
  const bool is_float = a.condition_dtype == BLIP3O_FLOAT32;
  float *opened = a.saved + sample * a.width, *rstds = a.saved + a.batch * a.width;

  // tanh(gate) * weight
  const auto gain_at = [&](int64_t i) {
    Floats<N> gain = load_parameter<N, T>(a.gate, is_float, sample * a.gate_stride + i);
#pragma unroll
    for (int k = 0; k < N; ++k) gain.v[k] = hyperbolic_tangent(gain.v[k]);
    if (run == 0 && threadIdx.y == 0) store<N>(opened + i, gain);
    const Floats<N> weight = load_or<N, T>(a.weight, is_float, i, 1.0f);
#pragma unroll
    for (int k = 0; k < N; ++k) gain.v[k] *= weight.v[k];
    return gain;
  };
  Held<N, CHUNKS> gains;
  if constexpr (CHUNKS > 0)
    for_columns<THREADS, N, CHUNKS>(a.width, [&](int64_t i, int chunk) { gains.chunk[chunk] = gain_at(i); });

  for (int64_t token = run * count + threadIdx.y, turn = 0; token < last; token += ROWS, turn ^= 1) {
    const int64_t row = sample * a.tokens + token;
    const T* residual = static_cast<const T*>(a.residual) + row * a.residual_stride;
    const T* x = static_cast<const T*>(a.x) + row * a.stride;
    T* y = static_cast<T*>(a.y) + row * a.width;
    Packed held[CHUNKS ? CHUNKS : 1], base[CHUNKS ? CHUNKS : 1];
    if constexpr (CHUNKS > 0)
      for_columns<THREADS, N, CHUNKS>(a.width, [&](int64_t i, int chunk) {
        held[chunk] = load_packed(x + i);
        base[chunk] = load_packed(residual + i);
      });
    const auto value = [&](int64_t i, int chunk) {
      if constexpr (CHUNKS > 0) return unpacked<T>(held[chunk]);
      else return load<N>(x + i);
    };
    float rstd = 1;
    if (a.weight) {
      const auto each = [&](auto f) {
        for_columns<THREADS, N, CHUNKS>(a.width, [&](int64_t i, int chunk) { f(value(i, chunk)); });
      };
      // By turns: the barrier inside lets the token after the next write to the same place again.
      const auto sum = [&](auto& x, int) { row_sums<THREADS>(x, scratch[turn]); };
      rstd = moments(a.width, a.eps, false, each, sum).rstd;
      if (threadIdx.x == 0) rstds[row] = rstd;
    }
    for_columns<THREADS, N, CHUNKS>(a.width, [&](int64_t i, int chunk) {
      const Floats<N> v = value(i, chunk);
      Floats<N> sum, gain;
      if constexpr (CHUNKS > 0) sum = unpacked<T>(base[chunk]), gain = gains.chunk[chunk];
      else sum = load<N>(residual + i), gain = gain_at(i);
#pragma unroll
      for (int k = 0; k < N; ++k) sum.v[k] += gain.v[k] * (v.v[k] * rstd);
      store<N>(y + i, sum);
    });
  }
}

// With a sample's sum s of dy * n and t = tanh(gate):   dgate = (1 - t^2) * s * weight,
// and what it adds to dweight, s * t, replaces the sum of its first run.
template <class W>
__global__ void __launch_bounds__(COLUMN_THREADS) sample_kernel(blip3o_gated_residual_backward_arguments a) {
  __shared__ float group[COLUMN_THREADS];
  const unsigned width = static_cast<unsigned>(a.width), parts = (width + blockDim.x - 1) / blockDim.x;
  const int64_t sample = blockIdx.x / parts, column = static_cast<int64_t>(blockIdx.x % parts) * blockDim.x + threadIdx.x;
  const bool exists = column < a.width;
  float* partial = a.workspace + sample * a.blocks * a.width + column;
  const float s = column_sum(partial, exists, a.blocks, a.width, group);
  if (threadIdx.y || !exists) return;
  const float t = a.saved[sample * a.width + column], slope = 1.0f - t * t;
  const float weighted = a.weight ? s * to_float(static_cast<const W*>(a.weight)[column]) : s;
  static_cast<W*>(a.dgate)[sample * a.width + column] = from_float<W>(slope * weighted);
  if (a.dweight) partial[0] = s * t;
}

template <class T>
int run(const blip3o_gated_residual_arguments& a) {
  const bool wide = divisible<16 / sizeof(T)>(a.width, a.stride, a.residual_stride, a.gate_stride) &&
                    aligned(a.y, a.saved, a.residual, a.x, a.gate, a.weight);
  return by_width<T>(a.width, wide, [&](auto shape) {
    using Shape = decltype(shape);
    const int64_t each = a.batch * a.tokens < MANY_ROWS ? 1 : 4;
    const int64_t runs = (a.tokens + each * Shape::ROWS - 1) / (each * Shape::ROWS);
    return launch(forward_kernel<Shape::THREADS, Shape::ROWS, Shape::N, Shape::CHUNKS, T>,
                  static_cast<unsigned>(a.batch * runs), dim3(Shape::THREADS, Shape::ROWS), 0, a.stream, a,
                  static_cast<unsigned>(runs), static_cast<unsigned>(each));
  });
}

template <class W>
int finish(const blip3o_gated_residual_backward_arguments& a) {
  const dim3 threads = column_threads(a.blocks);
  const int64_t parts = (a.width + threads.x - 1) / threads.x;
  if (a.width > 0x7fffffff || a.batch > 0x7fffffff / parts) return BLIP3O_BAD_ARGUMENT;
  const int status = launch(sample_kernel<W>, static_cast<unsigned>(a.batch * parts), threads, 0, a.stream, a);
  if (status || !a.dweight) return status;
  return sum_blocks(static_cast<W*>(a.dweight), a.workspace, a.batch, a.width, a.blocks * a.width, a.stream);
}

}  // namespace

extern "C" int blip3o_cuda_gated_residual(const blip3o_gated_residual_arguments* a) {
  if (a->batch < 0 || a->tokens < 0 || a->width < 1) return BLIP3O_BAD_ARGUMENT;
  if (!a->batch || !a->tokens) return BLIP3O_OK;
  if (a->batch > 0x7fffffff / a->tokens) return BLIP3O_BAD_ARGUMENT;
  if (!is_parameter(a->condition_dtype, a->dtype)) return BLIP3O_BAD_DTYPE;
  return by_dtype(a->dtype, [&](auto t) { return run<decltype(t)>(*a); });
}

// Without tokens the caller fills the sums with zeros itself.
extern "C" int blip3o_cuda_gated_residual_backward(const blip3o_gated_residual_backward_arguments* a) {
  if (a->batch < 0 || a->tokens < 1 || a->width < 1 || a->blocks < 1) return BLIP3O_BAD_ARGUMENT;
  if (!a->batch) return BLIP3O_OK;
  NormBackward b = {};
  b.dx = a->dx, b.dy = a->dy, b.x = a->x, b.condition = a->saved, b.weight = a->weight;
  b.rstd = a->saved + a->batch * a->width;
  b.partial = a->workspace;
  b.batch = a->batch, b.tokens = a->tokens, b.width = a->width, b.runs = a->blocks;
  b.stride = a->stride, b.condition_stride = a->width;
  b.dtype = a->dtype, b.condition_dtype = BLIP3O_FLOAT32, b.weight_dtype = a->condition_dtype;
  b.normed = a->weight != nullptr;
  b.stream = a->stream;
  const int status = norm_backward(b);
  if (status) return status;
  return by_dtype(a->condition_dtype, [&](auto w) { return finish<decltype(w)>(*a); });
}
