"""Whether a source holds videos, which need a decoder, before the first of them is read."""

from __future__ import annotations

import os

import numpy as np

from swinv2_train.config.pixels import VIDEO_EXTENSIONS
from swinv2_train.data.clips.video import check_decoder
from swinv2_train.data.shards.tar_index import load_index
from swinv2_train.data.shards.tar_reader import Manifest
from swinv2_train.data.sources.base import Source
from swinv2_train.data.sources.folder import Folder
from swinv2_train.data.sources.labelled import LabelledSource
from swinv2_train.data.sources.mixture import Mixture
from swinv2_train.data.sources.pipe import Stream


def check_videos(source: Source | Stream, key: str, image_member: str | None = None) -> None:
    """Raises ConfigError, which begins with the key, for videos where no decoder of them is installed.

    Shards at an address are found out when the first is here, and what a pipe prints when its first clip comes, unless
    image_member (data.image_member) names it.
    """
    if isinstance(source, Stream):
        videos = image_member is not None and image_member.rpartition(".")[2] in VIDEO_EXTENSIONS
    else:
        videos = _holds_videos(source)
    if videos:
        check_decoder(f"{key} holds videos")


def _holds_videos(source: Source) -> bool:
    if isinstance(source, Mixture):
        return any(map(_holds_videos, source.sources))
    if isinstance(source, LabelledSource):
        return _holds_videos(source.source)
    if not any(source.clips):
        return False
    if isinstance(source, Folder):
        names = (os.fsdecode(source.image_name(place)) for place in range(source.num_samples))
        return any(os.path.splitext(name)[1][1:].lower() in VIDEO_EXTENSIONS for name in names)
    return isinstance(source, Manifest) and any(
        np.isin(load_index(path, size)["extension"], [each.encode() for each in VIDEO_EXTENSIONS]).any()
        for path, size, clips in zip(source.index_paths, source.sizes, source.clips, strict=True)
        if path and clips
    )
