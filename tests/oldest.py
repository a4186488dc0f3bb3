"""What sees torch compiles against the headers of the oldest torch that serves.

    python tests/oldest.py

Fetches that torch's wheel for its headers and compiles the sources that include them. Nothing is
linked: what is used of torch at run time is the stable ABI, which other tests look at.
"""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
OBJECTS = re.compile(r"CMakeFiles/gfl_native\.dir/csrc/.*\.o(?=:)")


def run(*command, **options):
    return subprocess.run(command, check=True, **options)


def headers(version):
    """A folder as GflTorch.cmake wants it, with a stand-in for the library."""
    folder = ROOT / "build" / f"torch-{version}"
    torch = folder / "torch"
    library = torch / "lib" / "libtorch_cpu.so"
    if not library.exists():
        pip = (sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check")
        run(*pip, "--no-deps", "--no-cache-dir", "--dest", folder, f"torch=={version}")
        (wheel,) = folder.glob("torch-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            wanted = ("torch/include/", "torch/version.py")
            archive.extractall(folder, [m for m in archive.namelist() if m.startswith(wanted)])
        wheel.unlink()
        library.parent.mkdir()
        library.touch()
    return torch


def main():
    (oldest,) = re.findall(r'"torch>=([0-9.]+)"', (ROOT / "pyproject.toml").read_text())
    build = ROOT / "build" / f"native-torch-{oldest}"
    options = ["-DGFL_PYTHON=OFF", "-DGFL_DISPATCH=OFF", "-DGFL_CUDA_ARCHITECTURES=90"]
    options.append(f"-DCMAKE_MAKE_PROGRAM={BIN / 'ninja'}")  # the system need not have one
    options.append(f"-DGFL_TORCH_ROOT={headers(oldest + '.0')}")
    run(BIN / "cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *options)
    listed = run(BIN / "ninja", "-C", build, "-t", "targets", "all", capture_output=True, text=True)
    objects = OBJECTS.findall(listed.stdout)
    assert any(name.endswith("cpu/ops.cpp.o") for name in objects), listed.stdout
    run(BIN / "ninja", "-C", build, *objects)


if __name__ == "__main__":
    main()
