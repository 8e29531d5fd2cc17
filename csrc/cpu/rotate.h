// The rotation of one head, of whatever values, for bodies that do more than rotate. rope.cpp has its own, which lays the factors
// of pairs out once for all heads: with this one it took 1.5 times as long in bfloat16, for its shuffles.
// Included once per instruction set by an op's body, after columns.h: no include guard, no includes.
//
//   rotate(cos, sin, sign, half, head_dim, interleaved, get, put)
// get(i, n) gives n values from dim i on, put(i, v, n) takes them; as in columns.h, n is Whole or a number. sign -1 turns back.

#if BLIP3O_LANES == 16
static inline Floats doubled(const float* p, Whole) {  // p[0], p[0], p[1], p[1], ...
  const __m512i lanes = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  return (Floats)_mm512_permutexvar_ps(lanes, _mm512_castps256_ps512(_mm256_loadu_ps(p)));
}
#elif BLIP3O_LANES == 8
static inline Floats doubled(const float* p, Whole) {
  const __m256i lanes = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
  return (Floats)_mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), lanes);
}
#else
static inline Floats doubled(const float* p, Whole) { return Floats{p[0], p[0], p[1], p[1]}; }
#endif
static inline Floats doubled(const float* p, int64_t n) {
  float padded[BLIP3O_LANES / 2] = {};
  for (int64_t i = 0; i < n / 2; ++i) padded[i] = p[i];
  return doubled(padded, Whole{});
}

template <class Get, class Put>
static inline void rotate(const float* cos, const float* sin, float sign, int64_t half, int64_t head_dim, bool interleaved,
                          Get get, Put put) {
  if (interleaved) {
    Floats signs;
    for (int i = 0; i < BLIP3O_LANES; ++i) signs[i] = i & 1 ? sign : -sign;
    columns(2 * half, [&](int64_t i, auto n) {
      const Floats v = get(i, n);
      put(i, v * doubled(cos + i / 2, n) + swapped_pairs(v) * (doubled(sin + i / 2, n) * signs), n);
    });
  } else {
    columns(half, [&](int64_t i, auto n) {
      const Floats first = get(i, n), second = get(half + i, n), c = load(cos + i, n), s = load(sin + i, n) * sign;
      put(i, first * c - second * s, n);
      put(half + i, second * c + first * s, n);
    });
  }
  columns(head_dim - 2 * half, [&](int64_t i, auto n) { put(2 * half + i, get(2 * half + i, n), n); });
}
