// Philox4x32-10 (Salmon et al., 2011) on vectors: four random words for each lane's counter.
#pragma once

#include "vectors.h"

namespace glomo {
namespace GLOMO_ISA {

typedef uint64_t Long __attribute__((vector_size(W * 8)));

INLINE void multiply(Word a, uint32_t b, Word& high, Word& low) {
  const Long wide = __builtin_convertvector(a, Long) * (uint64_t)b;
  high = __builtin_convertvector(wide >> 32, Word);
  low = a * b;
}

// Counter (j / 4, t, index), key seed; word j % 4 decides about source j.
INLINE void philox(uint32_t quad, Word t, uint64_t index, uint64_t seed, Word (&x)[4]) {
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  x[0] = Word{} + quad;
  x[1] = t;
  x[2] = Word{} + (uint32_t)index;
  x[3] = Word{} + (uint32_t)(index >> 32);
  for (int round = 0; round < 10; round++) {
    Word h0, l0, h1, l1;
    multiply(x[0], 0xD2511F53u, h0, l0);
    multiply(x[2], 0xCD9E8D57u, h1, l1);
    x[0] = h1 ^ x[1] ^ k0;
    x[1] = l1;
    x[2] = h0 ^ x[3] ^ k1;
    x[3] = l0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// keep[j][l]: keep_scale where the weight of (target l, source j) is kept, 0 where it is dropped.
static void dropout_tile(const Call& call, const Sequence& s, int64_t target, int64_t source, int64_t count, int64_t lanes, float* keep) {
  for (int64_t quad = source / 4; quad * 4 < source + count; quad++)
    for (int64_t l = 0; l < lanes; l += W) {
      Word t, x[4];
      for (int i = 0; i < W; i++) t[i] = (uint32_t)(target + l + i);
      philox((uint32_t)quad, t, s.index, call.seed, x);
      for (int w = 0; w < 4; w++) {
        const int64_t j = quad * 4 + w - source;
        if (j < 0 || j >= count) continue;
        *(Vec*)(keep + j * kLanes + l) = x[w] >= call.threshold ? splat(call.keep_scale) : Vec{};
      }
    }
}

}  // namespace GLOMO_ISA
}  // namespace glomo
