"""The losses in plain PyTorch, as mmdetection 3.3.0 runs them: baseline of demo and benchmark.

The formulas are those of gfl_kernels.reference; the sequence of tensor operations is upstream's,
operation for operation. Nothing here may be tidied into being faster: what gfl_kernels is compared
with is what people run today.

| here                               | mirrors, under mmdet/models/                             |
|------------------------------------|----------------------------------------------------------|
| weight_reduce_loss                 | losses/utils.py weight_reduce_loss                       |
| quality_focal_loss                 | losses/gfocal_loss.py quality_focal_loss                 |
| quality_focal_loss_tensor_target   | losses/gfocal_loss.py quality_focal_loss_tensor_target   |
| quality_focal_loss_with_prob       | losses/gfocal_loss.py quality_focal_loss_with_prob       |
| varifocal_loss                     | losses/varifocal_loss.py varifocal_loss                  |
| distribution_focal_loss            | losses/gfocal_loss.py distribution_focal_loss            |
| QualityFocalLoss                   | losses/gfocal_loss.py QualityFocalLoss                   |
| DistributionFocalLoss              | losses/gfocal_loss.py DistributionFocalLoss              |
| Integral                           | dense_heads/gfl_head.py Integral                         |
| bbox_overlaps                      | mmdet/structures/bbox/bbox_overlaps.py, is_aligned=True  |
| knowledge_distillation_kl_div_loss | losses/kd_loss.py                                        |
| distance2bbox                      | mmdet/structures/bbox/transforms.py distance2bbox        |
| GIoULoss                           | losses/iou_loss.py GIoULoss                              |
| Head.forward, .head_loss_single    | dense_heads/gfl_head.py loss_by_feat, loss_by_feat_single |

Not from mmdetection: sigmoid_focal_loss is torchvision 0.29.1's, detached_varifocal_loss D-FINE's
loss_labels_vfl, matchability_aware_loss DEIM's loss_labels_mal, ia_bce_loss and
position_supervised_loss what RF-DETR's loss_labels chooses from, task_aligned_bce what YOLOv8's
v8DetectionLoss takes, fine_grained_localization_loss D-FINE's unimodal_distribution_focal_loss;
all after matching.

Head begins where targets have been assigned. Shapes: N rows (anchors), C classes, K = reg_max + 1
bins.
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


def varifocal_loss(pred: Tensor, target: Tensor, alpha=0.75, gamma=2.0) -> Tensor:
    """VFL on logits [N, C] with dense targets; a loss per element."""
    pred_sigmoid = pred.sigmoid()
    target = target.type_as(pred)
    focal_weight = (
        target * (target > 0.0).float()
        + alpha * (pred_sigmoid - target).abs().pow(gamma) * (target <= 0.0).float()
    )
    return F.binary_cross_entropy_with_logits(pred, target, reduction="none") * focal_weight


def sigmoid_focal_loss(inputs: Tensor, targets: Tensor, alpha=0.25, gamma=2) -> Tensor:
    """Focal Loss on logits with one-hot targets; a loss per element."""
    p = torch.sigmoid(inputs)
    ce_loss = F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    p_t = p * targets + (1 - p) * (1 - targets)
    loss = ce_loss * ((1 - p_t) ** gamma)
    alpha_t = alpha * targets + (1 - alpha) * (1 - targets)
    return alpha_t * loss


def _one_hot(pred: Tensor, label: Tensor) -> Tensor:
    return F.one_hot(label, num_classes=pred.shape[-1] + 1)[..., :-1]


def focal_loss_of_labels(pred: Tensor, label: Tensor) -> Tensor:
    """The same with labels [N], C being background, as heads make its targets."""
    return sigmoid_focal_loss(pred, _one_hot(pred, label).to(pred.dtype))


def detached_varifocal_loss(pred: Tensor, target, alpha=0.2, gamma=2.0) -> Tensor:
    """VFL whose weight is a constant; target (label [N], score [N]). A loss per element."""
    label, score = target
    one_hot = _one_hot(pred, label)
    target_score = score.unsqueeze(-1) * one_hot
    pred_score = F.sigmoid(pred).detach()
    weight = alpha * pred_score.pow(gamma) * (1 - one_hot) + target_score
    return F.binary_cross_entropy_with_logits(pred, target_score, weight=weight, reduction="none")


def matchability_aware_loss(pred: Tensor, target, gamma=1.5) -> Tensor:
    """MAL; target (label [N], score [N]). A loss per element."""
    label, score = target
    one_hot = _one_hot(pred, label)
    target_score = score.unsqueeze(-1) * one_hot
    pred_score = F.sigmoid(pred).detach()
    target_score = target_score.pow(gamma)
    weight = pred_score.pow(gamma) * (1 - one_hot) + one_hot
    return F.binary_cross_entropy_with_logits(pred, target_score, weight=weight, reduction="none")


def ia_bce_loss(pred: Tensor, target, alpha=0.25, gamma=2) -> Tensor:
    """IA-BCE; target (label [N], IoU [N]). A loss per element."""
    label, iou = target
    rows = (label < pred.shape[1]).nonzero().squeeze(1)
    positive = rows, label[rows]
    prob = pred.sigmoid()
    pos_weights = torch.zeros_like(pred)
    neg_weights = prob**gamma
    t = prob[positive].pow(alpha) * iou[rows].pow(1 - alpha)
    t = torch.clamp(t, 0.01).detach().type_as(pred)
    pos_weights[positive] = t
    neg_weights[positive] = 1 - t
    return neg_weights * pred - F.logsigmoid(pred) * (pos_weights + neg_weights)


def position_supervised_loss(pred: Tensor, target: Tensor, alpha=0.25, gamma=2) -> Tensor:
    """The position-supervised loss with dense targets; a loss per element."""
    prob = pred.sigmoid()
    ce_loss = F.binary_cross_entropy_with_logits(pred, target, reduction="none")
    loss = ce_loss * (torch.abs(target - prob) ** gamma)
    alpha_t = alpha * (target > 0.0).float() + (1 - alpha) * (target <= 0.0).float()
    return alpha_t * loss


def task_aligned_bce(pred: Tensor, target: Tensor) -> Tensor:
    """Binary cross entropy against dense task-aligned scores; a loss per element."""
    return F.binary_cross_entropy_with_logits(pred, target.to(pred.dtype), reduction="none")


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


def fine_grained_localization_loss(pred: Tensor, target, weight=None, *, avg_factor=None) -> Tensor:
    """FGL on logits [N, K]; target (left bin [N], its weight [N], the right one's [N])."""
    left, weight_left, weight_right = target
    right = left + 1
    of_left = F.cross_entropy(pred, left, reduction="none") * weight_left.reshape(-1)
    of_right = F.cross_entropy(pred, right, reduction="none") * weight_right.reshape(-1)
    loss = of_left + of_right
    return weight_reduce_loss(loss, weight, "mean", avg_factor)


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


def knowledge_distillation_kl_div_loss(
    pred: Tensor, soft_label: Tensor, weight=None, *, T=10, reduction="mean", avg_factor=None
) -> Tensor:
    """Localization distillation of rows of bins; soft_label: the teacher's logits."""
    target = F.softmax(soft_label / T, dim=1)
    target = target.detach()
    kd_loss = F.kl_div(F.log_softmax(pred / T, dim=1), target, reduction="none").mean(1) * (T * T)
    return weight_reduce_loss(kd_loss, weight, reduction, avg_factor)


def distance2bbox(points: Tensor, distance: Tensor, max_shape=None) -> Tensor:
    """Boxes [N, 4] from points [N, 2] and distances left, top, right, bottom, clipped."""
    x1 = points[..., 0] - distance[..., 0]
    y1 = points[..., 1] - distance[..., 1]
    x2 = points[..., 0] + distance[..., 2]
    y2 = points[..., 1] + distance[..., 3]
    bboxes = torch.stack([x1, y1, x2, y2], -1)
    if max_shape is not None:
        bboxes[:, 0::2].clamp_(min=0, max=max_shape[1])
        bboxes[:, 1::2].clamp_(min=0, max=max_shape[0])
    return bboxes


def distribution_statistics(x: Tensor, reg_max=16, topk=4) -> Tensor:
    """The input of GFocalV2's DGQP (GFocalHead.forward_single): [N, 4 (reg_max + 1)] -> [N, 4, topk
    + 1]."""
    prob = F.softmax(x.reshape(-1, 4, reg_max + 1), dim=2)
    prob_topk, _ = prob.topk(topk, dim=2)
    return torch.cat([prob_topk, prob_topk.mean(dim=2, keepdim=True)], dim=2)


def distribution_moments(x: Tensor, reg_max=16) -> Tensor:
    """Mean, standard deviation and entropy of each side: [N, 4 (reg_max + 1)] -> [N, 4, 3]."""
    log_p = F.log_softmax(x.reshape(-1, 4, reg_max + 1), dim=2)
    p = log_p.exp()
    project = torch.arange(reg_max + 1, device=x.device).type_as(x)
    mean = F.linear(p, project)
    std = (p * (project - mean.unsqueeze(2)) ** 2).sum(2).sqrt()
    return torch.stack([mean, std, -(p * log_p).sum(2)], dim=2)


def peak_integral(x: Tensor, reg_max=16, window=2) -> Tensor:
    """Mean bin among those at most `window` from the highest: [N, 4 (reg_max + 1)] -> [N, 4]."""
    x = x.reshape(-1, 4, reg_max + 1)
    bins = torch.arange(reg_max + 1, device=x.device)
    outside = (bins - x.argmax(dim=2, keepdim=True)).abs() > window
    return F.linear(F.softmax(x.masked_fill(outside, -torch.inf), dim=2), bins.type_as(x))


def bbox_overlaps(bboxes1: Tensor, bboxes2: Tensor, mode="iou", eps=1e-6) -> Tensor:
    area1 = (bboxes1[..., 2] - bboxes1[..., 0]) * (bboxes1[..., 3] - bboxes1[..., 1])
    area2 = (bboxes2[..., 2] - bboxes2[..., 0]) * (bboxes2[..., 3] - bboxes2[..., 1])
    lt = torch.max(bboxes1[..., :2], bboxes2[..., :2])
    rb = torch.min(bboxes1[..., 2:], bboxes2[..., 2:])
    wh = (rb - lt).clamp(min=0)
    overlap = wh[..., 0] * wh[..., 1]
    union = area1 + area2 - overlap
    if mode == "giou":
        enclosed_lt = torch.min(bboxes1[..., :2], bboxes2[..., :2])
        enclosed_rb = torch.max(bboxes1[..., 2:], bboxes2[..., 2:])
    eps = union.new_tensor([eps])
    union = torch.max(union, eps)
    ious = overlap / union
    if mode == "iou":
        return ious
    enclose_wh = (enclosed_rb - enclosed_lt).clamp(min=0)
    enclose_area = enclose_wh[..., 0] * enclose_wh[..., 1]
    enclose_area = torch.max(enclose_area, eps)
    return ious - (enclose_area - union) / enclose_area


class GIoULoss(nn.Module):
    def __init__(self, eps=1e-6, loss_weight=1.0):
        super().__init__()
        self.eps = eps
        self.loss_weight = loss_weight

    def forward(self, pred, target, weight, avg_factor) -> Tensor:
        if not torch.any(weight > 0):
            return (pred * weight.unsqueeze(1)).sum()
        loss = 1 - bbox_overlaps(pred, target, mode="giou", eps=self.eps)
        return self.loss_weight * weight_reduce_loss(loss, weight, "mean", avg_factor)


class Head(nn.Module):
    """The losses of a GFLHead and the numbers its loss_by_feat reads."""

    def __init__(self, num_classes, strides, reg_max=16):
        super().__init__()
        self.num_classes = num_classes
        self.strides = strides
        self.reg_max = reg_max
        self.integral = Integral(reg_max)
        self.loss_cls = QualityFocalLoss(beta=2.0, loss_weight=1.0)
        self.loss_bbox = GIoULoss(loss_weight=2.0)
        self.loss_dfl = DistributionFocalLoss(loss_weight=0.25)

    def forward(self, cls_scores, bbox_preds, anchors, labels, label_weights, bbox_targets,
                avg_factor):  # fmt: skip
        """Per level: [B, C, H, W], [B, 4 K, H, W], [B, H W, 4], [B, H W] twice, [B, H W, 4]."""
        avg_factor = torch.tensor(avg_factor, dtype=torch.float).item()
        levels = [
            self.head_loss_single(*level, avg_factor)
            for level in zip(
                anchors,
                cls_scores,
                bbox_preds,
                labels,
                label_weights,
                bbox_targets,
                self.strides,
                strict=True,
            )  # fmt: skip
        ]
        losses_cls, losses_bbox, losses_dfl, weights = map(list, zip(*levels, strict=True))
        total = sum(weights).clamp_(min=1).item()
        return losses_cls, [x / total for x in losses_bbox], [x / total for x in losses_dfl]

    def head_loss_single(self, anchors, cls_score, bbox_pred, labels, label_weights, bbox_targets,
                         stride, avg_factor):  # fmt: skip
        anchors = anchors.reshape(-1, 4)
        cls_score = cls_score.permute(0, 2, 3, 1).reshape(-1, self.num_classes)
        bbox_pred = bbox_pred.permute(0, 2, 3, 1).reshape(-1, 4 * (self.reg_max + 1))
        bbox_targets = bbox_targets.reshape(-1, 4)
        labels = labels.reshape(-1)
        label_weights = label_weights.reshape(-1)
        pos_inds = ((labels >= 0) & (labels < self.num_classes)).nonzero().squeeze(1)
        score = label_weights.new_zeros(labels.shape)
        if len(pos_inds) > 0:
            pos_bbox_targets = bbox_targets[pos_inds]
            pos_bbox_pred = bbox_pred[pos_inds]
            pos_anchors = anchors[pos_inds]
            centers = torch.stack(
                [
                    (pos_anchors[..., 2] + pos_anchors[..., 0]) / 2,
                    (pos_anchors[..., 3] + pos_anchors[..., 1]) / 2,
                ],
                dim=-1,
            )
            centers = centers / stride
            weight_targets = cls_score.detach().sigmoid()
            weight_targets = weight_targets.max(dim=1)[0][pos_inds]
            distance = self.integral(pos_bbox_pred)
            decoded = torch.stack(
                [
                    centers[..., 0] - distance[..., 0],
                    centers[..., 1] - distance[..., 1],
                    centers[..., 0] + distance[..., 2],
                    centers[..., 1] + distance[..., 3],
                ],
                -1,
            )
            targets = pos_bbox_targets / stride
            score[pos_inds] = bbox_overlaps(decoded.detach(), targets)
            pred_corners = pos_bbox_pred.reshape(-1, self.reg_max + 1)
            highest = self.reg_max - 0.1
            target_corners = torch.stack(
                [
                    (centers[..., 0] - targets[..., 0]).clamp(min=0, max=highest),
                    (centers[..., 1] - targets[..., 1]).clamp(min=0, max=highest),
                    (targets[..., 2] - centers[..., 0]).clamp(min=0, max=highest),
                    (targets[..., 3] - centers[..., 1]).clamp(min=0, max=highest),
                ],
                -1,
            ).reshape(-1)
            loss_bbox = self.loss_bbox(decoded, targets, weight=weight_targets, avg_factor=1.0)
            loss_dfl = self.loss_dfl(
                pred_corners,
                target_corners,
                weight=weight_targets[:, None].expand(-1, 4).reshape(-1),
                avg_factor=4.0,
            )
        else:
            loss_bbox = bbox_pred.sum() * 0
            loss_dfl = bbox_pred.sum() * 0
            weight_targets = bbox_pred.new_tensor(0)
        loss_cls = self.loss_cls(
            cls_score, (labels, score), weight=label_weights, avg_factor=avg_factor
        )
        return loss_cls, loss_bbox, loss_dfl, weight_targets.sum()
