// Work space, threads, and memory that is asked for while something else is computed.
// Included by attention.cpp once per instruction set, after product.h: no include guard, no includes.

// What the next task reads and writes, asked for bit by bit while this one computes: short rows far apart are no stream that
// hardware would see, and all at once would fill the queue of what is on its way.
class Upcoming {
 public:
  template <class T>
  void add(const T* rows, int64_t step, int64_t count, int64_t width) {
    const int64_t size = sizeof(T);
    all_rows[sets++] = {reinterpret_cast<const char*>(rows), size * step, count, size * width};
    lines += count * (size * width + 63) / 64;
  }
  // It will be asked for in so many steps.
  void plan(int64_t steps) { each = lines / larger(1, steps) + 1; }
  void ask() {
    if (set >= sets) return;
    for (int64_t n = 0; n < each; ++n) {
      const Rows& rows = all_rows[set];
      if (row >= rows.count) {
        row = 0, byte = 0;
        if (++set >= sets) return;
        continue;
      }
      __builtin_prefetch(rows.at + row * rows.step + byte, 0, 2);
      byte += 64;
      if (byte >= rows.bytes) byte = 0, ++row;
    }
  }

 private:
  struct Rows {
    const char* at;
    int64_t step, count, bytes;
  };
  Rows all_rows[8];
  int64_t sets = 0, lines = 0, each = 0, set = 0, row = 0, byte = 0;
};

// Where a task keeps what it lays out, one after the other; and what comes after it.
struct Space {
  float* next;
  Upcoming* upcoming;

  float* take(int64_t floats) {
    float* taken = next;
    next += padded(floats, 16);
    return taken;
  }
  void ask() const {
    if (upcoming) upcoming->ask();
  }
};

// f(thread, from, to) for each thread's share of the tasks.
template <class F>
static void share(int64_t tasks, int64_t threads, F f) {
  const int parts = static_cast<int>(smaller(threads, tasks));
  if (parts <= 1) return f(0, 0, tasks);
#pragma omp parallel for num_threads(parts) schedule(static)
  for (int part = 0; part < parts; ++part) f(part, tasks * part / parts, tasks * (part + 1) / parts);
}
