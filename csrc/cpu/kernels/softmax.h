// The weights of attention: exp(s - lse), with lse = log of the sum of exponentials.
#pragma once

#include "scores.h"

namespace glomo {
namespace GLOMO_ISA {

// e^x for x <= 0, to a few units of the last place; 0 below -87, NaN for NaN.
INLINE Vec exponential(Vec x) {
  const Vec lowest = splat(-87.0f);
  const Int below = x < lowest;
  x = below ? lowest : x;
  // x = n log 2 + f; adding 1.5 * 2^23 leaves the nearest whole number in the last bits
  const Vec shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
  const Vec f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = splat(1.0f / 720.0f);
  p = p * f + 1.0f / 120.0f;
  p = p * f + 1.0f / 24.0f;
  p = p * f + 1.0f / 6.0f;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  p = (Vec)((Int)p + ((Int)shifted << 23));  // times 2^n
  p = below ? Vec{} : p;
  return x == x ? p : x;
}

// What a block of targets adds up to, tile by tile of its sources.
struct SoftmaxWeights {
  static constexpr Rule kRule = kSoftmax;
  float largest[kLanes] __attribute__((aligned(64)));
  float total[kLanes] __attribute__((aligned(64))) = {};  // of exp(s - largest)

  SoftmaxWeights() {
    for (float& x : largest) x = -__builtin_inff();
  }

  // As Relu2Weights::weigh.
  void weigh(int64_t count, int64_t lanes, float* scores, const float* keep, float* sums, int64_t F, float* rounded) {
    for (int64_t l = 0; l < lanes; l += W) {
      const Vec before = load(largest + l);
      Vec most = before;
      for (int64_t j = 0; j < count; j++) {
        const Vec x = load(scores + j * kLanes + l);
        most = x > most ? x : most;
      }
      const Vec base = most == -__builtin_inff() ? Vec{} : most;  // all weights are 0 then
      Vec sum = load(total + l);
      if (any(most != before)) {
        store(largest + l, most);
        const Vec factor = exponential(before - base);
        sum *= factor;
        store(rounded + l, load(rounded + l) * factor);
        for (int64_t f = 0; f < F; f++) store(sums + f * kLanes + l, load(sums + f * kLanes + l) * factor);
      }
      for (int64_t j = 0; j < count; j++) {
        Vec x = exponential(load(scores + j * kLanes + l) - base);
        sum += x;
        if (keep) x *= load(keep + j * kLanes + l);
        store(scores + j * kLanes + l, x);
      }
      store(total + l, sum);
    }
  }

  float inverse(int64_t l, const float* rounded, float, float = 1.0f) const {
    const float sum = rounded ? rounded[l] : total[l];
    return sum == 0.0f ? 0.0f : 1.0f / sum;
  }

  float statistic(int64_t l) const { return total[l] == 0.0f ? -__builtin_inff() : largest[l] + __builtin_logf(total[l]); }

  // What the statistic lost by rounding: with large scores a part of the log, or all of it.
  float correction(int64_t l) const { return total[l] == 0.0f ? 0.0f : largest[l] - statistic(l) + __builtin_logf(total[l]); }
};

// Backward: the gradient of a score, ds = P (dP - delta + dlse).
struct SoftmaxGradient {
  static constexpr Rule kRule = kSoftmax;
  // Constants of a target, kLanes apart: lse and what it lost by rounding, delta - dlse; where nothing may be read, lse is
  // +inf: P = 0. A P without the correction would be off by a factor on the whole row, against which delta does not cancel.

  static void constants(float* of, float lse, float correction, float dlse, float delta, float) {
    if (lse == -__builtin_inff()) return no_target(of);
    of[0] = lse;
    of[kLanes] = correction;
    of[2 * kLanes] = delta - dlse;
  }
  static void no_target(float* of) { of[0] = __builtin_inff(), of[kLanes] = of[2 * kLanes] = 0.0f; }

  const Vec lse, correction, shift;
  explicit SoftmaxGradient(const float* of) : lse(load(of)), correction(load(of + kLanes)), shift(load(of + 2 * kLanes)) {}

  Vec weight(Vec s) const { return exponential(s - lse - correction); }
  Vec score(Vec, Vec weight, Vec dweight) const { return weight * (dweight - shift); }
};

}  // namespace GLOMO_ISA
}  // namespace glomo
