"""transformers (Apache-2.0): the criteria of RT-DETR, D-FINE, DEIMv2, LW-DETR and RF-DETR, which
are made anew for every batch, and the Focal Loss of Deformable DETR and its kin."""

from __future__ import annotations

from importlib import import_module

import torch

from ..functional import localization_distillation_loss, sigmoid_focal_loss
from . import detr, losses
from .core import Report, check_version, qualified

SUPPORTED = "5."


def plan(report: Report) -> None:
    check_version(report, "transformers", SUPPORTED)
    rt_detr = import_module("transformers.loss.loss_rt_detr")
    d_fine = import_module("transformers.loss.loss_d_fine")

    report.replace(rt_detr.RTDetrLoss, "loss_labels_vfl", detr.varifocal_logged)
    report.left[qualified(rt_detr.RTDetrLoss, "loss_labels_focal")] = (
        "it passes alpha as the number of boxes, and raises"
    )
    report.replace(d_fine.DFineLoss, "unimodal_distribution_focal_loss", losses.fine_grained)
    report.replace(d_fine.DFineLoss, "loss_local", local)
    for module, kind, name, function in (
        ("loss.loss_deimv2", "Deimv2Loss", "loss_labels_mal", detr.matchability_of_boxes),
        ("loss.loss_lw_detr", "LwDetrImageLoss", "loss_labels", detr.iou_aware),
        ("models.d_fine.modeling_d_fine", "DFineIntegral", "forward", integral),
        ("models.deimv2.modeling_deimv2", "Deimv2Integral", "forward", integral),
    ):
        path = f"transformers.{module}"
        try:
            owner = getattr(import_module(path), kind)
        except ModuleNotFoundError as error:
            if not f"{path}.".startswith(f"{error.name}."):
                raise
            report.left[f"{path}.{kind}.{name}"] = "there is none"
        else:
            report.replace(owner, name, function)
    for name in ("for_object_detection", "deformable_detr", "rt_detr", "lw_detr"):
        module = import_module(f"transformers.loss.loss_{name}")
        report.replace(module, "sigmoid_focal_loss", focal)


def integral(original, self, pred_corners, project):
    """DFineIntegral.forward: [B, Q, 4 (max_num_bins + 1)] -> [B, Q, 4]."""
    return losses.integral_of_bins(pred_corners, self.max_num_bins + 1, project)


def focal(original, inputs, targets, num_boxes, alpha=0.25, gamma=2):
    """DETR's sigmoid_focal_loss: a mean over dimension 1, a sum over the others."""
    loss = sigmoid_focal_loss(inputs, targets.to(inputs.dtype), alpha, gamma, reduction="sum")
    return loss / inputs.shape[1] / num_boxes


def local(original, self, outputs, targets, indices, num_boxes, T=5):
    """DFineLoss.loss_local: FGL of the matched queries, and DDF of all of them."""
    if "pred_corners" not in outputs:
        return {}
    bins = self.max_num_bins + 1
    queries = detr.matched_queries(self, indices)
    iou = detr.matched_iou(outputs, targets, indices, queries)
    with torch.no_grad():
        self.fgl_targets = import_module("transformers.loss.loss_d_fine").bbox2distance(
            outputs["ref_points"][queries].detach(),
            detr.corners(detr.matched_targets(targets, indices, "boxes")),
            self.max_num_bins,
            self.reg_scale,
            self.up,
        )
    left, weight_right, weight_left = self.fgl_targets
    pred = outputs["pred_corners"]
    fgl = self.unimodal_distribution_focal_loss(
        pred[queries].reshape(-1, bins),
        left,
        weight_right,
        weight_left,
        iou.repeat_interleave(4),
        avg_factor=num_boxes,
    )

    # The mean over the matched sides and that over the others, weighed by the roots of their
    # numbers, are a sum with one weight per query. Where the teacher is the student it is 0, which
    # the host finds out by comparing them.
    weight = outputs["teacher_logits"].detach().sigmoid().amax(dim=-1).to(iou.dtype)
    weight[queries] = iou
    matched = torch.zeros_like(weight, dtype=torch.bool)
    matched[queries] = True
    positives = 4 * matched.sum()
    counts = torch.stack([positives, 4 * matched.numel() - positives])
    roots = (counts / len(pred)) ** 0.5
    self.num_pos, self.num_neg = roots.unbind()
    share = roots / roots.sum() / counts.clamp(min=1)
    weight = weight * torch.where(matched, *share.to(weight.dtype).unbind())
    ddf = localization_distillation_loss(
        *(x.unflatten(-1, (4, bins)) for x in (pred, outputs["teacher_corners"])),
        temperature=T,
        bin_reduction="sum",
        weight=weight.unsqueeze(-1).expand(*weight.shape, 4),
        reduction="sum",
    )
    return {"loss_fgl": fgl, "loss_ddf": ddf}
