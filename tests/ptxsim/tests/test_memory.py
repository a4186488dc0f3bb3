"""Address spaces, faults, vector accesses, atomics and traffic counts."""

import numpy as np
import pytest

import ptxsim

from .harness import HEADER, ORDERS, evaluate, launch, module

# one thread per element of p0; %rd3/%rd4 point at the thread's 4-byte element of p0/p1
INDEX = """ld.param.u64 %rd1, [p0]; ld.param.u64 %rd2, [p1]; mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x;
    mad.lo.u32 %r4, %r2, %r3, %r1;
    mad.wide.u32 %rd3, %r4, 4, %rd1; mad.wide.u32 %rd4, %r4, 4, %rd2;"""


def copy_kernel(width_bits, vec=1, stride=None):
    """Each thread copies vec elements from p0 + tid*stride to p1 + tid*stride."""
    step = stride or vec * width_bits // 8
    kind = {8: "h", 16: "h", 32: "r", 64: "rd"}[width_bits]
    regs = ", ".join(f"%{kind}{20 + i}" for i in range(vec))
    regs = f"{{{regs}}}" if vec > 1 else regs
    v = f".v{vec}" if vec > 1 else ""
    return f"""{INDEX} mad.wide.u32 %rd3, %r4, {step}, %rd1; mad.wide.u32 %rd4, %r4, {step}, %rd2;
        ld.global{v}.b{width_bits} {regs}, [%rd3]; st.global{v}.b{width_bits} [%rd4], {regs};"""


@pytest.mark.parametrize(
    "what,code",
    [("read", "ld.global.u32 %r5, [%rd3+4];"), ("write", "st.global.u32 [%rd3+4], %r1;")],
)
def test_out_of_bounds(what, code):
    x, y = np.zeros(100, np.float32), np.zeros(256, np.float32)
    body = INDEX + ".loc 1 17 0\n setp.lt.u32 %p1, %r4, 100; @%p1 " + code
    with pytest.raises(ptxsim.OutOfBounds) as e:
        launch(body, [x, y], grid=4, names=["x", "y"], head='.file 1 "kernel.cu"\n')
    assert (
        e.value.ctaid == (3, 0, 0)
        and e.value.tid == (3, 0, 0)
        and e.value.address == x.ctypes.data + 400
    )
    text = str(e.value)
    assert (
        f"{what} of 4 bytes" in text
        and "'x' (400 bytes" in text
        and "kernel.cu:17" in text
        and "kernel: k" in text
        and code in text
    )


def test_out_of_bounds_in_the_middle_of_valid_lanes():
    x, y = np.zeros(64, np.float32), np.zeros(64, np.float32)
    body = (
        INDEX
        + "setp.eq.u32 %p1, %r1, 7; @%p1 add.u64 %rd3, %rd3, 1000000; ld.global.u32 %r5, [%rd3];"
    )
    with pytest.raises(ptxsim.OutOfBounds) as e:
        launch(body, [x, y])
    assert e.value.tid == (7, 0, 0)


def test_null_and_negative_pointers():
    for code in (
        "mov.b64 %rd3, 0;",
        "add.s64 %rd3, %rd1, -4;",
        "mov.b64 %rd3, 0xfffffffffffffffc;",
    ):
        with pytest.raises(ptxsim.OutOfBounds):
            launch(
                INDEX + code + "ld.global.u32 %r5, [%rd3];",
                [np.zeros(64, np.float32), np.zeros(64, np.float32)],
            )


def test_straddling_the_end():
    raw = np.zeros(66, np.uint8)  # room for 16 4-byte elements and a half
    with pytest.raises(ptxsim.OutOfBounds):
        launch(INDEX + "setp.lt.u32 %p1, %r1, 17; @%p1 ld.global.u32 %r5, [%rd3];", [raw, raw])


def test_misaligned():
    x = np.zeros(256, np.uint8)
    for code, width in (
        ("ld.global.u16 %h1, [%rd1+1];", 2),
        ("ld.global.u32 %r5, [%rd1+2];", 4),
        ("ld.global.v2.u32 {%r5, %r6}, [%rd1+4];", 8),
        ("st.global.v4.u32 [%rd1+8], {%r1, %r1, %r1, %r1};", 16),
    ):
        with pytest.raises(ptxsim.Misaligned, match=f"{width}-byte global"):
            launch(INDEX + code, [x, x])


def test_read_only_memory():
    x = np.zeros(32, np.float32)
    x.flags.writeable = False
    launch(INDEX + "ld.global.u32 %r5, [%rd3];", [x, x])
    with pytest.raises(ptxsim.OutOfBounds, match="read-only"):
        launch(INDEX + "st.global.u32 [%rd3], %r1;", [x, x])


def test_views_use_the_whole_storage():
    base = np.arange(128, dtype=np.float32)
    out = np.zeros(128, np.float32)
    launch(copy_kernel(32), [base[32:64], out[64:]])
    assert np.array_equal(out[64:96], base[32:64]) and not out[:64].any()
    launch(INDEX + "ld.global.u32 %r5, [%rd3-128]; st.global.u32 [%rd4], %r5;", [base[32:64], out])
    assert np.array_equal(out[:32], base[:32])


def test_struct_arguments_and_extra_buffers():
    x, out = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    packed = x.ctypes.data.to_bytes(8, "little") + np.float32(2.5).tobytes() + np.int32(3).tobytes()
    m = ptxsim.parse(
        HEADER
        + """.visible .entry k(.param .align 8 .b8 s[16], .param .u64 o) {
        .reg .b32 %r<9>; .reg .b64 %rd<9>; ld.param.u64 %rd1, [s];
            ld.param.v2.b32 {%r1, %r2}, [s+8]; ld.param.u64 %rd2, [o];
        mov.u32 %r3, %tid.x; mad.wide.u32 %rd3, %r3, 4, %rd1; mad.wide.u32 %rd4, %r3, 4, %rd2;
            ld.global.f32 %r4, [%rd3];
        cvt.rn.f32.s32 %r5, %r2; fma.rn.f32 %r6, %r4, %r1, %r5; st.global.f32 [%rd4], %r6;
        mov.b64 %rd5, s; add.u64 %rd5, %rd5, 12; ld.param.u32 %r7, [%rd5]; setp.ne.u32 %p, %r7, 3;
            @%p trap; ret; }""".replace(".reg .b32 %r<9>;", ".reg .b32 %r<9>; .reg .pred %p;")
    )
    with pytest.raises(ptxsim.OutOfBounds):
        m.kernels["k"].launch(1, 64, [packed, out])
    m.kernels["k"].launch(1, 64, [packed, out], buffers={"x": x})
    assert np.array_equal(out, x * 2.5 + 3)
    out.fill(0)  # the pointer inside moves with x
    inside = ptxsim.Packed(packed, [(0, "x", x)])
    report = m.kernels["k"].launch(1, 64, [inside, out], names=["s", "out"], isolate=True)
    assert np.array_equal(out, x * 2.5 + 3) and report.traffic("x").read_bytes == 256
    with pytest.raises(ptxsim.OutOfBounds):
        m.kernels["k"].launch(2, 64, [ptxsim.Packed(packed, []), out], isolate=True)


def test_isolation_separates_arguments():
    """An overrun of x that lands exactly in y goes unnoticed at real addresses."""
    x, y = np.zeros(64, np.float32), np.zeros(64, np.float32)
    gap = y.ctypes.data - x.ctypes.data
    body = INDEX + f"add.s64 %rd5, %rd3, {gap}; st.global.u32 [%rd5], %r1;"
    launch(body, [x, y])
    assert np.array_equal(y[:32].view(np.uint32), np.arange(32))
    with pytest.raises(ptxsim.OutOfBounds):
        launch(body, [x, y], isolate=True)
    whole = np.zeros(64, np.float32)  # views of one storage keep their distance
    launch(INDEX + "st.global.u32 [%rd3+128], %r1;", [whole[:32], whole[32:]], isolate=True)
    assert np.array_equal(whole[32:].view(np.uint32), np.arange(32))


@pytest.mark.parametrize(
    "width,vec",
    [(8, 1), (8, 4), (16, 1), (16, 4), (32, 1), (32, 2), (32, 4), (64, 1), (64, 2), (32, 8)],
)
def test_copies_of_every_width(width, vec):
    n = 96 * vec * width // 8
    x, y = np.random.default_rng(0).integers(0, 256, n).astype(np.uint8), np.zeros(n, np.uint8)
    report = launch(copy_kernel(width, vec), [x, y], grid=3)
    assert np.array_equal(x, y)
    bytes_per_lane = vec * width // 8
    for s in (report.global_load, report.global_store):
        assert (
            s.requests == 3
            and s.bytes_requested == n
            and s.sectors == s.ideal_sectors == bytes_per_lane * 3
        )
        assert s.width_histogram == {bytes_per_lane: 3}
    assert report.dram_bytes_read == report.dram_bytes_written == report.l2_bytes_read == n


def test_sign_extension_of_narrow_loads():
    x = np.array([-1, -128, 127, 5], np.int8)
    assert (
        evaluate(
            "ld.param.u64 %rd1, [p0]; mov.u32 %r1, %tid.x; min.u32 %r1, %r1, 3; "
            "cvt.u64.u32 %rd2, %r1; add.u64 %rd1, %rd1, %rd2;"
            "ld.global.s8 %o, [%rd1];",
            x,
            out=np.int32,
        )[:4].tolist()
        == x.tolist()
    )
    assert (
        evaluate(
            "ld.param.u64 %rd1, [p0]; mov.u32 %r1, %tid.x; min.u32 %r1, %r1, 3; "
            "cvt.u64.u32 %rd2, %r1; add.u64 %rd1, %rd1, %rd2;"
            "ld.global.u8 %o, [%rd1];",
            x,
            out=np.int32,
        )[:4].tolist()
        == x.view(np.uint8).tolist()
    )


def test_modifiers_are_accepted():
    x, y = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    launch(
        INDEX
        + """createpolicy.fractional.L2::evict_first.b64 %rd9, 1.0;
        ld.global.nc.L1::no_allocate.L2::128B.u32 %r5, [%rd3];
            ld.global.L1::evict_last.L2::cache_hint.b32 {%r6}, [ %rd3 + 0 ], %rd9;
        ld.volatile.global.u32 %r7, [%rd3]; ld.acquire.gpu.global.u32 %r8, [%rd3];
            ld.relaxed.sys.u32 %r9, [%rd3];
        prefetch.global.L2 [%rd3]; fence.acq_rel.gpu; membar.gl; griddepcontrol.wait;
            nanosleep.u32 100;
        add.u32 %r5, %r5, %r6; add.u32 %r5, %r5, %r7; add.u32 %r5, %r5, %r8; add.u32 %r5, %r5, %r9;
        st.global.cs.L2::cache_hint.u32 [%rd4], %r5, %rd9;
            st.release.gpu.global.u32 [%rd4], %r5;""",
        [x, y],
    )
    assert np.array_equal(y, 5 * x)


def test_generic_addresses_mix_spaces():
    """Even lanes store to shared, odd lanes to global memory, through one generic pointer."""
    out = np.zeros(64, np.uint32)
    launch(
        """ld.param.u64 %rd1, [p0]; mov.u32 %r1, %tid.x; mov.u64 %rd2, s;
            cvta.shared.u64 %rd2, %rd2; cvta.global.u64 %rd1, %rd1;
        and.b32 %r2, %r1, 1; setp.eq.u32 %p1, %r2, 0; selp.b64 %rd3, %rd2, %rd1, %p1;
            mad.wide.u32 %rd3, %r1, 4, %rd3;
        st.u32 [%rd3], %r1; ld.u32 %r3, [%rd3]; isspacep.shared %p2, %rd3;
            isspacep.global %p3, %rd3;
        @!%p1 bra END; cvta.to.shared.u64 %rd4, %rd3; ld.shared.u32 %r4, [%rd4];
            mad.wide.u32 %rd5, %r1, 4, %rd1;
        selp.u32 %r5, 1000, 0, %p2; selp.u32 %r6, 5000, 0, %p3; add.u32 %r4, %r4, %r5;
            add.u32 %r4, %r4, %r6; st.global.u32 [%rd5], %r4;
        END:""",
        [out],
        block=64,
        head=".shared .align 4 .b8 s[256];",
    )
    i = np.arange(64)
    assert np.array_equal(out, np.where(i % 2 == 0, i + 1000, i))


@pytest.mark.parametrize("order", ORDERS)
def test_local_memory_and_depot(order):
    x = np.arange(64, dtype=np.uint32)
    code = """.local .align 16 .b8 depot[64]; mov.u64 %rd1, depot; cvta.local.u64 %rd2, %rd1;
        mov.u32 %r1, 0;
        FILL: mad.wide.u32 %rd3, %r1, 4, %rd1; mad.lo.u32 %r2, %r1, %a0, 3;
            st.local.u32 [%rd3], %r2; add.u32 %r1, %r1, 1;
        setp.lt.u32 %p1, %r1, 16; @%p1 bra FILL;
        and.b32 %r3, %a0, 15; mad.wide.u32 %rd4, %r3, 4, %rd2; ld.u32 %o, [%rd4];"""
    assert np.array_equal(evaluate(code, x, block=64, order=order), (x % 16) * x + 3)
    with pytest.raises(ptxsim.OutOfBounds, match="64 bytes of local memory"):
        evaluate(code.replace("and.b32 %r3, %a0, 15", "mov.b32 %r3, %a0"), x)


def test_module_variables_persist():
    m = module(
        """mov.u64 %rd1, counter; atom.global.add.u32 %r1, [%rd1], 1; mov.u32 %r2, %tid.x;
            and.b32 %r2, %r2, 3;
        mov.u64 %rd2, table; mad.wide.u32 %rd2, %r2, 4, %rd2; ld.const.u32 %r3, [%rd2];
            mov.u64 %rd3, pointer; ld.global.u64 %rd4, [%rd3];
        ld.global.u32 %r5, [%rd4]; ld.param.u64 %rd5, [p0]; mov.u32 %r6, %tid.x;
            mad.wide.u32 %rd5, %r6, 4, %rd5; st.global.u32 [%rd5], %r3;""",
        head=".global .align 4 .u32 counter = 5; "
        ".const .align 4 .b8 table[16] = {1,0,0,0, 2,0,0,0, 0xff,0,0,0, 4};"
        ".global .align 8 .u64 pointer = counter;",
    )
    out = np.zeros(32, np.uint32)
    for _ in range(2):
        m.kernels["k"].launch(1, 32, [out])
    assert m.globals["counter"].view(np.uint32)[0] == 5 + 64
    assert out[:4].tolist() == [1, 2, 255, 4]


def test_shared_bounds_and_poison():
    out = np.zeros(32, np.float32)
    store = (
        "ld.param.u64 %rd1, [p0]; mov.u32 %r1, %tid.x; mad.wide.u32 %rd2, %r1, 4, %rd1; "
        "mov.u32 %r2, s; mad.lo.u32 %r3, %r1, 4, %r2;"
    )
    head = ".shared .align 4 .b8 s[100];"
    with pytest.raises(
        ptxsim.OutOfBounds, match="shared address 0x64, but the CTA has 100 bytes"
    ) as e:
        launch(store + "st.shared.u32 [%r3], %r1;", [out], head=head)
    assert e.value.tid == (25, 0, 0)
    body = (
        store
        + "setp.lt.u32 %p1, %r1, 25; @%p1 ld.shared.u32 %r4, [%r3]; @%p1 st.global.u32 [%rd2], %r4;"
    )
    launch(body, [out], head=head)
    assert np.isnan(out[:25]).all()
    with pytest.raises(ptxsim.UninitializedRead):
        launch(body, [out], head=head, check_uninit=True)
    fine = (
        store + "setp.lt.u32 %p1, %r1, 25; @%p1 st.shared.u32 [%r3], %r1; bar.sync 0; "
        "@%p1 ld.shared.u32 %r4, [%r3];"
    )
    launch(fine, [out], head=head, check_uninit=True)


HEAD = ".shared .align 16 .b8 s[1024];"
BEGIN = "mov.u32 %r1, %tid.x; mov.u32 %r2, s; shl.b32 %r3, %r1, 2; add.u32 %r4, %r2, %r3;"
STORE, BARRIER = "st.shared.u32 [%r4], %r1;", "bar.sync 0;"
ANOTHER = "xor.b32 %r5, %r3, 128; add.u32 %r5, %r2, %r5;"  # as this thread's of the other warp
SAME_WARP = "xor.b32 %r5, %r3, 64; add.u32 %r5, %r2, %r5;"
LOAD = "ld.shared.u32 %r6, [%r5];"
EVERYBODY = "ld.shared.u32 %r6, [s];"


@pytest.mark.parametrize("order", ["lockstep", "forward", "reverse"])
@pytest.mark.parametrize(
    "body, what",
    [
        (STORE + ANOTHER + LOAD, "read after the write|write after the read"),
        (
            EVERYBODY + "setp.eq.u32 %p1, %r1, 40; @%p1 st.shared.u32 [s], %r1;",
            "write after the read|read after",
        ),
        ("st.shared.u32 [s], %r1;", "write (at the same time as that|after the write)"),
        ("st.shared.v4.u32 [s], {%r1, %r1, %r1, %r1}; ld.shared.u8 %r6, [s+15];", "write"),
        (STORE + BARRIER + ANOTHER + LOAD + STORE, "write after the read|read after the write"),
    ],
    ids=["written", "read", "together", "bytes", "second"],
)
def test_races(order, body, what):
    with pytest.raises(ptxsim.Race, match=what) as e:
        launch(BEGIN + body, [], grid=3, block=64, head=HEAD, order=order, check_races=True)
    assert e.value.ctaid == (0, 0, 0)
    launch(BEGIN + body, [], grid=3, block=64, head=HEAD, order=order)


@pytest.mark.parametrize("order", ["lockstep", "forward", "reverse"])
def test_no_races(order):
    """Of a warp with itself, of reads with reads, of different bytes, of what a barrier divides, of
    atomic operations, of writes that change nothing."""
    fine = (
        STORE + SAME_WARP + LOAD + BARRIER + ANOTHER + LOAD + EVERYBODY + BARRIER + STORE,
        "add.u32 %r4, %r2, %r1; st.shared.u8 [%r4], %r1; ld.shared.u8 %r6, [%r4];",
        "atom.shared.add.u32 %r6, [s], 1;",
        "mov.u32 %r6, 7; st.shared.u32 [s], %r6;",  # every warp the same value
    )
    for body in fine:
        launch(BEGIN + body, [], grid=3, block=64, head=HEAD, order=order, check_races=True)


def test_only_used_shared_variables_count():
    head = ".shared .align 4 .b8 other[4096]; .shared .align 4 .b8 mine[64];"
    m = module(
        ".shared .align 8 .b8 inner[8]; mov.u32 %r1, mine; ld.shared.u32 %r2, [%r1];", head=head
    )
    assert m.kernels["k"].static_shared == 72


def test_dynamic_shared_memory():
    head = ".shared .align 4 .b8 a[20]; .extern .shared .align 16 .b8 dyn[];"
    body = """ld.param.u64 %rd1, [p0]; mov.u32 %r1, %tid.x; mad.wide.u32 %rd2, %r1, 4, %rd1;
        mov.u32 %r2, dyn; mov.u32 %r5, a;
        mad.lo.u32 %r3, %r1, 4, %r2; st.shared.u32 [%r3], %r1; bar.sync 0; xor.b32 %r4, %r3, 124;
            ld.shared.u32 %r4, [%r2+124];
        mov.u32 %r6, %dynamic_smem_size; add.u32 %r4, %r4, %r6; st.global.u32 [%rd2], %r4;"""
    out = np.zeros(32, np.uint32)
    launch(body, [out], head=head, shared_bytes=128)
    assert (out == 31 + 128).all()
    with pytest.raises(ptxsim.OutOfBounds):
        launch(body, [out], head=head, shared_bytes=64)


def test_cp_async_with_zero_fill():
    x, y = np.arange(32, dtype=np.uint32) + 1, np.zeros(32, np.uint32)
    launch(
        INDEX
        + """mov.u32 %r5, s; mad.lo.u32 %r6, %r1, 4, %r5; setp.lt.u32 %p1, %r1, 20;
            selp.u32 %r7, 4, 0, %p1;
        cp.async.ca.shared.global [%r6], [%rd3], 4, %r7; cp.async.commit_group;
            cp.async.wait_group 0; bar.sync 0;
        ld.shared.u32 %r8, [%r6]; st.global.u32 [%rd4], %r8;""",
        [x, y],
        head=".shared .align 4 .b8 s[128];",
    )
    assert np.array_equal(y, np.where(np.arange(32) < 20, x, 0))


def atomic(code, memory, n=96, returns=True):
    """All n threads run ``code`` on [%rd5] = memory[tid % len]; gives the old values."""
    old = np.zeros(n, memory.dtype)
    kind = {2: "h", 4: "r", 8: "rd"}[memory.dtype.itemsize]
    size = memory.dtype.itemsize
    store = f"st.global.b{8 * size} [%rd7], %{kind}20;" if returns else ""
    launch(
        f"""{INDEX} rem.u32 %r5, %r4, {len(memory)}; mad.wide.u32 %rd5, %r5, {size}, %rd1;
            mad.wide.u32 %rd7, %r4, {size}, %rd2;
        cvt.u64.u32 %rd6, %r4; cvt.u16.u32 %h6, %r4; mov.b32 %r6, %r4; cvt.rn.f32.u32 %r7, %r4;
            cvt.rn.f64.u32 %rd8, %r4;
        {code} {store}""",
        [memory, old],
        grid=n // 32,
    )
    return old


@pytest.mark.parametrize(
    "op,typ,dtype,fn",
    [
        ("add", "u32", np.uint32, lambda r, s: r + s),
        ("add", "u64", np.uint64, lambda r, s: r + s),
        ("min", "s32", np.int32, min),
        ("max", "u64", np.uint64, max),
        ("and", "b32", np.uint32, lambda r, s: r & s),
        ("or", "b64", np.uint64, lambda r, s: r | s),
        ("xor", "b32", np.uint32, lambda r, s: r ^ s),
        ("exch", "b32", np.uint32, lambda r, s: s),
        ("inc", "u32", np.uint32, lambda r, s: 0 if r >= s else r + 1),
        ("dec", "u32", np.uint32, lambda r, s: s if r == 0 or r > s else r - 1),
    ],
)
@pytest.mark.parametrize("use_old", [True, False])
def test_integer_atomics(op, typ, dtype, fn, use_old):
    memory = np.arange(40, 45, dtype=dtype)
    want, olds = memory.tolist(), []
    for i in range(96):
        olds.append(want[i % 5])
        want[i % 5] = fn(want[i % 5], i)
    value = "%r6" if dtype().itemsize == 4 else "%rd6"
    dst = "%r20" if dtype().itemsize == 4 else "%rd20"
    got = atomic(f"atom.global.{op}.{typ} {dst}, [%rd5], {value};", memory, returns=use_old)
    assert memory.tolist() == want and (not use_old or got.tolist() == olds)


@pytest.mark.parametrize(
    "form",
    [
        "atom.global.gpu.acq_rel.add.{t} {d}, [%rd5+0], {v};",
        "red.relaxed.gpu.global.add.{t} [%rd5], {v};",
        "atom.add.{t} {d}, [%rd5], {v};",
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_float_atomic_add(form, dtype):
    memory = np.zeros(3, dtype)
    code = (
        form.format(t="f32", d="%r20", v="%r7")
        if dtype is np.float32
        else form.format(t="f64", d="%rd20", v="%rd8")
    )
    atomic(code, memory, returns=False)
    assert memory.tolist() == [sum(range(k, 96, 3)) for k in range(3)]


def test_cas_and_returned_order():
    memory = np.zeros(2, np.uint32)
    old = atomic(
        "atom.global.cas.b32 %r20, [%rd5], 0, %r6;", memory
    )  # the first non-zero value wins
    assert memory.tolist() == [2, 1] and np.count_nonzero(old == 0) == 3
    ticket = np.zeros(1, np.uint32)
    old = atomic("atom.global.add.u32 %r20, [%rd5], 1;", ticket)
    assert sorted(old.tolist()) == list(range(96))


def test_packed_and_vector_atomics():
    memory = np.zeros(4, np.float16)
    atomic(
        "mov.b32 %r8, 0x40003C00; rem.u32 %r9, %r4, 2; mad.wide.u32 %rd9, %r9, 4, %rd1; "
        "red.global.add.noftz.f16x2 [%rd9], %r8;",
        memory,
        returns=False,
    )
    assert memory.tolist() == [48, 96, 48, 96]
    memory = np.zeros(4, np.float32)
    atomic(
        "mov.b32 %r8, 0f3F800000; mov.b32 %r9, 0f40000000; "
        "red.global.add.v4.f32 [%rd1], {%r8, %r9, %r8, %r9};",
        memory,
        returns=False,
    )
    assert memory.tolist() == [96, 192, 96, 192]


def test_shared_atomics():
    out = np.zeros(4, np.uint32)
    launch(
        """ld.param.u64 %rd1, [p0]; mov.u32 %r1, %tid.x; mov.u32 %r2, s;
            mad.lo.u32 %r3, %r1, 4, %r2; setp.lt.u32 %p1, %r1, 4;
        @%p1 st.shared.u32 [%r3], 0; bar.sync 0; and.b32 %r4, %r1, 3; mad.lo.u32 %r5, %r4, 4, %r2;
            atom.shared.add.u32 %r6, [%r5], %r1;
        bar.sync 0; @%p1 ld.shared.u32 %r7, [%r3]; mad.wide.u32 %rd2, %r1, 4, %rd1;
            @%p1 st.global.u32 [%rd2], %r7;""",
        [out],
        block=128,
        head=".shared .align 4 .b8 s[16];",
    )
    assert out.tolist() == [sum(range(k, 128, 4)) for k in range(4)]


@pytest.mark.parametrize(
    "stride,sectors", [(4, 4), (8, 8), (16, 16), (32, 32), (64, 32), (128, 32)]
)
def test_sectors_per_request(stride, sectors):
    x = np.zeros(64 * stride, np.uint8)
    report = launch(copy_kernel(32, stride=stride), [x, np.zeros_like(x)], grid=2)
    assert (
        report.global_load.sectors_per_request == sectors == report.global_store.sectors_per_request
    )
    assert report.global_load.ideal_sectors_per_request == 4
    assert report.dram_bytes_read == 64 * 32 * (sectors / 32) if stride <= 32 else 64 * 32


def test_sectors_with_permuted_broadcast_and_masked_lanes():
    x, y = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)

    def count(code):
        return launch(INDEX + code, [x, y]).global_load

    assert (
        count(
            "mul.lo.u32 %r5, %r1, 13; and.b32 %r5, %r5, 31; mad.wide.u32 %rd5, %r5, 4, %rd1; "
            "ld.global.u32 %r6, [%rd5];"
        ).sectors
        == 4
    )
    assert count("ld.global.u32 %r6, [%rd1];").sectors == 1
    s = count("setp.lt.u32 %p1, %r1, 9; @%p1 ld.global.u32 %r6, [%rd3];")
    assert (s.requests, s.sectors, s.ideal_sectors, s.bytes_requested) == (1, 2, 2, 36)
    s = count("and.b32 %r5, %r1, 7; setp.eq.u32 %p1, %r5, 0; @%p1 ld.global.u32 %r6, [%rd3];")
    assert (s.requests, s.sectors, s.ideal_sectors) == (1, 4, 1)
    assert count("setp.gt.u32 %p1, %r1, 99; @%p1 ld.global.u32 %r6, [%rd3];").requests == 0


def test_sectors_are_counted_from_the_allocation_base():
    raw = np.zeros(4096 + 64, np.uint8)
    start = -raw.ctypes.data % 32 + 16  # a base that is 16 bytes off a sector
    x = np.frombuffer(raw.data, np.uint8)[start:]  # .base chain ends at ``raw``: offset counts
    assert launch(copy_kernel(32), [raw, raw]).global_load.sectors == 4
    assert launch(copy_kernel(32), [x, x]).global_load.sectors in (4, 5)


def test_traffic_by_argument():
    """x is read twice, y once; z is written."""
    x, y, z = (np.zeros(32 * 64, np.float32) for _ in range(3))
    body = (
        INDEX
        + """ld.param.u64 %rd5, [p2]; mad.wide.u32 %rd6, %r4, 4, %rd5; ld.global.f32 %r5, [%rd3];
            ld.global.f32 %r6, [%rd4];
        xor.b32 %r7, %r4, 1; mad.wide.u32 %rd7, %r7, 4, %rd1;
            ld.global.f32 %r8, [%rd7]; st.global.f32 [%rd6], %r8;"""
    )
    report = launch(body, [x, y, z], grid=64, names=["x", "y", "z"])
    n = x.nbytes
    tx, ty, tz = (report.traffic(k) for k in "xyz")
    assert (tx.read_bytes, tx.read_unique, tx.read_ratio, tx.written_bytes) == (2 * n, n, 2.0, 0)
    assert (ty.read_bytes, ty.read_ratio) == (n, 1.0) and (
        tz.written_bytes,
        tz.written_unique,
        tz.read_bytes,
    ) == (n, n, 0)
    assert (
        report.dram_bytes_read == 2 * n
        and report.l2_bytes_read == 3 * n
        and report.dram_bytes_written == n
    )
    assert report.bytes_requested == 4 * n


def test_one_request_over_two_allocations():
    x, y = np.arange(32, dtype=np.uint32), np.arange(100, 132, dtype=np.uint32)
    out = np.zeros(32, np.uint32)
    body = (
        INDEX
        + """setp.lt.u32 %p1, %r1, 16; selp.b64 %rd5, %rd3, %rd4, %p1; ld.global.u32 %r5, [%rd5];
            ld.param.u64 %rd6, [p2];
        mad.wide.u32 %rd6, %r1, 4, %rd6; st.global.u32 [%rd6], %r5;"""
    )
    report = launch(body, [x, y, out], names=["x", "y", "out"])
    i = np.arange(32)
    assert np.array_equal(out, np.where(i < 16, x, y))
    assert (
        report.traffic("x").read_unique == report.traffic("y").read_unique == 64
        and report.global_load.sectors == 4
    )
    assert report.traffic("x").read_sectors == report.traffic("y").read_sectors == 2


def test_arguments_that_share_a_storage():
    base = np.zeros(64, np.float32)
    report = launch(copy_kernel(32), [base[:32], base[32:]], names=["a", "b"])
    assert report.traffic("a") is report.traffic("b") and report.traffic("a").name == "a+b"


@pytest.mark.parametrize(
    "stride,width,wavefronts",
    [
        (4, 4, 1),
        (8, 4, 2),
        (16, 4, 4),
        (128, 4, 32),
        (132, 4, 1),
        (0, 4, 1),
        (12, 4, 1),
        (8, 8, 2),
        (16, 8, 4),
        (16, 16, 4),
        (32, 16, 8),
        (2, 2, 1),
        (1, 1, 1),
        (64, 2, 16),
    ],
)
def test_bank_conflicts(stride, width, wavefronts):
    """Wavefronts of one request; the ideal is width/4 (at least 1)."""
    regs = {
        1: ("u8", "%h1"),
        2: ("u16", "%h1"),
        4: ("u32", "%r9"),
        8: ("v2.u32", "{%r9, %r10}"),
        16: ("v4.u32", "{%r9, %r10, %r11, %r12}"),
    }
    typ, dst = regs[width]
    report = launch(
        f"mov.u32 %r1, %tid.x; mov.u32 %r2, s; mad.lo.u32 %r3, %r1, {stride}, %r2; "
        f"ld.shared.{typ} {dst}, [%r3];",
        [None],
        head=".shared .align 16 .b8 s[8192];",
    )
    s = report.shared_load
    ideal = max(1, width // 4)
    assert (s.requests, s.wavefronts, s.ideal_wavefronts, s.bank_conflicts) == (
        1,
        wavefronts,
        ideal,
        wavefronts - ideal,
    )


def test_torch_tensors_of_every_dtype():
    torch = pytest.importorskip("torch")
    for dtype in (
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.float64,
        torch.int8,
        torch.uint8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.bool,
    ):
        x = torch.randint(0, 2, (64,)).to(dtype)
        y = torch.zeros_like(x)
        launch_torch(copy_kernel(8 * x.element_size()), [x[32:], y])
        assert torch.equal(y[:32], x[32:])
    with pytest.raises(ptxsim.OutOfBounds):
        launch_torch(copy_kernel(32), [torch.zeros(31), torch.zeros(32)])
    with pytest.raises(TypeError, match="meta"):
        launch_torch(copy_kernel(32), [torch.zeros(31, device="meta"), torch.zeros(32)])


def launch_torch(body, tensors):
    m = module(body, ".param .u64 p0, .param .u64 p1")
    return m.kernels["k"].launch(1, 32, tensors)
