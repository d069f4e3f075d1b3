"""data: where images are, in which order they are read, how they are cropped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

from swinv2_train.config.rules import (
    ABOVE_0,
    PATH,
    at_least,
    band_names,
    between,
    each,
    finite,
    folder_names,
    folder_path,
    low_high,
    non_empty,
    number_or_nan,
    one_of,
    positive,
)
from swinv2_train.config.schema.scale import ScaleConfig

PIPE = "pipe:"
"""Begins a part of data.shards that is a shell command which prints a shard."""


def is_pipe(pattern: str) -> bool:
    """True when a part of a shard pattern is a command."""
    return any(part.startswith(PIPE) for part in pattern.split("::"))


@dataclass
class EvalSplitConfig:
    """One of data.eval_splits.  It is the user's own entry, so its default is here and not in conf/."""

    shards: Annotated[str, PATH]
    """Its shards, in data.shards' notation."""
    labels: Annotated[str | None, PATH] = None
    """JSON file of labels that takes precedence over the shards' own (docs/evaluation.md); null = their own."""


@dataclass
class MixSourceConfig:
    """One of data.mix.  It is the user's own entry, so its default is here and not in conf/."""

    shards: Annotated[str, PATH]
    """Its shards, in data.shards' notation; no pipe."""
    weight: Annotated[float, positive()] = 1.0
    """Its share of every batch is this over the sum of all sources'."""


@dataclass
class DataConfig:
    shards: Annotated[str, PATH]
    """Training shards: path or address (https://, ..) with {00..11} or *, or pipe:COMMAND, joined by ::, or a folder"""
    eval_shards: Annotated[str | None, PATH]
    """Evaluation shards, in the same notation; null = no evaluation."""
    eval_splits: dict[str, EvalSplitConfig]
    """Further splits by name, scored only by the evaluate command: +data.eval_splits.NAME.shards=PATTERN"""
    mix: dict[str, MixSourceConfig]
    """Sources in place of data.shards: +data.mix.NAME.shards=PATTERN +data.mix.NAME.weight=0.7 (docs/data.md)"""
    num_workers: Annotated[int | None, at_least(0)]
    """Loader processes per rank; 0 decodes in the training process; null: one fewer than the rank has cores, 1 to 8."""
    prefetch_batches: Annotated[int, at_least(1)]
    """Micro-batches each worker prepares ahead."""
    lanes: Annotated[int, at_least(1)]
    """Streams into which an epoch is cut; ranks read whole lanes."""
    window_shards: Annotated[int, at_least(1)]
    """Shards that are shuffled together in one lane."""
    balanced: bool
    """Give every class the same share of each epoch: images of rare ones come again (docs/data.md#balanced-classes)"""
    shuffle_buffer_images: Annotated[int, at_least(1)]
    """Undecoded images that each loader process of a pipe mixes; other shards are mixed by lanes and window_shards."""
    crop_scale: Annotated[list[float], low_high(1)]
    """Share of the image's area that a random crop covers: [low, high]."""
    crop_ratio: Annotated[list[float], low_high(math.inf)]
    """Width over height of a random crop: [low, high]."""
    eval_crop: Annotated[str, one_of("centre", "squash")]
    """centre (resize with the shape kept, cut out the centre) or squash (resize each side on its own, then cut)."""
    eval_crop_pct: Annotated[float, between(ABOVE_0, 1)]
    """The evaluation's centre crop as a share of the resized image's side (with centre: of its shorter one)."""
    interpolation: Annotated[str, one_of("bilinear", "bicubic")]
    """bilinear or bicubic."""
    hflip: Annotated[float, between(0, 1)]
    """Probability of a horizontal flip."""
    dihedral: bool
    """Turn each training image by 0, 90, 180 or 270 degrees and mirror half of them (no side is up, as from space)."""
    frame_stride: Annotated[int, at_least(1)]
    """Of clips (model.frames): frames of the file from one frame of a clip to the next (arXiv:2106.13230: 2)."""
    video_decoder: Annotated[str, one_of("pyav", "torchcodec")]
    """pyav, or torchcodec, which needs FFmpeg on the machine and does not tell damaged frames; both give the same."""
    mean: Annotated[list[float], each(finite())]
    """Mean of the normalisation per band, of scaled values (data.scale; photographs: pixels in 0..1)."""
    std: Annotated[list[float], each(positive())]
    """Standard deviation of the normalisation per band."""
    bands: Annotated[list[Any] | None, band_names()]
    """Bands of the files that the model sees, in its order: indices, or names (docs/data.md); null = all there are."""
    image_member: str | None
    """What follows KEY. in the name of the image, where that has several dots: input.npy; null = by its ending."""
    labels: Annotated[str | None, PATH]
    """CSV or Parquet file with the labels of the images, in place of their own (docs/data.md#labels-in-a-table)"""
    eval_labels: Annotated[str | None, PATH]
    """The same for data.eval_shards; null = data.labels."""
    labels_key: str | None
    """Column of data.labels that names the images, with or without their endings; null = the first."""
    labels_columns: list[str] | None
    """Columns of data.labels with the labels, in the order of the model's outputs; null = all others."""
    labels_separator: Annotated[str, non_empty()]
    """What stands between the classes of a cell where an image has several."""
    label_folders: Annotated[list[str] | None, folder_names()]
    """[images, annotations]: images/a/b.jpg has annotations/a/b.png (or columns called so); null = a/b.seg.png."""
    annotations: Annotated[str | None, folder_path()]
    """Objects of a folder's images, from that folder on: COCO json, or a folder of others' files; {name} = its name."""
    array_layout: Annotated[str, one_of("hwc", "chw")]
    """Axes of .npy and .npz arrays: hwc (height, width, bands) or chw."""
    scale: ScaleConfig
    """From the files' numbers to the values that mean and std are of."""
    nodata: Annotated[list[float] | None, each(number_or_nan())]
    """Numbers of the files that mean that nothing was measured, nan among them; null = every pixel counts."""
    max_nodata_fraction: Annotated[float, between(0, 1)]
    """An image of which a larger share (of all bands' pixels) is no data is a damaged sample (data.on_bad_sample)."""
    picture_bands: list[int] | None
    """Places in data.bands of the three bands that pictures show as RGB, or of one, as grey; null = the first three."""
    picture_all_bands: bool
    """SimMIM's pictures have a row for each band of the first image in place of a row for each image."""
    on_bad_sample: Annotated[str, one_of("error", "replace")]
    """error: a damaged sample stops the run and is named; replace: it is replaced, with loss weight 0."""
    max_bad_fraction: Annotated[float, between(0, 1)]
    """replace stops the run above this share of damaged samples, over all ranks and starts."""
    verify: bool
    """Compare every image that is read with its checksum in the shard's index: a flipped bit is a damaged sample."""
    cache_dir: Annotated[str | None, PATH]
    """Local folder for shards of an address, shared by all runs of a host; null = ~/.cache/swinv2_train/shards."""
    cache_gib: Annotated[float, positive()]
    """GiB that the shards in cache_dir may take; all shards that a host's ranks mix at a time must fit."""
    fetch_ahead_shards: Annotated[int, at_least(0)]
    """Shards of an address that each rank fetches before its lanes reach them."""
    fetch_stall_sec: Annotated[float, positive()]
    """A transfer without a byte for this many seconds is cut off and retried."""
    fetch_give_up_sec: Annotated[float, at_least(0)]
    """Seconds, over all attempts, after which a shard that cannot be fetched ends the run."""
    record_keys: bool
    """Write the sample keys of every step to RUN_DIR/sample_keys/."""
    source: Annotated[str | None, PATH]
    """Folder or archive of the demo's images; null = the data set's own sources."""


SPLITS, MIX = "data.eval_splits.", "data.mix."
"""Below them the user's own names begin."""
OWN_ENTRIES: dict[str, tuple[str, type]] = {SPLITS: ("split", EvalSplitConfig), MIX: ("source", MixSourceConfig)}
"""What is below each: what it is called, and its keys."""
