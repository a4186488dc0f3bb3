"""Quality Focal Loss: every backend against the float64 reference, over targets, reductions,
layouts, dtypes and shapes.
"""

import pytest
import torch
from support import (
    DENSE_LAYOUTS,
    FLOATS,
    HALF,
    INF,
    INTERPRETED,
    LAYOUTS,
    assert_no_worse,
    check_op,
    combinations,
    dense_target,
    evaluate,
    gradcheck,
    lay_out,
    logits,
    on_cpu,
    random_upstream,
    row_weight,
    sparse_target,
)

import gfl_kernels
from gfl_kernels import quality_focal_loss, reference

BETAS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
REDUCTIONS = ("none", "mean", "sum")
LABEL_DTYPES = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.float32,
    torch.float64,
    torch.bool,
)


def make_target(form, row_shape, classes, *, device=None, seed=0, dtype=torch.float32):
    if form == "sparse":
        return sparse_target(row_shape, classes, device=device, seed=seed, score_dtype=dtype)
    return dense_target(row_shape, classes, device=device, seed=seed, dtype=dtype)


@on_cpu
def probabilities(*shape, dtype=torch.float32, seed=0):
    """Probabilities with exact 0 and 1 and values near both."""
    p = logits(*shape, dtype=torch.float64, seed=seed).sigmoid()
    generator = torch.Generator().manual_seed(seed + 7)
    which = torch.rand(shape, generator=generator)
    p = torch.where(which < 0.05, 0.0, torch.where(which < 0.1, 1.0, p))
    return p.to(dtype)


def move_classes(target, laid):
    """A dense target [R, C] in the shape of laid.pred."""
    return target.reshape(*laid.row_shape, -1).movedim(-1, laid.dim)


# ---- float64: the derivative against finite differences


@pytest.mark.parametrize("form", ["sparse", "dense"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("activated", [False, True])
def test_gradcheck(backend, form, reduction, activated):
    classes = 5
    x = torch.randn(6, classes, dtype=torch.float64, device=backend.device)
    pred = (x.sigmoid() * 0.9 + 0.05 if activated else x).requires_grad_()
    target = make_target(form, (6,), classes, device=backend.device, dtype=torch.float64)
    # Away from the kink of |d| (beta < 2): gradcheck would step over it.
    weight = row_weight((6,), device=backend.device).double()
    upstream = random_upstream(
        torch.empty(6 if reduction == "none" else (), dtype=torch.float64)
    ).to(backend.device)
    weights = ({}, {"weight": weight}, {"weight": weight[:, None].expand(6, classes)})
    for beta, kwargs in combinations(BETAS, weights):
        if reduction == "mean":
            kwargs = {**kwargs, "avg_factor": 3.7} if kwargs else kwargs

        def loss(pred, beta=beta, kwargs=kwargs):
            return upstream * quality_focal_loss(
                pred, target, beta=beta, reduction=reduction, activated=activated, **kwargs
            )

        assert gradcheck(loss, (pred,), eps=1e-6, atol=1e-6, rtol=1e-5), (beta, kwargs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_gradcheck_layouts(backend, layout, form):
    laid = lay_out(layout, torch.randn(1, 2, 3, 4, dtype=torch.float64, device=backend.device))
    if form == "sparse":
        target = make_target(form, laid.row_shape, 4, device=backend.device, dtype=torch.float64)
    else:
        target = move_classes(
            dense_target((6,), 4, device=backend.device, dtype=torch.float64), laid
        )
    upstream = random_upstream(torch.empty(laid.row_shape, dtype=torch.float64)).to(backend.device)

    def loss(pred):
        return upstream * quality_focal_loss(pred, target, reduction="none", class_dim=laid.dim)

    assert gradcheck(loss, (laid.pred.requires_grad_(),), eps=1e-6, atol=1e-7, rtol=1e-5)


# ---- no worse than eager


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("form", ["sparse", "dense"])
@pytest.mark.parametrize("activated", [False, True])
def test_no_worse_than_eager(fused, dtype, form, activated):
    make = probabilities if activated else logits
    for classes, rows in combinations((1, 3, 16, 17, 80, 81), (1, 7, 64, 333)):
        pred = make(rows, classes, dtype=dtype, device=fused.device, seed=rows)
        target = make_target(form, (rows,), classes, device=fused.device, seed=rows)
        weight = row_weight((rows,), device=fused.device)
        what = f"{form} C={classes} N={rows}"
        check_op("quality", pred, target, reduction="none", activated=activated, what=what)
        check_op(
            "quality", pred, target, reduction="mean", activated=activated, what=what + " mean"
        )
        check_op(
            "quality",
            pred,
            target,
            weight=weight,
            avg_factor=5.5,
            activated=activated,
            what=what + " avg_factor",
        )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "shape", [(1000, 80), (8400, 80), (8400, 3), (1000, 365), (333, 1203), (8400, 1)]
)
def test_no_worse_than_eager_on_large_inputs(fused, dtype, shape):
    """Above the size where rows are shared between threads, and with several tiles interpreted."""
    rows, classes = shape
    rows //= 8 if INTERPRETED else 1
    pred = logits(rows, classes, dtype=dtype, device=fused.device)
    for form in ("sparse", "dense"):
        target = make_target(form, (rows,), classes, device=fused.device)
        check_op("quality", pred, target, reduction="none", what=f"{form} {shape}")
        check_op("quality", pred, target, reduction="sum", what=f"{form} {shape} sum")
    check_op(
        "quality",
        pred,
        target,
        weight=row_weight((rows,)),
        avg_factor=torch.tensor(17.0),
        what=f"{shape}",
    )


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("activated", [False, True])
def test_betas(fused, beta, dtype, activated):
    make = probabilities if activated else logits
    pred = make(257, 19, dtype=dtype, device=fused.device)
    for form in ("sparse", "dense"):
        target = make_target(form, (257,), 19, device=fused.device)
        check_op(
            "quality",
            pred,
            target,
            beta=beta,
            reduction="none",
            activated=activated,
            what=f"{form} beta={beta}",
        )
        check_op(
            "quality",
            pred,
            target,
            beta=beta,
            reduction="sum",
            activated=activated,
            what=f"{form} beta={beta}",
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(backend, layout, dtype):
    forms = [("sparse", "weight [.., C]")]
    forms += [(form, r) for r in REDUCTIONS for form in ("sparse", "dense")]
    for classes, (form, option) in combinations((1, 5, 17, 80), forms):
        laid = lay_out(layout, logits(2, 5, 7, classes, dtype=dtype, device=backend.device))
        if form == "sparse":
            target = sparse_target(laid.row_shape, classes, device=backend.device)
        else:
            target = move_classes(dense_target((70,), classes, device=backend.device), laid)
        if option == "mean":
            kwargs = {"weight": row_weight(laid.row_shape, device=backend.device)}
            kwargs |= {"avg_factor": 3.0}
        elif option in REDUCTIONS:
            kwargs = {"reduction": option}
        else:
            kwargs = {"weight": row_weight(laid.pred.shape, device=backend.device)}
        what = f"{layout} C={classes} {form} {option}"
        check_op("quality", laid.pred, target, class_dim=laid.dim, what=what, **kwargs)


@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_planes_of_logits_with_rows_of_targets(backend, beta):
    """As YOLO heads call it: logits [B, C, A], scores of the assigner [B, A, C]."""
    anchors, classes = 1061, 37
    pred = logits(2, classes, anchors, device=backend.device)
    target = dense_target((2, anchors), classes, device=backend.device)
    for dtype in (torch.float32, torch.float64):
        check_op("quality", pred, target.to(dtype).mT, class_dim=1, beta=beta, reduction="sum",
                 what=f"targets in {dtype}")  # fmt: skip


@on_cpu
def one_target_a_row(anchors, classes, *, share=0.1, dtype=torch.float32):
    """[2, A, C], as assigners make them: a score in one class of some anchors, and of the first and
    the last; one of them is below 0, and a zero has a sign.
    """
    label, score = sparse_target((2, anchors), classes)
    chosen = torch.rand(2, anchors, generator=torch.Generator().manual_seed(classes)) < share
    chosen[:, [0, -1]] = True
    label[:, 0], label[:, -1] = 0, classes - 1
    target = torch.zeros(2, anchors, classes)
    target.scatter_(2, label.clamp(0, classes - 1)[..., None], (score * chosen)[..., None])
    target[0, 0, 0], target[0, 1], target[0, 2] = -0.5, 0, -0.0
    return target.to(dtype)


@pytest.mark.parametrize("beta", [0.0, 1.5, 2.0])
@pytest.mark.parametrize("dtype", FLOATS[:1] if INTERPRETED else [*FLOATS[:2], torch.float64])
def test_planes_of_logits_with_one_target_a_row(backend, dtype, beta):
    """Rows with at most one target are told from others block by block: none, few, and too many of
    them, one with two targets in the last block, and rows that lie apart.
    """
    anchors = 70 if INTERPRETED else 1061
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    for classes, case in ((37, "few"), (80, "none"), (19, "two"), (17, "many"), (37, "apart")):
        pred = logits(2, classes, anchors, dtype=dtype, device=backend.device)
        share = 0.5 if case == "many" else 0.1
        target = one_target_a_row(anchors, classes, share=share, dtype=exact, device=backend.device)
        if case == "none":
            target[1] = 0
        if case == "two":
            target[1, -7, 3], target[1, -7, 18] = 0.25, 0.75
        if case == "apart":
            target = torch.nn.functional.pad(target, (3, 2), value=float("nan"))[..., 3:-2]
        options = {"class_dim": 1, "beta": beta, "reduction": "none", "what": case}
        if case == "apart":
            options["weight"] = row_weight((2, anchors), device=backend.device)
        check_op("quality", pred, target.mT, **options)


@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_a_nan_among_rows_of_targets_stays_in_its_element(backend, beta):
    anchors, classes = 300, 37
    pred = logits(2, classes, anchors, device=backend.device)
    target = one_target_a_row(anchors, classes, device=backend.device)
    target[:, 100:200] = 0
    upstream = torch.ones(2, anchors, device=backend.device)
    options = {"class_dim": 1, "beta": beta, "reduction": "none"}
    clean, clean_grad = evaluate(quality_focal_loss, pred, upstream, (target.mT,), options)
    target[1, 150, 36] = float("nan")
    got, grad = evaluate(quality_focal_loss, pred, upstream, (target.mT,), options)
    assert got.isnan().nonzero().tolist() == [[1, 150]]
    assert grad.isnan().nonzero().tolist() == [[1, 36, 150]]
    torch.testing.assert_close(got.nan_to_num(0), clean * ~got.isnan(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.nan_to_num(0), clean_grad * ~grad.isnan(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradient_has_the_layout_of_the_input(backend, layout, reduction):
    laid = lay_out(layout, logits(2, 3, 4, 5, device=backend.device))
    target = sparse_target(laid.row_shape, 5, device=backend.device)
    leaf = laid.pred.detach().requires_grad_()
    quality_focal_loss(leaf, target, class_dim=laid.dim, reduction=reduction).sum().backward()
    assert leaf.grad.shape == leaf.shape and leaf.grad.stride() == leaf.stride()
    assert leaf.grad.dtype == leaf.dtype


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree_bit_for_bit_with_contiguous_rows_in_value(backend, layout):
    """Same numbers wherever they lie, to float32 rounding of a sum taken in another order."""
    x = logits(2, 3, 4, 33, device=backend.device)
    laid, flat = lay_out(layout, x), lay_out("contiguous", x)
    label, score = sparse_target((24,), 33, device=backend.device)
    upstream = random_upstream(torch.empty(24)).to(backend.device)
    value, grad = evaluate(
        quality_focal_loss,
        laid.pred,
        upstream.view(laid.row_shape),
        ((label.view(laid.row_shape), score.view(laid.row_shape)),),
        {"reduction": "none", "class_dim": laid.dim},
    )
    expected, expected_grad = evaluate(
        quality_focal_loss, flat.pred, upstream, ((label, score),), {"reduction": "none"}
    )
    torch.testing.assert_close(value.reshape(-1), expected, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(laid.back(grad), expected_grad, rtol=2e-6, atol=1e-6)


# ---- targets, labels, weights


@pytest.mark.parametrize("label_dtype", LABEL_DTYPES)
def test_label_dtypes(backend, label_dtype):
    classes = 2 if label_dtype == torch.bool else 11
    pred = logits(200, classes, device=backend.device)
    label, score = sparse_target((200,), classes, device=backend.device, label_dtype=label_dtype)
    if label_dtype == torch.bool:
        label = torch.rand(200, device=backend.device) < 0.5
    check_op("quality", pred, (label, score), reduction="none", what=f"label {label_dtype}")
    expected = quality_focal_loss(pred, (label.long(), score), reduction="none")
    assert torch.equal(quality_focal_loss(pred, (label, score), reduction="none"), expected)


@pytest.mark.parametrize("outside", [80, 81, -1, -2, 255, 2**31 + 1, -(2**40)])
def test_labels_outside_are_background(backend, outside):
    pred = logits(50, 80, device=backend.device)
    score = torch.rand(50, device=backend.device)
    label = torch.full((50,), outside, device=backend.device)
    got, grad = check_op("quality", pred, (label, score), reduction="none", what=f"label {outside}")
    zeros = torch.zeros(50, 80, device=backend.device)
    dense, dense_grad = evaluate(
        quality_focal_loss, pred, random_upstream(got), (zeros,), {"reduction": "none"}
    )
    torch.testing.assert_close(got, dense, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, dense_grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("label", [0, 79])
@pytest.mark.parametrize("score", [0.0, 1.0, 0.5, 1.05, -0.02])
def test_scores_at_and_beyond_the_ends(backend, label, score):
    """An IoU may leave [0, 1] by rounding; it is used as it is, not clamped."""
    pred = logits(60, 80, device=backend.device)
    target = (
        torch.full((60,), label, device=backend.device),
        torch.full((60,), score, device=backend.device),
    )
    check_op("quality", pred, target, reduction="none", what=f"label {label} score {score}")


def test_sparse_and_dense_targets_agree(backend):
    pred = logits(300, 17, device=backend.device)
    label, score = sparse_target((300,), 17, device=backend.device)
    inside = (label >= 0) & (label < 17)
    dense = torch.zeros(300, 17, device=backend.device)
    dense[inside, label[inside]] = score[inside]
    upstream = random_upstream(torch.empty(300)).to(backend.device)
    for activated in (False, True):
        values = pred.sigmoid() if activated else pred
        kwargs = {"reduction": "none", "activated": activated}
        a, grad_a = evaluate(quality_focal_loss, values, upstream, ((label, score),), kwargs)
        b, grad_b = evaluate(quality_focal_loss, values, upstream, (dense,), kwargs)
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(grad_a, grad_b, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("target_dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_target_and_weight_in_another_dtype(backend, target_dtype, dtype):
    pred = logits(90, 21, dtype=dtype, device=backend.device)
    label, score = sparse_target((90,), 21, device=backend.device, score_dtype=target_dtype)
    dense = dense_target((90,), 21, device=backend.device, dtype=target_dtype)
    weight = row_weight((90,), device=backend.device, dtype=target_dtype)
    for target in ((label, score), dense):
        check_op(
            "quality", pred, target, weight=weight, reduction="none", what=f"target {target_dtype}"
        )


@pytest.mark.parametrize("label_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(
    "weight_form", ["row", "row_expanded", "element", "element_expanded", "scalar_expanded", "int"]
)
def test_weights(backend, weight_form, label_dtype):
    rows, classes = 130, 23
    pred = logits(rows, classes, device=backend.device)
    target = sparse_target((rows,), classes, device=backend.device, label_dtype=label_dtype)
    weight = {
        "row": lambda: row_weight((rows,)),
        "row_expanded": lambda: row_weight((1,), seed=5).expand(rows),
        "element": lambda: row_weight((rows, classes)),
        "element_expanded": lambda: row_weight((rows, 1)).expand(rows, classes),
        "scalar_expanded": lambda: row_weight((1, 1), seed=5).expand(rows, classes),
        "int": lambda: torch.randint(0, 3, (rows,)),
    }[weight_form]().to(backend.device)
    for kwargs in (
        {"reduction": "none"},
        {"reduction": "sum"},
        {"reduction": "mean"},
        {"avg_factor": 12},
    ):
        check_op("quality", pred, target, weight=weight, what=weight_form, **kwargs)
        check_op(
            "quality",
            pred,
            dense_target((rows,), classes),
            weight=weight,
            what=weight_form + " dense",
            **kwargs,
        )


def test_strided_targets_and_weights(backend):
    """Labels, scores and weights that are columns of wider tensors, every second element, or stride
    0.
    """
    rows, classes = 101, 13
    pred = logits(rows, classes, device=backend.device)
    label, score = sparse_target((rows,), classes, device=backend.device)
    wide_label, wide_score = (
        torch.full((rows, 3), 9**9, device=backend.device),
        torch.full((rows, 2), float("nan")),
    )
    wide_label[:, 1], wide_score[:, 1] = label, score
    weight = row_weight((2 * rows,), device=backend.device)[::2]
    check_op(
        "quality",
        pred,
        (wide_label[:, 1], wide_score[:, 1]),
        weight=weight,
        reduction="none",
        what="strided",
    )
    one = (torch.tensor(3).expand(rows), torch.tensor(0.4).expand(rows))
    check_op(
        "quality",
        pred,
        one,
        weight=torch.tensor(0.5).expand(rows),
        reduction="none",
        what="stride 0",
    )
    check_op(
        "quality",
        pred,
        one,
        weight=torch.tensor(0.5).expand(rows),
        reduction="mean",
        what="stride 0 mean",
    )
    dense = dense_target((classes,), rows, device=backend.device).t()
    check_op(
        "quality",
        pred,
        dense,
        weight=row_weight((classes, rows)).t(),
        reduction="none",
        what="transposed dense",
    )
    check_op(
        "quality",
        pred,
        dense[:1].expand(rows, classes),
        reduction="none",
        what="dense target expanded",
    )


def test_expanded_logits(backend):
    """Stride-0 logits (one row broadcast) work; the gradient of the base is the sum over the
    copies.
    """
    base = logits(1, 9, device=backend.device).requires_grad_()
    target = sparse_target((40,), 9, device=backend.device)
    loss = quality_focal_loss(base.expand(40, 9), target, reduction="sum")
    (grad,) = torch.autograd.grad(loss, base)
    copies = base.detach().double().expand(40, 9).clone().requires_grad_()
    truth = reference.quality_focal_loss(copies, target, reduction="sum")
    (expected,) = torch.autograd.grad(truth, copies)
    torch.testing.assert_close(loss.double(), truth, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), expected.sum(0, keepdim=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_upstream_gradients(backend, dtype):
    """Stride-0, strided, scalar, tiny, huge and zero upstream gradients."""
    pred = logits(65, 18, dtype=dtype, device=backend.device, extremes=False)
    target = sparse_target((65,), 18, device=backend.device)
    for upstream in (
        torch.tensor(0.37).expand(65),
        torch.linspace(-2, 2, 130)[::2],
        torch.zeros(65),
        torch.full((65,), 1e-3),
    ):
        check_op("quality", pred, target, reduction="none", upstream=upstream.to(backend.device))
    for factor in (1.0, 0.37, -2.5, 0.0, 1e-3):
        check_op(
            "quality",
            pred,
            target,
            reduction="sum",
            upstream=torch.tensor(factor, device=backend.device),
        )
        check_op(
            "quality",
            pred,
            target,
            reduction="mean",
            upstream=torch.tensor(factor, device=backend.device),
        )


@pytest.mark.parametrize(
    "factor",
    [
        3,
        2.5,
        0,
        0.0,
        torch.tensor(2.5),
        torch.tensor([2.5]),
        torch.tensor(7),
        torch.tensor(0.0),
        torch.tensor(2.5).double(),
    ],
    ids=repr,
)
def test_avg_factor_forms(backend, factor):
    if isinstance(factor, torch.Tensor):
        factor = factor.to(backend.device)
    pred = logits(31, 6, device=backend.device, extremes=False)
    target = sparse_target((31,), 6, device=backend.device)
    got, _ = check_op(
        "quality",
        pred,
        target,
        avg_factor=factor,
        scale=1 if float(factor) else 1e7,
        what=repr(factor),
    )
    assert got.shape == (factor.shape if isinstance(factor, torch.Tensor) else ())
    total = reference.quality_focal_loss(pred.double(), target, reduction="sum")
    assert float(got) == pytest.approx(float(total) / (float(factor) + 2.0**-23), rel=2e-6)


def test_avg_factor_gets_no_gradient(backend):
    factor = torch.tensor(4.0, requires_grad=True, device=backend.device)
    pred = logits(5, 3, device=backend.device).requires_grad_()
    loss = quality_focal_loss(
        pred, sparse_target((5,), 3, device=backend.device), avg_factor=factor
    )
    assert torch.autograd.grad(loss, factor, allow_unused=True) == (None,)


# ---- edges


@pytest.mark.parametrize("shape", [(0, 5), (0, 1), (2, 0, 3, 5), (0, 80)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty_batch(backend, shape, reduction):
    pred = torch.zeros(shape, device=backend.device, requires_grad=True)
    rows = shape[:-1]
    label = torch.zeros(rows, dtype=torch.int64, device=backend.device)
    score = torch.zeros(rows, device=backend.device)
    for target in ((label, score), torch.zeros(shape, device=backend.device)):
        for kwargs in (
            {},
            {"weight": torch.zeros(rows)},
            {"avg_factor": 1.0},
            {"avg_factor": torch.tensor(0.0)},
        ):
            if reduction == "sum" and "avg_factor" in kwargs:
                continue
            loss = quality_focal_loss(pred, target, reduction=reduction, **kwargs)
            assert loss.shape == (rows if reduction == "none" else ())
            assert bool((loss == 0).all()) and loss.requires_grad
            (grad,) = torch.autograd.grad(loss.sum(), pred)
            assert grad.shape == pred.shape


def test_empty_batch_in_channels_first(backend):
    pred = torch.zeros(2, 5, 0, 4, device=backend.device, requires_grad=True)
    label = torch.zeros(2, 0, 4, dtype=torch.int64, device=backend.device)
    loss = quality_focal_loss(pred, (label, label.float()), class_dim=1)
    loss.backward()
    assert float(loss.detach()) == 0.0 and pred.grad.shape == pred.shape


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weight_form", ["row", "element"])
@pytest.mark.parametrize("poison", [float("nan"), INF, -INF])
def test_weight_zero_removes_whatever_is_there(backend, dtype, weight_form, poison):
    pred = logits(20, 18, dtype=dtype, device=backend.device, extremes=False)
    label, score = sparse_target((20,), 18, device=backend.device)
    clean = pred.clone()
    weight = torch.ones(20, 18, device=backend.device)
    weight[3] = 0
    pred[3] = poison
    clean[3] = 0
    if weight_form == "element":
        weight[7, 5], weight[7, 17] = 0, 0
        pred[7, 5] = pred[7, 17] = poison
        clean[7, 5] = clean[7, 17] = 0
    else:
        weight = weight[:, 0]
    dense = dense_target((20,), 18, device=backend.device)
    dense[3] = poison
    for target, reduction in combinations(((label, score), dense), REDUCTIONS):
        kwargs = {"weight": weight, "reduction": reduction}
        upstream = random_upstream(quality_focal_loss(clean, (label, score), **kwargs))
        got, grad = evaluate(quality_focal_loss, pred, upstream, (target,), kwargs)
        clean_target = target if isinstance(target, tuple) else dense.nan_to_num(0, 0, 0)
        expected, expected_grad = evaluate(
            quality_focal_loss, clean, upstream, (clean_target,), kwargs
        )
        assert torch.equal(got, expected)
        assert torch.equal(grad, expected_grad)
        assert bool((grad[3] == 0).all())


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("form", ["sparse", "dense"])
@pytest.mark.parametrize("classes", [3, 18, 80])
def test_nan_stays_in_its_row(backend, dtype, form, classes):
    for row in (0, 5, 39):
        pred = logits(40, classes, dtype=dtype, device=backend.device, extremes=False)
        target = make_target(form, (40,), classes, device=backend.device)
        upstream = torch.ones(40, device=backend.device)
        clean, clean_grad = evaluate(
            quality_focal_loss, pred, upstream, (target,), {"reduction": "none"}
        )
        pred[row, classes - 1] = float("nan")
        got, grad = evaluate(quality_focal_loss, pred, upstream, (target,), {"reduction": "none"})
        others = torch.arange(40, device=backend.device) != row
        assert bool(got[row].isnan()) and bool(grad[row, classes - 1].isnan())
        assert torch.equal(got[others], clean[others]) and torch.equal(
            grad[others], clean_grad[others]
        )
        assert torch.equal(grad[row, : classes - 1], clean_grad[row, : classes - 1])
        assert bool(quality_focal_loss(pred, target, reduction="sum").isnan())


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0, 1.5])
def test_infinite_logits_where_the_loss_is_defined(backend, dtype, beta):
    """-inf is a perfect negative (a masked class), +inf a perfect positive of score 1: loss 0,
    gradient 0.
    """
    pred = logits(12, 19, dtype=dtype, device=backend.device, extremes=False)
    label = torch.full((12,), 4, device=backend.device)
    score = torch.ones(12, device=backend.device)
    clean = pred.clone()
    pred[:, 7], pred[:, 18], pred[::2, 4] = -INF, -INF, INF
    clean[:, 7], clean[:, 18], clean[::2, 4] = -1e4, -1e4, 1e4
    upstream = torch.ones(12, device=backend.device)
    dense = torch.zeros(12, 19, device=backend.device)
    dense[:, 4] = 1.0
    for target in ((label, score), dense):
        got, grad = evaluate(
            quality_focal_loss, pred, upstream, (target,), {"reduction": "none", "beta": beta}
        )
        expected, expected_grad = evaluate(
            quality_focal_loss, clean, upstream, (target,), {"reduction": "none", "beta": beta}
        )
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("beta", BETAS)
def test_every_logit_of_a_fine_grid(fused, dtype, beta):
    """All of [-110, 110] against negatives, positives and interior targets: no seam of a piecewise
    approximation.
    """
    x = torch.linspace(-110, 110, 22001, dtype=torch.float64).to(dtype).to(fused.device)[:, None]
    for q in (0.0, 1.0, 0.3, 0.9999):
        target = torch.full_like(x, q, dtype=torch.float32)
        check_op(
            "quality",
            x,
            target,
            beta=beta,
            reduction="none",
            upstream=torch.ones(len(x)),
            what=f"q={q} beta={beta}",
        )


@pytest.mark.parametrize("value", [-33.0, -95.0, -87.5, -103.0])
def test_denormal_results(backend, value):
    """sigmoid^2 is denormal here: whatever the kernel does about denormals, the bound holds."""
    target = sparse_target((64,), 80, device=backend.device)
    pred = torch.full((64, 80), value, device=backend.device)
    check_op("quality", pred, target, reduction="none", what=f"x={value}")


def test_flush_mode_of_the_caller_is_kept(backend):
    """The kernels may flush denormals while they run: neither the caller's thread nor PyTorch's
    workers do so afterwards, and a caller who asked for it keeps it.
    """
    rows = 5000 if INTERPRETED else 50000
    pred = torch.full((rows, 80), -95.0, device=backend.device)
    target = sparse_target((rows,), 80, device=backend.device)
    denormal = torch.full((2_000_000,), 1e-40)
    for run in (
        lambda: quality_focal_loss(pred, target),
        lambda: gfl_kernels.distribution_focal_loss(pred[:, :17], target[1]),
        lambda: gfl_kernels.integral(pred[:, :17]),
    ):
        run()
        assert bool((denormal * 0.5 > 0).all())
        if torch.set_flush_denormal(True):
            try:
                run()
                assert float(denormal[:1] * 0.5) == 0
            finally:
                torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", FLOATS)
def test_values_beyond_the_range_of_the_dtype(backend, dtype):
    """Upstream gradients that overflow the gradient's dtype give infinities, which a GradScaler
    looks for; NaN and negative weights are used as they are.
    """
    pred = logits(40, 7, dtype=dtype, device=backend.device, extremes=False)
    target = sparse_target((40,), 7, device=backend.device)
    for factor in (1e6, 3e38, float("nan")):
        check_op("quality", pred, target, reduction="sum", upstream=torch.tensor(factor))
    for value in (float("nan"), -1.5):
        weight = torch.full((40,), value, device=backend.device)
        check_op("quality", pred, target, weight=weight, reduction="none", what=f"weight {value}")
    for factor in (INF, float("nan"), torch.tensor(INF), torch.tensor(float("nan"))):
        check_op("quality", pred, target, avg_factor=factor, what=f"avg_factor {factor}")
    score = torch.full((40,), float("nan"), device=backend.device)
    check_op("quality", pred, (target[0], score), reduction="none", what="NaN scores")


@pytest.mark.parametrize("beta", [0.1, 5.0, 10.0, 30.0])
def test_unusual_betas(backend, beta):
    for dtype in FLOATS:
        pred = logits(50, 9, dtype=dtype, device=backend.device)
        target = sparse_target((50,), 9, device=backend.device)
        check_op("quality", pred, target, beta=beta, reduction="none", what=f"beta={beta}")


def test_views_with_a_pending_sign_and_overlapping_memory(backend):
    """A negative-bit view holds other bytes than its values; strides may be 0 or rows overlap."""
    pred = logits(12, 7, device=backend.device)
    label, score = sparse_target((12,), 7, device=backend.device)
    weight = row_weight((12,), device=backend.device)
    for x in (
        torch._neg_view(pred),
        pred[:, :1].expand(12, 7),
        logits(30, device=backend.device).as_strided((12, 7), (2, 1)),
    ):
        check_op("quality", x, (label, score), weight=weight, reduction="none", what="odd view")
        check_op("quality", x, (label, score), what="odd view")
    negative = (label, torch._neg_view(-score))
    check_op("quality", pred, negative, weight=torch._neg_view(-weight), reduction="none")


def test_another_default_dtype(backend):
    """torch.set_default_dtype changes what new tensors are, not what a loss of float32 is."""
    pred, target = logits(20, 7, device=backend.device), sparse_target((20,), 7)
    torch.set_default_dtype(torch.float64)
    try:
        check_op("quality", pred, target, avg_factor=2.5, what="default float64")
        check_op("integral", pred, scale=7, what="default float64")
    finally:
        torch.set_default_dtype(torch.float32)


def test_sum_of_many_rows_keeps_its_digits(backend):
    """The sum over 2e6 elements is good to float32, not to float32 times the count."""
    pred = logits(25000, 80, device=backend.device, extremes=False)
    target = sparse_target((25000,), 80, device=backend.device)
    got = quality_focal_loss(pred, target, reduction="sum")
    truth = reference.quality_focal_loss(pred.double(), target, reduction="sum")
    assert float(got) == pytest.approx(float(truth), rel=1e-6)


@pytest.mark.parametrize("dtype", HALF)
def test_half_loss_does_not_overflow(backend, dtype):
    """float16 ends at 65504; the loss of half logits is float32 and the gradient of a scaled loss
    is finite.
    """
    pred = torch.full((2000, 80), 12.0, dtype=dtype, device=backend.device)
    target = (
        torch.full((2000,), 80, device=backend.device),
        torch.zeros(2000, device=backend.device),
    )
    got, _ = check_op("quality", pred, target, reduction="sum")
    assert got.dtype == torch.float32 and float(got) > 65504


@pytest.mark.parametrize("dtype", FLOATS)
def test_float16_gradients_under_a_loss_scale(backend, dtype):
    """An upstream gradient of 65536 reaches gradients that are 0 in half before scaling: they must
    not be lost.
    """
    pred = logits(4096, 80, dtype=dtype, device=backend.device, extremes=False)
    target = sparse_target((4096,), 80, device=backend.device)
    for reduction, factor in (("mean", 65536.0), ("sum", 1e-3)):
        upstream = torch.tensor(factor, device=backend.device)
        _, grad = check_op(
            "quality", pred, target, reduction=reduction, upstream=upstream, what=f"scale {factor}"
        )
        assert bool(grad.isfinite().all())
    weight = row_weight((4096,), device=backend.device)
    check_op(
        "quality", pred, target, weight=weight, avg_factor=5000.0, upstream=torch.tensor(65536.0)
    )


def test_modules_scale_the_loss(backend):
    pred = logits(30, 8, device=backend.device)
    target = sparse_target((30,), 8, device=backend.device)
    weight = row_weight((30,), device=backend.device)
    for reduction in REDUCTIONS:
        module = gfl_kernels.QualityFocalLoss(beta=1.5, reduction=reduction, loss_weight=0.7)
        expected = 0.7 * quality_focal_loss(
            pred, target, beta=1.5, weight=weight, reduction=reduction
        )
        got = module(pred, target, weight)
        assert_no_worse(got, expected, expected, what="loss_weight")
        got = module(pred, target, weight, reduction_override="sum")
        expected = 0.7 * quality_focal_loss(pred, target, beta=1.5, weight=weight, reduction="sum")
        assert_no_worse(got, expected, expected, what="reduction_override")
        leaf = pred.detach().requires_grad_()
        (grad,) = torch.autograd.grad(module(leaf, target, weight).sum(), leaf)
        (expected,) = torch.autograd.grad(
            0.7
            * quality_focal_loss(leaf, target, beta=1.5, weight=weight, reduction=reduction).sum(),
            leaf,
        )
        assert_no_worse(grad, expected, expected, what="gradient")
