// silu(gate) * up on a CPU; the contract is kernels/blip3o_kernels/ops/swiglu.py.
#ifndef BLIP3O_LANES
#define BLIP3O_BODY "swiglu.cpp"
#include "instruction_sets.h"

extern "C" int blip3o_cpu_swiglu(const blip3o_swiglu_arguments* a) { BLIP3O_RUN(a->instruction_set, swiglu(*a)) }

extern "C" int blip3o_cpu_swiglu_backward(const blip3o_swiglu_backward_arguments* a) {
  BLIP3O_RUN(a->instruction_set, swiglu_backward(*a))
}

#else  // once per instruction set

// silu(v) = v / e and sigmoid(v) = 1 / e, each rounded once after e: v * sigmoid(v) would be rounded twice.
static inline Floats one_plus_exponential(Floats v) { return 1.0f + exponential(-v); }

template <class T>
static int run(const blip3o_swiglu_arguments& a) {
  const int threads = blip3o_threads(a.threads, 4 * a.rows * a.width);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride;
    const T* up = static_cast<const T*>(a.up) + row * a.up_stride;
    T* y = static_cast<T*>(a.y) + row * a.width;
    int64_t i = 0;
    for (; i + BLIP3O_LANES <= a.width; i += BLIP3O_LANES) {
      ahead(gate + a.gate_stride + i), ahead(up + a.up_stride + i);
      const Floats g = load(gate + i);
      store(y + i, g / one_plus_exponential(g) * load(up + i));
    }
    if (const int64_t n = a.width - i) {
      const Floats g = load(gate + i, n);
      store(y + i, g / one_plus_exponential(g) * load(up + i, n), n);
    }
  }
  return BLIP3O_OK;
}

// With s = sigmoid(gate):   dup = dy * gate * s,   dgate = dy * up * s * (1 + gate * (1 - s)).
static inline void gradients(Floats dy, Floats gate, Floats up, Floats& dgate, Floats& dup) {
  const Floats e = one_plus_exponential(gate), s = 1.0f / e;
  dup = dy * (gate / e);
  dgate = dy * up * (s * (1.0f + gate * (1.0f - s)));
}

template <class T>
static int run(const blip3o_swiglu_backward_arguments& a) {
  const int threads = blip3o_threads(a.threads, 4 * a.rows * a.width);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride;
    const T* up = static_cast<const T*>(a.up) + row * a.up_stride;
    const T* dy = static_cast<const T*>(a.dy) + row * a.width;
    T* dgate = static_cast<T*>(a.dgate) + row * a.gradient_stride;
    T* dup = static_cast<T*>(a.dup) + row * a.gradient_stride;
    Floats g, u;
    int64_t i = 0;
    for (; i + BLIP3O_LANES <= a.width; i += BLIP3O_LANES) {
      ahead(dy + a.width + i), ahead(gate + a.gate_stride + i), ahead(up + a.up_stride + i);
      gradients(load(dy + i), load(gate + i), load(up + i), g, u);
      store(dgate + i, g);
      store(dup + i, u);
    }
    if (const int64_t n = a.width - i) {
      gradients(load(dy + i, n), load(gate + i, n), load(up + i, n), g, u);
      store(dgate + i, g, n);
      store(dup + i, u, n);
    }
  }
  return BLIP3O_OK;
}

template <class Arguments>
static int run_dtypes(const Arguments& a) {
  if (a.rows < 0 || a.width < 0) return BLIP3O_BAD_ARGUMENT;
  return by_dtype(a.dtype, [&](auto t) { return run<decltype(t)>(a); });
}

static int swiglu(const blip3o_swiglu_arguments& a) { return run_dtypes(a); }

static int swiglu_backward(const blip3o_swiglu_backward_arguments& a) { return run_dtypes(a); }

#endif
