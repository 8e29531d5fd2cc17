// What the launchers of rms_norm and add_rms_norm share.
#pragma once

#include "norm.cuh"

namespace blip3o {

template <class Arguments>
NormForward forward_of(const Arguments& a) {
  NormForward f = {};
  f.y = a.y, f.x = a.x, f.weight = a.weight;
  f.batch = 1, f.tokens = a.rows, f.width = a.width, f.stride = a.stride;
  f.eps = a.eps, f.weight_offset = a.offset;
  f.dtype = a.dtype, f.parameter_dtype = a.weight_dtype, f.round_before_weight = a.round_before_weight;
  f.stream = a.stream;
  return f;
}

// The backward pass for x, whose rows are `stride` apart. more: what is added to its gradient, or null.
template <class Arguments>
int run_backward(const Arguments& a, const void* x, int64_t stride, const void* more) {
  if (a.rows < 0 || a.width < 1 || a.blocks < 1 || (a.dweight && !(a.partial && a.weight))) return BLIP3O_BAD_ARGUMENT;
  NormBackward b = {};
  b.dx = a.dx, b.dy = a.dy, b.x = x, b.more = more, b.weight = a.weight;
  b.partial = a.dweight ? a.partial : nullptr;
  b.batch = 1, b.tokens = a.rows, b.width = a.width, b.stride = stride, b.runs = a.blocks;
  b.eps = a.eps, b.weight_offset = a.offset;
  b.dtype = b.condition_dtype = a.dtype, b.weight_dtype = a.weight_dtype;
  b.stream = a.stream;
  const int status = rms_backward(b);
  if (status || !a.dweight) return status;
  return by_dtype(a.weight_dtype, [&](auto w) {
    return sum_blocks(static_cast<decltype(w)*>(a.dweight), a.partial, a.blocks, a.width, a.width, a.stream);
  });
}

}  // namespace blip3o
