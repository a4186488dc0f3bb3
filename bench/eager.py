"""The losses in plain PyTorch, as mmdetection 3.3.0 runs them: baseline of demo and benchmark.

The formulas are those of gfl_kernels.reference; the sequence of tensor operations is upstream's,
operation for operation. Nothing here may be tidied into being faster: what gfl_kernels is compared
with is what people run today.

| here                             | mirrors, under mmdet/models/                             |
|----------------------------------|----------------------------------------------------------|
| weight_reduce_loss               | losses/utils.py weight_reduce_loss                       |
| quality_focal_loss               | losses/gfocal_loss.py quality_focal_loss                 |
| quality_focal_loss_tensor_target | losses/gfocal_loss.py quality_focal_loss_tensor_target   |
| quality_focal_loss_with_prob     | losses/gfocal_loss.py quality_focal_loss_with_prob       |
| distribution_focal_loss          | losses/gfocal_loss.py distribution_focal_loss            |
| QualityFocalLoss                 | losses/gfocal_loss.py QualityFocalLoss                   |
| DistributionFocalLoss            | losses/gfocal_loss.py DistributionFocalLoss              |
| Integral                         | dense_heads/gfl_head.py Integral                         |

Shapes: N rows (anchors), C classes, K = reg_max + 1 bins.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def weight_reduce_loss(loss: Tensor, weight=None, reduction="mean", avg_factor=None) -> Tensor:
    """Row weights, then the reduction: "mean" is sum / (avg_factor + eps(float32)) if given one."""
    if weight is not None:
        loss = loss * weight
    if avg_factor is None:
        return {"none": lambda x: x, "mean": torch.mean, "sum": torch.sum}[reduction](loss)
    if reduction == "mean":
        return loss.sum() / (avg_factor + torch.finfo(torch.float32).eps)
    if reduction != "none":
        raise ValueError('avg_factor can not be used with reduction="sum"')
    return loss


def _sparse_quality(
    pred: Tensor, target, beta: float, probability: Tensor, cross_entropy
) -> Tensor:
    """All entries as negatives, then index assignment over the positives. [N, C] -> [N]."""
    label, score = target
    loss = cross_entropy(
        pred, probability.new_zeros(pred.shape), reduction="none"
    ) * probability.pow(beta)
    rows = ((label >= 0) & (label < pred.size(1))).nonzero().squeeze(1)
    columns = label[rows].long()
    distance = score[rows] - probability[rows, columns]
    loss[rows, columns] = cross_entropy(
        pred[rows, columns], score[rows], reduction="none"
    ) * distance.abs().pow(beta)
    return loss.sum(dim=1, keepdim=False)


def quality_focal_loss(
    pred: Tensor, target, weight=None, *, beta=2.0, reduction="mean", avg_factor=None
) -> Tensor:
    """QFL on logits [N, C]; target (label [N], score [N]), a label outside [0, C) is background."""
    loss = _sparse_quality(pred, target, beta, pred.sigmoid(), F.binary_cross_entropy_with_logits)
    return weight_reduce_loss(loss, weight, reduction, avg_factor)


def quality_focal_loss_with_prob(
    pred: Tensor, target, weight=None, *, beta=2.0, reduction="mean", avg_factor=None
) -> Tensor:
    """QFL on probabilities [N, C], for GFLv2's joint score; target (label [N], score [N])."""
    loss = _sparse_quality(pred, target, beta, pred, F.binary_cross_entropy)
    return weight_reduce_loss(loss, weight, reduction, avg_factor)


def quality_focal_loss_tensor_target(
    pred: Tensor,
    target: Tensor,
    weight=None,
    *,
    beta=2.0,
    activated=False,
    reduction="mean",
    avg_factor=None,
) -> Tensor:
    """QFL with a dense target [N, C], 0 for negatives; if activated, pred holds probabilities."""
    probability = pred if activated else pred.sigmoid()
    cross_entropy = F.binary_cross_entropy if activated else F.binary_cross_entropy_with_logits
    target = target.type_as(pred)
    loss = cross_entropy(
        pred, probability.new_zeros(pred.shape), reduction="none"
    ) * probability.pow(beta)
    positive = target != 0
    distance = target[positive] - probability[positive]
    loss[positive] = cross_entropy(
        pred[positive], target[positive], reduction="none"
    ) * distance.abs().pow(beta)
    return weight_reduce_loss(loss.sum(dim=1, keepdim=False), weight, reduction, avg_factor)


def distribution_focal_loss(
    pred: Tensor, target: Tensor, weight=None, *, reduction="mean", avg_factor=None
) -> Tensor:
    """DFL on logits [N, K], float targets [N] in [0, K-1): one cross entropy per adjacent bin."""
    left = target.long()
    right = left + 1
    weight_left = right.float() - target
    weight_right = target - left.float()
    loss = (
        F.cross_entropy(pred, left, reduction="none") * weight_left
        + F.cross_entropy(pred, right, reduction="none") * weight_right
    )
    return weight_reduce_loss(loss, weight, reduction, avg_factor)


class QualityFocalLoss(nn.Module):
    """Sparse tuple or dense tensor targets, chosen by the target's type."""

    def __init__(
        self, use_sigmoid=True, beta=2.0, reduction="mean", loss_weight=1.0, activated=False
    ):
        super().__init__()
        if not use_sigmoid:
            raise ValueError("QualityFocalLoss: only use_sigmoid=True is defined")
        self.use_sigmoid = use_sigmoid
        self.beta = beta
        self.reduction = reduction
        self.loss_weight = loss_weight
        self.activated = activated

    def forward(
        self, pred, target, weight=None, avg_factor=None, reduction_override=None
    ) -> Tensor:
        options = {
            "beta": self.beta,
            "reduction": reduction_override or self.reduction,
            "avg_factor": avg_factor,
        }
        if isinstance(target, Tensor):
            loss = quality_focal_loss_tensor_target(
                pred, target, weight, activated=self.activated, **options
            )
        elif self.activated:
            loss = quality_focal_loss_with_prob(pred, target, weight, **options)
        else:
            loss = quality_focal_loss(pred, target, weight, **options)
        return self.loss_weight * loss


class DistributionFocalLoss(nn.Module):
    """DFL over rows of bins; the target is the continuous distance in bins."""

    def __init__(self, reduction="mean", loss_weight=1.0):
        super().__init__()
        self.reduction = reduction
        self.loss_weight = loss_weight

    def forward(
        self, pred, target, weight=None, avg_factor=None, reduction_override=None
    ) -> Tensor:
        return self.loss_weight * distribution_focal_loss(
            pred,
            target,
            weight,
            reduction=reduction_override or self.reduction,
            avg_factor=avg_factor,
        )


class Integral(nn.Module):
    """Mean bin of each side's softmax, by a linear map: [N, 4 * (reg_max + 1)] -> [N, 4]."""

    def __init__(self, reg_max=16):
        super().__init__()
        self.reg_max = reg_max
        self.register_buffer("project", torch.linspace(0, reg_max, reg_max + 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.softmax(x.reshape(-1, self.reg_max + 1), dim=1)
        return F.linear(x, self.project.type_as(x)).reshape(-1, 4)
