// The CUDA kernels as C functions: pointers, sizes, a device and a stream, so that one library serves every torch.
// sltrain_ds/ops/cuda.py calls them. Each returns 0, or a cudaError_t that sltrain_cuda_error puts into words, or
// kUnsupported. Nothing here waits for the device.
#pragma once

#include <cstdint>

namespace sltrain {

constexpr int kFloat32 = 0, kBFloat16 = 1;  // the dtypes of matrices, values, parameters and gradients
constexpr int kUnsupported = -1;

}  // namespace sltrain

extern "C" {

// The digest of the sources this library was built from, as sltrain_ds/ops/cuda_build.py computes it.
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

// One step of the blockwise 8-bit Adam: the arguments of sltrain::adam8bit_step_.
int sltrain_cuda_adam8bit(void* p, int p_dtype, const void* g, int g_dtype, uint8_t* m8, uint8_t* v8, float* absmax_m,
                          float* absmax_v, const uint32_t* tables, int64_t numel, double lr, double beta1, double beta2,
                          double eps, double weight_decay, int decoupled, int64_t step, int stochastic, int64_t seed,
                          int64_t key, int64_t offset, double grad_scale, int device, void* stream);

// The same in 4 bits: the arguments of sltrain::adam4bit_step_.
int sltrain_cuda_adam4bit(void* p, int p_dtype, const void* g, int g_dtype, uint8_t* m4, uint8_t* v4, float* absmax_m,
                          float* absmax_v, const float* tables, int64_t numel, double lr, double beta1, double beta2,
                          double eps, double weight_decay, int decoupled, int64_t step, int stochastic, int64_t seed,
                          int64_t key, int64_t offset, double grad_scale, int device, void* stream);
}
