"""Value checks of GFL_KERNELS_DEBUG=1. They read the tensors on the host: off otherwise."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

_SLACK = 1e-5  # an IoU rounded to 1.000001 is not a mistake


def _first_bad(name: str, argument: str, tensor: Tensor, bad: Tensor, expected: str) -> None:
    if bad.any():
        index = tuple(bad.nonzero()[0].tolist())
        where = index[0] if len(index) == 1 else index
        value = tensor[index].item()
        raise ValueError(
            f"{name}: {argument} must be {expected}; row {where} has {value} "
            f"({int(bad.sum())} such rows)"
        )


def _outside(values: Tensor, low: float, high: float) -> Tensor:
    values = values.double()
    return ~((values >= low) & (values <= high))  # also NaN


def check_quality(
    name: str, pred: Tensor, target: Tensor, score: Tensor | None, class_dim: int, activated: bool
) -> None:
    classes = pred.shape[class_dim]
    if score is None:
        _first_bad(name, "target", target, _outside(target, -_SLACK, 1 + _SLACK), "in [0, 1]")
    else:
        # -1 and C are the two common codes of background.
        _first_bad(name, "label", target, _outside(target, -1, classes), f"in [-1, {classes}]")
        _first_bad(name, "score", score, _outside(score, -_SLACK, 1 + _SLACK), "in [0, 1]")
    if activated:
        _first_bad(
            name,
            "pred",
            pred.detach(),
            _outside(pred.detach(), 0, 1),
            "in [0, 1] with activated=True",
        )


def check_distribution(name: str, target: Tensor, weight_left: Tensor | None, bins: int) -> None:
    argument = "target" if weight_left is None else "left"
    _first_bad(name, argument, target, _outside(target, 0, bins - 1), f"in [0, {bins - 1}]")


def check_head(name: str, labels: Sequence[Tensor], classes: int) -> None:
    for level, label in enumerate(labels):
        _first_bad(
            name, f"labels[{level}]", label, _outside(label, -1, classes), f"in [-1, {classes}]"
        )
