"""Distribution Focal Loss and Integral: every backend against the float64 reference, over target
forms, bins, layouts, dtypes and shapes.
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
    NAN,
    assert_no_worse,
    bin_target,
    check_op,
    combinations,
    evaluate,
    explicit_target,
    gradcheck,
    lay_out,
    logits,
    poison,
    random_upstream,
    row_weight,
)

import gfl_kernels
from gfl_kernels import distribution_focal_loss, integral, reference

REDUCTIONS = ("none", "mean", "sum")
BINS = (2, 8, 16, 17, 33, 64)
FORMS = ("position", "explicit")


def make_target(form, row_shape, bins, *, device="cpu", seed=0):
    make = bin_target if form == "position" else explicit_target
    return make(row_shape, bins, device=device, seed=seed)


def double(target):
    """Float parts in float64, as gradcheck's finite differences need them."""
    if isinstance(target, tuple):
        return target[0], target[1].double(), target[2].double()
    return target.double()


# ---- float64: the derivative against finite differences


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(backend, form, reduction):
    for bins in (2, 5, 17):
        pred = torch.randn(5, bins, dtype=torch.float64, device=backend.device, requires_grad=True)
        target = double(make_target(form, (5,), bins, device=backend.device))
        weight = row_weight((5,), device=backend.device).double()
        shape = (5,) if reduction == "none" else ()
        upstream = random_upstream(torch.empty(shape, dtype=torch.float64)).to(backend.device)
        for kwargs in ({}, {"weight": weight}, {"avg_factor": 3.7} if reduction == "mean" else {}):

            def loss(pred, target=target, kwargs=kwargs, upstream=upstream):
                return upstream * distribution_focal_loss(
                    pred, target, reduction=reduction, **kwargs
                )

            assert gradcheck(loss, (pred,), eps=1e-6, atol=1e-7, rtol=1e-5), (
                bins,
                kwargs,
            )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck_layouts(backend, layout):
    laid = lay_out(layout, torch.randn(1, 2, 3, 5, dtype=torch.float64, device=backend.device))
    upstream = random_upstream(torch.empty(laid.row_shape, dtype=torch.float64)).to(backend.device)
    pred = laid.pred.requires_grad_()
    y = torch.randn(5, dtype=torch.float64, device=backend.device)
    for form in FORMS:
        target = double(make_target(form, laid.row_shape, 5, device=backend.device))

        def loss(pred, target=target):
            return upstream * distribution_focal_loss(
                pred, target, reduction="none", bin_dim=laid.dim
            )

        assert gradcheck(loss, (pred,), eps=1e-6, atol=1e-7, rtol=1e-5)
    for bins in (None, y):

        def decode(pred, bins=bins):
            return upstream * integral(pred, bins=bins, bin_dim=laid.dim)

        assert gradcheck(decode, (pred,), eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("positions", ["default", "arbitrary"])
def test_integral_gradcheck(backend, bins, positions):
    y = (
        torch.randn(bins, dtype=torch.float64, device=backend.device)
        if positions == "arbitrary"
        else None
    )
    pred = torch.randn(3, bins, dtype=torch.float64, device=backend.device, requires_grad=True)
    upstream = random_upstream(torch.empty(3, dtype=torch.float64)).to(backend.device)
    assert gradcheck(lambda p: upstream * integral(p, bins=y), (pred,), eps=1e-6, atol=1e-7)


# ---- no worse than eager


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bins", BINS)
def test_no_worse_than_eager(fused, dtype, form, bins):
    # 15, 16, 17: the two sides of a block of rows that share a register
    heights = (1, 17, 333) if INTERPRETED else (1, 7, 15, 16, 17, 333, 1000)
    for rows, option in combinations(heights, ("none", "mean", "avg_factor")):
        pred = logits(rows, bins, dtype=dtype, device=fused.device, seed=rows)
        target = make_target(form, (rows,), bins, device=fused.device, seed=rows)
        if option == "avg_factor":
            kwargs = {"weight": row_weight((rows,), device=fused.device), "avg_factor": 5.5}
        else:
            kwargs = {"reduction": option}
        what = f"{form} K={bins} N={rows} {option}"
        check_op("distribution", pred, target, what=what, **kwargs)


@pytest.mark.parametrize("bins", [3, 4, 5, 7, 9, 15, 18, 31, 32, 34, 63])
def test_any_number_of_bins(backend, bins):
    for dtype in (FLOATS[bins % 3],) if INTERPRETED else FLOATS:
        pred = logits(70, bins, dtype=dtype, device=backend.device)
        for form in FORMS:
            target = make_target(form, (70,), bins, device=backend.device)
            check_op("distribution", pred, target, reduction="none", what=f"{form} K={bins}")
        check_op("integral", pred, scale=bins, what=f"K={bins}")


@pytest.mark.parametrize("bins", [1, 65, 100, 300])
def test_bins_beyond_the_tuned_range(backend, bins):
    pred = logits(40, bins, device=backend.device)
    check_op("integral", pred, scale=bins, what=f"K={bins}")
    check_op("distribution", pred, bin_target((40,), bins), reduction="none", what=f"K={bins}")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bins", [17, 16, 8, 33])
def test_no_worse_than_eager_on_large_inputs(fused, dtype, bins):
    """Above the size where rows are shared between threads, and with several tiles interpreted."""
    rows = 3 * 1400 if INTERPRETED else 4 * 8400
    pred = logits(rows, bins, dtype=dtype, device=fused.device)
    for form in FORMS:
        target = make_target(form, (rows,), bins, device=fused.device)
        check_op("distribution", pred, target, reduction="none", what=f"{form} K={bins}")
        check_op("distribution", pred, target, reduction="sum", what=f"{form} K={bins} sum")
    weight = row_weight((rows,))
    check_op(
        "distribution", pred, target, weight=weight, avg_factor=torch.tensor(17.0), what=f"K={bins}"
    )
    check_op("integral", pred, scale=bins, what=f"K={bins}")


@pytest.mark.parametrize("bins", [8, 16, 17, 33, 20])
def test_gradients_written_past_the_caches(native, bins):
    """From 8 MiB on the CPU kernels stream gradients of moderate logits: the same bits as those of
    a part, which are not streamed."""
    rows = (8 << 20) // (4 * bins) + 67
    pred = logits(rows, bins, extremes=False)
    weight, upstream = row_weight((rows,)), random_upstream(torch.empty(rows))
    calls = (
        (distribution_focal_loss, lambda part: (bin_target((rows,), bins)[part],), True),
        (integral, lambda part: (), False),
    )
    with gfl_kernels.use_backend("cpu"):
        for function, args, weighted in calls:

            def both(part, function=function, args=args, weighted=weighted):
                options = {"reduction": "none", "weight": weight[part]} if weighted else {}
                return evaluate(function, pred[part], upstream[part], args(part), options)

            value, grad = both(slice(None))
            for first in (0, 64 * 300, rows // 64 * 64 - 192):
                part = slice(first, min(first + 256, rows))
                value_of_part, grad_of_part = both(part)
                assert torch.equal(value[part], value_of_part)
                assert torch.equal(grad[part], grad_of_part)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("bins", [8, 17, 20])
def test_explicit_weights_that_cancel(backend, dtype, bins):
    """With wl = -wr the softmax has no part in the gradient; with both 0 nothing has."""
    pred = logits(70, bins, dtype=dtype, device=backend.device, extremes=False)
    left, weight_left, _ = explicit_target((70,), bins, device=backend.device)
    weight_left[::7] = 0
    target = left, weight_left, -weight_left
    _, grad = check_op("distribution", pred, target, reduction="none", what="weights that cancel")
    assert not grad[::7].any()


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("positions", ["default", "arbitrary", "half", "int"])
def test_integral_no_worse_than_eager(fused, dtype, bins, positions):
    y = {
        "default": None,
        "arbitrary": torch.randn(bins) * 20,
        "half": (torch.randn(bins) * 20).bfloat16(),
        "int": torch.randint(-5, 60, (bins,)),
    }[positions]
    scale = bins if y is None else float(y.double().abs().max())
    for rows in (1, 17, 333) if INTERPRETED else (1, 7, 15, 16, 17, 333):
        pred = logits(rows, bins, dtype=dtype, device=fused.device, seed=rows)
        check_op("integral", pred, bins=y, scale=scale, what=f"K={bins} N={rows} {positions}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(backend, layout, dtype):
    widths = (2, 8, 16, 17, 33)
    for bins, form, reduction in combinations(widths, FORMS, REDUCTIONS):
        laid = lay_out(layout, logits(2, 5, 7, bins, dtype=dtype, device=backend.device))
        target = make_target(form, laid.row_shape, bins, device=backend.device)
        kwargs = {"reduction": reduction}
        if reduction == "mean":
            kwargs |= {"weight": row_weight(laid.row_shape, device=backend.device)}
            kwargs |= {"avg_factor": 3.0}
        what = f"{layout} K={bins} {form}"
        check_op("distribution", laid.pred, target, bin_dim=laid.dim, what=what, **kwargs)
    for bins in widths:
        laid = lay_out(layout, logits(2, 5, 7, bins, dtype=dtype, device=backend.device))
        check_op("integral", laid.pred, bin_dim=laid.dim, scale=bins, what=f"{layout} K={bins}")


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_gradient_has_the_layout_of_the_input(backend, layout):
    laid = lay_out(layout, logits(2, 3, 4, 5, device=backend.device))
    target = bin_target(laid.row_shape, 5, device=backend.device)
    for loss in (
        lambda z: distribution_focal_loss(z, target, bin_dim=laid.dim),
        lambda z: distribution_focal_loss(z, target, bin_dim=laid.dim, reduction="none"),
        lambda z: integral(z, bin_dim=laid.dim),
    ):
        leaf = laid.pred.detach().requires_grad_()
        loss(leaf).sum().backward()
        assert leaf.grad.shape == leaf.shape and leaf.grad.stride() == leaf.stride()
        assert leaf.grad.dtype == leaf.dtype


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_head_output_viewed_as_sides(backend, memory_format):
    """[B, 4 K, H, W] as the convolution leaves it, channel = side * K + bin, read through [B, 4, K,
    H, W] and others.
    """
    batch, bins, height, width = 2, 17, 5, 3
    channels = logits(batch, 4 * bins, height, width, device=backend.device).to(
        memory_format=memory_format
    )
    sides = channels.view(batch, 4, bins, height, width)
    views = [
        (sides, 2),
        (sides.permute(0, 3, 4, 1, 2), -1),
        (channels.unflatten(1, (4, bins)).flatten(3), 2),
    ]
    for pred, dim in views:
        shape = tuple(size for axis, size in enumerate(pred.shape) if axis != dim % pred.dim())
        check_op("integral", pred, bin_dim=dim, scale=bins, what="sides")
        for form in FORMS:
            target = make_target(form, shape, bins, device=backend.device)
            weight = row_weight(shape, device=backend.device)
            check_op(
                "distribution",
                pred,
                target,
                weight=weight,
                bin_dim=dim,
                reduction="none",
                what=f"sides {form}",
            )


def test_rows_of_sides(backend):
    """[B, A, 4 K] (ultralytics), split from a wider head output, and [B, 4, K] with the bins in the
    middle.
    """
    wide = logits(3, 11, 4 * 16 + 80, device=backend.device)
    pred = wide[..., : 4 * 16].unflatten(-1, (4, 16))
    check_op("integral", pred, scale=16, what="split head")
    check_op("distribution", pred, bin_target((3, 11, 4), 16), reduction="none", what="split head")
    middle = logits(6, 16, 4, device=backend.device)
    check_op("integral", middle, bin_dim=1, scale=16, what="[B, K, 4]")
    check_op(
        "distribution",
        middle,
        bin_target((6, 4), 16),
        bin_dim=1,
        reduction="none",
        what="[B, K, 4]",
    )


def test_strided_targets_and_weights(backend):
    """Columns of wider tensors, every second element, weight.expand(-1, 4).reshape(-1) and stride
    0.
    """
    rows, bins = 104, 17
    pred = logits(rows, bins, device=backend.device)
    wide = torch.full((rows, 3), NAN, device=backend.device)
    wide[:, 1] = bin_target((rows,), bins, device=backend.device)
    weight = row_weight((2 * rows,), device=backend.device)[::2]
    check_op("distribution", pred, wide[:, 1], weight=weight, reduction="none", what="strided")
    stepped = explicit_target((2 * rows,), bins, device=backend.device)
    check_op(
        "distribution",
        pred,
        tuple(part[::2] for part in stepped),
        weight=weight,
        reduction="none",
        what="step",
    )
    sides = pred.view(rows // 4, 4, bins)
    expanded = row_weight((rows // 4, 1), device=backend.device).expand(-1, 4)
    target = bin_target((rows // 4, 1), bins, device=backend.device).expand(-1, 4)
    check_op("distribution", sides, target, weight=expanded, reduction="none", what="stride 0")
    check_op("distribution", sides, target, weight=expanded, avg_factor=7, what="stride 0")
    one = tuple(torch.tensor(value).expand(rows) for value in (3, 0.4, 0.7))
    check_op(
        "distribution",
        pred,
        one,
        weight=torch.tensor(0.5).expand(rows),
        reduction="none",
        what="all stride 0",
    )
    y = torch.randn(bins, 2, device=backend.device)[:, 0]
    check_op("integral", pred, bins=y, scale=4, what="strided bins")
    check_op("integral", pred, bins=torch.tensor(1.5).expand(bins), scale=4, what="stride-0 bins")


def test_expanded_logits(backend):
    base = logits(1, 9, device=backend.device, extremes=False).requires_grad_()
    target = bin_target((40,), 9, device=backend.device)
    for op in (
        lambda z: distribution_focal_loss(z, target, reduction="sum"),
        lambda z: integral(z).sum(),
    ):
        (grad,) = torch.autograd.grad(op(base.expand(40, 9)), base)
        copies = base.detach().expand(40, 9).clone().requires_grad_()
        (expected,) = torch.autograd.grad(op(copies), copies)
        torch.testing.assert_close(grad, expected.sum(0, keepdim=True), rtol=1e-5, atol=1e-5)


# ---- targets


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("bins", [2, 8, 17, 33])
def test_targets_at_and_beyond_the_ends(backend, dtype, bins):
    """Integers, K - 1 exactly, and beyond both ends: clamped into [0, K - 1], where eager PyTorch
    dies or extrapolates.
    """
    last = bins - 1
    values = [
        0.0,
        1.0,
        last,
        last - 1e-4,
        last + 0.5,
        last + 1,
        1e4,
        INF,
        -0.0,
        -0.5,
        -3.0,
        -INF,
        0.999999,
    ]
    target = torch.tensor(values, device=backend.device)
    pred = logits(len(values), bins, dtype=dtype, device=backend.device)
    got, grad = check_op("distribution", pred, target, reduction="none", what=f"K={bins}")
    clamped, clamped_grad = evaluate(
        distribution_focal_loss,
        pred,
        random_upstream(got),
        (target.clamp(0, last),),
        {"reduction": "none"},
    )
    assert torch.equal(got, clamped) and torch.equal(grad, clamped_grad)
    at_last = torch.full((len(values),), float(last), device=backend.device)
    rows = distribution_focal_loss(pred, at_last, reduction="none").double()
    expected = -pred.double().log_softmax(-1)[:, -1]
    torch.testing.assert_close(rows, expected, rtol=4e-6, atol=1e-5)


@pytest.mark.parametrize(
    "target_dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32]
)
def test_target_dtypes(backend, target_dtype):
    """A bfloat16 14.99 rounds to 15.0, the last bin of 16: in range here."""
    pred = logits(50, 16, device=backend.device)
    target = bin_target((50,), 16, device=backend.device)
    target[0] = 14.99
    weight = row_weight((50,), device=backend.device, dtype=target_dtype)
    check_op(
        "distribution",
        pred,
        target.to(target_dtype),
        weight=weight,
        reduction="none",
        what=str(target_dtype),
    )


@pytest.mark.parametrize("left_dtype", [torch.int64, torch.int32, torch.uint8, torch.float32])
def test_left_index_dtypes(backend, left_dtype):
    pred = logits(60, 33, device=backend.device)
    left, weight_left, weight_right = explicit_target((60,), 33, device=backend.device)
    check_op(
        "distribution",
        pred,
        (left.to(left_dtype), weight_left, weight_right),
        reduction="none",
        what=str(left_dtype),
    )


@pytest.mark.parametrize("dim", [1, -1])
def test_a_left_index_that_is_not_whole_is_truncated(backend, dim):
    """D-FINE's clamp ends at 31.9, beyond which the weight is on the right bin, 32."""
    bins = 33
    left, weight_left, weight_right = explicit_target((9, 40), bins, device=backend.device)
    pred = logits(9, 40, bins, device=backend.device).movedim(-1, dim)
    left = left + torch.rand(left.shape).to(backend.device) * 0.99
    left[:, ::5] = 31.9
    target = left, weight_left, weight_right
    whole = left.long(), weight_left, weight_right
    got = distribution_focal_loss(pred, target, reduction="none", bin_dim=dim)
    expected = distribution_focal_loss(pred, whole, reduction="none", bin_dim=dim)
    torch.testing.assert_close(got, expected)
    check_op("distribution", pred, target, reduction="none", bin_dim=dim, what="left + fraction")


def test_left_index_beyond_the_bins_is_clamped(backend):
    """The kernels index with it: a wrong left index must not read or write outside the row."""
    pred = logits(5, 6, device=backend.device)
    left = torch.tensor([-1, 6, 5, 2**40, -(2**40)], device=backend.device)
    weights = torch.full((5,), 0.5, device=backend.device)
    check_op(
        "distribution", pred, (left, weights, weights), reduction="none", what="left out of range"
    )
    check_op(
        "distribution",
        pred,
        (left.double(), weights, weights),
        reduction="none",
        what="left out of range",
    )


def test_a_nan_target_stays_in_its_row(backend):
    pred = logits(40, 17, device=backend.device, extremes=False)
    target = bin_target((40,), 17, device=backend.device)
    upstream = random_upstream(torch.empty(40)).to(backend.device)
    clean, clean_grad = evaluate(
        distribution_focal_loss, pred, upstream, (target,), {"reduction": "none"}
    )
    for row in (0, 17, 39):
        bad = target.clone()
        bad[row] = NAN
        got, grad = evaluate(distribution_focal_loss, pred, upstream, (bad,), {"reduction": "none"})
        others = torch.arange(40, device=backend.device) != row
        assert bool(got[row].isnan())
        assert torch.equal(got[others], clean[others]) and torch.equal(
            grad[others], clean_grad[others]
        )


@pytest.mark.parametrize(
    "factor", [3, 2.5, 0, torch.tensor(2.5), torch.tensor([2.5]), torch.tensor(7)], ids=repr
)
def test_avg_factor_forms(backend, factor):
    if isinstance(factor, torch.Tensor):
        factor = factor.to(backend.device)
    pred = logits(31, 6, device=backend.device, extremes=False)
    target = bin_target((31,), 6, device=backend.device)
    scale = 1 if float(factor) else 1e7
    got, _ = check_op(
        "distribution", pred, target, avg_factor=factor, scale=scale, what=repr(factor)
    )
    assert got.shape == (factor.shape if isinstance(factor, torch.Tensor) else ())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_upstream_gradients(backend, dtype):
    pred = logits(65, 17, dtype=dtype, device=backend.device)
    target = bin_target((65,), 17, device=backend.device)
    for upstream in (
        torch.tensor(0.37).expand(65),
        torch.linspace(-2, 2, 130)[::2],
        torch.zeros(65),
        torch.full((65,), 1e-3),
    ):
        upstream = upstream.to(backend.device)
        check_op("distribution", pred, target, reduction="none", upstream=upstream)
        check_op("integral", pred, upstream=upstream, scale=17)
    for factor in (1.0, 0.37, -2.5, 0.0, 65536.0 if dtype != torch.float16 else 1024.0):
        upstream = torch.tensor(factor, device=backend.device)
        scale = max(1.0, factor)
        check_op("distribution", pred, target, reduction="sum", upstream=upstream, scale=scale)
        check_op("distribution", pred, target, reduction="mean", upstream=upstream, scale=scale)


# ---- edges


@pytest.mark.parametrize("shape", [(0, 17), (0, 2), (2, 0, 4, 16)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty_batch(backend, shape, reduction):
    pred = torch.zeros(shape, device=backend.device, requires_grad=True)
    rows = shape[:-1]
    zeros = torch.zeros(rows, device=backend.device)
    for target in (zeros, (zeros.long(), zeros, zeros)):
        for kwargs in (
            {},
            {"weight": zeros},
            {"avg_factor": 1.0},
            {"avg_factor": torch.tensor(0.0)},
        ):
            if reduction == "sum" and "avg_factor" in kwargs:
                continue
            loss = distribution_focal_loss(pred, target, reduction=reduction, **kwargs)
            assert loss.shape == (rows if reduction == "none" else ())
            assert bool((loss == 0).all()) and loss.requires_grad
            (grad,) = torch.autograd.grad(loss.sum(), pred)
            assert grad.shape == pred.shape
    decoded = integral(pred)
    assert decoded.shape == rows and decoded.requires_grad
    (grad,) = torch.autograd.grad(decoded.sum(), pred)
    assert grad.shape == pred.shape


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bins", [8, 16, 17])
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_weight_zero_rows_are_not_read(backend, dtype, bins, poison):
    rows = 37
    pred = logits(rows, bins, dtype=dtype, device=backend.device, extremes=False)
    weight = row_weight((rows,), device=backend.device)
    dead = weight == 0
    weight[5:21] = 0  # a whole block of rows, and single ones
    dead = weight == 0
    assert bool(dead.any()) and not bool(dead.all())
    poisoned = torch.where(dead[:, None], poison, pred)
    for form, reduction in combinations(FORMS, REDUCTIONS):
        target = make_target(form, (rows,), bins, device=backend.device)
        if form == "position":
            bad = torch.where(dead, NAN, target)
        else:
            bad = (target[0], torch.where(dead, NAN, target[1]), target[2])
        kwargs = {"weight": weight, "reduction": reduction}
        upstream = random_upstream(distribution_focal_loss(pred, target, **kwargs))
        expected, expected_grad = evaluate(
            distribution_focal_loss, pred, upstream, (target,), kwargs
        )
        got, grad = evaluate(distribution_focal_loss, poisoned, upstream, (bad,), kwargs)
        assert torch.equal(got, expected) and torch.equal(grad, expected_grad)
        assert bool((grad[dead] == 0).all())


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("bins", [2, 8, 16, 17, 33])
def test_nan_stays_in_its_row(backend, dtype, bins):
    pred = logits(40, bins, dtype=dtype, device=backend.device, extremes=False)
    target = bin_target((40,), bins, device=backend.device)
    upstream = random_upstream(torch.empty(40)).to(backend.device)
    runs = [(distribution_focal_loss, (target,), {"reduction": "none"}), (integral, (), {})]
    for function, args, kwargs in runs:
        clean, clean_grad = evaluate(function, pred, upstream, args, kwargs)
        for row, column in ((0, 0), (17, bins - 1), (39, bins // 2)):
            bad = pred.clone()
            bad[row, column] = NAN
            got, grad = evaluate(function, bad, upstream, args, kwargs)
            others = torch.arange(40, device=backend.device) != row
            assert bool(got[row].isnan()) and bool(grad[row].isnan().all())
            assert torch.equal(got[others], clean[others]) and torch.equal(
                grad[others], clean_grad[others]
            )


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("bins", [4, 16, 17, 33])
def test_infinite_logits(backend, dtype, bins):
    """-inf masks a bin; a row of all -inf, or with +inf, is NaN, and stays in that row."""
    pred = logits(24, bins, dtype=dtype, device=backend.device, extremes=False)
    pred[:, 0] = -INF
    pred[3, -1] = -INF
    pred[9] = -INF
    pred[11, 2] = INF
    target = torch.linspace(1, bins - 1.001, 24, device=backend.device)
    target[3], target[4], target[5] = (
        1.5,
        0.0,
        0.5,
    )  # rows 4 and 5 need the masked bin: infinite loss
    check_op("integral", pred, scale=bins, what="infinite logits")
    got, grad = check_op("distribution", pred, target, reduction="none", what="infinite logits")
    good = torch.tensor([row not in (4, 5, 9, 11) for row in range(24)])
    assert bool(got[good].isfinite().all()) and bool(grad[good].isfinite().all())
    assert bool(got[4:6].isinf().all()) and bool(got[9].isnan())


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("bins", [2, 16, 17])
def test_wide_spreads_and_constants(backend, dtype, bins):
    """Spread over 88 (exp underflows), rows of one constant however large, one bin above all."""
    rows = [
        [100.0] * bins,
        [-1e4] * bins,
        [1e4] * bins,
        [200.0 * (k % 2) for k in range(bins)],
        [-95.0 * k for k in range(bins)],
        [88.5] + [0.0] * (bins - 1),
        [0.0] * (bins - 1) + [1e4],
        [-1e4] * (bins - 1) + [1e4],
    ]
    pred = torch.tensor(rows, dtype=dtype, device=backend.device)
    for t in (0.0, 0.5, bins - 1.0, bins - 1.25):
        target = torch.full((len(rows),), t, device=backend.device)
        check_op("distribution", pred, target, reduction="none", what=f"t={t}")
    check_op("integral", pred, scale=bins, what="spread")
    value = integral(pred[:3])
    torch.testing.assert_close(
        value.double(), torch.full((3,), (bins - 1) / 2, dtype=torch.float64), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("dtype", HALF)
def test_integral_of_half_logits_is_float32(backend, dtype):
    """In bfloat16 the decode is off by up to 0.1 bin: value and accumulation are float32."""
    pred = logits(2000, 17, dtype=dtype, device=backend.device, extremes=False)
    got, _ = check_op("integral", pred, scale=17)
    truth = reference.integral(pred.double())
    assert got.dtype == torch.float32 and float((got - truth).abs().max()) < 1e-5


def test_integral_in_float64(backend):
    pred = logits(100, 17, dtype=torch.float64, device=backend.device)
    check_op("integral", pred, bins=torch.linspace(0, 16, 17), scale=17)


def test_modules(backend):
    pred = logits(30, 17, device=backend.device)
    target, weight = (
        bin_target((30,), 17, device=backend.device),
        row_weight((30,), device=backend.device),
    )
    for reduction in REDUCTIONS:
        module = gfl_kernels.DistributionFocalLoss(reduction=reduction, loss_weight=0.25)
        expected = 0.25 * distribution_focal_loss(pred, target, weight=weight, reduction=reduction)
        got = module(pred, target, weight)
        assert_no_worse(got, expected, expected, what="loss_weight")
        got = module(pred, target, weight, reduction_override="none")
        expected = 0.25 * distribution_focal_loss(pred, target, weight=weight, reduction="none")
        assert_no_worse(got, expected, expected, what="reduction_override")
    sides = logits(9, 4 * 17, device=backend.device)
    layer = gfl_kernels.Integral(16)
    assert list(layer.state_dict()) == ["project"]
    assert torch.equal(layer.project, torch.linspace(0, 16, 17))
    got = layer(sides)
    assert got.shape == (9, 4)
    expected = reference.integral(sides.view(9, 4, 17))
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("fill", [-33.0, -95.0, 0.0])
def test_denormal_probabilities(backend, fill):
    """One bin far above constant others: p is denormal there; the caller's denormals survive the
    call.
    """
    pred = torch.full((64, 17), fill, device=backend.device)
    pred[:, 3] = 70.0
    target = bin_target((64,), 17, device=backend.device)
    check_op("distribution", pred, target, reduction="none", what=f"fill {fill}")
    check_op("integral", pred, scale=17, what=f"fill {fill}")
    assert float(torch.tensor([1e-40]) * 0.5) > 0


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("bins", [8, 17, 20])
@pytest.mark.parametrize("offset", [-95.0, 60.0, 3e4])
def test_logits_far_from_zero(fused, dtype, bins, offset):
    """An offset of all logits changes nothing, in blocks that follow ordinary ones too."""
    near = logits(300, bins, device=fused.device, extremes=False)
    pred = torch.cat((near, near + offset, near)).to(dtype)
    target = bin_target((900,), bins, device=fused.device)
    check_op("distribution", pred, target, reduction="none", what=f"offset {offset}")
    check_op("integral", pred, scale=bins, what=f"offset {offset}")


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("bins", [8, 13, 16, 17, 33, 64])
def test_what_an_integral_saves(native, dtype, bins):
    """Each row's mean and 1 / sum_k exp(z_k), or 0; gradients that use it are those that do not."""
    ops = torch.ops.gfl_native
    rows = 531  # blocks of 256, groups of 64, and vectors of 16 all leave some
    pred = logits(rows, bins, dtype=dtype, extremes=False)
    y = torch.randn(bins, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    out, saved = ops.integral_forward(pred, y, -1, True)
    assert saved.shape == (rows, 2) and saved.dtype == out.dtype
    mean, inverse = saved.unbind(-1)
    assert torch.equal(mean, out)
    used = inverse != 0
    assert used[:512].all()
    truth = 1 / pred.double().exp().sum(-1)
    torch.testing.assert_close(
        inverse[used], truth[used].to(out.dtype), rtol=1e-13 if pred.itemsize == 8 else 2e-6, atol=0
    )
    upstream = torch.randn_like(out)
    plain = ops.integral_backward(upstream, pred, y)
    poison((pred.shape, dtype))
    grad = ops.integral_backward(upstream, pred, y, -1, saved)
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    torch.testing.assert_close(grad, plain, rtol=4 * eps, atol=4 * eps * float(y.abs().max()))
    # It really is what the gradient is computed from.
    saved[:, 1] *= 2
    twice = ops.integral_backward(upstream, pred, y, -1, saved)
    torch.testing.assert_close(twice[used], 2 * grad[used], rtol=2 * eps, atol=2 * eps * tiny)
    assert torch.equal(twice[~used], grad[~used])


def test_backward_does_not_write_what_an_integral_saved(native):
    """Not where an upstream gradient of 0 sends a block another way either: the next backward of a
    graph that is kept gives the same bits.
    """
    pred = logits(531, 17, extremes=False)
    _, saved = torch.ops.gfl_native.integral_forward(pred, None, -1, True)
    before, upstream = saved.clone(), random_upstream(saved[:, 0])
    first = torch.ops.gfl_native.integral_backward(upstream, pred, None, -1, saved)
    masked = upstream.clone()
    masked[::3] = 0
    grad = torch.ops.gfl_native.integral_backward(masked, pred, None, -1, saved)
    assert not grad[::3].any() and torch.equal(saved, before)
    again = torch.ops.gfl_native.integral_backward(upstream, pred, None, -1, saved)
    assert torch.equal(again, first)


def test_an_integral_saves_nothing_that_it_cannot_use(native):
    """Far from 0 or apart from each other, rows keep a 0, and their gradients their precision."""
    near = logits(256, 17, extremes=False)
    wide = near.clone()
    wide[5, 3] = 90.0
    for pred, what in ((near + 60, "far"), (wide, "wide"), (near.t().contiguous().t(), "strided")):
        _, saved = torch.ops.gfl_native.integral_forward(pred, None, -1, True)
        assert not saved[:, 1].any(), what
        check_op("integral", pred, scale=17, what=what)
    _, saved = torch.ops.gfl_native.integral_forward(near, None, 1, True)
    assert not saved[:, 1].any(), "of a peak"
    _, saved = torch.ops.gfl_native.integral_forward(near, None, -1, False)
    assert saved.numel() == 0


def test_an_integral_may_be_changed_in_place(backend):
    """As the eager operations' result may: what backward needs of it is a copy."""
    pred = logits(300, 17, device=backend.device, extremes=False)
    upstream = random_upstream(torch.empty(300)).to(backend.device)
    grads = []
    for in_place in (False, True):
        leaf = pred.clone().requires_grad_()
        distance = integral(leaf)
        distance = distance.mul_(8.0) if in_place else distance * 8.0
        distance.backward(upstream)
        grads.append(leaf.grad)
    assert torch.equal(*grads)
