// The gradients of relu2_attention or attention that a range of sources makes, five products a tile:
//   dV += (P dropped)^T dout,   dP = dout V^T dropped,   ds by the rule,   dK += ds^T Q,   dQ += ds K
// with P the weights and delta = <dout, out>. Sources are the outer loop, so that dK and dV of a tile are summed in cache; dQ is summed in
// memory, by blocks of targets.
#pragma once

#include "pairs.h"
#include "philox.h"
#include "products.h"
#include "relu2.h"
#include "softmax.h"

namespace glomo {
namespace GLOMO_ISA {

constexpr int kConstants = 3;  // numbers of a target that a rule may keep

// What all tiles of a batch-head need of its targets, in scratch.
struct Rows {
  float *query, *dout;                // (blocks, E | F, kLanes)
  Floats query_rows, dout_rows;       // (T, E | F), rows of whole vectors
  float* constants;              // (blocks, kConstants, kLanes): the rule's
};

static int64_t backward_scratch(const Call& call, int64_t T) {
  const int64_t blocks = (T + kLanes - 1) / kLanes, E = round_up(call.E, W), F = round_up(call.F, W);
  return blocks * kLanes * (2 * E + 2 * F + kConstants) + kSources * (4 * kLanes + 3 * E + 2 * F + W);
}

template <class Gradient, bool kPairs>
static Rows gather(const Call& call, const Sequence& s, const Gradients& g, float*& scratch) {
  const int64_t blocks = (s.T + kLanes - 1) / kLanes;
  Rows rows;
  const auto take = [&](int64_t floats) {
    float* taken = scratch;
    scratch += floats;
    return taken;
  };
  rows.query = take(blocks * kLanes * round_up(call.E, W));
  rows.dout = take(blocks * kLanes * round_up(call.F, W));
  rows.constants = take(blocks * kConstants * kLanes);
  rows.query_rows = kPairs ? row_pairs(s.query, 0, s.T, call.E, scratch) : whole_rows(s.query, 0, s.T, call.E, scratch);
  scratch += s.T * round_up(call.E, W);
  rows.dout_rows = kPairs ? row_pairs(g.dout, 0, s.T, call.F, scratch) : whole_rows(g.dout, 0, s.T, call.F, scratch);
  for (int64_t t = 0; t < blocks * kLanes; t++) {
    float* constants = rows.constants + t / kLanes * kConstants * kLanes + t % kLanes;
    Gradient::no_target(constants);
    if (t >= s.T) continue;
    Vec sum = {};
    for (int64_t f = 0; f < call.F; f += W) {
      Vec out = load_some(s.out, t, f, call.F - f);
      if (s.residual) out += load_some({s.residual, call.F, 1, kFloat}, t, f, call.F - f);
      sum += out * load_some(g.dout, t, f, call.F - f);
    }
    float delta = 0.0f;
    for (int l = 0; l < W; l++) delta += sum[l];
    Gradient::constants(constants, element(s.statistic, t, 0), element(g.dstatistic, t, 0), delta, call.eps);
  }
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t count = least(s.T - b * kLanes, kLanes);
    float *query = rows.query + b * kLanes * round_up(call.E, W), *dout = rows.dout + b * kLanes * round_up(call.F, W);
    if (kPairs) {
      lane_pairs(s.query, b * kLanes, count, call.E, query);
      lane_pairs(g.dout, b * kLanes, count, call.F, dout);
    } else {
      rows_to_lanes(s.query, b * kLanes, count, 0, call.E, query);
      rows_to_lanes(g.dout, b * kLanes, count, 0, call.F, dout);
    }
  }
  return rows;
}

template <class Gradient, bool kPairs>
static void backward_as(const Call& call, const Sequence& s, const Gradients& g, int64_t first, int64_t last, float* scratch) {
  const int64_t E = round_up(call.E, W), F = round_up(call.F, W), blocks = (s.T + kLanes - 1) / kLanes;
  float* scores = scratch;  // (sources, lanes): scores, then weights
  float* products = scores + kSources * kLanes;  // dP, then ds
  float* pairs = products + kSources * kLanes;
  float* keep = pairs + kSources * kLanes;
  float* dkey = keep + kSources * kLanes;
  float* dvalue = dkey + kSources * E;
  float* key_floats = dvalue + kSources * F;
  float* value_floats = key_floats + kSources * E;
  float* key_pairs = value_floats + kSources * F;
  float* columns = key_pairs + kSources * E;  // (sources, W): sums of ds
  scratch = columns + kSources * W;
  const Rows rows = gather<Gradient, kPairs>(call, s, g, scratch);
  const int64_t depth = kPairs ? (call.E + 1) / 2 : call.E, value_depth = kPairs ? (call.F + 1) / 2 : call.F;
  const bool need_key = g.dkey.data, need_value = g.dvalue.data;
  const bool need_scores = need_key || g.dquery || g.dbias_rows || g.dbias_columns || g.dbias.data;
  for (int64_t source = first; source < last; source += kSources) {
    const int64_t count = least(last - source, kSources);
    const Floats keys = kPairs ? column_pairs(s.key, source, count, call.E, key_floats) : as_floats(s.key, source, count, call.E, key_floats);
    const Floats values = kPairs ? column_pairs(s.value, source, count, call.F, value_floats) : as_floats(s.value, source, count, call.F, value_floats);
    const Floats key_terms = kPairs ? row_pairs(s.key, source, count, call.E, key_pairs) : keys;  // along the sources
    for (int64_t i = 0; i < kSources * E; i += W) store(dkey + i, Vec{});
    for (int64_t i = 0; i < kSources * F; i += W) store(dvalue + i, Vec{});
    for (int64_t j = 0; j < kSources; j++) store(columns + j * W, Vec{});
    const int64_t reader = call.causal ? source - call.diagonal : 0;  // the first target that reads any of them
    for (int64_t block = 0; block < blocks; block++) {
      const bool none = (block + 1) * kLanes <= reader ||
          (s.active && !s.active[block * ((s.S + kSources - 1) / kSources) + source / kSources]);
      Targets targets;
      int64_t low = 0;
      if (!none) {
        start(call, s, block, targets);
        low = low_sources(call, targets, source, count);
        product_of_pairs<false, kPairs>(keys.data, keys.row, keys.column, rows.query + block * kLanes * E, kLanes, depth, count, targets.lanes, scores, kLanes, low);
      }
      if (none || !finish_scores<Gradient::kRule>(call, s, targets, source, count, scores, pairs)) continue;
      if (need_scores) {
        for (int64_t j = low; j < count; j++)
          for (int64_t l = 0; l < kHalf; l += W) store(products + j * kLanes + l, Vec{});
        product_of_pairs<false, kPairs>(values.data, values.row, values.column, rows.dout + block * kLanes * F, kLanes, value_depth, count, targets.lanes, products, kLanes, low);
      }
      if (call.dropout) dropout_tile(call, s, targets.first, source, count, targets.lanes, keep);
      for (int64_t l = 0; l < targets.lanes; l += W) {
        const Gradient gradient(rows.constants + block * kConstants * kLanes + l);
        Vec sum = {};
        for (int64_t j = 0; j < count; j++) {
          const Vec score = load(scores + j * kLanes + l), weight = gradient.weight(score);
          const Vec kept = call.dropout ? load(keep + j * kLanes + l) : splat(1.0f);
          store(scores + j * kLanes + l, call.dropout ? weight * kept : weight);
          if (!need_scores) continue;
          Vec d = load(products + j * kLanes + l);
          if (call.dropout) d *= kept;
          d = gradient.score(score, weight, d);
          store(products + j * kLanes + l, d);
          sum += d;
          if (g.dbias_columns) store(columns + j * W, load(columns + j * W) + d);
        }
        if (g.dbias_rows)
          for (int64_t i = 0; i < least(targets.rows - l, W); i++) g.dbias_rows[targets.first + l + i] += sum[i];
      }
      if (g.dbias.data) add_lanes_to_rows(products, g.dbias, targets.first, targets.rows, source, count);
      const int64_t first_row = kPairs ? targets.first / 2 : targets.first;
      if (need_value) {
        if (kPairs) pair_columns(scores, kLanes, count, targets.lanes);
        product_over_targets<kPairs>(scores, kLanes, 1, rows.dout_rows.data + first_row * rows.dout_rows.row, rows.dout_rows.row, targets.rows, count, F, dvalue, F, low);
      }
      if (g.dquery) {
        float* ds = products;
        if (kPairs) {
          ds = pairs;
          pair_rows(products, kLanes, count, targets.lanes, ds);
        }
        product_over_sources<kPairs>(key_terms.data, key_terms.column, key_terms.row, ds, kLanes, count, call.E, targets.lanes, g.dquery + block * kLanes * call.E, kLanes, low);
      }
      if (need_key) {
        if (kPairs) pair_columns(products, kLanes, count, targets.lanes);
        product_over_targets<kPairs>(products, kLanes, 1, rows.query_rows.data + first_row * rows.query_rows.row, rows.query_rows.row, targets.rows, count, E, dkey, E, low);
      }
    }
    if (need_key) write_rows(dkey, E, call.scale, g.dkey, source, count, call.E);
    if (need_value) write_rows(dvalue, F, 1.0f, g.dvalue, source, count, call.F);
    if (g.dbias_columns)
      for (int64_t j = 0; j < count; j++) {
        float sum = 0.0f;
        for (int l = 0; l < W; l++) sum += columns[j * W + l];
        g.dbias_columns[source + j] = sum;
      }
  }
}

template <class Gradient>
static void backward(const Call& call, const Sequence& s, const Gradients& g, int64_t first, int64_t last, float* scratch) {
  if (kHasPairs && s.query.type == kBFloat) return backward_as<Gradient, kHasPairs>(call, s, g, first, last, scratch);
  backward_as<Gradient, false>(call, s, g, first, last, scratch);
}

static void finish_query(
    const Call& call, const Matrix& query, int64_t T, int64_t block, const float* dquery, int64_t part, int64_t parts, float* scratch) {
  float factor[kLanes] __attribute__((aligned(64)));
  for (int64_t l = 0; l < kLanes; l++) factor[l] = call.scale;
  const float* sum = dquery + block * kLanes * call.E;
  if (parts > 1) {
    for (int64_t i = 0; i < call.E * kLanes; i += W) {
      Vec x = load(sum + i);
      for (int64_t p = 1; p < parts; p++) x += load(sum + p * part + i);
      store(scratch + i, x);
    }
    sum = scratch;
  }
  lanes_to_rows(sum, factor, query, block * kLanes, least(T - block * kLanes, kLanes), 0, call.E);
}

}  // namespace GLOMO_ISA
}  // namespace glomo
