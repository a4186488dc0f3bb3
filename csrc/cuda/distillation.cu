// Localization distillation. Rows whose bins are neighbours are shared by lanes, each of which has
// its bins in registers (kHeld of them) unless there are very many; of planes a thread has a row of
// its own, whose bins are read once from memory, and from the cache when they are needed again.
#define GFL_APPROXIMATE
#include "common.h"
#include "kernels.h"

namespace gfl {
namespace {

// of(i, k): a thread's i-th bin is number k of the row. There are kHeld of them, of which the last
// may be beyond the row, or with kHeld = 0 as many as it takes, and i is 0.
template <int kHeld, typename F>
GFL_DEVICE void each_bin(const DistillationShape& s, int lane, const F& of) {
  const int lanes = 1 << s.lane_bits;
  if constexpr (kHeld > 0) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) of(i, lane + i * lanes);
  } else {
    for (int k = lane; k < s.bins; k += lanes) of(0, k);
  }
}

// a = (z - high) / T of a row, -inf beyond its end, exp(a), and their sum.
template <int kHeld, typename A, typename T>
struct Tempered {
  const T* z;
  const DistillationShape& s;
  const Format<T> format;
  int64_t step;
  bool read;
  A high, sum;
  A held[kHeld + 1], powers[kHeld + 1];

  GFL_MEMBER Tempered(const T* row, const Steps& steps, const DistillationShape& shape,
                      bool is_read, int lane)
      : z(row),
        s(shape),
        format(steps.dtype),
        step(steps.column),
        read(is_read),
        high(static_cast<A>(-INFINITY)),
        sum(0) {
    const int lanes = 1 << s.lane_bits;
    each_bin<kHeld>(s, lane, [&](int i, int k) {
      const A value = logit(k);
      if (kHeld > 0) held[i] = value;
      high = larger(value, high);
    });
    high = max_lanes(high, lanes);
    each_bin<kHeld>(s, lane, [&](int i, int k) {
      if (kHeld > 0) {
        held[i] = shifted(held[i]);
        powers[i] = exponential(held[i]);
      }
      sum += power(i, k);
    });
    sum = sum_lanes(sum, lanes);
  }
  GFL_MEMBER A a(int i, int k) const { return kHeld > 0 ? held[i] : shifted(logit(k)); }
  GFL_MEMBER A power(int i, int k) const { return kHeld > 0 ? powers[i] : exponential(a(i, k)); }

 private:
  GFL_MEMBER A logit(int k) const {
    if (!read || (kHeld > 0 && k >= s.bins)) return static_cast<A>(-INFINITY);
    return format.widen(kHeld > 0 ? z[k] : z[k * step]);
  }
  GFL_MEMBER A shifted(A value) const {
    return (value - high) * static_cast<A>(s.inverse_temperature);
  }
};

template <int kDtype, int kHeld>
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
    locate(s, inside ? number : s.rows.count - 1, operands, at);
    const A w = weight ? load_value<A>(weight, s.weight.dtype, at[2]) : A(1);
    const bool read = inside && w != 0;
    using Row = Tempered<kHeld, A, T>;
    const Row student(static_cast<const T*>(pred) + at[0], s.pred, s, read, lane);
    const Row model(static_cast<const T*>(teacher) + at[1], s.teacher, s, read, lane);
    const A inverse = reciprocal(student.sum), teacher_inverse = reciprocal(model.sum);
    if (loss || partials) {
      A terms = 0;
      each_bin<kHeld>(s, lane, [&](int i, int k) {
        terms += distillation_term(model.power(i, k), model.a(i, k) - student.a(i, k));
      });
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
      each_bin<kHeld>(s, lane, [&](int i, int k) {
        if (kHeld > 0 && k >= s.bins) return;
        const A g =
            distillation_grad(student.power(i, k) * inverse, model.power(i, k) * teacher_inverse) *
            scale;
        student.format.narrow(read ? g : A(0), kHeld > 0 ? to + k : to + k * s.grad.column);
      });
    }
  }
  if (partials) leave_sum<kDistributionThreads>(static_cast<A>(total), partials);
}

template <int kDtype>
const void* find(int held) {
  return held ? reinterpret_cast<const void*>(distillation_kernel<kDtype, kHeldBins>)
              : reinterpret_cast<const void*>(distillation_kernel<kDtype, 0>);
}

}  // namespace

const void* distillation_kernel_at(int dtype, int held) {
  switch (dtype) {
    case GFL_FLOAT32:
      return find<GFL_FLOAT32>(held);
    case GFL_FLOAT64:
      return reinterpret_cast<const void*>(distillation_kernel<GFL_FLOAT64, 0>);
    case kHalf:
      return find<kHalf>(held);
    default:
      return nullptr;
  }
}

}  // namespace gfl
