"""The counts of bench.roofline on the terminal and as a picture."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first: there may be no display)
from rich import box  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

Row = dict


# ---- terminal ----


def print_rows(console: Console, rows: list[Row]):
    """A line per kernel; figures of several targets are separated by slashes."""
    nvidia_targets = list(dict.fromkeys(row["target"] for row in rows if "gpu" in row))
    amd_targets = list(dict.fromkeys(row["target"] for row in rows if "vgprs" in row))
    gpus = list(dict.fromkeys(row["gpu"] for row in rows if "gpu" in row))
    table = Table(box=box.SIMPLE_HEAD, title="compiled kernels: counts, not timings")
    for title in ("case", "pass", "backend"):
        table.add_column(title, no_wrap=True)
    figures = ("regs", "spills", "SASS a logit", "16 B", "DRAM", "sectors", "VGPRs")
    for title in (*figures, *(f"{gpu.upper()} us" for gpu in gpus)):
        table.add_column(title, justify="right", no_wrap=True)
    previous = (None, None)
    by_kernel: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        by_kernel.setdefault((row["case"], row["pass"], row["backend"]), []).append(row)
    for (name, which, backend), group in by_kernel.items():
        nvidia = [row for row in group if "gpu" in row]
        shown = next(row for row in nvidia if row["target"] == "sm_90")
        loads, stores = shown["load_sectors_per_request"], shown["store_sectors_per_request"]
        table.add_row(
            name if name != previous[0] else "",
            which if (name, which) != previous else "",
            backend,
            _slashed(nvidia, "registers"),
            _slashed(nvidia, "spills"),
            _slashed(nvidia, "sass_per_logit", ".1f"),
            f"{shown['wide_share']:.0%}",
            f"{shown['dram_ratio']:.3f}",
            f"{loads:.0f}/{stores:.0f}",
            _slashed([row for row in group if "vgprs" in row], "vgprs"),
            *(_bound(next((row for row in nvidia if row["gpu"] == gpu), None)) for gpu in gpus),
        )
        previous = (name, which)
    console.print(table)
    console.print(
        f"a/b/c: {', '.join(nvidia_targets)}, a single figure: sm_90; VGPRs: "
        f"{', '.join(amd_targets)}. spills: local loads "
        "and stores. SASS a logit: executed warp instructions x 32 / logits. 16 B: share of the "
        "bytes of logits and gradient moved 16 at a time. DRAM: bytes / inputs and outputs once. "
        "sectors: of 32 bytes, a load/store request of a warp. These three: sm_90. us: the lower "
        "bound that the counts give, the term that binds, and the bound / its DRAM term.\n",
        style="dim",
    )


def _slashed(rows: list[Row], column: str, form: str = "d") -> str:
    return "/".join(f"{row[column]:{form}}" for row in rows)


def _bound(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row['bound_us']:.2f} {row['bound_by']:<5} {row['over_dram']:.2f}"


def print_launches(console: Console, rows: list[Row]):
    table = Table(box=box.SIMPLE_HEAD, title="operations of a step, forward + backward")
    table.add_column("op", no_wrap=True)
    backends = list(dict.fromkeys(name for row in rows for name in row["kernel_launches"]))
    launches = [f"{backend}: kernel launches" for backend in backends]
    for title in ("eager: ATen operations", *launches, "triton: ATen operations"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        launched = [row["kernel_launches"].get(backend, "") for backend in backends]
        counts = (row["eager_operations"], *launched, row["own_operations"])
        table.add_row(row["case"], *map(str, counts))
    console.print(table)
    console.print("ATen operations: without views and allocations.\n", style="dim")


_STYLES = {"pass": "green", "miss": "bold red", "not measured": "dim"}


def print_verdicts(console: Console, verdicts: list[Row]):
    table = Table(box=box.SIMPLE_HEAD, title="what the kernels must reach")
    table.add_column("requirement", no_wrap=True)
    for title in ("required", "measured"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("", style="dim")
    for v in verdicts:
        measured = v["measured"] is not None
        table.add_row(
            v["requirement"],
            f"{'>=' if v['at_least'] else '<='} {v['required']:g}",
            f"{v['measured']:.4g}" if measured else "",
            f"[{_STYLES[v['verdict']]}]{v['verdict']}[/]",
            f"{v['missed']} of {v['of']} miss; worst: {v['worst']}" if measured else "",
        )
    console.print(table)


# ---- picture ----

COLOURS = {
    "qfl sparse": "#2f6f9f",
    "qfl dense": "#3aa0a0",
    "qfl probability": "#7a5ca8",
    "qfl sparse NCHW": "#1b3a57",
    "dfl": "#c44e52",
    "integral": "#cf7f24",
    "vfl": "#5b8def",
    "focal": "#9b59b6",
    "mal": "#16656b",
    "ia_bce": "#b8488f",
    "psl": "#d3a1d9",
    "bce": "#5d8aa8",
    "fgl": "#e377a0",
    "peak": "#e0a45c",
    "statistics": "#d98880",
    "moments": "#a04000",
    "ld": "#7f8c2d",
    "decode": "#444444",
    "head NCHW": "#3f7f3f",
    "head channels_last": "#8fbf5f",
}
MARKERS = {"float32": "o", "bfloat16": "s", "float16": "^"}
NEAR = 1.15  # times the DRAM term: up to there a kernel is as good as bound by DRAM


def draw(path: Path, document: dict) -> Path:
    """A roofline per GPU: what the counts let DRAM deliver, over executed instructions a byte."""
    rows = [row for row in document["rows"] if "gpu" in row]
    gpus = list(dict.fromkeys(row["gpu"] for row in rows))
    figure, axes = plt.subplots(
        1, len(gpus), figsize=(1 + 5.2 * len(gpus), 6.4), squeeze=False, layout="constrained"
    )
    for axis, gpu in zip(axes[0], gpus, strict=True):
        _panel(axis, gpu, [row for row in rows if row["gpu"] == gpu])
    axes[0][0].set_ylabel("DRAM bandwidth that the counts allow, GB/s")
    kinds = [kind for kind in COLOURS if any(_kind(row) == kind for row in rows)]
    dtypes = [dtype for dtype in MARKERS if any(row["dtype"] == dtype for row in rows)]
    handles = [_dot("o", COLOURS[kind]) for kind in kinds]
    handles += [_dot(MARKERS[dtype], "#808080") for dtype in dtypes]
    labels = kinds + dtypes
    if any(row["backend"] == "cuda" for row in rows):
        handles += [_dot("o", "#808080"), _dot("o", "#808080", hollow=True)]
        labels += ["triton", "cuda"]
    columns = min(len(handles), 4 * len(gpus))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    versions = document["versions"]
    nvcc = f" nvcc {versions['nvcc']}," if "nvcc" in versions else ""
    figure.suptitle(
        "Rooflines of the compiled kernels: counts, not timings\n"
        f"triton {versions['triton']}, ptxas {versions['ptxas']} and {versions['ptxas_blackwell']},"
        f"{nvcc} gfl_kernels {versions['gfl_kernels']}",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _kind(row: Row) -> str:
    if row["op"] in COLOURS:  # one for all its forms
        return row["op"]
    layout = row["layout"] if row["layout"] != "rows" else ""
    return " ".join(filter(None, (row["op"], row["form"], layout)))


def _dot(marker: str, colour: str, hollow: bool = False):
    fill = "none" if hollow else "full"
    return plt.Line2D([], [], color=colour, marker=marker, ls="", markersize=7, fillstyle=fill)


def _intensity(row: Row) -> float:
    return row["sass_per_logit"] * row["logits"] / row["dram_bytes"]


def _panel(axis, gpu: str, rows: list[Row]):
    bandwidth = rows[0]["dram_gbs"]
    # A term is a count over a rate, that of a launch which fills the GPU.
    issue = max(
        row["sass_per_logit"] * row["logits"] / row["terms_us"]["issue"] / 1e3 for row in rows
    )
    low, high = 0.7 * min(map(_intensity, rows)), 1.5 * max(map(_intensity, rows))
    ridge = issue / bandwidth
    axis.plot([low, ridge, high], [bandwidth, bandwidth, issue / high], color="black", zorder=1)
    label = f"DRAM, {bandwidth:.0f} GB/s"
    axis.annotate(label, (low * 1.05, bandwidth * 0.97), fontsize=8, va="top")
    axis.annotate("issue rate", (high * 0.97, issue / high), fontsize=8, ha="right", va="top")
    reached = {id(row): row["dram_bytes"] / row["bound_us"] / 1e3 for row in rows}
    for row in rows:
        colour, hollow = COLOURS[_kind(row)], row["backend"] == "cuda"
        axis.scatter(
            _intensity(row),
            reached[id(row)],
            s=38,
            marker=MARKERS[row["dtype"]],
            facecolor="none" if hollow else colour,
            edgecolor=colour if hollow else "white",
            linewidth=1.2 if hollow else 0.5,
            zorder=3,
        )
    far = Counter(row["bound_by"] for row in rows if row["over_dram"] > NEAR)
    named = ", ".join(f"{term} {count}" for term, count in far.most_common())
    within = sum(row["over_dram"] <= NEAR for row in rows)
    axis.set_title(
        f"{gpu.upper()} ({rows[0]['target']}): {within} of {len(rows)} kernels within "
        f"{NEAR:g}x of DRAM" + (f"\nbound elsewhere: {named}" if named else ""),
        fontsize=10,
    )
    axis.set_xlabel("executed SASS instructions x 32 lanes, a DRAM byte")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(low, high)
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        scale.set_major_formatter(lambda value, _: f"{value:g}")
        scale.set_minor_locator(matplotlib.ticker.NullLocator())
    axis.grid(color="#e4e4e4", linewidth=0.6)
    axis.set_axisbelow(True)
