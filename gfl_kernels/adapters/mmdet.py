"""mmdetection: its loss functions, its Integral, and the whole of GFLHead's loss after targets have
been assigned."""

from __future__ import annotations

import sys
import types
import warnings
from importlib import import_module

import torch
import torch.distributed as dist

from .. import head
from . import losses
from .core import Report, check_version, fused

SUPPORTED = ("3.3.0",)
_REGISTRY = f"{__package__.rpartition('.')[0]}.registry"
# GFLHead's methods that the fused loss stands for or relies on: who overrides one keeps them all.
_PARTS = ("loss_by_feat", "loss_by_feat_single", "anchor_center")


def allow_mmcv_lite() -> None:
    """Let mmdetection be imported with mmcv-lite, which has no compiled operations.

    mmdetection looks every one of them up by name at import, although GFL heads, ATSS and these
    losses need none. A stand-in answers, and raises where one is called. Nothing happens if mmcv
    has its operations.
    """
    try:
        import_module("mmcv._ext")
    except ModuleNotFoundError:
        sys.modules["mmcv._ext"] = _CompiledOps("mmcv._ext")


class _CompiledOps(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args, **kwargs):
            raise RuntimeError(f"mmcv._ext.{name} is not built: mmcv-lite has no compiled ops")

        return missing


def plan(report: Report) -> None:
    check_version(report, "mmdet", *SUPPORTED)
    gfl_head = import_module("mmdet.models.dense_heads.gfl_head")
    gfocal_loss = import_module("mmdet.models.losses.gfocal_loss")
    varifocal_loss = import_module("mmdet.models.losses.varifocal_loss")

    report.replace(gfocal_loss, "quality_focal_loss", losses.quality)
    report.replace(gfocal_loss, "quality_focal_loss_tensor_target", losses.quality_dense)
    report.replace(gfocal_loss, "quality_focal_loss_with_prob", losses.quality_of_probabilities)
    report.replace(gfocal_loss, "distribution_focal_loss", losses.distribution)
    report.replace(varifocal_loss, "varifocal_loss", losses.varifocal)
    report.replace(gfl_head.Integral, "forward", losses.integral_module)
    report.replace(gfl_head.GFLHead, "loss_by_feat", loss_by_feat)
    for kind in _subclasses(gfl_head.GFLHead):
        own = [name for name in _PARTS if name in vars(kind)]
        if own and kind.__module__ != _REGISTRY:
            report.left[f"{kind.__module__}.{kind.__qualname__}"] = (
                f"it has its own {', '.join(own)}, which calls the functions above"
            )
    report.notes.append(
        "GFLHead.loss_by_feat runs as it was, with a warning, for heads with other losses than "
        "QualityFocalLoss, DistributionFocalLoss and IoU, GIoU, DIoU or CIoU with eps 1e-6"
    )


def _subclasses(kind: type) -> list[type]:
    found: list[type] = []
    child: type
    for child in kind.__subclasses__():
        found += [child, *_subclasses(child)]
    return found


def loss_by_feat(
    original,
    self,
    cls_scores,
    bbox_preds,
    batch_gt_instances,
    batch_img_metas,
    batch_gt_instances_ignore=None,
):
    """GFLHead.loss_by_feat, of mmdetection 3.3.0: the same anchors and targets, then gfl_loss."""
    why = why_not(self)
    if why is not None:
        warnings.warn(f"{type(self).__name__}.loss_by_feat is not fused: {why}", stacklevel=2)
        return original(
            self,
            cls_scores,
            bbox_preds,
            batch_gt_instances,
            batch_img_metas,
            batch_gt_instances_ignore,
        )
    device = cls_scores[0].device
    sizes = [level.shape[-2:] for level in cls_scores]
    anchors, flags = self.get_anchors(sizes, batch_img_metas, device=device)
    # Here and not from get_targets' anchors: there those outside an image are zeros.
    points = [self.anchor_center(level) for level in anchors[0]]
    _, labels, label_weights, box_targets, _, positives = self.get_targets(
        anchors,
        flags,
        batch_gt_instances,
        batch_img_metas,
        batch_gt_instances_ignore=batch_gt_instances_ignore,
    )
    if dist.is_available() and dist.is_initialized():
        reduce_mean = import_module("mmdet.utils").reduce_mean
        positives = reduce_mean(torch.tensor(positives, dtype=torch.float, device=device))
    out = head.gfl_loss(
        cls_scores,
        bbox_preds,
        points,
        labels,
        box_targets,
        label_weights=label_weights,
        strides=[stride[0] for stride in self.prior_generator.strides],
        reg_max=self.reg_max,
        beta=self.loss_cls.beta,
        iou=_box_loss(self.loss_bbox),
        loss_weights=[part.loss_weight for part in (self.loss_cls, self.loss_bbox, self.loss_dfl)],
        avg_factor=positives,
    )
    return {
        "loss_cls": list(out.loss_cls_levels.unbind()),
        "loss_bbox": list(out.loss_bbox_levels.unbind()),
        "loss_dfl": list(out.loss_dfl_levels.unbind()),
    }


def why_not(gfl_head) -> str | None:
    """Why the loss of this GFLHead is not one that gfl_loss computes; None if it is."""
    base = import_module("mmdet.models.dense_heads.gfl_head")
    gfocal_loss = import_module("mmdet.models.losses.gfocal_loss")
    kind = type(gfl_head)
    for name in _PARTS[1:]:
        if getattr(kind, name) is not getattr(base.GFLHead, name):
            return f"it has its own {name}"
    for name, expected in (
        ("loss_cls", gfocal_loss.QualityFocalLoss),
        ("loss_dfl", gfocal_loss.DistributionFocalLoss),
        ("integral", base.Integral),
    ):
        part = getattr(gfl_head, name)
        if not _is_plain(part, expected):
            return f"its {name} is a {type(part).__name__}"
        if name != "integral" and part.reduction != "mean":
            return f"the reduction of its {name} is {part.reduction!r}"
    if gfl_head.loss_cls.activated:
        return "its loss_cls takes probabilities"
    if _box_loss(gfl_head.loss_bbox) is None:
        return f"its loss_bbox is {gfl_head.loss_bbox}, or its eps, mode or reduction are not usual"
    if type(gfl_head.bbox_coder).__name__ != "DistancePointBBoxCoder":
        return f"its bbox_coder is a {type(gfl_head.bbox_coder).__name__}"
    if any(x != y for x, y in gfl_head.prior_generator.strides):
        return "its strides are not square"
    return None


def _is_plain(part, expected: type) -> bool:
    """Of this class, or of ours under its registry name, which computes the same."""
    return type(part) is expected or (
        type(part).__module__ == _REGISTRY and isinstance(part, expected)
    )


def _box_loss(part) -> str | None:
    """gfl_loss's name for mmdetection's box loss; None if it has none."""
    iou_loss = import_module("mmdet.models.losses.iou_loss")
    kinds = {
        iou_loss.IoULoss: "iou",
        iou_loss.GIoULoss: "giou",
        iou_loss.DIoULoss: "diou",
        iou_loss.CIoULoss: "ciou",
    }
    usual = part.eps == 1e-6 and part.reduction == "mean" and getattr(part, "mode", "log") == "log"
    return kinds.get(type(part)) if usual else None


def registered() -> dict[str, type]:
    """What configs get for ``type='gfl_kernels.QualityFocalLoss'`` and the like: mmdetection's
    classes with our losses, whether or not mmdetection is accelerated."""
    gfocal_loss = import_module("mmdet.models.losses.gfocal_loss")
    varifocal_loss = import_module("mmdet.models.losses.varifocal_loss")
    gfl_head = import_module("mmdet.models.dense_heads.gfl_head")
    table = {}
    for base, name, function in (
        (gfocal_loss.QualityFocalLoss, "forward", losses.quality_module),
        (gfocal_loss.DistributionFocalLoss, "forward", losses.distribution_module),
        (varifocal_loss.VarifocalLoss, "forward", losses.varifocal_module),
        (gfl_head.GFLHead, "loss_by_feat", loss_by_feat),
    ):
        members = {name: fused(function, getattr(base, name)), "__doc__": base.__doc__}
        table[base.__name__] = type(base.__name__, (base,), {**members, "__module__": _REGISTRY})
    return table
