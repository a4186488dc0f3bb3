// Localization distillation. Rows whose bins are neighbours are shared by lanes; of planes a thread
// has a row of its own. Bins are read once from memory, and from the cache when they are needed
// again.
#define GFL_APPROXIMATE
#include "common.h"
#include "kernels.h"

namespace gfl {
namespace {

// a = (z - high) / T and the sum of exp(a) of a row.
template <typename A, typename T>
struct Tempered {
  const T* z;
  int64_t step;
  A high, inverse_temperature, sum;

  GFL_MEMBER A a(int k) const { return (widen(z[k * step]) - high) * inverse_temperature; }
};

template <typename A, typename T>
GFL_DEVICE Tempered<A, T> temper(const T* z, const Steps& steps, const DistillationShape& s,
                                 bool read, int lane, int lanes) {
  Tempered<A, T> row{z, steps.column, static_cast<A>(-INFINITY),
                     static_cast<A>(s.inverse_temperature), 0};
  if (read) {
    for (int k = lane; k < s.bins; k += lanes) row.high = larger(widen(z[k * row.step]), row.high);
  }
  row.high = max_lanes(row.high, lanes);
  if (read) {
    for (int k = lane; k < s.bins; k += lanes) row.sum += exponential(row.a(k));
  }
  row.sum = sum_lanes(row.sum, lanes);
  return row;
}

template <int kDtype>
__global__ void __launch_bounds__(kDistributionThreads)
    distillation_kernel(const void* pred, const void* teacher, const void* weight,
                        const void* upstream, const void* avg_factor, void* loss, double* partials,
                        void* grad, const __grid_constant__ DistillationShape s) {
  using T = typename Element<kDtype>::type;
  using A = typename Element<kDtype>::acc;
  const A factor = scale_factor<A>(s.scale, avg_factor);
  const int lanes = 1 << s.lane_bits, lane = threadIdx.x & (lanes - 1);
  const int together = kDistributionThreads >> s.lane_bits;
  double total = 0;
  for (int64_t first = int64_t{blockIdx.x} * together; first < s.rows.count;
       first += int64_t{gridDim.x} * together) {
    const int64_t number = first + (threadIdx.x >> s.lane_bits);
    const bool inside = number < s.rows.count;
    const Steps* const operands[] = {&s.pred, &s.teacher, &s.weight, &s.upstream, &s.loss, &s.grad};
    int64_t at[6];
    locate(s.rows, inside ? number : s.rows.count - 1, operands, at);
    const A w = weight ? load_value<A>(weight, s.weight.dtype, at[2]) : A(1);
    const bool read = inside && w != 0;
    const auto student =
        temper<A>(static_cast<const T*>(pred) + at[0], s.pred, s, read, lane, lanes);
    const auto model =
        temper<A>(static_cast<const T*>(teacher) + at[1], s.teacher, s, read, lane, lanes);
    const A inverse = reciprocal(student.sum), teacher_inverse = reciprocal(model.sum);
    if (loss || partials) {
      A terms = 0;
      if (read) {
        for (int k = lane; k < s.bins; k += lanes) {
          const A b = model.a(k);
          terms += distillation_term(exponential(b), b - student.a(k));
        }
      }
      terms = sum_lanes(terms, lanes) * teacher_inverse;
      const A value =
          read ? distillation_loss(terms, logarithm(student.sum), logarithm(model.sum)) * w : A(0);
      if (lane == 0 && inside) {
        if (loss) static_cast<A*>(loss)[at[4]] = value * factor;
        total += value;
      }
    }
    if (grad && inside) {
      // A row of weight 0 stays out whatever comes from upstream.
      A scale = w * factor * static_cast<A>(s.inverse_temperature);
      if (upstream) scale *= static_cast<const A*>(upstream)[at[3]];
      T* const to = static_cast<T*>(grad) + at[5];
      for (int k = lane; k < s.bins; k += lanes) {
        A g = 0;
        if (read) {
          g = distillation_grad(exponential(student.a(k)) * inverse,
                                exponential(model.a(k)) * teacher_inverse) *
              scale;
        }
        narrow(g, to + k * s.grad.column);
      }
    }
  }
  if (partials) leave_sum<kDistributionThreads>(static_cast<A>(total), partials);
}

}  // namespace

const void* distillation_kernel_at(int dtype) {
  switch (dtype) {
    case GFL_FLOAT32:
      return reinterpret_cast<const void*>(distillation_kernel<GFL_FLOAT32>);
    case GFL_FLOAT64:
      return reinterpret_cast<const void*>(distillation_kernel<GFL_FLOAT64>);
    case GFL_BFLOAT16:
      return reinterpret_cast<const void*>(distillation_kernel<GFL_BFLOAT16>);
    case GFL_FLOAT16:
      return reinterpret_cast<const void*>(distillation_kernel<GFL_FLOAT16>);
    default:
      return nullptr;
  }
}

}  // namespace gfl
