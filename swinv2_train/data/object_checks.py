"""What make_shards looks at while it packs images with their objects, before a run finds it out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from swinv2_train.config.shown import shown, tell
from swinv2_train.data.annotations.form import DrawnImage
from swinv2_train.data.annotations.rules import BadBoxes, objects_of
from swinv2_train.data.label_checks import LabelImageChecks
from swinv2_train.data.objects import Objects, objects_to_json
from swinv2_train.data.sample import SampleError, ShardError
from swinv2_train.data.transforms.image_sizes import image_sizes

Overlay = Callable[[str, bytes, str, Objects], None]
"""Is given a key, the image's bytes, its extension and its objects."""
_LISTED, _BARS = 30, 30


@dataclass
class ObjectChecks:
    """Every image's objects are looked at as it is packed, by the rules of annotations/rules.py, and counted."""

    source: str
    """What errors call the images."""
    classes: Sequence[str]
    bad: BadBoxes
    drop_empty: bool = False
    """Leave out images without objects, as COCO's published training does."""
    overlay: Overlay | None = None
    num_overlays: int = 0
    label_images: LabelImageChecks | None = None
    """Where images are packed with the classes of their pixels, too."""
    numbers: Sequence[int] | None = None
    """What each of `classes` counts as; None = as its place."""
    counts: Counter[str] = field(default_factory=Counter)
    """Objects by class."""
    images: int = 0
    """That were packed."""
    empty: int = 0
    masks: int = 0
    crowds: int = 0
    drawn: int = 0
    """Overlays."""

    def look(self, key: str, image: bytes, extension: str, drawn: DrawnImage, image_id: int) -> bytes | None:
        """The JSON of an image's objects to pack; None for an image that is to be left out.

        Raises ShardError, naming the image, for one whose size is not known or not that of its annotations.
        """
        whose = f"{self.source}: the image '{shown(key)}'"
        try:
            objects = self._objects(key, image, drawn, image_id)
        except SampleError as error:
            raise ShardError(f"{whose} cannot be packed: {error}; mend it, or move the image away") from error
        if not len(objects.boxes):
            self.empty += 1
            if self.drop_empty:
                return None
        elif self.overlay is not None and self.drawn < self.num_overlays:
            self.overlay(key, image, extension, objects)
            self.drawn += 1
        self.images += 1
        self.crowds += int(objects.crowd.sum())
        self.masks += sum(mask is not None for mask in objects.masks)
        return objects_to_json(objects)

    def _objects(self, key: str, image: bytes, drawn: DrawnImage, image_id: int) -> Objects:
        sizes = image_sizes(image)
        if not sizes:
            raise SampleError("its file does not say how many pixels it has")
        size = drawn.size if drawn.size in sizes else sizes[0]
        places = {name: number for number, name in enumerate(self.classes)}
        numbers = places if self.numbers is None else {name: self.numbers[number] for name, number in places.items()}
        objects = objects_of(drawn, key, size, numbers, self.bad, image_id)
        named = {number: name for name, number in numbers.items()}
        self.counts.update(named[number] for number in objects.classes.tolist())
        return objects

    def finish(self) -> None:
        """Say what the images hold.  Raises ShardError where there is no object at all."""
        if (text := self.bad.text()) is not None:
            tell(text)
        if not self.counts:
            raise ShardError(f"{self.source}: no object is left in any image; look at the lines above")
        total, most = self.counts.total(), max(self.counts.values())
        lines = [
            f"{total} objects of {len(self.counts)} classes in {self.images} images: {self.masks} with masks, "
            f"{self.crowds} crowds; {self.empty} images without objects{' left out' if self.drop_empty else ''}"
        ]
        for name in sorted(self.counts, key=lambda each: -self.counts[each])[:_LISTED]:
            bar = "#" * max(1, round(_BARS * self.counts[name] / most))
            lines.append(f"  {self.counts[name]:>8}  {bar:<{_BARS}}  {shown(name, 40)}")
        if len(self.counts) > _LISTED:
            lines.append(f"  ... and {len(self.counts) - _LISTED} classes more")
        if unused := [name for name in self.classes if name not in self.counts]:
            lines.append(f"  no object of {len(unused)} classes: {', '.join(shown(each, 40) for each in unused[:8])}")
        tell("\n".join(lines))
        if self.label_images is not None:
            self.label_images.finish()
