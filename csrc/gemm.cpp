// out = alpha a b (+ out, or + bias), in fixed blocks of the output, each computed by one thread. Unlike with a
// library's multi-threaded GEMM, the bits do not depend on the number of threads.

#include "ops.h"

#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <omp.h>
#include <unistd.h>

#include <algorithm>
#include <type_traits>

extern "C" int MKL_Set_Num_Threads_Local(int threads) __attribute__((weak));  // absent if torch is built without MKL

namespace sltrain {
namespace {

// While it exists, libraries called from this thread use one thread; being in a parallel region is not enough.
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

constexpr int64_t kWorth = 1 << 20;  // multiply-adds from which the output is split
constexpr int64_t kShortest = 256;   // side of a block

// Target number of blocks: the machine's number of cores, independent of how many this process may use.
int64_t enough() {
  static const int64_t count = std::clamp<int64_t>(sysconf(_SC_NPROCESSORS_CONF), 2, 256);
  return count;
}

typedef uint16_t Eight __attribute__((vector_size(16), may_alias, aligned(2)));
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Mask{__VA_ARGS__})
#endif
#define ZIP_LOW(a, b) SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define ZIP_HIGH(a, b) SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15)

// Row-major copy of a (rows, columns), a column-major matrix of a two-byte type
at::Tensor turned(const at::Tensor& a) {
  typedef uint16_t Mask __attribute__((vector_size(16)));
  constexpr int64_t kLine = 32;  // elements per cache line
  const int64_t rows = a.size(0), columns = a.size(1), stride = a.stride(1);
  auto result = at::empty({rows, columns}, a.options());
  const uint16_t* from = static_cast<const uint16_t*>(a.const_data_ptr());
  uint16_t* to = static_cast<uint16_t*>(result.mutable_data_ptr());
  const int64_t whole_rows = rows / 8 * 8, whole_columns = columns / 8 * 8;
  for (int64_t line = 0; line < whole_rows; line += kLine) {
    for (int64_t c = 0; c < whole_columns; c += 8) {
      for (int64_t r = line; r < std::min(line + kLine, whole_rows); r += 8) {
        Eight v[8], w[8];
        for (int i = 0; i < 8; ++i) v[i] = *reinterpret_cast<const Eight*>(from + (c + i) * stride + r);
        // three perfect shuffles of the eight vectors transpose the tile
        for (int i = 0; i < 4; ++i) w[2 * i] = ZIP_LOW(v[i], v[i + 4]), w[2 * i + 1] = ZIP_HIGH(v[i], v[i + 4]);
        for (int i = 0; i < 4; ++i) v[2 * i] = ZIP_LOW(w[i], w[i + 4]), v[2 * i + 1] = ZIP_HIGH(w[i], w[i + 4]);
        for (int i = 0; i < 4; ++i) w[2 * i] = ZIP_LOW(v[i], v[i + 4]), w[2 * i + 1] = ZIP_HIGH(v[i], v[i + 4]);
        for (int i = 0; i < 8; ++i) *reinterpret_cast<Eight*>(to + (r + i) * columns + c) = w[i];
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c) to[r * columns + c] = from[c * stride + r];
  }
  return result;
}

at::Tensor piece(const at::Tensor& x, int64_t row, int64_t height, int64_t column, int64_t width) {
  return x.as_strided({height, width}, x.strides(), x.storage_offset() + row * x.stride(0) + column * x.stride(1));
}

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

}  // namespace

void gemm(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, double alpha, bool add,
          const std::optional<at::Tensor>& bias) {
  const int64_t M = out.size(0), N = out.size(1);
  TORCH_CHECK(a.size(0) == M && b.size(1) == N && a.size(1) == b.size(0), "gemm: shapes do not fit");
  if (M == 0 || N == 0 || gemm_amx(out, a, b, alpha, add, bias)) return;
  // for narrow types library kernels need a row-major `a`: each thread transposes its own rows, so only rows are split
  const bool turn = a.element_size() == 2 && a.stride(0) == 1 && a.stride(1) != 1 && a.size(1) > 1 && M > 1;
  int64_t rows = M, columns = N;
  while (M * N * a.size(1) >= kWorth && blocks(M, rows) * blocks(N, columns) < enough()) {
    // libraries are fastest with long rows of a, so columns are split first, down to a limit
    int64_t& side = turn && rows >= 2 * kShortest ? rows : columns >= rows || columns >= 4 * kShortest ? columns : rows;
    if (side < 2 * kShortest && blocks(M, rows) * blocks(N, columns) > 1) break;
    side = side > 64 ? (side / 2 + 31) / 32 * 32 : (side + 1) / 2;
  }
  const int64_t across = blocks(N, columns);
  at::parallel_for(0, blocks(M, rows) * across, 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView no_autograd;  // worker threads have their own dispatch state
    OneThread one_thread;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / across * rows, column = i % across * columns;
      const int64_t height = std::min(rows, M - row), width = std::min(columns, N - column);
      auto left = piece(a, row, height, 0, a.size(1));
      if (turn) left = turned(left);
      const auto right = piece(b, 0, b.size(0), column, width);
      auto target = piece(out, row, height, column, width);
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
