"""Linking and compilation: a kernel and its callees become one list of closures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from . import isa_memory, isa_warp  # noqa: F401  (they register their builders)
from .errors import Trap, UnsupportedInstruction
from .operands import U64, Mask, Step, build, dest, source, unsupported
from .parser import Function, Group, Imm, Inst, Mem, Not, Pair, Reg, Sym, Var, Vec

if TYPE_CHECKING:
    from .kernel import Module
    from .machine import Batch

PLAIN, SYNC, CONTROL = range(3)
_READS_FIRST_OPERAND = {"st", "red", "brx", "bar", "barrier", "cp", "stmatrix", "call"}


def callee_name(inst: Inst) -> str:
    """Name of the function that a call calls."""
    for operand in inst.operands:
        if isinstance(operand, Sym):
            return operand.name
    raise unsupported(inst, "indirect call")


def _leaves(operand) -> Iterator:
    """Registers, symbols, ... inside a nested operand."""
    if isinstance(operand, (list, Mem, Vec, Not, Pair, Group)):
        for item in operand:
            yield from _leaves(item)
    else:
        yield operand


def _place(variables: Iterable[Var], offset: int = 0) -> tuple[dict[int, int], int]:
    """Offsets of variables laid out one after the other (keyed by id), and the end."""
    where = {}
    for var in variables:
        offset = -(-offset // var.align) * var.align
        where[id(var)] = offset
        offset += var.size
    return where, offset


class Program:
    """A kernel linked with its callees.

    ``steps[pc]`` executes ``insts[pc]``; ``kinds[pc]`` says whether it is PLAIN,
    SYNC (waits for its warp) or CONTROL (moves program counters itself);
    ``block_end[pc]`` is one past the end of its basic block.  During compilation
    the object is the environment ``env`` of the instruction builders.
    """

    def __init__(self, module: Module, kernel: Function):
        self.module, self.kernel = module, kernel
        self.functions = self._callees_first()
        self.reg_base: dict[int, int] = {}
        self.widths: list[int] = []
        for fn in self.functions:
            self.reg_base[id(fn)] = len(self.widths)
            self.widths += [r.width for r in fn.regs]
        self.carry = Reg("%CC.CF", len(self.widths), 1)
        self.widths.append(1)
        self._lay_out()
        self._find_reads()
        self.insts: list[Inst] = []
        self.kinds: list[int] = []
        self.steps: list[Step] = []
        self.members: dict[int, Callable] = {}  # pc of a SYNC instruction -> its member mask
        self.entry: dict[int, int] = {}
        self.leaders: set[int] = set()
        for slot, fn in enumerate(self.functions):
            self._emit(fn, slot)
        ends = np.array(sorted(self.leaders | {len(self.insts)}))
        self.block_end = ends[np.searchsorted(ends, np.arange(len(self.insts)), "right")]
        self.warp_barrier = np.array([isa_warp.is_warp_barrier(inst) for inst in self.insts])

    def _callees_first(self) -> list[Function]:
        """Callees get the smaller program counters: calls finish before their caller goes on."""
        order: list[Function] = []

        def visit(fn: Function, callers: tuple[str, ...]) -> None:
            if fn.name in callers:
                raise UnsupportedInstruction(f"recursive function '{fn.name}'")
            for inst in fn.insts:
                if inst.op == "call" and (callee := self._callee(inst)) and callee not in order:
                    visit(callee, (*callers, fn.name))
            order.append(fn)

        visit(self.kernel, ())
        return order

    def _callee(self, inst: Inst) -> Function | None:
        """The called function; None if it has no body (vprintf, __assertfail, ...)."""
        fn = self.module.tree.functions.get(callee_name(inst))
        return fn if fn and fn.defined else None

    def _lay_out(self) -> None:
        """Offsets of kernel parameters, and of variables in local and shared memory."""
        self.params, self.param_bytes = _place(self.kernel.params)
        stack = [v for fn in self.functions for v in fn.variables if v.space in ("local", "param")]
        stack += [
            v for fn in self.functions if fn is not self.kernel for v in fn.params + fn.returns
        ]
        self.locals, self.local_bytes = _place(stack)
        used = {
            x.name
            for fn in self.functions
            for i in fn.insts
            for x in _leaves(i.operands)
            if isinstance(x, Sym)
        }
        shared = [v for v in self.module.tree.variables.values() if v.name in used]
        shared = [
            v
            for v in shared + [v for fn in self.functions for v in fn.variables]
            if v.space == "shared"
        ]
        self.shared, self.static_shared = _place(v for v in shared if v.size)
        align = max([16, *(v.align for v in shared)])
        self.dynamic_start = (
            -(-self.static_shared // align) * align
            if any(not v.size for v in shared)
            else self.static_shared
        )
        self.shared |= {id(v): self.dynamic_start for v in shared if not v.size}

    def _find_reads(self) -> None:
        """Registers that some instruction reads (an atomic's old value may be unused)."""
        self.read: set[int] = set()
        for fn in self.functions:
            base = self.reg_base[id(fn)]
            for inst in fn.insts:
                first = inst.op in _READS_FIRST_OPERAND or (
                    inst.operands and isinstance(inst.operands[0], Mem)
                )
                operands = [inst.guard, *inst.operands[0 if first else 1 :]]
                self.read |= {base + x.index for x in _leaves(operands) if isinstance(x, Reg)}

    def reg(self, reg: Reg) -> int:
        """Index of a register in ``batch.regs``."""
        return reg.index if reg is self.carry else self.reg_base[id(self.function)] + reg.index

    @property
    def index(self) -> int:
        """Program counter of the instruction being compiled."""
        return len(self.insts)

    def is_read(self, regs: Sequence) -> bool:
        return any(isinstance(r, Reg) and self.reg(r) in self.read for r in regs)

    def param_offset(self, var) -> int | None:
        """Offset of a kernel parameter; None for anything else."""
        return self.params.get(id(var)) if isinstance(var, Var) else None

    def is_local(self, base) -> bool:
        """Is a ``.param`` address in per-thread memory (function parameters)?"""
        return id(base) in self.locals or (
            isinstance(base, Reg) and self.function is not self.kernel
        )

    def late_address(self, operand) -> Callable | None:
        """Getter of addresses known only at launch: those of kernel parameters."""
        offset = self.param_offset(operand)
        return None if offset is None else lambda b: np.asarray(b.param_address + U64(offset))

    def address(self, operand: Sym | Var) -> int:
        """Address of a variable within its state space."""
        var = operand if isinstance(operand, Var) else self.module.tree.variables.get(operand.name)
        if var is None:
            raise unsupported(self.inst, f"unknown symbol '{operand.name}'")
        offset = operand.offset if isinstance(operand, Sym) else 0
        for table in (self.locals, self.shared):
            if id(var) in table:
                return table[id(var)] + offset
        return self.module.address(var.name) + offset

    def _emit(self, fn: Function, slot: int) -> None:
        self.function, self.slot = fn, slot
        pc, where = self.index, []
        for inst in fn.insts:
            where.append(pc)
            pc += 2 if inst.op == "call" else 1  # the jump, and the copy of its results
        where.append(pc)
        self.entry[id(fn)] = where[0]
        self.leaders.add(where[0])
        for inst in fn.insts:
            self.inst, self.targets = inst, [where[t] for t in inst.targets]
            self.leaders.update(self.targets)
            for kind, step in self._compile(inst):
                if inst.guard is not None:
                    kind, step = self._guarded(kind, step, inst.guard)
                self._append(inst, kind, step)
        last = fn.insts[-1].line if fn.insts else 0
        self._append(Inst("ret", (), [], None, last, "(end of function)"), CONTROL, self._return())

    def _append(self, inst: Inst, kind: int, step: Step) -> None:
        self.insts.append(inst)
        self.kinds.append(kind)
        self.steps.append(step)
        if kind == CONTROL:
            self.leaders.add(len(self.insts))

    def _compile(self, inst: Inst) -> list[tuple[int, Step]]:
        op = inst.op
        if op == "bra":
            target = self.targets[0]
            return [(CONTROL, lambda b, m: b.jump(m, target))]
        if op == "brx":
            get, table = source(self, inst.operands[0], "u32"), np.array(self.targets)
            return [(CONTROL, lambda b, m: b.jump(m, table[np.minimum(get(b), len(table) - 1)]))]
        if op == "call":
            return self._call(inst)
        if op == "ret":
            return [(CONTROL, self._return())]
        if op == "exit":
            return [(CONTROL, lambda b, m: b.exit(m))]
        if op == "trap":
            return [(CONTROL, self._trap(inst, "trap"))]
        if op in ("bar", "barrier") and not isa_warp.is_warp_barrier(inst):
            return [(CONTROL, self._barrier(inst))]
        step = build(self, inst)
        if not isa_warp.is_warp_sync(inst):
            return [(PLAIN, step)]
        self.members[self.index] = source(self, isa_warp.member_operand(inst), "u32")
        return [(SYNC, step)]

    def _guarded(self, kind: int, step: Step, guard: Reg | Not) -> tuple[int, Step]:
        """Apply ``@p`` or ``@!p``; a control step also sends the other threads on."""
        negate, index = isinstance(guard, Not), self.index
        k = self.reg(guard.reg if negate else guard)

        def run(b: Batch, m: Mask) -> None:
            taken = ~b.regs[k] if negate else b.regs[k].copy()
            if m is not None:
                taken &= m
            n = int(np.count_nonzero(taken))
            if kind != CONTROL:
                b.counters.threads[index] -= b.active - n
            elif n < b.active:
                b.jump(~taken if m is None else m & ~taken, index + 1)
            if n == b.threads:
                step(b, None)
            elif n:
                step(b, taken)

        return (PLAIN if kind == SYNC else kind), run

    def _return(self) -> Step:
        if self.function is self.kernel:
            return lambda b, m: b.exit(m)
        slot = self.slot
        return lambda b, m: b.jump(m, b.return_pc[slot])

    def _trap(self, inst: Inst, what: str) -> Step:
        def step(b: Batch, m: Mask) -> None:
            raise b.error(Trap, what, inst, 0 if m is None else int(np.argmax(m)))

        return step

    def _call(self, inst: Inst) -> list[tuple[int, Step]]:
        name, fn = callee_name(inst), self._callee(inst)
        if name == "vprintf":
            return [(PLAIN, lambda b, m: None)] * 2  # output is dropped
        if fn is None:
            return [
                (CONTROL, self._trap(inst, f"call to '{name}', which has no PTX body")),
                (PLAIN, lambda b, m: None),
            ]
        at = next(i for i, o in enumerate(inst.operands) if isinstance(o, Sym))
        returned = inst.operands[0].items if at else ()
        passed = inst.operands[at + 1].items if len(inst.operands) > at + 1 else ()
        slot, target, after = self.functions.index(fn), self.entry[id(fn)], self.index + 1
        pass_arguments = self._copier(zip(passed, fn.params, strict=True))

        def call(b: Batch, m: Mask) -> None:
            pass_arguments(b, m)
            b.return_pc[slot][slice(None) if m is None else m] = after
            b.jump(m, target)

        return [(CONTROL, call), (PLAIN, self._copier(zip(fn.returns, returned, strict=True)))]

    def _copier(self, pairs: Iterable[tuple[Var, Var]]) -> Step:
        """Copy variables in local memory: call arguments and results."""
        moves = [(self.locals[id(src)], self.locals[id(dst)], dst.size) for src, dst in pairs]

        def copy(b: Batch, m: Mask) -> None:
            data = b.windows["local"].data.reshape(b.threads, -1)
            who = slice(None) if m is None else m
            for src, dst, size in moves:
                data[who, dst : dst + size] = data[who, src : src + size]

        return copy

    def _barrier(self, inst: Inst) -> Step:
        action = next((m for m in inst.mods if m in ("sync", "arrive", "red")), None)
        if action is None or "cluster" in inst.mods:
            raise unsupported(inst)
        operands, after = list(inst.operands), self.index + 1
        fold = put = value = None
        if action == "red":
            fold = next(m for m in inst.mods if m in ("popc", "and", "or"))
            put = dest(self, operands.pop(0), "u32" if fold == "popc" else "pred")
            value = source(self, operands.pop(), "pred")
        ident = source(self, operands[0], "u32")
        count = source(self, operands[1] if len(operands) > 1 else Imm("int", 0), "u32")
        return lambda b, m: b.barrier(
            m, after, action == "arrive", ident(b), count(b), value and value(b), fold, put
        )
