// Adam kernel for every state format: many tensors per launch, 256 values per warp, eight neighbouring values per lane.
// A format (adam8bit.cu, adam4bit.cu, adam32bit.cu) defines how the moments are stored, adam8bit.h the update of an
// element. All loads of a block are issued before any of the data is used, behind one branch taken by the whole warp.
#pragma once

#include "device.h"

namespace sltrain {
namespace {

constexpr int kThreads = 256;
constexpr int kWarpsAtATime = kThreads / kWarp;
constexpr int kBlocksPerMultiprocessor = 4;  // 64 registers per thread, without spills; 4 x 25.6 kB of tables
constexpr int kEach = kStateBlock / kWarp;   // values per lane

// Eight neighbouring values, loaded and stored at once if aligned.
template <typename T>
struct alignas(sizeof(T) * kEach < 16 ? sizeof(T) * kEach : 16) Eight {
  T at[kEach];
};

template <typename T>
__device__ __forceinline__ Eight<T> load_wide(const T* from) {
  return *reinterpret_cast<const Eight<T>*>(from);
}

template <typename T>
__device__ __forceinline__ Eight<T> load_some(const T* from, int count, T padding) {
  Eight<T> eight;
#pragma unroll
  for (int k = 0; k < kEach; ++k) eight.at[k] = k < count ? from[k] : padding;
  return eight;
}

template <typename T>
__device__ __forceinline__ void store_wide(T* to, const Eight<T>& eight) {
  *reinterpret_cast<Eight<T>*>(to) = eight;
}

template <typename T>
__device__ __forceinline__ void store_some(T* to, int count, const Eight<T>& eight) {
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    if (k < count) to[k] = eight.at[k];
  }
}

template <bool kStochastic>
__device__ __forceinline__ void round_parameter(const BlockNoise&, uint32_t, float x, float& to) {
  to = x;
}

template <bool kStochastic>
__device__ __forceinline__ void round_parameter(const BlockNoise& noise, uint32_t i, float x, BFloat16& to) {
  to.bits = to_bf16(x, kStochastic ? rounding_noise(noise, i) : nearest_even(x));
}

__device__ __forceinline__ uint32_t magnitude_of(float x) { return bits_of(x) & 0x7FFFFFFFu; }

// Arguments of the kernel for one tensor.
struct AdamTensor {
  void* p;
  const void* g;
  void *m, *v;
  float *absmax_m, *absmax_v;
  int64_t numel, noise_block;  // index of the first block within the parameter
  int32_t end;                 // blocks of this tensor and all before it
  int32_t wide;                // all pointers are aligned to a lane's access size
  uint32_t key0, key1;         // of the rounding noise
};

constexpr int kTensors = 31;  // per launch; its parameters are limited to 4 kB

// The scalars belong to the launch, not to a tensor: at a fixed place in the parameters they need no registers.
struct AdamLaunch {
  AdamStep step;
  AdamTensor tensors[kTensors];
  const uint32_t* tables;
  const float* grad_scale;  // or null
  int32_t blocks;
};
static_assert(sizeof(AdamLaunch) <= 4096, "kernel parameters");

// Format: kWords of tables, Element (storage type of a moment), Packed (a lane's part of one moment), kBytes (its
// access size) and the functions called here. kStochastic is a template argument: a branch for every element would cost
// as much as the noise.
template <typename Format, typename P, typename G, bool kStochastic>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    adam_kernel(const __grid_constant__ AdamLaunch launch) {
  __shared__ uint32_t table[Format::kWords > 0 ? Format::kWords : 1];
  for (int i = threadIdx.x; i < Format::kWords; i += kThreads) table[i] = launch.tables[i];
  __syncthreads();
  const AdamStep& s = launch.step;
  const float grad_scale = launch.grad_scale ? s.grad_scale * *launch.grad_scale : s.grad_scale;
  const int lane = threadIdx.x % kWarp;
  const int32_t stride = static_cast<int32_t>(gridDim.x) * kWarpsAtATime;
  int which = 0;
  for (int32_t index = static_cast<int32_t>(blockIdx.x) * kWarpsAtATime + threadIdx.x / kWarp; index < launch.blocks;
       index += stride) {
    while (index >= launch.tensors[which].end) ++which;
    const AdamTensor& tensor = launch.tensors[which];
    const int64_t numel = tensor.numel;
    const int64_t block = index - tensor.end + (numel + kStateBlock - 1) / kStateBlock;
    const int64_t first = block * kStateBlock + lane * kEach, left = numel - first;
    const int count = left >= kEach ? kEach : left > 0 ? static_cast<int>(left) : 0;
    const bool wide = tensor.wide && (block + 1) * kStateBlock <= numel;
    P* const p = static_cast<P*>(tensor.p) + first;
    const G* const g = static_cast<const G*>(tensor.g) + first;
    typename Format::Element* const m_at =
        static_cast<typename Format::Element*>(tensor.m) + first / Format::kPerElement;
    typename Format::Element* const v_at =
        static_cast<typename Format::Element*>(tensor.v) + first / Format::kPerElement;
    Eight<P> parameter;
    Eight<G> gradient;
    typename Format::Packed packed_m, packed_v;
    if (wide) {
      parameter = load_wide(p);
      gradient = load_wide(g);
      packed_m = Format::load_wide(m_at);
      packed_v = Format::load_wide(v_at);
    } else {
      parameter = load_some(p, count, P{});
      gradient = load_some(g, count, G{});
      packed_m = Format::load_some(m_at, count, Format::kZeroM);
      packed_v = Format::load_some(v_at, count, Format::kZeroV);
    }
    const float old_m = Format::absmax(tensor.absmax_m, block, lane, numel);
    const float old_v = Format::absmax(tensor.absmax_v, block, lane, numel);
    const BlockNoise noise = block_noise(tensor.key0, tensor.key1, tensor.noise_block + block);
    float m[kEach], v[kEach];
    uint32_t largest_m = 0, largest_v = 0;  // |x| as integers: NaN is the maximum
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      m[k] = Format::widen_m(table, packed_m, k, count, old_m);
      v[k] = Format::widen_v(table, packed_v, k, count, old_v);
      float x = widen(parameter.at[k]);
      adam_update(s, grad_scale, widen(gradient.at[k]), x, m[k], v[k]);
      round_parameter<kStochastic>(noise, static_cast<uint32_t>(lane * kEach + k), x, parameter.at[k]);
      largest_m = magnitude_of(m[k]) > largest_m ? magnitude_of(m[k]) : largest_m;
      largest_v = magnitude_of(v[k]) > largest_v ? magnitude_of(v[k]) : largest_v;
    }
    if (wide) {
      store_wide(p, parameter);
    } else {
      store_some(p, count, parameter);
    }
    // every lane has read the old absmax before a lane of its block writes the new one: `largest` synchronizes the warp
    const float new_m = Format::largest(largest_m, lane), new_v = Format::largest(largest_v, lane);
    packed_m = Format::narrow_m(table, m, new_m, count);
    packed_v = Format::narrow_v(table, v, new_v, count);
    if (wide) {
      Format::store_wide(m_at, packed_m);
      Format::store_wide(v_at, packed_v);
    } else {
      Format::store_some(m_at, count, packed_m);
      Format::store_some(v_at, count, packed_v);
    }
    Format::keep_absmax(tensor.absmax_m, block, lane, numel, new_m);
    Format::keep_absmax(tensor.absmax_v, block, lane, numel, new_v);
  }
}

bool aligned(const void* data, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

AdamStep step_of(const sltrain_adam_tensor& of) {
  return adam_step(of.lr, of.beta1, of.beta2, of.eps, of.weight_decay, of.decoupled != 0, of.step, of.stochastic != 0,
                   of.seed, of.key, of.grad_scale);
}

template <typename Format>
AdamTensor described(const sltrain_adam_tensor& of) {
  AdamTensor tensor;
  tensor.p = of.p;
  tensor.g = of.g;
  tensor.m = of.m;
  tensor.v = of.v;
  tensor.absmax_m = of.absmax_m;
  tensor.absmax_v = of.absmax_v;
  tensor.numel = of.numel;
  tensor.noise_block = of.offset / kStateBlock;
  tensor.wide =
      aligned(of.p, 16) && aligned(of.g, 16) && aligned(of.m, Format::kBytes) && aligned(of.v, Format::kBytes);
  const AdamStep own = step_of(of);
  tensor.key0 = own.key0;
  tensor.key1 = own.key1;
  return tensor;
}

bool same_scalars(const sltrain_adam_tensor& a, const sltrain_adam_tensor& b) {
  return a.lr == b.lr && a.beta1 == b.beta1 && a.beta2 == b.beta2 && a.eps == b.eps &&
         a.weight_decay == b.weight_decay && a.grad_scale == b.grad_scale && a.step == b.step &&
         a.decoupled == b.decoupled && a.stochastic == b.stochastic;
}

// Number of thread blocks: enough to fill the device, at most one per unit of work.
int64_t grid_size(int device, int64_t blocks) {
  int multiprocessors = 1;
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  const int64_t work = (blocks + kWarpsAtATime - 1) / kWarpsAtATime;
  const int64_t full = static_cast<int64_t>(multiprocessors) * kBlocksPerMultiprocessor;
  return work < full ? work : full;
}

// Steps any number of tensors, one launch per up to kTensors consecutive ones with equal scalars.
template <typename Format>
int step_all(int p_dtype, int g_dtype, const sltrain_adam_tensor* tensors, int64_t count, const void* tables,
             const float* grad_scale, int device, void* stream) {
  constexpr int64_t kMostBlocks = INT32_MAX / 2;  // per launch: block counts and strides are 32-bit
  OnDevice on(device);
  if (on.error() != cudaSuccess) return on.error();
  void* const p = nullptr;
  const void* const g = nullptr;
  return with_type(p, p_dtype, [&](auto* parameter) {
    return with_type(g, g_dtype, [&](const auto* gradient) {
      using P = std::remove_pointer_t<decltype(parameter)>;
      using G = std::remove_const_t<std::remove_pointer_t<decltype(gradient)>>;
      AdamLaunch launch;
      launch.tables = static_cast<const uint32_t*>(tables);
      launch.grad_scale = grad_scale;
      for (int64_t next = 0; next < count;) {
        int64_t blocks = 0;
        int filled = 0;
        const int64_t first = next;
        launch.step = step_of(tensors[first]);
        for (; next < count && filled < kTensors; ++next) {
          const int64_t own = (tensors[next].numel + kStateBlock - 1) / kStateBlock;
          if (own > kMostBlocks) return kUnsupported;
          if (!same_scalars(tensors[next], tensors[first])) break;
          if (own == 0) continue;
          if (blocks + own > kMostBlocks) break;
          AdamTensor& tensor = launch.tensors[filled++] = described<Format>(tensors[next]);
          tensor.end = static_cast<int32_t>(blocks += own);
        }
        if (filled == 0) continue;
        launch.blocks = static_cast<int32_t>(blocks);
        const int64_t grid = grid_size(device, blocks);
        if (std::is_same_v<P, BFloat16> && launch.step.stochastic) {
          SLTRAIN_LAUNCH((adam_kernel<Format, P, G, std::is_same_v<P, BFloat16>>), grid, kThreads, stream, launch);
        } else {
          SLTRAIN_LAUNCH((adam_kernel<Format, P, G, false>), grid, kThreads, stream, launch);
        }
        const cudaError_t error = cudaGetLastError();
        if (error != cudaSuccess) return static_cast<int>(error);
      }
      return 0;
    });
  });
}

}  // namespace
}  // namespace sltrain
