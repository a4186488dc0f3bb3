"""nn.Modules with mmdetection's constructors, call signatures and state_dict keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .functional import _distribution_focal_loss, _quality_focal_loss, integral


class _Loss(nn.Module):
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
        if use_sigmoid is not True:
            raise ValueError(f"QualityFocalLoss: use_sigmoid must be True, got {use_sigmoid!r}")
        self.use_sigmoid = use_sigmoid
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
    persistent buffer ``project`` = 0, 1, ..., reg_max.
    """

    def __init__(self, reg_max: int = 16) -> None:
        super().__init__()
        self.reg_max = reg_max
        self.register_buffer("project", torch.linspace(0, reg_max, reg_max + 1))

    def forward(self, x: Tensor) -> Tensor:
        """[..., 4 (reg_max + 1)] -> [N, 4] in bins, N the product of the leading dimensions."""
        return integral(x.reshape(-1, self.reg_max + 1), bins=self.project).reshape(-1, 4)
