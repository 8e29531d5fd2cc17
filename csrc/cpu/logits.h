// The matrix products of fused_cross_entropy.h, which includes this inside: no include guard.
//
//   lay_right, lay_terms    x laid out (STEP rows of it, all its rows): the right factor of logits^T = weight x^T and of
//                           dweight = dlogits^T x
//   Logits                  the logits of up to STEP words and BLOCK rows
//   Gradients               dlogits laid out, and its two products: STEP rows of dweight, complete, or a round's share of dx
//
// In the vectors of product.h, whatever x and weight are stored as; bfloat16 in logits_tiles.h where the chip multiplies it.

struct Widened : bfloat16 {};  // bfloat16 where it is multiplied in float32

#if defined(_OPENMP)
extern "C" int omp_get_thread_num(void);
static inline int thread_number() { return omp_get_thread_num(); }
#else
static inline int thread_number() { return 0; }
#endif

template <class T>
static constexpr bool TILES = std::is_same<T, bfloat16>::value;
template <class T>
static constexpr int64_t GROUP = TILES<T> ? STEP : LANES;  // rows in what a product takes at once

// Floats of a row of x as right factor.
template <class T>
static int64_t RIGHT(const Arguments& a, const Sizes& s) {
  return TILES<T> ? padded(a.width, STEP) / 2 : s.width;
}

static inline void put(float* to, Floats v, bool past_caches) { past_caches ? streamed(to, v) : store(to, v); }
static inline void put(bfloat16* to, Floats v, bool) { store(to, v); }

// A block of [words, columns] into rows of the result.
template <class T>
static inline void put_block(T* to, int64_t step, const float* from, int64_t from_step, int64_t words, int64_t columns,
                             bool past_caches) {
  for (int64_t i = 0; i < words; ++i, to += step, from += from_step) {
    int64_t c = 0;
    for (; c + LANES <= columns; c += LANES) put(to + c, load(from + c), past_caches);
    if (c < columns) store(to + c, load(from + c), columns - c);
  }
}

template <class T>
static bool passes_caches(const Arguments& a) {
  return reinterpret_cast<uintptr_t>(a.dweight) % 64 == 0 && a.width * static_cast<int64_t>(sizeof(T)) % 64 == 0 &&
         a.vocab * a.width >= LARGE;
}

static constexpr int64_t PANEL = 64;    // columns, of 128 rows 32 KiB
static constexpr int64_t DEPTH = 128;   // terms of a product whose right factor stays in the first cache

template <class T>
static void lay_right(float* to, const Arguments& a, const Sizes& s, int64_t row, int64_t top, int64_t end) {
  const int64_t panel = row / PANEL * PANEL;
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  lay_columns(to + (panel - top) * s.width + row - panel, smaller(PANEL, s.rows - panel), smaller(STEP, end - row), a.width,
              [&](int64_t i, int64_t k, int64_t count) {
                ahead(x + (i + STEP) * a.x_stride + k);
                return load_some(x + i * a.x_stride + k, count);
              });
}

template <class T>
static void lay_terms(float* to, const Arguments& a, const Sizes& s, int64_t top, int64_t end) {
  const T* x = static_cast<const T*>(a.x);
#pragma omp for schedule(static) nowait
  for (int64_t row = top; row < end; ++row)
    for (int64_t i = 0; i < s.width; i += LANES)
      store(to + (i / PANEL * s.round + row - top) * PANEL + i % PANEL,
            i < a.width ? load_some(x + row * a.x_stride + i, a.width - i) : Floats{});
}

template <class T>
struct Logits {
  const float* right;
  const int64_t height, columns, width;
  float* own;

  Logits(const Arguments& a, const float* laid, int64_t high, float* space, int64_t wide)
      : right(laid), height(high), columns(wide), width(a.width), own(space) {}

  void operator()(float* to, const T* stored, int64_t step, int64_t words) const {
    const float* weight = rows_of<false>(stored, step, words, width, own, false);
    for (int64_t k = 0; k < width; k += DEPTH) {
      const auto multiply = k ? product<true, true> : product<true, false>;
      for (int64_t i = STEP; std::is_same<T, float>::value && i < 2 * STEP; ++i)  // the next words
        for (int64_t l = k; l < smaller(k + DEPTH, width); l += LANES) ahead(weight + i * step + l);
      for (int64_t c = 0; c < columns; c += PANEL) {
        const int64_t across = smaller(PANEL, height - c);
        multiply(to + c, height, weight + k, step, right + c * padded(width, PANEL) + k * across, across, words,
                 smaller(PANEL, columns - c), smaller(DEPTH, width - k));
      }
    }
  }
};

template <class T>
struct Gradients {
  const Arguments& a;
  const Sizes& s;
  const Slopes& slopes;
  float* dlogits;  // block by block of rows [words, rows]
  const float* terms;
  float* sums;  // panel by panel of columns [rows, PANEL]
  float* total;  // of dweight, over rounds of rows
  float* own;
  const int64_t start, words, top, end;

  float* at(int64_t row, int64_t word) const {
    const int64_t block = row / BLOCK * BLOCK;
    return dlogits + (block - top) * s.words + word * s.height(block) + row - block;
  }
  float* place(int64_t row, int64_t word, float*) const { return at(row, word); }
  void lay(const float*, int64_t, int64_t, int64_t, int64_t) const {}

  void of_weight(int64_t word, int64_t column) const {
    const bool past_caches = passes_caches<T>(a);
    T* to = static_cast<T*>(a.dweight) + (start + word) * a.width;
    const int64_t some = smaller(STEP, words - word), last = smaller(a.width, column + PART);
    for (int64_t c = column; c < last; c += PANEL) {
      float* block = s.round < s.rows ? total + word * s.width + c * STEP : own;
      for (int64_t row = top; row < end; row += BLOCK) {
        const auto multiply = row ? product<true, true> : product<true, false>;
        multiply(block, PANEL, at(row, word), s.height(row), terms + (c / PANEL * s.round + row - top) * PANEL, PANEL, some, PANEL,
                 smaller(BLOCK, end - row));
      }
      if (end == a.rows) put_block(to + c, a.width, block, PANEL, some, smaller(PANEL, last - c), past_caches);
    }
  }

  void of_x(int64_t row, int64_t column) const {
    const T* weight = static_cast<const T*>(a.weight) + start * a.weight_stride;
    const int64_t bottom = smaller(end, row + PART), last = smaller(a.width, column + PART);
    for (int64_t w = 0; w < words; w += DEPTH)
      for (int64_t c = column; c < last; c += PANEL) {
        const int64_t some = smaller(DEPTH, words - w);
        for (int64_t i = 0; i < some; ++i)
          for (int64_t k = 0; k < PANEL; k += LANES) {
            const T* from = weight + (w + i) * a.weight_stride + c + k;
            store(own + i * PANEL + k, c + k < last ? load_some(from, last - c - k) : Floats{});
            ahead(from + DEPTH * a.weight_stride);
          }
        for (int64_t r = row; r < bottom; r += BLOCK) {
          const auto multiply = start + w ? product<false, true> : product<false, false>;
          multiply(sums + (c / PANEL * s.round + r - top) * PANEL, PANEL, at(r, w), s.height(r), own, PANEL, smaller(BLOCK, bottom - r),
                   PANEL, some);
        }
      }
    if (start + words < a.vocab) return;
    for (int64_t c = column; c < last; c += PANEL)
      put_block(static_cast<T*>(a.dx) + row * a.width + c, a.width, sums + (c / PANEL * s.round + row - top) * PANEL, PANEL, bottom - row,
                smaller(PANEL, last - c), false);
  }
};

#if BLIP3O_LANES == 16
#include "tiles.h"
#include "logits_tiles.h"
#endif
