"""One cluster for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing_programs
from tests.support.shard_files import ten_class_shards


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """A running cluster; skips where SLURM is not installed, and fails when something of it is left at the end."""
    missing = missing_programs()
    if missing:
        pytest.skip(f"no {', '.join(missing)} here: apt-get install slurm-wlm munge")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        left = cluster.stop()
    assert not left, f"still running after the end of the cluster: {left}"


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> tuple[str, str]:
    """Overrides that name 3 training shards of 20 labelled images and one evaluation shard of 10."""
    return ten_class_shards(tmp_path_factory.mktemp("shards"))
