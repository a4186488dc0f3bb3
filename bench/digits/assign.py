"""ATSS: which anchors answer for which object (Zhang et al. 2020), for one image at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.digits import boxes as box_ops


@dataclass
class Targets:
    labels: Tensor  # [S, A] int64; num_classes is background
    boxes: Tensor  # [S, A, 4] xyxy pixels; zeros at background


def assign(
    anchors: list[Tensor], boxes: Tensor, labels: Tensor, num_classes: int, topk: int = 9
) -> tuple[Tensor, Tensor]:
    """Anchors [A_l, 4] per level, objects [G, 4] and [G] -> labels [A] and box targets [A, 4].

    Candidates of an object are, on each level, the topk anchors nearest to its centre; positive are
    those with at least the candidates' mean + standard deviation of IoU and their centre inside it.
    An anchor claimed twice goes to the object it overlaps most.
    """
    every = torch.cat(anchors)
    assigned = labels.new_full((len(every),), num_classes)
    targets = boxes.new_zeros(len(every), 4)
    if len(boxes) == 0:
        return assigned, targets

    centers = (every[:, :2] + every[:, 2:]) / 2  # [A, 2]
    object_centers = (boxes[:, :2] + boxes[:, 2:]) / 2  # [G, 2]
    away = torch.cdist(centers, object_centers)  # [A, G]
    ious = box_ops.iou(every[:, None], boxes[None])  # [A, G]

    candidates, first = [], 0
    for level in anchors:
        nearest = away[first : first + len(level)].topk(min(topk, len(level)), 0, largest=False)
        candidates.append(nearest.indices + first)
        first += len(level)
    candidates = torch.cat(candidates)  # [k * levels, G]
    candidate_ious = ious.gather(0, candidates)
    threshold = candidate_ious.mean(0) + candidate_ious.std(0)

    sides = torch.cat((centers[:, None] - boxes[:, :2], boxes[:, 2:] - centers[:, None]), dim=-1)
    inside = sides.amin(dim=-1) > 0.01  # [A, G]
    positive = torch.zeros_like(inside).scatter_(0, candidates, candidate_ious >= threshold)
    claim, owner = ious.masked_fill(~(positive & inside), -1.0).max(dim=1)  # [A], [A]
    won = claim >= 0
    assigned[won] = labels[owner[won]]
    targets[won] = boxes[owner[won]]
    return assigned, targets


def assign_all(anchors: list[Tensor], scenes, num_classes: int) -> Targets:
    """Targets of fixed scenes, once before training: they depend on no prediction."""
    pairs = [
        assign(anchors, boxes, labels, num_classes)
        for boxes, labels in zip(scenes.boxes, scenes.labels, strict=True)
    ]
    labels, boxes = zip(*pairs, strict=True)
    return Targets(labels=torch.stack(labels), boxes=torch.stack(boxes))
