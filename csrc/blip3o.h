/* The whole native interface: plain C, one function per op and direction. Knows neither Python nor torch.
 *
 * Every function returns a status. Tensors are pointers, sizes and strides; strides count elements. All memory, workspaces
 * included, belongs to the caller. Functions named blip3o_cpu_* are in libblip3o_cpu, blip3o_cuda_* in libblip3o_cuda.
 * Python reads these declarations from kernels/blip3o_kernels/native.py, which a test compares with this file.
 */
#ifndef BLIP3O_H
#define BLIP3O_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define BLIP3O_API __attribute__((visibility("default")))

/* Raised whenever a declaration below changes its meaning; Python refuses a library of another version. */
#define BLIP3O_VERSION 1

enum blip3o_status {
  BLIP3O_OK = 0,
  BLIP3O_BAD_ARGUMENT = 1,        /* a size, stride, pointer or flag is out of range */
  BLIP3O_BAD_DTYPE = 2,           /* this function has no body for the dtypes */
  BLIP3O_BAD_INSTRUCTION_SET = 3, /* this chip or this build lacks the instruction set asked for */
  BLIP3O_CUDA_ERROR = 4           /* see blip3o_cuda_error */
};

enum blip3o_dtype { BLIP3O_FLOAT32 = 0, BLIP3O_BFLOAT16 = 1, BLIP3O_FLOAT16 = 2 };

enum blip3o_instruction_set { BLIP3O_BEST = 0, BLIP3O_PORTABLE = 1, BLIP3O_AVX2 = 2, BLIP3O_AVX512 = 3 };

BLIP3O_API int blip3o_cpu_version(void);
/* The best instruction set that this build and this chip have. */
BLIP3O_API int blip3o_cpu_best(void);
/* 1 if the library runs on several threads. */
BLIP3O_API int blip3o_cpu_threaded(void);

/* y = rms_norm(x), as kernels/blip3o_kernels/ops/rms_norm.py defines it. x [rows, width] with rows `stride` apart, y and weight
 * contiguous. weight may be null. mode is the sum of dtype, 4 * weight_dtype (dtype or float32), 16 * instruction_set and
 * 64 if rounding comes before the weight. */
BLIP3O_API int blip3o_cpu_rms_norm(void* y, const void* x, const void* weight, int64_t rows, int64_t width,
                                   int64_t stride, float eps, float offset, int mode, int threads);
/* dx and dweight from dy [rows, width] contiguous. dweight null: not wanted. The rows are cut into `blocks` equal runs; the
 * sums of a run go to partial [blocks, width] float32 and are then added up in order, so threads do not change a bit. */
BLIP3O_API int blip3o_cpu_rms_norm_backward(void* dx, void* dweight, float* partial, const void* dy, const void* x,
                                            const void* weight, int64_t rows, int64_t width, int64_t stride,
                                            int64_t blocks, float eps, float offset, int mode, int threads);

BLIP3O_API int blip3o_cuda_version(void);
/* What the last failing call on this thread reported, as text. */
BLIP3O_API const char* blip3o_cuda_error(void);

/* The same two on a GPU, on `stream` of the current device; instruction_set is 0. */
BLIP3O_API int blip3o_cuda_rms_norm(void* y, const void* x, const void* weight, int64_t rows, int64_t width,
                                    int64_t stride, float eps, float offset, int mode, void* stream);
BLIP3O_API int blip3o_cuda_rms_norm_backward(void* dx, void* dweight, float* partial, const void* dy, const void* x,
                                             const void* weight, int64_t rows, int64_t width, int64_t stride,
                                             int64_t blocks, float eps, float offset, int mode, void* stream);

#ifdef __cplusplus
}
#endif
#endif
