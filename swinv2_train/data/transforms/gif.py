"""GIF files block by block: whole or not, and how many frames they have; Pillow does not miss an end."""

from __future__ import annotations

_EXTENSION, _FRAME, _TRAILER = 0x21, 0x2C, 0x3B


def count_frames(data: bytes) -> int:
    """Frames of a GIF file.  Raises ValueError where it is cut off."""
    at, frames = 13, 0
    try:
        at += _table_bytes(data[10])
        while data[at] != _TRAILER:
            if data[at] == _FRAME:
                frames += 1
                at += 10 + _table_bytes(data[at + 9]) + 1
            elif data[at] == _EXTENSION:
                at += 2
            else:
                raise ValueError(f"no block of a GIF at byte {at}")
            while data[at]:
                at += 1 + data[at]
            at += 1
    except IndexError as error:
        raise ValueError(f"cut off at byte {len(data)}: there is no end mark") from error
    return frames


def _table_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0
