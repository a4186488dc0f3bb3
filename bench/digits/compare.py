"""How far two trainings are apart, and how far they may be.

Training amplifies rounding: two runs that differ in the last bit of one sum separate step by step
until chance rules the rest, whatever the loss kernels are. So the yardstick for ours is the
control: plain PyTorch again, same seed, same batches, with another thread count, hence other orders
of summation. Two measures, because one alone would be blind at one end of a run:

- whole run: the root mean square, over the steps, of the relative difference of the losses. Over
  twelve pairs of runs that differed by rounding alone it lay between 3.1e-3 and 4.7e-3, while the
  largest difference of the curves smoothed over 20 steps lay between 3.7e-3 and 8.7e-3: it hangs
  on one moment, so a limit of twice the control would fail by bad luck. It is reported beside.
- early: the largest relative difference over the first EARLY_STEPS, before rounding has grown.
  Here a wrong gradient shows that the later noise would hide.

In both ours may be as far from plain as LIMIT times the control, or the resolution of the loss
where that is more. A further run computes the loss objects in float64 and rounds to float32: it is
not a judge, but shows what another rounding of the losses alone does.
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


def objections(ours: Distance, control: Distance) -> list[str]:
    """What is wrong with the agreement of ours and plain PyTorch; empty if nothing is."""
    found = []
    if control.rms == 0:
        found.append(
            "the control is bit-identical to plain PyTorch, so it measures no rounding: the"
            " comparison means nothing on this machine"
        )
    for measure, title in MEASURES.items():
        apart = getattr(ours, measure)
        allowed = max(LIMIT * getattr(control, measure), RESOLUTION)
        if not apart <= allowed:  # a NaN must not pass
            found.append(
                f"{title}: ours differs from plain PyTorch by {apart:.2e}, allowed are"
                f" {allowed:.2e} ({LIMIT:g} times the control)"
            )
    return found
