"""Semantics of loads, stores, atomics and matrix loads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import fp, memory
from .fp import Format
from .isa import float_extreme
from .operands import (
    TYPES,
    U8,
    U16,
    U32,
    U64,
    Getter,
    Step,
    Type,
    dest,
    dest_lanes,
    items,
    opcode,
    source,
    unsupported,
)
from .parser import Imm, Inst, Mem, Reg, Sink, type_width

_SPACES = {
    "global": "global",
    "shared": "shared",
    "shared::cta": "shared",
    "local": "local",
    "const": "const",
    "param": "param",
    "param::entry": "param",
    "param::func": "param",
}


def space_of(inst: Inst) -> str:
    """State space a memory instruction names; 'generic' if none."""
    return next((_SPACES[m] for m in inst.mods if m in _SPACES), "generic")


def vector_length(inst: Inst) -> int:
    """Number of elements of a ``.v2``/``.v4``/``.v8`` access."""
    return next((int(m[1]) for m in inst.mods if m in ("v2", "v4", "v8")), 1)


def access_width(inst: Inst) -> int:
    """Bytes per lane of a memory instruction."""
    if inst.op in ("ldmatrix", "stmatrix"):
        return 16
    if inst.op == "cp":
        return inst.operands[2].value
    return type_width(inst.type) // 8 * vector_length(inst)


def _address(env, mem: Mem) -> Getter:
    """Effective address as uint64 (one per thread, or 0-d if constant)."""
    offset = U64(mem.offset % (1 << 64))
    if isinstance(mem.base, Imm):
        constant = np.array(mem.base.value + mem.offset, U64)
        return lambda b: constant
    if isinstance(mem.base, Reg):
        k = env.reg(mem.base)
        if mem.base.width == 64 and not mem.offset:
            return lambda b: b.regs[k]
        return lambda b: b.regs[k].astype(U64) + offset
    base = source(env, mem.base, "u64")
    return lambda b: base(b) + offset


def _lane_address(env, mem: Mem) -> Callable:
    """``f(batch, lanes)``: addresses of the active lanes."""
    get = _address(env, mem)

    def fn(b, lanes):
        a = get(b)
        if a.ndim == 0:
            return np.full(b.threads if lanes is None else len(lanes), a)
        return a if lanes is None else a[lanes]

    return fn


def _space(env, inst: Inst, mem: Mem) -> str:
    space = space_of(inst)
    if space == "param":  # kernel parameters are host memory, those of functions are per thread
        return "local" if env.is_local(mem.base) else "const"
    return space


@opcode("ld", "ldu")
def _ld(env, inst) -> Step:
    typ, count, mem = TYPES[inst.type], vector_length(inst), inst.operands[1]
    regs = items(inst.operands[0])
    if len(regs) != count:
        raise unsupported(inst, "vector length")
    at = env.param_offset(mem.base)
    if at is not None:
        return _load_param(env, regs, typ, at + mem.offset)
    puts, space = [dest_lanes(env, r, typ) for r in regs], _space(env, inst, mem)
    addr, index = _lane_address(env, mem), env.index
    if space == "const" and space_of(inst) == "param":
        addr = _in_parameters(addr)

    def step(b, m):
        lanes = b.lanes(m)
        data = memory.read(b, space, addr(b, lanes), lanes, typ.dtype, count, index)
        if count == 1:
            puts[0](b, lanes, data)
        else:
            for j, put in enumerate(puts):
                put(b, lanes, np.ascontiguousarray(data[:, j]))

    return step


def _in_parameters(addr):
    """Addresses of kernel parameters out of registers, which may hold only their lower 32 bits."""
    low = np.uint64(0xFFFFFFFF)

    def fn(b, lanes):
        start = np.uint64(b.param_address)
        return start + ((addr(b, lanes).astype(np.uint64) - start) & low)

    return fn


def _load_param(env, regs: tuple, typ: Type, start: int) -> Step:
    """ld.param of a kernel parameter: the same value for all threads."""
    puts = [dest(env, r, typ) for r in regs]

    def step(b, m):
        for put, value in zip(
            puts, np.frombuffer(b.params, typ.dtype, len(puts), start), strict=True
        ):
            put(b, m, value)

    return step


@opcode("st")
def _st(env, inst) -> Step:
    typ, count, mem = TYPES[inst.type], vector_length(inst), inst.operands[0]
    gets, space = [source(env, o, typ) for o in items(inst.operands[1])], _space(env, inst, mem)
    if len(gets) != count:
        raise unsupported(inst, "vector length")
    addr, index = _lane_address(env, mem), env.index

    def step(b, m):
        lanes = b.lanes(m)
        memory.write(b, space, addr(b, lanes), lanes, b.pick(gets, lanes, typ.dtype), count, index)

    return step


@opcode("cp")
def _cp_async(env, inst) -> Step:
    """cp.async, performed at once."""
    if inst.mods[0] != "async" or "bulk" in inst.mods or "mbarrier" in inst.mods:
        raise unsupported(inst)
    if inst.mods[1] in ("commit_group", "wait_group", "wait_all"):
        return lambda b, m: None
    size, index = inst.operands[2].value, env.index
    dst, src = _lane_address(env, inst.operands[0]), _lane_address(env, inst.operands[1])
    amount = (
        source(env, inst.operands[3], "u32") if len(inst.operands) > 3 else None
    )  # 0 or size: zero fill

    def step(b, m):
        lanes = b.lanes(m)
        lanes = np.arange(b.threads) if lanes is None else lanes
        full = (
            np.ones(len(lanes), bool)
            if amount is None
            else np.broadcast_to(amount(b), b.threads)[lanes] >= size
        )
        data = np.zeros((len(lanes), size), U8)
        if full.any():
            data[full] = memory.read(b, "global", src(b, lanes[full]), lanes[full], U8, size, index)
        memory.write(b, "shared", dst(b, lanes), lanes, data, size, index)

    return step


@opcode("ldmatrix", "stmatrix")
def _matrix(env, inst) -> Step:
    """8x8 matrices of 16-bit elements; lane 8*j + r holds the address of row r of matrix j."""
    if "m8n8" not in inst.mods or inst.type != "b16":
        raise unsupported(inst)
    load, trans, index = inst.op == "ldmatrix", "trans" in inst.mods, env.index
    regs, mem = inst.operands if load else inst.operands[::-1]
    access = [dest(env, r, "b32") if load else source(env, r, "b32") for r in items(regs)]
    addr = _lane_address(env, mem)

    def oriented(matrix):
        return np.ascontiguousarray(matrix.transpose(0, 2, 1)) if trans else matrix

    def step(b, m):
        warps = b.threads // 32
        for j, reg in enumerate(access):
            lanes = (np.arange(warps)[:, None] * 32 + np.arange(8 * j, 8 * j + 8)).ravel()
            lanes = lanes if m is None else lanes[m[lanes]]
            rows = lanes // 32 * 8 + lanes % 8
            if load:
                matrix = np.zeros((warps, 8, 8), U16)
                matrix.reshape(-1, 8)[rows] = memory.read(
                    b, "shared", addr(b, lanes), lanes, U16, 8, index
                )
                reg(b, m, oriented(matrix).reshape(-1, 2).view(U32)[:, 0])
            else:
                matrix = np.broadcast_to(reg(b), (b.threads,)).copy().view(U16).reshape(warps, 8, 8)
                memory.write(
                    b,
                    "shared",
                    addr(b, lanes),
                    lanes,
                    oriented(matrix).reshape(-1, 8)[rows],
                    8,
                    index,
                )

    return step


_INTEGER = {
    "add": np.add,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "min": np.minimum,
    "max": np.maximum,
    "exch": lambda old, b: b,
    "cas": lambda old, b, c: np.where(old == b, c, old),
    "inc": lambda old, b: np.where(old >= b, old.dtype.type(0), old + old.dtype.type(1)),
    "dec": lambda old, b: np.where((old == 0) | (old > b), b, old - old.dtype.type(1)),
}


def _float_update(op: str, fmt: Format, ftz: bool) -> Callable:
    """New memory contents (bits) of a floating-point add, min or max."""
    add, flush = fp.arithmetic("add", fmt, "rn"), (fmt.flush if ftz else lambda x: x)

    def update(old, value):
        x, y = flush(fmt.decode(old)), flush(fmt.decode(value))
        if op == "add":
            return fmt.encode(flush(fmt.decode(fmt.encode(add(x, y)))))
        return fmt.encode(float_extreme(x, y, op == "max", False))

    return update


@opcode("atom", "red")
def _atom(env, inst) -> Step:
    """Atomics: the lanes take effect one after the other in thread order."""
    typ, space, vector = TYPES[inst.type], space_of(inst), vector_length(inst)
    op = next((m for m in inst.mods if m in _INTEGER), None)
    if (
        op is None
        or typ.width == 128
        or inst.mods[0] == "async"
        or typ.fmt
        and op not in ("add", "min", "max")
    ):
        raise unsupported(inst)
    first, operands = (
        (inst.operands[0], inst.operands[1:]) if inst.op == "atom" else (Sink(), inst.operands)
    )
    mem, values = operands[0], operands[1 : 3 if op == "cas" else 2]
    raw, count = typ.raw, vector * typ.lanes
    gets = [[source(env, o, raw) for o in items(v)] for v in values]
    puts = [dest_lanes(env, r, raw) for r in items(first)]
    returns = env.is_read(items(first))
    # atom.add.f32 flushes subnormals in global but not in shared memory
    ftz = typ.name == "f32" and space != "shared"
    update = _float_update(op, typ.fmt, ftz) if typ.fmt else _INTEGER[op]
    native = typ.fmt.native if op == "add" and typ.name in ("f32", "f64") else None
    addr, index = _lane_address(env, mem), env.index

    def step(b, m):
        lanes = b.lanes(m)
        data = [b.pick(g, lanes, raw.dtype).reshape(-1, vector).view(typ.dtype) for g in gets]
        data = [d[:, 0] if count == 1 else d for d in data]
        old = np.zeros_like(data[0])
        for view, element, select, _ in memory.segments(
            b, space, addr(b, lanes), lanes, typ.dtype, count, index, ("read", "written")
        ):
            if not returns and native:  # ufunc.at accumulates lane by lane too, but fast
                numbers = view.view(native)
                np.add.at(numbers, element, data[0][select].view(native))
                if ftz:
                    numbers[element] = typ.fmt.flush(numbers[element])
            elif not returns and isinstance(update, np.ufunc):
                update.at(view, element, data[0][select])
            else:
                old[select] = memory.by_rounds(view, element, update, *(d[select] for d in data))
        if returns:
            old = np.ascontiguousarray(old.reshape(-1, count)).view(raw.dtype)
            for j, put in enumerate(puts):
                put(b, lanes, np.ascontiguousarray(old[:, j]))

    return step
