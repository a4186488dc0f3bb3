"""``python -m bench.overhead``: what a call on small logits consists of.

Microseconds of a step, forward + backward, of the least that autograd takes, of an empty Function,
of the op alone, of a Function that calls the op with arguments made long before and hands out the
gradient that it saved, and of the public function, with its way through Python and as it is; on the
shapes of make bench that are small.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench import contestants, machine
from bench.cases import CASES, Case
from bench.measure import Stopwatch, block, interleave
from gfl_kernels import dispatch

SMALL = ("qfl sparse 64x80 float32 plain", "dfl 2400x17 float32")


class Empty(torch.autograd.Function):
    """What no loss that is a Function can do without."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.new_empty(())

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.empty_like(x)


def bare(forward, taken: list):
    """loss of x, x among what was taken: a Function without checks, choices and other paths."""

    class Bare(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            loss, grad = forward(*taken)
            ctx.save_for_backward(grad)
            return loss

        @staticmethod
        def backward(ctx, grad_loss):
            (grad,) = ctx.saved_tensors
            return grad if grad_loss.item() == 1 else grad * grad_loss

    return Bare.apply


def in_python(call):
    """call as it is where gfl_kernels._autograd does not fit torch."""

    def run():
        kept, dispatch._autograd = dispatch._autograd, None
        try:
            return call()
        finally:
            dispatch._autograd = kept

    return run


def parts(case: Case) -> dict:
    """name -> a call, each the whole or a part of the last one."""
    inputs = contestants.make_inputs(case)
    x, ours = inputs.logits, contestants.ours(case, inputs)
    family = "quality" if case.op == "qfl" else "distribution"
    forward = dispatch.implementation("cpu", f"{family}_forward")
    taken = _arguments(ours, x)

    def step(function):
        def run():
            x.grad = None
            function(x).backward()
            return x.grad

        return run

    return {
        "x.sum(), a step": step(Tensor.sum),
        "an empty Function, a step": step(Empty.apply),
        "the op alone, with its gradient": lambda: forward(*taken),
        "the op in a bare Function, a step": step(bare(forward, taken)),
        "gfl_kernels in Python, a step": in_python(step(ours)),
        "gfl_kernels, a step": step(ours),
    }


class _Recorder(TorchDispatchMode):
    """Keeps what the ops of gfl_native are called with. Under a mode the public functions go
    through Python.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gfl_native":
            self.calls.append(args)
        return func(*args, **(kwargs or {}))


def _arguments(loss: Callable[[Tensor], Tensor], x: Tensor) -> list:
    """What the op of a loss is called with."""
    with _Recorder() as recorder:
        loss(x)
    (taken,) = recorder.calls
    return [taken[0].detach(), *taken[1:]]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.2, help="of a part and round")
    options = parser.parse_args(arguments)
    watch, threads = Stopwatch(), torch.get_num_threads()
    for case in CASES:
        if case.name not in SMALL:
            continue
        blocks = {
            name: block(call, watch, threads, options.seconds) for name, call in parts(case).items()
        }
        print(case.name)
        for name, samples in interleave(blocks, options.rounds).items():
            print(f"  {name:<34}{statistics.median(samples.seconds) * 1e6:8.1f} us")


if __name__ == "__main__":
    machine.fix_allocator("bench.overhead", sys.argv[1:])
    main(sys.argv[1:])
