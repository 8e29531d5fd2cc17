// The sum of x and residual and its RMS normalisation on a GPU; the contract is kernels/blip3o_kernels/ops/add_rms_norm.py.
#include "rms.cuh"

using namespace blip3o;

extern "C" int blip3o_cuda_add_rms_norm(const blip3o_add_rms_norm_arguments* a) {
  NormForward f = forward_of(*a);
  f.residual = a->residual, f.residual_stride = a->residual_stride, f.added = a->added;
  return norm_forward(f);
}

extern "C" int blip3o_cuda_add_rms_norm_backward(const blip3o_add_rms_norm_backward_arguments* a) {
  return run_backward(*a, a->added, a->width, a->dadded);
}
