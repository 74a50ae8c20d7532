// relu2_affinity, graph_mix and relu2_graph_mix: the work of a call, cut into items for the threads.
#include "graphs.h"

#include <algorithm>

#include "host.h"

namespace glomo {

namespace {

constexpr int64_t kTogether = 16;  // ranges of heads at a time, over all batch items: each keeps sums of its own

// What adds up over the targets of a batch item, in scratch: the gradients of N keys, of a bias per source, of the features.
struct Sums {
  int64_t N = 0, S = 0, E = 0, F = 0, floats = 0;
  bool keys = false, columns = false, features = false;

  Sums() = default;
  Sums(const Kernels& run, const Call& call, int64_t N, int64_t S, bool keys, bool columns, bool features)
      : N(N), S(S), E(round_up(call.E, run.width)), F(round_up(call.F, run.width)), keys(keys), columns(columns), features(features) {
    floats = round_up(at_features() + S * features * F, 16);
  }
  float* key(float* base, int64_t n) const { return keys ? base + n * S * E : nullptr; }
  float* column(float* base, int64_t n) const { return columns ? base + N * S * keys * E + n * S : nullptr; }
  float* feature(float* base) const { return features ? base + at_features() : nullptr; }
  int64_t at_features() const { return round_up(N * S * (keys * E + columns), 16); }
};

// Graphs from queries and keys or given: N to a batch item.
struct Graphs {
  Batch query, key, bias, mask, graph;
  int64_t N, T, S, batch;
  Call call;

  Graphs(
      const std::optional<Tensor>& graphs, const std::optional<Tensor>& query_, const std::optional<Tensor>& key_,
      const std::optional<Tensor>& bias_, const std::optional<Tensor>& mask_, int64_t N, int64_t F,
      std::optional<int64_t> diagonal, double scale, double eps)
      : query(query_), key(key_), bias(bias_), mask(mask_), graph(graphs), N(N) {
    const Tensor& rows = graphs ? *graphs : *query_;
    T = rows.size(rows.dim() - 2);
    S = graphs ? graphs->size(graphs->dim() - 1) : key_->size(key_->dim() - 2);
    batch = N == 0 ? 0 : leading(rows, 2) / N;
    call = describe(graphs ? 0 : query_->size(query_->dim() - 1), F, bias, mask, diagonal, scale, eps);
  }

  Sequence sequence(int64_t index) const {
    Sequence s{};
    s.T = T;
    s.S = S;
    s.query = query.at(index);
    s.key = key.at(index);
    s.bias = bias.at(index);
    s.mask = mask.at(index);
    s.graph = graph.at(index);
    return s;
  }
};

// The gradients of all graphs, as tensors.
struct GraphOutputs {
  Batch dquery, dkey, dbias, dgraph;
  float *rows, *columns;

  GraphOutputs(
      const std::optional<Tensor>& dquery, const std::optional<Tensor>& dkey, const std::optional<Tensor>& dbias,
      const std::optional<Tensor>& dbias_rows, const std::optional<Tensor>& dbias_columns, const std::optional<Tensor>& dgraphs)
      : dquery(dquery),
        dkey(dkey),
        dbias(dbias),
        dgraph(dgraphs),
        rows(dbias_rows ? (float*)dbias_rows->data_ptr() : nullptr),
        columns(dbias_columns ? (float*)dbias_columns->data_ptr() : nullptr) {}

  bool any() const { return dquery.present() || dkey.present() || dbias.present() || dgraph.present() || rows || columns; }

  GraphGradients of(const Graphs& in, int64_t index, int64_t n, const Sums& sums, float* base) const {
    GraphGradients g{};
    g.dquery = dquery.at(index);
    g.dkey = sums.key(base, n);
    g.dbias_rows = rows ? rows + index * in.T : nullptr;
    g.dbias_columns = sums.column(base, n);
    g.dbias = dbias.at(index);
    g.dgraph = dgraph.at(index);
    return g;
  }

  // Writes what has added up in `parts` ranges of a batch item.
  void finish(const Kernels& run, const Graphs& in, int64_t item, const Sums& sums, float* base, int64_t parts) const {
    for (int64_t n = 0; n < in.N; n++) {
      const int64_t index = item * in.N + n;
      if (sums.keys) run.write_sum(dkey.at(index), in.S, in.call.E, in.call.scale, sums.key(base, n), sums.floats, parts);
      if (!sums.columns) continue;
      for (int64_t j = 0; j < in.S; j++) {
        float sum = 0.0f;
        for (int64_t p = 0; p < parts; p++) sum += sums.column(base, n)[p * sums.floats + j];
        columns[index * in.S + j] = sum;
      }
    }
  }
};

int64_t graphs_of(const std::optional<Tensor>& weights, const std::optional<Tensor>& chain_weights) {
  const Tensor& t = weights ? *weights : *chain_weights;
  return t.size(t.dim() - 1);
}

// One batch item of a mix, as the kernels take it.
struct Item {
  std::vector<Sequence> graphs;
  std::vector<Matrix> weights, chain_weights, results;
  Mix mix;

  Item() = default;
  Item(Item&&) = default;  // and no copy: mix points into the vectors
};

struct Mixes {
  Graphs in;
  Batch features, weights, chain_weights, results;
  int64_t M, heads;
  bool chains, matrices;

  Mixes(
      Graphs graphs, const Tensor& features_, const std::optional<Tensor>& weights_, const std::optional<Tensor>& chain_weights_,
      const Tensor& results_, int64_t heads, bool matrices)
      : in(std::move(graphs)),
        features(features_),
        weights(weights_),
        chain_weights(chain_weights_),
        results(results_),
        M(results_.size(0)),
        heads(heads),
        chains(chain_weights_.has_value()),
        matrices(matrices) {}

  std::vector<Matrix> of_mixtures(const Batch& b, int64_t item) const {
    std::vector<Matrix> all;
    for (int64_t m = 0; m < M; m++) all.push_back(b.at(m * in.batch + item));
    return all;
  }

  Item item(int64_t i) const {
    Item item{};
    for (int64_t n = 0; n < in.N; n++) item.graphs.push_back(in.sequence(i * in.N + n));
    if (weights.present()) item.weights = of_mixtures(weights, i);
    if (chains) item.chain_weights = of_mixtures(chain_weights, i);
    item.results = of_mixtures(results, i);
    item.mix = {in.N, heads, M, in.T, in.S, matrices, item.graphs.data(), weights.present() ? item.weights.data() : nullptr,
                chains ? item.chain_weights.data() : nullptr, features.at(i), item.results.data()};
    return item;
  }

  // Floats of the sums of a range of heads.
  int64_t sums() const { return M * blocks_of(in.T) * (matrices ? in.S : in.call.F) * kLanes; }
};

// Batch items taken together, each cut into ranges of heads.
struct Together {
  int64_t items, ranges;
  Together(int64_t batch, int64_t heads)
      : items(std::min(batch, kTogether)), ranges(std::min(heads, kTogether / std::max<int64_t>(items, 1))) {}
};

}  // namespace

void affinity_forward(
    Tensor query, Tensor key, std::optional<Tensor> bias, std::optional<Tensor> attn_mask, Tensor out,
    std::optional<int64_t> diagonal, double scale, double eps) {
  const Kernels& run = kernels();
  const Graphs in(std::nullopt, query, key, bias, attn_mask, 1, 0, diagonal, scale, eps);
  const Batch outs(out);
  const int64_t blocks = blocks_of(in.T);
  for_each(in.batch * blocks, run.affinity_scratch(in.call, in.S), [&](int64_t item, float* scratch) {
    Sequence s = in.sequence(item / blocks);
    s.out = outs.at(item / blocks);
    run.affinity(in.call, s, blocks - 1 - item % blocks, scratch);
  });
}

void affinity_backward(
    Tensor daffinity, Tensor query, Tensor key, std::optional<Tensor> bias, std::optional<Tensor> attn_mask,
    std::optional<Tensor> dquery, std::optional<Tensor> dkey, std::optional<Tensor> dbias, std::optional<Tensor> dbias_rows,
    std::optional<Tensor> dbias_columns, std::optional<int64_t> diagonal, double scale, double eps) {
  const Kernels& run = kernels();
  const Graphs in(std::nullopt, query, key, bias, attn_mask, 1, 0, diagonal, scale, eps);
  const GraphOutputs to(dquery, dkey, dbias, dbias_rows, dbias_columns, std::nullopt);
  const Batch daffinities(daffinity);
  const Sums sums(run, in.call, 1, in.S, dkey.has_value(), dbias_columns.has_value(), false);
  const int64_t blocks = blocks_of(in.T), parts = ranges(in.batch, blocks), own = parts == 1 ? sums.floats : 0;
  const Aligned shared(parts > 1 ? in.batch * parts * sums.floats : 0);
  for_each(in.batch * parts, own + run.affinity_backward_scratch(in.call, in.S), [&](int64_t item, float* scratch) {
    const int64_t index = item / parts, part = item % parts;
    float* base = own ? scratch : shared.data() + item * sums.floats;
    std::fill(base, base + sums.floats, 0.0f);
    const GraphGradients g = to.of(in, index, 0, sums, base);
    run.affinity_backward(in.call, in.sequence(index), daffinities.at(index), g, blocks * part / parts, blocks * (part + 1) / parts, scratch + own);
    if (own) to.finish(run, in, index, sums, base, 1);
  });
  if (parts > 1)
    for_each(in.batch, 0, [&](int64_t index, float*) { to.finish(run, in, index, sums, shared.data() + index * parts * sums.floats, parts); });
}

void mix_forward(
    std::optional<Tensor> graphs, std::optional<Tensor> query, std::optional<Tensor> key, Tensor features,
    std::optional<Tensor> weights, std::optional<Tensor> chain_weights, std::optional<Tensor> bias,
    std::optional<Tensor> attn_mask, Tensor out,
    int64_t num_heads, bool matrices, std::optional<int64_t> diagonal, double scale, double eps) {
  const Kernels& run = kernels();
  const int64_t N = graphs_of(weights, chain_weights), F = features.size(features.dim() - 1);
  const Mixes all(Graphs(graphs, query, key, bias, attn_mask, N, F, diagonal, scale, eps), features, weights, chain_weights, out, num_heads, matrices);
  const Graphs& in = all.in;
  if (in.batch == 0) return;
  const int64_t blocks = blocks_of(in.T);
  const Item any = all.item(0);
  if (!all.chains) {
    for_each(in.batch * blocks, run.mix_scratch(in.call, any.mix), [&](int64_t i, float* scratch) {
      run.mix(in.call, all.item(i / blocks).mix, blocks - 1 - i % blocks, scratch);
    });
    return;
  }
  const Together together(in.batch, num_heads);
  const int64_t parts = together.ranges;
  const Aligned totals(together.items * parts * all.sums());
  for (int64_t start = 0; start < in.batch; start += together.items) {
    const int64_t items = std::min(together.items, in.batch - start);
    for_each(items * parts, run.chain_scratch(in.call, any.mix), [&](int64_t i, float* scratch) {
      const int64_t part = i % parts;
      run.chain(in.call, all.item(start + i / parts).mix, num_heads * part / parts, num_heads * (part + 1) / parts, totals.data() + i * all.sums(), scratch);
    });
    for_each(items * blocks, run.chain_end_scratch(in.call, any.mix), [&](int64_t i, float* scratch) {
      run.chain_out(in.call, all.item(start + i / blocks).mix, i % blocks, totals.data() + i / blocks * parts * all.sums(), all.sums(), parts, scratch);
    });
  }
}

void mix_backward(
    Tensor dout, std::optional<Tensor> graphs, std::optional<Tensor> query, std::optional<Tensor> key, Tensor features,
    std::optional<Tensor> weights, std::optional<Tensor> chain_weights, std::optional<Tensor> bias, std::optional<Tensor> attn_mask,
    std::optional<Tensor> dgraphs, std::optional<Tensor> dquery, std::optional<Tensor> dkey, std::optional<Tensor> dfeatures,
    std::optional<Tensor> dweights, std::optional<Tensor> dchain_weights, std::optional<Tensor> dbias,
    std::optional<Tensor> dbias_rows, std::optional<Tensor> dbias_columns, int64_t num_heads, bool matrices,
    std::optional<int64_t> diagonal, double scale, double eps) {
  const Kernels& run = kernels();
  const int64_t N = graphs_of(weights, chain_weights), F = features.size(features.dim() - 1);
  const Mixes all(Graphs(graphs, query, key, bias, attn_mask, N, F, diagonal, scale, eps), features, weights, chain_weights, dout, num_heads, matrices);
  const Graphs& in = all.in;
  if (in.batch == 0) return;
  const GraphOutputs to(dquery, dkey, dbias, dbias_rows, dbias_columns, dgraphs);
  const Batch dfeature(dfeatures), dweight(dweights), dchain(dchain_weights);
  const int64_t blocks = blocks_of(in.T);
  const Item any = all.item(0);

  // The gradients of a batch item; what adds up over targets, from base on.
  struct Outputs {
    std::vector<GraphGradients> graphs;
    std::vector<Matrix> weights, chains;
    MixGradients gradients;

    Outputs() = default;
    Outputs(Outputs&&) = default;
  };
  const auto outputs = [&](int64_t item, const Sums& sums, float* base) {
    Outputs o;
    if (to.any())
      for (int64_t n = 0; n < N; n++) o.graphs.push_back(to.of(in, item * N + n, n, sums, base));
    if (dweights) o.weights = all.of_mixtures(dweight, item);
    if (dchain_weights) o.chains = all.of_mixtures(dchain, item);
    o.gradients = {to.any() ? o.graphs.data() : nullptr, dweights ? o.weights.data() : nullptr, dchain_weights ? o.chains.data() : nullptr, sums.feature(base)};
    return o;
  };
  const auto finish = [&](int64_t item, const Sums& sums, float* base, int64_t parts) {
    to.finish(run, in, item, sums, base, parts);
    if (sums.features) run.write_sum(dfeature.at(item), in.S, F, 1.0f, sums.feature(base), sums.floats, parts);
  };
  const Sums sums(run, in.call, N, in.S, dkey.has_value(), dbias_columns.has_value(), dfeatures.has_value());

  if (!all.chains) {
    const int64_t parts = ranges(in.batch, blocks), own = parts == 1 ? sums.floats : 0;
    const Aligned shared(parts > 1 ? in.batch * parts * sums.floats : 0);
    for_each(in.batch * parts, own + run.mix_backward_scratch(in.call, any.mix), [&](int64_t i, float* scratch) {
      const int64_t item = i / parts, part = i % parts;
      float* base = own ? scratch : shared.data() + i * sums.floats;
      std::fill(base, base + sums.floats, 0.0f);
      run.mix_backward(in.call, all.item(item).mix, outputs(item, sums, base).gradients, blocks * part / parts, blocks * (part + 1) / parts, scratch + own);
      if (own) finish(item, sums, base, 1);
    });
    if (parts > 1) for_each(in.batch, 0, [&](int64_t item, float*) { finish(item, sums, shared.data() + item * parts * sums.floats, parts); });
    return;
  }

  const Together together(in.batch, num_heads);
  const int64_t parts = together.ranges, tiles = blocks_of(in.S);
  const bool need_dsums = to.any() || dweights || dchain_weights || !matrices;
  const Aligned dsums(need_dsums ? together.items * all.sums() : 0), down(dfeatures ? together.items * parts * all.sums() : 0);
  const Aligned shared(together.items * sums.floats);
  for (int64_t start = 0; start < in.batch; start += together.items) {
    const int64_t items = std::min(together.items, in.batch - start);
    std::fill(shared.data(), shared.data() + items * sums.floats, 0.0f);
    if (need_dsums)
      for_each(items * blocks, run.chain_end_scratch(in.call, any.mix), [&](int64_t i, float* scratch) {
        run.chain_dsums(in.call, all.item(start + i / blocks).mix, i % blocks, dsums.data() + i / blocks * all.sums(), scratch);
      });
    for_each(items * parts, run.chain_backward_scratch(in.call, any.mix), [&](int64_t i, float* scratch) {
      const int64_t item = i / parts, part = i % parts;
      const Outputs o = outputs(start + item, sums, shared.data() + item * sums.floats);
      run.chain_backward(in.call, all.item(start + item).mix, o.gradients, num_heads * part / parts, num_heads * (part + 1) / parts,
                         dsums.data() + item * all.sums(), dfeatures ? down.data() + i * all.sums() : nullptr, scratch);
    });
    if (dfeatures)
      for_each(items * tiles, run.chain_end_scratch(in.call, any.mix), [&](int64_t i, float* scratch) {
        const int64_t item = i / tiles;
        const Outputs o = outputs(start + item, sums, shared.data() + item * sums.floats);
        run.chain_dfeatures(in.call, all.item(start + item).mix, o.gradients, i % tiles * kSources, down.data() + item * parts * all.sums(), all.sums(), parts, scratch);
      });
    for_each(items, 0, [&](int64_t item, float*) { finish(start + item, sums, shared.data() + item * sums.floats, 1); });
  }
}

}  // namespace glomo
