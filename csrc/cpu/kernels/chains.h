// Mixtures of graphs and of their running products: with Lambda_l = A_l Lambda_{l-1} within a head,
//   mixed_m = sum_n w_mn A_n + c_mn Lambda_n,   out_m = mixed_m F
// Backward, with dmixed_m = dout_m F^T and dLambda_l = sum_m c_ml dmixed_m + A_{l+1}^T dLambda_{l+1}:
//   dA_l = sum_m w_ml dmixed_m + dLambda_l Lambda_{l-1}^T,   dw_mn = <dmixed_m, A_n>,   dc_mn = <dmixed_m, Lambda_n>
//
// The products are matrices of sequences short enough for that (the caller sees to it). Of causal graphs a product of two
// triangles is a third of a triangle times a matrix as wide: cheaper than A_l (Lambda_{l-1} F) where F is wider than a
// third of the sequence. A matrix is (blocks, S, kLanes): the rows of each block of targets as in graphs.h.
#pragma once

#include "mixes.h"

namespace glomo {
namespace GLOMO_ISA {

static_assert(kLanes == kSources, "a tile of sources is a block of the targets below");

// One past the last source that a block of targets reaches over `level` graphs.
INLINE int64_t reach(const Call& call, const Mix& mix, int64_t block, int64_t level) {
  if (!call.causal) return mix.S;
  const int64_t last = least(mix.T, (block + 1) * kLanes) + call.diagonal * level;
  return last < 0 ? 0 : least(last, mix.S);
}

INLINE int64_t levels(const Mix& mix) { return mix.N / mix.heads; }

INLINE int64_t furthest(const Call& call, const Mix& mix, int64_t block) {
  const int64_t a = reach(call, mix, block, 1), b = reach(call, mix, block, levels(mix));
  return a > b ? a : b;
}

INLINE int64_t matrix(const Mix& mix) { return blocks_of(mix.T) * mix.S * kLanes; }

INLINE float* rows_of(float* x, const Mix& mix, int64_t block) { return x + block * mix.S * kLanes; }
INLINE const float* rows_of(const float* x, const Mix& mix, int64_t block) { return x + block * mix.S * kLanes; }

// The rows of a block of Lambda_level, from the graph g = A_level (squares, or as given) and below = Lambda_{level-1}.
static void link(const Call& call, const Mix& mix, const GraphRows& g, int64_t block, int64_t level, const float* below, float* to) {
  const int64_t width = reach(call, mix, block, level), lanes = g.targets.lanes;
  zero(to, width * kLanes);
  if (level == 1) return add_scaled(to, g.rows, g.inverse, width, lanes);
  for (int64_t source = 0; source < g.last; source += kSources) {
    if (!g.active[source / kSources]) continue;
    const int64_t columns = least(width, reach(call, mix, source / kSources, level - 1));
    product<true>(rows_of(below, mix, source / kSources), kLanes, 1, g.rows + source * kLanes, kLanes,
                  least(g.last - source, kSources), columns, lanes, to, kLanes);
  }
  for (int64_t f = 0; f < width; f++)
    for (int64_t l = 0; l < lanes; l += W) store(to + f * kLanes + l, load(to + f * kLanes + l) * load(g.inverse + l));
}

// mixed_m += w_mn A_n + c_mn Lambda_n, the rows of a block
static void add_mixed(const Call& call, const Mix& mix, const GraphRows& g, int64_t block, int64_t level, int64_t n, const float* product, float* mixed) {
  float factor[kLanes] __attribute__((aligned(64))), one[kLanes];
  for (float& x : one) x = 1.0f;
  for (int64_t m = 0; m < mix.M; m++) {
    float* row = rows_of(mixed + m * matrix(mix), mix, block);
    lane_weights(mix.weights[m], g.targets, n, g.inverse, factor);
    add_scaled(row, g.rows, factor, g.last, g.targets.lanes);
    lane_weights(mix.chain_weights[m], g.targets, n, one, factor);
    add_scaled(row, product, factor, reach(call, mix, block, level), g.targets.lanes);
  }
}

static void zero_mixed(const Call& call, const Mix& mix, float* mixed) {
  for (int64_t m = 0; m < mix.M; m++)
    for (int64_t block = 0; block < blocks_of(mix.T); block++)
      zero(rows_of(mixed + m * matrix(mix), mix, block), furthest(call, mix, block) * kLanes);
}

static int64_t chain_scratch(const Call& call, const Mix& mix) {
  Scratch scratch(nullptr);
  GraphRows(call, mix.S, scratch);
  scratch.take(2 * matrix(mix));
  return scratch.used;
}

static void chain(const Call& call, const Mix& mix, int64_t first, int64_t last, float* mixed, float* from) {
  Scratch scratch(from);
  GraphRows g(call, mix.S, scratch);
  float *states = scratch.take(2 * matrix(mix));
  zero_mixed(call, mix, mixed);
  for (int64_t head = first; head < last; head++)
    for (int64_t level = 1; level <= levels(mix); level++) {
      const int64_t n = (level - 1) * mix.heads + head;
      float *below = states + level % 2 * matrix(mix), *state = states + (level + 1) % 2 * matrix(mix);
      for (int64_t block = 0; block < blocks_of(mix.T); block++) {
        read_graph<true>(call, mix.graphs[n], block, g);
        link(call, mix, g, block, level, below, rows_of(state, mix, block));
        add_mixed(call, mix, g, block, level, n, rows_of(state, mix, block), mixed);
      }
    }
}

// The sum of a tile, or of all rows of a block, over ranges of heads.
static void sum_parts(const float* from, int64_t floats, int64_t part, int64_t parts, float* to) {
  for (int64_t i = 0; i < floats; i += W) {
    Vec sum = load(from + i);
    for (int64_t p = 1; p < parts; p++) sum += load(from + p * part + i);
    store(to + i, sum);
  }
}

static void chain_out(const Call& call, const Mix& mix, int64_t block, const float* mixed, int64_t part, int64_t parts, float* from) {
  Scratch scratch(from);
  Features features(call, scratch);
  float* row = scratch.take(whole_row(mix));
  Targets targets;
  start(call, mix.graphs[0], block, targets);
  const int64_t last = furthest(call, mix, block);
  for (int64_t m = 0; m < mix.M; m++) {
    sum_parts(rows_of(mixed + m * matrix(mix), mix, block), last * kLanes, part, parts, row);
    features.apply(call, mix, targets, last, row, mix.out[m]);
  }
}

static void chain_dmixed(const Call& call, const Mix& mix, int64_t block, float* dmixed, float* from) {
  Scratch scratch(from);
  Features features(call, scratch);
  Targets targets;
  start(call, mix.graphs[0], block, targets);
  for (int64_t m = 0; m < mix.M; m++)
    features.products(call, mix, targets, furthest(call, mix, block), mix.dout[m], rows_of(dmixed + m * matrix(mix), mix, block));
}

static int64_t chain_backward_scratch(const Call& call, const Mix& mix) {
  Scratch scratch(nullptr);
  GraphRows(call, mix.S, scratch);
  GraphBackward(call, scratch);
  Features(call, scratch);
  scratch.take((levels(mix) + 2) * matrix(mix));
  scratch.take(2 * whole_row(mix));
  scratch.take(kSources * kLanes);
  return scratch.used;
}

// dLambda of a level, as far as its own weights make it.
static void start_dlink(const Call& call, const Mix& mix, int64_t n, int64_t level, const float* dmixed, float* dstate) {
  float factor[kLanes] __attribute__((aligned(64))), one[kLanes];
  for (float& x : one) x = 1.0f;
  Targets targets;
  for (int64_t block = 0; block < blocks_of(mix.T); block++) {
    start(call, mix.graphs[n], block, targets);
    const int64_t width = reach(call, mix, block, level);
    float* to = rows_of(dstate, mix, block);
    zero(to, width * kLanes);
    for (int64_t m = 0; m < mix.M; m++) {
      lane_weights(mix.chain_weights[m], targets, n, one, factor);
      add_scaled(to, rows_of(dmixed + m * matrix(mix), mix, block), factor, width, targets.lanes);
    }
  }
}

static void chain_backward(
    const Call& call, const Mix& mix, const MixGradients& to, int64_t first, int64_t last, const float* dmixed, float* mixed, float* from) {
  Scratch scratch(from);
  GraphRows g(call, mix.S, scratch);
  GraphBackward b(call, scratch);
  Features features(call, scratch);
  float* states = scratch.take((levels(mix) + 2) * matrix(mix));
  float *graph = scratch.take(2 * whole_row(mix)), *dgraph = graph + whole_row(mix), *turned = scratch.take(kSources * kLanes);
  float factor[kLanes] __attribute__((aligned(64)));
  if (mixed) zero_mixed(call, mix, mixed);
  for (int64_t head = first; head < last; head++) {
    const auto state_of = [&](int64_t level) { return states + (level - 1) * matrix(mix); };
    for (int64_t level = 1; level <= levels(mix); level++) {
      const int64_t n = (level - 1) * mix.heads + head;
      for (int64_t block = 0; block < blocks_of(mix.T); block++) {
        float* state = rows_of(state_of(level), mix, block);
        read_graph<true>(call, mix.graphs[n], block, g);
        link(call, mix, g, block, level, level > 1 ? state_of(level - 1) : nullptr, state);
        if (mixed) add_mixed(call, mix, g, block, level, n, state, mixed);
      }
    }
    if (!to.graphs && !to.dweights && !to.dchain_weights) continue;
    float *dstate = states + levels(mix) * matrix(mix), *dbelow = dstate + matrix(mix);
    start_dlink(call, mix, (levels(mix) - 1) * mix.heads + head, levels(mix), dmixed, dstate);
    for (int64_t level = levels(mix); level >= 1; level--) {
      const int64_t n = (level - 1) * mix.heads + head;
      const Sequence& s = mix.graphs[n];
      if (level > 1) start_dlink(call, mix, n - mix.heads, level - 1, dmixed, dbelow);
      for (int64_t block = 0; block < blocks_of(mix.T); block++) {
        const int64_t width = reach(call, mix, block, level);
        const float* dlink = rows_of(dstate, mix, block);
        read_graph<false>(call, s, block, g);
        const int64_t lanes = g.targets.lanes;
        if (to.dchain_weights)
          for (int64_t m = 0; m < mix.M; m++) {
            row_products<false>(rows_of(state_of(level), mix, block), rows_of(dmixed + m * matrix(mix), mix, block), features.ones, width, lanes, factor);
            set_column(to.dchain_weights[m], g.targets, n, factor);
          }
        zero(graph, g.last * kLanes);
        for (int64_t l = 0; l < lanes; l += W)
          for (int64_t j = 0; j < g.last; j++) {
            const Vec x = load(g.rows + j * kLanes + l);
            store(graph + j * kLanes + l, s.graph.data ? x : x * x * load(g.inverse + l));
          }
        if (to.dweights)
          for (int64_t m = 0; m < mix.M; m++) {
            row_products<false>(graph, rows_of(dmixed + m * matrix(mix), mix, block), features.ones, g.last, lanes, factor);
            set_column(to.dweights[m], g.targets, n, factor);
          }
        for (int64_t source = 0; source < g.last && level > 1; source += kSources) {
          if (!g.active[source / kSources]) continue;
          const int64_t count = least(g.last - source, kSources), columns = least(width, reach(call, mix, source / kSources, level - 1));
          rows_to_lanes({graph + source * kLanes, kLanes, 1, kFloat}, 0, count, 0, g.targets.rows, turned);
          product<true>(dlink, kLanes, 1, turned, kLanes, g.targets.rows, columns, round_up(count, W),
                        rows_of(dbelow, mix, source / kSources), kLanes);
        }
        if (!to.graphs) continue;
        zero(dgraph, g.last * kLanes);
        for (int64_t m = 0; m < mix.M; m++) {
          lane_weights(mix.weights[m], g.targets, n, features.ones, factor);
          add_scaled(dgraph, rows_of(dmixed + m * matrix(mix), mix, block), factor, g.last, lanes);
        }
        if (level == 1) add_scaled(dgraph, dlink, features.ones, g.last, lanes);
        for (int64_t source = 0; source < g.last && level > 1; source += kSources) {
          const int64_t count = least(g.last - source, kSources), columns = least(width, reach(call, mix, source / kSources, level - 1));
          if (g.active[source / kSources] || s.graph.data)
            product<true>(rows_of(state_of(level - 1), mix, source / kSources), 1, kLanes, dlink, kLanes, columns, count, lanes,
                          dgraph + source * kLanes, kLanes);
        }
        graph_gradient(call, s, to.graphs[n], g, dgraph, b);
      }
      float* done = dstate;
      dstate = dbelow;
      dbelow = done;
    }
  }
}

static void chain_dfeatures(
    const Call& call, const Mix& mix, const MixGradients& to, int64_t source, const float* mixed, int64_t part, int64_t parts, float* from) {
  Scratch scratch(from);
  Features features(call, scratch);
  float* tile = scratch.take(kSources * kLanes);
  const int64_t count = least(mix.S - source, kSources), F = round_up(call.F, W);
  Targets targets;
  for (int64_t block = 0; block < blocks_of(mix.T); block++) {
    const int64_t rows = least(furthest(call, mix, block) - source, count);
    if (rows <= 0) continue;
    start(call, mix.graphs[0], block, targets);
    for (int64_t m = 0; m < mix.M; m++) {
      sum_parts(rows_of(mixed + m * matrix(mix), mix, block) + source * kLanes, rows * kLanes, part, parts, tile);
      features.add_gradient(call, targets, rows, tile, mix.dout[m], to.dfeatures + source * F);
    }
  }
}

}  // namespace GLOMO_ISA
}  // namespace glomo
