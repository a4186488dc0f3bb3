"""The ops under autograd, torch.compile, autocast, GradScaler, checkpointing, export: what users
wrap around a loss.
"""

import concurrent.futures
import shutil

import pytest
import torch
import torch._dynamo.testing
import torch._subclasses.fake_tensor
import torch.utils.checkpoint
from support import (
    BACKENDS,
    FUSED,
    INTERPRETED,
    Backend,
    assert_no_worse,
    bin_target,
    check_op,
    dense_target,
    explicit_target,
    force,
    logits,
    random_upstream,
    row_weight,
    run_python,
    sparse_target,
    stacked_moments,
    thinned,
    to_double,
)

import gfl_kernels
from gfl_kernels import (
    distribution_focal_loss,
    distribution_moments,
    distribution_statistics,
    ia_bce_loss,
    integral,
    matchability_aware_loss,
    quality_focal_loss,
    reference,
    sigmoid_focal_loss,
    varifocal_loss,
)


@pytest.fixture(params=[*BACKENDS, "cpu-python"])
def backend(request):
    """conftest's, and the CPU kernels once more without their nodes in C++."""
    yield from force(request.param)


@pytest.fixture(params=[*FUSED, "cpu-python"])
def fused(request):
    yield from force(request.param)


ops = torch.ops.gfl_kernels
NONE, SUM = 0, 1
# form, flags, alpha of the op
LOGITS, PROBABILITIES = (reference.LOGITS, 0, 0.0), (reference.PROBABILITIES, 0, 0.0)
DETACHED = reference.VARIFOCAL, reference.DETACH_WEIGHT, 0.75
FOCAL = reference.FOCAL, 0, 0.25


def calls(rows=40, classes=17, device="cpu", seed=0):
    """name -> a function of pred [rows, classes] alone: every public form once."""
    label, score = sparse_target((rows,), classes, device=device, seed=seed)
    dense = dense_target((rows,), classes, device=device, seed=seed)
    weight = row_weight((rows,), device=device, seed=seed)
    position = bin_target((rows,), classes, device=device, seed=seed)
    explicit = explicit_target((rows,), classes, device=device, seed=seed)
    factor = torch.tensor(7.5, device=device)
    y = torch.linspace(-3, 9, classes, device=device)
    return {
        "quality_sparse_mean": lambda x: quality_focal_loss(x, (label, score)),
        "quality_sparse_none": lambda x: quality_focal_loss(x, (label, score), reduction="none"),
        "quality_dense_factor": lambda x: quality_focal_loss(
            x, dense, weight=weight, avg_factor=factor
        ),
        "quality_dense_sum_beta": lambda x: quality_focal_loss(x, dense, beta=1.5, reduction="sum"),
        "quality_probability": lambda x: quality_focal_loss(
            x.sigmoid(), (label, score), activated=True
        ),
        "varifocal_sparse_factor": lambda x: varifocal_loss(
            x, (label, score), weight=weight, avg_factor=factor
        ),
        "focal_none": lambda x: sigmoid_focal_loss(x, dense),
        "focal_labels_mean": lambda x: sigmoid_focal_loss(x, label, reduction="mean"),
        "matchability_sum": lambda x: matchability_aware_loss(x, (label, score), reduction="sum"),
        "ia_bce_factor": lambda x: ia_bce_loss(x, (label, score), avg_factor=7.5),
        "distribution_mean": lambda x: distribution_focal_loss(
            x, position, weight=weight, avg_factor=4
        ),
        "distribution_none": lambda x: distribution_focal_loss(x, position, reduction="none"),
        "distribution_explicit": lambda x: distribution_focal_loss(
            x, explicit, weight=weight, reduction="sum"
        ),
        "integral": lambda x: integral(x),
        "integral_bins": lambda x: integral(x, bins=y),
        "integral_peak": lambda x: integral(x, bins=y, mode="peak", window=1),
        "statistics": lambda x: distribution_statistics(x),
        "moments": lambda x: stacked_moments(x, bins=y),
    }


NAMES = tuple(calls())


def a_third(which):
    """Of the forms where Triton interprets: what autograd does hardly depends on the kernel."""
    return thinned(NAMES, which)


# ---- opcheck


def quality_forms(requires_grad):
    pred = logits(12, 5, extremes=False)
    label, score = sparse_target((12,), 5)
    dense, weight, factor = dense_target((12,), 5), row_weight((12,)), torch.tensor(3.0)
    nchw = logits(2, 5, 3, 2, extremes=False).permute(0, 2, 3, 1)
    wide = logits(12, 9, extremes=False)[:, 2:7]
    label4, score4 = label.view(2, 3, 2), score.view(2, 3, 2)
    tensors = [
        (pred, label, score, None, None, LOGITS),
        (pred, label, score, weight, factor, LOGITS),
        (pred, dense, None, weight[:, None].expand(12, 5), None, LOGITS),
        (pred.sigmoid(), dense, None, None, torch.tensor([3.0]), PROBABILITIES),
        (nchw, label4, score4, weight.view(2, 3, 2), None, LOGITS),
        (wide, label.to(torch.uint8), score.double(), None, None, LOGITS),
        (pred.double(), label, score.double(), None, None, LOGITS),
        (pred.bfloat16(), label, score, weight, None, LOGITS),
        (pred[:0], label[:0], score[:0], None, None, LOGITS),
        (pred, label, score, weight, None, DETACHED),
        (pred, dense, None, None, factor, FOCAL),
    ]
    for first, *rest, form in tensors:
        yield (first.detach().requires_grad_(requires_grad), *rest, *form)


def distribution_forms(requires_grad):
    pred = logits(12, 5, extremes=False)
    position, weight, factor = bin_target((12,), 5), row_weight((12,)), torch.tensor(3.0)
    left, weight_left, weight_right = explicit_target((12,), 5)
    sides = logits(3, 5, 4, extremes=False).transpose(1, 2)
    tensors = [
        (pred, position, None, None, None, None),
        (pred, position, None, None, weight, factor),
        (pred, left, weight_left, weight_right, weight, None),
        (sides, position.view(3, 4), None, None, weight.view(3, 4), None),
        (pred.half(), position.half(), None, None, None, None),
        (pred.double(), left, weight_left, weight_right, None, torch.tensor([2.0])),
        (pred[:0], position[:0], None, None, None, None),
    ]
    for first, *rest in tensors:
        yield (first.detach().requires_grad_(requires_grad), *rest)


def test_opcheck_quality(native):
    for form in quality_forms(requires_grad=True):
        for reduction, write_grad in ((NONE, False), (SUM, False), (SUM, True)):
            arguments = (*form, 2.0, 0.5, reduction, write_grad)
            torch.library.opcheck(ops.quality_forward.default, arguments)
    for form in quality_forms(requires_grad=False):
        for reduction in (NONE, SUM):
            shape = form[0].shape[:-1] if reduction == NONE else ()
            dtype = torch.float64 if form[0].dtype == torch.float64 else torch.float32
            upstream = random_upstream(torch.empty(shape, dtype=dtype))
            torch.library.opcheck(
                ops.quality_backward.default, (upstream, *form, 2.0, 0.5, reduction)
            )


def test_opcheck_distribution(native):
    for form in distribution_forms(requires_grad=True):
        for reduction, write_grad in ((NONE, False), (SUM, False), (SUM, True)):
            torch.library.opcheck(
                ops.distribution_forward.default, (*form, 0.5, reduction, write_grad)
            )
    for form in distribution_forms(requires_grad=False):
        for reduction in (NONE, SUM):
            shape = form[0].shape[:-1] if reduction == NONE else ()
            dtype = torch.float64 if form[0].dtype == torch.float64 else torch.float32
            upstream = random_upstream(torch.empty(shape, dtype=dtype))
            torch.library.opcheck(
                ops.distribution_backward.default, (upstream, *form, 0.5, reduction)
            )


def test_opcheck_integral(native):
    pred = logits(12, 5, extremes=False)
    sides = logits(3, 5, 4, extremes=False).transpose(1, 2)
    for form in (pred, sides, pred.bfloat16(), pred.double(), pred[:0]):
        dtype = torch.float64 if form.dtype == torch.float64 else torch.float32
        for bins in (None, torch.randn(5, dtype=dtype)):
            for save in (False, True):
                leaf = form.detach().requires_grad_()
                torch.library.opcheck(ops.integral_forward.default, (leaf, bins, -1, save))
            upstream = random_upstream(torch.empty(form.shape[:-1], dtype=dtype))
            _, saved = ops.integral_forward(form.detach(), bins, -1, True)
            for kept in (None, saved):
                inputs = (upstream, form.detach(), bins, -1, kept)
                torch.library.opcheck(ops.integral_backward.default, inputs)


def test_opcheck_summaries(native):
    sides = logits(3, 5, 4, extremes=False).transpose(1, 2)
    y = torch.randn(5)
    cases = (
        (logits(12, 5, extremes=False), "statistics", (4,), (3, True)),
        (sides, "statistics", (5,), (5, False)),
        (sides.half(), "moments", (3,), (None,)),
        (sides.double()[:0], "moments", (3,), (y.double(),)),
        (sides, "integral", (), (y, 1)),
    )
    for form, name, columns, arguments in cases:
        dtype = torch.float64 if form.dtype == torch.float64 else torch.float32
        leaf = form.detach().requires_grad_()
        torch.library.opcheck(getattr(ops, f"{name}_forward").default, (leaf, *arguments))
        upstream = random_upstream(torch.empty((*form.shape[:-1], *columns), dtype=dtype))
        backward = getattr(ops, f"{name}_backward").default
        torch.library.opcheck(backward, (upstream, form.detach(), *arguments))


# ---- torch.compile


def value_and_grad(function, pred, upstream=None):
    leaf = pred.detach().requires_grad_()
    value = function(leaf)
    upstream = random_upstream(value) if upstream is None else upstream
    (grad,) = torch.autograd.grad(value, leaf, upstream)
    return value.detach(), grad


@pytest.mark.parametrize("name", a_third(1))
def test_compile_fullgraph(fused, name):
    compile_fullgraph(fused, name)


@pytest.mark.parametrize("name", ["quality_sparse_mean", "distribution_mean", "integral"])
def test_compile_fullgraph_of_the_reference(name):
    with gfl_kernels.use_backend("reference"):
        compile_fullgraph(Backend("reference", "cpu"), name)


def compile_fullgraph(backend, name):
    function = calls(device=backend.device)[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for dtype in (torch.float32,) if INTERPRETED else (torch.float32, torch.bfloat16):
        pred = logits(40, 17, dtype=dtype, device=backend.device)
        expected, expected_grad = value_and_grad(function, pred)
        got, grad = value_and_grad(compiled, pred)
        assert got.dtype == expected.dtype and grad.dtype == expected_grad.dtype
        assert_no_worse(got, expected, expected, what=f"{name} compiled")
        assert_no_worse(grad, expected_grad, expected_grad, what=f"{name} compiled gradient")
        with torch.no_grad():
            assert_no_worse(compiled(pred), expected, expected, what=f"{name} compiled, no_grad")


@pytest.mark.skipif(
    shutil.which("c++") is None, reason="inductor needs a C++ compiler, and there is none"
)
def test_compile_with_inductor(backend):
    """A head, both losses and the decode in one compiled graph, forward and backward."""
    label, score = sparse_target((30,), 8, device=backend.device)
    position = bin_target((30, 4), 6, device=backend.device)

    def step(feature, weight):
        out = feature @ weight
        classes, sides = out[:, :8], out[:, 8:].view(-1, 4, 6)
        loss = quality_focal_loss(classes, (label, score), avg_factor=11.0)
        loss = loss + 0.25 * distribution_focal_loss(
            sides, position, weight=score[:, None].expand(-1, 4)
        )
        return loss + integral(sides).square().mean()

    feature, weight = (
        torch.randn(30, 16, device=backend.device),
        torch.randn(16, 32, device=backend.device),
    )
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    results = []
    for function in (step, compiled):
        leaf = weight.clone().requires_grad_()
        loss = function(feature, leaf)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-4, atol=1e-5)


def test_compile_does_not_recompile_for_every_number_of_rows(backend):
    """Multi-scale training changes N each step: two graphs (one static, one dynamic) serve all of
    them.
    """
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(pred, label, score, sides, position):
        loss = quality_focal_loss(pred, (label, score)) + distribution_focal_loss(sides, position)
        return loss + integral(sides).mean()

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for rows in (8, 9, 40, 41, 64, 100, 128, 333):
        pred = logits(rows, 5, device=backend.device, seed=rows, extremes=False)
        sides = logits(rows, 9, device=backend.device, seed=rows, extremes=False)
        label, score = sparse_target((rows,), 5, device=backend.device, seed=rows)
        position = bin_target((rows,), 9, device=backend.device, seed=rows)
        results = []
        for function in (step, compiled):
            a, b = pred.clone().requires_grad_(), sides.clone().requires_grad_()
            loss = function(a, label, score, b, position)
            results.append((loss.detach(), *torch.autograd.grad(loss, (a, b))))
        for got, expected in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2, f"{counter.frame_count} graphs for 8 numbers of rows"


def test_compile_with_dynamic_shapes_and_a_tensor_avg_factor(backend):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    module = gfl_kernels.QualityFocalLoss(loss_weight=0.5)
    after_first = 0
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for rows, classes in ((8, 5), (19, 5), (19, 11), (64, 80)):
        pred = logits(rows, classes, device=backend.device, extremes=False).requires_grad_()
        target = sparse_target((rows,), classes, device=backend.device)
        factor = torch.tensor(float(rows), device=backend.device)
        expected, got = (loss(pred, target, avg_factor=factor) for loss in (module, compiled))
        after_first = after_first or counter.frame_count
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-6)
        (a,), (b,) = (torch.autograd.grad(loss, pred) for loss in (expected, got))
        torch.testing.assert_close(b, a, rtol=2e-6, atol=1e-6)
    assert counter.frame_count == after_first


def test_compile_sees_a_change_of_backend(fused):
    """use_backend is a guarded global: the compiled function follows it."""
    torch._dynamo.reset()
    pred = logits(10, 4, extremes=False)
    target = sparse_target((10,), 4)
    graphs = []

    def backend_that_looks(graph, inputs):
        graphs.append(
            {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
        )
        return graph

    compiled = torch.compile(
        lambda x: quality_focal_loss(x, target), fullgraph=True, backend=backend_that_looks
    )
    compiled(pred)
    with gfl_kernels.use_backend("reference"):
        compiled(pred)
    compiled(pred)
    assert [any("gfl_kernels" in name for name in graph) for graph in graphs] == [True, False]


@pytest.mark.parametrize("name", [name for name in a_third(0) if name != "quality_probability"])
def test_fake_tensors(backend, name):
    """Memory estimators run a step on tensors without values: nothing may look at one."""
    with torch._subclasses.fake_tensor.FakeTensorMode():
        function = calls(device=backend.device)[name]
        leaf = torch.randn(40, 17, device=backend.device).requires_grad_()
        function(leaf).sum().backward()
        assert leaf.grad.shape == leaf.shape and leaf.grad.dtype == leaf.dtype


# ---- autocast and GradScaler


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", a_third(0))
def test_autocast_reads_the_half_logits(backend, dtype, name):
    function = calls(device=backend.device)[name]
    feature = torch.randn(40, 8, device=backend.device)
    weight = torch.randn(8, 17, device=backend.device)
    with torch.autocast(backend.device, dtype=dtype):
        pred = torch.mm(feature, weight)
        assert pred.dtype == dtype
        got, grad = value_and_grad(function, pred)
        again, grad32 = value_and_grad(function, pred.float())
    expected, expected_grad = value_and_grad(function, pred)
    assert got.dtype == torch.float32 and grad.dtype == dtype
    # float16 rounds a sigmoid to 1: its gradient, 1e12, is infinite in float16, and NaN after
    # sigmoid's derivative
    exact = {"rtol": 0, "atol": 0, "equal_nan": name == "quality_probability"}
    torch.testing.assert_close(got, expected, **exact)
    torch.testing.assert_close(grad, expected_grad, **exact)
    if name != "quality_probability":  # sigmoid() itself rounds to half
        assert_no_worse(again, expected, expected, what=name)
    assert grad32.dtype == torch.float32


@pytest.mark.parametrize("loss", ["quality", "distribution"])
def test_grad_scaler(backend, loss):
    """float16 logits, scale 65536, mean over 4096 rows: unscaled gradients below float16's range
    must come through.
    """
    rows, width = 4096, 17
    master = logits(rows, width, device=backend.device, extremes=False).requires_grad_()
    optimizer = torch.optim.SGD([master], lr=1.0)
    scaler = torch.amp.GradScaler(backend.device, init_scale=65536.0)
    target = sparse_target((rows,), width) if loss == "quality" else bin_target((rows,), width)
    function = quality_focal_loss if loss == "quality" else distribution_focal_loss
    oracle = (
        reference.quality_focal_loss if loss == "quality" else reference.distribution_focal_loss
    )
    half = master.half()
    scaler.scale(function(half, target)).backward()
    scaler.unscale_(optimizer)
    truth_leaf = half.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(oracle(truth_leaf, to_double(target)), truth_leaf)
    error = (master.grad.double() - truth).abs()
    # Half an ulp of float16 at the scaled value; its smallest normal is 6.1e-5 / 65536 here.
    assert bool(
        (error <= truth.abs() * 2.0**-11 + 2.0**-24 / 65536 + 1e-6 * truth.abs().max()).all()
    )
    lost = (truth.half() == 0) & (truth != 0)
    assert bool(lost.any()), "the case must hold gradients that float16 loses without the scale"
    assert bool((master.grad[lost] != 0).float().mean() > 0.9)
    before = master.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 65536.0 and not torch.equal(master.detach(), before)


# ---- backward is pure


@pytest.mark.parametrize("name", a_third(0))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_twice_is_identical(backend, name, dtype):
    """Also when the first gradient is overwritten by its owner, and whatever the upstream gradient
    was.
    """
    function = calls(device=backend.device)[name]
    leaf = logits(40, 17, dtype=dtype, device=backend.device).requires_grad_()
    for upstream_of in (torch.ones_like, random_upstream):
        value = function(leaf)
        upstream = upstream_of(value)
        kept = upstream.clone()
        (first,) = torch.autograd.grad(value, leaf, upstream, retain_graph=True)
        copy = first.clone()
        first.fill_(float("nan"))
        (other,) = torch.autograd.grad(value, leaf, upstream * 0.5, retain_graph=True)
        other.zero_()
        (second,) = torch.autograd.grad(value, leaf, upstream, retain_graph=True)
        assert torch.equal(second, copy)
        second.mul_(3)
        (third,) = torch.autograd.grad(value, leaf, upstream)
        assert torch.equal(third, copy)
        assert torch.equal(upstream, kept)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(value, leaf, upstream)


@pytest.mark.parametrize("name", a_third(1))
def test_saved_tensors_are_not_written_and_are_few(backend, name):
    """At most one tensor the size of the logits is saved beyond the inputs."""
    function = calls(device=backend.device)[name]
    leaf = logits(40, 17, device=backend.device).requires_grad_()
    saved = []

    def pack(tensor):
        saved.append((tensor, tensor.clone()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = function(leaf)
    inputs = {cell.cell_contents.untyped_storage().data_ptr() for cell in _tensors_of(function)}
    inputs.add(leaf.untyped_storage().data_ptr())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t, _ in saved}
    extra = sum(size for pointer, size in storages.items() if pointer not in inputs)
    if backend.fused:
        bound = leaf.numel() * leaf.element_size()
        bound *= 2 if name == "quality_probability" else 1  # sigmoid saves its own result, once
        bound += 4 if name == "focal_labels_mean" else 0  # labels alone have a score of 1
        assert extra <= bound, f"{extra} bytes saved beyond the inputs, allowed {bound}"
    torch.autograd.grad(value, leaf, random_upstream(value), retain_graph=True)
    torch.autograd.grad(value, leaf, torch.ones_like(value), retain_graph=True)
    for tensor, copy in saved:
        assert torch.equal(tensor.nan_to_num(), copy.nan_to_num())


def _tensors_of(function):
    def cells(closure):
        for cell in closure or ():
            if isinstance(cell.cell_contents, torch.Tensor):
                yield cell
            elif isinstance(cell.cell_contents, tuple):
                for item in cell.cell_contents:
                    if isinstance(item, torch.Tensor):
                        yield _Cell(item)

    return cells(function.__closure__)


class _Cell:
    def __init__(self, contents):
        self.cell_contents = contents


def test_memory_saved_for_each_dtype(fused):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for name, function in calls(device=fused.device).items():
            if name == "quality_probability":
                continue
            leaf = logits(40, 17, dtype=dtype, device=fused.device).requires_grad_()
            sizes = {}

            def pack(tensor, sizes=sizes):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                value = function(leaf)
            sizes.pop(leaf.untyped_storage().data_ptr(), None)
            for cell in _tensors_of(function):
                sizes.pop(cell.cell_contents.untyped_storage().data_ptr(), None)
            bound = leaf.numel() * leaf.element_size()
            bound += 4 if name == "focal_labels_mean" else 0  # labels alone have a score of 1
            assert sum(sizes.values()) <= bound, f"{name} {dtype}: {sizes}"
            assert value.requires_grad


@pytest.mark.parametrize("name", a_third(2))
def test_inputs_are_not_written(backend, name):
    function = calls(device=backend.device)[name]
    pred = logits(40, 17, device=backend.device)
    tensors = [cell.cell_contents for cell in _tensors_of(function)]
    copies = [tensor.clone() for tensor in (pred, *tensors)]
    value_and_grad(function, pred)
    for tensor, copy in zip((pred, *tensors), copies, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("name", [name for name in a_third(1) if name != "quality_probability"])
def test_logits_changed_in_place_before_backward(backend, name):
    """Either autograd notices, or the gradient is that of the logits as they were: never one of the
    changed ones.
    """
    leaf = logits(40, 17, device=backend.device).requires_grad_()
    function = calls(device=backend.device)[name]
    _, expected = value_and_grad(function, leaf, torch.ones_like(function(leaf)))
    pred = leaf * 1.0
    value = function(pred)
    pred.mul_(0.5)
    try:
        value.sum().backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        torch.testing.assert_close(leaf.grad, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", a_third(2))
def test_activation_checkpointing(backend, name, use_reentrant):
    function = calls(device=backend.device)[name]
    leaf = logits(40, 17, device=backend.device).requires_grad_()
    upstream = random_upstream(function(leaf))
    (expected,) = torch.autograd.grad(function(leaf), leaf, upstream)
    value = torch.utils.checkpoint.checkpoint(function, leaf, use_reentrant=use_reentrant)
    value.backward(upstream)
    assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("name", a_third(0))
def test_without_gradients(backend, name):
    function = calls(device=backend.device)[name]
    pred = logits(40, 17, device=backend.device)
    expected = function(pred.clone().requires_grad_()).detach()
    plain = function(pred)
    assert not plain.requires_grad and torch.equal(plain, expected)
    with torch.no_grad():
        value = function(pred.clone().requires_grad_())
        assert not value.requires_grad and torch.equal(value, expected)
    with torch.inference_mode():
        assert torch.equal(function(pred), expected)


@pytest.mark.parametrize("name", a_third(1))
def test_gradient_accumulates(backend, name):
    """Two backwards into one .grad, and a loss used twice in one graph."""
    function = calls(device=backend.device)[name]
    pred = logits(40, 17, device=backend.device, extremes=False)
    _, once = value_and_grad(function, pred, torch.ones_like(function(pred)))
    leaf = pred.clone().requires_grad_()
    function(leaf).sum().backward()
    kept = leaf.grad.clone()
    function(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, 2 * once, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(kept, once, rtol=2e-6, atol=2e-6)
    leaf = pred.clone().requires_grad_()
    value = function(leaf).sum()
    (value + value).backward()
    torch.testing.assert_close(leaf.grad, 2 * once, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", a_third(2))
def test_non_leaf_logits_and_hooks(backend, name):
    function = calls(device=backend.device)[name]
    base = logits(40, 34, device=backend.device, extremes=False).requires_grad_()
    pred = base[:, 5:22]
    seen = []
    pred.register_hook(lambda grad: seen.append(grad.clone()))
    function(pred).sum().backward()
    _, expected = value_and_grad(function, pred.detach(), torch.ones_like(function(pred.detach())))
    torch.testing.assert_close(seen[0], expected, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(base.grad[:, 5:22], expected, rtol=2e-6, atol=1e-6)
    assert bool((base.grad[:, :5] == 0).all()) and bool((base.grad[:, 22:] == 0).all())


def test_gradients_of_targets_weights_and_bins_come_from_the_reference():
    """Left to itself the package picks the reference when something but pred requires grad."""
    pred = logits(9, 6, dtype=torch.float64, extremes=False).requires_grad_()
    label = torch.tensor([0, 5, 6, 1, 2, 3, 4, -1, 0])
    for needs in (
        ("score",),
        ("weight",),
        ("score", "weight"),
        ("pred", "score"),
        ("pred", "score", "weight"),
    ):
        score = torch.rand(9, dtype=torch.float64)
        weight = torch.rand(9, dtype=torch.float64) + 0.5
        inputs = {"pred": pred.detach().clone(), "score": score, "weight": weight}
        leaves = [inputs[name].requires_grad_() for name in needs]

        def loss(*_, inputs=inputs):
            return quality_focal_loss(
                inputs["pred"], (label, inputs["score"]), weight=inputs["weight"], reduction="sum"
            )

        assert torch.autograd.gradcheck(loss, leaves)
    y = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p, y: integral(p, bins=y), (pred, y))
    t = torch.rand(9, dtype=torch.float64).add(0.2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p, t: distribution_focal_loss(p, t, reduction="sum"), (pred, t)
    )


# ---- double backward, func transforms


@pytest.mark.parametrize("name", a_third(2))
def test_backward_runs_on_the_backend_of_forward(fused, name):
    """Whatever is in force when it runs; an upstream gradient of 2 makes it run a kernel."""
    function = calls(device=fused.device)[name]
    pred = logits(40, 17, device=fused.device)
    grads = []
    for later in (fused.name, "reference"):
        leaf = pred.clone().requires_grad_()
        with gfl_kernels.use_backend(fused.name):
            loss = (2 * function(leaf)).sum()
        with gfl_kernels.use_backend(later):
            loss.backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("name", a_third(0))
def test_double_backward_is_refused_by_the_fused_backends(fused, name):
    """Not a constant in silence: the message names the backend that can."""
    function = calls(device=fused.device)[name]
    leaf = logits(40, 17, device=fused.device, extremes=False).requires_grad_()
    with pytest.raises(RuntimeError, match=r"double backward[\s\S]*use_backend\('reference'\)"):
        (grad,) = torch.autograd.grad(function(leaf).sum(), leaf, create_graph=True)
        grad.square().sum().backward()


@pytest.mark.parametrize("name", a_third(1))
def test_create_graph_without_a_second_backward_works(backend, name):
    """Optimisers and loggers ask for create_graph and never use it: the first gradient is right all
    the same.
    """
    function = calls(device=backend.device)[name]
    leaf = logits(40, 17, device=backend.device, extremes=False).requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf).sum(), leaf)
    (grad,) = torch.autograd.grad(function(leaf).sum(), leaf, create_graph=True)
    torch.testing.assert_close(grad.detach(), expected, rtol=2e-6, atol=1e-6)


# Of a loss with a detached factor finite differences see what autograd is told not to.
HELD_FACTOR = ("matchability", "ia_bce")


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(HELD_FACTOR)])
def test_double_backward_on_the_reference(name):
    with gfl_kernels.use_backend("reference"):
        function = calls(rows=3, classes=5)[name]
        leaf = logits(3, 5, dtype=torch.float64, extremes=False).requires_grad_()
        assert torch.autograd.gradgradcheck(function, (leaf,))


@pytest.mark.parametrize("name", a_third(2))
def test_func_grad(backend, name):
    """torch.func transforms: right (left to itself, and on the reference), or a message that says
    what to use.
    """
    function = calls(device=backend.device)[name]
    pred = logits(40, 17, device=backend.device, extremes=False)
    _, expected = value_and_grad(function, pred, torch.ones_like(function(pred)))

    def total(x):
        return function(x).sum()

    if backend.fused:
        with pytest.raises(RuntimeError, match=rf"'{backend.name}'.*torch\.func.*reference"):
            torch.func.grad(total)(pred)
        with gfl_kernels.use_backend(None):
            got = torch.func.grad(total)(pred)
    else:
        got = torch.func.grad(total)(pred)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_vmap_over_images(backend):
    pred = logits(4, 10, 6, device=backend.device, extremes=False)
    label, score = sparse_target((4, 10), 6, device=backend.device)
    with gfl_kernels.use_backend(None):
        got = torch.func.vmap(lambda p, a, b: quality_focal_loss(p, (a, b), reduction="sum"))(
            pred, label, score
        )
    expected = quality_focal_loss(pred, (label, score), reduction="none").sum(1)
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", a_third(0))
def test_forward_mode_is_not_silently_wrong(backend, name):
    function = calls(device=backend.device)[name]
    pred, tangent = (
        logits(40, 17, device=backend.device, extremes=False),
        torch.randn(40, 17, device=backend.device),
    )
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(pred, tangent)
        try:
            got = torch.autograd.forward_ad.unpack_dual(function(dual)).tangent
        except (RuntimeError, NotImplementedError) as error:
            assert backend.fused and "forward" in str(error).lower()
            return
    assert got is not None, "the tangent was dropped in silence"
    leaf = pred.clone().requires_grad_()
    value = function(leaf)
    upstream = torch.zeros_like(value)
    flat = upstream.view(-1)
    for index in range(flat.numel()):
        flat.zero_()
        flat[index] = 1
        (row,) = torch.autograd.grad(value, leaf, upstream.clone(), retain_graph=True)
        torch.testing.assert_close(
            (row * tangent).sum(), got.reshape(-1)[index], rtol=1e-3, atol=1e-4
        )


# ---- export


class _Step(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.quality = gfl_kernels.QualityFocalLoss()
        self.varifocal = gfl_kernels.VarifocalLoss()
        self.focal = gfl_kernels.FocalLoss(reduction="none")
        self.distribution = gfl_kernels.DistributionFocalLoss(loss_weight=0.25)
        self.integral = gfl_kernels.Integral(8)

    def forward(self, pred, label, score, sides, position):
        loss = self.quality(pred, (label, score), avg_factor=3.0)
        loss = loss + self.varifocal(pred, (label, score)) + self.focal(pred, label).sum()
        loss = loss + self.distribution(sides.reshape(-1, 9), position)
        return loss, self.integral(sides)


def export_inputs(rows, seed=0):
    label, score = sparse_target((rows,), 5, seed=seed)
    return (
        logits(rows, 5, seed=seed, extremes=False),
        label,
        score,
        logits(rows, 36, seed=seed, extremes=False),
        bin_target((rows * 4,), 9, seed=seed),
    )


@pytest.mark.parametrize("strict", [True, False])
def test_export_gives_plain_operations(strict):
    """An exported model runs where gfl_kernels is not installed."""
    module = _Step()
    program = torch.export.export(module, export_inputs(10), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets and not [
        name for name in targets if not name.startswith(("aten.", "<built-in", "_operator"))
    ]
    for got, expected in zip(
        program.module()(*export_inputs(10)), module(*export_inputs(10)), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_export_of_summaries():
    class Summaries(torch.nn.Module):
        def forward(self, sides):
            peak = integral(sides, bin_dim=2, mode="peak")
            return (
                distribution_statistics(sides, bin_dim=2),
                *distribution_moments(sides, bin_dim=2),
                peak,
            )

    sides = logits(2, 4, 9, 3, 5, extremes=False)
    module = Summaries()
    program = torch.export.export(module, (sides,))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets and not [
        name for name in targets if not name.startswith(("aten.", "<built-in", "_operator"))
    ]
    for got, expected in zip(program.module()(sides), module(sides), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_export_of_the_decode_with_a_dynamic_batch():
    module = gfl_kernels.Integral(16)
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(module, (torch.randn(8, 68),), dynamic_shapes=({0: rows},))
    x = logits(77, 68, extremes=False)
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-5, atol=1e-5)


def test_trace_gives_plain_operations():
    module = gfl_kernels.Integral(16)
    traced = torch.jit.trace(module, torch.randn(8, 68))
    assert "gfl_kernels::" not in str(traced.inlined_graph)
    x = logits(31, 68, extremes=False)
    torch.testing.assert_close(traced(x), module(x), rtol=1e-5, atol=1e-5)


# ---- determinism, threads


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", a_third(1))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_identical_repetition(backend, name, dtype):
    function = calls(rows=3000, device=backend.device)[name]
    pred = logits(3000, 17, dtype=dtype, device=backend.device)
    expected, expected_grad = value_and_grad(function, pred)
    for _ in range(1 if INTERPRETED else 10):
        value, grad = value_and_grad(function, pred.clone())
        assert torch.equal(value, expected) and torch.equal(grad, expected_grad)


# torch.sigmoid itself gives other bits where another number of threads cuts its vectors elsewhere
@pytest.mark.parametrize("name", [name for name in a_third(2) if name != "quality_probability"])
def test_bit_identical_across_thread_counts(fused, name, threads):
    """The reduction is split by rows, not by threads: the same bits whatever the machine."""
    rows = 500 if INTERPRETED else 20000  # torch's threads do not interpret
    function = calls(rows=rows, device=fused.device)[name]
    pred = logits(rows, 17, device=fused.device)
    threads(1)
    expected, expected_grad = value_and_grad(function, pred)
    for count in (2,) if INTERPRETED else (2, 3, 5, 8):
        threads(count)
        value, grad = value_and_grad(function, pred)
        assert torch.equal(value, expected) and torch.equal(grad, expected_grad), f"{count} threads"


def test_calls_from_several_python_threads(backend):
    seeds = range(1 if INTERPRETED else 8)  # interpreted, launches wait for each other
    pred = {seed: logits(500, 17, seed=seed, device=backend.device) for seed in seeds}
    functions = {seed: calls(rows=500, seed=seed, device=backend.device) for seed in seeds}
    names = [name for name in a_third(0) if name != "quality_probability"]
    jobs = [(seed, name) for seed in seeds for name in names]
    expected = {job: value_and_grad(functions[job[0]][job[1]], pred[job[0]]) for job in jobs}

    def work(job):
        return job, value_and_grad(functions[job[0]][job[1]], pred[job[0]])

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for job, (value, grad) in pool.map(work, jobs * 3):
            assert torch.equal(value, expected[job][0]) and torch.equal(grad, expected[job][1])


def test_deterministic_mode(backend):
    """torch.use_deterministic_algorithms fills fresh memory with NaN: nothing is left unwritten."""
    torch.use_deterministic_algorithms(True)
    try:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            for rows, width in ((1, 1), (7, 3), (40, 17), (33, 80)):
                pred = logits(rows, width, dtype=dtype, device=backend.device)
                weight = row_weight((rows,), device=backend.device)
                target = sparse_target((rows,), width, device=backend.device)
                for reduction in ("none", "mean"):
                    check_op("quality", pred, target, weight=weight, reduction=reduction)
                    check_op(
                        "distribution",
                        pred,
                        bin_target((rows,), width),
                        weight=weight,
                        reduction=reduction,
                    )
                check_op("integral", pred, scale=width)
    finally:
        torch.use_deterministic_algorithms(False)


def test_fork_after_use(backend):
    """A data loader forks a process whose parent has used the kernels' threads: the child computes,
    nothing hangs.
    """
    if backend.device != "cpu":
        pytest.skip("CUDA does not survive a fork")
    code = f"""
import os, torch, gfl_kernels
gfl_kernels.use_backend({backend.name!r})
x, t = torch.randn(4000, 80), (torch.zeros(4000, dtype=torch.long), torch.rand(4000))
expected = gfl_kernels.quality_focal_loss(x, t)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    small = gfl_kernels.quality_focal_loss(x[:64], (t[0][:64], t[1][:64]))
    os._exit(0 if bool(small.isfinite()) else 1)
_, status = os.waitpid(child, 0)
assert status == 0, status
assert torch.equal(gfl_kernels.quality_focal_loss(x, t), expected)
"""
    done = run_python(code, timeout=120)
    assert done.returncode == 0, done.stderr
