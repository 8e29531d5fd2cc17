// The noise level of each sample on a GPU; the contract is kernels/blip3o_kernels/ops/flow_timesteps.py. A thread draws for a sample.
#include "philox.cuh"

namespace {

using namespace blip3o;

constexpr int THREADS = 128;
typedef Drawing<blip3o_flow_timesteps_arguments, BLIP3O_TIMESTEPS> Arguments;

__global__ void __launch_bounds__(THREADS) timesteps_kernel(Arguments a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= a.samples) return;
  uint32_t w[4];
  a.philox.words(0, a.positions[i], w);
  float sigma = uniform(w[0]);
  if (a.logit_normal) {
    float normal, unused;
    normals(w[0], w[1], normal, unused);
    sigma = 1.0f / (1.0f + expf(-(a.mean + a.std * normal)));
  }
  if (a.shift != 1.0f) sigma = a.shift * sigma / (1.0f + (a.shift - 1.0f) * sigma);
  a.sigma[i] = sigma;
}

}  // namespace

extern "C" int blip3o_cuda_flow_timesteps(const blip3o_flow_timesteps_arguments* a) {
  const int64_t most = 0x7fffffffll * THREADS;
  if (a->samples < 0 || a->samples > most) return BLIP3O_BAD_ARGUMENT;
  if (!a->samples) return BLIP3O_OK;
  return launch(timesteps_kernel, static_cast<unsigned>((a->samples + THREADS - 1) / THREADS), THREADS, 0, a->stream, Arguments(*a));
}
