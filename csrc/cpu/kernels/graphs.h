// Graphs as whole rows: relu2_affinity, and what mixes of graphs are made of.
//
// A block of targets has its rows in scratch, (S, kLanes): sources along rows and targets along lanes.
#pragma once

#include "products.h"
#include "scores.h"

namespace glomo {
namespace GLOMO_ISA {

struct GraphRows {
  float *query, *floats, *pairs;
  int8_t* active;  // of a tile of sources: whether it has anything but zeros
  float* rows;
  float inverse[kLanes] __attribute__((aligned(64)));  // what rows are still to be multiplied by
  Targets targets;
  int64_t last;

  GraphRows(const Call& call, int64_t S, Scratch& scratch)
      : query(scratch.take(round_up(call.E, W) * kLanes)),
        floats(scratch.take(kSources * round_up(call.E, W))),
        pairs(scratch.take(kSources * kLanes)),
        active((int8_t*)scratch.take(blocks_of(S))),
        rows(scratch.take(blocks_of(S) * kSources * kLanes)) {}
};

INLINE bool any_number(const float* x, int64_t floats) {
  Int found = {};
  for (int64_t i = 0; i < floats; i += W) found |= load(x + i) != 0.0f;
  return any(found);
}

// The rows of a block: a given graph, or r, or with kSquared r².
template <bool kSquared>
static void read_graph(const Call& call, const Sequence& s, int64_t block, GraphRows& g) {
  start_targets(call, s, block, g.targets);
  g.last = last_source(call, s, g.targets);
  if (s.graph.data) {
    rows_to_lanes(s.graph, g.targets.first, g.targets.rows, 0, g.last, g.rows);
    for (int64_t source = 0; source < g.last; source += kSources)
      g.active[source / kSources] = any_number(g.rows + source * kLanes, least(g.last - source, kSources) * kLanes);
    for (float& x : g.inverse) x = 1.0f;
    return;
  }
  const int64_t lanes = g.targets.lanes;
  rows_to_lanes(s.query, g.targets.first, g.targets.rows, 0, call.E, g.query);
  float total[kLanes] __attribute__((aligned(64))) = {};
  for (int64_t source = 0; source < g.last; source += kSources) {
    const int64_t count = least(g.last - source, kSources);
    const Floats keys = as_floats(s.key, source, count, call.E, g.floats);
    float* scores = g.rows + source * kLanes;
    const int64_t low = low_sources(call, g.targets, source, count);
    product_of_pairs<false, false>(keys.data, keys.row, keys.column, g.query, kLanes, call.E, count, lanes, scores, kLanes, low);
    const bool found = finish_scores<kRelu2>(call, s, g.targets, source, count, scores, g.pairs);
    g.active[source / kSources] = found;
    if (!found) continue;
    for (int64_t l = 0; l < lanes; l += W) {
      Vec sum = load(total + l);
      for (int64_t j = 0; j < count; j++) {
        const Vec x = load(scores + j * kLanes + l), square = x * x;
        sum += square;
        if (kSquared) store(scores + j * kLanes + l, square);
      }
      store(total + l, sum);
    }
  }
  for (int64_t l = 0; l < kLanes; l++) {
    g.inverse[l] = total[l] == 0.0f ? 0.0f : 1.0f / (total[l] + call.eps);
    if (g.inverse[l] != __builtin_inff()) continue;
    // a sum so small that its inverse overflows
    for (int64_t j = 0; j < g.last; j++) g.rows[j * kLanes + l] *= kSquared ? 0x1p64f : 0x1p32f;
    g.inverse[l] = 1.0f / ((total[l] + call.eps) * 0x1p64f);
  }
}

struct GraphBackward {
  float *query_rows, *dquery;

  GraphBackward(const Call& call, Scratch& scratch)
      : query_rows(scratch.take(kLanes * round_up(call.E, W))), dquery(scratch.take(kLanes * round_up(call.E, W))) {}
};

// From the rows r of a block and the gradient dA of its graph: ds = 2 r (dA - delta) / (Z + eps) with delta = sum of A dA,
// which takes the place of r, and the gradients that follow from it.
static void graph_gradient(const Call& call, const Sequence& s, const GraphGradients& to, GraphRows& g, const float* dgraph, GraphBackward& b) {
  const Targets& targets = g.targets;
  const int64_t lanes = targets.lanes, E = round_up(call.E, W);
  if (s.graph.data) {
    lanes_to_rows(dgraph, nullptr, to.dgraph, targets.first, targets.rows, 0, g.last);
    return;
  }
  float sums[kLanes] __attribute__((aligned(64)));
  for (int64_t l = 0; l < lanes; l += W) {
    const Vec inverse = load(g.inverse + l);
    Vec delta = {}, sum = {};
    for (int64_t j = 0; j < g.last; j++) {
      const Vec r = load(g.rows + j * kLanes + l);
      delta += r * r * load(dgraph + j * kLanes + l);
    }
    delta *= inverse;
    for (int64_t j = 0; j < g.last; j++) {
      const Vec d = 2.0f * load(g.rows + j * kLanes + l) * inverse * (load(dgraph + j * kLanes + l) - delta);
      store(g.rows + j * kLanes + l, d);
      sum += d;
    }
    store(sums + l, sum);
  }
  if (to.dbias_rows)
    for (int64_t l = 0; l < targets.rows; l++) to.dbias_rows[targets.first + l] = sums[l];
  if (to.dbias_columns)
    for (int64_t j = 0; j < g.last; j++) {
      Vec sum = {};  // lanes without a target hold 0
      for (int64_t l = 0; l < lanes; l += W) sum += load(g.rows + j * kLanes + l);
      for (int i = 0; i < W; i++) to.dbias_columns[j] += sum[i];
    }
  if (to.dbias.data) lanes_to_rows(g.rows, nullptr, to.dbias, targets.first, targets.rows, 0, g.last);
  if (!to.dquery.data && !to.dkey) return;
  const Floats queries = to.dkey ? whole_rows(s.query, targets.first, targets.rows, call.E, b.query_rows) : Floats{};
  zero(b.dquery, E * kLanes);
  for (int64_t source = 0; source < g.last; source += kSources) {
    if (!g.active[source / kSources]) continue;
    const int64_t count = least(g.last - source, kSources), low = low_sources(call, targets, source, count);
    const float* ds = g.rows + source * kLanes;
    if (to.dquery.data) {
      const Floats keys = as_floats(s.key, source, count, call.E, g.floats);
      product_over_sources<false>(keys.data, keys.column, keys.row, ds, kLanes, count, call.E, lanes, b.dquery, kLanes, low);
    }
    if (to.dkey) product_over_targets<false>(ds, kLanes, 1, queries.data, queries.row, targets.rows, count, E, to.dkey + source * E, E, low);
  }
  if (!to.dquery.data) return;
  float scale[kLanes] __attribute__((aligned(64)));
  for (float& x : scale) x = call.scale;
  lanes_to_rows(b.dquery, scale, to.dquery, targets.first, targets.rows, 0, call.E);
}

static int64_t affinity_scratch(const Call& call, int64_t S) {
  Scratch scratch(nullptr);
  GraphRows(call, S, scratch);
  return scratch.used;
}

static void affinity(const Call& call, const Sequence& s, int64_t block, float* from) {
  Scratch scratch(from);
  GraphRows g(call, s.S, scratch);
  read_graph<true>(call, s, block, g);
  lanes_to_rows(g.rows, g.inverse, s.out, g.targets.first, g.targets.rows, 0, g.last);
  for (int64_t t = g.targets.first; t < g.targets.first + g.targets.rows; t++)
    for (int64_t j = g.last; j < s.S; j += W) store_some(s.out, t, j, s.S - j, Vec{});
}

static int64_t affinity_backward_scratch(const Call& call, int64_t S) {
  Scratch scratch(nullptr);
  GraphRows(call, S, scratch);
  GraphBackward(call, scratch);
  scratch.take(blocks_of(S) * kSources * kLanes);
  return scratch.used;
}

static void affinity_backward(
    const Call& call, const Sequence& s, const Matrix& daffinity, const GraphGradients& to, int64_t first, int64_t last, float* from) {
  Scratch scratch(from);
  GraphRows g(call, s.S, scratch);
  GraphBackward b(call, scratch);
  float* dgraph = scratch.take(blocks_of(s.S) * kSources * kLanes);
  for (int64_t block = first; block < last; block++) {
    read_graph<false>(call, s, block, g);
    rows_to_lanes(daffinity, g.targets.first, g.targets.rows, 0, g.last, dgraph);
    graph_gradient(call, s, to, g, dgraph, b);
  }
}

static void write_sum(const Matrix& to, int64_t rows, int64_t columns, float factor, float* from, int64_t part, int64_t parts) {
  const int64_t wide = round_up(columns, W);
  for (int64_t p = 1; p < parts; p++)
    for (int64_t i = 0; i < rows * wide; i += W) store(from + i, load(from + i) + load(from + p * part + i));
  write_rows(from, wide, factor, to, 0, rows, columns);
}

}  // namespace GLOMO_ISA
}  // namespace glomo
