// Normalise, scale and shift on a GPU; the contract is kernels/blip3o_kernels/ops/modulate.py. Without a scale this is layer_norm.
//
// A row is read once and held as it lies in memory; longer rows (CHUNKS 0) are read again, from a cache. Backwards, norm_backward
// leaves the sums of runs of each sample's tokens; a second kernel makes a sample's dscale and dshift of them and leaves what the
// sample adds to dweight and dbias, which a third adds up.
#include "norm.cuh"

namespace {

using namespace blip3o;

template <int THREADS, int ROWS, int N, int CHUNKS, class T>
__global__ void __launch_bounds__(THREADS* ROWS) forward_kernel(blip3o_modulate_arguments a) {
  __shared__ float scratch[2][2 * (THREADS / 32)];
  const int64_t rows = a.batch * a.tokens, row = static_cast<int64_t>(blockIdx.x) * ROWS + threadIdx.y;
  if (ROWS > 1 && row >= rows) return;  // only where a row is a warp, and no barrier follows
  // 32 bits, as the launcher made sure: a division of 64 is a call.
  const int64_t sample = a.scale ? static_cast<unsigned>(row) / static_cast<unsigned>(a.tokens) : 0;
  const T* x = static_cast<const T*>(a.x) + row * a.stride;
  T* y = static_cast<T*>(a.y) + row * a.width;
  const bool is_float = a.condition_dtype == BLIP3O_FLOAT32;

  Packed held[CHUNKS ? CHUNKS : 1];
  if constexpr (CHUNKS > 0)
    for_columns<THREADS, N, CHUNKS>(a.width, [&](int64_t i, int chunk) { held[chunk] = load_packed(x + i); });
  const auto value = [&](int64_t i, int chunk) {
    if constexpr (CHUNKS > 0) return unpacked<T>(held[chunk]);
    else return load<N>(x + i);
  };
  const auto each = [&](auto f) { for_columns<THREADS, N, CHUNKS>(a.width, [&](int64_t i, int chunk) { f(value(i, chunk)); }); };
  const auto sum = [&](auto& x, int place) { row_sums<THREADS>(x, scratch[place]); };
  const Moments of = moments(a.width, a.eps, a.centred, each, sum);
  for_columns<THREADS, N, CHUNKS>(a.width, [&](int64_t i, int chunk) {
    Floats<N> v = value(i, chunk);
    const Floats<N> weight = load_or<N, T>(a.weight, is_float, i, 1.0f), bias = load_or<N, T>(a.bias, is_float, i, 0.0f);
    const Floats<N> scale = load_or<N, T>(a.scale, is_float, sample * a.scale_stride + i, 0.0f);
    const Floats<N> shift = load_or<N, T>(a.shift, is_float, sample * a.shift_stride + i, 0.0f);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float n = (v.v[k] - of.mean) * of.rstd;
      // With a bias as the formula has it, for 0 * infinity; without one weight * (1 + scale) is rounded once.
      v.v[k] = a.bias ? (n * weight.v[k] + bias.v[k]) * (1.0f + scale.v[k]) : n * fmaf(scale.v[k], weight.v[k], weight.v[k]);
      v.v[k] += shift.v[k];
    }
    store<N>(y + i, v);
  });
  if (a.saved && threadIdx.x == 0) {
    a.saved[row] = of.rstd;
    if (a.centred) a.saved[rows + row] = of.mean;
  }
}

// With a sample's sums s of dy * n and p of dy:   dscale = s * weight + p * bias,   dshift = p,
// and what it adds to dweight, s * (1 + scale), and to dbias, p * (1 + scale), replaces the sums of its first run.
template <class W>
__global__ void __launch_bounds__(COLUMN_THREADS) sample_kernel(blip3o_modulate_backward_arguments a) {
  __shared__ float group[2][COLUMN_THREADS];
  const unsigned width = static_cast<unsigned>(a.width), parts = (width + blockDim.x - 1) / blockDim.x;
  const int64_t sample = blockIdx.x / parts, column = static_cast<int64_t>(blockIdx.x % parts) * blockDim.x + threadIdx.x;
  const bool exists = column < a.width, plain = a.dshift || a.dbias;
  const int64_t apart = (plain ? 2 : 1) * a.width;
  float* partial = a.workspace + sample * a.blocks * apart + column;
  const float s = column_sum(partial, exists, a.blocks, apart, group[0]);
  const float p = plain ? column_sum(partial + a.width, exists, a.blocks, apart, group[1]) : 0.0f;
  if (threadIdx.y || !exists) return;
  const float gain = 1.0f + to_float(static_cast<const W*>(a.scale)[sample * a.scale_stride + column]);
  float dscale = a.weight ? s * to_float(static_cast<const W*>(a.weight)[column]) : s;
  if (a.bias) dscale += p * to_float(static_cast<const W*>(a.bias)[column]);
  static_cast<W*>(a.dscale)[sample * a.width + column] = from_float<W>(dscale);
  if (a.dshift) static_cast<W*>(a.dshift)[sample * a.width + column] = from_float<W>(p);
  if (a.dweight) partial[0] = s * gain;
  if (a.dbias) partial[a.width] = p * gain;
}

template <class T>
int run(const blip3o_modulate_arguments& a) {
  const bool wide = divisible<16 / sizeof(T)>(a.width, a.stride, a.scale_stride, a.shift_stride) &&
                    aligned(a.x, a.y, a.scale, a.shift, a.weight, a.bias);
  return by_width<T>(a.width, wide, [&](auto shape) {
    using Shape = decltype(shape);
    const int64_t blocks = (a.batch * a.tokens + Shape::ROWS - 1) / Shape::ROWS;
    if (blocks > 0x7fffffff) return static_cast<int>(BLIP3O_BAD_ARGUMENT);
    return launch(forward_kernel<Shape::THREADS, Shape::ROWS, Shape::N, Shape::CHUNKS, T>, static_cast<unsigned>(blocks),
                  dim3(Shape::THREADS, Shape::ROWS), 0, a.stream, a);
  });
}

template <class W>
int finish(const blip3o_modulate_backward_arguments& a) {
  const dim3 threads = column_threads(a.blocks);
  const int64_t parts = (a.width + threads.x - 1) / threads.x, apart = (a.dshift || a.dbias ? 2 : 1) * a.width;
  if (a.width > 0x7fffffff || a.batch > 0x7fffffff / parts) return BLIP3O_BAD_ARGUMENT;
  int status = launch(sample_kernel<W>, static_cast<unsigned>(a.batch * parts), threads, 0, a.stream, a);
  const auto add_up = [&](void* to, const float* from) {
    if (to && !status) status = sum_blocks(static_cast<W*>(to), from, a.batch, a.width, a.blocks * apart, a.stream);
  };
  add_up(a.dweight, a.workspace);
  add_up(a.dbias, a.workspace + a.width);
  return status;
}

}  // namespace

int blip3o::normalise(const blip3o_modulate_arguments& a) {
  if (a.batch < 0 || a.tokens < 0 || a.width < 1) return BLIP3O_BAD_ARGUMENT;
  if (!a.batch || !a.tokens) return BLIP3O_OK;
  if (a.scale && a.batch > 0x7fffffff / a.tokens) return BLIP3O_BAD_ARGUMENT;
  if (!is_parameter(a.condition_dtype, a.dtype)) return BLIP3O_BAD_DTYPE;
  return by_dtype(a.dtype, [&](auto t) { return run<decltype(t)>(a); });
}

extern "C" int blip3o_cuda_modulate(const blip3o_modulate_arguments* a) {
  return a->scale || !a->batch ? normalise(*a) : static_cast<int>(BLIP3O_BAD_ARGUMENT);
}

// Without tokens the caller fills the sums with zeros itself.
extern "C" int blip3o_cuda_modulate_backward(const blip3o_modulate_backward_arguments* a) {
  if (a->batch < 0 || a->tokens < 1 || a->width < 1 || a->blocks < 1 || !a->scale) return BLIP3O_BAD_ARGUMENT;
  if (!a->batch) return BLIP3O_OK;
  const int64_t rows = a->batch * a->tokens;
  NormBackward b = {};
  b.dx = a->dx, b.dy = a->dy, b.x = a->x, b.condition = a->scale, b.weight = a->weight;
  b.rstd = a->saved, b.mean = a->centred ? a->saved + rows : nullptr;
  b.partial = a->workspace;
  b.batch = a->batch, b.tokens = a->tokens, b.width = a->width, b.runs = a->blocks;
  b.stride = a->stride, b.condition_stride = a->scale_stride;
  b.condition_offset = 1.0f;
  b.dtype = a->dtype, b.condition_dtype = b.weight_dtype = a->condition_dtype;
  b.normed = 1, b.plain = a->dshift || a->dbias;
  b.stream = a->stream;
  const int status = norm_backward(b);
  if (status) return status;
  return by_dtype(a->condition_dtype, [&](auto w) { return finish<decltype(w)>(*a); });
}
