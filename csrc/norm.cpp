// Sum of a tensor's squares, accumulated in fp32 within short runs and in fp64 over them: without a copy in another
// dtype, and with the same bits for any number of threads.

#include "cpu.h"
#include "ops.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

namespace sltrain {
namespace {

constexpr int64_t kBlock = 1 << 16;  // elements that one thread sums
constexpr int64_t kRun = 1 << 10;    // of these, in fp32
constexpr int64_t kLanes = 64;

ANY_LEVEL double squares_of_float(const float* x, int64_t count) {
  double total = 0;
  for (int64_t first = 0; first < count; first += kRun) {
    float sums[kLanes] = {};
    const int64_t last = std::min(count, first + kRun), whole = first + (last - first) / kLanes * kLanes;
    for (int64_t i = first; i < whole; i += kLanes) {
      for (int64_t j = 0; j < kLanes; ++j) sums[j] += x[i + j] * x[i + j];
    }
    for (int64_t i = whole; i < last; ++i) sums[i - whole] += x[i] * x[i];
    for (int64_t j = 0; j < kLanes; ++j) total += sums[j];
  }
  return total;
}

ANY_LEVEL double squares_of_bfloat16(const at::BFloat16* x, int64_t count) {
  const uint16_t* bits = reinterpret_cast<const uint16_t*>(x);
  double total = 0;
  for (int64_t first = 0; first < count; first += kRun) {
    const int64_t size = std::min(kRun, count - first);
    float wide[kRun];
    for (int64_t i = 0; i < size; ++i) {
      const uint32_t word = static_cast<uint32_t>(bits[first + i]) << 16;
      __builtin_memcpy(wide + i, &word, 4);
    }
    total += squares_of_float(wide, size);
  }
  return total;
}

double squares(const float* x, int64_t count) { return at_level<squares_of_float>(x, count); }
double squares(const at::BFloat16* x, int64_t count) { return at_level<squares_of_bfloat16>(x, count); }

}  // namespace

double sum_of_squares(const at::Tensor& x) {
  TORCH_CHECK(x.is_contiguous(), "sum_of_squares: the tensor must be contiguous");
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16,
              "sum_of_squares: float32 or bfloat16, not ", x.scalar_type());
  const int64_t count = x.numel(), blocks = (count + kBlock - 1) / kBlock;
  std::vector<double> parts(blocks);
  const auto sum = [&](const auto* data) {
    at::parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) parts[b] = squares(data + b * kBlock, std::min(kBlock, count - b * kBlock));
    });
  };
  if (x.scalar_type() == at::kFloat) {
    sum(x.const_data_ptr<float>());
  } else {
    sum(x.const_data_ptr<at::BFloat16>());
  }
  double total = 0;
  for (double part : parts) total += part;
  return total;
}

}  // namespace sltrain
