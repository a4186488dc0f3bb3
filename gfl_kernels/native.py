"""Finds and loads the compiled library, once, and keeps the reason when it can't."""

from __future__ import annotations

import ctypes
import json
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_PACKAGE = Path(__file__).parent
_FILE = {"win32": "gfl_native.dll", "darwin": "libgfl_native.dylib"}.get(
    sys.platform, "libgfl_native.so"
)
_STRINGS = (  # its functions that return one
    "gfl_cpu_isa",
    "gfl_available_isas",
    "gfl_build_info",
    "gfl_last_error",
    "gfl_cuda_obstacle",
)


@cache
def build_report() -> dict[str, Any]:
    """What the build of this installation left behind (setup.py writes it); empty without one."""
    try:
        report: dict[str, Any] = json.loads((_PACKAGE / "_build_report.json").read_text())
    except (OSError, ValueError):
        return {}
    return report


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library, whose ops are registered then, or None: why_not() says why."""
    return _load()[0]


def why_not() -> str | None:
    """Why the native library does not serve, and what to type; None if it does."""
    return _load()[1]


@cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    path = _PACKAGE / "lib" / _FILE
    if not path.exists():
        report = build_report()
        why = report.get("why") or "it was not built"
        hint = report.get("hint") or "pip install --no-build-isolation ."
        return None, f"{_FILE} is not installed: {why}. To build it: {hint}"
    try:
        torch.ops.load_library(path)
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{_FILE} could not be loaded: {error}"
    try:
        for name in _STRINGS:
            getattr(loaded, name).restype = ctypes.c_char_p
    except AttributeError as error:  # left over from another version
        return None, f"{_FILE} does not fit this version of gfl_kernels, build it again: {error}"
    if loaded.gfl_cpu_isa() is None:
        return None, loaded.gfl_last_error().decode()
    return loaded, None


@cache
def autograd() -> ModuleType | None:
    """gfl_kernels._autograd, or None: autograd_why_not() says why."""
    return _load_autograd()[0]


def autograd_why_not() -> str | None:
    """Why small calls on a CPU take their way through Python; None if they do not."""
    return _load_autograd()[1]


@cache
def _load_autograd() -> tuple[ModuleType | None, str | None]:
    if library() is None:
        return None, why_not()
    report = build_report()
    left_out = (report.get("left_out") or {}).get("autograd")
    if left_out:
        return None, f"gfl_kernels._autograd was not built: {left_out}"
    # Before it is loaded: what it uses of torch has no stable ABI.
    built_against = build_info()["built_against_torch"]
    if built_against != str(torch.__version__):
        return None, (
            f"gfl_kernels._autograd was built against torch {built_against}, and this is "
            f"{torch.__version__}. To build it again: pip install --no-build-isolation ."
        )
    try:
        return import_module("._autograd", __package__), None
    except ImportError as error:
        return None, f"gfl_kernels._autograd could not be loaded: {error}"


@cache
def cuda_why_not() -> str | None:
    """Why the CUDA kernels of the library do not serve; None if they do."""
    loaded, reason = _load()
    if loaded is None:
        return reason
    architectures = build_info()["cuda_architectures"]
    if not architectures:
        why = (build_report().get("left_out") or {}).get("cuda", "it was not asked for")
        return (
            f"{_FILE} was built without CUDA: {why}. "
            "To build it: GFL_KERNELS_BUILD=cuda pip install --no-build-isolation ."
        )
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    obstacle = loaded.gfl_cuda_obstacle()
    if obstacle is not None:
        return obstacle.decode()
    if not torch.cuda.is_available():
        return "it needs a CUDA device, and there is none"
    if not loaded.gfl_cuda_has_stream():
        return f"torch {torch.__version__} does not tell its current CUDA stream"
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        if not runs_on(architectures, major, minor):
            return (
                f"{_FILE} has CUDA kernels for {architectures}, and cuda:{device} is of "
                f"architecture {major}{minor}. To build it: GFL_KERNELS_BUILD=cuda "
                f"GFL_KERNELS_CUDA_ARCHITECTURES={major}{minor} pip install --no-build-isolation ."
            )
    return None


def runs_on(architectures: str, major: int, minor: int) -> bool:
    """Whether code for these (75-real,90: CMake's names) runs on a GPU of that compute capability.

    Machine code does on GPUs of its own generation that are no older, PTX on all that are no older.
    """
    for name in architectures.split(","):
        number, _, kind = name.partition("-")
        if not number.isdigit():  # native, all; 90a is for one GPU alone
            if not number[:-1].isdigit() or number[:-1] == f"{major}{minor}":
                return True
        elif int(number) <= 10 * major + minor and (kind != "real" or int(number) // 10 == major):
            return True
    return False


def build_info() -> dict[str, Any]:
    """How the loaded library was built; empty without one."""
    loaded = library()
    info: dict[str, Any] = json.loads(loaded.gfl_build_info()) if loaded else {}
    return info


def cpu_isa() -> str | None:
    """The instruction set the CPU kernels use."""
    loaded = library()
    return loaded.gfl_cpu_isa().decode() if loaded else None


def available_isas() -> list[str]:
    """What GFL_CPU_ISA may name on this machine."""
    loaded = library()
    return loaded.gfl_available_isas().decode().split(",") if loaded else []
