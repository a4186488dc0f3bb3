"""Scenes composed from scikit-learn's bundled scans of handwritten digits; nothing is downloaded.

A scan is 8 x 8 pixels. A scene holds several, each enlarged, turned, slanted and dimmed at random,
on an uneven background among strokes and scrambled scans, which look like ink but carry no label.
Training and held-out scenes never share a scan. Everything follows from the seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from sklearn.datasets import load_digits
from torch import Tensor

IMAGE_SIZE = 128
NUM_CLASSES = 10
HELD_OUT_SCANS = 500
DIGITS_PER_SCENE = (3, 7)
# Side of the square a scan is enlarged to, pixels; its ink fills about 0.8 of the height.
SIDE_RANGE = (20, 112)
INK_THRESHOLD = 0.3
MAX_OVERLAP = 0.1


@dataclass
class Scenes:
    images: Tensor  # [S, 1, IMAGE_SIZE, IMAGE_SIZE] float32, mean about 0
    boxes: list[Tensor]  # per scene [n, 4] xyxy pixels, tight round the ink
    labels: list[Tensor]  # per scene [n] int64

    def __len__(self) -> int:
        return len(self.boxes)


def scans(held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scans [M, 8, 8] in [0, 1] and their digits [M]; the split is the same on every machine."""
    bundle = load_digits()
    order = np.random.default_rng(0).permutation(len(bundle.target))
    chosen = order[:HELD_OUT_SCANS] if held_out else order[HELD_OUT_SCANS:]
    return bundle.images[chosen] / 16.0, bundle.target[chosen]


def make_scenes(count: int, seed: int, held_out: bool) -> Scenes:
    source = scans(held_out)
    # One generator per scene: a longer list starts with the shorter one.
    composed = [_compose(np.random.default_rng((seed, held_out, i)), *source) for i in range(count)]
    images, boxes, labels = zip(*composed, strict=True)
    return Scenes(
        images=torch.from_numpy(np.stack(images)).float().unsqueeze(1),
        boxes=[torch.tensor(b, dtype=torch.float32) for b in boxes],
        labels=[torch.tensor(label, dtype=torch.int64) for label in labels],
    )


def _compose(rng, digit_scans, digits):
    canvas = _background(rng)
    for _ in range(rng.integers(2, 5)):
        _stroke(canvas, rng)
    for _ in range(rng.integers(1, 3)):
        scrap = _scramble(digit_scans[rng.integers(len(digits))], rng)
        side = int(rng.integers(20, 50))
        x, y = rng.integers(0, IMAGE_SIZE - side, size=2)
        _blend(canvas, _enlarge(scrap, side, rng), x, y, rng.uniform(0.2, 0.5))
    boxes, labels = [], []
    for _ in range(rng.integers(DIGITS_PER_SCENE[0], DIGITS_PER_SCENE[1] + 1)):
        index = rng.integers(len(digits))
        side = int(np.exp(rng.uniform(*np.log(SIDE_RANGE))))
        ink = _enlarge(digit_scans[index], side, rng)
        left, top, right, bottom = _extent(ink)
        x, y = _free_place(rng, side, (left, top, right, bottom), boxes)
        if x is None:
            continue
        _blend(canvas, ink, x, y, rng.uniform(0.55, 1.0))
        boxes.append((x + left, y + top, x + right, y + bottom))
        labels.append(int(digits[index]))
    noisy = canvas + rng.normal(0.0, 0.03, canvas.shape)
    return (noisy - 0.3) / 0.3, boxes, labels


def _background(rng) -> np.ndarray:
    coarse = rng.uniform(0.05, 0.4, size=(5, 5))
    return ndimage.zoom(coarse, IMAGE_SIZE / 5, order=1, grid_mode=True, mode="nearest")


def _stroke(canvas: np.ndarray, rng) -> None:
    """A straight soft stroke of random place, width and brightness."""
    start, end = rng.uniform(0, IMAGE_SIZE, size=(2, 2))
    y, x = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE]
    along = end - start
    length_sq = max(float(along @ along), 1.0)
    t = np.clip(((x - start[0]) * along[0] + (y - start[1]) * along[1]) / length_sq, 0, 1)
    distance = np.hypot(x - start[0] - t * along[0], y - start[1] - t * along[1])
    ink = np.clip(rng.uniform(1.0, 3.0) - distance, 0, 1) * rng.uniform(0.2, 0.6)
    canvas[:] = canvas * (1 - ink) + ink


def _scramble(scan: np.ndarray, rng) -> np.ndarray:
    """The four quarters of a scan in another order, each turned: ink that is no digit."""
    quarters = [scan[:4, :4], scan[:4, 4:], scan[4:, :4], scan[4:, 4:]]
    turned = [np.rot90(quarters[i], 1 + rng.integers(3)) for i in rng.permutation(4)]
    return np.block([[turned[0], turned[1]], [turned[2], turned[3]]])


def _enlarge(scan: np.ndarray, side: int, rng) -> np.ndarray:
    """A scan with a margin of one pixel, turned and slanted: ink [side, side] in [0, 1]."""
    angle, slant = rng.uniform(-0.2, 0.2), rng.uniform(-0.25, 0.25)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[1.0, 0.0], [slant, rng.uniform(0.9, 1.2)]]) * (10 / side)
    center = np.full(2, 4.5)
    offset = center - matrix @ np.full(2, (side - 1) / 2)
    ink = ndimage.affine_transform(np.pad(scan, 1), matrix, offset, (side, side), order=3)
    return np.clip(ink, 0, 1)


def _extent(ink: np.ndarray) -> tuple[int, int, int, int]:
    rows = np.flatnonzero((ink > INK_THRESHOLD).any(axis=1))
    columns = np.flatnonzero((ink > INK_THRESHOLD).any(axis=0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def _free_place(rng, side, extent, boxes):
    """A corner for a side x side patch whose ink overlaps no box by more than MAX_OVERLAP."""
    left, top, right, bottom = extent
    for _ in range(20):
        x, y = (int(v) for v in rng.integers(0, IMAGE_SIZE - side + 1, size=2))
        for other in boxes:
            width = min(x + right, other[2]) - max(x + left, other[0])
            height = min(y + bottom, other[3]) - max(y + top, other[1])
            smaller = min(
                (right - left) * (bottom - top), (other[2] - other[0]) * (other[3] - other[1])
            )
            if max(width, 0) * max(height, 0) > MAX_OVERLAP * smaller:
                break
        else:
            return x, y
    return None, None


def _blend(canvas: np.ndarray, ink: np.ndarray, x: int, y: int, strength: float) -> None:
    patch = canvas[y : y + ink.shape[0], x : x + ink.shape[1]]
    patch[:] = patch * (1 - strength * ink) + strength * ink
