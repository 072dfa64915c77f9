// The operators' schema, and a Python module without content so that `import` can load it.

#include "ops.h"

#include <Python.h>
#include <torch/library.h>

TORCH_LIBRARY(sltrain, m) {
  m.def("sample_support(int out_features, int in_features, int nnz, int count_key, int column_key) -> (Tensor, Tensor)",
        &sltrain::sample_support);
  m.def("scatter_add_(Tensor(a!) W, Tensor rows, Tensor columns, Tensor values) -> ()");
  m.def("gather(Tensor(a!) out, Tensor W, Tensor rows, Tensor columns) -> ()");
}

TORCH_LIBRARY_IMPL(sltrain, CPU, m) {
  m.impl("scatter_add_", [](at::Tensor W, const at::Tensor& rows, const at::Tensor& columns, const at::Tensor& values) {
    sltrain::scatter_add(W, rows, columns, values);
  });
  m.impl("gather", [](at::Tensor out, const at::Tensor& W, const at::Tensor& rows, const at::Tensor& columns) {
    sltrain::gather(out, W, rows, columns);
  });
}

#define SLTRAIN_JOIN_(a, b) a##b
#define SLTRAIN_JOIN(a, b) SLTRAIN_JOIN_(a, b)
#define SLTRAIN_STRING_(a) #a
#define SLTRAIN_STRING(a) SLTRAIN_STRING_(a)

PyMODINIT_FUNC SLTRAIN_JOIN(PyInit_, TORCH_EXTENSION_NAME)() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, SLTRAIN_STRING(TORCH_EXTENSION_NAME), nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
