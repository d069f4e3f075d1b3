"""The composed scenes and the demo that trains on them: exact label images, a function of the number, honest tables."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from scripts import compose_scenes, demo, demo_segment, two_starts
from scripts.compose_scenes import IGNORE, KINDS, composed, find_fashion, find_photographs, label_image
from scripts.package_files import FetchError
from swinv2_train import train
from swinv2_train.config import SegmentConfig, SimMIMConfig
from swinv2_train.config.command_line import compose_overrides, guarded
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_STOPPED
from swinv2_train.training import loop
from tests.support.harness import run_distributed


def test_a_scene_is_a_function_of_its_number_and_its_labels_are_where_garments_are(fashion):
    """On a blue photograph, garments of another one's red: colour and class are the same pixels."""
    photographs = [np.full((100, 120, 3), colour, np.uint8) for colour in ((0, 0, 80), (0, 0, 90))]
    kind, found = KINDS["pixels"], set()
    side = kind.side_px
    for number in range(12):
        (image, placed), again = (composed(number, "train", fashion, photographs, kind) for _ in range(2))
        labels = label_image(placed)
        assert np.array_equal(image, again[0]) and np.array_equal(labels, label_image(again[1]))
        assert image.shape == (side, side, 3) and set(np.unique(labels)) <= {0, 1, 4, 8, 10, IGNORE}
        garment = (labels != 0) & (labels != IGNORE)
        assert (image[labels == 0][:, 2] <= 90).all()  # the photograph
        assert np.median(image[garment][:, 2]) > 200  # as bright as the colour can be
        around = np.pad(labels, 1, constant_values=IGNORE)
        last = side + 1
        neighbours = [around[1 + dy : last + dy, 1 + dx : last + dx] for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0))]
        assert not any(((each == 0) & garment).any() for each in neighbours)  # the rim lies between
        found.add(image.tobytes())
    assert len(found) == 12


def test_pictures_of_somebody_else_are_refused(fashion, tmp_path):
    with pytest.raises(FetchError, match=r"train-images-idx3-ubyte.gz: sha256 .*, wanted"):
        find_fashion(tmp_path, fashion)
    (fashion / "photographs").mkdir()
    with pytest.raises(FetchError, match="has no astronaut.png"):
        find_photographs(tmp_path, fashion / "photographs")


def test_both_ways_of_training_differ_in_the_initial_weights_alone(tmp_path):
    phases = demo_segment.phases_of(tmp_path, Path("data/scenes"), 2, ["train.epochs=3", "task.mask_ratio=0.5"])
    configs = {each.run_dir.name: compose_overrides(each.command) for each in phases}
    assert list(configs) == [
        "pretrain", "from-scratch-0", "from-simmim-weights-0", "from-scratch-1", "from-simmim-weights-1"
    ]  # fmt: skip
    pretrain = configs.pop("pretrain")
    assert isinstance(pretrain.task, SimMIMConfig) and pretrain.task.mask_ratio == 0.5 and pretrain.train.epochs == 3
    for seed in (0, 1):
        scratch, simmim = configs[f"from-scratch-{seed}"], configs[f"from-simmim-weights-{seed}"]
        assert isinstance(scratch.task, SegmentConfig) and scratch.task.init_from is None and scratch.seed == seed
        assert simmim.task.init_from == str(tmp_path / "pretrain")
        simmim.task.init_from, simmim.run_dir = scratch.task.init_from, scratch.run_dir
        assert simmim == scratch


def test_the_table_has_mean_and_spread_over_seeds():
    runs = [
        {"val/miou": 10.0, "val/macc": 20.0, "val/aacc": 30.0},
        {"val/miou": 12.0, "val/macc": 20.0, "val/aacc": 30.0},
    ]
    found = {"from scratch": runs, "from SimMIM weights": runs[:1]}
    rows = two_starts.table("trained on", found, demo_segment.SCORES).splitlines()
    assert rows[2].startswith("| from scratch | 2 | 11.00 (sd 1.41; 10.00, 12.00) | 20.00 (sd 0.00;")
    assert rows[3] == "| from SimMIM weights | 1 | 10.00 | 20.00 | 30.00 |"


SHORT = (
    "model.embed_dim=8", "model.depths=[1,1,1,1]", "task.head_channels=8", "task.aux_channels=4", "train.epochs=null",
    "train.max_steps=2", "train.global_batch_size=4", "train.micro_batch_size=2", "optim.schedule.warmup_steps=1",
    "optim.schedule.warmup_epochs=null", "engine=local", "runtime.num_threads=1", "log.wandb=disabled",
    "log.progress=none",
)  # fmt: skip


@pytest.mark.slow
def test_a_shortened_demo_that_is_stopped_in_each_kind_of_phase_ends_as_one_that_is_not(
    fashion, tmp_path, monkeypatch, capsys
):
    """The script, the packer, the training and the tables are the real ones; garments are squares."""
    few = replace(KINDS["pixels"], sizes={"train": 8, "test": 3}, samples_per_shard=4)
    monkeypatch.setitem(compose_scenes.KINDS, "pixels", few)
    colours = np.random.default_rng(0).integers(0, 256, (2, 100, 120, 3), dtype=np.uint8)
    monkeypatch.setattr(compose_scenes, "find_fashion", lambda raw, given: fashion)
    monkeypatch.setattr(compose_scenes, "find_photographs", lambda raw, given: {"train": colours, "test": colours})
    phases: list[str] = []
    stopping = False

    def torchrun(command: list[str]) -> int:
        config = compose_overrides(command[command.index("swinv2_train.train") + 1 :])
        phases.append(Path(config.run_dir).name)
        stopped = Path(f"{config.run_dir}.stopped")

        def rank(_: object) -> int:
            step = loop.take_step

            def step_and_ctrl_c(*arguments: object) -> object:
                if stopping and not stopped.exists() and arguments[0].position.step == 1:
                    stopped.touch()
                    os.kill(os.getpid(), signal.SIGINT)
                return step(*arguments)

            loop.take_step = step_and_ctrl_c
            return guarded(lambda: train.train(config))

        return run_distributed(rank, 1, init=False)[0]

    monkeypatch.setattr(demo, "torchrun", torchrun)

    def call(runs: str) -> int:
        where = ["--runs", str(tmp_path / runs), "--data", str(tmp_path / "scenes"), "--seeds", "1"]
        return demo_segment.main([*where, *SHORT])

    def rows() -> list[str]:
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("| from")]

    assert call("whole") == EXIT_DONE
    wanted = rows()
    assert len(wanted) == 2 and phases == ["pretrain", "from-scratch-0", "from-simmim-weights-0"]
    stopping = True
    for done in range(3):  # each call ends the phase that the one before has stopped, and is stopped in the next
        phases.clear()
        assert call("stopped") == EXIT_STOPPED and len(phases) == done + 1
    assert "stopped; `make demo-segment` goes on from there" in capsys.readouterr().out
    assert call("stopped") == EXIT_DONE and rows() == wanted
