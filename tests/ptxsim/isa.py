"""Semantics of moves, arithmetic, logic, comparison and conversion instructions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import fp, memory
from .fp import FORMATS, Format
from .operands import (
    ALL,
    REG_DTYPE,
    TYPES,
    U8,
    U16,
    U32,
    U64,
    Getter,
    Step,
    Type,
    dest,
    fsource,
    halves,
    lanewise,
    opcode,
    source,
    sources,
    types_of,
    unsupported,
)
from .parser import Inst, Vec

I64, F64 = np.int64, np.float64


def _unsigned(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"u{dtype.itemsize}")


@opcode("mov")
def _mov(env, inst) -> Step:
    dst, src = inst.operands
    typ = TYPES[inst.type]
    if isinstance(src, Vec):
        return _pack(env, typ, dst, src.items)
    if isinstance(dst, Vec):
        return _unpack(env, typ, dst.items, src)
    return lanewise(env, inst, lambda a: a, typ, source(env, src, typ))


def _pack(env, typ: Type, dst, parts: tuple) -> Step:
    part = TYPES[f"b{typ.width // len(parts)}"]
    gets, put = [source(env, o, part) for o in parts], dest(env, dst, typ)

    def step(b, m):
        out = np.empty((b.threads, len(gets)), part.dtype)
        for j, get in enumerate(gets):
            out[:, j] = get(b)
        put(b, m, out.view(REG_DTYPE[typ.width])[:, 0])

    return step


def _unpack(env, typ: Type, parts: tuple, src) -> Step:
    part = TYPES[f"b{typ.width // len(parts)}"]
    get, puts = source(env, src, typ), [dest(env, o, part) for o in parts]

    def step(b, m):
        value = np.broadcast_to(get(b), (b.threads,)).copy().view(part.dtype).reshape(b.threads, -1)
        for j, put in enumerate(puts):
            put(b, m, np.ascontiguousarray(value[:, j]))

    return step


_WINDOWS = {
    "shared": memory.SHARED_BASE,
    "shared::cta": memory.SHARED_BASE,
    "local": memory.LOCAL_BASE,
}


@opcode("cvta")
def _cvta(env, inst) -> Step:
    back = inst.mods[0] == "to"
    base = _WINDOWS.get(inst.mods[1 if back else 0], 0)
    delta = U64(-base % (1 << 64) if back else base)
    return lanewise(env, inst, lambda a: a + delta, inst.type, *sources(env, inst, inst.type))


@opcode("isspacep")
def _isspacep(env, inst) -> Step:
    tag = _WINDOWS.get(inst.mods[0], 0) >> 56
    return lanewise(env, inst, lambda a: (a >> U64(56)) == tag, "pred", *sources(env, inst, "u64"))


@opcode("createpolicy")
def _createpolicy(env, inst) -> Step:
    return lanewise(env, inst, lambda: U64(0), "u64")


def _mul_wide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
    return a.astype(wide) * b.astype(wide)


def _mul_hi(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.itemsize < 8:
        return (_mul_wide(a, b) >> (8 * a.dtype.itemsize)).astype(a.dtype)
    mask, half = U64(ALL), U64(32)
    x, y = a.astype(U64), b.astype(U64)
    xl, xh, yl, yh = x & mask, x >> half, y & mask, y >> half
    mid = xh * yl + (xl * yl >> half)
    high = xh * yh + (mid >> half) + ((xl * yh + (mid & mask)) >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, U64(0)) - np.where(b < 0, x, U64(0))
    return high.astype(a.dtype)


def _product(inst: Inst) -> Callable:
    return _mul_hi if "hi" in inst.mods else _mul_wide if "wide" in inst.mods else np.multiply


def _saturating(fn: Callable) -> Callable:
    def clamped(a, b):
        return np.clip(fn(a.astype(I64), b.astype(I64)), -(2**31), 2**31 - 1).astype(np.int32)

    return clamped


@opcode("add", "sub", "mul", "mad", "fma")
def _arithmetic(env, inst) -> Step:
    typ = types_of(inst)[0]
    if typ.fmt:
        return _float_arithmetic(env, inst)
    if "cc" in inst.mods:
        return _carry(env, inst)
    fn = {"add": np.add, "sub": np.subtract}.get(inst.op) or _product(inst)
    if "sat" in inst.mods:
        if inst.op not in ("add", "sub"):
            raise unsupported(inst)
        fn = _saturating(fn)
    out = typ.wide if "wide" in inst.mods else typ
    if inst.op == "mad":
        return lanewise(
            env, inst, lambda a, b, c: fn(a, b) + c, out, *sources(env, inst, typ, typ, out)
        )
    return lanewise(env, inst, fn, out, *sources(env, inst, typ, typ))


@opcode("mul24", "mad24")
def _mul24(env, inst) -> Step:
    typ = TYPES[inst.type]
    shift, pad = (16 if "hi" in inst.mods else 0), typ.dtype.type(8)

    def fn(a, b, *c):
        a, b = (((x << pad) >> pad).astype(I64) for x in (a, b))
        product = ((a * b) >> shift).astype(typ.dtype)
        return product + c[0] if c else product

    return lanewise(env, inst, fn, typ, *sources(env, inst, *[typ] * (len(inst.operands) - 1)))


@opcode("addc", "subc", "madc")
def _carry(env, inst) -> Step:
    """add, sub and mad with carry in and/or out; the carry is a hidden predicate register."""
    typ = types_of(inst)[0]
    bits = _unsigned(typ.dtype)
    gets = sources(env, inst, *[typ] * (len(inst.operands) - 1))
    put, put_carry = dest(env, inst.operands[0], typ), dest(env, env.carry, "pred")
    carry_in = source(env, env.carry, "pred") if inst.op.endswith("c") else None
    product, subtract, carry_out = _product(inst), inst.op.startswith("sub"), "cc" in inst.mods

    def step(b, m):
        *first, c = [get(b) for get in gets]
        a = (product(*first) if len(first) == 2 else first[0]).view(bits)
        c = c.view(bits)
        cin = carry_in(b).astype(bits) if carry_in else bits.type(0)
        partial = a - c if subtract else a + c
        result = partial - cin if subtract else partial + cin
        put(b, m, result.view(typ.dtype))
        if carry_out:
            put_carry(
                b, m, (a < c) | (partial < cin) if subtract else (partial < a) | (result < partial)
            )

    return step


def _divide(a: np.ndarray, b: np.ndarray, remainder: bool) -> np.ndarray:
    """C-style division; by zero gives all ones (unspecified in PTX)."""
    dtype, bits = a.dtype, _unsigned(a.dtype)
    zero = b == 0
    b = np.where(zero, dtype.type(1), b)
    if dtype.kind == "u":
        q = a // b
    else:
        q = (np.abs(a).view(bits) // np.abs(b).view(bits)).view(dtype)
        q = np.where((a < 0) != (b < 0), -q, q)
    return np.where(zero, (~bits.type(0)).view(dtype), a - q * b if remainder else q)


@opcode("div", "rem")
def _div(env, inst) -> Step:
    typ = TYPES[inst.type]
    if typ.fmt:
        return _float_arithmetic(env, inst)
    return lanewise(
        env, inst, lambda a, b: _divide(a, b, inst.op == "rem"), typ, *sources(env, inst, typ, typ)
    )


@opcode("sad")
def _sad(env, inst) -> Step:
    typ = TYPES[inst.type]
    return lanewise(
        env,
        inst,
        lambda a, b, c: c + np.where(a < b, b - a, a - b),
        typ,
        *sources(env, inst, typ, typ, typ),
    )


@opcode("dp4a", "dp2a")
def _dot_product(env, inst) -> Step:
    ta, tb = types_of(inst)
    size = 4 if inst.op == "dp4a" else 2
    pick = slice(2, 4) if "hi" in inst.mods else slice(0, size)

    def fn(a, b, c):
        a, b, c = (np.ascontiguousarray(x) for x in np.broadcast_arrays(a, b, c))
        va = a.view(f"{ta.dtype.kind}{4 // size}").reshape(-1, size).astype(I64)
        vb = b.view(f"{tb.dtype.kind}1").reshape(-1, 4)[:, pick].astype(I64)
        return c + (va * vb).sum(axis=1).astype(U32)

    return lanewise(env, inst, fn, "u32", *sources(env, inst, "u32", "u32", "u32"))


@opcode("and", "or", "xor", "not", "cnot")
def _logic(env, inst) -> Step:
    fn = {
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "not": np.invert,
        "cnot": lambda a: (a == 0).astype(a.dtype),
    }[inst.op]
    return lanewise(
        env, inst, fn, inst.type, *sources(env, inst, *[inst.type] * (len(inst.operands) - 1))
    )


@opcode("shl", "shr")
def _shift(env, inst) -> Step:
    """Amounts clamp to the width; numpy then shifts everything out, as PTX does."""
    typ = TYPES[inst.type]
    fn = np.left_shift if inst.op == "shl" else np.right_shift
    return lanewise(
        env,
        inst,
        lambda a, n: fn(a, np.minimum(n, U32(typ.width)).astype(typ.dtype)),
        typ,
        *sources(env, inst, typ, "u32"),
    )


@opcode("shf")
def _funnel_shift(env, inst) -> Step:
    left, wrap = inst.mods[0] == "l", "wrap" in inst.mods

    def fn(a, b, c):
        n = (c & U32(31) if wrap else np.minimum(c, U32(32))).astype(U64)
        value = (b.astype(U64) << U64(32)) | a
        return ((value << n) >> U64(32) if left else value >> n).astype(U32)

    return lanewise(env, inst, fn, "u32", *sources(env, inst, "u32", "u32", "u32"))


def _smear(a: np.ndarray) -> np.ndarray:
    """Set every bit below the most significant set bit."""
    for k in range((8 * a.dtype.itemsize).bit_length() - 1):
        a = a | (a >> a.dtype.type(1 << k))
    return a


def _reverse(a: np.ndarray) -> np.ndarray:
    a = a.byteswap()
    for shift, pattern in ((4, b"\x0f"), (2, b"\x33"), (1, b"\x55")):
        mask, s = (
            a.dtype.type(int.from_bytes(pattern * a.dtype.itemsize, "little")),
            a.dtype.type(shift),
        )
        a = ((a >> s) & mask) | ((a & mask) << s)
    return a


@opcode("popc", "clz", "brev", "bfind")
def _count_bits(env, inst) -> Step:
    typ = TYPES[inst.type]
    width = U32(typ.width)

    def bfind(a):
        n = np.bitwise_count(_smear(np.where(a < 0, ~a, a).view(_unsigned(a.dtype)))).astype(U32)
        return np.where(n == 0, U32(ALL), width - n if "shiftamt" in inst.mods else n - U32(1))

    fn = {
        "popc": lambda a: np.bitwise_count(a).astype(U32),
        "brev": _reverse,
        "bfind": bfind,
        "clz": lambda a: width - np.bitwise_count(_smear(a)).astype(U32),
    }[inst.op]
    return lanewise(env, inst, fn, typ if inst.op == "brev" else "u32", *sources(env, inst, typ))


def _ones(n: np.ndarray) -> np.ndarray:
    """uint64 with the ``n`` low bits set (0 <= n <= 64)."""
    return np.where(n >= 64, ~U64(0), (U64(1) << np.minimum(n, 63).astype(U64)) - U64(1))


def _field(
    typ: Type, pos: np.ndarray, length: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(position, shift clamped to 63, mask of the part of the field inside the operand)."""
    pos, length = (pos & U32(0xFF)).astype(I64), (length & U32(0xFF)).astype(I64)
    return (
        pos,
        np.minimum(pos, 63).astype(U64),
        _ones(np.minimum(length, np.maximum(typ.width - pos, 0))),
    )


@opcode("bfe")
def _bfe(env, inst) -> Step:
    typ = TYPES[inst.type]
    bits = _unsigned(typ.dtype)

    def fn(a, b, c):
        pos, shift, mask = _field(typ, b, c)
        raw = a.view(bits).astype(U64)
        field = (raw >> shift) & mask
        if typ.signed:
            length = (c & U32(0xFF)).astype(I64)
            sign_at = np.minimum(np.maximum(pos + length - 1, 0), typ.width - 1).astype(U64)
            field = np.where(((raw >> sign_at) & U64(1) == 1) & (length > 0), field | ~mask, field)
        return field.astype(bits).view(typ.dtype)

    return lanewise(env, inst, fn, typ, *sources(env, inst, typ, "u32", "u32"))


@opcode("bfi")
def _bfi(env, inst) -> Step:
    typ = TYPES[inst.type]

    def fn(a, b, c, d):
        _, shift, mask = _field(typ, c, d)
        mask = mask << shift
        return ((b.astype(U64) & ~mask) | ((a.astype(U64) << shift) & mask)).astype(typ.dtype)

    return lanewise(env, inst, fn, typ, *sources(env, inst, typ, typ, "u32", "u32"))


@opcode("bmsk")
def _bmsk(env, inst) -> Step:
    wrap = "wrap" in inst.mods

    def fn(a, b):
        start, width = (
            (a & U32(31), b & U32(31)) if wrap else (np.minimum(a, 32), np.minimum(b, 32))
        )
        return ((_ones(width) << start.astype(U64)) & U64(ALL)).astype(U32)

    return lanewise(env, inst, fn, "u32", *sources(env, inst, "u32", "u32"))


@opcode("szext")
def _szext(env, inst) -> Step:
    signed, clamp = inst.type == "s32", "clamp" in inst.mods

    def fn(a, b):
        n = (b & U32(31)).astype(I64)
        low = (a.astype(U64) & _ones(n)).astype(I64)
        if signed:
            low = np.where(
                (n > 0) & ((low >> np.maximum(n - 1, 0)) & 1 == 1), low - (I64(1) << n), low
            )
        return np.where((b >= 32) & clamp, a, low.astype(U32))

    return lanewise(env, inst, fn, "u32", *sources(env, inst, "u32", "u32"))


@opcode("lop3")
def _lop3(env, inst) -> Step:
    gets = [source(env, o, "u32") for o in inst.operands[1:4]]
    table = inst.operands[4].value
    first, second = halves(inst.operands[0])
    put, put_pred = dest(env, first, "u32"), dest(env, second, "pred")
    q = source(env, inst.operands[5], "pred") if len(inst.operands) > 5 else None

    def step(batch, m):
        a, b, c = (get(batch) for get in gets)
        d = np.zeros_like(a & b & c)
        for k in range(8):
            if table >> k & 1:
                d |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
        p = (
            None
            if q is None
            else (d != 0) | q(batch)
            if inst.mods[0] == "or"
            else (d != 0) & q(batch)
        )
        put(batch, m, d)
        put_pred(batch, m, p)

    return step


# source byte of result byte i for the 2-bit selector k
_PRMT_MODES = {
    "f4e": lambda k, i: k + i,
    "b4e": lambda k, i: (k - i) % 8,
    "rc8": lambda k, i: k,
    "ecl": lambda k, i: max(k, i),
    "ecr": lambda k, i: min(k, i),
    "rc16": lambda k, i: 2 * (k & 1) + (i & 1),
}


@opcode("prmt")
def _prmt(env, inst) -> Step:
    mode = _PRMT_MODES.get(inst.mods[-1])
    table = np.array([[mode(k, i) for i in range(4)] for k in range(4)]) if mode else None

    def fn(a, b, c):
        a, b, c = np.broadcast_arrays(a, b, c)
        data = np.stack([a, b], axis=-1).view(U8).reshape(*a.shape, 8)
        if table is not None:
            picked = np.take_along_axis(data, table[c & U32(3)], axis=-1)
        else:
            control = (c[..., None] >> np.array([0, 4, 8, 12], U32)) & U32(15)
            picked = np.take_along_axis(data, (control & U32(7)).astype(I64), axis=-1)
            picked = np.where(
                control & U32(8), (picked.view(np.int8) >> 7).view(U8), picked
            )  # replicate the sign
        return np.ascontiguousarray(picked).view(U32)[..., 0]

    return lanewise(env, inst, fn, "u32", *sources(env, inst, "u32", "u32", "u32"))


@opcode("abs", "neg")
def _sign(env, inst) -> Step:
    typ = TYPES[inst.type]
    if not typ.fmt:
        return lanewise(
            env, inst, np.abs if inst.op == "abs" else np.negative, typ, *sources(env, inst, typ)
        )
    fmt, sign = typ.fmt, typ.fmt.sign
    get = source(env, inst.operands[1], typ)
    if "ftz" in inst.mods:
        flushed = fsource(env, inst.operands[1], typ, ftz=True)

        def get(b):
            return flushed(b).view(typ.dtype) if fmt.name == "f32" else fmt.encode(flushed(b))

    return lanewise(
        env, inst, (lambda a: a & ~sign) if inst.op == "abs" else (lambda a: a ^ sign), typ, get
    )


@opcode("copysign")
def _copysign(env, inst) -> Step:
    typ = TYPES[inst.type]
    sign = typ.fmt.sign
    return lanewise(
        env, inst, lambda a, b: (a & sign) | (b & ~sign), typ, *sources(env, inst, typ, typ)
    )


def float_extreme(x: np.ndarray, y: np.ndarray, is_max: bool, nan: bool) -> np.ndarray:
    """min/max with -0 < +0; a NaN operand loses unless ``nan``."""
    better = (
        (x > y) | ((x == y) & ~np.signbit(x)) if is_max else (x < y) | ((x == y) & np.signbit(x))
    )
    r = np.where(better | np.isnan(y), x, y)
    return np.where(np.isnan(x) | np.isnan(y), r.dtype.type(np.nan), r) if nan else r


@opcode("min", "max")
def _extreme(env, inst) -> Step:
    typ, is_max = TYPES[inst.type], inst.op == "max"
    if not typ.fmt:
        plain = np.maximum if is_max else np.minimum
        fn = (lambda a, b: np.maximum(plain(a, b), 0)) if "relu" in inst.mods else plain
        return lanewise(env, inst, fn, typ, *sources(env, inst, typ, typ))
    nan, absolute, xorsign = ("NaN" in inst.mods), ("abs" in inst.mods), ("xorsign" in inst.mods)

    def fn(*args):
        negative = np.signbit(args[0]) ^ np.signbit(args[1])
        args = [np.abs(x) for x in args] if absolute else args
        r = args[0]
        for x in args[1:]:
            r = float_extreme(r, x, is_max, nan)
        if xorsign:
            r = np.where(np.isnan(r) | ~negative, r, -r)
        return typ.fmt.encode(r)

    return lanewise(
        env, inst, fn, typ, *(fsource(env, o, typ, "ftz" in inst.mods) for o in inst.operands[1:])
    )


def _mode(inst: Inst) -> str:
    return next((m for m in inst.mods if m in ("rn", "rz", "rm", "rp")), "rn")


def _finisher(inst: Inst, fmt: Format) -> Callable[[np.ndarray], np.ndarray]:
    """Round a result to bits and apply .ftz, .sat, .relu and .satfinite."""
    mode, mods = _mode(inst), set(inst.mods)
    if inst.op == "cvt" and fmt.name != "f32":
        mods.discard("ftz")  # of cvt concerns f32 only

    def finish(x):
        bits = fmt.encode(x, mode)
        if mods & {"ftz", "sat", "relu", "satfinite"}:
            y = fmt.decode(bits)
            if "ftz" in mods:
                y = fmt.flush(y)
            if "sat" in mods:
                y = fmt.saturate(y)
            if "relu" in mods:
                y = np.where(y < 0, y.dtype.type(0), y)
            if "satfinite" in mods:
                y = np.clip(y, -fmt.largest, fmt.largest).astype(y.dtype)
            bits = fmt.encode(y)
        return bits

    return finish


@opcode("rcp", "sqrt")
def _float_arithmetic(env, inst) -> Step:
    """IEEE arithmetic with one rounding."""
    if "approx" in inst.mods or "full" in inst.mods:
        return _approximate(env, inst)
    if "oob" in inst.mods:
        raise unsupported(inst)
    typ, *narrow = types_of(inst)  # add.f32.bf16 d, a, c / fma.rn.f32.bf16 d, a, b, c
    narrow *= 2 if inst.op == "fma" else 1
    types = (narrow + [typ] * 3)[: len(inst.operands) - 1]
    gets = [
        fsource(env, o, t, "ftz" in inst.mods and t is typ)
        for o, t in zip(inst.operands[1:], types, strict=True)
    ]
    fn = fp.arithmetic("fma" if inst.op == "mad" else inst.op, typ.fmt, _mode(inst))
    finish = _finisher(inst, typ.fmt)
    return lanewise(env, inst, lambda *a: finish(fn(*a)), typ, *gets)


_ULPS = {("ex2", "f32"): 2, ("rcp", "f32"): 1, ("div", "f32"): 2}
_RELATIVE = {
    ("sqrt", "f32"): 2.0**-23,
    ("rsqrt", "f32"): 2.0**-22.9,
    ("tanh", "f32"): 2.0**-11,
    ("ex2", "f16"): 2.0**-9.9,
    ("ex2", "bf16"): 2.0**-7,
}
_ABSOLUTE = {("tanh", "f16"): 2.0**-10.987, ("tanh", "bf16"): 2.0**-8}
_FUNCTIONS = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "sqrt": np.sqrt,
    "rcp": np.reciprocal,
    "rsqrt": lambda x: 1 / np.sqrt(x),
}


def error_bound(op: str, fmt: Format, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Documented maximum error of ``y = op.approx(x)`` as an absolute error (PTX ISA 9.1)."""
    key = op, fmt.name
    if key in _ULPS:
        bound = _ULPS[key] * fp.ulp(y, fmt)
    elif key in _RELATIVE:
        bound = _RELATIVE[key] * np.abs(y)
    elif key in _ABSOLUTE:
        bound = np.full(np.shape(y), _ABSOLUTE[key])
    elif op == "lg2":
        return np.where(x > 0, 2.0**-22 * np.where((x > 0.5) & (x < 2), 1.0, np.abs(y)), 0.0)
    elif op in ("sin", "cos"):
        bound = np.where(np.abs(x) <= 2 * np.pi, 2.0**-20.5, 2.0**-14.7)
    else:
        return np.zeros(np.shape(y))
    return np.where((x == 0) | (y == 0), 0.0, bound)  # the tabulated special results are exact


@opcode("ex2", "lg2", "sin", "cos", "tanh", "rsqrt")
def _approximate(env, inst) -> Step:
    """Computed in float64 and rounded, or moved by the documented error (``approx='worst'``)."""
    typ, op, ftz = TYPES[inst.type], inst.op, "ftz" in inst.mods
    fmt = typ.fmt
    if typ.name == "f64" and ftz:
        return _gross(env, inst)
    gets = [fsource(env, o, typ, ftz) for o in inst.operands[1:]]
    finish, put = _finisher(inst, fmt), dest(env, inst.operands[0], typ)

    def step(b, m):
        x, *divisor = (get(b).astype(F64) for get in gets)
        y = x / divisor[0] if divisor else _FUNCTIONS[op](x)
        if divisor and "approx" in inst.mods:  # a * (1/b): the reciprocal of a huge b underflows
            d = divisor[0]
            huge = (np.abs(d) > 2.0**126) & np.isfinite(d)
            y = np.where(huge, np.where(np.isinf(x), np.nan, np.copysign(0.0, x) * np.sign(d)), y)
        if b.error_seed is not None:
            y = fp.perturb(y, error_bound(op, fmt, x, y), fmt, b.error_seed)
        put(b, m, finish(y))

    return step


def _gross(env, inst) -> Step:
    """rcp/rsqrt.approx.ftz.f64 look at and produce the upper 32 bits only."""
    upper, nan = U64(0xFFFFFFFF00000000), U64(0x7FFFFFFF00000000)
    fmt, function = FORMATS["f64"], _FUNCTIONS[inst.op]

    def fn(a):
        y = fmt.flush(function(fmt.flush((a & upper).view(F64))))
        return np.where(np.isnan(y), nan, y.view(U64) & upper)

    return lanewise(env, inst, fn, "u64", *sources(env, inst, "u64"))


@opcode("testp")
def _testp(env, inst) -> Step:
    typ = TYPES[inst.type]
    tiny = typ.fmt.tiny
    fn = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: x == x,
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & ((np.abs(x) >= tiny) | (x == 0)),
        "subnormal": lambda x: (np.abs(x) < tiny) & (x != 0),
    }[inst.mods[0]]
    return lanewise(env, inst, fn, "pred", fsource(env, inst.operands[1], typ))


_COMPARE = {
    "eq": np.equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
    "ne": lambda a, b: (a < b) | (a > b),
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}
_BOOLEAN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(env, inst, typ: Type) -> tuple[Getter, Callable | None, Getter | None]:
    """(comparison result, how to combine it with c, c)."""
    compare = _COMPARE[inst.mods[0]]
    get = (
        (lambda o: fsource(env, o, typ, "ftz" in inst.mods))
        if typ.fmt
        else (lambda o: source(env, o, typ))
    )
    a, c = get(inst.operands[1]), get(inst.operands[2])
    combine = _BOOLEAN.get(inst.mods[1])
    third = source(env, inst.operands[3], "pred") if combine else None
    return (lambda b: compare(a(b), c(b))), combine, third


@opcode("setp")
def _setp(env, inst) -> Step:
    typ = TYPES[inst.type]
    test, combine, third = _comparison(env, inst, typ)
    first, second = halves(inst.operands[0])
    put_p, put_q = dest(env, first, "pred"), dest(env, second, "pred")

    def step(b, m):
        t = test(b)
        p, q = (t[0::2], t[1::2]) if typ.lanes == 2 else (t, ~t)
        if combine:
            c = third(b).copy()  # p may be the same register
            p, q = combine(p, c), combine(q, c)
        put_p(b, m, p)
        put_q(b, m, q)

    return step


@opcode("set")
def _set(env, inst) -> Step:
    out, typ = types_of(inst)
    test, combine, third = _comparison(env, inst, typ)
    if typ.lanes == 2 and not out.fmt:
        out = TYPES["u16x2"]
    true = out.fmt.encode(np.array(1.0)) if out.fmt else ~np.zeros((), _unsigned(out.dtype))
    put = dest(env, inst.operands[0], out)

    def step(b, m):
        t = test(b)
        if combine:
            t = combine(t, np.repeat(third(b), typ.lanes))
        put(b, m, np.where(t, true, true.dtype.type(0)).view(out.dtype))

    return step


@opcode("selp")
def _selp(env, inst) -> Step:
    typ = TYPES[inst.type].raw
    return lanewise(
        env, inst, lambda a, b, p: np.where(p, a, b), typ, *sources(env, inst, typ, typ, "pred")
    )


@opcode("slct")
def _slct(env, inst) -> Step:
    out, typ = types_of(inst)
    third = (
        fsource(env, inst.operands[3], typ, "ftz" in inst.mods)
        if typ.fmt
        else source(env, inst.operands[3], typ)
    )
    return lanewise(
        env,
        inst,
        lambda a, b, c: np.where(c >= 0, a, b),
        out.raw,
        *(source(env, o, out.raw) for o in inst.operands[1:3]),
        third,
    )


_CVT_MODIFIERS = {
    "rn",
    "rz",
    "rm",
    "rp",
    "rni",
    "rzi",
    "rmi",
    "rpi",
    "ftz",
    "sat",
    "relu",
    "satfinite",
}


@opcode("cvt")
def _cvt(env, inst) -> Step:
    out, typ = types_of(inst)
    if not set(inst.mods) <= _CVT_MODIFIERS | {out.name, typ.name}:
        raise unsupported(inst)
    integral = next((m for m in inst.mods if m in ("rni", "rzi", "rmi", "rpi")), None)
    mode, ftz = _mode(inst), "ftz" in inst.mods and typ.name == "f32"
    if out.fmt:
        finish = _finisher(inst, out.fmt)
    if out.lanes == 2:
        high, low = (fsource(env, o, typ, ftz) for o in inst.operands[1:])  # d = {b, a}
        put = dest(env, inst.operands[0], out)

        def pack(b, m):
            pair = np.empty((b.threads, 2), U16)
            pair[:, 0], pair[:, 1] = finish(low(b)), finish(high(b))
            put(b, m, pair.view(U32)[:, 0])

        return pack
    if typ.fmt:
        get = fsource(env, inst.operands[1], typ, ftz)
        if not out.fmt:
            return lanewise(
                env,
                inst,
                lambda x: fp.float_to_int(x, integral, out.dtype, typ.name == "f64"),
                out,
                get,
            )
        if integral:
            return lanewise(env, inst, lambda x: finish(fp.to_integral(x, integral)), out, get)
        return lanewise(env, inst, finish, out, get)
    get = source(env, inst.operands[1], typ)
    if out.fmt:
        return lanewise(env, inst, lambda x: finish(fp.int_to_float(x, out.fmt, mode)), out, get)
    if "sat" in inst.mods:
        to, of = np.iinfo(out.dtype), np.iinfo(typ.dtype)
        low, high = max(to.min, of.min), min(to.max, of.max)
        return lanewise(env, inst, lambda x: np.clip(x, low, high).astype(out.dtype), out, get)
    return lanewise(env, inst, lambda x: x.astype(out.dtype), out, get)


@opcode(
    "membar",
    "fence",
    "griddepcontrol",
    "prefetch",
    "prefetchu",
    "applypriority",
    "nanosleep",
    "pmevent",
    "setmaxnreg",
    "discard",
)
def _nothing(env, inst) -> Step:
    return lambda b, m: None
