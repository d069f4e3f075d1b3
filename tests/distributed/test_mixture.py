"""A mixture of sources under the train command: killed, resumed on other numbers of ranks, its losses by source."""

from __future__ import annotations

import json
import math
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from swinv2_train.config import ConfigError
from swinv2_train.config.command_line import guarded
from swinv2_train.monitoring.run_log import read_metrics
from swinv2_train.train import train as train_run
from swinv2_train.training import loop
from tests.support.configs import composed
from tests.support.evaluation import make_images, write_images
from tests.support.harness import run_distributed

SIZES = {"forest": 20, "town": 9}
SMALL = (
    "model=demo", "task=simmim", "task.mask_unit_px=4", "data=folder", "model.embed_dim=8", "model.depths=[1,1]",
    "model.num_heads=[1,2]", "model.img_size=16", "model.window_size=2", "train.global_batch_size=12",
    "train.micro_batch_size=2", "train.log_every_steps=1", "train.checkpoint_every_steps=2", "train.max_steps=8",
    "train.picture_every_steps=99", "data.record_keys=true", "log.wandb=disabled", "log.progress=none",
    "engine=zero1", "engine.precision=fp32", "runtime.num_threads=1", "data.num_workers=0", "data.lanes=2",
    "optim.schedule.warmup_epochs=0", "data.eval_shards=null", "optim.schedule.name=constant",
)  # fmt: skip


@pytest.fixture(scope="module")
def mix(tmp_path_factory) -> tuple[str, ...]:
    """20 images of one source and 9 of another, two and one of every three."""
    folder = tmp_path_factory.mktemp("mix")
    patterns = {
        name: write_images(folder, name, make_images(count, count), [None] * count) for name, count in SIZES.items()
    }
    return (
        f"+data.mix.forest.shards={patterns['forest']}", "+data.mix.forest.weight=2",
        f"+data.mix.town.shards={patterns['town']}", "+data.mix.town.weight=1",
    )  # fmt: skip


def start(run_dir: Path, ranks: int, *overrides: str, may_die: bool = False) -> list[Any]:
    config = composed([*SMALL, *overrides, f"run_dir={run_dir}"])
    return run_distributed(lambda world: guarded(lambda: train_run(config)), ranks, init=False, may_die=may_die)


def keys_of(run_dir: Path) -> dict[int, list[str]]:
    """The images of each step, of all ranks, sorted."""
    found: dict[int, list[str]] = {}
    for path in (run_dir / "sample_keys").glob("rank_*.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            found.setdefault(record["step"], []).extend(record["keys"])
    return {step: sorted(keys) for step, keys in sorted(found.items())}


def test_a_mixture_that_is_killed_and_resized_goes_on_with_the_images_it_would_have_had(mix, tmp_path, monkeypatch):
    assert start(tmp_path / "plain", 1, *mix) == [0]
    planned = keys_of(tmp_path / "plain")
    assert start(tmp_path / "run", 2, *mix, "train.max_steps=2") == [0, 0]
    with monkeypatch.context() as patch:  # at its fifth step, after the checkpoint of the fourth
        step = loop.take_step

        def dies(run: Any, *arguments: Any) -> Any:
            if run.position.step == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(run, *arguments)

        patch.setattr(loop, "take_step", dies)
        assert start(tmp_path / "run", 3, *mix, may_die=True) == [None] * 3
    assert start(tmp_path / "run", 1, *mix, "data.num_workers=1") == [0]
    assert keys_of(tmp_path / "run") == planned and list(planned) == list(range(1, 9))
    sources = [Counter(key.split("/")[0] for key in keys) for keys in planned.values()]
    assert sources == [{"forest": 8, "town": 4}] * 8
    passes = {name: [key for keys in planned.values() for key in keys if key.startswith(name)] for name in SIZES}
    assert all(64 // 20 <= count <= 64 // 20 + 1 for count in Counter(passes["forest"]).values())
    assert all(32 // 9 <= count <= 32 // 9 + 1 for count in Counter(passes["town"]).values())
    assert {name: len(set(keys)) for name, keys in passes.items()} == SIZES

    plain, run = (read_metrics(tmp_path / name) for name in ("plain", "run"))
    for one, other in zip(plain, run, strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-4)
        mean = (2 * one["mix/forest/loss"] + one["mix/town/loss"]) / 3
        assert mean == pytest.approx(one["train/loss"], rel=1e-4)  # as many pixels are hidden in every image
        assert other["mix/forest/loss"] == pytest.approx(one["mix/forest/loss"], rel=1e-4)
    assert not math.isclose(plain[-1]["mix/forest/loss"], plain[-1]["mix/town/loss"], rel_tol=1e-3)
    assert (run[-1]["mix/forest/images"], run[-1]["mix/town/images"]) == (64, 32)
    assert run[-1]["mix/town/passes"] == pytest.approx(32 / 9)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<td>forest</td><td>66.67 %</td><td>64</td><td>3.2</td>" in page and "Loss of each source" in page

    other = [each.replace("weight=2", "weight=3") for each in mix]
    assert start(tmp_path / "run", 1, *other, "train.max_steps=9") == [2]
    assert start(tmp_path / "run", 1, mix[0].replace("+data.mix.forest.", "data."), "train.max_steps=9") == [2]


@pytest.mark.smoke
def test_wrong_mixtures_are_refused_with_key_value_and_remedy(mix):
    def refused(match: str, *overrides: str) -> None:
        with pytest.raises(ConfigError, match=match):
            composed([*SMALL, "run_dir=r", *overrides])

    refused(r"data.shards \(x.tar\) and data.mix \(forest, town\) both name training images", *mix, "data.shards=x.tar")
    refused(r"data.mix.a.shards \(pipe:cat x\) names no files", "+data.mix.a.shards='pipe:cat x'")
    refused(r"data.mix.town.weight \(0.0\) must be more than 0", *mix[:3], "+data.mix.town.weight=0")
    refused(r"data.mix.a.shards has no value; set it on the command line: \+data.mix.a", "+data.mix.a.weight=1")
    refused(r"data.mix.a.shards: a source is added with a plus: \+data.mix.NAME.shards=PATTERN", "data.mix.a.shards=x")
    refused(r"unknown key data.mix.a.wieght: did you mean data.mix.a.weight", "+data.mix.a.wieght=1")
    refused(r"data.shards has no value")
