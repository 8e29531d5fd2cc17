// What the norms share: normalising a group of rows of one sample at a time, so that the gains
// are loaded once per group and the sums of the rows do not wait for each other.
// Included once per instruction set by an op's body: no include guard, no includes.
//
//   groups(rows, f)      f(row, number) for every group of rows
//   moments              1/std and, if CENTRED, the mean of a group's rows
//   backward_rows        dx, and what the rows add to the sums over rows
//   rms_backward_rows    the same for an RMS norm that left no moments

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

// Sums over a group's rows in runs of 32 vectors: one chain over a wide row would lose a digit that all its elements share. Where
// lanes are few there are so many runs that they are added up in double.
typedef std::conditional<BLIP3O_LANES == 4, Doubles, Floats>::type Runs;
template <int R>
struct RowSums {
  Runs whole[R];
  Floats run[R];
  RowSums() {  // member by member: GCC would clear the whole array in memory, and leave it there
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) whole[r] = Runs{}, run[r] = Floats{};
  }
  void add(int r, int64_t i, Floats v) {
    run[r] += v;
    if ((i / BLIP3O_LANES & 31) == 31) whole[r] += __builtin_convertvector(run[r], Runs), run[r] = Floats{};
  }
  float value(int r) const { return static_cast<float>(sum(whole[r] + __builtin_convertvector(run[r], Runs))); }
};

static inline float reciprocal_rms(float squares, int64_t width, float eps) {
  // In double: a whole row shares the error of this one number.
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(squares) / static_cast<double>(width) + eps));
}

template <int R, bool CENTRED, class T>
static inline void moments(float* rstd, float* mean, const T* x, int64_t stride, int64_t width, float eps) {
  RowSums<R> sums, squares;
  Floats centre[R] = {}, left[R] = {};
  if (CENTRED) {
    columns(width, [&](int64_t i, auto n) {
      for (int r = 0; r < R; ++r) sums.add(r, i, load(x + r * stride + i, n));
    });
    for (int r = 0; r < R; ++r) {
      mean[r] = sums.value(r) / static_cast<float>(width);
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
      squares.add(r, i, v * v);
    }
  });
  for (int r = 0; CENTRED && r < R; ++r) mean[r] += sum(left[r]) / static_cast<float>(width);  // what rounding left
  for (int r = 0; r < R; ++r) rstd[r] = reciprocal_rms(squares.value(r), width, eps);
}

// With n = (x - mean) * rstd and u = dy * gain:
//   dx = rstd * (u - mean(u) - n * mean(u * n)), without mean(u) if not CENTRED
//   scaled [width] takes the sum of dy * n, plain [width] that of dy, unless it is null; `first`: they start here.
template <int R, bool CENTRED, class T, class D>
static inline void backward_rows(T* dx, float* scaled, float* plain, bool first, const D* dy, const T* x, int64_t stride,
                                 const float* gain, const float* rstds, const float* means, int64_t width) {
  RowSums<R> dots, totals;
  Floats rstd[R], mean[R] = {}, dot[R], total[R];
  for (int r = 0; r < R; ++r) {
    rstd[r] = all(rstds[r]);
    if (CENTRED) mean[r] = all(means[r]);
  }
  columns(width, [&](int64_t i, auto n) {
    const Floats g = load(gain + i, n);
    for (int r = 0; r < R; ++r) {
      const Floats u = g * load(dy + r * width + i, n), v = load(x + r * stride + i, n);
      dots.add(r, i, u * (CENTRED ? v - mean[r] : v));
      if (CENTRED) totals.add(r, i, u);
    }
  });
  for (int r = 0; r < R; ++r) {
    dot[r] = all(dots.value(r) * rstds[r] / static_cast<float>(width));
    if (CENTRED) total[r] = all(totals.value(r) / static_cast<float>(width));
  }
  columns(width, [&](int64_t i, auto n) {
    const Floats g = load(gain + i, n);
    Floats s{}, p{};  // of these rows alone: shorter chains round less
    for (int r = 0; r < R; ++r) {
      ahead(dy + (R + r) * width + i), ahead(x + (R + r) * stride + i);
      const Floats d = load(dy + r * width + i, n), v = load(x + r * stride + i, n);
      const Floats normed = (CENTRED ? v - mean[r] : v) * rstd[r];
      s += d * normed;
      if (plain) p += d;
      const Floats u = CENTRED ? g * d - total[r] : g * d;
      store(dx + r * width + i, rstd[r] * (u - normed * dot[r]), n);
    }
    store(scaled + i, first ? s : load(scaled + i, n) + s, n);
    if (plain) store(plain + i, first ? p : load(plain + i, n) + p, n);
  });
}

// Of an RMS norm whose 1/rms is found again from x, which is read anyway. With u = dy * gain, gain = offset + weight or 1, and
// c = rstd^3 / width * sum(u * x):   dx = more + u * rstd - x * c,   sums [width] += dy * x * rstd. more and sums may be null.
template <int R, class T, class W>
static inline void rms_backward_rows(T* dx, float* sums, const T* dy, const T* more, const T* x, int64_t stride,
                                     const W* weight, float offset_, float eps, int64_t width) {
  RowSums<R> squares, dots;
  Floats rstd[R], c[R];
  const Floats offset = all(offset_);
  columns(width, [&](int64_t i, auto n) {
    const Floats gain = weight ? offset + load(weight + i, n) : all(1.0f);
    for (int r = 0; r < R; ++r) {
      const Floats v = load(x + r * stride + i, n);
      squares.add(r, i, v * v);
      dots.add(r, i, load(dy + r * width + i, n) * gain * v);
    }
  });
  for (int r = 0; r < R; ++r) {
    const float reciprocal = reciprocal_rms(squares.value(r), width, eps);
    rstd[r] = all(reciprocal);
    c[r] = all(dots.value(r) * reciprocal * reciprocal * reciprocal / static_cast<float>(width));
  }
  columns(width, [&](int64_t i, auto n) {
    const Floats gain = weight ? offset + load(weight + i, n) : all(1.0f);
    Floats total = sums ? load(sums + i, n) : Floats{};
    for (int r = 0; r < R; ++r) {
      ahead(dy + (R + r) * width + i), ahead(x + (R + r) * stride + i);
      if (more) ahead(more + (R + r) * width + i);
      const Floats d = load(dy + r * width + i, n), v = load(x + r * stride + i, n);
      Floats gradient = d * gain * rstd[r] - v * c[r];
      if (more) gradient += load(more + r * width + i, n);
      store(dx + r * width + i, gradient, n);
      total += d * (v * rstd[r]);
    }
    if (sums) store(sums + i, total, n);
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
