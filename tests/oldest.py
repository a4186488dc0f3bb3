"""What sees torch compiles against the headers of the oldest torch that serves.

    python tests/oldest.py

Fetches that torch's wheel for its headers and compiles the sources that include them. Nothing is
linked: what the library uses of torch at run time is the stable ABI, which other tests look at.
"""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
OBJECTS = re.compile(
    r"(?:CMakeFiles/gfl_native\.dir/csrc|python/CMakeFiles/_autograd\.dir)/.*\.o(?=:)"
)
LIBRARIES = ("libtorch_cpu.so", "libtorch_python.so", "libc10.so")


def run(*command, **options):
    return subprocess.run(command, check=True, **options)


def headers(version):
    """A folder as CMake wants it, with stand-ins for the libraries."""
    folder = ROOT / "build" / f"torch-{version}"
    torch = folder / "torch"
    if not (torch / "version.py").exists():
        pip = (sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check")
        run(*pip, "--no-deps", "--no-cache-dir", "--dest", folder, f"torch=={version}")
        (wheel,) = folder.glob("torch-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            wanted = ("torch/include/", "torch/version.py")
            archive.extractall(folder, [m for m in archive.namelist() if m.startswith(wanted)])
        wheel.unlink()
    (torch / "lib").mkdir(exist_ok=True)
    for name in LIBRARIES:
        (torch / "lib" / name).touch()
    return torch


def main():
    (oldest,) = re.findall(r'"torch>=([0-9.]+)"', (ROOT / "pyproject.toml").read_text())
    build = ROOT / "build" / f"native-torch-{oldest}"
    options = ["-DGFL_PYTHON_MODULE=ON", "-DGFL_DISPATCH=OFF", "-DGFL_CUDA_ARCHITECTURES=90"]
    options.append(f"-DPython_EXECUTABLE={sys.executable}")
    options.append(f"-DCMAKE_MAKE_PROGRAM={BIN / 'ninja'}")  # the system need not have one
    options.append(f"-DGFL_TORCH_ROOT={headers(oldest + '.0')}")
    run(BIN / "cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *options)
    listed = run(BIN / "ninja", "-C", build, "-t", "targets", "all", capture_output=True, text=True)
    objects = OBJECTS.findall(listed.stdout)
    for source in ("cpu/ops.cpp.o", "autograd.cpp.o"):
        assert any(name.endswith(source) for name in objects), listed.stdout
    run(BIN / "ninja", "-C", build, *objects)


if __name__ == "__main__":
    main()
