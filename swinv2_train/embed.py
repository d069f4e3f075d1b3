"""``python -m swinv2_train.embed run_dir=DIR images=IMAGES out=DIR``: features of images, as arrays.

  images=FOLDER|SHARDS|FILE      a folder, shards, a saved data set, a list of files, or one file; no labels are needed;
                                 clips, for a model of clips
  out=DIR                        NAME.npy, a row an image, in order; keys.parquet (keys.csv without pyarrow): "image",
                                 and "error" of those that cannot be read, whose rows are NaN; embedding.json: what of
  features=pooled|stages|tiles   the mean of the last map (default); of each stage's; of each tile's last map
  tiles=[ROWS,COLUMNS]           how images are cut for features=tiles, each tile seen at the model's size
  dtype=fp32|fp16                of the arrays (default fp32)
  queries=10                     of features=pooled: so many images beside their nearest neighbours in search.png; 0 =
                                 none
  run_dir=DIR [checkpoint=DIR]   a run's newest complete checkpoint, or the one that is named
  weights=PATH [format=NAME]     other weights of any known format, with or without a run's configuration
  weights=hf://USER/NAME         the same from the Hugging Face hub; [@REVISION][/FILE] behind it say which
  ema=true                       the averages of a run's weights in place of these

and [KEY=VALUE ...] overrides of the configuration.  Any number of processes (torchrun).  The same command again goes on
after a stop or kill.  docs/predict.md has examples.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from swinv2_train.config import Config, ConfigError
from swinv2_train.config.command_line import run_on_weights
from swinv2_train.config.secret_texts import public
from swinv2_train.data.loading.listed import ListedBatch
from swinv2_train.data.sources.base import Source
from swinv2_train.data.tables import Column, can_write_parquet, write_table
from swinv2_train.distributed import on_main
from swinv2_train.inference.journal import Journal, Row, missing
from swinv2_train.inference.loaded import LoadedModel
from swinv2_train.inference.neighbours import nearest, search_picture
from swinv2_train.inference.sweep import ModelRequest, close_sweep, job_of, load_model, open_sweep, parse_model, sweep
from swinv2_train.inference.vectors import KINDS, Vectors
from swinv2_train.storage.atomic import replace_text, replacing
from swinv2_train.training.attention_paths import compile_kernel
from swinv2_train.training.preflight import preflight

OWN_KEYS = ("features", "tiles", "dtype", "queries")
DTYPES = {"fp32": np.float32, "fp16": np.float16}
_NEIGHBOURS = 8
"""Beside each query of the picture."""
_COLUMNS = {"image": Column("str"), "error": Column("str")}


@dataclass(frozen=True)
class EmbedRequest:
    """What the command line asks for besides the configuration."""

    model: ModelRequest
    features: str = "pooled"
    tiles: tuple[int, int] | None = None
    dtype: str = "fp32"
    queries: int = 10

    @property
    def out(self) -> Path:
        return Path(self.model.out)

    @property
    def unfinished(self) -> Path:
        """Where the journal is until every image has its row."""
        return self.out / "unfinished"


def embed(config: Config, request: EmbedRequest) -> dict[str, Any]:
    """Write the features of each image of request.model.images over all ranks; print what was done as one JSON line.

    Returns what the line holds.  Raises ConfigError for wrong input.
    """
    preflight(config, training=False)
    vectors = Vectors.build(request.features, config, request.tiles or (1, 1))
    over = open_sweep(config, request.model, lambda: check_new(request))
    world, source = over.world, over.source
    model, weights = load_model(config, request.model, world)
    if config.model.attention == "fused":
        compile_kernel(world, over.say)
    journal = Journal(request.unfinished)
    own = {"features": request.features, "tiles": request.tiles, "dtype": request.dtype}
    on_main(world, lambda: journal.begin(job_of(config, request.model, weights, source, own), "out"))
    shapes = vectors.shapes(model.task)
    on_main(world, lambda: make_arrays(request, journal, shapes, source.num_samples))
    writer = VectorWriter(model, vectors, request, shapes, source.num_samples)
    sweep(config, over, vectors, journal, writer.rows)
    writer.close()
    line = on_main(world, lambda: finish(config, request, journal, source, shapes))
    return close_sweep(over, {**request.model.origin(weights), **line})


def check_new(request: EmbedRequest) -> None:
    """Nothing that is finished is written over."""
    if (request.out / "embedding.json").exists() and not request.unfinished.exists():
        raise ConfigError(f"out ({request.out}) holds features already; delete it, or name another directory")


def make_arrays(
    request: EmbedRequest, journal: Journal, shapes: Mapping[str, tuple[int, ...]], images: int
) -> None:  # fmt: skip
    """An array for all images, or those of an earlier start; ConfigError where these are gone."""
    dtype, done = np.dtype(DTYPES[request.dtype]), bool(journal.pieces())
    for name, shape in shapes.items():
        path = request.out / f"{name}.npy"
        if done:
            if not path.is_file():
                raise ConfigError(
                    f"{path} is gone, of which {request.unfinished} says what is done; delete {request.out}"
                )
            continue
        with replacing(path) as file:
            header = {"descr": dtype.str, "fortran_order": False, "shape": (images, *shape)}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + images * math.prod(shape) * dtype.itemsize)


class VectorWriter:
    """From batches to rows of the arrays, each in its place; other processes write other rows of the same files."""

    def __init__(
        self, model: LoadedModel, vectors: Vectors, request: EmbedRequest, shapes: Mapping[str, tuple[int, ...]],
        images: int,
    ) -> None:  # fmt: skip
        self.model, self.vectors, self.dtype = model, vectors, np.dtype(DTYPES[request.dtype])
        self.files = {name: (request.out / f"{name}.npy").open("r+b", buffering=0) for name in shapes}
        self.row_bytes = {name: math.prod(shape) * self.dtype.itemsize for name, shape in shapes.items()}
        self.images = images

    def rows(self, batch: ListedBatch) -> list[Row]:
        """Write a batch's vectors; a row for each image.  Raises ConfigError where the model gives no numbers."""
        absent = np.array([problem is not None for problem in batch.problems])
        for name, vectors in self.model.vectors(batch.rows, self.vectors).items():
            values = vectors[: len(batch.keys)].numpy()
            if not np.isfinite(values[~absent]).all():
                raise ConfigError("features are not finite numbers: the weights, or data.mean and data.std, are wrong")
            with np.errstate(over="ignore"):
                narrow = values.astype(self.dtype)
            if not np.isfinite(narrow[~absent]).all():
                raise ConfigError(
                    f"dtype ({self.dtype.name}) is too narrow for these features; delete out, and give dtype=fp32"
                )
            narrow[absent] = np.nan
            self._write(name, batch.first, narrow)
        return [
            {"image": key, **({} if problem is None else {"error": problem})}
            for key, problem in zip(batch.keys, batch.problems, strict=True)
        ]

    def close(self) -> None:
        """Let go of the arrays."""
        for file in self.files.values():
            file.close()

    def _write(self, name: str, first: int, values: np.ndarray) -> None:
        """By bytes and not by mapped pages, of which two hosts would each have their own."""
        file = self.files[name]
        start = os.fstat(file.fileno()).st_size - self.images * self.row_bytes[name]
        content = memoryview(values.tobytes())
        at = start + first * self.row_bytes[name]
        while content:
            written = os.pwrite(file.fileno(), content, at)
            content, at = content[written:], at + written
        os.fsync(file.fileno())


def finish(
    config: Config, request: EmbedRequest, journal: Journal, source: Source, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Keys, the picture, and what it all is; the journal goes.  Returns what the line says."""
    pieces = journal.pieces()
    assert not missing(pieces, source.num_samples), "every image has its row by now"
    rows = list(journal.rows(pieces))
    ending = ".parquet" if can_write_parquet() else ".csv"
    with replacing(request.out / f"keys{ending}") as file:
        write_table(file, ending, _COLUMNS, rows)
    line: dict[str, Any] = {
        "images": len(rows), "unreadable": sum("error" in row for row in rows), "out": str(request.out),
        "arrays": {f"{name}.npy": [len(rows), *shape] for name, shape in shapes.items()}, "dtype": request.dtype,
    }  # fmt: skip
    readable = np.array([number for number, row in enumerate(rows) if "error" not in row], int)
    if request.features == "pooled" and request.queries and len(readable) > 1:
        line["search"] = str(request.out / "search.png")
        chosen = readable[np.linspace(0, len(readable) - 1, min(request.queries, len(readable))).round().astype(int)]
        found = nearest(np.load(request.out / "pooled.npy", mmap_mode="r"), chosen, _NEIGHBOURS)
        search_picture(config, source, chosen, found.places, found.similarities).save(line["search"])
    facts = {**line, "features": request.features, "tiles": request.tiles, "images_from": request.model.images}
    replace_text(request.out / "embedding.json", json.dumps(public(facts), indent=1) + "\n")
    journal.remove()
    return line


def parse(arguments: list[str]) -> tuple[Config, EmbedRequest]:
    """The configuration and the command's own keys of a command line."""
    config, model, own = parse_model(arguments, OWN_KEYS, "DIR")
    values: dict[str, Any] = dict(own)
    kind = own.get("features", "pooled")
    if kind not in KINDS:
        raise ConfigError(f"features ({kind}) must be one of {', '.join(KINDS)}")
    if ("tiles" in own) != (kind == "tiles"):
        raise ConfigError(
            f"tiles=[ROWS,COLUMNS] belongs to features=tiles, and features is {kind}; give both or neither"
        )
    if "tiles" in own:
        sides = own["tiles"].strip("[] ").split(",")
        if len(sides) != 2 or not all(side.strip().isdecimal() and int(side) for side in sides):
            raise ConfigError(f"tiles ({own['tiles']}) must be two whole numbers of at least 1: tiles=[2,3]")
        values["tiles"] = (int(sides[0]), int(sides[1]))
    if own.get("dtype", "fp32") not in DTYPES:
        raise ConfigError(f"dtype ({own['dtype']}) must be one of {', '.join(DTYPES)}")
    if "queries" in own:
        if not own["queries"].isdecimal():
            raise ConfigError(f"queries ({own['queries']}) must be a whole number; 0 = no picture")
        values["queries"] = int(own["queries"])
    return config, EmbedRequest(model=model, **values)


def main() -> None:
    """The console script swinv2-embed."""
    run_on_weights(__doc__, parse, embed)


if __name__ == "__main__":
    main()
