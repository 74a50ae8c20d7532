// Mixtures of graphs without chains: out_m = (sum_n w_mn A_n) F. The rows of a block of targets are mixed over all graphs,
// then one product with the features; backward, one product gives dP_m = dout_m F^T for all graphs:
//   dA_n = sum_m w_mn dP_m,   dw_mn = <dP_m, A_n>,   dF += (sum_n w_mn A_n)^T dout_m
#pragma once

#include "graphs.h"

namespace glomo {
namespace GLOMO_ISA {

// to[l] = weights(target l, n) * factor[l]; no factor: 1
INLINE void lane_weights(const Matrix& weights, const Targets& targets, int64_t n, const float* factor, float* to) {
  for (int64_t l = 0; l < kLanes; l++) to[l] = element(weights, targets.first + least(l, targets.rows - 1), n) * (factor ? factor[l] : 1.0f);
}

// to[j][l] += factor[l] * from[j][l]; no factor: 1
INLINE void add_scaled(float* to, const float* from, const float* factor, int64_t rows, int64_t lanes) {
  for (int64_t l = 0; l < lanes; l += W) {
    const Vec f = factor_of(factor, l);
    for (int64_t j = 0; j < rows; j++) store(to + j * kLanes + l, load(to + j * kLanes + l) + f * load(from + j * kLanes + l));
  }
}

// sums[l] = factor[l] * sum_j a[j][l] b[j][l], or with kSquared of a²; no factor: 1
template <bool kSquared>
INLINE void row_products(const float* a, const float* b, const float* factor, int64_t rows, int64_t lanes, float* sums) {
  for (int64_t l = 0; l < lanes; l += W) {
    Vec sum = {};
    for (int64_t j = 0; j < rows; j++) {
      const Vec x = load(a + j * kLanes + l);
      sum += (kSquared ? x * x : x) * load(b + j * kLanes + l);
    }
    store(sums + l, sum * factor_of(factor, l));
  }
}

INLINE void set_column(const Matrix& m, const Targets& targets, int64_t n, const float* from) {
  for (int64_t l = 0; l < targets.rows; l++) set_element(m, targets.first + l, n, from[l]);
}

// Blocks of targets times features.
struct Features {
  float *floats, *sums;

  Features(const Call& call, Scratch& scratch)
      : floats(scratch.take(kSources * round_up(call.F, W))), sums(scratch.take(round_up(call.F, W) * kLanes)) {}

  // out = mixed (last, lanes) times the features
  void apply(const Call& call, const Mix& mix, const Targets& targets, int64_t last, const float* mixed, const Matrix& out) {
    zero(sums, call.F * kLanes);
    for (int64_t source = 0; source < last; source += kSources) {
      const int64_t count = least(last - source, kSources);
      const Floats values = as_floats(mix.features, source, count, call.F, floats);
      product<true>(values.data, values.column, values.row, mixed + source * kLanes, kLanes, count, call.F, targets.lanes, sums, kLanes);
    }
    lanes_to_rows(sums, nullptr, out, targets.first, targets.rows, 0, call.F);
  }

  // products (last, lanes) = the features times dout
  void products(const Call& call, const Mix& mix, const Targets& targets, int64_t last, const Matrix& dout, float* to) {
    rows_to_lanes(dout, targets.first, targets.rows, 0, call.F, sums);
    for (int64_t source = 0; source < last; source += kSources) {
      const int64_t count = least(last - source, kSources);
      const Floats values = as_floats(mix.features, source, count, call.F, floats);
      product<false>(values.data, values.row, values.column, sums, kLanes, call.F, count, targets.lanes, to + source * kLanes, kLanes);
    }
  }

  // dfeatures (rows of whole vectors) += mixed (count, lanes) times dout
  void add_gradient(const Call& call, const Targets& targets, int64_t count, const float* mixed, const Matrix& dout, float* dfeatures) {
    const int64_t F = round_up(call.F, W);
    const Floats rows = whole_rows(dout, targets.first, targets.rows, call.F, sums);
    product<true>(mixed, kLanes, 1, rows.data, rows.row, targets.rows, count, F, dfeatures, F);
  }
};

static int64_t whole_row(const Mix& mix) { return blocks_of(mix.S) * kSources * kLanes; }

static int64_t mix_scratch(const Call& call, const Mix& mix) {
  Scratch scratch(nullptr);
  GraphRows(call, mix.S, scratch);
  Features(call, scratch);
  scratch.take(mix.M * whole_row(mix));
  return scratch.used;
}

static void mix(const Call& call, const Mix& mix, int64_t block, float* from) {
  Scratch scratch(from);
  GraphRows g(call, mix.S, scratch);
  Features features(call, scratch);
  float* mixed = scratch.take(mix.M * whole_row(mix));
  float factor[kLanes] __attribute__((aligned(64)));
  for (int64_t n = 0; n < mix.N; n++) {
    read_graph<true>(call, mix.graphs[n], block, g);
    for (int64_t m = 0; m < mix.M; m++) {
      float* row = mixed + m * whole_row(mix);
      if (n == 0) zero(row, g.last * kLanes);
      lane_weights(mix.weights[m], g.targets, n, g.inverse, factor);
      for (int64_t source = 0; source < g.last; source += kSources)
        if (g.active[source / kSources])
          add_scaled(row + source * kLanes, g.rows + source * kLanes, factor, least(g.last - source, kSources), g.targets.lanes);
    }
  }
  for (int64_t m = 0; m < mix.M; m++) features.apply(call, mix, g.targets, g.last, mixed + m * whole_row(mix), mix.results[m]);
}

static int64_t mix_backward_scratch(const Call& call, const Mix& mix) {
  Scratch scratch(nullptr);
  GraphRows(call, mix.S, scratch);
  GraphBackward(call, scratch);
  Features(call, scratch);
  scratch.take((2 * mix.M + 1) * whole_row(mix));
  return scratch.used;
}

static void mix_backward(const Call& call, const Mix& mix, const MixGradients& to, int64_t first, int64_t last, float* from) {
  Scratch scratch(from);
  GraphRows g(call, mix.S, scratch);
  GraphBackward b(call, scratch);
  Features features(call, scratch);
  const int64_t whole = whole_row(mix);
  float *dproducts = scratch.take((2 * mix.M + 1) * whole), *mixed = dproducts + mix.M * whole, *dgraph = mixed + mix.M * whole;
  float factor[kLanes] __attribute__((aligned(64)));
  for (int64_t block = first; block < last; block++) {
    for (int64_t n = 0; n < mix.N; n++) {
      const Sequence& s = mix.graphs[n];
      read_graph<false>(call, s, block, g);
      const bool given = s.graph.data;
      if (n == 0 && (to.graphs || to.dweights))
        for (int64_t m = 0; m < mix.M; m++) features.products(call, mix, g.targets, g.last, mix.results[m], dproducts + m * whole);
      for (int64_t m = 0; m < mix.M; m++) {
        const float* dproduct = dproducts + m * whole;
        if (to.dweights) {
          if (given) row_products<false>(g.rows, dproduct, g.inverse, g.last, g.targets.lanes, factor);
          else row_products<true>(g.rows, dproduct, g.inverse, g.last, g.targets.lanes, factor);
          set_column(to.dweights[m], g.targets, n, factor);
        }
        if (to.dfeatures) {
          float* row = mixed + m * whole;
          if (n == 0) zero(row, g.last * kLanes);
          lane_weights(mix.weights[m], g.targets, n, g.inverse, factor);
          for (int64_t l = 0; l < g.targets.lanes; l += W)
            for (int64_t j = 0; j < g.last; j++) {
              const Vec x = load(g.rows + j * kLanes + l);
              store(row + j * kLanes + l, load(row + j * kLanes + l) + load(factor + l) * (given ? x : x * x));
            }
        }
        if (to.graphs) {
          if (m == 0) zero(dgraph, g.last * kLanes);
          lane_weights(mix.weights[m], g.targets, n, nullptr, factor);
          add_scaled(dgraph, dproduct, factor, g.last, g.targets.lanes);
        }
      }
      if (to.graphs) graph_gradient(call, s, to.graphs[n], g, dgraph, b);
    }
    if (!to.dfeatures) continue;
    const int64_t F = round_up(call.F, W);
    for (int64_t m = 0; m < mix.M; m++)
      for (int64_t source = 0; source < g.last; source += kSources)
        features.add_gradient(
            call, g.targets, least(g.last - source, kSources), mixed + m * whole + source * kLanes, mix.results[m], to.dfeatures + source * F);
  }
}

}  // namespace GLOMO_ISA
}  // namespace glomo
