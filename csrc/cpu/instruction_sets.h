// Compiles the body of an op once per instruction set. An op's file includes itself through this header:
//
//     #ifndef BLIP3O_LANES
//     #define BLIP3O_BODY "rms_norm.cpp"
//     #include "instruction_sets.h"          // the part below, in the namespaces portable, avx2 and avx512
//     extern "C" int blip3o_cpu_...() { BLIP3O_RUN(instruction_set, forward(arguments)); }
//     #else
//     ... the body, in terms of Floats from vector.h ...
//     #endif
//
// Everything from the standard library is included up here, outside the target pragmas: an inline function of the library
// compiled for AVX-512 could otherwise be the copy the linker keeps for everybody.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../blip3o.h"

// Storage types: they only exist to be loaded and stored.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

extern const int blip3o_lacks_bfloat16;  // whether the chip lacks AVX-512's rounding to bfloat16: 0 or 1
int blip3o_instruction_set(int asked);  // resolves BLIP3O_BEST; 0 if the chip or the build lacks it

// BLIP3O_AVX512_BF16 and BLIP3O_AMX have no namespace: they are AVX-512 and, where a body asks for them, products of bfloat16
// beside that (tiles.h).

// Threads worth starting for `elements` of work: a fork and join costs about 3 us, the time of some 16384 elements.
static inline int blip3o_threads(int threads, int64_t elements) {
  const int64_t useful = elements / 16384 + 1;
  return static_cast<int>(useful < threads ? useful : (threads < 1 ? 1 : threads));
}

#define BLIP3O_LANES 4
namespace portable {
#include "vector.h"
#include BLIP3O_BODY
}  // namespace portable
#undef BLIP3O_LANES

#if defined(__x86_64__)
#include <immintrin.h>

#define BLIP3O_LANES 8
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace avx2 {
#include "vector.h"
#include BLIP3O_BODY
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef BLIP3O_LANES

#define BLIP3O_LANES 16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#endif
namespace avx512 {
#include "vector.h"
#include BLIP3O_BODY
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef BLIP3O_LANES

#define BLIP3O_RUN(asked, call)                     \
  switch (blip3o_instruction_set(asked)) {          \
    case BLIP3O_AMX:                                \
    case BLIP3O_AVX512_BF16:                        \
    case BLIP3O_AVX512:                             \
      return avx512::call;                          \
    case BLIP3O_AVX2:                               \
      return avx2::call;                            \
    case BLIP3O_PORTABLE:                           \
      return portable::call;                        \
    default:                                        \
      return BLIP3O_BAD_INSTRUCTION_SET;            \
  }
#else
#define BLIP3O_RUN(asked, call)                        \
  if (blip3o_instruction_set(asked)) return portable::call; \
  return BLIP3O_BAD_INSTRUCTION_SET;
#endif
