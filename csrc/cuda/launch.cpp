// The C functions gfl_*_cuda of gfl_kernels.h: a plan, launched. The CUDA runtime is linked
// statically and looks for the driver when it is first called, so that the library loads without
// one.
#include <cuda_runtime_api.h>

#include <string>

#include "../error.h"
#include "gfl_kernels/gfl_kernels.h"
#include "kernels.h"
#include "plan.h"

namespace gfl {
namespace {

const void* find(const Launch& launch) {
  switch (launch.family) {
    case kQualityKernel:
      return quality_kernel_at(launch.dtype, launch.variant);
    case kQualityGeneralKernel:
      return quality_general_kernel_at(launch.dtype);
    case kDistributionKernel:
      return distribution_kernel_at(launch.dtype, launch.variant);
    case kDistributionGeneralKernel:
      return distribution_general_kernel_at(launch.dtype);
    case kFinishKernel:
      return finish_kernel_at(launch.dtype);
    case kHeadBoxesKernel:
      return head_boxes_kernel_at(launch.dtype);
    case kHeadBoxesFinishKernel:
      return head_boxes_finish_kernel_at(launch.dtype);
    case kHeadClassKernel:
      return head_class_kernel_at(launch.dtype, launch.variant);
    case kHeadClassGeneralKernel:
      return head_class_general_kernel_at(launch.dtype);
    case kHeadLossesKernel:
      return head_losses_kernel_at(launch.dtype);
    case kHeadBoxGradKernel:
      return head_box_grad_kernel_at(launch.dtype);
    case kDistillationKernel:
      return distillation_kernel_at(launch.dtype, launch.variant);
    case kDecodeKernel:
      return decode_kernel_at(launch.dtype);
    case kScoreKernel:
      return score_kernel_at(launch.dtype);
  }
  return nullptr;
}

void check(const char* name, const char* what, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next caller would find it
  fail(std::string(name) + ": " + what + ": " + cudaGetErrorString(error));
}

void run(const char* name, Plan& plan, const gfl_view* loss, cudaStream_t stream) {
  if (plan.count == 0 && loss && loss->ndim == 0) {
    check(name, "cudaMemsetAsync",
          cudaMemsetAsync(loss->data, 0, element_bytes(loss->dtype), stream));
  }
  for (int64_t i = 0; i < plan.count; ++i) {
    Launch& launch = plan.launches[i];
    void* arguments[16];
    for (int a = 0; a < launch.count; ++a) {
      arguments[a] = launch.bytes + launch.arguments[a].offset;
    }
    check(name, launch.name,
          cudaLaunchKernel(find(launch), dim3(launch.grid), dim3(launch.block), arguments,
                           launch.shared_bytes, stream));
  }
}

template <typename Args>
int run_summary(const char* name, const Args& args, void* stream) {
  return guarded([&] {
    Plan plan;
    gfl::plan(name, args, &plan);
    run(name, plan, nullptr, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace
}  // namespace gfl

extern "C" {

int gfl_quality_cuda(const gfl_quality_args* args, void* workspace, void* stream) {
  return gfl::guarded([&] {
    gfl::Plan plan;
    gfl::plan("gfl_quality_cuda", *args, static_cast<double*>(workspace), &plan);
    gfl::run("gfl_quality_cuda", plan, args->loss, static_cast<cudaStream_t>(stream));
  });
}

int gfl_distribution_cuda(const gfl_distribution_args* args, void* workspace, void* stream) {
  return gfl::guarded([&] {
    gfl::Plan plan;
    gfl::plan("gfl_distribution_cuda", *args, static_cast<double*>(workspace), &plan);
    gfl::run("gfl_distribution_cuda", plan, args->loss, static_cast<cudaStream_t>(stream));
  });
}

int gfl_integral_cuda(const gfl_integral_args* args, void* stream) {
  return gfl::run_summary("gfl_integral_cuda", *args, stream);
}

int gfl_statistics_cuda(const gfl_statistics_args* args, void* stream) {
  return gfl::run_summary("gfl_statistics_cuda", *args, stream);
}

int gfl_moments_cuda(const gfl_moments_args* args, void* stream) {
  return gfl::run_summary("gfl_moments_cuda", *args, stream);
}

int gfl_distillation_cuda(const gfl_distillation_args* args, void* workspace, void* stream) {
  return gfl::guarded([&] {
    gfl::Plan plan;
    gfl::plan("gfl_distillation_cuda", *args, static_cast<double*>(workspace), &plan);
    gfl::run("gfl_distillation_cuda", plan, args->loss, static_cast<cudaStream_t>(stream));
  });
}

int gfl_decode_cuda(const gfl_decode_args* args, void* stream) {
  return gfl::guarded([&] {
    gfl::Plan plan;
    gfl::plan("gfl_decode_cuda", *args, &plan);
    gfl::run("gfl_decode_cuda", plan, nullptr, static_cast<cudaStream_t>(stream));
  });
}

int64_t gfl_head_cuda_workspace_bytes(const gfl_head_args* args) {
  int64_t doubles = 0;
  const int failed =
      gfl::guarded([&] { doubles = gfl::head_workspace("gfl_head_cuda_workspace_bytes", *args); });
  return failed ? -1 : 8 * doubles;
}

int gfl_head_boxes_cuda(const gfl_head_args* args, void* workspace, void* stream) {
  return gfl::guarded([&] {
    gfl::Plan plan;
    gfl::plan_head_boxes("gfl_head_boxes_cuda", *args, static_cast<double*>(workspace), &plan);
    gfl::run("gfl_head_boxes_cuda", plan, nullptr, static_cast<cudaStream_t>(stream));
  });
}

int gfl_head_cuda(const gfl_head_args* args, void* workspace, void* stream) {
  return gfl::guarded([&] {
    gfl::Plan plan;
    gfl::plan_head("gfl_head_cuda", *args, static_cast<double*>(workspace), &plan);
    gfl::run("gfl_head_cuda", plan, nullptr, static_cast<cudaStream_t>(stream));
  });
}

const char* gfl_cuda_obstacle(void) {
  static const std::string obstacle = [] {
    const auto text = [](int version) {
      return std::to_string(version / 1000) + '.' + std::to_string(version % 1000 / 10);
    };
    int driver = 0;
    const cudaError_t error = cudaDriverGetVersion(&driver);
    if (error != cudaSuccess || driver == 0) return std::string("there is no CUDA driver");
    if (driver / 1000 < CUDART_VERSION / 1000) {
      return "the driver serves CUDA " + text(driver) + ", and the library was built with CUDA " +
             text(CUDART_VERSION);
    }
    return std::string();
  }();
  return obstacle.empty() ? nullptr : obstacle.c_str();
}
}
