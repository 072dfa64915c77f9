// What the blockwise Adam kernels share: a warp takes 256 values, a lane eight neighbours of them.
#pragma once

#include "device.h"

namespace sltrain {
namespace {

constexpr int kThreads = 256;
constexpr int kWarpsAtATime = kThreads / kWarp;
constexpr int kBlocksPerMultiprocessor = 4;  // 64 registers a thread, without spills; 4 x 25.6 kB of tables
constexpr int kEach = kStateBlock / kWarp;   // values a lane

// Eight neighbours, moved at once where they are aligned.
template <typename T>
struct alignas(sizeof(T) * kEach < 16 ? sizeof(T) * kEach : 16) Eight {
  T at[kEach];
};

template <bool kAligned, typename T>
__device__ __forceinline__ Eight<T> load(const T* from, int count, T padding) {
  if (kAligned && count == kEach) return *reinterpret_cast<const Eight<T>*>(from);
  Eight<T> eight;
#pragma unroll
  for (int k = 0; k < kEach; ++k) eight.at[k] = k < count ? from[k] : padding;
  return eight;
}

template <bool kAligned, typename T>
__device__ __forceinline__ void store(T* to, int count, const Eight<T>& eight) {
  if (kAligned && count == kEach) {
    *reinterpret_cast<Eight<T>*>(to) = eight;
    return;
  }
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    if (k < count) to[k] = eight.at[k];
  }
}

__device__ __forceinline__ void round_parameter(bool, const BlockNoise&, uint32_t, float x, float& to) { to = x; }

__device__ __forceinline__ void round_parameter(bool stochastic, const BlockNoise& noise, uint32_t i, float x,
                                                BFloat16& to) {
  to.bits = to_bf16(x, stochastic ? rounding_noise(noise, i) : nearest_even(x));
}

// Thread blocks that fill the device, and no more than there is work for.
int64_t grid_size(int device, int64_t numel) {
  constexpr int64_t kPerThreadBlock = kStateBlock * kWarpsAtATime;
  int multiprocessors = 1;
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  const int64_t work = (numel + kPerThreadBlock - 1) / kPerThreadBlock;
  const int64_t full = static_cast<int64_t>(multiprocessors) * kBlocksPerMultiprocessor;
  return work < full ? work : full;
}

bool aligned(const void* data, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

}  // namespace
}  // namespace sltrain
