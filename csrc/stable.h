// ops.h in the tensors of the LibTorch stable ABI, and the registration of its ops with torch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch 2.10 has it without STABLE_
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace gfl {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Place {
  int32_t type, index;
};

inline Place cpu_place() { return {aoti_torch_device_type_cpu(), 0}; }

// As the shim's functions take it.
inline int32_t shim_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::Long:
      return aoti_torch_dtype_int64();
    default:
      throw std::invalid_argument("gfl_native: the kernels write no such dtype");
  }
}

inline Tensor new_tensor(const Place& place, int64_t dims, const int64_t* sizes,
                         const int64_t* strides, ScalarType dtype) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, shim_dtype(dtype),
                                                         place.type, place.index, &handle));
  return Tensor(handle);
}
inline Tensor new_like(const Tensor& tensor) { return torch::stable::empty_like(tensor); }

}  // namespace
}  // namespace gfl

#include "ops.h"

// In a file that includes this one: the ops of one dispatch key.
#define GFL_IMPLEMENT(KEY, DEVICE)                                              \
  STABLE_TORCH_LIBRARY_IMPL(gfl_native, KEY, m) {                               \
    m.impl("quality_forward", TORCH_BOX(&quality_forward<DEVICE>));             \
    m.impl("quality_backward", TORCH_BOX(&quality_backward<DEVICE>));           \
    m.impl("distribution_forward", TORCH_BOX(&distribution_forward<DEVICE>));   \
    m.impl("distribution_backward", TORCH_BOX(&distribution_backward<DEVICE>)); \
    m.impl("integral_forward", TORCH_BOX(&integral_forward<DEVICE>));           \
    m.impl("integral_backward", TORCH_BOX(&integral_backward<DEVICE>));         \
    m.impl("statistics_forward", TORCH_BOX(&statistics_forward<DEVICE>));       \
    m.impl("statistics_backward", TORCH_BOX(&statistics_backward<DEVICE>));     \
    m.impl("moments_forward", TORCH_BOX(&moments_forward<DEVICE>));             \
    m.impl("moments_backward", TORCH_BOX(&moments_backward<DEVICE>));           \
    m.impl("head_boxes", TORCH_BOX(&head_boxes<DEVICE>));                       \
    m.impl("head_forward", TORCH_BOX(&head_forward<DEVICE>));                   \
    m.impl("head_backward", TORCH_BOX(&head_backward<DEVICE>));                 \
    m.impl("decode_boxes", TORCH_BOX(&decode_boxes<DEVICE>));                   \
    m.impl("distillation_forward", TORCH_BOX(&distillation_forward<DEVICE>));   \
    m.impl("distillation_backward", TORCH_BOX(&distillation_backward<DEVICE>)); \
  }
