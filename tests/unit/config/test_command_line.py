"""How a command ends: exit codes, one message from one rank, and no second run in the same process."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys

import pytest
from omegaconf import ListConfig
from omegaconf.errors import ValidationError

from swinv2_train.config import ConfigError
from swinv2_train.config.command_line import compose_argv, compose_overrides, guarded, run_command, stoppable
from swinv2_train.config.exit_codes import EXIT_FAILED, EXIT_STOPPED, EXIT_USER_ERROR
from tests.support.processes import finished, forked_code


def refuse() -> int:
    raise ConfigError("lr is wrong")


def test_wrong_input_is_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    assert guarded(refuse) == EXIT_USER_ERROR == 2
    assert capsys.readouterr().err == "error: lr is wrong\n"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_command_with_nothing_to_save_ends_at_a_signal_with_a_line(name: str) -> None:
    """Packing, planning, evaluating: no traceback, a `finally` has its turn, and the exit code says so."""
    code = f"""
import os, signal, sys, time
from swinv2_train.config.command_line import stoppable
def work():
    try:
        os.kill(os.getpid(), signal.{name})
        time.sleep(20)
    finally:
        print("cleaned up", flush=True)
sys.exit(stoppable(work))
"""
    done = finished(forked_code(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    assert done.returncode == EXIT_STOPPED and done.stdout == "cleaned up\n"
    assert done.stderr == f"stopped by {name}\n"


def test_signals_mean_after_a_command_what_they_meant_before():
    """A process that ran one in a function would give its forks a SIGTERM that does not end them."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    assert stoppable(lambda: 7) == 7
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize(("of_all", "of_host"), [("RANK", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_LOCALID")])
@pytest.mark.parametrize(
    ("rank", "local_rank", "said"),
    [
        ("0", "0", "error: lr is wrong\n"),
        ("1", "1", ""),
        ("8", "0", "error: rank 8 on HOST: lr is wrong\n"),
    ],
)
def test_wrong_input_is_said_by_each_hosts_first_rank(rank, local_rank, said, of_all, of_host, monkeypatch, capsys):
    """Else a job of 64 ranks says it 64 times; and rank 0 may be waiting for the host that is refused."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(of_all, rank)
    monkeypatch.setenv(of_host, local_rank)
    monkeypatch.setattr(socket, "gethostname", lambda: "HOST")
    assert guarded(refuse) == EXIT_USER_ERROR
    assert capsys.readouterr().err == said


def test_a_bug_is_a_traceback_and_exit_code_1(capsys):
    assert guarded(lambda: 1 // 0) == EXIT_FAILED == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_an_interrupt_in_the_middle_of_a_composition_is_one(monkeypatch, capsys):
    """Not wrong input without a word: OmegaConf's own tidying up fails over a list that Ctrl-C has left half-made."""

    def append(self: ListConfig, item: object) -> None:
        self._get_flag("readonly")  # whose answer it keeps, for as long as the list is whole
        vars(self)["_content"].append(None)
        raise KeyboardInterrupt

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(ListConfig, "append", append)
    assert guarded(lambda: compose_overrides(["model.depths=[1,2]"]) is None) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"


def test_a_complaint_of_hydras_without_words_is_that_of_its_cause(monkeypatch, capsys):
    def append(self: ListConfig, item: object) -> None:
        raise ValidationError("no such list")

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(ListConfig, "append", append)
    assert guarded(lambda: compose_overrides(["model.depths=[1,2]"]) is None) == EXIT_USER_ERROR
    assert capsys.readouterr().err.startswith("error: no such list ")


def test_exit_code_of_the_run_is_the_commands_own(monkeypatch, capsys):
    """3 tells a scheduler that the same command goes on; --cfg runs nothing and is 0."""
    monkeypatch.setattr(sys, "argv", ["train", "experiment=cifar10_simmim"])
    with pytest.raises(SystemExit) as left:
        run_command(lambda config: EXIT_STOPPED)
    assert left.value.code == EXIT_STOPPED
    monkeypatch.setattr(sys, "argv", ["train", "experiment=cifar10_simmim", "--cfg", "job"])
    with pytest.raises(SystemExit) as left:
        run_command(lambda config: pytest.fail("--cfg must not run"))
    assert left.value.code == 0 and "mask_unit_px: 8" in capsys.readouterr().out


def test_several_runs_in_one_process_are_refused(monkeypatch, tmp_path, capsys):
    """--multirun would train them one after another under one run_dir, and leave directories of Hydra's."""
    monkeypatch.chdir(tmp_path)
    for flag, seeds in (("--multirun", "1,2"), ("-m", "1")):
        monkeypatch.setattr(sys, "argv", ["train", flag, "experiment=cifar10_simmim", f"seed={seeds}"])
        with pytest.raises(ConfigError, match="--multirun starts one run .* sbatch --array=1-N launch/train.sbatch"):
            compose_argv()
    assert not list(tmp_path.iterdir())
