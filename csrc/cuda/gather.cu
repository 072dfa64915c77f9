// out (nnz,) = W (out, in) at the support, in out's dtype.

#include "rows.h"

namespace sltrain {
namespace {

template <typename Value, typename Weight, typename Column>
__global__ void __launch_bounds__(kRowThreads)
    gather_kernel(Value* __restrict__ out, const Weight* __restrict__ weight, const int32_t* __restrict__ rows,
                  const Column* __restrict__ columns, int64_t out_features, int64_t in_features) {
  for_each_entry<float>(
      rows, columns, out_features, in_features, [=](int64_t, int64_t cell) { return widen(weight[cell]); },
      [=](int64_t i, int64_t, float value) { narrow(value, out[i]); });
}

}  // namespace
}  // namespace sltrain

extern "C" int sltrain_cuda_gather(void* out, int out_dtype, const void* W, int W_dtype, const int32_t* rows,
                                   const void* columns, int column_bytes, int64_t out_features, int64_t in_features,
                                   int device, void* stream) {
  using namespace sltrain;
  if (out_features == 0) return 0;
  OnDevice on(device);
  if (on.error() != cudaSuccess) return on.error();
  return with_type(out, out_dtype, [&](auto* value) {
    return with_type(W, W_dtype, [&](const auto* weight) {
      return with_columns(columns, column_bytes, [&](const auto* column) {
        SLTRAIN_LAUNCH(gather_kernel, row_grid(out_features), kRowThreads, stream, value, weight, rows, column,
                       out_features, in_features);
        return static_cast<int>(cudaGetLastError());
      });
    });
  });
}
