// The classification loss of a tile of a head, or its gradient. Device code, internal linkage;
// head_class.cu compiles it with a GPU's approximate instructions for the losses that are common,
// head_class_general.cu without them for all.
#pragma once

#include "head.h"

namespace gfl {

// What the cells of the tile have besides logits, in shared memory.
template <typename A>
struct TileCells {
  A* weights;  // 0: the cell is not read
  A* qualities;
  int* labels;  // with sparse targets, as qualities
  A factor;     // of all of them

  GFL_MEMBER bool read(int place) const { return weights[place] != 0; }
  // Of the loss or of the gradient. A cell of weight 0 stays out whatever comes from upstream.
  GFL_MEMBER A scale(int place) const { return read(place) ? weights[place] * factor : A(0); }
};

template <int kVariant, typename A>
GFL_DEVICE LossGrad<A> class_loss_grad(A x, A q, const HeadShape& s) {
  constexpr bool kGeneral = kVariant & kGeneralClass;
  if constexpr ((kVariant & kCrossEntropy) != 0) return bce_with_logits_loss_grad(x, q);
  if (kGeneral ? s.varifocal : kVariant & kVarifocal) {
    const A gamma = kGeneral ? static_cast<A>(s.beta) : A(2);
    return varifocal_loss_grad(x, q, q, q > 0, static_cast<A>(s.alpha), gamma, false);
  }
  if (!kGeneral || s.beta == 2) return quality_square_loss_grad(x, q);
  return quality_loss_grad(x, q, static_cast<A>(s.beta));
}

// The part of the block's loss that this thread computes; it writes the gradient if that is what is
// asked for. With kGeneralClass whether it is, and of what kind targets are, is known at run time.
template <typename T, typename A, int kVariant>
struct ClassTile {
  static constexpr bool kGeneral = kVariant & kGeneralClass;
  static constexpr int V = Vector<T>::kSize;
  const HeadShape& s;
  const HeadLevel& level;
  const Tile& tile;
  const TileCells<A>& cells;
  const Format<T> format;

  GFL_MEMBER bool dense() const { return kGeneral ? s.dense : kVariant & kDense; }
  GFL_MEMBER bool has_grad() const { return kGeneral ? s.has_grad : kVariant & kGrad; }
  GFL_MEMBER bool planes() const { return kGeneral ? s.planes : kVariant & kPlanes; }

  GFL_MEMBER const T* logits(int place) const {
    return reinterpret_cast<const T*>(level.logits.data) +
           offset_of_cell(level.logits, level, tile.image, tile.first + place);
  }
  GFL_MEMBER T* grad(int place) const {
    return reinterpret_cast<T*>(level.grad.data) +
           offset_of_cell(level.grad, level, tile.image, tile.first + place);
  }
  GFL_MEMBER int64_t target(int place) const {
    return offset_of_cell(level.targets, level, tile.image, tile.first + place);
  }

  GFL_MEMBER LossGrad<A> element(const T* x, int64_t q_at, bool is_label, A quality) const {
    const A q = dense() ? load_value<A>(level.targets.data, s.target_dtype, q_at)
                        : (is_label ? quality : A(0));
    return class_loss_grad<kVariant>(static_cast<A>(format.widen(*x)), q, s);
  }

  // Element by element, for any strides.
  GFL_MEMBER A elements() const {
    const int bits = planes() ? 0 : s.element_lane_bits, lane = threadIdx.x % 32;
    const int parts = planes() ? 1 << s.part_bits : 1 << bits;
    const int part = (planes() ? threadIdx.x / 32 : threadIdx.x) & (parts - 1);
    const int together = kClassThreads / parts;
    int place = planes() ? (threadIdx.x / 32 / parts) * 32 + lane : threadIdx.x / parts;
    A total = 0;
#pragma unroll 1
    for (; place < tile.count; place += together) {
      const bool read = cells.read(place);
      const A scale = cells.scale(place);
      const T* x = logits(place) + part * level.logits.column;
      T* g = has_grad() ? grad(place) + part * level.grad.column : nullptr;
      int64_t q_at = dense() ? target(place) + part * level.targets.column : 0;
      const int label = dense() ? -1 : cells.labels[place];
      const A quality = dense() ? A(0) : cells.qualities[place];
#pragma unroll 1
      for (int c = part; c < s.classes; c += parts) {
        LossGrad<A> r{A(0), A(0)};
        if (read) r = element(x, q_at, c == label, quality);
        if (has_grad()) {
          format.narrow(r.grad * scale, g);
          g += parts * level.grad.column;
        } else {
          total += r.loss * scale;
        }
        x += parts * level.logits.column;
        q_at += parts * level.targets.column;
      }
    }
    return total;
  }

  // Loss and gradient of a vector. q: of dense targets.
  template <typename IsLabel>
  GFL_MEMBER void compute(const Vector<T>& raw, const float (&q)[V], bool any_label,
                          const IsLabel& is_label, const float (&quality)[V],
                          LossGrad<float> (&r)[V]) const {
    float x[V];
    format.widen(raw.of, x);
    if (dense()) {
#pragma unroll
      for (int i = 0; i < V; ++i) r[i] = class_loss_grad<kVariant>(x[i], q[i], s);
    } else if (!any_label) {
      // Background, whose formula takes two thirds of the instructions of the whole one.
#pragma unroll
      for (int i = 0; i < V; ++i) r[i] = quality_background_loss_grad(x[i]);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        r[i] = class_loss_grad<kVariant>(x[i], is_label(i) ? quality[i] : 0.0f, s);
      }
    }
  }

  GFL_MEMBER void narrow(const LossGrad<float> (&r)[V], Vector<T>* raw) const {
    float g[V];
#pragma unroll
    for (int i = 0; i < V; ++i) g[i] = r[i].grad;
    format.narrow(g, raw->of);
  }

  // Dense targets of a vector whose elements lie `step` apart.
  GFL_MEMBER void load_targets(int64_t at, int64_t step, float (&q)[V]) const {
    if (level.target_wide) {
      const int bytes = s.target_is_float ? 4 : sizeof(T);
      load_qualities(format, level.targets.data + at * bytes, s.target_is_float, q);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        q[i] = load_quality(format, level.targets.data, s.target_is_float, at + i * step);
      }
    }
  }

  // Vectors of neighbouring classes, 2^lane_bits threads to a cell.
  GFL_MEMBER float rows() const {
    const int lanes = 1 << s.lane_bits, lane = threadIdx.x & (lanes - 1);
    const int classes = settled(s.classes), together = kClassThreads >> s.lane_bits;
    float total = 0;
#pragma unroll 1
    for (int place = threadIdx.x >> s.lane_bits; place < tile.count; place += together) {
      const bool read = cells.read(place);
      const float scale = cells.scale(place);
      const T* const x = settled(logits(place));
      T* const g = has_grad() ? settled(grad(place)) : nullptr;
      const int64_t q_at = dense() ? target(place) : 0;
      const int label = dense() ? -1 : cells.labels[place];
      float quality[V];
#pragma unroll
      for (int i = 0; i < V; ++i) quality[i] = dense() ? 0 : cells.qualities[place];
      // [head, tail) are whole vectors; the ends of a misaligned row go one by one.
      int head = 0, tail = classes;
      if (!level.wide) {
        head = (16 - misalignment(x)) % 16 / sizeof(T);
        const bool alike = !has_grad() || misalignment(g) == misalignment(x);
        head = alike ? min(head, classes) : classes;
        tail = head + (classes - head) / V * V;
      }
      float row_loss = 0;
#pragma unroll 1
      for (int c = head + lane * V; c < tail; c += lanes * V) {
        Vector<T> raw{};
        if (read) {
          raw = load_vector(x + c);
          float q[V];
          if (dense()) {
            load_targets(q_at + c * level.targets.column, level.targets.column, q);
          }
          LossGrad<float> r[V];
          const unsigned hit = label - c;
          compute(raw, q, hit < V, [&](int i) { return i == hit; }, quality, r);
#pragma unroll
          for (int i = 0; i < V; ++i) {
            if (!has_grad()) row_loss += r[i].loss;
            r[i].grad *= scale;
          }
          if (has_grad()) narrow(r, &raw);
        }
        if (has_grad()) store_vector(g + c, raw);
      }
      const int ends = classes - (tail - head);
#pragma unroll 1
      for (int i = lane; i < ends; i += lanes) {
        const int c = i < head ? i : i - head + tail;
        LossGrad<float> r{0, 0};
        if (read) r = element(x + c, q_at + c * level.targets.column, c == label, quality[0]);
        if (has_grad()) {
          format.narrow(r.grad * scale, g + c);
        } else {
          row_loss += r.loss;
        }
      }
      total += row_loss * scale;
    }
    return total;
  }

  // Vectors of neighbouring cells, whose classes are dealt out to 2^part_bits warps.
  GFL_MEMBER float planes_of_cells() const {
    const int parts = 1 << s.part_bits, warp = threadIdx.x / 32, part = warp & (parts - 1);
    const int place = ((warp >> s.part_bits) * 32 + threadIdx.x % 32) * V;
    if (place >= tile.count) return 0;
    int label[V];
    float scale[V], quality[V];
    unsigned unread = 0;  // a bit for each cell of weight 0
#pragma unroll
    for (int i = 0; i < V; ++i) {
      scale[i] = cells.scale(place + i);
      const bool read = cells.read(place + i);
      unread |= read ? 0 : 1u << i;
      label[i] = dense() || !read ? -1 : cells.labels[place + i];
    }
    const bool any_read = unread + 1 != 1u << V;
    const T* x = settled(logits(place) + part * level.logits.column);
    T* g = has_grad() ? settled(grad(place) + part * level.grad.column) : nullptr;
    int64_t q_at = dense() ? target(place) + part * level.targets.column : 0;
    const int64_t x_step = parts * level.logits.column, g_step = parts * level.grad.column;
    float total = 0;
#pragma unroll 1
    for (int c = part; c < s.classes; c += parts) {
      Vector<T> raw{};
      LossGrad<float> r[V];
      float q[V] = {};
      if (any_read) {
        raw = load_vector(x);
        if (dense()) load_targets(q_at, level.targets.cell, q);
      }
      bool any_label = false;
      if (!dense()) {
#pragma unroll
        for (int i = 0; i < V; ++i) any_label |= label[i] == c;
        if (any_label) {
#pragma unroll
          for (int i = 0; i < V; ++i) quality[i] = cells.qualities[place + i];
        }
      }
      compute(raw, q, any_label, [&](int i) { return label[i] == c; }, quality, r);
      if (unread) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          // Whatever has come with the others.
          if (unread >> i & 1) r[i] = LossGrad<float>{0, 0};
        }
      }
#pragma unroll
      for (int i = 0; i < V; ++i) {
        if (!has_grad()) total += r[i].loss * scale[i];
        r[i].grad *= scale[i];
      }
      if (has_grad()) {
        narrow(r, &raw);
        store_vector(g, raw);
      }
      x += x_step;
      g += g_step;
      q_at += parts * level.targets.column;
    }
    return total;
  }
};

// A whole block. partials: the block's sum of losses; null with a gradient.
template <int kDtype, int kVariant>
GFL_DEVICE void class_tile(const void* quality, const void* normalisers, const void* up_total,
                           const void* up_levels, double* partials, const HeadShape& s) {
  using T = typename Element<kDtype>::type;
  using A = typename Element<kDtype>::acc;
  extern __shared__ uint4 shared[];
  __shared__ A factor;
  const Tile tile = tile_of_block(s);
  const HeadLevel& level = s.levels[tile.level];
  TileCells<A> cells;
  cells.weights = reinterpret_cast<A*>(shared);
  cells.qualities = cells.weights + s.tile_cells;
  cells.labels = reinterpret_cast<int*>(cells.qualities + s.tile_cells);
  using Work = ClassTile<T, A, kVariant>;
  const Work work{s, level, tile, cells, Format<T>(s.logits_dtype)};
  if (threadIdx.x == 0) {
    factor = work.has_grad()
                 ? static_cast<A>(class_factor<A>(s, normalisers) *
                                  upstream_of_level<A>(s, up_total, up_levels, 0, tile.level))
                 : A(1);
  }
  const A* const qualities =
      static_cast<const A*>(quality) + (tile.image * s.anchors + level.anchor + tile.first);
  for (int place = threadIdx.x; place < s.tile_cells; place += kClassThreads) {
    A w = 0;
    if (place < tile.count) {
      const int cell = tile.first + place;
      w = 1;
      if (level.label_weights.data) {
        w = load_value<A>(level.label_weights.data, s.label_weight_dtype,
                          offset_of_cell(level.label_weights, tile.image, cell));
      }
      if (!work.dense() && w != 0) {
        cells.labels[place] = class_of(level.labels.data, s.label_dtype,
                                       offset_of_cell(level.labels, tile.image, cell), s.classes);
        cells.qualities[place] = qualities[place];
      }
    }
    cells.weights[place] = w;
  }
  __syncthreads();
  cells.factor = factor;
  A total;
  if constexpr (Work::kGeneral) {
    total = work.elements();
  } else if constexpr ((kVariant & kPlanes) != 0) {
    total = level.wide ? work.planes_of_cells() : work.elements();
  } else {
    total = level.columns ? work.rows() : work.elements();
  }
  if (!work.has_grad()) leave_sum<kClassThreads>(total, partials);
}

}  // namespace gfl
