// Contiguous samples cut into chunks: the unit of work for threads, and of sums.
// Included once per instruction set by an op's body: no include guard, no includes.

#include "columns.h"

// A sum of floats in runs of 8 vectors, and of the runs in double: thousands of terms would otherwise cost more digits than the
// reference loses.
struct Total {
  Doubles lanes{};
  Floats run{};
  void add(int64_t i, Floats v) {
    run += v;
    if ((i / BLIP3O_LANES & 7) == 7) lanes += __builtin_convertvector(run, Doubles), run = Floats{};
  }
  double value() const { return sum(lanes + __builtin_convertvector(run, Doubles)); }
};

// f(sample, start, length, chunk) for every chunk of every sample; start counts elements from the first sample's first.
template <class F>
static inline void chunks(int64_t samples, int64_t elements, int asked, F f) {
  const int64_t each = (elements + BLIP3O_CHUNK - 1) / BLIP3O_CHUNK;
  const int threads = blip3o_threads(asked, samples * elements);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t chunk = 0; chunk < samples * each; ++chunk) {
    const int64_t sample = chunk / each, first = chunk % each * BLIP3O_CHUNK;
    const int64_t length = elements - first < BLIP3O_CHUNK ? elements - first : BLIP3O_CHUNK;
    f(sample, sample * elements + first, length, chunk);
  }
}

// The sum of one sample's chunks, in their order.
static inline double sample_sum(const double* sums, int64_t sample, int64_t elements) {
  const int64_t each = (elements + BLIP3O_CHUNK - 1) / BLIP3O_CHUNK;
  double total = 0.0;
  for (int64_t chunk = 0; chunk < each; ++chunk) total += sums[sample * each + chunk];
  return total;
}
