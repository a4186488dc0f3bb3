"""Localization distillation, ranges of bins and weights of bins of any spacing: against the
formulas written out, mmdetection's code, and every backend against the float64 reference.
"""

import math

import pytest
import torch
from support import (
    FLOATS,
    INF,
    INTERPRETED,
    LAYOUTS,
    NAN,
    assert_no_worse,
    check_op,
    combinations,
    evaluate,
    gradcheck,
    lay_out,
    logits,
    random_upstream,
    row_weight,
)

from gfl_kernels import (
    bin_weights,
    distribution_focal_loss,
    integral,
    localization_distillation_loss,
    use_backend,
)

REDUCTIONS = ("none", "mean", "sum")
# A row's loss is T^2 (sum of K terms), each of them good to an ulp of the largest.
SCALE = {"scale": 400.0, "grad_scale": 20.0}


def pair(*shape, dtype=torch.float32, device="cpu"):
    """Logits of a student and a teacher."""
    return (logits(*shape, dtype=dtype, device=device, seed=seed) for seed in (0, 7))


# ---- the formula


def written_out(student, teacher, temperature):
    """KL of each row in Python's floats."""
    rows = []
    for z, t in zip(student.tolist(), teacher.tolist(), strict=True):

        def log_softmax(x):
            x = [v / temperature for v in x]
            total = math.fsum(math.exp(v - max(x)) for v in x)
            return [v - max(x) - math.log(total) for v in x]

        parts = zip(log_softmax(t), log_softmax(z), strict=True)
        rows.append(math.fsum(math.exp(q) * (q - p) for q, p in parts if math.exp(q) > 0))
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 5, 10.0, 20.0])
def test_formula(backend, temperature):
    student, teacher = pair(23, 17, dtype=torch.float64, device=backend.device)
    divergence = written_out(student, teacher, temperature)
    options = {"temperature": temperature, "reduction": "none"}
    for bin_reduction, bins in (("sum", 1), ("mean", 17)):
        got = localization_distillation_loss(
            student, teacher, bin_reduction=bin_reduction, **options
        )
        expected = divergence * temperature**2 / bins
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-9)
    same = localization_distillation_loss(student, student, **options)
    torch.testing.assert_close(same, torch.zeros_like(same), rtol=0, atol=1e-10)


@pytest.mark.parametrize("weighted", [False, True])
def test_mmdet(mmdet, weighted):  # noqa: F811
    student, teacher = pair(40, 17, dtype=torch.float64)
    weight = row_weight((40,)).double() if weighted else None
    theirs = mmdet.KnowledgeDistillationKLDivLoss(loss_weight=0.25, T=10)
    leaf, other = student.clone().requires_grad_(), student.clone().requires_grad_()
    expected = theirs(leaf, teacher, weight, avg_factor=4.0)
    got = 0.25 * localization_distillation_loss(other, teacher, weight=weight, avg_factor=4.0)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    expected.backward()
    got.backward()
    torch.testing.assert_close(other.grad, leaf.grad, rtol=1e-8, atol=1e-10)


def test_yolov6(backend):
    """sum(1).mean() of kl_div of log(softmax), T = 20, times T^2."""
    student, teacher = (
        logits(40, 17, dtype=torch.float64, device=backend.device, extremes=False, seed=s)
        for s in (0, 7)
    )
    p, q = (x.div(20).softmax(1) for x in (student, teacher))
    expected = torch.nn.functional.kl_div(p.log(), q, reduction="none").sum(1).mean() * 20**2
    got = localization_distillation_loss(student, teacher, temperature=20, bin_reduction="sum")
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_dfine(backend):
    """DDF: means over matched and other rows, weighed by the roots of their numbers."""
    student, teacher = pair(60, 33, dtype=torch.float64, device=backend.device)
    matched = torch.arange(60, device=backend.device) % 5 == 0
    weight = torch.rand(60, dtype=torch.float64, device=backend.device)
    batch, t = 2, 5.0
    rows = torch.nn.functional.kl_div(
        (student / t).log_softmax(-1), (teacher / t).softmax(-1), reduction="none"
    ).sum(-1) * weight * t**2  # fmt: skip
    roots = [(mask.sum() * 8 / batch) ** 0.5 for mask in (matched, ~matched)]
    means = [rows[mask].mean() for mask in (matched, ~matched)]
    expected = sum(m * r for m, r in zip(means, roots, strict=True)) / sum(roots)
    root = torch.where(matched, matched.sum(), (~matched).sum()).double().sqrt()
    by_row = weight / (root * (matched.sum().sqrt() + (~matched).sum().sqrt()))
    got = localization_distillation_loss(
        student, teacher, temperature=t, bin_reduction="sum", weight=by_row, reduction="sum"
    )
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)  # roots are float32 above


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(backend, reduction):
    for bins in (5,) if INTERPRETED else (2, 5, 17):
        student, teacher = torch.randn(2, 5, bins, dtype=torch.float64, device=backend.device)
        weight = row_weight((5,), device=backend.device).double()
        shape = (5,) if reduction == "none" else ()
        upstream = random_upstream(torch.empty(shape, dtype=torch.float64)).to(backend.device)
        for kwargs in ({}, {"weight": weight, "temperature": 2.0, "bin_reduction": "sum"}):

            def loss(student, teacher=teacher, kwargs=kwargs, upstream=upstream):
                return upstream * localization_distillation_loss(
                    student, teacher, reduction=reduction, **kwargs
                )

            assert gradcheck(loss, (student.requires_grad_(),), eps=1e-6, atol=1e-7, rtol=1e-5)


# ---- no worse than eager


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("bins", [2, 17, 100] if INTERPRETED else [1, 2, 8, 17, 33, 100])
def test_no_worse_than_eager(fused, dtype, bins):
    heights = (1, 333) if INTERPRETED else (1, 7, 8, 16, 17, 333, 1000)
    options = (
        {"reduction": "none", "temperature": 5.0},
        {"bin_reduction": "sum", "temperature": 20.0},
        {"avg_factor": 5.5},
    )
    for rows, kwargs in combinations(heights, options):
        student, teacher = pair(rows, bins, dtype=dtype, device=fused.device)
        if "avg_factor" in kwargs:
            kwargs = kwargs | {"weight": row_weight((rows,), device=fused.device)}
        what = f"K={bins} N={rows} {kwargs}"
        check_op("distillation", student, teacher, what=what, **SCALE, **kwargs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout):
    for bins, dtype in ((17, torch.float32),) if INTERPRETED else combinations(
        (5, 17, 32), (torch.float32, torch.bfloat16)
    ):  # fmt: skip
        laid, taught = (
            lay_out(layout, x) for x in pair(2, 5, 7, bins, dtype=dtype, device=backend.device)
        )
        weight = row_weight(laid.row_shape, device=backend.device)
        options = {"bin_dim": laid.dim, "what": f"{layout} K={bins}", **SCALE}
        check_op("distillation", laid.pred, taught.pred, reduction="none", **options)
        other = lay_out("nchw" if laid.dim == 1 and laid.pred.dim() == 4 else layout, taught.pred
                        .movedim(laid.dim, -1).reshape(2, 5, 7, bins)).pred  # fmt: skip
        check_op("distillation", laid.pred, other, weight=weight, avg_factor=3.0, **options)


def test_gradient_has_the_layout_of_the_input(backend):
    for layout in ("nchw", "channels_last", "transposed", "middle"):
        laid, taught = (lay_out(layout, x) for x in pair(2, 3, 4, 5, device=backend.device))
        leaf = laid.pred.requires_grad_()
        localization_distillation_loss(leaf, taught.pred, bin_dim=laid.dim).backward()
        assert leaf.grad.stride() == leaf.stride() and leaf.grad.dtype == leaf.dtype


def test_large(backend):
    rows = 3000 if INTERPRETED else 44800
    student, teacher = pair(rows, 17, device=backend.device)
    weight = row_weight((rows,), device=backend.device)
    options = {"weight": weight, "avg_factor": torch.tensor(17.0), **SCALE}
    check_op("distillation", student, teacher, **options)


def test_a_teacher_of_another_dtype(backend):
    """The wider of the two serves both, and the gradient has pred's dtype."""
    student, teacher = pair(30, 17, device=backend.device)
    for a, b in ((student.bfloat16(), teacher), (student, teacher.half())):
        upstream = torch.ones(30, device=backend.device)
        got, grad = evaluate(
            localization_distillation_loss, a, upstream, (b,), {"reduction": "none"}
        )
        expected, expected_grad = evaluate(
            localization_distillation_loss, a.float(), upstream, (b.float(),), {"reduction": "none"}
        )
        assert torch.equal(got, expected) and grad.dtype == a.dtype
        assert torch.equal(grad, expected_grad.to(a.dtype))


# ---- edges


def test_nan_stays_in_its_row_and_rows_of_weight_0_out(backend):
    student, teacher = (
        logits(40, 17, device=backend.device, extremes=False, seed=s) for s in (0, 7)
    )
    upstream = random_upstream(torch.empty(40)).to(backend.device)
    kwargs = {"reduction": "none"}
    clean, clean_grad = evaluate(
        localization_distillation_loss, student, upstream, (teacher,), kwargs
    )
    wrong, misled = student.clone(), teacher.clone()
    wrong[3, 4], misled[17, 16] = NAN, NAN
    got, grad = evaluate(localization_distillation_loss, wrong, upstream, (misled,), kwargs)
    touched = torch.zeros(40, dtype=torch.bool, device=backend.device)
    touched[[3, 17]] = True
    assert got[touched].isnan().all() and grad[touched].isnan().all()
    assert torch.equal(got[~touched], clean[~touched])
    assert torch.equal(grad[~touched], clean_grad[~touched])
    kwargs = {"weight": (~touched).float()}
    total = torch.ones((), device=backend.device)
    got, grad = evaluate(localization_distillation_loss, wrong, total, (misled,), kwargs)
    torch.testing.assert_close(got, clean[~touched].sum() / 40, rtol=1e-6, atol=0)
    assert torch.equal(grad[touched], torch.zeros_like(grad[touched]))


def test_infinite_logits(backend):
    """A bin that the teacher excludes has no part; one that the student excludes is infinitely
    far."""
    student, teacher = (torch.zeros(3, 4, device=backend.device) for _ in range(2))
    teacher[0, 1] = teacher[1, 1] = student[1, 1] = student[2, 1] = -INF
    got = localization_distillation_loss(
        student, teacher, temperature=1, bin_reduction="sum", reduction="none"
    )
    torch.testing.assert_close(got, torch.tensor([math.log(4 / 3), 0.0, INF]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty(backend, reduction):
    pred = torch.zeros(0, 17, device=backend.device, requires_grad=True)
    loss = localization_distillation_loss(pred, pred.detach(), reduction=reduction)
    loss.sum().backward()
    assert loss.sum() == 0 and pred.grad.shape == (0, 17)


def test_the_teacher_is_a_constant(backend):
    student, teacher = pair(6, 5, device=backend.device)
    teacher.requires_grad_()
    localization_distillation_loss(student.requires_grad_(), teacher).backward()
    assert teacher.grad is None and student.grad is not None


def test_double_backward_is_refused(fused):
    student, teacher = pair(6, 5, device=fused.device)
    student.requires_grad_()
    loss = localization_distillation_loss(student, teacher, reduction="none").square().sum()
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="distillation_backward is not differentiable"):
        grad.sum().backward()


def test_opcheck(native):
    op = torch.ops.gfl_kernels.distillation_forward.default
    student, teacher = torch.randn(2, 6, 5)
    weight, avg = torch.rand(6), torch.tensor(3.0)
    for args in ((None, None, 10.0, 1.0, 0, False), (weight, avg, 5.0, 0.5, 1, True)):
        torch.library.opcheck(op, (student.requires_grad_(), teacher, *args))


def test_compiles_in_one_graph(native):
    student, teacher = pair(12, 17)

    def call(student, teacher):
        return localization_distillation_loss(student, teacher, avg_factor=3.0)

    leaf, other = student.clone().requires_grad_(), student.clone().requires_grad_()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(leaf, teacher)
    expected = call(other, teacher)
    torch.testing.assert_close(compiled, expected)
    compiled.backward()
    expected.backward()
    torch.testing.assert_close(leaf.grad, other.grad)


# ---- bins of other ranges and spacings


@pytest.mark.parametrize("bins", [(-2, 16, 1), (0, 9, 0.5), (-1.5, 7.5, 0.5)])
def test_a_range_of_bins(backend, bins):
    """PP-YOLOE's negative lower bound: the floor of the target less the lower bound, weights by
    distance, both clamped into the range."""
    lower, upper, step = bins
    count = round((upper - lower) / step) + 1
    z = logits(40, count, dtype=torch.float64, device=backend.device)
    target = torch.linspace(lower - 1, upper + 1, 40, dtype=torch.float64, device=backend.device)
    clamped = target.clamp(lower, upper)
    left = ((clamped - lower) / step).floor().clamp(max=count - 2)
    right_weight = (clamped - (lower + left * step)) / step
    log_p = z.log_softmax(-1)
    rows = [log_p.gather(-1, i.long().unsqueeze(-1)).squeeze(-1) for i in (left, left + 1)]
    parts = [
        torch.where(w == 0, 0, w * r)
        for w, r in zip((1 - right_weight, right_weight), rows, strict=True)
    ]
    got = distribution_focal_loss(z, target, bins=bins, reduction="none")
    torch.testing.assert_close(got, -sum(parts), rtol=1e-9, atol=1e-7)
    values = torch.arange(count, device=backend.device) * step + lower
    expected = (z.softmax(-1) * values).sum(-1)
    torch.testing.assert_close(integral(z, bins=bins), expected, rtol=1e-9, atol=1e-9)


def test_half_targets_of_a_range_are_not_rounded_again(backend):
    z = logits(5, 301, device=backend.device, extremes=False)
    target = torch.tensor([-127.5, 0.5, 100.25, 149.0, -3.0625], device=backend.device)
    got = distribution_focal_loss(z, target.bfloat16(), bins=(-150, 150, 1), reduction="none")
    exact = target.bfloat16().float() + 150
    assert torch.equal(got, distribution_focal_loss(z, exact, reduction="none"))


def weighting_function(reg_max, up, scale):
    """D-FINE's W(n): symmetric, dense around 0."""
    bound = up * scale
    step = (bound + 1) ** (2 / (reg_max - 2))
    right = [step**i - 1 for i in range(1, reg_max // 2)]
    return torch.tensor([-2 * bound, *[-v for v in reversed(right)], 0.0, *right, 2 * bound])


def test_dfine_bins(backend):
    """translate_gt, row by row, then unimodal_distribution_focal_loss; and the integral over W."""
    y = weighting_function(32, 0.5, 4.0).double()
    target = torch.cat([torch.randn(40).double() * 3, y[[0, 7, 32]], torch.tensor([-99.0, 99.0])])
    left, wl, wr = bin_weights(target.to(backend.device), y.to(backend.device))
    z = logits(45, 33, dtype=torch.float64, device=backend.device)
    losses = distribution_focal_loss(z, (left, wl, wr), reduction="none")
    log_p = z.log_softmax(-1)
    for i, t in enumerate(target.tolist()):
        index = int((y <= t).sum()) - 1
        if index < 0:
            expected = (0, 1.0, 0.0)
        elif index >= 32:
            expected = (31, 0.0, 1.0)  # int(31.9)
        else:
            a, b = abs(t - y[index].item()), abs(y[index + 1].item() - t)
            expected = (index, 1 - a / (a + b), a / (a + b))
        assert int(left[i]) == expected[0]
        torch.testing.assert_close(
            torch.stack([wl[i], wr[i]]), torch.tensor(expected[1:], dtype=torch.float64)
        )
        loss = -sum(
            w * log_p[i, expected[0] + side] for side, w in enumerate(expected[1:]) if w != 0
        )
        torch.testing.assert_close(losses[i], loss, rtol=1e-9, atol=1e-9)
    values = (z.softmax(-1) * y.to(z.device)).sum(-1)
    torch.testing.assert_close(integral(z, bins=y.to(z.device)), values, rtol=1e-9, atol=1e-9)


def test_bin_weights_of_nan_and_dtypes():
    y = torch.tensor([0, 1, 4])
    left, wl, wr = bin_weights(torch.tensor([NAN, 2.5], dtype=torch.bfloat16), y)
    assert left.dtype == torch.int64 and wl.dtype == wr.dtype == torch.float32
    assert wl[0].isnan() and wr[0].isnan() and wl[1] == wr[1] == 0.5
    assert bin_weights(torch.zeros(2, 3).double(), y)[1].dtype == torch.float64
    assert bin_weights(torch.zeros(0), y)[0].shape == (0,)


def test_wrong_input():
    z = torch.zeros(3, 5)
    cases = [
        (TypeError, "teacher must be a Tensor, got float", (0.0,), {}),
        (TypeError, "teacher must have a floating dtype", (torch.zeros(3, 5).int(),), {}),
        (ValueError, "teacher must have pred's shape", (torch.zeros(3, 6),), {}),
        (ValueError, "temperature must be > 0, got 0", (z,), {"temperature": 0}),
        (TypeError, "temperature must be a number", (z,), {"temperature": "1"}),
        (ValueError, "bin_reduction must be mean or sum", (z,), {"bin_reduction": "none"}),
        (ValueError, r"weight must have a value per row", (z,), {"weight": torch.zeros(5)}),
        (ValueError, "reduction must be one of", (z,), {"reduction": "batchmean"}),
    ]
    for error, message, args, kwargs in cases:
        with pytest.raises(error, match=f"localization_distillation_loss: .*{message}"):
            localization_distillation_loss(z, *args, **kwargs)
    with pytest.raises(ValueError, match=r"bins must have shape \(K,\), K >= 2"):
        bin_weights(torch.zeros(2), torch.zeros(1))
    with pytest.raises(TypeError, match="target must be a Tensor"):
        bin_weights(1.0, torch.zeros(3))
    t = torch.zeros(3)
    with pytest.raises(ValueError, match="do not match pred's 5"):
        distribution_focal_loss(z, t, bins=(0, 5, 1))
    with pytest.raises(ValueError, match="bins must be None with a target"):
        distribution_focal_loss(z, (t, t, t), bins=(0, 4, 1))


def test_the_same_numbers_on_every_backend(fused):
    student, teacher = pair(50, 17, device=fused.device)
    got = localization_distillation_loss(student, teacher)
    with use_backend("reference"):
        eager = localization_distillation_loss(student, teacher)
        truth = localization_distillation_loss(student.double(), teacher.double())
    assert_no_worse(got, truth, eager, what="mean", scale=100.0)
