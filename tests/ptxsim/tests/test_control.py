"""Branches, loops, calls, barriers."""

import numpy as np
import pytest

import ptxsim
from ptxsim import machine

from .harness import HEADER, ORDERS, evaluate, launch, module

REDUCE = """ld.param.u64 %rd1, [p0]; ld.param.u64 %rd2, [p1]; mov.u32 %r1, %tid.x;
    mov.u32 %r9, %ctaid.x;
    mov.u32 %r2, %ntid.x; mad.lo.u32 %r3, %r9, %r2, %r1; mad.wide.u32 %rd3, %r3, 4, %rd1;
        ld.global.u32 %r4, [%rd3];
    mov.u32 %r5, s; mad.lo.u32 %r6, %r1, 4, %r5; st.shared.u32 [%r6], %r4;
    shr.u32 %r7, %r2, 1;
    LOOP: SYNC
    setp.lt.u32 %p1, %r1, %r7; @!%p1 bra SKIP;
    mad.lo.u32 %r8, %r7, 4, %r6; ld.shared.u32 %r10, [%r8]; ld.shared.u32 %r11, [%r6];
        add.u32 %r11, %r11, %r10;
    st.shared.u32 [%r6], %r11;
    SKIP: shr.u32 %r7, %r7, 1; setp.ne.u32 %p2, %r7, 0; @%p2 bra LOOP;
    setp.eq.u32 %p3, %r1, 0; mad.wide.u32 %rd4, %r9, 4, %rd2; @%p3 st.global.u32 [%rd4], %r11;"""


def reduction(sync="bar.sync 0;", **kwargs):
    x = np.arange(8 * 256, dtype=np.uint32)
    out = np.zeros(8, np.uint32)
    launch(
        REDUCE.replace("SYNC", sync),
        [x, out],
        grid=8,
        block=256,
        head=".shared .align 4 .b8 s[1024];",
        **kwargs,
    )
    return out, x.reshape(8, 256).sum(1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("batch_threads", [256, 1000, 16384])
def test_shared_reduction(order, batch_threads):
    got, want = reduction(order=order, batch_threads=batch_threads)
    assert np.array_equal(got, want)


def test_a_missing_barrier_shows_in_other_warp_orders():
    """Lockstep hides the race; running the warps one after the other reveals it."""
    got, want = reduction("", order="lockstep")
    assert np.array_equal(got, want)
    assert not np.array_equal(reduction("", order="forward")[0], want)


def test_divergent_loop():
    n = np.random.default_rng(0).integers(0, 100, 4000).astype(np.uint32)
    code = """mov.u32 %o, 0; mov.u32 %r1, 0;
        LOOP: setp.ge.u32 %p1, %r1, %a0; @%p1 bra DONE; add.u32 %o, %o, %r1; add.u32 %r1, %r1, 1;
            bra.uni LOOP;
        DONE: add.u32 %o, %o, 1;"""
    assert np.array_equal(evaluate(code, n, block=128), n * (n - 1) // 2 + 1)


def test_collatz_with_nested_branches():
    n = np.arange(1, 500, dtype=np.uint32)
    code = """mov.u32 %o, 0; mov.u32 %r1, %a0;
        LOOP: setp.eq.u32 %p1, %r1, 1; @%p1 bra DONE; and.b32 %r2, %r1, 1; setp.eq.u32 %p2, %r2, 0;
            add.u32 %o, %o, 1;
        @%p2 bra EVEN; mad.lo.u32 %r1, %r1, 3, 1; bra LOOP; EVEN: shr.u32 %r1, %r1, 1; bra LOOP;
        DONE:"""

    def steps(v):
        k = 0
        while v != 1:
            v, k = (v // 2 if v % 2 == 0 else 3 * v + 1), k + 1
        return k

    assert evaluate(code, n).tolist() == [steps(int(v)) for v in n]


def test_branch_table():
    x = np.arange(8, dtype=np.uint32)
    code = """min.u32 %r1, %a0, 3; T: .branchtargets L0, L1, L2, L3; brx.idx %r1, T;
        L0: mov.u32 %o, 10; bra END; L1: mov.u32 %o, 11; bra END; L2: mov.u32 %o, 12; bra END;
            L3: mov.u32 %o, 13;
        END:"""
    assert evaluate(code, x).tolist() == [10, 11, 12, 13, 13, 13, 13, 13]


FUNCTIONS = """
.func (.param .b32 ret) square (.param .b32 a)
{ .reg .b32 %r<4>; ld.param.u32 %r1, [a]; mul.lo.u32 %r2, %r1, %r1; st.param.b32 [ret], %r2; ret; }
.func (.param .b32 ret) sum_of_squares (.param .b32 a, .param .align 8 .b8 b[8])
{ .reg .b32 %r<8>; .reg .pred %p;
  ld.param.u32 %r1, [a]; ld.param.v2.u32 {%r2, %r3}, [b];
  setp.eq.u32 %p, %r1, 3; @%p bra SHORT;
  { .param .b32 x; st.param.b32 [x], %r1; .param .b32 y; call.uni (y), square, (x);
      ld.param.b32 %r1, [y]; }
  { .param .b32 x; st.param.b32 [x], %r2; .param .b32 y; call.uni (y), square, (x);
      ld.param.b32 %r2, [y]; }
  add.u32 %r1, %r1, %r2; add.u32 %r1, %r1, %r3; st.param.b32 [ret], %r1; ret;
  SHORT: st.param.b32 [ret], 77; ret; }
"""


@pytest.mark.parametrize("order", ORDERS)
def test_device_functions(order):
    x = np.arange(64, dtype=np.uint32)
    out = np.zeros(64, np.uint32)
    report = launch(
        """ld.param.u64 %rd1, [p0]; mov.u32 %r1, %tid.x; mad.wide.u32 %rd2, %r1, 4, %rd1;
            mov.u32 %r5, 0;
        setp.lt.u32 %p1, %r1, 50; @!%p1 bra DONE;
        { .param .b32 u; .param .align 8 .b8 v[8]; .param .b32 w; st.param.b32 [u], %r1;
            add.u32 %r2, %r1, 1;
          st.param.v2.b32 [v], {%r2, 7}; call (w), sum_of_squares, (u, v); ld.param.b32 %r5, [w]; }
        DONE: st.global.u32 [%rd2], %r5;""",
        [out],
        block=64,
        head=FUNCTIONS,
        order=order,
    )
    assert np.array_equal(out, np.where(x == 3, 77, np.where(x < 50, x * x + (x + 1) ** 2 + 7, 0)))
    assert report.by_class["branch"] > 0


def test_recursion_and_unknown_functions():
    with pytest.raises(ptxsim.UnsupportedInstruction, match="recursive"):
        _ = module("call f;", head=".func f () { call f; ret; }").kernels["k"].program
    body = (
        "mov.u32 %r1, %tid.x; setp.eq.u32 %p1, %r1, 9; @%p1 bra F; bra END; F: call ext, (); END:"
    )
    with pytest.raises(ptxsim.Trap, match="'ext'.*(\n.*)*tid=\\(9, 0, 0\\)"):
        launch(body, [None], head=".extern .func ext ();")


def test_trap_names_the_thread():
    body = (
        "mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; add.u32 %r1, %r1, %r2; "
        "setp.eq.u32 %p1, %r1, 40; @%p1 trap;"
    )
    with pytest.raises(ptxsim.Trap) as e:
        launch(body, [None], grid=20)
    assert e.value.ctaid == (9, 0, 0) and e.value.tid == (31, 0, 0) and "@%p1 trap;" in str(e.value)


def test_barrier_deadlock():
    body = (
        "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 32; @%p1 bra A; bar.sync 0; bra END; "
        "A: bar.sync 1; END:"
    )
    with pytest.raises(ptxsim.Deadlock, match="32 threads wait here, 64"):
        launch(body, [None], block=64)


def test_exited_threads_do_not_block_a_barrier():
    out = np.zeros(64, np.uint32)
    launch(
        """ld.param.u64 %rd1, [p0]; mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 40; @%p1 bra WAIT;
            exit;
        WAIT: bar.sync 0; mad.wide.u32 %rd2, %r1, 4, %rd1; st.global.u32 [%rd2], 1;""",
        [out],
        block=64,
    )
    assert out.sum() == 40


def test_barrier_with_thread_count_and_arrive():
    """Warp 0 produces, warp 1 consumes; warps 2 and 3 take no part."""
    out = np.zeros(32, np.uint32)
    for order in ORDERS:
        out[:] = 0
        launch(
            """ld.param.u64 %rd1, [p0]; mov.u32 %r1, %tid.x; and.b32 %r2, %r1, 31; mov.u32 %r3, s;
            mad.lo.u32 %r3, %r2, 4, %r3; setp.lt.u32 %p1, %r1, 32; @%p1 bra PRODUCE;
                setp.lt.u32 %p2, %r1, 64; @%p2 bra CONSUME; exit;
            PRODUCE: add.u32 %r4, %r2, 100; st.shared.u32 [%r3], %r4; bar.arrive 1, 64; exit;
            CONSUME: bar.sync 1, 64; ld.shared.u32 %r5, [%r3]; mad.wide.u32 %rd2, %r2, 4, %rd1;
                st.global.u32 [%rd2], %r5;""",
            [out],
            block=128,
            head=".shared .align 4 .b8 s[128];",
            order=order,
        )
        assert np.array_equal(out, np.arange(32) + 100), order


@pytest.mark.parametrize("order", ORDERS)
def test_barrier_reductions(order):
    x = np.random.default_rng(1).integers(0, 2, 256).astype(np.uint32)
    x[128:] = 1
    code = """setp.ne.u32 %p1, %a0, 0; bar.red.popc.u32 %o0, 0, %p1;
        barrier.cta.red.and.aligned.pred %p2, 0, %p1;
        bar.red.or.pred %p3, 0, !%p1; selp.u32 %o1, 1, 0, %p2; selp.u32 %o2, 1, 0, %p3;"""
    popc, all_, any_not = evaluate(code, x, outputs=3, block=128, order=order)
    blocks = x.reshape(2, 128)
    assert np.array_equal(popc, np.repeat(blocks.sum(1), 128))
    assert np.array_equal(all_, np.repeat(blocks.all(1), 128)) and np.array_equal(
        any_not, np.repeat((blocks == 0).any(1), 128)
    )


def test_livelock_is_a_timeout():
    with pytest.raises(ptxsim.Timeout, match="livelock"):
        launch("LOOP: bra LOOP;", [None], max_steps=1000)


@pytest.mark.parametrize("grid", [1, 2])
@pytest.mark.parametrize("order", ORDERS)
def test_spin_locks_make_progress(order, grid, monkeypatch):
    """The lock holder is ahead of the spinning threads, which have the smaller program counter."""
    monkeypatch.setattr(machine, "FAIR_AFTER", 100)
    lock, total = np.zeros(1, np.uint32), np.zeros(1, np.uint32)
    launch(
        """ld.param.u64 %rd1, [p0]; ld.param.u64 %rd2, [p1];
        SPIN: atom.acquire.gpu.global.cas.b32 %r1, [%rd1], 0, 1; setp.ne.u32 %p1, %r1, 0;
            @%p1 bra SPIN;
        ld.volatile.global.u32 %r2, [%rd2]; add.u32 %r2, %r2, 1; st.volatile.global.u32 [%rd2], %r2;
        atom.release.gpu.global.exch.b32 %r3, [%rd1], 0;""",
        [lock, total],
        grid=grid,
        block=64 // grid,
        order=order,
    )
    assert total[0] == 64 and lock[0] == 0


def test_blocks_may_wait_for_earlier_blocks():
    """Decoupled look-back: every block spins on the flag of the one before."""
    flags = np.zeros(20, np.uint32)
    for batch_threads in (32, 16384):
        flags[:] = 0
        launch(
            """ld.param.u64 %rd1, [p0]; mov.u32 %r1, %ctaid.x; mov.u32 %r9, %tid.x;
                setp.ne.u32 %p2, %r9, 0; @%p2 bra END;
            mad.wide.u32 %rd2, %r1, 4, %rd1; mov.u32 %r2, 1; setp.eq.u32 %p1, %r1, 0; @%p1 bra GO;
            SPIN: ld.acquire.gpu.global.u32 %r3, [%rd2-4]; setp.eq.u32 %p1, %r3, 0; @%p1 bra SPIN;
            add.u32 %r2, %r3, 1;
            GO: st.release.gpu.global.u32 [%rd2], %r2;
            END:""",
            [flags],
            grid=20,
            batch_threads=batch_threads,
        )
        assert flags.tolist() == list(range(1, 21))


def test_launch_argument_errors():
    m = ptxsim.parse(
        HEADER
        + ".visible .entry k(.param .u64 a, .param .u32 b, .param .f32 c) .reqntid 64 { ret; }"
    )
    k = m.kernels["k"]
    x = np.zeros(4)
    assert [p.size for p in k.params] == [8, 4, 4] and k.reqntid == (64, 1, 1)
    k.launch(1, 64, [x, 3, 1])
    for args, block, message in (
        ([x, 3], 64, "takes 3 arguments"),
        ([x, 1 << 33, 1.0], 64, "does not fit"),
        ([x, 3, 1.0], 32, "requires blocks"),
        ([x, b"123", 1.0], 64, "3 bytes"),
        ([x, 3, 1.0], (64, 32), "2048"),
    ):
        with pytest.raises(ptxsim.LaunchError, match=message):
            k.launch(1, block, args)


def test_forward_order_visits_every_warp():
    out = np.zeros(256, np.uint32)
    launch(
        """ld.param.u64 %rd1, [p0]; mov.u32 %r1, %tid.x; mad.wide.u32 %rd2, %r1, 4, %rd1;
        setp.lt.u32 %p1, %r1, 100; @%p1 bra A;
            st.global.u32 [%rd2], 2; bra END; A: st.global.u32 [%rd2], 1; END: bar.sync 0;""",
        [out],
        block=256,
        order="reverse",
    )
    assert np.array_equal(out, np.where(np.arange(256) < 100, 1, 2))
