"""How model.recompute is read."""

from __future__ import annotations

import re
from typing import NamedTuple

from swinv2_train.config.errors import ConfigError

RECOMPUTE_PLACES = ("stay", "cpu", "fairscale", "partitioned")


class Recompute(NamedTuple):
    """What model.recompute says."""

    part: str | None
    """blocks or attention; None = nothing is recomputed."""
    stages: tuple[int, int] | None
    """First and last stage, from 1, whose blocks are recomputed; None = all."""
    keep_every: int | None
    """Every K-th block is not recomputed; None = every block is."""
    place: str
    """Where the saved inputs wait: stay (as they are), cpu, fairscale (cpu too) or partitioned (DeepSpeed)."""


def parse_recompute(text: str, num_stages: int) -> Recompute:
    """The one reader of model.recompute: WHAT or WHAT@PLACE.  num_stages: of the model.

    Raises ConfigError naming the key, the value and the remedy.
    """
    what, at, place = text.partition("@")
    if text == "offload":
        raise ConfigError("model.recompute (offload) is now spelled blocks@fairscale; or blocks@cpu, torch's own way")
    if (at and place not in RECOMPUTE_PLACES) or (at and what == "none"):
        raise ConfigError(
            f"model.recompute ({text}): the saved inputs of a policy other than none go to one of "
            f"{', '.join('@' + name for name in RECOMPUTE_PLACES)}"
        )
    place = place or "stay"
    if what == "none":
        return Recompute(None, None, None, place)
    if what in ("blocks", "attention"):
        return Recompute(what, None, None, place)
    if match := re.fullmatch(r"every:(\d+)", what):
        if int(match[1]) < 2:
            raise ConfigError(f"model.recompute ({text}) would keep every block; set 2 or more, or none")
        return Recompute("blocks", None, int(match[1]), place)
    if match := re.fullmatch(r"stages:(\d+)(?:-(\d+))?", what):
        first, last = int(match[1]), int(match[2] or match[1])
        if not 1 <= first <= last <= num_stages:
            raise ConfigError(f"model.recompute ({text}): the model has the stages 1 to {num_stages}")
        return Recompute("blocks", (first, last), None, place)
    raise ConfigError(
        f"model.recompute ({text}) is none of none, blocks, attention, stages:I-J (such as stages:1-2) and every:K "
        "(every:3 keeps one block in 3)"
    )
