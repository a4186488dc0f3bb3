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
  bool probabilities;
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

int64_t element_bytes(gfl_dtype dtype);
gfl_dtype accumulator(gfl_dtype dtype);  // float64 for float64, else float32

// name: the function that was called, for messages. std::invalid_argument if the arguments do not
// fit together. The scale is that of the arguments: avg_factor is left to the caller.
QualityProblem describe(const char* name, const gfl_quality_args& args);
DistributionProblem describe(const char* name, const gfl_distribution_args& args);
DistributionProblem describe(const char* name, const gfl_integral_args& args);  // without values

}  // namespace gfl
