"""Images on their way to being counted: each once over all ranks, decoded and counted in the loader's workers."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

import numpy as np

from swinv2_train.config import DataConfig
from swinv2_train.data.loading.batches import BatchRequest, EvalBatches
from swinv2_train.data.loading.shared_memory import Batch
from swinv2_train.data.loading.workers import Fetch, Workers
from swinv2_train.data.sample import Sample, SampleError, ShardError
from swinv2_train.data.sources.band_names import with_band_names
from swinv2_train.data.sources.base import Source
from swinv2_train.data.sources.pipe import Stream, read_command
from swinv2_train.data.statistics.numbers import Scale
from swinv2_train.data.statistics.tally import FirstLook, SecondLook
from swinv2_train.data.transforms.bands import Bands, file_values
from swinv2_train.data.transforms.decode import DecodeError
from swinv2_train.data.transforms.numpy_files import SIGNATURE, ZIP_SIGNATURE

IMAGES_AT_A_TIME = 32
"""Images that a worker counts before it reports."""
_TRIED = 100
"""Images of which the first readable one says how many bands there are."""

Look = TypeVar("Look", FirstLook, SecondLook)
Track = Callable[[Iterable[Batch], int], Iterable[Batch]]
"""Shows how far an iteration of so many parts is."""


class Images:
    """One rank's share of a source's images, or of a pipe's commands."""

    def __init__(
        self, source: Source | Stream, data: DataConfig, bands: Bands | None, scale: Scale, rank: int, world_size: int
    ) -> None:
        self.source, self.data, self.scale = source, data, scale
        self.rank, self.world_size = rank, world_size
        self.bands = bands if isinstance(source, Stream) else with_band_names(bands, source)

    def counted(self, new: Callable[[], Look], track: Track) -> tuple[Look, int]:
        """What a look counts of this rank's images, and how many damaged samples were left out.

        new: an empty look.  Raises SampleError (with data.on_bad_sample=error), ShardError and MachineError.
        """
        requests, count = self._requests()
        total, skipped = new(), 0
        workers = Workers(self)
        fetch = _Counter(self.source, self.data, self.bands, self.scale, new)
        try:
            for part in track(workers.run(fetch, requests, self.data), count):
                total.add(part["counted"])
                skipped += part["num_bad"]
        finally:
            workers.close()
        return total, skipped

    def _requests(self) -> tuple[Iterable[Any], int]:
        if isinstance(self.source, Stream):
            mine = self.source.commands[self.rank :: self.world_size]
            return mine, len(mine)
        share = math.ceil(self.source.num_samples / self.world_size)
        ahead = self.data.fetch_ahead_shards if self.source.cache is not None else None
        batches = EvalBatches(self.source.counts, IMAGES_AT_A_TIME, self.rank, self.world_size, ahead)
        return batches, math.ceil(share / IMAGES_AT_A_TIME)


class _Counter(Fetch):
    """Counts the images of a request.  Picklable where its look is."""

    told_of_damage = "damaged sample left out"

    def __init__(
        self, source: Source | Stream, data: DataConfig, bands: Bands | None, scale: Scale, new: Callable[[], Any]
    ) -> None:
        super().__init__()
        self.bands, self.scale, self.new = bands, scale, new
        self.on_bad_sample, self.image_member = data.on_bad_sample, data.image_member
        self.reader = None if isinstance(source, Stream) else source.open_reader(4)

    def batch(self, request: BatchRequest | str) -> Batch:
        look, problems = self.new(), []
        for read, place in self._samples(request):
            try:
                look.image(self._numbers(read(), place), self.scale)
            except SampleError as error:
                if self.on_bad_sample != "replace":
                    remedy = "repair it, or set data.on_bad_sample=replace to go on without it"
                    raise SampleError(f"{error.cause}; {remedy}", error.shard, error.key) from error
                problems.append({"shard": error.shard, "key": error.key, "cause": error.cause})
        return {"counted": look.sent(), "num_bad": len(problems), "problems": problems} | self.noted()

    def _samples(self, request: BatchRequest | str) -> Iterator[tuple[Callable[[], Sample], str]]:
        """What reads each sample of a request (SampleError where it is damaged), and its place in a larger file."""
        if isinstance(request, str):
            for sample in read_command(request, self.image_member):
                yield partial(_same, sample), ""
            return
        assert self.reader is not None, "a source has a reader"
        if request.upcoming_shards is not None:
            self.reader.fetch_ahead(request.upcoming_shards)
        for location in request.locations:
            if location is not None:
                _, shard, index = location
                yield partial(self.reader.read, shard, index), self.reader.place(shard, index)

    def _numbers(self, sample: Sample, place: str) -> np.ndarray:
        """float32 (C, H x W) of a sample, all finite after data.scale, or NaN.  Raises SampleError."""
        if not sample.image:
            raise SampleError("an empty image" if sample.extension else "no image", sample.shard, sample.key)
        try:
            image = self.decoded(sample)
        except DecodeError as error:
            raise SampleError(f"{error}{place}", sample.shard, sample.key) from error
        numbers = image.numpy().reshape(len(image), -1).astype(np.float32)
        with np.errstate(over="ignore"):
            infinite = [band for band, each in enumerate(numbers) if np.isinf(self.scale.values(each, band)).any()]
        if infinite:
            raise SampleError(f"data.scale takes band {infinite[0]} beyond float32; mend it", sample.shard, sample.key)
        return numbers


def _same(sample: Sample) -> Sample:
    return sample


def first_bands(source: Source | Stream, data: DataConfig) -> tuple[int | None, str]:
    """How many bands the first readable image holds, and of which type; None where it may be a photograph.

    Raises ShardError where no image is readable.
    """
    problem: Exception | None = None
    for sample in itertools.islice(_in_order(source, data), _TRIED):
        try:
            found = file_values(sample.image, sample.extension, data.array_layout).values
        except DecodeError as error:
            problem = problem or error
            continue
        numbers = sample.image[:6] == SIGNATURE or sample.image[:4] == ZIP_SIGNATURE
        photograph = found.dtype == np.uint8 and found.shape[2] <= 4 and not numbers
        return None if photograph else found.shape[2], str(found.dtype)
    raise ShardError(f"data.shards: no image is readable among the first {_TRIED}: {problem}; name others")


def _in_order(source: Source | Stream, data: DataConfig) -> Iterator[Sample]:
    if isinstance(source, Stream):
        yield from read_command(source.commands[0], data.image_member)
        return
    reader = source.open_reader(1)
    for shard, count in enumerate(source.counts):
        for index in range(count):
            with contextlib.suppress(SampleError):
                yield reader.read(shard, index)
    reader.close()
