// The CPU kernels, compiled once per instruction set (GFL_ISA names it). Two kernel bodies, one per
// family:
//
// quality_tile runs along elements that are contiguous in memory, whatever they are: rows of
// classes, or one class plane of an NCHW tensor. What is not contiguous, or not of the accumulation
// type, is staged through L1 first.
//
// Distribution runs over the bins of as many rows as a vector has lanes, one row per lane, so that
// no reduction crosses lanes; rows whose bins are contiguous are transposed on the way in and out.
//
// Only internal linkage and no std templates in here: the linker may keep one copy of a shared
// inline function for all instruction sets.

// clang-format off: math.h is written in the primitives that simd.h declares
#include "kernels.h"
#include "rows.h"
#include "../math.h"
// clang-format on

#define GFL_STRING_(a) #a
#define GFL_STRING(a) GFL_STRING_(a)

namespace gfl {
namespace {

// Quality family

constexpr int kQualityWays = 4;  // vectors that run abreast

struct Background {  // beta = 2, q = 0
  static constexpr bool kTarget = false;
  template <typename V>
  GFL_INLINE LossGrad<V> apply(const Background&, V x, V) {
    return quality_background_loss_grad(x);
  }
};
struct Square {  // beta = 2
  static constexpr bool kTarget = true;
  template <typename V>
  GFL_INLINE LossGrad<V> apply(const Square&, V x, V q) {
    return quality_square_loss_grad(x, q);
  }
};
// q of an element of a row with a label that is not the label's.
template <typename S>
constexpr S kNoLabel = -static_cast<S>(__builtin_inf());

// Any form: positive is what has a q above `above`.
template <int kForm>
struct Form {
  static constexpr bool kTarget = true;
  int flags;
  double alpha, beta, above;
  template <typename V>
  GFL_INLINE LossGrad<V> apply(const Form& f, V x, V q) {
    using A = scalar_t<V>;
    const auto positive = q > static_cast<A>(f.above);
    if constexpr (has_positives(kForm)) {
      q = select(q == kNoLabel<A>, broadcast<V>(A(0)), q);
    }
    return form_loss_grad<kForm>(x, q, positive, f.flags, static_cast<A>(f.alpha),
                                 static_cast<A>(f.beta));
  }
};
// Elements of target 0 of all forms on logits.
struct Others {
  static constexpr bool kTarget = false;
  double alpha, beta;
  bool detach;
  template <typename V>
  GFL_INLINE LossGrad<V> apply(const Others& f, V x, V) {
    using A = scalar_t<V>;
    return background_loss_grad(x, static_cast<A>(f.alpha), static_cast<A>(f.beta), f.detach);
  }
};

// n contiguous elements: x logits, q targets, w weights (both optional by template), factor for
// every gradient. Writes the weighted loss of every element if losses is there; returns their sum.
template <bool kWeight, bool kGrad, typename Formula, typename S, typename A>
double quality_tile(const Formula& formula, const S* x, const A* q, const A* w, S* grad, A* losses,
                    int64_t n, A factor) {
  using V = Vector<A>;
  constexpr int lanes = kLanes<A>;
  const auto evaluate = [&](const auto& xv, const auto& qv, const auto& wv)
                            __attribute__((always_inline)) {
                              auto r = Formula::apply(formula, xv, qv);
                              if constexpr (kWeight) {
                                const auto unread = wv == A(0);  // 0 even where the loss is NaN
                                r.loss = select(unread, wv, r.loss * wv);
                                r.grad = select(unread, wv, r.grad * wv);
                              }
                              r.grad = r.grad * factor;
                              return r;
                            };
  constexpr int ways = kQualityWays;
  Wide<V, ways> sums{};
  int64_t i = 0;
  for (; i + ways * lanes <= n; i += ways * lanes) {
    Wide<V, ways> xv, qv{}, wv{};
    for (int u = 0; u < ways; ++u) {
      xv[u] = load(x + i + u * lanes);
      if constexpr (Formula::kTarget) qv[u] = load(q + i + u * lanes);
      if constexpr (kWeight) wv[u] = load(w + i + u * lanes);
    }
    const LossGrad<Wide<V, ways>> r = evaluate(xv, qv, wv);
    for (int u = 0; u < ways; ++u) {
      if constexpr (kGrad) store(grad + i + u * lanes, r.grad[u]);
      if (losses) store(losses + i + u * lanes, r.loss[u]);
    }
    sums = sums + r.loss;
  }
  V sum{};
  for (int u = 0; u < ways; ++u) sum = sum + sums[u];
  for (; i < n; i += lanes) {
    const int rest = static_cast<int>(smaller(lanes, n - i));
    V qv{}, wv{};
    if constexpr (Formula::kTarget) qv = load_first(q + i, rest);
    if constexpr (kWeight) wv = load_first(w + i, rest);
    LossGrad<V> r = evaluate(load_first(x + i, rest), qv, wv);
    // The lanes beyond n hold a logit of 0, whose loss must not count.
    r.loss = first_lanes(r.loss, rest);
    if constexpr (kGrad) store_first(grad + i, r.grad, rest);
    if (losses) store_first(losses + i, r.loss, rest);
    sum = sum + r.loss;
  }
  return sum_lanes(sum);
}

template <typename S>
class Quality {
  using A = Accumulator<S>;

 public:
  Quality(const QualityProblem& problem, void* memory) : p_(problem), inner_(problem.ndim - 1) {
    Scratch scratch(memory);
    const int64_t n = tile_elements(p_.classes);
    x_ = scratch.take<S>(n);
    grad_ = scratch.take<S>(n);
    q_ = scratch.take<A>(n);
    w_ = scratch.take<A>(n);
    losses_ = scratch.take<A>(n);
    row_weight_ = scratch.take<A>(n);
    row_score_ = scratch.take<A>(n);
    row_loss_ = scratch.take<A>(n);
    label_ = scratch.take<int64_t>(n);
    positive_ = scratch.take<int64_t>(n);
    hits_ = scratch.take<int64_t>(n);
    square_ = p_.beta == 2 && p_.form == GFL_LOGITS;
    const bool by_label = p_.score.data && has_positives(p_.form);
    no_label_ = by_label ? kNoLabel<A> : 0;
    above_ = by_label ? kNoLabel<double> : 0;
    // QFL with other exponents has a formula that is more careful than Others.
    has_background_ = square_ || !(on_probabilities(p_.form) || p_.form == GFL_LOGITS);
    others_ = {1, p_.beta, p_.form == GFL_MATCHABILITY || p_.flags & GFL_DETACH_WEIGHT};
    if (p_.form == GFL_VARIFOCAL || p_.form == GFL_MATCHABILITY) others_.alpha = p_.alpha;
    if (p_.form == GFL_BALANCED || (p_.form == GFL_FOCAL && p_.alpha >= 0)) {
      others_.alpha = 1 - p_.alpha;
    }
  }

  double run(int64_t begin, int64_t count) {
    const int64_t classes = p_.classes;
    const bool planes = in_planes(p_);
    const int64_t step = planes ? kPlaneRows : rows_of_tile();
    double total = 0;
    for (int64_t r = begin; r < begin + count; r += step) {
      const int64_t rows = smaller(step, begin + count - r);
      load_row_weights(r, rows);
      if (uniform_ && row_weight_[0] == 0) {
        write_zeros(r, rows);
      } else if (planes) {
        total += tile_of_planes(r, rows);
      } else if (some_zero_ && classes >= 32) {
        total += row_by_row(r, rows);
      } else {
        total += tile_of_rows(r, rows, row_weight_);
      }
    }
    return total;
  }

 private:
  int64_t at(const Operand& o, int64_t row) const { return row * o.row[inner_]; }

  // As many rows as a tile holds, if possible a number that leaves no remainder of quality_tile's
  // vectors.
  int64_t rows_of_tile() const {
    constexpr int64_t elements = kQualityWays * kLanes<A>;
    const int64_t rows = p_.classes < kTile ? kTile / p_.classes : 1;
    int64_t whole = elements;
    while (whole > 1 && whole / 2 * p_.classes % elements == 0) whole /= 2;
    return rows < whole ? rows : rows - rows % whole;
  }

  // row_weight_: the weight times the upstream gradient of each row. uniform_: they are all the
  // same.
  void load_row_weights(int64_t r, int64_t rows) {
    const bool weighted = p_.weight.data && !p_.weight_per_class;
    const int64_t n = weighted || p_.grad_loss.data ? rows : 1;
    if (weighted) {
      load_run(p_.weight, at(p_.weight, r), p_.weight.row[inner_], n, row_weight_);
    } else {
      for (int64_t i = 0; i < n; ++i) row_weight_[i] = 1;
    }
    if (p_.grad_loss.data) {
      load_run(p_.grad_loss, at(p_.grad_loss, r), p_.grad_loss.row[inner_], n, losses_);
      // A row of weight 0 stays out whatever comes from upstream.
      for (int64_t i = 0; i < n; ++i)
        row_weight_[i] = row_weight_[i] == 0 ? 0 : row_weight_[i] * losses_[i];
    }
    bool differ = false, zero = false;
    for (int64_t i = 0; i < n; ++i) {
      differ |= !(row_weight_[i] == row_weight_[0]);
      zero |= row_weight_[i] == 0;
    }
    uniform_ = !differ;
    some_zero_ = zero;
  }

  void write_zeros(int64_t r, int64_t rows) {
    S* const grad = reinterpret_cast<S*>(p_.grad.data);
    for (int64_t i = r; grad && i < r + rows; ++i) {
      for (int64_t c = 0; c < p_.classes; ++c) grad[at(p_.grad, i) + c * p_.grad.column] = S{};
    }
    A* const loss = reinterpret_cast<A*>(p_.loss.data);
    for (int64_t i = r; loss && i < r + rows; ++i) loss[at(p_.loss, i)] = 0;
  }

  // Rows of weight 0 are not read.
  double row_by_row(int64_t r, int64_t rows) {
    double total = 0;
    uniform_ = true;
    for (int64_t i = 0; i < rows; ++i) {
      if (row_weight_[i] == 0) {
        write_zeros(r + i, 1);
      } else {
        total += tile_of_rows(r + i, 1, row_weight_ + i);
      }
    }
    return total;
  }

  // Whole rows, class after class.
  double tile_of_rows(int64_t r, int64_t rows, const A* row_weight) {
    const int64_t classes = p_.classes, n = rows * classes;
    const auto packed = [&](const Operand& o) {
      return (o.column == 1 || classes == 1) && (rows == 1 || o.row[inner_] == classes);
    };
    const S* x = reinterpret_cast<const S*>(p_.pred.data) + at(p_.pred, r);
    if (!packed(p_.pred)) {
      for (int64_t i = 0; i < rows; ++i) {
        const S* const row = x + i * p_.pred.row[inner_];
        for (int64_t c = 0; c < classes; ++c) x_[i * classes + c] = row[c * p_.pred.column];
      }
      x = x_;
    }

    const A* q = q_;
    int64_t hits = 0;
    if (p_.score.data) {
      load_labels(p_.target, at(p_.target, r), p_.target.row[inner_], rows, classes, label_);
      for (int64_t i = 0; i < rows; ++i) hits += label_[i] >= 0;
      if (hits > 0 || !has_background_) {
        load_run(p_.score, at(p_.score, r), p_.score.row[inner_], rows, row_score_);
        fill(q_, n, no_label_);
        hits = 0;
        for (int64_t i = 0; i < rows; ++i) {
          if (label_[i] < 0) continue;
          hits_[hits] = i * classes + label_[i];
          q_[hits_[hits++]] = row_score_[i];
        }
      }
    } else if (p_.target.dtype == kDtype<A> && packed(p_.target)) {
      q = reinterpret_cast<const A*>(p_.target.data) + at(p_.target, r);
    } else {
      stage(p_.target, r, rows, q_);
    }

    const A* w = nullptr;
    A factor = static_cast<A>(p_.scale);
    A loss_factor = 1;
    if (p_.weight_per_class) {
      stage(p_.weight, r, rows, w_);
      for (int64_t i = 0; i < rows && p_.grad_loss.data; ++i) {
        const A upstream = row_weight[uniform_ ? 0 : i];
        for (int64_t c = 0; c < classes; ++c) w_[i * classes + c] *= upstream;
      }
      w = w_;
    } else if (uniform_) {
      loss_factor = row_weight[0];
      factor = static_cast<A>(p_.scale * row_weight[0]);
    } else {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t c = 0; c < classes; ++c) w_[i * classes + c] = row_weight[i];
      }
      w = w_;
    }

    S* const out = reinterpret_cast<S*>(p_.grad.data);
    const bool in_place = out && packed(p_.grad);
    S* const grad = !out ? nullptr : in_place ? out + at(p_.grad, r) : grad_;
    const double sum = tile(hits, x, q, w, grad, p_.loss.data ? losses_ : nullptr, n, factor);
    if (out && !in_place) {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t c = 0; c < classes; ++c) {
          out[at(p_.grad, r + i) + c * p_.grad.column] = grad_[i * classes + c];
        }
      }
    }
    if (p_.loss.data) {
      for (int64_t i = 0; i < rows; ++i) {
        write_loss(r + i, sum_run(losses_ + i * classes, classes) * loss_factor);
      }
    }
    return sum * loss_factor;
  }

  // A run of neighbouring anchors, one class plane after the other: [B, C, H, W].
  double tile_of_planes(int64_t r, int64_t rows) {
    const int64_t classes = p_.classes;
    int64_t positives = 0;  // label_ and positive_
    if (p_.score.data) {
      load_labels(p_.target, at(p_.target, r), p_.target.row[inner_], rows, classes, label_);
      load_run(p_.score, at(p_.score, r), p_.score.row[inner_], rows, row_score_);
      for (int64_t i = 0; i < rows; ++i) {
        if (label_[i] < 0) continue;
        label_[positives] = label_[i];
        positive_[positives++] = i;
      }
      fill(q_, rows, no_label_);
    }
    const bool spread = !uniform_ && !p_.weight_per_class;
    const A factor = static_cast<A>(uniform_ ? p_.scale * row_weight_[0] : p_.scale);
    const double loss_factor = uniform_ ? row_weight_[0] : 1;
    if (p_.loss.data) memset(row_loss_, 0, rows * sizeof(A));
    double total = 0;
    for (int64_t c = 0; c < classes; ++c) {
      const A* q = q_;
      int64_t hits = 0;
      if (p_.score.data) {
        for (int64_t i = 0; i < positives; ++i) {
          if (label_[i] != c) continue;
          hits_[hits] = positive_[i];
          q_[hits_[hits++]] = row_score_[positive_[i]];
        }
      } else if (p_.target.dtype == kDtype<A> && p_.target.row[inner_] == 1) {
        q = reinterpret_cast<const A*>(p_.target.data) + at(p_.target, r) + c * p_.target.column;
      } else {
        load_run(p_.target, at(p_.target, r) + c * p_.target.column, p_.target.row[inner_], rows,
                 q_);
      }
      const A* w = spread ? row_weight_ : nullptr;
      if (p_.weight_per_class) {
        load_run(p_.weight, at(p_.weight, r) + c * p_.weight.column, p_.weight.row[inner_], rows,
                 w_);
        for (int64_t i = 0; i < rows && !uniform_; ++i) w_[i] *= row_weight_[i];
        w = w_;
      }
      const S* const x =
          reinterpret_cast<const S*>(p_.pred.data) + at(p_.pred, r) + c * p_.pred.column;
      S* const out = reinterpret_cast<S*>(p_.grad.data);
      S* const grad = out ? out + at(p_.grad, r) + c * p_.grad.column : nullptr;
      total += tile(hits, x, q, w, grad, p_.loss.data ? losses_ : nullptr, rows, factor);
      if (p_.loss.data) {
        for (int64_t i = 0; i < rows; ++i) row_loss_[i] += losses_[i];
      }
      if (p_.score.data) {
        for (int64_t h = 0; h < hits; ++h) q_[hits_[h]] = no_label_;
      }
    }
    for (int64_t i = 0; i < rows && p_.loss.data; ++i)
      write_loss(r + i, row_loss_[i] * loss_factor);
    return total * loss_factor;
  }

  // rows x classes values of an operand with a value per element, packed.
  void stage(const Operand& o, int64_t r, int64_t rows, A* to) {
    for (int64_t i = 0; i < rows; ++i) {
      load_run(o, at(o, r + i), o.column, p_.classes, to + i * p_.classes);
    }
  }

  // Of a sparse problem the elements hits_[0, hits), ascending, have targets, which are in q_; all
  // others are background, for which q_ holds no_label_ if there is a hit.
  double tile(int64_t hits, const S* x, const A* q, const A* w, S* grad, A* losses, int64_t n,
              A factor) {
    // Only the vectors that run abreast with a hit need the formula with a target.
    constexpr int64_t group = kQualityWays * kLanes<A>;
    if (!p_.score.data || !has_background_ || hits * group > n) {
      return tile_of_targets(x, q, w, grad, losses, n, factor);
    }
    double sum = 0;
    int64_t done = 0;
    const auto part = [&](bool background, int64_t end) {
      if (done == end) return;
      const auto from = [&](auto* values) { return values ? values + done : values; };
      const auto run = [&](const auto& loop) {
        sum += loop(from(x), from(q), from(w), from(grad), from(losses), end - done, factor);
      };
      if (!background) {
        run([&](auto... rest) { return tile_of_targets(rest...); });
      } else if (square_) {
        run([&](auto... rest) { return tile(Background{}, rest...); });
      } else {
        run([&](auto... rest) { return weighted_tile(others_, rest...); });
      }
      done = end;
    };
    for (int64_t h = 0; h < hits; ++h) {
      if (hits_[h] < done) continue;
      part(true, hits_[h] / group * group);
      part(false, smaller(done + group, n));
    }
    part(true, n);
    return sum;
  }

  double tile_of_targets(const S* x, const A* q, const A* w, S* grad, A* losses, int64_t n,
                         A factor) {
    if (square_) return tile(Square{}, x, q, w, grad, losses, n, factor);
    switch (p_.form) {
      case GFL_LOGITS:
        return tile(form<GFL_LOGITS>(), x, q, w, grad, losses, n, factor);
      case GFL_PROBABILITIES:
        return tile(form<GFL_PROBABILITIES>(), x, q, w, grad, losses, n, factor);
      case GFL_VARIFOCAL:
        return tile(form<GFL_VARIFOCAL>(), x, q, w, grad, losses, n, factor);
      case GFL_FOCAL:
        return weighted_tile(form<GFL_FOCAL>(), x, q, w, grad, losses, n, factor);
      case GFL_VARIFOCAL_PROBABILITIES:
        return full_tile(form<GFL_VARIFOCAL_PROBABILITIES>(), x, q, w, grad, losses, n, factor);
      case GFL_FOCAL_PROBABILITIES:
        return full_tile(form<GFL_FOCAL_PROBABILITIES>(), x, q, w, grad, losses, n, factor);
      case GFL_MATCHABILITY:
        return full_tile(form<GFL_MATCHABILITY>(), x, q, w, grad, losses, n, factor);
      case GFL_IOU_AWARE:
        return full_tile(form<GFL_IOU_AWARE>(), x, q, w, grad, losses, n, factor);
      case GFL_BALANCED:
        return full_tile(form<GFL_BALANCED>(), x, q, w, grad, losses, n, factor);
    }
    return 0;
  }
  template <int kForm>
  Form<kForm> form() const {
    return {p_.flags, p_.alpha, p_.beta, above_};
  }

  // The loop over a tile, in as many variants as a formula is worth: each takes half a second to
  // compile, for every type and instruction set.
  template <typename Formula>
  double tile(const Formula& f, const S* x, const A* q, const A* w, S* grad, A* losses, int64_t n,
              A factor) {
    if (w) return weighted_tile(f, x, q, w, grad, losses, n, factor);
    return grad ? quality_tile<false, true>(f, x, q, w, grad, losses, n, factor)
                : quality_tile<false, false>(f, x, q, w, grad, losses, n, factor);
  }
  template <typename Formula>
  double weighted_tile(const Formula& f, const S* x, const A* q, const A* w, S* grad, A* losses,
                       int64_t n, A factor) {
    return grad ? quality_tile<true, true>(f, x, q, weights(w, n), grad, losses, n, factor)
                : quality_tile<true, false>(f, x, q, weights(w, n), grad, losses, n, factor);
  }
  template <typename Formula>
  double full_tile(const Formula& f, const S* x, const A* q, const A* w, S* grad, A* losses,
                   int64_t n, A factor) {
    return quality_tile<true, true>(f, x, q, weights(w, n), grad ? grad : grad_, losses, n, factor);
  }
  const A* weights(const A* w, int64_t n) const {
    if (!w) fill(w_, n, 1);
    return w ? w : w_;
  }

  static void fill(A* values, int64_t n, A value) {
    for (int64_t i = 0; i < n; ++i) values[i] = value;
  }

  static double sum_run(const A* values, int64_t n) {
    Vector<A> sum{};
    int64_t i = 0;
    for (; i + kLanes<A> <= n; i += kLanes<A>) sum = sum + load(values + i);
    if (i < n) sum = sum + load_first(values + i, static_cast<int>(n - i));
    return sum_lanes(sum);
  }

  void write_loss(int64_t row, double loss) {
    reinterpret_cast<A*>(p_.loss.data)[at(p_.loss, row)] = static_cast<A>(loss * p_.scale);
  }

  const QualityProblem& p_;
  const int inner_;
  bool square_, has_background_, uniform_ = true, some_zero_ = false;
  A no_label_;
  double above_;
  Others others_;
  S *x_, *grad_;
  A *q_, *w_, *losses_, *row_weight_, *row_score_, *row_loss_;
  int64_t *label_, *positive_, *hits_;
};

double quality(const QualityProblem& problem, int64_t begin, int64_t count, void* scratch) {
  const FlushDenormals flush(!on_probabilities(problem.form));
  switch (problem.pred.dtype) {
    case GFL_FLOAT32:
      return Quality<float>(problem, scratch).run(begin, count);
    case GFL_FLOAT64:
      return Quality<double>(problem, scratch).run(begin, count);
    case GFL_BFLOAT16:
      return Quality<bfloat16>(problem, scratch).run(begin, count);
    default:
      return Quality<float16>(problem, scratch).run(begin, count);
  }
}

// Distribution family

#define GFL_EACH_GROUP _Pragma("GCC unroll 4") for (int u = 0; u < kGroups; ++u)

template <typename S>
class Distribution {
  using A = Accumulator<S>;
  using V = Vector<A>;
  static constexpr int kN = kLanes<A>;
  static constexpr int kWays = 2;
  static constexpr int kAhead = 4096;
  static constexpr int kRows = 256;  // rows whose targets and weights are looked at together

 public:
  Distribution(const DistributionProblem& problem, void* memory)
      : p_(problem), inner_(problem.ndim - 1), bins_(problem.bins) {
    Scratch scratch(memory);
    z_ = scratch.take<Vs>(bins_);
    const bool plain = p_.kind == kTargetLoss || (is_integral() && p_.window < 0);
    flat_ = kFlat && plain && bins_ >= 8 && bins_ <= kFlatBins && packed(p_.pred) &&
            (!p_.grad.data || packed(p_.grad));
    if (!flat_) {
      for (Vs*& more : more_) more = scratch.take<Vs>(bins_);
      return;
    }
    e_ = scratch.take<A>(kFlatRows * bins_ + kN);
    if constexpr (sizeof(S) != sizeof(A)) g_ = scratch.take<A>(kFlatRows * bins_ + kN);
    if (is_integral()) {
      y_ = scratch.take<A>(bins_ + kN);
      for (int64_t k = 0; k < bins_; ++k) y_[k] = reinterpret_cast<const A*>(p_.values.data)[k];
    }
  }

  double run(int64_t begin, int64_t count) {
    double total = 0;
    for (int64_t r = begin; r < begin + count; r += kRows) {
      total += block(r, smaller(kRows, begin + count - r));
    }
    return total;
  }

 private:
  int64_t at(const Operand& o, int64_t row) const { return row * o.row[inner_]; }
  bool is_integral() const { return p_.kind == kExpectation; }

  double block(int64_t r, int64_t rows) {
    const int n = static_cast<int>(rows);
    // Rows of weight 0 are not read; the integral's value has no weight.
    const bool weighted =
        p_.kind < kStatistics && load_weights(r, n) && !(is_integral() && p_.loss.data);
    int active = n;
    if (weighted) {
      active = 0;
      for (int i = 0; i < n; ++i) {
        index_[active] = i;
        active += weight_[i] != 0;
      }
      if (active < n) write_zeros(r, n);
    }
    if (p_.kind == kTargetLoss) load_targets(r, n);

    V total{};
    Group groups[kGroups];
    for (int g = 0, step; g < active; g += step) {
      step = kGroups * kN;
      if constexpr (kFlat) {
        if (flat_ && active == n && g % kFlatRows == 0) {
          const int rows = smaller(kFlatRows, (n - g) / kN * kN);
          if (rows > 0 && exponentials(r + g, rows)) {
            total = total + flat(r, g, rows);
            step = rows;
            continue;
          }
          flat_ = rows == 0;  // large logits have company: no more attempts in these rows
        }
      }
      GFL_EACH_GROUP groups[u] = make_group(g, g + u * kN, active, active < n);
      if (p_.kind == kTargetLoss) {
        total = total + loss_groups(r, groups);
      } else if (p_.kind == kMoments) {
        moments_groups(r, groups);
      } else if (is_integral()) {
        p_.window < 0 ? integral_groups<false>(r, groups) : integral_groups<true>(r, groups);
      } else {
        p_.topk == 4 ? statistics_groups<4>(r, groups) : statistics_groups<0>(r, groups);
      }
    }
    return sum_lanes(total);
  }

  // weight_: the weight times the upstream gradient of each row of a block. False if all are 1.
  bool load_weights(int64_t r, int n) {
    fill(weight_, n, A(1));
    if (p_.weight.data) load_run(p_.weight, at(p_.weight, r), p_.weight.row[inner_], n, weight_);
    if (p_.grad_loss.data) {
      load_run(p_.grad_loss, at(p_.grad_loss, r), p_.grad_loss.row[inner_], n, wl_);
      // A row of weight 0 stays out whatever comes from upstream.
      for (int i = 0; i < n; ++i) weight_[i] = weight_[i] == 0 ? 0 : weight_[i] * wl_[i];
    }
    return p_.weight.data || p_.grad_loss.data;
  }

  // left_, wl_, wr_ of a block.
  void load_targets(int64_t r, int n) {
    load_run(p_.target, at(p_.target, r), p_.target.row[inner_], n, left_);
    const A last = static_cast<A>(bins_ - 1);
    if (p_.weight_left.data) {
      load_run(p_.weight_left, at(p_.weight_left, r), p_.weight_left.row[inner_], n, wl_);
      load_run(p_.weight_right, at(p_.weight_right, r), p_.weight_right.row[inner_], n, wr_);
      for (int i = 0; i < n; i += kN) {
        const V left = load(left_ + i);
        const auto at_last = left >= last;
        const V inside = select(left >= A(0), floor_small(left), V{});  // D-FINE's end at 31.9
        store(left_ + i, select(at_last, broadcast<V>(last), inside));
        // There is no bin right of the last: its weight goes there too.
        const V wr = load(wr_ + i);
        store(wl_ + i, load(wl_ + i) + select(at_last, wr, V{}));
        store(wr_ + i, select(at_last, V{}, wr));
      }
    } else {
      for (int i = 0; i < n; i += kN) {
        V left, wl, wr;
        split_target(load(left_ + i), last, &left, &wl, &wr);
        store(left_ + i, select(left >= A(0), left, V{}));  // NaN: some bin
        store(wl_ + i, wl);
        store(wr_ + i, wr);
      }
    }
  }

  // kN rows, one per lane. kGroups of them run abreast, the way from the logits to the loss being
  // one long chain of dependent operations. Four chains do not fit AVX2's 16 registers; SSE, with
  // as many, was still a tenth faster with four.
  static constexpr int kGroups = kVectorBytes == 32 ? 2 : 4;
  struct Group {
    int64_t first;  // the first row's number within the block
    int lanes;      // that count; the others repeat a row
    bool together;  // all of them do, and are neighbours: rows is not filled
    int64_t rows[kN];
    int64_t row(int i) const { return together ? first + i : rows[i]; }
  };

  // The group of the active rows begin, begin + 1, ...; beyond the last one it repeats `spare`.
  Group make_group(int spare, int begin, int active, bool picked) const {
    Group group;
    const int left = active - begin;
    group.lanes = left < 0 ? 0 : smaller(kN, left);
    group.together =
        group.lanes == kN && (!picked || index_[begin + kN - 1] - index_[begin] == kN - 1);
    if (group.together) {
      group.first = picked ? index_[begin] : begin;
      return group;
    }
    for (int i = 0; i < kN; ++i) {
      const int at = i < left ? begin + i : spare;
      group.rows[i] = picked ? index_[at] : at;
    }
    group.first = group.rows[0];
    return group;
  }

  using Vs = Wide<V, kGroups>;

  V loss_groups(int64_t r, const Group* groups) {
    load_logits(r, groups);
    const Vs high = highest(), left = gather(left_, groups);
    Vs sums[kWays] = {}, z_left{}, z_right{};
    // before, not the last mask: a mask carried around the loop costs AVX-512 more than a
    // comparison.
    Vs bin{}, before = broadcast<Vs>(A(-1));
    each_bin([&](int64_t k, int way) __attribute__((always_inline)) {
      const Vs shifted = z_[k] - high;
      z_left = select(left == bin, shifted, z_left);
      z_right = select(left == before, shifted, z_right);
      before = bin;
      bin = bin + A(1);
      z_[k] = exponential(shifted);
      sums[way] = sums[way] + z_[k];
    });
    const Vs sum = sums[0] + sums[1];
    const Vs wl = gather(wl_, groups), wr = gather(wr_, groups);
    Vs w = gather(weight_, groups);
    GFL_EACH_GROUP w[u] = first_lanes(w[u], groups[u].lanes);
    Vs loss = distribution_loss(logarithm(sum), wl, wr, z_left, z_right);
    loss = select(w == A(0), w, loss * w);
    if (p_.loss.data) write_values(r, groups, loss * static_cast<A>(p_.scale));
    if (p_.grad.data) {
      const Vs factor = w * static_cast<A>(p_.scale);
      const Vs left_part = wl * factor, right_part = wr * factor,
               total = (wl + wr) * (reciprocal(sum) * factor);
      bin = Vs{};
      before = broadcast<Vs>(A(-1));
      each_bin([&](int64_t k, int) __attribute__((always_inline)) {
        z_[k] =
            distribution_grad(z_[k] * total, left == bin, left == before, left_part, right_part);
        before = bin;
        bin = bin + A(1);
      });
      store_grads(r, groups);
    }
    V total{};
    GFL_EACH_GROUP total = total + loss[u];
    return total;
  }

  template <bool kPeak>
  void integral_groups(int64_t r, const Group* groups) {
    load_logits(r, groups);
    const Vs high = highest();
    const A* const values = reinterpret_cast<const A*>(p_.values.data);
    const Vs peak = kPeak ? first_of(high) : Vs{};
    Vs sums[kWays] = {}, moments[kWays] = {}, bin{};
    each_bin([&](int64_t k, int way) __attribute__((always_inline)) {
      z_[k] = exponential(z_[k] - high);
      if constexpr (kPeak) {
        z_[k] = z_[k] * peak_window(bin, peak, static_cast<A>(p_.window));
        bin = bin + A(1);
      }
      sums[way] = sums[way] + z_[k];
      moments[way] = moments[way] + z_[k] * values[k];
    });
    const Vs inverse = reciprocal(sums[0] + sums[1]),
             expectation = (moments[0] + moments[1]) * inverse;
    if (p_.loss.data) write_values(r, groups, expectation);
    if (p_.grad.data) {
      const Vs factor = inverse * gather(weight_, groups);
      each_bin([&](int64_t k, int) __attribute__((always_inline)) {
        z_[k] = expectation_grad(z_[k] * factor, broadcast<Vs>(values[k]), expectation);
      });
      store_grads(r, groups);
    }
  }

  // The first bin of a logit that is there.
  Vs first_of(const Vs& z) const {
    Vs first{};
    for (int64_t k = bins_ - 1; k >= 0; --k) {
      first = select(z_[k] == z, broadcast<Vs>(static_cast<A>(k)), first);
    }
    return first;
  }

  void moments_groups(int64_t r, const Group* groups) {
    load_logits(r, groups);
    const Vs high = highest();
    const A* const values = reinterpret_cast<const A*>(p_.values.data);
    Vs* const shifted = more_[0];
    Vs sums[kWays] = {}, moments[kWays] = {}, entropies[kWays] = {}, squares[kWays] = {};
    each_bin([&](int64_t k, int way) __attribute__((always_inline)) {
      const Vs s = z_[k] - high;
      shifted[k] = s;
      z_[k] = exponential(s);
      sums[way] = sums[way] + z_[k];
      moments[way] = moments[way] + z_[k] * values[k];
      entropies[way] = entropies[way] + entropy_term(z_[k], s);
    });
    const Vs sum = sums[0] + sums[1], inverse = reciprocal(sum);
    Moments<Vs> m{};
    m.mean = (moments[0] + moments[1]) * inverse;
    m.mean_s = (entropies[0] + entropies[1]) * inverse;
    each_bin([&](int64_t k, int way) __attribute__((always_inline)) {
      const Vs away = values[k] - m.mean;
      squares[way] = squares[way] + z_[k] * (away * away);
    });
    m.variance = (squares[0] + squares[1]) * inverse;
    const Vs std = square_root(m.variance);
    if (p_.loss.data) {
      write_values(r, groups, m.mean);
      write_values(r, groups, std, 1);
      write_values(r, groups, logarithm(sum) - m.mean_s, 2);
    }
    if (p_.grad.data) {
      m.by_mean = upstream(r, groups, 0);
      m.by_variance = upstream(r, groups, 1) * square_root_grad(std);
      m.by_entropy = upstream(r, groups, 2);
      each_bin([&](int64_t k, int) __attribute__((always_inline)) {
        z_[k] = moments_grad(z_[k] * inverse, broadcast<Vs>(values[k]), shifted[k], m);
      });
      store_grads(r, groups);
    }
  }

  // kTop: topk, known in advance; or 0: any.
  template <int kTop>
  void statistics_groups(int64_t r, const Group* groups) {
    load_logits(r, groups);
    const int64_t topk = kTop ? kTop : p_.topk;
    Vs kept[3][kTop ? kTop : 1];
    // The highest logits so far, in descending order; their bins; what comes from upstream for
    // them.
    Vs* const top = kTop ? kept[0] : more_[0];
    Vs* const place = kTop ? kept[1] : more_[1];
    Vs* const g = kTop ? kept[2] : more_[2];
    const bool backward = p_.grad.data;
    backward ? find_top<true>(topk, top, place) : find_top<false>(topk, top, place);
    Vs sums[kWays] = {};
    const Vs high = top[0];
    each_bin([&](int64_t k, int way) __attribute__((always_inline)) {
      z_[k] = exponential(z_[k] - high);
      sums[way] = sums[way] + z_[k];
    });
    const Vs inverse = reciprocal(sums[0] + sums[1]);
    const A share = A(1) / static_cast<A>(topk);
    for (int64_t j = 0; j < topk; ++j) top[j] = exponential(top[j] - high) * inverse;
    if (p_.loss.data) {
      Vs total{};
      for (int64_t j = 0; j < topk; ++j) {
        write_values(r, groups, top[j], j);
        total = total + top[j];
      }
      if (p_.add_mean) write_values(r, groups, total * share, topk);
    }
    if (backward) {
      const Vs of_mean = p_.add_mean ? upstream(r, groups, topk) * share : Vs{};
      Vs total{};
      for (int64_t j = 0; j < topk; ++j) {
        g[j] = upstream(r, groups, j) + of_mean;
        total = total + g[j] * top[j];
      }
      Vs bin{};
      for (int64_t k = 0; k < bins_; ++k) {
        Vs of_bin{};
        for (int64_t j = 0; j < topk; ++j) of_bin = select(place[j] == bin, g[j], of_bin);
        z_[k] = expectation_grad(z_[k] * inverse, of_bin, total);
        bin = bin + A(1);
      }
      store_grads(r, groups);
    }
  }

  // Every logit takes the place of the first lower one of the list, and all from there on move down
  // by one. An equal one stays in front; what is -inf or NaN is in no place.
  template <bool kPlaces>
  __attribute__((always_inline)) void find_top(int64_t topk, Vs* top, Vs* place) const {
    for (int64_t j = 0; j < topk; ++j) {
      top[j] = broadcast<Vs>(-static_cast<A>(__builtin_inff()));
      place[j] = broadcast<Vs>(A(-1));
    }
    Vs bin{};
    for (int64_t k = 0; k < bins_; ++k) {
      Vs z = z_[k], at = bin;
      for (int64_t j = 0; j < topk; ++j) {
        const auto above = z_[k] > top[j];
        const Vs lower = select(above, top[j], z);
        top[j] = select(above, z, top[j]);
        z = lower;
        if constexpr (kPlaces) {
          const Vs lower_at = select(above, place[j], at);
          place[j] = select(above, at, place[j]);
          at = lower_at;
        }
      }
      bin = bin + A(1);
    }
  }

  // Rows without gaps, as one array
  //
  // Logits that are small enough need no shift by their row's maximum, p_k = exp(z_k) / sum, so the
  // rows need not be turned into lanes either: exponentials go along the array, and what is left of
  // a row is its sum and a look at two of its elements. The loss is -wl log p_l - wr log p_r, as
  // exact as with the shift. Not with AVX-512, where by count of instructions it would gain
  // nothing: turning packed rows takes two operations less there.

  static constexpr bool kFlat = kVectorBytes < 64;
  static constexpr int kFlatRows = 64;
  static constexpr int kFlatBins = 64;
  static constexpr A kSmall = 40;  // kFlatBins exp(2 kSmall) is a float

  // e_ = exp of n rows, if all are small enough.
  bool exponentials(int64_t r, int n) {
    const S* const z = logits(r);
    const int64_t elements = n * bins_;
    const S* const g = p_.grad.data ? grads(r) : z;
    V square{};
#pragma GCC unroll 4
    for (int64_t i = 0; i < elements; i += kN) {
      const V x = load(z + i);
      __builtin_prefetch(reinterpret_cast<const char*>(z + i) + kAhead, 0);
      __builtin_prefetch(reinterpret_cast<const char*>(g + i) + kAhead, 1);
      square = maximum(x * x, square);
      store(e_ + i, exponential<true>(x));
    }
    for (int i = 0; i < kN; ++i) {
      if (square[i] > kSmall * kSmall) return false;
    }
    return true;
  }

  // K is the number of bins, or 0: any.
  template <int K>
  int64_t bins() const {
    return K ? K : bins_;
  }

  // Lane i: the sum over row i of f(i, k), kN elements from bin k on.
  template <int K, typename F>
  __attribute__((always_inline)) V flat_sums(const F& f) const {
    V part[kN];
#pragma GCC unroll 16
    for (int i = 0; i < kN; ++i) {
      part[i] = f(i, 0);
      int64_t k = kN;
#pragma GCC unroll 16
      for (; k + kN <= bins<K>(); k += kN) part[i] = part[i] + f(i, k);
      if (k < bins<K>()) {
        part[i] = part[i] + first_lanes(f(i, k), static_cast<int>(bins<K>() - k));
      }
    }
    return sum_each(part);
  }

  template <int K>
  V flat_loss(int64_t r, int first, int n) {
    A left_e[kFlatRows], right_e[kFlatRows];
    int at[kFlatRows];
    for (int i = first; i < first + n; i += kN) {
      // The last bin as the right one of two, so that both are in the row.
      const A last = static_cast<A>(bins<K>() - 1);
      const V left = load(left_ + i), wl = load(wl_ + i);
      const auto at_last = left >= last;
      store(left_ + i, select(at_last, broadcast<V>(last - 1), left));
      store(wl_ + i, select(at_last, V{}, wl));
      store(wr_ + i, select(at_last, wl, load(wr_ + i)));
    }
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) {
      at[i] = static_cast<int>(i * bins<K>()) + static_cast<int>(left_[first + i]);
      left_e[i] = e_[at[i]];
      right_e[i] = e_[at[i] + 1];
    }
    const A scale = static_cast<A>(p_.scale);
    V total{};
    for (int g = 0; g < n; g += kN) {
      const A* const e = e_ + g * bins<K>();
      const V sum = flat_sums<K>([&](int i, int64_t k) __attribute__((always_inline)) {
        return load(e + i * bins<K>() + k);
      });
      const V wl = load(wl_ + first + g), wr = load(wr_ + first + g), w = load(weight_ + first + g);
      const V inverse = reciprocal(sum);
      const V loss = w * distribution_loss(V{}, wl, wr, logarithm(load(left_e + g) * inverse),
                                           logarithm(load(right_e + g) * inverse));
      if (p_.loss.data) write_lanes(r + first + g, loss * scale);
      total = total + loss;
      if (p_.grad.data) {
        const V factor = w * scale;
        store(left_e + g, wl * factor);
        store(right_e + g, wr * factor);
        store(total_ + g, (wl + wr) * (inverse * factor));
      }
    }
    if (p_.grad.data) {
      flat_grads<K>(
          r + first, n,
          [&](int i) __attribute__((always_inline)) {
            return [f = broadcast<V>(total_[i])](V e, int64_t)
                       __attribute__((always_inline)) { return e * f; };
          },
          [&](A* g) __attribute__((always_inline)) {
#pragma GCC unroll 4
            for (int i = 0; i < n; ++i) {
              g[at[i]] -= left_e[i];
              g[at[i] + 1] -= right_e[i];
            }
          });
    }
    return total;
  }

  template <int K>
  V flat_integral(int64_t r, int first, int n) {
    A factor[kFlatRows];
    for (int g = 0; g < n; g += kN) {
      const A* const e = e_ + g * bins<K>();
      const V inverse =
          reciprocal(flat_sums<K>([&](int i, int64_t k) __attribute__((always_inline)) {
            return load(e + i * bins<K>() + k);
          }));
      const V expectation =
          inverse * flat_sums<K>([&](int i, int64_t k) __attribute__((always_inline)) {
            return load(e + i * bins<K>() + k) * load(y_ + k);
          });
      if (p_.loss.data) write_lanes(r + first + g, expectation);
      store(total_ + g, expectation);
      store(factor + g, inverse * load(weight_ + first + g));
    }
    if (p_.grad.data) {
      flat_grads<K>(
          r + first, n,
          [&](int i) __attribute__((always_inline)) {
            return [this, f = broadcast<V>(factor[i]), expectation = broadcast<V>(total_[i])](
                       V e, int64_t k) __attribute__((always_inline)) {
              return expectation_grad(e * f, load(y_ + k), expectation);
            };
          },
          [](A*) {});
    }
    return V{};
  }

  // grad = row(i)(exponentials, bin), kN bins at a time: the last ones of a row spill into the
  // next, which comes after.
  template <int K, typename Row, typename Patch>
  __attribute__((always_inline)) void flat_grads(int64_t r, int n, const Row& row,
                                                 const Patch& patch) {
    constexpr bool direct = sizeof(S) == sizeof(A);
    const int64_t whole = bins<K>() / kN * kN;
    S* const out = grads(r);
    A* const g = direct ? reinterpret_cast<A*>(out) : g_;
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) {
      const auto f = row(i);
      A* const to = g + i * bins<K>();
      const A* const from = e_ + i * bins<K>();
#pragma GCC unroll 16
      for (int64_t k = 0; k < whole; k += kN) store(to + k, f(load(from + k), k));
      if (whole < bins<K>()) {
        const V v = f(load(from + whole), whole);
        if (direct && i == n - 1) {
          store_first(to + whole, v, static_cast<int>(bins<K>() - whole));
        } else {
          store(to + whole, v);
        }
      }
    }
    patch(g);
    if constexpr (!direct) {
      for (int64_t i = 0; i < n * bins<K>(); i += kN) store(out + i, load(g_ + i));
    }
  }

  template <int K>
  V flat(int64_t r, int first, int n) {
    return is_integral() ? flat_integral<K>(r, first, n) : flat_loss<K>(r, first, n);
  }
  V flat(int64_t r, int first, int n) {
    switch (bins_) {
      case 8:
        return flat<8>(r, first, n);
      case 16:
        return flat<16>(r, first, n);
      case 17:
        return flat<17>(r, first, n);
      case 33:
        return flat<33>(r, first, n);
      default:
        return flat<0>(r, first, n);
    }
  }

  // f(k, k % kWays): sums and maxima go to kWays accumulators, or each would wait for the one
  // before.
  template <typename F>
  __attribute__((always_inline)) void each_bin(const F& f) const {
    int64_t k = 0;
    for (; k + kWays <= bins_; k += kWays) {
      f(k, 0);
      f(k + 1, 1);
    }
    if (k < bins_) f(k, 0);
  }

  Vs highest() const {
    Vs high[kWays] = {z_[0], z_[0]};
    each_bin([&](int64_t k, int way)
                 __attribute__((always_inline)) { high[way] = maximum(z_[k], high[way]); });
    return maximum(high[0], high[1]);
  }

  const S* logits(int64_t row) const {
    return reinterpret_cast<const S*>(p_.pred.data) + at(p_.pred, row);
  }
  S* grads(int64_t row) const { return reinterpret_cast<S*>(p_.grad.data) + at(p_.grad, row); }

  void load_logits(int64_t r, const Group* groups) {
    GFL_EACH_GROUP {
      const S* const base = logits(r);
      if (p_.pred.column == 1) ahead<0>(base + groups[u].first * p_.pred.row[inner_]);
      const int64_t step = p_.pred.row[inner_];
      if (groups[u].together) {
        const S* const first = base + groups[u].first * step;
        if (step == 1) {
          for (int64_t k = 0; k < bins_; ++k) z_[k][u] = load(first + k * p_.pred.column);
        } else if (turnable(p_.pred)) {
          bins_ == 17 ? load_packed<17>(u, first) : load_packed<33>(u, first);
        } else {
          load_rows(u, [&](int i) __attribute__((always_inline)) { return first + i * step; });
        }
      } else {
        load_rows(u, [&](int i) __attribute__((always_inline)) {
          return base + groups[u].rows[i] * step;
        });
      }
    }
  }
  // Asks for the memory that comes some groups later: hardware prefetchers stop at every page.
  template <int kWrite>
  __attribute__((always_inline)) void ahead(const S* row) {
    const char* const from = reinterpret_cast<const char*>(row) + kAhead;
    const int64_t bytes = kN * bins_ * static_cast<int64_t>(sizeof(S));
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(from + b, kWrite);
  }

  void store_grads(int64_t r, const Group* groups) {
    GFL_EACH_GROUP {
      S* const base = grads(r);
      if (p_.grad.column == 1) ahead<1>(base + groups[u].first * p_.grad.row[inner_]);
      const int64_t step = p_.grad.row[inner_];
      if (groups[u].together) {
        S* const first = base + groups[u].first * step;
        if (step == 1) {
          for (int64_t k = 0; k < bins_; ++k) store(first + k * p_.grad.column, z_[k][u]);
        } else if (turnable(p_.grad)) {
          bins_ == 17 ? store_packed<17>(u, first) : store_packed<33>(u, first);
        } else {
          store_rows(u, kN, [&](int i) __attribute__((always_inline)) { return first + i * step; });
        }
      } else if (groups[u].lanes > 0) {
        store_rows(u, groups[u].lanes, [&](int i) __attribute__((always_inline)) {
          return base + groups[u].rows[i] * step;
        });
      }
    }
  }

  // Rows without gaps have a transposition of their own for the usual numbers of bins, reg_max 16
  // and 32: with AVX-512, for it keeps K registers and needs shuffles of any two. Without them it
  // was slower than squares.
  static constexpr bool kPacked = kVectorBytes == 64;
  bool packed(const Operand& o) const { return o.row[inner_] == bins_ && o.column == 1; }
  bool turnable(const Operand& o) const {
    return kPacked && (bins_ == 17 || bins_ == 33) && packed(o);
  }
  template <int K>
  __attribute__((noinline)) void load_packed(int u, const S* rows) {
    if constexpr (kPacked) {
      V v[K], columns[K];
#pragma GCC unroll 64
      for (int r = 0; r < K; ++r) v[r] = load(rows + r * kN);
      columns_of_packed<K>(v, columns);
#pragma GCC unroll 64
      for (int k = 0; k < K; ++k) z_[k][u] = columns[k];
    }
  }
  template <int K>
  __attribute__((noinline)) void store_packed(int u, S* rows) const {
    if constexpr (kPacked) {
      V v[K], columns[K];
#pragma GCC unroll 64
      for (int k = 0; k < K; ++k) columns[k] = z_[k][u];
      packed_of_columns<K>(columns, v);
#pragma GCC unroll 64
      for (int r = 0; r < K; ++r) store(rows + r * kN, v[r]);
    }
  }

  // z_[k][u] lane i = bin k of the row at row(i).
  template <typename Row>
  __attribute__((always_inline)) void load_rows(int u, const Row& row) {
    rows_to_lanes<S>(bins_, p_.pred.column, row,
                     [&](int64_t k, V column)
                         __attribute__((always_inline)) { z_[k][u] = column; });
  }

  template <typename Row>
  __attribute__((always_inline)) void store_rows(int u, int lanes, const Row& row) {
    lanes_to_rows<S>(bins_, p_.grad.column, lanes, row,
                     [&](int64_t k) __attribute__((always_inline)) { return z_[k][u]; });
  }

  // Gradient and loss of the block's rows of weight 0.
  void write_zeros(int64_t r, int n) {
    for (int i = 0; i < n; ++i) {
      if (weight_[i] != 0) continue;
      if (p_.grad.data) {
        S* const row = grads(r + i);
        for (int64_t k = 0; k < bins_; ++k) row[k * p_.grad.column] = S{};
      }
      if (p_.loss.data) *losses(r + i) = 0;
    }
  }

  A* losses(int64_t row, int64_t column = 0) const {
    return reinterpret_cast<A*>(p_.loss.data) + at(p_.loss, row) + column * p_.loss.column;
  }

  // A value per row of the groups, out to memory, in from upstream or from an array of the block.
  void write_values(int64_t r, const Group* groups, const Vs& values, int64_t column = 0) {
    GFL_EACH_GROUP {
      if (groups[u].together) {
        write_lanes(r + groups[u].first, values[u], column);
        continue;
      }
      for (int i = 0; i < groups[u].lanes; ++i) {
        *losses(r + groups[u].row(i), column) = values[u][i];
      }
    }
  }
  void write_lanes(int64_t row, V values, int64_t column = 0) {
    if (p_.loss.row[inner_] == 1) return store(losses(row, column), values);
    for (int i = 0; i < kN; ++i) *losses(row + i, column) = values[i];
  }
  Vs upstream(int64_t r, const Group* groups, int64_t column) const {
    const Operand& o = p_.grad_loss;
    const A* const from = reinterpret_cast<const A*>(o.data) + at(o, r) + column * o.column;
    Vs v;
    GFL_EACH_GROUP {
      if (groups[u].together && o.row[inner_] == 1) {
        v[u] = load(from + groups[u].first);
      } else {
        for (int i = 0; i < kN; ++i) v[u][i] = from[at(o, groups[u].row(i))];
      }
    }
    return v;
  }
  static Vs gather(const A* values, const Group* groups) {
    Vs v;
    GFL_EACH_GROUP {
      if (groups[u].together) {
        v[u] = load(values + groups[u].first);
      } else {
        for (int i = 0; i < kN; ++i) v[u][i] = values[groups[u].rows[i]];
      }
    }
    return v;
  }
  static void fill(A* values, int n, A value) {
    for (int i = 0; i < n; ++i) values[i] = value;
  }

  const DistributionProblem& p_;
  const int inner_;
  const int64_t bins_;
  bool flat_;
  // Exponentials, gradients and the bins' values, with a vector's room behind.
  A *e_, *g_, *y_;
  A total_[kFlatRows];
  Vs* z_;        // [bins] one lane per row: logits, then exponentials, then gradients
  Vs* more_[3];  // [bins] of what else a row needs
  A weight_[kRows], left_[kRows], wl_[kRows], wr_[kRows];
  int64_t index_[kRows + 1];
};

double distribution(const DistributionProblem& problem, int64_t begin, int64_t count,
                    void* scratch) {
  const FlushDenormals flush(true);
  switch (problem.pred.dtype) {
    case GFL_FLOAT32:
      return Distribution<float>(problem, scratch).run(begin, count);
    case GFL_FLOAT64:
      return Distribution<double>(problem, scratch).run(begin, count);
    case GFL_BFLOAT16:
      return Distribution<bfloat16>(problem, scratch).run(begin, count);
    default:
      return Distribution<float16>(problem, scratch).run(begin, count);
  }
}

}  // namespace

#define GFL_TABLE_baseline kBaseline
#define GFL_TABLE_avx2 kAvx2
#define GFL_TABLE_avx512 kAvx512
extern const KernelTable GFL_CONCAT(GFL_TABLE_, GFL_ISA) = {GFL_STRING(GFL_ISA),
                                                            &quality,
                                                            &distribution,
                                                            &GFL_CONCAT(head_, GFL_ISA),
                                                            &GFL_CONCAT(decode_, GFL_ISA),
                                                            &GFL_CONCAT(distillation_, GFL_ISA)};

}  // namespace gfl
