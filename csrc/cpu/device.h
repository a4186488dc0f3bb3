// ops.h's Device for CPUs. Its tensors have been chosen before: stable.h or python/autograd.cpp.
#pragma once

#include "../ops.h"

namespace gfl {
namespace {

struct Cpu {
  static constexpr bool kSaves = true;
  // What comes here is on the CPU in all its tensors: the dispatcher sees to it, and autograd.cpp.
  template <typename... Others>
  explicit Cpu(const Tensor&, const Others&...) {}
  Place place() const { return cpu_place(); }
  int run(const gfl_quality_args& args) const { return gfl_quality_cpu(&args); }
  int run(const gfl_distribution_args& args) const { return gfl_distribution_cpu(&args); }
  int run(const gfl_integral_args& args) const { return gfl_integral_cpu(&args); }
  int run(const gfl_statistics_args& args) const { return gfl_statistics_cpu(&args); }
  int run(const gfl_moments_args& args) const { return gfl_moments_cpu(&args); }
  int run(const gfl_distillation_args& args) const { return gfl_distillation_cpu(&args); }
  int run(const gfl_decode_args& args) const { return gfl_decode_cpu(&args); }
  int run_boxes(const gfl_head_args& args) const { return gfl_head_boxes_cpu(&args); }
  int run(const gfl_head_args& args) const { return gfl_head_cpu(&args); }
};

}  // namespace
}  // namespace gfl
