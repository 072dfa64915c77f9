// out = alpha a b (+ out, or + bias), in fixed blocks of the output, each by one thread: the bits of a library's GEMM may depend
// on how many threads share it, these do not.

#include "ops.h"

#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <omp.h>

#include <algorithm>
#include <type_traits>

extern "C" int MKL_Set_Num_Threads_Local(int threads) __attribute__((weak));  // absent where torch is without MKL

namespace sltrain {
namespace {

// While it lives, libraries called from this thread plan for one thread; being in a parallel region is not enough.
class OneThread {
 public:
  OneThread() : openmp_(omp_get_max_threads()), mkl_(MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0) {
    omp_set_num_threads(1);
  }
  ~OneThread() {
    omp_set_num_threads(openmp_);
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(mkl_);
  }
  OneThread(const OneThread&) = delete;

 private:
  int openmp_, mkl_;
};

constexpr int64_t kEnough = 8;         // blocks, as long as their sides stay
constexpr int64_t kShortest = 256;     // at least this
constexpr int64_t kLongest = 2048;     // sides from here on are halved in any case, for machines with many cores

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

}  // namespace

void gemm(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, double alpha, bool add,
          const std::optional<at::Tensor>& bias) {
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
    OneThread one_thread;
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
        at::addmm_out(target, target, left, right, add ? 1 : 0, alpha);
      }
    }
  });
}

// out (n,) = sum over the rows of x (m, n), in fp32 (fp64 for fp64), in runs of rows, so that errors stay small
void column_sum(at::Tensor& out, const at::Tensor& x) {
  constexpr int64_t kWide = 128, kRun = 64;
  const int64_t M = x.size(0), N = x.size(1);
  TORCH_CHECK(x.is_contiguous() && out.is_contiguous() && out.numel() == N, "column_sum: shapes do not fit");
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "sltrain_column_sum", [&] {
    using wide_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    const scalar_t* from = x.const_data_ptr<scalar_t>();
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, out.scalar_type(), "sltrain_column_sum", [&] {
      scalar_t* to = out.mutable_data_ptr<scalar_t>();
      at::parallel_for(0, blocks(N, kWide), 1, [&](int64_t begin, int64_t end) {
        for (int64_t first = begin * kWide; first < std::min(N, end * kWide); first += kWide) {
          const int64_t width = std::min(kWide, N - first);
          wide_t total[kWide] = {};
          for (int64_t run = 0; run < M; run += kRun) {
            wide_t part[kWide] = {};
            for (int64_t row = run; row < std::min(M, run + kRun); ++row) {
              for (int64_t c = 0; c < width; ++c) part[c] += static_cast<wide_t>(from[row * N + first + c]);
            }
            for (int64_t c = 0; c < width; ++c) total[c] += part[c];
          }
          for (int64_t c = 0; c < width; ++c) to[first + c] = static_cast<scalar_t>(total[c]);
        }
      });
    });
  });
}

}  // namespace sltrain
