"""Criteria of the DETR family: RT-DETR's, D-FINE's and DEIM's loss_labels_*, LW-DETR's loss_labels.

They agree in what they compute and differ in names. outputs: "pred_logits" or "logits" [B, Q, C]
and "pred_boxes" [B, Q, 4], centre and size; targets: of each image "labels" or "class_labels" [n]
and "boxes" [n, 4]; indices: of each image, (queries, the targets they are matched with).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..functional import ia_bce_loss, matchability_aware_loss, sigmoid_focal_loss, varifocal_loss


def matched_queries(criterion, indices) -> tuple[Tensor, Tensor]:
    """(image, query) of every match, by the host's own method."""
    for name in ("_get_src_permutation_idx", "_get_source_permutation_idx"):
        if hasattr(criterion, name):
            return getattr(criterion, name)(indices)
    raise AttributeError(f"{type(criterion).__name__} has no _get_src_permutation_idx")


def matched_targets(targets, indices, *names: str) -> Tensor:
    """What the targets have under the first of the names that they know, match by match."""
    name = next((name for name in names if targets and name in targets[0]), names[0])
    return torch.cat([t[name][i] for t, (_, i) in zip(targets, indices, strict=False)])


def corners(boxes: Tensor) -> Tensor:
    """(x, y, w, h) -> (x1, y1, x2, y2), [N, 4] both; of half boxes in float32."""
    centre, size = boxes.to(reference.accumulate_dtype(boxes.dtype)).chunk(2, dim=-1)
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def matched_iou(outputs, targets, indices, queries) -> Tensor:
    """IoU of every match, a constant, [N]: hosts take the diagonal of a matrix [N, N].

    Without the floor under the union that heads in pixels have: it is 1e-6, and these boxes are
    shares of the image.
    """
    boxes = outputs["pred_boxes"][queries].detach()
    wanted = matched_targets(targets, indices, "boxes")
    overlap, union = reference.overlap_and_union(corners(boxes), corners(wanted))
    return overlap / union


def labels(criterion, logits, targets, indices, queries) -> Tensor:
    """[B, Q], background being the number of classes."""
    label = torch.full(logits.shape[:2], criterion.num_classes, device=logits.device)
    label[queries] = matched_targets(targets, indices, "labels", "class_labels")
    return label


def _labels_and_iou(criterion, outputs, targets, indices, iou=None):
    """(logits, (label, IoU))."""
    logits = outputs["pred_logits" if "pred_logits" in outputs else "logits"]
    queries = matched_queries(criterion, indices)
    if iou is None:
        iou = matched_iou(outputs, targets, indices, queries)
    score = torch.zeros(logits.shape[:2], dtype=iou.dtype, device=logits.device)
    score[queries] = iou.detach()
    return logits, (labels(criterion, logits, targets, indices, queries), score)


# The hosts' mean over queries times their number is the sum.


def varifocal(original, self, outputs, targets, indices, num_boxes, values=None):
    """loss_labels_vfl of RT-DETRv2, D-FINE and DEIM; values: IoU, where the caller has it."""
    logits, target = _labels_and_iou(self, outputs, targets, indices, values)
    loss = varifocal_loss(
        logits, target, alpha=self.alpha, gamma=self.gamma, detach_weight=True, reduction="sum"
    )
    return {"loss_vfl": loss / num_boxes}


def varifocal_logged(original, self, outputs, targets, indices, num_boxes, log=True):
    """RT-DETR's and transformers'."""
    return varifocal(original, self, outputs, targets, indices, num_boxes)


def matchability(original, self, outputs, targets, indices, num_boxes, values=None):
    """loss_labels_mal of DEIM and DEIMv2."""
    logits, target = _labels_and_iou(self, outputs, targets, indices, values)
    loss = matchability_aware_loss(
        logits, target, gamma=self.gamma, mal_alpha=self.mal_alpha, reduction="sum"
    )
    return {"loss_mal": loss / num_boxes}


def matchability_of_boxes(original, self, outputs, targets, indices, num_boxes):
    """transformers'."""
    return matchability(original, self, outputs, targets, indices, num_boxes)


def focal(original, self, outputs, targets, indices, num_boxes):
    """loss_labels_focal of RT-DETRv2, D-FINE and DEIM: torchvision's Focal Loss."""
    logits = outputs["pred_logits" if "pred_logits" in outputs else "logits"]
    label = labels(self, logits, targets, indices, matched_queries(self, indices))
    loss = sigmoid_focal_loss(logits, label, self.alpha, self.gamma, reduction="sum")
    return {"loss_focal": loss / num_boxes}


def focal_logged(original, self, outputs, targets, indices, num_boxes, log=True):
    """RT-DETR's."""
    return focal(original, self, outputs, targets, indices, num_boxes)


def iou_aware(original, self, outputs, targets, indices, num_boxes):
    """loss_labels of transformers' LW-DETR and RF-DETR."""
    logits, target = _labels_and_iou(self, outputs, targets, indices)
    loss = ia_bce_loss(logits, target, alpha=self.focal_alpha, gamma=2, reduction="sum")
    return {"loss_ce": loss / num_boxes}
