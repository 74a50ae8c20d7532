// Moving matrices of any type and strides into tiles of floats, and back.
#pragma once

#include "vectors.h"

namespace glomo {
namespace GLOMO_ISA {

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Cuts buffers of whole cache lines out of scratch; without scratch it only counts.
struct Scratch {
  float* base;
  int64_t used = 0;

  explicit Scratch(float* from) : base(from) {}
  float* take(int64_t floats) {
    float* taken = base ? base + used : nullptr;
    used += round_up(floats, 16);
    return taken;
  }
};

// floats: a multiple of W.
INLINE void zero(float* x, int64_t floats) {
  for (int64_t i = 0; i < floats; i += W) store(x + i, Vec{});
}

// m(i, j .. j + W) as a vector; columns beyond count are 0.
INLINE Vec load_some(const Matrix& m, int64_t i, int64_t j, int64_t count) {
  if (m.type == kFloat && m.column == 1 && count >= W) return load_loose((const float*)m.data + m.row * i + j);
#if defined(__AVX512F__)
  if (m.column == 1 && count >= W && m.type != kBool) {
    const __m256i bits = _mm256_loadu_si256((const __m256i*)((const uint16_t*)m.data + m.row * i + j));
    if (m.type == kHalf) return (Vec)_mm512_cvtph_ps(bits);
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
  }
#elif defined(__AVX2__)
  if (m.column == 1 && count >= W && m.type != kBool) {
    const __m128i bits = _mm_loadu_si128((const __m128i*)((const uint16_t*)m.data + m.row * i + j));
    if (m.type == kHalf) return (Vec)_mm256_cvtph_ps(bits);
    return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
  }
#endif
  Vec x = {};
  for (int64_t l = 0; l < least(count, W); l++) x[l] = element(m, i, j + l);
  return x;
}

// bf16 numbers in the low halves, as to_bfloat.
INLINE Word to_bfloats(Vec x) {
  const Word bits = (Word)x;
  return x != x ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// m(i, j .. j + W) = x, of which the first count are inside.
INLINE void store_some(const Matrix& m, int64_t i, int64_t j, int64_t count, Vec x) {
  if (m.type == kFloat && m.column == 1 && count >= W) return store_loose((float*)m.data + m.row * i + j, x);
#if defined(__AVX512F__)
  if (m.column == 1 && count >= W && m.type != kFloat) {
    const __m256i bits = m.type == kHalf ? _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT) : _mm512_cvtepi32_epi16((__m512i)to_bfloats(x));
    return _mm256_storeu_si256((__m256i*)((uint16_t*)m.data + m.row * i + j), bits);
  }
#elif defined(__AVX2__)
  if (m.column == 1 && count >= W && m.type != kFloat) {
    const __m256i words = (__m256i)to_bfloats(x);
    const __m128i bits = m.type == kHalf ? _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT)
                                         : _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    return _mm_storeu_si128((__m128i*)((uint16_t*)m.data + m.row * i + j), bits);
  }
#endif
  for (int64_t l = 0; l < least(count, W); l++) set_element(m, i, j + l, x[l]);
}

// x[c] = m(i .. i + W, j + c) for c < W, of which rows and columns are inside; 0 elsewhere.
INLINE void load_columns(const Matrix& m, int64_t i, int64_t rows, int64_t j, int64_t columns, Vec (&x)[W]) {
  if (m.type == kFloat && m.column == 1 && rows >= W && columns >= W) return load_turned((const float*)m.data + m.row * i + j, m.row, x);
  float tile[W * W] __attribute__((aligned(64)));
  for (int64_t r = 0; r < W; r++) store(tile + r * W, r < rows ? load_some(m, i + r, j, columns) : Vec{});
  load_turned(tile, W, x);
}

// to[c][l] = m(i + l, j + c) for l < rows, 0 for the other lanes: rows of a matrix become lanes.
static void rows_to_lanes(const Matrix& m, int64_t i, int64_t rows, int64_t j, int64_t columns, float* to) {
  for (int64_t l = 0; l < kLanes; l += W)
    for (int64_t c = 0; c < columns; c += W) {
      Vec x[W] = {};
      if (l < rows) load_columns(m, i + l, rows - l, j + c, columns - c, x);
      for (int64_t r = 0; r < least(columns - c, W); r++) store(to + (c + r) * kLanes + l, x[r]);
    }
}

// m(i + l, j + c) = from[c][l] * factor[l] (no factor: 1), or with kAdd has it added: lanes become rows again.
template <bool kAdd = false>
static void lanes_to_rows(const float* from, const float* factor, const Matrix& m, int64_t i, int64_t rows, int64_t j, int64_t columns) {
  const Matrix lanes = {(void*)from, kLanes, 1, kFloat};
  for (int64_t l = 0; l < rows; l += W)
    for (int64_t c = 0; c < columns; c += W) {
      Vec x[W];
      load_columns(lanes, c, columns - c, l, W, x);
      for (int64_t r = 0; r < least(rows - l, W); r++) {
        const int64_t t = i + l + r, left = columns - c;
        const Vec y = factor ? x[r] * splat(factor[l + r]) : x[r];
        store_some(m, t, j + c, left, kAdd ? load_some(m, t, j + c, left) + y : y);
      }
    }
}

INLINE Vec factor_of(const float* factor, int64_t l) { return factor ? load(factor + l) : splat(1.0f); }

// Rows i .. i + rows of m as floats: where they lie, or copied to scratch. Every number is read by itself, so that floats
// may stay where they are whatever their strides.
struct Floats {
  const float* data;
  int64_t row, column;
};

static Floats as_floats(const Matrix& m, int64_t i, int64_t rows, int64_t columns, float* scratch) {
  if (m.type == kFloat) return {(const float*)m.data + m.row * i, m.row, m.column};
  const int64_t wide = round_up(columns, W);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < columns; c += W) store(scratch + r * wide + c, load_some(m, i + r, c, columns - c));
  return {scratch, wide, 1};
}

// Rows i .. i + rows of m as floats, in rows of whole vectors: where they lie, or copied to scratch.
static Floats whole_rows(const Matrix& m, int64_t i, int64_t rows, int64_t columns, float* scratch) {
  if (m.type == kFloat && m.column == 1 && columns % W == 0) return {(const float*)m.data + m.row * i, m.row, 1};
  const int64_t wide = round_up(columns, W);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < columns; c += W) store(scratch + r * wide + c, load_some(m, i + r, c, columns - c));
  return {scratch, wide, 1};
}

// m(i + r, c) = from[r][c] * factor, from rows of whole vectors.
static void write_rows(const float* from, int64_t wide, float factor, const Matrix& m, int64_t i, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < columns; c += W) store_some(m, i + r, c, columns - c, load(from + r * wide + c) * factor);
}

}  // namespace GLOMO_ISA
}  // namespace glomo
