"""Distributions to boxes in one pass, for inference: argument checks and layouts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch, reference
from .functional import (
    _bin_values,
    _check_int,
    _check_number,
    _check_tensor,
    _last,
    _wrong_layout,
    _wrong_shape,
)


class DecodedBoxes(NamedTuple):
    """Boxes x1 y1 x2 y2 and, where they were asked for, scores, labels and the uncertainty."""

    boxes: Tensor
    scores: Tensor | None
    labels: Tensor | None
    uncertainty: Tensor | None


def decode_boxes(
    points: Tensor,
    pred: Tensor,
    *,
    reg_max: int | None = None,
    bins: Tensor | Sequence[float] | None = None,
    strides: float | Tensor | None = None,
    mode: str = "mean",
    window: int = 2,
    max_shape: Sequence[float] | Tensor | None = None,
    cls_logits: Tensor | None = None,
    return_uncertainty: bool = False,
    channel_dim: int = -1,
) -> Tensor | DecodedBoxes:
    r"""Boxes from the distributions of their sides, fused, for inference.

    .. math:: x_1 = x - s\,d_{left}, \quad y_1 = y - s\,d_{top}, \quad x_2 = x + s\,d_{right}, \quad
        y_2 = y + s\,d_{bottom}

    with (x, y) the anchor's point, s its stride and d the :func:`gfl_kernels.integral` of the side.
    Source: mmdetection's ``Integral`` and ``distance2bbox``, as ``GFLHead`` predicts.

    Args:
        points: [A, 2], the anchors' centres, x and y in pixels, or one per row of pred [..., A, 2].
        pred: logits [..., A, 4 K], or with ``channel_dim=1`` [B, 4 K, A] or [B, 4 K, H, W] with A =
            H W; channel = side * K + bin, the sides left, top, right, bottom. float32, float64,
            bfloat16 or float16, any strides, read in place.
        reg_max: the last bin, K - 1; checked against pred's channels, whose number says it.
        bins: the value of each bin, in units of the stride: a tensor [K], or (lower, upper, step)
            with both ends among them; 0, 1, ..., K - 1 if not given.
        strides: pixels in a unit of distance, a number or [A]; 1 if not given.
        mode: "mean", the expectation of the whole distribution; or "peak", that of the bins at most
            ``window`` from the highest, of equals the first: of a distribution with two modes the
            mean lies where neither is.
        window: of mode "peak", >= 0.
        max_shape: clip to an image of (height, width), or of each image [B, 2]. Not clipped if not
            given.
        cls_logits: class logits [..., A, C], laid out as pred. Adds the highest sigmoid of each
            anchor and its class, the lowest of those that tie.
        return_uncertainty: adds the standard deviation of each side's distribution in pixels, of
            the whole distribution in either mode.
        channel_dim: where the channels lie in pred and cls_logits, -1 or 1.

    Returns:
        Boxes [..., A, 4], or [B, A, 4]: x1 y1 x2 y2 in pixels. With ``cls_logits`` or
        ``return_uncertainty`` a :class:`DecodedBoxes`: boxes, scores [..., A], labels [..., A] in
        int64, uncertainty [..., A, 4]; None for what was not asked for. float32, or float64 for
        float64.

    The kernels have no gradient. Where one is asked for, plain PyTorch operations compute the boxes
    and their gradient, unless a backend is forced; under ``torch.no_grad()``, or with detached
    logits, it is always the kernels.

    Raises:
        TypeError, ValueError: for arguments of the wrong type, dtype, device or shape, naming what
            was expected.
        RuntimeError: a forced backend cannot serve the call.
    """
    name = "decode_boxes"
    if channel_dim not in (1, -1):
        raise ValueError(f"{name}: channel_dim must be 1 or -1, got {channel_dim!r}")
    _check_channels(name, "pred", pred, channel_dim, "4 K")
    channels = pred.shape[channel_dim]
    if channels % 4:
        raise ValueError(f"{name}: pred must have 4 K channels along channel_dim, got {channels}")
    if reg_max is not None and channels != 4 * (reg_max + 1):
        raise ValueError(
            f"{name}: pred must have 4 (reg_max + 1) = {4 * (reg_max + 1)} channels, got {channels}"
        )
    bins = _bin_values(name, bins, channels // 4, pred)
    if mode not in ("mean", "peak"):
        raise ValueError(f"{name}: mode must be mean or peak, got {mode!r}")
    _check_int(name, "window", window)
    if window < 0:
        raise ValueError(f"{name}: window must be >= 0, got {window}")
    scored = cls_logits is not None
    if cls_logits is not None:
        _check_channels(name, "cls_logits", cls_logits, channel_dim, "C")
        _check_tensor(name, "cls_logits", cls_logits, pred)
        if (cls_logits.dtype == torch.float64) != (pred.dtype == torch.float64):
            raise TypeError(
                f"{name}: pred and cls_logits must both be float64 or neither, "
                f"got {pred.dtype} and {cls_logits.dtype}"
            )
        cls_logits = _last(cls_logits, channel_dim)
    pred = _last(pred, channel_dim)
    rows = pred.shape[:-1]
    if cls_logits is not None and cls_logits.shape[:-1] != rows:
        expected = (*rows, cls_logits.shape[-1])
        raise _wrong_shape(
            name, "cls_logits", "pred's anchors, channels last", expected, cls_logits
        )

    # Whatever else belongs to anchors gets pred's rows, repeated with a stride of 0.
    images, cells = (rows[:1], rows[1:]) if channel_dim == 1 else (rows[:-1], rows[-1:])
    anchors = math.prod(cells)
    _check_tensor(name, "points", points, pred)
    if points.shape not in ((anchors, 2), (*images, anchors, 2)):
        raise _wrong_shape(name, "points", "shape [A, 2] =", (anchors, 2), points)
    points = points.unflatten(-2, cells).expand(*rows, 2)
    stride = 1.0
    if isinstance(strides, Tensor):
        _check_tensor(name, "strides", strides, pred)
        if strides.shape not in ((), (anchors,)):
            raise _wrong_shape(name, "strides", "shape [A] =", (anchors,), strides)
        strides = (strides.unflatten(0, cells) if strides.dim() else strides).expand(rows)
    elif strides is not None:
        _check_number(name, "strides", strides, " or a Tensor")
        stride, strides = float(strides), None
    size, limits = [], None
    if isinstance(max_shape, Tensor):
        _check_tensor(name, "max_shape", max_shape, pred)
        if max_shape.shape not in ((2,), (*images, 2)):
            raise _wrong_shape(
                name, "max_shape", "(height, width) per image,", (*images, 2), max_shape
            )
        limits = max_shape.view(*max_shape.shape[:-1], *[1] * len(cells), 2).expand(*rows, 2)
    elif max_shape is not None:
        if not isinstance(max_shape, Sequence) or len(max_shape) != 2:
            raise ValueError(
                f"{name}: max_shape must be (height, width) or a Tensor, got {max_shape!r}"
            )
        for i, value in enumerate(max_shape):
            _check_number(name, f"max_shape[{i}]", value)
        size = [float(value) for value in max_shape]

    operands = (points, strides, bins, cls_logits, limits)
    results: Any
    options = (stride, size, window if mode == "peak" else -1, bool(return_uncertainty))
    backend = dispatch.choose(name, pred, pred, *operands)
    if backend == "reference":
        results = reference.decode_boxes(pred, *operands, *options)
    elif torch.compiler.is_compiling():
        results = torch.ops.gfl_kernels.decode_boxes(pred.detach(), *operands, *options)
    else:
        results = dispatch.implementation(backend, name)(pred, *operands, *options)
    asked = (scored, scored, return_uncertainty)
    last = len(rows) - 1
    boxes = results[0].flatten(len(images), last)
    if not any(asked):
        return boxes
    scores, labels, uncertainty = (
        result.flatten(len(images), last) if wanted else None
        for result, wanted in zip(results[1:], asked, strict=True)
    )
    return DecodedBoxes(boxes, scores, labels, uncertainty)


def _check_channels(name: str, argument: str, tensor: Any, dim: int, channels: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: {argument} must be a Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: {argument} must have a floating dtype, got {tensor.dtype}")
    if tensor.layout is not torch.strided:
        raise _wrong_layout(name, argument, tensor)
    if tensor.dim() not in (3, 4) if dim == 1 else tensor.dim() < 2:
        shape = (
            f"[B, {channels}, A] or [B, {channels}, H, W]" if dim == 1 else f"[..., A, {channels}]"
        )
        raise ValueError(f"{name}: {argument} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.shape[dim] == 0:
        raise ValueError(f"{name}: {argument} must have at least one channel")
