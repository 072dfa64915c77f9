// Blockwise 4-bit Adam step: a warp takes 256 values, each half of it a block of 128, a lane eight neighbours, which are
// four bytes of codes. ../adam8bit.h says what happens to one element, ../adam4bit.cpp is the same on the CPU.

#include "adam.h"

namespace sltrain {
namespace {

constexpr int kHalf = kStateBlock / 2, kCodes = 16, kBounds = 15, kBytes = kEach / 2;

struct Map {
  float values[kCodes], bounds[kBounds];  // ascending; a bound is the mean of its neighbours
};

struct alignas(kBytes) Codes {
  uint8_t at[kBytes];
};

template <bool kAligned>
__device__ __forceinline__ Codes load_codes(const uint8_t* from, int count) {
  if (kAligned && count == kEach) return *reinterpret_cast<const Codes*>(from);
  Codes codes{};
#pragma unroll
  for (int k = 0; k < kBytes; ++k) {
    if (2 * k < count) codes.at[k] = from[k];
  }
  return codes;
}

template <bool kAligned>
__device__ __forceinline__ void store_codes(uint8_t* to, int count, const Codes& codes) {
  if (kAligned && count == kEach) {
    *reinterpret_cast<Codes*>(to) = codes;
    return;
  }
#pragma unroll
  for (int k = 0; k < kBytes; ++k) {
    if (2 * k < count) to[k] = codes.at[k];
  }
}

__device__ __forceinline__ int code_of(const Codes& codes, int k) { return codes.at[k / 2] >> 4 * (k % 2) & 15; }

// How many bounds lie below x, by bisection.
__device__ __forceinline__ uint8_t quantize(const Map& map, float x) {
  int code = x > map.bounds[7] ? 8 : 0;
  code += x > map.bounds[code + 3] ? 4 : 0;
  code += x > map.bounds[code + 1] ? 2 : 0;
  code += x > map.bounds[code] ? 1 : 0;
  return static_cast<uint8_t>(code);
}

__device__ __forceinline__ Codes narrow_states(const Map& map, const float* x, float inverse, int count) {
  Codes codes{};
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    if (k < count) codes.at[k / 2] |= static_cast<uint8_t>(quantize(map, x[k] * inverse) << 4 * (k % 2));
  }
  return codes;
}

// The largest of the 16 lanes of one's own half of the warp.
__device__ __forceinline__ float largest_of_half(uint32_t bits, bool upper) {
  const uint32_t low = __reduce_max_sync(0xFFFFFFFFu, upper ? 0u : bits);
  const uint32_t high = __reduce_max_sync(0xFFFFFFFFu, upper ? bits : 0u);
  return float_of(upper ? high : low);
}

template <bool kAligned, typename P, typename G>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    adam4bit_kernel(P* p, const G* g, uint8_t* m4, uint8_t* v4, float* absmax_m, float* absmax_v,
                    const float* __restrict__ tables, int64_t numel, int64_t offset, AdamStep s) {
  __shared__ float table[2 * (kCodes + kBounds)];
  if (threadIdx.x < 2 * (kCodes + kBounds)) table[threadIdx.x] = tables[threadIdx.x];
  __syncthreads();
  const Map& signed_map = *reinterpret_cast<const Map*>(table);
  const Map& unsigned_map = *reinterpret_cast<const Map*>(table + kCodes + kBounds);
  const int lane = threadIdx.x % kWarp;
  const bool upper = lane >= kWarp / 2;
  const int64_t blocks = (numel + kStateBlock - 1) / kStateBlock;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarpsAtATime;
  for (int64_t block = static_cast<int64_t>(blockIdx.x) * kWarpsAtATime + threadIdx.x / kWarp; block < blocks;
       block += stride) {
    const int64_t first = block * kStateBlock + lane * kEach, left = numel - first;
    const int count = left >= kEach ? kEach : left > 0 ? static_cast<int>(left) : 0;
    const int64_t half = 2 * block + upper;
    const bool exists = half * kHalf < numel;
    Eight<P> parameter = load<kAligned>(p + first, count, P{});
    const Eight<G> gradient = load<kAligned>(g + first, count, G{});
    const Codes code_m = load_codes<kAligned>(m4 + first / 2, count);
    const Codes code_v = load_codes<kAligned>(v4 + first / 2, count);
    const float old_m = exists ? absmax_m[half] : 0.0f, old_v = exists ? absmax_v[half] : 0.0f;
    const BlockNoise noise = block_noise(s, offset / kStateBlock + block);
    float m[kEach], v[kEach];
    uint32_t largest_m = 0, largest_v = 0;  // |x| as integers: NaN is above everything
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const bool inside = k < count;
      m[k] = inside ? signed_map.values[code_of(code_m, k)] * old_m : 0.0f;
      v[k] = inside ? unsigned_map.values[code_of(code_v, k)] * old_v : 0.0f;
      float x = widen(parameter.at[k]);
      adam_update(s, widen(gradient.at[k]), x, m[k], v[k]);
      round_parameter(s.stochastic, noise, static_cast<uint32_t>(lane * kEach + k), x, parameter.at[k]);
      const uint32_t bits_m = bits_of(m[k]) & 0x7FFFFFFFu, bits_v = bits_of(v[k]) & 0x7FFFFFFFu;
      largest_m = bits_m > largest_m ? bits_m : largest_m;
      largest_v = bits_v > largest_v ? bits_v : largest_v;
    }
    store<kAligned>(p + first, count, parameter);
    // every lane has read the old absmax before the first of its half writes the new one
    const float new_m = largest_of_half(largest_m, upper), new_v = largest_of_half(largest_v, upper);
    store_codes<kAligned>(m4 + first / 2, count, narrow_states(signed_map, m, inverse_of(new_m), count));
    store_codes<kAligned>(v4 + first / 2, count, narrow_states(unsigned_map, v, inverse_of(new_v), count));
    if (exists && lane % (kWarp / 2) == 0) {
      absmax_m[half] = new_m;
      absmax_v[half] = new_v;
    }
  }
}

}  // namespace
}  // namespace sltrain

extern "C" int sltrain_cuda_adam4bit(void* p, int p_dtype, const void* g, int g_dtype, uint8_t* m4, uint8_t* v4,
                                     float* absmax_m, float* absmax_v, const float* tables, int64_t numel, double lr,
                                     double beta1, double beta2, double eps, double weight_decay, int decoupled,
                                     int64_t step, int stochastic, int64_t seed, int64_t key, int64_t offset,
                                     double grad_scale, int device, void* stream) {
  using namespace sltrain;
  if (numel == 0) return 0;
  OnDevice on(device);
  if (on.error() != cudaSuccess) return on.error();
  const AdamStep s = adam_step(lr, beta1, beta2, eps, weight_decay, decoupled != 0, step, stochastic != 0, seed, key,
                               grad_scale);
  const bool wide = aligned(p, 16) && aligned(g, 16) && aligned(m4, kBytes) && aligned(v4, kBytes);
  return with_type(p, p_dtype, [&](auto* parameter) {
    return with_type(g, g_dtype, [&](const auto* gradient) {
      const auto launch = [&](auto kernel) {
        SLTRAIN_LAUNCH(kernel, grid_size(device, numel), kThreads, stream, parameter, gradient, m4, v4, absmax_m,
                       absmax_v, tables, numel, offset, s);
        return static_cast<int>(cudaGetLastError());
      };
      using P = std::remove_pointer_t<decltype(parameter)>;
      using G = std::remove_const_t<std::remove_pointer_t<decltype(gradient)>>;
      return wide ? launch(adam4bit_kernel<true, P, G>) : launch(adam4bit_kernel<false, P, G>);
    });
  });
}
