// What csrc/cuda/mma.cuh asks of the host: copies under way, and what a warp does as one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace host {

// A copy takes effect at some moment, drawn from the seed, between its issue and the end of the wait for its group. Until then
// nobody may touch where it goes to; a thread may not end before it has waited.
void cp_async(void* to, const void* from, int size, bool valid);
void cp_async_commit();
void cp_async_wait(int groups);

void ldmatrix(uint32_t (&to)[4], const void* row, bool transposed);
void mma(float* c0, float* c1, float* c2, float* c3, const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bfloat16);

namespace copies {

void begin(size_t threads);  // a block
bool under_way();            // whether the running thread has copies that it has not waited for

}  // namespace copies
}  // namespace host
