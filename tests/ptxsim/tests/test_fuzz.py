"""Random expressions compiled by nvcc (run on ptxsim) and by g++ must agree bit for bit."""

import ctypes
import random
import subprocess

import numpy as np
import pytest

import ptxsim

from .harness import needs_nvcc_and_gxx

pytestmark = needs_nvcc_and_gxx

CTYPE = {
    "i": "int",
    "u": "unsigned",
    "l": "long long",
    "U": "unsigned long long",
    "f": "float",
    "d": "double",
}
NARROW = ["short", "signed char", "unsigned char", *list(CTYPE.values())[:-2]]
DTYPE = {"i": "i4", "u": "u4", "l": "i8", "U": "u8", "f": "f4", "d": "f8"}
LEAVES = {
    "i": ["a", "(int)e"],
    "u": ["b", "(unsigned)(g >> 7)"],
    "l": ["e", "(long long)a * (b >> 1)"],
    "U": ["g", "b * g"],
    "f": ["x", "y", "(float)a", "(float)e", "(float)g", "(float)b"],
    "d": ["z", "(double)x", "(double)e", "(double)g"],
}
PRELUDE = r"""
#include <math.h>
#ifndef __CUDACC__
#define __device__
#endif
template <class T> __device__ T larger(T a, T b) { return a < b ? b : a; }
template <class T> __device__ T positive(T a) {
    return !(a == a) ? (T)1 : a < 0 ? -a : a == 0 ? (T)0.25 : a; }
template <class T> __device__ T loop(unsigned n, T v) {
    for (unsigned i = 0; i < n; i++) { v = (T)((unsigned long long)v * 3 + i);
        if (v & 1) v ^= (T)n; } return v; }
__device__ static double clampd(double x) {
    return x > 1e15 ? 1e15 : x < -1e15 ? -1e15 : x == x ? x : 0; }
__device__ static float clampf(float x) {
    return x > 1e9f ? 1e9f : x < -1e9f ? -1e9f : x == x ? x : 0; }
"""
INPUTS = (
    "const int* A, const unsigned* B, const long long* E, const unsigned long long* G, "
    "const float* X, const float* Y, const double* Z"
)
LOCALS = (
    "int a = A[j]; unsigned b = B[j]; long long e = E[j]; unsigned long long g = G[j]; "
    "float x = X[j], y = Y[j]; double z = Z[j];"
)


class Generator:
    """Random expressions without undefined behaviour: signed arithmetic is done unsigned."""

    def __init__(self, seed):
        self.rnd = random.Random(seed)

    def any_type(self):
        return self.rnd.choice("iulUfd")

    def expr(self, t, depth):
        r, ct = self.rnd, CTYPE[t]
        if depth == 0:
            if r.random() < 0.75:
                return f"({r.choice(LEAVES[t])})"
            return (
                f"({r.uniform(-3, 3):.6f}{'f' if t == 'f' else ''})"
                if t in "fd"
                else f"(({ct}){r.randint(0, 1 << 20)})"
            )

        def e(u=t):
            return self.expr(u, depth - 1)

        def test():
            comparison = r.choice(["<", ">=", "==", "!="])
            return f"({e(self.any_type())} {comparison} {e(self.any_type())})"

        if t in "fd":
            s = "f" if t == "f" else ""
            return r.choice(
                [
                    lambda: f"({e()} {r.choice('+-*/')} {e()})",
                    lambda: f"fma{s}({e()}, {e()}, {e()})",
                    lambda: f"sqrt{s}(fabs{s}({e()}))",
                    lambda: f"fmin{s}(positive({e()}), positive({e()}))",
                    lambda: f"{r.choice(['floor', 'ceil', 'trunc', 'rint'])}{s}({e()})",
                    lambda: f"copysign{s}({e()}, {e()})",
                    lambda: f"({test()} ? {e()} : {e()})",
                    lambda: f"(({ct}){e(r.choice('iulU' + ('d' if t == 'f' else 'f')))})",
                ]
            )()
        v, bits = ("unsigned", 31) if t in "iu" else ("unsigned long long", 63)
        return r.choice(
            [
                lambda: f"(({ct})(({v}){e()} {r.choice('+-*')} ({v}){e()}))",
                lambda: f"({e()} {r.choice('&|^')} {e()})",
                lambda: f"(({ct})(({v}){e()} << ({e('u')} & {bits})))",
                lambda: f"({e()} >> ({e('u')} & {bits}))",
                lambda: f"(~{e()})",
                lambda: f"({e()} {r.choice('/%')} ({ct})(({e()} & 0xfff) + {r.randint(1, 9)}))",
                lambda: f"(({ct})({e('l')} {r.choice('/%')} {r.choice([3, -7, 10, 1000])}))",
                lambda: f"({test()} ? {e()} : {e()})",
                lambda: f"(({ct})({r.choice(NARROW)}){e(r.choice('iulU'))})",
                lambda: f"(({ct})(long long)clampd({e('d')}))",
                lambda: f"(({ct})(int)clampf({e('f')}))",
                lambda: f"larger({e()}, {e()})",
                lambda: f"loop({e('u')} & 7, {e()})",
            ]
        )()


@pytest.mark.parametrize("seed", range(2))
def test_random_expressions(seed, tmp_path):
    gen, count, n = Generator(seed), 16, 400
    cases = [
        (t, gen.expr(t, gen.rnd.choice([3, 4]))) for t in (gen.any_type() for _ in range(count))
    ]
    device = "".join(
        f'extern "C" __global__ void k{i}({INPUTS}, {CTYPE[t]}* out, '
        f"int n) {{ int j = blockIdx.x * blockDim.x"
        f" + threadIdx.x; if (j >= n) return; {LOCALS} out[j] = {text}; }}\n"
        for i, (t, text) in enumerate(cases)
    )
    host = "".join(
        f'extern "C" void k{i}({INPUTS}, {CTYPE[t]}* out, '
        f"int n) {{ for (int j = 0; j < n; j++) {{ {LOCALS} out[j] = {text}; }} }}\n"
        for i, (t, text) in enumerate(cases)
    )
    (tmp_path / "host.cpp").write_text(PRELUDE + host)
    subprocess.run(
        [
            "g++",
            "-O1",
            "-fwrapv",
            "-ffp-contract=off",
            "-shared",
            "-fPIC",
            "-w",
            tmp_path / "host.cpp",
            "-o",
            tmp_path / "host.so",
        ],
        check=True,
    )
    library = ctypes.CDLL(str(tmp_path / "host.so"))
    rng = np.random.default_rng(seed)

    def raw(dtype):
        return np.frombuffer(rng.bytes(n * np.dtype(dtype).itemsize), dtype)

    y = raw("f4")
    inputs = [
        raw("i4") >> rng.integers(0, 31, n).astype("i4"),
        raw("u4") >> rng.integers(0, 31, n).astype("u4"),
        raw("i8") >> rng.integers(0, 63, n),
        raw("u8") >> rng.integers(0, 63, n).astype("u8"),
        (rng.standard_normal(n) * 10.0 ** rng.integers(-3, 4, n)).astype("f4"),
        np.where(np.isfinite(y), y, np.float32(1)),
        rng.standard_normal(n) * 10.0 ** rng.integers(-10, 10, n),
    ]
    for options in (["-fmad=false"], ["-G"]):
        module = ptxsim.nvcc(PRELUDE + device, "sm_90", extra=[*options, "-w"])
        for i, (t, text) in enumerate(cases):
            got, want = np.zeros(n, DTYPE[t]), np.zeros(n, DTYPE[t])
            module.kernels[f"k{i}"].launch(-(-n // 128), 128, [*inputs, got, n])
            pointers = [ctypes.c_void_p(v.ctypes.data) for v in (*inputs, want)]
            getattr(library, f"k{i}")(*pointers, n)
            same = (got == want) | (got != got) & (want != want)
            assert same.all(), (
                text,
                options,
                np.flatnonzero(~same)[:3],
                got[~same][:3],
                want[~same][:3],
            )
