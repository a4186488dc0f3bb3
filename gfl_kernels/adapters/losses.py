"""Functions and methods of mmdetection and of code that descends from it, translated.

Each takes what it replaces as its first argument; the others are those of its original, which
Report.replace checks.
"""

from __future__ import annotations

from ..functional import (
    _distribution_focal_loss,
    _quality_family,
    _quality_focal_loss,
    _varifocal_rule,
    distribution_focal_loss,
    integral,
    quality_focal_loss,
)


def quality(original, pred, target, weight=None, reduction="mean", avg_factor=None, beta=2.0):
    return quality_focal_loss(
        pred, target, beta=beta, weight=weight, avg_factor=avg_factor, reduction=reduction
    )


def quality_or_probabilities(
    original,
    pred,
    target,
    weight=None,
    reduction="mean",
    avg_factor=None,
    beta=2.0,
    use_sigmoid=True,
):
    """GFocalV2's."""
    return quality_focal_loss(
        pred,
        target,
        beta=beta,
        weight=weight,
        avg_factor=avg_factor,
        reduction=reduction,
        activated=not use_sigmoid,
    )


def quality_dense(
    original,
    pred,
    target,
    weight=None,
    reduction="mean",
    avg_factor=None,
    beta=2.0,
    activated=False,
):
    # Upstream sums over dimension 1, whatever follows.
    return quality_focal_loss(
        pred,
        target,
        beta=beta,
        weight=weight,
        avg_factor=avg_factor,
        reduction=reduction,
        activated=activated,
        class_dim=-1 if pred.dim() == 2 else 1,
    )


def quality_of_probabilities(
    original, pred, target, weight=None, reduction="mean", avg_factor=None, beta=2.0
):
    return quality_focal_loss(
        pred,
        target,
        beta=beta,
        weight=weight,
        avg_factor=avg_factor,
        reduction=reduction,
        activated=True,
    )


def distribution(original, pred, target, weight=None, reduction="mean", avg_factor=None):
    return distribution_focal_loss(
        pred, target, weight=weight, avg_factor=avg_factor, reduction=reduction
    )


def varifocal(
    original,
    pred,
    target,
    weight=None,
    alpha=0.75,
    gamma=2.0,
    iou_weighted=True,
    reduction="mean",
    avg_factor=None,
):
    """mmdetection's, whose reductions are over elements."""
    return _quality_family(
        "varifocal_loss",
        pred,
        target,
        _varifocal_rule(alpha, gamma, iou_weighted, False, False),
        weight,
        avg_factor,
        reduction,
        -1,
        elementwise=True,
    )


def quality_module(
    original, self, pred, target, weight=None, avg_factor=None, reduction_override=None
):
    return _quality_focal_loss(
        pred,
        target,
        self.beta,
        weight,
        avg_factor,
        reduction_override or self.reduction,
        getattr(self, "activated", False),
        -1,
        self.loss_weight,
    )


def distribution_module(
    original, self, pred, target, weight=None, avg_factor=None, reduction_override=None
):
    return _distribution_focal_loss(
        pred, target, weight, avg_factor, reduction_override or self.reduction, -1, self.loss_weight
    )


def varifocal_module(
    original, self, pred, target, weight=None, avg_factor=None, reduction_override=None
):
    return _quality_family(
        "varifocal_loss",
        pred,
        target,
        _varifocal_rule(self.alpha, self.gamma, self.iou_weighted, False, False),
        weight,
        avg_factor,
        reduction_override or self.reduction,
        -1,
        self.loss_weight,
        elementwise=True,
    )


def integral_module(original, self, x):
    """In x's dtype, as the host's; computed in float32."""
    return integral(x.reshape(-1, self.reg_max + 1), bins=self.project).reshape(-1, 4).to(x.dtype)


def integral_of_sides(original, self, x):
    """NanoDet's, which keeps the leading dimensions: [..., 4 (reg_max + 1)] -> [..., 4]."""
    rows = x.reshape(*x.shape[:-1], 4, self.reg_max + 1)
    return integral(rows, bins=self.project).to(x.dtype)


def integral_of_project(original, self, x, project):
    """D-FINE's, whose bins are an argument: [..., 4 (reg_max + 1)] -> [..., 4]."""
    return integral_of_bins(x, self.reg_max + 1, project)


def integral_of_bins(x, count, values):
    """[..., 4 count] -> [..., 4] in x's dtype."""
    rows = x.reshape(*x.shape[:-1], 4, count)
    return integral(rows, bins=values.to(x.device).view(-1)).to(x.dtype)


def fine_grained(
    original,
    self,
    pred,
    label,
    weight_right,
    weight_left,
    weight=None,
    reduction="sum",
    avg_factor=None,
):
    """D-FINE's unimodal_distribution_focal_loss: explicit bins and weights, no eps."""
    loss = distribution_focal_loss(
        pred,
        (label, weight_left.reshape(-1), weight_right.reshape(-1)),
        weight=weight,
        reduction="sum" if avg_factor is not None else reduction,
    )
    return loss if avg_factor is None else loss / avg_factor
