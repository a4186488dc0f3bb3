"""Instruction sets against each other: the choice is made at load, so each has its own process.

Processes take turns block by block, as contestants do within one process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.cases import CASES, STEP, Case
from bench.machine import ALLOCATOR, QUIET

# Threads that have just finished spin for more work; they must be still before others are timed.
SETTLE_SECONDS = 0.02


class Worker:
    """A process of this module under one GFL_CPU_ISA; one line of JSON each way per request."""

    def __init__(self, isa: str, threads: int, seconds: float):
        environment = {**QUIET, **os.environ, **ALLOCATOR}
        environment.update(GFL_CPU_ISA=isa, GFL_KERNELS_BACKEND="cpu")
        self.isa = isa
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.isa", str(threads), str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).resolve().parent.parent,
        )

    def ask(self, request: str) -> dict:
        """Answers "prepare NAME" and "time"; RuntimeError with the worker's own reason."""
        try:
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self._process.wait()
            raise RuntimeError(f"GFL_CPU_ISA={self.isa}: the process ended with {code}")
        reply = json.loads(answer)
        if "error" in reply:
            raise RuntimeError(f"GFL_CPU_ISA={self.isa}: {reply['error']}")
        return reply

    def block(self) -> tuple[float, int, float]:
        time.sleep(SETTLE_SECONDS)
        reply = self.ask("time")
        return reply["seconds"], reply["calls"], reply["faults"]

    def close(self):
        self._process.stdin.close()
        self._process.wait()


def compare(
    isas: Sequence[str], cases: Sequence[Case], threads: int, seconds: float, rounds: int
) -> dict[str, dict]:
    """case name -> isa -> Samples, forward + backward."""
    from bench.measure import interleave

    workers = [Worker(isa, threads, seconds) for isa in isas]
    try:
        results = {}
        for case in cases:
            for worker in workers:
                chosen = worker.ask(f"prepare {case.name}")["isa"]
                if chosen != worker.isa:
                    raise RuntimeError(f"asked for GFL_CPU_ISA={worker.isa}, got {chosen}")
            blocks = {worker.isa: worker.block for worker in workers}
            results[case.name] = interleave(blocks, rounds)
        return results
    finally:
        for worker in workers:
            worker.close()


def serve(threads: int, seconds: float):
    """The worker's side, until its input ends."""
    import torch

    from bench import contestants, measure
    from bench.machine import native_isa

    torch.set_num_threads(threads)
    cases = {case.name: case for case in CASES}
    run = None
    for line in sys.stdin:
        request, _, name = line.strip().partition(" ")
        try:
            if request == "prepare":
                case = cases[name]
                inputs = contestants.make_inputs(case)
                ours = contestants.ours(case, inputs)
                measure.Gate(case, inputs).check(native_isa(), ours)
                watch = measure.Stopwatch()
                statement = measure.passes(inputs, ours, STEP, watch)
                run = measure.block(statement, watch, threads, seconds)
                reply = {"isa": native_isa()}
            else:
                took, calls, faults = run()
                reply = {"seconds": took, "calls": calls, "faults": faults}
        except Exception as error:  # reported to the parent, which raises it
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]), float(sys.argv[2]))
