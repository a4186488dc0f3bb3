"""Kernels compiled by nvcc."""

import numpy as np
import pytest

import ptxsim

from .harness import needs_cxxfilt, needs_nvcc

pytestmark = needs_nvcc
rng = np.random.default_rng(11)
F32, F64 = np.float32, np.float64

SOURCE = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>
#include <cmath>
#define TID int i = blockIdx.x * blockDim.x + threadIdx.x; if (i >= n) return;

extern "C" __global__ void saxpy(int n, float a, const float* x, float* y) {
    TID y[i] = a * x[i] + y[i]; }

template <typename T> __global__ void softmax(const T* x, T* y, int rows, int cols) {
    int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    x += (int64_t)row * cols; y += (int64_t)row * cols;
    float m = -INFINITY, s = 0;
    for (int c = lane; c < cols; c += 32) m = fmaxf(m, (float)x[c]);
    for (int o = 16; o; o >>= 1) m = fmaxf(m, __shfl_xor_sync(~0u, m, o));
    for (int c = lane; c < cols; c += 32) s += expf((float)x[c] - m);
    for (int o = 16; o; o >>= 1) s += __shfl_xor_sync(~0u, s, o);
    float lse = m + logf(s);
    for (int c = lane; c < cols; c += 32) y[c] = (T)expf((float)x[c] - lse);
}
template __global__ void softmax<float>(const float*, float*, int, int);
template __global__ void softmax<__half>(const __half*, __half*, int, int);
template __global__ void softmax<__nv_bfloat16>(const __nv_bfloat16*, __nv_bfloat16*, int, int);

extern "C" __global__ void block_sum(const float* x, float* out, int n) {
    __shared__ float s[32];
    float v = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n;
        i += gridDim.x * blockDim.x) v += x[i];
    for (int o = 16; o; o >>= 1) v += __shfl_down_sync(~0u, v, o);
    if (threadIdx.x % 32 == 0) s[threadIdx.x / 32] = v;
    __syncthreads();
    if (threadIdx.x < 32) {
        v = threadIdx.x < blockDim.x / 32 ? s[threadIdx.x] : 0;
        for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
        if (threadIdx.x == 0) atomicAdd(out, v);
    }
}
extern "C" __global__ void divide_f32(const float* a, const float* b, float* o, int n) {
    TID o[i] = a[i] / b[i]; }
extern "C" __global__ void reciprocal(const float* a, float* o, int n) { TID o[i] = 1.0f / a[i]; }
extern "C" __global__ void square_root(const float* a, float* o, int n) { TID o[i] = sqrtf(a[i]); }
extern "C" __global__ void divide_f64(const double* a, const double* b, double* o, int n) {
    TID o[i] = a[i] / b[i]; }
#define UNARY(name, T, expr) \
    extern "C" __global__ void name(const T* a, T* o, int n) { TID T x = a[i]; o[i] = expr; }
UNARY(f_exp, float, expf(x)) UNARY(f_log, float, logf(x)) UNARY(f_log1p, float,
    log1pf(x)) UNARY(f_tanh, float, tanhf(x))
UNARY(f_sin, float, sinf(x)) UNARY(f_pow, float, powf(x, 1.5f)) UNARY(f_erf, float,
    erff(x)) UNARY(f_rsqrt, float, rsqrtf(x))
UNARY(f_expm1, float, expm1f(x)) UNARY(f_sigmoid, float, 1.0f / (1.0f + expf(-x)))
UNARY(d_exp, double, exp(x)) UNARY(d_log, double, log(x)) UNARY(d_log1p, double,
    log1p(x)) UNARY(d_tanh, double, tanh(x))
UNARY(d_sin, double, sin(x)) UNARY(d_pow, double, pow(x, 1.5)) UNARY(d_sqrt, double,
    sqrt(x)) UNARY(d_rsqrt, double, rsqrt(x))

extern "C" __global__ void halves(const float* x, __half* h, __nv_bfloat16* b, float* back, int n) {
    TID h[i] = __float2half(x[i]); b[i] = __float2bfloat16(x[i]);
        back[i] = __half2float(h[i]) + __bfloat162float(b[i]);
}
extern "C" __global__ void half2s(const __half2* a, const __nv_bfloat162* b, __half2* c,
    __nv_bfloat162* d, int n) {
    TID c[i] = __hfma2(a[i], a[i], __hadd2(a[i], a[i]));
        d[i] = __hmul2(b[i], __hmax2(b[i], __hneg2(b[i])));
}
extern "C" __global__ void gather64(const float* x, const int64_t* index, float* out, int64_t n,
    int64_t stride) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n)
        out[i] = x[index[i] * stride + i % stride] + (float)(index[i] / 7) + (float)(index[i] % 5);
}
extern "C" __global__ void integers(const int* a, const int* b, int* o, long long* w, int n) {
    TID
    o[i] = a[i] / b[i] ^ a[i] % b[i] ^ __popc(a[i]) ^ __clz(b[i]) ^ (int)__brev(a[i]) ^ __ffs(b[i])
        ^ __mulhi(a[i], b[i])
        ^ (int)__byte_perm(a[i], b[i], 0x5104) ^ (int)__funnelshift_l(a[i], b[i], 5);
    w[i] = (long long)a[i] * b[i] / 7 + (long long)a[i] % 13;
}
struct Params { const float* x; float scale; int n; int table[4]; };
extern "C" __global__ void by_value(Params p, float* o) {
    int i = threadIdx.x; if (i < p.n) o[i] = p.x[i] * p.scale + p.table[i & 3];
}
__constant__ float weights[4] = {1, 2, 3, 4};
__device__ int calls;
extern "C" __global__ void locals(float* o, int k) {
    int i = threadIdx.x; float a[8];
    for (int j = 0; j < 8; j++) a[j] = j * k;
    o[i] = weights[i & 3] + a[(i * k) & 7];
    atomicAdd(&calls, 1);
}
__device__ __noinline__ float helper(float a, int b) { return b ? a * b + 1 : sinf(a); }
extern "C" __global__ void call_helper(float* o) { int i = threadIdx.x;
    o[i] = helper(o[i], i & 1) + helper(2 * o[i], i); }
extern "C" __global__ void histogram(const int* x, int* counts, int n) {
    __shared__ int s[16];
    if (threadIdx.x < 16) s[threadIdx.x] = 0;
    __syncthreads();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n;
        i += gridDim.x * blockDim.x) atomicAdd(&s[x[i]], 1);
    __syncthreads();
    if (threadIdx.x < 16) atomicAdd(&counts[threadIdx.x], s[threadIdx.x]);
}
extern "C" __global__ void last_block(const float* x, float* partial, unsigned* ticket, float* out,
    int n) {
    __shared__ bool last; __shared__ float s;
    if (threadIdx.x == 0) {
        float v = 0; for (int i = blockIdx.x; i < n; i += gridDim.x) v += x[i];
        partial[blockIdx.x] = v; __threadfence();
            last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1; s = 0;
    }
    __syncthreads();
    if (last) { for (int i = threadIdx.x; i < gridDim.x;
        i += blockDim.x) atomicAdd(&s, partial[i]); __syncthreads(); if (!threadIdx.x) *out = s; }
}
extern "C" __global__ void select_case(int* a) {
    int i = threadIdx.x;
    switch (a[i]) { case 0: a[i] = 5; break; case 1: a[i] = 7; break; case 2: a[i] = i; break;
        case 3: a[i] = -i; break;
                    case 4: a[i] = i * i; break; case 5: a[i] = 1; break; case 6: a[i] = i + 9;
                        break; default: a[i] = -1; }
}
extern "C" __global__ void dynamic(float* o) {
    extern __shared__ float buf[];
    buf[threadIdx.x] = o[threadIdx.x]; __syncthreads();
        o[threadIdx.x] = buf[blockDim.x - 1 - threadIdx.x];
}
extern "C" __global__ void checks(const int* a) { if (a[threadIdx.x] < 0) __trap(); }
"""


@pytest.fixture(scope="module", params=["sm_80", "sm_90", "sm_100", "debug"])
def cuda(request):
    if request.param == "debug":
        return ptxsim.nvcc(SOURCE, arch="sm_90", extra=["-G"])
    return ptxsim.nvcc(SOURCE, arch=request.param)


@pytest.fixture(scope="module")
def fast():
    return ptxsim.nvcc(SOURCE, arch="sm_90", extra=["--use_fast_math"])


def grid(n, block=128):
    return -(-n // block), block


def ulps(got, exact):
    """Error in units of the last place of the result type."""
    spacing = np.maximum(
        np.spacing(np.abs(exact).astype(got.dtype)).astype(F64),
        np.finfo(got.dtype).smallest_subnormal,
    )
    finite = np.isfinite(exact) & (np.abs(exact) <= np.finfo(got.dtype).max)
    return np.abs(got.astype(F64) - exact)[finite] / spacing[finite]


def test_saxpy(cuda):
    x, y = rng.standard_normal((2, 1000)).astype(F32)
    want = 2.5 * x.astype(F64) + y
    report = cuda.find("saxpy").launch(*grid(1000), [1000, 2.5, x, y])
    fused = "fma.rn.f32" in cuda.text.split(".entry saxpy")[1].split("ret;")[0]  # not with -G
    assert (
        np.array_equal(y, want.astype(F32)) if fused else np.allclose(y, want, rtol=1e-5, atol=1e-6)
    )
    assert (
        report.global_load.sectors_per_request == pytest.approx(4, abs=0.1)
        and report.global_store.requests == 32
    )


def softmax(x):
    e = np.exp(x.astype(F64) - x.max(axis=1, keepdims=True).astype(F64))
    return e / e.sum(axis=1, keepdims=True)


@needs_cxxfilt
@pytest.mark.parametrize("cols", [17, 32, 33, 100])
def test_softmax_float(cuda, fast, cols):
    x = (5 * rng.standard_normal((50, cols))).astype(F32)
    for module, tolerance in ((cuda, 2e-6), (fast, 2e-5)):
        for mode in ("nearest", "worst"):
            y = np.zeros_like(x)
            module.find("softmax<float>").launch(13, 128, [x, y, 50, cols], approx=mode)
            assert np.allclose(y, softmax(x), rtol=tolerance, atol=1e-9), (cols, mode)


@needs_cxxfilt
@pytest.mark.parametrize(
    "kernel,dtype", [("softmax<__half>", "float16"), ("softmax<__nv_bfloat16>", "bfloat16")]
)
def test_softmax_half(cuda, kernel, dtype):
    torch = pytest.importorskip("torch")
    x = torch.randn(40, 33).to(getattr(torch, dtype))
    y = torch.zeros_like(x)
    cuda.find(kernel).launch(10, 128, [x, y, 40, 33])
    exact = x.double().softmax(1)
    assert (y.double() - exact).abs().max() <= torch.finfo(x.dtype).eps * exact.max()


def test_block_sum(cuda):
    x, out = rng.standard_normal(10000).astype(F32), np.zeros(1, F32)
    report = cuda.find("block_sum").launch(7, 256, [x, out, 10000])
    assert out[0] == pytest.approx(x.astype(F64).sum(), abs=1e-3)
    assert report.traffic("arg0").read_unique == x.nbytes and report.atomics.requests == 7


def wild(n):
    return np.concatenate(
        [
            rng.integers(0, 1 << 32, n, dtype=np.uint32).view(F32),
            rng.standard_normal(n).astype(F32),
            np.array([0.0, -0.0, 1, np.inf, -np.inf, np.nan, 1e-40, 3e38], F32),
        ]
    )


def test_fp32_division_is_correctly_rounded(cuda):
    """nvcc inlines div.rn.f32; extreme exponents take its slow path."""
    a, b = wild(5000), wild(5000)[::-1].copy()
    out = np.zeros_like(a)
    cuda.find("divide_f32").launch(*grid(len(a)), [a, b, out, len(a)])
    with np.errstate(all="ignore"):
        assert np.array_equal(out, a / b, equal_nan=True)
        cuda.find("reciprocal").launch(*grid(len(a)), [a, out, len(a)])
        assert np.array_equal(out, 1 / a, equal_nan=True)
        cuda.find("square_root").launch(*grid(len(a)), [a, out, len(a)])
        assert np.array_equal(out, np.sqrt(a), equal_nan=True)


def test_fp64_division(cuda):
    a, b = rng.standard_normal((2, 500)) * 10.0 ** rng.integers(-100, 100, (2, 500))
    out = np.zeros(500)
    cuda.find("divide_f64").launch(*grid(500), [a, b, out, 500])
    assert np.array_equal(out, a / b)


# CUDA C++ programming guide: maximum ulp errors with default compilation
@pytest.mark.parametrize(
    "kernel,fn,low,high,bound",
    [
        ("f_exp", np.exp, -80, 80, 2),
        ("f_log", np.log, 1e-6, 1e6, 1),
        ("f_log1p", np.log1p, -0.9, 100, 1),
        ("f_tanh", np.tanh, -10, 10, 2),
        ("f_sin", np.sin, -1000, 1000, 2),
        ("f_pow", lambda x: x**1.5, 0.001, 1e5, 4),
        ("f_rsqrt", lambda x: x**-0.5, 1e-5, 1e5, 2),
        ("f_expm1", np.expm1, -10, 10, 1),
        ("f_sigmoid", lambda x: 1 / (1 + np.exp(-x)), -30, 30, 3),
    ],
)
def test_fp32_functions(cuda, kernel, fn, low, high, bound):
    x = rng.uniform(low, high, 3000).astype(F32)
    out = np.zeros_like(x)
    cuda.find(kernel).launch(*grid(3000), [x, out, 3000])
    assert ulps(out, fn(x.astype(F64))).max() <= bound + 0.5


def test_erf(cuda):
    from math import erf

    x = rng.uniform(-4, 4, 1000).astype(F32)
    out = np.zeros_like(x)
    cuda.find("f_erf").launch(*grid(1000), [x, out, 1000])
    assert ulps(out, np.array([erf(v) for v in x.astype(F64)])).max() <= 2.5


def test_sin_of_huge_arguments(cuda):
    """Payne-Hanek reduction: 64-bit integer arithmetic and local memory."""
    x = (rng.uniform(1e5, 1e30, 200)).astype(F32)
    out = np.zeros_like(x)
    cuda.find("f_sin").launch(*grid(200), [x, out, 200])
    assert ulps(out, np.sin(x.astype(F64))).max() <= 2.5


@pytest.mark.parametrize(
    "kernel,fn,low,high,bound",
    [
        ("d_exp", np.exp, -700, 700, 1),
        ("d_log", np.log, 1e-10, 1e10, 1),
        ("d_log1p", np.log1p, -0.9, 100, 1),
        ("d_tanh", np.tanh, -10, 10, 2),
        ("d_sin", np.sin, -1000, 1000, 2),
        ("d_pow", lambda x: x**1.5, 0.001, 1e5, 2),
        ("d_sqrt", np.sqrt, 0, 1e10, 0),
        ("d_rsqrt", lambda x: 1 / np.sqrt(x), 1e-5, 1e5, 1),
    ],
)
def test_fp64_functions(cuda, kernel, fn, low, high, bound):
    x = rng.uniform(low, high, 1000)
    out = np.zeros_like(x)
    cuda.find(kernel).launch(*grid(1000), [x, out, 1000])
    reference = fn(x.astype(np.longdouble))
    error = np.abs(out - reference) / np.spacing(np.abs(out))
    assert error.max() <= bound + 0.55


def test_fast_math_functions(fast):
    x = rng.uniform(-5, 5, 2000).astype(F32)
    out = np.zeros_like(x)
    fast.find("f_exp").launch(*grid(2000), [x, out, 2000])
    assert np.allclose(out, np.exp(x.astype(F64)), rtol=1e-6)
    fast.find("f_sigmoid").launch(*grid(2000), [x, out, 2000], approx="worst")
    assert np.allclose(out, 1 / (1 + np.exp(-x.astype(F64))), rtol=2e-6)
    fast.find("f_sin").launch(*grid(2000), [x, out, 2000])
    assert np.allclose(out, np.sin(x.astype(F64)), atol=1e-6)
    y = np.array([1e-40, 1.0], F32)  # --use_fast_math flushes subnormals
    fast.find("saxpy").launch(1, 32, [2, 1.0, y, y])
    assert y.tolist() == [0.0, 2.0]


def test_half_and_bfloat_conversions(cuda):
    torch = pytest.importorskip("torch")
    x = torch.cat(
        [
            torch.randn(500) * 100,
            torch.tensor([65504.0, 65520.0, 1e-8, -1e-8, float("inf"), 1.00390625]),
        ]
    )
    h, b, back = (
        torch.zeros(len(x), dtype=torch.float16),
        torch.zeros(len(x), dtype=torch.bfloat16),
        torch.zeros(len(x)),
    )
    cuda.find("halves").launch(*grid(len(x)), [x, h, b, back, len(x)])
    assert torch.equal(h, x.half()) and torch.equal(b, x.bfloat16())
    assert torch.equal(back, x.half().float() + x.bfloat16().float())


def test_packed_half_arithmetic(cuda):
    torch = pytest.importorskip("torch")
    a, b = torch.randn(256).half(), torch.randn(256).bfloat16()
    c, d = torch.zeros_like(a), torch.zeros_like(b)
    cuda.find("half2s").launch(1, 128, [a, b, c, d, 128])
    assert torch.equal(c, (a.double() * a.double() + (a + a).double()).half())
    assert torch.equal(d, (b.double() * b.double().abs()).bfloat16())


def test_int64_indexing(cuda):
    x = rng.standard_normal(5000).astype(F32)
    index = rng.integers(0, 1000, 300)
    out = np.zeros(300, F32)
    cuda.find("gather64").launch(*grid(300), [x, index, out, 300, 5])
    assert np.allclose(out, x[index * 5 + np.arange(300) % 5] + index // 7 + index % 5)


def test_integer_intrinsics(cuda):
    a, b = (rng.integers(-(2**31), 2**31, 500).astype(np.int32) for _ in range(2))
    b[b == 0] = 1
    out, wide = np.zeros(500, np.int32), np.zeros(500, np.int64)
    cuda.find("integers").launch(*grid(500), [a, b, out, wide, 500])

    def u(v):
        return v & 0xFFFFFFFF

    for x, y, got, w in zip(a.tolist(), b.tolist(), out.tolist(), wide.tolist(), strict=True):
        q = abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)
        perm = [(u(y) << 32 | u(x)) >> 8 * k & 255 for k in range(8)]
        want = (
            u(q)
            ^ u(x - q * y)
            ^ bin(u(x)).count("1")
            ^ (32 - u(y).bit_length())
            ^ int(f"{u(x):032b}"[::-1], 2)
            ^ (u(y) & -u(y)).bit_length()
            ^ u(x * y >> 32)
            ^ sum(perm[k] << 8 * i for i, k in enumerate((4, 0, 1, 5)))
            ^ u((u(y) << 32 | u(x)) << 5 >> 32)
        )
        assert u(got) == want
        p = x * y
        assert w == abs(p) // 7 * (1 if p >= 0 else -1) + abs(x) % 13 * (1 if x >= 0 else -1)


def test_struct_by_value(cuda):
    x, out = rng.standard_normal(40).astype(F32), np.zeros(40, F32)
    p = np.array(
        [(x.ctypes.data, 1.5, 40, (1, 2, 3, 4))],
        np.dtype([("x", "u8"), ("scale", "f4"), ("n", "i4"), ("table", "i4", 4)]),
    ).tobytes()
    cuda.find("by_value").launch(1, 64, [p, out], buffers={"x": x})
    assert np.allclose(out, x * 1.5 + np.array([1, 2, 3, 4])[np.arange(40) & 3])


def test_constants_locals_and_device_variables(cuda):
    out = np.zeros(64, F32)
    before = cuda.globals["calls"].view(np.int32)[0]
    cuda.find("locals").launch(1, 64, [out, 3])
    i = np.arange(64)
    assert np.array_equal(out, np.array([1, 2, 3, 4])[i & 3] + (i * 3 & 7) * 3)
    assert cuda.globals["calls"].view(np.int32)[0] - before == 64


def test_device_function_call(cuda):
    x = rng.uniform(-3, 3, 64).astype(F32)
    out = x.copy()
    cuda.find("call_helper").launch(1, 64, [out])
    i, x = np.arange(64), x.astype(F64)
    one = np.where(i & 1, x * (i & 1) + 1, np.sin(x))
    two = np.where(i > 0, 2 * x * i + 1, np.sin(2 * x))
    assert np.allclose(out, one + two, rtol=1e-6, atol=1e-6)


def test_shared_histogram(cuda):
    x = rng.integers(0, 16, 5000).astype(np.int32)
    counts = np.zeros(16, np.int32)
    for order in ("lockstep", "forward", "reverse"):
        counts[:] = 0
        cuda.find("histogram").launch(5, 128, [x, counts, 5000], order=order, check_uninit=True)
        assert np.array_equal(counts, np.bincount(x, minlength=16))


def test_last_block_reduction(cuda):
    x, partial, ticket, out = (
        rng.standard_normal(600).astype(F32),
        np.zeros(20, F32),
        np.zeros(1, np.uint32),
        np.zeros(1, F32),
    )
    for batch in (64, 16384):
        cuda.find("last_block").launch(20, 64, [x, partial, ticket, out, 600], batch_threads=batch)
        assert out[0] == pytest.approx(x.astype(F64).sum(), abs=1e-3) and ticket[0] == 0


def test_switch(cuda):
    a = np.arange(-1, 9, dtype=np.int32).repeat(5)[:32]
    i, before = np.arange(32), a.copy()
    cuda.find("select_case").launch(1, 32, [a])
    table = {0: 5 + 0 * i, 1: 7 + 0 * i, 2: i, 3: -i, 4: i * i, 5: 1 + 0 * i, 6: i + 9}
    assert a.tolist() == [
        int(table[v][k]) if v in table else -1 for k, v in enumerate(before.tolist())
    ]


def test_dynamic_shared(cuda):
    x = np.arange(128, dtype=F32)
    cuda.find("dynamic").launch(1, 128, [x], shared_bytes=512)
    assert np.array_equal(x, np.arange(127, -1, -1))
    with pytest.raises(ptxsim.OutOfBounds, match="kernel.cu"):
        cuda.find("dynamic").launch(1, 128, [x], shared_bytes=256)


def test_trap_reports_the_thread(cuda):
    a = np.ones(64, np.int32)
    cuda.find("checks").launch(1, 64, [a])
    a[41] = -1
    with pytest.raises(ptxsim.Trap, match="trap|kernel.cu") as e:
        cuda.find("checks").launch(1, 64, [a])
    assert e.value.tid == (41, 0, 0)


def test_out_of_bounds_reports_the_source_line(cuda):
    line = next(i for i, t in enumerate(SOURCE.splitlines(), 1) if "a * x[i] + y[i]" in t)
    with pytest.raises(ptxsim.OutOfBounds, match=f"kernel.cu:{line}"):
        cuda.find("saxpy").launch(1, 64, [64, 1.0, np.zeros(63, F32), np.zeros(64, F32)])


@needs_cxxfilt
def test_find_and_compile_errors(cuda):
    assert cuda.find("softmax<float>").name.startswith("_Z7softmaxIf")
    with pytest.raises(LookupError, match="3 kernels match"):
        cuda.find("softmax")
    with pytest.raises(LookupError, match="0 kernels match"):
        cuda.find("no_such_kernel")
    with pytest.raises(ptxsim.CompileError, match="error"):
        ptxsim.nvcc("__global__ void k() { undefined(); }\n")


def test_includes_and_defines(tmp_path):
    (tmp_path / "inc").mkdir()
    header, source = tmp_path / "inc" / "scale.cuh", tmp_path / "k.cu"
    source.write_text(
        '#include "scale.cuh"\nextern "C" __global__ void k(float* x) { x[threadIdx.x] *= SCALE * '
        "EXTRA; }\n"
    )
    for scale in (2, 3):
        header.write_text(f"#define SCALE {scale}\n")
        x = np.ones(4, F32)
        ptxsim.nvcc(source, includes=[tmp_path / "inc"], defines={"EXTRA": 5}).find("k").launch(
            1, 4, [x]
        )
        assert (x == 5 * scale).all()
