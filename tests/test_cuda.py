"""The CUDA C++ kernels without a GPU: what nvcc makes of them, launched on ptxsim as the compiled
library would launch it on a GPU.

Every argument lies far from the others, so that an access out of bounds is a fault; so is shared
memory in which warps meet with no barrier between them; approximate instructions err as much as
their documentation allows.
"""

import itertools

import pytest
import torch
from compiled_cases import (  # noqa: F401
    PYRAMID,
    probabilities,
    test_decode,
    test_decode_moves_every_byte_once,
    test_decode_planes,
    test_distillation,
    test_distillation_moves_every_byte_once,
    test_distribution,
    test_distribution_bins,
    test_distribution_explicit_weights_and_layouts,
    test_family,
    test_head,
    test_head_task_aligned,
    test_head_varifocal_gamma,
    test_integral,
    test_integral_of_given_bins,
    test_moments,
    test_peak,
    test_quality_beta,
    test_quality_dense_with_weights,
    test_quality_float64,
    test_quality_layouts,
    test_quality_odd_classes,
    test_quality_probabilities,
    test_quality_probabilities_of_many_classes,
    test_quality_rows_that_begin_anywhere,
    test_quality_sparse,
    test_statistics,
    test_statistics_bins,
    test_summaries_in_other_dtypes,
    test_summaries_layouts,
    test_summaries_move_what_they_must,
)
from support import (
    FAMILY,
    FLOATS,
    INTERPRETED,
    LAYOUTS,
    bin_target,
    check_op,
    dense_target,
    explicit_target,
    lay_out,
    logits,
    row_weight,
    sparse_target,
)
from test_head import LAYOUTS as HEAD_LAYOUTS
from test_head import aligned, check, head_arguments, one_level, scene
from torch._subclasses.fake_tensor import FakeTensorMode

import gfl_kernels
from gfl_kernels import dispatch, native

ptxsim = pytest.importorskip("ptxsim", reason="tests/ptxsim needs numpy")
import cuda_device  # noqa: E402
from cuda_device import SimulatedCuda, plan, why_not  # noqa: E402

QUALITY = gfl_kernels.quality_focal_loss
DISTRIBUTION = gfl_kernels.distribution_focal_loss
INTEGRAL = gfl_kernels.integral
HEAD = gfl_kernels.gfl_loss


_reason = "TRITON_INTERPRET=1: nothing is compiled" if INTERPRETED else why_not()
pytestmark = pytest.mark.skipif(_reason is not None, reason=str(_reason))


@pytest.fixture(params=[("nearest", "forward"), ("worst", "lockstep")], ids="-".join)
def compiled(request):
    approx, order = request.param
    with SimulatedCuda(approx=approx, order=order) as device:
        yield device


@pytest.fixture
def compiled_once():
    """For what hardly depends on how instructions approximate, or on the order of warps."""
    with SimulatedCuda(approx="worst") as device:
        yield device


def kernels_of(device):
    return [launch.name.decode() for launch in device.launches]


# bfloat16 and float16 have one kernel, which tests of FLOATS run with both.
ONE_HALF = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", FLOATS)
def test_quality_planes(compiled_once, dtype):
    """NCHW with vectors of rows, and with a number of pixels that no vector divides."""
    for height, width in ((8, 36), (5, 7)):
        laid = lay_out("nchw", logits(2, height, width, 20, dtype=dtype))
        target = sparse_target(laid.row_shape, 20)
        weight = row_weight(laid.row_shape)
        check_op("quality", laid.pred, target, class_dim=1, weight=weight, avg_factor=9.0)
        check_op("quality", laid.pred, target, class_dim=1, reduction="none")
        dense = dense_target((2, height, width), 20).movedim(-1, 1).contiguous()
        check_op("quality", laid.pred, dense, class_dim=1, weight=weight, reduction="sum")
    assert not [name for name in kernels_of(compiled_once) if "general" in name]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("target_dtype", [torch.float32, None, torch.float64])
def test_quality_dense(compiled_once, dtype, target_dtype):
    x = logits(70, 24, dtype=dtype)
    target = dense_target((70,), 24, dtype=target_dtype or dtype)
    check_op("quality", x, target, weight=row_weight((70,)), reduction="none")
    misaligned = lay_out("misaligned", logits(1, 1, 70, 24, dtype=dtype)).pred
    check_op("quality", misaligned, target, avg_factor=3.0)


@pytest.mark.parametrize("dtype", ONE_HALF)
@pytest.mark.parametrize("layout", ["contiguous", "misaligned", "width_cropped", "nchw"])
def test_quality_of_probabilities_in_vectors(compiled_once, dtype, layout):
    """Rows and planes of them, with whole vectors and with ends; rows of weight 0 are not read."""
    for height, width, classes in ((4, 8, 24), (5, 7, 19)):
        laid = lay_out(layout, probabilities(2, height, width, classes, dtype=dtype))
        weight = row_weight(laid.row_shape)
        laid.pred.movedim(laid.dim, -1)[weight == 0] = float("nan")
        dense = dense_target((*laid.row_shape,), classes).movedim(-1, laid.dim).contiguous()
        # 1 / max(p (1 - p), 1e-12) is in the gradient.
        options = {"weight": weight, "activated": True, "class_dim": laid.dim}
        options |= {"scale": 100.0, "grad_scale": 1e12}
        check_op("quality", laid.pred, sparse_target(laid.row_shape, classes), **options)
        check_op("quality", laid.pred, dense, reduction="none", **options)
    assert not [name for name in kernels_of(compiled_once) if "general" in name]


LOGIT_FORMS = [name for name, (_, kwargs) in FAMILY.items() if "activated" not in kwargs]


@pytest.mark.parametrize("name", LOGIT_FORMS)
def test_family_in_vectors(name):
    """Rows with whole vectors and with ends, planes with vectors of rows and without, which are
    kernels of all forms: of each form a dtype and two layouts."""
    op, kwargs = FAMILY[name]
    number = LOGIT_FORMS.index(name)
    dtype = FLOATS[number % 3]
    layouts = (
        (("contiguous", (2, 8, 24), True), ("nchw", (4, 16, 5), False)),
        (("misaligned", (3, 5, 43), False), ("nchw", (3, 5, 5), True)),
    )
    with SimulatedCuda(approx="worst") as device:
        for layout, size, dense in layouts[number % 2]:
            laid = lay_out(layout, logits(1, *size, dtype=dtype))
            target = sparse_target(laid.row_shape, size[-1])
            if dense:
                target = dense_target(laid.row_shape, size[-1]).movedim(-1, laid.dim).contiguous()
            options = {"class_dim": laid.dim, "reduction": "mean", "avg_factor": 5.0} | kwargs
            weight = row_weight(laid.row_shape)
            check_op(op, laid.pred, target, weight=weight, grad_scale=20.0, what=layout, **options)
        assert not [kernel for kernel in kernels_of(device) if "general" in kernel]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(compiled_once, layout):
    laid = lay_out(layout, logits(2, 3, 5, 17))
    target = sparse_target(laid.row_shape, 17)
    check_op("quality", laid.pred, target, class_dim=laid.dim, avg_factor=7.0, what=layout)
    weight = row_weight(laid.row_shape)
    position = bin_target(laid.row_shape, 17)
    check_op("distribution", laid.pred, position, bin_dim=laid.dim, weight=weight, avg_factor=7.0)
    check_op("integral", laid.pred, bin_dim=laid.dim, scale=17.0)


@pytest.mark.parametrize("label_dtype", [torch.int32, torch.uint8, torch.int16, torch.float32])
def test_label_and_score_dtypes(compiled_once, label_dtype):
    label, score = sparse_target((40,), 8, label_dtype=label_dtype, score_dtype=torch.float64)
    check_op("quality", logits(40, 8), (label, score), reduction="none")


@pytest.mark.parametrize("bins", [*range(2, 17, 7), 32, 63, 64, 129, 4000])
def test_any_number_of_bins(compiled_once, bins):
    rows = 9 if bins > 64 else 70
    for dtype in (torch.float32, torch.float16 if bins % 2 else torch.float64):
        x = logits(rows, bins, dtype=dtype)
        target = explicit_target((rows,), bins)
        check_op("distribution", x, target, weight=row_weight((rows,)), reduction="none")
        values = torch.linspace(-2, 2, bins)
        check_op("integral", x, bins=values, scale=2.0)


@pytest.mark.parametrize("dtype", ONE_HALF)
def test_tiles_of_many_bins(compiled_once, dtype):
    """A tile has several rows of each thread, or several threads of each row, and rows whose begin
    is a vector or is not; the last tile is never full."""
    shapes = (1029, 4), (1029, 5), (523, 8), (391, 12), (261, 16), (150, 36), (70, 64)
    for i, (rows, bins) in enumerate(shapes, start=ONE_HALF.index(dtype)):
        x = logits(rows, bins, dtype=dtype)
        weight = row_weight((rows,))
        x[weight == 0] = float("nan")
        target = bin_target((rows,), bins)
        if i % 2:
            x = lay_out("misaligned", x.view(1, 1, rows, bins)).pred
        check_op("distribution", x, target, weight=weight, avg_factor=9.0, what=f"{bins}")
        check_op("distribution", logits(rows, bins, dtype=dtype), target, reduction="none")
    assert not [name for name in kernels_of(compiled_once) if "general" in name]


@pytest.mark.parametrize("bins", [2, 33, 160, 161])
def test_distillation_bins(bins):
    """In the registers of one thread or of a warp, and more than these have."""
    student, teacher = (logits(11, bins, seed=seed) for seed in (0, 7))
    with SimulatedCuda(approx="worst"):
        options = {"scale": 100.0, "grad_scale": 20.0, "reduction": "none"}
        check_op("distillation", student, teacher, bin_reduction="sum", **options)


@pytest.mark.parametrize("bins", [8, 17, 64])
def test_distribution_planes(compiled_once, bins):
    for height, width in ((8, 36), (5, 7)):
        for dtype in FLOATS:
            laid = lay_out("nchw", logits(1, height, width, bins, dtype=dtype))
            target = bin_target(laid.row_shape, bins)
            weight = row_weight(laid.row_shape)
            check_op("distribution", laid.pred, target, bin_dim=1, weight=weight, avg_factor=3.0)
    assert not [name for name in kernels_of(compiled_once) if "general" in name]


def test_more_row_dimensions_than_three(compiled_once):
    wide = torch.full((3, 4, 3, 4, 3, 10), float("nan"))
    x = wide[:, :3, :, :3, :, 2:10]
    x.copy_(logits(3, 3, 3, 3, 3, 8))
    check_op("quality", x, sparse_target(x.shape[:-1], 8), reduction="none")
    check_op("distribution", x, bin_target(x.shape[:-1], 8), reduction="none")


def test_loss_and_gradient_in_one_launch(compiled_once):
    """write_grad, which functional.py asks of the CPU backend alone."""
    x, (label, score) = logits(66, 20), sparse_target((66,), 20)
    for laid in (x, x.t().contiguous().t()):
        rest = (None, None, 0, 0, 0.0, 2.0, 0.5, 1, True)
        loss, grad = compiled_once.quality_forward(laid, label, score, *rest)
        leaf = laid.double().requires_grad_()
        with gfl_kernels.use_backend("reference"):
            truth = QUALITY(leaf, (label, score), reduction="sum") * 0.5
        truth.backward()
        torch.testing.assert_close(loss.double(), truth.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grad.double(), leaf.grad, rtol=2e-5, atol=1e-6)


def test_agrees_with_the_cpu_kernels():
    x, target = logits(130, 80), sparse_target((130,), 80)
    z, position = logits(130, 17), bin_target((130,), 17)
    calls = [
        (x, lambda leaf: QUALITY(leaf, target, reduction="none")),
        (x, lambda leaf: QUALITY(leaf, target, beta=1.5)),
        (z, lambda leaf: DISTRIBUTION(leaf, position, reduction="none")),
        (z, INTEGRAL),
    ]

    def results():
        for values, call in calls:
            leaf = values.clone().requires_grad_()
            value = call(leaf)
            value.sum().backward()
            yield from (value.detach(), leaf.grad)

    with SimulatedCuda():
        got = list(results())
    with gfl_kernels.use_backend("cpu"):
        expected = list(results())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-6, atol=5e-6)


def test_empty(compiled_once):
    x = torch.zeros(0, 80, requires_grad=True)
    loss = QUALITY(x, (torch.zeros(0, dtype=torch.int64), torch.zeros(0)), avg_factor=1.0)
    loss.backward()
    assert loss == 0 and x.grad.shape == (0, 80)
    assert INTEGRAL(torch.zeros(0, 17)).shape == (0,)
    assert compiled_once.launches == []


def test_repeats_bit_for_bit():
    """A sum of several blocks; the order of warps does not change it."""
    x, target = logits(3000, 80), sparse_target((3000,), 80)
    z, position = logits(3001, 17), bin_target((3001,), 17)
    sums = []
    for order in ("forward", "reverse", "lockstep"):
        with SimulatedCuda(order=order) as device:
            sums.append((QUALITY(x, target).item(), DISTRIBUTION(z, position).item()))
            assert device.launches[0].grid > 1
    assert len(set(sums)) == 1


def test_memory_traffic():
    """Nothing is read twice; every logit of an aligned tensor moves in 16-byte accesses; rows of
    weight 0 are not read."""
    for dtype in (torch.float32, torch.bfloat16):
        with SimulatedCuda() as device:
            x = logits(1024, 80, extremes=False, dtype=dtype).requires_grad_()
            planes = lay_out("nchw", logits(1, 32, 32, 80, extremes=False, dtype=dtype)).pred
            label, score = sparse_target((1024,), 80)
            QUALITY(x, (label, score), avg_factor=torch.tensor(100.0)).backward()
            target = label.view(1, 32, 32), score.view(1, 32, 32)
            QUALITY(planes.requires_grad_(), target, class_dim=1).backward()
            z = logits(1024, 17, extremes=False, dtype=dtype).requires_grad_()
            DISTRIBUTION(z, bin_target((1024,), 17)).backward()
            INTEGRAL(z).sum().backward()
            p = x.detach().sigmoid().requires_grad_()
            QUALITY(p, (label, score), activated=True).backward()
            for bins in (8, 16):  # rows of whole vectors
                y = logits(1024 * 17 // bins, bins, extremes=False, dtype=dtype).requires_grad_()
                DISTRIBUTION(y, bin_target((len(y),), bins)).backward()
            launches = zip(device.reports, kernels_of(device), strict=True)
            reports = [report for report, name in launches if name != "finish_kernel<0>"]
            assert len(reports) == 14
            for i, report in enumerate(reports):
                size = (x, x, x, x, z, z, z, z, p, p)[i].nbytes if i < 10 else z.nbytes
                assert report.traffic("pred").read_bytes == size
                assert report.traffic("pred").wide_share(16) == 1
                if i % 2:
                    assert report.traffic("grad").written_bytes == size
                    assert report.traffic("grad").wide_share(16) == 1

            device.reports.clear()
            weight = torch.zeros(1024)
            weight[504:544] = 1
            DISTRIBUTION(z, bin_target((1024,), 17), weight=weight, avg_factor=40.0).backward()
            forward, _, backward = device.reports
            assert forward.traffic("pred").read_bytes == 40 * 17 * z.element_size()
            assert backward.traffic("grad").written_bytes == z.nbytes


# NVIDIA apex's fused focal loss, loss and gradient in one pass: PTX lane instructions per logit, by
# the same count.
APEX = {torch.float32: 93, torch.float16: 89}


@pytest.mark.parametrize("dtype", APEX)
def test_instructions(dtype):
    """At most half of apex's, and so few that an H100 waits for its memory, which moves no more
    than it has to.
    """
    rows = 32768
    x = logits(rows, 80, extremes=False, dtype=dtype)
    label, score = sparse_target((rows,), 80)
    label[torch.rand(rows) > 0.06] = 80  # leaves one row in fifty
    with SimulatedCuda() as device:
        device.quality_forward(x, label, score, None, None, 0, 0, 0.0, 2.0, 1.0, 1, True)
    report = device.reports[0]
    assert report.warp_instructions * 32 / x.numel() <= APEX[dtype] / 2
    assert report.roofline("h100").bound_by == "dram"
    least = 2 * x.nbytes + label.nbytes + score.nbytes
    assert report.dram_bytes_read + report.dram_bytes_written <= 1.03 * least


def resources_of(name):
    try:
        return cuda_device.resources(name)
    except ptxsim.PtxSimError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("dtype", [0, 3])  # a kernel for both half formats
def test_registers(dtype):
    """64 of them and nothing spilled in what a training step runs: forward and backward."""
    names = [f"quality_kernel<{dtype}, {variant}>" for variant in (1, 2, 3, 5, 6, 7, 9, 10)]
    names += [f"quality_kernel<{dtype}, {16 + variant}>" for variant in (1, 2, 5, 6, 9, 10)]
    names += [f"quality_kernel<{dtype}, {32 + variant}>" for variant in (2, 6, 10)]
    names += [f"distribution_kernel<{dtype}, {bins}>" for bins in (0, 1, 8, 16, 17, 33)]
    for name in names:
        used = resources_of(name)
        most = 80 if name.endswith(", 33>") else 64  # a whole row, too
        assert used["REG"] <= most and used["STACK"] == used["LOCAL"] == 0, (name, used)


def test_odd_rows_move_in_vectors_too():
    with SimulatedCuda() as device:
        x = logits(512, 365, extremes=False).requires_grad_()
        QUALITY(x, sparse_target((512,), 365)).backward()
    for report in (device.reports[0], device.reports[2]):
        assert report.traffic("pred").read_bytes == x.nbytes
        assert report.traffic("pred").wide_share(16) > 0.97


# Heads. test_head, test_head_task_aligned and test_head_varifocal_gamma are in compiled_cases.py.


@pytest.mark.parametrize("layout", HEAD_LAYOUTS)
def test_head_layouts(compiled_once, layout):
    """Of some levels rows are aligned to vectors, of others not."""
    s = scene(sizes=((8, 6), (4, 4), (3, 1)), classes=8, reg_max=7)
    s.cls, s.box = ([HEAD_LAYOUTS[layout](t) for t in level] for level in (s.cls, s.box))
    points, labels, targets = s.others
    split = [t.shape[1] for t in labels]  # views of one tensor for all levels
    labels, targets = (torch.cat(t, dim=1).split(split, dim=1) for t in (labels, targets))
    s.others = points, labels, targets
    if layout != "one_image_expanded":  # not a layout a gradient can have
        check(s)
        return
    whole = [t.contiguous() for t in (*s.cls, *s.box)]
    got, expected = (
        HEAD(s.cls, s.box, *s.others, **s.options),
        HEAD(whole[:3], whole[3:], *s.others, **s.options),
    )
    torch.testing.assert_close(got[:3], expected[:3], rtol=1e-6, atol=0)


@pytest.mark.parametrize("iou", ["iou", "giou", "diou", "ciou"])
def test_head_box_losses(compiled_once, iou):
    check(scene(iou=iou, classes=3, positives=0.5))


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float64, "iou": "ciou"},
        {"dtype": torch.float16},
        {"dtype": torch.bfloat16, "box_dtype": torch.float32},
        {"beta": 0.0},
        {"beta": 0.5},
        {"beta": 3.0, "dtype": torch.float16},
        {"classes": 1, "reg_max": 1},
        {"classes": 81, "reg_max": 40, "sizes": ((1, 1),), "strides": (12.5,)},
        {"sizes": ((0, 4), (40, 33)), "strides": (8, 16), "batch": 3},
    ],
    ids=str,
)
def test_head_options(compiled_once, options):
    check(scene(loss_weights=(0.7, 1.3, 0.5), **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("options", [{}, {"varifocal": True}, {"beta": 2.0}], ids=str)
def test_head_task_aligned_layouts(compiled_once, dtype, options):
    """Planes of logits beside rows of targets; box and class logits as channels of one tensor."""
    cls, box, *others = aligned(classes=8, anchors=96, dtype=dtype)
    planes = [t.transpose(1, 2).contiguous() for t in (cls, box)]
    s, function = one_level(*planes, *others, channel_dim=1, **options)
    check(s, function=function)
    joint = torch.cat([box, cls], dim=-1)
    s, function = one_level(joint[..., 64:], joint[..., :64], *others, **options)
    check(s, function=function)


@pytest.mark.parametrize("scores", [torch.float64, torch.bfloat16])
def test_head_target_dtypes(compiled_once, scores):
    cls, box, points, targets, *others = aligned()
    s, function = one_level(cls, box, points, targets.to(scores), *others)
    check(s, function=function)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.float32])
def test_head_label_dtypes(compiled_once, dtype):
    s = scene()
    points, labels, targets = s.others
    expected = HEAD(s.cls, s.box, *s.others, **s.options)
    got = HEAD(s.cls, s.box, points, [t.to(dtype) for t in labels], targets, **s.options)
    assert all(torch.equal(a, b) for a, b in zip(got[:6], expected[:6], strict=True))


def head_step(s, **options):
    leaves = [t.detach().requires_grad_() for t in (*s.cls, *s.box)]
    count = len(s.cls)
    out = HEAD(leaves[:count], leaves[count:], *s.others, **s.options, **options)
    return out, torch.autograd.grad(sum(out[:3]), leaves)


def test_head_agrees_with_the_cpu_kernels():
    calls = [scene(classes=80, **PYRAMID), scene(beta=1.5, iou="ciou", dtype=torch.bfloat16)]

    def results():
        for s in calls:
            out, grads = head_step(s, return_boxes=True)
            strides = zip(s.others[0], s.options["strides"], strict=True)
            strides = torch.cat([torch.full((len(points), 1), float(x)) for points, x in strides])
            # Boxes are in pixels, and computed in units of the stride.
            yield from (t.detach() for t in (*out[:6], out.boxes / strides, out.iou, *grads))

    with SimulatedCuda():
        got = list(results())
    with gfl_kernels.use_backend("cpu"):
        expected = list(results())
    for a, b in zip(got, expected, strict=True):
        rtol = 2**-8 if a.dtype == torch.bfloat16 else 5e-6
        torch.testing.assert_close(a, b, rtol=rtol, atol=5e-6)


@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
def test_head_does_not_read_what_does_not_count(compiled_once, layout):
    """Box logits and targets of negatives, logits of anchors with weight 0: NaN, and no NaN comes
    out."""
    s = scene(sizes=((8, 6), (5, 3)), strides=(8, 16))
    for i, (label, weight) in enumerate(zip(s.others[1], s.options["label_weights"], strict=True)):
        shape = s.box[i].shape[0], 1, *s.box[i].shape[2:]
        negative = ~((label >= 0) & (label < 5))
        s.box[i] = s.box[i].masked_fill(negative.view(shape), float("nan"))
        s.others[2][i][negative] = float("nan")
        # Scores of positives are their weight.
        unread = negative & (weight == 0)
        assert unread.any()
        s.cls[i] = s.cls[i].masked_fill(unread.view(shape), float("nan"))
    if layout != "nchw":
        s.cls, s.box = ([HEAD_LAYOUTS[layout](t) for t in level] for level in (s.cls, s.box))
    out, grads = head_step(s, return_boxes=True)
    for t in (*out, *grads):
        assert bool(t.isfinite().all())
    for i, label in enumerate(s.others[1]):
        negative = ~((label >= 0) & (label < 5))
        grad = grads[2 + i].movedim(1, -1).flatten(1, 2)
        assert float(grad[negative].abs().max()) == 0.0 < float(grad[~negative].abs().max())


def test_head_repeats_bit_for_bit():
    s = scene(batch=3, sizes=((40, 33), (9, 9)), strides=(8, 16), classes=20, positives=0.1)
    results = []
    for order in ("forward", "reverse", "lockstep"):
        with SimulatedCuda(order=order) as device:
            out, grads = head_step(s)
            results.append((*out[:6], *grads))
            assert device.launches[0].grid > 30
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_head_empty_batch(compiled_once):
    out, grads = head_step(scene(batch=0), return_boxes=True)
    assert [float(loss.detach()) for loss in out[:3]] == [0.0] * 3
    assert out.boxes.shape == (0, 89, 4) and all(g.numel() == 0 for g in grads)
    finishing = ["head_boxes_finish_kernel<0>", "head_losses_kernel<0>"]
    assert kernels_of(compiled_once) == finishing


def test_head_gradient_with_the_losses(compiled_once):
    """write_grad, which head.py asks of the CPU backend alone."""
    lists, box, assessed = head_arguments(scene())
    rest = (*lists, *assessed, *box, 0, 0.0, 2.0, [1.0, 2.0, 0.25])
    *losses, grads = compiled_once.head_forward(*rest, True)
    one = torch.ones(())
    expected = compiled_once.head_backward(one, one, one, None, None, None, *rest)
    assert all(bool(loss.isfinite().all()) for loss in losses)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_head_checks_what_memory_safety_needs(compiled_once):
    lists, box, _ = head_arguments(scene())
    launched = len(compiled_once.launches)
    for i in range(5):
        for wrong in (
            [t[:, :1] for t in lists[i]],
            [t[:1] for t in lists[i]],
            [t.unsqueeze(0) for t in lists[i]],
            [lists[i][0], *(t.to(torch.int8) for t in lists[i][1:])],
        ):
            changed = [*lists]
            changed[i] = wrong
            with pytest.raises(ValueError, match="^gfl_head"):
                compiled_once.head_boxes(*changed, *box, False)
    assert len(compiled_once.launches) == launched


def test_head_beyond_2_to_31_elements():
    """Images that lie so far apart: memory that nobody touches but where they are."""
    s = scene(sizes=((4, 4),), strides=(8,), dtype=torch.bfloat16)
    far = (1 << 31) + 64
    memory = torch.empty(far + 16 * (5 + 68), dtype=torch.bfloat16)
    cls = memory.as_strided((2, 5, 4, 4), (far, 16, 4, 1))
    box = memory.as_strided((2, 68, 4, 4), (far, 16, 4, 1), 5 * 16)
    with SimulatedCuda():
        expected = HEAD(s.cls, s.box, *s.others, **s.options)
        got = HEAD([cls.copy_(s.cls[0])], [box.copy_(s.box[0])], *s.others, **s.options)
    assert all(torch.equal(a, b) for a, b in zip(got[:6], expected[:6], strict=True))


@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
def test_head_launches_and_memory(layout):
    """Four launches forward and two backward for five levels; every class logit read once a pass,
    of boxes those of positives alone; gradients written once, in 16-byte accesses but for the
    positives; nothing but partial sums beside that."""
    s = scene(
        classes=80, sizes=((40, 48), (20, 24), (10, 12), (4, 6), (2, 4)), positives=0.02,
        strides=PYRAMID["strides"],
    )  # fmt: skip
    if layout != "nchw":
        s.cls, s.box = ([HEAD_LAYOUTS[layout](t) for t in level] for level in (s.cls, s.box))
    del s.options["label_weights"]
    with SimulatedCuda() as device:
        head_step(s)
        boxes, boxes_finish, forward, losses, backward, box_grad = device.reports
    anchors = sum(t.numel() for t in s.others[1])
    masks = [(t >= 0) & (t < 80) for t in s.others[1]]
    positives = sum(int(mask.sum()) for mask in masks)
    assert 10 < positives < anchors / 20

    def moved(report, name):
        """Bytes read and written of a list of levels, and the share in 16-byte accesses."""
        parts = [t for t in report.allocations if t.name.partition(".")[0] == name]
        bytes_ = [sum(t.read_bytes for t in parts), sum(t.written_bytes for t in parts)]
        wide = sum(t.wide_share(16) * (t.read_bytes + t.written_bytes) for t in parts)
        return *bytes_, wide / sum(bytes_)

    logits, bins = anchors * 80 * 4, 68 * 4
    assert moved(forward, "cls") == moved(backward, "cls") == (logits, 0, 1)
    assert moved(backward, "grad_cls") == (0, logits, 1)
    assert moved(box_grad, "grad_box")[:2] == (0, anchors * bins)
    assert moved(box_grad, "grad_box")[2] > 0.9
    labels, value = 8 * anchors, 4 * anchors
    # In sectors of 32 bytes. In NCHW eight neighbours share those of every channel.
    if layout == "nchw":
        eights = sum(int(mask.view(2, -1, 8).any(-1).sum()) for mask in masks)
        bins_read, scores_read = eights * 32 * 68, eights * 32 * 80
    else:
        bins_read, scores_read = positives * 288, positives * 80 * 4
    target, point = positives * 32, positives * 32
    read = bins_read + scores_read + target + point + labels
    minimum = (
        (boxes, read + 2 * value),
        (forward, logits + labels + value),
        (backward, 2 * logits + labels + value),
        (box_grad, anchors * bins + labels + bins_read + target + point),
    )
    for report, needed in minimum:
        dram = report.dram_bytes_read + report.dram_bytes_written
        assert dram <= 1.05 * needed, (report.kernel, dram, needed)
    for report in (boxes_finish, losses):
        assert report.dram_bytes_read + report.dram_bytes_written < 4096


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_odd_rows_move_in_vectors_too(compiled_once, dtype):
    s = scene(sizes=((6, 5), (2, 3)), strides=(8, 16), classes=365, reg_max=3, dtype=dtype)
    s.cls, s.box = ([HEAD_LAYOUTS["channels_last"](t) for t in level] for level in (s.cls, s.box))
    check(s)
    _, _, forward, _, backward, _ = compiled_once.reports
    for report, name in ((forward, "cls.0"), (backward, "cls.0"), (backward, "grad_cls.0")):
        assert report.traffic(name).wide_share(16) > 0.95
    cls, box, *others = aligned(classes=19, dtype=dtype)
    s, function = one_level(cls, box, *others)
    check(s, function=function)


@pytest.mark.parametrize("dtype", [0, 3])
def test_head_registers(dtype):
    for form, layout, part in itertools.product((0, 20, 36), (0, 8), (1, 2)):
        name = f"head_class_kernel<{dtype}, {form | layout | part}>"
        used = resources_of(name)
        assert used["REG"] <= 64 and used["STACK"] == used["LOCAL"] == 0, (name, used)


class Described:
    """What a plan sees of a tensor, without memory."""

    def __init__(self, *shape, dtype=torch.float32, address=1 << 30):
        self.meta, self.address = torch.empty(shape, dtype=dtype, device="meta"), address
        self.shape, self.dtype, self.stride = self.meta.shape, dtype, self.meta.stride
        self.dim = self.meta.dim

    def data_ptr(self):
        return self.address

    def permute(self, *dims):
        self.meta = self.meta.permute(dims)
        self.shape, self.stride = self.meta.shape, self.meta.stride
        return self


def test_plans_of_large_problems():
    """More than 2^31 elements and rows: the grid is bounded; what needs more than 32 bits for the
    number of a row is left to the kernels that have them."""
    workspace = torch.empty(4096, dtype=torch.float64)

    def first(family, pred, rows, **tensors):
        numbers = {"beta": 2.0, "scale": 1.0} if family == "quality" else {"scale": 1.0}
        tensors |= {"target": Described(*rows, dtype=torch.int64), "loss": Described()}
        launch, finish = plan(family, workspace, numbers, pred=pred, **tensors)
        assert 0 < launch.grid <= 4096 and finish.grid == 1
        return launch.name.decode()

    rows, many = (1 << 30,), (1 << 16, (1 << 16) + 1)
    score = {"score": Described(*rows)}
    assert first("quality", Described(*rows, 80), rows, **score) == "quality_kernel<0, 1>"
    score = {"score": Described(*many)}
    planes = Described(many[0], 20, many[1]).permute(0, 2, 1)
    assert first("quality", planes, many, **score) == "quality_general_kernel<0>"
    assert first("quality", Described(*many, 80), many, **score) == "quality_general_kernel<0>"
    assert first("distribution", Described(*rows, 17), rows) == "distribution_kernel<0, 17>"
    assert first("distribution", Described(*many, 17), many) == "distribution_general_kernel<0>"


def test_plans_of_heads():
    """The levels fit into the parameters of a launch; more than 2^31 elements are no obstacle, more
    levels than there is room for and lists of several dtypes are refused."""

    def launches(levels, cells, classes=80, dtypes=(torch.float32,)):
        def level(*shape, dtype=torch.float32):
            return [Described(*shape, dtype=dtype)] * levels

        lists = [
            level(2, cells, classes),
            level(2, cells, 68),
            level(cells, 2),
            level(2, cells, dtype=torch.int64),
            level(2, cells, 4),
            [],
            [Described(2, cells, dtype=dtypes[i % len(dtypes)]) for i in range(levels)],
        ]
        workspace = torch.empty(1, dtype=torch.float64)
        joint = {
            "quality": Described(2, levels * cells),
            "weight": Described(2, levels * cells),
            "sums": Described(levels, 2),
            "normalisers": Described(2),
        }
        arguments = cuda_device.head_arguments(lists, ([8.0] * levels, 1, 1e-6, 15.9), **joint)
        return cuda_device.plan_head("gfl_head_boxes_cuda", arguments, workspace)

    for levels in (1, 5, 12):
        boxes, finish = launches(levels, 1000)
        assert boxes.grid == levels * 2 * 8 and finish.grid == 1
        last = boxes.arguments[boxes.count - 1]
        assert last.offset + last.size <= 4096
    assert launches(2, 1 << 26)[0].grid == 2 * 2 * (1 << 26) // 128
    with pytest.raises(ValueError, match="gfl_head_boxes_cuda: at most 12 levels, got 13"):
        launches(13, 10)
    with pytest.raises(ValueError, match="one dtype in all levels"):
        launches(2, 10, dtypes=(torch.float32, torch.float64))
    with pytest.raises(ValueError, match="at least one class|no classes"):
        launches(2, 10, classes=0)


def test_fake_tensors_end_to_end(monkeypatch):
    """device="cuda" without a device: through the public functions and the library's own ops."""
    monkeypatch.setattr(dispatch, "_why_not", lambda name: "not here" if name == "triton" else None)
    with FakeTensorMode():
        x = torch.zeros(33, 80, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        z = torch.zeros(33, 17, device="cuda", requires_grad=True)
        label = torch.zeros(33, dtype=torch.int64, device="cuda")
        row = torch.zeros(33, device="cuda")
        assert dispatch.choose("quality_focal_loss", x) == "cuda"
        for loss in (QUALITY(x, (label, row)), DISTRIBUTION(z, row, reduction="none"), INTEGRAL(z)):
            assert loss.device.type == "cuda" and loss.dtype == torch.float32 and loss.requires_grad
        # Not through loss.backward(): autograd's engine asks for the device.
        rest = (None, None, 0, 0, 0.0, 2.0, 1.0, 1)
        for space in (torch.ops.gfl_kernels, torch.ops.gfl_native):
            grad = space.quality_backward(row.sum(), x.detach(), label, row, *rest)
            assert grad.device.type == "cuda" and grad.dtype == torch.bfloat16
            grad = space.integral_backward(row, z.detach(), None)
            assert grad.device.type == "cuda" and grad.shape == z.shape


def test_fake_heads_end_to_end(monkeypatch):
    monkeypatch.setattr(dispatch, "_why_not", lambda name: "not here" if name == "triton" else None)
    with FakeTensorMode():
        s = scene(dtype=torch.bfloat16).to(lambda t: torch.empty_like(t, device="cuda"))
        leaves = [t.requires_grad_() for t in (*s.cls, *s.box)]
        assert dispatch.choose("gfl_loss", s.cls[0]) == "cuda"
        out = HEAD(leaves[:3], leaves[3:], *s.others, **s.options, return_boxes=True)
        for loss in out[:6]:
            assert loss.device.type == "cuda" and loss.dtype == torch.float32
            assert loss.requires_grad
        assert out.boxes.shape == (2, 89, 4) and out.boxes.device.type == "cuda"
        lists, box, assessed = head_arguments(s)
        rest = (*lists, *assessed, *box, 0, 0.0, 2.0, [1.0, 2.0, 0.25])
        for space in (torch.ops.gfl_kernels, torch.ops.gfl_native):
            grads = space.head_backward(out[0].detach(), *[None] * 5, *rest)
            for grad, leaf in zip(grads, (*lists[0], *lists[1]), strict=True):
                assert grad.device.type == "cuda" and grad.stride() == leaf.stride()


def test_the_library_has_kernels_for_cuda():
    for name in ("quality", "distribution", "integral"):
        for direction in ("forward", "backward"):
            op = f"gfl_native::{name}_{direction}"
            assert torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA")
    for name in ("head_boxes", "head_forward", "head_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gfl_native::{name}", "CUDA")


def test_automatic_choice(monkeypatch):
    """The compiled kernels first, then Triton; neither makes the reference serve."""

    def choice(triton, cuda):
        reasons = {"triton": triton, "cuda": cuda}
        monkeypatch.setattr(dispatch, "_why_not", lambda name: reasons.get(name))
        with FakeTensorMode():
            x = torch.zeros(3, 17, device="cuda")
            chosen = {dispatch.choose(op, x) for op in ("integral", "gfl_loss")}
            assert len(chosen) == 1
            return chosen.pop()

    assert choice(None, None) == "cuda"
    with FakeTensorMode():  # of more levels than a launch has room for
        x = torch.zeros(3, 17, device="cuda")
        assert [dispatch.choose("gfl_loss", x, levels=n) for n in (12, 13)] == ["cuda", "triton"]
        assert dispatch._obstacle("cuda", x, (), 13) == (
            "it takes heads of at most 12 levels, got 13"
        )
    assert choice(None, "no") == "triton"
    assert choice("no", None) == "cuda"
    assert choice("no", "no") == "reference"


@pytest.mark.parametrize(
    ("architectures", "fits", "not_fits"),
    [
        (
            "75-real,80-real,100-virtual",
            ["75", "80", "86", "89", "100", "103", "120"],
            ["70", "90"],
        ),
        ("90", ["90", "100", "120"], ["75", "89"]),
        ("90-real", ["90"], ["89", "100"]),
        ("86-virtual", ["86", "90"], ["80"]),
        ("90a", ["90"], ["89", "100"]),
        ("native", ["75", "120"], []),
    ],
)
def test_code_of_an_architecture_runs_on(architectures, fits, not_fits):
    for gpu, expected in [*((g, True) for g in fits), *((g, False) for g in not_fits)]:
        major, minor = divmod(int(gpu), 10)
        assert native.runs_on(architectures, major, minor) == expected, gpu


def test_a_gpu_that_the_library_has_no_code_for_is_named(monkeypatch):
    for name, value in {"is_available": True, "device_count": 2}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: ((9, 0), (7, 0))[i])
    library = native.library()
    obstacles = {"gfl_cuda_obstacle": None, "gfl_cuda_has_stream": 1}
    for name, value in obstacles.items():
        monkeypatch.setattr(library, name, lambda value=value: value, raising=False)
    reason = native.cuda_why_not.__wrapped__()
    assert "cuda:1 is of architecture 70" in reason
    assert "GFL_KERNELS_CUDA_ARCHITECTURES=70" in reason
