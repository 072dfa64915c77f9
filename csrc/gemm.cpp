// out = alpha a b (+ bias), in fixed blocks of the output, each by one thread: the bits of a library's GEMM may depend
// on how many threads share it, these do not.

#include "ops.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>

namespace sltrain {
namespace {

constexpr int64_t kEnough = 8;         // blocks, as long as their sides stay
constexpr int64_t kShortest = 256;     // at least this
constexpr int64_t kLongest = 2048;     // sides from here on are halved in any case, for machines with many cores

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

}  // namespace

void gemm(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, double alpha, const std::optional<at::Tensor>& bias) {
  const int64_t M = out.size(0), N = out.size(1);
  TORCH_CHECK(a.size(0) == M && b.size(1) == N && a.size(1) == b.size(0), "gemm: shapes do not fit");
  if (M == 0 || N == 0) return;
  // a narrow type's library kernels want `a` row-major: each thread turns its own rows, so split rows alone
  const bool turn = a.element_size() == 2 && a.stride(1) != 1 && a.size(1) > 1 && M > 1;
  int64_t rows = M, columns = N;
  while (true) {
    const bool by_rows = turn || rows >= columns;
    int64_t& side = by_rows ? rows : columns;
    const int64_t count = blocks(M, rows) * blocks(N, columns);
    if (!(count < 2 ? side > 1 : (count < kEnough && side >= 2 * kShortest) || side >= kLongest)) break;
    side = side > 64 ? (side / 2 + 31) / 32 * 32 : (side + 1) / 2;
  }
  const int64_t across = blocks(N, columns);
  at::parallel_for(0, blocks(M, rows) * across, 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView no_autograd;  // a worker has the thread's own state
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / across * rows, column = i % across * columns;
      const int64_t height = std::min(rows, M - row), width = std::min(columns, N - column);
      auto left = a.narrow(0, row, height);
      if (turn) left = left.contiguous();
      const auto right = b.narrow(1, column, width);
      auto target = out.narrow(0, row, height).narrow(1, column, width);
      if (bias) {
        at::addmm_out(target, bias->narrow(0, column, width), left, right, 1, alpha);
      } else {
        at::addmm_out(target, target, left, right, 0, alpha);
      }
    }
  });
}

}  // namespace sltrain
