"""The stats command: the same bytes on any number of ranks and workers, and a run that begins with its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from swinv2_train import stats, train
from swinv2_train.config.command_line import guarded
from swinv2_train.monitoring.run_log import read_metrics
from tests.support.configs import composed
from tests.support.harness import run_distributed

RUN = (
    "model=demo", "task.mask_unit_px=4", "model.embed_dim=8", "model.depths=[1,1]", "model.num_heads=[1,2]",
    "model.img_size=16", "model.window_size=2", "train.global_batch_size=4", "train.micro_batch_size=2",
    "train.max_steps=2", "train.log_every_steps=1", "optim.schedule.warmup_epochs=0", "log.wandb=disabled",
    "log.progress=none", "runtime.num_threads=1", "data.num_workers=0", "engine=local", "engine.precision=fp32",
)  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    """70 images of 12 bands with no data in a corner: more parts than ranks, and shares of another size."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(5)
    for number in range(70):
        image = rng.normal(100 * np.arange(12), 9, (16, 18, 12)).astype(np.float32)
        image[:6, :6] = np.nan
        np.save(folder / f"i{number:03}.npy", np.rint(image) if number % 5 == 0 else image)
    return str(folder)


def command(out: Path, ranks: int, *arguments: str) -> list[int]:
    """The exit codes of all ranks."""

    def run(_: object) -> int:
        def body() -> int:
            stats.measure(*stats.parse([*arguments, f"out={out}", "log.progress=none"]))
            return 0

        return guarded(body)

    return run_distributed(run, ranks, init=False)


def test_any_number_of_ranks_and_workers_writes_the_same_bytes_and_training_takes_them(images, tmp_path):
    """Sums of floats would differ in their last bits."""
    texts, pictures = [], []
    for ranks, workers in ((1, 0), (2, 2), (3, 0)):
        out = tmp_path / f"{ranks}.yaml"
        codes = command(out, ranks, f"data.shards={images}", "data.nodata=[nan]", f"data.num_workers={workers}")
        assert codes == [0] * ranks
        texts.append(out.read_bytes())
        pictures.append(out.with_suffix(".png").read_bytes())
    assert len(set(texts)) == len(set(pictures)) == 1
    config = composed([*RUN, f"data={tmp_path}/3.yaml", "model.in_chans=12", f"run_dir={tmp_path}/run"])
    assert config.data.shards == images and len(config.data.mean) == 12
    assert run_distributed(lambda _: guarded(lambda: train.train(config)), 1, init=False) == [0]
    losses = [line["train/loss"] for line in read_metrics(tmp_path / "run")]
    assert len(losses) == 2 and all(0.5 < loss < 1.2 for loss in losses)  # of normalised values: E|N(0, 1)| is 0.8


@pytest.mark.slow
def test_what_one_rank_finds_damaged_all_say_once(images, tmp_path, capfd):
    """No rank waits for the others' counts."""
    folder = tmp_path / "images"
    folder.mkdir()
    for path in Path(images).glob("*.npy"):
        (folder / path.name).symlink_to(path)
    (folder / "i069.npy").unlink()
    (folder / "i069.npy").write_bytes(b"nothing of the kind")
    assert command(tmp_path / "x.yaml", 2, f"data.shards={folder}", "data.nodata=[nan]", "model.in_chans=12") == [2, 2]
    told = capfd.readouterr().err
    assert told.count("error:") == 1 and "i069" in told and "data.on_bad_sample=replace" in told
    assert not (tmp_path / "x.yaml").exists()


@pytest.mark.slow
def test_a_mixture_tells_each_source_and_writes_what_training_sees(images, tmp_path, capfd):
    """The file names the sources, so that one word begins the run."""
    other = tmp_path / "other"
    other.mkdir()
    for number in range(3):
        np.save(other / f"{number}.npy", np.random.default_rng(number).integers(0, 999, (16, 16, 12)).astype(np.int16))
    mix = (f"+data.mix.a.shards={images}", "+data.mix.a.weight=3", f"+data.mix.b.shards={other}")
    assert command(tmp_path / "m.yaml", 2, *mix, "data.nodata=[nan]", "model.in_chans=12") == [0, 0]
    out = capfd.readouterr().out
    assert "a: 70 images" in out and "b: 3 images" in out and "the mixture" in out
    config = composed([*RUN, f"data={tmp_path}/m.yaml", "model.in_chans=12", "run_dir=r"])
    assert {name: source.weight for name, source in config.data.mix.items()} == {"a": 3, "b": 1}
    assert config.data.mean[0] == pytest.approx((3 * 0 + 500) / 4, abs=20)
