"""A SLURM cluster of two nodes on this machine: Debian's own daemons on loopback addresses, with their own state."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from swinv2_train.config.arguments import last_of_each
from tests.support.warm_python import warm_python

ROOT = Path(__file__).resolve().parents[2]
NODES = ("127.0.0.2", "127.0.0.3")  # a node's name is its address, so the ranks can resolve it
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "setpriv")
CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/%n
SlurmdParameters=config_overrides
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_min_interval=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
ReturnToService=0
JobRequeue=1
KillWait=15
SlurmctldTimeout=5
SlurmdTimeout=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName={nodes[0]} NodeAddr={nodes[0]} NodeHostname=localhost Port={ports[1]} CPUs=4 Gres=gpu:4 State=UNKNOWN
NodeName={nodes[1]} NodeAddr={nodes[1]} NodeHostname=localhost Port={ports[2]} CPUs=4 Gres=gpu:4 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""
"""A requeued job waits for the lifetime of its old credential: 6 s instead of 120.  The GPUs are empty files."""


def missing_programs() -> list[str]:
    """What the cluster needs and this machine has not."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return [program for program in PROGRAMS if shutil.which(program, path=path) is None]


class Cluster:
    """Daemons and commands of one cluster; jobs run this checkout with forks of this interpreter."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: list[subprocess.Popen[Any]] = []
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
            "VIRTUAL_ENV": sys.prefix,
        }

    def start(self) -> None:
        """Start the daemons, and wait until both nodes are idle."""
        self.daemons.append(warm_python(self.folder / "warm"))
        for name in ("state", *NODES):
            (self.folder / name).mkdir()
        for number in range(4):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-3]\n")
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        text = CONFIGURATION.format(user=getpass.getuser(), folder=self.folder, nodes=NODES, ports=free_ports(3))
        (self.folder / "slurm.conf").write_text(text)
        files = [f"--{each}-file={self.folder}/munge.{each}" for each in ("key", "pid", "log", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *files)
        wait_until((self.folder / "munge.socket").exists, 10, "munged's socket")
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        wait_until(lambda: self.node_states() == ["idle", "idle"], 30, "two idle nodes")

    def stop(self) -> list[str]:
        """End all jobs and daemons; returns what had to be killed."""
        with contextlib.suppress(AssertionError, subprocess.CalledProcessError):
            self.run("scancel", "--user", getpass.getuser())
            wait_until(lambda: not self.run("squeue", "--noheader"), 60, "the end of all jobs")
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        left = self.processes()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return list(left.values())

    def processes(self) -> dict[int, str]:
        """Every process that has this cluster's configuration in its environment, and every fork; but not this one's
        children.
        """
        mark = f"SLURM_CONF={self.folder / 'slurm.conf'}".encode()
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                of_job = os.getsid(int(path.name)) == self.daemons[0].pid
                if of_job or mark in (path / "environ").read_bytes().split(b"\0"):
                    found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def node_states(self) -> list[str]:
        return self.run("sinfo", "--noheader", "--Node", "--partition=low", "--format=%t").split()

    def run(self, *command: str, **variables: str) -> str:
        """Output of one of SLURM's commands, run in the checkout."""
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment | variables, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def train(self, *overrides: str, options: tuple[str, ...] = (), interpreter: bool = False, **variables: str) -> int:
        """Submit launch/train.sbatch, one GPU on each node unless options say otherwise; returns the job's number.

        interpreter: whether Python itself starts in the job; without it, forks of one that has imported torch.
        """
        if not interpreter:
            variables["PATH"] = f"{self.folder}/warm:{self.environment['PATH']}"
        small = ("--gpus-per-node=1", "--cpus-per-gpu=1", f"--output={self.folder}/%j.out")
        words = last_of_each(overrides)
        job = self.run("sbatch", "--parsable", *small, *options, "launch/train.sbatch", *words, **variables)
        return int(job)

    def output(self, job: int) -> str:
        """What the job's batch script and tasks have printed, over all its starts."""
        path = self.folder / f"{job}.out"
        return path.read_text() if path.exists() else ""

    def state(self, job: int | str) -> str:
        """Its state in SLURM's words."""
        return self.field(job, "JobState")

    def field(self, job: int | str, name: str) -> str:
        """A field of scontrol show job."""
        words = self.run("scontrol", "--oneliner", "show", "job", str(job)).split()
        return dict(word.partition("=")[::2] for word in words)[name]

    def wait(self, job: int | str, *states: str, timeout_sec: float = 120) -> str:
        """Wait for one of the states, and return it; an end in another one fails the test with the job's output."""
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", *states}
        state = ""

        def ended() -> bool:
            nonlocal state
            state = self.state(job)
            return state in ends

        wait_until(ended, timeout_sec, f"job {job}: {states}")
        number = int(str(job).partition("_")[0])
        assert state in states, f"job {job} is {state}, not {states}:\n{self.output(number)}"
        return state

    def _daemon(self, program: str, *arguments: str) -> None:
        """A child that ends with this process, however that ends."""
        command = ["setpriv", "--pdeathsig", "TERM", program, *arguments]
        with open(self.folder / f"{program}.out", "ab") as log:
            self.daemons.append(
                subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
            )


def wait_until(condition, timeout_sec: float, what: str) -> None:
    deadline = time.monotonic() + timeout_sec
    while not condition():
        assert time.monotonic() < deadline, f"after {timeout_sec} s still no {what}"
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
