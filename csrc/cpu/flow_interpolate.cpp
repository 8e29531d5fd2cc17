// The straight path and its velocity on a CPU; the contract is kernels/blip3o_kernels/ops/flow_interpolate.py.
//
// Samples are cut into chunks, the unit of work for threads and of the sums, so that the number of threads changes no bit.
// Noise that is drawn here lives for one chunk, in the nearest cache.
#ifndef BLIP3O_LANES
#define BLIP3O_BODY "flow_interpolate.cpp"
#include "instruction_sets.h"

extern "C" int blip3o_cpu_flow_interpolate(const blip3o_flow_interpolate_arguments* a) {
  BLIP3O_RUN(a->instruction_set, flow_interpolate(*a))
}

extern "C" int blip3o_cpu_flow_interpolate_backward(const blip3o_flow_interpolate_backward_arguments* a) {
  BLIP3O_RUN(a->instruction_set, flow_interpolate_backward(*a))
}

#else  // once per instruction set

#include "chunks.h"
#include "philox.h"

// f(noise) with the chunk's noise: of dtype T where it is given, otherwise drawn, as float.
template <class T, class Arguments, class F>
static inline void with_noise(const Arguments& a, int64_t sample, int64_t start, int64_t length, F f) {
  if (a.noise) return f(static_cast<const T*>(a.noise) + start);
  float drawn[BLIP3O_CHUNK];
  const Philox philox(a.seed, BLIP3O_NOISE, a.draw);
  philox.noise(drawn, start - sample * a.elements, length, a.positions[sample]);
  f(static_cast<const float*>(drawn));
}

template <class T>
static int run(const blip3o_flow_interpolate_arguments& a) {
  const bool past = past_caches(static_cast<T*>(a.x_sigma), a.samples * a.elements, a.elements) &&
                    past_caches(static_cast<T*>(a.velocity), a.samples * a.elements, a.elements);
  chunks(a.samples, a.elements, a.threads, [&](int64_t sample, int64_t start, int64_t length, int64_t) {
    const T* x = static_cast<const T*>(a.x) + start;
    T* x_sigma = static_cast<T*>(a.x_sigma) + start;
    T* velocity = static_cast<T*>(a.velocity) + start;
    const Floats sigma = all(a.sigma[sample]), rest = all(1.0f - a.sigma[sample]);
    with_noise<T>(a, sample, start, length, [&](auto* noise) {
      columns(length, [&](int64_t i, auto n) {
        const Floats v = load(x + i, n), z = load(noise + i, n);
        store(x_sigma + i, rest * v + sigma * z, n, past);
        store(velocity + i, z - v, n, past);
      });
      if (past) fence();
    });
  });
  return BLIP3O_OK;
}

template <class T>
static int run(const blip3o_flow_interpolate_backward_arguments& a) {
  chunks(a.samples, a.elements, a.threads, [&](int64_t sample, int64_t start, int64_t length, int64_t chunk) {
    const T* dx_sigma = static_cast<const T*>(a.dx_sigma) + start;
    const T* dvelocity = static_cast<const T*>(a.dvelocity) + start;
    T* dx = static_cast<T*>(a.dx) + start;
    T* dnoise = a.dnoise ? static_cast<T*>(a.dnoise) + start : nullptr;
    const Floats sigma = all(a.sigma[sample]), rest = all(1.0f - a.sigma[sample]);
    columns(length, [&](int64_t i, auto n) {
      const Floats d = load(dx_sigma + i, n), dv = load(dvelocity + i, n);
      store(dx + i, rest * d - dv, n);
      if (dnoise) store(dnoise + i, sigma * d + dv, n);
    });
    if (!a.dsigma) return;
    const T* x = static_cast<const T*>(a.x) + start;
    with_noise<T>(a, sample, start, length, [&](auto* noise) {
      Total total;
      columns(length, [&](int64_t i, auto n) {
        total.add(i, load(dx_sigma + i, n) * (load(noise + i, n) - load(x + i, n)));
      });
      a.sums[chunk] = total.value();
    });
  });
  for (int64_t sample = 0; a.dsigma && sample < a.samples; ++sample)
    a.dsigma[sample] = static_cast<float>(sample_sum(a.sums, sample, a.elements));
  return BLIP3O_OK;
}

template <class Arguments>
static int run_dtypes(const Arguments& a) {
  if (a.samples < 0 || a.elements < 0) return BLIP3O_BAD_ARGUMENT;
  return by_dtype(a.dtype, [&](auto t) { return run<decltype(t)>(a); });
}

static int flow_interpolate(const blip3o_flow_interpolate_arguments& a) { return run_dtypes(a); }

static int flow_interpolate_backward(const blip3o_flow_interpolate_backward_arguments& a) { return run_dtypes(a); }

#endif
