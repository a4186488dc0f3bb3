// The C functions of gfl_kernels.h: checks what memory safety needs, merges dimensions, cuts the
// rows into blocks and runs them on libtorch's threads. ops.cpp goes through here too.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "error.h"
#include "gfl_kernels/gfl_kernels.h"
#include "kernels.h"

namespace gfl {

namespace {
thread_local std::string last_error;
}

void set_error(std::string message) { last_error = std::move(message); }

namespace {

constexpr double kEps =
    1.1920928955078125e-07;  // eps(float32), which mmdetection adds to avg_factor
// Elements of a block; a block's sum does not depend on the number of threads, nor does the order
// of the blocks.
constexpr int64_t kBlock = 16 * kTile;
// Elements that are worth a thread: below twice that the call stays on one.
constexpr int64_t kGrain = 50000;

std::string shape_of(const int64_t* sizes, int n) {
  std::string text(1, '(');
  for (int i = 0; i < n; ++i) {
    if (i) text += ", ";
    text += std::to_string(sizes[i]);
  }
  return text + ")";
}

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

int64_t element_bytes(gfl_dtype dtype) {
  switch (dtype) {
    case GFL_FLOAT64:
    case GFL_INT64:
      return 8;
    case GFL_FLOAT32:
    case GFL_INT32:
      return 4;
    case GFL_BFLOAT16:
    case GFL_FLOAT16:
    case GFL_INT16:
      return 2;
    default:
      return 1;
  }
}

bool is_float(gfl_dtype dtype) { return dtype <= GFL_FLOAT16; }

gfl_dtype accumulator(gfl_dtype dtype) { return dtype == GFL_FLOAT64 ? GFL_FLOAT64 : GFL_FLOAT32; }

// The rows of a problem while it is put together: an operand per tensor, dimensions as in pred.
class Problem {
 public:
  Problem(const char* op, const gfl_view* pred, const char* columns) : op_(op) {
    if (!pred) fail(op_ + ": pred is missing");
    if (pred->ndim < 1) fail(op_ + ": pred must have shape (..., " + columns + "), got ()");
    if (!is_float(pred->dtype)) fail(op_ + ": pred must be float32, float64, bfloat16 or float16");
    pred_ = pred;
    ndim_ = pred->ndim - 1;
    columns_ = pred->sizes[ndim_];
    for (int d = 0; d < ndim_; ++d) rows_ *= pred->sizes[d];
  }

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }

  // A value per row, or per row and column, or (scalar) one for all.
  void add(const char* name, const gfl_view* view, Operand* operand, bool per_column,
           bool scalar = false) {
    *operand = Operand{};
    if (!view) return;
    if (scalar && view->ndim == 0) {
      entries_[count_++] = {view, operand, 0};
    } else {
      const int dims = ndim_ + per_column;
      bool same = view->ndim == dims;
      for (int d = 0; same && d < dims; ++d) same = view->sizes[d] == pred_->sizes[d];
      if (!same) {
        fail(op_ + ": " + name + " must have shape " + shape_of(pred_->sizes, dims) + ", got " +
             shape_of(view->sizes, view->ndim));
      }
      entries_[count_++] = {view, operand, ndim_};
    }
    operand->data = static_cast<char*>(view->data);
    operand->dtype = view->dtype;
    operand->column = per_column && columns_ > 1 ? view->strides[ndim_] : (per_column ? 1 : 0);
  }

  void need_dtype(const char* name, const gfl_view* view, gfl_dtype dtype) const {
    if (view && view->dtype != dtype) fail(op_ + ": " + name + " has the wrong dtype");
  }

  // The gradient is of pred's dtype, a loss and what comes from upstream of the accumulator's.
  void check_results(const gfl_view* grad, const gfl_view* loss, const gfl_view* grad_loss) const {
    need_dtype("grad", grad, pred_->dtype);
    need_dtype("loss", loss, accumulator(pred_->dtype));
    need_dtype("grad_loss", grad_loss, accumulator(pred_->dtype));
    if (loss && grad_loss) fail(op_ + ": a loss has no upstream gradient: ask for one of them");
  }

  // Dimensions of size 1 drop out; neighbours that step together in every operand become one.
  void merge(int* ndim, int64_t* size) {
    int n = 0;
    for (int d = 0; d < ndim_; ++d) {
      const int64_t extent = pred_->sizes[d];
      if (extent == 1) continue;
      bool joins = n > 0;
      for (const Entry& e : std::span(entries_, count_))
        joins = joins && e.operand->row[n - 1] == e.stride(d) * extent;
      if (!joins) {
        if (n == kMaxDims)
          fail(op_ + ": more than " + std::to_string(kMaxDims) + " separate row dimensions");
        size[n++] = 1;
      }
      size[n - 1] *= extent;
      for (const Entry& e : std::span(entries_, count_)) e.operand->row[n - 1] = e.stride(d);
    }
    if (n == 0) {
      size[n++] = 1;
      for (const Entry& e : std::span(entries_, count_)) e.operand->row[0] = 0;
    }
    *ndim = n;
  }

 private:
  struct Entry {
    const gfl_view* view;
    Operand* operand;
    int dims;  // 0 for a scalar
    int64_t stride(int d) const { return dims ? view->strides[d] : 0; }
  };

  std::string op_;
  const gfl_view* pred_;
  int ndim_;
  int64_t columns_ = 0, rows_ = 1;
  Entry entries_[10];
  int count_ = 0;
};

double scale_of(double scale, const gfl_view* avg_factor) {
  if (!avg_factor) return scale;
  int64_t count = 1;
  for (int d = 0; d < avg_factor->ndim; ++d) count *= avg_factor->sizes[d];
  if (count != 1) fail("avg_factor must have one element, got " + std::to_string(count));
  const auto divide = [&](auto value) { return scale / (static_cast<double>(value) + kEps); };
  const void* const p = avg_factor->data;
  switch (avg_factor->dtype) {
    case GFL_FLOAT32:
      return divide(*static_cast<const float*>(p));
    case GFL_FLOAT64:
      return divide(*static_cast<const double*>(p));
    case GFL_BFLOAT16: {
      const uint32_t bits = uint32_t{*static_cast<const uint16_t*>(p)} << 16;
      float value;
      std::memcpy(&value, &bits, sizeof value);
      return divide(value);
    }
    case GFL_FLOAT16: {
      const int bits = *static_cast<const uint16_t*>(p), exponent = bits >> 10 & 0x1f,
                mantissa = bits & 0x3ff;
      const double size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                          : exponent     ? std::ldexp(1024 + mantissa, exponent - 25)
                                         : std::ldexp(mantissa, -24);
      return divide(bits & 0x8000 ? -size : size);
    }
    case GFL_INT64:
      return divide(*static_cast<const int64_t*>(p));
    case GFL_INT32:
      return divide(*static_cast<const int32_t*>(p));
    case GFL_INT16:
      return divide(*static_cast<const int16_t*>(p));
    case GFL_INT8:
      return divide(*static_cast<const int8_t*>(p));
    case GFL_UINT8:
      return divide(*static_cast<const uint8_t*>(p));
    case GFL_BOOL:
      return divide(*static_cast<const bool*>(p));
  }
  fail("avg_factor has an unknown dtype");
}

// Memory of this thread for the kernels' tiles, aligned to 64. Kept: a hundred kilobytes taken from
// and given back to malloc at every call can cost more than a small call itself.
void* thread_scratch(int64_t bytes) {
  thread_local std::unique_ptr<char[]> memory;
  thread_local int64_t size = 0;
  if (size < bytes + 64) {
    memory.reset(new char[bytes + 64]);
    size = bytes + 64;
  }
  return memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64);
}

// Runs kernel over all rows, block by block, and adds the blocks' sums in their order.
template <typename P, typename... Operands>
double run_blocks(double (*kernel)(const P&, int64_t, int64_t, void*), const P& problem,
                  int64_t columns, Operands P::*... operands) {
  const int inner = problem.ndim - 1;
  const int64_t length = problem.size[inner];
  int64_t outer = 1;
  for (int d = 0; d < inner; ++d) outer *= problem.size[d];
  const int64_t step = std::max<int64_t>(1, kBlock / columns);
  const int64_t per_run = (length + step - 1) / step, blocks = outer * per_run;
  if (blocks == 0) return 0;

  const auto body = [&](int64_t begin, int64_t end, double* sums) {
    void* const scratch = thread_scratch(scratch_bytes(columns));
    P moved = problem;
    for (int64_t b = begin; b < end; ++b) {
      int64_t rest = b / per_run;
      const auto move = [&](const Operand& from, Operand* to) {
        if (!from.data) return;
        int64_t offset = 0, index = rest;
        for (int d = inner - 1; d >= 0; --d) {
          offset += index % problem.size[d] * from.row[d];
          index /= problem.size[d];
        }
        to->data = from.data + offset * element_bytes(from.dtype);
      };
      if (inner > 0) (move(problem.*operands, &(moved.*operands)), ...);
      const int64_t first = b % per_run * step;
      sums[b] = kernel(moved, first, std::min(step, length - first), scratch);
    }
  };
  if (blocks == 1) {
    double sum;
    body(0, 1, &sum);
    return sum;
  }
  std::vector<double> sums(blocks);
  const int64_t grain =
      std::max<int64_t>(1, kGrain / std::max<int64_t>(1, std::min(step, length) * columns));
  torch::stable::parallel_for(0, blocks, grain,
                              [&](int64_t begin, int64_t end) { body(begin, end, sums.data()); });
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

void write_scalar(const gfl_view* view, double value) {
  if (view->dtype == GFL_FLOAT64) {
    *static_cast<double*>(view->data) = value;
  } else {
    *static_cast<float*>(view->data) = static_cast<float>(value);
  }
}

const KernelTable& table() {
  const KernelTable* const kernels_ = kernels();
  if (!kernels_) fail(last_error);
  return *kernels_;
}

template <typename F>
int guarded(F&& f) {
  try {
    f();
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    return 1;
  }
}

}  // namespace
}  // namespace gfl

extern "C" int gfl_quality_cpu(const gfl_quality_args* args) {
  using namespace gfl;
  return guarded([&] {
    QualityProblem q;
    Problem problem("gfl_quality_cpu", args->pred, "C");
    if (!args->target) fail("gfl_quality_cpu: target is missing");
    q.weight_per_class = args->weight && args->weight->ndim == args->pred->ndim;
    const bool per_row = args->loss && args->loss->ndim > 0;
    problem.add("pred", args->pred, &q.pred, true);
    problem.add("target", args->target, &q.target, !args->score);
    problem.add("score", args->score, &q.score, false);
    problem.add("weight", args->weight, &q.weight, q.weight_per_class);
    problem.add("grad_loss", args->grad_loss, &q.grad_loss, false, true);
    problem.add("loss", per_row ? args->loss : nullptr, &q.loss, false);
    problem.add("grad", args->grad, &q.grad, true);
    problem.check_results(args->grad, args->loss, args->grad_loss);
    if (problem.columns() < 1) fail("gfl_quality_cpu: pred must have at least one class");
    problem.merge(&q.ndim, q.size);
    q.classes = problem.columns();
    q.probabilities = args->form == GFL_PROBABILITIES;
    q.beta = args->beta;
    q.scale = scale_of(args->scale, args->avg_factor);
    using Q = QualityProblem;
    const double sum = run_blocks(table().quality, q, q.classes, &Q::pred, &Q::target, &Q::score,
                                  &Q::weight, &Q::grad_loss, &Q::loss, &Q::grad);
    if (args->loss && !per_row) write_scalar(args->loss, sum * q.scale);
  });
}

extern "C" int gfl_distribution_cpu(const gfl_distribution_args* args) {
  using namespace gfl;
  return guarded([&] {
    DistributionProblem d;
    Problem problem("gfl_distribution_cpu", args->pred, "K");
    if (!args->target) fail("gfl_distribution_cpu: target is missing");
    if (!args->weight_left != !args->weight_right) {
      fail("gfl_distribution_cpu: weight_left and weight_right come together");
    }
    const bool per_row = args->loss && args->loss->ndim > 0;
    problem.add("pred", args->pred, &d.pred, true);
    problem.add("target", args->target, &d.target, false);
    problem.add("weight_left", args->weight_left, &d.weight_left, false);
    problem.add("weight_right", args->weight_right, &d.weight_right, false);
    problem.add("weight", args->weight, &d.weight, false);
    problem.add("grad_loss", args->grad_loss, &d.grad_loss, false, true);
    problem.add("loss", per_row ? args->loss : nullptr, &d.loss, false);
    problem.add("grad", args->grad, &d.grad, true);
    problem.check_results(args->grad, args->loss, args->grad_loss);
    if (problem.columns() < 1) fail("gfl_distribution_cpu: pred must have at least one bin");
    problem.merge(&d.ndim, d.size);
    d.bins = problem.columns();
    d.scale = scale_of(args->scale, args->avg_factor);
    using D = DistributionProblem;
    const double sum =
        run_blocks(table().distribution, d, d.bins, &D::pred, &D::target, &D::weight_left,
                   &D::weight_right, &D::weight, &D::grad_loss, &D::loss, &D::grad);
    if (args->loss && !per_row) write_scalar(args->loss, sum * d.scale);
  });
}

extern "C" int gfl_integral_cpu(const gfl_integral_args* args) {
  using namespace gfl;
  return guarded([&] {
    DistributionProblem d;
    Problem problem("gfl_integral_cpu", args->pred, "K");
    const gfl_dtype dtype = accumulator(args->pred->dtype);
    problem.add("pred", args->pred, &d.pred, true);
    problem.add("grad_out", args->grad_out, &d.grad_loss, false);
    problem.add("out", args->out, &d.loss, false);
    problem.add("grad", args->grad, &d.grad, true);
    problem.need_dtype("grad", args->grad, args->pred->dtype);
    problem.need_dtype("out", args->out, dtype);
    problem.need_dtype("grad_out", args->grad_out, dtype);
    if (args->grad && !args->grad_out) fail("gfl_integral_cpu: grad needs grad_out");
    if (problem.columns() < 1) fail("gfl_integral_cpu: pred must have at least one bin");
    problem.merge(&d.ndim, d.size);
    d.bins = problem.columns();
    d.scale = 1;

    // The kernels want the bins' values packed and in the type they compute in.
    std::vector<double> values(d.bins);
    if (const gfl_view* const bins = args->bins) {
      if (bins->ndim != 1 || bins->sizes[0] != d.bins) {
        fail("gfl_integral_cpu: bins must have shape (" + std::to_string(d.bins) + "), got " +
             shape_of(bins->sizes, bins->ndim));
      }
      if (bins->dtype != dtype) fail("gfl_integral_cpu: bins must have the dtype of the result");
      for (int64_t k = 0; k < d.bins; ++k) {
        const int64_t at = k * bins->strides[0];
        values[k] = dtype == GFL_FLOAT64 ? static_cast<const double*>(bins->data)[at]
                                         : static_cast<const float*>(bins->data)[at];
      }
    } else {
      for (int64_t k = 0; k < d.bins; ++k) values[k] = static_cast<double>(k);
    }
    std::vector<float> floats(values.begin(), values.end());
    d.values.data = dtype == GFL_FLOAT64 ? reinterpret_cast<char*>(values.data())
                                         : reinterpret_cast<char*>(floats.data());
    using D = DistributionProblem;
    run_blocks(table().distribution, d, d.bins, &D::pred, &D::grad_loss, &D::loss, &D::grad);
  });
}

extern "C" const char* gfl_last_error(void) { return gfl::last_error.c_str(); }

extern "C" const char* gfl_version(void) { return GFL_VERSION; }

extern "C" const char* gfl_build_info(void) {
  static const std::string info =
      std::string("{\"version\": \"" GFL_VERSION "\", \"compiler\": \"" GFL_COMPILER
                  "\", \"built_against_torch\": \"" GFL_TORCH_VERSION
                  "\", \"sanitizers\": \"" GFL_SANITIZERS "\", \"isas\": \"baseline") +
#if defined(GFL_HAVE_AVX2)
      ",avx2" +
#endif
#if defined(GFL_HAVE_AVX512)
      ",avx512" +
#endif
      "\"}";
  return info.c_str();
}
