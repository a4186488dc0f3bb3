"""Building and installing: sdist, wheels, the editable install, the CMake package, and what is said
when a part cannot be built.

Everything is built from one unpacked sdist, so what these tests pass with is what the sdist holds;
the native code is compiled once.
"""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
ISAS = ["baseline", "avx2", "avx512"] if os.uname().machine == "x86_64" else ["baseline"]
NO_CUDA = "it was not asked for"
# Nothing here depends on how fast the code is. With ccache what CI has compiled is there already.
QUICK = {"GFL_KERNELS_CMAKE_ARGS": "-DCMAKE_CXX_FLAGS_RELEASE=-O0"}
if "CMAKE_CXX_COMPILER_LAUNCHER" in os.environ:
    QUICK = {}
WITHOUT = "gfl_kernels/lib/", "gfl_kernels/include/", "gfl_kernels/_C", "gfl_kernels/_autograd"

# One worker builds it all: the others would compile the same again.
pytestmark = [pytest.mark.install, pytest.mark.xdist_group("install")]

for tool in ("build", "pybind11", "setuptools"):
    pytest.importorskip(tool, reason="building needs the requirements of pyproject.toml")


def run(*command, cwd, check=True, **env):
    """Runs a command without the developer's settings; an env value of None removes that one."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("GFL_", "PYTHON", "PYTEST"))}
    clean["PATH"] = f"{BIN}{os.pathsep}{clean['PATH']}"
    clean |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONSAFEPATH": "1", **env}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={k: str(v) for k, v in clean.items() if v is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    if check and done.returncode != 0:
        pytest.fail(f"{command} exited with {done.returncode}:\n{done.stdout}")
    return done


def tool(name):
    found = shutil.which(name, path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def build_wheel(source, out, *options, check=True, **env):
    done = run(
        *(sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", *options, "-w", out, "."),
        cwd=source,
        check=check,
        **env,
    )
    return next(Path(out).glob("*.whl"), None), done.stdout


def unpack(wheel, folder):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def tags(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/WHEEL"))
        message = email.message_from_bytes(archive.read(name))
    return message.get_all("Tag"), message["Root-Is-Purelib"]


def report(folder):
    return json.loads((folder / "gfl_kernels" / "_build_report.json").read_text())


def python(code, path, **env):
    """Runs code with the package in `path`, away from the source tree."""
    return run(sys.executable, "-c", code, cwd=path, PYTHONPATH=path, **env).stdout


def assert_pure(wheel, folder):
    assert tags(wheel) == (["py3-none-any"], "true")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [n for n in names if n.startswith(WITHOUT) or n.endswith(".so")]
    assert report(folder)["native"] is False
    assert report(folder)["built_against_torch"] is None
    assert report(folder)["left_out"]["cuda"] == report(folder)["why"]


def assert_works_on_reference(folder):
    """A pure installation computes, and says what is missing in the words of its build report."""
    out = python(
        "import json, torch, gfl_kernels as g\n"
        "x = torch.tensor([[0.0, 2.0]], requires_grad=True)\n"
        "loss = g.quality_focal_loss(x, (torch.tensor([0]), torch.tensor([0.5])))\n"
        "loss.backward()\n"
        "print(json.dumps([g.backends(), loss.item(), x.grad.tolist()]))",
        folder,
    )
    backends, loss, grad = json.loads(out.splitlines()[-1])
    # s = 0.5 = q leaves nothing of class 0; class 1 gives s^2 softplus(2).
    assert loss == pytest.approx(0.8807970779778824**2 * 2.1269280110429727, rel=1e-5)
    assert grad[0][0] == 0 and grad[0][1] > 0
    assert backends["reference"] == "ok"
    assert report(folder)["why"] in backends["cpu"]
    assert report(folder)["hint"] in backends["cpu"]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def source(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        archive.extractall(
            folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {})
        )
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def objects(source):
    """CMake's build folder, shared by every build here that compiles. It lies as a checkout's does:
    where ccache has seen the sources, as in CI, paths count for it."""
    return source / "build" / f"native-{sys.implementation.cache_tag}"


@pytest.fixture(scope="module")
def native_wheel(source, objects, tmp_path_factory):
    if os.environ.get("GFL_TEST_EXPECT_NATIVE") != "1":
        tool("c++")
    wheel, _ = build_wheel(
        source,
        tmp_path_factory.mktemp("native_wheel"),
        "--no-build-isolation",
        GFL_KERNELS_BUILD="cpu",
        GFL_KERNELS_BUILD_DIR=objects,
        CCACHE_BASEDIR=source,
        **QUICK,
    )
    return wheel


@pytest.fixture(scope="module")
def native(native_wheel, tmp_path_factory):
    """The unpacked native wheel."""
    return unpack(native_wheel, tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def library(native):
    return native / "gfl_kernels" / "lib" / "libgfl_native.so"


def test_sdist_holds_the_sources_and_nothing_built(sdist):
    names = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    assert {
        "CMakeLists.txt",
        "CHANGELOG.md",
        "LICENSE",
        "README.md",
        "cmake/gfl_kernelsConfig.cmake.in",
        "csrc/cpu/quality.cpp",
        "csrc/include/gfl_kernels/gfl_kernels.h",
        "csrc/math.h",
        "gfl_kernels/__init__.py",
        "gfl_kernels/_version.py",
        "gfl_kernels/py.typed",
        "pyproject.toml",
        "python/module.cpp",
        "setup.py",
        "tests/cpp/main.cpp",
    } <= names
    tracked = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("csrc/**/*") if p.is_file()}
    assert tracked <= names
    built = r"\.(so|o|py[cod]|dylib)$|_build_report|^(build|bench/out|gfl_kernels/(lib|include))/"
    assert not [name for name in names if re.search(built, name)]


def test_native_wheel_contents(native_wheel, native):
    names = zipfile.ZipFile(native_wheel).namelist()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert {
        "gfl_kernels/__init__.py",
        "gfl_kernels/py.typed",
        "gfl_kernels/_build_report.json",
        f"gfl_kernels/_C{suffix}",
        "gfl_kernels/include/gfl_kernels/gfl_kernels.h",
        "gfl_kernels/lib/libgfl_native.so",
        "gfl_kernels/lib/cmake/gfl_kernels/gfl_kernelsConfig.cmake",
    } <= set(names)
    assert not [n for n in names if not n.startswith(("gfl_kernels/", "gfl_kernels-"))]
    (tag,), pure = tags(native_wheel)
    assert (
        tag.startswith(f"cp{sys.version_info.major}{sys.version_info.minor}-") and pure == "false"
    )
    assert not tag.endswith("-any")


def test_native_report_names_the_torch_it_was_built_against(native):
    import torch

    made = report(native)
    assert (made["native"], made["why"], made["hint"]) == (True, None, None)
    assert made["built_against_torch"] == torch.__version__
    assert made["left_out"]["cuda"] == NO_CUDA


def test_native_wheel_computes(native):
    out = run(
        sys.executable,
        ROOT / "tests" / "smoke.py",
        "--through",
        "C++",
        cwd=native,
        PYTHONPATH=native,
    ).stdout
    assert f"in {native / 'gfl_kernels'}" in out
    assert "agree with the reference" in out


def test_native_wheel_installs_with_pip(native_wheel, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path]
    run(*pip, native_wheel, cwd=tmp_path)
    out = python("import gfl_kernels as g; print(g.backends()['cpu'], g.__file__)", tmp_path)
    assert out.split() == ["ok", str(tmp_path / "gfl_kernels" / "__init__.py")]


def test_no_run_path_into_the_build_machine(native, library):
    readelf = tool("readelf")
    paths = {}
    modules = (native / "gfl_kernels").glob("_*.so")
    for file in [library, *modules]:
        dynamic = run(readelf, "-d", file, cwd=native).stdout
        paths[file.name.split(".")[0]] = re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", dynamic)
    assert paths == {"libgfl_native": [], "_C": ["$ORIGIN/lib"], "_autograd": ["$ORIGIN/lib"]}


def test_links_libtorch_cpu_through_the_stable_abi_only(library):
    dynamic = run(tool("readelf"), "-d", library, cwd=library.parent).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*?)\.so", dynamic))
    assert "libtorch_cpu" in needed
    assert needed <= {
        "libtorch_cpu",
        "libstdc++",
        "libgcc_s",
        "libm",
        "libc",
        "libdl",
        "libpthread",
        "ld-linux-x86-64",
    }
    undefined = run(tool("nm"), "-D", "-C", "--undefined-only", library, cwd=library.parent).stdout
    assert not re.findall(r" U ((?:at|c10|torch|caffe2)::.*)", undefined)
    assert "aoti_torch" in undefined


def test_exports_the_c_functions_and_nothing_else(library):
    header = (ROOT / "csrc/include/gfl_kernels/gfl_kernels.h").read_text()
    declared = set(re.findall(r"^GFL_API [^(]*?(\w+)\(", header, re.M))
    exported = run(tool("nm"), "-D", "--defined-only", library, cwd=library.parent).stdout
    assert set(re.findall(r" [A-Z] (\w+)$", exported, re.M)) == declared


def test_kernels_of_each_isa_share_no_code(source, objects, native_wheel):
    for isa in ISAS:
        assert list(objects.glob(f"CMakeFiles/gfl_cpu_{isa}.dir/**/quality.cpp.o"))
    run(tool("cmake"), "--build", objects, "--target", "check_isa_symbols", cwd=source)


def test_shared_code_would_be_noticed(source, tmp_path):
    (tmp_path / "a.cpp").write_text(
        "inline int twice(int x) { return 2 * x; } int (*f)(int) = twice;\n"
    )
    run(tool("c++"), "-c", "a.cpp", "-o", "a.o", cwd=tmp_path)
    script = source / "cmake" / "check_isa_symbols.cmake"
    options = f"-DOBJECTS={tmp_path / 'a.o'}", f"-DNM={tool('nm')}"
    done = run(tool("cmake"), *options, "-P", script, cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert "twice(int)" in done.stdout


def cmakes():
    """The cmake of the environment and the system's: one is old, the other new."""
    return sorted(
        {
            os.path.realpath(c)
            for c in [shutil.which("cmake", path=p) for p in (BIN, "/usr/bin")]
            if c
        }
    )


@pytest.mark.parametrize("cmake", cmakes())
def test_configures_without_python_against_a_plain_libtorch(cmake, source, tmp_path):
    torch_root = Path(
        run(
            sys.executable, "-c", "import torch; print(torch.__path__[0])", cwd=tmp_path
        ).stdout.strip()
    )
    run(
        *(cmake, "-S", source, "-B", tmp_path / "b", "-G", "Ninja"),
        *("-DGFL_PYTHON=OFF", "-DGFL_CUDA=OFF", f"-DGFL_TORCH_ROOT={torch_root}"),
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        cwd=tmp_path,
    )
    rules = (tmp_path / "b" / "build.ninja").read_text()
    assert "libgfl_native.so" in rules and "_C." not in rules


@pytest.mark.parametrize("cmake", cmakes())
def test_cpp_program_uses_the_installed_library(cmake, native, tmp_path):
    run(
        *(cmake, "-S", ROOT / "tests" / "cpp", "-B", tmp_path, "-G", "Ninja"),
        *(f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-Dgfl_kernels_ROOT={native / 'gfl_kernels'}"),
        f"-DPython_EXECUTABLE={sys.executable}",
        cwd=tmp_path,
    )
    run(cmake, "--build", tmp_path, cwd=tmp_path)
    available = python(
        "from gfl_kernels.native import available_isas; print(*available_isas())", native
    )
    assert "baseline" in available.split()
    for isa in available.split():
        out = run(tmp_path / "consumer", cwd=tmp_path, GFL_CPU_ISA=isa).stdout
        assert re.search(rf"gfl_kernels \S+ on {isa}: worst error", out)
    refused = run(tmp_path / "consumer", cwd=tmp_path, check=False, GFL_CPU_ISA="sse9")
    assert refused.returncode == 1
    assert "sse9" in refused.stdout


def test_find_package_says_what_it_misses(native, tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(p LANGUAGES CXX)\n"
        "find_package(gfl_kernels CONFIG REQUIRED)\n"
    )
    done = run(
        *(
            tool("cmake"),
            "-S",
            ".",
            "-B",
            "b",
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        ),
        f"-Dgfl_kernels_ROOT={native / 'gfl_kernels'}",
        "-DCMAKE_DISABLE_FIND_PACKAGE_Python=ON",
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode != 0
    assert "set GFL_TORCH_ROOT" in " ".join(done.stdout.split())


def test_none_gives_a_pure_wheel_that_works(source, tmp_path):
    wheel, _ = build_wheel(source, tmp_path, "--no-build-isolation", GFL_KERNELS_BUILD="none")
    folder = unpack(wheel, tmp_path / "unpacked")
    assert_pure(wheel, folder)
    assert "GFL_KERNELS_BUILD=none" in report(folder)["why"]
    assert_works_on_reference(folder)


def without_compilers(tmp_path):
    """A PATH with everything of the system's but compilers."""
    folder = tmp_path / "bin"
    folder.mkdir()
    compiler = re.compile(
        r"(^|-)(c\+\+|g\+\+|gcc|cc|clang|clang\+\+|icpx|nvc\+\+)(-?[\d.]+)?$|^c\d\d$"
    )
    for file in Path("/usr/bin").iterdir():
        if not compiler.search(file.name):
            (folder / file.name).symlink_to(file)
    return {"PATH": folder, "CXX": None}


@pytest.mark.parametrize("missing", ["CXX points to nowhere", "no compiler on PATH"])
def test_without_a_compiler_the_python_part_is_installed(missing, source, tmp_path):
    env = {"CXX": "/nowhere/c++"} if missing.startswith("CXX") else without_compilers(tmp_path)
    wheel, output = build_wheel(
        source, tmp_path, "--no-build-isolation", GFL_KERNELS_BUILD_DIR=tmp_path / "b", **env
    )
    folder = unpack(wheel, tmp_path / "unpacked")
    assert_pure(wheel, folder)
    assert report(folder)["why"] == "no working C++ compiler was found"
    assert "install a C++20 compiler" in report(folder)["hint"]
    assert "pip install --no-build-isolation ." in report(folder)["hint"]
    assert "left out: no working C++ compiler was found" in output
    assert_works_on_reference(folder)


def test_a_compiler_that_fails_is_quoted(source, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        '*csrc/cpu*) echo "x.cpp:1:2: error: out of registers" >&2; exit 1;;\nesac\n'
        f'exec {tool("c++")} "$@"\n'
    )
    compiler.chmod(0o755)
    env = {
        "CXX": compiler,
        "GFL_KERNELS_BUILD_DIR": tmp_path / "b",
        "GFL_KERNELS_CMAKE_ARGS": "-DGFL_CUDA=OFF",
    }
    wheel, _ = build_wheel(source, tmp_path, "--no-build-isolation", **env)
    folder = unpack(wheel, tmp_path / "unpacked")
    assert_pure(wheel, folder)
    assert report(folder)["why"] == "compilation failed: x.cpp:1:2: error: out of registers"
    assert "GFL_KERNELS_BUILD=cpu" in report(folder)["hint"]


def test_cpu_builds_or_fails(source, tmp_path):
    env = {
        "CXX": "/nowhere/c++",
        "GFL_KERNELS_BUILD_DIR": tmp_path / "b",
        "GFL_KERNELS_BUILD": "cpu",
    }
    wheel, output = build_wheel(source, tmp_path, "--no-build-isolation", check=False, **env)
    assert wheel is None
    assert "cannot be built: no working C++ compiler was found" in output


def test_modes_that_cannot_be_are_refused(source, tmp_path):
    wheel, output = build_wheel(
        source, tmp_path, "--no-build-isolation", check=False, GFL_KERNELS_BUILD="gpu"
    )
    assert wheel is None
    assert "GFL_KERNELS_BUILD must be one of auto, none, cpu, cuda, got 'gpu'" in output


def test_cuda_builds_or_fails(source, tmp_path):
    env = {
        "CUDACXX": "/nowhere/nvcc",
        "GFL_KERNELS_BUILD_DIR": tmp_path / "b",
        "GFL_KERNELS_BUILD": "cuda",
    }
    wheel, output = build_wheel(source, tmp_path, "--no-build-isolation", check=False, **env)
    assert wheel is None
    assert "the CUDA kernels cannot be built: no working nvcc was found" in output


def test_an_nvcc_that_fails_leaves_the_cpu_library(source, objects, native_wheel, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        '*csrc/cuda*) echo "x.cu(1): error: no such instruction" >&2; exit 1;;\nesac\n'
        f'exec {tool("nvcc")} "$@"\n'
    )
    nvcc.chmod(0o755)
    # What has been compiled for the CPU is good for it, at the same distance from the sources.
    copy = shutil.copytree(objects, objects.with_name("native-nvcc-fails"))
    env = {
        "CUDACXX": nvcc,
        "GFL_KERNELS_BUILD": "auto",
        "GFL_KERNELS_BUILD_DIR": copy,
        "CCACHE_BASEDIR": source,
        "GFL_KERNELS_CUDA_ARCHITECTURES": "90",
        **QUICK,
    }
    wheel, output = build_wheel(source, tmp_path, "--no-build-isolation", **env)
    folder = unpack(wheel, tmp_path / "unpacked")
    why = "compilation failed: x.cu(1): error: no such instruction"
    assert report(folder)["native"] and report(folder)["left_out"]["cuda"] == why
    assert f"left out cuda: {why}" in output
    out = python("import gfl_kernels as g; print(*g.backends().items(), sep='\\n')", folder)
    assert "('cpu', 'ok')" in out and why in out


def test_a_torch_that_the_nodes_do_not_fit_leaves_them_out(source, objects, native_wheel, tmp_path):
    """What is on the stable ABI serves without them, and all calls go through Python."""
    nodes = source / "python" / "autograd.cpp"
    text = nodes.read_text()
    copy = shutil.copytree(objects, objects.with_name("native-nodes-fail"))
    env = {"GFL_KERNELS_BUILD": "cpu", "GFL_KERNELS_BUILD_DIR": copy, "CCACHE_BASEDIR": source}
    try:
        nodes.write_text("#error of a header of torch's\n" + text)
        wheel, output = build_wheel(source, tmp_path, "--no-build-isolation", **env, **QUICK)
    finally:
        nodes.write_text(text)
    folder = unpack(wheel, tmp_path / "unpacked")
    assert report(folder)["native"]
    assert "error of a header of torch s" in report(folder)["left_out"]["autograd"]
    assert "left out autograd: compilation failed: " in output
    assert not list(folder.glob("gfl_kernels/_autograd*")) and list(folder.glob("gfl_kernels/_C*"))
    smoke = ROOT / "tests" / "smoke.py"
    out = run(sys.executable, smoke, "--through", "Python", cwd=folder, PYTHONPATH=folder).stdout
    assert "agree with the reference" in out and "error of a header of torch s" in out


def test_isolated_build_without_torch_says_what_to_type(source, tmp_path):
    env = {"GFL_KERNELS_BUILD_DIR": tmp_path / "b"}
    wheel, output = build_wheel(source, tmp_path, check=False, **env)
    if wheel is None and re.search(
        "No matching distribution|Could not find a version|Connection", output
    ):
        pytest.skip("no package index to fetch the build requirements from")
    assert wheel is not None, output
    folder = unpack(wheel, tmp_path / "unpacked")
    assert_pure(wheel, folder)
    assert report(folder)["why"] == "torch is not installed in the build environment"
    assert "pip install --no-build-isolation ." in report(folder)["hint"]
    assert_works_on_reference(folder)
    out = run(sys.executable, "-m", "gfl_kernels", cwd=folder, PYTHONPATH=folder).stdout
    assert "pip install --no-build-isolation ." in out


def test_editable_install_finds_the_library_in_the_source_tree(
    source, objects, native_wheel, tmp_path
):
    # An environment of its own that sees the packages of this one.
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    editable = tmp_path / "venv" / "bin" / "python"
    site = run(
        editable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path
    ).stdout
    # "zz": after the editable install's own .pth, so that this checkout does not win over it.
    Path(site.strip(), "zz_outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = (
        editable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--force-reinstall",
        "-e",
        ".",
    )
    show = "import gfl_kernels as g; print(g.__file__, g.backends()['cpu'])"
    where = source / "gfl_kernels"
    try:
        compiled = {"GFL_KERNELS_BUILD": "cpu", "GFL_KERNELS_BUILD_DIR": objects, **QUICK}
        run(*install, cwd=source, **compiled)
        assert (where / "lib" / "libgfl_native.so").exists()
        out = run(editable, "-c", show, cwd=tmp_path).stdout
        assert out.split() == [str(where / "__init__.py"), "ok"]

        # Going back to pure Python takes the library away again.
        run(*install, cwd=source, GFL_KERNELS_BUILD="none")
        assert not (where / "lib").exists()
        out = run(editable, "-c", show, cwd=tmp_path).stdout
        assert out.startswith(str(where)) and "GFL_KERNELS_BUILD=none" in out
    finally:
        for built in (where / "lib", where / "include"):
            shutil.rmtree(built, ignore_errors=True)
        for built in (*where.glob("_[Ca]*.so"), *where.glob("_build_report.json")):
            built.unlink()
