// Digest, probe and error messages of the library.

#include "device.h"

#ifndef SLTRAIN_SOURCES
#define SLTRAIN_SOURCES "unknown"
#endif

namespace sltrain {
namespace {
__global__ void probe_kernel() {}
}  // namespace
}  // namespace sltrain

extern "C" const char* sltrain_cuda_sources() { return SLTRAIN_SOURCES; }

extern "C" const char* sltrain_cuda_error(int code) {
  return code == sltrain::kUnsupported ? "a dtype the kernels do not have"
                                       : cudaGetErrorString(static_cast<cudaError_t>(code));
}

extern "C" int sltrain_cuda_probe(int device) {
  sltrain::OnDevice on(device);
  if (on.error() != cudaSuccess) return on.error();
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, sltrain::probe_kernel);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}
