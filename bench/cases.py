"""The one list of what is timed, and of what the figures must reach.

N rows (anchors, or sides of boxes), C classes, K = reg_max + 1 bins, b bytes of a logit.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

FORWARD = "forward"
BACKWARD = "backward"
STEP = "forward+backward"
PASSES = (FORWARD, BACKWARD, STEP)

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True)
class Work:
    """Bytes an implementation cannot avoid moving, by pass; targets: bytes of a row's targets.

    The floor is one read of what is needed and one write of what is asked for. An implementation
    that writes the gradient in forward pays in that pass and finds its backward pass free.
    """

    targets: Callable[[int, int, int], int]
    forward: Callable[[int, int, int, int], int]
    backward: Callable[[int, int, int, int], int]
    step: Callable[[int, int, int, int], int]

    def bytes(self, which: str, n: int, c: int, b: int, weighted: bool) -> int:
        rows = n * (self.targets(n, c, b) + (4 if weighted else 0))
        formula = {FORWARD: self.forward, BACKWARD: self.backward, STEP: self.step}[which]
        return formula(n, c, b, rows)


def _loss(targets: Callable[[int, int, int], int]) -> Work:
    return Work(
        targets=targets,
        forward=lambda n, c, b, t: n * c * b + t,  # read logits and targets; the loss is a scalar
        backward=lambda n, c, b, t: 2 * n * c * b + t,  # read logits and targets, write gradient
        step=lambda n, c, b, t: 2 * n * c * b + t,  # the same: one pass can do both
    )


def _decode(classes: int) -> Work:
    """Of sides, four to an anchor with a point of 8 bytes and a box of 16, a score and a label."""

    def forward(n, c, b, t):
        return n * c * b + 6 * n + (n // 4 * (classes * b + 12) if classes else 0)

    return Work(
        targets=lambda n, c, b: 0,
        forward=forward,
        # The distributions a second time, and their gradient; only plain operations have one.
        backward=lambda n, c, b, t: 2 * n * c * b + 4 * n,
        step=lambda n, c, b, t: forward(n, c, b, t) + 2 * n * c * b + 4 * n,
    )


def _summary(values: int) -> Work:
    """values: of float32, for each distribution."""
    return Work(
        targets=lambda n, c, b: 0,
        forward=lambda n, c, b, t: n * c * b + 4 * values * n,
        # The upstream gradient comes only after forward: the logits are read a second time.
        backward=lambda n, c, b, t: 2 * n * c * b + 4 * values * n,
        step=lambda n, c, b, t: 3 * n * c * b + 8 * values * n,
    )


# What comes of each distribution by itself: no targets, no weights, results per row.
SUMMARIES = ("integral", "peak", "statistics", "moments")

WORK = {
    ("qfl", "sparse"): _loss(lambda n, c, b: 8 + b),  # int64 label, score in the logits' dtype
    ("qfl", "dense"): _loss(lambda n, c, b: c * b),
    ("qfl", "probability"): _loss(lambda n, c, b: 8 + b),
    ("vfl", "dense"): _loss(lambda n, c, b: c * b),
    ("vfl", "sparse"): _loss(lambda n, c, b: 8 + b),
    ("focal", "dense"): _loss(lambda n, c, b: c * b),
    ("focal", "sparse"): _loss(lambda n, c, b: 8),
    ("mal", "sparse"): _loss(lambda n, c, b: 8 + b),
    ("ia_bce", "sparse"): _loss(lambda n, c, b: 8 + b),
    ("psl", "dense"): _loss(lambda n, c, b: c * b),
    ("bce", "dense"): _loss(lambda n, c, b: c * b),
    ("dfl", ""): _loss(lambda n, c, b: 4),  # float32 also with half logits
    ("fgl", ""): _loss(lambda n, c, b: 16),  # int64 left bin and two float32 weights
    ("integral", ""): _summary(1),  # the mean bin
    ("peak", ""): _summary(1),
    ("statistics", ""): _summary(5),  # four probabilities and their mean
    ("moments", ""): _summary(3),
    ("ld", ""): _loss(lambda n, c, b: c * b),  # the teacher's logits
    ("decode", ""): _decode(0),
    ("decode", "scored"): _decode(80),
}


@dataclass(frozen=True)
class Case:
    """One op on one shape. shape: (N, C or K), or (B, C, H, W) as a convolution leaves it."""

    op: str
    form: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    note: str = ""
    passes: tuple[str, ...] = (STEP,)
    # mmdetection's heads pass row weights and an avg_factor: so do all cases that do not say not.
    weighted: bool = True
    quick: bool = False

    @property
    def rows(self) -> int:
        return self.shape[0] * self.shape[2] * self.shape[3] if self.nchw else self.shape[0]

    @property
    def width(self) -> int:
        return self.shape[1]

    @property
    def nchw(self) -> bool:
        return len(self.shape) == 4

    @property
    def forward_only(self) -> bool:
        """What has no gradient."""
        return self.passes == (FORWARD,)

    @property
    def layout(self) -> str:
        return "NCHW" if self.nchw else "rows"

    @property
    def name(self) -> str:
        words = [self.op, self.form, "x".join(map(str, self.shape)), self.dtype]
        return " ".join(filter(None, words)) + ("" if self.weighted else " plain")

    @property
    def logit_bytes(self) -> int:
        return self.rows * self.width * ITEM_BYTES[self.dtype]

    def bytes(self, which: str) -> int:
        """Bytes the pass has to move at least."""
        work = WORK[self.op, self.form]
        weighted = self.weighted and self.op not in (*SUMMARIES, "decode")
        return work.bytes(which, self.rows, self.width, ITEM_BYTES[self.dtype], weighted)


COCO = 44800  # cells of two 1344x800 images at strides 8 to 128
COCO_LARGE = 134400  # of six images
LVIS = 8400  # of one 640x640 image at strides 8 to 32
SIDES = 179200  # the four sides of 44800 boxes
FEW_SIDES = 2400  # the four sides of 600 positives

QFL_SPARSE = Case("qfl", "sparse", (COCO, 80), note="COCO", passes=PASSES, quick=True)
QFL_DENSE = Case("qfl", "dense", (COCO_LARGE, 80), note="COCO", passes=PASSES, quick=True)
DFL_LARGE = Case("dfl", "", (SIDES, 17), passes=PASSES, quick=True)
DFL_SMALL = Case("dfl", "", (FEW_SIDES, 17), passes=PASSES, quick=True)
INTEGRAL = Case("integral", "", (SIDES, 17), passes=PASSES, quick=True)
PEAK = Case("peak", "", (SIDES, 17), passes=PASSES)
STATISTICS = Case("statistics", "", (SIDES, 17), note="GFLv2", passes=PASSES)
MOMENTS = Case("moments", "", (SIDES, 17), passes=PASSES)
# The rest of the quality family, as hosts call it: without row weights.
VFL = Case("vfl", "dense", (COCO, 80), note="VFNet, PicoDet", weighted=False, quick=True)
FOCAL = Case("focal", "dense", (COCO, 80), note="torchvision", weighted=False, quick=True)
MAL = Case("mal", "sparse", (COCO, 80), note="DEIM", weighted=False, quick=True)
IA_BCE = Case("ia_bce", "sparse", (COCO, 80), note="RF-DETR", weighted=False, quick=True)
PSL = Case("psl", "dense", (COCO, 80), note="Stable-DINO", weighted=False, quick=True)
BCE = Case("bce", "dense", (COCO, 80), note="task-aligned heads", weighted=False, quick=True)
DECODE = Case("decode", "", (SIDES, 17), note="boxes, clipped", passes=(FORWARD,))
DECODE_SCORED = Case(
    "decode", "scored", (SIDES, 17), note="and the best of 80 classes", passes=(FORWARD,)
)
TINY = Case("qfl", "sparse", (64, 80), note="one call", weighted=False, passes=PASSES, quick=True)

CASES = (
    QFL_SPARSE,
    Case("qfl", "sparse", (COCO_LARGE, 80), note="COCO"),
    Case("qfl", "dense", (COCO, 80), note="COCO"),
    QFL_DENSE,
    Case("qfl", "probability", (COCO, 80), note="COCO, GFLv2's joint score"),
    Case("qfl", "sparse", (2, 80, 100, 168), note="NCHW, stride 8"),
    Case("qfl", "sparse", (LVIS, 1203), note="LVIS"),
    Case("qfl", "sparse", (COCO_LARGE, 1), note="one class"),
    TINY,
    Case("qfl", "sparse", (64, 80), note="one call, weighted"),
    Case("qfl", "sparse", (COCO, 80), "bfloat16", "COCO"),
    Case("qfl", "sparse", (COCO, 80), "float16", "COCO"),
    Case("qfl", "dense", (COCO_LARGE, 80), "bfloat16", "COCO"),
    Case("qfl", "dense", (COCO_LARGE, 80), "float16", "COCO"),
    VFL,
    Case("vfl", "sparse", (COCO, 80), note="RT-DETR, D-FINE", weighted=False),
    FOCAL,
    Case("focal", "sparse", (COCO, 80), note="labels", weighted=False),
    MAL,
    IA_BCE,
    PSL,
    BCE,
    DFL_LARGE,
    Case("dfl", "", (SIDES, 16)),
    Case("dfl", "", (SIDES, 8)),
    Case("dfl", "", (SIDES, 33)),
    Case("dfl", "", (SIDES, 17), "bfloat16"),
    Case("dfl", "", (SIDES, 17), "float16"),
    DFL_SMALL,
    Case("dfl", "", (FEW_SIDES, 16)),
    Case("dfl", "", (FEW_SIDES, 8)),
    Case("dfl", "", (FEW_SIDES, 33)),
    Case("fgl", "", (SIDES, 33), note="D-FINE"),
    INTEGRAL,
    Case("integral", "", (SIDES, 17), "bfloat16"),
    Case("integral", "", (SIDES, 17), "float16"),
    PEAK,
    STATISTICS,
    MOMENTS,
    Case("ld", "", (SIDES, 17), passes=PASSES),
    DECODE,
    DECODE_SCORED,
    Case("decode", "scored", (SIDES, 17), "bfloat16", passes=(FORWARD,)),
)

# Instruction sets and denormals are compared on these, forward + backward.
ISA_CASES = (QFL_SPARSE, QFL_DENSE, DFL_LARGE, DFL_SMALL, INTEGRAL)
ISA_QUICK = (QFL_SPARSE, DFL_LARGE)
DENORMAL_CASES = (QFL_SPARSE, QFL_DENSE, DFL_LARGE)
DENORMAL_QUICK = (QFL_SPARSE,)
DENORMAL_LOGITS = (-33.0, -95.0)


@dataclass(frozen=True)
class Requirement:
    """A figure to reach. kind says where report.py finds it; at_least: larger is better."""

    label: str
    kind: str  # "eager", "compile": speed-up; "sum": time ratio; "isa", "denormal", "memory"
    case: Case | None
    required: float
    hoped: float | None
    at_least: bool


def _speedups(
    label: str,
    case: Case,
    eager: tuple[float, float],
    compiled: tuple[float, float],
) -> list[Requirement]:
    return [
        Requirement(f"{label} against eager", "eager", case, *eager, at_least=True),
        Requirement(f"{label} against torch.compile", "compile", case, *compiled, at_least=True),
    ]


REQUIREMENTS = (
    *_speedups("QFL 44800 x 80 sparse", QFL_SPARSE, (14, 20), (5.5, 8)),
    *_speedups("QFL 134400 x 80 dense", QFL_DENSE, (14, 20), (5, 6.5)),
    Requirement("VFL 44800 x 80 dense against eager", "eager", VFL, 10, None, True),
    Requirement("Focal Loss 44800 x 80 dense against eager", "eager", FOCAL, 10, None, True),
    Requirement("MAL 44800 x 80 sparse against eager", "eager", MAL, 10, None, True),
    Requirement("IA-BCE 44800 x 80 sparse against eager", "eager", IA_BCE, 10, None, True),
    Requirement("Position-supervised 44800 x 80 dense against eager", "eager", PSL, 10, None, True),
    Requirement("BCE 44800 x 80 dense against eager", "eager", BCE, 10, None, True),
    *_speedups("DFL 179200 x 17", DFL_LARGE, (13, 18), (5, 7.5)),
    *_speedups("DFL 2400 x 17", DFL_SMALL, (5, 8), (5, 6.5)),
    *_speedups("Integral 179200 x 17", INTEGRAL, (4.5, 6), (3.5, 4.5)),
    Requirement("One call on 64 x 80 / x.sum().backward()", "sum", TINY, 1.8, 1.3, False),
    Requirement("AVX2 build, share of the AVX-512 speed", "isa", None, 0.6, None, True),
    Requirement("Denormal logits / ordinary ones, time", "denormal", None, 1.5, None, False),
    # 1 % above one tensor of logits, for the loss itself and a value or two a row.
    Requirement("Saved for backward / size of the logits", "memory", None, 1.01, None, False),
)


def select(pattern: str | None, quick: bool) -> list[Case]:
    """The cases of a run: those of --quick, or all; then those whose name matches the pattern."""
    cases = [case for case in CASES if case.quick or not quick]
    return [case for case in cases if pattern is None or re.search(pattern, case.name)]
