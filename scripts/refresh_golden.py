"""Compute the golden curves (tests/support/curves.py) anew, because numbers were changed on purpose.

    python scripts/refresh_golden.py --reason "why the numbers are others now" [CURVE ...]

Writes tests/golden/curve_NAME.json where a value or the kind of machine is another, with the reason in its history, and
prints the line that CHANGELOG.md wants.  Without a reason it writes nothing and exits with 2.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SAME_AS_TESTS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
FEWEST_WORDS = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 when nothing was computed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reason", default="", help="what was changed, in some words; kept in the files")
    parser.add_argument("curves", nargs="*", metavar="CURVE", help="those of tests/support/curves.py (default: all)")
    options = parser.parse_args(arguments)
    if len(options.reason.split()) < FEWEST_WORDS:
        print(f"--reason ({options.reason!r}) must say in {FEWEST_WORDS} words or more why", file=sys.stderr)
        return 2
    os.environ.update(SAME_AS_TESTS)  # before torch is imported
    sys.path.insert(0, str(ROOT))
    from tests.support import curves

    if unknown := set(options.curves) - curves.CURVES.keys():
        print(f"no such curve: {', '.join(sorted(unknown))}; there are {', '.join(curves.CURVES)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        found = curves.compute(Path(folder), options.curves or curves.CURVES)
    machine, today = curves.machine(), datetime.date.today().isoformat()
    changes = [refresh(curves.path_of(name), machine, values, options.reason, today) for name, values in found.items()]
    if said := [change for change in changes if change]:
        print(f"\nThe line for CHANGELOG.md:\n- Changed numbers: {options.reason} (golden {'; '.join(said)}).")
    return 0


def refresh(path: Path, machine: dict[str, Any], values: dict[str, Any], reason: str, today: str) -> str | None:
    """Write a golden file, whole or not at all; returns what changed in a few words.

    None, and the file stays as it is, where values and machine are the golden ones.
    """
    from swinv2_train.storage.atomic import replace_text

    old = json.loads(path.read_text()) if path.exists() else {"machine": None, "history": [], "values": None}
    if (old["machine"], old["values"]) == (machine, values):
        print(f"{path}: as it was")
        return None
    before, after = (last_loss(each) for each in (old["values"], values))
    entry = {"date": today, "reason": reason, "last_loss_before": before, "last_loss": after}
    golden = {"machine": machine, "history": [*old["history"], entry], "values": values}
    replace_text(path, json.dumps(golden, indent=1) + "\n")
    print(f"{path}: last loss {before} -> {after}")
    return (
        f"{path.stem.removeprefix('curve_')}: last loss {'none' if before is None else f'{before:.6g}'} to {after:.6g}"
    )


def last_loss(values: dict[str, Any] | None) -> float | None:
    """The loss of the last step."""
    return None if values is None else values["train/loss"][-1]


if __name__ == "__main__":
    sys.exit(main())
