// The ops of glomo::cpu, on PyTorch's stable ABI: this file compiles against torch 2.11 and serves every later one.
#include <torch/csrc/stable/library.h>

#include "cpu/host.h"
#include "cpu/relu2_attention.h"

STABLE_TORCH_LIBRARY(glomo_cpu, m) {
  m.def("instruction_set(str name) -> str");
  m.def(
      "relu2_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? attn_mask, Tensor? seed, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor(a!) out, Tensor(b!) normalizer, Tensor(c!)? residual, "
      "Tensor(d!)? active, float dropout_p, int? diagonal, float scale, float eps) -> ()");
  m.def(
      "relu2_attention_backward(Tensor dout, Tensor dnormalizer, Tensor out, Tensor normalizer, Tensor? residual, "
      "Tensor? active, Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? attn_mask, Tensor? seed, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor(a!)? dquery, Tensor(b!)? dkey, Tensor(c!)? dvalue, "
      "Tensor(d!)? dbias, Tensor(e!)? dbias_rows, Tensor(f!)? dbias_columns, float dropout_p, int? diagonal, "
      "float scale, float eps) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(glomo_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&glomo::instruction_set));
}

STABLE_TORCH_LIBRARY_IMPL(glomo_cpu, CPU, m) {
  m.impl("relu2_attention_forward", TORCH_BOX(&glomo::relu2_attention_forward));
  m.impl("relu2_attention_backward", TORCH_BOX(&glomo::relu2_attention_backward));
}
