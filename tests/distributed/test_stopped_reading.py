"""A stop ends the reading of weights and checkpoints at once: a giant's take minutes, and nothing is lost with it."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time

import pytest
import torch

from swinv2_train.config import EXIT_STOPPED, ConfigError
from swinv2_train.distributed import World, on_main
from swinv2_train.distributed.interruptible import main_alone
from swinv2_train.engine import build_engine
from swinv2_train.engine.state import files
from swinv2_train.runtime import StopNow, StopRequest
from swinv2_train.storage.lazy_tensors import LazyTensor, LazyTensors
from swinv2_train.training.param_groups import build_param_groups
from tests.support.commands import OWN_SESSION, command, finish
from tests.support.harness import run_distributed, warm_up
from tests.support.processes import forked, forked_command
from tests.support.shard_files import ten_class_shards
from tests.support.toy import build_toy, save_state, toy_config

HANGS_SEC = 60


class Stopped:
    """What is read for the second time sends this process a stop and then takes a minute."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(HANGS_SEC)


class Zeros:
    """Initial values of any model."""

    def fill(self, target: torch.Tensor, name: str, start: int) -> None:
        target.zero_()


def outcome(function) -> str:
    try:
        function()
    except (StopNow, ConfigError) as raised:
        return f"{type(raised).__name__}: {raised}"
    return "went on"


@pytest.mark.parametrize(("name", "stage", "ranks"), [("local", 0, 1), ("deepspeed", 1, 2), ("deepspeed", 3, 2)])
def test_engines_end_what_they_read_on_every_rank(name, stage, ranks, tmp_path):
    """Weights are rank 0's to read, and the others wait for each; states and first values are everyone's own."""

    def run(world: World) -> tuple[list[str], list[int], str]:
        config = toy_config(name, stage)
        module = build_toy()
        engine = build_engine(module, build_param_groups(module, config.optim), config, world, 1, ())
        save_state(engine, tmp_path / "state")
        counts = [Stopped() for _ in range(3)]

        def weight(name: str, value: torch.Tensor) -> LazyTensor:
            def read() -> torch.Tensor:
                counts[0]()
                return value

            return LazyTensor(tuple(value.shape), value.dtype, read)

        weights = LazyTensors({name: weight(name, value) for name, value in build_toy().state_dict().items()})
        with StopRequest() as stop:
            said = [outcome(lambda: engine.load_full(weights if world.is_main else None, stop))]
        for patched, count, call in (
            (Zeros, counts[1], lambda: engine.initialise(Zeros(), stop)),
            (files.StateFiles, counts[2], lambda: engine.load(tmp_path / "state", stop)),
        ):
            fill = patched.fill

            def slow(*arguments, fill=fill, count=count):
                fill(*arguments)
                if world.rank == world.world_size - 1:
                    count()

            patched.fill = slow
            with StopRequest() as stop:
                said.append(outcome(call))
            patched.fill = fill
        return said, [count.calls for count in counts], on_main(world, lambda: "still together")

    for rank, (said, calls, together) in enumerate(run_distributed(run, ranks, timeout_sec=HANGS_SEC)):
        assert said == ["StopNow: SIGTERM"] * 3 and together == "still together"
        last = 2 if rank == ranks - 1 else 0
        assert calls == [0 if rank else 2, last, last]


def test_what_rank_0_does_alone_is_kept_there_and_its_error_is_everyones():
    def run(world: World) -> tuple[object, str]:
        def refuse() -> None:
            raise ConfigError("a damaged file")

        return main_alone(world, None, lambda: "big"), outcome(lambda: main_alone(world, None, refuse))

    said = "ConfigError: rank 0: a damaged file"
    assert run_distributed(run, 2, timeout_sec=30) == [("big", said), (None, said)]


@pytest.mark.slow
def test_a_run_that_is_stopped_while_it_reads_says_so_and_ends(tmp_path):
    """As the whole command: while task.init_from is opened, while its tensors are read, and while a run resumes."""
    ten_class_shards(tmp_path / "shards")
    common = (
        f"data.shards='{tmp_path}/shards/train-{{000000..000002}}.tar'", "data.eval_shards=null", "engine=local",
        "engine.precision=fp32", "data.num_workers=0",
    )  # fmt: skip
    code, output = finish(
        forked_command("swinv2_train.train", *command(tmp_path / "first", *common, "train.max_steps=1"), **OWN_SESSION)
    )
    assert code == 0, output
    warm_up()
    main = importlib.import_module("swinv2_train.train").main
    weights = (*common, f"task.init_from={tmp_path / 'first'}")
    for run, overrides, slow, code in (
        ("opened", weights, "check_files", 128 + signal.SIGTERM),
        ("read", weights, "read", 128 + signal.SIGTERM),
        ("first", common, "fill", EXIT_STOPPED),
    ):
        arguments = command(tmp_path / run, *overrides)

        reading = tmp_path / f"reading {run}"

        def body(slow=slow, arguments=arguments, reading=reading) -> None:
            def wait(*_):
                reading.touch()
                time.sleep(HANGS_SEC)

            setattr(files.StateFiles, slow, wait)
            sys.argv = ["swinv2_train.train", *arguments]
            main()

        process = forked(body, **OWN_SESSION)
        while not reading.exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=HANGS_SEC / 2)
        assert process.returncode == code, (run, output)
        goes_on = "resumes" if run == "first" else "begins again"
        assert f"stopped by SIGTERM before the first step; the same command {goes_on}" in output, run
