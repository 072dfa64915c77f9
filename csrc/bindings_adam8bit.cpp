// Schema of the 8-bit Adam step and its CPU kernel; tracing needs nothing but the schema, since it returns nothing.

#include "adam8bit.h"

#include <ATen/core/Tensor.h>
#include <torch/library.h>

namespace sltrain {

void check_adam8bit(const at::Tensor& p, const at::Tensor& g, const at::Tensor& m8, const at::Tensor& v8,
                    const at::Tensor& absmax_m, const at::Tensor& absmax_v, const at::Tensor& tables, int64_t step,
                    int64_t offset);
void adam8bit_step(const at::Tensor& p, const at::Tensor& g, const at::Tensor& m8, const at::Tensor& v8,
                   const at::Tensor& absmax_m, const at::Tensor& absmax_v, const at::Tensor& tables, const AdamStep& s,
                   int64_t offset);

namespace {

void adam8bit(at::Tensor p, const at::Tensor& g, at::Tensor m8, at::Tensor v8, at::Tensor absmax_m, at::Tensor absmax_v,
              const at::Tensor& tables, double lr, double beta1, double beta2, double eps, double weight_decay,
              bool decoupled, int64_t step, bool stochastic, int64_t seed, int64_t key, int64_t offset,
              double grad_scale) {
  check_adam8bit(p, g, m8, v8, absmax_m, absmax_v, tables, step, offset);
  const AdamStep s = adam_step(lr, beta1, beta2, eps, weight_decay, decoupled, step, stochastic, seed, key, grad_scale);
  adam8bit_step(p, g, m8, v8, absmax_m, absmax_v, tables, s, offset);
}

void traced(at::Tensor, const at::Tensor&, at::Tensor, at::Tensor, at::Tensor, at::Tensor, const at::Tensor&, double,
            double, double, double, double, bool, int64_t, bool, int64_t, int64_t, int64_t, double) {}

}  // namespace
}  // namespace sltrain

TORCH_LIBRARY_FRAGMENT(sltrain, m) {
  m.def(
      "adam8bit_step_(Tensor(a!) p, Tensor g, Tensor(b!) m8, Tensor(c!) v8, Tensor(d!) absmax_m, Tensor(e!) absmax_v, "
      "Tensor tables, float lr, float beta1, float beta2, float eps, float weight_decay, bool decoupled, int step, "
      "bool stochastic, int seed, int key, int offset, float grad_scale) -> ()");
}

TORCH_LIBRARY_IMPL(sltrain, CPU, m) { m.impl("adam8bit_step_", &sltrain::adam8bit); }
TORCH_LIBRARY_IMPL(sltrain, Meta, m) { m.impl("adam8bit_step_", &sltrain::traced); }
