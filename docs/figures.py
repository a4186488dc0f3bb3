"""``python docs/figures.py``: the figures of the documentation, from gfl_kernels.reference."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first)
import torch  # noqa: E402

from gfl_kernels import reference  # noqa: E402

OUT = Path(__file__).parent / "figures"
BLUE, ORANGE, RED, GREY = "#2f6f9f", "#cf7f24", "#c44e52", "#8a8a8a"


def value_and_slope(function, x):
    x = x.clone().requires_grad_()
    value = function(x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), slope


def quality():
    """QFL against the logit for three targets, and its derivative."""
    x = torch.linspace(-8, 8, 801, dtype=torch.float64)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for q, colour in ((0.0, GREY), (0.6, BLUE), (1.0, ORANGE)):
        target = torch.full_like(x, q)
        value, slope = value_and_slope(lambda t, q=target: reference.quality_loss(t, q, 2.0), x)
        plain, plain_slope = value_and_slope(lambda t, q=target: reference.bce_with_logits(t, q), x)
        for axis, curve, dashed in zip(axes, (value, slope), (plain, plain_slope), strict=True):
            axis.plot(x, curve, color=colour, label=f"q = {q:g}")
            axis.plot(x, dashed, color=colour, linewidth=1.2, linestyle=":")
    axes[0].set(title="loss", ylim=(0, 6))
    axes[1].set(title="derivative", ylim=(-3, 3))
    axes[0].legend(title="solid: QFL, dotted: BCE", frameon=False)
    return figure, axes


def modulation():
    """The factor |s - q|^beta for a target of 0.6."""
    s = torch.linspace(0, 1, 501, dtype=torch.float64)
    figure, axis = plt.subplots(figsize=(5, 3.2))
    for beta, colour in ((0.5, RED), (1.0, ORANGE), (2.0, BLUE), (3.0, GREY)):
        axis.plot(s, reference.pow_abs(s - 0.6, beta), color=colour, label=f"beta = {beta:g}")
    axis.set(xlabel="score s", ylabel="|s - 0.6|^beta")
    axis.legend(frameon=False)
    return figure, [axis]


def distribution():
    """A distribution over 17 bins, what DFL pulls at, and what the integral reads."""
    bins = torch.arange(17, dtype=torch.float64)
    z = -((bins - 6.4) ** 2) / 3
    target = torch.tensor(7.3, dtype=torch.float64)
    left, wl, wr = reference.split_target(target, 17)
    _, slope = value_and_slope(
        lambda t: reference.distribution_loss(t[None], left[None], wl[None], wr[None]), z
    )
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    axes[0].bar(bins, z.softmax(0), color=BLUE, label="p = softmax(z)")
    mean = reference.expectation(z, bins).item()
    axes[0].axvline(mean, color=ORANGE, label=f"integral, {mean:.2f}")
    axes[0].axvline(target.item(), color=RED, linestyle="--", label=f"target, {target:.1f}")
    axes[0].set(title="a side of a box", xlabel="bin")
    axes[0].legend(frameon=False)
    axes[1].bar(bins, slope, color=[RED if value < 0 else GREY for value in slope])
    axes[1].set(title="derivative of the DFL: bins 7 and 8 are raised", xlabel="bin")
    return figure, axes


def main() -> None:
    OUT.mkdir(exist_ok=True)
    plt.rcParams |= {"svg.hashsalt": "gfl_kernels", "font.size": 9}
    for draw in (quality, modulation, distribution):
        figure, axes = draw()
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        figure.savefig(OUT / f"{draw.__name__}.svg", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
