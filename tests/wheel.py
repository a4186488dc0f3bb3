"""A wheel in a fresh environment that has torch and no compiler: from pip install to results.

    python tests/wheel.py --torch 2.13.0 [--python python3.12] dist/gfl_kernels-*.whl

Fails if a result is wrong, or if they take longer than it says here once torch is installed.
Without a wheel it makes the environment and prints its folder.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

SECONDS = 30
ROOT = Path(__file__).resolve().parent.parent


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch", required=True)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("wheel", type=Path, nargs="?")
    options = parser.parse_args()
    ask = [options.python, "-c", "import sys; print(sys.implementation.cache_tag)"]
    tag = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()
    venv = ROOT / "build" / f"wheel-{tag}-torch-{options.torch}"
    python = venv / "bin" / "python"
    if not python.exists():
        subprocess.run([options.python, "-m", "venv", venv], check=True)
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-compile", f"torch=={options.torch}", "numpy"], check=True)
    if options.wheel is None:
        print(venv)
        return

    if "-py3-none-" not in options.wheel.name:
        sys.exit(f"{options.wheel.name} is for one version of Python: see `make wheel`")
    # Nothing but the environment is on the path: no compiler, no nvcc, no ninja.
    away = {k: v for k, v in os.environ.items() if not k.startswith(("GFL_", "PYTHON"))}
    away |= {"PATH": str(venv / "bin"), "PYTHONSAFEPATH": "1"}
    began = time.perf_counter()
    install = [*pip, "--no-deps", "--no-index", "--force-reinstall", options.wheel.resolve()]
    subprocess.run(install, check=True, cwd=venv, env=away)
    installed = time.perf_counter()
    smoke = [python, ROOT / "tests" / "smoke.py"]
    said = subprocess.run(smoke, check=True, cwd=venv, env=away, capture_output=True, text=True)
    took = time.perf_counter() - began
    print(said.stdout, end="")
    print(f"pip install took {installed - began:.1f} s, all results {took:.1f} s")
    if f"in {venv}" not in said.stdout:
        sys.exit("the package that ran is not the one of the wheel")
    if took > SECONDS:
        sys.exit(f"more than {SECONDS} s from pip install to results")


if __name__ == "__main__":
    main()
