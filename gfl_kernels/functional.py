"""The public functions: argument checks, layouts, reductions. User errors are raised here, once."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import debug, dispatch, ops, reference
from .reference import EPS

_REDUCTIONS = ("none", "mean", "sum")


def quality_focal_loss(
    pred: Tensor,
    target: Tensor | tuple[Tensor, Tensor],
    *,
    beta: float = 2.0,
    weight: Tensor | None = None,
    avg_factor: float | Tensor | None = None,
    reduction: str = "mean",
    activated: bool = False,
    class_dim: int = -1,
) -> Tensor:
    r"""Quality Focal Loss, fused: the joint class-quality score's loss of Generalized Focal Loss.

    .. math:: L = \sum_c |\sigma(x_c) - q_c|^\beta \,
        [-q_c \log\sigma(x_c) - (1 - q_c)\log(1 - \sigma(x_c))]

    for each row (anchor), with q the quality target: the IoU for the class of a positive anchor, 0
    elsewhere.
    Source: Li et al. 2020, "Generalized Focal Loss", equation 4; mmdetection's
    ``quality_focal_loss``, ``quality_focal_loss_tensor_target`` and (``activated=True``)
    ``quality_focal_loss_with_prob``.

    Args:
        pred: logits [..., C], or probabilities with ``activated=True``; float32, float64, bfloat16
            or float16, any strides, read in place.
        target: sparse, a pair (label [...], score [...]) where a label outside [0, C) is background
            (trained to 0); or dense, a tensor of pred's shape with the quality of every class. Any
            dtype.
        beta: the focusing exponent, >= 0. 2 is the fast case.
        weight: a weight per row [...] or per element (pred's shape). What has weight 0 contributes
            exactly 0 to loss and gradient, NaN logits included.
        avg_factor: with "mean", divide by avg_factor + eps(float32) instead of by the number of
            rows. A number or a tensor of one element, which is never read by the host. Not
            differentiated. Ignored by "none".
        reduction: "mean" (over rows), "sum", or "none" for one loss per row.
        activated: pred holds probabilities. Logs are clamped at -100 as in
            ``F.binary_cross_entropy``.
        class_dim: where the classes lie in pred (and in a dense target or full weight), 1 for [B,
            C, H, W].

    Returns:
        A scalar (shape [1] if avg_factor has it), or [...] for "none"; float32, or float64 for
        float64. An empty batch gives 0, connected to the graph. The gradient has pred's dtype and
        layout.

    Raises:
        TypeError, ValueError: for arguments of the wrong type, dtype, device or shape, naming what
            was expected.
        RuntimeError: a forced backend cannot serve the call, or its gradient is differentiated
            again.
    """
    return _quality_focal_loss(
        pred, target, beta, weight, avg_factor, reduction, activated, class_dim
    )


def distribution_focal_loss(
    pred: Tensor,
    target: Tensor | tuple[Tensor, Tensor, Tensor],
    *,
    weight: Tensor | None = None,
    avg_factor: float | Tensor | None = None,
    reduction: str = "mean",
    bin_dim: int = -1,
) -> Tensor:
    r"""Distribution Focal Loss, fused: cross entropy against the two bins around the target.

    .. math:: L = -(l + 1 - t) \log p_l - (t - l) \log p_{l+1},
        \quad p = \mathrm{softmax}(z), \; l = \lfloor t \rfloor

    for each row (side of a box). Source: Li et al. 2020, equation 6; mmdetection's
    ``distribution_focal_loss``.

    Args:
        pred: logits [..., K] over K = reg_max + 1 bins; float32, float64, bfloat16 or float16, any
            strides.
        target: the position in bins [...], clamped into [0, K - 1] (eager PyTorch ends in a
            device-side assert there); or a triple (left bin, left weight, right weight), each
            [...], for bins that are not evenly spaced.
        weight: a weight per row [...]. Rows of weight 0 are not read.
        avg_factor, reduction: as in :func:`quality_focal_loss`.
        bin_dim: where the bins lie in pred, 1 for [B, K, A].

    Returns:
        A scalar, or [...] for "none"; float32, or float64 for float64.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`quality_focal_loss`.
    """
    return _distribution_focal_loss(pred, target, weight, avg_factor, reduction, bin_dim)


def integral(pred: Tensor, *, bins: Tensor | None = None, bin_dim: int = -1) -> Tensor:
    r"""Expectation of the distribution of each row, fused: :math:`E = \sum_k y_k \,
    \mathrm{softmax}(z)_k`.

    Source: Li et al. 2020, equation 5; mmdetection's ``Integral``, ultralytics' ``DFL`` layer.

    Args:
        pred: logits [..., K]; float32, float64, bfloat16 or float16, any strides.
        bins: the value y of each bin [K]; 0, 1, ..., K - 1 if not given.
        bin_dim: where the bins lie in pred.

    Returns:
        [...], in bins; float32, or float64 for float64: half precision would move a box by up to
        0.1 bin. The gradient has pred's dtype and layout.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`quality_focal_loss`.
    """
    name = "integral"
    _check_pred(name, pred, bin_dim, "K", "bin_dim")
    if bins is not None:
        _check_tensor(name, "bins", bins, pred)
        if bins.shape != pred.shape[bin_dim : bin_dim + 1 or None]:
            raise _wrong_shape(
                name, "bins", "(K,)", pred.shape[bin_dim : bin_dim + 1 or None], bins
            )
    backend = dispatch.choose(name, pred, bins)
    if backend == "reference":
        return reference.integral(pred, bins=bins, bin_dim=bin_dim)
    pred = _last(pred, bin_dim)
    if bins is not None:
        bins = bins.to(reference.accumulate_dtype(pred.dtype))
    if torch.compiler.is_compiling():
        return torch.ops.gfl_kernels.integral_forward(pred, bins)
    return ops.apply_distribution_integral(backend, pred, bins)


def _quality_focal_loss(
    pred: Tensor,
    target: Any,
    beta: float,
    weight: Any,
    avg_factor: float | Tensor | None,
    reduction: str,
    activated: bool,
    class_dim: int = -1,
    loss_weight: float = 1.0,
) -> Tensor:
    """quality_focal_loss with a loss weight folded in, so that the upstream gradient is 1."""
    name = "quality_focal_loss"
    _check_pred(name, pred, class_dim, "C", "class_dim")
    rows = _rows(pred, class_dim)
    if isinstance(target, (tuple, list)):
        if len(target) != 2:
            raise ValueError(
                f"{name}: target must be (label, score), "
                f"got a {type(target).__name__} of {len(target)}"
            )
        target, score = target
        _check_row_tensor(name, "label", target, pred, rows)
        _check_row_tensor(name, "score", score, pred, rows)
    else:
        score = None
        _check_tensor(name, "target", target, pred)
        if target.shape != pred.shape:
            raise _wrong_shape(
                name, "target", "pred's shape or be a tuple (label, score):", pred.shape, target
            )
    _check_not_negative(name, "beta", beta)
    if weight is not None:
        _check_tensor(name, "weight", weight, pred)
        if weight.shape == (*rows, 1) and class_dim == -1:
            weight = weight.squeeze(-1)
        if weight.shape != rows and weight.shape != pred.shape:
            expected = f"a value per row {tuple(rows)} or per element {tuple(pred.shape)}"
            raise ValueError(f"{name}: weight must have {expected}, got {tuple(weight.shape)}")
    avg_factor = _check_reduction(name, reduction, avg_factor, pred)
    if dispatch.DEBUG:
        debug.check_quality(name, pred, target, score, class_dim, activated)

    backend = dispatch.choose(name, pred, target, score, weight)
    if backend == "reference":
        target = target if score is None else (target, score)
        loss = reference.quality_focal_loss(
            pred,
            target,
            beta=beta,
            weight=weight,
            avg_factor=avg_factor,
            reduction=reduction,
            activated=activated,
            class_dim=class_dim,
        )
        return loss if loss_weight == 1 else loss * loss_weight
    if class_dim != -1:
        full = weight is not None and weight.dim() == pred.dim()
        pred, weight = _last(pred, class_dim), _last(weight, class_dim) if full else weight
        target = _last(target, class_dim) if score is None else target
    form = ops.PROBABILITIES if activated else ops.LOGITS
    return _run(
        ops.apply_quality_focal,
        torch.ops.gfl_kernels.quality_forward,
        (pred, target, score, weight),
        (form, float(beta)),
        reduction,
        avg_factor,
        loss_weight,
        backend,
    )


def _distribution_focal_loss(
    pred: Tensor,
    target: Any,
    weight: Tensor | None,
    avg_factor: float | Tensor | None,
    reduction: str,
    bin_dim: int = -1,
    loss_weight: float = 1.0,
) -> Tensor:
    """distribution_focal_loss with a loss weight folded in."""
    name = "distribution_focal_loss"
    _check_pred(name, pred, bin_dim, "K", "bin_dim")
    rows = _rows(pred, bin_dim)
    if isinstance(target, (tuple, list)):
        if len(target) != 3:
            what = f"{type(target).__name__} of {len(target)}"
            raise ValueError(
                f"{name}: target must be (left, weight_left, weight_right), got a {what}"
            )
        target, weight_left, weight_right = target
        _check_row_tensor(name, "left", target, pred, rows)
        _check_row_tensor(name, "weight_left", weight_left, pred, rows)
        _check_row_tensor(name, "weight_right", weight_right, pred, rows)
    else:
        weight_left = weight_right = None
        _check_row_tensor(name, "target", target, pred, rows)
    if weight is not None:
        _check_row_tensor(name, "weight", weight, pred, rows)
    avg_factor = _check_reduction(name, reduction, avg_factor, pred)
    if dispatch.DEBUG:
        debug.check_distribution(name, target, weight_left, pred.shape[bin_dim])

    backend = dispatch.choose(name, pred, target, weight_left, weight_right, weight)
    if backend == "reference":
        target = target if weight_left is None else (target, weight_left, weight_right)
        loss = reference.distribution_focal_loss(
            pred, target, weight=weight, avg_factor=avg_factor, reduction=reduction, bin_dim=bin_dim
        )
        return loss if loss_weight == 1 else loss * loss_weight
    pred = _last(pred, bin_dim)
    return _run(
        ops.apply_distribution_focal,
        torch.ops.gfl_kernels.distribution_forward,
        (pred, target, weight_left, weight_right, weight),
        (),
        reduction,
        avg_factor,
        loss_weight,
        backend,
    )


# Layout and reduction


def _last(tensor: Tensor, dim: int) -> Tensor:
    """tensor with dimension dim moved to the end: a view."""
    return tensor if dim == -1 else tensor.movedim(dim, -1)


def _rows(pred: Tensor, dim: int) -> torch.Size:
    shape = pred.shape
    return shape[:-1] if dim == -1 else shape[:dim] + shape[dim % pred.dim() + 1 :]


def _run(
    apply: Callable[..., Any],
    op: Callable[..., Any],
    tensors: tuple[Any, ...],
    constants: tuple[Any, ...],
    reduction: str,
    avg_factor: float | Tensor | None,
    loss_weight: float,
    backend: str,
) -> Tensor:
    """Run a fused loss: apply of its autograd Function, or the op itself where torch.compile
    records one.

    tensors and constants are the op's arguments before and after avg_factor; scale and the rest are
    made here.
    """
    code = (
        ops.NONE
        if reduction == "none"
        else ops.MEAN
        if avg_factor is None and reduction == "mean"
        else ops.SUM
    )
    scale = loss_weight
    compiling = torch.compiler.is_compiling()
    if avg_factor is not None and not isinstance(avg_factor, Tensor):
        if compiling:
            # As a constant of the graph it would be compiled anew for every value.
            avg_factor = torch.scalar_tensor(avg_factor, dtype=torch.float64)
        else:
            scale, avg_factor = loss_weight / float(avg_factor + EPS), None
    pred = tensors[0]
    # Forward leaves the gradient where backward can use it as it is: on the CPU, where the host may
    # look for an upstream gradient of 1 (a GPU reads pred again instead, which moves less). Not for
    # float16: under a GradScaler the upstream gradient is never 1, and an unscaled float16 gradient
    # has already lost its small values.
    write_grad = (
        code != ops.NONE
        and backend == "cpu"
        and pred.dtype is not torch.float16
        and pred.requires_grad
        and torch.is_grad_enabled()
    )
    if compiling:
        loss = op(*tensors, avg_factor, *constants, scale, code, write_grad)[0]
    else:
        loss = apply(backend, *tensors, avg_factor, *constants, scale, code, write_grad)
    return loss if avg_factor is None or avg_factor.dim() == 0 else loss.view(1)


# Argument checks


def _check_pred(name: str, pred: Any, dim: Any, size: str, dim_name: str) -> None:
    if not isinstance(pred, Tensor):
        raise TypeError(f"{name}: pred must be a Tensor, got {type(pred).__name__}")
    if not pred.is_floating_point():
        raise TypeError(f"{name}: pred must have a floating dtype, got {pred.dtype}")
    if pred.layout is not torch.strided:
        raise _wrong_layout(name, "pred", pred)
    if not isinstance(dim, int):
        raise TypeError(f"{name}: {dim_name} must be an int, got {type(dim).__name__}")
    dims = pred.dim()
    if dims == 0:
        raise ValueError(
            f"{name}: pred must have shape (..., {size}), got a tensor without dimensions"
        )
    if not -dims <= dim < dims:
        raise ValueError(
            f"{name}: {dim_name} must be in [{-dims}, {dims - 1}] for pred of {dims} dimensions, "
            f"got {dim}"
        )
    if pred.shape[dim] == 0:
        raise ValueError(
            f"{name}: pred must have at least one entry along {dim_name}, got {tuple(pred.shape)}"
        )


def _check_reduction(
    name: str, reduction: str, avg_factor: Any, pred: Tensor
) -> float | Tensor | None:
    """avg_factor as it counts: None for "none", detached and on pred's device if it is a tensor."""
    if reduction not in _REDUCTIONS:
        raise ValueError(
            f"{name}: reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}"
        )
    if avg_factor is None or reduction == "none":
        return None
    if reduction == "sum":
        raise ValueError(f'{name}: avg_factor can not be used with reduction="sum"')
    if not isinstance(avg_factor, Tensor):
        _check_number(name, "avg_factor", avg_factor, " or a Tensor")
        return avg_factor
    if avg_factor.numel() != 1 or avg_factor.dim() > 1:
        got = tuple(avg_factor.shape)
        raise ValueError(
            f"{name}: avg_factor must be a number or a tensor of shape () or (1,), got {got}"
        )
    if avg_factor.device != pred.device:
        if not avg_factor.is_cpu or avg_factor.dim() > 0:
            raise _wrong_device(name, "avg_factor", avg_factor, pred)
        avg_factor = avg_factor.to(pred.device, non_blocking=True)
    return avg_factor.detach()


def _check_number(name: str, argument: str, value: Any, also: str = "") -> None:
    # numbers.Real has numpy's scalars; the first test spares the common types its slow instance
    # check.
    if not isinstance(value, (float, int)) and not isinstance(value, Real):
        raise TypeError(f"{name}: {argument} must be a number{also}, got {type(value).__name__}")


def _check_not_negative(name: str, argument: str, value: Any) -> None:
    _check_number(name, argument, value)
    if not value >= 0:
        raise ValueError(f"{name}: {argument} must be >= 0, got {value}")


def _check_tensor(name: str, argument: str, tensor: Any, pred: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: {argument} must be a Tensor, got {type(tensor).__name__}")
    if (
        not (tensor.is_cpu and pred.is_cpu) and tensor.device != pred.device
    ):  # building two devices takes a while
        raise _wrong_device(name, argument, tensor, pred)
    if tensor.is_complex():
        raise TypeError(f"{name}: {argument} must have a real dtype, got {tensor.dtype}")
    if tensor.layout is not torch.strided:
        raise _wrong_layout(name, argument, tensor)


def _check_row_tensor(
    name: str, argument: str, tensor: Any, pred: Tensor, rows: torch.Size
) -> None:
    _check_tensor(name, argument, tensor, pred)
    if tensor.shape != rows:
        raise _wrong_shape(name, argument, "a value per row of pred:", rows, tensor)


def _wrong_shape(name: str, argument: str, what: str, expected: Any, tensor: Tensor) -> ValueError:
    return ValueError(
        f"{name}: {argument} must have {what} {tuple(expected)}, got {tuple(tensor.shape)}"
    )


def _wrong_device(name: str, argument: str, tensor: Tensor, pred: Tensor) -> ValueError:
    return ValueError(
        f"{name}: {argument} must be on pred's device {pred.device}, got {tensor.device}"
    )


def _wrong_layout(name: str, argument: str, tensor: Tensor) -> TypeError:
    return TypeError(f"{name}: {argument} must be a dense (strided) tensor, got {tensor.layout}")
