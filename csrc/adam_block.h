// Shared by the blockwise Adam steps on the CPU: loads and stores of a block of 256 values in fp32.
// Include it first: its first lines set how all following code is compiled.
#pragma once

// sums and products are rounded separately at every level; square roots vectorise due to the build's -fno-math-errno
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off")
#elif defined(__clang__)
#pragma clang fp contract(off)
#endif

#include "cpu.h"
#include "cuda/adam8bit.h"

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#ifdef SLTRAIN_X86
#include <immintrin.h>
#endif

namespace sltrain {
namespace {

constexpr int kAhead = 2;  // blocks between the prefetched one and the current one

// One block in fp32; an incomplete block is padded with zeros.
struct Block {
  alignas(64) float p[kStateBlock], g[kStateBlock], m[kStateBlock], v[kStateBlock];
  alignas(64) uint8_t m8[kStateBlock], v8[kStateBlock];  // codes
  alignas(64) uint16_t half[kStateBlock];                // p or g in bf16
};

ANY_LEVEL void widen(const uint16_t* __restrict from, float* __restrict to) {
  for (int i = 0; i < kStateBlock; ++i) to[i] = from_bf16(from[i]);
}

ANY_LEVEL void round_to_nearest(const float* __restrict from, uint16_t* __restrict to) {
  for (int i = 0; i < kStateBlock; ++i) to[i] = to_bf16(from[i], nearest_even(from[i]));
}

ANY_LEVEL void round_stochastically(const BlockNoise& block, const float* __restrict from, uint16_t* __restrict to) {
  const BlockNoise noise = block;
  for (uint32_t i = 0; i < kStateBlock; ++i) to[i] = to_bf16(from[i], rounding_noise(noise, i));
}

inline void read(const float* from, int64_t n, float* to, uint16_t*) {
  std::copy_n(from, n, to);
  std::fill(to + n, to + kStateBlock, 0.0f);
}

inline void read(const c10::BFloat16* from, int64_t n, float* to, uint16_t* half) {
  std::memcpy(half, from, n * sizeof *half);
  std::fill(half + n, half + kStateBlock, uint16_t{0});
  at_level<widen>(half, to);
}

inline void write(const Block& block, int64_t n, float* to) { std::copy_n(block.p, n, to); }
inline void write(const Block& block, int64_t n, c10::BFloat16* to) { std::memcpy(to, block.half, n * sizeof *to); }

// Prefetches one block: some CPUs' hardware prefetchers do not follow four arrays at once.
template <int kCount = kStateBlock, typename T>
void prefetch(const T* from) {
#ifdef __GNUC__
  for (int i = 0; i < kCount; i += 64 / sizeof(T)) __builtin_prefetch(from + i);
#endif
}

// p, m and v after the step, and the largest |m| and |v| as integers: their maximum is exact in any order, and NaN is
// the maximum
ANY_LEVEL void update(const AdamStep& s, Block& block, float& absmax_m, float& absmax_v) {
  const AdamStep step = s;
  const float* __restrict g = block.g;
  float* __restrict p = block.p;
  float* __restrict m = block.m;
  float* __restrict v = block.v;
  uint32_t largest_m = 0, largest_v = 0;
  for (int i = 0; i < kStateBlock; ++i) {
    float p_i = p[i], m_i = m[i], v_i = v[i];
    adam_update(step, step.grad_scale, g[i], p_i, m_i, v_i);
    p[i] = p_i;
    m[i] = m_i;
    v[i] = v_i;
    const uint32_t bits_m = bits_of(m_i) & 0x7FFFFFFFu, bits_v = bits_of(v_i) & 0x7FFFFFFFu;
    largest_m = bits_m > largest_m ? bits_m : largest_m;
    largest_v = bits_v > largest_v ? bits_v : largest_v;
  }
  absmax_m = float_of(largest_m);
  absmax_v = float_of(largest_v);
}

// Writes the block's parameters as bf16 bits to block.half.
inline void round_parameters(const AdamStep& s, int64_t noise_block, Block& block) {
  if (s.stochastic) {
    at_level<round_stochastically>(block_noise(s, noise_block), block.p, block.half);
  } else {
    at_level<round_to_nearest>(block.p, block.half);
  }
}

// Calls with(p, g) with pointers to the tensors' types, float or bfloat16 each.
template <typename With>
void with_types(const at::Tensor& p, const at::Tensor& g, const With& with) {
  const auto with_gradient = [&](auto* parameter) {
    if (g.scalar_type() == at::kFloat) return with(parameter, g.const_data_ptr<float>());
    with(parameter, g.const_data_ptr<c10::BFloat16>());
  };
  if (p.scalar_type() == at::kFloat) return with_gradient(p.mutable_data_ptr<float>());
  with_gradient(p.mutable_data_ptr<c10::BFloat16>());
}

}  // namespace
}  // namespace sltrain
