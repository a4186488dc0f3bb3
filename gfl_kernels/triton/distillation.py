"""Localization distillation: one kernel for the loss and its gradient."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .distribution import in_run, row_factor, row_weight
from .launch import (
    INTERPRETED,
    INTERPRETED_ELEMENTS,
    NONE,
    beside_columns,
    extent,
    finish_sum,
    fp64,
    i32,
    i64,
    in_matrix,
    launch_again,
    launch_first,
    launch_key,
    lay_out,
    layout,
    loss_ops,
    loss_scale,
    loss_workspace,
    packed,
    scale_factor,
    stride_names,
    tile_rows,
)
from .math import (
    distillation_grad,
    distillation_loss,
    distillation_term,
    exponential,
    logarithm,
    reciprocal,
)


@triton.jit
def tempered(at, mask, real, inverse_temperature, ACC: tl.constexpr, FAST: tl.constexpr):
    """(a, exp(a), its sum) of rows of logits, a = (z - max z) / T."""
    z = tl.load(at, mask=mask & real, other=0.0).to(ACC)
    z = tl.where(real, z, float("-inf"))  # padding never wins and adds exp(-inf) = 0
    a = (z - tl.max(z, axis=1)[:, None]) * inverse_temperature
    e = exponential(a)
    return a, e, tl.sum(e, axis=1)


_MATRICES = ("pred", "teacher", "grad")
_VECTORS = ("weight", "upstream")


@triton.jit(do_not_specialize=stride_names(_MATRICES, _VECTORS))
def distillation_kernel(
    pred,  # [rows, K] logits
    teacher,  # [rows, K] logits
    weight,  # [rows] or None
    upstream,  # [] or [rows] or None
    avg_factor,  # [] or None
    loss,  # [] or [rows] or None
    partials,
    counter,
    grad,  # [rows, K] or None
    inverse_temperature: "fp64",
    scale: "fp64",
    rows: "i64",  # of the innermost row dimension, in units of ROW_UNIT
    tiles_per_run: "i32",
    middle_size: "i32",
    pred_outer: "i64",
    pred_middle: "i64",
    pred_row: "i64",
    pred_column: "i64",
    teacher_outer: "i64",
    teacher_middle: "i64",
    teacher_row: "i64",
    teacher_column: "i64",
    grad_outer: "i64",
    grad_middle: "i64",
    grad_row: "i64",
    grad_column: "i64",
    weight_outer: "i64",
    weight_middle: "i64",
    weight_row: "i64",
    upstream_outer: "i64",
    upstream_middle: "i64",
    upstream_row: "i64",
    K: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
    RUNS: tl.constexpr,
    LOSS: tl.constexpr,  # ABSENT, SCALAR or PER_ROW, as the next one
    UPSTREAM: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    PRED_CONTIGUOUS: tl.constexpr,
    PRED_UNIT: tl.constexpr,
    TEACHER_CONTIGUOUS: tl.constexpr,
    TEACHER_UNIT: tl.constexpr,
    GRAD_CONTIGUOUS: tl.constexpr,
    GRAD_UNIT: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
):
    """A tile is TILE neighbouring rows [TILE, PADDED] of student and teacher."""
    rows = rows * ROW_UNIT
    factor = scale_factor(scale, avg_factor, ACC)
    up = factor
    if UPSTREAM == 1:
        up = factor * tl.load(upstream).to(ACC)
    outer, middle, row, inside = tile_rows(
        tl.program_id(0), rows, tiles_per_run, middle_size, TILE, 1, RUNS, False
    )
    outer_2, middle_2 = beside_columns(outer, RUNS), beside_columns(middle, RUNS)
    weight_at = (None, 0)
    if weight is not None:
        weight_at = (in_run(weight, outer, middle, weight_outer, weight_middle, 1), weight_row)
    upstream_at = (None, 0)
    if UPSTREAM == 2:
        upstream_at = (
            in_run(upstream, outer, middle, upstream_outer, upstream_middle, 1),
            upstream_row,
        )
    w = row_weight(weight_at, row, inside, ACC)
    read = (w != 0.0)[:, None]
    k = tl.arange(0, PADDED)[None, :]
    real = k < K
    t = tl.full((), inverse_temperature, ACC)
    pred_at = (pred, pred_outer, pred_middle, pred_row, pred_column)
    at = in_matrix(pred_at, outer_2, middle_2, row[:, None], k, PRED_CONTIGUOUS, PRED_UNIT)
    a, e, sums = tempered(at, read, real, t, ACC, FAST)
    teacher_at = (teacher, teacher_outer, teacher_middle, teacher_row, teacher_column)
    at = in_matrix(teacher_at, outer_2, middle_2, row[:, None], k, TEACHER_CONTIGUOUS, TEACHER_UNIT)
    b, f, teacher_sums = tempered(at, read, real, t, ACC, FAST)
    inverse = reciprocal(sums, FAST)
    teacher_inverse = reciprocal(teacher_sums, FAST)
    if LOSS != 0:
        terms = tl.sum(distillation_term(f, b - a), axis=1) * teacher_inverse
        value = distillation_loss(terms, logarithm(sums), logarithm(teacher_sums))
        value = tl.where(w == 0.0, 0.0, value * w)
        if LOSS == 2:
            at = loss + (outer * middle_size + middle) * rows + row
            tl.store(at, value * factor, mask=inside)
        else:
            total = tl.sum(tl.where(inside, value, 0.0)).to(tl.float64)
            finish_sum(total, factor, loss, partials, counter)
    if grad is not None:
        by_row = row_factor(w, up * t, upstream_at, row, inside, ACC)[:, None]
        g = distillation_grad(e * inverse[:, None], f * teacher_inverse[:, None]) * by_row
        if weight is not None:
            g = tl.where(w[:, None] == 0.0, 0.0, g)
        grad_at = (grad, grad_outer, grad_middle, grad_row, grad_column)
        at = in_matrix(grad_at, outer_2, middle_2, row[:, None], k, GRAD_CONTIGUOUS, GRAD_UNIT)
        tl.store(at, g.to(grad.dtype.element_ty), mask=inside[:, None] & real)


def _launch(
    pred: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    avg_factor: Tensor | None,
    temperature: float,
    scale: float,
    reduction: int,
    *,
    upstream: Tensor | None = None,
    loss: Tensor | None = None,
    grad: Tensor | None = None,
) -> None:
    """One launch of distillation_kernel over all rows."""
    bins = pred.shape[-1]
    per_row = reduction == NONE
    total_scale = loss_scale(scale, reduction, pred)
    tensors = (pred, teacher, weight, upstream, avg_factor, loss)

    def arguments(tiles: int) -> tuple[Any, ...]:
        partials, counter = loss_workspace(loss, per_row, tiles)
        return *tensors, partials, counter, grad, 1 / temperature, total_scale

    key = launch_key(distillation_kernel, (*tensors, grad), per_row)
    if launch_again(key, arguments):
        return
    padded = triton.next_power_of_2(bins)
    tile = max(1, (INTERPRETED_ELEMENTS if INTERPRETED else 2048) // padded)
    found = lay_out(
        tile,
        tuple(zip(_MATRICES, map(layout, (pred, teacher, grad)), strict=True)),
        (("weight", layout(weight)), ("upstream", layout(upstream) if per_row else None)),
    )
    if found is None:
        copies = packed(pred, teacher, weight)
        if per_row:
            (upstream,) = packed(upstream)
        result = None if grad is None else torch.empty_like(copies[0])
        _launch(
            *copies,
            avg_factor,
            temperature,
            scale,
            reduction,
            upstream=upstream,
            loss=loss,
            grad=result,
        )
        if grad is not None:
            grad.copy_(result)
        return
    tiles, rows = found
    launch_first(
        distillation_kernel,
        key,
        tiles,
        arguments,
        K=bins,
        PADDED=padded,
        TILE=tile,
        LOSS=extent(loss, per_row),
        UPSTREAM=extent(upstream, per_row),
        num_warps=4,
        **rows,
    )


distillation_forward, distillation_backward = loss_ops(_launch)
