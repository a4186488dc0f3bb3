// What the host computes for a launch (plan.cpp) and the kernels read: sizes, strides, and how the
// rows are dealt out to threads. Plain data, passed by value.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace gfl {

// Blocks walk over tiles with this many at most: a constant, because the order of a sum must not
// depend on the GPU. As many partial sums are left to finish_kernel.
constexpr int kMaxBlocks = 4096;
constexpr int kFinishThreads = 64;

// The innermost row dimension is the last one; those in front of the outermost have size 1.
constexpr int kInner = kMaxDims - 1;

struct Steps {
  int64_t row[kMaxDims];
  int64_t column;
  int32_t dtype;  // gfl_dtype
  bool present;
};

struct RowShape {
  int64_t count;  // of all rows
  int64_t size[kMaxDims];
  int32_t ndim;
};

// loss = scale / (avg_factor + eps) * the sum, or a value per row.
struct Scale {
  double scale;
  int32_t avg_dtype;
};

// Quality family. quality_kernel is for beta = 2 and takes its kind of problem from its template
// (of probabilities, loss or gradient: no training step asks for both at once);
// quality_general_kernel takes whatever there is.
enum QualityVariant { kLoss = 1, kGrad = 2, kDense = 4, kPlanes = 8, kProbabilities = 16 };
constexpr int kQualityThreads = 256;
constexpr int kPlaneRowFloats = 4;  // of shared memory, for each row of a tile of kPlanes

struct QualityShape {
  RowShape rows;
  Steps pred, target, score, weight, upstream, loss, grad;
  Scale scale;
  double beta;
  int64_t classes;
  int64_t tiles, tiles_per_run;  // kPlanes
  int32_t lane_bits;             // 2^lane_bits threads share a row, up to 32
  int32_t part_bits;             // kPlanes: 2^part_bits warps share a tile of rows, up to 8
  bool wide;  // pred, target and grad: rows are whole aligned vectors; kPlanes: vectors of rows are
  bool target_is_float;
  bool weight_per_class, probabilities;  // general
};

// Distribution family. distribution_kernel stages tiles of rows in shared memory, as they are;
// distribution_general_kernel reads them where they lie.
enum StageMode {
  kPacked,    // rows lie one after the other without gaps
  kRows,      // a row's bins do
  kBinPlanes  // the bins of neighbouring rows do: NCHW
};
constexpr int kDistributionThreads = 128;
constexpr int kMostTileRows = 4 * kDistributionThreads;

// How a tile moves between shared memory and a matrix: in lines, which are rows or, of kBinPlanes,
// bins.
struct StageShape {
  int32_t mode;
  bool wide;             // lines begin at a vector on both sides
  int32_t slots;         // vectors that a line may touch; unless kPacked
  uint32_t slots_magic;  // 2^32 / n, rounded up: n / slots by a multiplication
};

struct DistributionShape {
  RowShape rows;
  Steps pred, target, weight_left, weight_right, weight, upstream, values, loss, grad;
  Scale scale;
  int64_t bins;
  int64_t tiles, tiles_per_run;
  int32_t lane_bits;  // 2^lane_bits threads share a row, up to 32
  // Staged: a tile is tile_rows rows of one run of the innermost dimension, which are more than
  // there are threads where they are short.
  StageShape pred_stage, grad_stage;
  int32_t tile_rows;
  int32_t row_step, bin_step;  // in shared memory, in elements
  bool whole_vectors;          // a row is made of aligned vectors there
  uint32_t bins_magic;
};

}  // namespace gfl
