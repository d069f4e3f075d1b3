"""What a model says of one image: of a classifier its classes, of a dense task the class of each pixel, or objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from swinv2_train.config import ConfigError
from swinv2_train.data.mask_codes import decode_rle
from swinv2_train.data.tables import Column
from swinv2_train.tasks.detections import Found


class Ask(NamedTuple):
    """What is wanted of every image."""

    top_k: int
    """Of a classifier: how many classes at most."""
    name: Callable[[int], str]
    """What a class is called."""


class Evidence(NamedTuple):
    """A number that a model says of one image, for which its evidence in the image is asked (Grad-CAM)."""

    text: str
    """What it is, for people."""
    score: Tensor
    """(), with its graph."""


class Answer(Protocol):
    """What is said of one image; plain numbers, texts and arrays."""

    def row(self) -> dict[str, Any]:
        """As the cells of a table, by the names of the task's answer_columns."""


class Prediction(NamedTuple):
    """The most probable classes of an image, the best first."""

    classes: tuple[int, ...]
    """Their numbers."""
    labels: tuple[str, ...]
    """Their names; their numbers where the weights name no classes."""
    probabilities: tuple[float, ...]

    @property
    def label(self) -> str:
        """The name of the most probable one."""
        return self.labels[0]

    def row(self) -> dict[str, Any]:
        """The three lists."""
        return {name: list(values) for name, values in self._asdict().items()}

    @staticmethod
    def columns(count: int) -> dict[str, Column]:
        """Of answers with so many classes."""
        return {
            "classes": Column("int", count), "labels": Column("str", count), "probabilities": Column("float", count),
        }  # fmt: skip

    @classmethod
    def of(cls, probabilities: Tensor, ask: Ask) -> list[Prediction]:
        """One for each row of probabilities, (B, classes); ConfigError where these are no numbers."""
        check_finite(probabilities)
        best = probabilities.cpu().topk(min(ask.top_k, probabilities.shape[1]), dim=1)
        return [
            cls(tuple(classes), tuple(map(ask.name, classes)), tuple(shares))
            for classes, shares in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


class Classes(NamedTuple):
    """The classes that are said to apply to an image, and how probable each class is."""

    classes: tuple[int, ...]
    """The numbers of those that apply, more probable than task.threshold; the most probable first."""
    labels: tuple[str, ...]
    """Their names; their numbers where the weights name no classes."""
    probabilities: tuple[float, ...]
    """Of every class, by its number."""

    def row(self) -> dict[str, Any]:
        """The three lists."""
        return {name: list(values) for name, values in self._asdict().items()}

    @staticmethod
    def columns(count: int) -> dict[str, Column]:
        """Of a model with so many classes."""
        return {
            "classes": Column("int", None), "labels": Column("str", None), "probabilities": Column("float", count),
        }  # fmt: skip

    @classmethod
    def of(cls, probabilities: Tensor, threshold: float, ask: Ask) -> list[Classes]:
        """One for each row of probabilities, (B, classes); ConfigError where these are no numbers."""
        check_finite(probabilities)
        found = []
        for row in probabilities.cpu():
            order = row.argsort(descending=True, stable=True)
            said = tuple(order[row[order] > threshold].tolist())
            found.append(cls(said, tuple(map(ask.name, said)), tuple(row.tolist())))
        return found


class Values(NamedTuple):
    """The numbers that are said of an image, in the units of their labels (data.labels_columns)."""

    values: tuple[float, ...]

    def row(self) -> dict[str, Any]:
        """The list."""
        return {"values": list(self.values)}

    @staticmethod
    def columns(count: int) -> dict[str, Column]:
        """Of so many numbers."""
        return {"values": Column("float", count)}

    @classmethod
    def of(cls, values: Tensor) -> list[Values]:
        """One for each row, (B, K); ConfigError where these are no numbers."""
        check_finite(values)
        return [cls(tuple(row)) for row in values.tolist()]


class ClassMap(NamedTuple):
    """The class of each pixel of an image."""

    classes: np.ndarray
    """(H, W) uint8, or uint16 for more than 256 classes: the image's own size."""
    labels: dict[int, str]
    """What the classes are called that occur, by their numbers; the commonest first."""
    pixels: dict[int, int]
    """How many pixels each has, likewise."""

    def row(self) -> dict[str, Any]:
        """The size, and the classes that occur."""
        height, width = self.classes.shape
        return {
            "height": height, "width": width, "classes": list(self.labels), "labels": list(self.labels.values()),
            "pixels": list(self.pixels.values()),
        }  # fmt: skip

    @staticmethod
    def columns() -> dict[str, Column]:
        """One size, and as many classes as occur."""
        return {
            "height": Column("int"), "width": Column("int"), "classes": Column("int", None),
            "labels": Column("str", None), "pixels": Column("int", None),
        }  # fmt: skip

    @classmethod
    def of(cls, classes: np.ndarray, ask: Ask) -> ClassMap:
        """classes: (H, W) whole numbers."""
        narrow = classes.astype(np.uint8 if classes.max(initial=0) < 256 else np.uint16)
        numbers, counts = np.unique(narrow, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        pixels = {int(numbers[place]): int(counts[place]) for place in order}
        return cls(narrow, {number: ask.name(number) for number in pixels}, pixels)


class DetectedObjects(NamedTuple):
    """The objects that are found in an image, the best first; D of them."""

    found: Found
    labels: tuple[str, ...]
    """What their classes are called."""
    size: tuple[int, int]
    """(height, width) of the image."""
    image_id: int | None
    """Its number among the images of a data set; None where nothing says it."""

    @property
    def boxes(self) -> np.ndarray:
        """(D, 4) float32: x0, y0, x1, y1 in pixels of the image."""
        return self.found.boxes

    @property
    def scores(self) -> np.ndarray:
        """(D,) float32."""
        return self.found.scores

    @property
    def classes(self) -> np.ndarray:
        """(D,) int64."""
        return self.found.classes

    @property
    def masks(self) -> np.ndarray | None:
        """(D, H, W) bool; None of a model without masks."""
        if self.found.masks is None:
            return None
        drawn = [decode_rle(each, self.size) for each in self.found.masks]
        return np.stack(drawn) if drawn else np.zeros((0, *self.size), bool)

    def row(self) -> dict[str, Any]:
        """The size, and a list of each of what objects have; masks as COCO's compressed run lengths."""
        height, width = self.size
        return {
            "image_id": self.image_id, "height": height, "width": width, "classes": self.classes.tolist(),
            "labels": list(self.labels),
            "scores": self.scores.tolist(), "boxes": self.boxes.tolist(),
            "masks": [] if self.found.masks is None else [each["counts"].decode() for each in self.found.masks],
        }  # fmt: skip

    @staticmethod
    def columns() -> dict[str, Column]:
        """One size, and as many objects as are found."""
        return {
            "image_id": Column("int"), "height": Column("int"), "width": Column("int"), "classes": Column("int", None),
            "labels": Column("str", None), "scores": Column("float", None), "boxes": Column("floats", None),
            "masks": Column("str", None),
        }  # fmt: skip

    @classmethod
    def of(cls, found: Found, size: tuple[int, int], image_id: int | None, ask: Ask) -> DetectedObjects:
        """ConfigError where scores or boxes are no numbers."""
        if not found.in_numbers:
            raise ConfigError(_NOT_FINITE)
        return cls(found, tuple(map(ask.name, found.classes.tolist())), size, image_id)


_NOT_FINITE = (
    "the model's scores are not finite numbers: its weights, or data.mean and data.std, are wrong; load others"
)


MOST_EVIDENCE = 4
"""Of one image, where nothing says of which class."""


def check_finite(scores: Tensor) -> None:
    """ConfigError for scores that no class could be named by: the first would always be the highest."""
    if not scores.isfinite().all():
        raise ConfigError(_NOT_FINITE)


Columns = Mapping[str, Column]
