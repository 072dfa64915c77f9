// Blockwise 4-bit Adam step on the CPU: two codes per byte, 128 values share one absmax; see
// sltrain_ds/ops/adam4bit.py. Processes 256 values at a time, like the 8-bit step and the keying of the rounding noise.

#include "adam_block.h"

#include <ATen/Parallel.h>

namespace sltrain {
namespace {

constexpr int kHalf = kStateBlock / 2;  // values that share an absmax
constexpr int kBytes = kHalf / 2;       // of their codes
constexpr int kCodes = 16, kBounds = kCodes - 1;

struct Map {
  float values[kCodes], bounds[kBounds];  // ascending; a bound is the mean of its neighbours
};

// Unpacks half a block: bytes to values.
ANY_LEVEL void dequantize(const Map& map, const uint8_t* __restrict bytes, float absmax, float* __restrict out) {
  float scaled[kCodes];
  for (int k = 0; k < kCodes; ++k) scaled[k] = map.values[k] * absmax;
  for (int i = 0; i < kBytes; ++i) {
    out[2 * i] = scaled[bytes[i] & 15u];
    out[2 * i + 1] = scaled[bytes[i] >> 4];
  }
}

// Packs half a block. A code is the number of bounds below value / absmax: the nearest code, the lower one at ties.
ANY_LEVEL void quantize(const Map& map, const float* __restrict x, float inverse, uint8_t* __restrict bytes) {
  int32_t codes[kHalf];
  for (int i = 0; i < kHalf; ++i) codes[i] = 0;
  for (int k = 0; k < kBounds; ++k) {
    const float bound = map.bounds[k];
    for (int i = 0; i < kHalf; ++i) codes[i] += x[i] * inverse > bound;
  }
  for (int i = 0; i < kBytes; ++i) bytes[i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
}

#ifdef SLTRAIN_X86
AVX512 void dequantize_avx512(const Map& map, const uint8_t* bytes, float absmax, float* out) {
  const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(map.values), _mm512_set1_ps(absmax));
  const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  for (int i = 0; i < kHalf; i += 32) {
    const __m512i pair = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + i / 2)));
    const __m512 even = _mm512_permutexvar_ps(pair, scaled);  // indexes with the lowest four bits
    const __m512 odd = _mm512_permutexvar_ps(_mm512_srli_epi32(pair, 4), scaled);
    _mm512_storeu_ps(out + i, _mm512_permutex2var_ps(even, first, odd));
    _mm512_storeu_ps(out + i + 16, _mm512_permutex2var_ps(even, second, odd));
  }
}

AVX512 void quantize_avx512(const Map& map, const float* x, float inverse, uint8_t* bytes) {
  const __m512 scale = _mm512_set1_ps(inverse);
  const __m512i one = _mm512_set1_epi32(1);
  __m512 bounds[kBounds];
  for (int k = 0; k < kBounds; ++k) bounds[k] = _mm512_set1_ps(map.bounds[k]);
  for (int i = 0; i < kHalf; i += 16) {
    const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(x + i), scale);
    __m512i code = _mm512_setzero_si512();
    for (int k = 0; k < kBounds; ++k) {
      code = _mm512_mask_add_epi32(code, _mm512_cmp_ps_mask(value, bounds[k], _CMP_GT_OQ), code, one);
    }
    const __m512i pair = _mm512_or_si512(code, _mm512_srli_epi64(code, 28));  // the odd code above the even one
    _mm_storel_epi64(reinterpret_cast<__m128i*>(bytes + i / 2), _mm512_cvtepi64_epi8(pair));
  }
}
#endif

ANY_LEVEL float largest(const float* __restrict x) {
  uint32_t bits = 0;  // exact in any order; NaN is the maximum
  for (int i = 0; i < kHalf; ++i) {
    const uint32_t magnitude = bits_of(x[i]) & 0x7FFFFFFFu;
    bits = magnitude > bits ? magnitude : bits;
  }
  return float_of(bits);
}

void widen_half(const Map& map, const uint8_t* bytes, float absmax, float* out) {
#ifdef SLTRAIN_X86
  if (cpu_level() >= CpuLevel::kAvx512) return dequantize_avx512(map, bytes, absmax, out);
#endif
  at_level<dequantize>(map, bytes, absmax, out);
}

void narrow_half(const Map& map, const float* x, float inverse, uint8_t* bytes) {
#ifdef SLTRAIN_X86
  if (cpu_level() >= CpuLevel::kAvx512) return quantize_avx512(map, x, inverse, bytes);
#endif
  at_level<quantize>(map, x, inverse, bytes);
}

void widen_state(const Map& map, const uint8_t* bytes, int count, const float* absmax, float* x) {
  for (int half = 0; half < count; ++half) widen_half(map, bytes + half * kBytes, absmax[half], x + half * kHalf);
}

void narrow_state(const Map& map, const float* x, int count, float* absmax, uint8_t* bytes) {
  for (int half = 0; half < count; ++half) {
    absmax[half] = at_level<largest>(x + half * kHalf);
    narrow_half(map, x + half * kHalf, inverse_of(absmax[half]), bytes + half * kBytes);
  }
}

template <typename P, typename G>
void run(const AdamStep& s, const Map& signed_map, const Map& unsigned_map, int64_t numel, int64_t offset, P* p,
         const G* g, uint8_t* m4, uint8_t* v4, float* absmax_m, float* absmax_v) {
  at::parallel_for(0, (numel + kStateBlock - 1) / kStateBlock, 64, [&](int64_t begin, int64_t end) {
    Block block;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index * kStateBlock, n = std::min<int64_t>(kStateBlock, numel - first);
      const int64_t packed = (n + 1) / 2, ahead = first + kAhead * kStateBlock;
      const int count = n > kHalf ? 2 : 1;  // absmaxes
      if (ahead + kStateBlock <= numel) {
        prefetch(p + ahead);
        prefetch(g + ahead);
        prefetch<kHalf>(m4 + ahead / 2);
        prefetch<kHalf>(v4 + ahead / 2);
      }
      read(p + first, n, block.p, block.half);
      read(g + first, n, block.g, block.half);
      float* scale_m = absmax_m + 2 * index;
      float* scale_v = absmax_v + 2 * index;
      std::copy_n(m4 + first / 2, packed, block.m8);
      std::copy_n(v4 + first / 2, packed, block.v8);
      widen_state(signed_map, block.m8, count, scale_m, block.m);
      widen_state(unsigned_map, block.v8, count, scale_v, block.v);
      std::fill(block.m + n, block.m + kStateBlock, 0.0f);
      std::fill(block.v + n, block.v + kStateBlock, 0.0f);
      float unused_m, unused_v;
      at_level<update>(s, block, unused_m, unused_v);
      narrow_state(signed_map, block.m, count, scale_m, block.m8);
      narrow_state(unsigned_map, block.v, count, scale_v, block.v8);
      if (n % 2) {  // the last half byte is unused
        block.m8[packed - 1] &= 15u;
        block.v8[packed - 1] &= 15u;
      }
      std::copy_n(block.m8, packed, m4 + first / 2);
      std::copy_n(block.v8, packed, v4 + first / 2);
      if constexpr (!std::is_same_v<P, float>) round_parameters(s, offset / kStateBlock + index, block);
      write(block, n, p + first);
    }
  });
}

void check(const at::Tensor& p, const at::Tensor& g, const at::Tensor& m4, const at::Tensor& v4,
           const at::Tensor& absmax_m, const at::Tensor& absmax_v, const at::Tensor& tables, int64_t step,
           int64_t offset) {
  const int64_t numel = p.numel(), blocks = (numel + kHalf - 1) / kHalf, bytes = (numel + 1) / 2;
  for (const auto* t : {&p, &g}) {
    TORCH_CHECK(t->scalar_type() == at::kFloat || t->scalar_type() == at::kBFloat16,
                "adam4bit: parameter and gradient must be float32 or bfloat16, got ", t->scalar_type());
  }
  TORCH_CHECK(g.numel() == numel, "adam4bit: parameter and gradient differ in size");
  for (const auto* t : {&m4, &v4}) {
    TORCH_CHECK(t->scalar_type() == at::kByte && t->numel() == bytes, "adam4bit: states must be uint8 (", bytes, ",)");
  }
  for (const auto* t : {&absmax_m, &absmax_v}) {
    TORCH_CHECK(t->scalar_type() == at::kFloat && t->numel() == blocks, "adam4bit: absmax must be float32 (", blocks,
                ",)");
  }
  TORCH_CHECK(tables.scalar_type() == at::kFloat && tables.numel() == 2 * (kCodes + kBounds),
              "adam4bit: tables must be float32 (", 2 * (kCodes + kBounds), ",)");
  for (const auto* t : {&p, &g, &m4, &v4, &absmax_m, &absmax_v, &tables}) {
    TORCH_CHECK(t->is_contiguous() && t->device() == p.device(), "adam4bit: tensors must be contiguous, on one device");
  }
  TORCH_CHECK(step >= 1, "adam4bit: steps count from 1, got ", step);
  TORCH_CHECK(offset >= 0 && offset % kStateBlock == 0, "adam4bit: offset must be a multiple of ", kStateBlock,
              ", got ", offset);
}

}  // namespace

void adam4bit(at::Tensor p, const at::Tensor& g, at::Tensor m4, at::Tensor v4, at::Tensor absmax_m, at::Tensor absmax_v,
              const at::Tensor& tables, double lr, double beta1, double beta2, double eps, double weight_decay,
              bool decoupled, int64_t step, bool stochastic, int64_t seed, int64_t key, int64_t offset,
              double grad_scale) {
  check(p, g, m4, v4, absmax_m, absmax_v, tables, step, offset);
  const AdamStep s = adam_step(lr, beta1, beta2, eps, weight_decay, decoupled, step, stochastic, seed, key, grad_scale);
  Map maps[2];
  static_assert(sizeof maps == 2 * (kCodes + kBounds) * sizeof(float), "a map is its values, then its bounds");
  std::memcpy(maps, tables.const_data_ptr<float>(), sizeof maps);
  with_types(p, g, [&](auto* parameter, const auto* gradient) {
    run(s, maps[0], maps[1], p.numel(), offset, parameter, gradient, m4.mutable_data_ptr<uint8_t>(),
        v4.mutable_data_ptr<uint8_t>(), absmax_m.mutable_data_ptr<float>(), absmax_v.mutable_data_ptr<float>());
  });
}

}  // namespace sltrain
