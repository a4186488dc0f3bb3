"""Rounding, against libm's fma and exact rationals."""

import ctypes
import math
from fractions import Fraction

import numpy as np
import pytest

from ptxsim import fp

F = fp.FORMATS
libm = ctypes.CDLL("libm.so.6")
libm.fma.restype, libm.fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3
libm.fmaf.restype, libm.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def quiet():
    with np.errstate(all="ignore"):
        yield


def random_bits(n, dtype):
    size = np.dtype(dtype).itemsize
    return (
        rng.integers(0, 1 << 63, n, dtype=np.uint64)
        .view(f"u{size}")[: n * 8 // size][-n:]
        .copy()
        .view(dtype)
    )


def same(a, b):
    return (a == b) & (np.signbit(a) == np.signbit(b)) | np.isnan(a) & np.isnan(b)


def triples(dtype, n=20000):
    """Random bits, ordinary values, near ties, cancellations and subnormal results."""
    p = 12 if dtype is np.float32 else 27
    yield random_bits(n, dtype), random_bits(n, dtype), random_bits(n, dtype)
    a, b, c = (rng.standard_normal(n).astype(dtype) for _ in range(3))
    yield a, b, c
    yield a, b, -(a * b)
    yield a, b, -(a * b) * dtype(1 + np.finfo(dtype).eps)
    a, b = ((1 + rng.integers(0, 2**p, n) * 2.0**-p).astype(dtype) for _ in range(2))
    yield a, b, (rng.integers(-1, 2, n) * 2.0 ** -rng.integers(20, 120, n)).astype(dtype)
    tiny = np.finfo(dtype).tiny
    yield (
        a,
        (tiny * rng.standard_normal(n)).astype(dtype),
        (tiny * rng.standard_normal(n)).astype(dtype),
    )
    special = np.array(
        [0.0, -0.0, 1, -1, np.inf, -np.inf, np.nan, tiny / 4, np.finfo(dtype).max], dtype
    )
    yield tuple(
        np.array(x)
        for x in zip(*[(x, y, z) for x in special for y in special for z in special], strict=True)
    )


@pytest.mark.parametrize(
    "name,dtype,reference", [("f32", np.float32, libm.fmaf), ("f64", np.float64, libm.fma)]
)
def test_fma_rounds_once(name, dtype, reference):
    for a, b, c in triples(dtype):
        got = F[name].encode(fp.arithmetic("fma", F[name], "rn")(a, b, c)).view(dtype)
        want = np.array(
            [reference(*t) for t in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)], dtype
        )
        assert same(got, want).all()


def bracket(q: Fraction, dtype):
    """Neighbours of q: the largest float <= q and the smallest >= q."""
    x = dtype(float(q))
    below = x if Fraction(float(x)) <= q else np.nextafter(x, dtype(-np.inf))
    above = x if Fraction(float(x)) >= q else np.nextafter(x, dtype(np.inf))
    return below, above


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "div", "fma", "rcp"])
@pytest.mark.parametrize("name,dtype,n", [("f32", np.float32, 1500), ("f64", np.float64, 300)])
def test_directed_rounding(name, dtype, n, op, mode):
    a, b, c = (
        (rng.standard_normal(n) * 10.0 ** rng.integers(-12, 10, n)).astype(dtype) for _ in range(3)
    )
    args = {"fma": (a, b, c), "rcp": (a,)}.get(op, (a, b))
    got = F[name].encode(fp.arithmetic(op, F[name], mode)(*args), mode).view(dtype)
    for i in range(n):
        x, y, z = (Fraction(float(v[i])) for v in (a, b, c))
        q = {
            "add": x + y,
            "sub": x - y,
            "mul": x * y,
            "div": x / y,
            "fma": x * y + z,
            "rcp": 1 / x,
        }[op]
        below, above = bracket(q, dtype)
        assert got[i] == {"rm": below, "rp": above, "rz": below if q > 0 else above}[mode]


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("name,dtype", [("f32", np.float32), ("f64", np.float64)])
def test_sqrt(name, dtype, mode):
    a = (rng.random(300) * 10.0 ** rng.integers(-30, 30, 300)).astype(dtype)
    got = F[name].encode(fp.arithmetic("sqrt", F[name], mode)(a), mode).view(dtype)
    for x, r in zip(a, got, strict=True):
        lo, hi = (Fraction(float(np.nextafter(r, dtype(s * np.inf)))) for s in (-1, 1))
        x, r = Fraction(float(x)), Fraction(float(r))
        if mode == "rn":
            assert ((lo + r) / 2) ** 2 <= x <= ((r + hi) / 2) ** 2
        elif mode == "rp":
            assert lo * lo < x <= r * r
        else:
            assert r * r <= x < hi * hi


def test_exact_cancellation_rounds_down_to_minus_zero():
    one = np.array([1.0], np.float32)
    add = fp.arithmetic("add", F["f32"], "rm")
    assert np.signbit(add(one, -one)) and not np.signbit(
        fp.arithmetic("add", F["f32"], "rn")(one, -one)
    )
    assert (
        fp._exact64("fma", "rm", (1.0, 1.0, -1.0)) == 0
        and math.copysign(1, fp._exact64("fma", "rm", (1.0, 1.0, -1.0))) == -1
    )
    assert math.copysign(1, fp._exact64("add", "rn", (1.0, -1.0))) == 1


def all_values(name):
    u = np.arange(1 << 16, dtype=np.uint16)
    return u, F[name].decode(u).astype(np.float64)


@pytest.mark.parametrize("name", ["f16", "bf16"])
@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("source", [np.float32, np.float64])
def test_narrow_formats_round_correctly(name, mode, source):
    """Against a search in the sorted list of all finite values."""
    u, v = all_values(name)
    finite = np.isfinite(v)
    order = np.argsort(v[finite], kind="stable")
    grid, codes = v[finite][order], u[finite][order]
    keep = np.concatenate([[True], np.diff(grid) > 0])
    grid, codes = grid[keep], codes[keep]
    mid = (grid[1:] + grid[:-1]) / 2
    x = np.concatenate(
        [
            grid,
            mid,
            np.nextafter(mid, np.inf),
            np.nextafter(mid, -np.inf),
            rng.standard_normal(1000),
            grid[1:-1] * (1 + 2.0**-40),
        ]
    )
    x = x.astype(source)
    x = x[(np.abs(x) <= F[name].largest)]
    got = F[name].decode(F[name].encode(x, mode)).astype(np.float64)
    x = x.astype(np.float64)
    i = np.searchsorted(grid, x, "right") - 1
    below, above = grid[i], grid[np.minimum(i + (grid[i] != x), len(grid) - 1)]
    nearer = np.where(x - below < above - x, below, above)
    tie = (x - below == above - x) & (below != above)
    even = np.where(codes[i] % 2 == 0, below, above)
    want = {
        "rm": below,
        "rp": above,
        "rz": np.where(x > 0, below, above),
        "rn": np.where(tie, even, nearer),
    }[mode]
    assert np.array_equal(got, want)


def test_narrow_overflow_and_nan():
    x = np.array([1e30, -1e30, np.inf, -np.inf, np.nan])
    assert F["f16"].encode(x).tolist() == [0x7C00, 0xFC00, 0x7C00, 0xFC00, 0x7FFF]
    assert F["f16"].encode(x, "rz").tolist() == [0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7FFF]
    big = np.array([3.4e38, -3.4e38, np.inf], np.float32)  # rounds past the largest bf16
    assert F["bf16"].encode(big).tolist() == [0x7F80, 0xFF80, 0x7F80]
    assert F["bf16"].encode(big, "rz").tolist() == [0x7F7F, 0xFF7F, 0x7F80]


def test_float64_to_bf16_does_not_round_twice():
    x = (
        1 + 2.0**-8 + 2.0**-40
    )  # float32 rounding alone would make this a tie, which goes to even (1.0)
    assert F["bf16"].decode(F["bf16"].encode(np.array([x])))[0] == 1 + 2.0**-7


def test_flush_and_saturate():
    x = np.array([1e-40, -1e-40, 0.0, -0.0, 2.0, np.nan, -1.0, 0.5], np.float32)
    flushed = F["f32"].flush(x)
    assert np.array_equal(flushed[:4], [0, 0, 0, 0]) and np.array_equal(
        np.signbit(flushed[:4]), [0, 1, 0, 1]
    )
    assert np.array_equal(F["f32"].saturate(x[4:]), np.array([1, 0, 0, 0.5], np.float32))


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.int32, np.uint32])
@pytest.mark.parametrize("name", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_int_to_float(dtype, name, mode):
    x = random_bits(400, dtype) >> rng.integers(0, np.iinfo(dtype).bits, 400).astype(dtype)
    fmt = F[name]
    got = fmt.decode(fmt.encode(fp.int_to_float(x, fmt, mode), mode)).astype(np.float64)
    for v, g in zip(x.tolist(), got, strict=True):
        if not math.isfinite(g) or abs(v) > fmt.largest:
            continue
        step = float(fp.ulp(np.float64(g), fmt))
        assert abs(Fraction(g) - v) <= step
        if mode == "rn":
            assert abs(Fraction(g) - v) <= Fraction(step) / 2
        elif mode == "rm":
            assert g <= v
        elif mode == "rp":
            assert g >= v
        else:
            assert abs(g) <= abs(v)


def test_perturb_stays_within_the_bound():
    exact = rng.standard_normal(10000)
    for rel in (2.0**-23, 2.0**-22, 2.0**-11):
        moved = fp.perturb(exact, rel * np.abs(exact), F["f32"], np.uint64(1))
        error = np.abs(moved - exact) / np.abs(exact)
        assert error.max() <= rel and np.median(error) > 0.1 * rel
        assert (moved > exact).mean() > 0.3 and (moved < exact).mean() > 0.3
