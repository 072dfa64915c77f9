// One element of the blockwise 8-bit Adam step, shared by the CPU and the CUDA kernel so that both give the same bits.
// Every product and sum is rounded separately: adam_block.h disables contraction to FMA, nvcc gets -fmad=false. Uses no
// torch or CUDA headers. sltrain_ds/ops/adam8bit.py documents the computation and builds the tables. The file is in
// this folder because the CUDA library's digest covers all of it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SLTRAIN_BOTH __host__ __device__ __forceinline__
#else
#define SLTRAIN_BOTH inline
#endif

namespace sltrain {

constexpr int kStateBlock = 256;        // values that share one absmax
constexpr int kZeroCode = 127;          // code of 0 in the signed map
constexpr int kBucketShift = 16;        // a bucket: floats with equal exponent and first 7 mantissa bits
constexpr int kFirstBucket = 104 << 7;  // 2^-23, below every bound between two codes
constexpr int kBuckets = 23 * 128 + 1;  // up to 1.0
constexpr int kCarryBits = 17;  // a bucket's entry: the bounds below it, above these bits; they carry past its own
constexpr int kTableWords = 2 * 256 + 2 * kBuckets;  // signed map, unsigned map, buckets of each

// The scalars of a step, each rounded to fp32 once.
struct AdamStep {
  float grad_scale, l2, decay;  // g * grad_scale + l2 * p; p * decay
  float beta1, rest1, beta2, rest2;
  float root_scale, eps, step_size;  // p - step_size * m / (sqrt(v) * root_scale + eps)
  uint32_t key0, key1;               // of the rounding noise
  bool stochastic;
};

SLTRAIN_BOTH uint64_t mix_key(uint64_t state, uint64_t word) {
  uint64_t z = (state ^ word) + 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

inline AdamStep adam_step(double lr, double beta1, double beta2, double eps, double weight_decay, bool decoupled,
                          int64_t step, bool stochastic, int64_t seed, int64_t key, double grad_scale) {
  AdamStep s;
  s.grad_scale = static_cast<float>(grad_scale);
  s.l2 = decoupled ? 0.0f : static_cast<float>(weight_decay);
  s.decay = decoupled ? static_cast<float>(1.0 - lr * weight_decay) : 1.0f;
  s.beta1 = static_cast<float>(beta1);
  s.rest1 = static_cast<float>(1.0 - beta1);
  s.beta2 = static_cast<float>(beta2);
  s.rest2 = static_cast<float>(1.0 - beta2);
  s.root_scale = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, static_cast<double>(step))));
  s.eps = static_cast<float>(eps);
  s.step_size = static_cast<float>(lr / (1.0 - std::pow(beta1, static_cast<double>(step))));
  const uint64_t noise = mix_key(mix_key(mix_key(0, static_cast<uint64_t>(seed)), static_cast<uint64_t>(step)),
                                 static_cast<uint64_t>(key));
  s.key0 = static_cast<uint32_t>(noise);
  s.key1 = static_cast<uint32_t>(noise >> 32);
  s.stochastic = stochastic;
  return s;
}

SLTRAIN_BOTH uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

SLTRAIN_BOTH float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Updates p, m and v of one element in place, in fp32. `grad_scale` replaces the step's own.
SLTRAIN_BOTH void adam_update(const AdamStep& s, float grad_scale, float g, float& p, float& m, float& v) {
  g = g * grad_scale + s.l2 * p;
  m = m * s.beta1 + s.rest1 * g;
  v = v * s.beta2 + s.rest2 * (g * g);
  p = p * s.decay - s.step_size * (m / (sqrtf(v) * s.root_scale + s.eps));
}

// Factor that scales a block to [-1, 1].
SLTRAIN_BOTH float inverse_of(float absmax) { return 1.0f / (absmax < 1e-38f ? 1e-38f : absmax); }

// Number of bounds between positive codes below |x| (at or below it if `negative`: ties go to the lower code).
SLTRAIN_BOTH uint32_t bounds_below(const uint32_t* buckets, uint32_t magnitude, uint32_t negative) {
  constexpr uint32_t kSmallest = static_cast<uint32_t>(kFirstBucket) << kBucketShift, kOne = 0x3F800000u;
  magnitude = magnitude < kOne ? magnitude : kOne;  // also for NaN: keeps the index in range
  magnitude = magnitude > kSmallest ? magnitude : kSmallest;
  return (buckets[static_cast<int>(magnitude >> kBucketShift) - kFirstBucket] + (magnitude & 0xFFFFu) + negative) >>
         kCarryBits;
}

SLTRAIN_BOTH uint8_t quantize_signed(const uint32_t* buckets, float scaled) {
  const uint32_t bits = bits_of(scaled), negative = bits >> 31;
  const int count = static_cast<int>(bounds_below(buckets, bits & 0x7FFFFFFFu, negative));
  const int code = negative ? kZeroCode - count : kZeroCode + count;
  return static_cast<uint8_t>(code > 0 ? code : 0);  // the map starts at -0.993: one bound has no counterpart
}

SLTRAIN_BOTH uint8_t quantize_unsigned(const uint32_t* buckets, float scaled) {
  return static_cast<uint8_t>(bounds_below(buckets, bits_of(scaled) & 0x7FFFFFFFu, 0));
}

SLTRAIN_BOTH uint32_t mix_noise(uint32_t h) {
  h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
  h = (h ^ (h >> 13)) * 0xC2B2AE35u;
  return h ^ (h >> 16);
}

// Noise of one block of one parameter at one step.
struct BlockNoise {
  uint32_t start, flip;
};

SLTRAIN_BOTH BlockNoise block_noise(uint32_t key0, uint32_t key1, int64_t block) {
  const uint32_t start = mix_noise(static_cast<uint32_t>(block) ^ key0);
  return {start, mix_noise(start + (key1 ^ static_cast<uint32_t>(block >> 32)))};
}

SLTRAIN_BOTH BlockNoise block_noise(const AdamStep& s, int64_t block) { return block_noise(s.key0, s.key1, block); }

// 16 random bits for element i of the block: half of the word drawn for its pair of neighbours.
SLTRAIN_BOTH uint32_t rounding_noise(const BlockNoise& noise, uint32_t i) {
  const uint32_t pair = mix_noise(noise.start + (i >> 1) * 0x9E3779B9u) ^ noise.flip;
  return i & 1u ? pair >> 16 : pair & 0xFFFFu;
}

SLTRAIN_BOTH uint32_t nearest_even(float x) { return 0x7FFFu + ((bits_of(x) >> 16) & 1u); }

// bf16 bits of x after adding `up` below the kept bits: noise in [0, 2^16), or nearest_even(x)
SLTRAIN_BOTH uint16_t to_bf16(float x, uint32_t up) {
  const uint32_t bits = bits_of(x);
  return (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : static_cast<uint16_t>((bits + up) >> 16);
}

SLTRAIN_BOTH float from_bf16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

}  // namespace sltrain
