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

enum DistributionKind : int32_t { kTargetLoss, kExpectation, kStatistics, kMoments };

struct DistributionProblem {
  DistributionKind kind;
  int ndim;
  int64_t size[kMaxDims];
  int64_t bins;
  // Of statistics and moments, grad_loss and loss have columns.
  Operand pred, target, weight_left, weight_right, weight, grad_loss, loss, grad;
  Operand values;  // [K], of the accumulation type
  Operand saved;   // an expectation's two columns: gfl_integral_args
  double scale;
  int32_t window;  // bins beside the highest one that an expectation is over; -1: all
  int32_t topk;
  bool add_mean;
  bool big_grad;  // more than the caches will keep
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

struct DistillationProblem {
  int ndim;
  int64_t size[kMaxDims];
  int64_t bins;
  Operand pred, teacher, weight, grad_loss, loss, grad;
  double temperature;
  double scale;
};

// Rows of four sides to boxes. Operands with several values a row have them along `column`.
struct DecodeProblem {
  int ndim;
  int64_t size[kMaxDims];
  int64_t bins, classes;
  Operand pred, points, strides, cls, limits;
  Operand boxes, deviation, score, label;
  Operand values;  // [K], of the accumulation type
  double stride;   // where `strides` is absent
  bool clips;
  double height, width;  // where `limits` is absent
  int64_t window;        // < 0: of all bins
};

// Sums over positives: their number, their weights, weighted box loss and DFL.
struct HeadSums {
  double count, weight, bbox, dfl;
};

// Of a form: whether pred holds probabilities; whether a label makes its class a positive even with
// a quality of 0.
static constexpr bool on_probabilities(int form) {
  return form == GFL_PROBABILITIES || form == GFL_VARIFOCAL_PROBABILITIES ||
         form == GFL_FOCAL_PROBABILITIES;
}
// What background_loss_grad has as alpha in a form on logits.
static constexpr double background_alpha(int form, double alpha) {
  switch (form) {
    case GFL_VARIFOCAL:
    case GFL_MATCHABILITY:
      return alpha;
    case GFL_BALANCED:
      return 1 - alpha;
    case GFL_FOCAL:
      return alpha < 0 ? 1 : 1 - alpha;
    default:
      return 1;
  }
}
// Whether the weight of a form is a constant of the derivative.
static constexpr bool detaches_weight(int form, int flags) {
  return form == GFL_MATCHABILITY || flags & GFL_DETACH_WEIGHT;
}
static constexpr bool has_positives(int form) {
  return form == GFL_VARIFOCAL || form == GFL_VARIFOCAL_PROBABILITIES || form == GFL_MATCHABILITY ||
         form == GFL_IOU_AWARE;
}

int64_t element_bytes(gfl_dtype dtype);
gfl_dtype accumulator(gfl_dtype dtype);  // float64 for float64, else float32

// name: the function that was called, for messages. std::invalid_argument if the arguments do not
// fit together. The scale is that of the arguments: avg_factor is left to the caller.
QualityProblem describe(const char* name, const gfl_quality_args& args);
DistributionProblem describe(const char* name, const gfl_distribution_args& args);
// Without values.
DistributionProblem describe(const char* name, const gfl_integral_args& args);
DistributionProblem describe(const char* name, const gfl_statistics_args& args);
DistributionProblem describe(const char* name, const gfl_moments_args& args);
DecodeProblem describe(const char* name, const gfl_decode_args& args);
DistillationProblem describe(const char* name, const gfl_distillation_args& args);
// The level whose first anchor is number `first`, with the gradient's scales left at 0.
HeadProblem describe(const char* name, const gfl_head_args& args, int level, int64_t first);

}  // namespace gfl
