// relu2_attention or attention, forward, of one block of targets: the rule says how scores become weights.
#pragma once

#include "pairs.h"
#include "philox.h"
#include "products.h"
#include "relu2.h"
#include "softmax.h"

namespace glomo {
namespace GLOMO_ISA {

static int64_t forward_scratch(const Call& call) {
  const int64_t widest = round_up(call.E > call.F ? call.E : call.F, W);
  return (call.E + call.F + 2 * W) * kLanes + 2 * kSources * kLanes + kSources * widest;
}

template <class Rows, bool kPairs>
static void forward_as(const Call& call, const Sequence& s, int64_t block, float* scratch) {
  const int64_t E = round_up(call.E, W), F = round_up(call.F, W), depth = kPairs ? (call.E + 1) / 2 : call.E;
  float* query = scratch;  // (E, lanes)
  float* sums = query + E * kLanes;  // (F, lanes): the weights times the values
  float* scores = sums + F * kLanes;  // (sources, lanes)
  float* pairs = scores + kSources * kLanes;
  float* floats = pairs + kSources * kLanes;  // a tile of keys, then of values
  Targets targets;
  start(call, s, block, targets);
  if (kPairs) lane_pairs(s.query, targets.first, targets.rows, call.E, query);
  else rows_to_lanes(s.query, targets.first, targets.rows, 0, call.E, query);
  for (int64_t i = 0; i < call.F * kLanes; i += W) store(sums + i, Vec{});
  // With pairs the weights of the second product are rounded to bf16, and divided by their own sum. Not where a gradient may
  // follow, because delta = <dout, out> has to cancel against dP, nor with dropout, which is not in the sum.
  const bool round = kPairs && !s.residual && !call.dropout;
  float rounded[kLanes] __attribute__((aligned(64))) = {};
  Rows rows;
  const int64_t last = last_source(call, s, targets);
  for (int64_t source = 0; source < last; source += kSources) {
    const int64_t count = least(last - source, kSources);
    const Floats keys = kPairs ? column_pairs(s.key, source, count, call.E, floats) : as_floats(s.key, source, count, call.E, floats);
    const int64_t low = low_sources(call, targets, source, count);
    product_of_pairs<false, kPairs>(keys.data, keys.row, keys.column, query, kLanes, depth, count, targets.lanes, scores, kLanes, low);
    const bool found = finish_scores<Rows::kRule>(call, s, targets, source, count, scores, pairs);
    if (s.active) s.active[block * ((s.S + kSources - 1) / kSources) + source / kSources] = found;
    if (!found) continue;
    if (call.dropout) dropout_tile(call, s, targets.first, source, count, targets.lanes, pairs);
    rows.weigh(count, targets.lanes, scores, call.dropout ? pairs : nullptr, sums, call.F, rounded);
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
  for (int64_t l = 0; l < kLanes; l++) inverse[l] = rows.inverse(l, round ? rounded : nullptr, call.eps);
  lanes_to_rows(sums, inverse, s.out, targets.first, targets.rows, 0, call.F);
  for (int64_t l = 0; l < targets.rows; l++) set_element(s.statistic, targets.first + l, 0, rows.statistic(l));
  if (!s.residual) return;
  for (int64_t l = 0; l < targets.rows; l++)
    for (int64_t f = 0; f < call.F; f++)
      s.residual[(targets.first + l) * call.F + f] = sums[f * kLanes + l] * inverse[l] - element(s.out, targets.first + l, f);
}

template <class Rows>
static void forward(const Call& call, const Sequence& s, int64_t block, float* scratch) {
  if (kHasPairs && s.query.type == kBFloat) return forward_as<Rows, kHasPairs>(call, s, block, scratch);
  forward_as<Rows, false>(call, s, block, scratch);
}

}  // namespace GLOMO_ISA
}  // namespace glomo
