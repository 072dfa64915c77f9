// A layer's forward and backward, one call each. ops/sltrain_linear.py is the reference: this is the same computation
// line by line, without the 0.1 ms of Python overhead, for which a GPU has to wait in small steps.

#include "layer.h"

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

namespace sltrain {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

enum Mode : int64_t { kCompose, kKeep, kFactored, kFactoredDense };  // MODES of ops/sltrain_linear.py
constexpr const char* kNames[] = {"compose", "keep", "factored", "factored_dense"};

bool builds_W(int64_t mode) { return mode == kCompose || mode == kKeep; }
bool sparse_is_dense(int64_t mode, const Tensor& x) { return mode == kFactoredDense || !x.is_cpu(); }

Tensor as_matrix(const Tensor& x) { return x.reshape({-1, x.size(-1)}).contiguous(); }

// ops/gemm.py: gemm_
void product(Tensor out, const Tensor& a, const Tensor& b, double alpha = 1, bool add = false,
             const std::optional<Tensor>& bias = {}) {
  if (out.scalar_type() != a.scalar_type()) {  // autocast: the gradient is wider than the product
    const auto narrow = at::empty(out.sizes(), a.options());
    product(narrow, a, b);
    out.copy_(narrow).mul_(alpha);
  } else if (out.is_cpu()) {
    gemm(out, a, b, alpha, add, bias);
  } else if (bias) {
    at::addmm_out(out, *bias, a, b, 1, alpha);
  } else {
    at::addmm_out(out, out, a, b, add ? 1 : 0, alpha);
  }
}

// ops/gemm.py: column_sum_
void sum_columns(Tensor out, const Tensor& x) {
  if (out.is_cpu()) {
    column_sum(out, x);
  } else {
    out.copy_(at::sum(x, 0, false, at::promote_types(x.scalar_type(), at::kFloat)));
  }
}

// Parameters and support of a layer, and the products of a pass.
struct Layer {
  const Tensor A, B, values, rows, columns;
  double scaling;
  at::ScalarType dtype;

  Tensor workspace(const Tensor& x) const { return workspace_take(B.size(0), A.size(1), dtype, x.device()); }

  Tensor dense_sparse(const Tensor& x) const {
    auto S = workspace(x).zero_();
    scatter(S, rows, columns, values);
    return S;
  }

  Tensor compose(Tensor W) const {
    product(W, B.to(dtype), A.to(dtype), scaling);
    scatter(W, rows, columns, values);
    return W;
  }

  // y (tokens, out) from x (tokens, in), both contiguous; returns the tensor kept for the backward
  Tensor forward(const Tensor& x, Tensor y, const std::optional<Tensor>& bias, int64_t mode) const {
    if (builds_W(mode)) {
      const auto W = compose(mode == kKeep ? at::empty({B.size(0), A.size(1)}, x.options()) : workspace(x));
      product(y, x, W.t(), 1, false, bias);
      return mode == kKeep ? W : Tensor();
    }
    auto u = at::empty({x.size(0), A.size(0)}, x.options());
    product(u, x, A.to(dtype).t());
    product(y, u, B.to(dtype).t(), scaling, false, bias);
    if (sparse_is_dense(mode, x)) {
      product(y, x, dense_sparse(x).t(), 1, true);
    } else {
      auto scratch = spmm_workspace(y, x);
      spmm(y, x, rows, columns, values, scratch);
    }
    return u;
  }

  // writes those gradients that are defined: dx (tokens, in), dA, dB, dvalues
  void backward_of_W(const Tensor& dy, const Tensor& x, const Tensor& W, Tensor dx, Tensor dA, Tensor dB,
                     Tensor dvalues) const {
    if (dx.defined()) product(dx, dy, W.defined() ? W : compose(workspace(x)));
    if (!dA.defined() && !dB.defined() && !dvalues.defined()) return;
    auto dW = workspace(x);
    product(dW, dy.t(), x);
    if (dvalues.defined()) gather_at(dvalues, dW, rows, columns);
    if (dA.defined()) product(dA, B.to(dtype).t(), dW, scaling);
    if (dB.defined()) product(dB, dW, A.to(dtype).t(), scaling);
  }

  void backward_of_factors(const Tensor& dy, const Tensor& x, const Tensor& u, int64_t mode, Tensor dx, Tensor dA,
                           Tensor dB, Tensor dvalues) const {
    Tensor du;
    if (dx.defined() || dA.defined()) product(du = at::empty(u.sizes(), dy.options()), dy, B.to(dtype), scaling);
    if (dA.defined()) product(dA, du.t(), x);
    if (dB.defined()) product(dB, dy.t(), u, scaling);
    if (dx.defined()) product(dx, du, A.to(dtype));
    if (!dx.defined() && !dvalues.defined()) return;
    if (!sparse_is_dense(mode, x)) {
      auto scratch = spmm_workspace(dy, x);
      auto to_x = dx.defined() ? dx : at::empty({0}, x.options());
      auto to_values = dvalues.defined() ? dvalues : at::empty({0}, values.options());
      spmm_backward(dy, x, rows, columns, values, to_x, to_values, scratch);
      return;
    }
    if (dx.defined()) product(dx, dy, dense_sparse(x), 1, true);
    if (dvalues.defined()) {
      auto dW = workspace(x);
      product(dW, dy.t(), x);
      gather_at(dvalues, dW, rows, columns);
    }
  }

  // ops/spmm.py: _scratch
  Tensor spmm_workspace(const Tensor& y, const Tensor& x) const {
    const auto wide = at::promote_types(dtype, at::kFloat);
    const int64_t item = std::max<int64_t>(x.element_size(), values.element_size());
    const int64_t bytes = spmm_scratch(x.size(0), y.size(1), x.size(1), values.numel(), item);
    const int64_t each = static_cast<int64_t>(c10::elementSize(wide));
    return workspace_take(1, (bytes + each - 1) / each, wide, x.device());
  }
};

// For create_graph: calls the operator, whose backward raises an error.
std::vector<Tensor> backward_with_graph(const Tensor& dy, const Tensor& x, const Layer& layer, const Tensor& kept,
                                        int64_t mode, const bool (&needs)[5]) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("sltrain::linear_backward", "");
  torch::jit::Stack stack{dy, x, layer.A, layer.B, layer.values, layer.rows, layer.columns};
  stack.emplace_back(kept.defined() ? at::IValue(kept) : at::IValue());
  stack.emplace_back(layer.scaling);
  stack.emplace_back(kNames[mode]);
  for (const bool need : needs) stack.emplace_back(need);
  op.callBoxed(stack);
  return stack.back().toTensorVector();
}

struct LayerFunction : torch::autograd::Function<LayerFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& A, const Tensor& B, const Tensor& values,
                        const Tensor& rows, const Tensor& columns, const std::optional<Tensor>& bias, double scaling,
                        int64_t mode) {
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    auto sizes = x.sizes().vec();
    sizes.back() = B.size(0);
    const auto y = at::empty(sizes, x.options(), at::MemoryFormat::Contiguous);
    const Layer layer{A, B, values, rows, columns, scaling, x.scalar_type()};
    const auto in_x = bias ? std::optional<Tensor>(bias->to(x.scalar_type())) : std::nullopt;
    const auto kept = layer.forward(as_matrix(x), y.view({-1, B.size(0)}), in_x, mode);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({x, A, B, values, kept});
    ctx->saved_data["rows"] = rows;  // bypasses saved-tensor hooks: under checkpointing each costs some 20 us of Python
    ctx->saved_data["columns"] = columns;
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["mode"] = mode;
    ctx->saved_data["bias"] = bias.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list outputs) {
    variable_list grads(9);  // one per argument of forward
    if (!outputs[0].defined()) return grads;
    const auto saved = ctx->get_saved_variables();
    const auto &x = saved[0], &A = saved[1], &B = saved[2], &values = saved[3], &kept = saved[4];
    const Tensor rows = ctx->saved_data["rows"].toTensor(), columns = ctx->saved_data["columns"].toTensor();
    const double scaling = ctx->saved_data["scaling"].toDouble();
    const Layer layer{A, B, values, rows, columns, scaling, x.scalar_type()};
    const int64_t mode = ctx->saved_data["mode"].toInt();
    bool needs[5] = {};  // x, A, B, values, bias
    for (int i = 0; i < 4; ++i) needs[i] = ctx->needs_input_grad(i);
    needs[4] = ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(6);
    if (at::GradMode::is_enabled()) {
      const auto found = backward_with_graph(outputs[0], x, layer, kept, mode, needs);
      for (int i = 0; i < 5; ++i) {
        if (needs[i]) grads[i == 4 ? 6 : i] = found[i];
      }
      return grads;
    }
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    for (int i = 0; i < 4; ++i) {
      if (needs[i]) grads[i] = at::empty(saved[i].sizes(), saved[i].options(), at::MemoryFormat::Contiguous);
    }
    const auto dy = as_matrix(outputs[0]), flat_x = as_matrix(x);
    const auto dx = needs[0] ? grads[0].view({-1, x.size(-1)}) : Tensor();
    if (builds_W(mode)) {
      layer.backward_of_W(dy, flat_x, kept, dx, grads[1], grads[2], grads[3]);
    } else {
      layer.backward_of_factors(dy, flat_x, kept, mode, dx, grads[1], grads[2], grads[3]);
    }
    if (needs[4]) sum_columns(grads[6] = at::empty({B.size(0)}, A.options()), dy);
    return grads;
  }
};

}  // namespace

Tensor layer(const Tensor& x, const Tensor& A, const Tensor& B, const Tensor& values, const Tensor& rows,
             const Tensor& columns, const std::optional<Tensor>& bias, double scaling, int64_t mode) {
  TORCH_CHECK(mode >= kCompose && mode <= kFactoredDense, "layer: mode ", mode, " is none of the four");
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == A.size(1), "layer: x has ", x.size(-1), " features, A takes ", A.size(1));
  return LayerFunction::apply(x, A, B, values, rows, columns, bias, scaling, mode);
}

}  // namespace sltrain
