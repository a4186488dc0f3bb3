// The distribution family: Distribution Focal Loss, the Integral where there is no target, and the
// summaries of a row (statistics, moments, the Integral over a peak).
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

// offset(operand) is the row's place in one.
template <typename A, typename Offset>
GFL_DEVICE Row<A> load_row(const void* target, const void* weight_left, const void* weight_right,
                           A w, const void* upstream, A factor, const Offset& offset,
                           const DistributionShape& s) {
  Row<A> row{w, w == 0 ? A(0) : w * factor, 0, 0, 0};
  // A row of weight 0 stays out whatever comes from upstream.
  if (upstream && w != 0) row.g_factor *= static_cast<const A*>(upstream)[offset(s.upstream)];
  if (target && w != 0) {
    const A last = static_cast<A>(s.bins - 1);
    const A t = load_value<A>(target, s.target.dtype, offset(s.target));
    if (!weight_left) {
      split_target(t, last, &row.left, &row.wl, &row.wr);
    } else {
      row.wl = load_value<A>(weight_left, s.weight_left.dtype, offset(s.weight_left));
      row.wr = load_value<A>(weight_right, s.weight_right.dtype, offset(s.weight_right));
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

// Where the bins of a row are while it is computed: in shared memory, where the gradient may take
// the place of z; or at their places in pred and grad.
template <typename T, typename Step>
struct Bins {
  const T* pred;
  T* grad;
  Step pred_step, grad_step;
  Format<T> format;

  GFL_MEMBER const T* z(int k) const { return pred + k * pred_step; }
  GFL_MEMBER T* g(int k) const { return grad + k * grad_step; }
  template <typename A>
  GFL_MEMBER A load(int k) const {
    return format.widen(*z(k));
  }
  template <typename A>
  GFL_MEMBER void store(A value, int k) const {
    format.narrow(value, g(k));
  }
  // n bins from k on, by pieces of kPiece neighbours: 1, or a vector of them, which is aligned.
  template <int kPiece, int n, typename A>
  GFL_MEMBER void load(int k, A (&to)[n]) const {
    alignas(16) T raw[n];
#pragma unroll
    for (int i = 0; i < n; i += kPiece) {
      if constexpr (kPiece == 1) {
        raw[i] = *z(k + i);
      } else {
        reinterpret_cast<Vector<T>&>(raw[i]) = load_vector(z(k + i));
      }
    }
    format.widen(raw, to);
  }
  template <int kPiece, int n, typename A>
  GFL_MEMBER void store(const A (&from)[n], int k) const {
    alignas(16) T raw[n];
    format.narrow(from, raw);
#pragma unroll
    for (int i = 0; i < n; i += kPiece) {
      if constexpr (kPiece == 1) {
        *g(k + i) = raw[i];
      } else {
        store_vector(g(k + i), reinterpret_cast<const Vector<T>&>(raw[i]));
      }
    }
  }
  // of(k, z) for every `lanes`-th bin from `lane` to `end`. A pointer walks: out of k an address in
  // shared memory takes ten instructions.
  template <typename F>
  GFL_MEMBER void walk(int lane, int lanes, int end, const F& of) const {
    const T* at = z(lane);
    const Step ahead = lanes * pred_step;
#pragma unroll 1
    for (int k = lane; k < end; k += lanes, at += ahead) of(k, format.widen(*at));
  }
};

// What the loss and the gradient of a row have in common.
template <typename A>
struct RowTotals {
  A high, sum, moment, z_left, z_right;  // the last two less high
};

// Weighted loss, or expectation, of a row; `inverse` and the weights become those of the gradient.
template <typename A>
GFL_DEVICE A finish_row(const RowTotals<A>& t, bool is_integral, Row<A>* row, A* inverse) {
  *inverse = reciprocal(t.sum);
  if (is_integral) {
    const A value = t.moment * *inverse;
    *inverse *= row->g_factor;
    return value;
  }
  const A value =
      distribution_loss(logarithm(t.sum), row->wl, row->wr, t.z_left, t.z_right) * row->w;
  row->wl *= row->g_factor;
  row->wr *= row->g_factor;
  *inverse *= row->wl + row->wr;
  return value;
}

// The gradient at the two bins beside the target, which a row's others need not be told from.
template <typename T, typename Step, typename A>
GFL_DEVICE void write_sides(const Bins<T, Step>& bins, const RowTotals<A>& t, const Row<A>& row,
                            A inverse, int left, int last) {
  bins.store(distribution_grad(exponential(t.z_left) * inverse, true, false, row.wl, row.wr), left);
  if (left < last) {
    bins.store(distribution_grad(exponential(t.z_right) * inverse, false, true, row.wl, row.wr),
               left + 1);
  }
}

// A row, by the neighbours it belongs to, of which this thread is number `lane`. The whole
// warp takes part; a row of weight 0 is not read.
template <int kPiece, typename T, typename Step, typename A>
GFL_DEVICE A compute_row(const Bins<T, Step>& bins, Row<A> row, bool is_integral, bool write,
                         const void* values, const DistributionShape& s, int lane) {
  const int count = s.bins, lanes = 1 << s.lane_bits;
  const int first = lane * kPiece, step = lanes * kPiece;
  const bool read = row.w != 0;
  RowTotals<A> t{static_cast<A>(-INFINITY), 0, 0, 0, 0};
  if (read) {
    for (int k = first; k < count; k += step) {
      A z[kPiece];
      bins.template load<kPiece>(k, z);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) t.high = larger(z[i], t.high);
    }
  }
  t.high = max_lanes(t.high, lanes);
  const int left = index_of(row.left);
  if (read) {
    for (int k = first; k < count; k += step) {
      A z[kPiece];
      bins.template load<kPiece>(k, z);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) {
        const A e = exponential(z[i] - t.high);
        t.sum += e;
        if (is_integral) t.moment += e * bin_value<A>(values, s.values, k + i);
      }
    }
    if (!is_integral) {
      t.z_left = bins.template load<A>(left) - t.high;
      t.z_right = bins.template load<A>(min(left + 1, count - 1)) - t.high;
    }
  }
  t.sum = sum_lanes(t.sum, lanes);
  if (is_integral) t.moment = sum_lanes(t.moment, lanes);
  A inverse;
  const A value = finish_row(t, is_integral, &row, &inverse);
  __syncwarp();  // from here on neighbours overwrite z
  if (write) {
    for (int k = first; k < count; k += step) {
      A g[kPiece] = {};
      if (read) {
        bins.template load<kPiece>(k, g);
#pragma unroll
        for (int i = 0; i < kPiece; ++i) {
          g[i] = exponential(g[i] - t.high) * inverse;
          if (is_integral) {
            g[i] = expectation_grad(g[i], bin_value<A>(values, s.values, k + i), value);
          }
        }
      }
      bins.template store<kPiece>(g, k);
    }
  }
  __syncwarp();
  if (write && read && !is_integral && lane == 0) {
    write_sides(bins, t, row, inverse, left, count - 1);
  }
  return read ? value : A(0);
}

// The same for a row of kBins that one thread computes in its registers.
template <int kBins, int kPiece, typename T, typename A>
GFL_DEVICE A compute_whole_row(const Bins<T, int>& bins, Row<A> row, bool is_integral, bool write,
                               const void* values, const DistributionShape& s) {
  A e[kBins] = {};
  if (row.w == 0) {
    if (write) bins.template store<kPiece>(e, 0);
    return 0;
  }
  bins.template load<kPiece>(0, e);
  RowTotals<A> t{e[0], 0, 0, 0, 0};
  const auto each = [&](const auto& of) {
#pragma unroll
    for (int k = 0; k < kBins; ++k) of(k, e[k]);
  };
  each([&](int, A& z) { t.high = larger(z, t.high); });
  each([&](int, A& z) {
    z = exponential(z - t.high);
    t.sum += z;
  });
  const int left = index_of(row.left);
  if (is_integral) {
    each([&](int k, A& z) { t.moment += z * bin_value<A>(values, s.values, k); });
  } else {
    t.z_left = bins.template load<A>(left) - t.high;
    t.z_right = bins.template load<A>(min(left + 1, kBins - 1)) - t.high;
  }
  A inverse;
  const A value = finish_row(t, is_integral, &row, &inverse);
  if (!write) return value;
  each([&](int, A& z) { z *= inverse; });
  if (is_integral) {
    asm("" : "+l"(values));  // or the values of all bins would stay in registers since the moment
    each([&](int k, A& z) { z = expectation_grad(z, bin_value<A>(values, s.values, k), value); });
  }
  bins.template store<kPiece>(e, 0);
  if (!is_integral) write_sides(bins, t, row, inverse, left, kBins - 1);
  return value;
}

// The next logit in descending order, of equals the first bin first: value and place are those of
// the one before. The place is s.bins if there is none, or -inf alone.
template <typename T, typename Step, typename A>
GFL_DEVICE void next_highest(const Bins<T, Step>& bins, bool read, const DistributionShape& s,
                             int lane, A* value, int* place) {
  const int count = s.bins, lanes = 1 << s.lane_bits;
  A best = static_cast<A>(-INFINITY);
  int at = count;
  bins.walk(lane, lanes, read ? count : 0, [&](int k, A z) {
    const bool after = z < *value || (z == *value && k > *place);
    if (after && z > best) {
      best = z;
      at = k;
    }
  });
  *value = max_lanes(best, lanes);
  *place = -static_cast<int>(max_lanes(static_cast<A>(best == *value ? -at : -count), lanes));
}

// The n highest logits of a thread's own row, by the same rules, in one pass.
template <typename T, typename Step, typename A, int n>
GFL_DEVICE void list_highest(const Bins<T, Step>& bins, int end, int none, A (&values)[n],
                             int (&places)[n]) {
#pragma unroll
  for (int j = 0; j < n; ++j) {
    values[j] = static_cast<A>(-INFINITY);
    places[j] = none;
  }
  bins.walk(0, 1, end, [&](int k, A z) {
    // It takes the place of the first lower one, and all from there on move down by one.
    A moved = z;
    int at = k;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const bool above = z > values[j];
      const A lower = above ? values[j] : moved;
      const int its_place = above ? places[j] : at;
      values[j] = above ? moved : values[j];
      places[j] = above ? at : places[j];
      moved = lower;
      at = its_place;
    }
  });
}

// A summary of a row into `out`, and its gradient out of `upstream`, of which one may be null, by
// the neighbours the row belongs to. The whole warp takes part; where `read` is false there is no
// row. The gradient of statistics must not take the place of z.
template <typename T, typename Step, typename A>
GFL_DEVICE void summarise_row(const Bins<T, Step>& bins, bool read, const void* values,
                              const A* upstream, A* out, const DistributionShape& s, int lane) {
  const int count = s.bins, lanes = 1 << s.lane_bits, end = read ? count : 0;
  const bool statistics = s.kind == kStatistics, moments = s.kind == kMoments;
  const auto each = [&](const auto& of) { bins.walk(lane, lanes, end, of); };
  const auto value_of = [&](int k) { return bin_value<A>(values, s.values, k); };
  const auto from_upstream = [&](int j) { return read ? upstream[j * s.upstream.column] : A(0); };
  const auto write = [&](int j, A value) {
    if (out && read && lane == 0) out[j * s.loss.column] = value;
  };
  A high = static_cast<A>(-INFINITY);
  each([&](int, A z) { high = larger(z, high); });
  high = max_lanes(high, lanes);
  A peak = 0;
  if (s.window >= 0) {
    int first = count;
    each([&](int k, A z) {
      if (z == high) first = min(first, k);
    });
    peak = -max_lanes(static_cast<A>(-first), lanes);
  }
  const auto exponential_of = [&](int k, A shifted) {
    const A e = exponential(shifted);
    return s.window < 0 ? e : e * peak_window(A(k), peak, A(s.window));
  };
  A sum = 0, mean = 0, mean_s = 0;
  each([&](int k, A z) {
    const A e = exponential_of(k, z - high);
    sum += e;
    if (!statistics) mean += e * value_of(k);
    if (moments) mean_s += entropy_term(e, z - high);
  });
  sum = sum_lanes(sum, lanes);
  A inverse = reciprocal(sum);
  if (statistics) {
    const A share = A(1) / s.topk;
    constexpr int kListed = 4;  // GFLv2's topk
    const bool listed = lanes == 1 && s.topk <= kListed;
    A values_listed[kListed];
    int places_listed[kListed];
    if (listed) list_highest(bins, end, count, values_listed, places_listed);
    const auto each_place = [&](const auto& of) {
      if (listed) {
#pragma unroll
        for (int j = 0; j < kListed; ++j) {
          if (j < s.topk) of(j, places_listed[j], exponential(values_listed[j] - high) * inverse);
        }
        return;
      }
      A value = static_cast<A>(INFINITY);
      int place = -1;
#pragma unroll 1
      for (int j = 0; j < s.topk; ++j) {
        next_highest(bins, read, s, lane, &value, &place);
        of(j, place, exponential(value - high) * inverse);
      }
    };
    const A of_mean = upstream && s.add_mean ? from_upstream(s.topk) * share : A(0);
    A top_sum = 0, total = 0;
    each_place([&](int j, int, A p) {
      write(j, p);
      top_sum += p;
      if (upstream) total += (from_upstream(j) + of_mean) * p;
    });
    if (s.add_mean) write(s.topk, top_sum * share);
    if (!upstream) return;
    each([&](int k, A z) {
      bins.store(expectation_grad(exponential(z - high) * inverse, A(0), total), k);
    });
    __syncwarp();
    each_place([&](int j, int place, A p) {
      if (read && lane == 0 && place < count) {
        bins.store(expectation_grad(p, from_upstream(j) + of_mean, total), place);
      }
    });
    return;
  }
  mean = sum_lanes(mean, lanes) * inverse;
  write(0, mean);
  if (moments) {
    Moments<A> m{mean, 0, sum_lanes(mean_s, lanes) * inverse, 0, 0, 0};
    each([&](int k, A z) {
      const A away = value_of(k) - mean;
      m.variance += exponential(z - high) * (away * away);
    });
    m.variance = sum_lanes(m.variance, lanes) * inverse;
    const A std = square_root(m.variance);
    write(1, std);
    write(2, logarithm(sum) - m.mean_s);
    if (!upstream) return;
    m.by_mean = from_upstream(0);
    m.by_variance = from_upstream(1) * square_root_grad(std);
    m.by_entropy = from_upstream(2);
    each([&](int k, A z) {
      const A p = exponential(z - high) * inverse;
      bins.store(moments_grad(p, value_of(k), z - high, m), k);
    });
    return;
  }
  if (!upstream) return;
  inverse *= from_upstream(0);
  each([&](int k, A z) {
    bins.store(expectation_grad(exponential_of(k, z - high) * inverse, value_of(k), mean), k);
  });
}

GFL_DEVICE int quotient(int n, uint32_t magic) { return __umulhi(n, magic); }

// A tile of rows on its way to shared memory, or back where kStore: lines of neighbouring elements,
// moved as they are.
template <typename T, typename A, bool kStore>
struct Mover {
  static constexpr int V = Vector<T>::kSize;
  using Place = std::conditional_t<kStore, T, const T>;
  Place* at;  // the tile's first row
  int64_t row_stride, bin_stride;
  int count;  // rows
  int pad;    // elements between rows in shared memory
  T* staged;
  // Of the rows, in shared memory; null: none is 0. Rows of weight 0 are not read.
  const A* weights;
  const StageShape& stage;
  const DistributionShape& s;

  GFL_MEMBER bool skips(int line, int first, int n) const {
    if (kStore || !weights) return false;
    int row = line, end = line + 1;
    if (stage.mode == kBinPlanes) {
      row = first;
      end = first + n;
    } else if (stage.mode == kPacked) {
      row = quotient(first, s.bins_magic);
      end = quotient(first + n - 1, s.bins_magic) + 1;
    }
    bool skip = true;
#pragma unroll 1
    for (; skip && row < end; ++row) skip = weights[row] == 0;
    return skip;
  }
  GFL_MEMBER static void move(Place* place, T* stage) {
    if constexpr (kStore) {
      *place = *stage;
    } else {
      *stage = *place;
    }
  }

  GFL_MEMBER void run() const {
    const bool packed = stage.mode == kPacked, planes = stage.mode == kBinPlanes;
    const int bins = s.bins, length = packed ? count * bins : planes ? count : bins;
    const int lines = packed ? 1 : planes ? bins : count;
    const int64_t line_stride = planes ? bin_stride : row_stride;
    const int line_step = planes ? s.bin_step : s.row_step;
    const int step = planes ? s.row_step : s.bin_step;
    const int slots = packed ? length / V + 2 : stage.slots;
    if (stage.wide && packed && (kStore || !weights)) {
      constexpr int kBatch = 3, kStep = kDistributionThreads * V;  // so many loads at once
      const int mine = static_cast<int>(threadIdx.x) * V, whole = length - (V - 1) - mine;
      Place* const place = settled(at + mine);
      T* const here = staged + mine;
      const auto padded = [&](int k) {
        return pad ? k + quotient(k + mine, s.bins_magic) * pad : k;
      };
#pragma unroll 1
      for (int i = 0; i < whole; i += kBatch * kStep) {
        Vector<T> v[kBatch];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const int k = i + j * kStep;
          if (k < whole) v[j] = load_vector(kStore ? here + padded(k) : place + k);
        }
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const int k = i + j * kStep;
          if (k < whole) store_vector(const_cast<T*>(kStore ? place + k : here + padded(k)), v[j]);
        }
      }
      const int k = length / V * V + threadIdx.x;  // there are such without pads alone
      if (k < length) move(at + k, staged + k);
      return;
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < lines * slots; i += kDistributionThreads) {
      const int line = packed ? 0 : slots == 1 ? i : quotient(i, stage.slots_magic);
      Place* const place = at + line * line_stride;
      T* const here = staged + line * line_step;
      int first = (i - line * slots) * V;
      if (!stage.wide) first -= misalignment(place) / sizeof(T);
      const int from = max(first, 0), to = min(first + V, length);
      if (from >= to || skips(line, from, to - from)) continue;
      if (to - from < V) {
#pragma unroll 1
        for (int k = from; k < to; ++k) move(place + k, here + k * step);
      } else if (stage.wide) {
        store_vector(const_cast<T*>(kStore ? place + first : here + first),
                     load_vector(kStore ? here + first : place + first));
      } else {
        Vector<T> v;
        if (!kStore) v = load_vector(place + first);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          if constexpr (kStore) {
            v.of[k] = here[(first + k) * step];
          } else {
            here[(first + k) * step] = v.of[k];
          }
        }
        if constexpr (kStore) store_vector(place + first, v);
      }
    }
  }
};

// Blocks of an SM that leave a thread as many registers as the compiler asks for there.
constexpr int distribution_blocks(int bins) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 900
  return bins > 17 ? 6 : 8;
#else
  return bins > 8 ? 6 : 8;
#endif
}

// kBins: known in advance, and a thread to each row; 0: any number; or kSummary.
template <int kDtype, int kBins>
__global__ void __launch_bounds__(kDistributionThreads, distribution_blocks(kBins))
    distribution_kernel(const void* pred, const void* target, const void* weight_left,
                        const void* weight_right, const void* weight, const void* upstream,
                        const void* avg_factor, const void* values, void* loss, double* partials,
                        void* grad, const __grid_constant__ DistributionShape s) {
  using T = typename Element<kDtype>::type;
  using A = typename Element<kDtype>::acc;
  constexpr int V = Vector<T>::kSize;
  extern __shared__ uint4 shared[];
  __shared__ A weights[kMostTileRows];
  T* const staged = reinterpret_cast<T*>(shared);
  const Format<T> format(s.pred.dtype);
  const A factor = scale_factor<A>(s.scale, avg_factor);
  constexpr bool kAny = kBins == 0 || kBins == kSummary;
  const int lane_bits = kAny ? s.lane_bits : 0, lane = threadIdx.x & ((1 << lane_bits) - 1);
  const int tiles = s.tiles, tiles_per_run = s.tiles_per_run;
  constexpr bool kPadded = kAny || (kBins % V == 0 && kBins / V % 2 == 0);  // as planned
  const int pad = kPadded ? s.row_step - static_cast<int>(s.bins) : 0;
  A total = 0;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int run = s.rows.ndim == 1 ? 0 : divide(tile, tiles_per_run);
    const int first = (tile - run * tiles_per_run) * s.tile_rows;
    const int count = min(s.tile_rows, static_cast<int>(s.rows.size[kInner]) - first);
    const RowIndex start = run_at(s.rows, run, first);
    if (weight) {
      for (int i = threadIdx.x; i < count; i += kDistributionThreads) {
        const RowIndex at{start.outer, start.middle, first + i};
        weights[i] = load_value<A>(weight, s.weight.dtype, at.offset(s.weight));
      }
      __syncthreads();
    }
    Mover<T, A, false>{static_cast<const T*>(pred) + start.offset(s.pred),
                       s.pred.row[kInner],
                       s.pred.column,
                       count,
                       pad,
                       staged,
                       weight ? weights : nullptr,
                       s.pred_stage,
                       s}
        .run();
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < count; i += kDistributionThreads >> lane_bits) {
      const int in_tile = i + (threadIdx.x >> lane_bits);
      const RowIndex at{start.outer, start.middle, first + in_tile};
      const auto offset = [&](const Steps& steps) { return at.offset(steps); };
      const bool inside = in_tile < count, write = grad && inside;
      if constexpr (kBins == kSummary) {
        T* const mine = staged + in_tile * s.row_step;
        const Bins<T, int> bins{mine, mine + s.grad_offset, s.bin_step, s.bin_step, format};
        summarise_row(bins, inside, values,
                      grad ? static_cast<const A*>(upstream) + offset(s.upstream) : nullptr,
                      loss ? static_cast<A*>(loss) + offset(s.loss) : nullptr, s, lane);
        continue;
      }
      Row<A> row{};
      if (inside) {
        const A w = weight ? weights[in_tile] : A(1);
        row = load_row<A>(target, weight_left, weight_right, w, upstream, factor, offset, s);
      }
      T* const mine = staged + in_tile * s.row_step;
      A value;
      if constexpr (kBins == 0) {
        const Bins<T, int> bins{mine, mine, s.bin_step, s.bin_step, format};
        value = s.whole_vectors ? compute_row<V>(bins, row, !target, write, values, s, lane)
                                : compute_row<1>(bins, row, !target, write, values, s, lane);
      } else if (s.bin_step == 1) {
        constexpr int kPiece = kBins % V ? 1 : V;
        const Bins<T, int> bins{mine, mine, 1, 1, format};
        value = compute_whole_row<kBins, kPiece>(bins, row, !target, write, values, s);
      } else if constexpr (kBins > 17) {  // planes; so many addresses would be spilled
        const Bins<T, int> bins{mine, mine, s.bin_step, s.bin_step, format};
        value = compute_row<1>(bins, row, !target, write, values, s, lane);
      } else {
        // Settled: or the addresses of all bins would stay in registers until they are written.
        T* const again = staged + settled(in_tile * s.row_step);
        const Bins<T, int> bins{mine, again, s.bin_step, settled(s.bin_step), format};
        value = compute_whole_row<kBins, 1>(bins, row, !target, write, values, s);
      }
      if (lane == 0 && inside) {
        if (loss) static_cast<A*>(loss)[offset(s.loss)] = target ? value * factor : value;
        total += value;
      }
    }
    __syncthreads();
    if (grad) {
      Mover<T, A, true>{static_cast<T*>(grad) + start.offset(s.grad),
                        s.grad.row[kInner],
                        s.grad.column,
                        count,
                        pad,
                        staged + (kBins == kSummary ? s.grad_offset : 0),
                        nullptr,
                        s.grad_stage,
                        s}
          .run();
      __syncthreads();
    }
  }
  if (partials) leave_sum<kDistributionThreads>(total, partials);
}

// Any strides, any number of bins; float64.
template <int kDtype>
__global__ void __launch_bounds__(kDistributionThreads, 4)
    distribution_general_kernel(const void* pred, const void* target, const void* weight_left,
                                const void* weight_right, const void* weight, const void* upstream,
                                const void* avg_factor, const void* values, void* loss,
                                double* partials, void* grad,
                                const __grid_constant__ DistributionShape s) {
  using T = typename Element<kDtype>::type;
  using A = typename Element<kDtype>::acc;
  const Format<T> format(s.pred.dtype);
  const A factor = scale_factor<A>(s.scale, avg_factor);
  const int lane = threadIdx.x & ((1 << s.lane_bits) - 1);
  const int together = kDistributionThreads >> s.lane_bits;
  double total = 0;
  for (int64_t first = int64_t{blockIdx.x} * together; first < s.rows.count;
       first += int64_t{gridDim.x} * together) {
    const int64_t number = first + (threadIdx.x >> s.lane_bits);
    const bool inside = number < s.rows.count;
    const Steps* const operands[] = {&s.pred,        &s.grad,     &s.loss,   &s.target,
                                     &s.weight_left, &s.upstream, &s.weight, &s.weight_right};
    int64_t at[8];
    locate(s.rows, inside ? number : 0, operands, at);
    const auto offset = [&](const Steps& steps) {
      int64_t found = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) found = operands[i] == &steps ? at[i] : found;
      return found;
    };
    const Bins<T, int64_t> bins{static_cast<const T*>(pred) + at[0],
                                grad ? static_cast<T*>(grad) + at[1] : nullptr, s.pred.column,
                                s.grad.column, format};
    if (s.summary) {
      summarise_row(bins, inside, values,
                    grad ? static_cast<const A*>(upstream) + offset(s.upstream) : nullptr,
                    loss ? static_cast<A*>(loss) + offset(s.loss) : nullptr, s, lane);
      continue;
    }
    Row<A> row{};
    if (inside) {
      const A w = weight ? load_value<A>(weight, s.weight.dtype, offset(s.weight)) : A(1);
      row = load_row<A>(target, weight_left, weight_right, w, upstream, factor, offset, s);
    }
    const A value = compute_row<1>(bins, row, !target, grad && inside, values, s, lane);
    if (lane == 0 && inside) {
      if (loss) static_cast<A*>(loss)[offset(s.loss)] = target ? value * factor : value;
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
    case kSummary:
      return reinterpret_cast<const void*>(distribution_kernel<kDtype, kSummary>);
    case 8:
      return reinterpret_cast<const void*>(distribution_kernel<kDtype, 8>);
    case 16:
      return reinterpret_cast<const void*>(distribution_kernel<kDtype, 16>);
    case 17:
      return reinterpret_cast<const void*>(distribution_kernel<kDtype, 17>);
    case 33:
      return reinterpret_cast<const void*>(distribution_kernel<kDtype, 33>);
    default:
      return nullptr;
  }
}

const void* distribution_kernel_at(int dtype, int bins) {
  switch (dtype) {
    case GFL_FLOAT32:
      return distribution_kernel_for<GFL_FLOAT32>(bins);
    case kHalf:
      return distribution_kernel_for<kHalf>(bins);
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
    case kHalf:
      return reinterpret_cast<const void*>(distribution_general_kernel<kHalf>);
    default:
      return nullptr;
  }
}

}  // namespace gfl
