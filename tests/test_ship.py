"""What is shipped around the kernels: make targets, the regression gate, the public API."""

from __future__ import annotations

import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

from bench import compare, page
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
    # Run from `make test`, these variables would make this one a part of it ("make[1]").
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    env.pop("MFLAGS", None)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
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


# ---- the report


def figures(folder):
    """What the parts of the benchmark leave behind, with a name that HTML has to escape."""
    machine = {"gpu": "", "cpu": "A <CPU>", "cores": 2, "threads": 2, "system": "Linux"}
    versions = {"python": "3.11", "torch": "2.14", "gfl_kernels": "0.1", "isa": "avx2"}
    context = {"machine": machine, "versions": versions | {"revision": "abc1234"}}
    asked = {"at_least": True, "required": 14, "measured": 15.5, "verdict": "pass"}
    asked = [{"requirement": "QFL & eager", **asked}, {**asked, "requirement": "DFL"}]
    asked[1] |= {"measured": None, "verdict": "not measured"}
    row = {"kind": "case", "case": "qfl <1>", "pass": "forward+backward", "best_compile": False}
    row |= {"gb_per_s": 3.0}
    rows = [
        {**row, "contestant": "eager", "ms_p50": 31.0},
        {**row, "contestant": "compile: as is", "ms_p50": 8.0, "best_compile": True},
        {**row, "contestant": OURS, "ms_p50": 2.0, "over_eager_p50": 15.5, "over_compile_p50": 4.0},
        {**row, "contestant": COPY, "ms_p50": 0.5},
        {**row, "kind": "isa", "contestant": "avx2", "ms_p50": 2.5},
    ]
    bench = context | {"requirements": asked, "rows": rows}
    bench["refused"] = [{"case": "qfl <1>", "reason": "is off"}]
    kernel = {"gpu": "h100", "case": "qfl <1>", "pass": "forward", "backend": "triton"}
    kernel |= {"target": "sm_90", "registers": 64, "spills": 0, "sass_per_logit": 22.0}
    kernel |= {"dram_ratio": 1.001, "bound_us": 1.67, "bound_by": "dram", "over_dram": 1.0}
    step = {"case": "qfl <1>", "eager_operations": 57, "kernel_launches": {"triton": 2, "cuda": 3}}
    counts = context | {"requirements": asked, "rows": [kernel], "launches": [step]}
    run = {"threads": 2, "precision": {"AP": 0.7}, "milliseconds": {"step": 60.0}}
    run |= {"distance_from_plain": None, "curve": [3.0, 2.0, 1.0]}
    runs = {"plain PyTorch": run, "gfl_kernels": run | {"distance_from_plain": {"rms": 1e-3}}}
    demo = context | {"runs": runs, "objections": []}
    (folder / "gpu" / "triton").mkdir(parents=True)
    alone = {"case": "qfl <1>", "pass": "forward+backward", "bytes": 100}
    alone = [
        {**alone, "contestant": "copy", "us": 1.0, "tb_per_s": 2.0, "times_copy": 1.0},
        {**alone, "contestant": "eager", "us": None, "why": "it waits"},
    ]
    parts = {"bench": bench, "gpu/triton/bench": bench, "roofline": counts, "train_digits": demo}
    parts["gpu/kernels"] = context | {"rows": alone}
    for name, document in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(document))


class Balanced(html.parser.HTMLParser):
    """Raises where an element is closed that is not open, and knows what is left open."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        self.open += [tag] if tag not in ("meta", "br", "img") else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report(tmp_path):
    with pytest.raises(SystemExit, match="nothing to report"):
        page.main(["--out", str(tmp_path)])
    figures(tmp_path)
    assert page.main(["--out", str(tmp_path)]) == 0
    made = (tmp_path / "report.html").read_text()
    parser = Balanced()
    parser.feed(made)
    assert parser.open == []
    for said in ("A &lt;CPU&gt;", "revision abc1234", "15.5x", "qfl &lt;1&gt;", "QFL &amp; eager"):
        assert said in made, said
    for title in (
        "on the CPU",
        "on a GPU, triton",
        "without the host",
        "scanned digits",
        "counted",
        "Refused",
    ):
        assert title in made, title
    assert "qfl <1>" not in made
    assert not re.search(r"(src|href)=|url\(|@import|<script", made)


def test_report_in_a_browser(tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        if os.environ.get("GFL_TEST_EXPECT_BROWSER") == "1":
            pytest.fail("a browser is expected here")
        pytest.skip("no chromium or google-chrome on the PATH")
    figures(tmp_path)
    page.main(["--out", str(tmp_path)])
    picture = tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,2400"]
    subprocess.run(
        [browser, *options, f"--screenshot={picture}", (tmp_path / "report.html").as_uri()],
        check=True,
        capture_output=True,
        timeout=120,
    )
    pixels = plt.imread(picture)[..., :3]
    assert pixels.shape[1] == 1200
    # The bars of a picture, in the colours of eager PyTorch and of the compiled form.
    for colour in ((0xC4, 0x4E, 0x52), (0xCF, 0x7F, 0x24)):
        near = abs(pixels * 255 - colour).max(-1) < 3
        assert near.sum() > 1000, colour
    assert (pixels.min(-1) < 0.3).sum() > 3000  # text
