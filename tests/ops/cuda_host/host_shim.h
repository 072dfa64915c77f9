// Enough of CUDA to run csrc/cuda/*.cu on the host: a std::thread a CUDA thread, one thread block after another.
// Races between the threads of a block are real, so ThreadSanitizer sees them. Needs C++20.
//   SLTRAIN_DROP_SYNCTHREADS   leaves __syncthreads() out, to show that its absence is found
#pragma once

#include <atomic>
#include <barrier>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one by one

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
constexpr int cudaDevAttrMultiProcessorCount = 16;
struct cudaFuncAttributes {};

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
// a small device, so that thread blocks have more than one round to go
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) { return *value = 1, cudaSuccess; }
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}

namespace host_shim {

struct Index {
  unsigned x = 0;
};

struct Warp {
  std::barrier<> barrier{32};
  uint32_t words[32];
};

struct ThreadBlock {
  explicit ThreadBlock(unsigned threads) : barrier(threads), warps(threads / 32) {}
  std::barrier<> barrier;
  std::vector<Warp> warps;
};

inline thread_local ThreadBlock* block = nullptr;

}  // namespace host_shim

inline thread_local host_shim::Index threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() {
#ifndef SLTRAIN_DROP_SYNCTHREADS
  host_shim::block->barrier.arrive_and_wait();
#endif
}

inline uint32_t __reduce_max_sync(unsigned, uint32_t word) {
  host_shim::Warp& warp = host_shim::block->warps[threadIdx.x / 32];
  warp.words[threadIdx.x % 32] = word;
  warp.barrier.arrive_and_wait();
  for (uint32_t other : warp.words) word = other > word ? other : word;
  warp.barrier.arrive_and_wait();
  return word;
}

namespace host_shim {

template <typename Kernel>
void launch(int64_t grid, int threads, const Kernel& kernel) {
  ThreadBlock shared(threads);
  std::vector<std::thread> pool;
  for (int thread = 0; thread < threads; ++thread) {
    pool.emplace_back([&, thread] {
      block = &shared;
      threadIdx.x = thread;
      blockDim.x = threads;
      gridDim.x = static_cast<unsigned>(grid);
      for (int64_t index = 0; index < grid; ++index) {
        blockIdx.x = static_cast<unsigned>(index);
        kernel();
        shared.barrier.arrive_and_wait();  // the next block finds shared memory free
      }
    });
  }
  for (auto& thread : pool) thread.join();
}

}  // namespace host_shim

#define SLTRAIN_LAUNCH(kernel, grid, threads, stream, ...) \
  host_shim::launch(grid, threads, [&] { kernel(__VA_ARGS__); })
