// Cross entropy of a chunk of logits on a GPU, between the products of kernels/blip3o_kernels/logits.py; the contract is
// kernels/blip3o_kernels/ops/linear_cross_entropy.py.
//
// A block takes a row and reads it twice: for its maximum and its sum of exponentials at once, which every thread keeps for itself until
// the end, and for the gradient. The mean's share of a row is counted before the first chunk, the losses are added up after the
// last one, each by one block.
#include "device.cuh"

namespace {

using namespace blip3o;

typedef blip3o_linear_cross_entropy_arguments Arguments;

constexpr int THREADS = 256;
constexpr int TOTAL_THREADS = 1024;
constexpr int AHEAD = 4;          // accesses of a thread that are under way together
constexpr float LOWEST = -3e38f;  // below every logit; less it, even -infinity has an exponential, 0

// The workspace: a float for each row's loss, then 1 over the number of kept rows.
__device__ inline float* losses_of(const Arguments& a) { return reinterpret_cast<float*>(a.losses); }

__device__ inline float block_largest(float x, float* scratch) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lane));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  float largest = scratch[0];
#pragma unroll
  for (int warp = 1; warp < THREADS / 32; ++warp) largest = fmaxf(largest, scratch[warp]);
  return largest;
}

// some(start): of each AHEAD * N * THREADS columns the first that this thread owns; it owns N from there, then N every N * THREADS.
template <int N, class Some>
__device__ inline void for_some(int64_t vocab, Some some) {
  for (int64_t start = 0; start < vocab; start += AHEAD * N * THREADS) some(start + threadIdx.x * N);
}

// AHEAD * N logits; LOWEST where there is none.
template <int N>
struct Logits {
  Floats<N> group[AHEAD];

  __device__ Logits(const float* row, int64_t start, int64_t vocab) {
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) {
      const int64_t i = start + j * N * THREADS;
#pragma unroll
      for (int k = 0; k < N; ++k) group[j].v[k] = LOWEST;
      if (i < vocab) group[j] = load<N>(row + i);
    }
  }
};

struct Cap {
  float softcap, inverse;
  bool on;
  __device__ explicit Cap(float cap) : softcap(cap), inverse(1.0f / cap), on(cap > 0.0f) {}
  // The capped logit; `slope` becomes what its gradient is multiplied by.
  __device__ float operator()(float v, float& slope) const {
    slope = 1.0f;
    if (!on) return v;
    const float t = tanhf(v * inverse);
    slope = 1.0f - t * t;
    return softcap * t;
  }
  __device__ float operator()(float v) const {
    float unused;
    return (*this)(v, unused);
  }
};

template <int N, class D>
__device__ inline void zero_row(D* high, D* low, int64_t vocab) {
  for_some<N>(vocab, [&](int64_t start) {
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) {
      const int64_t i = start + j * N * THREADS;
      if (i >= vocab) continue;
      store<N>(high + i, Floats<N>{});
      if (low) store<N>(low + i, Floats<N>{});
    }
  });
}

// D: the type of dlogits; N: columns in one access.
template <int N, class D>
__global__ void __launch_bounds__(THREADS) rows_kernel(Arguments a) {
  __shared__ float scratch[3][32];
  const int64_t row = blockIdx.x, vocab = a.vocab, target = a.target[a.start + row];
  const float* logits = static_cast<const float*>(a.logits) + row * vocab;
  float* losses = losses_of(a);
  D* high = a.dlogits ? static_cast<D*>(a.dlogits) + row * a.dlogits_stride : nullptr;
  D* low = a.dlogits && a.parts == 2 ? high + a.rows * a.dlogits_stride : nullptr;
  if (target == a.ignore_index) {
    if (threadIdx.x == 0) losses[a.start + row] = 0;
    if (high) zero_row<N>(high, low, vocab);
    return;
  }
  const Cap capped(a.softcap);
  const bool inside = target >= 0 && target < vocab;
  const float chosen = inside ? capped(logits[target]) : 0.0f;

  float most = LOWEST, sum = 0, plain = 0;
  for_some<N>(vocab, [&](int64_t start) {
    Logits<N> v(logits, start, vocab);
    float higher = most;
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) {
      const int64_t i = start + j * N * THREADS;
      if (i >= vocab) continue;
#pragma unroll
      for (int k = 0; k < N; ++k) {
        v.group[j].v[k] = capped(v.group[j].v[k]);
        higher = fmaxf(higher, v.group[j].v[k]);
        plain += v.group[j].v[k];
      }
    }
    sum *= expf(most - higher);
    most = higher;
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) {
#pragma unroll
      for (int k = 0; k < N; ++k) sum += expf(v.group[j].v[k] - most);
    }
  });
  const float maximum = block_largest(most, scratch[0]);
  const float total = block_sum<THREADS>(sum * expf(most - maximum), scratch[1]);
  plain = block_sum<THREADS>(plain, scratch[2]);
  const float smoothing = a.label_smoothing, size = static_cast<float>(vocab);
  const float logarithm = logf(total), log_sum = maximum + logarithm;
  if (threadIdx.x == 0) {  // from differences to the maximum, which are small where the loss is
    float loss = logarithm - (1.0f - smoothing) * (chosen - maximum) + a.z_loss * log_sum * log_sum;
    if (smoothing > 0.0f) loss -= smoothing * (plain / size - maximum);
    losses[a.start + row] = inside ? loss : NAN;
  }
  if (!high) return;

  // d loss / d logit[v] = probability[v] (1 + 2 z_loss log_sum) - smoothing / vocab - (1 - smoothing) [v = target]
  const float share = losses[a.targets], scale = share * (1.0f + 2.0f * a.z_loss * log_sum) / total;
  const float spread = share * smoothing / size, own = share * (1.0f - smoothing);
  for_some<N>(vocab, [&](int64_t start) {
    const Logits<N> v(logits, start, vocab);
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) {
      const int64_t i = start + j * N * THREADS;
      if (i >= vocab) continue;
      Floats<N> d, rest;
#pragma unroll
      for (int k = 0; k < N; ++k) {
        float slope;
        d.v[k] = expf(capped(v.group[j].v[k], slope) - maximum) * scale - spread;
        if (i + k == target) d.v[k] -= own;
        d.v[k] *= slope;
        rest.v[k] = d.v[k] - to_float(from_float<D>(d.v[k]));
      }
      store<N>(high + i, d);
      if (low) store<N>(low + i, rest);
    }
  });
}

__global__ void __launch_bounds__(TOTAL_THREADS) share_kernel(Arguments a) {
  __shared__ float scratch[32];
  float kept = 0;
  for (int64_t i = threadIdx.x; i < a.targets; i += TOTAL_THREADS) kept += a.target[i] != a.ignore_index;
  kept = block_sum<TOTAL_THREADS>(kept, scratch);
  if (threadIdx.x == 0) losses_of(a)[a.targets] = 1.0f / fmaxf(kept, 1.0f);
}

__global__ void __launch_bounds__(TOTAL_THREADS) mean_kernel(Arguments a) {
  __shared__ float scratch[32];
  const float* losses = losses_of(a);
  float sum = 0;
  for (int64_t i = threadIdx.x; i < a.targets; i += TOTAL_THREADS) sum += losses[i];
  sum = block_sum<TOTAL_THREADS>(sum, scratch);
  if (threadIdx.x == 0) *a.loss = sum * losses[a.targets];
}

template <class D>
int run_rows(const Arguments& a) {
  const bool wide = divisible<4>(a.vocab, a.dlogits ? a.dlogits_stride : 0) && aligned(a.logits, a.dlogits);
  return launch(wide ? rows_kernel<4, D> : rows_kernel<1, D>, static_cast<unsigned>(a.rows), THREADS, 0, a.stream, a);
}

}  // namespace

extern "C" int blip3o_cuda_linear_cross_entropy(const blip3o_linear_cross_entropy_arguments* a) {
  if (a->rows < 0 || a->vocab < 1 || a->start < 0 || a->start + a->rows > a->targets) return BLIP3O_BAD_ARGUMENT;
  if (a->rows > 0x7fffffff || a->parts < 1 || a->parts > 2) return BLIP3O_BAD_ARGUMENT;
  if (a->dlogits && a->dlogits_stride < a->vocab) return BLIP3O_BAD_ARGUMENT;
  if (a->dlogits == a->logits && (a->parts > 1 || a->dlogits_dtype != a->dtype)) return BLIP3O_BAD_ARGUMENT;
  if (a->dtype != BLIP3O_FLOAT32) return BLIP3O_BAD_DTYPE;
  if (!a->rows) return BLIP3O_OK;
  int status = a->start ? static_cast<int>(BLIP3O_OK) : launch(share_kernel, 1, TOTAL_THREADS, 0, a->stream, *a);
  if (!status) status = by_dtype(a->dlogits_dtype, [&](auto d) { return run_rows<decltype(d)>(*a); });
  if (status || a->start + a->rows < a->targets) return status;
  return launch(mean_kernel, 1, TOTAL_THREADS, 0, a->stream, *a);
}
