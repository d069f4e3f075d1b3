"""A short crash campaign; the long one is under benchmarks/."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHAOS = Path(__file__).parents[2] / "scripts" / "chaos.py"


@pytest.mark.slow
def test_runs_that_are_killed_use_the_planned_images_whatever_their_batches_are(tmp_path):
    """Other ranks, ZeRO stages, batches and workers at each start, on every source; the script compares and says so."""
    done = subprocess.run(
        [sys.executable, str(CHAOS), "--kills", "6", "--seed", "5", "--tasks", "simmim", "--dir", str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every step had its planned images, each once; nothing was lost" in done.stdout
    assert done.stdout.count("| ok |") == 6, done.stdout
