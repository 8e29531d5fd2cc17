// Cross entropy of a chunk of logits on a CPU; the contract is kernels/blip3o_kernels/ops/linear_cross_entropy.py.
//
// Three passes over a row, which stays in cache: the maximum, the sum of exponentials, the gradient in place of the logits. Label
// smoothing takes one more.
#ifndef BLIP3O_LANES
#define BLIP3O_BODY "linear_cross_entropy.cpp"
#include "instruction_sets.h"

extern "C" int blip3o_cpu_linear_cross_entropy(const blip3o_linear_cross_entropy_arguments* a) {
  BLIP3O_RUN(a->instruction_set, linear_cross_entropy(*a))
}

#else  // once per instruction set

#include "columns.h"

template <bool CAPPED>
static inline Floats capped(Floats v, float softcap) {
  return CAPPED ? softcap * hyperbolic_tangent(v / softcap) : v;
}

static inline Floats padded(Floats v, Whole) { return v; }
static inline Floats padded(Floats v, int64_t n) {  // the rest is -infinity
  float kept[BLIP3O_LANES];
  store(kept, v);
  for (int64_t i = n; i < BLIP3O_LANES; ++i) kept[i] = -__builtin_inff();
  return load(kept);
}

static inline float largest(Floats v) {  // as sum() in vector.h
#if defined(__clang__)
  for (int half = BLIP3O_LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] = v[i] > v[i + half] ? v[i] : v[i + half];
#else
  Integers lane;
  for (int i = 0; i < BLIP3O_LANES; ++i) lane[i] = i;
#pragma GCC unroll 4
  for (int half = BLIP3O_LANES / 2; half > 0; half /= 2) v = at_least(v, __builtin_shuffle(v, lane ^ half));
#endif
  return v[0];
}

// The sum of f(i, n) over a row: in float for a while, then in double, for a vocabulary has 10^5 entries.
template <class F>
static inline double column_sum(int64_t width, F f) {
  double total = 0.0;
  for (int64_t start = 0; start < width; start += 1024) {
    Floats part{};
    columns(width - start < 1024 ? width - start : 1024, [&](int64_t i, auto n) { part += f(start + i, n); });
    total += static_cast<double>(sum(part));
  }
  return total;
}

// The loss of one row; with `wanted`, its logits become their gradient.
template <class T, bool CAPPED>
static double row_loss(const blip3o_linear_cross_entropy_arguments& a, T* logits, int64_t target) {
  const double smoothing = static_cast<double>(a.label_smoothing), z_loss = static_cast<double>(a.z_loss);
  const double vocab = static_cast<double>(a.vocab);
  Floats highest = all(-__builtin_inff());
  columns(a.vocab, [&](int64_t i, auto n) {
    highest = at_least(highest, padded(capped<CAPPED>(load(logits + i, n), a.softcap), n));
  });
  const float maximum = largest(highest);
  const double total = column_sum(a.vocab, [&](int64_t i, auto n) {
    return exponential(padded(capped<CAPPED>(load(logits + i, n), a.softcap), n) - maximum);
  });
  const double log_sum = static_cast<double>(maximum) + std::log(total);
  const double raw = static_cast<double>(load(logits + target, 1)[0]), softcap = static_cast<double>(a.softcap);
  const double tanh = CAPPED ? std::tanh(raw / softcap) : 0.0, chosen = CAPPED ? softcap * tanh : raw;
  double loss = log_sum - (1.0 - smoothing) * chosen + z_loss * log_sum * log_sum;
  if (a.label_smoothing > 0.0f) {
    loss -= smoothing / vocab * column_sum(a.vocab, [&](int64_t i, auto n) {
      return capped<CAPPED>(load(logits + i, n), a.softcap);  // beyond the row's end tanh(0) = 0
    });
  }
  if (!a.wanted) return loss;
  // d loss / d logit[v] = probability[v] (1 + 2 z_loss log_sum) - smoothing / vocab - (1 - smoothing) [v = target]
  const double share = static_cast<double>(a.share), slope = share * (1.0 + 2.0 * z_loss * log_sum) / total;
  const double spread = share * smoothing / vocab;
  const Floats scale = all(static_cast<float>(slope)), less = all(static_cast<float>(spread));
  columns(a.vocab, [&](int64_t i, auto n) {
    const Floats v = load(logits + i, n);
    if (CAPPED) {
      const Floats t = hyperbolic_tangent(v / a.softcap);
      store(logits + i, (exponential(a.softcap * t - maximum) * scale - less) * (1.0f - t * t), n);
    } else {
      store(logits + i, exponential(v - maximum) * scale - less, n);
    }
  });
  const double likely = static_cast<double>(exponential(all(static_cast<float>(chosen) - maximum))[0]);
  const double own = likely * slope - spread - share * (1.0 - smoothing);
  store(logits + target, all(static_cast<float>(own * (1.0 - tanh * tanh))), 1);
  return loss;
}

template <class T>
static int run(const blip3o_linear_cross_entropy_arguments& a) {
  const int threads = blip3o_threads(a.threads, 8 * a.rows * a.vocab);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < a.rows; ++row) {
    T* logits = static_cast<T*>(a.logits) + row * a.vocab;
    a.losses[row] = 0.0;
    if (a.target[row] == a.ignore_index) {
      if (a.wanted) std::memset(static_cast<void*>(logits), 0, static_cast<size_t>(a.vocab) * sizeof(T));
    } else {
      a.losses[row] = a.softcap > 0.0f ? row_loss<T, true>(a, logits, a.target[row])
                                       : row_loss<T, false>(a, logits, a.target[row]);
    }
  }
  for (int64_t row = 0; row < a.rows; ++row) *a.total += a.losses[row];
  return BLIP3O_OK;
}

static int linear_cross_entropy(const blip3o_linear_cross_entropy_arguments& a) {
  if (a.rows < 0 || a.vocab < 1) return BLIP3O_BAD_ARGUMENT;
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t target = a.target[row];
    if (target != a.ignore_index && (target < 0 || target >= a.vocab)) return BLIP3O_BAD_ARGUMENT;
  }
  return by_dtype(a.dtype, [&](auto t) { return run<decltype(t)>(a); });
}

#endif
