"""Quality family: one kernel for every form of target and for loss, gradient, or both."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import (
    DETACH_WEIGHT,
    FOCAL,
    FOCAL_PROBABILITIES,
    LOGITS,
    PROBABILITIES,
    UNIT_POSITIVES,
    VARIFOCAL,
    VARIFOCAL_PROBABILITIES,
)
from .launch import (
    ABSENT,
    COLUMNS,
    INTERPRETED,
    INTERPRETED_ELEMENTS,
    NONE,
    PER_ELEMENT,
    PER_ROW,
    ROWS,
    beside_columns,
    columns_ahead,
    element_mask,
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
    load_elements,
    loss_ops,
    loss_scale,
    loss_workspace,
    matrix_offsets,
    packed,
    row_values,
    scale_factor,
    stride_names,
    tile_rows,
)
from .math import (
    FOCAL_PROBABILITIES_FORM,
    PROBABILITIES_FORM,
    VARIFOCAL_PROBABILITIES_FORM,
    form_loss_grad,
)

_MATRICES = ("pred", "grad", "target", "weight")
_VECTORS = ("score", "upstream")

ON_PROBABILITIES = (PROBABILITIES, VARIFOCAL_PROBABILITIES, FOCAL_PROBABILITIES)

# From so many classes on it pays to work out the label's element apart from the background, whose
# formulas are shorter.
APART_CLASSES = tl.constexpr(33)
# From so many classes on it pays to read rows that begin anywhere in a vector in whole ones.
SHIFTED_CLASSES = 65


@triton.jit
def class_index(label, C: tl.constexpr):
    """A label as int32, -1 for whatever is no class in [0, C): -1, 255, NaN, 1.5."""
    if label.dtype.is_floating():
        label = label.to(tl.float32)  # a class that float16 can hold is exact
        index = tl.where((label >= 0) & (label < C), label, -1).to(tl.int32)
        return tl.where(index.to(tl.float32) == label, index, -1)
    else:
        label = label.to(tl.int64)
        return tl.where((label >= 0) & (label < C), label, -1).to(tl.int32)


@triton.jit
def background_loss(
    x,
    alpha,
    beta,
    FORM: tl.constexpr,
    SQUARE: tl.constexpr,
    FAST: tl.constexpr,
    HALF: tl.constexpr,
):
    loss, _ = form_loss_grad(
        x, 0.0, False, alpha, beta, True, FORM, False, False, SQUARE, FAST, HALF
    )
    return loss


@triton.jit
def shifted_background_losses(
    pred,  # (pointer, outer, middle, row and column stride), the pointer to a multiple of 16 bytes
    label,  # [TILE_ROWS]
    outer,
    middle,
    row,
    read,
    alpha,
    beta,
    C: tl.constexpr,
    STEP: tl.constexpr,
    UNROLL: tl.constexpr,
    CLAMPED: tl.constexpr,
    FORM: tl.constexpr,
    SQUARE: tl.constexpr,
    UNIT: tl.constexpr,
    OFF: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
    HALF: tl.constexpr,
):
    """Losses [TILE_ROWS, STEP] of all elements but the labels', of rows that begin anywhere in a
    vector: read from the multiple of STEP elements before the row's first, which may belong to
    other rows and counts 0. The end of the last row may be the end of memory: what is left of whole
    steps is read element by element.
    """
    tl.static_assert(C >= 2 * STEP)
    begin = matrix_offsets(outer * pred[1] + middle * pred[2], row, 0, pred[3], 0, 1, UNIT)
    columns = tl.arange(0, STEP)[None, :]
    own = columns - (begin % STEP).to(tl.int32)[:, None]  # class of the first element
    ahead = label[:, None] - own
    at = pred[0] + ((begin // STEP * STEP)[:, None] + columns)
    mask = element_mask(read, columns, STEP, STEP, CLAMPED)
    x = load_elements(at, mask, OFF, ACC, FAST)
    x = tl.where((own >= 0) & (ahead != 0), x, OFF)
    total = background_loss(x, alpha, beta, FORM, SQUARE, FAST, HALF)
    for first_class in tl.range(STEP, C // STEP * STEP, STEP, loop_unroll_factor=UNROLL):
        at += STEP
        x = load_elements(at, mask, OFF, ACC, FAST)
        x = tl.where(ahead == first_class, OFF, x)
        total += background_loss(x, alpha, beta, FORM, SQUARE, FAST, HALF)
    for first_class in tl.static_range(C // STEP * STEP, C + STEP - 1, STEP):
        at += STEP
        mask = own < C - first_class
        if not CLAMPED:
            mask = mask & read[:, None]
        x = load_elements(at, mask, OFF, ACC, FAST)
        x = tl.where(ahead == first_class, OFF, x)
        total += background_loss(x, alpha, beta, FORM, SQUARE, FAST, HALF)
    return total


@triton.jit
def quality_rows(
    pred,  # each (pointer or None, outer, middle, row and column stride)
    grad,
    target,
    weight,
    label,  # [TILE_ROWS], of rows that are read in [0, C) or -1; None with a dense target
    quality,  # [TILE_ROWS], 0 of rows that are not read; or None
    outer,
    middle,
    row,
    inside,
    read,
    g_factor,  # [TILE_ROWS]
    alpha,
    beta,
    C: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    STEP: tl.constexpr,
    UNROLL: tl.constexpr,
    RUNS: tl.constexpr,
    CLAMPED: tl.constexpr,
    FORM: tl.constexpr,
    DETACHED: tl.constexpr,
    UNIT: tl.constexpr,
    SQUARE: tl.constexpr,
    WEIGHT: tl.constexpr,
    LOSS: tl.constexpr,
    PRED_CONTIGUOUS: tl.constexpr,
    PRED_UNIT: tl.constexpr,
    GRAD_CONTIGUOUS: tl.constexpr,
    GRAD_UNIT: tl.constexpr,
    TARGET_CONTIGUOUS: tl.constexpr,
    TARGET_UNIT: tl.constexpr,
    WEIGHT_CONTIGUOUS: tl.constexpr,
    WEIGHT_UNIT: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
    SHIFTED: tl.constexpr = False,
):
    """The sum of the losses of each row of a tile (if LOSS), walked STEP classes at a time, and
    their gradients times g_factor. Weights of elements are read here, those of rows are not.

    SHIFTED: by shifted_background_losses, without a gradient.
    """
    HALF: tl.constexpr = pred[0].dtype.element_ty.primitive_bitwidth == 16
    ON_PROBABILITIES: tl.constexpr = (
        FORM == PROBABILITIES_FORM
        or FORM == VARIFOCAL_PROBABILITIES_FORM
        or FORM == FOCAL_PROBABILITIES_FORM
    )
    OFF: tl.constexpr = 0.0 if ON_PROBABILITIES else float("-inf")
    LABEL_APART: tl.constexpr = label is not None and C >= APART_CLASSES
    if LABEL_APART:
        # The label's own element; all others are background.
        has_label = read & (label >= 0)
        label_at = in_matrix(pred, outer, middle, row, label, PRED_CONTIGUOUS, PRED_UNIT)
        x_label = tl.load(label_at, mask=has_label, other=0).to(ACC)
        label_loss, label_grad = form_loss_grad(
            x_label,
            quality,
            has_label,
            alpha,
            beta,
            False,
            FORM,
            DETACHED,
            UNIT,
            SQUARE,
            FAST,
            HALF,
        )
        label_loss = tl.where(has_label, label_loss, 0.0)
        label_grad = tl.where(has_label, label_grad, 0.0)
        if WEIGHT == 3:
            label_at = in_matrix(weight, outer, middle, row, label, WEIGHT_CONTIGUOUS, WEIGHT_UNIT)
            w_label = tl.load(label_at, mask=has_label, other=0).to(ACC)
            label_loss = tl.where(w_label == 0.0, 0.0, label_loss * w_label)
        if SHIFTED:
            total = shifted_background_losses(
                pred, label, outer, middle, row, read, alpha, beta, C, STEP, UNROLL, CLAMPED,
                FORM, SQUARE, PRED_UNIT, OFF, ACC, FAST, HALF,
            )  # fmt: skip
            return tl.sum(total, axis=1) + label_loss

    outer_ = beside_columns(outer, RUNS)
    middle_ = beside_columns(middle, RUNS)
    at = row[:, None]
    first_columns = tl.arange(0, STEP)[None, :]
    if label is not None:
        # Classes from a lane's own to the label: steps compare it with a constant.
        ahead = label[:, None] - first_columns
    pred_at = in_matrix(pred, outer_, middle_, at, first_columns, PRED_CONTIGUOUS, PRED_UNIT)
    if label is None:
        target_at = in_matrix(
            target, outer_, middle_, at, first_columns, TARGET_CONTIGUOUS, TARGET_UNIT
        )
    if WEIGHT == 3:
        weight_at = in_matrix(
            weight, outer_, middle_, at, first_columns, WEIGHT_CONTIGUOUS, WEIGHT_UNIT
        )
    if grad[0] is not None:
        grad_at = in_matrix(grad, outer_, middle_, at, first_columns, GRAD_CONTIGUOUS, GRAD_UNIT)
    total = tl.zeros((TILE_ROWS, STEP), ACC)
    for first_class in tl.range(0, C, STEP, loop_unroll_factor=UNROLL):
        c = first_class + first_columns
        mask = element_mask(read, c, C, STEP, CLAMPED)
        # An element that counts 0 is one that is surely background.
        x = load_elements(pred_at, mask, OFF, ACC, FAST)
        if label is None:
            q = load_elements(target_at, mask, 0.0, ACC, FAST)
            positive = q > 0.0
            target_at += columns_ahead(STEP, target[4], TARGET_CONTIGUOUS, TARGET_UNIT)
        else:
            here = ahead == first_class
            if LABEL_APART:
                x = tl.where(here, OFF, x)
                q, positive = 0.0, False
            else:
                q = tl.where(here, quality[:, None], 0.0)
                positive = here & read[:, None]
        element, g = form_loss_grad(
            x, q, positive, alpha, beta, LABEL_APART, FORM, DETACHED, UNIT, SQUARE, FAST, HALF
        )
        if LABEL_APART and grad[0] is not None:
            g = tl.where(here, label_grad[:, None], g)
        if WEIGHT == 3:
            we = load_elements(weight_at, mask, 0.0, ACC, FAST)
            weight_at += columns_ahead(STEP, weight[4], WEIGHT_CONTIGUOUS, WEIGHT_UNIT)
            element = tl.where(we == 0.0, 0.0, element * we)  # 0 even where the loss is NaN
            g = tl.where(we == 0.0, 0.0, g * we)
        if LOSS:
            total += element
        if grad[0] is not None:
            g = g * g_factor[:, None]
            writes = element_mask(inside, c, C, STEP, False)
            tl.store(grad_at, g.to(grad[0].dtype.element_ty), mask=writes)
            grad_at += columns_ahead(STEP, grad[4], GRAD_CONTIGUOUS, GRAD_UNIT)
        pred_at += columns_ahead(STEP, pred[4], PRED_CONTIGUOUS, PRED_UNIT)
    row_loss = tl.sum(total, axis=1)
    if LABEL_APART:
        row_loss += label_loss
    return row_loss


@triton.jit(do_not_specialize=stride_names(_MATRICES, _VECTORS))
def quality_kernel(
    pred,  # [rows, C] logits or probabilities
    target,  # [rows] labels (sparse) or [rows, C] qualities (dense)
    score,  # [rows] with a sparse target
    weight,  # [rows] or [rows, C] or None
    upstream,  # [] or [rows] or None
    avg_factor,  # [] or None
    loss,  # [] or [rows] or None
    partials,
    counter,
    grad,  # [rows, C] or None
    scale: "fp64",
    alpha: "fp64",
    beta: "fp64",
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
    target_column: "i64",
    score_outer: "i64",
    score_middle: "i64",
    score_row: "i64",
    weight_outer: "i64",
    weight_middle: "i64",
    weight_row: "i64",
    weight_column: "i64",
    upstream_outer: "i64",
    upstream_middle: "i64",
    upstream_row: "i64",
    C: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    STEP: tl.constexpr,  # classes
    UNROLL: tl.constexpr,
    RUNS: tl.constexpr,
    FORM: tl.constexpr,
    DETACHED: tl.constexpr,
    UNIT: tl.constexpr,
    SQUARE: tl.constexpr,  # beta is 2
    WEIGHT: tl.constexpr,  # ABSENT, SCALAR, PER_ROW or PER_ELEMENT, as the next two
    LOSS: tl.constexpr,
    UPSTREAM: tl.constexpr,
    SHIFTED: tl.constexpr,  # rows begin anywhere in a vector, pred at one
    ROW_UNIT: tl.constexpr,
    PRED_CONTIGUOUS: tl.constexpr,
    PRED_UNIT: tl.constexpr,
    GRAD_CONTIGUOUS: tl.constexpr,
    GRAD_UNIT: tl.constexpr,
    TARGET_CONTIGUOUS: tl.constexpr,
    TARGET_UNIT: tl.constexpr,
    WEIGHT_CONTIGUOUS: tl.constexpr,
    WEIGHT_UNIT: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
):
    """A tile is TILE_ROWS neighbouring rows of one run, walked STEP classes at a time: whatever a
    row has (label, score, weight) is read once for all its classes, and sums over classes stay in
    the program. The same for rows of classes and for planes of rows (NCHW): Triton lays the threads
    out along the dimension of stride 1.
    """
    rows = rows * ROW_UNIT
    alpha, beta = tl.full((), alpha, ACC), tl.full((), beta, ACC)
    factor = scale_factor(scale, avg_factor, ACC)
    row_factor = factor
    if UPSTREAM == 1:
        row_factor = factor * tl.load(upstream).to(ACC)
    # Unless rows lie next to each other, those past the end repeat the last one, and no load needs
    # a mask.
    CLAMPED: tl.constexpr = PRED_CONTIGUOUS != 2 and WEIGHT != 2
    outer, middle, row, inside = tile_rows(
        tl.program_id(0), rows, tiles_per_run, middle_size, TILE_ROWS, 1, RUNS, CLAMPED
    )
    read = inside
    w = tl.where(inside, 1.0, 0.0).to(ACC)
    if WEIGHT == 2:
        start = outer * weight_outer + middle * weight_middle
        w = row_values(weight, start + row * weight_row, inside).to(ACC)
        read = w != 0.0
    g_factor = w * row_factor
    if UPSTREAM == 2:
        start = outer * upstream_outer + middle * upstream_middle
        up = row_values(upstream, start + row * upstream_row, inside).to(ACC)
        # A row of weight 0 stays out whatever comes from upstream.
        g_factor = tl.where(read, g_factor * up, 0.0)
    label, quality = None, None
    if score is not None:
        start = outer * target_outer + middle * target_middle
        label = class_index(row_values(target, start + row * target_row, inside), C)
        start = outer * score_outer + middle * score_middle
        quality = row_values(score, start + row * score_row, inside).to(ACC)
        quality = tl.where(read, quality, 0.0)
    row_loss = quality_rows(
        (pred, pred_outer, pred_middle, pred_row, pred_column),
        (grad, grad_outer, grad_middle, grad_row, grad_column),
        (target, target_outer, target_middle, target_row, target_column),
        (weight, weight_outer, weight_middle, weight_row, weight_column),
        label,
        quality,
        outer,
        middle,
        row,
        inside,
        read,
        g_factor,
        alpha,
        beta,
        C,
        TILE_ROWS,
        STEP,
        UNROLL,
        RUNS,
        CLAMPED,
        FORM,
        DETACHED,
        UNIT,
        SQUARE,
        WEIGHT,
        LOSS != 0,
        PRED_CONTIGUOUS,
        PRED_UNIT,
        GRAD_CONTIGUOUS,
        GRAD_UNIT,
        TARGET_CONTIGUOUS,
        TARGET_UNIT,
        WEIGHT_CONTIGUOUS,
        WEIGHT_UNIT,
        ACC,
        FAST,
        SHIFTED,
    )
    if LOSS == 1:
        partial = tl.sum(tl.where(inside, row_loss * w, 0.0))
        finish_sum(partial, factor, loss, partials, counter)
    if LOSS == 2:
        at_loss = (outer * middle_size + middle) * rows + row
        tl.store(loss + at_loss, row_loss * (w * factor), mask=inside)


class Config(NamedTuple):
    rows: int  # of a tile
    step: int  # classes at a time
    unroll: int  # steps that the compiler lays out together
    warps: int


def config(
    classes: int,
    itemsize: int,
    unit: int,  # elements to a multiple of which strides are aligned
    planes: bool,  # rows lie next to each other: NCHW
    square: bool,
    dense: bool,
    both: bool,  # loss and gradient
    probabilities: bool,
    shifted: bool,
) -> Config:
    """The tile, by arithmetic: 8 logits a lane and step, in vectors of 16 bytes; 4 where there are
    no vectors, or 64 registers would not hold more.

    A step is 32 bytes of a row, a whole sector: the fewer lanes share a row, the less often what a
    row has is worked out. With many classes it is more, or few rows would leave a GPU idle. Of
    planes it is 4 classes, a lane having neighbouring rows; without vectors 32. It is a smaller
    power of two if padding would cost over 3 % more than the least. A few steps are unrolled, with
    their loads in flight at once, if registers allow.
    """
    if INTERPRETED:
        step = min(128, triton.next_power_of_2(classes) // (4 if shifted else 1))
        return Config(INTERPRETED_ELEMENTS // step, step, 1, 4)
    half = itemsize == 2
    vector = min(unit, 16 // itemsize)
    narrow = vector == 1 or itemsize == 8 or not square or (both and dense)
    largest = 4 if planes else 32 if vector == 1 else max(8, 32 // itemsize)
    while not planes and vector > 1 and largest < 128 and classes > 40 * largest:
        largest *= 2
    steps = [s for s in (1, 2, 4, 8, 16, 32, 64, 128) if min(8, classes, largest) <= s <= largest]
    padded = [-(-classes // s) * s for s in steps]
    step = max(s for s, p in zip(steps, padded, strict=True) if p <= 1.03 * min(padded))
    count = -(-classes // step)
    crowded = itemsize == 8 or not square or (half and (both or probabilities))
    most = 10 if planes or count <= 10 else 1 if narrow or both else 4
    unroll = 1 if crowded else min(count, most)
    logits = 1024 if half and not planes and not narrow and count <= 10 else 512
    return Config(logits // step, step, unroll, logits // (32 * max(vector, 4 if narrow else 8)))


def _launch(
    pred: Tensor,
    target: Tensor,
    score: Tensor | None,
    weight: Tensor | None,
    avg_factor: Tensor | None,
    form: int,
    flags: int,
    alpha: float,
    beta: float,
    scale: float,
    reduction: int,
    *,
    upstream: Tensor | None = None,
    loss: Tensor | None = None,
    grad: Tensor | None = None,
) -> None:
    """One launch of quality_kernel over all rows."""
    classes = pred.shape[-1]
    if target.dtype is torch.bool:
        target = target.view(torch.uint8)
    per_row = reduction == NONE
    square = beta == 2
    total_scale = loss_scale(scale, reduction, pred)

    def arguments(tiles: int) -> tuple[Any, ...]:
        partials, counter = loss_workspace(loss, per_row, tiles)
        given = (pred, target, score, weight, upstream, avg_factor, loss, partials, counter, grad)
        return *given, total_scale, alpha, beta

    tensors = (pred, target, score, weight, upstream, avg_factor, loss, grad)
    key = launch_key(quality_kernel, tensors, form, flags, square, per_row)
    if launch_again(key, arguments):
        return
    operands = (
        (
            ("pred", layout(pred)),
            ("grad", layout(grad)),
            ("target", layout(target)),
            ("weight", layout(weight)),
        ),
        (("score", layout(score)), ("upstream", layout(upstream) if per_row else None)),
    )
    found = lay_out(64, *operands)
    if found is None:
        copies = packed(pred, target, score, weight)
        result = (
            None if grad is None else torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        )
        upstream = upstream.contiguous() if per_row and upstream is not None else upstream
        rest = (avg_factor, form, flags, alpha, beta, scale, reduction)
        _launch(*copies, *rest, upstream=upstream, loss=loss, grad=result)
        if grad is not None:
            grad.copy_(result)
        return
    _, rows = found
    vector = 16 // pred.element_size()
    shifted = (
        rows["PRED_CONTIGUOUS"] == COLUMNS
        and rows["PRED_UNIT"] < vector
        and pred.data_ptr() % 16 == 0
        and classes >= SHIFTED_CLASSES
        and pred.element_size() <= 4
        and score is not None
        and grad is None
        and not (weight is not None and weight.dim() == pred.dim())
    )
    shape = config(
        classes,
        pred.element_size(),
        vector if shifted else rows["PRED_UNIT"],
        rows["PRED_CONTIGUOUS"] == ROWS,
        square and form in (LOGITS, PROBABILITIES, VARIFOCAL, FOCAL),
        score is None,
        loss is not None and grad is not None,
        form in ON_PROBABILITIES,
        shifted,
    )
    tiles, rows = lay_out(shape.rows, *operands)
    launch_first(
        quality_kernel,
        key,
        tiles,
        arguments,
        C=classes,
        TILE_ROWS=shape.rows,
        STEP=shape.step,
        UNROLL=shape.unroll,
        maxnreg=64 if pred.dtype is not torch.float64 else None,
        FORM=form,
        DETACHED=bool(flags & DETACH_WEIGHT),
        UNIT=bool(flags & UNIT_POSITIVES),
        SQUARE=square,
        WEIGHT=(
            ABSENT if weight is None else PER_ELEMENT if weight.dim() == pred.dim() else PER_ROW
        ),
        LOSS=extent(loss, per_row),
        UPSTREAM=extent(upstream, per_row),
        SHIFTED=shifted,
        num_warps=shape.warps,
        **rows,
    )


quality_forward, quality_backward = loss_ops(_launch)
