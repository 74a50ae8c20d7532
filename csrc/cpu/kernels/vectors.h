// Vectors of floats in the compiler's own notation: the same source for every instruction set.
//
// These files are compiled once for each, with its flags and GLOMO_ISA as its name. They include no header of PyTorch or
// of the C++ library: an inline function from there, compiled here, could be the one that the linker keeps for everybody.
#pragma once

#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../problem.h"

#define INLINE GLOMO_INLINE
#define UNROLL _Pragma("GCC unroll 32")

namespace glomo {
namespace GLOMO_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
constexpr int kTileRows = 6, kTileVectors = 4;  // 24 sums, 4 vectors and a broadcast, of 32 registers
#elif defined(__AVX2__)
constexpr int W = 8;
constexpr int kTileRows = 6, kTileVectors = 2;  // 12 sums, 2 vectors and a broadcast, of 16
#else
constexpr int W = 4;
constexpr int kTileRows = 6, kTileVectors = 2;
#endif

typedef float Vec __attribute__((vector_size(W * 4)));
typedef float Loose __attribute__((vector_size(W * 4), aligned(4)));  // at any address
typedef int32_t Int __attribute__((vector_size(W * 4)));
typedef uint32_t Word __attribute__((vector_size(W * 4)));
typedef int32_t Bits __attribute__((may_alias));

INLINE Vec splat(float x) { return x - Vec{}; }
INLINE Vec load(const float* p) { return *(const Vec*)p; }
INLINE void store(float* p, Vec x) { *(Vec*)p = x; }
INLINE Vec load_loose(const float* p) { return *(const Loose*)p; }
INLINE void store_loose(float* p, Vec x) { *(Loose*)p = x; }

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;  // products of bf16 numbers, two at a time
#else
constexpr bool kHasPairs = false;
#endif

INLINE bool any(Int x) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)x, (__m256i)x);
#else
  return (x[0] | x[1] | x[2] | x[3]) != 0;
#endif
}

INLINE float from_half(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  union { uint32_t u; float f; } x;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    x.f = float(mantissa) * 5.9604644775390625e-8f;
    x.u |= sign;
  } else {
    x.u = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
  }
  return x.f;
#endif
}

// To nearest, ties to even, as PyTorch rounds.
INLINE uint16_t to_half(float f) {
#if defined(__F16C__)
  return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT);
#else
  union { float f; uint32_t u; } x = {f};
  const uint32_t sign = x.u >> 16 & 0x8000;
  x.u &= 0x7fffffff;
  if (x.u > 0x7f800000) return sign | 0x7e00;
  if (x.u >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
  if (x.u < 0x38800000) {  // subnormal: the sum with 2^-1 has the wanted last bit
    x.f += 0.5f;
    return sign | (x.u - 0x3f000000);
  }
  x.u += 0xfff + (x.u >> 13 & 1);
  return sign | (x.u - 0x38000000) >> 13;
#endif
}

INLINE float from_bfloat(uint16_t h) {
  union { uint32_t u; float f; } x = {uint32_t(h) << 16};
  return x.f;
}

INLINE uint16_t to_bfloat(float f) {
  union { float f; uint32_t u; } x = {f};
  if ((x.u & 0x7fffffff) > 0x7f800000) return x.u >> 16 | 0x40;
  return (x.u + 0x7fff + (x.u >> 16 & 1)) >> 16;
}

INLINE float element(const Matrix& m, int64_t i, int64_t j) {
  const int64_t at = m.row * i + m.column * j;
  switch (m.type) {
    case kFloat: return ((const float*)m.data)[at];
    case kHalf: return from_half(((const uint16_t*)m.data)[at]);
    case kBFloat: return from_bfloat(((const uint16_t*)m.data)[at]);
    default: return ((const uint8_t*)m.data)[at] != 0;
  }
}

INLINE void set_element(const Matrix& m, int64_t i, int64_t j, float x) {
  const int64_t at = m.row * i + m.column * j;
  switch (m.type) {
    case kFloat: ((float*)m.data)[at] = x; break;
    case kHalf: ((uint16_t*)m.data)[at] = to_half(x); break;
    default: ((uint16_t*)m.data)[at] = to_bfloat(x); break;
  }
}

// Fours of floats at p, p + stride, .. side by side.
INLINE Vec load_fours(const float* p, int64_t stride) {
#if defined(__AVX512F__)
  __m512 x = _mm512_castps128_ps512(_mm_loadu_ps(p));
  x = _mm512_insertf32x4(x, _mm_loadu_ps(p + stride), 1);
  x = _mm512_insertf32x4(x, _mm_loadu_ps(p + 2 * stride), 2);
  return (Vec)_mm512_insertf32x4(x, _mm_loadu_ps(p + 3 * stride), 3);
#elif defined(__AVX2__)
  return (Vec)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + stride), 1);
#else
  (void)stride;
  return load_loose(p);
#endif
}

// x[c][r] = p[r * stride + c], W x W numbers. What crosses fours is left to the loads: shuffles across a wide vector are slow.
INLINE void load_turned(const float* p, int64_t stride, Vec (&x)[W]) {
  Int low, high, first, second;  // pairs of numbers, and of pairs, within fours
  UNROLL for (int l = 0; l < W; l++) {
    const int four = l / 4 * 4, k = l % 4;
    low[l] = four + k / 2 + k % 2 * W;
    high[l] = low[l] + 2;
    first[l] = four + k % 2 + k / 2 * W;
    second[l] = first[l] + 2;
  }
  UNROLL for (int c = 0; c < W; c += 4) {
    Vec row[4];
    UNROLL for (int r = 0; r < 4; r++) row[r] = load_fours(p + r * stride + c, 4 * stride);
    const Vec a = __builtin_shuffle(row[0], row[1], low), b = __builtin_shuffle(row[2], row[3], low);
    const Vec d = __builtin_shuffle(row[0], row[1], high), e = __builtin_shuffle(row[2], row[3], high);
    x[c] = __builtin_shuffle(a, b, first);
    x[c + 1] = __builtin_shuffle(a, b, second);
    x[c + 2] = __builtin_shuffle(d, e, first);
    x[c + 3] = __builtin_shuffle(d, e, second);
  }
}

}  // namespace GLOMO_ISA
}  // namespace glomo
