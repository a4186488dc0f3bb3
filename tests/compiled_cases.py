"""What compiled GPU code is run on without a GPU: a part of the suite that stands for it.

test_triton.py and test_cuda.py collect these with fixtures of their own: `compiled`, a simulated
device whose backend is forced, with both readings of approximate instructions, and `compiled_once`,
with the worse one, for what hardly depends on it.
"""

import pytest
import torch
from support import (
    FAMILY,
    FLOATS,
    HALF,
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
from test_decode import EVERYTHING
from test_decode import check as check_decode
from test_decode import scene as points_and_strides
from test_head import LAYOUTS, aligned, check, one_level, scene

import gfl_kernels


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


PROBABILITIES = (0.0, 1.0, 0.5, 1e-38, 1e-40, 1 - 2.0**-24, -0.25, 1.5)  # the last two: clamped


def probabilities(*shape, dtype=torch.float32):
    p = logits(*shape, dtype=torch.float64).sigmoid().to(dtype)
    some = torch.arange(p.numel()) % 5 == 0
    p[some.view(shape)] = torch.tensor(PROBABILITIES, dtype=dtype).repeat(p.numel())[: some.sum()]
    return p


@pytest.mark.parametrize("dtype", FLOATS)
def test_quality_probabilities_of_many_classes(compiled, dtype):
    """So many that nearly all elements are computed as background; some are beyond [0, 1]."""
    p = probabilities(70, 81, dtype=dtype)
    p[40, 7] = float("nan")
    options = {"activated": True, "scale": 100.0, "grad_scale": 1e12}
    check_op("quality", p, sparse_target((70,), 81), reduction="none", **options)


@pytest.mark.parametrize("dtype", FLOATS)
def test_quality_rows_that_begin_anywhere(compiled_once, dtype):
    """In a vector, the last one ending where memory does. NaN and infinity at the ends of a row do
    not reach its neighbours; rows of weight 0 are not read."""
    layouts = ("contiguous", "width_cropped", "misaligned")
    for layout in layouts if dtype in HALF[:1] else layouts[:1]:
        laid = lay_out(layout, logits(2, 5, 7, 81, dtype=dtype))
        rows = laid.pred.view(-1, 81) if layout != "width_cropped" else laid.pred[0, 0]
        label, score = sparse_target(laid.row_shape, 81)
        label.view(-1)[1:5] = torch.tensor([80, 0, -1, 81])
        rows[2, -1] = rows[4, 0] = float("nan")
        rows[5, -1] = rows[6, 0] = float("inf")
        check_op("quality", laid.pred, (label, score), reduction="none", what=layout)
        weight = row_weight(laid.row_shape)
        weight.view(-1)[:7] = torch.tensor([1.0, 1, 0, 1, 0, 0, 0])
        laid.pred[weight == 0] = float("nan")
        check_op("quality", laid.pred, (label, score), weight=weight, avg_factor=9.0, what=layout)


def test_quality_float64(compiled):
    check_op("quality", logits(70, 16, dtype=torch.float64), sparse_target((70,), 16))
    check_op("quality", logits(70, 16, dtype=torch.float64), sparse_target((70,), 16), beta=1.5)


@pytest.mark.parametrize("layout", ["nchw", "column_slice", "misaligned", "width_cropped"])
def test_quality_layouts(compiled_once, layout):
    laid = lay_out(layout, logits(2, 7, 12, 20))
    target = sparse_target(laid.row_shape, 20)
    check_op("quality", laid.pred, target, class_dim=laid.dim, reduction="none", what=layout)


def test_quality_dense_with_weights(compiled):
    laid = lay_out("nchw", logits(2, 5, 7, 20))
    target = dense_target((2, 5, 7), 20).movedim(-1, 1)
    weight = row_weight((2, 5, 7, 20)).movedim(-1, 1)
    check_op("quality", laid.pred, target, weight=weight, class_dim=1)
    check_op("quality", logits(70, 16), dense_target((70,), 16, dtype=torch.float64))


@pytest.mark.parametrize("name", FAMILY)
def test_family(compiled, name):
    """One kind of target each, a compilation taking seconds: labels apart from the background or,
    of few classes, not; dense. Interpreted there are all of them for each."""
    op, kwargs = FAMILY[name]
    kind = list(FAMILY).index(name) % 3
    classes = (40, 5, 16)[kind]
    x = logits(37, classes)
    if kwargs.get("activated"):
        x = x.double().sigmoid().clamp(0.02, 0.98).float()
    target = dense_target((37,), classes) if kind == 2 else sparse_target((37,), classes)
    options = {"weight": row_weight((37,)), "reduction": "mean", "avg_factor": 5.0}
    check_op(op, x, target, grad_scale=50.0, what=name, **options, **kwargs)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bins", [17, 16])
def test_distribution(compiled, dtype, bins):
    x = logits(131, bins, dtype=dtype)  # 131: three rows are left over from groups of four
    weight = row_weight((131,))
    x[weight == 0] = float("nan")
    check_op("distribution", x, bin_target((131,), bins), weight=weight, avg_factor=7.0)


@pytest.mark.parametrize("bins", [2, 8, 33, 80])
def test_distribution_bins(compiled_once, bins):
    check_op("distribution", logits(66, bins), bin_target((66,), bins), reduction="none")


def test_distribution_explicit_weights_and_layouts(compiled_once):
    for layout in ("nchw", "width_cropped"):
        laid = lay_out(layout, logits(2, 5, 7, 8))
        target = explicit_target(laid.row_shape, 8)
        check_op("distribution", laid.pred, target, bin_dim=laid.dim, what=layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_integral(compiled, dtype):
    check_op("integral", logits(131, 17, dtype=dtype), scale=16.0)


def test_integral_of_given_bins(compiled_once):
    check_op("integral", logits(50, 8), bins=torch.linspace(-3, 9, 8), scale=9.0)


def test_statistics(compiled_once):
    check_op("statistics", logits(131, 17))


def test_summaries_in_other_dtypes(compiled_once):
    check_op("statistics", logits(131, 17, dtype=torch.bfloat16))
    check_op("moments", logits(131, 17, dtype=torch.float64), scale=17)


@pytest.mark.parametrize("bins, topk", [(2, 2), (8, 3), (33, 33), (80, 4)])
def test_statistics_bins(compiled_once, bins, topk):
    x = logits(66, bins)
    x[3, 1:] = -float("inf")
    check_op("statistics", x, topk=topk)


def test_moments(compiled_once):
    x = logits(131, 17)
    x[3, 1:] = -float("inf")
    check_op("moments", x, scale=17)
    check_op("moments", x[:50, :8], bins=torch.linspace(-3, 9, 8), scale=9.0)


def test_peak(compiled_once):
    for rows, bins, dtype in ((131, 17, torch.float32), (50, 80, torch.float16)):
        x = logits(rows, bins, dtype=dtype)
        x[5] = 2.0  # a tie
        check_op("integral", x, scale=bins, mode="peak", window=1)


def test_summaries_layouts(compiled_once):
    for layout, op, kwargs in (
        ("nchw", "statistics", {}),
        ("width_cropped", "moments", {"scale": 8}),
        ("nchw", "integral", {"scale": 8, "mode": "peak"}),
    ):
        laid = lay_out(layout, logits(2, 5, 7, 8))
        check_op(op, laid.pred, bin_dim=laid.dim, what=layout, **kwargs)


@pytest.mark.parametrize("op, values", [("statistics", 5), ("moments", 3), ("peak", 1)])
def test_summaries_move_what_they_must(compiled_once, op, values):
    """A launch each way; logits read once in each, results and gradients written once."""
    x = logits(2048, 17, extremes=False)
    function = PUBLIC.get(op, lambda z: PUBLIC["integral"](z, mode="peak"))
    compiled_once.reports.clear()
    evaluate(function, x, random_upstream(torch.empty(2048, values).squeeze(1)), (), {})
    forward, backward = compiled_once.reports
    results = 4 * values * len(x)
    for report, least in ((forward, x.nbytes + results), (backward, 2 * x.nbytes + results)):
        dram = report.dram_bytes_read + report.dram_bytes_written
        assert dram <= 1.05 * least, (report.kernel, dram, least)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distillation(compiled, dtype):
    student, teacher = (logits(131, 17, dtype=dtype, seed=seed) for seed in (0, 7))
    weight = row_weight((131,))
    student[weight == 0] = float("nan")  # not read
    options = {"scale": 400.0, "grad_scale": 20.0}
    check_op("distillation", student, teacher, weight=weight, avg_factor=7.0, **options)
    if dtype == torch.float32:
        laid, taught = (lay_out("nchw", logits(2, 5, 7, 8, seed=seed)) for seed in (0, 7))
        options |= {"bin_dim": 1, "reduction": "none"}
        check_op("distillation", laid.pred, taught.pred, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode(compiled, dtype):
    pred, cls = logits(131, 68, dtype=dtype), logits(131, 21, dtype=dtype, seed=1)
    points, strides = points_and_strides(131)
    check_decode(points, pred, strides=strides, cls_logits=cls, mode="peak", **EVERYTHING)


def test_decode_planes(compiled_once):
    pred, cls = logits(2, 68, 5, 7), logits(2, 80, 5, 7, seed=1)
    points, strides = points_and_strides(35)
    limits = torch.tensor([[60.0, 50.0], [40.0, 90.0]])
    options = {"strides": strides, "max_shape": limits, "channel_dim": 1}
    check_decode(points, pred, cls_logits=cls, **options)


def dram_bytes(compiled, call):
    compiled.reports.clear()
    result = call()
    moved = sum(r.dram_bytes_read + r.dram_bytes_written for r in compiled.reports)
    return moved, result


@pytest.mark.parametrize("planes", [False, True], ids=["rows", "planes"])
def test_decode_moves_every_byte_once(compiled_once, planes):
    anchors = 768
    pred, cls = logits(1, anchors, 68), logits(1, anchors, 80)
    points, strides = points_and_strides(anchors)
    if planes:
        pred, cls = (x.transpose(1, 2).contiguous() for x in (pred, cls))
    options = {"cls_logits": cls, "strides": strides, "channel_dim": 1 if planes else -1}
    moved, _ = dram_bytes(compiled_once, lambda: gfl_kernels.decode_boxes(points, pred, **options))
    needed = anchors * (68 * 4 + 80 * 4 + 8 + 4 + 16 + 4 + 8)  # point, stride; box, score, label
    assert needed <= moved <= 1.05 * needed


@pytest.mark.parametrize("planes", [False, True], ids=["rows", "planes"])
def test_distillation_moves_every_byte_once(compiled_once, planes):
    student, teacher = (logits(1, 1536, 17, seed=seed) for seed in (0, 7))
    if planes:
        student, teacher = (x.transpose(1, 2).contiguous() for x in (student, teacher))
    loss = gfl_kernels.localization_distillation_loss
    student.requires_grad_()
    dim = 1 if planes else -1
    size = student.numel() * 4
    moved, value = dram_bytes(
        compiled_once, lambda: loss(student, teacher, bin_dim=dim, avg_factor=9.0)
    )
    assert 2 * size <= moved <= 1.05 * 2 * size
    moved, _ = dram_bytes(compiled_once, value.backward)
    assert 3 * size <= moved <= 1.05 * 3 * size


PYRAMID = {"sizes": ((9, 7), (5, 4), (3, 2), (2, 1), (1, 1)), "strides": (8, 16, 32, 64, 128)}


@pytest.mark.parametrize(
    "dtype, layout", [(torch.float32, "nchw"), (torch.bfloat16, "channels_last")]
)
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
def test_head_task_aligned(compiled_once, dtype, options):
    s, function = one_level(*aligned(dtype=dtype), **options)
    check(s, function=function)


def test_head_varifocal_gamma(compiled_once):
    s, function = one_level(*aligned(), varifocal=True, alpha=0.2, gamma=1.5)
    check(s, function=function)
