"""Times every case of bench.cases: eager PyTorch, torch.compile and gfl_kernels side by side.

    python -m bench.run --quick                  under two minutes: the cases with a requirement
    python -m bench.run --only 'dfl.*float16'    cases whose name matches (--list shows the names)
    python -m bench.run --check                  exit status 1 if a requirement is missed
    python -m bench.run --device cuda --backend triton    on a GPU; the requirements are the CPU's

Writes bench.json, bench.csv, speedup.png and floor.png. Nothing is timed before its results were
compared with float64; what is worse than eager is refused, and named.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench import cases, machine


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.run",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="cases with a requirement only")
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="folder of the results")
    parser.add_argument("--only", metavar="REGEX", help="cases whose name matches")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where tensors are"
    )
    parser.add_argument("--backend", help="force one of gfl_kernels' backends")
    parser.add_argument("--threads", type=int, help="default: as many as PyTorch takes")
    parser.add_argument("--rounds", type=int, help="rounds per case (default 11, --quick 9)")
    parser.add_argument("--block-ms", type=float, default=20.0, help="time of one block")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--check", action="store_true", help="exit status 1 unless all is reached")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (9 if options.quick else 11)
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    selected = cases.select(options.only, options.quick)
    if options.list:
        for case in selected:
            print(f"{case.name:36} {case.note}".rstrip())
        return 0
    if not selected:
        print(f"no case matches {options.only!r}; --list shows the names", file=sys.stderr)
        return 2
    # Imported here: --help and --list need no PyTorch, and the allocator is fixed before it loads.
    from bench import session

    obstacle = session.obstacle(options)
    if obstacle is not None:
        print(obstacle, file=sys.stderr)
        return 2
    return session.execute(options, selected)


if __name__ == "__main__":
    machine.fix_allocator("bench.run", sys.argv[1:])
    sys.exit(main(sys.argv[1:]))
