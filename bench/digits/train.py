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
    targets: Targets | None  # None: the trained head assigns its own
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
class Training:
    """A training that is advanced step by step, so that several can take turns on one machine.

    Subclasses say what is trained: build(), outputs() and losses(); and what their clock measures.
    """

    name: str
    plan: Plan
    threads: int
    curve: list[float] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    clocked = "loss objects"
    learning_rate, epsilon = LEARNING_RATE, EPSILON

    def build(self) -> nn.Module:
        """The model; its initial weights follow from the seed, which has been set."""
        raise NotImplementedError

    def outputs(self, images: Tensor) -> list[Tensor]:
        """What the losses are functions of."""
        raise NotImplementedError

    def losses(self, outputs: list[Tensor], scene_numbers: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def __post_init__(self):
        torch.manual_seed(self.plan.seed)
        self.clock = Clock()
        self.model = self.build()
        # A fifth faster on a CPU than the default layout
        self.model.to(memory_format=torch.channels_last)
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
            lr=self.learning_rate,
            eps=self.epsilon,
            weight_decay=WEIGHT_DECAY,
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            max_lr=self.learning_rate,
            total_steps=self.plan.steps,
            pct_start=WARM_UP,
        )

    def step(self, scene_numbers: Tensor) -> float:
        """One optimiser step on the given scenes; returns the total loss."""
        torch.set_num_threads(self.threads)
        images = self.plan.scenes.images[scene_numbers]
        self.clock.objects = 0.0

        began = time.perf_counter()
        outputs = self.outputs(images)
        # The graph is cut at the head's outputs, so the loss has a backward of its own to time.
        leaves = [x.detach().requires_grad_() for x in outputs]
        loss_began = time.perf_counter()
        total = self.loss_stage(leaves, scene_numbers)
        loss_ended = time.perf_counter()
        torch.autograd.backward(outputs, [leaf.grad for leaf in leaves])
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        ended = time.perf_counter()

        self.seconds["step"].append(ended - began)
        self.seconds["loss stage"].append(loss_ended - loss_began)
        self.seconds[self.clocked].append(self.clock.objects)
        self.curve.append(total.item())
        return self.curve[-1]

    def loss_stage(self, leaves: list[Tensor], scene_numbers: Tensor) -> Tensor:
        """The total loss; its gradients are left in the leaves."""
        total = sum(self.losses(leaves, scene_numbers).values())
        total.backward()
        return total


@dataclass
class Run(Training):
    """Of bench's own detector, with these loss objects, each on the clock."""

    loss_objects: LossObjects = field(kw_only=True)
    in_double: bool = False

    def build(self) -> nn.Module:
        model = Detector(self.loss_objects, IMAGE_SIZE, NUM_CLASSES)
        for part in ("integral", "loss_cls", "loss_dfl"):
            inner = getattr(model.head, part)
            if self.in_double:
                inner = InDouble(inner)
            setattr(model.head, part, Clocked(inner, self.clock))
        return model

    def outputs(self, images: Tensor) -> list[Tensor]:
        return [x for kind in self.model(images) for x in kind]

    def losses(self, outputs: list[Tensor], scene_numbers: Tensor) -> dict[str, Tensor]:
        levels = len(outputs) // 2
        targets = self.plan.targets
        return self.model.head.loss(
            outputs[:levels],
            outputs[levels:],
            targets.labels[scene_numbers],
            targets.boxes[scene_numbers],
        )
