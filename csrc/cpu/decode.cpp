// Decoding for inference: a row of four sides, an anchor, per lane, so that no reduction crosses
// lanes; nothing but the boxes leaves the vectors. Compiled per instruction set, as
// distribution.cpp.

// clang-format off: math.h is written in the primitives that simd.h declares
#include "kernels.h"
#include "flat.h"
#include "../math.h"
// clang-format on

namespace gfl {
namespace {

template <typename S>
class Decode {
  using A = Accumulator<S>;
  using V = Vector<A>;
  static constexpr int kN = kLanes<A>;
  static constexpr int kRows = 256;  // rows whose points and strides are looked at together
  // Sides that run abreast; as the groups of rows in distribution.cpp.
  static constexpr int kSides = kVectorBytes == 32 ? 2 : 4;
  using Vs = Wide<V, kSides>;

 public:
  Decode(const DecodeProblem& problem, void* memory) : p_(problem), inner_(problem.ndim - 1) {
    Scratch scratch(memory);
    z_ = scratch.take<Vs>(p_.bins);
    const Operand& o = p_.pred;
    flat_ = has_flat_bins(p_.bins) && p_.window < 0 && !p_.deviation.data && o.column == 1 &&
            o.row[inner_] == 4 * p_.bins;
    if (!flat_) return;
    e_ = scratch.take<A>(4 * kN * p_.bins + kN);
    y_ = repeat_values<A>(&scratch, p_.values, p_.bins, 1);
  }

  void run(int64_t begin, int64_t count) {
    for (int64_t r = begin; r < begin + count; r += kRows) {
      const int64_t n = smaller(kRows, begin + count - r);
      load_anchors(r, n);
      for (int64_t i = 0; i < n; i += kN) group(r + i, i, static_cast<int>(smaller(kN, n - i)));
    }
  }

 private:
  int64_t at(const Operand& o, int64_t row) const { return row * o.row[inner_]; }

  void load_column(const Operand& o, int column, int64_t r, int64_t n, A* to) const {
    load_run(o, at(o, r) + column * o.column, o.row[inner_], n, to);
  }
  void load_anchors(int64_t r, int64_t n) {
    for (int axis = 0; axis < 2; ++axis) {
      load_column(p_.points, axis, r, n, point_[axis]);
      // Height comes first.
      if (p_.limits.data) load_column(p_.limits, 1 - axis, r, n, limit_[axis]);
    }
    if (p_.strides.data) load_column(p_.strides, 0, r, n, stride_);
  }

  void group(int64_t r, int64_t i, int lanes) {
    const V stride = p_.strides.data ? load(stride_ + i) : V{} + static_cast<A>(p_.stride);
    V distance[4], spread[4]{}, box[4];
    if (!flat_distances(r, lanes, distance)) {
      for (int s = 0; s < 4; s += kSides) {
        load_sides(r, s, lanes);
        p_.window < 0 ? distances<false>(distance + s, spread + s)
                      : distances<true>(distance + s, spread + s);
      }
    }
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
      const int axis = s % 2;
      const V limit = p_.limits.data ? load(limit_[axis] + i)
                                     : V{} + static_cast<A>(axis ? p_.height : p_.width);
      const V x = decode_side(s, load(point_[axis] + i), distance[s] * stride);
      box[s] = p_.clips ? clip_coordinate(x, limit) : x;
      spread[s] = spread[s] * stride;
    }
    write_sides(p_.boxes, r, box, lanes);
    if (p_.deviation.data) write_sides(p_.deviation, r, spread, lanes);
  }

  // Of kN rows without gaps and of small logits.
  bool flat_distances(int64_t r, int lanes, V* distance) {
    if (!flat_ || lanes < kN) return false;
    const S* const z = reinterpret_cast<const S*>(p_.pred.data) + at(p_.pred, r);
    flat_ = exponentials(z, z, 4 * kN * p_.bins, &shift_, e_);  // wide spreads have company
    if (!flat_) return false;
    A by_row[4 * kN];
    with_bins(p_.bins, [&](auto bins) {
      for (int g = 0; g < 4 * kN; g += kN) {
        const Sums<V> sums = moments_of_flat(bins, e_ + g * bins, y_);
        store(by_row + g, sums.moment * reciprocal(sums.sum));
      }
    });
    rows_to_lanes<A>(
        4, 1, [&](int i) __attribute__((always_inline)) { return by_row + 4 * i; },
        [&](int64_t s, V column) __attribute__((always_inline)) { distance[s] = column; });
    return true;
  }

  // z_[k][u] lane i = bin k of side s + u of row r + i; spare lanes repeat the last one.
  void load_sides(int64_t r, int s, int lanes) {
    const Operand& o = p_.pred;
    const int64_t step = o.row[inner_];
#pragma GCC unroll 1  // as in distribution.cpp
    for (int u = 0; u < kSides; ++u) {
      const S* const first =
          reinterpret_cast<const S*>(o.data) + at(o, r) + (s + u) * p_.bins * o.column;
      if (step == 1 && lanes == kN) {
        for (int64_t k = 0; k < p_.bins; ++k) z_[k][u] = load(first + k * o.column);
        continue;
      }
      const auto put = [&](int64_t k, V column)
                           __attribute__((always_inline)) { z_[k][u] = column; };
      if (lanes == kN) {
        const auto row = [&](int i) __attribute__((always_inline)) { return first + i * step; };
        rows_to_lanes<S>(p_.bins, o.column, row, put);
      } else {
        const auto row = [&](int i) __attribute__((always_inline)) {
          return first + (i < lanes ? i : lanes - 1) * step;
        };
        rows_to_lanes<S>(p_.bins, o.column, row, put);
      }
    }
  }

  template <bool kPeak>
  void distances(V* distance, V* spread) {
    Vs deviation;
    const Vs d = p_.deviation.data ? distances<kPeak, true>(&deviation)
                                   : distances<kPeak, false>(&deviation);
#pragma GCC unroll 4
    for (int u = 0; u < kSides; ++u) {
      distance[u] = d[u];
      spread[u] = deviation[u];
    }
  }
  // The expectation of each side and, if kSpread, its standard deviation.
  template <bool kPeak, bool kSpread>
  Vs distances(Vs* spread) {
    const A* const values = reinterpret_cast<const A*>(p_.values.data);
    const int64_t bins = p_.bins;
    Vs high = z_[0];
    for (int64_t k = 1; k < bins; ++k) high = maximum(z_[k], high);
    Vs peak{};
    if (kPeak) {
      for (int64_t k = bins - 1; k >= 0; --k) {
        peak = select(z_[k] == high, broadcast<Vs>(static_cast<A>(k)), peak);
      }
    }
    const A window = static_cast<A>(p_.window);
    Vs sum{}, moment{}, whole_sum{}, whole_moment{}, bin{};
    for (int64_t k = 0; k < bins; ++k) {
      Vs e = exponential(z_[k] - high);
      if (kSpread) z_[k] = e;
      if (kPeak) {
        if (kSpread) {
          whole_sum = whole_sum + e;
          whole_moment = whole_moment + e * values[k];
        }
        e = e * peak_window(bin, peak, window);
        bin = bin + A(1);
      }
      sum = sum + e;
      moment = moment + e * values[k];
    }
    const Vs inverse = reciprocal(sum), distance = moment * inverse;
    *spread = Vs{};
    if (kSpread) {
      const Vs of_all = kPeak ? reciprocal(whole_sum) : inverse;
      const Vs mean = kPeak ? whole_moment * of_all : distance;
      for (int64_t k = 0; k < bins; ++k) {
        const Vs away = values[k] - mean;
        *spread = *spread + z_[k] * (away * away);
      }
      *spread = square_root(*spread * of_all);
    }
    return distance;
  }

  void write_sides(const Operand& o, int64_t r, const V* sides, int lanes) const {
    A* const to = reinterpret_cast<A*>(o.data) + at(o, r);
    for (int i = 0; i < lanes; ++i) {
      for (int s = 0; s < 4; ++s) to[i * o.row[inner_] + s * o.column] = sides[s][i];
    }
  }

  const DecodeProblem& p_;
  const int inner_;
  Vs* z_;  // [bins] logits, then exponentials
  bool flat_;
  A shift_ = 0;  // of the exponentials
  A *e_, *y_;    // exponentials of kN rows and the bins' values, with a vector's room behind
  A point_[2][kRows], limit_[2][kRows], stride_[kRows];
};

// The highest sigmoid of each row and its class: one row per lane.
template <typename S>
void score(const DecodeProblem& p, int64_t begin, int64_t count) {
  using A = Accumulator<S>;
  using V = Vector<A>;
  constexpr int kN = kLanes<A>;
  const Operand& o = p.cls;
  const int inner = p.ndim - 1;
  const int64_t step = o.row[inner];
  for (int64_t r = begin; r < begin + count; r += kN) {
    const int lanes = static_cast<int>(smaller(kN, begin + count - r));
    const S* const first = reinterpret_cast<const S*>(o.data) + r * step;
    V high = V{} - static_cast<A>(__builtin_inf()), best{}, number{};
    const auto next = [&](int64_t, V x) __attribute__((always_inline)) {
      const auto mask = surpasses(x, high);
      high = select(mask, x, high);
      best = select(mask, number, best);
      number = number + A(1);
    };
    if (step == 1 && lanes == kN) {
      for (int64_t c = 0; c < p.classes; ++c) next(c, load(first + c * o.column));
    } else {
      const auto row = [&](int i) __attribute__((always_inline)) {
        return first + (i < lanes ? i : lanes - 1) * step;
      };
      rows_to_lanes<S>(p.classes, o.column, row, next);
    }
    const V scores = sigmoid(high);
    for (int i = 0; i < lanes; ++i) {
      reinterpret_cast<A*>(p.score.data)[(r + i) * p.score.row[inner]] = scores[i];
      reinterpret_cast<int64_t*>(p.label.data)[(r + i) * p.label.row[inner]] =
          static_cast<int64_t>(best[i]);
    }
  }
}

}  // namespace

double GFL_CONCAT(decode_, GFL_ISA)(const DecodeProblem& problem, int64_t begin, int64_t count,
                                    void* scratch) {
  const FlushDenormals flush(true);
  switch (problem.pred.dtype) {
    case GFL_FLOAT32:
      Decode<float>(problem, scratch).run(begin, count);
      break;
    case GFL_FLOAT64:
      Decode<double>(problem, scratch).run(begin, count);
      break;
    case GFL_BFLOAT16:
      Decode<bfloat16>(problem, scratch).run(begin, count);
      break;
    default:
      Decode<float16>(problem, scratch).run(begin, count);
  }
  if (!problem.cls.data) return 0;
  switch (problem.cls.dtype) {
    case GFL_FLOAT32:
      score<float>(problem, begin, count);
      break;
    case GFL_FLOAT64:
      score<double>(problem, begin, count);
      break;
    case GFL_BFLOAT16:
      score<bfloat16>(problem, begin, count);
      break;
    default:
      score<float16>(problem, begin, count);
  }
  return 0;
}

}  // namespace gfl
