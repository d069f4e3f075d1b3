"""The commands as a user starts them: torchrun, one process alone, real signals."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from swinv2_train.config.arguments import last_of_each
from swinv2_train.monitoring.run_log import read_metrics
from tests.support.processes import forked_command, forked_torchrun
from tests.support.started import STARTED

SMALL = (
    "model.embed_dim=16", "model.depths=[1,2]", "model.num_heads=[1,2]", "train.global_batch_size=16",
    "train.micro_batch_size=4", "train.log_every_steps=1", "train.checkpoint_every_steps=4",
    "train.eval_every_steps=null", "log.wandb=disabled", "runtime.num_threads=1", "engine.precision=fp32",
)  # fmt: skip
"""fp32: a product in bf16 takes 20 to 50 times as long on a processor that has no units for it."""


OWN_SESSION: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}


def start(
    *overrides: str,
    ranks: int = 2,
    module: str = "swinv2_train.train",
    interpreter: bool | str = False,
    torchrun: tuple[str, ...] = (),
) -> subprocess.Popen[str]:
    """The command in a session of its own, as a terminal or scheduler would start it: under torchrun, or alone.

    overrides: of a key that is there twice, the last one, as the command itself wants it once.
    interpreter: whether Python itself starts too, for torchrun and each rank, or the path of another that does; without
    it all processes are forks.
    torchrun: more of its options.
    """
    overrides = tuple(last_of_each(overrides))
    agent = ("--standalone", "--nproc-per-node", str(ranks), *torchrun)
    if not interpreter:
        forks = forked_command if ranks == 1 else functools.partial(forked_torchrun, agent)
        return forks(module, *overrides, **OWN_SESSION)
    words = ["-m", "torch.distributed.run", *agent] if ranks > 1 else []
    python = sys.executable if interpreter is True else interpreter
    process = subprocess.Popen([python, *words, "-m", module, *overrides], text=True, **OWN_SESSION)
    STARTED.append(process)
    return process


def start_ranks(*overrides: str, ranks: int = 2) -> list[subprocess.Popen[str]]:
    """The train command as srun starts it: each rank on its own, and nobody who watches over them.  Forks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    overrides = tuple(last_of_each(overrides))
    all_ranks = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    each = (all_ranks | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks))
    environments = ({name: str(value) for name, value in variables.items()} for variables in each)
    return [forked_command("swinv2_train.train", *overrides, environment=e, **OWN_SESSION) for e in environments]


def finish(process: subprocess.Popen[str], timeout_sec: float = 240) -> tuple[int, str]:
    """Exit code and output; a process that hangs is killed with all its ranks and fails the test."""
    try:
        output, _ = process.communicate(timeout=timeout_sec)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output


def finish_ranks(*overrides: str) -> tuple[int, str]:
    """Run two ranks to their end, which must be the same for both; returns exit code and output."""
    ended = [finish(process) for process in start_ranks(*overrides)]
    assert len({code for code, _ in ended}) == 1, ended
    return ended[0][0], "".join(output for _, output in ended)


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while not any(line["step"] >= step for line in read_metrics(run_dir)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.05)


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    )
    return [int(pid) for pid in children.stdout.split()]


def losses(run_dir: Path) -> dict[int, tuple[float, float]]:
    return {line["step"]: (line["train/loss"], line["train/grad_norm"]) for line in read_metrics(run_dir)}


def keys_per_step(run_dir: Path) -> dict[int, list[str]]:
    """All ranks' sample keys of every step, sorted."""
    found: dict[int, list[str]] = {}
    for path in (run_dir / "sample_keys").glob("*"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            found.setdefault(record["step"], []).extend(record["keys"])
    return {step: sorted(keys) for step, keys in found.items()}


def command(run_dir: Path, *overrides: str) -> tuple[str, ...]:
    return tuple(
        last_of_each(["experiment=cifar10_simmim", f"run_dir={run_dir}", "train.max_steps=40", *SMALL, *overrides])
    )


def alone(run_dir: Path, *overrides: str, interpreter: bool = False) -> subprocess.Popen[str]:
    """One process without torchrun, whose exit code is the command's own.  interpreter: as start takes it."""
    return start(*command(run_dir, *overrides), ranks=1, interpreter=interpreter)
