"""``python -m bench.hosts``: the losses of real hosts' heads, as they are and on gfl_kernels.

mmdetection's GFLHead as bench.head has it (two images of 1333 x 800, five levels, 80 classes, 600
positives), and Ultralytics' v8DetectionLoss (16 images of 640 x 640, three levels, 80 classes, 10
anchors each for 20 objects an image). Forward + backward, from where the host's own code has its
targets on, and of its whole call, the assigner itself answered from a table. Checked against each
other before they are timed in turns.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import head as heads
from bench import machine
from bench.measure import Stopwatch, WrongResult, block, interleave, ratio
from gfl_kernels.adapters import accelerate
from gfl_kernels.adapters.mmdet import allow_mmcv_lite

REQUIRED = {"mmdet": 10.0, "ultralytics": 4.0}  # from the targets on


@dataclass
class Host:
    leaves: list[Tensor]
    calls: dict[str, Callable[..., Tensor]]  # name -> leaves -> the total loss
    assigned: Callable[[], None]  # called when a call has its targets


def mmdet(size=heads.SIZE, positives: int = heads.POSITIVES) -> Host:
    allow_mmcv_lite()
    from mmdet.models.dense_heads.gfl_head import GFLHead

    inputs = heads.make_inputs(size=size, positives=positives)
    model = GFLHead(
        num_classes=heads.CLASSES,
        in_channels=4,
        stacked_convs=0,
        feat_channels=4,
        reg_max=heads.REG_MAX,
        anchor_generator={
            "type": "AnchorGenerator",
            "ratios": [1.0],
            "octave_base_scale": 8,
            "scales_per_octave": 1,
            "strides": list(heads.STRIDES),
            "center_offset": 0.5,
        },
        loss_cls={"type": "QualityFocalLoss", "use_sigmoid": True, "loss_weight": 1.0},
        loss_bbox={"type": "GIoULoss", "loss_weight": 2.0},
    )
    host = Host(inputs.leaves, {}, lambda: None)
    targets = (inputs.anchors, inputs.labels, inputs.weights, inputs.targets, None, positives)

    def get_targets(*args, **kwargs):
        host.assigned()
        return targets

    model.get_targets = get_targets
    metas = [{"img_shape": (*size, 3), "pad_shape": (*size, 3)}] * heads.BATCH
    levels = len(heads.STRIDES)
    for name, each in _both(model).items():
        each.get_targets = get_targets

        def call(*leaves, head=each):
            losses = head.loss_by_feat(leaves[:levels], leaves[levels:], None, metas)
            return sum(sum(parts) for parts in losses.values())

        host.calls[name] = call
    return host


def ultralytics(size: int = 640, batch: int = 16, objects: int = 20) -> Host:
    from ultralytics.utils.loss import v8DetectionLoss

    random = torch.Generator().manual_seed(20201)
    strides, classes, bins = (8, 16, 32), 80, 16
    cells = [size // stride for stride in strides]
    anchors = sum(n * n for n in cells)
    parameter = torch.nn.Parameter(torch.zeros(1))
    detect = types.SimpleNamespace(stride=torch.tensor(strides).float(), nc=classes, reg_max=bins)
    criterion = v8DetectionLoss(
        types.SimpleNamespace(
            args=types.SimpleNamespace(box=7.5, cls=0.5, dfl=1.5),
            model=[detect],
            parameters=lambda: iter([parameter]),
        )
    )
    leaves = [
        (torch.randn(batch, channels, anchors, generator=random) * 2 + mean).requires_grad_()
        for channels, mean in ((classes, -3.0), (4 * bins, 0.0))
    ]
    prepared = {
        "batch_idx": torch.arange(batch).repeat_interleave(objects).float(),
        "cls": torch.randint(classes, (batch * objects, 1), generator=random).float(),
        "bboxes": torch.rand(batch * objects, 4, generator=random) * 0.4 + 0.3,
    }
    feats = [torch.zeros(batch, 1, n, n) for n in cells]
    foreground = torch.rand(batch, anchors, generator=random) < objects * 10 / anchors
    label = torch.randint(classes, (batch, anchors), generator=random)
    scores = torch.zeros(batch, anchors, classes)
    quality = torch.rand(batch, anchors, generator=random) * foreground
    scores.scatter_(2, label[..., None], quality[..., None])
    corner = torch.rand(batch, anchors, 2, generator=random) * size * 0.6
    extent = torch.rand(batch, anchors, 2, generator=random) * size * 0.4 + 4
    boxes = torch.cat([corner, corner + extent], dim=-1)
    host = Host(leaves, {}, lambda: None)

    def assigner(*args, **kwargs):
        host.assigned()
        return label, boxes, scores, foreground, label

    criterion.assigner = assigner
    for name, each in _both(criterion).items():

        def call(scores, boxes, criterion=each):
            losses, _ = criterion({"scores": scores, "boxes": boxes, "feats": feats}, prepared)
            return losses.sum()

        host.calls[name] = call
    return host


def _both(part) -> dict:
    """The host's part and a copy of it on gfl_kernels."""
    ours = copy.deepcopy(part)  # a shallow copy shares the parts that accelerate changes
    if isinstance(part, torch.nn.Module):
        accelerate(ours)
    else:  # what a model has as its criterion
        model = torch.nn.Module()
        model.criterion = ours
        accelerate(model)
    return {"host": part, "gfl_kernels": ours}


HOSTS = {"mmdet": mmdet, "ultralytics": ultralytics}


def check(host: Host) -> None:
    """WrongResult if the two differ by more than 1e-5 of the largest value."""
    found = []
    for call in host.calls.values():
        loss = call(*host.leaves)
        found.append([loss.detach(), *torch.autograd.grad(loss, host.leaves)])
    for i, (expected, got) in enumerate(zip(*found, strict=True)):
        error, size = (got - expected).abs().max(), expected.abs().max()
        if not bool(error <= 1e-5 * size):
            raise WrongResult(f"result {i} is off by {error:.3g}, of {size:.3g}")


def measure(host: Host, rounds: int, seconds: float, from_targets: bool) -> dict:
    """Samples by contestant: whole calls, or what follows the targets."""
    watch, threads = Stopwatch(), torch.get_num_threads()
    host.assigned = watch.go if from_targets else lambda: None

    def step(call):
        def run():
            for leaf in host.leaves:
                leaf.grad = None
            if from_targets:
                watch.hold()
            call(*host.leaves).backward()

        return run

    blocks = {name: block(step(call), watch, threads, seconds) for name, call in host.calls.items()}
    samples = interleave(blocks, rounds)
    host.assigned = lambda: None
    return samples


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hosts", nargs="*", default=list(HOSTS), metavar="|".join(HOSTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a contestant and round")
    options = parser.parse_args(arguments)
    for name in options.hosts:
        host = HOSTS[name]()
        check(host)
        for title, from_targets in (("from the targets on", True), ("whole call", False)):
            samples = measure(host, options.rounds, options.seconds, from_targets)
            theirs, ours = samples.values()
            low, middle, high = ratio(theirs, ours)
            asked = f", asked {REQUIRED[name]:g}" if from_targets else ""
            before, after = (statistics.median(s.seconds) * 1e3 for s in (theirs, ours))
            print(
                f"{name:<12}{title:<20}{before:9.2f} -> {after:.2f} ms  "
                f"{middle:6.2f}x ({low:.2f} to {high:.2f}){asked}"
            )


if __name__ == "__main__":
    machine.fix_allocator("bench.hosts", sys.argv[1:])
    main(sys.argv[1:])
