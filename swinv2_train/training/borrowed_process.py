"""A run inside a process that is somebody else's: a notebook's, a program's, a service's.

The command's process ends with its run, and so may be left as it is; this one goes on.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from swinv2_train.config import ConfigError
from swinv2_train.config.standard_streams import hold_standard_streams
from swinv2_train.distributed import shutdown_distributed
from swinv2_train.engine import forget_process_group
from swinv2_train.runtime import keep_random_state, release_memory

_taken = threading.Lock()


@contextlib.contextmanager
def borrowed_process(arguments: Sequence[str]) -> Iterator[None]:
    """Inside, the process is as a command's at its start; afterwards as it was before, without a process group.

    arguments: what stands in sys.argv for who writes it down.  Put back are the environment, random states, torch's
    threads, defaults and modes, filters of warnings, and the answers to signals and errors.  Raises ConfigError where a
    run or a process group is at work here already.
    """
    if not _taken.acquire(blocking=False):
        raise ConfigError("a run is being trained in another thread of this process; wait for its end")
    try:
        if dist.is_available() and dist.is_initialized():
            raise ConfigError(
                "this process is in a process group of torch.distributed, and a run makes its own; leave it first: "
                "torch.distributed.destroy_process_group()"
            )
        hold_standard_streams()
        with contextlib.ExitStack() as stack:
            for remember in (_signals, _environment, partial(_interpreter, arguments), _torch):
                stack.callback(remember())
            stack.enter_context(warnings.catch_warnings())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            try:
                yield
            except BaseException as error:
                traceback.clear_frames(error.__traceback__)  # who keeps it would keep the model and the data workers
                raise
            finally:
                shutdown_distributed()
                forget_process_group()
                gc.collect()  # an engine is a circle of references
                release_memory()
    finally:
        _taken.release()


def _signals() -> Callable[[], None]:
    """Remember what signals do; returns what puts it back, where this thread may say so."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    numbers = signal.valid_signals() - {signal.SIGCHLD}  # torch answers it for every data loader, and asks for it once
    before = {number: signal.getsignal(number) for number in numbers}

    def put_back() -> None:
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) is not handler:  # None is not Python's
                signal.signal(number, handler)

    return put_back


def _environment() -> Callable[[], None]:
    """RANK and its like would be taken for a launcher's by the next run."""
    before = dict(os.environ)

    def put_back() -> None:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)

    return put_back


def _interpreter(arguments: Sequence[str]) -> Callable[[], None]:
    """torch puts the rank before every line of a traceback."""
    before, sys.argv = (sys.argv, sys.excepthook), list(arguments)

    def put_back() -> None:
        sys.argv, sys.excepthook = before

    return put_back


def _torch() -> Callable[[], None]:
    """What a command finds in torch at its start; what was there is put back."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    random_state = keep_random_state(device)
    settings: list[tuple[Callable[[Any], Any], Any, Any]] = [  # how to set, as it is, as a run finds it
        (torch.set_num_threads, torch.get_num_threads(), None),
        (torch.set_default_dtype, torch.get_default_dtype(), torch.float32),
        (torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode(), 0),
    ]
    groups = dist.distributed_c10d
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        settings.append((partial(setattr, groups, name), getattr(groups, name), None))
    if torch.get_default_device().type != "cpu":
        settings.append((torch.set_default_device, torch.get_default_device(), "cpu"))
    for set_to, _, wanted in settings:
        if wanted is not None:
            set_to(wanted)

    def put_back() -> None:
        for set_to, before, _ in settings:
            set_to(before)
        if cuda:
            torch.cuda.set_device(device)
        random_state()

    return put_back
