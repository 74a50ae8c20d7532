// Floats to pairs of bf16 numbers in one word, in place, for products of pairs.
#pragma once

#include "vectors.h"

namespace glomo {
namespace GLOMO_ISA {

#if defined(__AVX512BF16__)

// Row k of the result holds rows 2 k (in the low halves) and 2 k + 1; a missing last row is 0. lanes: a multiple of W.
static void pair_rows(float* x, int64_t row, int64_t rows, int64_t lanes) {
  alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i turn = _mm512_load_si512(order);
  for (int64_t k = 0; 2 * k < rows; k++)
    for (int64_t l = 0; l < lanes; l += W) {
      const Vec low = load(x + 2 * k * row + l), high = 2 * k + 1 < rows ? load(x + (2 * k + 1) * row + l) : Vec{};
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
      store(x + k * row + l, (Vec)_mm512_permutexvar_epi16(turn, both));
    }
}

// Word k of a row holds its numbers 2 k and 2 k + 1. columns: rounded up to W; what is there beyond the matrix must be 0.
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

#else  // never called

INLINE void pair_rows(float*, int64_t, int64_t, int64_t) {}
INLINE void pair_columns(float*, int64_t, int64_t, int64_t) {}
INLINE void add_pairs(const float*, int64_t, int64_t, int64_t, float*) {}

#endif

}  // namespace GLOMO_ISA
}  // namespace glomo
