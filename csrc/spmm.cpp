// Sparse products of the factored mode: y += x S^T, and its backward dx += dy S, dS = (dy^T x) on the support.
//
// Tokens are processed in panels; a panel of an activation is transposed into blocks of `width` tokens
// (spmm_kernels.h), in which a non-zero costs a few vector multiply-adds. Sums are accumulated in fp32 (fp64 for fp64)
// and rounded once. dx uses the support in column order (spmm_support.h), rebuilt in every backward: that costs as much
// as a few tokens, while keeping it would cost 8 bytes per non-zero. Every result is computed by one thread in a fixed
// order, so bits do not depend on the number of threads.

#include "cpu.h"
#include "ops.h"
#include "spmm_support.h"

#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed only between inlined functions

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Mask{__VA_ARGS__})
#endif

namespace sltrain {
namespace {
enum class Pair : uint32_t {};  // two bf16
}  // namespace
}  // namespace sltrain

#define KERNEL_ISA portable
#define KERNEL_TARGET
#define KERNEL_LANES 4
#define KERNEL_ACCUMULATORS 4
#include "spmm_kernels.h"
#undef KERNEL_ISA
#undef KERNEL_TARGET
#undef KERNEL_LANES
#undef KERNEL_ACCUMULATORS

#ifdef SLTRAIN_X86
#define KERNEL_ISA avx2
#define KERNEL_TARGET AVX2
#define KERNEL_LANES 8
#define KERNEL_ACCUMULATORS 4
#include "spmm_kernels.h"
#undef KERNEL_ISA
#undef KERNEL_TARGET
#undef KERNEL_LANES
#undef KERNEL_ACCUMULATORS

#define KERNEL_ISA avx512
#define KERNEL_TARGET AVX512
#define KERNEL_LANES 16
#define KERNEL_ACCUMULATORS 8
#include "spmm_kernels.h"
#undef KERNEL_ISA
#undef KERNEL_TARGET
#undef KERNEL_LANES
#undef KERNEL_ACCUMULATORS
#endif

namespace sltrain {
namespace {

#ifdef SLTRAIN_X86
#define CALL(...)                                         \
  (cpu_level() >= CpuLevel::kAvx512 ? avx512::__VA_ARGS__ \
   : cpu_level() >= CpuLevel::kAvx2 ? avx2::__VA_ARGS__   \
                                    : portable::__VA_ARGS__)
#else
#define CALL(...) portable::__VA_ARGS__
#endif

constexpr int64_t kPanel = 256;    // tokens transposed together
constexpr int64_t kChannels = 32;  // channels whose sums are transposed together
constexpr int64_t kPiece = 2048;   // channels whose sums are kept for the next slab

// Vectors of 64 bytes per channel, after widening.
int vectors(int64_t tokens) { return tokens > 32 ? 4 : tokens > 16 ? 2 : 1; }

// One activation (tokens, channels), row-major, and the panel with some of its tokens, transposed.
template <typename T, typename In>
struct Activation {
  static constexpr int kPacked = std::is_same_v<In, at::BFloat16> ? 2 : 1;  // tokens per element of the panel
  using Panel = std::conditional_t<kPacked == 2, Pair, T>;

  In* data;
  int64_t tokens, channels;
  int width = 0;  // tokens per block
  Panel* panel = nullptr;
  T* sums = nullptr;  // per thread

  Activation(const at::Tensor& matrix)
      : data(const_cast<In*>(matrix.const_data_ptr<In>())), tokens(matrix.size(0)), channels(matrix.size(1)) {}

  int64_t blocks(int64_t first) const { return (std::min(kPanel, tokens - first) + width - 1) / width; }
  int used(int64_t token) const { return static_cast<int>(std::min<int64_t>(width, tokens - token)); }
  Panel* block(int64_t b) const { return panel + b * (width / kPacked) * channels; }

  void set_panel(int V, Arena& arena) {
    width = std::max(V, kPacked) * 64 / sizeof(T);
    panel = arena.take<Panel>((std::min(kPanel, tokens) + width - 1) / width * (width / kPacked) * channels);
    sums = arena.take<T>(at::get_num_threads() * kPiece * width);
  }

  void fill_panel(int64_t first) const {
    constexpr int64_t kChunk = 256;
    const int64_t chunks = (channels + kChunk - 1) / kChunk;
    at::parallel_for(0, blocks(first) * chunks, 4, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / chunks, c = task % chunks * kChunk, token = first + b * width;
        CALL(fill_block(data + token * channels, channels, used(token), width, c, std::min(channels, c + kChunk),
                        block(b)));
      }
    });
  }
};

#define WITH_VECTORS(width, T, ...) \
  switch (width * sizeof(T) / 64) { \
    case 1: {                       \
      constexpr int V = 1;          \
      __VA_ARGS__;                  \
      break;                        \
    }                               \
    case 2: {                       \
      constexpr int V = 2;          \
      __VA_ARGS__;                  \
      break;                        \
    }                               \
    default: {                      \
      constexpr int V = 4;          \
      __VA_ARGS__;                  \
    }                               \
  }

// target[tokens of the panel] += source's panel times S^T
template <typename T, typename In, typename Index>
void add_product(const Support<T, Index>& S, const Activation<T, In>& source, int64_t first,
                 const Activation<T, In>& target) {
  const int64_t count = slabs(S.width), piece = count > 1 ? kPiece : kChannels, chunk = std::max<int64_t>(256, piece);
  const int64_t chunks = (S.rows + chunk - 1) / chunk;
  const int width = source.width;
  at::parallel_for(0, source.blocks(first) * chunks, 1, [&](int64_t begin, int64_t end) {
    T* sums = source.sums + at::get_thread_num() * kPiece * width;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / chunks, token = first + b * width, to = std::min(S.rows, task % chunks * chunk + chunk);
      for (int64_t row = task % chunks * chunk; row < to; row += piece) {
        const int64_t last = std::min(to, row + piece);
        for (int64_t s = 0; s < count; ++s) {
          WITH_VECTORS(
              width, T,
              CALL(multiply<V>(source.block(b), S.begins(s), S.ends(s), S.columns, S.values, row, last, s > 0, sums)));
        }
        for (int64_t c = row; c < last; c += kChannels) {
          CALL(add_sums(sums + (c - row) * width, static_cast<int>(std::min(kChannels, last - c)), width,
                        source.used(token), target.channels, target.data + token * target.channels + c));
        }
      }
    }
  });
}

// out (+)= (dy^T x) on the support, over the tokens of the panels
template <typename T, typename In, typename Index>
void add_samples(const Support<T, Index>& S, const Activation<T, In>& dy, const Activation<T, In>& x, int64_t first,
                 T* out) {
  const int64_t grain = std::max<int64_t>(1, S.rows * 4096 / std::max<int64_t>(1, S.pointers[S.rows]));
  at::parallel_for(0, S.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = 0; b < x.blocks(first); ++b) {
      for (int64_t s = 0; s < slabs(S.width); ++s) {
        WITH_VECTORS(x.width, T,
                     CALL(sample<V>(dy.block(b), x.block(b), S.begins(s), S.ends(s), S.columns, begin, end,
                                    first + b > 0, out)));
      }
    }
  });
}

void check(const at::Tensor& y, const at::Tensor& x, const at::Tensor& rows, const at::Tensor& columns,
           const at::Tensor& values) {
  // shapes only: positions were checked when the support was built
  TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(0) == y.size(0), "x and y must be matrices of as many tokens");
  TORCH_CHECK(x.is_contiguous() && y.is_contiguous() && rows.is_contiguous() && columns.is_contiguous() &&
                  values.is_contiguous(),
              "the operands of a sparse product must be contiguous");
  TORCH_CHECK(x.scalar_type() == y.scalar_type(), "x and y must have the same dtype");
  TORCH_CHECK(rows.scalar_type() == at::kInt && rows.numel() == y.size(1) + 1, "S_rows must be int32 (out + 1,)");
  TORCH_CHECK(columns.scalar_type() == at::kUInt16 || columns.scalar_type() == at::kInt,
              "S_columns must be uint16 or int32");
  TORCH_CHECK(values.numel() == columns.numel(), "S_columns and the values differ in length");
}

// Calls body(In{}, T{}, pointer to columns): In is the activations' type, T the accumulation type
template <typename Body>
void with_types(const at::Tensor& x, const at::Tensor& columns, const Body& body) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "sltrain_spmm", [&] {
    using T = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    if (columns.scalar_type() == at::kUInt16) return body(scalar_t{}, T{}, columns.const_data_ptr<uint16_t>());
    body(scalar_t{}, T{}, columns.const_data_ptr<int32_t>());
  });
}

}  // namespace

int64_t spmm_scratch(int64_t tokens, int64_t out_features, int64_t in_features, int64_t nnz, int64_t itemsize) {
  const int64_t wide = std::max<int64_t>(4, itemsize), panel = std::min<int64_t>(kPanel, (tokens + 63) / 64 * 64);
  const int64_t panels = panel * (out_features + in_features) * wide;
  const int64_t column_order = nnz * (4 + wide) + (2 * in_features + 1) * 4;
  const int64_t cuts = (slabs(out_features) * in_features + slabs(in_features) * out_features) * 4;
  const int64_t sums = 2 * at::get_num_threads() * kPiece * 64 * wide;
  // plus the values and their gradient, if they are widened
  return panels + column_order + cuts + sums + 2 * nnz * wide + 16 * kAlignment;
}

void spmm(at::Tensor& y, const at::Tensor& x, const at::Tensor& rows, const at::Tensor& columns,
          const at::Tensor& values, at::Tensor& scratch) {
  check(y, x, rows, columns, values);
  if (x.size(0) == 0 || values.numel() == 0) return;
  with_types(x, columns, [&](auto in, auto wide, const auto* column) {
    using In = decltype(in);
    using T = decltype(wide);
    using Index = std::remove_const_t<std::remove_pointer_t<decltype(column)>>;
    Arena arena(scratch);
    Activation<T, In> source(x), target(y);
    source.set_panel(vectors(source.tokens), arena);
    const Support<T, Index> S(target.channels, source.channels, rows.const_data_ptr<int32_t>(), column,
                              widened<T>(values, arena), arena);
    for (int64_t first = 0; first < source.tokens; first += kPanel) {
      source.fill_panel(first);
      add_product(S, source, first, target);
    }
  });
}

void spmm_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& rows, const at::Tensor& columns,
                   const at::Tensor& values, at::Tensor& dx, at::Tensor& dvalues, at::Tensor& scratch) {
  check(dy, x, rows, columns, values);
  const bool need_x = dx.numel() > 0, need_values = dvalues.numel() > 0;
  if (need_values && x.size(0) == 0) dvalues.zero_();
  if (x.size(0) == 0 || values.numel() == 0 || !(need_x || need_values)) return;
  TORCH_CHECK(!need_x || (dx.is_contiguous() && dx.sizes() == x.sizes() && dx.scalar_type() == x.scalar_type()),
              "dx must be as x, contiguous");
  TORCH_CHECK(!need_values || (dvalues.is_contiguous() && dvalues.numel() == values.numel()),
              "dvalues must be as values, contiguous");
  with_types(x, columns, [&](auto in, auto wide, const auto* column) {
    using In = decltype(in);
    using T = decltype(wide);
    using Index = std::remove_const_t<std::remove_pointer_t<decltype(column)>>;
    Arena arena(scratch);
    Activation<T, In> left(dy), right(x);
    left.set_panel(vectors(left.tokens), arena);
    right.set_panel(vectors(left.tokens), arena);
    const Support<T, Index> S(left.channels, right.channels, rows.const_data_ptr<int32_t>(), column,
                              widened<T>(values, arena), arena);
    const bool direct = need_values && dvalues.scalar_type() == c10::CppTypeToScalarType<T>::value;
    T* samples = !need_values ? nullptr : direct ? dvalues.mutable_data_ptr<T>() : arena.take<T>(dvalues.numel());
    const auto run = [&](const auto& by_column, const Activation<T, In>& target) {
      for (int64_t first = 0; first < left.tokens; first += kPanel) {
        left.fill_panel(first);
        if (need_values) {
          right.fill_panel(first);
          add_samples(S, left, right, first, samples);
        }
        if (need_x) add_product(by_column, left, first, target);
      }
    };
    if (!need_x) {
      run(S, right);
    } else if (left.channels <= 65536) {
      run(transposed<uint16_t>(S, right.channels, arena), Activation<T, In>(dx));
    } else {
      run(transposed<int32_t>(S, right.channels, arena), Activation<T, In>(dx));
    }
    if (need_values && !direct) {
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dvalues.scalar_type(), "sltrain_spmm_backward", [&] {
        scalar_t* value = dvalues.mutable_data_ptr<scalar_t>();
        at::parallel_for(0, dvalues.numel(), 1 << 16, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) value[i] = static_cast<scalar_t>(samples[i]);
        });
      });
    }
  });
}

}  // namespace sltrain
