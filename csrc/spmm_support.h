// The sparse matrix in the layout of the products of spmm.cpp: values in the accumulation type, rows split into slabs
// of columns, and the same matrix in column order. All of it is allocated in the caller's scratch. Included only by
// spmm.cpp.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>

namespace sltrain {
namespace {

constexpr int64_t kSlab = 5632;     // columns of S processed together: their block should fit a second-level cache
constexpr int64_t kAlignment = 64;  // bytes

inline int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

inline int64_t slabs(int64_t columns) { return std::max<int64_t>(1, (columns + kSlab - 1) / kSlab); }

// Allocates aligned pieces of the caller's scratch.
class Arena {
 public:
  explicit Arena(const at::Tensor& scratch)
      : next_(reinterpret_cast<uintptr_t>(scratch.mutable_data_ptr())),
        end_(next_ + scratch.numel() * scratch.element_size()) {
    next_ = aligned(next_);
  }
  template <typename T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += aligned(count * sizeof(T));
    TORCH_CHECK(next_ <= end_, "the scratch is too small for the sparse product");
    return piece;
  }

 private:
  uintptr_t next_, end_;
};

template <typename T, typename Index>
struct Support {
  int64_t rows, width;
  const int32_t* pointers;
  const Index* columns;
  const T* values;
  int32_t* cuts;  // where each row starts in slabs 1, 2, ...

  Support(int64_t rows, int64_t width, const int32_t* pointers, const Index* columns, const T* values, Arena& arena)
      : rows(rows), width(width), pointers(pointers), columns(columns), values(values),
        cuts(arena.take<int32_t>((slabs(width) - 1) * rows)) {
    const int64_t count = slabs(width);
    at::parallel_for(0, count > 1 ? rows : 0, 256, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t s = 1; s < count; ++s) {
          const auto edge = static_cast<Index>(width * s / count);
          cuts[(s - 1) * rows + row] =
              std::lower_bound(columns + pointers[row], columns + pointers[row + 1], edge) - columns;
        }
      }
    });
  }
  const int32_t* begins(int64_t slab) const { return slab == 0 ? pointers : cuts + (slab - 1) * rows; }
  const int32_t* ends(int64_t slab) const { return slab == slabs(width) - 1 ? pointers + 1 : cuts + slab * rows; }
};

// values as T: the tensor's own if it has that type, else widened into the arena
template <typename T>
const T* widened(const at::Tensor& values, Arena& arena) {
  if (values.scalar_type() == c10::CppTypeToScalarType<T>::value) return values.const_data_ptr<T>();
  const int64_t count = values.numel();
  T* wide = arena.take<T>(count);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, values.scalar_type(), "sltrain_spmm", [&] {
    const scalar_t* value = values.const_data_ptr<scalar_t>();
    at::parallel_for(0, count, 1 << 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) wide[i] = static_cast<T>(value[i]);
    });
  });
  return wide;
}

// The same matrix in column order: column `c` of S is row `c` of the result, its entries in ascending row order.
template <typename Row, typename T, typename Index>
Support<T, Row> transposed(const Support<T, Index>& S, int64_t in_features, Arena& arena) {
  const int64_t nnz = S.pointers[S.rows];
  int32_t* pointers = arena.take<int32_t>(in_features + 1);
  int32_t* next = arena.take<int32_t>(in_features);
  Row* rows = arena.take<Row>(nnz);
  T* values = arena.take<T>(nnz);
  // a thread owns a range of columns and visits every row's entries in it
  const auto visit = [&](int64_t begin, int64_t end, const auto& body) {
    for (int64_t row = 0; row < S.rows; ++row) {
      const Index* first = S.columns + S.pointers[row];
      const Index* last = S.columns + S.pointers[row + 1];
      if (begin > 0) first = std::lower_bound(first, last, static_cast<Index>(begin));
      for (; first != last && static_cast<int64_t>(*first) < end; ++first) body(row, *first, first - S.columns);
    }
  };
  const int64_t grain = std::max<int64_t>(64, in_features * (1 << 15) / std::max<int64_t>(1, nnz));
  at::parallel_for(0, in_features, grain, [&](int64_t begin, int64_t end) {
    std::fill(next + begin, next + end, 0);
    visit(begin, end, [&](int64_t, Index column, int64_t) { ++next[column]; });
  });
  pointers[0] = 0;
  for (int64_t c = 0; c < in_features; ++c) pointers[c + 1] = pointers[c] + next[c];
  at::parallel_for(0, in_features, grain, [&](int64_t begin, int64_t end) {
    std::copy(pointers + begin, pointers + end, next + begin);
    visit(begin, end, [&](int64_t row, Index column, int64_t i) {
      const int32_t place = next[column]++;
      rows[place] = static_cast<Row>(row);
      values[place] = S.values[i];
    });
  });
  return {in_features, S.rows, pointers, rows, values, arena};
}

}  // namespace
}  // namespace sltrain
