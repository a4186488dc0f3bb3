// The C functions gfl_*_cuda of a library without CUDA.
#include "../error.h"
#include "gfl_kernels/gfl_kernels.h"

namespace {

const char kAbsent[] = "the library was built without CUDA";

int refuse() {
  return gfl::guarded([] { gfl::fail(kAbsent); });
}

}  // namespace

extern "C" {

int gfl_quality_cuda(const gfl_quality_args*, void*, void*) { return refuse(); }
int gfl_distribution_cuda(const gfl_distribution_args*, void*, void*) { return refuse(); }
int gfl_integral_cuda(const gfl_integral_args*, void*) { return refuse(); }
int gfl_statistics_cuda(const gfl_statistics_args*, void*) { return refuse(); }
int gfl_moments_cuda(const gfl_moments_args*, void*) { return refuse(); }
int gfl_distillation_cuda(const gfl_distillation_args*, void*, void*) { return refuse(); }
int gfl_decode_cuda(const gfl_decode_args*, void*) { return refuse(); }
int64_t gfl_head_cuda_workspace_bytes(const gfl_head_args*) {
  refuse();
  return -1;
}
int gfl_head_boxes_cuda(const gfl_head_args*, void*, void*) { return refuse(); }
int gfl_head_cuda(const gfl_head_args*, void*, void*) { return refuse(); }
const char* gfl_cuda_obstacle(void) { return kAbsent; }
}
