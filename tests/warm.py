"""A Python that has imported torch already: in front of what starts many programs, it saves each of them seconds.

Inside `warm(python)` there is a folder with two programs, `python` and `evaclip`. Each hands its words, folder,
environment and streams to a process of that Python, which waits behind a socket and runs them in a fork of itself; it
ends as the fork does. Forks have modules of torch in memory and none of this project, so a program still has to find
what it imports. What begins with other options goes to the real Python.
"""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NoReturn

# The last two take longer than torch itself; every training and every plan imports them.
PRELOADED = ("torch", "torch._dynamo", "torch.distributed.fsdp")
CLIENT = """#!{python} -IS
import json, os, socket, sys
words = {before!r} + sys.argv[1:]
if not words or words[0][:1] == "-" and words[0] not in ("-c", "-m"):
    os.execv({python!r}, [{python!r}, *words])
call = json.dumps([words, os.getcwd(), dict(os.environ)]).encode()
with socket.socket(socket.AF_UNIX) as host:
    host.connect({address!r})
    socket.send_fds(host, [len(call).to_bytes(4, "little")], [0, 1, 2])
    host.sendall(call)
    status = int(host.recv(16) or 1)
if status < 0:
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


def environment(python: Path, home: Path, *programs: Path) -> dict[str, str]:
    """That of a user who has activated the virtual environment, with a home of its own and no hub to ask.

    The folders of `programs` come first on PATH.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST", "COVERAGE"))}
    return kept | {
        "PATH": os.pathsep.join([*map(str, programs), str(python.parent), os.environ["PATH"]]),
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


@contextmanager
def warm(python: Path, environment: Mapping[str, str]) -> Iterator[Path]:
    """The folder of the two programs; within the block they work.

    Args:
        python: that of a virtual environment, with `evaclip` beside it.
        environment: in which it imports torch.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for program, before in (("python", []), ("evaclip", [str(python.with_name("evaclip"))])):
            text = CLIENT.format(python=str(python), before=before, address=f"{name}/host")
            (folder / program).write_text(text)
            (folder / program).chmod(0o755)
        command = [python, __file__, f"{name}/host"]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, cwd="/", env=environment, stdin=pipe, stdout=pipe) as host:
            assert host.stdin is not None
            if not host.stdout.readline():
                raise RuntimeError(f"{python} can't import {', '.join(PRELOADED)}")
            yield folder
            host.stdin.close()  # ends it, as the end of this process would


def wait(listener: socket.socket) -> list[str]:
    """Returns in each fork, with the words that it is to run; ends the first process when nobody will ask any more."""
    while listener in select.select([listener, 0], [], [])[0]:
        connection, _ = listener.accept()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if os.fork() == 0:
            listener.close()
            return answer(connection)
        connection.close()
    os._exit(0)


def answer(connection: socket.socket) -> list[str]:
    """Reads a request, and returns its words in a process made for it; sends its end from this one, or shares it."""
    size, streams, _, _ = socket.recv_fds(connection, 4, 3)
    with connection.makefile("rb") as stream:
        words, folder, environment = json.loads(stream.read(int.from_bytes(size, "little")))
    if worker := os.fork():
        for stream in streams:
            os.close(stream)
        ended = os.pidfd_open(worker)
        if ended not in select.select([connection, ended], [], [])[0]:
            os.killpg(worker, signal.SIGKILL)  # whoever asked is gone
        status = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
        with suppress(BrokenPipeError):
            connection.send(str(status).encode())
        os._exit(0)
    os.setsid()
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    return words


def run_to_the_end(words: list[str]) -> NoReturn:
    """Runs these words and ends as Python does, but that it takes no module apart: that copies most of the memory."""
    status: object = 0
    try:
        run(words)
    except SystemExit as exc:
        status = exc.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)


def run(words: list[str]) -> None:
    """What Python does with these words."""
    main = sys.modules["__main__"] = ModuleType("__main__")
    sys.path[1:1] = [str(Path(name).absolute()) for name in os.environ.get("PYTHONPATH", "").split(":") if name]
    match words:
        case ["-c", code, *rest]:
            sys.argv, sys.path[0] = ["-c", *rest], ""
            exec(compile(code, "<string>", "exec"), vars(main))
        case ["-m", module, *_]:
            sys.argv, sys.path[0] = words[1:], str(Path.cwd())
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [file, *_]:
            path = main.__file__ = str(Path(file).absolute())
            sys.argv, sys.path[0] = words, str(Path(file).resolve().parent)
            exec(compile(Path(file).read_bytes(), path, "exec"), vars(main))


def main() -> None:
    for name in PRELOADED:
        import_module(name)
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(sys.argv[1])
        listener.listen()
        print("ready", flush=True)
        words = wait(listener)
    run_to_the_end(words)


if __name__ == "__main__":
    main()
