// Layer normalisation on a GPU, which is modulate's without a condition; the contract is kernels/blip3o_kernels/ops/layer_norm.py.
#include "norm.cuh"

using namespace blip3o;

extern "C" int blip3o_cuda_layer_norm(const blip3o_layer_norm_arguments* a) {
  blip3o_modulate_arguments b = {};
  b.y = a->y, b.saved = a->saved, b.x = a->x, b.weight = a->weight, b.bias = a->bias;
  b.batch = 1, b.tokens = a->rows, b.width = a->width, b.stride = a->stride;
  b.eps = a->eps, b.centred = 1;
  b.dtype = a->dtype, b.condition_dtype = a->weight_dtype;
  b.stream = a->stream;
  return normalise(b);
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
