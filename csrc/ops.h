// The ops whose schemas gfl_kernels/ops.py defines: allocate the outputs, describe the tensors as
// views, call the C functions. Written in a tensor class that the includer has chosen before, the
// stable ABI's (stable.h) or ATen's (python/autograd.cpp), in namespace gfl:
//
//   Tensor, ScalarType                           with the names that both classes share
//   Place                                        where outputs are allocated
//   Tensor new_tensor(const Place&, int64_t dims, const int64_t* sizes, const int64_t* strides,
//                     ScalarType);
//   Tensor new_like(const Tensor&);          what empty_like makes
//
// A Device says where:
//
//   Device(const Tensor& pred, others...);      pred's device is the current one while this lives;
//                                               refuses others that lie elsewhere
//   Place place() const;
//   static constexpr bool kSaves;                whether an integral saves anything for backward
//   int run(const gfl_quality_args&) const;     and the same for the others
//   int run_boxes(const gfl_head_args&) const, run(const gfl_head_args&) const;   for a head
#pragma once

#include <algorithm>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "gfl_kernels/gfl_kernels.h"

namespace gfl {
namespace {

// Reductions, as in gfl_kernels/ops.py.
enum Reduction : int64_t { kNone, kSum, kMean };

// What the kernels call a tensor's dtype; nothing for one that they do not read.
inline std::optional<gfl_dtype> readable_dtype(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return GFL_FLOAT32;
    case ScalarType::Double:
      return GFL_FLOAT64;
    case ScalarType::BFloat16:
      return GFL_BFLOAT16;
    case ScalarType::Half:
      return GFL_FLOAT16;
    case ScalarType::Long:
      return GFL_INT64;
    case ScalarType::Int:
      return GFL_INT32;
    case ScalarType::Short:
      return GFL_INT16;
    case ScalarType::Char:
      return GFL_INT8;
    case ScalarType::Byte:
      return GFL_UINT8;
    case ScalarType::Bool:
      return GFL_BOOL;
    default:
      return std::nullopt;
  }
}

inline gfl_dtype dtype_of(const Tensor& tensor) {
  if (const std::optional<gfl_dtype> dtype = readable_dtype(tensor)) return *dtype;
  throw std::invalid_argument("gfl_native: a tensor has a dtype that the kernels do not read");
}

// A view of a tensor, or nothing.
class View {
 public:
  explicit View(const Tensor& tensor)
      : view_{tensor.data_ptr(), dtype_of(tensor), static_cast<int32_t>(tensor.dim()),
              tensor.sizes().data(), tensor.strides().data()},
        present_(true) {}
  explicit View(const std::optional<Tensor>& tensor) {
    if (tensor) *this = View(*tensor);
  }
  const gfl_view* get() const { return present_ ? &view_ : nullptr; }

 private:
  gfl_view view_{};
  bool present_ = false;
};

// The dtype of losses and of what is summed.
inline ScalarType accumulator(const Tensor& pred) {
  return pred.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check(int status) {
  if (status) throw std::invalid_argument(gfl_last_error());
}

inline double scale_of(const Tensor& pred, double scale, int64_t reduction) {
  if (reduction != kMean) return scale;
  const int64_t rows = pred.numel() / std::max<int64_t>(1, pred.size(pred.dim() - 1));
  return scale / static_cast<double>(std::max<int64_t>(1, rows));
}

// The loss of all rows (0-dim) or of each.
inline Tensor new_loss(const Place& place, const Tensor& pred, bool per_row) {
  const auto sizes = pred.sizes();
  const int64_t dims = per_row ? pred.dim() - 1 : 0;
  int64_t strides[64];
  int64_t step = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    strides[d] = step;
    step *= std::max<int64_t>(1, sizes[d]);
  }
  return new_tensor(place, dims, sizes.data(), strides, accumulator(pred));
}

// [..., columns] without gaps, dims from outermost to innermost: those of pred in `order`.
inline Tensor new_columns(const Place& place, const Tensor& pred, int64_t columns,
                          const std::vector<int64_t>& order) {
  const int64_t dims = pred.dim();
  std::vector<int64_t> sizes(pred.sizes().begin(), pred.sizes().end()), strides(dims);
  sizes[dims - 1] = columns;
  int64_t step = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    strides[order[i]] = step;
    step *= std::max<int64_t>(1, sizes[order[i]]);
  }
  return new_tensor(place, dims, sizes.data(), strides.data(), accumulator(pred));
}

// ops.new_statistics and ops.new_planes.
inline Tensor new_statistics(const Place& place, const Tensor& pred, int64_t columns) {
  std::vector<int64_t> order(pred.dim());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return pred.strides()[a] > pred.strides()[b]; });
  return new_columns(place, pred, columns, order);
}
inline Tensor new_planes(const Place& place, const Tensor& pred, int64_t columns) {
  std::vector<int64_t> order(pred.dim());
  std::iota(order.begin() + 1, order.end(), 0);
  order[0] = pred.dim() - 1;
  return new_columns(place, pred, columns, order);
}

inline Tensor new_empty(const Place& place, ScalarType dtype) {
  const int64_t zero = 0, one = 1;
  return new_tensor(place, 1, &zero, &one, dtype);
}

// In pred's layout, or empty.
inline Tensor new_gradient(const Place& place, const Tensor& pred, bool wanted) {
  if (!wanted) return new_empty(place, pred.scalar_type());
  if (!pred.is_contiguous()) return new_like(pred);
  // The same without its way through the dispatcher.
  return new_tensor(place, pred.dim(), pred.sizes().data(), pred.strides().data(),
                    pred.scalar_type());
}

template <typename Device>
std::tuple<Tensor, Tensor> quality_forward(Tensor pred, Tensor target, std::optional<Tensor> score,
                                           std::optional<Tensor> weight,
                                           std::optional<Tensor> avg_factor, int64_t form,
                                           int64_t flags, double alpha, double beta, double scale,
                                           int64_t reduction, bool write_grad) {
  const Device device(pred, target, score, weight, avg_factor);
  Tensor loss = new_loss(device.place(), pred, reduction == kNone);
  Tensor grad = new_gradient(device.place(), pred, write_grad);
  const View x(pred), t(target), q(score), w(weight), a(avg_factor), l(loss), g(grad);
  const gfl_quality_args args{x.get(),
                              t.get(),
                              q.get(),
                              w.get(),
                              a.get(),
                              nullptr,
                              l.get(),
                              write_grad ? g.get() : nullptr,
                              static_cast<int32_t>(form),
                              beta,
                              scale_of(pred, scale, reduction),
                              alpha,
                              static_cast<int32_t>(flags)};
  check(device.run(args));
  return {loss, grad};
}

template <typename Device>
Tensor quality_backward(Tensor grad_loss, Tensor pred, Tensor target, std::optional<Tensor> score,
                        std::optional<Tensor> weight, std::optional<Tensor> avg_factor,
                        int64_t form, int64_t flags, double alpha, double beta, double scale,
                        int64_t reduction) {
  const Device device(pred, grad_loss, target, score, weight, avg_factor);
  Tensor grad = new_gradient(device.place(), pred, true);
  const View u(grad_loss), x(pred), t(target), q(score), w(weight), a(avg_factor), g(grad);
  const gfl_quality_args args{x.get(),
                              t.get(),
                              q.get(),
                              w.get(),
                              a.get(),
                              u.get(),
                              nullptr,
                              g.get(),
                              static_cast<int32_t>(form),
                              beta,
                              scale_of(pred, scale, reduction),
                              alpha,
                              static_cast<int32_t>(flags)};
  check(device.run(args));
  return grad;
}

template <typename Device>
std::tuple<Tensor, Tensor> distribution_forward(Tensor pred, Tensor target,
                                                std::optional<Tensor> weight_left,
                                                std::optional<Tensor> weight_right,
                                                std::optional<Tensor> weight,
                                                std::optional<Tensor> avg_factor, double scale,
                                                int64_t reduction, bool write_grad) {
  const Device device(pred, target, weight_left, weight_right, weight, avg_factor);
  Tensor loss = new_loss(device.place(), pred, reduction == kNone);
  Tensor grad = new_gradient(device.place(), pred, write_grad);
  const View x(pred), t(target), wl(weight_left), wr(weight_right), w(weight), a(avg_factor),
      l(loss), g(grad);
  const gfl_distribution_args args{x.get(),
                                   t.get(),
                                   wl.get(),
                                   wr.get(),
                                   w.get(),
                                   a.get(),
                                   nullptr,
                                   l.get(),
                                   write_grad ? g.get() : nullptr,
                                   scale_of(pred, scale, reduction)};
  check(device.run(args));
  return {loss, grad};
}

template <typename Device>
Tensor distribution_backward(Tensor grad_loss, Tensor pred, Tensor target,
                             std::optional<Tensor> weight_left, std::optional<Tensor> weight_right,
                             std::optional<Tensor> weight, std::optional<Tensor> avg_factor,
                             double scale, int64_t reduction) {
  const Device device(pred, grad_loss, target, weight_left, weight_right, weight, avg_factor);
  Tensor grad = new_gradient(device.place(), pred, true);
  const View u(grad_loss), x(pred), t(target), wl(weight_left), wr(weight_right), w(weight),
      a(avg_factor), g(grad);
  const gfl_distribution_args args{
      x.get(), t.get(), wl.get(), wr.get(), w.get(),
      a.get(), u.get(), nullptr,  g.get(),  scale_of(pred, scale, reduction)};
  check(device.run(args));
  return grad;
}

inline gfl_integral_args integral_args(int64_t window) {
  gfl_integral_args args{};
  args.mode = window < 0 ? GFL_INTEGRAL_MEAN : GFL_INTEGRAL_PEAK;
  args.window = static_cast<int32_t>(std::clamp<int64_t>(window, 0, INT32_MAX));
  return args;
}

inline gfl_statistics_args statistics_args(int64_t topk, bool add_mean) {
  gfl_statistics_args args{};
  args.topk = static_cast<int32_t>(std::clamp<int64_t>(topk, 0, INT32_MAX));
  args.add_mean = add_mean;
  return args;
}

// args: those of a summary, with all but its tensors. bins: a member of Args, or nothing.
template <typename Device, typename Args, typename... Bins>
Tensor run_summary(const Device& device, Tensor out, const Tensor& pred, Args args,
                   const std::optional<Tensor>& bins, Bins... member) {
  const View x(pred), y(bins), o(out);
  args.pred = x.get();
  ((args.*member = y.get()), ...);
  args.out = o.get();
  check(device.run(args));
  return out;
}

template <typename Device, typename Args, typename... Bins>
Tensor run_summary_backward(const Tensor& grad_out, const Tensor& pred, Args args,
                            const std::optional<Tensor>& bins, Bins... member) {
  const Device device(pred, grad_out, bins);
  Tensor grad = new_gradient(device.place(), pred, true);
  const View u(grad_out), x(pred), y(bins), g(grad);
  args.pred = x.get();
  ((args.*member = y.get()), ...);
  args.grad_out = u.get();
  args.grad = g.get();
  check(device.run(args));
  return grad;
}

template <typename Device>
std::tuple<Tensor, Tensor> integral_forward(Tensor pred, std::optional<Tensor> bins, int64_t window,
                                            bool save) {
  const Device device(pred, bins);
  save = save && Device::kSaves;
  Tensor out = new_loss(device.place(), pred, true);
  Tensor saved =
      save ? new_planes(device.place(), pred, 2) : new_empty(device.place(), ScalarType::Float);
  const View s(saved);
  gfl_integral_args args = integral_args(window);
  if (save) args.saved = s.get();
  return {run_summary(device, out, pred, args, bins, &gfl_integral_args::bins), saved};
}

template <typename Device>
Tensor integral_backward(Tensor grad_out, Tensor pred, std::optional<Tensor> bins, int64_t window,
                         std::optional<Tensor> saved) {
  const View s(saved);
  gfl_integral_args args = integral_args(window);
  args.saved = s.get();
  return run_summary_backward<Device>(grad_out, pred, args, bins, &gfl_integral_args::bins);
}

template <typename Device>
Tensor statistics_forward(Tensor pred, int64_t topk, bool add_mean) {
  const Device device(pred);
  return run_summary(device, new_statistics(device.place(), pred, topk + add_mean), pred,
                     statistics_args(topk, add_mean), std::nullopt);
}

template <typename Device>
Tensor statistics_backward(Tensor grad_out, Tensor pred, int64_t topk, bool add_mean) {
  return run_summary_backward<Device>(grad_out, pred, statistics_args(topk, add_mean),
                                      std::nullopt);
}

template <typename Device>
Tensor moments_forward(Tensor pred, std::optional<Tensor> bins) {
  const Device device(pred, bins);
  return run_summary(device, new_planes(device.place(), pred, 3), pred, gfl_moments_args{}, bins,
                     &gfl_moments_args::bins);
}

template <typename Device>
Tensor moments_backward(Tensor grad_out, Tensor pred, std::optional<Tensor> bins) {
  return run_summary_backward<Device>(grad_out, pred, gfl_moments_args{}, bins,
                                      &gfl_moments_args::bins);
}

// Tensor[] arguments as the arrays of views that C functions take.
class Views {
 public:
  explicit Views(const std::vector<Tensor>& tensors) {
    for (const Tensor& tensor : tensors) views_.push_back(*View(tensor).get());
  }
  const gfl_view* data() const { return views_.empty() ? nullptr : views_.data(); }

 private:
  std::vector<gfl_view> views_;
};

inline Tensor new_packed(const Place& place, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) {
    strides[d - 1] = strides[d] * std::max<int64_t>(1, sizes[d]);
  }
  return new_tensor(place, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype);
}

// A tensor of the losses' dtype.
inline Tensor new_losses(const Place& place, const Tensor& pred,
                         const std::vector<int64_t>& sizes) {
  return new_packed(place, sizes, accumulator(pred));
}

// The tensors of a head and what the three ops share of their arguments; lives as long as a call.
struct HeadCall {
  Views cls, box, points, labels, box_targets, targets, label_weights;
  std::vector<double> strides;

  HeadCall(const std::vector<Tensor>& cls_, const std::vector<Tensor>& box_,
           const std::vector<Tensor>& points_, const std::vector<Tensor>& labels_,
           const std::vector<Tensor>& box_targets_, const std::vector<Tensor>& targets_,
           const std::vector<Tensor>& label_weights_, std::vector<double> strides_)
      : cls(cls_),
        box(box_),
        points(points_),
        labels(labels_),
        box_targets(box_targets_),
        targets(targets_),
        label_weights(label_weights_),
        strides(std::move(strides_)) {
    const size_t levels = cls_.size();
    const auto fits = [&](size_t n) { return n == levels; };
    if (!levels || !fits(box_.size()) || !fits(points_.size()) || !fits(labels_.size()) ||
        !fits(box_targets_.size()) || !(targets_.empty() || fits(targets_.size())) ||
        !(label_weights_.empty() || fits(label_weights_.size())) || !fits(strides.size())) {
      throw std::invalid_argument("gfl_native: a list has not as many entries as cls");
    }
  }

  gfl_head_args args(int64_t iou, double iou_eps, double limit) const {
    gfl_head_args a{};
    a.levels = static_cast<int32_t>(strides.size());
    a.cls = cls.data();
    a.box = box.data();
    a.points = points.data();
    a.labels = labels.data();
    a.box_targets = box_targets.data();
    a.targets = targets.data();
    a.label_weights = label_weights.data();
    a.strides = strides.data();
    a.iou = static_cast<int32_t>(iou);
    a.iou_eps = iou_eps;
    a.limit = limit;
    return a;
  }
};

inline int64_t anchors_of(const std::vector<Tensor>& cls) {
  int64_t anchors = 0;
  for (const Tensor& level : cls) {
    int64_t cells = 1;
    for (int64_t d = 1; d < level.dim() - 1; ++d) cells *= level.size(d);
    anchors += cells;
  }
  return anchors;
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> head_boxes(
    std::vector<Tensor> cls, std::vector<Tensor> box, std::vector<Tensor> points,
    std::vector<Tensor> labels, std::vector<Tensor> box_targets, std::vector<Tensor> targets,
    std::vector<Tensor> label_weights, std::vector<double> strides, int64_t iou, double iou_eps,
    double limit, bool write_boxes) {
  const HeadCall call(cls, box, points, labels, box_targets, targets, label_weights,
                      std::move(strides));
  const Tensor& pred = cls[0];
  const Device device(pred, cls, box, points, labels, box_targets, targets, label_weights);
  const auto make = [&](std::vector<int64_t> sizes) {
    return new_losses(device.place(), pred, std::move(sizes));
  };
  const int64_t batch = pred.size(0), anchors = anchors_of(cls);
  Tensor quality = make({batch, anchors}), weight = make({batch, anchors});
  Tensor sums = make({static_cast<int64_t>(cls.size()), 2}), normalisers = make({2});
  Tensor boxes = write_boxes ? make({batch, anchors, 4}) : make({0});
  const View q(quality), w(weight), s(sums), n(normalisers), b(boxes);
  gfl_head_args args = call.args(iou, iou_eps, limit);
  args.quality = q.get();
  args.weight = w.get();
  args.sums = s.get();
  args.normalisers = n.get();
  args.boxes = write_boxes ? b.get() : nullptr;
  check(device.run_boxes(args));
  return {quality, weight, sums, normalisers, boxes};
}

// What head_forward and head_backward do alike. losses or upstream: six.
template <typename Device>
void run_head(const Device& device, const HeadCall& call, const Tensor& quality,
              const Tensor& weight, const Tensor& sums, const Tensor& normalisers, int64_t iou,
              double iou_eps, double limit, int64_t form, double alpha, double beta,
              const std::vector<double>& loss_weights, const Tensor* losses,
              const std::optional<Tensor>* upstream, const std::vector<Tensor>& grads) {
  if (loss_weights.size() != 3) throw std::invalid_argument("gfl_native: three loss_weights");
  const View q(quality), w(weight), s(sums), n(normalisers);
  const Views g(grads);
  std::vector<View> views;
  for (int i = 0; i < 6; ++i) views.push_back(losses ? View(losses[i]) : View(upstream[i]));
  gfl_head_args args = call.args(iou, iou_eps, limit);
  args.quality = q.get();
  args.weight = w.get();
  args.sums = s.get();
  args.normalisers = n.get();
  args.form = static_cast<int32_t>(form);
  args.alpha = alpha;
  args.beta = beta;
  for (int i = 0; i < 3; ++i) args.loss_weights[i] = loss_weights[i];
  for (int i = 0; i < 6; ++i) (losses ? args.losses : args.grad_losses)[i] = views[i].get();
  if (!grads.empty()) {
    args.grad_cls = g.data();
    args.grad_box = g.data() + grads.size() / 2;
  }
  check(device.run(args));
}

// Of cls, then of box.
inline std::vector<Tensor> new_gradients(const Place& place, const std::vector<Tensor>& cls,
                                         const std::vector<Tensor>& box) {
  std::vector<Tensor> grads;
  for (const auto* list : {&cls, &box}) {
    for (const Tensor& level : *list) grads.push_back(new_gradient(place, level, true));
  }
  return grads;
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>> head_forward(
    std::vector<Tensor> cls, std::vector<Tensor> box, std::vector<Tensor> points,
    std::vector<Tensor> labels, std::vector<Tensor> box_targets, std::vector<Tensor> targets,
    std::vector<Tensor> label_weights, Tensor quality, Tensor weight, Tensor sums,
    Tensor normalisers, std::vector<double> strides, int64_t iou, double iou_eps, double limit,
    int64_t form, double alpha, double beta, std::vector<double> loss_weights, bool write_grad) {
  const HeadCall call(cls, box, points, labels, box_targets, targets, label_weights,
                      std::move(strides));
  const Tensor& pred = cls[0];
  const Device device(pred, cls, box, points, labels, box_targets, targets, label_weights, quality,
                      weight, sums, normalisers);
  const Place place = device.place();
  const int64_t levels = static_cast<int64_t>(cls.size());
  std::vector<Tensor> losses;
  for (int i = 0; i < 6; ++i) {
    losses.push_back(i < 3 ? new_losses(place, pred, {}) : new_losses(place, pred, {levels}));
  }
  std::vector<Tensor> grads;
  if (write_grad) grads = new_gradients(place, cls, box);
  run_head(device, call, quality, weight, sums, normalisers, iou, iou_eps, limit, form, alpha, beta,
           loss_weights, losses.data(), nullptr, grads);
  return {losses[0], losses[1], losses[2], losses[3], losses[4], losses[5], grads};
}

template <typename Device>
std::vector<Tensor> head_backward(
    std::optional<Tensor> grad_cls, std::optional<Tensor> grad_bbox, std::optional<Tensor> grad_dfl,
    std::optional<Tensor> grad_levels_cls, std::optional<Tensor> grad_levels_bbox,
    std::optional<Tensor> grad_levels_dfl, std::vector<Tensor> cls, std::vector<Tensor> box,
    std::vector<Tensor> points, std::vector<Tensor> labels, std::vector<Tensor> box_targets,
    std::vector<Tensor> targets, std::vector<Tensor> label_weights, Tensor quality, Tensor weight,
    Tensor sums, Tensor normalisers, std::vector<double> strides, int64_t iou, double iou_eps,
    double limit, int64_t form, double alpha, double beta, std::vector<double> loss_weights) {
  const HeadCall call(cls, box, points, labels, box_targets, targets, label_weights,
                      std::move(strides));
  const Device device(cls[0], grad_cls, grad_bbox, grad_dfl, grad_levels_cls, grad_levels_bbox,
                      grad_levels_dfl, cls, box, points, labels, box_targets, targets,
                      label_weights, quality, weight, sums, normalisers);
  const std::vector<Tensor> grads = new_gradients(device.place(), cls, box);
  const std::optional<Tensor> upstream[] = {grad_cls,        grad_bbox,        grad_dfl,
                                            grad_levels_cls, grad_levels_bbox, grad_levels_dfl};
  run_head(device, call, quality, weight, sums, normalisers, iou, iou_eps, limit, form, alpha, beta,
           loss_weights, nullptr, upstream, grads);
  return grads;
}

template <typename Device>
std::tuple<Tensor, Tensor> distillation_forward(Tensor pred, Tensor teacher,
                                                std::optional<Tensor> weight,
                                                std::optional<Tensor> avg_factor,
                                                double temperature, double scale, int64_t reduction,
                                                bool write_grad) {
  const Device device(pred, teacher, weight, avg_factor);
  Tensor loss = new_loss(device.place(), pred, reduction == kNone);
  Tensor grad = new_gradient(device.place(), pred, write_grad);
  const View x(pred), t(teacher), w(weight), a(avg_factor), l(loss), g(grad);
  const gfl_distillation_args args{x.get(),
                                   t.get(),
                                   w.get(),
                                   a.get(),
                                   nullptr,
                                   l.get(),
                                   write_grad ? g.get() : nullptr,
                                   temperature,
                                   scale_of(pred, scale, reduction)};
  check(device.run(args));
  return {loss, grad};
}

template <typename Device>
Tensor distillation_backward(Tensor grad_loss, Tensor pred, Tensor teacher,
                             std::optional<Tensor> weight, std::optional<Tensor> avg_factor,
                             double temperature, double scale, int64_t reduction) {
  const Device device(pred, grad_loss, teacher, weight, avg_factor);
  Tensor grad = new_gradient(device.place(), pred, true);
  const View u(grad_loss), x(pred), t(teacher), w(weight), a(avg_factor), g(grad);
  const gfl_distillation_args args{x.get(), t.get(),     w.get(),
                                   a.get(), u.get(),     nullptr,
                                   g.get(), temperature, scale_of(pred, scale, reduction)};
  check(device.run(args));
  return grad;
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> decode_boxes(
    Tensor pred, Tensor points, std::optional<Tensor> strides, std::optional<Tensor> bins,
    std::optional<Tensor> cls, std::optional<Tensor> limits, double stride,
    std::vector<double> size, int64_t window, bool write_deviation) {
  const Device device(pred, points, strides, bins, cls, limits);
  const Place place = device.place();
  std::vector<int64_t> rows(pred.sizes().begin(), pred.sizes().end() - 1), sides = rows;
  sides.push_back(4);
  if (!cls) rows = {0};
  Tensor boxes = new_losses(place, pred, sides), score = new_losses(place, pred, rows);
  Tensor label = new_packed(place, rows, ScalarType::Long);
  Tensor deviation = new_losses(place, pred, write_deviation ? sides : std::vector<int64_t>{0});
  const View x(pred), p(points), s(strides), y(bins), c(cls), m(limits);
  const View b(boxes), d(deviation), h(score), l(label);
  gfl_decode_args args{};
  args.pred = x.get();
  args.points = p.get();
  args.strides = s.get();
  args.bins = y.get();
  args.cls = c.get();
  args.limits = m.get();
  args.boxes = b.get();
  args.deviation = write_deviation ? d.get() : nullptr;
  args.score = cls ? h.get() : nullptr;
  args.label = cls ? l.get() : nullptr;
  args.stride = stride;
  args.height = size.size() == 2 ? size[0] : -1;
  args.width = size.size() == 2 ? size[1] : -1;
  args.window = window;
  check(device.run(args));
  return {boxes, score, label, deviation};
}

}  // namespace
}  // namespace gfl
