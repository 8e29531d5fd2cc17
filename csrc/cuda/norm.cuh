// What the norms share: the moments of a row, one forward pass (norm_forward.cu; gated_residual has its own) and one backward pass
// (norm_backward.cu).
#pragma once

#include "rows.cuh"

namespace blip3o {

struct Moments {
  float rstd, mean;
};

// Of a row of `width` values: each(f) calls f with every part of it that this thread owns, as Floats; sum(x, place) adds the floats
// of an array up over all threads of the row, with shared memory that `place`, 0 or 1, has for itself.
template <class Each, class Sum>
__device__ inline Moments moments(int64_t width, float eps, bool centred, Each each, Sum sum) {
  const float count = static_cast<float>(width);
  float mean = 0;
  if (centred) {
    float total[1] = {};
    each([&](const auto& v) {
#pragma unroll
      for (int k = 0; k < v.size; ++k) total[0] += v.v[k];
    });
    sum(total, 0);
    mean = total[0] / count;
  }
  float sums[2] = {};  // of squares, and of what rounding left in the mean
  each([&](const auto& v) {
#pragma unroll
    for (int k = 0; k < v.size; ++k) {
      const float d = v.v[k] - mean;
      sums[0] += d * d;
      sums[1] += d;
    }
  });
  sum(sums, 1);
  if (centred) mean += sums[1] / count;
  return {reciprocal_root(sums[0], count, eps), mean};
}

// N values of a parameter in float32 or in T. Which of them is the same for all threads: a branch costs nothing beside the loads.
template <int N, class T>
__device__ inline Floats<N> load_parameter(const void* p, bool is_float, int64_t i) {
  if (is_float) return load<N>(static_cast<const float*>(p) + i);
  return load<N>(static_cast<const T*>(p) + i);
}

// The same, or `otherwise` without a parameter.
template <int N, class T>
__device__ inline Floats<N> load_or(const void* p, bool is_float, int64_t i, float otherwise) {
  if (p) return load_parameter<N, T>(p, is_float, i);
  Floats<N> floats;
#pragma unroll
  for (int k = 0; k < N; ++k) floats.v[k] = otherwise;
  return floats;
}

// Whether parameters of that type can be read beside values of type `dtype`.
inline bool is_parameter(int parameter_dtype, int dtype) { return parameter_dtype == dtype || parameter_dtype == BLIP3O_FLOAT32; }

// Forward, with v = x, or round(x + residual), which goes to `added`:
//   n = (v - mean) * rstd                                 mean is 0 if not `centred`; rounded if `round_before_weight`
//   y = round((n * (weight_offset + weight) + bias) * (1 + scale) + shift)       of what there is
struct NormForward {
  void *y, *added;
  float* saved;  // rstd of each row, then, if centred, the mean of each row; null: not wanted
  const void *x, *residual, *weight, *bias;
  const void *scale, *shift;  // [batch, width]
  int64_t batch, tokens, width, stride, residual_stride, scale_stride, shift_stride;
  float eps, weight_offset;
  int dtype, parameter_dtype, centred, round_before_weight;
  void* stream;
};
int norm_forward(const NormForward& arguments);

// Backward, with n = (x - mean) * rstd, or x if not `normed`, and u = dy * gain:
//   dx   = rstd * (u - mean(u) - n * mean(u * n)) + more         mean(u) only if there is a mean, or dy * gain if not `normed`
//   gain = (condition_offset + condition) * (weight_offset + weight), of what there is
// Each sample's rows are cut into `runs`; in partial [batch, runs, 1 or 2, width] every run leaves its sums of dy * n and, if
// `plain`, of dy.
struct NormBackward {
  void* dx;
  float* partial;  // null: not wanted
  const void* dy;
  const void* x;
  const void* more;       // null: none
  const void* condition;  // [batch, width], rows condition_stride apart; null: none
  const void* weight;     // null: none
  const float* rstd;      // [rows]
  const float* mean;      // [rows]; null: zeros
  int64_t batch, tokens, width, stride, condition_stride, runs;
  float eps, condition_offset, weight_offset;
  int dtype, condition_dtype, weight_dtype, normed, plain;
  void* stream;
  int64_t each, left;  // tokens of a run, and how many runs have one more; norm_backward computes them
};

// As its arguments say; without x's moments.
int norm_backward(NormBackward arguments);
// For RMS norms: 1/rms is found again from x, there may be `more`, and there are no condition, mean and plain sums.
int rms_backward(NormBackward arguments);

}  // namespace blip3o
