"""The benchmark: its list of cases, its gate, and one run from end to end."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import re
import time

import pytest
import torch

import gfl_kernels

pytest.importorskip("rich", reason="the benchmark prints with rich (extra: bench)")
pytest.importorskip("matplotlib", reason="the benchmark draws with matplotlib (extra: bench)")
pytest.importorskip("bench", reason="bench is found from the repository root: python -m pytest")

from bench import (  # noqa: E402
    cases,
    contestants,
    head,
    kernels,
    measure,
    overhead,
    report,
    run,
    session,
)
from bench.cases import BACKWARD, FORWARD, PASSES, STEP, WORK, Case  # noqa: E402

SMALL = {
    "sparse": Case("qfl", "sparse", (96, 5), passes=PASSES),
    "dense": Case("qfl", "dense", (96, 5), passes=PASSES),
    "probability": Case("qfl", "probability", (96, 5), passes=PASSES),
    "nchw": Case("qfl", "sparse", (2, 5, 6, 8), passes=PASSES),
    "plain": Case("qfl", "sparse", (96, 5), passes=PASSES, weighted=False),
    "vfl dense": Case("vfl", "dense", (96, 5), passes=PASSES, weighted=False),
    "vfl sparse": Case("vfl", "sparse", (96, 5), passes=PASSES, weighted=False),
    "focal dense": Case("focal", "dense", (96, 5), passes=PASSES, weighted=False),
    "focal sparse": Case("focal", "sparse", (96, 5), passes=PASSES, weighted=False),
    "mal": Case("mal", "sparse", (96, 5), passes=PASSES, weighted=False),
    "ia_bce": Case("ia_bce", "sparse", (96, 5), passes=PASSES, weighted=False),
    "psl": Case("psl", "dense", (96, 5), passes=PASSES, weighted=False),
    "bce": Case("bce", "dense", (96, 5), passes=PASSES, weighted=False),
    "dfl": Case("dfl", "", (96, 17), passes=PASSES),
    "integral": Case("integral", "", (96, 17), passes=PASSES),
    "peak": Case("peak", "", (96, 17), passes=PASSES),
    "statistics": Case("statistics", "", (96, 17), passes=PASSES),
    "moments": Case("moments", "", (96, 17), passes=PASSES),
    "fgl": Case("fgl", "", (96, 33), passes=PASSES),
    "ld": Case("ld", "", (96, 17), passes=PASSES),
    "decode": Case("decode", "", (96, 17), passes=PASSES),
    "scored": Case("decode", "scored", (96, 17), passes=PASSES),
}


def test_cases_are_well_formed():
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names)
    for case in cases.CASES:
        assert (case.op, case.form) in WORK, case.name
        assert case.passes and set(case.passes) <= set(PASSES), case.name
        assert STEP in case.passes or case.op == "decode", case.name
        assert case.rows * case.width == math.prod(case.shape), case.name
        assert case.op not in ("integral", "decode") or case.rows % 4 == 0, case.name
        for which in PASSES:
            # The logits are read in every pass; no pass needs more than four trips over them.
            logits = case.logit_bytes
            assert logits <= case.bytes(which) <= 4 * logits + 64 * case.rows, (case.name, which)
        assert case.bytes(STEP) >= case.bytes(FORWARD), case.name


def test_cases_cover_what_was_asked_for():
    seen = {(case.op, case.width) for case in cases.CASES}
    assert {("qfl", 80), ("qfl", 1203), ("qfl", 1)} <= seen
    assert {("dfl", 17), ("dfl", 16), ("dfl", 8), ("dfl", 33), ("integral", 17)} <= seen
    assert {case.rows for case in cases.CASES if case.op == "qfl"} >= {64, 44800, 134400}
    assert {case.rows for case in cases.CASES if case.op == "dfl"} == {2400, 179200}
    assert {case.dtype for case in cases.CASES} == {"float32", "bfloat16", "float16"}
    assert {case.layout for case in cases.CASES} == {"rows", "NCHW"}
    quick = cases.select(None, quick=True)
    for requirement in cases.REQUIREMENTS:
        assert requirement.case is None or requirement.case in quick, requirement.label
    assert set(cases.ISA_QUICK + cases.DENORMAL_QUICK) <= set(quick)


def test_only_filters_by_name():
    assert [case.name for case in cases.select("qfl sparse 64x80 .*plain", False)] == [
        cases.TINY.name
    ]
    assert cases.select("no such case", False) == []


@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gate_accepts_every_uncompiled_form(case, dtype):
    if case.form == "probability" and dtype != "float32":
        pytest.skip("probabilities in half precision: eager divides by a p (1 - p) that is 0")
    if case.op == "statistics" and dtype != "float32":
        pytest.skip("statistics in half precision: eager's top-k has ties that the logits have not")
    case = Case(case.op, case.form, case.shape, dtype, passes=PASSES, weighted=case.weighted)
    inputs = contestants.make_inputs(case)
    gate = measure.Gate(case, inputs)
    eager, best_forms, ours = contestants.forms(case, inputs)
    for name, form in {"eager": eager, **best_forms, "ours": ours}.items():
        assert gate.check(name, form) <= 1, name


@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
def test_gate_refuses_wrong_contestants(case):
    inputs = contestants.make_inputs(case)
    gate = measure.Gate(case, inputs)
    right = contestants.ours(case, inputs)

    class WrongGradient(torch.autograd.Function):
        """Leaves values alone; the gradient of one element comes out 1 % too large."""

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            gradient = gradient.clone()
            gradient.view(-1)[gradient.abs().argmax()] *= 1.01
            return gradient

    with pytest.raises(measure.WrongResult, match=r"off value: result"):
        gate.check("off value", lambda x: right(x) * 1.001)
    with pytest.raises(measure.WrongResult, match=r"off gradient: gradient\[\d+\] is .* 1 of \d+"):
        gate.check("off gradient", lambda x: right(WrongGradient.apply(x)))
    with pytest.raises(measure.WrongResult, match="NaN|nan"):
        gate.check("NaN", lambda x: right(x) * math.nan)
    with pytest.raises(measure.WrongResult, match="result has shape"):
        gate.check("shape", lambda x: right(x).unsqueeze(0))
    with pytest.raises(measure.WrongResult, match="result without grad"):
        gate.check("no grad", lambda x: right(x) * (1 if torch.is_grad_enabled() else 1.001))


def test_refused_contestants_are_not_timed(monkeypatch, tmp_path, capsys):
    honest = contestants.contestants

    def cheat(case, inputs, compiled=True):
        table = honest(case, inputs, compiled)
        table["ours"] = lambda x: x.sum() * 1e-3  # wrong, but fast
        return table

    gate_yardstick = measure.field_of.contestants
    assert gate_yardstick is honest
    monkeypatch.setattr(session.contestants, "contestants", cheat)
    arguments = micro(tmp_path)
    assert run.main(arguments) == 0
    document = json.loads((tmp_path / "bench.json").read_text())
    assert [entry["contestant"] for entry in document["refused"]] == ["ours"]
    assert "ours" not in {row["contestant"] for row in document["rows"]}
    assert "refused" in capsys.readouterr().out
    assert run.main([*arguments, "--check"]) == 1


def micro(tmp_path) -> list[str]:
    """Arguments of the smallest run: one tiny case, no compiler."""
    only = f"^{re.escape(cases.TINY.name)}$"
    return [
        *("--only", only, "--out", str(tmp_path), "--rounds", "3", "--block-ms", "1"),
        *("--no-compile", "--threads", "1"),
    ]


@pytest.fixture
def restored_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_micro_run_writes_everything(tmp_path, capsys, restored_threads):
    assert run.main(micro(tmp_path)) == 0
    document = json.loads((tmp_path / "bench.json").read_text())
    assert document["machine"]["threads"] == 1
    assert document["versions"]["torch"] == torch.__version__
    assert document["settings"]["rounds"] == 3
    assert {row["pass"] for row in document["rows"]} == set(PASSES)
    steps = {row["contestant"]: row for row in document["rows"] if row["pass"] == STEP}
    assert set(steps) == {"eager", "ours", report.COPY, report.SUM}
    for row in document["rows"]:
        assert 0 < row["ms_p25"] <= row["ms_p50"] <= row["ms_p75"]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["ms_p50"] / 1e6)
    assert steps["eager"]["over_eager_p50"] == 1
    # mmdetection's losses keep several copies of the logits (probabilities, zeros, both factors).
    assert steps["eager"]["saved_over_logits"] >= 3
    assert steps["eager"]["peak_bytes"] >= steps["eager"]["saved_bytes"]

    table = list(csv.DictReader((tmp_path / "bench.csv").open()))
    assert len(table) == len(document["rows"])
    for line in table:
        assert line["versions.torch"] == torch.__version__ and line["machine.cpu"]
        assert line["settings.allocator"]
    for picture in ("speedup.png", "floor.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    verdicts = {v["requirement"]: v["verdict"] for v in document["requirements"]}
    assert len(verdicts) == len(cases.REQUIREMENTS)
    assert verdicts["QFL 44800 x 80 sparse against eager"] == "not measured"
    assert verdicts["One call on 64 x 80 / x.sum().backward()"] in ("hoped", "pass", "miss")
    assert "what it must reach" in capsys.readouterr().out


def test_verdicts():
    """Both directions of a bound, at the bound and on either side of it."""

    def verdict(**columns):
        case = {"kind": report.CASE, "contestant": "ours", "pass": STEP}
        sparse = {**case, "case": cases.QFL_SPARSE.name, "over_eager_p25": 0, "over_eager_p75": 0}
        tiny = {**case, "case": cases.TINY.name, "times_sum_p25": 0, "times_sum_p75": 0}
        rows = [sparse | columns, tiny | columns]
        found = {v["requirement"]: v["verdict"] for v in report.judge(rows)}
        return (
            found["QFL 44800 x 80 sparse against eager"],
            found["One call on 64 x 80 / x.sum().backward()"],
        )

    assert verdict(over_eager_p50=13.9, times_sum_p50=1.81) == ("miss", "miss")
    assert verdict(over_eager_p50=14.0, times_sum_p50=1.8) == ("pass", "pass")
    assert verdict(over_eager_p50=20.0, times_sum_p50=1.3) == ("hoped", "hoped")


def test_rounds_interleave_and_rotate():
    order = []

    def block(name, seconds):
        def call():
            order.append(name)
            return seconds, 7, 0.0

        return call

    samples = measure.interleave({"a": block("a", 2.0), "b": block("b", 1.0)}, rounds=3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert samples["a"].seconds == [2.0] * 3 and samples["a"].calls == 7
    assert measure.ratio(samples["a"], samples["b"]) == (2.0, 2.0, 2.0)


def test_stopwatch_stands_still_while_held():
    watch = measure.Stopwatch()
    before = watch()
    watch.hold()
    torch.randn(300, 300) @ torch.randn(300, 300)
    held = time.perf_counter() - watch._since
    watch.go()
    assert watch() - before < held + 1e-3
    assert watch._held >= held > 0


def test_backward_pass_leaves_out_forward():
    case = SMALL["sparse"]
    inputs = contestants.make_inputs(case)
    watch = measure.Stopwatch()

    def slow_forward(x):
        time.sleep(0.02)
        return contestants.ours(case, inputs)(x)

    statement = measure.passes(inputs, slow_forward, BACKWARD, watch)
    began = watch()
    statement()
    assert watch() - began < 0.02
    assert inputs.logits.grad is not None


@pytest.mark.parametrize("channels_last", [False, True])
def test_heads_are_compared_before_they_are_timed(channels_last):
    inputs = head.make_inputs(channels_last, size=(128, 160), positives=20)
    table = head.contestants(inputs, compiled=False)
    assert list(table) == ["eager", "gfl_kernels"]
    head.check(inputs, table)
    table["wrong"] = lambda *leaves: table["eager"](*leaves) * 1.001
    with pytest.raises(measure.WrongResult, match="wrong: result 0 is off by"):
        head.check(inputs, table)


@pytest.mark.parametrize("name", overhead.SMALL)
def test_parts_of_a_small_call_are_parts_of_it(native, name):
    """The op alone gets what the public function gives it, and all steps leave a gradient."""
    (case,) = (case for case in cases.CASES if case.name == name)
    parts = overhead.parts(case)
    loss, gradient = parts.pop("the op alone, with its gradient")()
    inputs = contestants.make_inputs(case)
    expected = contestants.ours(case, inputs)(inputs.logits)
    expected.backward()
    assert torch.equal(loss, expected.detach()) and torch.equal(gradient, inputs.logits.grad)
    grads = [part() for part in parts.values()]
    assert len(grads) == 5 and all(grad.shape == gradient.shape for grad in grads)
    for whole in [name for name in parts if "the op" in name or "gfl_kernels" in name]:
        assert torch.equal(parts[whole](), gradient)


def test_overhead_is_printed(native, capsys):
    overhead.main(["--rounds", "1", "--seconds", "0.001"])
    printed = capsys.readouterr().out
    assert len(re.findall(r"[1-9][0-9.]* us", printed)) == 12


# ---- kernels alone, on a GPU


def test_kernels_need_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert kernels.main([]) == 2
    assert "finds no GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    "case",
    [Case("qfl", "sparse", (40, 7)), Case("decode", "", (40, 5), passes=(FORWARD,))],
    ids=lambda case: case.op,
)
def test_kernels_are_recorded_beside_a_copy(monkeypatch, case):
    ran = []

    def once(calls):
        if len(ran) == 2:
            ran.append(None)
            raise RuntimeError("operation not permitted when stream is capturing")
        ran.append([call() for call in calls])
        return 2e-6

    monkeypatch.setattr(kernels, "time_of", once)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gfl_kernels, "backends", lambda: {"triton": "no", "cuda": "ok"})
    monkeypatch.setattr(gfl_kernels, "use_backend", lambda name: contextlib.nullcontext())
    rows = kernels.measure(case, device="cpu")
    assert [row["contestant"] for row in rows] == [kernels.COPY, "eager", "cuda"]
    assert rows[1]["us"] == 2.0 and rows[1]["times_copy"] == 1.0
    assert rows[1]["tb_per_s"] == pytest.approx(case.bytes(rows[1]["pass"]) / 2e6)
    assert rows[2]["us"] is None and "capturing" in rows[2]["why"]
    assert len(ran[1]) == 16
    assert kernels.table_of(rows).row_count == 3
