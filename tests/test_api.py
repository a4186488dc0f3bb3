"""The public API, which changes only on purpose: names, signatures, types, what importing costs.

python tests/test_api.py > tests/api.txt        (make api)
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import typing
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("gfl_kernels", "gfl_kernels.adapters", "gfl_kernels.presets")  # with an __all__ each


def public():
    """(qualified name, object) of all that the public modules export, in order."""
    for name in MODULES:
        module = import_module(name)
        for exported in sorted(module.__all__):
            yield f"{name}.{exported}", getattr(module, exported)


def members(thing):
    """(name, function) of a class's own constructor and methods, or of a function itself."""
    if not inspect.isclass(thing):
        return [("", thing)]
    own = [cls for cls in thing.__mro__ if cls.__module__.startswith("gfl_kernels")]
    found = {}
    for cls in reversed(own):
        for name, value in vars(cls).items():
            if inspect.isfunction(value) and (name in ("__init__", "forward") or name[0] != "_"):
                found[f".{name}"] = value
    return found.items()


def describe(name, thing):
    """A line per function; for a named tuple one with its fields."""
    if not callable(thing):
        return [f"{name}: {type(thing).__name__}"]
    if hasattr(thing, "_fields"):
        return [f"{name}({', '.join(thing._fields)})"]
    return [f"{name}{member}{inspect.signature(f)}" for member, f in members(thing)]


def snapshot():
    return "".join(f"{line}\n" for name, thing in public() for line in describe(name, thing))


def test_public_names_and_signatures_are_those_of_the_snapshot():
    now, then = snapshot().splitlines(), (ROOT / "tests" / "api.txt").read_text().splitlines()
    gone = [f"- {line}" for line in then if line not in now]
    new = [f"+ {line}" for line in now if line not in then]
    assert not gone and not new, "\n".join(
        ["the public API has changed; if it should have, run: make api", *gone, *new]
    )


@pytest.mark.parametrize(("name", "thing"), list(public()), ids=[name for name, _ in public()])
def test_public_functions_are_typed_and_documented(name, thing):
    if not callable(thing):
        return
    assert inspect.getdoc(thing), f"{name} has no docstring"
    for member, function in members(thing):
        hints = typing.get_type_hints(function)
        parameters = [p for p in inspect.signature(function).parameters if p != "self"]
        assert {*parameters, "return"} <= hints.keys(), f"{name}{member} is not fully annotated"


def test_every_public_name_is_in_the_documentation():
    page = ROOT / "docs" / "api.md"
    if not page.exists():
        pytest.skip("the documentation is not here")
    text = page.read_text()
    shown = set(re.findall(r"^::: (\S+)$", text, re.M))
    names = {name for name, thing in public() if callable(thing)}
    names = {"gfl_kernels.presets" if n.startswith("gfl_kernels.presets.") else n for n in names}
    assert names == shown, "docs/api.md has a line '::: name' for each public name"


def test_py_typed_is_installed():
    import gfl_kernels

    assert Path(gfl_kernels.__file__).with_name("py.typed").exists()


IMPORT_MS = 50


def test_import_is_cheap(tmp_path):
    """Beyond torch's own: the thread's processor time, which other processes add little to."""
    from support import run_python

    # Byte code as an installation leaves it: the first run writes it.
    code = (
        "import sys, time, torch\n"
        f"sys.dont_write_bytecode, sys.pycache_prefix = False, {str(tmp_path)!r}\n"
        "began = time.thread_time()\n"
        "import gfl_kernels\n"
        "print((time.thread_time() - began) * 1e3)"
    )
    took = []
    for _ in range(6):
        done = run_python(code, fresh=True)  # a fork copies every page it touches
        assert done.returncode == 0, done.stderr
        took.append(float(done.stdout))
        if len(took) > 1 and took[-1] < IMPORT_MS:
            return
    pytest.fail(f"import gfl_kernels took {took} ms of processor time beyond torch's")


# What SECURITY.md promises.
WATCH = """
import sys, torch
sys.dont_write_bytecode = True
seen = []
def watch(event, args):
    if event == "open":
        path, mode, flags = args
        if isinstance(flags, int) and flags & 3:  # anything but reading
            seen.append(("write", str(path)))
    elif event.startswith(("socket.", "subprocess.", "os.exec", "os.system", "os.posix_spawn",
                           "os.fork", "pickle.", "urllib.", "os.remove")):
        seen.append((event, repr(args)[:80]))
"""
CALLS = """
import gfl_kernels as g
x, z = torch.randn(5, 3, requires_grad=True), torch.randn(5, 17, requires_grad=True)
label, score = torch.tensor([0, 1, 2, 3, -1]), torch.rand(5)
for name in (None, "reference"):
    with g.use_backend(name):
        loss = g.quality_focal_loss(x, (label, score)) + g.distribution_focal_loss(z, score * 16)
        (loss + g.integral(z).sum()).backward()
g.backends()
"""


def test_nothing_is_written_sent_or_started(tmp_path):
    from support import run_python

    # Once all is done, that the watch sees what it should.
    code = (
        f"{WATCH}\nsys.addaudithook(watch)\n{CALLS}\nprint(*seen, sep='\\n', end='//')\n"
        f"open({str(tmp_path / 'x')!r}, 'w')\nprint(*seen)"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    calls, afterwards = done.stdout.split("//", 1)
    assert calls == "" and afterwards.startswith("('write', ")


if __name__ == "__main__":
    sys.path.insert(0, os.fspath(ROOT))
    sys.stdout.write(snapshot())
