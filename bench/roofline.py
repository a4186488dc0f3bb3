"""What the compiled GPU kernels do, counted without a GPU: no figure here is a timing.

    python -m bench.roofline                     sm_90 and gfx942; five targets for the main cases
    python -m bench.roofline --full              five targets for all, and more cases: a long run
    python -m bench.roofline --quick             sm_90 and gfx942, the main cases
    python -m bench.roofline --only 'dfl.*x17'   cases whose name matches (--list shows the names)
    python -m bench.roofline --check             exit status 1 if a requirement is missed

Writes roofline.json and roofline.png. Triton's kernels are compiled by Triton itself for sm_80,
sm_90, sm_100, gfx942 and gfx90a, those in CUDA C++ by nvcc for the first three (left out without an
nvcc or without the library, which computes their launches). What is compiled for NVIDIA then runs
in ptxsim, on full-sized inputs:

- registers, spills and static counts are those of the binary;
- DRAM bytes are 32 x the distinct sectors that a launch touches (an infinite cache), next to the
  bytes of inputs once and outputs once; sectors per request are those of a warp's access;
- instructions per logit are warp instructions x 32 / logits, so idle lanes and the padding of rows
  count; bench.sass says how SASS is counted. For AMD there is no simulator: static counts only;
- the bound is ptxsim's roofline: the largest of the terms dram, l2 (no L1 is modelled), issue, fma,
  alu, xu, fp64, lsu, each with perfect overlap on a full GPU. Its issue term is replaced by the
  executed SASS instructions; those of the pipes are PTX counts.

A row is a pass of a backend. Where that is several launches (two for a whole head; a loss of the
CUDA C++ kernels that is a sum is finished by one more, in one block) the counts are of all, and the
bound is the sum of theirs; launch_over_dram is of the first alone, and by_launch has each. In the
DRAM bytes of a pass the cache lasts from launch to launch, in the bounds it does not.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from bench import roofline_head
from bench.cases import BACKWARD, FORWARD, ITEM_BYTES, STEP, SUMMARIES, Case
from bench.roofline_head import HeadCase

LOSS_GRADIENT = "loss+gradient"  # both from one launch, for an upstream gradient of 1
TRITON, CUDA = BACKENDS = ("triton", "cuda")
GPUS = {80: "a100", 90: "h100", 100: "b200"}
AMD = ("gfx942", "gfx90a")
LARGE = 256_000  # logits from which bytes are judged: below, partial sums and counters show
Row = dict

ANCHORS = 16800  # cells of two 640x640 images at strides 8 to 32
SIDES = 4 * ANCHORS


_BOTH = (FORWARD, BACKWARD)
_ALL = (*_BOTH, LOSS_GRADIENT)


def _qfl(form: str, shape: tuple[int, ...], dtype: str = "float32", passes=_BOTH, **rest) -> Case:
    return Case("qfl", form, shape, dtype, passes=passes, **{"weighted": False} | rest)


def _head(dtype: str = "float32", size=(400, 672), **rest) -> HeadCase:
    note = "gfl_loss" if size == (800, 1344) else "gfl_loss, a quarter of 2x80x800x1344"
    return HeadCase("head", "", (2, 80, *size), dtype, note, _BOTH, weighted=False, **rest)


def _bins(op: str, bins: int, dtype: str = "float32", passes=_BOTH, **rest) -> Case:
    return Case(op, "", (SIDES, bins), dtype, passes=passes, **{"weighted": False} | rest)


def _family(op: str, form: str, dtype: str = "float32", shape=(ANCHORS, 80), note="") -> Case:
    return Case(op, form, shape, dtype, note, _BOTH, weighted=False)


def _boxes(form: str, dtype: str = "float32") -> Case:
    note = "and the best of 80 classes" if form else "mean boxes, clipped"
    return Case("decode", form, (SIDES, 17), dtype, note, (FORWARD,), weighted=False)


NCHW = (2, 80, 100, 168)
QFL = _qfl("sparse", (ANCHORS, 80), passes=_ALL, quick=True)
QFL_DENSE = _qfl("dense", (ANCHORS, 80), passes=_ALL)
QFL_HALF = _qfl("sparse", (ANCHORS, 80), "bfloat16", _ALL, quick=True)
QFL_FLOAT16 = _qfl("sparse", (ANCHORS, 80), "float16", _ALL)
DFL = _bins("dfl", 17, passes=_ALL, quick=True)
HEAD = _head(quick=True)
# The rest of the quality family, and what else there is of distributions: op, form.
FAMILY = (
    ("vfl", "dense"),
    ("vfl", "sparse"),
    ("focal", "dense"),
    ("focal", "sparse"),
    ("mal", "sparse"),
    ("ia_bce", "sparse"),
    ("psl", "dense"),
    ("bce", "dense"),
)
SIDE_OPS = ("peak", "statistics", "moments", "ld")
REST = (*SIDE_OPS, "decode", *(op for op, _ in FAMILY))
# Of the rest a default run takes one target of NVIDIA and one of AMD.
EVERY_TARGET = (QFL, QFL_HALF, DFL)
CASES = (
    QFL,
    _qfl("sparse", (ANCHORS, 80), passes=_ALL, weighted=True),
    QFL_HALF,
    QFL_FLOAT16,
    QFL_DENSE,
    _qfl("dense", (ANCHORS, 80), "bfloat16"),
    _qfl("sparse", NCHW, note="stride 8"),
    _qfl("sparse", NCHW, "bfloat16", note="stride 8"),
    _qfl("probability", (ANCHORS, 80), note="GFLv2's joint score"),
    _qfl("sparse", (4800, 1203), note="LVIS"),
    _qfl("sparse", (16 * ANCHORS, 1), note="one class"),
    DFL,
    _bins("dfl", 17, weighted=True),
    _bins("dfl", 17, "bfloat16", _ALL, quick=True),
    _bins("dfl", 16, passes=_ALL),
    _bins("dfl", 8, passes=_ALL),
    _bins("dfl", 33),
    _bins("fgl", 33, note="D-FINE"),
    _bins("integral", 17),
    *(_family(*loss) for loss in FAMILY),
    *(_bins(op, 17) for op in SIDE_OPS),
    *(_boxes(form) for form in ("", "scored")),
    HEAD,
    _head("bfloat16"),
    _head(channels_last=True),
)
FULL_CASES = (
    *CASES,
    *(_family(*loss, "bfloat16") for loss in FAMILY),
    *(_bins(op, 17, "bfloat16") for op in SIDE_OPS),
    *(_boxes(form, "bfloat16") for form in ("", "scored")),
    _family("vfl", "sparse", shape=NCHW, note="stride 8"),
    _qfl("dense", (ANCHORS, 80), "float16"),
    _qfl("sparse", NCHW, "float16", note="stride 8"),
    _qfl("probability", (ANCHORS, 80), "bfloat16", note="GFLv2's joint score"),
    _qfl("probability", (ANCHORS, 80), "float16", note="GFLv2's joint score"),
    _qfl("sparse", (4800, 1203), "bfloat16", note="LVIS"),
    _qfl("sparse", (16 * ANCHORS, 1), "bfloat16", note="one class"),
    _bins("dfl", 17, "float16", _ALL),
    _bins("dfl", 16, "bfloat16", _ALL),
    _bins("dfl", 8, "bfloat16", _ALL),
    _bins("dfl", 33, "bfloat16"),
    _bins("integral", 17, "bfloat16"),
    _bins("integral", 17, "float16"),
    _head("bfloat16", channels_last=True),
    _head(size=(800, 1344)),
)
SMALL = (  # what eager and the kernels launch does not depend on the size
    Case("qfl", "sparse", (64, 80)),
    Case("qfl", "dense", (64, 80)),
    Case("qfl", "probability", (64, 80)),
    Case("dfl", "", (64, 17)),
    Case("integral", "", (64, 17)),
    HeadCase("head", "", (2, 80, 64, 96), weighted=False),
)


# ---- measurement ----


def missing() -> str | None:
    """What this machine lacks for any of it; None if nothing."""
    try:
        from triton import knobs

        from bench import sass
    except ImportError as error:
        return str(error)
    if knobs.runtime.interpret:
        return "TRITON_INTERPRET is set: nothing is compiled"
    try:
        for name in ("nvdisasm", "cuobjdump"):
            sass.tool(name)
    except sass.ptxsim.PtxSimError as error:
        return str(error)
    return None


def cuda_missing() -> str | None:
    """Why there are no rows of the CUDA C++ kernels; None if there are."""
    from bench import sass

    return sass.cuda_device.why_not()


def make_inputs(case: Case):
    from bench import contestants

    return (roofline_head if case.op == "head" else contestants).make_inputs(case)


def minimum_bytes(case: Case, which: str, inputs) -> int:
    if case.op == "head":
        return roofline_head.minimum_bytes(case, inputs, which)
    return case.bytes(STEP if which == LOSS_GRADIENT else which)


def counted(case: Case, which: str, inputs, kernels, device) -> None:
    """Leaves the reports of a pass's launches on the device, and of no others."""
    assessed = None
    if case.op == "head" and which == BACKWARD:
        assessed = roofline_head.assess(inputs, kernels)
    device.reports.clear()
    if case.op == "head":
        roofline_head.launch(which, inputs, kernels, assessed)
    else:
        launch(case, which, inputs, kernels)


def launch(case: Case, which: str, inputs, kernels):
    """The case's pass, straight through the launchers of a backend, whose ops `kernels` has."""
    import torch

    pred = inputs.logits.detach()
    if case.op == "decode":
        from bench.contestants import IMAGE, STRIDE

        points, cls = (*inputs.target, None)[:2]
        pred = pred.view(case.rows // 4, -1)
        return kernels.decode_boxes(
            pred, points, None, None, cls, None, STRIDE, list(IMAGE), -1, False
        )
    family, arguments = operation(case, inputs)
    pred = pred.movedim(1, -1) if case.nchw else pred.view(case.rows, case.width)
    if which == BACKWARD:
        upstream = torch.ones(())
        if case.op in SUMMARIES:
            values = inputs.upstream.shape[2:]
            upstream = inputs.upstream.view(case.rows, *values)
        return getattr(kernels, f"{family}_backward")(upstream, pred, *arguments)
    if case.op not in SUMMARIES:
        arguments = (*arguments, which == LOSS_GRADIENT)
    return getattr(kernels, f"{family}_forward")(pred, *arguments)


def operation(case: Case, inputs) -> tuple[str, tuple]:
    """The family of the ops of a case, and what they take besides logits."""
    import torch

    from gfl_kernels import reference
    from gfl_kernels.triton.launch import SUM

    summaries = {  # as the public functions call them
        "integral": ("integral", (None,)),
        "peak": ("integral", (None, 2)),
        "statistics": ("statistics", (4, True)),
        "moments": ("moments", (None,)),
    }
    if case.op in summaries:
        return summaries[case.op]
    if case.op in ("dfl", "fgl"):
        target = inputs.target if isinstance(inputs.target, tuple) else (inputs.target, None, None)
        return "distribution", (*target, inputs.weight, None, 1.0, SUM)
    if case.op == "ld":
        return "distillation", (inputs.target, inputs.weight, None, 10.0, 1.0, SUM)
    rules = {  # of the op: form, flags, alpha, beta
        ("qfl", "probability"): (reference.PROBABILITIES, 0, 0.0, 2.0),
        ("vfl", "dense"): (reference.VARIFOCAL, 0, 0.75, 2.0),
        ("vfl", "sparse"): (reference.VARIFOCAL, reference.DETACH_WEIGHT, 0.2, 2.0),
        ("focal", "dense"): (reference.FOCAL, 0, 0.25, 2.0),
        ("focal", "sparse"): (reference.FOCAL, 0, 0.25, 2.0),
        ("mal", "sparse"): (reference.MATCHABILITY, 0, 1.0, 1.5),
        ("ia_bce", "sparse"): (reference.IOU_AWARE, 0, 0.25, 2.0),
        ("psl", "dense"): (reference.BALANCED, 0, 0.25, 2.0),
        ("bce", "dense"): (reference.LOGITS, 0, 0.0, 0.0),
    }
    rule = rules.get((case.op, case.form), (reference.LOGITS, 0, 0.0, 2.0))
    target = inputs.target
    if (case.op, case.form) == ("focal", "sparse"):
        target = target, torch.ones(()).expand(target.shape)
    target = target if isinstance(target, tuple) else (target, None)
    return "quality", (*target, inputs.weight, None, *rule, 1.0, SUM)


def measure(
    case: Case, which: str, backend: str, archs: tuple[int, ...], amd: tuple[str, ...]
) -> list[Row]:
    """A row per target."""
    inputs = make_inputs(case)
    run = {TRITON: measure_triton, CUDA: measure_cuda}[backend]
    return [_about(case, which, backend) | row for row in run(case, which, inputs, archs, amd)]


def measure_triton(case: Case, which: str, inputs, archs, amd) -> list[Row]:
    from bench import sass
    from gfl_kernels import triton as kernels

    rows = []
    for arch in archs:
        with sass.CountingDevice(arch) as device:
            counted(case, which, inputs, kernels, device)
        rows += nvidia_rows(case, which, arch, device.reports, inputs)
    compiled = [(report.source, report.num_warps) for report in device.reports]
    return rows + [amd_row(compiled, target) for target in amd]


def measure_cuda(case: Case, which: str, inputs, archs, amd) -> list[Row]:
    """There are none for AMD."""
    from bench import sass

    rows = []
    for arch in archs:
        device = sass.CountingCuda(arch)
        counted(case, which, inputs, device, device)
        rows += nvidia_rows(case, which, arch, device.reports, inputs)
    return rows


def _about(case: Case, which: str, backend: str) -> Row:
    return {
        "backend": backend,
        "case": case.name,
        "op": case.op,
        "form": case.form,
        "shape": "x".join(map(str, case.shape)),
        "dtype": case.dtype,
        "layout": case.layout,
        "weighted": case.weighted,
        "pass": which,
        "logits": case.rows * case.width,
    }


def rows_aligned(case: Case) -> bool:
    """Whether the runs of neighbouring logits, rows or planes, are multiples of 16 bytes."""
    if case.op == "head":
        return False  # planes of small levels are not, nor are the positives'
    run = case.shape[2] * case.shape[3] if case.nchw else case.width
    if case.width == 1:
        run = case.rows
    return run * ITEM_BYTES[case.dtype] % 16 == 0


def nvidia_rows(case: Case, which: str, arch: int, reports, inputs) -> list[Row]:
    """The row, or none where ptxas has copied code whose executions cannot be told apart."""
    from bench import sass

    try:
        return [nvidia_row(case, which, arch, reports, inputs)]
    except sass.Undetermined as error:
        print(f"{case.name}, {which}, sm_{arch} has no row: {error}", file=sys.stderr)
        return []


def nvidia_row(case: Case, which: str, arch: int, reports, inputs) -> Row:
    """reports: of the pass's launches."""
    from ptxsim.report import GPUS as SPECIFICATIONS

    from bench import sass

    first = reports[0]
    infos, executed = [report.cubin_info() for report in reports], sass.executed(*reports)
    lanes = 32 / (case.rows * case.width)
    moved = Counter()
    for traffic in (traffic for report in reports for traffic in report.allocations):
        # Views of one memory are one; a head's levels are cls.0, grad.1, ...
        if {"pred", "cls", "box", "grad"} & {name.split(".")[0] for name in names_of(traffic)}:
            moved.update(traffic.read_widths)
            moved.update(traffic.written_widths)
    minimum, dram = minimum_bytes(case, which, inputs), dram_bytes(reports)
    bounds = [terms(report, GPUS[arch]) for report in reports]
    bound = sum(max(of_launch.values()) for of_launch in bounds)
    totals = {term: sum(of_launch[term] for of_launch in bounds) for term in bounds[0]}
    return {
        "target": f"sm_{arch}",
        "gpu": GPUS[arch],
        "launches": len(reports),
        "blocks": first.grid[0],
        "warps": first.warps // first.grid[0],
        "registers": max(info.registers for info in infos),
        "spills": sum(info.spills for info in infos),
        "static_instructions": infos[0].instructions,
        "static_loads_by_width": infos[0].loads,
        "static_stores_by_width": infos[0].stores,
        "sass_per_logit": executed.instructions * lanes,
        "ptx_per_logit": sum(report.warp_instructions for report in reports) * lanes,
        "agreement": executed.agreement,
        "by_opcode": _shares(executed.by_opcode, lanes),
        "by_source": _shares(executed.by_source, lanes),
        "rows_aligned": rows_aligned(case),
        "logit_bytes_by_width": dict(sorted(moved.items())),
        "wide_share": sum(n for width, n in moved.items() if width >= 16) / moved.total(),
        "dram_bytes": dram,
        "minimum_bytes": minimum,
        "dram_ratio": dram / minimum,
        "load_sectors_per_request": _sectors_per_request(r.global_load for r in reports),
        "store_sectors_per_request": _sectors_per_request(r.global_store for r in reports),
        "dram_gbs": SPECIFICATIONS[GPUS[arch]].dram_gbs,
        "terms_us": totals,
        "bound_us": bound,
        "bound_by": max(totals, key=totals.get),
        "over_dram": bound / totals["dram"],
        "launch_over_dram": max(bounds[0].values()) / bounds[0]["dram"],
        "by_launch": [
            {
                "kernel": report.kernel,
                "registers": info.registers,
                "spills": info.spills,
                "sass_per_logit": sass.executed(report).instructions * lanes,
                "bound_us": max(of_launch.values()),
                "bound_by": max(of_launch, key=of_launch.get),
            }
            for report, info, of_launch in zip(reports, infos, bounds, strict=True)
        ],
    }


def names_of(traffic) -> set[str]:
    return set(traffic.name.split("+"))


def dram_bytes(reports) -> int:
    """Read and written by a pass, its launches sharing one infinite cache. Of what two launches
    read the larger part counts: in all of ours it holds the smaller.
    """
    read: dict[tuple[str, int], int] = {}
    written: dict[tuple[str, int], int] = {}
    for report in reports:
        before = {name for names, _ in written for name in names.split("+")}
        for traffic in report.allocations:
            # A kernel's grad may be another array than the next one's.
            key = traffic.name, traffic.size
            if not names_of(traffic) & before:
                read[key] = max(read.get(key, 0), traffic.read_unique)
            if traffic.written_unique:
                written[key] = max(written.get(key, 0), traffic.written_unique)
    return sum(read.values()) + sum(written.values())


def _sectors_per_request(stats) -> float:
    stats = list(stats)
    return sum(s.sectors for s in stats) / max(1, sum(s.requests for s in stats))


def _shares(counts: Counter[str], lanes: float) -> dict[str, float]:
    """Per logit, what matters of it."""
    return {name: n * lanes for name, n in counts.most_common() if n * lanes >= 0.01}


def terms(report, gpu: str) -> dict[str, float]:
    """Microseconds of a launch by term. An SM issues 4 warp instructions a clock."""
    from ptxsim.report import GPUS as SPECIFICATIONS

    from bench import sass

    known = SPECIFICATIONS[gpu]
    sms = min(known.sms, report.grid[0])
    issue = sass.executed(report).instructions / (4 * known.clock_ghz * 1e3 * sms)
    return report.roofline(gpu).terms | {"issue": issue}


def amd_row(compiled: list[tuple], target: str) -> Row:
    """The kernels (source, warps) that Triton compiled for NVIDIA as they are on AMD: registers of
    the one that has most, the rest of all.
    """
    found = [amd_kernel(source, warps, target) for source, warps in compiled]
    most = ("vgprs", "sgprs")
    totals = {key: (max if key in most else sum)(facts[key] for facts in found) for key in found[0]}
    return {"target": target, **totals}


def amd_kernel(source, warps: int, target: str) -> dict[str, int]:
    """The same types and alignments."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = source.fn
    fast = (function.arg_names.index("FAST"),)
    portable = ASTSource(function, source.signature, source.constants | {fast: False}, source.attrs)
    compiled = triton.compile(
        portable, target=GPUTarget("hip", target, 64), options={"num_warps": warps}
    )
    text = compiled.asm["amdgcn"]
    facts = {
        "vgprs": "vgpr_count",
        "vgpr_spills": "vgpr_spill_count",
        "sgprs": "sgpr_count",
        "sgpr_spills": "sgpr_spill_count",  # into lanes of a VGPR, not into memory
        "scratch_bytes": "private_segment_fixed_size",
    }
    found = {key: int(re.search(rf"\.{name}: *(\d+)", text)[1]) for key, name in facts.items()}
    opcodes = re.findall(r"^\s+((?:v|s|global|ds|buffer|scratch|flat)_\w+)", text, re.M)
    real = [op for op in opcodes if op not in ("s_nop", "s_code_end")]
    return found | {"static_instructions": len(real)}


def operations(call: Callable[[], object]) -> int:
    """ATen operations that compute: neither views, nor allocations."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            allocates = function.__name__.partition(".")[0].removeprefix("new_").startswith("empty")
            if function.namespace == "aten" and not function.is_view and not allocates:
                self.count += 1
            return function(*args, **(kwargs or {}))

    with Counting() as mode:
        call()
    return mode.count


def launches(case: Case, backends: tuple[str, ...] = BACKENDS) -> Row:
    """Forward + backward: eager's operations against kernels and operations of ours."""
    import gfl_kernels
    from bench import contestants, head, sass

    if case.op == "head":
        inputs, upstream = head.make_inputs(size=case.shape[2:], positives=case.positives), None
        leaves, table = inputs.leaves, head.contestants(inputs, compiled=False)
        eager, ours = table["eager"], table["gfl_kernels"]
    else:
        inputs = contestants.make_inputs(case)
        leaves, upstream = [inputs.logits], inputs.upstream
        eager, _, ours = contestants.forms(case, inputs)

    def step(form):
        for leaf in leaves:
            leaf.grad = None
        form(*leaves).backward(upstream)

    with sass.CountingDevice(90) as device, gfl_kernels.use_backend("triton"):
        own_operations = operations(lambda: step(ours))
    counts = {TRITON: len(device.reports)}
    if CUDA in backends:
        with sass.cuda_device.SimulatedCuda(order="lockstep") as device:
            step(ours)
        counts[CUDA] = len(device.launches)
    return {
        "case": case.name,
        "eager_operations": operations(lambda: step(eager)),
        "kernel_launches": counts,
        "own_operations": own_operations,
    }


# ---- requirements ----


@dataclass(frozen=True)
class Requirement:
    """A figure that every row in scope must reach; at_least: larger is better."""

    label: str
    required: float
    column: str
    scope: Callable[[Row], bool]
    at_least: bool = False


def _large(row: Row) -> bool:
    return row["op"] in ("qfl", "dfl", "integral") and row["logits"] >= LARGE


def _large_of_rest(row: Row) -> bool:
    return row["op"] in REST and row["logits"] >= LARGE


def _of_head(*passes: str) -> Callable[[Row], bool]:
    return lambda row: row["op"] == "head" and row["pass"] in passes


def _figure_case(backend: str, cases: tuple[Case, ...], which: str) -> Callable[[Row], bool]:
    names = [case.name for case in cases]
    return lambda row: (
        (row["backend"], row["pass"], row["target"]) == (backend, which, "sm_90")
        and row["case"] in names
    )


def _instructions(
    backend: str, label: str, most: float, cases: tuple[Case, ...], which: str
) -> list[Requirement]:
    scope = _figure_case(backend, cases, which)
    return [Requirement(f"{label}, {backend}", most, "sass_per_logit", scope)]


def _against_apex(dtype: str, case: Case, instructions: int) -> list[Requirement]:
    """NVIDIA apex's focal loss, loss and gradient in one launch, takes that many PTX instructions a
    logit in ptxsim and is bound by them: at most half of it, and bound by DRAM.
    """
    label, scope = (
        f"QFL loss + gradient, {dtype}, cuda:",
        _figure_case(CUDA, (case,), LOSS_GRADIENT),
    )
    return [
        Requirement(f"{label} PTX, half of apex's", instructions / 2, "ptx_per_logit", scope),
        Requirement(f"{label} bound / its DRAM term", 1, "launch_over_dram", scope),
    ]


def _near_dram(op: str) -> Callable[[Row], bool]:
    return lambda row: (
        row["op"] == op
        and row["target"] == "sm_90"
        and row["dtype"] in ("float32", "bfloat16")
        and _large(row)
    )


REQUIREMENTS = (
    Requirement("DRAM bytes / minimum, from 256k logits", 1.03, "dram_ratio", _large),
    Requirement("The same, rest of the family", 1.05, "dram_ratio", _large_of_rest),
    Requirement("Head: DRAM bytes / minimum", 1.05, "dram_ratio", _of_head(*_BOTH)),
    Requirement("Head: launches forward", 4, "launches", _of_head(FORWARD)),
    Requirement("Head: launches backward", 2, "launches", _of_head(BACKWARD)),
    Requirement(
        "Share of logit bytes in 16-byte accesses, aligned rows",
        0.95,
        "wide_share",
        lambda row: row.get("rows_aligned", False),
        at_least=True,
    ),
    Requirement("Spills, sm_80 to sm_100", 0, "spills", lambda row: True),
    Requirement("Registers of the QFL kernels", 64, "registers", lambda row: row["op"] == "qfl"),
    *_instructions(TRITON, "QFL loss + gradient, SASS a logit", 36, (QFL,), LOSS_GRADIENT),
    *_instructions(TRITON, "QFL loss, SASS a logit", 28, (QFL,), FORWARD),
    *_instructions(CUDA, "QFL loss + gradient, SASS a logit", 34, (QFL, QFL_DENSE), LOSS_GRADIENT),
    *_instructions(CUDA, "QFL loss, SASS a logit", 26, (QFL, QFL_DENSE), FORWARD),
    *_instructions(TRITON, "DFL loss + gradient, SASS a bin", 40, (DFL,), LOSS_GRADIENT),
    *_instructions(CUDA, "DFL loss + gradient, SASS a bin", 40, (DFL,), LOSS_GRADIENT),
    *_against_apex("float32", QFL, 93),
    *_against_apex("float16", QFL_FLOAT16, 89),
    Requirement("QFL bound / its DRAM term, H100", 1.15, "over_dram", _near_dram("qfl")),
    Requirement("DFL bound / its DRAM term, H100", 1.15, "over_dram", _near_dram("dfl")),
    Requirement("Spilled VGPRs, gfx942 and gfx90a", 0, "vgpr_spills", lambda row: True),
)


def judge(rows: list[Row]) -> list[Row]:
    """Every requirement with the worst row of its scope and a verdict: pass, miss, not measured."""
    return [_verdict(requirement, rows) for requirement in REQUIREMENTS]


def _verdict(requirement: Requirement, rows: list[Row]) -> Row:
    column = requirement.column
    scope = [row for row in rows if column in row and requirement.scope(row)]
    sign = -1 if requirement.at_least else 1
    missed = sum(sign * row[column] > sign * requirement.required for row in scope)
    worst = max(scope, key=lambda row: sign * row[column], default=None)
    return {
        "requirement": requirement.label,
        "at_least": requirement.at_least,
        "required": requirement.required,
        "measured": worst and worst[column],
        "verdict": "miss" if missed else "pass" if worst else "not measured",
        "missed": missed,
        "of": len(scope),
        "worst": worst and ", ".join(worst[key] for key in ("backend", "case", "pass", "target")),
    }


# ---- command line ----


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.roofline",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="only the main cases, fewer targets")
    size.add_argument("--full", action="store_true", help="all targets, more cases")
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="folder of the results")
    parser.add_argument("--only", metavar="REGEX", help="cases whose name matches")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (all cores)")
    parser.add_argument("--check", action="store_true", help="exit status 1 if one is missed")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    selected = [
        case
        for case in (FULL_CASES if options.full else CASES)
        if (case.quick or not options.quick) and re.search(options.only or "", case.name)
    ]
    if options.list:
        for case in selected:
            print(f"{case.name:42} {case.note}".rstrip())
        return 0
    if not selected:
        print(f"no case matches {options.only!r}; --list shows the names", file=sys.stderr)
        return 2
    if reason := missing():
        print(f"bench.roofline: {reason}", file=sys.stderr)
        return 2
    backends = BACKENDS
    if reason := cuda_missing():
        print(f"bench.roofline: the CUDA C++ kernels are left out: {reason}", file=sys.stderr)
        backends = (TRITON,)
    return execute(options, selected, backends)


def execute(options: argparse.Namespace, selected: list[Case], backends: tuple[str, ...]) -> int:
    from rich.console import Console
    from rich.progress import track

    from bench import roofline_report

    console = Console(width=None if sys.stdout.isatty() else 180)
    tasks = [
        (case, which, backend) for case in selected for which in case.passes for backend in backends
    ]
    # What takes longest comes first, so that no process ends alone: heads, then kernels of bins.
    ranks = {"head": 0, "qfl": 2}
    order = sorted(range(len(tasks)), key=lambda i: ranks.get(tasks[i][0].op, 1))
    found: dict[int, list[Row]] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(options.jobs, len(tasks)), context, _one_thread) as pool:
        futures = [pool.submit(measure, *tasks[i], *targets(tasks[i][0], options)) for i in order]
        finished = zip(order, (future.result for future in futures), strict=True)
        for i, result in track(finished, "counting", len(order), console=console, transient=True):
            found[i] = result()
    rows = [row for i in range(len(tasks)) for row in found[i]]
    shown = {(case.op, case.form) for case in selected}
    steps = [launches(case, backends) for case in SMALL if (case.op, case.form) in shown]
    verdicts = judge(rows)
    document = describe(options, backends) | {
        "requirements": verdicts,
        "launches": steps,
        "rows": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "roofline.json").write_text(json.dumps(document, indent=1) + "\n")
    picture = roofline_report.draw(options.out / "roofline.png", document)
    roofline_report.print_rows(console, rows)
    roofline_report.print_launches(console, steps)
    roofline_report.print_verdicts(console, verdicts)
    console.print(f"wrote {options.out / 'roofline.json'}, {picture}")
    missed = any(verdict["verdict"] == "miss" for verdict in verdicts)
    return 1 if missed and options.check else 0


def targets(case: Case, options: argparse.Namespace) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The NVIDIA and the AMD targets of a case."""
    if options.full or (case in EVERY_TARGET and not options.quick):
        return tuple(GPUS), AMD
    return (90,), AMD[:1]


def _one_thread():
    import torch

    torch.set_num_threads(1)


def describe(options: argparse.Namespace, backends: tuple[str, ...]) -> dict:
    """What stands in the file beside the figures."""
    import triton
    from triton import knobs

    from bench import machine, sass

    compilers = {
        "triton": triton.__version__,
        "ptxas": knobs.nvidia.ptxas.version,
        "ptxas_blackwell": knobs.nvidia.ptxas_blackwell.version,
    }
    if CUDA in backends:
        compilers["nvcc"] = sass.nvcc_version()
    return {
        "machine": machine.describe_machine(options.jobs),
        "versions": machine.describe_versions() | compilers,
        "settings": {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "quick": options.quick,
            "full": options.full,
            "only": options.only or "",
        },
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
