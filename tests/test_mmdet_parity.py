"""mmdetection 3.3.0's own losses and GFL head next to ours: values, gradients, reductions, weights,
avg_factor, signatures.

Where we differ on purpose (the mean over no rows, half logits) the test says so.
"""

import inspect

import pytest
import torch
from support import (
    INTERPRETED,
    assert_no_worse,
    bin_target,
    combinations,
    dense_target,
    logits,
    random_upstream,
    row_weight,
    sparse_target,
    thinned,
    to_double,
)

import gfl_kernels

EPS = 2.0**-23
# Interpreted, float64 is the same but for NumPy.
DTYPES = [torch.float32] if INTERPRETED else [torch.float64, torch.float32]


def compare(theirs, ours, pred, *args, scale=1.0, **kwargs):
    """Values and gradients of two modules on the same inputs.

    float64: to 1e-11. float32: no worse than upstream's own float32, with upstream's float64 as the
    truth.
    """
    results = []
    for module, number in ((theirs, lambda x: x), (ours, lambda x: x), (theirs, to_double)):
        leaf = number(pred).detach().clone().requires_grad_()
        value = module(leaf, *number(args), **number(kwargs))
        (grad,) = torch.autograd.grad(value, leaf, random_upstream(value))
        results.append((value.detach(), grad))
    for what, eager, got, truth in zip(("value", "gradient"), *results, strict=True):
        assert got.shape == eager.shape and got.dtype == eager.dtype
        if pred.dtype == torch.float64:
            torch.testing.assert_close(
                got, eager, rtol=1e-11, atol=1e-12, msg=lambda text, what=what: f"{what}: {text}"
            )
        else:
            assert_no_worse(got, truth, eager, what=what, scale=scale)


# reduction, avg_factor: what mmdetection accepts
REDUCTIONS = [
    ("none", None),
    ("mean", None),
    ("sum", None),
    ("none", 5.0),
    ("mean", 5),
    ("mean", 2.5),
    ("mean", 0.0),
    ("mean", torch.tensor(2.5)),
    ("mean", torch.tensor([2.5])),
]
REDUCTIONS = thinned(REDUCTIONS, 0, of=2)  # what is done with a sum hardly depends on the kernel


def factor_of(avg_factor, dtype):
    """Arguments for compare(). Upstream adds eps in a tensor's own dtype: in the test's, so that
    both sides do.
    """
    factor = avg_factor.to(dtype) if isinstance(avg_factor, torch.Tensor) else avg_factor
    # 0 divides by eps: 8e6 times everything, and times its rounding
    return {
        "avg_factor": factor,
        "scale": 1 / EPS if factor is not None and float(factor) == 0 else 1.0,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction, avg_factor", REDUCTIONS, ids=repr)
@pytest.mark.parametrize("form", ["sparse", "dense"])
@pytest.mark.parametrize("activated", [False, True])
def test_quality(backend, mmdet, dtype, reduction, avg_factor, form, activated):
    rows, classes = 60, 17
    pred = logits(rows, classes, dtype=dtype, extremes=False)
    if activated:
        pred = pred.sigmoid()
    if form == "sparse":
        target = sparse_target((rows,), classes, score_dtype=dtype)
    else:
        target = dense_target((rows,), classes, dtype=dtype)
    for beta in (2.0, 1.0, 1.5, 3.0, 0.0):
        arguments = {
            "beta": beta,
            "reduction": reduction,
            "loss_weight": 0.75,
            "activated": activated,
        }
        modules = mmdet.QualityFocalLoss(**arguments), gfl_kernels.QualityFocalLoss(**arguments)
        kwargs = factor_of(avg_factor, dtype)
        compare(*modules, pred, target, **kwargs)
        compare(*modules, pred, target, weight=row_weight((rows,), dtype=dtype), **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction, avg_factor", REDUCTIONS, ids=repr)
def test_varifocal(backend, mmdet, dtype, reduction, avg_factor):
    pred = logits(60, 17, dtype=dtype, extremes=False)
    target, weight = dense_target((60,), 17, dtype=dtype), row_weight((60, 17), dtype=dtype)
    for alpha, gamma, iou_weighted in ((0.75, 2.0, True), (0.5, 1.5, True), (0.75, 2.0, False)):
        arguments = {
            "alpha": alpha,
            "gamma": gamma,
            "iou_weighted": iou_weighted,
            "reduction": reduction,
            "loss_weight": 0.75,
        }
        modules = mmdet.VarifocalLoss(**arguments), gfl_kernels.VarifocalLoss(**arguments)
        kwargs = factor_of(avg_factor, dtype)
        compare(*modules, pred, target, **kwargs)
        compare(*modules, pred, target, weight=weight, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction, avg_factor", REDUCTIONS, ids=repr)
@pytest.mark.parametrize("activated", [False, True])
def test_focal(backend, mmdet, dtype, reduction, avg_factor, activated):
    pred = logits(60, 17, dtype=dtype, extremes=False)
    pred = pred.sigmoid() if activated else pred
    label = sparse_target((60,), 17)[0]
    label = torch.where((label < 0) | (label > 17), 17, label)  # upstream's one background
    one_hot = torch.nn.functional.one_hot(label, 18)[:, :17].to(dtype)
    calls = [(label, None), (one_hot, None)]
    calls += [(label, row_weight(shape, dtype=dtype)) for shape in ((60,), (60, 17), (60 * 17,))]
    for (target, weight), (alpha, gamma) in combinations(calls, ((0.25, 2.0), (0.6, 1.5))):
        arguments = {
            "alpha": alpha,
            "gamma": gamma,
            "reduction": reduction,
            "loss_weight": 0.75,
            "activated": activated,
        }
        modules = mmdet.FocalLoss(**arguments), gfl_kernels.FocalLoss(**arguments)
        compare(*modules, pred, target, weight=weight, **factor_of(avg_factor, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction, avg_factor", REDUCTIONS, ids=repr)
def test_distribution(backend, mmdet, dtype, reduction, avg_factor):
    rows, bins = 60, 17
    pred = logits(rows, bins, dtype=dtype, extremes=False)
    target = bin_target((rows,), bins, dtype=dtype).clamp(
        0, bins - 1 - 0.1
    )  # upstream indexes bin K beyond that
    arguments = {"reduction": reduction, "loss_weight": 0.25}
    modules = (
        mmdet.DistributionFocalLoss(**arguments),
        gfl_kernels.DistributionFocalLoss(**arguments),
    )
    kwargs = factor_of(avg_factor, dtype)
    compare(*modules, pred, target, **kwargs)
    compare(*modules, pred, target, weight=row_weight((rows,), dtype=dtype), **kwargs)


@pytest.mark.parametrize("reg_max", [16, 7, 1, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_integral(backend, mmdet, reg_max, dtype):
    theirs, ours = mmdet.Integral(reg_max), gfl_kernels.Integral(reg_max)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for shape in [
        (50, 4 * (reg_max + 1)),
        (1, 4 * (reg_max + 1)),
        (0, 4 * (reg_max + 1)),
        (3, 5, 4 * (reg_max + 1)),
    ]:
        if 0 in shape:
            assert (
                ours(torch.zeros(shape, dtype=dtype)).shape
                == theirs(torch.zeros(shape, dtype=dtype)).shape
            )
        else:
            # the values go up to reg_max, and so does their rounding
            compare(theirs, ours, logits(*shape, dtype=dtype, extremes=False), scale=reg_max)


@pytest.mark.parametrize("override", ["none", "mean", "sum", None])
def test_reduction_override(backend, mmdet, override):
    pred, target = (
        logits(20, 5, dtype=torch.float64),
        sparse_target((20,), 5, score_dtype=torch.float64),
    )
    for base in ("none", "mean", "sum"):
        modules = (
            mmdet.QualityFocalLoss(reduction=base),
            gfl_kernels.QualityFocalLoss(reduction=base),
        )
        compare(*modules, pred, target, reduction_override=override)
        modules = (
            mmdet.DistributionFocalLoss(reduction=base),
            gfl_kernels.DistributionFocalLoss(reduction=base),
        )
        compare(
            *modules, pred, torch.rand(20, dtype=torch.float64) * 3.9, reduction_override=override
        )


def test_refusals(backend, mmdet):
    """The same misuse is refused by both; upstream asserts where we raise ValueError."""
    pred, target = torch.zeros(3, 4), (torch.zeros(3, dtype=torch.int64), torch.zeros(3))
    for package in (mmdet, gfl_kernels):
        with pytest.raises((AssertionError, ValueError)):
            package.QualityFocalLoss(use_sigmoid=False)
        with pytest.raises((AssertionError, ValueError)):
            package.QualityFocalLoss()(pred, target, reduction_override="average")
        with pytest.raises(ValueError, match='avg_factor can not be used with reduction="sum"'):
            package.QualityFocalLoss(reduction="sum")(pred, target, avg_factor=2.0)
        with pytest.raises(ValueError, match='avg_factor can not be used with reduction="sum"'):
            package.DistributionFocalLoss()(
                pred, torch.zeros(3), avg_factor=2.0, reduction_override="sum"
            )


def test_labels_in_every_dtype_and_outside_the_classes(backend, mmdet):
    pred = logits(40, 7, dtype=torch.float64, extremes=False)
    score = torch.rand(40, dtype=torch.float64)
    for values in ([0, 6, 7, -1], [-2, 8, 100, 3], [0, 0, 6, 6]):
        label = torch.tensor(values).repeat(10)
        dtypes = [torch.int64, torch.int32, torch.int16, torch.float32]
        for dtype in dtypes + ([torch.uint8] if min(values) >= 0 else []):
            compare(
                mmdet.QualityFocalLoss(),
                gfl_kernels.QualityFocalLoss(),
                pred,
                (label.to(dtype), score),
            )
    label = torch.full((40,), 255, dtype=torch.uint8)
    compare(mmdet.QualityFocalLoss(), gfl_kernels.QualityFocalLoss(), pred, (label, score))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits(backend, mmdet, dtype):
    """In float32 upstream loses the cross entropy of negatives below -17; float64 is the truth for
    both.
    """
    pred = logits(200, 9, dtype=dtype, seed=3)
    target = sparse_target((200,), 9, score_dtype=dtype)
    compare(mmdet.QualityFocalLoss(), gfl_kernels.QualityFocalLoss(), pred, target)


@pytest.mark.parametrize(
    "name",
    ["QualityFocalLoss", "VarifocalLoss", "FocalLoss", "DistributionFocalLoss", "Integral"],
)
def test_signatures_and_state(mmdet, name):
    """Names, order, defaults and kinds of every parameter, what upstream has not being given by
    keyword alone; attributes a config reads; state_dict keys.
    """
    theirs, ours = getattr(mmdet, name), getattr(gfl_kernels, name)
    for method in ("__init__", "forward"):
        expected = inspect.signature(getattr(theirs, method)).parameters.values()
        got = inspect.signature(getattr(ours, method)).parameters.values()
        assert [(p.name, p.default, p.kind) for p in got if p.kind != p.KEYWORD_ONLY] == [
            (p.name, p.default, p.kind) for p in expected
        ]
    a, b = theirs(), ours()
    assert list(a.state_dict()) == list(b.state_dict())
    assert ours.__name__ == theirs.__name__
    for attribute in vars(a).keys() - set(vars(torch.nn.Module())):
        assert getattr(b, attribute) == getattr(a, attribute), attribute
    for key, value in a.state_dict().items():
        assert torch.equal(b.state_dict()[key], value) and b.state_dict()[key].dtype == value.dtype


def test_checkpoints_load_both_ways(mmdet):
    theirs, ours = (
        torch.nn.ModuleDict({"integral": mmdet.Integral(16)}),
        torch.nn.ModuleDict({"integral": gfl_kernels.Integral(16)}),
    )
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_score_gradient(mmdet):
    """Upstream differentiates with respect to the score too (every head detaches it): served by the
    reference.
    """
    pred, label = (
        logits(12, 4, dtype=torch.float64, extremes=False),
        torch.tensor([0, 1, 2, 3, 4, -1] * 2),
    )
    grads = []
    for module in (mmdet.QualityFocalLoss(), gfl_kernels.QualityFocalLoss()):
        score = torch.linspace(0.1, 0.9, 12, dtype=torch.float64).requires_grad_()
        weight = torch.linspace(0.5, 1.5, 12, dtype=torch.float64).requires_grad_()
        grads.append(torch.autograd.grad(module(pred, (label, score), weight), (score, weight)))
    for expected, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


def test_mean_over_no_rows_differs_on_purpose(backend, mmdet):
    """Upstream gives NaN, which ends a DDP run; here it is 0, connected to the graph."""
    pred, target = (
        torch.zeros(0, 4, requires_grad=True),
        (torch.zeros(0, dtype=torch.int64), torch.zeros(0)),
    )
    assert bool(mmdet.QualityFocalLoss()(pred, target).isnan())
    ours = gfl_kernels.QualityFocalLoss()(pred, target)
    assert float(ours.detach()) == 0.0 and ours.requires_grad


def test_half_logits_outside_autocast(backend, mmdet):
    """Upstream raises (index put of a float32 score into half); ours computes in float32."""
    pred = logits(10, 4, dtype=torch.bfloat16, extremes=False)
    target = sparse_target((10,), 4)
    with pytest.raises(RuntimeError):
        mmdet.QualityFocalLoss()(pred, target)
    got = gfl_kernels.QualityFocalLoss()(pred, target)
    expected = mmdet.QualityFocalLoss()(pred.float(), target)
    assert_no_worse(got, expected, expected, what="bfloat16 logits")


# ---- the whole head

STRIDES = (8, 16, 32, 64)
LOSS_BOX = {"iou": "IoULoss", "giou": "GIoULoss", "diou": "DIoULoss", "ciou": "CIoULoss"}


class HeadScene:
    """A GFLHead with its ATSS assigner, on random logits and boxes."""

    def __init__(self, mmdet, objects, *, classes=7, iou="giou", reg_max=16, size=(128, 200),
                 dtype=torch.float32, box_dtype=None, seed=0):  # fmt: skip
        from mmengine.structures import InstanceData

        self.head = mmdet.GFLHead(
            num_classes=classes,
            in_channels=4,
            stacked_convs=1,
            feat_channels=4,
            norm_cfg=None,
            reg_max=reg_max,
            anchor_generator={
                "type": "AnchorGenerator",
                "ratios": [1.0],
                "octave_base_scale": 8,
                "scales_per_octave": 1,
                "strides": list(STRIDES),
            },
            loss_cls={"type": "QualityFocalLoss", "use_sigmoid": True, "loss_weight": 1.0},
            loss_dfl={"type": "DistributionFocalLoss", "loss_weight": 0.25},
            loss_bbox={"type": LOSS_BOX[iou], "loss_weight": 2.0},
            train_cfg={
                "assigner": {"type": "ATSSAssigner", "topk": 9},
                "allowed_border": -1,
                "pos_weight": -1,
            },
        )
        self.options = {"strides": STRIDES, "reg_max": reg_max, "iou": iou}
        random = torch.Generator().manual_seed(seed)
        batch, (height, width) = len(objects), size
        cells = [(-(-height // s), -(-width // s)) for s in STRIDES]
        self.leaves = [
            logits(batch, channels, *cell, dtype=kind, seed=seed + i, extremes=False, spread=2.0)
            for channels, kind in ((classes, dtype), (4 * (reg_max + 1), box_dtype or dtype))
            for i, cell in enumerate(cells)
        ]
        self.objects = []
        for count in objects:
            centre = torch.rand(count, 2, generator=random) * torch.tensor([width, height])
            half = torch.rand(count, 2, generator=random) * 60 + 4
            self.objects.append(
                InstanceData(
                    bboxes=torch.cat([centre - half, centre + half], dim=1),
                    labels=torch.randint(classes, (count,), generator=random),
                )
            )
        self.metas = [{"img_shape": (*size, 3), "pad_shape": (*size, 3)}] * batch
        anchors, flags = self.head.get_anchors(cells, self.metas, device="cpu")
        self.targets = self.head.get_targets(anchors, flags, self.objects, self.metas)
        self.head.get_targets = lambda *args, **kwargs: tuple(
            [self.match(t) for t in part] if isinstance(part, list) else part
            for part in self.targets
        )
        self.match = lambda t: t

    def theirs(self, leaves):
        """mmdetection takes its targets in the dtype of the logits only."""
        dtype = leaves[-1].dtype
        self.match = lambda t: t.to(dtype) if t.is_floating_point() else t
        count = len(STRIDES)
        losses = self.head.loss_by_feat(leaves[:count], leaves[count:], self.objects, self.metas)
        return [torch.stack(losses[key]) for key in ("loss_cls", "loss_bbox", "loss_dfl")]

    def ours(self, leaves):
        anchors, labels, label_weights, box_targets, _, _ = self.targets
        points = [self.head.anchor_center(level[0]) for level in anchors]
        count = len(STRIDES)
        out = gfl_kernels.gfl_loss(leaves[:count], leaves[count:], points, labels, box_targets,
                                   label_weights=label_weights, **self.options)  # fmt: skip
        for total, levels in zip(out[:3], out[3:6], strict=True):
            torch.testing.assert_close(total, levels.sum(), rtol=1e-6, atol=1e-9)
        return list(out[3:6])

    def compare(self):
        results = []
        for function, number in (
            (self.theirs, lambda x: x),
            (self.ours, lambda x: x),
            (self.theirs, to_double),
        ):
            leaves = [number(t).detach().requires_grad_() for t in self.leaves]
            losses = function(leaves)
            upstream = [random_upstream(loss, i) for i, loss in enumerate(losses)]
            grads = torch.autograd.grad(losses, leaves, upstream)
            results.append((*(loss.detach() for loss in losses), *grads))
        for i, (eager, got, truth) in enumerate(zip(*results, strict=True)):
            if i < 3:
                torch.testing.assert_close(got.double(), truth.double(), rtol=1e-5, atol=1e-7)
            assert_no_worse(got, truth, eager, what=f"result {i}")


@pytest.fixture
def head_backend(backend):
    if backend.name not in ("reference", "cpu"):
        pytest.skip(f"{backend.name}: its head is tested in test_head.py")
    return backend


@pytest.mark.parametrize("iou", LOSS_BOX)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_head(head_backend, mmdet, iou, dtype):
    for seed in range(2):
        HeadScene(mmdet, (3, 5), iou=iou, dtype=dtype, seed=seed).compare()


@pytest.mark.parametrize("objects", [(4, 0), (0, 0), (1,), (0,)], ids=str)
def test_head_with_empty_images(head_backend, mmdet, objects):
    """An image without objects counts as one positive in the divisor."""
    HeadScene(mmdet, objects).compare()


@pytest.mark.parametrize("classes, reg_max", [(1, 16), (80, 7)])
def test_head_sizes(head_backend, mmdet, classes, reg_max):
    HeadScene(mmdet, (6, 2), classes=classes, reg_max=reg_max, size=(70, 90)).compare()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_with_half_logits(head_backend, mmdet, dtype):
    """What autocast leaves: half class logits, box logits made float32 by the head. Upstream then
    takes scores of positives in half precision, and QFL outside autocast not at all: it is given
    the same logits in float32.
    """
    scene = HeadScene(mmdet, (3, 5), dtype=dtype, box_dtype=torch.float32)
    leaves = [t.detach().requires_grad_() for t in scene.leaves]
    got = scene.ours(leaves)
    grads = torch.autograd.grad(sum(loss.sum() for loss in got), leaves)
    wide = [t.float().detach().requires_grad_() for t in scene.leaves]
    expected = scene.theirs(wide)
    expected_grads = torch.autograd.grad(sum(loss.sum() for loss in expected), wide)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=torch.finfo(a.dtype).eps, atol=1e-6)
