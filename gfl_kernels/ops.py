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

# Reductions and forms as the schemas carry them; csrc/ops.h and gfl_kernels.h have the same.
NONE, SUM, MEAN = 0, 1, 2
LOGITS, PROBABILITIES, VARIFOCAL = 0, 1, 2
IOUS = {"iou": 0, "giou": 1, "diou": 2, "ciou": 3, "ciou_all": 4}  # reference.box_loss's kinds

_QUALITY = (
    "Tensor pred, Tensor target, Tensor? score, Tensor? weight, Tensor? avg_factor, "
    "int form, float beta, float scale, int reduction"
)
_DISTRIBUTION = (
    "Tensor pred, Tensor target, Tensor? weight_left, Tensor? weight_right, Tensor? weight, "
    "Tensor? avg_factor, float scale, int reduction"
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


_FAKES: dict[str, Callable[..., Any]] = {
    "quality_forward": _fake_forward,
    "quality_backward": _fake_backward,
    "distribution_forward": _fake_forward,
    "distribution_backward": _fake_backward,
    "integral_forward": _fake_integral,
    "integral_backward": _fake_backward,
    "head_boxes": _fake_head_boxes,
    "head_forward": _fake_head_forward,
    "head_backward": _fake_head_backward,
}


def _dispatched(name: str, pred_index: int):
    def call(*args):
        pred = args[pred_index]
        return dispatch.kernel(name, pred if isinstance(pred, Tensor) else pred[0])(*args)

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


class QualityFocal(torch.autograd.Function):
    """Quality Focal Loss; a backend, then what ``gfl_kernels::quality_forward`` takes."""

    @staticmethod
    def forward(ctx, backend, *inputs):
        loss, grad = dispatch.implementation(backend, "quality_forward")(*inputs)
        _save(ctx, 5, inputs, grad)
        ctx.backend = backend
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad = _gradient(ctx, grad_loss, "quality_backward", ctx.backend)
        return None, grad, *_NO_GRADIENT[:9]


class DistributionFocal(torch.autograd.Function):
    """Distribution Focal Loss; a backend, then what ``gfl_kernels::distribution_forward`` takes."""

    @staticmethod
    def forward(ctx, backend, *inputs):
        loss, grad = dispatch.implementation(backend, "distribution_forward")(*inputs)
        _save(ctx, 6, inputs, grad)
        ctx.backend = backend
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad = _gradient(ctx, grad_loss, "distribution_backward", ctx.backend)
        return None, grad, *_NO_GRADIENT[:8]


_NO_GRADIENT = (None,) * 9  # for the inputs after pred


class DistributionIntegral(torch.autograd.Function):
    """Expectation of each row; a backend, then what ``gfl_kernels::integral_forward`` takes."""

    @staticmethod
    def forward(ctx, backend, pred, bins):
        ctx.save_for_backward(pred, bins)
        ctx.backend = backend
        return dispatch.implementation(backend, "integral_forward")(pred, bins)

    @staticmethod
    def backward(ctx, grad_out):
        if torch.is_grad_enabled():
            op: Callable[..., Any] = torch.ops.gfl_kernels.integral_backward
        else:
            op = dispatch.implementation(ctx.backend, "integral_backward")
        return None, op(grad_out, *ctx.saved_tensors), None


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
        *lists, assessed, grads = _split_levels(
            ctx.saved_tensors, (*ctx.counts, 4, len(ctx.saved_tensors) - sum(ctx.counts) - 4)
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
apply_quality_focal = super(torch.autograd.Function, QualityFocal).apply
apply_distribution_focal = super(torch.autograd.Function, DistributionFocal).apply
apply_distribution_integral = super(torch.autograd.Function, DistributionIntegral).apply
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


def _setup_head(ctx, inputs, output) -> None:
    lists, rest = inputs[:7], inputs[7:]
    ctx.set_materialize_grads(False)
    ctx.counts = [len(tensors) for tensors in lists]
    ctx.save_for_backward(*(tensor for tensors in lists for tensor in tensors), *rest[:4])
    ctx.constants = rest[4:-1]


def _head_backward(ctx, *upstream):
    tensors, assessed = ctx.saved_tensors[:-4], ctx.saved_tensors[-4:]
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
        _refuse_double_backward(_name)
