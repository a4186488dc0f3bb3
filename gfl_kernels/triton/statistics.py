"""Summaries of distributions: statistics, moments, and the integral over a peak, in one kernel."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import ops
from . import distribution
from .distribution import (
    Config,
    bin_value,
    config,
    in_run,
    load_bins,
    packed_bins,
    row_value,
    store_bins,
)
from .launch import (
    INTERPRETED,
    INTERPRETED_ELEMENTS,
    SINGLE,
    beside_columns,
    i32,
    i64,
    launch_again,
    launch_first,
    launch_key,
    lay_out,
    layout,
    matrix_offsets,
    packed,
    stride_names,
    tile_rows,
)
from .math import (
    entropy_term,
    expectation_grad,
    exponential,
    logarithm,
    moments_grad,
    peak_window,
    reciprocal,
    square_root_grad,
)

# What a launch computes.
STATISTICS, MOMENTS, PEAK = 0, 1, 2

# Operands of the functions below are tuples (pointer or None, row stride, column stride) within a
# run; what a matrix has besides comes apart, as in distribution.py.


@triton.jit
def column(operand, j):
    """The operand that is its column j, a value per row."""
    return (operand[0] + j * operand[2], operand[1])


@triton.jit
def store_column(out, j, row, value, inside):
    tl.store(out[0] + j * out[2] + row * out[1], value, mask=inside)


@triton.jit
def held_summary(
    pred,
    grad,
    upstream,
    values,
    out,
    row,
    inside,
    KIND: tl.constexpr,
    TOPK: tl.constexpr,
    ADD_MEAN: tl.constexpr,
    WINDOW: tl.constexpr,
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
    """The summary, or with grad its gradient, of N groups of TOGETHER rows, `row` being the first
    of each. A thread holds all bins of its rows.
    """
    z = load_bins(
        pred,
        pred[2],
        row,
        inside,
        K,
        N,
        TOGETHER,
        VECTOR,
        CHUNK,
        PRED_CONTIGUOUS,
        PRED_UNIT,
    )
    gradients = ()
    for i in tl.static_range(TOGETHER):
        row_i = row + i
        high = z[i * K].to(ACC)
        for k in tl.static_range(1, K):
            high = tl.maximum(high, z[i * K + k].to(ACC))
        peak = tl.zeros((N,), ACC)
        if KIND == 2:
            for k in tl.static_range(K):
                peak = tl.where(z[i * K + K - 1 - k].to(ACC) == high, K - 1.0 - k, peak)
        e = ()
        sums = tl.zeros((N,), ACC)
        moment = tl.zeros((N,), ACC)
        mean_s = tl.zeros((N,), ACC)
        for k in tl.static_range(K):
            s = z[i * K + k].to(ACC) - high
            e_k = exponential(s)
            if KIND == 2:
                e_k *= peak_window(k, peak, WINDOW)
            e = e + (e_k,)
            sums += e_k
            if KIND > 0:
                moment += e_k * bin_value(values, k, ACC)
            if KIND == 1:
                mean_s += entropy_term(e_k, s)
        inverse = reciprocal(sums, FAST)
        moment *= inverse
        mean_s *= inverse
        if KIND == 0:
            # Every logit takes the place of the first lower one of a list, and all from there on
            # move down by one. An equal one stays in front.
            top = ()
            place = ()
            for _ in tl.static_range(TOPK):
                top = top + (tl.full((N,), float("-inf"), ACC),)
                place = place + (tl.full((N,), -1, tl.int32),)
            for k in tl.static_range(K):
                z_k = z[i * K + k].to(ACC)
                x = z_k
                at = tl.full((N,), k, tl.int32)
                tops = ()
                places = ()
                for j in tl.static_range(TOPK):
                    above = z_k > top[j]
                    tops = tops + (tl.where(above, x, top[j]),)
                    x = tl.where(above, top[j], x)
                    if grad[0] is not None:
                        places = places + (tl.where(above, at, place[j]),)
                        at = tl.where(above, place[j], at)
                top = tops
                if grad[0] is not None:
                    place = places
            total = tl.zeros((N,), ACC)
            if grad[0] is None:
                for j in tl.static_range(TOPK):
                    p = exponential(top[j] - high) * inverse
                    total += p
                    store_column(out, j, row_i, p, inside)
                if ADD_MEAN:
                    store_column(out, TOPK, row_i, total * (1.0 / TOPK), inside)
            else:
                of_mean = tl.zeros((N,), ACC)
                if ADD_MEAN:
                    of_mean = row_value(column(upstream, TOPK), row_i, inside, ACC) * (1.0 / TOPK)
                of_top = ()
                for j in tl.static_range(TOPK):
                    g_j = row_value(column(upstream, j), row_i, inside, ACC) + of_mean
                    of_top = of_top + (g_j,)
                    total += g_j * exponential(top[j] - high) * inverse
                for k in tl.static_range(K):
                    of_bin = tl.zeros((N,), ACC)
                    for j in tl.static_range(TOPK):
                        of_bin = tl.where(place[j] == k, of_top[j], of_bin)
                    g = expectation_grad(e[k] * inverse, of_bin, total)
                    gradients = gradients + (g.to(grad[0].dtype.element_ty),)
        elif KIND == 1:
            variance = tl.zeros((N,), ACC)
            for k in tl.static_range(K):
                away = bin_value(values, k, ACC) - moment
                variance += e[k] * (away * away)
            variance *= inverse
            std = tl.sqrt(variance)
            if grad[0] is None:
                store_column(out, 0, row_i, moment, inside)
                store_column(out, 1, row_i, std, inside)
                store_column(out, 2, row_i, logarithm(sums) - mean_s, inside)
            else:
                by_mean = row_value(column(upstream, 0), row_i, inside, ACC)
                by_std = row_value(column(upstream, 1), row_i, inside, ACC)
                by_entropy = row_value(column(upstream, 2), row_i, inside, ACC)
                by_variance = by_std * square_root_grad(std)
                for k in tl.static_range(K):
                    s = z[i * K + k].to(ACC) - high
                    y = bin_value(values, k, ACC)
                    g = moments_grad(
                        e[k] * inverse,
                        y,
                        s,
                        moment,
                        variance,
                        mean_s,
                        by_mean,
                        by_variance,
                        by_entropy,
                    )
                    gradients = gradients + (g.to(grad[0].dtype.element_ty),)
        else:
            if grad[0] is None:
                store_column(out, 0, row_i, moment, inside)
            else:
                inverse *= row_value(column(upstream, 0), row_i, inside, ACC)
                for k in tl.static_range(K):
                    g = expectation_grad(e[k] * inverse, bin_value(values, k, ACC), moment)
                    gradients = gradients + (g.to(grad[0].dtype.element_ty),)
    if grad[0] is not None:
        store_bins(
            gradients,
            grad,
            grad[2],
            row,
            inside,
            K,
            N,
            TOGETHER,
            VECTOR,
            CHUNK,
            GRAD_CONTIGUOUS,
            GRAD_UNIT,
        )


@triton.jit
def wide_summary(
    pred,
    grad,
    upstream,
    values,
    out,
    row,
    inside,
    KIND: tl.constexpr,
    TOPK: tl.constexpr,
    ADD_MEAN: tl.constexpr,
    WINDOW: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    PADDED: tl.constexpr,
    RUNS: tl.constexpr,
    PRED_CONTIGUOUS: tl.constexpr,
    PRED_UNIT: tl.constexpr,
    GRAD_CONTIGUOUS: tl.constexpr,
    GRAD_UNIT: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
):
    """The same for more bins or places than a thread can hold: N rows as a tile, padded to PADDED
    bins.
    """
    k = tl.arange(0, PADDED)[None, :]
    real = (k < K) & inside[:, None]
    at = matrix_offsets(0, row[:, None], k, pred[1], pred[2], PRED_CONTIGUOUS, PRED_UNIT)
    z = tl.load(beside_columns(pred[0], RUNS) + at, mask=real, other=0.0).to(ACC)
    z = tl.where(k < K, z, float("-inf"))  # padding never wins and adds exp(-inf) = 0
    high = tl.max(z, axis=1)
    s = z - high[:, None]
    e = exponential(s)
    if KIND == 2:
        peak = tl.min(tl.where((z == high[:, None]) & (k < K), k, PADDED), axis=1)
        e *= peak_window(k, peak[:, None], WINDOW)
    sums = tl.sum(e, axis=1)
    inverse = reciprocal(sums, FAST)
    if KIND == 0:
        free = real
        of_bin = tl.zeros((N, PADDED), ACC)
        total = tl.zeros((N,), ACC)
        of_mean = tl.zeros((N,), ACC)
        if grad[0] is not None and ADD_MEAN:
            of_mean = row_value(column(upstream, TOPK), row, inside, ACC) * (1.0 / TOPK)
        for j in range(TOPK):
            top = tl.max(tl.where(free, z, float("-inf")), axis=1)
            place = tl.min(tl.where(free & (z == top[:, None]), k, PADDED), axis=1)
            here = k == place[:, None]
            free = free & (k != place[:, None])
            p = exponential(top - high) * inverse
            if grad[0] is None:
                total += p
                store_column(out, j, row, p, inside)
            else:
                g_j = row_value(column(upstream, j), row, inside, ACC) + of_mean
                of_bin = tl.where(here, g_j[:, None], of_bin)
                total += g_j * p
        if grad[0] is None and ADD_MEAN:
            store_column(out, TOPK, row, total * (1.0 / TOPK), inside)
        g = expectation_grad(e * inverse[:, None], of_bin, total[:, None])
    else:
        if values is None:
            y = k.to(ACC)
        else:
            y = tl.load(values + k, mask=k < K, other=0.0).to(ACC)
        mean = tl.sum(e * y, axis=1) * inverse
        if KIND == 1:
            away = y - mean[:, None]
            variance = tl.sum(e * (away * away), axis=1) * inverse
            std = tl.sqrt(variance)
            mean_s = tl.sum(entropy_term(e, s), axis=1) * inverse
            if grad[0] is None:
                store_column(out, 0, row, mean, inside)
                store_column(out, 1, row, std, inside)
                store_column(out, 2, row, logarithm(sums) - mean_s, inside)
                g = e
            else:
                by_std = row_value(column(upstream, 1), row, inside, ACC)
                g = moments_grad(
                    e * inverse[:, None],
                    y,
                    s,
                    mean[:, None],
                    variance[:, None],
                    mean_s[:, None],
                    row_value(column(upstream, 0), row, inside, ACC)[:, None],
                    (by_std * square_root_grad(std))[:, None],
                    row_value(column(upstream, 2), row, inside, ACC)[:, None],
                )
        else:
            if grad[0] is None:
                store_column(out, 0, row, mean, inside)
                g = e
            else:
                inverse *= row_value(column(upstream, 0), row, inside, ACC)
                g = expectation_grad(e * inverse[:, None], y, mean[:, None])
    if grad[0] is not None:
        at = matrix_offsets(0, row[:, None], k, grad[1], grad[2], GRAD_CONTIGUOUS, GRAD_UNIT)
        tl.store(beside_columns(grad[0], RUNS) + at, g.to(grad[0].dtype.element_ty), mask=real)


_MATRICES = ("pred", "grad")
_VECTORS = ("upstream", "out")


@triton.jit(do_not_specialize=[*stride_names(_MATRICES, _VECTORS), "upstream_column", "out_column"])
def summary_kernel(
    pred,  # [rows, K] logits
    upstream,  # [rows, columns], with grad
    values,  # [K] of the bins or None
    out,  # [rows, columns], without grad
    grad,  # [rows, K] or None
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
    upstream_outer: "i64",
    upstream_middle: "i64",
    upstream_row: "i64",
    upstream_column: "i64",
    out_outer: "i64",
    out_middle: "i64",
    out_row: "i64",
    out_column: "i64",
    KIND: tl.constexpr,
    TOPK: tl.constexpr,
    ADD_MEAN: tl.constexpr,
    WINDOW: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,  # of a tile
    TOGETHER: tl.constexpr,  # rows of a group
    WIDE: tl.constexpr,
    VECTOR: tl.constexpr,
    CHUNK: tl.constexpr,
    RUNS: tl.constexpr,
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
    outer, middle, row, inside = tile_rows(
        tl.program_id(0), rows, tiles_per_run, middle_size, GROUPS, TOGETHER, RUNS, False
    )
    pred_at = (
        in_run(pred, outer, middle, pred_outer, pred_middle, PRED_UNIT),
        pred_row,
        pred_column,
    )
    grad_at = (
        None if grad is None else in_run(grad, outer, middle, grad_outer, grad_middle, GRAD_UNIT),
        grad_row,
        grad_column,
    )
    upstream_at = (
        None
        if upstream is None
        else in_run(upstream, outer, middle, upstream_outer, upstream_middle, 1),
        upstream_row,
        upstream_column,
    )
    out_at = (
        None if out is None else in_run(out, outer, middle, out_outer, out_middle, 1),
        out_row,
        out_column,
    )
    if WIDE:
        wide_summary(
            pred_at,
            grad_at,
            upstream_at,
            values,
            out_at,
            row,
            inside,
            KIND,
            TOPK,
            ADD_MEAN,
            WINDOW,
            K,
            GROUPS,
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
        held_summary(
            pred_at,
            grad_at,
            upstream_at,
            values,
            out_at,
            row,
            inside,
            KIND,
            TOPK,
            ADD_MEAN,
            WINDOW,
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
                held_summary(
                    pred_at,
                    grad_at,
                    upstream_at,
                    values,
                    out_at,
                    left_over,
                    left_over < rows,
                    KIND,
                    TOPK,
                    ADD_MEAN,
                    WINDOW,
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


# Comparisons of a logit with a place that one thread may have to make: the code has each of them.
HELD_COMPARISONS = 300


def _config(bins: int, topk: int, *layout) -> Config:
    shape = config(bins, *layout)
    if not shape.wide and bins * topk * shape.together > HELD_COMPARISONS:
        padded = triton.next_power_of_2(bins)
        elements = INTERPRETED_ELEMENTS if INTERPRETED else distribution.WIDE_ELEMENTS
        return Config(max(1, elements // padded), 1, padded, padded, True, 4)
    return shape


def _per_row(tensor: Tensor | None, columns: bool) -> tuple[Tensor | None, int]:
    """(its first column, the step to the next)"""
    if tensor is None or not columns:
        return tensor, 0
    return tensor.select(-1, 0), tensor.stride(-1)


def _launch(
    kind: int,
    pred: Tensor,
    values: Tensor | None = None,
    *,
    topk: int = 0,
    add_mean: bool = False,
    window: int = 0,
    upstream: Tensor | None = None,
    out: Tensor | None = None,
    grad: Tensor | None = None,
) -> Tensor:
    """One launch of summary_kernel over all rows; returns what it wrote."""
    result = out if grad is None else grad
    if not pred.numel():
        return result
    bins = pred.shape[-1]

    def arguments(_tiles: int) -> tuple[Any, ...]:
        return pred, upstream, values, out, grad

    key = launch_key(summary_kernel, arguments(0), kind, topk, add_mean, window)
    if launch_again(key, arguments):
        return result
    upstream_rows, upstream_column = _per_row(upstream, kind != PEAK)
    out_rows, out_column = _per_row(out, kind != PEAK)
    operands = (
        (("pred", layout(pred)), ("grad", layout(grad))),
        (("upstream", layout(upstream_rows)), ("out", layout(out_rows))),
    )
    found = lay_out(128, *operands)
    if found is None:
        new = torch.empty(result.shape, dtype=result.dtype, device=result.device)
        pred, upstream = packed(pred, upstream)
        written = {"out": new} if grad is None else {"grad": new, "upstream": upstream}
        _launch(kind, pred, values, topk=topk, add_mean=add_mean, window=window, **written)
        return result.copy_(new)
    _, rows = found
    shape = _config(
        bins,
        topk,
        pred.element_size(),
        rows["PRED_CONTIGUOUS"],
        rows["RUNS"] == SINGLE and rows["pred_row"] * rows["PRED_UNIT"] == bins,
        min(rows["PRED_UNIT"], rows["PRED_UNIT"] if grad is None else rows["GRAD_UNIT"]),
    )
    tiles, rows = lay_out(shape.groups * shape.together, *operands)
    launch_first(
        summary_kernel,
        key,
        tiles,
        arguments,
        upstream_column=upstream_column,
        out_column=out_column,
        KIND=kind,
        TOPK=topk,
        ADD_MEAN=add_mean,
        WINDOW=window,
        K=bins,
        GROUPS=shape.groups,
        TOGETHER=shape.together,
        VECTOR=shape.vector,
        CHUNK=shape.chunk,
        WIDE=shape.wide,
        num_warps=shape.warps,
        **rows,
    )
    return result


def statistics_forward(pred: Tensor, topk: int, add_mean: bool) -> Tensor:
    """gfl_kernels::statistics_forward: the highest probabilities of each row, and their mean."""
    out = ops.new_statistics(pred, topk, add_mean)
    return _launch(STATISTICS, pred, topk=topk, add_mean=add_mean, out=out)


def statistics_backward(upstream: Tensor, pred: Tensor, topk: int, add_mean: bool) -> Tensor:
    """gfl_kernels::statistics_backward: pred's gradient."""
    grad = torch.empty_like(pred)
    return _launch(STATISTICS, pred, topk=topk, add_mean=add_mean, upstream=upstream, grad=grad)


def moments_forward(pred: Tensor, bins: Tensor | None) -> Tensor:
    """gfl_kernels::moments_forward: mean, standard deviation and entropy of each row."""
    return _launch(MOMENTS, pred, packed_bins(bins), out=ops.new_moments(pred))


def moments_backward(upstream: Tensor, pred: Tensor, bins: Tensor | None) -> Tensor:
    """gfl_kernels::moments_backward: pred's gradient."""
    grad = torch.empty_like(pred)
    return _launch(MOMENTS, pred, packed_bins(bins), upstream=upstream, grad=grad)


def integral_forward(
    pred: Tensor, bins: Tensor | None, window: int = -1, save: bool = False
) -> tuple[Tensor, Tensor]:
    """gfl_kernels::integral_forward: the expectation of each row, and zeros for what these kernels
    do not save.
    """
    saved = ops.new_saved(pred, save)
    if saved.numel():
        saved.zero_()
    if window < 0:
        return distribution.integral_forward(pred, bins), saved
    out = ops.new_integral(pred)
    return _launch(PEAK, pred, packed_bins(bins), window=window, out=out), saved


def integral_backward(
    upstream: Tensor,
    pred: Tensor,
    bins: Tensor | None,
    window: int = -1,
    saved: Tensor | None = None,
) -> Tensor:
    """gfl_kernels::integral_backward: pred's gradient."""
    if window < 0:
        return distribution.integral_backward(upstream, pred, bins)
    grad = torch.empty_like(pred)
    return _launch(PEAK, pred, packed_bins(bins), window=window, upstream=upstream, grad=grad)
