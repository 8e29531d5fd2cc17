// The straight path and its velocity on a CPU; the contract is kernels/blip3o_kernels/ops/flow_interpolate.py.
//
// Samples are cut into chunks, the unit of work for threads and of the sums, so that the number of threads changes no bit.
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

template <class T>
static int run(const blip3o_flow_interpolate_arguments& a) {
  const T* x_ = static_cast<const T*>(a.x);
  const T* noise_ = static_cast<const T*>(a.noise);
  chunks(a.samples, a.elements, a.threads, [&](int64_t sample, int64_t start, int64_t length, int64_t) {
    const T* x = x_ + start;
    const T* noise = noise_ + start;
    T* x_sigma = static_cast<T*>(a.x_sigma) + start;
    T* velocity = static_cast<T*>(a.velocity) + start;
    const Floats sigma = all(a.sigma[sample]), rest = all(1.0f - a.sigma[sample]);
    columns(length, [&](int64_t i, auto n) {
      const Floats v = load(x + i, n), z = load(noise + i, n);
      store(x_sigma + i, rest * v + sigma * z, n);
      store(velocity + i, z - v, n);
    });
  });
  return BLIP3O_OK;
}

template <class T>
static int run(const blip3o_flow_interpolate_backward_arguments& a) {
  chunks(a.samples, a.elements, a.threads, [&](int64_t sample, int64_t start, int64_t length, int64_t chunk) {
    const T* x = static_cast<const T*>(a.x) + start;
    const T* noise = static_cast<const T*>(a.noise) + start;
    const T* dx_sigma = static_cast<const T*>(a.dx_sigma) + start;
    const T* dvelocity = static_cast<const T*>(a.dvelocity) + start;
    T* dx = static_cast<T*>(a.dx) + start;
    T* dnoise = static_cast<T*>(a.dnoise) + start;
    const Floats sigma = all(a.sigma[sample]), rest = all(1.0f - a.sigma[sample]);
    Total total;
    columns(length, [&](int64_t i, auto n) {
      const Floats d = load(dx_sigma + i, n), dv = load(dvelocity + i, n);
      store(dx + i, rest * d - dv, n);
      store(dnoise + i, sigma * d + dv, n);
      total.add(d * (load(noise + i, n) - load(x + i, n)));
    });
    a.sums[chunk] = total.value();
  });
  for (int64_t sample = 0; sample < a.samples; ++sample)
    a.dsigma[sample] = static_cast<float>(sample_sum(a.sums, sample, a.elements));
  return BLIP3O_OK;
}

template <class Arguments>
static int run_dtypes(const Arguments& a) {
  if (a.samples < 0 || a.elements < 0) return BLIP3O_BAD_ARGUMENT;
  switch (a.dtype) {
    case BLIP3O_FLOAT32: return run<float>(a);
    case BLIP3O_BFLOAT16: return run<bfloat16>(a);
    case BLIP3O_FLOAT16: return run<float16>(a);
    default: return BLIP3O_BAD_DTYPE;
  }
}

static int flow_interpolate(const blip3o_flow_interpolate_arguments& a) { return run_dtypes(a); }

static int flow_interpolate_backward(const blip3o_flow_interpolate_backward_arguments& a) { return run_dtypes(a); }

#endif
