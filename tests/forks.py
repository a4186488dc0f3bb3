"""Interpreters with torch imported, by fork: importing it takes seconds, a fork a few milliseconds.

    python forks.py     reads requests as lines of JSON and answers each with its exit status

Each request runs as `python ARGUMENTS` would in its environment, as far as that is read after torch
has been imported: PYTHON* variables, and those of OpenMP, are not.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
import types

# What `python` puts first on the path, unless it was told not to.
OWN_FOLDER = not getattr(sys.flags, "safe_path", False)


def _run(arguments, path):
    kind, *rest = arguments
    first = {"-c": "", "-m": os.getcwd()}.get(kind, os.path.dirname(os.path.abspath(kind)))
    sys.path[:OWN_FOLDER] = [*[first] * OWN_FOLDER, *path]
    if kind == "-c":
        code, *rest = rest
        sys.argv = ["-c", *rest]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), main.__dict__)
    elif kind == "-m":
        module, *rest = rest
        sys.argv = [module, *rest]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        runpy.run_path(kind, run_name="__main__")


def _child(request):
    """Never returns."""
    status = 1
    try:
        os.setsid()
        os.chdir(request["cwd"])
        for number, name in enumerate([os.devnull, request["out"], request["err"]]):
            file = os.open(name, os.O_RDWR | os.O_CREAT)
            os.dup2(file, number)
        os.environ.clear()
        os.environ.update(request["env"])
        _run(request["arguments"], request["path"])
        status = 0
    except SystemExit as end:
        status = 0 if end.code is None else end.code
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status & 0xFF)


def _wait(child, timeout):
    """The exit status as subprocess has it. If late, None, and it and its children are killed."""
    end = time.monotonic() + timeout
    pause = 0.001
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


def serve():
    import torch  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _child(request)
        print(json.dumps(_wait(child, request["timeout"])), flush=True)


class Server:
    """Started at the first request; ends with this process."""

    def __init__(self):
        self.process = None

    def run(self, arguments, env, path, cwd, folder, timeout):
        """subprocess.CompletedProcess of `python ARGUMENTS`. folder: for files of its output."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        out, err = (folder / name for name in ("out", "err"))
        request = {
            **{"arguments": arguments, "env": env, "path": path, "cwd": str(cwd)},
            **{"out": str(out), "err": str(err), "timeout": timeout},
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError("the server of forked interpreters is gone")
        status = json.loads(answer)
        if status is None:
            raise subprocess.TimeoutExpired(arguments, timeout, out.read_bytes(), err.read_bytes())
        return subprocess.CompletedProcess(arguments, status, out.read_text(), err.read_text())


if __name__ == "__main__":
    serve()
