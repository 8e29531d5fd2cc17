// Sinusoids of the diffusion time on a GPU; the contract is kernels/blip3o_kernels/ops/timestep_embedding.py.
//
// Frequencies and angles are doubles, as on a CPU: at 1000 rad the last place of a float is 6e-5, which is what the sinusoids would be
// wrong by. What is left of an angle after its quarters of a turn is a float. So an exponential and four operations are in double,
// and the exponential serves all rows that its thread goes through: less than a launch costs, even where doubles are slow.
#include "sinusoids.cuh"

namespace {

using namespace blip3o;

constexpr int THREADS = 128;
constexpr int64_t MOST_RUNS = 1024;  // of rows, each with an exponential of its own

__device__ inline double frequency_of(int64_t i, double rate) { return exp(static_cast<double>(i) * rate); }

__device__ inline void sinusoids_of(double angle, float& cosine, float& sine) {
  const double quarter = rint(angle * 0.63661977236758134308);
  const float rest = static_cast<float>(fma(quarter, -1.57079632679489661923, angle));
  sinusoids(rest, static_cast<uint32_t>(static_cast<int64_t>(quarter)), cosine, sine);
}

// rate: -log(max_period) / half.
__global__ void __launch_bounds__(THREADS) embedding_kernel(blip3o_timestep_embedding_arguments a, double rate) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= a.half) return;
  const double frequency = frequency_of(i, rate);
  for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) {
    float cosine, sine;
    sinusoids_of(frequency * static_cast<double>(a.timestep[row]), cosine, sine);
    float* y = a.y + row * 2 * a.half + i;
    y[0] = cosine;
    y[a.half] = sine;
  }
}

// dtimestep = sum over i of frequency (dsine cosine - dcosine sine).
__global__ void __launch_bounds__(THREADS)
    embedding_backward_kernel(blip3o_timestep_embedding_backward_arguments a, double rate) {
  __shared__ float scratch[32];
  const int64_t row = blockIdx.x;
  const float* dy = a.dy + row * 2 * a.half;
  const double timestep = static_cast<double>(a.timestep[row]);
  float sum = 0;
  for (int64_t i = threadIdx.x; i < a.half; i += THREADS) {
    const double frequency = frequency_of(i, rate);
    float cosine, sine;
    sinusoids_of(frequency * timestep, cosine, sine);
    sum += static_cast<float>(frequency) * (dy[a.half + i] * cosine - dy[i] * sine);
  }
  sum = block_sum<THREADS>(sum, scratch);
  if (threadIdx.x == 0) a.dtimestep[row] = sum;
}

template <class Arguments>
bool sound(const Arguments& a) {
  return a.rows >= 0 && a.half >= 1 && a.half <= 0x7fffffff && a.max_period > 0.0;
}

template <class Arguments>
double rate_of(const Arguments& a) {
  return -log(a.max_period) / static_cast<double>(a.half);
}

}  // namespace

extern "C" int blip3o_cuda_timestep_embedding(const blip3o_timestep_embedding_arguments* a) {
  if (!sound(*a)) return BLIP3O_BAD_ARGUMENT;
  if (!a->rows) return BLIP3O_OK;
  const dim3 blocks(static_cast<unsigned>((a->half + THREADS - 1) / THREADS),
                    static_cast<unsigned>(a->rows < MOST_RUNS ? a->rows : MOST_RUNS));
  return launch(embedding_kernel, blocks, THREADS, 0, a->stream, *a, rate_of(*a));
}

extern "C" int blip3o_cuda_timestep_embedding_backward(const blip3o_timestep_embedding_backward_arguments* a) {
  if (!sound(*a) || a->rows > 0x7fffffff) return BLIP3O_BAD_ARGUMENT;
  if (!a->rows) return BLIP3O_OK;
  return launch(embedding_backward_kernel, static_cast<unsigned>(a->rows), THREADS, 0, a->stream, *a, rate_of(*a));
}
