"""Pascal VOC xml: a file for each image.  Corners count from 1 and belong to the box (host.robots.ox.ac.uk/pascal/VOC).

Programs write such files with corners that count from 0 too, so the smallest corner of the whole set tells which.  No
document type, hence no entity, is read.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from typing import Any
from xml.parsers import expat

from swinv2_train.config.shown import shown
from swinv2_train.data.annotations.form import BACKGROUND, Annotations, Drawn, DrawnImage, Read
from swinv2_train.data.class_names import in_order
from swinv2_train.data.sample import ShardError

XML_BYTES = 2**24
_MAX_DEPTH, _MAX_ELEMENTS = 32, 1_000_000


class XmlError(ValueError):
    """Bytes that are no XML of the plain kind; the text says why."""


def parse_xml(content: bytes) -> ET.Element:
    """The root of a document without document type, of bounded size, depth and number of elements.

    Raises XmlError.
    """
    if len(content) > XML_BYTES:
        raise XmlError(f"{len(content)} bytes, more than the {XML_BYTES} that are read")
    builder, parser = ET.TreeBuilder(), expat.ParserCreate()
    depth, elements = 0, 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth, elements
        depth, elements = depth + 1, elements + 1
        if depth > _MAX_DEPTH or elements > _MAX_ELEMENTS:
            raise XmlError("it is nested too deeply, or has too many elements")
        builder.start(name, attributes)

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(name)

    def refuse(*_: Any) -> Any:
        raise XmlError("it has a document type (DOCTYPE), which may name entities and other files; remove that line")

    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, builder.data
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = parser.ExternalEntityRefHandler = refuse
    try:
        parser.Parse(content, True)
        return builder.close()
    except XmlError:
        raise
    except Exception as error:  # noqa: BLE001  expat's own, and what an unknown encoding raises
        raise XmlError(f"it is no XML ({shown(error, 120)})") from error


def read_voc(files: Mapping[str, Read], origin: str) -> Annotations:
    """files: by path from the folder on, with its ending.  Raises ShardError naming the first that is none."""
    images: dict[str, DrawnImage] = {}
    for name, read in files.items():
        try:
            root = parse_xml(read())
        except XmlError as error:
            raise ShardError(f"{origin}: {name}: {error}") from error
        if root.tag != "annotation":
            raise ShardError(f"{origin}: {name}: its root is <{root.tag:.40}>, but Pascal VOC's is <annotation>")
        images[name.rpartition(".")[0]] = _image(root)
    corners = [
        value for image in images.values() for each in image.objects for value in (each.box or [])[:2]
        if isinstance(value, float)
    ]  # fmt: skip
    from_one = min(corners, default=1.0) >= 1
    if from_one:
        for image in images.values():
            for each in image.objects:
                if each.box:
                    each.box = [each.box[0] - 1, each.box[1] - 1, each.box[2], each.box[3]]
    names = {str(each.category) for image in images.values() for each in image.objects}
    classes = in_order(name for name in names if name.lower() not in BACKGROUND)
    how = "count from 1 and belong to the box, as Pascal VOC's do" if from_one else "count from 0"
    note = f"{origin}: the corners of boxes {how} (the smallest is {min(corners, default=1.0):g})"
    return Annotations("Pascal VOC", origin, images, classes, by_stem=True, absent_is_empty=False, notes=(note,))


def _image(root: ET.Element) -> DrawnImage:
    found = DrawnImage()
    height, width = (_number(root.findtext(f"size/{side}")) for side in ("height", "width"))
    if height is not None and width is not None and height >= 1 and width >= 1:
        found.size = (int(height), int(width))
    for each in root.iterfind("object"):
        box = [_number(each.findtext(f"bndbox/{corner}")) for corner in ("xmin", "ymin", "xmax", "ymax")]
        difficult = (each.findtext("difficult") or "").strip() == "1"
        name = (each.findtext("name") or "").strip()
        found.objects.append(Drawn(name, [] if None in box else box, crowd=difficult))
    return found


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None and len(text) < 64 else None
    except ValueError:
        return None
