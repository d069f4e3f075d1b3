"""Micro-batches for one rank: an endless training stream and a finite evaluation pass.

What a rank gets is a function of (order, position, rank, world_size); workers only fetch, so their number changes
nothing, and the one integer `images_seen` resumes the stream.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from swinv2_train.config import ConfigError, DataConfig
from swinv2_train.data.clips.clip import Clip, HeldClip
from swinv2_train.data.clips.views import ClipViews
from swinv2_train.data.loading.balanced_order import BalancedOrder
from swinv2_train.data.loading.batches import BatchRequest, EvalBatches, TrainBatches
from swinv2_train.data.loading.mixed_order import MixedOrder
from swinv2_train.data.loading.order import GlobalOrder, Location, Order, rank_shards
from swinv2_train.data.loading.rows import BatchRows, Row, tensors_of
from swinv2_train.data.loading.sample_rngs import sample_rngs
from swinv2_train.data.loading.shared_memory import Batch, BatchMemory
from swinv2_train.data.loading.workers import Fetch, Workers
from swinv2_train.data.sample import (
    EXAMPLE_PX,
    MEMBERS,
    OBJECTS,
    OF_LABELS,
    SEGMENTATION,
    Sample,
    SampleError,
    ShardError,
    Targets,
    example_targets,
)
from swinv2_train.data.shards.tar_reader import Manifest
from swinv2_train.data.sources.band_names import with_band_names
from swinv2_train.data.sources.base import Source
from swinv2_train.data.sources.label_counts import sample_classes
from swinv2_train.data.sources.labelled import LabelledSource
from swinv2_train.data.sources.mixture import Mixture
from swinv2_train.data.transforms.bands import Bands
from swinv2_train.data.transforms.decode import DecodeError

_log = logging.getLogger(__name__)


class Transform(Protocol):
    """A picklable function from one image to one batch row."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the targets without which a sample is damaged (data/sample.py)."""

    def __call__(self, image: torch.Tensor | Clip, targets: Targets, rng: np.random.Generator) -> Row:
        """image: uint8 (3, H, W); where it has an attribute `bands` (of Bands), the values of these, (C, H, W); where
        it has `clips` (of ClipViews), a Clip.  May raise SampleError, and DecodeError of a clip's frames.
        """


def accumulation_steps(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches per rank and optimizer step.  Raises ConfigError, naming the nearest sizes, when not whole."""
    per_pass = micro_batch_size * world_size
    if global_batch_size % per_pass:
        below = global_batch_size // per_pass * per_pass
        nearest = ", ".join(str(size) for size in (below, below + per_pass) if size > 0)
        raise ConfigError(
            f"train.global_batch_size ({global_batch_size}) is not a multiple of micro_batch_size ({micro_batch_size})"
            f" x world_size ({world_size}); nearest: {nearest}"
        )
    return global_batch_size // per_pass


def check_bad_fraction(max_bad_fraction: float, counted: int, bad_images: int, images_seen: int) -> None:
    """Raise SampleError when more than max_bad_fraction of the counted images were damaged samples."""
    if bad_images > max_bad_fraction * counted:
        raise SampleError(
            f"data.max_bad_fraction ({max_bad_fraction}) is exceeded: {bad_images} damaged samples among {images_seen} "
            "images; repair the shards or raise it"
        )


class TrainLoader:
    """An endless stream of this rank's micro-batches, from image number `start_images` on.

    Every batch has the transform's tensors stacked to (micro_batch_size, ...) and its plain values as lists, "weight"
    float32 (B,) (0 for a stand-in of a damaged sample), "keys" list[str], "num_bad" int and as many "problems":
    {"shard", "key", "cause"} of each damaged sample.  accumulation_steps() of them make one step.
    Raises ConfigError when the batch sizes do not divide; SampleError and ShardError while iterating.
    """

    def __init__(
        self,
        manifest: Source,
        config: DataConfig,
        transform: Transform,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        start_images: int,
    ) -> None:
        passes = accumulation_steps(global_batch_size, micro_batch_size, world_size)
        _check_targets(manifest, config, transform, "data.shards")
        self.manifest, self.config, self.seed = manifest, config, seed
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank, self.world_size, self.start_images = rank, world_size, start_images
        self.order: Order = order_of(manifest, seed, config)
        self.bad_images_before = 0
        """Damaged samples of the run, all ranks, until this start."""
        mixed = (math.ceil(config.lanes / world_size) + 1) * config.window_shards
        self._fetch = _Fetcher(manifest, config, transform, seed, mixed, micro_batch_size, held=2 * passes)
        self._workers = Workers(self)
        if isinstance(manifest, Manifest | Mixture):
            _check_room(self.order, manifest, config, start_images, global_batch_size, rank, world_size)

    def __iter__(self) -> Iterator[Batch]:
        ahead = self.config.fetch_ahead_shards if self.manifest.cache is not None else None
        sizes = (self.global_batch_size, self.micro_batch_size, self.rank, self.world_size)
        batches = TrainBatches(self.order, self.start_images, *sizes, ahead)
        images_seen, bad_images = self.start_images, self.bad_images_before
        for batch in self._workers.run(self._fetch, batches, self.config):
            images_seen += self.micro_batch_size * self.world_size
            bad_images += batch["num_bad"]
            if "sources" in batch:
                batch["sources"] = torch.tensor(batch["sources"])
            self.check_bad_images(bad_images, images_seen)  # of the other ranks' samples only the caller knows
            yield batch

    def shards_of_step(self, images_seen: int) -> list[list[str]]:
        """What the shards of this rank's images are called, by micro-batch of the step that begins at images_seen."""
        sizes = (self.global_batch_size, self.micro_batch_size, self.rank, self.world_size)
        passes = accumulation_steps(self.global_batch_size, self.micro_batch_size, self.world_size)
        requests = itertools.islice(TrainBatches(self.order, images_seen, *sizes, None), passes)
        return [[self.manifest.name(place[1]) for place in each.locations if place] for each in requests]

    def check_bad_images(self, bad_images: int, images_seen: int) -> None:
        """Raises SampleError when the run has had more damaged samples than data.max_bad_fraction of its images.

        Both count over all ranks and starts.  An epoch that has begun counts as a whole: the same damage comes early
        in one and late in another.
        """
        num_samples = self.manifest.num_samples
        counted = num_samples * max(1, math.ceil(images_seen / num_samples))
        check_bad_fraction(self.config.max_bad_fraction, counted, bad_images, images_seen)

    def state_dict(self, images_seen: int, bad_images: int) -> dict[str, Any]:
        """What a checkpoint keeps; the same on every rank.

        images_seen: images of all completed steps, all ranks; bad_images: the damaged samples among them.
        """
        return {"images_seen": images_seen, "bad_images": bad_images, **self._identity()}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Take over the count of damaged samples from `state` (of state_dict).

        Raises ConfigError when it belongs to other data or another order.
        """
        self.bad_images_before = state.get("bad_images", 0)  # older checkpoints have none
        mine = self._identity()
        if state["manifest"] != mine["manifest"]:
            theirs = state.get("num_samples")  # older checkpoints have none
            labels = ", or other labels in data.labels" if isinstance(self.manifest, LabelledSource) else ""
            held = "" if theirs is None else f": {mine['num_samples']} images now, {theirs} then"
            raise ConfigError(
                f"data.shards are not the shards of the checkpoint (another number, order or content{labels}){held}; "
                "name the same shards, or start a new run_dir"
            )
        if state.get("mix") != mine.get("mix"):
            raise ConfigError(
                f"data.mix ({_mix_text(mine.get('mix'))}) differs from the checkpoint's "
                f"({_mix_text(state.get('mix'))}), which would change the order of images; give the same weights, or "
                "start a new run_dir from its weights (task.init_from)"
            )
        if state.get("balanced", False) != mine.get("balanced", False):
            raise ConfigError(
                f"data.balanced ({str(self.config.balanced).lower()}) differs from the checkpoint's, which would "
                "change the order of images; set it as it was, or start a new run_dir from its weights (task.init_from)"
            )
        for name, key in (("seed", "seed"), ("lanes", "data.lanes"), ("window_shards", "data.window_shards")):
            if state.get(name) != mine[name]:
                raise ConfigError(
                    f"{key} ({mine[name]}) differs from the checkpoint's ({state.get(name)}), which would change the "
                    f"order of images in mid-epoch; set {key}={state.get(name)}, or start a new run_dir"
                )

    def restarted(self, start_images: int) -> TrainLoader:
        """This stream restarted at another image; this loader is closed."""
        self.close()
        return TrainLoader(
            self.manifest, self.config, self._fetch.transform, self.seed, self.global_batch_size,
            self.micro_batch_size, self.rank, self.world_size, start_images,
        )  # fmt: skip

    def close(self) -> None:
        """Stop the worker processes, if any; a new iteration starts new ones."""
        self._workers.close()

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "lanes": self.config.lanes,
            "window_shards": self.config.window_shards,
            "manifest": self.manifest.digest,
            "num_samples": self.manifest.num_samples,
            **({"balanced": True} if self.config.balanced else {}),
            **({"mix": _mix_of(self.manifest)} if isinstance(self.manifest, Mixture) else {}),
        }


def order_of(manifest: Source, seed: int, config: DataConfig) -> Order:
    """The global order of a source's samples, or of several sources'."""
    if isinstance(manifest, Mixture):
        counts = [source.counts for source in manifest.sources]
        return MixedOrder(counts, manifest.weights, seed, config.lanes, config.window_shards)
    if config.balanced:
        classes = sample_classes(manifest, "data.balanced")
        return BalancedOrder(manifest.counts, classes, seed, config.lanes, config.window_shards)
    return GlobalOrder(manifest.counts, seed, config.lanes, config.window_shards)


def _mix_of(mixture: Mixture) -> dict[str, int]:
    return dict(zip(mixture.names, mixture.weights, strict=True))


def _mix_text(mix: Mapping[str, int] | None) -> str:
    return "none" if mix is None else ", ".join(f"{name} {weight}" for name, weight in mix.items())


class EvalLoader:
    """One finite pass: every sample once over all ranks, the same number of batches on every rank.

    Batches are TrainLoader's; rows that only fill the last batches up have weight 0 and the key "".  A batch may
    consist of nothing else, so divide by the sum of the weights over all batches and ranks, not by a batch's own.
    key: the config key that named the shards, for error messages.
    """

    def __init__(
        self,
        manifest: Source,
        config: DataConfig,
        transform: Transform,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        key: str = "data.eval_shards",
    ) -> None:
        _check_targets(manifest, config, transform, key)
        self.manifest, self.config, self.micro_batch_size = manifest, config, micro_batch_size
        self.rank, self.world_size, self.key = rank, world_size, key
        self._fetch = _Fetcher(manifest, config, transform, seed=0, max_open=4, rows=micro_batch_size, held=2)
        self._workers = Workers(self)

    def __len__(self) -> int:
        """Batches per rank."""
        return math.ceil(math.ceil(self.manifest.num_samples / self.world_size) / self.micro_batch_size)

    @property
    def first_sample(self) -> int:
        """The number, over all shards, of this rank's first row; the next ones follow."""
        return self.rank * math.ceil(self.manifest.num_samples / self.world_size)

    def __iter__(self) -> Iterator[Batch]:
        bad = 0
        ahead = self.config.fetch_ahead_shards if self.manifest.cache is not None else None
        batches = EvalBatches(self.manifest.counts, self.micro_batch_size, self.rank, self.world_size, ahead)
        for batch in self._workers.run(self._fetch, batches, self.config):
            bad += batch["num_bad"]
            if bad > self.config.max_bad_fraction * self.manifest.num_samples:
                raise SampleError(
                    f"data.max_bad_fraction ({self.config.max_bad_fraction}) is exceeded in {self.key}: {bad} "
                    f"damaged samples on rank {self.rank}; repair the shards or raise it"
                )
            yield batch

    def close(self) -> None:
        """Stop the worker processes, if any; a new iteration starts new ones."""
        self._workers.close()


def check_labels(manifest: Source, config: DataConfig, key: str, remedy: str) -> None:
    """Raises ShardError, from the index alone, when more samples have no label than may be damaged."""
    what = f"no readable label ({manifest.labels_from})"
    _check_missing(manifest, manifest.unlabelled, config, what, key, remedy)


def _check_missing(
    manifest: Source, missing: Sequence[int], config: DataConfig, what: str, key: str, remedy: str
) -> None:
    """missing: samples per shard that have `what`, which only so many may have as may be damaged."""
    allowed = config.max_bad_fraction * manifest.num_samples if config.on_bad_sample == "replace" else 0
    if sum(missing) > allowed:
        shard = next(number for number, count in enumerate(missing) if count)
        raise ShardError(
            f"{key}: {sum(missing)} of {manifest.num_samples} samples have {what}, the first in "
            f"{manifest.name(shard)}; {remedy}"
        )


def check_kind(source: Source, key: str, clips: bool) -> None:
    """Raises ConfigError where any sample is an image and the model takes clips, or the other way round."""
    others = [of if not clips else count - of for count, of in zip(source.counts, source.clips, strict=True)]
    if not any(others):
        return
    shard = source.name(next(number for number, count in enumerate(others) if count))
    what, remedy = "clips, and the model takes images", "set model.frames to read clips"
    if clips:
        what = "images, and model.frames asks for clips"
        remedy = "name clips, set model.frames=null, or choose clips that lie beside images by data.image_member=mp4"
    raise ShardError(f"{key}: {sum(others)} of {source.num_samples} samples are {what}, the first in {shard}; {remedy}")


def _check_targets(manifest: Source, config: DataConfig, transform: Transform, key: str) -> None:
    """A supervised run on unlabelled shards fails before its first step, as does one on samples of another kind."""
    check_kind(manifest, key, clips_of(transform) is not None)
    if not set(OF_LABELS).isdisjoint(transform.needs):
        remedy = "this task needs labels: sort the images into class folders, or choose task=simmim"
        if isinstance(manifest, LabelledSource):
            remedy = "write theirs, remove the images, or set data.on_bad_sample=replace and data.max_bad_fraction"
        check_labels(manifest, config, key, remedy)
    if SEGMENTATION in transform.needs:
        what = f"no label image (.{MEMBERS[SEGMENTATION].suffix})"
        remedy = (
            "this task needs one beside every image: pack images with them (docs/segmentation.md); of shards that were "
            "indexed by an older version, make the index again (swinv2-make-shards --reindex)"
        )
        if OBJECTS in transform.needs:
            remedy = (
                "the semantic branch learns from one beside every image: pack the images with --annotations and "
                "--labels (docs/detection.md), or set task.semantic_classes=0"
            )
        _check_missing(manifest, manifest.unsegmented, config, what, key, remedy)
    if OBJECTS in transform.needs:
        what = f"no objects (.{MEMBERS[OBJECTS].suffix})"
        remedy = (
            "this task needs boxes for every image: pack the images with their annotations (docs/detection.md), or "
            "name those of a folder by data.annotations; of shards that were indexed by an older version, make the "
            "index again (swinv2-make-shards --reindex)"
        )
        _check_missing(manifest, manifest.unannotated, config, what, key, remedy)


def _check_room(
    order: Order,
    manifest: Manifest | Mixture,
    config: DataConfig,
    start: int,
    global_batch_size: int,
    rank: int,
    world_size: int,
) -> None:
    """What a rank mixes must fit into the cache, and twice, for some workers are already at the next blocks."""
    if manifest.cache is None:
        return
    mixed = config.window_shards * config.lanes
    now, later = rank_shards(order, start, global_batch_size, rank, world_size, mixed)
    needed = sum(_cached_bytes(manifest, shard) for shard in now + later[: len(now)])
    if needed > manifest.cache.max_bytes:
        raise ConfigError(
            f"data.cache_gib ({config.cache_gib:g}) is too small: rank {rank} alone mixes {len(now)} shards at a time, "
            f"{needed / 2**30:.3g} GiB with as many that follow; raise it, or lower data.lanes ({config.lanes}) or "
            f"data.window_shards ({config.window_shards})"
        )


def _cached_bytes(source: Source, shard: int) -> int:
    """What a shard takes in the cache."""
    if isinstance(source, Mixture):
        number, own = source.part(shard)
        return _cached_bytes(source.sources[number], own)
    return source.sizes[shard] if isinstance(source, Manifest) and source.cache is not None else 0


# --------------------------------------------------------------------------------------------------------------------
# Fetching: runs in the worker processes


def bands_of(transform: Transform) -> Bands | None:
    """How the transform's images are read as values; None = as photographs, as where it does not say."""
    bands: Bands | None = getattr(transform, "bands", None)
    return bands


def clips_of(transform: Transform) -> ClipViews | None:
    """Which frames of clips the transform sees; None = it takes images, as where it does not say."""
    clips: ClipViews | None = getattr(transform, "clips", None)
    return clips


def example_image(transform: Transform) -> torch.Tensor | Clip:
    """An image or a clip without contents, of the kind that the transform takes."""
    if clips_of(transform) is not None:
        return HeldClip(torch.zeros(3, 1, EXAMPLE_PX, EXAMPLE_PX, dtype=torch.uint8))
    bands = bands_of(transform)
    count, dtype = (3, torch.uint8) if bands is None else (bands.count, torch.float32)
    return torch.zeros(count, EXAMPLE_PX, EXAMPLE_PX, dtype=dtype)


def memory_of(transform: Transform, rows: int, slots: int) -> BatchMemory | None:
    """Memory for so many batches of so many of the transform's rows; None where it makes none of a plain image."""
    try:  # every row has one shape, whatever the image's
        row = transform(example_image(transform), example_targets(transform.needs), np.random.default_rng(0))
    except SampleError:
        return None
    return BatchMemory({**tensors_of(row), "weight": torch.tensor(1.0)}, rows, slots)


class _Fetcher(Fetch):
    """Reads, decodes and transforms one micro-batch.  Picklable; holds no random state and no position.

    rows: of a micro-batch.  held: micro-batches that the caller keeps at a time.
    """

    def __init__(
        self,
        manifest: Source,
        config: DataConfig,
        transform: Transform,
        seed: int,
        max_open: int,
        rows: int,
        held: int,
    ) -> None:
        super().__init__()
        # within the usual limit of 1024 file descriptors: one for a shard that is open, one for one that is at hand
        self.source, self.reader = manifest, manifest.open_reader(min(max_open, 256))
        self.transform, self.seed = transform, seed
        self._parts = manifest.sources if isinstance(manifest, Mixture) else (manifest,)
        self._bands = [with_band_names(bands_of(transform), source) for source in self._parts]
        self.bands = self._bands[0]
        self.rows, self.held = rows, held
        self.on_bad_sample = config.on_bad_sample
        self.first_sample = np.cumsum([0, *manifest.counts]).tolist()
        self._filler: Row | None = None

    def memory(self, ahead: int) -> BatchMemory | None:
        return memory_of(self.transform, self.rows, ahead + self.held + 1)

    def batch(self, request: BatchRequest) -> Batch:
        if request.upcoming_shards is not None:
            self.reader.fetch_ahead(request.upcoming_shards)
        made = BatchRows(len(request.locations), self.out)
        keys: list[str] = []
        problems: list[dict[str, str]] = []
        # all at once: between two images, with the processor's caches full of pixels, it takes five times as long
        rngs = iter(self._rngs([place for place in request.locations if place is not None]))
        for location in request.locations:
            if location is None:  # a padding row
                made.add(None)
                keys.append("")
                continue
            try:
                made.add(self._row(location, next(rngs)))
            except SampleError as error:
                if self.on_bad_sample != "replace":
                    remedy = "repair it, or set data.on_bad_sample=replace to go on without it"
                    raise SampleError(f"{error.cause}; {remedy}", error.shard, error.key) from error
                problems.append({"shard": error.shard, "key": error.key, "cause": error.cause})
                made.add(None)
            keys.append(self.reader.key(location[1], location[2]))
        batch = made.batch(made.first or self._readable(request.fallback_shard))
        batch["keys"] = keys
        batch["num_bad"] = len(problems)
        batch["problems"] = problems
        if isinstance(self.source, Mixture):
            batch["sources"] = [0 if place is None else self.source.part(place[1])[0] for place in request.locations]
        return batch | self.noted()

    def _rngs(self, locations: Sequence[Location]) -> list[np.random.Generator]:
        return sample_rngs(self.seed, [(epoch, self.first_sample[shard] + at) for epoch, shard, at in locations])

    def _row(self, location: Location, rng: np.random.Generator) -> Row:
        _, shard, index = location
        sample: Sample = self.reader.read(shard, index)
        if isinstance(self.source, Mixture):
            self.bands = self._bands[self.source.part(shard)[0]]
        try:
            for name in self.transform.needs:
                if name not in sample.targets:
                    where = self.source.labels_from if name in OF_LABELS else f".{MEMBERS[name].suffix}"
                    raise SampleError(f"no readable {name} ({where})")
            clips = clips_of(self.transform)
            image = self.decoded(sample) if clips is None else self.opened(sample, clips.decoder)
            row = self.transform(image, sample.targets, rng)
            self._notes |= getattr(self.transform, "notes", frozenset())
            return row
        except DecodeError as error:
            cause = f"{error}{self.reader.place(shard, index)}"
            raise SampleError(cause, sample.shard, sample.key) from error
        except SampleError as error:  # the transform does not know which sample it got
            raise SampleError(error.cause, sample.shard, sample.key) from error

    def _readable(self, fallback_shard: int) -> Row:
        """A row for batches that hold nothing readable: from the shard `fallback_shard`, or from the next one that
        has any.
        """
        if self._filler is not None:
            return self._filler
        counts = self.source.counts
        for shard in (*range(fallback_shard, len(counts)), *range(fallback_shard)):
            for index in range(counts[shard]):
                try:
                    self._filler = self._row((0, shard, index), self._rngs([(0, shard, index)])[0])
                    return self._filler
                except SampleError as error:
                    if self.on_bad_sample != "replace":
                        raise
                    _log.debug("not usable as a stand-in: %s", error)
        raise ShardError(f"{self.source.name(fallback_shard)} and its like hold no readable sample; name other shards")
