// The host's side that all ops share: the instruction set, tensors as matrices, work spread over threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "problem.h"

namespace glomo {

using torch::stable::Tensor;

// The functions of the instruction set in use.
const Kernels& kernels();

// From now on uses the instruction set of that name, the widest for an empty name; returns its name, or nothing if this CPU
// does not have it.
std::string instruction_set(std::string name);

// A tensor (..., rows, columns) whose leading dimensions are those of the call; one matrix for each flat batch-head.
class Batch {
 public:
  Batch() = default;
  // tail: 2, or 1 for statistics of rows, which have no columns
  explicit Batch(const Tensor& t, int64_t tail = 2);
  explicit Batch(const std::optional<Tensor>& t) : Batch(t ? Batch(*t) : Batch()) {}

  // Rows from `row` on and columns from `column` on, where these are not broadcast.
  Matrix at(int64_t index, int64_t row = 0, int64_t column = 0) const;
  Vary vary() const;
  bool present() const { return data_; }

 private:
  char* data_ = nullptr;
  int64_t size_ = 0;  // of an element, in bytes
  Type type_ = kFloat;
  std::vector<int64_t> sizes_, strides_;  // of the leading dimensions
  int64_t row_ = 0, column_ = 0, rows_ = 1, columns_ = 1;
};

// How packed rows belong to sequences; without boundaries there is one sequence, of all rows.
class Packing {
 public:
  Packing(const std::optional<Tensor>& boundaries, int64_t rows);
  int64_t count() const { return (int64_t)ends_.size() - 1; }
  int64_t first(int64_t i) const { return ends_[i]; }
  int64_t size(int64_t i) const { return ends_[i + 1] - ends_[i]; }

 private:
  std::vector<int64_t> ends_;
};

// Number of matrices, or rows, in a tensor's leading dimensions: all but the last `tail`.
int64_t leading(const Tensor& t, int64_t tail);

// E, F: columns of the query and of the value.
Call describe(int64_t E, int64_t F, const Batch& bias, const Batch& mask, std::optional<int64_t> diagonal, double scale, double eps);

// Dropout, where there is a seed.
void drop(Call& call, const std::optional<Tensor>& seed, double dropout_p);

// Into how many ranges each of few problems is cut so that all threads have work: by their number alone, because the result
// must not depend on the threads. A problem of `most` blocks cannot be cut further.
int64_t ranges(int64_t problems, int64_t most);

// Floats from the start of a cache line on, which nobody has written yet.
class Aligned {
 public:
  explicit Aligned(int64_t floats) : memory_(new float[floats + 16]) {}
  float* data() const { return (float*)(((uintptr_t)memory_.get() + 63) / 64 * 64); }

 private:
  std::unique_ptr<float[]> memory_;
};

// work(item, scratch) for every item, the first ones first, on all threads of PyTorch's pool; scratch is of `floats`
// floats, one for each thread. What an item computes must not depend on the thread.
void for_each(int64_t items, int64_t floats, const std::function<void(int64_t, float*)>& work);

}  // namespace glomo
