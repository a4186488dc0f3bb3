// Decoding for inference: boxes, and the highest class of each row. Rows whose elements are
// neighbours are shared by lanes; of planes a thread has a row of its own, and its neighbours'
// elements lie beside its own.
#define GFL_APPROXIMATE
#include "common.h"
#include "kernels.h"

namespace gfl {
namespace {

template <typename A>
struct Side {
  A distance, deviation;
};

// The expectation and the standard deviation of a side, by `lanes` neighbours of which this thread
// is number `lane`. The whole warp takes part.
template <typename A, typename T>
GFL_DEVICE Side<A> assess_side(const T* z, const Format<T>& format, const void* values,
                               const DecodeShape& s, int lane, int lanes) {
  const int64_t step = s.pred.column;
  const int bins = s.bins;
  const auto value_of = [&](int k) {
    return values ? static_cast<const A*>(values)[k * s.values.column] : static_cast<A>(k);
  };
  A high = static_cast<A>(-INFINITY);
  for (int k = lane; k < bins; k += lanes) high = larger(format.widen(z[k * step]), high);
  high = max_lanes(high, lanes);
  const bool peaked = s.window >= 0;
  const A window = static_cast<A>(s.window);
  A peak = 0;
  if (peaked) {
    A last = static_cast<A>(-bins);  // the first one, negated
    for (int k = lane; k < bins; k += lanes) {
      if (format.widen(z[k * step]) == high) last = larger(static_cast<A>(-k), last);
    }
    peak = -max_lanes(last, lanes);
  }
  A sum = 0, moment = 0, whole_sum = 0, whole_moment = 0;
  for (int k = lane; k < bins; k += lanes) {
    const A whole = exponential(format.widen(z[k * step]) - high), y = value_of(k);
    const A e = peaked ? whole * peak_window(static_cast<A>(k), peak, window) : whole;
    sum += e;
    moment += e * y;
    whole_sum += whole;
    whole_moment += whole * y;
  }
  Side<A> side{sum_lanes(moment, lanes) * reciprocal(sum_lanes(sum, lanes)), 0};
  if (s.deviation.present) {
    const A inverse = reciprocal(sum_lanes(whole_sum, lanes));
    const A mean = sum_lanes(whole_moment, lanes) * inverse;
    A variance = 0;
    for (int k = lane; k < bins; k += lanes) {
      const A away = value_of(k) - mean;
      variance += exponential(format.widen(z[k * step]) - high) * (away * away);
    }
    side.deviation = square_root(sum_lanes(variance, lanes) * inverse);
  }
  return side;
}

// Of rows whose channels are neighbours a side has kDecodeLanes lanes, and a warp two rows; of
// planes a thread has all four sides of a row.
template <int kDtype>
__global__ void __launch_bounds__(kDecodeThreads)
    decode_kernel(const void* pred, const void* points, const void* strides, const void* values,
                  const void* limits, void* boxes, void* deviation,
                  const __grid_constant__ DecodeShape s) {
  using T = typename Element<kDtype>::type;
  using A = typename Element<kDtype>::acc;
  const Format<T> format(s.pred.dtype);
  const bool planes = s.planes;
  const int lanes = planes ? 1 : kDecodeLanes, of_row = planes ? 1 : 4 * kDecodeLanes;
  const int lane = threadIdx.x & (lanes - 1), sides = planes ? 4 : 1,
            first_side = planes ? 0 : threadIdx.x / kDecodeLanes % 4;
  const int64_t together = kDecodeThreads / of_row;
  for (int64_t first = blockIdx.x * together; first < s.rows.count; first += gridDim.x * together) {
    const int64_t number = first + threadIdx.x / of_row;
    const bool inside = number < s.rows.count;
    const Steps* const operands[] = {&s.pred,   &s.points, &s.strides,
                                     &s.limits, &s.boxes,  &s.deviation};
    int64_t at[6];
    locate(s, inside ? number : s.rows.count - 1, operands, at);
    const T* const z = static_cast<const T*>(pred) + at[0];
    const A stride =
        strides ? load_value<A>(strides, s.strides.dtype, at[2]) : static_cast<A>(s.stride);
    for (int i = 0; i < sides; ++i) {
      const int side = first_side + i, axis = side % 2;
      const Side<A> found =
          assess_side<A>(z + side * s.bins * s.pred.column, format, values, s, lane, lanes);
      if (lane != 0 || !inside) continue;
      const A point = load_value<A>(points, s.points.dtype, at[1] + axis * s.points.column);
      A x = decode_side(side, point, found.distance * stride);
      if (s.clips) {  // height comes first
        const A limit =
            limits ? load_value<A>(limits, s.limits.dtype, at[3] + (1 - axis) * s.limits.column)
                   : static_cast<A>(axis ? s.height : s.width);
        x = clip_coordinate(x, limit);
      }
      static_cast<A*>(boxes)[at[4] + side * s.boxes.column] = x;
      if (deviation) {
        static_cast<A*>(deviation)[at[5] + side * s.deviation.column] = found.deviation * stride;
      }
    }
  }
}

// The highest sigmoid of each row and its class, of equals the first.
template <int kDtype>
__global__ void __launch_bounds__(kDecodeThreads)
    score_kernel(const void* cls, void* score, void* label, const __grid_constant__ DecodeShape s) {
  using T = typename Element<kDtype>::type;
  using A = typename Element<kDtype>::acc;
  const Format<T> format(s.cls.dtype);
  const int lanes = 1 << s.lane_bits, lane = threadIdx.x & (lanes - 1);
  const int64_t together = kDecodeThreads >> s.lane_bits;
  for (int64_t first = blockIdx.x * together; first < s.rows.count; first += gridDim.x * together) {
    const int64_t number = first + (threadIdx.x >> s.lane_bits);
    const bool inside = number < s.rows.count;
    const Steps* const operands[] = {&s.cls, &s.score, &s.label};
    int64_t at[3];
    locate(s, inside ? number : s.rows.count - 1, operands, at);
    const T* const x = static_cast<const T*>(cls) + at[0];
    A high = static_cast<A>(-INFINITY);
    int best = lane < s.classes ? lane : s.classes;
    for (int c = lane; c < s.classes; c += lanes) {
      const A value = format.widen(x[c * s.cls.column]);
      if (surpasses(value, high)) {
        high = value;
        best = c;
      }
    }
    for (int o = lanes >> 1; o > 0; o >>= 1) {
      const A other = __shfl_xor_sync(~0u, high, o);
      const int its_class = __shfl_xor_sync(~0u, best, o);
      if (surpasses(other, high) || (!surpasses(high, other) && its_class < best)) {
        high = other;
        best = its_class;
      }
    }
    if (lane == 0 && inside) {
      static_cast<A*>(score)[at[1]] = sigmoid(high);
      static_cast<int64_t*>(label)[at[2]] = best;
    }
  }
}

}  // namespace

#define GFL_OF_DTYPE(kernel)                                       \
  const void* kernel##_at(int dtype) {                             \
    switch (dtype) {                                               \
      case GFL_FLOAT32:                                            \
        return reinterpret_cast<const void*>(kernel<GFL_FLOAT32>); \
      case GFL_FLOAT64:                                            \
        return reinterpret_cast<const void*>(kernel<GFL_FLOAT64>); \
      case kHalf:                                                  \
        return reinterpret_cast<const void*>(kernel<kHalf>);       \
      default:                                                     \
        return nullptr;                                            \
    }                                                              \
  }

GFL_OF_DTYPE(decode_kernel)
GFL_OF_DTYPE(score_kernel)

}  // namespace gfl
