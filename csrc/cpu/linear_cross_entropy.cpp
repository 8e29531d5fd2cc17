// Cross entropy of a chunk of logits on a CPU; the contract is kernels/blip3o_kernels/ops/linear_cross_entropy.py.
//
// Three passes over a row, which stays in cache: the maximum, the sum of exponentials, the gradient in place of the logits. Label
// smoothing takes one more. Without a gradient the last one is not taken. fused_cross_entropy.h has the products, too.
#ifndef BLIP3O_LANES
#define BLIP3O_BODY "linear_cross_entropy.cpp"
#include "instruction_sets.h"

extern "C" int blip3o_cpu_linear_cross_entropy(const blip3o_linear_cross_entropy_arguments* a) {
  BLIP3O_RUN(a->instruction_set, linear_cross_entropy(*a))
}
extern "C" int blip3o_cpu_linear_cross_entropy_fused(const blip3o_linear_cross_entropy_fused_arguments* a) {
  BLIP3O_RUN(a->instruction_set, linear_cross_entropy_fused(*a))
}

#else  // once per instruction set

#include "columns.h"
#include "product.h"

template <bool CAPPED>
static inline Floats capped(Floats v, float softcap) {
  return CAPPED ? softcap * hyperbolic_tangent(v / softcap) : v;
}

#include "fused_cross_entropy.h"

static inline Floats ended(Floats v, Whole) { return v; }
static inline Floats ended(Floats v, int64_t n) {  // the rest is -infinity
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

// Of one row, between the passes. `spread`: the sum of its logits, which label smoothing wants.
struct Row {
  float maximum, raw;
  double spread, total;
};

// Whether the exponentials of the second pass take the place of the logits: in a narrower type they would be rounded.
template <class T, bool CAPPED>
static constexpr bool IN_PLACE = std::is_same<T, float>::value && !CAPPED;

template <class T, bool CAPPED>
static inline void first_pass(Row& row, const blip3o_linear_cross_entropy_arguments& a, const T* logits, int64_t target) {
  const float softcap = a.softcap;
  Floats highest = all(-__builtin_inff());
  columns(a.vocab, [&](int64_t i, auto n) {
    highest = at_least(highest, ended(capped<CAPPED>(load(logits + i, n), softcap), n));
  });
  row.maximum = largest(highest);
  row.raw = load(logits + target, 1)[0];
  row.spread = 0.0;
  if (a.label_smoothing > 0.0f)  // beyond the row's end tanh(0) = 0
    row.spread = column_sum(a.vocab, [&](int64_t i, auto n) { return capped<CAPPED>(load(logits + i, n), softcap); });
}

template <class T, bool CAPPED, bool KEPT>
static inline double exponentials(T* logits, int64_t vocab, float maximum, float softcap) {
  return column_sum(vocab, [&](int64_t i, auto n) {
    const Floats e = exponential(ended(capped<CAPPED>(load(logits + i, n), softcap), n) - maximum);
    if (KEPT) store(logits + i, e, n);
    return e;
  });
}

// The loss of the row; with dlogits, its logits, or their exponentials, become their gradient.
template <class T, bool CAPPED>
static inline double third_pass(const Row& row, const blip3o_linear_cross_entropy_arguments& a, T* logits, int64_t target,
                                double share) {
  const double smoothing = static_cast<double>(a.label_smoothing), z_loss = static_cast<double>(a.z_loss);
  const double vocab = static_cast<double>(a.vocab), softcap = static_cast<double>(a.softcap);
  const double log_sum = static_cast<double>(row.maximum) + std::log(row.total), raw = static_cast<double>(row.raw);
  const double tanh = CAPPED ? std::tanh(raw / softcap) : 0.0, chosen = CAPPED ? softcap * tanh : raw;
  const double loss =
      log_sum - (1.0 - smoothing) * chosen + z_loss * log_sum * log_sum - smoothing / vocab * row.spread;
  if (!a.dlogits) return loss;
  // d loss / d logit[v] = probability[v] (1 + 2 z_loss log_sum) - smoothing / vocab - (1 - smoothing) [v = target]
  const double slope = share * (1.0 + 2.0 * z_loss * log_sum) / row.total;
  const double spread = share * smoothing / vocab;
  const Floats scale = all(static_cast<float>(slope)), less = all(static_cast<float>(spread));
  const float maximum = row.maximum, cap = a.softcap;
  columns(a.vocab, [&](int64_t i, auto n) {
    const Floats v = load(logits + i, n);
    if (CAPPED) {
      const Floats t = hyperbolic_tangent(v / cap);
      store(logits + i, (exponential(cap * t - maximum) * scale - less) * (1.0f - t * t), n);
    } else {
      store(logits + i, (IN_PLACE<T, CAPPED> ? v : exponential(v - maximum)) * scale - less, n);
    }
  });
  const double likely = static_cast<double>(exponential(all(static_cast<float>(chosen) - maximum))[0]);
  const double own = likely * slope - spread - share * (1.0 - smoothing);
  store(logits + target, all(static_cast<float>(own * (1.0 - tanh * tanh))), int64_t{1});
  return loss;
}

// Each pass over all `rows`, at most MOST, before the next: the end of a short row's pass is a chain that nothing else hides.
static constexpr int64_t MOST = 16;

template <class T, bool CAPPED>
static void some_rows(const blip3o_linear_cross_entropy_arguments& a, int64_t start, int64_t rows, double share) {
  T* logits = static_cast<T*>(a.logits) + start * a.vocab;
  const int64_t* target = a.target + a.start + start;
  double* losses = a.losses + a.start + start;
  Row found[MOST];
  for (int64_t r = 0; r < rows; ++r)
    if (target[r] != a.ignore_index) first_pass<T, CAPPED>(found[r], a, logits + r * a.vocab, target[r]);
  for (int64_t r = 0; r < rows; ++r) {
    if (target[r] == a.ignore_index) continue;
    T* row = logits + r * a.vocab;
    if (IN_PLACE<T, CAPPED> && a.dlogits)
      found[r].total = exponentials<T, CAPPED, true>(row, a.vocab, found[r].maximum, a.softcap);
    else
      found[r].total = exponentials<T, CAPPED, false>(row, a.vocab, found[r].maximum, a.softcap);
  }
  const size_t length = static_cast<size_t>(a.vocab);
  for (int64_t r = 0; r < rows; ++r) {
    T* row = logits + r * a.vocab;
    if (target[r] != a.ignore_index) {
      losses[r] = third_pass<T, CAPPED>(found[r], a, row, target[r], share);
    } else {
      losses[r] = 0.0;
      if (a.dlogits) std::memset(static_cast<void*>(row), 0, length * sizeof(T));
    }
  }
}

template <class T>
static int run(const blip3o_linear_cross_entropy_arguments& a) {
  const int64_t fitting = 65536 / a.vocab, each = fitting < 1 ? 1 : (fitting < MOST ? fitting : MOST);
  const int64_t runs = (a.rows + each - 1) / each;
  int64_t kept = 0;
  for (int64_t row = 0; row < a.targets; ++row) kept += a.target[row] != a.ignore_index;
  const double share = 1.0 / static_cast<double>(kept < 1 ? 1 : kept);
  const int threads = blip3o_threads(a.threads, 8 * a.rows * a.vocab);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t start = run * each, rows = a.rows - start < each ? a.rows - start : each;
    a.softcap > 0.0f ? some_rows<T, true>(a, start, rows, share) : some_rows<T, false>(a, start, rows, share);
  }
  double total = 0.0;
  for (int64_t row = 0; row < a.start + a.rows; ++row) total += a.losses[row];
  *a.loss = static_cast<float>(total * share);
  return BLIP3O_OK;
}

static int linear_cross_entropy(const blip3o_linear_cross_entropy_arguments& a) {
  if (a.rows < 0 || a.vocab < 1 || a.start < 0 || a.start + a.rows > a.targets) return BLIP3O_BAD_ARGUMENT;
  if (a.dlogits && (a.dlogits != a.logits || a.dlogits_stride != a.vocab || a.dlogits_dtype != a.dtype || a.parts != 1))
    return BLIP3O_BAD_ARGUMENT;
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t target = a.target[a.start + row];
    if (target != a.ignore_index && (target < 0 || target >= a.vocab)) return BLIP3O_BAD_ARGUMENT;
  }
  return by_dtype(a.dtype, [&](auto t) { return run<decltype(t)>(a); });
}

#endif
