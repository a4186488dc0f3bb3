"""The PTX parser."""

import pytest

import ptxsim
from ptxsim.parser import Group, Imm, Mem, Not, Pair, Reg, Sink, Special, Sym, Vec, parse_text

from .harness import HEADER


def instruction(
    text, declarations=".reg .pred %p<4>; .reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .f32 x;"
):
    return parse_text(f"{HEADER}.entry k () {{ {declarations} {text} }}").functions["k"].insts[0]


def test_operands():
    i = instruction("@!%p1 ld.global.L1::evict_last.v4.b32 {%r1, _, %r3, %r4}, [ %rd2 + -16 ];")
    assert i.op == "ld" and i.mods == ("global", "L1::evict_last", "v4", "b32") and i.type == "b32"
    assert isinstance(i.guard, Not) and i.guard.reg.name == "%p1"
    assert isinstance(i.operands[0], Vec) and isinstance(i.operands[0].items[1], Sink)
    assert i.operands[1] == Mem(Reg("%rd2", 15, 64), -16)
    i = instruction("setp.lt.and.s32 %p1|%p2, %r1, -5, !%p3;")
    assert (
        isinstance(i.operands[0], Pair)
        and i.operands[2] == Imm("int", -5)
        and isinstance(i.operands[3], Not)
    )
    i = instruction("mov.u64 %rd1, table+8;")
    assert i.operands[1] == Sym("table", 8)
    assert instruction("mov.u32 %r1, %tid.x;").operands[1] == Special("tid.x")
    i = instruction("call.uni (a), f, (b, c);")
    assert i.operands == [Group((Sym("a"),)), Sym("f"), Group((Sym("b"), Sym("c")))]
    assert instruction("st.global.b32 [%rd1+0x10], x;").operands[0].offset == 16


@pytest.mark.parametrize(
    "text,width,bits",
    [
        ("0f3F800000", 32, 0x3F800000),
        ("0f3F800000", 64, 0x3FF0000000000000),
        ("0d3FF0000000000000", 64, 0x3FF0000000000000),
        ("0d3FF0000000000000", 32, 0x3F800000),
        ("1.5", 32, 0x3FC00000),
        ("-1.0", 64, 0xBFF0000000000000),
        ("0x7701U", 32, 0x7701),
        ("-1", 16, 0xFFFF),
        ("017", 32, 15),
        ("0b101", 32, 5),
        ("4294967295U", 32, 0xFFFFFFFF),
        ("~1", 32, 0xFFFFFFFE),
        ("-0f3F800000", 32, 0xBF800000),
    ],
)
def test_literals(text, width, bits):
    assert instruction(f"mov.b32 %r1, {text};").operands[1].bits(width) == bits


def test_module_declarations():
    m = ptxsim.parse(
        HEADER
        + """
        .file 1 "a \\"quoted\\" name.cu"  /* block
        comment */
        .visible .global .align 8 .b8 a[2][3] = {{1, 2, 3}, {4, 5, 6}};  // trailing
        .global .f32 b = 0f40000000, c;
        .const .v4 .f32 d;
        .global .u64 e[2] = {a+2, generic(b)};
        .extern .shared .align 16 .b8 dyn[];
        .weak .func (.param .b32 r) f (.param .align 4 .b8 s[12],
            .param .u64 .ptr .global .align 1 p) ;
        .section .debug_str { $x: .b8 65,0 }
        .visible .entry k(.param .u64 .ptr .shared .align 8 p0, .param .align 8 .b8 s[24])
        .maxntid 128, 2, 1 .minnctapersm 2 { .pragma "nounroll"; ret; }"""
    )
    assert (
        m.globals["a"].tolist() == [1, 2, 3, 4, 5, 6]
        and m.globals["b"].view("f4")[0] == 2
        and m.globals["c"].size == 4
    )
    assert (
        m.tree.variables["d"].size == 16 == m.tree.variables["d"].align
        and m.tree.variables["dyn"].size == 0
    )
    assert m.globals["e"].view("u8").view("<u8").tolist() == [m.address("a") + 2, m.address("b")]
    f = m.tree.functions["f"]
    assert [p.size for p in f.params] == [12, 8] and f.returns[0].size == 4 and not f.defined
    k = m.kernels["k"]
    assert [(p.size, p.align) for p in k.params] == [(8, 8), (24, 8)] and k.function.directives[
        "maxntid"
    ] == [128, 2, 1]
    assert m.tree.target == "sm_90a" and m.tree.version == "8.8"


def test_scopes_shadow_registers_and_labels():
    fn = parse_text(
        HEADER
        + """.entry k () { .reg .b32 a, b; L: mov.b32 a, b;
        { .reg .b64 a; L: mov.b64 a, 1; bra L; } bra L; }"""
    ).functions["k"]
    assert [i.operands[0].width for i in fn.insts[:2]] == [32, 64] and fn.insts[0].operands[
        0
    ].index != fn.insts[1].operands[0].index
    assert fn.insts[2].targets == [1] and fn.insts[3].targets == [0]


def test_source_locations_and_lines():
    fn = parse_text(
        HEADER
        + """.entry k () {
        .reg .b32 r;
        .loc 1 7 3, function_name $L, inlined_at 1 9 2
        mov.b32 r,
            5;   // split over two lines
        .loc 1 0 0
        ret;
        } .file 1 "late.py", 123, 456
        """
    ).functions["k"]
    assert (
        fn.insts[0].loc == ("late.py", 7)
        and fn.insts[0].line == 7
        and fn.insts[0].text == "mov.b32 r, 5;"
    )
    assert fn.insts[1].loc is None and fn.insts[1].line == 10


@pytest.mark.parametrize(
    "body,message",
    [
        ("mov.b32 %r1, %nope;", "line 4: undeclared register '%nope'"),
        ("bra NOWHERE;", "unknown label 'NOWHERE'"),
        ("mov.b32 %r1 5;", "expected ';'"),
        ("", "unexpected end of file"),
        (".reg .v4 .f32 q;", "register type"),
        ("mov.b32 %r1, ];", "unexpected ']'"),
    ],
)
def test_errors_name_the_line(body, message):
    end = "ret; }" if body else ""
    with pytest.raises(ptxsim.ParseError, match=message):
        ptxsim.parse(f"{HEADER}.entry k () {{ .reg .b32 %r<4>; {body} {end}")


def test_unknown_module_text():
    with pytest.raises(ptxsim.ParseError, match="unexpected 'hello' at module level"):
        ptxsim.parse(HEADER + "hello")
