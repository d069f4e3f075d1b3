"""Where a training step on CUDA waits for the device, and the copies that run ahead of it.  Skipped without a device;
tests/unit/training/test_step.py counts the same on a CPU by what the host reads."""

from __future__ import annotations

import multiprocessing
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from swinv2_train import train
from swinv2_train.config.command_line import guarded
from swinv2_train.config.exit_codes import EXIT_DONE
from swinv2_train.runtime import StopRequest
from swinv2_train.training import loop
from swinv2_train.training.prefetch import Copies
from tests.support.shard_files import noise_shards
from tests.unit.training.test_step import place, six_steps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> tuple[str, str]:
    """16 training images and 6 of evaluation, of 4 classes."""
    return noise_shards(tmp_path_factory.mktemp("shards"))


def watched_run(config: Any) -> tuple[int, dict[int, Counter[str]]]:
    """A run's exit code, and where torch's own operations made the host wait, by the step before which they did."""
    found: dict[int, Counter[str]] = {}
    fit = loop.fit

    def watched(run: loop.Run, stop: StopRequest) -> bool:
        def note(message: Any, *where: Any, **more: Any) -> None:
            if "synchroniz" in str(message):
                found.setdefault(run.position.step + 1, Counter())[place()] += 1

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return fit(run, stop)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    loop.fit = watched
    return guarded(lambda: train.train(config)), found


@pytest.mark.parametrize(
    ("engine", "task"), [("local", "finetune"), ("zero1", "simmim"), ("zero2", "finetune"), ("zero3", "simmim")]
)
def test_a_step_without_a_log_line_waits_only_after_its_backward_pass(engine, task, shards, tmp_path):
    """Between the last backward pass and the optimizer, for the ranks' agreement and the gradient norm; and where
    DeepSpeed itself waits for its streams: after every backward pass and, on one GPU, for every gathered module."""
    config = six_steps(engine, task, tmp_path / "run", shards, "data.num_workers=2")
    # a new interpreter: other tests may have begun to use the device in this one, and then a fork cannot
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        code, found = process.submit(watched_run, config).result(timeout=300)
    assert code == EXIT_DONE
    for step in (3, 4):
        assert set(found[step]) - {"deepspeed"} == {"agreement", "optimizer"}, found
    assert found[5]["elsewhere"] > 0, "step 4 is logged, so a wait can be seen at all"


def test_copies_arrive_whole_and_in_order():
    """Each batch is copied by another stream while work on the one before still runs; nothing else is changed."""
    device = torch.device("cuda")
    batches = [{"images": torch.full((64, 3, 64, 64), n).pin_memory(), "keys": [str(n)]} for n in range(20)]
    sums = []
    busy = torch.randn(2048, 2048, device=device)
    for number, batch in enumerate(Copies(batches, device, torch.cuda.Stream(device))):
        busy = (busy @ busy).clamp(-1, 1)
        assert batch["keys"] == [str(number)] and batch["images"].device.type == "cuda"
        sums.append(batch["images"].sum())
        del batch  # its memory may be taken for the next copy only when the sum is done
    assert [int(each) for each in sums] == [n * 64 * 3 * 64 * 64 for n in range(20)]
