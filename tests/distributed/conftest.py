"""Images for the runs of these tests."""

from __future__ import annotations

import pytest

from tests.support.shard_files import ten_class_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> tuple[str, str]:
    """Overrides that name 3 training shards of 20 labelled images and one evaluation shard of 10."""
    return ten_class_shards(tmp_path_factory.mktemp("shards"))
