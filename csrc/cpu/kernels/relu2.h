// The weights of relu2_attention: r² / (Z + eps) of rectified scores r, with Z = sum of r².
#pragma once

#include "scores.h"

namespace glomo {
namespace GLOMO_ISA {

// What a block of targets adds up to, tile by tile of its sources.
struct Relu2Weights {
  static constexpr Rule kRule = kRelu2;
  float total[kLanes] __attribute__((aligned(64))) = {};
  // A power of two per lane keeps the sums of r² value finite where r² is huge and the value is, too: it is 1 until the
  // row's sum of squares grows beyond 2^64.
  float factor[kLanes] __attribute__((aligned(64)));
  bool used = false;

  Relu2Weights() {
    for (float& x : factor) x = 1.0f;
  }

  // Scores become weights, times keep if that is not null. Where their scale changes, what the tiles before have added up
  // to (sums (F, lanes) and rounded) changes with it.
  void weigh(int64_t count, int64_t lanes, float* scores, const float* keep, float* sums, int64_t F, float* rounded) {
    for (int64_t l = 0; l < lanes; l += W) {
      Vec sum = {};
      for (int64_t j = 0; j < count; j++) {
        Vec x = load(scores + j * kLanes + l);
        x *= x;
        sum += x;
        if (keep) x *= load(keep + j * kLanes + l);
        store(scores + j * kLanes + l, x);
      }
      store(total + l, load(total + l) + sum);
    }
    rescale(lanes, sums, F, rounded);
    if (!used) return;
    for (int64_t j = 0; j < count; j++)
      for (int64_t l = 0; l < lanes; l += W) store(scores + j * kLanes + l, load(scores + j * kLanes + l) * load(factor + l));
  }

  // What sums are multiplied by in the end, where they have been multiplied by `more`. rounded: the sum of the rounded
  // weights, or null.
  float inverse(int64_t l, const float* rounded, float eps, float more = 1.0f) const {
    const float sum = rounded ? rounded[l] : total[l] * factor[l];
    return sum == 0.0f ? 0.0f : 1.0f / ((sum + eps * factor[l]) * more);
  }

  float statistic(int64_t l) const { return total[l]; }
  float correction(int64_t) const { return 0.0f; }

 private:
  void rescale(int64_t lanes, float* sums, int64_t F, float* rounded) {
    Int large = {};
    for (int64_t l = 0; l < lanes; l += W) large |= load(total + l) * load(factor + l) > 0x1p64f;
    if (!any(large)) return;
    used = true;
    for (int64_t l = 0; l < lanes; l++) {
      union { float f; uint32_t u; } x = {total[l] * factor[l]};
      if (!(x.f > 0x1p64f) || x.u >= 0x7f800000) continue;
      x.u &= 0x7f800000;  // the power of two below it
      factor[l] /= x.f;
      rounded[l] /= x.f;
      for (int64_t f = 0; f < F; f++) sums[f * kLanes + l] /= x.f;
    }
  }
};

// Backward: the gradient of a score, ds = 2 r [(dP - delta) / (Z + eps) + dZ].
struct Relu2Gradient {
  static constexpr Rule kRule = kRelu2;
  // Constants of a target, kLanes apart: 1 / (Z + eps), delta, dZ; all 0 where there is no target.

  static void constants(float* of, float normalizer, float, float dnormalizer, float delta, float eps) {
    const float inverse = normalizer == 0.0f ? 0.0f : 1.0f / (normalizer + eps);
    of[0] = inverse == __builtin_inff() ? __FLT_MAX__ : inverse;  // eps = 0 and Z under 3e-39: finite, no more
    of[kLanes] = delta;
    of[2 * kLanes] = dnormalizer;
  }
  static void no_target(float* of) { of[0] = of[kLanes] = of[2 * kLanes] = 0.0f; }

  const Vec inverse, delta, dnormalizer;
  explicit Relu2Gradient(const float* of) : inverse(load(of)), delta(load(of + kLanes)), dnormalizer(load(of + 2 * kLanes)) {}

  Vec weight(Vec r) const { return r * inverse * r; }
  Vec score(Vec r, Vec, Vec dweight) const { return 2.0f * (r * inverse * (dweight - delta) + r * dnormalizer); }
};

}  // namespace GLOMO_ISA
}  // namespace glomo
