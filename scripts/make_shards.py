"""``python scripts/make_shards.py SOURCE OUT``: the command swinv2-make-shards, by the name that it had at first."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from swinv2_train.config.command_line import stoppable
from swinv2_train.make_shards import run


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run(sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(stoppable(main))
