// The noise level of each sample on a CPU; the contract is kernels/blip3o_kernels/ops/flow_timesteps.py.
#ifndef BLIP3O_LANES
#define BLIP3O_BODY "flow_timesteps.cpp"
#include "instruction_sets.h"

extern "C" int blip3o_cpu_flow_timesteps(const blip3o_flow_timesteps_arguments* a) {
  BLIP3O_RUN(a->instruction_set, flow_timesteps(*a))
}

#else  // once per instruction set

#include "columns.h"
#include "philox.h"

static int flow_timesteps(const blip3o_flow_timesteps_arguments& a) {
  if (a.samples < 0) return BLIP3O_BAD_ARGUMENT;
  const Philox philox(a.seed, BLIP3O_TIMESTEPS, a.draw);
  for (int64_t i = 0; i < a.samples; i += BLIP3O_LANES) {
    const int64_t n = a.samples - i < BLIP3O_LANES ? a.samples - i : BLIP3O_LANES;
    Words low{}, high{}, w[4];
    for (int64_t j = 0; j < n; ++j) {
      const uint64_t position = static_cast<uint64_t>(a.positions[i + j]);
      low[j] = static_cast<uint32_t>(position), high[j] = static_cast<uint32_t>(position >> 32);
    }
    philox.words(Words{}, low, high, w);
    Floats sigma = uniform(w[0]);
    if (a.logit_normal) {
      Floats normal, unused;
      normals(w[0], w[1], normal, unused);
      sigma = 1.0f / (1.0f + exponential(-(a.mean + a.std * normal)));
    }
    if (a.shift != 1.0f) sigma = a.shift * sigma / (1.0f + (a.shift - 1.0f) * sigma);
    store(a.sigma + i, sigma, n);
  }
  return BLIP3O_OK;
}

#endif
