// Scatter-add and gather on the CPU (support.cpp) and on CUDA. The kernels of csrc/cuda are called by address;
// sltrain_ds/ops/cuda.py loads their library.

#include "cuda/launchers.h"
#include "layer.h"

#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace sltrain {
namespace {

decltype(&sltrain_cuda_scatter_add) cuda_scatter_add = nullptr;
decltype(&sltrain_cuda_gather) cuda_gather = nullptr;
decltype(&sltrain_cuda_error) cuda_error = nullptr;

int code_of(const at::Tensor& x) {
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16,
              "the CUDA kernels take float32 and bfloat16, got ", x.scalar_type());
  return x.scalar_type() == at::kFloat ? kFloat32 : kBFloat16;
}

void* stream_of(const at::Tensor& x) {
  return c10::impl::VirtualGuardImpl(x.device().type()).getStream(x.device()).native_handle();
}

void check(const at::Tensor& W, const at::Tensor& rows, const at::Tensor& columns, const at::Tensor& values) {
  TORCH_CHECK(cuda_scatter_add, "the CUDA kernels are not loaded");
  TORCH_CHECK(rows.scalar_type() == at::kInt && rows.numel() == W.size(0) + 1, "S_rows must be int32 (out + 1,)");
  TORCH_CHECK(values.numel() == columns.numel(), "S_columns and the values differ in length");
  TORCH_CHECK(W.is_contiguous() && rows.is_contiguous() && columns.is_contiguous() && values.is_contiguous(),
              "W and the support must be contiguous");
  TORCH_CHECK(rows.device() == W.device() && columns.device() == W.device() && values.device() == W.device(),
              "W and the support must be on one device");
}

void require(int code, const char* name) { TORCH_CHECK(code == 0, name, ": ", cuda_error(code)); }

}  // namespace

void use_cuda_kernels(int64_t scatter_add, int64_t gather, int64_t error) {
  cuda_scatter_add = reinterpret_cast<decltype(cuda_scatter_add)>(scatter_add);
  cuda_gather = reinterpret_cast<decltype(cuda_gather)>(gather);
  cuda_error = reinterpret_cast<decltype(cuda_error)>(error);
}

void scatter(at::Tensor& W, const at::Tensor& rows, const at::Tensor& columns, const at::Tensor& values) {
  if (W.is_cpu()) return scatter_add(W, rows, columns, values);
  check(W, rows, columns, values);
  require(cuda_scatter_add(W.mutable_data_ptr(), code_of(W), rows.const_data_ptr<int32_t>(), columns.const_data_ptr(),
                           static_cast<int>(columns.element_size()), values.const_data_ptr(), code_of(values),
                           W.size(0), W.size(1), W.device().index(), stream_of(W)),
          "sltrain_cuda_scatter_add");
}

void gather_at(at::Tensor& out, const at::Tensor& W, const at::Tensor& rows, const at::Tensor& columns) {
  if (W.is_cpu()) return gather(out, W, rows, columns);
  check(W, rows, columns, out);
  require(cuda_gather(out.mutable_data_ptr(), code_of(out), W.const_data_ptr(), code_of(W),
                      rows.const_data_ptr<int32_t>(), columns.const_data_ptr(),
                      static_cast<int>(columns.element_size()), W.size(0), W.size(1), W.device().index(), stream_of(W)),
          "sltrain_cuda_gather");
}

}  // namespace sltrain
