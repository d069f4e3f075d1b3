"""From images with objects to the rows of task=detect."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swinv2_train.config import DetectConfig
from swinv2_train.data.clips.clip import Clip
from swinv2_train.data.objects import Objects, check_image_size, objects_from_json
from swinv2_train.data.sample import OBJECTS, SEGMENTATION, SampleError, Targets
from swinv2_train.data.transforms.detect import IGNORED, DetectTrainView, eval_views
from swinv2_train.data.transforms.label_image import check_sizes, class_numbers, read_label_image
from swinv2_train.tasks.inputs import ImageTransform


@dataclass(frozen=True, kw_only=True)
class DetectTransform(ImageTransform):
    """An image and its objects.

    For training a view of both: {"images": (C, H, W), "extent": int64 (2,), "boxes": float32 (M, 4), "classes": int64
    (M,), "crowd": bool (M,)} and, with task.masks, "masks": uint8 (M, H, ceil(W / 8)), with task.semantic_classes
    "semantic": uint8 (ceil(H / s), ceil(W / s)), as transforms/detect.py's View describes them; M = task.max_objects,
    s = cell; and "draw", int64 (), for what the model draws of this view.  For evaluation both keep their own sizes, so
    they are plain: {"views": [(C, h, w) of each of task.eval_scales], "size": (H, W), "image_id": int or None,
    "truth": Truth}, the last where objects are needed.
    """

    task: DetectConfig
    needs: tuple[str, ...] = (OBJECTS,)
    fill: tuple[float, ...]
    """The value of each band that is 0 when normalised."""
    notes: set[str] = field(default_factory=set, compare=False)
    """What is worth saying once of the images."""

    cell: int
    """Pixels between two labels of the semantic branch."""

    def __call__(self, image: Tensor | Clip, targets: Targets, rng: np.random.Generator) -> dict[str, Any]:
        assert isinstance(image, Tensor), "objects are of images"
        if not self.train and OBJECTS not in self.needs:
            return {**self._seen(image), "image_id": _image_id(targets)}
        objects = objects_from_json(targets["objects"])
        check_image_size(objects, (image.shape[1], image.shape[2]))
        self._check_classes(objects)
        if not self.train:
            return self._eval_row(image, objects)
        labels = self._labels(targets, objects.size) if SEGMENTATION in self.needs else None
        return self._train_row(image, objects, labels, rng)

    def _labels(self, targets: Targets, size: tuple[int, int]) -> np.ndarray:
        """uint8 (H, W)"""
        values = read_label_image(targets["segmentation"])
        check_sizes((values.shape[0], values.shape[1]), size)
        return class_numbers(values, self.task.semantic_classes, False, IGNORED, "task.semantic_classes")

    def _train_row(
        self, image: Tensor, objects: Objects, labels: np.ndarray | None, rng: np.random.Generator
    ) -> dict[str, Any]:
        task, data = self.task, self.data
        view = DetectTrainView(
            size=self.img_size,
            scale=(task.resize_scale[0], task.resize_scale[1]),
            resize=task.resize,
            flip=data.hflip,
            dihedral=data.dihedral,
            max_objects=task.max_objects,
            min_object_px=task.min_object_px,
            masks=task.masks,
            fill=self.fill,
            cell=self.cell,
        )(image, objects, rng, labels)
        if view.left_out:
            self.notes.add(
                f"some crops hold more objects than task.max_objects ({task.max_objects}); the largest are kept and "
                "the others count as background: raise it where that is not what you want"
            )
        row: dict[str, Any] = {name: value for name, value in view._asdict().items() if isinstance(value, Tensor)}
        return {**row, "draw": torch.tensor(int(rng.integers(2**31)))}

    def _seen(self, image: Tensor) -> dict[str, Any]:
        task = self.task
        views = eval_views(image, task.eval_long_px, task.eval_short_px, task.eval_scales, task.resize)
        return {"views": views, "size": (image.shape[1], image.shape[2])}

    def _eval_row(self, image: Tensor, objects: Objects) -> dict[str, Any]:
        return {
            **self._seen(image),
            "image_id": objects.image_id,
            "truth": {
                "boxes": objects.boxes,
                "classes": objects.classes,
                "crowd": objects.crowd,
                "area": objects.area,
                "masks": [None if mask is None else mask.codes(objects.size) for mask in objects.masks],
            },
        }

    def _check_classes(self, objects: Objects) -> None:
        highest = int(objects.classes.max(initial=-1))
        if highest >= self.task.num_classes:
            raise SampleError(
                f"it has an object of class {highest}, but task.num_classes ({self.task.num_classes}) knows 0 to "
                f"{self.task.num_classes - 1}; set task.num_classes={highest + 1} or more"
            )


def _image_id(targets: Targets) -> int | None:
    """The number of the image, where objects beside it say one."""
    if OBJECTS not in targets:
        return None
    try:
        return objects_from_json(targets["objects"]).image_id
    except SampleError:  # the image can be answered for all the same
        return None
