"""Wrong input of every kind gets its message (function, argument, what was expected, what came) and
corrupts nothing.
"""

import re

import pytest
import torch
from support import run_python

import gfl_kernels
from gfl_kernels import (
    distribution_focal_loss,
    ia_bce_loss,
    integral,
    matchability_aware_loss,
    quality_focal_loss,
    sigmoid_focal_loss,
    varifocal_loss,
)


def label(n=3, dtype=torch.int64):
    return torch.zeros(n, dtype=dtype)


def z(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


STATISTICS = gfl_kernels.distribution_statistics
MOMENTS = gfl_kernels.distribution_moments
GOOD = (label(), z(3))
EXPLICIT = (label(), z(3), z(3))

# (function, positional arguments, keyword arguments, exception, every word that must be in the
# message)
CASES = [
    # pred
    (quality_focal_loss, ([[0.0]], GOOD), {}, TypeError, ["pred", "Tensor", "list"]),
    (
        quality_focal_loss,
        (z(3, 4, dtype=torch.int64), GOOD),
        {},
        TypeError,
        ["pred", "float", "int64"],
    ),
    (
        quality_focal_loss,
        (z(3, 4, dtype=torch.complex64), GOOD),
        {},
        TypeError,
        ["pred", "float", "complex64"],
    ),
    (quality_focal_loss, (torch.tensor(0.0), GOOD), {}, ValueError, ["pred", "(..., C)"]),
    (quality_focal_loss, (z(3, 0), GOOD), {}, ValueError, ["pred", "(3, 0)"]),
    (
        quality_focal_loss,
        (z(3, 4), GOOD),
        {"class_dim": 2},
        ValueError,
        ["class_dim", "[-2, 1]", "2"],
    ),
    (
        quality_focal_loss,
        (z(3, 4), GOOD),
        {"class_dim": -3},
        ValueError,
        ["class_dim", "[-2, 1]", "-3"],
    ),
    (quality_focal_loss, (z(3, 4), GOOD), {"class_dim": 1.5}, TypeError, ["class_dim", "float"]),
    # target
    (quality_focal_loss, (z(3, 4), None), {}, TypeError, ["target", "Tensor", "NoneType"]),
    (quality_focal_loss, (z(3, 4), (label(),)), {}, ValueError, ["target", "(label, score)", "1"]),
    (
        quality_focal_loss,
        (z(3, 4), (label(), z(3), z(3))),
        {},
        ValueError,
        ["target", "(label, score)", "3"],
    ),
    (quality_focal_loss, (z(3, 4), (label(2), z(3))), {}, ValueError, ["label", "(3,)", "(2,)"]),
    (
        quality_focal_loss,
        (z(3, 4), (label(), z(3, 1))),
        {},
        ValueError,
        ["score", "(3,)", "(3, 1)"],
    ),
    (
        quality_focal_loss,
        (z(3, 4), (label(), [0.0] * 3)),
        {},
        TypeError,
        ["score", "Tensor", "list"],
    ),
    (
        quality_focal_loss,
        (z(3, 4), (z(3, dtype=torch.complex64), z(3))),
        {},
        TypeError,
        ["label", "complex64"],
    ),
    (quality_focal_loss, (z(3, 4), z(4, 3)), {}, ValueError, ["target", "(3, 4)", "(4, 3)"]),
    (quality_focal_loss, (z(3, 4), z(3)), {}, ValueError, ["target", "(3, 4)", "(3,)"]),
    (quality_focal_loss, (z(3, 4), z(3, 4).to("meta")), {}, ValueError, ["target", "cpu", "meta"]),
    (
        quality_focal_loss,
        (z(3, 4), (label().to("meta"), z(3))),
        {},
        ValueError,
        ["label", "cpu", "meta"],
    ),
    (
        quality_focal_loss,
        (z(2, 5, 3), GOOD),
        {"class_dim": 1},
        ValueError,
        ["label", "(2, 3)", "(3,)"],
    ),
    # layouts: sparse tensors have no strides to read through
    (quality_focal_loss, (z(3, 4).to_sparse(), GOOD), {}, TypeError, ["pred", "sparse"]),
    (quality_focal_loss, (z(3, 4).to_mkldnn(), GOOD), {}, TypeError, ["pred", "mkldnn"]),
    (
        quality_focal_loss,
        (z(3, 4), (label().to_sparse(), z(3))),
        {},
        TypeError,
        ["label", "sparse"],
    ),
    (quality_focal_loss, (z(3, 4), z(3, 4).to_sparse()), {}, TypeError, ["target", "sparse"]),
    # weight, avg_factor, reduction, beta
    (
        quality_focal_loss,
        (z(3, 4), GOOD),
        {"weight": z(3).to_sparse()},
        TypeError,
        ["weight", "sparse"],
    ),
    (
        quality_focal_loss,
        (z(3, 4), GOOD),
        {"weight": z(4)},
        ValueError,
        ["weight", "(3,)", "(3, 4)", "(4,)"],
    ),
    (
        quality_focal_loss,
        (z(3, 4), GOOD),
        {"weight": 2.0},
        TypeError,
        ["weight", "Tensor", "float"],
    ),
    (
        quality_focal_loss,
        (z(3, 4), GOOD),
        {"weight": z(3).to("meta")},
        ValueError,
        ["weight", "cpu", "meta"],
    ),
    (
        quality_focal_loss,
        (z(3, 4), GOOD),
        {"reduction": "average"},
        ValueError,
        ["reduction", "mean", "'average'"],
    ),
    (
        quality_focal_loss,
        (z(3, 4), GOOD),
        {"reduction": None},
        ValueError,
        ["reduction", "mean", "None"],
    ),
    (
        quality_focal_loss,
        (z(3, 4), GOOD),
        {"reduction": "sum", "avg_factor": 2},
        ValueError,
        ['avg_factor can not be used with reduction="sum"'],
    ),
    (
        quality_focal_loss,
        (z(3, 4), GOOD),
        {"avg_factor": z(2)},
        ValueError,
        ["avg_factor", "(1,)", "(2,)"],
    ),
    (
        quality_focal_loss,
        (z(3, 4), GOOD),
        {"avg_factor": z(1, 1)},
        ValueError,
        ["avg_factor", "(1,)", "(1, 1)"],
    ),
    (quality_focal_loss, (z(3, 4), GOOD), {"avg_factor": "4"}, TypeError, ["avg_factor", "str"]),
    (quality_focal_loss, (z(3, 4), GOOD), {"beta": -1.0}, ValueError, ["beta", ">= 0", "-1"]),
    (
        quality_focal_loss,
        (z(3, 4), GOOD),
        {"beta": float("nan")},
        ValueError,
        ["beta", ">= 0", "nan"],
    ),
    (quality_focal_loss, (z(3, 4), GOOD), {"beta": "2"}, TypeError, ["beta", "str"]),
    (quality_focal_loss, (z(3, 4), GOOD), {"alpha": 1.5}, ValueError, ["alpha", "[0, 1]", "1.5"]),
    (quality_focal_loss, (z(3, 4), GOOD), {"alpha": "a"}, TypeError, ["alpha", "str"]),
    (
        quality_focal_loss,
        (z(3, 4), GOOD),
        {"alpha": 0.25, "activated": True},
        ValueError,
        ["alpha", "activated"],
    ),
    # the rest of the quality family
    (varifocal_loss, ([[0.0]], GOOD), {}, TypeError, ["pred", "Tensor", "list"]),
    (varifocal_loss, (z(3, 4), (label(2), z(3))), {}, ValueError, ["label", "(3,)", "(2,)"]),
    (varifocal_loss, (z(3, 4), z(4, 3)), {}, ValueError, ["target", "(3, 4)", "(4, 3)"]),
    (varifocal_loss, (z(3, 4), GOOD), {"alpha": -0.1}, ValueError, ["alpha", ">= 0", "-0.1"]),
    (varifocal_loss, (z(3, 4), GOOD), {"gamma": -1}, ValueError, ["gamma", ">= 0", "-1"]),
    (varifocal_loss, (z(3, 4), GOOD), {"weight": z(4)}, ValueError, ["weight", "(3,)", "(4,)"]),
    (matchability_aware_loss, (z(3, 4), GOOD), {"gamma": "2"}, TypeError, ["gamma", "str"]),
    (
        matchability_aware_loss,
        (z(3, 4), GOOD),
        {"mal_alpha": -1},
        ValueError,
        ["mal_alpha", ">= 0", "-1"],
    ),
    (ia_bce_loss, (z(3, 4), GOOD), {"alpha": -0.5}, ValueError, ["alpha", "[0, 1]", "-0.5"]),
    (
        ia_bce_loss,
        (z(3, 4), GOOD),
        {"reduction": "average"},
        ValueError,
        ["reduction", "mean", "'average'"],
    ),
    (sigmoid_focal_loss, (z(3, 4), z(3, 4)), {"alpha": 2}, ValueError, ["alpha", "[0, 1]", "2"]),
    (
        sigmoid_focal_loss,
        (z(3, 4), z(3, 4)),
        {"alpha": float("nan")},
        ValueError,
        ["alpha", "[0, 1]", "nan"],
    ),
    (sigmoid_focal_loss, (z(3, 4), z(3, 4)), {"gamma": -2}, ValueError, ["gamma", ">= 0", "-2"]),
    (sigmoid_focal_loss, (z(3, 4), z(3)), {}, TypeError, ["targets", "integer", "float32"]),
    (sigmoid_focal_loss, (z(3, 4), label(4)), {}, ValueError, ["label", "(3,)", "(4,)"]),
    (sigmoid_focal_loss, (z(3, 4), None), {}, TypeError, ["target", "NoneType"]),
    (
        sigmoid_focal_loss,
        (z(3, 4), z(3, 4)),
        {"reduction": "sum", "avg_factor": 2},
        ValueError,
        ['avg_factor can not be used with reduction="sum"'],
    ),
    # distribution
    (distribution_focal_loss, (None, z(3)), {}, TypeError, ["pred", "Tensor", "NoneType"]),
    (
        distribution_focal_loss,
        (z(3, 5, dtype=torch.int32), z(3)),
        {},
        TypeError,
        ["pred", "float", "int32"],
    ),
    (distribution_focal_loss, (z(3, 0), z(3)), {}, ValueError, ["pred", "(3, 0)"]),
    (distribution_focal_loss, (z(3, 5), z(4)), {}, ValueError, ["target", "(3,)", "(4,)"]),
    (distribution_focal_loss, (z(3, 5), z(3, 5)), {}, ValueError, ["target", "(3,)", "(3, 5)"]),
    (distribution_focal_loss, (z(3, 5), 2.0), {}, TypeError, ["target", "Tensor", "float"]),
    (
        distribution_focal_loss,
        (z(3, 5), EXPLICIT[:2]),
        {},
        ValueError,
        ["target", "(left, weight_left, weight_right)"],
    ),
    (
        distribution_focal_loss,
        (z(3, 5), (label(2), z(3), z(3))),
        {},
        ValueError,
        ["left", "(3,)", "(2,)"],
    ),
    (
        distribution_focal_loss,
        (z(3, 5), (label(), z(2), z(3))),
        {},
        ValueError,
        ["weight_left", "(3,)", "(2,)"],
    ),
    (
        distribution_focal_loss,
        (z(3, 5), (label(), z(3), z(3, 1))),
        {},
        ValueError,
        ["weight_right", "(3, 1)"],
    ),
    (
        distribution_focal_loss,
        (z(3, 5), (label(), z(3), None)),
        {},
        TypeError,
        ["weight_right", "NoneType"],
    ),
    (
        distribution_focal_loss,
        (z(3, 5), z(3)),
        {"weight": z(3, 5)},
        ValueError,
        ["weight", "(3,)", "(3, 5)"],
    ),
    (
        distribution_focal_loss,
        (z(3, 5), z(3).to("meta")),
        {},
        ValueError,
        ["target", "cpu", "meta"],
    ),
    (
        distribution_focal_loss,
        (z(3, 5), z(3)),
        {"bin_dim": 7},
        ValueError,
        ["bin_dim", "[-2, 1]", "7"],
    ),
    (
        distribution_focal_loss,
        (z(3, 5), z(3)),
        {"reduction": "batchmean"},
        ValueError,
        ["reduction", "'batchmean'"],
    ),
    (
        distribution_focal_loss,
        (z(3, 5), z(3)),
        {"reduction": "sum", "avg_factor": z(1)},
        ValueError,
        ['avg_factor can not be used with reduction="sum"'],
    ),
    (distribution_focal_loss, (z(3, 5).to_sparse(), z(3)), {}, TypeError, ["pred", "sparse"]),
    # integral
    (integral, (z(3, 5).to_sparse(),), {}, TypeError, ["pred", "sparse"]),
    (integral, (z(3, 5),), {"bins": z(5).to_sparse()}, TypeError, ["bins", "sparse"]),
    (integral, (3,), {}, TypeError, ["pred", "Tensor", "int"]),
    (integral, (z(3, 5, dtype=torch.bool),), {}, TypeError, ["pred", "float", "bool"]),
    (integral, (torch.tensor(1.0),), {}, ValueError, ["pred", "(..., K)"]),
    (integral, (z(3, 5),), {"bins": z(4)}, ValueError, ["bins", "(5,)", "(4,)"]),
    (integral, (z(3, 5),), {"bins": z(3, 5)}, ValueError, ["bins", "(5,)", "(3, 5)"]),
    (integral, (z(3, 5),), {"bins": [0, 1, 2, 3, 4]}, TypeError, ["bins", "Tensor", "list"]),
    (integral, (z(3, 5),), {"bins": z(5).to("meta")}, ValueError, ["bins", "cpu", "meta"]),
    (integral, (z(3, 5),), {"bin_dim": -4}, ValueError, ["bin_dim", "[-2, 1]", "-4"]),
    (integral, (z(3, 5, 2),), {"bins": z(2), "bin_dim": 1}, ValueError, ["bins", "(5,)", "(2,)"]),
    (integral, (z(3, 5),), {"mode": "median"}, ValueError, ["mode", "mean", "peak", "'median'"]),
    (integral, (z(3, 5),), {"window": -1}, ValueError, ["window", ">= 0", "-1"]),
    (integral, (z(3, 5),), {"window": 1.5}, TypeError, ["window", "int", "float"]),
    # statistics and moments
    (STATISTICS, ([0.0],), {}, TypeError, ["pred", "Tensor", "list"]),
    (STATISTICS, (z(3, 5),), {"topk": 0}, ValueError, ["topk", "[1, 5]", "0"]),
    (STATISTICS, (z(3, 5),), {"topk": 6}, ValueError, ["topk", "[1, 5]", "6"]),
    (STATISTICS, (z(3, 5),), {"topk": 2.0}, TypeError, ["topk", "int", "float"]),
    (STATISTICS, (z(3, 5),), {"topk": True}, TypeError, ["topk", "int", "bool"]),
    (STATISTICS, (z(3, 5),), {"bin_dim": 2}, ValueError, ["bin_dim", "[-2, 1]", "2"]),
    (MOMENTS, (z(3, 5, dtype=torch.int64),), {}, TypeError, ["pred", "float", "int64"]),
    (MOMENTS, (z(3, 5),), {"bins": z(4)}, ValueError, ["bins", "(5,)", "(4,)"]),
]


def name_case(case):
    function, args, kwargs, error, words = case
    return f"{function.__name__}-{words[0].split(' ')[0]}-{words[-1]}"


@pytest.mark.parametrize("case", CASES, ids=name_case)
def test_message(backend, case):
    function, args, kwargs, error, words = case
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert message.startswith(f"{function.__name__}: "), message
    for word in words:
        assert word in message, f"{word!r} is missing from {message!r}"


def test_modules_name_themselves_and_what_came(backend):
    with pytest.raises(ValueError, match="QualityFocalLoss: use_sigmoid must be True, got False"):
        gfl_kernels.QualityFocalLoss(use_sigmoid=False)
    for module in (gfl_kernels.VarifocalLoss, gfl_kernels.FocalLoss):
        with pytest.raises(ValueError, match=f"{module.__name__}: use_sigmoid must be True"):
            module(use_sigmoid=False)
    for module in (gfl_kernels.QualityFocalLoss(), gfl_kernels.DistributionFocalLoss()):
        target = GOOD if isinstance(module, gfl_kernels.QualityFocalLoss) else z(3)
        with pytest.raises(
            ValueError, match=r"reduction_override .*None, none, mean or sum.*'avg'"
        ):
            module(z(3, 4), target, reduction_override="avg")
    with pytest.raises(ValueError, match="reduction"):
        gfl_kernels.QualityFocalLoss(reduction="average")(z(3, 4), (label(), z(3)))


def test_nothing_is_corrupted(backend):
    """After every wrong call the inputs are unchanged and a right one gives the bits it gave."""
    pred = torch.randn(3, 4)
    target = (torch.tensor([0, 3, 4]), torch.rand(3))
    before = quality_focal_loss(pred, target, reduction="none").clone()
    copies = [tensor.clone() for tensor in (pred, *target)]
    for function, args, kwargs, error, _ in CASES:
        with pytest.raises(error):
            function(*args, **kwargs)
        # Where a keyword is what is wrong, also with inputs that are worth corrupting
        if function is quality_focal_loss and kwargs and args[0].dim() == 2:
            here = {
                name: value.to(pred.device) if getattr(value, "is_cpu", False) else value
                for name, value in kwargs.items()
            }
            with pytest.raises(error):
                function(pred, target, **here)
        assert torch.equal(quality_focal_loss(pred, target, reduction="none"), before)
    for tensor, copy in zip((pred, *target), copies, strict=True):
        assert torch.equal(tensor, copy)


def test_ops_refuse_what_would_break_memory(native):
    """Below the public functions there are no user messages, but a wrong shape must not read out of
    bounds.
    """
    quality = torch.ops.gfl_kernels.quality_forward
    bad = [
        (z(3, 4), label(2), z(3), None, None),
        (z(3, 4), label(3), z(1), None, None),
        (z(3, 4), label(3), z(3), z(2), None),
        (z(3, 4), z(3, 3), None, None, None),
        (z(3, 4), z(3, 4), None, z(3, 5), None),
        (z(3, 4), label(3), z(3), None, z(2)),
    ]
    for tensors in bad:
        with pytest.raises((RuntimeError, ValueError), match=r"must have"):
            quality(*tensors, 0, 0, 0.0, 2.0, 1.0, 0, False)
    distribution = torch.ops.gfl_kernels.distribution_forward
    for tensors in [
        (z(3, 5), z(2), None, None, None, None),
        (z(3, 5), label(3), z(3), z(2), None, None),
    ]:
        with pytest.raises((RuntimeError, ValueError), match=r"must have"):
            distribution(*tensors, 1.0, 0, False)
    with pytest.raises((RuntimeError, ValueError), match=r"must have"):
        torch.ops.gfl_kernels.integral_forward(z(3, 5), z(4))
    with pytest.raises((RuntimeError, ValueError), match=r"must have"):
        torch.ops.gfl_kernels.integral_backward(z(2), z(3, 5), None)
    with pytest.raises((RuntimeError, ValueError), match=r"saved must have shape \(3, 2\)"):
        torch.ops.gfl_kernels.integral_backward(z(3), z(3, 5), None, -1, z(3))
    with pytest.raises((RuntimeError, ValueError), match=r"saved has the wrong dtype"):
        torch.ops.gfl_kernels.integral_backward(z(3), z(3, 5), None, -1, z(3, 2).double())
    with pytest.raises((RuntimeError, ValueError), match=r"topk is larger"):
        torch.ops.gfl_kernels.statistics_forward(z(3, 5), 6, True)
    with pytest.raises((RuntimeError, ValueError), match=r"must have"):
        torch.ops.gfl_kernels.statistics_backward(z(3, 4), z(3, 5), 4, True)
    with pytest.raises((RuntimeError, ValueError), match=r"must have"):
        torch.ops.gfl_kernels.moments_backward(z(3), z(3, 5), None)
    with pytest.raises((RuntimeError, ValueError), match=r"must have"):
        torch.ops.gfl_kernels.quality_backward(
            z(2), z(3, 4), label(3), z(3), None, None, 0, 0, 0.0, 2.0, 1.0, 0
        )


def test_wrong_target_with_gradient_on_a_forced_backend(fused):
    """score, weight and bins that require grad are the reference's business: a forced backend says
    so.
    """
    pred = torch.randn(3, 4, requires_grad=True)
    score = torch.rand(3, requires_grad=True)
    for call in (
        lambda: quality_focal_loss(pred, (label(), score)),
        lambda: quality_focal_loss(pred, (label(), z(3)), weight=score),
        lambda: quality_focal_loss(pred, torch.rand(3, 4, requires_grad=True)),
        lambda: distribution_focal_loss(pred, score),
        lambda: distribution_focal_loss(pred, (label(), score, z(3))),
        lambda: distribution_focal_loss(pred, z(3), weight=score),
        lambda: integral(pred, bins=torch.rand(4, requires_grad=True)),
    ):
        with pytest.raises(RuntimeError, match=rf"'{fused.name}'.*grad.*reference"):
            call()
        with torch.no_grad():
            assert bool(call().isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_dtypes_without_a_kernel(dtype):
    """Never a wrong number: either the reference computes it, or a message says the dtype."""
    pred = torch.zeros(3, 4).to(dtype)
    try:
        got = quality_focal_loss(pred, GOOD)
    except (TypeError, RuntimeError) as error:
        assert re.search("float8", str(error))
    else:
        assert float(got) == pytest.approx(float(quality_focal_loss(z(3, 4), GOOD)))


DEBUG_CASES = [
    # (call, words of the message)
    ("q(torch.zeros(3, 4), (torch.tensor([0, 5, 9]), torch.zeros(3)))", ["label", "row 1", "5"]),
    ("q(torch.zeros(3, 4), (torch.tensor([0, 1, -7]), torch.zeros(3)))", ["label", "row 2", "-7"]),
    (
        "q(torch.zeros(3, 4), (torch.tensor([0, 1, 2]), torch.tensor([0.0, 1.5, 2.0])))",
        ["score", "row 1", "1.5"],
    ),
    (
        "q(torch.zeros(3, 4), (torch.tensor([0, 1, 2]), torch.tensor([0.0, float('nan'), 2.0])))",
        ["score", "1", "nan"],
    ),
    ("q(torch.zeros(2, 3), torch.tensor([[0, 0, 0], [0, -0.5, 0]]))", ["target", "1", "-0.5"]),
    ("q(torch.full((2, 3), 1.5), torch.zeros(2, 3), activated=True)", ["pred", "1.5"]),
    ("d(torch.zeros(3, 5), torch.tensor([0.0, 4.5, 9.0]))", ["target", "row 1", "4.5"]),
    ("d(torch.zeros(3, 5), torch.tensor([0.0, 4.0, float('nan')]))", ["target", "row 2", "nan"]),
    ("d(torch.zeros(3, 5), torch.tensor([-0.25, 4.0, 1.0]))", ["target", "row 0", "-0.25"]),
    (
        "d(torch.zeros(3, 5), (torch.tensor([0, 1, 5]), torch.ones(3), torch.zeros(3)))",
        ["left", "row 2", "5"],
    ),
]


def test_debug_mode_names_the_first_bad_row(backend):
    code = f"""
import torch, gfl_kernels
torch.set_default_device({backend.device!r})
gfl_kernels.use_backend({backend.name!r})
q, d = gfl_kernels.quality_focal_loss, gfl_kernels.distribution_focal_loss
for call, words in {DEBUG_CASES!r}:
    try:
        eval(call)
    except ValueError as error:
        missing = [word for word in words if word not in str(error)]
        print("OK" if not missing else f"{{call}}: {{missing}} not in {{error}}")
    else:
        print(call, "raised nothing")
pred = torch.randn(5, 4, requires_grad=True)
q(pred, (torch.tensor([0, 3, 4, -1, 2]), torch.tensor([0., 1., .5, 0., .2]))).backward()
d(pred, torch.tensor([0., 3., 1.5, 2., .1])).backward()
q(pred[:0], (torch.zeros(0, dtype=torch.long), torch.zeros(0))).backward()
d(pred[:0], torch.zeros(0)).backward()
print("END")
"""
    done = run_python(code, GFL_KERNELS_DEBUG="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-2] == ["OK"] * len(DEBUG_CASES), done.stdout
    assert done.stdout.endswith("END\n")


def test_no_value_checks_by_default(backend):
    """Without the debug mode nothing reads the values: they are served as documented (background,
    clamped).
    """
    code = f"""
import torch, gfl_kernels
torch.set_default_device({backend.device!r})
gfl_kernels.use_backend({backend.name!r})
target = torch.tensor([0, 9, -7]), torch.zeros(3)
print(gfl_kernels.quality_focal_loss(torch.zeros(3, 4), target).item())
print(gfl_kernels.distribution_focal_loss(torch.zeros(3, 5), torch.tensor([-1.0, 4.5, 9.0])).item())
"""
    done = run_python(code, GFL_KERNELS_DEBUG=None)
    assert done.returncode == 0, done.stderr
    first, second = (float(line) for line in done.stdout.split())
    assert first == pytest.approx(4 * 0.25 * 0.6931471805599453, rel=1e-6)
    assert second == pytest.approx(1.6094379124341003, rel=1e-6)
