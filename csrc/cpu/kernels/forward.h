// relu2_attention or attention, forward, of one block of targets: the rule says how scores become weights.
#pragma once

#include "pairs.h"
#include "philox.h"
#include "products.h"
#include "relu2.h"
#include "softmax.h"

namespace glomo {
namespace GLOMO_ISA {

struct ForwardBuffers {
  float *query, *sums;    // (E, lanes); (F, lanes): the weights times the values
  float *scores, *pairs;  // (sources, lanes)
  float* floats;          // a tile of keys, then of values

  ForwardBuffers(const Call& call, Scratch& scratch)
      : query(scratch.take(round_up(call.E, W) * kLanes)),
        sums(scratch.take(round_up(call.F, W) * kLanes)),
        scores(scratch.take(kSources * kLanes)),
        pairs(scratch.take(kSources * kLanes)),
        floats(scratch.take(kSources * round_up(call.E > call.F ? call.E : call.F, W))) {}
};

static int64_t forward_scratch(const Call& call) {
  Scratch scratch(nullptr);
  ForwardBuffers(call, scratch);
  return scratch.used;
}

template <class Weights, bool kPairs>
static void forward_as(const Call& call, const Sequence& s, int64_t block, float* from) {
  Scratch scratch(from);
  const ForwardBuffers buffers(call, scratch);
  float *query = buffers.query, *sums = buffers.sums, *scores = buffers.scores, *pairs = buffers.pairs, *floats = buffers.floats;
  const int64_t depth = kPairs ? (call.E + 1) / 2 : call.E;
  Targets targets;
  start_targets(call, s, block, targets);
  if (kPairs) lane_pairs(s.query, targets.first, targets.rows, call.E, query);
  else rows_to_lanes(s.query, targets.first, targets.rows, 0, call.E, query);
  zero(sums, call.F * kLanes);
  // With pairs the weights of the second product are rounded to bf16, and divided by their own sum. Not where a gradient may
  // follow, because delta = <dout, out> has to cancel against dP, nor with dropout, which is not in the sum.
  const bool round = kPairs && !s.residual && !call.dropout;
  float rounded[kLanes] __attribute__((aligned(64))) = {};
  Weights weights;
  const int64_t last = last_source(call, s, targets);
  for (int64_t source = 0; source < last; source += kSources) {
    const int64_t count = least(last - source, kSources);
    const Floats keys = kPairs ? column_pairs(s.key, source, count, call.E, floats) : as_floats(s.key, source, count, call.E, floats);
    const int64_t low = low_sources(call, targets, source, count);
    product_of_pairs<false, kPairs>(keys.data, keys.row, keys.column, query, kLanes, depth, count, targets.lanes, scores, kLanes, low);
    const bool found = finish_scores<Weights::kRule>(call, s, targets, source, count, scores, pairs);
    if (s.active) s.active[block * blocks_of(s.S) + source / kSources] = found;
    if (!found) continue;
    if (call.dropout) dropout_tile(call, s, targets.first, source, count, targets.lanes, pairs);
    weights.weigh(count, targets.lanes, scores, call.dropout ? pairs : nullptr, sums, call.F, rounded);
    if (!round) {
      const Floats values = as_floats(s.value, source, count, call.F, floats);
      product_over_sources<false>(values.data, values.column, values.row, scores, kLanes, count, call.F, targets.lanes, sums, kLanes, low);
      continue;
    }
    const Floats values = row_pairs(s.value, source, count, call.F, floats);
    pair_rows(scores, kLanes, count, targets.lanes, scores);
    add_pairs(scores, kLanes, (count + 1) / 2, targets.lanes, rounded);
    product_over_sources<kPairs>(values.data, values.column, values.row, scores, kLanes, count, call.F, targets.lanes, sums, kLanes, low);
  }
  float inverse[kLanes] __attribute__((aligned(64)));
  for (int64_t l = 0; l < kLanes; l++) {
    inverse[l] = weights.inverse(l, round ? rounded : nullptr, call.eps);
    if (inverse[l] != __builtin_inff()) continue;
    // a sum so small that its inverse overflows
    for (int64_t f = 0; f < call.F; f++) sums[f * kLanes + l] *= 0x1p64f;
    inverse[l] = weights.inverse(l, round ? rounded : nullptr, call.eps, 0x1p64f);
  }
  lanes_to_rows(sums, inverse, s.out, targets.first, targets.rows, 0, call.F);
  for (int64_t l = 0; l < targets.rows; l++) set_element(s.statistic, targets.first + l, 0, weights.statistic(l));
  if (s.correction)
    for (int64_t l = 0; l < targets.rows; l++) s.correction[targets.first + l] = weights.correction(l);
  if (!s.residual) return;
  for (int64_t l = 0; l < targets.rows; l++)
    for (int64_t f = 0; f < call.F; f++)
      s.residual[(targets.first + l) * call.F + f] = sums[f * kLanes + l] * inverse[l] - element(s.out, targets.first + l, f);
}

template <class Weights>
static void forward(const Call& call, const Sequence& s, int64_t block, float* scratch) {
  if (kHasPairs && s.query.type == kBFloat) return forward_as<Weights, kHasPairs>(call, s, block, scratch);
  forward_as<Weights, false>(call, s, block, scratch);
}

}  // namespace GLOMO_ISA
}  // namespace glomo
