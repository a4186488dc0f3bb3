"""Parse PTX text into a small syntax tree.

A :class:`Function` holds its declarations and a flat list of :class:`Inst`.
Registers and local variables are resolved by lexical scope; branch targets
become instruction indices; global symbols and callees stay names.
"""

from __future__ import annotations

import re
import struct
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import NamedTuple

from .errors import ParseError


class Reg(NamedTuple):
    """A virtual register; ``index`` is unique within its function."""

    name: str
    index: int
    width: int  # bits; 1 for predicates


class Imm(NamedTuple):
    """A literal: an int, or the bits of an f32 or f64."""

    kind: str  # 'int', 'f32' or 'f64'
    value: int

    def bits(self, width: int) -> int:
        """The literal as a bit pattern of a ``width``-bit operand."""
        if self.kind == "f64" and width == 32:
            return _recode(self.value, "<Q", "<d", "<f", "<I")
        if self.kind == "f32" and width == 64:
            return _recode(self.value, "<I", "<f", "<d", "<Q")
        return self.value & ((1 << width) - 1)


class Sym(NamedTuple):
    """A name (variable, function or label) plus a constant offset."""

    name: str
    offset: int = 0


class Special(NamedTuple):
    """A special register such as ``%tid.x`` (without the ``%``)."""

    name: str


class Mem(NamedTuple):
    """``[base + offset]``."""

    base: Reg | Sym | Imm | Var
    offset: int


class Vec(NamedTuple):
    """``{a, b, ...}``."""

    items: tuple


class Not(NamedTuple):
    """``!p``."""

    reg: Reg


class Pair(NamedTuple):
    """``p|q``."""

    first: object
    second: object


class Group(NamedTuple):
    """``(a, b)`` in a call."""

    items: tuple


class Sink(NamedTuple):
    """``_``."""


@dataclass(eq=False)
class Var:
    """A variable or parameter in some state space; sizes in bytes."""

    name: str
    space: str
    type: str
    align: int
    size: int
    init: list | None = None


@dataclass(slots=True)
class Inst:
    """One instruction."""

    op: str
    mods: tuple[str, ...]
    operands: list
    guard: Reg | Not | None = None
    line: int = 0
    text: str = ""
    loc: tuple[str, int] | None = None  # source file and line, from .loc
    scopes: tuple[int, ...] = ()
    targets: list[int] = field(default_factory=list)  # instruction indices a branch may go to

    @property
    def type(self) -> str:
        """The last modifier, which is the type of most instructions."""
        return self.mods[-1] if self.mods else ""


@dataclass(eq=False)
class Function:
    """A kernel (``is_entry``) or device function."""

    name: str
    is_entry: bool
    params: list[Var]
    returns: list[Var]
    directives: dict[str, list[int]] = field(default_factory=dict)
    variables: list[Var] = field(default_factory=list)
    regs: list[Reg] = field(default_factory=list)
    insts: list[Inst] = field(default_factory=list)
    defined: bool = False


@dataclass(eq=False)
class Tree:
    """A parsed module."""

    version: str = ""
    target: str = ""
    variables: dict[str, Var] = field(default_factory=dict)
    functions: dict[str, Function] = field(default_factory=dict)


_TOKEN = re.compile(
    r"""(?:\s+|//[^\n]*|/\*.*?\*/)*(?:
    ("(?:[^"\\]|\\.)*")
  | (0[fF][0-9a-fA-F]{8} | 0[dD][0-9a-fA-F]{16} | 0[xX][0-9a-fA-F]+U? | 0[bB][01]+U?
     | \d+\.\d*(?:[eE][+-]?\d+)? | \d+U?)
  | (\.\w+ | [%$_A-Za-z](?:[\w$.]|::)*)
  | (\S) | \Z)""",
    re.X | re.S,
)
_STRING, _NUMBER, _WORD, _PUNCT = range(1, 5)
_DEBUG_SECTION = re.compile(r"^\s*\.section\s+\S+\s*\{[^}]*\}", re.M)

_TYPE_WIDTH = {
    "pred": 1,
    "f16": 16,
    "bf16": 16,
    "f32": 32,
    "f64": 64,
    "f16x2": 32,
    "bf16x2": 32,
    "f32x2": 64,
    "b128": 128,
    **{f"{k}{w}": w for k in "bus" for w in (8, 16, 32, 64)},
}
_SPECIAL = set(
    """tid ntid laneid warpid nwarpid ctaid nctaid smid nsmid gridid clusterid nclusterid
    cluster_ctaid cluster_nctaid cluster_ctarank cluster_nctarank is_explicit_cluster
    lanemask_eq lanemask_le lanemask_lt lanemask_ge lanemask_gt
    clock clock_hi clock64 globaltimer globaltimer_lo globaltimer_hi
    total_smem_size dynamic_smem_size aggr_smem_size""".split()
)
_SPACES = {".global", ".shared", ".local", ".const", ".param"}
_LINKAGE = {".extern", ".visible", ".weak", ".common"}


def type_width(name: str) -> int:
    """Width in bits of a PTX type name such as ``'f32'``."""
    return _TYPE_WIDTH[name]


def _recode(value: int, bits_in: str, float_in: str, float_out: str, bits_out: str) -> int:
    number = struct.unpack(float_in, struct.pack(bits_in, value))[0]
    return struct.unpack(bits_out, struct.pack(float_out, number))[0]


def _integer(text: str) -> int:
    text = text.rstrip("uU")
    octal = len(text) > 1 and text[0] == "0" and text[1].isdigit()
    return int(text, 8 if octal else 0)


def _number(text: str) -> Imm:
    if text[:2] in ("0f", "0F"):
        return Imm("f32", int(text[2:], 16))
    if text[:2] in ("0d", "0D"):
        return Imm("f64", int(text[2:], 16))
    if "." in text:
        return Imm("f64", struct.unpack("<Q", struct.pack("<d", float(text)))[0])
    return Imm("int", _integer(text))


def _negative(imm: Imm) -> Imm:
    sign = {"f32": 1 << 31, "f64": 1 << 63}.get(imm.kind)
    return Imm(imm.kind, imm.value ^ sign) if sign else Imm("int", -imm.value)


class _Tokens:
    """A cursor over the tokens of a text."""

    def __init__(self, text: str):
        # debug sections hold no code; keep their line breaks
        self.source = _DEBUG_SECTION.sub(lambda m: "\n" * m.group().count("\n"), text)
        self.newlines = [m.start() for m in re.finditer("\n", self.source)]
        self.items = [
            (m.lastindex, m.group(m.lastindex), m.start(m.lastindex))
            for m in _TOKEN.finditer(self.source)
            if m.lastindex
        ]
        self.items.append((0, "", len(self.source)))
        self.i = 0

    @property
    def text(self) -> str:
        return self.items[self.i][1]

    @property
    def kind(self) -> int:
        return self.items[self.i][0]

    @property
    def start(self) -> int:
        return self.items[self.i][2]

    def line(self, position: int) -> int:
        return bisect_right(self.newlines, position - 1) + 1

    def next(self) -> str:
        self.i += 1
        return self.items[self.i - 1][1]

    def accept(self, text: str) -> bool:
        if self.items[self.i][1] == text:
            self.i += 1
            return True
        return False

    def expect(self, text: str) -> None:
        if not self.accept(text):
            raise self.error(f"expected '{text}', found '{self.text}'")

    def until(self, text: str) -> list[str]:
        """The tokens before ``text``, which is consumed too."""
        out = []
        while not self.accept(text):
            if not self.kind:
                raise self.error(f"expected '{text}' before the end of the file")
            out.append(self.next())
        return out

    def rest_of_line(self) -> list[str]:
        """The tokens up to the end of the line that the previous token is on."""
        k = bisect_right(self.newlines, self.items[self.i - 1][2])
        end = self.newlines[k] if k < len(self.newlines) else len(self.source)
        out = []
        while self.start < end and self.kind:
            out.append(self.next())
        return out

    def error(self, message: str) -> ParseError:
        line = self.line(self.start)
        text = self.source.split("\n")[line - 1].strip()
        return ParseError(f"PTX line {line}: {message}\n    {text}")


class _Parser:
    """Recursive descent over the tokens; ``scopes`` are the open braces of the current function."""

    def __init__(self, text: str):
        self.t = _Tokens(text)
        self.tree = Tree()
        self.files: dict[str, str] = {}
        self.loc: tuple[str, int] | None = None
        self.scopes: list[tuple[int, dict[str, Reg | Var]]] = []

    def module(self) -> Tree:
        t = self.t
        while t.kind:
            word = t.text
            if word in (".version", ".target", ".address_size"):
                t.next()
                value = "".join(t.rest_of_line()).split(",")[0]
                if word != ".address_size":
                    setattr(self.tree, word[1:], value)
            elif not self.ignorable():
                self.declaration()
        for (
            fn
        ) in self.tree.functions.values():  # ".file" usually follows the code that refers to it
            for inst in fn.insts:
                if inst.loc:
                    inst.loc = (self.files.get(inst.loc[0], f"file {inst.loc[0]}"), inst.loc[1])
        return self.tree

    def ignorable(self) -> bool:
        """Consume a directive that generates no code; False if there is none."""
        t = self.t
        if t.text == ".loc":
            t.next()
            file, line, *_ = t.rest_of_line()
            self.loc = (file, int(line)) if int(line) else None
        elif t.text == ".file":
            t.next()
            number, path, *_ = t.rest_of_line()
            self.files[number] = path.strip('"')
        elif t.text in (".pragma", ".alias"):
            t.until(";")
        else:
            return False
        return True

    def declaration(self) -> None:
        t = self.t
        while t.text in _LINKAGE:
            t.next()
        if t.text in (".entry", ".func"):
            self.function(t.next() == ".entry")
        elif t.text in _SPACES:
            for var in self.variables(t.next()[1:]):
                self.tree.variables[var.name] = var
        else:
            raise t.error(f"unexpected '{t.text}' at module level")

    def variables(self, space: str) -> list[Var]:
        """``.align 4 .b8 a[12] = {...}, b;`` after the state space."""
        out = [self.variable(space)]
        while self.t.accept(","):
            out.append(self.variable(space, like=out[0]))
        self.t.expect(";")
        return out

    def variable(self, space: str, like: Var | None = None) -> Var:
        t = self.t
        align, lanes, typ = (like.align, 1, like.type) if like else (0, 1, "")
        while t.text.startswith("."):
            word = t.next()
            if word == ".align":
                align = _integer(t.next())
            elif word in (".v2", ".v4", ".v8"):
                lanes = int(word[2:])
            elif word[1:] in _TYPE_WIDTH:
                typ = word[1:]
            elif word == ".ptr":  # attributes of what a pointer parameter points to
                while t.text in _SPACES or t.text == ".align":
                    if t.next() == ".align":
                        t.next()
            elif word == ".attribute":
                t.until(")")
        if not typ:
            raise t.error("a variable without a type")
        name, element, count = t.next(), max(1, _TYPE_WIDTH[typ] // 8) * lanes, 1
        while t.accept("["):
            count *= 0 if t.text == "]" else _integer(t.next())
            t.expect("]")
        init = self.initializer() if t.accept("=") else None
        return Var(name, space, typ, align or element, element * (count or len(init or ())), init)

    def initializer(self) -> list:
        """A flat list of Imm and Sym."""
        t = self.t
        if t.accept("{"):
            out = []
            while not t.accept("}"):
                out += self.initializer()
                t.accept(",")
            return out
        if t.accept("generic"):
            t.expect("(")
            item = self.operand()
            t.expect(")")
            return [item]
        return [self.operand()]

    def parameters(self) -> list[Var]:
        t, out = self.t, []
        if t.accept("("):
            while not t.accept(")"):
                t.accept(",")
                t.expect(".param")
                out.append(self.variable("param"))
        return out

    def function(self, is_entry: bool) -> None:
        t = self.t
        returns = self.parameters()
        name = t.next()
        fn = Function(name, is_entry, self.parameters(), returns)
        while t.text not in ("{", ";"):
            word, args = t.next(), []
            while t.kind == _NUMBER or t.text == ",":
                if (arg := t.next()) != ",":
                    args.append(_integer(arg))
            fn.directives[word[1:]] = args
        if not t.accept(";"):
            t.expect("{")
            fn.defined = True
            self.body(fn)
        if fn.defined or name not in self.tree.functions:
            self.tree.functions[name] = fn

    def body(self, fn: Function) -> None:
        self.fn, self.loc = fn, None
        self.labels: dict[tuple[int, str], int] = {}
        self.tables: dict[str, list[str]] = {}
        self.scope_count = 0
        self.push()
        self.scopes[0][1].update({v.name: v for v in fn.params + fn.returns})
        while self.scopes:
            self.statement()
        for inst in fn.insts:
            if inst.op == "bra":
                inst.targets = [self.target(inst, inst.operands[0].name)]
            elif inst.op == "brx":
                inst.targets = [
                    self.target(inst, name) for name in self.tables[inst.operands[1].name]
                ]

    def push(self) -> None:
        self.scopes.append((self.scope_count, {}))
        self.scope_count += 1

    def target(self, inst: Inst, label: str) -> int:
        for scope in reversed(inst.scopes):
            if (scope, label) in self.labels:
                return self.labels[scope, label]
        raise ParseError(f"PTX line {inst.line}: unknown label '{label}'\n    {inst.text}")

    def statement(self) -> None:
        t = self.t
        if not t.kind:
            raise t.error("unexpected end of file in a function body")
        if t.accept("{"):
            self.push()
        elif t.accept("}"):
            self.scopes.pop()
        elif t.accept(";") or self.ignorable():
            pass
        elif t.accept(".reg"):
            self.registers()
        elif t.text in _SPACES or t.text in _LINKAGE:
            while t.text in _LINKAGE:
                t.next()
            for var in self.variables(t.next()[1:]):
                self.scopes[-1][1][var.name] = var
                self.fn.variables.append(var)
        elif t.kind == _WORD and t.items[t.i + 1][1] == ":":
            self.label()
        else:
            self.instruction()

    def label(self) -> None:
        t = self.t
        name = t.next()
        t.expect(":")
        if t.accept(".branchtargets"):
            self.tables[name] = [word for word in t.until(";") if word != ","]
        elif t.accept(".callprototype") or t.accept(".calltargets"):
            t.until(";")
        else:
            self.labels[self.scopes[-1][0], name] = len(self.fn.insts)

    def registers(self) -> None:
        """``.reg .b32 %r<10>, x;`` after ``.reg``."""
        t = self.t
        width = _TYPE_WIDTH.get(t.text[1:])
        if width is None:
            raise t.error(f"register type '{t.text}' is not supported")
        t.next()
        while True:
            names = [t.next()]
            if t.accept("<"):
                names = [f"{names[0]}{k}" for k in range(_integer(t.next()))]
                t.expect(">")
            for name in names:
                reg = Reg(name, len(self.fn.regs), width)
                self.fn.regs.append(reg)
                self.scopes[-1][1][name] = reg
            if not t.accept(","):
                break
        t.expect(";")

    def instruction(self) -> None:
        t = self.t
        start = t.start
        guard = self.primary() if t.accept("@") else None
        if t.kind != _WORD or not t.text[0].isalpha():
            raise t.error(f"unexpected '{t.text}'")
        op, *mods = t.next().split(".")
        operands = []
        while t.text != ";":
            operands.append(self.operand())
            if not t.accept(","):
                break
        text = " ".join(t.source[start : t.start + 1].split())
        t.expect(";")
        self.fn.insts.append(
            Inst(
                op,
                tuple(mods),
                operands,
                guard,
                t.line(start),
                text,
                self.loc,
                tuple(scope for scope, _ in self.scopes),
            )
        )

    def operand(self):
        item = self.primary()
        if self.t.accept("|"):
            return Pair(item, self.primary())
        if isinstance(item, Sym):
            return Sym(item.name, item.offset + self.offset())
        return item

    def offset(self) -> int:
        """``+ 4``, ``- 4``, ``+-4`` or nothing."""
        t, total = self.t, 0
        while t.text in ("+", "-"):
            sign = 1
            while t.text in ("+", "-"):
                sign = -sign if t.next() == "-" else sign
            total += sign * _integer(t.next())
        return total

    def primary(self):
        t = self.t
        kind, text = t.kind, t.next()
        if text == "[":
            mem = Mem(self.primary(), self.offset())
            t.expect("]")
            t.accept(".unified")
            return mem
        if text in ("{", "("):
            items = []
            while not t.accept("}" if text == "{" else ")"):
                items.append(self.operand())
                t.accept(",")
            return (Vec if text == "{" else Group)(tuple(items))
        if text == "!":
            return Not(self.primary())
        if text == "-":
            return _negative(_number(t.next()))
        if text == "~":
            return Imm("int", ~_integer(t.next()))
        if kind == _NUMBER:
            return _number(text)
        if text == "_":
            return Sink()
        for _, names in reversed(self.scopes):
            if text in names:
                return names[text]
        if kind == _WORD and not text.startswith("%"):
            return Sym(text)
        if text[1:].split(".")[0] in _SPECIAL:
            return Special(text[1:])
        t.i -= 1
        raise t.error(
            f"undeclared register '{text}'"
            if kind == _WORD
            else f"unexpected '{text}' in an operand"
        )


def parse_text(text: str) -> Tree:
    """Parse PTX source text."""
    return _Parser(text).module()
