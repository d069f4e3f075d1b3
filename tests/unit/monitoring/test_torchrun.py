"""What torchrun makes of ranks that fail, alone and as launch/torchrun.sh starts it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import PContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from swinv2_train.monitoring.signs import STATUS
from swinv2_train.monitoring.torchrun import TRAIN, run_ranks
from swinv2_train.status import read_status
from tests.support.processes import finished, forked


def start(body: Callable[[], object], folder: Path) -> subprocess.Popen[str]:
    """torchrun as a fork of this process; its ranks are interpreters of their own."""
    return forked(body, environment={"TMPDIR": str(folder)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def ranks(code: str, folder: Path) -> list[str]:
    """torchrun's arguments for two ranks that run this code."""
    (folder / "rank.py").write_text(f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{code}")
    return ["--standalone", "--nproc-per-node", "2", str(folder / "rank.py")]


@pytest.fixture
def ended(tmp_path) -> Callable[[str], tuple[int, str]]:
    """ended(CODE): exit code and output of run_ranks with two ranks of this code."""

    def end(code: str) -> tuple[int, str]:
        import tempfile

        (tmp_path / "tmp").mkdir(exist_ok=True)

        def body() -> None:
            tempfile.tempdir = None
            raise SystemExit(run_ranks(ranks(code, tmp_path)))

        done = finished(start(body, tmp_path / "tmp"))
        assert list((tmp_path / "tmp").iterdir()) == [], "left in the temporary folder"
        return done.returncode, done.stdout

    return end


WRONG_INPUT = """
from swinv2_train.config import ConfigError
from swinv2_train.config.command_line import guarded

def command():
    time.sleep(0 if rank else 2)  # who speaks is behind
    raise ConfigError("lr is wrong")

sys.exit(guarded(command))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "expected", "said"),
    [
        (WRONG_INPUT, 2, "error: lr is wrong\n"),
        ("", 0, ""),
        ("if rank: time.sleep(20)\nprint('error: lr is wrong'); sys.exit(2)", 2, "error: lr is wrong\n"),
        ("sys.exit(3)", 3, ""),
        ("if rank: sys.exit(1)\ntime.sleep(20)", 1, ""),
        ("if rank: os.kill(os.getpid(), 9)\ntime.sleep(20)", 137, "error: rank 1 (process PID) was ended by SIGKILL\n"),
    ],
)
def test_a_failure_is_what_the_ranks_say_and_their_exit_code(code, expected, said, ended):
    """Not 1 for everything, behind thirty lines of torchrun's; and nothing stays in the temporary folder."""
    status, output = ended(code)
    words = ["PID" if word.isdigit() and len(word) > 1 else word for word in output.replace(")", " )").split()]
    assert status == expected and " ".join(words).replace(" )", ")") == said.replace("\n", " ").strip(), output


def test_a_signal_reaches_the_ranks_and_is_the_exit_code(tmp_path):
    """torchrun hears it, passes it on and waits: they have said what they saved."""
    code = """
def stop(*_):
    os.write(1, b"saved\\n")  # whole lines of two processes
    sys.exit(3)
signal.signal(signal.SIGTERM, stop)
os.write(1, b"ready\\n")
time.sleep(30)
"""
    arguments = ranks(code, tmp_path)

    def body() -> None:
        watch = PContext.wait

        def said(*more: Any) -> Any:
            PContext.wait = watch
            os.write(1, b"watched\n")
            return watch(*more)

        PContext.wait = said
        raise SystemExit(run_ranks(arguments))

    process = start(body, tmp_path)
    assert process.stdout is not None
    assert sorted(process.stdout.readline() for _ in range(3)) == ["ready\n", "ready\n", "watched\n"]
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=240)
    assert (process.returncode, output) == (128 + signal.SIGTERM, "saved\nsaved\n")


@pytest.mark.parametrize(
    ("codes", "expected"), [((1, -15), 1), ((2, 2), 2), ((-15, 2), 2), ((3, 3), 3), ((-9, 1), 137), ((-15, -15), 143)]
)
def test_the_exit_code_is_of_the_rank_that_failed_by_itself(codes, expected, monkeypatch):
    """torchrun ends the others by SIGTERM."""

    def fail(arguments: list[str]) -> None:
        failures = {rank: ProcessFailure(rank, 1, code, "<none>") for rank, code in enumerate(codes)}
        raise ChildFailedError("train", failures)

    monkeypatch.setattr(run, "main", fail)
    assert run_ranks(["-m", "x"]) == expected


def alone(rank: int, port: int, *what: str) -> subprocess.CompletedProcess[str]:
    """torchrun on one of two nodes, the other of which never comes."""
    where = ["--nnodes", "2", "--node-rank", str(rank), "--master-addr", "127.0.0.1", "--master-port", str(port)]

    def body() -> None:
        raise SystemExit(run_ranks([*where, "--rdzv-conf", "timeout=1", "--nproc-per-node", "2", *what]))

    return finished(forked(body, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))


@pytest.fixture
def port() -> Iterator[int]:
    """Of this host, and taken by a program that nobody meets at."""
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        yield taken.getsockname()[1]


NOBODYS = 1


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_nodes_that_do_not_meet_are_an_outage_of_their_run(rank, tmp_path):
    """The first node waits for the others, the others for the first; what torch's C++ has logged is out of reach."""
    run_dir = tmp_path / "run = 1"
    run_dir.mkdir()  # train.sbatch keeps its code there
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = free.getsockname()[1] if rank == 0 else NOBODYS
    run = ("experiment=cifar10_simmim", f"run_dir='{run_dir}'", "data.shards=t.tar")
    done = alone(rank, meeting, "-m", TRAIN, *run)
    last = done.stdout.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error: torchrun cannot start the ranks: "), done.stdout
    assert "Traceback" not in done.stdout
    status = read_status(run_dir)
    assert (status["state"], status["outage"], status["step"], status["world_size"]) == ("failed", True, 0, 4)
    assert f"error: {status['reason']}" == last and '"outage": true' in (run_dir / STATUS).read_text()


@pytest.mark.slow
def test_what_is_no_outage_or_no_run_is_not_written_down(port, tmp_path):
    """A port that another program has; another command; a run that is not there, or whose command is wrong."""
    run = ("-m", TRAIN, "experiment=cifar10_simmim", f"run_dir={tmp_path}", "data.shards=t.tar")
    assert "failed to listen" in alone(0, port, *run).stdout
    assert alone(1, NOBODYS, "-m", "json.tool", f"run_dir={tmp_path}").returncode == 1
    assert alone(1, NOBODYS, *run, "optim.lrr=1").returncode == 1
    assert not list(tmp_path.iterdir())
    assert alone(1, NOBODYS, *run[:3], f"run_dir={tmp_path / 'gone'}", run[-1]).returncode == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_torchruns_own_report_ends_with_our_message(tmp_path):
    """Where it is started without launch/torchrun.sh it cannot be cut, but it can tell why, of each rank."""
    code = f"""
from pathlib import Path
from swinv2_train.config import ConfigError
from swinv2_train.config.command_line import guarded
def refuse():
    raise ConfigError("lr is wrong")
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, when the other has failed: this one fails by itself too
here = Path({str(tmp_path)!r})
(here / str(rank)).touch()
while not (here / str(1 - rank)).exists():
    time.sleep(0.01)
sys.exit(guarded(refuse))
"""
    done = finished(start(lambda: run.main(ranks(code, tmp_path)), tmp_path))
    assert done.returncode == 1 and done.stdout.count("traceback : error: lr is wrong\n") == 2, done.stdout
    assert "To enable traceback" not in done.stdout and "new message format" not in done.stdout
