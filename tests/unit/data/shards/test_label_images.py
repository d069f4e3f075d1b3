"""Label images (KEY.seg.png) of shards: found beside any image, kept apart from it, and never lost without a word."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from swinv2_train.data.loading.loader import EvalLoader
from swinv2_train.data.sample import Sample, SampleError, ShardError
from swinv2_train.data.shards.shard_cache import ShardCache
from swinv2_train.data.shards.tar_index import build_index, load_index
from swinv2_train.data.shards.tar_reader import TarReader, open_manifest
from swinv2_train.data.shards.transfers import RetryPolicy
from swinv2_train.data.sources.pipe import read_command
from tests.support.configs import make_config
from tests.support.images import encoded, image_bytes
from tests.support.shard_files import write_plain_tar
from tests.support.shard_server import serve

LABELS = [encoded(np.full((8, 8), number, np.uint8)) for number in range(3)]
MEMBERS = [
    ("a.jpg", image_bytes(0, "jpg")),
    ("a.seg.png", LABELS[0]),
    ("b.png", image_bytes(1)),  # an image of the same ending
    ("b.seg.png", LABELS[1]),
    ("b.cls", b"4"),
    ("c.seg.png", LABELS[2]),  # comes before its image
    ("c.input.npy", b"values"),
    ("c.webp", image_bytes(2, "webp")),
    ("d.png", image_bytes(3)),
]


def read(path: Path, **options: object) -> list[Sample]:
    reader = pickle.loads(pickle.dumps(TarReader(open_manifest(str(path), **options))))
    return [reader.read(0, number) for number in range(reader.manifest.num_samples)]


def test_a_label_image_is_a_target_whatever_its_image_is(tmp_path):
    path = write_plain_tar(tmp_path / "t.tar", MEMBERS)
    found = read(path, verify=True)
    assert [sample.targets.get("segmentation") for sample in found] == [*LABELS, None]
    kinds = ("jpg", "png", "webp", "png")
    assert [(each.image, each.extension) for each in found] == [(image_bytes(n, k), k) for n, k in enumerate(kinds)]
    assert [sample.targets.get("label") for sample in found] == [None, 4, None, None]
    piped = list(read_command(f"cat {path}"))
    assert [(each.key, each.image, each.targets) for each in piped] == [(e.key, e.image, e.targets) for e in found]


def test_it_is_found_beside_the_image_that_a_key_chooses(tmp_path):
    path = write_plain_tar(tmp_path / "t.tar", MEMBERS[5:8])
    (sample,) = read(path, image_member="input.npy")
    assert (sample.image, sample.extension, sample.targets) == (b"values", "npy", {"segmentation": LABELS[2]})


def test_shards_at_an_address_have_them_too(tmp_path):
    """The index of a cached shard holds no checksums, so that the fields of a record are others."""
    (tmp_path / "there").mkdir()
    write_plain_tar(tmp_path / "there" / "t.tar", MEMBERS)
    with serve(tmp_path / "there") as server:
        cache = ShardCache(str(tmp_path / "cache"), 2**30, RetryPolicy(5.0, 20.0))
        for verify in (False, True):
            reader = TarReader(open_manifest(f"{server.url}/t.tar", cache=cache, verify=verify))
            found = [reader.read(0, number) for number in range(4)]
            assert [sample.targets.get("segmentation") for sample in found] == [*LABELS, None]
            assert [sample.targets.get("label") for sample in found] == [None, 4, None, None]
            assert [sample.image for sample in found[:2]] == [image_bytes(0, "jpg"), image_bytes(1)]
            reader.close()


def test_the_manifest_counts_them_and_that_of_other_shards_is_as_it_was(tmp_path):
    write_plain_tar(tmp_path / "with.tar", MEMBERS)
    write_plain_tar(tmp_path / "without.tar", [MEMBERS[0]])
    manifest = open_manifest(str(tmp_path / "*.tar"))
    assert manifest.unsegmented == (1, 1) and manifest.counts == (4, 1)
    entries = json.loads((tmp_path / "manifest.json").read_text())["shards"]
    assert entries["with.tar"]["targets"] == {"segmentation": 3} and "targets" not in entries["without.tar"]
    assert len(build_index(str(tmp_path / "without.tar")).dtype.names) == 6


@pytest.mark.parametrize("place", ["segmentation_offset", "segmentation_size"])
def test_an_index_that_leads_out_of_the_shard_is_refused(tmp_path, place):
    path = write_plain_tar(tmp_path / "t.tar", MEMBERS)
    rows = build_index(str(path))
    rows[place][1] = path.stat().st_size
    np.save(tmp_path / "t.npy", rows)
    with pytest.raises(ValueError, match="bytes that the shard does not have"):
        load_index(str(tmp_path / "t.npy"), path.stat().st_size)


def test_a_manifest_with_more_of_them_than_samples_is_refused(tmp_path):
    write_plain_tar(tmp_path / "t.tar", MEMBERS)
    open_manifest(str(tmp_path / "t.tar"))
    content = json.loads((tmp_path / "manifest.json").read_text())
    content["shards"]["t.tar"]["targets"]["segmentation"] = 5
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ShardError, match=r"targets.segmentation \(5\) is more than its 4 samples; delete it"):
        open_manifest(str(tmp_path / "t.tar"))


def test_one_whose_bytes_changed_is_found_where_that_is_asked_for(tmp_path):
    path = write_plain_tar(tmp_path / "t.tar", MEMBERS)
    manifest = open_manifest(str(path), verify=True)
    content = path.read_bytes()
    at = content.index(LABELS[1])
    path.write_bytes(content[: at + 50] + b"\xff" + content[at + 51 :])
    reader = TarReader(manifest)
    assert reader.read(0, 0).targets["segmentation"] == LABELS[0]
    with pytest.raises(SampleError, match=rf"sample 'b': its checksum is another than the index has, at byte {at}"):
        reader.read(0, 1)


class _Sizes:
    """A row that says how many bytes the label image has."""

    needs = ("segmentation",)

    def __call__(self, image: torch.Tensor, targets: dict[str, bytes], rng: np.random.Generator) -> dict[str, object]:
        return {"bytes": torch.tensor(len(targets["segmentation"]))}


def test_a_task_that_needs_them_is_refused_shards_without(tmp_path):
    path = write_plain_tar(tmp_path / "t.tar", MEMBERS)
    data = make_config(data={"num_workers": 0}).data
    with pytest.raises(ShardError, match=r"1 of 4 samples have no label image \(.seg.png\), the first in .*t.tar; .*"):
        EvalLoader(open_manifest(str(path)), data, _Sizes(), 2, 0, 1)
    data = make_config(data={"num_workers": 0, "on_bad_sample": "replace", "max_bad_fraction": 0.25}).data
    batches = list(EvalLoader(open_manifest(str(path)), data, _Sizes(), 2, 0, 1))
    assert [batch["weight"].tolist() for batch in batches] == [[1, 1], [1, 0]]
    assert batches[1]["bytes"][0] == len(LABELS[2])
    assert batches[1]["problems"][0]["cause"] == "no readable segmentation (.seg.png)"
