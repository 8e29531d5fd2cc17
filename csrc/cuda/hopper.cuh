// What sm_90a has and no GPU before it: barriers in shared memory that count arrivals and bytes, copies of tiles by the tensor memory
// accelerator (TMA), products by a warpgroup of 128 threads (wgmma), registers moved between warpgroups, named barriers. Here in PTX;
// csrc/host/hopper.h gives the same functions a meaning in C++. See the PTX ISA, "mbarrier", "cp.async.bulk.tensor" and "wgmma".
//
// A tile in shared memory is a row of panels, 64 elements (128 bytes) wide and as tall as the tile, that start at a multiple of 1024
// bytes. Row r of a panel lies at 128 r, its sixteen-byte chunk c at 16 (c ^ r % 8): TMA's and wgmma's swizzle of 128 bytes.
#pragma once

#include <type_traits>

#include "device.cuh"

#ifndef __CUDACC__
#include "../host/hopper.h"
#define BLIP3O_HOPPER
#else
#include <cudaTypedefs.h>
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define BLIP3O_HOPPER  // this pass makes code for sm_90a; in others there are no such instructions
#endif
namespace blip3o::hopper {
using TensorMap = CUtensorMap;
}
#endif

namespace blip3o::hopper {

constexpr int PANEL = 64;  // elements of a row of a panel, which has two bytes for each

// Describes a tensor [batch, head, token, dim] of 16-bit elements to TMA, which copies boxes of `rows` tokens and PANEL dims. Strides
// count elements. False if it cannot be described, or if there is no driver.
bool describe(TensorMap* map, int dtype, const void* data, const int64_t (&sizes)[4], const int64_t (&strides)[3], int rows);

// The operand of a product in shared memory. K_MAJOR: the dimension that is summed lies along the rows; from 8 rows to the next 8 it
// is 1024 bytes. Otherwise the rows are what is summed, and `panel` is the distance of panels in bytes.
__device__ inline uint64_t operand(uint32_t address, uint32_t panel = 16) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(panel >> 4) << 16 |
         static_cast<uint64_t>(1024 >> 4) << 32 | static_cast<uint64_t>(1) << 62;
}

#if defined(__CUDACC__) && defined(BLIP3O_HOPPER)

using Barrier = uint64_t;

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// A phase of the barrier ends with so many arrivals, when all bytes that were announced have come too.
__device__ inline void init(Barrier* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// After init and before the __syncthreads() that lets others use the barriers: TMA sees them too.
__device__ inline void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and announces bytes of copies.
__device__ inline void expect(Barrier* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// Until the phase of that parity has ended; the first phase has parity 0, and the one before it counts as ended.
__device__ inline void wait(Barrier* barrier, unsigned parity) {
  unsigned ended;
  do {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(ended) : "r"(shared_address(barrier)), "r"(parity) : "memory");
  } while (!ended);
}

// Copies the box that starts there to a panel, zeros where the tensor has nothing, and counts its bytes at the barrier.
__device__ inline void copy_panel(void* to, const TensorMap* map, Barrier* barrier, int dim, int token, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
          shared_address(to)), "l"(map), "r"(shared_address(barrier)), "r"(dim), "r"(token), "r"(head), "r"(batch) : "memory");
}

// As many bytes, a multiple of 16, from and to addresses that are.
__device__ inline void copy_bytes(void* to, const void* from, unsigned bytes, Barrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}

// Of so many threads, a multiple of 32, each of which syncs or arrives; id 1 to 15.
__device__ inline void sync_named(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ inline void arrive_named(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// All warps of a warpgroup: from now on so many registers a thread.
template <int REGISTERS>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Before a product whose registers were written by anything but products.
__device__ inline void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// The products since the last one are a group.
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all groups but the last N are done.
template <int N>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// After a wait: uses of these sums stay behind it.
template <int N>
__device__ inline void settle(float (&sums)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// What computes x, which is not negative, stays before the waits that follow: ptxas moves those up as far as it may, but not into
// another block of instructions, and here is a loop that is never entered.
__device__ inline void hold(float x) {
  while (x < 0.0f) asm volatile("nanosleep.u32 32;" : "+f"(x)::"memory");
}

#define N0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define N1 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define N2 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define N3 ", %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define N4 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87"
#define N5 ", %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109"
#define N6 ", %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define D32(i) D8(i), D8(i + 8), D8(i + 16), D8(i + 24)

// The text of a product of N columns, whose operands follow the N / 2 sums: a1 is %(N / 2), and so on.
#define SS(N, TYPE, NAMES, SUMS, A, B, P, T)                                                                                         \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" NAMES \
               "}, " A ", " B ", p, 1, 1, 0, " T ";\n}"                                                                              \
               : SUMS()                                                                                                              \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(!K_MAJOR)))
#define RS(N, TYPE, NAMES, SUMS, A, B, P, T)                                                                                         \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" NAMES \
               "}, {" A "}, " B ", p, 1, 1, " T ";\n}"                                                                               \
               : SUMS()                                                                                                              \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(!K_MAJOR)))
#define BY_TYPE(FORM, N, ...)                                          \
  if constexpr (std::is_same<T, bfloat16>::value) {                    \
    FORM(N, "bf16", __VA_ARGS__);                                      \
  } else {                                                             \
    FORM(N, "f16", __VA_ARGS__);                                       \
  }
#define S64() D32(0)
#define S80() D32(0), D8(32)
#define S128() D32(0), D32(32)
#define S176() D32(0), D32(32), D8(64), D8(72), D8(80)
#define S256() D32(0), D32(32), D32(64), D32(96)

// d [64, N] (+)= a [64, 16] b [16, N], by all threads of a warpgroup. Thread t has of d the rows 16 (t / 32) + t % 32 / 4 and 8 below,
// columns 8 j + 2 (t % 4) and the next: d[4 j], d[4 j + 1] and d[4 j + 2], d[4 j + 3]. a and b are operands in shared memory, a K_MAJOR.
template <class T, int N, bool K_MAJOR>
__device__ inline void multiply(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N == 64 || N == 80 || N == 128 || N == 176, "there is no text for others");
  if constexpr (N == 64) {
    BY_TYPE(SS, 64, N0 N1, S64, "%32", "%33", "%34", "%35")
  } else if constexpr (N == 80) {
    BY_TYPE(SS, 80, N0 N1 N2, S80, "%40", "%41", "%42", "%43")
  } else if constexpr (N == 128) {
    BY_TYPE(SS, 128, N0 N1 N2 N3, S128, "%64", "%65", "%66", "%67")
  } else {
    BY_TYPE(SS, 176, N0 N1 N2 N3 N4, S176, "%88", "%89", "%90", "%91")
  }
}

// The same with a in registers: two packed elements each of its rows as above, columns 2 (t % 4), and 8 further in a[2] and a[3].
template <class T, int N, bool K_MAJOR>
__device__ inline void multiply(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(N == 64 || N == 128 || N == 256, "there is no text for others");
  if constexpr (N == 64) {
    BY_TYPE(RS, 64, N0 N1, S64, "%32, %33, %34, %35", "%36", "%37", "%38")
  } else if constexpr (N == 128) {
    BY_TYPE(RS, 128, N0 N1 N2 N3, S128, "%64, %65, %66, %67", "%68", "%69", "%70")
  } else {
    BY_TYPE(RS, 256, N0 N1 N2 N3 N4 N5 N6, S256, "%128, %129, %130, %131", "%132", "%133", "%134")
  }
}

// 2^x to 22 bits; denormals are 0.
__device__ inline float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <class T>
__device__ inline uint32_t packed(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same<T, bfloat16>::value) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
}

#endif

}  // namespace blip3o::hopper
