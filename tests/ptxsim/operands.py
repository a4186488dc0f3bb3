"""Types, operand access and the registry shared by the instruction builders.

A builder turns one instruction into a step, a closure ``step(batch, mask)``.
``batch.regs[k]`` is an array with one element per thread (unsigned integers of
the register's width, bool for predicates); ``mask`` is a boolean array of the
active threads, or None if all are.  A step computes every lane and writes the
active ones; only memory operations look at the active lanes alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .errors import UnsupportedInstruction
from .fp import FORMATS, Format
from .parser import Imm, Inst, Not, Reg, Sink, Special, Sym, Var, Vec

if TYPE_CHECKING:
    from .machine import Batch
    from .program import Program

Mask = np.ndarray | None
Step = Callable[["Batch", Mask], None]
Getter = Callable[["Batch"], np.ndarray]
Setter = Callable[["Batch", Mask, np.ndarray], None]

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
ALL = 0xFFFFFFFF
BUILDERS: dict[str, Callable[[Program, Inst], Step]] = {}
REG_DTYPE = {
    w: np.dtype(t)
    for w, t in ((1, bool), (8, U8), (16, U16), (32, U32), (64, U64), (128, np.complex128))
}  # complex128: 16 bytes that are only ever copied


def opcode(*names: str):
    """Register a builder for opcodes."""

    def register(fn):
        BUILDERS.update(dict.fromkeys(names, fn))
        return fn

    return register


def unsupported(inst: Inst, why: str = "") -> UnsupportedInstruction:
    return UnsupportedInstruction(
        f"unsupported instruction at PTX line {inst.line}: {inst.text}"
        + (f" ({why})" if why else "")
    )


def build(env: Program, inst: Inst) -> Step:
    """Compile one straight-line instruction."""
    if inst.op not in BUILDERS:
        raise unsupported(inst)
    try:
        return BUILDERS[inst.op](env, inst)
    except (KeyError, IndexError, ValueError) as e:
        raise unsupported(inst, f"{type(e).__name__}: {e}") from e


class Type(NamedTuple):
    """A PTX instruction type; packed types have two ``lanes``."""

    name: str
    width: int  # bits of the whole operand
    dtype: np.dtype  # element dtype (raw bits for floats)
    fmt: Format | None  # element format of float types
    lanes: int = 1

    @property
    def signed(self) -> bool:
        return self.dtype.kind == "i"

    @property
    def raw(self) -> Type:
        """The untyped bits of the same width."""
        return TYPES[f"b{self.width}"]

    @property
    def wide(self) -> Type:
        """The integer type of twice the width."""
        return TYPES[f"{self.name[0]}{2 * self.width}"]


def _types() -> dict[str, Type]:
    out = {
        "pred": Type("pred", 1, REG_DTYPE[1], None),
        "b128": Type("b128", 128, REG_DTYPE[128], None),
    }
    for width in (8, 16, 32, 64):
        for kind in "bus":
            dtype = np.dtype(f"{'i' if kind == 's' else 'u'}{width // 8}")
            out[f"{kind}{width}"] = Type(f"{kind}{width}", width, dtype, None)
    for name, fmt in FORMATS.items():
        out[name] = Type(name, 8 * np.dtype(fmt.bits).itemsize, np.dtype(fmt.bits), fmt)
    for name in ("f16", "bf16", "f32", "u16", "s16"):
        t = out[name]
        out[name + "x2"] = Type(name + "x2", 2 * t.width, t.dtype, t.fmt, 2)
    return out


TYPES = _types()


def types_of(inst: Inst) -> list[Type]:
    """The type modifiers of an instruction, in order."""
    return [TYPES[m] for m in inst.mods if m in TYPES]


def source(env: Program, operand, typ: Type | str) -> Getter:
    """A function fetching an operand as an array of ``typ.dtype`` (0-d for constants)."""
    typ = TYPES[typ] if isinstance(typ, str) else typ
    dtype = typ.dtype
    if isinstance(operand, Not):
        inner = source(env, operand.reg, typ)
        return lambda b: ~inner(b)
    if isinstance(operand, Reg):
        k = env.reg(operand)
        if REG_DTYPE[operand.width] == dtype:
            return lambda b: b.regs[k]
        if typ.width == operand.width:
            return lambda b: b.regs[k].view(dtype)
        unsigned = np.dtype(f"u{dtype.itemsize}")
        return lambda b: b.regs[k].astype(unsigned).view(dtype)
    if isinstance(operand, Special):
        return lambda b: b.special(operand.name).astype(dtype)
    if isinstance(operand, Imm):
        width = max(typ.width, 8)
        value = np.array(operand.bits(width), f"u{width // 8}")
    elif isinstance(operand, (Sym, Var)):
        late = env.late_address(operand)
        if late is not None:
            return lambda b: late(b).astype(dtype)
        value = np.array(env.address(operand), U64).astype(f"u{typ.width // 8}")
    else:
        raise unsupported(env.inst, "operand")
    if typ.lanes == 2:
        pair = value.reshape(1).view(dtype)
        return lambda b: np.tile(pair, b.threads)
    value = value.astype(bool) if typ.width == 1 else value.view(dtype)
    return lambda b: value


def sources(env: Program, inst: Inst, *types: Type | str) -> list[Getter]:
    """Getters of operands 1, 2, ..."""
    return [source(env, o, t) for o, t in zip(inst.operands[1:], types, strict=True)]


def fsource(env: Program, operand, typ: Type, ftz: bool = False) -> Getter:
    """A function fetching a floating-point operand as decoded values."""
    get, fmt = source(env, operand, typ), typ.fmt
    if ftz:
        return lambda b: fmt.flush(fmt.decode(get(b)))
    return lambda b: fmt.decode(get(b))


def items(operand) -> tuple:
    """The elements of a vector operand, or the operand itself."""
    return operand.items if isinstance(operand, Vec) else (operand,)


def halves(operand) -> tuple:
    """(d, p) of a ``d|p`` destination; p is a sink if absent."""
    return (operand.first, operand.second) if hasattr(operand, "second") else (operand, Sink())


def _target(env: Program, operand, typ: Type) -> tuple[int, np.dtype, np.dtype | None]:
    """Register number, its dtype, and the dtype to extend narrower results to first."""
    if not isinstance(operand, Reg):
        raise unsupported(env.inst, "destination")
    reg_dtype, wide = REG_DTYPE[operand.width], None
    if typ.width < operand.width:
        wide = np.dtype(("i" if typ.signed else "u") + str(operand.width // 8))
    return env.reg(operand), reg_dtype, wide


def dest(env: Program, operand, typ: Type | str) -> Setter:
    """A function writing a full-length (or 0-d) result of ``typ.dtype`` to the active lanes."""
    typ = TYPES[typ] if isinstance(typ, str) else typ
    if isinstance(operand, Sink):
        return lambda b, m, v: None
    k, reg_dtype, wide = _target(env, operand, typ)

    def put(b, m, v):
        if wide is not None:
            v = v.astype(wide)
        if v.dtype != reg_dtype:
            v = v.view(reg_dtype)
        if m is None:
            b.regs[k][...] = v
        else:
            np.copyto(b.regs[k], v, where=m)

    return put


def dest_lanes(env: Program, operand, typ: Type) -> Setter:
    """Like :func:`dest` for values of the active lanes alone: takes their indices, or None."""
    if isinstance(operand, Sink):
        return lambda b, lanes, v: None
    k, reg_dtype, wide = _target(env, operand, typ)

    def put(b, lanes, v):
        if wide is not None:
            v = v.astype(wide)
        b.regs[k][slice(None) if lanes is None else lanes] = v.view(reg_dtype)

    return put


def lanewise(env: Program, inst: Inst, fn: Callable, out: Type | str, *get: Getter) -> Step:
    """A step that stores ``fn(*operands)`` in operand 0."""
    put = dest(env, inst.operands[0], out)
    if len(get) == 1:
        (a,) = get
        return lambda b, m: put(b, m, fn(a(b)))
    if len(get) == 2:
        a, c = get
        return lambda b, m: put(b, m, fn(a(b), c(b)))
    return lambda b, m: put(b, m, fn(*[g(b) for g in get]))
