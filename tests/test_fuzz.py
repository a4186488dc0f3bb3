"""Hypothesis: shapes, strides, dtypes, extreme values and argument forms nobody thought of, against
the float64 reference.
"""

import pytest
import torch
from support import (
    ATOL,
    FAMILY,
    INTERPRETED,
    PUBLIC,
    RTOL,
    assert_no_worse,
    check_op,
    evaluate,
    expected,
    random_upstream,
    why_not,
)

import gfl_kernels
from gfl_kernels import dispatch, distribution_focal_loss, integral, quality_focal_loss

hypothesis = pytest.importorskip("hypothesis", reason="the fuzzing needs hypothesis")
st = hypothesis.strategies

pytestmark = pytest.mark.interpreted
EXAMPLES = 12 if INTERPRETED else 150
BACKEND = "triton" if INTERPRETED else "cpu" if why_not("cpu") is None else "reference"

FLOATS = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
ANY_FLOAT = st.sampled_from([torch.float32, torch.float64, torch.float16])
LABELS = st.sampled_from(
    [torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8, torch.float32, torch.float64]
)
REDUCTION = st.sampled_from(["none", "mean", "sum"])
SEED = st.integers(0, 2**31)
# Few values, so that equal logits, s == q and saturation on both sides come up
SPECIAL = torch.tensor(
    [
        0.0,
        -0.0,
        1.0,
        -1.0,
        17.0,
        -17.0,
        33.0,
        -33.0,
        88.7,
        -88.7,
        95.0,
        -95.0,
        110.0,
        -110.0,
        1e4,
        -1e4,
    ]
)


@pytest.fixture(autouse=True, scope="module")
def _backend():
    if BACKEND == "reference" and expected("cpu"):
        pytest.fail(f"GFL_TEST_EXPECT_NATIVE=1, but there is no cpu backend: {why_not('cpu')}")
    with gfl_kernels.use_backend(BACKEND):
        yield


@st.composite
def row_shapes(draw):
    return tuple(draw(st.lists(st.integers(0, 9), min_size=0, max_size=3)))


def values(seed, shape, special):
    """Normal values, a share of them replaced by SPECIAL ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 4
    pick = SPECIAL.double()[torch.randint(len(SPECIAL), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < special, pick, x)


@st.composite
def strided(draw, tensor):
    """The same values in other memory: dimensions permuted, steps and margins in every dimension,
    an odd offset.
    """
    dims = tensor.dim()
    order = draw(st.permutations(range(dims)))
    steps = [draw(st.integers(1, 3)) for _ in range(dims)]
    margins = [draw(st.integers(0, 2)) for _ in range(dims)]
    offset = draw(st.integers(0, 3))
    sizes = [tensor.shape[axis] * steps[axis] + margins[axis] for axis in order]
    total = offset
    block = 1
    for size in sizes:
        block *= size
    storage = torch.zeros(total + block, dtype=tensor.dtype)
    if tensor.is_floating_point():
        storage.fill_(float("nan"))
    box = storage[offset:].view(sizes).permute([order.index(axis) for axis in range(dims)])
    view = box[
        tuple(slice(m, m + n * s, s) for m, n, s in zip(margins, tensor.shape, steps, strict=True))
    ]
    view.copy_(tensor)
    return view


@st.composite
def placed(draw, rows):
    """[..., n] with its last dimension moved to a random place: (tensor, where)."""
    dim = draw(st.integers(0, rows.dim() - 1))
    tensor = rows.movedim(-1, dim)
    where = dim if draw(st.booleans()) else dim - rows.dim()
    return draw(strided(tensor)), where


def check(op, pred, *args, scale, **kwargs):
    upstream = random_upstream(PUBLIC[op](pred, *args, **kwargs))
    if dispatch.compiled_calls() is not None:
        # In C++ and in Python a call is the same to the last bit.
        in_cpp = evaluate(PUBLIC[op], pred, upstream, args, kwargs)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dispatch, "_autograd", None)
            in_python = evaluate(PUBLIC[op], pred, upstream, args, kwargs)
        torch.testing.assert_close(in_cpp, in_python, rtol=0, atol=0, equal_nan=True)
    return check_op(op, pred, *args, upstream=upstream, scale=scale, **kwargs)


@st.composite
def averaging(draw, reduction):
    """avg_factor arguments for a reduction, and the factor they divide by."""
    if reduction == "sum" or draw(st.booleans()):
        return {}
    factor = draw(st.sampled_from([1, 2.5, 100.0, 0.25]))
    if draw(st.booleans()):
        shape = draw(st.sampled_from([(), (1,)]))
        return {"avg_factor": torch.full(shape, float(factor))}
    return {"avg_factor": factor}


@hypothesis.settings(max_examples=EXAMPLES)
@hypothesis.given(st.data())
def test_quality(data):
    shape = data.draw(row_shapes(), "rows")
    classes = data.draw(st.integers(1, 40) | st.sampled_from([63, 64, 65, 80, 81, 129]), "classes")
    dtype, seed = data.draw(FLOATS, "dtype"), data.draw(SEED, "seed")
    # Every second example is the Quality Focal Loss itself.
    qfl = {f"qfl{i}": ("quality", {"activated": i > 6}) for i in range(len(FAMILY))}
    op, form = {**qfl, **FAMILY}[data.draw(st.sampled_from([*qfl, *FAMILY]), "form")]
    activated = form.get("activated", False)
    beta = data.draw(st.sampled_from([2.0, 2.0, 0.0, 1.0, 1.5, 3.0]), "beta")
    form = {**form, "beta" if op in ("quality", "balanced") else "gamma": beta}
    x = values(seed, (*shape, classes), data.draw(st.sampled_from([0.0, 0.2, 1.0]), "special"))
    if activated:
        # Where p is 0 or 1 the gradient is 1e12: tested point by point elsewhere.
        x = x.sigmoid().clamp(1e-3, 1 - 1e-3)
    pred, dim = data.draw(placed(x.to(dtype)), "pred")
    generator = torch.Generator().manual_seed(seed + 1)
    score_dtype = data.draw(ANY_FLOAT, "score dtype")
    if data.draw(st.booleans(), "sparse"):
        label_dtype = data.draw(LABELS, "label dtype")
        label = torch.randint(-2, classes + 3, shape, generator=generator)
        if not label_dtype.is_floating_point:
            label = label.clamp(torch.iinfo(label_dtype).min, torch.iinfo(label_dtype).max)
        score = torch.rand(shape, generator=generator).mul(8).round().div(8)
        target = (
            data.draw(strided(label.to(label_dtype))),
            data.draw(strided(score.to(score_dtype))),
        )
    else:
        dense = torch.rand((*shape, classes), generator=generator).mul(8).round().div(8)
        target = data.draw(strided(dense.movedim(-1, dim).to(score_dtype)), "dense target")
    weight = None
    weighting = data.draw(st.sampled_from(["none", "row", "element", "stride0"]), "weight")
    if weighting != "none":
        weight_shape = pred.shape if weighting == "element" else shape
        weight = torch.rand(weight_shape, generator=generator).mul(4).floor().div(2)
        if weighting == "stride0":
            weight = torch.tensor(0.75).expand(shape)
        else:
            weight = data.draw(strided(weight.to(data.draw(ANY_FLOAT, "weight dtype"))))
    reduction = data.draw(REDUCTION, "reduction")
    kwargs = data.draw(averaging(reduction), "averaging")
    check(
        op,
        pred,
        target,
        **form,
        weight=weight,
        reduction=reduction,
        class_dim=dim,
        # 1 / p(1 - p) is up to 1000 for the probabilities above; a factor below 1 multiplies
        # everything
        scale=(1000 if activated else 1) * 8,
        **kwargs,
    )


@hypothesis.settings(max_examples=EXAMPLES)
@hypothesis.given(st.data())
def test_distribution(data):
    shape = data.draw(row_shapes(), "rows")
    bins = data.draw(st.integers(2, 40) | st.sampled_from([2, 8, 16, 17, 33, 64, 65]), "bins")
    dtype, seed = data.draw(FLOATS, "dtype"), data.draw(SEED, "seed")
    z = values(seed, (*shape, bins), data.draw(st.sampled_from([0.0, 0.2, 1.0]), "special"))
    pred, dim = data.draw(placed(z.to(dtype)), "pred")
    generator = torch.Generator().manual_seed(seed + 1)
    other = data.draw(ANY_FLOAT, "target dtype")
    if data.draw(st.booleans(), "explicit"):
        left = torch.randint(-1, bins + 1, shape, generator=generator)
        weights = torch.rand((2, *shape), generator=generator)
        left = left.to(
            data.draw(st.sampled_from([torch.int64, torch.int32, torch.float32]), "left dtype")
        )
        target = tuple(
            data.draw(strided(part)) for part in (left, weights[0].to(other), weights[1].to(other))
        )
    else:
        position = torch.rand(shape, generator=generator).mul(bins + 1).sub(1).mul(4).round().div(4)
        target = data.draw(strided(position.to(other)), "target")
    weight = None
    if data.draw(st.booleans(), "weighted"):
        weight = torch.rand(shape, generator=generator).mul(4).floor().div(2)
        weight = data.draw(strided(weight.to(data.draw(ANY_FLOAT, "weight dtype"))))
    reduction = data.draw(REDUCTION, "reduction")
    kwargs = data.draw(averaging(reduction), "averaging")
    check(
        "distribution",
        pred,
        target,
        weight=weight,
        reduction=reduction,
        bin_dim=dim,
        scale=8,
        **kwargs,
    )


@hypothesis.settings(max_examples=EXAMPLES)
@hypothesis.given(st.data())
def test_integral(data):
    shape = data.draw(row_shapes(), "rows")
    bins = data.draw(st.integers(1, 40) | st.sampled_from([2, 8, 16, 17, 33, 64, 65]), "bins")
    dtype, seed = data.draw(FLOATS, "dtype"), data.draw(SEED, "seed")
    z = values(seed, (*shape, bins), data.draw(st.sampled_from([0.0, 0.2, 1.0]), "special"))
    pred, dim = data.draw(placed(z.to(dtype)), "pred")
    y = None
    if data.draw(st.booleans(), "bins given"):
        y = values(seed + 1, (bins,), 0.0)
        y = data.draw(strided(y.to(data.draw(ANY_FLOAT, "bins dtype"))), "bins")
    scale = float(bins if y is None else max(1.0, y.double().abs().max()))
    upstream = random_upstream(integral(pred, bins=y, bin_dim=dim))
    kwargs = {"bins": y, "bin_dim": dim, "scale": scale}
    check_op("integral", pred, upstream=upstream, **kwargs)
    window = data.draw(st.integers(0, 3), "window")
    check_op("integral", pred, upstream=upstream, mode="peak", window=window, **kwargs)
    check_op("moments", pred, **kwargs)
    topk = data.draw(st.integers(1, min(bins, 6)), "topk")
    check_op("statistics", pred, topk=topk, add_mean=data.draw(st.booleans()), bin_dim=dim)


@hypothesis.settings(max_examples=EXAMPLES)
@hypothesis.given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=24),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.integers(0, 30),
)
def test_any_float_at_all(numbers, dtype, label):
    """NaN, infinities, denormals, the largest floats: what comes out is what the reference in
    float64 says.
    """
    pred = torch.tensor([numbers, numbers[::-1]], dtype=torch.float64).to(dtype)
    upstream = torch.ones(2)
    target = (torch.tensor([label, len(numbers)]), torch.tensor([0.5, 0.0]))
    kinds = {
        "quality": ((target,), {"reduction": "none"}),
        "distribution": ((torch.tensor([label / 2.0, 0.0]),), {"reduction": "none"}),
        "integral": ((), {}),
    }
    for op, (args, kwargs) in kinds.items():
        check_op(op, pred, *args, upstream=upstream, scale=len(numbers), **kwargs)


@hypothesis.settings(max_examples=EXAMPLES if INTERPRETED else 60)
@hypothesis.given(st.data())
def test_rows_are_independent(data):
    """A row's loss and gradient do not depend on the rows around it: any slice gives the same bits,
    in any position.
    """
    rows, classes = data.draw(st.integers(2, 70)), data.draw(st.integers(2, 40))
    dtype, seed = data.draw(FLOATS), data.draw(SEED)
    pred = values(seed, (rows, classes), 0.2).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    label, score = (
        torch.randint(0, classes + 1, (rows,), generator=generator),
        torch.rand(rows, generator=generator),
    )
    position = score * (classes - 1)
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    part = slice(start, stop)
    upstream = random_upstream(torch.empty(rows))
    for function, whole, cut in (
        (quality_focal_loss, ((label, score),), ((label[part], score[part]),)),
        (distribution_focal_loss, (position,), (position[part],)),
        (integral, (), ()),
    ):
        kwargs = {} if function is integral else {"reduction": "none"}
        value, grad = evaluate(function, pred, upstream, whole, kwargs)
        part_value, part_grad = evaluate(function, pred[part].clone(), upstream[part], cut, kwargs)
        assert_no_worse(
            part_value,
            value[part],
            value[part],
            what=f"{function.__name__} of a slice",
            scale=classes,
        )
        assert_no_worse(
            part_grad, grad[part], grad[part], what=f"{function.__name__} of a slice", scale=classes
        )


def test_tolerances_are_those_of_the_table():
    """The scales above multiply ATOL only; the table itself is what every other file uses."""
    assert ATOL[torch.float32] == 1e-6 and RTOL[torch.float32] == 2e-6
