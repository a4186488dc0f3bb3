// The ops whose schemas gfl_kernels/ops.py defines, on the LibTorch stable ABI: allocate the
// outputs, describe the tensors as views, call the C functions. A Device says where:
//
//   explicit Device(const Tensor& pred);        pred's device is the current one while this lives
//   Place place() const;                        where outputs are allocated
//   int run(const gfl_quality_args&) const;     and the same for the other two
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "gfl_kernels/gfl_kernels.h"

namespace gfl {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Reductions, as in gfl_kernels/ops.py.
constexpr int64_t kNone = 0;
constexpr int64_t kMean = 2;

gfl_dtype dtype_of(const Tensor& tensor) {
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
      throw std::invalid_argument("gfl_native: a tensor has a dtype that the kernels do not read");
  }
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

void check(int status) {
  if (status) throw std::invalid_argument(gfl_last_error());
}

double scale_of(const Tensor& pred, double scale, int64_t reduction) {
  if (reduction != kMean) return scale;
  const int64_t rows = pred.numel() / std::max<int64_t>(1, pred.size(pred.dim() - 1));
  return scale / static_cast<double>(std::max<int64_t>(1, rows));
}

// Where outputs are allocated.
struct Place {
  int32_t type, index;
};

Tensor new_tensor(const Place& place, int64_t dims, const int64_t* sizes, const int64_t* strides,
                  int32_t dtype) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, place.type, place.index, &handle));
  return Tensor(handle);
}

// The loss of all rows (0-dim) or of each.
Tensor new_loss(const Place& place, const Tensor& pred, bool per_row) {
  const auto sizes = pred.sizes();
  const int64_t dims = per_row ? pred.dim() - 1 : 0;
  const bool wide = pred.scalar_type() == ScalarType::Double;
  int64_t strides[64];
  int64_t step = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    strides[d] = step;
    step *= std::max<int64_t>(1, sizes[d]);
  }
  return new_tensor(place, dims, sizes.data(), strides,
                    wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
}

// In pred's layout, or empty.
Tensor new_gradient(const Place& place, const Tensor& pred, bool wanted) {
  // What empty_like does here, without its way through the dispatcher.
  const bool contiguous = pred.is_contiguous();
  if (wanted && !contiguous) return torch::stable::empty_like(pred);
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(pred.get(), &dtype));
  if (wanted) {
    return new_tensor(place, pred.dim(), pred.sizes().data(), pred.strides().data(), dtype);
  }
  const int64_t zero = 0, one = 1;
  return new_tensor(place, 1, &zero, &one, dtype);
}

template <typename Device>
std::tuple<Tensor, Tensor> quality_forward(Tensor pred, Tensor target, std::optional<Tensor> score,
                                           std::optional<Tensor> weight,
                                           std::optional<Tensor> avg_factor, int64_t form,
                                           double beta, double scale, int64_t reduction,
                                           bool write_grad) {
  const Device device(pred);
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
                              static_cast<gfl_form>(form),
                              beta,
                              scale_of(pred, scale, reduction)};
  check(device.run(args));
  return {loss, grad};
}

template <typename Device>
Tensor quality_backward(Tensor grad_loss, Tensor pred, Tensor target, std::optional<Tensor> score,
                        std::optional<Tensor> weight, std::optional<Tensor> avg_factor,
                        int64_t form, double beta, double scale, int64_t reduction) {
  const Device device(pred);
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
                              static_cast<gfl_form>(form),
                              beta,
                              scale_of(pred, scale, reduction)};
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
  const Device device(pred);
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
  const Device device(pred);
  Tensor grad = new_gradient(device.place(), pred, true);
  const View u(grad_loss), x(pred), t(target), wl(weight_left), wr(weight_right), w(weight),
      a(avg_factor), g(grad);
  const gfl_distribution_args args{
      x.get(), t.get(), wl.get(), wr.get(), w.get(),
      a.get(), u.get(), nullptr,  g.get(),  scale_of(pred, scale, reduction)};
  check(device.run(args));
  return grad;
}

template <typename Device>
Tensor integral_forward(Tensor pred, std::optional<Tensor> bins) {
  const Device device(pred);
  Tensor out = new_loss(device.place(), pred, true);
  const View x(pred), y(bins), o(out);
  const gfl_integral_args args{x.get(), y.get(), nullptr, o.get(), nullptr};
  check(device.run(args));
  return out;
}

template <typename Device>
Tensor integral_backward(Tensor grad_out, Tensor pred, std::optional<Tensor> bins) {
  const Device device(pred);
  Tensor grad = new_gradient(device.place(), pred, true);
  const View u(grad_out), x(pred), y(bins), g(grad);
  const gfl_integral_args args{x.get(), y.get(), u.get(), nullptr, g.get()};
  check(device.run(args));
  return grad;
}

}  // namespace
}  // namespace gfl

// In a file that includes this one: the ops of one dispatch key.
#define GFL_IMPLEMENT(KEY, DEVICE)                                              \
  STABLE_TORCH_LIBRARY_IMPL(gfl_native, KEY, m) {                               \
    m.impl("quality_forward", TORCH_BOX(&quality_forward<DEVICE>));             \
    m.impl("quality_backward", TORCH_BOX(&quality_backward<DEVICE>));           \
    m.impl("distribution_forward", TORCH_BOX(&distribution_forward<DEVICE>));   \
    m.impl("distribution_backward", TORCH_BOX(&distribution_backward<DEVICE>)); \
    m.impl("integral_forward", TORCH_BOX(&integral_forward<DEVICE>));           \
    m.impl("integral_backward", TORCH_BOX(&integral_backward<DEVICE>));         \
  }
