"""The whole head in bench.roofline: gfl_loss on the images that bench.head takes.

A pass is two launches or more: what is counted of it is in bench.roofline.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench import head
from bench.cases import BACKWARD, FORWARD, ITEM_BYTES, Case
from gfl_kernels import ops, reference

BINS = head.REG_MAX + 1
BOX = ([float(stride) for stride in head.STRIDES], ops.IOUS["giou"], 1e-6, head.REG_MAX - 0.1)
LOSS = (reference.LOGITS, 0.0, 2.0, [1.0, 2.0, 0.25])
SECTOR = 32  # bytes


@dataclass(frozen=True)
class HeadCase(Case):
    """shape: (images, classes, height, width) of images in pixels; rows are anchors."""

    channels_last: bool = False

    @property
    def rows(self) -> int:
        batch, _, height, width = self.shape
        return batch * sum(-(-height // s) * -(-width // s) for s in head.STRIDES)

    @property
    def layout(self) -> str:
        return "channels_last" if self.channels_last else "NCHW"

    @property
    def name(self) -> str:
        return super().name + " channels_last" * self.channels_last

    @property
    def positives(self) -> int:
        area = self.shape[2] * self.shape[3]
        return max(1, head.POSITIVES * area // (head.SIZE[0] * head.SIZE[1]))


@dataclass
class Inputs:
    """lists: as the ops take them, no targets, no label weights; positive: per level [B, n]."""

    lists: tuple[list[Tensor], ...]
    positive: list[Tensor]


def make_inputs(case: HeadCase) -> Inputs:
    made = head.make_inputs(case.channels_last, case.shape[2:], case.positives)
    dtype = getattr(torch, case.dtype)
    cls, box = ([t.detach().to(dtype).movedim(1, -1) for t in ts] for ts in (made.cls, made.box))
    points = [(level[0, :, :2] + level[0, :, 2:]) / 2 for level in made.anchors]
    positive = [label < head.CLASSES for label in made.labels]
    return Inputs((cls, box, points, made.labels, made.targets, [], []), positive)


def minimum_bytes(case: HeadCase, inputs: Inputs, which: str) -> int:
    """Inputs once and outputs once. What only positives have is counted in whole sectors: in NCHW
    the bins of a box lie in one each.
    """
    _, box, points, _, targets, _, _ = inputs.lists
    of_positives = 0
    for box_level, point, target, positive in zip(
        box, points, targets, inputs.positive, strict=True
    ):
        image, cell = positive.nonzero(as_tuple=True)
        width = box_level.shape[2]
        of_positives += _sectors(box_level, image, cell // width, cell % width)
        of_positives += _sectors(point, cell) + _sectors(target, image, cell)
    anchors, item = case.rows, ITEM_BYTES[case.dtype]
    logits, labels, value = anchors * case.width * item, 8 * anchors, 4 * anchors
    if which == FORWARD:
        return logits + labels + of_positives + 2 * value  # writes IoU and weight
    gradients = anchors * (case.width + 4 * BINS) * item
    return logits + labels + value + of_positives + 4 * case.positives + gradients


def _sectors(tensor: Tensor, *index: Tensor) -> int:
    """Bytes of the sectors that hold tensor[index]."""
    steps = zip(index, tensor.stride(), strict=False)
    start = sum(i * step for i, step in steps).unsqueeze(1)
    offset = start + torch.arange(tensor.shape[-1]) * tensor.stride(-1)
    return (
        SECTOR * ((tensor.data_ptr() + offset * tensor.element_size()) // SECTOR).unique().numel()
    )


def assess(inputs: Inputs, kernels) -> tuple[Tensor, ...]:
    """What head_boxes leaves for the other two."""
    *assessed, _ = kernels.head_boxes(*inputs.lists, *BOX, False)
    return tuple(assessed)


def launch(which: str, inputs: Inputs, kernels, assessed: tuple[Tensor, ...] | None):
    """A pass; assessed: in backward, what forward left."""
    if which == BACKWARD:
        one = torch.ones(())
        upstream = (one, one, one, None, None, None)
        return kernels.head_backward(*upstream, *inputs.lists, *assessed, *BOX, *LOSS)
    return kernels.head_forward(*inputs.lists, *assess(inputs, kernels), *BOX, *LOSS, False)
