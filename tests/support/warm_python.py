"""A Python that starts without imports, for what starts its interpreters by a path: schedulers, launchers, scripts.

Its program hands arguments, directory, environment and streams to a server, a fork of this process, which forks again.
Signals are passed on, whoever kills the program kills the fork, and it ends as the fork does.  Of this project a fork
has imported nothing: it runs what its PYTHONPATH and its directory say.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import marshal
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

from tests.support.harness import warm_up
from tests.support.processes import forked, let_go_of_files

PROGRAM = """#!{python} -IS
import marshal, os, signal, socket, sys, time

server = socket.socket(socket.AF_UNIX)
for _ in range(100):
    if not server.connect_ex({address!r}):
        break
    time.sleep(0.05)
request = marshal.dumps((sys.argv, os.getcwd(), dict(os.environ)))
socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
server.sendall(request)
for name in ("HUP", "INT", "QUIT", "TERM", "USR1", "USR2"):
    signal.signal(getattr(signal, "SIG" + name), lambda number, _: server.send(bytes([number])))
code = int.from_bytes(server.recv(4), "big", signed=True)
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


def warm_python(folder: Path, first: Callable[[], None] = lambda: None) -> subprocess.Popen[str]:
    """Make the program folder/python, and start its server, in whose session all forks stay.

    first: what the server does before it serves; all forks inherit where it has gone.
    """
    folder.mkdir()
    program, address = folder / "python", folder / "server"
    program.write_text(PROGRAM.format(python=sys.executable, address=str(address)))
    program.chmod(0o755)
    importlib.import_module("swinv2_train.train")
    warm_up()
    parent = os.getpid()

    def server() -> None:
        first()
        _serve(str(address), parent)

    return forked(server, start_new_session=True)


def _serve(address: str, parent: int) -> None:
    """Fork for everybody who connects while the parent lives; returns in each fork when its program has ended."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("swinv2_train", "tests")]:
        del sys.modules[name]
    sys.meta_path[:] = [finder for finder in sys.meta_path if "pytest" not in type(finder).__module__]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait for forks
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        listener.settimeout(5)
        while os.getppid() == parent:
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                if os.fork() == 0:
                    break
                connection.close()
        else:
            return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection.setblocking(True)
    _answer(connection)


def _answer(connection: socket.socket) -> None:
    """Fork the program, wait for it and pass signals on; returns in the program's process alone."""
    length, streams, *_ = socket.recv_fds(connection, 4, 3)
    request = b""
    while len(request) < int.from_bytes(length, "big"):
        request += connection.recv(1 << 16)
    fork = os.fork()
    if fork == 0:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        let_go_of_files()
        _run(*marshal.loads(request))
        return
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(fork)
    while ended not in select.select([connection, ended], [], [])[0]:
        for number in connection.recv(64) or [signal.SIGKILL]:
            os.kill(fork, number)
    code = os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])
    with contextlib.suppress(OSError):
        connection.send(code.to_bytes(4, "big", signed=True))
    os._exit(0)


def _run(words: list[str], directory: str, environment: dict[str, str]) -> None:
    """What `python words` does there: [-u] -m MODULE, -c CODE or FILE, with their arguments."""
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    first = [] if "PYTHONSAFEPATH" in environment else [directory]
    sys.path[:0] = first + [path for path in environment.get("PYTHONPATH", "").split(":") if path]
    sys.executable, *rest = words
    if rest[0] == "-u":
        del rest[0]
        for stream in (sys.stdout, sys.stderr):
            cast(io.TextIOWrapper, stream).reconfigure(write_through=True)
    if rest[0] == "-m":
        sys.argv = rest[1:]
        runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
    elif rest[0] == "-c":
        sys.argv = ["-c", *rest[2:]]
        exec(compile(rest[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = rest
        runpy.run_path(rest[0], run_name="__main__")
