"""Run a few PTX instructions on arrays."""

import re
import shutil

import numpy as np
import pytest

import ptxsim
from ptxsim.cubin import tool_paths


def _needs(*tools: str):
    missing = [t for t in tools if not (tool_paths(t) or shutil.which(t))]
    return pytest.mark.skipif(bool(missing), reason=f"not found: {', '.join(missing)}")


needs_nvcc = _needs("nvcc")
needs_nvcc_and_gxx = _needs("nvcc", "g++")
needs_cuda_tools = _needs("ptxas", "cuobjdump", "nvdisasm")
needs_cxxfilt = _needs("c++filt")

ORDERS = ["lockstep", "forward", "reverse"]
HEADER = ".version 8.8\n.target sm_90a\n.address_size 64\n"


def module(
    body: str, params: str = ".param .u64 p0", directives: str = "", head: str = ""
) -> ptxsim.Module:
    """A module with one kernel ``k``; registers %p, %h (16), %r (32), %rd (64) are declared."""
    return ptxsim.parse(f"""{HEADER}{head}
.visible .entry k({params}) {directives}
{{
    .reg .pred %p<16>; .reg .b16 %h<32>; .reg .b32 %r<64>; .reg .b64 %rd<64>; .reg .b128 %q<4>;
    {body}
    ret;
}}""")


def launch(body: str, args: list, grid=1, block=32, head: str = "", **kwargs) -> ptxsim.Report:
    """Launch a kernel body; argument i is parameter ``p<i>``."""
    kinds = [
        "u64"
        if isinstance(a, np.ndarray) or a is None
        else "f32"
        if isinstance(a, float)
        else "u32"
        for a in args
    ]
    params = ", ".join(f".param .{kind} p{i}" for i, kind in enumerate(kinds))
    return module(body, params, head=head).kernels["k"].launch(grid, block, args, **kwargs)


def evaluate(code: str, *inputs, out=np.uint32, outputs: int = 1, block: int = 32, **kwargs):
    """Apply ``code`` to arrays lane by lane.

    Inputs are %a0, %a1, ... and results %o0 (alias %o), %o1, ...; registers are
    16, 32 or 64 bits wide as the dtypes say.  The arrays are padded to whole blocks.
    """
    inputs = [np.ascontiguousarray(np.atleast_1d(x)) for x in inputs]
    n = max((len(x) for x in inputs), default=block)
    inputs = [np.broadcast_to(x, (n,)) for x in inputs]
    total = -(-n // block) * block
    padded = [np.concatenate([x, np.repeat(x[-1:], total - n)]) for x in inputs]
    results = [np.zeros(total, out) for _ in range(outputs)]

    def width(dt):
        return max(2, np.dtype(dt).itemsize)

    text = [
        "mov.u32 %r60, %tid.x; mov.u32 %r61, %ctaid.x; mov.u32 %r62, %ntid.x; "
        "mad.lo.u32 %r63, %r61, %r62, %r60;"
    ]
    for i, x in enumerate(padded):
        size = x.dtype.itemsize
        text.append(f".reg .b{8 * width(x.dtype)} %a{i};")
        text.append(
            f"ld.param.u64 %rd60, [p{i}]; mad.wide.u32 %rd61, %r63, {size}, %rd60; "
            f"ld.global.b{8 * size} %a{i}, [%rd61];"
        )
    text += [f".reg .b{8 * width(out)} %o{j};" for j in range(outputs)]
    text.append(re.sub(r"%o(?!\d)", "%o0", code))
    size = np.dtype(out).itemsize
    for j in range(outputs):
        text.append(
            f"ld.param.u64 %rd60, [p{len(padded) + j}]; mad.wide.u32 %rd61, %r63, {size}, %rd60;"
            f" st.global.b{8 * size} [%rd61], %o{j};"
        )
    launch("\n".join(text), padded + results, total // block, block, **kwargs)
    results = [r[:n] for r in results]
    return results[0] if outputs == 1 else results
