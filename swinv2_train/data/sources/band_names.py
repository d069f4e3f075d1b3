"""bands.json beside images: the names of their bands in order, ["B02", "B03", ...]."""

from __future__ import annotations

import os
from pathlib import Path

from swinv2_train.config import ConfigError
from swinv2_train.data.sample import ShardError
from swinv2_train.data.shards.transfers import is_remote
from swinv2_train.data.sources.base import Source
from swinv2_train.data.transforms.bands import Bands
from swinv2_train.storage.json_files import listing, read_json, text

BANDS_NAME = "bands.json"
_BYTES = 2**20
_SHAPE = listing(text(200), most=4096, least=1)


def with_band_names(bands: Bands | None, source: Source) -> Bands | None:
    """The bands by their indices, where they are chosen by names and bands.json lies beside the source's images.

    Without that file, the images' own files are to name them.  Raises ShardError.
    """
    if bands is None or not bands.named:
        return bands
    place = source.name(0)
    if is_remote(place):
        return bands
    path = Path(place if os.path.isdir(place) else os.path.dirname(place), BANDS_NAME)
    try:
        names = read_json(path, _BYTES, _SHAPE, "make it a list of names")
        if len(set(names)) < len(names):
            raise ConfigError(f"{path} names a band twice; give each its own name")
        return bands.with_names(names, str(path))
    except FileNotFoundError:
        return bands
    except ConfigError as error:
        raise ShardError(str(error)) from error
