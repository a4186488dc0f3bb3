// The distribution family on a CPU, compiled once per instruction set (GFL_ISA names it): losses
// and summaries of rows of bins.
//
// Distribution runs over the bins of as many rows as a vector has lanes, one row per lane, so that
// no reduction crosses lanes; rows whose bins are contiguous are transposed on the way in and out.
//
// Only internal linkage and no std templates in here: the linker may keep one copy of a shared
// inline function for all instruction sets.

// clang-format off: math.h is written in the primitives that simd.h declares
#include "kernels.h"
#include "flat.h"
#include "../math.h"
// clang-format on

namespace gfl {
namespace {

#define GFL_EACH_GROUP _Pragma("GCC unroll 4") for (int u = 0; u < kGroups; ++u)

// What is done with bins once they are numbers of the type that is computed with: the same code for
// float32, bfloat16 and float16.
template <typename A>
class Bundle {
 protected:
  using V = Vector<A>;
  static constexpr int kN = kLanes<A>;
  static constexpr int kWays = 2;
  static constexpr int kRows = 256;  // rows whose targets and weights are looked at together

  explicit Bundle(const DistributionProblem& problem)
      : p_(problem), inner_(problem.ndim - 1), bins_(problem.bins) {}

  int64_t at(const Operand& o, int64_t row) const { return row * o.row[inner_]; }
  bool is_integral() const { return p_.kind == kExpectation; }
  // Forward writes p_.saved, backward reads it.
  bool saves() const { return p_.saved.data && p_.loss.data; }

  // weight_: the weight times the upstream gradient of each row of a block, and 1 up to a whole
  // vector. False if all are 1.
  bool load_weights(int64_t r, int n) {
    if (!p_.weight.data) fill(weight_, n, A(1));
    for (int i = n; i % kN; ++i) weight_[i] = 1;
    if (p_.weight.data) load_run(p_.weight, at(p_.weight, r), p_.weight.row[inner_], n, weight_);
    if (p_.grad_loss.data) {
      load_run(p_.grad_loss, at(p_.grad_loss, r), p_.grad_loss.row[inner_], n, wl_);
      // A row of weight 0 stays out whatever comes from upstream.
      for (int i = 0; i < n; ++i) weight_[i] = weight_[i] == 0 ? 0 : weight_[i] * wl_[i];
    }
    return p_.weight.data || p_.grad_loss.data;
  }

  // The rows of a block whose weight is not 0: how many, and which in index_ unless all.
  int list_active(int n) {
    V zeros{};
    for (int i = 0; i < n; i += kN) {
      zeros = zeros + select(load(weight_ + i) == A(0), broadcast<V>(A(1)), V{});
    }
    if (sum_lanes(zeros) == 0) return n;
    int active = 0;
    for (int i = 0; i < n; ++i) {
      index_[active] = i;
      active += weight_[i] != 0;
    }
    return active;
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
    if (p_.loss.data) write_values(p_.loss, r, groups, loss * static_cast<A>(p_.scale));
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
    }
    V total{};
    GFL_EACH_GROUP total = total + loss[u];
    return total;
  }

  template <bool kPeak>
  void integral_groups(int64_t r, const Group* groups) {
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
    if (p_.loss.data) write_values(p_.loss, r, groups, expectation);
    if (saves()) {
      write_values(p_.saved, r, groups, expectation);
      write_values(p_.saved, r, groups, Vs{}, 1);
    }
    if (p_.grad.data) {
      const Vs factor = inverse * gather(weight_, groups);
      each_bin([&](int64_t k, int) __attribute__((always_inline)) {
        z_[k] = expectation_grad(z_[k] * factor, broadcast<Vs>(values[k]), expectation);
      });
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
      write_values(p_.loss, r, groups, m.mean);
      write_values(p_.loss, r, groups, std, 1);
      write_values(p_.loss, r, groups, logarithm(sum) - m.mean_s, 2);
    }
    if (p_.grad.data) {
      m.by_mean = upstream(r, groups, 0);
      m.by_variance = upstream(r, groups, 1) * square_root_grad(std);
      m.by_entropy = upstream(r, groups, 2);
      each_bin([&](int64_t k, int) __attribute__((always_inline)) {
        z_[k] = moments_grad(z_[k] * inverse, broadcast<Vs>(values[k]), shifted[k], m);
      });
    }
  }

  // kTop: topk, known in advance; or 0: any.
  template <int kTop>
  void statistics_groups(int64_t r, const Group* groups) {
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
        write_values(p_.loss, r, groups, top[j], j);
        total = total + top[j];
      }
      if (p_.add_mean) write_values(p_.loss, r, groups, total * share, topk);
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

  // Rows without gaps: see flat.h.
  static constexpr int kFlatRows = 64;

  // Not inlined, which keeps the registers of all numbers of bins apart.
  template <int K>
  __attribute__((noinline)) V flat_loss(Bins<K> bins, int64_t r, int first, int n, A* grad) {
    using I = typename VectorTraits<V>::integer;
    // Of the left one of a row's two bins, its place; the exponentials of the two, and then what is
    // subtracted from them.
    decltype(I{}[0] + 0) at[kFlatRows];
    A pairs[2 * kFlatRows], shares[kFlatRows];
    I starts;
    for (int l = 0; l < kN; ++l) starts[l] = static_cast<int>(l * bins);
    const A last = static_cast<A>(bins - 1);
    for (int g = 0; g < n; g += kN) {
      // The last bin as the right one of two, so that both are in the row.
      A *const wl_at = wl_ + first + g, *const wr_at = wr_ + first + g;
      const V left = load(left_ + first + g), wl = load(wl_at);
      const auto at_last = left >= last;
      const V inside = select(at_last, broadcast<V>(last - 1), left);
      store_raw(at + g, __builtin_convertvector(inside, I) + starts + static_cast<int>(g * bins));
      store(wl_at, select(at_last, V{}, wl));
      store(wr_at, select(at_last, wl, load(wr_at)));
    }
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) store_raw(pairs + 2 * i, load_raw<Two<A>>(e_ + at[i]));
    const A scale = static_cast<A>(p_.scale);
    V total{};
    for (int g = 0; g < n; g += kN) {
      const A* const e = e_ + g * bins;
      const V sum = flat_sums<V>(bins, [&](int i, int64_t k) __attribute__((always_inline)) {
        return load(e + i * bins + k);
      });
      A* const pair = pairs + 2 * g;
      V left = load(pair), right = load(pair + kN);
      unzip(left, right);
      const V wl = load(wl_ + first + g), wr = load(wr_ + first + g), w = load(weight_ + first + g);
      const V inverse = reciprocal(sum);
      const V loss =
          w * distribution_loss(V{}, wl, wr, logarithm(left * inverse), logarithm(right * inverse));
      if (p_.loss.data) write_lanes(p_.loss, r + first + g, loss * scale);
      total = total + loss;
      if (grad) {
        // The gradient is share (e_k - wl part [k = l] - wr part [k = r]), so what is written needs
        // no second look. Of weights that cancel a little is left, far below a rounding.
        V both = wl + wr;
        both = select(both == A(0), wl * A(sizeof(A) == 8 ? 0x1p-60 : 0x1p-30), both);
        const V part = select(both == A(0), V{}, sum / both);
        store(shares + g, both * (inverse * (w * scale)));
        left = wl * part;
        right = wr * part;
        zip(left, right);
        store(pair, left);
        store(pair + kN, right);
      }
    }
    if (grad) {
#pragma GCC unroll 4
      for (int i = 0; i < n; ++i) {
        A* const two = e_ + at[i];
        store_raw(two, load_raw<Two<A>>(two) - load_raw<Two<A>>(pairs + 2 * i));
      }
      for (int g = 0; g < n; g += kN) {
        const V share = load(shares + g);
        flat_grads(bins, e_ + g * bins, grad + g * bins, g + kN == n && grad != g_,
                   [&](V e, int64_t, const auto& each)
                       __attribute__((always_inline)) { return e * each(share); });
      }
    }
    return total;
  }

  template <int K>
  __attribute__((noinline)) V flat_integral(Bins<K> bins, int64_t r, int first, int n, A* grad) {
    for (int g = 0; g < n; g += kN) {
      const Sums<V> sums = moments_of_flat(bins, e_ + g * bins, y_);
      const V inverse = reciprocal(sums.sum), expectation = inverse * sums.moment;
      if (p_.loss.data) write_lanes(p_.loss, r + first + g, expectation);
      if (saves()) {
        write_lanes(p_.saved, r + first + g, expectation);
        write_lanes(p_.saved, r + first + g, shift_ == 0 ? inverse : V{}, 1);
      }
      if (grad) {
        const V factor = inverse * load(weight_ + first + g);
        flat_grads(bins, e_ + g * bins, grad + g * bins, g + kN == n && grad != g_,
                   [&](V e, int64_t i, const auto& each) __attribute__((always_inline)) {
                     return expectation_grad(e * each(factor), load(y_ + i), each(expectation));
                   });
      }
    }
    return V{};
  }

  // Whether forward saved what the gradients of n rows without gaps need.
  bool is_saved(int64_t r, int n) const {
    const Operand& o = p_.saved;
    if (!o.data || p_.loss.data || !p_.grad.data || o.row[inner_] != 1) return false;
    V missing{};
    for (int i = 0; i < n; i += kN) {
      const V inverse = load(value(o, r + i, 1));
      missing = missing + select(inverse == A(0), broadcast<V>(A(1)), V{});
    }
    return sum_lanes(missing) == 0;
  }

  // The integral's gradients of n rows that have been saved.
  template <int K, typename S>
  __attribute__((noinline)) void saved_grads(Bins<K> bins, int64_t r, int first, int n, const S* z,
                                             S* grad) {
    for (int g = 0; g < n; g += kN) {
      const A* const saved = value(p_.saved, r + first + g);
      const V expectation = load(saved),
              factor = load(saved + p_.saved.column) * load(weight_ + first + g);
      flat_grads(bins, z + g * bins, grad + g * bins, g + kN == n,
                 [&](V x, int64_t i, const auto& each) __attribute__((always_inline)) {
                   return expectation_grad(exponential<true>(x) * each(factor), load(y_ + i),
                                           each(expectation));
                 });
    }
  }

  // to = f(from, their bins' place in y_, each) for kN rows; each as in each_vector. last: no
  // memory behind these rows is theirs.
  template <int K, typename From, typename To, typename F>
  __attribute__((always_inline)) void flat_grads(Bins<K> bins, const From* from, To* to, bool last,
                                                 const F& f) {
    if constexpr (K > 0) {
      const auto whole = [&](const auto& put) __attribute__((always_inline)) {
        each_vector<V, K>([&](int i, const auto& each) __attribute__((always_inline)) {
          put(to + i, f(load(from + i), i, each));
        });
      };
      if constexpr (sizeof(To) == sizeof(A)) {
        if (streams_) {
          return whole([](To* p, V v) __attribute__((always_inline)) { stream(p, v); });
        }
      }
      whole([](To* p, V v) __attribute__((always_inline)) { store(p, v); });
    } else {
      // Row by row: the last vector of a row spills into the next, which comes after.
#pragma GCC unroll 16
      for (int i = 0; i < kN; ++i) {
        const auto each = [i](V by_row)
                              __attribute__((always_inline)) { return broadcast<V>(by_row[i]); };
        const int64_t row = i * bins;
        int64_t k = 0;
        for (; k + kN < bins; k += kN) store(to + row + k, f(load(from + row + k), k, each));
        if (last && i == kN - 1) {
          const int rest = static_cast<int>(bins - k);
          store_first(to + row + k, f(load_first(from + row + k, rest), k, each), rest);
        } else {
          store(to + row + k, f(load(from + row + k), k, each));
        }
      }
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

  A* value(const Operand& o, int64_t row, int64_t column = 0) const {
    return reinterpret_cast<A*>(o.data) + at(o, row) + column * o.column;
  }

  // A value per row of the groups, out to memory, in from upstream or from an array of the block.
  void write_values(const Operand& o, int64_t r, const Group* groups, const Vs& values,
                    int64_t column = 0) {
    GFL_EACH_GROUP {
      if (groups[u].together) {
        write_lanes(o, r + groups[u].first, values[u], column);
        continue;
      }
      for (int i = 0; i < groups[u].lanes; ++i) {
        *value(o, r + groups[u].row(i), column) = values[u][i];
      }
    }
  }
  void write_lanes(const Operand& o, int64_t row, V values, int64_t column = 0) {
    if (o.row[inner_] == 1) return store(value(o, row, column), values);
    for (int i = 0; i < kN; ++i) *value(o, row + i, column) = values[i];
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
  bool streams_ = false;  // gradients of rows without gaps go past the caches
  A shift_ = 0;           // of the exponentials of rows without gaps
  // Exponentials, gradients and the bins' values, these once for every lane if there are gradients,
  // with a vector's room behind.
  A *e_ = nullptr, *g_ = nullptr, *y_ = nullptr;
  Vs* z_;        // [bins] one lane per row: logits, then exponentials, then gradients
  Vs* more_[3];  // [bins] of what else a row needs
  A weight_[kRows], left_[kRows], wl_[kRows], wr_[kRows];
  int64_t index_[kRows + 1];
};

template <typename S>
class Distribution : Bundle<Accumulator<S>> {
  using A = Accumulator<S>;
  using Base = Bundle<A>;
  using V = typename Base::V;
  using Vs = typename Base::Vs;
  using Group = typename Base::Group;
  using Base::at, Base::is_integral;
  using Base::bins_, Base::e_, Base::g_, Base::index_, Base::inner_, Base::more_, Base::p_,
      Base::shift_, Base::streams_, Base::weight_, Base::y_, Base::z_;
  using Base::kFlatRows, Base::kGroups, Base::kN, Base::kRows;

 public:
  Distribution(const DistributionProblem& problem, void* memory) : Base(problem) {
    Scratch scratch(memory);
    z_ = scratch.take<Vs>(bins_);
    const bool plain = p_.kind == kTargetLoss || (is_integral() && p_.window < 0);
    flat_ = plain && has_flat_bins(bins_) && packed(p_.pred) && (!p_.grad.data || packed(p_.grad));
    if (!flat_) {
      for (Vs*& more : more_) more = scratch.take<Vs>(bins_);
      return;
    }
    e_ = scratch.take<A>(kFlatRows * bins_ + kN);
    if constexpr (sizeof(S) != sizeof(A)) {
      g_ = scratch.take<A>(kFlatRows * bins_ + kN);
    } else {
      streams_ = p_.big_grad && reinterpret_cast<uintptr_t>(p_.grad.data) % kVectorBytes == 0;
    }
    if (is_integral()) {
      y_ = repeat_values<A>(&scratch, p_.values, bins_, p_.grad.data ? kN : 1);
    }
  }

  double run(int64_t begin, int64_t count) {
    double total = 0;
    for (int64_t r = begin; r < begin + count; r += kRows) {
      total += block(r, smaller(kRows, begin + count - r));
    }
    if (streams_) flush_stream();
    return total;
  }

 private:
  double block(int64_t r, int64_t rows) {
    const int n = static_cast<int>(rows);
    // Rows of weight 0 are not read; the integral's value has no weight.
    const bool weighted =
        p_.kind < kStatistics && this->load_weights(r, n) && !(is_integral() && p_.loss.data);
    int active = n;
    if (weighted) {
      active = this->list_active(n);
      if (active < n) write_zeros(r, n);
    }
    if (p_.kind == kTargetLoss) this->load_targets(r, n);

    V total{};
    Group groups[kGroups];
    for (int g = 0, step; g < active; g += step) {
      step = kGroups * kN;
      if (flat_ && active == n && g % kFlatRows == 0) {
        const int rows = smaller(kFlatRows, (n - g) / kN * kN);
        const S* const z = logits(r + g);
        if (rows > 0 && this->is_saved(r + g, rows)) {
          with_bins(bins_,
                    [&](auto bins) { this->saved_grads(bins, r, g, rows, z, grads(r + g)); });
          step = rows;
          continue;
        }
        const S* const also = p_.grad.data && !streams_ ? grads(r + g) : z;
        if (rows > 0 && exponentials(z, also, rows * bins_, &shift_, e_)) {
          total = total + flat(r, g, rows);
          step = rows;
          continue;
        }
        flat_ = rows == 0;  // wide spreads have company: no more attempts in these rows
      }
      GFL_EACH_GROUP groups[u] = this->make_group(g, g + u * kN, active, active < n);
      load_logits(r, groups);
      if (p_.kind == kTargetLoss) {
        total = total + this->loss_groups(r, groups);
      } else if (p_.kind == kMoments) {
        this->moments_groups(r, groups);
      } else if (is_integral()) {
        p_.window < 0 ? this->template integral_groups<false>(r, groups)
                      : this->template integral_groups<true>(r, groups);
      } else {
        p_.topk == 4 ? this->template statistics_groups<4>(r, groups)
                     : this->template statistics_groups<0>(r, groups);
      }
      if (p_.grad.data) store_grads(r, groups);
    }
    return sum_lanes(total);
  }

  V flat(int64_t r, int first, int n) {
    constexpr bool direct = sizeof(S) == sizeof(A);
    S* const out = p_.grad.data ? grads(r + first) : nullptr;
    A* const grad = !out ? nullptr : direct ? reinterpret_cast<A*>(out) : g_;
    const V total = with_bins(bins_, [&](auto bins) {
      return is_integral() ? this->flat_integral(bins, r, first, n, grad)
                           : this->flat_loss(bins, r, first, n, grad);
    });
    if (!direct && out) {
      for (int64_t i = 0; i < n * bins_; i += kN) store(out + i, load(g_ + i));
    }
    return total;
  }

  const S* logits(int64_t row) const {
    return reinterpret_cast<const S*>(p_.pred.data) + at(p_.pred, row);
  }
  S* grads(int64_t row) const { return reinterpret_cast<S*>(p_.grad.data) + at(p_.grad, row); }

  // A group at a time: unrolled, the transpositions were a third of AVX-512's code.
  void load_logits(int64_t r, const Group* groups) {
#pragma GCC unroll 1
    for (int u = 0; u < kGroups; ++u) {
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
#pragma GCC unroll 1
    for (int u = 0; u < kGroups; ++u) {
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
      if (p_.loss.data) *this->value(p_.loss, r + i) = 0;
    }
  }

  bool flat_;
};

}  // namespace

double GFL_CONCAT(distribution_, GFL_ISA)(const DistributionProblem& problem, int64_t begin,
                                          int64_t count, void* scratch) {
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

}  // namespace gfl
