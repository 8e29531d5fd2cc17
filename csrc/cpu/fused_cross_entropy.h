// Linear layer and cross entropy in one, products included (logits.h).
// Included once per instruction set by linear_cross_entropy.cpp, after product.h: no include guard, no includes but logits.h.
//
// Logits are transposed, [words, rows]: the weight is their left factor as it lies in memory, and a row's maximum and sum are
// lanes of vectors. The forward pass takes STEP words and BLOCK rows at a time and leaves the first cache for nothing but
// logits that are to be kept. The backward pass takes some thousand words at a time: their gradient for all rows, made of the
// kept logits or of logits computed again, then their rows of dweight, complete, and their part of dx.

typedef blip3o_linear_cross_entropy_fused_arguments Arguments;

static constexpr int64_t BLOCK = 128, STEP = 32;    // rows and words of logits in the first cache
static constexpr int64_t RUN = 512;                 // words of one partial sum
static constexpr int64_t PART = 256;                // rows and columns of a task of the gradients' products
static constexpr int64_t SMALL = 1 << 17;           // floats of dweight in a cache
static constexpr int64_t LARGE = 1 << 24;           // elements of a result that nobody finds in a cache

// Padded sizes. A round of the backward pass takes `words` words of all rows; where that is the whole vocabulary, and dweight
// stays in a cache while it is added up, it takes `round` rows, so that their gradient does, too.
struct Sizes {
  int64_t rows, width, words, round;
  explicit Sizes(const Arguments& a)
      : rows(padded(a.rows, STEP)), width(padded(a.width, 64)),
        words(smaller(padded(larger(1024, (1 << 19) / rows), PART), padded(a.vocab, STEP))),
        round(words >= a.vocab && words * width <= SMALL ? smaller(rows, 1024) : rows) {}
  int64_t height(int64_t row) const { return smaller(BLOCK, rows - row); }  // of the block that begins there
  int64_t own() const { return larger(PART * PART / 2, STEP * width); }  // floats that each thread needs
  int64_t floats(const Arguments& a) const {
    const int64_t runs = (a.vocab + RUN - 1) / RUN;
    return 3 * rows * width + larger(3 * runs * rows, words * rows + 8 * rows + SMALL) + (a.threads < 1 ? 1 : a.threads) * own();
  }
};

// e^v for v <= 0, and for a little more than 0 by rounding, to about two units in the last place.
static inline Floats fraction(Floats v) {
#if BLIP3O_LANES == 16
  const Floats t = v * 1.44269504f, f = (Floats)_mm512_maskz_reduce_ps(0xffff, (__m512)t, 8);  // less the nearest integer
  Floats p = f * 1.5353342792e-4f + 1.3398874757e-3f;
  p = p * f + 9.6184374371e-3f;
  p = p * f + 5.5503324703e-2f;
  p = p * f + 2.4022647913e-1f;
  p = p * f + 6.9314720286e-1f;
  return (Floats)_mm512_maskz_scalef_ps(0xffff, (__m512)(p * f + 1.0f), (__m512)(t - f));
#else
  return exponential(v);
#endif
}

static int64_t kept_rows(const Arguments& a) {
  int64_t kept = 0;
  for (int64_t row = 0; row < a.rows; ++row) kept += a.target[row] != a.ignore_index;
  return kept;
}

// What the gradient of each row's logits is made of:
// d loss / d logit[v] = probability[v] (1 + 2 z_loss log_sum) - smoothing / vocab - (1 - smoothing) [v = target]
struct Slopes {
  float *maximum, *scale, *less, *own, *rest;  // rest: of `own`, what rounding it to bfloat16 takes
  int32_t *target, *keep;                      // keep: all bits set, or none in rows that are ignored

  Slopes(float* at, int64_t rows)
      : maximum(at), scale(at + rows), less(at + 2 * rows), own(at + 3 * rows), rest(at + 4 * rows),
        target(reinterpret_cast<int32_t*>(at + 5 * rows)), keep(reinterpret_cast<int32_t*>(at + 6 * rows)) {}

  void find(const Arguments& a, int64_t rows) const {
    const double share = static_cast<double>(a.dloss) / static_cast<double>(larger(kept_rows(a), 1));
    const double smoothing = static_cast<double>(a.label_smoothing), spread = share * smoothing / static_cast<double>(a.vocab);
    for (int64_t row = 0; row < rows; row += LANES) {
      const Floats highest = load(a.sums + row), total = load(a.sums + rows + row), raw = load(a.sums + 2 * rows + row);
      const Floats tanh = a.softcap > 0.0f ? hyperbolic_tangent(raw / a.softcap) : Floats{};
      const Floats chosen = a.softcap > 0.0f ? a.softcap * tanh : raw;
      const Doubles log_sum = __builtin_convertvector(highest, Doubles) + __builtin_convertvector(logarithm(total), Doubles);
      const Doubles slope = share * (1.0 + 2.0 * static_cast<double>(a.z_loss) * log_sum) / __builtin_convertvector(total, Doubles);
      const Doubles likely = __builtin_convertvector(fraction(chosen - highest), Doubles);
      const Floats mine = __builtin_convertvector(likely * slope - spread - share * (1.0 - smoothing), Floats);
      store(maximum + row, highest);
      store(scale + row, __builtin_convertvector(slope, Floats));
      store(less + row, all(static_cast<float>(spread)));
      const Floats slope_of_target = mine * (1.0f - tanh * tanh);
      bfloat16 rounded[LANES];
      store(rounded, slope_of_target);
      store(own + row, slope_of_target);
      store(rest + row, slope_of_target - load(rounded));
      for (int64_t i = row; i < row + LANES; ++i) {
        const bool kept = i < a.rows && a.target[i] != a.ignore_index;
        target[i] = kept ? static_cast<int32_t>(a.target[i]) : -1, keep[i] = kept ? -1 : 0;
        if (!kept) rest[i] = 0.0f;
      }
    }
  }
};

#include "logits.h"

// Of BLOCK rows: the largest logit, the sum of exponentials less that, the plain sum.
struct Partial {
  float maximum[BLOCK], total[BLOCK], spread[BLOCK];
};

// The logits of `words` words join a partial sum; kept where they are to be.
template <bool CAPPED>
static void join(Partial& p, float* logits, float* kept, bool spread, float softcap, int64_t words, int64_t columns, int64_t height,
                 bool past_caches) {
  for (int64_t c = 0; c < columns; c += LANES) {
    const Floats before = load(p.maximum + c);
    Floats highest = before, plain = load(p.spread + c);
    for (int64_t i = 0; i < words; ++i) {
      float* at = logits + i * height + c;
      Floats v = load(at);
      if (kept) past_caches ? streamed(kept + i * height + c, v) : store(kept + i * height + c, v);
      if (CAPPED) store(at, v = capped<CAPPED>(v, softcap));
      if (spread) plain += v;
      highest = at_least(highest, v);
    }
    Floats total = load(p.total + c) * fraction(before - highest), other{};
    int64_t i = 0;
    for (; i + 2 <= words; i += 2) {
      total += fraction(load(logits + i * height + c) - highest);
      other += fraction(load(logits + (i + 1) * height + c) - highest);
    }
    if (i < words) total += fraction(load(logits + i * height + c) - highest);
    store(p.maximum + c, highest);
    store(p.total + c, total + other);
    store(p.spread + c, plain);
  }
  for (int64_t i = 0; kept && i < words; ++i)
    for (int64_t c = columns; c < height; c += LANES) store(kept + i * height + c, Floats{});
}

template <class T, bool CAPPED>
static void forward_task(const Arguments& a, const Sizes& s, float* right, float* partials, float* own, int64_t block,
                         int64_t run) {
  const T* weight = static_cast<const T*>(a.weight);
  const int64_t first = block * BLOCK, rows = smaller(BLOCK, a.rows - first), columns = padded(rows, GROUP<T>);
  const int64_t end = smaller(a.vocab, (run + 1) * RUN), runs = (a.vocab + RUN - 1) / RUN;
  const int64_t height = s.height(first);
  const bool past_caches = a.logits && a.vocab * s.rows >= LARGE;
  alignas(64) float logits[STEP * BLOCK];
  alignas(64) Partial p;
  int16_t heads[RUN / STEP], next[BLOCK];  // lists of the rows whose target is in a step
  for (int64_t i = 0; i < RUN / STEP; ++i) heads[i] = -1;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t word = a.target[first + r] - run * RUN;
    if (word >= 0 && word < RUN) next[r] = heads[word / STEP], heads[word / STEP] = static_cast<int16_t>(r);
  }
  for (int64_t r = 0; r < BLOCK; ++r) p.maximum[r] = -__FLT_MAX__, p.total[r] = p.spread[r] = 0.0f;
  for (int64_t row = first; runs == 1 && row < first + rows; row += STEP) lay_right<T>(right, a, s, row, 0, a.rows);
  const Logits<T> product(a, right + first * RIGHT<T>(a, s), height, own, columns);
  float* raw = a.sums + 2 * s.rows;
  for (int64_t word = run * RUN; word < end; word += STEP) {
    const int64_t words = smaller(STEP, end - word);
    product(logits, weight + word * a.weight_stride, a.weight_stride, words);
    for (int64_t r = heads[(word - run * RUN) / STEP]; r >= 0; r = next[r])
      raw[first + r] = logits[(a.target[first + r] - word) * height + r];
    float* kept = a.logits ? a.logits + first * a.vocab + word * height : nullptr;
    join<CAPPED>(p, logits, kept, a.label_smoothing > 0.0f, a.softcap, words, columns, height, past_caches);
  }
  float* to = partials + run * s.rows + first;
  const size_t bytes = sizeof(float) * static_cast<size_t>(height);
  std::memcpy(to, p.maximum, bytes);
  std::memcpy(to + runs * s.rows, p.total, bytes);
  std::memcpy(to + 2 * runs * s.rows, p.spread, bytes);
  if (past_caches) fence();
}

// Of LANES rows, of their partial sums in their order.
static void row_losses(const Arguments& a, const Sizes& s, const float* partials, double* losses, int64_t row) {
  const int64_t runs = (a.vocab + RUN - 1) / RUN, apart = runs * s.rows;
  Floats maximum = all(-__FLT_MAX__);
  for (int64_t run = 0; run < runs; ++run) maximum = at_least(maximum, load(partials + run * s.rows + row));
  Doubles total{}, spread{};
  for (int64_t run = 0; run < runs; ++run) {
    const float* p = partials + run * s.rows + row;
    total += __builtin_convertvector(load(p + apart) * fraction(load(p) - maximum), Doubles);
    spread += __builtin_convertvector(load(p + 2 * apart), Doubles);
  }
  const Floats sum = __builtin_convertvector(total, Floats), raw = load(a.sums + 2 * s.rows + row);
  store(a.sums + row, maximum);
  store(a.sums + s.rows + row, sum);
  const Floats chosen = a.softcap > 0.0f ? capped<true>(raw, a.softcap) : raw;
  const double smoothing = static_cast<double>(a.label_smoothing);
  const Doubles log_sum = __builtin_convertvector(maximum, Doubles) + __builtin_convertvector(logarithm(sum), Doubles);
  const Doubles loss = log_sum - (1.0 - smoothing) * __builtin_convertvector(chosen, Doubles) +
                       static_cast<double>(a.z_loss) * log_sum * log_sum -
                       smoothing / static_cast<double>(a.vocab) * spread;
  for (int64_t i = 0; i < smaller(LANES, a.rows - row); ++i) losses[row + i] = a.target[row + i] == a.ignore_index ? 0.0 : loss[i];
}

template <class T, bool CAPPED>
static void forward(const Arguments& a) {
  const Sizes s(a);
  const int64_t runs = (a.vocab + RUN - 1) / RUN, blocks = (a.rows + BLOCK - 1) / BLOCK, tasks = runs * blocks;
  float *right = a.workspace, *partials = right + 3 * s.rows * s.width;
  float* space = a.workspace + a.workspace_floats - (a.threads < 1 ? 1 : a.threads) * s.own();
  double* losses = reinterpret_cast<double*>(right + s.rows * s.width);
  const int threads = blip3o_threads(a.threads, a.rows * a.vocab * (8 + a.width / 32));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* own = space + thread_number() * s.own();
    if (runs > 1) {  // otherwise a block is laid out by the only task that wants it, while it is in a cache
#pragma omp for schedule(static)
      for (int64_t row = 0; row < a.rows; row += STEP) lay_right<T>(right, a, s, row, 0, a.rows);
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task)
      forward_task<T, CAPPED>(a, s, right, partials, own, task % blocks, task / blocks);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < a.rows; row += LANES) row_losses(a, s, partials, losses, row);
  }
  double total = 0.0;
  for (int64_t row = 0; row < a.rows; ++row) total += losses[row];
  *a.loss = static_cast<float>(total / static_cast<double>(larger(kept_rows(a), 1)));
}

// The gradient of `words` logits from `word` on, of the rows from `first` on.
template <bool CAPPED>
static void gradient_of_logits(float* to, const float* logits, const Slopes& slopes, float softcap, int64_t word, int64_t words,
                               int64_t first, int64_t columns, int64_t height) {
  for (int64_t c = 0; c < columns; c += LANES) {
    const int64_t row = first + c;
    const Floats maximum = load(slopes.maximum + row), scale = load(slopes.scale + row), less = load(slopes.less + row);
    const Floats own = load(slopes.own + row);
    Integers target, keep;
    std::memcpy(&target, slopes.target + row, sizeof target);
    std::memcpy(&keep, slopes.keep + row, sizeof keep);
    for (int64_t i = 0; i < words; ++i) {
      const Floats v = load(logits + i * height + c);
      Floats d;
      if (CAPPED) {
        const Floats t = hyperbolic_tangent(v / softcap);
        d = (fraction(softcap * t - maximum) * scale - less) * (1.0f - t * t);
      } else {
        d = fraction(v - maximum) * scale - less;
      }
      d = target == static_cast<int32_t>(word + i) ? own : d;
      store(to + i * height + c, bits_of<Floats>(bits_of<Integers>(d) & keep));
    }
  }
}

template <class T, bool CAPPED>
static void backward(const Arguments& a) {
  const Sizes s(a);
  const T* weight = static_cast<const T*>(a.weight);
  float *right = a.workspace, *terms = right + s.rows * s.width, *sums = terms + s.rows * s.width;
  float* dlogits = sums + s.rows * s.width;
  float* space = a.workspace + a.workspace_floats - (a.threads < 1 ? 1 : a.threads) * s.own();
  const Slopes slopes(dlogits + s.words * s.rows, s.rows);
  float* total = dlogits + s.words * s.rows + 8 * s.rows;
  slopes.find(a, s.rows);
  const int threads = blip3o_threads(a.threads, a.rows * a.vocab * (8 + a.width / 32));
  const int64_t column_parts = (a.width + PART - 1) / PART, rounds = (a.vocab + s.words - 1) / s.words;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* own = space + thread_number() * s.own();
    for (int64_t round = 0; round < (a.rows + s.round - 1) / s.round * rounds; ++round) {
      const int64_t top = round / rounds * s.round, end = smaller(a.rows, top + s.round), start = round % rounds * s.words;
      const int64_t words = smaller(s.words, a.vocab - start), steps = (words + STEP - 1) / STEP;
      const Gradients<T> gradients{a, s, slopes, dlogits, terms, sums, total, own, start, words, top, end};
      if (!a.logits && start == 0) {
#pragma omp for schedule(static)
        for (int64_t row = top; row < end; row += STEP) lay_right<T>(right, a, s, row, top, end);
      }
      if (a.dweight && start == 0) lay_terms<T>(terms, a, s, top, end);
#pragma omp for schedule(static)
      for (int64_t task = 0; task < (end - top + BLOCK - 1) / BLOCK * steps; ++task) {
        const int64_t first = top + task / steps * BLOCK, word = task % steps * STEP, height = s.height(first);
        const int64_t columns = padded(smaller(BLOCK, end - first), GROUP<T>), some = smaller(STEP, words - word);
        alignas(64) float logits[STEP * BLOCK];
        float* to = gradients.place(first, word, logits);
        const float* from = to;
        if (a.logits) {
          from = a.logits + first * a.vocab + (start + word) * height;
        } else {
          const Logits<T> product(a, right + (first - top) * RIGHT<T>(a, s), height, own, columns);
          product(to, weight + (start + word) * a.weight_stride, a.weight_stride, some);
        }
        gradient_of_logits<CAPPED>(to, from, slopes, a.softcap, start + word, some, first, columns, height);
        gradients.lay(to, first, word, some, columns);
      }
      const int64_t tasks_of_x = a.dx ? (end - top + PART - 1) / PART * column_parts : 0;  // the longer ones first
      const int64_t tasks = tasks_of_x + (a.dweight ? steps * column_parts : 0);
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < tasks; ++task) {
        const int64_t column = task % column_parts * PART;
        if (task < tasks_of_x)
          gradients.of_x(top + task / column_parts * PART, column);
        else
          gradients.of_weight((task - tasks_of_x) / column_parts * STEP, column);
      }
    }
    fence();
  }
}

template <class T>
static int fused_run(const Arguments& a) {
  if (a.backward)
    a.softcap > 0.0f ? backward<T, true>(a) : backward<T, false>(a);
  else
    a.softcap > 0.0f ? forward<T, true>(a) : forward<T, false>(a);
  return BLIP3O_OK;
}

static int linear_cross_entropy_fused(const Arguments& a) {
  if (a.rows < 1 || a.width < 1 || a.vocab < 1 || a.vocab > INT32_MAX) return BLIP3O_BAD_ARGUMENT;
  if (a.workspace_floats < Sizes(a).floats(a)) return BLIP3O_BAD_ARGUMENT;
  for (int64_t row = 0; row < a.rows; ++row)
    if (a.target[row] != a.ignore_index && (a.target[row] < 0 || a.target[row] >= a.vocab)) return BLIP3O_BAD_ARGUMENT;
  if (a.dtype == BLIP3O_FLOAT32) return fused_run<float>(a);
#if BLIP3O_LANES == 16
  if (a.dtype == BLIP3O_BFLOAT16 && blip3o_instruction_set(a.instruction_set) >= BLIP3O_AVX512_BF16) return fused_run<bfloat16>(a);
#endif
  if (a.dtype == BLIP3O_BFLOAT16) return fused_run<Widened>(a);
  return BLIP3O_BAD_DTYPE;
}
