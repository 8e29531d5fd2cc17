// The two products of attention on tiles in shared memory, by tensor cores for 16-bit elements, by multiply-adds for float32.
//
// Either says how a warp shares a product. A thread has ROWS of the warp's WARP_ROWS rows, row(i); with it LANES threads share
// them, neighbours by the lowest bits of the lane. Of a product of N columns a thread has N / LANES: of scores column(j), of a row of
// values wide_column(j).
//     outer   s += x y^T,  x [WARP_ROWS, D] and y [N, D] tiles
//     mix     o += p y,    p [WARP_ROWS, N] as `outer` left it, rounded to T, y [N, D] a tile, of which columns from `first` on
// What lies beyond the first `width` columns of tiles is 0, which multiply-adds make use of.
#pragma once

#include "attention_tiles.cuh"

namespace blip3o {

template <class T_, int D_, int M>
struct TensorCores {
  using T = T_;
  static constexpr int D = D_, ROWS = 2 * M, WARP_ROWS = 16 * M, LANES = 4, SCRATCH = 0;

  static __device__ int row(int i) { return threadIdx.x % WARP / 4 + 8 * i; }
  static __device__ int column(int j) { return j / 2 * 8 + threadIdx.x % 4 * 2 + j % 2; }
  static __device__ int wide_column(int j) { return column(j); }

  template <int C>
  static __device__ void outer(float (&s)[ROWS][C], T* x, int x_row, T* y, int y_row, int) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < D / 8; k += 2) {
      uint32_t a[M][4];
#pragma unroll
      for (int m = 0; m < M; ++m) ldmatrix(a[m], piece<D>(x, x_row + 16 * m + lane % 16, k + lane / 16));
#pragma unroll
      for (int n = 0; n < C; n += 4) {  // 16 columns
        uint32_t b[4];
        ldmatrix(b, piece<D>(y, y_row + 4 * n + lane / 16 * 8 + lane % 8, k + lane / 8 % 2));
#pragma unroll
        for (int m = 0; m < M; ++m) {
          float(&low)[C] = s[2 * m], (&high)[C] = s[2 * m + 1];
          mma<T>(low[n], low[n + 1], high[n], high[n + 1], a[m], b[0], b[1]);
          mma<T>(low[n + 2], low[n + 3], high[n + 2], high[n + 3], a[m], b[2], b[3]);
        }
      }
    }
  }

  template <int C, int W>
  static __device__ void mix(float (&o)[ROWS][W], const float (&p)[ROWS][C], T* y, int y_row, int first, int, float*) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < C; k += 4) {  // 16 rows of y
      uint32_t a[M][4];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const float(&low)[C] = p[2 * m], (&high)[C] = p[2 * m + 1];
        a[m][0] = pack<T>(low[k], low[k + 1]), a[m][1] = pack<T>(high[k], high[k + 1]);
        a[m][2] = pack<T>(low[k + 2], low[k + 3]), a[m][3] = pack<T>(high[k + 2], high[k + 3]);
      }
#pragma unroll
      for (int n = 0; n < W; n += 4) {
        uint32_t b[4];
        ldmatrix<true>(b, piece<D>(y, y_row + 4 * k + lane % 16, first / 8 + n / 2 + lane / 16));
#pragma unroll
        for (int m = 0; m < M; ++m) {
          float(&low)[W] = o[2 * m], (&high)[W] = o[2 * m + 1];
          mma<T>(low[n], low[n + 1], high[n], high[n + 1], a[m], b[0], b[1]);
          mma<T>(low[n + 2], low[n + 3], high[n + 2], high[n + 3], a[m], b[2], b[3]);
        }
      }
    }
  }
};

// TF32 would break the bound of float32, so its products are multiply-adds. Half a warp shares four rows.
template <int D_>
struct MultiplyAdds {
  using T = float;
  static constexpr int D = D_, ROWS = 4, WARP_ROWS = 8, LANES = 16, SCRATCH = WARP_ROWS;  // floats for each column

  static __device__ int row(int i) { return threadIdx.x % WARP / 16 * 4 + i; }
  static __device__ int column(int j) { return threadIdx.x % 16 + 16 * j; }
  static __device__ int wide_column(int j) { return j / 4 * 64 + threadIdx.x % 16 * 4 + j % 4; }

  template <int C>
  static __device__ void outer(float (&s)[ROWS][C], float* x, int x_row, float* y, int y_row, int width) {
    Floats<4> sums[ROWS][C] = {};  // in four parts, which round less than one
#pragma unroll 2
    for (int k = 0; k < (width + 3) / 4; ++k) {
      Floats<4> rows[ROWS];
#pragma unroll
      for (int i = 0; i < ROWS; ++i) rows[i] = load<4>(piece<D>(x, x_row + row(i), k));
#pragma unroll
      for (int j = 0; j < C; ++j) {
        const Floats<4> other = load<4>(piece<D>(y, y_row + column(j), k));
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[i][j].v[e] = fmaf(rows[i].v[e], other.v[e], sums[i][j].v[e]);
      }
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int j = 0; j < C; ++j) s[i][j] += (sums[i][j].v[0] + sums[i][j].v[1]) + (sums[i][j].v[2] + sums[i][j].v[3]);
  }

  // Every thread needs all of p: it goes through `scratch`, which is the warp's own.
  template <int C, int W>
  static __device__ void mix(float (&o)[ROWS][W], const float (&p)[ROWS][C], float* y, int y_row, int first, int width,
                             float* scratch) {
    constexpr int N = C * LANES;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int j = 0; j < C; ++j) scratch[row(i) * N + column(j)] = p[i][j];
    __syncwarp();
#pragma unroll 1
    for (int k = 0; k < N; k += 4) {
      Floats<4> weights[ROWS];
#pragma unroll
      for (int i = 0; i < ROWS; ++i) weights[i] = load<4>(scratch + row(i) * N + k);
#pragma unroll
      for (int e = 0; e < 4; ++e)
#pragma unroll
        for (int j = 0; j < W; j += 4) {
          if (first + j * LANES >= width) break;  // zeros from here on, for all threads
          const Floats<4> value = load<4>(piece<D>(y, y_row + k + e, (first + wide_column(j)) / 4));
#pragma unroll
          for (int i = 0; i < ROWS; ++i)
#pragma unroll
            for (int x = 0; x < 4; ++x) o[i][j + x] = fmaf(weights[i].v[e], value.v[x], o[i][j + x]);
        }
    }
  }
};

// The sum, or the largest, of what the threads of a row have, in all of them.
template <class Product>
__device__ inline float row_sum(float x) {
#pragma unroll
  for (int lane = 1; lane < Product::LANES; lane *= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
  return x;
}
template <class Product>
__device__ inline float row_largest(float x) {
#pragma unroll
  for (int lane = 1; lane < Product::LANES; lane *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lane));
  return x;
}

// A warp's product, times `scale` of each row, to the tile's rows `row`, rounded: on its way to memory.
template <class Product, int W>
__device__ inline void to_tile(typename Product::T* tile, int row, const float (&o)[Product::ROWS][W],
                               const float (&scale)[Product::ROWS], int first) {
  using T = typename Product::T;
  constexpr int N = 16 / sizeof(T), TOGETHER = Product::LANES == 4 ? 2 : 4;  // neighbouring columns of a thread
  __syncwarp();  // other lanes may still read what is there
#pragma unroll
  for (int i = 0; i < Product::ROWS; ++i)
#pragma unroll
    for (int j = 0; j < W; j += TOGETHER) {
      const int column = first + Product::wide_column(j);
      Floats<TOGETHER> some;
#pragma unroll
      for (int e = 0; e < TOGETHER; ++e) some.v[e] = scale[i] == 0.0f ? 0.0f : o[i][j + e] * scale[i];
      store<TOGETHER>(piece<Product::D>(tile, row + Product::row(i), column / N) + column % N, some);
    }
  __syncwarp();
}

}  // namespace blip3o
