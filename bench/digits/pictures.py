"""The demo's pictures: loss curves, detections on held-out scenes, distributions of box sides."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, also where there is no display

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Rectangle
from torchvision.ops import nms

from bench.digits import boxes as box_ops
from bench.digits.compare import WINDOW, relative_difference, smooth
from bench.digits.evaluate import Detections
from bench.digits.scenes import IMAGE_SIZE, Scenes

PLAIN, OURS, TRUTH = "#1f4e79", "#e4572e", "#2a9d5c"
CONTROLS = ("#8d99ae", "#b08968")
SIDES = ("left", "top", "right", "bottom")
SHOWN_SCORE = 0.3


def save(figure, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def loss_curves(
    path: Path,
    plain: list[float],
    ours: list[float],
    controls: dict[str, list[float]],
    plain_name: str = "plain PyTorch",
    terms: str = "QFL + 2 GIoU + 0.25 DFL",
) -> Path:
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(10, 8), sharex=True, layout="constrained", height_ratios=(3, 2)
    )
    steps = np.arange(1, len(plain) + 1)
    above.plot(steps, plain, color=PLAIN, alpha=0.25, linewidth=0.8)
    above.plot(steps, ours, color=OURS, alpha=0.25, linewidth=0.8)
    above.plot(steps, smooth(plain), color=PLAIN, linewidth=3.5, label=plain_name)
    above.plot(steps, smooth(ours), color=OURS, linewidth=1.6, linestyle=(0, (4, 3)), label="ours")
    above.set_yscale("log")
    above.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    above.yaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    above.set_ylabel(f"total loss ({terms})")
    above.set_title(
        f"Same seed, same batches: loss of each step (thin), mean of the last {WINDOW} (thick)"
    )
    above.legend(frameon=False)

    curves = [("ours", ours, OURS, 2.2)]
    for (name, curve), color in zip(controls.items(), CONTROLS, strict=False):
        curves.append((f"control: {name}", curve, color, 1.6))
    # Bit-equal steps have no logarithm: they show as the floor
    floor = 1e-9
    for name, curve, color, width in curves:
        apart = np.maximum(relative_difference(smooth(curve), smooth(plain)), floor)
        below.plot(steps, apart, color=color, alpha=0.3, linewidth=0.8)
        below.plot(steps, np.maximum.accumulate(apart), color=color, linewidth=width, label=name)
    below.set_yscale("log")
    below.set_ylabel("relative difference")
    below.set_xlabel("training step")
    below.set_title(
        f"Distance of the smoothed curve from that of {plain_name} (thin), largest so far (thick)"
    )
    below.legend(frameon=False, loc="lower right")
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return save(figure, path)


def detections(path: Path, scenes: Scenes, found: list[Detections], count: int = 8) -> Path:
    """The first scenes of the held-out set, unselected."""
    count = min(count, len(scenes))
    rows = 2 if count > 4 else 1
    columns = -(-count // rows)
    figure, grid = plt.subplots(
        rows, columns, figsize=(4 * columns, 4.15 * rows + 0.6), layout="constrained", squeeze=False
    )
    for i, axes in enumerate(grid.flat):
        axes.axis("off")
        if i >= count:
            continue
        axes.imshow(scenes.images[i, 0], cmap="gray", extent=(0, IMAGE_SIZE, IMAGE_SIZE, 0))
        for box in scenes.boxes[i].tolist():
            axes.add_patch(rectangle(box, TRUTH, linewidth=1.2, linestyle=(0, (3, 2))))
        # The best class of each place; COCO's AP also counts the second guesses
        kept = nms(found[i].boxes, found[i].scores, 0.6)
        for row in kept[found[i].scores[kept] >= SHOWN_SCORE].tolist():
            box, label = found[i].boxes[row].tolist(), int(found[i].labels[row])
            score = float(found[i].scores[row])
            axes.add_patch(rectangle(box, OURS, linewidth=1.8))
            # Above the box where there is room, below its upper edge otherwise
            axes.text(
                box[0],
                box[1] if box[1] > 9 else box[1] + 1,
                f"{label}  {score:.2f}",
                fontsize=9,
                color="white",
                va="bottom" if box[1] > 9 else "top",
                bbox={"facecolor": OURS, "edgecolor": "none", "pad": 1.2, "alpha": 0.85},
                clip_on=True,
            )
        axes.set_title(f"held-out scene {i}", fontsize=10)
    figure.suptitle(
        "Detections of the model trained with gfl_kernels: class and score"
        f" (solid, score at least {SHOWN_SCORE}); true boxes dashed green",
        fontsize=13,
    )
    return save(figure, path)


def rectangle(box, color, **style) -> Rectangle:
    x1, y1, x2, y2 = box
    return Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, **style)


def _examples(scenes: Scenes, found: list[Detections], count: int):
    """(scene, detection, true box) of small to large objects that were found, or the best guesses.

    Found: sure, of the right class, IoU at least 0.5. A model that finds nothing yet has guesses.
    """
    pairs, guesses = [], []
    for scene, d in enumerate(found):
        for row in range(len(d.boxes) if len(scenes.boxes[scene]) else 0):
            overlap, best = box_ops.iou(d.boxes[row], scenes.boxes[scene]).max(dim=0)
            pair = (scene, row, scenes.boxes[scene][best])
            guesses.append((float(overlap), pair))
            right = scenes.labels[scene][best] == d.labels[row]
            if right and overlap >= 0.5 and d.scores[row] >= SHOWN_SCORE:
                pairs.append(pair)
    if not pairs:
        pairs = [pair for _, pair in sorted(guesses, key=lambda guess: -guess[0])[:count]]
    if not pairs:
        return []
    pairs.sort(key=lambda pair: float(box_ops.area(pair[2])))
    picks = np.linspace(0.1, 0.95, count) * (len(pairs) - 1)
    return [pairs[p] for p in sorted({int(round(p)) for p in picks})]


def side_distributions(
    path: Path, scenes: Scenes, found: list[Detections], count: int = 3
) -> Path | None:
    """A few found digits and the predicted distribution of each side; None without detections."""
    chosen = _examples(scenes, found, count)
    if not chosen:
        return None
    figure, grid = plt.subplots(
        len(chosen), 5, figsize=(18, 3.5 * len(chosen) + 0.7), layout="constrained", squeeze=False
    )
    for axes, (scene, row, true_box) in zip(grid, chosen, strict=True):
        d = found[scene]
        stride, point = float(d.strides[row]), d.points[row]
        _show_box(axes[0], scenes.images[scene, 0], d, row, true_box)
        target = box_ops.box_to_distances(point, true_box, float("inf"))
        bins = np.arange(d.sides.shape[-1])
        for side, (name, panel) in enumerate(zip(SIDES, axes[1:], strict=True)):
            p = d.sides[row, side].numpy()
            mean = float((p * bins).sum())
            panel.bar(bins, p, color=PLAIN, alpha=0.75, width=0.85)
            panel.axvline(mean, color=OURS, linewidth=2.2, label=f"mean {mean * stride:.1f} px")
            wanted = float(target[side])
            panel.axvline(
                wanted / stride,
                color=TRUTH,
                linewidth=2.2,
                linestyle=(0, (3, 2)),
                label=f"true {wanted:.1f} px",
            )
            # The bins that hold anything, and some empty ones for scale
            last = bins[p > 0.005].max(initial=0)
            panel.set_xlim(-0.7, max(7, last + 3) + 0.7)
            panel.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
            panel.set_ylim(0, 1.3)  # room for the legend
            panel.set_yticks([0, 0.25, 0.5, 0.75, 1])
            panel.set_title(f"{name} side", fontsize=11)
            panel.set_xlabel(f"distance from the anchor, bins of {stride:g} px")
            panel.legend(frameon=False, loc="upper right", fontsize=9)
            panel.spines[["top", "right"]].set_visible(False)
        axes[1].set_ylabel("probability")
    figure.suptitle(
        "Predicted distributions of the four sides, their mean (the Integral) and the true side",
        fontsize=14,
    )
    return save(figure, path)


def _show_box(axes, image: torch.Tensor, d: Detections, row: int, true_box: torch.Tensor) -> None:
    axes.imshow(image, cmap="gray", extent=(0, IMAGE_SIZE, IMAGE_SIZE, 0))
    axes.add_patch(rectangle(true_box.tolist(), TRUTH, linewidth=1.8, linestyle=(0, (3, 2))))
    axes.add_patch(rectangle(d.boxes[row].tolist(), OURS, linewidth=1.8))
    axes.plot(*d.points[row].tolist(), marker="+", color="#ffd166", markersize=11, mew=2)
    x1, y1, x2, y2 = true_box.tolist()
    margin = 0.35 * max(x2 - x1, y2 - y1)
    axes.set_xlim(max(0, x1 - margin), min(IMAGE_SIZE, x2 + margin))
    axes.set_ylim(min(IMAGE_SIZE, y2 + margin), max(0, y1 - margin))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(f"digit {int(d.labels[row])}, score {float(d.scores[row]):.2f}", fontsize=11)
    axes.set_xlabel("orange: predicted, green: true,\nyellow: anchor centre", fontsize=9)
