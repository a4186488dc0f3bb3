// gfl_kernels._autograd: the losses and the integral from Python's arguments to a node of autograd,
// in C++.
//
// What a call means is written in functional.py and ops.py; this is the same for the arguments that
// nearly all calls on a CPU have, without their microseconds in Python. Whatever else a call may
// be, wrong ones included, is left to them: a function here returns None, and has done nothing.
//
// torch::autograd::Function is no part of the stable ABI, so this module serves the one version of
// torch that it was built against (native.py looks), and the package does without it elsewhere.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <Python.h>  // before all others, as CPython asks
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>

#include <limits>
#include <optional>
#include <string>

namespace gfl {

using at::IntArrayRef;
using at::Tensor;
using c10::DispatchKey;
using c10::IValue;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torch::jit::Stack;

// Reductions as the schemas carry them: gfl_kernels/ops.py.
enum Reduction : int64_t { kNone, kSum, kMean };

// Ops

c10::OperatorHandle find_op(const char* library, const char* family, const char* which) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(
      (std::string(library) + "::" + family + "_" + which).c_str(), "");
}

// The compiled kernels of a family, and its backward as autograd sees it, whose own derivative is
// refused by name.
struct Ops {
  explicit Ops(const char* family)
      : forward(find_op("gfl_native", family, "forward")),
        backward(find_op("gfl_native", family, "backward")),
        refusing(find_op("gfl_kernels", family, "backward")) {}
  c10::OperatorHandle forward, backward, refusing;
};

void run_kernels(const c10::OperatorHandle& op, Stack& stack) {
  at::AutoDispatchBelowADInplaceOrView below;
  op.callBoxed(stack);
}

// The derivative of what forward has computed: with create_graph=True through the dispatcher.
Tensor derivative(const Ops& ops, Stack stack) {
  if (at::GradMode::is_enabled()) {
    ops.refusing.callBoxed(stack);
  } else {
    run_kernels(ops.backward, stack);
  }
  return stack[0].toTensor();
}

IValue optional(const Tensor& tensor) { return tensor.defined() ? IValue(tensor) : IValue(); }
Tensor tensor_of(const IValue& value) { return value.isNone() ? Tensor() : value.toTensor(); }

uint64_t raw(c10::DispatchKeySet keys) { return keys.raw_repr(); }

// Whether a tensor is what its memory says: dense, on the CPU, no wrapper, no pending conjugation
// or sign.
bool is_plain(const Tensor& tensor) {
  static const uint64_t plain =
      raw(c10::DispatchKeySet({DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::AutocastCPU,
                               DispatchKey::ADInplaceOrView}));
  return !(raw(tensor.key_set()) & ~plain) && tensor.layout() == at::kStrided;
}

// Losses

bool is_one(const Tensor& grad) {
  if (grad.numel() != 1 || !is_plain(grad)) return false;
  if (grad.scalar_type() == at::kFloat) return *grad.const_data_ptr<float>() == 1;
  return grad.scalar_type() == at::kDouble && *grad.const_data_ptr<double>() == 1;
}

// ops.py's _loss_function, _save and _gradient. Self has the name of its ops' family and the number
// of tensors that they begin with; inputs: the op's, of which pred is the first.
template <typename Self>
struct Loss : torch::autograd::Function<Self> {
  static const Ops& ops() {
    static const Ops found(Self::family);
    return found;
  }

  static Tensor forward(AutogradContext* ctx, const Tensor& pred, const Stack& inputs) {
    Stack stack = inputs;
    run_kernels(Self::ops().forward, stack);
    variable_list saved{pred};
    for (size_t i = 1; i < Self::tensors; ++i) saved.push_back(tensor_of(inputs[i]));
    saved.push_back(inputs.back().toBool() ? stack[1].toTensor() : Tensor());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["constants"] =
        c10::ivalue::Tuple::create({inputs.begin() + Self::tensors, inputs.end() - 1});
    return stack[0].toTensor();
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const Tensor& grad_loss = upstream[0];
    variable_list saved = ctx->get_saved_variables();
    const Tensor grad = std::move(saved.back());
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
    Stack stack{grad_loss};
    for (size_t i = 0; i < Self::tensors; ++i) stack.push_back(optional(saved[i]));
    for (const IValue& value : ctx->saved_data["constants"].toTupleRef().elements()) {
      stack.push_back(value);
    }
    return {derivative(Self::ops(), std::move(stack))};
  }
};

struct QualityFocal : Loss<QualityFocal> {
  static constexpr char shown[] = "QualityFocalBackward";
  static constexpr char family[] = "quality";
  static constexpr size_t tensors = 5;
};
struct DistributionFocal : Loss<DistributionFocal> {
  static constexpr char shown[] = "DistributionFocalBackward";
  static constexpr char family[] = "distribution";
  static constexpr size_t tensors = 6;
};

// ops.py's Integral.
struct Integral : torch::autograd::Function<Integral> {
  static constexpr char shown[] = "IntegralBackward";

  static const Ops& ops() {
    static const Ops found("integral");
    return found;
  }

  static Tensor forward(AutogradContext* ctx, const Tensor& pred, const Stack& inputs) {
    Stack stack = inputs;
    run_kernels(ops().forward, stack);
    ctx->save_for_backward(
        {pred, tensor_of(inputs[1]), inputs[3].toBool() ? stack[1].toTensor() : Tensor()});
    ctx->saved_data["window"] = inputs[2];
    return stack[0].toTensor();
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const variable_list saved = ctx->get_saved_variables();
    Stack stack{upstream[0], saved[0], optional(saved[1]), ctx->saved_data["window"],
                optional(saved[2])};
    return {derivative(ops(), std::move(stack))};
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

// What torch::autograd::Function::apply comes to for a Function of one input and one output, both
// of them plain; it takes 7 of the 35 microseconds of a step on 64 x 80 logits. inputs: those of
// the forward op, pred first.
template <typename Function>
Tensor apply(Stack inputs) {
  const pybind11::gil_scoped_release unlocked;
  const Tensor pred = inputs[0].toTensor();
  if (!pred.requires_grad() || !at::GradMode::is_enabled()) {
    run_kernels(Function::ops().forward, inputs);
    return inputs[0].toTensor();
  }
  const auto node = new_node<NodeOf<Function>>();
  node->set_ctx_grad_fn(node);
  node->set_next_edges(torch::autograd::collect_next_edges(pred));
  node->is_variable_input_ = {true};
  node->input_info_.emplace_back(pred);
  Tensor out = Function::forward(&node->ctx_, pred, inputs);
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

bool is_kernel_float(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

at::ScalarType accumulator(const Tensor& pred) {
  return pred.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// A tensor that kernels read where it lies; nothing for all else.
const Tensor* plain_tensor(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return nullptr;
  const Tensor& tensor = THPVariable_Unpack(object);
  const at::ScalarType type = tensor.scalar_type();
  const bool readable = is_kernel_float(type) || at::isIntegralType(type, /*includeBool=*/true);
  // Unsigned integers but uint8 count as integral, too.
  const bool wide_unsigned = type == at::kUInt16 || type == at::kUInt32 || type == at::kUInt64;
  if (!readable || wide_unsigned || !is_plain(tensor) || torch::autograd::isFwGradDefined(tensor)) {
    return nullptr;
  }
  return &tensor;
}

// The same of one without a gradient to come.
const Tensor* constant(PyObject* object) {
  const Tensor* const tensor = plain_tensor(object);
  return tensor && !(tensor->requires_grad() && at::GradMode::is_enabled()) ? tensor : nullptr;
}

const Tensor* constant(PyObject* object, IntArrayRef shape) {
  const Tensor* const tensor = constant(object);
  return tensor && tensor->sizes() == shape ? tensor : nullptr;
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

bool is_pair_or_more(PyObject* object) { return PyTuple_Check(object) || PyList_Check(object); }

// Logits whose columns lie along `dim`, and the shape of a value per row of them.
class Logits {
 public:
  static std::optional<Logits> from(PyObject* pred, PyObject* dim) {
    const Tensor* const tensor = plain_tensor(pred);
    const std::optional<int64_t> where = integer(dim);
    if (!tensor || !where || !is_kernel_float(tensor->scalar_type())) return std::nullopt;
    const int64_t dims = tensor->dim();
    if (*where < -dims || *where >= dims || tensor->size(*where) == 0) return std::nullopt;
    return Logits(*tensor, *where < 0 ? *where + dims : *where);
  }
  const Tensor& tensor() const { return tensor_; }
  IntArrayRef rows() const { return rows_; }
  IntArrayRef shape() const { return tensor_.sizes(); }
  int64_t columns() const { return tensor_.size(dim_); }
  // A tensor of this shape with its columns last.
  Tensor last(const Tensor& tensor) const {
    return dim_ == tensor.dim() - 1 ? tensor : tensor.movedim(dim_, -1);
  }
  bool wants_grad() const { return tensor_.requires_grad() && at::GradMode::is_enabled(); }

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
  IValue avg_factor;
  bool one_element = false;  // the result has avg_factor's shape [1]

  static std::optional<Scaling> from(PyObject* reduction, PyObject* avg_factor,
                                     PyObject* loss_weight) {
    const std::optional<double> weight = number(loss_weight);
    if (!weight) return std::nullopt;
    if (is_string(reduction, "none")) return Scaling{kNone, *weight, IValue()};
    const bool is_sum = is_string(reduction, "sum");
    if (!is_sum && !is_string(reduction, "mean")) return std::nullopt;
    if (avg_factor == Py_None) return Scaling{is_sum ? kSum : kMean, *weight, IValue()};
    if (is_sum) return std::nullopt;
    if (const std::optional<double> count = number(avg_factor)) {
      const double divisor = *count + std::numeric_limits<float>::epsilon();
      if (divisor == 0) return std::nullopt;
      return Scaling{kSum, *weight / divisor, IValue()};
    }
    const Tensor* const count = plain_tensor(avg_factor);
    if (!count || count->numel() != 1 || count->dim() > 1) return std::nullopt;
    const Tensor detached = count->requires_grad() ? count->detach() : *count;
    return Scaling{kSum, *weight, detached, count->dim() == 1};
  }
};

// functional.py's _run. stack: the op's arguments before avg_factor, with pred's columns last.
template <typename Function>
PyObject* run_loss(const Logits& pred, Stack stack, std::initializer_list<IValue> constants,
                   const Scaling& scaling) {
  stack.push_back(scaling.avg_factor);
  stack.insert(stack.end(), constants);
  // Not for float16: under a GradScaler the upstream gradient is never 1, and an unscaled float16
  // gradient has already lost its small values.
  const bool write_grad =
      scaling.reduction != kNone && pred.wants_grad() && pred.tensor().scalar_type() != at::kHalf;
  stack.insert(stack.end(), {scaling.scale, static_cast<int64_t>(scaling.reduction), write_grad});
  Tensor loss = apply<Function>(std::move(stack));
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

  Stack stack{pred->last(pred->tensor())};
  stack.reserve(13);
  if (is_pair_or_more(target)) {
    if (PySequence_Fast_GET_SIZE(target) != 2) Py_RETURN_NONE;
    PyObject* const* const pair = PySequence_Fast_ITEMS(target);
    const Tensor* const label = constant(pair[0], pred->rows());
    const Tensor* const score = constant(pair[1], pred->rows());
    if (!label || !score) Py_RETURN_NONE;
    stack.insert(stack.end(), {*label, *score});
  } else {
    const Tensor* const dense = constant(target, pred->shape());
    if (!dense) Py_RETURN_NONE;
    stack.insert(stack.end(), {pred->last(*dense), IValue()});
  }
  if (weight == Py_None) {
    stack.emplace_back();
  } else if (const Tensor* const per_row = constant(weight, pred->rows())) {
    stack.emplace_back(*per_row);
  } else if (const Tensor* const per_element = constant(weight, pred->shape())) {
    stack.emplace_back(pred->last(*per_element));
  } else {
    Py_RETURN_NONE;
  }
  return run_loss<QualityFocal>(*pred, std::move(stack), {*form, *flags, *alpha, *beta}, *scaling);
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

  Stack stack{pred->last(pred->tensor())};
  stack.reserve(9);
  if (is_pair_or_more(target)) {
    if (PySequence_Fast_GET_SIZE(target) != 3) Py_RETURN_NONE;
    for (int i = 0; i < 3; ++i) {
      const Tensor* const part = constant(PySequence_Fast_GET_ITEM(target, i), pred->rows());
      if (!part) Py_RETURN_NONE;
      stack.emplace_back(*part);
    }
  } else {
    const Tensor* const position = constant(target, pred->rows());
    if (!position) Py_RETURN_NONE;
    stack.insert(stack.end(), {*position, IValue(), IValue()});
  }
  const Tensor* const per_row = weight == Py_None ? nullptr : constant(weight, pred->rows());
  if (weight != Py_None && !per_row) Py_RETURN_NONE;
  stack.push_back(per_row ? IValue(*per_row) : IValue());
  return run_loss<DistributionFocal>(*pred, std::move(stack), {}, *scaling);
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
  const Tensor* bins = nullptr;
  if (args[1] != Py_None) {
    bins = constant(args[1], {pred->columns()});
    if (!bins || bins->scalar_type() != accumulator(pred->tensor())) Py_RETURN_NONE;
  }
  // A window that takes in all bins everywhere is the mean.
  if (!peak || *window >= pred->columns() - 1) window = -1;
  const Tensor last = pred->last(pred->tensor());
  const bool save = *window < 0 && pred->wants_grad() && last.is_contiguous();
  return THPVariable_Wrap(apply<Integral>({last, bins ? IValue(*bins) : IValue(), *window, save}));
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
