"""Which backend runs: one choice per call, in one function. A forced backend never falls back."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import native

BACKENDS = ("triton", "cuda", "cpu", "reference")
_Function = TypeVar("_Function", bound=Callable[..., Any])
CUDA_LEVELS = 12  # csrc/cuda/shapes.h: kMaxHeadLevels
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Value checks of labels, scores and targets (they read the tensors): GFL_KERNELS_DEBUG=1.
DEBUG = os.environ.get("GFL_KERNELS_DEBUG", "0") not in ("", "0")

# Plain globals, not a ContextVar: torch.compile guards them and recompiles on change. A value of
# the environment that makes no sense is reported by the first call, since importing never fails.
_forced: str | None = os.environ.get("GFL_KERNELS_BACKEND") or None
_cpu_error: str | None = native.why_not()
_autograd: ModuleType | None = native.autograd()


def backends() -> dict[str, str]:
    """Every backend with "ok", or with the reason why it cannot be used and what to do about it."""
    return {name: _why_not(name) or "ok" for name in BACKENDS}


def _constant_when_compiled(function: _Function) -> _Function:
    """torch.compiler.assume_constant_result, but that imports all of torch._dynamo: torch.compile
    calls the function while it traces, and need not look into Triton.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant_when_compiled
def _why_not(name: str) -> str | None:
    """Why a backend cannot be used at all; None if it can."""
    if name == "triton":
        reason = _triton_import_error()
        if reason is None and not (torch.cuda.is_available() or _triton_runs_on("cpu")):
            reason = (
                "it needs a CUDA or ROCm device, and there is none; TRITON_INTERPRET=1 runs its "
                "kernels on the CPU, slowly"
            )
        return reason
    if name == "cuda":
        return native.cuda_why_not()
    return _cpu_error if name == "cpu" else None


@cache
def _triton_import_error() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed; pip install triton, where it exists for the platform"
    try:
        import_module(".triton", __package__)
    except Exception as error:  # a Triton that does not fit this Python, torch or driver
        return f"triton cannot be used: {type(error).__name__}: {error}"
    return None


@_constant_when_compiled
def _triton_runs_on(device_type: str) -> bool:
    """Whether kernels can be launched on tensors of this device now: Triton takes CPU tensors where
    it interprets, or where a driver says that it does (a simulated device)."""
    if device_type == "cuda":
        return True
    if device_type != "cpu":
        return False
    from triton.runtime import driver

    from .triton.launch import INTERPRETED

    return INTERPRETED or getattr(driver._active, "runs_cpu_tensors", False)


def _check_usable(name: str, who: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{who}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    reason = _why_not(name)
    if reason is not None:
        usable = ", ".join(other for other in BACKENDS if _why_not(other) is None)
        raise RuntimeError(
            f"{who}: backend {name!r} cannot be used: {reason}; usable here: {usable}"
        )


class use_backend:
    """Force a backend: ``use_backend("reference")`` from now on, ``with use_backend("cpu"):`` for a
    block.

    None gives the choice back to the package. A forced backend that cannot run a call raises
    RuntimeError, and says what could. The environment variable GFL_KERNELS_BACKEND does the same
    from outside.
    """

    def __init__(self, name: str | None) -> None:
        global _forced
        if name is not None:
            _check_usable(name, "use_backend")
        self._name, self._previous = name, _forced
        _forced = name

    def __enter__(self) -> use_backend:
        global _forced
        _forced = self._name  # an object may be entered again
        return self

    def __exit__(self, *exception: object) -> None:
        global _forced
        _forced = self._previous


def exporting() -> bool:
    """Exported graphs hold plain PyTorch operations and run where gfl_kernels is not installed."""
    # Both ONNX exporters are among these: one traces, the other exports. The flag is what
    # torch.compiler.is_exporting() returns, which torch.compile takes for True in torch 2.11.
    return torch.compiler._is_exporting_flag or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def _obstacle(
    backend: str, pred: Tensor, constants: Sequence[Tensor | None], levels: int
) -> str | None:
    """Why a fused backend cannot serve this call; constants: what it has no derivative for."""
    if backend == "cpu":
        if _cpu_error is not None:
            return _cpu_error
        if not pred.is_cpu:
            return f"it needs CPU tensors, got {pred.device}"
    else:
        reason = _why_not(backend)
        if reason is not None:
            return reason
        if backend == "cuda" and not pred.is_cuda:
            return f"it needs CUDA tensors, got {pred.device}"
        if backend == "cuda" and levels > CUDA_LEVELS:
            return f"it takes heads of at most {CUDA_LEVELS} levels, got {levels}"
        if backend == "triton" and not _triton_runs_on(pred.device.type):
            return f"it needs CUDA tensors (or TRITON_INTERPRET=1), got {pred.device}"
    if pred.dtype not in DTYPES:
        return f"it has no kernels for {pred.dtype}"
    for tensor in constants:
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            return (
                "it has no derivative for targets, weights or bins, nor for what it decodes "
                "(one requires grad; detach it)"
            )
    if torch._C._are_functorch_transforms_active():
        return "it does not run under torch.func transforms"
    return None


def _candidate(pred: Tensor, levels: int = 1) -> str:
    """The backend whose turn it is: the forced one, else the one for pred's device."""
    if _forced is not None:
        return _forced
    if pred.is_cuda:  # compiled kernels are launched in a fraction of the time that Triton takes
        return "cuda" if levels <= CUDA_LEVELS and _why_not("cuda") is None else "triton"
    return "cpu" if pred.is_cpu else "reference"


def choose(op: str, pred: Tensor, *constants: Tensor | None, levels: int = 1) -> str:
    """The backend for this call: the forced one, else the first that can run it. levels: those of a
    head, of which pred is the first.
    """
    if _forced is not None:
        _check_usable(_forced, "GFL_KERNELS_BACKEND")
    backend = _candidate(pred, levels)
    if backend == "reference" or exporting():
        return "reference"
    obstacle = _obstacle(backend, pred, constants, levels)
    if obstacle is None:
        return backend
    if _forced is None:
        return "reference"
    raise RuntimeError(f"backend {_forced!r} cannot run {op}: {obstacle}; usable for it: reference")


def compiled_calls() -> ModuleType | None:
    """gfl_kernels._autograd where a call may begin there: its functions take the arguments of the
    public ones, and if these are the usual ones for the CPU kernels do the rest in C++, otherwise
    return None. What they take, `choose` would have given to "cpu".
    """
    if _forced not in (None, "cpu") or DEBUG or torch.compiler.is_compiling():
        return None
    return _autograd


def kernel(name: str, pred: Tensor, levels: int = 1) -> Callable[..., Any]:
    """The fused implementation of op ``name``; the reference is chosen above the ops."""
    backend = _candidate(pred, levels)
    if _forced == "reference":
        obstacle: str | None = "use_backend('reference') is in force and the reference is not an op"
    elif backend == "reference":
        obstacle = f"no backend has kernels for {pred.device}"
    else:
        obstacle = _obstacle(backend, pred, (), levels)
    if obstacle is not None:
        raise RuntimeError(f"gfl_kernels::{name} has no kernel to run: {obstacle}")
    return implementation(backend, name)


@cache
def implementation(backend: str, name: str) -> Callable[..., Any]:
    """Op ``name`` of a fused backend that `choose` has found able to run it."""
    if backend != "triton":
        return getattr(torch.ops.gfl_native, name).default
    launch = getattr(import_module(".triton", __package__), name)
    op = getattr(torch.ops.gfl_kernels, name).default

    def run(*args: Any) -> Any:
        # Tensors that are not what their memory says (fake ones, a pending sign) go through the
        # dispatcher, which takes care of them and comes back here.
        return launch(*args) if all(map(_is_plain, args)) else op(*args)

    return run


def _is_plain(value: object) -> bool:
    if type(value) is Tensor:
        return not value.is_neg()
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return not isinstance(value, Tensor) or (
        type(value).__torch_dispatch__ is Tensor.__torch_dispatch__ and not value.is_neg()
    )
