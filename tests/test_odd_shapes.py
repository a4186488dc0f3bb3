"""Odd shapes, strides and dtypes of every kernel, for AddressSanitizer and UBSan and, on a GPU,
compute-sanitizer: needs torch and pytest only.

Inputs are tight allocations (the last element ends the block) or views into NaN; outputs come from
memory that was filled with NaN and freed. A read or write one element outside, or an element never
written, shows as a sanitizer report or as a NaN.
"""

import itertools

import pytest
import torch
from support import (
    FAMILY,
    INTERPRETED,
    LAYOUTS,
    bin_target,
    check_op,
    combinations,
    dense_target,
    explicit_target,
    lay_out,
    logits,
    poison,
    row_weight,
    sparse_target,
    thinned,
)

# Interpreted, a dtype is one of NumPy: what differs is whether the gradient is rounded.
DTYPES = (torch.float32, torch.bfloat16)
if not INTERPRETED:
    DTYPES += (torch.float64, torch.float16)
# Around every vector width of every dtype, and blocks of rows
WIDTHS = (
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    15,
    16,
    17,
    18,
    31,
    32,
    33,
    47,
    48,
    49,
    63,
    64,
    65,
    79,
    80,
    81,
    127,
    128,
    129,
)
HEIGHTS = (1, 2, 3, 5, 15, 16, 17, 31, 33, 63, 64, 65)


def poison_for(pred):
    value = torch.float64 if pred.dtype == torch.float64 else torch.float32
    poison((pred.shape, pred.dtype), (pred.shape[:-1], value), ((1,), value))


@pytest.mark.parametrize("dtype", DTYPES)
def test_quality_widths(fused, dtype):
    for classes, rows in combinations(WIDTHS, (1, 2, 3, 17)):
        pred = logits(rows, classes, dtype=dtype, seed=classes)
        weight = row_weight((rows,), seed=classes)
        for target in (sparse_target((rows,), classes), dense_target((rows,), classes)):
            poison_for(pred)
            check_op("quality", pred, target, weight=weight, reduction="none", what="odd")
            poison_for(pred)
            check_op("quality", pred, target, reduction="sum", what="odd")


@pytest.mark.parametrize("dtype", DTYPES)
def test_quality_heights(fused, dtype):
    for rows, classes in combinations(HEIGHTS, (1, 3, 17, 80)):
        pred = logits(rows, classes, dtype=dtype, seed=rows)
        poison_for(pred)
        target = sparse_target((rows,), classes, seed=rows)
        check_op(
            "quality",
            pred,
            target,
            weight=row_weight((rows, classes)),
            avg_factor=3,
            what="odd",
        )
        probabilities = pred.sigmoid().clamp(0.01, 0.99)
        check_op("quality", probabilities, target, activated=True, reduction="none", what="odd")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.02, 0.3])
def test_labels_in_a_tile(fused, dtype, share):
    """Background formulas serve all elements but those around a label, in rows and in planes: none,
    few, neighbours, and the first and last element of a tile.
    """
    for rows, classes in ((70, 3),) if INTERPRETED else ((1, 80), (50, 80), (2100, 3), (70, 257)):
        label, score = sparse_target((rows,), classes, seed=rows)
        chosen = torch.rand(rows) < share
        label = torch.where(chosen, label.clamp(0, classes - 1), -1)
        label[0], label[-1] = 0, classes - 1
        for pred in (
            logits(rows, classes, dtype=dtype, seed=rows),
            logits(classes, rows, dtype=dtype, seed=rows).T,
        ):
            poison_for(pred)
            check_op("quality", pred, (label, score), reduction="none", what="labels")
            check_op("quality", pred, (label, score), weight=row_weight((rows,)), what="labels")


@pytest.mark.parametrize("dtype", DTYPES)
def test_family_widths_and_heights(fused, dtype):
    """One form of the quality family for each shape, sparse and dense, with its rows' ends."""
    shapes = combinations(HEIGHTS, (1, 3, 17, 80))
    for (rows, classes), (op, form) in zip(shapes, itertools.cycle(FAMILY.values()), strict=False):
        pred = logits(rows, classes, dtype=dtype, seed=rows)
        if form.get("activated"):
            pred = pred.sigmoid().clamp(0.02, 0.98)
        poison_for(pred)
        weight = row_weight((rows, classes))
        for target in (sparse_target((rows,), classes), dense_target((rows,), classes)):
            options = {"weight": weight, "reduction": "none", "grad_scale": 50.0, **form}
            check_op(op, pred, target, what="odd", **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_distribution_widths_and_heights(fused, dtype):
    widths = [width for width in WIDTHS if width >= 2]
    height_of = dict(combinations(widths, (1, 2, 3, 15, 16, 17))) if INTERPRETED else {}
    for bins in widths:
        heights = (1, 2, 15, 16, 17) if bins in (2, 8, 16, 17, 33, 64) else (1, 3)
        for rows in (height_of[bins],) if INTERPRETED else heights:
            pred = logits(rows, bins, dtype=dtype, seed=bins)
            weight = row_weight((rows,), seed=bins)
            target, explicit = bin_target((rows,), bins), explicit_target((rows,), bins)
            none = {"weight": weight, "reduction": "none"}
            calls = [
                ("distribution", (target,), none),
                ("distribution", (explicit,), {"avg_factor": 3}),
                ("integral", (), {"scale": bins}),
                ("distribution", (explicit,), none),
                ("integral", (), {"bins": torch.linspace(-3, 5, bins), "scale": 5}),
                ("statistics", (), {"topk": 1 + rows % bins}),
                ("distribution", (target,), {"avg_factor": 3}),
                ("integral", (), {"scale": bins, "mode": "peak"}),
                ("moments", (), {"scale": bins}),
            ]
            # Interpreted, a third of them for each width.
            for op, args, kwargs in thinned(calls, bins):
                poison_for(pred)
                check_op(op, pred, *args, what="odd", **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_distribution_of_moderate_logits(fused, dtype):
    """Which may be treated as one array without a shift by the row's maximum: up to the largest of
    them, with a larger one among them, and with targets in the last bin.
    """
    sizes = (
        ((17, 66), (9, 21)) if INTERPRETED else combinations((8, 9, 16, 17, 33, 64), (8, 66, 260))
    )
    for bins, rows in sizes:
        moderate = logits(rows, bins, dtype=dtype, seed=bins, extremes=False)
        large = (moderate * 6).clamp(-40, 40)
        outlier = large.clone()
        outlier[rows // 2, bins // 2] = 60
        position, (left, *sides) = bin_target((rows,), bins), explicit_target((rows,), bins)
        position[-2:] = bins - 1
        left[-2:] = bins - 1
        weight = row_weight((rows,), seed=bins).clamp(min=0.25)
        for pred in (moderate, large, outlier):
            for target in (position, (left, *sides)):
                poison_for(pred)
                check_op("distribution", pred, target, weight=weight, reduction="none", what="odd")
                poison_for(pred)
                check_op("distribution", pred, target, avg_factor=3, what="odd")
            poison_for(pred)
            check_op("integral", pred, scale=bins, what="odd")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_every_dtype(fused, layout):
    sizes = combinations(DTYPES, (2, 3, 16, 17, 33))
    for dtype, size in thinned(sizes, LAYOUTS.index(layout), of=2):
        laid = lay_out(layout, logits(1, 3, 5, size, dtype=dtype))
        weight = row_weight(laid.row_shape)
        quality = sparse_target(laid.row_shape, size)
        check_op(
            "quality",
            laid.pred,
            quality,
            class_dim=laid.dim,
            weight=weight,
            reduction="none",
            what=layout,
        )
        check_op("quality", laid.pred, quality, class_dim=laid.dim, what=layout)
        target = bin_target(laid.row_shape, size)
        check_op(
            "distribution",
            laid.pred,
            target,
            bin_dim=laid.dim,
            weight=weight,
            reduction="none",
            what=layout,
        )
        check_op("distribution", laid.pred, target, bin_dim=laid.dim, what=layout)
        check_op("integral", laid.pred, bin_dim=laid.dim, scale=size, what=layout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_alignment(fused, dtype):
    """The first logit 0 to 16 elements into a block, rows of a wider tensor, and the view that ends
    the block.
    """
    rows, width = 6, 19
    for offset in range(0, 17, 4 if INTERPRETED else 1):
        flat = torch.full((offset + rows * width,), float("nan"), dtype=dtype)
        pred = flat[offset:].view(rows, width)
        pred.copy_(logits(rows, width, dtype=dtype, seed=offset))
        check_op(
            "quality",
            pred,
            sparse_target((rows,), width),
            reduction="none",
            what=f"offset {offset}",
        )
        check_op(
            "distribution",
            pred,
            bin_target((rows,), width),
            reduction="none",
            what=f"offset {offset}",
        )
        check_op("integral", pred, scale=width, what=f"offset {offset}")
        wide = torch.full((rows, width + offset), float("nan"), dtype=dtype)
        pred = wide[:, offset:]
        pred.copy_(logits(rows, width, dtype=dtype, seed=offset))
        check_op(
            "quality",
            pred,
            dense_target((rows,), width),
            reduction="none",
            what=f"step {width + offset}",
        )
        check_op(
            "distribution",
            pred,
            bin_target((rows,), width),
            reduction="none",
            what=f"step {width + offset}",
        )


def test_nan_and_infinity_stay_in_their_row(fused):
    """At its ends, beside rows that begin anywhere in a vector."""
    for dtype, classes in combinations(DTYPES, (17, 81)):
        pred = logits(7, classes, dtype=dtype, seed=classes)
        pred[1, -1] = pred[3, 0] = float("nan")
        pred[4, -1] = pred[6, 0] = float("inf")
        label = torch.tensor([classes - 1, 0, -1, classes, 0, classes - 1, classes - 1])
        check_op("quality", pred, (label, torch.rand(7)), reduction="none", what="ends")


def test_labels_far_outside(fused):
    """A label is an index: the ends of every integer type must not be one."""
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        info = torch.iinfo(dtype)
        label = torch.tensor([info.min, info.max, 0, 4, 5], dtype=dtype)
        check_op(
            "quality", logits(5, 5), (label, torch.rand(5)), reduction="none", what=f"label {dtype}"
        )
    for values in (
        [float("inf"), -float("inf"), float("nan"), 1e30, -1e30],
        [4.0, 5.0, -1.0, 2.0**31, 2.0**63],
    ):
        label = torch.tensor(values)
        check_op(
            "quality", logits(5, 5), (label, torch.rand(5)), reduction="none", what="float label"
        )
        check_op(
            "quality",
            logits(5, 5),
            (label.double(), torch.rand(5)),
            reduction="none",
            what="float label",
        )


def test_targets_far_outside(fused):
    values = torch.tensor(
        [1e30, -1e30, 2.0**31, 2.0**63, -(2.0**63), 3.4e38, float("inf"), -float("inf")]
    )
    for bins in (2, 16, 17):
        pred = logits(8, bins)
        check_op("distribution", pred, values, reduction="none", what="far")
        check_op(
            "distribution", pred.double(), values.double() * 1e30, reduction="none", what="far"
        )
        weights = torch.full((8,), 0.5)
        left = torch.tensor([2**62, -(2**62), 2**31, -(2**31) - 1, bins - 1, bins, -1, 0])
        check_op("distribution", pred, (left, weights, weights), reduction="none", what="far")
        check_op(
            "distribution", pred, (left.float(), weights, weights), reduction="none", what="far"
        )


def test_weights_of_every_kind_at_the_end_of_their_block(fused):
    for rows, width in ((1, 1), (3, 17), (65, 5)):
        pred = logits(rows, width)
        target = sparse_target((rows,), width)
        for weight in (
            row_weight((rows,)),
            row_weight((rows,)).double(),
            row_weight((rows,)).half(),
            row_weight((rows,)).bool(),
            row_weight((3 * rows,))[::3],
            row_weight((rows, width)),
            row_weight((width, rows)).t(),
            row_weight((rows, 1)).expand(rows, width),
        ):
            check_op("quality", pred, target, weight=weight, reduction="none", what="weights")
            if weight.dim() == 1:
                check_op(
                    "distribution",
                    pred,
                    bin_target((rows,), width),
                    weight=weight,
                    avg_factor=2,
                    what="weights",
                )


def test_nothing_at_all(fused):
    for dtype in DTYPES:
        for shape in ((0, 1), (0, 17), (0, 80), (3, 0, 17), (0, 3, 17)):
            pred = torch.zeros(shape, dtype=dtype)
            rows = shape[:-1]
            zeros = torch.zeros(rows)
            for reduction in ("none", "sum", "mean"):
                check_op("quality", pred, (zeros.long(), zeros), reduction=reduction)
                check_op("quality", pred, torch.zeros(shape), weight=zeros, reduction=reduction)
                check_op("distribution", pred, zeros, reduction=reduction)
                for op, form in FAMILY.values():
                    check_op(op, pred, (zeros.long(), zeros), reduction=reduction, **form)
            check_op("integral", pred)


def test_all_weights_zero(fused):
    for dtype in DTYPES:
        pred = torch.full((37, 17), float("nan"), dtype=dtype)
        zeros = torch.zeros(37)
        for reduction in ("none", "sum", "mean"):
            poison_for(pred)
            kwargs = {"weight": zeros, "reduction": reduction}
            value, grad = check_op("quality", pred, (zeros.long(), zeros), **kwargs)
            assert bool((value == 0).all()) and bool((grad == 0).all())
            value, grad = check_op("distribution", pred, zeros, **kwargs)
            assert bool((value == 0).all()) and bool((grad == 0).all())


def test_many_small_dimensions(fused):
    """More dimensions than any head has, of size 1 and with odd strides between."""
    base = logits(2, 3, 1, 2, 7, 2)
    pred = base.permute(5, 0, 2, 1, 3, 4)[..., 1:6]
    rows = pred.shape[:-1]
    check_op(
        "quality",
        pred,
        sparse_target(rows, 5),
        weight=row_weight(rows),
        reduction="none",
        what="six dims",
    )
    check_op("distribution", pred, bin_target(rows, 5), weight=row_weight(rows), what="six dims")
    check_op("integral", pred, scale=5, what="six dims")
    check_op("integral", logits(17), scale=17, what="one row")
    check_op("distribution", logits(17), torch.tensor(3.25), what="one row")
    check_op(
        "quality", logits(5), (torch.tensor(2), torch.tensor(0.5)), reduction="none", what="one row"
    )
