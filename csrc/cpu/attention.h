#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace glomo {

using torch::stable::Tensor;

void attention_forward(
    int64_t rule, Tensor query, Tensor key, Tensor value, std::optional<Tensor> bias, std::optional<Tensor> attn_mask,
    std::optional<Tensor> seed, std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k, Tensor out,
    Tensor statistic, std::optional<Tensor> residual, std::optional<Tensor> active,
    std::optional<Tensor> correction, double dropout_p,
    std::optional<int64_t> diagonal, double scale, double eps);

void attention_backward(
    int64_t rule, Tensor dout, Tensor dstatistic, Tensor out, Tensor statistic, std::optional<Tensor> residual,
    std::optional<Tensor> active, std::optional<Tensor> correction, Tensor query, Tensor key, Tensor value, std::optional<Tensor> bias,
    std::optional<Tensor> attn_mask, std::optional<Tensor> seed, std::optional<Tensor> cu_seqlens_q,
    std::optional<Tensor> cu_seqlens_k, std::optional<Tensor> dquery, std::optional<Tensor> dkey, std::optional<Tensor> dvalue,
    std::optional<Tensor> dbias, std::optional<Tensor> dbias_rows, std::optional<Tensor> dbias_columns, double dropout_p,
    std::optional<int64_t> diagonal, double scale, double eps);

}  // namespace glomo
