"""The gate that lets only correct contestants in, and the one timer."""

from __future__ import annotations

import itertools
import math
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from bench import contestants as field_of
from bench.cases import BACKWARD, FORWARD, STEP, Case
from bench.contestants import COMPILE, EAGER, Inputs

# |error| may reach 2 x eager's + RTOL |truth| + SPREAD |terms| + the least magnitude. RTOL: two
# roundings to the dtype, or for float32 the many operations of a formula. SPREAD: where a gradient
# is a difference of larger terms (contestants.terms), whose rounding eager may escape by luck.
RTOL = {"float32": 1e-5, "bfloat16": 2.0**-7, "float16": 2.0**-10}
SPREAD = {"float32": 1e-6, "bfloat16": 2.0**-9, "float16": 2.0**-12}
# Competitors are refused for being another function, not for where a compiler rounds to half
# precision: without its fastest form the comparison would flatter us.
COMPETITOR_SLACK = {"float32": 1, "bfloat16": 16, "float16": 16}
# The yardstick itself may be rounded, but not be another function: relative to the truth's norm.
EAGER_NORM = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 2e-2}

WHAT = ("result", "gradient")


class WrongResult(Exception):
    """A contestant's numbers are worse than eager's; the message says where and by how much."""


@dataclass
class Gate:
    """Compares contestants with float64, and with how far eager is from it."""

    case: Case
    inputs: Inputs
    truth: tuple[Tensor, Tensor] = field(init=False)
    allowed: list[Tensor] = field(init=False)

    def __post_init__(self):
        self.truth = field_of.truth(self.case, self.inputs)
        eager = field_of.contestants(self.case, self.inputs, compiled=False)[EAGER]
        self.allowed = []
        dtype = self.case.dtype
        terms = (
            field_of.result_terms(self.case, self.truth[0]),
            field_of.terms(self.case, self.inputs),
        )
        found = self._run(EAGER, eager)
        for what, got, true, size in zip(WHAT, found, self.truth, terms, strict=False):
            error = got.double() - true
            if not error.norm() <= EAGER_NORM[dtype] * true.norm() + self._least():
                raise WrongResult(f"{EAGER} itself: {what} is off by {error.norm():.3g} in norm")
            allowed = error.abs_().mul_(2).add_(true.abs(), alpha=RTOL[dtype])
            self.allowed.append(allowed.add_(size, alpha=SPREAD[dtype]).add_(self._least()))

    def _least(self) -> float:
        """Below this magnitude a result may be flushed to 0: subnormal, except in float16."""
        info = torch.finfo(getattr(torch, self.case.dtype))
        return 4 * (info.smallest_normal if info.bits > 16 or info.max > 1e5 else 2.0**-24)

    def _run(self, name: str, contestant: Callable) -> tuple[Tensor, ...]:
        """The result and, where a pass has it, the gradient."""
        x = self.inputs.logits
        x.grad = None
        if self.case.forward_only:
            with torch.no_grad():
                result = contestant(x.detach())
        else:
            result = contestant(x)
        if result.shape != self.truth[0].shape:
            shapes = f"{tuple(result.shape)}, not {tuple(self.truth[0].shape)}"
            raise WrongResult(f"{name}: result has shape {shapes}")
        if self.case.forward_only:
            return (result,)
        result.backward(upstream_like(self.inputs, result))
        gradient, x.grad = x.grad, None
        return result.detach(), gradient

    def check(self, name: str, contestant: Callable[[Tensor], Tensor]) -> float:
        """The largest share of the allowed error that is used; WrongResult if it is above 1."""
        slack = COMPETITOR_SLACK[self.case.dtype] if name.startswith(COMPILE) else 1
        found = self._run(name, contestant)
        compared = list(zip(WHAT, found, self.truth, self.allowed, strict=False))
        if FORWARD in self.case.passes and len(found) > 1:
            with torch.no_grad():
                alone = contestant(self.inputs.logits.detach())
            compared.append(("result without grad", alone, self.truth[0], self.allowed[0]))
        worst = 0.0
        for what, got, true, allowed in compared:
            share = (got.double() - true).abs_().div_(allowed).div_(slack)
            share = torch.where(share.isnan(), math.inf, share).flatten()
            at = int(share.argmax())
            if share[at] > 1:
                raise WrongResult(
                    f"{name}: {what}[{at}] is {got.flatten()[at].item():.9g}, "
                    f"float64 says {true.flatten()[at].item():.9g}: "
                    f"{share[at].item():.3g} times the allowed error; "
                    f"{int((share > 1).sum())} of {share.numel()} elements are off"
                )
            worst = max(worst, share[at].item())
        return worst


def upstream_like(inputs: Inputs, result: Tensor) -> Tensor | None:
    return None if inputs.upstream is None else inputs.upstream.to(result.dtype)


def upstream_of(inputs: Inputs, contestant: Callable[[Tensor], Tensor]) -> Tensor | None:
    """The upstream gradient in the dtype of the contestant's result, which only a call tells."""
    return None if inputs.upstream is None else upstream_like(inputs, contestant(inputs.logits))


class Stopwatch:
    """A clock that can stand still: what happens between hold() and go() takes no time. On a GPU
    it waits for what has been launched."""

    def __init__(self, device: str = "cpu"):
        self._held = 0.0
        self._since = 0.0
        self._wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def __call__(self) -> float:
        self._wait()
        return time.perf_counter() - self._held

    def hold(self):
        self._wait()
        self._since = time.perf_counter()

    def go(self):
        self._wait()
        self._held += time.perf_counter() - self._since


def passes(
    inputs: Inputs, contestant: Callable, which: str, watch: Stopwatch
) -> Callable[[], None]:
    """The statement that is timed, one call of one pass."""
    x = inputs.logits
    if which == FORWARD:
        detached = x.detach()

        def forward():
            with torch.no_grad():
                contestant(detached)

        return forward

    upstream = upstream_of(inputs, contestant)
    if which == STEP:

        def step():
            x.grad = None
            contestant(x).backward(upstream)

        return step
    assert which == BACKWARD, which

    def backward():
        watch.hold()
        x.grad = None
        result = contestant(x)
        watch.go()
        result.backward(upstream)

    return backward


def copy_of(moved: int, device: str = "cpu") -> Callable[[], None]:
    """A parallel copy that moves as many bytes: it reads half of them and writes half."""
    source = torch.ones(max(1, moved // 8), dtype=torch.float32, device=device)
    destination = torch.empty_like(source)
    return lambda: destination.copy_(source)


@dataclass
class Samples:
    """Seconds of one call, one value a round; round i of all contestants ran side by side."""

    seconds: list[float]
    calls: int  # calls of a block, whose mean is one value
    faults: float  # page faults of a call: not 0 if the allocator hands out fresh memory

    def quartiles(self) -> tuple[float, float, float]:
        return quartiles(self.seconds)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return (values[0],) * 3
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def ratio(above: Samples, below: Samples) -> tuple[float, float, float]:
    """Quartiles of the ratio of times, each from one round: drift of the machine cancels."""
    return quartiles([a / b for a, b in zip(above.seconds, below.seconds, strict=True)])


def interleave(
    blocks: Mapping[str, Callable[[], tuple[float, int, float]]], rounds: int
) -> dict[str, Samples]:
    """Runs A, B, C, A, B, C ...: a block returns (seconds of a call, calls,
    page faults of a call).

    Every round starts with another contestant, so that none always follows the same one.
    """
    names = list(blocks)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    calls, faults = dict.fromkeys(names, 0), dict.fromkeys(names, 0.0)
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            took, count, faulted = blocks[name]()
            seconds[name].append(took)
            calls[name] = count
            faults[name] += faulted
    return {name: Samples(seconds[name], calls[name], faults[name] / rounds) for name in names}


def block(
    statement: Callable[[], None], watch: Stopwatch, threads: int, seconds: float
) -> Callable[[], tuple[float, int, float]]:
    """One contestant's block: as many calls as fill `seconds`, warmed up and counted here, once."""
    timer = Timer("call()", globals={"call": statement}, timer=watch, num_threads=threads)
    watch()
    began, warm = time.perf_counter(), 0
    while warm < 3 or time.perf_counter() - began < min(seconds, 0.05):
        statement()
        warm += 1
    watch()
    # Wall time, also where the watch stands still for a part: a round must not take for ever.
    calls = max(1, int(seconds * warm / (time.perf_counter() - began)))

    def run() -> tuple[float, int, float]:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        took = timer.timeit(calls).mean
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        # timeit warms up with 2 calls, or a hundredth of them; they fault like the others.
        return took, calls, faults / (calls + max(calls // 100, 2))

    return run


@dataclass
class Memory:
    """Bytes of tensors, from the profiler's record of every allocation."""

    saved: int  # alive between forward and backward, without inputs and result
    peak: int  # most alive at once during forward + backward, without inputs


def memory(inputs: Inputs, contestant: Callable[[Tensor], Tensor]) -> Memory:
    x = inputs.logits
    x.grad = None
    upstream = upstream_of(inputs, contestant)
    activities = [ProfilerActivity.CPU]
    with profile(activities=activities, profile_memory=True) as forward:
        result = contestant(x)
    with profile(activities=activities, profile_memory=True) as backward:
        result.backward(upstream)
    x.grad = None
    steps = _allocations(forward)
    saved = sum(steps) - result.numel() * result.element_size()
    return Memory(max(saved, 0), _peak(steps + _allocations(backward)))


def peak_of(statement: Callable[[], object]) -> int:
    """The most bytes of tensors alive at once while it runs, without those it began with."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        statement()
    return _peak(_allocations(record))


def _peak(steps: list[int]) -> int:
    return max(itertools.accumulate(steps, initial=0))


def _allocations(record: profile) -> list[int]:
    """Bytes of each allocation, negative for a release, in order of time."""
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
