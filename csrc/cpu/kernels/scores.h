// From the products of queries and keys to scores, sources along rows and targets along lanes.
#pragma once

#include "products.h"
#include "tiles.h"

namespace glomo {
namespace GLOMO_ISA {

// What does not change along the sources of a block of targets.
struct Targets {
  int64_t first, rows, lanes;  // rows of them exist; lanes is rows in whole vectors
  float bias[kLanes] __attribute__((aligned(64)));
  float mask[kLanes] __attribute__((aligned(64)));
};

INLINE void start_targets(const Call& call, const Sequence& s, int64_t block, Targets& targets) {
  targets.first = block * kLanes;
  targets.rows = least(s.T - targets.first, kLanes);
  targets.lanes = round_up(targets.rows, W);
  for (int64_t l = 0; l < kLanes; l++) {
    const int64_t t = targets.first + least(l, targets.rows - 1);
    targets.bias[l] = call.bias == kRow || call.bias == kScalar ? element(s.bias, t, 0) : 0.0f;
    targets.mask[l] = call.mask == kRow || call.mask == kScalar ? element(s.mask, t, 0) : 1.0f;
  }
}

// One past the last source that any of the targets reads.
INLINE int64_t last_source(const Call& call, const Sequence& s, const Targets& targets) {
  if (!call.causal) return s.S;
  const int64_t last = targets.first + targets.rows + call.diagonal;
  return last < 0 ? 0 : least(last, s.S);
}

// How many of a tile's sources the first kHalfLanes targets read (products.h): an even number, or all.
INLINE int64_t low_sources(const Call& call, const Targets& targets, int64_t source, int64_t count) {
  if (!call.causal) return count;
  const int64_t low = targets.first + kHalfLanes + call.diagonal - source;
  return low < 0 ? 0 : least(round_up(low, 2), count);
}

// scores[j][l]: products become scores, rectified for kRelu2; 0, or for kSoftmax -inf, where the pair is not allowed. pairs
// is scratch of a tile. Returns whether any pair counts.
template <Rule kRule>
static bool finish_scores(const Call& call, const Sequence& s, const Targets& targets, int64_t source, int64_t count, float* scores, float* pairs) {
  const Vec nothing = splat(kRule == kRelu2 ? 0.0f : -__builtin_inff());
  if (call.bias == kFull) rows_to_lanes(s.bias, targets.first, targets.rows, source, count, pairs);
  Int found = {};
  for (int64_t j = 0; j < count; j++) {
    const Vec each = splat(call.bias == kColumn ? element(s.bias, 0, source + j) : 0.0f);
    for (int64_t l = 0; l < targets.lanes; l += W) {
      Vec x = load(scores + j * kLanes + l);
      if (call.scale != 1.0f) x *= splat(call.scale);
      if (call.bias != kNone) x += call.bias == kFull ? load(pairs + j * kLanes + l) : call.bias == kColumn ? each : load(targets.bias + l);
      if (kRule == kRelu2) {
        x = x < 0.0f ? Vec{} : x;  // keeps NaN
        found |= x != 0.0f;
      }
      store(scores + j * kLanes + l, x);
    }
  }
  const bool above = call.causal && source + count - 1 > targets.first + call.diagonal;
  if (call.mask == kNone && !above) return kRule == kSoftmax || any(found);
  if (call.mask == kFull) rows_to_lanes(s.mask, targets.first, targets.rows, source, count, pairs);
  found = Int{};
  Int number;
  for (int l = 0; l < W; l++) number[l] = l;
  for (int64_t j = 0; j < count; j++) {
    const bool column = call.mask != kColumn || element(s.mask, 0, source + j) != 0.0f;
    const int64_t first = call.causal ? source + j - call.diagonal - targets.first : 0;  // lane that reads source j first
    const int32_t from = first < 0 ? 0 : first > kLanes ? kLanes : (int32_t)first;
    for (int64_t l = 0; l < targets.lanes; l += W) {
      Int allowed = column ? number + (int32_t)l >= from : Int{};
      if (call.mask == kFull) allowed &= load(pairs + j * kLanes + l) != 0.0f;
      if (call.mask == kRow || call.mask == kScalar) allowed &= load(targets.mask + l) != 0.0f;
      const Vec x = allowed ? load(scores + j * kLanes + l) : nothing;
      found |= x != nothing;
      store(scores + j * kLanes + l, x);
    }
  }
  return any(found);
}

}  // namespace GLOMO_ISA
}  // namespace glomo
