// The CPU implementations of the ops.
#include "../ops.h"

namespace gfl {
namespace {

struct Cpu {
  static constexpr bool kSaves = true;
  // The dispatcher sends here what is on the CPU in all its tensors.
  template <typename... Others>
  explicit Cpu(const Tensor&, const Others&...) {}
  Place place() const { return {aoti_torch_device_type_cpu(), 0}; }
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

GFL_IMPLEMENT(CPU, Cpu)

}  // namespace gfl
