"""The predict command: a row an image, in order, the same on any number of ranks and after a kill."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from swinv2_train import evaluate, predict
from swinv2_train.config import ConfigError
from swinv2_train.config.command_line import load_run_config
from swinv2_train.config.load import config_yaml
from swinv2_train.data.objects import Mask, Objects, objects_to_json
from swinv2_train.data.shards.tar_writer import write_shards
from swinv2_train.inference import LoadedModel
from swinv2_train.inference.journal import Journal
from swinv2_train.tasks import build_task
from tests.support.configs import composed
from tests.support.detection import scene
from tests.support.detector import DETECT
from tests.support.detector import randomised as random_detector
from tests.support.evaluation import CLASSES, CLASSIFY, MODEL, logits_of, make_images, save_model, write_images
from tests.support.harness import RankFailed, run_distributed
from tests.support.images import encoded
from tests.support.segmenter import CLASSES as PIXEL_CLASSES
from tests.support.segmenter import SEGMENT, randomised, scenes, truth_of, write_scenes
from tests.support.shard_server import serve

COUNT = 23
IMAGES = make_images(COUNT, seed=1)
LABELS = [number % CLASSES for number in range(COUNT)]
BROKEN = ("1/broken.png", "2/empty.jpg")


def write_run(folder: Path, *words: str) -> Path:
    """A run directory of a configuration, without checkpoints."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config_yaml(composed([*words, f"run_dir={folder}", "data.shards=gone.tar"])))
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> dict[str, str]:
    """A run's directory, weights, and a folder of images by class, of which two cannot be read."""
    folder = tmp_path_factory.mktemp("classifier")
    for number, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        path = folder / "images" / str(label) / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    whole = (folder / "images" / "0" / "00.png").read_bytes()
    for name, content in zip(BROKEN, (whole[: len(whole) // 2], b""), strict=True):
        (folder / "images" / name).write_bytes(content)
    run = write_run(folder / "run", *CLASSIFY, *MODEL, "data.num_workers=0", "log.progress=none")
    return {
        "run_dir": str(run), "weights": save_model(folder / "weights.safetensors"), "images": str(folder / "images"),
        "shards": write_images(folder, "val", IMAGES, LABELS),
    }  # fmt: skip


def predicted(*words: str, ranks: int = 1, **more: Any) -> dict[str, Any] | None:
    """What the command's line holds; None where rank 0 was killed."""
    config, request = predict.parse(list(words))
    return run_distributed(lambda world: predict.predict(config, request), ranks, init=False, **more)[0]


def of(classifier: dict[str, str], out: Path, *words: str) -> tuple[str, ...]:
    given = {word.partition("=")[0] for word in words}
    return (*(f"{key}={classifier[key]}" for key in ("run_dir", "weights", "images") if key not in given),
            f"out={out}", *words)  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_image_has_a_row_and_they_say_what_evaluate_counts(classifier, tmp_path):
    line = predicted(*of(classifier, tmp_path / "a.jsonl", "top_k=9"))
    rows = lines(tmp_path / "a.jsonl")
    files = sorted(str(path.relative_to(classifier["images"])) for path in Path(classifier["images"]).rglob("*.*g"))
    assert [row["image"] for row in rows] == files and line["images"] == COUNT + 2
    assert {row["image"] for row in rows if "error" in row} == set(BROKEN) and line["unreadable"] == 2
    assert all(row["error"] and "classes" not in row for row in rows if row["image"] in BROKEN)
    answered = [row for row in rows if "error" not in row]
    right = [row["classes"][0] == int(row["image"].partition("/")[0]) for row in answered]
    config, request = evaluate.parse([
        f"run_dir={classifier['run_dir']}", f"weights={classifier['weights']}",
        f"data.eval_shards={classifier['images']}", "data.on_bad_sample=replace", "data.max_bad_fraction=0.5",
    ])  # fmt: skip
    scores = run_distributed(lambda world: evaluate.evaluate(config, request), 1, init=False)[0]
    assert scores["images"] == COUNT and 100 * np.mean(right) == pytest.approx(scores["val/top1"], rel=1e-6)
    losses = [-np.log(row["probabilities"][row["classes"].index(int(row["image"][0]))]) for row in answered]
    assert np.mean(losses) == pytest.approx(scores["val/loss"], rel=1e-5)
    assert all(len(row["labels"]) == CLASSES and sum(row["probabilities"]) == pytest.approx(1) for row in answered)
    assert not (tmp_path / "a.jsonl.unfinished").exists()


@pytest.mark.slow
def test_the_three_kinds_of_tables_hold_the_same_on_any_number_of_ranks(classifier, tmp_path):
    for ending, ranks, source in (("jsonl", 1, "images"), ("csv", 2, "images"), ("parquet", 3, "images")):
        predicted(*of(classifier, tmp_path / f"a.{ending}", "top_k=2", f"images={classifier[source]}"), ranks=ranks)
    rows = lines(tmp_path / "a.jsonl")
    with (tmp_path / "a.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == [
        "image", "classes_1", "classes_2", "labels_1", "labels_2", "probabilities_1", "probabilities_2", "error",
    ]  # fmt: skip
    columns = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    for row, cells, entry in zip(rows, table, columns, strict=True):
        assert row["image"] == cells["image"] == entry["image"]
        assert (row.get("error") or "") == cells["error"] == (entry["error"] or "")
        if "error" not in row:
            assert row["classes"] == entry["classes"] == [int(cells["classes_1"]), int(cells["classes_2"])]
            assert row["probabilities"] == entry["probabilities"]
            assert [float(cells["probabilities_1"]), float(cells["probabilities_2"])] == row["probabilities"]


@pytest.mark.parametrize("target", ["multilabel", "regression"])
def test_several_classes_and_numbers_are_those_of_the_logits(target, classifier, tmp_path):
    plain = ("task.mixup_alpha=0", "task.cutmix_alpha=0", "task.label_smoothing=0")
    words = of(classifier, tmp_path / "a.jsonl", f"images={classifier['shards']}", f"task.target={target}", *plain)
    predicted(*words)
    logits = logits_of(IMAGES)
    for row, expected in zip(lines(tmp_path / "a.jsonl"), logits, strict=True):
        if target == "multilabel":
            assert row["probabilities"] == pytest.approx(expected.sigmoid().tolist(), abs=1e-5)
            assert sorted(row["classes"]) == [number for number in range(CLASSES) if expected[number] > 0]
        else:
            assert row["values"] == pytest.approx(expected.tolist(), abs=1e-4)


def test_shards_and_one_file_keep_their_order_and_keys(classifier, tmp_path):
    predicted(*of(classifier, tmp_path / "s.jsonl", f"images={classifier['shards']}"), ranks=2)
    rows = lines(tmp_path / "s.jsonl")
    assert [row["image"] for row in rows] == [f"{number + 1:03d}" for number in range(COUNT)]
    one = f"{classifier['images']}/0/00.png"
    predicted(*of(classifier, tmp_path / "one.jsonl", f"images={one}"))
    (row,) = lines(tmp_path / "one.jsonl")
    assert row["image"] == "00.png" and row["classes"] == rows[0]["classes"]
    assert row["probabilities"] == pytest.approx(rows[0]["probabilities"], abs=1e-6)


@pytest.mark.slow
def test_a_saved_data_set_and_shards_of_an_address_have_the_rows_of_the_shards(classifier, tmp_path):
    """Two ranks share the shards that one of them fetches; a data set needs no labels."""
    from datasets import Dataset, Features
    from datasets import Image as ImageColumn

    images = [{"bytes": encoded(image), "path": None} for image in IMAGES]
    saved = Dataset.from_dict({"picture": images}, features=Features({"picture": ImageColumn()}))
    saved.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    predicted(*of(classifier, tmp_path / "shards.jsonl", f"images={classifier['shards']}"))
    predicted(*of(classifier, tmp_path / "saved.jsonl", f"images={tmp_path / 'saved'}"), ranks=2)
    shards = Path(classifier["shards"])
    with serve(shards.parent) as server:
        address = f"images={server.url}/val-{{000000..{(COUNT - 1) // 4:06d}}}.tar"
        predicted(*of(classifier, tmp_path / "far.jsonl", address, f"data.cache_dir={tmp_path / 'cache'}"), ranks=2)
        assert max(server.gets.values()) == 1, "no rank fetches what another one has fetched"
    here, far, rows = (lines(tmp_path / f"{name}.jsonl") for name in ("shards", "far", "saved"))
    assert [row["image"] for row in rows] == [str(number) for number in range(COUNT)]
    for one, other, row in zip(here, far, rows, strict=True):
        assert one["image"] == other["image"] and one["classes"] == other["classes"] == row["classes"]
        for found in (other, row):
            assert found["probabilities"] == pytest.approx(one["probabilities"], abs=1e-6)


@pytest.mark.slow
def test_a_killed_command_goes_on_and_nothing_comes_twice_or_is_lost(classifier, tmp_path, monkeypatch):
    """Killed twice, in the midst of a line, then on other numbers of ranks."""
    words = of(classifier, tmp_path / "a.jsonl", "train.micro_batch_size=2")
    folder, add = tmp_path / "a.jsonl.unfinished", Journal.add
    for ranks, before in ((2, 2), (1, 3)):
        left = before

        def dying(self: Journal, first: int, rows: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                self._file.write(b'{"first": 20, "rows": [{"image"')
                self._file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            add(self, first, rows)

        monkeypatch.setattr(Journal, "add", dying)
        assert predicted(*words, ranks=ranks, may_die=True) is None
        assert folder.is_dir() and not (tmp_path / "a.jsonl").exists()
    monkeypatch.setattr(Journal, "add", add)
    with pytest.raises(RankFailed, match=r"data.eval_crop_pct was 1.0 and is 0.5.*delete the folder"):
        predicted(*words, "data.eval_crop_pct=0.5")
    predicted(*words, ranks=3)
    predicted(*of(classifier, tmp_path / "b.jsonl", "train.micro_batch_size=2"))
    found, whole = lines(tmp_path / "a.jsonl"), lines(tmp_path / "b.jsonl")
    assert [row["image"] for row in found] == [row["image"] for row in whole] and not folder.exists()
    for row, other in zip(found, whole, strict=True):
        assert row.get("classes") == other.get("classes") and row.get("error") == other.get("error")
        assert row.get("probabilities", []) == pytest.approx(other.get("probabilities", []), abs=1e-6)
    with pytest.raises(RankFailed, match=r"out .*exists already; delete it"):
        predicted(*words)


@pytest.mark.slow
def test_a_map_of_every_image_counts_what_evaluate_counts(tmp_path):
    pairs = scenes(5, seed=4)
    run = write_run(tmp_path / "run", *SEGMENT, "task.reduce_zero_label=true")
    task = randomised(build_task(composed([*SEGMENT, "run_dir=x", "data.shards=x"]), torch.device("cpu")))
    torch.save(task.module.state_dict(), tmp_path / "w.pth")
    shard = write_scenes(tmp_path / "val.tar", pairs)
    common = [f"run_dir={run}", f"weights={tmp_path / 'w.pth'}"]
    line = predicted(
        *common, f"images={shard}", f"out={tmp_path}/a.csv", f"pictures={tmp_path / 'seen'}", ranks=2
    )  # fmt: skip
    assert line["images"] == 5 and line["maps"] == f"{tmp_path}/a_maps"
    config, request = evaluate.parse([*common, f"data.eval_shards={shard}", f"out={tmp_path / 'out'}"])
    run_distributed(lambda world: evaluate.evaluate(config, request), 1, init=False)
    counted = np.zeros((PIXEL_CLASSES, PIXEL_CLASSES), int)
    for right, said, pixels in json.loads((tmp_path / "out" / "evaluation.json").read_text())["confusion"]:
        counted[right, said] = pixels
    expected = np.zeros_like(counted)
    with (tmp_path / "a.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    for (_, labels), row in zip(pairs, table, strict=True):
        said = np.asarray(Image.open(tmp_path / row["map"]))
        assert said.shape == labels.shape == (int(row["height"]), int(row["width"]))
        truth = truth_of(labels)
        np.add.at(expected, (truth[labels > 0], said[labels > 0]), 1)
        assert sum(json.loads(row["pixels"])) == said.size
    assert np.array_equal(counted, expected) and np.count_nonzero(expected.sum(axis=0)) > 1
    assert len(list((tmp_path / "seen").glob("*.png"))) == 5


def near(model: Any, number: int) -> Objects:
    """Boxes near those that the model finds in a scene: so that it has found something."""
    image, objects = scene(number)
    found = model.predict(image)
    height, width = image.shape[:2]
    boxes, classes = [], []
    for box, label in zip(found.boxes.round(), found.classes.tolist(), strict=True):
        x0, y0 = min(box[0] + len(boxes), width - 3), min(box[1], height - 3)
        boxes.append([x0, y0, max(box[2], x0 + 2), max(box[3], y0 + 2)])
        classes.append(label)
    kept = np.array(boxes[::2], np.float32)
    masks = [Mask(polygons=(np.array([[a, b], [c, b], [c, d], [a, d]], float),)) for a, b, c, d in kept.tolist()]
    area = ((kept[:, 2] - kept[:, 0]) * (kept[:, 3] - kept[:, 1])).astype(np.float64)
    numbers = np.array(classes[::2], np.int64)
    return Objects(objects.size, number, kept, numbers, np.zeros(len(kept), bool), area, tuple(masks))


@pytest.mark.slow
def test_objects_in_cocos_form_have_the_average_precision_that_evaluate_says(tmp_path):
    run = write_run(tmp_path / "run", *DETECT, "task.score_threshold=0.0")
    task = random_detector(build_task(composed([*DETECT, "run_dir=x", "data.shards=x"]), torch.device("cpu")))
    torch.save(task.module.state_dict(), tmp_path / "w.pth")
    common = [f"run_dir={run}", f"weights={tmp_path / 'w.pth'}"]
    model = LoadedModel(load_run_config(run), tmp_path / "w.pth", torch.device("cpu"), False, None)
    truths = [near(model, number) for number in (101, 102, 103)]
    rows = [
        (f"k{each.image_id}", encoded(scene(each.image_id)[0]), "png", None, {"objects": objects_to_json(each)})
        for each in truths
    ]
    write_shards(rows, str(tmp_path / "test"), 2)
    shards = f"{tmp_path}/test-*.tar"
    files = (f"out={tmp_path}/a.jsonl", f"coco={tmp_path}/r.json", f"pictures={tmp_path}/seen")
    line = predicted(*common, f"images={shards}", *files, ranks=2)
    assert line["image_id"] == "of the objects beside the images"
    config, request = evaluate.parse([*common, f"data.eval_shards={shards}"])
    scores = run_distributed(lambda world: evaluate.evaluate(config, request), 1, init=False)[0]
    results = json.loads((tmp_path / "r.json").read_text())
    assert [row["image_id"] for row in lines(tmp_path / "a.jsonl")] == [101, 102, 103]
    truth = COCO()
    truth.dataset = {"images": [], "annotations": [], "categories": [{"id": number} for number in range(3)]}
    for each in truths:
        truth.dataset["images"].append({"id": each.image_id, "height": each.size[0], "width": each.size[1]})
        for (x0, y0, x1, y1), label, area in zip(each.boxes.tolist(), each.classes.tolist(), each.area, strict=True):
            truth.dataset["annotations"].append({
                "id": len(truth.dataset["annotations"]) + 1, "image_id": each.image_id, "category_id": label,
                "iscrowd": 0, "bbox": [x0, y0, x1 - x0, y1 - y0], "area": float(area),
                "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
            })  # fmt: skip
    truth.createIndex()
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        judge = COCOeval(truth, truth.loadRes([dict(each) for each in results]), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
        assert 100 * judge.stats[0] == pytest.approx(scores[f"val/{name}_ap"], abs=1e-6)
        assert 100 * judge.stats[8] == pytest.approx(scores[f"val/{name}_ar100"], abs=1e-6)
    assert scores["val/box_ap"] > 10
    assert len(list((tmp_path / "seen").glob("*.png"))) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("out=a.txt",), r"out \(a.txt\) ends in none of"),
        (("top_k=0",), r"top_k \(0\) must be at least 1"),
        (("top_k=x",), r"top_k \(x\) must be a whole number"),
        (("maps=m",), "maps .* is for label images"),
        (("coco=c.json",), "coco .* is for objects"),
        (("pictures=p",), "pictures .* is for answers over images"),
        (("images=pipe:cat x.tar",), "images is a pipe"),
        (("checkpoint=c",), "weights and checkpoint are both given"),
        (("imagse=x",), "imagse"),
        (("model.frames=4", "task.cutmix_alpha=0", "task.erasing_prob=0"), r"model.frames \(4\) asks for clips"),
    ],
)
def test_wrong_keys_are_refused_before_anything_is_read(words, message, classifier, tmp_path):
    given = {word.partition("=")[0] for word in words}
    defaults = [word for word in of(classifier, tmp_path / "a.csv") if word.partition("=")[0] not in given]
    with pytest.raises(ConfigError, match=message):
        predict.check_request(*predict.parse([*defaults, *words]))


def test_simmim_is_refused_with_the_way_to_a_model_that_answers(tmp_path):
    run = write_run(tmp_path / "run", "task=simmim", "task.mask_unit_px=4", "data=cifar10", *MODEL)
    with pytest.raises(ConfigError, match=r"task=simmim names nothing in images; fine-tune .*swinv2-embed"):
        predict.check_request(*predict.parse([f"run_dir={run}", "images=x", "out=a.csv"]))


def test_what_is_needed_is_said_at_once(tmp_path):
    with pytest.raises(ConfigError, match="images.*out"):
        predict.parse([f"weights={save_model(tmp_path / 'w.safetensors')}"])
