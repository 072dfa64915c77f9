// Packing of bf16 matrices into tiles for the tile units (AMX): 1 KB each, 16 rows by 32 of k from the left matrix, 16
// pairs of k by 16 columns from the right one. Included only by gemm_amx.cpp, where the compiler supports AMX.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#define TILES __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")))
#define TILES_INLINE TILES inline __attribute__((always_inline))

namespace sltrain {
namespace {

constexpr int64_t kTile = 16;                  // rows of a tile, and pairs of k in one
constexpr int64_t kTileElements = kTile * 32;  // 1 KB of bf16

struct Matrix {  // element (i, j) at data[i * row + j * column]; one of the strides is 1
  const uint16_t* data;
  int64_t rows, columns, row, column;
};

TILES_INLINE __mmask32 first32(int64_t count) { return count >= 32 ? ~0u : (1u << std::max<int64_t>(0, count)) - 1; }
TILES_INLINE __mmask16 first16(int64_t count) { return static_cast<__mmask16>(first32(std::min<int64_t>(16, count))); }

TILES_INLINE void transpose(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // r[i + k]: lane l holds column 4 l + k of rows i ... i + 3
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    t[k] = _mm512_shuffle_i32x4(r[k], r[k + 4], 0x88), t[k + 4] = _mm512_shuffle_i32x4(r[k], r[k + 4], 0xdd);
    t[k + 8] = _mm512_shuffle_i32x4(r[k + 8], r[k + 12], 0x88);
    t[k + 12] = _mm512_shuffle_i32x4(r[k + 8], r[k + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    r[k] = _mm512_shuffle_i32x4(t[k], t[k + 8], 0x88), r[k + 8] = _mm512_shuffle_i32x4(t[k], t[k + 8], 0xdd);
    r[k + 4] = _mm512_shuffle_i32x4(t[k + 4], t[k + 12], 0x88);
    r[k + 12] = _mm512_shuffle_i32x4(t[k + 4], t[k + 12], 0xdd);
  }
}

// tile[i] = 32 neighbours at from + i * stride, i < rows; zero past `rows` or `width`
TILES_INLINE void load_rows(const uint16_t* from, int64_t stride, int64_t rows, int64_t width, __m512i (&tile)[16]) {
  const __mmask32 mask = first32(width);
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) {
    tile[i] = i < rows ? _mm512_maskz_loadu_epi16(mask, from + i * stride) : _mm512_setzero_si512();
  }
}

// tile[p] = pairs of 16 neighbours at from + 2 p * stride and from + (2 p + 1) * stride; zero past `rows` or `width`
TILES_INLINE void load_pairs(const uint16_t* from, int64_t stride, int64_t rows, int64_t width, __m512i (&tile)[16]) {
  const __mmask16 mask = first16(width);
#pragma GCC unroll 16
  for (int p = 0; p < kTile; ++p) {
    const __mmask16 even = 2 * p < rows ? mask : 0, odd = 2 * p + 1 < rows ? mask : 0;
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(even, from + 2 * p * stride));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd, from + (2 * p + 1) * stride));
    tile[p] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
}

TILES_INLINE void store_tile(const __m512i (&tile)[16], uint16_t* to) {
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) _mm512_store_si512(to + i * 32, tile[i]);
}

// 16 rows of a by 32 of k, rows by rows
TILES_INLINE void pack_left(const Matrix& a, int64_t row, int64_t k, uint16_t* to) {
  __m512i tile[16];
  const uint16_t* from = a.data + row * a.row + k * a.column;
  if (a.column == 1) {
    load_rows(from, a.row, a.rows - row, a.columns - k, tile);
  } else {
    load_pairs(from, a.column, a.columns - k, a.rows - row, tile);
    transpose(tile);
  }
  store_tile(tile, to);
}

// 32 of k by 16 columns of b, pairs of k side by side
TILES_INLINE void pack_right(const Matrix& b, int64_t k, int64_t column, uint16_t* to) {
  __m512i tile[16];
  const uint16_t* from = b.data + k * b.row + column * b.column;
  if (b.column == 1) {
    load_pairs(from, b.row, b.rows - k, b.columns - column, tile);
  } else {
    load_rows(from, b.column, b.columns - column, b.rows - k, tile);
    transpose(tile);
  }
  store_tile(tile, to);
}

}  // namespace
}  // namespace sltrain
