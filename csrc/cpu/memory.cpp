// Memory for large results, kept when nobody holds them any more. kernels/blip3o_kernels/memory.py tells the story.
//
// A result leaves here as a DLPack tensor, so its holder says when the memory is free: torch calls the deleter when the
// last view, graph, array or process-wide reference is gone, and not before. Nothing is guessed from reference counts.
// Nobody ever waits here: who finds the list busy maps memory and gives it back, so a fork in the middle of another
// thread's call leaves a child that merely keeps nothing.
#include <sys/mman.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "../blip3o.h"

namespace {

constexpr size_t HUGE_PAGE = 2 << 20;
constexpr int MOST_DIMS = 16;

// DLPack's DLManagedTensor (dlpack.h, version 0), which torch.from_dlpack takes over.
struct ManagedTensor {
  void* data;
  int32_t device_type, device;  // 1: a CPU
  int32_t dims;
  uint8_t type, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t offset;
  void* context;
  void (*deleter)(ManagedTensor*);
};

struct Block {
  ManagedTensor tensor;  // first: the deleter gets its address
  Block *newer, *older;  // in the list of those that nobody holds
  void* memory;
  size_t size;
  bool offered;  // to the system
  int64_t shape_and_strides[2 * MOST_DIMS];
};

std::atomic_flag busy = ATOMIC_FLAG_INIT;  // guards what follows
Block *newest = nullptr, *oldest = nullptr, *oldest_unoffered = nullptr;  // all older ones are offered
size_t kept = 0, unoffered = 0;
std::atomic<size_t> limit{0};

bool enter() { return !busy.test_and_set(std::memory_order_acquire); }

void leave() { busy.clear(std::memory_order_release); }

// Up to a sixteenth more: sizes that differ little share blocks, and what is never written takes no memory.
size_t rounded(size_t size) {
  size_t step = 4096;
  while (step << 4 <= size) step <<= 1;
  return (size + step - 1) / step * step;
}

void take(Block* block) {
  if (!block->offered) unoffered -= block->size;
  if (block == oldest_unoffered) oldest_unoffered = block->newer;
  (block->newer ? block->newer->older : newest) = block->older;
  (block->older ? block->older->newer : oldest) = block->newer;
  kept -= block->size;
}

void destroy(Block* block) {
  munmap(block->memory, block->size);
  free(block);
}

void destroy_all(Block* block) {  // linked by `older`
  while (block) {
    Block* next = block->older;
    destroy(block);
    block = next;
  }
}

// Lets the system take the pages of the oldest blocks when it is short of memory. Those given back last are left alone, up to
// a quarter of the limit: results that take turns would pay for it at each turn, with a fault at the next write to every page
// where the machine is a virtual one (up to as much as the op). Nobody can take a block meanwhile, as the list is busy.
void offer_oldest() {
  while (oldest_unoffered && unoffered > limit.load(std::memory_order_relaxed) / 4) {
    Block* block = oldest_unoffered;
    oldest_unoffered = block->newer;
    unoffered -= block->size;
    block->offered = true;
#if defined(MADV_FREE)
    // A quarter of the time of writing small pages, so blocks without huge pages stay as they are.
    if (block->size >= HUGE_PAGE) madvise(block->memory, block->size, MADV_FREE);
#endif
  }
}

// The oldest blocks beyond the limit, linked by `older`, for the caller to destroy when it has left.
Block* take_excess() {
  Block* excess = nullptr;
  while (oldest && kept > limit.load(std::memory_order_relaxed)) {
    Block* block = oldest;
    take(block);
    block->older = excess;
    excess = block;
  }
  return excess;
}

void give_back(ManagedTensor* tensor) {
  Block* block = reinterpret_cast<Block*>(tensor);
  if (block->size > limit.load(std::memory_order_relaxed)) return destroy(block);
  if (!enter()) return destroy(block);
  block->newer = nullptr;
  block->older = newest;
  (newest ? newest->newer : oldest) = block;
  newest = block;
  block->offered = false;
  if (!oldest_unoffered) oldest_unoffered = block;
  kept += block->size;
  unoffered += block->size;
  Block* excess = take_excess();
  offer_oldest();
  leave();
  destroy_all(excess);
}

// The block of that size that was given back last, whose lines are the likeliest to be in the cache.
Block* reused(size_t size) {
  if (!enter()) return nullptr;
  Block* block = newest;
  while (block && block->size != size) block = block->older;
  if (block) take(block);
  leave();
  return block;
}

Block* mapped(size_t size) {
  const size_t slack = size >= HUGE_PAGE ? HUGE_PAGE : 0;  // huge pages begin at a multiple of their size
  void* found = mmap(nullptr, size + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (found == MAP_FAILED) return nullptr;
  char* memory = static_cast<char*>(found);
  if (slack) {
    const size_t before = (HUGE_PAGE - reinterpret_cast<uintptr_t>(memory) % HUGE_PAGE) % HUGE_PAGE;
    if (before) munmap(memory, before);
    memory += before;
    if (slack > before) munmap(memory + size, slack - before);
#if defined(MADV_HUGEPAGE)
    madvise(memory, size, MADV_HUGEPAGE);  // one page fault instead of 512
#endif
  }
  Block* block = static_cast<Block*>(malloc(sizeof(Block)));
  if (!block) {
    munmap(memory, size);
    return nullptr;
  }
  block->memory = memory;
  block->size = size;
  return block;
}

}  // namespace

extern "C" void* blip3o_cpu_result(const int64_t* description) {
  const int64_t type = description[0], bits = description[1], dims = description[2];
  if (dims < 0 || dims > MOST_DIMS) return nullptr;
  size_t size = static_cast<size_t>(bits) / 8;
  for (int64_t i = 0; i < dims; i++) {
    const int64_t length = description[3 + i];
    if (length <= 0 || __builtin_mul_overflow(size, static_cast<size_t>(length), &size)) return nullptr;
  }
  if (size > SIZE_MAX / 4) return nullptr;
  size = rounded(size);
  Block* block = reused(size);
  if (!block) block = mapped(size);
  if (!block) {  // what is kept may be what is missing
    blip3o_cpu_release();
    block = mapped(size);
    if (!block) return nullptr;
  }
  for (int64_t i = 0; i < 2 * dims; i++) block->shape_and_strides[i] = description[3 + i];
  int64_t* shape = block->shape_and_strides;
  block->tensor = {block->memory, 1, 0, static_cast<int32_t>(dims), static_cast<uint8_t>(type), static_cast<uint8_t>(bits),
                   1, shape, shape + dims, 0, nullptr, give_back};
  return &block->tensor;
}

extern "C" void blip3o_cpu_keep(int64_t bytes) {
  limit.store(bytes < 0 ? 0 : static_cast<size_t>(bytes));
  if (!enter()) return;  // the next result that is given back will see the limit
  Block* excess = take_excess();
  offer_oldest();
  leave();
  destroy_all(excess);
}

extern "C" int64_t blip3o_cpu_release(void) {
  if (!enter()) return 0;
  Block* all = newest;
  const int64_t released = static_cast<int64_t>(kept);
  newest = oldest = oldest_unoffered = nullptr;
  kept = unoffered = 0;
  leave();
  destroy_all(all);
  return released;
}

extern "C" int64_t blip3o_cpu_kept(void) {
  if (!enter()) return 0;
  const int64_t found = static_cast<int64_t>(kept);
  leave();
  return found;
}
