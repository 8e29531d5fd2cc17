// RMS normalisation on a GPU; the contract is kernels/blip3o_kernels/ops/rms_norm.py.
#include "rms.cuh"

using namespace blip3o;

extern "C" int blip3o_cuda_rms_norm(const blip3o_rms_norm_arguments* a) {
  if (a->rows < 0 || a->width < 1) return BLIP3O_BAD_ARGUMENT;
  if (!a->rows) return BLIP3O_OK;
  return by_dtypes(a->dtype, a->weight_dtype, [&](auto t, auto w) {
    const bool wide = divisible<16 / sizeof(t)>(a->width, a->stride) && aligned(a->x, a->y, a->weight);
    return run_forward<decltype(t), decltype(w)>(*a, wide);
  });
}

extern "C" int blip3o_cuda_rms_norm_backward(const blip3o_rms_norm_backward_arguments* a) {
  return run_backward(*a, a->x, a->stride, nullptr);
}
