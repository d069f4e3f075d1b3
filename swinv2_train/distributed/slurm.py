"""What SLURM's variables say: which rank srun made of this process, and where the ranks of its step meet.

``python swinv2_train/distributed/slurm.py`` prints a node's part of it for launch/torchrun.sh, and imports nothing of
the package for that, which would take two seconds for a line of text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

FIRST_PORT, NUM_PORTS = 10007, 22003
"""Below the ports that Linux gives to outgoing connections (32768 to 60999); their number is a prime."""


def step_ranks(environment: Mapping[str, str] = os.environ) -> dict[str, int] | None:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE of a task of srun; None for one that is alone, and outside of
    SLURM.

    Raises ConfigError in a batch script of several tasks: it is none of them, and as rank 0 it would wait for the rest.
    """
    if "SLURM_PROCID" not in environment:
        return None
    step_size = environment.get("SLURM_STEP_NUM_TASKS")
    job_size = int(environment.get("SLURM_NTASKS", "1"))
    if step_size is None and job_size > 1:
        from swinv2_train.config import ConfigError

        raise ConfigError(
            f"this is the batch script of a SLURM job of {job_size} tasks and none of the tasks; start with srun "
            "(launch/train.sbatch does; srun --ntasks=1 for one process)"
        )
    if step_size is None or int(step_size) == 1:
        return None
    return {
        "RANK": int(environment["SLURM_PROCID"]),
        "WORLD_SIZE": int(step_size),
        "LOCAL_RANK": int(environment["SLURM_LOCALID"]),
        "LOCAL_WORLD_SIZE": tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[int(environment["SLURM_NODEID"])],
    }


def meeting_point(environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Host and port where the ranks of a step find each other: the step's first node, and a port of its own.

    The port follows from job, step and restart, so that neither two jobs on a node, nor two steps of a job, nor a rank
    that outlived a requeue meet another's.
    """
    job, step, restart = (int(environment.get(f"SLURM_{name}", "0")) for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    return first_host(environment["SLURM_STEP_NODELIST"]), FIRST_PORT + (101 * job + step + 5003 * restart) % NUM_PORTS


def tasks_per_node(text: str) -> list[int]:
    """2(x3),1 -> [2, 2, 2, 1]"""
    counts: list[int] = []
    for each in text.split(","):
        tasks, _, times = each.rstrip(")").partition("(x")
        counts += [int(tasks)] * int(times or 1)
    return counts


def first_host(nodelist: str) -> str:
    """node[003-007,9],other -> node003"""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodelist)[0])


def own_accelerator(visible: int, local_world_size: int, environment: Mapping[str, str] = os.environ) -> bool:
    """True where SLURM shows every task its own accelerator alone (--gpus-per-task), so that each is number 0.

    visible: accelerators that this process sees.
    """
    return visible == 1 < local_world_size <= int(environment.get("SLURM_GPUS_ON_NODE", "0"))


def main() -> None:
    """Shell assignments for torchrun on this node of a step with one task a node."""
    host, port = meeting_point()
    nodes = os.environ["SLURM_STEP_NUM_NODES"]
    print(f"NNODES={nodes} NODE_RANK={os.environ['SLURM_NODEID']} MASTER_ADDR={host} MASTER_PORT={port}")


if __name__ == "__main__":
    main()
