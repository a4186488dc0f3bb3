// What the C functions of gfl_kernels.h make of their arguments: the operands of a problem, checked
// for what memory safety needs, with their row dimensions merged. No standard library: the
// instruction-set specific kernels include it.
#pragma once

#include <cstdint>

#include "gfl_kernels/gfl_kernels.h"

namespace gfl {

constexpr int kMaxDims = 8;  // of the rows, after dimensions that step together have been merged

// One tensor of a problem. Strides in elements; row[d] along the d-th row dimension, column along
// classes or bins.
struct Operand {
  char* data = nullptr;  // null: absent
  gfl_dtype dtype = GFL_FLOAT32;
  int64_t row[kMaxDims] = {};
  int64_t column = 0;
};

// A block of rows is a run along the innermost row dimension; its operands are offset to the run's
// outer index.
struct QualityProblem {
  int ndim;
  int64_t size[kMaxDims];
  int64_t classes;
  Operand pred, target, score, weight, grad_loss, loss, grad;
  bool weight_per_class;
  gfl_form form;
  int32_t flags;
  double alpha;
  double beta;
  double scale;
};

struct DistributionProblem {
  int ndim;
  int64_t size[kMaxDims];
  int64_t bins;
  Operand pred, target, weight_left, weight_right, weight, grad_loss, loss, grad;
  Operand values;  // [K], of the accumulation type; present: the integral, else the loss
  double scale;
};

// One level of a head. Of an operand with a value per anchor, row[0] steps along images and row[1]
// along cells; of logits, whose cells may lie in a plane of rows, row[1] along the plane's rows and
// row[2] along their `width` cells.
struct HeadProblem {
  int64_t batch, cells, width;
  int64_t classes, bins;
  Operand cls, label_weights, grad_cls;
  Operand scores;  // class logits, or the targets where there are some (`dense`)
  Operand box, points, labels, box_targets;
  Operand quality, weight, boxes;
  Operand grad;  // of box; present: the CPU kernel writes only it, else the three before
  bool dense;
  gfl_iou iou;
  double iou_eps, limit, stride;
  double bbox_scale, dfl_scale;  // of the gradient
};

// Sums over positives: their number, their weights, weighted box loss and DFL.
struct HeadSums {
  double count, weight, bbox, dfl;
};

// Of a form: whether pred holds probabilities; whether a label makes its class a positive even with
// a quality of 0.
constexpr bool on_probabilities(int form) {
  return form == GFL_PROBABILITIES || form == GFL_VARIFOCAL_PROBABILITIES ||
         form == GFL_FOCAL_PROBABILITIES;
}
constexpr bool has_positives(int form) {
  return form == GFL_VARIFOCAL || form == GFL_VARIFOCAL_PROBABILITIES || form == GFL_MATCHABILITY ||
         form == GFL_IOU_AWARE;
}

int64_t element_bytes(gfl_dtype dtype);
gfl_dtype accumulator(gfl_dtype dtype);  // float64 for float64, else float32

// name: the function that was called, for messages. std::invalid_argument if the arguments do not
// fit together. The scale is that of the arguments: avg_factor is left to the caller.
QualityProblem describe(const char* name, const gfl_quality_args& args);
DistributionProblem describe(const char* name, const gfl_distribution_args& args);
DistributionProblem describe(const char* name, const gfl_integral_args& args);  // without values
// The level whose first anchor is number `first`, with the gradient's scales left at 0.
HeadProblem describe(const char* name, const gfl_head_args& args, int level, int64_t first);

}  // namespace gfl
