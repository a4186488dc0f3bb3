"""Op schemas (their only definition), fake kernels and autograd.

Every op exists twice under one schema. ``gfl_kernels::name`` is the one that users, compiled graphs
and autograd
see: it asks :mod:`gfl_kernels.dispatch` for the backend. ``gfl_native::name`` is what the compiled
library implements (STABLE_TORCH_LIBRARY_IMPL in csrc). The autograd Functions below are what runs
eagerly: they call the chosen backend directly, which saves a trip through the dispatcher, and may
look at values. ``gfl_kernels::name`` carries the same autograd in traceable form; torch.compile
records it instead of the Function.

Rows and classes: pred is [..., C] (or [..., K]) with any strides; its leading dimensions are the
rows. Losses are float32, or float64 for float64; gradients have pred's dtype and
``torch.empty_like(pred)``'s layout.

reduction is NONE (a loss per row, times scale), SUM (a 0-dim tensor: the sum over rows, times
scale, divided by avg_factor + eps(float32) if there is one) or MEAN (SUM divided by the number of
rows).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch
from .reference import accumulate_dtype

# Reductions and forms as the schemas carry them; csrc/cpu/ops.cpp has the same numbers.
NONE, SUM, MEAN = 0, 1, 2
LOGITS, PROBABILITIES = 0, 1

_QUALITY = (
    "Tensor pred, Tensor target, Tensor? score, Tensor? weight, Tensor? avg_factor, "
    "int form, float beta, float scale, int reduction"
)
_DISTRIBUTION = (
    "Tensor pred, Tensor target, Tensor? weight_left, Tensor? weight_right, Tensor? weight, "
    "Tensor? avg_factor, float scale, int reduction"
)

SCHEMAS = {
    # target is a label per row where score is given (sparse), else a quality per class (dense).
    # write_grad: also return the gradient for an upstream gradient of 1 (not for NONE); otherwise
    # grad is empty.
    "quality_forward": f"({_QUALITY}, bool write_grad) -> (Tensor loss, Tensor grad)",
    "quality_backward": f"(Tensor grad_loss, {_QUALITY}) -> Tensor",
    # target is a position in bins, or the left bin where weight_left and weight_right are given.
    "distribution_forward": f"({_DISTRIBUTION}, bool write_grad) -> (Tensor loss, Tensor grad)",
    "distribution_backward": f"(Tensor grad_loss, {_DISTRIBUTION}) -> Tensor",
    # bins holds the value of each bin; 0, 1, 2, ... without it.
    "integral_forward": "(Tensor pred, Tensor? bins) -> Tensor",
    "integral_backward": "(Tensor grad_out, Tensor pred, Tensor? bins) -> Tensor",
}

_libraries = [torch.library.Library(ns, "DEF") for ns in ("gfl_kernels", "gfl_native")]


# Fake kernels


def _fake_loss_grad(pred: Tensor, reduction: int, write_grad: bool) -> tuple[Tensor, Tensor]:
    rows = pred.shape[:-1] if reduction == NONE else ()
    loss = pred.new_empty(rows, dtype=accumulate_dtype(pred.dtype))
    return loss, torch.empty_like(pred) if write_grad else pred.new_empty(0)


def _fake_forward(pred: Tensor, *args) -> tuple[Tensor, Tensor]:
    *_, reduction, write_grad = args
    return _fake_loss_grad(pred, reduction, write_grad)


def _fake_backward(grad: Tensor, pred: Tensor, *_) -> Tensor:
    return torch.empty_like(pred)


def _fake_integral(pred: Tensor, bins: Tensor | None) -> Tensor:
    return pred.new_empty(pred.shape[:-1], dtype=accumulate_dtype(pred.dtype))


_FAKES = {
    "quality_forward": _fake_forward,
    "quality_backward": _fake_backward,
    "distribution_forward": _fake_forward,
    "distribution_backward": _fake_backward,
    "integral_forward": _fake_integral,
    "integral_backward": _fake_backward,
}


def _dispatched(name: str, pred_index: int):
    def call(*args):
        return dispatch.kernel(name, args[pred_index])(*args)

    return call


for _name, _signature in SCHEMAS.items():
    for _library in _libraries:
        _library.define(_name + _signature)
        torch.library.register_fake(f"{_library.ns}::{_name}", _FAKES[_name], lib=_library)
    _pred_index = 1 if _name.endswith("_backward") else 0
    _libraries[0].impl(_name, _dispatched(_name, _pred_index), "CompositeExplicitAutograd")


# Autograd


def _save(ctx, tensors: int, inputs, grad: Tensor) -> None:
    """Keep the forward op's inputs and the gradient, if it wrote one.

    The first ``tensors`` inputs are tensors, the last is write_grad.
    """
    ctx.save_for_backward(*inputs[:tensors], grad if inputs[-1] else None)
    ctx.constants = inputs[tensors:-1]


def _gradient(ctx, grad_loss: Tensor, name: str, eager: bool) -> Tensor:
    """pred's gradient, out of what _save kept. name: the backward op."""
    *tensors, grad = ctx.saved_tensors
    if torch.is_grad_enabled():
        # create_graph=True: through the op, whose own derivative is refused by name
        # (_refuse_double_backward).
        return getattr(torch.ops.gfl_kernels, name)(grad_loss, *tensors, *ctx.constants)
    if grad is not None:
        # Forward left the gradient for an upstream gradient of 1. On the CPU the host may look
        # (unless the tensor is a fake one): 1 is what loss.backward() sends, and then the saved
        # tensor goes out as it is. It is out of autograd's hands there, so a graph that is kept for
        # another backward gives a copy.
        if eager and type(grad_loss) is Tensor and grad_loss.item() == 1:
            return grad.clone() if torch._C._autograd._get_current_graph_task_keep_graph() else grad
        # Scaling would round a bfloat16 gradient a second time: that one is computed again.
        if grad.dtype is not torch.bfloat16:
            return grad * grad_loss
    op = dispatch.kernel(name, tensors[0]) if eager else getattr(torch.ops.gfl_kernels, name)
    return op(grad_loss, *tensors, *ctx.constants)


class QualityFocal(torch.autograd.Function):
    """Quality Focal Loss; arguments are those of ``gfl_kernels::quality_forward``."""

    @staticmethod
    def forward(ctx, *inputs):
        loss, grad = dispatch.kernel("quality_forward", inputs[0])(*inputs)
        _save(ctx, 5, inputs, grad)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        return (_gradient(ctx, grad_loss, "quality_backward", eager=True), *_NO_GRADIENT[:9])


class DistributionFocal(torch.autograd.Function):
    """Distribution Focal Loss; arguments are those of ``gfl_kernels::distribution_forward``."""

    @staticmethod
    def forward(ctx, *inputs):
        loss, grad = dispatch.kernel("distribution_forward", inputs[0])(*inputs)
        _save(ctx, 6, inputs, grad)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        return (_gradient(ctx, grad_loss, "distribution_backward", eager=True), *_NO_GRADIENT[:8])


_NO_GRADIENT = (None,) * 9  # for the inputs after pred


class DistributionIntegral(torch.autograd.Function):
    """Expectation of each row; arguments are those of ``gfl_kernels::integral_forward``."""

    @staticmethod
    def forward(ctx, pred, bins):
        ctx.save_for_backward(pred, bins)
        return dispatch.kernel("integral_forward", pred)(pred, bins)

    @staticmethod
    def backward(ctx, grad_out):
        pred, bins = ctx.saved_tensors
        if torch.is_grad_enabled():
            return torch.ops.gfl_kernels.integral_backward(grad_out, pred, bins), None
        return dispatch.kernel("integral_backward", pred)(grad_out, pred, bins), None


# Function.apply without its Python wrapper, which only serves torch.func transforms (dispatch keeps
# those out) and costs a microsecond where a whole call on small logits takes thirty.
apply_quality_focal = super(torch.autograd.Function, QualityFocal).apply
apply_distribution_focal = super(torch.autograd.Function, DistributionFocal).apply
apply_distribution_integral = super(torch.autograd.Function, DistributionIntegral).apply


def _register_loss_autograd(family: str, tensors: int) -> None:
    """Autograd of the op itself: for compiled graphs and users of ``torch.ops.gfl_kernels``."""

    def setup_context(ctx, inputs, output):
        _save(ctx, tensors, inputs, output[1])
        ctx.others = len(inputs) - 1

    def backward(ctx, grad_loss, _grad_of_grad):
        return (_gradient(ctx, grad_loss, f"{family}_backward", eager=False), *[None] * ctx.others)

    name = f"gfl_kernels::{family}_forward"
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_libraries[0])


def _refuse_double_backward(name: str) -> None:
    # Blocked here and not by once_differentiable, which lets create_graph=True through and returns
    # a constant.
    def backward(ctx, *_):
        raise RuntimeError(
            f"{name} is not differentiable: the fused backends have no double backward. "
            "Compute the loss under gfl_kernels.use_backend('reference') for that."
        )

    torch.library.register_autograd(f"gfl_kernels::{name}", backward, lib=_libraries[0])


_register_loss_autograd("quality", 5)
_register_loss_autograd("distribution", 6)
torch.library.register_autograd(
    "gfl_kernels::integral_forward",
    lambda ctx, grad_out: (
        torch.ops.gfl_kernels.integral_backward(grad_out, *ctx.saved_tensors),
        None,
    ),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    lib=_libraries[0],
)
for _name in SCHEMAS:
    if _name.endswith("_backward"):
        _refuse_double_backward(_name)
