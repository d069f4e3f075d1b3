"""YOLO txt: a file for each image, a line for each object: class, then centre, width and height as shares of the image;
or class, then a polygon x, y, x, y, ... of three points at least.  An image without a file has no objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from swinv2_train.config.shown import shown
from swinv2_train.data.annotations.form import Annotations, Drawn, DrawnImage, Read
from swinv2_train.data.sample import ShardError

TXT_BYTES = 2**24
NAMES = ("data.yaml", "dataset.yaml", "classes.txt", "obj.names", "labels.txt")
"""The files that may name the classes, beside the annotations or one folder above; no annotations themselves."""
_NAMES_BYTES = 2**20


def read_yolo(files: Mapping[str, Read], names: tuple[str, ...] | None, origin: str) -> Annotations:
    """files: by path from the folder on, with its ending.  names: of the classes; None = by their numbers.

    Raises ShardError naming the first file that is none.
    """
    rows = {name.rpartition(".")[0]: _lines(read(), f"{origin}: {name}") for name, read in files.items()}
    highest = max((number for lines in rows.values() for number, _ in lines), default=-1)
    if highest > 99_999:
        raise ShardError(f"{origin}: an object of class {highest}; YOLO's lines begin with the number of a class")
    classes = tuple(map(str, range(highest + 1))) if names is None else names
    images = {
        name: DrawnImage([_drawn(number, values, classes) for number, values in lines], relative=True)
        for name, lines in rows.items()
    }
    notes: tuple[str, ...] = ()
    if names is None:
        notes = (
            f"{origin}: no {', '.join(NAMES)} beside it, so its {highest + 1} classes are called by their numbers",
        )
    return Annotations("YOLO", origin, images, classes, by_stem=True, absent_is_empty=True, notes=notes)


def _lines(content: bytes, where: str) -> list[tuple[int, list[float]]]:
    """The class and the numbers of each line."""
    if len(content) > TXT_BYTES:
        raise ShardError(f"{where}: {len(content)} bytes, more than the {TXT_BYTES} that are read")
    found = []
    for number, line in enumerate(content.decode("utf-8-sig", "replace").splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        try:
            label, values = float(fields[0]), [float(each) for each in fields[1:]]
        except ValueError:
            label, values = -1.0, []
        polygon = len(values) >= 6 and len(values) % 2 == 0
        if not (label.is_integer() and 0 <= label < 2**31) or not (len(values) in (4, 5) or polygon):
            raise ShardError(
                f"{where}, line {number} ({shown(line, 60)}) is none of YOLO's: class, x, y, width, height as shares "
                "of the image; or class, x, y, x, y, x, y, ..."
            )
        found.append((int(label), values))
    return found


def _drawn(number: int, values: list[float], classes: tuple[str, ...]) -> Drawn:
    category: Any = classes[number] if number < len(classes) else number
    if len(values) >= 6:
        return Drawn(category, None, polygons=[values])
    x, y, width, height = values[:4]  # a fifth is a detector's own score
    return Drawn(category, [x - width / 2, y - height / 2, x + width / 2, y + height / 2])


def yolo_names(name: str, content: bytes, where: str) -> tuple[str, ...]:
    """The names in one of NAMES.  Raises ShardError."""
    if len(content) > _NAMES_BYTES:
        raise ShardError(f"{where}: {len(content)} bytes, more than the {_NAMES_BYTES} that are read")
    text = content.decode("utf-8-sig", "replace")
    if not name.endswith(".yaml"):
        return tuple(line.strip() for line in text.splitlines() if line.strip())
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ShardError(f"{where} is no YAML ({shown(error, 200)})") from error
    names = value.get("names") if isinstance(value, dict) else None
    if isinstance(names, dict) and all(isinstance(key, int) for key in names):
        names = [names.get(number) for number in range(max(names, default=-1) + 1)] if len(names) < 10**5 else None
    if not isinstance(names, list) or not names or not all(isinstance(each, str | int) for each in names):
        raise ShardError(
            f"{where}: its names must be a list of the classes' names, or a number: name for each from 0 on"
        )
    return tuple(str(each) for each in names)
