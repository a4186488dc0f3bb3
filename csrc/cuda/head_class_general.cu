// The classification loss of a head whatever it is, an element at a time: other exponents, float64.
// The exponential and the logarithm are math.h's own: for beta < 1 the gradient multiplies their
// error. And the losses of the whole head out of all sums.
#include "head_class.h"
#include "kernels.h"

namespace gfl {
namespace {

template <int kDtype>
__global__ void __launch_bounds__(kClassThreads, 3)
    head_class_general_kernel(const void* quality, const void* normalisers, const void* up_total,
                              const void* up_levels, double* partials,
                              const __grid_constant__ HeadShape s) {
  class_tile<kDtype, kGeneralClass>(quality, normalisers, up_total, up_levels, partials, s);
}

// The losses in total and per level, out of what the blocks have left and of head_boxes' sums. One
// block, a warp to a level.
template <int kDtype>
__global__ void __launch_bounds__(kHeadFinishThreads)
    head_losses_kernel(const double* partials, const void* sums, const void* normalisers,
                       void* loss_cls, void* loss_bbox, void* loss_dfl, void* levels_cls,
                       void* levels_bbox, void* levels_dfl, const __grid_constant__ HeadShape s) {
  using A = typename Element<kDtype>::acc;
  __shared__ double classes[kMaxHeadLevels];
  const int warp = threadIdx.x / 32;
  if (warp < s.count) {
    const HeadLevel& level = s.levels[warp];
    const double total = sum_of_values(partials + level.first_tile, s.batch * level.tiles);
    if (threadIdx.x % 32 == 0) classes[warp] = total;
  }
  __syncthreads();
  if (threadIdx.x > 2) return;
  const int term = threadIdx.x;
  const double factor =
      term == 0 ? class_factor<A>(s, normalisers) : box_factor<A>(s, normalisers, term);
  void* const each = term == 0 ? levels_cls : term == 1 ? levels_bbox : levels_dfl;
  void* const total = term == 0 ? loss_cls : term == 1 ? loss_bbox : loss_dfl;
  double result = 0;
  for (int i = 0; i < s.count; ++i) {
    double loss = factor;
    if (term == 0) {
      loss *= classes[i];
    } else {
      loss *= static_cast<const A*>(sums)[i * s.sums_row + (term - 1) * s.sums_column];
    }
    static_cast<A*>(each)[i * s.level_steps[term]] = static_cast<A>(loss);
    result += loss;
  }
  *static_cast<A*>(total) = static_cast<A>(result);
}

static_assert(kMaxHeadLevels <= kHeadFinishThreads / 32);

}  // namespace

const void* head_class_general_kernel_at(int dtype) {
  switch (dtype) {
    case GFL_FLOAT32:
      return reinterpret_cast<const void*>(head_class_general_kernel<GFL_FLOAT32>);
    case GFL_FLOAT64:
      return reinterpret_cast<const void*>(head_class_general_kernel<GFL_FLOAT64>);
    case kHalf:
      return reinterpret_cast<const void*>(head_class_general_kernel<kHalf>);
    default:
      return nullptr;
  }
}

const void* head_losses_kernel_at(int dtype) {
  return dtype == GFL_FLOAT64 ? reinterpret_cast<const void*>(head_losses_kernel<GFL_FLOAT64>)
                              : reinterpret_cast<const void*>(head_losses_kernel<GFL_FLOAT32>);
}

}  // namespace gfl
