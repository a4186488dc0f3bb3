"""Draws what decode_boxes sees: distributions of box sides, their mean, peak, spread and the boxes.

    python -m bench.gallery            # trains the digits detector for a minute or two first
    python -m bench.gallery --quick    # a few steps, to see that everything runs

The detector of bench/digits is trained with gfl_kernels' losses on scenes in which some digits are
underlined, and an annotator who cannot decide has counted the line to the digit in 45 % of the
boxes. Nothing in the image tells which: the lower side of such a digit has two places, and its
distribution learns two modes. Shown are two of them on held-out scenes below a digit whose sides
are sure. Writes gallery.png to bench/out/.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Patch
from rich.console import Console
from torch import Tensor
from torchvision.ops import batched_nms

from bench.digits import boxes as box_ops
from bench.digits.assign import assign_all
from bench.digits.detector import STRIDES, Detector
from bench.digits.pictures import OURS, PLAIN, SHOWN_SCORE, SIDES, TRUTH, rectangle, save
from bench.digits.scenes import IMAGE_SIZE, NUM_CLASSES, Scenes, make_scenes
from bench.digits.train import Plan, Run
from bench.train_digits import OURS as OUR_LOSSES
from bench.train_digits import QUICK, THREADS, Size, progress_bar
from gfl_kernels import decode_boxes

FULL = Size(steps=240, batch_size=16, scenes=800, held_out=80)
UNDERLINED = 0.85  # of the digits that have room for it
COUNTED = 0.45  # of the underlined ones
PEAK, SPREAD = "#7b2d8b", "#f4b183"
WINDOW = 1  # bins on either side of the highest
NMS_IOU = 0.6
AMBIGUOUS = 2  # of them are shown, below a sure one


@dataclass
class Underlined:
    """Scenes with the boxes an annotator gave, and how far down each line is; 0 without one."""

    scenes: Scenes
    lines: list[Tensor]  # per scene [n]


def underline(scenes: Scenes, seed: int) -> Underlined:
    """Draws the lines, and counts them to the digit at random."""
    random = torch.Generator().manual_seed(seed)
    images, boxes, lines = scenes.images.clone(), [], []
    for image, tight in zip(images[:, 0], scenes.boxes, strict=True):
        given, down = tight.clone(), torch.zeros(len(tight))
        for i, (x1, y1, x2, y2) in enumerate(tight.round().int().tolist()):
            line = y2 + max(6, round(0.55 * (y2 - y1)))
            with_line = torch.tensor([x1, y1, x2, line + 2.0])
            others = torch.arange(len(tight)) != i
            free = bool((box_ops.overlap(with_line, tight[others]) == 0).all())
            wanted, counted = torch.rand(2, generator=random).tolist()
            if line + 2 > IMAGE_SIZE or not free or wanted > UNDERLINED:
                continue
            image[line : line + 2, x1:x2] = image[y1:y2, x1:x2].max()
            down[i] = line + 2
            if counted < COUNTED:
                given[i, 3] = line + 2
        boxes.append(given)
        lines.append(down)
    return Underlined(Scenes(images, boxes, scenes.labels), lines)


@dataclass
class Found:
    """A detection: its box by the mean and by the peak, and what they were decoded from."""

    image: Tensor  # [S, S]
    label: int
    score: float
    tight_box: Tensor  # [4] of the digit itself
    line: float  # the lower end of its line; 0 without one
    point: Tensor  # [2]
    stride: float
    sides: Tensor  # [4, K] distributions
    mean: Tensor  # [4] boxes, xyxy pixels
    peak: Tensor
    deviation: Tensor  # [4] of the sides, pixels

    def distances(self, box: Tensor) -> Tensor:
        """Of a box's sides from the point, in bins."""
        low, high = self.point - box[:2], box[2:] - self.point
        return torch.cat([low, high]) / self.stride

    def second_mode(self, side: int) -> float:
        """How far the highest other maximum of a side's distribution stands above the valley before
        the peak; 0 if there is none."""
        p = self.sides[side].tolist()
        peak, best = p.index(max(p)), 0.0
        for k in range(len(p)):
            valley = min(p[min(k, peak) : max(k, peak) + 1])
            if k != peak and p[k] == max(p[max(0, k - 1) : k + 2]):
                best = max(best, p[k] - valley)
        return best

    def apart(self) -> Tensor:
        """How far mean and peak lie apart, in bins; 0 beyond the image, where both are clipped."""
        return (self.distances(self.mean) - self.distances(self.peak)).abs()


@torch.no_grad()
def find(model: Detector, scenes: Scenes, lines: list[Tensor]) -> list[Found]:
    """Detections of the right class that are on their digit. scenes: with tight boxes."""
    model.eval()
    cls_scores, bbox_preds = model(scenes.images)
    cls, pred = (torch.cat([x.flatten(2) for x in maps], 2) for maps in (cls_scores, bbox_preds))
    points = torch.cat(model.head.centers)
    strides = torch.cat(
        [torch.full((len(c),), float(s)) for c, s in zip(model.head.centers, STRIDES, strict=True)]
    )
    options = {"strides": strides, "max_shape": (IMAGE_SIZE, IMAGE_SIZE), "channel_dim": 1}
    out = decode_boxes(points, pred, cls_logits=cls, return_uncertainty=True, **options)
    peaks = decode_boxes(points, pred, mode="peak", window=WINDOW, **options)
    found = []
    for i in range(len(scenes)):
        sure = (out.scores[i] > SHOWN_SCORE).nonzero().squeeze(1)
        kept = batched_nms(out.boxes[i, sure], out.scores[i, sure], out.labels[i, sure], NMS_IOU)
        for anchor in sure[kept].tolist():
            overlap, best = box_ops.iou(out.boxes[i, anchor], scenes.boxes[i]).max(dim=0)
            if overlap < 0.35 or scenes.labels[i][best] != out.labels[i, anchor]:
                continue
            found.append(
                Found(
                    image=scenes.images[i, 0],
                    label=int(out.labels[i, anchor]),
                    score=float(out.scores[i, anchor]),
                    tight_box=scenes.boxes[i][best],
                    line=float(lines[i][best]),
                    point=points[anchor],
                    stride=float(strides[anchor]),
                    sides=pred[i, :, anchor].view(4, -1).softmax(dim=-1),
                    mean=out.boxes[i, anchor],
                    peak=peaks[i, anchor],
                    deviation=out.uncertainty[i, anchor],
                )
            )
    return found


def choose(found: list[Found]) -> list[Found]:
    """The surest one without a line, then those whose lower side has the clearest two modes."""
    plain = sorted((f for f in found if not f.line), key=lambda f: -f.score)[:1]
    lined = [f for f in found if f.line and f.mean[3] < IMAGE_SIZE]
    return plain + sorted(lined, key=lambda f: -f.second_mode(3))[:AMBIGUOUS]


def draw(path: Path, examples: list[Found]) -> Path:
    """A row to each: the image with both boxes, and the distribution of every side."""
    figure, grid = plt.subplots(
        len(examples), 5, figsize=(19, 3.7 * len(examples) + 1.1), layout="constrained",
        squeeze=False, width_ratios=(1.25, 1, 1, 1, 1),
    )  # fmt: skip
    for axes, example in zip(grid, examples, strict=True):
        _image(axes[0], example)
        for side, panel in enumerate(axes[1:]):
            _side(panel, example, side, ambiguous=side == 3 and example.line > 0)
        axes[1].set_ylabel("probability")
    handles = [
        Patch(color=TRUTH, label="true side (dotted: with the line)"),
        Patch(color=OURS, label='mode="mean"'),
        Patch(color=PEAK, label=f'mode="peak", window={WINDOW}'),
        Patch(color=SPREAD, label="mean ± standard deviation (return_uncertainty=True)"),
        Patch(color=PLAIN, label="distribution over the bins"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=12)
    figure.suptitle(
        "decode_boxes: does the line belong to the digit? Annotators disagreed: the lower side has"
        " two modes.\nThe mean lies between them, where no edge is, the peak at the likelier one.",
        fontsize=16,
    )
    return save(figure, path)


def _image(axes, f: Found) -> None:
    axes.imshow(f.image.numpy(), cmap="gray", extent=(0, IMAGE_SIZE, IMAGE_SIZE, 0))
    x1, y1, x2, y2 = f.mean.tolist()
    for side, (low, high) in enumerate(((x1, x1), (y1, y1), (x2, x2), (y2, y2))):
        around = float(f.deviation[side])
        if side % 2 == 0:
            box = (low - around, y1, high + around, y2)
        else:
            box = (x1, low - around, x2, high + around)
        band = rectangle(box, SPREAD, linewidth=0)
        band.set(fill=True, facecolor=SPREAD, alpha=0.3)
        axes.add_patch(band)
    if f.line:
        with_line = [*f.tight_box[:3].tolist(), f.line]
        axes.add_patch(rectangle(with_line, TRUTH, linewidth=1.6, linestyle=(0, (1, 2))))
    axes.add_patch(rectangle(f.tight_box.tolist(), TRUTH, linewidth=2, linestyle=(0, (3, 2))))
    axes.add_patch(rectangle(f.peak.tolist(), PEAK, linewidth=2))
    axes.add_patch(rectangle(f.mean.tolist(), OURS, linewidth=2))
    axes.plot(*f.point.tolist(), marker="+", color="#ffd166", markersize=12, mew=2.2)
    corners = torch.stack([f.tight_box, f.mean, f.peak])
    corners[0, 3] = max(float(corners[0, 3]), f.line)
    low, high = corners[:, :2].amin(0), corners[:, 2:].amax(0)
    half = 0.5 * float((high - low).max()) + max(4.0, float(f.deviation.max()) + 1)
    x, y = ((low + high) / 2).tolist()
    axes.set_xlim(x - half, x + half)
    axes.set_ylim(y + half, y - half)
    axes.set_facecolor("#22252b")
    axes.set(xticks=[], yticks=[])
    axes.set_title(f"digit {f.label}, score {f.score:.2f}", fontsize=13)


def _side(panel, f: Found, side: int, ambiguous: bool) -> None:
    p = f.sides[side].numpy()
    bins = np.arange(len(p))
    mean = float((p * bins).sum())
    peak = float(f.distances(f.peak)[side])
    spread = float(f.deviation[side]) / f.stride
    true = float(f.distances(f.tight_box)[side])
    lines = [(true, TRUTH, (0, (3, 2))), (peak, PEAK, "-"), (mean, OURS, "-")]
    if ambiguous:
        with_line = (f.line - float(f.point[1])) / f.stride
        lines.append((with_line, TRUTH, (0, (1, 2))))
    panel.axvspan(mean - spread, mean + spread, color=SPREAD, alpha=0.35, linewidth=0)
    panel.bar(bins, p, color=PLAIN, alpha=0.85, width=0.8)
    for x, color, style in lines:
        panel.axvline(x, color=color, linewidth=2.6, linestyle=style)
    last = bins[p > 0.005].max(initial=0)
    panel.set_xlim(-0.7, max(6, last + 2, *(x + 1 for x, _, _ in lines)) + 0.7)
    panel.set_ylim(0, max(0.6, 1.5 * float(p.max())))
    panel.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    pixels = (mean * f.stride, spread * f.stride, peak * f.stride, true * f.stride)
    panel.text(
        0.97,
        0.96,
        "mean {:.1f} ± {:.1f} px\npeak {:.1f} px\ntrue {:.1f} px".format(*pixels),
        transform=panel.transAxes,
        ha="right",
        va="top",
        fontsize=11,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 2},
    )
    panel.set_title(
        f"{SIDES[side]} side" + (": two modes" if ambiguous else ""),
        fontsize=13,
        fontweight="bold" if ambiguous else "normal",
        color=PEAK if ambiguous else "black",
    )
    if ambiguous:
        panel.set_facecolor("#f7f0fa")
    panel.set_xlabel(f"distance from the anchor, bins of {f.stride:g} px")
    panel.spines[["top", "right"]].set_visible(False)


def make_plan(size: Size, seed: int) -> Plan:
    scenes = underline(make_scenes(size.scenes, seed, held_out=False), seed).scenes
    anchors = Detector(OUR_LOSSES, IMAGE_SIZE, NUM_CLASSES).head.anchors()
    targets = assign_all(anchors, scenes, NUM_CLASSES)
    return Plan(scenes, targets, size.steps, size.batch_size, seed)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gallery",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it runs")
    parser.add_argument("--seed", type=int, default=1, help="of scenes, weights and order")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    options = parser.parse_args(arguments)
    size = QUICK if options.quick else FULL
    console = Console()
    torch.set_num_threads(THREADS)
    plan = make_plan(size, options.seed)
    run = Run("gfl_kernels", plan, THREADS, loss_objects=OUR_LOSSES)
    with progress_bar(console) as progress:
        task = progress.add_task("training", total=plan.steps, losses="")
        for scene_numbers in plan.order():
            loss = run.step(scene_numbers)
            progress.update(task, advance=1, losses=f"loss {loss:.3f}")
    tight = make_scenes(size.held_out, options.seed, held_out=True)
    held_out = underline(tight, options.seed)
    scenes = Scenes(held_out.scenes.images, tight.boxes, tight.labels)
    examples = choose(find(run.model, scenes, held_out.lines))
    if not examples:
        console.print("Nothing was found on the held-out scenes: there is nothing to draw.")
        return 0 if options.quick else 1
    options.out.mkdir(parents=True, exist_ok=True)
    console.print(f"Written: {draw(options.out / 'gallery.png', examples)}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
