"""Which backend runs: one choice per call, in one function. A forced backend never falls back."""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

from . import native

BACKENDS = ("triton", "cuda", "cpu", "reference")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Value checks of labels, scores and targets (they read the tensors): GFL_KERNELS_DEBUG=1.
DEBUG = os.environ.get("GFL_KERNELS_DEBUG", "0") not in ("", "0")

# Plain globals, not a ContextVar: torch.compile guards them and recompiles on change. A value of
# the environment that makes no sense is reported by the first call, since importing never fails.
_forced: str | None = os.environ.get("GFL_KERNELS_BACKEND") or None
_state: dict[str, str] = {
    "triton": "not part of this version of gfl_kernels",
    "cuda": "not part of this version of gfl_kernels",
    "cpu": native.why_not() or "ok",
    "reference": "ok",
}


def backends() -> dict[str, str]:
    """Every backend with "ok", or with the reason why it cannot be used and what to do about it."""
    return dict(_state)


def _check_usable(name: str, who: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{who}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    if _state[name] != "ok":
        raise RuntimeError(
            f"{who}: backend {name!r} cannot be used: {_state[name]}; usable here: {_usable()}"
        )


def _usable() -> str:
    return ", ".join(name for name, state in _state.items() if state == "ok")


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

    def __exit__(self, *exception) -> None:
        global _forced
        _forced = self._previous


def _tracing_for_export() -> bool:
    """Exported graphs hold plain PyTorch operations and run where gfl_kernels is not installed."""
    # Both ONNX exporters are among these: one traces, the other exports.
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def _cpu_obstacle(pred: Tensor, *constants: Tensor | None) -> str | None:
    """Why the CPU kernels cannot serve this call; constants: what they have no derivative for."""
    if not pred.is_cpu:
        return f"it needs CPU tensors, got {pred.device}"
    if pred.dtype not in DTYPES:
        return f"it has no kernels for {pred.dtype}"
    for tensor in constants:
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            return (
                "it has no derivative for targets, weights or bins (one requires grad; detach it)"
            )
    if torch._C._are_functorch_transforms_active():
        return "it does not run under torch.func transforms"
    return None


def choose(op: str, pred: Tensor, *constants: Tensor | None) -> str:
    """The backend for this call: the forced one, else the first that can run it."""
    forced = _forced
    if forced is not None:
        _check_usable(forced, "GFL_KERNELS_BACKEND")
    if forced == "reference" or _tracing_for_export():
        return "reference"
    obstacle = _cpu_obstacle(pred, *constants) if _state["cpu"] == "ok" else _state["cpu"]
    if obstacle is None:
        return "cpu"
    if forced is None:
        return "reference"
    raise RuntimeError(f"backend {forced!r} cannot run {op}: {obstacle}; usable for it: reference")


def kernel(name: str, pred: Tensor):
    """The fused implementation of op ``name``; the reference is chosen above the ops."""
    if _forced == "reference":
        obstacle = "use_backend('reference') is in force and the reference is not an op"
    elif _state["cpu"] != "ok":
        obstacle = _state["cpu"]
    else:
        obstacle = _cpu_obstacle(pred)
    if obstacle is not None:
        raise RuntimeError(f"gfl_kernels::{name} has no kernel to run: {obstacle}")
    return _native_op(name)


@cache
def _native_op(name: str):
    return getattr(torch.ops.gfl_native, name).default
