// A tanh-gated residual branch on a CPU; the contract is kernels/blip3o_kernels/ops/gated_residual.py.
//
// One pass each way, as in modulate.cpp. The forward pass leaves tanh(gate) and 1/rms for the backward one. The gradient of the
// residual is dy itself, which needs no kernel.
#ifndef BLIP3O_LANES
#define BLIP3O_BODY "gated_residual.cpp"
#include "instruction_sets.h"

extern "C" int blip3o_cpu_gated_residual(const blip3o_gated_residual_arguments* a) {
  BLIP3O_RUN(a->instruction_set, gated_residual(*a))
}

extern "C" int blip3o_cpu_gated_residual_backward(const blip3o_gated_residual_backward_arguments* a) {
  BLIP3O_RUN(a->instruction_set, gated_residual_backward(*a))
}

#else  // once per instruction set

#include "normalise.h"

template <class T, class W, bool NORMED>
static int run(const blip3o_gated_residual_arguments& a) {
  const int64_t width = a.width, stride = a.stride, residual_stride = a.residual_stride;
  const W* weight = static_cast<const W*>(a.weight);
  float* rstds_saved = a.saved + a.batch * width;
  const int threads = blip3o_threads(a.threads, a.batch * a.tokens * width);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t sample = 0; sample < a.batch; ++sample) {
    const W* gate = static_cast<const W*>(a.gate) + sample * a.gate_stride;
    float* opened = a.saved + sample * width;
    columns(width, [&](int64_t i, auto n) { store(opened + i, hyperbolic_tangent(load(gate + i, n)), n); });
    groups(a.tokens, [&](int64_t token, auto number) {
      constexpr int R = decltype(number)::value;
      const int64_t row = sample * a.tokens + token;
      const T* residual = static_cast<const T*>(a.residual) + row * residual_stride;
      const T* x = static_cast<const T*>(a.x) + row * stride;
      T* y = static_cast<T*>(a.y) + row * width;
      Floats rstd[R];
      if (NORMED) {
        float rstds[R];
        moments<R, false>(rstds, static_cast<float*>(nullptr), x, stride, width, a.eps);
        for (int r = 0; r < R; ++r) {
          rstd[r] = all(rstds[r]);
          rstds_saved[row + r] = rstds[r];
        }
      }
      columns(width, [&](int64_t i, auto n) {
        Floats gain = load(opened + i, n);
        if (NORMED) gain *= load(weight + i, n);
        for (int r = 0; r < R; ++r) {
          ahead(x + (R + r) * stride + i), ahead(residual + (R + r) * residual_stride + i);
          const Floats v = load(x + r * stride + i, n), base = load(residual + r * residual_stride + i, n);
          store(y + r * width + i, base + gain * (NORMED ? v * rstd[r] : v), n);
        }
      });
    });
  }
  return BLIP3O_OK;
}

// Without the norm: dx = dy * gain, and the sum of dy * x.
template <int R, class T>
static inline void plain_rows(T* dx, float* scaled, bool first, const T* dy, const T* x, int64_t stride, const float* gain,
                              int64_t width) {
  columns(width, [&](int64_t i, auto n) {
    const Floats g = load(gain + i, n);
    Floats s{};
    for (int r = 0; r < R; ++r) {
      const Floats d = load(dy + r * width + i, n);
      s += d * load(x + r * stride + i, n);
      store(dx + r * width + i, d * g, n);
    }
    store(scaled + i, first ? s : load(scaled + i, n) + s, n);
  });
}

template <class T, class W, bool NORMED>
static int run(const blip3o_gated_residual_backward_arguments& a) {
  const int64_t width = a.width, stride = a.stride;
  const W* weight = static_cast<const W*>(a.weight);
  const float* rstds = a.saved + a.batch * width;
  const int threads = blip3o_threads(a.threads, a.batch * a.tokens * width);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t block = 0; block < a.blocks; ++block) {
    float* gain = a.workspace + block * 3 * width;
    float* scaled = gain + width;
    float* dweight = scaled + width;
    std::memset(dweight, 0, sizeof(float) * static_cast<size_t>(width));
    for (int64_t sample = a.batch * block / a.blocks; sample < a.batch * (block + 1) / a.blocks; ++sample) {
      const float* opened = a.saved + sample * width;
      if (NORMED)
        columns(width, [&](int64_t i, auto n) { store(gain + i, load(opened + i, n) * load(weight + i, n), n); });
      groups(a.tokens, [&](int64_t token, auto number) {
        constexpr int R = decltype(number)::value;
        const int64_t row = sample * a.tokens + token;
        T* dx = static_cast<T*>(a.dx) + row * width;
        const T* dy = static_cast<const T*>(a.dy) + row * width;
        const T* x = static_cast<const T*>(a.x) + row * stride;
        if (NORMED)
          backward_rows<R, false>(dx, scaled, static_cast<float*>(nullptr), token == 0, dy, x, stride, gain, rstds + row,
                                  static_cast<const float*>(nullptr), width);
        else
          plain_rows<R>(dx, scaled, token == 0, dy, x, stride, opened, width);
      });
      columns(width, [&](int64_t i, auto n) {
        const Floats s = load(scaled + i, n), t = load(opened + i, n), slope = 1.0f - t * t;
        store(static_cast<W*>(a.dgate) + sample * width + i, slope * (NORMED ? s * load(weight + i, n) : s), n);
        if (NORMED) store(dweight + i, load(dweight + i, n) + s * t, n);
      });
    }
  }
  if (NORMED) add_up(static_cast<W*>(a.dweight), a.workspace + 2 * width, a.blocks, 3 * width, width);
  return BLIP3O_OK;
}

template <class T, class W, class Arguments>
static int run_norm(const Arguments& a) {
  return a.weight ? run<T, W, true>(a) : run<T, W, false>(a);
}

template <class Arguments>
static int run_dtypes(const Arguments& a) {
  return by_dtypes(a.dtype, a.condition_dtype, [&](auto t, auto w) { return run_norm<decltype(t), decltype(w)>(a); });
}

static int gated_residual(const blip3o_gated_residual_arguments& a) {
  return a.batch < 0 || a.tokens < 0 || a.width < 1 ? BLIP3O_BAD_ARGUMENT : run_dtypes(a);
}

// Without tokens the caller fills the sums with zeros itself.
static int gated_residual_backward(const blip3o_gated_residual_backward_arguments& a) {
  return a.batch < 0 || a.tokens < 1 || a.width < 1 || a.blocks < 1 ? BLIP3O_BAD_ARGUMENT : run_dtypes(a);
}

#endif
