"""What a launch did: instruction mix, memory traffic and a roofline bound."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections import Counter
from dataclasses import asdict, dataclass, field

import numpy as np

from .isa_memory import access_width, space_of
from .operands import TYPES, types_of
from .parser import Inst


@functools.cache
def demangle(name: str) -> str:
    """C++ name of a mangled symbol (the name itself if it is not mangled or c++filt is missing)."""
    return demangle_all([name])[0]


def demangle_all(names: list[str]) -> list[str]:
    """The same for many, with one process for all."""
    mangled = [name for name in names if name.startswith("_Z")]
    if not mangled or not shutil.which("c++filt"):
        return names
    done = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True)
    found = dict(zip(mangled, done.stdout.splitlines(), strict=True))
    return [found.get(name, name) for name in names]


CLASSES = {
    "fp32": "fp32 add/mul/fma (FMA pipe)",
    "fp16": "f16/bf16 arithmetic",
    "fp64": "fp64 arithmetic",
    "alu": "integer, logic, compare, select, min/max",
    "xu": "ex2 lg2 rcp rsqrt sqrt sin cos tanh (.approx)",
    "int_div": "integer div/rem, up to 32 bits",
    "int_div64": "integer div/rem, 64 bits",
    "fp_div_fast": "fp32 division .full/.approx",
    "fp_div": "fp32 div.rn, rcp.rn, sqrt.rn",
    "fp64_div": "fp64 div, rcp, sqrt, rsqrt",
    "cvt": "conversions",
    "global_ld": "global loads",
    "global_st": "global stores",
    "shared_ld": "shared loads",
    "shared_st": "shared stores",
    "local": "local memory",
    "atomic": "atomics",
    "shuffle": "shuffles, votes, redux",
    "barrier": "CTA and warp barriers",
    "branch": "branches, calls, exits",
    "move": "mov, ld.param, cvta (mostly absent from SASS)",
    "other": "the rest",
}
# rough number of SASS instructions by pipe, for classes where it is not about one
SASS_COST: dict[str, dict[str, float]] = {
    "move": {},
    "cvt": {"alu": 0.75, "xu": 0.25},
    "int_div": {"alu": 16, "xu": 2},
    "int_div64": {"alu": 70, "xu": 2},
    "fp_div_fast": {"fp32": 3, "xu": 1},
    "fp_div": {"fp32": 8, "xu": 1},
    "fp64_div": {"fp64": 10, "alu": 4, "xu": 1},
}
_BY_OPCODE = {
    "branch": "bra brx call ret exit trap",
    "shuffle": "shfl vote match redux elect activemask",
    "move": "mov cvta",
    "cvt": "cvt",
    "atomic": "atom red",
    "barrier": "bar barrier",
    "xu": "ex2 lg2 sin cos tanh rsqrt",
    "other": "membar fence prefetch prefetchu nanosleep createpolicy griddepcontrol applypriority "
    "discard",
}
_CLASS_OF = {op: name for name, ops in _BY_OPCODE.items() for op in ops.split()}


def classify(inst: Inst) -> str:
    """The class (a key of CLASSES) an instruction is counted in."""
    op, types = inst.op, types_of(inst)
    typ = types[0] if types else TYPES["b32"]
    f64 = typ.name == "f64"
    if op in ("ld", "ldu", "st", "cp", "ldmatrix", "stmatrix"):
        space, way = space_of(inst), "st" if op in ("st", "stmatrix") else "ld"
        if op == "cp":
            return "global_ld" if len(inst.operands) > 2 else "other"
        return {"shared": f"shared_{way}", "local": "local", "param": "move", "const": "move"}.get(
            space, f"global_{way}"
        )
    if op in ("div", "rem", "rcp", "sqrt", "rsqrt"):
        if not typ.fmt:
            return "int_div64" if typ.width == 64 else "int_div"
        if f64 and "ftz" not in inst.mods:  # rcp/rsqrt.approx.ftz.f64 are single instructions
            return "fp64_div"
        if op == "div" and ("full" in inst.mods or "approx" in inst.mods):
            return "fp_div_fast"
        return "xu" if "approx" in inst.mods else "fp_div"
    if op in _CLASS_OF:
        return _CLASS_OF[op]
    if typ.fmt and op in ("add", "sub", "mul", "fma", "mad"):
        return {"f32": "fp32", "f64": "fp64"}.get(typ.fmt.name, "fp16")
    return "fp64" if f64 and op in ("setp", "set", "min", "max") else "alu"


@dataclass
class MemoryStats:
    """Requests are warp-level instructions with at least one active lane."""

    requests: int = 0
    bytes_requested: int = 0  # sum over active lanes
    sectors: int = 0  # distinct 32-byte sectors per request, summed
    ideal_sectors: int = 0  # ceil(bytes/32) per request, summed
    wavefronts: int = 0  # shared: bank passes; global: 128-byte passes
    ideal_wavefronts: int = 0  # shared: passes without bank conflicts
    width_histogram: dict[int, int] = field(default_factory=dict)  # bytes per lane -> requests

    @property
    def sectors_per_request(self) -> float:
        return self.sectors / self.requests if self.requests else 0.0

    @property
    def ideal_sectors_per_request(self) -> float:
        return self.ideal_sectors / self.requests if self.requests else 0.0

    @property
    def bank_conflicts(self) -> int:
        """Extra shared memory wavefronts."""
        return self.wavefronts - self.ideal_wavefronts


@dataclass
class Traffic:
    """Global memory traffic of one allocation (an argument or module variable)."""

    name: str
    size: int
    read_bytes: int  # requested by lanes
    written_bytes: int
    read_unique: int  # 32 x distinct sectors over the whole launch
    written_unique: int
    read_sectors: int  # distinct sectors per request, summed
    written_sectors: int
    read_widths: dict[int, int] = field(default_factory=dict)  # bytes per lane -> read_bytes
    written_widths: dict[int, int] = field(default_factory=dict)

    @property
    def read_ratio(self) -> float:
        """How often the average touched sector was read (2.0: the input is read twice)."""
        return 32 * self.read_sectors / self.read_unique if self.read_unique else 0.0

    def wide_share(self, width: int = 16, way: str | None = None) -> float:
        """Share of the bytes moved by accesses of at least ``width`` bytes per lane.

        ``way`` is "read" or "written"; by default both count.
        """
        tables = {"read": [self.read_widths], "written": [self.written_widths]}
        both = tables["read"] + tables["written"]
        moved = [item for table in tables.get(way, both) for item in table.items()]
        total = sum(n for _, n in moved)
        return sum(n for w, n in moved if w >= width) / total if total else 0.0


@dataclass
class Report:
    """Dynamic counts of a launch.  Instruction counts are PTX, not SASS, instructions."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    warps: int
    warp_instructions: int  # one per warp that issues, whatever the active lanes
    thread_instructions: int  # active lanes summed
    by_class: dict[str, int]  # warp instructions by class
    global_load: MemoryStats
    global_store: MemoryStats
    atomics: MemoryStats
    shared_load: MemoryStats
    shared_store: MemoryStats
    dram_bytes_read: int  # 32 x distinct sectors over the launch (infinite cache)
    dram_bytes_written: int
    l2_bytes_read: int  # 32 x sectors summed over requests (no L1)
    l2_bytes_written: int
    allocations: list[Traffic]
    lines: dict[tuple[str, int], int]  # warp instructions by source line (needs .loc)
    seconds: float  # simulation time

    @property
    def lane_utilisation(self) -> float:
        """Active lanes per issued warp instruction, as a fraction of 32."""
        return (
            self.thread_instructions / (32 * self.warp_instructions)
            if self.warp_instructions
            else 0.0
        )

    @property
    def bytes_requested(self) -> int:
        """Global bytes asked for by all lanes, loads and stores."""
        return self.global_load.bytes_requested + self.global_store.bytes_requested

    def traffic(self, name: str) -> Traffic:
        """Traffic of the allocation called ``name`` (or whose merged name contains it)."""
        for t in self.allocations:
            if name == t.name or name in t.name.split("+"):
                return t
        raise KeyError(name)

    def to_dict(self) -> dict:
        """A JSON-friendly dictionary."""
        out = asdict(self)
        out["lines"] = {f"{f}:{n}": c for (f, n), c in self.lines.items()}
        return out | {
            "lane_utilisation": self.lane_utilisation,
            "bytes_requested": self.bytes_requested,
        }

    def __str__(self) -> str:
        rows = [
            f"{self.kernel}  grid={self.grid} block={self.block} ({self.warps} warps, "
            f"{self.seconds:.2f} s)",
            f"  warp instructions {self.warp_instructions:>12,}   lane utilisation "
            f"{self.lane_utilisation:.1%}",
        ]
        rows += [
            f"    {CLASSES[c]:<62}{n:>12,}"
            for c, n in sorted(self.by_class.items(), key=lambda x: -x[1])
            if n
        ]
        for title, s in (
            ("global load", self.global_load),
            ("global store", self.global_store),
            ("atomics", self.atomics),
        ):
            if s.requests:
                widths = " ".join(
                    f"{w}B:{n}" for w, n in sorted(s.width_histogram.items(), reverse=True)
                )
                rows.append(
                    f"  {title:<13}{s.requests:>9,} requests {s.bytes_requested:>12,} B"
                    f"  {s.sectors_per_request:5.1f} sectors/request (ideal "
                    f"{s.ideal_sectors_per_request:.1f})"
                    f"  widths {widths}"
                )
        for title, s in (("shared load", self.shared_load), ("shared store", self.shared_store)):
            if s.requests:
                rows.append(
                    f"  {title:<13}{s.requests:>9,} requests {s.wavefronts:>12,} wavefronts,"
                    f" {s.bank_conflicts:,} of them bank conflicts"
                )
        rows.append(
            f"  DRAM (unique sectors) read {self.dram_bytes_read:,} B, "
            f"written {self.dram_bytes_written:,} B;"
            f"  L2 read {self.l2_bytes_read:,} B, written {self.l2_bytes_written:,} B"
        )
        for t in self.allocations:
            if t.read_bytes or t.written_bytes:
                rows.append(
                    f"    {t.name:<20}{t.size:>12,} B: read {t.read_bytes:,} ({t.read_unique:,} "
                    f"unique),"
                    f" written {t.written_bytes:,} ({t.written_unique:,} unique)"
                )
        return "\n".join(rows)

    def roofline(self, gpu: str = "h100") -> Roofline:
        """Lower bound on the run time, in microseconds, on a GPU of the table GPUS.

        This is a bound derived from counts, not a timing: it assumes perfect
        overlap, perfect occupancy, every SM busy (or as many as there are
        CTAs), an infinite cache for DRAM and no L1 for L2 traffic.  Counts are
        of PTX instructions; classes that expand to several SASS instructions
        are weighted by the rough factors in SASS_COST, and ``move`` is free.
        """
        g = GPUS[gpu]
        sms = min(g.sms, self.grid[0] * self.grid[1] * self.grid[2])
        per_us = g.clock_ghz * 1e3 * sms  # SM cycles per microsecond
        pipe: Counter[str] = Counter()
        for name, n in self.by_class.items():
            for target, cost in SASS_COST.get(name, {name: 1}).items():
                pipe[target] += n * cost
        lsu = (
            self.global_load.wavefronts
            + self.global_store.wavefronts
            + self.atomics.wavefronts
            + self.shared_load.wavefronts
            + self.shared_store.wavefronts
            + pipe["shuffle"]
            + pipe["local"]
        )
        terms = {
            "dram": (self.dram_bytes_read + self.dram_bytes_written) / (g.dram_gbs * 1e3),
            "l2": (self.l2_bytes_read + self.l2_bytes_written) / (g.l2_gbs * 1e3),
            "issue": pipe.total() / (4 * per_us),
            "fma": (pipe["fp32"] + pipe["fp16"]) * 32 / (g.fp32 * per_us),
            "alu": pipe["alu"] * 32 / (g.int32 * per_us),
            "xu": pipe["xu"] * 32 / (g.xu * per_us),
            "fp64": pipe["fp64"] * 32 / (g.fp64 * per_us),
            "lsu": lsu * 32 / (g.lsu * per_us),
        }
        return Roofline(gpu, max(terms.values()), max(terms, key=lambda k: terms[k]), terms)


@dataclass(frozen=True)
class Gpu:
    """Lanes per clock and SM; bandwidths in GB/s, that of L2 a typical measured one."""

    sms: int
    clock_ghz: float
    dram_gbs: float
    l2_gbs: float
    fp32: int = 128
    int32: int = 64
    xu: int = 16
    lsu: int = 32
    fp64: int = 64


GPUS = {
    "a100": Gpu(108, 1.41, 2039, 4500, fp32=64, fp64=32),
    "h100": Gpu(132, 1.98, 3352, 5500),
    "h200": Gpu(132, 1.98, 4800, 5500),
    "l4": Gpu(58, 2.04, 300, 1700, fp64=2),
    "rtx4090": Gpu(128, 2.52, 1008, 5000, fp64=2),
    "b200": Gpu(148, 1.965, 8000, 10000),
}


@dataclass
class Roofline:
    """A bound from counts, not a timing: ``microseconds`` is the largest of ``terms``."""

    gpu: str
    microseconds: float
    bound_by: str
    terms: dict[str, float]

    def __str__(self) -> str:
        parts = ", ".join(
            f"{k} {v:.2f}" for k, v in sorted(self.terms.items(), key=lambda x: -x[1]) if v > 0
        )
        return f"{self.gpu}: >= {self.microseconds:.2f} us, bound by {self.bound_by} ({parts})"


def make_report(launch, ctas: int, seconds: float) -> Report:
    """Sum the counters of a finished launch."""
    program, counters = launch.program, launch.counters
    by_class: Counter[str] = Counter()
    lines: Counter[tuple[str, int]] = Counter()
    stats = {
        name: MemoryStats()
        for name in ("global_load", "global_store", "atomics", "shared_load", "shared_store")
    }
    for pc, inst in enumerate(program.insts):
        issued = int(counters.issued[pc])
        if not issued:
            continue
        by_class[classify(inst)] += issued
        if inst.loc:
            lines[inst.loc] += issued
        if counters.requests[pc]:
            _add_memory(stats, inst, counters, pc)
    touched = {
        kind: np.add.reduceat(np.append(mask, False).astype(np.int64), counters.first_sector[:-1])
        if mask.size
        else np.zeros(len(launch.memory.allocations), np.int64)
        for kind, mask in counters.touched.items()
    }
    allocations = []
    for k, a in enumerate(launch.memory.allocations):
        if a.counted:
            s = counters.alloc_sectors
            widths = {
                way: {w: int(n[k]) for w, n in sorted(table.items()) if n[k]}
                for way, table in counters.alloc_bytes.items()
            }
            allocations.append(
                Traffic(
                    a.name,
                    a.size,
                    sum(widths["read"].values()),
                    sum(widths["written"].values()),
                    32 * int(touched["read"][k]),
                    32 * int(touched["written"][k]),
                    int(s["read"][k]),
                    int(s["written"][k]),
                    widths["read"],
                    widths["written"],
                )
            )
    block = launch.block
    return Report(
        kernel=launch.kernel.demangled,
        grid=launch.grid,
        block=block,
        warps=ctas * -(-(block[0] * block[1] * block[2]) // 32),
        warp_instructions=int(counters.issued.sum()),
        thread_instructions=int(counters.threads.sum()),
        by_class={c: by_class[c] for c in CLASSES},
        **stats,
        dram_bytes_read=sum(t.read_unique for t in allocations),
        dram_bytes_written=sum(t.written_unique for t in allocations),
        l2_bytes_read=32 * (stats["global_load"].sectors + stats["atomics"].sectors),
        l2_bytes_written=32 * (stats["global_store"].sectors + stats["atomics"].sectors),
        allocations=allocations,
        lines=dict(lines.most_common()),
        seconds=seconds,
    )


def _add_memory(stats: dict[str, MemoryStats], inst: Inst, counters, pc: int) -> None:
    shared = counters.ideal_wavefronts[pc] > 0
    if inst.op in ("atom", "red"):
        kind = "atomics"
    else:
        kind = ("shared_" if shared else "global_") + (
            "store" if inst.op in ("st", "stmatrix") else "load"
        )
    s = stats[kind]
    requests = int(counters.requests[pc])
    s.requests += requests
    s.bytes_requested += int(counters.bytes[pc])
    s.sectors += int(counters.sectors[pc])
    s.ideal_sectors += int(counters.ideal_sectors[pc])
    s.wavefronts += int(counters.wavefronts[pc])
    s.ideal_wavefronts += int(counters.ideal_wavefronts[pc])
    width = access_width(inst)
    s.width_histogram[width] = s.width_histogram.get(width, 0) + requests
