"""Decoding for inference: one kernel from logits to boxes, scores and labels."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import accumulate_dtype
from .launch import (
    INTERPRETED,
    INTERPRETED_ELEMENTS,
    acc_type,
    beside_columns,
    fast,
    fp64,
    i32,
    i64,
    in_matrix,
    lay_out,
    layout,
    on_device,
    packed,
    stride_names,
    tile_rows,
)
from .math import (
    clip_coordinate,
    decode_side,
    exponential,
    peak_window,
    reciprocal,
    sigmoid,
    surpasses,
)


@triton.jit
def assess_side(
    z,  # [rows, PADDED], -inf where no bin is
    k,  # [1, PADDED]
    y,  # as k
    window,
    PEAK: tl.constexpr,
    DEVIATION: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
):
    """(expectation, standard deviation) of rows."""
    high = tl.max(z, axis=1)[:, None]
    e = exponential(z - high)
    near = e
    if PEAK:
        peak = tl.min(tl.where(z == high, k, z.shape[1]), axis=1)[:, None]
        near = e * peak_window(k.to(ACC), peak.to(ACC), window)
    distance = tl.sum(near * y, axis=1) * reciprocal(tl.sum(near, axis=1), FAST)
    if DEVIATION:
        inverse = reciprocal(tl.sum(e, axis=1), FAST)
        away = y - (tl.sum(e * y, axis=1) * inverse)[:, None]
        return distance, tl.sqrt(tl.sum(e * (away * away), axis=1) * inverse)
    else:
        return distance, distance


@triton.jit
def store_sides(to, sides, number, inside):
    """Four values a row, neighbours in memory."""
    pairs = tl.join(tl.join(sides[0], sides[2]), tl.join(sides[1], sides[3]))
    at = 4 * number[:, None] + tl.arange(0, 4)[None, :]
    tl.store(to + at, tl.reshape(pairs, (number.shape[0], 4)), mask=inside[:, None])


@triton.jit
def highest_class(
    cls,  # as in_matrix takes it
    outer,
    middle,
    row,
    inside,
    C: tl.constexpr,
    STEP: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
):
    """(highest sigmoid, its class) of rows, of equals the first; of a NaN, if there is one."""
    high = tl.full((row.shape[0], STEP), float("-inf"), ACC)
    best = tl.zeros((row.shape[0], STEP), tl.int32)
    for first in range(0, C, STEP):
        c = first + tl.arange(0, STEP)[None, :]
        at = in_matrix(cls, outer, middle, row[:, None], c, CONTIGUOUS, UNIT)
        x = tl.load(at, mask=inside[:, None] & (c < C), other=float("-inf")).to(ACC)
        higher = surpasses(x, high)
        high = tl.where(higher, x, high)
        best = tl.where(higher, c, best)
    nan = high != high
    wrong = tl.max(nan.to(tl.int32), axis=1) > 0
    top = tl.max(tl.where(nan, float("-inf"), high), axis=1)
    chosen = tl.where(wrong[:, None], nan, high == top[:, None])
    label = tl.min(tl.where(chosen, best, C), axis=1)
    return tl.where(wrong, float("nan"), sigmoid(top, FAST)), label.to(tl.int64)


_MATRICES = ("pred", "cls", "points", "limits")
_VECTORS = ("strides",)


@triton.jit(do_not_specialize=stride_names(_MATRICES, _VECTORS))
def decode_kernel(
    pred,  # [rows, 4 K] logits
    points,  # [rows, 2]
    strides,  # [rows] or None
    values,  # [K] of the bins or None
    cls,  # [rows, C] or None
    limits,  # [rows, 2] or None
    boxes,  # [rows, 4]
    score,  # [rows] or None
    label,  # [rows] or None
    deviation,  # [rows, 4] or None
    stride: "fp64",
    height: "fp64",
    width: "fp64",
    window: "fp64",
    rows: "i64",  # of the innermost row dimension, in units of ROW_UNIT
    tiles_per_run: "i32",
    middle_size: "i32",
    pred_outer: "i64",
    pred_middle: "i64",
    pred_row: "i64",
    pred_column: "i64",
    cls_outer: "i64",
    cls_middle: "i64",
    cls_row: "i64",
    cls_column: "i64",
    points_outer: "i64",
    points_middle: "i64",
    points_row: "i64",
    points_column: "i64",
    limits_outer: "i64",
    limits_middle: "i64",
    limits_row: "i64",
    limits_column: "i64",
    strides_outer: "i64",
    strides_middle: "i64",
    strides_row: "i64",
    K: tl.constexpr,
    PADDED: tl.constexpr,
    C: tl.constexpr,
    STEP: tl.constexpr,
    TILE: tl.constexpr,
    RUNS: tl.constexpr,
    PEAK: tl.constexpr,
    CLIP: tl.constexpr,  # to one image
    ROW_UNIT: tl.constexpr,
    PRED_CONTIGUOUS: tl.constexpr,
    PRED_UNIT: tl.constexpr,
    CLS_CONTIGUOUS: tl.constexpr,
    CLS_UNIT: tl.constexpr,
    POINTS_CONTIGUOUS: tl.constexpr,
    POINTS_UNIT: tl.constexpr,
    LIMITS_CONTIGUOUS: tl.constexpr,
    LIMITS_UNIT: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
):
    """A tile is TILE neighbouring rows, and a side of them at a time [TILE, PADDED]."""
    rows = rows * ROW_UNIT
    outer, middle, row, inside = tile_rows(
        tl.program_id(0), rows, tiles_per_run, middle_size, TILE, 1, RUNS, False
    )
    number = (outer * middle_size + middle) * rows + row
    outer_2, middle_2 = beside_columns(outer, RUNS), beside_columns(middle, RUNS)
    pixels = tl.full((), stride, ACC)
    if strides is not None:
        at = outer * strides_outer + middle * strides_middle + row * strides_row
        pixels = tl.load(strides + at, mask=inside, other=0).to(ACC)
    points_at = (points, points_outer, points_middle, points_row, points_column)
    limits_at = (limits, limits_outer, limits_middle, limits_row, limits_column)
    pred_at = (pred, pred_outer, pred_middle, pred_row, pred_column)
    k = tl.arange(0, PADDED)[None, :]
    real = k < K
    y = k.to(ACC)
    if values is not None:
        y = tl.load(values + k, mask=real, other=0.0).to(ACC)
    corners = ()
    spreads = ()
    for side in tl.static_range(4):
        at = in_matrix(
            pred_at, outer_2, middle_2, row[:, None], side * K + k, PRED_CONTIGUOUS, PRED_UNIT
        )
        z = tl.load(at, mask=inside[:, None] & real, other=0.0).to(ACC)
        z = tl.where(real, z, float("-inf"))  # padding never wins and adds exp(-inf) = 0
        distance, spread = assess_side(
            z, k, y, tl.full((), window, ACC), PEAK, deviation is not None, ACC, FAST
        )
        axis = tl.full((), side % 2, tl.int32)
        at = in_matrix(points_at, outer, middle, row, axis, POINTS_CONTIGUOUS, POINTS_UNIT)
        point = tl.load(at, mask=inside, other=0).to(ACC)
        x = decode_side(side, point, distance * pixels)
        if limits is not None:  # height comes first
            at = in_matrix(limits_at, outer, middle, row, 1 - axis, LIMITS_CONTIGUOUS, LIMITS_UNIT)
            x = clip_coordinate(x, tl.load(at, mask=inside, other=0).to(ACC))
        elif CLIP:
            x = clip_coordinate(x, tl.full((), height if side % 2 else width, ACC))
        corners = corners + (x,)
        spreads = spreads + (spread * pixels,)
    store_sides(boxes, corners, number, inside)
    if deviation is not None:
        store_sides(deviation, spreads, number, inside)
    if cls is not None:
        cls_at = (cls, cls_outer, cls_middle, cls_row, cls_column)
        high, best = highest_class(
            cls_at, outer_2, middle_2, row, inside, C, STEP, CLS_CONTIGUOUS, CLS_UNIT, ACC, FAST
        )
        tl.store(score + number, high, mask=inside)
        tl.store(label + number, best, mask=inside)


def decode_boxes(
    pred: Tensor,
    points: Tensor,
    strides: Tensor | None,
    bins: Tensor | None,
    cls: Tensor | None,
    limits: Tensor | None,
    stride: float,
    size: list[float],
    window: int,
    write_deviation: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gfl_kernels::decode_boxes: (boxes, score, label, deviation)."""
    rows = pred.shape[:-1]
    dtype = accumulate_dtype(pred.dtype)
    boxes = torch.empty((*rows, 4), dtype=dtype, device=pred.device)
    deviation = torch.empty_like(boxes) if write_deviation else boxes.new_empty(0)
    score = boxes.new_empty(0 if cls is None else rows)
    label = torch.empty(score.shape, dtype=torch.int64, device=pred.device)
    if not boxes.numel():
        return boxes, score, label, deviation
    count = pred.shape[-1] // 4
    padded = triton.next_power_of_2(count)
    tile = max(16, (INTERPRETED_ELEMENTS if INTERPRETED else 4096) // padded)
    classes = 1 if cls is None else cls.shape[-1]

    def operands():
        return (
            tuple(zip(_MATRICES, map(layout, (pred, cls, points, limits)), strict=True)),
            (("strides", layout(strides)),),
        )

    found = lay_out(tile, *operands())
    if found is None:
        pred, points, strides, cls, limits = packed(pred, points, strides, cls, limits)
        found = lay_out(tile, *operands())
    tiles, arguments = found
    height, width = size or (0.0, 0.0)
    with on_device(pred):
        decode_kernel[(tiles,)](
            pred,
            points,
            strides,
            None if bins is None else bins.contiguous(),
            cls,
            limits,
            boxes,
            None if cls is None else score,
            None if cls is None else label,
            deviation if write_deviation else None,
            stride,
            height,
            width,
            window,
            K=count,
            PADDED=padded,
            C=classes,
            STEP=min(32, triton.next_power_of_2(classes)),
            TILE=tile,
            PEAK=window >= 0,
            CLIP=bool(size),
            ACC=acc_type(pred.dtype),
            FAST=fast(),
            num_warps=4,
            enable_fp_fusion=True,
            **arguments,
        )
    return boxes, score, label, deviation
