"""What is shipped around the kernels: make targets, the regression gate, the public API."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import compare
from bench.contestants import OURS
from bench.report import COPY

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("target", ["test-gpu", "sanitize-gpu", "bench-gpu"])
def test_gpu_targets_say_in_a_line_that_there_is_no_gpu(target):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if shutil.which("make") is None or not (ROOT / "Makefile").exists():
        pytest.skip("no make, or no Makefile beside the tests")
    command = ["make", "-s", "-o", ".venv/.package", f"PY={sys.executable}", target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and done.stdout == ""
    said, *rest = done.stderr.splitlines()
    assert said.startswith(f"make {target} needs a CUDA or ROCm GPU: torch {torch.__version__} ")
    assert len(rest) == 1 and rest[0].startswith("make: ***")


# ---- the regression gate


def document(scale=1.0, copy=1.0, spread=0.02, gpu="H100", cases=("a", "b")):
    def row(case, contestant, ms):
        low, high = ms * (1 - spread), ms * (1 + spread)
        return {
            **{"kind": "case", "case": case, "pass": "forward", "contestant": contestant},
            **{"ms_p25": low, "ms_p50": ms, "ms_p75": high},
        }

    rows = [row(case, OURS, 2.0 * (scale if case == "b" else copy)) for case in cases]
    rows += [row(case, COPY, 1.0 * copy) for case in cases]
    return {"machine": {"gpu": gpu, "cpu": "x", "cores": 2, "threads": 2}, "rows": rows}


@pytest.mark.parametrize(
    "later, status, said",
    [
        (document(), 0, "b, forward: 2 ms, now 2 ms, 1.000 times"),
        (document(scale=1.09), 0, "1.090 times"),
        (document(scale=1.2), 1, "slower than 1.1 times: b, forward: 2 ms, now 2.4 ms"),
        (document(scale=0.5), 0, "0.500 times"),
        # The whole machine has become slower: nothing of ours has.
        (document(scale=1.3, copy=1.3), 0, "the machine takes 1.300 times as long"),
        (document(scale=1.6, copy=1.3), 1, "1.231 times"),
        # Rounds that scatter so widely show nothing.
        (document(scale=1.2, spread=0.4), 0, "1.200 times"),
        (document(cases=("a",)), 1, "b, forward: no longer measured"),
        (document(scale=9.0, gpu="A100"), 0, "not compared, another machine (gpu: H100, now A100)"),
    ],
)
def test_gate(later, status, said, tmp_path, capsys):
    for name, content in (("earlier", document()), ("later", later)):
        (tmp_path / name / "triton").mkdir(parents=True)
        (tmp_path / name / "triton" / "bench.json").write_text(json.dumps(content))
    assert compare.main([str(tmp_path / "earlier"), str(tmp_path / "later")]) == status
    printed = capsys.readouterr()
    assert said in printed.out + printed.err
    assert bool(printed.err) == bool(status)


def test_gate_without_figures(tmp_path, capsys):
    (tmp_path / "later").mkdir()
    arguments = [str(tmp_path / "earlier"), str(tmp_path / "later")]
    assert compare.main(arguments) == 2
    assert "no bench.json" in capsys.readouterr().err
    (tmp_path / "later" / "bench.json").write_text(json.dumps(document()))
    assert compare.main(arguments) == 0
    assert "no earlier figures" in capsys.readouterr().out
