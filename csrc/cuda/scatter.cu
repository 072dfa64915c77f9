// W (out, in) += values at the support, each sum in fp32, rounded once. Positions are unique, so no atomics are needed.

#include "rows.h"

namespace sltrain {
namespace {

template <typename Weight, typename Value, typename Column>
__global__ void __launch_bounds__(kRowThreads)
    scatter_add_kernel(Weight* weight, const int32_t* __restrict__ rows, const Column* __restrict__ columns,
                       const Value* __restrict__ values, int64_t out_features, int64_t in_features) {
  for_each_entry<float>(
      rows, columns, out_features, in_features,
      [=](int64_t i, int64_t cell) { return widen(weight[cell]) + widen(values[i]); },
      [=](int64_t, int64_t cell, float sum) { narrow(sum, weight[cell]); });
}

}  // namespace
}  // namespace sltrain

extern "C" int sltrain_cuda_scatter_add(void* W, int W_dtype, const int32_t* rows, const void* columns,
                                        int column_bytes, const void* values, int values_dtype, int64_t out_features,
                                        int64_t in_features, int device, void* stream) {
  using namespace sltrain;
  if (out_features == 0) return 0;
  OnDevice on(device);
  if (on.error() != cudaSuccess) return on.error();
  return with_type(W, W_dtype, [&](auto* weight) {
    return with_type(values, values_dtype, [&](const auto* value) {
      return with_columns(columns, column_bytes, [&](const auto* column) {
        SLTRAIN_LAUNCH(scatter_add_kernel, row_grid(out_features), kRowThreads, stream, weight, rows, column, value,
                       out_features, in_features);
        return static_cast<int>(cudaGetLastError());
      });
    });
  });
}
