// RMS normalisation on a GPU; the contract is kernels/blip3o_kernels/ops/rms_norm.py.
#include "rms.cuh"

using namespace blip3o;

extern "C" int blip3o_cuda_rms_norm(const blip3o_rms_norm_arguments* a) { return norm_forward(forward_of(*a)); }

extern "C" int blip3o_cuda_rms_norm_backward(const blip3o_rms_norm_backward_arguments* a) {
  return run_backward(*a, a->x, a->stride, nullptr);
}
