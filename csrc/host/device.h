// What CUDA's headers and language give csrc/cuda, for a C++ compiler: with this in front the same sources run on the host, each
// thread a fiber, blocks one after the other (run.cpp). For the tests alone; csrc/cuda/device.cuh includes it where nvcc is not.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned width = 1, unsigned height = 1, unsigned depth = 1) : x(width), y(height), z(depth) {}
};

typedef void* cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };

namespace host {

// Of the thread that runs now.
struct Place {
  dim3 thread, block, threads, blocks;
};
const Place& here();
const Place& place(size_t thread);

// Runs `body`, a call of `kernel`, as every thread of every block; what is wrong with what the threads do is printed, and ends the
// process.
cudaError_t run(const void* kernel, dim3 blocks, dim3 threads, size_t shared, const std::function<void()>& body);
cudaError_t last_error();
const char* name_of(cudaError_t);

void synchronise();  // __syncthreads
[[noreturn]] void fail(const char* what);  // says which thread it was
[[noreturn]] void fail(const char* what, const void* code);
[[noreturn]] void fail(const char* what, const void* code, size_t thread);
size_t random_below(size_t n);
// The 32-bit word that lane `from` of this warp gives, when all lanes of `mask` have given theirs.
uint32_t exchange(uint32_t mask, uint32_t word, int from);
// Waits for all lanes of this warp; the last to come does `work` on what each has given. It orders no accesses of memory.
void together(void* mine, void (*work)(void* const (&all)[32]));
int lane();
char* dynamic_shared();
size_t number();  // of the running thread in its block
int fault();      // tests/cuda_on_host.py: which of the planted faults is on; 0: none
bool running();   // whether a thread runs, and not the code that launches
int capability();       // of the GPU that this is taken for: the first number, 9 for a Hopper
int multiprocessors();  // that it has

template <class T>
T shuffle(uint32_t mask, T value, int from) {
  static_assert(sizeof(T) == 4, "a shuffle moves 32 bits");
  uint32_t word;
  std::memcpy(&word, &value, 4);
  word = exchange(mask, word, from);
  std::memcpy(&value, &word, 4);
  return value;
}

}  // namespace host

#define threadIdx (host::here().thread)
#define blockIdx (host::here().block)
#define blockDim (host::here().threads)
#define gridDim (host::here().blocks)

inline void __syncthreads() { host::synchronise(); }
inline void __syncwarp() { host::exchange(~0u, 0, host::lane()); }
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes) {
  return host::shuffle(mask, value, host::lane() ^ lanes);
}

template <class T>
T __shfl_sync(uint32_t mask, T value, int lane) {
  return host::shuffle(mask, value, lane);
}

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrComputeCapabilityMajor = 75 };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  return *value = attribute == cudaDevAttrMultiProcessorCount ? host::multiprocessors() : host::capability(), cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;  // run() knows the limit
}
inline cudaError_t cudaGetLastError() { return host::last_error(); }
inline const char* cudaGetErrorString(cudaError_t error) { return host::name_of(error); }

inline int min(int x, int y) { return x < y ? x : y; }
inline int max(int x, int y) { return x > y ? x : y; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }

inline uint32_t __float_as_uint(float x) {
  uint32_t word;
  std::memcpy(&word, &x, 4);
  return word;
}

inline float __uint_as_float(uint32_t word) {
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

// Both 16-bit formats as their bits; arithmetic is on float alone.
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t word = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t word;
  std::memcpy(&word, &x, 4);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16)};
}

inline float __half2float(__half x) {
  _Float16 half;
  std::memcpy(&half, &x, 2);
  return static_cast<float>(half);
}

inline __half __float2half_rn(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  __half stored;
  std::memcpy(&stored, &half, 2);
  return stored;
}
