"""What the label images of a source hold is compared with the task before the first step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from swinv2_train import make_shards
from swinv2_train.data.label_values import check_source_values, values_text
from swinv2_train.data.sample import ShardError
from swinv2_train.data.shards.tar_reader import reindex
from swinv2_train.data.sources.base import Source, open_source
from tests.support.images import encoded
from tests.support.segmentation import pixel_pair, write_pairs


def packed(folder: Path) -> Source:
    write_pairs(folder, 6)
    images, masks = (str(folder / name / "training") for name in ("images", "annotations"))
    options = ["--labels", masks, "--samples-per-shard", "4", "--overlays", "0"]
    assert make_shards.run([images, str(folder / "t"), *options]) == 0
    return open_source(str(folder / "t-*.tar"), label_folders=None)


def test_values_that_were_counted_while_packing_are_compared_with_the_task(tmp_path):
    source = packed(tmp_path)
    whole = np.stack([pixel_pair(number)[1] for number in range(6)])
    assert source.label_values == {value: int((whole == value).sum()) for value in range(3)}
    check_source_values(source, "data.shards", 3, False, 255)
    check_source_values(source, "data.shards", 2, True, 255)
    count = source.label_values[2]
    with pytest.raises(
        ShardError, match=rf"data.shards: .* values 2 \({count} pixels\), but 0 to 1 are classes .*=true where"
    ):
        check_source_values(source, "data.shards", 2, False, 255)


def test_shards_without_counts_are_not_refused_for_it(tmp_path):
    packed(tmp_path)
    reindex(str(tmp_path / "t-*.tar"))
    source = open_source(str(tmp_path / "t-*.tar"))
    assert source.label_values is None
    check_source_values(source, "data.shards", 2, False, 255)  # the first such image is a damaged sample


def test_a_folder_of_masks_of_0_and_255_is_refused_before_the_first_step(tmp_path):
    """Nothing else would say it: 255 is ignored, so a run would learn the one class that is left."""
    write_pairs(tmp_path, 30)
    masks = sorted((tmp_path / "annotations" / "training").iterdir())
    for number, path in enumerate(masks):
        path.write_bytes(encoded((255 * (pixel_pair(number)[1] > 0)).astype(np.uint8)))
    masks[0].write_bytes(b"no image")  # another matter
    source = open_source(str(tmp_path / "images" / "training"), label_folders=("images", "annotations"))
    with pytest.raises(ShardError, match=r"data.shards: all pixels of its label images are 0 or 255, a mask"):
        check_source_values(source, "data.shards", 2, False, 255)
    masks[3].write_bytes(encoded(pixel_pair(3)[1]))
    check_source_values(
        open_source(str(tmp_path / "images"), label_folders=("images", "annotations")), "", 3, False, 255
    )


def test_the_histogram_names_values_and_shows_the_rarest():
    text = values_text({0: 900, 7: 99, 255: 1}, {7: "sky", 255: "(ignored)"})
    assert [line.split() for line in text.splitlines()] == [
        ["0", "90.00", "%", "#" * 30], ["7", "9.90", "%", "###", "sky"], ["255", "0.10", "%", "#", "(ignored)"]
    ]  # fmt: skip
