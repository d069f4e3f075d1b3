"""Two checkouts that take turns in one run, a process each: a machine that others use slows both alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]


def in_turns(before: Path, program: str, arguments: Sequence[str], rounds: int) -> list[tuple[Any, Any]]:
    """What the other checkout and this one say in each round: (before, now).

    program: Python that prints the line "ready" once it is, and then a line of JSON for each line of its input; it
    imports from the checkout that it is started in.  The two exchange who goes first from round to round.
    """
    children = []
    for checkout in (before.resolve(), HERE):
        children.append(
            subprocess.Popen(
                [sys.executable, "-c", program, *arguments], text=True, cwd=checkout,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(checkout)},
            )
        )  # fmt: skip
        assert children[-1].stdout.readline() == "ready\n"
    found = []
    for number in range(rounds):
        said = {}
        for place in (0, 1) if number % 2 else (1, 0):
            print("turn", file=children[place].stdin, flush=True)
            said[place] = json.loads(children[place].stdout.readline())
        found.append((said[0], said[1]))
    for child in children:
        child.stdin.close()
        child.wait()
    return found
