"""A small convolutional detector with a GFL head, written the way existing heads are.

Feature maps [B, C, H, W] on three levels; class logits [B, num_classes, H, W] and box logits
[B, 4 * (reg_max + 1), H, W] (side * (reg_max + 1) + bin); an Integral layer; loss objects with
mmdetection's call signatures, called level by level, with its normalisers and loss weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.digits import boxes as box_ops

STRIDES = (4, 8, 16)
ANCHOR_SCALE = 5.0
REG_MAX = 16
WIDTH = 48


@dataclass
class LossObjects:
    """What differs between the trainings: classes with mmdetection's constructors."""

    quality: type[nn.Module]
    distribution: type[nn.Module]
    integral: type[nn.Module]


class GIoULoss(nn.Module):
    """1 - GIoU of decoded boxes [P, 4] against targets: weighted sum over avg_factor."""

    def __init__(self, loss_weight: float = 1.0):
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, pred: Tensor, target: Tensor, weight: Tensor, avg_factor: float) -> Tensor:
        loss = (1 - box_ops.giou(pred, target)) * weight
        return self.loss_weight * loss.sum() / avg_factor


class Scale(nn.Module):
    """A learnable factor, one per level, since the levels share the head."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def _block(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.SiLU(inplace=True),
    )


class Pyramid(nn.Module):
    """Image [B, 1, S, S] -> three maps [B, WIDTH, S / stride, S / stride], coarse added to fine."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.stem = nn.Sequential(_block(1, 16, 2), _block(16, 32, 2))
        self.stages = nn.ModuleList(
            [
                nn.Sequential(_block(32, 48), _block(48, 48)),
                nn.Sequential(_block(48, 64, 2), _block(64, 64)),
                nn.Sequential(_block(64, 96, 2), _block(96, 96)),
            ]
        )
        self.lateral = nn.ModuleList([nn.Conv2d(c, width, 1) for c in (48, 64, 96)])

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        maps = []
        for stage, lateral in zip(self.stages, self.lateral, strict=True):
            x = stage(x)
            maps.append(lateral(x))
        for fine, coarse in ((1, 2), (0, 1)):
            maps[fine] = maps[fine] + nn.functional.interpolate(maps[coarse], scale_factor=2.0)
        return maps


class GFLHead(nn.Module):
    """Shared convolutions, a class and a box output per level, and the losses."""

    def __init__(
        self, losses: LossObjects, image_size: int, num_classes: int, reg_max: int = REG_MAX
    ):
        super().__init__()
        self.num_classes, self.reg_max, self.strides = num_classes, reg_max, STRIDES
        self.tower_cls = self._tower()
        self.tower_reg = self._tower()
        self.out_cls = nn.Conv2d(WIDTH, num_classes, 3, padding=1)
        self.out_reg = nn.Conv2d(WIDTH, 4 * (reg_max + 1), 3, padding=1)
        self.scales = nn.ModuleList([Scale() for _ in STRIDES])
        for layer in (self.out_cls, self.out_reg):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        # sigmoid(-4.6) = 0.01: nearly every anchor is background, and says so from the start
        nn.init.constant_(self.out_cls.bias, -4.6)

        self.integral = losses.integral(reg_max)
        self.loss_cls = losses.quality(use_sigmoid=True, beta=2.0, loss_weight=1.0)
        self.loss_dfl = losses.distribution(loss_weight=0.25)
        self.loss_bbox = GIoULoss(loss_weight=2.0)
        self.centers = [box_ops.anchor_centers(image_size, stride) for stride in STRIDES]

    @staticmethod
    def _tower() -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False),
            nn.GroupNorm(8, WIDTH),
            nn.SiLU(inplace=True),
        )

    def anchors(self) -> list[Tensor]:
        pairs = zip(self.centers, STRIDES, strict=True)
        return [box_ops.anchor_boxes(centers, stride, ANCHOR_SCALE) for centers, stride in pairs]

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        cls_scores = [self.out_cls(self.tower_cls(x)) for x in maps]
        bbox_preds = [
            scale(self.out_reg(self.tower_reg(x)))
            for x, scale in zip(maps, self.scales, strict=True)
        ]
        return cls_scores, bbox_preds

    def loss_single_level(
        self,
        cls_score: Tensor,
        bbox_pred: Tensor,
        labels: Tensor,
        box_targets: Tensor,
        centers: Tensor,
        stride: int,
        avg_factor: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[B, C, H, W], [B, 4K, H, W], [B, HW], [B, HW, 4] -> three losses, sum of box weights."""
        batch = cls_score.shape[0]
        cls_score = cls_score.permute(0, 2, 3, 1).reshape(-1, self.num_classes)
        bbox_pred = bbox_pred.permute(0, 2, 3, 1).reshape(-1, 4 * (self.reg_max + 1))
        labels = labels.reshape(-1)
        score = cls_score.new_zeros(labels.shape)
        positive = (labels < self.num_classes).nonzero().squeeze(1)

        if len(positive) > 0:
            points = centers.repeat(batch, 1)[positive] / stride
            target = box_targets.reshape(-1, 4)[positive] / stride
            weight = cls_score.detach().sigmoid().max(dim=1)[0][positive]
            positive_pred = bbox_pred[positive]
            decoded = box_ops.distances_to_box(points, self.integral(positive_pred))
            score[positive] = box_ops.iou(decoded.detach(), target)
            # 0.1 below the last bin, as mmdetection clamps: the right neighbour must exist
            sides = box_ops.box_to_distances(points, target, self.reg_max - 0.1)
            loss_bbox = self.loss_bbox(decoded, target, weight=weight, avg_factor=1.0)
            loss_dfl = self.loss_dfl(
                positive_pred.reshape(-1, self.reg_max + 1),
                sides.reshape(-1),
                weight=weight[:, None].expand(-1, 4).reshape(-1),
                avg_factor=4.0,
            )
        else:
            loss_bbox = loss_dfl = bbox_pred.sum() * 0
            weight = bbox_pred.new_zeros(1)
        loss_cls = self.loss_cls(cls_score, (labels, score), avg_factor=avg_factor)
        return loss_cls, loss_bbox, loss_dfl, weight.sum()

    def loss(
        self, cls_scores: list[Tensor], bbox_preds: list[Tensor], labels: Tensor, boxes: Tensor
    ) -> dict[str, Tensor]:
        """Targets [B, A] and [B, A, 4] over all levels -> the three losses, weighted."""
        sizes = [len(centers) for centers in self.centers]
        positives = max(int((labels < self.num_classes).sum()), 1)
        levels = [
            self.loss_single_level(*level, avg_factor=float(positives))
            for level in zip(
                cls_scores,
                bbox_preds,
                labels.split(sizes, dim=1),
                boxes.split(sizes, dim=1),
                self.centers,
                STRIDES,
                strict=True,
            )
        ]
        loss_cls, loss_bbox, loss_dfl, weights = zip(*levels, strict=True)
        box_factor = torch.stack(weights).sum().clamp(min=1).item()
        return {
            "loss_cls": sum(loss_cls),
            "loss_bbox": sum(loss_bbox) / box_factor,
            "loss_dfl": sum(loss_dfl) / box_factor,
        }


class Detector(nn.Module):
    def __init__(self, losses: LossObjects, image_size: int, num_classes: int):
        super().__init__()
        self.pyramid = Pyramid()
        self.head = GFLHead(losses, image_size, num_classes)

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return self.head(self.pyramid(images))
