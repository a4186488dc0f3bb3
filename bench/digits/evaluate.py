"""Detections on scenes and their COCO average precision, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchvision.ops import batched_nms

from bench.digits import boxes as box_ops
from bench.digits.detector import Detector
from bench.digits.scenes import IMAGE_SIZE, NUM_CLASSES, Scenes

SCORE_THRESHOLD = 0.05
CANDIDATES = 200
NMS_IOU = 0.6
KEPT = 50


@dataclass
class Detections:
    """Of one scene, best first."""

    boxes: Tensor  # [D, 4] xyxy pixels
    scores: Tensor  # [D]
    labels: Tensor  # [D]
    sides: Tensor  # [D, 4, K] distribution of each side over its bins (left, top, right, bottom)
    points: Tensor  # [D, 2] the anchor centre the sides are measured from
    strides: Tensor  # [D] pixels a bin


@torch.no_grad()
def detect(model: Detector, images: Tensor, batch_size: int = 50) -> list[Detections]:
    model.eval()
    found = []
    for chunk in images.split(batch_size):
        cls_scores, bbox_preds = model(chunk)
        for i in range(len(chunk)):
            found.append(_of_one(model, [x[i] for x in cls_scores], [x[i] for x in bbox_preds]))
    model.train()
    return found


def _of_one(model: Detector, cls_scores: list[Tensor], bbox_preds: list[Tensor]) -> Detections:
    head = model.head
    scores = torch.cat([x.permute(1, 2, 0).reshape(-1, head.num_classes) for x in cls_scores])
    rows = torch.cat([x.permute(1, 2, 0).reshape(-1, 4 * (head.reg_max + 1)) for x in bbox_preds])
    points = torch.cat(head.centers)
    strides = torch.cat(
        [torch.full((len(c),), float(s)) for c, s in zip(head.centers, head.strides, strict=True)]
    )
    # One candidate per anchor and class, as dense detectors do
    best, flat = scores.sigmoid().flatten().topk(CANDIDATES)
    best, flat = best[best > SCORE_THRESHOLD], flat[best > SCORE_THRESHOLD]
    anchor, labels = flat // head.num_classes, flat % head.num_classes
    distances = head.integral(rows[anchor]) * strides[anchor, None]
    boxes = box_ops.distances_to_box(points[anchor], distances).clamp(0, IMAGE_SIZE)
    kept = batched_nms(boxes, best, labels, NMS_IOU)[:KEPT]
    anchor = anchor[kept]
    return Detections(
        boxes=boxes[kept],
        scores=best[kept],
        labels=labels[kept],
        sides=rows[anchor].view(-1, 4, head.reg_max + 1).softmax(dim=-1),
        points=points[anchor],
        strides=strides[anchor],
    )


def average_precision(found: list[Detections], scenes: Scenes) -> dict[str, float]:
    """COCO's AP (IoU 0.50:0.95), AP50 and AP75 over all classes."""
    truth, results = _as_coco(scenes), _results(found)
    if len(results) == 0:
        return {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(evaluation.stats[i]) for i, name in enumerate(("AP", "AP50", "AP75"))}


def _as_coco(scenes: Scenes) -> COCO:
    annotations = []
    for image, (boxes, labels) in enumerate(zip(scenes.boxes, scenes.labels, strict=True)):
        for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": label,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [
            {"id": i, "width": IMAGE_SIZE, "height": IMAGE_SIZE} for i in range(len(scenes))
        ],
        "categories": [{"id": c, "name": str(c)} for c in range(NUM_CLASSES)],
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def _results(found: list[Detections]) -> np.ndarray:
    """Rows (image, x, y, width, height, score, class), as COCO.loadRes takes them."""
    rows = []
    for image, d in enumerate(found):
        wide_high = d.boxes[:, 2:] - d.boxes[:, :2]
        first = torch.full((len(d.boxes), 1), float(image))
        rows.append(
            torch.cat(
                (first, d.boxes[:, :2], wide_high, d.scores[:, None], d.labels[:, None].float()), 1
            )
        )
    return torch.cat(rows).double().numpy()
