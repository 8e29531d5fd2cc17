// What TMA is told of a tensor: by the driver, which is looked up when it is first wanted, so that the library loads without one.
#include "hopper.cuh"

namespace blip3o::hopper {

bool describe(TensorMap* map, int dtype, const void* data, const int64_t (&sizes)[4], const int64_t (&strides)[3], int rows) {
  // As TMA counts them, from the last dimension to the first; strides in bytes.
  int64_t counts[4], bytes[3];
  for (int i = 0; i < 4; ++i) counts[i] = sizes[3 - i];
  for (int i = 0; i < 3; ++i) {
    bytes[i] = counts[i + 1] == 1 ? 16 : strides[2 - i] * 2;  // of a dimension of one, it is any number
    if (counts[i + 1] < 1 || counts[i + 1] > 0xffffffff || bytes[i] <= 0 || bytes[i] % 16 || bytes[i] >> 40) return false;
  }
  if (counts[0] < 1 || counts[0] % 8 || !aligned(data) || rows < 1 || rows > 256) return false;
#ifdef __CUDACC__
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    const bool there = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return there ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found) : nullptr;
  }();
  cuuint64_t dims[4], steps[3];
  for (int i = 0; i < 4; ++i) dims[i] = static_cast<cuuint64_t>(counts[i]);
  for (int i = 0; i < 3; ++i) steps[i] = static_cast<cuuint64_t>(bytes[i]);
  const cuuint32_t box[4] = {PANEL, static_cast<cuuint32_t>(rows), 1, 1}, every[4] = {1, 1, 1, 1};
  return encode && encode(map, dtype == BLIP3O_FLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
                          const_cast<void*>(data), dims, steps, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                          CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
#else
  (void)dtype;
  map->data = static_cast<const char*>(data);
  for (int i = 0; i < 4; ++i) map->sizes[i] = counts[i];
  for (int i = 0; i < 3; ++i) map->strides[i] = bytes[i];
  map->rows = rows;
  return true;
#endif
}

}  // namespace blip3o::hopper
