"""Images for the runs of these tests."""

from __future__ import annotations

import pytest

from tests.support.shard_files import noise_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> tuple[str, str]:
    """16 training images and 6 of evaluation, of 4 classes."""
    return noise_shards(tmp_path_factory.mktemp("shards"))
