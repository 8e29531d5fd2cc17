// Layer normalisation on a GPU; the contract is kernels/blip3o_kernels/ops/layer_norm.py.
#include "norm.cuh"

using namespace blip3o;

extern "C" int blip3o_cuda_layer_norm(const blip3o_layer_norm_arguments* a) {
  NormForward f = {};
  f.y = a->y, f.saved = a->saved, f.x = a->x, f.weight = a->weight, f.bias = a->bias;
  f.batch = 1, f.tokens = a->rows, f.width = a->width, f.stride = a->stride;
  f.eps = a->eps, f.centred = 1;
  f.dtype = a->dtype, f.parameter_dtype = a->weight_dtype;
  f.stream = a->stream;
  return norm_forward(f);
}

extern "C" int blip3o_cuda_layer_norm_backward(const blip3o_layer_norm_backward_arguments* a) {
  if (a->rows < 0 || a->width < 1 || a->blocks < 1) return BLIP3O_BAD_ARGUMENT;
  NormBackward b = {};
  b.dx = a->dx, b.dy = a->dy, b.x = a->x, b.weight = a->weight;
  b.rstd = a->saved, b.mean = a->saved + a->rows;
  b.partial = a->dweight || a->dbias ? a->workspace : nullptr;
  b.batch = 1, b.tokens = a->rows, b.width = a->width, b.stride = a->stride, b.runs = a->blocks;
  b.dtype = b.condition_dtype = a->dtype, b.weight_dtype = a->weight_dtype;
  b.normed = 1, b.plain = a->dbias != nullptr;
  b.stream = a->stream;
  int status = norm_backward(b);
  if (status) return status;
  return by_dtype(a->weight_dtype, [&](auto w) {
    const auto add_up = [&](void* to, const float* from) {
      using W = decltype(w);
      const int64_t apart = (b.plain ? 2 : 1) * a->width;
      if (to && !status) status = sum_blocks(static_cast<W*>(to), from, a->blocks, a->width, apart, a->stream);
    };
    add_up(a->dweight, a->workspace);
    add_up(a->dbias, a->workspace + a->width);
    return status;
  });
}
