"""Exceptions raised by ptxsim."""

from __future__ import annotations


class PtxSimError(Exception):
    """Base class of everything ptxsim raises on purpose."""


class ParseError(PtxSimError):
    """The PTX text could not be parsed."""


class UnsupportedInstruction(PtxSimError):
    """An instruction (or a modifier of it) that ptxsim does not implement."""


class LaunchError(PtxSimError):
    """Bad launch arguments (argument count, grid, shared memory size, ...)."""


class DeviceError(PtxSimError):
    """A fault of the simulated program.

    Attributes
    ----------
    kernel, inst : the kernel name and the parsed instruction at fault
    ctaid, tid   : block and thread index of the first faulting thread (or None)
    address      : faulting address for memory errors (or None)
    """

    def __init__(
        self,
        message: str,
        kernel: str | None = None,
        inst=None,
        ctaid: tuple[int, ...] | None = None,
        tid: tuple[int, ...] | None = None,
        address: int | None = None,
    ):
        self.message, self.kernel, self.inst = message, kernel, inst
        self.ctaid, self.tid, self.address = ctaid, tid, address
        super().__init__(message)

    def __str__(self) -> str:
        lines = [self.message]
        if self.kernel:
            lines.append(f"  kernel: {self.kernel}")
        if self.ctaid is not None:
            lines.append(f"  thread: ctaid={self.ctaid} tid={self.tid}")
        if self.inst is not None:
            lines.append(f"  ptx line {self.inst.line}: {self.inst.text}")
            if self.inst.loc:
                lines.append("  source: {}:{}".format(*self.inst.loc))
        return "\n".join(lines)


class OutOfBounds(DeviceError):
    """An access outside every registered allocation (or shared/local memory)."""


class Misaligned(DeviceError):
    """An access whose address is not a multiple of its size."""


class UninitializedRead(DeviceError):
    """A shared memory read of bytes no thread wrote (``check_uninit=True``)."""


class Race(DeviceError):
    """Two warps of a block access the same shared memory with no barrier between them, and one
    writes (``check_races=True``)."""


class Deadlock(DeviceError):
    """No thread can make progress."""


class Timeout(DeviceError):
    """The launch ran more scheduling steps than ``max_steps``."""


class Trap(DeviceError):
    """The program executed ``trap`` or a failed device assertion."""
