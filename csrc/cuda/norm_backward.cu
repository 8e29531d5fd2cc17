// The backward pass of all norms; norm.cuh says what it computes.
//
// x and dy are read once: a row is held while its sums are found, and the next row is on its way meanwhile. Only rows of more
// columns than the registers hold (CHUNKS 0) are read twice, the second time from a cache. No atomics: a block owns a run of rows
// and adds up what they give in registers, what comes after adds up the runs in order.
#include "norm.cuh"

namespace {

using namespace blip3o;

// A row as it lies in memory, and its moments.
template <int CHUNKS>
struct Row {
  Packed x[CHUNKS], dy[CHUNKS], more[CHUNKS];
  float rstd, mean;
};

template <int N, class T>
__device__ inline Floats<N> load_gain(const NormBackward& a, int64_t sample, int64_t i) {
  Floats<N> gain;
#pragma unroll
  for (int k = 0; k < N; ++k) gain.v[k] = 1.0f;
  if (a.condition) {
    gain = load_parameter<N, T>(a.condition, a.condition_dtype == BLIP3O_FLOAT32, sample * a.condition_stride + i);
#pragma unroll
    for (int k = 0; k < N; ++k) gain.v[k] += a.condition_offset;
  }
  if (a.weight) {
    const Floats<N> weight = load_parameter<N, T>(a.weight, a.weight_dtype == BLIP3O_FLOAT32, i);
#pragma unroll
    for (int k = 0; k < N; ++k) gain.v[k] *= a.weight_offset + weight.v[k];
  }
  return gain;
}

// RMS: as rms_backward says, otherwise as norm_backward.
template <int THREADS, int ROWS, int N, int CHUNKS, bool RMS, class T>
__global__ void __launch_bounds__(THREADS* ROWS, 512 / (THREADS * ROWS)) backward_kernel(NormBackward a) {
  __shared__ float scratch[2][2 * (THREADS / 32)];
  const unsigned runs = static_cast<unsigned>(a.runs), run = blockIdx.x % runs;
  const int64_t sample = blockIdx.x / runs;
  const int64_t first = sample * a.tokens + run * a.each + (run < a.left ? run : a.left);
  const int64_t last = first + a.each + (run < a.left);
  const float count = static_cast<float>(a.width);
  float* partial = a.partial ? a.partial + static_cast<int64_t>(blockIdx.x) * (a.plain ? 2 : 1) * a.width : nullptr;

  Held<N, CHUNKS> gains, scaled = {}, plain = {};
  for_columns<THREADS, N, CHUNKS>(a.width, [&](int64_t i, int chunk) {
    if constexpr (CHUNKS > 0) {
      gains.chunk[chunk] = load_gain<N, T>(a, sample, i);
    } else if (partial) {
      store<N>(partial + i, Floats<N>{});
      if (a.plain) store<N>(partial + a.width + i, Floats<N>{});
    }
  });

  const auto x_row = [&](int64_t row) { return static_cast<const T*>(a.x) + row * a.stride; };
  const auto dy_row = [&](int64_t row) { return static_cast<const T*>(a.dy) + row * a.width; };
  const auto more_row = [&](int64_t row) { return static_cast<const T*>(a.more) + row * a.width; };
  const auto read = [&](Row<CHUNKS ? CHUNKS : 1>& to, int64_t row) {
    if constexpr (!RMS) {
      to.rstd = a.normed ? a.rstd[row] : 1.0f;
      to.mean = a.mean ? a.mean[row] : 0.0f;
    }
    if constexpr (CHUNKS > 0)
      for_columns<THREADS, N, CHUNKS>(a.width, [&](int64_t i, int chunk) {
        to.x[chunk] = load_packed(x_row(row) + i);
        to.dy[chunk] = load_packed(dy_row(row) + i);
        if (RMS && a.more) to.more[chunk] = load_packed(more_row(row) + i);
      });
  };

  Row<CHUNKS ? CHUNKS : 1> now, next;
  int64_t row = first + threadIdx.y;
  if (row < last) read(now, row);
  for (; row < last; row += ROWS) {
    if (row + ROWS < last) read(next, row + ROWS);
    // u = dy * gain: a product that is rounded, so that the difference of two that are equal is 0.
    const auto at = [&](int64_t i, int chunk, Floats<N>& x, Floats<N>& dy, Floats<N>& u) {
      Floats<N> gain;
      if constexpr (CHUNKS > 0) {
        x = unpacked<T>(now.x[chunk]), dy = unpacked<T>(now.dy[chunk]), gain = gains.chunk[chunk];
      } else {
        x = load<N>(x_row(row) + i), dy = load<N>(dy_row(row) + i), gain = load_gain<N, T>(a, sample, i);
      }
#pragma unroll
      for (int k = 0; k < N; ++k) u.v[k] = __fmul_rn(dy.v[k], gain.v[k]);
    };
    float mean = 0, rstd = 1, shared = 0, dot = 0;  // dx = rstd * (u - shared - n * dot)
    if constexpr (!RMS) mean = now.mean, rstd = now.rstd;
    if (RMS || a.normed) {
      float sums[2] = {};  // of u * (x - mean), and of u, or of squares
      for_columns<THREADS, N, CHUNKS>(a.width, [&](int64_t i, int chunk) {
        Floats<N> x, dy, u;
        at(i, chunk, x, dy, u);
#pragma unroll
        for (int k = 0; k < N; ++k) {
          sums[0] += u.v[k] * (x.v[k] - mean);
          sums[1] += RMS ? x.v[k] * x.v[k] : u.v[k];
        }
      });
      // By turns: the barrier inside lets the row after the next write to the same place again.
      row_sums<THREADS>(sums, scratch[(row - first) & 1]);
      if constexpr (RMS) rstd = reciprocal_root(sums[1], count, a.eps);
      if (!RMS && a.mean) shared = sums[1] / count;
      dot = sums[0] * rstd / count;
    }
    T* dx = static_cast<T*>(a.dx) + row * a.width;
    for_columns<THREADS, N, CHUNKS>(a.width, [&](int64_t i, int chunk) {
      Floats<N> x, dy, u, more = {};
      at(i, chunk, x, dy, u);
      if (RMS && a.more) {
        if constexpr (CHUNKS > 0) more = unpacked<T>(now.more[chunk]);
        else more = load<N>(more_row(row) + i);
      }
      Floats<N>&s = scaled.chunk[CHUNKS ? chunk : 0], &p = plain.chunk[CHUNKS ? chunk : 0];
      if (CHUNKS == 0 && partial) {
        s = load<N>(partial + i);
        if (a.plain) p = load<N>(partial + a.width + i);
      }
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const float n = (x.v[k] - mean) * rstd;
        s.v[k] += dy.v[k] * n;
        if (!RMS) p.v[k] += dy.v[k];
        // Without a norm x is no part of it: 0 times infinity is NaN.
        if (RMS || a.normed) u.v[k] = rstd * (u.v[k] - shared - n * dot) + more.v[k];
      }
      store<N>(dx + i, u);
      if (CHUNKS == 0 && partial) {
        store<N>(partial + i, s);
        if (a.plain) store<N>(partial + a.width + i, p);
      }
    });
    now = next;
  }

  if (CHUNKS == 0 || !partial) return;
  if constexpr (ROWS == 1) {
    for_columns<THREADS, N, CHUNKS>(a.width, [&](int64_t i, int chunk) {
      store<N>(partial + i, scaled.chunk[chunk]);
      if (!RMS && a.plain) store<N>(partial + a.width + i, plain.chunk[chunk]);
    });
  } else {  // the warps' sums, in order
    struct alignas(16) Sums {
      float v[ROWS][THREADS * N * CHUNKS];
    };
    __shared__ Sums of[RMS ? 1 : 2];
    for_columns<THREADS, N, CHUNKS>(a.width, [&](int64_t i, int chunk) {
      store<N>(&of[0].v[threadIdx.y][i], scaled.chunk[chunk]);
      if (!RMS) store<N>(&of[RMS ? 0 : 1].v[threadIdx.y][i], plain.chunk[chunk]);
    });
    __syncthreads();
#pragma unroll
    for (int which = 0; which < (RMS ? 1 : 2); ++which) {
      if (which && !a.plain) break;
      for (int64_t i = threadIdx.y * THREADS + threadIdx.x; i < a.width; i += THREADS * ROWS) {
        float sum = of[which].v[0][i];
#pragma unroll
        for (int warp = 1; warp < ROWS; ++warp) sum += of[which].v[warp][i];
        partial[which * a.width + i] = sum;
      }
    }
  }
}

template <bool RMS>
int launch_backward(NormBackward a) {
  if (a.batch < 0 || a.tokens < 0 || a.width < 1 || a.runs < 1) return BLIP3O_BAD_ARGUMENT;
  if (!a.batch) return BLIP3O_OK;
  if (a.batch > 0x7fffffff / a.runs) return BLIP3O_BAD_ARGUMENT;
  a.each = a.tokens / a.runs;
  a.left = a.tokens % a.runs;
  return by_dtype(a.dtype, [&](auto t) -> int {
    using T = decltype(t);
    if (!is_parameter(a.condition_dtype, a.dtype) || !is_parameter(a.weight_dtype, a.dtype)) return BLIP3O_BAD_DTYPE;
    const bool wide = divisible<16 / sizeof(T)>(a.width, a.stride, a.condition_stride) &&
                      aligned(a.dx, a.dy, a.x, a.more, a.condition, a.weight, a.partial);
    return by_width_adding<T>(a.width, wide, [&](auto shape) {
      using Shape = decltype(shape);
      return launch(backward_kernel<Shape::THREADS, Shape::ROWS, Shape::N, Shape::CHUNKS, RMS, T>,
                    static_cast<unsigned>(a.batch * a.runs), dim3(Shape::THREADS, Shape::ROWS), 0, a.stream, a);
    });
  });
}

}  // namespace

int blip3o::norm_backward(NormBackward a) { return launch_backward<false>(a); }
int blip3o::rms_backward(NormBackward a) { return launch_backward<true>(a); }
