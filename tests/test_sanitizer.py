"""Addresses of the Triton kernels, proven by triton-viz's sanitizer: see sanitized.py.

The second witness beside ptxsim. Skipped where triton-viz is missing or does not fit the installed
Triton: 3.0 fits Triton 3.6.
"""

import functools
import json
import os

import pytest
from support import run_python


@functools.cache
def results():
    """What sanitized.py prints; skips if triton-viz cannot be imported."""
    probe = run_python("import triton_viz.clients.sanitizer.sanitizer", TRITON_INTERPRET="1")
    if probe.returncode:
        reason = f"triton-viz cannot be imported: {probe.stderr.strip().splitlines()[-1]}"
        if os.environ.get("GFL_TEST_EXPECT_SANITIZER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    run = run_python(["sanitized.py"], TRITON_INTERPRET="1", timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.slow
def test_every_access_lies_inside():
    good = [result for result in results() if not result["changes"]]
    assert len(good) == 24
    for result in good:
        assert result["outside"] == [], result
        # A load or store that no lane ever makes would prove nothing.
        assert result["masked"] == [], result
        checked = set(result["checked"])
        assert {"load of pred", "load of upstream", "store of grad", "store of loss"} <= checked
        assert ("load of weight" in checked) == ("+" in result["case"][3]), result
        assert ("load of partials" in checked) == ("sum" in result["case"]), result


@pytest.mark.slow
def test_the_sanitizer_sees_an_overrun():
    """The same kernels with one argument changed; also behind masks that depend on weights."""
    broken = [result for result in results() if result["changes"]]
    assert len(broken) == 13
    for result in broken:
        operand = next(iter(result["changes"])).partition("_")[0]
        wrong = operand if operand in ("pred", "grad") else "pred"
        assert any(f" of {wrong} in " in access for access in result["outside"]), result
