"""The mathematics in eager PyTorch: the oracle of the tests and the backend of last resort.

Any floating dtype, any device, no hand-written gradient: autograd differentiates these expressions,
twice if asked. They are written so that neither the value nor a derivative overflows, cancels or
turns into NaN, for every beta >= 0 and for logits of +-1e4 and beyond. The names and their order
are those of csrc/math.h.

Notation: s = sigmoid(x), d = s - q, softplus(x) = log(1 + exp(x)).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = torch.finfo(torch.float32).eps  # mmdetection adds it to avg_factor, in every dtype

# Forms of the quality family, as the schemas of ops.py and gfl_kernels.h carry them; and flags of
# those that are varifocal: the weight is a constant of the derivative; it is 1 on positives.
LOGITS, PROBABILITIES, VARIFOCAL, VARIFOCAL_PROBABILITIES = 0, 1, 2, 3
FOCAL, FOCAL_PROBABILITIES, MATCHABILITY, IOU_AWARE, BALANCED = 4, 5, 6, 7, 8
DETACH_WEIGHT, UNIT_POSITIVES = 1, 2


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type losses are computed and returned in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Scalar functions


def softplus(x: Tensor) -> Tensor:
    # Not F.softplus: its threshold returns x for x > 20, off by exp(-20), which float64 sees.
    return -F.logsigmoid(-x)


def sigmoid_minus(x: Tensor, q: Tensor) -> Tensor:
    """d = sigmoid(x) - q, through 1 - s = sigmoid(-x) for x >= 0: d keeps its digits near q = 1."""
    return torch.where(x >= 0, (1 - q) - torch.sigmoid(-x), torch.sigmoid(x) - q)


def bce_with_logits(x: Tensor, t: Tensor) -> Tensor:
    """B = t softplus(-x) + (1 - t) softplus(x): both terms positive, nothing cancels (x = -17 in
    float32 is right).

    A term of weight 0 is 0 even where its softplus is infinite: x = -inf is a perfect negative.
    """
    infinite = x.isinf()
    positive = torch.where(infinite & (t == 0), 0, t * softplus(-x))
    negative = torch.where(infinite & (t == 1), 0, (1 - t) * softplus(x))
    return positive + negative


def pow_abs(d: Tensor, beta: float) -> Tensor:
    """|d|^beta with 0^0 = 1 and a derivative of 0 at d = 0.

    Autograd of ``d.abs().pow(beta)`` gives NaN there for beta < 1.
    """
    if beta == 0:
        return torch.ones_like(d)
    if beta == 2:
        return d * d
    zero = d == 0
    return torch.where(zero, 0, torch.where(zero, 1, d).abs() ** beta)


def bce(p: Tensor, q: Tensor) -> Tensor:
    """Binary cross entropy of probabilities: logs clamped at -100, gradient divided by max(p (1 -
    p), 1e-12).

    Those are F.binary_cross_entropy's rules, taken from it at the targets 0 and 1 (B is linear in
    q), so that a quality rounded to 1.0000001 is no error. p is clamped into [0, 1] and a NaN stays
    where it is; PyTorch raises for both on the CPU and kills the context on CUDA.
    """
    nan = p.isnan()
    # Not p.clamp(0, 1): its derivative is 0 at both ends.
    inside = torch.where(nan, 0.5, torch.where(p < 0, 0, torch.where(p > 1, 1, p)))
    with torch.autocast(p.device.type, enabled=False):  # autocast bans this function
        positive = F.binary_cross_entropy(inside, torch.ones_like(p), reduction="none")
        negative = F.binary_cross_entropy(inside, torch.zeros_like(p), reduction="none")
    return torch.where(nan, p, q * positive + (1 - q) * negative)


# Quality family


def quality_loss(x: Tensor, q: Tensor, beta: float) -> Tensor:
    """Quality Focal Loss on logits: |sigmoid(x) - q|^beta B(x, q). GFL (Li et al. 2020), eq. 4."""
    return pow_abs(sigmoid_minus(x, q), beta) * bce_with_logits(x, q)


def quality_loss_probability(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """The same on probabilities, |p - q|^beta BCE(p, q): GFLv2, mmdetection's activated=True."""
    return pow_abs(p - q, beta) * bce(p, q)


def balance(q: Tensor, alpha: float) -> Tensor:
    """The factor that weighs positives, q > 0, against the rest: alpha, 1 - alpha."""
    # Of two numbers torch.where would make float32.
    return torch.where(q > 0, torch.full_like(q, alpha), 1 - alpha)


def varifocal_loss(
    x: Tensor,
    q: Tensor,
    weight: Tensor,
    positive: Tensor,
    alpha: float,
    gamma: float,
    detach_weight: bool = False,
) -> Tensor:
    """w B(x, q) with w = weight on positives and alpha sigmoid(x)^gamma on the others. Varifocal
    Loss has weight = q: VarifocalNet (Zhang et al. 2021), eq. 2.

    positive: q > 0 (mmdetection), or whether the element is its row's class (YOLOv6, RT-DETR),
    where a q of 0 weighs 0. detach_weight: w is a constant of the derivative (RT-DETR, D-FINE).
    """
    weight = torch.where(positive, weight, alpha * pow_abs(torch.sigmoid(x), gamma))
    return (weight.detach() if detach_weight else weight) * bce_with_logits(x, q)


def varifocal_loss_probability(
    p: Tensor,
    q: Tensor,
    weight: Tensor,
    positive: Tensor,
    alpha: float,
    gamma: float,
    detach_weight: bool = False,
) -> Tensor:
    """The same on probabilities, with BCE(p, q) and p^gamma: YOLOv6, PP-YOLOE."""
    weight = torch.where(positive, weight, alpha * pow_abs(p, gamma))
    return (weight.detach() if detach_weight else weight) * bce(p, q)


def matchability_target(q: Tensor, gamma: float) -> Tensor:
    """q^gamma, what Matchability-Aware Loss trains positives to, and 0 for q <= 0. DEIM (Huang et
    al. 2024), eq. 3."""
    return torch.where(q <= 0, 0, pow_abs(q, gamma))


def iou_aware_target(x: Tensor, q: Tensor, alpha: float) -> Tensor:
    """max(sigmoid(x)^alpha q^(1 - alpha), 0.01), a constant: what IA-BCE trains positives to.
    Align-DETR (Cai et al. 2023), eq. 3; the floor is RF-DETR's and detrex's."""
    s = torch.sigmoid(x).detach()
    return (pow_abs(s, alpha) * matchability_target(q, 1 - alpha)).clamp(min=0.01)


def focal_alpha(y: Tensor, alpha: float) -> Tensor:
    """alpha y + (1 - alpha) (1 - y), or 1 for alpha < 0."""
    return alpha * y + (1 - alpha) * (1 - y) if alpha >= 0 else torch.ones_like(y)


def focal_loss(x: Tensor, y: Tensor, alpha: float, gamma: float) -> Tensor:
    """Focal Loss on logits: alpha_t m^gamma B(x, y), m = y (1 - s) + (1 - y) s. RetinaNet (Lin et
    al. 2017), eq. 5, for targets y between 0 and 1 as torchvision continues it."""
    s = torch.sigmoid(x)
    m = y * torch.sigmoid(-x) + (1 - y) * s
    return focal_alpha(y, alpha) * pow_abs(m, gamma) * bce_with_logits(x, y)


def focal_loss_probability(p: Tensor, y: Tensor, alpha: float, gamma: float) -> Tensor:
    """The same on probabilities: mmdetection's activated=True."""
    m = y * (1 - p) + (1 - y) * p
    return focal_alpha(y, alpha) * pow_abs(m, gamma) * bce(p, y)


def form_loss(
    x: Tensor, q: Tensor, positive: Tensor, form: int, flags: int, alpha: float, beta: float
) -> Tensor:
    """An element's loss in any of the forms. beta: the exponent, which papers call gamma too.

    positive: where the weight of varifocal forms is that of a positive; q is 0 elsewhere.
    """
    detach = bool(flags & DETACH_WEIGHT)
    weight = torch.ones_like(q) if flags & UNIT_POSITIVES else q
    if form == PROBABILITIES:
        return quality_loss_probability(x, q, beta)
    if form == VARIFOCAL:
        return varifocal_loss(x, q, weight, positive, alpha, beta, detach)
    if form == VARIFOCAL_PROBABILITIES:
        return varifocal_loss_probability(x, q, weight, positive, alpha, beta, detach)
    if form == FOCAL:
        return focal_loss(x, q, alpha, beta)
    if form == FOCAL_PROBABILITIES:
        return focal_loss_probability(x, q, alpha, beta)
    if form == MATCHABILITY:
        target = matchability_target(q, beta)
        return varifocal_loss(x, target, torch.ones_like(q), positive, alpha, beta, True)
    if form == IOU_AWARE:
        target = torch.where(positive, iou_aware_target(x, q, alpha), q)
        return varifocal_loss(x, target, torch.ones_like(q), positive, 1.0, beta)
    loss = quality_loss(x, q, beta)
    return balance(q, alpha) * loss if form == BALANCED else loss


# Distribution family


def split_target(t: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """(l, wl, wr): l = floor(t), wl = l + 1 - t, wr = t - l, t clamped into [0, bins - 1].

    The weights of a NaN are NaN.
    """
    t = t.clamp(0, bins - 1)
    left = t.floor()
    return left, left + 1 - t, t - left


def bin_weights(t: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(l, wl, wr) among bins of any spacing: y_l the last bin <= t, wr = (t - y_l) / (y_r - y_l),
    wl = 1 - wr; beyond the bins all weight is on the first or the last. The weights of a NaN are
    NaN. D-FINE (Peng et al. 2024), fine-grained localization.
    """
    left = torch.searchsorted(y.contiguous(), t.contiguous(), right=True) - 1
    left = left.clamp(0, y.shape[0] - 2)
    wr = ((t - y[left]) / (y[left + 1] - y[left])).clamp(0, 1)
    return left, 1 - wr, wr


def distribution_loss(z: Tensor, left: Tensor, wl: Tensor, wr: Tensor) -> Tensor:
    """Distribution Focal Loss of each row: -wl log p_l - wr log p_r, p = softmax(z), r = l + 1.
    GFL, eq. 6.

    l and r are clamped into the bins; a side of weight 0 contributes 0 even where p is 0.
    """
    last = z.shape[-1] - 1
    log_p = F.log_softmax(z, dim=-1)
    left = left.nan_to_num(nan=0).clamp(0, last).long()
    right = (left + 1).clamp(max=last)
    loss_left = torch.where(wl == 0, 0, wl * log_p.gather(-1, left.unsqueeze(-1)).squeeze(-1))
    loss_right = torch.where(wr == 0, 0, wr * log_p.gather(-1, right.unsqueeze(-1)).squeeze(-1))
    return -(loss_left + loss_right)


def expectation(z: Tensor, y: Tensor) -> Tensor:
    """E = sum_k y_k softmax(z)_k of each row. GFL, eq. 5: the decoded distance."""
    # A product and a sum, not a matmul: autocast would take a matmul to half precision.
    return (F.softmax(z, dim=-1) * y).sum(-1)


def peak_window(z: Tensor, window: int) -> Tensor:
    """Whether a bin lies at most `window` bins from its row's highest, of equals the first one.

    The expectation over them alone is that of z with -inf elsewhere. A row that is no distribution
    (it has a NaN or +inf, or -inf alone) is all window, so that all of it stays NaN.
    """
    bin_ = torch.arange(z.shape[-1], device=z.device)
    inside = (bin_ - z.argmax(-1, keepdim=True)).abs() <= window
    return inside | ~z.amax(-1, keepdim=True).isfinite()


def statistics(z: Tensor, topk: int, add_mean: bool) -> Tensor:
    """The topk highest of softmax(z) of each row in descending order, and their mean behind them.
    Of equal logits the first bin comes first. GFLv2 (Li et al. 2021), the input of its DGQP.
    """
    order = z.detach().sort(dim=-1, descending=True, stable=True).indices
    top = F.softmax(z, dim=-1).gather(-1, order[..., :topk])
    return torch.cat([top, top.mean(-1, keepdim=True)], dim=-1) if add_mean else top


def moments(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E = sum_k p_k y_k, sqrt(sum_k p_k (y_k - E)^2) and -sum_k p_k log p_k, p = softmax(z).

    The derivative of a standard deviation of 0 is 0. A bin of p = 0 has no part in the entropy.
    """
    p = F.softmax(z, dim=-1)
    mean = (p * y).sum(-1)
    variance = (p * (y - mean.unsqueeze(-1)) ** 2).sum(-1)
    spread = variance != 0  # NaN stays
    std = torch.where(spread, torch.where(spread, variance, 1).sqrt(), 0)
    log_p = torch.where(p == 0, 0, F.log_softmax(z, dim=-1))
    return mean, std, -(p * log_p).sum(-1)


def distillation_loss(z: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(p_t || p_s) of each row, p = softmax(. / temperature) of teacher and student: sum_k p_t,k
    (log p_t,k - log p_s,k). A bin of p_t = 0 has no part in it.
    """
    log_p = F.log_softmax(z / temperature, dim=-1)
    log_q = F.log_softmax(teacher / temperature, dim=-1)
    q = log_q.exp()
    return torch.where(q == 0, 0, q * (log_q - log_p)).sum(-1)


# Box term. Boxes are xyxy in units of the stride, [..., 4].

IOU_EPS = 1e-6  # mmdetection's floor of the union under a quality target


def decode_box(points: Tensor, distances: Tensor) -> Tensor:
    """The box whose sides lie at distances (left, top, right, bottom) from a point."""
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)


def clip_coordinate(x: Tensor, limit: Tensor | float) -> Tensor:
    """x clamped into [0, limit], the image. NaN stays NaN."""
    return x.clamp(min=0).clamp(max=limit)


def overlap_and_union(box: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Areas. The union of a box turned inside out may be negative: callers take care of it."""
    x1, y1, x2, y2 = box.unbind(-1)
    u1, v1, u2, v2 = target.unbind(-1)
    width = (torch.minimum(x2, u2) - torch.maximum(x1, u1)).clamp(min=0)
    height = (torch.minimum(y2, v2) - torch.maximum(y1, v1)).clamp(min=0)
    overlap = width * height
    return overlap, (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - overlap


def box_iou(box: Tensor, target: Tensor) -> Tensor:
    """Intersection over union, the quality of a positive."""
    overlap, union = overlap_and_union(box, target)
    return overlap / union.clamp(min=IOU_EPS)


def box_loss(box: Tensor, target: Tensor, kind: str, eps: float) -> Tensor:
    """mmdetection's IoULoss (-log IoU), GIoULoss, DIoULoss or CIoULoss of each box.

    With C the smallest box around both, rho the distance of their centres, c the diagonal of C:
    GIoU = IoU - (C - U) / C, DIoU = IoU - rho^2 / c^2, CIoU = DIoU - alpha v with
    v = 4 / pi^2 (atan(target's w / h) - atan(w / h))^2 and a constant alpha = v / (1 - IoU + v).
    "ciou" has alpha = 0 up to an IoU of 0.5, as the paper and mmdetection; "ciou_all" has not, as
    the YOLO line. A perfect box has alpha v = 0, where mmdetection may find 0 / 0.
    """
    overlap, union = overlap_and_union(box, target)
    if kind == "iou":
        return -(overlap / union.clamp(min=eps)).clamp(min=eps).log()
    x1, y1, x2, y2 = box.unbind(-1)
    u1, v1, u2, v2 = target.unbind(-1)
    width = (torch.maximum(x2, u2) - torch.minimum(x1, u1)).clamp(min=0)
    height = (torch.maximum(y2, v2) - torch.minimum(y1, v1)).clamp(min=0)
    if kind == "giou":
        union, enclosure = union.clamp(min=eps), (width * height).clamp(min=eps)
        return 1 - (overlap / union - (enclosure - union) / enclosure)
    iou = overlap / (union + eps)
    distance = ((u1 + u2 - x1 - x2) ** 2 + (v1 + v2 - y1 - y2) ** 2) / 4
    diou = iou - distance / (width**2 + height**2 + eps)
    if kind == "diou":
        return 1 - diou
    ratio = torch.atan((x2 - x1) / (y2 - y1 + eps))
    v = 4 / math.pi**2 * (torch.atan((u2 - u1) / (v2 - v1 + eps)) - ratio) ** 2
    with torch.no_grad():
        unlike = v > 0 if kind == "ciou_all" else (v > 0) & (iou > 0.5)
        alpha = torch.where(unlike, v / torch.where(unlike, 1 - iou + v, 1), 0)
    ciou = diou - alpha * v
    return 1 - (ciou if kind == "ciou_all" else ciou.clamp(-1, 1))


# The public operations, same signatures as in functional.py


def quality_focal_loss(
    pred: Tensor,
    target: Tensor | tuple[Tensor, Tensor],
    *,
    beta: float = 2.0,
    weight: Tensor | None = None,
    avg_factor: float | Tensor | None = None,
    reduction: str = "mean",
    activated: bool = False,
    class_dim: int = -1,
) -> Tensor:
    """See :func:`gfl_kernels.quality_focal_loss`."""
    form = PROBABILITIES if activated else LOGITS
    return quality_family_loss(
        pred, target, form, 0, 0.0, beta, weight, avg_factor, reduction, class_dim
    )


def quality_family_loss(
    pred: Tensor,
    target: Tensor | tuple[Tensor, Tensor],
    form: int,
    flags: int,
    alpha: float,
    beta: float,
    weight: Tensor | None = None,
    avg_factor: float | Tensor | None = None,
    reduction: str = "mean",
    class_dim: int = -1,
) -> Tensor:
    """Any loss of the quality family. Positive is a row's class; of a dense target what is
    above 0."""
    dtype = accumulate_dtype(pred.dtype)
    x = pred.movedim(class_dim, -1).to(dtype)
    if isinstance(target, (tuple, list)):
        label, score = target
        classes = torch.arange(x.shape[-1], device=x.device)
        # A label outside [0, C), also -1, 255 or NaN, equals no class: the row is background, q = 0
        # everywhere.
        positive = label.unsqueeze(-1) == classes
        q = torch.where(positive, score.unsqueeze(-1).to(dtype), 0)
    else:
        q = target.movedim(class_dim, -1).to(dtype)
        positive = q > 0
    if weight is not None:
        weight = weight.to(dtype)
        weight = weight.movedim(class_dim, -1) if weight.dim() == x.dim() else weight.unsqueeze(-1)
        unread = weight == 0
        x = torch.where(unread, 0.5, x)
    loss = form_loss(x, q, positive, form, flags, alpha, beta)
    if weight is not None:
        loss = torch.where(unread, 0, loss * weight)
    return _reduce(loss.sum(-1), reduction, avg_factor)


def distribution_focal_loss(
    pred: Tensor,
    target: Tensor | tuple[Tensor, Tensor, Tensor],
    *,
    weight: Tensor | None = None,
    avg_factor: float | Tensor | None = None,
    reduction: str = "mean",
    bin_dim: int = -1,
) -> Tensor:
    """See :func:`gfl_kernels.distribution_focal_loss`."""
    dtype = accumulate_dtype(pred.dtype)
    z = pred.movedim(bin_dim, -1).to(dtype)
    if isinstance(target, (tuple, list)):
        left, wl, wr = (part.to(dtype) for part in target)
    else:
        left, wl, wr = split_target(target.to(dtype), z.shape[-1])
    if weight is not None:
        weight = weight.to(dtype)
        unread = weight == 0
        z = torch.where(unread.unsqueeze(-1), 0, z)
    loss = distribution_loss(z, left, wl, wr)
    if weight is not None:
        loss = torch.where(unread, 0, loss * weight)
    return _reduce(loss, reduction, avg_factor)


def integral(
    pred: Tensor,
    *,
    bins: Tensor | None = None,
    bin_dim: int = -1,
    mode: str = "mean",
    window: int = 2,
) -> Tensor:
    """See :func:`gfl_kernels.integral`."""
    z, y = _bins(pred, bins, bin_dim)
    if mode == "peak":
        z = torch.where(peak_window(z.detach(), window), z, -math.inf)
    return expectation(z, y)


def distribution_statistics(
    pred: Tensor, *, topk: int = 4, add_mean: bool = True, bin_dim: int = -1
) -> Tensor:
    """See :func:`gfl_kernels.distribution_statistics`."""
    z, _ = _bins(pred, None, bin_dim)
    return statistics(z, topk, add_mean).movedim(-1, bin_dim)


def distribution_moments(
    pred: Tensor, *, bins: Tensor | None = None, bin_dim: int = -1
) -> DistributionMoments:
    """See :func:`gfl_kernels.distribution_moments`."""
    return DistributionMoments(*moments(*_bins(pred, bins, bin_dim)))


class DistributionMoments(NamedTuple):
    """Mean and standard deviation, in the unit of the bins, and the entropy in nats, each [...]."""

    mean: Tensor
    std: Tensor
    entropy: Tensor


def _bins(pred: Tensor, bins: Tensor | None, bin_dim: int) -> tuple[Tensor, Tensor]:
    """Logits and values of the bins, in the type of the result, bins last."""
    dtype = accumulate_dtype(pred.dtype)
    z = pred.movedim(bin_dim, -1).to(dtype)
    y = torch.arange(z.shape[-1], device=z.device, dtype=dtype) if bins is None else bins.to(dtype)
    return z, y


def localization_distillation_loss(
    pred: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 10.0,
    bin_reduction: str = "mean",
    weight: Tensor | None = None,
    avg_factor: float | Tensor | None = None,
    reduction: str = "mean",
    bin_dim: int = -1,
) -> Tensor:
    """See :func:`gfl_kernels.localization_distillation_loss`."""
    dtype = accumulate_dtype(pred.dtype)
    z, t = (x.movedim(bin_dim, -1).to(dtype) for x in (pred, teacher.detach()))
    if weight is not None:
        weight = weight.to(dtype)
        unread = weight == 0
        z, t = (torch.where(unread.unsqueeze(-1), 0, x) for x in (z, t))
    loss = distillation_loss(z, t, temperature) * distillation_scale(
        temperature, bin_reduction, z.shape[-1]
    )
    if weight is not None:
        loss = torch.where(unread, 0, loss * weight)
    return _reduce(loss, reduction, avg_factor)


def distillation_scale(temperature: float, bin_reduction: str, bins: int) -> float:
    """What a row's divergence is multiplied by: T^2, which makes gradients independent of T to
    first order, divided by the bins for their mean."""
    return temperature**2 / (bins if bin_reduction == "mean" else 1)


def decode_boxes(
    pred: Tensor,
    points: Tensor,
    strides: Tensor | None,
    bins: Tensor | None,
    cls: Tensor | None,
    limits: Tensor | None,
    stride: float,
    size: Sequence[float],
    window: int,
    write_deviation: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """What gfl_kernels.decode_boxes computes: (boxes [..., 4], scores, labels, deviation [..., 4]).

    Arguments as those of the op gfl_kernels::decode_boxes.
    """
    dtype = accumulate_dtype(pred.dtype)
    z = pred.unflatten(-1, (4, -1)).to(dtype)
    y = torch.arange(z.shape[-1], device=z.device, dtype=dtype) if bins is None else bins.to(dtype)
    pixels = stride if strides is None else strides.to(dtype).unsqueeze(-1)
    near = z if window < 0 else torch.where(peak_window(z.detach(), window), z, -math.inf)
    boxes = decode_box(points.to(dtype), expectation(near, y) * pixels)
    if limits is not None:
        boxes = clip_coordinate(boxes, limits.to(dtype)[..., [1, 0, 1, 0]])
    elif size:
        height, width = size
        x1, y1, x2, y2 = boxes.unbind(-1)
        sides = [(x1, width), (y1, height), (x2, width), (y2, height)]
        boxes = torch.stack([clip_coordinate(x, limit) for x, limit in sides], dim=-1)
    spread = moments(z, y)[1] * pixels if write_deviation else None
    if cls is None:
        return boxes, None, None, spread
    high, labels = cls.to(accumulate_dtype(cls.dtype)).max(dim=-1)
    return boxes, high.sigmoid(), labels, spread


def head_loss(
    cls: Sequence[Tensor],
    box: Sequence[Tensor],
    points: Sequence[Tensor],
    labels: Sequence[Tensor],
    box_targets: Sequence[Tensor],
    targets: Sequence[Tensor],
    label_weights: Sequence[Tensor],
    strides: Sequence[float],
    *,
    iou: str,
    iou_eps: float,
    limit: float,
    varifocal: bool,
    alpha: float,
    beta: float,
    loss_weights: Sequence[float],
    normalise: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """What gfl_loss and task_aligned_loss compute: (losses [3, L], quality [B, A], boxes).

    Arguments as those of the op gfl_kernels::head_forward: levels [B, ..., C] and [B, ..., 4 K],
    A the anchors of all levels. Without targets, labels in [0, C) are positive, the weight of a
    positive is its highest score, and QFL, divided by the number of positives, trains that class to
    the IoU. With targets [B, ..., C], labels are a mask, the weight is the sum of an anchor's
    targets, QFL or (varifocal) VFL with a gamma of beta trains the classes to them, and everything
    is divided by the weights' sum. normalise: averages the two divisors over the job. boxes:
    [B, A, 4], decoded, of positives; 0 elsewhere, as is quality.
    """
    dtype = accumulate_dtype(cls[0].dtype)
    classes, bins = cls[0].shape[-1], box[0].shape[-1] // 4
    sizes = [math.prod(level.shape[1:-1]) for level in cls]

    def join(levels: Sequence[Tensor]) -> Tensor:
        return torch.cat([level.flatten(1, -2) for level in levels], dim=1).to(dtype)

    x, z = join(cls), join(box).unflatten(-1, (4, bins))
    label = torch.cat(list(labels), dim=1)
    stride = torch.cat(
        [x.new_full((size, 1), s, dtype=dtype) for size, s in zip(sizes, strides, strict=True)]
    )
    point = torch.cat(list(points)).to(dtype) / stride
    target = torch.cat(list(box_targets), dim=1).to(dtype) / stride
    if targets:
        q = join(targets)
        positive, weight = label != 0, q.sum(-1)
    else:
        of_class = label.unsqueeze(-1) == torch.arange(classes, device=x.device)
        positive, weight = of_class.any(-1), x.detach().amax(-1).sigmoid()

    # What is not positive counts as a box of its own, so that nothing of it, NaN included, passes.
    mask = positive.unsqueeze(-1)
    z = torch.where(mask.unsqueeze(-1), z, 0)
    distances = expectation(z, torch.arange(bins, device=z.device, dtype=dtype))
    decoded = decode_box(point, distances)
    target = torch.where(mask, target, decoded.detach())
    sides = torch.cat([point - target[..., :2], target[..., 2:] - point], dim=-1).clamp(0, limit)
    terms = torch.stack(
        [
            box_loss(decoded, target, iou, iou_eps),
            distribution_loss(z, *split_target(sides, bins)).sum(-1),
        ]
    )
    weight = torch.where(positive, weight, 0)
    terms = torch.where(positive, terms * weight, 0)
    quality = torch.where(positive, box_iou(decoded.detach(), target), 0)

    if not targets:
        q = torch.where(of_class, quality.unsqueeze(-1), 0)
        counts = torch.stack([positive.sum(1).clamp(min=1).sum().to(dtype), weight.sum()])
        first, second = normalise(counts).unbind()
        divisors = first + EPS, second.clamp(min=1)
    else:
        first, second = normalise(weight.sum().expand(2)).clamp(min=1).unbind()
        divisors = first, second
    if label_weights:
        row_weight = torch.cat(list(label_weights), dim=1).to(dtype)
        unread = row_weight == 0
        x = torch.where(unread.unsqueeze(-1), 0.5, x)
    form = VARIFOCAL if varifocal else LOGITS
    cls_loss = form_loss(x, q, q > 0, form, 0, alpha, beta)
    rows = cls_loss.sum(-1)
    if label_weights:
        rows = torch.where(unread, 0, rows * row_weight)

    def levels(values: Tensor, factor: Tensor) -> Tensor:
        return torch.stack([part.sum() for part in values.split(sizes, dim=1)]) * factor

    losses = torch.stack(
        [
            levels(rows, loss_weights[0] / divisors[0]),
            levels(terms[0], loss_weights[1] / divisors[1]),
            levels(terms[1], loss_weights[2] / divisors[1]),
        ]
    )
    return losses, quality, torch.where(mask, decoded.detach() * stride, 0)


def _reduce(loss: Tensor, reduction: str, avg_factor: float | Tensor | None) -> Tensor:
    """mmdetection's weight_reduce_loss, but the mean over no rows is 0, on the graph, not NaN."""
    if reduction == "none":
        return loss
    if avg_factor is None:
        return loss.sum() / max(loss.numel(), 1) if reduction == "mean" else loss.sum()
    if reduction == "sum":
        raise ValueError('avg_factor can not be used with reduction="sum"')
    if isinstance(avg_factor, Tensor):
        avg_factor = avg_factor.detach().to(loss.dtype)
    return loss.sum() / (avg_factor + EPS)
