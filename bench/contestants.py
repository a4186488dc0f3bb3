"""Who competes: the eager losses of bench.eager, their torch.compile forms, and gfl_kernels.

Every contestant is a function of the logits alone; targets, weights and avg_factor are made
beforehand and shared. The truth is gfl_kernels.reference in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import gfl_kernels
from bench import eager
from bench.cases import SUMMARIES, Case
from gfl_kernels import reference

EAGER = "eager"
OURS = "ours"
COMPILE = "compile: "  # prefix of every torch.compile form
# --quick leaves these forms out to stay under two minutes; the full run times every form.
NOT_QUICK = {
    **{op: [] for op in (*SUMMARIES, "ld", "decode")},
    **{op: ["as is"] for op in ("qfl", "vfl", "focal", "mal", "ia_bce", "psl", "bce")},
    "dfl": ["one log-softmax"],
}
SEED = 20201
STRIDE = 8.0  # of what is decoded, clipped to IMAGE (height, width)
IMAGE = (800.0, 1344.0)
POSITIVES = 0.01  # share of anchors with an object, as ATSS assigns them on COCO

# The rest of the quality family, op and form -> (losses per element as hosts write them, ours). The
# sums of both are divided by the number of rows.
FAMILY = {
    ("vfl", "dense"): (eager.varifocal_loss, gfl_kernels.varifocal_loss),
    ("vfl", "sparse"): (
        eager.detached_varifocal_loss,
        partial(gfl_kernels.varifocal_loss, alpha=0.2, detach_weight=True),
    ),
    ("focal", "dense"): (eager.sigmoid_focal_loss, gfl_kernels.sigmoid_focal_loss),
    ("focal", "sparse"): (eager.focal_loss_of_labels, gfl_kernels.sigmoid_focal_loss),
    ("mal", "sparse"): (eager.matchability_aware_loss, gfl_kernels.matchability_aware_loss),
    ("ia_bce", "sparse"): (eager.ia_bce_loss, gfl_kernels.ia_bce_loss),
    ("psl", "dense"): (
        eager.position_supervised_loss,
        partial(gfl_kernels.quality_focal_loss, alpha=0.25),
    ),
    ("bce", "dense"): (
        eager.task_aligned_bce,
        partial(gfl_kernels.quality_focal_loss, beta=0),
    ),
}


@dataclass
class Inputs:
    """Everything a call needs; logits is a leaf that requires grad."""

    logits: Tensor
    target: tuple[Tensor, Tensor] | Tensor | None
    weight: Tensor | None
    avg_factor: float | None
    upstream: Tensor | None  # float32 gradient of a result that is not a scalar


def make_inputs(case: Case, constant: float | None = None, device: str = "cpu") -> Inputs:
    """Seeded inputs. constant: logits of one value instead."""
    random = torch.Generator().manual_seed(SEED)
    dtype = getattr(torch, case.dtype)
    n, c = case.rows, case.width
    maker = {
        "dfl": _distribution_inputs,
        "fgl": _fine_grained_inputs,
        "ld": _distillation_inputs,
        "decode": _decode_inputs,
        **dict.fromkeys(SUMMARIES, _summary_inputs),
    }
    inputs = maker.get(case.op, _quality_inputs)(case, n, c, dtype, random)
    if constant is not None:
        inputs = replace(inputs, logits=torch.full_like(inputs.logits, constant))
    inputs = _moved(inputs, device)
    inputs.logits = inputs.logits.detach().requires_grad_()
    if not case.weighted:
        inputs.weight = inputs.avg_factor = None
    return inputs


def _moved(inputs: Inputs, device: str) -> Inputs:
    def move(value):
        if isinstance(value, tuple):
            return tuple(map(move, value))
        return value.to(device) if isinstance(value, Tensor) else value

    return Inputs(**{name: move(value) for name, value in vars(inputs).items()})


def _quality_inputs(case: Case, n: int, c: int, dtype, random) -> Inputs:
    # A trained head's logits: nearly all negative (prior 0.01 is -4.6), with a wide spread.
    logits = torch.randn(case.shape, generator=random) * 2 - 3
    if case.form == "probability":
        logits = logits.sigmoid()
    positive = torch.zeros(n, dtype=torch.bool)
    positive[torch.randperm(n, generator=random)[: max(8, int(n * POSITIVES))]] = True
    label = torch.where(positive, torch.randint(0, c, (n,), generator=random), c)
    score = torch.where(positive, torch.rand(n, generator=random), 0.0).to(dtype)
    if case.op == "focal":
        score = positive.to(dtype)
    weight = torch.rand(n, generator=random) + 0.5
    target: tuple[Tensor, Tensor] | Tensor = (label, score)
    if case.form == "dense":
        target = torch.zeros(n, c, dtype=dtype)
        target[positive, label[positive]] = score[positive]
    elif case.op == "focal":
        target = label
    if case.nchw:
        cells = (case.shape[0], *case.shape[2:])
        target = (label.view(cells), score.view(cells))
        weight = weight.view(cells)
    return Inputs(logits.to(dtype), target, weight, float(positive.sum()), None)


def _distribution_inputs(case: Case, n: int, k: int, dtype, random) -> Inputs:
    logits = (torch.randn(n, k, generator=random) * 2).to(dtype)
    target = torch.rand(n, generator=random) * (k - 1 - 0.1)  # mmdetection clamps there
    weight = torch.rand(n, generator=random) * 0.9 + 0.1
    return Inputs(logits, target, weight, float(weight.sum()), None)


def _fine_grained_inputs(case: Case, n: int, k: int, dtype, random) -> Inputs:
    inputs = _distribution_inputs(case, n, k, dtype, random)
    bins = torch.linspace(-1, 1, k) ** 3  # close to each other in the middle, as D-FINE's
    inputs.target = gfl_kernels.bin_weights(torch.rand(n, generator=random) * 2 - 1, bins)
    return inputs


def _summary_inputs(case: Case, n: int, k: int, dtype, random) -> Inputs:
    logits = (torch.randn(n // 4, 4 * k, generator=random) * 2).to(dtype)
    values = {"statistics": (5,), "moments": (3,)}.get(case.op, ())
    upstream = torch.randn(n // 4, 4, *values, generator=random)
    return Inputs(logits, None, None, None, upstream)


def _distillation_inputs(case: Case, n: int, k: int, dtype, random) -> Inputs:
    inputs = _distribution_inputs(case, n, k, dtype, random)
    inputs.target = (torch.randn(n, k, generator=random) * 2).to(dtype)
    return inputs


def _decode_inputs(case: Case, n: int, k: int, dtype, random) -> Inputs:
    """target: points [A, 2], and class logits [A, 80] if scored."""
    logits = (torch.randn(n // 4, 4 * k, generator=random) * 2).to(dtype)
    points = torch.rand(n // 4, 2, generator=random) * torch.tensor(IMAGE[::-1])
    if case.form != "scored":
        return Inputs(logits, (points,), None, None, torch.randn(n // 4, 4, generator=random))
    cls = (torch.randn(n // 4, 80, generator=random) * 2 - 3).to(dtype)
    return Inputs(logits, (points, cls), None, None, torch.randn(n // 4, 5, generator=random))


def truth(case: Case, inputs: Inputs, chunk: int = 1 << 13) -> tuple[Tensor, Tensor]:
    """(result, gradient) in float64, a chunk of rows at a time so that memory stays small."""
    results, gradients = [], []
    size = 1 if case.nchw else chunk
    for start in range(0, len(inputs.logits), size):
        part = slice(start, start + size)
        x = inputs.logits.detach()[part].double().requires_grad_()
        result = _truth_rows(case, inputs, part, x)
        upstream = None if inputs.upstream is None else inputs.upstream[part].double()
        result.backward(upstream)
        results.append(result.detach())
        gradients.append(x.grad)
    result = torch.cat(results) if inputs.upstream is not None else torch.stack(results).sum()
    return result, torch.cat(gradients)


def terms(case: Case, inputs: Inputs) -> Tensor:
    """Size of the terms whose difference the gradient is; float64, broadcasts over the logits.

    An integral's p_k (y_k - E) g, with y and E up to K - 1, and no larger ones for the other
    summaries; a softmax's (p_k - t_k) w; and for the
    quality losses (s - q) w on rows with an object. Background rows have s alone: nothing cancels.
    """
    if case.op in SUMMARIES:
        size = inputs.upstream.double().abs().view(*inputs.upstream.shape[:2], -1).sum(-1)
        return size.repeat_interleave(case.width, 1) * (case.width - 1)
    if case.op == "decode":
        upstream = inputs.upstream.double()[:, :4].abs() * STRIDE
        return upstream.repeat_interleave(case.width, 1) * (case.width - 1)
    target, divisor = inputs.target, _divisor(case, inputs)
    if case.op == "ld":
        # T^2 / T, the mean over bins
        size = torch.full((case.rows,), 10.0 / case.width, device=inputs.logits.device)
    elif case.op in ("dfl", "fgl"):
        size = torch.ones(case.rows, device=inputs.logits.device)
    elif isinstance(target, tuple):
        size = (target[1] > 0).float()
    elif target.dim() == 1:
        size = (target < case.width).float()
    else:
        size = (target > 0).any(1).float()
    if inputs.weight is not None:
        size = size * inputs.weight
    return (size.double() / divisor).unsqueeze(1)


def result_terms(case: Case, result: Tensor) -> Tensor:
    """Size of the terms of a result: a box's coordinate is a difference of two within the image."""
    size = result.abs()
    if case.op == "decode":
        size[:, :4] = size[:, :4].clamp(min=max(IMAGE))
    return size


def _divisor(case: Case, inputs: Inputs) -> float:
    return inputs.avg_factor + reference.EPS if inputs.avg_factor is not None else case.rows


def _truth_rows(case: Case, inputs: Inputs, part: slice, x: Tensor) -> Tensor:
    if case.op in SUMMARIES:
        sides = x.view(len(x), 4, case.width)
        return {
            "integral": lambda: reference.integral(sides),
            "peak": lambda: reference.integral(sides, mode="peak"),
            "statistics": lambda: reference.distribution_statistics(sides),
            "moments": lambda: torch.stack(reference.distribution_moments(sides), dim=-1),
        }[case.op]()
    if case.op == "decode":
        points, *cls = (t[part].double() for t in inputs.target)
        size = list(IMAGE)
        boxes, scores, _, _ = reference.decode_boxes(
            x, points, None, None, cls[0] if cls else None, None, STRIDE, size, -1, False
        )
        return boxes if scores is None else torch.cat([boxes, scores[:, None]], dim=1)
    divisor = _divisor(case, inputs)
    weight = None if inputs.weight is None else inputs.weight[part].double()
    if case.op == "ld":
        taught = inputs.target[part].double()
        total = reference.localization_distillation_loss(x, taught, weight=weight, reduction="sum")
        return total / divisor
    if case.op in ("dfl", "fgl"):
        explicit = isinstance(inputs.target, tuple)
        target = tuple(t[part] for t in inputs.target) if explicit else inputs.target[part]
        total = reference.distribution_focal_loss(x, target, weight=weight, reduction="sum")
        return total / divisor
    if isinstance(inputs.target, tuple):
        label, score = inputs.target
        target = (label[part], score[part].double())
    else:
        target = inputs.target[part]
        target = target.double() if target.is_floating_point() else target
    if (case.op, case.form) in FAMILY:
        with gfl_kernels.use_backend("reference"):
            return FAMILY[case.op, case.form][1](x, target, reduction="sum") / case.rows
    total = reference.quality_focal_loss(
        x,
        target,
        weight=weight,
        reduction="sum",
        activated=case.form == "probability",
        class_dim=1 if case.nchw else -1,
    )
    return total / divisor


# torch.compile's better forms: what a user who knows the compiler would write by hand. No nonzero,
# no index assignment, one graph, so that inductor can fuse the loss into one loop each way.


def _reduce(loss: Tensor, weight: Tensor | None, avg_factor: float | None) -> Tensor:
    return eager.weight_reduce_loss(loss, weight, "mean", avg_factor)


def branch_free_quality(pred, target, weight=None, *, activated=False, avg_factor=None):
    """One formula for positives and negatives: with q = 0 the negatives' branch is the same."""
    if isinstance(target, Tensor):
        q = target
    else:
        label, score = target
        classes = torch.arange(pred.shape[1], device=pred.device)
        classes = classes.view(-1, *[1] * (pred.dim() - 2))  # dimension 1 also of NCHW maps
        q = torch.where(label.unsqueeze(1) == classes, score.unsqueeze(1), 0.0)
    s = pred if activated else pred.sigmoid()
    cross_entropy = F.binary_cross_entropy if activated else F.binary_cross_entropy_with_logits
    loss = cross_entropy(pred, q, reduction="none") * (s - q).abs().pow(2.0)
    return _reduce(loss.sum(1), weight, avg_factor)


def log_softmax_distribution(pred, target, weight=None, *, avg_factor=None):
    """One log-softmax for both bins, gathered."""
    left = target.long()
    log_p = F.log_softmax(pred.float(), dim=1)
    wr = target - left.float()
    loss = -(
        log_p.gather(1, left[:, None])[:, 0] * (1 - wr)
        + log_p.gather(1, left[:, None] + 1)[:, 0] * wr
    )
    return _reduce(loss, weight, avg_factor)


def hat_distribution(pred, target, weight=None, *, avg_factor=None):
    """Both weights as one hat function over the bins: no gather, so no scatter in backward."""
    bins = torch.arange(pred.shape[1], device=pred.device, dtype=torch.float32)
    hat = (1 - (bins - target[:, None]).abs()).clamp(min=0)
    loss = -(F.log_softmax(pred.float(), dim=1) * hat).sum(1)
    return _reduce(loss, weight, avg_factor)


def summed_integral(x, reg_max):
    """The linear map as a product and a sum, which fuses with the softmax."""
    x = F.softmax(x.view(-1, 4, reg_max + 1).float(), dim=2)
    return (x * torch.arange(reg_max + 1, device=x.device, dtype=torch.float32)).sum(2)


def decode_as_mmdetection(x, points, cls=None):
    """GFLHead's prediction; the highest class score as the fifth number of a box."""
    distances = eager.Integral(x.shape[1] // 4 - 1)(x) * STRIDE
    boxes = eager.distance2bbox(points, distances, IMAGE)
    if cls is None:
        return boxes
    scores, _ = cls.sigmoid().max(dim=1)
    return torch.cat([boxes, scores[:, None]], dim=1)


def decode_fused(x, points, cls=None):
    out = gfl_kernels.decode_boxes(points, x, strides=STRIDE, max_shape=IMAGE, cls_logits=cls)
    if cls is None:
        return out
    return torch.cat([out.boxes, out.scores[:, None]], dim=1)


def contestants(case: Case, inputs: Inputs, compiled: bool = True) -> dict[str, Callable]:
    """name -> function of the logits; the compiled forms are compiled at their first call."""
    eager_form, best_forms, ours = forms(case, inputs)
    table = {EAGER: eager_form}
    if compiled:
        table[f"{COMPILE}as is"] = torch.compile(eager_form, dynamic=False)
        for name, form in best_forms.items():
            table[COMPILE + name] = torch.compile(form, dynamic=False, fullgraph=True)
    table[OURS] = ours
    return table


def ours(case: Case, inputs: Inputs) -> Callable[[Tensor], Tensor]:
    return forms(case, inputs)[2]


def forms(case: Case, inputs: Inputs) -> tuple[Callable, dict[str, Callable], Callable]:
    """(eager, forms for the compiler by name, ours), none of them compiled."""
    target, weight, avg_factor = inputs.target, inputs.weight, inputs.avg_factor
    if case.op == "integral":
        reg_max = case.width - 1
        device = inputs.logits.device
        module, fused = (of(reg_max).to(device) for of in (eager.Integral, gfl_kernels.Integral))
        return module, {"product and sum": lambda x: summed_integral(x, reg_max)}, fused
    if case.op in SUMMARIES:
        upstream_form = {
            "peak": eager.peak_integral,
            "statistics": eager.distribution_statistics,
            "moments": eager.distribution_moments,
        }[case.op]
        fused = {
            "peak": lambda sides: gfl_kernels.integral(sides, mode="peak"),
            "statistics": gfl_kernels.distribution_statistics,
            "moments": lambda sides: torch.stack(gfl_kernels.distribution_moments(sides), dim=-1),
        }[case.op]
        return upstream_form, {}, lambda x: fused(x.view(len(x), 4, case.width))
    if case.op == "decode":
        return (
            lambda x: decode_as_mmdetection(x, *target),
            {},
            lambda x: decode_fused(x, *target),
        )
    if case.op == "ld":
        return (
            lambda x: eager.knowledge_distillation_kl_div_loss(
                x, target, weight, avg_factor=avg_factor
            ),
            {},
            lambda x: gfl_kernels.localization_distillation_loss(
                x, target, weight=weight, avg_factor=avg_factor
            ),
        )
    if case.op in ("dfl", "fgl"):
        upstream_form, best_forms = {
            "dfl": (
                eager.distribution_focal_loss,
                {"one log-softmax": log_softmax_distribution, "hat": hat_distribution},
            ),
            "fgl": (eager.fine_grained_localization_loss, {}),
        }[case.op]

        def given(form):
            return lambda x: form(x, target, weight=weight, avg_factor=avg_factor)

        return (
            given(upstream_form),
            {name: given(form) for name, form in best_forms.items()},
            given(gfl_kernels.distribution_focal_loss),
        )
    if (case.op, case.form) in FAMILY:
        written_out, fused = FAMILY[case.op, case.form]
        rows = case.rows
        return (
            lambda x: written_out(x, target).sum() / rows,
            {},
            lambda x: fused(x, target, reduction="mean", avg_factor=rows),
        )
    activated = case.form == "probability"
    upstream_form = {
        "sparse": eager.quality_focal_loss,
        "dense": eager.quality_focal_loss_tensor_target,
        "probability": eager.quality_focal_loss_with_prob,
    }[case.form]
    # Heads flatten the maps of a level into rows; a fused op reads them where they lie.
    flat_target, flat_weight, flatten = target, weight, lambda x: x
    if case.nchw:
        flat_target = tuple(part.reshape(-1) for part in target)
        flat_weight = weight.reshape(-1)

        def flatten(x):
            return x.permute(0, 2, 3, 1).reshape(-1, case.width)

    return (
        lambda x: upstream_form(flatten(x), flat_target, flat_weight, avg_factor=avg_factor),
        {
            # With class_dim = 1 the compiler, too, may read the maps where they lie.
            "branch-free": lambda x: branch_free_quality(
                x, target, weight, activated=activated, avg_factor=avg_factor
            )
        },
        lambda x: gfl_kernels.quality_focal_loss(
            x,
            target,
            weight=weight,
            avg_factor=avg_factor,
            activated=activated,
            class_dim=1 if case.nchw else -1,
        ),
    )
