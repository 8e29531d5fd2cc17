// Sinusoids of the diffusion time on a CPU; the contract is kernels/blip3o_kernels/ops/timestep_embedding.py.
//
// Angles are doubles: at 1000 rad the last place of a float is 6e-5, which is what the sinusoids would be wrong by.
#ifndef BLIP3O_LANES
#define BLIP3O_BODY "timestep_embedding.cpp"
#include "instruction_sets.h"

extern "C" int blip3o_cpu_timestep_embedding(const blip3o_timestep_embedding_arguments* a) {
  BLIP3O_RUN(a->instruction_set, timestep_embedding(*a))
}

extern "C" int blip3o_cpu_timestep_embedding_backward(const blip3o_timestep_embedding_backward_arguments* a) {
  BLIP3O_RUN(a->instruction_set, timestep_embedding_backward(*a))
}

#else  // once per instruction set

#include "columns.h"

// f(row, sinusoids) for every row; sinusoids(g) calls g(i, n, frequency, sine, cosine) for every vector of half the row.
template <class Arguments, class F>
static inline int rows(const Arguments& a, F f) {
  if (a.rows < 0 || a.half < 1 || !(a.max_period > 0.0)) return BLIP3O_BAD_ARGUMENT;
  const double rate = -std::log(a.max_period) / static_cast<double>(a.half);
  // To whole vectors, so that they are loaded without regard to the row's end.
  for (int64_t i = 0; i < a.half + BLIP3O_LANES - 1; ++i) a.frequencies[i] = std::exp(static_cast<double>(i) * rate);
  const int threads = blip3o_threads(a.threads, 16 * a.rows * a.half);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < a.rows; ++row) {
    const double timestep = a.timestep[row];
    f(row, [&](auto g) {
      columns(a.half, [&](int64_t i, auto n) {
        Doubles frequency;
        std::memcpy(&frequency, a.frequencies + i, sizeof frequency);
        Floats sine, cosine;
        sine_cosine(frequency * timestep, sine, cosine);
        g(i, n, frequency, sine, cosine);
      });
    });
  }
  return BLIP3O_OK;
}

static int timestep_embedding(const blip3o_timestep_embedding_arguments& a) {
  return rows(a, [&](int64_t row, auto sinusoids) {
    float* y = a.y + row * 2 * a.half;
    sinusoids([&](int64_t i, auto n, const Doubles&, const Floats& sine, const Floats& cosine) {
      store(y + i, cosine, n);
      store(y + a.half + i, sine, n);
    });
  });
}

static int timestep_embedding_backward(const blip3o_timestep_embedding_backward_arguments& a) {
  return rows(a, [&](int64_t row, auto sinusoids) {
    const float* dy = a.dy + row * 2 * a.half;
    Doubles lanes{};
    sinusoids([&](int64_t i, auto n, const Doubles& frequency, const Floats& sine, const Floats& cosine) {
      const Floats slope = load(dy + a.half + i, n) * cosine - load(dy + i, n) * sine;
      lanes += frequency * __builtin_convertvector(slope, Doubles);
    });
    a.dtimestep[row] = static_cast<float>(sum(lanes));
  });
}

#endif
