"""Boxes as xyxy pixels: anchors of a pyramid, IoU, GIoU and distances, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def anchor_centers(image_size: int, stride: int) -> Tensor:
    """Centres of the cells of one level, row by row: [H * W, 2] as (x, y)."""
    along = (torch.arange(image_size // stride, dtype=torch.float32) + 0.5) * stride
    y, x = torch.meshgrid(along, along, indexing="ij")
    return torch.stack((x.flatten(), y.flatten()), dim=1)


def anchor_boxes(centers: Tensor, stride: int, scale: float) -> Tensor:
    """One square anchor of side scale * stride round each centre: [A, 2] -> [A, 4]."""
    half = scale * stride / 2
    return torch.cat((centers - half, centers + half), dim=1)


def area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]).clamp(min=0) * (boxes[..., 3] - boxes[..., 1]).clamp(
        min=0
    )


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Area of the intersection; the leading dimensions broadcast."""
    corner_low = torch.maximum(a[..., :2], b[..., :2])
    corner_high = torch.minimum(a[..., 2:], b[..., 2:])
    return (corner_high - corner_low).clamp(min=0).prod(dim=-1)


def iou(a: Tensor, b: Tensor, eps: float = 1e-6) -> Tensor:
    """Intersection over union; broadcasts, so [A, 1, 4] against [1, G, 4] gives [A, G]."""
    shared = overlap(a, b)
    return shared / (area(a) + area(b) - shared).clamp(min=eps)


def giou(a: Tensor, b: Tensor, eps: float = 1e-7) -> Tensor:
    """IoU less the part of the enclosing box that neither covers, row by row: [P, 4] -> [P]."""
    shared = overlap(a, b)
    union = (area(a) + area(b) - shared).clamp(min=eps)
    around = torch.cat(
        (torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])), dim=-1
    )
    hull = area(around).clamp(min=eps)
    return shared / union - (hull - union) / hull


def distances_to_box(points: Tensor, distances: Tensor) -> Tensor:
    """Points [P, 2] and distances (left, top, right, bottom) [P, 4] -> boxes [P, 4]."""
    return torch.cat((points - distances[..., :2], points + distances[..., 2:]), dim=-1)


def box_to_distances(points: Tensor, boxes: Tensor, limit: float) -> Tensor:
    """The inverse of distances_to_box, clamped into [0, limit]."""
    return torch.cat((points - boxes[..., :2], boxes[..., 2:] - points), dim=-1).clamp(0, limit)
