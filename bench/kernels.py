"""``python -m bench.kernels``: what a step costs a GPU, without the host that launches it.

Forward + backward of each contestant are recorded as a CUDA graph over copies of the logits that no
cache holds at once, and replayed: launches are there, Python is not. Beside them stands a copy that
moves the bytes which the step cannot avoid, recorded in the same way. bench.run --device cuda has
the time of the whole call, which on logits of usual size is the host's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import gfl_kernels
from bench import cases, contestants, machine
from bench.cases import FORWARD, STEP, Case
from bench.measure import Gate, Stopwatch, WrongResult, copy_of, passes

DEFAULT = (
    r"^(qfl (sparse|dense) \d+x80 |qfl sparse 2x80|(vfl|focal|mal|ia_bce) .*float32"
    r"|dfl \d+x17 |fgl|integral|(statistics|moments|ld|decode) .*float32)"
)
CACHES = 400 << 20  # bytes that no GPU's last cache holds
COPY = "copy of the same bytes"


def time_of(calls: list[Callable[[], object]]) -> float:
    """Seconds of one of the calls, which are recorded in turn."""
    from triton.testing import do_bench_cudagraph

    def all_of_them():
        for call in calls:
            call()

    return do_bench_cudagraph(all_of_them, rep=20, return_mode="median") / len(calls) / 1e3


def measure(case: Case, device: str = "cuda") -> list[dict]:
    """A row for the copy and for each contestant, which are compared with float64 before; "us" is
    None where it could not be recorded.
    """
    which = FORWARD if case.forward_only else STEP
    inputs = contestants.make_inputs(case, device=device)
    count = max(2, min(16, CACHES // case.logit_bytes))
    copies = [
        replace(inputs, logits=inputs.logits.detach().clone().requires_grad_())
        for _ in range(count)
    ]
    watch = Stopwatch(device)
    eager, _, ours = contestants.forms(case, inputs)
    forms = {"eager": ("reference", eager)}
    for name in ("triton", "cuda"):
        if gfl_kernels.backends()[name] == "ok":
            forms[name] = name, ours
    gate = Gate(case, inputs)
    moved = case.bytes(which)
    floor = time_of([copy_of(moved, device) for _ in range(count)])
    rows = [{"contestant": COPY, "us": floor * 1e6}]
    for name, (backend, form) in forms.items():
        try:
            with gfl_kernels.use_backend(backend):
                gate.check(name, form)
                seconds = time_of([passes(copy, form, which, watch) for copy in copies])
        # What is wrong is not timed, and what waits for the GPU cannot be recorded.
        except (WrongResult, RuntimeError) as error:
            torch.cuda.synchronize()
            rows.append({"contestant": name, "us": None, "why": str(error).splitlines()[0]})
        else:
            rows.append({"contestant": name, "us": seconds * 1e6})
    for row in rows:
        row |= {"case": case.name, "pass": which, "bytes": moved}
        if row["us"]:
            row |= {"tb_per_s": moved / row["us"] / 1e6, "times_copy": row["us"] / floor / 1e6}
    return rows


def table_of(rows: list[dict]) -> Table:
    table = Table("case", "contestant", "us", "TB/s", "of the copy's rate")
    last = None
    for row in rows:
        cells = [row.get("why", "")[:40], "", ""]
        if row["us"]:
            cells = [f"{row['us']:.2f}", f"{row['tb_per_s']:.2f}", f"{1 / row['times_copy']:.0%}"]
        table.add_row(row["case"] if row["case"] != last else "", row["contestant"], *cells)
        last = row["case"]
    return table


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="REGEX", default=DEFAULT, help="cases whose name matches")
    parser.add_argument("--out", type=Path, default=Path("bench/out/gpu"), help="folder")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"bench.kernels: torch {torch.__version__} finds no GPU", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 130)
    rows = []
    for case in cases.select(options.only, quick=False):
        rows += measure(case)
    console.print(table_of(rows))
    document = {
        "machine": machine.describe_machine(torch.get_num_threads(), "cuda"),
        "versions": machine.describe_versions(),
        "rows": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "kernels.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    console.print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
