"""Proves with triton-viz's sanitizer that the Triton kernels stay within their arguments.

The interpreter runs a kernel on symbols instead of numbers, and z3 looks for a lane, a program and
loaded values for which an address lies outside. Run by test_sanitizer.py in a process of its own;
prints a line of JSON for each case.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import triton.language as tl
import triton_viz
import z3
from support import (
    LAYOUTS,
    PUBLIC,
    bin_target,
    dense_target,
    explicit_target,
    lay_out,
    logits,
    random_upstream,
    row_weight,
    sparse_target,
)
from triton.runtime.interpreter import interpreter_builder
from triton_viz.clients.sanitizer.sanitizer import SymbolicExpr, SymbolicSanitizer
from triton_viz.core.callbacks import ForLoopCallbacks, OpCallbacks
from triton_viz.core.data import Load, MakeRange, RawLoad
from triton_viz.core.patch import _loop_patcher

import gfl_kernels
from gfl_kernels.triton import distribution, launch, quality


class Sanitizer(SymbolicSanitizer):
    """triton-viz 3.0's, without what makes it miss errors of these kernels or see ones that are not
    there.
    """

    def __init__(self):
        super().__init__()
        self.start()

    def start(self):
        self.checked, self.masked, self.outside = set(), set(), set()

    def register_for_loop_callback(self):
        # Loops run as they are: a symbolic index is unbounded in the loops inside its own.
        wrap = super().register_for_loop_callback().range_wrapper_factory
        return ForLoopCallbacks(range_wrapper_factory=wrap)

    def register_op_callback(self, op_type):
        callbacks = super().register_op_callback(op_type)
        original = callbacks.op_overrider
        if op_type in (Load, RawLoad):
            # A value may be anything: one that a mask depends on would be loaded for all lanes at
            # once and the mask hold only where it does in every lane.
            def load(*args):
                access = original(*args)
                pointer = access.ptr.dtype
                value = SymbolicExpr.create("const", 0, access.dtype)
                value.dtype = (
                    tl.block_type(pointer.element_ty.element_ty, pointer.shape)
                    if pointer.is_block()
                    else pointer.element_ty
                )
                value.loop_ctx = SimpleNamespace(idx_z3=z3.FreshInt("loaded"))
                if access.mask is None or access.other is None:
                    return value
                return SymbolicExpr.create("where", access.mask, value, access.other)

            return OpCallbacks(op_overrider=load)
        if op_type is MakeRange:
            # Rows and columns of a square tile would share their lanes.
            def make_range(ret_ty, start, end):
                lanes = original(ret_ty, start, end)
                lanes.z3 = z3.FreshInt("lane")
                lanes.constraints = z3.And(lanes.z3 >= start, lanes.z3 < end)
                return lanes

            return OpCallbacks(op_overrider=make_range)
        return callbacks

    def arg_callback(self, name, arg, arg_cvt):
        # The gaps between rows are outside, and a view's offset counts once.
        if not hasattr(arg, "data_ptr"):
            return
        self._record_tensor_name(arg, name)
        self.tensors.append(arg)
        starts, length = [0], 1
        for stride, extent in sorted(zip(arg.stride(), arg.shape, strict=True)):
            if stride == length:
                length *= extent
            elif extent > 1:
                starts = [start + i * stride for start in starts for i in range(extent)]
        base, size = arg.data_ptr(), arg.element_size()
        for start in starts:
            first = base + start * size
            self.tensor_addrs.append((first, first + (length - 1) * size, arg))

    def pre_run_callback(self, fn):
        return self.need_full_grid is not False  # once for every launch, whatever came before

    def _check_range_satisfiable(self, address, constraints, expr, location=None):
        solver = z3.Solver()
        solver.add(self.pid_ok, *([] if constraints is None else [constraints]))
        access = f"{expr.op} of {self._get_tensor_name(self._find_tensor_for_expr(expr, 0))}"
        if solver.check() == z3.unsat:  # masked in every lane
            self.masked.add(access)
            return
        self.checked.add(access)
        for each in address if isinstance(address, list) else [address]:
            solver.push()
            solver.add(self.addr_sym == each, z3.Not(self.addr_ok))
            outcome = solver.check()
            assert outcome != z3.unknown, solver.reason_unknown()
            if outcome == z3.sat:
                self.outside.add(f"{access} in {kernel_line()}")
            solver.pop()


def kernel_line():
    """The innermost line of a kernel that is being interpreted."""
    frame = sys._getframe()
    while Path(frame.f_code.co_filename).parent != Path(launch.__file__).parent:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


class Traced:
    """In a kernel's place; adds to its arguments what `changes` says."""

    def __init__(self, kernel, sanitizer):
        self.kernel = triton_viz.trace(client=sanitizer)(kernel)
        self.changes = {}

    def __getitem__(self, grid):
        def run(*args, **kwargs):
            for name, amount in self.changes.items():
                kwargs[name] += amount
            return self.kernel[grid](*args, **kwargs)

        return run


TARGETS = {"sparse": sparse_target, "bins": bin_target, "explicit": explicit_target}


def call(op, layout, classes, form, reduction="none"):
    """Forward and backward. layout: a number of rows or a name; form: TARGET or TARGET+WEIGHT."""
    if layout in LAYOUTS:
        laid = lay_out(layout, logits(2, 5, 7, classes))
        pred, dim, rows = laid.pred, laid.dim, laid.row_shape
    else:
        pred, dim, rows = logits(layout, classes), -1, (layout,)
    target, _, weight = form.partition("+")
    kwargs = {"class_dim" if op == "quality" else "bin_dim": dim}
    if op != "integral":
        kwargs["reduction"] = reduction
    args = []
    if target == "dense":
        args = [dense_target(rows, classes).movedim(-1, dim)]
    elif target:
        args = [TARGETS[target](rows, classes)]
    if weight == "rows":
        kwargs["weight"] = row_weight(rows)
    elif weight == "elements":
        kwargs["weight"] = row_weight((*rows, classes)).movedim(-1, dim)
    with gfl_kernels.use_backend("triton"):
        value = PUBLIC[op](pred.detach().requires_grad_(), *args, **kwargs)
        value.backward(random_upstream(torch.zeros(value.shape)))


QUALITY = [
    ("quality", 77, 1, "sparse"),
    ("quality", 77, 32, "sparse"),
    ("quality", 77, 80, "sparse", "sum"),
    ("quality", 77, 81, "sparse+rows"),
    ("quality", 77, 20, "dense+elements"),
    ("quality", "nchw", 20, "sparse+rows", "sum"),
    ("quality", "nchw", 20, "dense+elements"),
    ("quality", "column_slice", 20, "sparse"),
    ("quality", "misaligned", 20, "sparse"),
    ("quality", "width_cropped", 20, "sparse+rows"),
    ("quality", "every_second_column", 20, "sparse"),
]
DISTRIBUTION = [
    ("distribution", 131, 2, "bins"),
    ("distribution", 131, 7, "bins+rows"),
    ("distribution", 131, 8, "explicit"),
    ("distribution", 131, 17, "bins", "sum"),
    ("distribution", 131, 17, "bins+rows"),
    ("distribution", 70, 33, "bins"),
    ("distribution", 77, 80, "bins+rows"),
    ("distribution", "nchw", 8, "explicit+rows"),
    ("distribution", "column_slice", 8, "bins"),
    ("distribution", "misaligned", 16, "bins"),
    ("distribution", "width_cropped", 8, "bins+rows", "sum"),
    ("integral", 131, 17, ""),
    ("integral", "nchw", 8, ""),
]
# What has to be found: one row or column too many, a stride that is too long.
BROKEN = [
    (("quality", 77, 20, "sparse"), {"rows": 1}),
    (("quality", 77, 20, "sparse+rows"), {"rows": 1}),
    (("quality", 77, 21, "dense"), {"C": 1}),
    (("quality", 77, 21, "dense+rows"), {"C": 1}),
    (("quality", "nchw", 20, "sparse"), {"grad_column": 1}),
    (("quality", "column_slice", 20, "sparse"), {"C": 1}),
    (("quality", "width_cropped", 20, "sparse"), {"pred_middle": 1}),
    (("distribution", 131, 17, "bins"), {"rows": 1}),
    (("distribution", 131, 17, "bins+rows"), {"rows": 1}),
    (("distribution", 131, 16, "bins+rows"), {"pred_row": 1}),
    (("distribution", 77, 80, "bins+rows"), {"K": 1}),
    (("distribution", "nchw", 8, "bins"), {"pred_middle": 1}),
    (("integral", 131, 17, ""), {"grad_row": 1}),
]


def main():
    launch._triton_viz_loop_patcher = _loop_patcher  # it knows of the kernel's own module alone
    type(interpreter_builder).create_split = lambda self, t: (t, t)  # no address depends on it
    quality.INTERPRETED = distribution.INTERPRETED = False  # the tiles and vectors of a GPU
    sanitizer = Sanitizer()
    traced = {"quality": Traced(quality.quality_kernel, sanitizer)}
    traced["distribution"] = Traced(distribution.distribution_kernel, sanitizer)
    traced["integral"] = traced["distribution"]
    quality.quality_kernel = traced["quality"]
    distribution.distribution_kernel = traced["distribution"]
    for case, changes in [*((case, {}) for case in QUALITY + DISTRIBUTION), *BROKEN]:
        sanitizer.start()
        traced[case[0]].changes = changes
        call(*case)
        result = {
            "case": case,
            "changes": changes,
            "checked": sorted(sanitizer.checked),
            "masked": sorted(sanitizer.masked - sanitizer.checked),
            "outside": sorted(sanitizer.outside),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
