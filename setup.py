"""Drives CMake; how to compile is written in CMakeLists.txt alone.

Environment:
  GFL_KERNELS_BUILD       auto (default): build what the machine can; none: pure Python;
                          cpu: build the library without CUDA or fail; cuda: with CUDA or fail
  GFL_KERNELS_CUDA_ARCHITECTURES
                          for which GPUs, as CMAKE_CUDA_ARCHITECTURES: 90 or "80-real,90"
  GFL_KERNELS_BUILD_DIR   where CMake builds; default build/native-<python tag> beside this file
  GFL_KERNELS_CMAKE_ARGS  more arguments for CMake, such as -DGFL_SANITIZE=address,undefined
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

SOURCE = Path(__file__).resolve().parent
MODES = ("auto", "none", "cpu", "cuda")
# Without isolation pip does not install the build requirements, so the command names them.
REBUILD = "pip install setuptools pybind11 ninja cmake && pip install --no-build-isolation ."


class BuildError(Exception):
    def __init__(self, why, hint, output=""):
        super().__init__(f"{why}; {hint}")
        self.why = why
        self.hint = hint
        self.output = output


def build_mode():
    mode = os.environ.get("GFL_KERNELS_BUILD") or "auto"
    if mode not in MODES:
        raise SystemExit(f"GFL_KERNELS_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


def find_tool(name):
    # The interpreter's own folder comes first: a virtual environment need not be activated.
    beside = str(Path(sys.executable).parent)
    found = shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    if found is None:
        raise BuildError(f"{name} was not found", f"run: {REBUILD}")
    return found


def checked_run(step, command, build_dir):
    """Runs a command and shows its output; a failure becomes a sentence and a piece of advice."""
    print("+", shlex.join(command), flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    if done.returncode == 0:
        return
    told = build_dir / "gfl_failure.txt"
    if told.exists():
        why, hint = told.read_text().splitlines()[:2]
        raise BuildError(why, f"{hint}, then run: {REBUILD}")
    found = re.search(r"^.*\berror: .*$", done.stdout, re.M | re.I)
    if found is None:
        found = re.search(r"(?<=^CMake Error).*(?:\n+ .*)*", done.stdout, re.M)
    text = " ".join(found.group().split()) if found else "see the output of the build"
    raise BuildError(
        f"{step} failed: {text[:300]}",
        "for the whole output run: GFL_KERNELS_BUILD=cpu pip install -v --no-build-isolation .",
        done.stdout,
    )


def plain(why):
    """As it may go through CMake into JSON."""
    return re.sub(r"[^\w .,:()<>=+/-]", " ", why)


def forget_tools(build_dir):
    """Drops what CMake remembers of compilers and tools but keeps the objects.

    Each isolated build has its own ninja and pybind11 in a folder that is gone the next time.
    """
    for name in ("CMakeCache.txt", "gfl_failure.txt"):
        (build_dir / name).unlink(missing_ok=True)
    for remembered in build_dir.glob("CMakeFiles/[0-9]*"):
        shutil.rmtree(remembered)


def build_native(build_dir, prefix, cuda, why_not=""):
    """cuda: what CMake's GFL_CUDA is to be; why_not: what the report says if it is off."""
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    build_dir.mkdir(parents=True, exist_ok=True)
    forget_tools(build_dir)
    configure = [cmake, "-S", str(SOURCE), "-B", str(build_dir), "-G", "Ninja"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}"]
    architectures = os.environ.get("GFL_KERNELS_CUDA_ARCHITECTURES", "").replace(",", ";")
    configure += [f"-DGFL_CUDA={cuda}", f"-DGFL_CUDA_ARCHITECTURES={architectures}"]
    configure += [f"-DGFL_CUDA_WHY_NOT={why_not}"]
    configure += shlex.split(os.environ.get("GFL_KERNELS_CMAKE_ARGS", ""))
    compile_all = [cmake, "--build", str(build_dir)]
    checked_run("configuration", configure, build_dir)
    try:
        checked_run("compilation", compile_all, build_dir)
    except BuildError as error:
        # It uses more of torch than the stable ABI: one may come whose headers it does not fit.
        if not re.search(r"^FAILED: .*\b_autograd\.dir", error.output, re.M):
            raise
        configure += ["-DGFL_AUTOGRAD=OFF", f"-DGFL_AUTOGRAD_WHY_NOT={plain(error.why)}"]
        checked_run("configuration", configure, build_dir)
        checked_run("compilation", compile_all, build_dir)
    # Only now, and by unlinking: a running program may have the old library mapped.
    remove_native(prefix)
    install = [cmake, "--install", str(build_dir), "--prefix", str(prefix)]
    checked_run("installation", install, build_dir)


def built_files(package):
    """What a build leaves beside the sources of the package, but for lib and include."""
    return [f for name in ("_C.*", "_autograd.*", "_build_report.json") for f in package.glob(name)]


def remove_native(package):
    for folder in ("lib", "include"):
        shutil.rmtree(package / folder, ignore_errors=True)
    for file in built_files(package):
        file.unlink()


class BuildPy(build_py):
    def run(self):
        # build/lib may hold modules or binaries of an earlier build that this one does not make.
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "gfl_kernels", ignore_errors=True)
        super().run()


class BuildNative(build_ext):
    def run(self):
        mode = build_mode()
        in_place = self.inplace or self.editable_mode
        package = SOURCE / "gfl_kernels" if in_place else Path(self.build_lib) / "gfl_kernels"
        package = package.resolve()
        if mode == "none":
            why = "GFL_KERNELS_BUILD=none asked for pure Python"
            self.leave_out(package, BuildError(why, f"unset GFL_KERNELS_BUILD and run: {REBUILD}"))
            return
        default_dir = SOURCE / "build" / f"native-{sys.implementation.cache_tag}"
        build_dir = Path(os.environ.get("GFL_KERNELS_BUILD_DIR") or default_dir).resolve()
        try:
            if mode == "auto":
                self.build_what_can_be(build_dir, package)
            else:
                build_native(build_dir, package, "ON" if mode == "cuda" else "OFF")
        except BuildError as error:
            if mode != "auto":
                raise SystemExit(
                    f"gfl_kernels: the native library cannot be built: {error}"
                ) from error
            self.leave_out(package, error)
            return
        left_out = json.loads((package / "_build_report.json").read_text())["left_out"]
        left_out = "".join(f"; left out {what}: {why}" for what, why in left_out.items())
        print(f"gfl_kernels: built the native library{left_out}")

    def build_what_can_be(self, build_dir, package):
        try:
            build_native(build_dir, package, "AUTO")
        except BuildError as error:
            # If it was nvcc that failed, the CPU library can do without.
            objects = build_dir.glob("CMakeFiles/gfl_native.dir/csrc/cuda")
            if not error.why.startswith("compilation") or not any(objects):
                raise
            build_native(build_dir, package, "OFF", plain(error.why))

    def leave_out(self, package, error):
        print(f"gfl_kernels: pure Python only, the native library is left out: {error}")
        report = {
            "native": False,
            "why": error.why,
            "hint": error.hint,
            "built_against_torch": None,
            "left_out": dict.fromkeys(("cpu", "cuda", "autograd"), error.why),
        }
        remove_native(package)
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_report.json").write_text(json.dumps(report, indent=2) + "\n")
        # Without binaries the wheel runs everywhere: have it tagged py3-none-any.
        self.distribution.ext_modules = None
        wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
        if wheel is not None:
            wheel.root_is_pure = True

    def get_outputs(self):
        if self.inplace or self.editable_mode:
            return []
        package = Path(self.build_lib) / "gfl_kernels"
        made = built_files(package)
        made += [f for folder in ("lib", "include") for f in (package / folder).rglob("*")]
        return [str(f) for f in made if f.is_file()]

    def get_output_mapping(self):
        return {}


class Wheel(bdist_wheel):
    def get_tag(self):
        # The library is loaded through ctypes and knows nothing of Python; _C does.
        *python, platform = super().get_tag()
        knows_python = any((Path(self.bdist_dir) / "gfl_kernels").glob("_C.*"))
        return (*python, platform) if knows_python else ("py3", "none", platform)


build_mode()
setup(
    ext_modules=[Extension("gfl_kernels._C", sources=[])],
    cmdclass={"bdist_wheel": Wheel, "build_py": BuildPy, "build_ext": BuildNative},
)
