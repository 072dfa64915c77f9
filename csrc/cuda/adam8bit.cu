// Blockwise 8-bit Adam step: a warp takes a block of 256 values, a lane eight neighbours of it, so that every access
// is 8 or 16 bytes wide and full lines are moved. The tables live in shared memory; the grid is no larger than the
// device, so that they are read once a thread block. ../adam8bit.h says what happens to one element.

#include "adam.h"

namespace sltrain {
namespace {

template <bool kAligned, typename P, typename G>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    adam8bit_kernel(P* p, const G* g, uint8_t* m8, uint8_t* v8, float* absmax_m, float* absmax_v,
                    const uint32_t* __restrict__ tables, int64_t numel, int64_t offset, AdamStep s) {
  __shared__ uint32_t table[kTableWords];
  for (int i = threadIdx.x; i < kTableWords; i += kThreads) table[i] = tables[i];
  __syncthreads();
  const uint32_t *signed_map = table, *unsigned_map = table + 256, *signed_buckets = table + 512,
                 *unsigned_buckets = table + 512 + kBuckets;
  const int lane = threadIdx.x % kWarp;
  const int64_t blocks = (numel + kStateBlock - 1) / kStateBlock;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarpsAtATime;
  for (int64_t block = static_cast<int64_t>(blockIdx.x) * kWarpsAtATime + threadIdx.x / kWarp; block < blocks;
       block += stride) {
    const int64_t first = block * kStateBlock + lane * kEach, left = numel - first;
    const int count = left >= kEach ? kEach : left > 0 ? static_cast<int>(left) : 0;
    Eight<P> parameter = load<kAligned>(p + first, count, P{});
    const Eight<G> gradient = load<kAligned>(g + first, count, G{});
    Eight<uint8_t> code_m = load<kAligned>(m8 + first, count, static_cast<uint8_t>(kZeroCode));
    Eight<uint8_t> code_v = load<kAligned>(v8 + first, count, static_cast<uint8_t>(0));
    const float old_m = absmax_m[block], old_v = absmax_v[block];
    const BlockNoise noise = block_noise(s, offset / kStateBlock + block);
    float m[kEach], v[kEach];
    uint32_t largest_m = 0, largest_v = 0;  // |x| as integers: NaN is above everything
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      m[k] = float_of(signed_map[code_m.at[k]]) * old_m;
      v[k] = float_of(unsigned_map[code_v.at[k]]) * old_v;
      float x = widen(parameter.at[k]);
      adam_update(s, widen(gradient.at[k]), x, m[k], v[k]);
      round_parameter(s.stochastic, noise, static_cast<uint32_t>(lane * kEach + k), x, parameter.at[k]);
      const uint32_t bits_m = bits_of(m[k]) & 0x7FFFFFFFu, bits_v = bits_of(v[k]) & 0x7FFFFFFFu;
      largest_m = bits_m > largest_m ? bits_m : largest_m;
      largest_v = bits_v > largest_v ? bits_v : largest_v;
    }
    store<kAligned>(p + first, count, parameter);
    // every lane has read the old absmax before the first lane writes the new one
    largest_m = __reduce_max_sync(0xFFFFFFFFu, largest_m);
    largest_v = __reduce_max_sync(0xFFFFFFFFu, largest_v);
    const float new_m = float_of(largest_m), new_v = float_of(largest_v);
    const float inverse_m = inverse_of(new_m), inverse_v = inverse_of(new_v);
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      code_m.at[k] = quantize_signed(signed_buckets, m[k] * inverse_m);
      code_v.at[k] = quantize_unsigned(unsigned_buckets, v[k] * inverse_v);
    }
    store<kAligned>(m8 + first, count, code_m);
    store<kAligned>(v8 + first, count, code_v);
    if (lane == 0) {
      absmax_m[block] = new_m;
      absmax_v[block] = new_v;
    }
  }
}

}  // namespace
}  // namespace sltrain

extern "C" int sltrain_cuda_adam8bit(void* p, int p_dtype, const void* g, int g_dtype, uint8_t* m8, uint8_t* v8,
                                     float* absmax_m, float* absmax_v, const uint32_t* tables, int64_t numel, double lr,
                                     double beta1, double beta2, double eps, double weight_decay, int decoupled,
                                     int64_t step, int stochastic, int64_t seed, int64_t key, int64_t offset,
                                     double grad_scale, int device, void* stream) {
  using namespace sltrain;
  if (numel == 0) return 0;
  OnDevice on(device);
  if (on.error() != cudaSuccess) return on.error();
  const AdamStep s = adam_step(lr, beta1, beta2, eps, weight_decay, decoupled != 0, step, stochastic != 0, seed, key,
                               grad_scale);
  const bool wide = aligned(p, 16) && aligned(g, 16) && aligned(m8, 8) && aligned(v8, 8);
  return with_type(p, p_dtype, [&](auto* parameter) {
    return with_type(g, g_dtype, [&](const auto* gradient) {
      const auto launch = [&](auto kernel) {
        SLTRAIN_LAUNCH(kernel, grid_size(device, numel), kThreads, stream, parameter, gradient, m8, v8, absmax_m,
                       absmax_v, tables, numel, offset, s);
        return static_cast<int>(cudaGetLastError());
      };
      using P = std::remove_pointer_t<decltype(parameter)>;
      using G = std::remove_const_t<std::remove_pointer_t<decltype(gradient)>>;
      return wide ? launch(adam8bit_kernel<true, P, G>) : launch(adam8bit_kernel<false, P, G>);
    });
  });
}
