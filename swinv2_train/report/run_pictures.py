"""A run's pictures on its page: the newest of each kind, and some earlier ones folded away."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swinv2_train.config import ConfigError
from swinv2_train.config.plain_files import read_bytes
from swinv2_train.report.html import esc
from swinv2_train.report.run_record import RunRecord

_MAX_PICTURE_BYTES = 400_000
_MAX_PICTURE_PX = 1600
_LARGEST_PICTURE_BYTES, _LARGEST_PICTURE_PX = 2**26, 2**26
"""Of a picture that is read at all."""


def pictures_of(run: RunRecord) -> str:
    """Pictures within the page itself; one that cannot be read is named."""
    parts = []
    for name, files in run.pictures.items():
        step, newest = files[-1]
        parts.append(figure(newest, f"{name}, step {step:,}"))
        earlier = _spread(files[:-1], 5)
        if earlier:
            shown = "".join(figure(path, f"step {at:,}") for at, path in earlier)
            parts.append(f"<details><summary>{esc(name)} at earlier steps</summary>{shown}</details>")
    return "".join(parts)


def figure(path: Path, caption: str) -> str:
    """A picture within the page; one that cannot be read is named."""
    try:
        source = _data_uri(path)
    except (OSError, ValueError, SyntaxError, ConfigError, Warning) as error:  # Pillow's too; the page does without
        return f'<p class="soft">{esc(f"{path.name} cannot be shown: {error}")}</p>'
    return (
        f'<figure class="picture"><img src="{source}" alt="{esc(caption)}">'
        f"<figcaption>{esc(caption)}</figcaption></figure>"
    )


def _data_uri(path: Path) -> str:
    """The picture itself; a large one is made smaller and turned into JPEG first, so that the page stays a page."""
    data, kind = read_bytes(path, _LARGEST_PICTURE_BYTES), "png"
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError("not a PNG file")
    if len(data) > _MAX_PICTURE_BYTES:
        from PIL import Image

        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.width * image.height > _LARGEST_PICTURE_PX:
                raise ValueError(f"{image.width} x {image.height} pixels")
            small = image.convert("RGB")
        small.thumbnail((_MAX_PICTURE_PX, 4 * _MAX_PICTURE_PX))
        buffer = io.BytesIO()
        small.save(buffer, format="JPEG", quality=88)
        data, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items, evenly taken from first to last."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
