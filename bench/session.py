"""One run of the benchmark: check, time, print, write. run.py is its command line."""

from __future__ import annotations

import argparse
import functools
import gc
import sys
import time
import warnings
from datetime import datetime, timezone

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch._dynamo import utils as dynamo

import gfl_kernels
from bench import cases, charts, contestants, isa, machine, measure, report
from bench.cases import STEP, Case
from bench.contestants import COMPILE


class Run:
    """The settings of one run, and what it has found so far."""

    def __init__(self, options: argparse.Namespace, console: Console):
        self.options = options
        self.console = console
        self.rows: list[report.Row] = []
        self.refused: list[dict] = []

    def case(self, case: Case, say=lambda text: None):
        """Checks, measures memory, and times all contestants of a case in each of its passes."""
        inputs = contestants.make_inputs(case, device=self.options.device)
        table = contestants.contestants(case, inputs, compiled=not self.options.no_compile)
        if self.options.quick:
            for form in contestants.NOT_QUICK.get(case.op, ()):
                table.pop(COMPILE + form, None)
        say("checking against float64")
        accepted, checks = self.admit(case, inputs, table, say)
        memory = {}  # the profiler's record of a GPU's allocations has never been looked at
        if self.options.device == "cpu" and not case.forward_only:
            memory = {name: measure.memory(inputs, form) for name, form in accepted.items()}
        wanted = case.passes if not self.options.quick else (STEP,)
        for which in wanted if accepted else ():
            say(f"timing {which}")
            samples = self.time(case, inputs, accepted, which)
            self.rows += report.rows_of(
                report.CASE,
                case,
                which,
                samples,
                memory if which == STEP else None,
                checks,
            )
        torch.compiler.reset()
        gc.collect()

    def admit(self, case: Case, inputs, table: dict, say=lambda text: None) -> tuple[dict, dict]:
        """The contestants that may be timed, and for each what the check has shown."""
        accepted, checks = {}, {}
        try:
            gate = measure.Gate(case, inputs)
        except measure.WrongResult as wrong:
            self.refuse(case, contestants.EAGER, str(wrong))
            return {}, {}
        for name, contestant in table.items():
            say(f"compiling {name.removeprefix(COMPILE)}" if name.startswith(COMPILE) else name)
            dynamo.counters.clear()
            try:
                checks[name] = {"error_share": gate.check(name, contestant)}
                accepted[name] = contestant
            except measure.WrongResult as wrong:
                self.refuse(case, name, str(wrong))
            except torch._dynamo.exc.TorchDynamoException as failure:
                self.refuse(case, name, f"does not compile: {str(failure).splitlines()[0]}")
            if name in accepted and name.startswith(COMPILE):
                breaks = sum(dynamo.counters["graph_break"].values())
                graphs = dynamo.counters["stats"]["unique_graphs"]
                checks[name] |= {"graphs": graphs, "graph_breaks": breaks}
        return accepted, checks

    def refuse(self, case: Case, name: str, reason: str):
        self.refused.append({"case": case.name, "contestant": name, "reason": reason})
        self.console.print(f"[bold red]refused[/] {case.name}: {reason}", highlight=False)

    def time(self, case: Case, inputs, accepted: dict, which: str) -> dict[str, measure.Samples]:
        watch = measure.Stopwatch(self.options.device)
        statements = {
            name: measure.passes(inputs, contestant, which, watch)
            for name, contestant in accepted.items()
        }
        statements[report.COPY] = measure.copy_of(case.bytes(which), self.options.device)
        if case is cases.TINY and which == STEP:
            x = inputs.logits

            def baseline():
                x.grad = None
                x.sum().backward()

            statements[report.SUM] = baseline
        return self.interleave(statements, watch)

    def interleave(self, statements: dict, watch: measure.Stopwatch) -> dict:
        threads, seconds = self.options.threads, self.options.block_ms / 1e3
        blocks = {
            name: measure.block(statement, watch, threads, seconds)
            for name, statement in statements.items()
        }
        return measure.interleave(blocks, self.options.rounds)

    def denormals(self, case: Case):
        """Ours on logits of one value, those of QFL with losses and gradients below the smallest
        normal number."""
        watch = measure.Stopwatch()
        statements = {}
        for value in (None, *cases.DENORMAL_LOGITS):
            inputs = contestants.make_inputs(case, constant=value)
            ours = contestants.ours(case, inputs)
            name = report.ORDINARY if value is None else f"logits {value:g}"
            accepted, _ = self.admit(case, inputs, {name: ours})
            if accepted:
                statements[name] = measure.passes(inputs, ours, STEP, watch)
        if report.ORDINARY in statements:
            samples = self.interleave(statements, watch)
            self.rows += report.rows_of(report.DENORMAL, case, STEP, samples)

    def isas(self, chosen: list[Case]):
        """Every instruction set the library was built for and this machine has."""
        available = machine.available_isas()
        if self.options.quick and "baseline" in available[:-2]:
            available.remove("baseline")
        if len(available) < 2 or not chosen:
            return
        options = self.options
        try:
            compared = isa.compare(
                available, chosen, options.threads, options.block_ms / 1e3, options.rounds
            )
        except RuntimeError as failure:
            self.refused.append({"case": "", "contestant": "ours", "reason": str(failure)})
            self.console.print(f"[bold red]instruction sets[/] {failure}", highlight=False)
            return
        for case in chosen:
            self.rows += report.isa_rows(case, compared[case.name])


def obstacle(options: argparse.Namespace) -> str | None:
    """Why this run cannot be, in a line."""
    if options.device == "cuda" and not torch.cuda.is_available():
        return f"--device cuda: torch {torch.__version__} finds no GPU"
    if options.backend is not None:
        reason = gfl_kernels.backends().get(options.backend, "there is none of that name")
        if reason != "ok":
            return f"--backend {options.backend}: {reason}"
    return None


def execute(options: argparse.Namespace, selected: list[Case]) -> int:
    """Runs the selected cases; the exit status."""
    with gfl_kernels.use_backend(options.backend):
        return _execute(options, selected)


def _execute(options: argparse.Namespace, selected: list[Case]) -> int:
    console = Console(width=None if sys.stdout.isatty() else 170)
    options.threads = options.threads or torch.get_num_threads()
    torch.set_num_threads(options.threads)
    # What inductor says when "as is" breaks in the middle of a graph.
    warnings.filterwarnings("ignore", module="torch.autograd.graph")
    began = time.perf_counter()
    context = describe(options)
    print_context(console, context)

    run = Run(options, console)
    # A case object in both lists is the same object: --only narrows the extras as well.
    denormal = cases.DENORMAL_QUICK if options.quick else cases.DENORMAL_CASES
    isas = cases.ISA_QUICK if options.quick else cases.ISA_CASES
    on_cpu = options.device == "cpu" and options.backend in (None, "cpu")
    denormal = [case for case in denormal if case in selected and on_cpu]
    isas = [case for case in isas if case in selected and on_cpu]
    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(selected) + len(denormal) + len(isas))
        for case in selected:
            run.case(case, functools.partial(describe_step, progress, bar, case.name))
            progress.advance(bar)
            if not console.is_terminal:  # there the bar shows how far it is
                console.print(f"{time.perf_counter() - began:6.1f} s  {case.name}", highlight=False)
        for case in denormal:
            progress.update(bar, description=f"{case.name}: denormals")
            run.denormals(case)
            progress.advance(bar)
        progress.update(bar, description="instruction sets")
        run.isas(isas)
        progress.advance(bar, len(isas))

    context["settings"]["seconds"] = round(time.perf_counter() - began, 1)
    verdicts = report.judge(run.rows) if on_cpu else []
    report.write(options.out, context, run.rows, run.refused, verdicts)
    pictures = charts.draw(options.out, context, run.rows) if on_cpu else []
    report.print_cases(console, run.rows)
    report.print_extras(console, run.rows)
    if verdicts:
        report.print_verdicts(console, verdicts)
    for entry in run.refused:
        console.print(f"[bold red]refused[/] {entry['case']}: {entry['reason']}", highlight=False)
    files = [options.out / "bench.json", options.out / "bench.csv", *pictures]
    console.print(f"{context['settings']['seconds']:.0f} s; wrote {', '.join(map(str, files))}")
    ours_refused = any(not entry["contestant"].startswith(COMPILE) for entry in run.refused)
    reached = not ours_refused and all(v["verdict"] in ("pass", "hoped") for v in verdicts)
    return 0 if reached or not options.check else 1


def describe_step(progress: Progress, bar, name: str, text: str):
    progress.update(bar, description=f"{name}: {text}")


def describe(options: argparse.Namespace) -> dict:
    """What stands in every file beside the figures."""
    return {
        "machine": machine.describe_machine(options.threads, options.device),
        "versions": machine.describe_versions(),
        "settings": {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "device": options.device,
            "backend": options.backend or "",
            "quick": options.quick,
            "only": options.only or "",
            "rounds": options.rounds,
            "block_ms": options.block_ms,
            "seed": contestants.SEED,
            "allocator": machine.allocator_settings(),
        },
    }


def print_context(console: Console, context: dict):
    host, versions, settings = context["machine"], context["versions"], context["settings"]
    console.print(
        f"{host['gpu'] + ', ' if host['gpu'] else ''}"
        f"{host['cpu']}, {host['cores']} cores, {host['threads']} threads; "
        f"torch {versions['torch']} ({versions['torch_isa']}), "
        f"gfl_kernels {versions['gfl_kernels']} ({versions['isa']}), "
        f"Python {versions['python']}, {versions['compiler_of_torch_compile']}\n"
        f"{settings['rounds']} rounds, blocks of {settings['block_ms']:g} ms; allocator: "
        f"{settings['allocator']}",
        highlight=False,
        style="dim",
    )
    reason = versions["backends"].get("cpu")
    if settings["device"] == "cpu" and reason != "ok":
        console.print(f"[bold yellow]ours is the reference backend here[/]: cpu: {reason}")
