"""What each code base of the family does differently: small records, one per host.

    from gfl_kernels import presets

    loss = presets.yolov6.classification(scores, (label, iou), reduction="sum")
    loss = loss / presets.yolov6.divisor(iou.sum())

The functions are the public ones; a preset fills in the arguments with which they give the host's
numbers. What a host leaves to its user's configuration is here as its defaults have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

import gfl_kernels

__all__ = [
    "Preset",
    "deim",
    "dfine",
    "gfocalv2",
    "mmdet",
    "nanodet",
    "ppyoloe",
    "rfdetr",
    "rtdetr",
    "super_gradients",
    "ultralytics",
    "yolov6",
]


@dataclass(frozen=True)
class Preset:
    """A host's losses.

    source: the upstream file.
    loss, options: the classification loss, a function of gfl_kernels, and its arguments. Whether
    the gradient goes through its weight is among them, or follows from the function.
    bins: K of a side's distribution; None: the host has none.
    margin: targets of the Distribution Focal Loss end at K - 1 - margin.
    mean_of_sides: it is the mean over a box's four sides, not their sum.
    explicit_bins: its targets are (left bin, left weight, right weight).
    iou, iou_eps: the box loss.
    loss_weights: of the classification, box and distribution losses.
    sum_of: what the sums are divided by: "positives" (the classification; the other two by the sum
    of weights), "scores" (of the target scores) or "boxes" (of the ground truth).
    floor: the least divisor; None: there is none, and an empty batch divides by 0.
    divisor_eps: added to it.
    """

    source: str
    loss: str
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    bins: int | None = None
    margin: float = 0.0
    mean_of_sides: bool = False
    explicit_bins: bool = False
    iou: str | None = None
    iou_eps: float | None = None
    loss_weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    sum_of: str = "scores"
    floor: float | None = 1.0
    divisor_eps: float = 0.0

    def classification(self, pred: Tensor, target: Any, **arguments: Any) -> Tensor:
        """The host's classification loss; arguments: weight, avg_factor, reduction, class_dim."""
        return getattr(gfl_kernels, self.loss)(pred, target, **{**self.options, **arguments})

    def distribution(self, pred: Tensor, target: Any, **arguments: Any) -> Tensor:
        """The host's loss of box sides [..., 4, K] against targets [..., 4] in bins from the first
        on; one value a box [...] for "none" where the host takes the mean of a box's sides, else
        one a side. Arguments as :func:`gfl_kernels.distribution_focal_loss`."""
        if self.bins is None:
            raise ValueError("distribution: this host has no distributions")
        if not self.explicit_bins:
            target = target.clamp(0, self.bins - 1 - self.margin)
        if not self.mean_of_sides:
            return gfl_kernels.distribution_focal_loss(pred, target, **arguments)
        weight, avg_factor = arguments.pop("weight", None), arguments.pop("avg_factor", None)
        if weight is not None:
            weight = weight[..., None].expand(target.shape)
        if arguments.get("reduction") == "none":
            loss = gfl_kernels.distribution_focal_loss(pred, target, weight=weight, **arguments)
            return loss.mean(-1)
        if avg_factor is None and arguments.get("reduction", "mean") == "sum":
            return gfl_kernels.distribution_focal_loss(pred, target, weight=weight, **arguments) / 4
        factor = None if avg_factor is None else 4 * avg_factor
        return gfl_kernels.distribution_focal_loss(
            pred, target, weight=weight, avg_factor=factor, **arguments
        )

    def divisor(self, total: Tensor | float) -> Tensor | float:
        """What the host divides its sums by, of the total that ``sum_of`` names."""
        if self.floor is not None:
            total = (
                total.clamp(min=self.floor) if isinstance(total, Tensor) else max(total, self.floor)
            )
        return total + self.divisor_eps


def _preset(options: dict[str, Any] | None = None, **fields: Any) -> Preset:
    return Preset(options=MappingProxyType(options or {}), **fields)


_MMDET_EPS = torch.finfo(torch.float32).eps

mmdet = _preset(
    source="mmdet/models/dense_heads/gfl_head.py, losses/gfocal_loss.py, losses/utils.py (3.3.0)",
    loss="quality_focal_loss",
    options={"beta": 2.0},
    bins=17,
    margin=0.1,
    iou="giou",
    iou_eps=1e-6,
    loss_weights=(1.0, 2.0, 0.25),
    sum_of="positives",
    divisor_eps=_MMDET_EPS,
)
"""mmdetection 3.3.0's GFLHead, LDHead and the like."""

nanodet = _preset(
    source="nanodet/model/head/gfl_head.py, nanodet/model/loss/gfocal_loss.py, loss/utils.py",
    loss="quality_focal_loss",
    options={"beta": 2.0},
    bins=8,
    margin=0.1,
    iou="giou",
    iou_eps=1e-6,
    loss_weights=(1.0, 2.0, 0.25),
    sum_of="positives",
)
"""NanoDet and NanoDet-Plus: as mmdetection, with 8 bins and no eps in the divisor."""

gfocalv2 = _preset(
    source="mmdet/models/losses/gfocal_loss.py, dense_heads/gfocal_head.py (implus/GFocalV2)",
    loss="quality_focal_loss",
    options={"beta": 2.0, "activated": True},
    bins=17,
    margin=0.1,
    iou="giou",
    iou_eps=1e-6,
    loss_weights=(1.0, 2.0, 0.25),
    sum_of="positives",
    floor=None,
)
"""GFLv2: its scores are products of two sigmoids, so its loss takes probabilities."""

ultralytics = _preset(
    source="ultralytics/utils/loss.py v8DetectionLoss, BboxLoss, DFLoss (8.4)",
    loss="quality_focal_loss",
    options={"beta": 0.0},
    bins=16,
    margin=0.01,
    mean_of_sides=True,
    iou="ciou",
    iou_eps=1e-7,
    loss_weights=(0.5, 7.5, 1.5),
)
"""YOLOv8 to YOLO12 (YOLO26 has no distributions): binary cross entropy, which is QFL of beta 0."""

yolov6 = _preset(
    source="yolov6/models/losses/loss.py (meituan/YOLOv6)",
    loss="varifocal_loss",
    options={"alpha": 0.75, "gamma": 2.0, "activated": True},
    bins=17,
    margin=0.01,
    mean_of_sides=True,
    iou="giou",
    iou_eps=1e-10,
    loss_weights=(1.0, 2.5, 0.5),
)
"""YOLOv6 and Gold-YOLO: probabilities; the label's class is positive whatever its score."""

super_gradients = _preset(
    source="super_gradients/training/losses/ppyolo_loss.py PPYoloELoss",
    loss="varifocal_loss",
    options={"alpha": 0.75, "gamma": 2.0},
    bins=17,
    margin=0.01,
    mean_of_sides=True,
    iou="giou",
    iou_eps=1e-10,
    loss_weights=(1.0, 2.5, 0.5),
)
"""YOLO-NAS and PP-YOLOE of super-gradients: logits; the divisor is averaged over processes."""

ppyoloe = _preset(
    source="ppdet/modeling/heads/ppyoloe_head.py (PaddleDetection)",
    loss="varifocal_loss",
    options={"alpha": 0.75, "gamma": 2.0, "activated": True},
    bins=17,
    margin=0.01,
    mean_of_sides=True,
    iou="giou",
    iou_eps=1e-10,
    loss_weights=(1.0, 2.5, 0.5),
)
"""PP-YOLOE(+). With a reg_range that begins below 0 (PP-YOLOE-SOD) targets count from its begin."""

rtdetr = _preset(
    source="rtdetr_pytorch/src/zoo/rtdetr/rtdetr_criterion.py (lyuwenyu/RT-DETR)",
    loss="varifocal_loss",
    options={"alpha": 0.75, "gamma": 2.0, "detach_weight": True},
    loss_weights=(1.0, 5.0, 2.0),
    sum_of="boxes",
)
"""RT-DETR and RT-DETRv2 in PyTorch: no gradient through the weight. loss_weights: of the
classification, the boxes' L1 distance and GIoU."""

dfine = _preset(
    source="src/zoo/dfine/dfine_criterion.py, dfine_utils.py (Peterande/D-FINE)",
    loss="varifocal_loss",
    options={"alpha": 0.2, "gamma": 2.0, "detach_weight": True},
    bins=33,
    explicit_bins=True,
    sum_of="boxes",
)
"""D-FINE: bins that are not evenly spaced, with explicit weights; as RT-DETR otherwise."""

deim = _preset(
    source="engine/deim/deim_criterion.py (ShihuaHuang95/DEIM)",
    loss="matchability_aware_loss",
    options={"gamma": 1.5},
    bins=33,
    explicit_bins=True,
    sum_of="boxes",
)
"""DEIM on D-FINE."""

rfdetr = _preset(
    source="rfdetr/models/lwdetr.py SetCriterion.loss_labels, ia_bce_loss (roboflow/rf-detr)",
    loss="ia_bce_loss",
    options={"alpha": 0.25, "gamma": 2.0},
    sum_of="boxes",
)
"""RF-DETR: IoU-aware binary cross entropy."""
