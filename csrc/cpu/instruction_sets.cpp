// Which instruction sets this build and this chip have.
#include "../blip3o.h"

static int best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return BLIP3O_AVX512;
  if (avx2) return BLIP3O_AVX2;
#endif
  return BLIP3O_PORTABLE;
}

static const int BEST = best();

static int lacks_bfloat16() {
#if defined(__x86_64__)
  return !__builtin_cpu_supports("avx512bf16");
#else
  return 1;
#endif
}

extern const int blip3o_lacks_bfloat16 = lacks_bfloat16();

int blip3o_instruction_set(int asked) {
  if (asked == BLIP3O_BEST) return BEST;
  return asked >= BLIP3O_PORTABLE && asked <= BEST ? asked : 0;
}

extern "C" int blip3o_cpu_version(void) { return BLIP3O_VERSION; }

extern "C" int blip3o_cpu_best(void) { return BEST; }

extern "C" int blip3o_cpu_threaded(void) {
#if defined(_OPENMP)
  return 1;
#else
  return 0;
#endif
}
