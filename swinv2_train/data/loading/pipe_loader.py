"""Shards that a command prints (``pipe:COMMAND``): read once, front to back, by webdataset's own tar reader.

Nothing is indexed, so nothing can be planned: each rank repeats its own commands for ever and shuffles in a buffer, and
a resume starts anew.  webdataset passes over some damage without a word (tar_index.py), so every byte goes through the
index's own checks first, and a command must end well.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

from swinv2_train.config import ConfigError, DataConfig
from swinv2_train.config.secret_texts import without_secrets
from swinv2_train.data.loading.loader import (
    TrainLoader,
    Transform,
    accumulation_steps,
    bands_of,
    check_bad_fraction,
    clips_of,
    memory_of,
)
from swinv2_train.data.loading.rows import BatchRows, Row
from swinv2_train.data.loading.shared_memory import Batch, BatchMemory
from swinv2_train.data.loading.workers import Fetch, Workers, with_workers
from swinv2_train.data.sample import MEMBERS, Sample, SampleError, ShardError
from swinv2_train.data.sources.base import Source
from swinv2_train.data.sources.pipe import Stream, read_command
from swinv2_train.data.transforms.decode import DecodeError
from swinv2_train.runtime import available_cores

_STREAM = 3  # spawn key of a stream's random numbers; order.py uses 0 and 1, loader.py 2
_COUNTED_AT_LEAST = 10_000
"""data.max_bad_fraction is taken of at least this many images: a share of the first few says nothing."""


def build_train_loader(
    shards: Source | Stream,
    config: DataConfig,
    transform: Transform,
    seed: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    start_images: int,
) -> TrainLoader | StreamLoader:
    """The loader that these shards allow; arguments as TrainLoader's."""
    settings = (config, transform, seed, global_batch_size, micro_batch_size, rank, world_size, start_images)
    return StreamLoader(shards, *settings) if isinstance(shards, Stream) else TrainLoader(shards, *settings)


class StreamLoader:
    """An endless stream of this rank's micro-batches, as TrainLoader's, out of what commands print.

    Rank r has every world_size-th command, its worker w every num_workers-th of those; each repeats its own in a new
    order, shuffled in a buffer of data.shuffle_buffer_images.  The images follow from (seed, start_images, ranks,
    workers), as far as the commands print the same each time.
    Raises ConfigError when a rank has no command; SampleError and ShardError while iterating.
    """

    def __init__(
        self,
        stream: Stream,
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
        mine = stream.commands[rank::world_size]
        if not mine:
            raise ConfigError(
                f"data.shards names {len(stream.commands)} commands for {world_size} processes, each of which needs "
                "its own: name more (pipe:cat {00..11}.tar), or start fewer processes"
            )
        self.bad_images_before = 0
        """Damaged samples of the run, all ranks, until this start."""
        self._settings = (stream, config, transform, seed, global_batch_size, micro_batch_size, rank, world_size)
        self._start_images, self._images_per_batch = start_images, micro_batch_size * world_size
        self._max_bad_fraction = config.max_bad_fraction
        workers = with_workers(config, available_cores()).num_workers or 0
        self._config = replace(config, num_workers=min(workers, len(mine)))
        self._fetch = _Fetcher(mine, config, transform, micro_batch_size, (seed, start_images, rank), 2 * passes)
        self._workers = Workers(self)

    def __iter__(self) -> Iterator[Batch]:
        images_seen, bad_images = self._start_images, self.bad_images_before
        for batch in self._workers.run(self._fetch, itertools.repeat(None), self._config):
            images_seen += self._images_per_batch
            bad_images += batch["num_bad"]
            self.check_bad_images(bad_images, images_seen)  # of the other ranks' samples only the caller knows
            yield batch

    def check_bad_images(self, bad_images: int, images_seen: int) -> None:
        """Raises SampleError when the run has had more damaged samples than data.max_bad_fraction of its images.

        Both count over all ranks and starts.
        """
        counted = max(images_seen, _COUNTED_AT_LEAST)
        check_bad_fraction(self._max_bad_fraction, counted, bad_images, images_seen)

    def state_dict(self, images_seen: int, bad_images: int) -> dict[str, Any]:
        """What a checkpoint keeps; arguments as TrainLoader.state_dict's."""
        return {"images_seen": images_seen, "bad_images": bad_images, "manifest": None}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Take over the count of damaged samples from `state`.  Other commands than before are no error.

        Raises ConfigError when the state belongs to shards that had an order.
        """
        self.bad_images_before = state.get("bad_images", 0)
        if state["manifest"] is not None:
            raise ConfigError(
                "data.shards is a pipe, but the checkpoint's run reads indexed shards, whose order a pipe cannot go on "
                "with; name the same shards, or start a new run_dir"
            )

    def restarted(self, start_images: int) -> StreamLoader:
        """A new stream, whose images count from start_images on; this loader is closed."""
        self.close()
        return StreamLoader(*self._settings, start_images)

    def close(self) -> None:
        """Stop the commands and the worker processes, if any; a new iteration starts new ones."""
        self._workers.close()
        self._fetch.close()


# --------------------------------------------------------------------------------------------------------------------
# Fetching: runs in the worker processes


class _Fetcher(Fetch):
    """The next micro-batch of this process's share of the commands, whatever it is asked for.  Picklable."""

    def __init__(
        self,
        commands: Sequence[str],
        config: DataConfig,
        transform: Transform,
        size: int,
        key: tuple[int, int, int],
        held: int,
    ) -> None:
        super().__init__()
        self.commands, self.transform, self.size, self.key = commands, transform, size, key
        self.bands, self.image_member = bands_of(transform), config.image_member
        self.held = held
        self.on_bad_sample, self.buffer = config.on_bad_sample, config.shuffle_buffer_images
        self._samples: Iterator[Sample] | None = None
        self._filler: Row | None = None

    def memory(self, ahead: int) -> BatchMemory | None:
        return memory_of(self.transform, self.size, ahead + self.held + 1)

    def batch(self, request: None) -> Batch:
        if self._samples is None:
            worker = get_worker_info()
            number, of = (worker.id, worker.num_workers) if worker is not None else (0, 1)
            seed, *rest = self.key
            self._rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_STREAM, *rest, number)))
            self._samples = shuffled(self.commands[number::of], self.buffer, self._rng, self.image_member)
        made = BatchRows(self.size, self.out)
        keys: list[str] = []
        problems: list[dict[str, str]] = []
        for sample in itertools.islice(self._samples, self.size):
            keys.append(sample.key)
            try:
                made.add(self._row(sample))
            except SampleError as error:
                if self.on_bad_sample != "replace":
                    remedy = "repair it, or set data.on_bad_sample=replace to go on without it"
                    raise SampleError(f"{error.cause}; {remedy}", sample.shard, sample.key) from error
                problems.append({"shard": sample.shard, "key": sample.key, "cause": error.cause})
                made.add(None)
        self._filler = made.first or self._filler
        if self._filler is None:
            raise ShardError(f"{problems[0]['shard']}: none of its first {self.size} samples is readable; mend it")
        return made.batch(self._filler) | {"keys": keys, "num_bad": len(problems), "problems": problems} | self.noted()

    def _row(self, sample: Sample) -> Row:
        if not sample.image:
            raise SampleError("an empty image" if sample.extension else "no image")
        for name in self.transform.needs:
            if name not in sample.targets:
                raise SampleError(f"no readable {name} (.{MEMBERS[name].suffix})")
        try:
            clips = clips_of(self.transform)
            image = self.decoded(sample) if clips is None else self.opened(sample, clips.decoder)
            return self.transform(image, sample.targets, self._rng)
        except DecodeError as error:
            raise SampleError(str(error)) from error

    def close(self) -> None:
        self._samples = None  # and with it the command that is running

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_samples": None}


def shuffled(
    commands: Sequence[str], buffer: int, rng: np.random.Generator, image_member: str | None = None
) -> Iterator[Sample]:
    """The samples of the commands again and again, their order and the samples within `buffer` shuffled."""
    from webdataset.filters import shuffle

    pick = random.Random(int(rng.integers(2**63)))
    samples: Iterator[Sample] = shuffle(buffer, initial=buffer, rng=pick)(_repeated(commands, pick, image_member))
    return samples


def _repeated(commands: Sequence[str], pick: random.Random, image_member: str | None) -> Iterator[Sample]:
    while True:
        found = False
        for command in pick.sample(commands, len(commands)):
            for sample in read_command(command, image_member):
                found = True
                yield sample
        if not found:
            raise ShardError(
                without_secrets(f"pipe:{commands[0]} and its like print no sample; name shards that hold samples")
            )
