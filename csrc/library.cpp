// The ops of glomo::cpu, on PyTorch's stable ABI: this file compiles against torch 2.11 and serves every later one.
#include <torch/csrc/stable/library.h>

#include "cpu/attention.h"
#include "cpu/graphs.h"
#include "cpu/host.h"

STABLE_TORCH_LIBRARY(glomo_cpu, m) {
  m.def("instruction_set(str name) -> str");
  m.def(
      "attention_forward(int rule, Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? attn_mask, Tensor? seed, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor(a!) out, Tensor(b!) statistic, Tensor(c!)? residual, "
      "Tensor(d!)? active, Tensor(e!)? correction, float dropout_p, int? diagonal, float scale, float eps) -> ()");
  m.def(
      "attention_backward(int rule, Tensor dout, Tensor dstatistic, Tensor out, Tensor statistic, Tensor? residual, "
      "Tensor? active, Tensor? correction, Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? attn_mask, Tensor? seed, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor(a!)? dquery, Tensor(b!)? dkey, Tensor(c!)? dvalue, "
      "Tensor(d!)? dbias, Tensor(e!)? dbias_rows, Tensor(f!)? dbias_columns, float dropout_p, int? diagonal, "
      "float scale, float eps) -> ()");
  m.def(
      "affinity_forward(Tensor query, Tensor key, Tensor? bias, Tensor? attn_mask, Tensor(a!) out, int? diagonal, "
      "float scale, float eps) -> ()");
  m.def(
      "affinity_backward(Tensor daffinity, Tensor query, Tensor key, Tensor? bias, Tensor? attn_mask, Tensor(a!)? dquery, "
      "Tensor(b!)? dkey, Tensor(c!)? dbias, Tensor(d!)? dbias_rows, Tensor(e!)? dbias_columns, int? diagonal, "
      "float scale, float eps) -> ()");
  m.def(
      "mix_forward(Tensor? graphs, Tensor? query, Tensor? key, Tensor features, Tensor? weights, Tensor? chain_weights, "
      "Tensor? bias, Tensor? attn_mask, Tensor(a!) out, int num_heads, bool matrices, int? diagonal, float scale, float eps) -> ()");
  m.def(
      "mix_backward(Tensor dout, Tensor? graphs, Tensor? query, Tensor? key, Tensor features, Tensor? weights, "
      "Tensor? chain_weights, Tensor? bias, Tensor? attn_mask, Tensor(a!)? dgraphs, Tensor(b!)? dquery, Tensor(c!)? dkey, "
      "Tensor(d!)? dfeatures, Tensor(e!)? dweights, Tensor(f!)? dchain_weights, Tensor(g!)? dbias, Tensor(h!)? dbias_rows, "
      "Tensor(i!)? dbias_columns, int num_heads, bool matrices, int? diagonal, float scale, float eps) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(glomo_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&glomo::instruction_set));
}

STABLE_TORCH_LIBRARY_IMPL(glomo_cpu, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&glomo::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&glomo::attention_backward));
  m.impl("affinity_forward", TORCH_BOX(&glomo::affinity_forward));
  m.impl("affinity_backward", TORCH_BOX(&glomo::affinity_backward));
  m.impl("mix_forward", TORCH_BOX(&glomo::mix_forward));
  m.impl("mix_backward", TORCH_BOX(&glomo::mix_backward));
}
