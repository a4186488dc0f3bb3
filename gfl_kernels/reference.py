"""The mathematics in eager PyTorch: the oracle of the tests and the backend of last resort.

Any floating dtype, any device, no hand-written gradient: autograd differentiates these expressions,
twice if asked. They are written so that neither the value nor a derivative overflows, cancels or
turns into NaN, for every beta >= 0 and for logits of +-1e4 and beyond. The names and their order
are those of csrc/math.h.

Notation: s = sigmoid(x), d = s - q, softplus(x) = log(1 + exp(x)).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = torch.finfo(torch.float32).eps  # mmdetection adds it to avg_factor, in every dtype


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


# Distribution family


def split_target(t: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """(l, wl, wr): l = floor(t), wl = l + 1 - t, wr = t - l, t clamped into [0, bins - 1].

    The weights of a NaN are NaN.
    """
    t = t.clamp(0, bins - 1)
    left = t.floor()
    return left, left + 1 - t, t - left


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
    dtype = accumulate_dtype(pred.dtype)
    x = pred.movedim(class_dim, -1).to(dtype)
    if isinstance(target, (tuple, list)):
        label, score = target
        classes = torch.arange(x.shape[-1], device=x.device)
        # A label outside [0, C), also -1, 255 or NaN, equals no class: the row is background, q = 0
        # everywhere.
        q = torch.where(label.unsqueeze(-1) == classes, score.unsqueeze(-1).to(dtype), 0)
    else:
        q = target.movedim(class_dim, -1).to(dtype)
    if weight is not None:
        weight = weight.to(dtype)
        weight = weight.movedim(class_dim, -1) if weight.dim() == x.dim() else weight.unsqueeze(-1)
        unread = weight == 0
        x = torch.where(unread, 0.5, x)
    loss = (quality_loss_probability if activated else quality_loss)(x, q, beta)
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


def integral(pred: Tensor, *, bins: Tensor | None = None, bin_dim: int = -1) -> Tensor:
    """See :func:`gfl_kernels.integral`."""
    dtype = accumulate_dtype(pred.dtype)
    z = pred.movedim(bin_dim, -1).to(dtype)
    y = torch.arange(z.shape[-1], device=z.device, dtype=dtype) if bins is None else bins.to(dtype)
    return expectation(z, y)


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
