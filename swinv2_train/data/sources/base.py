"""Where images come from: packed shards, a folder of image files, or a saved data set of Hugging Face's `datasets`.

All keep the same promises: an exact global order, resuming at the next image on any number of ranks, and one policy for
damage.  So the loader sees only what stands here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, Self

from swinv2_train.data.sample import Sample, ShardError
from swinv2_train.data.shards.shard_cache import ShardCache
from swinv2_train.data.shards.tar_reader import open_manifest
from swinv2_train.data.sources.folder import list_images, open_folder
from swinv2_train.data.sources.huggingface import is_saved_dataset, open_saved_dataset
from swinv2_train.data.sources.list_file import is_list, open_list
from swinv2_train.data.sources.listing import is_image


class Reader(Protocol):
    """Any sample by (shard, index).  Picklable; has no position."""

    def read(self, shard: int, index: int) -> Sample:
        """The sample's bytes.  Raises SampleError where the sample is damaged, ShardError where more than it is."""

    def key(self, shard: int, index: int) -> str:
        """The sample's key, without reading it."""

    def place(self, shard: int, index: int) -> str:
        """Where its bytes lie within a larger file, to be added to an error text; "" where they are a file."""

    def fetch_ahead(self, shards: Sequence[int]) -> None:
        """Say which shards will be read next, the most urgent first."""

    def close(self) -> None:
        """Let go of what is open; the next read opens it again."""


class Source(Protocol):
    """Everything that must be known of images before the first one is read.  Picklable."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Samples per shard."""

    @property
    def num_samples(self) -> int: ...

    @property
    def unlabelled(self) -> tuple[int, ...]:
        """Samples per shard without a readable label."""

    @property
    def unsegmented(self) -> tuple[int, ...]:
        """Samples per shard without a label image (the target "segmentation")."""

    @property
    def unannotated(self) -> tuple[int, ...]:
        """Samples per shard without a JSON of objects (the target "objects")."""

    @property
    def clips(self) -> tuple[int, ...]:
        """Samples per shard that are clips; the others are images."""

    @property
    def label_values(self) -> Mapping[int, int] | None:
        """Pixels of all label images by their value; None where that was not counted when they were packed."""

    @property
    def label_range(self) -> tuple[int, int] | None:
        """Lowest and highest label; None without any."""

    @property
    def labels_from(self) -> str:
        """What gives a sample its label, for error texts."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Name of each label; None where the source knows none."""

    @property
    def used_labels(self) -> frozenset[int]:
        """The labels that images have, or may have where only their range is known."""

    def relabelled(self, numbers: Sequence[int], classes: tuple[str, ...] | None) -> Self:
        """The same images with numbers[label] for each label, and names of these; the digest stays.

        numbers: one for each label of label_range at least; of no meaning for a label that no image has.
        """

    @property
    def digest(self) -> str:
        """Distinguishes these samples and their numbering from others; a resumed run compares it."""

    @property
    def cache(self) -> ShardCache | None:
        """Where shards at an address are kept on this machine; None when nothing is far away."""

    def name(self, shard: int) -> str:
        """What messages call the shard."""

    def open_reader(self, max_open: int = 64) -> Reader:
        """A reader that keeps at most max_open files open."""


def open_source(
    pattern: str,
    key: str = "data.shards",
    progress: Callable[[str], None] | None = None,
    cache: ShardCache | None = None,
    verify: bool = False,
    image_member: str | None = None,
    label_folders: Sequence[str] | None = None,
    annotations: str | None = None,
) -> Source:
    """What a value of data.shards and its like names: a directory of one of two kinds, a list of files with their
    labels, or a pattern of shards.

    Arguments as tar_reader.open_manifest's (of a folder, image_member is what its images' names end in), and
    label_folders and annotations as open_folder's (of a saved data set label_folders are the names of two columns);
    what has no checksums cannot be verified.  Raises ShardError.
    """
    directory = os.path.expanduser(pattern.removeprefix("file://"))
    if is_list(directory):
        given = {"verify": verify, "image_member": image_member, "label_folders": label_folders,
                 "annotations": annotations}  # fmt: skip
        for name, value in given.items():
            if value:
                raise ShardError(
                    f"data.{name} ({value}) is of shards or folders, but {key} '{directory}' is a list of files with "
                    f"their labels; set data.{name}={'false' if name == 'verify' else 'null'}"
                )
        return open_list(directory, key, progress)
    if not os.path.isdir(directory):
        return open_manifest(pattern, key, progress, cache, verify, image_member)
    if verify:
        raise ShardError(
            f"data.verify=true, but {key} '{directory}' is a directory, whose files have no checksums to compare; pack "
            "it (swinv2-make-shards SOURCE OUT), or set data.verify=false"
        )
    if is_saved_dataset(directory):
        if image_member is not None:
            raise ShardError(
                f"data.image_member ({image_member}) names members of shards and files of folders, but {key} "
                f"'{directory}' is a saved data set, whose images are a column; set data.image_member=null"
            )
        if annotations is not None:
            raise ShardError(
                f"data.annotations ({annotations}) is of folders of image files, but {key} '{directory}' is a saved "
                "data set; set data.annotations=null, or name the folder"
            )
        return open_saved_dataset(directory, key, progress, label_folders)
    return open_folder(directory, key, progress, image_member, label_folders, annotations)


def open_unlabelled(
    pattern: str,
    key: str,
    progress: Callable[[str], None] | None = None,
    cache: ShardCache | None = None,
    verify: bool = False,
    image_member: str | None = None,
) -> Source:
    """What is asked of a model and has no targets: as open_source, or one image file, in an order of its own.

    A folder's images come by their paths, which with their endings are their keys, and folders are no classes; a
    list's as it names them; a saved data set's rows as they are counted.  Raises ShardError.
    """
    path = os.path.expanduser(pattern.removeprefix("file://"))
    if os.path.isdir(path) and is_saved_dataset(path):
        return open_saved_dataset(path, key, progress, in_order=True)
    if is_list(path):
        return open_list(path, key, progress, in_order=True)
    if os.path.isdir(path) or (os.path.isfile(path) and is_image(os.path.basename(path), image_member)):
        return list_images(path, key, progress, image_member)
    return open_source(pattern, key, progress, cache, verify, image_member)
