"""What the launchers share: rows and strides, the launch configuration, the sum over programs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from ..reference import accumulate_dtype

# The interpreter or a compiler: Triton decides once per process, where it decorates.
INTERPRETED = bool(knobs.runtime.interpret)

# Of a tile there: what an interpreted operation costs hardly depends on its size.
INTERPRETED_ELEMENTS = 32768

# Annotations of kernel arguments, which Triton reads as strings: types that no value changes.
i32, i64, fp64 = int, int, float

# Reductions as ops.py numbers them.
NONE, SUM, MEAN = 0, 1, 2


_one_launch = threading.Lock()
_there_already = nullcontext()


def on_device(tensor: Tensor):
    """Launches go to the current device: make it the tensor's. What runs kernels on CPU tensors has
    global state, the interpreter above all: one launch at a time there.
    """
    if not tensor.is_cuda:
        return _one_launch
    if tensor.get_device() == torch.cuda.current_device():
        return _there_already
    return torch.cuda.device(tensor.device)


def fast() -> bool:
    """Whether the kernels may use CUDA's approximate instructions (math.py)."""
    return not INTERPRETED and driver.active.get_current_target().backend == "cuda"


# Launches that were made before. To bind and specialise sixty arguments takes Triton longer than
# most of the kernels run; a launch that differs from one before in the values of its numbers and
# the addresses of its tensors alone needs none of it.


class Launched(NamedTuple):
    compiled: Any  # triton.compiler.CompiledKernel
    tiles: int
    constants: tuple[Any, ...]  # what the kernel takes after the arguments of the call


_launched: dict[tuple[Any, ...], Launched] = {}
_MOST_LAUNCHED = 4096


def launch_key(kernel: Any, tensors: tuple[Tensor | None, ...], *constants: Any) -> tuple[Any, ...]:
    """What a launch depends on besides numbers that the kernel reads at run time. tensors: those
    it is about, pred first; constants: all else that its tile and its compilation follow from.
    """
    return (
        kernel,
        None if INTERPRETED else driver.active,  # simulated devices come and go
        tensors[0].get_device(),  # type: ignore[union-attr]
        constants,
        *(
            tensor if tensor is None
            # Triton compiles for addresses that are multiples of 16, and for others.
            else (tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16)
            for tensor in tensors
        ),
    )  # fmt: skip


def launch_again(key: tuple[Any, ...], arguments: Callable[[int], tuple[Any, ...]]) -> bool:
    """Repeat the launch of that key, if there has been one. arguments: those of this call, given
    the number of tiles.
    """
    found = _launched.get(key)
    if found is None:
        return False
    values = arguments(found.tiles)
    with on_device(values[0]):
        found.compiled[found.tiles, 1, 1](*values, *found.constants)
    return True


def launch_first(
    kernel: Any,
    key: tuple[Any, ...],
    tiles: int,
    arguments: Callable[[int], tuple[Any, ...]],
    **constants: Any,
) -> None:
    """A launch by Triton's own way, which compiles; it is remembered for launch_again. constants:
    what the kernel takes by name, but ACC and FAST, and Triton's options.
    """
    values = arguments(tiles)
    constants |= {"ACC": acc_type(values[0].dtype), "FAST": fast()}
    with on_device(values[0]):
        compiled = kernel[(tiles,)](*values, enable_fp_fusion=True, **constants)
    # On AMD the compilation depends on the sizes of storages, too; interpreted there is none.
    if compiled is not None and fast():
        if len(_launched) >= _MOST_LAUNCHED:
            _launched.clear()
        others = tuple(constants[name] for name in kernel.arg_names[len(values) :])
        _launched[key] = Launched(compiled, tiles, others)


def acc_type(dtype: torch.dtype):
    """What a kernel computes in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


# Rows and strides

ROW_DIMS = 3
NEITHER, COLUMNS, ROWS = 0, 1, 2

# Where tiles lie among the runs of the innermost row dimension.
SINGLE, LONG, SHORT = 0, 1, 2

# What a weight, a loss or an upstream gradient is to a kernel.
ABSENT, SCALAR, PER_ROW, PER_ELEMENT = 0, 1, 2, 3


class Layout(NamedTuple):
    """A tensor as lay_out needs it: everything hashable, nothing of the data."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int


def layout(tensor: Tensor | None) -> Layout | None:
    if tensor is None:
        return None
    return Layout(tuple(tensor.shape), tensor.stride(), tensor.element_size())


def merge_rows(shape, operands: list) -> tuple[list[int], list[tuple[int, ...]]] | None:
    """(sizes, strides of each operand) of the rows as ROW_DIMS dimensions, outermost first.

    operands: the row strides of each. Dimensions of size 1 drop out; neighbours that step together
    in every operand become one. None if more than ROW_DIMS are left.
    """
    dims: list[tuple] = []  # (extent, stride in each operand)
    for extent, *steps in zip(shape, *operands, strict=True):
        if extent == 1:
            continue
        if dims and all(a == b * extent for a, b in zip(dims[-1][1], steps, strict=True)):
            dims[-1] = (dims[-1][0] * extent, steps)
        else:
            dims.append((extent, steps))
    missing = ROW_DIMS - len(dims)
    if missing < 0:
        return None
    dims = [(1, [0] * len(operands))] * missing + dims
    return [n for n, _ in dims], list(zip(*(steps for _, steps in dims), strict=True))


def stride_names(matrices, vectors) -> list[str]:
    """The run-time arguments that lay_out makes: a kernel must not be compiled anew for them."""
    steps = ("outer", "middle", "row")
    return [
        "rows",
        "tiles_per_run",
        "middle_size",
        *(f"{name}_{step}" for name in (*matrices, *vectors) for step in steps),
        *(f"{name}_column" for name in matrices),
    ]


@lru_cache(maxsize=4096)
def lay_out(
    tile_rows: int,
    matrices: tuple[tuple[str, Layout | None], ...],
    vectors: tuple[tuple[str, Layout | None], ...],
) -> tuple[int, dict] | None:
    """(number of tiles, the kernel arguments that say where rows lie: sizes, strides, contiguous
    dimensions).

    matrices, vectors: (name, layout) of the operands. The first matrix is the logits; others may
    have a value per row too, as vectors always do. None if the rows need more than ROW_DIMS
    dimensions.

    The strides of a matrix are counted in units of NAME_UNIT elements, which the kernel multiplies
    back in: the compiler then sees that vectors of so many elements are aligned if the base is.
    """
    operands = matrices + vectors
    pred = matrices[0][1]
    *shape, columns = pred.shape
    present = [(name, item) for name, item in operands if item is not None]
    merged = merge_rows(shape, [item.strides[: len(shape)] for _, item in present])
    if merged is None:
        return None
    (outer, middle, rows), strides = merged
    arguments = {}
    row_strides = {name: s for (name, _), s in zip(present, strides, strict=True)}
    for name, item in operands:
        outer_stride, middle_stride, row_stride = row_strides.get(name, (0, 0, 0))
        column_stride, contiguous, unit = 0, NEITHER, 1
        if item is not None and len(item.shape) == len(pred.shape):
            column_stride = item.strides[-1] if columns > 1 else 0
            others = [outer_stride, middle_stride]
            if column_stride == 1:
                contiguous, column_stride = COLUMNS, 0
                others += [row_stride]
            elif row_stride == 1:
                contiguous, row_stride = ROWS, 0
                others += [column_stride, rows]
            if contiguous != NEITHER:
                unit = 16 // item.itemsize
            while any(stride % unit for stride in others):
                unit //= 2
        arguments |= {
            f"{name}_outer": outer_stride // unit,
            f"{name}_middle": middle_stride // unit,
            f"{name}_row": row_stride // unit,
        }
        if (name, item) in matrices:
            arguments |= {
                f"{name}_column": column_stride // unit,
                f"{name.upper()}_CONTIGUOUS": contiguous,
                f"{name.upper()}_UNIT": unit,
            }
    row_unit = arguments["PRED_UNIT"] if arguments["PRED_CONTIGUOUS"] == ROWS else 1
    runs = outer * middle
    tiles_per_run = -(-rows // tile_rows)
    tiles = runs * tiles_per_run
    kind = SINGLE if runs == 1 else LONG
    # A division for every row costs less than tiles that are mostly empty.
    if runs > 1 and arguments["PRED_CONTIGUOUS"] != ROWS and 2 * rows < tile_rows:
        kind, tiles, tiles_per_run = SHORT, -(-runs * rows // tile_rows), runs
    return tiles, arguments | {
        "rows": rows // row_unit,
        "ROW_UNIT": row_unit,
        "tiles_per_run": tiles_per_run,
        "middle_size": middle,
        "RUNS": kind,
    }


@triton.jit
def matrix_offsets(
    start, rows, columns, row_stride, column_stride, CONTIGUOUS: tl.constexpr, UNIT: tl.constexpr
):
    """Element offsets of rows x columns (int64), broadcast; start: what outer dimensions add."""
    if CONTIGUOUS == 1:
        return (start + rows * row_stride) * UNIT + columns
    elif CONTIGUOUS == 2:
        return (start + columns.to(tl.int64) * column_stride) * UNIT + rows
    else:
        return (start + rows * row_stride + columns.to(tl.int64) * column_stride) * UNIT


@triton.jit
def in_matrix(matrix, outer, middle, rows, columns, CONTIGUOUS: tl.constexpr, UNIT: tl.constexpr):
    """Pointers to elements, of rows x columns as they broadcast. matrix: (pointer, outer, middle,
    row and column stride).
    """
    start = outer * matrix[1] + middle * matrix[2]
    return matrix[0] + matrix_offsets(start, rows, columns, matrix[3], matrix[4], CONTIGUOUS, UNIT)


@triton.jit
def columns_ahead(count, column_stride, CONTIGUOUS: tl.constexpr, UNIT: tl.constexpr):
    """How many elements lie between a column and the one `count` further on."""
    return count if CONTIGUOUS == 1 else count * UNIT * column_stride


@triton.jit
def tile_rows(
    tile,
    rows,
    tiles_per_run,
    middle_size,
    COUNT: tl.constexpr,
    TOGETHER: tl.constexpr,
    RUNS: tl.constexpr,
    CLAMPED: tl.constexpr,
):
    """(outer, middle, row, inside) of the rows of a tile, COUNT groups of TOGETHER neighbours: the
    first row of each group, and whether all of it is there. In int64.

    RUNS: SINGLE, LONG (tiles stay in a run of the innermost dimension: outer and middle are
    scalars) or SHORT (every row has its own). CLAMPED: rows past the end repeat the last one.
    """
    outer, middle = 0, 0
    if RUNS == 1:
        run = tile // tiles_per_run
        tile = tile - run * tiles_per_run
        outer = run // middle_size
        middle = run - outer * middle_size
    row = tl.full((), tile, tl.int64) * (COUNT * TOGETHER) + tl.arange(0, COUNT) * TOGETHER
    if RUNS == 2:
        inside = row < rows * tiles_per_run  # the number of runs, here
        if CLAMPED:
            row = tl.minimum(row, rows * tiles_per_run - 1)
        run = row // rows
        row = row - run * rows
        outer = run // middle_size
        return outer, run - outer * middle_size, row, inside
    else:
        # row + 1 <= rows would hide from the compiler that neighbours come together.
        inside = row < rows if TOGETHER == 1 else row + TOGETHER <= rows
        if CLAMPED:
            row = tl.minimum(row, rows - 1)
        return tl.full((), outer, tl.int64), tl.full((), middle, tl.int64), row, inside


@triton.jit
def beside_columns(x, RUNS: tl.constexpr):
    """outer or middle, to be added to [rows, columns]."""
    if RUNS == 2:
        return x[:, None]
    else:
        return x


@triton.jit
def element_mask(read, columns, COUNT: tl.constexpr, STEP: tl.constexpr, CLAMPED: tl.constexpr):
    """Which elements of a step are there to be read; None for all.

    CLAMPED: lanes past the last row repeat it.
    """
    if CLAMPED and COUNT % STEP == 0:
        return  # Triton 3.6 takes no `return None`
    elif CLAMPED:
        return columns < COUNT
    elif COUNT % STEP == 0:
        return read[:, None]
    else:
        return read[:, None] & (columns < COUNT)


@triton.jit
def load_elements(pointers, mask, other, ACC: tl.constexpr, FAST: tl.constexpr):
    """Elements of a matrix; other where masked."""
    if mask is None:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=mask, other=other)
    if FAST and values.dtype == tl.bfloat16:
        # Two instructions for a pair. The compiler unpacks in five, and twice: it compares in
        # bfloat16 what is compared in float32 here.
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r",
            [values],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        return values.to(ACC)


@triton.jit
def row_values(base, offsets, mask):
    """A value per row, as it lies in memory; 0 where masked."""
    return tl.load(base + offsets, mask=mask, other=0)


@triton.jit
def scale_factor(scale, avg_factor, ACC: tl.constexpr):
    """scale / (avg_factor + eps): mmdetection's, with the eps of float32 in every dtype."""
    factor = tl.full((), scale, ACC)
    if avg_factor is not None:
        factor = factor / (tl.load(avg_factor).to(ACC) + 1.1920928955078125e-07)
    return factor


# The sum over programs


@triton.jit
def is_last(counter):
    """Whether this program is the last of the launch to arrive: it sees what the others stored
    before. The counter is 0 before and after every launch.
    """
    tl.debug_barrier()  # stores are visible to the block before one of its threads announces them
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def sum_partials(partials, begin, end, STEP: tl.constexpr = 1):
    """The sum of partials[begin:end], STEP apart, in a fixed order."""
    total = tl.zeros((1024,), tl.float64)
    for start in range(begin, end, 1024):
        i = start + tl.arange(0, 1024)
        # Past L1, which may hold what these addresses had before.
        total += tl.load(partials + i * STEP, mask=i < end, other=0.0, cache_modifier=".cg")
    return tl.sum(total)


@triton.jit
def finish_sum(partial, factor, loss, partials, counter):
    """loss = factor * the sum of every program's partial, in a fixed order, without float atomics.

    The last program to arrive adds.
    """
    tl.store(partials + tl.program_id(0), partial.to(tl.float64))
    if is_last(counter):
        result = sum_partials(partials, 0, tl.num_programs(0)) * factor.to(tl.float64)
        tl.store(loss, result.to(loss.dtype.element_ty))


_workspaces: dict[tuple, tuple[Tensor, Tensor]] = {}


def sum_workspace(device: torch.device, programs: int) -> tuple[Tensor, Tensor]:
    """(partials, counter) of a sum over programs: launches that share one run one by one."""

    def make() -> tuple[Tensor, Tensor]:
        partials = torch.empty(max(programs, 8192), dtype=torch.float64, device=device)
        return partials, torch.zeros(1, dtype=torch.int32, device=device)

    if device.type == "cpu":  # interpreted, or a simulated device
        key = (device, threading.get_ident())
    elif torch.cuda.is_current_stream_capturing():
        return make()  # a graph may be replayed beside what runs on this stream
    else:
        key = (device, driver.active.get_current_stream(device.index))
    if key not in _workspaces or _workspaces[key][0].numel() < programs:
        _workspaces[key] = make()
    return _workspaces[key]


def loss_workspace(loss: Tensor | None, per_row: bool, tiles: int) -> tuple[Tensor | None, ...]:
    """(partials, counter), both None where there is no loss that is a sum."""
    return (None, None) if loss is None or per_row else sum_workspace(loss.device, tiles)


def loss_scale(scale: float, reduction: int, pred: Tensor) -> float:
    """scale, by the number of rows where the loss is their mean."""
    return scale / max(pred.numel() // pred.shape[-1], 1) if reduction == MEAN else scale


def extent(tensor: Tensor | None, per_row: bool) -> int:
    """What a loss or its upstream gradient is to a kernel: ABSENT, PER_ROW or SCALAR."""
    return ABSENT if tensor is None else PER_ROW if per_row else SCALAR


def outputs(pred: Tensor, reduction: int, write_grad: bool) -> tuple[Tensor, Tensor]:
    """(loss, grad) to be written. Without rows nothing is launched: the sum is 0 from the start."""
    shape = pred.shape[:-1] if reduction == NONE else ()
    make = torch.empty if pred.numel() else torch.zeros
    loss = make(shape, dtype=accumulate_dtype(pred.dtype), device=pred.device)
    return loss, torch.empty_like(pred) if write_grad else pred.new_empty(0)


def loss_ops(launch: Callable[..., None]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The forward and the backward op of a loss, whose rows launch(pred, ..., reduction, upstream=,
    loss=, grad=) computes. Forward: (loss, gradient for an upstream gradient of 1 or empty)."""

    def forward(pred: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        *inputs, reduction, write_grad = args
        loss, grad = outputs(pred, reduction, write_grad)
        if pred.numel():
            launch(pred, *inputs, reduction, loss=loss, grad=grad if write_grad else None)
        return loss, grad

    def backward(upstream: Tensor, pred: Tensor, *args: Any) -> Tensor:
        grad = torch.empty_like(pred)
        if pred.numel():
            launch(pred, *args, upstream=upstream, grad=grad)
        return grad

    return forward, backward


def packed(*tensors: Tensor | None) -> list[Tensor | None]:
    """Copies for a layout whose rows need more than ROW_DIMS dimensions."""
    return [tensor if tensor is None else tensor.contiguous() for tensor in tensors]
