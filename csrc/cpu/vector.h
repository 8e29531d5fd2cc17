// BLIP3O_LANES floats at a time, as the compiler's vector type: the same source becomes SSE2, NEON, AVX2 or AVX-512.
// Included once per instruction set by instruction_sets.h, inside its namespace: no include guard, no includes.
//
//   load(p), load(p, n)          BLIP3O_LANES or n elements, converted to float; the rest is 0
//   ahead(p)                     a hint that p is read soon; it may lie beyond what there is
//   store(p, v), store(p, v, n)  rounded to nearest even, NaN stays NaN
//   streamed(p, v)               stores past the caches; fence() ends a run of that. Where past_caches(p, elements, width) says so
//   rounded<T>(v)                what store and load again would give
//   sum(v)                       in a fixed order
//   exponential(v), logarithm(v), square_root(v), hyperbolic_tangent(v)
//   turn(u, cosine, sine), sine_cosine(v, s, c)
//   interleaved(a, b, low, high)
//   by_dtype(dtype, f), by_dtypes(dtype, other, f)

typedef float Floats __attribute__((vector_size(4 * BLIP3O_LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * BLIP3O_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * BLIP3O_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * BLIP3O_LANES)));
typedef double Doubles __attribute__((vector_size(8 * BLIP3O_LANES)));
typedef uint64_t LongWords __attribute__((vector_size(8 * BLIP3O_LANES)));

template <class To, class From>
static inline To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

static inline Floats all(float value) { return value - Floats{}; }  // x - 0 is x, -0 and NaN too: a mere broadcast

// To words, and from words below 2^16. GCC's own conversions take vectors apart: 5 instructions for 1, 1.5 times the time of
// a bfloat16 norm.
#if BLIP3O_LANES == 16
static inline Words widened(Halves h) { return (Words)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h); }
static inline Halves narrowed(Words w) { return (Halves)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)w); }
#elif BLIP3O_LANES == 8
static inline Words widened(Halves h) { return (Words)_mm256_cvtepu16_epi32((__m128i)h); }
static inline Halves narrowed(Words w) {
  return (Halves)_mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)w, (__m256i)w), 0x08));
}
#else
static inline Words widened(Halves h) { return __builtin_convertvector(h, Words); }
static inline Halves narrowed(Words w) { return __builtin_convertvector(w, Halves); }
#endif

#if BLIP3O_LANES == 16
// One instruction where the chip has it. It takes subnormal numbers for 0, so a vector with one of them goes the long way.
struct Rounder {
  static inline bool fits(Floats v) {
    return __builtin_expect(!(_mm512_fpclass_ps_mask((__m512)v, 0x20) | blip3o_lacks_bfloat16), 1);
  }
  static inline Halves round(Floats v) {
    Halves h;
    asm("vcvtneps2bf16 %1, %0" : "=v"(h) : "v"(v));
    return h;
  }
};
#endif

static inline Words bfloat16_bits(Floats v) {  // in the upper halves
#if BLIP3O_LANES == 16
  if (Rounder::fits(v)) return widened(Rounder::round(v)) << 16;
#endif
  const Words bits = bits_of<Words>(v);
  const Words even = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  const Words nan = Words{} + 0x7fc00000u;
  return bits_of<Words>(Integers(v != v)) == 0u ? even : nan;
}

#if BLIP3O_LANES == 16
static inline Floats from_float16(Halves h) { return (Floats)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h); }
static inline Halves to_float16(Floats v) { return (Halves)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#elif BLIP3O_LANES == 8
static inline Floats from_float16(Halves h) { return (Floats)_mm256_cvtph_ps((__m128i)h); }
static inline Halves to_float16(Floats v) { return (Halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
static inline float half_to_float(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_of<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Scaling by 2^112 moves the exponent bias from 15 to 127 and makes subnormals normal.
  const float scaled = bits_of<float>(magnitude << 13) * 0x1p112f;
  return bits_of<float>(sign | bits_of<uint32_t>(scaled));
}
static inline uint16_t float_to_half(float value) {
  const uint32_t bits = bits_of<uint32_t>(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // from 65520 on: infinity
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the subnormal's bits at the end of the sum
    const float shifted = bits_of<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bits_of<uint32_t>(shifted) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
}
static inline Floats from_float16(Halves h) {
  Floats v{};
  for (int i = 0; i < BLIP3O_LANES; ++i) v[i] = half_to_float(h[i]);
  return v;
}
static inline Halves to_float16(Floats v) {
  Halves h{};
  for (int i = 0; i < BLIP3O_LANES; ++i) h[i] = float_to_half(v[i]);
  return h;
}
#endif

static inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
static inline Floats load(const bfloat16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return bits_of<Floats>(widened(h) << 16);
}
static inline Floats load(const float16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return from_float16(h);
}

// Asks for memory that is read soon, up to the second cache. The hardware stops at the end of every page, and takes several
// rows that are read side by side for no stream.
template <class T>
static inline void ahead(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

static inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
static inline void store(bfloat16* p, Floats v) {
#if BLIP3O_LANES == 16
  if (Rounder::fits(v)) {
    const Halves h = Rounder::round(v);
    std::memcpy(p, &h, sizeof h);
    return;
  }
#endif
  const Halves h = narrowed(bfloat16_bits(v) >> 16);
  std::memcpy(p, &h, sizeof h);
}
static inline void store(float16* p, Floats v) {
  const Halves h = to_float16(v);
  std::memcpy(p, &h, sizeof h);
}

// Whether a result of rows of `width` is stored past the caches, vector by vector: from 16 MiB on, of which whoever reads it finds
// little in a cache. Reading each line first only to overwrite it is a third of what such a result costs.
template <class T>
static inline bool past_caches(const T* p, int64_t elements, int64_t width) {
  const bool aligned = reinterpret_cast<uintptr_t>(p) % 64 == 0 && width % BLIP3O_LANES == 0;
  return BLIP3O_LANES == 16 && aligned && elements * static_cast<int64_t>(sizeof(T)) >= 1 << 24;
}
#if BLIP3O_LANES == 16
static inline void streamed(float* p, Floats v) { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bits_of<__m512i>(v)); }
template <class T>
static inline void streamed(T* p, Floats v) {
  __m256i halves;
  store(reinterpret_cast<T*>(&halves), v);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), halves);
}
#else
template <class T>
static inline void streamed(T* p, Floats v) {
  store(p, v);
}
#endif
static inline void fence() {
#if BLIP3O_LANES == 16
  _mm_sfence();
#endif
}

template <class T>
static inline Floats load(const T* p, int64_t n) {
  T padded[BLIP3O_LANES] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = p[i];
  return load(padded);
}
template <class T>
static inline void store(T* p, Floats v, int64_t n) {
  T padded[BLIP3O_LANES];
  store(padded, v);
  for (int64_t i = 0; i < n; ++i) p[i] = padded[i];
}

template <class T>
struct Rounding;
template <>
struct Rounding<float> {
  static inline Floats round(Floats v) { return v; }
};
template <>
struct Rounding<bfloat16> {
  static inline Floats round(Floats v) { return bits_of<Floats>(bfloat16_bits(v)); }
};
template <>
struct Rounding<float16> {
  static inline Floats round(Floats v) { return from_float16(to_float16(v)); }
};
template <class T>
static inline Floats rounded(Floats v) {
  return Rounding<T>::round(v);
}

static inline float sum(Floats v) {
#if defined(__clang__)
  for (int half = BLIP3O_LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
#else  // GCC would do the same through memory, at ten times the latency
  Integers lane;
  for (int i = 0; i < BLIP3O_LANES; ++i) lane[i] = i;
#pragma GCC unroll 4
  for (int half = BLIP3O_LANES / 2; half > 0; half /= 2) v += __builtin_shuffle(v, lane ^ half);
#endif
  return v[0];
}

static inline double sum(Doubles v) {
  double lanes[BLIP3O_LANES];
  std::memcpy(lanes, &v, sizeof lanes);
#pragma GCC unroll 4
  for (int half = BLIP3O_LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// The larger and the smaller of the two; `v` where it is NaN.
static inline Floats at_least(Floats low, Floats v) {
#if BLIP3O_LANES == 16
  return (Floats)_mm512_maskz_max_ps(0xffff, (__m512)low, (__m512)v);
#elif BLIP3O_LANES == 8
  return (Floats)_mm256_max_ps((__m256)low, (__m256)v);
#else
  return low > v ? low : v;
#endif
}
static inline Floats at_most(Floats high, Floats v) {
#if BLIP3O_LANES == 16
  return (Floats)_mm512_maskz_min_ps(0xffff, (__m512)high, (__m512)v);
#elif BLIP3O_LANES == 8
  return (Floats)_mm256_min_ps((__m256)high, (__m256)v);
#else
  return high < v ? high : v;
#endif
}

// e^v to about one unit in the last place; 0 below -87.33 (subnormal results would be slow), infinity above 88.4, NaN
// stays NaN.
__attribute__((always_inline)) static inline Floats exponential(Floats v) {
  const Floats clamped = at_most(all(89.0f), at_least(all(-87.33f), v)), shift = all(0x1.8p23f);
  const Floats shifted = clamped * 1.44269504f + shift;  // the sum's last bits are the nearest integer
  const Floats n = shifted - shift;
  const Floats r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;  // log 2 in two parts
  Floats p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
#if BLIP3O_LANES == 16
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)v, (__m512)all(-87.33f), _CMP_NLT_UQ);
  return (Floats)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
  const Words scale = (bits_of<Words>(shifted) + 127u) << 23;
  return v < -87.33f ? Floats{} : p * bits_of<Floats>(scale);
#endif
}

// The natural logarithm to about one unit in the last place; of 0 -infinity, of less NaN; subnormal v count as 0.
static inline Floats logarithm(Floats v) {
  const Integers from = bits_of<Integers>(bits_of<Words>(v) - 0x3f3504f3u);  // from sqrt(1/2); unsigned, as v may be anything
  const Floats n = __builtin_convertvector(from >> 23, Floats);
  const Floats f = bits_of<Floats>((from & 0x007fffff) + 0x3f3504f3) - 1.0f, square = f * f;  // v = 2^n (1 + f)
  Floats p = all(7.0376836292e-2f);
  p = p * f + -1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f + -1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f + -1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f + -2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const Floats y = (p * f * square + n * -2.12194440e-4f - square * 0.5f + f) + n * 0.693359375f;
  const Floats edge = v < 0x1p-126f ? (v < 0.0f ? all(__builtin_nanf("")) : all(-__builtin_inff())) : y;
  return v < __builtin_inff() ? edge : v;  // infinity and NaN stay
}

// Sine and cosine of v to half a unit in the last place and a little, for |v| up to 1e8. In double: there pi / 2 needs
// no parts, and Taylor's polynomials are short enough.
__attribute__((always_inline)) static inline void sine_cosine(Doubles v, Floats& sine, Floats& cosine) {
  const Doubles shifted = v * 0.63661977236758134308 + 0x1.8p52;  // the sum's last bits are the nearest quarter of a turn
  const LongWords quarter = bits_of<LongWords>(shifted);
  const Doubles r = v - (shifted - 0x1.8p52) * 1.57079632679489661923, z = r * r;
  const Doubles s = ((((z * (-1.0 / 39916800) + 1.0 / 362880) * z - 1.0 / 5040) * z + 1.0 / 120) * z - 1.0 / 6) * (z * r) + r;
  const Doubles c = ((((z * (-1.0 / 3628800) + 1.0 / 40320) * z - 1.0 / 720) * z + 1.0 / 24) * z - 0.5) * z + 1.0;
  // Bits alone: GCC would take a comparison of vectors longer than registers apart, element by element.
  const LongWords s_bits = bits_of<LongWords>(s), c_bits = bits_of<LongWords>(c);
  const LongWords swap = (s_bits ^ c_bits) & -(quarter & 1);
  sine = __builtin_convertvector(bits_of<Doubles>(s_bits ^ swap ^ (quarter & 2) << 62), Floats);
  cosine = __builtin_convertvector(bits_of<Doubles>(c_bits ^ swap ^ ((quarter + 1) & 2) << 62), Floats);
}

static inline Floats select(Integers condition, Floats yes, Floats no) {
  return bits_of<Floats>((condition & bits_of<Integers>(yes)) | (~condition & bits_of<Integers>(no)));
}

// Within 2 ulp. Near 0: x + x^3 q(x^2). Elsewhere 1 - 2 / (e^2|x| + 1), where e^z = 2^k e^r with |r| <= ln(2)/2; from 10 on it is 1.
static inline Floats hyperbolic_tangent(Floats x) {
  const Floats square = x * x;
  const Floats q = (((-6.044799e-3f * square + 2.096098e-2f) * square - 5.384315e-2f) * square + 1.3332717e-1f) * square -
                   3.3333328e-1f;
  const Floats near = x * square * q + x;

  const Integers sign = bits_of<Integers>(x) & INT32_MIN;
  const Floats size = bits_of<Floats>(bits_of<Integers>(x) & INT32_MAX);
  const Floats z = 2.0f * select(size > 10.0f, all(10.0f), size);
  const Floats shifted = z * 1.44269504f + 0x1.8p23f;  // the last bits hold k
  const Floats k = shifted - 0x1.8p23f;
  const Floats r = (z - k * 0x1.62e4p-1f) - k * 0x1.7f7d1cp-20f;  // ln(2) in two parts, the first of few bits
  const Floats g = (((1.3901276e-3f * r + 8.363145e-3f) * r + 4.1666854e-2f) * r + 1.6666577e-1f) * r + 0.5f;
  const Floats two_to_k = bits_of<Floats>((bits_of<Integers>(shifted) + 127) << 23);
  const Floats far = 1.0f - 2.0f / ((r * r * g + r + 1.0f) * two_to_k + 1.0f);
  return select(size < 0.6f, near, bits_of<Floats>(bits_of<Integers>(far) | sign));
}

// (v[1], v[0], v[3], v[2], ...)
static inline Floats swapped_pairs(Floats v) {
#if BLIP3O_LANES == 16
  return (Floats)_mm512_permute_ps((__m512)v, 0xb1);
#elif BLIP3O_LANES == 8
  return (Floats)_mm256_permute_ps((__m256)v, 0xb1);
#else
  return Floats{v[1], v[0], v[3], v[2]};
#endif
}

static inline Floats square_root(Floats v) {
#if BLIP3O_LANES == 16
  return (Floats)_mm512_maskz_sqrt_ps(0xffff, (__m512)v);
#elif BLIP3O_LANES == 8
  return (Floats)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < BLIP3O_LANES; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

// cos(2 pi u) and sin(2 pi u) to about one unit in the last place, for |u| < 2^20.
__attribute__((always_inline)) static inline void turn(Floats u, Floats& cosine, Floats& sine) {
  const Floats shift = all(0x1.8p23f), shifted = u * 4.0f + shift;  // the sum's last bits are the nearest quarter
  const Words quarter = bits_of<Words>(shifted);
  const Floats t = (u - (shifted - shift) * 0.25f) * 6.28318531f, square = t * t;  // the difference is exact
  Floats c = all(2.443315711809948e-5f);
  c = c * square + -1.388731625493765e-3f;
  c = c * square + 4.166664568298827e-2f;
  c = c * (square * square) + (1.0f - square * 0.5f);
  Floats s = all(-1.9515295891e-4f);
  s = s * square + 8.3321608736e-3f;
  s = s * square + -1.6666654611e-1f;
  s = s * (square * t) + t;
  const Integers odd = Integers((quarter & 1u) == 1u);
  const Words cosine_sign = ((quarter + 1u) & 2u) << 30, sine_sign = (quarter & 2u) << 30;
  cosine = bits_of<Floats>(bits_of<Words>(odd ? s : c) ^ cosine_sign);
  sine = bits_of<Floats>(bits_of<Words>(odd ? c : s) ^ sine_sign);
}

// low: (a[0], b[0], a[1], b[1], ...) from the lower halves, high: from the upper ones.
static inline void interleaved(Floats a, Floats b, Floats& low, Floats& high) {
#if BLIP3O_LANES == 16
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  low = (Floats)_mm512_permutex2var_ps((__m512)a, first, (__m512)b);
  high = (Floats)_mm512_permutex2var_ps((__m512)a, second, (__m512)b);
#elif BLIP3O_LANES == 8
  const __m256 even = _mm256_unpacklo_ps((__m256)a, (__m256)b), odd = _mm256_unpackhi_ps((__m256)a, (__m256)b);
  low = (Floats)_mm256_permute2f128_ps(even, odd, 0x20);
  high = (Floats)_mm256_permute2f128_ps(even, odd, 0x31);
#else
  low = Floats{a[0], b[0], a[1], b[1]};
  high = Floats{a[2], b[2], a[3], b[3]};
#endif
}

// f(t) with t of the type that a dtype stands for; f(t, w) with another dtype, which is the same or float32.
template <class F>
static inline int by_dtype(int dtype, F f) {
  switch (dtype) {
    case BLIP3O_FLOAT32: return f(float{});
    case BLIP3O_BFLOAT16: return f(bfloat16{});
    case BLIP3O_FLOAT16: return f(float16{});
    default: return BLIP3O_BAD_DTYPE;
  }
}
template <class F>
static inline int by_dtypes(int dtype, int other, F f) {
  return by_dtype(dtype, [&](auto t) {
    if (other == dtype) return f(t, t);
    return other == BLIP3O_FLOAT32 ? f(t, float{}) : BLIP3O_BAD_DTYPE;
  });
}
