"""A short crash campaign; the long one is under benchmarks/."""

from __future__ import annotations

import subprocess
import sys

import pytest

from scripts import chaos
from tests.support.processes import finished, forked


@pytest.mark.slow
def test_runs_that_are_killed_use_the_planned_images_whatever_their_batches_are(tmp_path):
    """Other ranks, ZeRO stages, batches and workers at each start, on every source; the script compares and says so."""
    arguments = ["--kills", "4", "--seed", "11", "--tasks", "simmim", "--dir", str(tmp_path)]  # every kind of end once

    def campaign() -> None:
        sys.argv = ["chaos.py", *arguments]
        raise SystemExit(chaos.main())

    done = finished(forked(campaign, stdout=subprocess.PIPE, stderr=subprocess.PIPE), timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every step had its planned images, each once; nothing was lost" in done.stdout
    assert done.stdout.count("| ok |") == 4, done.stdout
