// The inner loops of the sparse products. Included by spmm.cpp once for each instruction set, with KERNEL_ISA (a
// namespace) and KERNEL_TARGET (a function attribute) set; so it has no include guard.
//
// A block holds the tokens of one activation, transposed: block[channel * width + token], width = V vectors of 64 bytes.
// Every non-zero of S is then V vector multiply-adds on contiguous memory, and a row's sums stay in registers.

namespace sltrain {
namespace {
namespace KERNEL_ISA {

#define KERNEL KERNEL_TARGET static
#define KERNEL_INLINE KERNEL_TARGET static inline __attribute__((always_inline))

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(64), may_alias));
  static constexpr int lanes = 64 / sizeof(T);
};

// out[(row - first) * width ...] = sum of value * block[column], rows [first, last)
template <int V, typename T, typename Index>
KERNEL void multiply(const T* block, const int32_t* pointers, const Index* columns, const T* values, int64_t first,
                     int64_t last, T* out) {
  using vec = typename Vector<T>::type;
  constexpr int W = V * Vector<T>::lanes;
  constexpr int U = KERNEL_ACCUMULATORS / V > 1 ? KERNEL_ACCUMULATORS / V : 1;  // non-zeros in flight
  for (int64_t row = first; row < last; ++row, out += W) {
    vec sums[U][V];
    for (int u = 0; u < U; ++u) {
      for (int v = 0; v < V; ++v) sums[u][v] = vec{};
    }
    int64_t i = pointers[row];
    const int64_t end = pointers[row + 1];
    for (; i + U <= end; i += U) {
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) {
        const vec* source = reinterpret_cast<const vec*>(block + static_cast<size_t>(columns[i + u]) * W);
        const T value = values[i + u];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[u][v] += value * source[v];
      }
    }
    for (; i < end; ++i) {
      const vec* source = reinterpret_cast<const vec*>(block + static_cast<size_t>(columns[i]) * W);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[0][v] += values[i] * source[v];
    }
#pragma GCC unroll 8
    for (int u = 1; u < U; ++u) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[0][v] += sums[u][v];
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) reinterpret_cast<vec*>(out)[v] = sums[0][v];
  }
}

// out[j] (+)= sum of parts[j * lanes ...], j < count
template <typename T>
KERNEL_INLINE void reduce(const T* parts, int count, bool add, T* out) {
  constexpr int lanes = Vector<T>::lanes;
  typedef T quad __attribute__((vector_size(4 * sizeof(T)), may_alias));
  for (int j = 0; j < count; ++j) {
    const quad* part = reinterpret_cast<const quad*>(parts + j * lanes);
    quad sum = part[0];
    for (int q = 1; q < lanes / 4; ++q) sum += part[q];
    const T total = (sum[0] + sum[2]) + (sum[1] + sum[3]);
    out[j] = add ? out[j] + total : total;
  }
}

// out[i] (+)= dot of row_block[row] and column_block[column] over the block's tokens, every non-zero i of [first, last)
template <int V, typename T, typename Index>
KERNEL void sample(const T* row_block, const T* column_block, const int32_t* pointers, const Index* columns,
                   int64_t first, int64_t last, bool add, T* out) {
  using vec = typename Vector<T>::type;
  constexpr int lanes = Vector<T>::lanes, W = V * lanes;
  alignas(64) T parts[lanes * lanes];
  int64_t i = pointers[first];
  int filled = 0;
  for (int64_t row = first; row < last; ++row) {
    const vec* left = reinterpret_cast<const vec*>(row_block + row * W);
    vec mine[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) mine[v] = left[v];
    for (const int64_t end = pointers[row + 1]; i < end; ++i) {
      const vec* right = reinterpret_cast<const vec*>(column_block + static_cast<size_t>(columns[i]) * W);
      vec sum = mine[0] * right[0];
#pragma GCC unroll 4
      for (int v = 1; v < V; ++v) sum += mine[v] * right[v];
      reinterpret_cast<vec*>(parts)[filled] = sum;
      if (++filled == lanes) {
        reduce(parts, lanes, add, out + i + 1 - lanes);
        filled = 0;
      }
    }
  }
  reduce(parts, filled, add, out + i - filled);
}

template <typename T>
struct Quad {
  typedef T type __attribute__((vector_size(4 * sizeof(T)), may_alias));
  typedef T loose __attribute__((vector_size(4 * sizeof(T)), may_alias, aligned(sizeof(T))));
};
typedef uint16_t Half4 __attribute__((vector_size(8), may_alias, aligned(2)));
typedef uint32_t Word4 __attribute__((vector_size(16), may_alias));

// four neighbours as T; bf16 widens by a shift and rounds to nearest even
KERNEL_INLINE Quad<float>::type load4(const float* from) { return *reinterpret_cast<const Quad<float>::loose*>(from); }
KERNEL_INLINE Quad<double>::type load4(const double* from) {
  return *reinterpret_cast<const Quad<double>::loose*>(from);
}
KERNEL_INLINE Quad<float>::type load4(const at::BFloat16* from) {
  const Half4 bits = *reinterpret_cast<const Half4*>(from);
  return (Quad<float>::type)(__builtin_convertvector(bits, Word4) << 16);
}
KERNEL_INLINE Quad<float>::type load4(const at::Half* from) {
  return Quad<float>::type{static_cast<float>(from[0]), static_cast<float>(from[1]), static_cast<float>(from[2]),
                           static_cast<float>(from[3])};
}
KERNEL_INLINE void store4(float* to, Quad<float>::type what) { *reinterpret_cast<Quad<float>::loose*>(to) = what; }
KERNEL_INLINE void store4(double* to, Quad<double>::type what) { *reinterpret_cast<Quad<double>::loose*>(to) = what; }
KERNEL_INLINE void store4(at::BFloat16* to, Quad<float>::type what) {
  const Word4 bits = (Word4)what;
  const Word4 rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const Word4 quiet = (bits >> 16) | 0x40;  // a NaN must not round to infinity
  const Word4 nan = (Word4)((bits & 0x7FFFFFFF) > 0x7F800000);
  *reinterpret_cast<Half4*>(to) = __builtin_convertvector((nan & quiet) | (~nan & rounded), Half4);
}
KERNEL_INLINE void store4(at::Half* to, Quad<float>::type what) {
  for (int i = 0; i < 4; ++i) to[i] = static_cast<at::Half>(what[i]);
}

template <typename I, typename Q>
KERNEL_INLINE void transpose4(Q& a, Q& b, Q& c, Q& d) {  // I: an integer as wide as Q's elements
  typedef I Mask __attribute__((vector_size(4 * sizeof(I))));
  const Q ab0 = SHUFFLE(a, b, 0, 4, 1, 5), ab1 = SHUFFLE(a, b, 2, 6, 3, 7);
  const Q cd0 = SHUFFLE(c, d, 0, 4, 1, 5), cd1 = SHUFFLE(c, d, 2, 6, 3, 7);
  a = SHUFFLE(ab0, cd0, 0, 1, 4, 5), b = SHUFFLE(ab0, cd0, 2, 3, 6, 7);
  c = SHUFFLE(ab1, cd1, 0, 1, 4, 5), d = SHUFFLE(ab1, cd1, 2, 3, 6, 7);
}
KERNEL_INLINE void transpose(Quad<float>::type& a, Quad<float>::type& b, Quad<float>::type& c, Quad<float>::type& d) {
  transpose4<int32_t>(a, b, c, d);
}
KERNEL_INLINE void transpose(Quad<double>::type& a, Quad<double>::type& b, Quad<double>::type& c,
                             Quad<double>::type& d) {
  transpose4<int64_t>(a, b, c, d);
}

// block[channel * width + token] = x[token * stride + channel], channels [first, last); tokens past `tokens` are zero
template <typename T, typename In>
KERNEL void fill_block(const In* x, int64_t stride, int tokens, int width, int64_t first, int64_t last, T* block) {
  constexpr int64_t kLine = 64 / sizeof(In);
  const int whole = tokens / 4 * 4;
  for (int64_t line = first; line < last; line += kLine) {
    const int64_t end = std::min(line + kLine, last), quads = line + (end - line) / 4 * 4;
    for (int t = 0; t < whole; t += 4) {
      const In* row = x + t * stride;
      for (int64_t c = line; c < quads; c += 4) {
        auto q0 = load4(row + c), q1 = load4(row + stride + c), q2 = load4(row + 2 * stride + c),
             q3 = load4(row + 3 * stride + c);
        transpose(q0, q1, q2, q3);
        T* to = block + c * width + t;
        store4(to, q0), store4(to + width, q1), store4(to + 2 * width, q2), store4(to + 3 * width, q3);
      }
      for (int64_t c = quads; c < end; ++c) {
        for (int k = 0; k < 4; ++k) block[c * width + t + k] = static_cast<T>(row[k * stride + c]);
      }
    }
    for (int64_t c = line; c < end; ++c) {
      for (int t = whole; t < tokens; ++t) block[c * width + t] = static_cast<T>(x[t * stride + c]);
      for (int t = tokens; t < width; ++t) block[c * width + t] = 0;
    }
  }
}

// y[token * stride + channel] += sums[channel * width + token]
template <typename T, typename Out>
KERNEL void add_sums(const T* sums, int channels, int width, int tokens, int64_t stride, Out* y) {
  const int quads = channels / 4 * 4, whole = tokens / 4 * 4;
  for (int t = 0; t < whole; t += 4) {
    Out* row = y + t * stride;
    for (int c = 0; c < quads; c += 4) {
      const T* from = sums + c * width + t;
      auto q0 = load4(from), q1 = load4(from + width), q2 = load4(from + 2 * width), q3 = load4(from + 3 * width);
      transpose(q0, q1, q2, q3);
      store4(row + c, load4(row + c) + q0);
      store4(row + stride + c, load4(row + stride + c) + q1);
      store4(row + 2 * stride + c, load4(row + 2 * stride + c) + q2);
      store4(row + 3 * stride + c, load4(row + 3 * stride + c) + q3);
    }
  }
  for (int t = 0; t < tokens; ++t) {
    for (int c = t < whole ? quads : 0; c < channels; ++c) {
      y[t * stride + c] = static_cast<Out>(static_cast<T>(y[t * stride + c]) + sums[c * width + t]);
    }
  }
}

#undef KERNEL
#undef KERNEL_INLINE

}  // namespace KERNEL_ISA
}  // namespace
}  // namespace sltrain
