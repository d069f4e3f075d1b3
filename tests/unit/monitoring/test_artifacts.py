"""log.wandb_artifacts: what wandb keeps of a complete run, read back from the file that `wandb sync` sends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from swinv2_train.config import ConfigError
from swinv2_train.config.exit_codes import EXIT_DONE
from swinv2_train.weights import read_weights
from tests.support.configs import composed
from tests.support.small_run import run_alone, weights_of
from tests.unit.monitoring.test_run_log import read_wandb_records

pytestmark = pytest.mark.slow


@pytest.mark.timeout(120)
def test_weights_and_pictures_of_a_complete_run(settings, tmp_path):
    config = settings(
        "train.max_steps=2", "log.wandb=offline", "log.wandb_artifacts=[weights,pictures]", "task.mask_unit_px=4",
        task="simmim",
    )  # fmt: skip
    assert run_alone(config) == EXIT_DONE
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    artifacts = {each.artifact.type: each.artifact for each in read_wandb_records(file) if each.HasField("artifact")}
    pictures = sorted(str(path) for path in (tmp_path / "run" / "pictures").glob("simmim_*.png"))
    assert pictures and [entry.local_path for entry in artifacts["pictures"].manifest.contents] == pictures
    (entry,) = artifacts["weights"].manifest.contents
    assert entry.path == "weights_00000002.safetensors" and Path(entry.local_path).parent == tmp_path / "run" / "wandb"
    kept, trained = read_weights(entry.local_path), weights_of(config)
    encoder = {name for name in trained if name.startswith("encoder.")}
    assert encoder and all(torch.equal(kept[name], trained[name]) for name in encoder & set(kept))
    assert len(set(kept) & set(trained)) > 10


def test_other_artifacts_are_refused():
    with pytest.raises(ConfigError, match=r"log.wandb_artifacts \(code\) is none of pictures, weights"):
        composed(["run_dir=r", "data.shards=s.tar", "log.wandb_artifacts=[weights,code]"])
