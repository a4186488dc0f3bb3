"""The public objects: modules, kernels and launches."""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .errors import LaunchError
from .machine import Batch
from .memory import Allocation, Arena, Counters, GlobalMemory
from .operands import REG_DTYPE
from .parser import Function, Imm, Tree, Var, parse_text, type_width
from .program import Program
from .report import Report, demangle, make_report

BATCH_BYTES = 1 << 29  # registers and local memory of a batch stay below this


class Packed(NamedTuple):
    """A struct by value that has pointers in it."""

    data: bytes
    pointers: Sequence[tuple[int, str, object]]  # (offset, name, array or tensor)


class Module:
    """A parsed PTX module.

    ``kernels`` maps entry names to :class:`Kernel`; ``globals`` maps ``.global``
    and ``.const`` variables to uint8 arrays that persist between launches.
    """

    def __init__(self, text: str):
        self.text = text
        self.tree: Tree = parse_text(text)
        variables = [v for v in self.tree.variables.values() if v.space in ("global", "const")]
        self.globals = {v.name: np.zeros(max(v.size, 1), np.uint8) for v in variables}
        for var in variables:
            if var.init:
                size = type_width(var.type) // 8
                data = b"".join(
                    (
                        i.bits(8 * size) if isinstance(i, Imm) else self.address(i.name) + i.offset
                    ).to_bytes(size, "little")
                    for i in var.init
                )
                self.globals[var.name][: len(data)] = np.frombuffer(data, np.uint8)
        self.kernels = {
            name: Kernel(self, fn) for name, fn in self.tree.functions.items() if fn.is_entry
        }

    def address(self, name: str) -> int:
        """Host address of a module variable."""
        return self.globals[name].ctypes.data

    def find(self, substring: str) -> Kernel:
        """The kernel whose (demangled) name contains ``substring``."""
        if substring in self.kernels:
            return self.kernels[substring]
        found = [
            k for k in self.kernels.values() if substring in k.name or substring in k.demangled
        ]
        if len(found) != 1:
            names = sorted(k.demangled for k in found or self.kernels.values())
            raise LookupError(
                f"{len(found)} kernels match {substring!r}; candidates:\n  " + "\n  ".join(names)
            )
        return found[0]


def parse(ptx_text: str) -> Module:
    """Parse PTX source text."""
    return Module(ptx_text)


class Kernel:
    """An entry function of a module."""

    def __init__(self, module: Module, function: Function):
        self.module, self.function, self.name = module, function, function.name
        self._program: Program | None = None

    @property
    def demangled(self) -> str:
        return demangle(self.name)

    @property
    def params(self) -> list[Var]:
        """Parameters, with ``type``, ``size`` and ``align``."""
        return self.function.params

    @property
    def reqntid(self) -> tuple[int, ...] | None:
        """Required block size, if the kernel states one."""
        dims = self.function.directives.get("reqntid")
        return tuple(dims + [1] * (3 - len(dims))) if dims else None

    @property
    def static_shared(self) -> int:
        """Bytes of statically declared shared memory."""
        return self.program.static_shared

    @property
    def registers(self) -> dict[int, int]:
        """Number of virtual registers by width in bits."""
        widths = [r.width for r in self.function.regs]
        return {w: widths.count(w) for w in sorted(set(widths))}

    @property
    def program(self) -> Program:
        """The compiled kernel (compiled on first use)."""
        if self._program is None:
            self._program = Program(self.module, self.function)
        return self._program

    def launch(
        self,
        grid,
        block,
        args: Sequence,
        shared_bytes: int = 0,
        *,
        names: Sequence[str] | None = None,
        buffers: Mapping[str, object] | None = None,
        approx: str = "nearest",
        seed: int = 0,
        order: str = "lockstep",
        isolate: bool = False,
        check_uninit: bool = False,
        check_races: bool = False,
        count_memory: bool = True,
        batch_threads: int = 16384,
        max_steps: int = 5_000_000,
    ) -> Report:
        """Run the kernel; results are written to the argument arrays in place.

        Parameters
        ----------
        grid, block : int or up to three ints
        args : numpy arrays or torch CPU tensors (passed as pointers), int, float,
            numpy scalars, None (null pointer), bytes (structs by value) or Packed (with
            pointers inside)
        shared_bytes : dynamic shared memory
        names : argument names for reports and errors
        buffers : further arrays the kernel may access (pointers inside structs)
        approx : 'nearest' rounds approximate functions (ex2, rcp, ...) correctly;
            'worst' moves them by the documented maximum error, up or down by a hash of their
            bits and ``seed``
        order : 'lockstep', or 'forward'/'reverse' to run the warps of a CTA one
            after the other up to each barrier; results that differ reveal races
        isolate : give every allocation its own far-away address range instead of its
            real address, so that no overrun can reach another argument (pointers
            inside plain bytes or memory then do not work)
        check_uninit : raise on reads of shared memory nobody wrote
        check_races : raise when warps of a block meet in shared memory with no barrier between
            them; atomic operations are not looked at
        count_memory : collect memory statistics
        max_steps : scheduling steps per batch of CTAs before giving up
        """
        launch = Launch(
            self,
            _dim3(grid, "grid"),
            _dim3(block, "block"),
            shared_bytes,
            approx,
            seed,
            order,
            check_uninit,
            check_races,
            count_memory,
            max_steps,
        )
        launch.bind(args, names or [f"arg{i}" for i in range(len(args))], buffers or {}, isolate)
        return launch.run(batch_threads)


class Launch:
    """One kernel launch: parameters, memory and counters shared by its batches."""

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        approx: str,
        seed: int,
        order: str,
        check_uninit: bool,
        check_races: bool,
        count_memory: bool,
        max_steps: int,
    ):
        self.kernel, self.program, self.grid, self.block = kernel, kernel.program, grid, block
        self.block_threads = block[0] * block[1] * block[2]
        if self.block_threads > 1024:
            raise LaunchError(f"a block of {self.block_threads} threads is too large")
        if kernel.reqntid and kernel.reqntid != block:
            raise LaunchError(
                f"kernel '{kernel.name}' requires blocks of {kernel.reqntid}, not {block}"
            )
        if approx not in ("nearest", "worst") or order not in ("lockstep", "forward", "reverse"):
            raise LaunchError(f"approx={approx!r}, order={order!r}")
        self._registers: list[np.ndarray] = []
        self.shared_bytes = max(
            self.program.static_shared, self.program.dynamic_start + shared_bytes
        )
        self.error_seed = np.uint64(seed) if approx == "worst" else None
        self.order, self.check_uninit, self.check_races = order, check_uninit, check_races
        self.count_memory, self.max_steps = count_memory, max_steps

    def bind(
        self, args: Sequence, names: Sequence[str], buffers: Mapping[str, object], isolate: bool
    ) -> None:
        """Lay out the arguments and register the memory they point to."""
        kernel, arena = self.kernel, Arena(isolate)
        if len(args) != len(kernel.params):
            raise LaunchError(
                f"kernel '{kernel.demangled}' takes {len(kernel.params)} arguments, got {len(args)}"
            )
        self.params = np.zeros(max(1, self.program.param_bytes), np.uint8)
        for arg, var, name in zip(args, kernel.params, names, strict=True):
            data = _pack(arg, var, name, arena)
            if len(data) != var.size:
                raise LaunchError(
                    f"argument '{name}' has {len(data)} bytes, parameter {var.name} has {var.size}"
                )
            start = self.program.params[id(var)]
            self.params[start : start + var.size] = np.frombuffer(data, np.uint8)
        for name, obj in buffers.items():
            arena.add(obj, name)
        for name, array in kernel.module.globals.items():
            at, writable = array.ctypes.data, kernel.module.tree.variables[name].space != "const"
            arena.allocations.append(Allocation(name, at, at, array.size, writable))
        at = self.params.ctypes.data
        arena.allocations.append(
            Allocation("<params>", at, at, self.params.size, writable=False, counted=False)
        )
        self.memory = GlobalMemory(arena.allocations)
        self.counters = Counters(len(self.program.insts), self.memory.allocations)

    def registers(self, threads: int) -> list[np.ndarray]:
        """Zeroed registers of a batch, in the memory of the one before: new pages are slow."""
        if not self._registers or len(self._registers[0]) < threads:
            self._registers = [np.zeros(threads, REG_DTYPE[w]) for w in self.program.widths]
        else:
            for values in self._registers:
                values.fill(0)
        return [values[:threads] for values in self._registers]

    def run(self, batch_threads: int) -> Report:
        start = time.perf_counter()
        ctas = self.grid[0] * self.grid[1] * self.grid[2]
        padded = -(-self.block_threads // 32) * 32
        bytes_per_thread = (
            sum(REG_DTYPE[w].itemsize for w in self.program.widths) + self.program.local_bytes
        )
        if self.order != "lockstep":  # then only one warp of a block is at work at a time
            batch_threads *= min(4, padded // 32)
        per_batch = max(1, min(batch_threads, BATCH_BYTES // bytes_per_thread) // padded)
        with np.errstate(all="ignore"):
            for first in range(0, ctas, per_batch):
                Batch(self, first, min(per_batch, ctas - first)).run()
        return make_report(self, ctas, time.perf_counter() - start)


def _dim3(value, what: str) -> tuple[int, int, int]:
    dims = (value,) if isinstance(value, (int, np.integer)) else tuple(value)
    dims = tuple(int(d) for d in dims) + (1,) * (3 - len(dims))
    if len(dims) != 3 or min(dims) < 1:
        raise LaunchError(f"bad {what} {value!r}")
    return dims


def _pack(arg, var: Var, name: str, arena: Arena) -> bytes:
    """An argument as the bytes of its parameter."""
    if arg is None:
        return bytes(var.size)
    if isinstance(arg, (bytes, bytearray, memoryview)):
        return bytes(arg)
    if isinstance(arg, Packed):
        data = bytearray(arg.data)
        for offset, inner, obj in arg.pointers:
            data[offset : offset + 8] = arena.add(obj, inner).to_bytes(8, "little")
        return bytes(data)
    if isinstance(arg, np.generic):
        return arg.tobytes()
    if isinstance(arg, float) or (isinstance(arg, int) and var.type in ("f32", "f64")):
        codes = {2: "<e", 4: "<f", 8: "<d"}
        if var.size not in codes:
            raise LaunchError(f"argument '{name}': a float cannot fill {var.size} bytes")
        return struct.pack(codes[var.size], arg)
    if isinstance(arg, int):
        if not -(1 << 8 * var.size - 1) <= arg < 1 << 8 * var.size:
            raise LaunchError(f"argument '{name}': {arg} does not fit {var.size} bytes")
        return (arg % (1 << 8 * var.size)).to_bytes(var.size, "little")
    return arena.add(arg, name).to_bytes(8, "little")
