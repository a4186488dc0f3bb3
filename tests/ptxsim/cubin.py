"""Static facts about compiled kernels, from ptxas and the CUDA binary utilities."""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .errors import PtxSimError


def tool_paths(name: str) -> list[str]:
    """Every copy of a CUDA tool: on PATH, in a CUDA installation, in the triton package."""
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.path.join(root, "bin") for root in roots if root]
    spec = importlib.util.find_spec("triton")
    if spec and spec.submodule_search_locations:
        folders.append(os.path.join(spec.submodule_search_locations[0], "backends/nvidia/bin"))
    found = [shutil.which(name), *(shutil.which(name, path=folder) for folder in folders)]
    return list(dict.fromkeys(path for path in found if path))


def tool(name: str) -> str:
    """Path of the first copy of a CUDA tool."""
    paths = tool_paths(name)
    if not paths:
        raise PtxSimError(
            f"'{name}' was found neither on PATH nor in a CUDA installation nor in triton"
        )
    return paths[0]


@dataclass
class KernelInfo:
    """Resources of one kernel; fields a tool does not report are None."""

    name: str
    registers: int | None = None
    stack: int | None = None  # bytes per thread
    spill_stores: int | None = None  # bytes (ptxas only)
    spill_loads: int | None = None
    static_shared: int | None = None
    instructions: int | None = None  # SASS instructions, without NOP padding
    loads: dict[int, int] = field(default_factory=dict)  # LDG by bytes per lane
    stores: dict[int, int] = field(default_factory=dict)  # STG by bytes per lane
    local_loads: int = 0  # LDL
    local_stores: int = 0  # STL
    mufu: int = 0
    opcodes: Counter = field(default_factory=Counter)

    @property
    def spills(self) -> int:
        """LDL and STL instructions: spilled registers, or arrays that stayed in local memory."""
        return self.local_loads + self.local_stores


def _run(*command: str | os.PathLike) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise PtxSimError(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def run_tool(name: str, *arguments: str | os.PathLike) -> str:
    """Output of the first copy of a tool that succeeds: an old one may not know a new GPU."""
    for path in [tool(name), *tool_paths(name)[1:]]:
        try:
            return _run(path, *arguments)
        except PtxSimError as error:
            failure = error
    raise failure


_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.M)
_WIDTHS = {"128": 16, "64": 8, "256": 32, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def cubin_info(cubin: bytes | str | os.PathLike) -> dict[str, KernelInfo]:
    """Per kernel: registers, stack, shared memory and a count of SASS instructions."""
    return copy.deepcopy(
        _cubin_info(cubin if isinstance(cubin, bytes) else Path(cubin).read_bytes())
    )


@functools.lru_cache(maxsize=64)
def _cubin_info(cubin: bytes) -> dict[str, KernelInfo]:
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "kernel.cubin")
        Path(path).write_bytes(cubin)
        usage = run_tool("cuobjdump", "-res-usage", path)
        sass = run_tool("nvdisasm", "-c", path)
    out: dict[str, KernelInfo] = {}
    for m in re.finditer(r"Function (\S+):\s*\n\s*(.*)", usage):
        fields = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", m.group(2))}
        out[m.group(1)] = KernelInfo(
            m.group(1), fields.get("REG"), fields.get("STACK"), static_shared=fields.get("SHARED")
        )
    for m in re.finditer(r"\.section\s+\.text\.([^,\s]+),(.*?)(?=\n\s*\.section\s|\Z)", sass, re.S):
        if m.group(1) in out:
            _count_sass(out[m.group(1)], m.group(2))
    return out


def _count_sass(info: KernelInfo, text: str) -> None:
    info.opcodes = Counter(op for op in _INSTRUCTION.findall(text) if op != "NOP")
    info.instructions = info.opcodes.total()
    for op, n in info.opcodes.items():
        base, *mods = op.split(".")
        if base in ("LDG", "STG"):
            width = next((_WIDTHS[x] for x in mods if x in _WIDTHS), 4)
            table = info.loads if base == "LDG" else info.stores
            table[width] = table.get(width, 0) + n
        info.local_loads += n * (base == "LDL")
        info.local_stores += n * (base == "STL")
        info.mufu += n * (base == "MUFU")


def assemble(ptx: str, arch: str = "sm_90", extra: tuple[str, ...] = ()) -> tuple[bytes, str]:
    """The cubin that ptxas makes of PTX text, and what it prints."""
    with tempfile.TemporaryDirectory() as tmp:
        source, binary = os.path.join(tmp, "kernel.ptx"), os.path.join(tmp, "kernel.cubin")
        Path(source).write_text(ptx)
        log = _run(_ptxas_for(ptx), f"-arch={arch}", *extra, source, "-o", binary)
        return Path(binary).read_bytes(), log


def ptxas_info(ptx: str, arch: str = "sm_90", extra: tuple[str, ...] = ()) -> dict[str, KernelInfo]:
    """What ``ptxas -v`` says of PTX text (also spills in bytes), and the SASS counts."""
    cubin, log = assemble(ptx, arch, ("-v", *extra))
    out = cubin_info(cubin)
    for m in re.finditer(
        r"Function properties for (\S+)\s*\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads\s*\n.*?Used (\d+) registers(.*)",
        log,
    ):
        info = out.setdefault(m.group(1), KernelInfo(m.group(1)))
        info.stack, info.spill_stores, info.spill_loads, info.registers = map(
            int, m.group(2, 3, 4, 5)
        )
        shared = re.search(r"(\d+) bytes smem", m.group(6))
        info.static_shared = int(shared.group(1)) if shared else 0
    return out


def _ptxas_for(ptx: str) -> str:
    """A ptxas new enough for the ``.version`` of the text: triton carries two more."""
    wanted = tuple(int(x) for x in re.search(r"\.version\s+(\d+)\.(\d+)", ptx).groups())
    for path in tool_paths("ptxas") + tool_paths("ptxas-blackwell"):
        major, minor = map(
            int, re.search(r"release (\d+)\.(\d+)", _run(path, "--version")).groups()
        )
        newest = (8, minor if minor < 6 else minor - 1) if major == 12 else (major - 4, minor)
        if newest >= wanted:
            return path
    return tool("ptxas")
