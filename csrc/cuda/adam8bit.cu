// 8-bit moments: a byte indexes a map, 256 values share an absmax. The maps and the bucket tables for one-look-up
// quantization are in shared memory; the grid is no larger than the device, so each thread block loads them once.

#include "adam.h"

namespace sltrain {
namespace {

struct EightBit {
  static constexpr int kWords = kTableWords, kPerElement = 1, kBytes = 8;
  static constexpr uint8_t kZeroM = kZeroCode, kZeroV = 0;
  using Element = uint8_t;
  using Packed = Eight<uint8_t>;

  __device__ static Packed load_wide(const uint8_t* from) { return sltrain::load_wide(from); }
  __device__ static Packed load_some(const uint8_t* from, int count, uint8_t zero) {
    return sltrain::load_some(from, count, zero);
  }
  __device__ static void store_wide(uint8_t* to, const Packed& codes) { sltrain::store_wide(to, codes); }
  __device__ static void store_some(uint8_t* to, int count, const Packed& codes) {
    sltrain::store_some(to, count, codes);
  }
  __device__ static float absmax(const float* absmax, int64_t block, int, int64_t) { return absmax[block]; }
  __device__ static void keep_absmax(float* absmax, int64_t block, int lane, int64_t, float value) {
    if (lane == 0) absmax[block] = value;
  }
  __device__ static float widen_m(const uint32_t* table, const Packed& codes, int k, int, float absmax) {
    return float_of(table[codes.at[k]]) * absmax;
  }
  __device__ static float widen_v(const uint32_t* table, const Packed& codes, int k, int, float absmax) {
    return float_of(table[256 + codes.at[k]]) * absmax;
  }
  __device__ static float largest(uint32_t bits, int) { return float_of(__reduce_max_sync(0xFFFFFFFFu, bits)); }
  __device__ static Packed narrow_m(const uint32_t* table, const float* x, float absmax, int) {
    const float inverse = inverse_of(absmax);
    Packed codes;
#pragma unroll
    for (int k = 0; k < kEach; ++k) codes.at[k] = quantize_signed(table + 512, x[k] * inverse);
    return codes;
  }
  __device__ static Packed narrow_v(const uint32_t* table, const float* x, float absmax, int) {
    const float inverse = inverse_of(absmax);
    Packed codes;
#pragma unroll
    for (int k = 0; k < kEach; ++k) codes.at[k] = quantize_unsigned(table + 512 + kBuckets, x[k] * inverse);
    return codes;
  }
};

}  // namespace
}  // namespace sltrain

extern "C" int sltrain_cuda_adam8bit(int p_dtype, int g_dtype, const sltrain_adam_tensor* tensors, int64_t count,
                                     const void* tables, const float* grad_scale, int device, void* stream) {
  return sltrain::step_all<sltrain::EightBit>(p_dtype, g_dtype, tensors, count, tables, grad_scale, device, stream);
}
