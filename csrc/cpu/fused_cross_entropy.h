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
static constexpr int64_t PART = 256;                // words, rows and columns of a task of the gradients' products
static constexpr int64_t LARGE = 1 << 24;           // elements of a result that nobody finds in a cache

// Padded sizes. `words`: of a round of the backward pass.
struct Sizes {
  int64_t rows, width, words, blocks;
  explicit Sizes(const Arguments& a)
      : rows(padded(a.rows, STEP)), width(padded(a.width, 64)),
        words(smaller(padded(larger(1024, (1 << 19) / rows), PART), padded(a.vocab, STEP))), blocks((rows + BLOCK - 1) / BLOCK) {}
  int64_t height(int64_t row) const { return smaller(BLOCK, rows - row); }  // of the block that begins there
  int64_t own() const { return PART * PART + STEP * width; }  // floats that each thread needs
  int64_t floats(const Arguments& a) const {
    const int64_t runs = (a.vocab + RUN - 1) / RUN;
    return 3 * rows * width + larger(3 * runs * rows, 2 * words * rows + 8 * rows) + (a.threads < 1 ? 1 : a.threads) * own();
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
      if (kept) past_caches ? stream(kept + i * height + c, v) : store(kept + i * height + c, v);
      if (CAPPED) store(at, v = capped<CAPPED>(v, softcap));
      if (spread) plain += v;
      highest = at_least(highest, v);
    }
    Floats total = load(p.total + c) * exponential(before - highest), other{};
    int64_t i = 0;
    for (; i + 2 <= words; i += 2) {
      total += exponential(load(logits + i * height + c) - highest);
      other += exponential(load(logits + (i + 1) * height + c) - highest);
    }
    if (i < words) total += exponential(load(logits + i * height + c) - highest);
    store(p.maximum + c, highest);
    store(p.total + c, total + other);
    store(p.spread + c, plain);
  }
  for (int64_t i = 0; kept && i < words; ++i)
    for (int64_t c = columns; c < height; c += LANES) store(kept + i * height + c, Floats{});
}

template <class T, bool CAPPED>
static void forward_task(const Arguments& a, const Sizes& s, const float* right, float* partials, float* own, int64_t block,
                         int64_t run) {
  const T* weight = static_cast<const T*>(a.weight);
  const int64_t first = block * BLOCK, rows = smaller(BLOCK, a.rows - first), columns = padded(rows, GROUP<T>);
  const int64_t end = smaller(a.vocab, (run + 1) * RUN), runs = (a.vocab + RUN - 1) / RUN;
  const int64_t height = s.height(first);
  const bool past_caches = a.logits && a.vocab * s.rows >= LARGE;
  alignas(64) float logits[STEP * BLOCK];
  alignas(64) Partial p;
  for (int64_t r = 0; r < BLOCK; ++r) p.maximum[r] = -__FLT_MAX__, p.total[r] = p.spread[r] = 0.0f;
  Logits<T> product(right + first * RIGHT<T>(a, s), height, own, columns, a.width);
  for (int64_t word = run * RUN; word < end; word += STEP) {
    const int64_t words = smaller(STEP, end - word);
    product(logits, weight + word * a.weight_stride, a.weight_stride, words);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t chosen = a.target[first + r] - word;
      if (chosen >= 0 && chosen < words) a.sums[2 * a.rows + first + r] = logits[chosen * height + r];
    }
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

// Of one row, of its partial sums in their order.
static double row_loss(const Arguments& a, const Sizes& s, const float* partials, int64_t row) {
  const int64_t runs = (a.vocab + RUN - 1) / RUN, apart = runs * s.rows;
  float maximum = -__FLT_MAX__;
  double total = 0.0, spread = 0.0;
  for (int64_t run = 0; run < runs; ++run) {
    const float found = partials[run * s.rows + row];
    maximum = found > maximum || found != found ? found : maximum;
  }
  for (int64_t run = 0; run < runs; ++run) {
    const float* p = partials + run * s.rows + row;
    const double scale = *p == maximum ? 1.0 : std::exp(static_cast<double>(*p) - static_cast<double>(maximum));
    total += static_cast<double>(p[apart]) * scale;
    spread += static_cast<double>(p[2 * apart]);
  }
  a.sums[row] = static_cast<double>(maximum);
  a.sums[a.rows + row] = total;
  const double smoothing = static_cast<double>(a.label_smoothing), softcap = static_cast<double>(a.softcap);
  const double log_sum = static_cast<double>(maximum) + std::log(total), raw = a.sums[2 * a.rows + row];
  const double chosen = softcap > 0.0 ? softcap * std::tanh(raw / softcap) : raw;
  return log_sum - (1.0 - smoothing) * chosen + static_cast<double>(a.z_loss) * log_sum * log_sum -
         smoothing / static_cast<double>(a.vocab) * spread;
}

static int64_t kept_rows(const Arguments& a) {
  int64_t kept = 0;
  for (int64_t row = 0; row < a.rows; ++row) kept += a.target[row] != a.ignore_index;
  return kept;
}

template <class T, bool CAPPED>
static void forward(const Arguments& a) {
  const Sizes s(a);
  const int64_t runs = (a.vocab + RUN - 1) / RUN, tasks = runs * s.blocks;
  float *right = a.workspace, *partials = right + 3 * s.rows * s.width;
  float* space = a.workspace + a.workspace_floats - (a.threads < 1 ? 1 : a.threads) * s.own();
  double* losses = reinterpret_cast<double*>(right + s.rows * s.width);
  const int threads = blip3o_threads(a.threads, a.rows * a.vocab * (8 + a.width / 32));
  lay_right<T>(right, a, s, threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    float* own = space + (threads > 1 ? thread_number() : 0) * s.own();
    forward_task<T, CAPPED>(a, s, right, partials, own, task % s.blocks, task / s.blocks);
  }
  const int few = blip3o_threads(threads, a.rows * (32 + 8 * runs));
#pragma omp parallel for num_threads(few) schedule(static) if (few > 1)
  for (int64_t row = 0; row < a.rows; ++row)
    losses[row] = a.target[row] == a.ignore_index ? 0.0 : row_loss(a, s, partials, row);
  double total = 0.0;
  for (int64_t row = 0; row < a.rows; ++row) total += losses[row];
  *a.loss = static_cast<float>(total / static_cast<double>(larger(kept_rows(a), 1)));
}

// What the gradient of each row's logits is made of:
// d loss / d logit[v] = probability[v] (1 + 2 z_loss log_sum) - smoothing / vocab - (1 - smoothing) [v = target]
struct Slopes {
  float *maximum, *scale, *less, *own;
  int32_t *target, *keep;  // keep: all bits set, or none in rows that are ignored

  Slopes(float* at, int64_t rows)
      : maximum(at), scale(at + rows), less(at + 2 * rows), own(at + 3 * rows),
        target(reinterpret_cast<int32_t*>(at + 4 * rows)), keep(reinterpret_cast<int32_t*>(at + 5 * rows)) {}

  void find(const Arguments& a, int64_t rows) const {
    const double share = static_cast<double>(a.dloss) / static_cast<double>(larger(kept_rows(a), 1));
    const double smoothing = static_cast<double>(a.label_smoothing), softcap = static_cast<double>(a.softcap);
    for (int64_t row = 0; row < rows; ++row) {
      const bool kept = row < a.rows && a.target[row] != a.ignore_index;
      const double highest = kept ? a.sums[row] : 0.0, total = kept ? a.sums[a.rows + row] : 1.0;
      const double raw = kept ? a.sums[2 * a.rows + row] : 0.0, tanh = softcap > 0.0 ? std::tanh(raw / softcap) : 0.0;
      const double chosen = softcap > 0.0 ? softcap * tanh : raw, log_sum = highest + std::log(total);
      const double slope = share * (1.0 + 2.0 * static_cast<double>(a.z_loss) * log_sum) / total;
      const double spread = share * smoothing / static_cast<double>(a.vocab);
      const double mine = std::exp(chosen - highest) * slope - spread - share * (1.0 - smoothing);
      maximum[row] = static_cast<float>(highest), scale[row] = static_cast<float>(slope);
      less[row] = static_cast<float>(spread), own[row] = static_cast<float>(mine * (1.0 - tanh * tanh));
      target[row] = kept ? static_cast<int32_t>(a.target[row]) : -1, keep[row] = kept ? -1 : 0;
    }
  }
};

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
        d = (exponential(softcap * t - maximum) * scale - less) * (1.0f - t * t);
      } else {
        d = exponential(v - maximum) * scale - less;
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
  const Slopes slopes(dlogits + 2 * s.words * s.rows, s.rows);
  slopes.find(a, s.rows);
  const int threads = blip3o_threads(a.threads, a.rows * a.vocab * (8 + a.width / 32));
  if (!a.logits) lay_right<T>(right, a, s, threads);
  if (a.dweight) lay_terms<T>(terms, a, s, threads);
  const int64_t row_parts = (a.rows + PART - 1) / PART, column_parts = (a.width + PART - 1) / PART;
  for (int64_t start = 0; start < a.vocab; start += s.words) {
    const int64_t words = smaller(s.words, a.vocab - start), steps = (words + STEP - 1) / STEP;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      float* own = space + (threads > 1 ? thread_number() : 0) * s.own();
      const Gradients<T> gradients{a, s, dlogits, terms, sums, own, start, words};
#pragma omp for schedule(static)
      for (int64_t task = 0; task < s.blocks * steps; ++task) {
        const int64_t first = task / steps * BLOCK, word = task % steps * STEP;
        const int64_t columns = padded(smaller(BLOCK, a.rows - first), GROUP<T>), some = smaller(STEP, words - word);
        alignas(64) float logits[STEP * BLOCK];
        const int64_t height = s.height(first);
        float* to = gradients.place(first, word, logits);
        const float* from = to;
        if (a.logits) {
          from = a.logits + first * a.vocab + (start + word) * height;
        } else {
          Logits<T> product(right + first * RIGHT<T>(a, s), height, own, columns, a.width);
          product(to, weight + (start + word) * a.weight_stride, a.weight_stride, some);
        }
        gradient_of_logits<CAPPED>(to, from, slopes, a.softcap, start + word, some, first, columns, height);
        gradients.lay(to, first, word, some, columns);
      }
      const int64_t whole = a.dx ? row_parts * column_parts : 0, parts = (words + PART - 1) / PART;
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < whole + (a.dweight ? parts * column_parts : 0); ++task) {
        if (task < whole)
          gradients.of_x(task / column_parts * PART, task % column_parts * PART);
        else
          gradients.of_weight((task - whole) / column_parts * PART, (task - whole) % column_parts * PART);
      }
      fence();
    }
  }
  if (a.dx) put_sums<T>(a, s, sums, threads);
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
  if (a.dtype == BLIP3O_BFLOAT16)
    return blip3o_instruction_set(a.instruction_set) == BLIP3O_AMX ? fused_run<bfloat16>(a) : BLIP3O_BAD_INSTRUCTION_SET;
#endif
  return BLIP3O_BAD_DTYPE;
}
