"""Training out of pipes with the real command: stop and resume, and what a pipe that breaks does to all ranks."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from swinv2_train.checkpoint import newest_checkpoint
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR
from swinv2_train.data.sources.pipe import NOT_ELASTIC
from tests.support.commands import alone, command, finish, finish_ranks, keys_per_step, losses, start, wait_for_step

pytestmark = pytest.mark.slow
STEPS = ("optim.schedule.warmup_steps=2", "data.shuffle_buffer_images=10", "data.record_keys=true")


@pytest.fixture(scope="module")
def folder(shards) -> Path:
    """train-000000.tar .. train-000002.tar with 20 images each, and test-000000.tar."""
    return Path(shards[0].removeprefix("data.shards=")).parent


def pipe(folder: Path, text: str = "cat {folder}/train-{{000000..000002}}.tar") -> str:
    return f"data.shards='pipe:{text.format(folder=folder)}'"


def test_a_pipe_trains_on_two_ranks_stops_and_resumes(folder, tmp_path):
    """Its 60 images come on both ranks; said once, Ctrl-C stops as ever, and the stream starts anew at the resume."""
    overrides = (pipe(folder), f"data.eval_shards={folder}/test-*.tar", "data.num_workers=2", *STEPS)
    process = start(*command(tmp_path, "train.max_steps=100000", *overrides))
    wait_for_step(tmp_path, 20, process)  # four passes
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does: torchrun, ranks, workers and commands
    _, output = finish(process)
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None and "stopped by SIGINT" in output, output
    assert output.count(NOT_ELASTIC) == 1
    step = int(checkpoint.name.removeprefix("step_"))
    assert len({key for keys in keys_per_step(tmp_path).values() for key in keys}) == 60
    code, output = finish_ranks(*command(tmp_path, f"train.max_steps={step + 4}", *overrides))
    assert code == EXIT_DONE and f"resuming from {checkpoint}" in output and output.count(NOT_ELASTIC) == 1, output
    state = json.loads((tmp_path / "checkpoints" / f"step_{step + 4:08d}" / "state.json").read_text())
    assert state["images_seen"] == 16 * (step + 4)
    assert sorted(losses(tmp_path)) == list(range(1, step + 5))
    keys = keys_per_step(tmp_path)
    assert [keys[n] for n in range(step + 1, step + 5)] != [keys[n] for n in range(1, 5)], "the same images again"
    code, output = finish(alone(tmp_path, f"data.shards={folder}/train-*.tar", "data.eval_shards=null"))
    assert code == EXIT_USER_ERROR and "data.shards are not the shards of the checkpoint" in output, output


def test_a_pipe_that_breaks_ends_all_ranks_with_its_name(folder, tmp_path):
    """The second rank's command fails in its second pass; the last checkpoint stays."""
    flag = tmp_path / "flag"
    text = f"cat {{folder}}/train-000000.tar::pipe:cat {{folder}}/train-000001.tar; test ! -e {flag}"
    process = start(
        *command(tmp_path / "run", "train.max_steps=100000", pipe(folder, text), "data.eval_shards=null", *STEPS)
    )
    wait_for_step(tmp_path / "run", 6, process)
    flag.touch()
    code, output = finish(process)
    assert code == EXIT_FAILED and newest_checkpoint(tmp_path / "run") is not None
    assert "error: rank 1: pipe:cat " in output and "the command failed (exit status 1, after" in output, output
