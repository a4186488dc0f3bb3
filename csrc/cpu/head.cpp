// The positives of a head: decoding, box loss, DFL and their gradients. One positive per lane, so
// that no reduction crosses lanes and math.h's formulas serve as they are.
//
// Compiled per instruction set: only internal linkage and no std templates, as in distribution.cpp.

// clang-format off: math.h is written in the primitives that simd.h declares
#include "kernels.h"
#include "rows.h"
#include "../math.h"
// clang-format on

namespace gfl {
namespace {

static_assert(int{GFL_CIOU} == int{kCiou} && int{GFL_CIOU_ALL} == int{kCiouAll});

template <typename S>
class Head {
  using A = Accumulator<S>;
  using V = Vector<A>;
  static constexpr int kN = kLanes<A>;

 public:
  Head(const HeadProblem& problem, int64_t image, void* memory) : p_(problem), image_(image) {
    Scratch scratch(memory);
    label_ = scratch.take<int64_t>(kHeadCells);
    positive_ = scratch.take<int64_t>(kHeadCells);
    run_ = scratch.take<A>(p_.classes + 4 * p_.bins);
    z_ = scratch.take<V>(4 * p_.bins);
  }

  HeadSums run(int64_t begin, int64_t count) {
    const int64_t positives = find_positives(begin, count);
    if (p_.grad.data) {
      write_zeros(begin, count);
    } else {
      clear(p_.quality, begin, count, 1);
      clear(p_.weight, begin, count, 1);
      if (p_.boxes.data) clear(p_.boxes, begin, count, 4);
    }
    sums_ = {static_cast<double>(positives), 0, 0, 0};
    for (int64_t i = 0; i < positives; i += kN) {
      group(positive_ + i, static_cast<int>(smaller(kN, positives - i)));
    }
    return sums_;
  }

 private:
  // Where an operand's value of a cell lies. Logits have two dimensions of cells.
  int64_t at(const Operand& o, int64_t cell) const { return image_ * o.row[0] + cell * o.row[1]; }
  int64_t in_plane(const Operand& o, int64_t cell) const {
    return image_ * o.row[0] + cell / p_.width * o.row[1] + cell % p_.width * o.row[2];
  }

  int64_t find_positives(int64_t begin, int64_t count) {
    if (p_.dense) {
      load_run(p_.labels, at(p_.labels, begin), p_.labels.row[1], count, label_);
    } else {
      load_labels(p_.labels, at(p_.labels, begin), p_.labels.row[1], count, p_.classes, label_);
    }
    int64_t n = 0;
    for (int64_t i = 0; i < count; ++i) {
      positive_[n] = begin + i;
      n += p_.dense ? label_[i] != 0 : label_[i] >= 0;
    }
    return n;
  }

  void clear(const Operand& o, int64_t begin, int64_t count, int64_t columns) const {
    memset(reinterpret_cast<A*>(o.data) + at(o, begin), 0, count * columns * sizeof(A));
  }

  // The gradient of whatever is not positive, without a look at its logits.
  void write_zeros(int64_t begin, int64_t count) const {
    const Operand& g = p_.grad;
    S* const grad = reinterpret_cast<S*>(g.data);
    const int64_t channels = 4 * p_.bins;
    for (int64_t cell = begin; cell < begin + count;) {
      // A run of cells that lie evenly.
      const int64_t n = smaller(begin + count - cell, p_.width - cell % p_.width);
      S* const first = grad + in_plane(g, cell);
      if (g.row[2] == 1) {
        for (int64_t k = 0; k < channels; ++k) memset(first + k * g.column, 0, n * sizeof(S));
      } else if (g.column == 1 && g.row[2] == channels) {
        memset(first, 0, n * channels * sizeof(S));
      } else {
        for (int64_t i = 0; i < n; ++i) {
          for (int64_t k = 0; k < channels; ++k) first[i * g.row[2] + k * g.column] = S{};
        }
      }
      cell += n;
    }
  }

  // A value per lane, of each of the lanes' cells; column of those with several.
  V gather(const Operand& o, const int64_t* cells, int lanes, int64_t column, bool images) const {
    V v{};
    for (int i = 0; i < kN; ++i) {
      const int64_t cell = cells[i < lanes ? i : lanes - 1];
      A value;
      load_run(o, (images ? at(o, cell) : cell * o.row[1]) + column * o.column, 1, 1, &value);
      v[i] = value;
    }
    return v;
  }

  // z_[k] lane i = bin k, side after side, of the lane's cell; spare lanes repeat the last one.
  void load_bins(const int64_t* cells, int lanes) {
    const int64_t channels = 4 * p_.bins;
    A* const bins = run_ + p_.classes;
    A* const to = reinterpret_cast<A*>(z_);
    for (int i = 0; i < kN; ++i) {
      if (i < lanes) load_run(p_.box, in_plane(p_.box, cells[i]), p_.box.column, channels, bins);
      for (int64_t k = 0; k < channels; ++k) to[k * kN + i] = bins[k];
    }
  }

  // The highest score of each lane's cell, or the sum of its targets.
  V weights(const int64_t* cells, int lanes) {
    V v{};
    for (int i = 0; i < lanes; ++i) {
      load_run(p_.scores, in_plane(p_.scores, cells[i]), p_.scores.column, p_.classes, run_);
      A highest = run_[0];
      double sum = 0;
      for (int64_t c = 0; c < p_.classes; ++c) {
        highest = run_[c] > highest || run_[c] != run_[c] ? run_[c] : highest;
        sum += run_[c];
      }
      v[i] = p_.dense ? static_cast<A>(sum) : highest;
    }
    return p_.dense ? v : sigmoid(v);
  }

  void group(const int64_t* cells, int lanes) {
    const A stride = static_cast<A>(p_.stride);
    const V point[] = {gather(p_.points, cells, lanes, 0, false) / stride,
                       gather(p_.points, cells, lanes, 1, false) / stride};
    V target[4], left[4], wl[4], wr[4];
    for (int s = 0; s < 4; ++s) {
      target[s] = gather(p_.box_targets, cells, lanes, s, true) / stride;
      const V side = side_distance(s, point[s % 2], target[s]);
      split_target(side, static_cast<A>(p_.limit), &left[s], &wl[s], &wr[s]);
    }
    load_bins(cells, lanes);

    const int64_t bins = p_.bins;
    V box[4], distance[4], inverse[4], dfl{};
    for (int s = 0; s < 4; ++s) {
      V* const z = z_ + s * bins;
      V high = z[0];
      for (int64_t k = 1; k < bins; ++k) high = maximum(z[k], high);
      V sum{}, moment{}, z_left{}, z_right{}, bin{};
      for (int64_t k = 0; k < bins; ++k) {
        const V shifted = z[k] - high;
        z_left = select(left[s] == bin, shifted, z_left);
        z_right = select(left[s] == bin - A(1), shifted, z_right);
        z[k] = exponential(shifted);
        sum = sum + z[k];
        moment = moment + z[k] * bin;
        bin = bin + A(1);
      }
      inverse[s] = reciprocal(sum);
      distance[s] = moment * inverse[s];
      box[s] = decode_side(s, point[s % 2], distance[s]);
      dfl = dfl + distribution_loss(logarithm(sum), wl[s], wr[s], z_left, z_right);
    }
    const BoxLossGrad<V> r = box_loss_grad(p_.iou, box, target, static_cast<A>(p_.iou_eps));

    if (!p_.grad.data) {
      const V w = weights(cells, lanes), quality = box_iou(box, target);
      for (int i = 0; i < lanes; ++i) {
        reinterpret_cast<A*>(p_.quality.data)[at(p_.quality, cells[i])] = quality[i];
        reinterpret_cast<A*>(p_.weight.data)[at(p_.weight, cells[i])] = w[i];
        if (!p_.boxes.data) continue;
        A* const to = reinterpret_cast<A*>(p_.boxes.data) + at(p_.boxes, cells[i]);
        for (int s = 0; s < 4; ++s) to[s] = box[s][i] * stride;
      }
      sums_.weight += sum_lanes(first_lanes(w, lanes));
      sums_.bbox += sum_lanes(first_lanes(r.loss * w, lanes));
      sums_.dfl += sum_lanes(first_lanes(dfl * w, lanes));
      return;
    }
    const V w = gather(p_.weight, cells, lanes, 0, true);
    const V bbox_scale = w * static_cast<A>(p_.bbox_scale),
            dfl_scale = w * static_cast<A>(p_.dfl_scale);
    for (int s = 0; s < 4; ++s) {
      V* const z = z_ + s * bins;
      const V by_distance = (s < 2 ? -r.grad[s] : r.grad[s]) * bbox_scale;
      const V left_part = wl[s] * dfl_scale, right_part = wr[s] * dfl_scale,
              total = (wl[s] + wr[s]) * dfl_scale;
      V bin{};
      for (int64_t k = 0; k < bins; ++k) {
        const V p = z[k] * inverse[s];
        z[k] = by_distance * expectation_grad(p, bin, distance[s]) +
               distribution_grad(total * p, left[s] == bin, left[s] == bin - A(1), left_part,
                                 right_part);
        bin = bin + A(1);
      }
    }
    store_grads(cells, lanes);
  }

  void store_grads(const int64_t* cells, int lanes) const {
    S* to[kN];
    for (int i = 0; i < lanes; ++i) {
      to[i] = reinterpret_cast<S*>(p_.grad.data) + in_plane(p_.grad, cells[i]);
    }
    for (int64_t k = 0; k < 4 * p_.bins; ++k) {
      S values[kN];
      store(values, z_[k]);
      for (int i = 0; i < lanes; ++i) to[i][k * p_.grad.column] = values[i];
    }
  }

  const HeadProblem& p_;
  const int64_t image_;
  int64_t *label_, *positive_;
  A* run_;  // [classes + 4 bins] of one positive
  V* z_;    // [4 bins] logits, then exponentials, then gradients
  HeadSums sums_;
};

}  // namespace

HeadSums GFL_CONCAT(head_, GFL_ISA)(const HeadProblem& problem, int64_t image, int64_t begin,
                                    int64_t count, void* scratch) {
  const FlushDenormals flush(true);
  switch (problem.box.dtype) {
    case GFL_FLOAT32:
      return Head<float>(problem, image, scratch).run(begin, count);
    case GFL_FLOAT64:
      return Head<double>(problem, image, scratch).run(begin, count);
    case GFL_BFLOAT16:
      return Head<bfloat16>(problem, image, scratch).run(begin, count);
    default:
      return Head<float16>(problem, image, scratch).run(begin, count);
  }
}

}  // namespace gfl
