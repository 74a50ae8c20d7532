// The matrix product that everything is made of: c[r][l] (+)= sum_k a(r, k) b[k][l], lanes l along vectors.
//
// With kPairs every word of a and b holds two bf16 numbers, neighbours along k, and one instruction adds both products; K
// counts words then.
//
// A tile of sums stays in registers over the whole of k. a is read one number at a time, so that it may have any strides;
// b and c have rows of whole vectors; c's are aligned.
#pragma once

#include "vectors.h"

namespace glomo {
namespace GLOMO_ISA {

template <bool kPairs>
INLINE Vec multiply_add(Vec sum, const float* a, Vec x) {
#if defined(__AVX512BF16__)
  if (kPairs) return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)_mm512_set1_epi32(*(const Bits*)a));
#endif
  return sum + splat(*a) * x;
}

template <int R, int V, bool kAdd, bool kPairs>
INLINE void tile(const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_k, int64_t K, float* c, int64_t c_row) {
  Vec sum[R][V];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) sum[r][v] = kAdd ? load(c + r * c_row + v * W) : Vec{};
  for (int64_t k = 0; k < K; k++) {
    Vec x[V];
    UNROLL for (int v = 0; v < V; v++) x[v] = load_loose(b + k * b_k + v * W);
    UNROLL for (int r = 0; r < R; r++) {
      const float* s = a + r * a_row + k * a_k;
      UNROLL for (int v = 0; v < V; v++) sum[r][v] = multiply_add<kPairs>(sum[r][v], s, x[v]);
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) store(c + r * c_row + v * W, sum[r][v]);
}

template <int V, bool kAdd, bool kPairs>
static void column_of_tiles(
    const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_k, int64_t K, int64_t rows, float* c, int64_t c_row) {
  for (; rows >= kTileRows; rows -= kTileRows, a += kTileRows * a_row, c += kTileRows * c_row)
    tile<kTileRows, V, kAdd, kPairs>(a, a_row, a_k, b, b_k, K, c, c_row);
  switch (rows) {
    case 5: return tile<5, V, kAdd, kPairs>(a, a_row, a_k, b, b_k, K, c, c_row);
    case 4: return tile<4, V, kAdd, kPairs>(a, a_row, a_k, b, b_k, K, c, c_row);
    case 3: return tile<3, V, kAdd, kPairs>(a, a_row, a_k, b, b_k, K, c, c_row);
    case 2: return tile<2, V, kAdd, kPairs>(a, a_row, a_k, b, b_k, K, c, c_row);
    case 1: return tile<1, V, kAdd, kPairs>(a, a_row, a_k, b, b_k, K, c, c_row);
    default: return;
  }
}

// lanes: a multiple of W.
template <bool kAdd, bool kPairs = false>
static void product(
    const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_k, int64_t K, int64_t rows, int64_t lanes, float* c,
    int64_t c_row) {
  int64_t l = 0;
  for (; l + kTileVectors * W <= lanes; l += kTileVectors * W)
    column_of_tiles<kTileVectors, kAdd, kPairs>(a, a_row, a_k, b + l, b_k, K, rows, c + l, c_row);
  if (kTileVectors > 2 && l + 2 * W <= lanes) {
    column_of_tiles<2, kAdd, kPairs>(a, a_row, a_k, b + l, b_k, K, rows, c + l, c_row);
    l += 2 * W;
  }
  if (l < lanes) column_of_tiles<1, kAdd, kPairs>(a, a_row, a_k, b + l, b_k, K, rows, c + l, c_row);
}

// On the diagonal of a causal graph the first kHalfLanes targets of a tile read only its first `low` sources. The products below
// leave the rest of that half out, and write nothing there.
constexpr int64_t kHalfLanes = kLanes / 2;

// Rows are sources, lanes are targets.
template <bool kAdd, bool kPairs>
static void product_of_pairs(
    const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_k, int64_t K, int64_t sources, int64_t lanes, float* c,
    int64_t c_row, int64_t low) {
  if (low == sources) return product<kAdd, kPairs>(a, a_row, a_k, b, b_k, K, sources, lanes, c, c_row);
  product<kAdd, kPairs>(a, a_row, a_k, b, b_k, K, low, lanes < kHalfLanes ? lanes : kHalfLanes, c, c_row);
  if (lanes > kHalfLanes) product<kAdd, kPairs>(a, a_row, a_k, b + kHalfLanes, b_k, K, sources, lanes - kHalfLanes, c + kHalfLanes, c_row);
}

// The sum is over sources, lanes are targets. low: even with kPairs.
template <bool kPairs>
static void product_over_sources(
    const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_k, int64_t sources, int64_t rows, int64_t lanes, float* c,
    int64_t c_row, int64_t low) {
  const int64_t all = kPairs ? (sources + 1) / 2 : sources;
  if (low == sources) return product<true, kPairs>(a, a_row, a_k, b, b_k, all, rows, lanes, c, c_row);
  product<true, kPairs>(a, a_row, a_k, b, b_k, kPairs ? low / 2 : low, rows, lanes < kHalfLanes ? lanes : kHalfLanes, c, c_row);
  if (lanes > kHalfLanes) product<true, kPairs>(a, a_row, a_k, b + kHalfLanes, b_k, all, rows, lanes - kHalfLanes, c + kHalfLanes, c_row);
}

// Rows are sources, the sum is over targets.
template <bool kPairs>
static void product_over_targets(
    const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_k, int64_t targets, int64_t sources, int64_t lanes, float* c,
    int64_t c_row, int64_t low) {
  const int64_t all = kPairs ? (targets + 1) / 2 : targets, half = kPairs ? kHalfLanes / 2 : kHalfLanes;
  product<true, kPairs>(a, a_row, a_k, b, b_k, all, low, lanes, c, c_row);
  if (low < sources && all > half)
    product<true, kPairs>(a + low * a_row + half * a_k, a_row, a_k, b + half * b_k, b_k, all - half, sources - low, lanes, c + low * c_row, c_row);
}

}  // namespace GLOMO_ISA
}  // namespace glomo
