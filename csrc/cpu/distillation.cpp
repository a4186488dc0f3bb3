// Distillation of distributions: a row per lane, its bins in student and teacher abreast. Compiled
// per instruction set, as distribution.cpp.

// clang-format off: math.h is written in the primitives that simd.h declares
#include "kernels.h"
#include "rows.h"
#include "../math.h"
// clang-format on

namespace gfl {
namespace {

template <typename S>
class Distillation {
  using A = Accumulator<S>;
  using V = Vector<A>;
  using Pair = Wide<V, 2>;  // of student and teacher
  static constexpr int kN = kLanes<A>;
  static constexpr int kRows = 256;  // rows whose weights are looked at together

 public:
  Distillation(const DistillationProblem& problem, void* memory)
      : p_(problem), inner_(problem.ndim - 1) {
    Scratch scratch(memory);
    z_ = scratch.take<Pair>(p_.bins);
  }

  double run(int64_t begin, int64_t count) {
    V total{};
    for (int64_t r = begin; r < begin + count; r += kRows) {
      const int64_t n = smaller(kRows, begin + count - r);
      load_weights(r, n);
      for (int64_t i = 0; i < n; i += kN) {
        total = total + group(r + i, i, static_cast<int>(smaller(kN, n - i)));
      }
    }
    return sum_lanes(total);
  }

 private:
  int64_t at(const Operand& o, int64_t row) const { return row * o.row[inner_]; }

  void load_weights(int64_t r, int64_t n) {
    for (int64_t i = 0; i < n; ++i) weight_[i] = upstream_[i] = 1;
    if (p_.weight.data) load_run(p_.weight, at(p_.weight, r), p_.weight.row[inner_], n, weight_);
    if (p_.grad_loss.data) {
      load_run(p_.grad_loss, at(p_.grad_loss, r), p_.grad_loss.row[inner_], n, upstream_);
    }
  }

  // The weighted losses of rows r, r + 1, ...
  V group(int64_t r, int64_t i, int lanes) {
    const V zeros{}, w = first_lanes(load(weight_ + i), lanes);
    const auto unread = w == A(0);
    load_logits(p_.pred, 0, r, lanes);
    load_logits(p_.teacher, 1, r, lanes);
    const int64_t bins = p_.bins;
    Pair high = z_[0];
    for (int64_t k = 1; k < bins; ++k) high = maximum(z_[k], high);
    const A inverse_temperature = static_cast<A>(1 / p_.temperature);
    Pair sum{};
    V gap{};
    for (int64_t k = 0; k < bins; ++k) {
      const Pair a = (z_[k] - high) * inverse_temperature;
      z_[k] = exponential(a);
      sum = sum + z_[k];
      gap = gap + distillation_term(z_[k][1], a[1] - a[0]);
    }
    const Pair inverse = reciprocal(sum), log_sum = logarithm(sum);
    const A scale = static_cast<A>(p_.scale);
    V loss = distillation_loss(gap * inverse[1], log_sum[0], log_sum[1]);
    loss = select(unread, zeros, loss * w);
    if (p_.loss.data) {
      A* const to = reinterpret_cast<A*>(p_.loss.data) + at(p_.loss, r);
      for (int l = 0; l < lanes; ++l) to[l * p_.loss.row[inner_]] = loss[l] * scale;
    }
    if (p_.grad.data) {
      const V factor = w * load(upstream_ + i) * (scale * inverse_temperature);
      for (int64_t k = 0; k < bins; ++k) {
        const Pair p = z_[k] * inverse;
        z_[k][0] = select(unread, zeros, distillation_grad(p[0], p[1]) * factor);
      }
      S* const first = reinterpret_cast<S*>(p_.grad.data) + at(p_.grad, r);
      const int64_t step = p_.grad.row[inner_], column = p_.grad.column;
      if (step == 1 && lanes == kN) {
        for (int64_t k = 0; k < bins; ++k) store(first + k * column, z_[k][0]);
      } else {
        lanes_to_rows<S>(
            bins, column, lanes,
            [&](int l) __attribute__((always_inline)) { return first + l * step; },
            [&](int64_t k) __attribute__((always_inline)) { return z_[k][0]; });
      }
    }
    return loss;
  }

  // z_[k][part] lane i = bin k of row r + i; spare lanes repeat the last one.
  void load_logits(const Operand& o, int part, int64_t r, int lanes) {
    const S* const first = reinterpret_cast<const S*>(o.data) + at(o, r);
    const int64_t step = o.row[inner_];
    if (step == 1 && lanes == kN) {
      for (int64_t k = 0; k < p_.bins; ++k) z_[k][part] = load(first + k * o.column);
      return;
    }
    rows_to_lanes<S>(
        p_.bins, o.column,
        [&](int l)
            __attribute__((always_inline)) { return first + (l < lanes ? l : lanes - 1) * step; },
        [&](int64_t k, V column) __attribute__((always_inline)) { z_[k][part] = column; });
  }

  const DistillationProblem& p_;
  const int inner_;
  Pair* z_;  // [bins] logits, then exponentials, then gradients in the student's place
  A weight_[kRows], upstream_[kRows];
};

}  // namespace

double GFL_CONCAT(distillation_, GFL_ISA)(const DistillationProblem& problem, int64_t begin,
                                          int64_t count, void* scratch) {
  const FlushDenormals flush(true);
  switch (problem.pred.dtype) {
    case GFL_FLOAT32:
      return Distillation<float>(problem, scratch).run(begin, count);
    case GFL_FLOAT64:
      return Distillation<double>(problem, scratch).run(begin, count);
    case GFL_BFLOAT16:
      return Distillation<bfloat16>(problem, scratch).run(begin, count);
    default:
      return Distillation<float16>(problem, scratch).run(begin, count);
  }
}

}  // namespace gfl
