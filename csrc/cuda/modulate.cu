// Normalise, scale and shift on a GPU; the contract is kernels/blip3o_kernels/ops/modulate.py.
//
// Backwards, norm_backward leaves the sums of runs of each sample's tokens; a second kernel makes a sample's dscale and dshift of
// them and leaves what the sample adds to dweight and dbias, which a third adds up.
#include "norm.cuh"

namespace {

using namespace blip3o;

// With a sample's sums s of dy * n and p of dy:   dscale = s * weight + p * bias,   dshift = p,
// and what it adds to dweight, s * (1 + scale), and to dbias, p * (1 + scale), replaces the sums of its first run.
template <class W>
__global__ void __launch_bounds__(COLUMN_THREADS) sample_kernel(blip3o_modulate_backward_arguments a) {
  __shared__ float group[2][COLUMN_THREADS];
  const unsigned width = static_cast<unsigned>(a.width), parts = (width + blockDim.x - 1) / blockDim.x;
  const int64_t sample = blockIdx.x / parts, column = static_cast<int64_t>(blockIdx.x % parts) * blockDim.x + threadIdx.x;
  const bool exists = column < a.width, plain = a.dshift || a.dbias;
  const int64_t apart = (plain ? 2 : 1) * a.width;
  float* partial = a.workspace + sample * a.blocks * apart + column;
  const float s = column_sum(partial, exists, a.blocks, apart, group[0]);
  const float p = plain ? column_sum(partial + a.width, exists, a.blocks, apart, group[1]) : 0.0f;
  if (threadIdx.y || !exists) return;
  const float gain = 1.0f + to_float(static_cast<const W*>(a.scale)[sample * a.scale_stride + column]);
  float dscale = a.weight ? s * to_float(static_cast<const W*>(a.weight)[column]) : s;
  if (a.bias) dscale += p * to_float(static_cast<const W*>(a.bias)[column]);
  static_cast<W*>(a.dscale)[sample * a.width + column] = from_float<W>(dscale);
  if (a.dshift) static_cast<W*>(a.dshift)[sample * a.width + column] = from_float<W>(p);
  if (a.dweight) partial[0] = s * gain;
  if (a.dbias) partial[a.width] = p * gain;
}

template <class W>
int finish(const blip3o_modulate_backward_arguments& a) {
  const dim3 threads = column_threads(a.blocks);
  const int64_t parts = (a.width + threads.x - 1) / threads.x, apart = (a.dshift || a.dbias ? 2 : 1) * a.width;
  if (a.width > 0x7fffffff || a.batch > 0x7fffffff / parts) return BLIP3O_BAD_ARGUMENT;
  int status = launch(sample_kernel<W>, static_cast<unsigned>(a.batch * parts), threads, 0, a.stream, a);
  const auto add_up = [&](void* to, const float* from) {
    if (to && !status) status = sum_blocks(static_cast<W*>(to), from, a.batch, a.width, a.blocks * apart, a.stream);
  };
  add_up(a.dweight, a.workspace);
  add_up(a.dbias, a.workspace + a.width);
  return status;
}

}  // namespace

extern "C" int blip3o_cuda_modulate(const blip3o_modulate_arguments* a) {
  NormForward f = {};
  f.y = a->y, f.saved = a->saved, f.x = a->x;
  f.scale = a->scale, f.shift = a->shift, f.weight = a->weight, f.bias = a->bias;
  f.batch = a->batch, f.tokens = a->tokens, f.width = a->width;
  f.stride = a->stride, f.scale_stride = a->scale_stride, f.shift_stride = a->shift_stride;
  f.eps = a->eps, f.centred = a->centred;
  f.dtype = a->dtype, f.parameter_dtype = a->condition_dtype;
  f.stream = a->stream;
  return a->scale || !a->batch ? norm_forward(f) : static_cast<int>(BLIP3O_BAD_ARGUMENT);
}

// Without tokens the caller fills the sums with zeros itself.
extern "C" int blip3o_cuda_modulate_backward(const blip3o_modulate_backward_arguments* a) {
  if (a->batch < 0 || a->tokens < 1 || a->width < 1 || a->blocks < 1 || !a->scale) return BLIP3O_BAD_ARGUMENT;
  if (!a->batch) return BLIP3O_OK;
  const int64_t rows = a->batch * a->tokens;
  NormBackward b = {};
  b.dx = a->dx, b.dy = a->dy, b.x = a->x, b.condition = a->scale, b.weight = a->weight;
  b.rstd = a->saved, b.mean = a->centred ? a->saved + rows : nullptr;
  b.partial = a->workspace;
  b.batch = a->batch, b.tokens = a->tokens, b.width = a->width, b.runs = a->blocks;
  b.stride = a->stride, b.condition_stride = a->scale_stride;
  b.condition_offset = 1.0f;
  b.dtype = a->dtype, b.condition_dtype = b.weight_dtype = a->condition_dtype;
  b.normed = 1, b.plain = a->dshift || a->dbias;
  b.stream = a->stream;
  const int status = norm_backward(b);
  if (status) return status;
  return by_dtype(a->condition_dtype, [&](auto w) { return finish<decltype(w)>(*a); });
}
