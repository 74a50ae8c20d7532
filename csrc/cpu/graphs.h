#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace glomo {

using torch::stable::Tensor;

void affinity_forward(
    Tensor query, Tensor key, std::optional<Tensor> bias, std::optional<Tensor> attn_mask, Tensor out,
    std::optional<int64_t> diagonal, double scale, double eps);

void affinity_backward(
    Tensor daffinity, Tensor query, Tensor key, std::optional<Tensor> bias, std::optional<Tensor> attn_mask,
    std::optional<Tensor> dquery, std::optional<Tensor> dkey, std::optional<Tensor> dbias, std::optional<Tensor> dbias_rows,
    std::optional<Tensor> dbias_columns, std::optional<int64_t> diagonal, double scale, double eps);

void mix_forward(
    std::optional<Tensor> graphs, std::optional<Tensor> query, std::optional<Tensor> key, Tensor features,
    std::optional<Tensor> weights, std::optional<Tensor> chain_weights, std::optional<Tensor> bias,
    std::optional<Tensor> attn_mask, Tensor out,
    int64_t num_heads, bool matrices, std::optional<int64_t> diagonal, double scale, double eps);

void mix_backward(
    Tensor dout, std::optional<Tensor> graphs, std::optional<Tensor> query, std::optional<Tensor> key, Tensor features,
    std::optional<Tensor> weights, std::optional<Tensor> chain_weights, std::optional<Tensor> bias, std::optional<Tensor> attn_mask,
    std::optional<Tensor> dgraphs, std::optional<Tensor> dquery, std::optional<Tensor> dkey, std::optional<Tensor> dfeatures,
    std::optional<Tensor> dweights, std::optional<Tensor> dchain_weights, std::optional<Tensor> dbias,
    std::optional<Tensor> dbias_rows, std::optional<Tensor> dbias_columns, int64_t num_heads, bool matrices,
    std::optional<int64_t> diagonal, double scale, double eps);

}  // namespace glomo
