"""The loss of a whole head in one call: argument checks, levels, normalisers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import debug, dispatch, ops, reference
from .functional import (
    _check_not_negative,
    _check_number,
    _check_reduction,
    _check_tensor,
    _wrong_shape,
)
from .reference import EPS


class GFLLossOutput(NamedTuple):
    """The losses, weighted and normalised, in total and per level [L]; what return_boxes adds."""

    loss_cls: Tensor
    loss_bbox: Tensor
    loss_dfl: Tensor
    loss_cls_levels: Tensor
    loss_bbox_levels: Tensor
    loss_dfl_levels: Tensor
    boxes: Tensor | None
    iou: Tensor | None


def gfl_loss(
    cls_logits: Sequence[Tensor],
    box_logits: Sequence[Tensor],
    points: Sequence[Tensor],
    labels: Sequence[Tensor],
    box_targets: Sequence[Tensor],
    *,
    label_weights: Sequence[Tensor] | None = None,
    strides: Sequence[float],
    reg_max: int = 16,
    beta: float = 2.0,
    iou: str = "giou",
    loss_weights: Sequence[float] = (1.0, 2.0, 0.25),
    avg_factor: float | Tensor | None = None,
    process_group: Any = None,
    return_boxes: bool = False,
) -> GFLLossOutput:
    r"""The losses of a GFL head after target assignment, over all levels, fused.

    For every positive anchor the box is decoded from its four distributions; its IoU with the
    target is the quality that the Quality Focal Loss trains the anchor's class to, and its highest
    score the weight of its box loss and Distribution Focal Loss. Neither the IoU nor the weight is
    differentiated. Source: Li et al. 2020; mmdetection 3.3.0's ``GFLHead.loss_by_feat``, whose
    numbers these are.

    Args:
        cls_logits: per level [B, C, H, W] (or [B, C, n]), float32, float64, bfloat16 or float16,
            any strides, read in place.
        box_logits: per level [B, 4 (reg_max + 1), H, W], channel = side * (reg_max + 1) + bin, the
            sides left, top, right, bottom; a dtype of their own, but float64 only together. Only
            those of positives are read.
        points: per level [H * W, 2], the anchors' centres, x and y in pixels.
        labels: per level [B, H * W], any dtype; outside [0, C) is background.
        box_targets: per level [B, H * W, 4], x1 y1 x2 y2 in pixels; read for positives.
        label_weights: per level [B, H * W], of the Quality Focal Loss alone.
        strides: per level, in pixels: distances are in units of it.
        reg_max: the last bin. Targets of the Distribution Focal Loss end at reg_max - 0.1.
        beta: the focusing exponent, >= 0. 2 is the fast case.
        iou: the box loss: "iou" (-log IoU), "giou", "diou" or "ciou", all with eps 1e-6.
        loss_weights: of the three losses.
        avg_factor: the divisor of the Quality Focal Loss instead of the number of positives (at
            least 1 an image); taken as it is on every process. A number or a tensor of one
            element, which is never read by the host.
        process_group: the processes over which the number of positives and the sum of weights, the
            divisor of the other two losses (at least 1), are averaged, once and together. The
            default group if there is one; without, nothing is communicated.
        return_boxes: also return the decoded boxes [B, A, 4] in pixels and their IoU [B, A] of
            positives, 0 elsewhere; A counts the anchors of all levels.

    Returns:
        :class:`GFLLossOutput`; float32, or float64 for float64. Gradients have the logits' dtype
        and layout.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`gfl_kernels.quality_focal_loss`.
    """
    name = "gfl_loss"
    levels = _check_levels(
        name,
        cls_logits=cls_logits,
        box_logits=box_logits,
        points=points,
        labels=labels,
        box_targets=box_targets,
        label_weights=label_weights,
        strides=strides,
    )
    *lists, weights, strides = levels
    if not isinstance(reg_max, int) or reg_max < 1:
        raise ValueError(f"{name}: reg_max must be an int >= 1, got {reg_max!r}")
    classes = _channels(name, "cls_logits[0]", lists[0][0], 1)
    for i, level in enumerate(zip(*lists, *([weights] if weights else []), strict=True)):
        _check_level(name, f"[{i}]", level, (1, 1), classes, 4 * (reg_max + 1), (*lists, weights))
    for i, stride in enumerate(strides):
        _check_number(name, f"strides[{i}]", stride)
    if dispatch.DEBUG:
        debug.check_head(name, lists[3], classes)
    options = _options(
        name,
        iou=iou,
        iou_eps=1e-6,
        limit=reg_max - 0.1,
        beta=beta,
        loss_weights=loss_weights,
        divisors=(1 + EPS, 4 + EPS),
        strides=strides,
    )
    return _run(
        name, (1, 1), (*lists, [], weights), options, avg_factor, process_group, return_boxes
    )


def task_aligned_loss(
    cls_logits: Tensor,
    box_logits: Tensor,
    points: Tensor,
    target_scores: Tensor,
    target_boxes: Tensor,
    foreground: Tensor,
    *,
    channel_dim: int = -1,
    beta: float = 0.0,
    varifocal: bool = False,
    alpha: float = 0.75,
    gamma: float = 2.0,
    iou: str = "ciou",
    loss_weights: Sequence[float] = (0.5, 7.5, 1.5),
    avg_factor: float | Tensor | None = None,
    process_group: Any = None,
    return_boxes: bool = False,
) -> GFLLossOutput:
    r"""The losses of a head with task-aligned assignment (YOLOv8 and its like), fused.

    The class logits are trained to dense target scores, by binary cross entropy, the Quality Focal
    Loss (beta > 0) or the Varifocal Loss (YOLOv6, PP-YOLOE). A foreground anchor's box loss and
    Distribution Focal Loss have the sum of its target scores as weight, and all three losses are
    divided by the sum of these weights, at least 1.

    Args:
        cls_logits: [B, A, C], or [B, C, A] with ``channel_dim=1``; dtypes and strides as in
            :func:`gfl_loss`.
        box_logits: [B, A, 4 K], or [B, 4 K, A] with ``channel_dim=1``; channel = side * K + bin.
        points: [A, 2], the anchors' centres in units of their stride.
        target_scores: [B, A, C], the quality of every class, 0 off the foreground.
        target_boxes: [B, A, 4], x1 y1 x2 y2 in units of the stride; read in the foreground.
        foreground: [B, A], bool.
        channel_dim: where the channels lie in the two logits.
        beta: the focusing exponent of the Quality Focal Loss; 0 is binary cross entropy.
        varifocal: the Varifocal Loss instead, w BCE(x, q), through whose weight the gradient goes:
            w = q where a target score q is above 0 and alpha sigmoid(x)^gamma elsewhere.
        alpha, gamma: of the Varifocal Loss, >= 0.
        iou: "iou", "giou", "diou" or "ciou", with eps 1e-7; "ciou" weighs the aspect ratio at every
            IoU, as the YOLO line does and :func:`gfl_loss` does not.
        loss_weights: of the classification, box and distribution losses.
        avg_factor: the divisor of all three, instead of the sum of weights.
        process_group, return_boxes: as in :func:`gfl_loss`. Boxes are in units of the stride.

    Returns:
        :class:`GFLLossOutput` of one level. Targets of the Distribution Focal Loss end at K - 1.01.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`gfl_kernels.quality_focal_loss`.
    """
    name = "task_aligned_loss"
    if channel_dim not in (1, -1):
        raise ValueError(f"{name}: channel_dim must be 1 or -1, got {channel_dim!r}")
    lists = tuple([t] for t in (cls_logits, box_logits, points, foreground, target_boxes))
    names = ("cls_logits", "box_logits", "points", "foreground", "target_boxes")
    dims = (channel_dim, channel_dim)
    classes = _channels(name, "cls_logits", cls_logits, channel_dim)
    channels = _channels(name, "box_logits", box_logits, channel_dim)
    if channels % 4 or channels < 8:
        raise ValueError(
            f"{name}: box_logits must have 4 K channels, K >= 2, along channel_dim, got {channels}"
        )
    level = [t for (t,) in lists]
    _check_level(name, "", level, dims, classes, channels, lists, names)
    _check_tensor(name, "target_scores", target_scores, cls_logits)
    expected = cls_logits.movedim(channel_dim, -1).shape
    if target_scores.shape != expected:
        raise _wrong_shape(name, "target_scores", "shape [B, A, C] =", expected, target_scores)
    limit = channels // 4 - 1.01
    _check_not_negative(name, "alpha", alpha)
    _check_not_negative(name, "gamma", gamma)
    if varifocal and beta != 0:
        raise ValueError(f"{name}: beta must be 0 with varifocal, got {beta!r}")
    options = _options(
        name,
        iou=iou,
        iou_eps=1e-7,
        limit=limit,
        beta=gamma if varifocal else beta,
        loss_weights=loss_weights,
        divisors=(1, 4),
        strides=[1.0],
        every_iou=True,
        form=reference.VARIFOCAL if varifocal else reference.LOGITS,
        alpha=alpha,
    )
    return _run(
        name, dims, (*lists, [target_scores], []), options, avg_factor, process_group, return_boxes
    )


def _options(
    name: str,
    *,
    iou: str,
    iou_eps: float,
    limit: float,
    beta: float,
    loss_weights: Sequence[float],
    divisors: tuple[float, float],
    strides: Sequence[float],
    every_iou: bool = False,
    form: int = reference.LOGITS,
    alpha: float = 0.0,
) -> ops.HeadOptions:
    """divisors: of the box loss and the DFL, folded into their weights (mmdetection's avg_factor
    of 1 and of 4 sides, each with its eps). every_iou: "ciou" is reference.box_loss's ciou_all."""
    kinds = ("iou", "giou", "diou", "ciou")
    if iou not in kinds:
        raise ValueError(f"{name}: iou must be one of {', '.join(kinds)}, got {iou!r}")
    _check_not_negative(name, "beta", beta)
    if not isinstance(loss_weights, Sequence) or len(loss_weights) != 3:
        raise ValueError(f"{name}: loss_weights must be three numbers, got {loss_weights!r}")
    for i, weight in enumerate(loss_weights):
        _check_number(name, f"loss_weights[{i}]", weight)
    cls, bbox, dfl = loss_weights
    return ops.HeadOptions(
        strides=[float(stride) for stride in strides],
        iou=ops.IOUS["ciou_all" if every_iou and iou == "ciou" else iou],
        iou_eps=iou_eps,
        limit=limit,
        form=form,
        alpha=float(alpha),
        beta=float(beta),
        loss_weights=[float(cls), bbox / divisors[0], dfl / divisors[1]],
        normalise=None,
        write_boxes=False,
        write_grad=False,
    )


def _run(
    name: str,
    channel_dims: tuple[int, int],
    levels: Sequence[Any],
    options: ops.HeadOptions,
    avg_factor: float | Tensor | None,
    process_group: Any,
    return_boxes: bool,
) -> GFLLossOutput:
    cls, box, *others = levels
    pred = cls[0]
    losses: Any
    avg_factor = _check_reduction(name, "mean", avg_factor, pred)
    dense = bool(levels[5])
    normalise = partial(_normalise, avg_factor=avg_factor, dense=dense, group=process_group)
    constants = (tensor for tensors in others for tensor in tensors)
    backend = dispatch.choose(name, pred, *constants, levels=len(cls))
    if backend == "reference" or torch.compiler.is_compiling():
        cls = [level.movedim(channel_dims[0], -1) for level in cls]
        box = [level.movedim(channel_dims[1], -1) for level in box]
    if backend == "reference":
        losses, iou, boxes = reference.head_loss(  # type: ignore[misc]  # others are the five lists before strides
            cls,
            box,
            *others,
            strides=options.strides,
            iou=list(ops.IOUS)[options.iou],
            iou_eps=options.iou_eps,
            limit=options.limit,
            varifocal=options.form == reference.VARIFOCAL,
            alpha=options.alpha,
            beta=options.beta,
            loss_weights=options.loss_weights,
            normalise=normalise,
        )
        losses = (*losses.sum(1), *losses)
    else:
        # As in functional._run: forward leaves the gradient where the host may look for an
        # upstream gradient of 1, but not for float16.
        write_grad = (
            backend == "cpu"
            and torch.is_grad_enabled()
            and all(t.dtype is not torch.float16 for t in (pred, box[0]))
            and any(t.requires_grad for t in (*cls, *box))
        )
        options = options._replace(
            normalise=normalise, write_boxes=return_boxes, write_grad=write_grad
        )
        if torch.compiler.is_compiling():
            *losses, iou, boxes = ops.head_loss((cls, box, *others), options)
        else:
            counts = [len(tensors) for tensors in levels]
            tensors = (tensor for tensors in levels for tensor in tensors)
            *losses, iou, boxes = ops.apply_head_loss(
                backend, options, channel_dims, counts, *tensors
            )
    return GFLLossOutput(*losses, *((boxes, iou) if return_boxes else (None, None)))


def _normalise(
    normalisers: Tensor, avg_factor: float | Tensor | None, dense: bool, group: Any
) -> Tensor:
    """The two divisors [2]: averaged over the group, then avg_factor in place of the first (with
    dense targets, of both)."""
    with torch.no_grad():
        world = 1
        needed = avg_factor is None or not dense  # else avg_factor takes the place of both
        if needed and dist.is_available() and dist.is_initialized():
            world = dist.get_world_size(group)
        if world > 1:
            normalisers = normalisers / world
            dist.all_reduce(normalisers, group=group)
        if avg_factor is None:
            return normalisers
        if isinstance(avg_factor, Tensor):
            factor = avg_factor.to(normalisers.dtype).view(())
        else:
            # A product: out of any other form torch.compile takes the number for a constant.
            factor = normalisers.new_ones(()) * avg_factor
        return torch.stack([factor, factor if dense else normalisers[1]])


# Argument checks


def _check_levels(name: str, **arguments: Any) -> list[Any]:
    """Sequences with an entry per level, as lists; [] for None."""
    count = None
    for argument, levels in arguments.items():
        if levels is None:
            continue
        if isinstance(levels, Tensor) or not isinstance(levels, Sequence):
            raise TypeError(
                f"{name}: {argument} must be a list with an entry per level, "
                f"got {type(levels).__name__}"
            )
        count = len(levels) if count is None else count
        if len(levels) != count or count == 0:
            raise ValueError(
                f"{name}: {argument} must have an entry per level of cls_logits, {max(count, 1)}, "
                f"got {len(levels)}"
            )
    return [list(levels or ()) for levels in arguments.values()]


def _channels(name: str, argument: str, tensor: Any, dim: int) -> int:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: {argument} must be a Tensor, got {type(tensor).__name__}")
    if tensor.dim() < 3:
        raise ValueError(
            f"{name}: {argument} must have shape [B, channels, ...] or [B, ..., channels], "
            f"got {tuple(tensor.shape)}"
        )
    return tensor.shape[dim]


_NAMES = ("cls_logits", "box_logits", "points", "labels", "box_targets", "label_weights")


def _check_level(
    name: str,
    index: str,
    level: Sequence[Any],
    dims: tuple[int, int],
    classes: int,
    channels: int,
    lists: Sequence[Any],
    names: Sequence[str] = _NAMES,
) -> None:
    """One level's tensors, in the order of names. lists: of all levels, whose dtypes are those of
    the first."""
    names = [argument + index for argument in names]
    first = lists[0][0]
    for argument, tensor, tensors in zip(names, level, lists, strict=False):
        _check_tensor(name, argument, tensor, first)
        if tensor.dtype != tensors[0].dtype:
            raise TypeError(
                f"{name}: {argument} must have the dtype of the first level, "
                f"{tensors[0].dtype}, got {tensor.dtype}"
            )
    cls, box = level[:2]
    for argument, tensor in zip(names, (cls, box), strict=False):
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: {argument} must have a floating dtype, got {tensor.dtype}")
        if tensor.dim() not in (3, 4):
            raise ValueError(
                f"{name}: {argument} must have 3 or 4 dimensions, got {tuple(tensor.shape)}"
            )
    if (cls.dtype == torch.float64) != (box.dtype == torch.float64):
        raise TypeError(
            f"{name}: cls_logits and box_logits must both be float64 or neither, "
            f"got {cls.dtype} and {box.dtype}"
        )
    batch = first.shape[0]
    cells = cls.shape[2:] if dims[0] == 1 else cls.shape[1:-1]
    anchors = math.prod(cells)
    if classes == 0:
        raise ValueError(f"{name}: {names[0]} must have at least one class")

    def with_channels(count: int) -> tuple[int, ...]:
        return (batch, count, *cells) if dims[0] == 1 else (batch, *cells, count)

    shapes = (
        with_channels(classes),
        with_channels(channels),
        (anchors, 2),
        (batch, anchors),
        (batch, anchors, 4),
        (batch, anchors),
    )
    for argument, tensor, shape in zip(names, level, shapes, strict=False):
        if tensor.shape != shape:
            raise _wrong_shape(name, argument, "shape", shape, tensor)
