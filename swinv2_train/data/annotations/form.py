"""What every reader of annotations gives: objects as they were written, nothing of them mended or left out yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Read = Callable[[], bytes]
BACKGROUND = {"_background_", "__background__", "background", "__ignore__", "_ignore_"}
"""What programs call what is no object; it is no class."""


@dataclass(slots=True)
class Drawn:
    """An object as somebody drew it."""

    category: Any
    """Its class's name; or its number, which the set has no class for."""
    box: Sequence[Any] | None
    """x0, y0, x1, y1 in continuous pixels of the image; None = around its polygons."""
    crowd: bool = False
    area: Any = None
    """Pixels; None = as many as it has."""
    polygons: Sequence[Any] | None = None
    """Each a list of x, y, x, y, ...; None without any."""
    rle: Any = None
    """COCO's run lengths; None without any."""


@dataclass(slots=True)
class DrawnImage:
    """An image as its annotations describe it."""

    objects: list[Drawn] = field(default_factory=list)
    size: tuple[int, int] | None = None
    """(height, width); None where the annotations do not say."""
    image_id: int | None = None
    relative: bool = False
    """Coordinates are shares of the image's width and height."""


@dataclass(frozen=True)
class Annotations:
    """The annotations of a set of images."""

    kind: str
    """COCO, Pascal VOC, YOLO or labelme."""
    origin: str
    """What errors call them."""
    images: Mapping[str, DrawnImage]
    """By the image's path with / between folders, or without its ending where the format does not name it."""
    classes: tuple[str, ...]
    """In the order of their numbers."""
    by_stem: bool
    """Whether `images` are known without their endings."""
    absent_is_empty: bool
    """Whether an image without annotations has no objects; else nobody looked at it."""
    notes: tuple[str, ...] = ()
    """What is to be said of them."""
