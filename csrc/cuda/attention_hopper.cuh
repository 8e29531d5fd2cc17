// Attention for sm_90a: what the forward and the backward pass share.
//
// Tiles come from TMA through a ring of stages, which a producer fills and warpgroups of consumers empty; each stage has a barrier
// that ends a phase when it is full and one that does when it is empty. All products are wgmma's.
#pragma once

#include <algorithm>

#include "attention_hopper.h"
#include "hopper.cuh"

namespace blip3o::hopper {

constexpr float LOG2_E = 1.44269504088896341f, LN_2 = 0.69314718055994531f;

// Keys or queries from the first to before the limit, counted from anywhere.
struct Span {
  int first, limit;
  __device__ Span operator-(int start) const { return {first - start, limit - start}; }
};

// Which keys a query sees: those from first() to before limit().
struct Sight {
  int behind, ahead, keys;

  __device__ Span sees(int query) const { return {first(query), limit(query)}; }
  __device__ Span seen_from(int key) const { return {key - ahead + 1, key - behind + 1}; }  // by which queries
  __device__ int first(int query) const { return query + behind < 0 ? 0 : query + behind; }
  __device__ int limit(int query) const { return query + ahead < keys ? query + ahead : keys; }
  // Whether each of `queries` from the first on sees each of `count` keys.
  __device__ bool all(int query, int queries, int key, int count) const {
    return key >= query + queries - 1 + behind && key + count <= limit(query);
  }
};

template <class Arguments>
Sight sight_of(const Arguments& a) {
  const int64_t left = a.left < 0 || a.left > a.keys ? a.keys : a.left, right = a.right < 0 || a.right > a.tokens ? a.tokens : a.right;
  return {static_cast<int>(a.keys - a.tokens - left), static_cast<int>(a.keys - a.tokens + right + 1), static_cast<int>(a.keys)};
}

// The tiles of all heads of all samples, in the order in which they are taken: section by section of heads whose keys and values fit
// the second cache together; of a section the last rows first, which under a causal mask see the most. Blocks take them to and fro
// (0 1 2, 2 1 0, 0 ...), so that none always gets the longest, and which block has which tile is fixed.
struct Tiles {
  int heads, all_heads, section, rows, count;  // all_heads: of all samples; rows: tiles of a head

  struct Tile {
    int batch, head, row;
  };
  __device__ int number(int turn) const {
    return turn * gridDim.x + (turn & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
  }
  __device__ Tile tile(int number) const {
    const int start = number / (section * rows) * section, place = number % (section * rows);
    const int heads_here = section < all_heads - start ? section : all_heads - start, head = start + place % heads_here;
    return {head / heads, head % heads, rows - 1 - place / heads_here};
  }
};

// section_bytes: of keys and values of one of the heads, where `sharing` of them have the same.
inline Tiles tiles_of(int64_t heads, int64_t all_heads, int64_t rows, int64_t section_bytes, int64_t sharing) {
  const int64_t section = std::max<int64_t>(1, (24 << 20) / section_bytes) * sharing;  // half of the second cache
  return {static_cast<int>(heads), static_cast<int>(all_heads), static_cast<int>(std::min(all_heads, section)), static_cast<int>(rows),
          static_cast<int>(rows * all_heads)};
}

inline int device_is(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) return 0;
  return value;
}
inline int multiprocessors() { return std::max(1, device_is(cudaDevAttrMultiProcessorCount)); }

// Whether TMA can walk a tensor, which must not be expanded along a dimension.
inline bool walks(int64_t batch, int64_t heads, int64_t tokens, const void* data, int64_t by_batch, int64_t by_head, int64_t by_token) {
  const auto apart = [](int64_t size, int64_t stride) { return size == 1 || (stride > 0 && stride % 8 == 0); };
  return apart(batch, by_batch) && apart(heads, by_head) && apart(tokens, by_token) && aligned(data);
}

// What both passes ask of their arguments.
template <class Arguments>
bool suits(const Arguments& a) {
  return (a.dtype == BLIP3O_BFLOAT16 || a.dtype == BLIP3O_FLOAT16) && a.head_dim == a.value_dim && !a.mask_kind && !a.cu_seqlens_q &&
         a.tokens >= 64 && a.tokens < 1 << 30 && a.keys >= 1 && a.keys < 1 << 30 &&
         walks(a.batch, a.heads, a.tokens, a.query, a.query_batch, a.query_head, a.query_token) &&
         walks(a.batch, a.groups, a.keys, a.key, a.key_batch, a.key_head, a.key_token) &&
         walks(a.batch, a.groups, a.keys, a.value, a.value_batch, a.value_head, a.value_token) &&
         device_is(cudaDevAttrComputeCapabilityMajor) == 9;
}

// A stage of a ring, and the parity of its barriers' phase, as the one who waits for full stages sees it.
template <int STAGES>
struct Ring {
  int stage = 0;
  unsigned parity = 0;
  __device__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

#ifdef BLIP3O_HOPPER

// sums [64, N] (+)= rows [64, D] columns [N, D]^T, both K-major; the addresses are of the tiles' rows of the first panel, and the panels
// are so many bytes apart.
template <class T, int N, int D>
__device__ inline void multiply_tiles(float (&sums)[N / 2], uint32_t rows, int row_panel, uint32_t columns, int column_panel) {
#pragma unroll
  for (int k = 0; k < D; k += 16) {
    const uint32_t dim = k % PANEL * 2;
    multiply<T, N, true>(sums, operand(rows + k / PANEL * row_panel + dim), operand(columns + k / PANEL * column_panel + dim), k > 0);
  }
}

// sums [64, D] += weights [64, N] values [N, D], the weights in registers.
template <class T, int N, int D>
__device__ inline void add_products(float (&sums)[D / 2], const uint32_t (&weights)[N / 16][4], uint32_t values) {
#pragma unroll
  for (int k = 0; k < N; k += 16) multiply<T, D, false>(sums, weights[k / 16], operand(values + k * PANEL * 2, N * PANEL * 2), true);
}

// Sums as the left operand of a product. Its layout is theirs: nothing moves between threads.
template <class T, int N>
__device__ inline void pack(uint32_t (&weights)[N / 16][4], const float (&sums)[N / 2]) {
#pragma unroll
  for (int i = 0; i < N / 4; ++i) weights[i / 4][i % 4] = packed<T>(sums[2 * i], sums[2 * i + 1]);
}

// What is outside a span of columns becomes -inf, in the thread's first row and in the one 8 below. Columns count from its first.
template <int N>
__device__ inline void hide(float (&scores)[N / 2], const Span& row, const Span& row_below) {
  const int first[2] = {row.first, row_below.first}, limit[2] = {row.limit, row_below.limit};
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const int column = i / 4 * 8 + i % 2, which = i / 2 % 2;
    if (column < first[which] || column >= limit[which]) scores[i] = -INFINITY;
  }
}

// tanh(x cap) of each, with cap given as 2 log2(e) cap.
template <int N>
__device__ inline void bound(float (&scores)[N], float cap) {
#pragma unroll
  for (int i = 0; i < N; ++i) scores[i] = 1.0f - __fdividef(2.0f, 1.0f + power_of_two(scores[i] * cap));
}

// Stores a row of D sums of the quad's four threads, each of which has two in eight of them, times a factor: of 32 columns each thread
// gets 8 consecutive ones by two exchanges, so that stores are of 16 bytes, 64 side by side. FIRST: 0 or 2, the row's place in `sums`.
template <class T, int D, int FIRST>
__device__ inline void store_quad(T* row, const float (&sums)[D / 2], float factor, bool there) {
  const int quad = threadIdx.x % 4;
#pragma unroll
  for (int start = 0; start < D; start += 32) {
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* two = sums + start / 2 + 4 * i + FIRST;
      word[i] = packed<T>(two[0] * factor, two[1] * factor);
    }
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint32_t other = __shfl_xor_sync(0xffffffffu, quad & 1 ? word[i] : word[i + 1], 1);
      word[i] = quad & 1 ? other : word[i];
      word[i + 1] = quad & 1 ? word[i + 1] : other;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t other = __shfl_xor_sync(0xffffffffu, quad & 2 ? word[i] : word[i + 2], 2);
      word[i] = quad & 2 ? other : word[i];
      word[i + 2] = quad & 2 ? word[i + 2] : other;
    }
    const Stored<uint32_t, 4> eight = {{word[0], word[1], word[2], word[3]}};
    if (there) put(reinterpret_cast<uint32_t*>(row + start + 8 * quad), eight);
  }
}

#endif

}  // namespace blip3o::hopper
