"""``python -m bench.head``: the losses of a whole GFL head, forward + backward.

Two images of 1333 x 800 padded to a multiple of 32, five levels as convolutions leave them, 80
classes, 17 bins, 600 positives. Contestants start where targets have been assigned: mmdetection's
loss_by_feat (bench.eager), the same under torch.compile, and gfl_loss. Each is checked against
float64 before it is timed, and they are timed in turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

import gfl_kernels
from bench import eager, machine
from bench.measure import Stopwatch, WrongResult, block, interleave, ratio

STRIDES = (8, 16, 32, 64, 128)
SIZE = (800, 1344)
BATCH, CLASSES, REG_MAX, POSITIVES = 2, 80, 16, 600
REQUIRED = {"eager": 12.0, "torch.compile": 5.0}


@dataclass
class Inputs:
    cls: list[Tensor]  # leaves
    box: list[Tensor]
    anchors: list[Tensor]  # [B, n, 4]
    labels: list[Tensor]
    weights: list[Tensor]
    targets: list[Tensor]
    avg_factor: int

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.cls, *self.box]


def make_inputs(
    channels_last: bool = False, size=SIZE, positives=POSITIVES, device: str = "cpu"
) -> Inputs:
    """Positives spread over the levels as their anchors are; boxes of every size that fits."""
    random = torch.Generator().manual_seed(20201)
    cells = [(-(-size[0] // s), -(-size[1] // s)) for s in STRIDES]
    counts = [h * w for h, w in cells]
    total = sum(counts)
    label = torch.full((BATCH * total,), CLASSES)
    chosen = torch.randperm(BATCH * total, generator=random)[:positives]
    label[chosen] = torch.randint(CLASSES, (positives,), generator=random)
    memory = torch.channels_last if channels_last else torch.contiguous_format

    def logits(channels, spread, mean):
        return [
            (torch.randn(BATCH, channels, *cell, generator=random) * spread + mean)
            .contiguous(memory_format=memory)
            .to(device)
            .requires_grad_()
            for cell in cells
        ]

    anchors, targets = [], []
    for (h, w), stride in zip(cells, STRIDES, strict=True):
        y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
        point = torch.stack([x, y], dim=-1).view(-1, 2) * stride
        half = torch.full_like(point, 4.0 * stride)
        anchors.append(torch.cat([point - half, point + half], dim=-1).expand(BATCH, -1, -1))
        sides = torch.rand(BATCH, h * w, 4, generator=random) * REG_MAX * stride
        targets.append(torch.cat([point - sides[..., :2], point + sides[..., 2:]], dim=-1))
    # As assigners leave them: views of one tensor for all levels.
    labels = list(label.view(BATCH, total).to(device).split(counts, dim=1))
    weights = list(torch.ones(BATCH, total, device=device).split(counts, dim=1))
    targets = list(torch.cat(targets, dim=1).to(device).split(counts, dim=1))
    return Inputs(
        cls=logits(CLASSES, 2, -3),
        box=logits(4 * (REG_MAX + 1), 2, 0),
        anchors=[level.to(device) for level in anchors],
        labels=labels,
        weights=weights,
        targets=targets,
        avg_factor=positives,
    )


def contestants(inputs: Inputs, compiled: bool = True) -> dict:
    """name -> function of the leaves that returns the sum of the three losses."""
    head = eager.Head(CLASSES, STRIDES, REG_MAX)
    points = [(level[0, :, :2] + level[0, :, 2:]) / 2 for level in inputs.anchors]
    levels = len(STRIDES)

    def theirs(*leaves):
        losses = head(leaves[:levels], leaves[levels:], inputs.anchors, inputs.labels,
                      inputs.weights, inputs.targets, inputs.avg_factor)  # fmt: skip
        return sum(map(sum, losses))

    def ours(*leaves):
        out = gfl_kernels.gfl_loss(leaves[:levels], leaves[levels:], points, inputs.labels,
                                   inputs.targets, label_weights=inputs.weights, strides=STRIDES,
                                   reg_max=REG_MAX)  # fmt: skip
        return out.loss_cls + out.loss_bbox + out.loss_dfl

    table = {"eager": theirs}
    if compiled:
        table["torch.compile"] = torch.compile(theirs, dynamic=False)
    table["gfl_kernels"] = ours
    return table


def check(inputs: Inputs, table: dict) -> None:
    """WrongResult for a contestant that is not within 1e-5 of float64."""
    with gfl_kernels.use_backend("reference"):
        wide = [leaf.detach().double().requires_grad_() for leaf in inputs.leaves]
        true = contestants(inputs, compiled=False)["gfl_kernels"](*wide)
        true_grads = torch.autograd.grad(true, wide)
    for name, contestant in table.items():
        loss = contestant(*inputs.leaves)
        grads = torch.autograd.grad(loss, inputs.leaves)
        found = [(loss.detach(), true.detach()), *zip(grads, true_grads, strict=True)]
        for i, (got, expected) in enumerate(found):
            error, size = (got.double() - expected).abs().max(), expected.abs().max()
            if not bool(error <= 1e-5 * size):
                raise WrongResult(f"{name}: result {i} is off by {error:.3g}, of {size:.3g}")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a contestant and round")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", help="force one of gfl_kernels' backends")
    options = parser.parse_args(arguments)
    gfl_kernels.use_backend(options.backend)
    inputs = make_inputs(options.channels_last, device=options.device)
    table = contestants(inputs, not options.no_compile)
    check(inputs, table)
    watch, threads = Stopwatch(options.device), torch.get_num_threads()

    def step(contestant):
        def run():
            for leaf in inputs.leaves:
                leaf.grad = None
            contestant(*inputs.leaves).backward()

        return run

    blocks = {
        name: block(step(contestant), watch, threads, options.seconds)
        for name, contestant in table.items()
    }
    samples = interleave(blocks, options.rounds)
    ours = samples["gfl_kernels"]
    for name, sample in samples.items():
        low, middle, high = ratio(sample, ours)
        asked = options.device == "cpu" and name in REQUIRED
        wanted = f", asked {REQUIRED[name]:g}" if asked else ""
        print(
            f"{name:<14}{statistics.median(sample.seconds) * 1e3:9.2f} ms  "
            f"{middle:6.2f}x ({low:.2f} to {high:.2f}){wanted}"
        )


if __name__ == "__main__":
    machine.fix_allocator("bench.head", sys.argv[1:])
    main(sys.argv[1:])
