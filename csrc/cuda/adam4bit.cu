// 4-bit moments: two codes per byte, 128 values share an absmax, so each half of a warp processes one block.
// ../adam4bit.cpp is the same on the CPU.

#include "adam.h"

namespace sltrain {
namespace {

constexpr int kHalf = kStateBlock / 2, kCodes = 16, kBounds = 15;

struct Map {
  float values[kCodes], bounds[kBounds];  // ascending; a bound is the mean of its neighbours
};

struct FourBit {
  static constexpr int kWords = 2 * (kCodes + kBounds), kPerElement = 2, kBytes = kEach / 2;
  static constexpr uint8_t kZeroM = 0, kZeroV = 0;
  using Element = uint8_t;
  struct alignas(kBytes) Packed {
    uint8_t at[kBytes];
  };

  __device__ static Packed load_wide(const uint8_t* from) { return *reinterpret_cast<const Packed*>(from); }
  __device__ static Packed load_some(const uint8_t* from, int count, uint8_t) {
    Packed codes{};
#pragma unroll
    for (int k = 0; k < kBytes; ++k) {
      if (2 * k < count) codes.at[k] = from[k];
    }
    return codes;
  }
  __device__ static void store_wide(uint8_t* to, const Packed& codes) { *reinterpret_cast<Packed*>(to) = codes; }
  __device__ static void store_some(uint8_t* to, int count, const Packed& codes) {
#pragma unroll
    for (int k = 0; k < kBytes; ++k) {
      if (2 * k < count) to[k] = codes.at[k];
    }
  }
  __device__ static bool upper(int lane) { return lane >= kWarp / 2; }
  __device__ static float absmax(const float* absmax, int64_t block, int lane, int64_t numel) {
    const int64_t half = 2 * block + upper(lane);
    return half * kHalf < numel ? absmax[half] : 0.0f;
  }
  __device__ static void keep_absmax(float* absmax, int64_t block, int lane, int64_t numel, float value) {
    const int64_t half = 2 * block + upper(lane);
    if (lane % (kWarp / 2) == 0 && half * kHalf < numel) absmax[half] = value;
  }
  __device__ static const Map& signed_map(const uint32_t* table) { return *reinterpret_cast<const Map*>(table); }
  __device__ static const Map& unsigned_map(const uint32_t* table) {
    return *reinterpret_cast<const Map*>(table + kCodes + kBounds);
  }
  __device__ static float widen_m(const uint32_t* table, const Packed& codes, int k, int count, float absmax) {
    return widen(signed_map(table), codes, k, count, absmax);
  }
  __device__ static float widen_v(const uint32_t* table, const Packed& codes, int k, int count, float absmax) {
    return widen(unsigned_map(table), codes, k, count, absmax);
  }
  // the second moment's map has no zero: values past the end must be excluded
  __device__ static float widen(const Map& map, const Packed& codes, int k, int count, float absmax) {
    return k < count ? map.values[codes.at[k / 2] >> 4 * (k % 2) & 15] * absmax : 0.0f;
  }
  // Maximum over the 16 lanes of this half of the warp.
  __device__ static float largest(uint32_t bits, int lane) {
    const uint32_t low = __reduce_max_sync(0xFFFFFFFFu, upper(lane) ? 0u : bits);
    const uint32_t high = __reduce_max_sync(0xFFFFFFFFu, upper(lane) ? bits : 0u);
    return float_of(upper(lane) ? high : low);
  }
  __device__ static Packed narrow_m(const uint32_t* table, const float* x, float absmax, int count) {
    return narrow(signed_map(table), x, inverse_of(absmax), count);
  }
  __device__ static Packed narrow_v(const uint32_t* table, const float* x, float absmax, int count) {
    return narrow(unsigned_map(table), x, inverse_of(absmax), count);
  }
  __device__ static Packed narrow(const Map& map, const float* x, float inverse, int count) {
    Packed codes{};
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      if (k < count) codes.at[k / 2] |= static_cast<uint8_t>(quantize(map, x[k] * inverse) << 4 * (k % 2));
    }
    return codes;
  }
  // Number of bounds below x, by bisection.
  __device__ static uint8_t quantize(const Map& map, float x) {
    int code = x > map.bounds[7] ? 8 : 0;
    code += x > map.bounds[code + 3] ? 4 : 0;
    code += x > map.bounds[code + 1] ? 2 : 0;
    code += x > map.bounds[code] ? 1 : 0;
    return static_cast<uint8_t>(code);
  }
};

}  // namespace
}  // namespace sltrain

extern "C" int sltrain_cuda_adam4bit(int p_dtype, int g_dtype, const sltrain_adam_tensor* tensors, int64_t count,
                                     const void* tables, const float* grad_scale, int device, void* stream) {
  return sltrain::step_all<sltrain::FourBit>(p_dtype, g_dtype, tensors, count, tables, grad_scale, device, stream);
}
