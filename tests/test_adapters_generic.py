"""accelerate(Python module) and accelerate(model) on code that descends from mmdetection's, as
other repositories have it, and on code that only looks like it."""

import functools
import re
import types

import pytest
import torch
import torch.nn.functional as F
from support import assert_no_worse, logits, random_upstream, to_double
from torch import nn

from gfl_kernels.adapters import accelerate, restore

try:
    from torchvision.ops import boxes as torchvision_boxes
    from torchvision.ops import sigmoid_focal_loss as torchvision_focal
except ImportError:
    torchvision_boxes = torchvision_focal = None


def weighted_loss(loss_func):
    @functools.wraps(loss_func)
    def wrapper(pred, target, weight=None, reduction="mean", avg_factor=None, **kwargs):
        loss = loss_func(pred, target, **kwargs)
        loss = loss if weight is None else loss * weight
        if avg_factor is not None and reduction == "mean":
            return loss.sum() / avg_factor
        return {"none": lambda x: x, "mean": torch.mean, "sum": torch.sum}[reduction](loss)

    return wrapper


def _quality(pred, target, beta, logits=True):
    label, score = target
    sigmoid = pred.sigmoid() if logits else pred
    cross = F.binary_cross_entropy_with_logits if logits else F.binary_cross_entropy
    target = torch.zeros_like(pred)
    inside = (label >= 0) & (label < pred.shape[1])
    target[inside, label[inside].long()] = score[inside].to(pred.dtype)
    return (cross(pred, target, reduction="none") * (target - sigmoid).abs() ** beta).sum(1)


@weighted_loss
def quality_focal_loss(pred, target, beta=2.0):
    return _quality(pred, target, beta)


@weighted_loss
def switched(pred, target, beta=2.0, use_sigmoid=True):
    return _quality(pred, target, beta, use_sigmoid)


@weighted_loss
def one_based(pred, target, beta=2.0):
    return _quality(pred, (target[0] - 1, target[1]), beta)


@weighted_loss
def per_class(pred, target, beta=2.0):
    return _quality(pred, target, beta)[:, None].expand_as(pred)


@weighted_loss
def distribution_focal_loss(pred, label):
    left = label.long()
    return F.cross_entropy(pred, left, reduction="none") * (left + 1 - label) + F.cross_entropy(
        pred, left + 1, reduction="none"
    ) * (label - left)


def varifocal_loss(
    pred,
    target,
    weight=None,
    alpha=0.75,
    gamma=2.0,
    iou_weighted=True,
    reduction="mean",
    avg_factor=None,
):
    positive = (target > 0).to(pred.dtype)
    focal = alpha * (pred.sigmoid() - target).abs() ** gamma * (1 - positive)
    focal = focal + (target if iou_weighted else 1) * positive
    loss = F.binary_cross_entropy_with_logits(pred, target, reduction="none") * focal
    loss = loss if weight is None else loss * weight
    if avg_factor is not None and reduction == "mean":
        return loss.sum() / avg_factor
    return {"none": lambda x: x, "mean": torch.mean, "sum": torch.sum}[reduction](loss)


class Integral(nn.Module):
    def __init__(self, reg_max=16):
        super().__init__()
        self.reg_max = reg_max
        self.register_buffer("project", torch.linspace(0, reg_max, reg_max + 1))


class NanoDetIntegral(Integral):
    def forward(self, x):
        rows = x.reshape(*x.shape[:-1], 4, self.reg_max + 1).softmax(-1)
        return F.linear(rows, self.project.type_as(x)).reshape(*x.shape[:-1], 4)


class SixSides(Integral):
    def forward(self, x):
        rows = x.reshape(-1, self.reg_max + 1).softmax(-1)
        return F.linear(rows, self.project.type_as(x)).reshape(-1, 6)


class DFineIntegral(nn.Module):
    def __init__(self, reg_max=32):
        nn.Module.__init__(self)
        self.reg_max = reg_max

    def forward(self, x, project):
        rows = x.reshape(-1, self.reg_max + 1).softmax(dim=1)
        return F.linear(rows, project.to(x.device)).reshape(*x.shape[:-1], -1)


class DFINECriterion(nn.Module):
    def unimodal_distribution_focal_loss(
        self, pred, label, weight_right, weight_left, weight=None, reduction="sum", avg_factor=None
    ):
        left = label.long()
        loss = F.cross_entropy(pred, left, reduction="none") * weight_left.reshape(-1)
        loss = loss + F.cross_entropy(pred, left + 1, reduction="none") * weight_right.reshape(-1)
        loss = loss if weight is None else loss * weight.float()
        if avg_factor is not None:
            return loss.sum() / avg_factor
        return {"none": lambda x: x, "mean": torch.mean, "sum": torch.sum}[reduction](loss)


class DETRCriterion(nn.Module):
    """The parts of RT-DETR's, D-FINE's and DEIM's criteria around their classification losses."""

    def __init__(self, num_classes=4, alpha=0.2, gamma=2.0, mal_alpha=None):
        nn.Module.__init__(self)  # see python_module
        self.num_classes, self.alpha, self.gamma = num_classes, alpha, gamma
        self.mal_alpha = mal_alpha

    def _get_src_permutation_idx(self, indices):
        images = [torch.full_like(queries, i) for i, (queries, _) in enumerate(indices)]
        return torch.cat(images), torch.cat([queries for queries, _ in indices])

    def _dense(self, outputs, targets, indices, values):
        """(one-hot classes, IoU there) of every query."""
        x, queries = outputs["pred_logits"], self._get_src_permutation_idx(indices)
        classes = torch.full(x.shape[:2], self.num_classes)
        classes[queries] = torch.cat(
            [t["labels"][j] for t, (_, j) in zip(targets, indices, strict=True)]
        )
        onehot = F.one_hot(classes, self.num_classes + 1)[..., :-1].to(x.dtype)
        if values is None:
            boxes = torch.cat([t["boxes"][j] for t, (_, j) in zip(targets, indices, strict=True)])
            pairs = (
                torchvision_boxes.box_convert(b, "cxcywh", "xyxy")
                for b in (outputs["pred_boxes"][queries], boxes)
            )
            values = torchvision_boxes.box_iou(*pairs).diag().detach()
        score = torch.zeros(x.shape[:2], dtype=x.dtype)
        score[queries] = values.to(x.dtype)
        return onehot, score.unsqueeze(-1) * onehot

    def _mean(self, x, target, weight, num_boxes):
        loss = F.binary_cross_entropy_with_logits(x, target, weight=weight, reduction="none")
        return loss.mean(1).sum() * x.shape[1] / num_boxes

    def loss_labels_vfl(self, outputs, targets, indices, num_boxes, values=None):
        x = outputs["pred_logits"]
        onehot, score = self._dense(outputs, targets, indices, values)
        weight = self.alpha * x.sigmoid().detach() ** self.gamma * (1 - onehot) + score
        return {"loss_vfl": self._mean(x, score, weight, num_boxes)}

    def loss_labels_mal(self, outputs, targets, indices, num_boxes, values=None):
        x = outputs["pred_logits"]
        onehot, score = self._dense(outputs, targets, indices, values)
        weight = x.sigmoid().detach() ** self.gamma * (1 - onehot)
        weight = weight if self.mal_alpha is None else self.mal_alpha * weight
        return {"loss_mal": self._mean(x, score**self.gamma, weight + onehot, num_boxes)}

    def loss_labels_focal(self, outputs, targets, indices, num_boxes):
        x = outputs["pred_logits"]
        onehot, _ = self._dense(outputs, targets, indices, None)
        loss = torchvision_focal(x, onehot, self.alpha, self.gamma, reduction="none")
        return {"loss_focal": loss.mean(1).sum() * x.shape[1] / num_boxes}


class ThroughTheWeight(DETRCriterion):
    """Its gradient is another, though its loss is not."""

    def loss_labels_vfl(self, outputs, targets, indices, num_boxes, values=None):
        x = outputs["pred_logits"]
        onehot, score = self._dense(outputs, targets, indices, values)
        weight = self.alpha * x.sigmoid() ** self.gamma * (1 - onehot) + score
        loss = weight * F.binary_cross_entropy_with_logits(x, score, reduction="none")
        return {"loss_vfl": loss.sum() / num_boxes}


class QualityFocalLoss(nn.Module):
    def __init__(self, beta=2.0, reduction="mean", loss_weight=1.0):
        super().__init__()
        self.beta, self.reduction, self.loss_weight = beta, reduction, loss_weight

    def forward(self, pred, target, weight=None, avg_factor=None, reduction_override=None):
        reduction = reduction_override or self.reduction
        return self.loss_weight * quality_focal_loss(
            pred, target, weight, beta=self.beta, reduction=reduction, avg_factor=avg_factor
        )


class Summed(QualityFocalLoss):
    def forward(self, pred, target, weight=None, avg_factor=None, reduction_override=None):
        return super().forward(pred, target, weight).sum() * 2


def renamed(kind, name, module):
    return type(name, (kind,), {"__module__": module, **vars(kind)})


def python_module(name="somebody.losses", **members):
    """A Python module with these functions, and with classes as if it had defined them."""
    module = types.ModuleType(name)
    for key, value in members.items():
        if isinstance(value, type):
            # A method's zero-argument super() is bound to the class it was written in.
            value = type(key, value.__bases__, {**vars(value), "__module__": name})
        setattr(module, key, value)
    return module


def check(call, pred, module):
    """A call of something in the module: accelerated, as it was, and in float64."""
    results = []
    for patched, number in ((True, lambda x: x), (False, lambda x: x), (False, to_double)):
        leaf = number(pred).detach().requires_grad_()
        report = accelerate(module) if patched else None
        value = call(leaf)
        if report:
            assert report.replaced
            report.restore()
        results.append((value.detach(), *torch.autograd.grad(value, leaf, random_upstream(value))))
    for got, eager, truth in zip(*results, strict=True):
        assert got.dtype == eager.dtype
        assert_no_worse(got, truth, eager, what=module.__name__, scale=16)


LABEL, SCORE = torch.tensor([0, 2, 3, -1, 1]), torch.tensor([0.5, 0.0, 0.3, 0.2, 1.0])
WEIGHT = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0])


def test_nanodet():
    module = python_module(
        quality_focal_loss=quality_focal_loss,
        distribution_focal_loss=distribution_focal_loss,
        varifocal_loss=varifocal_loss,
        Integral=NanoDetIntegral,
    )
    before = dict(vars(module)), dict(vars(module.Integral))
    with accelerate(module) as report:
        assert sorted(report.replaced) == [
            "somebody.losses.Integral.forward",
            "somebody.losses.distribution_focal_loss",
            "somebody.losses.quality_focal_loss",
            "somebody.losses.varifocal_loss",
        ]
        assert accelerate(module).replaced == []
    assert (dict(vars(module)), dict(vars(module.Integral))) == before

    pred = logits(5, 3, extremes=False)
    check(lambda x: module.quality_focal_loss(x, (LABEL, SCORE), WEIGHT, "none"), pred, module)
    check(
        lambda x: module.quality_focal_loss(x, (LABEL, SCORE), WEIGHT, beta=1.5, avg_factor=3.0),
        pred,
        module,
    )
    target = torch.tensor([0.0, 1.5, 6.9, 3.0, 2.25])
    rows = logits(5, 8, extremes=False)
    check(lambda x: module.distribution_focal_loss(x, target, WEIGHT, "none"), rows, module)
    soft, elements = torch.rand(5, 3).round(decimals=1), torch.rand(5, 3)
    for reduction in ("none", "mean"):
        check(
            lambda x, r=reduction: module.varifocal_loss(
                x, soft.to(x.dtype), elements.to(x.dtype), gamma=1.5, reduction=r
            ),
            pred,
            module,
        )
    sides = logits(2, 3, 4 * 17, extremes=False)
    check(lambda x: module.Integral().to(x.dtype)(x), sides, module)


def test_gfocalv2():
    module = python_module(quality_focal_loss=switched)
    pred = logits(5, 3, extremes=False)
    for use_sigmoid, x in ((True, pred), (False, pred.sigmoid())):
        check(
            lambda x, use=use_sigmoid: module.quality_focal_loss(
                x, (LABEL, SCORE), WEIGHT, use_sigmoid=use, avg_factor=3.0
            ),
            x,
            module,
        )


def test_dfine():
    module = python_module(Integral=DFineIntegral, DFINECriterion=DFINECriterion)
    bins = torch.linspace(-2, 2, 33) ** 3
    x = logits(2, 3, 4 * 33, extremes=False)
    check(lambda x: module.Integral()(x, bins.to(x.dtype)), x, module)
    pred, left = logits(5, 33, extremes=False), torch.tensor([0, 31, 5, 7, 20])
    a, b = torch.rand(2, 5)
    criterion = module.DFINECriterion()
    for options in ({}, {"weight": WEIGHT, "avg_factor": 3.0}, {"reduction": "mean"}):
        check(
            lambda x, options=options: criterion.unimodal_distribution_focal_loss(
                x, left, a, b, **options
            ),
            pred,
            module,
        )


@pytest.mark.parametrize("loss", ["vfl", "mal", "focal"])
@pytest.mark.parametrize("given", [False, True])
def test_criteria_of_the_detr_family(loss, given):
    pytest.importorskip("torchvision", reason="the criteria need torchvision")
    module = python_module(Criterion=DETRCriterion)
    criterion = module.Criterion(num_classes=11, alpha=0.7, gamma=1.5, mal_alpha=0.4)
    counts, queries = (2, 0, 3), 8
    boxes = torch.rand(3, queries, 4) * 0.3 + 0.3
    indices = [(torch.randperm(queries)[:n], torch.randperm(n)) for n in counts]
    classes = [torch.randint(11, (n,)) for n in counts]
    values = {"values": torch.rand(sum(counts))} if given and loss != "focal" else {}

    def call(x):
        outputs = {"pred_logits": x, "pred_boxes": boxes.to(x.dtype)}
        targets = [
            {"labels": label, "boxes": boxes[i, : len(label)].to(x.dtype) + 0.05}
            for i, label in enumerate(classes)
        ]
        (value,) = getattr(criterion, f"loss_labels_{loss}")(
            outputs, targets, indices, 5.0, **values
        ).values()
        return value

    check(call, logits(3, queries, 11), module)
    with accelerate(module) as report:
        assert f"somebody.losses.Criterion.loss_labels_{loss}" in report.replaced


def test_a_criterion_with_another_gradient_is_left_and_named():
    pytest.importorskip("torchvision", reason="the criteria need torchvision")
    module = python_module(Criterion=ThroughTheWeight)
    with accelerate(module) as report:
        assert report.replaced == []
    (reason,) = report.left.values()
    assert reason == "its numbers are not those of the loss that is known by this name"
    model = nn.ModuleDict({"criterion": renamed(DETRCriterion, "Criterion", "somebody")()})
    with accelerate(model) as report:
        assert report.replaced == [
            f"criterion.loss_labels_{loss}" for loss in ("vfl", "mal", "focal")
        ]
    assert "loss_labels_vfl" not in vars(model["criterion"])


@pytest.mark.parametrize(
    "name, member, why",
    [
        ("quality_focal_loss", one_based, "its numbers are not those of the loss"),
        ("quality_focal_loss", per_class, "it could not be tried|it returns"),
        ("distribution_focal_loss", lambda pred, label: pred, r"its signature is another: \(pred"),
        ("Integral", SixSides, "it could not be tried|it returns"),
    ],
)
def test_what_only_looks_alike_is_left_and_named(name, member, why):
    module = python_module(**{name: member})
    before = dict(vars(module))
    report = accelerate(module)
    assert report.replaced == [] and dict(vars(module)) == before
    (reason,) = report.left.values()
    assert re.match(why, reason), reason
    assert str(report).endswith("nothing was replaced")


def test_a_model_of_any_code_base():
    quality = renamed(QualityFocalLoss, "QualityFocalLoss", "somebody")
    model = nn.ModuleDict(
        {
            "loss": quality(loss_weight=0.5),
            "odd": renamed(Summed, "QualityFocalLoss", "somebody")(),
            "integral": renamed(NanoDetIntegral, "Integral", "somebody")(7),
            "criterion": DFINECriterion(),
            "conv": nn.Conv2d(1, 1, 1),
        }
    )
    pred, target = logits(5, 3, extremes=False), (LABEL, SCORE)
    sides = logits(6, 32, extremes=False)
    calls = (lambda: model["loss"](pred, target, WEIGHT, 2.0), lambda: model["integral"](sides))
    expected = [call() for call in calls]
    report = accelerate(model)
    assert report.replaced == [
        "loss.forward",
        "integral.forward",
        "criterion.unimodal_distribution_focal_loss",
    ]
    assert list(report.left) == ["odd.forward"]
    torch.testing.assert_close([call() for call in calls], expected)
    assert list(model.state_dict()) == ["integral.project", "conv.weight", "conv.bias"]
    with torch.no_grad():
        traced = torch.jit.trace(model["integral"], sides)
    assert "gfl_kernels" not in str(traced.graph)
    assert len(restore(model)) == 3
    assert not any("forward" in vars(module) for module in model.modules())
