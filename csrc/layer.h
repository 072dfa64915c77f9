// Functions used by layer.cpp in addition to ops.h: the shared scratch, scatter-add and gather on any device.
#pragma once

#include "ops.h"

#include <vector>

namespace sltrain {

// workspace.cpp
at::Tensor workspace_take(int64_t rows, int64_t columns, at::ScalarType dtype, at::Device device);
std::vector<at::Tensor> workspace_buffers();
void workspace_release();

// moves.cpp
void use_cuda_kernels(int64_t scatter_add, int64_t gather, int64_t error);
void scatter(at::Tensor& W, const at::Tensor& rows, const at::Tensor& columns, const at::Tensor& values);
void gather_at(at::Tensor& out, const at::Tensor& W, const at::Tensor& rows, const at::Tensor& columns);

// layer.cpp
at::Tensor layer(const at::Tensor& x, const at::Tensor& A, const at::Tensor& B, const at::Tensor& values,
                 const at::Tensor& rows, const at::Tensor& columns, const std::optional<at::Tensor>& bias,
                 double scaling, int64_t mode);

}  // namespace sltrain
