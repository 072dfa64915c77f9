// Functions registered by bindings.cpp; each is documented in its file.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace sltrain {

std::tuple<at::Tensor, at::Tensor> sample_support(int64_t out_features, int64_t in_features, int64_t nnz,
                                                  int64_t count_key, int64_t column_key);
void scatter_add(at::Tensor& W, const at::Tensor& rows, const at::Tensor& columns, const at::Tensor& values);
void gather(at::Tensor& out, const at::Tensor& W, const at::Tensor& rows, const at::Tensor& columns);
void gemm(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, double alpha, bool add,
          const std::optional<at::Tensor>& bias);
bool gemm_amx(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, double alpha, bool add,
              const std::optional<at::Tensor>& bias);  // false if it does not apply
void column_sum(at::Tensor& out, const at::Tensor& x);
double sum_of_squares(const at::Tensor& x);
int64_t spmm_scratch(int64_t tokens, int64_t out_features, int64_t in_features, int64_t nnz, int64_t itemsize);
void spmm(at::Tensor& y, const at::Tensor& x, const at::Tensor& rows, const at::Tensor& columns,
          const at::Tensor& values, at::Tensor& scratch);
void spmm_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& rows, const at::Tensor& columns,
                   const at::Tensor& values, at::Tensor& dx, at::Tensor& dvalues, at::Tensor& scratch);

}  // namespace sltrain
