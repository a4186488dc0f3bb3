// Quality Focal Loss with beta = 2 on logits. Two layouts: rows, whose classes are neighbours, with
// `lanes` threads to a row; and planes (NCHW), where neighbouring rows are, with a warp to 32
// vectors of rows and the classes dealt out to the warps of a block. A thread computes the 16 bytes
// that it has loaded.
#define GFL_APPROXIMATE
#include "common.h"
#include "kernels.h"

namespace gfl {
namespace {

// A sparse target's elements of a thread, nearly all of which are background, whose formula takes
// two thirds of the instructions of the whole one. The others are computed again, one by one:
// hits() has a bit for each, and is asked where `any` says that there are some. quality(i) of a
// hit.
template <int n, typename Hits, typename Quality>
GFL_DEVICE void sparse_loss_grad(const float (&x)[n], bool any, const Hits& hits,
                                 const Quality& quality, LossGrad<float> (&result)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) result[i] = quality_background_loss_grad(x[i]);
  if (any) {
    for (unsigned left = hits(); left != 0; left &= left - 1) {
      const int hit = __ffs(left) - 1;
      float value = x[0];
#pragma unroll
      for (int i = 1; i < n; ++i) value = i == hit ? x[i] : value;  // no array in memory
      const LossGrad<float> r = quality_square_loss_grad(value, quality(hit));
#pragma unroll
      for (int i = 0; i < n; ++i) {
        if (i == hit) result[i] = r;
      }
    }
  }
}
template <int n>
GFL_DEVICE void dense_loss_grad(const float (&x)[n], const float (&q)[n],
                                LossGrad<float> (&result)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) result[i] = quality_square_loss_grad(x[i], q[i]);
}

// Qualities of a dense target, in pred's dtype or float32.
template <typename T, int n>
GFL_DEVICE void load_qualities(const void* target, bool is_float, int64_t at, float (&q)[n]) {
  if (sizeof(T) == 4 || !is_float) {
    const T* const from = static_cast<const T*>(target) + at;
    if (misalignment(from) == 0) {
      const Vector<T> v = load_vector(from);
#pragma unroll
      for (int i = 0; i < n; ++i) q[i] = widen(v.of[i]);
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i) q[i] = widen(from[i]);
    }
    return;
  }
  const float* const from = static_cast<const float*>(target) + at;
  if (misalignment(from) == 0) {
#pragma unroll
    for (int i = 0; i < n; i += 4) {
      const Vector<float> v = load_vector(from + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) q[i + j] = v.of[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) q[i] = from[i];
  }
}

template <typename T>
GFL_DEVICE float load_quality(const void* target, bool is_float, int64_t at) {
  return is_float ? static_cast<const float*>(target)[at]
                  : widen(static_cast<const T*>(target)[at]);
}

template <typename T, int kVariant>
GFL_DEVICE double quality_rows(const void* pred, const void* target, const void* score,
                               const void* weight, const void* upstream, float factor, float* loss,
                               void* grad, const QualityShape& s) {
  constexpr bool kHasLoss = kVariant & kLoss, kHasGrad = kVariant & kGrad,
                 kSparse = !(kVariant & kDense);
  constexpr int V = Vector<T>::kSize;
  const int lanes = s.lanes, lane = threadIdx.x & (lanes - 1), classes = s.classes;
  const int together = kQualityThreads / lanes;  // rows of a block
  double total = 0;
  for (int64_t first = int64_t{blockIdx.x} * together; first < s.rows.count;
       first += int64_t{gridDim.x} * together) {
    const int64_t row = first + threadIdx.x / lanes;
    float row_loss = 0;
    RowIndex at{};
    if (row < s.rows.count) {
      at = row_at(s.rows, row);
      const float w =
          weight ? load_value<float>(weight, s.weight.dtype, at.offset(s.weight)) : 1.0f;
      T* const g_row = kHasGrad ? static_cast<T*>(grad) + at.offset(s.grad) : nullptr;
      if (w != 0) {
        float row_factor = factor * w;
        if (kHasGrad && upstream) {
          row_factor *= static_cast<const float*>(upstream)[at.offset(s.upstream)];
        }
        const T* const x_row = static_cast<const T*>(pred) + at.offset(s.pred);
        const int64_t target_at = at.offset(s.target);
        int label = -1;
        float quality = 0;
        if (kSparse) {
          label = class_of(target, s.target.dtype, target_at, classes);
          quality = load_value<float>(score, s.score.dtype, at.offset(s.score));
        }
        // [head, tail) are whole vectors; the ends of a misaligned row go one by one.
        int head = (16 - misalignment(x_row)) % 16 / sizeof(T);
        if (kHasGrad && misalignment(g_row) != misalignment(x_row)) head = classes;
        head = min(head, classes);
        const int tail = head + (classes - head) / V * V;
#pragma unroll 1
        for (int c = head + lane * V; c < tail; c += lanes * V) {
          Vector<T> raw = load_vector(x_row + c);
          float x[V];
          LossGrad<float> r[V];
#pragma unroll
          for (int i = 0; i < V; ++i) x[i] = widen(raw.of[i]);
          if constexpr (kSparse) {
            const unsigned hit = label - c;
            sparse_loss_grad(
                x, hit < V, [&] { return 1u << hit; }, [&](int) { return quality; }, r);
          } else {
            float q[V];
            load_qualities<T>(target, s.target_is_float, target_at + c, q);
            dense_loss_grad(x, q, r);
          }
          if (kHasLoss) {
#pragma unroll
            for (int i = 0; i < V; ++i) row_loss += r[i].loss;
          }
          if (kHasGrad) {
#pragma unroll
            for (int i = 0; i < V; ++i) narrow(r[i].grad * row_factor, &raw.of[i]);
            store_vector(g_row + c, raw);
          }
        }
        if (tail - head < classes) {
          const int ends = classes - (tail - head);
#pragma unroll 1
          for (int i = lane; i < ends; i += lanes) {
            const int c = i < head ? i : i - head + tail;
            const float q = kSparse ? (c == label ? quality : 0.0f)
                                    : load_quality<T>(target, s.target_is_float, target_at + c);
            const LossGrad<float> r = quality_square_loss_grad(widen(x_row[c]), q);
            if (kHasLoss) row_loss += r.loss;
            if (kHasGrad) narrow(r.grad * row_factor, g_row + c);
          }
        }
        row_loss *= w;
      } else if (kHasGrad) {
        // Not read, and nothing from upstream counts.
        const T zero = T(0.0f);
        for (int c = lane; c < classes; c += lanes) g_row[c] = zero;
      }
    }
    if (kHasLoss && loss) {
      row_loss = sum_lanes(row_loss, lanes);
      if (lane == 0 && row < s.rows.count) loss[at.offset(s.loss)] = row_loss * factor;
    } else if (kHasLoss) {
      total += row_loss;
    }
  }
  return total;
}

template <typename T, int kVariant>
GFL_DEVICE double quality_planes(const void* pred, const void* target, const void* score,
                                 const void* weight, const void* upstream, float factor,
                                 float* loss, void* grad, const QualityShape& s) {
  constexpr bool kHasLoss = kVariant & kLoss, kHasGrad = kVariant & kGrad,
                 kSparse = !(kVariant & kDense);
  constexpr int V = Vector<T>::kSize, kWarps = kQualityThreads / 32, kTile = 32 * V;
  __shared__ float sums[kHasLoss ? kWarps * kTile : 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, classes = s.classes;
  const int64_t length = s.rows.size[kInner];
  // Without alignment a thread's rows lie apart, so that neighbours' do not.
  const int step = s.wide ? 1 : 32;
  double total = 0;
  for (int64_t tile = blockIdx.x; tile < s.tiles; tile += gridDim.x) {
    const int64_t run = s.rows.ndim == 1 ? 0 : divide(tile, s.tiles_per_run);
    const int64_t row = (tile - run * s.tiles_per_run) * kTile + lane * (s.wide ? V : 1);
    const RowIndex start = run_at(s.rows, run, row);
    const auto at = [&](int i) {
      return RowIndex{start.outer, start.middle, row + i * step, start.single};
    };
    const auto row_weight = [&](int i) {
      if (row + i * step >= length) return 0.0f;
      return weight ? load_value<float>(weight, s.weight.dtype, at(i).offset(s.weight)) : 1.0f;
    };
    float row_factor[V], row_loss[V];
    int label[V];
    unsigned unread = 0;  // bits of rows that are not there or have weight 0
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float w = row_weight(i);
      row_factor[i] = row_loss[i] = 0;
      label[i] = -1;
      if (w != 0) {
        row_factor[i] = factor * w;
        if (kHasGrad && upstream) {
          row_factor[i] *= static_cast<const float*>(upstream)[at(i).offset(s.upstream)];
        }
        if (kSparse) label[i] = class_of(target, s.target.dtype, at(i).offset(s.target), classes);
      } else {
        unread |= 1u << i;
      }
    }
    const bool any_read = unread + 1 != 1u << V;
    const bool full = s.wide && row + V <= length;
    const int64_t x_at = start.offset(s.pred), g_at = kHasGrad ? start.offset(s.grad) : 0,
                  t_at = kSparse ? 0 : start.offset(s.target);
#pragma unroll 1
    for (int c = warp; c < classes; c += kWarps) {
      const T* const x_row = static_cast<const T*>(pred) + (x_at + c * s.pred.column);
      float x[V], q[V] = {};
      Vector<T> raw{};
      if (full) {
        if (any_read) raw = load_vector(x_row);
      } else {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          if (!(unread >> i & 1)) raw.of[i] = x_row[i * step];
        }
      }
      if (!kSparse) {
        const int64_t q_at = t_at + c * s.target.column;
        if (full) {
          if (any_read) load_qualities<T>(target, s.target_is_float, q_at, q);
        } else {
#pragma unroll
          for (int i = 0; i < V; ++i) {
            if (!(unread >> i & 1))
              q[i] = load_quality<T>(target, s.target_is_float, q_at + i * step);
          }
        }
      }
      bool any = false;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        x[i] = widen(raw.of[i]);
        any |= label[i] == c;
      }
      if (unread) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          if (unread >> i & 1) x[i] = q[i] = 0;  // whatever has come with the others
        }
      }
      LossGrad<float> r[V];
      if constexpr (kSparse) {
        const auto hits = [&] {
          unsigned bits = 0;
#pragma unroll
          for (int i = 0; i < V; ++i) bits |= (label[i] == c ? 1u : 0u) << i;
          return bits;
        };
        const auto quality = [&](int i) {
          return load_value<float>(score, s.score.dtype, at(i).offset(s.score));
        };
        sparse_loss_grad(x, any, hits, quality, r);
      } else {
        dense_loss_grad(x, q, r);
      }
      if (kHasLoss) {
#pragma unroll
        for (int i = 0; i < V; ++i) row_loss[i] += r[i].loss;
      }
      if (kHasGrad) {
        T* const g_row = static_cast<T*>(grad) + (g_at + c * s.grad.column);
#pragma unroll
        for (int i = 0; i < V; ++i) narrow(r[i].grad * row_factor[i], &raw.of[i]);
        if (full) {
          store_vector(g_row, raw);
        } else {
#pragma unroll
          for (int i = 0; i < V; ++i) {
            if (row + i * step < length) g_row[i * step] = raw.of[i];
          }
        }
      }
    }
    if (kHasLoss && loss) {
      __syncthreads();  // the sums of the tile before have been read
#pragma unroll
      for (int i = 0; i < V; ++i) sums[warp * kTile + lane + i * 32] = row_loss[i] * row_weight(i);
      __syncthreads();
      if (warp == 0) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          float sum = 0;
          for (int j = 0; j < kWarps; ++j) sum += sums[j * kTile + lane + i * 32];
          if (row + i * step < length) loss[at(i).offset(s.loss)] = sum * factor;
        }
      }
    } else if (kHasLoss) {
#pragma unroll
      for (int i = 0; i < V; ++i) total += row_loss[i] * row_weight(i);
    }
  }
  return total;
}

// What the compiler cuts registers for: 64 of them, but where a thread keeps label, factor and loss
// of eight rows.
constexpr int resident_blocks(int dtype, int variant) {
  return dtype != GFL_FLOAT32 && variant == (kLoss | kGrad | kPlanes) ? 2 : 4;
}

template <int kDtype, int kVariant>
__global__ void __launch_bounds__(kQualityThreads, resident_blocks(kDtype, kVariant))
    quality_kernel(const void* pred, const void* target, const void* score, const void* weight,
                   const void* upstream, const void* avg_factor, void* loss, double* partials,
                   void* grad, const __grid_constant__ QualityShape s) {
  using T = typename Element<kDtype>::type;
  const float factor = scale_factor<float>(s.scale, avg_factor);
  float* const row_losses = static_cast<float*>(loss);
  double total;
  if constexpr (kVariant & kPlanes) {
    total = quality_planes<T, kVariant>(pred, target, score, weight, upstream, factor, row_losses,
                                        grad, s);
  } else {
    total = quality_rows<T, kVariant>(pred, target, score, weight, upstream, factor, row_losses,
                                      grad, s);
  }
  if (kVariant & kLoss && partials) leave_sum<kQualityThreads>(total, partials);
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
  return find_among<kDtype, 1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15>(variant);
}

}  // namespace

const void* quality_kernel_at(int dtype, int variant) {
  switch (dtype) {
    case GFL_FLOAT32:
      return find<GFL_FLOAT32>(variant);
    case GFL_BFLOAT16:
      return find<GFL_BFLOAT16>(variant);
    case GFL_FLOAT16:
      return find<GFL_FLOAT16>(variant);
    default:
      return nullptr;
  }
}

}  // namespace gfl
