// Counter-based random numbers, BLIP3O_LANES counters at a time; kernels/blip3o_kernels/philox.py says what they are.
// Included once per instruction set by an op's body: no include guard, no includes.
//
//   Philox{seed, stream, draw}       the part of key and counter that one call of an op has in common
//   .words(group, low, high, w)      four words for each lane's counter: element / 4, position low, position high
//   uniform(w)                       on (0, 1)
//   normals(w0, w1, n0, n1)          a pair of standard normals
//   .noise(out, first, n, position)  the normals of elements first .. first + n of one sample; first is divisible by 4,
//                                    and out has room for n rounded up to a multiple of 4 BLIP3O_LANES

static inline void products(Words word, uint32_t multiplier, Words& high, Words& low) {
#if BLIP3O_LANES == 16
  const __m512i m = _mm512_set1_epi32(static_cast<int>(multiplier));
  const __m512i even = _mm512_maskz_mul_epu32(0xff, (__m512i)word, m);
  const __m512i odd = _mm512_maskz_mul_epu32(0xff, _mm512_maskz_srli_epi64(0xff, (__m512i)word, 32), m);
  high = (Words)_mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
  low = (Words)_mm512_mask_shuffle_epi32(even, 0xaaaa, odd, _MM_PERM_CCAA);
#elif BLIP3O_LANES == 8
  const __m256i m = _mm256_set1_epi32(static_cast<int>(multiplier));
  const __m256i even = _mm256_mul_epu32((__m256i)word, m);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)word, 32), m);
  high = (Words)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  low = (Words)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
#else
  typedef uint64_t Longs __attribute__((vector_size(8 * BLIP3O_LANES)));
  const Longs product = __builtin_convertvector(word, Longs) * multiplier;
  high = __builtin_convertvector(product >> 32, Words);
  low = __builtin_convertvector(product, Words);
#endif
}

static inline Floats uniform(Words w) {
  return (__builtin_convertvector(Integers(w >> 9), Floats) + 0.5f) * 0x1p-23f;
}

static inline void normals(Words w0, Words w1, Floats& n0, Floats& n1) {
  const Floats radius = square_root(logarithm(uniform(w0)) * -2.0f);
  turn(uniform(w1), n0, n1);
  n0 *= radius, n1 *= radius;
}

struct Philox {
  uint32_t key_low, key_high, last;

  Philox(int64_t seed, int stream, int draw)
      : key_low(static_cast<uint32_t>(seed)),
        key_high(static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)),
        last(static_cast<uint32_t>(stream) << 24 | static_cast<uint32_t>(draw)) {}

  void words(Words group, Words position_low, Words position_high, Words (&w)[4]) const {
    Words c0 = group, c1 = position_low, c2 = position_high, c3 = Words{} + last;
    uint32_t k0 = key_low, k1 = key_high;
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      Words high0, low0, high1, low1;
      products(c0, 0xD2511F53u, high0, low0);
      products(c2, 0xCD9E8D57u, high1, low1);
      c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
    }
    w[0] = c0, w[1] = c1, w[2] = c2, w[3] = c3;
  }

  void noise(float* out, int64_t first, int64_t n, int64_t position) const {
    Words lane;
    for (int i = 0; i < BLIP3O_LANES; ++i) lane[i] = static_cast<uint32_t>(i);
    const Words low = Words{} + static_cast<uint32_t>(position);
    const Words high = Words{} + static_cast<uint32_t>(static_cast<uint64_t>(position) >> 32);
    for (int64_t i = 0; i < n; i += 4 * BLIP3O_LANES) {
      Words w[4];
      words(lane + static_cast<uint32_t>((first + i) / 4), low, high, w);
      Floats n0, n1, n2, n3, even[2], odd[2], ordered[4];
      normals(w[0], w[1], n0, n1);
      normals(w[2], w[3], n2, n3);
      interleaved(n0, n2, even[0], even[1]);
      interleaved(n1, n3, odd[0], odd[1]);
      interleaved(even[0], odd[0], ordered[0], ordered[1]);
      interleaved(even[1], odd[1], ordered[2], ordered[3]);
      for (int j = 0; j < 4; ++j) store(out + i + j * BLIP3O_LANES, ordered[j]);
    }
  }
};
