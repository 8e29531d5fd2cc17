// See hopper.h: products by a warpgroup. They are executed in their order, each when all threads have issued it.
#include <deque>
#include <vector>

#include "hopper.h"
#include "races.h"

#define HERE __builtin_return_address(0)

namespace host::products {
namespace {

using blip3o::hopper::Product;

struct Issued {  // a product, by as many threads as have come to it
  Product product;
  size_t thread;
  const void* code;
  int issuers = 0, retired = 0;
  float* sums[128];
  const uint32_t* registers[128];
  uint32_t words[128][4];
  races::Clock knows;
};

struct Held {  // sums that products are adding to
  float* sums;
  size_t last;  // one past the last of these products
  std::vector<float> values;
};

struct Thread {
  size_t issued = 0, retired = 0;
  std::vector<size_t> groups;  // where each ends
  std::vector<Held> held;
  bool fenced = false;
};

struct Warpgroup {
  std::deque<Issued> queue;
  size_t base = 0, executed = 0;  // the number of the first in the queue, and of the next to execute
  Thread threads[128];
  bool ready() const { return executed - base < queue.size() && queue[executed - base].issuers == 128; }
};

const uint32_t POISON = 0x7fc0deadu;  // a NaN
std::deque<Warpgroup> warpgroups;

size_t agent_of(const Warpgroup& group) {
  size_t i = 0;
  while (&warpgroups[i] != &group) ++i;
  return races::AGENTS - 1 - i;
}

float value(uint16_t bits, bool half) { return half ? __half2float({bits}) : __bfloat162float({bits}); }

// An operand from shared memory, as its descriptor says: to[i step + k other_step] for its `count` rows or columns i.
void read(float* to, uint32_t step, uint32_t other_step, uint32_t count, uint64_t descriptor, bool k_major, const Issued& op,
          const races::Agent& agent) {
  if (descriptor >> 62 != 1 || descriptor >> 46 & 0xffff) fail("multiplies an operand that is not swizzled by 128 bytes", op.code, op.thread);
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  const uint32_t start = field(0), panel = field(16), eight = field(32);
  // Sixteen bytes at a time: of a row's k if K-major, of a k's columns otherwise.
  for (uint32_t chunk = 0; chunk < count * 2; ++chunk) {
    const uint32_t i = k_major ? chunk / 2 : chunk / 16 * 8, k = k_major ? chunk % 2 * 8 : chunk % 16;
    const uint32_t place = k_major ? i / 8 * eight + i % 8 * 128 + k * 2 : i / 64 * panel + i % 64 * 2 + k / 8 * eight + k % 8 * 128;
    const char* from = dynamic_shared() + swizzled(start + place);
    if (races::ON) races::access(from, 16, false, agent);
    uint16_t bits[8];
    std::memcpy(bits, from, 16);
    for (uint32_t n = 0; n < 8; ++n)
      to[(k_major ? i : i + n) * step + (k_major ? k + n : k) * other_step] = value(bits[n], op.product.half);
  }
}

alignas(64) float left[64 * 16], right[16 * 256], product_of[64 * 256];

// It is most of what a run costs.
__attribute__((optimize("O3"), no_sanitize("address", "undefined"))) void multiply_all(size_t columns) {
  std::memset(product_of, 0, sizeof product_of);
  for (size_t row = 0; row < 64; ++row)
    for (size_t k = 0; k < 16; ++k)
      for (size_t n = 0; n < columns; ++n) product_of[row * 256 + n] += left[row * 16 + k] * right[k * 256 + n];
}

// A warpgroup's: thread t has these places of a product.
uint32_t row_of(uint32_t t, uint32_t i) { return t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8; }
uint32_t column_of(uint32_t t, uint32_t i) { return i / 4 * 8 + t % 4 * 2 + i % 2; }

void execute(Warpgroup& group) {
  Issued& op = group.queue[group.executed - group.base];
  const races::Agent agent{agent_of(group), static_cast<uint32_t>(group.executed + 1), &op.knows, op.thread};
  const uint32_t columns = static_cast<uint32_t>(op.product.columns);
  read(right, 1, 256, columns, op.product.b, op.product.k_major, op, agent);
  if (!op.product.in_registers) read(left, 16, 1, 64, op.product.a, true, op, agent);
  for (uint32_t t = 0; t < 128 && op.product.in_registers; ++t)
    for (uint32_t i = 0; i < 8; ++i)
      left[row_of(t, i) * 16 + column_of(t, i)] = value(static_cast<uint16_t>(op.words[t][i / 2] >> i % 2 * 16), op.product.half);
  multiply_all(columns);
  for (uint32_t t = 0; t < 128; ++t) {
    float* sums = nullptr;
    for (Held& held : group.threads[t].held)
      if (held.sums == op.sums[t]) sums = held.values.data();
    for (uint32_t i = 0; i < columns / 2; ++i) {
      const float sum = product_of[row_of(t, i) * 256 + column_of(t, i)];
      sums[i] = op.product.accumulate ? sums[i] + sum : sum;
    }
  }
  ++group.executed;
  wake(&group);
}

}  // namespace

void begin(size_t threads) {
  warpgroups.clear();
  warpgroups.resize((threads + 127) / 128);
}

size_t ready() {
  size_t count = 0;
  for (const Warpgroup& group : warpgroups) count += group.ready();
  return count;
}

void perform(size_t which) {
  for (Warpgroup& group : warpgroups)
    if (group.ready() && which-- == 0) return execute(group);
}

void end() {
  for (size_t g = 0; g < warpgroups.size(); ++g)
    for (size_t t = 0; t < 128; ++t)
      if (!warpgroups[g].threads[t].held.empty()) fail("ends without having waited for its products", nullptr, g * 128 + t);
}

}  // namespace host::products

namespace blip3o::hopper {

using namespace host;
using namespace host::products;

static Thread& self() { return warpgroups[number() / 128].threads[number() % 128]; }

void fence_products() { self().fenced = true; }
void commit_products() { self().groups.push_back(self().issued); }

void multiply(const Product& product) {
  Warpgroup& group = warpgroups[number() / 128];
  const size_t t = number() % 128, size = sizeof(float) * static_cast<size_t>(product.columns) / 2;
  Thread& thread = group.threads[t];
  if (!thread.fenced) fail("multiplies, and no fence_products() is between that and what was done with the registers", HERE);
  if (thread.issued == group.base + group.queue.size()) group.queue.emplace_back(), group.queue.back().product = product;
  Issued& op = group.queue[thread.issued++ - group.base];
  const Product& first = op.product;
  if (first.columns != product.columns || first.half != product.half || first.k_major != product.k_major || first.a != product.a ||
      first.accumulate != product.accumulate || first.in_registers != product.in_registers || first.b != product.b)
    fail("multiplies other operands than the rest of its warpgroup", HERE);
  op.thread = number();
  op.code = HERE;
  races::meet(op.knows, number());
  ++op.issuers;
  op.sums[t] = product.sums;
  op.registers[t] = product.registers;
  if (product.in_registers) std::memcpy(op.words[t], product.registers, sizeof op.words[t]);
  for (Held& held : thread.held)
    if (held.sums == product.sums) return static_cast<void>(held.last = thread.issued);
  thread.held.push_back({product.sums, thread.issued, std::vector<float>(product.sums, product.sums + size / sizeof(float))});
  for (size_t i = 0; i < size / sizeof(float); ++i) std::memcpy(product.sums + i, &POISON, sizeof POISON);
}

void wait_products(int groups) {
  Warpgroup& group = warpgroups[number() / 128];
  const size_t t = number() % 128;
  Thread& thread = group.threads[t];
  thread.fenced = false;
  if (thread.groups.size() <= static_cast<size_t>(groups)) return;
  const size_t done = thread.groups.size() - static_cast<size_t>(groups), end = thread.groups[done - 1];
  thread.groups.erase(thread.groups.begin(), thread.groups.begin() + static_cast<ptrdiff_t>(done));
  while (group.executed < end) wait_on(&group, "waits for products that the rest of its warpgroup never issues", HERE);
  races::learn(number(), agent_of(group), static_cast<uint32_t>(end));
  for (; thread.retired < end; ++thread.retired) {
    Issued& op = group.queue[thread.retired - group.base];
    if (op.product.in_registers && std::memcmp(op.words[t], op.registers[t], sizeof op.words[t]))
      fail("has written registers that a product was reading", op.code);
    ++op.retired;
  }
  while (!group.queue.empty() && group.queue.front().retired == 128) group.queue.pop_front(), ++group.base;
  for (size_t i = 0; i < thread.held.size();) {
    Held& held = thread.held[i];
    if (held.last > end) {
      ++i;
      continue;
    }
    for (size_t k = 0; k < held.values.size(); ++k)
      if (std::memcmp(held.sums + k, &POISON, sizeof POISON)) fail("has written sums that a product was adding to", HERE);
    std::memcpy(held.sums, held.values.data(), sizeof(float) * held.values.size());
    held = std::move(thread.held.back());
    thread.held.pop_back();
  }
}

}  // namespace blip3o::hopper
