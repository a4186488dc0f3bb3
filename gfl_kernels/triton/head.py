"""The losses of a whole head: four kernels, each one launch over the levels of a pyramid.

What differs from level to level comes in tuples, an entry per level: pointers, and integers (tile
ranges, sizes, strides) as encode() makes them. A program's tile is neighbouring cells of one image
of one level, as launch.tile_rows has them.
"""

import math
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import LOGITS, VARIFOCAL, accumulate_dtype
from .launch import (
    COLUMNS,
    INTERPRETED,
    INTERPRETED_ELEMENTS,
    NEITHER,
    ROWS,
    Layout,
    acc_type,
    fast,
    fp64,
    i64,
    in_matrix,
    is_last,
    layout,
    on_device,
    sum_partials,
    sum_workspace,
    tile_rows,
)
from .math import (
    box_iou,
    box_loss_grad,
    distribution_grad,
    distribution_loss,
    expectation_grad,
    exponential,
    logarithm,
    quotient,
    reciprocal,
    sigmoid,
    split_target,
)
from .quality import class_index, quality_rows
from .quality import config as quality_config

# Levels

# Triton specialises on the integers of a tuple whatever a kernel asks for: on 1, on multiples of 16
# and on what fits 32 bits. Odd numbers beyond 2^32 are none of it.
_CODE_OFFSET = 1 << 40
CODE_OFFSET = tl.constexpr(_CODE_OFFSET)


def encode(values: Sequence[int]) -> tuple[int, ...]:
    return tuple(2 * (value + _CODE_OFFSET) + 1 for value in values)


# Of a level in `levels`: the number of its first tile, tiles in a run, runs in an image, cells in a
# run, anchors of the levels before it, and whether everything in it is aligned to 16 bytes.
LEVEL_FIELDS = tl.constexpr(6)

# Which levels are.
NO_LEVEL, SOME_LEVELS, ALL_LEVELS = 0, 1, 2


@triton.jit
def of_level(values, level, FIELD: tl.constexpr = 0, FIELDS: tl.constexpr = 1):
    """A level's own value of a tuple that holds FIELDS per level."""
    result = values[FIELD]
    for i in tl.static_range(1, len(values) // FIELDS):
        result = tl.where(level == i, values[i * FIELDS + FIELD], result)
    return result


@triton.jit
def decode(code):
    return (code >> 1) - CODE_OFFSET


@triton.jit
def integer_of(codes, level, FIELD: tl.constexpr, FIELDS: tl.constexpr):
    return decode(of_level(codes, level, FIELD, FIELDS))


@triton.jit
def matrix_of(pointers, strides, level):
    """(pointer, outer, middle, row and column stride), as quality_rows takes it."""
    return (
        of_level(pointers, level),
        integer_of(strides, level, 0, 4),
        integer_of(strides, level, 1, 4),
        integer_of(strides, level, 2, 4),
        integer_of(strides, level, 3, 4),
    )


@triton.jit
def stride_of(pixels, level, ACC: tl.constexpr):
    """The stride of a level in pixels, which comes in two parts."""
    return of_level(pixels, level, 0, 2).to(ACC) + of_level(pixels, level, 1, 2).to(ACC)


@triton.jit
def value_of_cell(pointers, strides, level, outer, cell, inside):
    """A value per cell [B, n], as it lies in memory; 0 where masked."""
    at = outer * integer_of(strides, level, 0, 2) + cell * integer_of(strides, level, 1, 2)
    return tl.load(of_level(pointers, level) + at, mask=inside, other=0)


@triton.jit
def level_of_tile(levels):
    """(level, number in the level) of this program's tile."""
    tile = tl.program_id(0)
    level = 0
    for i in tl.static_range(1, len(levels) // LEVEL_FIELDS):
        level += (tile >= decode(levels[i * LEVEL_FIELDS])).to(tl.int32)
    return level, tile - integer_of(levels, level, 0, LEVEL_FIELDS).to(tl.int32)


@triton.jit
def is_for(VECTORS: tl.constexpr, ALIGNED: tl.constexpr, levels, level):
    """Whether a level is one for the code with vectors, or for that without, VECTORS = 0."""
    return (ALIGNED != 1) | (integer_of(levels, level, 5, LEVEL_FIELDS) == VECTORS)


@triton.jit
def cells_of_tile(
    levels, level, tile, TILE: tl.constexpr, UNIT: tl.constexpr, CLAMPED: tl.constexpr
):
    """(outer, middle, row, inside, cell, anchor) of a tile: the cell in its image and level, the
    anchor in its image. In int64. UNIT: a run is a multiple of so many cells.
    """
    tiles_per_run = integer_of(levels, level, 1, LEVEL_FIELDS).to(tl.int32)
    middle_size = integer_of(levels, level, 2, LEVEL_FIELDS).to(tl.int32)
    rows = integer_of(levels, level, 3, LEVEL_FIELDS)
    if UNIT > 1:
        rows = rows // UNIT * UNIT  # for the compiler to see
    outer, middle, row, inside = tile_rows(
        tile, rows, tiles_per_run, middle_size, TILE, 1, 1, CLAMPED
    )
    cell = middle * rows + row
    return outer, middle, row, inside, cell, integer_of(levels, level, 4, LEVEL_FIELDS) + cell


@triton.jit
def positive_cells(
    labels, label_strides, level, outer, cell, inside, C: tl.constexpr, DENSE: tl.constexpr
):
    label = value_of_cell(labels, label_strides, level, outer, cell, inside)
    if DENSE:
        return inside & (label != 0)
    else:
        return inside & (class_index(label, C) >= 0)


@triton.jit
def at_least_1(x):
    """A NaN stays one."""
    return tl.where(x < 1.0, 1.0, x)


@triton.jit
def divisors(normalisers, DENSE: tl.constexpr):
    """What the loss of classes and the losses of boxes are divided by, in float64."""
    first = tl.load(normalisers).to(tl.float64)
    if DENSE:
        first = at_least_1(first)
    else:
        first += 1.1920928955078125e-07  # reference.EPS
    return first, at_least_1(tl.load(normalisers + 1).to(tl.float64))


@triton.jit
def upstream_of_level(total, each, each_step, level):
    """The upstream gradient of a loss: of its total, of the level, both, or 0 for neither."""
    result = tl.full((), 0.0, tl.float64)
    if total is not None:
        result += tl.load(total).to(tl.float64)
    if each is not None:
        result += tl.load(each + level * each_step).to(tl.float64)
    return result


# Positives. They are few: a program walks those of its tile, GROUP at a time. What there is of each
# side of each box is [4 * GROUP], the sides left, top, right and bottom of one box neighbours.


@triton.jit
def ranks(positive):
    """How many positives of the tile come before each; -1 where there is none."""
    return tl.where(positive, tl.cumsum(positive.to(tl.int32), axis=0) - 1, -1)


@triton.jit
def place_of(rank, n):
    """Where in the tile the n-th positives are; 0 where there are not so many."""
    place = tl.arange(0, rank.shape[0])[None, :]
    return tl.sum(tl.where(rank[None, :] == n[:, None], place, 0), axis=1)


@triton.jit
def for_sides(x, GROUP: tl.constexpr):
    """[GROUP] as [4 * GROUP]."""
    return tl.reshape(tl.broadcast_to(x[:, None], (GROUP, 4)), (4 * GROUP,))


@triton.jit
def split_sides(x, GROUP: tl.constexpr):
    """[4 * GROUP] as a tuple of four [GROUP]."""
    horizontal, vertical = tl.split(tl.reshape(x, (GROUP, 2, 2)))
    x1, x2 = tl.split(horizontal)
    y1, y2 = tl.split(vertical)
    return x1, y1, x2, y2


@triton.jit
def join_sides(parts, GROUP: tl.constexpr):
    pairs = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
    return tl.reshape(pairs, (4 * GROUP,))


@triton.jit
def assess_boxes(
    box,  # matrix_of
    points,
    point_strides,
    targets,  # of boxes
    target_strides,
    stride,
    level,
    outer,
    middle,
    row,  # [4 * GROUP], as the next
    cell,
    side,  # 0 to 3
    there,
    limit,
    K: tl.constexpr,
    PADDED: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
):
    """(corner, target, distance, e, inverse, left, wl, wr, dfl) of each side, lengths in units of
    the stride: the softmax is e * inverse, e [4 * GROUP, PADDED]. Where nothing is there nothing is
    read.
    """
    k = tl.arange(0, PADDED)[None, :]
    real = k < K
    at = in_matrix(box, outer, middle, row[:, None], (side * K)[:, None] + k, 0, 1)
    z = tl.load(at, mask=there[:, None] & real, other=0.0).to(ACC)
    z = tl.where(real, z, float("-inf"))  # padding never wins and adds exp(-inf) = 0
    shifted = z - tl.max(z, axis=1)[:, None]
    e = exponential(shifted)
    sums = tl.sum(e, axis=1)
    inverse = reciprocal(sums, FAST)
    distance = tl.sum(e * k.to(ACC), axis=1) * inverse

    at = of_level(points, level) + cell * integer_of(point_strides, level, 0, 2)
    at += (side % 2) * integer_of(point_strides, level, 1, 2)
    point = quotient(tl.load(at, mask=there, other=0.0).to(ACC), stride)
    at = of_level(targets, level) + outer * integer_of(target_strides, level, 0, 3)
    at += cell * integer_of(target_strides, level, 1, 3)
    at += side * integer_of(target_strides, level, 2, 3)
    target = quotient(tl.load(at, mask=there, other=0.0).to(ACC), stride)
    low = side < 2
    corner = tl.where(low, point - distance, point + distance)
    left, wl, wr = split_target(tl.where(low, point - target, target - point), limit)
    z_left = tl.sum(tl.where(left[:, None] == k, shifted, 0.0), axis=1)
    z_right = tl.sum(tl.where(left[:, None] == k - 1, shifted, 0.0), axis=1)
    dfl = distribution_loss(logarithm(sums), wl, wr, z_left, z_right)
    return corner, target, distance, e, inverse, left, wl, wr, dfl


@triton.jit
def highest_score(
    cls,  # matrix_of
    outer,
    middle,
    row,  # [GROUP]
    there,
    C: tl.constexpr,
    STEP: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
):
    """The highest sigmoid of an anchor; NaN if one of its logits is."""
    high = tl.full((row.shape[0], STEP), float("-inf"), ACC)
    for first in range(0, C, STEP):
        c = first + tl.arange(0, STEP)[None, :]
        at = in_matrix(cls, outer, middle, row[:, None], c, 0, 1)
        x = tl.load(at, mask=there[:, None] & (c < C), other=float("-inf")).to(ACC)
        high = tl.where((x > high) | (x != x), x, high)
    wrong = tl.max((high != high).to(tl.int32), axis=1) > 0
    return tl.where(wrong, float("nan"), sigmoid(tl.max(high, axis=1), FAST))


@triton.jit
def sum_of_targets(
    targets,  # matrix_of
    outer,
    middle,
    row,  # [GROUP]
    there,
    C: tl.constexpr,
    STEP: tl.constexpr,
    ACC: tl.constexpr,
):
    total = tl.zeros((row.shape[0], STEP), ACC)
    for first in range(0, C, STEP):
        c = first + tl.arange(0, STEP)[None, :]
        at = in_matrix(targets, outer, middle, row[:, None], c, 0, 1)
        total += tl.load(at, mask=there[:, None] & (c < C), other=0.0).to(ACC)
    return tl.sum(total, axis=1)


@triton.jit
def finish_boxes(partials, levels, sums, normalisers, batch, DENSE: tl.constexpr):
    """sums and normalisers out of what every program left: its box loss, DFL, weight and count of
    positives.
    """
    weight = tl.full((), 0.0, tl.float64)
    LEVELS: tl.constexpr = len(levels) // LEVEL_FIELDS
    for i in tl.static_range(LEVELS):
        begin = decode(levels[i * LEVEL_FIELDS]).to(tl.int32)
        end = tl.num_programs(0)
        if i + 1 < LEVELS:
            end = decode(levels[(i + 1) * LEVEL_FIELDS]).to(tl.int32)
        for term in tl.static_range(2):
            total = sum_partials(partials + term, begin, end, 4)
            tl.store(sums + 2 * i + term, total.to(sums.dtype.element_ty))
        weight += sum_partials(partials + 2, begin, end, 4)
    first = weight
    if not DENSE:
        # At least one positive an image.
        first = tl.full((), 0.0, tl.float64)
        for start in range(0, batch, 32):
            image = start + tl.arange(0, 32)
            # Summed after the loops: within one, Triton 3.6 does not compile it for a single level.
            counts = tl.zeros((32, 32), tl.float64)
            for i in tl.static_range(LEVELS):
                begin = decode(levels[i * LEVEL_FIELDS]).to(tl.int32)
                runs = decode(levels[i * LEVEL_FIELDS + 2])
                tiles = (runs * decode(levels[i * LEVEL_FIELDS + 1])).to(tl.int32)
                for tile in range(0, tiles, 32):
                    t = tile + tl.arange(0, 32)[None, :]
                    at = begin + image[:, None] * tiles + t
                    there = (image[:, None] < batch) & (t < tiles)
                    counts += tl.load(
                        partials + 4 * at + 3, mask=there, other=0.0, cache_modifier=".cg"
                    )
            count = tl.sum(counts, axis=1)
            first += tl.sum(tl.where(image < batch, at_least_1(count), 0.0))
    tl.store(normalisers, first.to(normalisers.dtype.element_ty))
    tl.store(normalisers + 1, weight.to(normalisers.dtype.element_ty))


@triton.jit(do_not_specialize=["batch", "anchors"])
def head_boxes_kernel(
    cls,  # per level [B, cells, C]; None with targets
    box,  # per level [B, cells, 4 K]
    points,  # per level [n, 2]
    labels,  # per level [B, n]
    box_targets,  # per level [B, n, 4]
    targets,  # per level [B, cells, C] or None
    quality,  # [B, A]
    weight,  # [B, A]
    sums,  # [L, 2]
    normalisers,  # [2]
    boxes,  # [B, A, 4] or None
    partials,  # [programs, 4]
    counter,
    levels,
    cls_strides,
    box_strides,
    point_strides,
    label_strides,
    box_target_strides,
    target_strides,
    pixels,
    batch: "i64",
    anchors: "i64",
    iou_eps: "fp64",
    limit: "fp64",
    C: tl.constexpr,
    K: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    IOU_KIND: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
):
    """What the losses of boxes need, of positives alone."""
    DENSE: tl.constexpr = targets is not None
    level, tile = level_of_tile(levels)
    outer, middle, row, inside, cell, anchor = cells_of_tile(levels, level, tile, TILE, 1, False)
    positive = positive_cells(labels, label_strides, level, outer, cell, inside, C, DENSE)
    negative = inside & (positive == 0)
    at = outer * anchors + anchor
    zeros = tl.zeros((TILE,), ACC)
    tl.store(quality + at, zeros, mask=negative)
    tl.store(weight + at, zeros, mask=negative)
    if boxes is not None:
        for s in tl.static_range(4):
            tl.store(boxes + 4 * at + s, zeros, mask=negative)
    count = tl.sum(positive.to(tl.int32), axis=0)
    loss_bbox = tl.full((), 0.0, tl.float64)
    loss_dfl = tl.full((), 0.0, tl.float64)
    total_weight = tl.full((), 0.0, tl.float64)
    if count > 0:
        rank = ranks(positive)
        start = tl.min(row, axis=0)
        to_anchor = tl.min(at - row, axis=0)  # the same for all
        to_cell = tl.min(cell - row, axis=0)
        stride = stride_of(pixels, level, ACC)
        logits = matrix_of(box, box_strides, level)
        if DENSE:
            scores = matrix_of(targets, target_strides, level)
        else:
            scores = matrix_of(cls, cls_strides, level)
        for first in range(0, count, GROUP):
            n = first + tl.arange(0, GROUP)
            row_n = start + place_of(rank, n)
            row_4 = for_sides(row_n, GROUP)
            there = n < count
            corner, target, _, _, _, _, _, _, dfl = assess_boxes(
                logits,
                points,
                point_strides,
                box_targets,
                box_target_strides,
                stride,
                level,
                outer,
                middle,
                row_4,
                to_cell + row_4,
                tl.arange(0, 4 * GROUP) % 4,
                first + tl.arange(0, 4 * GROUP) // 4 < count,
                tl.full((), limit, ACC),
                K,
                PADDED,
                ACC,
                FAST,
            )
            corners = split_sides(corner, GROUP)
            goals = split_sides(target, GROUP)
            loss, _ = box_loss_grad(IOU_KIND, corners, goals, tl.full((), iou_eps, ACC))
            if DENSE:
                w = sum_of_targets(scores, outer, middle, row_n, there, C, STEP, ACC)
            else:
                w = highest_score(scores, outer, middle, row_n, there, C, STEP, ACC, FAST)
            dfl = tl.sum(tl.reshape(dfl, (GROUP, 4)), axis=1)
            loss_bbox += tl.sum(tl.where(there, loss * w, 0.0).to(tl.float64))
            loss_dfl += tl.sum(tl.where(there, dfl * w, 0.0).to(tl.float64))
            total_weight += tl.sum(tl.where(there, w, 0.0).to(tl.float64))
            at_n = to_anchor + row_n
            tl.store(quality + at_n, box_iou(corners, goals), mask=there)
            tl.store(weight + at_n, w, mask=there)
            if boxes is not None:
                for s in tl.static_range(4):
                    tl.store(boxes + 4 * at_n + s, corners[s] * stride, mask=there)
    mine = partials + 4 * tl.program_id(0)
    tl.store(mine, loss_bbox)
    tl.store(mine + 1, loss_dfl)
    tl.store(mine + 2, total_weight)
    tl.store(mine + 3, count.to(tl.float64))
    if is_last(counter):
        finish_boxes(partials, levels, sums, normalisers, batch, DENSE)


@triton.jit
def zero_rows(
    grad,  # matrix_of
    outer,
    middle,
    row,
    mask,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    UNIT,
):
    zeros = tl.zeros((row.shape[0], STEP), grad[0].dtype.element_ty)
    for first in tl.static_range(0, COLUMNS, STEP):
        column = first + tl.arange(0, STEP)[None, :]
        at = in_matrix(grad, outer, middle, row[:, None], column, CONTIGUOUS, UNIT)
        tl.store(at, zeros, mask=mask[:, None] & (column < COLUMNS))


@triton.jit(do_not_specialize=["bbox_step", "dfl_step", "anchors"])
def head_box_grad_kernel(
    box,
    points,
    labels,
    box_targets,
    weight,  # [B, A]
    normalisers,
    up_bbox,  # [] or None, as the next; [L] or None
    up_dfl,
    up_levels_bbox,
    up_levels_dfl,
    grad,  # per level, as box
    levels,
    box_strides,
    point_strides,
    label_strides,
    box_target_strides,
    grad_strides,
    pixels,
    bbox_step: "i64",
    dfl_step: "i64",
    anchors: "i64",
    iou_eps: "fp64",
    limit: "fp64",
    weight_bbox: "fp64",
    weight_dfl: "fp64",
    C: tl.constexpr,
    K: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    IOU_KIND: tl.constexpr,
    DENSE: tl.constexpr,
    ALIGNED: tl.constexpr,
    GRAD_CONTIGUOUS: tl.constexpr,
    GRAD_UNIT: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
):
    """The gradient of the box logits: of a tile without positives zeros, nothing being read."""
    level, tile = level_of_tile(levels)
    outer, middle, row, inside, cell, anchor = cells_of_tile(levels, level, tile, TILE, 1, False)
    positive = positive_cells(labels, label_strides, level, outer, cell, inside, C, DENSE)
    to = matrix_of(grad, grad_strides, level)
    count = tl.sum(positive.to(tl.int32), axis=0)
    if count == 0:
        # In vectors, which a mask of positives would forbid.
        for VECTORS in tl.static_range(2):
            if ALIGNED == 1 or ALIGNED == 2 * VECTORS:
                if is_for(VECTORS, ALIGNED, levels, level):
                    UNIT: tl.constexpr = GRAD_UNIT if VECTORS == 1 else 1
                    ROWS: tl.constexpr = UNIT if GRAD_CONTIGUOUS == 2 else 1
                    o, m, r, i, _, _ = cells_of_tile(levels, level, tile, TILE, ROWS, False)
                    zero_rows(to, o, m, r, i, 4 * K, STEP, GRAD_CONTIGUOUS, UNIT)
    else:
        unit = 1
        if ALIGNED == 1:
            unit = tl.where(integer_of(levels, level, 5, LEVEL_FIELDS) != 0, GRAD_UNIT, 1)
        if ALIGNED == 2:
            unit = GRAD_UNIT
        negative = inside & (positive == 0)
        zero_rows(to, outer, middle, row, negative, 4 * K, STEP, GRAD_CONTIGUOUS, unit)
        rank = ranks(positive)
        start = tl.min(row, axis=0)
        to_anchor = outer * anchors + tl.min(anchor - row, axis=0)  # the same for all
        to_cell = tl.min(cell - row, axis=0)
        stride = stride_of(pixels, level, ACC)
        divisor = divisors(normalisers, DENSE)[1]
        factor = upstream_of_level(up_bbox, up_levels_bbox, bbox_step, level)
        bbox_factor = (factor * weight_bbox / divisor).to(ACC)
        factor = upstream_of_level(up_dfl, up_levels_dfl, dfl_step, level)
        dfl_factor = (factor * weight_dfl / divisor).to(ACC)
        logits = matrix_of(box, box_strides, level)
        side = tl.arange(0, 4 * GROUP) % 4
        k = tl.arange(0, PADDED)[None, :]
        for first in range(0, count, GROUP):
            there = first + tl.arange(0, 4 * GROUP) // 4 < count
            place = place_of(rank, first + tl.arange(0, GROUP))
            row_n = start + for_sides(place, GROUP)
            corner, target, distance, e, inverse, left, wl, wr, _ = assess_boxes(
                logits,
                points,
                point_strides,
                box_targets,
                box_target_strides,
                stride,
                level,
                outer,
                middle,
                row_n,
                to_cell + row_n,
                side,
                there,
                tl.full((), limit, ACC),
                K,
                PADDED,
                ACC,
                FAST,
            )
            corners = split_sides(corner, GROUP)
            goals = split_sides(target, GROUP)
            _, by_corners = box_loss_grad(IOU_KIND, corners, goals, tl.full((), iou_eps, ACC))
            by_distance = join_sides(by_corners, GROUP)
            w = tl.load(weight + to_anchor + row_n, mask=there, other=0.0)
            by_distance = tl.where(side < 2, -by_distance, by_distance) * (w * bbox_factor)
            wl *= w * dfl_factor
            wr *= w * dfl_factor
            p = e * inverse[:, None]
            is_left = left[:, None] == k
            is_right = left[:, None] == k - 1
            g = by_distance[:, None] * expectation_grad(p, k.to(ACC), distance[:, None])
            total_p = p * (wl + wr)[:, None]
            g += distribution_grad(total_p, is_left, is_right, wl[:, None], wr[:, None])
            column = (side * K)[:, None] + k
            at = in_matrix(to, outer, middle, row_n[:, None], column, GRAD_CONTIGUOUS, unit)
            tl.store(at, g.to(to[0].dtype.element_ty), mask=there[:, None] & (k < K))


# Classes


@triton.jit
def finish_losses(
    partials,
    levels,
    sums,
    by_cls,
    by_bbox,
    by_dfl,
    losses,  # of classes, boxes, distributions: [] each, then [L] each
):
    """The losses in total and per level, out of every program's sum and of head_boxes' sums."""
    TYPE: tl.constexpr = losses[0].dtype.element_ty
    LEVELS: tl.constexpr = len(levels) // LEVEL_FIELDS
    cls = tl.full((), 0.0, tl.float64)
    bbox = tl.full((), 0.0, tl.float64)
    dfl = tl.full((), 0.0, tl.float64)
    for i in tl.static_range(LEVELS):
        begin = decode(levels[i * LEVEL_FIELDS]).to(tl.int32)
        end = tl.num_programs(0)
        if i + 1 < LEVELS:
            end = decode(levels[(i + 1) * LEVEL_FIELDS]).to(tl.int32)
        of_cls = sum_partials(partials, begin, end) * by_cls
        of_bbox = tl.load(sums + 2 * i).to(tl.float64) * by_bbox
        of_dfl = tl.load(sums + 2 * i + 1).to(tl.float64) * by_dfl
        tl.store(losses[3] + i, of_cls.to(TYPE))
        tl.store(losses[4] + i, of_bbox.to(TYPE))
        tl.store(losses[5] + i, of_dfl.to(TYPE))
        cls += of_cls
        bbox += of_bbox
        dfl += of_dfl
    tl.store(losses[0], cls.to(TYPE))
    tl.store(losses[1], bbox.to(TYPE))
    tl.store(losses[2], dfl.to(TYPE))


@triton.jit(do_not_specialize=["up_step", "anchors"])
def head_cls_kernel(
    cls,  # per level [B, cells, C]
    labels,  # per level [B, n]; None with targets
    targets,  # per level [B, cells, C] or None
    label_weights,  # per level [B, n] or None
    quality,  # [B, A]
    sums,
    normalisers,
    up_cls,  # [] or None; backward
    up_levels,  # [L] or None
    losses,  # a tuple of six, or None
    grad,  # per level, as cls, or None
    partials,
    counter,
    levels,
    cls_strides,
    label_strides,
    target_strides,
    label_weight_strides,
    grad_strides,
    up_step: "i64",
    anchors: "i64",
    weight_cls: "fp64",
    weight_bbox: "fp64",
    weight_dfl: "fp64",
    alpha: "fp64",
    beta: "fp64",
    C: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    FORM: tl.constexpr,  # LOGITS, or with targets VARIFOCAL
    SQUARE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CLS_CONTIGUOUS: tl.constexpr,
    CLS_UNIT: tl.constexpr,
    GRAD_CONTIGUOUS: tl.constexpr,
    GRAD_UNIT: tl.constexpr,
    TARGET_CONTIGUOUS: tl.constexpr,
    TARGET_UNIT: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
):
    """Quality or Varifocal Loss of every anchor, or its gradient: quality_kernel over levels."""
    DENSE: tl.constexpr = targets is not None
    WEIGHT: tl.constexpr = 0 if label_weights is None else 2
    # As in quality_kernel.
    CLAMPED: tl.constexpr = CLS_CONTIGUOUS != 2 and label_weights is None
    level, tile = level_of_tile(levels)
    divisor, box_divisor = divisors(normalisers, DENSE)
    partial = tl.full((), 0.0, tl.float64)
    for VECTORS in tl.static_range(2):
        if ALIGNED == 1 or ALIGNED == 2 * VECTORS:
            if is_for(VECTORS, ALIGNED, levels, level):
                UNIT: tl.constexpr = CLS_UNIT if VECTORS == 1 else 1
                ROWS: tl.constexpr = UNIT if CLS_CONTIGUOUS == 2 else 1
                outer, middle, row, inside, cell, anchor = cells_of_tile(
                    levels, level, tile, TILE, ROWS, CLAMPED
                )
                read = inside
                w = tl.where(inside, 1.0, 0.0).to(ACC)
                if label_weights is not None:
                    w = value_of_cell(
                        label_weights, label_weight_strides, level, outer, cell, inside
                    ).to(ACC)
                    read = w != 0.0
                g_factor = w
                if grad is not None:
                    up = upstream_of_level(up_cls, up_levels, up_step, level)
                    # A row of weight 0 stays out whatever comes from upstream.
                    g_factor = tl.where(read, w * (up * weight_cls / divisor).to(ACC), 0.0)
                label, score = None, None
                if not DENSE:
                    label = class_index(
                        value_of_cell(labels, label_strides, level, outer, cell, inside), C
                    )
                    score = tl.load(quality + outer * anchors + anchor, mask=read, other=0.0)
                to, goals = (None, 0, 0, 0, 0), (None, 0, 0, 0, 0)
                if grad is not None:
                    to = matrix_of(grad, grad_strides, level)
                if DENSE:
                    goals = matrix_of(targets, target_strides, level)
                row_loss = quality_rows(
                    matrix_of(cls, cls_strides, level),
                    to,
                    goals,
                    (None, 0, 0, 0, 0),
                    label,
                    score,
                    outer,
                    middle,
                    row,
                    inside,
                    read,
                    g_factor,
                    tl.full((), alpha, ACC),
                    tl.full((), beta, ACC),
                    C,
                    TILE,
                    STEP,
                    1,  # two steps at once spill registers: those of the levels come on top
                    1,
                    CLAMPED,
                    FORM,
                    False,
                    False,
                    SQUARE,
                    WEIGHT,
                    losses is not None,
                    CLS_CONTIGUOUS,
                    UNIT,
                    GRAD_CONTIGUOUS,
                    GRAD_UNIT if VECTORS == 1 else 1,
                    TARGET_CONTIGUOUS,
                    TARGET_UNIT if VECTORS == 1 else 1,
                    0,
                    1,
                    ACC,
                    FAST,
                )
                if losses is not None:
                    partial += tl.sum(tl.where(inside, row_loss * w, 0.0)).to(tl.float64)
    if losses is not None:
        tl.store(partials + tl.program_id(0), partial)
        if is_last(counter):
            by_cls = weight_cls / divisor
            by_bbox = weight_bbox / box_divisor
            by_dfl = weight_dfl / box_divisor
            finish_losses(partials, levels, sums, by_cls, by_bbox, by_dfl, losses)


# Launches


class LevelLayout(NamedTuple):
    """What a kernel is told about where the cells of all levels lie."""

    programs: int
    levels: tuple[int, ...]
    strides: dict[str, tuple[int, ...]]  # four per level
    constants: dict[str, int]  # ALIGNED; NAME_CONTIGUOUS and NAME_UNIT of wide matrices


@lru_cache(maxsize=1024)
def lay_out_levels(
    tile_rows: int, matrices: tuple[tuple[str, tuple[Layout, ...]], ...], wide: tuple[str, ...] = ()
) -> LevelLayout:
    """matrices: (name, layout per level) of tensors [B, cells..., columns] with one or two
    dimensions of cells. wide: those that are read or written in vectors; the first says whether
    tiles go along cells that lie next to each other.

    An image's cells are one run if that holds for every matrix of their level, else a run is a row
    of them. As in launch.lay_out, strides of a wide matrix are counted in units of NAME_UNIT
    elements, in levels where all of them are multiples of 16 bytes.
    """
    count = len(matrices[0][1])
    runs = []  # (images, runs of an image, cells of a run) per level
    raw = {name: [] for name, _ in matrices}  # (outer, middle, row, column) per level
    for i in range(count):
        items = [layouts[i] for _, layouts in matrices]
        batch, *cells, _ = items[0].shape
        height, width = cells if len(cells) == 2 else (1, *cells)
        steps = [item.strides[1:-1] if len(cells) == 2 else (0, item.strides[1]) for item in items]
        if height == 1 or width == 1 or all(down == width * right for down, right in steps):
            rows = [(0, down if width == 1 else right) for down, right in steps]
            runs.append((batch, 1, height * width))
        else:
            rows = steps
            runs.append((batch, height, width))
        for (name, _), item, row in zip(matrices, items, rows, strict=True):
            raw[name].append((item.strides[0], *row, item.strides[-1]))

    filled = [i for i in range(count) if 0 not in matrices[0][1][i].shape]
    aligned = [i in filled and bool(wide) for i in range(count)]
    constants = {}
    for name, layouts in matrices:
        if name not in wide:
            continue
        if layouts[0].shape[-1] > 1 and all(raw[name][i][3] == 1 for i in filled):
            contiguous, dropped = COLUMNS, 3
        elif all(raw[name][i][2] == 1 or runs[i][2] == 1 for i in filled):
            contiguous, dropped = ROWS, 2
        else:
            contiguous, dropped = NEITHER, None
        unit = 1 if contiguous == NEITHER else 16 // layouts[0].itemsize
        for i in filled:
            others = [step for j, step in enumerate(raw[name][i]) if j != dropped]
            others.append(runs[i][2] if contiguous == ROWS else 0)
            aligned[i] &= all(step % unit == 0 for step in others)
        constants |= {f"{name.upper()}_CONTIGUOUS": contiguous, f"{name.upper()}_UNIT": unit}
    strides = {
        name: encode(
            [
                step // (constants[f"{name.upper()}_UNIT"] if name in wide and aligned[i] else 1)
                for i in range(count)
                for step in raw[name][i]
            ]
        )
        for name, _ in matrices
    }
    levels, programs, anchors = [], 0, 0
    for (batch, middle, rows), is_aligned in zip(runs, aligned, strict=True):
        tiles_per_run = -(-rows // tile_rows)
        levels += [programs, tiles_per_run, middle, rows, anchors, is_aligned]
        programs += batch * middle * tiles_per_run
        anchors += middle * rows
    every = all(aligned[i] for i in filled)
    if wide:
        constants["ALIGNED"] = ALL_LEVELS if every else SOME_LEVELS if any(aligned) else NO_LEVEL
    return LevelLayout(programs, encode(levels), strides, constants)


def _layouts(name: str, tensors: Sequence[Tensor]) -> tuple[str, tuple[Layout, ...]]:
    return name, tuple(layout(tensor) for tensor in tensors)


def _steps(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return encode([step for tensor in tensors for step in tensor.stride()])


def _labels(labels: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(t.view(torch.uint8) if t.dtype is torch.bool else t for t in labels)


@lru_cache(maxsize=1024)
def _in_two_parts(strides: tuple[float, ...]) -> tuple[float, ...]:
    """Triton takes floats of a tuple as float32: what that rounds away is the second."""
    high = struct.unpack(f"{len(strides)}f", struct.pack(f"{len(strides)}f", *strides))
    return tuple(x for a, b in zip(strides, high, strict=True) for x in (b, a - b))


class BoxConfig(NamedTuple):
    rows: int  # of a tile
    padded: int  # bins
    group: int  # positives at a time
    step: int  # columns that are zeroed at a time


def box_config(bins: int, itemsize: int) -> BoxConfig:
    """A row for each of 128 lanes, eight bins of positives. Steps are 32 bytes."""
    padded = triton.next_power_of_2(bins)
    rows, most, elements = (512, 64, INTERPRETED_ELEMENTS) if INTERPRETED else (128, 16, 1024)
    return BoxConfig(rows, padded, min(most, max(1, elements // (4 * padded))), 32 // itemsize)


def _anchors(cls: Sequence[Tensor]) -> int:
    return sum(math.prod(level.shape[1:-1]) for level in cls)


def _check(cls, box, points, labels, box_targets, targets, label_weights) -> None:
    """What memory safety needs, for those who call the ops themselves."""
    names = ("cls", "box", "points", "labels", "box_targets", "targets", "label_weights")
    lists = (cls, box, points, labels, box_targets, targets, label_weights)
    batch, classes, channels = cls[0].shape[0], cls[0].shape[-1], box[0].shape[-1]
    for name, tensors in zip(names, lists, strict=True):
        if len(tensors) != len(cls) and (tensors or name not in ("targets", "label_weights")):
            raise ValueError(f"head: {name} must have {len(cls)} levels, got {len(tensors)}")
    for i, level in enumerate(cls):
        cells = level.shape[1:-1]
        anchors = math.prod(cells)
        shapes = (
            (batch, *cells, classes),
            (batch, *cells, channels),
            (anchors, 2),
            (batch, anchors),
            (batch, anchors, 4),
            (batch, *cells, classes),
            (batch, anchors),
        )
        for name, shape, tensors in zip(names, shapes, lists, strict=True):
            if not tensors:
                continue
            tensor = tensors[i]
            if tensor.shape != shape or len(cells) not in (1, 2):
                raise ValueError(f"head: {name}[{i}] has shape {tuple(tensor.shape)}, not {shape}")
            if tensor.dtype is not tensors[0].dtype or tensor.is_complex():
                raise ValueError(f"head: {name}[{i}] has dtype {tensor.dtype}")


def head_boxes(
    cls,
    box,
    points,
    labels,
    box_targets,
    targets,
    label_weights,
    strides,
    iou,
    iou_eps,
    limit,
    write_boxes,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """gfl_kernels::head_boxes."""
    _check(cls, box, points, labels, box_targets, targets, label_weights)
    batch, classes, bins = cls[0].shape[0], cls[0].shape[-1], box[0].shape[-1] // 4
    anchors = _anchors(cls)
    dtype = accumulate_dtype(cls[0].dtype)
    make = cls[0].new_empty
    quality, weight = make((batch, anchors), dtype=dtype), make((batch, anchors), dtype=dtype)
    boxes = make((batch, anchors, 4) if write_boxes else (0,), dtype=dtype)
    sums, normalisers = make((len(cls), 2), dtype=dtype), make((2,), dtype=dtype)
    if batch * anchors == 0:
        sums.zero_()
        normalisers.zero_()
        if not targets:
            normalisers[0] = batch  # images without positives count as having one
        return quality, weight, sums, normalisers, boxes
    shape = box_config(bins, box[0].element_size())
    scores = ("targets", targets) if targets else ("cls", cls)
    laid = lay_out_levels(shape.rows, (_layouts("box", box), _layouts(*scores)))
    partials, counter = sum_workspace(cls[0].device, 4 * laid.programs)
    with on_device(cls[0]):
        head_boxes_kernel[(laid.programs,)](
            None if targets else tuple(cls),
            tuple(box),
            tuple(points),
            _labels(labels),
            tuple(box_targets),
            tuple(targets) or None,
            quality,
            weight,
            sums,
            normalisers,
            boxes if write_boxes else None,
            partials,
            counter,
            laid.levels,
            laid.strides.get("cls"),
            laid.strides["box"],
            _steps(points),
            _steps(labels),
            _steps(box_targets),
            laid.strides.get("targets"),
            _in_two_parts(tuple(strides)),
            batch,
            anchors,
            iou_eps,
            limit,
            C=classes,
            K=bins,
            PADDED=shape.padded,
            TILE=shape.rows,
            GROUP=shape.group,
            STEP=min(32, triton.next_power_of_2(classes)),
            IOU_KIND=iou,
            ACC=acc_type(cls[0].dtype),
            FAST=fast(),
            num_warps=4,
        )
    return quality, weight, sums, normalisers, boxes


def _check_form(form: int, targets) -> None:
    if form != LOGITS and not (form == VARIFOCAL and targets):
        raise ValueError(f"head: form must be LOGITS, or with targets VARIFOCAL, got {form}")


def _launch_cls(
    cls,
    labels,
    targets,
    label_weights,
    quality,
    sums,
    normalisers,
    form,
    alpha,
    beta,
    loss_weights,
    *,
    upstream=(None, None),
    losses=None,
    grad=None,
) -> None:
    """One launch of head_cls_kernel."""
    classes = cls[0].shape[-1]
    matrices = [_layouts("cls", cls)]
    if grad:
        matrices.append(_layouts("grad", grad))
    if targets:
        matrices.append(_layouts("target", targets))
    wide = ("cls", "grad", "target")
    found = lay_out_levels(64, tuple(matrices), wide)
    shape = quality_config(
        classes,
        cls[0].element_size(),
        found.constants["CLS_UNIT"] if found.constants["ALIGNED"] else 1,
        found.constants["CLS_CONTIGUOUS"] == ROWS,
        beta == 2,
        bool(targets),
        grad is not None,
        probabilities=False,
        shifted=False,
    )
    laid = lay_out_levels(shape.rows, tuple(matrices), wide)
    partials, counter = None, None
    if losses:
        partials, counter = sum_workspace(cls[0].device, laid.programs)
    none = {"GRAD_CONTIGUOUS": NEITHER, "GRAD_UNIT": 1, "TARGET_CONTIGUOUS": NEITHER,
            "TARGET_UNIT": 1}  # fmt: skip
    with on_device(cls[0]):
        head_cls_kernel[(laid.programs,)](
            tuple(cls),
            None if targets else _labels(labels),
            tuple(targets) or None,
            tuple(label_weights) or None,
            quality,
            sums,
            normalisers,
            *upstream,
            losses,
            grad,
            partials,
            counter,
            laid.levels,
            laid.strides["cls"],
            None if targets else _steps(labels),
            laid.strides.get("target"),
            _steps(label_weights) or None,
            laid.strides.get("grad"),
            0 if upstream[1] is None else upstream[1].stride(0),
            quality.shape[1],
            *loss_weights,
            alpha,
            beta,
            C=classes,
            TILE=shape.rows,
            STEP=shape.step,
            FORM=form,
            maxnreg=None if cls[0].dtype is torch.float64 else 96 if grad else 80,
            SQUARE=beta == 2,
            ACC=acc_type(cls[0].dtype),
            FAST=fast(),
            num_warps=shape.warps,
            enable_fp_fusion=True,
            **none | laid.constants,
        )


def _launch_box_grad(
    box,
    points,
    labels,
    box_targets,
    dense,
    classes,
    weight,
    normalisers,
    strides,
    iou,
    iou_eps,
    limit,
    loss_weights,
    upstream,
    grad,
) -> None:
    """One launch of head_box_grad_kernel. upstream: in total and per level, of box loss and DFL."""
    bins = box[0].shape[-1] // 4
    shape = box_config(bins, box[0].element_size())
    laid = lay_out_levels(shape.rows, (_layouts("grad", grad), _layouts("box", box)), ("grad",))
    bbox, dfl, levels_bbox, levels_dfl = upstream
    with on_device(box[0]):
        head_box_grad_kernel[(laid.programs,)](
            tuple(box),
            tuple(points),
            _labels(labels),
            tuple(box_targets),
            weight,
            normalisers,
            bbox,
            dfl,
            levels_bbox,
            levels_dfl,
            grad,
            laid.levels,
            laid.strides["box"],
            _steps(points),
            _steps(labels),
            _steps(box_targets),
            laid.strides["grad"],
            _in_two_parts(tuple(strides)),
            0 if levels_bbox is None else levels_bbox.stride(0),
            0 if levels_dfl is None else levels_dfl.stride(0),
            weight.shape[1],
            iou_eps,
            limit,
            *loss_weights[1:],
            C=classes,
            K=bins,
            PADDED=shape.padded,
            TILE=shape.rows,
            GROUP=shape.group,
            STEP=shape.step,
            IOU_KIND=iou,
            DENSE=dense,
            ACC=acc_type(box[0].dtype),
            FAST=fast(),
            num_warps=4,
            **laid.constants,
        )


def head_forward(
    cls,
    box,
    points,
    labels,
    box_targets,
    targets,
    label_weights,
    quality,
    weight,
    sums,
    normalisers,
    strides,
    iou,
    iou_eps,
    limit,
    form,
    alpha,
    beta,
    loss_weights,
    write_grad,
) -> tuple:
    """gfl_kernels::head_forward."""
    _check(cls, box, points, labels, box_targets, targets, label_weights)
    _check_form(form, targets)
    make = sums.new_empty if quality.numel() else sums.new_zeros
    losses = tuple(make(shape) for shape in [()] * 3 + [(len(cls),)] * 3)
    if quality.numel():
        rest = (quality, sums, normalisers, form, alpha, beta, loss_weights)
        _launch_cls(cls, labels, targets, label_weights, *rest, losses=losses)
    if not write_grad:
        return *losses, []
    ones = [sums.new_ones(())] * 3
    lists = (cls, box, points, labels, box_targets, targets, label_weights)
    rest = (quality, weight, sums, normalisers, strides, iou, iou_eps, limit)
    cls_loss = (form, alpha, beta, loss_weights)
    return *losses, head_backward(*ones, None, None, None, *lists, *rest, *cls_loss)


def head_backward(
    grad_cls,
    grad_bbox,
    grad_dfl,
    grad_levels_cls,
    grad_levels_bbox,
    grad_levels_dfl,
    cls,
    box,
    points,
    labels,
    box_targets,
    targets,
    label_weights,
    quality,
    weight,
    sums,
    normalisers,
    strides,
    iou,
    iou_eps,
    limit,
    form,
    alpha,
    beta,
    loss_weights,
) -> list[Tensor]:
    """gfl_kernels::head_backward: the gradients of cls, then of box."""
    _check(cls, box, points, labels, box_targets, targets, label_weights)
    _check_form(form, targets)
    cls_grad = tuple(torch.empty_like(level) for level in cls)
    box_grad = tuple(torch.empty_like(level) for level in box)
    if quality.numel():
        _launch_cls(
            cls,
            labels,
            targets,
            label_weights,
            quality,
            sums,
            normalisers,
            form,
            alpha,
            beta,
            loss_weights,
            upstream=(grad_cls, grad_levels_cls),
            grad=cls_grad,
        )
        _launch_box_grad(
            box,
            points,
            labels,
            box_targets,
            bool(targets),
            cls[0].shape[-1],
            weight,
            normalisers,
            strides,
            iou,
            iou_eps,
            limit,
            loss_weights,
            (grad_bbox, grad_dfl, grad_levels_bbox, grad_levels_dfl),
            box_grad,
        )
    return [*cls_grad, *box_grad]
