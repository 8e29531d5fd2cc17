// Runs a kernel's blocks one after the other, each thread of a block a fiber, in an order drawn from BLIP3O_HOST_SEED.
//
// A fiber runs until it has to wait: at a barrier for the other threads of its block, at a shuffle for the lanes it names, on a
// channel for what is under way (async.cpp). Then any that can go on does, or some of that is done. Reported, with the place, and the process aborted: threads that wait for ever, lanes that a mask
// names and that are not there, a launch that a GPU would refuse.
#include "device.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "fiber.h"
#include "hopper.h"
#include "races.h"
#include "warp.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

extern "C" {
__attribute__((visibility("default"))) int blip3o_host_fault = 0;
// tests/cuda_launches.py: the GPU that this is taken for; and who is told of each launch, which then does not run. sizes: blocks,
// then threads, in x, y and z.
__attribute__((visibility("default"))) int blip3o_host_capability = 9, blip3o_host_multiprocessors = 2;
__attribute__((visibility("default"))) void (*blip3o_host_record)(const void* kernel, const unsigned* sizes, size_t shared) = nullptr;
}

namespace host {
namespace {

const size_t STACK = 256 << 10;
const unsigned MOST_THREADS = 1024;
const size_t MOST_SHARED = 227 << 10;

uint64_t seed() {
  const char* text = std::getenv("BLIP3O_HOST_SEED");
  return text ? std::strtoull(text, nullptr, 10) : 0;
}

struct Random {  // splitmix64
  uint64_t state = seed();
  uint64_t operator()() {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  size_t below(size_t n) { return static_cast<size_t>((*this)() % n); }
} random_number;

struct Stack {
  void* low;
  Stack() : low(mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {
    if (low == MAP_FAILED) std::perror("the stack of a fiber"), std::abort();
    mprotect(low, 4096, PROT_NONE);  // the page below: an overflow is a fault, not the next fiber's data
  }
  ~Stack() { munmap(low, STACK); }
};

enum class Waiting { nothing, barrier, lanes, channel, over };

struct Fiber {
  Context context;
  Place place;
  Waiting waiting = Waiting::nothing;
  const void* channel = nullptr;  // what it waits on, why and where, if it is Waiting::channel
  const char* why = "";
  const void* code = nullptr;
};

struct Warp {
  uint32_t present = 0, mask = 0, given = 0;
  unsigned turn = 0;
  uint32_t words[2][32];  // of this turn and the last: a lane may give its next word before another has read this one
  void (*work)(void* const (&)[32]) = nullptr;  // what the lanes are about to do together; null: a shuffle
  void* deposits[32];
};

std::vector<std::unique_ptr<Stack>> stacks;
void* stack_of(size_t thread) { return static_cast<char*>(stacks[thread]->low) + 4096; }
std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<size_t> ready;
size_t current;
bool inside = false;
Context scheduler;
const std::function<void()>* task;
cudaError_t error = cudaSuccess;

void leave(Context& from, Context& to, const void* low, size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, low, size);
  change(from, to);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  (void)low, (void)size;
  change(from, to);
#endif
}

alignas(1024) char shared_memory[MOST_SHARED];  // of the block that runs; a variable, as races.cpp looks at those

// What a block finds in its dynamic shared memory: NaN in every format, and nothing beyond what it asked for.
void clear(size_t shared) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(shared_memory, MOST_SHARED);
  std::memset(shared_memory, 0xff, shared);
  ASAN_POISON_MEMORY_REGION(shared_memory + shared, MOST_SHARED - shared);
#else
  std::memset(shared_memory, 0xff, shared);
#endif
}

const void* main_low;
size_t main_size;

void wait(Waiting reason) {
  Fiber& fiber = fibers[current];
  fiber.waiting = reason;
  leave(fiber.context, scheduler, main_low, main_size);
}

void start() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &main_low, &main_size);
#endif
  (*task)();
  if (copies::under_way()) fail("ends before its copies have arrived");
  Fiber& fiber = fibers[current];
  fiber.waiting = Waiting::over;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(nullptr, main_low, main_size);
#endif
  change(fiber.context, scheduler);
}

void run_block(dim3 block, dim3 blocks, dim3 threads) {
  const size_t count = static_cast<size_t>(threads.x) * threads.y * threads.z;
  fibers.assign(count, Fiber());
  warps.assign((count + 31) / 32, Warp());
  races::begin(count);
  copies::begin(count);
  while (stacks.size() < count) stacks.emplace_back(new Stack);
  async::begin(count);
  ready.clear();
  const size_t patience = static_cast<size_t>(1) << random_number.below(8);  // with what is under way
  for (size_t i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    fiber.place = {dim3(i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y), block, threads, blocks};
    warps[i / 32].present |= 1u << i % 32;
    prepare(fiber.context, stack_of(i), STACK - 4096, start);
    ready.push_back(i);
  }
  size_t left = count, at_barrier = 0;
  while (left) {
    if (random_number.below(patience) == 0) async::step();
    if (ready.empty()) {
      if (async::step()) continue;
      if (at_barrier == left) {  // all that are left: those that have ended count as there
        races::barrier();
        at_barrier = 0;
        for (size_t i = 0; i < count; ++i)
          if (fibers[i].waiting == Waiting::barrier) ready.push_back(i);
      } else {
        size_t i = 0;
        while (fibers[i].waiting != Waiting::lanes && fibers[i].waiting != Waiting::channel) ++i;
        if (fibers[i].waiting == Waiting::channel) fail(fibers[i].why, fibers[i].code, i);
        fail("waits in a shuffle for lanes that never come", nullptr, i);
      }
    }
    const size_t choice = random_number.below(ready.size());
    current = ready[choice];
    ready[choice] = ready.back();
    ready.pop_back();
    Fiber& fiber = fibers[current];
    fiber.waiting = Waiting::nothing;
    inside = true;
    leave(scheduler, fiber.context, stack_of(current), STACK - 4096);
    inside = false;
    if (fiber.waiting == Waiting::over) {
      --left;
      warps[current / 32].present &= ~(1u << current % 32);
    } else if (fiber.waiting == Waiting::barrier) {
      ++at_barrier;
    } else if (fiber.waiting == Waiting::lanes) {  // in a shuffle; the last lane sets all of them free
      Warp& warp = warps[current / 32];
      if (warp.given != warp.mask) continue;
      if (!warp.work) races::meet(current / 32 * 32, warp.mask);
      for (size_t lane = 0; lane < 32; ++lane)
        if (warp.mask >> lane & 1) ready.push_back(current / 32 * 32 + lane);
      warp.given = warp.mask = 0;
      warp.work = nullptr;
      ++warp.turn;
    }
  }
  async::end();
}

}  // namespace

void fail(const char* what) { fail(what, nullptr, current); }
void fail(const char* what, const void* code) { fail(what, code, current); }

void fail(const char* what, const void* code, size_t thread) {
  const Place& p = fibers[thread].place;
  std::fprintf(stderr, "host: block (%u, %u, %u), thread (%u, %u, %u)", p.block.x, p.block.y, p.block.z, p.thread.x, p.thread.y,
               p.thread.z);
  Dl_info file;
  if (code && dladdr(code, &file))
    std::fprintf(stderr, " at code 0x%zx", static_cast<size_t>(static_cast<const char*>(code) - static_cast<char*>(file.dli_fbase)));
  std::fprintf(stderr, ": %s\n", what);
  std::abort();
}

void wait_on(const void* channel, const char* what, const void* code) {
  Fiber& fiber = fibers[current];
  fiber.channel = channel, fiber.why = what, fiber.code = code;
  wait(Waiting::channel);
}

void wake(const void* channel) {
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber& fiber = fibers[i];
    if (fiber.waiting == Waiting::channel && fiber.channel == channel) fiber.waiting = Waiting::nothing, ready.push_back(i);
  }
}

size_t random_below(size_t n) { return random_number.below(n); }
const Place& here() { return fibers[current].place; }
const Place& place(size_t thread) { return fibers[thread].place; }
size_t number() { return current; }
bool running() { return inside; }
int fault() { return blip3o_host_fault; }
int capability() { return blip3o_host_capability; }
int multiprocessors() { return blip3o_host_multiprocessors; }
int lane() { return static_cast<int>(current % 32); }
char* dynamic_shared() { return shared_memory; }

void synchronise() { wait(Waiting::barrier); }

uint32_t exchange(uint32_t mask, uint32_t word, int from) {
  Warp& warp = warps[current / 32];
  const unsigned turn = warp.turn % 2;
  if (!(mask >> lane() & 1)) fail("shuffles with a mask that does not name itself");
  if (mask & ~warp.present) fail("shuffles with lanes that have ended or never were");
  if (warp.given && (warp.mask != mask || warp.work)) fail("shuffles with another mask than the other lanes of its warp");
  warp.mask = mask;
  warp.given |= 1u << lane();
  warp.words[turn][lane()] = word;
  wait(Waiting::lanes);
  if (from < 0 || from > 31 || !(mask >> from & 1)) fail("shuffles from a lane that the mask does not name");
  return warp.words[turn][from];
}

void together(void* mine, void (*work)(void* const (&all)[32])) {
  Warp& warp = warps[current / 32];
  if (~warp.present) fail("does with its warp what takes all of it, and lanes have ended or never were");
  if (warp.given && warp.work != work) fail("does with its warp what other lanes do not");
  warp.mask = ~0u;
  warp.given |= 1u << lane();
  warp.work = work;
  warp.deposits[lane()] = mine;
  if (warp.given == warp.mask) work(warp.deposits);
  wait(Waiting::lanes);
}

cudaError_t last_error() {
  const cudaError_t found = error;
  error = cudaSuccess;
  return found;
}

const char* name_of(cudaError_t code) { return code == cudaSuccess ? "no error" : "invalid configuration argument"; }

cudaError_t run(const void* kernel, dim3 blocks, dim3 threads, size_t shared, const std::function<void()>& body) {
  if (blip3o_host_record) {
    const unsigned sizes[] = {blocks.x, blocks.y, blocks.z, threads.x, threads.y, threads.z};
    blip3o_host_record(kernel, sizes, shared);
  }
  const uint64_t count = static_cast<uint64_t>(threads.x) * threads.y * threads.z;
  const bool fits = count >= 1 && count <= MOST_THREADS && threads.z <= 64 && blocks.x >= 1 && blocks.x <= 0x7fffffff &&
                    blocks.y >= 1 && blocks.y <= 0xffff && blocks.z >= 1 && blocks.z <= 0xffff && shared <= MOST_SHARED;
  if (!fits) return error = cudaErrorInvalidConfiguration;
  if (blip3o_host_record) return cudaSuccess;
  task = &body;
  const size_t number = static_cast<size_t>(blocks.x) * blocks.y * blocks.z;
  std::vector<size_t> order(number);
  for (size_t i = 0; i < number; ++i) order[i] = i;
  for (size_t i = number; i > 1; --i) std::swap(order[i - 1], order[random_number.below(i)]);
  for (const size_t i : order) {
    clear(shared);
    run_block(dim3(i % blocks.x, i / blocks.x % blocks.y, i / blocks.x / blocks.y), blocks, threads);
  }
  return cudaSuccess;
}

}  // namespace host
