// out = alpha a b (+ out, or + bias) in bf16 on a CPU's tile units (AMX), for products where that is faster than the
// library: small ones, for which a library call costs more than the arithmetic, and those with a column-major a
// (gradients of weights), which the library transposes first. Sums are accumulated in fp32 in the order of k,
// independent of the number of threads, and rounded once.

#include "cpu.h"
#include "ops.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <memory>

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)

#include "gemm_amx_tiles.h"

#include <immintrin.h>

namespace sltrain {
namespace {

constexpr int64_t kSide = 32;           // side of a block of out: two by two tiles
constexpr int64_t kSmall = 1 << 26;     // multiply-adds up to which the library is slower for any layout
constexpr int64_t kDeep = 64;           // blocks of k per pass: a panel of that many stays in the cache
constexpr int64_t kLargest = 16 << 20;  // bytes of packed b, and of partial sums kept between passes
constexpr int64_t kGroup = 512 << 10;   // bytes of a used together
constexpr int64_t kWorth = 6 << 20;     // multiply-adds from which threads share a product

// Reusable buffer that only grows; one per thread.
template <typename T>
class Scratch {
 public:
  T* take(int64_t count) {
    if (capacity_ < count + 64) buffer_.reset(new T[capacity_ = count + 64]);
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(buffer_.get()) + 63) / 64 * 64);
  }

 private:
  std::unique_ptr<T[]> buffer_;
  int64_t capacity_ = 0;
};

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

TILES_INLINE void clear_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

TILES_INLINE void load_sums(const float* sums) {
  _tile_loadd(0, sums, 128);
  _tile_loadd(1, sums + 16, 128);
  _tile_loadd(2, sums + 16 * 32, 128);
  _tile_loadd(3, sums + 16 * 32 + 16, 128);
}

// sums (32, 32) += (upper, lower) right: tiles of a have rows `stride` apart and are `step` elements from each other
TILES_INLINE void multiply(const uint16_t* upper, const uint16_t* lower, int64_t stride, int64_t step,
                           const uint16_t* right, int64_t blocks) {
  for (int64_t block = 0; block < blocks; ++block) {
    _tile_loadd(4, upper, 2 * stride);
    _tile_loadd(6, right, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right + kTileElements, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, lower, 2 * stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    upper += step, lower += step, right += 2 * kTileElements;
  }
}

TILES_INLINE void store_sums(float* sums) {
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + 16, 128);
  _tile_stored(2, sums + 16 * 32, 128);
  _tile_stored(3, sums + 16 * 32 + 16, 128);
}

TILES_INLINE __m512 widened(__m256i half) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// out (rows, columns) = alpha sums (+ out, or + bias), rounded to nearest even
template <bool kOther>
TILES_INLINE void finish(const float* sums, int64_t rows, int64_t columns, float alpha, bool add, const uint16_t* bias,
                         uint16_t* out, int64_t stride) {
  const __mmask32 mask = first32(columns);
  const __m512 scale = _mm512_set1_ps(alpha);
  __m512i other = kOther && !add ? _mm512_maskz_loadu_epi16(mask, bias) : _mm512_setzero_si512();
  for (int64_t r = 0; r < rows; ++r, sums += kSide, out += stride) {
    __m512 low = _mm512_mul_ps(_mm512_load_ps(sums), scale), high = _mm512_mul_ps(_mm512_load_ps(sums + 16), scale);
    if constexpr (kOther) {
      if (add) other = _mm512_maskz_loadu_epi16(mask, out);
      low = _mm512_add_ps(low, widened(_mm512_castsi512_si256(other)));
      high = _mm512_add_ps(high, widened(_mm512_extracti64x4_epi64(other, 1)));
    }
    _mm512_mask_storeu_epi16(out, mask, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
  }
}

struct Product {
  Matrix a, b;
  float alpha;
  bool add;
  const uint16_t* bias;
  uint16_t* out;
  int64_t stride;
  const uint16_t* packed;  // current blocks of b, in panels of 32 columns
  float* waiting;          // partial sums (32, 32) of each block of out, if k needs several passes

  int64_t panels() const { return (b.columns + kSide - 1) / kSide; }
};

// Blocks [begin, end) of k, for rows [first, last) and panels [left, right) of out.
TILES void run(const Product& p, int64_t begin, int64_t end, int64_t first, int64_t last, int64_t left, int64_t right) {
  static const TileConfig config;
  static thread_local Scratch<uint16_t> buffer;
  _tile_loadconfig(&config);
  const Matrix& a = p.a;
  const int64_t blocks = end - begin, height = blocks * 2 * kTileElements;  // of a panel: upper tiles, lower tiles
  // whole tiles of a row-major a are read in place; partial tiles, and any other a, are packed first
  const auto read = [&](int64_t row) {
    return a.column == 1 && row + kSide <= a.rows ? std::min(end, a.columns / 32) - begin : 0;
  };
  uint16_t* panels = buffer.take((last - first + kSide - 1) / kSide * height);
  const auto pack = [&](int64_t row, int64_t block) TILES {
    uint16_t* to = panels + (row - first) / kSide * height + block * kTileElements;
    pack_left(a, row, (begin + block) * 32, to);
    pack_left(a, std::min(row + kTile, a.rows), (begin + block) * 32, to + blocks * kTileElements);
  };
  if (a.column == 1) {
    for (int64_t row = first; row < last; row += kSide) {
      for (int64_t block = read(row); block < blocks; ++block) pack(row, block);
    }
  } else {
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t row = first; row < last; row += kSide) pack(row, block);
    }
  }
  const bool done = end * 32 >= a.columns;
  alignas(64) float sums[kSide * kSide];
  for (int64_t panel = left; panel < right; ++panel) {
    const uint16_t* other = p.packed + panel * height;
    const int64_t column = panel * kSide;
    for (int64_t row = first; row < last; row += kSide) {
      const int64_t whole = read(row);
      const uint16_t* in_place = a.data + row * a.row + begin * 32;
      const uint16_t* upper = panels + (row - first) / kSide * height + whole * kTileElements;
      float* waiting = p.waiting + (row / kSide * p.panels() + panel) * kSide * kSide;
      if (begin == 0) {
        clear_sums();
      } else {
        load_sums(waiting);
      }
      multiply(in_place, in_place + kTile * a.row, a.row, 32, other, whole);
      multiply(upper, upper + blocks * kTileElements, 32, kTileElements, other + whole * 2 * kTileElements,
               blocks - whole);
      store_sums(done ? sums : waiting);
      if (!done) continue;
      const int64_t rows = std::min(kSide, a.rows - row), columns = std::min(kSide, p.b.columns - column);
      uint16_t* to = p.out + row * p.stride + column;
      if (p.add || p.bias) {
        finish<true>(sums, rows, columns, p.alpha, p.add, p.bias ? p.bias + column : nullptr, to, p.stride);
      } else {
        finish<false>(sums, rows, columns, p.alpha, false, nullptr, to, p.stride);
      }
    }
  }
  _tile_release();
}

// Packs blocks [begin, end) of k of b's panels [left, right), each panel's blocks contiguous; reads b in memory order.
TILES void pack_panels(const Matrix& b, int64_t begin, int64_t end, int64_t left, int64_t right, uint16_t* packed) {
  const int64_t blocks = end - begin;
  const auto pack = [&](int64_t panel, int64_t block) TILES {
    uint16_t* to = packed + (panel * blocks + block) * 2 * kTileElements;
    pack_right(b, (begin + block) * 32, panel * kSide, to);
    pack_right(b, (begin + block) * 32, std::min(panel * kSide + kTile, b.columns), to + kTileElements);
  };
  if (b.column == 1) {
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t panel = left; panel < right; ++panel) pack(panel, block);
    }
  } else {
    for (int64_t panel = left; panel < right; ++panel) {
      for (int64_t block = 0; block < blocks; ++block) pack(panel, block);
    }
  }
}

Matrix matrix(const at::Tensor& x) {
  return {static_cast<const uint16_t*>(x.const_data_ptr()), x.size(0), x.size(1), x.stride(0), x.stride(1)};
}

}  // namespace

bool gemm_amx(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, double alpha, bool add,
              const std::optional<at::Tensor>& bias) {
  const bool available = cpu_level() >= CpuLevel::kAmx;
  const int64_t M = out.size(0), N = out.size(1), K = a.size(1);
  const auto fits = [](const at::Tensor& x) {
    return x.scalar_type() == at::kBFloat16 && (x.stride(0) == 1 || x.stride(1) == 1);
  };
  if (!available || !fits(a) || !fits(b) || out.scalar_type() != at::kBFloat16 || out.stride(1) != 1) return false;
  if (bias && (bias->scalar_type() != at::kBFloat16 || !bias->is_contiguous())) return false;
  const int64_t blocks = (K + 31) / 32, together = std::min(blocks, kDeep);
  const int64_t panels = (N + kSide - 1) / kSide, heights = (M + kSide - 1) / kSide;
  const int64_t size = panels * together * 2 * kTileElements;
  const int64_t waiting = blocks > kDeep ? heights * panels * kSide * kSide : 0;
  const bool by_columns = a.stride(1) != 1 && M > 1;
  if (K == 0 || size * 2 > kLargest || waiting * 4 > kLargest || (M * N * K > kSmall && !by_columns)) return false;
  static thread_local Scratch<uint16_t> buffer;
  static thread_local Scratch<float> sums;
  uint16_t* packed = buffer.take(size);
  const float scale = static_cast<float>(alpha);
  const auto* row = bias ? static_cast<const uint16_t*>(bias->const_data_ptr()) : nullptr;
  auto* to = static_cast<uint16_t*>(out.mutable_data_ptr());
  const Product product{matrix(a), matrix(b), scale, add, row, to, out.stride(0), packed, sums.take(waiting)};
  const int64_t threads = M * N * K >= kWorth ? at::get_num_threads() : 1;
  // groups of rows that fit the cache; if there are fewer of them than threads, columns are split too
  const int64_t most = std::max<int64_t>(1, kGroup / (together * 4 * kTileElements));
  const int64_t group = std::clamp<int64_t>((heights + threads - 1) / threads, 1, most);
  const int64_t groups = (heights + group - 1) / group;
  const int64_t across = groups >= threads ? 1 : std::min(panels, (threads + groups - 1) / groups);
  for (int64_t begin = 0; begin < blocks; begin += kDeep) {
    const int64_t end = std::min(blocks, begin + kDeep);
    const auto pack = [&](int64_t left, int64_t right) { pack_panels(product.b, begin, end, left, right, packed); };
    const auto multiply_tasks = [&](int64_t from, int64_t to) {
      for (int64_t task = from; task < to; ++task) {
        const int64_t first = task / across * group * kSide, part = task % across;
        run(product, begin, end, first, std::min(M, first + group * kSide), panels * part / across,
            panels * (part + 1) / across);
      }
    };
    if (threads == 1) {
      pack(0, panels), multiply_tasks(0, groups * across);
    } else {
      at::parallel_for(0, panels, std::max<int64_t>(1, 64 / (end - begin)), pack);
      at::parallel_for(0, groups * across, 1, multiply_tasks);
    }
  }
  return true;
}

}  // namespace sltrain

#else

namespace sltrain {
bool gemm_amx(at::Tensor&, const at::Tensor&, const at::Tensor&, double, bool, const std::optional<at::Tensor>&) {
  return false;
}
}  // namespace sltrain

#endif
