"""Images for the runs of these tests, and which of them `make test-fast` takes along."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.shard_files import ten_class_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> tuple[str, str]:
    """Overrides that name 3 training shards of 20 labelled images and one evaluation shard of 10."""
    return ten_class_shards(tmp_path_factory.mktemp("shards"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of real ranks are slow together; those marked smoke stand for them in the quick part."""
    for item in items:
        if Path(__file__).parent in item.path.parents and item.get_closest_marker("smoke") is None:
            item.add_marker(pytest.mark.slow)
