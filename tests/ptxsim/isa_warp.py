"""Semantics of operations between the threads of a warp.

The ``.sync`` operations run under a convergence rule of the machine: a warp
executes one only when all its live threads named in the member mask are there.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .isa import float_extreme
from .operands import ALL, TYPES, U32, Step, dest, halves, opcode, source, unsupported
from .parser import Imm, Inst


def ballot(flags: np.ndarray) -> np.ndarray:
    """One uint32 per warp with the flags of its lanes."""
    return np.packbits(flags.reshape(-1, 32), axis=1, bitorder="little").view(U32)[:, 0]


def spread(per_warp: np.ndarray) -> np.ndarray:
    """Repeat a per-warp value for its 32 lanes."""
    return np.repeat(per_warp, 32)


def is_warp_sync(inst: Inst) -> bool:
    """Does the instruction wait for other threads of its warp?"""
    return inst.op in (
        "shfl",
        "vote",
        "match",
        "redux",
        "elect",
        "ldmatrix",
        "stmatrix",
    ) or is_warp_barrier(inst)


def is_warp_barrier(inst: Inst) -> bool:
    return inst.op == "bar" and inst.mods[0] == "warp"


def member_operand(inst: Inst):
    """The member mask operand of a warp-synchronous instruction."""
    return Imm("int", ALL) if inst.op in ("ldmatrix", "stmatrix") else inst.operands[-1]


def _active(b, m) -> np.ndarray:
    """Ballot of the active threads, per lane."""
    return np.full(b.threads, ALL, U32) if m is None else spread(ballot(m))


def _members(env, operand) -> Callable:
    """``f(batch, mask)``: ballot of the active members, per lane."""
    get = source(env, operand, "u32")
    return lambda b, m: _active(b, m) & get(b)


@opcode("bar")
def _warp_barrier(env, inst) -> Step:
    return lambda b, m: None  # waiting is all it does


@opcode("activemask")
def _activemask(env, inst) -> Step:
    put = dest(env, inst.operands[0], "b32")
    return lambda b, m: put(b, m, _active(b, m))


def _shuffle_source(
    mode: str, b: np.ndarray, c: np.ndarray, lane: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Source lane and in-range predicate."""
    bval, cval, seg = b & 31, c & 31, (c >> 8) & 31
    limit = (lane & seg) | (cval & ~seg)
    j = {
        "up": lane - bval,
        "down": lane + bval,
        "bfly": lane ^ bval,
        "idx": (lane & seg) | (bval & ~seg),
    }[mode]
    ok = j >= limit if mode == "up" else j <= limit
    return np.where(ok, j, lane), ok


@opcode("shfl")
def _shfl(env, inst) -> Step:
    """A lane that reads an inactive lane gets all-ones bits (undefined in PTX)."""
    if inst.mods[0] != "sync":
        raise unsupported(inst, "only shfl.sync")
    first, second = halves(inst.operands[0])
    put, put_p = dest(env, first, "b32"), dest(env, second, "pred")
    get, get_b, get_c = (
        source(env, o, t) for o, t in zip(inst.operands[1:4], ("b32", "s32", "s32"), strict=True)
    )
    members = _members(env, inst.operands[4])

    def step(b, m):
        value, shift, control = np.broadcast_to(get(b), (b.threads,)), get_b(b), get_c(b)
        if shift.ndim == control.ndim == 0:  # the same permutation in every warp
            j, ok = _shuffle_source(inst.mods[1], shift, control, b.lane[:32])
            out = value.reshape(-1, 32)[:, j].ravel()
            j, ok = np.tile(j, b.threads // 32), np.tile(ok, b.threads // 32)
        else:
            j, ok = _shuffle_source(inst.mods[1], shift, control, b.lane)
            out = value[b.warp_start + j]
        valid = (members(b, m) >> j.astype(U32)) & U32(1)
        put(b, m, np.where(valid, out, U32(ALL)))
        put_p(b, m, ok)

    return step


@opcode("vote")
def _vote(env, inst) -> Step:
    if inst.mods[0] != "sync":
        raise unsupported(inst, "only vote.sync")
    mode = inst.mods[1]
    pred, members = source(env, inst.operands[1], "pred"), _members(env, inst.operands[2])
    put = dest(env, inst.operands[0], "b32" if mode == "ballot" else "pred")

    def step(b, m):
        active = members(b, m)
        votes = spread(ballot(np.broadcast_to(pred(b), (b.threads,)))) & active
        put(
            b,
            m,
            votes
            if mode == "ballot"
            else votes != 0
            if mode == "any"
            else votes == active
            if mode == "all"
            else (votes == 0) | (votes == active),
        )

    return step


@opcode("elect")
def _elect(env, inst) -> Step:
    """The lowest active member leads."""
    members = _members(env, inst.operands[1])
    first, second = halves(inst.operands[0])
    put, put_p = dest(env, first, "b32"), dest(env, second, "pred")

    def step(b, m):
        active = members(b, m)
        leader = np.bitwise_count((active & (~active + U32(1))) - U32(1)).astype(U32)
        put(b, m, leader)
        put_p(b, m, leader == b.lane)

    return step


@opcode("match")
def _match(env, inst) -> Step:
    first, second = halves(inst.operands[0])
    put, put_p = dest(env, first, "b32"), dest(env, second, "pred")
    get, members = source(env, inst.operands[1], inst.type), _members(env, inst.operands[2])

    def step(b, m):
        v = np.broadcast_to(get(b), (b.threads,)).reshape(-1, 32)
        active = members(b, m)
        equal = ballot(v[:, :, None] == v[:, None, :]) & active
        same = equal == active
        put(b, m, np.where(same, active, U32(0)) if inst.mods[0] == "all" else equal)
        put_p(b, m, same)

    return step


@opcode("redux")
def _redux(env, inst) -> Step:
    typ, op = TYPES[inst.type], inst.mods[1]
    get, members = source(env, inst.operands[1], typ), _members(env, inst.operands[2])
    put = dest(env, inst.operands[0], typ)
    if typ.fmt:
        fold = _redux_float(op == "max", "NaN" in inst.mods, "abs" in inst.mods, typ.fmt)
    else:
        fold = _redux_integer(op, typ.dtype)

    def step(b, m):
        v = np.broadcast_to(get(b), (b.threads,)).reshape(-1, 32)
        inside = ((members(b, m) >> b.lane.astype(U32)) & U32(1)).astype(bool).reshape(-1, 32)
        put(b, m, spread(fold(v, inside)))

    return step


def _redux_integer(op: str, dtype: np.dtype) -> Callable:
    ufunc, neutral = {
        "add": (np.add, 0),
        "or": (np.bitwise_or, 0),
        "xor": (np.bitwise_xor, 0),
        "and": (np.bitwise_and, -1),
        "min": (np.minimum, np.iinfo(dtype).max),
        "max": (np.maximum, np.iinfo(dtype).min),
    }[op]
    fill = np.array(neutral).astype(dtype)
    return lambda v, inside: ufunc.reduce(np.where(inside, v, fill), axis=1, dtype=dtype)


def _redux_float(is_max: bool, nan: bool, absolute: bool, fmt) -> Callable:
    def fold(v, inside):
        x = np.abs(fmt.decode(v)) if absolute else fmt.decode(v)
        x = np.where(inside, x, x.dtype.type(-np.inf if is_max else np.inf))
        r = x[:, 0]
        for j in range(1, 32):
            r = float_extreme(r, x[:, j], is_max, nan)
        return fmt.encode(np.where((np.isnan(x) | ~inside).all(axis=1), x.dtype.type(np.nan), r))

    return fold
