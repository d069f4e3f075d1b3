"""Seeded mutations of bytes: what a disk, a network or a hostile hand does to a file."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence

_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)

TEXT_TOKENS: tuple[bytes, ...] = (
    b"null", b"true", b"-1", b"1e999", b"NaN", b"9" * 30, b"9" * 5000, b"0.5", b'""', b"[]", b"{}", b"[" * 3000,
    b'{"a":' * 2000, b"]", b"}", b",", b":", b'"', b"\\", b"\\u0000", b"\\ud800", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf",
    b"\x1b[2J", "\u202e".encode(), b"../", b"/etc/passwd", b"%OUTSIDE%", b"${oc.env:HOME}", b"\\${", b"${", b"hydra:\n",
    b"defaults:\n", b"!!python/object/apply:os.system [true]", b"!!binary ", b"&a ", b"*a", b"<<: ", b"? ", b"- ",
    b"%TAG ! x\n---\n", b"...\n", b"\t", b"\r", b"\n", b"  ", b"x" * 5000, b"layers.2000000000.", b"module.",
)  # fmt: skip
"""Put into text formats; %OUTSIDE% becomes the path of a file that nothing may touch."""


def mutated(draw: random.Random, seeds: Sequence[bytes], tokens: Sequence[bytes], outside: bytes) -> bytes:
    """One of the seeds after one to six changes."""
    data = bytearray(draw.choice(seeds))
    for _ in range(draw.choice((1, 1, 1, 2, 3, 6))):
        place = draw.randrange(len(data) + 1)
        if draw.random() < 0.4:  # headers are where it hurts
            place = min(place, draw.randrange(600))
        length = draw.choice((1, 2, 4, 8, 64, 512))
        kind = draw.randrange(9)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[place : place + length] = draw.randbytes(length)
        elif kind == 2:
            del data[place : place + length]
        elif kind == 3:
            data[place:place] = data[place : place + length] * draw.choice((1, 2, 50))
        elif kind == 4:
            del data[place:]
        elif kind == 5:
            number = struct.pack(draw.choice("<>") + "Q", draw.choice(_NUMBERS))
            width = draw.choice((1, 2, 4, 8))
            data[place : place + width] = number[:width] if draw.random() < 0.5 else number[-width:]
        elif kind == 6 and tokens:
            token = draw.choice(tokens).replace(b"%OUTSIDE%", outside)
            data[place : place + draw.choice((0, 0, length))] = token
        elif kind == 7:
            other = draw.choice(seeds)
            cut = draw.randrange(len(other) + 1)
            data[place : place + length] = other[cut : cut + length]
        else:
            data[place : place + length] = bytes([draw.choice((0, 0x20, 0x30, 0x39, 0xFF))]) * min(
                length, max(0, len(data) - place)
            )
    return bytes(data[: 2**22])
