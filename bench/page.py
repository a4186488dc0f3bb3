"""``python -m bench.page``: one HTML page of all that bench/out holds, with nothing to load.

Takes bench.json, roofline.json, train_digits.json and what a GPU has left, gpu/*/bench.json and
gpu/kernels.json, as they are found under --out, and writes report.html beside them. Figures are
printed as measured; each part names its machine, versions, time and git revision, which need not be
the same ones.
"""

from __future__ import annotations

import argparse
import html
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from bench.contestants import EAGER, OURS
from bench.report import CASE, COPY, DENORMAL, ISA, SHORT

STYLE = """
:root { color-scheme: light dark; --ink: #1d2327; --soft: #5b666e; --line: #d9dee2; --paper: #fff;
  --ours: #2f6f9f; --eager: #c44e52; --compile: #cf7f24; --good: #2c7a4b; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e6e8; --soft: #9aa5ad; --line: #39424a;
  --paper: #15191c; --ours: #6db1e0; --eager: #e08487; --compile: #e6a75c; --good: #6cc48f;
  --bad: #f2948d; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1080px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { margin-top: 2.6rem; font-size: 1.3rem; }
h3 { font-size: 1.02rem; margin: 1.6rem 0 .3rem; } p, li { max-width: 46rem; }
.soft, caption, .about { color: var(--soft); font-size: .87rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .87rem; width: 100%; }
th, td { padding: .28rem .55rem; border-bottom: 1px solid var(--line); text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } td:first-child, th:first-child { text-align: left; }
td.text, th.text { text-align: left; white-space: normal; }
.ours { color: var(--ours); font-weight: 600; } .good { color: var(--good); }
.bad { color: var(--bad); font-weight: 600; } svg { max-width: 100%; height: auto; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; } svg .soft { fill: var(--soft); }
"""
VERDICTS = {"hoped": "good", "pass": "good", "miss": "bad"}


def text(value) -> str:
    return html.escape(str(value))


def number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def times(row: dict | None, column: str) -> str:
    value = None if row is None else row.get(f"{column}_p50")
    return "" if value is None else f"{value:.1f}x"


def table(head: Iterable[str], rows: Iterable[Iterable[str]], words: int = 1) -> str:
    """Cells are HTML; the first `words` columns hold text."""

    def line(cells: Iterable[str], tag: str) -> str:
        kinds = (' class="text"' if i < words else "" for i in range(1000))
        return "<tr>" + "".join(f"<{tag}{k}>{c}</{tag}>" for c, k in zip(cells, kinds)) + "</tr>"  # noqa: B905

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table>{line(head, "th")}{body}</table></div>'


def about(document: dict) -> str:
    """Machine, versions, revision and time of a part."""
    machine, versions = document["machine"], document["versions"]
    settings = document.get("settings", {})
    said = [machine.get("gpu"), machine["cpu"], f"{machine['cores']} cores"]
    said += [f"{machine['threads']} threads", machine["system"]]
    said += [f"Python {versions['python']}", f"torch {versions['torch']}"]
    said += [f"{name} {versions[name]}" for name in ("triton", "ptxas", "nvcc") if name in versions]
    said += [f"gfl_kernels {versions['gfl_kernels']} ({versions['isa']})"]
    said += [f"revision {versions.get('revision') or 'unknown'}", settings.get("time")]
    if settings.get("only"):
        said.append(f"only {settings['only']}")
    return f'<p class="about">{text(", ".join(str(word) for word in said if word))}</p>'


def bars(groups: list[tuple[str, list[tuple[str, str, float, str]]]], unit: str) -> str:
    """Horizontal bars: (label, [(name, colour, value, said)]) from top to bottom."""
    longest = max(value for _, bar in groups for _, _, value, _ in bar)
    left, wide, thick = 300, 560, 15
    y, parts = 8, []
    for label, group in groups:
        middle = y + thick * len(group) / 2 + 4
        parts.append(f'<text x="{left - 10}" y="{middle}" text-anchor="end">{text(label)}</text>')
        for name, colour, value, said in group:
            width = max(2.0, wide * value / longest)
            parts.append(
                f'<rect x="{left}" y="{y}" width="{width:.1f}" height="{thick - 3}" '
                f'fill="var(--{colour})"><title>{text(name)}: {text(said)}</title></rect>'
                f'<text x="{left + width + 6:.1f}" y="{y + 10}" class="soft">{text(said)}</text>'
            )
            y += thick
        y += 10
    size = f'viewBox="0 0 {left + wide + 130} {y}" width="{left + wide + 130}" height="{y}"'
    return f'<svg {size} role="img" aria-label="{text(unit)}">{"".join(parts)}</svg>'


def curves(lines: dict[str, tuple[str, list[float]]], unit: str) -> str:
    """Curves over steps from the left to the right, on one axis that begins at 0."""
    wide, high, left, bottom = 760, 240, 48, 26
    top = max(max(values) for _, values in lines.values())
    parts = [f'<line x1="{left}" y1="{high}" x2="{left + wide}" y2="{high}" stroke="var(--line)"/>']
    for share in (0, 0.5, 1):
        y = high - (high - 14) * share
        parts.append(f'<text x="{left - 6}" y="{y + 4:.0f}" text-anchor="end" class="soft">')
        parts.append(f"{number(top * share, 2)}</text>")
    for place, (name, (colour, values)) in enumerate(lines.items()):
        points = " ".join(
            f"{left + wide * i / max(len(values) - 1, 1):.1f},{high - (high - 14) * v / top:.1f}"
            for i, v in enumerate(values)
        )
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="var(--{colour})" '
            f'stroke-width="1.3" opacity="0.85"><title>{text(name)}</title></polyline>'
            f'<text x="{left + wide - 8}" y="{26 + 16 * place}" text-anchor="end" '
            f'style="fill: var(--{colour})">{text(name)}</text>'
        )
    parts.append(f'<text x="{left}" y="{high + 18}" class="soft">{text(unit)}</text>')
    size = f'viewBox="0 0 {left + wide + 8} {high + bottom}" width="{left + wide + 8}"'
    return f'<svg {size} height="{high + bottom}" role="img">{"".join(parts)}</svg>'


def verdicts(document: dict) -> str:
    rows = [
        (
            text(v["requirement"]),
            f"{'&ge;' if v['at_least'] else '&le;'} {v['required']:g}",
            "" if v["measured"] is None else f"{v['measured']:.2f}",
            f'<span class="{VERDICTS.get(v["verdict"], "soft")}">{text(v["verdict"])}</span>',
        )
        for v in document.get("requirements", [])
    ]
    return table(("asked", "", "found", ""), rows) if rows else ""


def refusals(document: dict) -> str:
    items = [
        f"<li>{text(entry['case'])}: {text(entry['reason'])}</li>" for entry in document["refused"]
    ]
    return f"<p>Refused, because wrong:</p><ul>{''.join(items)}</ul>" if items else ""


def benchmark(document: dict, title: str) -> str:
    """Times of the ops: a picture of the speed-ups, a line per case and pass, what was asked."""
    by_case: dict[tuple[str, str], dict[str, dict]] = {}
    for row in document["rows"]:
        if row["kind"] == CASE:
            group = by_case.setdefault((row["case"], row["pass"]), {})
            group[row["contestant"]] = row
            if row["best_compile"]:
                group["compile"] = row
    picture, lines = [], []
    for (case, which), group in by_case.items():
        ours, eager, best = (group.get(name) for name in (OURS, EAGER, "compile"))
        if SHORT[which] == "fwd+bwd" and ours is not None:
            shown = [
                (f"against {name}", colour, ours[f"{column}_p50"], f"{ours[f'{column}_p50']:.1f}x")
                for name, colour, column in (
                    (EAGER, "eager", "over_eager"),
                    ("torch.compile", "compile", "over_compile"),
                )
                if f"{column}_p50" in ours
            ]
            picture += [(case, shown)] if shown else []
        lines.append(
            (
                text(case),
                SHORT[which],
                *(number(row and row["ms_p50"]) for row in (eager, best)),
                f'<span class="ours">{number(ours and ours["ms_p50"])}</span>',
                times(ours, "over_eager"),
                times(ours, "over_compile"),
                number(ours and ours["gb_per_s"]),
                number(group[COPY]["ms_p50"] if COPY in group else None),
                number(ours and ours.get("saved_over_logits")),
            )
        )
    others = [
        (text(row["case"]), text(row["contestant"]), number(row["ms_p50"]), times(row, column))
        for kind, column in ((ISA, "over_avx512"), (DENORMAL, "over_ordinary"))
        for row in document["rows"]
        if row["kind"] == kind
    ]
    head = "case, pass, eager ms, compile ms, ours ms, /eager, /compile, GB/s, copy ms, saved"
    parts = [f"<h2>{text(title)}</h2>", about(document)]
    if picture:
        parts.append("<h3>Times as fast, forward and backward</h3>")
        parts.append(
            '<p class="soft">Red: as eager PyTorch. Orange: as the fastest form for torch.compile. '
            "Medians over rounds of what ran in turns.</p>"
        )
        parts.append(bars(picture, "times as fast"))
    parts += ["<h3>All cases</h3>", table(head.split(", "), lines, words=2)]
    parts.append(
        '<p class="soft">Milliseconds: medians of interleaved rounds. GB/s: the bytes that the '
        "pass cannot avoid over our time. copy: a parallel copy of as many bytes. saved: what is "
        "kept for backward, in sizes of the logits.</p>"
    )
    if others:
        parts.append("<h3>Instruction sets, and logits whose loss is denormal</h3>")
        parts.append(table(("case", "what", "ms", "relative speed"), others, words=2))
    found = verdicts(document)
    if found:
        parts += ["<h3>What was asked of it</h3>", found]
    return "".join([*parts, refusals(document)])


def gpu_kernels(document: dict) -> str:
    """GPU time of the kernels alone, each beside a copy."""
    lines = [
        (
            text(row["case"]),
            text(row["contestant"]),
            text(row["pass"]),
            number(row["us"]),
            number(row.get("tb_per_s")),
            number(row.get("times_copy")),
        )
        for row in document["rows"]
    ]
    return "".join(
        [
            "<h2>Kernels on a GPU, without the host</h2>",
            about(document),
            "<p>Each was recorded as a CUDA graph over inputs that no cache holds, and replayed. "
            "What waits for the GPU cannot be recorded.</p>",
            table(("case", "contestant", "pass", "us", "TB/s", "/ copy"), lines, words=3),
        ]
    )


def roofline(document: dict) -> str:
    """Counts of the compiled GPU kernels."""
    rows = [row for row in document["rows"] if "gpu" in row]
    lines = [
        (
            text(row["case"]),
            text(row["pass"]),
            text(row["backend"]),
            text(row["target"]),
            row["registers"],
            row["spills"],
            number(row["sass_per_logit"]),
            f"{row['dram_ratio']:.3f}",
            number(row["bound_us"]),
            text(row["bound_by"]),
            f"{row['over_dram']:.2f}",
        )
        for row in rows
    ]
    picture = [
        (
            f"{row['case'].replace(' float32', '')}, {row['pass']}"[:40],
            [
                (
                    row["backend"],
                    "ours",
                    row["over_dram"],
                    f"{row['over_dram']:.2f}, {row['backend']}",
                )
            ],
        )
        for row in rows
        if row["target"] == "sm_90"
    ]
    head = "case, pass, backend, target, registers, spills, SASS a logit, DRAM, bound us, by, /DRAM"
    parts = [
        "<h2>GPU kernels, counted</h2>",
        about(document),
        "<p><b>No time here was measured.</b> The kernels were compiled, run on a simulator that "
        "counts what they execute and move, and bounded by the peaks of the machines. A launch is "
        "slower.</p>",
    ]
    if picture:
        parts.append("<h3>Bound over that of memory alone, sm_90 on H100</h3>")
        parts.append(bars(picture, "bound over the bound of DRAM"))
    parts += ["<h3>All kernels</h3>", table(head.split(", "), lines, words=4)]
    steps = [
        (text(s["case"]), s["eager_operations"], *s["kernel_launches"].values())
        for s in document["launches"]
    ]
    if steps:
        backends = document["launches"][0]["kernel_launches"]
        parts.append("<h3>A step, forward and backward</h3>")
        parts.append(
            table(("case", "eager ATen operations", *(f"launches, {b}" for b in backends)), steps)
        )
    parts += ["<h3>What was asked of it</h3>", verdicts(document)]
    return "".join(parts)


def training(document: dict) -> str:
    """A detector trained with plain and with fused losses."""
    runs, plain = document["runs"], document["runs"]["plain PyTorch"]
    ours = runs["gfl_kernels"]
    lines = [
        (
            text(name),
            run["threads"],
            number(run["precision"]["AP"]),
            *(number(run["milliseconds"].get(part)) for part in plain["milliseconds"]),
            number((run["distance_from_plain"] or {}).get("rms")),
        )
        for name, run in runs.items()
    ]
    head = (
        "run",
        "threads",
        "AP",
        *(f"{part}, ms" for part in plain["milliseconds"]),
        "curve, rms",
    )
    pictured = {"plain PyTorch": ("eager", plain["curve"]), "gfl_kernels": ("ours", ours["curve"])}
    objections = "".join(f'<p class="bad">{text(word)}</p>' for word in document["objections"])
    return "".join(
        [
            "<h2>End to end: a small detector on scanned digits</h2>",
            about(document),
            "<p>Loss of every step. The curves lie on each other if the losses are the same "
            "function; the controls tell how far rounding alone drives two runs apart.</p>",
            curves(pictured, f"{len(plain['curve'])} steps"),
            table(head, lines),
            objections,
        ]
    )


def page(out: Path) -> str:
    """The whole page; SystemExit if there is nothing to show."""

    def found(pattern: str) -> list[tuple[Path, dict]]:
        return [(path, json.loads(path.read_text())) for path in sorted(out.glob(pattern))]

    parts = [benchmark(document, "Operations on the CPU") for _, document in found("bench.json")]
    parts += [
        benchmark(document, f"Operations on a GPU, {path.parent.name}")
        for path, document in found("gpu/*/bench.json")
    ]
    parts += [gpu_kernels(document) for _, document in found("gpu/kernels.json")]
    parts += [training(document) for _, document in found("train_digits.json")]
    parts += [roofline(document) for _, document in found("roofline.json")]
    if not parts:
        raise SystemExit(f"nothing to report under {out}: run make bench, roofline or demo first")
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>gfl_kernels: measurements</title><style>{STYLE}</style></head><body>"
        "<h1>gfl_kernels: measurements</h1>"
        '<p class="soft">Each part was run by itself; its machine, versions and revision stand '
        "above its figures. Nothing was timed before it had been compared with float64.</p>"
        f"{''.join(parts)}</body></html>\n"
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.page", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/out"))
    options = parser.parse_args(arguments)
    made = page(options.out)
    (options.out / "report.html").write_text(made)
    print(f"wrote {options.out / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
