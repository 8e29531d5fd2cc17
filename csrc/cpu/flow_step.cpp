// Guidance and one step of the ODE solver on a CPU; the contract is kernels/blip3o_kernels/ops/flow_step.py.
//
// One pass each way. The gradients of the three velocities are multiples of dy; the velocities themselves are read again only
// where the step's own gradient is wanted.
#ifndef BLIP3O_LANES
#define BLIP3O_BODY "flow_step.cpp"
#include "instruction_sets.h"

extern "C" int blip3o_cpu_flow_step(const blip3o_flow_step_arguments* a) { BLIP3O_RUN(a->instruction_set, flow_step(*a)) }

extern "C" int blip3o_cpu_flow_step_backward(const blip3o_flow_step_backward_arguments* a) {
  BLIP3O_RUN(a->instruction_set, flow_step_backward(*a))
}

#else  // once per instruction set

#include "chunks.h"

// The velocity with guidance and Heun's average. What is missing is null, the same in every iteration of a loop.
template <class T>
struct Velocity {
  const T *velocity, *unconditional, *previous;
  Floats guidance;

  template <class Arguments>
  Velocity(const Arguments& a, int64_t start)
      : velocity(from(a.velocity, start)),
        unconditional(from(a.unconditional, start)),
        previous(from(a.previous, start)),
        guidance(all(a.guidance)) {}

  static const T* from(const void* p, int64_t start) { return p ? static_cast<const T*>(p) + start : nullptr; }

  template <class Count>
  inline Floats operator()(int64_t i, Count n) const {
    Floats v = load(velocity + i, n);
    if (unconditional) {
      const Floats base = load(unconditional + i, n);
      v = base + guidance * (v - base);
    }
    return previous ? (v + load(previous + i, n)) * 0.5f : v;
  }
};

template <class T>
static int run(const blip3o_flow_step_arguments& a) {
  chunks(a.samples, a.elements, a.threads, [&](int64_t sample, int64_t start, int64_t length, int64_t) {
    const T* x = static_cast<const T*>(a.x) + start;
    T* y = static_cast<T*>(a.y) + start;
    const Velocity<T> velocity(a, start);
    const Floats step = all(a.steps ? a.steps[sample] : a.step);
    columns(length, [&](int64_t i, auto n) { store(y + i, load(x + i, n) + step * velocity(i, n), n); });
  });
  return BLIP3O_OK;
}

template <class T>
static int run(const blip3o_flow_step_backward_arguments& a) {
  chunks(a.samples, a.elements, a.threads, [&](int64_t sample, int64_t start, int64_t length, int64_t chunk) {
    const T* dy = static_cast<const T*>(a.dy) + start;
    const float step = (a.steps ? a.steps[sample] : a.step) * (a.previous ? 0.5f : 1.0f);
    const auto scaled = [&](void* gradient, float factor) {
      T* to = static_cast<T*>(gradient) + start;
      columns(length, [&](int64_t i, auto n) { store(to + i, load(dy + i, n) * factor, n); });
    };  // a chunk of dy stays in the cache from one gradient to the next
    if (a.dvelocity) scaled(a.dvelocity, a.unconditional ? step * a.guidance : step);
    if (a.dunconditional) scaled(a.dunconditional, step * (1.0f - a.guidance));
    if (a.dprevious) scaled(a.dprevious, step);
    if (a.dsteps) {
      const Velocity<T> velocity(a, start);
      Total total;
      columns(length, [&](int64_t i, auto n) { total.add(i, load(dy + i, n) * velocity(i, n)); });
      a.sums[chunk] = total.value();
    }
  });
  for (int64_t sample = 0; a.dsteps && sample < a.samples; ++sample)
    a.dsteps[sample] = static_cast<float>(sample_sum(a.sums, sample, a.elements));
  return BLIP3O_OK;
}

template <class Arguments>
static int run_dtypes(const Arguments& a) {
  if (a.samples < 0 || a.elements < 0) return BLIP3O_BAD_ARGUMENT;
  return by_dtype(a.dtype, [&](auto t) { return run<decltype(t)>(a); });
}

static int flow_step(const blip3o_flow_step_arguments& a) { return run_dtypes(a); }

static int flow_step_backward(const blip3o_flow_step_backward_arguments& a) { return run_dtypes(a); }

#endif
