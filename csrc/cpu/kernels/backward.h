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

struct BackwardBuffers {
  // of all targets
  float *query, *dout;            // (blocks, E | F, kLanes)
  float *query_rows, *dout_rows;  // (T, E | F) in whole vectors
  float* constants;               // (blocks, kConstants, kLanes): the rule's
  // of a tile
  float *scores, *products;  // (sources, lanes): scores, then weights; dP, then ds
  float *pairs, *keep;
  float *dkey, *dvalue;
  float *keys, *values, *key_pairs;
  float* columns;  // (sources, W): sums of ds

  BackwardBuffers(const Call& call, int64_t T, Scratch& scratch) {
    const int64_t E = round_up(call.E, W), F = round_up(call.F, W), targets = blocks_of(T) * kLanes;
    query = scratch.take(targets * E);
    dout = scratch.take(targets * F);
    query_rows = scratch.take(T * E);
    dout_rows = scratch.take(T * F);
    constants = scratch.take(targets * kConstants);
    scores = scratch.take(kSources * kLanes);
    products = scratch.take(kSources * kLanes);
    pairs = scratch.take(kSources * kLanes);
    keep = scratch.take(kSources * kLanes);
    dkey = scratch.take(kSources * E);
    dvalue = scratch.take(kSources * F);
    keys = scratch.take(kSources * E);
    values = scratch.take(kSources * F);
    key_pairs = scratch.take(kSources * E);
    columns = scratch.take(kSources * W);
  }
};

static int64_t backward_scratch(const Call& call, int64_t T) {
  Scratch scratch(nullptr);
  BackwardBuffers(call, T, scratch);
  return scratch.used;
}

// Fills what is of all targets, but for the rows.
template <class Gradient, bool kPairs>
static void gather(const Call& call, const Sequence& s, const Gradients& g, const BackwardBuffers& to) {
  const int64_t blocks = blocks_of(s.T);
  for (int64_t t = 0; t < blocks * kLanes; t++) {
    float* constants = to.constants + t / kLanes * kConstants * kLanes + t % kLanes;
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
    Gradient::constants(constants, element(s.statistic, t, 0), s.correction ? s.correction[t] : 0.0f, element(g.dstatistic, t, 0), delta, call.eps);
  }
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t count = least(s.T - b * kLanes, kLanes);
    float *query = to.query + b * kLanes * round_up(call.E, W), *dout = to.dout + b * kLanes * round_up(call.F, W);
    if (kPairs) {
      lane_pairs(s.query, b * kLanes, count, call.E, query);
      lane_pairs(g.dout, b * kLanes, count, call.F, dout);
    } else {
      rows_to_lanes(s.query, b * kLanes, count, 0, call.E, query);
      rows_to_lanes(g.dout, b * kLanes, count, 0, call.F, dout);
    }
  }
}

template <class Gradient, bool kPairs>
static void backward_as(const Call& call, const Sequence& s, const Gradients& g, int64_t first, int64_t last, float* from) {
  const int64_t E = round_up(call.E, W), F = round_up(call.F, W), blocks = blocks_of(s.T);
  Scratch scratch(from);
  const BackwardBuffers buffers(call, s.T, scratch);
  float *scores = buffers.scores, *products = buffers.products, *pairs = buffers.pairs, *keep = buffers.keep;
  float *dkey = buffers.dkey, *dvalue = buffers.dvalue, *columns = buffers.columns;
  gather<Gradient, kPairs>(call, s, g, buffers);
  const int64_t depth = kPairs ? (call.E + 1) / 2 : call.E, value_depth = kPairs ? (call.F + 1) / 2 : call.F;
  const bool need_key = g.dkey.data, need_value = g.dvalue.data;
  const bool need_scores = need_key || g.dquery || g.dbias_rows || g.dbias_columns || g.dbias.data;
  Floats query_rows = {}, dout_rows = {};  // along the targets
  if (need_key) query_rows = kPairs ? row_pairs(s.query, 0, s.T, call.E, buffers.query_rows) : whole_rows(s.query, 0, s.T, call.E, buffers.query_rows);
  if (need_value) dout_rows = kPairs ? row_pairs(g.dout, 0, s.T, call.F, buffers.dout_rows) : whole_rows(g.dout, 0, s.T, call.F, buffers.dout_rows);
  for (int64_t source = first; source < last; source += kSources) {
    const int64_t count = least(last - source, kSources);
    const Floats keys = kPairs ? column_pairs(s.key, source, count, call.E, buffers.keys) : as_floats(s.key, source, count, call.E, buffers.keys);
    const Floats values = kPairs ? column_pairs(s.value, source, count, call.F, buffers.values) : as_floats(s.value, source, count, call.F, buffers.values);
    const Floats key_terms = kPairs ? row_pairs(s.key, source, count, call.E, buffers.key_pairs) : keys;  // along the sources
    zero(dkey, kSources * E);
    zero(dvalue, kSources * F);
    zero(columns, kSources * W);
    const int64_t reader = call.causal ? source - call.diagonal : 0;  // the first target that reads any of them
    for (int64_t block = 0; block < blocks; block++) {
      const bool none = (block + 1) * kLanes <= reader ||
          (s.active && !s.active[block * blocks_of(s.S) + source / kSources]);
      Targets targets;
      int64_t low = 0;
      if (!none) {
        start_targets(call, s, block, targets);
        low = low_sources(call, targets, source, count);
        product_of_pairs<false, kPairs>(keys.data, keys.row, keys.column, buffers.query + block * kLanes * E, kLanes, depth, count, targets.lanes, scores, kLanes, low);
      }
      if (none || !finish_scores<Gradient::kRule>(call, s, targets, source, count, scores, pairs)) continue;
      if (need_scores) {
        for (int64_t j = low; j < count; j++) zero(products + j * kLanes, kHalfLanes);
        product_of_pairs<false, kPairs>(values.data, values.row, values.column, buffers.dout + block * kLanes * F, kLanes, value_depth, count, targets.lanes, products, kLanes, low);
      }
      if (call.dropout) dropout_tile(call, s, targets.first, source, count, targets.lanes, keep);
      for (int64_t l = 0; l < targets.lanes; l += W) {
        const Gradient gradient(buffers.constants + block * kConstants * kLanes + l);
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
      if (g.dbias.data) lanes_to_rows<true>(products, nullptr, g.dbias, targets.first, targets.rows, source, count);
      const int64_t first_row = kPairs ? targets.first / 2 : targets.first;
      if (need_value) {
        if (kPairs) pair_columns(scores, kLanes, count, targets.lanes);
        product_over_targets<kPairs>(scores, kLanes, 1, dout_rows.data + first_row * dout_rows.row, dout_rows.row, targets.rows, count, F, dvalue, F, low);
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
        product_over_targets<kPairs>(products, kLanes, 1, query_rows.data + first_row * query_rows.row, query_rows.row, targets.rows, count, E, dkey, E, low);
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
