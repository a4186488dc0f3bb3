// Where the launcher (launch.cu) finds the kernels. A kernel is a template over integers, which are
// also its place in a table and what plan.cpp prints into its name.
#pragma once

#include "shapes.h"

namespace gfl {

// Null if there is none: float64 has the general one only.
const void* quality_kernel_at(int dtype, int variant);
const void* quality_general_kernel_at(int dtype);
const void* distribution_kernel_at(int dtype, int bins);
const void* distribution_general_kernel_at(int dtype);
const void* finish_kernel_at(int dtype);  // of the loss
const void* distillation_kernel_at(int dtype, int held);
const void* decode_kernel_at(int dtype);
const void* score_kernel_at(int dtype);  // of cls
const void* head_class_kernel_at(int dtype, int variant);
const void* head_class_general_kernel_at(int dtype);
// Of the accumulation type.
const void* head_boxes_kernel_at(int dtype);
const void* head_boxes_finish_kernel_at(int dtype);
const void* head_box_grad_kernel_at(int dtype);
const void* head_losses_kernel_at(int dtype);

}  // namespace gfl
