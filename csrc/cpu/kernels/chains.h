// Mixtures of graphs and of their running products Lambda_l = A_l Lambda_{l-1} within a head, X_l = Lambda_l X_0, in one of
// two forms. As matrices, X_0 is the identity and the sums are mixed graphs:
//   sums_m = sum_n w_mn A_n + c_mn X_n,   out_m = sums_m F
// Times the features, X_0 = F, and there are no weights w:
//   sums_m = sum_n c_mn X_n = out_m
// Backward, with dX_l = sum_m c_ml dsums_m + A_{l+1}^T dX_{l+1}:
//   dA_l = sum_m w_ml dsums_m + dX_l X_{l-1}^T,   dw_mn = <dsums_m, A_n>,   dc_mn = <dsums_m, X_n>,   dX_0 = A_1^T dX_1
//
// Of causal graphs a product of two triangles costs a third of a triangle times a matrix as wide: matrices are cheaper
// where the features are wider than a third of the sequence. The caller chooses, and keeps matrices to short sequences.
//
// X_l, sums and their gradients are (blocks, width, kLanes): the columns of a block of targets along rows, as in graphs.h.
#pragma once

#include "mixes.h"

namespace glomo {
namespace GLOMO_ISA {

static_assert(kLanes == kSources, "a tile of sources is a block of the targets below");

INLINE int64_t levels(const Mix& mix) { return mix.N / mix.heads; }
INLINE int64_t width_of(const Call& call, const Mix& mix) { return mix.matrices ? mix.S : call.F; }
INLINE int64_t state_floats(const Call& call, const Mix& mix) { return blocks_of(mix.T) * width_of(call, mix) * kLanes; }

// The columns of X_level that a block of targets can have: as matrices, the sources that it reaches over `level` graphs.
INLINE int64_t reach(const Call& call, const Mix& mix, int64_t block, int64_t level) {
  if (!mix.matrices || !call.causal) return width_of(call, mix);
  const int64_t last = least(mix.T, (block + 1) * kLanes) + call.diagonal * level;
  return last < 0 ? 0 : least(last, mix.S);
}

INLINE int64_t furthest(const Call& call, const Mix& mix, int64_t block) {
  const int64_t a = reach(call, mix, block, 1), b = reach(call, mix, block, levels(mix));
  return a > b ? a : b;
}

template <class Float>
INLINE Float* rows_of(Float* x, const Call& call, const Mix& mix, int64_t block) {
  return x + block * width_of(call, mix) * kLanes;
}

// The features of a tile of sources, or X_level of that block of targets, as the columns f and rows j of a product.
static Floats state_tile(const Call& call, const Mix& mix, Features& features, const float* state, int64_t source, int64_t level) {
  if (level > 0) return {rows_of(state, call, mix, source / kSources), 1, kLanes};
  return as_floats(mix.features, source, least(mix.S - source, kSources), call.F, features.floats);
}

// X_level of a block, from the graph g = A_level (squares, or as given) and below = X_{level-1}.
static void next_state(const Call& call, const Mix& mix, Features& features, const GraphRows& g, int64_t block, int64_t level, const float* below, float* to) {
  const int64_t width = reach(call, mix, block, level), lanes = g.targets.lanes;
  zero(to, width * kLanes);
  if (level == 1 && mix.matrices) return add_scaled(to, g.rows, g.inverse, width, lanes);
  for (int64_t source = 0; source < g.last; source += kSources) {
    if (!g.active[source / kSources]) continue;
    const int64_t columns = least(width, reach(call, mix, source / kSources, level - 1));
    const Floats x = state_tile(call, mix, features, below, source, level - 1);
    const int64_t count = least(g.last - source, kSources), low = low_sources(call, g.targets, source, count);
    product_over_sources<false>(x.data, x.column, x.row, g.rows + source * kLanes, kLanes, count, columns, lanes, to, kLanes, low);
  }
  for (int64_t f = 0; f < width; f++)
    for (int64_t l = 0; l < lanes; l += W) store(to + f * kLanes + l, load(to + f * kLanes + l) * load(g.inverse + l));
}

// sums_m += w_mn A_n + c_mn X_n, the rows of a block
static void add_to_sums(const Call& call, const Mix& mix, const GraphRows& g, int64_t block, int64_t level, int64_t n, const float* state, float* sums) {
  float factor[kLanes] __attribute__((aligned(64)));
  for (int64_t m = 0; m < mix.M; m++) {
    float* row = rows_of(sums + m * state_floats(call, mix), call, mix, block);
    if (mix.weights) {
      lane_weights(mix.weights[m], g.targets, n, g.inverse, factor);
      add_scaled(row, g.rows, factor, g.last, g.targets.lanes);
    }
    lane_weights(mix.chain_weights[m], g.targets, n, nullptr, factor);
    add_scaled(row, state, factor, reach(call, mix, block, level), g.targets.lanes);
  }
}

static void zero_sums(const Call& call, const Mix& mix, float* sums) {
  for (int64_t m = 0; m < mix.M; m++)
    for (int64_t block = 0; block < blocks_of(mix.T); block++)
      zero(rows_of(sums + m * state_floats(call, mix), call, mix, block), furthest(call, mix, block) * kLanes);
}

static int64_t chain_scratch(const Call& call, const Mix& mix) {
  Scratch scratch(nullptr);
  GraphRows(call, mix.S, scratch);
  Features(call, scratch);
  scratch.take(2 * state_floats(call, mix));
  return scratch.used;
}

static void chain(const Call& call, const Mix& mix, int64_t first, int64_t last, float* sums, float* from) {
  Scratch scratch(from);
  GraphRows g(call, mix.S, scratch);
  Features features(call, scratch);
  float* states = scratch.take(2 * state_floats(call, mix));
  zero_sums(call, mix, sums);
  for (int64_t head = first; head < last; head++)
    for (int64_t level = 1; level <= levels(mix); level++) {
      const int64_t n = (level - 1) * mix.heads + head;
      const float* below = states + level % 2 * state_floats(call, mix);
      float* state = states + (level + 1) % 2 * state_floats(call, mix);
      for (int64_t block = 0; block < blocks_of(mix.T); block++) {
        read_graph<true>(call, mix.graphs[n], block, g);
        next_state(call, mix, features, g, block, level, below, rows_of(state, call, mix, block));
        add_to_sums(call, mix, g, block, level, n, rows_of(state, call, mix, block), sums);
      }
    }
}

static void sum_parts(const float* from, int64_t floats, int64_t part, int64_t parts, float* to) {
  for (int64_t i = 0; i < floats; i += W) {
    Vec sum = load(from + i);
    for (int64_t p = 1; p < parts; p++) sum += load(from + p * part + i);
    store(to + i, sum);
  }
}

static int64_t chain_end_scratch(const Call& call, const Mix& mix) {
  Scratch scratch(nullptr);
  Features(call, scratch);
  scratch.take(whole_row(mix) + call.F * kLanes);
  return scratch.used;
}

static void chain_out(const Call& call, const Mix& mix, int64_t block, const float* sums, int64_t part, int64_t parts, float* from) {
  Scratch scratch(from);
  Features features(call, scratch);
  float* row = scratch.take(whole_row(mix) + call.F * kLanes);
  Targets targets;
  start_targets(call, mix.graphs[0], block, targets);
  const int64_t last = furthest(call, mix, block);
  for (int64_t m = 0; m < mix.M; m++) {
    sum_parts(rows_of(sums + m * state_floats(call, mix), call, mix, block), last * kLanes, part, parts, row);
    if (mix.matrices) features.apply(call, mix, targets, last, row, mix.results[m]);
    else lanes_to_rows(row, nullptr, mix.results[m], targets.first, targets.rows, 0, call.F);
  }
}

static void chain_dsums(const Call& call, const Mix& mix, int64_t block, float* dsums, float* from) {
  Scratch scratch(from);
  Features features(call, scratch);
  Targets targets;
  start_targets(call, mix.graphs[0], block, targets);
  for (int64_t m = 0; m < mix.M; m++) {
    float* to = rows_of(dsums + m * state_floats(call, mix), call, mix, block);
    if (mix.matrices) features.products(call, mix, targets, furthest(call, mix, block), mix.results[m], to);
    else rows_to_lanes(mix.results[m], targets.first, targets.rows, 0, call.F, to);
  }
}

static int64_t chain_backward_scratch(const Call& call, const Mix& mix) {
  Scratch scratch(nullptr);
  GraphRows(call, mix.S, scratch);
  GraphBackward(call, scratch);
  Features(call, scratch);
  scratch.take((levels(mix) + 2) * state_floats(call, mix));
  scratch.take(2 * whole_row(mix));
  scratch.take(kSources * kLanes);
  return scratch.used;
}

// dX of a level, as far as its own weights make it.
static void start_dstate(const Call& call, const Mix& mix, int64_t n, int64_t level, const float* dsums, float* dstate) {
  float factor[kLanes] __attribute__((aligned(64)));
  Targets targets;
  for (int64_t block = 0; block < blocks_of(mix.T); block++) {
    start_targets(call, mix.graphs[n], block, targets);
    const int64_t width = reach(call, mix, block, level);
    float* to = rows_of(dstate, call, mix, block);
    zero(to, width * kLanes);
    for (int64_t m = 0; m < mix.M; m++) {
      lane_weights(mix.chain_weights[m], targets, n, nullptr, factor);
      add_scaled(to, rows_of(dsums + m * state_floats(call, mix), call, mix, block), factor, width, targets.lanes);
    }
  }
}

struct ChainBackward {
  GraphRows g;
  GraphBackward b;
  Features features;
  float *states, *dstates, *graph, *dgraph, *turned;

  ChainBackward(const Call& call, const Mix& mix, Scratch& scratch)
      : g(call, mix.S, scratch),
        b(call, scratch),
        features(call, scratch),
        states(scratch.take((levels(mix) + 2) * state_floats(call, mix))),
        dstates(states + levels(mix) * state_floats(call, mix)),
        graph(scratch.take(2 * whole_row(mix))),
        dgraph(graph + whole_row(mix)),
        turned(scratch.take(kSources * kLanes)) {}
};

// The gradients that a block of A_n makes, n of this level: of its weights, of dbelow = dX_{level-1} (null: not wanted), of
// its scores.
static void chain_block(
    const Call& call, const Mix& mix, const MixGradients& to, int64_t n, int64_t level, int64_t block, const float* dsums,
    const float* dstate, float* dbelow, ChainBackward& c) {
  const Sequence& s = mix.graphs[n];
  GraphRows& g = c.g;
  const int64_t floats = state_floats(call, mix), width = reach(call, mix, block, level);
  const float *below = level > 1 ? c.states + (level - 2) * floats : nullptr, *dlink = rows_of(dstate, call, mix, block);
  float factor[kLanes] __attribute__((aligned(64)));
  read_graph<false>(call, s, block, g);
  const int64_t lanes = g.targets.lanes;
  for (int64_t m = 0; m < mix.M && to.dchain_weights; m++) {
    const float* state = rows_of(c.states + (level - 1) * floats, call, mix, block);
    row_products<false>(state, rows_of(dsums + m * floats, call, mix, block), nullptr, width, lanes, factor);
    set_column(to.dchain_weights[m], g.targets, n, factor);
  }
  for (int64_t l = 0; l < kLanes; l += W)
    for (int64_t j = 0; j < g.last; j++) {
      const Vec x = l < lanes ? load(g.rows + j * kLanes + l) : Vec{};
      store(c.graph + j * kLanes + l, s.graph.data ? x : x * x * load(g.inverse + l));
    }
  for (int64_t m = 0; m < mix.M && to.dweights; m++) {
    row_products<false>(c.graph, rows_of(dsums + m * floats, call, mix, block), nullptr, g.last, lanes, factor);
    set_column(to.dweights[m], g.targets, n, factor);
  }
  for (int64_t source = 0; source < g.last && dbelow; source += kSources) {
    if (!g.active[source / kSources]) continue;
    const int64_t count = least(g.last - source, kSources), columns = least(width, reach(call, mix, source / kSources, level - 1));
    rows_to_lanes({c.graph + source * kLanes, kLanes, 1, kFloat}, 0, count, 0, g.targets.rows, c.turned);
    product<true>(dlink, kLanes, 1, c.turned, kLanes, g.targets.rows, columns, round_up(count, W),
                  rows_of(dbelow, call, mix, source / kSources), kLanes);
  }
  if (!to.graphs) return;
  zero(c.dgraph, g.last * kLanes);
  for (int64_t m = 0; m < mix.M && mix.weights; m++) {
    lane_weights(mix.weights[m], g.targets, n, nullptr, factor);
    add_scaled(c.dgraph, rows_of(dsums + m * floats, call, mix, block), factor, g.last, lanes);
  }
  if (level == 1 && mix.matrices) {
    add_scaled(c.dgraph, dlink, nullptr, g.last, lanes);
  } else {
    for (int64_t source = 0; source < g.last; source += kSources) {
      if (!g.active[source / kSources] && !s.graph.data) continue;
      const int64_t count = least(g.last - source, kSources), columns = least(width, reach(call, mix, source / kSources, level - 1));
      const Floats x = state_tile(call, mix, c.features, below, source, level - 1);
      product<true>(x.data, x.row, x.column, dlink, kLanes, columns, count, lanes, c.dgraph + source * kLanes, kLanes);
    }
  }
  graph_gradient(call, s, to.graphs[n], g, c.dgraph, c.b);
}

static void chain_backward(
    const Call& call, const Mix& mix, const MixGradients& to, int64_t first, int64_t last, const float* dsums, float* down, float* from) {
  Scratch scratch(from);
  ChainBackward c(call, mix, scratch);
  const int64_t floats = state_floats(call, mix), blocks = blocks_of(mix.T);
  if (down && mix.matrices) zero_sums(call, mix, down);
  if (down && !mix.matrices) zero(down, floats);
  for (int64_t head = first; head < last; head++) {
    for (int64_t level = 1; level <= levels(mix); level++) {
      const int64_t n = (level - 1) * mix.heads + head;
      for (int64_t block = 0; block < blocks; block++) {
        float* state = rows_of(c.states + (level - 1) * floats, call, mix, block);
        read_graph<true>(call, mix.graphs[n], block, c.g);
        next_state(call, mix, c.features, c.g, block, level, level > 1 ? c.states + (level - 2) * floats : nullptr, state);
        if (down && mix.matrices) add_to_sums(call, mix, c.g, block, level, n, state, down);
      }
    }
    if (!to.graphs && !to.dweights && !to.dchain_weights && mix.matrices) continue;
    float *dstate = c.dstates, *dbelow = c.dstates + floats;
    start_dstate(call, mix, (levels(mix) - 1) * mix.heads + head, levels(mix), dsums, dstate);
    for (int64_t level = levels(mix); level >= 1; level--) {
      const int64_t n = (level - 1) * mix.heads + head;
      if (level > 1) start_dstate(call, mix, n - mix.heads, level - 1, dsums, dbelow);
      float* end = mix.matrices ? nullptr : down;
      for (int64_t block = 0; block < blocks; block++) chain_block(call, mix, to, n, level, block, dsums, dstate, level > 1 ? dbelow : end, c);
      float* done = dstate;
      dstate = dbelow;
      dbelow = done;
    }
  }
}

static void chain_dfeatures(
    const Call& call, const Mix& mix, const MixGradients& to, int64_t source, const float* down, int64_t part, int64_t parts, float* from) {
  Scratch scratch(from);
  Features features(call, scratch);
  float* tile = scratch.take(whole_row(mix) + call.F * kLanes);
  const int64_t count = least(mix.S - source, kSources), F = round_up(call.F, W);
  if (!mix.matrices) {
    sum_parts(rows_of(down, call, mix, source / kSources), call.F * kLanes, part, parts, tile);
    return lanes_to_rows(tile, nullptr, {to.dfeatures, F, 1, kFloat}, source, count, 0, call.F);
  }
  Targets targets;
  for (int64_t block = 0; block < blocks_of(mix.T); block++) {
    const int64_t rows = least(furthest(call, mix, block) - source, count);
    if (rows <= 0) continue;
    start_targets(call, mix.graphs[0], block, targets);
    for (int64_t m = 0; m < mix.M; m++) {
      sum_parts(rows_of(down + m * state_floats(call, mix), call, mix, block) + source * kLanes, rows * kLanes, part, parts, tile);
      features.add_gradient(call, targets, rows, tile, mix.results[m], to.dfeatures + source * F);
    }
  }
}

}  // namespace GLOMO_ISA
}  // namespace glomo
