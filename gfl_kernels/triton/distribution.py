"""Distribution family: one kernel for the Distribution Focal Loss and the Integral."""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    COLUMNS,
    INTERPRETED,
    INTERPRETED_ELEMENTS,
    NONE,
    SINGLE,
    beside_columns,
    extent,
    finish_sum,
    fp64,
    i32,
    i64,
    launch_again,
    launch_first,
    launch_key,
    lay_out,
    layout,
    loss_ops,
    loss_scale,
    loss_workspace,
    matrix_offsets,
    outputs,
    packed,
    scale_factor,
    stride_names,
    tile_rows,
)
from .math import (
    distribution_grad,
    distribution_loss,
    expectation_grad,
    exponential,
    logarithm,
    reciprocal,
    split_target,
)

# Vectors of a thread's memory accesses, to and from one tensor per lane of the vector.


@triton.jit
def split_vector(t, N: tl.constexpr, VECTOR: tl.constexpr):
    """[N, VECTOR] as a tuple of VECTOR tensors [N]; no data moves."""
    if VECTOR == 1:
        return (tl.reshape(t, (N,)),)
    elif VECTOR == 2:
        a, b = tl.split(t)
        return (a, b)
    else:
        even, odd = tl.split(tl.reshape(t, (N, VECTOR // 2, 2)))
        a = split_vector(even, N, VECTOR // 2)
        b = split_vector(odd, N, VECTOR // 2)
        result = ()
        for i in tl.static_range(VECTOR // 2):
            result = result + (a[i], b[i])
        return result


@triton.jit
def join_vector(
    parts, START: tl.constexpr, STEP: tl.constexpr, N: tl.constexpr, VECTOR: tl.constexpr
):
    """Every STEP-th of parts from START on, VECTOR tensors [N], as [N, VECTOR]."""
    if VECTOR == 1:
        return tl.reshape(parts[START], (N, 1))
    else:
        even = join_vector(parts, START, 2 * STEP, N, VECTOR // 2)
        odd = join_vector(parts, START + STEP, 2 * STEP, N, VECTOR // 2)
        return tl.reshape(tl.join(even, odd), (N, VECTOR))


# Operands of the functions below are pairs (pointer or None, row stride) within a run. What a
# matrix has besides comes apart: its column stride, CONTIGUOUS and UNIT (launch.lay_out).


@triton.jit
def row_value(operand, row, mask, ACC: tl.constexpr):
    return tl.load(operand[0] + row * operand[1], mask=mask, other=0).to(ACC)


@triton.jit
def row_weight(weight, row, inside, ACC: tl.constexpr):
    """1 without weights; 0 outside."""
    if weight[0] is not None:
        return row_value(weight, row, inside, ACC)
    else:
        return tl.where(inside, 1.0, 0.0).to(ACC)


@triton.jit
def row_factor(w, factor, upstream, row, inside, ACC: tl.constexpr):
    """What the gradient of a row is multiplied by."""
    if upstream[0] is not None:
        # A row of weight 0 stays out whatever comes from upstream.
        up = row_value(upstream, row, inside, ACC)
        return tl.where(w == 0.0, 0.0, w * factor * up)
    else:
        return w * factor


@triton.jit
def row_target(target, weight_left, weight_right, row, inside, last, ACC: tl.constexpr):
    """(left, wl, wr) of rows."""
    t = row_value(target, row, inside, ACC)
    if weight_left[0] is None:
        left, wl, wr = split_target(t, last)
    else:
        wl = row_value(weight_left, row, inside, ACC)
        wr = row_value(weight_right, row, inside, ACC)
        left = tl.where(t >= last, last, tl.where(t >= 0.0, tl.floor(t), 0.0))
        # There is no bin right of the last: its weight goes there too.
        wl = tl.where(t >= last, wl + wr, wl)
        wr = tl.where(t >= last, 0.0, wr)
    return left, wl, wr


@triton.jit
def in_run(base, outer, middle, outer_stride, middle_stride, UNIT: tl.constexpr):
    """An operand's pointer in the run of (outer, middle)."""
    return base + (outer * outer_stride + middle * middle_stride) * UNIT


@triton.jit
def bin_value(values, k, ACC: tl.constexpr):
    if values is None:
        return tl.full((), k, ACC)
    else:
        return tl.load(values + k).to(ACC)


@triton.jit
def load_bins(
    pred,
    pred_column,
    start,
    read,
    K: tl.constexpr,
    N: tl.constexpr,
    TOGETHER: tl.constexpr,
    VECTOR: tl.constexpr,
    CHUNK: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """The bins of N groups of TOGETHER rows, start being the first of each, as a tuple of tensors
    [N], row after row.

    Where K is odd a row does not begin at a multiple of VECTOR elements, but every TOGETHER-th of
    packed rows does: so many belong to one thread and are moved VECTOR elements at a time. With
    VECTOR = 1 a bin is an access. Otherwise CHUNK elements are one tensor, of which neighbouring
    lanes fetch whole sectors together, and then hand over what is another's.
    """
    z = ()
    if VECTOR > 1:
        at = (pred[0] + start * (pred[1] * UNIT))[:, None]
        for c in tl.static_range(TOGETHER * K // CHUNK):
            here = at + (c * CHUNK + tl.arange(0, CHUNK)[None, :])
            z = z + split_vector(tl.load(here, mask=read[:, None], other=0.0), N, CHUNK)
        for v in tl.static_range(TOGETHER * K // CHUNK * CHUNK, TOGETHER * K, VECTOR):
            here = at + (v + tl.arange(0, VECTOR)[None, :])
            z = z + split_vector(tl.load(here, mask=read[:, None], other=0.0), N, VECTOR)
    else:
        for k in tl.static_range(K):
            bin_ = tl.full((), k, tl.int64)
            at = matrix_offsets(0, start, bin_, pred[1], pred_column, CONTIGUOUS, UNIT)
            z = z + (tl.load(pred[0] + at, mask=read, other=0.0),)
    return z


@triton.jit
def store_bins(
    gradients,
    grad,
    grad_column,
    start,
    inside,
    K: tl.constexpr,
    N: tl.constexpr,
    TOGETHER: tl.constexpr,
    VECTOR: tl.constexpr,
    CHUNK: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """The reverse of load_bins."""
    if VECTOR > 1:
        at = (grad[0] + start * (grad[1] * UNIT))[:, None]
        for c in tl.static_range(TOGETHER * K // CHUNK):
            t = join_vector(gradients, c * CHUNK, 1, N, CHUNK)
            tl.store(at + (c * CHUNK + tl.arange(0, CHUNK)[None, :]), t, mask=inside[:, None])
        for v in tl.static_range(TOGETHER * K // CHUNK * CHUNK, TOGETHER * K, VECTOR):
            t = join_vector(gradients, v, 1, N, VECTOR)
            tl.store(at + (v + tl.arange(0, VECTOR)[None, :]), t, mask=inside[:, None])
    else:
        for k in tl.static_range(K):
            bin_ = tl.full((), k, tl.int64)
            at = matrix_offsets(0, start, bin_, grad[1], grad_column, CONTIGUOUS, UNIT)
            tl.store(grad[0] + at, gradients[k], mask=inside)


@triton.jit
def held_rows(
    pred,
    grad,
    target,
    weight_left,
    weight_right,
    weight,
    upstream,
    values,
    loss,
    pred_column,
    grad_column,
    row,
    inside,
    factor,
    K: tl.constexpr,
    N: tl.constexpr,
    TOGETHER: tl.constexpr,
    VECTOR: tl.constexpr,
    CHUNK: tl.constexpr,
    PRED_CONTIGUOUS: tl.constexpr,
    PRED_UNIT: tl.constexpr,
    GRAD_CONTIGUOUS: tl.constexpr,
    GRAD_UNIT: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
):
    """Loss and gradient of N groups of TOGETHER rows, `row` being the first of each; the sum of
    their losses. A thread holds all bins of its rows: no reduction crosses lanes and no lane pads.
    """
    last: tl.constexpr = K - 1
    start = row
    read = inside
    if weight[0] is not None:
        read = start < 0
        for i in tl.static_range(TOGETHER):
            read = read | (row_weight(weight, start + i, inside, ACC) != 0.0)
    z = load_bins(
        pred,
        pred_column,
        start,
        read,
        K,
        N,
        TOGETHER,
        VECTOR,
        CHUNK,
        PRED_CONTIGUOUS,
        PRED_UNIT,
    )

    total = tl.zeros((N,), ACC)
    gradients = ()
    for i in tl.static_range(TOGETHER):
        row_i = start + i
        w = row_weight(weight, row_i, inside, ACC)
        g_factor = row_factor(w, factor, upstream, row_i, inside, ACC)
        high = z[i * K].to(ACC)
        for k in tl.static_range(1, K):
            high = tl.maximum(high, z[i * K + k].to(ACC))
        if target[0] is not None:
            left, wl, wr = row_target(target, weight_left, weight_right, row_i, inside, last, ACC)
        e = ()
        sums = tl.zeros((N,), ACC)
        z_left = tl.zeros((N,), ACC)
        z_right = tl.zeros((N,), ACC)
        moment = tl.zeros((N,), ACC)
        for k in tl.static_range(K):
            shifted = z[i * K + k].to(ACC) - high
            e = e + (exponential(shifted),)
            sums += e[k]
            if target[0] is not None:
                z_left = tl.where(left == k, shifted, z_left)
                z_right = tl.where(left == k - 1, shifted, z_right)
            else:
                moment += e[k] * bin_value(values, k, ACC)
        inverse = reciprocal(sums, FAST)
        if target[0] is not None:
            value = distribution_loss(logarithm(sums), wl, wr, z_left, z_right)
            value = tl.where(w == 0.0, 0.0, value * w)
            result = value * factor
            wl *= g_factor
            wr *= g_factor
            inverse *= wl + wr
        else:
            value = moment * inverse
            result = value
            inverse *= g_factor
        total += value
        if loss is not None:
            tl.store(loss + row_i, result, mask=inside)
        if grad[0] is not None:
            for k in tl.static_range(K):
                if target[0] is None:
                    g = expectation_grad(e[k] * inverse, bin_value(values, k, ACC), value)
                else:
                    g = distribution_grad(e[k] * inverse, left == k, left == k - 1, wl, wr)
                if weight[0] is not None:
                    g = tl.where(w == 0.0, 0.0, g)  # a NaN beside rows that count
                gradients = gradients + (g.to(grad[0].dtype.element_ty),)
    if grad[0] is not None:
        store_bins(
            gradients,
            grad,
            grad_column,
            start,
            inside,
            K,
            N,
            TOGETHER,
            VECTOR,
            CHUNK,
            GRAD_CONTIGUOUS,
            GRAD_UNIT,
        )
    return tl.sum(tl.where(inside, total, 0.0)).to(tl.float64)


@triton.jit
def wide_rows(
    pred,
    grad,
    target,
    weight_left,
    weight_right,
    weight,
    upstream,
    values,
    loss,
    pred_column,
    grad_column,
    row,
    inside,
    factor,
    K: tl.constexpr,
    PADDED: tl.constexpr,
    RUNS: tl.constexpr,
    PRED_CONTIGUOUS: tl.constexpr,
    PRED_UNIT: tl.constexpr,
    GRAD_CONTIGUOUS: tl.constexpr,
    GRAD_UNIT: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
):
    """The same for more bins than a thread can hold: N rows as a tile, padded to PADDED bins."""
    last: tl.constexpr = K - 1
    w = row_weight(weight, row, inside, ACC)
    g_factor = row_factor(w, factor, upstream, row, inside, ACC)
    k = tl.arange(0, PADDED)[None, :]
    real = k < K
    at = matrix_offsets(0, row[:, None], k, pred[1], pred_column, PRED_CONTIGUOUS, PRED_UNIT)
    z = tl.load(beside_columns(pred[0], RUNS) + at, mask=(w != 0.0)[:, None] & real, other=0.0).to(
        ACC
    )
    z = tl.where(real, z, float("-inf"))  # padding never wins and adds exp(-inf) = 0
    shifted = z - tl.max(z, axis=1)[:, None]
    e = exponential(shifted)
    sums = tl.sum(e, axis=1)
    inverse = reciprocal(sums, FAST)
    if target[0] is not None:
        left, wl, wr = row_target(target, weight_left, weight_right, row, inside, last, ACC)
        is_left = left[:, None] == k
        is_right = (left[:, None] == k - 1) & real
        z_left = tl.sum(tl.where(is_left, shifted, 0.0), axis=1)
        z_right = tl.sum(tl.where(is_right, shifted, 0.0), axis=1)
        value = distribution_loss(logarithm(sums), wl, wr, z_left, z_right)
        value = tl.where(w == 0.0, 0.0, value * w)
        result = value * factor
        wl *= g_factor
        wr *= g_factor
        p = e * (inverse * (wl + wr))[:, None]
        g = distribution_grad(p, is_left, is_right, wl[:, None], wr[:, None])
    else:
        if values is None:
            y = k.to(ACC)
        else:
            y = tl.load(values + k, mask=real, other=0.0).to(ACC)
        value = tl.sum(e * y, axis=1) * inverse
        result = value
        g = expectation_grad(e * (inverse * g_factor)[:, None], y, value[:, None])
    if loss is not None:
        tl.store(loss + row, result, mask=inside)
    if grad[0] is not None:
        at = matrix_offsets(0, row[:, None], k, grad[1], grad_column, GRAD_CONTIGUOUS, GRAD_UNIT)
        tl.store(
            beside_columns(grad[0], RUNS) + at,
            g.to(grad[0].dtype.element_ty),
            mask=inside[:, None] & real,
        )
    return tl.sum(tl.where(inside, value, 0.0)).to(tl.float64)


_MATRICES = ("pred", "grad")
_VECTORS = ("target", "weight_left", "weight_right", "weight", "upstream")


@triton.jit(do_not_specialize=stride_names(_MATRICES, _VECTORS))
def distribution_kernel(
    pred,  # [rows, K] logits
    target,  # [rows] positions in bins, or left bins; None for the integral
    weight_left,  # [rows] or None
    weight_right,  # [rows] or None
    weight,  # [rows] or None
    upstream,  # [] or [rows] or None
    avg_factor,  # [] or None
    values,  # [K] of the bins or None
    loss,  # [] or [rows] (the integral's value) or None
    partials,
    counter,
    grad,  # [rows, K] or None
    scale: "fp64",
    rows: "i64",  # of the innermost row dimension, in units of ROW_UNIT
    tiles_per_run: "i32",
    middle_size: "i32",
    pred_outer: "i64",
    pred_middle: "i64",
    pred_row: "i64",
    pred_column: "i64",
    grad_outer: "i64",
    grad_middle: "i64",
    grad_row: "i64",
    grad_column: "i64",
    target_outer: "i64",
    target_middle: "i64",
    target_row: "i64",
    weight_left_outer: "i64",
    weight_left_middle: "i64",
    weight_left_row: "i64",
    weight_right_outer: "i64",
    weight_right_middle: "i64",
    weight_right_row: "i64",
    weight_outer: "i64",
    weight_middle: "i64",
    weight_row: "i64",
    upstream_outer: "i64",
    upstream_middle: "i64",
    upstream_row: "i64",
    K: tl.constexpr,
    GROUPS: tl.constexpr,  # of a tile
    TOGETHER: tl.constexpr,  # rows of a group
    WIDE: tl.constexpr,
    VECTOR: tl.constexpr,
    CHUNK: tl.constexpr,
    RUNS: tl.constexpr,
    LOSS: tl.constexpr,  # ABSENT, SCALAR or PER_ROW, as the next one
    UPSTREAM: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    PRED_CONTIGUOUS: tl.constexpr,
    PRED_UNIT: tl.constexpr,
    GRAD_CONTIGUOUS: tl.constexpr,
    GRAD_UNIT: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
):
    """A tile is GROUPS * TOGETHER neighbouring rows."""
    rows = rows * ROW_UNIT
    factor = scale_factor(scale, avg_factor, ACC)
    if UPSTREAM == 1:
        factor = factor * tl.load(upstream).to(ACC)
    outer, middle, row, inside = tile_rows(
        tl.program_id(0), rows, tiles_per_run, middle_size, GROUPS, TOGETHER, RUNS, False
    )
    pred_at = (in_run(pred, outer, middle, pred_outer, pred_middle, PRED_UNIT), pred_row)
    grad_at = (
        None if grad is None else in_run(grad, outer, middle, grad_outer, grad_middle, GRAD_UNIT),
        grad_row,
    )
    target_at = (
        None if target is None else in_run(target, outer, middle, target_outer, target_middle, 1),
        target_row,
    )
    left_at = (
        None
        if weight_left is None
        else in_run(weight_left, outer, middle, weight_left_outer, weight_left_middle, 1),
        weight_left_row,
    )
    right_at = (
        None
        if weight_right is None
        else in_run(weight_right, outer, middle, weight_right_outer, weight_right_middle, 1),
        weight_right_row,
    )
    weight_at = (
        None if weight is None else in_run(weight, outer, middle, weight_outer, weight_middle, 1),
        weight_row,
    )
    upstream_at = (None, 0)
    if UPSTREAM == 2:
        upstream_at = (
            in_run(upstream, outer, middle, upstream_outer, upstream_middle, 1),
            upstream_row,
        )
    loss_at = None
    if LOSS == 2:
        loss_at = loss + (outer * middle_size + middle) * rows
    if WIDE:
        partial = wide_rows(
            pred_at,
            grad_at,
            target_at,
            left_at,
            right_at,
            weight_at,
            upstream_at,
            values,
            loss_at,
            pred_column,
            grad_column,
            row,
            inside,
            factor,
            K,
            VECTOR,
            RUNS,
            PRED_CONTIGUOUS,
            PRED_UNIT,
            GRAD_CONTIGUOUS,
            GRAD_UNIT,
            ACC,
            FAST,
        )
    else:
        partial = held_rows(
            pred_at,
            grad_at,
            target_at,
            left_at,
            right_at,
            weight_at,
            upstream_at,
            values,
            loss_at,
            pred_column,
            grad_column,
            row,
            inside,
            factor,
            K,
            GROUPS,
            TOGETHER,
            VECTOR,
            CHUNK,
            PRED_CONTIGUOUS,
            PRED_UNIT,
            GRAD_CONTIGUOUS,
            GRAD_UNIT,
            ACC,
            FAST,
        )
        if TOGETHER > 1:
            # The rows that do not fill a group, at the end of the last tile.
            whole = rows // TOGETHER * TOGETHER
            if whole < rows and tl.program_id(0) % tiles_per_run == tiles_per_run - 1:
                left_over = whole + tl.arange(0, TOGETHER)
                partial += held_rows(
                    pred_at,
                    grad_at,
                    target_at,
                    left_at,
                    right_at,
                    weight_at,
                    upstream_at,
                    values,
                    loss_at,
                    pred_column,
                    grad_column,
                    left_over,
                    left_over < rows,
                    factor,
                    K,
                    TOGETHER,
                    1,
                    1,
                    1,
                    PRED_CONTIGUOUS,
                    PRED_UNIT,
                    GRAD_CONTIGUOUS,
                    GRAD_UNIT,
                    ACC,
                    FAST,
                )
    if LOSS == 1:
        finish_sum(partial, factor, loss, partials, counter)


# Registers that a thread may spend on the logits of its rows.
HELD = 72
# Of a tile of rows that are more than that.
WIDE_ELEMENTS = 2048


class Config(NamedTuple):
    groups: int  # of a tile
    together: int  # rows of a group
    vector: int  # elements of an access; of a padded row if it is wide
    chunk: int  # elements that neighbouring lanes move together
    wide: bool
    warps: int


def config(bins: int, itemsize: int, contiguous: int, packed_rows: bool, unit: int) -> Config:
    """The tile, by arithmetic: one warp, 128 rows, four for each thread where four rows of bins fit
    into its registers.

    contiguous: the dimension of stride 1. packed_rows: rows lie one after the other in one run.
    unit: elements to a multiple of which every stride is aligned.
    """
    widest = 16 // itemsize
    if bins > HELD:
        padded = triton.next_power_of_2(bins)
        return Config(max(1, WIDE_ELEMENTS // padded), 1, padded, padded, True, 4)
    threads = INTERPRETED_ELEMENTS // 64 if INTERPRETED else 32
    rows = max(1, min(widest, 1 << (HELD // bins).bit_length() - 1))  # of a thread
    # Interpreted, every vector in a thread's registers would be an operation of its own.
    vector = widest if contiguous == COLUMNS and not INTERPRETED else 1
    while vector > 1:
        together = vector // math.gcd(vector, bins)
        if together <= rows and (packed_rows if together > 1 else vector <= unit):
            chunk = min(64 // itemsize, 1 << (together * bins).bit_length() - 1)
            return Config(threads * rows // together, together, vector, chunk, False, 1)
        vector //= 2
    return Config(threads * rows, 1, 1, 1, False, 1)


def _launch(
    pred: Tensor,
    target: Tensor | None,
    weight_left: Tensor | None,
    weight_right: Tensor | None,
    weight: Tensor | None,
    avg_factor: Tensor | None,
    scale: float,
    reduction: int,
    *,
    values: Tensor | None = None,
    upstream: Tensor | None = None,
    loss: Tensor | None = None,
    grad: Tensor | None = None,
) -> None:
    """One launch of distribution_kernel over all rows. Without a target it is the integral."""
    bins = pred.shape[-1]
    per_row = reduction == NONE
    total_scale = loss_scale(scale, reduction, pred)
    rest = (weight_left, weight_right, weight, upstream, avg_factor, values, loss)

    def arguments(tiles: int) -> tuple[Any, ...]:
        partials, counter = loss_workspace(loss, per_row, tiles)
        return pred, target, *rest, partials, counter, grad, total_scale

    key = launch_key(distribution_kernel, (pred, target, *rest, grad), per_row)
    if launch_again(key, arguments):
        return
    operands = (
        (("pred", layout(pred)), ("grad", layout(grad))),
        (
            ("target", layout(target)),
            ("weight_left", layout(weight_left)),
            ("weight_right", layout(weight_right)),
            ("weight", layout(weight)),
            ("upstream", layout(upstream) if per_row else None),
        ),
    )
    found = lay_out(128, *operands)
    if found is None:
        copies = packed(pred, target, weight_left, weight_right, weight)
        if per_row:
            (upstream,) = packed(upstream)
        result = None if grad is None else torch.empty_like(copies[0])
        _launch(
            *copies,
            avg_factor,
            scale,
            reduction,
            values=values,
            upstream=upstream,
            loss=loss,
            grad=result,
        )
        if grad is not None:
            grad.copy_(result)
        return
    _, rows = found
    shape = config(
        bins,
        pred.element_size(),
        rows["PRED_CONTIGUOUS"],
        rows["RUNS"] == SINGLE and rows["pred_row"] * rows["PRED_UNIT"] == bins,
        min(rows["PRED_UNIT"], rows["PRED_UNIT"] if grad is None else rows["GRAD_UNIT"]),
    )
    tiles, rows = lay_out(shape.groups * shape.together, *operands)
    launch_first(
        distribution_kernel,
        key,
        tiles,
        arguments,
        K=bins,
        GROUPS=shape.groups,
        TOGETHER=shape.together,
        VECTOR=shape.vector,
        CHUNK=shape.chunk,
        WIDE=shape.wide,
        LOSS=extent(loss, per_row),
        UPSTREAM=extent(upstream, per_row),
        num_warps=shape.warps,
        **rows,
    )


distribution_forward, distribution_backward = loss_ops(_launch)


_NO_TARGET = (None, None, None, None, None, 1.0, NONE)


def integral_forward(pred: Tensor, bins: Tensor | None) -> Tensor:
    """gfl_kernels::integral_forward over all bins: the expectation of each row."""
    value, _ = outputs(pred, NONE, False)
    if pred.numel():
        _launch(pred, *_NO_TARGET, values=packed_bins(bins), loss=value)
    return value


def integral_backward(upstream: Tensor, pred: Tensor, bins: Tensor | None) -> Tensor:
    """gfl_kernels::integral_backward over all bins: pred's gradient."""
    grad = torch.empty_like(pred)
    if pred.numel():
        _launch(pred, *_NO_TARGET, values=packed_bins(bins), upstream=upstream, grad=grad)
    return grad


def packed_bins(bins: Tensor | None) -> Tensor | None:
    return bins if bins is None else bins.contiguous()
