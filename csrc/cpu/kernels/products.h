// The matrix product that everything is made of: c[r][l] (+)= sum_k a(r, k) b[k][l], lanes l along vectors.
//
// A tile of sums stays in registers over the whole of k. a is read one number at a time, so that it may have any strides;
// b and c have rows of whole vectors; c's are aligned.
#pragma once

#include "vectors.h"

namespace glomo {
namespace GLOMO_ISA {

template <int R, int V, bool kAdd>
INLINE void tile(const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_k, int64_t K, float* c, int64_t c_row) {
  Vec sum[R][V];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) sum[r][v] = kAdd ? load(c + r * c_row + v * W) : Vec{};
  for (int64_t k = 0; k < K; k++) {
    Vec x[V];
    UNROLL for (int v = 0; v < V; v++) x[v] = load_loose(b + k * b_k + v * W);
    UNROLL for (int r = 0; r < R; r++) {
      const Vec s = splat(a[r * a_row + k * a_k]);
      UNROLL for (int v = 0; v < V; v++) sum[r][v] += s * x[v];
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) store(c + r * c_row + v * W, sum[r][v]);
}

template <int V, bool kAdd>
static void column_of_tiles(
    const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_k, int64_t K, int64_t rows, float* c, int64_t c_row) {
  for (; rows >= kTileRows; rows -= kTileRows, a += kTileRows * a_row, c += kTileRows * c_row)
    tile<kTileRows, V, kAdd>(a, a_row, a_k, b, b_k, K, c, c_row);
  switch (rows) {
    case 5: return tile<5, V, kAdd>(a, a_row, a_k, b, b_k, K, c, c_row);
    case 4: return tile<4, V, kAdd>(a, a_row, a_k, b, b_k, K, c, c_row);
    case 3: return tile<3, V, kAdd>(a, a_row, a_k, b, b_k, K, c, c_row);
    case 2: return tile<2, V, kAdd>(a, a_row, a_k, b, b_k, K, c, c_row);
    case 1: return tile<1, V, kAdd>(a, a_row, a_k, b, b_k, K, c, c_row);
    default: return;
  }
}

// lanes: a multiple of W.
template <bool kAdd>
static void product(
    const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_k, int64_t K, int64_t rows, int64_t lanes, float* c,
    int64_t c_row) {
  int64_t l = 0;
  for (; l + kTileVectors * W <= lanes; l += kTileVectors * W)
    column_of_tiles<kTileVectors, kAdd>(a, a_row, a_k, b + l, b_k, K, rows, c + l, c_row);
  if (kTileVectors > 2 && l + 2 * W <= lanes) {
    column_of_tiles<2, kAdd>(a, a_row, a_k, b + l, b_k, K, rows, c + l, c_row);
    l += 2 * W;
  }
  if (l < lanes) column_of_tiles<1, kAdd>(a, a_row, a_k, b + l, b_k, K, rows, c + l, c_row);
}

}  // namespace GLOMO_ISA
}  // namespace glomo
