// Pairs of bf16 numbers in one word, for products of pairs.
#pragma once

#include "tiles.h"

namespace glomo {
namespace GLOMO_ISA {

#if defined(__AVX512BF16__)

// Word l holds low[l] in its low half and high[l].
INLINE Vec pair(Vec low, Vec high) {
  alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (Vec)_mm512_permutexvar_epi16(_mm512_load_si512(order), (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}

// Row k of to holds rows 2 k (in the low halves) and 2 k + 1 of x, which may be to; a missing last row is 0. lanes: a
// multiple of W.
static void pair_rows(const float* x, int64_t row, int64_t rows, int64_t lanes, float* to) {
  for (int64_t k = 0; 2 * k < rows; k++)
    for (int64_t l = 0; l < lanes; l += W)
      store(to + k * row + l, pair(load(x + 2 * k * row + l), 2 * k + 1 < rows ? load(x + (2 * k + 1) * row + l) : Vec{}));
}

// Word k of a row holds its numbers 2 k and 2 k + 1, in place. columns: rounded up to W; what is there beyond the matrix must
// be 0.
static void pair_columns(float* x, int64_t row, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < columns; c += W)
      _mm256_store_si256((__m256i*)(x + r * row + c / 2), (__m256i)_mm512_cvtneps_pbh((__m512)load(x + r * row + c)));
}

// sums[l] += what the pairs of rows add up to.
static void add_pairs(const float* x, int64_t row, int64_t rows, int64_t lanes, float* sums) {
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  for (int64_t l = 0; l < lanes; l += W) {
    __m512 sum = (__m512)load(sums + l);
    for (int64_t k = 0; k < rows; k++) sum = _mm512_dpbf16_ps(sum, (__m512bh)load(x + k * row + l), ones);
    store(sums + l, (Vec)sum);
  }
}

// Whether the rows of a matrix are words of two neighbours already.
INLINE bool in_words(const Matrix& m, int64_t columns) {
  return m.type == kBFloat && m.column == 1 && m.row % 2 == 0 && columns % 2 == 0 && (uintptr_t)m.data % 4 == 0;
}

// Rows i .. i + rows of m, neighbours along a row in one word: where they lie, or in scratch.
static Floats column_pairs(const Matrix& m, int64_t i, int64_t rows, int64_t columns, float* scratch) {
  if (in_words(m, columns)) return {(const float*)m.data + m.row / 2 * i, m.row / 2, 1};
  const Floats floats = as_floats(m, i, rows, columns, scratch);
  pair_columns(scratch, floats.row, rows, round_up(columns, W));
  return floats;
}

// The same rows, two of them in one: neighbours along a column in one word.
static Floats row_pairs(const Matrix& m, int64_t i, int64_t rows, int64_t columns, float* scratch) {
  const int64_t wide = round_up(columns, W);
  for (int64_t k = 0; 2 * k < rows; k++)
    for (int64_t c = 0; c < columns; c += W) {
      const bool both = 2 * k + 1 < rows;
      float* to = scratch + k * wide + c;
      if (m.type == kBFloat && m.column == 1 && columns - c >= W && both) {
        const uint16_t* low = (const uint16_t*)m.data + m.row * (i + 2 * k) + c;
        const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)low));
        const __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(low + m.row)));
        store(to, (Vec)_mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
      } else {
        store(to, pair(load_some(m, i + 2 * k, c, columns - c), both ? load_some(m, i + 2 * k + 1, c, columns - c) : Vec{}));
      }
    }
  return {scratch, wide, 1};
}

// As rows_to_lanes, neighbours along a row of m in one word.
static void lane_pairs(const Matrix& m, int64_t i, int64_t rows, int64_t columns, float* to) {
  if (in_words(m, columns)) return rows_to_lanes({m.data, m.row / 2, 1, kFloat}, i, rows, 0, columns / 2, to);
  rows_to_lanes(m, i, rows, 0, columns, to);
  pair_rows(to, kLanes, columns, kLanes, to);
}

#else  // never called

INLINE void pair_rows(const float*, int64_t, int64_t, int64_t, float*) {}
INLINE void pair_columns(float*, int64_t, int64_t, int64_t) {}
INLINE void add_pairs(const float*, int64_t, int64_t, int64_t, float*) {}
INLINE Floats column_pairs(const Matrix&, int64_t, int64_t, int64_t, float*) { return {}; }
INLINE Floats row_pairs(const Matrix&, int64_t, int64_t, int64_t, float*) { return {}; }
INLINE void lane_pairs(const Matrix&, int64_t, int64_t, int64_t, float*) {}

#endif

}  // namespace GLOMO_ISA
}  // namespace glomo
