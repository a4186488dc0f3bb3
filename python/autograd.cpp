// gfl_kernels._autograd: the losses and the integral from Python's arguments to a node of autograd,
// in C++.
//
// What a call means is written in functional.py and ops.py; this is the same for the arguments that
// nearly all calls on a CPU have, without their microseconds in Python. Whatever else a call may
// be, wrong ones included, is left to them: a function here returns None, and has done nothing.
//
// torch::autograd::Function is no part of the stable ABI, so this module serves the one version of
// torch that it was built against (native.py looks), and the package does without it elsewhere.
#include <ATen/EmptyTensor.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/python_headers.h>

#include <limits>
#include <optional>
#include <string>
#include <tuple>

// The tensors of ops.h.
namespace gfl {
namespace {

using at::ScalarType;
using at::Tensor;

struct Place {};
Place cpu_place() { return {}; }

Tensor new_tensor(Place, int64_t dims, const int64_t* sizes, const int64_t* strides,
                  ScalarType dtype) {
  const size_t count = static_cast<size_t>(dims);
  return at::detail::empty_strided_cpu({sizes, count}, {strides, count}, dtype);
}
Tensor new_like(const Tensor& tensor) { return at::empty_like(tensor); }

}  // namespace
}  // namespace gfl

#include "../csrc/cpu/device.h"

namespace gfl {

using at::IntArrayRef;
using c10::DispatchKey;
using c10::IValue;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torch::jit::Stack;

uint64_t raw(c10::DispatchKeySet keys) { return keys.raw_repr(); }

// Whether a tensor is what its memory says: dense, on the CPU, no wrapper, no pending conjugation
// or sign.
bool is_plain(const Tensor& tensor) {
  static const uint64_t plain =
      raw(c10::DispatchKeySet({DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::AutocastCPU,
                               DispatchKey::ADInplaceOrView}));
  return !(raw(tensor.key_set()) & ~plain) && tensor.layout() == at::kStrided;
}

bool wants_grad(const Tensor& tensor) {
  return tensor.requires_grad() && at::GradMode::is_enabled();
}

bool is_one(const Tensor& grad) {
  if (grad.numel() != 1 || !is_plain(grad)) return false;
  if (grad.scalar_type() == at::kFloat) return *grad.const_data_ptr<float>() == 1;
  return grad.scalar_type() == at::kDouble && *grad.const_data_ptr<double>() == 1;
}

// Nodes of autograd

// A backward op as it runs in a node, and with create_graph=True, where its own derivative is
// refused by name.
class Backward {
 public:
  explicit Backward(const char* name)
      : kernels_(find("gfl_native", name)), refusing_(find("gfl_kernels", name)) {}

  Tensor operator()(Stack stack) const {
    if (at::GradMode::is_enabled()) {
      refusing_.callBoxed(stack);
    } else {
      at::AutoDispatchBelowADInplaceOrView below;
      kernels_.callBoxed(stack);
    }
    return stack[0].toTensor();
  }

 private:
  static c10::OperatorHandle find(const std::string& library, const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow((library + "::" + name).c_str(), "");
  }
  c10::OperatorHandle kernels_, refusing_;
};

IValue optional(const Tensor& tensor) { return tensor.defined() ? IValue(tensor) : IValue(); }

// Sorts the arguments of an op into what a node saves.
struct Saved {
  variable_list tensors;
  std::vector<IValue> constants;

  void operator()(const Tensor& tensor) { tensors.push_back(tensor); }
  void operator()(const std::optional<Tensor>& tensor) {
    tensors.push_back(tensor.value_or(Tensor()));
  }
  template <typename Number>
  void operator()(Number value) {
    constants.emplace_back(value);
  }
};

// Self: what a family of losses is called and its ops. Inputs: those of forward but for write_grad.
// What is done with them is ops.py's _save and _gradient.
template <typename Self, typename... Inputs>
struct Loss : torch::autograd::Function<Self> {
  using Arguments = std::tuple<Inputs...>;

  static Tensor forward(const Arguments& arguments, bool write_grad, Saved* saved) {
    RECORD_FUNCTION(Self::forward_name, std::vector<IValue>());
    auto [loss, grad] = std::apply(
        [&](const Inputs&... inputs) { return Self::kForward(inputs..., write_grad); }, arguments);
    if (saved) {
      std::apply([&](const Inputs&... inputs) { ((*saved)(inputs), ...); }, arguments);
      saved->tensors.push_back(write_grad ? std::move(grad) : Tensor());
    }
    return std::move(loss);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const Tensor& grad_loss = upstream[0];
    variable_list tensors = ctx->get_saved_variables();
    const Tensor grad = std::move(tensors.back());
    tensors.pop_back();
    if (grad.defined() && !at::GradMode::is_enabled()) {
      // Forward left the gradient for an upstream gradient of 1. It is out of autograd's hands
      // where it goes out as it is, so a graph that is kept for another backward gives a copy.
      if (is_one(grad_loss)) {
        const bool kept = torch::autograd::get_current_graph_task_keep_graph();
        return {kept ? grad.clone() : grad};
      }
      // Scaling would round a bfloat16 gradient a second time: that one is computed again.
      if (grad.scalar_type() != at::kBFloat16) return {grad.mul(grad_loss)};
    }
    static const Backward op(Self::backward_name);
    Stack stack{grad_loss};
    for (const Tensor& tensor : tensors) stack.push_back(optional(tensor));
    for (const IValue& value : ctx->saved_data["constants"].toTupleRef().elements()) {
      stack.push_back(value);
    }
    return {op(std::move(stack))};
  }
};

using OptionalTensor = std::optional<Tensor>;

struct QualityFocal : Loss<QualityFocal, Tensor, Tensor, OptionalTensor, OptionalTensor,
                           OptionalTensor, int64_t, int64_t, double, double, double, int64_t> {
  static constexpr auto kForward = quality_forward<Cpu>;
  static constexpr char shown[] = "QualityFocalBackward";
  static constexpr char forward_name[] = "gfl_native::quality_forward";
  static constexpr char backward_name[] = "quality_backward";
};

struct DistributionFocal : Loss<DistributionFocal, Tensor, Tensor, OptionalTensor, OptionalTensor,
                                OptionalTensor, OptionalTensor, double, int64_t> {
  static constexpr auto kForward = distribution_forward<Cpu>;
  static constexpr char shown[] = "DistributionFocalBackward";
  static constexpr char forward_name[] = "gfl_native::distribution_forward";
  static constexpr char backward_name[] = "distribution_backward";
};

// ops.py's Integral.
struct Integral : torch::autograd::Function<Integral> {
  static constexpr char shown[] = "IntegralBackward";
  using Arguments = std::tuple<Tensor, OptionalTensor, int64_t>;

  static Tensor forward(const Arguments& arguments, bool save, Saved* saved) {
    RECORD_FUNCTION("gfl_native::integral_forward", std::vector<IValue>());
    const auto& [pred, bins, window] = arguments;
    auto [out, sums] = integral_forward<Cpu>(pred, bins, window, save);
    if (saved) {
      saved->tensors = {pred, bins.value_or(Tensor()), save ? std::move(sums) : Tensor()};
      saved->constants = {window};
    }
    return std::move(out);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    static const Backward op("integral_backward");
    const variable_list saved = ctx->get_saved_variables();
    const IValue& window = ctx->saved_data["constants"].toTupleRef().elements()[0];
    return {op({upstream[0], saved[0], optional(saved[1]), window, optional(saved[2])})};
  }
};

// torch::autograd::Function's node for Function, without what it makes of its name and of gradients
// in general.
template <typename Function>
struct NodeOf final : torch::autograd::CppNode<Function> {
  std::string name() const override { return Function::shown; }

  variable_list apply(variable_list&& upstream) override {
    const std::lock_guard<std::mutex> lock(this->mutex_);
    if (!upstream[0].defined()) {
      at::OptionalDeviceGuard unchanged;
      upstream[0] = this->output_info_[0].zeros(unchanged);
    }
    return Function::backward(&this->ctx_, upstream);
  }
};

// torch counts its nodes by std::shared_ptr, from 2.14 on by its own pointer.
template <typename Node>
auto new_node() {
  using Pointer = decltype(torch::autograd::Edge::function);
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    return std::make_shared<Node>();
  } else {
    return c10::make_intrusive<Node>();
  }
}

// From 2.14 on torch.autograd.graph.node_creation_hook is to see every node.
template <typename Pointer>
void announce(const Pointer& node) {
  if constexpr (requires { fire_node_creation_hooks(node); }) fire_node_creation_hooks(node);
}

// What torch::autograd::Function::apply comes to for a Function of one tensor, the first of
// arguments, and one result, both of them plain: it would take a fifth of a step on 64 x 80 logits.
// extra: whether forward does more for backward.
template <typename Function>
Tensor apply(const typename Function::Arguments& arguments, bool extra) {
  const pybind11::gil_scoped_release unlocked;
  const Tensor& pred = std::get<0>(arguments);
  if (!wants_grad(pred)) return Function::forward(arguments, extra, nullptr);
  const auto node = new_node<NodeOf<Function>>();
  node->set_ctx_grad_fn(node);
  node->set_next_edges(torch::autograd::collect_next_edges(pred));
  node->is_variable_input_ = {true};
  node->input_info_.emplace_back(pred);
  Saved saved;
  Tensor out = Function::forward(arguments, extra, &saved);
  node->ctx_.save_for_backward(std::move(saved.tensors));
  node->ctx_.saved_data["constants"] = c10::ivalue::Tuple::create(std::move(saved.constants));
  torch::autograd::set_history(out, node);
  node->output_info_.emplace_back(out);
  node->save_variables_to_ctx();
  announce<decltype(torch::autograd::Edge::function)>(node);
  return out;
}

// Arguments

// Whether a call is about its arguments alone: no mode, trace or transform of torch's sees it.
bool nobody_listens() {
  const uint64_t included = raw(c10::impl::tls_local_dispatch_key_set().included_);
  return !(included & ~raw(c10::default_included_set)) && !at::impl::torch_function_mode_enabled();
}

// A tensor that kernels read where it lies; nothing for all else.
const Tensor* plain_tensor(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return nullptr;
  const Tensor& tensor = THPVariable_Unpack(object);
  const bool plain = readable_dtype(tensor) && is_plain(tensor);
  return plain && !torch::autograd::isFwGradDefined(tensor) ? &tensor : nullptr;
}

// The same of one that has this shape and needs no derivative.
const Tensor* constant(PyObject* object, IntArrayRef shape) {
  const Tensor* const tensor = plain_tensor(object);
  return tensor && tensor->sizes() == shape && !wants_grad(*tensor) ? tensor : nullptr;
}

OptionalTensor copy_of(const Tensor* tensor) {
  return tensor ? OptionalTensor(*tensor) : std::nullopt;
}

std::optional<double> number(PyObject* object) {
  if (PyFloat_Check(object)) return PyFloat_AS_DOUBLE(object);
  if (!PyLong_Check(object)) return std::nullopt;
  const double value = PyLong_AsDouble(object);
  if (value == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    return std::nullopt;
  }
  return value;
}

std::optional<int64_t> integer(PyObject* object) {
  if (!PyLong_CheckExact(object)) return std::nullopt;
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow ? std::nullopt : std::optional<int64_t>(value);
}

bool is_string(PyObject* object, const char* text) {
  return PyUnicode_Check(object) && PyUnicode_CompareWithASCIIString(object, text) == 0;
}

bool is_list(PyObject* object) { return PyTuple_Check(object) || PyList_Check(object); }

// Logits whose columns lie along `dim`, and the shape of a value per row of them.
class Logits {
 public:
  static std::optional<Logits> from(PyObject* pred, PyObject* dim) {
    const Tensor* const tensor = plain_tensor(pred);
    const std::optional<int64_t> where = integer(dim);
    if (!tensor || !where || !tensor->is_floating_point()) return std::nullopt;
    const int64_t dims = tensor->dim();
    if (*where < -dims || *where >= dims || tensor->size(*where) == 0) return std::nullopt;
    return Logits(*tensor, *where < 0 ? *where + dims : *where);
  }
  IntArrayRef rows() const { return rows_; }
  IntArrayRef shape() const { return tensor_.sizes(); }
  int64_t columns() const { return tensor_.size(dim_); }
  // With the columns last: pred, or a tensor of its shape.
  Tensor last() const { return last(tensor_); }
  Tensor last(const Tensor& tensor) const {
    return dim_ == tensor.dim() - 1 ? tensor : tensor.movedim(dim_, -1);
  }

 private:
  Logits(const Tensor& tensor, int64_t dim) : tensor_(tensor), dim_(dim) {
    rows_.append(shape().begin(), shape().begin() + dim);
    rows_.append(shape().begin() + dim + 1, shape().end());
  }
  Tensor tensor_;
  int64_t dim_;
  c10::SmallVector<int64_t, 6> rows_;
};

// functional.py's _check_reduction, and what its _run makes of scale and avg_factor.
struct Scaling {
  Reduction reduction;
  double scale;
  OptionalTensor avg_factor = {};
  bool one_element = false;  // the result has avg_factor's shape [1]

  static std::optional<Scaling> from(PyObject* reduction, PyObject* avg_factor,
                                     PyObject* loss_weight) {
    const std::optional<double> weight = number(loss_weight);
    if (!weight) return std::nullopt;
    if (is_string(reduction, "none")) return Scaling{kNone, *weight};
    const bool is_sum = is_string(reduction, "sum");
    if (!is_sum && !is_string(reduction, "mean")) return std::nullopt;
    if (avg_factor == Py_None) return Scaling{is_sum ? kSum : kMean, *weight};
    if (is_sum) return std::nullopt;
    if (const std::optional<double> count = number(avg_factor)) {
      const double divisor = *count + std::numeric_limits<float>::epsilon();
      if (divisor == 0) return std::nullopt;
      return Scaling{kSum, *weight / divisor};
    }
    const Tensor* const count = plain_tensor(avg_factor);
    if (!count || count->numel() != 1 || count->dim() > 1) return std::nullopt;
    return Scaling{kSum, *weight, count->requires_grad() ? count->detach() : *count,
                   count->dim() == 1};
  }
};

// functional.py's _run.
template <typename Function>
PyObject* run_loss(const typename Function::Arguments& arguments, const Scaling& scaling) {
  const Tensor& pred = std::get<0>(arguments);
  // Not for float16: under a GradScaler the upstream gradient is never 1, and an unscaled float16
  // gradient has already lost its small values.
  const bool write_grad =
      scaling.reduction != kNone && wants_grad(pred) && pred.scalar_type() != at::kHalf;
  Tensor loss = apply<Function>(arguments, write_grad);
  return THPVariable_Wrap(scaling.one_element ? loss.view({1}) : std::move(loss));
}

// (pred, target, form, flags, alpha, beta, weight, avg_factor, reduction, class_dim, loss_weight,
// elementwise): functional.py's _quality_family.
PyObject* quality(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 12, "quality takes 12 arguments, got ", count);
  PyObject* const target = args[1];
  PyObject* const weight = args[6];
  const std::optional<Logits> pred = Logits::from(args[0], args[9]);
  const std::optional<int64_t> form = integer(args[2]), flags = integer(args[3]);
  const std::optional<double> alpha = number(args[4]), beta = number(args[5]);
  std::optional<Scaling> scaling = Scaling::from(args[8], args[7], args[10]);
  if (!nobody_listens() || !pred || !form || !flags || !alpha || !beta || !(*beta >= 0) ||
      !scaling) {
    Py_RETURN_NONE;
  }
  if (args[11] == Py_True) {
    if (scaling->reduction == kNone) Py_RETURN_NONE;
    if (scaling->reduction == kMean) scaling->scale /= static_cast<double>(pred->columns());
  }

  const bool sparse = is_list(target);
  if (sparse && PySequence_Fast_GET_SIZE(target) != 2) Py_RETURN_NONE;
  const Tensor* const label = sparse ? constant(PySequence_Fast_GET_ITEM(target, 0), pred->rows())
                                     : constant(target, pred->shape());
  const Tensor* const score =
      sparse ? constant(PySequence_Fast_GET_ITEM(target, 1), pred->rows()) : nullptr;
  if (!label || (sparse && !score)) Py_RETURN_NONE;
  OptionalTensor factors;
  if (weight != Py_None) {
    if (const Tensor* const per_row = constant(weight, pred->rows())) {
      factors = *per_row;
    } else if (const Tensor* const per_element = constant(weight, pred->shape())) {
      factors = pred->last(*per_element);
    } else {
      Py_RETURN_NONE;
    }
  }
  return run_loss<QualityFocal>(
      {pred->last(), sparse ? *label : pred->last(*label), copy_of(score), std::move(factors),
       scaling->avg_factor, *form, *flags, *alpha, *beta, scaling->scale, scaling->reduction},
      *scaling);
  END_HANDLE_TH_ERRORS
}

// (pred, target, weight, avg_factor, reduction, bin_dim, loss_weight): functional.py's
// _distribution_focal_loss.
PyObject* distribution(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 7, "distribution takes 7 arguments, got ", count);
  PyObject* const target = args[1];
  PyObject* const weight = args[2];
  const std::optional<Logits> pred = Logits::from(args[0], args[5]);
  const std::optional<Scaling> scaling = Scaling::from(args[4], args[3], args[6]);
  if (!nobody_listens() || !pred || !scaling) Py_RETURN_NONE;

  const Tensor* parts[3] = {};  // the position, or the left bin and two weights
  const bool explicit_weights = is_list(target);
  if (explicit_weights && PySequence_Fast_GET_SIZE(target) != 3) Py_RETURN_NONE;
  for (int i = 0; i < (explicit_weights ? 3 : 1); ++i) {
    PyObject* const part = explicit_weights ? PySequence_Fast_GET_ITEM(target, i) : target;
    parts[i] = constant(part, pred->rows());
    if (!parts[i]) Py_RETURN_NONE;
  }
  const Tensor* const factors = weight == Py_None ? nullptr : constant(weight, pred->rows());
  if (weight != Py_None && !factors) Py_RETURN_NONE;
  return run_loss<DistributionFocal>(
      {pred->last(), *parts[0], copy_of(parts[1]), copy_of(parts[2]), copy_of(factors),
       scaling->avg_factor, scaling->scale, scaling->reduction},
      *scaling);
  END_HANDLE_TH_ERRORS
}

// (pred, bins, bin_dim, mode, window): functional.py's integral.
PyObject* integral(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 5, "integral takes 5 arguments, got ", count);
  const std::optional<Logits> pred = Logits::from(args[0], args[2]);
  const bool peak = is_string(args[3], "peak");
  std::optional<int64_t> window = integer(args[4]);
  if (!nobody_listens() || !pred || !window || *window < 0 ||
      !(peak || is_string(args[3], "mean"))) {
    Py_RETURN_NONE;
  }
  const Tensor last = pred->last();
  const Tensor* bins = nullptr;
  if (args[1] != Py_None) {
    bins = constant(args[1], {pred->columns()});
    if (!bins || bins->scalar_type() != accumulator(last)) Py_RETURN_NONE;
  }
  // A window that takes in all bins everywhere is the mean.
  if (!peak || *window >= pred->columns() - 1) window = -1;
  const bool save = *window < 0 && wants_grad(last) && last.is_contiguous();
  return THPVariable_Wrap(apply<Integral>({last, copy_of(bins), *window}, save));
  END_HANDLE_TH_ERRORS
}

// Not through pybind11, whose reading of a dozen arguments takes longer than all of the above.
template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)>
constexpr PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), METH_FASTCALL,
          nullptr};
}

}  // namespace gfl

PYBIND11_MODULE(_autograd, m) {
  m.doc() =
      "The losses and the integral as nodes of autograd; None for arguments that Python has to "
      "judge";
  static PyMethodDef methods[] = {
      gfl::method<gfl::quality>("quality"),
      gfl::method<gfl::distribution>("distribution"),
      gfl::method<gfl::integral>("integral"),
      {nullptr, nullptr, 0, nullptr},
  };
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw pybind11::error_already_set();
}
