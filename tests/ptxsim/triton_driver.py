"""Run Triton kernels on the simulator through Triton's own JIT.

``triton_device(90)`` installs a driver that claims to be a CUDA device of
compute capability 9.0.  Triton then specialises and compiles kernels exactly
as it would for that GPU (including ptxas), and each launch executes the
compiled PTX on CPU tensors.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .cubin import KernelInfo, cubin_info
from .errors import LaunchError
from .fp import FORMATS
from .kernel import Kernel, Module
from .report import Report, Roofline

_MAX_SHARED = {
    70: 98304,
    75: 65536,
    80: 166912,
    86: 101376,
    87: 166912,
    89: 101376,
    90: 232448,
    100: 232448,
    103: 232448,
    120: 101376,
}
_PACK = {
    "i1": "<?",
    "i8": "<b",
    "i16": "<h",
    "i32": "<i",
    "i64": "<q",
    "u1": "<?",
    "u8": "<B",
    "u16": "<H",
    "u32": "<I",
    "u64": "<Q",
    "fp16": "<e",
    "fp32": "<f",
    "f32": "<f",
    "fp64": "<d",
}


@dataclass
class TritonReport:
    """A launch: the :class:`Report` plus what Triton knows about the kernel."""

    report: Report
    name: str
    grid: tuple[int, int, int]
    num_warps: int
    shared: int
    asm: dict[str, str | bytes]  # ttir, ttgir, llir, ptx, cubin, ...

    def __getattr__(self, name):  # r.dram_bytes_read etc. read through
        if name == "report":  # not set yet (copying, unpickling)
            raise AttributeError(name)
        return getattr(self.report, name)

    def __str__(self) -> str:
        return f"[triton num_warps={self.num_warps} shared={self.shared}] {self.report}"

    def roofline(self, gpu: str = "h100") -> Roofline:
        return self.report.roofline(gpu)

    def cubin_info(self) -> KernelInfo:
        """Registers, spills, access widths, ... of the machine code that Triton compiled."""
        return cubin_info(self.asm["cubin"])[self.name]


class _Launcher:
    """What Triton calls to launch one compiled kernel."""

    def __init__(self, src, metadata):
        self.metadata = metadata
        self.signature = [src.signature[name] for name in src.fn.arg_names]
        self.names = list(src.fn.arg_names)
        self.asm = _compiled_files(src, metadata)
        self.kernel: Kernel = Module(self.asm["ptx"]).kernels[metadata.name]

    def __call__(
        self,
        gx,
        gy,
        gz,
        stream,
        function,
        packed_metadata,
        launch_metadata,
        enter_hook,
        exit_hook,
        *args,
    ):
        device = _active_device()
        if getattr(self.metadata, "num_ctas", 1) != 1:
            raise LaunchError("num_ctas > 1 (thread block clusters) is not supported")
        if enter_hook is not None:
            enter_hook(launch_metadata)
        if gx * gy * gz:
            device.reports.append(self._run(device, (gx, gy, gz), args))
        if exit_hook is not None:
            exit_hook(launch_metadata)

    def _run(self, device: TritonDevice, grid: tuple[int, int, int], args: tuple) -> TritonReport:
        names, values = [], []
        for name, typ, value in _flatten(zip(self.names, self.signature, args, strict=True)):
            names.append(name)
            values.append(_pack(name, typ, value))
        scratch = {}
        for kind in ("global_scratch", "profile_scratch")[: len(self.kernel.params) - len(values)]:
            size = getattr(self.metadata, f"{kind}_size", 0) * grid[0] * grid[1] * grid[2]
            scratch[kind] = np.zeros(size, np.uint8) if size else None
        meta = self.metadata
        report = self.kernel.launch(
            grid,
            meta.num_warps * 32,
            values + list(scratch.values()),
            meta.shared,
            names=names + list(scratch),
            **device.launch_options,
        )
        return TritonReport(report, meta.name, grid, meta.num_warps, meta.shared, self.asm)


def _compiled_files(src, metadata) -> dict[str, str | bytes]:
    """The IR files of a compiled kernel, from Triton's cache."""
    from triton.runtime.cache import get_cache_manager

    group = get_cache_manager(metadata.hash).get_group(f"{src.name[:150]}.json") or {}
    asm: dict[str, str | bytes] = {}
    for name, path in group.items():
        suffix = name.rsplit(".", 1)[-1]
        if suffix != "json":
            asm[suffix] = Path(path).read_bytes() if suffix == "cubin" else Path(path).read_text()
    if "ptx" not in asm:
        raise LaunchError(
            f"no PTX of '{metadata.name}' in Triton's cache (is TRITON_STORE_BINARY_ONLY set?)"
        )
    return asm


def _flatten(items) -> Iterator[tuple[str, str, object]]:
    """(name, type, value) of the arguments that are passed to the kernel."""
    for name, typ, value in items:
        if isinstance(typ, tuple):
            yield from _flatten(
                (f"{name}.{i}", t, v) for i, (t, v) in enumerate(zip(typ, value, strict=True))
            )
        elif typ.startswith("tensordesc"):
            raise LaunchError(f"argument '{name}': host-side tensor descriptors are not supported")
        elif typ != "constexpr":
            yield name, typ, value


def _pack(name: str, typ: str, value):
    """A launch argument: pointers as they are, scalars as bytes of the type Triton chose."""
    if typ.startswith("*"):
        return np.uint64(value) if isinstance(value, int) else value
    if typ == "bf16":
        return FORMATS["bf16"].encode(np.array(value, np.float64))[()]
    try:
        return struct.pack(_PACK[typ], value)
    except (KeyError, struct.error) as e:
        raise LaunchError(f"argument '{name}': cannot pass {value!r} as {typ}") from e


class _Utils:
    """The part of the CUDA driver API that Triton's runtime uses."""

    def __init__(self, arch: int):
        self.arch = arch

    def load_binary(self, name, binary, shared, device):
        """(module, function, registers, spills, maximum threads); use cubin_info for registers."""
        return object(), name, 0, 0, 1024

    def unload_module(self, module):
        pass

    def get_device_properties(self, device) -> dict[str, int]:
        return {
            "max_shared_mem": _MAX_SHARED.get(self.arch, 101376),
            "max_num_regs": 65536,
            "multiprocessor_count": 132,
            "warpSize": 32,
            "sm_clock_rate": 1_980_000,
            "mem_clock_rate": 2_619_000,
            "mem_bus_width": 5120,
        }

    def set_printf_fifo_size(self, size):
        pass


class TritonDevice:
    """A Triton driver for a simulated GPU; also a context manager.

    ``reports`` collects one :class:`TritonReport` per launch.  Extra keyword
    arguments (``approx``, ``order``, ``check_uninit``, ...) are passed to
    :meth:`Kernel.launch` and may be changed through ``launch_options``.
    """

    launcher_cls = _Launcher
    runs_cpu_tensors = True  # for callers that ask: may a kernel be launched on CPU tensors now?

    def __init__(self, arch: int = 90, gpu: str = "h100", **launch_options):
        self.arch, self.gpu, self.launch_options = arch, gpu, launch_options
        self.reports: list[TritonReport] = []
        self.utils = _Utils(arch)
        self._previous: tuple = ()

    def activate(self) -> TritonDevice:
        """Make Triton use this device until :meth:`deactivate`."""
        import triton.testing
        from triton.runtime import driver

        self._previous = (
            driver._active,
            triton.testing.do_bench,
            triton.testing.do_bench_cudagraph,
        )
        driver.set_active(self)
        triton.testing.do_bench = triton.testing.do_bench_cudagraph = do_bench
        return self

    def deactivate(self) -> None:
        import triton.testing
        from triton.runtime import driver

        driver._active, triton.testing.do_bench, triton.testing.do_bench_cudagraph = self._previous

    def __enter__(self) -> TritonDevice:
        return self.activate()

    def __exit__(self, *exc) -> None:
        self.deactivate()

    def get_benchmarker(self) -> Callable:
        return do_bench

    def is_active(self) -> bool:
        return True

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        """A device number per architecture: Triton caches compiled kernels by it."""
        return 1000 + self.arch

    def set_current_device(self, device) -> None:
        pass

    def get_current_stream(self, device) -> int:
        return 0

    def get_device_capability(self, device=None) -> tuple[int, int]:
        return divmod(self.arch, 10)

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")

    def get_device_interface(self):
        import torch

        return torch.cpu

    def map_python_to_cpp_type(self, ty: str) -> str:
        from triton.backends.nvidia.driver import ty_to_cpp

        return ty_to_cpp(ty)

    def get_empty_cache_for_benchmark(self):
        import torch

        return torch.empty(0)

    def clear_cache(self, cache) -> None:
        pass


def _active_device() -> TritonDevice:
    """Kernels and autotuners outlive a device: what they do belongs to the one active now."""
    from triton.runtime import driver

    if not isinstance(driver.active, TritonDevice):
        raise LaunchError("this kernel was loaded for a simulated device, and none is active")
    return driver.active


def do_bench(fn: Callable, *args, quantiles=None, return_mode: str = "mean", **kwargs):
    """Stand-in for triton.testing.do_bench: one run, whose "time" is the roofline bound."""
    device = _active_device()
    first = len(device.reports)
    fn()
    ms = sum(r.roofline(device.gpu).microseconds for r in device.reports[first:]) / 1e3
    if quantiles:
        return [ms] * len(quantiles)
    return [ms] if return_mode == "all" else ms


def triton_device(arch: int = 90, gpu: str = "h100", **launch_options) -> TritonDevice:
    """A simulated CUDA device of compute capability ``arch``; see :class:`TritonDevice`."""
    return TritonDevice(arch, gpu, **launch_options)
