// The distribution family: Distribution Focal Loss, and the Integral where there is no target.
#define GFL_APPROXIMATE
#include <type_traits>

#include "common.h"
#include "kernels.h"

namespace gfl {
namespace {

// What a row has besides its bins.
template <typename A>
struct Row {
  A w, g_factor, left, wl, wr;
};

// offsets: target, weight_left, weight_right, weight, upstream.
template <typename A>
GFL_DEVICE Row<A> load_row(const void* target, const void* weight_left, const void* weight_right,
                           A w, const void* upstream, A factor, const int64_t (&at)[4],
                           const DistributionShape& s) {
  Row<A> row{w, w == 0 ? A(0) : w * factor, 0, 0, 0};
  // A row of weight 0 stays out whatever comes from upstream.
  if (upstream && w != 0) row.g_factor *= static_cast<const A*>(upstream)[at[3]];
  if (target && w != 0) {
    const A last = static_cast<A>(s.bins - 1);
    const A t = load_value<A>(target, s.target.dtype, at[0]);
    if (!weight_left) {
      split_target(t, last, &row.left, &row.wl, &row.wr);
    } else {
      row.wl = load_value<A>(weight_left, s.weight_left.dtype, at[1]);
      row.wr = load_value<A>(weight_right, s.weight_right.dtype, at[2]);
      row.left = t >= last ? last : (t >= 0 ? t : A(0));
      if (t >= last) {  // there is no bin right of the last: its weight goes there too
        row.wl += row.wr;
        row.wr = 0;
      }
    }
  }
  return row;
}

template <typename A>
GFL_DEVICE A bin_value(const void* values, const Steps& steps, int k) {
  return values ? static_cast<const A*>(values)[k * steps.column] : static_cast<A>(k);
}

// Where the bins of a row are while it is computed: in shared memory, which holds z, then e = exp(z
// - max), then the gradient; or at their places in pred and grad.
template <typename A>
struct StagedRow {
  A* at;
  int step;

  GFL_MEMBER A z(int k) const { return at[k * step]; }
  GFL_MEMBER void keep(int k, A e) const { at[k * step] = e; }
  GFL_MEMBER A e(int k, A) const { return at[k * step]; }
  GFL_MEMBER void write(int k, A g) const { at[k * step] = g; }
};
template <typename T, typename A>
struct PlacedRow {
  const T* pred;
  T* grad;
  int64_t pred_step, grad_step;

  GFL_MEMBER A z(int k) const { return widen(pred[k * pred_step]); }
  GFL_MEMBER void keep(int, A) const {}
  GFL_MEMBER A e(int k, A high) const { return exponential(z(k) - high); }
  GFL_MEMBER void write(int k, A g) const { narrow(g, grad + k * grad_step); }
};

// Weighted loss, or expectation, and gradient of a row, by the s.lanes neighbours it belongs to, of
// which this thread is number `lane`. The whole warp takes part; a row of weight 0 is not read.
template <typename A, typename Bins>
GFL_DEVICE A compute_row(const Bins& bins, const Row<A>& row, bool is_integral, bool write,
                         const void* values, const DistributionShape& s, int lane) {
  const int count = s.bins, lanes = s.lanes;
  const bool read = row.w != 0;
  A high = static_cast<A>(-INFINITY);
  if (read) {
    for (int k = lane; k < count; k += lanes) {
      high = larger(bins.z(k), high);
    }
  }
  const int left = static_cast<int>(row.left);
  A z_left = 0, z_right = 0;
  if (read && !is_integral) {
    z_left = bins.z(left);
    z_right = bins.z(min(left + 1, count - 1));
  }
  high = max_lanes(high, lanes);
  __syncwarp();  // from here on neighbours overwrite z
  A sum = 0, moment = 0;
  if (read) {
    for (int k = lane; k < count; k += lanes) {
      const A e = exponential(bins.z(k) - high);
      sum += e;
      if (is_integral) moment += e * bin_value<A>(values, s.values, k);
      bins.keep(k, e);
    }
  }
  sum = sum_lanes(sum, lanes);
  A inverse = reciprocal(sum), value;
  if (is_integral) {
    value = sum_lanes(moment, lanes) * inverse;
  } else {
    value =
        distribution_loss(logarithm(sum), row.wl, row.wr, z_left - high, z_right - high) * row.w;
  }
  if (write) {
    const A wl = row.wl * row.g_factor, wr = row.wr * row.g_factor;
    inverse *= is_integral ? row.g_factor : wl + wr;
    for (int k = lane; k < count; k += lanes) {
      A g = 0;
      if (read) {
        const A p = bins.e(k, high) * inverse;
        g = is_integral ? expectation_grad(p, bin_value<A>(values, s.values, k), value)
                        : distribution_grad(p, k == left, k - 1 == left, wl, wr);
      }
      bins.write(k, g);
    }
  }
  return read ? value : A(0);
}

// The same for a row of kBins that one thread computes in its registers. Only the two bins beside
// the target are told apart, at the end.
template <int kBins, typename A>
GFL_DEVICE A compute_whole_row(const StagedRow<A>& bins, const Row<A>& row, bool is_integral,
                               bool write, const void* values, const DistributionShape& s) {
  A e[kBins];
  if (row.w == 0) {
    if (write) {
#pragma unroll
      for (int k = 0; k < kBins; ++k) bins.write(k, A(0));
    }
    return 0;
  }
  if (bins.step == 1) {
#pragma unroll
    for (int k = 0; k < kBins; ++k) e[k] = bins.at[k];
  } else {
#pragma unroll
    for (int k = 0; k < kBins; ++k) e[k] = bins.z(k);
  }
  const int left = static_cast<int>(row.left), right = min(left + 1, kBins - 1);
  A high = e[0];
#pragma unroll
  for (int k = 1; k < kBins; ++k) high = larger(e[k], high);
  A sum = 0;
#pragma unroll
  for (int k = 0; k < kBins; ++k) {
    e[k] = exponential(e[k] - high);
    sum += e[k];
  }
  A inverse = reciprocal(sum), value;
  if (is_integral) {
    value = 0;
#pragma unroll
    for (int k = 0; k < kBins; ++k) value += e[k] * bin_value<A>(values, s.values, k);
    value *= inverse;
    if (!write) return value;
    inverse *= row.g_factor;
#pragma unroll
    for (int k = 0; k < kBins; ++k) {
      e[k] = expectation_grad(e[k] * inverse, bin_value<A>(values, s.values, k), value);
    }
  } else {
    value = distribution_loss(logarithm(sum), row.wl, row.wr, bins.z(left) - high,
                              bins.z(right) - high) *
            row.w;
    if (!write) return value;
    inverse *= row.wl * row.g_factor + row.wr * row.g_factor;
#pragma unroll
    for (int k = 0; k < kBins; ++k) e[k] *= inverse;
  }
  if (bins.step == 1) {
#pragma unroll
    for (int k = 0; k < kBins; ++k) bins.at[k] = e[k];
  } else {
#pragma unroll
    for (int k = 0; k < kBins; ++k) bins.write(k, e[k]);
  }
  if (!is_integral) {
    const A wl = row.wl * row.g_factor, wr = row.wr * row.g_factor;
    bins.write(left, distribution_grad(bins.z(left), true, false, wl, wr));
    if (right > left) bins.write(right, distribution_grad(bins.z(right), false, true, wl, wr));
  }
  return value;
}

GFL_DEVICE int quotient(int n, uint32_t magic) { return __umulhi(n, magic); }

// A tile of rows on its way to shared memory, or back where kStore. at: the tile's first row.
template <typename T, typename A, bool kStore>
struct Mover {
  static constexpr int V = Vector<T>::kSize;
  using Place = std::conditional_t<kStore, T, const T>;
  Place* at;
  int64_t row_stride, bin_stride;
  int count;  // rows
  A* staged;
  const A*
      weights;  // of the rows, in shared memory; null: none is 0. Rows of weight 0 are not read
  const DistributionShape& s;

  GFL_MEMBER bool skips(int row) const { return !kStore && weights && weights[row] == 0; }
  GFL_MEMBER void move(Place* place, A* stage) const {
    if constexpr (kStore) {
      narrow(*stage, place);
    } else {
      *stage = widen(*place);
    }
  }
  // stage(i): where element i of the vector is in shared memory.
  template <typename Stage>
  GFL_MEMBER void move_vector(Place* place, const Stage& stage) const {
    if constexpr (kStore) {
      Vector<T> v;
#pragma unroll
      for (int i = 0; i < V; ++i) narrow(*stage(i), v.of + i);
      store_vector(place, v);
    } else {
      const Vector<T> v = load_vector(place);
#pragma unroll
      for (int i = 0; i < V; ++i) *stage(i) = widen(v.of[i]);
    }
  }

  // The same between aligned vectors on both sides.
  GFL_MEMBER void move_aligned(Place* place, A* stage) const {
    constexpr int n = Vector<A>::kSize;
    if constexpr (kStore) {
      Vector<T> v;
#pragma unroll
      for (int i = 0; i < V; i += n) {
        const Vector<A> part = load_vector(stage + i);
#pragma unroll
        for (int j = 0; j < n; ++j) narrow(part.of[j], v.of + i + j);
      }
      store_vector(place, v);
    } else {
      const Vector<T> v = load_vector(place);
#pragma unroll
      for (int i = 0; i < V; i += n) {
        Vector<A> part;
#pragma unroll
        for (int j = 0; j < n; ++j) part.of[j] = widen(v.of[i + j]);
        store_vector(stage + i, part);
      }
    }
  }

  // The rows lie one after the other: vectors may have the end of a row and the next one's begin.
  GFL_MEMBER void packed() const {
    const int bins = s.bins, shift = misalignment(at) / sizeof(T), elements = count * bins;
    // Without gaps in shared memory there are no rows to tell apart.
    const bool plain = s.row_step == bins && (kStore || !weights);
#pragma unroll 1
    for (int first = threadIdx.x * V - shift; first < elements; first += kDistributionThreads * V) {
      if (first >= 0 && first + V <= elements) {
        if (plain && shift == 0) {
          move_aligned(at + first, staged + first);
          continue;
        }
        int row = quotient(first, s.bins_magic), bin = first - row * bins;
        bool skip = skips(row);
#pragma unroll 1
        for (int r = row + 1; skip && r * bins < first + V; ++r) skip = skips(r);
        if (skip) continue;
        move_vector(at + first, [&](int) {
          A* const here = staged + (row * s.row_step + bin);
          if (++bin == bins) {
            bin = 0;
            ++row;
          }
          return here;
        });
      } else {
#pragma unroll 1
        for (int i = max(first, 0); i < min(first + V, elements); ++i) {
          const int row = quotient(i, s.bins_magic);
          if (!skips(row)) move(at + i, staged + (i + row * (s.row_step - bins)));
        }
      }
    }
  }

  // A row's bins lie side by side.
  GFL_MEMBER void rows() const {
    const int bins = s.bins;
#pragma unroll 1
    for (int i = threadIdx.x; i < count * s.slots; i += kDistributionThreads) {
      const int row = quotient(i, s.slots_magic);
      if (skips(row)) continue;
      Place* const place = at + row * row_stride;
      A* const stage = staged + row * s.row_step;
      const int first = (i - row * s.slots) * V - static_cast<int>(misalignment(place) / sizeof(T));
      if (first >= 0 && first + V <= bins) {
        move_vector(place + first, [&](int j) { return stage + first + j; });
      } else {
#pragma unroll 1
        for (int k = max(first, 0); k < min(first + V, bins); ++k) move(place + k, stage + k);
      }
    }
  }

  // A bin's rows lie side by side.
  GFL_MEMBER void planes(bool wide) const {
    const int bins = s.bins, step = wide ? V : 1, across = s.tile_rows / step;  // a power of two
    const int bits = __ffs(across) - 1;
#pragma unroll 1
    for (int i = threadIdx.x; i < bins << bits; i += kDistributionThreads) {
      const int bin = i >> bits, row = (i & (across - 1)) * step;
      Place* const place = at + row + bin * bin_stride;
      A* const stage = staged + row * s.row_step + bin * s.bin_step;
      if (wide && row + V <= count) {
        bool skip = true;
#pragma unroll
        for (int j = 0; j < V; ++j) skip &= skips(row + j);
        if (!skip) move_vector(place, [&](int j) { return stage + j * s.row_step; });
      } else {
#pragma unroll 1
        for (int j = 0; j < step && row + j < count; ++j) {
          if (!skips(row + j)) move(place + j, stage + j * s.row_step);
        }
      }
    }
  }

  GFL_MEMBER void run(int mode, bool wide) const {
    if (mode == kPacked) {
      packed();
    } else if (mode == kRows) {
      rows();
    } else {
      planes(wide);
    }
  }
};

// kBins: known in advance, and a thread to each row; or 0.
template <int kDtype, int kBins>
__global__ void __launch_bounds__(kDistributionThreads, 8)
    distribution_kernel(const void* pred, const void* target, const void* weight_left,
                        const void* weight_right, const void* weight, const void* upstream,
                        const void* avg_factor, const void* values, void* loss, double* partials,
                        void* grad, const __grid_constant__ DistributionShape s) {
  using T = typename Element<kDtype>::type;
  using A = typename Element<kDtype>::acc;
  extern __shared__ uint4 shared[];
  A* const staged = reinterpret_cast<A*>(shared);
  A* const weights = staged + s.weights_at;
  const A factor = scale_factor<A>(s.scale, avg_factor);
  const int lane = threadIdx.x & (s.lanes - 1), in_tile = threadIdx.x / s.lanes;
  double total = 0;
  for (int64_t tile = blockIdx.x; tile < s.tiles; tile += gridDim.x) {
    const int run = s.rows.ndim == 1 ? 0 : divide(tile, s.tiles_per_run);
    const int first =
        (static_cast<int>(tile) - run * static_cast<int>(s.tiles_per_run)) * s.tile_rows;
    const int count = min(s.tile_rows, static_cast<int>(s.rows.size[kInner]) - first);
    const RowIndex start = run_at(s.rows, run, first), at = run_at(s.rows, run, first + in_tile);
    const bool inside = in_tile < count;
    A w = inside ? A(1) : A(0);
    if (weight) {
      if (inside) w = load_value<A>(weight, s.weight.dtype, at.offset(s.weight));
      if (inside && lane == 0) weights[in_tile] = w;
      __syncthreads();
    }
    Mover<T, A, false>{static_cast<const T*>(pred) + start.offset(s.pred),
                       s.pred.row[kInner],
                       s.pred.column,
                       count,
                       staged,
                       weight ? weights : nullptr,
                       s}
        .run(s.pred_mode, s.pred_wide);
    __syncthreads();

    Row<A> row{};
    if (inside) {
      const int64_t offsets[] = {at.offset(s.target), at.offset(s.weight_left),
                                 at.offset(s.weight_right), at.offset(s.upstream)};
      row = load_row<A>(target, weight_left, weight_right, w, upstream, factor, offsets, s);
    }
    const StagedRow<A> bins{staged + in_tile * s.row_step, s.bin_step};
    A value;
    if constexpr (kBins == 0) {
      value = compute_row(bins, row, !target, grad && inside, values, s, lane);
    } else {
      value = compute_whole_row<kBins>(bins, row, !target, grad && inside, values, s);
    }
    if (lane == 0 && inside) {
      if (loss) static_cast<A*>(loss)[at.offset(s.loss)] = target ? value * factor : value;
      total += value;
    }
    __syncthreads();
    if (grad) {
      Mover<T, A, true>{static_cast<T*>(grad) + start.offset(s.grad),
                        s.grad.row[kInner],
                        s.grad.column,
                        count,
                        staged,
                        nullptr,
                        s}
          .run(s.grad_mode, s.grad_wide);
      __syncthreads();
    }
  }
  if (partials) leave_sum<kDistributionThreads>(static_cast<A>(total), partials);
}

// Any strides, any number of bins.
template <int kDtype>
__global__ void __launch_bounds__(kDistributionThreads, 4)
    distribution_general_kernel(const void* pred, const void* target, const void* weight_left,
                                const void* weight_right, const void* weight, const void* upstream,
                                const void* avg_factor, const void* values, void* loss,
                                double* partials, void* grad,
                                const __grid_constant__ DistributionShape s) {
  using T = typename Element<kDtype>::type;
  using A = typename Element<kDtype>::acc;
  const A factor = scale_factor<A>(s.scale, avg_factor);
  const int lane = threadIdx.x & (s.lanes - 1), together = kDistributionThreads / s.lanes;
  double total = 0;
  for (int64_t first = int64_t{blockIdx.x} * together; first < s.rows.count;
       first += int64_t{gridDim.x} * together) {
    const int64_t number = first + threadIdx.x / s.lanes;
    const bool inside = number < s.rows.count;
    int64_t at[8] = {};
    Row<A> row{};
    if (inside) {
      const Steps* const steps[] = {&s.target, &s.weight_left, &s.weight_right, &s.upstream,
                                    &s.pred,   &s.grad,        &s.loss,         &s.weight};
      locate(s.rows, number, steps, at);
      const A w = weight ? load_value<A>(weight, s.weight.dtype, at[7]) : A(1);
      const int64_t offsets[] = {at[0], at[1], at[2], at[3]};
      row = load_row<A>(target, weight_left, weight_right, w, upstream, factor, offsets, s);
    }
    const PlacedRow<T, A> bins{static_cast<const T*>(pred) + at[4], static_cast<T*>(grad) + at[5],
                               s.pred.column, s.grad.column};
    const A value = compute_row(bins, row, !target, grad && inside, values, s, lane);
    if (lane == 0 && inside) {
      if (loss) static_cast<A*>(loss)[at[6]] = target ? value * factor : value;
      total += value;
    }
  }
  if (partials) leave_sum<kDistributionThreads>(static_cast<A>(total), partials);
}

}  // namespace

template <int kDtype>
static const void* distribution_kernel_for(int bins) {
  switch (bins) {
    case 0:
      return reinterpret_cast<const void*>(distribution_kernel<kDtype, 0>);
    case 16:
      return reinterpret_cast<const void*>(distribution_kernel<kDtype, 16>);
    case 17:
      return reinterpret_cast<const void*>(distribution_kernel<kDtype, 17>);
    default:
      return nullptr;
  }
}

const void* distribution_kernel_at(int dtype, int bins) {
  switch (dtype) {
    case GFL_FLOAT32:
      return distribution_kernel_for<GFL_FLOAT32>(bins);
    case GFL_FLOAT64:
      return reinterpret_cast<const void*>(distribution_kernel<GFL_FLOAT64, 0>);
    case GFL_BFLOAT16:
      return distribution_kernel_for<GFL_BFLOAT16>(bins);
    case GFL_FLOAT16:
      return distribution_kernel_for<GFL_FLOAT16>(bins);
    default:
      return nullptr;
  }
}

const void* distribution_general_kernel_at(int dtype) {
  switch (dtype) {
    case GFL_FLOAT32:
      return reinterpret_cast<const void*>(distribution_general_kernel<GFL_FLOAT32>);
    case GFL_FLOAT64:
      return reinterpret_cast<const void*>(distribution_general_kernel<GFL_FLOAT64>);
    case GFL_BFLOAT16:
      return reinterpret_cast<const void*>(distribution_general_kernel<GFL_BFLOAT16>);
    case GFL_FLOAT16:
      return reinterpret_cast<const void*>(distribution_general_kernel<GFL_FLOAT16>);
    default:
      return nullptr;
  }
}

}  // namespace gfl
