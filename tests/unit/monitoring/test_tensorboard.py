"""log.tensorboard: event files, read back by TensorBoard's own reader."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from swinv2_train.config import ConfigError, LogConfig
from swinv2_train.monitoring.run_log import RunLog
from swinv2_train.training.preflight import preflight
from tests.support.configs import composed
from tests.support.small_run import run_alone


class Lines:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def log_of(run_dir: Path, console: Lines, is_main: bool = True) -> RunLog:
    config = LogConfig(
        wandb="disabled", wandb_project="p", wandb_name=None, wandb_artifacts=[], tensorboard=True, progress="none"
    )
    return RunLog(run_dir, config, console, is_main, {"seed": 7, "data": {"shards": "https://a.b/c?sig=verysecret"}})  # type: ignore[arg-type]


def events(run_dir: Path) -> EventAccumulator:
    return EventAccumulator(
        str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0}
    ).Reload()


def test_steps_that_are_run_again_are_shown_once(tmp_path):
    for first, last, scale in ((1, 4, 1.0), (3, 5, 10.0)):  # killed after step 4, resumed from the checkpoint of step 2
        log = log_of(tmp_path, Lines())
        log.resume_at(first - 1)
        for step in range(first, last + 1):
            log.metrics(step, step * 64, {"train/loss": scale / step, "train/grad_norm": float("nan")})
        log.close()
    read = events(tmp_path)
    losses = {event.step: event.value for event in read.Scalars("train/loss")}
    assert losses == pytest.approx({1: 1.0, 2: 0.5, 3: 10 / 3, 4: 2.5, 5: 2.0})
    assert [event.step for event in read.Scalars("images_seen")] == [1, 2, 3, 4, 5]
    assert "train/grad_norm" not in read.Tags()["scalars"]


def test_pictures_and_the_configuration_are_there_but_no_secret(tmp_path):
    log = log_of(tmp_path, Lines())
    log.resume_at(0)
    log.picture("reconstruction", 3, np.full((8, 9, 3), 200, np.uint8))
    log.close()
    read = events(tmp_path)
    (image,) = read.Images("pictures/reconstruction")
    pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    assert (image.step, pixels.shape, int(pixels.min()), int(pixels.max())) == (3, (8, 9, 3), 200, 200)
    (text,) = read.Tensors("config/text_summary")
    assert b'"seed": 7' in text.tensor_proto.string_val[0]
    assert all(b"verysecret" not in path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())


def test_only_rank_0_writes(tmp_path):
    log = log_of(tmp_path, Lines(), is_main=False)
    log.resume_at(0)
    log.metrics(1, 64, {"train/loss": 1.0})
    log.close()
    assert not list(tmp_path.iterdir())


def test_what_ails_it_is_said_once_and_the_run_goes_on(tmp_path):
    console = Lines()
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    log = log_of(tmp_path, console)
    log.resume_at(0)
    for step in (1, 2):
        log.metrics(step, step, {"train/loss": 1.0})
    log.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert len(console.lines) == 1 and console.lines[0].startswith("warning: TensorBoard's files stopped (")


def test_without_the_package_a_run_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as where it is not installed
    config = composed(["run_dir=r", "data.shards=s.tar", "task=simmim", "log.tensorboard=true"])
    with pytest.raises(ConfigError, match="log.tensorboard=true needs tensorboard.*pip install tensorboard"):
        preflight(config, training=True)
    preflight(config, training=False)  # weights are read without it


@pytest.mark.slow
def test_a_run_and_its_resume(settings, tmp_path):
    for steps in (1, 2):
        run_alone(settings(f"train.max_steps={steps}", "log.tensorboard=true", "train.log_every_steps=1"))
    assert [event.step for event in events(tmp_path / "run").Scalars("train/loss")] == [1, 2]
