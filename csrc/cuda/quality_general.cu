// The quality family on whatever quality.cu leaves: other forms and exponents, weights per element,
// float64, any strides. `lanes` threads to a row, an element at a time. The exponential
// and the logarithm are math.h's own: for beta < 1 the gradient multiplies their error.
#include "common.h"
#include "kernels.h"

namespace gfl {
namespace {

template <typename A>
GFL_DEVICE LossGrad<A> element_loss_grad(A x, A q, bool positive, const QualityShape& s) {
  const A alpha = static_cast<A>(s.alpha), beta = static_cast<A>(s.beta);
  switch (s.form) {
#define GFL_CASE(form) \
  case form:           \
    return form_loss_grad<form>(x, q, positive, s.flags, alpha, beta)
    GFL_CASE(GFL_PROBABILITIES);
    GFL_CASE(GFL_VARIFOCAL);
    GFL_CASE(GFL_VARIFOCAL_PROBABILITIES);
    GFL_CASE(GFL_FOCAL);
    GFL_CASE(GFL_FOCAL_PROBABILITIES);
    GFL_CASE(GFL_MATCHABILITY);
    GFL_CASE(GFL_IOU_AWARE);
    GFL_CASE(GFL_BALANCED);
#undef GFL_CASE
    default:
      return form_loss_grad<GFL_LOGITS>(x, q, positive, s.flags, alpha, beta);
  }
}

template <int kDtype>
__global__ void __launch_bounds__(kQualityThreads, 3)
    quality_general_kernel(const void* pred, const void* target, const void* score,
                           const void* weight, const void* upstream, const void* avg_factor,
                           void* loss, double* partials, void* grad,
                           const __grid_constant__ QualityShape s) {
  using T = typename Element<kDtype>::type;
  using A = typename Element<kDtype>::acc;
  const Format<T> format(s.pred.dtype);
  const A factor = scale_factor<A>(s.scale, avg_factor);
  const int lanes = 1 << s.lane_bits, lane = threadIdx.x & (lanes - 1);
  const int together = kQualityThreads >> s.lane_bits;
  const bool sparse = score != nullptr;
  double total = 0;
  for (int64_t first = int64_t{blockIdx.x} * together; first < s.rows.count;
       first += int64_t{gridDim.x} * together) {
    const int64_t row = first + (threadIdx.x >> s.lane_bits);
    const bool inside = row < s.rows.count;
    A row_loss = 0, w = 0;
    int64_t at[7];
    if (inside) {
      const Steps* const steps[] = {&s.pred,     &s.target, &s.score, &s.weight,
                                    &s.upstream, &s.loss,   &s.grad};
      locate(s.rows, row, steps, at);
      w = weight && !s.weight_per_class ? load_value<A>(weight, s.weight.dtype, at[3]) : A(1);
      const bool read_row = w != 0;
      A row_factor = read_row ? factor * w : A(0);
      if (grad && upstream && read_row) row_factor *= static_cast<const A*>(upstream)[at[4]];
      int label = -1;
      A quality = 0;
      if (sparse && read_row) {
        label = class_of(target, s.target.dtype, at[1], s.classes);
        quality = load_value<A>(score, s.score.dtype, at[2]);
      }
#pragma unroll 1
      for (int64_t c = lane; c < s.classes; c += lanes) {
        A element_weight = 1;
        if (s.weight_per_class) {
          element_weight = load_value<A>(weight, s.weight.dtype, at[3] + c * s.weight.column);
        }
        // What has weight 0 contributes exactly 0, NaN logits included.
        LossGrad<A> r{A(0), A(0)};
        if (read_row && element_weight != 0) {
          const A x = format.widen(static_cast<const T*>(pred)[at[0] + c * s.pred.column]);
          const A q = !sparse ? load_value<A>(target, s.target.dtype, at[1] + c * s.target.column)
                              : (c == label ? quality : A(0));
          r = element_loss_grad(x, q, sparse ? c == label : q > A(0), s);
          r.loss *= element_weight;
          r.grad *= element_weight * row_factor;
        }
        row_loss += r.loss;
        if (grad) format.narrow(r.grad, static_cast<T*>(grad) + (at[6] + c * s.grad.column));
      }
      row_loss *= w;
    }
    if (loss) {
      row_loss = sum_lanes(row_loss, lanes);
      if (lane == 0 && inside) static_cast<A*>(loss)[at[5]] = row_loss * factor;
    }
    total += row_loss;
  }
  if (partials) leave_sum<kQualityThreads>(static_cast<A>(total), partials);
}

// factor * the sum of the blocks' sums, in a fixed order. One block.
template <int kDtype>
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(const double* partials, int count, const void* avg_factor, void* loss,
                  Scale scale) {
  __shared__ double result;
  double total = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += 16 * kFinishThreads) {
#pragma unroll  // so many loads at once
    for (int j = i; j < i + 16 * kFinishThreads; j += kFinishThreads) {
      if (j < count) total += partials[j];
    }
  }
  leave_sum<kFinishThreads>(total, &result);
  if (threadIdx.x == 0) {
    using T = typename Element<kDtype>::type;
    *static_cast<T*>(loss) = static_cast<T>(result * scale_factor<double>(scale, avg_factor));
  }
}

}  // namespace

const void* quality_general_kernel_at(int dtype) {
  switch (dtype) {
    case GFL_FLOAT32:
      return reinterpret_cast<const void*>(quality_general_kernel<GFL_FLOAT32>);
    case GFL_FLOAT64:
      return reinterpret_cast<const void*>(quality_general_kernel<GFL_FLOAT64>);
    case kHalf:
      return reinterpret_cast<const void*>(quality_general_kernel<kHalf>);
    default:
      return nullptr;
  }
}

const void* finish_kernel_at(int dtype) {
  return dtype == GFL_FLOAT64 ? reinterpret_cast<const void*>(finish_kernel<GFL_FLOAT64>)
                              : reinterpret_cast<const void*>(finish_kernel<GFL_FLOAT32>);
}

}  // namespace gfl
