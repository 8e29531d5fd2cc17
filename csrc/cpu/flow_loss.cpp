// The weighted mean squared error on a CPU; the contract is kernels/blip3o_kernels/ops/flow_loss.py.
//
// Two passes, one each way: what reaches the loss from above is not known in the forward pass, and a gradient stored there
// would be read, scaled and rounded a second time.
#ifndef BLIP3O_LANES
#define BLIP3O_BODY "flow_loss.cpp"
#include "instruction_sets.h"

extern "C" int blip3o_cpu_flow_loss(const blip3o_flow_loss_arguments* a) { BLIP3O_RUN(a->instruction_set, flow_loss(*a)) }

extern "C" int blip3o_cpu_flow_loss_backward(const blip3o_flow_loss_backward_arguments* a) {
  BLIP3O_RUN(a->instruction_set, flow_loss_backward(*a))
}

#else  // once per instruction set

#include "chunks.h"

template <class T>
static int run(const blip3o_flow_loss_arguments& a) {
  chunks(a.samples, a.elements, a.threads, [&](int64_t, int64_t start, int64_t length, int64_t chunk) {
    const T* prediction = static_cast<const T*>(a.prediction) + start;
    const T* target = static_cast<const T*>(a.target) + start;
    Total total;
    columns(length, [&](int64_t i, auto n) {
      ahead(prediction + i + BLIP3O_CHUNK), ahead(target + i + BLIP3O_CHUNK);
      const Floats error = load(prediction + i, n) - load(target + i, n);
      total.add(i, error * error);
    });
    a.sums[chunk] = total.value();
  });
  double loss = 0.0;
  for (int64_t sample = 0; sample < a.samples; ++sample) {
    const double mean = sample_sum(a.sums, sample, a.elements) / static_cast<double>(a.elements);
    a.means[sample] = static_cast<float>(mean);
    loss += a.weight ? mean * static_cast<double>(a.weight[sample]) : mean;
  }
  *a.loss = static_cast<float>(loss / static_cast<double>(a.samples));
  return BLIP3O_OK;
}

template <class T>
static int run(const blip3o_flow_loss_backward_arguments& a) {
  const bool past = past_caches(static_cast<T*>(a.dprediction), a.samples * a.elements, a.elements) &&
                    past_caches(static_cast<T*>(a.dtarget), a.samples * a.elements, a.elements);
  const double share = 2.0 * *a.dloss / static_cast<double>(a.samples * a.elements);
  chunks(a.samples, a.elements, a.threads, [&](int64_t sample, int64_t start, int64_t length, int64_t) {
    const T* prediction = static_cast<const T*>(a.prediction) + start;
    const T* target = static_cast<const T*>(a.target) + start;
    T* dprediction = static_cast<T*>(a.dprediction) + start;
    T* dtarget = a.dtarget ? static_cast<T*>(a.dtarget) + start : nullptr;
    const Floats slope = all(static_cast<float>(a.weight ? share * static_cast<double>(a.weight[sample]) : share));
    columns(length, [&](int64_t i, auto n) {
      const Floats gradient = slope * (load(prediction + i, n) - load(target + i, n));
      store(dprediction + i, gradient, n, past);
      if (dtarget) store(dtarget + i, -gradient, n, past);
    });
    if (past) fence();
  });
  return BLIP3O_OK;
}

template <class Arguments>
static int run_dtypes(const Arguments& a) {
  if (a.samples < 1 || a.elements < 1) return BLIP3O_BAD_ARGUMENT;
  return by_dtype(a.dtype, [&](auto t) { return run<decltype(t)>(a); });
}

static int flow_loss(const blip3o_flow_loss_arguments& a) { return run_dtypes(a); }

static int flow_loss_backward(const blip3o_flow_loss_backward_arguments& a) { return run_dtypes(a); }

#endif
