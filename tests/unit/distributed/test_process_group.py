"""Who announces how many ranks there are: torchrun, srun, and other launchers."""

from __future__ import annotations

import pytest

from swinv2_train.distributed.process_group import _announced_ranks


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_the_ranks_of_a_host_are_what_its_launcher_says(name, monkeypatch):
    """deepspeed's launcher calls them LOCAL_SIZE; without it rank 0 thought itself alone and took all cores."""
    for other in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(other, raising=False)
    for key, value in {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", name: "4"}.items():
        monkeypatch.setenv(key, value)
    assert _announced_ranks() == {"RANK": 0, "WORLD_SIZE": 8, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 4}
