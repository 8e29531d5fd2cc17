// Which instruction sets this build and this chip have.
#include "../blip3o.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

// Whether the chip has tiles of bfloat16 and Linux keeps them for this process, which has to ask for that once.
static bool tiles() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;  // AMX-BF16, AMX-TILE
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;                     // AVX512-BF16
  const long ask = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return !syscall(SYS_arch_prctl, ask, tile_data);
}
#else
static bool tiles() { return false; }
#endif

static int best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return tiles() ? BLIP3O_AMX : __builtin_cpu_supports("avx512bf16") ? BLIP3O_AVX512_BF16 : BLIP3O_AVX512;
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

extern "C" int blip3o_cpu_intel(void) {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel") != 0;
#else
  return 0;
#endif
}

extern "C" int blip3o_cpu_threaded(void) {
#if defined(_OPENMP)
  return 1;
#else
  return 0;
#endif
}
