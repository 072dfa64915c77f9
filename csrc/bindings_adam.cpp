// Schema of the 8-bit and the 4-bit Adam step and their CPU kernels (adam8bit.cpp, adam4bit.cpp). They return nothing,
// so tracing only needs the schema.

#include <ATen/core/Tensor.h>
#include <torch/library.h>

namespace sltrain {

using AdamKernel = void(at::Tensor p, const at::Tensor& g, at::Tensor m, at::Tensor v, at::Tensor absmax_m,
                        at::Tensor absmax_v, const at::Tensor& tables, double lr, double beta1, double beta2,
                        double eps, double weight_decay, bool decoupled, int64_t step, bool stochastic, int64_t seed,
                        int64_t key, int64_t offset, double grad_scale);
AdamKernel adam8bit, adam4bit;

namespace {

void traced(at::Tensor, const at::Tensor&, at::Tensor, at::Tensor, at::Tensor, at::Tensor, const at::Tensor&, double,
            double, double, double, double, bool, int64_t, bool, int64_t, int64_t, int64_t, double) {}

}  // namespace
}  // namespace sltrain

#define REST                                                                                                       \
  "Tensor(d!) absmax_m, Tensor(e!) absmax_v, Tensor tables, float lr, float beta1, float beta2, float eps, float " \
  "weight_decay, bool decoupled, int step, bool stochastic, int seed, int key, int offset, float grad_scale) -> ()"

TORCH_LIBRARY_FRAGMENT(sltrain, m) {
  m.def("adam8bit_step_(Tensor(a!) p, Tensor g, Tensor(b!) m8, Tensor(c!) v8, " REST);
  m.def("adam4bit_step_(Tensor(a!) p, Tensor g, Tensor(b!) m4, Tensor(c!) v4, " REST);
}

TORCH_LIBRARY_IMPL(sltrain, CPU, m) {
  m.impl("adam8bit_step_", &sltrain::adam8bit);
  m.impl("adam4bit_step_", &sltrain::adam4bit);
}

TORCH_LIBRARY_IMPL(sltrain, Meta, m) {
  m.impl("adam8bit_step_", &sltrain::traced);
  m.impl("adam4bit_step_", &sltrain::traced);
}
