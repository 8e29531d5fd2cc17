// Normalise, scale and shift on a CPU; the contract is kernels/blip3o_kernels/ops/modulate.py.
//
// One pass each way: a group of rows stays in the first cache between its moments and its result. Backwards, a sample's rows
// give the sums over tokens (dscale, dshift), and a sample's sums, scaled, those over everything (dweight, dbias).
#ifndef BLIP3O_LANES
#define BLIP3O_BODY "modulate.cpp"
#include "instruction_sets.h"

extern "C" int blip3o_cpu_modulate(const blip3o_modulate_arguments* a) { BLIP3O_RUN(a->instruction_set, modulate(*a)) }

extern "C" int blip3o_cpu_modulate_backward(const blip3o_modulate_backward_arguments* a) {
  BLIP3O_RUN(a->instruction_set, modulate_backward(*a))
}

#else  // once per instruction set

#include "normalise.h"

template <class T, class W, bool CENTRED>
static int run(const blip3o_modulate_arguments& a) {
  const int64_t width = a.width, stride = a.stride, rows = a.batch * a.tokens;
  const W* weight = static_cast<const W*>(a.weight);
  const W* bias = static_cast<const W*>(a.bias);
  const int threads = blip3o_threads(a.threads, rows * width);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t sample = 0; sample < a.batch; ++sample) {
    const W* scale = static_cast<const W*>(a.scale) + sample * a.scale_stride;
    const W* shift = a.shift ? static_cast<const W*>(a.shift) + sample * a.shift_stride : nullptr;
    groups(a.tokens, [&](int64_t token, auto number) {
      constexpr int R = decltype(number)::value;
      const int64_t row = sample * a.tokens + token;
      const T* x = static_cast<const T*>(a.x) + row * stride;
      T* y = static_cast<T*>(a.y) + row * width;
      float rstds[R], means[R] = {};
      moments<R, CENTRED>(rstds, means, x, stride, width, a.eps);
      Floats rstd[R], mean[R];
      for (int r = 0; r < R; ++r) {
        rstd[r] = all(rstds[r]);
        mean[r] = all(means[r]);
        if (a.saved) a.saved[row + r] = rstds[r];
        if (a.saved && CENTRED) a.saved[rows + row + r] = means[r];
      }
      columns(width, [&](int64_t i, auto n) {
        const Floats gain = 1.0f + load(scale + i, n), offset = shift ? load(shift + i, n) : Floats{};
        const Floats w = weight ? load(weight + i, n) : all(1.0f), b = bias ? load(bias + i, n) : Floats{};
        for (int r = 0; r < R; ++r) {
          ahead(x + (R + r) * stride + i);
          const Floats v = load(x + r * stride + i, n);
          // b * gain + offset once for all rows would be NaN for an infinite gain, where the formula has infinity.
          const Floats normed = CENTRED ? ((v - mean[r]) * rstd[r] * w + b) * gain : v * rstd[r] * (w * gain);
          store(y + r * width + i, normed + offset, n);
        }
      });
    });
  }
  return BLIP3O_OK;
}

template <class T, class W, bool CENTRED>
static int run(const blip3o_modulate_backward_arguments& a) {
  const int64_t width = a.width, stride = a.stride, rows = a.batch * a.tokens;
  const W* weight = static_cast<const W*>(a.weight);
  const W* bias = static_cast<const W*>(a.bias);
  const int threads = blip3o_threads(a.threads, rows * width);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t block = 0; block < a.blocks; ++block) {
    float* gain = a.workspace + block * 5 * width;
    float* scaled = gain + width;
    float* plain = scaled + width;
    float* dweight = plain + width;
    float* dbias = dweight + width;
    std::memset(dweight, 0, sizeof(float) * static_cast<size_t>(2 * width));
    for (int64_t sample = a.batch * block / a.blocks; sample < a.batch * (block + 1) / a.blocks; ++sample) {
      const W* scale = static_cast<const W*>(a.scale) + sample * a.scale_stride;
      columns(width, [&](int64_t i, auto n) {
        const Floats g = 1.0f + load(scale + i, n);
        store(gain + i, weight ? g * load(weight + i, n) : g, n);
      });
      groups(a.tokens, [&](int64_t token, auto number) {
        const int64_t row = sample * a.tokens + token;
        backward_rows<decltype(number)::value, CENTRED>(
            static_cast<T*>(a.dx) + row * width, scaled, plain, token == 0, static_cast<const T*>(a.dy) + row * width,
            static_cast<const T*>(a.x) + row * stride, stride, gain, a.saved + row, a.saved + rows + row, width);
      });
      columns(width, [&](int64_t i, auto n) {
        const Floats s = load(scaled + i, n), p = load(plain + i, n), g = 1.0f + load(scale + i, n);
        Floats ds = weight ? s * load(weight + i, n) : s;
        if (bias) ds += p * load(bias + i, n);
        store(static_cast<W*>(a.dscale) + sample * width + i, ds, n);
        if (a.dshift) store(static_cast<W*>(a.dshift) + sample * width + i, p, n);
        if (a.dweight) store(dweight + i, load(dweight + i, n) + s * g, n);
        if (a.dbias) store(dbias + i, load(dbias + i, n) + p * g, n);
      });
    }
  }
  if (a.dweight) add_up(static_cast<W*>(a.dweight), a.workspace + 3 * width, a.blocks, 5 * width, width);
  if (a.dbias) add_up(static_cast<W*>(a.dbias), a.workspace + 4 * width, a.blocks, 5 * width, width);
  return BLIP3O_OK;
}

template <class T, class W, class Arguments>
static int run_norm(const Arguments& a) {
  return a.centred ? run<T, W, true>(a) : run<T, W, false>(a);
}

template <class Arguments>
static int run_dtypes(const Arguments& a) {
  return by_dtypes(a.dtype, a.condition_dtype, [&](auto t, auto w) { return run_norm<decltype(t), decltype(w)>(a); });
}

static int modulate(const blip3o_modulate_arguments& a) {
  return a.batch < 0 || a.tokens < 0 || a.width < 1 ? BLIP3O_BAD_ARGUMENT : run_dtypes(a);
}

// Without tokens the caller fills the sums with zeros itself.
static int modulate_backward(const blip3o_modulate_backward_arguments& a) {
  return a.batch < 0 || a.tokens < 1 || a.width < 1 || a.blocks < 1 ? BLIP3O_BAD_ARGUMENT : run_dtypes(a);
}

#endif
