"""Micro-batches for one rank: an endless training stream and a finite evaluation pass.

What a rank gets is a function of (order, position, rank, world_size); workers only fetch, so their number changes
nothing, and the one integer `images_seen` resumes the stream.
"""

from __future__ import annotations

import logging
import math
import signal
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from swinv2_train.config import ConfigError, DataConfig
from swinv2_train.data.decode import DecodeError, decode_image
from swinv2_train.data.order import GlobalOrder, Location, rank_batch
from swinv2_train.data.shards import Manifest, Sample, SampleError, ShardError, TarReader

Batch = dict[str, Any]
_log = logging.getLogger(__name__)
_SAMPLE_STREAM = 2  # spawn key of the per-sample random numbers; order.py uses 0 and 1


class Transform(Protocol):
    """A picklable function from one image to the tensors of one batch row, all of fixed shape."""

    @property
    def needs_label(self) -> bool: ...

    def __call__(self, image: torch.Tensor, label: int | None, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """image: uint8 (3, H, W).  May raise SampleError."""


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


def sample_rng(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """The random numbers of one sample in one epoch; `sample` counts over all shards.  8 us."""
    sequence = np.random.SeedSequence(seed, spawn_key=(_SAMPLE_STREAM, epoch, sample))
    return np.random.Generator(np.random.PCG64(sequence))


class TrainLoader:
    """An endless stream of this rank's micro-batches, from image number `start_images` on.

    Every batch has the transform's tensors stacked to (micro_batch_size, ...), "weight" float32 (B,) (0 for a stand-in
    of a damaged sample), "keys" list[str] and "num_bad" int.  accumulation_steps() of them make one step.
    Raises ConfigError when the batch sizes do not divide; SampleError and ShardError while iterating.
    """

    def __init__(
        self,
        manifest: Manifest,
        config: DataConfig,
        transform: Transform,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        start_images: int,
    ) -> None:
        accumulation_steps(global_batch_size, micro_batch_size, world_size)
        _check_labels(manifest, config, transform, "data.shards")
        self.manifest, self.config, self.seed = manifest, config, seed
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank, self.world_size, self.start_images = rank, world_size, start_images
        self.order = GlobalOrder(manifest.counts, seed, config.lanes, config.window_shards)
        self._fetch = _Fetcher(manifest, config, transform, seed, fill=False)
        self._workers = _Workers(self)
        self._seen = self._bad = 0

    def __iter__(self) -> Iterator[Batch]:
        batches = _TrainBatches(
            self.order, self.start_images, self.global_batch_size, self.micro_batch_size, self.rank, self.world_size
        )
        for batch in self._workers.run(self._fetch, batches, self.config):
            self._seen += self.micro_batch_size
            self._bad += batch["num_bad"]
            # early on one bad sample is a large share of few, so the share is taken of at least this rank's epoch
            if self._bad > self.config.max_bad_fraction * max(self._seen, self.manifest.num_samples / self.world_size):
                raise SampleError(
                    f"data.max_bad_fraction ({self.config.max_bad_fraction}) is exceeded: {self._bad} damaged samples "
                    f"among {self._seen} on rank {self.rank}; repair the shards or raise it"
                )
            yield batch

    def state_dict(self, images_seen: int) -> dict[str, Any]:
        """What a checkpoint keeps; the same on every rank.  images_seen: images of all completed steps, all ranks."""
        return {"images_seen": images_seen, **self._identity()}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raises ConfigError when `state` (of state_dict) belongs to other data or another order."""
        mine = self._identity()
        if state["manifest"] != mine["manifest"]:
            raise ConfigError(
                "data.shards are not the shards of the checkpoint (another number, order or content); "
                "name the same shards, or start a new run_dir"
            )
        for name, key in (("seed", "seed"), ("lanes", "data.lanes"), ("window_shards", "data.window_shards")):
            if state[name] != mine[name]:
                raise ConfigError(
                    f"{key} ({mine[name]}) differs from the checkpoint's ({state[name]}), which would change the order "
                    f"of images in mid-epoch; set {key}={state[name]}, or start a new run_dir"
                )

    def close(self) -> None:
        """Stop the worker processes, if any; a new iteration starts new ones."""
        self._workers.close()

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "lanes": self.config.lanes,
            "window_shards": self.config.window_shards,
            "manifest": self.manifest.digest,
        }


class EvalLoader:
    """One finite pass: every sample once over all ranks, the same number of batches on every rank.

    Batches are TrainLoader's; rows that only fill the last batches up have weight 0 and the key "".  A batch may
    consist of nothing else, so divide by the sum of the weights over all batches and ranks, not by a batch's own.
    """

    def __init__(
        self,
        manifest: Manifest,
        config: DataConfig,
        transform: Transform,
        micro_batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        _check_labels(manifest, config, transform, "data.eval_shards")
        self.manifest, self.config, self.micro_batch_size = manifest, config, micro_batch_size
        self.rank, self.world_size = rank, world_size
        self._fetch = _Fetcher(manifest, config, transform, seed=0, fill=True)
        self._workers = _Workers(self)

    def __len__(self) -> int:
        """Batches per rank."""
        return math.ceil(math.ceil(self.manifest.num_samples / self.world_size) / self.micro_batch_size)

    def __iter__(self) -> Iterator[Batch]:
        bad = 0
        batches = _EvalBatches(self.manifest.counts, self.micro_batch_size, self.rank, self.world_size)
        for batch in self._workers.run(self._fetch, batches, self.config):
            bad += batch["num_bad"]
            if bad > self.config.max_bad_fraction * self.manifest.num_samples:
                raise SampleError(
                    f"data.max_bad_fraction ({self.config.max_bad_fraction}) is exceeded in data.eval_shards: {bad} "
                    f"damaged samples on rank {self.rank}; repair the shards or raise it"
                )
            yield batch

    def close(self) -> None:
        """Stop the worker processes, if any; a new iteration starts new ones."""
        self._workers.close()


def _check_labels(manifest: Manifest, config: DataConfig, transform: Transform, key: str) -> None:
    """A supervised run on unlabelled shards fails before its first step, from the index alone."""
    missing = sum(manifest.unlabelled)
    allowed = config.max_bad_fraction * manifest.num_samples if config.on_bad_sample == "replace" else 0
    if transform.needs_label and missing > allowed:
        shard = next(path for path, count in zip(manifest.paths, manifest.unlabelled, strict=True) if count)
        raise ShardError(
            f"{key}: {missing} of {manifest.num_samples} samples have no readable label (.cls), the first in {shard}; "
            "this task needs labels: pack the images from class folders, or choose task=simmim"
        )


# --------------------------------------------------------------------------------------------------------------------
# Which samples: the batch samplers


@dataclass(frozen=True)
class _TrainBatches:
    order: GlobalOrder
    start: int
    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[list[Location | None]]:
        position = self.start
        while True:
            mine = rank_batch(self.order, position, self.global_batch_size, self.rank, self.world_size)
            for first in range(0, len(mine), self.micro_batch_size):
                yield list(mine[first : first + self.micro_batch_size])
            position += self.global_batch_size


@dataclass(frozen=True)
class _EvalBatches:
    counts: tuple[int, ...]
    micro_batch_size: int
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[list[Location | None]]:
        ends = np.cumsum(self.counts)
        num_samples = int(ends[-1])
        share = math.ceil(num_samples / self.world_size)
        first, last = self.rank * share, min((self.rank + 1) * share, num_samples)
        for start in range(first, first + share, self.micro_batch_size):
            batch: list[Location | None] = []
            for sample in range(start, start + self.micro_batch_size):
                if sample >= last:
                    batch.append(None)
                    continue
                shard = int(np.searchsorted(ends, sample, side="right"))
                batch.append((0, shard, int(sample - (ends[shard] - self.counts[shard]))))
            yield batch


# --------------------------------------------------------------------------------------------------------------------
# Fetching: runs in the worker processes


class _Fetcher(Dataset[Any]):
    """Reads, decodes and transforms one micro-batch.  Picklable; holds no random state and no position."""

    def __init__(self, manifest: Manifest, config: DataConfig, transform: Transform, seed: int, fill: bool) -> None:
        # the shards that one rank may mix at a time, within the usual limit of 1024 file descriptors (two per shard)
        self.reader = TarReader(manifest, max_open=min(config.lanes * config.window_shards, 256))
        self.transform, self.seed, self.fill = transform, seed, fill
        self.on_bad_sample = config.on_bad_sample
        self.first_sample = np.cumsum([0, *manifest.counts]).tolist()
        self._filler: dict[str, torch.Tensor] | None = None

    def __getitems__(self, locations: list[Location | None]) -> Batch | ConfigError:
        """The batch, or the error to raise in the main process (DataLoader would wrap it into a traceback)."""
        try:
            return self.batch(locations)
        except ConfigError as error:
            return error

    def batch(self, locations: list[Location | None]) -> Batch:
        rows: list[dict[str, torch.Tensor] | None] = []
        keys: list[str] = []
        problems: list[str] = []
        for location in locations:
            if location is None:  # a padding row
                rows.append(None)
                keys.append("")
                continue
            try:
                row = self._row(location)
            except SampleError as error:
                if self.on_bad_sample != "replace":
                    raise SampleError(
                        f"{error}; repair it, or set data.on_bad_sample=replace to go on without it"
                    ) from error
                problems.append(str(error))
                row = None
            rows.append(row)
            keys.append(self.reader.key(location[1], location[2]))
        good = [row for row in rows if row is not None]
        if not good and not self.fill:
            raise SampleError(f"no readable sample in a micro-batch of {len(rows)}; the last fault: {problems[-1]}")
        stand_in = good[0] if good else self._first_readable()
        filled = [stand_in if row is None else row for row in rows]
        batch: Batch = {name: torch.stack([row[name] for row in filled]) for name in stand_in}
        batch["weight"] = torch.tensor([float(row is not None) for row in rows])
        batch["keys"] = keys
        batch["num_bad"] = len(problems)
        if problems:
            batch["problems"] = problems
        return batch

    def _row(self, location: Location) -> dict[str, torch.Tensor]:
        epoch, shard, index = location
        sample: Sample = self.reader.read(shard, index)
        if sample.label is None and self.transform.needs_label:
            raise SampleError(f"{sample.shard}: sample '{sample.key}' has no readable label (.cls)")
        try:
            image = decode_image(sample.image, sample.extension)
        except DecodeError as error:
            at = self.reader.offset(shard, index)
            raise SampleError(f"{sample.shard}: sample '{sample.key}' at byte {at}: {error}") from error
        return self.transform(image, sample.label, sample_rng(self.seed, epoch, self.first_sample[shard] + index))

    def _first_readable(self) -> dict[str, torch.Tensor]:
        """A row for batches that hold nothing but padding."""
        if self._filler is None:
            for shard, count in enumerate(self.reader.manifest.counts):
                for index in range(count):
                    try:
                        self._filler = self._row((0, shard, index))
                        return self._filler
                    except SampleError as error:
                        if self.on_bad_sample != "replace":
                            raise
                        _log.debug("not usable as padding: %s", error)
            raise ShardError("data.eval_shards holds no readable sample; name other shards")
        return self._filler


def _same(batch: Any) -> Any:
    return batch


def _init_worker(worker: int) -> None:
    """Ctrl-C and the scheduler's signals reach the whole process group; the training process alone answers them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


class _Workers:
    """Runs a fetcher over batch lists, here or in worker processes, and ends those processes in every case."""

    def __init__(self, owner: object) -> None:
        self._running: dict[str, Any] = {}
        # Workers ignore SIGTERM, so they must be told to end before multiprocessing's own exit handler joins them.
        # The registry keeps `_running` alive: nothing in it may lead back to `owner`, or that would never be freed.
        weakref.finalize(owner, _stop, self._running)

    def run(self, fetch: _Fetcher, batches: Any, config: DataConfig) -> Iterator[Batch]:
        results: Iterator[Any]
        if config.num_workers == 0:
            results = map(fetch.__getitems__, batches)
        else:
            if "loader" not in self._running:
                warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
                self._running["loader"] = DataLoader(
                    fetch,
                    batch_sampler=batches,
                    num_workers=config.num_workers,
                    prefetch_factor=max(config.prefetch_batches, 1),
                    persistent_workers=True,
                    collate_fn=_same,
                    worker_init_fn=_init_worker,
                    pin_memory=torch.cuda.is_available(),
                    generator=torch.Generator().manual_seed(0),  # else the global generator would be drawn from
                )
            results = iter(self._running["loader"])
        for result in results:
            if isinstance(result, ConfigError):
                self.close()
                raise result
            for problem in result.pop("problems", ()):
                _log.warning("damaged sample replaced: %s", problem)
            yield result

    def close(self) -> None:
        _stop(self._running)


def _stop(running: dict[str, Any]) -> None:
    loader: DataLoader[Any] | None = running.pop("loader", None)
    stop: Callable[[], None] | None = getattr(getattr(loader, "_iterator", None), "_shutdown_workers", None)
    if stop is not None:
        stop()
