#include "attention.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <unordered_map>

#include "host.h"

namespace glomo {

namespace {

// The tensors of a call that both passes read.
struct Inputs {
  Batch query, key, value, bias, mask;
  Call call;
  Packing targets, sources;
  int64_t heads = 1, rows, columns;
  std::vector<int64_t> begin{0};  // of each sequence's blocks of targets

  Inputs(
      const Tensor& query_, const Tensor& key_, const Tensor& value_, const std::optional<Tensor>& bias_,
      const std::optional<Tensor>& mask_, const std::optional<Tensor>& seed, const std::optional<Tensor>& cu_seqlens_q,
      const std::optional<Tensor>& cu_seqlens_k, double dropout_p, std::optional<int64_t> diagonal, double scale, double eps)
      : query(query_),
        key(key_),
        value(value_),
        bias(bias_),
        mask(mask_),
        call(describe(query_.size(query_.dim() - 1), value_.size(value_.dim() - 1), bias, mask, diagonal, scale, eps)),
        targets(cu_seqlens_q, query_.size(query_.dim() - 2)),
        sources(cu_seqlens_k, key_.size(key_.dim() - 2)),
        rows(query_.size(query_.dim() - 2)),
        columns(key_.size(key_.dim() - 2)) {
    heads = leading(query_, 2);
    drop(call, seed, dropout_p);
    STD_TORCH_CHECK(targets.count() == sources.count(), "cu_seqlens_q and cu_seqlens_k must have one length.");
    for (int64_t i = 0; i < targets.count(); i++) begin.push_back(begin.back() + blocks_of(targets.size(i)));
  }

  int64_t blocks() const { return begin.back(); }

  // The sequence that a block of targets belongs to.
  int64_t sequence_of(int64_t block) const { return std::upper_bound(begin.begin(), begin.end(), block) - begin.begin() - 1; }

  Sequence sequence(
      int64_t head, int64_t i, const std::optional<Tensor>& residual, const std::optional<Tensor>& active,
      const std::optional<Tensor>& correction) const {
    const int64_t t = targets.first(i), s = sources.first(i);
    Sequence sequence{};
    if (residual) sequence.residual = (float*)residual->data_ptr() + (head * rows + t) * call.F;
    if (active) sequence.active = (int8_t*)active->data_ptr() + head * blocks_of(rows) * blocks_of(columns);
    if (correction) sequence.correction = (float*)correction->data_ptr() + head * rows + t;
    sequence.T = targets.size(i);
    sequence.S = sources.size(i);
    sequence.index = (uint64_t)(i * heads + head);
    sequence.query = query.at(head, t);
    sequence.key = key.at(head, s);
    sequence.value = value.at(head, s);
    sequence.bias = bias.at(head, t, s);
    sequence.mask = mask.at(head, t, s);
    return sequence;
  }
};

// Batch-heads whose gradient of a bias is one matrix take turns, one after the other: the heads of each turn.
std::vector<std::vector<int64_t>> turns_of(const Batch& dbias, int64_t heads) {
  std::vector<std::vector<int64_t>> turns(1);
  std::unordered_map<void*, size_t> before;
  for (int64_t head = 0; head < heads; head++) {
    void* matrix = dbias.at(head).data;
    const size_t turn = matrix ? before[matrix]++ : 0;
    if (turn == turns.size()) turns.emplace_back();
    turns[turn].push_back(head);
  }
  return turns;
}

}  // namespace

void attention_forward(
    int64_t rule, Tensor query, Tensor key, Tensor value, std::optional<Tensor> bias, std::optional<Tensor> attn_mask,
    std::optional<Tensor> seed, std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k, Tensor out,
    Tensor statistic, std::optional<Tensor> residual, std::optional<Tensor> active,
    std::optional<Tensor> correction, double dropout_p,
    std::optional<int64_t> diagonal, double scale, double eps) {
  const Kernels& run = kernels();
  STD_TORCH_CHECK(rule == kRelu2 || rule == kSoftmax, "There is no rule ", rule, ".");
  const Inputs in(query, key, value, bias, attn_mask, seed, cu_seqlens_q, cu_seqlens_k, dropout_p, diagonal, scale, eps);
  const Batch outs(out), statistics(statistic, 1);
  for_each(in.heads * in.blocks(), run.forward_scratch(in.call), [&](int64_t item, float* scratch) {
    const int64_t head = item / in.blocks(), block = in.blocks() - 1 - item % in.blocks();  // causal: the longest first
    const int64_t i = in.sequence_of(block), t = in.targets.first(i);
    Sequence sequence = in.sequence(head, i, residual, active, correction);
    sequence.out = outs.at(head, t);
    sequence.statistic = statistics.at(head, t);
    run.forward[rule](in.call, sequence, block - in.begin[i], scratch);
  });
}

void attention_backward(
    int64_t rule, Tensor dout, Tensor dstatistic, Tensor out, Tensor statistic, std::optional<Tensor> residual,
    std::optional<Tensor> active, std::optional<Tensor> correction, Tensor query, Tensor key, Tensor value, std::optional<Tensor> bias,
    std::optional<Tensor> attn_mask, std::optional<Tensor> seed, std::optional<Tensor> cu_seqlens_q,
    std::optional<Tensor> cu_seqlens_k, std::optional<Tensor> dquery, std::optional<Tensor> dkey, std::optional<Tensor> dvalue,
    std::optional<Tensor> dbias, std::optional<Tensor> dbias_rows, std::optional<Tensor> dbias_columns, double dropout_p,
    std::optional<int64_t> diagonal, double scale, double eps) {
  const Kernels& run = kernels();
  STD_TORCH_CHECK(rule == kRelu2 || rule == kSoftmax, "There is no rule ", rule, ".");
  const Inputs in(query, key, value, bias, attn_mask, seed, cu_seqlens_q, cu_seqlens_k, dropout_p, diagonal, scale, eps);
  const Batch douts(dout), dstatistics(dstatistic, 1), outs(out), statistics(statistic, 1);
  const Batch dqueries(dquery), dkeys(dkey), dvalues(dvalue), dbiases(dbias);
  const int64_t count = in.targets.count(), E = in.call.E;
  int64_t longest = 0, most = 0;
  for (int64_t i = 0; i < count; i++) {
    longest = std::max(longest, in.targets.size(i));
    most = std::max(most, blocks_of(in.sources.size(i)));
  }
  const std::vector<std::vector<int64_t>> turns = turns_of(dbiases, in.heads);
  const int64_t heads = (int64_t)turns[0].size(), parts = ranges(heads * count, most);
  const int64_t block_floats = kLanes * E, part_floats = heads * in.blocks() * block_floats;
  const int64_t own = parts == 1 && dquery ? blocks_of(longest) * block_floats : 0;  // dQ of one batch-head
  const Aligned partial(parts > 1 && dquery ? parts * part_floats : 0);
  std::vector<float> row_sums(parts > 1 && dbias_rows ? parts * in.heads * in.rows : 0);

  for (const std::vector<int64_t>& turn : turns) {
    const int64_t taking = (int64_t)turn.size();
    for_each(parts * taking * count, own + run.backward_scratch(in.call, longest), [&](int64_t item, float* scratch) {
      const int64_t part = item % parts, place = item / parts % taking, i = item / parts / taking, head = turn[place];
      const int64_t t = in.targets.first(i), s = in.sources.first(i);
      Sequence sequence = in.sequence(head, i, residual, active, correction);
      sequence.out = outs.at(head, t);
      sequence.statistic = statistics.at(head, t);
      Gradients g{};
      g.dout = douts.at(head, t);
      g.dstatistic = dstatistics.at(head, t);
      g.dkey = dkeys.at(head, s);
      g.dvalue = dvalues.at(head, s);
      g.dbias = dbiases.at(head, t, s);
      const int64_t blocks = blocks_of(sequence.T);
      if (dquery) {
        g.dquery = parts > 1 ? partial.data() + part * part_floats + (place * in.blocks() + in.begin[i]) * block_floats : scratch;
        std::fill(g.dquery, g.dquery + blocks * block_floats, 0.0f);
      }
      if (dbias_rows) g.dbias_rows = (parts > 1 ? row_sums.data() + part * in.heads * in.rows : (float*)dbias_rows->data_ptr()) + head * in.rows + t;
      if (dbias_columns) g.dbias_columns = (float*)dbias_columns->data_ptr() + head * in.columns + s;
      const int64_t tiles = blocks_of(sequence.S);
      const int64_t first = tiles * part / parts * kSources, last = std::min(tiles * (part + 1) / parts * kSources, sequence.S);
      run.backward[rule](in.call, sequence, g, first, last, scratch + own);
      if (own)
        for (int64_t b = 0; b < blocks; b++)
          run.finish_query(in.call, dqueries.at(head, t), sequence.T, b, g.dquery, 0, 1, nullptr);
    });
    if (parts > 1 && dquery)
      for_each(taking * in.blocks(), block_floats, [&](int64_t item, float* scratch) {
        const int64_t place = item / in.blocks(), block = item % in.blocks(), i = in.sequence_of(block);
        const float* first = partial.data() + (place * in.blocks() + in.begin[i]) * block_floats;
        run.finish_query(in.call, dqueries.at(turn[place], in.targets.first(i)), in.targets.size(i), block - in.begin[i], first, part_floats, parts, scratch);
      });
  }
  if (parts > 1 && dbias_rows) {
    float* to = (float*)dbias_rows->data_ptr();
    for (int64_t p = 0; p < parts; p++)
      for (int64_t i = 0; i < in.heads * in.rows; i++) to[i] += row_sums[p * in.heads * in.rows + i];
  }
}

}  // namespace glomo
