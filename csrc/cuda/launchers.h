// The CUDA kernels as C functions of pointers, sizes, a device and a stream, so that one library works with every
// torch. sltrain_ds/ops/cuda.py calls them. Each returns 0, a cudaError_t that sltrain_cuda_error describes, or
// kUnsupported. Nothing here synchronizes with the device.
#pragma once

#include <cstdint>

namespace sltrain {

constexpr int kFloat32 = 0, kBFloat16 = 1;  // the dtypes of matrices, values, parameters and gradients
constexpr int kUnsupported = -1;

}  // namespace sltrain

extern "C" {

// Digest of the sources this library was built from, computed by sltrain_ds/ops/cuda_build.py.
const char* sltrain_cuda_sources();
const char* sltrain_cuda_error(int code);
// 0 if this library has code that runs on the device.
int sltrain_cuda_probe(int device);

// W (out, in) += values at the support: rows int32 (out + 1), columns uint16 or int32 (column_bytes 2 or 4).
int sltrain_cuda_scatter_add(void* W, int W_dtype, const int32_t* rows, const void* columns, int column_bytes,
                             const void* values, int values_dtype, int64_t out_features, int64_t in_features,
                             int device, void* stream);

// out (nnz,) = W (out, in) at the support.
int sltrain_cuda_gather(void* out, int out_dtype, const void* W, int W_dtype, const int32_t* rows, const void* columns,
                        int column_bytes, int64_t out_features, int64_t in_features, int device, void* stream);

// A tensor and the arguments of its blockwise Adam step, those of sltrain::adam8bit_step_. With 32-bit states m and v
// are float and there is no absmax. Packed by sltrain_ds/ops/cuda.py.
struct sltrain_adam_tensor {
  void* p;
  const void* g;
  void *m, *v;
  float *absmax_m, *absmax_v;
  int64_t numel, step, seed, key, offset;
  double lr, beta1, beta2, eps, weight_decay, grad_scale;
  int32_t decoupled, stochastic;
};

// Step `count` tensors of one dtype with gradients of one dtype: one launch per up to 31 consecutive ones with equal
// scalars. Gradients are multiplied by their tensor's grad_scale and, unless the pointer is null, by *grad_scale in
// device memory. 8-bit, 4-bit and 32-bit states; the last use no tables.
int sltrain_cuda_adam8bit(int p_dtype, int g_dtype, const sltrain_adam_tensor* tensors, int64_t count,
                          const void* tables, const float* grad_scale, int device, void* stream);
int sltrain_cuda_adam4bit(int p_dtype, int g_dtype, const sltrain_adam_tensor* tensors, int64_t count,
                          const void* tables, const float* grad_scale, int device, void* stream);
int sltrain_cuda_adam32bit(int p_dtype, int g_dtype, const sltrain_adam_tensor* tensors, int64_t count,
                           const void* tables, const float* grad_scale, int device, void* stream);
}
