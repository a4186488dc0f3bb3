"""What compiled GPU code is run on without a GPU: a part of the suite that stands for it.

test_triton.py and test_cuda.py collect these with a fixture of their own: `compiled`, a simulated
device whose backend is forced.
"""

import pytest
import torch
from support import (
    FLOATS,
    PUBLIC,
    bin_target,
    check_op,
    dense_target,
    evaluate,
    explicit_target,
    lay_out,
    logits,
    random_upstream,
    row_weight,
    sparse_target,
)
from test_head import LAYOUTS, aligned, check, one_level, scene


# Shapes are odd and reach into a second tile; a case is a compilation or two of some seconds.
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weighted", [False, True])
def test_quality_sparse(compiled, dtype, weighted):
    x = logits(77, 80, dtype=dtype)
    weight = row_weight((77,)) if weighted else None
    if weighted:
        x[weight == 0] = float("nan")  # not read
    check_op("quality", x, sparse_target((77,), 80), weight=weight, reduction="none")
    check_op("quality", x, sparse_target((77,), 80), weight=weight, avg_factor=31.0)


@pytest.mark.parametrize("classes", [1, 3, 81, 365])
def test_quality_odd_classes(compiled, classes):
    x = logits(70, classes)
    check_op("quality", x, sparse_target((70,), classes), reduction="sum")


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 1.5])
def test_quality_beta(compiled, beta):
    x = logits(70, 16)  # one kernel for all
    check_op("quality", x, sparse_target((70,), 16), beta=beta)


@pytest.mark.parametrize("beta", [2.0, 1.5])
def test_quality_probabilities(compiled, beta):
    p = torch.sigmoid(logits(70, 16).double()).float()
    p[3, 4], p[5, 6] = 0.0, 1.0
    check_op(
        "quality",
        p,
        sparse_target((70,), 16),
        beta=beta,
        activated=True,
        scale=100.0,
        grad_scale=1e12,
    )


def test_quality_float64(compiled):
    check_op("quality", logits(70, 16, dtype=torch.float64), sparse_target((70,), 16))
    check_op("quality", logits(70, 16, dtype=torch.float64), sparse_target((70,), 16), beta=1.5)


@pytest.mark.parametrize("layout", ["nchw", "column_slice", "misaligned", "width_cropped"])
def test_quality_layouts(compiled, layout):
    laid = lay_out(layout, logits(2, 7, 12, 20))
    target = sparse_target(laid.row_shape, 20)
    check_op("quality", laid.pred, target, class_dim=laid.dim, reduction="none", what=layout)


def test_quality_dense_with_weights(compiled):
    laid = lay_out("nchw", logits(2, 5, 7, 20))
    target = dense_target((2, 5, 7), 20).movedim(-1, 1)
    weight = row_weight((2, 5, 7, 20)).movedim(-1, 1)
    check_op("quality", laid.pred, target, weight=weight, class_dim=1)
    check_op("quality", logits(70, 16), dense_target((70,), 16, dtype=torch.float64))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bins", [17, 16])
def test_distribution(compiled, dtype, bins):
    x = logits(131, bins, dtype=dtype)  # 131: three rows are left over from groups of four
    weight = row_weight((131,))
    x[weight == 0] = float("nan")
    check_op("distribution", x, bin_target((131,), bins), weight=weight, avg_factor=7.0)


@pytest.mark.parametrize("bins", [2, 8, 33, 80])
def test_distribution_bins(compiled, bins):
    check_op("distribution", logits(66, bins), bin_target((66,), bins), reduction="none")


def test_distribution_explicit_weights_and_layouts(compiled):
    for layout in ("nchw", "width_cropped"):
        laid = lay_out(layout, logits(2, 5, 7, 8))
        target = explicit_target(laid.row_shape, 8)
        check_op("distribution", laid.pred, target, bin_dim=laid.dim, what=layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_integral(compiled, dtype):
    check_op("integral", logits(131, 17, dtype=dtype), scale=16.0)


def test_integral_of_given_bins(compiled):
    check_op("integral", logits(50, 8), bins=torch.linspace(-3, 9, 8), scale=9.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics(compiled, dtype):
    check_op("statistics", logits(131, 17, dtype=dtype))


@pytest.mark.parametrize("bins, topk", [(2, 2), (8, 3), (33, 33), (80, 4)])
def test_statistics_bins(compiled, bins, topk):
    x = logits(66, bins)
    x[3, 1:] = -float("inf")
    check_op("statistics", x, topk=topk)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_moments(compiled, dtype):
    x = logits(131, 17, dtype=dtype)
    x[3, 1:] = -float("inf")
    check_op("moments", x, scale=17)
    check_op("moments", x[:50, :8], bins=torch.linspace(-3, 9, 8), scale=9.0)


def test_peak(compiled):
    for rows, bins, dtype in ((131, 17, torch.float32), (50, 80, torch.float16)):
        x = logits(rows, bins, dtype=dtype)
        x[5] = 2.0  # a tie
        check_op("integral", x, scale=bins, mode="peak", window=1)


def test_summaries_layouts(compiled):
    for layout, op, kwargs in (
        ("nchw", "statistics", {}),
        ("width_cropped", "moments", {"scale": 8}),
        ("nchw", "integral", {"scale": 8, "mode": "peak"}),
    ):
        laid = lay_out(layout, logits(2, 5, 7, 8))
        check_op(op, laid.pred, bin_dim=laid.dim, what=layout, **kwargs)


@pytest.mark.parametrize("op, values", [("statistics", 5), ("moments", 3), ("peak", 1)])
def test_summaries_move_what_they_must(compiled, op, values):
    """A launch each way; logits read once in each, results and gradients written once."""
    x = logits(2048, 17, extremes=False)
    function = PUBLIC.get(op, lambda z: PUBLIC["integral"](z, mode="peak"))
    compiled.reports.clear()
    evaluate(function, x, random_upstream(torch.empty(2048, values).squeeze(1)), (), {})
    forward, backward = compiled.reports
    results = 4 * values * len(x)
    for report, least in ((forward, x.nbytes + results), (backward, 2 * x.nbytes + results)):
        dram = report.dram_bytes_read + report.dram_bytes_written
        assert dram <= 1.05 * least, (report.kernel, dram, least)


PYRAMID = {"sizes": ((9, 7), (5, 4), (3, 2), (2, 1), (1, 1)), "strides": (8, 16, 32, 64, 128)}


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head(compiled, dtype, layout):
    """Positives in all levels but one, in one level, in none: there is little to approximate in the
    last two."""
    shares = ((0.4, 0.3, 0.0, 0.5, 1.0), (0.0, 0.0, 0.5, 0.0, 0.0), 0.0)
    for share in shares if compiled.launch_options["approx"] == "nearest" else shares[:1]:
        s = scene(classes=80, positives=share, dtype=dtype, **PYRAMID)
        if layout != "nchw":
            s.cls, s.box = ([LAYOUTS[layout](t) for t in level] for level in (s.cls, s.box))
        check(s)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"varifocal": True}], ids=str)
def test_head_task_aligned(compiled, dtype, options):
    s, function = one_level(*aligned(dtype=dtype), **options)
    check(s, function=function)


def test_head_varifocal_gamma(compiled):
    s, function = one_level(*aligned(), varifocal=True, alpha=0.2, gamma=1.5)
    check(s, function=function)
