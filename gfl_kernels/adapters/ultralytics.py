"""Ultralytics (AGPL-3.0): patched at run time. Nothing here is taken from its code; where one of
its methods is replaced as a whole, its own code still runs for what is not a loss."""

from __future__ import annotations

import inspect
import warnings
from importlib import import_module

import torch
from torch import nn

from .. import head
from ..functional import distribution_focal_loss, integral, varifocal_loss
from .core import Report, check_version, qualified

SUPPORTED = "8.4."


def plan(report: Report) -> None:
    check_version(report, "ultralytics", SUPPORTED)
    block = import_module("ultralytics.nn.modules.block")
    loss = import_module("ultralytics.utils.loss")

    report.replace(block.DFL, "forward", dfl_layer)
    report.replace(loss.DFLoss, "__call__", distribution)
    report.replace(loss.BboxLoss, "forward", box_loss)
    report.replace(loss.VarifocalLoss, "forward", varifocal)
    report.replace(loss.v8DetectionLoss, "bbox_decode", decode)
    report.replace(
        loss.v8DetectionLoss,
        "get_assigned_targets_and_loss",
        detection_loss_for(loss.v8DetectionLoss),
    )
    report.left[qualified(loss.v8OBBLoss, "loss")] = (
        "its boxes are rotated; its distribution loss is DFLoss"
    )
    report.notes.append(
        "v8DetectionLoss's classification runs as it was where there are class weights; all of it, "
        "with a warning, where reg_max is 1 (YOLO26: no distributions) or bce, bbox_loss or "
        "bbox_decode have been exchanged"
    )


def dfl_layer(original, self, x):
    """DFL.forward: [B, 4 K, A] -> [B, 4, A], in x's dtype; computed in float32."""
    batch, _, anchors = x.shape
    bins = self.conv.weight.view(-1)
    return integral(x.view(batch, 4, self.c1, anchors), bins=bins, bin_dim=2).to(x.dtype)


def distribution(original, self, pred_dist, target):
    """DFLoss.__call__: [N * 4, K] and [N, 4] -> [N, 1], the mean over the sides."""
    target = target.clamp(0, self.reg_max - 1 - 0.01)
    loss = distribution_focal_loss(pred_dist, target.view(-1), reduction="none")
    return loss.view(target.shape).mean(-1, keepdim=True)


def varifocal(original, self, pred_score, gt_score, label):
    """VarifocalLoss.forward: label is one-hot or 0, [B, A, C]; its class is positive whatever its
    score. The mean over A of the sums over C, summed over B."""
    inside, index = label.max(dim=-1)
    score = gt_score.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    target = index.masked_fill(inside <= 0, -1), score
    loss = varifocal_loss(pred_score, target, alpha=self.alpha, gamma=self.gamma, reduction="sum")
    return loss / pred_score.shape[1]


def decode(original, self, anchor_points, pred_dist):
    """v8DetectionLoss.bbox_decode: [B, A, 4 K] -> boxes [B, A, 4], float32 for half logits."""
    if not self.use_dfl:
        return original(self, anchor_points, pred_dist)
    batch, anchors, channels = pred_dist.shape
    rows = pred_dist.view(batch, anchors, 4, channels // 4)
    tal = import_module("ultralytics.utils.tal")
    boxes = tal.dist2bbox(integral(rows, bins=self.proj), anchor_points, xywh=False)
    boxes._gfl_kernels_decoded = pred_dist  # see box_loss
    return boxes


def box_loss(
    original,
    self,
    pred_dist,
    pred_bboxes,
    anchor_points,
    target_bboxes,
    target_scores,
    target_scores_sum,
    fg_mask,
    imgsz,
    stride,
):
    """BboxLoss.forward, where pred_bboxes are known to be what `decode` made of pred_dist."""
    if self.dfl_loss is None or getattr(pred_bboxes, "_gfl_kernels_decoded", None) is not pred_dist:
        return original(
            self,
            pred_dist,
            pred_bboxes,
            anchor_points,
            target_bboxes,
            target_scores,
            target_scores_sum,
            fg_mask,
            imgsz,
            stride,
        )
    # Only the weights of the boxes are asked of the scores: one class will do, whose loss is not
    # used.
    weight = target_scores.sum(-1, keepdim=True)
    out = head.task_aligned_loss(
        pred_dist.new_zeros(()).expand_as(weight),
        pred_dist,
        anchor_points,
        weight,
        target_bboxes,
        fg_mask,
        loss_weights=(0.0, 1.0, 1.0),
        avg_factor=target_scores_sum,
    )
    return out.loss_bbox, out.loss_dfl


class _Assignment:
    """Stands for a v8DetectionLoss while its own code assigns targets, and keeps them: everything
    is the criterion's, but the losses cost nothing."""

    class_weights = None
    targets = divisor = None

    def __init__(self, criterion):
        self._criterion = criterion

    def __getattr__(self, name):
        return getattr(self._criterion, name)

    def bce(self, pred, target):
        return pred.new_zeros(())

    def bbox_loss(
        self, _dist, _boxes, points, target_boxes, target_scores, divisor, foreground, *_others
    ):
        self.targets = points, target_scores, target_boxes, foreground
        self.divisor = divisor  # of this process alone, as Ultralytics trains
        zero = points.new_zeros(())
        return zero, zero


def detection_loss(original, self, preds, batch, **assign_kwargs):
    """v8DetectionLoss.get_assigned_targets_and_loss: its own code up to the targets, then
    task_aligned_loss on the logits as the head leaves them, [B, channels, A]."""
    why = why_not(self)
    if why is not None:
        warnings.warn(f"{type(self).__name__} is not fused: {why}", stacklevel=2)
    if why is not None or getattr(self, "class_weights", None) is not None:
        return original(self, preds, batch, **assign_kwargs)
    assignment = _Assignment(self)
    with torch.no_grad():
        assigned, loss, items = original(assignment, preds, batch, **assign_kwargs)
    if assignment.targets is None:  # older 8.4 have no box loss where there is no foreground
        return original(self, preds, batch, **assign_kwargs)
    # The host multiplies its losses by the batch. With that in the weights the upstream gradient of
    # ours is 1, and the gradient that forward has left (on a CPU) is used as it is.
    batch_size = preds["scores"].shape[0]
    out = head.task_aligned_loss(
        preds["scores"],
        preds["boxes"],
        *assignment.targets,
        channel_dim=1,
        loss_weights=[gain * batch_size for gain in (self.hyp.cls, self.hyp.box, self.hyp.dfl)],
        avg_factor=assignment.divisor,
    )
    loss = torch.stack([out.loss_bbox, out.loss_cls, out.loss_dfl]).to(loss.dtype) / batch_size
    logged = loss.detach()
    if isinstance(items, dict):
        logged = dict(zip(items, logged, strict=True))
    return assigned, loss, logged


def detection_loss_of_batch(original, self, preds, batch):
    """The same, before assigners took options."""
    return detection_loss(original, self, preds, batch)


def detection_loss_for(kind: type):
    parameters = inspect.signature(kind.get_assigned_targets_and_loss).parameters
    return detection_loss if "assign_kwargs" in parameters else detection_loss_of_batch


def why_not(criterion) -> str | None:
    """Why this v8DetectionLoss is not what task_aligned_loss computes; None if it is."""
    loss = import_module("ultralytics.utils.loss")
    bce, kind = criterion.bce, type(criterion)
    if not criterion.use_dfl:
        return "its reg_max is 1: it has no distributions"
    if type(bce) is not nn.BCEWithLogitsLoss or (bce.weight, bce.pos_weight) != (None, None):
        return f"its bce is {bce}"
    if type(criterion.bbox_loss) is not loss.BboxLoss:
        return f"its bbox_loss is a {type(criterion.bbox_loss).__name__}"
    if kind.bbox_decode is not loss.v8DetectionLoss.bbox_decode:
        return "it has its own bbox_decode"
    return None
