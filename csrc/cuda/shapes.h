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

// In place of a gfl_dtype where bfloat16 and float16 have one kernel.
constexpr int kHalf = GFL_FLOAT16;
constexpr int kernel_dtype(int dtype) { return dtype == GFL_BFLOAT16 ? kHalf : dtype; }

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

// Quality family. quality_kernel is for Quality Focal Loss with beta = 2 and, as kFamily, for all
// losses on logits whose background is background_loss_grad's; it takes its kind of problem from
// its template (but for logits of Quality Focal Loss, loss or gradient: no training step asks for
// both at once); quality_general_kernel takes whatever there is.
enum QualityVariant {
  kLoss = 1,
  kGrad = 2,
  kDense = 4,
  kPlanes = 8,
  kProbabilities = 16,
  kFamily = 32
};
constexpr int kQualityThreads = 256;
constexpr int kPlaneRowFloats = 4;  // of shared memory, for each row of a tile of kPlanes

struct QualityShape {
  RowShape rows;
  Steps pred, target, score, weight, upstream, loss, grad;
  Scale scale;
  double alpha, beta;
  int32_t form, flags;
  float background_alpha, gamma;  // kFamily
  bool detach;
  int64_t classes;
  int64_t tiles, tiles_per_run;  // kPlanes
  int32_t lane_bits;             // 2^lane_bits threads share a row, up to 32
  int32_t part_bits;             // kPlanes: 2^part_bits warps share a tile of rows, up to 8
  bool wide;  // pred, target and grad: rows are whole aligned vectors; kPlanes: vectors of rows are
  bool target_is_float;
  bool weight_per_class;  // general
};

// Distribution family. distribution_kernel stages tiles of rows in shared memory, as they are;
// distribution_general_kernel reads them where they lie.
enum StageMode {
  kPacked,    // rows lie one after the other without gaps
  kRows,      // a row's bins do
  kBinPlanes  // the bins of neighbouring rows do: NCHW
};
constexpr int kDistributionThreads = 128;
constexpr int kSummary = 1;  // in place of a number of bins: any, for all but loss and mean
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
  DistributionKind kind;
  int32_t window, topk;
  bool add_mean;
  bool summary;  // not the loss, nor the expectation over all bins
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
  int32_t grad_offset;         // there, of the gradient from the logits; 0: it takes their place
  bool whole_vectors;          // a row is made of aligned vectors there
  uint32_t bins_magic;
};

// So many bins each thread of a row has in registers, or 0.
constexpr int kHeldBins = 5;

struct DistillationShape {
  RowShape rows;
  Steps pred, teacher, weight, upstream, loss, grad;
  Scale scale;
  double inverse_temperature;
  int64_t bins;
  int32_t lane_bits;  // 2^lane_bits threads share a row
  bool simple;        // a row is found in 32 bits
};

// Decoding.
constexpr int kDecodeThreads = 128;
constexpr int kDecodeLanes =
    4;  // for each of the four sides of a row whose channels are neighbours

struct DecodeShape {
  RowShape rows;
  Steps pred, points, strides, values, limits, boxes, deviation, cls, score, label;
  double stride, height, width;
  int32_t bins, classes;
  int32_t window;     // < 0: of all bins
  int32_t lane_bits;  // of score_kernel: 2^lane_bits threads share a row
  bool clips, planes;
  bool simple;  // a row is found in 32 bits
};

// Heads: all levels of a pyramid in one launch, a block to a tile, which is neighbouring cells of
// one image of one level. One structure serves all stages; each has its own tiles.
constexpr int kMaxHeadLevels = 12;  // as 4 KiB of kernel parameters allow
constexpr int kBoxThreads = 128;    // and cells of a tile of boxes
constexpr int kClassThreads = 256;
constexpr int kHeadFinishThreads = 512;

// Beside kLoss or kGrad, kDense and kPlanes; Varifocal Loss with gamma = 2. Without any the loss is
// Quality Focal Loss with beta = 2. head_class_general_kernel takes whatever there is.
enum ClassVariant { kCrossEntropy = 16, kVarifocal = 32, kGeneralClass = 64 };

// Strides in elements.
struct HeadMatrix {  // [B, rows, width, columns]
  char* data;
  int64_t image, row, cell, column;
};
struct HeadVector {  // a value per cell, or a few
  const char* data;
  int64_t image, cell, column;
};

struct HeadLevel {
  HeadMatrix logits;   // of boxes or classes
  HeadMatrix targets;  // of the classes; for head_boxes_kernel what a positive's weight is made of
  HeadMatrix grad;     // of logits
  HeadVector points, labels, box_targets, label_weights;
  int64_t anchor;             // the number of its first one in an image
  double stride;              // in pixels
  int32_t cells;              // of an image
  int32_t width;              // as many as cells if no matrix has a gap between rows
  int32_t first_tile, tiles;  // of the launch; of an image
  // Whether logits and grad, or grad alone in head_box_grad_kernel, are whole aligned vectors along
  // the launch's contiguous dimension; whether the targets are, along the same.
  bool wide, target_wide;
  bool columns;  // a cell's classes are neighbours
  bool packed;   // grad of boxes: cells lie one after the other without gaps
};

struct HeadShape {
  HeadLevel levels[kMaxHeadLevels];
  double iou_eps, limit, alpha, beta, loss_weights[3];
  int64_t anchors;  // of an image
  int64_t normaliser_step, sums_row, sums_column;
  int64_t level_steps[3];  // of losses, or of upstream gradients, per level: classes, box, DFL
  int32_t count;           // of levels
  int32_t tiles, tile_cells;
  int32_t batch, classes, bins;
  int32_t logits_dtype, target_dtype, label_dtype, label_weight_dtype, point_dtype,
      box_target_dtype;
  int32_t logits_bytes;
  int32_t iou;
  bool dense;  // there are targets of classes; labels are a mask
  bool varifocal;
  bool unit_upstream;
  // Classes. As in QualityShape, and for elements one by one.
  int32_t lane_bits, element_lane_bits, part_bits;
  bool target_is_float, has_grad, planes;
};

}  // namespace gfl
