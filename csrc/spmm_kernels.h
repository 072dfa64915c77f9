// Inner loops of the sparse products. Included by spmm.cpp once per instruction set, with KERNEL_ISA (a namespace) and
// KERNEL_TARGET (a function attribute) set; so it has no include guard.
//
// A block holds the tokens of one activation, transposed: block[channel * width + token], width = V vectors of 64
// bytes. Every non-zero of S then takes V vector multiply-adds on contiguous memory, and a row's sums stay in
// registers. The bottleneck is the second-level cache, so bf16 is stored unconverted, two tokens in a word (Pair), and
// widened in registers.

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

// the tokens of one channel of a block, stored singly or in Pairs
template <int V, typename T, typename Panel>
KERNEL_INLINE void tokens_of(const Panel* block, size_t channel, typename Vector<T>::type (&out)[V]) {
  using vec = typename Vector<T>::type;
  using words = Vector<uint32_t>::type;
  if constexpr (std::is_same_v<Panel, Pair>) {
    const words* from = reinterpret_cast<const words*>(block) + channel * (V / 2);
#pragma GCC unroll 2
    for (int v = 0; v < V / 2; ++v) out[2 * v] = (vec)(from[v] << 16), out[2 * v + 1] = (vec)(from[v] & 0xFFFF0000u);
  } else {
    const vec* from = reinterpret_cast<const vec*>(block) + channel * V;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) out[v] = from[v];
  }
}

// out[(row - first) * width ...] (+)= sum of value * block[column] over [begins[row], ends[row]), rows [first, last)
template <int V, typename T, typename Panel, typename Index>
KERNEL void multiply(const Panel* block, const int32_t* begins, const int32_t* ends, const Index* columns,
                     const T* values, int64_t first, int64_t last, bool add, T* out) {
  using vec = typename Vector<T>::type;
  constexpr int W = V * Vector<T>::lanes;
  constexpr int U = KERNEL_ACCUMULATORS / V > 1 ? KERNEL_ACCUMULATORS / V : 1;  // non-zeros in flight
  for (int64_t row = first; row < last; ++row, out += W) {
    vec sums[U][V];
    for (int u = 0; u < U; ++u) {
      for (int v = 0; v < V; ++v) sums[u][v] = add && u == 0 ? reinterpret_cast<const vec*>(out)[v] : vec{};
    }
    int64_t i = begins[row];
    const int64_t end = ends[row];
    for (; i + U <= end; i += U) {
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) {
        vec source[V];
        tokens_of<V, T>(block, columns[i + u], source);
        const T value = values[i + u];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[u][v] += value * source[v];
      }
    }
    for (; i < end; ++i) {
      vec source[V];
      tokens_of<V, T>(block, columns[i], source);
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

// -- transposing activations into blocks and back: tiles of kTile x kTile floats, in registers

constexpr int kTile = KERNEL_LANES;
typedef float Row __attribute__((vector_size(4 * kTile), may_alias));
typedef float LooseRow __attribute__((vector_size(4 * kTile), may_alias, aligned(4)));
typedef uint32_t Words __attribute__((vector_size(4 * kTile), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * kTile), may_alias, aligned(2)));

// kTile neighbours as floats; bf16 widens by a shift and rounds to nearest even
KERNEL_INLINE Row load(const float* from) { return *reinterpret_cast<const LooseRow*>(from); }
KERNEL_INLINE Row load(const at::BFloat16* from) {
  return (Row)(__builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words) << 16);
}
KERNEL_INLINE Row load(const at::Half* from) {
  Row row;
  for (int i = 0; i < kTile; ++i) row[i] = static_cast<float>(from[i]);
  return row;
}
KERNEL_INLINE void store(float* to, Row row) { *reinterpret_cast<LooseRow*>(to) = row; }
KERNEL_INLINE void store(at::BFloat16* to, Row row) {
  const Words bits = (Words)row;
  const Words rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const Words quiet = (bits >> 16) | 0x40;  // a NaN must not round to infinity
  const Words nan = (Words)((bits & 0x7FFFFFFF) > 0x7F800000);
  *reinterpret_cast<Halves*>(to) = __builtin_convertvector((nan & quiet) | (~nan & rounded), Halves);
}
KERNEL_INLINE void store(at::Half* to, Row row) {
  for (int i = 0; i < kTile; ++i) to[i] = static_cast<at::Half>(row[i]);
}

// Which element of (a, b) goes to position i, in lanes of four: pairs of single elements, pairs of pairs, whole lanes.
template <int High>
struct Singles {
  static constexpr int at(int i) { return (i % 2) * kTile + i / 4 * 4 + 2 * High + i % 4 / 2; }
};
template <int High>
struct Doubles {
  static constexpr int at(int i) { return (i % 4 / 2) * kTile + i / 4 * 4 + 2 * High + i % 2; }
};
template <int Odd>
struct Lanes {
  static constexpr int half = kTile >= 8 ? kTile / 8 : 1;
  static constexpr int at(int i) { return i / 4 / half * kTile + (i / 4 % half * 2 + Odd) * 4 + i % 4; }
};
template <typename Pattern, size_t... I>
KERNEL_INLINE Row pick(Row a, Row b, std::index_sequence<I...>) {
  typedef int32_t Mask __attribute__((vector_size(4 * kTile)));
  return SHUFFLE(a, b, Pattern::at(I)...);
}
template <typename Pattern>
KERNEL_INLINE Row pick(Row a, Row b) {
  return pick<Pattern>(a, b, std::make_index_sequence<kTile>());
}

KERNEL_INLINE void transpose(Row (&r)[kTile]) {
  Row q[kTile];  // q[4 g + k]: lane l holds column 4 l + k of rows 4 g ... 4 g + 3
#pragma GCC unroll 4
  for (int g = 0; g < kTile; g += 4) {
    const Row low01 = pick<Singles<0>>(r[g], r[g + 1]), high01 = pick<Singles<1>>(r[g], r[g + 1]);
    const Row low23 = pick<Singles<0>>(r[g + 2], r[g + 3]), high23 = pick<Singles<1>>(r[g + 2], r[g + 3]);
    q[g] = pick<Doubles<0>>(low01, low23), q[g + 1] = pick<Doubles<1>>(low01, low23);
    q[g + 2] = pick<Doubles<0>>(high01, high23), q[g + 3] = pick<Doubles<1>>(high01, high23);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    if constexpr (kTile == 4) {
      r[k] = q[k];
    } else if constexpr (kTile == 8) {
      r[k] = pick<Lanes<0>>(q[k], q[4 + k]), r[4 + k] = pick<Lanes<1>>(q[k], q[4 + k]);
    } else {
      const Row even01 = pick<Lanes<0>>(q[k], q[4 + k]), odd01 = pick<Lanes<1>>(q[k], q[4 + k]);
      const Row even23 = pick<Lanes<0>>(q[8 + k], q[12 + k]), odd23 = pick<Lanes<1>>(q[8 + k], q[12 + k]);
      r[k] = pick<Lanes<0>>(even01, even23), r[8 + k] = pick<Lanes<1>>(even01, even23);
      r[4 + k] = pick<Lanes<0>>(odd01, odd23), r[12 + k] = pick<Lanes<1>>(odd01, odd23);
    }
  }
}

// element j: the sum of r[j]
KERNEL_INLINE Row add_across(Row (&r)[kTile]) {
  Row g[kTile / 4];  // lane l of g[k], element j: lane l of r[4 k + j], summed
#pragma GCC unroll 4
  for (int k = 0; k < kTile / 4; ++k) {
    Row *a = r + 4 * k, ab = pick<Singles<0>>(a[0], a[1]) + pick<Singles<1>>(a[0], a[1]);
    const Row cd = pick<Singles<0>>(a[2], a[3]) + pick<Singles<1>>(a[2], a[3]);
    g[k] = pick<Doubles<0>>(ab, cd) + pick<Doubles<1>>(ab, cd);
  }
  if constexpr (kTile == 4) {
    return g[0];
  } else if constexpr (kTile == 8) {
    return pick<Lanes<0>>(g[0], g[1]) + pick<Lanes<1>>(g[0], g[1]);
  } else {
    const Row h01 = pick<Lanes<0>>(g[0], g[1]) + pick<Lanes<1>>(g[0], g[1]);
    const Row h23 = pick<Lanes<0>>(g[2], g[3]) + pick<Lanes<1>>(g[2], g[3]);
    return pick<Lanes<0>>(h01, h23) + pick<Lanes<1>>(h01, h23);
  }
}

// out[j] (+)= sum of parts[j * lanes ...], j < count
template <typename T>
KERNEL_INLINE void reduce(const T* parts, int count, bool add, T* out) {
  constexpr int lanes = Vector<T>::lanes;
  if constexpr (std::is_same_v<T, float>) {
    for (int first = 0; first < count; first += kTile, out += kTile) {
      Row r[kTile];
#pragma GCC unroll 16
      for (int j = 0; j < kTile; ++j) {
        const Row* part = reinterpret_cast<const Row*>(parts + (first + j) * lanes);
        r[j] = part[0];
        for (int q = 1; q < lanes / kTile; ++q) r[j] += part[q];
      }
      Row sums = add_across(r);
      if (count - first >= kTile) {
        store(out, add ? load(out) + sums : sums);
      } else {
        for (int j = 0; j < count - first; ++j) out[j] = add ? out[j] + sums[j] : sums[j];
      }
    }
  } else {
    for (int j = 0; j < count; ++j) {
      T sum = 0;
      for (int q = 0; q < lanes; ++q) sum += parts[j * lanes + q];
      out[j] = add ? out[j] + sum : sum;
    }
  }
}

// out[i] (+)= dot of row_block[row] and column_block[column] over the block's tokens, i in [begins[row], ends[row])
template <int V, typename T, typename Panel, typename Index>
KERNEL void sample(const Panel* row_block, const Panel* column_block, const int32_t* begins, const int32_t* ends,
                   const Index* columns, int64_t first, int64_t last, bool add, T* out) {
  using vec = typename Vector<T>::type;
  constexpr int lanes = Vector<T>::lanes;
  alignas(64) T parts[lanes * lanes] = {};
  for (int64_t row = first; row < last; ++row) {
    vec mine[V];
    tokens_of<V, T>(row_block, row, mine);
    for (int64_t i = begins[row], end = ends[row]; i < end; i += lanes) {
      const int count = static_cast<int>(std::min<int64_t>(lanes, end - i));
      for (int j = 0; j < count; ++j) {
        vec right[V];
        tokens_of<V, T>(column_block, columns[i + j], right);
        vec sum = mine[0] * right[0];
#pragma GCC unroll 4
        for (int v = 1; v < V; ++v) sum += mine[v] * right[v];
        reinterpret_cast<vec*>(parts)[j] = sum;
      }
      reduce(parts, count, add, out + i);
    }
  }
}

// block[channel * width + token] = x[token * stride + channel], channels [first, last); tokens past `tokens` are zero
template <typename T, typename In>
KERNEL void fill_block(const In* x, int64_t stride, int tokens, int width, int64_t first, int64_t last, T* block) {
  constexpr bool tiled = std::is_same_v<T, float>;  // fp64 is only for tests
  const int whole = tiled ? tokens / kTile * kTile : 0;
  const int64_t edge = tiled ? first + (last - first) / kTile * kTile : first;
  if constexpr (tiled) {
    for (int t = 0; t < whole; t += kTile) {
      for (int64_t c = first; c < edge; c += kTile) {
        Row rows[kTile];
#pragma GCC unroll 16
        for (int k = 0; k < kTile; ++k) rows[k] = load(x + (t + k) * stride + c);
        transpose(rows);
#pragma GCC unroll 16
        for (int k = 0; k < kTile; ++k) store(block + (c + k) * width + t, rows[k]);
      }
    }
  }
  for (int64_t c = first; c < last; ++c) {
    for (int t = c < edge ? whole : 0; t < tokens; ++t) block[c * width + t] = static_cast<T>(x[t * stride + c]);
    for (int t = tokens; t < width; ++t) block[c * width + t] = 0;
  }
}

// the same in Pairs: of every 32 tokens, word t % 16 holds t in its lower half and t + 16 in its upper one
KERNEL void fill_block(const at::BFloat16* x, int64_t stride, int tokens, int width, int64_t first, int64_t last,
                       Pair* block) {
  uint32_t* words = reinterpret_cast<uint32_t*>(block);
  const int half = width / 2;
  const int64_t edge = first + (last - first) / kTile * kTile;
  for (int w = 0; w < half; w += kTile) {
    const int token = w / 16 * 32 + w % 16;  // of the lower half
    for (int64_t c = first; c < edge; c += kTile) {
      Row low[kTile], high[kTile];
#pragma GCC unroll 16
      for (int k = 0; k < kTile; ++k) {
        const int t = token + k;
        low[k] = t < tokens ? load(x + t * stride + c) : Row{};
        high[k] = t + 16 < tokens ? load(x + (t + 16) * stride + c) : Row{};
      }
      transpose(low);
      transpose(high);
#pragma GCC unroll 16
      for (int k = 0; k < kTile; ++k) {
        const Words both = ((Words)low[k] >> 16) | (Words)high[k];
        store(reinterpret_cast<float*>(words + (c + k) * half + w), (Row)both);
      }
    }
  }
  for (int64_t c = edge; c < last; ++c) {
    std::fill(words + c * half, words + (c + 1) * half, 0);
    for (int t = 0; t < tokens; ++t) {
      words[c * half + t / 32 * 16 + t % 16] |= static_cast<uint32_t>(x[t * stride + c].x) << (t % 32 / 16 * 16);
    }
  }
}

// y[token * stride + channel] += sums[channel * width + token]
template <typename T, typename Out>
KERNEL void add_sums(const T* sums, int channels, int width, int tokens, int64_t stride, Out* y) {
  constexpr bool tiled = std::is_same_v<T, float>;
  const int edge = tiled ? channels / kTile * kTile : 0, whole = tiled ? tokens / kTile * kTile : 0;
  if constexpr (tiled) {
    for (int t = 0; t < whole; t += kTile) {
      for (int c = 0; c < edge; c += kTile) {
        Row rows[kTile];
#pragma GCC unroll 16
        for (int k = 0; k < kTile; ++k) rows[k] = load(sums + (c + k) * width + t);
        transpose(rows);
#pragma GCC unroll 16
        for (int k = 0; k < kTile; ++k) {
          Out* to = y + (t + k) * stride + c;
          store(to, load(to) + rows[k]);
        }
      }
    }
  }
  for (int t = 0; t < tokens; ++t) {
    for (int c = t < whole ? edge : 0; c < channels; ++c) {
      y[t * stride + c] = static_cast<Out>(static_cast<T>(y[t * stride + c]) + sums[c * width + t]);
    }
  }
}

#undef KERNEL
#undef KERNEL_INLINE

}  // namespace KERNEL_ISA
}  // namespace
}  // namespace sltrain
