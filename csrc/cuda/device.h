// Shared by all kernels: launching, the two number formats, the dispatch of template arguments.
// With SLTRAIN_HOST_SHIM the same files compile for the host, with one thread per CUDA thread (tests/ops/cuda_host).
#pragma once

#ifdef SLTRAIN_HOST_SHIM
#include "host_shim.h"
#else
#include <cuda_runtime.h>
#define SLTRAIN_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<static_cast<unsigned>(grid), block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

#include <type_traits>

#include "adam8bit.h"
#include "launchers.h"

namespace sltrain {

constexpr int kWarp = 32;

struct BFloat16 {
  uint16_t bits;
};

SLTRAIN_BOTH float widen(float x) { return x; }
SLTRAIN_BOTH float widen(BFloat16 x) { return from_bf16(x.bits); }
SLTRAIN_BOTH void narrow(float x, float& to) { to = x; }
SLTRAIN_BOTH void narrow(float x, BFloat16& to) { to.bits = to_bf16(x, nearest_even(x)); }

// Calls body(T*) with T float or BFloat16
template <typename Body>
int with_type(void* data, int dtype, const Body& body) {
  if (dtype == kFloat32) return body(static_cast<float*>(data));
  if (dtype == kBFloat16) return body(static_cast<BFloat16*>(data));
  return kUnsupported;
}

template <typename Body>
int with_type(const void* data, int dtype, const Body& body) {
  return with_type(const_cast<void*>(data), dtype, [&](auto* typed) {
    const auto* constant = typed;
    return body(constant);
  });
}

template <typename Body>
int with_columns(const void* columns, int bytes, const Body& body) {
  if (bytes == 2) return body(static_cast<const uint16_t*>(columns));
  if (bytes == 4) return body(static_cast<const int32_t*>(columns));
  return kUnsupported;
}

// Makes the device current during its lifetime.
class OnDevice {
 public:
  explicit OnDevice(int device) : error_(cudaGetDevice(&before_)) {
    if (error_ == cudaSuccess && before_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

}  // namespace sltrain
