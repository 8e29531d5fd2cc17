// See warp.h. The collectives meet once a call, and the last lane to come computes for all: the arithmetic is most of what these
// suites do, so it is compiled without the sanitizers and with optimisation. What lanes read is checked before.
#include "warp.h"

#include <cstring>
#include <vector>

#include "device.h"
#include "races.h"

namespace host {
namespace {

struct Copy {
  void* to;
  const void* from;
  int size;
  bool valid, done;
  unsigned group;
};

struct Copies {
  std::vector<Copy> pending;
  unsigned group = 0;  // the one that is open
};

std::vector<Copies> of_threads;

void perform(Copy& copy) {
  if (copy.done) return;
  copy.done = true;
  if (copy.valid)
    std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.size));
  else
    std::memset(copy.to, 0, static_cast<size_t>(copy.size));
}

bool aligned_to(const void* p, int size) { return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(size) == 0; }

struct Load {
  uint32_t* to;
  uint16_t row[8];
  bool transposed;
};

void load(void* const (&all)[32]) {
  for (int lane = 0; lane < 32; ++lane) {
    Load& mine = *static_cast<Load*>(all[lane]);
    for (int matrix = 0; matrix < 4; ++matrix) {
      const auto at = [&](int row, int column) -> uint32_t { return static_cast<Load*>(all[8 * matrix + row])->row[column]; };
      const int first = lane % 4 * 2, other = lane / 4;
      mine.to[matrix] = mine.transposed ? at(first, other) | at(first + 1, other) << 16 : at(other, first) | at(other, first + 1) << 16;
    }
  }
}

struct Product {
  const uint32_t* a;
  uint32_t b[2];
  float* c[4];
  bool bfloat16;
};

const float* halves() {  // every float16 as a float
  static std::vector<float> table;
  if (table.empty())
    for (unsigned bits = 0; bits < 1 << 16; ++bits) table.push_back(__half2float(__half{static_cast<uint16_t>(bits)}));
  return table.data();
}

#define BARE optimize("O3"), no_sanitize("address", "undefined")

__attribute__((always_inline, BARE)) inline void two(bool bfloat16, const float* half, uint32_t word, float& low, float& high) {
  if (bfloat16) {
    const uint32_t first = word << 16, second = word & 0xffff0000u;
    __builtin_memcpy(&low, &first, 4), __builtin_memcpy(&high, &second, 4);
  } else {
    low = half[word & 0xffff], high = half[word >> 16];
  }
}

__attribute__((noinline, BARE)) void multiply(void* const (&all)[32]) {
  float a[16][16], b[16][8], c[16][8] = {};
  const float* half = halves();
  const bool bfloat16 = static_cast<Product*>(all[0])->bfloat16;
  for (int lane = 0; lane < 32; ++lane) {
    const Product& its = *static_cast<Product*>(all[lane]);
    const int g = lane / 4, q = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      float* to = &a[g + i % 2 * 8][q + i / 2 * 8];
      two(bfloat16, half, its.a[i], to[0], to[1]);
    }
    for (int i = 0; i < 2; ++i) two(bfloat16, half, its.b[i], b[q + i * 8][g], b[q + i * 8 + 1][g]);
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < 32; ++lane) {
    const Product& its = *static_cast<Product*>(all[lane]);
    for (int i = 0; i < 4; ++i) *its.c[i] += c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

}  // namespace

void copies::begin(size_t threads) { of_threads.assign(threads, Copies()); }
bool copies::under_way() { return !of_threads[number()].pending.empty(); }

void cp_async(void* to, const void* from, int size, bool valid) {
  if (!aligned_to(to, size) || (valid && !aligned_to(from, size))) fail("copies from or to an address that is not aligned");
  races::copying(to, static_cast<size_t>(size), __builtin_return_address(0));
  Copies& mine = of_threads[number()];
  mine.pending.push_back({to, from, size, valid, false, mine.group});
  if (random_below(2)) perform(mine.pending.back());
}

void cp_async_commit() {
  Copies& mine = of_threads[number()];
  ++mine.group;
  if (!mine.pending.empty()) perform(mine.pending[random_below(mine.pending.size())]);
}

void cp_async_wait(int groups) {
  Copies& mine = of_threads[number()];
  std::vector<Copy> left;
  for (Copy& copy : mine.pending) {
    if (copy.group + static_cast<unsigned>(groups) >= mine.group) {
      left.push_back(copy);
      continue;
    }
    perform(copy);
    races::copied(copy.to, static_cast<size_t>(copy.size), __builtin_return_address(0));
  }
  mine.pending.swap(left);
}

void ldmatrix(uint32_t (&to)[4], const void* row, bool transposed) {
  if (!aligned_to(row, 16)) fail("reads a row of a matrix at an address that is not aligned");
  races::access(row, 16, false, __builtin_return_address(0));
  Load mine{to, {}, transposed};
  std::memcpy(mine.row, row, 16);
  together(&mine, load);
}

void mma(float* c0, float* c1, float* c2, float* c3, const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bfloat16) {
  Product mine{a, {b0, b1}, {c0, c1, c2, c3}, bfloat16};
  together(&mine, multiply);
}

}  // namespace host
