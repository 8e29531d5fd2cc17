// Loops over the elements of a row, vector by vector.
// Included once per instruction set by what an op's body includes: no include guard, no includes.
//
//   columns(width, f)    f(i, n) for every vector of a row; n is Whole, or how many elements the last one has

struct Whole {};

template <class T>
static inline Floats load(const T* p, Whole) {
  return load(p);
}
template <class T>
static inline void store(T* p, Floats v, Whole) {
  store(p, v);
}

template <class T>
static inline void store(T* p, Floats v, Whole, bool past_caches) {
  past_caches ? streamed(p, v) : store(p, v);
}
template <class T>
static inline void store(T* p, Floats v, int64_t n, bool) {
  store(p, v, n);
}

static inline Floats only(Floats v, Whole) { return v; }
static inline Floats only(Floats v, int64_t n) {  // the rest is 0
  float kept[BLIP3O_LANES];
  store(kept, v);
  return load(kept, n);
}

template <class F>
static inline void columns(int64_t width, F f) {
  int64_t i = 0;
  for (; i + BLIP3O_LANES <= width; i += BLIP3O_LANES) f(i, Whole{});
  if (i < width) f(i, width - i);
}
