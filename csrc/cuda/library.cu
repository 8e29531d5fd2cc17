// What belongs to the library and to no op: its version, and the text of the last error.
#include "device.cuh"

static thread_local const char* last_error = "";

int blip3o::launched() {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return BLIP3O_OK;
  last_error = cudaGetErrorString(error);
  return BLIP3O_CUDA_ERROR;
}

extern "C" int blip3o_cuda_version(void) { return BLIP3O_VERSION; }

extern "C" const char* blip3o_cuda_error(void) { return last_error; }
