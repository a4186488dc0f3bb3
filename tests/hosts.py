"""Small models of the hosts: real heads on features of one convolution per level."""

from __future__ import annotations

import inspect
import sys
import types
from contextlib import nullcontext

import torch
from torch import nn

from gfl_kernels.adapters import accelerate
from gfl_kernels.adapters.mmdet import allow_mmcv_lite

CLASSES = 3


class MmdetModel(nn.Module):
    """Images [B, 3, H, W] -> the sum of the losses of a GFLHead with its ATSS assigner."""

    strides = (8, 16)

    def __init__(self, head=None, **options):
        super().__init__()
        allow_mmcv_lite()
        from mmdet.models.dense_heads.gfl_head import GFLHead

        torch.manual_seed(3)
        self.stem = nn.ModuleList([nn.Conv2d(3, 8, stride, stride) for stride in self.strides])
        self.head = (head or GFLHead)(
            num_classes=CLASSES,
            in_channels=8,
            stacked_convs=1,
            feat_channels=8,
            norm_cfg=None,
            anchor_generator={
                "type": "AnchorGenerator",
                "ratios": [1.0],
                "octave_base_scale": 4,
                "scales_per_octave": 1,
                "strides": list(self.strides),
            },
            train_cfg={
                "assigner": {"type": "ATSSAssigner", "topk": 9},
                "allowed_border": -1,
                "pos_weight": -1,
            },
            **{
                "loss_cls": {"type": "QualityFocalLoss", "use_sigmoid": True, "loss_weight": 1.0},
                "loss_bbox": {"type": "GIoULoss", "loss_weight": 2.0},
                **options,
            },
        )

    def outputs(self, images):
        return self.head([conv(images) for conv in self.stem])

    def forward(self, images, objects, metas):
        losses = self.head.loss_by_feat(*self.outputs(images), objects, metas)
        return sum(loss.mean() for levels in losses.values() for loss in levels)


def mmdet_batch(seed=0, counts=(3, 2), size=(64, 96)):
    """(images, objects, metas). The second image is padded: only a part of it holds anchors."""
    from mmengine.structures import InstanceData

    random = torch.Generator().manual_seed(seed)
    height, width = size
    images = torch.randn(len(counts), 3, height, width, generator=random)
    objects, metas = [], []
    for i, count in enumerate(counts):
        shape = (height, width - 32 * (i % 2))
        centre = torch.rand(count, 2, generator=random) * torch.tensor([shape[1], shape[0]])
        half = torch.rand(count, 2, generator=random) * 20 + 6
        objects.append(
            InstanceData(
                bboxes=torch.cat([centre - half, centre + half], dim=1),
                labels=torch.randint(CLASSES, (count,), generator=random),
            )
        )
        metas.append({"img_shape": (*shape, 3), "pad_shape": (*shape, 3)})
    return images, objects, metas


def loss_and_grads(model, batch, target=None, scale=1.0):
    """The loss and the gradients of all parameters, under accelerate(target) if given."""
    model.zero_grad(set_to_none=True)
    with accelerate(target) if target is not None else nullcontext():
        loss = model(*batch)
        (loss * scale).backward()
    return loss.detach(), [
        torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()
    ]


def attributes(package):
    """Every attribute of every loaded module of the package and of its classes, as objects."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != package or module is None:
            continue
        for key, value in list(vars(module).items()):
            found[name, key] = value
            if inspect.isclass(value) and value.__module__.partition(".")[0] == package:
                found.update({(value, k): v for k, v in vars(value).items() if k[:5] != "_abc_"})
    return found


def assert_same_objects(before, after):
    assert before.keys() == after.keys()
    changed = [key for key, value in before.items() if after[key] is not value]
    assert not changed, changed


def assert_same_training(got, expected, eps=2e-6):
    """(loss, gradients) of two runs: each tensor to eps of its own size. Sums over a feature map
    cancel, so a gradient's small entries carry the rounding of its large ones."""
    torch.testing.assert_close(got[0], expected[0], rtol=eps, atol=0)
    for i, (a, b) in enumerate(zip(got[1], expected[1], strict=True)):
        size = float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=0, atol=eps * size, msg=lambda m, i=i: f"{i}: {m}")


# ---- Ultralytics

SIZES = ((8, 8), (4, 4), (2, 2))
STRIDES = (8.0, 16.0, 32.0)


def detection_loss(kind=None, reg_max=16):
    """A v8DetectionLoss, without the model it is made from."""
    from ultralytics.utils.loss import v8DetectionLoss

    parameter = nn.Parameter(torch.zeros(1))
    detect = types.SimpleNamespace(stride=torch.tensor(STRIDES), nc=CLASSES, reg_max=reg_max)
    model = types.SimpleNamespace(
        args=types.SimpleNamespace(box=7.5, cls=0.5, dfl=1.5),
        model=[detect],
        parameters=lambda: iter([parameter]),
    )
    return (kind or v8DetectionLoss)(model)


def detection_batch(seed=0, counts=(3, 2), dtype=torch.float32, reg_max=16):
    """(leaves [scores, boxes], the other predictions, the batch)."""
    random = torch.Generator().manual_seed(seed)
    anchors = sum(h * w for h, w in SIZES)
    leaves = [
        (torch.randn(len(counts), channels, anchors, generator=random) * 2).to(dtype)
        for channels in (CLASSES, 4 * reg_max)
    ]
    feats = [torch.zeros(len(counts), 1, *size, dtype=dtype) for size in SIZES]
    images = torch.cat([torch.full((n,), float(i)) for i, n in enumerate(counts)])
    batch = {
        "batch_idx": images,
        "cls": torch.randint(CLASSES, (len(images), 1), generator=random).float(),
        "bboxes": torch.rand(len(images), 4, generator=random) * 0.4 + 0.3,
    }
    return leaves, {"feats": feats}, batch


def detection_run(criterion, prepared, target=None):
    """(losses [3], gradients of scores and boxes) and the items for the log."""
    leaves, others, batch = prepared
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    with accelerate(target) if target is not None else nullcontext():
        losses, items = criterion({"scores": leaves[0], "boxes": leaves[1], **others}, batch)
        losses.sum().backward()
    return (losses.detach(), [leaf.grad for leaf in leaves]), items
