"""Which backend runs, how it is forced and reported, and what importing does (nothing)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support import BACKENDS, logits, run_python, sparse_target, why_not

import gfl_kernels
from gfl_kernels import quality_focal_loss, use_backend

PACKAGE = Path(gfl_kernels.__file__).parent
ALL = ("triton", "cuda", "cpu", "reference")


def which():
    """The backend that serves a plain call, seen by what autograd recorded."""
    pred = torch.randn(4, 3, requires_grad=True)
    loss = quality_focal_loss(pred, (torch.zeros(4, dtype=torch.int64), torch.rand(4)))
    return "fused" if "QualityFocal" in loss.grad_fn.name() else "reference"


def test_backends_names_and_reasons():
    table = gfl_kernels.backends()
    assert tuple(table) == ALL
    assert table["reference"] == "ok"
    for name, reason in table.items():
        assert isinstance(reason, str) and reason
        assert name in BACKENDS or reason != "ok"
    table["cpu"] = "changed by the caller"
    assert gfl_kernels.backends()["cpu"] != "changed by the caller"


def test_cpu_backend_serves_by_default_when_it_is_built(native):
    assert which() == "fused"


def test_use_backend_as_a_context_manager(native):
    assert which() == "fused"
    with use_backend("reference"):
        assert which() == "reference"
        with use_backend("cpu"):
            assert which() == "fused"
            with use_backend(None):
                assert which() == "fused"
            with use_backend("reference"):
                assert which() == "reference"
            assert which() == "fused"
        assert which() == "reference"
    assert which() == "fused"


def test_use_backend_is_restored_after_an_exception(native):
    with pytest.raises(KeyError):
        with use_backend("reference"):
            raise KeyError("anything")
    assert which() == "fused"


def test_use_backend_object_can_be_entered_again(native):
    choice = use_backend("reference")
    use_backend(None)
    with choice:
        assert which() == "reference"
    use_backend(None)
    assert which() == "fused"


def test_use_backend_as_a_function(native):
    try:
        use_backend("reference")
        assert which() == "reference"
        use_backend("cpu")
        assert which() == "fused"
    finally:
        use_backend(None)
    assert which() == "fused"


@pytest.mark.parametrize("name", ["native", "CPU", "", 3])
def test_unknown_backend(name):
    with pytest.raises(ValueError, match="use_backend: .*triton, cuda, cpu, reference"):
        use_backend(name)
    assert which() in ("fused", "reference")


@pytest.mark.parametrize("name", [name for name in ALL if name != "reference"])
def test_a_backend_that_is_not_there_is_refused_with_its_reason(name):
    if why_not(name) is None:
        use_backend(name)
        use_backend(None)
        return
    with pytest.raises(RuntimeError) as caught:
        use_backend(name)
    assert repr(name) in str(caught.value) and why_not(name) in str(caught.value)
    assert "reference" in str(caught.value), "the message names what is usable"
    with pytest.raises(RuntimeError):
        with use_backend(name):
            pass


def test_a_forced_backend_never_falls_back(fused):
    pred = torch.randn(3, 4, device="meta")
    target = (torch.zeros(3, dtype=torch.int64, device="meta"), torch.zeros(3, device="meta"))
    with pytest.raises(
        RuntimeError,
        match=rf"'{fused.name}' cannot run quality_focal_loss.*meta.*usable.*reference",
    ):
        quality_focal_loss(pred, target)


def test_without_force_a_call_the_kernels_cannot_serve_goes_to_the_reference(native):
    pred = torch.randn(3, 4)
    score = torch.rand(3, requires_grad=True)
    loss = quality_focal_loss(pred, (torch.zeros(3, dtype=torch.int64), score))
    assert torch.autograd.grad(loss, score)[0].shape == (3,)
    on_meta = quality_focal_loss(
        pred.to("meta"), (torch.zeros(3, dtype=torch.int64, device="meta"), score.to("meta"))
    )
    assert on_meta.device.type == "meta" and on_meta.shape == ()


PROBE = """
import os, torch, gfl_kernels
torch.set_default_device(os.environ.get("PROBE_DEVICE", "cpu"))
pred = torch.zeros(4, 3, requires_grad=True)
loss = gfl_kernels.quality_focal_loss(pred, (torch.zeros(4, dtype=torch.int64), torch.zeros(4)))
print(loss.grad_fn.name())
"""


@pytest.mark.parametrize("name", list(BACKENDS))
def test_environment_forces_a_backend(name):
    done = run_python(PROBE, GFL_KERNELS_BACKEND=name, PROBE_DEVICE=BACKENDS[name])
    if why_not(name) is not None:
        assert done.returncode != 0 and name in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert ("QualityFocal" in done.stdout) == (name != "reference")


def test_environment_choice_can_be_left_with_use_backend(native):
    code = "import gfl_kernels\ngfl_kernels.use_backend('cpu')" + PROBE
    assert "QualityFocal" in run_python(code, GFL_KERNELS_BACKEND="reference").stdout


@pytest.mark.parametrize("name", ["triton", "cuda", "nonsense"])
def test_environment_with_a_backend_that_cannot_run(name):
    """Importing never fails; the first call does, and says where the wish came from."""
    if why_not(name) is None if name in ALL else False:
        pytest.skip(f"backend {name!r} is usable here")
    done = run_python(
        "import gfl_kernels; print(sorted(gfl_kernels.backends()))", GFL_KERNELS_BACKEND=name
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    done = run_python(PROBE, GFL_KERNELS_BACKEND=name)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert name in last and "reference" in last, last


# ---- importing


def test_import_prints_nothing_and_loads_nothing_heavy():
    code = """
import sys, torch
before = set(sys.modules)
import gfl_kernels
print("\\n".join(sorted(set(sys.modules) - before)))
"""
    done = run_python(code, fresh=True, GFL_KERNELS_BACKEND=None)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    new = {
        name.split(".")[0] if not name.startswith("torch") else name for name in done.stdout.split()
    }
    heavy = {
        "triton",
        "numpy",
        "setuptools",
        "subprocess",
        "torch._inductor",
        "torch._dynamo",
        "torch.onnx",
    }
    assert not new & heavy, new & heavy
    silent = run_python("import gfl_kernels")
    assert silent.returncode == 0 and silent.stdout == "" and silent.stderr == ""


def copy_without_library(folder):
    """The pure-Python package alone, as a machine without a compiler installs it."""
    shutil.copytree(
        PACKAGE,
        folder / "gfl_kernels",
        ignore=shutil.ignore_patterns("lib", "*.so", "__pycache__", "_build_report.json"),
    )
    return folder


INSPECT = """
import json, sys
sys.path.insert(0, {folder!r})
import torch, gfl_kernels
assert gfl_kernels.__file__.startswith({folder!r}), gfl_kernels.__file__
pred = torch.randn(4, 3, requires_grad=True)
loss = gfl_kernels.quality_focal_loss(pred, (torch.zeros(4, dtype=torch.int64), torch.zeros(4)))
loss.backward()
try:
    gfl_kernels.use_backend("cpu")
except RuntimeError as error:
    refused = str(error)
else:
    refused = ""
print(json.dumps([gfl_kernels.backends()["cpu"], loss.grad_fn.name(), refused]))
"""


def inspect_copy(folder, **env):
    done = run_python(INSPECT.format(folder=str(folder)), **env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_package_without_the_library_runs_on_the_reference(tmp_path):
    reason, grad_fn, refused = inspect_copy(copy_without_library(tmp_path))
    assert "libgfl_native.so" in reason and "pip install" in reason
    assert "QualityFocal" not in grad_fn and reason in refused


def test_a_broken_library_is_explained(tmp_path):
    folder = copy_without_library(tmp_path)
    (folder / "gfl_kernels" / "lib").mkdir()
    (folder / "gfl_kernels" / "lib" / "libgfl_native.so").write_bytes(
        b"\x7fELF but not really" * 100
    )
    reason, grad_fn, refused = inspect_copy(folder)
    assert "could not be loaded" in reason and "libgfl_native.so" in reason
    assert "QualityFocal" not in grad_fn and reason in refused


def test_build_report_is_quoted(tmp_path):
    folder = copy_without_library(tmp_path)
    report = {"why": "no C++ compiler was found", "hint": "apt install g++"}
    (folder / "gfl_kernels" / "_build_report.json").write_text(json.dumps(report))
    reason, _, refused = inspect_copy(folder)
    assert report["why"] in reason and report["hint"] in reason and reason in refused
    (folder / "gfl_kernels" / "_build_report.json").write_text("{ not json")
    assert "libgfl_native.so" in inspect_copy(folder)[0]


def test_report_of_python_m():
    done = run_python(["-m", "gfl_kernels"])
    assert done.returncode == 0, done.stderr
    for word in (gfl_kernels.__version__, torch.__version__, *ALL):
        assert word in done.stdout, word
    for reason in gfl_kernels.backends().values():
        assert reason in done.stdout


def test_report_of_python_m_names_the_instruction_set(native):
    from gfl_kernels.native import available_isas

    done = run_python(["-m", "gfl_kernels"], GFL_CPU_ISA=None)
    assert any(isa in done.stdout for isa in available_isas())


def test_public_names():
    for name in gfl_kernels.__all__:
        assert getattr(gfl_kernels, name) is not None
    assert (PACKAGE / "py.typed").exists()
    for name in (
        "quality_focal_loss",
        "varifocal_loss",
        "sigmoid_focal_loss",
        "matchability_aware_loss",
        "ia_bce_loss",
        "distribution_focal_loss",
        "integral",
        "gfl_loss",
        "task_aligned_loss",
        "decode_boxes",
        "localization_distillation_loss",
        "bin_weights",
        "backends",
        "use_backend",
    ):
        assert name in gfl_kernels.__all__ and getattr(gfl_kernels, name).__doc__


def test_modules_are_plain():
    """They pickle, copy, move between dtypes and repeat in a config without surprise."""
    import copy
    import pickle

    for module in (
        gfl_kernels.QualityFocalLoss(beta=1.5, loss_weight=2.0),
        gfl_kernels.VarifocalLoss(alpha=0.5, loss_weight=2.0),
        gfl_kernels.FocalLoss(gamma=1.5, loss_weight=2.0),
        gfl_kernels.DistributionFocalLoss(loss_weight=0.25),
        gfl_kernels.Integral(7),
    ):
        clone = pickle.loads(pickle.dumps(module))
        assert type(clone) is type(module)
        assert list(clone.state_dict()) == list(module.state_dict())
        assert not list(module.parameters())
        copy.deepcopy(module)
    layer = gfl_kernels.Integral(7)
    x = logits(5, 32, extremes=False)
    expected = layer(x)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        torch.testing.assert_close(layer.to(dtype)(x), expected, rtol=1e-6, atol=1e-5)


def test_nothing_is_left_in_force_by_the_suite():
    pred = torch.randn(4, 3)
    quality_focal_loss(pred, sparse_target((4,), 3))
    assert which() == ("fused" if why_not("cpu") is None else "reference")
