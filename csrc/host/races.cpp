// See races.h. This file itself is compiled without -fsanitize=thread.
#include "races.h"

#include <elf.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "device.h"

namespace host::races {
namespace {

constexpr size_t GRAIN = 2;  // bytes that are looked at as one: the smallest that a kernel of ours shares

struct Access {
  int thread = -1;  // none in this block
  uint32_t when = 0;
};

struct Bytes {
  uint64_t block = 0;              // the rest is of an earlier block, and void, unless this is the current one
  bool under_way = false;          // a copy may write it now
  Access write, read, other_read;  // the last, and the last of another thread
};

std::vector<Clock> clocks;
std::vector<Bytes> bytes;  // GRAIN of them each
uint64_t blocks = 0;
uintptr_t low, high;  // the library's variables: shared memory is a static variable on the host
uintptr_t base;       // what the addresses of its code count from

int find_variables(dl_phdr_info* info, size_t, void*) {
  const uintptr_t inside = reinterpret_cast<uintptr_t>(&clocks);
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    const uintptr_t start = info->dlpi_addr + segment.p_vaddr, end = start + segment.p_memsz;
    if (segment.p_type == PT_LOAD && segment.p_flags & PF_W && start <= inside && inside < end) {
      low = start, high = end, base = info->dlpi_addr;
      return 1;
    }
  }
  return 0;
}

void join(const std::vector<size_t>& threads) {
  Clock all = clocks[threads[0]];
  for (const size_t t : threads) races::join(all, clocks[t]);
  for (const size_t t : threads) {
    clocks[t] = all;
    ++clocks[t][t];
  }
}

// Who accesses shared memory: a thread, at `code`, or what it issued.
struct Who {
  Access now;
  const Clock& knows;
  size_t thread;
  const void* code;
};

[[noreturn]] void report(const char* what, const Who& who, const Access* before) {
  const Place& p = place(who.thread);
  const int threads = static_cast<int>(clocks.size());
  std::fprintf(stderr, "host: block (%u, %u, %u), thread (%u, %u, %u) ", p.block.x, p.block.y, p.block.z, p.thread.x, p.thread.y,
               p.thread.z);
  if (who.code)
    std::fprintf(stderr, "at code 0x%zx %s", reinterpret_cast<uintptr_t>(who.code) - base, what);
  else
    std::fprintf(stderr, "issued a copy or product that %s", what);
  if (before && before->thread < threads) std::fprintf(stderr, ", no barrier after thread %d's access of it", before->thread);
  if (before && before->thread >= threads) std::fprintf(stderr, ", which a copy or product uses that was not waited for");
  std::fputc('\n', stderr);
  std::abort();
}

void ordered(const char* what, const Who& who, const Access& before) {
  if (before.thread < 0 || before.thread == who.now.thread) return;
  if (before.when > who.knows[static_cast<size_t>(before.thread)]) report(what, who, &before);
}

void check(const void* p, size_t size, bool writes, const Who& who) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  if (address < low || address + size > high) return;
  for (size_t i = (address - low) / GRAIN; i <= (address + size - 1 - low) / GRAIN; ++i) {
    Bytes& byte = bytes[i];
    if (byte.block != blocks) byte = Bytes(), byte.block = blocks;
    ordered(writes ? "writes shared memory" : "reads shared memory", who, byte.write);
    if (writes) {
      ordered("writes shared memory", who, byte.read);
      ordered("writes shared memory", who, byte.other_read);
      byte.write = who.now;
      byte.under_way = false;
    } else {
      if (byte.under_way) report("reads shared memory that a copy writes, without a wait for it", who, nullptr);
      if (byte.write.thread < 0) report("reads shared memory that nothing of its block has written", who, nullptr);
      if (byte.read.thread != who.now.thread) byte.other_read = byte.read;
      byte.read = who.now;
    }
  }
}

}  // namespace

void begin(size_t threads) {
  if (!ON) return;
  if (!low) dl_iterate_phdr(find_variables, nullptr);
  clocks.assign(threads, Clock(threads + AGENTS, 0));
  for (size_t t = 0; t < threads; ++t) clocks[t][t] = 1;
  bytes.resize((high - low) / GRAIN + 1);
  ++blocks;
}

void barrier() {
  if (!ON) return;
  std::vector<size_t> all(clocks.size());
  for (size_t i = 0; i < all.size(); ++i) all[i] = i;
  join(all);
}

void meet(size_t first, uint32_t lanes) {
  if (!ON) return;
  std::vector<size_t> some;
  for (size_t lane = 0; lane < 32; ++lane)
    if (lanes >> lane & 1) some.push_back(first + lane);
  join(some);
}

void give(Clock& to, size_t thread) {
  if (!ON) return;
  join(to, clocks[thread]);
  ++clocks[thread][thread];
}

void learn(size_t thread, const Clock& from) {
  if (ON) join(clocks[thread], from);
}

void learn(size_t thread, size_t agent, uint32_t when) {
  if (ON) raise(clocks[thread], agent, when);
}

void join(Clock& to, const Clock& from) {
  if (to.empty()) to.assign(from.size(), 0);
  for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

void meet(Clock& to, size_t thread) {
  if (!ON) return;
  if (to.empty()) to = clocks[thread];
  for (size_t i = 0; i < to.size(); ++i) to[i] = std::min(to[i], clocks[thread][i]);
  ++clocks[thread][thread];
}

void raise(Clock& to, size_t agent, uint32_t when) {
  if (!ON) return;
  to.resize(clocks.size() + AGENTS);
  uint32_t& its = to[clocks.size() + agent];
  its = std::max(its, when);
}

void access(const void* p, size_t size, bool writes, const void* code) {
  if (!ON || !running()) return;
  const size_t thread = number();
  check(p, size, writes, {{static_cast<int>(thread), clocks[thread][thread]}, clocks[thread], thread, code});
}

void access(const void* p, size_t size, bool writes, const Agent& agent) {
  const int number = static_cast<int>(clocks.size() + agent.number);
  check(p, size, writes, {{number, agent.when}, *agent.knows, agent.thread, nullptr});
}

void copying(const void* p, size_t size, const void* code) {
  access(p, size, true, code);
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  if (!ON || address < low || address + size > high) return;
  for (size_t i = (address - low) / GRAIN; i <= (address + size - 1 - low) / GRAIN; ++i) bytes[i].under_way = true;
}

void copied(const void* p, size_t size, const void* code) { access(p, size, true, code); }

}  // namespace host::races

// ThreadSanitizer's interface, as far as compilers call it for plain code.
#ifdef BLIP3O_RACES
#define ACCESS(name, size, writes)                                                        \
  __attribute__((visibility("default"))) void __tsan_##name(void* p) {                    \
    host::races::access(p, size, writes, __builtin_return_address(0));                    \
  }
#define SIZES(prefix, writes) \
  ACCESS(prefix##1, 1, writes) ACCESS(prefix##2, 2, writes) ACCESS(prefix##4, 4, writes) ACCESS(prefix##8, 8, writes) ACCESS(prefix##16, 16, writes)

extern "C" {
SIZES(read, false)
SIZES(write, true)
SIZES(unaligned_read, false)
SIZES(unaligned_write, true)
SIZES(volatile_read, false)
SIZES(volatile_write, true)
void __tsan_read_range(void* p, long size) { host::races::access(p, size, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, long size) { host::races::access(p, size, true, __builtin_return_address(0)); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
}
#endif
