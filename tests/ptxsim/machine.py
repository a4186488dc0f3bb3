"""Execution: the lockstep scheduler, barriers and per-thread state.

All threads of a batch of CTAs advance together.  Every thread has its own
program counter; the scheduler repeatedly runs the group of threads with the
smallest one to the end of its basic block, so that diverged threads
reconverge at the earliest common point (in long runs the other groups also get a
turn now and then, so that spin locks make progress).  Threads that cannot run carry an
offset on their program counter: WAIT (for the rest of their warp), BARRIER
(at a CTA barrier) or EXITED, which keeps them out of the minimum.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .errors import Deadlock, DeviceError, LaunchError, Timeout, Trap
from .isa_warp import ballot, spread
from .memory import Fault, Races, Window
from .operands import ALL, U32, U64, Mask
from .parser import Inst
from .program import CONTROL, SYNC

if TYPE_CHECKING:
    from .kernel import Launch

WAIT, BARRIER, EXITED = 1 << 28, 1 << 29, 1 << 30
BARRIERS = 16
FAIR_AFTER, FAIR_EVERY = 5000, 8  # then every 8th step goes to the groups in turn (spin locks)


class Batch:
    """State of a set of CTAs executing in lockstep.

    CTAs are padded to whole warps with threads that never run.  The instruction
    steps use ``regs``, ``windows``, ``memory``, ``counters``, ``threads``,
    ``active`` (threads in the current group) and the methods of the first section.
    """

    def __init__(self, launch: Launch, first: int, ctas: int):
        program = launch.program
        self.launch, self.program, self.first, self.ctas = launch, program, first, ctas
        self.counters, self.memory = launch.counters, launch.memory
        self.error_seed = launch.error_seed
        self.count_memory = launch.count_memory
        self.params, self.param_address = launch.params, U64(launch.params.ctypes.data)
        size = launch.block_threads
        self.cta_threads = -(-size // 32) * 32
        self.threads = ctas * self.cta_threads
        index = np.arange(self.threads)
        self.apart = launch.order != "lockstep"
        if self.apart:  # threads of one warp of each CTA lie together: see _apart
            warp, within = np.divmod(index, 32 * ctas)
            self.cta, self.thread_in_cta = within // 32, 32 * warp + within % 32
        else:
            self.cta, self.thread_in_cta = np.divmod(index, self.cta_threads)
        self.lane, self.warp_start = (index % 32).astype(np.int32), index - index % 32
        self.regs = launch.registers(self.threads)
        self.row = {"shared": self.cta, "local": index}
        self.windows = {
            "shared": Window("shared", ctas, launch.shared_bytes, launch.check_uninit),
            "local": Window("local", self.threads, program.local_bytes),
        }
        self.races = None
        if launch.check_races and size > 32:
            self.races = Races(ctas, len(self.windows["shared"].data))
        self.live = self.thread_in_cta < size
        self.pc = np.where(self.live, program.entry[id(program.kernel)], EXITED).astype(np.int32)
        self.return_pc = np.zeros((len(program.functions), self.threads), np.int32)
        self.active = self.warps = 0
        self.steps, self.whole = 0, self
        self.waiting = False  # may a thread be parked at WAIT?
        self.barrier_id = np.zeros(self.threads, np.int8)
        self.barrier_vote = np.zeros(self.threads, bool)
        self.barrier_result: dict[int, tuple[str, Callable]] = {}  # by return pc, for bar.red
        self.arrived = np.zeros((ctas, BARRIERS), np.int64)  # threads counted by bar.arrive
        self.expected = np.zeros((ctas, BARRIERS), np.int64)  # explicit thread counts
        self._lanes: tuple[Mask, np.ndarray | None] = (None, None)
        self._special: dict[str, np.ndarray] = {}

    def _apart(self) -> list[Batch]:
        """The groups of threads that run one after the other up to each barrier.

        In lockstep there is one. Otherwise each holds one warp of every CTA, as views of this
        batch, so that the other warps cost nothing while it runs.
        """
        if not self.apart:
            return [self]
        size, parts = 32 * self.ctas, []
        for first in range(0, self.threads, size):
            own = slice(first, first + size)
            part = copy.copy(self)
            part.threads, part._lanes, part._special = size, (None, None), {}
            for name in ("cta", "thread_in_cta", "lane", "live", "pc", "barrier_id"):
                setattr(part, name, getattr(self, name)[own])
            part.barrier_vote, part.return_pc = self.barrier_vote[own], self.return_pc[:, own]
            part.warp_start = self.warp_start[:size]
            part.regs = [r[own] for r in self.regs]
            part.row = {"shared": part.cta, "local": np.arange(size)}
            local = copy.copy(self.windows["local"])
            local.data = local.data[first * local.stride : (first + size) * local.stride]
            part.windows = self.windows | {"local": local}
            parts.append(part)
        return parts[::-1] if self.launch.order == "reverse" else parts

    def lanes(self, m: Mask) -> np.ndarray | None:
        """Indices of the active threads, or None for all."""
        if m is None:
            return None
        if self._lanes[0] is not m:
            self._lanes = (m, np.flatnonzero(m))
        return self._lanes[1]

    def pick(
        self, getters: Sequence[Callable], lanes: np.ndarray | None, dtype: np.dtype
    ) -> np.ndarray:
        """Operands of the active lanes: shape (n,), or (n, count) for vectors."""
        out = np.empty((self.threads if lanes is None else len(lanes), len(getters)), dtype)
        for j, get in enumerate(getters):
            v = get(self)
            out[:, j] = v if lanes is None or v.ndim == 0 else v[lanes]
        return out[:, 0] if len(getters) == 1 else out

    def special(self, name: str) -> np.ndarray:
        """Value of a special register, e.g. ``tid.x``."""
        if name in ("clock", "clock64", "globaltimer", "globaltimer_lo"):
            return np.array(self.whole.steps, U64)
        if name not in self._special:
            self._special[name] = np.asarray(self._make_special(name)).astype(U32)
        return self._special[name]

    def _make_special(self, name: str):
        base, _, axis = name.partition(".")
        k = "xyz".find(axis) if axis else 0
        grid, block = self.launch.grid, self.launch.block
        lane, bit = self.lane.astype(np.int64), np.int64(1)
        if base in ("tid", "ctaid", "clusterid"):
            index, dims = (
                (self.thread_in_cta, block) if base == "tid" else (self.cta + self.first, grid)
            )
            return (index % dims[0], index // dims[0] % dims[1], index // (dims[0] * dims[1]))[k]
        constants = {
            "ntid": block[k],
            "nctaid": grid[k],
            "nclusterid": grid[k],
            "nwarpid": self.cta_threads // 32,
            "nsmid": 64,
            "gridid": 0,
            "clock_hi": 0,
            "globaltimer_hi": 0,
            "cluster_ctaid": 0,
            "cluster_ctarank": 0,
            "cluster_nctaid": 1,
            "cluster_nctarank": 1,
            "is_explicit_cluster": 0,
            "total_smem_size": self.launch.shared_bytes,
            "aggr_smem_size": self.launch.shared_bytes,
            "dynamic_smem_size": self.launch.shared_bytes - self.program.dynamic_start,
            "laneid": lane,
            "warpid": self.thread_in_cta // 32,
            "smid": (self.cta + self.first) % 64,
            "lanemask_eq": bit << lane,
            "lanemask_lt": (bit << lane) - 1,
            "lanemask_le": (bit << lane + 1) - 1,
            "lanemask_gt": ALL ^ ((bit << lane + 1) - 1),
            "lanemask_ge": ALL ^ ((bit << lane) - 1),
        }
        if base not in constants:
            raise LaunchError(f"special register %{name} is not supported")
        return constants[base]

    def error(
        self,
        kind: type[DeviceError],
        message: str,
        inst: Inst,
        thread: int,
        address: int | None = None,
    ) -> DeviceError:
        """An exception naming the kernel, instruction and thread."""
        ctaid, tid = (
            tuple(int(self._make_special(f"{r}.{a}")[thread]) for a in "xyz")
            for r in ("ctaid", "tid")
        )
        return kind(message, self.launch.kernel.demangled, inst, ctaid, tid, address)

    def jump(self, m: Mask, target) -> None:
        if m is None:
            self.pc[...] = target
        else:
            np.copyto(self.pc, target, where=m, casting="same_kind")

    def exit(self, m: Mask) -> None:
        self.jump(m, EXITED)
        self.live[... if m is None else m] = False
        # warps may be complete without the exited threads: let the others look again
        if self.waiting:
            self.pc[self._parked(WAIT, BARRIER)] -= WAIT
            self.waiting = False
        if self.whole._parked(BARRIER, EXITED).any():
            self.whole._release()

    def _parked(self, low: int, high: int) -> np.ndarray:
        return (self.pc >= low) & (self.pc < high)

    def barrier(self, m: Mask, after: int, arrive: bool, ident, count, vote, fold, put) -> None:
        """Arrive at CTA barrier ``ident``; ``fold`` reduces ``vote`` over the CTA into ``put``."""
        here = np.ones(self.threads, bool) if m is None else m
        ident, count = (
            np.broadcast_to(x, self.threads)[here].astype(np.int64) for x in (ident, count)
        )
        if (ident >= BARRIERS).any():
            raise self.error(
                Trap,
                "barrier number out of range",
                self.program.insts[after - 1],
                int(np.argmax(here)),
            )
        self.expected[self.cta[here], ident] = count
        if arrive:
            warps, first = np.unique(np.flatnonzero(here) // 32, return_index=True)
            np.add.at(self.arrived, (self.cta[warps * 32], ident[first]), 32)
            self.jump(m, after)
        else:
            self.jump(m, BARRIER + after)
            self.barrier_id[here] = ident
            if fold:
                self.barrier_vote[here] = np.broadcast_to(vote, self.threads)[here]
                self.barrier_result[after] = (fold, put)
        self.whole._release()

    def _release(self) -> None:
        """Let go the threads of every completed barrier."""
        parked = self._parked(BARRIER, EXITED)
        shape = (-1, self.ctas, 32) if self.apart else (self.ctas, -1, 32)
        of_cta = 0 if self.apart else 1
        for number in np.unique(self.barrier_id[parked]):
            at = parked & (self.barrier_id == number)
            # a warp has arrived when all its live threads have
            warps = (at | ~self.live).reshape(shape).all(axis=2) & at.reshape(shape).any(axis=2)
            threads = 32 * warps.sum(axis=of_cta) + self.arrived[:, number]
            alive = 32 * self.live.reshape(shape).any(axis=2).sum(axis=of_cta)
            needed = np.where(self.expected[:, number] > 0, self.expected[:, number], alive)
            done = (threads >= needed) & warps.any(axis=of_cta)
            free = at & done[self.cta]
            self.arrived[done, number] = 0
            if self.races is not None:
                self.races.epoch[done] += 1
            for after in np.unique(self.pc[free]) - BARRIER:
                if after in self.barrier_result:
                    self._reduce(free, *self.barrier_result[after])
            self.pc[free] -= BARRIER

    def _reduce(self, free: np.ndarray, fold: str, put: Callable) -> None:
        votes = np.bincount(self.cta[free & self.barrier_vote], minlength=self.ctas)
        total = np.bincount(self.cta[free], minlength=self.ctas)
        value = {"popc": votes.astype(U32), "and": votes == total, "or": votes > 0}[fold]
        put(self, free, value[self.cta])

    def _gather_warp(self, pc: int, m: np.ndarray) -> np.ndarray:
        """The threads that may execute the ``.sync`` instruction at ``pc``; others are parked."""
        together = m
        if self.waiting:
            together = m | (self.pc == pc + WAIT)
            if self.program.warp_barrier[pc]:  # bar.warp.sync may be met at another one of its kind
                there = np.flatnonzero(self._parked(WAIT, BARRIER))
                together[there[self.program.warp_barrier[self.pc[there] - WAIT]]] = True
        missing = spread(ballot(self.live & ~together))
        ready = together & (
            (missing & np.broadcast_to(self.program.members[pc](self), self.threads)) == 0
        )
        elsewhere = ready & (self.pc >= WAIT) & (self.pc != pc + WAIT)
        self.pc[elsewhere] += 1 - WAIT
        here = ready & ~elsewhere
        held = m & ~ready
        self.pc[here], self.pc[held] = pc, pc + WAIT
        self.waiting = self.waiting or bool(held.any())
        return here

    def run(self) -> None:
        """Run all threads to completion."""
        parts, turn = self._apart(), 0
        while True:
            ready = [part for part in parts if int(part.pc.min()) < WAIT]
            if not ready:
                break
            if self.steps > FAIR_AFTER:
                turn += 1
            ready[turn % len(ready)]._run()
        if int(self.pc.min()) < EXITED:
            raise self._deadlock()

    def _run(self) -> None:
        """Run until no thread can go on, or for a while in a long run with several parts."""
        enough = max(FAIR_AFTER, self.whole.steps) + FAIR_EVERY
        kinds, steps, ends = self.program.kinds, self.program.steps, self.program.block_end
        while (pc := self._choose()) is not None:
            m, start, end = self.mask, pc, int(ends[pc])
            try:
                while pc < end:
                    if m is not None and kinds[pc] == SYNC:
                        self._count(start, pc)
                        start, m = pc, self._enter(self._gather_warp(pc, m))
                        if not self.active:
                            break
                    steps[pc](self, m)
                    pc += 1
            except Fault as fault:
                raise self.error(
                    fault.kind, fault.message, self.program.insts[pc], fault.thread, fault.address
                ) from None
            self._count(start, pc)
            if self.active and kinds[pc - 1] != CONTROL:
                self.jump(m, pc)
            if self.apart and self.whole.steps > enough:
                break

    def _choose(self) -> int | None:
        """Pick the next group of threads; None when none can go on."""
        pc = int(self.pc.min())
        if pc >= WAIT:
            return None
        self.whole.steps += 1
        steps = self.whole.steps
        if steps > FAIR_AFTER and steps % FAIR_EVERY == 0:
            groups = np.unique(self.pc[self.pc < WAIT])
            pc = int(groups[steps // FAIR_EVERY % len(groups)])
        self.mask = self._enter(self.pc == pc)
        if steps > self.launch.max_steps:
            raise self.error(
                Timeout,
                f"more than {self.launch.max_steps} scheduling steps; livelock?",
                self.program.insts[pc],
                int(np.argmax(self.pc == pc)),
            )
        return pc

    def _enter(self, mask: np.ndarray) -> Mask:
        """Make ``mask`` the current group; returns None if it holds all threads."""
        self.active = int(np.count_nonzero(mask))
        if self.active == self.threads:
            self.warps = self.threads // 32
            return None
        self.warps = int(np.count_nonzero(ballot(mask)))
        return mask

    def _count(self, start: int, end: int) -> None:
        self.counters.issued[start:end] += self.warps
        self.counters.threads[start:end] += self.active

    def _deadlock(self) -> DeviceError:
        thread = int(np.argmax(self.pc < EXITED))
        pc, cta = int(self.pc[thread]), self.cta == self.cta[thread]
        if pc < BARRIER:
            message = (
                "threads wait at a warp-synchronous instruction for others of their warp "
                "that never come"
            )
            inst = self.program.insts[pc - WAIT]
        else:
            here = np.count_nonzero(cta & (self.pc == pc))
            message = (
                f"at barrier {self.barrier_id[thread]}, {here} threads wait here, "
                f"{np.count_nonzero(self.live & cta)} of the CTA have not exited"
            )
            inst = self.program.insts[pc - BARRIER - 1]
        return self.error(Deadlock, "deadlock: " + message, inst, thread)
