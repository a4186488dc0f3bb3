"""Fixtures every test file uses; the helpers they rest on are in support.py."""

import os

import pytest
import torch
from support import BACKENDS, FUSED, INTERPRETED, Backend, expect_native, why_not

import gfl_kernels

try:
    import hypothesis
except ImportError:
    hypothesis = None  # test_odd_shapes.py runs without it, under sanitizers
else:
    hypothesis.settings.register_profile("default", deadline=None, print_blob=True)
    hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
    hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def _usable(name):
    reason = why_not(name)
    if reason is None:
        return
    if expect_native() and name == "cpu":
        pytest.fail(f"GFL_TEST_EXPECT_NATIVE=1, but backend {name!r} is not usable: {reason}")
    pytest.skip(f"backend {name!r} is not usable: {reason}")


@pytest.fixture(params=list(BACKENDS))
def backend(request):
    """Each usable backend in turn, forced for the length of the test."""
    _usable(request.param)
    with gfl_kernels.use_backend(request.param):
        yield Backend(request.param, BACKENDS[request.param])


@pytest.fixture(params=list(FUSED))
def fused(request):
    """Each usable backend with hand-written kernels, forced for the length of the test."""
    _usable(request.param)
    with gfl_kernels.use_backend(request.param):
        yield Backend(request.param, BACKENDS[request.param])


@pytest.fixture
def native():
    """For tests that need the compiled library itself."""
    _usable("cpu")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _is_in_part(item):
    marker = item.get_closest_marker("interpreted_part")
    return marker is None or any(item.name.startswith(part) for part in marker.args)


def pytest_collection_modifyitems(config, items):
    """Interpreted, the suite is about the Triton backend; the rest has been run without."""
    if INTERPRETED:
        mine = [
            item
            for item in items
            if "triton" in item.nodeid.partition("[")[2] or item.get_closest_marker("interpreted")
            if _is_in_part(item)
        ]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(mine)])
        items[:] = mine


if INTERPRETED:
    # Triton's interpreter scans triton.language for builtins at every call of a device function,
    # which takes half of its time, though the kernel's own call has patched them already.
    from triton.runtime import interpreter

    _scanned = set()
    _scan = interpreter._patch_lang

    def _call_device_function(self, *args, **kwargs):
        modules = frozenset(
            name for name, value in self.fn.__globals__.items() if value is interpreter.tl.core
        )
        if modules and self.fn.__module__ not in _scanned:
            _scanned.add(self.fn.__module__)
            _scan(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = _call_device_function

    # In Triton 3.6 a tensor is no index: NumPy 2.4 takes no array of one element as a number.
    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_lang_tensor(tensor, scope):
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_lang_tensor

    # It also cuts float32 off to bfloat16, which every compiler rounds to nearest even.
    import numpy as np

    _cast = interpreter.InterpreterBuilder.cast_impl
    _tl = interpreter.tl

    def _cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if (source, target) == (_tl.float32, _tl.bfloat16):
            bits = np.ascontiguousarray(src.data).view(np.uint32)
            rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
            nan = np.isnan(src.data)
            data = np.where(nan, (bits >> 16) | 0x40, rounded).astype(np.uint16)
            return interpreter.TensorHandle(data.reshape(np.shape(src.data)), target)
        if (source, target) == (_tl.bfloat16, _tl.float32):
            data = (np.asarray(src.data).astype(np.uint32) << 16).view(np.float32)
            return interpreter.TensorHandle(data, target)
        return _cast(self, src, dst_type)

    interpreter.InterpreterBuilder.cast_impl = _cast_impl

    # And it rounds the product of an fma. That of two float32 is exact in float64.
    _fma = interpreter.InterpreterBuilder.create_fma

    def _create_fma(self, x, y, z):
        if x.dtype.scalar is not _tl.float32:
            return _fma(self, x, y, z)
        wide = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(wide.astype(np.float32), _tl.float32)

    interpreter.InterpreterBuilder.create_fma = _create_fma
    np.seterr(all="ignore")  # overflow and NaN are what the tests are about
