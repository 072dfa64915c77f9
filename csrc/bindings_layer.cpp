// Schema of a layer's whole pass (layer.cpp), of the shared scratch (workspace.cpp) and of the CUDA kernels' addresses
// (moves.cpp).

#include "layer.h"

#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(sltrain, m) {
  m.def(
      "layer(Tensor x, Tensor A, Tensor B, Tensor values, Tensor rows, Tensor columns, Tensor? bias, float scaling, "
      "int mode) -> Tensor",
      &sltrain::layer);
  m.def("workspace_take(int rows, int columns, ScalarType dtype, Device device) -> Tensor", &sltrain::workspace_take);
  m.def("workspace_buffers() -> Tensor[]", &sltrain::workspace_buffers);
  m.def("workspace_release() -> ()", &sltrain::workspace_release);
  m.def("use_cuda_kernels(int scatter_add, int gather, int error) -> ()", &sltrain::use_cuda_kernels);
}
