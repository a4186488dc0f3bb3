// The positives of a head: decoding, box loss, DFL and the gradient of the box logits, which is 0
// wherever there is none. Positives are few: a warp has one at a time, and the exponential and the
// logarithm are math.h's own.
#include "head.h"
#include "kernels.h"

namespace gfl {
namespace {

static_assert(int{GFL_CIOU} == int{kCiou} && int{GFL_CIOU_ALL} == int{kCiouAll});

constexpr int kWarps = kBoxThreads / 32;
constexpr int kSideLanes = 8;  // of a warp, for each of the four sides

struct Positives {
  unsigned bits[kWarps];   // a bit for each cell of the tile
  int cells[kBoxThreads];  // their places in the tile, in ascending order

  GFL_MEMBER bool has(int cell) const { return bits[cell / 32] >> cell % 32 & 1; }

  // The whole block finds them; returns how many there are.
  GFL_MEMBER int find(const HeadShape& s, const HeadLevel& level, const Tile& tile) {
    const int place = threadIdx.x, lane = place % 32, warp = place / 32;
    bool positive = false;
    if (place < tile.count) {
      const int64_t at = offset_of_cell(level.labels, tile.image, tile.first + place);
      positive = s.dense ? load_value<float>(level.labels.data, s.label_dtype, at) != 0
                         : class_of(level.labels.data, s.label_dtype, at, s.classes) >= 0;
    }
    const unsigned mine = __ballot_sync(~0u, positive);
    if (lane == 0) bits[warp] = mine;
    __syncthreads();
    int before = 0, count = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      before += w < warp ? __popc(bits[w]) : 0;
      count += __popc(bits[w]);
    }
    if (positive) cells[before + __popc(mine & ((1u << lane) - 1))] = place;
    __syncthreads();
    return count;
  }
};

template <typename A>
GFL_DEVICE void store_value(char* to, int dtype, int64_t at, A value) {
  switch (dtype) {
    case GFL_FLOAT64:
      reinterpret_cast<double*>(to)[at] = value;
      return;
    case GFL_BFLOAT16:
    case GFL_FLOAT16:
      return Format<Half>(dtype).narrow(static_cast<float>(value),
                                        reinterpret_cast<Half*>(to) + at);
    default:
      reinterpret_cast<float*>(to)[at] = static_cast<float>(value);
  }
}

// A positive, as its warp has it. Lengths in units of the stride.
template <typename A>
struct Assessment {
  // Of the side of this lane: softmax(z) = exp(z - high) * inverse.
  A high, inverse, distance, left, wl, wr;
  // The same in all lanes.
  A box[4], target[4], dfl;
};

// The z of a side.
template <typename A>
struct SideLogits {
  const char* data;
  int dtype;
  int64_t at, step;

  GFL_MEMBER A operator()(int k) const { return load_value<A>(data, dtype, at + k * step); }
};

template <typename A>
GFL_DEVICE SideLogits<A> logits_of_side(const HeadShape& s, const HeadLevel& level, int image,
                                        int cell) {
  const int side = threadIdx.x % 32 / kSideLanes;
  const HeadMatrix& box = level.logits;
  return {box.data, s.logits_dtype,
          offset_of_cell(box, level, image, cell) + side * s.bins * box.column, box.column};
}

template <typename A>
GFL_DEVICE Assessment<A> assess_box(const HeadShape& s, const HeadLevel& level, int image,
                                    int cell) {
  const int side = threadIdx.x % 32 / kSideLanes, lane = threadIdx.x % kSideLanes;
  const SideLogits<A> z = logits_of_side<A>(s, level, image, cell);
  Assessment<A> a;
  a.high = static_cast<A>(-INFINITY);
  for (int k = lane; k < s.bins; k += kSideLanes) a.high = larger(z(k), a.high);
  a.high = max_lanes(a.high, kSideLanes);
  A sum = 0, moment = 0;
  for (int k = lane; k < s.bins; k += kSideLanes) {
    const A e = exponential(z(k) - a.high);
    sum += e;
    moment += e * static_cast<A>(k);
  }
  sum = sum_lanes(sum, kSideLanes);
  a.inverse = reciprocal(sum);
  a.distance = sum_lanes(moment, kSideLanes) * a.inverse;

  const A stride = static_cast<A>(level.stride);
  const A point = load_value<A>(level.points.data, s.point_dtype,
                                cell * level.points.cell + side % 2 * level.points.column) /
                  stride;
  const A target = load_value<A>(level.box_targets.data, s.box_target_dtype,
                                 offset_of_cell(level.box_targets, image, cell) +
                                     side * level.box_targets.column) /
                   stride;
  split_target(side_distance(side, point, target), static_cast<A>(s.limit), &a.left, &a.wl, &a.wr);
  const int left = index_of(a.left);
  const A z_left = left < s.bins ? z(left) - a.high : A(0),
          z_right = left + 1 < s.bins ? z(left + 1) - a.high : A(0);
  const A dfl = distribution_loss(logarithm(sum), a.wl, a.wr, z_left, z_right);
  const A corner = decode_side(side, point, a.distance);
  a.dfl = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    a.box[i] = __shfl_sync(~0u, corner, i * kSideLanes);
    a.target[i] = __shfl_sync(~0u, target, i * kSideLanes);
    a.dfl += __shfl_sync(~0u, dfl, i * kSideLanes);
  }
  return a;
}

// The larger one, or a NaN.
template <typename A>
GFL_DEVICE A larger_or_nan(A a, A b) {
  return a > b || a != a ? a : b;
}

// The weight of a positive: its highest score, NaN if one of them is, or the sum of its targets.
// The whole warp takes part.
template <typename A>
GFL_DEVICE A weight_of(const HeadShape& s, const HeadLevel& level, int image, int cell) {
  const HeadMatrix& scores = level.targets;
  const int64_t at = offset_of_cell(scores, level, image, cell);
  A highest = static_cast<A>(-INFINITY), sum = 0;
  for (int c = threadIdx.x % 32; c < s.classes; c += 32) {
    const A value = load_value<A>(scores.data, s.target_dtype, at + c * scores.column);
    highest = larger_or_nan(value, highest);
    sum += value;
  }
  if (s.dense) return sum_lanes(sum, 32);
  for (int o = 16; o > 0; o >>= 1) {
    highest = larger_or_nan(__shfl_xor_sync(~0u, highest, o), highest);
  }
  return sigmoid(highest);
}

// quality, weight and boxes of every cell, and the block's sums: of box loss, DFL, weight and
// number of positives, partials [4, tiles].
template <int kDtype>
__global__ void __launch_bounds__(kBoxThreads, 4)
    head_boxes_kernel(void* quality, void* weight, void* boxes, double* partials,
                      const __grid_constant__ HeadShape s) {
  using A = typename Element<kDtype>::acc;
  __shared__ Positives positives;
  __shared__ double sums[3][kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Tile tile = tile_of_block(s);
  const HeadLevel& level = s.levels[tile.level];
  const int count = positives.find(s, level, tile);
  const int64_t first = tile.image * s.anchors + level.anchor + tile.first;
  A* const qualities = static_cast<A*>(quality) + first;
  A* const weights = static_cast<A*>(weight) + first;
  A* const corners = boxes ? static_cast<A*>(boxes) + 4 * first : nullptr;
  if (threadIdx.x < tile.count && !positives.has(threadIdx.x)) {
    qualities[threadIdx.x] = weights[threadIdx.x] = 0;
    for (int i = 0; corners && i < 4; ++i) corners[4 * threadIdx.x + i] = 0;
  }
  double total_bbox = 0, total_dfl = 0, total_weight = 0;
  for (int i = warp; i < count; i += kWarps) {
    const int place = positives.cells[i], cell = tile.first + place;
    const Assessment<A> a = assess_box<A>(s, level, tile.image, cell);
    const A w = weight_of<A>(s, level, tile.image, cell);
    const BoxLossGrad<A> r = box_loss_grad(s.iou, a.box, a.target, static_cast<A>(s.iou_eps));
    total_bbox += r.loss * w;
    total_dfl += a.dfl * w;
    total_weight += w;
    if (lane == 0) {
      qualities[place] = box_iou(a.box, a.target);
      weights[place] = w;
#pragma unroll
      for (int j = 0; corners && j < 4; ++j) {
        corners[4 * place + j] = a.box[j] * static_cast<A>(level.stride);
      }
    }
  }
  if (lane == 0) {
    sums[0][warp] = total_bbox;
    sums[1][warp] = total_dfl;
    sums[2][warp] = total_weight;
  }
  __syncthreads();
  if (threadIdx.x < 3) {
    double total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += sums[threadIdx.x][w];
    partials[int64_t{threadIdx.x} * s.tiles + blockIdx.x] = total;
  } else if (threadIdx.x == 3) {
    partials[int64_t{3} * s.tiles + blockIdx.x] = count;
  }
}

// sums and normalisers out of what the blocks of head_boxes_kernel have left. One block, a warp to
// each sum.
template <int kDtype>
__global__ void __launch_bounds__(kHeadFinishThreads)
    head_boxes_finish_kernel(const double* partials, void* sums, void* normalisers,
                             const __grid_constant__ HeadShape s) {
  using A = typename Element<kDtype>::acc;
  constexpr int kAll = kHeadFinishThreads / 32;
  __shared__ double weights[kMaxHeadLevels], counts[kAll];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int i = warp; i < 3 * s.count; i += kAll) {
    const int number = i / 3, term = i - 3 * number;
    const HeadLevel& level = s.levels[number];
    const double total = sum_of_values(partials + (int64_t{term} * s.tiles + level.first_tile),
                                       s.batch * level.tiles);
    if (lane == 0 && term == 2) weights[number] = total;
    if (lane == 0 && term < 2) {
      static_cast<A*>(sums)[number * s.sums_row + term * s.sums_column] = static_cast<A>(total);
    }
  }
  // At least one positive an image. These are whole numbers: their order is of no account.
  double count = 0;
  for (int image = warp; image < s.batch && !s.dense; image += kAll) {
    double of_image = 0;
    for (int i = 0; i < s.count; ++i) {
      const HeadLevel& level = s.levels[i];
      of_image += sum_of_values(
          partials + (int64_t{3} * s.tiles + level.first_tile + int64_t{image} * level.tiles),
          level.tiles);
    }
    count += at_least_1(of_image);
  }
  if (lane == 0) counts[warp] = count;
  __syncthreads();
  if (threadIdx.x > 0) return;
  double weight = 0;
  for (int i = 0; i < s.count; ++i) weight += weights[i];
  count = 0;
  for (int i = 0; i < kAll; ++i) count += counts[i];
  A* const to = static_cast<A*>(normalisers);
  to[0] = static_cast<A>(s.dense ? weight : count);
  to[s.normaliser_step] = static_cast<A>(weight);
}

GFL_DEVICE void store_zero(char* at, int bytes) {
  if (bytes == 4) {
    *reinterpret_cast<uint32_t*>(at) = 0;
  } else if (bytes == 2) {
    *reinterpret_cast<uint16_t*>(at) = 0;
  } else {
    *reinterpret_cast<uint64_t*>(at) = 0;
  }
}

// The gradient of what is not positive. Cells lie one after the other: vectors may have the end of
// one and the next one's begin.
GFL_DEVICE void zero_packed(const HeadShape& s, const HeadLevel& level, const Tile& tile,
                            const Positives& positives) {
  const int bytes = s.logits_bytes, vector = 16 / bytes, channels = 4 * s.bins;
  const int elements = tile.count * channels;
  char* const grad =
      level.grad.data + offset_of_cell(level.grad, level, tile.image, tile.first) * bytes;
  const int shift = misalignment(grad) / bytes;
  for (int i = threadIdx.x * vector - shift; i < elements; i += kBoxThreads * vector) {
    const int low = max(i, 0), high = min(i + vector, elements);
    // Two cells at most: one has eight channels or more.
    const int cell = divide(low, channels), next = divide(high - 1, channels);
    const bool skip = positives.has(cell), skip_next = positives.has(next);
    if (!skip && !skip_next && high - low == vector) {
      *reinterpret_cast<uint4*>(grad + int64_t{i} * bytes) = uint4{};
    } else {
      for (int j = low; j < high; ++j) {
        if (!(j < next * channels ? skip : skip_next)) {
          store_zero(grad + int64_t{j} * bytes, bytes);
        }
      }
    }
  }
}

// The same where a channel's cells lie side by side, or anyhow.
GFL_DEVICE void zero_planes(const HeadShape& s, const HeadLevel& level, const Tile& tile,
                            const Positives& positives) {
  const int bytes = s.logits_bytes, together = level.wide ? 16 / bytes : 1;
  const int groups = kBoxThreads / together;  // a power of two, as is `together`
  const int place = (threadIdx.x & (groups - 1)) * together, part = threadIdx.x / groups;
  if (place >= tile.count) return;
  const unsigned skip = positives.bits[place / 32] >> place % 32 & ((1u << together) - 1);
  char* to = level.grad.data + (offset_of_cell(level.grad, level, tile.image, tile.first + place) +
                                part * level.grad.column) *
                                   bytes;
  for (int k = part; k < 4 * s.bins; k += together) {
    if (level.wide && skip == 0) {
      *reinterpret_cast<uint4*>(to) = uint4{};
    } else {
      for (int i = 0; i < together; ++i) {
        if (!(skip >> i & 1)) store_zero(to + i * bytes, bytes);
      }
    }
    to += together * level.grad.column * bytes;
  }
}

template <int kDtype>
__global__ void __launch_bounds__(kBoxThreads, 4)
    head_box_grad_kernel(const void* weight, const void* normalisers, const void* up_bbox,
                         const void* up_dfl, const void* up_levels_bbox, const void* up_levels_dfl,
                         const __grid_constant__ HeadShape s) {
  using A = typename Element<kDtype>::acc;
  __shared__ Positives positives;
  const int lane = threadIdx.x % kSideLanes, warp = threadIdx.x / 32,
            side = threadIdx.x % 32 / kSideLanes;
  const Tile tile = tile_of_block(s);
  const HeadLevel& level = s.levels[tile.level];
  const int count = positives.find(s, level, tile);
  if (level.packed) {
    zero_packed(s, level, tile, positives);
  } else {
    zero_planes(s, level, tile, positives);
  }
  if (warp >= count) return;
  const A bbox_factor =
      static_cast<A>(box_factor<A>(s, normalisers, 1) *
                     upstream_of_level<A>(s, up_bbox, up_levels_bbox, 1, tile.level));
  const A dfl_factor =
      static_cast<A>(box_factor<A>(s, normalisers, 2) *
                     upstream_of_level<A>(s, up_dfl, up_levels_dfl, 2, tile.level));
  for (int i = warp; i < count; i += kWarps) {
    const int cell = tile.first + positives.cells[i];
    const Assessment<A> a = assess_box<A>(s, level, tile.image, cell);
    const BoxLossGrad<A> r = box_loss_grad(s.iou, a.box, a.target, static_cast<A>(s.iou_eps));
    const A w = static_cast<const A*>(weight)[tile.image * s.anchors + level.anchor + cell];
    A by_distance = r.grad[0];
#pragma unroll
    for (int j = 1; j < 4; ++j) by_distance = side == j ? r.grad[j] : by_distance;
    by_distance = (side < 2 ? -by_distance : by_distance) * (w * bbox_factor);
    const A wl = a.wl * (w * dfl_factor), wr = a.wr * (w * dfl_factor);
    const SideLogits<A> z = logits_of_side<A>(s, level, tile.image, cell);
    const int64_t to =
        offset_of_cell(level.grad, level, tile.image, cell) + side * s.bins * level.grad.column;
    for (int k = lane; k < s.bins; k += kSideLanes) {
      const A p = exponential(z(k) - a.high) * a.inverse, bin = static_cast<A>(k);
      const A g = by_distance * expectation_grad(p, bin, a.distance) +
                  distribution_grad(p * (wl + wr), a.left == bin, a.left == bin - 1, wl, wr);
      store_value(level.grad.data, s.logits_dtype, to + k * level.grad.column, g);
    }
  }
}

}  // namespace

#define GFL_OF_ACCUMULATOR(kernel)                                                    \
  const void* kernel##_at(int dtype) {                                                \
    return dtype == GFL_FLOAT64 ? reinterpret_cast<const void*>(kernel<GFL_FLOAT64>)  \
                                : reinterpret_cast<const void*>(kernel<GFL_FLOAT32>); \
  }

GFL_OF_ACCUMULATOR(head_boxes_kernel)
GFL_OF_ACCUMULATOR(head_boxes_finish_kernel)
GFL_OF_ACCUMULATOR(head_box_grad_kernel)

}  // namespace gfl
