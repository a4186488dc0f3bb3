"""The public functions: argument checks, layouts, reductions. User errors are raised here, once."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import debug, dispatch, ops, reference
from .reference import (
    BALANCED,
    DETACH_WEIGHT,
    EPS,
    FOCAL,
    FOCAL_PROBABILITIES,
    IOU_AWARE,
    LOGITS,
    MATCHABILITY,
    PROBABILITIES,
    UNIT_POSITIVES,
    VARIFOCAL,
    VARIFOCAL_PROBABILITIES,
    DistributionMoments,
)

_REDUCTIONS = ("none", "mean", "sum")


def quality_focal_loss(
    pred: Tensor,
    target: Tensor | tuple[Tensor, Tensor],
    *,
    beta: float = 2.0,
    alpha: float | None = None,
    weight: Tensor | None = None,
    avg_factor: float | Tensor | None = None,
    reduction: str = "mean",
    activated: bool = False,
    class_dim: int = -1,
) -> Tensor:
    r"""Quality Focal Loss, fused: the joint class-quality score's loss of Generalized Focal Loss.

    .. math:: L = \sum_c |\sigma(x_c) - q_c|^\beta \,
        [-q_c \log\sigma(x_c) - (1 - q_c)\log(1 - \sigma(x_c))]

    for each row (anchor), with q the quality target: the IoU for the class of a positive anchor, 0
    elsewhere.
    Source: Li et al. 2020, "Generalized Focal Loss", equation 4; mmdetection's
    ``quality_focal_loss``, ``quality_focal_loss_tensor_target`` and (``activated=True``)
    ``quality_focal_loss_with_prob``.

    With ``beta=0`` this is binary cross entropy against soft targets, the classification loss of
    task-aligned heads (TOOD's, YOLOv8 to 12): ``F.binary_cross_entropy_with_logits(pred, target,
    weight)``; a weight per class [C] is ``weight=class_weight.expand(pred.shape)``, which copies
    nothing. With ``alpha`` it is the position-supervised loss of Stable-DINO and RF-DETR.

    Args:
        pred: logits [..., C], or probabilities with ``activated=True``; float32, float64, bfloat16
            or float16, any strides, read in place.
        target: sparse, a pair (label [...], score [...]) where a label outside [0, C) is background
            (trained to 0); or dense, a tensor of pred's shape with the quality of every class. Any
            dtype.
        beta: the focusing exponent, >= 0. 2 is the fast case.
        alpha: in [0, 1]: what has a target above 0 counts alpha times, the rest 1 - alpha times.
            None for neither; not with ``activated``.
        weight: a weight per row [...] or per element (pred's shape). What has weight 0 contributes
            exactly 0 to loss and gradient, NaN logits included.
        avg_factor: with "mean", divide by avg_factor + eps(float32) instead of by the number of
            rows. A number or a tensor of one element, which is never read by the host. Not
            differentiated. Ignored by "none".
        reduction: "mean" (over rows), "sum", or "none" for one loss per row.
        activated: pred holds probabilities. Logs are clamped at -100 as in
            ``F.binary_cross_entropy``.
        class_dim: where the classes lie in pred (and in a dense target or full weight), 1 for [B,
            C, H, W].

    Returns:
        A scalar (shape [1] if avg_factor has it), or [...] for "none"; float32, or float64 for
        float64. An empty batch gives 0, connected to the graph. The gradient has pred's dtype and
        layout.

    Raises:
        TypeError, ValueError: for arguments of the wrong type, dtype, device or shape, naming what
            was expected.
        RuntimeError: a forced backend cannot serve the call, or its gradient is differentiated
            again.
    """
    if alpha is not None:
        name = "quality_focal_loss"
        _check_fraction(name, "alpha", alpha)
        if activated:
            raise ValueError(f"{name}: alpha needs logits: activated must be False")
        rule = BALANCED, 0, alpha, beta
        return _quality_family(name, pred, target, rule, weight, avg_factor, reduction, class_dim)
    return _quality_focal_loss(
        pred, target, beta, weight, avg_factor, reduction, activated, class_dim
    )


def varifocal_loss(
    pred: Tensor,
    target: Tensor | tuple[Tensor, Tensor],
    *,
    alpha: float = 0.75,
    gamma: float = 2.0,
    iou_weighted: bool = True,
    detach_weight: bool = False,
    weight: Tensor | None = None,
    avg_factor: float | Tensor | None = None,
    reduction: str = "mean",
    activated: bool = False,
    class_dim: int = -1,
) -> Tensor:
    r"""Varifocal Loss, fused: positives weighted by their quality, the rest focused.

    .. math:: L = \sum_c w_c \, \mathrm{BCE}(x_c, q_c), \quad
        w = q \text{ on positives}, \; \alpha \, \sigma(x)^\gamma \text{ on the others}

    for each row. Source: Zhang et al. 2021, "VarifocalNet", equation 2. Hosts differ in what is
    positive and in whether the gradient goes through the weight:

    - mmdetection, PaddleDetection (VFNet, PicoDet): a dense target, positive where q > 0.
    - super-gradients, ultralytics' RT-DETR, PaddleDetection's RT-DETR: a pair (label, score), the
      row's class being positive also where its score is 0 (and weighs 0).
    - YOLOv6, PP-YOLOE: the same with ``activated=True``.
    - RT-DETR, D-FINE (alpha 0.2), transformers: the same with ``detach_weight=True``.
    - RF-DETR's ``sigmoid_varifocal_loss(alpha)``: a dense target with ``alpha=1 - alpha``.

    A host with dense targets of the label form has them in ``(label, targets.gather(-1,
    label.clamp(0, C - 1).unsqueeze(-1)).squeeze(-1))``; one with labels where a score of 0 is
    background passes ``torch.where(score > 0, label, -1)``.

    Args:
        pred: logits [..., C], or probabilities with ``activated=True``; dtypes and strides as in
            :func:`quality_focal_loss`.
        target: a pair (label [...], score [...]), a label outside [0, C) being background; or a
            dense tensor of pred's shape.
        alpha: the weight of what is not positive, >= 0.
        gamma: its focusing exponent, >= 0. 2 is the fast case.
        iou_weighted: False: positives weigh 1 (mmdetection).
        detach_weight: the weight is a constant of the derivative.
        weight, class_dim: as in :func:`quality_focal_loss`.
        avg_factor, reduction: as in :func:`quality_focal_loss`: the loss of a row is the sum over
            its classes, "mean" is over rows. mmdetection's avg_factor is this one; a host that
            divides its sum by n has ``reduction="sum"`` and a division, or ``avg_factor=n`` (plus
            eps(float32)); DETR's ``loss.mean(1).sum() * queries / boxes`` is ``avg_factor=boxes``.
            Means over elements are those of :class:`VarifocalLoss`.
        activated: pred holds probabilities, with the rules of ``F.binary_cross_entropy``.

    Returns:
        As :func:`quality_focal_loss`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`quality_focal_loss`.
    """
    rule = _varifocal_rule(alpha, gamma, iou_weighted, detach_weight, activated)
    return _quality_family(
        "varifocal_loss", pred, target, rule, weight, avg_factor, reduction, class_dim
    )


def matchability_aware_loss(
    pred: Tensor,
    target: Tensor | tuple[Tensor, Tensor],
    *,
    gamma: float = 1.5,
    mal_alpha: float | None = None,
    weight: Tensor | None = None,
    avg_factor: float | Tensor | None = None,
    reduction: str = "mean",
    class_dim: int = -1,
) -> Tensor:
    r"""Matchability-Aware Loss, fused: DEIM's, which trains poor matches, too.

    .. math:: L = \sum_c \mathrm{BCE}(x_c, q_c^\gamma) \text{ on positives}, \;
        \alpha \, \sigma(x_c)^\gamma \, \mathrm{BCE}(x_c, 0) \text{ on the others}

    for each row, with a weight that is a constant of the derivative. Source: Huang et al. 2024,
    "DEIM", equation 3; DEIM's and DEIMv2's ``loss_labels_mal``, which is ``avg_factor=num_boxes``.

    Args:
        pred: logits [..., C].
        target: a pair (label [...], IoU [...]), whose class is positive whatever the IoU; or a
            dense tensor of pred's shape, positive where it is above 0.
        gamma: the exponent of both, >= 0.
        mal_alpha: the weight of what is not positive, >= 0; None for 1.
        weight, avg_factor, reduction, class_dim: as in :func:`quality_focal_loss`.

    Returns:
        As :func:`quality_focal_loss`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`quality_focal_loss`.
    """
    name = "matchability_aware_loss"
    alpha = 1.0 if mal_alpha is None else mal_alpha
    _check_not_negative(name, "mal_alpha", alpha)
    rule = MATCHABILITY, 0, alpha, gamma
    return _quality_family(
        name, pred, target, rule, weight, avg_factor, reduction, class_dim, exponent="gamma"
    )


def ia_bce_loss(
    pred: Tensor,
    target: Tensor | tuple[Tensor, Tensor],
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    avg_factor: float | Tensor | None = None,
    reduction: str = "mean",
    class_dim: int = -1,
) -> Tensor:
    r"""IA-BCE, fused: IoU-aware binary cross entropy of Align-DETR and RF-DETR.

    .. math:: L = \sum_c \mathrm{BCE}(x_c, t_c) \text{ on positives}, \;
        \sigma(x_c)^\gamma \, \mathrm{BCE}(x_c, 0) \text{ on the others}, \quad
        t = \max(\sigma(x)^\alpha q^{1 - \alpha}, 0.01)

    for each row. t is a constant of the derivative, the weight of the others is not. Source: Cai et
    al. 2023, "Align-DETR", equation 3; RF-DETR's ``ia_bce_loss``, which is
    ``avg_factor=num_boxes``.

    Args:
        pred: logits [..., C].
        target: a pair (label [...], IoU [...]), whose class is positive whatever the IoU; or a
            dense tensor of pred's shape, positive where it is above 0.
        alpha: the share of the score in the target, in [0, 1].
        gamma: the focusing exponent of what is not positive, >= 0.
        weight, avg_factor, reduction, class_dim: as in :func:`quality_focal_loss`.

    Returns:
        As :func:`quality_focal_loss`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`quality_focal_loss`.
    """
    name = "ia_bce_loss"
    _check_fraction(name, "alpha", alpha)
    rule = IOU_AWARE, 0, alpha, gamma
    return _quality_family(
        name, pred, target, rule, weight, avg_factor, reduction, class_dim, exponent="gamma"
    )


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor | tuple[Tensor, Tensor],
    alpha: float = 0.25,
    gamma: float = 2,
    reduction: str = "none",
    *,
    weight: Tensor | None = None,
    avg_factor: float | Tensor | None = None,
    activated: bool = False,
    class_dim: int = -1,
) -> Tensor:
    r"""Focal Loss on sigmoid scores, fused: ``torchvision.ops.sigmoid_focal_loss``, also without a
    one-hot target.

    .. math:: L = \alpha_t \, m^\gamma \, \mathrm{BCE}(x, y), \quad
        m = y (1 - \sigma(x)) + (1 - y) \sigma(x), \;
        \alpha_t = \alpha y + (1 - \alpha) (1 - y)

    for each element. Source: Lin et al. 2017, "Focal Loss for Dense Object Detection", equation 5;
    torchvision 0.29.1, whose reductions over elements these are, and fvcore.

    Args:
        inputs: logits of any shape; with labels [..., C]. Dtypes and strides as in
            :func:`quality_focal_loss`.
        targets: y, of inputs' shape, between 0 and 1; or integer labels [...], where one outside
            [0, C) is background; or a pair (label [...], y of the label's class [...]).
        alpha: in [0, 1], or negative for a factor of 1.
        gamma: the focusing exponent, >= 0. 2 is the fast case.
        reduction: "none" for a loss per element, in inputs' shape; "mean" over all elements; "sum".
        weight: a weight per row [...] or per element; as in :func:`quality_focal_loss`.
        avg_factor: with "mean", divide the sum by avg_factor + eps(float32) instead, as in
            :func:`quality_focal_loss`. DETR's ``loss.mean(1).sum() * queries / boxes`` is
            ``reduction="mean", avg_factor=boxes``.
        activated: inputs are probabilities, with the rules of ``F.binary_cross_entropy``
            (mmdetection's ``FocalLoss(activated=True)``).
        class_dim: where the classes lie; matters with labels or row weights.

    Returns:
        A scalar, or a tensor of inputs' shape for "none"; float32, or float64 for float64, where
        torchvision has inputs' dtype. The mean over no elements is 0.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`quality_focal_loss`.
    """
    return _sigmoid_focal_loss(
        inputs, targets, alpha, gamma, reduction, weight, avg_factor, activated, class_dim
    )


def distribution_focal_loss(
    pred: Tensor,
    target: Tensor | tuple[Tensor, Tensor, Tensor],
    *,
    weight: Tensor | None = None,
    avg_factor: float | Tensor | None = None,
    reduction: str = "mean",
    bin_dim: int = -1,
    bins: Sequence[float] | None = None,
) -> Tensor:
    r"""Distribution Focal Loss, fused: cross entropy against the two bins around the target.

    .. math:: L = -(l + 1 - t) \log p_l - (t - l) \log p_{l+1},
        \quad p = \mathrm{softmax}(z), \; l = \lfloor t \rfloor

    for each row (side of a box). Source: Li et al. 2020, equation 6; mmdetection's
    ``distribution_focal_loss``.

    Args:
        pred: logits [..., K] over K = reg_max + 1 bins; float32, float64, bfloat16 or float16, any
            strides.
        target: the position in bins [...], clamped into [0, K - 1] (eager PyTorch ends in a
            device-side assert there); or a triple (left bin, left weight, right weight), each
            [...], for bins that are not evenly spaced.
        weight: a weight per row [...]. Rows of weight 0 are not read.
        avg_factor, reduction: as in :func:`quality_focal_loss`.
        bin_dim: where the bins lie in pred, 1 for [B, K, A].
        bins: (lower, upper, step), both ends among the K bins, if the target is not a number of a
            bin but in units of its own, in which bin k lies at lower + k step: PP-YOLOE's
            ``reg_range`` (-2, 17) is (-2, 16, 1). The target is clamped into [lower, upper]; hosts
            that stop short of the end (PP-YOLOE at 15.99 of 16) clamp it themselves. Not with a
            triple: :func:`gfl_kernels.bin_weights` makes one for bins of any spacing.

    Returns:
        A scalar, or [...] for "none"; float32, or float64 for float64.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`quality_focal_loss`.
    """
    if bins is not None:
        target = _in_bins(pred, target, bins, bin_dim)
    return _distribution_focal_loss(pred, target, weight, avg_factor, reduction, bin_dim)


def bin_weights(target: Tensor, bins: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""(left, weight_left, weight_right) of targets among bins of any spacing, a target of
    :func:`distribution_focal_loss`: D-FINE's fine-grained localization loss.

    .. math:: l = |\{k : y_k \le t\}| - 1, \quad w_r = \frac{t - y_l}{y_{l + 1} - y_l}, \quad
        w_l = 1 - w_r

    A target below the first bin has l = 0 and all weight there, one from the last bin on l = K - 2
    and all weight on the last bin. The weights of a NaN are NaN. Source: Peng et al. 2024,
    D-FINE's ``translate_gt``, whose numbers these are with ``bins`` its ``weighting_function``.
    Nothing is read by the host.

    Args:
        target: [...], in the bins' units; any dtype.
        bins: the value of each bin [K], K >= 2, strictly ascending.

    Returns:
        Three tensors [...], left int64, the weights float32, or float64 if one of the two is.

    Raises:
        TypeError, ValueError: for arguments of the wrong type, device or shape.
    """
    name = "bin_weights"
    for argument, tensor in (("target", target), ("bins", bins)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {argument} must be a Tensor, got {type(tensor).__name__}")
    _check_tensor(name, "bins", bins, target)
    if bins.dim() != 1 or bins.shape[0] < 2:
        raise ValueError(f"{name}: bins must have shape (K,), K >= 2, got {tuple(bins.shape)}")
    dtype = reference.accumulate_dtype(torch.promote_types(target.dtype, bins.dtype))
    return reference.bin_weights(target.to(dtype), bins.to(dtype))


def integral(
    pred: Tensor,
    *,
    bins: Tensor | Sequence[float] | None = None,
    bin_dim: int = -1,
    mode: str = "mean",
    window: int = 2,
) -> Tensor:
    r"""Expectation of the distribution of each row, fused: :math:`E = \sum_k y_k \,
    \mathrm{softmax}(z)_k`.

    Source: Li et al. 2020, equation 5; mmdetection's ``Integral``, ultralytics' ``DFL`` layer.

    Args:
        pred: logits [..., K]; float32, float64, bfloat16 or float16, any strides.
        bins: the value y of each bin: a tensor [K], or (lower, upper, step) with both ends among
            them (PP-YOLOE's ``reg_range`` (-2, 17) is (-2, 16, 1)); 0, 1, ..., K - 1 if not given.
        bin_dim: where the bins lie in pred.
        mode: "mean", over all bins; or "peak", over the bins beside the highest one alone, softmax
            being taken among them. An edge that may be at two places has a mean between them, where
            no edge is, and a peak at the likelier one.
        window: how many bins on either side of the highest "peak" takes in, >= 0: 2 * window + 1
            bins, fewer at an end. 0 is the value of the highest bin. Of equal logits the first is
            the highest; the gradient takes the choice as constant.

    Returns:
        [...], in the bins' units; float32, or float64 for float64: half precision would move a box
        by up to 0.1 bin. The gradient has pred's dtype and layout.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`quality_focal_loss`.
    """
    name = "integral"
    compiled = dispatch.compiled_calls()
    if compiled is not None:
        out = compiled.integral(pred, bins, bin_dim, mode, window)
        if out is not None:
            return out
    _check_pred(name, pred, bin_dim, "K", "bin_dim")
    bins = _bin_values(name, bins, pred.shape[bin_dim], pred)
    if mode not in ("mean", "peak"):
        raise ValueError(f"{name}: mode must be mean or peak, got {mode!r}")
    _check_int(name, "window", window)
    if window < 0:
        raise ValueError(f"{name}: window must be >= 0, got {window}")
    backend = dispatch.choose(name, pred, bins)
    if backend == "reference":
        return reference.integral(pred, bins=bins, bin_dim=bin_dim, mode=mode, window=window)
    # A window that takes in all bins everywhere is the mean.
    window = window if mode == "peak" and window < pred.shape[bin_dim] - 1 else -1
    pred = _last(pred, bin_dim)
    save = (
        backend == "cpu"
        and window < 0
        and pred.requires_grad
        and torch.is_grad_enabled()
        and pred.is_contiguous()
    )
    if torch.compiler.is_compiling():
        out, _ = torch.ops.gfl_kernels.integral_forward(pred, bins, window, save)
        return out
    return ops.apply_integral(backend, pred, bins, window, save)


def distribution_statistics(
    pred: Tensor, *, topk: int = 4, add_mean: bool = True, bin_dim: int = -1
) -> Tensor:
    """The highest probabilities of the distribution of each row, fused: softmax, top-k and mean.

    They tell how sharp a side's distribution is, and so how good its box. Source: Li et al. 2021,
    "Generalized Focal Loss V2", the input of its Distribution-Guided Quality Predictor; LD,
    PaddleDetection's DGQP, the LQE of D-FINE and DEIM.

    Args:
        pred: logits [..., K]; float32, float64, bfloat16 or float16, any strides.
        topk: how many, from 1 to K.
        add_mean: whether the mean of the topk comes behind them.
        bin_dim: where the bins lie in pred, 2 for [B, 4, K, H, W].

    Returns:
        pred's shape with topk + 1 (or topk) in place of K, in descending order; float32, or float64
        for float64. Dimensions lie in memory as they do in pred: of a head's [B, 4, K, H, W],
        ``.flatten(1, 2)`` is the input of GFLv2's convolution. The gradient has pred's dtype and
        layout; of equal logits the first bin comes first, where ``torch.topk`` takes any.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`quality_focal_loss`.
    """
    name = "distribution_statistics"
    _check_pred(name, pred, bin_dim, "K", "bin_dim")
    _check_int(name, "topk", topk)
    bins = pred.shape[bin_dim]
    if not 1 <= topk <= bins:
        raise ValueError(f"{name}: topk must be in [1, K] = [1, {bins}], got {topk}")
    add_mean = bool(add_mean)
    backend = dispatch.choose(name, pred)
    if backend == "reference":
        return reference.distribution_statistics(
            pred, topk=topk, add_mean=add_mean, bin_dim=bin_dim
        )
    values = _summary("statistics", backend, _last(pred, bin_dim), topk, add_mean)
    return values if bin_dim == -1 else values.movedim(-1, bin_dim)


def distribution_moments(
    pred: Tensor, *, bins: Tensor | Sequence[float] | None = None, bin_dim: int = -1
) -> DistributionMoments:
    r"""Mean, standard deviation and entropy of the distribution of each row, fused.

    .. math:: E = \sum_k p_k y_k, \quad \sqrt{\textstyle\sum_k p_k (y_k - E)^2}, \quad
        -\sum_k p_k \log p_k, \quad p = \mathrm{softmax}(z)

    The last two measure how uncertain a side of a box is.

    Args:
        pred: logits [..., K]; float32, float64, bfloat16 or float16, any strides.
        bins: the value y of each bin, as in :func:`integral`.
        bin_dim: where the bins lie in pred.

    Returns:
        A named tuple (mean, std, entropy), each [...], the first two in bins, entropy in nats;
        float32, or float64 for float64. A std of 0 has a gradient of 0. A bin with a logit of -inf
        has no part in any. The gradient has pred's dtype and layout.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`quality_focal_loss`.
    """
    name = "distribution_moments"
    _check_pred(name, pred, bin_dim, "K", "bin_dim")
    bins = _bin_values(name, bins, pred.shape[bin_dim], pred)
    backend = dispatch.choose(name, pred, bins)
    if backend == "reference":
        return reference.distribution_moments(pred, bins=bins, bin_dim=bin_dim)
    values = _summary("moments", backend, _last(pred, bin_dim), bins)
    return DistributionMoments(*values.unbind(-1))


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
    r"""Localization distillation, fused: the student's distributions drawn to the teacher's.

    .. math:: L = T^2 \, \mathrm{KL}(\mathrm{softmax}(z_t / T) \,\|\, \mathrm{softmax}(z / T))

    for each row (side of a box), the teacher being a constant. Source: Zheng et al. 2022,
    "Localization Distillation for Dense Object Detection"; mmdetection's
    ``KnowledgeDistillationKLDivLoss``.

    mmdetection's LDHead has T = 10, the mean over bins, weights and an avg_factor. YOLOv6 has T =
    20, the sum over bins, and the mean over rows before any weight. D-FINE's DDF has T = 5, the sum
    over bins, and of matched and of other rows the means, weighed by the roots of their numbers:
    ``reduction="sum"`` with each row's weight divided by sqrt(n) (sqrt(n_matched) + sqrt(n_other)),
    n being n_matched or n_other.

    Args:
        pred: the student's logits [..., K]; float32, float64, bfloat16 or float16, any strides.
        teacher: its logits, of pred's shape. The wider of two dtypes serves both.
        temperature: T > 0.
        bin_reduction: "mean" divides the divergence by K; "sum" is the divergence.
        weight: a weight per row [...]. Rows of weight 0 contribute exactly 0.
        avg_factor, reduction: as in :func:`quality_focal_loss`.
        bin_dim: where the bins lie in both, 1 for [B, K, A].

    Returns:
        A scalar, or [...] for "none"; float32, or float64 for float64.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`quality_focal_loss`.
    """
    name = "localization_distillation_loss"
    _check_pred(name, pred, bin_dim, "K", "bin_dim")
    _check_tensor(name, "teacher", teacher, pred)
    if not teacher.is_floating_point():
        raise TypeError(f"{name}: teacher must have a floating dtype, got {teacher.dtype}")
    if teacher.shape != pred.shape:
        raise _wrong_shape(name, "teacher", "pred's shape", pred.shape, teacher)
    _check_number(name, "temperature", temperature)
    if not temperature > 0:
        raise ValueError(f"{name}: temperature must be > 0, got {temperature}")
    if bin_reduction not in ("mean", "sum"):
        raise ValueError(f"{name}: bin_reduction must be mean or sum, got {bin_reduction!r}")
    if weight is not None:
        _check_row_tensor(name, "weight", weight, pred, _rows(pred, bin_dim))
    avg_factor = _check_reduction(name, reduction, avg_factor, pred)
    teacher = teacher.detach()
    if teacher.dtype != pred.dtype:
        dtype = torch.promote_types(teacher.dtype, pred.dtype)
        pred, teacher = pred.to(dtype), teacher.to(dtype)
    backend = dispatch.choose(name, pred, weight)
    if backend == "reference":
        return reference.localization_distillation_loss(
            pred,
            teacher,
            temperature=temperature,
            bin_reduction=bin_reduction,
            weight=weight,
            avg_factor=avg_factor,
            reduction=reduction,
            bin_dim=bin_dim,
        )
    return _run(
        "distillation",
        (_last(pred, bin_dim), _last(teacher, bin_dim), weight),
        (float(temperature),),
        reduction,
        avg_factor,
        reference.distillation_scale(temperature, bin_reduction, pred.shape[bin_dim]),
        backend,
    )


def _quality_focal_loss(
    pred: Tensor,
    target: Any,
    beta: float,
    weight: Any,
    avg_factor: float | Tensor | None,
    reduction: str,
    activated: bool,
    class_dim: int = -1,
    loss_weight: float = 1.0,
) -> Tensor:
    """quality_focal_loss with a loss weight folded in, so that the upstream gradient is 1."""
    rule = PROBABILITIES if activated else LOGITS, 0, 0.0, beta
    return _quality_family(
        "quality_focal_loss",
        pred,
        target,
        rule,
        weight,
        avg_factor,
        reduction,
        class_dim,
        loss_weight,
    )


def _varifocal_rule(
    alpha: float, gamma: float, iou_weighted: bool, detach_weight: bool, activated: bool
) -> tuple[int, int, float, float]:
    _check_not_negative("varifocal_loss", "alpha", alpha)
    _check_not_negative("varifocal_loss", "gamma", gamma)
    flags = (DETACH_WEIGHT if detach_weight else 0) | (0 if iou_weighted else UNIT_POSITIVES)
    return VARIFOCAL_PROBABILITIES if activated else VARIFOCAL, flags, alpha, gamma


def _sigmoid_focal_loss(
    inputs: Tensor,
    targets: Any,
    alpha: float,
    gamma: float,
    reduction: str,
    weight: Any,
    avg_factor: float | Tensor | None,
    activated: bool,
    class_dim: int = -1,
    loss_weight: float = 1.0,
) -> Tensor:
    """sigmoid_focal_loss with a loss weight folded in."""
    name = "sigmoid_focal_loss"
    _check_number(name, "alpha", alpha)
    if not alpha <= 1:
        raise ValueError(f"{name}: alpha must be in [0, 1] or negative, got {alpha}")
    if isinstance(inputs, Tensor) and isinstance(targets, Tensor):
        if inputs.dim() == 0 and targets.dim() == 0:
            scalar = _sigmoid_focal_loss(
                inputs.view(1),
                targets.view(1),
                alpha,
                gamma,
                reduction,
                weight,
                avg_factor,
                activated,
                loss_weight=loss_weight,
            )
            return scalar.view(())
        if targets.dim() == inputs.dim() - 1:
            if targets.is_floating_point() or targets.is_complex():
                raise TypeError(
                    f"{name}: targets must be integer labels {tuple(targets.shape)} or have "
                    f"inputs' shape {tuple(inputs.shape)}, got {targets.dtype}"
                )
            score = torch.ones((), device=targets.device)
            targets = (targets, score.expand(targets.shape))
    rule = FOCAL_PROBABILITIES if activated else FOCAL, 0, alpha, gamma
    return _quality_family(
        name,
        inputs,
        targets,
        rule,
        weight,
        avg_factor,
        reduction,
        class_dim,
        loss_weight,
        exponent="gamma",
        elementwise=True,
    )


def _quality_family(
    name: str,
    pred: Tensor,
    target: Any,
    rule: tuple[int, int, float, float],
    weight: Any,
    avg_factor: float | Tensor | None,
    reduction: str,
    class_dim: int = -1,
    loss_weight: float = 1.0,
    *,
    exponent: str = "beta",
    elementwise: bool = False,
) -> Tensor:
    """A loss of the quality family. rule: (form, flags, alpha, beta) as the op takes them;
    exponent: what the caller's users call beta.

    elementwise: "none" is a loss per element and "mean" is over elements, as in torchvision and in
    mmdetection where the loss of a row has not been summed first.
    """
    compiled = dispatch.compiled_calls()
    if compiled is not None:
        loss = compiled.quality(
            pred, target, *rule, weight, avg_factor, reduction, class_dim, loss_weight, elementwise
        )
        if loss is not None:
            return loss
    form, flags, alpha, beta = rule
    _check_pred(name, pred, class_dim, "C", "class_dim")
    rows = _rows(pred, class_dim)
    if isinstance(target, (tuple, list)):
        if len(target) != 2:
            raise ValueError(
                f"{name}: target must be (label, score), "
                f"got a {type(target).__name__} of {len(target)}"
            )
        target, score = target
        _check_row_tensor(name, "label", target, pred, rows)
        _check_row_tensor(name, "score", score, pred, rows)
    else:
        score = None
        _check_tensor(name, "target", target, pred)
        if target.shape != pred.shape:
            raise _wrong_shape(
                name, "target", "pred's shape or be a tuple (label, score):", pred.shape, target
            )
    _check_not_negative(name, exponent, beta)
    if weight is not None:
        _check_tensor(name, "weight", weight, pred)
        if weight.shape == (*rows, 1) and class_dim == -1:
            weight = weight.squeeze(-1)
        if weight.shape != rows and weight.shape != pred.shape:
            expected = f"a value per row {tuple(rows)} or per element {tuple(pred.shape)}"
            raise ValueError(f"{name}: weight must have {expected}, got {tuple(weight.shape)}")
    avg_factor = _check_reduction(name, reduction, avg_factor, pred)
    if dispatch.DEBUG:
        activated = form in (PROBABILITIES, VARIFOCAL_PROBABILITIES, FOCAL_PROBABILITIES)
        debug.check_quality(name, pred, target, score, class_dim, activated)
    if elementwise and reduction == "none":
        pred, target, score, weight = _as_elements(pred, target, score, weight, class_dim)
        class_dim = -1
    elif elementwise and reduction == "mean" and avg_factor is None:
        loss_weight = loss_weight / pred.shape[class_dim]

    backend = dispatch.choose(name, pred, target, score, weight)
    if backend == "reference":
        target = target if score is None else (target, score)
        loss = reference.quality_family_loss(
            pred, target, form, flags, alpha, beta, weight, avg_factor, reduction, class_dim
        )
        return loss if loss_weight == 1 else loss * loss_weight
    if class_dim != -1:
        full = weight is not None and weight.dim() == pred.dim()
        pred, weight = _last(pred, class_dim), _last(weight, class_dim) if full else weight
        target = _last(target, class_dim) if score is None else target
    return _run(
        "quality",
        (pred, target, score, weight),
        (form, flags, float(alpha), float(beta)),
        reduction,
        avg_factor,
        loss_weight,
        backend,
    )


def _as_elements(
    pred: Tensor, target: Tensor, score: Tensor | None, weight: Tensor | None, class_dim: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The four with every element a row of one class."""
    if weight is not None and weight.dim() < pred.dim():
        weight = weight.unsqueeze(class_dim).expand(pred.shape)
    if score is None:
        return pred.unsqueeze(-1), target.unsqueeze(-1), None, weight
    size = [1] * pred.dim()
    size[class_dim] = -1
    classes = torch.arange(pred.shape[class_dim], device=pred.device).view(size)
    here = target.unsqueeze(class_dim) == classes
    label = here.to(torch.int8) - 1  # the one class, or none
    return pred.unsqueeze(-1), label, score.unsqueeze(class_dim).expand(pred.shape), weight


def _distribution_focal_loss(
    pred: Tensor,
    target: Any,
    weight: Tensor | None,
    avg_factor: float | Tensor | None,
    reduction: str,
    bin_dim: int = -1,
    loss_weight: float = 1.0,
) -> Tensor:
    """distribution_focal_loss with a loss weight folded in."""
    name = "distribution_focal_loss"
    compiled = dispatch.compiled_calls()
    if compiled is not None:
        loss = compiled.distribution(
            pred, target, weight, avg_factor, reduction, bin_dim, loss_weight
        )
        if loss is not None:
            return loss
    _check_pred(name, pred, bin_dim, "K", "bin_dim")
    rows = _rows(pred, bin_dim)
    if isinstance(target, (tuple, list)):
        if len(target) != 3:
            what = f"{type(target).__name__} of {len(target)}"
            raise ValueError(
                f"{name}: target must be (left, weight_left, weight_right), got a {what}"
            )
        target, weight_left, weight_right = target
        _check_row_tensor(name, "left", target, pred, rows)
        _check_row_tensor(name, "weight_left", weight_left, pred, rows)
        _check_row_tensor(name, "weight_right", weight_right, pred, rows)
    else:
        weight_left = weight_right = None
        _check_row_tensor(name, "target", target, pred, rows)
    if weight is not None:
        _check_row_tensor(name, "weight", weight, pred, rows)
    avg_factor = _check_reduction(name, reduction, avg_factor, pred)
    if dispatch.DEBUG:
        debug.check_distribution(name, target, weight_left, pred.shape[bin_dim])

    backend = dispatch.choose(name, pred, target, weight_left, weight_right, weight)
    if backend == "reference":
        target = target if weight_left is None else (target, weight_left, weight_right)
        loss = reference.distribution_focal_loss(
            pred, target, weight=weight, avg_factor=avg_factor, reduction=reduction, bin_dim=bin_dim
        )
        return loss if loss_weight == 1 else loss * loss_weight
    pred = _last(pred, bin_dim)
    return _run(
        "distribution",
        (pred, target, weight_left, weight_right, weight),
        (),
        reduction,
        avg_factor,
        loss_weight,
        backend,
    )


# Bins


def _bin_values(name: str, bins: Any, count: int, pred: Tensor) -> Tensor | None:
    """The value of each of count bins, in the type that pred is computed in; None for 0, 1, ..."""
    if bins is None:
        return None
    dtype = reference.accumulate_dtype(pred.dtype)
    if not isinstance(bins, Tensor):
        lower, upper, _ = _bin_range(name, bins, count)
        return torch.linspace(lower, upper, count, dtype=dtype, device=pred.device)
    _check_tensor(name, "bins", bins, pred)
    if bins.shape != (count,):
        raise _wrong_shape(name, "bins", "(K,)", (count,), bins)
    return bins.to(dtype)


def _bin_range(name: str, bins: Any, count: int) -> tuple[float, float, float]:
    """(lower, upper, step) of count evenly spaced bins, both ends among them."""
    if not isinstance(bins, Sequence) or len(bins) != 3:
        raise TypeError(
            f"{name}: bins must be a Tensor or (lower, upper, step), got {type(bins).__name__}"
        )
    for argument, value in zip(("lower", "upper", "step"), bins, strict=True):
        _check_number(name, f"bins' {argument}", value)
    lower, upper, step = bins
    if not step > 0:
        raise ValueError(f"{name}: bins' step must be > 0, got {step}")
    if not abs((upper - lower) / step - (count - 1)) <= 1e-3:
        raise ValueError(
            f"{name}: bins from {lower} to {upper} in steps of {step} do not match pred's {count}"
        )
    return float(lower), float(upper), float(step)


def _in_bins(pred: Tensor, target: Any, bins: Any, bin_dim: int) -> Tensor:
    """A target in bins' units as a position in bins."""
    name = "distribution_focal_loss"
    _check_pred(name, pred, bin_dim, "K", "bin_dim")
    if isinstance(target, (tuple, list)):
        raise ValueError(f"{name}: bins must be None with a target (left, weight_left, ...)")
    _check_row_tensor(name, "target", target, pred, _rows(pred, bin_dim))
    lower, _, step = _bin_range(name, bins, pred.shape[bin_dim])
    # Half targets would be rounded again.
    dtype = reference.accumulate_dtype(target.dtype)
    return (target.to(dtype) - lower) / step


# Layout and reduction


def _summary(which: str, backend: str, *inputs: Any) -> Tensor:
    """The op ``{which}_forward`` of a backend, or the op itself where torch.compile records one."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.gfl_kernels, f"{which}_forward")(*inputs)
    return ops.apply_distribution_summary(backend, which, *inputs)


def _last(tensor: Tensor, dim: int) -> Tensor:
    """tensor with dimension dim moved to the end: a view."""
    return tensor if dim == -1 else tensor.movedim(dim, -1)


def _rows(pred: Tensor, dim: int) -> torch.Size:
    shape = pred.shape
    return shape[:-1] if dim == -1 else shape[:dim] + shape[dim % pred.dim() + 1 :]


def _run(
    family: str,
    tensors: tuple[Any, ...],
    constants: tuple[Any, ...],
    reduction: str,
    avg_factor: float | Tensor | None,
    loss_weight: float,
    backend: str,
) -> Tensor:
    """Run a fused loss: its autograd Function, or the op ``{family}_forward`` itself where
    torch.compile records one.

    tensors and constants are the op's arguments before and after avg_factor; scale and the rest are
    made here.
    """
    code = (
        ops.NONE
        if reduction == "none"
        else ops.MEAN
        if avg_factor is None and reduction == "mean"
        else ops.SUM
    )
    pred, scale = tensors[0], loss_weight
    compiling = torch.compiler.is_compiling()
    if avg_factor is not None and not isinstance(avg_factor, Tensor):
        if compiling:
            # As a constant of the graph it would be compiled anew for every value.
            avg_factor = torch.scalar_tensor(avg_factor, dtype=torch.float64, device=pred.device)
        else:
            scale, avg_factor = loss_weight / float(avg_factor + EPS), None
    # Forward leaves the gradient where backward can use it as it is: on the CPU, where the host may
    # look for an upstream gradient of 1 (a GPU reads pred again instead, which moves less). Not for
    # float16: under a GradScaler the upstream gradient is never 1, and an unscaled float16 gradient
    # has already lost its small values.
    write_grad = (
        code != ops.NONE
        and backend == "cpu"
        and pred.dtype is not torch.float16
        and pred.requires_grad
        and torch.is_grad_enabled()
    )
    inputs = (*tensors, avg_factor, *constants, scale, code, write_grad)
    if compiling:
        loss = getattr(torch.ops.gfl_kernels, f"{family}_forward")(*inputs)[0]
    else:
        loss = ops.apply_loss[family](backend, pred, inputs)
    return loss if avg_factor is None or avg_factor.dim() == 0 else loss.view(1)


# Argument checks


def _check_pred(name: str, pred: Any, dim: Any, size: str, dim_name: str) -> None:
    if not isinstance(pred, Tensor):
        raise TypeError(f"{name}: pred must be a Tensor, got {type(pred).__name__}")
    if not pred.is_floating_point():
        raise TypeError(f"{name}: pred must have a floating dtype, got {pred.dtype}")
    if pred.layout is not torch.strided:
        raise _wrong_layout(name, "pred", pred)
    if not isinstance(dim, int):
        raise TypeError(f"{name}: {dim_name} must be an int, got {type(dim).__name__}")
    dims = pred.dim()
    if dims == 0:
        raise ValueError(
            f"{name}: pred must have shape (..., {size}), got a tensor without dimensions"
        )
    if not -dims <= dim < dims:
        raise ValueError(
            f"{name}: {dim_name} must be in [{-dims}, {dims - 1}] for pred of {dims} dimensions, "
            f"got {dim}"
        )
    if pred.shape[dim] == 0:
        raise ValueError(
            f"{name}: pred must have at least one entry along {dim_name}, got {tuple(pred.shape)}"
        )


def _check_reduction(
    name: str, reduction: str, avg_factor: Any, pred: Tensor
) -> float | Tensor | None:
    """avg_factor as it counts: None for "none", detached and on pred's device if it is a tensor."""
    if reduction not in _REDUCTIONS:
        raise ValueError(
            f"{name}: reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}"
        )
    if avg_factor is None or reduction == "none":
        return None
    if reduction == "sum":
        raise ValueError(f'{name}: avg_factor can not be used with reduction="sum"')
    if not isinstance(avg_factor, Tensor):
        _check_number(name, "avg_factor", avg_factor, " or a Tensor")
        return avg_factor
    if avg_factor.numel() != 1 or avg_factor.dim() > 1:
        got = tuple(avg_factor.shape)
        raise ValueError(
            f"{name}: avg_factor must be a number or a tensor of shape () or (1,), got {got}"
        )
    if avg_factor.device != pred.device:
        if not avg_factor.is_cpu or avg_factor.dim() > 0:
            raise _wrong_device(name, "avg_factor", avg_factor, pred)
        avg_factor = avg_factor.to(pred.device, non_blocking=True)
    return avg_factor.detach()


def _check_number(name: str, argument: str, value: Any, also: str = "") -> None:
    # numbers.Real has numpy's scalars; the first test spares the common types its slow instance
    # check.
    if not isinstance(value, (float, int)) and not isinstance(value, Real):
        raise TypeError(f"{name}: {argument} must be a number{also}, got {type(value).__name__}")


def _check_int(name: str, argument: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: {argument} must be an int, got {type(value).__name__}")


def _check_not_negative(name: str, argument: str, value: Any) -> None:
    _check_number(name, argument, value)
    if not value >= 0:
        raise ValueError(f"{name}: {argument} must be >= 0, got {value}")


def _check_fraction(name: str, argument: str, value: Any) -> None:
    _check_number(name, argument, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: {argument} must be in [0, 1], got {value}")


def _check_tensor(name: str, argument: str, tensor: Any, pred: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: {argument} must be a Tensor, got {type(tensor).__name__}")
    if (
        not (tensor.is_cpu and pred.is_cpu) and tensor.device != pred.device
    ):  # building two devices takes a while
        raise _wrong_device(name, argument, tensor, pred)
    if tensor.is_complex():
        raise TypeError(f"{name}: {argument} must have a real dtype, got {tensor.dtype}")
    if tensor.layout is not torch.strided:
        raise _wrong_layout(name, argument, tensor)


def _check_row_tensor(
    name: str, argument: str, tensor: Any, pred: Tensor, rows: torch.Size
) -> None:
    _check_tensor(name, argument, tensor, pred)
    if tensor.shape != rows:
        raise _wrong_shape(name, argument, "a value per row of pred:", rows, tensor)


def _wrong_shape(name: str, argument: str, what: str, expected: Any, tensor: Tensor) -> ValueError:
    return ValueError(
        f"{name}: {argument} must have {what} {tuple(expected)}, got {tuple(tensor.shape)}"
    )


def _wrong_device(name: str, argument: str, tensor: Tensor, pred: Tensor) -> ValueError:
    return ValueError(
        f"{name}: {argument} must be on pred's device {pred.device}, got {tensor.device}"
    )


def _wrong_layout(name: str, argument: str, tensor: Tensor) -> TypeError:
    return TypeError(f"{name}: {argument} must be a dense (strided) tensor, got {tensor.layout}")
