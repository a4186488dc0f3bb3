// Quality Focal Loss with beta = 2, on logits or probabilities, and the rest of its family on
// logits. Two layouts: rows, whose classes are neighbours, with `lanes` threads to a row; and
// planes (NCHW), where neighbouring rows are, with a warp to 32 vectors of rows and the classes
// dealt out to the warps of a block. A thread computes the 16 bytes that it has loaded.
#define GFL_APPROXIMATE
#include "common.h"
#include "kernels.h"

namespace gfl {
namespace {

// The element of a vector whose number is known at run time only.
template <int n>
GFL_DEVICE float pick(const float (&of)[n], int i) {
  float found = of[0];
#pragma unroll
  for (int j = 1; j < n; ++j) found = j == i ? of[j] : found;
  return found;
}

// The formulas, on whatever an element is. kIsHalf: it was a half float.
template <int kVariant, bool kIsHalf>
struct Formula {
  static constexpr int kKind = kVariant & (kProbabilities | kFamily);
  const QualityShape& s;

  // As background, an element of this value has loss and gradient 0.
  static constexpr float kNothing = kKind == kProbabilities ? 0.0f : -INFINITY;

  GFL_MEMBER LossGrad<float> apply(float x, float q, bool positive) const {
    if constexpr (kKind == kProbabilities) return quality_probability_loss_grad(x, q, 2.0f);
    if constexpr (kKind == 0) return quality_square_loss_grad<kIsHalf>(x, q);
    const float alpha = static_cast<float>(s.alpha);
    switch (s.form) {
#define GFL_CASE(form, beta) \
  case form:                 \
    return form_loss_grad<form>(x, q, positive, s.flags, alpha, beta)
      GFL_CASE(GFL_VARIFOCAL, s.gamma);
      GFL_CASE(GFL_FOCAL, s.gamma);
      GFL_CASE(GFL_MATCHABILITY, s.gamma);
      GFL_CASE(GFL_IOU_AWARE, s.gamma);
      GFL_CASE(GFL_BALANCED, 2.0f);
#undef GFL_CASE
      default:
        return bce_with_logits_loss_grad(x, q);
    }
  }

  // Targets are 0, as nearly everywhere in a sparse one: a part of the instructions.
  template <int n>
  GFL_MEMBER void background(const float (&x)[n], LossGrad<float> (&result)[n]) const {
    if constexpr (kKind == kFamily) {
      if (s.gamma == 2) {  // asked once for all
#pragma unroll
        for (int i = 0; i < n; ++i) {
          result[i] = background_loss_grad<kIsHalf>(x[i], s.background_alpha, 2.0f, s.detach);
        }
      } else {
#pragma unroll
        for (int i = 0; i < n; ++i) {
          result[i] = background_loss_grad<kIsHalf>(x[i], s.background_alpha, s.gamma, s.detach);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        result[i] = kKind == kProbabilities
                        ? quality_probability_loss_grad<true, kIsHalf>(x[i], 0.0f, 2.0f)
                        : quality_background_loss_grad<kIsHalf>(x[i]);
      }
    }
  }

  // One element as the label's, all others as background. Of kFamily the code is for one element:
  // there is a formula for each form.
  template <int n>
  GFL_MEMBER void labelled(const float (&x)[n], int label, float quality,
                           LossGrad<float> (&result)[n]) const {
    if constexpr (kKind == kFamily) {
      background(x, result);
      put(apply(pick(x, label), quality, true), label, result);
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i) result[i] = apply(x[i], i == label ? quality : 0, i == label);
    }
  }

  // Of a dense target. Of kFamily most elements are taken to be 0, and the others come one by one.
  template <int n>
  GFL_MEMBER void apply(const float (&x)[n], const float (&q)[n],
                        LossGrad<float> (&result)[n]) const {
    if constexpr (kKind == kFamily) {
      background(x, result);
      unsigned marked = 0;
#pragma unroll
      for (int i = 0; i < n; ++i) marked |= q[i] != 0 ? 1u << i : 0;
#pragma unroll 1
      for (; marked; marked &= marked - 1) {
        const int i = __ffs(marked) - 1;
        const float target = pick(q, i);
        put(apply(pick(x, i), target, target > 0), i, result);
      }
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i) result[i] = apply(x[i], q[i], q[i] > 0);
    }
  }

 private:
  template <int n>
  GFL_MEMBER static void put(const LossGrad<float>& one, int i, LossGrad<float> (&result)[n]) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      result[j].loss = j == i ? one.loss : result[j].loss;
      result[j].grad = j == i ? one.grad : result[j].grad;
    }
  }
};

// The thread's part of the loss. In float: with so few of its rows, errors of threads cancel out.
template <typename T, int kVariant, typename Factor>
GFL_DEVICE float quality_rows(const void* pred, const void* target, const void* score,
                              const void* weight, const void* upstream, const Factor& factor,
                              float* loss, void* grad, const QualityShape& s) {
  constexpr bool kHasLoss = kVariant & kLoss, kHasGrad = kVariant & kGrad,
                 kSparse = !(kVariant & kDense);
  using Loss = Formula<kVariant, sizeof(T) == 2>;
  const Loss formula{s};
  const Format<T> format(s.pred.dtype);
  constexpr int V = Vector<T>::kSize;
  const int lanes = 1 << s.lane_bits, lane = threadIdx.x & (lanes - 1), classes = s.classes;
  const int together = settled(kQualityThreads >> s.lane_bits);  // rows of a block
  const int count = s.rows.count;
  float total = 0;
  int first = blockIdx.x * together;
  do {  // there is a row for each block
    const int row = first + (threadIdx.x >> s.lane_bits);
    const auto at = [&] { return row_at(s.rows, row); };
    int64_t x_at = wide_product(row, s.pred.row[kInner]),
            g_at = kHasGrad ? wide_product(row, s.grad.row[kInner]) : 0,
            target_at = wide_product(row, s.target.row[kInner]),
            score_at = kSparse ? wide_product(row, s.score.row[kInner]) : 0;
    if (s.rows.ndim > 1) {
      const RowIndex place = at();
      x_at = place.offset(s.pred);
      g_at = kHasGrad ? place.offset(s.grad) : 0;
      target_at = place.offset(s.target);
      score_at = kSparse ? place.offset(s.score) : 0;
    }
    float row_loss = 0;
    if (row < count) {
      const float w =
          given(s.weight) ? load_value<float>(weight, s.weight.dtype, at().offset(s.weight)) : 1.0f;
      T* const g_row = kHasGrad ? settled(static_cast<T*>(grad) + g_at) : nullptr;
      if (w != 0) {
        float row_factor = kHasGrad ? factor() * w : 0;
        if (kHasGrad && given(s.upstream)) {
          row_factor *= static_cast<const float*>(upstream)[at().offset(s.upstream)];
        }
        const T* const x_row = settled(static_cast<const T*>(pred) + x_at);
        const int q_bytes = s.target_is_float ? 4 : sizeof(T);
        const char* const q_row = settled(static_cast<const char*>(target) + target_at * q_bytes);
        int label = -1;
        float quality = 0;
        if (kSparse) {
          label = class_of(target, s.target.dtype, target_at, classes);
          quality = load_value<float>(score, s.score.dtype, score_at);
        }
        // [head, tail) are whole vectors; the ends of a misaligned row go one by one.
        int head = 0, tail = classes;
        if (!s.wide) {
          head = (16 - misalignment(x_row)) % 16 / sizeof(T);
          bool alike = true;
          if (kHasGrad) alike = misalignment(g_row) == misalignment(x_row);
          if (!kSparse) alike &= misalignment(q_row + head * q_bytes) == 0;
          head = alike ? min(head, classes) : classes;
          tail = head + (classes - head) / V * V;
        }
        const auto add_losses = [&](const LossGrad<float>(&r)[V]) {
#pragma unroll
          for (int i = 0; i < V; ++i) row_loss += r[i].loss;
        };
#pragma unroll 1
        for (int c = head + lane * V; c < tail; c += lanes * V) {
          Vector<T> raw = load_vector(x_row + c);
          float x[V];
          LossGrad<float> r[V];
          format.widen(raw.of, x);
          const unsigned place = label - c;
          if (kSparse && !kHasGrad) {
            if (place < V) {
              const float hit = pick(x, place);
#pragma unroll
              for (int i = 0; i < V; ++i) x[i] = i == place ? Loss::kNothing : x[i];
              row_loss += formula.apply(hit, quality, true).loss;
            }
            formula.background(x, r);
            if (kHasLoss) add_losses(r);
          } else if (kSparse && place >= V) {
            formula.background(x, r);
            if (kHasLoss) add_losses(r);
          } else {
            if constexpr (kSparse) {
              formula.labelled(x, place, quality, r);
            } else {
              float q[V];
              load_qualities(format, q_row + static_cast<int64_t>(c) * q_bytes, s.target_is_float,
                             q);
              formula.apply(x, q, r);
            }
            if (kHasLoss) add_losses(r);
          }
          if (kHasGrad) {
            float g[V];
#pragma unroll
            for (int i = 0; i < V; ++i) g[i] = r[i].grad * row_factor;
            format.narrow(g, raw.of);
            store_vector(g_row + c, raw);
          }
        }
        if (!s.wide) {
          const int ends = classes - (tail - head);
#pragma unroll 1
          for (int i = lane; i < ends; i += lanes) {
            const int c = i < head ? i : i - head + tail;
            const float q = kSparse
                                ? (c == label ? quality : 0.0f)
                                : load_quality(format, target, s.target_is_float, target_at + c);
            const bool positive = kSparse ? c == label : q > 0;
            const LossGrad<float> one = formula.apply(format.widen(x_row[c]), q, positive);
            if (kHasLoss) row_loss += one.loss;
            if (kHasGrad) format.narrow(one.grad * row_factor, g_row + c);
          }
        }
        row_loss *= w;
      } else if (kHasGrad) {
        // Not read, and nothing from upstream counts.
        const T zero{};
        for (int c = lane; c < classes; c += lanes) g_row[c] = zero;
      }
    }
    if (kHasLoss && given(s.loss)) {
      row_loss = sum_lanes(row_loss, lanes);
      if (lane == 0 && row < count) loss[at().offset(s.loss)] = row_loss * factor();
    } else if (kHasLoss) {
      total += row_loss;
    }
    first += gridDim.x * together;
  } while (first < count);
  return total;
}

// What a thread keeps of its rows in shared memory: registers are for logits.
template <int V>
struct PlaneRows {
  float* factor;  // of the gradient
  float* weight;
  float* hit;  // gradient of a row at its label
  int* label;

  template <typename A>
  GFL_MEMBER void load(const A* from, A (&to)[V]) const {
#pragma unroll
    for (int i = 0; i < V; i += 4) {
      const Vector<A> v = load_vector(from + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) to[i + j] = v.of[j];
    }
  }
  // The smallest label from `from` on that is `from` modulo 2^bits, or `none`, at most 2^28.
  GFL_MEMBER int next_label(int from, int bits, int none) const {
    int labels[V];
    load(label, labels);
    unsigned steps = none;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      // What is behind `from`, or another class modulo 2^bits, comes out larger than any class.
      const unsigned ahead = labels[i] - from;
      steps = min(steps, __funnelshift_r(ahead, ahead, bits));
    }
    return min(static_cast<unsigned>(none), from + (steps << bits));
  }
};

template <typename T, int kVariant, typename Factor>
GFL_DEVICE float quality_planes(const void* pred, const void* target, const void* score,
                                const void* weight, const void* upstream, const Factor& factor,
                                float* loss, void* grad, const QualityShape& s) {
  constexpr bool kHasLoss = kVariant & kLoss, kHasGrad = kVariant & kGrad,
                 kSparse = !(kVariant & kDense);
  using Loss = Formula<kVariant, sizeof(T) == 2>;
  const Loss formula{s};
  const Format<T> format(s.pred.dtype);
  constexpr int V = Vector<T>::kSize, kWarps = kQualityThreads / 32, kTile = 32 * V;
  extern __shared__ uint4 shared[];
  __shared__ float sums[kHasLoss ? kWarps * kTile : 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, classes = s.classes;
  // A group of `parts` warps has a tile, of which a warp computes every parts-th class.
  const int parts = 1 << s.part_bits, part = warp & (parts - 1), group = warp >> s.part_bits,
            groups = kWarps >> s.part_bits;
  float* const staged = reinterpret_cast<float*>(shared) + group * kTile * kPlaneRowFloats;
  int* const staged_labels = reinterpret_cast<int*>(staged) + 3 * kTile;
  const PlaneRows<V> mine{staged + lane * V, staged + kTile + lane * V,
                          staged + 2 * kTile + lane * V, staged_labels + lane * V};
  const int length = s.rows.size[kInner], tiles = s.tiles;
  // Without alignment a thread's rows lie apart, so that neighbours' do not.
  const int step = s.wide ? 1 : 32;
  float total = 0;
  for (int base = blockIdx.x * groups; base < tiles; base += gridDim.x * groups) {
    const int tile = base + group, tiles_per_run = s.tiles_per_run;
    const int run = s.rows.ndim == 1 ? 0 : divide(tile, tiles_per_run);
    const int first = tile < tiles ? (tile - run * tiles_per_run) * kTile : length;
    const RowIndex start = run_at(s.rows, run, first);
    const auto at = [&](int row) { return RowIndex{start.outer, start.middle, row}; };
    __syncthreads();  // what the tile before has left has been read
    int slot = s.wide ? part * 32 + lane : lane * V + part;
    const int slots_ahead = s.wide ? 32 * parts : parts;
    for (int i = part * 32 + lane; i < kTile; i += 32 * parts, slot += slots_ahead) {
      const int row = first + i;
      float w = 0, row_factor = 0;
      int label = -1;
      if (row < length) {
        const RowIndex here = at(row);
        w = given(s.weight) ? load_value<float>(weight, s.weight.dtype, here.offset(s.weight))
                            : 1.0f;
        if (w != 0) {
          if (kHasGrad) row_factor = factor() * w;
          if (kHasGrad && given(s.upstream)) {
            row_factor *= static_cast<const float*>(upstream)[here.offset(s.upstream)];
          }
          if (kSparse) label = class_of(target, s.target.dtype, here.offset(s.target), classes);
        }
      }
      if (kHasGrad) staged[slot] = row_factor;
      staged[kTile + slot] = w;
      staged_labels[slot] = label;
    }
    __syncthreads();
    const int row = first + lane * (s.wide ? V : 1);
    const bool full = s.wide && row + V <= length;
    float row_loss[V] = {}, row_weight[V];
    unsigned unread = 0;  // bits of rows that are not there or have weight 0
    if (!full || given(s.weight)) {
      mine.load(mine.weight, row_weight);
#pragma unroll
      for (int i = 0; i < V; ++i) unread |= row_weight[i] == 0 ? 1u << i : 0;
    }
    const bool any_read = unread + 1 != 1u << V;
    // One question for two in the loop: whether all is there, and what it is.
    const int plain_dtype = settled(full && unread == 0 ? s.pred.dtype : -1);
    const int q_bytes = s.target_is_float ? 4 : sizeof(T);
    const RowIndex own = at(row);
    const T* x_row = settled(static_cast<const T*>(pred) + own.offset(s.pred) +
                             wide_product(part, s.pred.column));
    T* g_row = !kHasGrad ? nullptr
                         : settled(static_cast<T*>(grad) + own.offset(s.grad) +
                                   wide_product(part, s.grad.column));
    const char* q_row =
        kSparse ? nullptr
                : settled(static_cast<const char*>(target) +
                          (own.offset(s.target) + wide_product(part, s.target.column)) * q_bytes);
    int next = kSparse ? mine.next_label(part, s.part_bits, classes) : classes;
#pragma unroll 1
    for (int c = part; c < classes; c += parts) {
      float x[V], q[V] = {};
      Vector<T> raw{};
      const auto load_plain = [&](const Format<T>& known) {
        raw = load_vector(x_row);
        known.widen(raw.of, x);
        if (!kSparse) load_qualities(known, q_row, s.target_is_float, q);
      };
      if (sizeof(T) == 2 && plain_dtype == GFL_BFLOAT16) {
        load_plain(Format<T>(GFL_BFLOAT16));
      } else if (plain_dtype >= 0) {
        load_plain(Format<T>(GFL_FLOAT16));
      } else {
        if (full) {
          if (any_read) raw = load_vector(x_row);
          if (!kSparse && any_read) load_qualities(format, q_row, s.target_is_float, q);
        } else {
#pragma unroll
          for (int i = 0; i < V; ++i) {
            if (!(unread >> i & 1)) {
              raw.of[i] = x_row[i * step];
              if (!kSparse) q[i] = load_quality(format, q_row, s.target_is_float, i * step);
            }
          }
        }
        format.widen(raw.of, x);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          if (unread >> i & 1) {  // whatever has come with the others
            x[i] = Loss::kNothing;
            q[i] = 0;
          }
        }
      }
      LossGrad<float> r[V];
      const bool hit = kSparse && c == next;
      if (hit) {
        int labels[V];
        mine.load(mine.label, labels);
        unsigned marked = 0;
#pragma unroll
        for (int i = 0; i < V; ++i) marked |= labels[i] == c ? 1u << i : 0;
#pragma unroll 1
        for (; marked; marked &= marked - 1) {
          const int i = __ffs(marked) - 1;
          const float quality =
              load_value<float>(score, s.score.dtype, at(row + i * step).offset(s.score));
          const LossGrad<float> one = formula.apply(pick(x, i), quality, true);
          if (kHasGrad) mine.hit[i] = one.grad;
#pragma unroll
          for (int j = 0; j < V; ++j) {
            if (kHasLoss) row_loss[j] += j == i ? one.loss : 0;
            x[j] = j == i ? Loss::kNothing : x[j];
          }
        }
        next = mine.next_label(c + parts, s.part_bits, classes);
      }
      if constexpr (kSparse) {
        formula.background(x, r);
      } else {
        formula.apply(x, q, r);
      }
      if (kHasLoss) {
#pragma unroll
        for (int i = 0; i < V; ++i) row_loss[i] += r[i].loss;
      }
      if (kHasGrad) {
        float row_factor[V], g[V];
        mine.load(mine.factor, row_factor);
#pragma unroll
        for (int i = 0; i < V; ++i) g[i] = r[i].grad * row_factor[i];
        if (hit) {
          int labels[V];
          mine.load(mine.label, labels);
#pragma unroll
          for (int i = 0; i < V; ++i) {
            if (labels[i] == c) g[i] = mine.hit[i] * row_factor[i];
          }
        }
        format.narrow(g, raw.of);
        if (full) {
          store_vector(g_row, raw);
        } else {
#pragma unroll
          for (int i = 0; i < V; ++i) {
            if (row + i * step < length) g_row[i * step] = raw.of[i];
          }
        }
        g_row += wide_product(parts, s.grad.column);
      }
      x_row += wide_product(parts, s.pred.column);
      if (!kSparse) q_row += wide_product(parts, s.target.column) * q_bytes;
    }
    if (kHasLoss && (!full || given(s.weight))) {
      mine.load(mine.weight, row_weight);
#pragma unroll
      for (int i = 0; i < V; ++i) row_loss[i] *= row_weight[i];
    }
    if (kHasLoss && given(s.loss)) {
#pragma unroll
      for (int i = 0; i < V; ++i) sums[warp * kTile + lane + i * 32] = row_loss[i];
      __syncthreads();
      if (part == 0) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          float sum = 0;
#pragma unroll 1
          for (int j = 0; j < parts; ++j) sum += sums[(warp + j) * kTile + lane + i * 32];
          if (row + i * step < length) loss[at(row + i * step).offset(s.loss)] = sum * factor();
        }
      }
    } else if (kHasLoss) {
#pragma unroll
      for (int i = 0; i < V; ++i) total += row_loss[i];
    }
  }
  return total;
}

// Blocks of an SM: four, whose threads have 64 registers. Planes of half logits with dense targets
// would keep a few of theirs in memory, of kFamily's loss everywhere, of the rest from sm_100 on.
constexpr int quality_blocks(int dtype, int variant) {
  const bool crowded = dtype == kHalf && (variant & (kDense | kPlanes)) == (kDense | kPlanes);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  return crowded ? 3 : 4;
#else
  return crowded && variant == (kFamily | kDense | kPlanes | kLoss) ? 3 : 4;
#endif
}

template <int kDtype, int kVariant>
__global__ void __launch_bounds__(kQualityThreads, quality_blocks(kDtype, kVariant))
    quality_kernel(const void* pred, const void* target, const void* score, const void* weight,
                   const void* upstream, const void* avg_factor, void* loss, double* partials,
                   void* grad, const __grid_constant__ QualityShape s) {
  using T = typename Element<kDtype>::type;
  float known = 0;
  if (kVariant & kGrad) known = scale_factor<float>(s.scale, avg_factor);
  // A sum is multiplied by finish_kernel.
  const auto factor = [&] {
    return kVariant & kGrad ? known : scale_factor<float>(s.scale, avg_factor);
  };
  float* const row_losses = static_cast<float*>(loss);
  float total;
  if constexpr (kVariant & kPlanes) {
    total = quality_planes<T, kVariant>(pred, target, score, weight, upstream, factor, row_losses,
                                        grad, s);
  } else {
    total = quality_rows<T, kVariant>(pred, target, score, weight, upstream, factor, row_losses,
                                      grad, s);
  }
  if (kVariant & kLoss && !given(s.loss)) leave_sum<kQualityThreads>(total, partials);
}

template <int kDtype, int... kVariants>
const void* find_among(int variant) {
  const void* found = nullptr;
  ((variant == kVariants ? found = reinterpret_cast<const void*>(quality_kernel<kDtype, kVariants>)
                         : nullptr),
   ...);
  return found;
}

template <int kDtype>
const void* find(int variant) {
  return find_among<kDtype, 1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15,  // logits
                    17, 18, 21, 22, 25, 26, 29, 30,                   // probabilities
                    33, 34, 37, 38, 41, 42, 45, 46>(variant);         // kFamily
}

}  // namespace

const void* quality_kernel_at(int dtype, int variant) {
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
