"""``python -m swinv2_train.look run_dir=DIR images=IMAGES out=PAGE``: what a trained model looks at, on one page.

  images=FOLDER|SHARDS|FILE      a folder, shards, a saved data set, or one image file; no labels are needed
  out=FILE.html|DIR              the page, or where look.html is to be: one file, to be opened in any browser
  max_images=8                   so many of the images are shown, evenly taken from the first to the last
  queries=[[0.5,0.5],...]        attention of these places: shares of the height and of the width (default: the middle
                                 and four around it)
  blocks=[1.2,3.6]               STAGE.BLOCK, counted from 1 (default: the last two of each stage)
  class=NAME|NUMBER              the class, or the number of the value, that Grad-CAM explains (default: what is said)
  cam_stage=4|[2,4]              on which stages' maps (default: the last)
  neighbours=6                   so many images that are most alike; 0 = none
  gallery=FOLDER|SHARDS|DIR      among these (default: images); DIR of swinv2-embed's: among those that it has seen
  max_gallery=500                so many of them, evenly taken; of swinv2-embed's all
  run_dir=DIR [checkpoint=DIR]   a run's newest complete checkpoint, or the one that is named
  weights=PATH [format=NAME]     other weights of any known format, with or without a run's configuration
  ema=true                       the averages of a run's weights in place of these

and [KEY=VALUE ...] overrides of the configuration.  One process.  Runs of SimMIM show what they reconstruct.
docs/look.md says how to read the page.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swinv2_train.config import Config, ConfigError, is_pipe, pair
from swinv2_train.config.command_line import run_on_weights
from swinv2_train.config.load import config_yaml
from swinv2_train.config.near_names import did_you_mean
from swinv2_train.config.secret_texts import without_secrets
from swinv2_train.data.sources.base import Source
from swinv2_train.inference.gallery import (
    Gallery,
    Seen,
    computed_gallery,
    evenly,
    is_saved_gallery,
    saved_gallery,
    see,
)
from swinv2_train.inference.loaded import LoadedModel
from swinv2_train.inference.neighbours import Thumbnails, most_alike
from swinv2_train.inference.sweep import (
    ModelRequest,
    Sweep,
    close_sweep,
    load_model,
    open_images,
    open_sweep,
    parse_model,
)
from swinv2_train.inference.vectors import Vectors
from swinv2_train.inspection.attention import BlockPlace, attention_of, last_pairs
from swinv2_train.inspection.class_activation import cam_layer, class_activation
from swinv2_train.inspection.page import (
    ACTIVATION,
    NEIGHBOURS,
    RECONSTRUCTION,
    Activation,
    Heading,
    Looked,
    Neighbour,
    image_section,
    look_page,
)
from swinv2_train.runtime import arithmetic
from swinv2_train.storage.atomic import replacing_output
from swinv2_train.tasks.answers import Evidence
from swinv2_train.tasks.inputs import picture_bands, viewable
from swinv2_train.training.preflight import preflight

OWN_KEYS = ("max_images", "queries", "blocks", "class", "cam_stage", "neighbours", "gallery", "max_gallery")
QUERIES = ((0.5, 0.5), (0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75))
PAGE = "look.html"
_LISTED = 20
"""Unreadable images in the printed line."""


@dataclass(frozen=True)
class LookRequest:
    """What the command line asks for besides the configuration."""

    model: ModelRequest
    max_images: int = 8
    queries: tuple[tuple[float, float], ...] = QUERIES
    blocks: tuple[BlockPlace, ...] = ()
    """Empty = the last two of each stage."""
    wanted: str | None = None
    """A class by its name or number, or a value by its number; None = what the model says."""
    cam_stages: tuple[int, ...] = ()
    """From 0; empty = the last."""
    neighbours: int = 6
    gallery: str | None = None
    max_gallery: int = 500

    @property
    def page(self) -> Path:
        """Where the page is written."""
        out = Path(self.model.out)
        return out if out.suffix == ".html" else out / PAGE


def look(config: Config, request: LookRequest) -> dict[str, Any]:
    """Write the page; print what was done as one JSON line.

    Returns what the line holds.  Raises ConfigError for wrong input, before the model is built where that is possible.
    """
    preflight(config, training=False)
    if config.model.frames is not None:
        raise ConfigError(
            f"model.frames ({config.model.frames}): this is a model of clips, of which no page is made; ask it by "
            "swinv2-predict and swinv2-embed"
        )
    over = open_sweep(config, request.model, lambda: check_new(request))
    if over.world.world_size > 1:
        raise ConfigError(f"swinv2-look is one process, not {over.world.world_size}; start it without torchrun")
    with replacing_output(request.page) as file:
        page, line = page_of(config, request, over)
        file.write(page.encode())
    line |= {"out": str(request.page), "mib": round(len(page) / 2**20, 2)}
    return close_sweep(over, line)


def check_new(request: LookRequest) -> None:
    """Nothing that is finished is written over."""
    if request.page.exists():
        raise ConfigError(f"out ({request.page}) exists already; delete it, or name another file")


def page_of(config: Config, request: LookRequest, over: Sweep) -> tuple[str, dict[str, Any]]:
    """The page, and what is told of it."""
    world, source, say = over
    config = replace(config, model=replace(config.model, attention="reference"))  # a few images: kernels gain nothing
    model, weights = load_model(config, request.model, world)
    model.module.requires_grad_(False)
    with torch.no_grad(), arithmetic(config.runtime.deterministic):
        eye, told = Eye(config, request, model), set[str]()
        eye.gallery = gallery = open_gallery(config, request, model, source, say, told)
        sections, unreadable = [], {} if gallery is None else dict(gallery.unreadable)
        shown = evenly(source.num_samples, request.max_images).tolist()
        for seen in see(config, source, eye.transform, shown, told):
            if seen.problem is not None:
                unreadable[seen.key] = seen.problem
                continue
            sections.append(image_section(eye.looked(seen)))
            say(f"image {len(sections)}: {seen.key}")
    heading = Heading(
        title=f"{Path(weights if request.model.weights else config.run_dir).resolve().name}: a look inside",
        lines=facts_of(config, weights, len(sections), source, gallery),
        absent=eye.absent,
        unreadable=unreadable,
        config=without_secrets(config_yaml(config)),
    )
    return look_page(heading, sections), {
        **request.model.origin(weights), "shown": len(sections),
        "images": source.num_samples, "gallery": 0 if gallery is None else len(gallery.numbers),
        "unreadable": len(unreadable), "unreadable_images": list(unreadable)[:_LISTED], "not_shown": list(eye.absent),
    }  # fmt: skip


def places_of(depths: Sequence[int], request: LookRequest) -> tuple[tuple[BlockPlace, ...], tuple[int, ...]]:
    """The blocks and the stages that are asked for; ConfigError where a model of so many blocks has no such."""
    for place in request.blocks:
        if place.stage >= len(depths) or place.block >= depths[place.stage]:
            raise ConfigError(
                f"blocks ({place.stage + 1}.{place.block + 1}) is no block of this model, whose stages have "
                f"{', '.join(map(str, depths))}"
            )
    for stage in request.cam_stages:
        if stage >= len(depths):
            raise ConfigError(f"cam_stage ({stage + 1}) is no stage of this model, which has {len(depths)}")
    return request.blocks or tuple(last_pairs(depths)), request.cam_stages or (len(depths) - 1,)


def wanted_number(config: Config, request: LookRequest, model: LoadedModel) -> int | None:
    """The number of the class or value that Grad-CAM is asked of; None = what the model says."""
    if request.wanted is None:
        return None
    if isinstance(model.task.evidence, str):
        raise ConfigError(f"class ({request.wanted}) is for Grad-CAM: {model.task.evidence}; leave it out")
    if model.classes is not None and request.wanted in model.classes:
        return model.classes.index(request.wanted)
    count = config.task.pixel_classes or config.task.label_rows
    if request.wanted.isdecimal() and int(request.wanted) < count:
        return int(request.wanted)
    hint = did_you_mean(request.wanted, model.classes or ())
    raise ConfigError(
        f"class ({request.wanted}) is none of the model's; {hint}{' ' if hint else ''}name one, or give a number from "
        f"0 to {count - 1}"
    )


def open_gallery(
    config: Config, request: LookRequest, model: LoadedModel, source: Source, say: Any, told: set[str]
) -> Gallery | None:  # fmt: skip
    """The images among which neighbours are looked for; None where none are.  told: as see() takes it."""
    if not request.neighbours:
        return None
    if request.gallery is None:
        return computed_gallery(config, model, source, request.max_gallery, say, told)
    if is_saved_gallery(Path(request.gallery)):
        return saved_gallery(config, model, Path(request.gallery), told)
    other = open_images(config, ModelRequest(request.gallery, request.model.out), say, "gallery")
    found = computed_gallery(config, model, other, request.max_gallery, say, told)
    if other.digest == source.digest:
        return found
    return found._replace(unreadable={f"{key} (gallery)": why for key, why in found.unreadable.items()})


def facts_of(config: Config, weights: str, shown: int, source: Source, gallery: Gallery | None) -> list[str]:
    """What the page is of, a line each."""
    height, width = pair("model.img_size", config.model.img_size)
    found = [
        f"{config.task.name} · SwinV2 {config.model.name} · {height} x {width} px",
        f"weights: {weights}",
        f"{shown} of {source.num_samples:,} images are shown, as the model sees them",
    ]
    if gallery is not None:
        found.append(f"neighbours among {len(gallery.numbers):,} of {gallery.source.num_samples:,} images")
    return found


class Eye:
    """From an image to what is shown of it."""

    def __init__(self, config: Config, request: LookRequest, model: LoadedModel) -> None:
        self.config, self.request, self.model = config, request, model
        self.blocks, self.cam_stages = places_of(model.task.encoder.depths, request)
        self.number = wanted_number(config, request, model)
        self.pooled = Vectors.build("pooled", config)
        self.reconstructs = model.task.picture is not None and not model.task.eval_transform.needs
        self.transform = model.transform if self.reconstructs else self.pooled
        self.gallery: Gallery | None = None
        """Among which neighbours are looked for; None = nowhere."""

    def looked(self, seen: Seen) -> Looked:
        """Everything that the page shows of one image."""
        images = seen.batch["images"]
        return Looked(
            name=seen.key,
            image=viewable(images[0], self.transform.bands, picture_bands(self.config)),
            patch_px=self.model.task.encoder.patch_size,
            queries=self.request.queries,
            attention=attention_of(
                self.model.task.encoder, lambda: self._maps(images), self.blocks, self.request.queries
            ),
            activations=self._activations(images),
            reconstruction=self.model.picture(seen.batch) if self.reconstructs else None,
            neighbours=self._neighbours(seen),
        )

    @property
    def absent(self) -> dict[str, str]:
        """What the page does not show, by its name, and why."""
        task, found = self.model.task, {}
        if self.model.headless:
            found[ACTIVATION] = "these weights have no head that names classes"
        elif isinstance(task.evidence, str):
            found[ACTIVATION] = task.evidence
        if not self.reconstructs:
            found[RECONSTRUCTION] = f"task={self.config.task.name} reconstructs nothing; task=simmim does"
        if self.gallery is None:
            found[NEIGHBOURS] = "neighbours=0"
        elif len(self.gallery.numbers) < 2 and self.request.gallery is None:
            found[NEIGHBOURS] = "there is one image alone; name others: gallery=FOLDER"
        return found

    def _maps(self, images: torch.Tensor) -> Any:
        return self.model.task.encoder.forward_features(self.model.task.normalise(images))

    def _activations(self, images: torch.Tensor) -> list[Activation]:
        task = self.model.task
        if ACTIVATION in self.absent or isinstance(task.evidence, str):
            return []
        evidence, said = task.evidence, list[Evidence]()
        found = []
        for stage in self.cam_stages:

            def scores() -> Sequence[torch.Tensor]:
                said[:] = evidence(self.model.module(images=task.normalise(images)), self.number, self.model.name)
                return [each.score for each in said]

            maps = class_activation(cam_layer(task.encoder, stage), scores)
            found += [Activation(each.text, stage, places.numpy()) for each, places in zip(said, maps, strict=True)]
        return found

    def _neighbours(self, seen: Seen) -> list[Neighbour]:
        if self.gallery is None or NEIGHBOURS in self.absent:
            return []
        vectors = self.model.vectors(seen.batch, self.pooled)["pooled"].numpy()
        if not np.isfinite(vectors).all():
            raise ConfigError("features are not finite numbers: the weights, or data.mean and data.std, are wrong")
        own = None
        if self.request.gallery is None:
            own = np.flatnonzero(self.gallery.numbers == seen.number)  # perhaps not among those that were taken
        found = most_alike(self.gallery.features, vectors, self.request.neighbours, own)
        thumbnails = Thumbnails(self.config, self.gallery.source)
        neighbours = [
            Neighbour(thumbnails.key(number), float(alike), thumbnails.of(number))
            for number, alike in zip(self.gallery.numbers[found.places[0]].tolist(), found.similarities[0], strict=True)
        ]
        thumbnails.close()
        return neighbours


def parse(arguments: list[str]) -> tuple[Config, LookRequest]:
    """The configuration and the command's own keys of a command line."""
    config, model, own = parse_model(arguments, OWN_KEYS, "FILE.html|DIR")
    values: dict[str, Any] = {}
    for key, least in (("max_images", 1), ("neighbours", 0), ("max_gallery", 1)):
        if key in own:
            if not own[key].isdecimal() or int(own[key]) < least:
                raise ConfigError(f"{key} ({own[key]}) must be a whole number of at least {least}")
            values[key] = int(own[key])
    if "queries" in own:
        values["queries"] = queries_of(own["queries"])
    if "blocks" in own:
        values["blocks"] = tuple(map(block_of, listed(own["blocks"])))
    if "cam_stage" in own:
        values["cam_stages"] = tuple(map(stage_of, listed(own["cam_stage"])))
    if "gallery" in own and values.get("neighbours") == 0:
        raise ConfigError(f"gallery ({own['gallery']}) is for neighbours, and neighbours is 0; leave one of them out")
    if is_pipe(own.get("gallery", "")):
        raise ConfigError("gallery is a pipe, whose images cannot be shown again; name shards or a folder")
    values |= {"wanted": own.get("class"), "gallery": own.get("gallery")}
    return config, LookRequest(model=model, **values)


def listed(text: str) -> list[str]:
    """The words of "A", "A,B" or "[A,B]"."""
    return [word.strip() for word in text.strip().strip("[]").split(",")]


def queries_of(text: str) -> tuple[tuple[float, float], ...]:
    """Pairs of shares; ConfigError for anything else."""
    try:
        found = json.loads(text)
        pairs = tuple((float(down), float(right)) for down, right in found)
    except (ValueError, TypeError):
        pairs = ()
    if not pairs or not all(0 <= share <= 1 for pair in pairs for share in pair):
        raise ConfigError(
            f"queries ({text}) must be pairs of shares of the height and of the width, 0 to 1 each: "
            "queries=[[0.5,0.5],[0.1,0.9]]"
        )
    return pairs


def block_of(word: str) -> BlockPlace:
    """STAGE.BLOCK, counted from 1; ConfigError for anything else."""
    found = re.fullmatch(r"([1-9]\d{0,3})\.([1-9]\d{0,3})", word)
    if found is None:
        raise ConfigError(f"blocks ({word}) must be STAGE.BLOCK, both counted from 1: blocks=[1.2,3.6]")
    return BlockPlace(int(found[1]) - 1, int(found[2]) - 1)


def stage_of(word: str) -> int:
    """A stage, from 0; ConfigError for anything but a number from 1."""
    if not re.fullmatch(r"[1-9]\d{0,3}", word):
        raise ConfigError(f"cam_stage ({word}) must be the number of a stage, from 1: cam_stage=4 or cam_stage=[2,4]")
    return int(word) - 1


def main() -> None:
    """The console script swinv2-look."""
    run_on_weights(__doc__, parse, look)


if __name__ == "__main__":
    main()
