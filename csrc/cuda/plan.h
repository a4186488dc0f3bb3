// How a call becomes launches: arithmetic on sizes, strides and addresses, without a GPU. The tests
// run the same plans on a simulator.
#pragma once

#include "shapes.h"

namespace gfl {

enum KernelFamily : int32_t {
  kQualityKernel,
  kQualityGeneralKernel,
  kDistributionKernel,
  kDistributionGeneralKernel,
  kFinishKernel,
  kHeadBoxesKernel,
  kHeadBoxesFinishKernel,
  kHeadClassKernel,
  kHeadClassGeneralKernel,
  kHeadLossesKernel,
  kHeadBoxGradKernel,
  kDistillationKernel,
  kDecodeKernel,
  kScoreKernel
};

struct Launch {
  char name[64];  // as a demangler prints it, without namespace
  KernelFamily family;
  int32_t dtype, variant;  // the template's arguments; -1: it has no variants
  int32_t grid, block, shared_bytes;
  int32_t count;  // of arguments
  struct Argument {
    int32_t offset, size;
    int32_t is_pointer;
  } arguments[16];
  alignas(8) unsigned char bytes[4096];  // their values: as many as a launch may have
};

struct Plan {
  int64_t count;  // 0 without rows: a loss of them all is 0
  Launch launches[4];
};

// workspace: kMaxBlocks doubles on the device, needed for a loss that is a sum.
void plan(const char* name, const gfl_quality_args& args, double* workspace, Plan* plan);
void plan(const char* name, const gfl_distribution_args& args, double* workspace, Plan* plan);
void plan(const char* name, const gfl_integral_args& args, Plan* plan);
void plan(const char* name, const gfl_statistics_args& args, Plan* plan);
void plan(const char* name, const gfl_moments_args& args, Plan* plan);
void plan(const char* name, const gfl_distillation_args& args, double* workspace, Plan* plan);
void plan(const char* name, const gfl_decode_args& args, Plan* plan);

// workspace: head_workspace(args) doubles. Without anchors the sums are launched all the same.
int64_t head_workspace(const char* name, const gfl_head_args& args);
void plan_head_boxes(const char* name, const gfl_head_args& args, double* workspace, Plan* plan);
void plan_head(const char* name, const gfl_head_args& args, double* workspace, Plan* plan);

}  // namespace gfl
