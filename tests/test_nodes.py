"""gfl_kernels._autograd: what it takes, what it leaves to Python, and that nobody can tell the two
apart. test_autograd.py has the behaviour of either, test_fuzz.py compares them on random calls.
"""

import copy
import gc
import pickle
import threading
import time
import weakref

import pytest
import torch
from support import expected, logits, random_upstream, run_python, sparse_target
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import gfl_kernels
from gfl_kernels import dispatch, native, reference, use_backend

ROWS, CLASSES = 6, 5


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """The module; without one there is nothing here to test."""
    module = native.autograd()
    if module is None:
        # Where the library must be there, so must this.
        end = pytest.fail if expected("cpu") else pytest.skip
        end(f"calls go through Python: {native.autograd_why_not()}")
    return module


def quality_arguments(**changes):
    usual = {
        "pred": torch.randn(ROWS, CLASSES, requires_grad=True),
        "target": sparse_target((ROWS,), CLASSES),
        "form": reference.LOGITS,
        "flags": 0,
        "alpha": 0.0,
        "beta": 2.0,
        "weight": None,
        "avg_factor": None,
        "reduction": "mean",
        "class_dim": -1,
        "loss_weight": 1.0,
        "elementwise": False,
    }
    assert changes.keys() <= usual.keys()
    return (usual | changes).values()


def distribution_arguments(**changes):
    usual = {
        "pred": torch.randn(ROWS, CLASSES, requires_grad=True),
        "target": torch.rand(ROWS) * (CLASSES - 1),
        "weight": None,
        "avg_factor": None,
        "reduction": "mean",
        "bin_dim": -1,
        "loss_weight": 1.0,
    }
    assert changes.keys() <= usual.keys()
    return (usual | changes).values()


def integral_arguments(**changes):
    usual = {
        "pred": torch.randn(ROWS, CLASSES, requires_grad=True),
        "bins": None,
        "bin_dim": -1,
        "mode": "mean",
        "window": 2,
    }
    assert changes.keys() <= usual.keys()
    return (usual | changes).values()


ARGUMENTS = {
    "quality": quality_arguments,
    "distribution": distribution_arguments,
    "integral": integral_arguments,
}


class Subclass(torch.Tensor):
    pass


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def rows(dtype=torch.float32):
    return torch.rand(ROWS).to(dtype)


# ---- what it takes


TAKEN = {
    "quality": [
        {},
        {"pred": torch.nn.Parameter(torch.randn(ROWS, CLASSES))},
        {"pred": torch.randn(ROWS, CLASSES)},
        {"pred": torch.randn(ROWS, CLASSES, dtype=torch.bfloat16)},
        {"pred": torch.randn(CLASSES, ROWS), "class_dim": 0},
        {"pred": torch.randn(CLASSES, ROWS).t()},
        {"target": list(sparse_target((ROWS,), CLASSES))},
        {"target": (rows(torch.uint8), rows(torch.float64))},
        {"target": torch.rand(ROWS, CLASSES)},
        {"weight": rows()},
        {"weight": rows().unsqueeze(-1).expand(ROWS, CLASSES)},
        {"avg_factor": 3},
        {"avg_factor": torch.tensor([2.0])},
        {"avg_factor": torch.tensor(2.0, requires_grad=True)},
        {"reduction": "none", "avg_factor": 2.0},
        {"reduction": "sum", "loss_weight": 2},
        {"elementwise": True},
        {"form": reference.VARIFOCAL, "alpha": 0.75, "flags": reference.DETACH_WEIGHT},
    ],
    "distribution": [
        {},
        {"target": (rows(torch.int64), rows(), rows())},
        {"weight": rows(torch.float64)},
        {"pred": torch.randn(2, CLASSES, 3), "target": torch.rand(2, 3), "bin_dim": 1},
    ],
    "integral": [
        {},
        {"bins": torch.rand(CLASSES)},
        {"mode": "peak", "window": 1},
        {"pred": torch.randn(2, CLASSES, 3), "bin_dim": -2},
    ],
}


@pytest.mark.parametrize(
    "name, case", [(name, i) for name, cases in TAKEN.items() for i in range(len(cases))]
)
def test_usual_calls_are_taken(compiled, name, case):
    arguments = ARGUMENTS[name](**TAKEN[name][case])
    value = getattr(compiled, name)(*arguments)
    assert isinstance(value, torch.Tensor)
    (pred, *_) = arguments
    assert value.requires_grad == pred.requires_grad


@pytest.mark.parametrize("forced", [None, "cpu"])
def test_public_functions_and_modules_begin_there(monkeypatch, forced):
    """None of them asks which backend is to run."""
    monkeypatch.setattr(dispatch, "choose", lambda *_: pytest.fail("the call went through Python"))
    pred, target = torch.randn(ROWS, CLASSES), sparse_target((ROWS,), CLASSES)
    position = torch.rand(ROWS)
    with use_backend(forced):
        gfl_kernels.quality_focal_loss(pred, target)
        gfl_kernels.quality_focal_loss(pred, target, alpha=0.5)
        gfl_kernels.varifocal_loss(pred, target)
        gfl_kernels.matchability_aware_loss(pred, target)
        gfl_kernels.ia_bce_loss(pred, target)
        gfl_kernels.sigmoid_focal_loss(pred, target, reduction="mean")
        gfl_kernels.distribution_focal_loss(pred, position)
        gfl_kernels.integral(pred)
        gfl_kernels.QualityFocalLoss()(pred, target)
        gfl_kernels.VarifocalLoss()(pred, target)
        gfl_kernels.FocalLoss()(pred, target[0])
        gfl_kernels.DistributionFocalLoss()(pred, position)
        gfl_kernels.Integral(CLASSES - 1)(torch.randn(ROWS, 4 * CLASSES))


# ---- what it leaves to Python


def dual(tensor):
    return forward_ad.make_dual(tensor, torch.ones_like(tensor))


def with_grad(tensor):
    return tensor.clone().requires_grad_()


# What any of the tensors of a call may be.
SPECIAL_TENSORS = {
    "a subclass": lambda t: t.as_subclass(Subclass),
    "a pending sign": lambda t: torch._neg_view(t),
    "on meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "complex": lambda t: t.to(torch.complex64),
    "an odd dtype": lambda t: t.to(torch.float8_e5m2),
    "uint16": lambda t: t.to(torch.uint16),
    "no tensor": lambda t: t.numpy(),
    "nothing": lambda t: None,
    "another shape": lambda t: torch.cat([t, t]),
    "another rank": lambda t: t.unsqueeze(0),
}
# The arguments of a call in which one tensor is made into another.
TENSORS = {
    ("quality", "pred"): lambda make: {"pred": make(torch.randn(ROWS, CLASSES))},
    ("quality", "label"): lambda make: {"target": (make(rows()), rows())},
    ("quality", "score"): lambda make: {"target": (rows(), make(rows()))},
    ("quality", "dense"): lambda make: {"target": make(torch.rand(ROWS, CLASSES))},
    ("quality", "weight"): lambda make: {"weight": make(rows())},
    ("distribution", "pred"): lambda make: {"pred": make(torch.randn(ROWS, CLASSES))},
    ("distribution", "target"): lambda make: {"target": make(rows())},
    ("distribution", "left"): lambda make: {"target": (make(rows()), rows(), rows())},
    ("distribution", "weight"): lambda make: {"weight": make(rows())},
    ("integral", "pred"): lambda make: {"pred": make(torch.randn(ROWS, CLASSES))},
    ("integral", "bins"): lambda make: {"bins": make(torch.rand(CLASSES))},
}
USUAL_AS_WELL = {
    ("weight", "nothing"),
    ("bins", "nothing"),
    ("integral", "another shape"),  # its pred has any number of rows,
    ("integral", "another rank"),  # in any shape
}


@pytest.mark.parametrize(
    "name, argument, special",
    [
        (name, argument, special)
        for name, argument in TENSORS
        for special in SPECIAL_TENSORS
        if (argument, special) not in USUAL_AS_WELL
        and not (argument == "pred" and (name, special) in USUAL_AS_WELL)
    ],
)
def test_special_tensors_are_left(compiled, name, argument, special):
    changes = TENSORS[name, argument](SPECIAL_TENSORS[special])
    assert getattr(compiled, name)(*ARGUMENTS[name](**changes)) is None
    usual = TENSORS[name, argument](lambda tensor: tensor)
    assert getattr(compiled, name)(*ARGUMENTS[name](**usual)) is not None


@pytest.mark.parametrize(
    "name, changes",
    [
        ("quality", {"target": (rows(), with_grad(rows()))}),
        ("quality", {"target": with_grad(torch.rand(ROWS, CLASSES))}),
        ("quality", {"weight": with_grad(rows())}),
        ("distribution", {"target": with_grad(rows())}),
        ("distribution", {"target": (rows(), rows(), with_grad(rows()))}),
        ("integral", {"bins": with_grad(torch.rand(CLASSES))}),
    ],
)
def test_a_derivative_that_kernels_do_not_have_is_left(compiled, name, changes):
    assert getattr(compiled, name)(*ARGUMENTS[name](**changes)) is None
    with torch.no_grad():
        assert getattr(compiled, name)(*ARGUMENTS[name](**changes)) is not None


@pytest.mark.parametrize(
    "name, changes",
    [
        *(("quality", {"class_dim": dim}) for dim in (2, -3, 1.0, None, True, 2**70)),
        *(("quality", {"beta": beta}) for beta in (-1, float("nan"), "2", None, 10**400)),
        *(("quality", {"alpha": alpha}) for alpha in ("1", None)),
        *(("quality", {"reduction": reduction}) for reduction in ("Mean", None, b"mean", 1)),
        *(("quality", {"avg_factor": value}) for value in ("2", -(2.0**-23), torch.ones(2))),
        ("quality", {"avg_factor": torch.ones(1, 1)}),
        ("quality", {"avg_factor": 2.0, "reduction": "sum"}),
        ("quality", {"loss_weight": torch.tensor(2.0)}),
        ("quality", {"elementwise": True, "reduction": "none"}),
        ("quality", {"target": (rows(),)}),
        ("quality", {"target": (rows(), rows(), rows())}),
        ("quality", {"weight": rows()[:-1]}),
        ("quality", {"pred": torch.randn(ROWS, 0)}),
        ("quality", {"pred": torch.randn(())}),
        ("quality", {"pred": torch.zeros(ROWS, CLASSES, dtype=torch.int64)}),
        ("distribution", {"target": (rows(), rows())}),
        ("distribution", {"reduction": "batchmean"}),
        ("integral", {"bins": torch.rand(CLASSES, dtype=torch.float64)}),
        ("integral", {"bins": (0, 4, 1)}),
        *(("integral", {"mode": mode}) for mode in ("median", None)),
        *(("integral", {"window": window}) for window in (-1, 1.5, True, 2**70)),
    ],
)
def test_other_arguments_are_left(compiled, name, changes):
    """Also what Python takes: it is rare, and there it is written down once."""
    assert getattr(compiled, name)(*ARGUMENTS[name](**changes)) is None


def under(context):
    def run(function):
        with context():
            return function()

    return run


def traced(function):
    """Called while torch.jit.trace records."""
    found = []

    def record(x):
        found.append(function())
        return x + 1

    torch.jit.trace(record, torch.zeros(1), check_trace=False)
    return found[0]


def transformed(function):
    found = []

    def record(x):
        found.append(function())
        return x.sum()

    torch.func.grad(record)(torch.zeros(1))
    return found[0]


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize(
    "listener",
    [
        pytest.param(under(FunctionMode), id="function mode"),
        pytest.param(under(DispatchMode), id="dispatch mode"),
        pytest.param(under(lambda: torch.device("cpu")), id="default device"),
        pytest.param(transformed, id="torch.func.grad"),
        pytest.param(traced, id="torch.jit.trace", marks=pytest.mark.filterwarnings("ignore")),
    ],
)
def test_who_listens_hears_it_in_python(compiled, name, listener):
    arguments = ARGUMENTS[name]()
    assert listener(lambda: getattr(compiled, name)(*arguments)) is None
    assert getattr(compiled, name)(*arguments) is not None


def test_vmap_is_left(compiled):
    seen, usual = [], integral_arguments()

    def call(x):
        seen.append(compiled.integral(x, *list(usual)[1:]))
        seen.append(compiled.integral(*usual))
        return x.sum()

    torch.vmap(call)(torch.randn(3, ROWS, CLASSES))
    assert seen == [None, None]


def test_forward_mode_is_left(compiled):
    with forward_ad.dual_level():
        for name, argument, tensor in [
            ("quality", "pred", torch.randn(ROWS, CLASSES)),
            ("quality", "target", torch.rand(ROWS, CLASSES)),
            ("distribution", "weight", rows()),
            ("integral", "bins", torch.rand(CLASSES)),
        ]:
            changes = {argument: dual(tensor)}
            assert getattr(compiled, name)(*ARGUMENTS[name](**changes)) is None


@pytest.mark.parametrize("switch", ["debug", "reference", "triton"])
def test_switches_that_python_knows_come_first(monkeypatch, switch):
    if switch == "debug":
        monkeypatch.setattr(dispatch, "DEBUG", True)
    else:
        monkeypatch.setattr(dispatch, "_forced", switch)
    assert dispatch.compiled_calls() is None


def test_the_number_of_arguments_is_checked(compiled):
    for name in ARGUMENTS:
        with pytest.raises(RuntimeError, match=f"{name} takes .* arguments, got 1"):
            getattr(compiled, name)(torch.zeros(1))


# ---- the node


def loss_of(pred):
    return gfl_kernels.quality_focal_loss(pred, sparse_target(pred.shape[:1], pred.shape[1]))


def test_names_are_those_of_the_functions():
    """What users see as grad_fn is called the same on either way."""
    pred = logits(ROWS, CLASSES).requires_grad_()
    calls = [
        lambda: loss_of(pred),
        lambda: gfl_kernels.distribution_focal_loss(pred, rows()),
        lambda: gfl_kernels.integral(pred),
    ]
    for call in calls:
        name = call().grad_fn.name()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dispatch, "_autograd", None)
            assert call().grad_fn.name() == name


def test_creation_hooks_see_each_node_once():
    graph = torch.autograd.graph
    if not hasattr(graph, "node_creation_hook"):
        pytest.skip(f"torch {torch.__version__} has no such hooks")
    pred = logits(ROWS, CLASSES).requires_grad_()
    seen = []
    with graph.node_creation_hook(lambda node: seen.append(node.name())):
        loss_of(pred)
    assert seen.count("QualityFocalBackward") == 1


def test_anomaly_mode_names_the_forward_call():
    pred = logits(ROWS, CLASSES, extremes=False).requires_grad_()
    with torch.autograd.detect_anomaly(check_nan=True), pytest.warns(UserWarning) as warned:
        loss = loss_of(pred) * float("nan")
        with pytest.raises(RuntimeError, match="returned nan values"):
            loss.backward()
    assert any("loss_of" in str(w.message) for w in warned)


def test_nodes_are_freed_with_the_loss():
    """What they save goes with them: nothing waits for Python's collector."""
    pred, score = torch.randn(ROWS, CLASSES, requires_grad=True), torch.rand(ROWS)
    loss = gfl_kernels.quality_focal_loss(pred, (torch.zeros(ROWS, dtype=torch.int64), score))
    saved = weakref.ref(score)
    gc.disable()
    try:
        del score
        assert saved() is not None
        del loss
        assert saved() is None
    finally:
        gc.enable()


def test_a_long_chain_of_nodes_is_freed_without_recursion():
    """torch deletes graphs in a loop; ours are links like any other."""
    code = """
import torch, gfl_kernels
x = torch.zeros(1, 2, requires_grad=True)
y = x
for _ in range(60000):
    y = gfl_kernels.integral(y).unsqueeze(-1).expand(1, 2)
del y
print("freed")
"""
    done = run_python(code, fresh=True)
    assert done.stdout.strip() == "freed", done.stderr


def test_missing_upstream_gradient_counts_as_zero():
    pred = logits(ROWS, CLASSES).requires_grad_()
    loss = loss_of(pred)

    class Silent(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    (grad,) = torch.autograd.grad(Silent.apply(loss), pred)
    assert torch.equal(grad, torch.zeros_like(pred))


def test_compiled_autograd_records_it():
    """A backward that is compiled apart from its forward calls the node's, and gives the same."""
    code = """
import torch, gfl_kernels
from gfl_kernels import dispatch
torch.manual_seed(0)
label, score = torch.randint(0, 6, (6,)), torch.rand(6)
pred = torch.randn(6, 5)

def grad(name, upstream, compile):
    leaf = pred.clone().requires_grad_()
    if name == "quality":
        value = gfl_kernels.quality_focal_loss(leaf * 2, (label, score))
    elif name == "distribution":
        value = gfl_kernels.distribution_focal_loss(leaf * 2, score * 4)
    else:
        value = gfl_kernels.integral(leaf * 2).sum()
    assert "Backward" in value.grad_fn.name()
    if compile:
        backend = torch.compile(backend="eager")
        with torch._dynamo.compiled_autograd._enable(backend):
            (value * upstream).backward()
    else:
        (value * upstream).backward()
    return leaf.grad

for name in ("quality", "distribution", "integral"):
    for upstream in (1.0, 0.5):
        assert torch.equal(grad(name, upstream, True), grad(name, upstream, False)), name
print("same")
"""
    done = run_python(code, fresh=True)
    assert done.stdout.strip() == "same", done.stderr


def test_copies_of_modules_and_pickles_know_nothing_of_it():
    loss = gfl_kernels.QualityFocalLoss()
    pred, target = logits(ROWS, CLASSES), sparse_target((ROWS,), CLASSES)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(other(pred, target), loss(pred, target))


def test_the_gil_is_free_while_kernels_run():
    """Another thread runs Python meanwhile: a worker that loads data is not held up."""
    pred, target = torch.randn(20000, 400), sparse_target((20000,), 400)
    stop, ticks = threading.Event(), []

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0)

    thread = threading.Thread(target=tick)
    thread.start()
    within = []
    try:
        for _ in range(10):
            began = time.perf_counter()
            gfl_kernels.quality_focal_loss(pred, target, beta=1.5)
            within.append((began, time.perf_counter()))
    finally:
        stop.set()
        thread.join()
    # Around a call that kept it there is one at either end.
    assert max(sum(began < t < ended for t in ticks) for began, ended in within) > 5


# ---- other versions of torch


def fresh_native(monkeypatch, **changes):
    for name, value in changes.items():
        monkeypatch.setattr(native, name, value)
    return native._load_autograd.__wrapped__()


def test_another_torch_is_told_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(native, "import_module", lambda *_: pytest.fail("it was loaded"))
    info = native.build_info() | {"built_against_torch": "2.10.0"}
    module, why = fresh_native(monkeypatch, build_info=lambda: info)
    assert module is None
    assert "built against torch 2.10.0" in why and torch.__version__ in why
    assert "pip install --no-build-isolation ." in why


def test_a_module_that_was_left_out_says_why(monkeypatch):
    report = {"left_out": {"autograd": "its headers are of another world"}}
    module, why = fresh_native(monkeypatch, build_report=lambda: report)
    assert module is None and "its headers are of another world" in why


def test_a_module_that_cannot_be_loaded_says_why(monkeypatch):
    def fail(*_):
        raise ImportError("undefined symbol: _ZN5torch")

    module, why = fresh_native(monkeypatch, import_module=fail)
    assert module is None and "undefined symbol: _ZN5torch" in why


def test_the_report_says_which_way_calls_go():
    done = run_python("import runpy; runpy.run_module('gfl_kernels', run_name='__main__')")
    assert "calls reach the CPU kernels through C++" in done.stdout


def test_values_are_the_same_without_it(monkeypatch):
    pred = logits(40, 17).requires_grad_()
    for call in (
        loss_of,
        lambda x: gfl_kernels.quality_focal_loss(x, torch.rand(40, 17).clamp(0.1), beta=1.5),
        lambda x: gfl_kernels.distribution_focal_loss(x, torch.full((40,), 3.3), reduction="none"),
        lambda x: gfl_kernels.integral(x, mode="peak"),
    ):
        results = []
        for module in (native.autograd(), None):
            monkeypatch.setattr(dispatch, "_autograd", module)
            torch.manual_seed(1)
            value = call(pred)
            (grad,) = torch.autograd.grad(value, pred, random_upstream(value))
            results.append((value.detach(), grad))
        assert all(map(torch.equal, *results))
