"""nn.Modules with mmdetection's constructors, call signatures and state_dict keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .functional import (
    _distribution_focal_loss,
    _quality_family,
    _quality_focal_loss,
    _sigmoid_focal_loss,
    _varifocal_rule,
    integral,
)
from .head import GFLLossOutput, gfl_loss


class _Loss(nn.Module):
    reduction: str

    def _check_sigmoid(self, use_sigmoid: bool) -> None:
        if use_sigmoid is not True:
            raise ValueError(
                f"{type(self).__name__}: use_sigmoid must be True, got {use_sigmoid!r}"
            )
        self.use_sigmoid = use_sigmoid

    def _reduction(self, override: str | None) -> str:
        if override not in (None, "none", "mean", "sum"):
            raise ValueError(
                f"{type(self).__name__}: reduction_override must be None, none, mean or sum, "
                f"got {override!r}"
            )
        return override or self.reduction


class QualityFocalLoss(_Loss):
    """Quality Focal Loss; see :func:`gfl_kernels.quality_focal_loss`. Drop-in for
    ``mmdet.models.QualityFocalLoss``.

    Args:
        use_sigmoid: must be True, as in mmdetection: the loss is defined on sigmoid scores.
        beta: the focusing exponent, >= 0.
        reduction: "mean", "sum" or "none".
        loss_weight: multiplies the loss; folded into the kernel.
        activated: pred holds probabilities instead of logits.
    """

    def __init__(
        self,
        use_sigmoid: bool = True,
        beta: float = 2.0,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        activated: bool = False,
    ) -> None:
        super().__init__()
        self._check_sigmoid(use_sigmoid)
        self.beta = beta
        self.reduction = reduction
        self.loss_weight = loss_weight
        self.activated = activated

    def forward(
        self,
        pred: Tensor,
        target: Tensor | tuple[Tensor, Tensor],
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """pred [N, C]; target (label [N], score [N]) or [N, C]; weight [N] or [N, C]."""
        reduction = self._reduction(reduction_override)
        return _quality_focal_loss(
            pred,
            target,
            self.beta,
            weight,
            avg_factor,
            reduction,
            self.activated,
            -1,
            self.loss_weight,
        )


class VarifocalLoss(_Loss):
    """Varifocal Loss; see :func:`gfl_kernels.varifocal_loss`. Drop-in for
    ``mmdet.models.VarifocalLoss``, whose reductions are over elements: "none" gives a loss per
    element, and "mean" without avg_factor divides by their number.

    Args:
        use_sigmoid: must be True, as in mmdetection.
        alpha, gamma, iou_weighted: as in the function.
        reduction: "mean", "sum" or "none".
        loss_weight: multiplies the loss; folded into the kernel.
    """

    def __init__(
        self,
        use_sigmoid: bool = True,
        alpha: float = 0.75,
        gamma: float = 2.0,
        iou_weighted: bool = True,
        reduction: str = "mean",
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self._check_sigmoid(use_sigmoid)
        self.alpha = alpha
        self.gamma = gamma
        self.iou_weighted = iou_weighted
        self.reduction = reduction
        self.loss_weight = loss_weight

    def forward(
        self,
        pred: Tensor,
        target: Tensor | tuple[Tensor, Tensor],
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """pred [N, C]; target [N, C] or (label [N], score [N]); weight [N, C] or [N]."""
        return _quality_family(
            "varifocal_loss",
            pred,
            target,
            _varifocal_rule(self.alpha, self.gamma, self.iou_weighted, False, False),
            weight,
            avg_factor,
            self._reduction(reduction_override),
            -1,
            self.loss_weight,
            elementwise=True,
        )


class FocalLoss(_Loss):
    """Focal Loss on sigmoid scores; see :func:`gfl_kernels.sigmoid_focal_loss`. Drop-in for
    ``mmdet.models.FocalLoss``.

    Args:
        use_sigmoid: must be True, as in mmdetection.
        gamma, alpha: as in the function.
        reduction: over elements: "mean", "sum" or "none".
        loss_weight: multiplies the loss; folded into the kernel.
        activated: pred holds probabilities instead of logits.
    """

    def __init__(
        self,
        use_sigmoid: bool = True,
        gamma: float = 2.0,
        alpha: float = 0.25,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        activated: bool = False,
    ) -> None:
        super().__init__()
        self._check_sigmoid(use_sigmoid)
        self.gamma = gamma
        self.alpha = alpha
        self.reduction = reduction
        self.loss_weight = loss_weight
        self.activated = activated

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """pred [N, C]; target [N] labels or [N, C]; weight [N], [N, C] or [N * C]."""
        # mmdetection's weights of elements may come flattened (FSAF).
        if weight is not None and weight.dim() == 1 and weight.numel() == pred.numel():
            weight = weight.reshape(pred.shape)
        return _sigmoid_focal_loss(
            pred,
            target,
            self.alpha,
            self.gamma,
            self._reduction(reduction_override),
            weight,
            avg_factor,
            self.activated,
            -1,
            self.loss_weight,
        )


class DistributionFocalLoss(_Loss):
    """Distribution Focal Loss; see :func:`gfl_kernels.distribution_focal_loss`.

    Drop-in for ``mmdet.models.DistributionFocalLoss``; loss_weight is folded into the kernel.
    """

    def __init__(self, reduction: str = "mean", loss_weight: float = 1.0) -> None:
        super().__init__()
        self.reduction = reduction
        self.loss_weight = loss_weight

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """pred [N, K]; target [N] in bins; weight [N]."""
        reduction = self._reduction(reduction_override)
        return _distribution_focal_loss(
            pred, target, weight, avg_factor, reduction, -1, self.loss_weight
        )


class Integral(nn.Module):
    """Distances of the four sides from their distributions; see :func:`gfl_kernels.integral`.

    Drop-in for the ``Integral`` of ``mmdet.models.dense_heads.gfl_head``: the bins are the
    persistent buffer ``project`` = 0, 1, ..., reg_max. mode and window are those of the function.
    """

    def __init__(self, reg_max: int = 16, *, mode: str = "mean", window: int = 2) -> None:
        super().__init__()
        self.project: Tensor
        self.reg_max = reg_max
        self.mode = mode
        self.window = window
        self.register_buffer("project", torch.linspace(0, reg_max, reg_max + 1))

    def forward(self, x: Tensor) -> Tensor:
        """[..., 4 (reg_max + 1)] -> [N, 4] in bins, N the product of the leading dimensions."""
        rows = x.reshape(-1, self.reg_max + 1)
        value = integral(rows, bins=self.project, mode=self.mode, window=self.window)
        return value.reshape(-1, 4)


class GFLLoss(nn.Module):
    """The losses of a GFL head over all levels; see :func:`gfl_kernels.gfl_loss`.

    Args:
        strides: per level, in pixels.
        reg_max, beta, iou, loss_weights, process_group: as in the function.
    """

    def __init__(
        self,
        strides: Sequence[float] = (8, 16, 32, 64, 128),
        reg_max: int = 16,
        beta: float = 2.0,
        iou: str = "giou",
        loss_weights: Sequence[float] = (1.0, 2.0, 0.25),
        process_group: Any = None,
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.reg_max = reg_max
        self.beta = beta
        self.iou = iou
        self.loss_weights = tuple(loss_weights)
        self.process_group = process_group

    def forward(
        self,
        cls_logits: Sequence[Tensor],
        box_logits: Sequence[Tensor],
        points: Sequence[Tensor],
        labels: Sequence[Tensor],
        box_targets: Sequence[Tensor],
        label_weights: Sequence[Tensor] | None = None,
        avg_factor: float | Tensor | None = None,
        return_boxes: bool = False,
    ) -> GFLLossOutput:
        """Per level: [B, C, H, W], [B, 4 (reg_max + 1), H, W], [H * W, 2], [B, H * W],
        [B, H * W, 4] and [B, H * W]."""
        return gfl_loss(
            cls_logits,
            box_logits,
            points,
            labels,
            box_targets,
            label_weights=label_weights,
            strides=self.strides,
            reg_max=self.reg_max,
            beta=self.beta,
            iou=self.iou,
            loss_weights=self.loss_weights,
            avg_factor=avg_factor,
            process_group=self.process_group,
            return_boxes=return_boxes,
        )
