"""The evaluate command on several ranks: the same line and the same files as on one, counts exactly."""

from __future__ import annotations

import json
from typing import Any

import pytest
from PIL import Image

from tests.support.evaluation import (
    CLASSIFY,
    MODEL,
    evaluate_command,
    evaluated,
    make_images,
    save_model,
    write_images,
)

RTOL = 1e-6  # measured worst 8e-8: a batch holds other images, and sums over ranks have another order


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> tuple[str, ...]:
    """13 images and a split of 2: with 3 ranks and batches of 4 some batches, and one rank's all, are padding."""
    folder = tmp_path_factory.mktemp("files")
    labels = [number % 4 for number in range(13)]
    shards = write_images(folder, "val", make_images(13, seed=1), labels, "ILSVRC2012_val_{:08d}")
    others = write_images(folder, "others", make_images(2, seed=2), [3, 0])
    real = folder / "real.json"
    real.write_text(json.dumps([[number % 4, 2] if number % 3 else [] for number in range(13)]))
    return (
        f"weights={save_model(folder / 'weights.safetensors')}", *CLASSIFY, *MODEL, f"data.eval_shards={shards}",
        f"+data.eval_splits.v2.shards={others}", f"+data.eval_splits.real.shards={shards}",
        f"+data.eval_splits.real.labels={real}", "crop_pcts=[0.7,1]",
    )  # fmt: skip


def assert_same(found: Any, expected: Any) -> None:
    """Equal, floats to rounding."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for name in expected:
            assert_same(found[name], expected[name])
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=RTOL)
    else:
        assert found == expected


@pytest.mark.smoke
def test_three_ranks_say_what_one_says(base, tmp_path, capfd):
    """Scores to rounding, images, confusion counts and pictures exactly; one rank speaks and writes."""
    lines = [evaluated(capfd, *base, f"out={tmp_path / str(ranks)}", ranks=ranks) for ranks in (1, 3)]
    assert_same(lines[1], lines[0])
    assert lines[0]["images"] == 13 and lines[0]["splits"]["real"]["images"] == 8
    one, three = (json.loads((tmp_path / ranks / "evaluation.json").read_text()) for ranks in ("1", "3"))
    assert_same(three, one)
    assert sum(images for _, _, images in three["confusion"]) == 13
    for name in ("confusion.png", "confusion_v2.png"):
        pictures = [Image.open(tmp_path / ranks / name).tobytes() for ranks in ("1", "3")]
        assert pictures[0] == pictures[1]


def test_damaged_images_count_nowhere_on_any_rank(tmp_path, base, capfd):
    """A stand-in has weight 0: neither the scores nor a class know it."""
    images = make_images(9, seed=4)
    whole = write_images(tmp_path, "whole", images[:8], [0, 1, 2, 3, 0, 1, 2, 3])
    damaged = write_images(tmp_path, "damaged", images, [0, 1, 2, 3, 0, 1, 2, 3, 0], damaged=1)
    settings = (*base[: len(base) - 4], "data.on_bad_sample=replace", "data.max_bad_fraction=0.5")
    expected = evaluated(capfd, *settings, f"data.eval_shards={whole}")
    for ranks in (1, 3):
        found = evaluated(capfd, *settings, f"data.eval_shards={damaged}", ranks=ranks)
        assert_same(found, expected)
        assert found["images"] == 8


def test_what_one_rank_finds_wrong_all_say_once(base, tmp_path, capfd):
    """No rank waits for another; the message names the split."""
    shards = write_images(tmp_path, "bad", make_images(9, seed=4), [0] * 9, damaged=1)
    code, out, err = evaluate_command(capfd, *base, f"+data.eval_splits.bad.shards={shards}", ranks=3)
    assert code == 2 and out == ""
    assert err.count("error: ") == 1 and "'009'" in err and "data.on_bad_sample=replace" in err, err
