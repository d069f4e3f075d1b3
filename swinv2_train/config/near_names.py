"""What somebody may have meant by a name that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(given: str, names: Iterable[str], otherwise: str = "", cutoff: float = 0.6) -> str:
    """The end of a message about an unknown name: "did you mean A or B?", or otherwise where no name is near.

    Near is the most similar name, and for a dotted one also every name that ends in the same part.
    cutoff: 0 to 1, how similar; dotted names of one section are similar by that alone.
    """
    names = list(names)
    near = difflib.get_close_matches(given, names, n=1, cutoff=cutoff)
    leaf = given.rsplit(".", 1)[-1]
    near += [name for name in names if name.rsplit(".", 1)[-1] == leaf and name not in near]
    return f"did you mean {' or '.join(near[:3])}?" if near else otherwise
