"""Small samples and tars for the tests of shards."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from tests.support.images import image_bytes


def samples(count: int, labels: bool = True) -> list[tuple[str, bytes, str, int | None]]:
    """What write_shards takes: keys s0000, s0001, ..., labels 0 to 4."""
    return [(f"s{i:04d}", image_bytes(i), "png", i % 5 if labels else None) for i in range(count)]


def write_plain_tar(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
    """A tar as somebody else would write it."""
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
