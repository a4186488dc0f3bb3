"""decode_boxes: the reference against the formula and mmdetection's code, every backend against the
float64 reference, over layouts, dtypes, options and shapes.
"""

import pytest
import torch
from support import (
    FLOATS,
    INF,
    INTERPRETED,
    LAYOUTS,
    NAN,
    assert_no_worse,
    combinations,
    lay_out,
    logits,
    on_cpu,
)

import gfl_kernels
from gfl_kernels import DecodedBoxes, decode_boxes, use_backend

EVERYTHING = {"max_shape": (90.0, 70.0), "return_uncertainty": True}


@on_cpu
def scene(anchors, *, seed=0, size=96.0):
    """Points [A, 2] on an image of that size, and strides [A]."""
    generator = torch.Generator().manual_seed(seed + 10)
    points = torch.rand(anchors, 2, generator=generator) * size
    strides = 2.0 ** torch.randint(2, 6, (anchors,), generator=generator)
    return points, strides


def as_tuple(result):
    return result if isinstance(result, DecodedBoxes) else DecodedBoxes(result, None, None, None)


def check(points, pred, *, what="", scale=1000.0, **kwargs):
    """The forced backend no worse than eager; labels equal wherever no logits nearly tie."""
    got = as_tuple(decode_boxes(points, pred, **kwargs))
    double = {k: v.double() if torch.is_tensor(v) else v for k, v in kwargs.items()}
    with use_backend("reference"):
        truth = as_tuple(decode_boxes(points.double(), pred.double(), **double))
        eager = as_tuple(decode_boxes(points, pred, **kwargs))
    for name, *values in zip(got._fields, got, truth, eager, strict=True):
        assert len({value is None for value in values}) == 1, name
        if values[0] is None:
            continue
        if name == "labels":
            assert values[0].dtype == torch.int64
            assert torch.equal(values[0], values[1]), f"{what} labels"
        else:
            unit = 1.0 if name == "scores" else scale
            assert_no_worse(*values, what=f"{what} {name}", scale=unit)
    return got


# ---- the formula


def written_out(points, pred, y, strides, mode, window, image):
    """Boxes and standard deviations of [A, 4 K], a side after the other, in Python's floats."""
    boxes, spreads = [], []
    for a, (x, z) in enumerate(zip(points.tolist(), pred.unflatten(-1, (4, -1)), strict=True)):
        sides, deviations = [], []
        for side in z.tolist():
            e = torch.tensor(side, dtype=torch.float64).sub(max(side)).exp().tolist()
            p = [v / sum(e) for v in e]
            mean = sum(pk * yk for pk, yk in zip(p, y, strict=True))
            variance = sum(pk * (yk - mean) ** 2 for pk, yk in zip(p, y, strict=True))
            if mode == "peak":
                peak = side.index(max(side))
                near = [k for k in range(len(y)) if abs(k - peak) <= window]
                mean = sum(p[k] * y[k] for k in near) / sum(p[k] for k in near)
            sides.append(mean * strides[a])
            deviations.append(variance**0.5 * strides[a])
        box = [x[0] - sides[0], x[1] - sides[1], x[0] + sides[2], x[1] + sides[3]]
        if image is not None:
            high = [image[1], image[0]] * 2
            box = [min(max(v, 0.0), h) for v, h in zip(box, high, strict=True)]
        boxes.append(box)
        spreads.append(deviations)
    return torch.tensor(boxes, dtype=torch.float64), torch.tensor(spreads, dtype=torch.float64)


@pytest.mark.parametrize("mode, window", [("mean", 0), ("peak", 0), ("peak", 2), ("peak", 40)])
@pytest.mark.parametrize("bins", [None, (-2, 14, 1), "values"])
def test_formula(backend, mode, window, bins):
    pred = logits(11, 4 * 17, dtype=torch.float64, device=backend.device)
    points, strides = scene(11, device=backend.device)
    points, strides = points.double(), strides.double()
    given = torch.linspace(0, 1, 17, dtype=torch.float64) ** 2 * 30 if bins == "values" else bins
    y = {None: range(17), "values": given}.get(bins, range(-2, 15))
    if bins == "values":
        y, given = given.tolist(), given.to(backend.device)
    for image in (None, (60.0, 80.0)):
        boxes, spreads = written_out(points, pred, list(y), strides.tolist(), mode, window, image)
        got = decode_boxes(
            points, pred, strides=strides, bins=given, mode=mode, window=window, max_shape=image,
            return_uncertainty=True,
        )  # fmt: skip
        torch.testing.assert_close(got.boxes, boxes, rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(got.uncertainty, spreads, rtol=1e-9, atol=1e-6)


def test_mmdet(mmdet):  # noqa: F811
    """GFLHead's prediction: Integral, times the stride, distance2bbox."""
    pred, cls, (points, _) = logits(40, 68), logits(40, 80), scene(40)
    distances = mmdet.Integral(16).double()(pred.double()) * 8
    expected = mmdet.distance2bbox(points.double(), distances, (60, 80))
    out = decode_boxes(points, pred, reg_max=16, strides=8, max_shape=(60, 80), cls_logits=cls)
    torch.testing.assert_close(out.boxes.double(), expected, rtol=1e-5, atol=1e-3)
    scores, labels = cls.double().sigmoid().max(-1)
    torch.testing.assert_close(out.scores.double(), scores, rtol=1e-5, atol=1e-7)
    # Logits of +-1e4 saturate: the sigmoids tie where the logits do not.
    sure = cls.double().amax(-1) < 30
    assert torch.equal(out.labels[sure], labels[sure])


# ---- no worse than eager


@pytest.mark.parametrize(
    "layout", [name for name in LAYOUTS if name not in ("first", "negative_dim")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(backend, layout, dtype):
    widths = (17,) if INTERPRETED else (2, 8, 17, 33)
    for bins, mode in combinations(widths, ("mean", "peak")):
        laid = lay_out(layout, logits(2, 5, 7, 4 * bins, dtype=dtype, device=backend.device))
        cls = lay_out(layout, logits(2, 5, 7, 9, dtype=dtype, device=backend.device, seed=3))
        anchors = 35 if laid.dim == 1 else laid.row_shape[-1]
        points, strides = scene(anchors, device=backend.device)
        what = f"{layout} K={bins} {mode}"
        options = {"strides": strides, "mode": mode, "channel_dim": laid.dim, "what": what}
        check(points, laid.pred, **options)
        got = check(points, laid.pred, cls_logits=cls.pred, **EVERYTHING, **options)
        expected = (2, 35) if laid.dim == 1 else laid.row_shape
        assert got.boxes.shape == got.uncertainty.shape == (*expected, 4)
        assert got.scores.shape == got.labels.shape == expected


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("bins", [2, 17, 100] if INTERPRETED else [1, 2, 8, 16, 17, 33, 100])
def test_shapes(backend, dtype, bins):
    heights = (1, 67) if INTERPRETED else (1, 7, 8, 17, 257, 300)
    for anchors, mode in combinations(heights, ("mean", "peak")):
        pred = logits(anchors, 4 * bins, dtype=dtype, device=backend.device, seed=anchors)
        cls = logits(anchors, 1 + anchors % 90, dtype=dtype, device=backend.device, seed=1)
        points, strides = scene(anchors, device=backend.device)
        options = {"strides": strides, "mode": mode, "window": 1, "what": f"{anchors} x {bins}"}
        check(points, pred, cls_logits=cls, **EVERYTHING, **options)
        planes = pred.t().contiguous().unsqueeze(0)
        check(points, planes, cls_logits=cls.t().unsqueeze(0), channel_dim=1, **options)


def test_large(backend):
    """Several tiles and blocks."""
    anchors = 1500 if INTERPRETED else 44800
    pred, cls = logits(anchors, 68, device=backend.device), logits(anchors, 80)
    points, strides = scene(anchors, device=backend.device)
    check(points, pred, cls_logits=cls.to(backend.device), strides=strides, **EVERYTHING)


def test_dtypes_of_the_other_operands(backend):
    pred, (points, strides) = (
        logits(30, 68, device=backend.device),
        scene(30, device=backend.device),
    )
    for dtype in (torch.float64, torch.float16, torch.int64, torch.int32):
        check(points.to(dtype), pred, strides=strides.to(dtype), max_shape=torch.tensor([60, 50]))
    half = logits(30, 11, dtype=torch.bfloat16, device=backend.device)
    check(points, pred, cls_logits=half)
    check(points, pred.half(), cls_logits=half, bins=torch.arange(17).to(backend.device))


def test_strided_operands(backend):
    pred = logits(3, 20, 68, device=backend.device)
    wide = torch.full((20, 5), NAN, device=backend.device)
    wide[:, 1], wide[:, 3], wide[:, 4] = (t for t in torch.rand(3, 20).to(backend.device) * 9)
    check(wide[:, 1:4:2], pred, strides=wide[:, 4])
    check(wide[:, [1, 3]].t().contiguous().t(), pred, strides=torch.tensor(4.0))
    bins = torch.rand(17, 2, device=backend.device)[:, 0] * 16
    check(wide[:, 1:4:2], pred, bins=bins)


def test_an_image_each(backend):
    pred, (points, _) = logits(3, 20, 68, device=backend.device), scene(20, device=backend.device)
    images = torch.tensor([[50.0, 60.0], [INF, 40.0], [96.0, 1e9]], device=backend.device)
    got = check(points, pred, strides=16, max_shape=images)
    for i, (height, width) in enumerate(images.tolist()):
        alone = decode_boxes(points, pred[i], strides=16, max_shape=(height, width))
        assert torch.equal(got.boxes[i], alone)
    planes = pred.transpose(1, 2).unflatten(-1, (4, 5)).contiguous()
    again = decode_boxes(points, planes, strides=16, max_shape=images, channel_dim=1)
    torch.testing.assert_close(again, got.boxes, rtol=1e-6, atol=1e-4)


def test_points_of_every_image(backend):
    """D-FINE's reference points differ from query to query of each image."""
    pred = logits(2, 3, 10, 4 * 33, device=backend.device)
    points = torch.rand(2, 3, 10, 2, device=backend.device)
    got = check(points, pred, scale=33.0)
    assert torch.equal(got.boxes[1, 2], decode_boxes(points[1, 2], pred[1, 2]))


# ---- edges


@pytest.mark.parametrize("mode", ["mean", "peak"])
def test_nan_and_infinity_stay_in_their_row(backend, mode):
    clean = logits(40, 68, device=backend.device, extremes=False)
    cls = logits(40, 10, device=backend.device, extremes=False)
    points, strides = scene(40, device=backend.device)
    options = {"strides": strides, "mode": mode, **EVERYTHING}
    before = decode_boxes(points, clean, cls_logits=cls, **options)
    pred, wrong = clean.clone(), cls.clone()
    for row, k, value in ((3, 0, NAN), (3, 16, NAN), (17, 30, INF), (39, 67, NAN)):
        pred[row, k] = value
    pred[20, 17:34] = -INF
    wrong[3, 4], wrong[3, 7], wrong[39, 9], wrong[17, 2] = NAN, NAN, NAN, INF
    wrong[20] = -INF
    got = decode_boxes(points, pred, cls_logits=wrong, **options)
    touched = torch.tensor([3, 17, 20, 39], device=backend.device)
    others = torch.ones(40, dtype=torch.bool, device=backend.device)
    others[touched] = False
    for a, b in zip(got, before, strict=True):
        assert torch.equal(a[others], b[others])
    expected = torch.zeros(4, 4, dtype=torch.bool)
    for row, side in ((0, 0), (1, 1), (2, 1), (3, 3)):
        expected[row, side] = True
    for result in (got.boxes, got.uncertainty):
        assert torch.equal(result[touched].isnan(), expected)
        sound = ~expected.to(backend.device)
        assert result[touched][sound].isfinite().all()
    assert got.labels[touched].tolist() == [4, 2, 0, 9]
    assert got.scores[touched].isnan().tolist() == [True, False, False, True]
    assert got.scores[17] == 1 and got.scores[20] == 0


def test_ties_go_to_the_lowest(backend):
    cls = torch.zeros(21, 90, device=backend.device)
    cls[3, 5:] = 1.0
    cls[4, 89] = 1.0
    points, _ = scene(21, device=backend.device)
    z = torch.zeros(21, 68, device=backend.device)
    out = decode_boxes(points, z, cls_logits=cls, mode="peak", window=1)
    assert out.labels.tolist() == [0, 0, 0, 5, 89, *[0] * 16]
    # All bins are equal: the first is the peak, and the window 0 and 1.
    torch.testing.assert_close(out.boxes, torch.cat([points - 0.5, points + 0.5], -1))


def test_two_modes(backend):
    """The mean of two equal modes is where neither is; the peak is at one of them."""
    z = torch.full((1, 4, 17), -20.0, device=backend.device)
    z[..., 3], z[..., 13] = 5.0, 4.9
    point = torch.zeros(1, 2, device=backend.device)
    mean = decode_boxes(point, z.flatten(1), return_uncertainty=True)
    peak = decode_boxes(point, z.flatten(1), mode="peak", return_uncertainty=True)
    assert 7 < mean.boxes[0, 2] < 9 and 4.5 < mean.uncertainty[0, 0] < 5.5
    torch.testing.assert_close(peak.boxes[0], torch.tensor([-3.0, -3, 3, 3]))
    torch.testing.assert_close(peak.uncertainty, mean.uncertainty)


@pytest.mark.parametrize("shape", [(0, 68), (2, 0, 68), (0, 5, 68)])
def test_empty(backend, shape):
    pred, cls = torch.zeros(shape), torch.zeros(*shape[:-1], 3)
    points = torch.zeros(shape[-2], 2, device=backend.device)
    out = decode_boxes(
        points, pred.to(backend.device), cls_logits=cls.to(backend.device), **EVERYTHING
    )
    assert out.boxes.shape == out.uncertainty.shape == (*shape[:-1], 4)
    assert out.scores.shape == out.labels.shape == shape[:-1]
    assert out.labels.dtype == torch.int64


# ---- gradients, compilation, export


def test_gradients_come_from_plain_operations():
    pred = torch.randn(6, 4 * 5, dtype=torch.float64, requires_grad=True)
    points = torch.rand(6, 2, dtype=torch.float64)

    def everything(pred):
        out = decode_boxes(points, pred, mode="peak", window=1, return_uncertainty=True)
        return out.boxes, out.uncertainty

    assert torch.autograd.gradcheck(everything, (pred,))
    with torch.no_grad():
        assert not decode_boxes(points, pred).requires_grad
    flat = torch.full((6, 20), -1e4)
    flat[:, ::5] = 0  # certain: a standard deviation of 0, whose derivative would be 0 / 0
    flat.requires_grad_()
    decode_boxes(points, flat, return_uncertainty=True).uncertainty.sum().backward()
    assert torch.equal(flat.grad, torch.zeros(6, 20))


def test_a_forced_backend_has_no_gradient(fused):
    pred = torch.randn(6, 20, device=fused.device, requires_grad=True)
    points = torch.zeros(6, 2, device=fused.device)
    with pytest.raises(RuntimeError, match="no derivative .* for what it decodes"):
        decode_boxes(points, pred)
    with torch.no_grad():
        expected = decode_boxes(points, pred)
    assert torch.equal(decode_boxes(points, pred.detach()), expected)
    op = torch.ops.gfl_kernels.decode_boxes
    boxes = op(pred, points, None, None, None, None, 1.0, [], -1, False)[0]
    with pytest.raises(RuntimeError, match="decode_boxes is not differentiable"):
        boxes.sum().backward()


def test_opcheck(native):
    op = torch.ops.gfl_kernels.decode_boxes.default
    pred, cls = torch.randn(2, 4, 20), torch.randn(2, 4, 3)
    points, strides = torch.rand(2, 4, 2), torch.ones(2, 4)
    limits = torch.full((2, 4, 2), 9.0)
    every = (points, strides, torch.arange(5.0), cls, limits)
    for args in (
        (every[0], None, None, None, None, 2.0, [], -1, False),
        (*every, 1.0, [], 2, True),
    ):
        torch.library.opcheck(op, (pred, *args), test_utils=("test_schema", "test_faketensor"))


def test_compiles_in_one_graph(native):
    points, strides = scene(12)
    pred, cls = logits(2, 68, 3, 4), logits(2, 5, 3, 4, seed=1)

    def call(points, pred, strides, cls):
        return decode_boxes(
            points, pred, strides=strides, cls_logits=cls, channel_dim=1, **EVERYTHING
        )

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for a, b in zip(
            compiled(points, pred, strides, cls), call(points, pred, strides, cls), strict=True
        ):
            assert torch.equal(a, b)


def test_exports_plain_operations(native):
    class Head(torch.nn.Module):
        def forward(self, points, pred, cls):
            return tuple(decode_boxes(points, pred, strides=8.0, mode="peak", cls_logits=cls,
                                      channel_dim=1, **EVERYTHING))  # fmt: skip

    points, _ = scene(12)
    args = (points, logits(2, 68, 3, 4), logits(2, 5, 3, 4, seed=1))
    program = torch.export.export(Head(), args)
    assert not [n for n in program.graph.nodes if "gfl_kernels" in str(n.target)]
    for got, expected in zip(program.module()(*args), Head()(*args), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


# ---- wrong input


def test_errors():
    points, pred = torch.zeros(6, 2), torch.zeros(6, 68)
    cases = [
        (ValueError, "channel_dim must be 1 or -1, got 0", {"channel_dim": 0}),
        (ValueError, r"pred must have shape \[B, 4 K, A\]", {"channel_dim": 1}),
        (ValueError, r"4 \(reg_max \+ 1\) = 32 channels, got 68", {"reg_max": 7}),
        (ValueError, "mode must be mean or peak, got 'median'", {"mode": "median"}),
        (ValueError, "window must be >= 0, got -1", {"mode": "peak", "window": -1}),
        (ValueError, r"bins must have \(K,\) \(17,\), got \(16,\)", {"bins": torch.zeros(16)}),
        (ValueError, "do not match pred's 17", {"bins": (0, 17, 1)}),
        (TypeError, "bins must be a Tensor or .lower, upper, step., got tuple", {"bins": (0, 17)}),
        (ValueError, "step must be > 0, got 0", {"bins": (0, 16, 0)}),
        (TypeError, "bins' lower must be a number, got str", {"bins": ("0", 16, 1)}),
        (ValueError, r"strides must have shape \[A\] = \(6,\)", {"strides": torch.zeros(5)}),
        (TypeError, "strides must be a number or a Tensor, got str", {"strides": "8"}),
        (ValueError, r"max_shape must be \(height, width\)", {"max_shape": (1, 2, 3)}),
        (ValueError, r"\(height, width\) per image", {"max_shape": torch.zeros(3, 2)}),
        (ValueError, "pred's anchors, channels last", {"cls_logits": torch.zeros(5, 3)}),
        (TypeError, "floating dtype", {"cls_logits": torch.zeros(6, 3, dtype=torch.int32)}),
        (TypeError, "both be float64 or neither", {"cls_logits": torch.zeros(6, 3).double()}),
        (ValueError, "cls_logits must have at least one", {"cls_logits": torch.zeros(6, 0)}),
    ]
    for error, message, kwargs in cases:
        with pytest.raises(error, match=f"decode_boxes: .*{message}"):
            decode_boxes(points, pred, **kwargs)
    with pytest.raises(ValueError, match=r"points must have shape \[A, 2\] = \(6, 2\), got"):
        decode_boxes(torch.zeros(5, 2), pred)
    with pytest.raises(ValueError, match="4 K channels"):
        decode_boxes(points, torch.zeros(6, 67))
    with pytest.raises(TypeError, match="pred must be a Tensor, got list"):
        decode_boxes(points, [1.0])


def test_a_range_of_bins_is_what_the_integral_takes_too(backend):
    """PP-YOLOE's reg_range (-2, 17): 19 bins from -2 to 16."""
    z = logits(12, 19, device=backend.device)
    values = torch.arange(-2.0, 17.0, device=backend.device)
    got = gfl_kernels.integral(z, bins=(-2, 16, 1))
    torch.testing.assert_close(got, gfl_kernels.integral(z, bins=values), rtol=1e-6, atol=1e-6)
