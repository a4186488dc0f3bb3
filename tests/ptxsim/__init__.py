"""ptxsim: run compiled PTX (from Triton or nvcc) on the CPU with numpy.

>>> module = ptxsim.nvcc("kernel.cu", arch="sm_90")          # or ptxsim.parse(ptx_text)
>>> report = module.find("saxpy").launch(grid, block, [n, 2.0, x, y])
>>> print(report, report.roofline("h100"))
>>> with ptxsim.triton_device(90) as dev:                    # @triton.jit kernels on CPU tensors
...     kernel[grid](x, y, n, BLOCK=1024)
>>> print(dev.reports[-1])
"""

from .cubin import KernelInfo, assemble, cubin_info, ptxas_info, run_tool
from .errors import (
    Deadlock,
    DeviceError,
    LaunchError,
    Misaligned,
    OutOfBounds,
    ParseError,
    PtxSimError,
    Race,
    Timeout,
    Trap,
    UninitializedRead,
    UnsupportedInstruction,
)
from .kernel import Kernel, Module, Packed, parse
from .nvcc import CompileError, compile_ptx, nvcc
from .report import GPUS, Report, Roofline, demangle, demangle_all
from .triton_driver import TritonDevice, triton_device

__all__ = [
    "CompileError",
    "Deadlock",
    "DeviceError",
    "GPUS",
    "Kernel",
    "KernelInfo",
    "LaunchError",
    "Misaligned",
    "Module",
    "OutOfBounds",
    "Packed",
    "ParseError",
    "PtxSimError",
    "Race",
    "Report",
    "Roofline",
    "Timeout",
    "Trap",
    "TritonDevice",
    "UninitializedRead",
    "UnsupportedInstruction",
    "assemble",
    "compile_ptx",
    "cubin_info",
    "demangle",
    "demangle_all",
    "nvcc",
    "parse",
    "ptxas_info",
    "run_tool",
    "triton_device",
]
