// Attention for sm_90a, as attention.cu finds it.
#pragma once

#include "../blip3o.h"

namespace blip3o {

// Whether the device is a Hopper and the arguments suit: 16-bit elements, head_dim = value_dim of 64, 128 or, forward, 256, 16-byte
// alignment, neither a mask nor packed sequences nor, backward, a softcap; and enough queries for tiles of 64 of them.
bool fits_hopper(const blip3o_attention_arguments& a);
bool fits_hopper(const blip3o_attention_backward_arguments& a);
// The passes; the arguments fit, but for the number of queries, which may be any. The backward pass has as its workspace 2 floats
// for each query of each head of each sample, with the queries rounded up to 128.
int attention_hopper(const blip3o_attention_arguments& a);
int attention_hopper(const blip3o_attention_backward_arguments& a);

}  // namespace blip3o
