"""``python -m gfl_kernels``: what is installed and which backend serves what, for a bug report."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__, backends, dispatch, native


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def report() -> str:
    lines = [
        f"gfl_kernels {__version__}",
        f"python      {sys.version.split()[0]} on {platform.platform()}",
        f"torch       {torch.__version__} (CUDA {torch.version.cuda or 'no'})",
        f"triton      {_version('triton')}",
        f"threads     {torch.get_num_threads()}",
    ]
    info = native.build_info()
    if info:
        lines.append(
            f"library     built by {info['compiler']} against torch {info['built_against_torch']}"
        )
        architectures = info["cuda_architectures"].replace(",", ", ")
        lines.append(f"cuda        {architectures or 'not built'}")
        lines.append(f"cpu isa     {native.cpu_isa()} of {', '.join(native.available_isas())}")
    lines += ["", "backends:"]
    lines += [f"  {name:<10}{state}" for name, state in backends().items()]
    left_out = native.build_report().get("left_out") or {}
    lines += [f"  left out of the build: {what}: {why}" for what, why in left_out.items()]
    if native.library() is not None:
        through = f"Python: {native.autograd_why_not()}" if native.autograd() is None else "C++"
        lines.append(f"  calls reach the CPU kernels through {through}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines += ["", f"what runs for a float32 tensor on {device}:"]
    sample = torch.zeros(1, 2, device=device)
    for op in (
        "quality_focal_loss",
        "distribution_focal_loss",
        "integral",
        "localization_distillation_loss",
        "gfl_loss",
        "decode_boxes",
    ):
        try:
            served = dispatch.choose(op, sample)
        except (RuntimeError, ValueError) as error:
            served = f"nothing: {error}"
        lines.append(f"  {op:<32}{served}")
    variables = {name: value for name, value in os.environ.items() if name.startswith("GFL_")}
    if variables:
        lines += ["", "environment:"]
        lines += [f"  {name}={value}" for name, value in sorted(variables.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
