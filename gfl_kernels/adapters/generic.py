"""Models and Python modules of any code base: what has a known name, a known signature, and, on a
few small inputs, the numbers of the function that is to stand for it."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .. import dispatch
from . import detr, losses, ultralytics
from .core import Report, mismatch, qualified

BINS = 5


def plan(report: Report, target: nn.Module | types.ModuleType) -> None:
    if isinstance(target, nn.Module):
        for path, instance in instances(target):
            _plan_instance(report, path, instance)
    else:
        for module in _with_submodules(target):
            _plan_module(report, module)


def _with_submodules(module: types.ModuleType) -> list[types.ModuleType]:
    name = module.__name__
    inner = [m for n, m in sys.modules.items() if n.startswith(f"{name}.") and m is not None]
    return [module, *inner]


def _plan_module(report: Report, module: types.ModuleType) -> None:
    for name, value in list(vars(module).items()):
        if isinstance(value, types.FunctionType) and name in FUNCTIONS:
            _replace_first(report, module, name, FUNCTIONS[name], value, qualified(module, name))
        elif isinstance(value, type) and value.__module__ == module.__name__:
            for (kind, method), candidates in METHODS.items():
                if kind in (None, value.__name__) and method in vars(value):
                    label = qualified(value, method)
                    _replace_first(report, value, method, candidates, _sample(value), label)


def _replace_first(report, owner, name, candidates, subject, label) -> None:
    """Replace owner.name by the first candidate with its signature and numbers. owner: a Python
    module, a class or an instance. subject: the function, or an instance of its class, to try; or
    why there is none."""
    if report.stands_for(owner, name):
        report.already.append(label)
        return
    instance = not isinstance(owner, (type, types.ModuleType))
    original = getattr(type(owner) if instance else owner, name)
    whys = []
    for function, probe in candidates:
        why = mismatch(function, original)
        if why is None:
            why = subject if isinstance(subject, str) else _differs(function, probe, subject, name)
        if why is None:
            put = report.replace_bound if instance else report.replace
            put(owner, name, function, label)
            return
        whys.append(why)
    # One that failed for its numbers was nearer than one with another signature.
    report.left[label] = min(whys, key=lambda why: why.startswith("its signature"))


def _sample(kind: type) -> Any:
    """An instance to try a method of, or why there is none."""
    try:
        # Of others than an Integral only CRITERION is read.
        if kind.__name__ == "Integral":
            return kind()
        sample = kind.__new__(kind)
        vars(sample).update(CRITERION)
        return sample
    except Exception as error:  # whatever a constructor without arguments raises
        return f"{kind.__name__}() raises {type(error).__name__}: its numbers are unknown"


def instances(root: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, module) of the tree, and of criteria that modules hold as plain attributes."""
    for path, module in root.named_modules():
        yield path, module
        for name, value in list(vars(module).items()):
            if _descends(value, "v8DetectionLoss"):
                inner = f"{path}.{name}" if path else name
                yield inner, value
                yield f"{inner}.bbox_loss", value.bbox_loss


def _descends(instance: Any, name: str, package: str = "ultralytics") -> bool:
    return any(
        kind.__name__ == name and kind.__module__.partition(".")[0] == package
        for kind in type(instance).__mro__
    )


def _plan_instance(report: Report, path: str, instance: Any) -> None:
    def bind(name, function, why=None):
        label = f"{path}.{name}" if path else name
        if why is None:
            report.replace_bound(instance, name, function, label)
        else:
            report.left[label] = why

    kind = type(instance)
    if _descends(instance, "GFLHead", "mmdet"):
        mmdet = import_module(".mmdet", __package__)
        base = import_module("mmdet.models.dense_heads.gfl_head").GFLHead
        own = kind.loss_by_feat is not base.loss_by_feat
        bind(
            "loss_by_feat",
            mmdet.loss_by_feat,
            "it has its own loss_by_feat" if own else mmdet.why_not(instance),
        )
    if _descends(instance, "v8DetectionLoss"):
        base = import_module("ultralytics.utils.loss").v8DetectionLoss
        for name, function in (
            ("bbox_decode", ultralytics.decode),
            ("get_assigned_targets_and_loss", ultralytics.detection_loss_for(base)),
        ):
            own = getattr(kind, name) is not getattr(base, name)
            why = f"it has its own {name}" if own else ultralytics.why_not(instance)
            bind(name, function, why)
    elif _descends(instance, "BboxLoss") and kind.__name__ == "BboxLoss":
        bind("forward", ultralytics.box_loss)
    for (name, method), candidates in (METHODS | MODULES).items():
        if name not in (None, kind.__name__) or not hasattr(kind, method):
            continue
        label = f"{path}.{method}" if path else method
        _replace_first(report, instance, method, candidates, instance, label)


# Probes: arguments of calls on which a function and its replacement have to agree. Each takes the
# instance whose method is tried, or the function.


def _differs(function: Callable, probe: Callable, subject: Any, name: str) -> str | None:
    """Why function does not compute what subject (a function, or an instance with a method of this
    name) does: values and gradients on the probe's calls; None if it does."""
    if isinstance(subject, types.FunctionType):
        theirs, ours = subject, lambda *args, **kwargs: function(subject, *args, **kwargs)
    else:
        original = getattr(type(subject), name)
        theirs = lambda *args, **kwargs: original(subject, *args, **kwargs)  # noqa: E731
        ours = lambda *args, **kwargs: function(original, subject, *args, **kwargs)  # noqa: E731
    try:
        for args, kwargs in probe(subject):
            a, grad_a = _evaluate(theirs, args, kwargs)
            with dispatch.use_backend("reference"):  # the formula is in question, not its kernels
                b, grad_b = _evaluate(ours, args, kwargs)
            if a.shape != b.shape:
                return f"it returns {tuple(a.shape)} where {tuple(b.shape)} is expected"
            if not (_close(a, b) and _close(grad_a, grad_b)):
                return "its numbers are not those of the loss that is known by this name"
    except Exception as error:  # a function that cannot take these arguments
        return f"it could not be tried: {type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def _evaluate(function, args, kwargs) -> tuple[Tensor, Tensor]:
    pred, *others = args
    outputs = pred if isinstance(pred, dict) else None
    pred = pred if outputs is None else outputs["logits"]
    with torch.enable_grad():
        leaf = pred.detach().clone().requires_grad_()
        if outputs is not None:  # of a criterion, which returns a dictionary of one loss
            first = {**outputs, "logits": leaf, "pred_logits": leaf}
            (value,) = function(first, *others, **kwargs).values()
        else:
            value = function(leaf, *others, **kwargs)
        upstream = torch.linspace(0.5, 1.5, value.numel(), device=value.device).view(value.shape)
        (grad,) = torch.autograd.grad(value, leaf, upstream.to(value.dtype))
    return value.detach(), grad


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-5)


def _device(subject: Any) -> torch.device:
    """Of the instance's buffers; vars(), since one made by __new__ alone has none."""
    buffers = vars(subject).get("_buffers", {}) if isinstance(subject, nn.Module) else {}
    devices = [tensor.device for tensor in buffers.values() if tensor is not None]
    return devices[0] if devices else torch.device("cpu")


def _logits(subject, rows, columns) -> Tensor:
    x = torch.arange(rows * columns, dtype=torch.float32, device=_device(subject))
    return (x * 0.7).sin().view(rows, columns) * 3


def _sparse(subject, activated=False):
    """Background below 0 and from C on; every reduction; a weight per row; a target of score 0."""
    pred = _logits(subject, 6, 4)
    pred = pred.sigmoid() if activated else pred
    device = pred.device
    label = torch.tensor([0, 3, 4, -1, 2, 1], device=device)
    score = torch.tensor([0.3, 0.9, 0.0, 0.0, 0.0, 1.0], device=device)
    weight = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.5, 1.0], device=device)
    return [(pred, (label, score), *rest) for rest in ((), (weight, 2.5))]


def _dense(subject, activated=False):
    calls = _sparse(subject, activated)
    pred, (label, score) = calls[0]
    classes = torch.arange(pred.shape[1], device=pred.device)
    target = (classes == label[:, None]) * score[:, None]
    return [(pred, target, *rest) for _, _, *rest in calls]


def _elements(subject):
    """_dense, with a weight per element."""
    return [
        (pred, target, *(r[:, None].expand_as(pred) if isinstance(r, Tensor) else r for r in rest))
        for pred, target, *rest in _dense(subject)
    ]


def _bins(subject):
    pred = _logits(subject, 4, BINS)
    target = torch.tensor([0.0, 1.25, 3.9, 2.0], device=pred.device)
    weight = torch.tensor([1.0, 0.0, 0.5, 2.0], device=pred.device)
    return [(pred, target, *rest) for rest in ((), (weight, 2.5))]


def _function(rows, **options):
    """Calls of a function (pred, target, weight, reduction, avg_factor, ...)."""

    def probe(subject):
        for pred, target, *rest in rows(subject, **options):
            if rest:
                yield (pred, target, rest[0]), {"reduction": "mean", "avg_factor": rest[1]}
                yield (pred, target, rest[0]), {"reduction": "none"}
            else:
                yield (pred, target), {}

    return probe


def _module(rows):
    """Calls of a module's forward (pred, target, weight, avg_factor, reduction_override)."""

    def probe(subject):
        activated = getattr(subject, "activated", False)
        for pred, target, *rest in rows(subject, activated) if rows is _sparse else rows(subject):
            yield (pred, target, *rest), {"reduction_override": "mean"}
            yield (pred, target, *rest[:1]), {"reduction_override": "none"}

    return probe


def _distances(subject):
    yield (_logits(subject, 3, 4 * (subject.reg_max + 1)),), {}
    yield (_logits(subject, 6, 4 * (subject.reg_max + 1)).view(2, 3, -1),), {}


def _projected(subject):
    for (x,), _ in _distances(subject):
        bins = torch.linspace(-1, 1, subject.reg_max + 1, device=x.device)
        yield (x, bins * bins.abs()), {}


def _dfl(subject):
    yield (_logits(subject, 8 * subject.c1, 3).view(2, 4 * subject.c1, 3),), {}


def _explicit(subject):
    pred = _logits(subject, 4, BINS)
    left = torch.tensor([0, 1, 3, 2], device=pred.device)
    a, b, weight = _logits(subject, 3, 4).abs()
    yield (pred, left, a, b), {}
    yield (pred, left, a, b, weight), {"avg_factor": 2.5}
    yield (pred, left, a, b, weight), {"reduction": "mean"}


def _matches(subject):
    """Calls of a criterion's loss_labels_*: two images, one match of them without overlap, and an
    image without any. alpha and gamma are the subject's."""
    logits = _logits(subject, 3 * 4, subject.num_classes).view(3, 4, -1)
    device = logits.device
    x = torch.arange(48, dtype=torch.float32, device=device).view(3, 4, 4)
    boxes = 0.5 + 0.2 * (x * 0.9).sin()
    near = boxes[0, [3, 1]] + 0.05
    apart = torch.tensor([[0.05, 0.05, 0.02, 0.02]], device=device)
    classes = torch.tensor([subject.num_classes - 1, 0, 0], device=device)
    targets = [
        {"labels": label, "class_labels": label, "boxes": wanted}
        for label, wanted in ((classes[:2], near), (classes[2:], apart), (classes[:0], apart[:0]))
    ]
    pairs: list[tuple[list[int], list[int]]] = [([1, 3], [1, 0]), ([2], [0]), ([], [])]
    indices = [tuple(torch.tensor(side, dtype=torch.int64) for side in pair) for pair in pairs]
    yield ({"logits": logits, "pred_boxes": boxes}, targets, indices, 2.5), {}


# What loss_labels_* read of a criterion that has not been initialised.
CRITERION = {"num_classes": 4, "alpha": 0.3, "gamma": 1.5, "mal_alpha": None}

Candidates = list[tuple[Callable, Callable]]
FUNCTIONS: dict[str, Candidates] = {
    "quality_focal_loss": [
        (losses.quality, _function(_sparse)),
        (losses.quality_or_probabilities, _function(_sparse)),
    ],
    "quality_focal_loss_tensor_target": [(losses.quality_dense, _function(_dense))],
    "quality_focal_loss_with_prob": [
        (losses.quality_of_probabilities, _function(_sparse, activated=True))
    ],
    "varifocal_loss": [(losses.varifocal, _function(_elements))],
    "distribution_focal_loss": [(losses.distribution, _function(_bins))],
}
METHODS: dict[tuple[str | None, str], Candidates] = {
    ("Integral", "forward"): [
        (losses.integral_module, _distances),
        (losses.integral_of_sides, _distances),
        (losses.integral_of_project, _projected),
    ],
    (None, "unimodal_distribution_focal_loss"): [(losses.fine_grained, _explicit)],
    (None, "loss_labels_vfl"): [(detr.varifocal, _matches), (detr.varifocal_logged, _matches)],
    (None, "loss_labels_mal"): [
        (detr.matchability, _matches),
        (detr.matchability_of_boxes, _matches),
    ],
    (None, "loss_labels_focal"): [(detr.focal, _matches), (detr.focal_logged, _matches)],
}
# Of single instances only: under a class their functions are replaced.
MODULES: dict[tuple[str | None, str], Candidates] = {
    ("QualityFocalLoss", "forward"): [(losses.quality_module, _module(_sparse))],
    ("VarifocalLoss", "forward"): [(losses.varifocal_module, _module(_elements))],
    ("DistributionFocalLoss", "forward"): [(losses.distribution_module, _module(_bins))],
    ("DFL", "forward"): [(ultralytics.dfl_layer, _dfl)],
}
