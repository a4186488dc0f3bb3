"""One training: model, optimiser, loss objects, and a clock round the parts of a step."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bench.digits.assign import Targets
from bench.digits.detector import Detector, LossObjects
from bench.digits.scenes import IMAGE_SIZE, NUM_CLASSES, Scenes

# Two trainings are to be compared, so this one is kept from amplifying rounding: smooth activations
# (with ReLU two runs parted by percents within 40 steps) and an epsilon above rounding
# noise (Adam divides by the gradient's size, and would turn noise in tiny ones into full steps).
LEARNING_RATE = 2e-3
EPSILON = 1e-4
WEIGHT_DECAY = 0.05
WARM_UP = 0.15


class Clock:
    """Seconds spent in the loss objects during the current step."""

    def __init__(self):
        self.objects = 0.0
        self._since = 0.0

    def start(self, _=None) -> None:
        self._since = time.perf_counter()

    def stop(self, _=None) -> None:
        self.objects += time.perf_counter() - self._since


class Clocked(nn.Module):
    """A loss object with its forward and its own backward on a clock.

    The backward runs from the hook on the object's output to the hook on a view of its input.
    The view's node is made right before the object's own, and the engine takes the latest node
    first, so nothing else runs between the two hooks.
    """

    def __init__(self, inner: nn.Module, clock: Clock):
        super().__init__()
        self.inner, self.clock = inner, clock

    def forward(self, pred: Tensor, *args, **kwargs) -> Tensor:
        if not pred.requires_grad:
            return self.inner(pred, *args, **kwargs)
        pred = pred.view_as(pred)
        pred.register_hook(self.clock.stop)
        self.clock.start()
        out = self.inner(pred, *args, **kwargs)
        self.clock.stop()
        out.register_hook(self.clock.start)
        return out


class InDouble(nn.Module):
    """A loss object computed in float64 and rounded once: the same loss, differently rounded."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner.double()

    def forward(self, pred: Tensor, *args, **kwargs) -> Tensor:
        return self.inner(pred.double(), *args, **kwargs).to(pred.dtype)


@dataclass
class Plan:
    """What every training of one comparison shares."""

    scenes: Scenes
    targets: Targets
    steps: int
    batch_size: int
    seed: int

    def order(self) -> Tensor:
        """Scene numbers [steps, batch_size]: shuffled passes over all scenes, end to end."""
        generator = torch.Generator().manual_seed(self.seed)
        needed = self.steps * self.batch_size
        passes = [
            torch.randperm(len(self.scenes), generator=generator)
            for _ in range(-(-needed // len(self.scenes)))
        ]
        return torch.cat(passes)[:needed].view(self.steps, self.batch_size)


@dataclass
class Run:
    """A training that is advanced step by step, so that several can take turns on one machine."""

    name: str
    plan: Plan
    losses: LossObjects
    threads: int
    in_double: bool = False
    curve: list[float] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self):
        torch.manual_seed(self.plan.seed)
        self.model = Detector(self.losses, IMAGE_SIZE, NUM_CLASSES)
        # A fifth faster on a CPU than the default layout
        self.model.to(memory_format=torch.channels_last)
        self.clock = Clock()
        head = self.model.head
        for part in ("integral", "loss_cls", "loss_dfl"):
            inner = getattr(head, part)
            if self.in_double:
                inner = InDouble(inner)
            setattr(head, part, Clocked(inner, self.clock))
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
            lr=LEARNING_RATE,
            eps=EPSILON,
            weight_decay=WEIGHT_DECAY,
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            max_lr=LEARNING_RATE,
            total_steps=self.plan.steps,
            pct_start=WARM_UP,
        )

    def step(self, scene_numbers: Tensor) -> float:
        """One optimiser step on the given scenes; returns the total loss."""
        torch.set_num_threads(self.threads)
        images = self.plan.scenes.images[scene_numbers]
        labels = self.plan.targets.labels[scene_numbers]
        boxes = self.plan.targets.boxes[scene_numbers]
        self.clock.objects = 0.0

        began = time.perf_counter()
        outputs = [x for kind in self.model(images) for x in kind]
        # The graph is cut at the head's outputs, so the loss has a backward of its own to time.
        leaves = [x.detach().requires_grad_() for x in outputs]
        levels = len(leaves) // 2
        loss_began = time.perf_counter()
        parts = self.model.head.loss(leaves[:levels], leaves[levels:], labels, boxes)
        total = sum(parts.values())
        total.backward()
        loss_ended = time.perf_counter()
        torch.autograd.backward(outputs, [leaf.grad for leaf in leaves])
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        ended = time.perf_counter()

        self.seconds["step"].append(ended - began)
        self.seconds["loss stage"].append(loss_ended - loss_began)
        self.seconds["loss objects"].append(self.clock.objects)
        self.curve.append(total.item())
        return self.curve[-1]
