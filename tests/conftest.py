"""Fixtures every test file uses; the helpers they rest on are in support.py."""

import gc
import os
import types

# Idle threads of OpenMP spin, on the cores of the other workers. Read once, when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from support import BACKENDS, FUSED, INTERPRETED, cycled, force, need

from gfl_kernels.adapters import restore
from gfl_kernels.adapters.mmdet import allow_mmcv_lite

try:
    import hypothesis
except ImportError:
    hypothesis = None  # test_odd_shapes.py runs without it, under sanitizers
else:
    hypothesis.settings.register_profile("default", deadline=None, print_blob=True)
    hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
    # Interpreted, an unlucky draw takes minutes.
    derandomised = os.environ.get("CI") or INTERPRETED
    hypothesis.settings.load_profile("ci" if derandomised else "default")


@pytest.fixture(params=list(BACKENDS))
def backend(request):
    """Each usable backend in turn, forced for the length of the test."""
    yield from force(request.param)


@pytest.fixture(params=list(FUSED))
def fused(request):
    """Each usable backend with hand-written kernels, forced for the length of the test."""
    yield from force(request.param)


@pytest.fixture
def native():
    """For tests that need the compiled library itself."""
    need("cpu")


@pytest.fixture(scope="session")
def mmdet():
    """mmdetection's classes, with mmcv-lite: these need no compiled operation."""
    pytest.importorskip("mmcv", reason="mmdetection's losses need mmcv-lite: it is not installed")
    allow_mmcv_lite()
    package = pytest.importorskip("mmdet", reason="mmdetection is not installed")
    assert package.__version__ == "3.3.0"
    from mmdet.models.dense_heads import gfl_head
    from mmdet.models.losses import focal_loss, gfocal_loss, kd_loss, varifocal_loss
    from mmdet.structures.bbox import distance2bbox

    return types.SimpleNamespace(
        QualityFocalLoss=gfocal_loss.QualityFocalLoss,
        DistributionFocalLoss=gfocal_loss.DistributionFocalLoss,
        VarifocalLoss=varifocal_loss.VarifocalLoss,
        FocalLoss=focal_loss.FocalLoss,
        Integral=gfl_head.Integral,
        GFLHead=gfl_head.GFLHead,
        distance2bbox=distance2bbox,
        KnowledgeDistillationKLDivLoss=kd_loss.KnowledgeDistillationKLDivLoss,
    )


@pytest.fixture(scope="session")
def ultralytics(tmp_path_factory):
    """The package, with its settings in a folder of the tests' and no look at the network."""
    os.environ.setdefault("YOLO_CONFIG_DIR", str(tmp_path_factory.mktemp("ultralytics")))
    os.environ.setdefault("YOLO_OFFLINE", "true")
    package = pytest.importorskip("ultralytics", reason="ultralytics is not installed")
    assert package.__version__.startswith("8.4.")
    return package


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_host_is_left_patched():
    yield
    restore()


def pytest_collection_finish():
    gc.freeze()  # visiting what imports have made was a seventh of the time of Triton's compiler


def _is_in_part(item):
    marker = item.get_closest_marker("interpreted_part")
    return marker is None or any(item.name.startswith(part) for part in marker.args)


def _with_every_value(items):
    """Of each test so many combinations of its parameters that every value of each occurs; the rule
    of support.combinations."""
    tests = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = set()
    for test in tests.values():
        values = [
            tuple(map(repr, item.callspec.params.values())) if hasattr(item, "callspec") else ()
            for item in test
        ]
        axes = [list(dict.fromkeys(axis)) for axis in zip(*values, strict=True)]
        diagonal = set(cycled(*axes)) if axes else {()}
        chosen, seen = set(), set()
        # Not every combination is there: others stand in for those of the diagonal that are not.
        for here in sorted(values, key=lambda value: value not in diagonal):
            if here in diagonal or set(enumerate(here)) - seen:
                chosen.add(here)
                seen.update(enumerate(here))
        kept.update(item for item, here in zip(test, values, strict=True) if here in chosen)
    return kept


def pytest_collection_modifyitems(config, items):
    """Interpreted, the suite is about the Triton backend: the rest has been run without. All of it
    runs on a GPU.
    """
    mine = items
    if INTERPRETED:
        mine = [
            item
            for item in items
            if "triton" in item.nodeid.partition("[")[2] or item.get_closest_marker("interpreted")
            if _is_in_part(item)
        ]
    if os.environ.get("GFL_TEST_COMBINATIONS", "some" if INTERPRETED else "all") == "some":
        kept = _with_every_value(mine)
        mine = [item for item in mine if item in kept]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(mine)])
    items[:] = mine


if INTERPRETED:
    import interpreter

    interpreter.install()
