// 32-bit moments, used for norms and biases: no tables and no absmax.

#include "adam.h"

namespace sltrain {
namespace {

struct ThirtyTwoBit {
  static constexpr int kWords = 0, kPerElement = 1, kBytes = 16;
  static constexpr float kZeroM = 0.0f, kZeroV = 0.0f;
  using Element = float;
  using Packed = Eight<float>;

  __device__ static Packed load_wide(const float* from) { return sltrain::load_wide(from); }
  __device__ static Packed load_some(const float* from, int count, float zero) {
    return sltrain::load_some(from, count, zero);
  }
  __device__ static void store_wide(float* to, const Packed& moments) { sltrain::store_wide(to, moments); }
  __device__ static void store_some(float* to, int count, const Packed& moments) {
    sltrain::store_some(to, count, moments);
  }
  __device__ static float absmax(const float*, int64_t, int, int64_t) { return 0.0f; }
  __device__ static void keep_absmax(float*, int64_t, int, int64_t, float) {}
  __device__ static float widen_m(const uint32_t*, const Packed& moments, int k, int, float) { return moments.at[k]; }
  __device__ static float widen_v(const uint32_t*, const Packed& moments, int k, int, float) { return moments.at[k]; }
  __device__ static float largest(uint32_t, int) { return 0.0f; }
  __device__ static Packed narrow_m(const uint32_t*, const float* x, float, int) { return kept(x); }
  __device__ static Packed narrow_v(const uint32_t*, const float* x, float, int) { return kept(x); }
  __device__ static Packed kept(const float* x) {
    Packed moments;
#pragma unroll
    for (int k = 0; k < kEach; ++k) moments.at[k] = x[k];
    return moments;
  }
};

}  // namespace
}  // namespace sltrain

extern "C" int sltrain_cuda_adam32bit(int p_dtype, int g_dtype, const sltrain_adam_tensor* tensors, int64_t count,
                                      const void* tables, const float* grad_scale, int device, void* stream) {
  return sltrain::step_all<sltrain::ThirtyTwoBit>(p_dtype, g_dtype, tensors, count, tables, grad_scale, device, stream);
}
