// Loop over a row-wise support: a warp processes a row, its lanes neighbouring entries, whose columns ascend. Columns
// and values are therefore read in full lines, and neighbouring lanes share sectors of W.
#pragma once

#include "device.h"

namespace sltrain {

constexpr int kRowThreads = 256;
constexpr int kRowsAtATime = kRowThreads / kWarp;
constexpr int kAhead = 4;  // entries in flight per lane

inline int64_t row_grid(int64_t out_features) { return (out_features + kRowsAtATime - 1) / kRowsAtATime; }

// entry = load(position, cell of W) for up to kAhead entries of this lane, then store for the same ones
template <typename Entry, typename Column, typename Load, typename Store>
__device__ __forceinline__ void for_each_entry(const int32_t* __restrict__ rows, const Column* __restrict__ columns,
                                               int64_t out_features, int64_t in_features, const Load& load,
                                               const Store& store) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsAtATime + threadIdx.x / kWarp;
  if (row >= out_features) return;
  const int64_t last = rows[row + 1], start = row * in_features;
  for (int64_t base = rows[row] + lane; base < last; base += kAhead * kWarp) {
    Entry entry[kAhead];
    int64_t cell[kAhead];
    // all columns are loaded before any entry: a load that waits for its column would delay the next column's load
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t i = base + k * kWarp;
      cell[k] = start + columns[i < last ? i : last - 1];
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t i = base + k * kWarp;
      if (i < last) entry[k] = load(i, cell[k]);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t i = base + k * kWarp;
      if (i < last) store(i, cell[k], entry[k]);
    }
  }
}

}  // namespace sltrain
