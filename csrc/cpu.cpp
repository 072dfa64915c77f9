// Detects the CPU level and reads SLTRAIN_CPU; sltrain_ds/ops/cpu_level.py checks the variable before anything runs.

#include "cpu.h"

#include <c10/util/Exception.h>
#include <torch/library.h>

#include <cstdlib>
#include <string>
#include <tuple>

#ifdef SLTRAIN_X86
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sltrain {
namespace {

const char* const kNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};  // by CpuLevel

// Whether the kernel lets this process use the tile registers; it grants them only on request.
bool tiles_granted() {
#if defined(SLTRAIN_X86) && defined(__linux__)
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

CpuLevel find_best() {
#ifdef SLTRAIN_X86
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return CpuLevel::kPortable;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return CpuLevel::kAvx2;
  }
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return CpuLevel::kAvx512;
  const bool tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1) && (d >> 22 & 1);  // amx-tile, amx-bf16
  return tiles && tiles_granted() ? CpuLevel::kAmx : CpuLevel::kAvx512Bf16;
#else
  return CpuLevel::kPortable;
#endif
}

CpuLevel best() {
  static const CpuLevel level = find_best();
  return level;
}

CpuLevel choose() {
  const char* variable = std::getenv("SLTRAIN_CPU");
  if (variable == nullptr || *variable == '\0') return best();
  for (int level = 0; level <= static_cast<int>(best()); ++level) {
    if (std::string(variable) == kNames[level]) return static_cast<CpuLevel>(level);
  }
  TORCH_CHECK(false, "SLTRAIN_CPU = '", variable, "' is no level of this processor");
}

const char* name(CpuLevel level) { return kNames[static_cast<int>(level)]; }

}  // namespace

CpuLevel cpu_level() {
  static const CpuLevel level = choose();
  return level;
}

}  // namespace sltrain

TORCH_LIBRARY_FRAGMENT(sltrain, m) {
  m.def("cpu_level() -> str", [] { return std::string(sltrain::name(sltrain::cpu_level())); });
  m.def("best_cpu_level() -> str", [] { return std::string(sltrain::name(sltrain::best())); });
}
