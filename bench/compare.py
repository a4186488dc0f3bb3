"""``python -m bench.compare EARLIER LATER``: has anything of ours become slower?

Both are folders. Each bench.json under LATER is compared with the one of the same place under
EARLIER, row by row. A row is slower if its median is more than --tolerance times the earlier one
and the middle halves of both sets of rounds do not overlap; a row that is gone counts, too. What
the machine itself became slower or faster by, as the copies of the same run show, is taken out.
Exit status: 0, 1 if anything is slower or gone, 2 if there is nothing to judge. Without earlier
figures, or with those of another machine, it says so and exits with 0.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from bench.contestants import OURS
from bench.report import COPY

SAME = ("cpu", "gpu", "cores", "threads")  # what of the machine has to be the same


def _rows(document: dict, contestant: str) -> dict[tuple[str, str, str], dict]:
    rows = (row for row in document["rows"] if row["contestant"] == contestant)
    return {(row["kind"], row["case"], row["pass"]): row for row in rows}


def drift(earlier: dict, later: dict) -> float:
    """How many times as long the machine takes for a copy as it did."""
    before, now = _rows(earlier, COPY), _rows(later, COPY)
    ratios = [now[key]["ms_p50"] / before[key]["ms_p50"] for key in now.keys() & before.keys()]
    return statistics.median(ratios) if ratios else 1.0


def other_machine(earlier: dict, later: dict) -> str | None:
    """What differs between the machines, if anything does."""
    for name in SAME:
        before, now = (document["machine"].get(name) for document in (earlier, later))
        if before != now:
            return f"{name}: {before}, now {now}"
    return None


def compare(earlier: dict, later: dict, tolerance: float) -> tuple[list[str], list[str]]:
    """(a line per row, what is slower or gone)."""
    before, now = _rows(earlier, OURS), _rows(later, OURS)
    machine = drift(earlier, later)
    lines = [f"the machine takes {machine:.3f} times as long for a copy as it did"]
    bad = []
    for key, old in before.items():
        name = f"{key[1]}, {key[2]}"
        new = now.get(key)
        if new is None:
            bad.append(f"{name}: no longer measured")
            continue
        ratio = new["ms_p50"] / old["ms_p50"] / machine
        apart = new["ms_p25"] / machine > old["ms_p75"]
        line = f"{name}: {old['ms_p50']:.4g} ms, now {new['ms_p50']:.4g} ms, {ratio:.3f} times"
        lines.append(line)
        if ratio > tolerance and apart:
            bad.append(line)
    return lines, bad


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("earlier", type=Path)
    parser.add_argument("later", type=Path)
    parser.add_argument("--tolerance", type=float, default=1.1)
    options = parser.parse_args(arguments)
    found = sorted(options.later.rglob("bench.json"))
    if not found:
        print(f"no bench.json under {options.later}", file=sys.stderr)
        return 2
    slower = 0
    for path in found:
        place = path.relative_to(options.later)
        if not (options.earlier / place).exists():
            print(f"{place}: no earlier figures to compare with")
            continue
        earlier = json.loads((options.earlier / place).read_text())
        later = json.loads(path.read_text())
        differs = other_machine(earlier, later)
        if differs is not None:
            print(f"{place}: not compared, another machine ({differs})")
            continue
        lines, bad = compare(earlier, later, options.tolerance)
        print(f"{place}:", *lines, sep="\n  ")
        for line in bad:
            print(f"slower than {options.tolerance:g} times: {line}", file=sys.stderr)
        slower += len(bad)
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
