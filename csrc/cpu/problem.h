// What a kernel is told: plain numbers and pointers, nothing of PyTorch or of the C++ library.
#pragma once

#include <stdint.h>

namespace glomo {

constexpr int64_t kLanes = 64;    // targets that a kernel takes at a time, side by side in vector lanes
constexpr int64_t kSources = 64;  // sources of a tile

// Of this file alone wherever it is included, so that no file runs another one's instructions.
#define GLOMO_INLINE static inline __attribute__((always_inline))
GLOMO_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
GLOMO_INLINE int64_t blocks_of(int64_t rows) { return (rows + kLanes - 1) / kLanes; }

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
  float* correction;       // (T,): what lse lost by rounding, or null
  int8_t* active;          // (blocks of targets, tiles of sources): whether any pair counts, or null
  Matrix graph;            // (T, S), given instead of queries and keys, or null
};

// The gradients of one batch-head, as far as a range of its sources makes them. What is not wanted has no data.
struct Gradients {
  Matrix dout, dstatistic;
  Matrix dkey, dvalue;  // written where the sources are
  float* dquery;        // (blocks, E, kLanes), added to: the same for all ranges of a batch-head that run one after the other
  float* dbias_rows;    // (T,), added to
  float* dbias_columns; // (S,), written
  Matrix dbias;         // (T, S), added to
};

// The gradients of one graph. What is not wanted has no data.
struct GraphGradients {
  Matrix dquery;        // written, at the rows of a block of targets
  float* dkey;          // (S, E in whole vectors), added to
  float* dbias_rows;    // (T,), written
  float* dbias_columns; // (S,), added to
  Matrix dbias, dgraph; // (T, S), written
};

// A mixture of N graphs, as one batch item sees it: out_m = sum_n weights_m[n] A_n F + sum_n chain_weights_m[n] Lambda_n F.
struct Mix {
  int64_t N, heads, M, T, S;  // graphs, heads of a layer, mixtures
  bool matrices;              // chains are running products of graphs; else, without weights, of these times the features
  const Sequence* graphs;     // N
  const Matrix *weights, *chain_weights;  // M each, (T, N), or null
  Matrix features;            // (S, F)
  const Matrix* results;      // M, (T, F): out, which is written, or its gradient, which is read
};

struct MixGradients {
  const GraphGradients* graphs;  // N, or null if none of them wants any
  const Matrix *dweights, *dchain_weights;  // M each, (T, N), written
  float* dfeatures;              // (S, F in whole vectors), added to
};

// The functions of one instruction set. Scratch is in floats; [2]: by the rule.
struct Kernels {
  const char* name;
  int64_t width;  // lanes of a vector
  int64_t (*forward_scratch)(const Call&);
  void (*forward[2])(const Call&, const Sequence&, int64_t block, float* scratch);
  int64_t (*backward_scratch)(const Call&, int64_t T);
  void (*backward[2])(const Call&, const Sequence&, const Gradients&, int64_t first, int64_t last, float* scratch);
  // query[t][e] = scale * (sum over parts of dquery), of one block of targets
  void (*finish_query)(const Call&, const Matrix& query, int64_t T, int64_t block, const float* dquery, int64_t part, int64_t parts, float* scratch);

  // A of a block of targets, written to out
  int64_t (*affinity_scratch)(const Call&, int64_t S);
  void (*affinity)(const Call&, const Sequence&, int64_t block, float* scratch);
  // the gradients that a range of blocks of targets makes
  int64_t (*affinity_backward_scratch)(const Call&, int64_t S);
  void (*affinity_backward)(const Call&, const Sequence&, const Matrix& daffinity, const GraphGradients&, int64_t first, int64_t last, float* scratch);

  // Without chains: a block of targets, and the gradients that a range of blocks makes.
  int64_t (*mix_scratch)(const Call&, const Mix&);
  void (*mix)(const Call&, const Mix&, int64_t block, float* scratch);
  int64_t (*mix_backward_scratch)(const Call&, const Mix&);
  void (*mix_backward)(const Call&, const Mix&, const MixGradients&, int64_t first, int64_t last, float* scratch);

  // With chains: what a range of heads adds to the sums (M, blocks, width, kLanes), which are mixed graphs (width S) or mixed
  // features (width F); out from the sum of these over ranges of heads; the gradient of the sums; the gradients of a range
  // of heads from it; the gradient of a tile of features. down is what the features' gradient needs of a range of heads, or
  // null: the mixed graphs again, or the features' gradient (blocks, F, kLanes).
  int64_t (*chain_scratch)(const Call&, const Mix&);
  void (*chain)(const Call&, const Mix&, int64_t first, int64_t last, float* sums, float* scratch);
  int64_t (*chain_end_scratch)(const Call&, const Mix&);  // of the next two, and of the last
  void (*chain_out)(const Call&, const Mix&, int64_t block, const float* sums, int64_t part, int64_t parts, float* scratch);
  void (*chain_dsums)(const Call&, const Mix&, int64_t block, float* dsums, float* scratch);
  int64_t (*chain_backward_scratch)(const Call&, const Mix&);
  void (*chain_backward)(const Call&, const Mix&, const MixGradients&, int64_t first, int64_t last, const float* dsums, float* down, float* scratch);
  void (*chain_dfeatures)(const Call&, const Mix&, const MixGradients&, int64_t source, const float* down, int64_t part, int64_t parts, float* scratch);

  // to[i][c] = factor * sum over parts of from[i][c], rows of whole vectors
  void (*write_sum)(const Matrix& to, int64_t rows, int64_t columns, float factor, float* from, int64_t part, int64_t parts);
};

extern const Kernels kernels_portable, kernels_avx2, kernels_avx512, kernels_avx512_bf16;

}  // namespace glomo
