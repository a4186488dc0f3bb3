#include "problem.h"

#include <span>
#include <string>
#include <vector>

#include "error.h"

namespace gfl {
namespace {

std::string shape_of(const int64_t* sizes, int n) {
  std::string text(1, '(');
  for (int i = 0; i < n; ++i) {
    if (i) text += ", ";
    text += std::to_string(sizes[i]);
  }
  return text + ")";
}

bool is_float(gfl_dtype dtype) { return dtype <= GFL_FLOAT16; }

constexpr int64_t kOne = -1;

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
    if (view && scalar && view->ndim == 0) {
      *operand = {static_cast<char*>(view->data), view->dtype};
      entries_[count_++] = {view, operand, 0};
    } else {
      add_columns(name, view, operand, per_column ? columns_ : kOne);
    }
  }

  // So many values per row, along a last dimension of their own; kOne: one, without a dimension.
  void add_columns(const char* name, const gfl_view* view, Operand* operand, int64_t columns) {
    *operand = Operand{};
    if (!view) return;
    const int dims = ndim_ + (columns != kOne);
    bool same = view->ndim == dims && (columns == kOne || view->sizes[ndim_] == columns);
    for (int d = 0; same && d < ndim_; ++d) same = view->sizes[d] == pred_->sizes[d];
    if (!same) {
      std::vector<int64_t> sizes(pred_->sizes, pred_->sizes + ndim_);
      sizes.push_back(columns);
      fail(op_ + ": " + name + " must have shape " + shape_of(sizes.data(), dims) + ", got " +
           shape_of(view->sizes, view->ndim));
    }
    entries_[count_++] = {view, operand, ndim_};
    *operand = {static_cast<char*>(view->data), view->dtype};
    operand->column = columns > 1 ? view->strides[ndim_] : columns != kOne;
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

}  // namespace

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

gfl_dtype accumulator(gfl_dtype dtype) { return dtype == GFL_FLOAT64 ? GFL_FLOAT64 : GFL_FLOAT32; }

QualityProblem describe(const char* name, const gfl_quality_args& args) {
  QualityProblem q{};
  Problem problem(name, args.pred, "C");
  if (!args.target) fail(std::string(name) + ": target is missing");
  q.weight_per_class = args.weight && args.weight->ndim == args.pred->ndim;
  const bool per_row = args.loss && args.loss->ndim > 0;
  problem.add("pred", args.pred, &q.pred, true);
  problem.add("target", args.target, &q.target, !args.score);
  problem.add("score", args.score, &q.score, false);
  problem.add("weight", args.weight, &q.weight, q.weight_per_class);
  problem.add("grad_loss", args.grad_loss, &q.grad_loss, false, true);
  problem.add("loss", per_row ? args.loss : nullptr, &q.loss, false);
  problem.add("grad", args.grad, &q.grad, true);
  problem.check_results(args.grad, args.loss, args.grad_loss);
  if (problem.columns() < 1) fail(std::string(name) + ": pred must have at least one class");
  problem.merge(&q.ndim, q.size);
  q.classes = problem.columns();
  if (args.form < GFL_LOGITS || args.form > GFL_BALANCED) {
    fail(std::string(name) + ": no such form: " + std::to_string(args.form));
  }
  q.form = static_cast<gfl_form>(args.form);
  q.flags = args.flags;
  q.alpha = args.alpha;
  q.beta = args.beta;
  q.scale = args.scale;
  return q;
}

DistributionProblem describe(const char* name, const gfl_distribution_args& args) {
  DistributionProblem d{};
  Problem problem(name, args.pred, "K");
  if (!args.target) fail(std::string(name) + ": target is missing");
  if (!args.weight_left != !args.weight_right) {
    fail(std::string(name) + ": weight_left and weight_right come together");
  }
  const bool per_row = args.loss && args.loss->ndim > 0;
  problem.add("pred", args.pred, &d.pred, true);
  problem.add("target", args.target, &d.target, false);
  problem.add("weight_left", args.weight_left, &d.weight_left, false);
  problem.add("weight_right", args.weight_right, &d.weight_right, false);
  problem.add("weight", args.weight, &d.weight, false);
  problem.add("grad_loss", args.grad_loss, &d.grad_loss, false, true);
  problem.add("loss", per_row ? args.loss : nullptr, &d.loss, false);
  problem.add("grad", args.grad, &d.grad, true);
  problem.check_results(args.grad, args.loss, args.grad_loss);
  if (problem.columns() < 1) fail(std::string(name) + ": pred must have at least one bin");
  problem.merge(&d.ndim, d.size);
  d.bins = problem.columns();
  d.scale = args.scale;
  return d;
}

namespace {

// What the summaries of a row have in common. columns: of out. saved: an integral's.
template <typename Args>
DistributionProblem describe_summary(const char* name, const Args& args, DistributionKind kind,
                                     int64_t columns, const gfl_view* saved = nullptr) {
  DistributionProblem d{};
  Problem problem(name, args.pred, "K");
  const gfl_dtype dtype = accumulator(args.pred->dtype);
  problem.add("pred", args.pred, &d.pred, true);
  problem.add_columns("grad_out", args.grad_out, &d.grad_loss, columns);
  problem.add_columns("out", args.out, &d.loss, columns);
  problem.add_columns("saved", saved, &d.saved, 2);
  problem.add("grad", args.grad, &d.grad, true);
  problem.need_dtype("grad", args.grad, args.pred->dtype);
  problem.need_dtype("out", args.out, dtype);
  problem.need_dtype("saved", saved, dtype);
  problem.need_dtype("grad_out", args.grad_out, dtype);
  if (args.grad && !args.grad_out) fail(std::string(name) + ": grad needs grad_out");
  if (problem.columns() < 1) fail(std::string(name) + ": pred must have at least one bin");
  problem.merge(&d.ndim, d.size);
  d.kind = kind;
  d.bins = problem.columns();
  d.scale = 1;
  d.window = -1;
  return d;
}

void check_bins(const char* name, const gfl_view* bins, const DistributionProblem& d) {
  if (!bins) return;
  if (bins->ndim != 1 || bins->sizes[0] != d.bins) {
    fail(std::string(name) + ": bins must have shape (" + std::to_string(d.bins) + "), got " +
         shape_of(bins->sizes, bins->ndim));
  }
  if (bins->dtype != accumulator(d.pred.dtype)) {
    fail(std::string(name) + ": bins must have the dtype of the result");
  }
}

}  // namespace

DistributionProblem describe(const char* name, const gfl_integral_args& args) {
  DistributionProblem d = describe_summary(name, args, kExpectation, kOne, args.saved);
  check_bins(name, args.bins, d);
  if (args.mode == GFL_INTEGRAL_PEAK && args.window >= 0) {
    d.window = args.window;
  } else if (args.mode != GFL_INTEGRAL_MEAN) {
    fail(std::string(name) + ": no such mode, or window is negative");
  }
  return d;
}

DistributionProblem describe(const char* name, const gfl_statistics_args& args) {
  if (args.topk < 1) fail(std::string(name) + ": topk must be at least 1");
  const int64_t columns = int64_t{args.topk} + (args.add_mean != 0);
  DistributionProblem d = describe_summary(name, args, kStatistics, columns);
  if (args.topk > d.bins) fail(std::string(name) + ": topk is larger than the number of bins");
  d.topk = args.topk;
  d.add_mean = args.add_mean;
  return d;
}

DistributionProblem describe(const char* name, const gfl_moments_args& args) {
  const DistributionProblem d = describe_summary(name, args, kMoments, 3);
  check_bins(name, args.bins, d);
  return d;
}

DistillationProblem describe(const char* name, const gfl_distillation_args& args) {
  DistillationProblem d{};
  Problem problem(name, args.pred, "K");
  if (!args.teacher) fail(std::string(name) + ": teacher is missing");
  const bool per_row = args.loss && args.loss->ndim > 0;
  problem.add("pred", args.pred, &d.pred, true);
  problem.add("teacher", args.teacher, &d.teacher, true);
  problem.add("weight", args.weight, &d.weight, false);
  problem.add("grad_loss", args.grad_loss, &d.grad_loss, false, true);
  problem.add("loss", per_row ? args.loss : nullptr, &d.loss, false);
  problem.add("grad", args.grad, &d.grad, true);
  problem.check_results(args.grad, args.loss, args.grad_loss);
  problem.need_dtype("teacher", args.teacher, args.pred->dtype);
  if (problem.columns() < 1) fail(std::string(name) + ": pred must have at least one bin");
  problem.merge(&d.ndim, d.size);
  d.bins = problem.columns();
  d.temperature = args.temperature;
  d.scale = args.scale;
  return d;
}

DecodeProblem describe(const char* name, const gfl_decode_args& args) {
  DecodeProblem d{};
  Problem problem(name, args.pred, "4 K");
  const std::string where = std::string(name) + ": ";
  if (!args.points || !args.boxes) fail(where + "points and boxes are needed");
  if (problem.columns() < 4 || problem.columns() % 4) fail(where + "pred must have 4 K channels");
  const gfl_dtype dtype = accumulator(args.pred->dtype);
  d.bins = problem.columns() / 4;
  problem.add("pred", args.pred, &d.pred, true);
  problem.add_columns("points", args.points, &d.points, 2);
  problem.add("strides", args.strides, &d.strides, false);
  problem.add_columns("limits", args.limits, &d.limits, 2);
  problem.add_columns("boxes", args.boxes, &d.boxes, 4);
  problem.add_columns("deviation", args.deviation, &d.deviation, 4);
  problem.need_dtype("boxes", args.boxes, dtype);
  problem.need_dtype("deviation", args.deviation, dtype);
  problem.need_dtype("bins", args.bins, dtype);
  if (const gfl_view* const cls = args.cls) {
    if (!args.score || !args.label) fail(where + "cls needs score and label");
    if (!is_float(cls->dtype) || accumulator(cls->dtype) != dtype) {
      fail(where + "pred and cls must be floats, float64 together");
    }
    d.classes = cls->ndim ? cls->sizes[cls->ndim - 1] : 0;
    if (d.classes < 1) fail(where + "cls must have at least one class");
    problem.add_columns("cls", cls, &d.cls, d.classes);
    problem.add("score", args.score, &d.score, false);
    problem.add("label", args.label, &d.label, false);
    problem.need_dtype("score", args.score, dtype);
    problem.need_dtype("label", args.label, GFL_INT64);
  }
  if (args.bins && (args.bins->ndim != 1 || args.bins->sizes[0] != d.bins)) {
    fail(where + "bins must have shape (" + std::to_string(d.bins) + ")");
  }
  problem.merge(&d.ndim, d.size);
  d.stride = args.stride;
  d.height = args.height;
  d.width = args.width;
  d.window = args.window;
  d.clips = args.limits || args.height >= 0;
  return d;
}

HeadProblem describe(const char* name, const gfl_head_args& args, int level, int64_t first) {
  const std::string where = std::string(name) + ": level " + std::to_string(level) + " of ";
  const gfl_view &cls = args.cls[level], &box = args.box[level];
  if (cls.ndim < 3 || cls.ndim > 4) fail(where + "cls must have shape (B, cells..., C)");
  HeadProblem h{};
  h.batch = cls.sizes[0];
  h.width = cls.sizes[cls.ndim - 2];
  h.cells = cls.ndim == 4 ? cls.sizes[1] * h.width : h.width;
  h.classes = cls.sizes[cls.ndim - 1];
  h.dense = args.targets;
  if (args.form != GFL_LOGITS && !(args.form == GFL_VARIFOCAL && h.dense)) {
    fail(std::string(name) + ": form must be GFL_LOGITS, or with targets GFL_VARIFOCAL");
  }
  if (args.iou < GFL_IOU || args.iou > GFL_CIOU_ALL) {
    fail(std::string(name) + ": no such iou: " + std::to_string(args.iou));
  }
  if (box.ndim != cls.ndim || box.sizes[box.ndim - 1] % 4 || box.sizes[box.ndim - 1] < 8) {
    fail(where + "box must have shape (B, cells..., 4 K), got " + shape_of(box.sizes, box.ndim));
  }
  h.bins = box.sizes[box.ndim - 1] / 4;
  if (!is_float(cls.dtype) || !is_float(box.dtype) ||
      (cls.dtype == GFL_FLOAT64) != (box.dtype == GFL_FLOAT64)) {
    fail(where + "cls and box must be floats, float64 together");
  }

  const auto operand = [&](const char* what, const gfl_view& view, const int64_t* sizes, int dims) {
    bool same = view.ndim == dims;
    for (int d = 0; same && d < dims; ++d) same = view.sizes[d] == sizes[d];
    if (!same) {
      fail(where + what + " must have shape " + shape_of(sizes, dims) + ", got " +
           shape_of(view.sizes, view.ndim));
    }
    Operand o;
    o.data = static_cast<char*>(view.data);
    o.dtype = view.dtype;
    return o;
  };
  // A value per cell, or `columns` of them; without images where batch is 0.
  const auto per_cell = [&](const char* what, const gfl_view& view, int64_t columns, bool images) {
    const int64_t sizes[] = {h.batch, h.cells, columns};
    const int dims = 2 + (columns > 0);
    Operand o = operand(what, view, images ? sizes : sizes + 1, dims - !images);
    if (images) o.row[0] = view.strides[0];
    o.row[1] = view.strides[images];
    if (columns) o.column = view.strides[dims - 1 - !images];
    return o;
  };
  const auto logits = [&](const char* what, const gfl_view& view, int64_t columns) {
    int64_t sizes[] = {h.batch, cls.sizes[1], cls.sizes[2], columns};
    sizes[cls.ndim - 1] = columns;
    Operand o = operand(what, view, sizes, cls.ndim);
    o.row[0] = view.strides[0];
    if (cls.ndim == 4) o.row[1] = view.strides[1];
    o.row[2] = view.strides[cls.ndim - 2];
    o.column = view.strides[cls.ndim - 1];
    return o;
  };
  h.cls = logits("cls", cls, h.classes);
  h.scores = args.targets ? logits("targets", args.targets[level], h.classes) : h.cls;
  h.box = logits("box", box, 4 * h.bins);
  h.points = per_cell("points", args.points[level], 2, false);
  h.labels = per_cell("labels", args.labels[level], 0, true);
  h.box_targets = per_cell("box_targets", args.box_targets[level], 4, true);
  if (args.label_weights) {
    h.label_weights = per_cell("label_weights", args.label_weights[level], 0, true);
  }
  if (args.grad_box) {
    h.grad = logits("grad_box", args.grad_box[level], 4 * h.bins);
    if (h.grad.dtype != box.dtype) fail(where + "grad_box must have the dtype of box");
  }
  if (args.grad_cls) {
    h.grad_cls = logits("grad_cls", args.grad_cls[level], h.classes);
    if (h.grad_cls.dtype != cls.dtype) fail(where + "grad_cls must have the dtype of cls");
  }

  // What belongs to the anchors of all levels, without gaps.
  int64_t anchors = 0;
  for (int l = 0; l < args.levels; ++l) {
    const gfl_view& other = args.cls[l];
    int64_t n = 1;
    for (int d = 1; d < other.ndim - 1; ++d) n *= other.sizes[d];
    anchors += n;
  }
  const gfl_dtype dtype = accumulator(cls.dtype);
  const auto joint = [&](const char* what, const gfl_view* view, int64_t columns) {
    if (!view) fail(where + what + " is missing");
    const int64_t sizes[] = {h.batch, anchors, columns};
    Operand o = operand(what, *view, sizes, columns > 1 ? 3 : 2);
    if (view->dtype != dtype) fail(where + what + " has the wrong dtype");
    o.row[0] = anchors * columns;
    o.row[1] = columns;
    o.column = 1;
    if (o.data) o.data += first * columns * element_bytes(dtype);
    return o;
  };
  h.quality = joint("quality", args.quality, 1);
  h.weight = joint("weight", args.weight, 1);
  if (args.boxes) h.boxes = joint("boxes", args.boxes, 4);
  const int64_t two[] = {args.levels, 2};
  if (operand("sums", *args.sums, two, 2).dtype != dtype ||
      operand("normalisers", *args.normalisers, two + 1, 1).dtype != dtype) {
    fail(where + "sums and normalisers have the wrong dtype");
  }
  h.iou = static_cast<gfl_iou>(args.iou);
  h.iou_eps = args.iou_eps;
  h.limit = args.limit;
  h.stride = args.strides[level];
  return h;
}

}  // namespace gfl
