"""Statistics, moments and the peak of distributions: every backend against the formulas written out
here and against the float64 reference, over bins, layouts, dtypes and logits of every kind.
"""

import pytest
import torch
from support import (
    DENSE_LAYOUTS,
    FLOATS,
    INF,
    INTERPRETED,
    LAYOUTS,
    NAN,
    check_op,
    combinations,
    evaluate,
    gradcheck,
    lay_out,
    logits,
    random_upstream,
    stacked_moments,
    thinned,
)

import gfl_kernels
from gfl_kernels import distribution_moments, distribution_statistics, integral, reference

PEAK = {"mode": "peak", "window": 1}


def check_all(pred, bin_dim=-1, *, topk=4, what=""):
    """The three of them against the reference: value and gradient."""
    bins = pred.shape[bin_dim]
    what = f"{what} K={bins}"
    topk = min(topk, bins)
    check_op("statistics", pred, topk=topk, bin_dim=bin_dim, what=what)
    check_op("moments", pred, bin_dim=bin_dim, scale=bins, what=what)
    check_op("integral", pred, bin_dim=bin_dim, scale=bins, what=f"peak {what}", **PEAK)


# ---- the formulas, written out


def written_statistics(z, topk):
    """GFocalV2's GFocalHead.forward_single, bins last."""
    top, _ = torch.softmax(z, dim=-1).topk(topk, dim=-1)
    return torch.cat([top, top.mean(dim=-1, keepdim=True)], dim=-1)


def written_moments(z, y):
    p = torch.softmax(z, dim=-1)
    mean = (p * y).sum(-1)
    std = ((p * y * y).sum(-1) - mean**2).sqrt()
    return torch.stack([mean, std, -(p * p.log()).sum(-1)], dim=-1)


def written_peak(z, y, window):
    values = []
    for row in z:
        k = max(range(len(row)), key=lambda k: (row[k].item(), -k))
        low, high = max(0, k - window), min(len(row), k + window + 1)
        e = [row[j].exp() for j in range(low, high)]
        values.append(sum(a * y[j] for a, j in zip(e, range(low, high), strict=True)) / sum(e))
    return torch.stack(values)


@pytest.mark.parametrize("bins", [2, 5, 17, 33])
def test_parity_with_the_formulas(backend, bins):
    z = torch.randn(6, bins, dtype=torch.float64, device=backend.device) * 2
    y = torch.randn(bins, dtype=torch.float64, device=backend.device) * 5
    places = torch.arange(bins, dtype=torch.float64)
    pairs = [
        (lambda z, k=k: distribution_statistics(z, topk=k), lambda z, k=k: written_statistics(z, k))
        for k in {1, min(4, bins), bins}
    ]
    pairs += [
        (stacked_moments, lambda z: written_moments(z, places)),
        (lambda z: stacked_moments(z, bins=y), lambda z: written_moments(z, y)),
    ]
    for window in (0, 1, 2, 40):
        pairs.append(
            (
                lambda z, w=window: integral(z, bins=y, mode="peak", window=w),
                lambda z, w=window: written_peak(z, y, w),
            )
        )
    for ours, written in pairs:
        expected = written(z)
        upstream = random_upstream(expected)
        got, grad = evaluate(ours, z, upstream, (), {})
        expected, expected_grad = evaluate(written, z, upstream, (), {})
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-10)


def test_statistics_without_their_mean(backend):
    z = logits(9, 17, device=backend.device)
    both = distribution_statistics(z, topk=3)
    alone, _ = check_op("statistics", z, topk=3, add_mean=False)
    assert alone.shape == (9, 3) and both.shape == (9, 4)
    assert torch.equal(alone, both[:, :3])


# ---- float64: the derivative against finite differences


@pytest.mark.parametrize("bins", [2, 5, 17])
def test_gradcheck(backend, bins):
    # Apart from one another: finite differences must not change the order.
    pred = torch.stack([torch.randperm(bins) for _ in range(3)]).double() * 0.4
    pred = (pred + torch.rand(3, bins) * 0.2).to(backend.device).requires_grad_()
    y = torch.randn(bins, dtype=torch.float64, device=backend.device)
    for function in (
        lambda z: distribution_statistics(z, topk=min(4, bins)),
        lambda z: distribution_statistics(z, topk=bins, add_mean=False),
        lambda z: stacked_moments(z, bins=y),
        lambda z: integral(z, bins=y, **PEAK),
    ):
        upstream = random_upstream(function(pred.detach()))
        check = lambda z, f=function, u=upstream: u * f(z)  # noqa: E731
        assert gradcheck(check, (pred,), eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", ["mean", "std", "entropy"])
def test_each_moment_alone(backend, name):
    """Its derivative, with nothing from upstream for the others."""
    z = torch.randn(3, 7, dtype=torch.float64, device=backend.device, requires_grad=True)
    function = lambda z: getattr(distribution_moments(z), name)  # noqa: E731
    assert gradcheck(function, (z,), eps=1e-6, atol=1e-7)


# ---- no worse than eager


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("bins", [2, 8, 16, 17, 33, 64])
def test_no_worse_than_eager(fused, dtype, bins):
    if INTERPRETED and bins > 17 and dtype != torch.float32:
        pytest.skip("interpreted: a bin is some twenty operations, whatever its dtype")
    for rows in (70,) if INTERPRETED else (1, 7, 15, 16, 17, 333):
        check_all(logits(rows, bins, dtype=dtype, device=fused.device, seed=rows))


@pytest.mark.parametrize("bins", [1, 3, 4, 5, 7, 9, 15, 18, 31, 32, 34, 63, 65, 100, 300])
def test_any_number_of_bins(backend, bins):
    dtypes = (FLOATS[bins % 3],) if INTERPRETED else FLOATS
    for dtype in dtypes:
        check_all(logits(70, bins, dtype=dtype, device=backend.device), topk=1 + bins % 4)


@pytest.mark.parametrize("bins, topks", [(17, (1, 2, 3, 4, 5, 8, 16, 17)), (64, (63, 64))])
def test_every_topk(backend, bins, topks):
    for topk in topks[::3] if INTERPRETED else topks:
        for dtype in (torch.float32, torch.bfloat16)[: 1 if INTERPRETED else 2]:
            x = logits(70, bins, dtype=dtype, device=backend.device)
            check_op("statistics", x, topk=topk, what=f"top {topk}")


@pytest.mark.parametrize("window", [0, 1, 2, 3, 15, 16, 1000])
def test_every_window(backend, window):
    x = logits(70, 17, device=backend.device)
    kwargs = {"mode": "peak", "window": window}
    got, _ = check_op("integral", x, scale=17, what=f"window {window}", **kwargs)
    y = torch.linspace(-3, 9, 17, device=backend.device)
    check_op("integral", x, bins=y, scale=9, what=f"window {window}", **kwargs)
    if window >= 16:
        assert torch.equal(got, integral(x))
    if window == 0:
        assert torch.equal(got.double(), x.argmax(-1).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_worse_than_eager_on_large_inputs(fused, dtype):
    """Above the size where rows are shared between threads, and with several tiles interpreted."""
    rows = 2700 if INTERPRETED else 4 * 8400
    check_all(logits(rows, 17, dtype=dtype, device=fused.device))


@pytest.mark.parametrize("positions", ["arbitrary", "half", "int", "strided"])
def test_moments_of_given_bins(backend, positions):
    y = torch.randn(17) * 20
    y = {
        "arbitrary": y,
        "half": y.bfloat16(),
        "int": y.long(),
        "strided": y.repeat_interleave(3)[::3],
    }[positions].to(backend.device)
    for dtype in (torch.float32, torch.bfloat16):
        check_op("moments", logits(50, 17, dtype=dtype, device=backend.device), bins=y, scale=60)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout):
    sizes = combinations((5, 17), (torch.float32, torch.bfloat16))
    for bins, dtype in thinned(sizes, LAYOUTS.index(layout), of=2):
        laid = lay_out(layout, logits(2, 5, 7, bins, dtype=dtype, device=backend.device))
        check_all(laid.pred, laid.dim, what=layout)


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_gradient_has_the_layout_of_the_input(backend, layout):
    laid = lay_out(layout, logits(2, 3, 4, 5, device=backend.device))
    for function in (
        lambda z: distribution_statistics(z, topk=2, bin_dim=laid.dim),
        lambda z: stacked_moments(z, bin_dim=laid.dim),
        lambda z: integral(z, bin_dim=laid.dim, **PEAK),
    ):
        leaf = laid.pred.detach().requires_grad_()
        function(leaf).sum().backward()
        assert leaf.grad.shape == leaf.shape and leaf.grad.stride() == leaf.stride()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_head_output_viewed_as_sides(backend, memory_format):
    """GFLv2's [B, 4, K, H, W] and the four sides' statistics as the channels of its convolution."""
    channels = logits(2, 4 * 17, 5, 3, device=backend.device).to(memory_format=memory_format)
    sides = channels.view(2, 4, 17, 5, 3)
    check_all(sides, 2, what="sides")
    values = distribution_statistics(sides, bin_dim=2)
    expected = written_statistics(sides.movedim(2, -1), 4).movedim(-1, 2)
    assert values.shape == (2, 4, 5, 5, 3)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)
    if backend.fused:
        assert values.flatten(1, 2).is_contiguous(memory_format=memory_format)


def test_sides_of_queries(backend):
    """D-FINE's [B, L, 4 K], whose statistics go to its LQE as [B, L, 4 (k + 1)]."""
    corners = logits(2, 9, 4 * 33, device=backend.device)
    values = distribution_statistics(corners.unflatten(-1, (4, 33)), topk=4)
    assert values.shape == (2, 9, 4, 5) and values.is_contiguous()
    wide = logits(3, 11, 4 * 16 + 80, device=backend.device)
    check_all(wide[..., : 4 * 16].unflatten(-1, (4, 16)), what="split head")


def test_many_small_dimensions(backend):
    base = logits(2, 3, 1, 2, 7, 2, device=backend.device)
    check_all(base.permute(5, 0, 2, 1, 3, 4)[..., 1:6], what="six dims")
    check_all(logits(17, device=backend.device), what="one row")


def test_expanded_logits(backend):
    base = logits(1, 9, device=backend.device, extremes=False).requires_grad_()
    for function in (distribution_statistics, stacked_moments, lambda z: integral(z, **PEAK)):
        upstream = random_upstream(function(base.detach().expand(40, 9)))
        (grad,) = torch.autograd.grad((function(base.expand(40, 9)) * upstream).sum(), base)
        copies = base.detach().expand(40, 9).clone().requires_grad_()
        (expected,) = torch.autograd.grad((function(copies) * upstream).sum(), copies)
        torch.testing.assert_close(grad, expected.sum(0, keepdim=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 17), (2, 0, 4, 16)])
def test_empty_batch(backend, shape):
    pred = torch.zeros(shape, device=backend.device, requires_grad=True)
    values = [distribution_statistics(pred), *distribution_moments(pred), integral(pred, **PEAK)]
    assert [v.shape for v in values] == [(*shape[:-1], 5), *[shape[:-1]] * 4]
    (grad,) = torch.autograd.grad(sum(value.sum() for value in values), pred)
    assert grad.shape == pred.shape


# ---- logits of every kind


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_wide_spreads(backend, dtype):
    """exp underflows; one bin above all others; two modes; +-1e4."""
    bins = 17
    rows = [
        [200.0 * (k % 2) for k in range(bins)],
        [-95.0 * k for k in range(bins)],
        [88.5] + [0.0] * (bins - 1),
        [0.0] * (bins - 1) + [1e4],
        [-1e4] * (bins - 1) + [1e4],
        [1e4 - k for k in range(bins)],
        [5.0 - abs(k - 3) + (6.0 if k > 11 else 0.0) for k in range(bins)],
        [-INF, *[float(k % 5) for k in range(bins - 2)], -INF],
        [-INF] * (bins - 1) + [3.0],
        [-INF, 1e4, 1e4 - 1, *[-INF] * (bins - 3)],
    ]
    pred = torch.tensor(rows, dtype=dtype, device=backend.device)
    check_all(pred, what="spread")
    moments = distribution_moments(pred)
    for value in moments:
        assert bool(value.isfinite().all())
    # A distribution of one bin: neither spread nor entropy, and a gradient of 0.
    leaf = pred[[3, 4, 8]].requires_grad_()
    alone = distribution_moments(leaf)
    assert bool((alone.std == 0).all()) and bool((alone.entropy == 0).all())
    (grad,) = torch.autograd.grad(sum(alone).sum(), leaf)
    assert bool((grad == 0).all())


def test_a_peak_is_one_mode(backend):
    """Where two modes pull the mean between them, the peak stays at the higher one."""
    z = torch.full((17,), -8.0, device=backend.device)
    z[2:5] = torch.tensor([2.0, 3.0, 2.0])
    z[12:15] = torch.tensor([2.0, 3.5, 2.0])
    assert 8 < float(integral(z)) < 11
    assert abs(float(integral(z, mode="peak")) - 13) < 1e-3
    assert abs(float(integral(z, mode="peak", window=0)) - 13) == 0


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_ties_go_to_the_first_bin(backend, dtype):
    """Constant rows, and equal highest bins; -0.0 is 0.0."""
    rows = [[0.0] * 9, [1e4] * 9, [1.0, 3.0, 0.0, 3.0, 3.0, 1.0, 3.0, -1.0, 1.0]]
    rows += [[-0.0, 0.0, -0.0, -1.0, 0.0, -0.0, -2.0, 0.0, 0.0]]
    pred = torch.tensor(rows, dtype=dtype, device=backend.device)
    check_all(pred, topk=3, what="ties")
    check_all(pred.t().contiguous(), 0, topk=3, what="ties")
    leaf = pred.double().requires_grad_()
    upstream = torch.tensor([1.0, 10.0, 100.0, 0.0], dtype=torch.float64, device=backend.device)
    (grad,) = torch.autograd.grad((distribution_statistics(leaf, topk=3) * upstream).sum(), leaf)
    p = leaf.detach().softmax(-1)
    for row, first in enumerate(((0, 1, 2), (0, 1, 2), (1, 3, 4), (0, 1, 2))):
        g = torch.zeros(9, dtype=torch.float64, device=backend.device)
        g[list(first)] = upstream[:3]
        torch.testing.assert_close(grad[row], p[row] * (g - (g * p[row]).sum()))
    assert integral(pred, mode="peak", window=0).tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("bins", [5] if INTERPRETED else [5, 17])
def test_what_is_no_distribution_stays_in_its_row(backend, dtype, bins):
    pred = logits(40, bins, dtype=dtype, device=backend.device, extremes=False)
    functions = (distribution_statistics, stacked_moments, lambda z: integral(z, **PEAK))
    poisons = ((0, 0, NAN), (17, bins - 1, NAN), (39, bins // 2, INF), (5, slice(None), -INF))
    for function in functions:
        upstream = random_upstream(function(pred))
        clean, clean_grad = evaluate(function, pred, upstream, (), {})
        for row, column, poison in poisons:
            bad = pred.clone()
            bad[row, column] = poison
            got, grad = evaluate(function, bad, upstream, (), {})
            others = torch.arange(40, device=backend.device) != row
            assert bool(got[row].isnan().all()) and bool(grad[row].isnan().all())
            assert torch.equal(got[others], clean[others])
            assert torch.equal(grad[others], clean_grad[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_std_does_not_cancel(backend, dtype):
    """A spread of a thousandth of a bin about a mean of 1000: E[y^2] - E^2 has no digit of it left
    in float32."""
    y = torch.arange(1000.0, 1003.0, device=backend.device)
    z = torch.tensor([[-14.0, 0.0, -14.0], [-14.0, 0.0, -15.0]], dtype=dtype).to(backend.device)
    p = z.double().softmax(-1)
    mean = (p * y).sum(-1, keepdim=True)
    truth = (p * (y - mean) ** 2).sum(-1).sqrt()
    # The mean is right to a unit in its last place, and what that adds to the spread is its square.
    assert bool(((distribution_moments(z, bins=y).std - truth).abs() <= 2e-2 * truth).all())


def test_module(backend):
    layer = gfl_kernels.Integral(16, mode="peak", window=1)
    assert list(layer.state_dict()) == ["project"]
    x = logits(9, 4 * 17, device=backend.device)
    layer = layer.to(backend.device)
    expected = reference.integral(x.view(9, 4, 17), mode="peak", window=1)
    torch.testing.assert_close(layer(x), expected, rtol=2e-6, atol=2e-5)


def test_outputs_of_half_logits_are_float32(backend):
    x = logits(5, 17, dtype=torch.bfloat16, device=backend.device)
    values = [distribution_statistics(x), *distribution_moments(x), integral(x, **PEAK)]
    assert {value.dtype for value in values} == {torch.float32}
