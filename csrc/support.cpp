// The support of S: drawing it, scatter-add of S into W, gather of dW.
// Rows are independent in all of them, so results do not depend on the number of threads.
// sample_support gives the same bits as sltrain_ds/ops/support.py, which documents the method.

#include "cpu.h"
#include "ops.h"

#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <mutex>
#include <vector>

namespace sltrain {
namespace {

constexpr int kRounds = 8;
constexpr int kBlock = 512;  // indices evaluated together
constexpr uint32_t kSmallestSide = 4;

uint64_t mix64(uint64_t z) {
  z += 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

inline uint32_t mix32(uint32_t h) {
  h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
  h = (h ^ (h >> 13)) * 0xC2B2AE35u;
  return h ^ (h >> 16);
}

inline uint32_t add_mod(uint32_t x, uint32_t h, uint32_t m) {
  const uint32_t sum = x + static_cast<uint32_t>((static_cast<uint64_t>(h) * m) >> 32);
  return sum >= m ? sum - m : sum;
}

// integers only: the same bits at every level
ANY_LEVEL void feistel(uint32_t* __restrict left, uint32_t* __restrict right, int n, uint32_t a, uint32_t b,
                       const uint32_t* __restrict keys) {
  for (int r = 0; r < kRounds; r += 2) {
    const uint32_t key0 = keys[r], key1 = keys[r + 1];
    for (int i = 0; i < n; ++i) {
      left[i] = add_mod(left[i], mix32(right[i] ^ key0), a);
      right[i] = add_mod(right[i], mix32(left[i] ^ key1), b);
    }
  }
}

// A keyed bijection of [0, size): the Feistel network on Z_a x Z_b, repeated for values that fall outside.
class Bijection {
 public:
  explicit Bijection(uint64_t size) : size_(size) {
    uint64_t root = static_cast<uint64_t>(std::sqrt(static_cast<double>(size)));
    while (root * root > size) --root;
    while ((root + 1) * (root + 1) <= size) ++root;
    a_ = std::max<uint64_t>(root, kSmallestSide);
    b_ = std::max<uint64_t>((size + a_ - 1) / a_, kSmallestSide);
  }

  void set_key(uint64_t key) {
    for (int r = 0; r < kRounds; ++r) keys_[r] = static_cast<uint32_t>(mix64(key + r) >> 32);
  }

  // out[i] = value at first + i, for i in [0, n), n <= kBlock
  void evaluate(uint64_t first, int n, uint64_t* out) const {
    uint32_t left[kBlock], right[kBlock];
    uint32_t l = static_cast<uint32_t>(first / b_), r = static_cast<uint32_t>(first % b_);
    for (int i = 0; i < n; ++i) {
      left[i] = l;
      right[i] = r;
      if (++r == b_) r = 0, ++l;
    }
    at_level<feistel>(left, right, n, a_, b_, keys_);
    for (int i = 0; i < n; ++i) out[i] = static_cast<uint64_t>(left[i]) * b_ + right[i];
    for (int i = 0; i < n; ++i) {
      while (out[i] >= size_) {
        uint32_t wl = static_cast<uint32_t>(out[i] / b_), wr = static_cast<uint32_t>(out[i] % b_);
        at_level<feistel>(&wl, &wr, 1, a_, b_, keys_);
        out[i] = static_cast<uint64_t>(wl) * b_ + wr;
      }
    }
  }

 private:
  uint64_t size_;
  uint32_t a_, b_;
  uint32_t keys_[kRounds] = {};
};

std::vector<int64_t> row_counts(int64_t out_features, int64_t in_features, int64_t nnz, uint64_t key) {
  std::vector<int64_t> counts(out_features, 0);
  Bijection bijection(static_cast<uint64_t>(out_features) * in_features);
  bijection.set_key(key);
  std::mutex merge;
  at::parallel_for(0, (nnz + kBlock - 1) / kBlock, 64, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> mine(out_features, 0);
    uint64_t cells[kBlock];
    for (int64_t block = begin; block < end; ++block) {
      const int n = static_cast<int>(std::min<int64_t>(kBlock, nnz - block * kBlock));
      bijection.evaluate(block * kBlock, n, cells);
      for (int i = 0; i < n; ++i) ++mine[cells[i] / in_features];
    }
    std::lock_guard<std::mutex> guard(merge);
    for (int64_t row = 0; row < out_features; ++row) counts[row] += mine[row];
  });
  return counts;
}

template <typename Column>
void draw_columns(const int32_t* rows, Column* columns, int64_t out_features, int64_t in_features, uint64_t key) {
  at::parallel_for(0, out_features, 16, [&](int64_t begin, int64_t end) {
    Bijection bijection(in_features);
    std::vector<uint64_t> seen((in_features + 63) / 64, 0);  // reading a bitmap in order sorts
    uint64_t drawn[kBlock];
    for (int64_t row = begin; row < end; ++row) {
      const int64_t count = rows[row + 1] - rows[row];
      bijection.set_key(mix64(key ^ static_cast<uint64_t>(row)));
      for (int64_t first = 0; first < count; first += kBlock) {
        const int n = static_cast<int>(std::min<int64_t>(kBlock, count - first));
        bijection.evaluate(first, n, drawn);
        for (int i = 0; i < n; ++i) seen[drawn[i] >> 6] |= 1ull << (drawn[i] & 63);
      }
      Column* next = columns + rows[row];
      for (size_t word = 0; word < seen.size(); ++word) {
        for (uint64_t bits = seen[word]; bits; bits &= bits - 1) {
          *next++ = static_cast<Column>(word * 64 + __builtin_ctzll(bits));
        }
        seen[word] = 0;
      }
    }
  });
}

// Calls body(row, first, last) in parallel; one thread processes a whole row.
template <typename Body>
void for_each_row(const at::Tensor& rows, const Body& body) {
  const int32_t* pointers = rows.const_data_ptr<int32_t>();
  const int64_t out_features = rows.numel() - 1;
  const int64_t per_row = pointers[out_features] / std::max<int64_t>(1, out_features) + 1;
  at::parallel_for(0, out_features, std::max<int64_t>(1, 16384 / per_row), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row, pointers[row], pointers[row + 1]);
  });
}

template <typename Body>
void with_columns(const at::Tensor& columns, const Body& body) {
  if (columns.scalar_type() == at::kUInt16) return body(columns.const_data_ptr<uint16_t>());
  body(columns.const_data_ptr<int32_t>());
}

void check(const at::Tensor& W, const at::Tensor& rows, const at::Tensor& columns, const at::Tensor& values) {
  // shapes only: positions were checked when the support was built
  TORCH_CHECK(W.dim() == 2 && W.is_contiguous(), "W must be a contiguous matrix");
  TORCH_CHECK(rows.scalar_type() == at::kInt && rows.numel() == W.size(0) + 1, "S_rows must be int32 (out + 1,)");
  TORCH_CHECK(columns.scalar_type() == at::kUInt16 || columns.scalar_type() == at::kInt,
              "S_columns must be uint16 or int32");
  TORCH_CHECK(values.numel() == columns.numel(), "S_columns and the values differ in length");
  TORCH_CHECK(rows.is_contiguous() && columns.is_contiguous() && values.is_contiguous(),
              "the support must be contiguous");
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> sample_support(int64_t out_features, int64_t in_features, int64_t nnz,
                                                  int64_t count_key, int64_t column_key) {
  auto rows = at::empty({out_features + 1}, at::kInt);
  auto columns = at::empty({nnz}, in_features <= 65536 ? at::kUInt16 : at::kInt);
  int32_t* pointers = rows.mutable_data_ptr<int32_t>();
  pointers[0] = 0;
  if (nnz > 0) {
    const auto counts = row_counts(out_features, in_features, nnz, static_cast<uint64_t>(count_key));
    for (int64_t row = 0; row < out_features; ++row) {
      pointers[row + 1] = pointers[row] + static_cast<int32_t>(counts[row]);
    }
  } else {
    std::fill_n(pointers, out_features + 1, 0);
  }
  const auto key = static_cast<uint64_t>(column_key);
  if (columns.scalar_type() == at::kUInt16) {
    draw_columns(pointers, columns.mutable_data_ptr<uint16_t>(), out_features, in_features, key);
  } else {
    draw_columns(pointers, columns.mutable_data_ptr<int32_t>(), out_features, in_features, key);
  }
  return {rows, columns};
}

void scatter_add(at::Tensor& W, const at::Tensor& rows, const at::Tensor& columns, const at::Tensor& values) {
  check(W, rows, columns, values);
  const int64_t in_features = W.size(1);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, W.scalar_type(), "sltrain_scatter_add", [&] {
    using weight_t = scalar_t;
    weight_t* weight = W.mutable_data_ptr<weight_t>();
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, values.scalar_type(), "sltrain_scatter_add", [&] {
      // one rounding: the sum is computed in fp32, or in fp64 if either side is
      using wide_t =
          std::conditional_t<std::is_same_v<weight_t, double> || std::is_same_v<scalar_t, double>, double, float>;
      const scalar_t* value = values.const_data_ptr<scalar_t>();
      with_columns(columns, [&](const auto* column) {
        for_each_row(rows, [=](int64_t row, int64_t first, int64_t last) {
          weight_t* target = weight + row * in_features;
          for (int64_t i = first; i < last; ++i) {
            target[column[i]] =
                static_cast<weight_t>(static_cast<wide_t>(target[column[i]]) + static_cast<wide_t>(value[i]));
          }
        });
      });
    });
  });
}

void gather(at::Tensor& out, const at::Tensor& W, const at::Tensor& rows, const at::Tensor& columns) {
  check(W, rows, columns, out);
  const int64_t in_features = W.size(1);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, W.scalar_type(), "sltrain_gather", [&] {
    using weight_t = scalar_t;
    const weight_t* weight = W.const_data_ptr<weight_t>();
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, out.scalar_type(), "sltrain_gather", [&] {
      scalar_t* value = out.mutable_data_ptr<scalar_t>();
      with_columns(columns, [&](const auto* column) {
        for_each_row(rows, [=](int64_t row, int64_t first, int64_t last) {
          const weight_t* source = weight + row * in_features;
          for (int64_t i = first; i < last; ++i) value[i] = static_cast<scalar_t>(source[column[i]]);
        });
      });
    });
  });
}

}  // namespace sltrain
