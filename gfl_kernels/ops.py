"""Op schemas (their only definition), fake kernels and autograd.

Every op exists twice under one schema. ``gfl_kernels::name`` is the one that users, compiled graphs
and autograd
see: it asks :mod:`gfl_kernels.dispatch` for the backend. ``gfl_native::name`` is what the compiled
library implements (STABLE_TORCH_LIBRARY_IMPL in csrc). The autograd Functions below are what runs
eagerly: they call the chosen backend directly, which saves a trip through the dispatcher, and may
look at values. ``gfl_kernels::name`` carries the same autograd in traceable form; torch.compile
records it instead of the Function. Usual calls on a CPU do not come here: python/autograd.cpp has
the Functions of the losses and of the integral in C++.

Rows and classes: pred is [..., C] (or [..., K]) with any strides; its leading dimensions are the
rows. Losses are float32, or float64 for float64; gradients have pred's dtype and
``torch.empty_like(pred)``'s layout.

reduction is NONE (a loss per row, times scale), SUM (a 0-dim tensor: the sum over rows, times
scale, divided by avg_factor + eps(float32) if there is one) or MEAN (SUM divided by the number of
rows).

The head ops take the levels of a pyramid as lists, [B, ..., C] class logits and [B, ..., 4 K] box
logits with one or two dimensions of cells and any strides; per level n cells: points [n, 2], labels
[B, n], box_targets [B, n, 4], in pixels, and label_weights [B, n] or none at all. Without targets
a label in [0, C) is positive; with targets, qualities [B, ..., C], labels are a mask. head_boxes
looks at the positives; head_forward is what autograd sees, so that between the two the
normalisers can be reduced over the processes of a job. form is LOGITS, the Quality Focal Loss, or,
with targets, VARIFOCAL, the Varifocal Loss with alpha and a gamma of beta.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch
from .reference import accumulate_dtype

# Reductions as the schemas carry them; csrc/ops.h has the same.
NONE, SUM, MEAN = 0, 1, 2
IOUS = {"iou": 0, "giou": 1, "diou": 2, "ciou": 3, "ciou_all": 4}  # reference.box_loss's kinds

_QUALITY = (
    "Tensor pred, Tensor target, Tensor? score, Tensor? weight, Tensor? avg_factor, "
    "int form, int flags, float alpha, float beta, float scale, int reduction"
)
_DISTRIBUTION = (
    "Tensor pred, Tensor target, Tensor? weight_left, Tensor? weight_right, Tensor? weight, "
    "Tensor? avg_factor, float scale, int reduction"
)
_DISTILLATION = (
    "Tensor pred, Tensor teacher, Tensor? weight, Tensor? avg_factor, float temperature, "
    "float scale, int reduction"
)
_LEVELS = (
    "Tensor[] cls, Tensor[] box, Tensor[] points, Tensor[] labels, Tensor[] box_targets, "
    "Tensor[] targets, Tensor[] label_weights"
)
_BOX = "float[] strides, int iou, float iou_eps, float limit"
_HEAD = (
    f"{_LEVELS}, Tensor quality, Tensor weight, Tensor sums, Tensor normalisers, {_BOX}, "
    "int form, float alpha, float beta, float[] loss_weights"
)

SCHEMAS = {
    # A loss of the quality family. form and flags are reference.py's; alpha is not used by LOGITS
    # and PROBABILITIES.
    # target is a label per row where score is given (sparse), else a quality per class (dense).
    # write_grad: also return the gradient for an upstream gradient of 1 (not for NONE); otherwise
    # grad is empty.
    "quality_forward": f"({_QUALITY}, bool write_grad) -> (Tensor loss, Tensor grad)",
    "quality_backward": f"(Tensor grad_loss, {_QUALITY}) -> Tensor",
    # target is a position in bins, or the left bin where weight_left and weight_right are given.
    "distribution_forward": f"({_DISTRIBUTION}, bool write_grad) -> (Tensor loss, Tensor grad)",
    "distribution_backward": f"(Tensor grad_loss, {_DISTRIBUTION}) -> Tensor",
    # bins holds the value of each bin; 0, 1, 2, ... without it. window: the bins beside the highest
    # one that count; all do if it is negative. save: also return what spares backward a second look
    # at whole rows, [..., 2] as gfl_kernels.h has it (gfl_integral_args); on a CPU alone, else and
    # without save it is empty.
    "integral_forward": "(Tensor pred, Tensor? bins, int window=-1, bool save=False) "
    "-> (Tensor out, Tensor saved)",
    "integral_backward": "(Tensor grad_out, Tensor pred, Tensor? bins, int window=-1, "
    "Tensor? saved=None) -> Tensor",
    # [..., topk], and their mean behind them, in memory as pred is: new_statistics.
    "statistics_forward": "(Tensor pred, int topk, bool add_mean) -> Tensor",
    "statistics_backward": "(Tensor grad_out, Tensor pred, int topk, bool add_mean) -> Tensor",
    # [..., 3], mean, standard deviation and entropy, each without gaps.
    "moments_forward": "(Tensor pred, Tensor? bins) -> Tensor",
    "moments_backward": "(Tensor grad_out, Tensor pred, Tensor? bins) -> Tensor",
    # Of every positive, 0 elsewhere, A the anchors of all levels: its IoU, its weight (the highest
    # score, or the sum of its targets) [B, A], and with write_boxes the decoded box [B, A, 4] in
    # pixels, else empty. sums [L, 2]: weighted box loss and DFL, not normalised. normalisers [2]:
    # the sum over images of max(positives, 1) (with targets, of the weights), and of the weights.
    "head_boxes": f"({_LEVELS}, {_BOX}, bool write_boxes) "
    "-> (Tensor quality, Tensor weight, Tensor sums, Tensor normalisers, Tensor boxes)",
    # The three losses, and each per level [L]. grads: cls's and box's gradients for an upstream
    # gradient of 1 of the three, if write_grad, else none.
    "head_forward": f"({_HEAD}, bool write_grad) -> (Tensor loss_cls, Tensor loss_bbox, "
    "Tensor loss_dfl, Tensor levels_cls, Tensor levels_bbox, Tensor levels_dfl, Tensor[] grads)",
    "head_backward": "(Tensor? grad_cls, Tensor? grad_bbox, Tensor? grad_dfl, "
    "Tensor? grad_levels_cls, Tensor? grad_levels_bbox, Tensor? grad_levels_dfl, "
    f"{_HEAD}) -> Tensor[]",
    # teacher has pred's dtype.
    "distillation_forward": f"({_DISTILLATION}, bool write_grad) -> (Tensor loss, Tensor grad)",
    "distillation_backward": f"(Tensor grad_loss, {_DISTILLATION}) -> Tensor",
    # points and limits (height, width) [..., 2], strides [...] and cls [..., C] are rows as pred's
    # [..., 4 K]; stride and size are for all of them, size empty where nothing is clipped; window <
    # 0 is the mean. boxes and, if asked for, deviation [..., 4]; with cls score and label (int64)
    # [...]; else these are empty.
    "decode_boxes": "(Tensor pred, Tensor points, Tensor? strides, Tensor? bins, Tensor? cls, "
    "Tensor? limits, float stride, float[] size, int window, bool write_deviation) "
    "-> (Tensor boxes, Tensor score, Tensor label, Tensor deviation)",
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


def new_integral(pred: Tensor, *_) -> Tensor:
    """[...], to be written."""
    return pred.new_empty(pred.shape[:-1], dtype=accumulate_dtype(pred.dtype))


def new_saved(pred: Tensor, save: bool) -> Tensor:
    """What an integral leaves for backward, to be written: [..., 2], or empty."""
    if save and pred.device.type == "cpu":
        return _new_planes(pred, 2)
    return pred.new_empty(0, dtype=torch.float32)


def _fake_integral(pred: Tensor, bins=None, window=-1, save=False) -> tuple[Tensor, Tensor]:
    return new_integral(pred), new_saved(pred, save)


def new_statistics(pred: Tensor, topk: int, add_mean: bool) -> Tensor:
    """[..., topk + add_mean], to be written, without gaps. Its dimensions lie in memory in the
    order of pred's: planes for pred in planes, as the convolution behind reads them.
    """
    shape = (*pred.shape[:-1], topk + add_mean)
    strides, step = [1] * pred.dim(), 1
    for dim in reversed(sorted(range(pred.dim()), key=pred.stride, reverse=True)):
        strides[dim] = step
        step *= max(shape[dim], 1)
    dtype = accumulate_dtype(pred.dtype)
    return torch.empty_strided(shape, strides, dtype=dtype, device=pred.device)


def new_moments(pred: Tensor, *_) -> Tensor:
    """[..., 3], to be written, each of the three without gaps."""
    return _new_planes(pred, 3)


def _new_planes(pred: Tensor, columns: int) -> Tensor:
    shape = (columns, *pred.shape[:-1])
    return pred.new_empty(shape, dtype=accumulate_dtype(pred.dtype)).movedim(0, -1)


def _fake_head_boxes(cls: list[Tensor], box: list[Tensor], *args):
    write_boxes = args[-1]
    batch, anchors = cls[0].shape[0], sum(math.prod(level.shape[1:-1]) for level in cls)

    def new(*shape):
        return cls[0].new_empty(shape, dtype=accumulate_dtype(cls[0].dtype))

    boxes = new(batch, anchors, 4) if write_boxes else new(0)
    return new(batch, anchors), new(batch, anchors), new(len(cls), 2), new(2), boxes


def _fake_head_forward(cls: list[Tensor], box: list[Tensor], *args):
    write_grad = args[-1]
    shapes = [()] * 3 + [(len(cls),)] * 3
    losses = [cls[0].new_empty(s, dtype=accumulate_dtype(cls[0].dtype)) for s in shapes]
    return *losses, [torch.empty_like(level) for level in (*cls, *box)] if write_grad else []


def _fake_head_backward(*args):
    cls, box = args[6:8]
    return [torch.empty_like(level) for level in (*cls, *box)]


def _fake_decode_boxes(pred: Tensor, *args) -> tuple[Tensor, ...]:
    cls, write_deviation = args[3], args[-1]
    rows, dtype = pred.shape[:-1], accumulate_dtype(pred.dtype)
    boxes = pred.new_empty((*rows, 4), dtype=dtype)
    scored = (0,) if cls is None else rows
    score = pred.new_empty(scored, dtype=dtype)
    label = pred.new_empty(scored, dtype=torch.int64)
    return boxes, score, label, torch.empty_like(boxes) if write_deviation else boxes.new_empty(0)


_FAKES: dict[str, Callable[..., Any]] = {
    "quality_forward": _fake_forward,
    "quality_backward": _fake_backward,
    "distribution_forward": _fake_forward,
    "distribution_backward": _fake_backward,
    "integral_forward": _fake_integral,
    "integral_backward": _fake_backward,
    "statistics_forward": new_statistics,
    "statistics_backward": _fake_backward,
    "moments_forward": new_moments,
    "moments_backward": _fake_backward,
    "head_boxes": _fake_head_boxes,
    "head_forward": _fake_head_forward,
    "head_backward": _fake_head_backward,
    "distillation_forward": _fake_forward,
    "distillation_backward": _fake_backward,
    "decode_boxes": _fake_decode_boxes,
}


def _dispatched(name: str, pred_index: int):
    def call(*args):
        pred = args[pred_index]
        if isinstance(pred, Tensor):
            return dispatch.kernel(name, pred)(*args)
        return dispatch.kernel(name, pred[0], len(pred))(*args)

    return call


for _name, _signature in SCHEMAS.items():
    for _library in _libraries:
        _library.define(_name + _signature)
        torch.library.register_fake(f"{_library.ns}::{_name}", _FAKES[_name], lib=_library)
    _upstream = _signature.split("->")[0].count(" grad_")  # pred follows the upstream gradients
    _libraries[0].impl(_name, _dispatched(_name, _upstream), "CompositeExplicitAutograd")


# Autograd


def _save(ctx, tensors: int, inputs, grad: Tensor) -> None:
    """Keep the forward op's inputs and the gradient, if it wrote one.

    The first ``tensors`` inputs are tensors, the last is write_grad.
    """
    ctx.save_for_backward(*inputs[:tensors], grad if inputs[-1] else None)
    ctx.constants = inputs[tensors:-1]


def _gradient(ctx, grad_loss: Tensor, name: str, backend: str | None) -> Tensor:
    """pred's gradient, out of what _save kept. name: the backward op; backend: the one that ran
    forward eagerly, None within the dispatcher.
    """
    saved = ctx.saved_tensors
    tensors, grad = saved[:-1], saved[-1]
    if torch.is_grad_enabled():
        # create_graph=True: through the op, whose own derivative is refused by name
        # (_refuse_backward).
        return getattr(torch.ops.gfl_kernels, name)(grad_loss, *tensors, *ctx.constants)
    if grad is not None:
        # Forward left the gradient for an upstream gradient of 1. On the CPU the host may look
        # (unless the tensor is a fake one): 1 is what loss.backward() sends, and then the saved
        # tensor goes out as it is. It is out of autograd's hands there, so a graph that is kept for
        # another backward gives a copy.
        if backend and type(grad_loss) is Tensor and grad_loss.item() == 1:
            return grad.clone() if torch._C._autograd._get_current_graph_task_keep_graph() else grad
        # Scaling would round a bfloat16 gradient a second time: that one is computed again.
        if grad.dtype is not torch.bfloat16:
            return grad * grad_loss
    if backend:
        op = dispatch.implementation(backend, name)
    else:
        op = getattr(torch.ops.gfl_kernels, name)
    return op(grad_loss, *tensors, *ctx.constants)


# The families of losses: the name of their Function, which users see as grad_fn, and how many
# tensors their ops begin with.
_LOSSES = {
    "quality": ("QualityFocal", 5),
    "distribution": ("DistributionFocal", 6),
    "distillation": ("Distillation", 4),
}


def _loss_function(family: str) -> Any:
    """The Function of ``gfl_kernels::{family}_forward``. It takes a backend, pred, and all that the
    op takes, pred included, as one tuple: an argument of its own costs a quarter of a microsecond.
    """
    name, tensors = _LOSSES[family]
    forward_op, backward_op = f"{family}_forward", f"{family}_backward"

    def forward(ctx, backend, pred, inputs):
        loss, grad = dispatch.implementation(backend, forward_op)(*inputs)
        _save(ctx, tensors, inputs, grad)
        ctx.backend = backend
        return loss

    def backward(ctx, grad_loss):
        return None, _gradient(ctx, grad_loss, backward_op, ctx.backend), None

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), methods)


def _derivative(ctx, name: str) -> Callable[..., Any]:
    """The op ``name`` for an eager backward: that of the backend that ran forward, or with
    create_graph=True the one whose own derivative is refused by name.
    """
    if torch.is_grad_enabled():
        op: Callable[..., Any] = getattr(torch.ops.gfl_kernels, name)
        return op
    return dispatch.implementation(ctx.backend, name)


class Integral(torch.autograd.Function):
    """A backend, then what ``gfl_kernels::integral_forward`` takes."""

    @staticmethod
    def forward(ctx, backend, pred, bins, window, save):
        out, saved = dispatch.implementation(backend, "integral_forward")(pred, bins, window, save)
        ctx.save_for_backward(pred, bins, saved if save else None)
        ctx.backend, ctx.window = backend, window
        return out

    @staticmethod
    def backward(ctx, grad_out):
        pred, bins, saved = ctx.saved_tensors
        op = _derivative(ctx, "integral_backward")
        return None, op(grad_out, pred, bins, ctx.window, saved), None, None, None


# What else a row's distribution comes to, and how many tensors the ops of it begin with: pred, and
# bins.
_SUMMARIES = {"statistics": 1, "moments": 2}


class DistributionSummary(torch.autograd.Function):
    """A summary of each row; a backend, which one, then what ``gfl_kernels::{which}_forward``
    takes.
    """

    @staticmethod
    def forward(ctx, backend, which, *inputs):
        ctx.save_for_backward(*inputs[: _SUMMARIES[which]])
        ctx.constants = inputs[_SUMMARIES[which] :]
        ctx.backend, ctx.which, ctx.others = backend, which, len(inputs) - 1
        return dispatch.implementation(backend, f"{which}_forward")(*inputs)

    @staticmethod
    def backward(ctx, grad_out):
        op = _derivative(ctx, f"{ctx.which}_backward")
        grad = op(grad_out, *ctx.saved_tensors, *ctx.constants)
        return None, None, grad, *[None] * ctx.others


class HeadOptions(NamedTuple):
    """What a head's loss takes besides tensors. The first four and the next four as the schemas."""

    strides: list[float]
    iou: int
    iou_eps: float
    limit: float
    form: int
    alpha: float
    beta: float
    loss_weights: list[float]
    normalise: Any  # a function of the normalisers, over the processes
    write_boxes: bool
    write_grad: bool


def _split_levels(tensors: Sequence[Tensor], counts: Sequence[int]) -> list[Sequence[Tensor]]:
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [tensors[start : start + count] for start, count in zip(starts, counts, strict=True)]


def head_loss(levels: Sequence[Sequence[Tensor]], options: HeadOptions) -> tuple[Tensor, ...]:
    """HeadLoss in the form that torch.compile records; levels: the schemas' seven lists."""
    with torch.no_grad():
        quality, weight, sums, normalisers, boxes = torch.ops.gfl_kernels.head_boxes(
            *levels, *options[:4], options.write_boxes
        )
        normalisers = options.normalise(normalisers)
    *losses, _ = torch.ops.gfl_kernels.head_forward(
        *levels, quality, weight, sums, normalisers, *options[:8], False
    )
    return *losses, quality, boxes


class HeadLoss(torch.autograd.Function):
    """The three losses of a head, each per level, the quality and the boxes.

    channel_dims: where the channels of the class and box logits lie. counts: the lengths of the
    schemas' seven lists, whose tensors follow.
    """

    @staticmethod
    def forward(ctx, backend, options, channel_dims, counts, *tensors):
        ctx.set_materialize_grads(False)
        cls, box, *others = _split_levels(tensors, counts)
        cls = [level.movedim(channel_dims[0], -1) for level in cls]
        box = [level.movedim(channel_dims[1], -1) for level in box]
        *assessed, normalisers, boxes = dispatch.implementation(backend, "head_boxes")(
            cls, box, *others, *options[:4], options.write_boxes
        )
        assessed.append(options.normalise(normalisers))
        *losses, grads = dispatch.implementation(backend, "head_forward")(
            cls, box, *others, *assessed, *options[:8], options.write_grad
        )
        ctx.save_for_backward(*tensors, *assessed, *grads)
        ctx.backend, ctx.options = backend, options
        ctx.channel_dims, ctx.counts = channel_dims, counts
        ctx.mark_non_differentiable(assessed[0], boxes)
        return *losses, assessed[0], boxes

    @staticmethod
    def backward(ctx, *upstream):
        upstream = upstream[:6]
        saved = ctx.saved_tensors  # once: activation checkpointing hands them out only once
        *lists, assessed, grads = _split_levels(
            saved, (*ctx.counts, 4, len(saved) - sum(ctx.counts) - 4)
        )
        create_graph = torch.is_grad_enabled()
        if grads and not create_graph and _are_ones(upstream):
            if torch._C._autograd._get_current_graph_task_keep_graph():
                grads = [grad.clone() for grad in grads]
        else:
            dims = ctx.channel_dims
            cls = [level.movedim(dims[0], -1) for level in lists[0]]
            box = [level.movedim(dims[1], -1) for level in lists[1]]
            if create_graph:  # the op's own derivative is refused by name
                op: Callable[..., Any] = torch.ops.gfl_kernels.head_backward
            else:
                op = dispatch.implementation(ctx.backend, "head_backward")
            grads = op(*upstream, cls, box, *lists[2:], *assessed, *ctx.options[:8])
        count = len(lists[0])
        grads = [grad.movedim(-1, ctx.channel_dims[i >= count]) for i, grad in enumerate(grads)]
        return *[None] * 4, *grads, *[None] * (sum(ctx.counts) - 2 * count)


def _are_ones(upstream: Sequence[Tensor | None]) -> bool:
    """Whether each loss, in total or level by level, has an upstream gradient of 1 on the CPU."""
    for total, levels in zip(upstream[:3], upstream[3:], strict=True):
        if (total is None) == (levels is None):
            return False
        grad = total if levels is None else levels
        # tolist() and not item(), which goes through the dispatcher, where host reads are counted.
        if type(grad) is not Tensor or any(value != 1 for value in grad.flatten().tolist()):
            return False
    return True


# Function.apply without its Python wrapper, which only serves torch.func transforms (dispatch keeps
# those out) and costs a microsecond where a whole call on small logits takes thirty.
apply_loss = {
    family: super(torch.autograd.Function, _loss_function(family)).apply for family in _LOSSES
}
apply_integral = super(torch.autograd.Function, Integral).apply
apply_distribution_summary = super(torch.autograd.Function, DistributionSummary).apply
apply_head_loss = super(torch.autograd.Function, HeadLoss).apply


def _register_loss_autograd(family: str, tensors: int) -> None:
    """Autograd of the op itself: for compiled graphs and users of ``torch.ops.gfl_kernels``."""

    def setup_context(ctx, inputs, output):
        _save(ctx, tensors, inputs, output[1])
        ctx.others = len(inputs) - 1

    def backward(ctx, grad_loss, _grad_of_grad):
        return (_gradient(ctx, grad_loss, f"{family}_backward", None), *[None] * ctx.others)

    name = f"gfl_kernels::{family}_forward"
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_libraries[0])


def _register_summary_autograd(which: str, tensors: int) -> None:
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:tensors])
        ctx.constants, ctx.others = inputs[tensors:], len(inputs) - 1

    def backward(ctx, grad_out):
        op = getattr(torch.ops.gfl_kernels, f"{which}_backward")
        return op(grad_out, *ctx.saved_tensors, *ctx.constants), *[None] * ctx.others

    name = f"gfl_kernels::{which}_forward"
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_libraries[0])


def _refuse_backward(name: str, why: str) -> None:
    # Blocked here and not by once_differentiable, which lets create_graph=True through and returns
    # a constant.
    def backward(ctx, *_):
        raise RuntimeError(
            f"{name} is not differentiable: {why}. "
            "Compute it under gfl_kernels.use_backend('reference') for that."
        )

    torch.library.register_autograd(f"gfl_kernels::{name}", backward, lib=_libraries[0])


for _family, (_, _tensors) in _LOSSES.items():
    _register_loss_autograd(_family, _tensors)
for _which, _tensors in _SUMMARIES.items():
    _register_summary_autograd(_which, _tensors)


def _setup_integral(ctx, inputs, output) -> None:
    pred, bins, ctx.window, save = inputs
    ctx.save_for_backward(pred, bins, output[1] if save else None)


def _integral_backward(ctx, grad_out, _grad_of_saved):
    pred, bins, saved = ctx.saved_tensors
    grad = torch.ops.gfl_kernels.integral_backward(grad_out, pred, bins, ctx.window, saved)
    return grad, None, None, None


torch.library.register_autograd(
    "gfl_kernels::integral_forward",
    _integral_backward,
    setup_context=_setup_integral,
    lib=_libraries[0],
)


def _setup_head(ctx, inputs, output) -> None:
    lists, rest = inputs[:7], inputs[7:]
    ctx.set_materialize_grads(False)
    ctx.counts = [len(tensors) for tensors in lists]
    ctx.save_for_backward(*(tensor for tensors in lists for tensor in tensors), *rest[:4])
    ctx.constants = rest[4:-1]


def _head_backward(ctx, *upstream):
    saved = ctx.saved_tensors
    tensors, assessed = saved[:-4], saved[-4:]
    lists = _split_levels(tensors, ctx.counts)
    grads = torch.ops.gfl_kernels.head_backward(*upstream[:6], *lists, *assessed, *ctx.constants)
    count = ctx.counts[0]
    others = ([None] * n for n in ctx.counts[2:])
    # None for the four tensors, the constants and write_grad, too.
    return grads[:count], grads[count:], *others, *[None] * (4 + len(ctx.constants) + 1)


torch.library.register_autograd(
    "gfl_kernels::head_forward", _head_backward, setup_context=_setup_head, lib=_libraries[0]
)
for _name in SCHEMAS:
    if _name.endswith("_backward"):
        _refuse_backward(_name, "the fused backends have no double backward")
_refuse_backward("decode_boxes", "the fused backends decode for inference")
