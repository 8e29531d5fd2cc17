// The primitives of csrc/cuda/hopper.cuh on the host, with the same names and meanings; async.cpp and products.cpp have them.
//
// What a GPU does by itself it does here at moments drawn from the seed: a copy writes its tile some time between its issue and the
// end of its barrier's phase, a product reads shared memory some time between its issue and the wait for its group. Until that
// wait its sums are NaN, and whoever writes them, or its operand in registers, is reported, as are threads that wait for ever,
// products without the fence before them, barriers that TMA has not been shown, and operands of another form.
#pragma once

#include <type_traits>

#include "device.h"

#define __grid_constant__

namespace blip3o::hopper {

using Barrier = uint64_t;

struct alignas(64) TensorMap {
  const char* data;
  int64_t sizes[4], strides[3];  // dims, tokens, heads, batch; bytes
  int rows;
};

uint32_t shared_address(const void* p);  // from the start of dynamic shared memory
void init(Barrier* barrier, unsigned arrivals);
void fence_barriers();
void arrive(Barrier* barrier);
void expect(Barrier* barrier, unsigned bytes);
void wait(Barrier* barrier, unsigned parity);
void copy_panel(void* to, const TensorMap* map, Barrier* barrier, int dim, int token, int head, int batch);
void copy_bytes(void* to, const void* from, unsigned bytes, Barrier* barrier);
void sync_named(int id, int threads);
void arrive_named(int id, int threads);
void fence_products();
void commit_products();
void wait_products(int groups);

template <int REGISTERS>
void take_registers() {
  static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256, "no such number of registers");
}
template <int REGISTERS>
void give_registers() {
  take_registers<REGISTERS>();
}
template <int N>
void wait_products() {
  wait_products(N);
}
template <int N>
void settle(float (&)[N]) {}
inline void hold(float) {}

struct Product {
  int columns;
  bool half, k_major, accumulate, in_registers;  // half: float16, otherwise bfloat16
  uint64_t a, b;
  const uint32_t* registers;
  float* sums;
};
void multiply(const Product& product);

template <class T, int N, bool K_MAJOR>
void multiply(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  multiply(Product{N, std::is_same<T, __half>::value, K_MAJOR, accumulate, false, a, b, nullptr, d});
}
template <class T, int N, bool K_MAJOR>
void multiply(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  multiply(Product{N, std::is_same<T, __half>::value, K_MAJOR, accumulate, true, 0, b, a, d});
}

inline float power_of_two(float x) { return std::exp2(x); }

template <class T>
uint32_t packed(float low, float high) {
  if (std::is_same<T, __half>::value)
    return __float2half_rn(low).bits | static_cast<uint32_t>(__float2half_rn(high).bits) << 16;
  return __float2bfloat16_rn(low).bits | static_cast<uint32_t>(__float2bfloat16_rn(high).bits) << 16;
}

}  // namespace blip3o::hopper

namespace host {

// What run.cpp lets async.cpp do, and the other way round.
void wait_on(const void* channel, const char* what, const void* code);  // until someone wakes it
void wake(const void* channel);

namespace async {
void begin(size_t threads);  // a block
bool step();                 // does one of the things that are under way, if any
void end();                  // of the block
}  // namespace async

namespace products {  // of async.cpp, in products.cpp
void begin(size_t threads);
size_t ready();              // how many can be executed
void perform(size_t which);  // one of them
void end();
}  // namespace products

inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 3 & 0x70); }

}  // namespace host
