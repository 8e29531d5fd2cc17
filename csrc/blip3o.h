/* The whole native interface: plain C, one function per op and direction. Knows neither Python nor torch; only
 * cpu/shortcut.cpp does, without their headers.
 *
 * Every function returns a status. Tensors are pointers, sizes and strides; strides count elements. All memory, workspaces
 * included, belongs to the caller. Functions named blip3o_cpu_* are in libblip3o_cpu, blip3o_cuda_* in libblip3o_cuda.
 * Arguments come in one struct: to Python, packing bytes and passing one pointer costs 0.3 us, eleven arguments 1.4 us.
 * kernels/blip3o_kernels/native.py repeats the structs' formats; a test compares them with this file.
 */
#ifndef BLIP3O_H
#define BLIP3O_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define BLIP3O_API __attribute__((visibility("default")))

/* Raised whenever a declaration below changes its meaning; Python refuses a library of another version. */
#define BLIP3O_VERSION 8

enum blip3o_status {
  BLIP3O_OK = 0,
  BLIP3O_BAD_ARGUMENT = 1,        /* a size, stride, pointer or flag is out of range */
  BLIP3O_BAD_DTYPE = 2,           /* this function has no body for the dtypes */
  BLIP3O_BAD_INSTRUCTION_SET = 3, /* this chip or this build lacks the instruction set asked for */
  BLIP3O_CUDA_ERROR = 4           /* see blip3o_cuda_error */
};

enum blip3o_dtype { BLIP3O_FLOAT32 = 0, BLIP3O_BFLOAT16 = 1, BLIP3O_FLOAT16 = 2 };

enum blip3o_instruction_set {
  BLIP3O_BEST = 0,
  BLIP3O_PORTABLE = 1,
  BLIP3O_AVX2 = 2,
  BLIP3O_AVX512 = 3,
  BLIP3O_AVX512_BF16 = 4, /* products of bfloat16 pairs beside that */
  BLIP3O_AMX = 5          /* and in tiles */
};

BLIP3O_API int blip3o_cpu_version(void);
/* The best instruction set that this build and this chip have. */
BLIP3O_API int blip3o_cpu_best(void);
/* 1 if the library runs on several threads. */
BLIP3O_API int blip3o_cpu_threaded(void);
/* Whether Intel made the chip: MKL, which torch multiplies with, is faster there than on others of the same instructions. */
BLIP3O_API int blip3o_cpu_intel(void);

/* Memory for a large result, as a DLPack tensor (DLManagedTensor) whose deleter keeps the memory for a result of about the
 * same size; null if there is none to be had. description: DLPack's type code, bits of an element, number of dimensions, the
 * lengths (positive), the strides; without gaps. Safe to call from any thread. */
BLIP3O_API void* blip3o_cpu_result(const int64_t* description);
/* Keep up to so many bytes of what nobody holds; 0, as at the start: nothing. */
BLIP3O_API void blip3o_cpu_keep(int64_t bytes);
/* Give all that is kept back to the system; how many bytes it was. */
BLIP3O_API int64_t blip3o_cpu_release(void);
BLIP3O_API int64_t blip3o_cpu_kept(void);

/* CPython's PyMethodDef of an op's shortcut (cpu/shortcut.cpp); null if there is none. handles: what shortcut.py collects; it
 * must live as long as the library. */
BLIP3O_API void* blip3o_cpu_shortcut(const char* op, const void* handles);

/* rms_norm as kernels/blip3o_kernels/ops/rms_norm.py defines it. dtypes: those of x, y, dx, dy, then of weight and dweight,
 * which is the same or float32. Rows of x are `stride` apart; everything else is contiguous. */
typedef struct {
  void* y;
  const void* x;
  const void* weight; /* null: no gain */
  int64_t rows, width, stride;
  float eps, offset;
  int dtype, weight_dtype, round_before_weight;
  int instruction_set, threads; /* CPU */
  void* stream;                 /* CUDA */
} blip3o_rms_norm_arguments;

/* The rows are cut into `blocks` equal runs; the sums of a run go to partial [blocks, width] and are then added up in order, so
 * that the number of threads does not change a bit. */
typedef struct {
  void* dx;
  void* dweight;  /* null: not wanted */
  float* partial; /* null without dweight */
  const void* dy;
  const void* x;
  const void* weight;
  int64_t rows, width, stride, blocks;
  float eps, offset;
  int dtype, weight_dtype;
  int instruction_set, threads;
  void* stream;
} blip3o_rms_norm_backward_arguments;

BLIP3O_API int blip3o_cpu_rms_norm(const blip3o_rms_norm_arguments* arguments);
BLIP3O_API int blip3o_cpu_rms_norm_backward(const blip3o_rms_norm_backward_arguments* arguments);
BLIP3O_API int blip3o_cuda_rms_norm(const blip3o_rms_norm_arguments* arguments);
BLIP3O_API int blip3o_cuda_rms_norm_backward(const blip3o_rms_norm_backward_arguments* arguments);

/* add_rms_norm as kernels/blip3o_kernels/ops/add_rms_norm.py defines it; conventions as for rms_norm. Rows of x and rows of residual
 * are so many elements apart; everything else is contiguous. */
typedef struct {
  void* y;
  void* added;
  const void* x;
  const void* residual;
  const void* weight; /* null: no gain */
  int64_t rows, width, stride, residual_stride;
  float eps, offset;
  int dtype, weight_dtype, round_before_weight;
  int instruction_set, threads;
  void* stream;
} blip3o_add_rms_norm_arguments;

/* As for rms_norm. dx is the gradient of x and of residual. */
typedef struct {
  void* dx;
  void* dweight;  /* null: not wanted */
  float* partial; /* [blocks, width]; null without dweight */
  const void* dy;
  const void* dadded; /* null: zeros */
  const void* added;
  const void* weight;
  int64_t rows, width, blocks;
  float eps, offset;
  int dtype, weight_dtype;
  int instruction_set, threads;
  void* stream;
} blip3o_add_rms_norm_backward_arguments;

BLIP3O_API int blip3o_cpu_add_rms_norm(const blip3o_add_rms_norm_arguments* arguments);
BLIP3O_API int blip3o_cuda_add_rms_norm(const blip3o_add_rms_norm_arguments* arguments);
BLIP3O_API int blip3o_cpu_add_rms_norm_backward(const blip3o_add_rms_norm_backward_arguments* arguments);
BLIP3O_API int blip3o_cuda_add_rms_norm_backward(const blip3o_add_rms_norm_backward_arguments* arguments);

/* modulate as kernels/blip3o_kernels/ops/modulate.py defines it, with norm="layer" where `centred` is 1. condition_dtype: that of
 * scale, shift, weight, bias and their gradients; the same as dtype, or float32. Rows of x, and rows of scale and of shift, are so
 * many elements apart; everything else is contiguous. saved: 1/std of each row, then, if centred, the mean of each row. */
typedef struct {
  void* y;
  float* saved; /* [rows], centred [2, rows]; null: not wanted */
  const void* x;
  const void* scale;
  const void* shift;  /* null: none */
  const void* weight; /* null: none */
  const void* bias;   /* null: none */
  int64_t batch, tokens, width, stride, scale_stride, shift_stride;
  float eps;
  int centred, dtype, condition_dtype;
  int instruction_set, threads;
  void* stream;
} blip3o_modulate_arguments;

/* The samples are cut into `blocks` equal runs, each with its own part of the workspace [blocks, 5, width], whose sums are then
 * added up in order. dshift, dweight and dbias may be null: not wanted. At least one token. On a GPU it is each sample's tokens that
 * are cut into `blocks` runs: workspace [batch, blocks, 2, width]. */
typedef struct {
  void* dx;
  void* dscale;
  void* dshift;
  void* dweight;
  void* dbias;
  float* workspace;
  const void* dy;
  const void* x;
  const void* scale;
  const void* weight;
  const void* bias;
  const float* saved;
  int64_t batch, tokens, width, stride, scale_stride, blocks;
  int centred, dtype, condition_dtype;
  int instruction_set, threads;
  void* stream;
} blip3o_modulate_backward_arguments;

BLIP3O_API int blip3o_cpu_modulate(const blip3o_modulate_arguments* arguments);
BLIP3O_API int blip3o_cuda_modulate(const blip3o_modulate_arguments* arguments);
BLIP3O_API int blip3o_cpu_modulate_backward(const blip3o_modulate_backward_arguments* arguments);
BLIP3O_API int blip3o_cuda_modulate_backward(const blip3o_modulate_backward_arguments* arguments);

/* gated_residual as kernels/blip3o_kernels/ops/gated_residual.py defines it; conventions as for modulate.
 * saved: tanh(gate) [batch, width], then with a weight 1/rms [rows]. It is always written. */
typedef struct {
  void* y;
  float* saved;
  const void* residual;
  const void* x;
  const void* gate;
  const void* weight; /* null: no norm */
  int64_t batch, tokens, width, residual_stride, stride, gate_stride;
  float eps;
  int dtype, condition_dtype;
  int instruction_set, threads;
  void* stream;
} blip3o_gated_residual_arguments;

/* As for modulate; workspace [blocks, 3, width], on a GPU [batch, blocks, width]. dweight is null without a weight. The residual's
 * gradient is dy. */
typedef struct {
  void* dx;
  void* dgate;
  void* dweight;
  float* workspace;
  const void* dy;
  const void* x;
  const void* weight;
  const float* saved;
  int64_t batch, tokens, width, stride, blocks;
  int dtype, condition_dtype;
  int instruction_set, threads;
  void* stream;
} blip3o_gated_residual_backward_arguments;

BLIP3O_API int blip3o_cpu_gated_residual(const blip3o_gated_residual_arguments* arguments);
BLIP3O_API int blip3o_cuda_gated_residual(const blip3o_gated_residual_arguments* arguments);
BLIP3O_API int blip3o_cpu_gated_residual_backward(const blip3o_gated_residual_backward_arguments* arguments);
BLIP3O_API int blip3o_cuda_gated_residual_backward(const blip3o_gated_residual_backward_arguments* arguments);

/* layer_norm as kernels/blip3o_kernels/ops/layer_norm.py defines it; conventions as for rms_norm.
 * saved: 1/std of each row, then the mean of each row; null: not wanted. */
typedef struct {
  void* y;
  float* saved;
  const void* x;
  const void* weight; /* null: none */
  const void* bias;   /* null: none */
  int64_t rows, width, stride;
  float eps;
  int dtype, weight_dtype;
  int instruction_set, threads;
  void* stream;
} blip3o_layer_norm_arguments;

/* As for rms_norm; workspace [blocks, 3, width], on a GPU [blocks, 2, width]. dweight and dbias may be null: not wanted. */
typedef struct {
  void* dx;
  void* dweight;
  void* dbias;
  float* workspace;
  const void* dy;
  const void* x;
  const void* weight;
  const float* saved;
  int64_t rows, width, stride, blocks;
  int dtype, weight_dtype;
  int instruction_set, threads;
  void* stream;
} blip3o_layer_norm_backward_arguments;

BLIP3O_API int blip3o_cpu_layer_norm(const blip3o_layer_norm_arguments* arguments);
BLIP3O_API int blip3o_cuda_layer_norm(const blip3o_layer_norm_arguments* arguments);
BLIP3O_API int blip3o_cpu_layer_norm_backward(const blip3o_layer_norm_backward_arguments* arguments);
BLIP3O_API int blip3o_cuda_layer_norm_backward(const blip3o_layer_norm_backward_arguments* arguments);

/* timestep_embedding as kernels/blip3o_kernels/ops/timestep_embedding.py defines it: y [rows, 2 * half]. frequencies is a
 * workspace of half + 15 (CPU). */
typedef struct {
  float* y;
  double* frequencies;
  const float* timestep; /* [rows] */
  int64_t rows, half;
  double max_period;
  int instruction_set, threads;
  void* stream;
} blip3o_timestep_embedding_arguments;

typedef struct {
  float* dtimestep; /* [rows] */
  double* frequencies;
  const float* dy;
  const float* timestep;
  int64_t rows, half;
  double max_period;
  int instruction_set, threads;
  void* stream;
} blip3o_timestep_embedding_backward_arguments;

BLIP3O_API int blip3o_cpu_timestep_embedding(const blip3o_timestep_embedding_arguments* arguments);
BLIP3O_API int blip3o_cuda_timestep_embedding(const blip3o_timestep_embedding_arguments* arguments);
BLIP3O_API int blip3o_cpu_timestep_embedding_backward(const blip3o_timestep_embedding_backward_arguments* arguments);
BLIP3O_API int blip3o_cuda_timestep_embedding_backward(const blip3o_timestep_embedding_backward_arguments* arguments);

/* The flow ops read contiguous samples of `elements` values each. They cut them into chunks of BLIP3O_CHUNK elements, the last
 * of a sample being shorter; sums has room for one number per chunk. A GPU cuts them in its
 * own way and keeps floats there, no more of them than there is room for. */
#define BLIP3O_CHUNK 1024

/* What random bits are for; kernels/blip3o_kernels/philox.py defines them, from a seed (64 bits), positions and a draw (24 bits). */
enum blip3o_stream { BLIP3O_NOISE = 0, BLIP3O_TIMESTEPS = 1 };

/* flow_interpolate as kernels/blip3o_kernels/ops/flow_interpolate.py defines it. */
typedef struct {
  void* x_sigma;
  void* velocity;
  const void* x;
  const void* noise;        /* null: drawn from seed, positions and draw */
  const float* sigma;       /* [samples] */
  const int64_t* positions; /* [samples]; null with noise */
  int64_t samples, elements, seed;
  int dtype, draw;
  int instruction_set, threads;
  void* stream;
} blip3o_flow_interpolate_arguments;

typedef struct {
  void* dx;
  void* dnoise;  /* null: not wanted */
  float* dsigma; /* null: not wanted */
  double* sums;  /* null without dsigma */
  const void* dx_sigma;
  const void* dvelocity;
  const void* x;
  const void* noise; /* null: drawn */
  const float* sigma;
  const int64_t* positions;
  int64_t samples, elements, seed;
  int dtype, draw;
  int instruction_set, threads;
  void* stream;
} blip3o_flow_interpolate_backward_arguments;

BLIP3O_API int blip3o_cpu_flow_interpolate(const blip3o_flow_interpolate_arguments* arguments);
BLIP3O_API int blip3o_cuda_flow_interpolate(const blip3o_flow_interpolate_arguments* arguments);
BLIP3O_API int blip3o_cpu_flow_interpolate_backward(const blip3o_flow_interpolate_backward_arguments* arguments);
BLIP3O_API int blip3o_cuda_flow_interpolate_backward(const blip3o_flow_interpolate_backward_arguments* arguments);

/* flow_timesteps as kernels/blip3o_kernels/ops/flow_timesteps.py defines it. */
typedef struct {
  float* sigma;
  const int64_t* positions;
  int64_t samples, seed;
  float mean, std, shift;
  int logit_normal, draw;
  int instruction_set, threads;
  void* stream;
} blip3o_flow_timesteps_arguments;

BLIP3O_API int blip3o_cpu_flow_timesteps(const blip3o_flow_timesteps_arguments* arguments);
BLIP3O_API int blip3o_cuda_flow_timesteps(const blip3o_flow_timesteps_arguments* arguments);

/* flow_loss as kernels/blip3o_kernels/ops/flow_loss.py defines it. means [samples]: each sample's own, without its weight. */
typedef struct {
  float* loss;
  float* means;
  double* sums;
  const void* prediction;
  const void* target;
  const float* weight; /* [samples]; null: 1 */
  int64_t samples, elements;
  int dtype;
  int instruction_set, threads;
  void* stream;
} blip3o_flow_loss_arguments;

/* The target's gradient is -dprediction, the weight's dloss * means / samples. */
typedef struct {
  void* dprediction;
  void* dtarget; /* null: not wanted */
  const float* dloss;
  const void* prediction;
  const void* target;
  const float* weight;
  int64_t samples, elements;
  int dtype;
  int instruction_set, threads;
  void* stream;
} blip3o_flow_loss_backward_arguments;

BLIP3O_API int blip3o_cpu_flow_loss(const blip3o_flow_loss_arguments* arguments);
BLIP3O_API int blip3o_cuda_flow_loss(const blip3o_flow_loss_arguments* arguments);
BLIP3O_API int blip3o_cpu_flow_loss_backward(const blip3o_flow_loss_backward_arguments* arguments);
BLIP3O_API int blip3o_cuda_flow_loss_backward(const blip3o_flow_loss_backward_arguments* arguments);

/* flow_step as kernels/blip3o_kernels/ops/flow_step.py defines it. Without steps, one step serves all samples. */
typedef struct {
  void* y;
  const void* x;
  const void* velocity;
  const void* unconditional; /* null: no guidance */
  const void* previous;      /* null: no average */
  const float* steps;        /* [samples]; null: step */
  int64_t samples, elements;
  float step, guidance;
  int dtype;
  int instruction_set, threads;
  void* stream;
} blip3o_flow_step_arguments;

/* Gradients may be null: not wanted. That of x is dy. */
typedef struct {
  void* dvelocity;
  void* dunconditional;
  void* dprevious;
  float* dsteps;
  double* sums; /* null without dsteps */
  const void* dy;
  const void* velocity;
  const void* unconditional;
  const void* previous;
  const float* steps;
  int64_t samples, elements;
  float step, guidance;
  int dtype;
  int instruction_set, threads;
  void* stream;
} blip3o_flow_step_backward_arguments;

BLIP3O_API int blip3o_cpu_flow_step(const blip3o_flow_step_arguments* arguments);
BLIP3O_API int blip3o_cuda_flow_step(const blip3o_flow_step_arguments* arguments);
BLIP3O_API int blip3o_cpu_flow_step_backward(const blip3o_flow_step_backward_arguments* arguments);
BLIP3O_API int blip3o_cuda_flow_step_backward(const blip3o_flow_step_backward_arguments* arguments);

/* linear_cross_entropy as kernels/blip3o_kernels/ops/linear_cross_entropy.py defines it, between its products: the
 * logits [rows, vocab], contiguous, of rows start, start + 1, ... of `targets` ones, chunk after chunk from the first on.
 * After the last of them *loss is the mean: the losses over the number of kept rows. dlogits may be logits, and is on a CPU. On a GPU
 * logits are float32; of 2 `parts` of dlogits the second, `rows` rows behind the first, holds what rounding takes from that one. */
typedef struct {
  void* logits;
  void* dlogits;  /* [parts * rows, vocab], rows dlogits_stride apart; null: not wanted */
  double* losses; /* [targets], workspace; on a GPU of floats */
  float* loss;
  const int64_t* target; /* [targets], in [0, vocab) or ignore_index; on a GPU any other makes the loss NaN */
  int64_t targets, start, rows, vocab, dlogits_stride, ignore_index;
  float label_smoothing, z_loss, softcap; /* softcap 0: none */
  int dtype, dlogits_dtype, parts;
  int instruction_set, threads;
  void* stream;
} blip3o_linear_cross_entropy_arguments;

BLIP3O_API int blip3o_cpu_linear_cross_entropy(const blip3o_linear_cross_entropy_arguments* arguments);
BLIP3O_API int blip3o_cuda_linear_cross_entropy(const blip3o_linear_cross_entropy_arguments* arguments);

/* All of it, products included, in float32, or of bfloat16 (by its own products where the chip has them). Forward: *loss and `sums`, three numbers of
 * each row that the backward pass wants, and with `logits` those, in an order of their own. Backward: dx and dweight, contiguous,
 * times dloss; without `logits` they are computed again. */
typedef struct {
  void* dx; /* null: not wanted */
  void* dweight;
  const void* x;
  const void* weight;
  const int64_t* target; /* [rows], in [0, vocab) or ignore_index */
  float* logits;         /* rows padded to 32, times vocab; or null */
  float* sums;           /* [3, rows padded to 32] */
  float* loss;
  float* workspace;
  int64_t rows, width, vocab, x_stride, weight_stride, ignore_index, workspace_floats;
  float label_smoothing, z_loss, softcap, dloss; /* softcap 0: none */
  int dtype, backward;
  int instruction_set, threads;
  void* stream;
} blip3o_linear_cross_entropy_fused_arguments;

BLIP3O_API int blip3o_cpu_linear_cross_entropy_fused(const blip3o_linear_cross_entropy_fused_arguments* arguments);

/* swiglu: y = silu(gate) * up, all of one dtype. Rows are `width` long and apart by the strides; y is contiguous. */
typedef struct {
  void* y;
  const void* gate;
  const void* up;
  int64_t rows, width, gate_stride, up_stride;
  int dtype;
  int instruction_set, threads;
  void* stream;
} blip3o_swiglu_arguments;

/* Rows of dgate and of dup are `gradient_stride` apart; dy is contiguous. */
typedef struct {
  void* dgate;
  void* dup;
  const void* dy;
  const void* gate;
  const void* up;
  int64_t rows, width, gate_stride, up_stride, gradient_stride;
  int dtype;
  int instruction_set, threads;
  void* stream;
} blip3o_swiglu_backward_arguments;

BLIP3O_API int blip3o_cpu_swiglu(const blip3o_swiglu_arguments* arguments);
BLIP3O_API int blip3o_cuda_swiglu(const blip3o_swiglu_arguments* arguments);
BLIP3O_API int blip3o_cpu_swiglu_backward(const blip3o_swiglu_backward_arguments* arguments);
BLIP3O_API int blip3o_cuda_swiglu_backward(const blip3o_swiglu_backward_arguments* arguments);

/* rope: x and y [batch, heads, tokens, head_dim], their last dimension contiguous. cos and sin float32 [tokens, half],
 * contiguous, `table_stride` apart from sample to sample (0: one table for all). The first 2 * half dims are rotated, by the
 * negative angle if `inverse`, which is the backward pass. */
typedef struct {
  void* y;
  const void* x;
  const float* cos;
  const float* sin;
  int64_t batch, heads, tokens, head_dim, half, table_stride;
  int64_t y_batch, y_head, y_token, x_batch, x_head, x_token; /* strides */
  int dtype, interleaved, inverse;
  int instruction_set, threads;
  void* stream;
} blip3o_rope_arguments;

BLIP3O_API int blip3o_cpu_rope(const blip3o_rope_arguments* arguments);
BLIP3O_API int blip3o_cuda_rope(const blip3o_rope_arguments* arguments);

/* qk_norm_rope as kernels/blip3o_kernels/ops/qk_norm_rope.py defines it. query and query_y [batch, heads, tokens, head_dim], key and
 * key_y with `groups` heads; their last dimension is contiguous, and query_y and key_y are dense as [batch, tokens, heads, head_dim].
 * across_width: on a CPU the heads of query and of key must be adjacent. parameter_dtype: that of weights and biases; the same as dtype, or
 * float32. The tables are those of rope. */
typedef struct {
  void* query_y;
  void* key_y;
  const void* query;
  const void* key;
  const void* query_weight;
  const void* key_weight;
  const void* query_bias; /* null: none */
  const void* key_bias;   /* null: none */
  const float* cos;
  const float* sin;
  int64_t batch, heads, groups, tokens, head_dim, half, table_stride;
  int64_t query_batch, query_head, query_token, key_batch, key_head, key_token; /* strides */
  float eps;
  int dtype, parameter_dtype, centred, across_width, interleaved;
  int instruction_set, threads;
  void* stream;
} blip3o_qk_norm_rope_arguments;

/* The tokens are cut into `blocks` equal runs, each with its own part of the workspace [blocks, 7, span], where span is head_dim, or
 * across_width that of all heads or of all groups, whichever are more. dquery and dkey are dense as query_y is. On a GPU queries and
 * keys share the blocks, of which there are at least two: workspace [blocks, 2, span]. */
typedef struct {
  void* dquery;
  void* dkey;
  void* dquery_weight; /* null, as its bias and those of the key: not wanted */
  void* dkey_weight;
  void* dquery_bias;
  void* dkey_bias;
  float* workspace;
  const void* query_dy;
  const void* key_dy;
  const void* query;
  const void* key;
  const void* query_weight;
  const void* key_weight;
  const float* cos;
  const float* sin;
  int64_t batch, heads, groups, tokens, head_dim, half, table_stride, blocks;
  int64_t query_batch, query_head, query_token, key_batch, key_head, key_token; /* strides */
  int64_t query_dy_batch, query_dy_head, query_dy_token, key_dy_batch, key_dy_head, key_dy_token;
  float eps;
  int dtype, parameter_dtype, centred, across_width, interleaved;
  int instruction_set, threads;
  void* stream;
} blip3o_qk_norm_rope_backward_arguments;

BLIP3O_API int blip3o_cpu_qk_norm_rope(const blip3o_qk_norm_rope_arguments* arguments);
BLIP3O_API int blip3o_cuda_qk_norm_rope(const blip3o_qk_norm_rope_arguments* arguments);
BLIP3O_API int blip3o_cpu_qk_norm_rope_backward(const blip3o_qk_norm_rope_backward_arguments* arguments);
BLIP3O_API int blip3o_cuda_qk_norm_rope_backward(const blip3o_qk_norm_rope_backward_arguments* arguments);

/* attention: the layouts are [batch, heads or groups, tokens or keys, dims] with a contiguous last dimension; heads is a multiple
 * of groups. mask broadcasts by strides of 0: none (mask_kind 0), bytes that are 1 where a key takes part (1), or float32 that
 * are added to the scores (2); its last dimension is contiguous. Query t sees the keys t + S - T - left to t + S - T + right, with
 * T tokens and S keys; -1: no limit. softcap 0: none. cu_seqlens_q and cu_seqlens_k [sequences + 1], from 0 to tokens and keys:
 * packed sequences, without a mask and for a batch of 1; null: none, sequences is 1. The workspace has `workspace_floats` for each
 * thread, at least
 *     forward   S (K + V) + 64 (3 P + K + V)          backward   2 S (K + V) + 192 (S + P + K + V)
 * and a multiple of 16, with S, K and V the keys, the head_dim and the value_dim rounded up to 32, and P = min(S, 128). Without
 * packed sequences, and for at most 16 rows (tokens, or of one token the heads of a group), the forward pass takes
 *     (P + 64) (K + V) + 32 P, and after all threads' 512 (V + 2) if there are more than 256 keys.
 *
 * On a GPU dims are at most 256, and `workspace_floats` says what the workspace has in all. Backward: 2 [batch, heads,
 * tokens], of 16-bit inputs with the tokens rounded up to 128. Forward: 0, or, to cut the keys of few queries into 2 to 64 parts, [parts, batch, heads, tokens, value_dim + 1]; no packed sequences then. */
typedef struct {
  void* y;
  float* log_sum; /* [batch, heads, tokens]: of each row's exponentials, -inf if it sees nothing; null: not wanted */
  const void* query;
  const void* key;
  const void* value;
  const void* mask;
  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_k;
  float* workspace;
  int64_t batch, heads, groups, tokens, keys, head_dim, value_dim, sequences, workspace_floats;
  int64_t y_batch, y_head, y_token, query_batch, query_head, query_token; /* strides */
  int64_t key_batch, key_head, key_token, value_batch, value_head, value_token, mask_batch, mask_head, mask_token;
  int64_t log_sum_head, log_sum_token, left, right;
  float softcap, scale;
  int dtype, mask_kind;
  int instruction_set, threads;
  void* stream;
} blip3o_attention_arguments;

typedef struct {
  void* dquery;
  void* dkey;
  void* dvalue;
  const void* dy;
  const void* y;
  const float* log_sum; /* on a CPU, these two are read by AMX alone */
  const void* query;
  const void* key;
  const void* value;
  const void* mask;
  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_k;
  float* workspace;
  int64_t batch, heads, groups, tokens, keys, head_dim, value_dim, sequences, workspace_floats;
  int64_t dquery_batch, dquery_head, dquery_token, dkey_batch, dkey_head, dkey_token; /* strides */
  int64_t dvalue_batch, dvalue_head, dvalue_token, dy_batch, dy_head, dy_token, y_batch, y_head, y_token;
  int64_t query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token;
  int64_t mask_batch, mask_head, mask_token, log_sum_head, left, right;
  float softcap, scale;
  int dtype, mask_kind;
  int instruction_set, threads;
  void* stream;
} blip3o_attention_backward_arguments;

BLIP3O_API int blip3o_cpu_attention(const blip3o_attention_arguments* arguments);
BLIP3O_API int blip3o_cpu_attention_backward(const blip3o_attention_backward_arguments* arguments);
BLIP3O_API int blip3o_cuda_attention(const blip3o_attention_arguments* arguments);
BLIP3O_API int blip3o_cuda_attention_backward(const blip3o_attention_backward_arguments* arguments);

BLIP3O_API int blip3o_cuda_version(void);
/* What the last failing call on this thread reported, as text. */
BLIP3O_API const char* blip3o_cuda_error(void);

#ifdef __cplusplus
}
#endif
#endif
