"""``python -m swinv2_train.predict run_dir=DIR images=IMAGES out=FILE``: what a trained model says of images.

  images=FOLDER|SHARDS|FILE      a folder, shards, a saved data set, a list of files, or one file; no labels are needed;
                                 clips, for a model of clips
  out=FILE.csv|jsonl|parquet     a row an image, in order: classes, names and probabilities of a classifier; the classes
                                 and their pixels of a segmentation; boxes, scores and masks of a detector; or "error"
  run_dir=DIR [checkpoint=DIR]   a run's newest complete checkpoint, or the one that is named
  weights=PATH [format=NAME]     other weights of any known format, with or without a run's configuration
  weights=hf://USER/NAME         the same from the Hugging Face hub; [@REVISION][/FILE] behind it say which
  ema=true                       the averages of a run's weights in place of these
  top_k=5                        of a classifier: how many classes a row names at most
  maps=DIR                       of a segmentation: where the label images go (default: FILE_maps); grey is the class
  pictures=DIR                   of a segmentation or detector: answers over their images, to be looked at
  coco=FILE.json                 of a detector: COCO's list of results

and [KEY=VALUE ...] overrides of the configuration: task.eval_flip=true and task.eval_scales=[...] average over views,
train.micro_batch_size is how many images the model sees at a time.  Any number of processes (torchrun).  The same
command again goes on after a stop or kill.  docs/predict.md has examples.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swinv2_train.config import Config, ConfigError
from swinv2_train.config.command_line import run_on_weights
from swinv2_train.data.loading.listed import ListedBatch
from swinv2_train.data.sources.base import Source
from swinv2_train.data.sources.folder import Folder
from swinv2_train.data.tables import Column, check_table, write_table
from swinv2_train.distributed import on_main
from swinv2_train.inference.journal import Journal, Row, missing
from swinv2_train.inference.loaded import LoadedModel
from swinv2_train.inference.sweep import ModelRequest, close_sweep, job_of, load_model, open_sweep, parse_model, sweep
from swinv2_train.storage.atomic import replacing_output
from swinv2_train.tasks import task_class
from swinv2_train.tasks.answers import Answer, Ask, ClassMap
from swinv2_train.training.attention_paths import compile_kernel
from swinv2_train.training.preflight import preflight

OWN_KEYS = ("top_k", "maps", "pictures", "coco")
IMAGE, MAP, ERROR = "image", "map", "error"
"""The columns that every table has, or every one of maps, beside the task's own."""


@dataclass(frozen=True)
class PredictRequest:
    """What the command line asks for besides the configuration."""

    model: ModelRequest
    top_k: int = 5
    maps: str | None = None
    pictures: str | None = None
    coco: str | None = None


def predict(config: Config, request: PredictRequest) -> dict[str, Any]:
    """Write a row for each image of request.model.images over all ranks; print what was done as one JSON line.

    Returns what the line holds.  Raises ConfigError for wrong input, before the model is built where that is possible.
    """
    columns = check_request(config, request)
    out = Path(request.model.out)
    journal = Journal(out.with_name(f"{out.name}.unfinished"))
    over = open_sweep(config, request.model, lambda: check_new(out, journal))
    world, source = over.world, over.source
    on_main(world, lambda: check_names(source, request, columns))
    model, weights = load_model(config, request.model, world)
    if config.model.attention == "fused":
        compile_kernel(world, over.say)
    ask = model.ask(request.top_k)
    own = {key: getattr(request, key) for key in OWN_KEYS}
    on_main(world, lambda: journal.begin(job_of(config, request.model, weights, source, own), "out"))
    writer = RowWriter(model, ask, request, source)
    sweep(config, over, model.transform, journal, writer.rows)
    line = on_main(world, lambda: finish(request, columns, journal, source.num_samples))
    return close_sweep(over, {**request.model.origin(weights), **line})


def check_request(config: Config, request: PredictRequest) -> dict[str, Column]:
    """Everything that needs no image, no weights and no process group.  Returns the table's columns."""
    preflight(config, training=False)
    if request.top_k < 1:
        raise ConfigError(f"top_k ({request.top_k}) must be at least 1")
    check_table(Path(request.model.out), "out")
    task = task_class(config.task)
    columns = task.answer_columns(config.task, request.top_k)
    if columns is None:
        raise ConfigError(
            f"task={config.task.name} names nothing in images; fine-tune the run first (task=classify task.init_from="
            f"{config.run_dir}), or take its features: swinv2-embed"
        )
    maps, objects = "pixels" in columns, "boxes" in columns
    for key, has, what in (
        ("maps", maps, "label images, which a segmentation has"),
        ("pictures", maps or objects, "answers over images, which a segmentation or a detector has"),
        ("coco", objects, "objects, which a detector has"),
    ):
        if getattr(request, key) is not None and not has:
            raise ConfigError(
                f"{key} ({getattr(request, key)}) is for {what}, not task={config.task.name}; leave it out"
            )
    if objects:
        task.preflight(config.task)
    return {IMAGE: Column("str"), **columns, **({MAP: Column("str")} if maps else {}), ERROR: Column("str")}


def check_new(out: Path, journal: Journal) -> None:
    """Nothing that is finished is written over."""
    if out.exists() and not journal.folder.exists():
        raise ConfigError(f"out ({out}) exists already; delete it, or name another file")


def check_names(source: Source, request: PredictRequest, columns: dict[str, Column]) -> None:
    """Two images do not share the name of a label image or a picture."""
    if isinstance(source, Folder) and (MAP in columns or request.pictures is not None):
        seen: set[str] = set()
        for number in range(source.num_samples):
            name = file_name(source, number, os.fsdecode(source.image_name(number)))
            if name in seen:
                raise ConfigError(
                    f"images: two images would both be written as {name}: they differ in the ending alone; rename one"
                )
            seen.add(name)


def file_name(source: Source, number: int, key: str) -> str:
    """Of an image's label image and picture: in a folder where the image is, elsewhere by its number."""
    return f"{os.path.splitext(key)[0]}.png" if isinstance(source, Folder) else f"{number:08d}.png"


class RowWriter:
    """From answers to rows, and the files beside these."""

    def __init__(self, model: LoadedModel, ask: Ask, request: PredictRequest, source: Source) -> None:
        self.model, self.ask, self.source = model, ask, source
        out = Path(request.model.out)
        self.out, self.maps = out.parent, Path(request.maps or out.with_name(f"{out.stem}_maps"))
        self.pictures = None if request.pictures is None else Path(request.pictures)

    def rows(self, batch: ListedBatch) -> list[Row]:
        """A row for each image of a batch."""
        answers = self.model.answers(batch.rows, self.ask)
        found: list[Row] = []
        for place, (key, problem) in enumerate(zip(batch.keys, batch.problems, strict=True)):
            answer = answers[place]
            if problem is not None or answer is None:
                found.append({IMAGE: key, ERROR: problem})
                continue
            name = file_name(self.source, batch.first + place, key)
            found.append({IMAGE: key, **answer.row(), **self._files(batch.rows, place, answer, name)})
        return found

    def _files(self, rows: dict[str, Any], place: int, answer: Answer, name: str) -> Row:
        """Write the label image and the picture of an answer; returns what its row says of them."""
        if self.pictures is not None:
            picture = self.model.task.overlay(rows, place, answer, self.model.classes)
            assert picture is not None, "check_request refuses pictures without overlays"
            _save(self.pictures / name, picture)
        if not isinstance(answer, ClassMap):
            return {}
        _save(self.maps / name, answer.classes)
        return {MAP: os.path.relpath(self.maps / name, self.out)}


def finish(request: PredictRequest, columns: dict[str, Column], journal: Journal, images: int) -> dict[str, Any]:
    """Put the rows of all ranks in order into the table; the journal goes.  Returns what the line says of them."""
    pieces = journal.pieces()
    assert not missing(pieces, images), "every image has its row by now"
    unreadable: list[str] = []

    def rows() -> Iterator[Row]:
        for row in journal.rows(pieces):
            if ERROR in row:
                unreadable.append(row[IMAGE])
            yield row

    out = Path(request.model.out)
    with replacing_output(out) as file:
        write_table(file, out.suffix, columns, rows())
    line: dict[str, Any] = {"images": images, "unreadable": len(unreadable), "out": str(out)}
    if MAP in columns:
        line["maps"] = str(request.maps or out.with_name(f"{out.stem}_maps"))
    if request.pictures is not None:
        line["pictures"] = request.pictures
    if request.coco is not None:
        known = all(ERROR in row or row["image_id"] is not None for row in journal.rows(pieces))
        with replacing_output(Path(request.coco)) as file:
            file.write(json.dumps(list(_results(journal.rows(pieces), known)), allow_nan=False).encode() + b"\n")
        line |= {"coco": request.coco, "image_id": "of the objects beside the images" if known else "the row, from 0"}
    journal.remove()
    return line


def _results(rows: Iterator[Row], known: bool) -> Iterator[Row]:
    """COCO's results, of which category_id is the number of the class.  known: images have numbers of their own."""
    for number, row in enumerate(rows):
        if ERROR in row:
            continue
        masks = row["masks"] or [None] * len(row["boxes"])
        for box, score, label, mask in zip(row["boxes"], row["scores"], row["classes"], masks, strict=True):
            x0, y0, x1, y1 = box
            result = {
                "image_id": row["image_id"] if known else number, "category_id": label,
                "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score,
            }  # fmt: skip
            if mask is not None:
                result["segmentation"] = {"size": [row["height"], row["width"]], "counts": mask}
            yield result


def _save(path: Path, pixels: Any) -> None:
    from PIL import Image

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror or error}); name another place") from error


def parse(arguments: list[str]) -> tuple[Config, PredictRequest]:
    """The configuration and the command's own keys of a command line."""
    config, model, own = parse_model(arguments, OWN_KEYS, "FILE.csv|jsonl|parquet")
    values: dict[str, Any] = dict(own)
    if "top_k" in values:
        if not own["top_k"].isdecimal():
            raise ConfigError(f"top_k ({own['top_k']}) must be a whole number")
        values["top_k"] = int(own["top_k"])
    return config, PredictRequest(model=model, **values)


def main() -> None:
    """The console script swinv2-predict."""
    run_on_weights(__doc__, parse, predict)


if __name__ == "__main__":
    main()
