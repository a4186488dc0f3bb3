"""Triton kernels through Triton's own JIT, compared with torch in float64."""

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.language.extra import libdevice  # noqa: E402

import ptxsim  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(params=[80, 90, 100], ids=["sm80", "sm90", "sm100"])
def dev(request):
    with ptxsim.triton_device(request.param) as device:
        yield device


@pytest.fixture
def h100():
    with ptxsim.triton_device(90) as device:
        yield device


def close(got, exact, scale=1.0):
    """Within a few roundings of the result type."""
    eps = torch.finfo(got.dtype).eps * 4 * scale if got.dtype != torch.float64 else 1e-12
    assert torch.allclose(got.double(), exact.double(), rtol=eps, atol=eps), (
        (got.double() - exact).abs().max()
    )


@triton.jit
def add_kernel(x, y, out, n, alpha, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n
    tl.store(out + i, tl.load(x + i, mask=m) + alpha * tl.load(y + i, mask=m), mask=m)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_with_mask(dev, dtype):
    n = 1000
    x, y = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    out = torch.full((n + 24,), 7.0, dtype=dtype)
    add_kernel[(4,)](x, y, out, n, 2.5, B=256)
    close(out[:n], x.double() + 2.5 * y.double())
    assert (out[n:] == 7).all()
    r = dev.reports[-1]
    assert (
        r.name == "add_kernel"
        and r.grid == (4, 1, 1)
        and "ptx" in r.asm
        and "cubin" in r.asm
        and r.num_warps == 4
    )
    assert (
        r.traffic("x").read_bytes == n * x.element_size()
        and r.traffic("out").written_bytes == n * x.element_size()
    )


def test_mask_that_is_too_wide_is_out_of_bounds(h100):
    x, y, out = torch.zeros(1000), torch.zeros(1000), torch.zeros(1000)
    with pytest.raises(ptxsim.OutOfBounds) as e:
        add_kernel[(4,)](x, y, out, 1001, 2.5, B=256)
    assert (
        "'x' (4000 bytes" in str(e.value)
        and "test_triton.py" in str(e.value)
        and e.value.ctaid == (3, 0, 0)
    )


@triton.jit
def softmax_kernel(x, y, stride, rows, cols, R: tl.constexpr, C: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    c = tl.arange(0, C)
    m = (r[:, None] < rows) & (c[None, :] < cols)
    v = tl.load(x + r[:, None] * stride + c[None, :], mask=m, other=-float("inf")).to(tl.float32)
    e = tl.exp(v - tl.max(v, 1)[:, None])
    tl.store(y + r[:, None] * stride + c[None, :], e / tl.sum(e, 1)[:, None], mask=m)


@pytest.mark.parametrize("cols,num_warps", [(17, 1), (17, 4), (33, 2), (33, 8)])
@pytest.mark.parametrize(
    "dev,dtype",
    [(90, dtype) for dtype in DTYPES[:3]] + [(80, torch.bfloat16), (100, torch.float16)],
    indirect=["dev"],
)
def test_row_softmax(dev, dtype, cols, num_warps):
    rows, block = 100, 64 if cols > 32 else 32
    x = (3 * torch.randn(rows, cols)).to(dtype)
    y = torch.zeros_like(x)
    softmax_kernel[(13,)](x, y, cols, rows, cols, R=8, C=block, num_warps=num_warps)
    close(y, x.double().softmax(1))


def test_softmax_survives_the_worst_allowed_approximations():
    x = 3 * torch.randn(100, 17)
    y = torch.zeros_like(x)
    with ptxsim.triton_device(90, approx="worst", seed=3):
        softmax_kernel[(13,)](x, y, 17, 100, 17, R=8, C=32)
    error = (y.double() - x.double().softmax(1)).abs().max()
    assert 1e-8 < error < 2e-6


@triton.jit
def loss_kernel(x, label, score, out, n, C, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n
    v = tl.load(x + i, mask=m, other=0.0).to(tl.float32)
    row, col = i // C, i % C
    t = tl.where(
        tl.load(label + row, mask=m, other=-1) == col, tl.load(score + row, mask=m, other=0.0), 0.0
    )
    e = tl.exp(-tl.abs(v))
    softplus = tl.maximum(v, 0.0) + tl.log(1 + e)
    p = tl.where(v >= 0, 1 / (1 + e), e / (1 + e))
    loss = (softplus - v * t) * (t - p) * (t - p)
    tl.store(out + tl.program_id(0), tl.sum(tl.where(m, loss, 0.0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quality_focal_loss(dev, dtype):
    rows, classes = 150, 20
    x = (4 * torch.randn(rows, classes)).to(dtype)
    label, score = torch.randint(0, classes + 5, (rows,)), torch.rand(rows)
    out = torch.zeros(3)
    loss_kernel[(3,)](x, label, score, out, rows * classes, classes, B=1024)
    t = torch.zeros(rows, classes, dtype=torch.float64)
    ok = label < classes
    t[ok, label[ok]] = score[ok].double()
    v = x.double()
    exact = (torch.nn.functional.softplus(v) - v * t) * (t - v.sigmoid()) ** 2
    assert torch.allclose(out.double().sum(), exact.sum(), rtol=1e-5)


@triton.jit
def sum_kernel(x, out, n, B: tl.constexpr):
    acc = tl.zeros((B,), tl.float32)
    for start in range(0, n, B):
        i = start + tl.arange(0, B)
        acc += tl.load(x + tl.program_id(0) * n + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(out + tl.program_id(0), tl.sum(acc))


@pytest.mark.parametrize("num_warps", [1, 4, 8, 16])
def test_sum_across_warps(dev, num_warps):
    x = torch.randn(5, 3000)
    for order in ("lockstep", "forward", "reverse"):
        dev.launch_options["order"] = order
        out = torch.zeros(5)
        sum_kernel[(5,)](x, out, 3000, B=1024, num_warps=num_warps)
        assert torch.allclose(out.double(), x.double().sum(1), atol=1e-4)
    del dev.launch_options["order"]


@triton.jit
def elementwise_kernel(x, out, n, WHICH: tl.constexpr, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + i, mask=i < n, other=1.0)
    if WHICH == "exp":
        r = tl.exp(v)
    elif WHICH == "log":
        r = tl.log(tl.abs(v) + 0.001)
    elif WHICH == "sigmoid":
        r = tl.sigmoid(v)
    elif WHICH == "sqrt":
        r = tl.sqrt(tl.abs(v))
    elif WHICH == "rsqrt":
        r = tl.rsqrt(tl.abs(v) + 0.1)
    elif WHICH == "sin":
        r = tl.sin(v) + tl.cos(v)
    elif WHICH == "erf":
        r = tl.erf(v)
    elif WHICH == "floor":
        r = tl.floor(v) + tl.ceil(v * 3)
    elif WHICH == "where":
        r = tl.where(v > 0, v * 2, v / 3)
    elif WHICH == "clamp":
        r = tl.clamp(v, -0.5, 0.75)
    elif WHICH == "log1p":
        r = libdevice.log1p(tl.abs(v))
    elif WHICH == "tanh":
        r = libdevice.tanh(v)
    tl.store(out + i, r, mask=i < n)


FUNCTIONS = {
    "exp": torch.exp,
    "log": lambda v: torch.log(v.abs() + 0.001),
    "sigmoid": torch.sigmoid,
    "sqrt": lambda v: v.abs().sqrt(),
    "rsqrt": lambda v: (v.abs() + 0.1).rsqrt(),
    "sin": lambda v: v.sin() + v.cos(),
    "erf": torch.erf,
    "floor": lambda v: v.floor() + (v * 3).ceil(),
    "where": lambda v: torch.where(v > 0, v * 2, v / 3),
    "clamp": lambda v: v.clamp(-0.5, 0.75),
    "log1p": lambda v: v.abs().log1p(),
    "tanh": torch.tanh,
}


@pytest.mark.parametrize("which", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_elementwise_functions(h100, which, dtype):
    x = (2 * torch.randn(500)).to(dtype)
    out = torch.zeros_like(x)
    elementwise_kernel[(2,)](x, out, 500, WHICH=which, B=256)
    close(out, FUNCTIONS[which](x.double()), scale=4)


@triton.jit
def gather_kernel(x, index, out, n, stride, B: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    row = tl.load(index + i, mask=i < n, other=0)
    tl.store(out + i, tl.load(x + row * stride + i % stride, mask=i < n), mask=i < n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.int8, torch.bool])
def test_int64_offsets_and_integer_types(dev, dtype):
    x = torch.randint(0, 2 if dtype == torch.bool else 100, (50, 7)).to(dtype)
    index = torch.randint(0, 50, (300,))
    out = torch.zeros(300, dtype=dtype)
    gather_kernel[(3,)](x, index, out, 300, 7, B=128)
    assert torch.equal(out, x[index, torch.arange(300) % 7])


@triton.jit
def atomic_kernel(x, counts, total, top, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n
    v = tl.load(x + i, mask=m, other=0)
    tl.atomic_add(counts + v, 1, mask=m)
    tl.atomic_add(total, tl.sum(tl.where(m, v, 0).to(tl.float32)))
    tl.atomic_max(top, tl.max(tl.where(m, v, 0)))


def test_atomics(dev):
    x = torch.randint(0, 16, (1000,), dtype=torch.int32)
    counts, total, top = (
        torch.zeros(16, dtype=torch.int32),
        torch.zeros(1),
        torch.zeros(1, dtype=torch.int32),
    )
    atomic_kernel[(4,)](x, counts, total, top, 1000, B=256)
    assert (
        torch.equal(counts.long(), torch.bincount(x, minlength=16))
        and total == x.sum()
        and top == x.max()
    )


@triton.jit
def half_atomic_kernel(x, out, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.atomic_add(out + i % 32, tl.load(x + i, mask=i < n, other=0.0), mask=i < n)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_atomic_add_types(dev, dtype):
    x = torch.randint(0, 5, (512,)).to(dtype)
    out = torch.zeros(32, dtype=dtype)
    half_atomic_kernel[(2,)](x, out, 512, B=256)
    assert torch.equal(out, x.view(16, 32).sum(0))


@triton.jit
def sort_kernel(x, out, best, B: tl.constexpr, K: tl.constexpr):
    v = tl.load(x + tl.arange(0, B))
    tl.store(out + tl.arange(0, B), tl.sort(v))
    tl.store(best + tl.arange(0, K), tl.topk(v, K))


@pytest.mark.parametrize(
    "dev,dtype,num_warps",
    [
        (90, torch.float32, 1),
        (90, torch.int32, 4),
        (90, torch.float16, 4),
        (80, torch.float32, 4),
        (100, torch.int64, 1),
    ],
    indirect=["dev"],
)
def test_sort_and_topk(dev, dtype, num_warps):
    x = (100 * torch.randn(64)).to(dtype)
    out, best = torch.zeros_like(x), torch.zeros(8, dtype=dtype)
    sort_kernel[(1,)](x, out, best, B=64, K=8, num_warps=num_warps)
    assert torch.equal(out, x.sort().values) and torch.equal(best, x.topk(8).values)


@triton.jit
def tile_kernel(x, rows, cols, arg, scan, M: tl.constexpr, N: tl.constexpr):
    r, c = tl.arange(0, M), tl.arange(0, N)
    v = tl.load(x + r[:, None] * N + c[None, :])
    tl.store(rows + r, tl.sum(v, 1))
    tl.store(cols + c, tl.max(v, 0))
    tl.store(arg + r, tl.argmax(v, 1))
    tl.store(scan + r[:, None] * N + c[None, :], tl.cumsum(v, 1))


@pytest.mark.parametrize(
    "dev,shape,num_warps",
    [
        *((90, shape, n) for shape in [(16, 32), (64, 16), (8, 128)] for n in (1, 4, 8)),
        (80, (16, 32), 4),
        (100, (16, 32), 4),
    ],
    indirect=["dev"],
)
def test_tile_reductions(dev, shape, num_warps):
    x = torch.randn(shape)
    rows, cols = torch.zeros(shape[0]), torch.zeros(shape[1])
    arg, scan = torch.zeros(shape[0], dtype=torch.int32), torch.zeros(shape)
    tile_kernel[(1,)](x, rows, cols, arg, scan, M=shape[0], N=shape[1], num_warps=num_warps)
    close(rows, x.double().sum(1), 8)
    assert torch.equal(cols, x.max(0).values) and torch.equal(arg.long(), x.argmax(1))
    close(scan, x.double().cumsum(1), 8)


@triton.jit
def transpose_kernel(x, out, M: tl.constexpr, N: tl.constexpr):
    v = tl.load(x + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(out + tl.arange(0, N)[:, None] * M + tl.arange(0, M)[None, :], tl.trans(v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8, torch.int64])
def test_transpose(dev, dtype):
    """Layout conversion through shared memory (stmatrix/ldmatrix for 16-bit types on sm_90)."""
    x = torch.randint(-100, 100, (32, 64)).to(dtype)
    out = torch.zeros(64, 32, dtype=dtype)
    transpose_kernel[(1,)](x, out, M=32, N=64)
    assert torch.equal(out, x.T)


@triton.jit
def scalar_kernel(out, i, h, f, flag, nothing, B: tl.constexpr):
    v = i + h + f
    if nothing is None:
        v = v + 0.5
    if flag:
        v = v * 2
    tl.store(out + tl.arange(0, B), v + tl.zeros((B,), tl.float32))


def test_scalar_arguments(h100):
    out = torch.zeros(32)
    scalar_kernel[(1,)](out, -(1 << 40), 7, 0.25, True, None, B=32)
    assert (out == torch.tensor((-(1 << 40) + 7 + 0.75) * 2)).all()
    scalar_kernel[(1,)](
        triton.reinterpret(out.view(torch.int32), tl.float32),
        1,
        16,
        float("inf"),
        False,
        None,
        B=32,
    )
    assert torch.isinf(out).all()


@triton.jit
def print_kernel(x, B: tl.constexpr):
    v = tl.load(x + tl.arange(0, B))
    tl.device_print("v", v)
    tl.store(x + tl.arange(0, B), v + 1)


def test_device_print_is_ignored(h100):
    x = torch.zeros(64)
    print_kernel[(1,)](x, B=64)
    assert (x == 1).all()


def test_isolated_arguments():
    x, y, out = torch.randn(1000), torch.randn(1000), torch.zeros(1000)
    with ptxsim.triton_device(90, isolate=True, check_uninit=True) as device:
        add_kernel[(4,)](x, y, out, 1000, 1.0, B=256)
        assert torch.equal(out, x + y)
        with pytest.raises(ptxsim.OutOfBounds, match="'x'"):
            add_kernel[(4,)](x, y, out, 1001, 1.0, B=256)
    assert device.reports[0].traffic("y").read_bytes == 4000


@triton.jit
def histogram_kernel(x, out, gathered, B: tl.constexpr):
    v = tl.load(x + tl.arange(0, B))
    tl.store(out + tl.arange(0, 16), tl.histogram(v, 16))
    tl.store(gathered + tl.arange(0, B), tl.gather(v, v * 3, 0))


def test_histogram_and_gather(dev):
    x = torch.randint(0, 16, (256,), dtype=torch.int32)
    out, gathered = torch.zeros(16, dtype=torch.int32), torch.zeros_like(x)
    histogram_kernel[(1,)](x, out, gathered, B=256)
    assert torch.equal(out.long(), torch.bincount(x, minlength=16)) and torch.equal(
        gathered, x[x.long() * 3]
    )


@triton.jit
def pipelined_kernel(x, w, out, n, B: tl.constexpr):
    acc = tl.zeros((B,), tl.float32)
    for start in tl.range(0, n, B, num_stages=3):
        i = start + tl.arange(0, B)
        acc += tl.load(x + i, mask=i < n, other=0.0) * tl.load(w + i, mask=i < n, other=0.0)
    tl.store(out, tl.sum(acc))


def test_software_pipelining(dev):
    x, w, out = torch.randn(3000), torch.randn(3000), torch.zeros(1)
    pipelined_kernel[(1,)](x, w, out, 3000, B=512)
    assert torch.allclose(out.double(), (x.double() * w.double()).sum(), atol=1e-3)


@triton.jit
def inner(v):
    return v * 2 + 1


@triton.jit(noinline=True)
def outer(v):
    return inner(v) * v


@triton.jit
def call_kernel(x, pair, out, B: tl.constexpr):
    i = tl.arange(0, B)
    scale = outer(tl.load(pair[0] + 3))
    tl.store(out + i, tl.load(x + i) * scale + pair[1])


def test_noinline_functions_and_tuple_arguments(h100):
    x, y, out = torch.randn(128), torch.randn(128), torch.zeros(128)
    call_kernel[(1,)](x, (y, 3), out, B=128)
    close(out, x.double() * (2 * y[3].double() + 1) * y[3].double() + 3)


@triton.jit
def assert_kernel(x, B: tl.constexpr):
    tl.device_assert(tl.load(x + tl.arange(0, B)) >= 0, "negative")


def test_device_assert(h100):
    x = torch.ones(128)
    assert_kernel[(1,)](x, B=128, debug=True)
    x[77] = -1
    with pytest.raises(ptxsim.Trap, match="__assertfail"):
        assert_kernel[(1,)](x, B=128, debug=True)


@triton.autotune(
    [triton.Config({"B": 64}, num_warps=1), triton.Config({"B": 512}, num_warps=4)], key=["n"]
)
@triton.jit
def tuned_kernel(x, out, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(out + i, tl.load(x + i, mask=i < n) * 2, mask=i < n)


def test_autotuning_ranks_by_roofline(h100):
    x = torch.randn(2000)
    out = torch.zeros_like(x)
    tuned_kernel[lambda meta: (triton.cdiv(2000, meta["B"]),)](x, out, 2000)
    assert torch.equal(out, x * 2) and len(h100.reports) == 3
    bounds = [r.roofline("h100").microseconds for r in h100.reports[:2]]
    best = 64 if bounds[0] <= bounds[1] else 512
    assert tuned_kernel.best_config.kwargs["B"] == best
    with ptxsim.triton_device(80) as other:  # the autotuner was made under h100
        tuned_kernel[lambda meta: (triton.cdiv(1500, meta["B"]),)](x, out, 1500)
        assert (
            len(other.reports) == 3 and min(t[0] for t in tuned_kernel.configs_timings.values()) > 0
        )
    ms = triton.testing.do_bench(
        lambda: add_kernel[(1,)](x, x, out, 10, 1.0, B=64), quantiles=[0.5, 0.2]
    )
    assert len(ms) == 2 and ms[0] > 0


def test_devices_are_restored_and_do_not_share_kernels():
    from triton.runtime import driver

    before, bench = driver._active, triton.testing.do_bench
    x, out = torch.randn(64), torch.zeros(64)
    for arch in (80, 90, 80):
        device = ptxsim.triton_device(arch).activate()
        add_kernel[(1,)](x, x, out, 64, 1.0, B=64)
        device.deactivate()
        assert f".target sm_{arch}" in device.reports[0].asm["ptx"] and len(device.reports) == 1
    assert driver._active is before and triton.testing.do_bench is bench


def test_unsupported_matrix_multiplication_is_reported(h100):
    @triton.jit
    def dot_kernel(x, out, N: tl.constexpr):
        i = tl.arange(0, N)
        v = tl.load(x + i[:, None] * N + i[None, :])
        tl.store(out + i[:, None] * N + i[None, :], tl.dot(v, v))

    x = torch.randn(32, 32).half()
    with pytest.raises(ptxsim.UnsupportedInstruction, match="mma.sync"):
        dot_kernel[(1,)](x, torch.zeros(32, 32), N=32)


def test_empty_grid_and_reports_as_dict(h100):
    import json

    x = torch.zeros(8)
    add_kernel[(0,)](x, x, x, 0, 1.0, B=64)
    assert not h100.reports
    add_kernel[(1,)](x, x, x, 8, 1.0, B=64)
    assert json.loads(json.dumps(h100.reports[0].to_dict()))["kernel"] == "add_kernel"
    assert "add_kernel" in str(h100.reports[0])


@triton.jit
def approximate(v, OP: tl.constexpr):
    return tl.inline_asm_elementwise(
        OP + " $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def focal_tile_kernel(
    x, target, loss, grad, row_sum, col_max, rows, cols, R: tl.constexpr, C: tl.constexpr
):
    r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    c = tl.arange(0, C)
    m = (r < rows)[:, None] & (c < cols)[None, :]
    at = r[:, None] * cols + c[None, :]
    v = tl.load(x + at, mask=m, other=0.0)
    t = tl.load(target + r, mask=r < rows, other=0.0)[:, None]
    if v.dtype == tl.float64:
        e = tl.exp2(-tl.abs(v) * 1.4426950408889634)
        d = tl.fdiv(tl.full(e.shape, 1, tl.float64), 1 + e)
        log = tl.log2(1 + e)
    else:
        v = v.to(tl.float32)
        t = t.to(tl.float32)
        e = approximate(-tl.abs(v) * 1.4426950408889634, "ex2.approx.ftz.f32")
        d = approximate(1 + e, "rcp.approx.ftz.f32")
        log = approximate(1 + e, "lg2.approx.ftz.f32")
    p = tl.where(v >= 0, d, e * d)
    one = tl.where(m, (tl.maximum(v, 0.0) + log * 0.6931471805599453 - v * t) * (t - p), 0.0)
    tl.store(loss + at, one.to(loss.dtype.element_ty), mask=m)
    tl.store(grad + at, (p - t).to(grad.dtype.element_ty), mask=m)
    tl.store(row_sum + r, tl.sum(one, 1).to(row_sum.dtype.element_ty), mask=r < rows)
    top = tl.max(tl.where(m, one, -float("inf")), 0)
    tl.store(col_max + tl.program_id(0) * cols + c, top.to(col_max.dtype.element_ty), mask=c < cols)


@pytest.mark.parametrize("cols,dtype", [*((80, dtype) for dtype in DTYPES), (13, torch.float32)])
def test_focal_loss_tiles_tolerate_every_conforming_gpu(dtype, cols):
    rows, block = 21, 8
    x, t = (4 * torch.randn(rows, cols)).to(dtype), torch.rand(rows).to(dtype)
    x[0, :3] = torch.tensor([60.0, -60.0, 0.0])
    loss, grad = torch.full_like(x, 7), torch.full_like(x, 7)
    row_sum, col_max = torch.full((rows,), 7, dtype=dtype), torch.full((3, cols), 7, dtype=dtype)
    with ptxsim.triton_device(90, isolate=True, approx="worst", order="reverse") as device:
        focal_tile_kernel[(3,)](
            *(x, t, loss, grad, row_sum, col_max, rows, cols),
            **dict(R=block, C=triton.next_power_of_2(cols)),
        )
    v, s = x.double(), t.double()[:, None]
    exact = (torch.nn.functional.softplus(v, threshold=1e9) - v * s) * (s - v.sigmoid())
    for got, want in (
        (loss, exact),
        (grad, v.sigmoid() - s),
        (row_sum, exact.sum(1)),
        (col_max, torch.stack([part.max(0).values for part in exact.split(block)])),
    ):
        eps = 1e-12 if dtype == torch.float64 else max(torch.finfo(dtype).eps, 2e-6)
        assert torch.allclose(got.double(), want, rtol=2 * eps, atol=40 * eps)
    r = device.reports[-1]
    assert 1 <= r.traffic("x").read_ratio < (1.05 if cols == 80 else 2)  # sectors of 2 warps
    assert r.traffic("x").read_bytes == x.nbytes and r.traffic("loss").written_bytes == x.nbytes
    if dtype != torch.float64:
        assert all(op in r.asm["ptx"] for op in ("ex2.approx.ftz", "rcp.approx.ftz", "lg2.approx"))
        assert r.cubin_info().mufu > 0


@triton.jit
def last_block_kernel(x, partial, ticket, out, n, B: tl.constexpr, P: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    tl.store(partial + tl.program_id(0), tl.sum(tl.load(x + i, mask=i < n, other=0.0)))
    tl.debug_barrier()
    blocks = tl.num_programs(0)
    done = tl.atomic_add(ticket, 1, sem="acq_rel")
    if done == blocks - 1:
        tl.debug_barrier()
        p = tl.arange(0, P)
        total = tl.sum(tl.load(partial + p, mask=p < blocks, other=0.0, cache_modifier=".cg"))
        tl.store(out, total)
        tl.store(ticket, 0)


@pytest.mark.parametrize("order", ["lockstep", "forward", "reverse"])
def test_last_block_reduces_in_a_fixed_order(order):
    """The scratch memory serves two launches, and the sum does not depend on how blocks are run."""
    x, partial, out = torch.randn(2000), torch.full((16,), float("nan")), torch.zeros(2)
    ticket, sums = torch.zeros(1, dtype=torch.int32), []
    for batch_threads in (128, 16384):
        options = dict(order=order, isolate=True, batch_threads=batch_threads)
        with ptxsim.triton_device(90, **options) as device:
            for k in range(2):
                last_block_kernel[(8,)](x, partial, ticket, out[k:], 2000, B=256, P=16)
        assert ticket == 0 and len(device.reports) == 2
        assert "atom.global.gpu.acq_rel" in device.reports[0].asm["ptx"]
        sums += out.tolist()
    assert len(set(sums)) == 1
    assert sums[0] == pytest.approx(x.double().sum().item(), abs=1e-4)


@triton.jit
def grid_kernel(out, B: tl.constexpr):
    block = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    block = block * tl.num_programs(0) + tl.program_id(0)
    i = tl.arange(0, B)
    tl.device_assert(block < 24, "too many blocks")
    tl.store(out + block * (1 << 20) + i, (block * B + i).to(tl.float32))


def test_grids_of_three_dimensions_and_far_addresses():
    """Block 23 writes 184 MB beyond the start: the pages between are never touched."""
    out = torch.empty((24, 1 << 20), dtype=torch.float64)[:, :32]
    with ptxsim.triton_device(90, count_memory=False) as device:
        grid_kernel[(2, 3, 4)](out, B=32, debug=True)
    assert torch.equal(out, torch.arange(24 * 32.0, dtype=torch.float64).view(24, 32))
    assert device.reports[0].grid == (2, 3, 4)


@triton.jit
def widths_kernel(x, y, z, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + i) + tl.load(y + i * 3)
    tl.store(z + i, v, mask=i < n)


def test_access_widths_of_one_argument(dev):
    x, y, z = torch.randn(2048), torch.randn(3 * 2048), torch.zeros(2048)
    widths_kernel[(4,)](x, y, z, 2048, B=512, num_warps=4)
    r = dev.reports[-1]
    assert r.traffic("x").read_widths == {16: 8192} and r.traffic("x").wide_share() == 1
    assert r.traffic("y").read_widths == {4: 8192} and r.traffic("y").wide_share() == 0
    assert r.traffic("z").written_widths == {16: 8192} and r.traffic("z").wide_share() == 1
    assert r.traffic("x").wide_share(way="written") == 0 == r.traffic("z").wide_share(way="read")
    widths_kernel[(4,)](x, y, z, 2047, B=512, num_warps=4)  # a mask that a vector may straddle
    assert dev.reports[-1].traffic("z").wide_share() == 0


@triton.jit
def pressure_kernel(x, out, n, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + i)
    w = tl.exp2(v)
    for _ in range(n):
        v, w = w * v + 1, v + w
    tl.store(out + i, v + w)


def test_registers_and_spills_of_a_launch(h100):
    x, out = torch.randn(1024), torch.zeros(1024)
    pressure_kernel[(1,)](x, out, 0, B=1024, num_warps=1, maxnreg=32)
    pressure_kernel[(1,)](x, out, 0, B=1024, num_warps=1)
    add_kernel[(1,)](x, x, out, 1000, 2.5, B=128)
    tight, free, plain = (r.cubin_info() for r in h100.reports)
    assert tight.registers <= 32 and tight.spills > 0 and tight.stack > 0
    assert free.registers > 64 and free.spills == 0
    assert 0 < plain.registers < 64 and plain.spills == plain.stack == 0
    assert plain.name == "add_kernel" == h100.reports[2].name
