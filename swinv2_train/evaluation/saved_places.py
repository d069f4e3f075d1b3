"""What the configuration of a run directory, which somebody else may have made, reaches outside of it.

Local files that it names are read.  Servers that it names are asked, by plain protocols alone, and that is said.  A
folder that it names is written into where it is a shard cache of ours already, and else not.  What the command line
gives is the user's own word, and goes without all this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from swinv2_train.config import SPLITS, Config, ConfigError
from swinv2_train.config.shown import shown
from swinv2_train.data.shards.cache_files import is_our_cache
from swinv2_train.data.shards.transfers import is_remote, redacted
from swinv2_train.evaluation.probe import image_patterns

SCHEMES = ("http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf")
"""Protocols that read files and send no password of ours to a server of anybody's choice; fsspec knows others, which
run commands (git, ssh), answer a server's challenge (smb) or unpickle what it sends (dask)."""


def confined(config: Config, given: Sequence[str]) -> tuple[Config, list[str]]:
    """The configuration of a run directory as evaluation may use it, and what is to be said of it.

    given: the keys that the command line sets, which are left as they are.  Raises ConfigError for an address of
    another protocol than SCHEMES.
    """
    run, notes = config.run_dir, []
    asked: dict[str, list[str]] = {}
    for key, pattern in _patterns(config):
        if any(key == each or key.startswith(f"{each}.") for each in given):
            continue
        for part in pattern.split("::"):
            if not is_remote(part) or part.startswith("file://"):
                continue
            if urlsplit(part).scheme not in SCHEMES:
                raise ConfigError(
                    f"{key} ({shown(redacted(part), 200)}) is out of {run}/config.yaml, from which only addresses of "
                    f"{', '.join(SCHEMES)} are used; give it on the command line, if you trust it: {key}=..."
                )
            asked.setdefault(urlsplit(part).netloc.rpartition("@")[2], []).append(key)
    for host, keys in asked.items():
        named = ", ".join(dict.fromkeys(keys))
        notes.append(f"note: asking {shown(host, 200)} for images, as {run}/config.yaml says ({named})")
    folder = config.data.cache_dir
    if asked and folder is not None and "data.cache_dir" not in given and not is_our_cache(Path(folder).expanduser()):
        notes.append(
            f"note: data.cache_dir ({shown(folder, 200)}) of {run}/config.yaml is no shard cache of yours, and nothing "
            f"is written there; the usual one serves, or data.cache_dir=... on the command line"
        )
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, cache_dir=None))
    return config, notes


def _patterns(config: Config) -> Iterator[tuple[str, str]]:
    """The keys of all images that evaluation reads, and what they name."""
    found = [("data.eval_shards", config.data.eval_shards)]
    found += [(f"{SPLITS}{name}.shards", split.shards) for name, split in config.data.eval_splits.items()]
    if config.probe.methods:
        found += image_patterns(config)
    yield from {key: pattern for key, pattern in found if pattern is not None}.items()
