"""How many SASS instructions a kernel executes, Triton's or CUDA C++, on a machine without a GPU.

SASS has loops and branches: its static size says little. How often each part runs follows from two
things that the compiled kernel carries. ptxsim runs the PTX and counts how often each PTX line is
issued; ptxas leaves a table in the cubin that says which PTX line an instruction comes from. All
instructions of a basic block run equally often, and a block's count is what its memory accesses,
barriers and shuffles say, which ptxas does not move from block to block; what it does move (an
address out of a loop) thus counts where it ended up. Where they differ the largest count holds: the
others stood in a branch that ptxas has made a predicate. A block without any of them takes the
count of most of its instructions, the first block that of the launched warps, and what no branch
reaches 0. `Executed.agreement` is the share of executed instructions whose own PTX line says the
same as their block.

A count is of instructions issued by a warp, whatever its active lanes; instructions that a
predicate turns off are issued. Not seen are branches that ptxas makes where the PTX has a predicate
(one atomic per block here, counted for every warp). The slow path of a division, for operands near
the ends of the range, counts as never taken. Where ptxas has
unrolled a loop, so that the SASS has several copies of one access, it is not known how they share
its iterations: that is refused (`Undetermined`).
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"
if not (TESTS / "ptxsim").is_dir():
    raise ImportError(f"needs the simulator of a source checkout; there is no {TESTS / 'ptxsim'}")
if str(TESTS) not in sys.path:
    sys.path.append(str(TESTS))

import cuda_device  # noqa: E402  (found through the line above, like ptxsim)
import ptxsim  # noqa: E402
from ptxsim.cubin import tool  # noqa: E402
from triton.runtime import driver  # noqa: E402


class Undetermined(Exception):
    """The tables do not say how often a block runs."""


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: str
    ptx_line: int
    source: str  # file:line

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]


@dataclass
class Block:
    labels: list[str]
    instructions: list[Instruction] = field(default_factory=list)


@dataclass
class Executed:
    """Warp instructions of one launch or more."""

    instructions: int
    by_opcode: Counter[str]
    by_source: Counter[str]
    agreement: float


def numbered(ptx: str) -> str:
    """PTX whose source lines are its own: ptxsim then counts by PTX line."""
    lines, in_code = [], True
    for number, line in enumerate(ptx.splitlines(), 1):
        in_code = in_code and not re.match(r"\s*\.section", line)  # debug information follows
        if re.match(r"\s*\.(loc|file)\s", line):
            continue
        if in_code and re.match(r"\s*[@a-z{]", line):
            lines.append(f".loc 1 {number} 0")
        lines.append(line)
    return "\n".join([*lines, '.file 1 "ptx"', ""])


class _Launcher(ptxsim.TritonDevice.launcher_cls):
    def __init__(self, src, metadata):
        super().__init__(src, metadata)
        self.source = src
        self.kernel = ptxsim.parse(numbered(self.asm["ptx"])).kernels[metadata.name]

    def __call__(self, *args):
        super().__call__(*args)
        driver.active.reports[-1].source = self.source


class CountingDevice(ptxsim.TritonDevice):
    """A simulated GPU whose reports have counts by PTX line, and as `source` what Triton
    compiled."""

    launcher_cls = _Launcher

    def get_current_device(self) -> int:
        """Not that of ptxsim's own devices, whose kernels Triton keeps with other launchers."""
        return 1000 + super().get_current_device()


@dataclass
class CudaReport:
    """A launch of a CUDA C++ kernel: what ptxsim counted and what was compiled, as TritonReport."""

    report: ptxsim.Report
    asm: dict[str, str | bytes]  # ptx, cubin

    def __getattr__(self, name):
        return getattr(self.report, name)

    def cubin_info(self) -> ptxsim.KernelInfo:
        (info,) = ptxsim.cubin_info(self.asm["cubin"]).values()
        return info


class CountingCuda(cuda_device.SimulatedCuda):
    """The CUDA C++ kernels on a simulated GPU, one report per launch; calls go to its methods."""

    def __init__(self, arch: int):
        super().__init__(arch, order="lockstep")

    def launch(self, name: str, *arguments, **options) -> CudaReport:
        kernel, asm = _cuda_kernel(name, self.arch)
        return CudaReport(kernel.launch(*arguments, **options), asm)


@functools.cache
def _cuda_kernel(name: str, arch: int) -> tuple[ptxsim.Kernel, dict[str, str | bytes]]:
    return counting_kernel(cuda_device.ptx(name, arch), arch)


def counting_kernel(ptx: str, arch: int) -> tuple[ptxsim.Kernel, dict[str, str | bytes]]:
    """The only kernel of nvcc's PTX, and what CudaReport takes as asm."""
    (kernel,) = ptxsim.parse(numbered(ptx)).kernels.values()
    cubin, _ = ptxsim.assemble(ptx, f"sm_{arch}", ("-lineinfo",))
    return kernel, {"ptx": ptx, "cubin": cubin}


def nvcc_version() -> str:
    """Of what compiles the CUDA C++ kernels."""
    told = subprocess.run([tool("nvcc"), "--version"], capture_output=True, text=True, check=True)
    return re.search(r"release (\S+),", told.stdout)[1]


# Effects that ptxas keeps in their basic block.
_FIXED = {"LDG", "STG", "LDS", "STS", "ATOM", "ATOMG", "ATOMS", "RED", "BAR", "SHFL"}
_ENDS = {"BRA", "BRX", "JMP", "JMX", "CALL", "RET", "EXIT"}

_LABEL = re.compile(r"(\.L\w+|\$\S+|[A-Za-z_]\w*):$")
_PTX_LINE = re.compile(r'\s*//## File "\.nv_debug_ptx_txt", line (\d+)')
_SOURCE_LINE = re.compile(r'\s*//## File "(.*)", line (\d+)')
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")


@functools.lru_cache(maxsize=8)
def disassemble(cubin: bytes) -> str:
    """SASS with the lines of the source and of the PTX above each instruction."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool("nvdisasm"), "-c", "-g", "-gp", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def reachable_blocks(sass: str) -> list[Block]:
    """The basic blocks of a disassembly that the entry leads to."""
    blocks, falls_through = [Block([])], []
    ptx_line, source = 0, ""

    def finish(falls: bool):
        falls_through.append(falls)
        blocks.append(Block([]))

    for line in sass.splitlines():
        if match := _PTX_LINE.match(line):
            ptx_line = int(match[1])
        elif match := _SOURCE_LINE.match(line):
            source = f"{Path(match[1]).name}:{match[2]}"
        elif match := _LABEL.match(line):
            if blocks[-1].instructions:
                finish(falls=True)
            blocks[-1].labels.append(match[1])
        elif (match := _INSTRUCTION.match(line)) and match[2] != "NOP":
            instruction = Instruction(match[2], match[3], ptx_line, source)
            blocks[-1].instructions.append(instruction)
            if instruction.base in _ENDS:
                # "BRA P0, ..." and "BRA.U UP0, ..." are conditional too.
                conditional = match[1] or re.match(r"!?U?P\d", instruction.operands)
                finish(falls=bool(conditional) or instruction.base == "CALL")
    if not blocks[-1].instructions:
        blocks.pop()
    named = {label: i for i, block in enumerate(blocks) for label in block.labels}
    reached, waiting = set(), [0]
    while waiting:
        i = waiting.pop()
        if i in reached or i >= len(blocks):
            continue
        reached.add(i)
        operands = " ".join(instruction.operands for instruction in blocks[i].instructions)
        targets = re.findall(r"\((\S+?)\)", operands)
        waiting += [named[to] for to in targets if to in named and not to.endswith("_slowpath")]
        if i < len(falls_through) and falls_through[i]:
            waiting.append(i + 1)
    return [blocks[i] for i in sorted(reached)]


def executed(*reports) -> Executed:
    """What launches on a counting device executed; reports: those of the device."""
    total, agreeing = 0, 0
    by_opcode: Counter[str] = Counter()
    by_source: Counter[str] = Counter()
    for report in reports:
        for block, count, hints in _counted_blocks(report):
            total += count * len(block.instructions)
            agreeing += count * hints.count(count)
            for i in block.instructions:
                by_opcode[i.base] += count
                by_source[i.source] += count
    return Executed(total, by_opcode, by_source, agreeing / total)


def _counted_blocks(report) -> Iterator[tuple[Block, int, list[int]]]:
    """Basic blocks, how often each ran, and what the PTX line of each instruction says of that."""
    issued = {line: count for (_, line), count in report.lines.items()}
    blocks = reachable_blocks(disassemble(report.asm["cubin"]))
    _refuse_copies(blocks, report.asm["ptx"])
    for block in blocks:
        members = block.instructions
        # Constants and parameters have PTX lines that issue nothing.
        hints = [issued.get(i.ptx_line, 0) for i in members]
        fixed = Counter(h for i, h in zip(members, hints, strict=True) if i.base in _FIXED)
        count = report.warps
        if block is not blocks[0]:
            count = max(fixed) if fixed else Counter(hints).most_common(1)[0][0]
        yield block, count, hints


def _refuse_copies(blocks: list[Block], ptx: str):
    """Raises unless an access, barrier or shuffle of the PTX is one of the SASS, or the pieces of a
    vector that no single instruction moves.
    """
    lines = ptx.splitlines()
    homes: dict[tuple[int, str], list[tuple[Block, int]]] = {}
    for block in blocks:
        for i in block.instructions:
            if i.base in _FIXED:
                width = re.search(r"\.(64|128|256)\b", i.opcode)
                bits = int(width[1]) if width else 32
                homes.setdefault((i.ptx_line, i.base), []).append((block, bits))
    for (number, _), found in homes.items():
        vector = re.search(r"\.v(\d+)\.[a-z]+(\d+)", lines[number - 1])
        bits = int(vector[1]) * int(vector[2]) if vector else 0
        in_one = all(block is found[0][0] for block, _ in found)
        if len(found) > 1 and not (in_one and sum(b for _, b in found) == bits):
            text = " ".join(lines[number - 1].split())
            raise Undetermined(f"ptxas has made {len(found)} of PTX line {number}: {text}")
