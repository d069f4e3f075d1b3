"""Processes without the start of an interpreter: forks of this one, which has imported torch and all the rest.

A start of a command costs 6 s of CPU for its imports, a fork none.  The tests of starts themselves (what is imported,
signals during imports, torchrun, launch files) run real interpreters.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

from swinv2_train.config import Config, command_line
from swinv2_train.config.arguments import prepared
from tests.support.configs import compose_files, composed
from tests.support.harness import warm_up
from tests.support.started import STARTED

_PR_SET_PDEATHSIG = 1


def forked(body: Callable[[], Any], environment: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
    """A process that calls body and exits with its SystemExit's code, with 1 after a traceback, or with 0.

    options: subprocess.Popen's own, but for the program and its environment.
    """

    def child() -> None:
        code = 1
        try:
            let_go_of_files()  # among them the pipe by whose end Popen knows that a program has begun
            _look_new(environment or {})
            body()
            code = 0
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
        except BaseException:  # noqa: BLE001  as the interpreter does in the end
            sys.excepthook(*sys.exc_info())
        finally:
            with contextlib.suppress(BrokenPipeError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)  # what is registered to run at exit belongs to the parent

    process = subprocess.Popen([sys.executable], preexec_fn=child, text=True, **options)
    STARTED.append(process)
    return process


def forked_command(module: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """`python -m module arguments`."""
    main = _warm_main(module, arguments)

    def body() -> None:
        sys.argv = [module, *arguments]
        main()

    return forked(body, **options)


def forked_torchrun(torchrun: tuple[str, ...], module: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """`torchrun ... -m module arguments`, torchrun: its options.  The agent is a fork, ranks are forks of that."""
    main = _warm_main(module, arguments)

    def rank() -> None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0)  # torch's forks end with their parent, torchrun's ranks do not
        _look_new({})
        sys.argv = [module, *arguments]
        try:
            main()
        except SystemExit as left:  # the agent takes a function's end for a success, not exit code 0
            if left.code:
                raise

    def body() -> None:
        elastic_launch = run.elastic_launch

        def with_forks(config: Any, entrypoint: str) -> Callable[..., Any]:
            config.start_method = "fork"
            return lambda *_: elastic_launch(config, rank)()

        run.elastic_launch = with_forks
        run.main([*torchrun, "-m", module])

    from torch.distributed import run

    return forked(body, **options)


def _warm_main(module: str, arguments: tuple[str, ...]) -> Callable[[], None]:
    """The command's main, for forks of this process: they find their choice of configuration files composed."""
    warm_up()
    main = importlib.import_module(module).main
    with contextlib.suppress(Exception):  # the command is the one to say what is wrong
        compose_files(prepared(arguments))

    def with_warm_files() -> None:
        compose_anew = command_line.compose_overrides

        def compose_overrides(overrides: list[str], *more: Any, **named: Any) -> Config:
            return compose_anew(overrides, *more, **named) if more or named else composed(prepared(overrides))

        command_line.compose_overrides = compose_overrides
        main()

    return with_warm_files


def forked_code(code: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """`python -c code arguments`."""

    def body() -> None:
        sys.argv = ["-c", *arguments]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})

    return forked(body, **options)


def finished(process: subprocess.Popen[str], input: str | None = None, timeout: float = 300) -> Any:
    """What subprocess.run returns; a process that hangs is killed."""
    try:
        stdout, stderr = process.communicate(input, timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def printed_by(body: Callable[[], Any], stderr: int = subprocess.PIPE) -> str:
    """What body prints in a process of its own, with stderr=STDOUT errors too; an error of it fails the test."""
    warm_up()
    done = finished(forked(body, stdout=subprocess.PIPE, stderr=stderr))
    assert done.returncode == 0, done.stdout + (done.stderr or "")
    return str(done.stdout)


def same_with_threads(compute: Callable[[], list[torch.Tensor]]) -> None:
    """compute gives the same bits with one, two and three threads."""

    def body() -> None:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(compute())
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))

    printed_by(body)


def let_go_of_files() -> None:
    """Close all that a fork inherited but its standard streams, and leave the numbers taken.

    Objects of the parent close their numbers whenever they are dropped (a DataLoader's worker drops its parent's queues
    at its start).  That must not meet what the fork has opened since: the likely cause of a worker that hung.
    """
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2 and number != nowhere:
            os.dup2(nowhere, number, inheritable=False)


def _look_new(environment: dict[str, str]) -> None:
    """Make a fork look like a new interpreter to itself and to its parent."""
    gc.freeze()  # never finalise here what belongs to the parent
    gc.enable()  # Popen has switched it off for the fork
    faulthandler.enable(2)  # pytest's went into a file that is closed now
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    sys.excepthook = sys.__excepthook__
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, closefd=False)
    logging.root.handlers.clear()
    for logger in logging.root.manager.loggerDict.values():
        for handler in getattr(logger, "handlers", []):
            if type(handler) is logging.StreamHandler:
                handler.stream = sys.stdout  # setStream would flush a capture that may be closed by now
    warnings.showwarning = _show_warning  # pytest would keep them for its summary
    warnings.resetwarnings()
    for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", kind)
    os.environ.update(environment)
    torch.set_num_threads(1)


def _show_warning(message: Any, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))
