"""Text from files, as it may be shown to a person: on a terminal, in a log, on a page.

A name in an archive, a class, a key of somebody's configuration may hold anything: escape sequences that repaint a
terminal, marks that turn the reading direction, a megabyte.  Every message goes through this one function.
"""

from __future__ import annotations

import unicodedata

NAME_CHARACTERS = 200
"""The most that is shown of one name or value."""
MESSAGE_CHARACTERS = 6000
"""The most that is shown of one message."""
TRACEBACK_CHARACTERS = 100_000
"""The most that is shown of a traceback."""

NOTES = "swinv2_train.notes"
"""The logger of what is found while images are read and a user should see once: a run's console shows it too."""

_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def shown(text: object, most: int = NAME_CHARACTERS, lines: bool = False) -> str:
    """text with everything escaped that is no visible character, of at most `most` characters.

    Escaped as Python writes it (\\x1b) are control characters, marks of the reading direction and other invisible ones,
    and halves of surrogate pairs.  What is longer loses its middle, and the place says how much.  lines: line breaks
    and tabs stay, for a message of ours of several lines.
    """
    given = str(text)
    left_out = len(given) - most
    if left_out > 0:  # before anything is escaped: a megabyte is not walked through
        given = _cut(given, most, left_out)
    if not given.isprintable():
        given = "".join(_visible(char, lines) for char in given)
        if len(given) > most:  # by what the escapes have added
            given = _cut(given, most, len(given) - most)
    return given


def tell(text: object) -> None:
    """Print a message, at once."""
    print(shown(text, MESSAGE_CHARACTERS, lines=True), flush=True)


def _visible(char: str, lines: bool) -> str:
    if char.isprintable() or unicodedata.category(char) == "Zs" or (lines and char in "\n\t"):
        return char
    return _SHORT.get(char) or char.encode("unicode_escape", "surrogatepass").decode()


def _cut(text: str, most: int, left_out: int) -> str:
    """The beginning and the end, for a remedy stands there."""
    gap = f"[... {left_out:,} characters ...]"
    room = max(0, most - len(gap) - 3)  # the number grows by what the gap itself takes
    end = room // 4
    gap = f"[... {len(text) - room:,} characters ...]"
    return f"{text[: room - end]}{gap}{text[len(text) - end :]}"[:most]
