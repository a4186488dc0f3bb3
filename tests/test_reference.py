"""The oracle, judged by slow scalar loops over mpmath that share nothing with it but the papers'
formulas.

Quality Focal Loss: L = |y - s|^beta * -((1 - y) log(1 - s) + y log s), s = sigmoid(x).
Distribution Focal Loss: L = -((r - t) log p_l + (t - l) log p_r), p = softmax(z), l = floor(t),
r = l + 1. Both: Li et al. 2020, "Generalized Focal Loss".
"""

import math

import mpmath
import pytest
import torch
from support import INF, explicit_target, logits, row_weight

from gfl_kernels import reference

mpmath.mp.dps = 60  # sigmoid(-110) is 1e-48: 1 - s must keep a dozen digits of it

BETAS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
SCORES = (0.0, 1.0, 0.5, 0.3, 0.875, 1e-3, 1.05, -0.02)  # an IoU may leave [0, 1] by rounding
POINTS = (0.0, 1e-3, -1e-3, 0.7, -0.7, 3.0, -3.0, 17.0, -17.0, 33.0, -33.0, 90.0, -90.0, 1e4, -1e4)
RTOL, ATOL = 2e-11, 1e-15  # float64 against mpmath


def assert_close(got, truth, what, rtol=RTOL, atol=ATOL):
    truth = torch.tensor([float(value) for value in truth], dtype=torch.float64)
    got = got.detach().double().flatten()
    bad = ~((got - truth).abs() <= atol + rtol * truth.abs())
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise AssertionError(f"{what}: at {at} got {float(got[at])!r}, truth {float(truth[at])!r}")


def mp_softplus(x):
    # log(1 + exp(x)) without losing exp(x) below the working precision
    return mpmath.log1p(mpmath.exp(x)) if x <= 0 else x + mpmath.log1p(mpmath.exp(-x))


def mp_quality(x, q, beta):
    """(L, dL/dx, dL/dq) of one logit. Terms with |s - q|^(beta - 1) are 0 where s = q, as the
    package defines them.
    """
    x, q, beta = mpmath.mpf(x), mpmath.mpf(q), mpmath.mpf(beta)
    s, rest = 1 / (1 + mpmath.exp(-x)), 1 / (1 + mpmath.exp(x))
    # s - q from the side that does not cancel when q is 0 or 1
    d = -rest if q == 1 else s - q
    cross_entropy = q * mp_softplus(-x) + (1 - q) * mp_softplus(x)
    weight = abs(d) ** beta if d != 0 or beta > 0 else mpmath.mpf(1)
    through = (
        beta * abs(d) ** (beta - 1) * mpmath.sign(d) * cross_entropy
        if d != 0 and beta != 0
        else mpmath.mpf(0)
    )
    return weight * cross_entropy, weight * d + through * s * rest, -weight * x - through


EPSILON = mpmath.mpf(
    9.999999960041972e-13
)  # F.binary_cross_entropy's 1e-12, which is a float32 in every dtype


def mp_quality_probability(p, q, beta):
    """(L, dL/dp) as F.binary_cross_entropy has it: logs clamped at -100, p (1 - p) in the gradient
    at EPSILON.
    """
    p, q, beta = mpmath.mpf(p), mpmath.mpf(q), mpmath.mpf(beta)
    log_p = max(mpmath.log(p), mpmath.mpf(-100)) if p > 0 else mpmath.mpf(-100)
    log_rest = max(mpmath.log(1 - p), mpmath.mpf(-100)) if p < 1 else mpmath.mpf(-100)
    cross_entropy = -(q * log_p + (1 - q) * log_rest)
    d = p - q
    weight = abs(d) ** beta if d != 0 or beta > 0 else mpmath.mpf(1)
    through = (
        beta * abs(d) ** (beta - 1) * mpmath.sign(d) * cross_entropy
        if d != 0 and beta != 0
        else mpmath.mpf(0)
    )
    return weight * cross_entropy, weight * d / max(p * (1 - p), EPSILON) + through


def mp_varifocal(x, q, positive, alpha, gamma, detach):
    """(L, dL/dx) of one logit, L = w B: w = q on positives, alpha s^gamma on the others."""
    x, q, alpha, gamma = (mpmath.mpf(value) for value in (x, q, alpha, gamma))
    s, rest = 1 / (1 + mpmath.exp(-x)), 1 / (1 + mpmath.exp(x))
    cross_entropy = q * mp_softplus(-x) + (1 - q) * mp_softplus(x)
    weight = q if positive else alpha * s**gamma
    slope = 0 if positive or detach else gamma * weight * rest
    d = -rest if q == 1 else s - q
    return weight * cross_entropy, weight * d + slope * cross_entropy


def mp_focal(x, y, alpha, gamma):
    """(L, dL/dx) of one logit, L = alpha_t m^gamma B, m = y (1 - s) + (1 - y) s."""
    x, y, alpha, gamma = (mpmath.mpf(value) for value in (x, y, alpha, gamma))
    s, rest = 1 / (1 + mpmath.exp(-x)), 1 / (1 + mpmath.exp(x))
    cross_entropy = y * mp_softplus(-x) + (1 - y) * mp_softplus(x)
    m = y * rest + (1 - y) * s
    factor = alpha * y + (1 - alpha) * (1 - y) if alpha >= 0 else 1
    d = y * -rest + (1 - y) * s
    slope = gamma * m ** (gamma - 1) * (1 - 2 * y) * s * rest
    return factor * m**gamma * cross_entropy, factor * (m**gamma * d + slope * cross_entropy)


def mp_log_softmax(z):
    top = max(z)
    shift = top + mpmath.log(mpmath.fsum(mpmath.exp(value - top) for value in z))
    return [value - shift for value in z]


def mp_distribution(z, left, weight_left, weight_right):
    """(L, [dL/dz_k]) of one row; the right bin of the last bin is the last bin."""
    z = [mpmath.mpf(value) for value in z]
    right = min(left + 1, len(z) - 1)
    weight_left, weight_right = mpmath.mpf(weight_left), mpmath.mpf(weight_right)
    log_p = mp_log_softmax(z)
    grad = [(weight_left + weight_right) * mpmath.exp(value) for value in log_p]
    grad[left] -= weight_left
    grad[right] -= weight_right
    loss = mpmath.mpf(0)
    if weight_left != 0:
        loss -= weight_left * log_p[left]
    if weight_right != 0:
        loss -= weight_right * log_p[right]
    return loss, grad


def mp_bins(target, bins):
    """(left, weight_left, weight_right) of a float target, clamped to [0, K - 1]."""
    target = min(max(mpmath.mpf(target), mpmath.mpf(0)), mpmath.mpf(bins - 1))
    left = int(mpmath.floor(target))
    return left, left + 1 - target, target - left


def mp_integral(z, bins):
    p = [mpmath.exp(value) for value in mp_log_softmax([mpmath.mpf(value) for value in z])]
    bins = [mpmath.mpf(value) for value in bins]
    mean = mpmath.fsum(y * value for y, value in zip(bins, p, strict=True))
    return mean, [value * (y - mean) for y, value in zip(bins, p, strict=True)], p


def grid():
    pairs = [(x, q) for x in POINTS for q in SCORES]
    x = torch.tensor([pair[0] for pair in pairs], dtype=torch.float64)
    q = torch.tensor([pair[1] for pair in pairs], dtype=torch.float64)
    return x, q, [(float(a), float(b)) for a, b in zip(x, q, strict=True)]


def test_the_judge_agrees_with_its_own_numerical_derivative():
    """The closed derivatives above against mpmath.diff of the loss, away from the kink."""
    for x, q, beta in [
        (0.7, 0.3, 1.5),
        (-3.0, 0.0, 0.5),
        (2.0, 1.0, 3.0),
        (-0.4, 0.875, 2.0),
        (1.3, 0.2, 0.0),
    ]:
        loss, slope, slope_q = mp_quality(x, q, beta)
        assert mpmath.almosteq(
            slope, mpmath.diff(lambda v, q=q, b=beta: mp_quality(v, q, b)[0], x), 1e-20
        )
        if 0 < q < 1:
            assert mpmath.almosteq(
                slope_q, mpmath.diff(lambda v, x=x, b=beta: mp_quality(x, v, b)[0], q), 1e-20
            )
        assert loss > 0
    for p, q, beta in [(0.7, 0.3, 1.5), (0.1, 0.0, 0.5), (0.6, 1.0, 3.0)]:
        slope = mp_quality_probability(p, q, beta)[1]
        assert mpmath.almosteq(
            slope, mpmath.diff(lambda v, q=q, b=beta: mp_quality_probability(v, q, b)[0], p), 1e-20
        )
    z = [0.3, -1.2, 2.0, 0.1]
    _, grad = mp_distribution(z, 1, 0.4, 0.7)
    _, slopes, _ = mp_integral(z, [0, -2, 5, 1])
    for k in range(4):

        def bump(v, k=k):
            return z[:k] + [v] + z[k + 1 :]

        assert mpmath.almosteq(
            grad[k], mpmath.diff(lambda v: mp_distribution(bump(v), 1, 0.4, 0.7)[0], z[k]), 1e-20
        )
        assert mpmath.almosteq(
            slopes[k], mpmath.diff(lambda v: mp_integral(bump(v), [0, -2, 5, 1])[0], z[k]), 1e-20
        )


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_quality(beta, form):
    x, q, pairs = grid()
    x.requires_grad_()
    q.requires_grad_()
    # One class: column 0 is the positive of a sparse target and the only column of a dense one.
    target = (torch.zeros(len(pairs), dtype=torch.int64), q) if form == "sparse" else q[:, None]
    loss = reference.quality_focal_loss(x[:, None], target, beta=beta, reduction="none")
    truth = [mp_quality(a, b, beta) for a, b in pairs]
    assert_close(loss, [t[0] for t in truth], f"loss, beta {beta}")
    slope, slope_q = torch.autograd.grad(loss.sum(), (x, q))
    assert_close(slope, [t[1] for t in truth], f"dL/dx, beta {beta}")
    if beta != 0.5:  # at x = 1e4, q = 1, |d|^(beta - 1) is (e^-10000)^-0.5: no float64 holds dL/dq
        assert_close(slope_q, [t[2] for t in truth], f"dL/dq, beta {beta}")


@pytest.mark.parametrize("beta", BETAS)
def test_quality_negatives(beta):
    """Every class of a background row, and every class but the label's of a positive, is trained to
    0.
    """
    x = torch.tensor(POINTS + (-120.0, -700.0, 700.0), dtype=torch.float64, requires_grad=True)
    truth = [mp_quality(float(value), 0.0, beta) for value in x.tolist()]
    label = torch.tensor([len(x), -1])
    rows = reference.quality_focal_loss(
        x.expand(2, -1), (label, torch.tensor([0.7, 0.9])), beta=beta, reduction="none"
    )
    total = float(mpmath.fsum(t[0] for t in truth))
    torch.testing.assert_close(
        rows, torch.full((2,), total, dtype=torch.float64), rtol=1e-12, atol=0
    )
    (grad,) = torch.autograd.grad(rows[0], x)
    assert_close(grad, [t[1] for t in truth], f"dL/dx, beta {beta}")
    positive = reference.quality_focal_loss(
        x[None], (torch.tensor([3]), torch.tensor([0.25])), beta=beta, reduction="none"
    )
    expected = total - float(truth[3][0]) + float(mp_quality(POINTS[3], 0.25, beta)[0])
    torch.testing.assert_close(
        positive, torch.tensor([expected], dtype=torch.float64), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("beta", BETAS)
def test_quality_where_prediction_meets_target(beta):
    """d = 0 exactly: the loss is B for beta = 0 and 0 otherwise, the gradient 0 (B s (1 - s) sgn(0)
    is defined as 0).
    """
    x = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    q = torch.full((1,), 0.5, dtype=torch.float64, requires_grad=True)
    loss = reference.quality_focal_loss(
        x, (torch.zeros(1, dtype=torch.int64), q), beta=beta, reduction="none"
    )
    assert float(loss.detach()) == pytest.approx(math.log(2) if beta == 0 else 0.0, abs=1e-15)
    for grad in torch.autograd.grad(loss.sum(), (x, q)):
        assert float(grad) == 0.0


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_quality_is_never_nan(beta, dtype):
    points = [
        v
        for v in POINTS + (-120.0, 120.0, 88.0, -88.0, 6e4, -6e4)
        if abs(v) <= torch.finfo(dtype).max
    ]
    scores = torch.tensor(SCORES)
    x = torch.tensor(points, dtype=dtype).repeat_interleave(len(scores))[:, None].requires_grad_()
    q = torch.cat([scores.repeat(len(points))])
    for target in [
        (torch.zeros(len(q), dtype=torch.int64), q),
        q[:, None],
        (torch.ones(len(q), dtype=torch.int64), q),
    ]:
        loss = reference.quality_focal_loss(x, target, beta=beta, reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), x)
        assert bool(loss.isfinite().all()) and bool(grad.isfinite().all())


@pytest.mark.parametrize("beta", BETAS)
def test_quality_where_prediction_nearly_meets_target(beta):
    """q is the rounded sigmoid(x): |d|^(beta - 1) may be huge for beta < 1, but nothing is NaN."""
    x = torch.linspace(-30, 30, 2001, dtype=torch.float64)[:, None].requires_grad_()
    for q in (x.detach().sigmoid(), x.detach().float().sigmoid().double()):
        loss = reference.quality_focal_loss(x, q, beta=beta, reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), x)
        assert bool(loss.isfinite().all()) and bool(grad.isfinite().all())


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_quality_of_probabilities(beta, form):
    tiny = [1e-7, 1e-12, 1e-30, 1e-44, 1e-300]
    probabilities = [0.0, 1.0, 0.5, 0.3, 0.99, 1e-3, *tiny, 1 - 1e-7, 1 - 2.0**-53]
    pairs = [(p, q) for p in probabilities for q in (0.0, 1.0, 0.5, 0.25, 1e-3) if p != q]
    p = torch.tensor([pair[0] for pair in pairs], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([pair[1] for pair in pairs], dtype=torch.float64)
    target = (torch.zeros(len(pairs), dtype=torch.int64), q) if form == "sparse" else q[:, None]
    loss = reference.quality_focal_loss(
        p[:, None], target, beta=beta, reduction="none", activated=True
    )
    (slope,) = torch.autograd.grad(loss.sum(), p)
    truth = [mp_quality_probability(float(a), float(b), beta) for a, b in pairs]
    assert_close(loss, [t[0] for t in truth], f"loss, beta {beta}")
    assert_close(slope, [t[1] for t in truth], f"dL/dp, beta {beta}")


@pytest.mark.parametrize("beta", BETAS)
def test_quality_of_probabilities_that_meet_their_target(beta):
    p = torch.tensor([0.0, 1.0, 0.5, 0.25], dtype=torch.float64, requires_grad=True)
    loss = reference.quality_focal_loss(
        p[:, None], p.detach()[:, None], beta=beta, reduction="none", activated=True
    )
    (slope,) = torch.autograd.grad(loss.sum(), p)
    assert bool(slope.isfinite().all()) and bool(loss.isfinite().all())
    if beta > 0:
        assert bool((loss == 0).all())
    assert bool((slope == 0).all())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.5, 2.0])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("one_hot", [False, True])
def test_varifocal(gamma, detach, one_hot):
    x, q, pairs = grid()
    # Every other element is its row's class, the quality of some of these being 0.
    positive = torch.arange(len(pairs)) % 2 == 0 if one_hot else q > 0
    x.requires_grad_()
    loss = reference.varifocal_loss(x, q, q, positive, 0.75, gamma, detach)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    truth = [
        mp_varifocal(a, b, p, 0.75, gamma, detach)
        for (a, b), p in zip(pairs, positive.tolist(), strict=True)
    ]
    assert_close(loss, [pair[0] for pair in truth], "loss")
    assert_close(grad, [pair[1] for pair in truth], "gradient")


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.5, 2.0])
@pytest.mark.parametrize("alpha", [0.25, -1])
def test_focal(gamma, alpha):
    x, y, pairs = grid()
    # Beyond [0, 1] m may be negative, which has no power.
    inside = [i for i, (_, b) in enumerate(pairs) if 0 <= b <= 1]
    x, y = x[inside].requires_grad_(), y[inside]
    loss = reference.focal_loss(x, y, alpha, gamma)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    truth = [mp_focal(*pairs[i], alpha, gamma) for i in inside]
    assert_close(loss, [pair[0] for pair in truth], "loss")
    assert_close(grad, [pair[1] for pair in truth], "gradient")


@pytest.mark.parametrize("exponent", [0.25, 1.0, 1.5])
def test_targets_of_positives(exponent):
    """q^gamma, and max(s^a q^(1 - a), 0.01), which is a constant."""
    x, q, pairs = grid()
    x.requires_grad_()
    truth = [mpmath.mpf(b) ** exponent if b > 0 else 0 for _, b in pairs]
    assert_close(reference.matchability_target(q, exponent), truth, "q^gamma")
    target = reference.iou_aware_target(x, q, min(exponent, 0.75))
    a = min(exponent, 0.75)
    truth = [
        max((1 / (1 + mpmath.exp(-v))) ** a * (mpmath.mpf(b) ** (1 - a) if b > 0 else 0), 0.01)
        for v, b in pairs
    ]
    assert_close(target, truth, "max(s^a q^(1 - a), 0.01)")
    assert not target.requires_grad


def scale_rows(bins):
    """Rows of logits: ordinary, spread over 1e4, constant, one bin far above the others."""
    rows = [logits(bins, dtype=torch.float64, seed=s, extremes=False).tolist() for s in range(3)]
    rows.append([1e4 * (-1) ** k for k in range(bins)])
    rows.append([7.0] * bins)
    rows.append([0.0] * (bins - 1) + [200.0])
    rows.append([-1e4] + [1e4] * (bins - 1))
    return rows


@pytest.mark.parametrize("bins", [2, 8, 17])
def test_distribution(bins):
    targets = [
        0.0,
        1.0,
        bins - 1.0,
        bins - 1 - 1e-9,
        0.25,
        bins - 1.3,
        bins - 1 + 0.5,
        1e4,
        -0.5,
        -1e4,
        (bins - 1) / 2,
    ]
    pairs = [(row, target) for row in scale_rows(bins) for target in targets]
    z = torch.tensor([pair[0] for pair in pairs], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([pair[1] for pair in pairs], dtype=torch.float64)
    loss = reference.distribution_focal_loss(z, t, reduction="none")
    truth = [
        mp_distribution(row, *mp_bins(float(target), bins))
        for (row, _), target in zip(pairs, t, strict=True)
    ]
    assert_close(loss, [item[0] for item in truth], "loss", atol=1e-12)
    (grad,) = torch.autograd.grad(loss.sum(), z)
    assert_close(grad, [value for item in truth for value in item[1]], "dL/dz")


@pytest.mark.parametrize("bins", [2, 8, 33])
def test_distribution_with_explicit_weights(bins):
    rows = scale_rows(bins)
    left, weight_left, weight_right = explicit_target((len(rows),), bins)
    # Also a row that is all left, one that is all right, one of weight zero, and one with
    # everything on the last bin.
    weight_left[0], weight_right[0] = 1.0, 0.0
    weight_left[1], weight_right[1] = 0.0, 1.0
    weight_left[2], weight_right[2] = 0.0, 0.0
    left[4], weight_left[4], weight_right[4] = bins - 1, 1.0, 0.0
    z = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
    loss = reference.distribution_focal_loss(
        z, (left, weight_left.double(), weight_right.double()), reduction="none"
    )
    truth = [
        mp_distribution(row, int(a), float(b), float(c))
        for row, a, b, c in zip(rows, left, weight_left, weight_right, strict=True)
    ]
    assert_close(loss, [item[0] for item in truth], "loss", atol=1e-12)
    (grad,) = torch.autograd.grad(loss.sum(), z)
    assert_close(grad, [value for item in truth for value in item[1]], "dL/dz")


def test_distribution_gradient_of_its_target():
    """dL/dt = log p_l - log p_r = z_l - z_r inside the range (FIELD: every head detaches t, the
    oracle need not).
    """
    z = logits(6, 9, dtype=torch.float64, extremes=False)
    t = torch.tensor([0.3, 1.5, 7.9, 4.25, 6.5, 2.75], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(reference.distribution_focal_loss(z, t, reduction="sum"), t)
    left = t.detach().floor().long()[:, None]
    torch.testing.assert_close(
        grad, (z.gather(1, left) - z.gather(1, left + 1)).squeeze(1), rtol=1e-12, atol=1e-14
    )


def test_distribution_with_masked_bins():
    """A bin at -inf has probability 0; the loss is finite where the target does not need it,
    infinite where it does.
    """
    z = torch.tensor([[0.5, -INF, 1.0, 2.0]] * 3, dtype=torch.float64, requires_grad=True)
    loss = reference.distribution_focal_loss(
        z, torch.tensor([2.5, 3.0, 0.5], dtype=torch.float64), reduction="none"
    )
    kept = [0.5, 1.0, 2.0]
    log_p = [float(value) for value in mp_log_softmax([mpmath.mpf(value) for value in kept])]
    expected = torch.tensor([-(log_p[1] + log_p[2]) / 2, -log_p[2], INF], dtype=torch.float64)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(loss[:2].sum(), z)
    assert bool(grad.isfinite().all()) and float(grad[0, 1]) == 0.0


@pytest.mark.parametrize("bins", [2, 8, 17, 64])
@pytest.mark.parametrize("positions", ["default", "arbitrary"])
def test_integral(bins, positions):
    rows = scale_rows(bins)
    y = torch.arange(bins, dtype=torch.float64)
    if positions == "arbitrary":
        y = torch.randn(bins, dtype=torch.float64) * 10
    z = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
    y.requires_grad_()
    value = reference.integral(z, bins=None if positions == "default" else y)
    truth = [mp_integral(row, y.tolist()) for row in rows]
    assert_close(value, [item[0] for item in truth], "value", atol=1e-13)
    (grad,) = torch.autograd.grad(value.sum(), z, retain_graph=True)
    assert_close(grad, [slope for item in truth for slope in item[1]], "dE/dz", atol=1e-13)
    if positions == "arbitrary":
        (grad,) = torch.autograd.grad(value.sum(), y)
        assert_close(
            grad,
            [mpmath.fsum(item[2][k] for item in truth) for k in range(bins)],
            "dE/dy",
            atol=1e-13,
        )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_reductions_and_weights(reduction):
    """Written out by hand: weight times row loss, then sum, or divided by rows or by avg_factor +
    eps(float32).
    """
    z, t, w = (
        logits(7, 5, dtype=torch.float64),
        torch.rand(7, dtype=torch.float64) * 4,
        row_weight((7,)).double(),
    )
    rows = reference.distribution_focal_loss(z, t, reduction="none")
    eps = 2.0**-23
    got = reference.distribution_focal_loss(z, t, weight=w, reduction=reduction)
    expected = {"none": rows * w, "sum": (rows * w).sum(), "mean": (rows * w).sum() / 7}[reduction]
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)
    if reduction == "mean":
        for factor in (3, 2.5, torch.tensor(2.5), torch.tensor([2.5]), 0):
            got = reference.distribution_focal_loss(z, t, weight=w, avg_factor=factor)
            expected = (rows * w).sum() / (torch.as_tensor(factor, dtype=torch.float64) + eps)
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    elif reduction == "none":
        got = reference.distribution_focal_loss(z, t, weight=w, avg_factor=3, reduction="none")
        torch.testing.assert_close(got, rows * w, rtol=1e-13, atol=0)
    else:
        with pytest.raises(ValueError, match='avg_factor can not be used with reduction="sum"'):
            reference.distribution_focal_loss(z, t, avg_factor=3, reduction="sum")


@pytest.mark.parametrize("beta", [0.0, 2.0, 3.0])
def test_double_backward_of_quality(beta):
    x = logits(3, 4, dtype=torch.float64, extremes=False).requires_grad_()
    q = torch.rand(3, dtype=torch.float64)
    label = torch.tensor([0, 3, 4])

    def loss(x):
        return reference.quality_focal_loss(x, (label, q), beta=beta, reduction="none")

    assert torch.autograd.gradcheck(loss, (x,))
    assert torch.autograd.gradgradcheck(loss, (x,))


def test_double_backward_of_distribution_and_integral():
    z = logits(3, 6, dtype=torch.float64, extremes=False).requires_grad_()
    t = torch.tensor([0.4, 3.0, 5.0], dtype=torch.float64)
    y = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda z: reference.distribution_focal_loss(z, t, reduction="none"), (z,)
    )
    assert torch.autograd.gradgradcheck(lambda z, y: reference.integral(z, bins=y), (z, y))


def test_second_derivative_of_quality_against_mpmath():
    """L'' by mpmath's numerical derivative against double backward through the oracle."""
    for x0, q0, beta in [(0.7, 0.3, 2.0), (-2.0, 0.0, 2.0), (1.5, 1.0, 3.0), (-0.3, 0.9, 1.5)]:
        x = torch.tensor([[x0]], dtype=torch.float64, requires_grad=True)
        loss = reference.quality_focal_loss(
            x, torch.tensor([[q0]], dtype=torch.float64), beta=beta, reduction="sum"
        )
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        truth = mpmath.diff(lambda v, q=q0, b=beta: mp_quality(v, q, b)[0], x0, 2)
        assert float(second) == pytest.approx(float(truth), rel=1e-10)


def test_mean_of_nothing_is_zero():
    for shape in [(0, 5), (0, 1)]:
        x = torch.zeros(shape, requires_grad=True)
        label, score = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        for kwargs in ({}, {"avg_factor": 0}, {"avg_factor": 1.0}, {"reduction": "sum"}):
            loss = reference.quality_focal_loss(x, (label, score), **kwargs)
            assert float(loss.detach()) == 0.0
            (grad,) = torch.autograd.grad(loss, x)
            assert grad.shape == x.shape
