"""Two pictures: how many times as fast as the others, and how far from a copy of the same bytes."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first: there may be no display)

from bench.cases import REQUIREMENTS, STEP  # noqa: E402
from bench.contestants import EAGER, OURS  # noqa: E402
from bench.report import CASE, Row  # noqa: E402

COLOURS = {EAGER: "#c44e52", "compile": "#cf7f24", OURS: "#2f6f9f"}
NAMES = {
    EAGER: "eager PyTorch",
    "compile": "torch.compile, its fastest form",
    OURS: "gfl_kernels",
}
FAMILIES = {
    "qfl": "Quality Focal Loss",
    "vfl": "Varifocal Loss",
    "focal": "Focal Loss",
    "mal": "Matchability-Aware Loss",
    "ia_bce": "IA-BCE",
    "psl": "Position-Supervised Loss",
    "bce": "Binary Cross Entropy",
    "dfl": "Distribution Focal Loss",
    "fgl": "Fine-Grained Localization Loss",
    "integral": "Integral",
    "peak": "Integral over the peak",
    "statistics": "Statistics",
    "moments": "Moments",
    "ld": "Localization distillation",
    "decode": "Decoding of boxes",
}
DOTS = (0, (1.2, 1.0))
LINE, HEADER, TITLE, TICKS = 0.36, 0.8, 0.42, 0.5  # inches: a case, the head, a panel's title
STREAMED_BYTES = 1 << 20  # below that a call costs its overhead, and a copy says nothing about it

Group = dict[str, Row]  # the contestants of one case, and the fastest compiled form as "compile"


def draw(out: Path, context: dict, rows: list[Row]) -> list[Path]:
    """speedup.png and floor.png of the forward + backward pass; the files written."""
    groups: dict[str, Group] = {}
    for row in rows:
        if row["kind"] == CASE and row["pass"] == STEP:
            group = groups.setdefault(row["case"], {})
            group[row["contestant"]] = row
            if row["best_compile"]:
                group["compile"] = row
    shown = [group for group in groups.values() if OURS in group]
    large = [group for group in shown if group[OURS]["bytes"] >= STREAMED_BYTES]
    pictures = []
    for name, picture, members in (
        ("speedup.png", _speedups, shown),
        ("floor.png", _floors, large or shown),
    ):
        if members:
            pictures.append(_save(picture(members), out / name, context))
    return pictures


def _label(row: Row) -> str:
    words = [row["form"], row["shape"].replace("x", " x ")]
    words += [row["dtype"]] if row["dtype"] != "float32" else []
    words += [f"({row['note']})"] if row["note"] else []
    return " ".join(filter(None, words))


def _panels(groups: list[Group]):
    """(figure, head, [(panel, groups)]): one panel per op, on one axis; head is for the legend."""
    by_op: dict[str, list[Group]] = {}
    for group in groups:
        by_op.setdefault(group[OURS]["op"], []).append(group)
    heights = [HEADER] + [len(members) * LINE + TITLE for members in by_op.values()]
    figure, axes = plt.subplots(
        len(heights),
        1,
        figsize=(11, sum(heights) + TICKS),
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    head, panels = axes[0], list(axes[1:])
    head.axis("off")
    for axis, (op, members) in zip(panels, by_op.items(), strict=True):
        axis.sharex(panels[0])
        axis.set_title(FAMILIES[op], loc="left", fontsize=11, fontweight="bold")
        labels = [_label(group[OURS]) for group in members]
        axis.set_yticks(range(len(members)), labels, fontsize=9)
        axis.set_ylim(len(members) - 0.45, -0.55)
        axis.set_xscale("log")
        axis.grid(axis="x", which="major", color="#dcdcdc", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(axis="both", length=0, labelbottom=axis is panels[-1])
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
    return figure, head, list(zip(panels, by_op.values(), strict=True))


def _scale(axis, low: float, high: float):
    ticks = [t * 10.0**e for e in range(-3, 5) for t in (1, 2, 5)]
    axis.set_xlim(low, high)
    axis.set_xticks([t for t in ticks if low <= t <= high])
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
    axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())


def _head(axis, title: str, handles: list, labels: list[str]):
    figure = axis.figure
    top = 1 - 0.12 / figure.get_figheight()
    below = 1 - 0.42 / figure.get_figheight()
    figure.text(0.5, top, title, va="top", ha="center", fontsize=13, fontweight="bold")
    figure.legend(
        handles,
        labels,
        loc="upper center",
        bbox_to_anchor=(0.5, below),
        ncols=len(labels),
        frameon=False,
        fontsize=9,
    ).set_in_layout(False)


def _marker(marker: str, colour: str, size: float):
    return plt.Line2D([], [], color=colour, marker=marker, linestyle="", markersize=size)


def _speedups(groups: list[Group]):
    figure, head, panels = _panels(groups)
    goals = {
        (requirement.case.name, requirement.kind): (requirement.required, requirement.hoped)
        for requirement in REQUIREMENTS
        if requirement.kind in (EAGER, "compile")
    }
    ends = [1.0]
    for axis, members in panels:
        for line, group in enumerate(members):
            for offset, kind in ((-0.19, EAGER), (0.19, "compile")):
                if kind in group:
                    goal = goals.get((group[OURS]["case"], kind), (None, None))
                    ends += _bar(axis, line + offset, kind, group[OURS], goal)
        axis.axvline(1, color="black", linewidth=1)
    _scale(panels[-1][0], min(0.95, min(ends) * 0.9), max(ends) * 1.1)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[kind]) for kind in (EAGER, "compile")]
    handles += [
        plt.Line2D([], [], color="black", linewidth=1.1),
        _marker("|", "black", 9),
        plt.Line2D([], [], color="black", linewidth=1.8, linestyle=DOTS),
    ]
    labels = [f"against {NAMES[EAGER]}", f"against {NAMES['compile']}"]
    title = "gfl_kernels: how many times as fast, forward + backward"
    _head(head, title, handles, [*labels, "quartiles", "required", "hoped for"])
    return figure


def _bar(axis, y: float, kind: str, row: Row, goal: tuple) -> list[float]:
    """One speed-up with its quartiles and goals; the ends of what was drawn."""
    low, middle, high = (row[f"over_{kind}_p{p}"] for p in (25, 50, 75))
    # From 1: as fast as ours has no bar, faster than ours points left.
    axis.barh(y, middle - 1, 0.34, left=1, color=COLOURS[kind])
    axis.plot([low, high], [y, y], color="black", linewidth=1.1, solid_capstyle="butt")
    reached = [value for value in goal if value is not None]
    for value, style in zip(reached, ("-", DOTS), strict=False):
        axis.plot([value] * 2, [y - 0.18, y + 0.18], color="black", linewidth=1.8, linestyle=style)
    if middle >= 2:
        axis.text(1.04, y, f"{middle:.1f}", va="center", fontsize=8, color="white")
    else:
        axis.text(max(high, 1) * 1.04, y, f"{middle:.2f}", va="center", fontsize=8)
    return [low, high, *reached]


def _floors(groups: list[Group]):
    figure, head, panels = _panels(groups)
    ends = [1.0]
    for axis, members in panels:
        for line, group in enumerate(members):
            shown = {name: group[name] for name in NAMES if name in group}
            middles = [row["times_copy_p50"] for row in shown.values()]
            axis.plot([min(middles), max(middles)], [line] * 2, color="#cccccc", zorder=1)
            for name, row in shown.items():
                low, middle, high = (row[f"times_copy_p{p}"] for p in (25, 50, 75))
                colour = COLOURS[name]
                axis.plot([low, high], [line] * 2, color=colour, linewidth=4, alpha=0.4, zorder=2)
                axis.scatter(middle, line, s=40, color=colour, zorder=3)
                ends += [low, high]
            ours = group[OURS]
            axis.annotate(
                f"{ours['times_copy_p50']:.3g}x, {ours['gb_per_s']:.3g} GB/s",
                (ours["times_copy_p50"], line),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
                color=COLOURS[OURS],
            )
        axis.axvline(1, color="black", linewidth=1)
    _scale(panels[-1][0], min(ends) * 0.6, max(ends) * 1.3)
    handles = [_marker("o", COLOURS[name], 7) for name in (OURS, "compile", EAGER)]
    handles.append(_marker("|", "black", 9))
    labels = [*(NAMES[name] for name in (OURS, "compile", EAGER)), "parallel copy of as many bytes"]
    _head(head, "Distance to the floor: time over a copy, forward + backward", handles, labels)
    return figure


def _save(figure, path: Path, context: dict) -> Path:
    machine, versions = context["machine"], context["versions"]
    caption = (
        f"{machine['cpu']}, {machine['threads']} threads, {versions['isa']}; "
        f"torch {versions['torch']}, gfl_kernels {versions['gfl_kernels']}; "
        f"medians of {context['settings']['rounds']} interleaved rounds; "
        f"{context['settings']['time']}"
    )
    figure.supxlabel(caption, fontsize=8, color="#606060")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
