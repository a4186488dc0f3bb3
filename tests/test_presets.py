"""gfl_kernels.presets: each host's numbers, from its formulas written out here, in float64."""

import dataclasses
import inspect

import pytest
import torch
import torch.nn.functional as F
from support import random_upstream

import gfl_kernels
from gfl_kernels import presets

NAMES = [name for name in presets.__all__ if name != "Preset"]
LABEL = torch.tensor([0, 3, 4, -1, 2, 1, 3])
SCORE = torch.tensor([0.3, 0.9, 0.0, 0.0, 0.0, 1.0, 0.55], dtype=torch.float64)  # a positive of 0


def scores(classes=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(LABEL), classes, generator=generator, dtype=torch.float64) * 3


def spread(classes=4):
    """(one-hot of the labels inside [0, C), the score at each)."""
    inside = (LABEL >= 0) & (LABEL < classes)
    one_hot = F.one_hot(LABEL.clamp(0, classes - 1), classes) * inside[:, None]
    return one_hot.double(), one_hot * SCORE[:, None]


def entropy(x, t):
    return F.binary_cross_entropy_with_logits(x, t, reduction="none")


def quality(x):
    _, q = spread()
    return (q - x.sigmoid()).abs() ** 2 * entropy(x, q)


def quality_of_probabilities(p):
    _, q = spread()
    return (q - p).abs() ** 2 * F.binary_cross_entropy(p, q, reduction="none")


def plain(x):
    return entropy(x, spread()[1])


def varifocal(x):
    one_hot, q = spread()
    return (0.75 * x.sigmoid() ** 2 * (1 - one_hot) + q * one_hot) * entropy(x, q)


def varifocal_of_probabilities(p):
    one_hot, q = spread()
    weight = 0.75 * p**2 * (1 - one_hot) + q * one_hot
    return weight * F.binary_cross_entropy(p, q, reduction="none")


def detached(alpha):
    def loss(x):
        one_hot, q = spread()
        return (alpha * x.detach().sigmoid() ** 2 * (1 - one_hot) + q) * entropy(x, q)

    return loss


def matchability(x):
    one_hot, q = spread()
    weight = x.detach().sigmoid() ** 1.5 * (1 - one_hot) + one_hot
    return weight * entropy(x, q**1.5)


def iou_aware(x):
    one_hot, q = spread()
    p = x.sigmoid()
    t = (p.detach() ** 0.25 * q**0.75).clamp(min=0.01)
    positive = torch.where(one_hot > 0, t, 0.0)
    negative = torch.where(one_hot > 0, 1 - t, p**2)
    return -positive * F.logsigmoid(x) - negative * F.logsigmoid(-x)


CLASSIFICATION = {
    "mmdet": quality,
    "nanodet": quality,
    "gfocalv2": quality_of_probabilities,
    "ultralytics": plain,
    "yolov6": varifocal_of_probabilities,
    "super_gradients": varifocal,
    "ppyoloe": varifocal_of_probabilities,
    "rtdetr": detached(0.75),
    "dfine": detached(0.2),
    "deim": matchability,
    "rfdetr": iou_aware,
}


def gradient(function, x):
    leaf = x.detach().requires_grad_()
    value = function(leaf)
    return value.detach(), *torch.autograd.grad(value, leaf, random_upstream(value))


@pytest.mark.parametrize("name", NAMES)
def test_classification(name):
    preset = getattr(presets, name)
    x = scores()
    x = x.sigmoid() if preset.options.get("activated") else x
    got = gradient(lambda x: preset.classification(x, (LABEL, SCORE), reduction="none"), x)
    expected = gradient(lambda x: CLASSIFICATION[name](x).sum(1), x)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


# name -> (bins, the end of the targets, whether the mean over the sides is taken), as upstream
# writes them
SIDES = {
    "mmdet": (17, 16 - 0.1, False),
    "nanodet": (8, 7 - 0.1, False),
    "gfocalv2": (17, 16 - 0.1, False),
    "ultralytics": (16, 16 - 1 - 0.01, True),
    "yolov6": (17, 16 - 0.01, True),
    "super_gradients": (17, 16 - 0.01, True),
    "ppyoloe": (17, 17 - 1 - 0.01, True),
}


@pytest.mark.parametrize("name", NAMES)
def test_distribution(name):
    preset = getattr(presets, name)
    if name in ("rtdetr", "rfdetr"):
        with pytest.raises(ValueError, match="this host has no distributions"):
            preset.distribution(None, None)
        return
    generator = torch.Generator().manual_seed(2)
    pred = torch.randn(5, 4, preset.bins, generator=generator, dtype=torch.float64)
    weight = torch.rand(5, generator=generator, dtype=torch.float64)
    if preset.explicit_bins:
        left = torch.randint(preset.bins - 1, (5, 4), generator=generator)
        a, b = torch.rand(2, 5, 4, generator=generator, dtype=torch.float64)
        target, mean = (left, a, b), False
        assert preset.bins == 33
    else:
        bins, end, mean = SIDES[name]
        assert preset.bins == bins
        target = torch.rand(5, 4, generator=generator, dtype=torch.float64) * (bins + 2) - 1
        clamped = target.clamp(0, end)
        left = clamped.long()
        a, b = left + 1 - clamped, clamped - left

    def written_out(z):
        logs = z.log_softmax(-1)
        at = lambda k: logs.gather(-1, k.unsqueeze(-1)).squeeze(-1)  # noqa: E731
        loss = -(a * at(left) + b * at(left + 1))
        return loss.mean(-1) if mean else loss

    def close(got, expected):
        torch.testing.assert_close(
            gradient(got, pred), gradient(expected, pred), rtol=1e-7, atol=1e-9
        )

    close(lambda z: preset.distribution(z, target, reduction="none"), written_out)
    close(lambda z: preset.distribution(z, target, reduction="sum"), lambda z: written_out(z).sum())
    close(lambda z: preset.distribution(z, target), lambda z: written_out(z).mean())
    rows = weight if mean else weight[:, None].expand(5, 4)
    close(
        lambda z: preset.distribution(z, target, weight=rows, avg_factor=3.0),
        lambda z: (written_out(z) * rows).sum() / 3,
    )


def test_divisors():
    assert presets.mmdet.divisor(0.25) == 1 + 2.0**-23
    assert presets.gfocalv2.divisor(0.25) == 0.25
    # YOLOv6 divides where the sum of scores is above 1
    for total in (0.25, 1.0, 7.5):
        assert presets.yolov6.divisor(total) == (total if total > 1 else 1)
        assert presets.ultralytics.divisor(torch.tensor(total)).item() == max(total, 1)


def test_heads_have_their_hosts_numbers_as_defaults():
    def default(function, name):
        return inspect.signature(function).parameters[name].default

    gfl, aligned = gfl_kernels.gfl_loss, gfl_kernels.task_aligned_loss
    for function, preset in ((gfl, presets.mmdet), (aligned, presets.ultralytics)):
        for name in ("iou", "loss_weights"):
            assert default(function, name) == getattr(preset, name)
        assert default(function, "beta") == preset.options["beta"]
    assert default(gfl, "reg_max") + 1 == presets.mmdet.bins
    assert default(aligned, "alpha") == presets.yolov6.options["alpha"]


@pytest.mark.parametrize("name", NAMES)
def test_records(name):
    preset = getattr(presets, name)
    assert preset.source and callable(getattr(gfl_kernels, preset.loss))
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset.bins = 3
    with pytest.raises(TypeError):
        preset.options["beta"] = 1.0
