"""Every instruction set in the library runs the kernel tests; GFL_CPU_ISA is read once at load, so
each in its own process.
"""

import platform

import pytest
from support import run_python

KERNEL_TESTS = ["test_quality.py", "test_distribution.py", "test_odd_shapes.py", "test_traps.py"]
ISAS = ("baseline", "avx2", "avx512")


def available():
    from gfl_kernels.native import available_isas

    return available_isas()


def test_the_choice_is_the_best_available(native):
    done = run_python(
        "import torch, gfl_kernels.native as c; print(c.cpu_isa(), *c.available_isas())",
        GFL_CPU_ISA=None,
    )
    assert done.returncode == 0, done.stderr
    chosen, *names = done.stdout.split()
    assert names == [isa for isa in ISAS if isa in names] and "baseline" in names
    assert chosen == names[-1]


def test_build_info_lists_what_was_compiled_in(native):
    from gfl_kernels.native import build_info

    info = build_info()
    assert isinstance(info, dict) and info
    assert set(available()) <= set(ISAS)
    if platform.machine() in ("x86_64", "AMD64"):
        assert all(isa in str(info) for isa in available())


def test_the_pybind11_module_says_the_same(native):
    from gfl_kernels import native as through_ctypes

    module = pytest.importorskip(
        "gfl_kernels._C", reason="this installation is from a wheel that serves every Python"
    )
    for name in ("build_info", "cpu_isa", "available_isas"):
        assert getattr(module, name)() == getattr(through_ctypes, name)()


@pytest.mark.parametrize("isa", ISAS)
def test_forced_isa_is_what_runs(native, isa):
    code = """
import torch, gfl_kernels, gfl_kernels.native as c
print(c.cpu_isa())
print(gfl_kernels.backends()["cpu"])
"""
    if isa not in available():
        done = run_python(code, GFL_CPU_ISA=isa)
        assert isa in done.stdout + done.stderr and "\nok" not in done.stdout
        pytest.skip(f"this machine or build has no {isa}: refused with a message, as it should be")
    done = run_python(code, GFL_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [isa, "ok"]


@pytest.mark.parametrize("isa", ["avx1024", "AVX2", "neon", " "])
def test_unknown_isa_is_an_error_and_not_a_fallback(native, isa):
    code = """
import torch, gfl_kernels
print(gfl_kernels.backends()["cpu"])
try:
    gfl_kernels.use_backend("cpu")
except RuntimeError as error:
    print(error)
else:
    print("NOT REFUSED")
"""
    done = run_python(code, GFL_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr
    reason, refused = done.stdout.strip("\n").split("\n")
    assert "GFL_CPU_ISA" in reason and isa in reason and "baseline" in reason
    assert reason in refused


@pytest.mark.parametrize("isa", ISAS)
def test_kernels_on_every_isa(native, isa, request):
    """The kernel tests under each instruction set the default choice is not, with every value of
    their parameters, but for finite differences and large inputs.
    """
    from gfl_kernels.native import cpu_isa

    if isa not in available():
        pytest.skip(f"this machine or build has no {isa}")
    if isa == cpu_isa():
        pytest.skip(f"{isa} is what this very run of the suite tests")
    folder = request.path.parent
    tests = [str(folder / name) for name in KERNEL_TESTS]
    skipping = "not reference and not gradcheck and not large_inputs"
    done = run_python(
        ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", skipping, *tests],
        GFL_CPU_ISA=isa,
        GFL_TEST_EXPECT_NATIVE="1",
        GFL_TEST_COMBINATIONS="some",
        PYTEST_ADDOPTS=None,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and " failed" not in done.stdout


@pytest.mark.parametrize("isa", ISAS)
def test_isas_agree(native, isa):
    """Different vector widths add in different orders: the same numbers to float32 rounding, not a
    kernel of its own.
    """
    if isa not in available():
        pytest.skip(f"this machine or build has no {isa}")
    code = """
import torch, gfl_kernels as g
torch.manual_seed(0)
x, z = torch.randn(500, 80, requires_grad=True), torch.randn(500, 17, requires_grad=True)
label, score = torch.randint(0, 81, (500,)), torch.rand(500)
loss = g.quality_focal_loss(x, (label, score)) + g.distribution_focal_loss(z, score * 16)
loss = loss + g.integral(z).mean()
loss.backward()
squares = x.grad.square().sum(), z.grad.square().sum()
for value in (loss.detach(), *squares, x.grad[7, 11], z.grad[9, 16]):
    print(repr(float(value)))
"""
    got, expected = (
        [float(line) for line in run_python(code, GFL_CPU_ISA=name).stdout.split()]
        for name in (isa, "baseline")
    )
    assert len(got) == 5 and got == pytest.approx(expected, rel=2e-6)
