// The quality family on a CPU, compiled once per instruction set (GFL_ISA names it).
//
// quality_tile runs along elements that are contiguous in memory, whatever they are: rows of
// classes, or one class plane of an NCHW tensor. What is not contiguous, or not of the accumulation
// type, is staged through L1 first.
//
// Only internal linkage and no std templates in here, as in distribution.cpp.

// clang-format off: math.h is written in the primitives that simd.h declares
#include "kernels.h"
#include "rows.h"
#include "../math.h"
// clang-format on

namespace gfl {
namespace {

// Vectors that run abreast, at most. Long formulas keep the pipes busy with fewer, and compile
// faster; SSE has half as many registers.
constexpr int kQualityWays = kVectorBytes == 16 ? 2 : 4;

struct Background {  // beta = 2, q = 0
  static constexpr int kWays = kQualityWays;
  static constexpr bool kTarget = false;
  template <typename V>
  GFL_INLINE LossGrad<V> apply(const Background&, V x, V) {
    return quality_background_loss_grad(x);
  }
};
struct Square {  // beta = 2
  static constexpr int kWays = kQualityWays;
  static constexpr bool kTarget = true;
  template <typename V>
  GFL_INLINE LossGrad<V> apply(const Square&, V x, V q) {
    return quality_square_loss_grad(x, q);
  }
};
struct CrossEntropyBackground {  // beta = 0, q = 0
  static constexpr int kWays = kQualityWays;
  static constexpr bool kTarget = false;
  template <typename V>
  GFL_INLINE LossGrad<V> apply(const CrossEntropyBackground&, V x, V) {
    return background_loss_grad(x, scalar_t<V>(1), scalar_t<V>(0), true);
  }
};
struct CrossEntropy {  // beta = 0
  static constexpr int kWays = kQualityWays;
  static constexpr bool kTarget = true;
  template <typename V>
  GFL_INLINE LossGrad<V> apply(const CrossEntropy&, V x, V q) {
    return bce_with_logits_loss_grad(x, q);
  }
};
// q of an element of a row with a label that is not the label's.
template <typename S>
constexpr S kNoLabel = -static_cast<S>(__builtin_inf());

// Any form: positive is what has a q above `above`.
template <int kForm>
struct Form {
  static constexpr int kWays =
      kForm == GFL_VARIFOCAL || kForm == GFL_FOCAL ? kQualityWays : kQualityWays / 2;
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
  static constexpr int kWays = kQualityWays;
  static constexpr bool kTarget = false;
  double alpha, beta;
  bool detach;
  template <typename V>
  GFL_INLINE LossGrad<V> apply(const Others& f, V x, V) {
    using A = scalar_t<V>;
    return background_loss_grad(x, static_cast<A>(f.alpha), static_cast<A>(f.beta), f.detach);
  }
};

// n contiguous elements: logits, targets and weights, the gradient's and the weighted losses'
// places. All but x may be null; factor is one of every gradient. next: the logits and gradients of
// the run after this one, fetched meanwhile: it begins where no prefetcher knows.
template <typename S, typename A>
struct Run {
  const S* x;
  const A *q, *w;
  S* grad;
  A* losses;
  int64_t n;
  A factor;
  const S *next = nullptr, *next_grad = nullptr;

  Run part(int64_t begin, int64_t end) const {
    const auto from = [&](auto* values) { return values ? values + begin : values; };
    return {from(x),     from(q), from(w),    from(grad),     from(losses),
            end - begin, factor,  from(next), from(next_grad)};
  }
};

// The sum of the weighted losses.
template <bool kWeight, bool kGrad, typename Formula, typename S, typename A>
double quality_tile(const Formula& formula, const Run<S, A>& run) {
  const auto [x, q, w, grad, losses, n, factor, next, next_grad] = run;
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
  constexpr int ways = sizeof(A) == 8 ? 1 : Formula::kWays;
  Wide<V, ways> sums{};
  int64_t i = 0;
  for (; i + ways * lanes <= n; i += ways * lanes) {
    for (int u = 0; next && u < ways * lanes; u += 64 / static_cast<int>(sizeof(S))) {
      __builtin_prefetch(next + i + u);
      if constexpr (kGrad) __builtin_prefetch(next_grad + i + u, 1);
    }
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

// What a loop reads or writes that the caller has not: weights of 1, a place for gradients.
template <typename S, typename A>
struct Stand {
  const A* ones;
  S* sink;
};

// The loop over a run in as many variants as a formula and a type are worth: each takes half a
// second to compile, for every type and instruction set. double has one.
template <typename Formula, typename S, typename A>
double full_tile(const Formula& f, const Stand<S, A>& stand, Run<S, A> run) {
  if (!run.w) run.w = stand.ones;
  if (!run.grad) {
    run.grad = stand.sink;
    run.next_grad = stand.sink;
  }
  return quality_tile<true, true>(f, run);
}
template <typename Formula, typename S, typename A>
double weighted_tile(const Formula& f, const Stand<S, A>& stand, Run<S, A> run) {
  if (sizeof(A) == 8 || run.grad) return full_tile(f, stand, run);
  if (!run.w) run.w = stand.ones;
  if constexpr (sizeof(A) == 4) return quality_tile<true, false>(f, run);
}
template <typename Formula, typename S, typename A>
double tile(const Formula& f, const Stand<S, A>& stand, const Run<S, A>& run) {
  if (sizeof(A) == 8 || run.w) return weighted_tile(f, stand, run);
  if constexpr (sizeof(A) == 4) {
    return run.grad ? quality_tile<false, true>(f, run) : quality_tile<false, false>(f, run);
  }
}

// Elements with targets, in any form.
template <typename A>
double tile_of_form(const QualityProblem& p, double above, const Stand<A, A>& stand,
                    const Run<A, A>& run) {
  if (p.form == GFL_LOGITS && p.beta == 0) return tile(CrossEntropy{}, stand, run);
  switch (p.form) {
#define GFL_FORM(code, loop) \
  case code:                 \
    return loop(Form<code>{p.flags, p.alpha, p.beta, above}, stand, run)
    GFL_FORM(GFL_LOGITS, full_tile);
    GFL_FORM(GFL_PROBABILITIES, full_tile);
    GFL_FORM(GFL_VARIFOCAL, tile);
    GFL_FORM(GFL_FOCAL, weighted_tile);
    GFL_FORM(GFL_VARIFOCAL_PROBABILITIES, full_tile);
    GFL_FORM(GFL_FOCAL_PROBABILITIES, full_tile);
    GFL_FORM(GFL_MATCHABILITY, full_tile);
    GFL_FORM(GFL_IOU_AWARE, full_tile);
    GFL_FORM(GFL_BALANCED, full_tile);
#undef GFL_FORM
  }
  return 0;
}

template <typename S>
class Quality {
  using A = Accumulator<S>;
  static constexpr bool kWide = sizeof(S) == sizeof(A);

 public:
  Quality(const QualityProblem& problem, void* memory) : p_(problem), inner_(problem.ndim - 1) {
    Scratch scratch(memory);
    const int64_t n = tile_elements(p_.classes);
    x_ = scratch.take<S>(n);
    grad_ = scratch.take<S>(n);
    q_ = scratch.take<A>(n);
    w_ = scratch.take<A>(n);
    losses_ = scratch.take<A>(n);
    wide_x_ = scratch.take<A>(n);
    wide_grad_ = scratch.take<A>(n);
    ones_ = scratch.take<A>(n);
    if (in_planes(p_)) turned_ = scratch.take<A>(kTurned * kPlaneRows);
    row_weight_ = scratch.take<A>(n);
    row_score_ = scratch.take<A>(n);
    row_loss_ = scratch.take<A>(n);
    label_ = scratch.take<int64_t>(n);
    first_ = scratch.take<int64_t>(n + 2);
    hits_ = scratch.take<int64_t>(n);
    square_ = p_.beta == 2 && p_.form == GFL_LOGITS;
    if (!square_ || sizeof(A) == 8) fill(ones_, n, 1);  // else its loops need none
    const bool by_label = p_.score.data && has_positives(p_.form);
    no_label_ = by_label ? kNoLabel<A> : 0;
    above_ = by_label ? kNoLabel<double> : 0;
    cross_entropy_ = p_.beta == 0 && p_.form == GFL_LOGITS;
    // QFL with other exponents has a formula that is more careful than Others.
    has_background_ =
        square_ || cross_entropy_ || !(on_probabilities(p_.form) || p_.form == GFL_LOGITS);
    others_ = {background_alpha(p_.form, p_.alpha), p_.beta, detaches_weight(p_.form, p_.flags)};
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
    const Run<S, A> run{x, q, w, grad, p_.loss.data ? losses_ : nullptr, n, factor};
    const double sum = p_.score.data ? tile_with_hits(hits_, hits, run) : tile_of_targets(run);
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
    const bool in_place = p_.target.dtype == kDtype<A> && p_.target.row[inner_] == 1;
    const bool in_rows = p_.target.dtype == kDtype<A> && p_.target.column == 1 && !in_place;
    const bool sparse = find_hits(r, rows, in_rows);
    const bool spread = !uniform_ && !p_.weight_per_class;
    const A factor = static_cast<A>(uniform_ ? p_.scale * row_weight_[0] : p_.scale);
    const double loss_factor = uniform_ ? row_weight_[0] : 1;
    if (p_.loss.data) memset(row_loss_, 0, rows * sizeof(A));
    double total = 0;
    for (int64_t c = 0; c < classes; ++c) {
      const A* q = q_;
      const int64_t *const hit = hits_ + first_[c], *const last = hits_ + first_[c + 1];
      if (sparse) {
        for (const int64_t* h = hit; h < last; ++h) q_[*h] = row_score_[*h];
      } else if (in_place) {
        q = reinterpret_cast<const A*>(p_.target.data) + at(p_.target, r) + c * p_.target.column;
      } else if (in_rows) {
        if (c % kTurned == 0) turn_targets(r, rows, c);
        q = turned_ + c % kTurned * kPlaneRows;
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
      Run<S, A> run{x, q, w, grad, p_.loss.data ? losses_ : nullptr, rows, factor};
      if (c + 1 < classes) {
        run.next = x + p_.pred.column;
        run.next_grad = grad ? grad + p_.grad.column : nullptr;
      }
      total += sparse ? tile_with_hits(hit, last - hit, run) : tile_of_targets(run);
      if (p_.loss.data) {
        for (int64_t i = 0; i < rows; ++i) row_loss_[i] += losses_[i];
      }
      if (sparse) {
        for (const int64_t* h = hit; h < last; ++h) q_[*h] = no_label_;
      }
    }
    for (int64_t i = 0; i < rows && p_.loss.data; ++i)
      write_loss(r + i, row_loss_[i] * loss_factor);
    return total * loss_factor;
  }

  // hits_[first_[c], first_[c + 1]): the rows with a target in class c, ascending; row_score_:
  // their targets. False, and no hits, if the targets are to be read class by class; up to kTurned
  // classes are turned in one pass.
  bool find_hits(int64_t r, int64_t rows, bool in_rows) {
    memset(first_, 0, (p_.classes + 2) * sizeof(int64_t));
    if (p_.score.data) {
      load_labels(p_.target, at(p_.target, r), p_.target.row[inner_], rows, p_.classes, label_);
      load_run(p_.score, at(p_.score, r), p_.score.row[inner_], rows, row_score_);
    } else if (!in_rows || p_.classes <= kTurned || !find_labels(r, rows)) {
      return false;
    }
    int64_t* const ends = first_ + 1;
    for (int64_t i = 0; i < rows; ++i) {
      if (label_[i] >= 0) ++ends[label_[i] + 1];
    }
    for (int64_t c = 1; c <= p_.classes; ++c) ends[c] += ends[c - 1];
    for (int64_t i = 0; i < rows; ++i) {
      if (label_[i] >= 0) hits_[ends[label_[i]]++] = i;
    }
    fill(q_, rows, no_label_);
    return true;
  }

  // label_ and row_score_ of rows of classes with at most one target that is not 0, as assigners
  // make them. False if a row has two, or so many have one that the targets are better turned.
  bool find_labels(int64_t r, int64_t rows) {
    int64_t found = 0;
    for (int64_t i = 0; i < rows; ++i) {
      const A* const row = reinterpret_cast<const A*>(p_.target.data) + at(p_.target, r + i);
      const int64_t place = find_target(row, p_.classes);
      found += place > 0;
      if (place < 0 || found * 4 > rows) return false;
      label_[i] = place - 1;
      if (place > 0) row_score_[i] = row[place - 1];
    }
    return true;
  }
  // The place, counted from 1, of the only one of n values that is not 0; 0 if all are, -1 if
  // several are not.
  static int64_t find_target(const A* values, int64_t n) {
    constexpr int64_t lanes = kLanes<A>;
    using I = typename VectorTraits<Vector<A>>::integer;
    I places{}, count{}, place;
    for (int l = 0; l < lanes; ++l) place[l] = l + 1;
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) {
      const I some = load(values + i) != A(0);
      places |= some & place;
      count -= some;
      place += lanes;
    }
    int64_t at = 0, found = 0;
    for (int l = 0; l < lanes; ++l) {
      at += places[l];
      found += count[l];
    }
    for (; i < n; ++i) {
      if (values[i] == 0) continue;
      at = i + 1;
      ++found;
    }
    return found > 1 ? -1 : at;
  }

  // rows x classes values of an operand with a value per element, packed.
  void stage(const Operand& o, int64_t r, int64_t rows, A* to) {
    for (int64_t i = 0; i < rows; ++i) {
      load_run(o, at(o, r + i), o.column, p_.classes, to + i * p_.classes);
    }
  }

  // turned_: the targets of classes [c, c + kTurned), class by class, out of rows of classes.
  void turn_targets(int64_t r, int64_t rows, int64_t c) {
    constexpr int lanes = kLanes<A>;
    static_assert(kPlaneRows % lanes == 0);
    const A* const first = reinterpret_cast<const A*>(p_.target.data) + at(p_.target, r) + c;
    for (int64_t i = 0; i < rows; i += lanes) {
      rows_to_lanes<A>(
          smaller(kTurned, p_.classes - c), 1,
          [&](int lane) __attribute__((always_inline)) {
            return first + at(p_.target, smaller(i + lane, rows - 1));
          },
          [&](int64_t k, Vector<A> column)
              __attribute__((always_inline)) { store(turned_ + k * kPlaneRows + i, column); });
    }
  }

  // The elements hit[0, hits), ascending, have targets, which are in q_; all others are background,
  // for which q_ holds no_label_ if there is a hit.
  double tile_with_hits(const int64_t* hit, int64_t hits, const Run<S, A>& run) {
    // Only the vectors that run abreast with a hit need the formula with a target.
    constexpr int64_t group = kQualityWays * kLanes<A>;
    if (!has_background_ || hits * group > run.n) return tile_of_targets(run);
    double sum = 0;
    int64_t done = 0;
    const auto part = [&](bool background, int64_t end) {
      if (done == end) return;
      const Run<S, A> some = run.part(done, end);
      sum += background ? tile_of_background(some) : tile_of_targets(some);
      done = end;
    };
    for (int64_t h = 0; h < hits; ++h) {
      if (hit[h] < done) continue;
      part(true, hit[h] / group * group);
      part(false, smaller(done + group, run.n));
    }
    part(true, run.n);
    return sum;
  }

  double tile_of_targets(const Run<S, A>& run) {
    if (square_) return tile(Square{}, Stand<S, A>{ones_, grad_}, run);
    return widened(run, [&](const auto& stand, const Run<A, A>& wide) {
      return tile_of_form(p_, above_, stand, wide);
    });
  }
  double tile_of_background(const Run<S, A>& run) {
    if (square_) return tile(Background{}, Stand<S, A>{ones_, grad_}, run);
    return widened(run, [&](const auto& stand, const Run<A, A>& wide) {
      if (cross_entropy_) return tile(CrossEntropyBackground{}, stand, wide);
      return weighted_tile(others_, stand, wide);
    });
  }

  // All but the commonest formulas are compiled for float and double alone: half logits and
  // gradients are staged.
  template <typename Loop>
  double widened(const Run<S, A>& run, const Loop& loop) {
    const Stand<A, A> stand{ones_, wide_grad_};
    if constexpr (kWide) {
      return loop(stand, run);
    } else {
      copy(run.x, wide_x_, run.n);
      A* const grad = run.grad ? wide_grad_ : nullptr;
      const double sum = loop(stand, {wide_x_, run.q, run.w, grad, run.losses, run.n, run.factor});
      if (run.grad) copy(grad, run.grad, run.n);
      return sum;
    }
  }
  template <typename From, typename To>
  static void copy(const From* from, To* to, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes<A> <= n; i += kLanes<A>) store(to + i, load(from + i));
    const int rest = static_cast<int>(n - i);
    if (rest > 0) store_first(to + i, load_first(from + i, rest), rest);
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
  bool square_, cross_entropy_, has_background_, uniform_ = true, some_zero_ = false;
  A no_label_;
  double above_;
  Others others_;
  S *x_, *grad_;
  A *q_, *w_, *losses_, *wide_x_, *wide_grad_, *ones_, *turned_, *row_weight_, *row_score_,
      *row_loss_;
  int64_t *label_, *first_, *hits_;
};

}  // namespace

double GFL_CONCAT(quality_, GFL_ISA)(const QualityProblem& problem, int64_t begin, int64_t count,
                                     void* scratch) {
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

}  // namespace gfl
