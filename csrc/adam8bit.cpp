// Blockwise 8-bit Adam step on the CPU; cuda/adam8bit.h defines the update of one element, sltrain_ds/ops/adam8bit.py
// explains it. One thread processes a whole block of 256 values, so results do not depend on the number of threads.

#include "adam_block.h"

#include <ATen/Parallel.h>

namespace sltrain {
namespace {

struct Tables {
  const float *signed_map, *unsigned_map;
  const uint32_t *signed_buckets, *unsigned_buckets;
};

ANY_LEVEL void dequantize(const float* __restrict map, const uint8_t* __restrict codes, float absmax,
                          float* __restrict out) {
  for (int i = 0; i < kStateBlock; ++i) out[i] = map[static_cast<int>(codes[i])] * absmax;
}

ANY_LEVEL void quantize(bool is_signed, const uint32_t* __restrict buckets, const float* __restrict x, float inverse,
                        uint8_t* __restrict codes) {
  int32_t words[kStateBlock];  // gcc vectorises look-ups of full words
  if (is_signed) {
    for (int i = 0; i < kStateBlock; ++i) words[i] = quantize_signed(buckets, x[i] * inverse);
  } else {
    for (int i = 0; i < kStateBlock; ++i) words[i] = quantize_unsigned(buckets, x[i] * inverse);
  }
  for (int i = 0; i < kStateBlock; ++i) codes[i] = static_cast<uint8_t>(words[i]);
}

#ifdef SLTRAIN_X86
// The two look-ups with intrinsics: gcc does not generate gathers.
AVX512 void dequantize_avx512(const float* map, const uint8_t* codes, float absmax, float* out) {
  const __m512 scale = _mm512_set1_ps(absmax);
  for (int i = 0; i < kStateBlock; i += 16) {
    const __m512i code = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(codes + i)));
    _mm512_store_ps(out + i, _mm512_mul_ps(_mm512_i32gather_ps(code, map, 4), scale));
  }
}

AVX512 void quantize_avx512(bool is_signed, const uint32_t* buckets, const float* x, float inverse, uint8_t* codes) {
  const __m512 scale = _mm512_set1_ps(inverse);
  const __m512i smallest = _mm512_set1_epi32(kFirstBucket << kBucketShift), one = _mm512_set1_epi32(0x3F800000);
  const __m512i zero = _mm512_setzero_si512(), zero_code = _mm512_set1_epi32(kZeroCode);
  for (int i = 0; i < kStateBlock; i += 16) {
    const __m512i bits = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(x + i), scale));
    const __m512i negative = is_signed ? _mm512_srli_epi32(bits, 31) : zero;
    __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
    magnitude = _mm512_max_epi32(_mm512_min_epi32(magnitude, one), smallest);
    const __m512i bucket =
        _mm512_sub_epi32(_mm512_srli_epi32(magnitude, kBucketShift), _mm512_set1_epi32(kFirstBucket));
    const __m512i low = _mm512_add_epi32(_mm512_and_si512(magnitude, _mm512_set1_epi32(0xFFFF)), negative);
    const __m512i count =
        _mm512_srli_epi32(_mm512_add_epi32(_mm512_i32gather_epi32(bucket, buckets, 4), low), kCarryBits);
    __m512i code = count;
    if (is_signed) {
      code = _mm512_mask_sub_epi32(_mm512_add_epi32(zero_code, count), _mm512_movepi32_mask(bits), zero_code, count);
      code = _mm512_max_epi32(code, zero);
    }
    _mm_store_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_cvtepi32_epi8(code));
  }
}
#endif

void widen_state(const float* map, const uint8_t* codes, float absmax, float* out) {
#ifdef SLTRAIN_X86
  if (cpu_level() >= CpuLevel::kAvx512) return dequantize_avx512(map, codes, absmax, out);
#endif
  at_level<dequantize>(map, codes, absmax, out);
}

void narrow_state(bool is_signed, const uint32_t* buckets, const float* x, float inverse, uint8_t* codes) {
#ifdef SLTRAIN_X86
  if (cpu_level() >= CpuLevel::kAvx512) return quantize_avx512(is_signed, buckets, x, inverse, codes);
#endif
  at_level<quantize>(is_signed, buckets, x, inverse, codes);
}

void step_block(const AdamStep& s, const Tables& tables, Block& block, float& absmax_m, float& absmax_v) {
  widen_state(tables.signed_map, block.m8, absmax_m, block.m);
  widen_state(tables.unsigned_map, block.v8, absmax_v, block.v);
  at_level<update>(s, block, absmax_m, absmax_v);
  narrow_state(true, tables.signed_buckets, block.m, inverse_of(absmax_m), block.m8);
  narrow_state(false, tables.unsigned_buckets, block.v, inverse_of(absmax_v), block.v8);
}

template <typename P, typename G>
void run(const AdamStep& s, const Tables& tables, int64_t numel, int64_t offset, P* p, const G* g, uint8_t* m8,
         uint8_t* v8, float* absmax_m, float* absmax_v) {
  at::parallel_for(0, (numel + kStateBlock - 1) / kStateBlock, 64, [&](int64_t begin, int64_t end) {
    Block block;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index * kStateBlock, n = std::min<int64_t>(kStateBlock, numel - first);
      const int64_t ahead = first + kAhead * kStateBlock;
      if (ahead + kStateBlock <= numel) {
        prefetch(p + ahead);
        prefetch(g + ahead);
        prefetch(m8 + ahead);
        prefetch(v8 + ahead);
      }
      read(p + first, n, block.p, block.half);
      read(g + first, n, block.g, block.half);
      std::copy_n(m8 + first, n, block.m8);
      std::copy_n(v8 + first, n, block.v8);
      std::fill(block.m8 + n, block.m8 + kStateBlock, uint8_t{kZeroCode});
      std::fill(block.v8 + n, block.v8 + kStateBlock, uint8_t{0});
      step_block(s, tables, block, absmax_m[index], absmax_v[index]);
      if constexpr (!std::is_same_v<P, float>) {
        round_parameters(s, offset / kStateBlock + index, block);
      }
      write(block, n, p + first);
      std::copy_n(block.m8, n, m8 + first);
      std::copy_n(block.v8, n, v8 + first);
    }
  });
}

void check(const at::Tensor& p, const at::Tensor& g, const at::Tensor& m8, const at::Tensor& v8,
           const at::Tensor& absmax_m, const at::Tensor& absmax_v, const at::Tensor& tables, int64_t step,
           int64_t offset) {
  const int64_t numel = p.numel(), blocks = (numel + kStateBlock - 1) / kStateBlock;
  for (const auto* t : {&p, &g}) {
    TORCH_CHECK(t->scalar_type() == at::kFloat || t->scalar_type() == at::kBFloat16,
                "adam8bit: parameter and gradient must be float32 or bfloat16, got ", t->scalar_type());
  }
  for (const auto* t : {&m8, &v8}) TORCH_CHECK(t->scalar_type() == at::kByte, "adam8bit: states must be uint8");
  for (const auto* t : {&absmax_m, &absmax_v}) {
    TORCH_CHECK(t->scalar_type() == at::kFloat && t->numel() == blocks, "adam8bit: absmax must be float32 (", blocks,
                ",)");
  }
  TORCH_CHECK(g.numel() == numel && m8.numel() == numel && v8.numel() == numel,
              "adam8bit: parameter, gradient and states differ in size");
  TORCH_CHECK(tables.scalar_type() == at::kInt && tables.numel() == kTableWords, "adam8bit: tables must be int32 (",
              kTableWords, ",)");
  for (const auto* t : {&p, &g, &m8, &v8, &absmax_m, &absmax_v, &tables}) {
    TORCH_CHECK(t->is_contiguous() && t->device() == p.device(), "adam8bit: tensors must be contiguous, on one device");
  }
  TORCH_CHECK(step >= 1, "adam8bit: steps count from 1, got ", step);
  TORCH_CHECK(offset >= 0 && offset % kStateBlock == 0, "adam8bit: offset must be a multiple of ", kStateBlock,
              ", where a block begins, got ", offset);
}

}  // namespace

void adam8bit(at::Tensor p, const at::Tensor& g, at::Tensor m8, at::Tensor v8, at::Tensor absmax_m, at::Tensor absmax_v,
              const at::Tensor& tables, double lr, double beta1, double beta2, double eps, double weight_decay,
              bool decoupled, int64_t step, bool stochastic, int64_t seed, int64_t key, int64_t offset,
              double grad_scale) {
  check(p, g, m8, v8, absmax_m, absmax_v, tables, step, offset);
  const AdamStep s = adam_step(lr, beta1, beta2, eps, weight_decay, decoupled, step, stochastic, seed, key, grad_scale);
  const auto* words = reinterpret_cast<const uint32_t*>(tables.const_data_ptr<int32_t>());
  const auto* maps = reinterpret_cast<const float*>(words);
  const Tables parts{maps, maps + 256, words + 512, words + 512 + kBuckets};
  with_types(p, g, [&](auto* parameter, const auto* gradient) {
    run(s, parts, p.numel(), offset, parameter, gradient, m8.mutable_data_ptr<uint8_t>(),
        v8.mutable_data_ptr<uint8_t>(), absmax_m.mutable_data_ptr<float>(), absmax_v.mutable_data_ptr<float>());
  });
}

}  // namespace sltrain
