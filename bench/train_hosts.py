"""Trains a real head of mmdetection or Ultralytics on scanned digits, as it is and on gfl_kernels.

    python -m bench.train_hosts mmdet          # GFLHead with its ATSS assigner, on bench's pyramid
    python -m bench.train_hosts ultralytics    # YOLOv8n, from its configuration, no weights
    python -m bench.train_hosts mmdet --quick  # a few steps, to see that everything runs

Three trainings start from the same weights and see the same batches: the host as it is, the host
under gfl_kernels.adapters.accelerate, and the host on another thread count, which shows what
rounding alone does (bench/digits/compare.py). They take turns step by step. Ends with a table, a
picture and a JSON file in bench/out/; the exit status is 1 if the curves differ by more than twice
what the control's do, or by 1e-4 within the first 20 steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.digits import compare, evaluate, pictures
from bench.digits.hosts import HOSTS, HostTraining
from bench.digits.scenes import make_scenes
from bench.digits.train import Plan
from bench.machine import allocator_settings, describe_machine, describe_versions
from bench.measure import peak_of
from bench.train_digits import CONTROL_THREADS, THREADS, Size, milliseconds, progress_bar, train
from gfl_kernels.adapters import accelerate

FULL = Size(steps=200, batch_size=8, scenes=400, held_out=100)
QUICK = Size(steps=12, batch_size=4, scenes=24, held_out=8)
FIRST_STEPS, FIRST_LIMIT = 20, 1e-4


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.train_hosts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("host", choices=sorted(HOSTS))
    parser.add_argument("--quick", action="store_true", help="few steps; nothing is judged")
    parser.add_argument("--seed", type=int, default=1, help="of scenes, weights and order")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    size = QUICK if options.quick else FULL
    console = Console()
    began = time.perf_counter()
    torch.set_num_threads(THREADS)
    with console.status("composing scenes from scanned digits"):
        held_out = make_scenes(size.held_out, options.seed, held_out=True)
        scenes = make_scenes(size.scenes, options.seed, held_out=False)
    plan = Plan(scenes, None, size.steps, size.batch_size, options.seed)
    runs = make_runs(options.host, plan)
    with progress_bar(console) as progress:
        train(runs, plan, progress)
    torch.set_num_threads(THREADS)
    with console.status("evaluating on held-out scenes"):
        precision = {
            name: evaluate.average_precision(evaluate.detect(run.model, held_out.images), held_out)
            for name, run in runs.items()
        }
        peaks = {name: peak_memory(run) for name, run in runs.items()}

    plain, ours, control = runs.values()
    results = {}
    for name, run in runs.items():
        apart = compare.relative_difference(run.curve, plain.curve)
        times = milliseconds(run)
        results[name] = {
            "threads": run.threads,
            "precision": precision[name],
            "milliseconds": {**times, "after targets": times["loss stage"] - times["assignment"]},
            "peak_of_loss": peaks[name],
            "first": float(apart[:FIRST_STEPS].max()),
            "distance_from_host": dataclasses.asdict(compare.distance(run.curve, plain.curve)),
            "curve": run.curve,
        }
    objections = [] if options.quick else judge(*results.values())
    options.out.mkdir(parents=True, exist_ok=True)
    picture = pictures.loss_curves(
        options.out / f"train_{options.host}.png",
        plain.curve,
        ours.curve,
        {control.name: control.curve},
        plain_name=plain.name,
        terms=plain.terms,
    )
    report = options.out / f"train_{options.host}.json"
    content = {
        "host": options.host,
        "quick": options.quick,
        "seed": options.seed,
        "size": dataclasses.asdict(size),
        "machine": describe_machine(THREADS),
        "allocator": allocator_settings(),
        "versions": describe_versions(),
        "runs": results,
        "objections": objections,
    }
    report.write_text(json.dumps(content, indent=1))
    console.print(results_table(results, size))
    for objection in objections:
        console.print(f"[bold red]FAILED:[/] {objection}", highlight=False, soft_wrap=True)
    if options.quick:
        console.print("[yellow]Quick run: nothing is judged.[/]")
    console.print(f"Written: {picture}, {report}", soft_wrap=True)
    console.print(f"Took {time.perf_counter() - began:.0f} s.")
    return 1 if objections else 0


def make_runs(host: str, plan: Plan) -> dict[str, HostTraining]:
    """The host, the host on gfl_kernels, and the control of the host, by name."""
    kind = HOSTS[host]
    runs = [
        kind(f"{host}", plan, THREADS, accelerated=False),
        kind(f"{host} on gfl_kernels", plan, THREADS, accelerated=True),
        kind(f"{CONTROL_THREADS} thread", plan, CONTROL_THREADS, accelerated=False),
    ]
    return {run.name: run for run in runs}


def peak_memory(run: HostTraining) -> int:
    """Bytes the loss stage needs at once, with its targets and gradients."""
    numbers = next(iter(run.plan.order()))
    with torch.no_grad():
        outputs = run.outputs(run.plan.scenes.images[numbers])
    leaves = [x.detach().requires_grad_() for x in outputs]
    context = accelerate(run.host) if run.accelerated else None
    peak = peak_of(lambda: run.loss_stage(leaves, numbers))
    if context is not None:
        context.restore()
    return peak


def judge(plain: dict, ours: dict, control: dict) -> list[str]:
    """Everything that makes the demo fail, in words."""
    found = []
    if not ours["first"] < FIRST_LIMIT:  # a NaN must not pass
        found.append(f"the first {FIRST_STEPS} losses differ by up to {ours['first']:.2e}")
    apart, limit = (
        run["distance_from_host"]["rms"] * factor
        for run, factor in ((ours, 1.0), (control, compare.LIMIT))
    )
    if not control["distance_from_host"]["rms"]:
        found.append("the control is bit-identical to the host, so it measures no rounding")
    elif not apart <= limit:
        found.append(f"rms over all steps is {apart:.2e}, allowed are {limit:.2e}")
    return found


def results_table(results: dict, size: Size) -> Table:
    table = Table(
        title=f"{next(iter(results))} on scanned digits: {size.steps} steps of {size.batch_size}",
        caption="diff.: of the loss curve from the host's, relative; AP: COCO, on"
        f" {size.held_out} held-out scenes. Times: medians of interleaved steps in ms, and the"
        " share of the step. loss stage: from the head's outputs to their gradients; after targets:"
        " without the host's assigner. memory: peak of the loss stage.",
    )
    table.add_column("training", no_wrap=True)
    columns = (f"first {FIRST_STEPS}", "rms diff.", "AP", "step", "loss stage", "after targets")
    for title in (*columns, "memory"):
        table.add_column(title, justify="right")
    for number, (name, result) in enumerate(results.items()):
        times = result["milliseconds"]
        table.add_row(
            f"control: {name}" if number == 2 else name,
            *(
                f"{value:.2e}" if number else "-"
                for value in (result["first"], result["distance_from_host"]["rms"])
            ),
            f"{result['precision']['AP']:.3f}",
            f"{times['step']:.1f}",
            *(
                f"{times[part]:.2f}\n{times[part] / times['step']:.1%}"
                for part in ("loss stage", "after targets")
            ),
            f"{result['peak_of_loss'] / 2**20:.1f} MiB",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
