"""One process that has imported everything main.py needs, and forks a run of it in a tenth of a second.

`Zygote` starts this file as a program and gives it requests, one JSON object a line. Each run is main.py as `python
main.py` would run it, its `if __name__` included, in a process and a process group of its own; nothing in it is
replaced but constants that a test asks for, and results that remembered.py knows, unless memory or files are limited.
"""

from __future__ import annotations

import ast
import ctypes
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import remembered

MAIN = Path(__file__).parent.parent / "main.py"
SUBMODULES = ["concurrent.futures.thread", "http.server", "PIL.Image", "PIL.ImageCms", "PIL.ImageOps", "urllib.request"]
IMPORTED = ["torch", "torchvision", "faiss", "filelock", "jinja2", "numpy", "sqlite3", "tqdm", *SUBMODULES]


class Outcome(NamedTuple):
    status: int  # minus the number of the signal that killed it
    stdout: str
    stderr: str


class Run:
    """A run of main.py under way."""

    def __init__(self, zygote: Zygote, pid: int, folder: Path) -> None:
        self.zygote, self.pid, self.folder = zygote, pid, folder

    def send(self, number: int) -> None:
        """Only before `wait` has returned: until then its number is its own."""
        os.kill(self.pid, number)

    def wait(self, timeout: float = 120) -> Outcome:
        status = self.zygote.ask(wait=self.pid, timeout=timeout)
        said = [path.read_bytes() if path.exists() else b"" for path in (self.folder / "1", self.folder / "2")]
        assert status is not None, f"it still runs after {timeout} seconds: {said[1]!r}"
        shutil.rmtree(self.folder)
        return Outcome(status, *(text.decode("utf-8", "surrogateescape") for text in said))


class Zygote:
    """The other end of this file, run as a program. `faults`: a library for LD_PRELOAD, or none.

    A request that fails there is an error here, and one that ends the process is, too; the next run gets a new one.
    """

    def __init__(self, faults: Path | None) -> None:
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        preload = {"LD_PRELOAD": str(faults)} if faults else {}
        self.environment = {**os.environ, **one_thread, **preload}
        self.process: subprocess.Popen[str] | None = None

    def ask(self, **request: Any) -> Any:
        if "start" in request and (self.process is None or self.process.poll() is not None):
            command, pipe = [sys.executable, __file__], subprocess.PIPE
            self.process = subprocess.Popen(command, env=self.environment, stdin=pipe, stdout=pipe, text=True)
        assert self.process and self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(request, default=str) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # as when it ends before it answers
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"the zygote has ended with {self.process.wait(30)} at {request}")
        answer, error = json.loads(line)
        assert not error, error
        return answer

    def start(self, *args: object, **options: Any) -> Run:
        """Options:
        cwd        a folder
        env        what is added to the environment
        constants  of main.py, and defaults of fields, with other values: {"SAVE_SECONDS": 0}
        room       bytes of address space beyond what the imports take
        limits     {"RLIMIT_NOFILE": 256}
        faults     (folder, number, action, error) as `faults_arm` in faults.c takes them
        trace      a file to put down in what is written below the folder of `faults`
        terminal   the name of one, for its stdout
        code       Python to run instead of main.py, for the same price
        """
        folder = Path(tempfile.mkdtemp(prefix="run-"))
        options["cwd"] = options.get("cwd") or os.getcwd()
        options["env"] = {**os.environ, **options.get("env", {})}
        return Run(self, self.ask(start=list(map(str, args)), folder=folder, **options), folder)

    def __call__(self, *args: object, timeout: float = 120, **options: Any) -> Outcome:
        return self.start(*args, **options).wait(timeout)

    def close(self) -> None:
        if self.process and self.process.stdin:
            self.process.stdin.close()
            self.process.wait(30)


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def arm(request: dict[str, Any]) -> None:
    if "faults" in request:
        folder, number, action, error = request["faults"]
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        trace = os.open(request["trace"], flags) if "trace" in request else -1
        ctypes.CDLL(None).faults_arm(os.fsencode(os.path.realpath(folder)), trace, ctypes.c_long(number), action, error)
    for name, value in request.get("limits", {}).items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if "room" in request:
        resource.setrlimit(resource.RLIMIT_AS, (address_space() + request["room"],) * 2)


@cache
def compiled(constants: str) -> tuple[types.CodeType, types.CodeType]:
    """main.py with these constants, as JSON: all of it but its last statement, and that one."""
    values = json.loads(constants)
    *definitions, last = ast.parse(MAIN.read_text(encoding="utf-8")).body
    assert isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'", "main.py ends otherwise"
    classes = [statement.body for statement in definitions if isinstance(statement, ast.ClassDef)]
    for statement in itertools.chain(definitions, *classes):
        if isinstance(statement, (ast.Assign, ast.AnnAssign)):
            name = ast.unparse(statement.targets[0] if isinstance(statement, ast.Assign) else statement.target)
            if name in values and statement.value:
                statement.value = ast.copy_location(ast.Constant(values.pop(name)), statement.value)
    assert not values, f"no such constants: {values}"
    first, second = (ast.Module(part, []) for part in (definitions, [last]))
    return compile(first, str(MAIN), "exec"), compile(second, str(MAIN), "exec")


def be_main(request: dict[str, Any]) -> None:
    sys.argv = [str(MAIN), *request["start"]]
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    module.__file__ = str(MAIN)
    body, start = compiled(json.dumps(request.get("constants") or {}))
    exec(body, vars(module))
    if not request.keys() & {"limits", "room"}:
        remembered.remember(module)
    arm(request)
    exec(compile(request["code"], "code", "exec") if "code" in request else start, vars(module))


def child(request: dict[str, Any]) -> int:
    """Its exit status, as Python would have it."""
    os.setpgid(0, 0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in (1, 2):
        os.dup2(os.open(os.path.join(request["folder"], str(number)), os.O_WRONLY | os.O_CREAT), number)
    if "terminal" in request:
        os.dup2(os.open(request["terminal"], os.O_WRONLY | os.O_NOCTTY), 1)
    sys.stdin = open(0, encoding="utf-8")  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    try:
        os.chdir(request["cwd"])
        os.environ.update(request.get("env", {}))
        be_main(request)
        return 0
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()


def serve() -> None:
    for name in IMPORTED:
        __import__(name)
    from PIL import Image

    Image.init()
    assert len(os.listdir("/proc/self/task")) == 1, "a process of several threads cannot be forked safely"

    def answer_to(request: dict[str, Any]) -> Any:
        if "start" in request:
            compiled(json.dumps(request.get("constants") or {}))  # once, for all that follow
            if (pid := os.fork()) == 0:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                try:
                    os._exit(child(request))
                finally:
                    os._exit(1)  # it must not go on as a second zygote
            return pid
        pid, deadline = request["wait"], time.perf_counter() + request["timeout"]
        while not (found := os.waitpid(pid, os.WNOHANG))[0]:
            if time.perf_counter() > deadline:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return None
            time.sleep(0.002)
        return os.waitstatus_to_exitcode(found[1])

    for line in sys.stdin:
        try:
            reply = answer_to(json.loads(line)), ""
        except Exception:
            reply = None, traceback.format_exc()
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the tests
    serve()
