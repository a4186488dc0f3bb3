"""Trains a GFL detector on scanned digits with plain PyTorch losses and with gfl_kernels.

    python -m bench.train_digits            # about four minutes on two idle cores
    python -m bench.train_digits --quick    # a few steps, to see that everything runs

Four trainings start from the same weights and see the same batches: (a) plain PyTorch losses as
mmdetection runs them, (b) ours, and two controls: (a) on another thread count and (a) with its
losses in float64, which show what rounding alone does (bench/digits/compare.py). They take
turns step by step, in rotating order, so that a busy machine disturbs all alike. Ends with a table,
pictures and train_digits.json in bench/out/; the exit status is 1 if the curves differ by more than
rounding explains or AP is not above 0.5.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

import gfl_kernels
from bench import eager
from bench.digits import compare, evaluate, pictures
from bench.digits.assign import assign_all
from bench.digits.detector import Detector, LossObjects
from bench.digits.scenes import IMAGE_SIZE, NUM_CLASSES, make_scenes
from bench.digits.train import Plan, Run, Training
from bench.machine import allocator_settings, describe_machine, describe_versions

THREADS = 2
CONTROL_THREADS = 1
REQUIRED_AP = 0.5
# Caches, allocator and thread pool warm up here; left out of the times
WARM_UP_STEPS = 10

PLAIN = LossObjects(eager.QualityFocalLoss, eager.DistributionFocalLoss, eager.Integral)
OURS = LossObjects(
    gfl_kernels.QualityFocalLoss, gfl_kernels.DistributionFocalLoss, gfl_kernels.Integral
)


@dataclasses.dataclass(frozen=True)
class Size:
    steps: int
    batch_size: int
    scenes: int
    held_out: int


FULL = Size(steps=400, batch_size=16, scenes=1200, held_out=250)
QUICK = Size(steps=16, batch_size=4, scenes=32, held_out=8)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.train_digits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="few steps; neither AP nor the distance is judged"
    )
    parser.add_argument("--seed", type=int, default=1, help="of scenes, weights and order")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    size = QUICK if options.quick else FULL
    console = Console()
    began = time.perf_counter()
    torch.set_num_threads(THREADS)
    backends = dict(gfl_kernels.backends())
    if backends.get("cpu") != "ok":
        console.print(
            f"[yellow]The compiled library is not in use ({backends.get('cpu')}): 'ours' runs on"
            " plain PyTorch too, and its times say nothing.[/]"
        )

    with console.status("composing scenes from scanned digits"):
        held_out = make_scenes(size.held_out, options.seed, held_out=True)
        plan = make_plan(size, options.seed)
    runs = make_runs(plan)
    with progress_bar(console) as progress:
        train(runs, plan, progress)
    torch.set_num_threads(THREADS)
    with console.status("evaluating on held-out scenes"):
        found = {name: evaluate.detect(run.model, held_out.images) for name, run in runs.items()}
        precision = {name: evaluate.average_precision(d, held_out) for name, d in found.items()}

    plain, ours, *controls = runs.values()
    distances = {
        run.name: compare.distance(run.curve, plain.curve)
        for run in runs.values()
        if run is not plain
    }
    objections = judge(distances, controls, precision) if not options.quick else []

    options.out.mkdir(parents=True, exist_ok=True)
    files = [
        pictures.loss_curves(
            options.out / "loss_curves.png",
            plain.curve,
            ours.curve,
            {run.name: run.curve for run in controls},
        ),
        pictures.detections(options.out / "detections.png", held_out, found[ours.name]),
        pictures.side_distributions(
            options.out / "side_distributions.png", held_out, found[ours.name]
        ),
    ]
    seconds = time.perf_counter() - began
    report = options.out / "train_digits.json"
    write_report(report, options, size, seconds, runs, distances, precision, objections)

    console.print(results_table(runs, distances, precision, size))
    print_times(console, plain, ours)
    print_verdict(console, ours, distances, controls, precision, objections, options.quick)
    written = [str(file) for file in files if file is not None]
    console.print(f"Written: {', '.join([*written, str(report)])}", soft_wrap=True)
    console.print(f"Took {seconds:.0f} s.")
    return 1 if objections else 0


def write_report(path, options, size, seconds, runs, distances, precision, objections) -> None:
    results = {
        name: {
            "threads": run.threads,
            "precision": precision[name],
            "milliseconds": milliseconds(run),
            "distance_from_plain": dataclasses.asdict(distances[name])
            if name in distances
            else None,
            "curve": run.curve,
        }
        for name, run in runs.items()
    }
    content = {
        "quick": options.quick,
        "seed": options.seed,
        "size": dataclasses.asdict(size),
        "seconds": round(seconds, 1),
        "machine": describe_machine(THREADS),
        "allocator": allocator_settings(),
        "versions": describe_versions(),
        "runs": results,
        "limit": compare.LIMIT,
        "objections": objections,
    }
    path.write_text(json.dumps(content, indent=1))


def make_plan(size: Size, seed: int) -> Plan:
    scenes = make_scenes(size.scenes, seed, held_out=False)
    anchors = Detector(PLAIN, IMAGE_SIZE, NUM_CLASSES).head.anchors()
    targets = assign_all(anchors, scenes, NUM_CLASSES)
    return Plan(scenes, targets, size.steps, size.batch_size, seed)


def make_runs(plan: Plan) -> dict[str, Run]:
    """(a), (b), and the controls of (a), by name."""
    runs = [
        Run("plain PyTorch", plan, THREADS, loss_objects=PLAIN),
        Run("gfl_kernels", plan, THREADS, loss_objects=OURS),
        Run(f"{CONTROL_THREADS} thread", plan, CONTROL_THREADS, loss_objects=PLAIN),
        Run("float64", plan, THREADS, loss_objects=PLAIN, in_double=True),
    ]
    return {run.name: run for run in runs}


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("training"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[losses]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def train(runs: dict[str, Training], plan: Plan, progress: Progress) -> None:
    turns = list(runs.values())
    task = progress.add_task("training", total=plan.steps, losses="")
    for number, scene_numbers in enumerate(plan.order()):
        first = number % len(turns)
        for run in turns[first:] + turns[:first]:
            run.step(scene_numbers)
        plain, ours = (run.curve[-1] for run in turns[:2])
        progress.update(task, advance=1, losses=f"loss: plain {plain:.3f}, ours {ours:.3f}")


def milliseconds(run: Training) -> dict[str, float]:
    """Medians over the steps after the warm-up."""
    return {
        part: 1e3 * statistics.median(values[min(WARM_UP_STEPS, len(values) // 2) :])
        for part, values in run.seconds.items()
    }


def judge(distances, controls: list[Run], precision) -> list[str]:
    """Everything that makes the demo fail, in words."""
    objections = compare.objections(
        distances["gfl_kernels"], [distances[run.name] for run in controls]
    )
    for name in ("plain PyTorch", "gfl_kernels"):
        if not precision[name]["AP"] > REQUIRED_AP:
            objections.append(f"AP of {name} is {precision[name]['AP']:.3f}, not above 0.5")
    return objections


def results_table(runs: dict[str, Run], distances, precision, size: Size) -> Table:
    table = Table(
        title=f"GFL detector on scanned digits: {size.steps} steps of {size.batch_size} scenes",
        caption="diff.: of the loss curve from plain PyTorch's, relative; largest: smoothed over"
        f" {compare.WINDOW} steps; rms: over all steps. AP: COCO, on {size.held_out} held-out"
        " scenes. Times: medians of interleaved steps in ms, and the share of the step. loss stage:"
        " from the head's outputs to their gradients, with GIoU, IoU and indexing; loss objects:"
        " QFL, DFL and Integral alone, forward and backward.",
    )
    table.add_column("training", no_wrap=True)
    for title in ("largest diff.", "rms diff.", "AP", "step", "loss stage", "loss objects"):
        table.add_column(title, justify="right")
    for number, (name, run) in enumerate(runs.items()):
        times = milliseconds(run)
        table.add_row(
            name if number < 2 else f"control: {name}",
            *(
                f"{getattr(distances[name], measure):.2e}" if name in distances else "-"
                for measure in ("largest", "rms")
            ),
            f"{precision[name]['AP']:.3f}",
            f"{times['step']:.1f}",
            *(
                f"{times[part]:.2f}\n{times[part] / times['step']:.1%}"
                for part in ("loss stage", "loss objects")
            ),
            end_section=number == 1,
        )
    return table


def print_times(console: Console, plain: Run, ours: Run) -> None:
    before, after = milliseconds(plain), milliseconds(ours)
    console.print(
        "gfl_kernels against plain PyTorch: "
        + ", ".join(
            f"{part} {before[part]:.2f} -> {after[part]:.2f} ms ({before[part] / after[part]:.2f}x)"
            for part in ("loss objects", "loss stage", "step")
        ),
        highlight=False,
        soft_wrap=True,
    )


def print_verdict(console, ours: Run, distances, controls, precision, objections, quick) -> None:
    for measure, title in compare.MEASURES.items():
        apart = {name: getattr(found, measure) for name, found in distances.items()}
        limit = compare.allowed(measure, [distances[run.name] for run in controls])
        console.print(
            f"{title}: |ours - plain| {apart[ours.name]:.2e}, "
            + ", ".join(f"|{run.name} - plain| {apart[run.name]:.2e}" for run in controls)
            + f"; allowed {limit:.2e}",
            highlight=False,
            soft_wrap=True,
        )
    if quick:
        console.print("[yellow]Quick run: neither the distance nor AP is judged.[/]")
        return
    for objection in objections:
        console.print(f"[bold red]FAILED:[/] {objection}", highlight=False, soft_wrap=True)
    if not objections:
        console.print(
            f"[bold green]Agreed:[/] ours is within {compare.LIMIT:g} times the farther control,"
            f" and AP {precision[ours.name]['AP']:.3f} is above {REQUIRED_AP}.",
            highlight=False,
            soft_wrap=True,
        )


if __name__ == "__main__":
    sys.exit(main())
