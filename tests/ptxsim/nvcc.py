"""Compile CUDA C++ to PTX with nvcc and parse the result."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from .cubin import tool
from .errors import PtxSimError
from .kernel import Module

CACHE = Path(tempfile.gettempdir()) / f"ptxsim-nvcc-{os.getuid()}"


class CompileError(PtxSimError):
    """nvcc failed; the message holds its output."""


@functools.cache
def _nvcc() -> tuple[str, str]:
    """Path and version text of nvcc."""
    try:
        path = tool("nvcc")
    except PtxSimError as error:
        raise CompileError(str(error)) from None
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
    return path, done.stdout


def _write(path: Path, text: str) -> None:
    """Never half a file: another process may be compiling the same text from it."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as out:
        out.write(text)
    os.replace(out.name, path)


def nvcc(
    source: str | os.PathLike,
    arch: str = "sm_90",
    includes: Sequence[str | os.PathLike] = (),
    defines: Mapping[str, object] | None = None,
    extra: Sequence[str] = (),
) -> Module:
    """PTX of a CUDA source file (or source text), as a :class:`Module`.

    Results are cached by a hash of the source, the options and every header in
    ``includes`` and beside the source.
    """
    return Module(compile_ptx(source, arch, includes, defines, extra))


def compile_ptx(source, arch="sm_90", includes=(), defines=None, extra=()) -> str:
    """Like :func:`nvcc` but returns the PTX text."""
    path = None
    if isinstance(source, os.PathLike) or "\n" not in source:
        path = Path(source).resolve()
    text = path.read_text() if path else source
    compiler, version = _nvcc()
    folders = [str(Path(i).resolve()) for i in includes] + ([str(path.parent)] if path else [])
    options = [
        f"-arch={arch}",
        "-lineinfo",
        *(f"-I{f}" for f in folders),
        *(f"-D{k}={v}" for k, v in (defines or {}).items()),
        *extra,
    ]
    digest = hashlib.sha256(repr((version, text, options)).encode())
    for name in folders:
        for header in sorted(
            p for p in Path(name).rglob("*") if p.suffix in (".h", ".cuh", ".hpp", ".inl")
        ):
            digest.update(header.read_bytes())
    folder = CACHE / digest.hexdigest()[:32]
    cached = folder / "kernel.ptx"
    if not cached.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path is None:
            path = folder / "kernel.cu"  # kept: error messages refer to it
            _write(path, text)
        with tempfile.TemporaryDirectory(dir=folder) as tmp:
            out = Path(tmp) / "kernel.ptx"
            done = subprocess.run(
                [compiler, "--ptx", *options, "-o", str(out), str(path)],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise CompileError(f"nvcc failed:\n{done.stdout}{done.stderr}")
            os.replace(out, cached)
    return cached.read_text()
