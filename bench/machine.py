"""What a figure depends on besides the code: machine, versions, and the allocator."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

# glibc hands every large block back to the kernel when it is freed; the next one is page-faulted in
# anew, and a gradient of 43 MB then costs 12 ms of page faults and 2 ms of work. A training
# process ends up here by itself or by a better allocator. The same for every contestant.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
# Chatter on standard error: the profiler's, a page of traceback for every graph break (they are
# counted instead), and that there is no GPU.
QUIET = {"KINETO_LOG_LEVEL": "99", "TORCH_LOGS": "-all"}


def fix_allocator(module: str, arguments: list[str]):
    """glibc reads these at start-up only: starts this process again unless they are set."""
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        command = [sys.executable, "-m", module, *arguments]
        os.execve(sys.executable, command, {**QUIET, **os.environ, **ALLOCATOR})


def allocator_settings() -> str:
    """The settings this process runs under, or what libc does by itself."""
    found = [f"{name}={os.environ[name]}" for name in ALLOCATOR if name in os.environ]
    return f"{'-'.join(platform.libc_ver()) or 'libc'} " + (" ".join(found) or "defaults")


def describe_machine(threads: int, device: str = "cpu") -> dict:
    return {
        "gpu": _gpu_model() if device == "cuda" else "",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
    }


def describe_versions() -> dict:
    """Versions of everything whose code is timed, and the instruction sets it chose."""
    import torch

    import gfl_kernels
    from gfl_kernels import native

    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "revision": _first_line(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        ),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "gfl_kernels": gfl_kernels.__version__,
        "isa": native_isa(),
        "backends": dict(gfl_kernels.backends()),
        "build": native.build_info(),
        "calls": native.autograd_why_not() or "in C++",
        "compiler_of_torch_compile": _first_line([os.environ.get("CXX", "g++"), "--version"]),
    }
    for name in ("numpy", "matplotlib", "rich"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def native_isa() -> str:
    from gfl_kernels import native

    return native.cpu_isa() or "none"


def available_isas() -> list[str]:
    from gfl_kernels import native

    return native.available_isas()


def _gpu_model() -> str:
    import torch

    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def _cpu_model() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _first_line(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0]
    except OSError:
        return "absent"
