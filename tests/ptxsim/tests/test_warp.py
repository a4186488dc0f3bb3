"""Warp-level operations and their convergence rule."""

import numpy as np
import pytest

import ptxsim

from .harness import evaluate, launch

rng = np.random.default_rng(3)
LANES = np.arange(128)


def shuffle(mode, x, b, c, lane):
    """PTX ISA pseudo code for one lane."""
    bval, cval, seg = b & 31, c & 31, c >> 8 & 31
    high, low = lane & seg | cval & ~seg & 31, lane & seg
    j = {
        "up": lane - bval,
        "down": lane + bval,
        "bfly": lane ^ bval,
        "idx": low | bval & ~seg & 31,
    }[mode]
    ok = j >= high if mode == "up" else j <= high
    return x[j if ok else lane], ok


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 16, 8, 4, 2])
def test_shfl(mode, width):
    """With the c operand CUDA uses for __shfl_*_sync(.., width)."""
    x = rng.integers(0, 1 << 32, 128, dtype=np.uint32)
    c = (32 - width) << 8 | (0 if mode == "up" else 31)
    for b in (0, 1, 3, 5, 16, 31):
        code = f"shfl.sync.{mode}.b32 %o0|%p1, %a0, {b}, {c}, -1; selp.u32 %o1, 1, 0, %p1;"
        got, ok = evaluate(code, x, outputs=2, block=128)
        want = [shuffle(mode, x[i // 32 * 32 :][:32], b, c, i % 32) for i in range(128)]
        assert got.tolist() == [w[0] for w in want] and ok.tolist() == [w[1] for w in want]


def test_shfl_with_per_lane_operands():
    x = rng.integers(0, 1 << 32, 128, dtype=np.uint32)
    b = rng.integers(0, 32, 128).astype(np.uint32)
    got = evaluate("shfl.sync.idx.b32 %o, %a0, %a1, 31, -1;", x, b, block=128)
    assert np.array_equal(got, x[LANES // 32 * 32 + b])


def test_shfl_from_an_inactive_lane_is_poisoned():
    x = np.arange(32, dtype=np.uint32)
    code = """setp.lt.u32 %p1, %a0, 16; mov.u32 %o, 5; @!%p1 bra END;
        shfl.sync.down.b32 %o, %a0, 4, 31, 0xFFFF;
        END:"""
    got = evaluate(code, x)
    assert got.tolist() == [*range(4, 16), *[0xFFFFFFFF] * 4, *[5] * 16]


def test_shfl_waits_for_diverged_lanes():
    """The block with the shuffle comes before the code of the late lanes in the text."""
    x = np.arange(64, dtype=np.uint32)
    code = """mov.u32 %r1, 100; and.b32 %r2, %a0, 1; setp.eq.u32 %p1, %r2, 1; @%p1 bra LATE;
        JOIN: shfl.sync.bfly.b32 %o, %r1, 1, 31, -1; bra END;
        LATE: add.u32 %r1, %a0, 1000; bra JOIN;
        END:"""
    got = evaluate(code, x, block=64)
    assert np.array_equal(got, np.where(x % 2 == 1, 100, 1000 + x + 1))


def test_warp_sync_releases_when_the_others_exit():
    x = np.arange(32, dtype=np.uint32)
    out = np.zeros(32, np.uint32)
    launch(
        """mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 8; @%p1 bra EARLY; bra.uni GO;
        MEET: vote.sync.ballot.b32 %r3, %p2, -1; ld.param.u64 %rd1, [p0];
            mad.wide.u32 %rd2, %r1, 4, %rd1;
        st.global.u32 [%rd2], %r3; exit;
        GO: setp.gt.u32 %p2, %r1, 20; bra MEET;
        EARLY: exit;""",
        [out],
    )
    assert np.array_equal(out, np.where(x < 8, 0, 0xFFE00000))


def test_deadlock_on_members_that_never_come():
    body = """mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 16; @%p1 bra A;
        bar.sync 0; bra END;
        A: shfl.sync.bfly.b32 %r2, %r1, 16, 31, -1; bar.sync 0;
        END:"""
    with pytest.raises(ptxsim.Deadlock, match="warp-synchronous"):
        launch(body, [None])


@pytest.mark.parametrize("order", ["lockstep", "reverse"])
def test_warp_barriers_of_two_branches_meet(order):
    """Even and odd lanes exchange through shared memory, each around its own bar.warp.sync."""
    out = np.zeros(64, np.uint32)
    launch(
        """ld.param.u64 %rd1, [p0]; mov.u32 %r1, %tid.x; mov.u32 %r2, s;
            mad.lo.u32 %r3, %r1, 4, %r2; xor.b32 %r4, %r3, 4;
        mad.wide.u32 %rd2, %r1, 4, %rd1; and.b32 %r5, %r1, 1; setp.eq.u32 %p1, %r5, 0;
            @%p1 bra EVEN;
        add.u32 %r6, %r1, 100; st.shared.u32 [%r3], %r6; bar.warp.sync -1;
            ld.shared.u32 %r7, [%r4]; bra END;
        EVEN: add.u32 %r6, %r1, 200; st.shared.u32 [%r3], %r6; bar.warp.sync -1;
            ld.shared.u32 %r7, [%r4];
        END: st.global.u32 [%rd2], %r7;""",
        [out],
        block=64,
        head=".shared .align 8 .b8 s[256];",
        check_uninit=True,
        order=order,
    )
    i = np.arange(64)
    assert np.array_equal(out, np.where(i % 2 == 0, i + 101, i + 199))


def test_vote():
    x = rng.integers(0, 2, 128).astype(np.uint32)
    x[32:64], x[64:96] = 1, 0
    code = """setp.ne.u32 %p1, %a0, 0; vote.sync.ballot.b32 %o0, %p1, -1;
        vote.sync.ballot.b32 %o4, !%p1, 0xFF00;
        vote.sync.any.pred %p2, %p1, -1; vote.sync.all.pred %p3, %p1, -1;
            vote.sync.uni.pred %p4, %p1, -1;
        selp.u32 %o1, 1, 0, %p2; selp.u32 %o2, 1, 0, %p3; selp.u32 %o3, 1, 0, %p4;"""
    ballot, any_, all_, uni, part = evaluate(code, x, outputs=5, block=128)
    w = x.reshape(4, 32)
    bits = (w << np.arange(32, dtype=np.uint32)).sum(1)
    assert np.array_equal(ballot, np.repeat(bits, 32))
    assert np.array_equal(any_, np.repeat(w.any(1), 32)) and np.array_equal(
        all_, np.repeat(w.all(1), 32)
    )
    assert np.array_equal(uni, np.repeat(w.all(1) | ~w.any(1), 32))
    assert np.array_equal(part, np.repeat(~bits & 0xFF00, 32))


def test_activemask_and_partial_last_warp():
    out = np.zeros(48, np.uint32)
    launch(
        """mov.u32 %r1, %tid.x; and.b32 %r2, %r1, 1; setp.eq.u32 %p1, %r2, 0;
            ld.param.u64 %rd1, [p0];
        mad.wide.u32 %rd2, %r1, 4, %rd1; @%p1 bra EVEN; bra END;
        EVEN: activemask.b32 %r3; st.global.u32 [%rd2], %r3;
        END:""",
        [out],
        block=48,
    )
    assert out[0] == 0x55555555 and out[32] == 0x5555 and not out[1::2].any()


@pytest.mark.parametrize(
    "op,typ,fold",
    [
        ("add", "u32", np.add),
        ("add", "s32", np.add),
        ("min", "s32", np.minimum),
        ("max", "u32", np.maximum),
        ("and", "b32", np.bitwise_and),
        ("or", "b32", np.bitwise_or),
        ("xor", "b32", np.bitwise_xor),
    ],
)
def test_redux(op, typ, fold):
    dtype = np.int32 if typ == "s32" else np.uint32
    x = rng.integers(0, 1 << 32, 64, dtype=np.uint32).view(dtype)
    got = evaluate(f"redux.sync.{op}.{typ} %o, %a0, -1;", x, out=dtype, block=64)
    assert np.array_equal(got, np.repeat(fold.reduce(x.reshape(2, 32), axis=1, dtype=dtype), 32))
    code = (
        f"mov.u32 %o, 0; setp.lt.u32 %p1, %a1, 10; @!%p1 bra END; "
        f"redux.sync.{op}.{typ} %o, %a0, 0x3FF; END:"
    )
    got = evaluate(code, x, (LANES[:64] % 32).astype(np.uint32), out=dtype, block=64)
    assert (
        got[3] == fold.reduce(x[:10], dtype=dtype)
        and got[40] == fold.reduce(x[32:42], dtype=dtype)
        and got[10] == 0
    )


def test_redux_f32():
    x = rng.standard_normal(64).astype(np.float32)
    x[5], x[40] = np.nan, np.nan
    x[33:40] = np.nan
    assert np.array_equal(
        evaluate("redux.sync.max.f32 %o, %a0, -1;", x, out=np.float32, block=64),
        np.repeat(np.nanmax(x.reshape(2, 32), axis=1), 32),
    )
    assert np.isnan(
        evaluate("redux.sync.max.NaN.f32 %o, %a0, -1;", x, out=np.float32, block=64)
    ).all()
    assert np.array_equal(
        evaluate("redux.sync.min.abs.f32 %o, %a0, -1;", x, out=np.float32, block=64),
        np.repeat(np.nanmin(np.abs(x).reshape(2, 32), axis=1), 32),
    )
    assert np.isnan(
        evaluate("redux.sync.min.f32 %o, %a0, -1;", np.full(32, np.nan, np.float32), out=np.float32)
    ).all()


def test_match_and_elect():
    x = rng.integers(0, 4, 64).astype(np.uint32)
    got = evaluate("match.any.sync.b32 %o, %a0, -1;", x, block=64)
    want = [sum(1 << j for j in range(32) if x[i // 32 * 32 + j] == x[i]) for i in range(64)]
    assert got.tolist() == want
    x[:32] = 7
    mask, same = evaluate(
        "match.all.sync.b32 %o0|%p1, %a0, -1; selp.u32 %o1, 1, 0, %p1;", x, outputs=2, block=64
    )
    assert mask.tolist() == [0xFFFFFFFF] * 32 + [0] * 32 and same.tolist() == [1] * 32 + [0] * 32
    leader, elected = evaluate(
        "elect.sync %o0|%p1, 0xFFFFFFF0; selp.u32 %o1, 1, 0, %p1;", x, outputs=2, block=64
    )
    assert (leader == 4).all() and np.flatnonzero(elected).tolist() == [4, 36]


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix_and_stmatrix(trans):
    """Round trip through shared memory, and the fragment layout of ldmatrix."""
    data = np.arange(256, dtype=np.uint16)
    out, back = np.zeros(128, np.uint32), np.zeros(256, np.uint16)
    launch(
        f"""ld.param.u64 %rd1, [p0]; ld.param.u64 %rd2, [p1]; ld.param.u64 %rd3, [p2];
            mov.u32 %r1, %tid.x;
        mov.u32 %r2, s; mad.lo.u32 %r3, %r1, 16, %r2;
        mad.wide.u32 %rd4, %r1, 16, %rd1; ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd4];
        st.shared.v4.b32 [%r3], {{%r4, %r5, %r6, %r7}}; bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r3];
        mad.wide.u32 %rd5, %r1, 16, %rd2; st.global.v4.b32 [%rd5], {{%r10, %r11, %r12, %r13}};
        stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r3+512], {{%r10, %r11, %r12, %r13}};
            bar.warp.sync -1;
        ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r3+512]; mad.wide.u32 %rd6, %r1, 16, %rd3;
        st.global.v4.b32 [%rd6], {{%r4, %r5, %r6, %r7}};""",
        [data, out, back],
        head=".shared .align 16 .b8 s[1024];",
    )
    assert np.array_equal(back, data)
    matrices = data.reshape(4, 8, 8)
    fragments = out.view(np.uint16).reshape(32, 4, 2)
    for t in range(32):
        for j in range(4):
            m = matrices[j].T if trans else matrices[j]
            assert fragments[t, j].tolist() == m[t // 4, 2 * (t % 4) : 2 * (t % 4) + 2].tolist()
