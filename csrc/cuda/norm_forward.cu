// The forward pass of the norms but gated_residual's; norm.cuh says what it computes.
//
// A row is read once and held as it lies in memory while its moments are found; longer rows (CHUNKS 0) are read again, from a
// cache. Short rows take a warp each, several in a block. Which parameters there are is the same for all threads: a branch costs
// nothing beside the loads, and a kernel per case would multiply the time to compile.
#include "norm.cuh"

namespace {

using namespace blip3o;

template <int THREADS, int ROWS, int N, int CHUNKS, class T>
__global__ void __launch_bounds__(THREADS* ROWS, 768 / (THREADS * ROWS)) forward_kernel(NormForward a) {
  __shared__ float scratch[2][2 * (THREADS / 32)];
  const int64_t rows = a.batch * a.tokens, row = static_cast<int64_t>(blockIdx.x) * ROWS + threadIdx.y;
  if (ROWS > 1 && row >= rows) return;  // only where a row is a warp, and no barrier follows
  // 32 bits, as the launcher made sure: a division of 64 is a call.
  const int64_t sample = a.scale ? static_cast<unsigned>(row) / static_cast<unsigned>(a.tokens) : 0;
  const T* x = static_cast<const T*>(a.x) + row * a.stride;
  T* y = static_cast<T*>(a.y) + row * a.width;
  const bool is_float = a.parameter_dtype == BLIP3O_FLOAT32;

  // All loads before the first store, which the compiler would not move them over.
  Packed held[CHUNKS ? CHUNKS : 1], base[CHUNKS ? CHUNKS : 1];
  if constexpr (CHUNKS > 0)
    for_columns<THREADS, N, CHUNKS>(a.width, [&](int64_t i, int chunk) { held[chunk] = load_packed(x + i); });
  if (a.residual) {
    const T* residual = static_cast<const T*>(a.residual) + row * a.residual_stride;
    T* added = static_cast<T*>(a.added) + row * a.width;
    if constexpr (CHUNKS > 0)
      for_columns<THREADS, N, CHUNKS>(a.width, [&](int64_t i, int chunk) { base[chunk] = load_packed(residual + i); });
    for_columns<THREADS, N, CHUNKS>(a.width, [&](int64_t i, int chunk) {
      Floats<N> v, more;
      if constexpr (CHUNKS > 0) v = unpacked<T>(held[chunk]), more = unpacked<T>(base[chunk]);
      else v = load<N>(x + i), more = load<N>(residual + i);
#pragma unroll
      for (int k = 0; k < N; ++k) v.v[k] += more.v[k];
      if constexpr (CHUNKS > 0) held[chunk] = packed<T>(v);
      store<N>(added + i, v);
    });
    x = added;  // from which longer rows are read again, each column by the thread that wrote it
  }
  const auto value = [&](int64_t i, int chunk) {
    if constexpr (CHUNKS > 0) return unpacked<T>(held[chunk]);
    else return load<N>(x + i);
  };
  const auto each = [&](auto f) { for_columns<THREADS, N, CHUNKS>(a.width, [&](int64_t i, int chunk) { f(value(i, chunk)); }); };
  const auto sum = [&](auto& x, int place) { row_sums<THREADS>(x, scratch[place]); };
  const Moments of = moments(a.width, a.eps, a.centred, each, sum);
  for_columns<THREADS, N, CHUNKS>(a.width, [&](int64_t i, int chunk) {
    Floats<N> v = value(i, chunk), weight = load_or<N, T>(a.weight, is_float, i, 1.0f);
    const Floats<N> bias = load_or<N, T>(a.bias, is_float, i, 0.0f);
    const Floats<N> scale = load_or<N, T>(a.scale, is_float, sample * a.scale_stride + i, 0.0f);
    const Floats<N> shift = load_or<N, T>(a.shift, is_float, sample * a.shift_stride + i, 0.0f);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      float n = (v.v[k] - of.mean) * of.rstd;
      if (a.weight && a.round_before_weight) n = to_float(from_float<T>(n));
      if (a.weight) weight.v[k] += a.weight_offset;
      // With a bias as the formula has it, for 0 * infinity; without one weight * (1 + scale) is rounded once.
      v.v[k] = a.bias ? (n * weight.v[k] + bias.v[k]) * (1.0f + scale.v[k]) : n * fmaf(scale.v[k], weight.v[k], weight.v[k]);
      v.v[k] += shift.v[k];
    }
    if constexpr (CHUNKS > 0) held[chunk] = packed<T>(v);
    else store<N>(y + i, v);
  });
  if constexpr (CHUNKS > 0)
    for_columns<THREADS, N, CHUNKS>(a.width, [&](int64_t i, int chunk) { store_packed(y + i, held[chunk]); });
  if (a.saved && threadIdx.x == 0) {
    a.saved[row] = of.rstd;
    if (a.centred) a.saved[rows + row] = of.mean;
  }
}

template <class T>
int run(const NormForward& a) {
  const bool wide = divisible<16 / sizeof(T)>(a.width, a.stride, a.residual_stride, a.scale_stride, a.shift_stride) &&
                    aligned(a.x, a.residual, a.y, a.added, a.scale, a.shift, a.weight, a.bias);
  return by_width<T>(a.width, wide, [&](auto shape) {
    using Shape = decltype(shape);
    const int64_t blocks = (a.batch * a.tokens + Shape::ROWS - 1) / Shape::ROWS;
    if (blocks > 0x7fffffff) return static_cast<int>(BLIP3O_BAD_ARGUMENT);
    return launch(forward_kernel<Shape::THREADS, Shape::ROWS, Shape::N, Shape::CHUNKS, T>, static_cast<unsigned>(blocks),
                  dim3(Shape::THREADS, Shape::ROWS), 0, a.stream, a);
  });
}

}  // namespace

int blip3o::norm_forward(const NormForward& a) {
  if (a.batch < 0 || a.tokens < 0 || a.width < 1) return BLIP3O_BAD_ARGUMENT;
  if (!a.batch || !a.tokens) return BLIP3O_OK;
  if (a.scale && a.batch > 0x7fffffff / a.tokens) return BLIP3O_BAD_ARGUMENT;
  if (!is_parameter(a.parameter_dtype, a.dtype)) return BLIP3O_BAD_DTYPE;
  return by_dtype(a.dtype, [&](auto t) { return run<decltype(t)>(a); });
}
