// The classification losses of heads that are common, on logits of at most 32 bits: Quality Focal
// Loss with beta = 2 and sparse targets; with dense ones binary cross entropy, and Varifocal Loss
// with gamma = 2.
#define GFL_APPROXIMATE
#include "head_class.h"
#include "kernels.h"

namespace gfl {
namespace {

template <int kDtype, int kVariant>
__global__ void __launch_bounds__(kClassThreads, 4)  // 64 registers
    head_class_kernel(const void* quality, const void* normalisers, const void* up_total,
                      const void* up_levels, double* partials,
                      const __grid_constant__ HeadShape s) {
  class_tile<kDtype, kVariant>(quality, normalisers, up_total, up_levels, partials, s);
}

template <int kDtype, int... kVariants>
const void* find_among(int variant) {
  const void* found = nullptr;
  ((variant == kVariants
        ? found = reinterpret_cast<const void*>(head_class_kernel<kDtype, kVariants>)
        : nullptr),
   ...);
  return found;
}

template <int kDtype>
const void* find(int variant) {
  constexpr int kBce = kDense | kCrossEntropy, kVfl = kDense | kVarifocal;
  return find_among<kDtype, kLoss, kGrad, kPlanes | kLoss, kPlanes | kGrad, kBce | kLoss,
                    kBce | kGrad, kBce | kPlanes | kLoss, kBce | kPlanes | kGrad, kVfl | kLoss,
                    kVfl | kGrad, kVfl | kPlanes | kLoss, kVfl | kPlanes | kGrad>(variant);
}

}  // namespace

const void* head_class_kernel_at(int dtype, int variant) {
  switch (dtype) {
    case GFL_FLOAT32:
      return find<GFL_FLOAT32>(variant);
    case kHalf:
      return find<kHalf>(variant);
    default:
      return nullptr;
  }
}

}  // namespace gfl
