"""The probes over real ranks: the same scores as one rank's, under ZeRO-3 too, and every image once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from swinv2_train import train
from swinv2_train.config.command_line import guarded
from swinv2_train.distributed import World
from swinv2_train.evaluation.features import Labelled
from swinv2_train.evaluation.knn import knn
from swinv2_train.evaluation.linear_probe import linear
from swinv2_train.monitoring.run_log import read_metrics
from tests.support.configs import composed
from tests.support.evaluation import CLASSIFY, MODEL, evaluate_command, evaluated, make_images, save_model, write_images
from tests.support.harness import run_distributed
from tests.unit.evaluation.test_probe import CLASSES, PROBES, SIMMIM, SMALL, blobs, nothing

NAMES = ("probe/knn_top1", "probe/knn_top5", "probe/linear_top1", "probe/linear_top5")


def share(samples: Labelled, first: float, last: float) -> Labelled:
    """A part of the samples with the positions they have among all; copied, because the linear probe changes them."""
    part = slice(int(first * len(samples)), int(last * len(samples)))
    return Labelled(samples.features[part].clone(), samples.labels[part], samples.positions[part])


def test_any_ranks_and_any_shares_say_what_one_rank_says():
    """Also where a rank has no image to learn from, or none to be scored."""
    shares = {1: ([0, 1], [0, 1]), 2: ([0, 0.3, 1], [0, 0.6, 1]), 3: ([0, 0.4, 1, 1], [0, 0, 0.1, 1])}

    def scores(world: World, ranks: int) -> tuple[list[float], list[float]]:
        bounds = [part[world.rank : world.rank + 2] for part in shares[ranks]]
        training, testing = (
            share(blobs(count, seed, 2.5), *own)
            for (count, seed), own in zip(((400, 1), (300, 2)), bounds, strict=True)
        )
        return (
            knn(training, testing, CLASSES, 20, 0.07, world, nothing),
            linear(training, testing, CLASSES, world, nothing),
        )

    one = run_distributed(scores, 1, 1)[0]
    assert all(20 < first < five < 100 for first, five in one), one
    for ranks in (2, 3):
        assert run_distributed(scores, ranks, ranks) == [one] * ranks


def coloured(count: int, seed: int) -> np.ndarray:
    """Noise, in which red, green and blue take turns."""
    images = make_images(count, seed) // 3
    for number in range(count):
        images[number, :, :, number % 3] += 40
    return images


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> tuple[str, str]:
    """Patterns of 41 training and 31 evaluation images of 3 colours under noise, every fifth with a wrong label."""
    folder = tmp_path_factory.mktemp("shards")

    def write(name: str, count: int, seed: int) -> str:
        images = coloured(count, seed)
        return write_images(folder, name, images, [(number + number % 5 // 4) % 3 for number in range(count)])

    return write("train", 41, 1), write("test", 31, 2)


@pytest.mark.parametrize("task", ["simmim", "classify"])
def test_a_run_under_zero_3_measures_what_the_evaluate_command_does_and_trains_as_without(
    task, shards, tmp_path, capfd
):
    """Losses bit for bit on two ranks, whose features come through DeepSpeed's hooks; then one or two ranks alone."""
    settings = SIMMIM if task == "simmim" else (
        "task=classify", "task.num_classes=3", "task.rand_augment=null", "task.erasing_prob=0", "task.mixup_alpha=0",
        "task.cutmix_alpha=0",
    )  # fmt: skip
    zero = (
        "engine=zero3", "engine.precision=fp32", "engine.persistence_threshold=0", "engine.prefetch_bucket_size=500",
        "engine.max_reuse_distance=0",
    )  # fmt: skip
    common = (
        *settings, *(value for value in SMALL if not value.startswith("engine")), *zero, "train.max_steps=3",
        f"data.shards={shards[0]}", f"data.eval_shards={shards[1]}",
    )  # fmt: skip
    runs = {"plain": (), "probed": (PROBES, "probe.every_steps=2", "probe.before_first_step=true")}
    configs = [composed([*common, *own, f"run_dir={tmp_path / name}"]) for name, own in runs.items()]
    for config in configs:
        command = lambda world, config=config: guarded(lambda: train.train(config))  # noqa: E731
        assert run_distributed(command, 2, init=False, timeout_sec=300) == [0, 0]
    plain, probed = (read_metrics(tmp_path / name) for name in runs)
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        assert [line.get(name) for line in plain] == [line.get(name) for line in probed if line["step"]], name
    assert [line["step"] for line in probed if set(NAMES) <= line.keys()] == [0, 2, 3]
    assert probed[0]["images_seen"] == 0 and set(probed[0]) == {"step", "images_seen", *NAMES}
    page = (tmp_path / "probed" / "report.html").read_text()
    assert "<th>before the first step</th><th>after step 3</th>" in page
    assert f"<td>{probed[0][NAMES[0]]:.2f} %</td><td>{probed[-1][NAMES[0]]:.2f} %</td>" in page
    assert "before the first step" not in (tmp_path / "plain" / "report.html").read_text()
    last = {name: probed[-1][name] for name in NAMES}
    assert all(50 < last[name] < 100 for name in NAMES if name.endswith("top1")), last
    line = evaluated(capfd, f"run_dir={tmp_path / 'probed'}", ranks=1 if task == "simmim" else 2)
    assert {name: line[name] for name in NAMES} == last


def test_damaged_images_count_on_neither_side(shards, tmp_path, capfd):
    """Stand-ins have weight 0: one among the images to learn from, and one among those that are scored."""
    weights = save_model(tmp_path / "weights.safetensors")
    base = (f"weights={weights}", *CLASSIFY, *MODEL, PROBES, "data.on_bad_sample=replace", "data.max_bad_fraction=0.5")
    images = {"train": coloured(30, 5), "test": coloured(14, 6)}

    def line(damaged: int, ranks: int) -> dict[str, Any]:
        patterns = []
        for name, group in images.items():
            count = len(group) - (0 if damaged else 1)  # the last one is damaged, or is not there
            labels = [number % 3 for number in range(count)]
            folder = f"{name}_{damaged}_{ranks}"
            patterns.append(write_images(tmp_path, folder, group[:count], labels, damaged=damaged))
        found = evaluated(capfd, *base, f"probe.shards={patterns[0]}", f"data.eval_shards={patterns[1]}", ranks=ranks)
        return {name: found[name] for name in ("images", *NAMES)}

    whole = line(0, 1)
    assert whole["images"] == 13 and all(abs(whole[name] * 13 / 100 % 1 - 0.5) > 0.49 for name in NAMES)
    assert line(1, 1) == line(1, 3) == whole


def test_what_one_rank_finds_damaged_all_say(shards, tmp_path, capfd):
    """The third rank alone reads the damaged image of probe.shards; no rank waits for another."""
    weights = save_model(tmp_path / "weights.safetensors")
    broken = write_images(tmp_path, "broken", make_images(9, 4), [0, 1, 2] * 3, damaged=1)
    base = (f"weights={weights}", *CLASSIFY, *MODEL, PROBES, f"data.eval_shards={shards[1]}", f"probe.shards={broken}")
    code, out, err = evaluate_command(capfd, *base, ranks=3)
    assert code == 2 and out == ""
    assert err.count("error: ") == 1 and "'009'" in err and "data.on_bad_sample=replace" in err, err
