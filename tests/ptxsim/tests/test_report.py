"""Instruction counts, roofline bounds and static information."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import ptxsim
from ptxsim.cubin import tool, tool_paths
from ptxsim.report import classify

from .harness import launch, module, needs_cuda_tools, needs_nvcc

BODY = """.loc 1 5 1
    ld.param.u64 %rd1, [p0]; mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x;
        mad.lo.u32 %r4, %r2, %r3, %r1;
    mad.wide.u32 %rd2, %r4, 4, %rd1;
    .loc 1 6 1
    ld.global.f32 %r5, [%rd2]; mul.f32 %r6, %r5, %r5; ex2.approx.f32 %r7, %r6;
        setp.lt.u32 %p1, %r1, 8; @%p1 bra SKIP;
    add.f32 %r7, %r7, %r5; div.full.f32 %r7, %r7, %r5;
    SKIP: bar.sync 0; shfl.sync.bfly.b32 %r8, %r7, 1, 31, -1; rem.u32 %r9, %r4, 7;
        cvt.rn.f64.f32 %rd3, %r8; st.global.f32 [%rd2], %r8;"""


def run(**kwargs):
    x = np.ones(4 * 64, np.float32)
    return launch(
        BODY.replace("cvt.rn.f64", "cvt.f64"),
        [x],
        grid=4,
        block=64,
        head='.file 1 "a.cu"\n',
        **kwargs,
    )


@pytest.mark.parametrize("batch_threads", [64, 16384])
@pytest.mark.parametrize("order", ["lockstep", "reverse"])
def test_instruction_counts(batch_threads, order):
    r = run(batch_threads=batch_threads, order=order)
    warps = 8
    want = {
        "move": 4,
        "alu": 3,
        "global_ld": 1,
        "fp32": 2,
        "xu": 1,
        "branch": 2,
        "fp_div_fast": 1,
        "barrier": 1,
        "shuffle": 1,
        "int_div": 1,
        "cvt": 1,
        "global_st": 1,
    }
    assert {k: v for k, v in r.by_class.items() if v} == {k: warps * v for k, v in want.items()}
    assert r.warps == warps and r.warp_instructions == warps * 19
    idle = 4 * 8 * 2  # 8 threads of each block skip two instructions
    assert r.thread_instructions == warps * 19 * 32 - idle and r.lane_utilisation == pytest.approx(
        1 - idle / (warps * 19 * 32)
    )
    assert r.lines == {("a.cu", 6): warps * 13, ("a.cu", 5): warps * 6}


def test_predicated_off_lanes_count_as_idle():
    r = launch("mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 8; @%p1 add.u32 %r2, %r1, 1;", [None])
    assert r.warp_instructions == 4 and r.thread_instructions == 3 * 32 + 8


def test_count_memory_off():
    assert run(count_memory=False).global_load.requests == 0 and run().global_load.requests == 8


def test_to_dict_and_text():
    r = run()
    d = json.loads(json.dumps(r.to_dict()))
    assert (
        d["global_load"]["sectors"] == 32
        and d["allocations"][0]["name"] == "arg0"
        and d["lines"]["a.cu:6"] == 104
    )
    text = str(r)
    assert "4.0 sectors/request" in text and "lane utilisation" in text and "arg0" in text


def test_roofline_terms():
    r = run()
    bound = r.roofline("h100")
    g = ptxsim.GPUS["h100"]
    assert bound.terms["dram"] == pytest.approx(2 * 1024 / (g.dram_gbs * 1e3))
    assert bound.terms["l2"] == pytest.approx(2 * 1024 / (g.l2_gbs * 1e3))
    per_us = 4 * g.clock_ghz * 1e3  # four CTAs use four SMs
    assert bound.terms["lsu"] == pytest.approx(
        (8 + 8 + 8) / per_us
    )  # loads, stores, shuffles: one pass each
    assert bound.terms["fma"] == pytest.approx(
        (8 * 2 + 8 * 3) * 32 / 128 / per_us
    )  # fp32, and div.full as 3
    assert (
        bound.microseconds == max(bound.terms.values())
        and bound.terms[bound.bound_by] == bound.microseconds
    )
    assert "bound by" in str(bound)
    for gpu in ("a100", "h100", "h200", "l4", "rtx4090", "b200"):
        assert r.roofline(gpu).microseconds > 0


def test_a_streaming_kernel_is_bound_by_dram():
    x, y = np.zeros(1 << 20, np.float32), np.zeros(1 << 20, np.float32)
    r = launch(
        """ld.param.u64 %rd1, [p0]; ld.param.u64 %rd2, [p1]; mov.u32 %r1, %tid.x;
            mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x;
        mad.lo.u32 %r4, %r2, %r3, %r1; mad.wide.u32 %rd3, %r4, 16, %rd1;
            mad.wide.u32 %rd4, %r4, 16, %rd2;
        ld.global.v4.f32 {%r5, %r6, %r7, %r8}, [%rd3];
        st.global.v4.f32 [%rd4], {%r5, %r6, %r7, %r8};""",
        [x, y],
        grid=1024,
        block=256,
    )
    bound = r.roofline("h100")
    assert bound.bound_by == "dram" and bound.microseconds == pytest.approx(2 * x.nbytes / 3352e3)
    assert r.global_load.width_histogram == {16: 8192} and r.global_load.sectors_per_request == 16


@pytest.mark.parametrize(
    "text,want",
    [
        ("fma.rn.f32 %r1, %r2, %r3, %r4", "fp32"),
        ("add.f64 %rd1, %rd2, %rd3", "fp64"),
        ("mul.bf16x2 %r1, %r2, %r3", "fp16"),
        ("fma.rn.f32x2 %rd1, %rd2, %rd3, %rd4", "fp32"),
        ("max.f32 %r1, %r2, %r3", "alu"),
        ("sqrt.approx.f32 %r1, %r2", "xu"),
        ("sqrt.rn.f32 %r1, %r2", "fp_div"),
        ("rcp.approx.ftz.f64 %rd1, %rd2", "xu"),
        ("div.rn.f64 %rd1, %rd2, %rd3", "fp64_div"),
        ("rem.s64 %rd1, %rd2, %rd3", "int_div64"),
        ("ld.shared.b32 %r1, [%r2]", "shared_ld"),
        ("st.local.b32 [%rd1], %r1", "local"),
        ("ld.const.b32 %r1, [%rd1]", "move"),
        ("ld.b32 %r1, [%rd1]", "global_ld"),
        ("red.global.add.f32 [%rd1], %r1", "atomic"),
        ("setp.eq.s32 %p1, %r1, 0", "alu"),
        ("selp.f64 %rd1, %rd2, %rd3, %p1", "alu"),
        ("setp.lt.f64 %p1, %rd1, %rd2", "fp64"),
        ("fence.acq_rel.gpu", "other"),
        ("vote.sync.any.pred %p1, %p2, -1", "shuffle"),
        ("cp.async.ca.shared.global [%r1], [%rd1], 16", "global_ld"),
        ("cp.async.commit_group", "other"),
    ],
)
def test_classes(text, want):
    assert classify(module(text + ";").kernels["k"].function.insts[0]) == want


CUDA = """#include <cmath>
extern "C" __global__ void saxpy(int n, float a, const float4* x, float* y) {
    int i = blockIdx.x * blockDim.x + threadIdx.x; if (i < n) { float4 v = x[i];
        y[i] = a * v.x + v.y + v.z + v.w; } }
extern "C" __global__ void many(const float* x, float* y, int n) {
    __shared__ float s[64]; float a[40];
    for (int j = 0; j < 40; j++) a[j] = x[threadIdx.x + 64 * j];
    for (int k = 0; k < n; k++) for (int j = 0; j < 40; j++) a[j] = __expf(a[j]) * a[(j + 1) % 40];
    s[threadIdx.x] = a[0]; __syncthreads(); float t = s[63 - threadIdx.x];
    for (int j = 0; j < 40; j++) t += a[j];
    y[threadIdx.x] = t; }
"""


@needs_nvcc
@needs_cuda_tools
def test_static_information(tmp_path):
    ptx = ptxsim.compile_ptx(CUDA, "sm_80")
    info = ptxsim.ptxas_info(ptx, "sm_80")
    a, b = info["saxpy"], info["many"]
    assert (
        a.loads == {16: 1}
        and a.stores == {4: 1}
        and a.mufu == 0
        and a.spill_stores == 0
        and a.static_shared == 0
    )
    assert 0 < a.registers < 32 and a.instructions == a.opcodes.total() > 10 and a.stack == 0
    assert b.static_shared == 256 and b.mufu >= 40 and b.spill_stores == 0 and b.registers > 40
    tight = ptxsim.ptxas_info(ptx, "sm_80", extra=("-maxrregcount=32",))["many"]
    assert (
        tight.registers <= 32
        and tight.spill_stores > 0
        and tight.spill_loads > 0
        and tight.local_loads > 0
        and tight.local_stores > 0
    )
    source, cubin = tmp_path / "k.cu", tmp_path / "k.cubin"
    source.write_text(CUDA)
    subprocess.run([tool("nvcc"), "-cubin", "-arch=sm_80", "-o", cubin, source], check=True)
    for given in (cubin, cubin.read_bytes()):
        same = ptxsim.cubin_info(given)["saxpy"]
        assert (same.registers, same.loads, same.stores, same.instructions) == (
            a.registers,
            a.loads,
            a.stores,
            a.instructions,
        )
    with pytest.raises(ptxsim.PtxSimError, match="failed"):
        ptxsim.ptxas_info(ptx.replace("fma.rn.f32", "fma.xx.f32"), "sm_80")


def fake(folder, name, text="#!/bin/sh\nexit 3\n"):
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_tools_are_found_on_path_in_cuda_and_in_triton(tmp_path, monkeypatch):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ptxsim.PtxSimError, match="'no-such-tool' was found neither"):
        tool("no-such-tool")
    own = fake(tmp_path, "nvdisasm")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert tool("nvdisasm") == own
    (tmp_path / "first").mkdir()
    first = fake(tmp_path / "first", "nvdisasm")
    monkeypatch.setenv("PATH", str(tmp_path / "first" / "bin"))
    assert tool_paths("nvdisasm")[:2] == [first, own]
    monkeypatch.setitem(sys.modules, "triton", None)
    assert tool_paths("nvdisasm")[:2] == [first, own]


def test_the_tools_of_triton_do_without_any_on_path(tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("ptxas", "cuobjdump", "nvdisasm"):
        assert any(path.startswith(triton.__path__[0]) for path in tool_paths(name))
    text = module("add.f32 %r1, %r1, %r2;").text
    assert ptxsim.ptxas_info(text, "sm_90a")["k"].instructions > 0


def test_a_tool_that_fails_gives_way_to_the_next(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    fake(tmp_path, "cuobjdump")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    assert tool("cuobjdump").startswith(str(tmp_path))
    info = ptxsim.ptxas_info(module("mul.f32 %r1, %r1, %r2;").text, "sm_90a")["k"]
    assert info.registers > 0 and info.spills == 0
