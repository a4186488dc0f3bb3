"""Rows of figures: how they are derived from samples, printed, written, and judged."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from bench.cases import (
    BACKWARD,
    FORWARD,
    REQUIREMENTS,
    STEP,
    Case,
    Requirement,
)
from bench.contestants import COMPILE, EAGER, OURS
from bench.measure import Memory, Samples, ratio

COPY = "copy"  # the floor: a parallel copy that moves the bytes which the pass cannot avoid
SUM = "x.sum().backward()"  # the floor of a tiny call: what autograd itself costs
ORDINARY = "ordinary logits"

SHORT = {FORWARD: "fwd", BACKWARD: "bwd", STEP: "fwd+bwd"}
CASE, ISA, DENORMAL = "case", "isa", "denormal"  # kinds of rows
Row = dict


def _spread(prefix: str, quartiles: tuple[float, float, float], scale: float = 1.0) -> Row:
    return {
        f"{prefix}_p{p}": value * scale for p, value in zip((25, 50, 75), quartiles, strict=True)
    }


def best_compiled(samples: Mapping[str, Samples]) -> str | None:
    """The fastest torch.compile form by its median, or None where none was run."""
    forms = [name for name in samples if name.startswith(COMPILE)]
    return min(forms, key=lambda name: samples[name].quartiles()[1], default=None)


def rows_of(
    kind: str,
    case: Case,
    which: str,
    samples: Mapping[str, Samples],
    memory: Mapping[str, Memory] | None = None,
    checks: Mapping[str, Row] | None = None,
) -> list[Row]:
    """One row per contestant; ratios are quartiles over rounds of what ran side by side."""
    best = best_compiled(samples)
    moved = case.bytes(which)
    rows = []
    for name, sample in samples.items():
        p25, p50, p75 = sample.quartiles()
        row = {
            "kind": kind,
            "case": case.name,
            "op": case.op,
            "form": case.form,
            "shape": "x".join(map(str, case.shape)),
            "dtype": case.dtype,
            "layout": case.layout,
            "note": case.note,
            "pass": which,
            "contestant": name,
            "best_compile": name == best,
            **_spread("ms", (p25, p50, p75), 1e3),
            "rounds": len(sample.seconds),
            "calls": sample.calls,
            "page_faults": sample.faults,
            "bytes": moved,
            "gb_per_s": moved / p50 / 1e9,
        }
        references = {"over_eager": EAGER, "over_compile": best, "over_ordinary": ORDINARY}
        for label, reference in references.items():
            if reference in samples:  # how many times as fast as the reference
                row |= _spread(label, ratio(samples[reference], sample))
        for label, floor in {"times_copy": COPY, "times_sum": SUM}.items():
            if floor in samples:
                row |= _spread(label, ratio(sample, samples[floor]))
        if memory and name in memory:
            row["saved_bytes"] = memory[name].saved
            row["saved_over_logits"] = memory[name].saved / case.logit_bytes
            row["peak_bytes"] = memory[name].peak
            row["peak_over_logits"] = memory[name].peak / case.logit_bytes
        if checks and name in checks:
            row |= checks[name]
        rows.append(row)
    return rows


def pick(rows: list[Row], kind: str, contestant: str, case: Case, which: str = STEP) -> Row | None:
    """The row of a contestant, if it was measured."""
    for row in rows:
        if (row["kind"], row["contestant"], row["case"], row["pass"]) == (
            kind,
            contestant,
            case.name,
            which,
        ):
            return row
    return None


def judge(rows: list[Row]) -> list[dict]:
    """Every requirement with what was measured and a verdict: hoped, pass, miss or not measured."""
    verdicts = []
    for requirement in REQUIREMENTS:
        measured, detail = _MEASURED[requirement.kind](rows, requirement)
        sign = 1 if requirement.at_least else -1
        if measured is None:
            verdict = "not measured"
        elif sign * measured < sign * requirement.required:
            verdict = "miss"
        elif requirement.hoped is not None and sign * measured >= sign * requirement.hoped:
            verdict = "hoped"
        else:
            verdict = "pass"
        verdicts.append(
            {
                "requirement": requirement.label,
                "at_least": requirement.at_least,
                "required": requirement.required,
                "hoped": requirement.hoped,
                "measured": measured,
                "verdict": verdict,
                "detail": detail,
            }
        )
    return verdicts


def _speedup(column: str):
    def find(rows: list[Row], requirement: Requirement):
        row = pick(rows, CASE, OURS, requirement.case)
        if row is None or f"{column}_p50" not in row:
            return None, ""
        low, middle, high = (row[f"{column}_p{p}"] for p in (25, 50, 75))
        return middle, f"p25-p75 {low:.2f}-{high:.2f}"

    return find


def _worst(candidates: list[tuple[float, str]], largest: bool):
    if not candidates:
        return None, ""
    value, where = max(candidates) if largest else min(candidates)
    return value, f"worst of {len(candidates)}: {where}"


def _isa_share(rows: list[Row], _: Requirement):
    shares = []
    for row in rows:
        if row["kind"] == ISA and row["contestant"] == "avx2" and "over_avx512_p50" in row:
            shares.append((row["over_avx512_p50"], row["case"]))
    return _worst(shares, largest=False)


def _denormal_cost(rows: list[Row], _: Requirement):
    costs = [
        (1 / row["over_ordinary_p50"], f"{row['contestant']}, {row['case']}")
        for row in rows
        if row["kind"] == DENORMAL and row["contestant"] != ORDINARY
    ]
    return _worst(costs, largest=True)


def _saved(rows: list[Row], _: Requirement):
    saved = [
        (row["saved_over_logits"], row["case"])
        for row in rows
        if row["contestant"] == OURS and "saved_over_logits" in row
    ]
    return _worst(saved, largest=True)


_MEASURED = {
    "eager": _speedup("over_eager"),
    "compile": _speedup("over_compile"),
    "sum": _speedup("times_sum"),
    "isa": _isa_share,
    "denormal": _denormal_cost,
    "memory": _saved,
}


def isa_rows(case: Case, samples: Mapping[str, Samples]) -> list[Row]:
    """Rows of a comparison of instruction sets, with the speed relative to AVX-512."""
    rows = rows_of(ISA, case, STEP, samples)
    if "avx512" in samples:
        for row in rows:
            share = ratio(samples["avx512"], samples[row["contestant"]])
            row |= _spread("over_avx512", share)
    return rows


# ---- terminal ----


def _ms(row: Row | None) -> str:
    return "" if row is None else f"{row['ms_p50']:.3g}"


def _times(row: Row | None, column: str, digits: str = ".1f") -> str:
    if row is None or f"{column}_p50" not in row:
        return ""
    return f"{row[f'{column}_p50']:{digits}}x"


def print_cases(console: Console, rows: list[Row]):
    """One line per case and pass, milliseconds and ratios as medians."""
    table = Table(box=box.SIMPLE_HEAD, title="milliseconds: medians of interleaved rounds")
    table.add_column("case", no_wrap=True)
    table.add_column("pass", no_wrap=True)
    for title in ("eager", "compile", "form", "ours", "p25-p75", "/eager", "/compile"):
        table.add_column(title, justify="left" if title == "form" else "right", no_wrap=True)
    for title in ("GB/s", "copy", "x copy", "saved"):
        table.add_column(title, justify="right", no_wrap=True)
    keys = list(dict.fromkeys((r["case"], r["pass"]) for r in rows if r["kind"] == CASE))
    previous, op = None, None
    for case, which in keys:
        group = [r for r in rows if (r["kind"], r["case"], r["pass"]) == (CASE, case, which)]
        by_name = {row["contestant"]: row for row in group}
        best = next((row for row in group if row["best_compile"]), None)
        ours = by_name.get(OURS)
        if op not in (None, group[0]["op"]):
            table.add_section()
        table.add_row(
            case if case != previous else "",
            SHORT[which],
            _ms(by_name.get(EAGER)),
            _ms(best),
            best["contestant"].removeprefix(COMPILE) if best else "",
            f"[bold]{_ms(ours)}[/]" if ours else "[red]refused[/]",
            f"{ours['ms_p25']:.3g}-{ours['ms_p75']:.3g}" if ours else "",
            f"[bold green]{_times(ours, 'over_eager')}[/]",
            f"[bold cyan]{_times(ours, 'over_compile')}[/]",
            f"{ours['gb_per_s']:.1f}" if ours else "",
            _ms(by_name.get(COPY)),
            _times(ours, "times_copy", ".2f"),
            f"{ours['saved_over_logits']:.2f}" if ours and "saved_over_logits" in ours else "",
        )
        previous, op = case, group[0]["op"]
    console.print(table)
    console.print(
        "/eager, /compile: how many times as fast as eager, and as the fastest torch.compile form. "
        "GB/s: bytes the pass cannot avoid over our time. copy: a parallel copy of as many bytes. "
        "saved: what is kept for backward, in sizes of the logits. A backward pass may beat "
        "the copy: its gradient was written in forward.\n",
        style="dim",
    )


def print_extras(console: Console, rows: list[Row]):
    """Instruction sets and denormals."""
    for kind, title, column in (
        (ISA, "instruction sets, ours, forward + backward", "over_avx512"),
        (DENORMAL, "denormal logits, ours, forward + backward", "over_ordinary"),
    ):
        chosen = [row for row in rows if row["kind"] == kind]
        if not chosen:
            continue
        table = Table(box=box.SIMPLE_HEAD, title=title)
        table.add_column("case", no_wrap=True)
        table.add_column("contestant", no_wrap=True)
        for name in ("ms", "p25-p75", "relative speed"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in chosen:
            table.add_row(
                row["case"],
                row["contestant"],
                _ms(row),
                f"{row['ms_p25']:.3g}-{row['ms_p75']:.3g}",
                _times(row, column, ".2f"),
            )
        console.print(table)


_STYLES = {"hoped": "bold green", "pass": "green", "miss": "bold red", "not measured": "dim"}


def print_verdicts(console: Console, verdicts: list[dict]):
    table = Table(box=box.SIMPLE_HEAD, title="what it must reach (float32, forward + backward)")
    table.add_column("requirement", no_wrap=True)
    for name in ("required", "hoped", "measured"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("", style="dim")
    for v in verdicts:
        bound = ">=" if v["at_least"] else "<="
        table.add_row(
            v["requirement"],
            f"{bound} {v['required']:g}",
            f"{v['hoped']:g}" if v["hoped"] is not None else "",
            f"{v['measured']:.2f}" if v["measured"] is not None else "",
            f"[{_STYLES[v['verdict']]}]{v['verdict']}[/]",
            v["detail"],
        )
    console.print(table)


# ---- files ----


def write(out: Path, context: dict, rows: list[Row], refused: list[dict], verdicts: list[dict]):
    """bench.json with everything, bench.csv with a line per row; both name machine and versions."""
    out.mkdir(parents=True, exist_ok=True)
    document = {**context, "requirements": verdicts, "refused": refused, "rows": rows}
    (out / "bench.json").write_text(json.dumps(document, indent=1) + "\n")
    flat = {
        f"{group}.{name}": value if isinstance(value, (str, int, float)) else json.dumps(value)
        for group in ("machine", "versions", "settings")
        for name, value in context[group].items()
    }
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(out / "bench.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, *flat], restval="")
        writer.writeheader()
        for row in rows:
            formatted = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(formatted | flat)
