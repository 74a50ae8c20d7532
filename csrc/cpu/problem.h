// What a kernel is told: plain numbers and pointers, nothing of PyTorch or of the C++ library.
#pragma once

#include <stdint.h>

namespace glomo {

constexpr int64_t kLanes = 64;    // targets that a kernel takes at a time, side by side in vector lanes
constexpr int64_t kSources = 64;  // sources of a tile

enum Type : int32_t { kFloat, kHalf, kBFloat, kBool };

// Elements of a matrix (rows, columns) at data[row * i + column * j]; a stride of 0 broadcasts.
struct Matrix {
  void* data;  // null: there is none
  int64_t row, column;
  Type type;
};

enum Rule : int32_t { kRelu2, kSoftmax };  // how scores become weights

enum Vary : int32_t { kNone, kScalar, kRow, kColumn, kFull };  // how a bias or a mask varies over pairs

// What all sequences of a call share.
struct Call {
  int64_t E, F;      // columns of the query, and of the value
  int32_t causal;    // target t reads the sources j <= t + diagonal
  int64_t diagonal;
  float scale, eps;
  Vary bias, mask;
  int32_t dropout;   // a weight is kept where its random word reaches threshold
  uint32_t threshold;
  float keep_scale;
  uint64_t seed;
};

// One batch-head (of one packed sequence).
struct Sequence {
  int64_t T, S;
  uint64_t index;  // flat batch-head, of which dropout is a function
  Matrix query, key, value, bias, mask;
  Matrix out, statistic;   // statistic: one column, Z or lse
  float* residual;         // (T, F): what out lost by rounding, or null
  int8_t* active;          // (blocks of targets, tiles of sources): whether any score is positive, or null
};

// The gradients of one batch-head, as far as a range of its sources makes them. What is not wanted has no data.
struct Gradients {
  Matrix dout, dstatistic;
  Matrix dkey, dvalue;  // written where the sources are
  float* dquery;        // (blocks, E, kLanes), added to: the same for all ranges of a batch-head that run one after the other
  float* dbias_rows;    // (T,), added to
  float* dbias_columns; // (S,), written
  Matrix dbias;         // (T, S), written
};

// The functions of one instruction set. Scratch is in floats; [2]: by the rule.
struct Kernels {
  const char* name;
  int64_t (*forward_scratch)(const Call&);
  void (*forward[2])(const Call&, const Sequence&, int64_t block, float* scratch);
  int64_t (*backward_scratch)(const Call&, int64_t T);
  void (*backward[2])(const Call&, const Sequence&, const Gradients&, int64_t first, int64_t last, float* scratch);
  // query[t][e] = scale * (sum over parts of dquery), of one block of targets
  void (*finish_query)(const Call&, const Matrix& query, int64_t T, int64_t block, const float* dquery, int64_t part, int64_t parts, float* scratch);
};

extern const Kernels kernels_portable, kernels_avx2, kernels_avx512, kernels_avx512_bf16;

}  // namespace glomo
