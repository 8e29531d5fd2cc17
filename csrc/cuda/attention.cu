// Scaled dot-product attention on a GPU; the contract is kernels/blip3o_kernels/ops/attention.py. Which kernel takes a call.
#include "attention_backward.cuh"
#include "attention_forward.cuh"
#include "attention_hopper.h"

namespace {

using namespace blip3o;

constexpr int FEW = 32;         // queries that are not worth a larger tile
constexpr int MOST_PARTS = 64;  // of the keys

// run(D) as a constant, with the narrowest tiles for such rows.
template <class T, class Run>
int by_width(int64_t width, Run run) {
  if constexpr (sizeof(T) == 2)  // of float32, which is slow anyway, there are kernels for two widths only
    if (width <= 64) return run(std::integral_constant<int, 64>());
  if (width <= 128) return run(std::integral_constant<int, 128>());
  return run(std::integral_constant<int, 256>());
}

template <class T, int D>
struct Forward {  // queries: 128 or 64 to a block of 4 warps; few of them: 16, and a warp for each quarter of the keys
  using Many = ForwardShape<TensorCores<T, D, D <= 128 ? 2 : 1>, 4, 1, D <= 64 ? 64 : 32>;
  using Few = ForwardShape<TensorCores<T, D, 1>, 1, 4, 64>;
};
template <int D>
struct Forward<float, D> {
  using Many = ForwardShape<MultiplyAdds<D>, D <= 128 ? 8 : 4, 1, D <= 128 ? 32 : 16>;
  using Few = ForwardShape<MultiplyAdds<D>, 2, 2, 32>;
};

template <class T, int D, bool OF_KEYS>
struct Backward {
  using Shape = BackwardShape<TensorCores<T, D, 1>, OF_KEYS, D <= 128 ? 8 : 4, D <= 64 ? 64 : 32, D <= 128 ? 2 : 1,
                              (OF_KEYS && D > 128) ? 128 : D>;
};
template <int D, bool OF_KEYS>
struct Backward<float, D, OF_KEYS> {
  using Shape = BackwardShape<MultiplyAdds<D>, OF_KEYS, 4, D <= 128 ? 32 : 16, 1, D>;
};

// One token stands at the last key: the heads that share a key become its tokens.
template <class T>
void fold(blip3o_attention_arguments& a) {
  if (a.tokens != 1 || a.cu_seqlens_q) return;
  if (a.left >= 0 && a.left < a.keys) {  // from the window's first key on
    const int64_t from = a.keys - 1 - a.left;
    a.key = static_cast<const T*>(a.key) + from * a.key_token;
    a.value = static_cast<const T*>(a.value) + from * a.value_token;
    if (a.mask_kind == 1) a.mask = static_cast<const uint8_t*>(a.mask) + from;
    if (a.mask_kind == 2) a.mask = static_cast<const float*>(a.mask) + from;
    a.keys -= from;
  }
  a.left = a.right = -1;
  a.tokens = a.heads / a.groups;
  a.heads = a.groups;
  a.log_sum_token = a.log_sum_head, a.log_sum_head *= a.tokens;
  a.y_token = a.y_head, a.y_head *= a.tokens;
  a.query_token = a.query_head, a.query_head *= a.tokens;
  a.mask_token = a.mask_head, a.mask_head *= a.tokens;
}

template <class Arguments>
bool sound(const Arguments& a) {
  const int64_t sizes[] = {a.batch, a.heads, a.tokens, a.keys, a.value_dim, a.workspace_floats};
  for (const int64_t size : sizes)
    if (size < 0) return false;
  if (a.groups < 1 || a.heads % a.groups || a.head_dim < 1 || a.head_dim > 256 || a.value_dim > 256) return false;
  if (a.tokens >= FAR / 2 || a.keys >= FAR / 2 || a.mask_kind < 0 || a.mask_kind > 2 || (a.mask_kind && !a.mask)) return false;
  if (a.cu_seqlens_q && (!a.cu_seqlens_k || a.mask_kind || a.batch != 1 || a.sequences >= FAR / 2)) return false;
  if (a.sequences < 1 || (!a.cu_seqlens_q && a.sequences != 1)) return false;
  return !a.batch || !a.heads || !a.tokens || a.tokens <= 0x7fffffff / a.heads / a.batch;
}

int limit(int64_t side, int64_t tokens, int64_t keys) { return side < 0 || side >= tokens + keys ? FAR : static_cast<int>(side); }

template <class T>
int forward(ForwardCall call) {
  constexpr int N = 16 / sizeof(T);
  blip3o_attention_arguments& a = call.a;
  fold<T>(a);
  call.left = limit(a.left, a.tokens, a.keys), call.right = limit(a.right, a.tokens, a.keys);
  call.wide = aligned(a.query, a.key, a.value) &&
              divisible<N>(a.head_dim, a.value_dim, a.query_batch, a.query_head, a.query_token, a.key_batch, a.key_head, a.key_token,
                           a.value_batch, a.value_head, a.value_token);
  call.wide_y = aligned(a.y) && divisible<N>(a.value_dim, a.y_batch, a.y_head, a.y_token);
  const int64_t part = a.batch * a.heads * a.tokens * (a.value_dim + 1);
  const bool few = a.tokens / a.sequences <= FEW;
  call.parts = 1;
  if (few && !a.cu_seqlens_q && a.workspace && a.workspace_floats >= 2 * part) {
    if (a.workspace_floats / part > MOST_PARTS) return BLIP3O_BAD_ARGUMENT;
    call.parts = static_cast<int>(a.workspace_floats / part);
  }
  return by_width<T>(a.head_dim > a.value_dim ? a.head_dim : a.value_dim, [&](auto width) {
    using Shapes = Forward<T, width.value>;
    return few ? run_forward<typename Shapes::Few>(call) : run_forward<typename Shapes::Many>(call);
  });
}

template <class T>
int backward(BackwardCall call) {
  constexpr int N = 16 / sizeof(T);
  const blip3o_attention_backward_arguments& a = call.a;
  call.left = limit(a.left, a.tokens, a.keys), call.right = limit(a.right, a.tokens, a.keys);
  call.wide = aligned(a.query, a.key, a.value, a.dy, a.y) &&
              divisible<N>(a.head_dim, a.value_dim, a.query_batch, a.query_head, a.query_token, a.key_batch, a.key_head, a.key_token,
                           a.value_batch, a.value_head, a.value_token, a.dy_batch, a.dy_head, a.dy_token, a.y_batch, a.y_head, a.y_token);
  call.wide_results = aligned(a.dquery, a.dkey, a.dvalue) &&
                      divisible<N>(a.head_dim, a.value_dim, a.dquery_batch, a.dquery_head, a.dquery_token, a.dkey_batch, a.dkey_head,
                                   a.dkey_token, a.dvalue_batch, a.dvalue_head, a.dvalue_token);
  if (const int status = run_delta<T>(call)) return status;
  return by_width<T>(a.head_dim > a.value_dim ? a.head_dim : a.value_dim, [&](auto width) {
    const int status = run_backward<typename Backward<T, width.value, true>::Shape>(call);
    return status ? status : run_backward<typename Backward<T, width.value, false>::Shape>(call);
  });
}

}  // namespace

extern "C" int blip3o_cuda_attention(const blip3o_attention_arguments* a) {
  if (!sound(*a)) return BLIP3O_BAD_ARGUMENT;
  if (!a->batch || !a->heads || !a->tokens) return BLIP3O_OK;
  if (fits_hopper(*a)) return attention_hopper(*a);
  return by_dtype(a->dtype, [&](auto t) { return forward<decltype(t)>(ForwardCall{*a, 0, 1, 0, 0, false, false}); });
}

extern "C" int blip3o_cuda_attention_backward(const blip3o_attention_backward_arguments* a) {
  if (!sound(*a)) return BLIP3O_BAD_ARGUMENT;
  if (!a->batch || !a->heads) return BLIP3O_OK;
  if (a->tokens && (!a->workspace || !a->log_sum)) return BLIP3O_BAD_ARGUMENT;
  if (a->workspace_floats < 2 * a->batch * a->heads * a->tokens) return BLIP3O_BAD_ARGUMENT;
  if (fits_hopper(*a)) return attention_hopper(*a);
  return by_dtype(a->dtype, [&](auto t) { return backward<decltype(t)>(BackwardCall{*a, 0, 0, 0, false, false}); });
}
