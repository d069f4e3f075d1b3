"""A short crash campaign; the long one is under benchmarks/."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHAOS = Path(__file__).parents[2] / "scripts" / "chaos.py"


@pytest.mark.slow
def test_a_run_that_is_killed_four_times_uses_the_planned_images(tmp_path):
    """Other ranks, ZeRO stages, micro-batches and workers at each start; the script compares and says so."""
    done = subprocess.run(
        [sys.executable, str(CHAOS), "--kills", "4", "--seed", "5", "--max-ranks", "3", "--dir", str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every step had its planned images, each once" in done.stdout
    assert done.stdout.count("| ok |") == 4, done.stdout
