// Finds accesses of shared memory that nothing orders: one of two threads writes, and between the two there is no barrier.
//
// Compiled with -fsanitize=thread every access calls a function of ThreadSanitizer's interface; races.cpp is that interface. It
// needs no other change of the sources, but compilers put such calls in only with that flag, which excludes AddressSanitizer:
// so the kernels are built twice. Without the flag nothing here is ever asked.
//
// A thread's clock counts what it did; it also knows how far every other thread had come when they last met. An access is in
// order if the thread knows of the other's (vector clocks: Mattern 1989; last accesses alone: FastTrack, Flanagan and Freund 2009).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace host::races {

#ifdef BLIP3O_RACES
constexpr bool ON = true;
#else
constexpr bool ON = false;  // the kernels do not say what they access, and everything here does nothing
#endif

void begin(size_t threads);                    // a block
void barrier();                                // of all its threads
void meet(size_t first, uint32_t lanes);       // of these lanes of the warp that starts at thread `first`
void access(const void* p, size_t size, bool writes, const void* code);  // of the running thread, if the memory is shared
// Of an asynchronous copy: it writes at any moment from the one to the other, and in between nobody may read.
void copying(const void* p, size_t size, const void* code);
void copied(const void* p, size_t size, const void* code);

// What TMA and wgmma do by themselves (async.cpp, products.cpp) is done by agents, who have clocks beside the threads': an access of
// theirs comes after what was known where it was issued, and others know of it when they have waited for it.
constexpr size_t AGENTS = 64;
typedef std::vector<uint32_t> Clock;  // one number for each thread of the block, then for each agent
struct Agent {
  size_t number;
  uint32_t when;
  const Clock* knows;
  size_t thread;  // who issued it
};
void give(Clock& to, size_t thread);           // `to` knows what the thread has done up to now
void learn(size_t thread, const Clock& from);  // and the other way round
void learn(size_t thread, size_t agent, uint32_t when);
void join(Clock& to, const Clock& from);
void meet(Clock& to, size_t thread);  // keeps what the thread has done or knows too; of an empty one all that
void raise(Clock& to, size_t agent, uint32_t when);
void access(const void* p, size_t size, bool writes, const Agent& agent);

}  // namespace host::races
