"""Trainings of real hosts' heads on the digit scenes: mmdetection's GFLHead with its ATSS assigner
on bench's own pyramid, and Ultralytics' YOLOv8n. Their code assigns the targets; the clock is on
that.
"""

from __future__ import annotations

import types
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import gfl_kernels
from bench.digits import boxes as box_ops
from bench.digits.detector import ANCHOR_SCALE, REG_MAX, STRIDES, WIDTH, Pyramid
from bench.digits.scenes import IMAGE_SIZE, NUM_CLASSES
from bench.digits.train import EPSILON, Training
from gfl_kernels.adapters import accelerate
from gfl_kernels.adapters.mmdet import allow_mmcv_lite


@dataclass
class HostTraining(Training):
    """Under accelerate() or not; the patch is put in and taken out at every step."""

    accelerated: bool = field(kw_only=True)
    clocked = "assignment"
    host = ""
    terms = ""

    def step(self, scene_numbers: Tensor) -> float:
        with accelerate(self.host) if self.accelerated else nullcontext():
            return super().step(scene_numbers)

    def on_the_clock(self, function):
        def clocked(*args, **kwargs):
            self.clock.start()
            result = function(*args, **kwargs)
            self.clock.stop()
            return result

        return clocked


class _Detector(nn.Module):
    """Images -> class and box logits per level, as bench.digits.evaluate takes them."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.pyramid, self.head = Pyramid(), head

    def forward(self, images: Tensor):
        return self.head(self.pyramid(images))


@dataclass
class Mmdet(HostTraining):
    host = "mmdet"
    terms = "QFL + 2 GIoU + 0.25 DFL"
    # Its towers have ReLUs, whose kinks part two runs by percents: the sooner, the higher the rate.
    learning_rate = 1e-3

    def build(self) -> nn.Module:
        allow_mmcv_lite()
        from mmdet.models.dense_heads.gfl_head import GFLHead
        from mmengine.logging import MMLogger

        MMLogger.get_instance("bench", log_level="WARNING")  # every initial weight is news to it
        head = GFLHead(
            num_classes=NUM_CLASSES,
            in_channels=WIDTH,
            stacked_convs=1,
            feat_channels=WIDTH,
            norm_cfg={"type": "GN", "num_groups": 8, "requires_grad": True},
            reg_max=REG_MAX,
            anchor_generator={
                "type": "AnchorGenerator",
                "ratios": [1.0],
                "octave_base_scale": int(ANCHOR_SCALE),
                "scales_per_octave": 1,
                "strides": list(STRIDES),
                "center_offset": 0.5,
            },
            loss_cls={"type": "QualityFocalLoss", "use_sigmoid": True, "loss_weight": 1.0},
            loss_bbox={"type": "GIoULoss", "loss_weight": 2.0},
            train_cfg={
                "assigner": {"type": "ATSSAssigner", "topk": 9},
                "allowed_border": -1,
                "pos_weight": -1,
            },
        )
        head.init_weights()
        head.get_targets = self.on_the_clock(head.get_targets)
        head.strides = STRIDES
        head.centers = [box_ops.anchor_centers(IMAGE_SIZE, stride) for stride in STRIDES]
        return _Detector(head)

    def outputs(self, images: Tensor) -> list[Tensor]:
        return [x for kind in self.model(images) for x in kind]

    def losses(self, outputs: list[Tensor], scene_numbers: Tensor) -> dict[str, Tensor]:
        from mmengine.structures import InstanceData

        levels, scenes = len(STRIDES), self.plan.scenes
        objects = [
            InstanceData(bboxes=scenes.boxes[i], labels=scenes.labels[i])
            for i in scene_numbers.tolist()
        ]
        shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
        metas = [{"img_shape": shape, "pad_shape": shape}] * len(objects)
        losses = self.model.head.loss_by_feat(outputs[:levels], outputs[levels:], objects, metas)
        return {name: sum(parts) for name, parts in losses.items()}


class _Yolo(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        detect = model.model[-1]
        strides = [int(stride) for stride in detect.stride]
        self.head = types.SimpleNamespace(
            num_classes=detect.nc,
            reg_max=detect.reg_max - 1,
            strides=strides,
            centers=[box_ops.anchor_centers(IMAGE_SIZE, stride) for stride in strides],
            integral=gfl_kernels.Integral(detect.reg_max - 1),
        )

    def predictions(self, images: Tensor) -> dict[str, Tensor]:
        found = self.model(images)
        return found[1] if isinstance(found, tuple) else found  # what it adds outside training

    def forward(self, images: Tensor):
        found = self.predictions(images)
        cells = [IMAGE_SIZE // stride for stride in self.head.strides]
        return tuple(
            [
                part.unflatten(2, (n, n))
                for part, n in zip(
                    found[kind].split([n * n for n in cells], dim=2), cells, strict=True
                )
            ]
            for kind in ("scores", "boxes")
        )


@dataclass
class Ultralytics(HostTraining):
    host = "ultralytics"
    terms = "0.5 BCE + 7.5 CIoU + 1.5 DFL, times the batch"
    # Its assigner chooses by predictions, which differ little at first: at a higher rate two runs
    # that differ in rounding choose differently within 15 steps, and part by percents.
    learning_rate = 5e-4

    def build(self) -> nn.Module:
        from ultralytics.cfg import get_cfg
        from ultralytics.nn.tasks import DetectionModel
        from ultralytics.utils import LOGGER

        LOGGER.setLevel("WARNING")
        model = DetectionModel("yolov8n.yaml", ch=1, nc=NUM_CLASSES, verbose=False)
        model.args = get_cfg()
        # Its losses are those of an image times the batch, and so are their gradients.
        self.epsilon = EPSILON * self.plan.batch_size
        self.criterion = model.init_criterion()
        self.criterion.assigner = self.on_the_clock(self.criterion.assigner)
        return _Yolo(model)

    def outputs(self, images: Tensor) -> list[Tensor]:
        found = self.model.predictions(images)
        self.feats = [level.detach() for level in found["feats"]]  # of which it reads the shapes
        return [found["scores"], found["boxes"]]

    def losses(self, outputs: list[Tensor], scene_numbers: Tensor) -> dict[str, Tensor]:
        scenes, numbers = self.plan.scenes, scene_numbers.tolist()
        corners = torch.cat([scenes.boxes[i] for i in numbers]) / IMAGE_SIZE
        batch = {
            "batch_idx": torch.cat(
                [torch.full((len(scenes.labels[i]),), float(n)) for n, i in enumerate(numbers)]
            ),
            "cls": torch.cat([scenes.labels[i] for i in numbers]).float()[:, None],
            "bboxes": torch.cat(
                [(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], dim=1
            ),
        }
        preds = {"scores": outputs[0], "boxes": outputs[1], "feats": self.feats}
        losses, _ = self.criterion(preds, batch)
        return dict(zip(("loss_bbox", "loss_cls", "loss_dfl"), losses, strict=True))


HOSTS = {"mmdet": Mmdet, "ultralytics": Ultralytics}
