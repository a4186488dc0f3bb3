"""The correctness traps of this field, one test each, numbered as in the survey of the losses'
users and bug reports.

Elsewhere, because they are another file's business:
 8. eps of the target (0.1, 0.01, 1.01): the hosts' presets, test_presets.py. What is shared, a
target at or beyond the last bin, is trap 7.
25. Top-k ties: test_statistics.py, test_ties_go_to_the_first_bin.
29. Triton's specialisation: test_triton.py, test_one_compilation_for_every_number_of_rows; there is
no autotuning. Recompiles of torch.compile for each N: test_autograd.py.
Streams, device guards and CUDA graphs (27, 28): test_gpu.py.
"""

import math

import pytest
import torch
from support import (
    INF,
    NAN,
    assert_no_worse,
    bin_target,
    check_op,
    dense_target,
    evaluate,
    lay_out,
    logits,
    random_upstream,
    row_weight,
    run_python,
    sparse_target,
)

import gfl_kernels
from gfl_kernels import distribution_focal_loss, integral, quality_focal_loss, reference

HALF = (torch.bfloat16, torch.float16)


def scalar(function, x, *args, dtype=torch.float64, **kwargs):
    """(value, derivative) of a loss of one logit."""
    leaf = torch.tensor([[x]], dtype=dtype, requires_grad=True)
    value = function(leaf, *args, reduction="sum", **kwargs)
    return float(value.detach()), float(torch.autograd.grad(value, leaf)[0])


def positive(score):
    return torch.tensor([0]), torch.tensor([float(score)], dtype=torch.float64)


def test_trap_01_gradient_through_the_modulating_factor(backend):
    """QFL differentiates through |s - q|^beta: the derivative is that of the whole product, not of
    the cross entropy.
    """
    x, q, beta = 0.8, 0.3, 2.0
    s = 1 / (1 + math.exp(-x))
    d, b = s - q, q * math.log1p(math.exp(-x)) + (1 - q) * math.log1p(math.exp(x))
    through = (
        abs(d) ** beta * d + beta * abs(d) ** (beta - 1) * math.copysign(1, d) * s * (1 - s) * b
    )
    detached = abs(d) ** beta * d
    _, slope = scalar(quality_focal_loss, x, positive(q), beta=beta)
    assert slope == pytest.approx(through, rel=1e-12) and slope != pytest.approx(detached, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_trap_02_beta_below_one(backend, dtype):
    """beta < 1: eager gives NaN gradients at s == q and for sigmoids that underflow to 0; beta 0
    and 1 have corners too.
    """
    x = torch.tensor([0.0, -120.0, 120.0, -700.0, 40.0, -20.0], dtype=dtype)[:, None]
    q = torch.tensor([0.5, 0.0, 1.0, 0.0, 1.0, 0.0])
    for beta in (0.0, 0.25, 0.5, 0.75, 1.0):
        for target in (
            (torch.zeros(6, dtype=torch.int64), q),
            q[:, None],
            (torch.ones(6, dtype=torch.int64), q),
        ):
            value, grad = check_op(
                "quality", x, target, beta=beta, reduction="none", what=f"beta {beta}"
            )
            assert bool(value.isfinite().all()) and bool(grad.isfinite().all())
        value, slope = scalar(quality_focal_loss, 0.0, positive(0.5), beta=beta)
        assert slope == 0.0 and value == pytest.approx(math.log(2) if beta == 0 else 0.0, abs=1e-15)
    value, slope = scalar(quality_focal_loss, 0.7, positive(0.3), beta=0.0)
    x, s = torch.tensor(0.7, dtype=torch.float64), 1 / (1 + math.exp(-0.7))
    bce = torch.nn.functional.binary_cross_entropy_with_logits(
        x, torch.tensor(0.3, dtype=torch.float64)
    )
    assert value == pytest.approx(float(bce), rel=1e-12) and slope == pytest.approx(
        s - 0.3, rel=1e-12
    )


def test_trap_03_scores_at_and_outside_the_ends(backend):
    """An IoU rounds to 1.0000001 or -1e-7: taken as it is, neither clamped nor refused (logits and
    probabilities).
    """
    pred = logits(40, 6, extremes=False)
    for score in (0.0, 1.0, 1.0 + 1e-6, -1e-6, 1.25, -0.25):
        target = (torch.arange(40) % 7, torch.full((40,), score))
        check_op("quality", pred, target, reduction="none", what=f"score {score}")
        check_op(
            "quality",
            pred.sigmoid(),
            target,
            reduction="none",
            activated=True,
            what=f"score {score}",
        )
    inside, outside = (
        quality_focal_loss(pred, (torch.arange(40) % 6, torch.full((40,), s))) for s in (1.0, 1.25)
    )
    assert float(inside) != float(outside)


@pytest.mark.parametrize("x", [-15.0, -16.0, -17.0, -20.0, -40.0, -80.0])
def test_trap_04_softplus_keeps_small_terms(backend, x):
    """log(1 + exp(-|x|)) is 17 % off at -15, 0 at -17 in float32; with beta 0 nothing hides it."""
    value, _ = scalar(
        quality_focal_loss,
        x,
        (torch.tensor([1]), torch.tensor([0.0])),
        beta=0.0,
        dtype=torch.float32,
    )
    assert value == pytest.approx(math.log1p(math.exp(x)), rel=2e-6)
    value, _ = scalar(quality_focal_loss, -x, positive(1.0), beta=0.0, dtype=torch.float32)
    assert value == pytest.approx(math.log1p(math.exp(x)), rel=2e-6)


def test_trap_05_every_label_outside_is_background(backend):
    """-1, -2, C, C + 1, 255: all trained as negatives, none ignored, none an index; only weight 0
    ignores.
    """
    pred = logits(6, 5)
    labels = [-1, -2, 5, 6, 255, 2**40]
    values = [
        quality_focal_loss(pred, (torch.full((6,), label), torch.ones(6)), reduction="none")
        for label in labels
    ]
    for value in values[1:]:
        assert torch.equal(value, values[0])
    assert bool((values[0] > 0).all())


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.int16, torch.int8, torch.uint8, torch.float32, torch.float16]
)
def test_trap_06_label_dtypes(backend, dtype):
    """VOC and COCO loaders give int32, uint8 and float labels; uint8 255 is background, not -1 or
    class 255 - 256.
    """
    pred, score = logits(8, 5), torch.rand(8)
    label = torch.tensor([0, 1, 2, 3, 4, 5, 100, 127])
    expected = quality_focal_loss(pred, (label, score), reduction="none")
    assert torch.equal(
        quality_focal_loss(pred, (label.to(dtype), score), reduction="none"), expected
    )
    if dtype == torch.uint8:
        label = torch.full((8,), 255, dtype=dtype)
        expected = quality_focal_loss(pred, (torch.full((8,), 5), score), reduction="none")
        assert torch.equal(quality_focal_loss(pred, (label, score), reduction="none"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_trap_07_dfl_targets_beyond_the_bins(backend, dtype):
    """Integer targets, K - 1, beyond, negative, NaN, infinite, half targets: clamped on a copy,
    never out of bounds.
    """
    bins = 17
    z = logits(9, bins, dtype=dtype, extremes=False)
    target = torch.tensor([0.0, 5.0, 16.0, 16.5, 40.0, -0.5, -7.0, INF, -INF])
    kept = target.clone()
    got, _ = check_op("distribution", z, target, reduction="none", what="beyond")
    assert torch.equal(target, kept)
    assert bool(got.isfinite().all())
    log_p = z.double().log_softmax(-1)
    for row, column in ((0, 0), (1, 5), (2, 16), (3, 16), (4, 16), (5, 0), (6, 0), (7, 16), (8, 0)):
        assert float(got[row]) == pytest.approx(-float(log_p[row, column]), rel=4e-6, abs=1e-5)
    target[4] = NAN
    rows = distribution_focal_loss(z, target, reduction="none")
    assert bool(rows[4].isnan()) and torch.equal(
        rows[[0, 1, 2, 3, 5, 6, 7, 8]], got[[0, 1, 2, 3, 5, 6, 7, 8]]
    )
    rounded = torch.tensor([14.99] * 9).bfloat16()
    assert float(rounded[0]) == 15.0
    check_op("distribution", z[:, :16], rounded, reduction="none", what="bfloat16 target")


def test_trap_09_nan_and_infinite_logits_stay_in_their_row(backend):
    """Reduction none: one bad row is one bad value; a row of -inf; a spread over 88."""
    z = logits(8, 17, extremes=False)
    z[1, 3], z[3], z[5, ::2] = NAN, -INF, -INF
    z[6, :8] += 200
    x = z.clone()
    target = torch.full((8,), 15.5)
    value, grad = check_op("distribution", z, target, reduction="none", what="bad rows")
    assert value.isnan().tolist() == [row in (1, 3) for row in range(8)]
    check_op("integral", z, scale=17, what="bad rows")
    label, score = torch.full((8,), 17), torch.zeros(8)
    value, grad = check_op("quality", x, (label, score), reduction="none", what="bad rows")
    assert value.isnan().tolist() == [row == 1 for row in range(8)]
    assert grad.isnan().sum() == 1


def test_trap_10_no_rows(backend):
    """N = 0: an exact 0 on the graph (no inf * 0), exact zero gradients for every parameter behind
    it.
    """
    layer = torch.nn.Linear(4, 5 + 4 * 8)
    torch.nn.init.constant_(layer.weight, INF)
    out = layer(torch.zeros(0, 4))
    loss = quality_focal_loss(
        out[:, :5], (torch.zeros(0, dtype=torch.int64), torch.zeros(0)), avg_factor=1.0
    )
    loss = loss + distribution_focal_loss(out[:, 5:].reshape(-1, 8), torch.zeros(0))
    loss = loss + integral(out[:, 5:].reshape(-1, 8)).sum()
    loss.backward()
    assert float(loss.detach()) == 0.0
    for parameter in layer.parameters():
        assert parameter.grad is not None and bool((parameter.grad == 0).all())


@pytest.mark.parametrize(
    "factor", [0, 0.0, torch.tensor(0.0), torch.tensor(0), torch.tensor([0.0])], ids=repr
)
def test_trap_11_all_weights_zero_and_avg_factor_zero(backend, factor):
    """eps makes it finite: 0 / (0 + eps) = 0, with zero gradients, for Python and tensor zeros
    alike.
    """
    if isinstance(factor, torch.Tensor):
        factor = factor.to(backend.device)
    weight = torch.zeros(6)
    for call in (
        lambda x: quality_focal_loss(x, sparse_target((6,), 5), weight=weight, avg_factor=factor),
        lambda x: distribution_focal_loss(x, torch.rand(6), weight=weight, avg_factor=factor),
    ):
        leaf = logits(6, 5).requires_grad_()
        loss = call(leaf)
        loss.sum().backward()
        assert bool((loss == 0).all()) and bool((leaf.grad == 0).all())
    rows = quality_focal_loss(logits(6, 5), sparse_target((6,), 5), reduction="sum")
    got = quality_focal_loss(logits(6, 5), sparse_target((6,), 5), avg_factor=factor)
    assert float(got) == pytest.approx(float(rows) / 2.0**-23, rel=1e-5)


def test_trap_12_avg_factor_of_every_kind(backend):
    """int, float, numpy scalar, 0-dim and [1] tensors: the shape is kept, there is no gradient
    through it.
    """
    np = pytest.importorskip("numpy", reason="numpy scalars need numpy")
    pred, target = logits(6, 5), sparse_target((6,), 5)
    expected = quality_focal_loss(pred, target, avg_factor=4.0)
    for factor in (
        4,
        np.float32(4),
        np.float64(4),
        np.int64(4),
        torch.tensor(4),
        torch.tensor(4.0),
    ):
        got = quality_focal_loss(pred, target, avg_factor=factor)
        assert got.shape == () and got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    factor = torch.tensor([4.0], requires_grad=True)
    leaf = pred.clone().requires_grad_()
    got = quality_focal_loss(leaf, target, avg_factor=torch.max(factor, torch.ones(1)))
    assert got.shape == (1,)
    torch.testing.assert_close(got, expected[None], rtol=1e-6, atol=0)
    assert torch.autograd.grad(got, [leaf, factor], allow_unused=True)[1] is None


def test_trap_13_reductions(backend):
    """mean divides by rows (after the class sum) or by avg_factor + eps; sum refuses avg_factor;
    none ignores it.
    """
    pred, target, weight = logits(6, 5), sparse_target((6,), 5), row_weight((6,))
    rows = quality_focal_loss(pred, target, weight=weight, reduction="none")
    assert rows.shape == (6,)
    close = {"rtol": 2e-6, "atol": 0}
    torch.testing.assert_close(
        quality_focal_loss(pred, target, weight=weight), rows.sum() / 6, **close
    )
    torch.testing.assert_close(
        quality_focal_loss(pred, target, weight=weight, reduction="sum"), rows.sum(), **close
    )
    got = quality_focal_loss(pred, target, weight=weight, avg_factor=2.5)
    torch.testing.assert_close(got, rows.sum() / (2.5 + 2.0**-23), **close)
    assert torch.equal(
        quality_focal_loss(pred, target, weight=weight, avg_factor=2.5, reduction="none"), rows
    )
    with pytest.raises(ValueError, match='avg_factor can not be used with reduction="sum"'):
        quality_focal_loss(pred, target, avg_factor=2.5, reduction="sum")
    module = gfl_kernels.QualityFocalLoss(reduction="mean")
    assert module(pred, target, weight, reduction_override="none").shape == (6,)


def test_trap_14_weights_of_every_kind(backend):
    """None, rows, [N, 1], elements, stride-0 views, another dtype; a wrong shape or device is
    refused, not broadcast.
    """
    pred, target = logits(8, 5), sparse_target((8,), 5)
    base = row_weight((8,))
    for weight in (
        None,
        base,
        base[:, None].expand(8, 5),
        base.double(),
        base.half(),
        base[:2].repeat(4),
    ):
        check_op("quality", pred, target, weight=weight, what="weight")
    sides = logits(8, 4, 9)
    expanded = base[:, None].expand(-1, 4)
    check_op("distribution", sides, bin_target((8, 4), 9), weight=expanded, what="expand(-1, 4)")
    flat = expanded.reshape(-1)
    check_op(
        "distribution",
        sides.reshape(-1, 9),
        bin_target((32,), 9),
        weight=flat,
        avg_factor=4.0,
        what="reshape",
    )
    column, rows = (
        quality_focal_loss(pred, target, weight=weight, reduction="none")
        for weight in (base[:, None], base)
    )
    assert torch.equal(column, rows)
    for bad in (base[None], base.to("meta"), torch.rand(5), torch.rand(8, 2)):
        with pytest.raises(ValueError, match="weight"):
            quality_focal_loss(pred, target, weight=bad)


@pytest.mark.parametrize("classes", [1, 3, 20, 80, 365, 1203, 13204])
def test_trap_15_class_counts(backend, classes):
    """Any C, also not a multiple of a vector; split heads give slices whose rows are misaligned."""
    for start in (0, 1, 4):
        wide = logits(9, classes + start + 2)
        pred = wide[:, start : start + classes]
        check_op(
            "quality", pred, sparse_target((9,), classes), reduction="none", what=f"C={classes}"
        )
        check_op("quality", pred, dense_target((9,), classes), what=f"C={classes}")


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "middle", "nchw_permuted"])
def test_trap_16_gradient_in_the_layout_of_the_input(backend, layout):
    """[B, C, H, W], channels_last and permuted views are read in place and their gradient comes
    back the same way.
    """
    laid = lay_out(layout, logits(2, 4, 6, 5))
    target = sparse_target(laid.row_shape, 5)
    for reduction in ("none", "mean"):
        value = quality_focal_loss(laid.pred, target, class_dim=laid.dim, reduction=reduction)
        _, grad = evaluate(
            quality_focal_loss,
            laid.pred,
            random_upstream(value),
            (target,),
            {"class_dim": laid.dim, "reduction": reduction},
        )
        assert grad.stride() == laid.pred.stride()


def test_trap_17_strides_beyond_32_bits(backend):
    """row * stride passes 2^31 (C = 13204 at a batch of 20): rows 2^30 elements apart, in 6 GiB
    that are never touched.
    """
    # Bytes of float16; on the CPU reserved by the allocator, not written.
    storage = torch.UntypedStorage(3 * 2**31 + 64, device=backend.device)
    rows, classes, step = 4, 5, 2**30 - 7
    pred = torch.empty(0, dtype=torch.float16).set_(storage, 0, (rows, classes), (step - 3, 1))
    pred.copy_(logits(rows, classes, dtype=torch.float16))
    assert pred.stride(0) * (rows - 1) > 2**31
    compact = pred.contiguous()
    target = sparse_target((rows,), classes)
    position = bin_target((rows,), classes)
    with torch.no_grad():
        got = quality_focal_loss(pred, target, reduction="none")
        assert torch.equal(got, quality_focal_loss(compact, target, reduction="none"))
        got = distribution_focal_loss(pred, position, reduction="none")
        assert torch.equal(got, distribution_focal_loss(compact, position, reduction="none"))
        assert torch.equal(integral(pred), integral(compact))


@pytest.mark.parametrize("dtype", HALF)
def test_trap_18_half_logits(backend, dtype):
    """Computed in float32, loss in float32, gradient rounded once; a scale of 65536 does not
    overflow on the way.
    """
    pred, target = logits(2048, 17, dtype=dtype, extremes=False), sparse_target((2048,), 17)
    upstream = torch.tensor(65536.0)
    scaled = {"upstream": upstream, "grad_scale": 65536 / 2048, "what": "scaled"}  # mean of 2048
    value, grad = check_op("quality", pred, target, **scaled)
    assert value.dtype == torch.float32 and grad.dtype == dtype and bool(grad.isfinite().all())
    value, grad = check_op("distribution", pred, bin_target((2048,), 17), **scaled)
    assert value.dtype == torch.float32 and bool(grad.isfinite().all())
    assert integral(pred).dtype == torch.float32


def test_trap_19_float64_and_expanded_upstream(backend):
    """float64 runs in float64; .sum() sends a stride-0 upstream gradient; None upstream gradients
    are no gradient.
    """
    pred = logits(9, 5, dtype=torch.float64)
    target = sparse_target((9,), 5, score_dtype=torch.float64)
    value, _ = check_op(
        "quality", pred, target, reduction="none", upstream=torch.tensor(0.3).double().expand(9)
    )
    assert value.dtype == torch.float64
    leaf = pred.clone().requires_grad_()
    quality_focal_loss(leaf, target, reduction="none").sum().backward()
    expected = leaf.grad.clone()
    leaf.grad = None
    quality_focal_loss(leaf, target, reduction="sum").backward()
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-12, atol=0)
    used, unused = (function(leaf) for function in (integral, integral))
    (grad,) = torch.autograd.grad(used.sum() + 0.0 * unused.detach().sum(), leaf)
    assert bool(grad.isfinite().all())


def test_trap_20_saved_gradient_and_second_backward(backend):
    """A gradient that leaves the graph belongs to its owner: changing it does not change the second
    backward.
    """
    leaf = logits(40, 5).requires_grad_()
    loss = quality_focal_loss(leaf, sparse_target((40,), 5), avg_factor=4.0)
    loss.backward(retain_graph=True)
    first = leaf.grad.clone()
    leaf.grad.mul_(float("inf"))
    leaf.grad = None
    loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, first)
    leaf.grad = None
    loss.backward(torch.tensor(0.0))
    assert bool((leaf.grad == 0).all())
    with torch.no_grad():
        assert not quality_focal_loss(leaf, sparse_target((40,), 5)).requires_grad


def test_trap_21_double_backward(backend):
    """Right on the reference, refused by name elsewhere: never a gradient that is silently a
    constant.
    """
    for function in (
        lambda x: quality_focal_loss(x, (torch.tensor([0, 3]), torch.tensor([0.3, 0.9]).double())),
        lambda x: distribution_focal_loss(x, torch.tensor([0.3, 1.9])),
        lambda x: integral(x).square().sum(),
    ):
        leaf = logits(2, 4, dtype=torch.float64, extremes=False).requires_grad_()
        if backend.fused:
            with pytest.raises(RuntimeError, match=r"use_backend\('reference'\)"):
                (grad,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
                grad.sum().backward()
        else:
            assert torch.autograd.gradgradcheck(function, (leaf,))


def test_trap_22_determinism(backend):
    """The same bits on every run, also under use_deterministic_algorithms."""
    leaf = logits(9000, 17).requires_grad_()
    target, position = sparse_target((9000,), 17), bin_target((9000,), 17)
    results = []
    for deterministic in (False, False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            loss = quality_focal_loss(leaf, target) + distribution_focal_loss(
                leaf, position, reduction="sum"
            )
            results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        finally:
            torch.use_deterministic_algorithms(False)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_trap_23_large_sums(backend):
    """A float32 sum over millions of elements keeps its digits; a float16 loss does not end at
    65504.
    """
    pred = torch.full((30000, 80), 1.5)
    target = (torch.full((30000,), 80), torch.zeros(30000))
    s = 1 / (1 + math.exp(-1.5))
    truth = 2.4e6 * s * s * math.log1p(math.exp(1.5))
    assert float(quality_focal_loss(pred, target, reduction="sum")) == pytest.approx(
        truth, rel=1e-6
    )
    assert float(quality_focal_loss(pred.half(), target, reduction="sum")) == pytest.approx(
        truth, rel=1e-6
    )


@pytest.mark.parametrize("dtype", HALF)
def test_trap_24_expectation_in_float32(backend, dtype):
    """bfloat16 arithmetic moves a box by 0.1 bin; bins of D-FINE's size, not in order, some
    negative.
    """
    z = logits(500, 17, dtype=dtype, extremes=False)
    truth = reference.integral(z.double())
    assert float((integral(z) - truth).abs().max()) < 1e-5
    y = torch.tensor(
        [-8.0, -4.0, 7.5, -2.0, 0.0, 3.0, 1.0, 0.5, 30.0, -30.0, 2.0, 2.0, 5.0, 4.0, 6.0, 9.0, -1.0]
    )
    check_op("integral", z, bins=y, scale=30, what="unordered bins")


def test_trap_26_probability_form(backend):
    """Logs clamped at -100 (loss 100), gradient 1e12 at p = 1, q = 0; autocast bans
    F.binary_cross_entropy, not this.
    """
    target = torch.tensor([[0.0]])
    value, slope = scalar(quality_focal_loss, 1.0, target, activated=True, dtype=torch.float32)
    assert value == 100.0 and slope == pytest.approx(1e12, rel=1e-3)
    value, slope = scalar(
        quality_focal_loss, 0.0, torch.tensor([[1.0]]), activated=True, dtype=torch.float32
    )
    assert value == 100.0 and slope == pytest.approx(-1e12, rel=1e-3)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        p = torch.rand(8, 5)
        value = quality_focal_loss(p, sparse_target((8,), 5), activated=True)
    assert_no_worse(
        value, quality_focal_loss(p, sparse_target((8,), 5), activated=True), value, what="autocast"
    )


def test_trap_27_compile_without_data_dependent_shapes(backend):
    """Labels, all background or all positive, are data: one graph without breaks serves them."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        lambda x, label, score: quality_focal_loss(x, (label, score)), fullgraph=True, backend=count
    )
    pred, score = logits(12, 5), torch.rand(12)
    for label in (torch.full((12,), 5), torch.zeros(12, dtype=torch.int64), torch.arange(12) % 6):
        expected = quality_focal_loss(pred, (label, score))
        torch.testing.assert_close(compiled(pred, label, score), expected, rtol=2e-6, atol=1e-6)
    assert len(graphs) == 1


def test_trap_28_tensors_on_different_devices(backend):
    """A label on another device than the logits: a message that names both, not a crash."""
    pred = logits(4, 5)
    label, score = sparse_target((4,), 5)
    with pytest.raises(
        ValueError, match=rf"label must be on pred's device {pred.device}, got meta"
    ):
        quality_focal_loss(pred, (label.to("meta"), score))
    with pytest.raises(
        ValueError, match=rf"weight must be on pred's device {pred.device}, got meta"
    ):
        distribution_focal_loss(pred, torch.zeros(4), weight=torch.zeros(4, device="meta"))


def test_trap_30_rows_of_weight_zero_are_not_read(backend):
    """DFL over all anchors touches positives only: NaN logits and targets behind weight 0 change
    nothing.
    """
    z = logits(1000, 17)
    weight = torch.zeros(1000)
    weight[::50] = torch.rand(20) + 0.5
    target = bin_target((1000,), 17)
    clean, clean_grad = check_op("distribution", z, target, weight=weight, avg_factor=20.0)
    dead = weight == 0
    z[dead], target[dead] = NAN, NAN
    got, grad = evaluate(
        distribution_focal_loss,
        z,
        random_upstream(clean),
        (target,),
        {"weight": weight, "avg_factor": 20.0},
    )
    assert torch.equal(got, clean) and torch.equal(grad, clean_grad)
    assert bool((grad[dead] == 0).all())


def test_every_applicable_trap_has_its_test():
    """1 to 30, less those the module's docstring explains."""
    named = {int(name.split("_")[2]) for name in globals() if name.startswith("test_trap_")}
    explained = {
        int(line[:2])
        for line in __doc__.splitlines()
        if line[:2].strip().isdigit() and line[2:3] == "."
    }
    assert named | explained == set(range(1, 31))


def test_trap_22_across_processes(fused):
    """Another process and another thread count: the same bits."""
    code = f"""
import os, torch, gfl_kernels
torch.set_default_device({fused.device!r})
gfl_kernels.use_backend({fused.name!r})
torch.set_num_threads(int(os.environ["THREADS"]))
generator = torch.Generator({fused.device!r}).manual_seed(1)
x = torch.randn(9000, 17, generator=generator, requires_grad=True)
label = torch.randint(0, 18, (9000,), generator=generator)
score = torch.rand(9000, generator=generator)
loss = gfl_kernels.quality_focal_loss(x, (label, score))
loss.backward()
print(loss.item().hex(), x.grad.double().sum().item().hex() if os.environ["THREADS"] == "1" else "")
"""
    one, again, two = (run_python(code, THREADS=n).stdout.split() for n in ("1", "1", "2"))
    assert one and one == again
    assert one[0] == two[0]
