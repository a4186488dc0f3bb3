"""Floating-point formats and correctly rounded arithmetic on numpy arrays.

Results are computed so that exactly one rounding happens.  Where float64 is
not wide enough, the float64 intermediate is *rounded to odd* (truncate, then
set the last bit if anything was lost), which makes the final rounding to any
narrower format correct in every mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np

F16, F32, F64, LD = np.float16, np.float32, np.float64, np.longdouble
U16, U32, U64 = np.uint16, np.uint32, np.uint64


def directed(r: np.ndarray, exact: np.ndarray, mode: str) -> np.ndarray:
    """Turn ``r``, the round-to-nearest image of ``exact``, into another mode's."""
    if mode == "rn":
        return r
    wide = r.astype(exact.dtype)
    if mode == "rz":
        fix, toward = np.abs(wide) > np.abs(exact), 0.0
    elif mode == "rm":
        fix, toward = wide > exact, -math.inf
    else:
        fix, toward = wide < exact, math.inf
    return np.where(fix, np.nextafter(r, r.dtype.type(toward)), r)


def _two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _two_prod(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    def split(x):
        t = 134217729.0 * x
        hi = t - (t - x)
        return hi, x - hi

    p = a * b
    (ah, al), (bh, bl) = split(a), split(b)
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def _odd(s: np.ndarray, err: np.ndarray) -> np.ndarray:
    """Round-to-odd image of ``s + err`` given ``s = RN(s + err)``."""
    s, err = np.broadcast_arrays(s, err)
    fix = np.isfinite(s) & np.isfinite(err) & (err != 0) & ((s.view(U64) & U64(1)) == 0)
    return np.where(fix, np.nextafter(s, np.where(err > 0, math.inf, -math.inf)), s)


def add_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``a + b`` (float64) rounded to odd."""
    return _odd(*_two_sum(np.asarray(a, F64), np.asarray(b, F64)))


def _minus_zero(s: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """In round-down mode an exact cancellation gives -0."""
    return np.where((s == 0) & (np.signbit(a) != np.signbit(b)), -0.0, s)


def _round_fraction(q: Fraction, mode: str) -> float:
    """Round an exact non-zero rational to float64."""
    sign, q = (-1 if q < 0 else 1), abs(q)
    e = max(q.numerator.bit_length() - q.denominator.bit_length() - 54, -1074)
    n = math.floor(q / Fraction(2) ** e)
    while n >= 1 << 53:
        e, n = e + 1, n >> 1
    rest = q / Fraction(2) ** e - n
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and n & 1),
        "rz": False,
        "rm": rest > 0 and sign < 0,
        "rp": rest > 0 and sign > 0,
    }[mode]
    try:
        return sign * math.ldexp(n + bool(up), e)
    except OverflowError:
        to_inf = mode == "rn" or (mode == "rp" and sign > 0) or (mode == "rm" and sign < 0)
        return sign * (math.inf if to_inf else math.ldexp((1 << 53) - 1, 971))


def _exact64(op: str, mode: str, args: tuple[float, ...]) -> float:
    """One finite float64 operation done with rationals (slow, always right)."""
    x = [Fraction(float(a)) for a in args]
    if op == "sqrt":  # scale so that the integer root has ~80 bits, plus a sticky bit
        shift = 2 * (200 + (x[0].denominator.bit_length() // 2))
        n = x[0].numerator * (1 << shift) // x[0].denominator
        root = math.isqrt(n)
        q = Fraction(2 * root + (root * root != n), 2) / (1 << (shift // 2))
    else:
        q = (
            x[0] + x[1]
            if op == "add"
            else x[0] * x[1]
            if op == "mul"
            else x[0] / x[1]
            if op == "div"
            else x[0] * x[1] + x[2]
        )
    if q == 0:
        plain = (
            args[0] + args[1]
            if op == "add"
            else args[0] * args[1] + args[2]
            if op == "fma"
            else args[0] * args[1]
        )
        return (
            -0.0
            if mode == "rm"
            and op in ("add", "fma")
            and not math.copysign(1, plain) < 0
            and any(math.copysign(1, a) < 0 for a in args)
            else plain
        )
    return _round_fraction(q, mode)


def _patch(out: np.ndarray, where: np.ndarray, op: str, mode: str, args: tuple) -> np.ndarray:
    """Recompute the lanes in ``where`` exactly."""
    args = np.broadcast_arrays(*args)
    out, where = (
        np.array(np.broadcast_to(out, args[0].shape)),
        np.broadcast_to(where, args[0].shape),
    )
    for i in zip(*np.nonzero(where), strict=True):
        out[i] = _exact64(op, mode, tuple(float(a[i]) for a in args))
    return out


def _fma64(a, b, c, mode: str):
    """float64 fma: Boldo & Melquiond's algorithm, exact rationals where it may under/overflow."""
    a, b, c = np.broadcast_arrays(a, b, c)
    p = a * b
    out = p + c
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    out = np.where(np.isinf(c) & np.isfinite(a) & np.isfinite(b), c, out)
    if mode == "rn":
        uh, ul = _two_prod(a, b)
        th, tl = _two_sum(c, ul)
        vh, vl = _two_sum(uh, th)
        fused = vh + add_odd(tl, vl)

        def moderate(x):
            m = np.abs(x)
            return (m > 1e-120) & (m < 1e120)

        safe = moderate(a) & moderate(b) & moderate(p) & (moderate(c) | (c == 0))
        out = np.where(safe & (fused != 0), fused, out)  # p + c has the right sign of zero
        hard = finite & ~safe & (a != 0) & (b != 0)
    else:
        hard = finite
    return _patch(out, hard, "fma", mode, (a, b, c)) if hard.any() else out


def _fma_narrow(a, b, c, mode: str):
    """fma of formats with <= 24 significant bits: float64 value that rounds correctly once more."""
    p = np.multiply(a, b, dtype=F64)  # exact
    if mode == "rn":
        s = p + c
        if s.ndim:
            # A second rounding hurts only if s looks like a tie, or is subnormal, in the target.
            low = s.view(U64) & U64(0x1FFFFFFF)
            size = np.abs(s)
            risky = (low == U64(0x10000000)) | ((size < 2.0**-126) & (size > 0))
            if np.count_nonzero(risky):  # any() takes ten times as long
                p, c = np.broadcast_arrays(p, c)
                s[risky] = add_odd(p[risky], c[risky])
            return s
    s = add_odd(p, c)
    return _minus_zero(s, p, c) if mode == "rm" else s


def arithmetic(op: str, fmt: Format, mode: str) -> Callable[..., np.ndarray]:
    """A function on decoded operands whose result ``fmt.encode(.., mode)`` rounds correctly."""
    plain = {
        "add": np.add,
        "sub": np.subtract,
        "mul": np.multiply,
        "div": np.divide,
        "sqrt": np.sqrt,
        "rcp": np.reciprocal,
    }
    if op == "fma":
        if fmt is FORMATS["f64"]:
            return lambda a, b, c: _fma64(a, b, c, mode)
        if fmt is FORMATS["f32"]:
            return lambda a, b, c: _fma_narrow(a, b, c, mode)
        return lambda a, b, c: add_odd(np.multiply(a, b, dtype=F64), c)
    if mode == "rn" and fmt.name in ("f32", "f64"):
        return plain[op]
    if fmt.name == "f64":

        def slow(*args):
            args = (
                (args[0], -args[1])
                if op == "sub"
                else (np.ones_like(args[0]), args[0])
                if op == "rcp"
                else args
            )
            name = {"sub": "add", "rcp": "div"}.get(op, op)
            out = plain[name](*args)
            hard = np.logical_and.reduce(np.broadcast_arrays(*(np.isfinite(a) for a in args)))
            hard = (
                hard & (args[-1] != 0)
                if name == "div"
                else hard & (args[0] > 0)
                if name == "sqrt"
                else hard
            )
            return _patch(out, hard, name, mode, args)

        return slow
    if op in ("add", "sub"):

        def add(a, b):
            b = -b if op == "sub" else b
            s = add_odd(a, b)
            return _minus_zero(s, a, b) if mode == "rm" else s

        return add
    return lambda *args: plain[op](*(np.asarray(a, F64) for a in args))


class Format:
    """A binary floating-point format stored in unsigned integers."""

    def __init__(self, name: str, bits: type, tiny: float, nan: int, largest: float):
        self.name, self.bits, self.tiny, self.largest = name, bits, tiny, largest
        self.nan = bits(nan)
        self.sign = bits(1 << (8 * np.dtype(bits).itemsize - 1))
        self.native = {"f16": F16, "f32": F32, "f64": F64}.get(name)

    def decode(self, u: np.ndarray) -> np.ndarray:
        """Bits to a float array holding the same values (f16 and bf16 widen to float32)."""
        if self.name == "f16":
            return u.view(F16).astype(F32)
        if self.name == "bf16":
            return (u.astype(U32) << U32(16)).view(F32)
        return u.view(self.native)

    def encode(self, x: np.ndarray, mode: str = "rn") -> np.ndarray:
        """Round values (or round-to-odd float64 values) to bits; NaN becomes canonical."""
        x = np.asarray(x)
        if self.name == "bf16":
            u = self._bf16(x, mode)
        elif x.dtype == self.native:
            u = x.view(self.bits)
        else:
            u = directed(x.astype(self.native), x, mode).view(self.bits)
        nan = x != x
        return np.where(nan, self.nan, u) if np.count_nonzero(nan) else u

    def _bf16(self, x: np.ndarray, mode: str) -> np.ndarray:
        if x.dtype != F32:  # round to odd in float32 first
            z = directed(x.astype(F32), x, "rz")
            x = (z.view(U32) | ((z != x) & np.isfinite(x)).astype(U32)).view(F32)
        u = x.view(U32)
        if mode == "rn":
            u = u + (U32(0x7FFF) + ((u >> U32(16)) & U32(1)))
        elif mode != "rz":
            away = (u & U32(0xFFFF)) != 0
            away &= np.signbit(x) == (mode == "rm")
            u = u + (away.astype(U32) << U32(16))
        return (u >> U32(16)).astype(U16)

    def flush(self, x: np.ndarray) -> np.ndarray:
        """Subnormals to zero of the same sign (``.ftz``)."""
        small = np.abs(x) < self.tiny
        return np.multiply(x, ~small, dtype=x.dtype) if np.count_nonzero(small) else x

    def saturate(self, x: np.ndarray) -> np.ndarray:
        """``.sat``: clamp to [0, 1], NaN to +0."""
        return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))


FORMATS = {
    "f16": Format("f16", U16, 2.0**-14, 0x7FFF, 65504.0),
    "bf16": Format("bf16", U16, 2.0**-126, 0x7FFF, float.fromhex("0x1.fep127")),
    "f32": Format("f32", U32, 2.0**-126, 0x7FFFFFFF, float.fromhex("0x1.fffffep127")),
    "f64": Format(
        "f64", U64, 2.0**-1022, 0x7FF8000000000000, float.fromhex("0x1.fffffffffffffp1023")
    ),
}


_TO_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def to_integral(x: np.ndarray, mode: str) -> np.ndarray:
    """Round to an integral value in the same format (``.rni`` etc.)."""
    return _TO_INTEGRAL[mode](x)


def float_to_int(x: np.ndarray, mode: str, dtype: np.dtype, from_f64: bool) -> np.ndarray:
    """cvt float -> integer: clamps; NaN gives 0 or, with a 64-bit side, the sign bit."""
    info = np.iinfo(dtype)
    r = to_integral(x, mode).astype(F64)
    low, high = r < float(info.min), r >= float(info.max + 1)
    nan = r != r
    out = np.where(low | high | nan, 0.0, r).astype(dtype)
    out = np.where(high, info.max, np.where(low, info.min, out)).astype(dtype)
    if nan.any():
        fill = (
            np.array(1 << (info.bits - 1), np.dtype(f"u{info.bits // 8}")).view(dtype)
            if from_f64 or info.bits == 64
            else dtype.type(0)
        )
        out = np.where(nan, fill, out)
    return out


def int_to_float(x: np.ndarray, fmt: Format, mode: str) -> np.ndarray:
    """cvt integer -> float, as a value ``fmt.encode(.., mode)`` rounds correctly."""
    if mode == "rn" and fmt.native in (F32, F64):
        return x.astype(fmt.native)
    if x.dtype.itemsize < 8:
        return x.astype(F64)
    exact = x.astype(LD)
    near = exact.astype(F64)
    if fmt.native is F64:
        return directed(near, exact, mode)
    return _odd(near, (exact - near).astype(F64))


def perturb(exact: np.ndarray, bound: np.ndarray, fmt: Format, seed: np.uint64) -> np.ndarray:
    """``exact`` moved by (almost) ``bound`` to a value of ``fmt``.

    The direction depends on its bits and the seed: threads with the same value err alike, as on a
    GPU.
    """
    mixed = (np.asarray(exact, F64).view(U64) ^ seed) * U64(0x9E3779B97F4A7C15)
    up = ((mixed ^ (mixed >> U64(29))) * U64(0xBF58476D1CE4E5B9)) >> U64(63) != 0
    moved = fmt.decode(
        np.where(up, fmt.encode(exact + bound, "rm"), fmt.encode(exact - bound, "rp"))
    ).astype(F64)
    return np.where(
        np.isfinite(moved) & (bound > 0) & (np.abs(moved - exact) <= bound), moved, exact
    )


def ulp(x: np.ndarray, fmt: Format) -> np.ndarray:
    """Unit in the last place of ``x`` in ``fmt``."""
    bits = {"f16": 10, "bf16": 7, "f32": 23, "f64": 52}[fmt.name]
    _, e = np.frexp(np.maximum(np.abs(x), fmt.tiny))
    return np.ldexp(1.0, e - 1 - bits)
