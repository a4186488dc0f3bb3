"""The rest of the quality family: Varifocal, Focal, Matchability-Aware, IA-BCE, position-supervised
and task-aligned BCE against each host's formula written out, and every backend against the
reference.

FIELD is one function per host: of logits (or probabilities) x, one-hot classes y, qualities q that
are 0 off the class, and the exponents, in the host's own terms; it returns elementwise losses.
"""

import inspect

import pytest
import torch
import torch.nn.functional as F
from support import (
    FAMILY,
    FLOATS,
    INF,
    INTERPRETED,
    LAYOUTS,
    PUBLIC,
    assert_no_worse,
    check_op,
    combinations,
    dense_target,
    evaluate,
    gradcheck,
    lay_out,
    logits,
    random_upstream,
    row_weight,
    sparse_target,
    thinned,
)

import gfl_kernels
from gfl_kernels import (
    ia_bce_loss,
    matchability_aware_loss,
    quality_focal_loss,
    sigmoid_focal_loss,
    varifocal_loss,
)

NAMES = tuple(FAMILY)
CONSTANTS = ("varifocal_detached", "matchability", "ia_bce")
bce = F.binary_cross_entropy_with_logits


def mmdet_varifocal(x, y, q, alpha, gamma, iou_weighted=True):
    positive = (q > 0).double()
    weight = (q if iou_weighted else 1) * positive
    weight = weight + alpha * (x.sigmoid() - q).abs().pow(gamma) * (1 - positive)
    return bce(x, q, reduction="none") * weight


def label_varifocal(x, y, q, alpha, gamma):  # super-gradients, ultralytics' RT-DETR
    weight = alpha * x.sigmoid().pow(gamma) * (1 - y) + q * y
    return bce(x, q, reduction="none") * weight


def probability_varifocal(p, y, q, alpha, gamma):  # YOLOv6, PP-YOLOE
    weight = alpha * p.pow(gamma) * (1 - y) + q * y
    return F.binary_cross_entropy(p, q, reduction="none") * weight


def detached_varifocal(x, y, q, alpha, gamma):  # RT-DETR, D-FINE
    weight = alpha * x.sigmoid().detach().pow(gamma) * (1 - y) + q
    return bce(x, q, weight=weight, reduction="none")


def rfdetr_varifocal(x, y, q, alpha, gamma):
    positive = (q > 0).double()
    weight = q * positive + (1 - alpha) * (x.sigmoid() - q).abs().pow(gamma) * (1 - positive)
    return bce(x, q, reduction="none") * weight


def deim(x, y, q, gamma, mal_alpha=None):
    score = x.sigmoid().detach().pow(gamma)
    weight = (score if mal_alpha is None else mal_alpha * score) * (1 - y) + y
    return bce(x, q.pow(gamma), weight=weight, reduction="none")


def ia_bce(x, y, q, alpha, gamma):  # RF-DETR, detrex's align_detr
    s = x.sigmoid()
    t = (s.pow(alpha) * q.pow(1 - alpha)).clamp(min=0.01).detach()
    positive = -t * F.logsigmoid(x) - (1 - t) * F.logsigmoid(-x)
    return torch.where(y == 1, positive, -s.pow(gamma) * F.logsigmoid(-x))


def position_supervised(x, y, q, alpha, gamma):  # RF-DETR, Stable-DINO
    alpha_t = alpha * (q > 0).double() + (1 - alpha) * (q <= 0).double()
    return alpha_t * bce(x, q, reduction="none") * (x.sigmoid() - q).abs().pow(gamma)


def warm_up_focal(x, y, q, alpha, gamma):  # PP-YOLOE with its static assigner
    weight = (x.sigmoid() - q).pow(gamma)
    weight = weight * (alpha * q + (1 - alpha) * (1 - q)) if alpha > 0 else weight
    return weight * bce(x, q, reduction="none")


def task_aligned(x, y, q, class_weight):
    return bce(x, q, weight=class_weight, reduction="none")


def mmdet_focal_of_probabilities(p, y, q, alpha, gamma):
    m = (1 - p) * y + p * (1 - y)
    weight = (alpha * y + (1 - alpha) * (1 - y)) * m.pow(gamma)
    return F.binary_cross_entropy(p, y, reduction="none") * weight


CLASS_WEIGHT = torch.rand(7, dtype=torch.float64) + 0.5

# host formula, its arguments, ours, whether it is of probabilities; ours takes (x, label, q, dense)
ROWS = {
    "mmdet VFL": (mmdet_varifocal, (0.75, 2.0), lambda x, c, q, d: varifocal_loss(x, d, **SUM)),
    "mmdet VFL, not iou_weighted": (
        mmdet_varifocal,
        (0.5, 1.5, False),
        lambda x, c, q, d: varifocal_loss(x, d, alpha=0.5, gamma=1.5, iou_weighted=False, **SUM),
    ),
    "label VFL": (
        label_varifocal,
        (0.75, 2.0),
        lambda x, c, q, d: varifocal_loss(x, (c, q), **SUM),
    ),
    "label VFL, gamma": (
        label_varifocal,
        (0.6, 1.0),
        lambda x, c, q, d: varifocal_loss(x, (c, q), alpha=0.6, gamma=1.0, **SUM),
    ),
    "YOLOv6 VFL": (
        probability_varifocal,
        (0.75, 2.0),
        lambda x, c, q, d: varifocal_loss(x, (c, q), activated=True, **SUM),
    ),
    "YOLOv6 VFL, gamma": (
        probability_varifocal,
        (0.75, 1.5),
        lambda x, c, q, d: varifocal_loss(x, (c, q), gamma=1.5, activated=True, **SUM),
    ),
    "D-FINE VFL": (
        detached_varifocal,
        (0.2, 2.0),
        lambda x, c, q, d: varifocal_loss(x, (c, q), alpha=0.2, detach_weight=True, **SUM),
    ),
    "RF-DETR VFL": (
        rfdetr_varifocal,
        (0.25, 2.0),
        lambda x, c, q, d: varifocal_loss(x, d, alpha=0.75, **SUM),
    ),
    "DEIM MAL": (deim, (1.5,), lambda x, c, q, d: matchability_aware_loss(x, (c, q), **SUM)),
    "DEIM MAL, mal_alpha": (
        deim,
        (2.0, 0.3),
        lambda x, c, q, d: matchability_aware_loss(x, (c, q), gamma=2, mal_alpha=0.3, **SUM),
    ),
    "RF-DETR IA-BCE": (
        ia_bce,
        (0.25, 2.0),
        lambda x, c, q, d: ia_bce_loss(x, (c, q), **SUM),
    ),
    "RF-DETR PSL": (
        position_supervised,
        (0.25, 2.0),
        lambda x, c, q, d: quality_focal_loss(x, (c, q), alpha=0.25, **SUM),
    ),
    "RF-DETR PSL, gamma": (
        position_supervised,
        (0.4, 1.5),
        lambda x, c, q, d: quality_focal_loss(x, d, alpha=0.4, beta=1.5, **SUM),
    ),
    "PP-YOLOE warm-up": (
        warm_up_focal,
        (0.25, 2.0),
        lambda x, c, q, d: quality_focal_loss(x, d, weight=0.25 * d + 0.75 * (1 - d), **SUM),
    ),
    "PP-YOLOE warm-up, no alpha": (
        warm_up_focal,
        (-1, 2.0),
        lambda x, c, q, d: quality_focal_loss(x, (c, q), **SUM),
    ),
    "task-aligned BCE": (
        task_aligned,
        (CLASS_WEIGHT,),
        lambda x, c, q, d: quality_focal_loss(
            x, d, beta=0, weight=CLASS_WEIGHT.to(x.device).expand(x.shape), **SUM
        ),
    ),
    "mmdet FL of probabilities": (
        mmdet_focal_of_probabilities,
        (0.25, 2.0),
        lambda x, c, q, d: sigmoid_focal_loss(x, c, activated=True, **SUM),
    ),
}
SUM = {"reduction": "sum"}


def host_inputs(rows=60, classes=7):
    """Logits, labels, scores (also 0 and 1), one-hot classes and dense qualities, in float64."""
    x = logits(rows, classes, dtype=torch.float64, extremes=False)
    label, score = sparse_target((rows,), classes, score_dtype=torch.float64)
    inside = (label >= 0) & (label < classes)
    y = F.one_hot(torch.where(inside, label, classes), classes + 1)[:, :classes].double()
    return x, label, score, y, y * score[:, None]


@pytest.mark.parametrize("name", ROWS)
def test_hosts(backend, name):
    """Value and gradient of each host's own formula."""
    formula, arguments, ours = ROWS[name]
    x, label, score, y, q = host_inputs()
    if "probability" in formula.__name__ or "probabilities" in formula.__name__:
        x = x.sigmoid()
    arguments = [a.to(x.device) if isinstance(a, torch.Tensor) else a for a in arguments]
    upstream = torch.tensor(0.7, dtype=torch.float64)
    truth, truth_grad = evaluate(
        lambda leaf: formula(leaf, y, q, *arguments).sum(), x, upstream, (), {}
    )
    value, grad = evaluate(lambda leaf: ours(leaf, label, score, q), x, upstream, (), {})
    torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, truth_grad, rtol=1e-11, atol=1e-12)


def test_normalisers_of_hosts(backend):
    """DETR's mean(1).sum() * queries / boxes on [B, Q, C] is avg_factor=boxes, and so on."""
    x, label, score, y, q = host_inputs()
    elements = label_varifocal(x, y, q, 0.75, 2.0).view(2, 30, 7)
    expected = elements.mean(1).sum() * 30 / 11
    got = varifocal_loss(x.view(2, 30, 7), (label.view(2, 30), score.view(2, 30)), avg_factor=11)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=0)  # avg_factor's eps is 1e-7
    # a score of 0 as background, which is what mmdetection's q > 0 makes of it
    as_mmdet = varifocal_loss(x, (torch.where(score > 0, label, -1), score), reduction="sum")
    truth = mmdet_varifocal(x, y, q, 0.75, 2.0).sum()
    torch.testing.assert_close(as_mmdet, truth, rtol=1e-12, atol=0)
    scores = q.gather(-1, label.clamp(0, 6).unsqueeze(-1)).squeeze(-1)
    gathered = varifocal_loss(x, (label, scores), reduction="sum")
    torch.testing.assert_close(gathered, elements.sum(), rtol=1e-12, atol=0)


# ---- torchvision's function


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_torchvision(backend, dtype, reduction):
    """Its own results: hard and soft targets, any shape, positional arguments."""
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    theirs = torchvision.ops.sigmoid_focal_loss
    for shape in ((60, 17), (2, 5, 3, 4), (7,), ()):
        x = logits(*shape, dtype=dtype, extremes=False)
        for soft in (False, True):
            y = torch.rand(shape, dtype=dtype)
            y = y if soft else (y < 0.3).to(dtype)
            for alpha, gamma in ((0.25, 2), (-1, 1.5), (0.6, 0)):
                upstream = random_upstream(theirs(x, y, alpha, gamma, reduction))
                results = [
                    evaluate(function, a, upstream, (b, alpha, gamma, reduction), {})
                    for function, a, b in (
                        (theirs, x.double(), y.double()),
                        (theirs, x, y),
                        (sigmoid_focal_loss, x, y),
                    )
                ]
                for what, truth, eager, got in zip(("value", "grad"), *results, strict=True):
                    assert got.dtype == dtype
                    assert_no_worse(got, truth, eager, what=f"{what} {shape} {alpha} {gamma}")


def test_torchvision_signature():
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    theirs = inspect.signature(torchvision.ops.sigmoid_focal_loss).parameters
    ours = inspect.signature(sigmoid_focal_loss).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert all(ours[name].default == p.default for name, p in theirs.items())
    kinds = {p.kind for p in list(ours.values())[len(theirs) :]}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("dtype", FLOATS)
def test_focal_labels_are_a_one_hot_target(backend, dtype):
    """In every reduction, with background and weights, and classes in any dimension."""
    laid = lay_out("nchw", logits(2, 5, 6, 11, dtype=dtype, device=backend.device))
    label, _ = sparse_target(laid.row_shape, 11, device=backend.device)
    classes = torch.arange(11, device=backend.device)
    one_hot = (label.unsqueeze(-1) == classes).movedim(-1, 1).to(dtype)
    weights = (
        None,
        row_weight(laid.row_shape, device=backend.device),
        row_weight(laid.pred.shape, device=backend.device),
    )
    for weight, options in combinations(
        weights,
        (
            {"reduction": "none"},
            {"reduction": "mean"},
            {"reduction": "sum"},
            {"reduction": "mean", "avg_factor": 3},
        ),
    ):
        options = {**options, "weight": weight, "class_dim": 1}
        upstream = random_upstream(sigmoid_focal_loss(laid.pred, one_hot, **options))
        args = [(t,) for t in (one_hot, label, (label, torch.ones(label.shape)))]
        results = [evaluate(sigmoid_focal_loss, laid.pred, upstream, a, options) for a in args]
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert a.shape == b.shape and a.dtype == b.dtype
                torch.testing.assert_close(
                    b, a, rtol=1e-2 if dtype != torch.float32 else 2e-6, atol=1e-6
                )


# ---- every backend against the reference


def inputs(name, rows, classes, *, dtype=torch.float32, device="cpu", seed=0):
    op, kwargs = FAMILY[name]
    pred = logits(rows, classes, dtype=dtype, device=device, seed=seed)
    if kwargs.get("activated"):
        # 1 / p (1 - p) multiplies what p has been rounded by: up to 50.
        pred = pred.double().sigmoid().clamp(0.02, 0.98).to(dtype)
    return op, kwargs, pred


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", FLOATS[:2] if INTERPRETED else [*FLOATS, torch.float64])
def test_no_worse_than_eager(fused, name, dtype):
    for form, reduction, classes, rows in combinations(
        ("sparse", "dense"), ("none", "mean", "sum"), (1, 17, 80), (7, 150)
    ):
        op, kwargs, pred = inputs(name, rows, classes, dtype=dtype, device=fused.device)
        make_target = sparse_target if form == "sparse" else dense_target
        target = make_target((rows,), classes, device=fused.device)
        weight = row_weight((rows,), device=fused.device)
        weighted = {
            "none": {},
            "mean": {"weight": weight, "avg_factor": 5.5},
            "sum": {"weight": weight[:, None].expand(rows, classes)},
        }
        kwargs = kwargs | weighted[reduction]
        scale = 50.0 if kwargs.get("activated") else 1.0
        what = f"{name} {form} C={classes} N={rows}"
        check_op(op, pred, target, reduction=reduction, grad_scale=scale, what=what, **kwargs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gamma", [0.5] if INTERPRETED else [0.0, 0.5, 2.0, 3.0])
def test_every_logit_of_a_fine_grid(fused, name, gamma):
    """All of [-110, 110] against negatives, positives and interior targets, one class a row."""
    op, kwargs, _ = inputs(name, 1, 1)
    kwargs = {**kwargs, "beta" if op == "balanced" else "gamma": gamma}
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    for dtype, (label, score) in combinations(
        dtypes, ((-1, 0.0), (0, 0.0), (0, 1.0), (0, 0.3), (0, 0.9999))
    ):
        steps = 1101 if INTERPRETED else 11001
        x = torch.linspace(-110, 110, steps, dtype=torch.float64, device=fused.device)[:, None]
        if kwargs.get("activated"):
            x = x.div(20).sigmoid()
        x = x.to(dtype)
        target = (
            torch.full((steps,), label, device=fused.device),
            torch.full((steps,), score, device=fused.device),
        )
        upstream = torch.ones(steps, device=fused.device)
        upstream = upstream[:, None] if op == "focal" else upstream
        scale = 300.0 if kwargs.get("activated") else 1.0
        what = f"{name} gamma={gamma} label={label} score={score}"
        check_op(
            op,
            x,
            target,
            upstream=upstream,
            reduction="none",
            what=what,
            grad_scale=scale,
            **kwargs,
        )


# Where the weight or the target is a constant of the derivative finite differences do not know it:
# test_hosts has that derivative.
@pytest.mark.parametrize("name", [n for n in NAMES if n not in CONSTANTS])
def test_gradcheck(backend, name):
    op, kwargs = FAMILY[name]
    x = torch.randn(6, 5, dtype=torch.float64, device=backend.device)
    pred = (x.sigmoid() * 0.9 + 0.05 if kwargs.get("activated") else x).requires_grad_()
    sparse = sparse_target((6,), 5, device=backend.device, score_dtype=torch.float64)
    dense = dense_target((6,), 5, device=backend.device, dtype=torch.float64)
    for target in (sparse, dense):
        assert gradcheck(
            lambda p, target=target: PUBLIC[op](p, target, reduction="none", **kwargs),
            (pred,),
            eps=1e-6,
            atol=1e-6,
            rtol=1e-5,
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout):
    # Interpreted, a third of the forms for each layout.
    names = thinned(NAMES, LAYOUTS.index(layout))
    for name, classes, reduction in combinations(names, (5, 40), ("none", "sum", "mean")):
        op, kwargs = FAMILY[name]
        laid = lay_out(
            layout, inputs(name, 70, classes, device=backend.device)[2].view(2, 5, 7, -1)
        )
        target = sparse_target(laid.row_shape, classes, device=backend.device)
        dense = dense_target((70,), classes, device=backend.device)
        dense = dense.reshape(*laid.row_shape, -1).movedim(-1, laid.dim)
        options = {"class_dim": laid.dim, "what": f"{layout} {name}", "grad_scale": 50.0, **kwargs}
        if reduction == "mean":
            options["weight"] = row_weight(laid.pred.shape, device=backend.device)
        goal = dense if reduction == "sum" else target
        check_op(op, laid.pred, goal, reduction=reduction, **options)


@pytest.mark.parametrize("name", NAMES)
def test_planes_of_logits_with_one_target_a_row(backend, name):
    """[C, A] and scores [A, C], at most one of which is not 0."""
    op, kwargs, pred = inputs(name, 300, 40, device=backend.device)
    rows = torch.arange(0, 300, 10, device=backend.device)
    target = torch.zeros(300, 40, device=backend.device)
    target[rows, rows % 37] = torch.linspace(0.05, 1, 30, device=backend.device)
    options = {"class_dim": 0, "what": name, "grad_scale": 50.0, **kwargs}
    check_op(op, pred.T.contiguous(), target.T, reduction="none", **options)


@pytest.mark.parametrize("name", NAMES)
def test_a_label_is_positive_whatever_its_score(backend, name):
    """Of a sparse target; of a dense one only what is above 0 (the balance goes by the score)."""
    op, kwargs, pred = inputs(name, 200, 40, device=backend.device)
    label = torch.arange(200, device=backend.device) % 41
    score = torch.zeros(200, device=backend.device)
    kwargs = {**kwargs, "reduction": "sum"}
    check_op(op, pred, (label, score), what=name, grad_scale=50.0, **kwargs)
    got = PUBLIC[op](pred, (label, score), **kwargs)
    background = PUBLIC[op](pred, torch.zeros_like(pred), **kwargs)
    same = op in ("focal", "balanced")  # y = 0 and q = 0 there
    assert torch.allclose(got, background, rtol=1e-6) == same


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("classes", [18, 80])
def test_weight_zero_removes_whatever_is_there(backend, name, classes):
    op, kwargs, pred = inputs(name, 40, classes, device=backend.device)
    target = sparse_target((40,), classes, device=backend.device)
    weight = row_weight((40,), device=backend.device)
    clean = pred.clone()
    for poison in (float("nan"), INF, -INF):
        pred[weight == 0] = poison
        got, grad = evaluate(
            PUBLIC[op],
            pred,
            torch.tensor(0.5),
            (target,),
            {**kwargs, "weight": weight, "reduction": "sum"},
        )
        expected, expected_grad = evaluate(
            PUBLIC[op],
            clean,
            torch.tensor(0.5),
            (target,),
            {**kwargs, "weight": weight, "reduction": "sum"},
        )
        assert torch.equal(got, expected)
        assert bool((grad[weight == 0] == 0).all())
        assert torch.equal(grad, torch.where((weight == 0)[:, None], 0, expected_grad))


@pytest.mark.parametrize("name", NAMES)
def test_nan_stays_in_its_row(backend, name):
    """A NaN logit, score or dense target makes its row NaN, and no other."""
    op, kwargs, pred = inputs(name, 40, 18, device=backend.device)
    label, score = sparse_target((40,), 18, device=backend.device)
    dense = dense_target((40,), 18, device=backend.device)
    label[5] = 3
    bad_pred, bad_score, bad_dense = pred.clone(), score.clone(), dense.clone()
    bad_pred[5, 17] = bad_score[5] = bad_dense[5, 2] = float("nan")
    kwargs = {**kwargs, "reduction": "none"}
    for clean, bad in (
        ((pred, (label, score)), (bad_pred, (label, score))),
        ((pred, (label, score)), (pred, (label, bad_score))),
        ((pred, dense), (pred, bad_dense)),
    ):
        expected, got = (PUBLIC[op](*arguments, **kwargs) for arguments in (clean, bad))
        others = torch.arange(40, device=backend.device) != 5
        assert bool(got[5].isnan().any()) and torch.equal(got[others], expected[others])


@pytest.mark.parametrize("name", [name for name in NAMES if "probability" not in name])
def test_infinite_logits_where_the_loss_is_defined(backend, name):
    """-inf is a perfect negative: loss 0 and gradient 0."""
    op, kwargs, pred = inputs(name, 12, 40, device=backend.device)
    label = torch.full((12,), 4, device=backend.device)
    score = torch.ones(12, device=backend.device)
    pred[:, 7] = -INF
    clean = torch.where(pred.isinf(), -1e4, pred)
    for target in (
        (label, score),
        torch.where(torch.arange(40, device=backend.device) == 4, 1.0, 0.0).expand(12, 40),
    ):
        upstream = torch.tensor(1.0, device=backend.device)
        got, expected = (
            evaluate(PUBLIC[op], p, upstream, (target,), {**kwargs, "reduction": "sum"})
            for p in (pred, clean)
        )
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_sums_of_many_rows(fused):
    """Rows shared between threads, most of them background: the paths of tiles without a label."""
    rows = 500 if INTERPRETED else 2000
    for name in ("varifocal", "focal", "matchability", "position_supervised"):
        op, kwargs, pred = inputs(name, rows, 80, device=fused.device)
        label, score = sparse_target((rows,), 80, device=fused.device)
        label = torch.where(torch.arange(rows, device=fused.device) % 50 == 0, label, 80)
        weight = row_weight((rows,), device=fused.device)
        options = {"reduction": "mean", "avg_factor": 17.0, "weight": weight, **kwargs}
        check_op(op, pred, (label, score), what=name, **options)


# ---- modules


def test_modules(backend):
    pred = logits(30, 8, device=backend.device, extremes=False)
    label, score = sparse_target((30,), 8, device=backend.device)
    dense = dense_target((30,), 8, device=backend.device)
    weight = row_weight((30, 8), device=backend.device)
    focal = gfl_kernels.FocalLoss(gamma=1.5, alpha=0.4, loss_weight=0.7)
    varifocal = gfl_kernels.VarifocalLoss(alpha=0.5, iou_weighted=False, loss_weight=0.7)
    for reduction in ("none", "mean", "sum"):
        expected = 0.7 * sigmoid_focal_loss(pred, label, 0.4, 1.5, reduction, weight=weight)
        got = focal(pred, label, weight, reduction_override=reduction)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
        flattened = focal(pred, label, weight.view(-1), reduction_override=reduction)
        assert torch.equal(flattened, got)
        options = {"alpha": 0.5, "iou_weighted": False, "weight": weight}
        for target in (dense, (label, score)):
            elements = varifocal(pred, target, weight, reduction_override="none")
            assert elements.shape == pred.shape
            rows = 0.7 * varifocal_loss(pred, target, reduction="none", **options)
            torch.testing.assert_close(elements.sum(-1), rows, rtol=1e-6, atol=1e-6)
            got = varifocal(pred, target, weight, reduction_override="mean")
            torch.testing.assert_close(got, elements.mean(), rtol=1e-6, atol=1e-7)
            got = varifocal(pred, target, weight, avg_factor=3.0)
            torch.testing.assert_close(got, elements.sum() / 3, rtol=1e-6, atol=1e-7)
