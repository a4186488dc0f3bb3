"""How far two trainings are apart, and how far they may be.

Training amplifies rounding: two runs that differ in the last bit of one sum separate step by step
until chance rules the rest, whatever the loss kernels are. So the yardstick for ours is a control:
plain PyTorch again, same seed, same batches, rounded differently. There are two: another thread
count (other orders of summation everywhere), and loss objects computed in float64 and rounded to
float32 (other rounding of the losses alone, which is what fused losses change). And there are two
measures, because each alone would be blind at one end of a run:

- whole run: the root mean square, over the steps, of the relative difference of the losses. Once
  chance rules it still varies from pair to pair, but less than the largest difference of the
  smoothed curves, which hangs on one moment and is reported beside it.
- early: the largest relative difference over the first EARLY_STEPS, before rounding has grown.
  Here a wrong gradient shows that the later noise would hide.

In both ours may be as far from plain as LIMIT times the farther control, or the resolution of the
loss where that is more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WINDOW = 20
EARLY_STEPS = 10
LIMIT = 2.0
# A loss is a float32 sum of nine terms (three losses on three levels), each a float32 sum over rows
RESOLUTION = 8 * float(np.finfo(np.float32).eps)


# What is judged: fields of Distance, and what they are called
MEASURES = {"rms": "rms over all steps", "early": f"largest over the first {EARLY_STEPS} steps"}


@dataclass
class Distance:
    largest: float  # of the curves smoothed over WINDOW steps, relative
    at_step: int  # where: the last step of the mean, from 1
    early: float  # largest of the raw curves over the first EARLY_STEPS, relative
    rms: float  # of the raw curves over the whole run, relative
    final: float  # of the means over the last WINDOW steps, relative


def smooth(curve, window: int = WINDOW) -> np.ndarray:
    """Mean of each step and the up to window - 1 steps before it: [steps] -> [steps]."""
    sums = np.concatenate(([0.0], np.cumsum(np.asarray(curve, dtype=np.float64))))
    last = np.arange(1, len(sums))
    first = np.maximum(last - window, 0)
    return (sums[last] - sums[first]) / (last - first)


def relative_difference(curve, base) -> np.ndarray:
    curve, base = np.asarray(curve, dtype=np.float64), np.asarray(base, dtype=np.float64)
    return np.abs(curve - base) / np.abs(base)


def distance(curve, base) -> Distance:
    smoothed = relative_difference(smooth(curve), smooth(base))
    raw = relative_difference(curve, base)
    worst = int(smoothed.argmax())
    return Distance(
        largest=float(smoothed[worst]),
        at_step=worst + 1,
        early=float(raw[:EARLY_STEPS].max()),
        rms=float(np.sqrt((raw**2).mean())),
        final=float(smoothed[-1]),
    )


def allowed(measure: str, controls: list[Distance]) -> float:
    """How far ours may be from plain PyTorch in one of MEASURES."""
    return max(LIMIT * max(getattr(control, measure) for control in controls), RESOLUTION)


def objections(ours: Distance, controls: list[Distance]) -> list[str]:
    """What is wrong with the agreement of ours and plain PyTorch; empty if nothing is."""
    found = []
    if any(control.rms == 0 for control in controls):
        found.append(
            "a control is bit-identical to plain PyTorch, so it measures no rounding: the"
            " comparison means nothing on this machine"
        )
    for measure, title in MEASURES.items():
        apart, limit = getattr(ours, measure), allowed(measure, controls)
        if not apart <= limit:  # a NaN must not pass
            found.append(
                f"{title}: ours differs from plain PyTorch by {apart:.2e}, allowed are"
                f" {limit:.2e} ({LIMIT:g} times the farther control)"
            )
    return found
