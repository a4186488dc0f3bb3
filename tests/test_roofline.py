"""bench.roofline: how SASS is counted, what is judged, and one small run from end to end."""

import json
import re

import pytest
import torch
from support import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: nothing is compiled")
triton = pytest.importorskip("triton", reason="Triton is not installed")
for _module in ("rich", "matplotlib", "numpy"):
    pytest.importorskip(_module, reason=f"bench.roofline needs {_module} (extra: bench)")
pytest.importorskip("bench", reason="bench is found from the repository root: python -m pytest")

import triton.language as tl  # noqa: E402

from bench import roofline  # noqa: E402

if (_missing := roofline.missing()) is not None and not INTERPRETED:
    pytest.skip(_missing, allow_module_level=True)

from bench import sass  # noqa: E402
from bench.cases import Case  # noqa: E402
from bench.roofline_head import HeadCase  # noqa: E402

needs_nvcc = pytest.mark.skipif(
    roofline.cuda_missing() is not None, reason=str(roofline.cuda_missing())
)


@triton.jit
def straight(x, y, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y + i, tl.load(x + i) * 2)


@triton.jit
def looped(x, y, steps, SIZE: tl.constexpr):
    """The sum crosses warps: a loop with barriers is not unrolled by ptxas."""
    total = 0.0
    for step in range(steps):
        total += tl.sum(tl.load(x + step * SIZE + tl.arange(0, SIZE)))
    tl.store(y, total)


@triton.jit
def one_sided(x, y, SIZE: tl.constexpr):
    """Every second program stores once more."""
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = tl.load(x + i)
    tl.store(y + i, value)
    if tl.program_id(0) % 2 == 0:
        tl.debug_barrier()
        tl.store(y + i, tl.exp(value))


def launched(kernel, grid, *arguments, arch=90, **constants):
    with sass.CountingDevice(arch) as device:
        kernel[(grid,)](*arguments, **constants)
    return device.reports[0]


def static(report):
    """The instructions in the order of the text, without what follows the last EXIT."""
    text = sass.disassemble(report.asm["cubin"])
    lines = re.findall(r"^(\.L\w+):|/\*\w+\*/\s+(\S.*?) ;", text, re.M)
    last = max(i for i, (_, code) in enumerate(lines) if "EXIT" in code)
    return lines[: last + 1]


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_straight_code_executes_as_it_stands(arch):
    x, y = torch.rand(5 * 256), torch.empty(5 * 256)
    report = launched(straight, 5, x, y, arch=arch, SIZE=256, num_warps=2)
    executed = sass.executed(report)
    assert torch.equal(y, 2 * x)
    assert executed.instructions == 5 * 2 * len(static(report))
    assert executed.by_opcode["STG"] == report.global_store.requests == 5 * 2
    assert executed.by_opcode.total() == executed.by_source.total() == executed.instructions


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_a_loop_counts_its_iterations(arch):
    warps = 4
    x, y = torch.rand(50, 512), torch.empty(1)
    # 17 and 40: neither 1 nor a multiple of 16, for which Triton would compile anew.
    few, many = (
        launched(looped, 1, x, y, steps, arch=arch, SIZE=512, num_warps=warps) for steps in (17, 40)
    )
    torch.testing.assert_close(y[0], x[:40].sum(), rtol=1e-5, atol=0)
    check_loop(few, many, (17, 40), warps)


def check_loop(few, many, steps, warps):
    """Two launches of a kernel with one loop, by the length of its text."""
    assert few.asm["cubin"] == many.asm["cubin"]
    code = static(few)
    labels = {label: i for i, (label, _) in enumerate(code) if label}
    ((start, end),) = (
        (labels[target[1]], i)
        for i, (_, line) in enumerate(code)
        if (target := re.search(r"\(([.]L\w+)\)", line)) and labels.get(target[1], i) < i
    )
    body = sum(1 for _, line in code[start : end + 1] if line)
    rest = sum(1 for _, line in code if line) - body
    counts = [sass.executed(report) for report in (few, many)]
    assert counts[1].instructions - counts[0].instructions == (steps[1] - steps[0]) * body * warps
    # Around the loop every instruction runs once, but for blocks that no warp enters.
    assert 0 < counts[0].instructions - steps[0] * body * warps <= rest * warps
    assert min(count.agreement for count in counts) > 0.9


def test_a_branch_counts_who_takes_it():
    x, y = torch.rand(8 * 128), torch.zeros(8 * 128)
    report = launched(one_sided, 8, x, y, SIZE=128, num_warps=1)
    executed = sass.executed(report)
    assert executed.by_opcode["LDG"] == 8
    assert executed.by_opcode["STG"] == 8 + 4
    assert executed.by_opcode["MUFU"] == 4 * 128 / 32  # ex2


CUDA_LOOP = """
__global__ void looped(const float* x, float* y, int steps) {
  float total = 0;
#pragma unroll 1
  for (int i = 0; i < steps; ++i) {
    total += x[i * blockDim.x + threadIdx.x];
    __syncthreads();
  }
  y[threadIdx.x] = total;
}
"""


@needs_nvcc
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_a_loop_in_cuda_counts_its_iterations(arch):
    kernel, asm = sass.counting_kernel(sass.ptxsim.compile_ptx(CUDA_LOOP, f"sm_{arch}"), arch)
    x, y = torch.rand(50, 128), torch.empty(128)
    few, many = (sass.CudaReport(kernel.launch(1, 128, [x, y, n]), asm) for n in (17, 40))
    torch.testing.assert_close(y, x[:40].sum(0), rtol=1e-5, atol=0)
    check_loop(few, many, (17, 40), warps=4)


def test_a_branch_that_became_a_predicate_is_issued_by_all(monkeypatch):
    """Its access says 0, but it stands between others."""
    code = [("LDG.E", 1), ("LDG.E", 2), ("STG.E", 3), ("EXIT", 4)]
    block = sass.Block([], [sass.Instruction(op, "R0", line, "a.cu:1") for op, line in code])
    monkeypatch.setattr(sass, "disassemble", lambda cubin: "")
    monkeypatch.setattr(sass, "reachable_blocks", lambda text: [sass.Block([]), block])
    monkeypatch.setattr(sass, "_refuse_copies", lambda blocks, ptx: None)

    class Report:
        asm = {"cubin": b"", "ptx": ""}
        lines, warps = {("ptx", 1): 7, ("ptx", 3): 7, ("ptx", 4): 7}, 7

    assert sass.executed(Report).instructions == 4 * 7


def test_the_slow_path_of_a_division_is_not_reached():
    text = """
.text.kernel:
        /*0000*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm3x_div_rn_noftz_f32_slowpath) ;
        /*0010*/                   EXIT ;
$__internal_0_$__cuda_sm3x_div_rn_noftz_f32_slowpath:
        /*0020*/                   FMUL R0, R0, R0 ;
        /*0030*/                   RET.REL.NODEC R4 `(kernel) ;
"""  # noqa: E501
    blocks = sass.reachable_blocks(text)
    assert [i.opcode for block in blocks for i in block.instructions] == ["CALL.REL.NOINC", "EXIT"]


@needs_nvcc
def test_rows_of_the_cuda_kernels():
    """Loss and gradient in one launch; a second one finishes the sum."""
    case = Case("qfl", "sparse", (640, 80), weighted=False)
    (row,) = roofline.measure(case, roofline.LOSS_GRADIENT, roofline.CUDA, (90,), ("gfx942",))
    assert (row["backend"], row["target"], row["launches"]) == ("cuda", "sm_90", 2)
    assert row["blocks"] == 10 and row["warps"] == 8  # 64 rows to a block, 4 threads to a row
    assert row["spills"] == 0 and 0 < row["registers"] <= 64
    assert row["wide_share"] == 1 and row["logit_bytes_by_width"] == {16: 2 * 640 * 80 * 4}
    # Beyond the minimum: ten partial sums written and read, the loss.
    assert 0 < row["dram_bytes"] - row["minimum_bytes"] <= 2 * 96 + 32
    assert row["agreement"] > 0.95 and row["by_opcode"]["MUFU"] >= 2
    assert row["bound_us"] > max(row["terms_us"].values()) / 1.5
    assert row["over_dram"] > row["launch_over_dram"] >= 1


@needs_nvcc
@pytest.mark.parametrize(
    "op, form, which, launches",
    [
        ("focal", "sparse", "forward", 2),
        ("statistics", "", "backward", 1),
        ("ld", "", "backward", 1),
        ("decode", "scored", "forward", 2),
    ],
)
def test_rows_of_the_rest(op, form, which, launches):
    """What a call takes besides logits is what the public functions pass: every byte moves once."""
    case = Case(op, form, (1024, 80 if op == "focal" else 17), weighted=False)
    (row,) = roofline.measure(case, which, roofline.CUDA, (90,), ())
    assert (row["launches"], row["spills"]) == (launches, 0)
    # The last sectors of arrays, partial sums, a target of one value.
    assert 0 <= row["dram_bytes"] - row["minimum_bytes"] < 1024


def test_rows_of_a_head():
    case = HeadCase("head", "", (2, 80, 128, 192), weighted=False, channels_last=True)
    assert case.rows == 2 * (16 * 24 + 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2)
    kernels = {
        "forward": ["head_boxes_kernel", "head_cls_kernel"],
        "backward": ["head_cls_kernel", "head_box_grad_kernel"],
    }
    for which, names in kernels.items():
        (row,) = roofline.measure(case, which, roofline.TRITON, (90,), ())
        assert [of["kernel"] for of in row["by_launch"]] == names and row["launches"] == 2
        assert row["agreement"] > 0.95
        assert row["spills"] == 0 or triton.__version__.startswith("3.6.")  # it spills 649
        assert row["sass_per_logit"] == pytest.approx(
            sum(of["sass_per_logit"] for of in row["by_launch"])
        )
        # Partial sums, counters and losses come on top.
        assert 0 < row["dram_bytes"] - row["minimum_bytes"] < 0.05 * row["minimum_bytes"]
        assert row["bound_us"] == sum(of["bound_us"] for of in row["by_launch"])


def test_copies_of_an_access_are_refused():
    sixteen = sass.Block([], [sass.Instruction("LDG.E.128", "R0, [R2]", 2, "a.py:1")])
    ptx = "ret;\nld.global.v4.b32 {...}, [%rd1];\nld.global.v8.b32 {...}, [%rd1];"
    sass._refuse_copies([sixteen], ptx)
    with pytest.raises(sass.Undetermined, match="2 of PTX line 2: ld.global.v4"):
        sass._refuse_copies([sixteen, sass.Block([], sixteen.instructions)], ptx)
    with pytest.raises(sass.Undetermined):
        sass._refuse_copies([sass.Block([], sixteen.instructions * 2)], ptx)
    half = sass.Instruction("LDG.E.128", "R0, [R2]", 3, "a.py:1")
    sass._refuse_copies([sass.Block([], [half, half])], ptx)  # 32 bytes in two accesses


def good_row(**changes):
    """A row that meets every requirement it is in the scope of."""
    return {
        "backend": roofline.TRITON,
        "case": roofline.QFL.name,
        "op": "qfl",
        "pass": roofline.LOSS_GRADIENT,
        "target": "sm_90",
        "dtype": "float32",
        "logits": roofline.LARGE,
        "rows_aligned": True,
        "registers": 64,
        "spills": 0,
        "sass_per_logit": 36.0,
        "wide_share": 1.0,
        "dram_ratio": 1.03,
        "over_dram": 1.15,
        "ptx_per_logit": 46.5,
        "launch_over_dram": 1.0,
    } | changes


def verdicts(*rows):
    return {verdict["requirement"]: verdict for verdict in roofline.judge(list(rows))}


def test_requirements_are_judged_by_the_worst_row():
    good = verdicts(good_row())
    assert {verdict["verdict"] for verdict in good.values()} == {"pass", "not measured"}
    assert sum(verdict["verdict"] == "pass" for verdict in good.values()) == 6
    bad_values = {
        "registers": 65,
        "spills": 1,
        "sass_per_logit": 36.1,
        "wide_share": 0.94,
        "dram_ratio": 1.031,
        "over_dram": 1.16,
    }
    for column, value in bad_values.items():
        bad = verdicts(good_row(), good_row(**{column: value}))
        missed = [verdict for verdict in bad.values() if verdict["verdict"] == "miss"]
        assert [verdict["measured"] for verdict in missed] == [value], column
        assert (missed[0]["missed"], missed[0]["of"]) == (1, 2), column


def test_requirements_of_the_cuda_kernels():
    cuda = {"backend": roofline.CUDA, "sass_per_logit": 34.0}
    good = verdicts(good_row(**cuda), good_row(**cuda, case=roofline.QFL_DENSE.name))
    assert sum(verdict["verdict"] == "pass" for verdict in good.values()) == 8
    for column, value in {"sass_per_logit": 34.1, "ptx_per_logit": 46.6}.items():
        bad = verdicts(good_row(**cuda), good_row(**cuda | {column: value}))
        missed = [verdict for verdict in bad.values() if verdict["verdict"] == "miss"]
        assert [verdict["measured"] for verdict in missed] == [value], column
        assert missed[0]["worst"].startswith("cuda, ")
    dense = good_row(**cuda | {"sass_per_logit": 35.0}, case=roofline.QFL_DENSE.name)
    assert [v["measured"] for v in verdicts(dense).values() if v["verdict"] == "miss"] == [35.0]


def test_requirements_of_a_head():
    good = {"op": "head", "case": roofline.HEAD.name, "dram_ratio": 1.05, "registers": 255}
    passes = (("forward", 4), ("backward", 2))
    rows = [good_row(**good, launches=n) | {"pass": which} for which, n in passes]
    assert not [v for v in verdicts(*rows).values() if v["verdict"] == "miss"]
    for row in rows:
        for column, value in {"launches": row["launches"] + 1, "dram_ratio": 1.06}.items():
            bad = verdicts(*rows, row | {column: value})
            assert [v["measured"] for v in bad.values() if v["verdict"] == "miss"] == [value]


def test_requirements_of_the_rest():
    rows = [good_row(op=op, case=op, dram_ratio=1.05) for op in roofline.REST]
    assert not [v for v in verdicts(*rows).values() if v["verdict"] == "miss"]
    for row in rows:
        bad = verdicts(*rows, row | {"dram_ratio": 1.051})
        assert [v["measured"] for v in bad.values() if v["verdict"] == "miss"] == [1.051]


def test_requirements_keep_to_their_scope():
    out_of_scope = good_row(
        op="dfl",
        case="another",
        logits=roofline.LARGE - 1,
        rows_aligned=False,
        registers=255,
        sass_per_logit=99.0,
        wide_share=0.0,
        dram_ratio=2.0,
        over_dram=9.0,
    )
    assert {verdict["verdict"] for verdict in verdicts(out_of_scope).values()} == {
        "pass",  # no spills
        "not measured",
    }


def test_aligned_rows():
    aligned = {case.name: roofline.rows_aligned(case) for case in roofline.FULL_CASES}
    for name, expected in {
        "qfl sparse 16800x80 bfloat16 plain": True,
        "qfl sparse 4800x1203 float32 plain": False,
        "qfl sparse 2x80x100x168 bfloat16 plain": True,
        "dfl 67200x17 float32 plain": False,
        "dfl 67200x16 float32 plain": True,
    }.items():
        assert aligned[name] == expected, name


def test_eager_operations_are_counted_without_views_and_allocations():
    x = torch.rand(4, 3)
    assert roofline.operations(lambda: torch.empty_like(x).view(3, 4).t()[0]) == 0
    assert roofline.operations(lambda: (x + 1).exp_().sum()) == 3


@pytest.mark.slow
def test_a_run_from_end_to_end(tmp_path, capsys):
    arguments = ["--quick", "--only", "qfl sparse .*float32", "--jobs", "1", "--check"]
    assert roofline.main([*arguments, "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "roofline.json").read_text())
    assert {"machine", "versions", "settings", "requirements", "launches", "rows"} <= set(document)
    assert document["versions"]["triton"] == triton.__version__
    rows = document["rows"]
    kernels = [("triton", "sm_90"), ("triton", "gfx942")]
    if roofline.cuda_missing() is None:
        kernels.append(("cuda", "sm_90"))
    assert sorted((row["pass"], row["backend"], row["target"]) for row in rows) == sorted(
        (which, *kernel) for which in roofline.QFL.passes for kernel in kernels
    )
    for row in rows:
        if row["target"] == "gfx942":
            assert row["vgpr_spills"] == row["scratch_bytes"] == 0
            assert row["static_instructions"] > 100
            continue
        assert row["spills"] == 0 and 0 < row["registers"] <= 64
        assert 1 <= row["dram_ratio"] < 1.03
        if row["launches"] == 1:
            assert row["bound_us"] == max(row["terms_us"].values()) > 0
        # A bound is only of a full GPU where every SM has a block.
        assert row["blocks"] >= 132
        assert row["agreement"] > 0.98
        # Weights of lines and opcodes are all of it, but for what is too small to be listed.
        for parts in (row["by_opcode"], row["by_source"]):
            assert sum(parts.values()) == pytest.approx(row["sass_per_logit"], rel=0.02)
        # An exponential and a reciprocal a logit; in CUDA C++ again where a label is near.
        assert row["by_opcode"]["MUFU"] == pytest.approx(2, rel=0.1)
    (step,) = document["launches"]
    launched = {"triton": 2, "cuda": 3}
    assert step["kernel_launches"] == {backend: launched[backend] for backend, _ in kernels}
    assert step["eager_operations"] > 20
    assert (tmp_path / "roofline.png").stat().st_size > 10_000
    assert "counts, not timings" in capsys.readouterr().out


def test_nothing_selected_and_list(capsys):
    assert roofline.main(["--only", "no such case"]) == 2
    assert roofline.main(["--list", "--quick"]) == 0
    assert roofline.QFL.name in capsys.readouterr().out
