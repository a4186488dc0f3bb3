"""Instruction semantics against numpy or a bit-by-bit reference."""

import math

import numpy as np
import pytest

import ptxsim

from .harness import evaluate, launch, module

rng = np.random.default_rng(7)
F32 = np.float32


def ints(n, dtype=np.uint32):
    bits = np.iinfo(dtype).bits
    x = rng.integers(0, 1 << 63, n, dtype=np.uint64) * np.uint64(2) + rng.integers(
        0, 2, n, dtype=np.uint64
    )
    edge = np.array([0, 1, 2, (1 << bits) - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1], np.uint64)
    return (
        np.concatenate([edge, x >> rng.integers(0, bits, n).astype(np.uint64)])
        .astype(f"u{bits // 8}")
        .view(dtype)
    )


def pairs(dtype, n=200):
    a, b = ints(n, dtype), ints(n, dtype)
    return np.concatenate([np.repeat(a[:6], 6), a]), np.concatenate([np.tile(b[:6], 6), b])


def wrap(values, dtype):
    bits = np.iinfo(dtype).bits
    return (
        np.array([v % (1 << bits) for v in values], np.uint64).astype(f"u{bits // 8}").view(dtype)
    )


def name(dtype):
    dtype = np.dtype(dtype)
    return {"u": "u", "i": "s", "f": "f"}[dtype.kind] + str(8 * dtype.itemsize)


INTS = [np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64]


@pytest.mark.parametrize("dtype", INTS)
@pytest.mark.parametrize(
    "op,fn",
    [
        ("add", lambda a, b: a + b),
        ("sub", lambda a, b: a - b),
        ("mul.lo", lambda a, b: a * b),
        ("min", min),
        ("max", max),
        ("div", lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)),
        ("rem", lambda a, b: abs(a) % abs(b) * (-1 if a < 0 else 1)),
        ("mul.hi", None),
    ],
)
def test_integer_binary(op, fn, dtype):
    a, b = pairs(dtype)
    if op in ("div", "rem"):
        b = np.where(b == 0, dtype(3), b)
    bits = np.iinfo(dtype).bits
    fn = fn or (lambda x, y: (x * y) >> bits)
    got = evaluate(f"{op}.{name(dtype)} %o, %a0, %a1;", a, b, out=dtype)
    assert np.array_equal(got, wrap(map(fn, a.tolist(), b.tolist()), dtype))


@pytest.mark.parametrize(
    "dtype,wide",
    [(np.uint16, np.uint32), (np.int16, np.int32), (np.uint32, np.uint64), (np.int32, np.int64)],
)
def test_wide_multiply(dtype, wide):
    a, b = pairs(dtype)
    c = ints(len(a) - 6, wide)
    product = [x * y for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert np.array_equal(
        evaluate(f"mul.wide.{name(dtype)} %o, %a0, %a1;", a, b, out=wide), wrap(product, wide)
    )
    assert np.array_equal(
        evaluate(f"mad.wide.{name(dtype)} %o, %a0, %a1, %a2;", a, b, c, out=wide),
        wrap([p + z for p, z in zip(product, c.tolist(), strict=True)], wide),
    )


def test_mad_and_24_bit():
    a, b = pairs(np.int32)
    c = ints(len(a) - 6, np.int32)
    abc = list(zip(a.tolist(), b.tolist(), c.tolist(), strict=True))

    def sext(v):
        return (v & 0xFFFFFF) - ((v & 0x800000) << 1)

    for code, fn in [
        ("mad.lo.s32", lambda x, y, z: x * y + z),
        ("mad.hi.s32", lambda x, y, z: (x * y >> 32) + z),
        ("mad24.lo.s32", lambda x, y, z: sext(x) * sext(y) + z),
        ("mad24.hi.s32", lambda x, y, z: (sext(x) * sext(y) >> 16) + z),
    ]:
        assert np.array_equal(
            evaluate(f"{code} %o, %a0, %a1, %a2;", a, b, c, out=np.int32),
            wrap([fn(*t) for t in abc], np.int32),
        ), code
    got = evaluate("mul24.lo.u32 %o, %a0, %a1;", a, b)
    assert np.array_equal(
        got, wrap([(x & 0xFFFFFF) * (y & 0xFFFFFF) for x, y, _ in abc], np.uint32)
    )
    got = evaluate("sad.s32 %o, %a0, %a1, %a2;", a, b, c, out=np.int32)
    assert np.array_equal(got, wrap([abs(x - y) + z for x, y, z in abc], np.int32))


def test_saturating_add():
    a, b = pairs(np.int32)
    for op, sign in (("add", 1), ("sub", -1)):
        got = evaluate(f"{op}.sat.s32 %o, %a0, %a1;", a, b, out=np.int32)
        assert np.array_equal(
            got,
            [
                max(-(2**31), min(2**31 - 1, x + sign * y))
                for x, y in zip(a.tolist(), b.tolist(), strict=True)
            ],
        )


def test_128_bit_carry_chain():
    a, b = ([ints(94, np.uint32) for _ in range(4)] for _ in range(2))

    def join(words, i):
        return sum(int(w[i]) << 32 * k for k, w in enumerate(words))

    for op, fn in (("add", lambda x, y: x + y), ("sub", lambda x, y: x - y)):
        code = (
            f"{op}.cc.u32 %o0, %a0, %a4; {op}c.cc.u32 %o1, %a1, %a5; "
            f"{op}c.cc.u32 %o2, %a2, %a6; {op}c.u32 %o3, %a3, %a7;"
        )
        got = evaluate(code, *a, *b, outputs=4)
        for i in range(100):
            assert join(got, i) == fn(join(a, i), join(b, i)) % (1 << 128)


def test_wide_multiplication_with_mad_carry():
    """64 x 64 -> 128 bits from 32-bit mad.lo.cc / madc.hi."""
    a, b = ([ints(94, np.uint32) for _ in range(2)] for _ in range(2))
    code = """mul.lo.u32 %o0, %a0, %a2; mul.hi.u32 %o1, %a0, %a2; mov.u32 %o2, 0; mov.u32 %o3, 0;
        mad.lo.cc.u32 %o1, %a0, %a3, %o1; madc.hi.cc.u32 %o2, %a0, %a3, %o2; addc.u32 %o3, 0, 0;
        mad.lo.cc.u32 %o1, %a1, %a2, %o1; madc.hi.cc.u32 %o2, %a1, %a2, %o2; addc.u32 %o3, %o3, 0;
        mad.lo.cc.u32 %o2, %a1, %a3, %o2; madc.hi.u32 %o3, %a1, %a3, %o3;"""
    got = evaluate(code, *a, *b, outputs=4)
    for i in range(100):
        x, y = int(a[0][i]) | int(a[1][i]) << 32, int(b[0][i]) | int(b[1][i]) << 32
        assert sum(int(g[i]) << 32 * k for k, g in enumerate(got)) == x * y


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_counting(bits):
    dtype = np.dtype(f"u{bits // 8}")
    a = ints(300, dtype.type)
    assert np.array_equal(
        evaluate(f"popc.b{bits} %o, %a0;", a), [bin(x).count("1") for x in a.tolist()]
    )
    assert np.array_equal(
        evaluate(f"clz.b{bits} %o, %a0;", a), [bits - x.bit_length() for x in a.tolist()]
    )
    assert np.array_equal(
        evaluate(f"brev.b{bits} %o, %a0;", a, out=dtype),
        [int(f"{x:0{bits}b}"[::-1], 2) for x in a.tolist()],
    )
    for typ in "us":
        for suffix in ("", ".shiftamt"):
            want = []
            for x in a.tolist():
                if typ == "s" and x >> (bits - 1):
                    x ^= (1 << bits) - 1
                d = x.bit_length() - 1
                want.append(0xFFFFFFFF if d < 0 else bits - 1 - d if suffix else d)
            assert np.array_equal(evaluate(f"bfind{suffix}.{typ}{bits} %o, %a0;", a), want)


@pytest.mark.parametrize("typ", ["u32", "s32", "u64", "s64"])
def test_bfe(typ):
    width = int(typ[1:])
    a = np.repeat(ints(30, np.dtype(f"u{width // 8}").type), 40)
    pos = rng.integers(0, 300, len(a)).astype(np.uint32)
    length = rng.integers(0, 300, len(a)).astype(np.uint32)
    pos[::2], length[::2] = pos[::2] % (width + 4), length[::2] % (width + 4)
    want = []
    for x, p, n in zip(a.tolist(), pos.tolist(), length.tolist(), strict=True):
        p, n, msb = p & 255, n & 255, width - 1
        sbit = 0 if typ[0] == "u" or n == 0 else x >> min(p + n - 1, msb) & 1
        want.append(
            sum(((x >> (p + i) & 1) if i < n and p + i <= msb else sbit) << i for i in range(width))
        )
    assert np.array_equal(
        evaluate(f"bfe.{typ} %o, %a0, %a1, %a2;", a, pos, length, out=a.dtype),
        np.array(want, a.dtype),
    )


@pytest.mark.parametrize("width", [32, 64])
def test_bfi(width):
    dtype = np.dtype(f"u{width // 8}").type
    a, b = np.repeat(ints(20, dtype), 40), np.repeat(ints(20, dtype), 40)[::-1]
    pos, length = (rng.integers(0, width + 8, len(a)).astype(np.uint32) for _ in range(2))
    want = []
    for x, f, p, n in zip(a.tolist(), b.tolist(), pos.tolist(), length.tolist(), strict=True):
        for i in range(n):
            if p + i < width:
                f = f & ~(1 << (p + i)) | (x >> i & 1) << (p + i)
        want.append(f)
    assert np.array_equal(
        evaluate(f"bfi.b{width} %o, %a0, %a1, %a2, %a3;", a, b, pos, length, out=dtype),
        np.array(want, dtype),
    )


def test_bmsk_szext():
    a, b = (
        x.ravel()
        for x in np.meshgrid(np.arange(40, dtype=np.uint32), np.arange(40, dtype=np.uint32))
    )

    def bmsk(p, n, mode):
        if mode == "wrap":
            p, n = p & 31, n & 31
        return ((1 << min(n, 32)) - 1 << p) & 0xFFFFFFFF if p < 32 else 0

    for mode in ("clamp", "wrap"):
        want = [bmsk(p, n, mode) for p, n in zip(a.tolist(), b.tolist(), strict=True)]
        assert np.array_equal(evaluate(f"bmsk.{mode}.b32 %o, %a0, %a1;", a, b), want)
    x = np.repeat(ints(34), 40)
    n = np.tile(np.arange(40, dtype=np.uint32), 40)
    for mode in ("clamp", "wrap"):
        for typ in "us":
            want = []
            for v, k in zip(x.tolist(), n.tolist(), strict=True):
                if k >= 32 and mode == "clamp":
                    want.append(v)
                    continue
                k &= 31
                low = v & ((1 << k) - 1)
                want.append(
                    low
                    | (0xFFFFFFFF << k & 0xFFFFFFFF if typ == "s" and k and low >> (k - 1) else 0)
                )
            assert np.array_equal(evaluate(f"szext.{mode}.{typ}32 %o, %a0, %a1;", x, n), want)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts_clamp(bits):
    u, s = np.dtype(f"u{bits // 8}").type, np.dtype(f"i{bits // 8}").type
    a = np.repeat(ints(10, u), 80)
    n = np.tile(
        np.concatenate(
            [np.arange(70), [255, 256, 65536, 65537, 2**31, 2**32 - 1, 100, 128, 64, 32]]
        ),
        16,
    ).astype(np.uint32)
    pairs_ = list(zip(a.tolist(), n.tolist(), strict=True))
    assert np.array_equal(
        evaluate(f"shl.b{bits} %o, %a0, %a1;", a, n, out=u),
        wrap([x << min(k, bits) for x, k in pairs_], u),
    )
    assert np.array_equal(
        evaluate(f"shr.u{bits} %o, %a0, %a1;", a, n, out=u),
        wrap([x >> min(k, bits) for x, k in pairs_], u),
    )
    want = wrap([x >> min(k, bits) for x, k in zip(a.view(s).tolist(), n.tolist(), strict=True)], s)
    assert np.array_equal(evaluate(f"shr.s{bits} %o, %a0, %a1;", a, n, out=s), want)


def test_funnel_shift():
    a, b = np.repeat(ints(10), 50), np.repeat(ints(10), 50)[::-1]
    n = np.tile(
        np.concatenate([np.arange(40), [63, 64, 100, 255, 256, 1 << 31, 2**32 - 1, 32, 33, 31]]), 16
    ).astype(np.uint32)
    for mode in ("clamp", "wrap"):
        for direction in "lr":
            want = []
            for x, y, k in zip(a.tolist(), b.tolist(), n.tolist(), strict=True):
                k = min(k, 32) if mode == "clamp" else k & 31
                v = y << 32 | x
                want.append((v << k >> 32 if direction == "l" else v >> k) & 0xFFFFFFFF)
            assert np.array_equal(
                evaluate(f"shf.{direction}.{mode}.b32 %o, %a0, %a1, %a2;", a, b, n), want
            )


def test_lop3_all_tables():
    a, b, c = (ints(58) for _ in range(3))
    for table in range(256):
        want = np.zeros_like(a)
        for bit in range(32):
            k = (a >> bit & 1) * 4 + (b >> bit & 1) * 2 + (c >> bit & 1)
            want |= ((table >> k) & 1).astype(np.uint32) << np.uint32(bit)
        assert np.array_equal(evaluate(f"lop3.b32 %o, %a0, %a1, %a2, {table};", a, b, c), want)
    got = evaluate(
        "setp.eq.u32 %p1, %a0, 0; lop3.or.b32 %r1|%p2, %a0, %a1, %a2, 0x80, %p1; "
        "selp.u32 %o, 1, 0, %p2;",
        a,
        b,
        c,
    )
    assert np.array_equal(got, ((a & b & c) != 0) | (a == 0))


def test_prmt():
    a, b, c = (ints(300) for _ in range(3))
    c[:100] = rng.integers(0, 65536, 100)

    def byte(x, y, selector):
        v = (y << 32 | x) >> 8 * (selector & 7) & 255
        return (255 if v & 128 else 0) if selector & 8 else v

    want = [
        sum(byte(x, y, z >> 4 * i & 15) << 8 * i for i in range(4))
        for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    ]
    assert np.array_equal(evaluate("prmt.b32 %o, %a0, %a1, %a2;", a, b, c), want)
    tables = {
        "f4e": ["3210", "4321", "5432", "6543"],
        "b4e": ["5670", "6701", "7012", "0123"],
        "rc8": ["0000", "1111", "2222", "3333"],
        "ecl": ["3210", "3211", "3222", "3333"],
        "ecr": ["0000", "1110", "2210", "3210"],
        "rc16": ["1010", "3232", "1010", "3232"],
    }
    for mode, rows in tables.items():
        want = [
            sum(byte(x, y, int(d)) << 8 * (3 - i) for i, d in enumerate(rows[z & 3]))
            for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
        ]
        assert np.array_equal(evaluate(f"prmt.b32.{mode} %o, %a0, %a1, %a2;", a, b, c), want), mode


def test_dot_products():
    a, b, c = (ints(100) for _ in range(3))

    def lanes(x, size, signed):
        out = [x >> 8 * size * i & (1 << 8 * size) - 1 for i in range(4 // size)]
        return [v - (1 << 8 * size) if signed and v >> 8 * size - 1 else v for v in out]

    for ta in "us":
        for tb in "us":
            want = [
                (
                    z
                    + sum(
                        p * q
                        for p, q in zip(lanes(x, 1, ta == "s"), lanes(y, 1, tb == "s"), strict=True)
                    )
                )
                % 2**32
                for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
            ]
            assert np.array_equal(evaluate(f"dp4a.{ta}32.{tb}32 %o, %a0, %a1, %a2;", a, b, c), want)
            for mode, at in (("lo", 0), ("hi", 2)):
                want = [
                    (
                        z
                        + sum(
                            p * q
                            for p, q in zip(
                                lanes(x, 2, ta == "s"), lanes(y, 1, tb == "s")[at:], strict=False
                            )
                        )
                    )
                    % 2**32
                    for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
                ]
                assert np.array_equal(
                    evaluate(f"dp2a.{mode}.{ta}32.{tb}32 %o, %a0, %a1, %a2;", a, b, c), want
                )


def test_logic_and_unary():
    a, b = ints(50, np.uint64), ints(50, np.uint64)
    for op, fn in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
        assert np.array_equal(evaluate(f"{op}.b64 %o, %a0, %a1;", a, b, out=np.uint64), fn(a, b))
    assert np.array_equal(evaluate("not.b64 %o, %a0;", a, out=np.uint64), ~a)
    assert np.array_equal(evaluate("cnot.b64 %o, %a0;", a, out=np.uint64), a == 0)
    s = ints(50, np.int32)
    assert np.array_equal(
        evaluate("neg.s32 %o, %a0;", s, out=np.int32), wrap([-x for x in s.tolist()], np.int32)
    )
    assert np.array_equal(
        evaluate("abs.s32 %o, %a0;", s, out=np.int32), wrap([abs(x) for x in s.tolist()], np.int32)
    )


def test_division_by_zero_does_not_raise():
    a = np.array([5, 0, 7], np.int32)
    assert (
        evaluate("div.s32 %o, %a0, %a1;", a, np.zeros(3, np.int32), out=np.int32).tolist()
        == [-1] * 3
    )
    assert evaluate("div.u32 %o, %a0, %a1;", a, np.zeros(3, np.int32)).tolist() == [0xFFFFFFFF] * 3


def test_packed_integers():
    a, b = ints(100), ints(100)
    for op, typ, fn in (
        ("add", "u16", np.add),
        ("min", "s16", np.minimum),
        ("max", "u16", np.maximum),
    ):
        dtype = np.dtype("i2" if typ[0] == "s" else "u2")
        assert np.array_equal(
            evaluate(f"{op}.{typ}x2 %o, %a0, %a1;", a, b),
            fn(a.view(dtype), b.view(dtype)).view(np.uint32),
        )


def test_pack_unpack():
    a, b = ints(50, np.uint16), ints(50, np.uint16)
    packed = evaluate("mov.b32 %o, {%a0, %a1};", a, b)
    assert np.array_equal(packed, a.astype(np.uint32) | b.astype(np.uint32) << 16)
    lo, hi = evaluate("mov.b32 {%o0, %o1}, %a0;", packed, out=np.uint16, outputs=2)
    assert np.array_equal(lo, a) and np.array_equal(hi, b)
    assert np.array_equal(evaluate("mov.b32 {_, %o}, %a0;", packed, out=np.uint16), b)
    q = ints(50, np.uint64)
    four = evaluate("mov.b64 {%o0, %o1, %o2, %o3}, %a0;", q, out=np.uint16, outputs=4)
    assert np.array_equal(evaluate("mov.b64 %o, {%a0, %a1, %a2, %a3};", *four, out=np.uint64), q)
    r = ints(50, np.uint64)
    lo, hi = evaluate(
        "mov.b128 %q1, {%a0, %a1}; mov.b128 %q2, %q1; mov.b128 {%o0, %o1}, %q2;",
        q,
        r,
        out=np.uint64,
        outputs=2,
    )
    assert np.array_equal(lo, q) and np.array_equal(hi, r)


def test_special_registers():
    tid, lane, warp, eq, lt = evaluate(
        "mov.u32 %o0, %tid.y; mov.u32 %o1, %laneid; mov.u32 %o2, %warpid; "
        "mov.u32 %o3, %lanemask_eq; mov.u32 %o4, %lanemask_lt;",
        np.zeros(64, np.uint32),
        outputs=5,
        block=64,
    )
    i = np.arange(64)
    assert np.array_equal(lane, i % 32) and np.array_equal(warp, i // 32) and not tid.any()
    assert np.array_equal(eq, 1 << (i % 32)) and np.array_equal(lt, (1 << (i % 32)) - 1)
    out = np.zeros((3, 2, 5, 4), np.uint32)  # grid (2, 3), block (4, 5)
    launch(
        """ld.param.u64 %rd1, [p0]; mov.u32 %r1, %ctaid.y; mov.u32 %r2, %nctaid.x;
            mov.u32 %r3, %ctaid.x;
        mad.lo.u32 %r4, %r1, %r2, %r3; mov.u32 %r5, %ntid.y; mov.u32 %r6, %tid.y;
            mad.lo.u32 %r4, %r4, %r5, %r6;
        mov.u32 %r5, %ntid.x; mov.u32 %r7, %tid.x; mad.lo.u32 %r4, %r4, %r5, %r7;
            mad.wide.u32 %rd1, %r4, 4, %rd1;
        mul.lo.u32 %r8, %r1, 1000; mad.lo.u32 %r8, %r3, 100, %r8; mad.lo.u32 %r8, %r6, 10, %r8;
            add.u32 %r8, %r8, %r7;
        st.global.u32 [%rd1], %r8;""",
        [out],
        grid=(2, 3),
        block=(4, 5),
    )
    y, x, ty, tx = np.indices(out.shape)
    assert np.array_equal(out, 1000 * y + 100 * x + 10 * ty + tx)


def floats(n, dtype=np.float32):
    size = np.dtype(dtype).itemsize
    bits = np.frombuffer(rng.bytes(n * size), f"u{size}").view(dtype)
    tiny, eps = np.finfo(dtype).tiny, np.finfo(dtype).eps
    special = np.array(
        [
            0.0,
            -0.0,
            1,
            -1,
            np.inf,
            -np.inf,
            np.nan,
            tiny,
            -tiny,
            tiny / 2,
            -tiny / 4,
            1 + eps,
            np.finfo(dtype).max,
        ],
        dtype,
    )
    return np.concatenate([special, bits, rng.standard_normal(n).astype(dtype)])


def float_pairs(dtype=np.float32, n=300):
    a, b = floats(n, dtype), floats(n, dtype)
    return np.concatenate([np.repeat(a[:13], 13), a]), np.concatenate([np.tile(b[:13], 13), b])


def assert_same(got, want):
    want = np.asarray(want)
    bad = ~((got == want) & (np.signbit(got) == np.signbit(want)) | np.isnan(got) & np.isnan(want))
    assert not bad.any(), (got[bad][:5], want[bad][:5])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "op,fn", [("add", np.add), ("sub", np.subtract), ("mul", np.multiply), ("div.rn", np.divide)]
)
def test_ieee_arithmetic(op, fn, dtype):
    a, b = float_pairs(dtype)
    with np.errstate(all="ignore"):
        assert_same(evaluate(f"{op}.{name(dtype)} %o, %a0, %a1;", a, b, out=dtype), fn(a, b))


def test_ieee_unary():
    for dtype in (np.float32, np.float64):
        a, t = floats(300, dtype), name(dtype)
        with np.errstate(all="ignore"):
            assert_same(evaluate(f"sqrt.rn.{t} %o, %a0;", a, out=dtype), np.sqrt(a))
            assert_same(evaluate(f"rcp.rn.{t} %o, %a0;", a, out=dtype), 1 / a)
            assert_same(evaluate(f"neg.{t} %o, %a0;", a, out=dtype), -a)
            assert_same(evaluate(f"abs.{t} %o, %a0;", a, out=dtype), np.abs(a))


def test_nan_is_canonical():
    nan = np.array([0x7F800001, 0xFFC12345], np.uint32)
    assert evaluate("add.f32 %o, %a0, %a0;", nan).tolist() == [0x7FFFFFFF] * 2
    assert evaluate("fma.rn.f32 %o, %a0, %a0, %a0;", nan).tolist() == [0x7FFFFFFF] * 2
    assert evaluate("max.f32 %o, %a0, 0f3F800000;", nan).tolist() == [0x3F800000] * 2
    assert evaluate("max.NaN.f32 %o, %a0, 0f3F800000;", nan).tolist() == [0x7FFFFFFF] * 2


def test_ftz_and_sat():
    tiny = np.array([1e-40, -1e-40, 1e-38, 2.0**-126, 0, -0.0], F32)
    one = np.ones(6, F32)
    assert_same(
        evaluate("mul.ftz.f32 %o, %a0, %a1;", tiny, one, out=F32),
        np.array([0, -0.0, 0, 2.0**-126, 0, -0.0], F32),
    )
    assert_same(evaluate("mul.f32 %o, %a0, %a1;", tiny, one, out=F32), tiny)
    half = np.full(6, 0.5, F32)  # flushes the result 2^-127
    assert_same(
        evaluate("mul.ftz.f32 %o, %a0, %a1;", tiny, half, out=F32),
        np.array([0, -0.0, 0, 0, 0, -0.0], F32),
    )
    assert_same(
        evaluate("add.ftz.f32 %o, %a0, %a0;", tiny, out=F32),
        np.array([0, -0.0, 0, 2.0**-125, 0, -0.0], F32),
    )
    x = np.array([-1, 0.25, 2, np.nan, np.inf, -np.inf, -0.0], F32)
    assert_same(
        evaluate("add.sat.f32 %o, %a0, 0f00000000;", x, out=F32),
        np.array([0, 0.25, 1, 0, 1, 0, 0], F32),
    )
    assert_same(
        evaluate("cvt.sat.f32.f32 %o, %a0;", x, out=F32), np.array([0, 0.25, 1, 0, 1, 0, 0], F32)
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_min_max(dtype):
    a, b = float_pairs(dtype)
    t = name(dtype)

    def reference(x, y, is_max):
        if math.isnan(x) or math.isnan(y):
            return y if math.isnan(x) else x
        if x == y:
            return x if (math.copysign(1, x) > 0) == is_max else y
        return max(x, y) if is_max else min(x, y)

    for op in ("min", "max"):
        want = np.array(
            [reference(x, y, op == "max") for x, y in zip(a.tolist(), b.tolist(), strict=True)],
            dtype,
        )
        assert_same(evaluate(f"{op}.{t} %o, %a0, %a1;", a, b, out=dtype), want)
    if dtype is np.float32:
        got = evaluate("max.NaN.f32 %o, %a0, %a1;", a, b, out=dtype)
        assert_same(
            got,
            np.where(
                np.isnan(a) | np.isnan(b), np.float32(np.nan), np.where(np.isnan(want), 0, want)
            ),
        )
        got = evaluate("min.xorsign.abs.f32 %o, %a0, %a1;", a, b, out=dtype)
        with np.errstate(all="ignore"):
            size = np.fmin(np.abs(a), np.abs(b))
        assert_same(
            got,
            np.where(
                np.isnan(size),
                size,
                np.copysign(size, np.where(np.signbit(a) ^ np.signbit(b), -1, 1)).astype(F32),
            ),
        )
        c = a[::-1].copy()
        got = evaluate("max.f32 %o, %a0, %a1, %a2;", a, b, c, out=dtype)
        assert_same(
            got,
            [
                reference(reference(x, y, True), z, True)
                for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
            ],
        )


def test_f32_rounding_modes():
    a, b = (rng.standard_normal(500).astype(F32) for _ in range(2))
    exact = a.astype(np.float64) + b
    for mode in ("rz", "rm", "rp"):
        got = evaluate(f"add.{mode}.f32 %o, %a0, %a1;", a, b, out=F32).astype(np.float64)
        assert np.all(
            {"rz": np.abs(got) <= np.abs(exact), "rm": got <= exact, "rp": got >= exact}[mode]
        )
        assert np.all(np.abs(got - exact) <= np.spacing(np.abs(exact).astype(F32)))
        got = evaluate(f"fma.{mode}.f32 %o, %a0, %a1, %a0;", a, b, out=F32).astype(np.float64)
        exact_fma = a.astype(np.longdouble) * b + a
        assert np.all(
            {
                "rz": np.abs(got) <= np.abs(exact_fma),
                "rm": got <= exact_fma,
                "rp": got >= exact_fma,
            }[mode]
        )


@pytest.mark.parametrize("op,fn", [("add", np.add), ("sub", np.subtract), ("mul", np.multiply)])
def test_half_arithmetic(op, fn):
    a, b = float_pairs(np.float16, 500)
    with np.errstate(all="ignore"):
        want = fn(a.astype(np.float64), b.astype(np.float64)).astype(np.float16)
        assert_same(evaluate(f"{op}.f16 %o, %a0, %a1;", a, b, out=np.float16), want)
        got = evaluate(
            f"{op}.f16x2 %o, %a0, %a1;",
            np.repeat(a, 2).view(np.uint32),
            np.repeat(b, 2).view(np.uint32),
        ).view(np.float16)
        assert_same(got, np.repeat(want, 2))


def test_bf16_arithmetic_matches_torch():
    torch = pytest.importorskip("torch")
    a, b, c = (torch.randn(2000, dtype=torch.float64).mul(10).to(torch.bfloat16) for _ in range(3))

    def bits(t):
        return t.view(torch.int16).numpy().view(np.uint16)

    for op, want in (
        ("add", a.double() + b.double()),
        ("mul", a.double() * b.double()),
        ("sub", a.double() - b.double()),
    ):
        got = evaluate(f"{op}.bf16 %o, %a0, %a1;", bits(a), bits(b), out=np.uint16)
        assert np.array_equal(got, bits(want.to(torch.bfloat16)))
    got = evaluate("fma.rn.bf16 %o, %a0, %a1, %a2;", bits(a), bits(b), bits(c), out=np.uint16)
    want = a.double() * b.double() + c.double()  # exact enough: 16 + 8 bits
    assert (got == bits(want.to(torch.bfloat16))).mean() > 0.999
    packed = evaluate(
        "fma.rn.bf16x2 %o, %a0, %a1, %a2;", *(bits(t).view(np.uint32) for t in (a, b, c))
    )
    assert np.array_equal(packed.view(np.uint16), got)
    got = evaluate("max.bf16 %o, %a0, %a1;", bits(a), bits(b), out=np.uint16)
    assert np.array_equal(got, bits(torch.maximum(a, b)))


def test_half_min_max_abs_neg():
    a, b = float_pairs(np.float16, 500)
    with np.errstate(invalid="ignore"):
        want = np.where(
            np.isnan(a),
            b,
            np.where(np.isnan(b), a, np.where((a < b) | (a == b) & np.signbit(a), a, b)),
        )
    assert_same(evaluate("min.f16 %o, %a0, %a1;", a, b, out=np.float16), want)

    def two(x):
        return np.repeat(x, 2).view(np.uint32)

    assert_same(evaluate("min.f16x2 %o, %a0, %a1;", two(a), two(b)).view(np.float16)[::2], want)
    assert_same(evaluate("abs.f16x2 %o, %a0;", two(a)).view(np.float16)[::2], np.abs(a))
    assert_same(evaluate("neg.f16x2 %o, %a0;", two(a)).view(np.float16)[::2], -a)
    nan = evaluate("max.NaN.f16 %o, %a0, %a1;", a, b, out=np.uint16)
    assert (nan[np.isnan(a) | np.isnan(b)] == 0x7FFF).all()
    tiny = np.array([1e-5, -1e-5, 1.0], np.float16)
    assert_same(
        evaluate("abs.ftz.f32 %o, %a0;", np.array([-1e-40, -1.0], F32), out=F32),
        np.array([0, 1], F32),
    )
    assert_same(
        evaluate("add.ftz.f16 %o, %a0, %a0;", tiny, out=np.float16),
        np.array([0, -0.0, 2], np.float16),
    )
    assert_same(
        evaluate("fma.rn.relu.f16 %o, %a0, %a0, %a1;", tiny, -tiny, out=np.float16),
        np.array([0, 1e-5, 0], np.float16),
    )


def test_half_approximations():
    x = np.linspace(-4, 4, 256).astype(np.float16)
    want = np.exp2(x.astype(np.float64))
    assert_same(evaluate("ex2.approx.f16 %o, %a0;", x, out=np.float16), want.astype(np.float16))
    assert_same(
        evaluate("ex2.approx.f16x2 %o, %a0;", x.view(np.uint32)).view(np.float16),
        want.astype(np.float16),
    )
    worst = evaluate("ex2.approx.f16 %o, %a0;", x, out=np.float16, approx="worst").astype(
        np.float64
    )
    assert np.all(np.abs(worst / want - 1) <= 2.0**-9.9) and not np.array_equal(worst, want)
    assert_same(
        evaluate("tanh.approx.f16 %o, %a0;", x, out=np.float16),
        np.tanh(x.astype(np.float64)).astype(np.float16),
    )
    b = np.array([0x3F80, 0xBF80, 0x0001, 0x7F80, 0xFF80], np.uint16)  # 1, -1, subnormal, inf, -inf
    assert evaluate("ex2.approx.ftz.bf16 %o, %a0;", b, out=np.uint16).tolist() == [
        0x4000,
        0x3F00,
        0x3F80,
        0x7F80,
        0,
    ]
    assert evaluate("tanh.approx.bf16x2 %o, %a0;", np.array([0xFF807F80], np.uint32)).tolist() == [
        0xBF803F80
    ]


def test_f32x2():
    a, b, c = (rng.standard_normal(200).astype(F32) for _ in range(3))
    got = evaluate(
        "fma.rn.f32x2 %o, %a0, %a1, %a2;", *(x.view(np.uint64) for x in (a, b, c)), out=np.uint64
    ).view(F32)
    assert np.array_equal(got, evaluate("fma.rn.f32 %o, %a0, %a1, %a2;", a, b, c, out=F32))


def test_mixed_precision():
    a = rng.standard_normal(100).astype(np.float16)
    c = rng.standard_normal(100).astype(F32)
    want = (a.astype(np.float64) + c).astype(F32)
    assert_same(evaluate("add.f32.f16 %o, %a0, %a1;", a, c, out=F32), want)
    want = (a.astype(np.float64) * a.astype(np.float64) + c).astype(F32)
    assert_same(evaluate("fma.rn.f32.f16 %o, %a0, %a0, %a1;", a, c, out=F32), want)


APPROX = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "rcp": lambda x: 1 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
}


@pytest.mark.parametrize("op", APPROX)
def test_approximate_functions(op):
    x = rng.uniform(-6, 6, 1000).astype(F32)
    x = np.abs(x) if op in ("lg2", "sqrt", "rsqrt") else x
    exact = APPROX[op](x.astype(np.float64))
    assert_same(evaluate(f"{op}.approx.f32 %o, %a0;", x, out=F32), exact.astype(F32))
    worst = evaluate(f"{op}.approx.f32 %o, %a0;", x, out=F32, approx="worst").astype(np.float64)
    error = np.abs(worst - exact)
    ulp = np.spacing(np.abs(exact).astype(F32)).astype(np.float64)
    bound = {
        "ex2": 2 * ulp,
        "rcp": ulp,
        "sqrt": 2.0**-23 * np.abs(exact),
        "rsqrt": 2.0**-22.9 * np.abs(exact),
        "tanh": 2.0**-11 * np.abs(exact),
        "sin": 2.0**-20.5,
        "cos": 2.0**-20.5,
        "lg2": np.where((x > 0.5) & (x < 2), 2.0**-22, 2.0**-22 * np.abs(exact)),
    }[op]
    bound = np.maximum(bound, 0.5 * ulp)  # the result is a float32 in any case
    assert np.all(error <= bound * (1 + 1e-9)) and np.median(error / bound) > 0.4
    again = evaluate(f"{op}.approx.f32 %o, %a0;", x, out=F32, approx="worst", seed=1)
    assert not np.array_equal(again, worst)


def test_approximate_special_values():
    inf, nan = np.inf, np.nan
    table = {
        "ex2": ([-inf, -0.0, 0.0, inf, nan], [0.0, 1, 1, inf, nan]),
        "lg2": ([-inf, -1, -0.0, 0.0, inf, nan], [nan, nan, -inf, -inf, inf, nan]),
        "rcp": ([-inf, -0.0, 0.0, inf, nan], [-0.0, -inf, inf, 0.0, nan]),
        "sqrt": ([-inf, -1, -0.0, 0.0, inf, nan], [nan, nan, -0.0, 0.0, inf, nan]),
        "rsqrt": ([-inf, -1, -0.0, 0.0, inf, nan], [nan, nan, -inf, inf, 0.0, nan]),
        "sin": ([-inf, -0.0, 0.0, inf, nan], [nan, -0.0, 0.0, nan, nan]),
        "cos": ([-inf, -0.0, 0.0, inf, nan], [nan, 1, 1, nan, nan]),
        "tanh": ([-inf, -0.0, 0.0, inf, nan], [-1, -0.0, 0.0, 1, nan]),
    }
    for op, (x, want) in table.items():
        for mode in ("nearest", "worst"):
            got = evaluate(f"{op}.approx.f32 %o, %a0;", np.array(x, F32), out=F32, approx=mode)
            if op == "tanh" and mode == "worst":  # +-1 may move by 2^-11
                assert np.allclose(got, np.array(want, F32), rtol=2**-10, equal_nan=True)
            else:
                assert_same(got, np.array(want, F32))


def test_ex2_subnormals():
    x = np.array([-126.5, -130, -149, -151], F32)
    assert_same(
        evaluate("ex2.approx.f32 %o, %a0;", x, out=F32), np.exp2(x.astype(np.float64)).astype(F32)
    )
    assert_same(evaluate("ex2.approx.ftz.f32 %o, %a0;", x, out=F32), np.zeros(4, F32))


def test_division_variants():
    a, b = rng.standard_normal((2, 1000)).astype(F32)
    exact = a.astype(np.float64) / b
    for op in ("div.full.f32", "div.approx.f32", "div.approx.ftz.f32"):
        assert_same(evaluate(f"{op} %o, %a0, %a1;", a, b, out=F32), exact.astype(F32))
        worst = evaluate(f"{op} %o, %a0, %a1;", a, b, out=F32, approx="worst")
        assert np.all(
            np.abs(worst - exact) <= 2 * np.spacing(np.abs(exact).astype(F32)) * (1 + 1e-9)
        )
    x, y = (
        np.array([1, -1, np.inf, 1], F32),
        np.array([2.0**127, 2.0**127, 2.0**127, 2.0**126], F32),
    )
    assert_same(
        evaluate("div.approx.f32 %o, %a0, %a1;", x, y, out=F32),
        np.array([0, -0.0, np.nan, 2.0**-126], F32),
    )
    assert_same(
        evaluate("div.full.f32 %o, %a0, %a1;", x, y, out=F32),
        np.array([2.0**-127, -(2.0**-127), np.inf, 2.0**-126], F32),
    )


def test_gross_f64_reciprocals():
    x = np.array([3.0, -0.7, 1e300, np.inf, 0.0, np.nan, 1e-310])
    rcp = evaluate("rcp.approx.ftz.f64 %o, %a0;", x, out=np.uint64)
    rsqrt = evaluate("rsqrt.approx.ftz.f64 %o, %a0;", np.abs(x), out=np.uint64)
    assert not (rcp & 0xFFFFFFFF).any() and not (rsqrt & 0xFFFFFFFF).any()
    assert np.allclose(rcp.view(np.float64)[:2], 1 / x[:2], rtol=2e-6) and np.allclose(
        rsqrt.view(np.float64)[:3], np.abs(x[:3]) ** -0.5, rtol=2e-6
    )
    assert (
        rcp.view(np.float64)[3:5].tolist() == [0, np.inf]
        and rcp[5] == 0x7FFFFFFF00000000
        and rcp.view(np.float64)[6] == np.inf
    )


def test_copysign_testp():
    a, b = float_pairs()
    assert_same(evaluate("copysign.f32 %o, %a0, %a1;", a, b, out=F32), np.copysign(b, a))
    tiny = np.finfo(F32).tiny
    for prop, fn in {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & ((np.abs(x) >= tiny) | (x == 0)),
        "subnormal": lambda x: (np.abs(x) < tiny) & (x != 0),
    }.items():
        got = evaluate(f"testp.{prop}.f32 %p1, %a0; selp.u32 %o, 1, 0, %p1;", a)
        assert np.array_equal(got, fn(a)), prop


ORDERED = {
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
}


def compare(op, x, y):
    nan = x != x or y != y
    if op in ("num", "nan"):
        return nan == (op == "nan")
    if op.endswith("u"):
        return nan or ORDERED[op[:-1]](x, y)
    return not nan and ORDERED[op](x, y)


@pytest.mark.parametrize("op", [*ORDERED, *(o + "u" for o in ORDERED), "num", "nan"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_setp_float(op, dtype):
    a, b = float_pairs(dtype, 100)
    want = [compare(op, x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert np.array_equal(
        evaluate(f"setp.{op}.{name(dtype)} %p1, %a0, %a1; selp.u32 %o, 1, 0, %p1;", a, b), want
    )


@pytest.mark.parametrize("dtype", INTS)
def test_setp_int(dtype):
    a, b = pairs(dtype, 50)
    for op, fn in ORDERED.items():
        want = [fn(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
        assert np.array_equal(
            evaluate(f"setp.{op}.{name(dtype)} %p1, %a0, %a1; selp.u32 %o, 1, 0, %p1;", a, b), want
        )
    if dtype is np.uint32:
        for op, plain in (("lo", "lt"), ("ls", "le"), ("hi", "gt"), ("hs", "ge")):
            want = [ORDERED[plain](x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
            assert np.array_equal(
                evaluate(f"setp.{op}.u32 %p1, %a0, %a1; selp.u32 %o, 1, 0, %p1;", a, b), want
            )


def test_setp_combination_and_two_outputs():
    a, b = pairs(np.int32, 50)
    for boolop, fn in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        code = (
            f"setp.gt.s32 %p3, %a0, 0; setp.lt.{boolop}.s32 %p1|%p2, %a0, %a1, !%p3; "
            f"selp.u32 %o0, 1, 0, %p1; selp.u32 %o1, 1, 0, %p2;"
        )
        p, q = evaluate(code, a, b, outputs=2)
        assert np.array_equal(p, fn(a < b, ~(a > 0))) and np.array_equal(q, fn(~(a < b), ~(a > 0)))


def test_predicate_destination_may_guard_itself():
    a, b = pairs(np.int32, 50)
    code = (
        "setp.lt.s32 %p1, %a0, %a1; mov.pred %p2, 0; @%p1 setp.eq.s32 %p1|%p2, %a0, 5; "
        "selp.u32 %o0, 1, 0, %p1; selp.u32 %o1, 1, 0, %p2;"
    )
    p, q = evaluate(code, a, b, outputs=2)
    assert np.array_equal(p, (a < b) & (a == 5)) and np.array_equal(q, (a < b) & (a != 5))


def test_packed_setp_and_set():
    a, b = (rng.standard_normal(200).astype(np.float16) for _ in range(2))
    p, q = evaluate(
        "setp.gt.f16x2 %p1|%p2, %a0, %a1; selp.u32 %o0, 1, 0, %p1; selp.u32 %o1, 1, 0, %p2;",
        a.view(np.uint32),
        b.view(np.uint32),
        outputs=2,
    )
    assert np.array_equal(p, (a > b)[::2]) and np.array_equal(q, (a > b)[1::2])
    got = evaluate("set.gt.f16x2.f16x2 %o, %a0, %a1;", a.view(np.uint32), b.view(np.uint32)).view(
        np.float16
    )
    assert np.array_equal(got, (a > b).astype(np.float16))
    got = evaluate("set.gt.u32.f16x2 %o, %a0, %a1;", a.view(np.uint32), b.view(np.uint32)).view(
        np.uint16
    )
    assert np.array_equal(got, np.where(a > b, 0xFFFF, 0))


def test_set_selp_slct():
    a, b = float_pairs()
    with np.errstate(invalid="ignore"):
        less = a < b
        assert np.array_equal(
            evaluate("set.lt.u32.f32 %o, %a0, %a1;", a, b), np.where(less, 0xFFFFFFFF, 0)
        )
        assert np.array_equal(
            evaluate("set.lt.f32.f32 %o, %a0, %a1;", a, b, out=F32), less.astype(F32)
        )
        got = evaluate("slct.f32.f32 %o, %a0, %a1, %a1;", a, b, out=F32)
        assert_same(got, np.where(b >= 0, a, b))
        got = evaluate(
            "slct.ftz.u32.f32 %o, 1, 0, %a0;", np.array([-1e-40, 1e-40, -1.0, np.nan, -0.0], F32)
        )
        assert got.tolist() == [1, 1, 0, 0, 1]
    i = ints(50, np.int32)
    assert np.array_equal(evaluate("slct.s32.s32 %o, 7, 9, %a0;", i), np.where(i >= 0, 7, 9))


@pytest.mark.parametrize("src", [np.uint8, np.int8, *INTS])
@pytest.mark.parametrize("dst", [np.uint8, np.int8, *INTS])
def test_cvt_int(src, dst):
    bits = np.iinfo(src).bits
    a = ints(100, src)
    raw = a.astype(np.int64).view(np.uint64) if np.dtype(src).itemsize < 8 else a.view(np.uint64)
    register = raw.astype(
        np.uint32 if bits < 64 else np.uint64
    )  # 32-bit register with junk above the low bits
    if bits < 32:
        register ^= np.uint32(0xABC00000 & ~((1 << bits) - 1))
    wide = np.uint32 if np.iinfo(dst).bits <= 32 else np.uint64
    got = evaluate(f"cvt.{name(dst)}.{name(src)} %o, %a0;", register, out=wide)
    assert np.array_equal(got, wrap([int(np.array(x).astype(dst)) for x in a], wide))
    info = np.iinfo(dst)
    got = evaluate(f"cvt.sat.{name(dst)}.{name(src)} %o, %a0;", register, out=wide)
    assert np.array_equal(got, wrap([max(info.min, min(info.max, x)) for x in a.tolist()], wide))


@pytest.mark.parametrize("src", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("dst", [np.int8, np.uint8, *INTS])
@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
def test_cvt_float_to_int(src, dst, mode):
    with np.errstate(over="ignore"):
        x = np.concatenate(
            [
                floats(200, src),
                (rng.standard_normal(300) * 10.0 ** rng.integers(-2, 20, 300)).astype(src),
                np.array(
                    [
                        0.5,
                        1.5,
                        2.5,
                        -0.5,
                        -1.5,
                        127.5,
                        255.5,
                        32767.5,
                        2.0**31,
                        2.0**32,
                        2.0**63,
                        2.0**64,
                    ]
                ).astype(src),
            ]
        )
    info = np.iinfo(dst)
    rounding = {"rni": lambda v: round(v), "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[
        mode
    ]

    def reference(v):
        if math.isnan(v):
            return 0 if src is not np.float64 and info.bits < 64 else 1 << (info.bits - 1)
        if math.isinf(v):
            return info.max if v > 0 else info.min
        return max(info.min, min(info.max, rounding(v)))

    wide = np.uint32 if info.bits <= 32 else np.uint64
    want = [
        int(
            np.array(reference(v) % (1 << info.bits), np.uint64)
            .astype(f"u{info.bits // 8}")
            .view(dst)
        )
        for v in x.tolist()
    ]
    assert np.array_equal(
        evaluate(f"cvt.{mode}.{name(dst)}.{name(src)} %o, %a0;", x, out=wide), wrap(want, wide)
    )


def test_cvt_float_to_float():
    d = np.concatenate(
        [floats(300, np.float64), rng.standard_normal(300) * 10.0 ** rng.integers(-45, 39, 300)]
    )
    with np.errstate(all="ignore"):
        assert_same(evaluate("cvt.rn.f32.f64 %o, %a0;", d, out=F32), d.astype(F32))
        f = d.astype(F32)
        assert_same(evaluate("cvt.f64.f32 %o, %a0;", f, out=np.float64), f.astype(np.float64))
        assert_same(evaluate("cvt.rn.f16.f32 %o, %a0;", f, out=np.float16), f.astype(np.float16))
        h = f.astype(np.float16)
        assert_same(evaluate("cvt.f32.f16 %o, %a0;", h, out=F32), h.astype(F32))
        finite = d[np.isfinite(d)]
        up = evaluate("cvt.rp.f32.f64 %o, %a0;", finite, out=F32).astype(np.float64)
        down = evaluate("cvt.rm.f32.f64 %o, %a0;", finite, out=F32).astype(np.float64)
        assert np.all(up >= finite) and np.all(down <= finite)
        for mode, fn in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
            assert_same(evaluate(f"cvt.{mode}.f32.f32 %o, %a0;", f, out=F32), fn(f))
    assert_same(
        evaluate("cvt.rn.ftz.f32.f64 %o, %a0;", np.array([1e-40, -1e-40, 1.0]), out=F32),
        np.array([0, -0.0, 1], F32),
    )


def test_cvt_bf16():
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(
        np.concatenate([floats(2000), (1 + np.arange(-300, 300) * 2.0**-9).astype(F32)])
    )  # with ties
    want = x.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    nan = np.isnan(x.numpy())
    got = evaluate("cvt.rn.bf16.f32 %o, %a0;", x.numpy(), out=np.uint16)
    assert np.array_equal(got[~nan], want[~nan]) and (got[nan] == 0x7FFF).all()
    y = x.flip(0).contiguous()
    packed = evaluate("cvt.rn.bf16x2.f32 %o, %a0, %a1;", x.numpy(), y.numpy())
    assert np.array_equal(packed >> 16, got) and np.array_equal(packed & 0xFFFF, got[::-1])
    back = evaluate("cvt.f32.bf16 %o, %a0;", want, out=F32)
    assert_same(back, torch.from_numpy(want.view(np.int16)).view(torch.bfloat16).float().numpy())
    relu = evaluate("cvt.rn.relu.bf16x2.f32 %o, %a0, %a0;", np.array([-1.0, 2.0], F32))
    assert relu.tolist() == [0, 0x40004000]
    assert evaluate(
        "cvt.rn.satfinite.f16.f32 %o, %a0;", np.array([1e6, -np.inf, 1], F32), out=np.uint16
    ).tolist() == [0x7BFF, 0xFBFF, 0x3C00]


def test_cvt_int_to_float():
    for dtype in (np.int32, np.uint32, np.int64, np.uint64, np.int16):
        a = ints(300, dtype)
        assert_same(
            evaluate(f"cvt.rn.f32.{name(dtype)} %o, %a0;", a, out=F32),
            np.array([_nearest_f32(v) for v in a.tolist()], F32),
        )
        assert_same(
            evaluate(f"cvt.rn.f64.{name(dtype)} %o, %a0;", a, out=np.float64),
            np.array([float(v) for v in a.tolist()]),
        )


def _nearest_f32(v: int) -> float:
    """Correctly rounded float32 of an integer."""
    sign, v = (-1 if v < 0 else 1), abs(v)
    shift = max(0, v.bit_length() - 24)
    q, r = v >> shift, v & ((1 << shift) - 1)
    half = 1 << shift >> 1
    if shift and (r > half or (r == half and q & 1)):
        q += 1
    return sign * float(q << shift)


def test_unsupported_instructions_are_named():
    with pytest.raises(ptxsim.UnsupportedInstruction, match=r"line \d+: wgmma.fence.sync.aligned;"):
        _ = module("wgmma.fence.sync.aligned;").kernels["k"].program
    with pytest.raises(ptxsim.UnsupportedInstruction, match="cvt.rna.tf32.f32"):
        _ = module("cvt.rna.tf32.f32 %r1, %r2;").kernels["k"].program
