// What layer_norm, modulate and gated_residual share: normalising a group of rows of one sample at a time, so that the gains
// are loaded once per group and the sums of the rows do not wait for each other.
// Included once per instruction set by an op's body: no include guard, no includes.
//
//   groups(rows, f)      f(row, number) for every group of rows
//   moments              1/std and, if CENTRED, the mean of a group's rows
//   backward_rows        dx, and what the rows add to the sums over rows

#include "columns.h"

const int64_t GROUP = 4;  // rows; their x and dy shall fit the first cache at widths up to a thousand

// f(first, number) for every group of rows among `rows`; number is a constant, 4 or 1.
template <int N>
struct Number {
  static constexpr int value = N;
};
template <class F>
static inline void groups(int64_t rows, F f) {
  int64_t row = 0;
  for (; row + GROUP <= rows; row += GROUP) f(row, Number<GROUP>{});
  for (; row < rows; ++row) f(row, Number<1>{});
}

template <int R, bool CENTRED, class T>
static inline void moments(float* rstd, float* mean, const T* x, int64_t stride, int64_t width, float eps) {
  Floats centre[R] = {}, left[R] = {}, sums[R] = {};
  if (CENTRED) {
    columns(width, [&](int64_t i, auto n) {
      for (int r = 0; r < R; ++r) centre[r] += load(x + r * stride + i, n);
    });
    for (int r = 0; r < R; ++r) {
      mean[r] = sum(centre[r]) / static_cast<float>(width);
      centre[r] = all(mean[r]);
    }
  }
  columns(width, [&](int64_t i, auto n) {
    for (int r = 0; r < R; ++r) {
      Floats v = load(x + r * stride + i, n);
      if (CENTRED) {
        v = only(v - centre[r], n);
        left[r] += v;
      }
      sums[r] += v * v;
    }
  });
  for (int r = 0; CENTRED && r < R; ++r) mean[r] += sum(left[r]) / static_cast<float>(width);  // what rounding left
  for (int r = 0; r < R; ++r)  // in double: a whole row shares the error of this one number
    rstd[r] = static_cast<float>(1.0 / std::sqrt(static_cast<double>(sum(sums[r])) / static_cast<double>(width) + eps));
}

// With n = (x - mean) * rstd and u = dy * gain:
//   dx = rstd * (u - mean(u) - n * mean(u * n)), without mean(u) if not CENTRED
//   scaled [width] takes the sum of dy * n, plain [width] that of dy; `first`: they start here.
template <int R, bool CENTRED, class T, class D>
static inline void backward_rows(T* dx, float* scaled, float* plain, bool first, const D* dy, const T* x, int64_t stride,
                                 const float* gain, const float* rstds, const float* means, int64_t width) {
  Floats rstd[R], mean[R] = {}, dots[R] = {}, totals[R] = {};
  for (int r = 0; r < R; ++r) {
    rstd[r] = all(rstds[r]);
    if (CENTRED) mean[r] = all(means[r]);
  }
  columns(width, [&](int64_t i, auto n) {
    const Floats g = load(gain + i, n);
    for (int r = 0; r < R; ++r) {
      const Floats u = g * load(dy + r * width + i, n), v = load(x + r * stride + i, n);
      dots[r] += u * (CENTRED ? v - mean[r] : v);
      if (CENTRED) totals[r] += u;
    }
  });
  for (int r = 0; r < R; ++r) {
    dots[r] = all(sum(dots[r]) * rstds[r] / static_cast<float>(width));
    if (CENTRED) totals[r] = all(sum(totals[r]) / static_cast<float>(width));
  }
  columns(width, [&](int64_t i, auto n) {
    const Floats g = load(gain + i, n);
    Floats s{}, p{};  // of these rows alone: shorter chains round less
    for (int r = 0; r < R; ++r) {
      const Floats d = load(dy + r * width + i, n), v = load(x + r * stride + i, n);
      const Floats normed = (CENTRED ? v - mean[r] : v) * rstd[r];
      s += d * normed;
      p += d;
      const Floats u = CENTRED ? g * d - totals[r] : g * d;
      store(dx + r * width + i, rstd[r] * (u - normed * dots[r]), n);
    }
    store(scaled + i, first ? s : load(scaled + i, n) + s, n);
    store(plain + i, first ? p : load(plain + i, n) + p, n);
  });
}

// to [width] = the sum of `blocks` rows that lie `stride` apart, in their order.
template <class W>
static inline void add_up(W* to, const float* from, int64_t blocks, int64_t stride, int64_t width) {
  columns(width, [&](int64_t i, auto n) {
    Floats total{};
    for (int64_t block = 0; block < blocks; ++block) total += load(from + block * stride + i, n);
    store(to + i, total, n);
  });
}
