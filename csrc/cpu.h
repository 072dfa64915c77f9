// Instruction-set level of this processor, detected once; functions compiled for several levels of x86-64 are
// dispatched by it. SLTRAIN_CPU, for example avx2, forces a lower level, so that one machine can test all of them. One
// build works on all nodes of a cluster.
#pragma once

#include <utility>

#if defined(__x86_64__) && defined(__GNUC__)
#define SLTRAIN_X86 1
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#endif

namespace sltrain {

// Each level includes all lower ones.
enum class CpuLevel { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };

CpuLevel cpu_level();  // the level in use

// A function for at_level: inlined into one caller per level.
#define ANY_LEVEL inline __attribute__((always_inline))

#ifdef SLTRAIN_X86
template <auto kFunction, typename... Args>
AVX512 auto at_avx512(Args&&... args) {
  return kFunction(std::forward<Args>(args)...);
}

template <auto kFunction, typename... Args>
AVX2 auto at_avx2(Args&&... args) {
  return kFunction(std::forward<Args>(args)...);
}
#endif

template <auto kFunction, typename... Args>
auto at_portable(Args&&... args) {
  return kFunction(std::forward<Args>(args)...);
}

// kFunction(args...), compiled for the level in use.
template <auto kFunction, typename... Args>
auto at_level(Args&&... args) {
#ifdef SLTRAIN_X86
  if (cpu_level() >= CpuLevel::kAvx512) return at_avx512<kFunction>(std::forward<Args>(args)...);
  if (cpu_level() >= CpuLevel::kAvx2) return at_avx2<kFunction>(std::forward<Args>(args)...);
#endif
  return at_portable<kFunction>(std::forward<Args>(args)...);
}

}  // namespace sltrain
