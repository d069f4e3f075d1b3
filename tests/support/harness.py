"""run_distributed: real gloo ranks, forked from a process that has imported everything, so a case costs 1 to 5 s."""

from __future__ import annotations

import faulthandler
import functools
import gc
import importlib
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import torch

from swinv2_train.distributed import World, init_distributed, shutdown_distributed

IMPORTED_BY_A_RUN = [
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "swinv2_train.engine.deepspeed.engine",
    "swinv2_train.engine.local",
    "swinv2_train.report.plots",
    "swinv2_train.tasks.simmim",
    "swinv2_train.training.param_groups",
]


class RankFailed(AssertionError):
    """A rank raised; the message holds every rank's traceback."""


def run_distributed(
    fn: Callable[..., Any],
    world_size: int = 2,
    *args: Any,
    timeout_sec: float = 300,
    environment: dict[str, str] | None = None,
    may_die: bool = False,
    init: bool = True,
) -> list[Any]:
    """Call fn(world, *args) on world_size real ranks; returns their results in rank order.

    fn: any callable (ranks are forks, so closures work); results are pickled.  An error on any rank raises RankFailed
    with the tracebacks.  A rank still running after timeout_sec is killed and named.  may_die: a rank that is killed by
    a signal or fails after another one was gives None.  init=False leaves the process group to fn.
    """
    warm_up()
    port = _free_port()
    ranks = []
    for rank in range(world_size):
        receiver, sender = Pipe(duplex=False)
        pid = os.fork()
        if pid == 0:
            receiver.close()
            variables = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": world_size,
                "LOCAL_WORLD_SIZE": world_size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            os.environ.update({name: str(value) for name, value in variables.items()})
            os.environ.update(environment or {})
            faulthandler.dump_traceback_later(0.9 * timeout_sec, file=sys.__stderr__)  # says where a rank hangs
            _child(fn, args, sender, rank, world_size, init)
        sender.close()
        ranks.append((pid, receiver))
    return _collect(ranks, timeout_sec, may_die)


@functools.cache
def warm_up() -> None:
    """What every rank would import and compose anew is done once in the process they are forked from."""
    from swinv2_train.distributed.same_start import fingerprint
    from swinv2_train.engine.deepspeed.startup import import_deepspeed, quick_initialize
    from tests.support.configs import make_config

    import_deepspeed()
    with quick_initialize():
        for name in IMPORTED_BY_A_RUN:
            importlib.import_module(name)
    fingerprint(make_config())


def _child(fn: Callable[..., Any], args: tuple[Any, ...], sender: Any, rank: int, world_size: int, init: bool) -> None:
    """The life of one rank; does not return."""
    code = 1
    try:
        os.setpgid(0, 0)
        gc.freeze()  # never finalise here what belongs to the parent: its threads do not exist in this process
        torch.set_num_threads(1)
        world = World(rank, rank, world_size, world_size, torch.device("cpu"))
        if init:
            world = init_distributed(300)
        message = ("ok", fn(world, *args))
        payload = pickle.dumps(message)
        sender.send_bytes(payload)
        code = 0
        if init:
            shutdown_distributed()
    except BaseException:  # noqa: BLE001  reported to the parent, whatever it is
        if code:
            sender.send_bytes(pickle.dumps(("error", traceback.format_exc())))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _collect(ranks: list[tuple[int, Any]], timeout_sec: float, may_die: bool) -> list[Any]:
    deadline = time.monotonic() + timeout_sec
    results: list[Any] = [None] * len(ranks)
    errors: dict[int, str] = {}
    for rank, (_pid, receiver) in enumerate(ranks):
        try:
            if receiver.poll(max(0.0, deadline - time.monotonic())):
                kind, value = pickle.loads(receiver.recv_bytes())
                if kind == "ok":
                    results[rank] = value
                else:
                    errors[rank] = value
            else:
                errors[rank] = f"still running after {timeout_sec} s"
        except EOFError:
            errors[rank] = "died without a word"
    for rank, (pid, receiver) in enumerate(ranks):
        status = _wait(pid, 0.0 if errors.get(rank, "").startswith("still running") else 5.0)
        if status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        elif os.WIFSIGNALED(status) and rank in errors:
            errors[rank] += f" (signal {os.WTERMSIG(status)})"
        receiver.close()
    hung = {rank: text for rank, text in errors.items() if text.startswith("still running")}
    if errors and (not may_die or hung):
        raise RankFailed("\n".join(f"--- rank {rank}: {text}" for rank, text in sorted(errors.items())))
    return results


def _wait(pid: int, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.01)
    return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tree(folder: Path) -> list[str]:
    """Every file below folder, relative, sorted."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
