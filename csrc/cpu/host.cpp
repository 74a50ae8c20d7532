#include "host.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <string>

namespace glomo {

namespace {

bool supported(const std::string& name) {
  if (name == "portable") return true;
#if defined(__x86_64__)
  if (name == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (name == "avx512")
    return supported("avx2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (name == "avx512_bf16") return supported("avx512") && __builtin_cpu_supports("avx512bf16");
#endif
  return false;
}

// The widest that this CPU has, or the one of that name; null if it does not have it.
const Kernels* choose(const std::string& name) {
#if defined(__x86_64__)
  const Kernels* const all[] = {&kernels_avx512_bf16, &kernels_avx512, &kernels_avx2, &kernels_portable};
#else
  const Kernels* const all[] = {&kernels_portable};
#endif
  for (const Kernels* k : all)
    if (supported(k->name) && (name.empty() || name == k->name)) return k;
  return nullptr;
}

const Kernels*& chosen() {
  static const Kernels* kernels = choose("");
  return kernels;
}

Type type_of(const Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float: return kFloat;
    case ScalarType::Half: return kHalf;
    case ScalarType::BFloat16: return kBFloat;
    case ScalarType::Bool: return kBool;
    default: STD_TORCH_CHECK(false, "glomo's CPU kernels take float32, float16, bfloat16 and bool tensors.");
  }
}

}  // namespace

const Kernels& kernels() { return *chosen(); }

std::string instruction_set(std::string name) {
  const Kernels* found = choose(name);
  if (!found) return "";
  chosen() = found;
  return found->name;
}

Batch::Batch(const Tensor& t, int64_t tail) : data_((char*)t.data_ptr()), size_(t.element_size()), type_(type_of(t)) {
  const int64_t lead = t.dim() - tail;
  for (int64_t d = 0; d < lead; d++) {
    sizes_.push_back(t.size(d));
    strides_.push_back(t.stride(d));
  }
  rows_ = t.size(lead);
  row_ = rows_ == 1 ? 0 : t.stride(lead);
  if (tail == 2) {
    columns_ = t.size(lead + 1);
    column_ = columns_ == 1 ? 0 : t.stride(lead + 1);
  }
}

Matrix Batch::at(int64_t index, int64_t row, int64_t column) const {
  if (!data_) return {nullptr, 0, 0, kFloat};
  int64_t offset = row_ * row + column_ * column;
  for (size_t d = sizes_.size(); d-- > 0;) {
    offset += index % sizes_[d] * strides_[d];
    index /= sizes_[d];
  }
  return {data_ + offset * size_, row_, column_, type_};
}

Vary Batch::vary() const {
  if (!data_) return kNone;
  if (rows_ == 1) return columns_ == 1 ? kScalar : kColumn;
  return columns_ == 1 ? kRow : kFull;
}

Packing::Packing(const std::optional<Tensor>& boundaries, int64_t rows) {
  if (!boundaries) {
    ends_ = {0, rows};
    return;
  }
  const int64_t count = boundaries->size(0), stride = boundaries->stride(0);
  const bool wide = boundaries->scalar_type() == torch::headeronly::ScalarType::Long;
  for (int64_t i = 0; i < count; i++) {
    const int64_t end = wide ? ((const int64_t*)boundaries->data_ptr())[i * stride] : ((const int32_t*)boundaries->data_ptr())[i * stride];
    const int64_t least = ends_.empty() ? 0 : ends_.back();
    ends_.push_back(end < least ? least : end > rows ? rows : end);  // wrong boundaries never leave the tensor
  }
  if (ends_.empty()) ends_ = {0};
}

int64_t leading(const Tensor& t, int64_t tail) {
  int64_t count = 1;
  for (int64_t d = 0; d < t.dim() - tail; d++) count *= t.size(d);
  return count;
}

Call describe(int64_t E, int64_t F, const Batch& bias, const Batch& mask, std::optional<int64_t> diagonal, double scale, double eps) {
  Call call{};
  call.E = E;
  call.F = F;
  call.causal = diagonal.has_value();
  // far from the ends of 64-bit integers, and the same pairs
  const int64_t most = int64_t(1) << 40;
  call.diagonal = std::max(-most, std::min(diagonal.value_or(0), most));
  call.scale = (float)scale;
  call.eps = (float)eps;
  call.bias = bias.vary();
  call.mask = mask.vary();
  return call;
}

void drop(Call& call, const std::optional<Tensor>& seed, double dropout_p) {
  call.dropout = seed.has_value();
  if (!seed) return;
  const double words = std::nearbyint(dropout_p * 4294967296.0);
  call.threshold = words >= 4294967295.0 ? 4294967295u : (uint32_t)words;
  call.keep_scale = dropout_p < 1.0 ? (float)(1.0 / (1.0 - dropout_p)) : 0.0f;
  call.seed = (uint64_t) * (const int64_t*)seed->data_ptr();
}

int64_t ranges(int64_t problems, int64_t most) {
  constexpr int64_t enough = 16, at_most = 8;
  return std::max<int64_t>(1, std::min({at_most, most, enough / std::max<int64_t>(1, problems)}));
}

void for_each(int64_t items, int64_t floats, const std::function<void(int64_t, float*)>& work) {
  if (items == 0) return;
  const int64_t threads = std::min<int64_t>(items, torch::stable::get_num_threads());
  const int64_t bytes = (floats * 4 + 4095) / 4096 * 4096 + 64;  // no two threads on one line
  std::unique_ptr<char, decltype(&std::free)> scratch((char*)std::aligned_alloc(64, (bytes * threads + 63) / 64 * 64), &std::free);
  STD_TORCH_CHECK(scratch, "There is no memory for ", bytes * threads, " bytes of scratch.");
  std::atomic<int64_t> next{0}, place{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    float* own = (float*)(scratch.get() + bytes * place++);
    for (int64_t item; (item = next++) < items;) work(item, own);
  });
}

}  // namespace glomo
