// relu2_attention, forward, of one block of targets.
#pragma once

#include "pairs.h"
#include "philox.h"
#include "products.h"
#include "scores.h"

namespace glomo {
namespace GLOMO_ISA {

// A power of two per lane keeps the sums of r² value finite where r² is huge and the value is, too: it is 1 until the row's
// sum of squares grows beyond 2^64.
struct Factors {
  float lane[kLanes] __attribute__((aligned(64)));
  bool used;
};

static void rescale(Factors& factors, const float* total, int64_t lanes, float* sums, int64_t F, float* rounded) {
  Int large = {};
  for (int64_t l = 0; l < lanes; l += W) large |= load(total + l) * load(factors.lane + l) > 0x1p64f;
  if (!any(large)) return;
  factors.used = true;
  for (int64_t l = 0; l < lanes; l++) {
    union { float f; uint32_t u; } x = {total[l] * factors.lane[l]};
    if (!(x.f > 0x1p64f) || x.u >= 0x7f800000) continue;
    x.u &= 0x7f800000;  // the power of two below it
    factors.lane[l] /= x.f;
    rounded[l] /= x.f;
    for (int64_t f = 0; f < F; f++) sums[f * kLanes + l] /= x.f;
  }
}

static int64_t forward_scratch(const Call& call) {
  const int64_t widest = round_up(call.E > call.F ? call.E : call.F, W);
  return (call.E + call.F + 2 * W) * kLanes + 2 * kSources * kLanes + kSources * widest;
}

template <bool kPairs>
static void forward_as(const Call& call, const Sequence& s, int64_t block, float* scratch) {
  float* query = scratch;  // (E, lanes)
  float* sums = query + round_up(call.E, W) * kLanes;  // (F, lanes): sum_j r² value
  float* scores = sums + round_up(call.F, W) * kLanes;  // (sources, lanes)
  float* pairs = scores + kSources * kLanes;
  float* floats = pairs + kSources * kLanes;  // a tile of keys, then of values
  Targets targets;
  start(call, s, block, targets);
  rows_to_lanes(s.query, targets.first, targets.rows, 0, call.E, query);
  if (kPairs) pair_rows(query, kLanes, call.E, kLanes);
  const int64_t E = round_up(call.E, W), F = round_up(call.F, W), depth = kPairs ? (call.E + 1) / 2 : call.E;
  for (int64_t i = 0; i < call.F * kLanes; i += W) store(sums + i, Vec{});
  float total[kLanes] __attribute__((aligned(64))) = {};
  // With pairs the weights of the second product are rounded to bf16, and divided by their own sum. Not where a gradient may
  // follow: delta = <dout, out> has to cancel against dP.
  const bool round = kPairs && !s.residual;
  float rounded[kLanes] __attribute__((aligned(64))) = {};
  Factors factors;
  for (int64_t l = 0; l < kLanes; l++) factors.lane[l] = 1.0f;
  factors.used = false;
  const int64_t last = last_source(call, s, targets);
  for (int64_t source = 0; source < last; source += kSources) {
    const int64_t count = least(last - source, kSources);
    const Floats keys = as_floats(s.key, source, count, call.E, floats);
    if (kPairs) pair_columns(floats, E, count, E);
    product<false, kPairs>(keys.data, keys.row, keys.column, query, kLanes, depth, count, targets.lanes, scores, kLanes);
    const bool found = rectify(call, s, targets, source, count, scores, pairs);
    if (s.active) s.active[block * ((s.S + kSources - 1) / kSources) + source / kSources] = found;
    if (!found) continue;
    if (call.dropout) dropout_tile(call, s, targets.first, source, count, targets.lanes, pairs);
    for (int64_t l = 0; l < targets.lanes; l += W) {
      Vec sum = {};
      for (int64_t j = 0; j < count; j++) {
        Vec x = load(scores + j * kLanes + l);
        x *= x;
        sum += x;
        if (call.dropout) x *= load(pairs + j * kLanes + l);
        store(scores + j * kLanes + l, x);
      }
      store(total + l, load(total + l) + sum);
    }
    rescale(factors, total, targets.lanes, sums, call.F, rounded);
    if (factors.used)
      for (int64_t j = 0; j < count; j++)
        for (int64_t l = 0; l < targets.lanes; l += W)
          store(scores + j * kLanes + l, load(scores + j * kLanes + l) * load(factors.lane + l));
    const Floats values = as_floats(s.value, source, count, call.F, floats);
    if (!round) {
      product<true>(values.data, values.column, values.row, scores, kLanes, count, call.F, targets.lanes, sums, kLanes);
      continue;
    }
    const int64_t words = (count + 1) / 2;
    pair_rows(floats, F, count, F);
    pair_rows(scores, kLanes, count, targets.lanes);
    add_pairs(scores, kLanes, words, targets.lanes, rounded);
    product<true, kPairs>(values.data, values.column, values.row, scores, kLanes, words, call.F, targets.lanes, sums, kLanes);
  }
  float inverse[kLanes] __attribute__((aligned(64)));
  for (int64_t l = 0; l < kLanes; l++) {
    const float sum = round ? rounded[l] : total[l] * factors.lane[l];
    inverse[l] = sum == 0.0f ? 0.0f : 1.0f / (sum + call.eps * factors.lane[l]);
  }
  lanes_to_rows(sums, inverse, s.out, targets.first, targets.rows, 0, call.F);
  for (int64_t l = 0; l < targets.rows; l++) set_element(s.normalizer, targets.first + l, 0, total[l]);
  if (!s.residual) return;
  for (int64_t l = 0; l < targets.rows; l++)
    for (int64_t f = 0; f < call.F; f++)
      s.residual[(targets.first + l) * call.F + f] = sums[f * kLanes + l] * inverse[l] - element(s.out, targets.first + l, f);
}

static void forward(const Call& call, const Sequence& s, int64_t block, float* scratch) {
  if (kHasPairs && s.query.type == kBFloat && !call.dropout) return forward_as<kHasPairs>(call, s, block, scratch);
  forward_as<false>(call, s, block, scratch);
}

}  // namespace GLOMO_ISA
}  // namespace glomo
