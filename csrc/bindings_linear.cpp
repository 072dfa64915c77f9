// Schema of the layer's dense and sparse products and of the gradients' norm; documented in gemm.cpp, spmm.cpp and
// norm.cpp.

#include "ops.h"

#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(sltrain, m) {
  m.def("gemm_(Tensor(a!) out, Tensor a, Tensor b, float alpha, bool add, Tensor? bias) -> ()");
  m.def("column_sum_(Tensor(a!) out, Tensor x) -> ()");
  m.def("sum_of_squares(Tensor x) -> float");
  m.def("spmm_scratch(int tokens, int out_features, int in_features, int nnz, int itemsize) -> int",
        &sltrain::spmm_scratch);
  m.def("spmm_(Tensor(a!) y, Tensor x, Tensor rows, Tensor columns, Tensor values, Tensor(b!) scratch) -> ()");
  m.def(
      "spmm_backward_(Tensor dy, Tensor x, Tensor rows, Tensor columns, Tensor values, Tensor(a!) dx, "
      "Tensor(b!) dvalues, Tensor(c!) scratch) -> ()");
}

TORCH_LIBRARY_IMPL(sltrain, CPU, m) {
  m.impl("gemm_", [](at::Tensor out, const at::Tensor& a, const at::Tensor& b, double alpha, bool add,
                     const std::optional<at::Tensor>& bias) { sltrain::gemm(out, a, b, alpha, add, bias); });
  m.impl("column_sum_", [](at::Tensor out, const at::Tensor& x) { sltrain::column_sum(out, x); });
  m.impl("sum_of_squares", [](const at::Tensor& x) { return sltrain::sum_of_squares(x); });
  m.impl("spmm_",
         [](at::Tensor y, const at::Tensor& x, const at::Tensor& rows, const at::Tensor& columns,
            const at::Tensor& values, at::Tensor scratch) { sltrain::spmm(y, x, rows, columns, values, scratch); });
  m.impl("spmm_backward_",
         [](const at::Tensor& dy, const at::Tensor& x, const at::Tensor& rows, const at::Tensor& columns,
            const at::Tensor& values, at::Tensor dx, at::Tensor dvalues,
            at::Tensor scratch) { sltrain::spmm_backward(dy, x, rows, columns, values, dx, dvalues, scratch); });
}
